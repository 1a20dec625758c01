"""Chaos: many clients and a provider that fails against a real process that is killed, through networks that break.

    python -m tests.chaos --minutes 10 --seed 7

    clients ──▶ networks (tests/tcp_proxy.py) ──▶ llmchat.py, killed and started again ──▶ the provider
       └── every client keeps all that it ever saw; after every round the book of it is held against the database

A round: clients ask, come back, stop, continue, regenerate, delete, read slowly and vanish, while a gremlin cuts their
connections; then the process is killed (-9), or told to end, or left to come to rest. Then the invariants, of which a
breach is a violation: what was seen is the beginning of what is stored, and nothing was ever seen twice or in another
order; a whole answer is the provider's, character for character; what was answered to a stop or a deletion still holds;
nothing runs that is not running; the provider was asked once per attempt; the database is sound and has no orphans;
nothing is left open in the process when it rests; no traceback in its log.

What happens is drawn from the seed; when it happens is up to the machine, so that a seed repeats the plan of a run and
not its every moment. The exit status is 1 if there was a violation; then the database is kept, and its place printed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.client import EventStream, Reader
from tests.conftest import Server, wait_until
from tests.guarantees import PROGRAM, Tuned, varied_text
from tests.provider import Hangup, Provider, Request, Script
from tests.tcp_proxy import Direction, Ending, Link, TcpProxy
from tests.test_faults import CASES, SOON, refusal, text

CLIENTS, NETWORKS = 14, 4
CLIENT_SECONDS = 1.5  # of silence until a client takes its connection for dead; heartbeats come every 0.25
REST_SECONDS = 60  # for the process to come to rest
KEPT_CONVERSATIONS = 300  # what is older is deleted, so that a long run checks no more than a short one
VIOLATIONS_MAX = 20
ATTEMPTS = 3
# Left out: what only costs time, and what needs settings of its own.
TOO_DEAR = {"an event over 8 MiB", "an event of one line that never ends", "an error whose body never ends"}
FAULTS = [case for case in CASES if case.server in ("patient", "impatient") and case.name not in TOO_DEAR]
TASKS_AT_REST = Counter(["Task-1", "flusher", "indexer", "merger", "sweeper", "tidier", "writer"])
TAG = re.compile(r"\[(r\d+c\d+q\d+)\]")

WATCHED = """
import asyncio, signal, sys


def tell_tasks(*_):
    print("tasks:", ", ".join(sorted(task.get_name() for task in asyncio.all_tasks())), file=sys.stderr, flush=True)


signal.signal(signal.SIGUSR1, tell_tasks)
"""
CONSTANTS = {"MERGE_AFTER_SECONDS": 1, "QUEUE_EVENTS_MAX": 2, "RETRY_DELAY_SECONDS": 0.05, "REFUSAL_SECONDS": 1}
SETTINGS = {
    "LLMCHAT_HEARTBEAT_SECONDS": "0.25",
    "LLMCHAT_STALL_TIMEOUT_SECONDS": "1.5",
    "LLMCHAT_FIRST_DELTA_TIMEOUT_SECONDS": "2",
    "LLMCHAT_KEEPALIVE_SECONDS": "2",
    "LLMCHAT_GENERATION_TIMEOUT_SECONDS": "10",
    "LLMCHAT_ANSWER_CHARACTERS_MAX": "60000",
    "LLMCHAT_DRAIN_SECONDS": "0.3",
    "LLMCHAT_RING_EVENTS": "8",
    "LLMCHAT_ATTEMPTS": str(ATTEMPTS),
    "ANTHROPIC_API_KEY": "sk-test",
    "ANTHROPIC_MODELS": "a",
}

# ── the process ──


class Process(Tuned):
    """The service, which tells its tasks when it gets SIGUSR1."""

    program = ("-c", WATCHED + PROGRAM)

    def first_descriptors(self) -> list[str]:
        """Those of a process that has done nothing yet but answer one request."""
        assert self.get("/api/v1/health").status_code == 200
        return self.descriptors()

    def tasks(self) -> list[str]:
        """The names of its tasks."""
        told = self._told()
        self.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: len(self._told()) > len(told), "the list of tasks", 20)
        return self._told()[-1].removeprefix("tasks: ").strip().split(", ")

    def _told(self) -> list[str]:
        return [line for line in list(self.log) if line.startswith("tasks: ")]

    def descriptors(self) -> list[str]:
        """What its file descriptors are, sockets without their numbers."""
        found = []
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(re.sub(r":\[\d+\]", "", str(descriptor.readlink())))
        return sorted(found)

    def memory_bytes(self, name: str = "VmHWM") -> int:
        """VmHWM: the highest ever; VmRSS: now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0

    def wal_bytes(self) -> int:
        log = self.db.with_name(self.db.name + "-wal")
        return log.stat().st_size if log.exists() else 0

    def die_while_starting(self, seconds: float) -> None:
        """Starts it and kills it after so long, wherever it is then."""
        starting = subprocess.Popen(
            [sys.executable, *self.program, "--port", "0", "--db", str(self.db)],
            cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(seconds)
        starting.kill()
        starting.wait()


# ── the provider ──


def plain_pieces(seed: str, tag: str) -> list[str] | None:
    """The pieces of a plain answer to this question; None: the provider fails in one of its ways."""
    source = random.Random(f"{seed} {tag}")
    kind = source.random()
    if kind < 0.35:
        return None
    count, size = (source.randint(1, 120), source.randint(1, 60)) if kind < 0.88 else (60, 900)
    whole = varied_text(count * size, f"{tag} ")
    return [whole[start : start + size] for start in range(0, len(whole), size)]


class Chaotic(Provider):
    """Answers each question as its tag says, and counts how often it was asked."""

    def __init__(self, seed: str) -> None:
        super().__init__()
        self.seed = seed
        self.calls: Counter[str] = Counter()

    def script_of(self, tag: str, call: int, dialect: str) -> Script:
        source = random.Random(f"{self.seed} {tag} how")
        pieces = plain_pieces(self.seed, tag)
        if pieces is None:
            answers = source.choice([case for case in FAULTS if dialect in case.dialects]).script(dialect)
            return answers[min(call, len(answers)) - 1]
        if source.random() < 0.1 and call == 1:
            return refusal(dialect, 503, "try again", **SOON)
        return text(dialect, *pieces, delay=source.choice([0, 0.002, 0.01, 0.03]))

    def _choose(self, request: Request) -> Any:
        tags = TAG.findall(request.body.decode("utf-8", "replace"))
        if request.method == "POST" and tags:
            self.calls[tags[-1]] += 1
            self.script(
                self.script_of(tags[-1], self.calls[tags[-1]], "anthropic" if request.is_anthropic else "openai")
            )
        return super()._choose(request)

    def forget(self) -> None:
        """What a long run need not keep."""
        self.requests.clear()
        self.connections[:] = [one for one in self.connections if one.closed_at is None]


# ── the networks ──


class Network(TcpProxy):
    """A proxy that counts what it does to connections."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self.cuts: Counter[str] = Counter()

    def end_some(self, share: float, ending: Ending, source: random.Random, name: str) -> None:
        def end() -> None:
            links = list(self._links)
            for link in source.sample(links, max(1, round(len(links) * share)) if links else 0):
                self.cuts[name] += 1
                link.end(ending)
                link.task.cancel()

        self.call(end, 20)

    async def _forward(self, link: Link, direction: Direction, data: bytes) -> None:
        try:
            await super()._forward(link, direction, data)
        except Hangup:
            self.cuts["after some bytes"] += 1
            raise


class Gremlin(threading.Thread):
    """Does to the networks what bad networks do, until it is told to stop."""

    def __init__(self, networks: list[Network], seed: str) -> None:
        super().__init__(daemon=True)
        self.networks, self.source, self.over = networks, random.Random(seed), threading.Event()

    def run(self) -> None:
        ways = [self._end_one, self._end_all, self._end_after, self._silence, self._drip]
        while not self.over.wait(self.source.uniform(0.02, 0.2)):
            self.source.choices(ways, [40, 8, 30, 8, 5])[0](self.source.choice(self.networks))
        for network in self.networks:
            network.drip(65536)
            network.cut_after(0, times=0)
            network.thaw()

    def _ending(self) -> Ending:
        return self.source.choice(["cut", "reset"])

    def _end_one(self, network: Network) -> None:
        ending = self._ending()
        network.end_some(0, ending, self.source, f"one: {ending}")

    def _end_all(self, network: Network) -> None:
        ending = self._ending()
        network.end_some(1, ending, self.source, f"all: {ending}")

    def _end_after(self, network: Network) -> None:
        direction: Direction = self.source.choice(["to_client", "to_client", "to_server"])
        count = self.source.choice([0, 1, 20, 150, 300, 700, 3000, 20000])
        network.cut_after(count, direction, self._ending(), self.source.randint(1, 3))

    def _silence(self, network: Network) -> None:
        """Half-open connections: nothing gets through, not even an end; then all is over, or goes on."""
        network.freeze()
        self.over.wait(self.source.uniform(0.1, 1.8))
        if self.source.random() < 0.6:
            network.end_some(1, "reset", self.source, "silence")
        network.thaw()

    def _drip(self, network: Network) -> None:
        network.drip(1, 0.0005)
        network.cuts["(one byte at a time)"] += network.open_connections
        self.over.wait(self.source.uniform(0.2, 0.8))
        network.drip(65536)


# ── what was seen ──


@dataclass
class Book:
    """All that clients saw and were told, since the beginning; what is deleted is forgotten."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    readers: dict[int, dict[int, Reader]] = field(default_factory=lambda: defaultdict(dict))  # message, client
    conversations: dict[int, int] = field(default_factory=dict)  # of a message
    stopped: dict[int, str] = field(default_factory=dict)  # what a stop was answered
    rerun: set[int] = field(default_factory=set)  # messages that somebody tried to continue
    deleting: set[int] = field(default_factory=set)  # conversations that somebody tried to delete
    deleted: set[int] = field(default_factory=set)  # and was told that they are
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def add(self, message_id: int, conversation_id: int) -> None:
        with self.lock:
            self.conversations[message_id] = conversation_id

    def recent(self, source: random.Random) -> int | None:
        """One of the newest messages, the newer the likelier."""
        with self.lock:
            known = list(self.conversations)
        return known[-1 - int(min(source.expovariate(1 / 12), len(known) - 1))] if known else None

    def violate(self, what: str) -> None:
        with self.lock:
            self.violations.append(what)
        print(f"VIOLATION {what}", flush=True)

    def forget(self, conversation_id: int) -> None:
        with self.lock:
            for message_id in [one for one, of in self.conversations.items() if of == conversation_id]:
                del self.conversations[message_id]
                self.readers.pop(message_id, None)
                self.stopped.pop(message_id, None)


class Client:
    """One client in one round: does one thing after the other until the round is over, whatever breaks on the way."""

    def __init__(
        self, number: int, seed: str, book: Book, networks: list[Network], over: threading.Event, asked: dict[str, Any]
    ) -> None:
        self.number, self.seed, self.book, self.networks, self.over = number, seed, book, networks, over
        self.source = random.Random(seed)
        self.is_slow = False  # reads slowly, on the newest connection
        self.asked = asked  # the body of a question that had no answer yet, also of an earlier round
        self.tags = (f"r{seed.split()[1]}c{number}q{count}" for count in itertools.count())

    def __call__(self) -> None:
        ways: list[tuple[Callable[[], None], int]] = [
            (self._ask, 40), (self._come_back, 30), (self._stop, 8), (self._continue, 10), (self._regenerate, 5),
            (self._delete, 4), (self._look, 8), (self._abort, 4), (self._watch_html, 5), (self._respond, 5),
        ]  # fmt: skip
        while not self.over.is_set():
            way = self.source.choices([one for one, _ in ways], [weight for _, weight in ways])[0]
            try:
                way()
            except (OSError, httpx.HTTPError):
                self.book.counts["broken connections"] += 1
                self.over.wait(self.source.uniform(0, 0.05))
            except Exception as exc:
                self.book.violate(f"client {self.number} of {self.seed!r} in {way.__name__}: {exc!r}")

    # ── what it does ──

    def _ask(self) -> None:
        """A question, and its answer to the end. One that was cut off before its answer began is asked again."""
        if not self.asked:
            tag = next(self.tags)
            model = self.source.choice(["openai/m", "openai/n", "anthropic/a"])
            self.asked.update({"message": f"[{tag}] a question, ü 日本", "model": model})
            if (message_id := self.book.recent(self.source)) is not None and self.source.random() < 0.2:
                self.asked["conversation_id"] = self.book.conversations.get(message_id)
                self.asked = {name: value for name, value in self.asked.items() if value is not None}
        key = {"Idempotency-Key": TAG.findall(self.asked["message"])[0]}
        with self._stream("POST", "/api/v1/chat", self.asked, key) as stream:
            if stream.status != 200:
                self._refused(stream.status, stream.error, 404, 503)
                if stream.status == 404:
                    self.asked.clear()
                return
            start = next(stream.events(), None)
            if start is None:
                return
            self.asked.clear()
            message_id = start.data["message_id"]
            self.book.add(message_id, start.data["conversation_id"])
            reader = self._reader(message_id)
            reader.content = "" if reader.cursor is None else reader.content
            if reader.content:  # somebody gave this client the message before
                return
            reader.take(start)
            self._read(stream, reader)
        self._follow(message_id, reader)

    def _come_back(self) -> None:
        message_id = self.book.recent(self.source)
        if message_id is not None:
            self._follow(message_id, self._reader(message_id))

    def _stop(self) -> None:
        if (message_id := self.book.recent(self.source)) is None:
            return
        with self._client() as client:
            self.book.counts["stops"] += 1
            response = client.post(f"/api/v1/messages/{message_id}/stop")
        if response.status_code == 200:
            assert response.json()["status"] != "running", "a stop is answered when the answer has ended"
            with self.book.lock:
                self.book.stopped[message_id] = response.json()["status"]
        else:
            self._refused(response.status_code, response.text, 404, 503)

    def _continue(self) -> None:
        if (message_id := self.book.recent(self.source)) is None:
            return
        with self.book.lock:
            self.book.rerun.add(message_id)
        reader = self._reader(message_id)
        headers = {"Last-Event-ID": str(reader.cursor)} if reader.cursor is not None else {}
        with self._stream("POST", f"/api/v1/messages/{message_id}/continue", None, headers) as stream:
            if stream.status != 200:
                self._refused(stream.status, stream.error, 404, 409, 503)
                return
            self.book.counts["continued"] += 1
        self._follow(message_id, reader)

    def _regenerate(self) -> None:
        if (message_id := self.book.recent(self.source)) is None:
            return
        with self._stream("POST", f"/api/v1/messages/{message_id}/regenerate", None) as stream:
            if stream.status != 200:
                self._refused(stream.status, stream.error, 404, 503)
                return
            start = next(stream.events(), None)
        if start is not None:
            self.book.counts["regenerated"] += 1
            self.book.add(start.data["message_id"], start.data["conversation_id"])
            self._follow(start.data["message_id"], self._reader(start.data["message_id"]))

    def _delete(self) -> None:
        if (message_id := self.book.recent(self.source)) is None:
            return
        conversation_id = self.book.conversations.get(message_id)
        if conversation_id is None:
            return
        with self.book.lock:
            self.book.deleting.add(conversation_id)
        with self._client() as client:
            response = client.delete(f"/api/v1/conversations/{conversation_id}")
        if response.status_code in (200, 404):
            self.book.counts["deletions"] += 1
            with self.book.lock:
                self.book.deleted.add(conversation_id)
        else:
            self._refused(response.status_code, response.text, 503)

    def _look(self) -> None:
        """The message as JSON: it holds at least what this client saw of it."""
        if (message_id := self.book.recent(self.source)) is None:
            return
        seen = self._reader(message_id).content
        with self._client() as client:
            response = client.get(f"/api/v1/messages/{message_id}")
        if response.status_code != 200:
            self._refused(response.status_code, response.text, 404, 503)
            return
        stored = "".join(part["text"] for part in response.json()["content"])
        assert stored.startswith(seen), f"message {message_id} has {len(stored)} characters, {len(seen)} were seen"

    def _abort(self) -> None:
        """A question by somebody who is gone at once."""
        tag = next(self.tags)
        body = {"message": f"[{tag}] and away", "background": self.source.random() < 0.3}
        thread = threading.Thread(target=self._post_and_vanish, args=(body,), daemon=True)
        thread.start()
        thread.join()
        self.book.counts["aborted"] += 1

    def _post_and_vanish(self, body: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            stream = self._stream("POST", "/api/v1/chat", body)
            stream.reset()

    def _watch_html(self) -> None:
        """The answer as HTML, which has no cursor; this client looks on for a while."""
        if (message_id := self.book.recent(self.source)) is None:
            return
        with self._stream("GET", f"/api/v1/messages/{message_id}/stream?render=html") as stream:
            if stream.status != 200:
                self._refused(stream.status, stream.error, 404, 503)
                return
            self.book.counts["HTML streams"] += 1
            names = [event.name for event in itertools.islice(stream.events(), self.source.randint(1, 40))]
            assert not stream.ended or "end" in names, f"a whole stream ends with its end: {names}"

    def _respond(self) -> None:
        """A response as OpenAI's clients ask for it, cut off somewhere, and from its beginning once more."""
        body = {"model": "openai/m", "input": f"[{next(self.tags)}] a response", "stream": True}
        with self._stream("POST", "/v1/responses", body) as stream:
            if stream.status != 200:
                self._refused(stream.status, stream.error, 503)
                return
            self.book.counts["responses"] += 1
            response_id, first = self._read_response(stream, self.source.randint(1, 60))
        if response_id:
            with self._stream("GET", f"/v1/responses/{response_id}?stream=true") as stream:
                if stream.status == 200:
                    again = self._read_response(stream, 10_000)[1]
                    assert first.startswith(again) or again.startswith(first), "both are beginnings of one text"

    def _read_response(self, stream: EventStream, most: int) -> tuple[str, str]:
        """The response's id, empty if it was not told, and the text that came."""
        response_id, parts = "", []
        for number, event in enumerate(itertools.islice(stream.events(), most)):
            assert event.data["sequence_number"] == number, "events are numbered from 0 on, without a gap"
            if event.name == "response.created":
                response_id = event.data["response"]["id"]
            elif event.name == "response.output_text.delta":
                parts.append(event.data["delta"])
            if self.over.is_set():
                break
        return response_id, "".join(parts)

    # ── how it does it ──

    def _url(self) -> str:
        return self.source.choice(self.networks).origin

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self._url(), timeout=CLIENT_SECONDS * 4, trust_env=False)

    def _stream(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> EventStream:
        self.is_slow = self.source.random() < 0.25
        if self.is_slow:  # past the networks, which would read on for a client that does not
            direct = f"http://127.0.0.1:{self.networks[0].target_port}"
            return EventStream(direct, method, path, body, headers, CLIENT_SECONDS, receive_bytes=4096)
        return EventStream(self._url(), method, path, body, headers, CLIENT_SECONDS)

    def _reader(self, message_id: int) -> Reader:
        """What this client holds of a message, from all its lives."""
        with self.book.lock:
            return self.book.readers[message_id].setdefault(self.number, Reader())

    def _refused(self, status: int, error: Any, *expected: int) -> None:
        self.book.counts[f"refused with {status}"] += 1
        assert status in expected, f"refused with {status}: {error}"

    def _follow(self, message_id: int, reader: Reader) -> None:
        """Resumes until the end, until it loses interest, or until the round is over."""
        path = f"/api/v1/messages/{message_id}/stream"
        for _ in range(self.source.randint(1, 30)):
            if self.over.is_set():
                return
            headers = {} if reader.cursor is None else {"Last-Event-ID": str(reader.cursor)}
            if headers and self.source.random() < 0.3:
                target, headers = f"{path}?after={reader.cursor}", {}
            else:
                target = path
            reader.end = None
            with contextlib.suppress(OSError), self._stream("GET", target, None, headers) as stream:
                if stream.status != 200:
                    self._refused(stream.status, stream.error, 404, 503)
                    self._assert_deleted(stream.status, message_id)
                    return
                self.book.counts["resumed"] += 1
                self._read(stream, reader)
            if reader.end is not None:
                return

    def _assert_deleted(self, status: int, message_id: int) -> None:
        if status == 404:
            conversation_id = self.book.conversations.get(message_id)
            assert conversation_id is None or conversation_id in self.book.deleting, f"message {message_id} is gone"

    def _read(self, stream: EventStream, reader: Reader) -> None:
        """Takes events until the stream breaks or ends, or this client goes away by itself."""
        pause = self.source.choice([0.05, 0.2, 0.5] if self.is_slow else [0, 0, 0, 0.01])
        most = self.source.choice([None, None, None, 1, 3, 20])
        before = len(reader.content)
        for number, event in enumerate(stream.events(), 1):
            reader.take(event)
            assert event.name != "reset", "a killed process loses nothing that was seen"
            self.book.counts["deltas seen"] += event.name == "delta"
            if pause:
                self.over.wait(pause)
            if number == most or self.over.is_set():
                break
        else:
            assert not stream.ended or reader.end is not None or stream.status != 200, (
                "a whole stream ends with its end"
            )
        self.book.counts["characters seen"] += len(reader.content) - before
        if self.source.random() < 0.3:
            stream.reset()


# ── the invariants ──


class Auditor:
    """Holds the book, the provider's count and the log against the database. `look` adds what is wrong to the book."""

    ORPHANS: tuple[tuple[str, str], ...] = (
        ("deltas without a message", "SELECT count(*) FROM delta WHERE message_id NOT IN (SELECT id FROM message)"),
        ("messages without a conversation",
         "SELECT count(*) FROM message WHERE conversation_id NOT IN (SELECT id FROM conversation)"),
        ("conversations without a message",
         "SELECT count(*) FROM conversation WHERE id NOT IN (SELECT conversation_id FROM message)"),
        ("questions without an answer", "SELECT count(*) FROM message WHERE role = 'user' AND id NOT IN"
         " (SELECT parent_id FROM message WHERE parent_id IS NOT NULL)"),
        ("titles of conversations that are gone",
         "SELECT count(*) FROM conversation_fts WHERE -rowid NOT IN (SELECT id FROM conversation)"),
        ("words of messages that are gone", "SELECT count(*) FROM message_fts WHERE -rowid NOT IN (SELECT id FROM message)"),
        ("gaps or overlaps", "SELECT count(*) FROM (SELECT offset, lag(offset + length(text)) OVER"
         " (PARTITION BY message_id ORDER BY offset) AS expected FROM delta) WHERE offset != coalesce(expected, 0)"),
    )  # fmt: skip

    def __init__(self, book: Book, provider: Chaotic) -> None:
        self.book, self.provider = book, provider
        self.killed: Counter[int] = Counter()  # runs of a message of which nobody knows how they ended
        self.cancelled: Counter[int] = Counter()  # runs that ended from outside, perhaps before the provider was asked
        self._checked: set[tuple[int, str]] = set()
        self._digests: dict[int, tuple[str, int]] = {}  # of whole answers: they never change

    def read_log(self, server: Server) -> None:
        """One life's log: what ran, how it ended, and whether something broke."""
        started: Counter[int] = Counter()
        for line in list(server.log):
            if re.search(r"Traceback|generation broke|flush refused|Task was destroyed|never awaited| critical ", line):
                self.book.violate(f"the log says: {line.strip()}")
            if found := re.search(r"generation (started|ended) message_id=(\d+)(.*)", line):
                message_id = int(found[2])
                started[message_id] += 1 if found[1] == "started" else -1
                self.book.counts["generations"] += found[1] == "started"
                self.cancelled[message_id] += bool(re.search("status=(stopped|interrupted)", found[3]))
        self.killed += started
        self.book.counts["lagged"] += sum(line == "lagging\n" for line in list(server.log))
        server.log.clear()

    def look(self, server: Server) -> None:
        """After a start, or at rest: nobody asks anything."""
        for sql, what in (("PRAGMA integrity_check", [("ok",)]), ("PRAGMA foreign_key_check", [])):
            if (found := server.rows(sql)) != what:
                self.book.violate(f"{sql}: {found}")
        for name, sql in self.ORPHANS:
            if (count := server.rows(sql)[0][0]) != 0:
                self.book.violate(f"{count} {name}")
        self._look_at_running(server)
        self._look_at_messages(server)
        self._look_at_calls(server)

    def _look_at_running(self, server: Server) -> None:
        running = {one["message_id"] for one in server.get("/api/v1/generations").json()["generations"]}
        said = {row[0] for row in server.rows("SELECT id FROM message WHERE status = 'running'")}
        if said != running:
            self.book.violate(f"of {said} the database says that they run, and {running} do")

    def _look_at_messages(self, server: Server) -> None:
        there = {row[0] for row in server.rows("SELECT id FROM conversation")}
        for conversation_id in self.book.deleted & there:
            self.book.violate(f"conversation {conversation_id} is there, but its deletion was answered")
        for conversation_id in {*self.book.conversations.values()} - there:
            if conversation_id not in self.book.deleting:
                self.book.violate(f"conversation {conversation_id} is gone")
            self.book.forget(conversation_id)
        contents: dict[int, list[str]] = defaultdict(list)
        for message_id, part in server.rows("SELECT message_id, text FROM delta ORDER BY message_id, offset"):
            contents[message_id].append(part)
        states = dict(server.rows("SELECT id, status FROM message"))
        for message_id in list(self.book.conversations):
            self._look_at_message(message_id, "".join(contents[message_id]), states.get(message_id, "gone"))

    def _look_at_message(self, message_id: int, stored: str, status: str) -> None:
        for client, reader in self.book.readers[message_id].items():
            if not stored.startswith(reader.content):
                self.book.violate(
                    f"message {message_id}: client {client} saw {len(reader.content)} characters, stored are {len(stored)}"
                )
            is_last = reader.end is not None and message_id not in self.book.rerun
            if is_last and (reader.end["status"], reader.content) != (status, stored):
                self.book.violate(f"message {message_id}: {reader.end['status']} was seen, {status} is stored")
        told = self.book.stopped.get(message_id)
        if told not in (None, status) and message_id not in self.book.rerun:
            self.book.violate(f"message {message_id}: a stop was answered with {told}, it is {status}")
        if status == "gone":
            self.book.violate(f"message {message_id} is gone, its conversation is not")
        if status == "completed" and message_id not in self.book.rerun:
            digest = (hashlib.sha256(stored.encode("utf-8", "surrogatepass")).hexdigest(), len(stored))
            if self._digests.setdefault(message_id, digest) != digest:
                self.book.violate(f"message {message_id} was completed and has changed")

    def _look_at_calls(self, server: Server) -> None:
        """The provider was asked once per attempt. A run that was killed may have asked without having noted it; one
        that was stopped, or found the provider silent, may have noted what the provider did not get to read."""
        stalled = "(SELECT count(*) FROM json_each(answer.attempts_json) WHERE json_extract(value, '$.error.code') = 'stalled')"
        answers: dict[str, list[tuple[int, str, int, int]]] = defaultdict(list)
        for message_id, status, attempts, unheard, question in server.rows(
            f"SELECT answer.id, answer.status, json_array_length(answer.attempts_json), {stalled}, delta.text"
            " FROM message AS answer JOIN delta ON delta.message_id = answer.parent_id AND delta.offset = 0"
            " WHERE answer.role = 'assistant'"
        ):
            answers[TAG.findall(question)[0]].append((message_id, status, attempts, unheard))
        for tag, found in answers.items():
            calls, noted = self.provider.calls[tag], sum(one[2] for one in found)
            fewest = noted - sum(one[3] + self.cancelled[one[0]] for one in found)
            most = noted + ATTEMPTS * sum(self.killed[one[0]] for one in found)
            if not fewest <= calls <= most:
                self.book.violate(f"{tag}: the provider was asked {calls} times, {fewest} to {most} are expected")
            self._look_at_truth(server, tag, found)

    def _look_at_truth(self, server: Server, tag: str, found: list[tuple[int, str, int, int]]) -> None:
        """What is completed is what the provider said."""
        pieces = plain_pieces(self.provider.seed, tag)
        for message_id, status, _, _ in found:
            is_plain = pieces is not None and status == "completed" and message_id not in self.book.rerun
            if is_plain and (message_id, tag) not in self._checked:
                self._checked.add((message_id, tag))
                if server.content(message_id) != "".join(pieces or ()):
                    self.book.violate(f"message {message_id} is completed, and not what the provider said")


def find_leaks(server: Process, provider: Provider, files: list[str]) -> list[str]:
    """What is wrong with a process that should be at rest: nothing is open in it but what was open at the start, and
    connections to the provider that are kept."""

    def at_rest() -> bool:
        health = server.get("/api/v1/health").json()
        return (health["running_generations"], health["subscribers"]) == (0, 0)

    def left() -> Counter[str]:
        """What is open, and what runs, beside that."""
        server.client.close()
        server.client = httpx.Client(base_url=server.url, timeout=30, trust_env=False)
        files_left = Counter(server.descriptors()) - Counter(files) - Counter({"socket": provider.open_connections})
        return files_left + (Counter(server.tasks()) - TASKS_AT_REST)

    found = []
    for condition, what in ((at_rest, "rest"), (lambda: not left(), "end of what was open")):
        try:
            wait_until(condition, what, REST_SECONDS)
        except AssertionError:
            found.append(f"no {what}: {server.get('/api/v1/health').text}, open beside the first: {left()}")
    return found


# ── a run ──


@dataclass
class Run:
    """One run of so many seconds: the process, its provider, its networks, the book."""

    seed: str
    seconds: float
    clients: int
    folder: Path
    kills: int = 0
    terms: int = 0
    rounds: int = 0
    peak_bytes: int = 0

    def __call__(self) -> Book:
        self.book = Book()
        with Chaotic(self.seed) as self.provider, contextlib.ExitStack() as stack:
            more = {"ANTHROPIC_BASE_URL": self.provider.origin, **SETTINGS}
            self.server = Process(self.folder, self.provider, send_bytes=4096, constants=CONSTANTS, **more)
            stack.callback(self.server.close)
            self.networks = [stack.enter_context(Network(self.server.port)) for _ in range(NETWORKS)]
            self.auditor = Auditor(self.book, self.provider)
            self.asked: list[dict[str, Any]] = [{} for _ in range(self.clients)]
            self.first_files = self.files = self.server.first_descriptors()
            self.first_wal = self.server.wal_bytes()
            deadline = time.monotonic() + self.seconds
            while time.monotonic() < deadline and len(self.book.violations) < VIOLATIONS_MAX:
                self.rounds += 1
                self.round()
            self.rest()
            self.last_files, self.last_wal = self.server.descriptors(), self.server.wal_bytes()
            self.kept_connections = self.provider.open_connections
        return self.book

    def round(self) -> None:
        source, started_at = random.Random(f"{self.seed} {self.rounds}"), time.monotonic()
        before, cuts = self.book.counts.copy(), self.cuts().total()
        over, gremlin = threading.Event(), Gremlin(self.networks, f"{self.seed} {self.rounds} gremlin")
        clients = [
            Client(number, f"{self.seed} {self.rounds} {number}", self.book, self.networks, over, self.asked[number])
            for number in range(self.clients)
        ]
        gremlin.start()
        threads = [threading.Thread(target=client, name=f"client {client.number}", daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        time.sleep(source.uniform(0.5, 3.5))
        ending = source.choices([self.kill, self.kill_twice, self.terminate], [6, 2, 3])[0]
        ending = self.rest if self.rounds % 4 == 0 else ending
        if ending != self.rest:
            ending(source)
        over.set()
        gremlin.over.set()
        gremlin.join(60)
        for network in self.networks:
            network.reset()  # a client may be in the middle of a frame that comes one byte at a time
        for thread in (gremlin, *threads):
            thread.join(60)
            assert not thread.is_alive(), f"{thread.name} of the test itself hangs"
        if ending != self.rest:
            self.start_again()
        else:
            self.rest()
        self.tell(ending.__name__, time.monotonic() - started_at, self.book.counts - before, self.cuts().total() - cuts)

    def tell(self, ending: str, seconds: float, done: Counter[str], cuts: int) -> None:
        what = ("generations", "resumed", "stops", "deltas seen", "characters seen", "deletions")
        done_words = ", ".join(f"{done[name]:,} {name}" for name in what)
        violations = len(self.book.violations)
        print(
            f"round {self.rounds}: {ending}, {seconds:.1f} s, {cuts} cuts, {done_words}, {violations} violations",
            flush=True,
        )

    # ── how a round ends ──

    def kill(self, source: random.Random) -> None:
        self.remember()
        self.server.kill()
        self.kills += 1

    def kill_twice(self, source: random.Random) -> None:
        """Again while it starts."""
        self.remember()
        self.server.kill()
        self.server.die_while_starting(source.uniform(0.1, 0.9))
        self.kills += 2

    def terminate(self, source: random.Random) -> None:
        self.remember()
        status = self.server.terminate(60)
        if status != 0:
            self.book.violate(f"SIGTERM: exit status {status}")
        if self.server.wal_bytes():
            self.book.violate("the log of the database was left behind by an orderly end")
        self.terms += 1

    def rest(self, source: random.Random | None = None) -> None:
        """Nobody asks any more: everything ends by itself, nothing is left."""
        for network in self.networks:
            network.thaw()
            network.reset()
        for leak in find_leaks(self.server, self.provider, self.files):
            self.book.violate(leak)
        self.remember()
        self.auditor.read_log(self.server)
        self.auditor.look(self.server)
        self.sweep()

    def start_again(self) -> None:
        self.auditor.read_log(self.server)
        self.server.start()
        self.files = self.server.first_descriptors()
        self.auditor.look(self.server)
        self.provider.forget()
        for network in self.networks:
            network.target_port = self.server.port

    def remember(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.server.memory_bytes())

    def sweep(self) -> None:
        """Deletes old conversations, many at once."""
        ids = [row[0] for row in self.server.rows("SELECT id FROM conversation ORDER BY id DESC")]
        for conversation_id in ids[KEPT_CONVERSATIONS:]:
            self.book.deleting.add(conversation_id)
            if self.server.client.delete(f"/api/v1/conversations/{conversation_id}").status_code == 200:
                self.book.deleted.add(conversation_id)
            self.book.forget(conversation_id)

    def cuts(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for network in self.networks:
            total += Counter({name: n for name, n in network.cuts.items() if not name.startswith("(")})
        return total

    def table(self) -> Iterator[tuple[str, object]]:
        yield "seed", self.seed
        yield "rounds", self.rounds
        yield "kills -9", self.kills
        yield "SIGTERMs", self.terms
        yield "cuts", self.cuts().total()
        for name, count in sorted(self.cuts().items()):
            yield f"cuts, {name}", count
        for name, count in sorted(self.book.counts.items()):
            yield name, count
        yield "provider calls", self.provider.calls.total()
        yield "peak RSS", f"{self.peak_bytes / 1e6:.1f} MB"
        kept = f"{self.kept_connections} of them kept connections to the provider"
        yield "descriptors", f"{len(self.first_files)} at the start, {len(self.last_files)} at the end, {kept}"
        yield "WAL bytes", f"{self.first_wal:,} at the start, {self.last_wal:,} at the end"
        yield "violations", len(self.book.violations)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10**6)))
    parser.add_argument("--clients", type=int, default=CLIENTS)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="llmchat-chaos-"))
    run = Run(arguments.seed, arguments.minutes * 60, arguments.clients, folder)
    book = run()
    print("\n| what | figure |\n|---|---|")
    for name, figure in run.table():
        print(f"| {name} | {f'{figure:,}' if isinstance(figure, int) else figure} |")
    if book.violations:
        print(f"the database of the last round is in {folder}")
        print(json.dumps(book.violations, indent=1))
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
