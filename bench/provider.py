"""A provider that costs next to nothing: OpenAI's chat.completion.chunk over SSE, encoded beforehand.

    python bench/provider.py PORT

The name of the model says what the answer is:

    paced-DELTAS-RATE   DELTAS deltas, RATE a second, each stamped with the time of its send; the first one at once
    flat-DELTAS         as fast as the reader takes them

As real providers do, each delta is an HTTP chunk and a send of its own. A send happens inside `write` (the write
buffer's limit is 0), so that a stamp is as old as one system call. Paced streams never wait for a slow reader: what
the socket does not take is buffered here, and the reader's delay shows in the stamps. Streams of one rate are spread
evenly over the period, as independent users are.
"""

import asyncio
import gc
import re
import sys
import time

import uvloop
from records import TRIPLES, encode_record, flat_record, stamp_now

TICK_SECONDS = 0.001
WHEEL_TICKS = 1024  # so the slowest rate is one delta a second
FLAT_DELTAS_MAX = 90_000

MODEL = re.compile(rb'"model":\s*"(paced|flat)-(\d+)(?:-(\d+))?"')
LENGTH = re.compile(rb"(?i)content-length: *(\d+)")
CHUNK = (
    b'data: {"id":"chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT","object":"chat.completion.chunk","created":1764000000,'
    b'"model":"gpt-4o-mini","system_fingerprint":"fp_44709d6fcb","choices":[{"index":0,"delta":%b,"logprobs":null,'
    b'"finish_reason":%b}]%b}\n\n'
)
HEADERS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
MODELS = b'{"object":"list","data":[{"id":"paced-200-50","object":"model","created":1764000000,"owned_by":"bench"}]}'


def frame(body: bytes) -> bytes:
    """One HTTP chunk (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(body), body)


RECORD_PLACE = b"0123456789"
BEFORE, AFTER = frame(CHUNK % (b'{"content":"%b"}' % RECORD_PLACE, b"null", b"")).split(RECORD_PLACE)
FIRST = HEADERS + frame(CHUNK % (b'{"role":"assistant","content":""}', b"null", b""))
USAGE = b',"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21}'
LAST = frame(CHUNK % (b"{}", b'"stop"', USAGE)) + frame(b"data: [DONE]\n\n") + b"0\r\n\r\n"
FLAT: list[bytes] = []  # as long as the longest flat answer so far


class Wheel:
    """Sends the paced streams: slot t holds those whose next delta is due at tick t; sleeps when there are none."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.slots: list[list[Stream]] = [[] for _ in range(WHEEL_TICKS)]
        self.tick = 0
        self.streams = 0
        self.started = 0
        self.origin = time.monotonic()

    def add(self, stream: "Stream") -> None:
        """Schedules the delta after the first one: within one period, each stream elsewhere in it."""
        if not self.streams:
            self.tick = int((time.monotonic() - self.origin) / TICK_SECONDS)
            self.loop.call_later(TICK_SECONDS, self.turn)
        self.streams += 1
        self.started += 1
        delay = 1 + self.started * 7 % stream.period_ticks
        self.slots[(self.tick + delay) % WHEEL_TICKS].append(stream)

    def turn(self) -> None:
        """Sends everything that is due, also what a late timer missed."""
        now = int((time.monotonic() - self.origin) / TICK_SECONDS)
        while self.tick < now:
            self.tick += 1
            slot = self.tick % WHEEL_TICKS
            due, self.slots[slot] = self.slots[slot], []
            for stream in due:
                if stream.send_paced():
                    self.slots[(self.tick + stream.period_ticks) % WHEEL_TICKS].append(stream)
                else:
                    self.streams -= 1
        if self.streams:
            delay = self.origin + (self.tick + 1) * TICK_SECONDS - time.monotonic()
            self.loop.call_later(max(delay, 0), self.turn)


class FlatOut:
    """Sends the flat-out streams in turn, one delta each; a stream whose socket is full sits out."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ready: dict[Stream, None] = {}
        self.turning = False

    def add(self, stream: "Stream") -> None:
        self.ready[stream] = None
        if not self.turning:
            self.turning = True
            self.loop.call_soon(self.turn)

    def turn(self) -> None:
        for stream in list(self.ready):
            if not stream.send_flat():
                self.ready.pop(stream, None)
        self.turning = bool(self.ready)
        if self.turning:
            self.loop.call_soon(self.turn)


class Stream(asyncio.Protocol):
    """One connection: a request, its answer, and the next request."""

    def __init__(self, wheel: Wheel, flat_out: FlatOut) -> None:
        self.wheel = wheel
        self.flat_out = flat_out
        self.buffer = b""
        self.is_open = True
        self.sequence = self.deltas = 0
        self.period_ticks = 1
        self.flat = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=0)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False

    def pause_writing(self) -> None:
        self.flat_out.ready.pop(self, None)

    def resume_writing(self) -> None:
        if self.flat and self.sequence < self.deltas:
            self.flat_out.add(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, body = self.buffer.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not blank or (length and len(body) < int(length[1])):
            return
        self.buffer = b""
        model = MODEL.search(body)
        if not model:
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            self.transport.write(b"Content-Length: %d\r\n\r\n%b" % (len(MODELS), MODELS))
            return
        self.answer(model[1] == b"flat", int(model[2]), int(model[3] or 1))

    def answer(self, flat: bool, deltas: int, rate: int) -> None:
        """Starts an answer of `deltas` deltas; `rate` in deltas a second counts when it is not flat out."""
        self.sequence, self.deltas, self.flat = 0, deltas, flat
        if flat:
            assert deltas <= FLAT_DELTAS_MAX
            FLAT.extend(BEFORE + flat_record(number) + AFTER for number in range(len(FLAT), deltas))
            self.transport.write(FIRST)
            self.flat_out.add(self)
            return
        self.period_ticks = round(1 / rate / TICK_SECONDS)
        self.transport.write(FIRST + BEFORE + encode_record(0, stamp_now()) + AFTER)
        self.sequence = 1
        if deltas == 1:
            self.transport.write(LAST)
        else:
            self.wheel.add(self)

    def send_paced(self) -> bool:
        """Sends the next delta, with the end after the last one; False when there is no more to send."""
        if not self.is_open:
            return False
        self.transport.write(BEFORE + encode_record(self.sequence, stamp_now()) + AFTER)
        self.sequence += 1
        if self.sequence < self.deltas:
            return True
        self.transport.write(LAST)
        return False

    def send_flat(self) -> bool:
        """The same for a flat-out answer."""
        if not self.is_open:
            return False
        sequence = self.sequence
        self.sequence = sequence + 1
        self.transport.write(FLAT[sequence])
        if self.sequence < self.deltas:
            return True
        self.transport.write(LAST)
        return False


async def serve(port: int) -> None:
    """Answers on 127.0.0.1 until the process is ended."""
    loop = asyncio.get_running_loop()
    wheel, flat_out = Wheel(loop), FlatOut(loop)
    server = await loop.create_server(lambda: Stream(wheel, flat_out), "127.0.0.1", port, backlog=2048)
    assert len(TRIPLES) == 46_656
    gc.collect()
    gc.freeze()
    gc.disable()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
