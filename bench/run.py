"""Runs the benchmark: llmchat, nginx as a plain proxy and the passthrough that anyone would write, side by side.

    python bench/run.py                     all rows, three rounds, some minutes
    python bench/run.py --quick             one short round
    python bench/run.py --only c100,c500    these rows; --help names them all

Progress goes to standard error; the report is printed and, with a picture beside it, written to a file.
"""

import argparse
import asyncio
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

import uvloop
from chart import draw
from client import fetch
from database import fill, run_database
from growth import run_growth
from report import Figures, Results, render
from rows import Load, run_chats, run_fan, run_load, warm_up
from servers import (
    Running,
    Setup,
    busy_seconds,
    cpu_seconds,
    pick_cores,
    start_provider,
    start_server,
    stop_process,
)

HERE = Path(__file__).resolve().parent
PROXIES = ("llmchat", "nginx", "passthrough", "tuned")
STARTS = 3  # per round and server
CALM_SECONDS = 0.5  # the machine is calm when, for so long, other work has used
LOG_CHARACTERS = 1500  # of a server's log that are shown when a row fails
CALM_SHARE = 0.1  # at most this part of one core


@dataclass(frozen=True)
class Bench:
    """One run: what its servers are set up with, its provider, and whether it is the quick one."""

    setup: Setup
    provider: subprocess.Popen
    quick: bool
    patience_seconds: float


Work = Callable[[Bench, str, Path], Coroutine[None, None, Figures]]


def on_fresh_server(work: Callable[[Bench, Running], Coroutine[None, None, Figures]]) -> Work:
    """The work, done on a server that is started for it and stopped after it."""

    async def run(bench: Bench, server: str, directory: Path) -> Figures:
        running = start_server(bench.setup, server, directory)
        try:
            return await work(bench, running)
        finally:
            running.stop()

    return run


def stream_row(load: Load) -> Work:
    return on_fresh_server(lambda bench, running: run_load(running, bench.provider.pid, load))


async def start_row(bench: Bench, server: str, directory: Path) -> Figures:
    """Starts a server with nothing there, then again and again; idle memory after the last start."""
    starts = []
    for _ in range(STARTS + 1):
        running = start_server(bench.setup, server, directory)
        running.stop()
        starts.append(running.start_seconds * 1e3)
    first, *others = starts
    figures = {"start_ms": sorted(others)[len(others) // 2], "idle_mb": running.idle_bytes / 1e6}
    return figures | ({"first_start_ms": first} if server == "llmchat" else {})


async def database_row(bench: Bench, server: str, directory: Path) -> Figures:
    """The filled database is made in the first round and used again in the others."""
    filled = bench.setup.directory / "filled"
    if not filled.exists():
        running = start_server(bench.setup, server, directory)
        try:
            await warm_up(running)
            await fetch(running.port, "GET", "/api/v1/conversations?query=any")  # indexes what was said
        finally:
            running.stop()
        fill(directory / "llmchat.db", filled)
        start_server(bench.setup, server, filled).stop()
    running = start_server(bench.setup, server, filled)
    try:
        return await run_database(running, filled / "llmchat.db")
    finally:
        running.stop()


@dataclass(frozen=True)
class Row:
    what: str
    servers: tuple[str, ...]
    work: Work


ROWS = {
    "c1": Row("1 stream × 50 deltas/s", PROXIES, stream_row(Load(1, 200, 50, 0))),
    "c100": Row("100 streams × 50 deltas/s", PROXIES, stream_row(Load(100, 200, 50, 0.5))),
    "c500": Row("500 streams × 50 deltas/s, 2 s ramp", PROXIES, stream_row(Load(500, 200, 50, 2))),
    "flat": Row("100 streams × 1,000 deltas, flat out", PROXIES, stream_row(Load(100, 1000, 0, 0))),
    "fan": Row(
        "1 generation × 50 deltas/s, 500 subscribers",
        ("llmchat",),
        on_fresh_server(lambda bench, running: run_fan(running, bench.provider.pid, Load(500, 400, 50, 2))),
    ),
    "chats": Row(
        "new chats, one delta each, 32 clients",
        PROXIES,
        on_fresh_server(lambda bench, running: run_chats(running, bench.provider.pid, 32, 1.5 if bench.quick else 4.0)),
    ),
    "start": Row("start and idle memory", ("llmchat", "nginx", "passthrough", "bare"), start_row),
    "database": Row("100,000 messages in the database", ("llmchat",), database_row),
    "growth": Row(
        "answers of 1,000 and of 100,000 characters",
        ("llmchat",),
        on_fresh_server(lambda bench, running: run_growth(running, bench.provider.pid, 2.0 if bench.quick else 5.0)),
    ),
}


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


async def wait_for_calm(patience_seconds: float) -> None:
    """Waits until other work leaves the machine alone, or the patience is over."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        before = busy_seconds()
        await asyncio.sleep(CALM_SECONDS)
        if busy_seconds() - before <= CALM_SHARE * CALM_SECONDS:
            return


def short(figures: Figures) -> str:
    """A cell's figures in one line, for the progress."""
    names = {
        "cpu_us": "µs/delta",
        "deltas_per_second": "deltas/s",
        "p99_ms": "p99 ms",
        "chats_per_second": "chats/s",
        "start_ms": "start ms",
        "idle_mb": "MB",
        "search_ms": "search ms",
        "late_ratio": "late ratio",
    }
    found = [f"{figures[name]:,.1f} {unit}" for name, unit in names.items() if name in figures]
    return ", ".join(found) + (f", {figures['wrong']:.0f} CHARACTERS WRONG" if figures.get("wrong") else "")


async def run_cell(bench: Bench, row: str, server: str) -> Figures | None:
    """One row on one server, once; None, with the reason on standard error, when it could not be done."""
    directory = Path(tempfile.mkdtemp(prefix=f"{row}-{server}-", dir=bench.setup.directory))
    started = time.monotonic()
    try:
        figures = await asyncio.wait_for(ROWS[row].work(bench, server, directory), 180)
    except Exception as exc:  # one figure less, not the end of the run
        log = directory / f"{server}.log"
        say(f"failed: {type(exc).__name__}: {exc}")
        say(log.read_text(errors="replace")[-LOG_CHARACTERS:] if log.exists() else "")
        return None
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    say(f"{short(figures)} ({time.monotonic() - started:.0f} s)")
    return figures


def cells_of(rows: list[str], servers: list[str]) -> list[tuple[str, str]]:
    """Every row with every server that it is for."""
    return [(row, server) for row in rows for server in ROWS[row].servers if server in servers]


async def run_all(bench: Bench, rows: list[str], servers: list[str], rounds: int) -> Results:
    """All rounds; within a round the servers of a row run one after another."""
    results: Results = {}
    cells = cells_of(rows, servers)
    for turn in range(rounds):
        for position, (row, server) in enumerate(cells, 1):
            say(f"round {turn + 1}/{rounds}, {position}/{len(cells)}: {row} {server} … ", end="")
            await wait_for_calm(bench.patience_seconds)
            if figures := await run_cell(bench, row, server):
                results.setdefault((row, server), []).append(figures)
    return results


def file_system(directory: Path) -> str:
    """Kind and device of the file system that holds `directory`."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(point), kind, device) for device, point, kind in mounts if directory.is_relative_to(point)]
    _, kind, device = max(holding)
    return f"{kind} on {device}"


def facts(bench: Bench, load_core: int, rounds: int, foreign: float) -> list[str]:
    """How and on what it was measured."""
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("starlette", "uvicorn", "httpx"))
    core = bench.setup.server_core
    cores = f"server on core {core}, provider and client together on core {load_core}"
    if core == load_core:
        cores = "ONE core for server, provider and client together: rates are not comparable with those of two cores"
    command = " ".join(["python bench/run.py", *sys.argv[1:]])
    found = [
        f"`{command}`, {rounds} rounds: median (minimum–maximum); ratios within a round",
        f"{model[0] if model else platform.machine()}, {os.cpu_count()} cores; {cores}",
        f"Linux {platform.release()}, Python {platform.python_version()}, {versions}; "
        f"database on {file_system(bench.setup.directory)}",
        f"other work on the machine meanwhile: {foreign:.0%} of one core on average",
    ]
    if not bench.setup.nginx:
        found.append("nginx is not installed: its lines are missing")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = "; ".join(f"{name}: {row.what}" for name, row in ROWS.items())
    parser.add_argument("--quick", action="store_true", help="one round of shorter work")
    parser.add_argument("--only", metavar="ROW,…", default=",".join(ROWS), help=names)
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--servers", default="llmchat,nginx,passthrough,tuned,bare", help="default: all five")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "bench.md", help="the picture goes beside it")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs the servers")
    parser.add_argument("--llmchat", type=Path, default=HERE.parent / "llmchat.py", help="the program to measure")
    parser.add_argument("--directory", type=Path, default=HERE / "results", help="for the databases; on a real disk")
    parser.add_argument("--patience", type=float, default=5, metavar="SECONDS", help="for a calm machine, each time")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    arguments.servers = arguments.servers.split(",")
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    if unknown := set(arguments.only) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return arguments


def write_report(arguments: argparse.Namespace, results: Results, servers: list[str], found: list[str]) -> None:
    """Prints the report, and writes it and the picture."""
    report = render(results, servers, found)
    foot = f"Rounds: {arguments.rounds}; bar: median, line: minimum to maximum; each server had one core to itself."
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(report)
    arguments.output.with_suffix(".svg").write_text(draw(results, foot))
    print(report)


def main() -> None:
    """Sets up, runs, reports, and stops what it started."""
    arguments = parse_arguments()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=arguments.directory)).resolve()
    server_core, load_core = pick_cores()
    os.sched_setaffinity(0, {load_core})
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or ""
    servers = [name for name in arguments.servers if name != "nginx" or nginx]
    provider, port = start_provider(arguments.python, load_core)
    setup = Setup(arguments.python, arguments.llmchat.resolve(), nginx, directory, port, server_core)
    bench = Bench(setup, provider, arguments.quick, arguments.patience)
    started, busy, children = time.monotonic(), busy_seconds(), os.times()
    try:
        results = uvloop.run(run_all(bench, arguments.only, servers, arguments.rounds))
        ended = os.times()
        own = sum(ended[:4]) - sum(children[:4]) + cpu_seconds(provider.pid)
    finally:
        stop_process(provider)
        shutil.rmtree(directory, ignore_errors=True)
    foreign = max(0.0, busy_seconds() - busy - own) / (time.monotonic() - started)
    write_report(arguments, results, servers, facts(bench, load_core, arguments.rounds, foreign))
    if missing := [
        f"{row} {server}"
        for row, server in cells_of(arguments.only, servers)
        if len(results.get((row, server), [])) < arguments.rounds
    ]:
        sys.exit(f"could not be measured every time: {', '.join(missing)}")


if __name__ == "__main__":
    main()
