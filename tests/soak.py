"""Soak: the same load over and over against one process, and what it holds at rest: memory, descriptors, the log.

    python -m tests.soak --minutes 10

A cycle: an answer of 10 million characters with fifty readers that do not read it and two that do; two hundred clients
that ask and are gone at once; eight that chat, are cut off and come back; then everything is deleted, and the process
comes to rest. The exit status is 1 if something is left open then, if an answer was not whole, or if memory at rest has
grown since the first cycle by more than malloc's habits explain.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.chaos import Process, find_leaks
from tests.client import EventStream, Reader
from tests.conftest import wait_until
from tests.guarantees import texts, varied_text
from tests.provider import Provider, openai_end

STALLED, READING, ABORTED, CHATTING, CHATS = 50, 2, 200, 8, 10
ANSWER_CHARACTERS = 10_000_000
REST_SECONDS = 3.0  # after an answer, before free memory is given back, and after it was indexed; 10 as delivered
GROWTH_BYTES_MAX = 40_000_000  # of memory at rest, from the first cycle on


class Cycle:
    """One turn of the load."""

    def __init__(self, server: Process, provider: Provider, content: str) -> None:
        self.server, self.provider, self.content = server, provider, content

    def __call__(self) -> list[str]:
        """Returns what was wrong."""
        pieces = [self.content[start : start + 2000] for start in range(0, len(self.content), 2000)]
        self.provider.script([*texts(pieces), *openai_end()], model="n")
        big = self.server.start_chat("Tell me everything", model="n")
        path = f"/api/v1/messages/{big}/stream"
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(READING + CHATTING + 20) as threads:
            for _ in range(STALLED):
                stack.enter_context(EventStream(self.server.url, "GET", path, receive_bytes=4096, timeout=60))
            reading = [threads.submit(self.read_whole, path) for _ in range(READING)]
            chatting = [threads.submit(self.chat) for _ in range(CHATTING)]
            for aborted in [threads.submit(self.abort) for _ in range(ABORTED)]:
                aborted.result()
            wrong = [problem for one in (*reading, *chatting) for problem in one.result()]
            wait_until(lambda: self.status_of(big) != "running", "the end of the long answer", 300)
            if self.status_of(big) != "completed":
                wrong.append(f"the long answer is {self.status_of(big)}")
        self.delete_all()
        return wrong

    def status_of(self, message_id: int) -> str:
        return str(self.server.rows("SELECT status FROM message WHERE id = ?", message_id)[0][0])

    def read_whole(self, path: str) -> list[str]:
        checksum, length = hashlib.sha256(), 0
        with EventStream(self.server.url, "GET", path, timeout=60) as stream:
            for event in stream.events():
                if event.name == "delta":
                    checksum.update(event.data["text"].encode())
                    length += len(event.data["text"])
        whole = checksum.digest() == hashlib.sha256(self.content.encode()).digest()
        return [] if whole else [f"a reader got {length:,} characters of the long answer"]

    def chat(self) -> list[str]:
        """Chats that are cut off after a few events and resumed; what is held must be what is stored."""
        wrong = []
        for _ in range(CHATS):
            reader = Reader()
            with self.server.chat("Hello", model="m") as stream:
                start = next(stream.events())
                reader.take(start)
                reader.read(stream, 5)
                stream.reset()
            message_id = start.data["message_id"]
            with self.server.resume(message_id, reader.cursor) as stream:
                reader.read(stream)
            if reader.end is None or reader.content != self.server.content(message_id):
                wrong.append(f"message {message_id}: {len(reader.content)} characters are held, others are stored")
        return wrong

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self.server.chat("and away", model="m").reset()

    def delete_all(self) -> None:
        while ids := [row[0] for row in self.server.rows("SELECT id FROM conversation LIMIT 1000")]:
            for conversation_id in ids:
                self.server.client.delete(f"/api/v1/conversations/{conversation_id}")


def soak(folder: Path, seconds: float, characters: int, provider: Provider) -> tuple[dict[str, str], list[str]]:
    """Cycles for so long, at least two. Returns the figures, and what was wrong."""
    more = {"LLMCHAT_ANSWER_CHARACTERS_MAX": str(2 * characters), "LLMCHAT_GENERATIONS_MAX": "1000"}
    content, wrong, at_rest = varied_text(characters), [], []
    with contextlib.closing(Process(folder, provider, constants={"REST_SECONDS": REST_SECONDS}, **more)) as server:
        files = server.first_descriptors()
        start = (server.memory_bytes("VmRSS"), len(files), server.wal_bytes())
        cycle, deadline = Cycle(server, provider, content), time.monotonic() + seconds
        while len(at_rest) < 2 or time.monotonic() < deadline:
            wrong += cycle()
            wrong += find_leaks(server, provider, files)
            provider.requests.clear()
            time.sleep(REST_SECONDS * 3)  # by then it has given back what memory it could
            at_rest.append(server.memory_bytes("VmRSS"))
            print(
                f"cycle {len(at_rest)}: {at_rest[-1] / 1e6:.1f} MB at rest, peak {server.memory_bytes() / 1e6:.1f} MB"
            )
        end = (at_rest[-1], len(server.descriptors()), server.wal_bytes())
        figures = {
            "cycles": f"{len(at_rest)}",
            "aborted clients": f"{ABORTED * len(at_rest):,}",
            "stalled readers": f"{STALLED} at a time",
            "RSS": f"{start[0] / 1e6:.1f} MB at the start, {at_rest[0] / 1e6:.1f} after one cycle, {end[0] / 1e6:.1f} at the end",
            "peak RSS": f"{server.memory_bytes() / 1e6:.1f} MB",
            "descriptors": f"{start[1]} at the start, {end[1]} at the end ({provider.open_connections} to the provider)",
            "WAL bytes": f"{start[2]:,} at the start, {end[2]:,} at the end",
        }
        wrong += [line.strip() for line in server.log if "Traceback" in line]
    if max(at_rest[1:]) - at_rest[0] > GROWTH_BYTES_MAX:
        wrong.append(f"memory at rest grew from {at_rest[0]:,} to {max(at_rest[1:]):,} bytes")
    return figures, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--characters", type=int, default=ANSWER_CHARACTERS, help="of the long answer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Provider() as provider:
        figures, wrong = soak(Path(folder), arguments.minutes * 60, arguments.characters, provider)
    print("\n| what | figure |\n|---|---|")
    for name, figure in {**figures, "violations": f"{len(wrong)}"}.items():
        print(f"| {name} | {figure} |")
    for problem in wrong:
        print(problem)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
