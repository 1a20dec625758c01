"""The picture of the report: one panel of bars per figure, as SVG."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from report import Results, number, values_of

COLOURS = {"llmchat": "#0b7a75", "nginx": "#7a8794", "passthrough": "#b9c2cb", "bare": "#d5dbe1"}
WIDTH, PANEL_WIDTH, MARGIN = 860, 400, 20
BAR_HEIGHT, BAR_STEP, PANEL_HEAD = 18, 26, 46
LABEL_WIDTH, BAR_WIDTH = 84, 220


@dataclass(frozen=True)
class Panel:
    title: str
    better: str  # "less is better" or "more is better"
    bars: tuple[tuple[str, str, str], ...]  # label, row, server
    name: str  # of the figure


def panel(title: str, better: str, row: str, name: str, servers: Sequence[str]) -> Panel:
    return Panel(title, better, tuple((server, row, server) for server in servers), name)


PROXIES = ("llmchat", "nginx", "passthrough")
PANELS = (
    panel("100 streams × 50/s: CPU µs a delta", "less is better", "c100", "cpu_us", PROXIES),
    panel("500 streams × 50/s: CPU µs a delta", "less is better", "c500", "cpu_us", PROXIES),
    panel("100 streams, flat out: deltas a second", "more is better", "flat", "deltas_per_second", PROXIES),
    Panel(
        "500 subscribers: CPU µs a delta",
        "less is better; the others proxy 500 streams",
        (("llmchat", "fan", "llmchat"), ("nginx", "c500", "nginx"), ("passthrough", "c500", "passthrough")),
        "cpu_us",
    ),
    panel("New chats a second", "more is better; llmchat fsyncs each", "chats", "chats_per_second", PROXIES),
    panel("100 streams × 50/s: added latency p99, ms", "less is better", "c100", "p99_ms", PROXIES),
    panel("Memory per open stream, KB", "less is better", "c500", "stream_kb", PROXIES),
    panel("Start to the first answer, ms", "less is better", "start", "start_ms", ("llmchat", "nginx", "bare")),
)


def text(x: float, y: float, content: str, style: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{style}">{escape(content)}</text>'


def draw_bar(x: float, y: float, label: str, server: str, values: Sequence[float], top: float) -> list[str]:
    """A bar as long as the median, a line from the minimum to the maximum, and the median in digits."""
    middle = statistics.median(values)
    length, low, high = (value / top * BAR_WIDTH for value in (middle, min(values), max(values)))
    start, centre = x + LABEL_WIDTH, y + BAR_HEIGHT / 2
    return [
        text(x, centre + 4, label, "label"),
        f'<rect x="{start:.0f}" y="{y:.0f}" width="{max(length, 1):.1f}" height="{BAR_HEIGHT}" rx="2" '
        f'fill="{COLOURS[server]}"/>',
        f'<path d="M{start + low:.1f} {centre:.0f}H{start + high:.1f}" class="spread"/>',
        text(start + max(length, high) + 6, centre + 4, number(middle), "value"),
    ]


def draw_panel(results: Results, what: Panel, x: float, y: float) -> list[str]:
    """Title, direction and bars; nothing of a server that was not measured."""
    measured = [(label, server, values_of(results, row, server, what.name)) for label, row, server in what.bars]
    measured = [bar for bar in measured if bar[2]]
    top = max((max(values) for _, _, values in measured), default=1.0) or 1.0
    parts = [text(x, y + 14, what.title, "title"), text(x, y + 31, what.better, "note")]
    for position, (label, server, values) in enumerate(measured):
        parts += draw_bar(x, y + PANEL_HEAD + position * BAR_STEP - 6, label, server, values, top)
    return parts


STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2933 }
.title { font-weight: 600 } .note, .foot { font-size: 11px; fill: #66727f } .label { font-size: 12px }
.value { font-size: 12px; font-weight: 600 } .spread { stroke: #1f2933; stroke-width: 1.5; opacity: .55 }
"""


def draw(results: Results, foot: str) -> str:
    """The picture, two panels a line; panels without figures are left out."""
    shown = [what for what in PANELS if any(values_of(results, row, who, what.name) for _, row, who in what.bars)]
    panel_height = PANEL_HEAD + 3 * BAR_STEP + 14
    height = MARGIN * 2 + (len(shown) + 1) // 2 * panel_height + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="Benchmark of llmchat beside nginx and a plain passthrough">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>',
    ]
    for position, what in enumerate(shown):
        x = MARGIN + position % 2 * (PANEL_WIDTH + MARGIN)
        parts += draw_panel(results, what, x, MARGIN + position // 2 * panel_height)
    parts += [text(MARGIN, height - 12, foot, "foot"), "</svg>"]
    return "\n".join(parts) + "\n"
