"""The repetition guard: circles are caught in time, however they are cut; everything else passes."""

import random
import re
import sysconfig
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmchat import (
    REPETITION_DELTAS,
    REPETITION_PERIOD_CHARACTERS_MAX,
    REPETITION_STEP_CHARACTERS,
    REPETITION_WINDOW_CHARACTERS,
    RepetitionGuard,
)

COUNT = 20
CHARACTERS = 1_000
PROSE = "The rain had stopped by noon. Nobody in the harbour noticed, for the nets were being counted again; "

seeds = st.integers(0, 2**32 - 1)
units = st.text(st.sampled_from("ab \n-"), min_size=1, max_size=60) | st.text(min_size=1, max_size=30)


def cut(text: str, seed: int, longest: int) -> list[str]:
    """The text in deltas of 1 to `longest` characters."""
    rng = random.Random(seed)
    deltas = []
    start = 0
    while start < len(text):
        end = start + rng.randint(1, longest)
        deltas.append(text[start:end])
        start = end
    return deltas


def cut_evenly(text: str, length: int) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text), length)]


def alarm(deltas: list[str], count: int = COUNT, characters: int = CHARACTERS) -> tuple[int, str] | None:
    """The index of the delta that raised the alarm, and the period."""
    guard = RepetitionGuard(count, characters)
    for index, delta in enumerate(deltas):
        if (period := guard.feed([delta])) is not None:
            return index, period
    return None


def alarm_offset(text: str, count: int = COUNT, characters: int = CHARACTERS) -> int | None:
    """How many characters it took, in deltas of one (which are never the same delta in the guard's sense)."""
    found = alarm(list(text), count, characters)
    return None if found is None else found[0] + 1


def random_unit(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("etaoin shrdlu,\n", k=length))


def shortest_period(unit: str) -> int:
    return (unit + unit).index(unit, 1)


def run_length(text: str, period: int) -> int:
    """How many of the last characters repeat with this period."""
    start = len(text)
    while start > period and text[start - 1] == text[start - 1 - period]:
        start -= 1
    return len(text) - start + period


def bound(period: int, count: int = COUNT, characters: int = CHARACTERS) -> int:
    return 2 * max(period * count, characters)


# ---- Circles ----------------------------------------------------------------------------------------------------


def test_a_circle_of_every_period_is_caught_within_twice_the_bounds() -> None:
    rng = random.Random(7)
    for length in range(1, REPETITION_PERIOD_CHARACTERS_MAX + 1):
        unit = random_unit(rng, length)
        prefix = PROSE[: rng.randrange(len(PROSE))] + "#"
        text = prefix + unit * (bound(length) // length)
        deltas = cut(text, length, rng.choice((7, 300, 5_000)))

        found = alarm(deltas)

        assert found is not None, length
        index, period = found
        assert len(period) == shortest_period(unit)
        assert period in unit + unit
        assert sum(map(len, deltas[:index])) < len(prefix) + bound(length)


@settings(deadline=None)
@given(unit=units, prefix=st.text(max_size=400), seed=seeds, longest=st.integers(1, 400))
def test_a_circle_of_any_characters_is_caught_after_any_beginning(
    unit: str, prefix: str, seed: int, longest: int
) -> None:
    text = prefix + unit * (bound(len(unit)) // len(unit) + 1)

    assert alarm(cut(text, seed, longest)) is not None


@settings(deadline=None)
@given(
    seed=seeds,
    length=st.integers(1, REPETITION_PERIOD_CHARACTERS_MAX),
    rounds=st.floats(0.5, 2.5),
    longest=st.integers(1, 6_000),
)
def test_the_cut_changes_neither_the_verdict_nor_the_place(seed: int, length: int, rounds: float, longest: int) -> None:
    unit = random_unit(random.Random(seed), length)
    circle = unit * round(rounds * max(COUNT, CHARACTERS // length))
    text = PROSE[: seed % 97] + circle + "And so it ended. " + PROSE
    deltas = cut(text, seed, longest)
    by_character = alarm(list(text))

    found = alarm(deltas)

    if by_character is None:
        assert found is None
    else:
        assert found is not None
        assert found[1] == by_character[1]
        ends = list(accumulate(map(len, deltas)))
        assert ends[found[0]] - len(deltas[found[0]]) < by_character[0] + 1 <= ends[found[0]]


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.tuples(units, st.floats(0.3, 2.2)), min_size=1, max_size=4),
    count=st.integers(2, 40),
    characters=st.integers(1_000, 2_000),
)
def test_an_alarm_means_a_run_of_the_promised_length_and_a_run_of_twice_that_means_an_alarm(
    parts: list[tuple[str, float]], count: int, characters: int
) -> None:
    runs = [unit * round(times * max(count, characters / len(unit))) for unit, times in parts]
    text = "|".join(runs)

    found = alarm(list(text), count, characters)

    if found is not None:
        index, period = found
        assert text[: index + 1].endswith(period)
        assert run_length(text[: index + 1], len(period)) >= max(count * len(period), characters)
    else:
        assert all(len(run) < bound(len(unit), count, characters) for run, (unit, _) in zip(runs, parts, strict=True))


@pytest.mark.parametrize("tail", ["", "\n\nSorry, here is the rest of it.", PROSE * 3])
def test_a_circle_in_the_middle_of_one_large_delta_is_caught(tail: str) -> None:
    text = PROSE + "I am stuck. " * 150 + tail

    assert alarm([text]) is not None


def test_a_circle_of_words_is_caught_as_soon_as_it_has_passed_both_bounds() -> None:
    for phrase in ("I am stuck. ", "Wait, let me think about the harbour and its nets once more. "):
        reached = max(COUNT * len(phrase), CHARACTERS + len(phrase))

        offset = alarm_offset(phrase * 150)

        assert offset is not None
        assert reached <= offset < reached + 2 * REPETITION_STEP_CHARACTERS


def test_equal_lines_are_caught_at_twice_the_bounds_and_not_before() -> None:
    line = "Let me read the question once more, slowly and from the beginning.\n"
    enough = 2 * COUNT * len(line)

    offset = alarm_offset(line * 100)

    assert offset is not None
    assert enough - 2 * REPETITION_STEP_CHARACTERS <= offset <= enough


def test_a_loop_that_begins_anew_after_an_interruption_is_counted_anew() -> None:
    rounds = "I am stuck. " * 80

    assert alarm_offset((rounds + "No, I am not! ") * 10) is None


def test_the_period_is_in_the_script_that_the_model_wrote() -> None:
    found = alarm(cut("好的，" + "让我再想一想🙂。" * 300, 1, 9))

    assert found is not None
    assert sorted(found[1]) == sorted("让我再想一想🙂。")


# ---- Bounds and settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "repetitions"),
    [("a", 999), ("ab", 499), ("I am stuck. ", 83), (PROSE, 19), ((PROSE * 10)[:999] + "!", 19), ("0,0,0\n", 290)],
)
def test_below_either_bound_there_is_no_alarm(unit: str, repetitions: int) -> None:
    assert alarm_offset("Well:\n" + unit * repetitions + "\nDone. " + PROSE) is None


@pytest.mark.parametrize("character", ["\0", " ", "a", "的"])
def test_what_came_before_the_text_is_no_part_of_a_circle(character: str) -> None:
    assert alarm_offset(character * (CHARACTERS - 1)) is None
    assert alarm_offset(character * 2 * CHARACTERS) == CHARACTERS + REPETITION_STEP_CHARACTERS


def test_a_period_longer_than_the_longest_is_no_circle() -> None:
    unit = random_unit(random.Random(3), REPETITION_PERIOD_CHARACTERS_MAX + 1)

    assert alarm([unit * 90]) is None


@pytest.mark.parametrize(("count", "characters"), [(0, 0), (0, CHARACTERS), (COUNT, 0)])
def test_a_setting_of_0_turns_the_guard_off(count: int, characters: int) -> None:
    assert alarm(["again "] * 5_000, count, characters) is None


def test_higher_settings_are_more_patient() -> None:
    text = "I am stuck. " * 2_000

    offsets = [
        alarm_offset(text, count, characters) for count, characters in ((20, 1_000), (20, 5_000), (1_000, 1_000))
    ]

    assert [offset // 1_000 for offset in offsets if offset] == [1, 5, 12]


def test_memory_does_not_grow_with_the_text_or_the_settings() -> None:
    guard = RepetitionGuard(1_000_000, 1_000_000)

    for delta in cut(PROSE * 2_000, 5, 50):
        guard.feed([delta])

    kept = sum(len(value) for value in vars(guard).values() if isinstance(value, str))
    assert kept <= REPETITION_WINDOW_CHARACTERS + REPETITION_STEP_CHARACTERS + 50


# ---- The same delta ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", ["ha", " again", "the same words", "再来一次", PROSE * 50])
def test_the_same_delta_a_hundred_times_in_a_row_is_a_circle(delta: str) -> None:
    index, period = alarm([PROSE[:7], *[delta] * 200]) or (None, None)

    assert period is not None
    assert index is not None
    assert index <= REPETITION_DELTAS
    assert period in delta * 2


def test_one_delta_less_than_a_hundred_is_no_circle() -> None:
    assert alarm((["again "] * (REPETITION_DELTAS - 1) + ["and "]) * 5) is None


@pytest.mark.parametrize("delta", [" ", "-", "=", "    ", "0", "----", ". ", "│", "A", "AAAA", "0, ", "\n", "🙂", "**"])
def test_the_same_delta_without_a_word_waits_for_the_characters(delta: str) -> None:
    repetitions = CHARACTERS // len(delta) - 1

    assert alarm([PROSE, *[delta] * repetitions, PROSE]) is None
    assert alarm([PROSE, *[delta] * 3_000]) is not None


def test_the_same_line_as_a_delta_must_come_twice_as_often() -> None:
    assert alarm(["None,\n"] * 3 * REPETITION_DELTAS) == (2 * REPETITION_DELTAS - 1, "None,\n")


def test_empty_deltas_are_nothing() -> None:
    assert alarm([""] * 10_000) is None
    assert alarm(["again ", ""] * REPETITION_DELTAS) == (2 * REPETITION_DELTAS - 2, "again ")


# ---- What only looks like a circle --------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def board(rows: int, columns: int, cells: str) -> str:
    return "\n".join(" ".join(cells[(row + column) % len(cells)] for column in range(columns)) for row in range(rows))


def hexdump(data: bytes) -> str:
    rows = cut_evenly(data.hex(" "), 48)
    return "\n".join(f"{16 * index:08x}  {row.ljust(48)} |{'.' * 16}|" for index, row in enumerate(rows))


def mandelbrot() -> Iterator[str]:
    for y in range(-12, 13):
        line = ""
        for x in range(-40, 20):
            z = c = complex(x / 20, y / 10)
            for _ in range(30):
                z = z * z + c if abs(z) < 2 else z
            line += "*" if abs(z) < 2 else " "
        yield line


ROW = ["2024-01-01", "Berlin", "0", "0.00", "true", "", "n/a", "0"]
LEGITIMATE = {
    "an answer of one word": "Yes.",
    "a ruler of dashes": "Title\n" + "-" * 900 + "\nText",
    "a ruler of equals signs": "Title\n" + "=" * 900 + "\nText",
    "rulers between short paragraphs": "\n".join([PROSE + "\n" + "-" * 80] * 19),
    "a box": "+" + "-" * 300 + "+\n" + ("|" + " " * 300 + "|\n") * 15 + "+" + "-" * 300 + "+",
    "a form to fill in": "Name: " + "_" * 400 + "\nAddress: " + "." * 400 + "\n",
    "a table of contents": "\n".join(f"{n}. Chapter {'.' * 120} {n * 7}" for n in range(1, 60)),
    "a Markdown table with wide columns": table([["Name", "Value", "Note"], ["x", "1" * 200, "-" * 250]]),
    "a Markdown table with forty columns": table([["c"] * 40, ["0"] * 40, ["0"] * 40]),
    "a Markdown table of a hundred days": table(
        [["day", "done", "note"], *[[str(day), "[ ]", ""] for day in range(100)]]
    ),
    "an empty table of thirty rows": table([["Habit", "Mo", "Tu", "We", "Th", "Fr"], *[[""] * 6] * 30]),
    "a CSV of a thousand rows with equal columns": "\n".join(",".join([str(n), *ROW]) for n in range(1_000)),
    "a CSV of thirty equal rows": "a,b,c,d,e,f,g,h\n" + (",".join(ROW) + "\n") * 30,
    "a matrix of zeros": ("0,0,0\n") * 250,
    "a matrix of zeros, thirty by thirty": (",".join(["0"] * 30) + "\n") * 30,
    "an identity matrix": "\n".join(" ".join("01"[row == column] for column in range(60)) for row in range(60)),
    "zeros on one line": "[" + ", ".join(["0"] * 256) + "]",
    "a column of None": "(" + "\n    None," * 126 + "\n)",
    "a board of False": repr([[False] * 20] * 20),
    "a C array of zeros": "{\n" + ("    " + "0x00, " * 12 + "\n") * 22 + "};",
    "a JSON list of equal objects": '[\n  {"x": 0, "y": 0, "visible": true}' + ',\n  {"x": 0, "y": 0}' * 60 + "\n]",
    "sixty-four equal squares in HTML": '<div id="board">\n' + '  <div class="cell"></div>\n' * 64 + "</div>",
    "thirty empty rows in HTML": "<table>\n" + "  <tr><td></td><td></td><td></td></tr>\n" * 30 + "</table>",
    "a SQL script of equal inserts": "INSERT INTO score (points) VALUES (0);\n" * 38,
    "closing braces": "\n".join(" " * (4 * depth) + "}" for depth in range(60, 0, -1)),
    "blank lines": "first" + "\n" * 500 + "last",
    "deep indentation": "\n".join(" " * (8 * depth) + "if x:" for depth in range(100)),
    "a numbered list": "\n".join(f"{n}. Item" for n in range(1, 1_000)),
    "a list of steps with the same words": "\n".join(f"- [ ] Step {n}: check the valve" for n in range(300)),
    "a multiplication table": "\n".join(f"{a} x {b} = {a * b}" for a in range(1, 30) for b in range(1, 30)),
    "bottles of beer": "".join(f"{n} bottles of beer on the wall, take one down.\n" for n in range(99, 0, -1)),
    "lines as a punishment": "I will not talk in class.\n" * 65,
    "a refrain": ("Row, row, row your boat,\nGently down the stream.\n" * 2 + "Merrily, merrily.\n") * 8,
    "a haiku": "An old silent pond\nA frog jumps into the pond\nSplash! Silence again.\n" * 5,
    "laughter": "ha" * 90,
    "a scream": "A" + "a" * 800 + "h!",
    "a progress bar on one line": "".join(f"\r[{'#' * n}{'.' * (100 - n)}] {n:3d}%" for n in range(101)),
    "a progress bar per line": "\n".join(f"[{'█' * n}{'░' * (50 - n)}] {2 * n}%" for n in range(51)),
    "a chess board": board(8, 8, "♜♞"),
    "a large chess board": board(40, 40, ".#"),
    "a game of life": "\n".join("." * column + "###" + "." * (57 - column) for column in range(50)),
    "an empty game of life": (". " * 19 + ".\n") * 37,
    "a pyramid": "\n".join(" " * (60 - n) + "*" * (2 * n + 1) for n in range(60)),
    "the Mandelbrot set": "\n".join(mandelbrot()),
    "a Gantt chart": "\n".join(f"task {n:2d} |{' ' * n}{'=' * 20}{' ' * (60 - n)}|" for n in range(60)),
    "a guitar tab": "\n\n".join("\n".join(f"{string}|" + "-" * 76 + "|" for string in "eBGDAE") for _ in range(18)),
    "a drum tab": ("HH|x-x-x-x-x-x-x-x-|\nSD|----o-------o---|\nBD|o-------o-------|\n") * 16,
    "a hexdump with rows of zeros": hexdump(bytes(range(256)) + bytes(4_096) + bytes(range(256))),
    "base64 of zeros": "data:image/png;base64,iVBORw0KGgo" + "A" * 950 + "ASUVORK5CYII=",
    "a DNA repeat": "GATTACA" + "CAG" * 90 + "TTGACC",
    "digits of a third": "1/3 = 0." + "3" * 950,
    "digits of a seventh": "1/7 = 0." + "142857" * 160,
    "a log of one event": "\n".join(
        f"2024-01-01T00:{n // 60:02d}:{n % 60:02d} INFO heartbeat ok" for n in range(1_500)
    ),
    "a ping": "\n".join(f"64 bytes from ::1: icmp_seq={n} ttl=64 time=0.04 ms" for n in range(500)),
    "test results": "tests/test_all.py " + "." * 950 + " [100%]\n",
    "minified JavaScript": "".join(f"function f{n}(){{return{{}}}}" for n in range(500)),
    "an SVG grid": "".join(f'<rect x="{n % 10}" y="{n // 10}" width="1" height="1"/>' for n in range(400)),
    "an SVG path": "M0 0" + "l1 0l0 1" * 110 + "z",
}


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 10, 16, 64, 5_000])
@pytest.mark.parametrize("name", LEGITIMATE)
def test_lists_tables_and_drawings_are_no_circles(name: str, length: int) -> None:
    assert alarm(cut_evenly(PROSE + "\n\n" + LEGITIMATE[name] + "\n\n" + PROSE, length)) is None


def test_a_counter_in_each_round_is_no_circle() -> None:
    assert alarm(["".join(f"Attempt {n}: that does not work either. " for n in range(3_000))]) is None


def test_the_library_of_the_running_python_has_no_circles() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [path for folder in ("", "asyncio", "email", "encodings") for path in (library / folder).glob("*.py")]

    alarms = {path.name: alarm([path.read_text("utf-8", "replace")]) for path in sources}

    assert len(alarms) > 100
    assert {name: found for name, found in alarms.items() if found} == {}


def test_prose_of_random_words_has_no_circles() -> None:
    words = re.findall(r"\w+", PROSE)

    for seed in range(20):
        assert alarm([" ".join(random.Random(seed).choices(words[:3], k=5_000))]) is None
