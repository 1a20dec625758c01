"""The README says what the program does: its tables are held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import llmchat
from tests.clients import CLIENTS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", README, re.MULTILINE))
    shown = {
        one.name.upper(): f"{one.default:g}" if isinstance(one.default, float) else str(one.default)
        for one in llmchat.SETTINGS
    }
    assert rows == {name: f"`{default}`" if default else "–" for name, default in shown.items()}


def test_every_call_is_in_the_table() -> None:
    rows = re.findall(r"^\| `([A-Z]+ /\S*)` \| (.*?) \|$", README, re.MULTILINE)
    endpoints = (*llmchat.ENDPOINTS, *llmchat.OPENAI_ENDPOINTS)
    assert rows == [(f"{one.method} {one.shown_path}", one.summary) for one in endpoints]


def test_the_two_lines_of_every_client_are_there() -> None:
    assert [
        (name, line) for name, client in CLIENTS.items() for line in client.lines if f"\n{line}\n" not in README
    ] == []


def test_the_count_of_providers_is_right() -> None:
    count = re.search(r"\*\*(\d+) providers", README)
    assert count is not None and int(count[1]) == len(llmchat.PROVIDER_FACTS)


def test_every_test_file_and_command_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:tests|bench)/\w+\.(?:py|md)", README)) | {
        name.replace(".", "/") + ".py" for name in re.findall(r"python -m ((?:tests|bench)\.\w+)", README)
    }
    assert len(named) > 8 and [name for name in named if not (ROOT / name).is_file()] == []


def test_the_first_screen_has_a_command_that_runs_it_and_one_that_tests_it_each_from_nothing_but_python() -> None:
    commands = [line.strip() for line in README.split("\n")[:20] if line.startswith("    ")]
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    assert [command.startswith(install) for command in commands] == [True, True]
    assert commands[0].endswith("&& .venv/bin/python llmchat.py")
    assert "-r tests/requirements.txt && .venv/bin/python -m pytest" in commands[1]


def test_the_metadata_in_the_file_names_the_requirements() -> None:
    source = (ROOT / "llmchat.py").read_text(encoding="utf-8")
    metadata = [line.replace("'", '"') for line in re.findall(r'^#   "(.*)",$', source, re.MULTILINE)]
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    assert metadata == [line for line in lines if line and not line.startswith("#")]
