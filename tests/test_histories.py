"""Whatever a conversation holds: what goes upstream breaks no rule of the dialect that it goes out in.

Random trees come in by an import, as ours can bring anything: content of every kind in every role, calls with strange
names, results of no call, blank texts, every status. Then each message is asked about, answered again and continued,
over each provider, and `tests/rules.py` reads what would go out.

LLMCHAT_TEST_EXAMPLES=1000 python -m pytest tests/test_histories.py runs more than the few dozen of every day.
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

import llmchat
from llmchat import DIALECTS, PROVIDER_FACTS, Delta, Parameters, Provider, Question, Started, Target, Turn
from tests.rules import broken_anthropic, broken_mistral, broken_openai
from tests.test_import import open_database

EXAMPLES = int(os.environ.get("LLMCHAT_TEST_EXAMPLES", "40"))
PNG = "iVBORw0KGgo="
TEXTS = ["Hello", "a", " ", "\n\n", "ends in a space ", "日本 \u2028"]
CALL_IDS = ["call_1", "call_2", "functions.look:0", "x" * 60, "", "D681PevKs"]
NAMES = ["look", "web.run", "", "n" * 80]
ARGUMENTS = ["{}", "", '{"at": 1}', "[1]", '{"at":', '{"at": NaN}', '{"at": "\\ud800"}', "[" * 3_000]


@dataclass(frozen=True)
class Way:
    """Whom a question goes to. `prefills`: an answer may stand at the end."""

    provider: Provider
    prefills: bool
    quirks: frozenset[str] = frozenset()


def way(name: str, dialect: str, prefills: bool, *learnt: str) -> Way:
    known = PROVIDER_FACTS[name].quirks if name in PROVIDER_FACTS else frozenset()
    return Way(Provider(name, dialect, "https://host.test/v1", quirks=known), prefills, known | set(learnt))


WAYS = [
    way("openai", "openai", False),
    way("deepseek", "openai", False),
    way("mistral", "openai", True),
    way("moonshot", "openai", True),
    way("llamacpp", "openai", True),
    way("anthropic", "anthropic", True),
    way("anthropic", "anthropic", False, "no_prefill"),
    way("other", "anthropic", True),
]

content = some.one_of(
    some.builds(dict, kind=some.sampled_from(["text", "text", "text", "reasoning"]), text=some.sampled_from(TEXTS)),
    some.fixed_dictionaries(
        {
            "kind": some.just("tool_call"),
            "text": some.builds(
                lambda identity, name, arguments: json.dumps({"id": identity, "name": name, "arguments": arguments}),
                some.sampled_from(CALL_IDS), some.sampled_from(NAMES), some.sampled_from(ARGUMENTS),
            ),
        }
    ),
    some.builds(
        lambda provider, name: {"kind": "signature", "text": json.dumps({"provider": provider, name: "c2ln"})},
        some.sampled_from(["anthropic", "other"]), some.sampled_from(["signature", "redacted"]),
    ),
    some.just({"kind": "image", "text": json.dumps({"media_type": "image/png", "data": PNG})}),
)  # fmt: skip


@some.composite
def messages(draw: some.DrawFn) -> list[dict[str, Any]]:
    """A tree as an archive has it: mostly chains in the usual order of roles, so that calls meet their results."""
    found: list[dict[str, Any]] = []
    role = "user"
    for number in range(draw(some.integers(1, 9))):
        after = {
            "user": ["assistant"],
            "assistant": ["user", "tool"],
            "tool": ["tool", "assistant"],
            "system": ["user"],
        }
        parent = f"m{number - 1}" if number and draw(some.integers(0, 7)) else None
        if number and parent is None:
            parent = draw(some.sampled_from([None, *(one["origin"] for one in found)]))
        if number:
            usual = after[role] * 4
            role = draw(some.sampled_from([*usual, "user", "assistant", "tool", "system"]))
        message = {"origin": f"m{number}", "parent": parent, "role": role, "created_at_ms": number}
        message["content"] = draw(some.lists(content, max_size=4))
        if role == "assistant":
            broken = ["stopped", "failed", "interrupted", "running"]
            message |= {"status": draw(some.sampled_from(["completed", *broken])), "provider": "anthropic"}
        if role == "tool":
            message["params"] = {"tool_call_id": draw(some.sampled_from(CALL_IDS))}
        found.append(message)
    return found


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
parameters = some.builds(
    lambda effort, choice, **more: Parameters(
        reasoning_effort=effort, **({"tools": [TOOL], "tool_choice": choice} if choice else {}), **more
    ),
    some.sampled_from([None, "low", "none"]),
    some.sampled_from([None, "auto", "none", "required"]),
    temperature=some.sampled_from([None, 0.0, 2.0]),
    top_p=some.sampled_from([None, 0.5]),
    max_tokens=some.sampled_from([None, 1, 5_000]),
)
results = some.lists(some.builds(lambda one: Turn("tool", (Delta("text", "r"),), one), some.sampled_from(CALL_IDS)))
question = some.sampled_from(
    [(), (Delta("text", "Well?"),), (Delta("image", json.dumps({"media_type": "image/png", "data": PNG})),)]
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    yield from open_database(Path(tmp_path_factory.mktemp("histories")) / "llmchat.db")


def import_tree(connection: sqlite3.Connection, tree: list[dict[str, Any]], system: str) -> dict[str, int]:
    """The ids of the messages, by their origins."""
    head = {"origin": "tree", "title": "t", "system": system, "created_at_ms": 0, "updated_at_ms": 0, "messages": tree}
    archive = {"format": "llmchat", "version": 1, "conversations": [head]}
    answer = llmchat.ImportAnswer(llmchat.ImportCount(), llmchat.ImportCount(), [])
    records = list(llmchat.read_archive(io.BytesIO(json.dumps(archive).encode()), answer))
    assert not answer.left_out
    llmchat.import_records(connection, "local", answer, records)
    return {origin: number for number, origin in connection.execute("SELECT id, origin FROM message")}


def asked(turns: tuple[Turn, ...]) -> bool:
    """Whether there is a question in it: with nothing but calls and blanks, no request can be made of it."""
    said = (one for turn in turns if turn.role == "user" for one in turn.content)
    return any(one.kind == "image" or (one.kind == "text" and one.text.strip()) for one in said)


def broken(started: Started, one: Way, ends_with_answer: bool) -> list[str]:
    """The rules that a request breaks which begins a generation."""
    question = Question("m", started.system, started.turns, started.parameters, continues=bool(started.content))
    body = DIALECTS[one.provider.dialect].body(one.provider, one.quirks, question)
    sent = json.loads(llmchat.encode_json(body))
    rules = {"anthropic": broken_anthropic, "openai": broken_openai}[one.provider.dialect]
    return (broken_mistral if one.provider.name == "mistral" else rules)(sent, ends_with_answer)


SIGNED = [
    {"kind": "reasoning", "text": "Hm"},
    {"kind": "signature", "text": json.dumps({"provider": "anthropic", "signature": "c2ln"})},
]
CALLED = {"kind": "tool_call", "text": json.dumps({"id": "call_1", "name": "look", "arguments": "{}"})}


def chain(*turns: tuple[str, list[dict[str, str]]]) -> list[dict[str, Any]]:
    return [
        {"origin": f"m{n}", "parent": f"m{n - 1}" if n else None, "role": role, "content": said, "created_at_ms": n,
         **({"params": {"tool_call_id": "call_1"}} if role == "tool" else {}),
         **({"status": "stopped", "provider": "anthropic"} if role == "assistant" else {})}
        for n, (role, said) in enumerate(turns)
    ]  # fmt: skip


ASKED = {"kind": "text", "text": "Hello"}
HISTORIES = {
    name: chain(("user", [ASKED]), *more)
    for name, more in {
        "thinking before the calls": [("assistant", [*SIGNED, CALLED]), ("tool", [ASKED]), ("assistant", [ASKED])],
        "no thinking before the calls": [("assistant", [CALLED]), ("tool", [ASKED]), ("assistant", [ASKED])],
        "the same id twice": [("assistant", [CALLED]), ("tool", [ASKED])] * 2 + [("assistant", [ASKED])],
        "stopped in the second thought": [("assistant", [*SIGNED, ASKED, *SIGNED])],
        "thought after words": [("assistant", [ASKED, *SIGNED, ASKED])],
        "stopped behind a space": [("assistant", [{"kind": "text", "text": "Hello, "}])],
    }.items()
}


@example(HISTORIES["thinking before the calls"], "", Parameters(), [], ())
@example(HISTORIES["no thinking before the calls"], "", Parameters(reasoning_effort="low"), [], ())
@example(HISTORIES["the same id twice"], "", Parameters(), [], ())
@example(HISTORIES["stopped in the second thought"], "", Parameters(), [], (Delta("text", "Well?"),))
@example(HISTORIES["thought after words"], "", Parameters(), [], (Delta("text", "Well?"),))
@example(HISTORIES["stopped behind a space"], "", Parameters(), [], ())
@given(messages(), some.sampled_from(["", " ", "Be brief."]), parameters, results, question)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_a_rule_whatever_the_conversation_holds(
    database: sqlite3.Connection,
    tree: list[dict[str, Any]],
    system: str,
    wanted: Parameters,
    results: list[Turn],
    question: tuple[Delta, ...],
) -> None:
    turns = (*results, Turn("user", question)) if question else tuple(results)
    database.execute("BEGIN")
    try:
        ids = import_tree(database, tree, system)
        for message in tree:
            check_message(database, ids[message["origin"]], message["role"], turns, wanted)
    finally:
        database.execute("ROLLBACK")


def check_message(
    database: sqlite3.Connection, message_id: int, role: str, turns: tuple[Turn, ...], wanted: Parameters
) -> None:
    """A chat after the message, and a second and a continued answer if it is one."""
    conversation_id = database.execute("SELECT conversation_id FROM message WHERE id = ?", (message_id,)).fetchone()[0]
    status = database.execute("SELECT status FROM message WHERE id = ?", (message_id,)).fetchone()[0]
    for one in WAYS:
        target = Target(one.provider, "m")
        new = llmchat.NewMessage("local", conversation_id, message_id, turns, None, (target,), wanted)
        begun: list[tuple[Started, bool]] = []
        may_end = one.prefills or one.provider.dialect == "openai"  # OpenAI answers an answer, without prefilling
        if turns:
            begun.append((llmchat.start_message(database, new), may_end and turns[-1].role == "tool"))
        if role == "assistant":
            once_more = llmchat.replace(new, turns=(), parent_id=llmchat.UNSET)
            begun.append((llmchat.regenerate_message(database, message_id, once_more), may_end))
        if role == "assistant" and status != "completed":
            database.execute("SAVEPOINT continued")
            begun.append((llmchat.continue_message(database, "local", message_id, target), may_end))
            database.execute("ROLLBACK TO continued")
        for started, may_end_with_answer in begun:
            if asked(started.turns):
                if started.content and llmchat.says_something(started.turns[-1]):  # it is really continued
                    may_end_with_answer = one.prefills
                assert broken(started, one, may_end_with_answer) == []
