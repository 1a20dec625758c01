"""Is the repetition guard shy, and what does it cost?

    python bench/repetition.py [DIRECTORY ...]

Feeds every text file below the directories (without any: the running Python's library and packages, /usr/share and
/var/log) to a guard with the default settings and prints each alarm; then prints the cost of a character.
"""

import gzip
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from llmchat import RepetitionGuard

COUNT = 20
CHARACTERS = 1_000
NEVER = 1_000_000_000  # as both settings: a guard that looks at everything and never stops
DELTA_CHARACTERS = (1, 5, 16, 5_000)
SAMPLE_CHARACTERS = 20_000_000  # of the corpus, fed again in small even deltas
COST_CHARACTERS = 300_000


def texts(directories: list[Path]) -> Iterator[tuple[Path, str]]:
    for directory in directories:
        for path in sorted(directory.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            try:
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                text = data.decode()
            except (OSError, EOFError, ValueError):
                continue  # unreadable, or not UTF-8
            if "\0" not in text[:8_000]:
                yield path, text


def alarm(text: str, delta_characters: int) -> tuple[int, str] | None:
    guard = RepetitionGuard(COUNT, CHARACTERS)
    for start in range(0, len(text), delta_characters):
        if period := guard.feed([text[start : start + delta_characters]]):
            return start, period
    return None


def print_alarms(directories: list[Path]) -> None:
    files = characters = octets = alarms = sampled = 0
    for path, text in texts(directories):
        files += 1
        characters += len(text)
        octets += len(text.encode())
        delta_sizes = [5_000]
        if sampled < SAMPLE_CHARACTERS and path.suffix != ".gz":
            sampled += len(text)
            delta_sizes += [1, 3, 4, 5, 10, 16]
        for delta_characters in delta_sizes:
            if found := alarm(text, delta_characters):
                alarms += 1
                start, period = found
                print(f"ALARM {path} at {start}, deltas of {delta_characters}, period {len(period)}: {period[:70]!r}")
    print(f"{alarms} alarms in {files} files, {octets / 1e6:.1f} MB, {characters / 1e6:.1f} million characters")
    print(f"of which {sampled / 1e6:.1f} million again in deltas of 1, 3, 4, 5, 10 and 16 characters")


def inputs() -> dict[str, str]:
    rng = random.Random(1)
    page = "".join(rng.choices("etaoin shrdlu\n", k=999)) + "\n"
    fibonacci, following = "a", "ab"
    while len(following) < COST_CHARACTERS:
        fibonacci, following = following, following + fibonacci
    return {
        "random letters": "".join(rng.choices("etaoin shrdlu,\n", k=COST_CHARACTERS)),
        "random bits": "".join(rng.choices("01", k=COST_CHARACTERS)),
        "all equal": "a" * COST_CHARACTERS,
        "equal, a mark each 501": ("a" * 500 + "b") * (COST_CHARACTERS // 501),
        "equal, a mark each 1,001": ("a" * 1_000 + "b") * (COST_CHARACTERS // 1_001),
        "equal, a mark each 1,701": ("a" * 1_700 + "b") * (COST_CHARACTERS // 1_701),
        "nearly periodic": ("ab" * 450 + "x") * (COST_CHARACTERS // 901),
        "a Fibonacci word": following,
        "a circle of 1,000 with line breaks": page * (COST_CHARACTERS // 1_000),
        "two-byte characters": ("的" * 500 + "b") * (COST_CHARACTERS // 501),
        "four-byte characters": ("🙂" * 500 + "b") * (COST_CHARACTERS // 501),
    }


def cost_microseconds(text: str, delta_characters: int, guard_characters: int) -> float:
    """The cost of a character, with a new guard after each `guard_characters`; the best of three."""
    deltas = [text[start : start + delta_characters] for start in range(0, len(text), delta_characters)]
    renewal = max(1, guard_characters // delta_characters)
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        for first in range(0, len(deltas), renewal):
            feed = RepetitionGuard(NEVER, NEVER).feed
            for delta in deltas[first : first + renewal]:
                feed(delta)
        best = min(best, time.process_time() - started)
    return best / len(text) * 1e6


def print_costs() -> None:
    print(f"\n{'µs a character, in deltas of':42}" + "".join(f"{size:>8,}" for size in DELTA_CHARACTERS))
    for name, text in inputs().items():
        costs = [cost_microseconds(text, size, COST_CHARACTERS) for size in DELTA_CHARACTERS]
        print(f"{name:42}" + "".join(f"{cost:8.3f}" for cost in costs))
    costs = [cost_microseconds(inputs()["equal, a mark each 501"], size, 3_000) for size in DELTA_CHARACTERS]
    print(f"{'… and a new guard each 3,000 characters':42}" + "".join(f"{cost:8.3f}" for cost in costs))


def main() -> None:
    paths = sysconfig.get_paths()
    defaults = [paths["stdlib"], paths["purelib"], "/usr/share", "/var/log"]
    print_alarms([Path(name) for name in sys.argv[1:] or defaults])
    print_costs()


if __name__ == "__main__":
    main()
