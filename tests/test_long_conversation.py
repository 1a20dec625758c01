"""One long conversation over both dialects: branches, stops, failures, tools, images; what went upstream, each time.

    python -m tests.test_long_conversation          prints it: the turn, whom it went to, the messages as they were sent

The conversation is led once with a model of OpenAI's dialect at home and once with one of Anthropic's; the other one is
asked in between. What has to go upstream stands in EXPECTED without a dialect; the two functions that put it into one
are written after the documentation of the dialects, and share nothing with llmchat. `tests/rules.py` reads it as well.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Server, wait_until
from tests.provider import (
    Answer,
    Cut,
    Hang,
    Provider,
    Send,
    Steps,
    anthropic_error,
    anthropic_text,
    anthropic_thinking,
    anthropic_tool_use,
    openai_error,
    openai_reasoning,
    openai_text,
    openai_tool_calls,
)
from tests.rules import broken_anthropic, broken_openai

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
MODELS = {"openai": "openai/gpt", "anthropic": "anthropic/claude"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": SCHEMA}}]
CONTINUE = "Your last answer was cut off. Continue it exactly where it stopped"

# ── what is expected, without a dialect ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Image:
    data: str = PNG


@dataclass(frozen=True)
class Thought:
    """Reasoning; with Anthropic's model at home it is signed."""

    text: str


@dataclass(frozen=True)
class Call:
    id: str
    arguments: str
    name: str = "weather"


@dataclass(frozen=True)
class Result:
    id: str
    text: str


Part = str | Image | Thought | Call | Result
Turn = tuple[str, *tuple[Part, ...]]  # a role and what it says
QUESTION: Turn = ("user", "Rome or Oslo?")
CALLS: Turn = ("assistant", Thought("Look first."), "One moment.", Call("c1", '{"city": "Rome"}'), Call("c2", "{}"))
RESULTS: Turn = ("tool", Result("c1", "22 °C"), Result("c2", ""))
ROME: Turn = ("assistant", "Rome.")
STOPPED: Turn = ("assistant", "The Forum")
PICTURE: Turn = ("user", "Museums?\n\nSay again?\n\nWhat is this? ", Image(), "It is near.")
TEMPLE: Turn = ("assistant", "A temple of Vesta")
TO_STOPPED: tuple[Turn, ...] = (QUESTION, CALLS, RESULTS, ROME, ("user", "And sights?"), STOPPED)
TO_TEMPLE: tuple[Turn, ...] = (*TO_STOPPED, PICTURE, TEMPLE)
STRANGE_CALL = Call("functions.weather:0", '{"city":')
STRANGE: Turn = ("assistant", "I look.", STRANGE_CALL)

EXPECTED: dict[str, tuple[Turn, ...]] = {
    "a question with tools": (QUESTION,),
    "both results": (QUESTION, CALLS, RESULTS),
    "a question whose answer is stopped": TO_STOPPED[:5],
    "a question that fails": (*TO_STOPPED, ("user", "Museums?")),
    "a question whose answer is empty": (*TO_STOPPED, ("user", "Museums?\n\nSay again?")),
    "a picture, between words": (*TO_STOPPED, PICTURE),
    "once more, by the other model": (*TO_STOPPED, PICTURE),
    "the cut-off answer continued": (*TO_STOPPED, PICTURE, TEMPLE),
    "another system prompt, and a strange call": (*TO_TEMPLE, ("user", "And now?")),
    "words in place of the result": (*TO_TEMPLE, ("user", "And now?"), ("assistant", "I look."), ("user", "Skip it.")),
    "the result after all, to the other model": (
        *TO_TEMPLE, ("user", "And now?"), STRANGE, ("tool", Result(STRANGE_CALL.id, "Sunny."))),
    "a branch from the second answer": (QUESTION, CALLS, RESULTS, ROME, ("user", "Why?")),
    "a new first message": (("user", "Anew."),),
}  # fmt: skip
SIGNATURE = "c2lnbmF0dXJl"


def as_openai(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    """The turns in OpenAI's dialect: reasoning stays here, a result is a message of its own, an image a data URL."""
    messages: list[dict[str, Any]] = []
    for role, *parts in turns:
        said = [part for part in parts if isinstance(part, str | Image)]
        if role == "tool":
            results = [part for part in parts if isinstance(part, Result)]
            messages += [{"role": "tool", "content": one.text, "tool_call_id": one.id} for one in results]
            continue
        content: Any = "".join(one for one in said if isinstance(one, str))
        if any(isinstance(one, Image) for one in said):
            content = [
                {"type": "text", "text": one}
                if isinstance(one, str)
                else {"type": "image_url", "image_url": {"url": "data:image/png;base64," + one.data}}
                for one in said
            ]
        message = {"role": role, "content": content}
        if calls := [part for part in parts if isinstance(part, Call)]:
            functions = [{"name": one.name, "arguments": one.arguments} for one in calls]
            pairs = zip(calls, functions, strict=True)
            message["tool_calls"] = [{"id": one.id, "type": "function", "function": what} for one, what in pairs]
        messages.append(message)
    return messages


def as_anthropic(turns: tuple[Turn, ...], is_signed: bool) -> list[dict[str, Any]]:
    """The turns in Anthropic's dialect: blocks in order, results first in the user's message."""
    messages: list[dict[str, Any]] = []
    for role, *parts in turns:
        blocks: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                blocks.append({"type": "text", "text": part})
            elif isinstance(part, Image):
                source = {"type": "base64", "media_type": "image/png", "data": part.data}
                blocks.append({"type": "image", "source": source})
            elif isinstance(part, Thought) and is_signed:
                blocks.append({"type": "thinking", "thinking": part.text, "signature": SIGNATURE})
            elif isinstance(part, Call):
                given = json.loads(part.arguments)
                blocks.append({"type": "tool_use", "id": part.id, "name": part.name, "input": given})
            elif isinstance(part, Result):
                blocks.append({"type": "tool_result", "tool_use_id": part.id, "content": part.text})
        messages.append({"role": "assistant" if role == "assistant" else "user", "content": blocks})
    return messages


# ── the conversation ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sent:
    """A request that went upstream."""

    turn: str
    dialect: str
    body: dict[str, Any]


def text(dialect: str, *deltas: str, finish: str = "stop") -> Steps:
    """An answer of text in a dialect; `finish` in OpenAI's words."""
    if dialect == "openai":
        return openai_text(*deltas, finish=finish)
    return anthropic_text(*deltas, finish={"stop": "end_turn", "length": "max_tokens"}[finish])


def calls(dialect: str, said: str, *wanted: Call, thought: str = "") -> Steps:
    """An answer that thinks, says something and calls tools."""
    if dialect == "openai":
        spoken = openai_text(said, finish=None, usage=None, done=False)
        thinking = openai_reasoning(thought) if thought else []
        return [*thinking, *spoken, *openai_tool_calls(*((one.id, one.name, one.arguments) for one in wanted))]
    steps = anthropic_thinking(thought) if thought else []
    first = 1 if thought else 0
    steps += anthropic_text(said, index=first, finish=None)
    for number, one in enumerate(wanted, first + 1):
        finish = "tool_use" if one == wanted[-1] else None
        steps += anthropic_tool_use(one.id, one.name, one.arguments, index=number, finish=finish)
    return steps


def unended(steps: Steps, *then: Any) -> Steps:
    """The steps without the end of the answer, and what happens in its place."""
    ends = (b"message_delta", b"message_stop", b"[DONE]", b'"finish_reason":"stop"', b'"choices":[]')
    return [step for step in steps if not (isinstance(step, Send) and any(end in step.data for end in ends))] + [*then]


class Talk:
    """Leads the conversation; `home` is the dialect of the model that answers unless something else is said."""

    def __init__(self, server: Server, provider: Provider, home: str) -> None:
        self.server, self.provider, self.home = server, provider, home
        self.other = "openai" if home == "anthropic" else "anthropic"
        self.conversation_id: int | None = None
        self.sent: list[Sent] = []

    def ask(self, turn: str, message: Any, answer: Any, dialect: str = "", **more: Any) -> dict[str, Any]:
        """A question and its ended answer, whatever became of it."""
        where = {"conversation_id": self.conversation_id} if self.conversation_id else {}
        body = {"message": message, "model": MODELS[dialect or self.home], **where, **more}
        return self._post(turn, "/api/v1/chat", body, answer, dialect)

    def again(self, turn: str, path: str, answer: Any, dialect: str) -> dict[str, Any]:
        return self._post(turn, path, {"model": MODELS[dialect]}, answer, dialect)

    def _post(self, turn: str, path: str, body: Any, answer: Any, dialect: str, ends: bool = True) -> dict[str, Any]:
        self.provider.script(answer)
        response = self.server.post(path, {**body, "background": True})
        assert response.status_code == 202, response.text
        message_id = response.json()["message_id"]
        request = self.provider.wait_chats(len(self.sent) + 1)[-1]
        self.sent.append(Sent(turn, dialect or self.home, request.json))
        assert request.is_anthropic == (self.sent[-1].dialect == "anthropic")
        if any(isinstance(step, Hang) for step in ([] if isinstance(answer, Answer) else answer)):
            wait_until(lambda: self.server.message(message_id)["text"], "the first words")
            assert self.server.post(f"/api/v1/messages/{message_id}/stop").status_code == 200
        message = self.server.wait_ended(message_id)
        self.conversation_id = message["conversation_id"]
        return message


def lead(talk: Talk) -> None:
    """The conversation. Every answer's status is looked at, so that the history is what it is said to be."""
    home, other = talk.home, talk.other
    refused = openai_error(400, "no") if home == "openai" else anthropic_error(400, "no")
    tools = {"tools": TOOLS, "reasoning_effort": "low", "max_tokens": 500}
    results = [{"type": "tool_result", "tool_call_id": one.id, "text": one.text} for one in RESULTS[1:]]  # type: ignore[union-attr]

    wanted = [part for part in CALLS[1:] if isinstance(part, Call)]
    first = talk.ask("a question with tools", "Rome or Oslo?", calls(home, "One moment.", *wanted, thought="Look first."),
                     system="Be brief.", **tools)  # fmt: skip
    assert first["finish_reason"] == "tool_calls"
    rome = talk.ask("both results", results, text(home, "Rome."), **tools)
    stopped = talk.ask("a question whose answer is stopped", "And sights?", unended(text(home, "The Forum"), Hang()))
    failed = talk.ask("a question that fails", "Museums?", refused)
    empty = talk.ask("a question whose answer is empty", "Say again?", text(home))
    assert [one["status"] for one in (rome, stopped, failed, empty)] == ["completed", "stopped", "failed", "completed"]
    assert (stopped["text"], failed["text"], empty["text"]) == ("The Forum", "", "")
    picture = [{"type": "text", "text": "What is this? "}, {"type": "image", "data": PNG},
               {"type": "text", "text": "It is near."}]  # fmt: skip
    seen = talk.ask("a picture, between words", picture, unended(text(home, "Ruins"), Cut()))
    assert seen["status"] == "failed" and seen["text"] == "Ruins"
    answer = talk.again("once more, by the other model", f"/api/v1/messages/{seen['id']}/regenerate",
                        text(other, "A temple", finish="length"), other)  # fmt: skip
    assert answer["finish_reason"] == "length" and answer["parent_id"] == seen["parent_id"]
    answer = talk.again(
        "the cut-off answer continued", f"/api/v1/messages/{answer['id']}/continue", text(home, " of Vesta"), home
    )
    assert answer["text"] == "A temple of Vesta"
    path = f"/api/v1/conversations/{talk.conversation_id}"
    assert talk.server.client.patch(path, json={"system": "In Latin."}).json()["system"] == "In Latin."
    strange = talk.ask(
        "another system prompt, and a strange call", "And now?", calls(home, "I look.", STRANGE_CALL), tools=TOOLS
    )
    talk.ask("words in place of the result", "Skip it.", text(home, "As you like."))
    result = [{"type": "tool_result", "tool_call_id": STRANGE_CALL.id, "text": "Sunny."}]
    talk.ask("the result after all, to the other model", result, text(other, "Sun."), other, parent_id=strange["id"])
    talk.ask("a branch from the second answer", "Why?", text(home, "So."), parent_id=rome["id"], reasoning_effort="low")
    talk.ask("a new first message", "Anew.", text(home, "Hello."), parent_id=None)


def led(home: str, folder: Path) -> list[Sent]:
    """The requests of the whole conversation."""
    with Provider() as provider:
        server = Server(
            folder, OPENAI_BASE_URL=provider.base_url, OPENAI_API_KEY="k", OPENAI_MODELS="gpt",
            ANTHROPIC_BASE_URL=provider.origin, ANTHROPIC_API_KEY="k", ANTHROPIC_MODELS="claude", LLMCHAT_ATTEMPTS="1",
        )  # fmt: skip
        try:
            talk = Talk(server, provider, home)
            lead(talk)
            return talk.sent
        finally:
            server.close()


# ── the tests ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=["openai", "anthropic"])
def talk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[Sent]]]:
    yield request.param, led(request.param, Path(tmp_path_factory.mktemp("talk")))


def test_what_went_upstream_is_the_path_in_the_dialects_shape(talk: tuple[str, list[Sent]]) -> None:
    home, sent = talk
    assert [one.turn for one in sent] == list(EXPECTED)
    for one in sent:
        expected = EXPECTED[one.turn]
        messages = one.body["messages"]
        if one.turn == "the cut-off answer continued" and home == "openai":  # OpenAI takes no prefill: it is asked
            assert messages[-1]["role"] == "user" and messages[-1]["content"].startswith(CONTINUE)
            messages = messages[:-1]
        if one.turn == "the cut-off answer continued":
            expected = (*expected[:-1], ("assistant", "A temple"))
        if one.turn == "the result after all, to the other model":
            expected = with_safe_call(expected, one)
        if one.dialect == "openai":
            system = {"role": "system", "content": system_at(one.turn)}
            assert messages == [system, *as_openai(expected)], one.turn
        else:
            assert messages == as_anthropic(expected, is_signed=home == "anthropic"), one.turn
            assert one.body["system"] == system_at(one.turn)


def system_at(turn: str) -> str:
    turns = list(EXPECTED)
    return "In Latin." if turns.index(turn) >= turns.index("another system prompt, and a strange call") else "Be brief."


def with_safe_call(turns: tuple[Turn, ...], one: Sent) -> tuple[Turn, ...]:
    """The turns with the strange call as it has to be: with an id that everyone takes, and arguments that are JSON."""
    message = next(message for message in reversed(one.body["messages"]) if message["role"] == "assistant")
    blocks = message["tool_calls"] if one.dialect == "openai" else message["content"]
    identity = blocks[-1]["id"]
    assert identity != STRANGE_CALL.id and len(identity) <= 40
    arguments = json.dumps({"arguments": STRANGE_CALL.arguments}, separators=(",", ":"))
    call = replace(STRANGE_CALL, id=identity, arguments=arguments)
    return (*turns[:-2], ("assistant", "I look.", call), ("tool", Result(identity, "Sunny.")))


def test_no_request_breaks_a_rule(talk: tuple[str, list[Sent]]) -> None:
    for one in talk[1]:
        check = broken_openai if one.dialect == "openai" else broken_anthropic
        assert check(one.body, may_end_with_answer=one.turn == "the cut-off answer continued") == [], one.turn


def test_parameters_go_where_the_dialect_has_them(talk: tuple[str, list[Sent]]) -> None:
    home, sent = talk
    by_turn = {one.turn: one.body for one in sent}
    for turn in ("a question with tools", "both results"):
        body = by_turn[turn]
        if home == "openai":
            assert body["tools"] == TOOLS and body["max_completion_tokens"] == 500 and body["reasoning_effort"] == "low"
        else:
            assert body["tools"] == [{"name": "weather", "description": "The weather", "input_schema": SCHEMA}]
            assert body["thinking"]["type"] == "enabled"
            assert body["max_tokens"] == 500 + body["thinking"]["budget_tokens"]
    for one in sent:
        assert one.body["stream"] is True and one.body["model"] == MODELS[one.dialect].partition("/")[2]
        if one.dialect == "anthropic":
            assert one.body["max_tokens"] >= 500, "Anthropic demands a number"


def test_thinking_is_on_only_where_the_newest_turn_began_with_it(talk: tuple[str, list[Sent]]) -> None:
    if talk[0] == "anthropic":
        thinking = [one.turn for one in talk[1] if "thinking" in one.body]
        assert thinking == ["a question with tools", "both results", "a branch from the second answer"]


# ── to look at ──────────────────────────────────────────────────────────────────────────────────────────────────────


def shown(message: dict[str, Any]) -> str:
    """A message in a few words."""
    content = message["content"]
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    words = [shown_block(block) for block in blocks]
    words += [f"call {one['function']['name']}({one['function']['arguments']}) as {one['id']}"
              for one in message.get("tool_calls", ())]  # fmt: skip
    role = f"tool {message['tool_call_id']}" if message["role"] == "tool" else message["role"]
    return f"{role}: " + (" + ".join(words) or "(empty)")


def shown_block(block: dict[str, Any]) -> str:
    match block["type"]:
        case "text":
            return json.dumps(block["text"][:60], ensure_ascii=False)
        case "thinking":
            return f"thinking {block['thinking']!r} signed {block['signature']}"
        case "tool_use":
            return f"call {block['name']}({json.dumps(block['input'])}) as {block['id']}"
        case "tool_result":
            return f"result {block['content']!r} of {block['tool_use_id']}"
    return block["type"]


def main() -> None:
    for home in MODELS:
        print(f"\n══ {home} at home ══")
        with tempfile.TemporaryDirectory() as folder:
            sent = led(home, Path(folder))
        for number, one in enumerate(sent, 1):
            check = broken_openai if one.dialect == "openai" else broken_anthropic
            broken = check(one.body, may_end_with_answer=one.turn == "the cut-off answer continued")
            others = {name: value for name, value in one.body.items() if name not in ("messages", "model", "stream")}
            others |= (
                {"tools": [one.get("function", one)["name"] for one in others["tools"]]} if "tools" in others else {}
            )
            print(f"\n{number}. {one.turn} → {MODELS[one.dialect]}   {json.dumps(others)}")
            print("\n".join(f"   {shown(message)}" for message in one.body["messages"]))
            print(f"   rules broken: {'; '.join(broken) or 'none'}")


if __name__ == "__main__":
    main()
