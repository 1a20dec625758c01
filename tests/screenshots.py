"""Makes the pictures that the README shows, from the real page: `python -m tests.screenshots`.

Writes web/screenshots/{light,dark,phone}.png, which are not served, and web/icon.png from web/icon.svg.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.conftest import ROOT, Server
from tests.provider import Provider, openai_reasoning, openai_text

PICTURE_BYTES_MAX = 150_000
FOLDER = ROOT / "web" / "screenshots"
EARLIER = (
    "Plan a weekend in Lisbon",
    "Regular expression for ISO dates",
    "Sourdough that does not rise",
    "What is a monad, really?",
)
QUESTION = "Why are there two tides a day?"
REASONING = "They ask for the cause. The gradient of the pull matters, not the pull itself."
ANSWER = """\
Tides come from the *difference* in the Moon's pull across the Earth:

1. The near side is pulled **more** than the centre, the far side less.
2. Water flows into two bulges, and the Earth turns beneath them.

```python
def tide(hours: float, moon: float = 1.0, sun: float = 0.46) -> float:
    \"\"\"Height of the tide, relative.\"\"\"
    return moon * cos(2 * pi * hours / 12.42) + sun * cos(2 * pi * hours / 12.0)
```

| place | range | tides a day |
|:--|--:|:-:|
| Bay of Fundy | 16.3 m | two |
| Saint-Malo | 12.2 m | two |
| Gulf of Mexico | 0.6 m | one |
"""


def ask(tab: Page) -> None:
    """Asks the question and waits for the end of its answer."""
    tab.fill("#box", QUESTION)
    tab.locator("#send").click()
    expect(tab.locator(".figures")).to_be_visible(timeout=20_000)


def take(browser: Browser, url: str, name: str, **options: object) -> None:
    context = browser.new_context(**options)  # type: ignore[arg-type]
    tab = context.new_page()
    tab.goto(url)
    expect(tab.locator("#model-name")).to_contain_text("/")
    ask(tab)
    tab.mouse.move(0, 0)
    tab.locator("#scroller").evaluate(
        "(node) => node.scrollTo(0, 0)" if name != "phone" else "(node) => node.scrollTo(0, node.scrollHeight)"
    )
    tab.locator("#jump").evaluate("(node) => { node.style.visibility = 'hidden' }")
    path = FOLDER / f"{name}.png"
    tab.screenshot(path=path, animations="disabled")
    context.close()
    assert path.stat().st_size < PICTURE_BYTES_MAX, f"{path}: {path.stat().st_size:,} bytes"
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


def make_icon(browser: Browser) -> None:
    tab = browser.new_page(viewport={"width": 512, "height": 512})
    tab.set_content(f"<style>body {{ margin: 0 }}</style>{(ROOT / 'web' / 'icon.svg').read_text()}")
    tab.screenshot(path=ROOT / "web" / "icon.png", omit_background=True)
    tab.close()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with Provider() as provider, sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        server = Server(
            Path(folder), OPENAI_BASE_URL=provider.base_url, OPENAI_API_KEY="sk-test", OPENAI_MODELS="gpt-4o-mini"
        )
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), chromium_sandbox=False)
        try:
            for text in EARLIER:
                server.wait_ended(server.start_chat(text))
            for name, options in {
                "light": {"viewport": {"width": 1200, "height": 820}},
                "dark": {"viewport": {"width": 1200, "height": 820}, "color_scheme": "dark"},
                "phone": {
                    "viewport": {"width": 390, "height": 844},
                    "has_touch": True,
                    "is_mobile": True,
                    "device_scale_factor": 1.5,
                },
            }.items():
                words = [word + " " for word in REASONING.split()]
                pieces = [ANSWER[at : at + 12] for at in range(0, len(ANSWER), 12)]
                provider.script(
                    [*openai_reasoning(*words, delay=0.12), *openai_text(*pieces, usage=(21, 212), delay=0.03)]
                )
                take(browser, server.url, name, **options)
            make_icon(browser)
        finally:
            browser.close()
            server.close()


if __name__ == "__main__":
    main()
