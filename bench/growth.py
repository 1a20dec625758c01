"""Row growth: what a delta costs, and a generation holds, early and late in a long answer, and in short answers.

The same 20,000 deltas a second three ways: answers of 1,000 characters one after another, and the first and the last
fifth of answers of 100,000 characters. A program that looks back over what it already has shows it here.
"""

import asyncio
import time

from client import Connection
from rows import Figures, Load, Watch, chat_on, note, open_streams, warm_up
from servers import Running

GENERATIONS = 20
RATE = 1000  # deltas a second, each generation
LONG = Load(GENERATIONS, 10_000, RATE, 0.2)  # 100,000 characters
SHORT = Load(GENERATIONS, 100, RATE)  # 1,000 characters


def fifth_cost(watch: Watch, number: int) -> float:
    """µs of CPU per delta in one fifth (from 0) of all that was delivered."""
    total = watch.samples[-1].received
    inside = [sample for sample in watch.samples if number / 5 <= sample.received / total <= (number + 1) / 5]
    first, last = inside[0], inside[-1]
    return (last.cpu_seconds - first.cpu_seconds) / max(last.received - first.received, 1) * 1e6


async def run_growth(running: Running, provider_pid: int, short_seconds: float) -> Figures:
    """`short_cpu_us`, `long_cpu_us`, `late_ratio` (last fifth / first fifth), `generation_kb` gained since 20 %."""
    await warm_up(running)
    connections = [Connection(running.port) for _ in range(SHORT.streams)]
    request = running.chat_request(SHORT.model)
    async with Watch(running, provider_pid, []) as watch:
        until = time.monotonic() + short_seconds
        lists = await asyncio.gather(*(chat_on(connection, request, SHORT.deltas, until) for connection in connections))
        watch.readers = [reader for part in lists for reader in part]
    for connection in connections:
        connection.close()
    short = watch.figures() | note(watch.readers)

    readers = [LONG.reader() for _ in range(LONG.streams)]
    request = running.chat_request(LONG.model)
    async with Watch(running, provider_pid, readers) as watch:
        await open_streams(running.port, request, readers, LONG.ramp_seconds, LONG.answer_seconds * 3)
    long = watch.figures() | note(readers)
    early = next(sample for sample in watch.samples if sample.received >= watch.samples[-1].received / 5)
    return {
        "short_cpu_us": short["cpu_us"],
        "long_cpu_us": long["cpu_us"],
        "late_ratio": fifth_cost(watch, 4) / fifth_cost(watch, 0),
        "generation_kb": (watch.samples[-2].resident_bytes - early.resident_bytes) / LONG.streams / 1e3,
        "deltas_per_second": long["deltas_per_second"],
        "wrong": short["wrong"] + long["wrong"],
        "failed": short["failed"] + long["failed"],
        "load_share": long["load_share"],
    }
