"""How smooth the page is, in a real browser: `python -m tests.smoothness [rounds]` prints the longest task of each scene.

While a task of the browser's main thread runs, nothing scrolls, paints or takes a key. The figures come from the
browser's own trace: the time on the clock, which contains whatever else the machine did meanwhile, and the CPU time
beside it. Medians over the rounds, the smallest and the largest in brackets; each scene has a window of its own.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.conftest import Server
from tests.provider import Provider, openai_text

ROUNDS = 7
QUIET_MS = 1500  # after this long, a page that was opened has done all that it had to do
PARAGRAPH = "Some words of an *ordinary* answer with `code`, a [link](https://example.org/page) and **weight**. " * 3
CODE = "```python\n" + "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n\n\n" * 4 + "```"
ITEMS = "\n".join(f"{number}. **Step {number}**: do `this` and then _that_, carefully." for number in range(1, 9))
TABLE = "| option | default | meaning |\n|:--|--:|---|\n" + "| `--size` | 10 | how *large* it may be |\n" * 8
SHORT_ANSWER = "\n\n".join([PARAGRAPH, CODE, ITEMS])
PART = "\n\n".join(["## A part", PARAGRAPH, ITEMS, CODE, PARAGRAPH, TABLE, "> " + PARAGRAPH, ""])
LONG_ANSWER = (PART * 30)[:50_000].rpartition("\n\n")[0] + "\n\nThe very end."


@dataclass
class Trace:
    """What the browser did, and for how long each task took: on the clock and of the CPU, in ms."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def longest_ms(self) -> tuple[float, float]:
        layouts = [(one["pid"], one["tid"]) for one in self.events if one["name"] == "Layout"]
        main = statistics.mode(layouts)
        tasks = [one for one in self.events if one["name"].endswith("RunTask") and (one["pid"], one["tid"]) == main]
        return max(one.get("dur", 0) for one in tasks) / 1000, max(one.get("tdur", 0) for one in tasks) / 1000


@contextmanager
def traced(tab: Page) -> Iterator[Trace]:
    """Traces what happens within. Nothing may be asked of the page meanwhile: that would be a task as well."""
    trace, ended = Trace(), list[bool]()
    session = tab.context.new_cdp_session(tab)
    session.on("Tracing.dataCollected", lambda data: trace.events.extend(data["value"]))
    session.on("Tracing.tracingComplete", lambda _: ended.append(True))
    session.send("Tracing.start", {"categories": "toplevel,devtools.timeline", "transferMode": "ReportEvents"})
    yield trace
    session.send("Tracing.end")
    while not ended:
        tab.wait_for_timeout(20)


class Scenes:
    """A server with a conversation of 200 messages and one with an answer of 50 KB, and what can be done with them."""

    def __init__(self, server: Server, provider: Provider) -> None:
        self.server, self.provider = server, provider
        self.many = 0
        for number in range(100):
            provider.script(openai_text(f"{SHORT_ANSWER}\n\nAnswer {number}."))
            more = {"conversation_id": self.many} if self.many else {}
            answer = server.post("/api/v1/chat", {"message": f"Question {number}", "stream": False, **more}).json()
            self.many = answer["conversation_id"]
        provider.script(openai_text(LONG_ANSWER))
        self.long = server.post("/api/v1/chat", {"message": "Long", "stream": False}).json()["conversation_id"]

    def load(self, tab: Page, conversation: int, last: str) -> Trace:
        """The address is opened in a new window."""
        with traced(tab) as trace:
            tab.goto(f"{self.server.url}/c/{conversation}")
            tab.wait_for_timeout(QUIET_MS)
        expect(tab.get_by_text(last)).to_be_in_viewport()
        return trace

    def choose(self, tab: Page, conversation: int, last: str) -> Trace:
        """The conversation is chosen in the sidebar."""
        tab.goto(self.server.url)
        link = tab.locator(f"#list a[href='/c/{conversation}']")
        expect(link).to_be_visible()
        with traced(tab) as trace:
            link.click()
            tab.wait_for_timeout(QUIET_MS)
        expect(tab.get_by_text(last)).to_be_in_viewport()
        return trace

    def stream(self, tab: Page, path: str) -> Trace:
        """An answer of 50 KB comes in, 250 characters every 15 ms, and ends."""
        tab.goto(self.server.url + path)
        expect(tab.locator("#model-name")).to_contain_text("/")
        tab.wait_for_timeout(QUIET_MS)
        pieces = [LONG_ANSWER[at : at + 250] for at in range(0, len(LONG_ANSWER), 250)]
        self.provider.script(openai_text(*pieces, delay=0.015))
        with traced(tab) as trace:
            tab.fill("#box", "Go")
            tab.keyboard.press("Enter")
            tab.wait_for_timeout(len(pieces) * 15 + 3 * QUIET_MS)
        expect(tab.get_by_text("The very end.").last).to_be_in_viewport()
        return trace

    def all(self) -> dict[str, Callable[[Page], Trace]]:
        return {
            "200 messages, chosen": lambda tab: self.choose(tab, self.many, "Answer 99."),
            "200 messages, loaded": lambda tab: self.load(tab, self.many, "Answer 99."),
            "50 KB answer, chosen": lambda tab: self.choose(tab, self.long, "The very end."),
            "50 KB answer, loaded": lambda tab: self.load(tab, self.long, "The very end."),
            "50 KB answer, streamed": lambda tab: self.stream(tab, "/"),
        }


def measure(browser: Browser, scene: Callable[[Page], Trace]) -> tuple[float, float]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    try:
        return scene(context.new_page()).longest_ms()
    finally:
        context.close()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with Provider() as provider, sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), OPENAI_BASE_URL=provider.base_url, OPENAI_API_KEY="sk-test", OPENAI_MODELS="m")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), chromium_sandbox=False)
        try:
            for name, scene in Scenes(server, provider).all().items():
                figures = [measure(browser, scene) for _ in range(rounds)]
                clock, cpu = (
                    f"{statistics.median(column):3.0f} ms ({min(column):.0f}–{max(column):.0f})"
                    for column in zip(*figures, strict=True)
                )
                print(f"{name:24} longest task {clock:18} of the CPU {cpu}", flush=True)
        finally:
            browser.close()
            server.close()


if __name__ == "__main__":
    main()
