"""The chaos and the soak run: a short one of each, as the commands run them."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.conftest import ROOT


def figures(*command: str) -> dict[str, str]:
    """What the command's table says; it must have ended well."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", done.stdout, re.MULTILINE))


def test_nothing_that_was_seen_is_lost_or_doubled_in_chaos() -> None:
    found = figures("-m", "tests.chaos", "--minutes", "0.2", "--seed", "7", "--clients", "8")
    assert (found["seed"], found["violations"]) == ("7", "0")
    for name in ("kills -9", "cuts", "generations", "resumed", "deltas seen"):
        assert int(found[name].replace(",", "")) > 0, name


def test_nothing_stays_open_and_memory_stays_flat_in_a_soak() -> None:
    found = figures("-m", "tests.soak", "--minutes", "0", "--characters", "1000000")
    assert (found["cycles"], found["aborted clients"], found["violations"]) == ("2", "400", "0")
