"""Row growth: what a delta costs, and a generation holds, early and late in a long answer, and in short answers.

20,000 deltas a second three ways: answers of 1,000 characters one after another, and the first and the last fifth of
answers of 100,000 characters. A program that looks back over what it already has shows it here. Then a few answers of
900,000 characters, flat out: what they hold in memory must not grow with them.
"""

import asyncio
import time

from client import Connection
from rows import GRACE_SECONDS, Figures, Load, Watch, chat_on, note, open_streams, warm_up
from servers import Running

SHORT = Load(20, 100, 1000)  # 1,000 characters
LONG = Load(20, 10_000, 1000, 0.2)  # 100,000 characters
GIANT = Load(10, 90_000, 0)  # 900,000 characters


async def run_growth(running: Running, provider_pid: int, short_seconds: float) -> Figures:
    """`…_cpu_us` a delta, `late_ratio` (last fifth / first fifth), `…_kb` resident for each generation at most."""
    await warm_up(running)
    short = await run_short(running, provider_pid, short_seconds)
    long = await run_long(running, provider_pid, LONG)
    giant = await run_long(running, provider_pid, GIANT)
    every = [watch.figures() for watch in (short, long, giant)]
    return {
        "short_cpu_us": every[0]["cpu_us"],
        "long_cpu_us": every[1]["cpu_us"],
        "late_ratio": fifth_cost(long, 4) / fifth_cost(long, 0),
        "long_kb": gained_kb(long),
        "giant_kb": gained_kb(giant),
        "wrong": sum(figures["wrong"] for figures in every),
        "failed": sum(figures["failed"] for figures in every),
    }


async def run_short(running: Running, provider_pid: int, seconds: float) -> Watch:
    """Short answers, one after another on each connection."""
    connections = [Connection(running.port) for _ in range(SHORT.streams)]
    request = running.chat_request(SHORT.model)
    async with Watch(running, provider_pid, []) as watch:
        until = time.monotonic() + seconds
        lists = await asyncio.gather(*(chat_on(connection, request, SHORT.deltas, until) for connection in connections))
        watch.readers = [reader for part in lists for reader in part]
    for connection in connections:
        connection.close()
    note(watch.readers)
    return watch


async def run_long(running: Running, provider_pid: int, load: Load) -> Watch:
    """Long answers, all at once."""
    readers = [load.reader() for _ in range(load.streams)]
    request = running.chat_request(load.model)
    async with Watch(running, provider_pid, readers) as watch:
        await open_streams(running.port, request, readers, load.ramp_seconds, load.answer_seconds + GRACE_SECONDS)
    note(readers)
    return watch


def fifth_cost(watch: Watch, number: int) -> float:
    """µs of CPU per delta in one fifth (from 0) of all that was delivered."""
    total = max(watch.samples[-1].received, 1)
    inside = [sample for sample in watch.samples if number / 5 <= sample.received / total <= (number + 1) / 5]
    first, last = inside[0], inside[-1]
    return (last.cpu_seconds - first.cpu_seconds) / max(last.received - first.received, 1) * 1e6


def gained_kb(watch: Watch) -> float:
    """The most that the server held beyond what it had before, for each stream."""
    most = max(sample.resident_bytes for sample in watch.samples)
    return (most - watch.samples[0].resident_bytes) / len(watch.readers) / 1e3
