"""What the tests of the guarantees share: answers that wait at gates, readers that stop anywhere, and a tuned server.

    Tuned(folder, provider, constants={"QUEUE_EVENTS_MAX": 2}, die="in_transaction", LLMCHAT_RING_EVENTS="2")

is llmchat.py itself, in its own process, with smaller bounds than anyone would set, so that a test reaches them, and
with places where it dies.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tests.client import EventStream, Reader
from tests.conftest import ROOT, Server, settings_for
from tests.provider import Provider, Send, Step, WaitFor, openai_chunk, openai_end

PROGRAM = """
import json, os, signal, socket, sys
import llmchat

tuning = json.loads(os.environ.pop("TUNING"))
for name, value in tuning["constants"].items():
    assert hasattr(llmchat, name), name
    setattr(llmchat, name, value)


def count_lagging(drop=llmchat.Subscription.drop):
    def counted(self):
        print("lagging", file=sys.stderr)
        drop(self)
    llmchat.Subscription.drop = counted


def keep_little_in_the_kernel(send_bytes, open_socket=llmchat.open_socket):
    def open_small(config):
        listener = open_socket(config)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        return listener
    llmchat.open_socket = open_small
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    made = HttpToolsProtocol.connection_made
    def connection_made(self, transport):
        made(self, transport)
        transport.set_write_buffer_limits(high=0)
    HttpToolsProtocol.connection_made = connection_made


def die_at_the_first_flush(place, save=llmchat.save_flush, commit=llmchat.commit_together):
    flushed = []
    def save_flush(connection, flush):
        save(connection, flush)
        flushed.extend((*flush.journalled.values(), *flush.rows))
        if flushed and place == "in_transaction":
            os.kill(os.getpid(), signal.SIGKILL)
    def commit_together(connection, operations, durable):
        values = commit(connection, operations, durable)
        if flushed and place == "after_commit":
            os.kill(os.getpid(), signal.SIGKILL)
        return values
    llmchat.save_flush, llmchat.commit_together = save_flush, commit_together


count_lagging()
if tuning["send_bytes"]:
    keep_little_in_the_kernel(tuning["send_bytes"])
if tuning["die"]:
    die_at_the_first_flush(tuning["die"])
sys.exit(llmchat.main())
"""


class Tuned(Server):
    """A server whose constants are `constants`, whose sockets send little, and that may die at its first flush."""

    program = ("-c", PROGRAM)

    def __init__(
        self,
        folder: Path,
        provider: Provider,
        send_bytes: int = 0,
        die: Literal["", "in_transaction", "after_commit"] = "",
        constants: dict[str, Any] | None = None,
        **settings: str,
    ) -> None:
        self.tune(send_bytes, die, constants or {}, settings)
        super().__init__(folder, **settings_for(provider), **settings)

    def tune(self, send_bytes: int, die: str, constants: dict[str, Any], environment: dict[str, str]) -> None:
        """Sets what the next start takes."""
        tuning = {"send_bytes": send_bytes, "die": die, "constants": constants}
        environment |= {"TUNING": json.dumps(tuning), "PYTHONPATH": str(ROOT)}

    @property
    def lagged(self) -> int:
        """How often a subscriber's queue was thrown away."""
        return sum(line == "lagging\n" for line in list(self.log))


def running_server(folder: Path, provider: Provider, **settings: str) -> Server:
    return Server(folder, **settings_for(provider), **settings)


gate_numbers = itertools.count()


def gated(provider: Provider, *parts: Sequence[str]) -> list[str]:
    """Scripts an answer whose parts are parted by gates, the first part coming at once; returns the gates' names."""
    gates = [f"part {next(gate_numbers)}" for _ in parts[1:]]
    steps: list[Step] = [openai_chunk({"role": "assistant", "content": ""})]
    for number, part in enumerate(parts):
        steps += [WaitFor(gates[number - 1])] if number else []
        steps += texts(part)
    provider.script([*steps, *openai_end()])
    return gates


def texts(part: Sequence[str]) -> list[Send]:
    return [openai_chunk({"content": text}) for text in part]


def varied_text(characters: int, seed: str = "") -> str:
    """Text that never goes round in circles."""
    numbers = (f"{seed}{number:x} ü😀日 " for number in itertools.count())
    found, length = [], 0
    while length < characters:
        found.append(next(numbers))
        length += len(found[-1])
    return "".join(found)[:characters]


def read_all(stream: EventStream, reader: Reader | None = None) -> Reader:
    reader = reader or Reader()
    with stream:
        reader.read(stream)
    return reader


def read_up_to(reader: Reader, stream: EventStream, content: str) -> None:
    """Reads until the reader holds this content."""
    for event in stream.events():
        reader.take(event)
        if reader.content == content:
            return
    raise AssertionError(f"the stream ended at {reader.content!r}")


def reader_at(content: str, cursor: int) -> Reader:
    """What a client holds that was cut at this cursor."""
    reader = Reader()
    reader.content, reader.cursor = content[:cursor], cursor
    return reader


def chat_to_the_gate(
    server: Server, provider: Provider, *parts: list[str]
) -> tuple[EventStream, Reader, int, list[str]]:
    """A chat whose first part was read: its stream, its reader, its message's id and the gates."""
    gates = gated(provider, *parts)
    stream = server.chat("Hello")
    reader = Reader()
    start = next(stream.events())
    reader.take(start)
    read_up_to(reader, stream, "".join(parts[0]))
    return stream, reader, start.data["message_id"], gates
