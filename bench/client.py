"""A client that costs next to nothing: HTTP/1.1 over a raw protocol, SSE parsed only as far as the text in it.

A `Connection` sends one request at a time and hands the body to a reader. A `Reader` checks what it gets: every delta's
number must be the next one, so lost, doubled and misplaced characters are counted, and the stamps tell the latency.
It finds the text alike in an OpenAI chunk (`"content":"…"`) and in llmchat's event (`"text":"…"`); the text is plain
ASCII without quotes, so no JSON has to be decoded.
"""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from records import RECORD_CHARACTERS, SEQUENCE_CHARACTERS, SEQUENCES, added_seconds, flat_record, stamp_now

TEXT = re.compile(rb'"(?:content|text)":"([^"]*)"')
STATUS = re.compile(rb"HTTP/1\.[01] (\d+)")
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding: *chunked")
TAIL_BYTES = 600
ENDS = (b"data: [DONE]", b'"status":"completed"')


class Failure(Exception):
    """A request that did not get its whole answer; says why."""


@dataclass(eq=False)
class Reader:
    """Checks one streamed answer of stamped deltas."""

    deltas: int
    sent_at: float = 0.0  # monotonic seconds
    first_at: float = 0.0
    last_at: float = 0.0
    received: int = 0  # deltas, each once
    lost: int = 0  # characters that were skipped
    doubled: int = 0  # characters that came again
    failure: str = ""
    latencies: list[float] = field(default_factory=list)  # seconds, one per delta
    rest: bytes = b""  # an unfinished line
    part: bytes = b""  # an unfinished delta
    tail: bytes = b""  # the newest lines, for the end

    def take(self, body: bytes) -> None:
        """Takes the next bytes of the body."""
        if self.rest:
            body = self.rest + body
        cut = body.rfind(b"\n") + 1
        self.rest = body[cut:]
        text = b"".join(TEXT.findall(body, 0, cut))
        self.tail = (self.tail + body[max(0, cut - TAIL_BYTES) : cut])[-TAIL_BYTES:]
        if text:
            self.last_at = time.monotonic()
            if not self.first_at:
                self.first_at = self.last_at
            self.take_text(text)

    def take_text(self, text: bytes) -> None:
        """Takes the next characters of the answer."""
        now = stamp_now()
        text = self.part + text
        whole = len(text) - len(text) % RECORD_CHARACTERS
        self.part = text[whole:]
        for start in range(0, whole, RECORD_CHARACTERS):
            middle = start + SEQUENCE_CHARACTERS
            if text[start:middle] != SEQUENCES[self.received]:
                self.misplaced(text[start:middle])
                continue
            self.received += 1
            self.latencies.append(added_seconds(text[middle : middle + 5], now))

    def misplaced(self, sequence: bytes) -> None:
        """Counts a delta that is not the next one, and goes on after it."""
        try:
            number = int(sequence, 36)
        except ValueError:
            number = -1
        if number < self.received:
            self.doubled += RECORD_CHARACTERS
        else:
            self.lost += (number - self.received) * RECORD_CHARACTERS
            self.received = number + 1

    def finish(self) -> None:
        """Called at the end of the body: the end must have been said, and all must be there."""
        if not any(end in self.tail for end in ENDS):
            self.failure = self.failure or f"no end: {self.tail[-200:].decode(errors='replace')}"
        self.lost += (self.deltas - self.received) * RECORD_CHARACTERS
        self.doubled += len(self.part)


FLAT_TEXT = bytearray()


class FlatReader(Reader):
    """The same for a flat-out answer: its text is known beforehand, so a comparison does."""

    def take_text(self, text: bytes) -> None:
        while len(FLAT_TEXT) < self.deltas * RECORD_CHARACTERS:
            FLAT_TEXT.extend(flat_record(len(FLAT_TEXT) // RECORD_CHARACTERS))
        text = self.part + text
        start = self.received * RECORD_CHARACTERS
        if FLAT_TEXT[start : start + len(text)] != text:
            self.part = b""
            super().take_text(text)
            return
        whole = len(text) // RECORD_CHARACTERS
        self.received += whole
        self.part = text[whole * RECORD_CHARACTERS :]


class Connection(asyncio.Protocol):
    """One keep-alive connection. `request` sends and waits for the end of the answer."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.buffer = b""
        self.transport: asyncio.Transport | None = None
        self.status = 0
        self.left: int | None = None  # bytes of body to come; None when chunked
        self.in_body = False
        self.take: Callable[[bytes], None] = self.drop
        self.done: asyncio.Future[int] | None = None

    def drop(self, body: bytes) -> None:
        """Where a body goes before there is a request."""

    async def request(self, data: bytes, take: Callable[[bytes], None]) -> int:
        """Sends `data`, gives the body to `take` as it comes; returns the status. Raises Failure."""
        loop = asyncio.get_running_loop()
        self.buffer, self.take, self.in_body = b"", take, False
        self.done = loop.create_future()
        try:
            if self.transport is None or self.transport.is_closing():
                await loop.create_connection(lambda: self, "127.0.0.1", self.port)
            assert self.transport is not None
            self.transport.write(data)
            return await self.done
        except OSError as exc:
            raise Failure(str(exc)) from exc

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its bases

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done and not self.done.done():
            self.done.set_exception(Failure(f"connection lost: {exc or 'closed'}"))

    def data_received(self, data: bytes) -> None:
        if self.buffer:
            data = self.buffer + data
            self.buffer = b""
        if not self.in_body:
            head, blank, data = data.partition(b"\r\n\r\n")
            if not blank:
                self.buffer = head
                return
            self.start_body(head)
        if self.left is None:
            self.take_chunks(data)
            return
        self.left -= len(data)
        self.take(data)
        if self.left <= 0:
            self.end()

    def start_body(self, head: bytes) -> None:
        """Reads from the header how the body is delimited (RFC 9112, section 6)."""
        status, length = STATUS.match(head), LENGTH.search(head)
        self.status = int(status[1]) if status else 0
        self.left = None if CHUNKED.search(head) else int(length[1]) if length else 0
        self.in_body = True

    def take_chunks(self, data: bytes) -> None:
        """Takes the HTTP chunks that are complete and keeps the rest (RFC 9112, section 7.1)."""
        position, end, pieces, size = 0, len(data), [], 1
        while size:
            line = data.find(b"\r\n", position)
            if line < 0:
                break
            size = int(data[position:line], 16)
            start = line + 2
            if start + size + 2 > end:
                break
            pieces.append(data[start : start + size])
            position = start + size + 2
        else:
            self.take(b"".join(pieces))
            self.end()
            return
        self.buffer = data[position:]
        if pieces:
            self.take(b"".join(pieces))

    def end(self) -> None:
        """The answer is complete."""
        self.in_body = False
        if self.done and not self.done.done():
            self.done.set_result(self.status)


def encode_request(method: str, target: str, body: bytes = b"", headers: str = "") -> bytes:
    """A request as bytes; `headers` are further lines, each with its CRLF."""
    head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n{headers}"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


async def read_answer(connection: Connection, request: bytes, reader: Reader) -> Reader:
    """Sends `request` and checks the streamed answer; a failure is noted in the reader."""
    reader.sent_at = time.monotonic()
    try:
        status = await connection.request(request, reader.take)
        if status != 200:
            reader.failure = f"{status}: {(reader.tail + reader.rest)[:200].decode(errors='replace')}"
    except Failure as exc:
        reader.failure = str(exc)
    reader.finish()
    return reader


async def fetch(port: int, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
    """One request on a connection of its own: status and body."""
    pieces: list[bytes] = []
    connection = Connection(port)
    try:
        return await connection.request(encode_request(method, target, body), pieces.append), b"".join(pieces)
    finally:
        connection.close()
