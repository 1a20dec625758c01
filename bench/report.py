"""The report: figures per row and server as Markdown tables, and what was to beat.

`results[row, server]` is a list of figures, one per round. A figure is shown as its median with the minimum and the
maximum beside it; a ratio is taken within each round, whose servers ran one after another, and then the same way.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Figures = dict[str, float]
Results = dict[tuple[str, str], list[Figures]]

STREAM_ROWS = {
    "c1": "1 stream × 50/s",
    "c100": "100 streams × 50/s",
    "c500": "500 streams × 50/s",
    "flat": "100 streams, flat out",
    "fan": "1 generation, 500 subscribers × 50/s",
}
STREAM_COLUMNS = {
    "deltas/s": "deltas_per_second",
    "keeps up with": "kept_up",
    "CPU µs a delta": "cpu_us",
    "added p50 ms": "p50_ms",
    "added p99 ms": "p99_ms",
    "first delta ms": "first_ms",
    "KB a stream": "stream_kb",
    "lost or doubled": "wrong",
    "failed": "failed",
    "load core": "load_share",
    "other work": "other_share",
}
CHAT_COLUMNS = {
    "chats/s": "chats_per_second",
    "CPU ms a chat": "cpu_ms",
    "first delta ms": "first_ms",
    "whole chat p99 ms": "p99_ms",
    "lost or doubled": "wrong",
    "failed": "failed",
    "load core": "load_share",
    "other work": "other_share",
}
START_COLUMNS = {"start ms": "start_ms", "start, new database ms": "first_start_ms", "idle MB": "idle_mb"}
GROWTH_COLUMNS = {
    "1,000 characters: CPU µs a delta": "short_cpu_us",
    "100,000 characters: CPU µs a delta": "long_cpu_us",
    "last fifth / first fifth": "late_ratio",
    "a generation holds KB": "long_kb",
    "at 900,000 characters, KB": "giant_kb",
    "lost or doubled": "wrong",
}
DATABASE_COLUMNS = {
    "list p99 ms": "list_ms",
    "search p50 ms": "search_p50_ms",
    "p99 ms: rare": "search_rare_ms",
    "frequent": "search_frequent_ms",
    "Chinese": "search_chinese_ms",
    "prefix": "search_prefix_ms",
    "hostile": "search_hostile_ms",
    "open 500 messages p99 ms": "open_ms",
    "start ms": "start_ms",
}
PERCENT = {"kept_up", "load_share", "other_share"}


def number(value: float) -> str:
    """Three digits or so."""
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def spread(values: Sequence[float], name: str = "") -> str:
    """median (minimum–maximum)"""
    if not values:
        return "–"
    if name in PERCENT:
        values = [value * 100 for value in values]
    sign = " %" if name in PERCENT else ""
    middle, low, high = (number(pick(values)) for pick in (statistics.median, min, max))
    return f"{middle}{sign}" if low == high else f"{middle}{sign} ({low}–{high})"


def values_of(results: Results, row: str, server: str, name: str) -> list[float]:
    return [figures[name] for figures in results.get((row, server), []) if name in figures]


def ratios(results: Results, row: str, name: str, other: str, other_row: str = "") -> list[float]:
    """llmchat's figure over another server's, round by round."""
    ours, theirs = values_of(results, row, "llmchat", name), values_of(results, other_row or row, other, name)
    return [mine / yours for mine, yours in zip(ours, theirs, strict=False) if yours]


@dataclass(frozen=True)
class Bar:
    """One thing to beat: what is compared, on which side of which limit it has to be."""

    row: str  # without it in the run, the bar is left out
    work: str
    to_beat: str
    sign: str  # "≤" or "≥"
    limit: float
    values: Callable[[Results], list[float]]

    def line(self, results: Results) -> str:
        """Its line of the table; a bar that was not measured says so."""
        values = self.values(results)
        if not values:
            return f"| {self.work} | {self.to_beat} {self.sign} {number(self.limit)} | not measured | |"
        middle = statistics.median(values)
        met = middle <= self.limit if self.sign == "≤" else middle >= self.limit
        mark = "✓" if met else "✗"
        return f"| {self.work} | {self.to_beat} {self.sign} {number(self.limit)} | {spread(values)} | {mark} |"


def figure(row: str, name: str) -> Callable[[Results], list[float]]:
    return lambda results: values_of(results, row, "llmchat", name)


def ratio(row: str, name: str, other: str, other_row: str = "") -> Callable[[Results], list[float]]:
    return lambda results: ratios(results, row, name, other, other_row)


def all_wrong(results: Results) -> list[float]:
    """Lost and doubled characters of llmchat, over all rows and rounds."""
    found = [
        figures["wrong"]
        for (_, server), rounds in results.items()
        if server == "llmchat"
        for figures in rounds
        if "wrong" in figures
    ]
    return [sum(found)] if found else []


def growth_ratio(results: Results) -> list[float]:
    rounds = results.get(("growth", "llmchat"), [])
    return [figures["long_cpu_us"] / figures["short_cpu_us"] for figures in rounds]


def filled_start(results: Results) -> list[float]:
    filled, empty = (values_of(results, row, "llmchat", "start_ms") for row in ("database", "start"))
    return [mine / yours for mine, yours in zip(filled, empty, strict=False)]


BARS = (
    Bar("c100", "100 streams × 50/s", "CPU a delta / passthrough's", "≤", 0.45, ratio("c100", "cpu_us", "passthrough")),
    Bar("c100", "", "added p99 ms", "≤", 30, figure("c100", "p99_ms")),
    Bar("c500", "500 streams × 50/s", "share of the offered rate", "≥", 0.98, figure("c500", "kept_up")),
    Bar("c500", "", "CPU a delta / nginx's", "≤", 2, ratio("c500", "cpu_us", "nginx")),
    Bar("flat", "100 streams, flat out", "deltas/s / nginx's", "≥", 2, ratio("flat", "deltas_per_second", "nginx")),
    Bar("flat", "", "deltas/s / passthrough's", "≥", 10, ratio("flat", "deltas_per_second", "passthrough")),
    Bar("c1", "1 stream × 50/s", "added p50 ms", "≤", 5, figure("c1", "p50_ms")),
    Bar("fan", "500 subscribers × 50/s", "share of the offered rate", "≥", 0.98, figure("fan", "kept_up")),
    Bar("fan", "", "CPU a delta / nginx's at 500 streams", "≤", 1, ratio("fan", "cpu_us", "nginx", "c500")),
    Bar("chats", "new chats", "chats/s / passthrough's", "≥", 3, ratio("chats", "chats_per_second", "passthrough")),
    Bar("start", "start and idle", "start / bare Starlette's", "≤", 1.5, ratio("start", "start_ms", "bare")),
    Bar("start", "", "idle memory / bare Starlette's", "≤", 1.5, ratio("start", "idle_mb", "bare")),
    Bar("start", "", "idle MB", "≤", 50, figure("start", "idle_mb")),
    Bar("c500", "memory", "KB per open stream, 500 open", "≤", 60, figure("c500", "stream_kb")),
    Bar("database", "100,000 messages", "list p99 ms", "≤", 20, figure("database", "list_ms")),
    Bar("database", "", "search p99 ms, worst kind", "≤", 20, figure("database", "search_ms")),
    Bar("database", "", "open 500 messages p99 ms", "≤", 50, figure("database", "open_ms")),
    Bar("database", "", "start / start when empty", "≤", 1.2, filled_start),
    Bar("growth", "long answers", "CPU a delta, 100,000 / 1,000 characters", "≤", 1.2, growth_ratio),
    Bar("growth", "", "CPU a delta, last / first fifth of 100,000", "≤", 1.2, figure("growth", "late_ratio")),
    Bar("*", "all rows", "characters lost or doubled", "≤", 0, all_wrong),
)


def table(results: Results, rows: dict[str, str], columns: dict[str, str], servers: Sequence[str]) -> list[str]:
    """A line per row and server that was measured; nothing when there is none."""
    lines = []
    for row, title in rows.items():
        for server in servers:
            if (row, server) in results:
                cells = (spread(values_of(results, row, server, name), name) for name in columns.values())
                lines.append(f"| {title} | {server} | {' | '.join(cells)} |")
    if not lines:
        return []
    return ["", f"| work | server | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|", *lines]


def render(results: Results, servers: Sequence[str], facts: Sequence[str]) -> str:
    """The whole report; `facts` say how and on what it was measured."""
    lines = ["# Benchmark", "", *(f"- {fact}" for fact in facts), ""]
    run = {row for row, _ in results} | {"*"}
    lines += ["| work | to beat | measured | |", "|---|---|---|---|"]
    lines += [bar.line(results) for bar in BARS if bar.row in run]
    lines += table(results, STREAM_ROWS, STREAM_COLUMNS, servers)
    lines += table(results, {"chats": "new chats, one delta each"}, CHAT_COLUMNS, servers)
    lines += table(results, {"start": "start and idle"}, START_COLUMNS, servers)
    lines += table(results, {"database": "100,000 messages"}, DATABASE_COLUMNS, servers)
    lines += table(results, {"growth": "20 generations × 1,000/s"}, GROWTH_COLUMNS, servers)
    return "\n".join(lines) + "\n"
