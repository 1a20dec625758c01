"""What rendering costs: `python -m bench.markdown` from the project's folder. CPU times of one core."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from llmchat import MarkdownStream, render

DELTAS_PER_SECOND = 50
DELTA_CHARACTERS = 20
FRAME_SECONDS = 0.1
PAUSE_FACTOR = 10  # of the last frame's cost, as the service pauses

PARAGRAPH = "Some words of an *ordinary* answer with `code`, a [link](https://example.org/page) and **weight**. " * 3
CODE = (
    "```python\n" + "def area(radius: float) -> float:\n    return 3.14159 * radius**2  # of a circle\n\n\n" * 8 + "```"
)
ITEMS = "\n".join(f"{number}. **Step {number}**: do `this` and then _that_, carefully." for number in range(1, 9))
TABLE = "| option | default | meaning |\n|:--|--:|---|\n" + "| `--size` | 10 | how *large* it may be |\n" * 8
SECTIONS = ["## A heading", PARAGRAPH, ITEMS, CODE, PARAGRAPH, TABLE, "> " + PARAGRAPH]

PATHOLOGICAL = {
    "20 KB of ![": "![" * 10_000,
    "20 KB of [": "[" * 20_000,
    "20 KB of open brackets": ("[" * 16 + "*a" * 300 + "\n\n") * 32,
    "20 KB of *": "*" * 20_000,
    "20 KB of *a ": "*a " * 6_667,
    "20 KB of `": "`" * 20_000,
    "backticks of every length": "".join("`" * length + "a" for length in range(1, 200)),
    "20 KB of >": ">" * 20_000,
    "quotes, 200 deep": (">" * 200 + "a\n") * 100,
    "lists, 140 deep": "".join("  " * depth + "- a\n" for depth in range(140)),
    "a list of 20 KB": "- an *item* of a `list`\n" * 834,
    "a table of 20 KB": "|a|b|c|\n|-|-|-|\n" + "| a cell | *another* | `code` |\n" * 640,
    "a table without cells": "|x" * 100 + "|\n" + "|-" * 100 + "|\n" + "a\n" * 10_000,
    "open code of 20 KB": "```python\n" + "print('hello')  # a comment\n" * 700,
    "definitions": '[a]: https://x.example "\n' * 800,
    "one paragraph of 20 KB": "Some *words* and `code`. " * 800,
}


def answer(characters: int) -> str:
    """An ordinary answer of that length: prose, lists, code and tables."""
    once = "\n\n".join([*SECTIONS, ""])
    return (once * (characters // len(once) + 1))[:characters]


def deltas(text: str) -> Iterator[str]:
    shape = random.Random(1)
    position = 0
    while position < len(text):
        length = shape.randint(1, 2 * DELTA_CHARACTERS - 1)
        yield text[position : position + length]
        position += length


def full_seconds(text: str) -> float:
    started = time.process_time()
    render(text)
    return time.process_time() - started


def stream(text: str, shown_before: str = "") -> tuple[float, float, float, float]:
    """Stream text after what was shown before: CPU per second of streaming, mean and worst frame, bytes per second."""
    markdown = MarkdownStream()
    markdown.feed(shown_before)
    markdown.frame()
    now = next_frame = total = worst = 0.0
    frames = sent_bytes = 0
    started = time.process_time()
    for delta in deltas(text):
        markdown.feed(delta)
        now += 1 / DELTAS_PER_SECOND
        if now >= next_frame:
            frame = markdown.frame()
            frames += 1
            total += frame.seconds
            worst = max(worst, frame.seconds)
            sent_bytes += len(frame.open.encode()) + sum(len(block.encode()) for _, block in frame.settled)
            next_frame = now + max(FRAME_SECONDS, PAUSE_FACTOR * frame.seconds)
    return (time.process_time() - started) / now, total / frames, worst, sent_bytes / now


def main() -> None:
    started = time.process_time()
    render("a `b`\n\n```python\nc\n```")
    print(f"first use (imports): {1000 * (time.process_time() - started):.0f} ms\n")
    for kilobytes in (10, 50):
        print(f"full render of {kilobytes} KB: {1000 * full_seconds(answer(kilobytes * 1000)):.0f} ms")
    print("\nten seconds of streaming (50 deltas of 20 characters a second) after an answer of that length:")
    for kilobytes in (1, 10, 100):
        share, mean, worst, rate = stream(answer(10_000), answer(kilobytes * 1000) + "\n\n")
        costs = f"{100 * share:.2f} % of a core; frames {1000 * mean:.1f} ms, at most {1000 * worst:.1f} ms"
        print(f"{kilobytes:6} KB: {costs}; {rate / 1000:.0f} KB/s of HTML")
    print("\nanswers that mean harm, most of them one block that never ends: full render, then streamed as above:")
    for name, text in PATHOLOGICAL.items():
        full = full_seconds(text)
        share, _, worst, rate = stream(text)
        costs = f"{1000 * full:6.0f} ms; {100 * share:5.2f} % of a core, at most {1000 * worst:4.0f} ms a frame"
        print(f"{name:26} {costs}; {rate / 1000:4.0f} KB/s")


if __name__ == "__main__":
    main()
