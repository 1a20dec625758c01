"""The rows of the benchmark: the work that each one is, and what is measured while it is done.

A row function gets a server that has just started, warms it up, does the work once and returns its figures, by name:

    kept_up            rate at which deltas arrived while all streams were open, as a share of the offered one (1.0 = all):
                       the slope of a line through what had arrived every 20 ms, for deltas arrive in bursts
    deltas_per_second  delivered in all / seconds from the first request to the last delta
    cpu_us             µs of the server's CPU per delivered delta (new chats: ms per chat, `cpu_ms`)
    p50_ms, p99_ms     added latency, the provider's send to the client's receipt, over all deltas
    first_ms           median time from the request to the first delta
    stream_kb          KB resident per open stream, beyond what the warmed-up server had
    wrong              characters lost or doubled
    failed             streams without a proper end
    load_share         CPU share of the core that provider and client share: near 1.0 the row shows their limit
    other_share        CPU that other work on the machine took meanwhile, of one core: 0 where figures can be trusted
"""

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from client import Connection, Failure, FlatReader, Reader, encode_request, fetch, read_answer
from servers import Running, busy_seconds, cpu_seconds

Figures = dict[str, float]
COUNT_SECONDS = 0.02  # from count to count of what has arrived
COUNTS_PER_SAMPLE = 5
GRACE_SECONDS = 25.0  # what a server may need beyond the ideal duration


@dataclass(frozen=True)
class Load:
    """Streams opened evenly over the ramp; each gets `deltas` deltas at `rate` a second, 0 means flat out."""

    streams: int
    deltas: int
    rate: int
    ramp_seconds: float = 0.0

    @property
    def model(self) -> str:
        return f"paced-{self.deltas}-{self.rate}" if self.rate else f"flat-{self.deltas}"

    @property
    def answer_seconds(self) -> float:
        return self.deltas / self.rate if self.rate else 0.0

    def reader(self) -> Reader:
        return Reader(self.deltas) if self.rate else FlatReader(self.deltas)


@dataclass(frozen=True)
class Sample:
    at: float  # monotonic seconds
    received: int  # deltas, all streams
    cpu_seconds: float
    resident_bytes: int


class Watch:
    """Samples a server while it works, and the CPU of provider and client beside it."""

    def __init__(self, running: Running, provider_pid: int, readers: Sequence[Reader]) -> None:
        self.running = running
        self.provider_pid = provider_pid
        self.readers = readers
        self.samples: list[Sample] = []
        self.counts: list[tuple[float, int]] = []  # monotonic seconds, deltas received by all streams

    async def __aenter__(self) -> "Watch":
        gc.collect()
        gc.disable()
        self.load_before = time.process_time() + cpu_seconds(self.provider_pid)
        self.busy_before = busy_seconds()
        self.sample()
        self.task = asyncio.create_task(self.keep_sampling())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.task.cancel()
        self.sample()
        self.load_seconds = time.process_time() + cpu_seconds(self.provider_pid) - self.load_before
        self.busy_seconds = busy_seconds() - self.busy_before
        gc.enable()

    async def keep_sampling(self) -> None:
        while True:
            for _ in range(COUNTS_PER_SAMPLE):
                await asyncio.sleep(COUNT_SECONDS)
                self.counts.append((time.monotonic(), self.received()))
            self.sample()

    def received(self) -> int:
        return sum(reader.received for reader in self.readers)

    def sample(self) -> None:
        received = self.received()
        server = self.running
        self.samples.append(Sample(time.monotonic(), received, server.cpu_seconds(), server.resident_bytes()))

    def between(self, start: float, end: float) -> tuple[Sample, Sample]:
        """The first and the last sample within two points of time (monotonic seconds)."""
        inside = [sample for sample in self.samples if start <= sample.at <= end]
        return (inside[0], inside[-1]) if inside else (self.samples[0], self.samples[-1])

    def rate_between(self, start: float, end: float) -> float:
        """Deltas a second that arrived within two points of time (monotonic seconds)."""
        inside = [(at, received) for at, received in self.counts if start <= at <= end]
        return statistics.linear_regression(*zip(*inside, strict=True)).slope

    def figures(self) -> Figures:
        """What can be said of every work."""
        first, last, readers = self.samples[0], self.samples[-1], self.readers
        received = max(last.received, 1)
        duration = max((reader.last_at for reader in readers), default=0.0) - first.at
        latencies = sorted(latency for reader in readers for latency in reader.latencies)
        firsts = [reader.first_at - reader.sent_at for reader in readers if reader.first_at]
        used = last.cpu_seconds - first.cpu_seconds
        figures = {
            "deltas_per_second": received / max(duration, 1e-9),
            "cpu_us": used / received * 1e6,
            "first_ms": statistics.median(firsts) * 1e3 if firsts else 0.0,
            "wrong": float(sum(reader.lost + reader.doubled for reader in readers)),
            "failed": float(sum(bool(reader.failure) for reader in readers)),
            "load_share": self.load_seconds / (last.at - first.at),
            "other_share": max(0.0, self.busy_seconds - self.load_seconds - used) / (last.at - first.at),
        }
        if latencies:
            figures["p50_ms"] = latencies[len(latencies) // 2] * 1e3
            figures["p99_ms"] = latencies[len(latencies) * 99 // 100] * 1e3
        return figures


def first_failure(readers: Sequence[Reader]) -> str:
    return next((reader.failure for reader in readers if reader.failure), "")


async def open_streams(port: int, request: bytes, readers: Sequence[Reader], ramp: float, limit: float) -> None:
    """Opens a stream per reader, evenly over `ramp` seconds, and reads them all for at most `limit` seconds."""
    connections = [Connection(port) for _ in readers]
    started, tasks = time.monotonic(), []
    try:
        for number, (connection, reader) in enumerate(zip(connections, readers, strict=True)):
            await asyncio.sleep(started + ramp * number / len(readers) - time.monotonic())
            tasks.append(asyncio.create_task(read_answer(connection, request, reader)))
        await asyncio.wait(tasks, timeout=limit)
    finally:
        for connection in connections:
            connection.close()
        await asyncio.gather(*tasks)


async def warm_up(running: Running) -> None:
    """Some chats, one after another and together: imports, connections, first allocations."""
    for load in (Load(1, 1, 50), Load(1, 1, 50), Load(20, 20, 100, 0.1), Load(20, 20, 0)):
        readers = [load.reader() for _ in range(load.streams)]
        request = running.chat_request(load.model)
        await open_streams(running.port, request, readers, load.ramp_seconds, GRACE_SECONDS)
        if failure := first_failure(readers):
            raise Failure(f"warm-up: {failure}")
    await asyncio.sleep(0.3)


def kept_up(watch: Watch, load: Load, rate_all: float) -> Figures:
    """Share of the offered rate that arrived while all streams were open, and the memory of the open streams."""
    opened, closing = (
        watch.samples[0].at + seconds for seconds in (load.ramp_seconds + 0.3, load.answer_seconds - 0.1)
    )
    _, last = watch.between(opened, closing)
    memory = (last.resident_bytes - watch.samples[0].resident_bytes) / load.streams
    return {"kept_up": watch.rate_between(opened, closing) / rate_all, "stream_kb": memory / 1e3}


async def run_load(running: Running, provider_pid: int, load: Load) -> Figures:
    """Rows c1, c100, c500, flat."""
    await warm_up(running)
    readers = [load.reader() for _ in range(load.streams)]
    request = running.chat_request(load.model)
    limit = load.answer_seconds + GRACE_SECONDS
    async with Watch(running, provider_pid, readers) as watch:
        await open_streams(running.port, request, readers, load.ramp_seconds, limit)
    figures = watch.figures()
    if load.rate:
        figures |= kept_up(watch, load, load.streams * load.rate)
    return figures | note(readers)


def note(readers: Sequence[Reader]) -> Figures:
    """Shows the first failure; a failed stream is a figure, not the end of the run."""
    if failure := first_failure(readers):
        print(f"a stream failed: {failure}; ", end="", file=sys.stderr, flush=True)
    return {}


async def run_fan(running: Running, provider_pid: int, load: Load) -> Figures:
    """Row fan: one generation in the background, `load.streams` subscribers that join over the ramp."""
    await warm_up(running)
    body = {"model": f"openai/{load.model}", "message": "Tell everybody.", "background": True}
    status, answer = await fetch(running.port, "POST", "/api/v1/chat", json.dumps(body).encode())
    if status != 202:
        raise Failure(f"background chat: {status} {answer[:200]!r}")
    request = encode_request("GET", f"/api/v1/messages/{json.loads(answer)['message_id']}/stream")
    readers = [load.reader() for _ in range(load.streams)]
    limit = load.answer_seconds + GRACE_SECONDS
    async with Watch(running, provider_pid, readers) as watch:
        await open_streams(running.port, request, readers, load.ramp_seconds, limit)
    figures = watch.figures() | kept_up(watch, load, load.streams * load.rate) | note(readers)
    live = sorted(x for reader in readers for x in reader.latencies[int(load.rate * (load.ramp_seconds + 1)) :])
    return figures | {"p50_ms": live[len(live) // 2] * 1e3, "p99_ms": live[len(live) * 99 // 100] * 1e3}


async def chat_on(connection: Connection, request: bytes, deltas: int, until: float) -> list[Reader]:
    """Chats one after another on one connection until a point of time (monotonic seconds)."""
    readers = []
    while time.monotonic() < until:
        readers.append(await read_answer(connection, request, Reader(deltas)))
        if readers[-1].failure:
            break
    return readers


async def run_chats(running: Running, provider_pid: int, clients: int, seconds: float) -> Figures:
    """Row chats: new conversations, one delta each, from `clients` keep-alive connections."""
    await warm_up(running)
    connections = [Connection(running.port) for _ in range(clients)]
    request = running.chat_request("paced-1-50")
    async with Watch(running, provider_pid, []) as watch:
        until = time.monotonic() + seconds
        lists = await asyncio.gather(*(chat_on(connection, request, 1, until) for connection in connections))
    for connection in connections:
        connection.close()
    readers = watch.readers = [reader for part in lists for reader in part]
    waits = sorted(reader.last_at - reader.sent_at for reader in readers if not reader.failure)
    first, last = watch.samples[0], watch.samples[-1]
    done = max(len(waits), 1)
    figures = (
        watch.figures()
        | note(readers)
        | {
            "chats_per_second": len(waits) / (last.at - first.at),
            "cpu_ms": (last.cpu_seconds - first.cpu_seconds) / done * 1e3,
            "p99_ms": waits[len(waits) * 99 // 100] * 1e3 if waits else 0.0,
        }
    )
    return {key: value for key, value in figures.items() if key not in ("cpu_us", "deltas_per_second", "p50_ms")}
