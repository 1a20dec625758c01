"""The dialects, pure: what goes into a request, and what comes out of events of every known shape."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from llmchat import (
    ANTHROPIC_MAX_TOKENS,
    DIALECTS,
    FINISH_REASONS,
    PROVIDER_EVENT_BYTES_MAX,
    PROVIDER_FACTS,
    THINKING_TOKENS,
    Delta,
    GenerationError,
    Parameters,
    Provider,
    ProviderProtocol,
    ProviderTruncated,
    Question,
    TooLong,
    Turn,
    Usage,
    finish_reason_of,
    join_deltas,
)

OPENAI = Provider("openai", "openai", "https://openai.test/v1", "sk-key", "OPENAI_API_KEY")
ANTHROPIC = Provider("anthropic", "anthropic", "https://anthropic.test", "sk-key", "ANTHROPIC_API_KEY")
CALL = Delta("tool_call", json.dumps({"id": "call_1", "name": "weather", "arguments": '{"city":"Rome"}'}))
IMAGE = Delta("image", json.dumps({"media_type": "image/png", "data": "aGk="}))


def user(*content: str | Delta) -> Turn:
    return Turn("user", tuple(part if isinstance(part, Delta) else Delta("text", part) for part in content))


def assistant(*content: str | Delta) -> Turn:
    return replace(user(*content), role="assistant")


def result(text: str, identity: str = "call_1") -> Turn:
    return Turn("tool", (Delta("text", text),) if text else (), identity)


def signature(provider: str = "anthropic", **what: str) -> Delta:
    return Delta("signature", json.dumps({"provider": provider, **(what or {"signature": "c2ln"})}))


def reasoning(text: str) -> Delta:
    return Delta("reasoning", text)


def body(
    *turns: Turn, provider: Provider = OPENAI, quirks: str = "", system: str = "", **parameters: Any
) -> dict[str, Any]:
    question = Question("m", system, turns, Parameters(**parameters))
    return DIALECTS[provider.dialect].body(provider, frozenset(quirks.split()) | provider.quirks, question)


def messages(*turns: Turn, provider: Provider = OPENAI, **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = body(*turns, provider=provider, **more)["messages"]
    return found


# ── requests: turns ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_smallest_request_holds_nothing_that_a_strict_server_refuses() -> None:
    assert body(user("Hi")) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert body(user("Hi"), provider=ANTHROPIC) == {
        "model": "m",
        "max_tokens": ANTHROPIC_MAX_TOKENS,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "stream": True,
    }


HISTORIES: list[tuple[str, list[Turn]]] = [
    ("an answer that failed without a character", [user("a"), assistant(), user("b")]),
    ("a blank answer", [user("a"), assistant(" \n"), user("b")]),
    ("an answer stopped while thinking", [user("a"), assistant(reasoning("Hm")), user("b")]),
    ("an answer stopped after signed thinking", [user("a"), assistant(reasoning("Hm"), signature()), user("b")]),
    ("a greeting by the assistant", [assistant("Welcome"), user("a"), user("b")]),
    ("a tool call that nobody answered", [user("a"), assistant(CALL), user("b")]),
    ("a result of no call", [user("a"), result("sunny"), user("b")]),
    ("an empty question", [user("a"), user(""), user("b")]),
]


@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC], ids=lambda one: one.dialect)
@pytest.mark.parametrize(("name", "turns"), HISTORIES, ids=[name for name, _ in HISTORIES])
def test_a_history_with_a_gap_becomes_one_question(provider: Provider, name: str, turns: list[Turn]) -> None:
    (message,) = messages(*turns, provider=provider)
    content = message["content"]
    text = content if isinstance(content, str) else "".join(block["text"] for block in content)
    assert (message["role"], text) == ("user", "a\n\nb")


@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC], ids=lambda one: one.dialect)
def test_two_answers_in_a_row_become_one(provider: Provider) -> None:
    found = messages(user("a"), assistant("b"), assistant("c"), user("d"), provider=provider)
    assert [message["role"] for message in found] == ["user", "assistant", "user"]
    assert "b\\n\\nc" in json.dumps(found[1]["content"])


def test_the_system_prompt_goes_first_in_openais_dialect_and_beside_the_messages_in_anthropics() -> None:
    assert messages(user("a"), system="Be kind")[0] == {"role": "system", "content": "Be kind"}
    asked = body(user("a"), system="Be kind", provider=ANTHROPIC)
    assert asked["system"] == "Be kind" and len(asked["messages"]) == 1


def test_a_system_message_within_the_tree_goes_where_the_dialect_has_a_place_for_it() -> None:
    turns = [user("a"), Turn("system", (Delta("text", "Now be brief"),)), user("b")]
    assert [message["role"] for message in messages(*turns)] == ["user", "system", "user"]
    asked = body(*turns, system="Be kind", provider=ANTHROPIC)
    assert asked["system"] == "Be kind\n\nNow be brief"
    assert [message["role"] for message in asked["messages"]] == ["user"]


# ── requests: images, tools, thinking ───────────────────────────────────────────────────────────────────────────────


def test_an_image_keeps_its_place_between_the_texts() -> None:
    (message,) = messages(user("Look: ", IMAGE, "What is it?"))
    assert message["content"] == [
        {"type": "text", "text": "Look: "},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
        {"type": "text", "text": "What is it?"},
    ]
    (message,) = messages(user(IMAGE), provider=ANTHROPIC)
    source = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    assert message["content"] == [{"type": "image", "source": source}]


def test_content_without_an_image_is_a_string_for_servers_that_take_nothing_else() -> None:
    found = messages(user("a", "b"), assistant("c", IMAGE), user("d"))
    assert [message["content"] for message in found] == ["ab", "c", "d"]


@pytest.mark.parametrize("text", ["sunny", ""])
def test_a_tool_call_and_its_result_go_back(text: str) -> None:
    turns = [user("a"), assistant(CALL), result(text), assistant("It is."), user("b")]
    function = {"name": "weather", "arguments": '{"city":"Rome"}'}
    assert messages(*turns)[1:3] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": text, "tool_call_id": "call_1"},
    ]
    assert messages(*turns, provider=ANTHROPIC)[1:3] == [
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": text}]},
    ]


def test_of_two_calls_only_the_one_with_a_result_goes_back() -> None:
    other = Delta("tool_call", json.dumps({"id": "call_2", "name": "weather", "arguments": ""}))
    turns = [user("a"), assistant("Let me see.", CALL, other), result("sunny", "call_2"), user("b")]
    calls = messages(*turns)[1]["tool_calls"]
    assert [call["id"] for call in calls] == ["call_2"] and calls[0]["function"]["arguments"] == "{}"
    assert messages(*turns)[1]["content"] == "Let me see."
    blocks = messages(*turns, provider=ANTHROPIC)
    assert [block["type"] for block in blocks[1]["content"]] == ["text", "tool_use"]
    assert [block["type"] for block in blocks[2]["content"]] == ["tool_result", "text"]


@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC], ids=lambda one: one.dialect)
def test_results_go_right_behind_their_calls_whatever_was_said_in_between(provider: Provider) -> None:
    said = [user("And hurry"), result("two", "call_2"), Turn("system", (Delta("text", "Be brief"),)), result("one")]
    found = messages(user("a"), assistant(CALL, called("call_2")), *said, user("b"), provider=provider)
    roles = [message["role"] for message in found]
    if provider is OPENAI:
        assert roles == ["user", "assistant", "tool", "tool", "user", "system", "user"]
        assert [(one["tool_call_id"], one["content"]) for one in found[2:4]] == [("call_2", "two"), ("call_1", "one")]
    else:
        assert roles == ["user", "assistant", "user"]
        assert [block["type"] for block in found[2]["content"]] == ["tool_result", "tool_result", "text"]


def test_a_stored_result_behind_another_answer_is_left_out_with_its_call() -> None:
    found = messages(user("a"), assistant(CALL), user("b"), assistant("Well."), result("late"), user("c"))
    assert [(message["role"], message["content"]) for message in found] == [
        ("user", "a\n\nb"),
        ("assistant", "Well."),
        ("user", "c"),
    ]


MISTRAL = Provider("mistral", "openai", "https://mistral.test/v1", "k", quirks=PROVIDER_FACTS["mistral"].quirks)


def called(identity: str) -> Delta:
    return Delta("tool_call", json.dumps({"id": identity, "name": "weather", "arguments": "{}"}))


def ids_upstream(*ids: str, provider: Provider = MISTRAL) -> list[str]:
    """What the ids of an answer's calls are upstream; each result is found under the same."""
    turns = [user("a"), assistant(*map(called, ids)), *(result(one, one) for one in reversed(ids))]
    _, answer, *results = messages(*turns, provider=provider)
    found = [call["id"] for call in answer["tool_calls"]]
    assert {one["tool_call_id"]: one["content"] for one in results} == dict(zip(found, ids, strict=True))
    return found


def test_mistral_gets_ids_of_nine_letters_and_digits_and_its_own_back_as_they_were() -> None:
    given = ["D681PevKs", "call_abc123", "toolu_01A-", "123456789", "12345678", "1234567890", "abc_12345"]
    found = ids_upstream(*given)
    assert [one for one, other in zip(found, given, strict=True) if one == other] == ["D681PevKs", "123456789"]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", one) for one in found) and len(set(found)) == len(found)
    assert ids_upstream(*given) == found, "the same in the next request"
    assert ids_upstream(*given, provider=OPENAI) == given, "nobody else is concerned"


def test_an_id_that_is_made_meets_no_other_of_the_request() -> None:
    (made,) = ids_upstream("call_1")
    first, second = ids_upstream("call_1", made)
    assert first == made != second and re.fullmatch("[a-zA-Z0-9]{9}", second)
    first, second = ids_upstream(made, "call_1")
    assert first == made != second and re.fullmatch("[a-zA-Z0-9]{9}", second)


def test_garbled_arguments_still_make_an_object_for_anthropic() -> None:
    for text, value in [('{"a":', {"arguments": '{"a":'}), ("[1]", {"arguments": [1]}), ("", {})]:
        call = Delta("tool_call", json.dumps({"id": "x", "name": "f", "arguments": text}))
        found = messages(user("a"), assistant(call), result("r", "x"), provider=ANTHROPIC)
        assert found[1]["content"][0]["input"] == value


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = {
    "OpenAI's": {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
    "bare": {"name": "f", "description": "d", "parameters": SCHEMA},
    "Anthropic's": {"name": "f", "description": "d", "input_schema": SCHEMA},
    "Anthropic's custom": {"type": "custom", "name": "f", "description": "d", "input_schema": SCHEMA},
}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_a_tool_of_any_shape_is_understood_by_both(tool: dict[str, Any]) -> None:
    assert body(user("a"), tools=[tool])["tools"] == [TOOLS["OpenAI's"]]
    assert body(user("a"), tools=[tool], provider=ANTHROPIC)["tools"] == [TOOLS["Anthropic's"]]


def test_a_tool_of_the_providers_own_goes_out_as_it_is() -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    assert body(user("a"), tools=[search])["tools"] == [search]
    assert body(user("a"), tools=[search], provider=ANTHROPIC)["tools"] == [search]


def test_a_tool_without_a_schema_gets_an_empty_one_for_anthropic() -> None:
    (tool,) = body(user("a"), tools=[{"name": "now"}], provider=ANTHROPIC)["tools"]
    assert tool == {"name": "now", "input_schema": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}),
        ({"type": "tool", "name": "f"}, {"type": "tool", "name": "f"}),
    ],
)
def test_tool_choice_is_translated_for_anthropic(choice: Any, expected: Any) -> None:
    tools = [TOOLS["bare"]]
    assert body(user("a"), tools=tools, tool_choice=choice)["tool_choice"] == choice
    assert body(user("a"), tools=tools, tool_choice=choice, provider=ANTHROPIC)["tool_choice"] == expected


def test_signed_thinking_goes_back_only_to_the_provider_that_signed_it() -> None:
    answer = assistant(reasoning("Hm"), signature("anthropic"), "Yes")
    mine = messages(user("a"), answer, user("b"), provider=ANTHROPIC)[1]["content"]
    assert mine == [{"type": "thinking", "thinking": "Hm", "signature": "c2ln"}, {"type": "text", "text": "Yes"}]
    another = Provider("minimax", "anthropic", "https://minimax.test/anthropic", "k", "MINIMAX_API_KEY")
    assert messages(user("a"), answer, user("b"), provider=another)[1]["content"] == [{"type": "text", "text": "Yes"}]
    assert messages(user("a"), answer, user("b"))[1] == {"role": "assistant", "content": "Yes"}


def test_redacted_thinking_goes_back_and_thinking_without_text_does_not_get_anothers() -> None:
    answer = assistant(reasoning("Hm"), signature(), signature(redacted="xyz"), signature(signature="two"), "Yes")
    blocks = messages(user("a"), answer, user("b"), provider=ANTHROPIC)[1]["content"]
    assert blocks[:-1] == [
        {"type": "thinking", "thinking": "Hm", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "thinking", "thinking": "", "signature": "two"},
    ]


def test_reasoning_of_another_provider_is_not_taken_for_what_was_signed() -> None:
    turns = [
        user("a"),
        assistant(reasoning("Theirs")),
        assistant("Cut", reasoning("Also theirs")),
        assistant(reasoning("Mine"), signature(), "Yes"),
        user("b"),
    ]
    blocks = messages(*turns, provider=ANTHROPIC)[1]["content"]
    assert [block.get("thinking") or block.get("text") for block in blocks] == ["Cut", "Yes"]
    blocks = messages(user("a"), turns[1], turns[3], user("b"), provider=ANTHROPIC)[1]["content"]
    assert [block.get("thinking") or block.get("text") for block in blocks] == ["Mine", "Yes"]


def test_deepseek_gets_its_reasoning_back_beside_tool_calls_and_nobody_else_does() -> None:
    turns = [
        user("a"),
        assistant(reasoning("Hm"), CALL),
        result("sunny"),
        assistant(reasoning("So"), "It is"),
        user("b"),
    ]
    assert "reasoning_back" in PROVIDER_FACTS["deepseek"].quirks
    found = messages(*turns, quirks="reasoning_back")
    assert [message.get("reasoning_content") for message in found] == [None, "Hm", None, None, None]
    assert not any("reasoning_content" in message for message in messages(*turns))


# ── requests: parameters, quirks, addresses ─────────────────────────────────────────────────────────────────────────


def test_max_tokens_has_the_name_that_the_provider_wants() -> None:
    assert body(user("a"), max_tokens=9)["max_tokens"] == 9
    renamed = body(user("a"), max_tokens=9, quirks="max_completion_tokens")
    assert renamed["max_completion_tokens"] == 9 and "max_tokens" not in renamed
    assert "max_completion_tokens" not in body(user("a"), quirks="max_completion_tokens")
    assert body(user("a"), max_tokens=9, provider=ANTHROPIC)["max_tokens"] == 9
    assert {name for name, one in PROVIDER_FACTS.items() if "max_completion_tokens" in one.quirks} == {
        "openai",
        "azure",
    }


def test_quirks_leave_away_or_add_what_they_say() -> None:
    assert "stream_options" not in body(user("a"), quirks="no_stream_options")
    assert body(user("a"), quirks="reasoning_split")["reasoning_split"] is True
    assert (
        body(user("a"), quirks="tool_choice_any", tools=[{"name": "f"}], tool_choice="required")["tool_choice"] == "any"
    )
    assert {name for name, one in PROVIDER_FACTS.items() if "no_stream_options" in one.quirks} >= {
        "cohere",
        "perplexity",
    }


def test_what_is_not_asked_for_is_not_sent() -> None:
    asked = body(user("a"), temperature=0.0, top_p=0.5, stop=["x"], reasoning_effort="low")
    assert (asked["temperature"], asked["top_p"], asked["stop"], asked["reasoning_effort"]) == (0.0, 0.5, ["x"], "low")
    assert not {"tools", "tool_choice", "max_tokens", "response_format"} & set(asked)


def test_anthropics_parameters_have_its_own_names_and_bounds() -> None:
    asked = body(user("a"), temperature=1.5, top_p=0.5, stop=["x"], provider=ANTHROPIC)
    assert (asked["temperature"], asked["top_p"], asked["stop_sequences"]) == (1.0, 0.5, ["x"])
    asked = body(user("a"), temperature=0.5, max_tokens=100, reasoning_effort="low", provider=ANTHROPIC)
    assert asked["thinking"] == {"type": "enabled", "budget_tokens": THINKING_TOKENS["low"]}
    assert asked["max_tokens"] == 100 + THINKING_TOKENS["low"] and "temperature" not in asked
    assert "thinking" not in body(user("a"), reasoning_effort="none", provider=ANTHROPIC)


@pytest.mark.parametrize(
    ("base_url", "path"),
    [
        ("https://api.anthropic.com", "/v1/messages"),
        ("https://api.anthropic.com/v1", "/messages"),
        ("https://api.minimax.io/anthropic", "/v1/messages"),
    ],
)
def test_anthropics_address_is_the_same_with_and_without_v1(base_url: str, path: str) -> None:
    assert DIALECTS["anthropic"].path(Provider("a", "anthropic", base_url)) == path


def test_openais_path_is_appended_to_the_address_as_it_is_given() -> None:
    assert DIALECTS["openai"].path(OPENAI) == "/chat/completions"


def test_the_key_is_in_the_header_that_the_provider_wants() -> None:
    def headers(dialect: str, key: str | None, variable: str | None = None, quirks: str = "") -> dict[str, str]:
        provider = Provider("p", dialect, "https://p.test", key, variable, quirks=frozenset(quirks.split()))
        return DIALECTS[dialect].headers(provider)

    assert headers("openai", "k") == {"authorization": "Bearer k"}
    assert headers("openai", "k", quirks="api_key_header") == {"api-key": "k"}
    assert headers("openai", None) == {}
    version = {"anthropic-version": "2023-06-01"}
    assert headers("anthropic", "k") == {"x-api-key": "k", **version}
    assert headers("anthropic", "k", "ANTHROPIC_AUTH_TOKEN") == {"authorization": "Bearer k", **version}
    assert headers("anthropic", None) == version
    assert "api_key_header" in PROVIDER_FACTS["azure"].quirks


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Decoded:
    """Events through a decoder, and its end unless that is to be left away."""

    def __init__(self, provider: Provider, *events: Any, end: bool = True) -> None:
        self.decoder = DIALECTS[provider.dialect].decoder(provider)
        found: list[Delta] = []
        self.error: GenerationError | None = None
        try:
            for event in events:
                data = event if isinstance(event, bytes) else json.dumps(event).encode()
                name = event.get("type", "") if isinstance(event, dict) and provider.dialect == "anthropic" else ""
                self.decoder.decode(name.encode(), data, found)
            if end:
                self.decoder.end(found)
        except GenerationError as exc:
            self.error = exc
        self.deltas = found
        self.content = [(delta.kind, delta.text) for delta in join_deltas(found)]
        self.finish_reason, self.usage = self.decoder.finish_reason, self.decoder.usage

    @property
    def calls(self) -> list[Any]:
        return [json.loads(text) for kind, text in self.content if kind == "tool_call"]


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def fragment(
    index: int | None, identity: str | None = None, name: str | None = None, arguments: Any = None
) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    marks = {key: value for key, value in (("index", index), ("id", identity)) if value is not None}
    return {**marks, "type": "function", "function": function}


def openai(*events: Any, provider: Provider = OPENAI) -> Decoded:
    return Decoded(provider, *events, chunk("stop"), b"[DONE]")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_read_under_either_name(name: str) -> None:
    assert openai(chunk(**{name: "Hm"}), chunk(content="Yes")).content == [("reasoning", "Hm"), ("text", "Yes")]


def test_everything_in_one_chunk_is_read_in_its_order() -> None:
    call = fragment(0, "c", "f", "{}")
    decoded = openai(chunk(content="Yes", reasoning="Hm", tool_calls=[call], refusal="No"))
    assert [kind for kind, _ in decoded.content] == ["reasoning", "text", "tool_call"]
    assert decoded.content[1] == ("text", "YesNo")


def test_mistrals_list_content_is_read() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}, {"type": "x"}]},
        {"type": "thinking", "thinking": "…"},
        {"type": "text", "text": "Yes"},
        {"type": "reference", "reference_ids": [1]},
        "!",
        7,
    ]
    assert openai(chunk(content=parts)).content == [("reasoning", "Hm…"), ("text", "Yes!")]


def test_xais_repeated_reasoning_is_dropped_and_repeated_text_is_not() -> None:
    xai = Provider("xai", "openai", "https://x.test/v1", "k", "XAI_API_KEY", quirks=PROVIDER_FACTS["xai"].quirks)
    events = [chunk(reasoning_content="Hm"), chunk(reasoning_content="Hm"), chunk(content="a"), chunk(content="a")]
    assert openai(*events, provider=xai).content == [("reasoning", "Hm"), ("text", "aa")]
    assert openai(*events).content == [("reasoning", "HmHm"), ("text", "aa")]


CALLS = [("c1", "f", '{"a":1}'), ("c2", "g", '{"b":2}')]
FRAGMENTS: dict[str, list[list[dict[str, Any]]]] = {
    "by index": [
        [fragment(0, "c1", "f", "")],
        [fragment(0, arguments='{"a"')],
        [fragment(1, "c2", "g", "")],
        [fragment(1, arguments='{"b"'), fragment(0, arguments=":1}")],
        [fragment(1, arguments=":2}")],
    ],
    "id and name in every fragment": [
        [fragment(0, "c1", "f", '{"a"'), fragment(1, "c2", "g", '{"b"')],
        [fragment(0, "c1", "f", ":1}"), fragment(1, "c2", "g", ":2}")],
    ],
    "another id in every fragment": [
        [fragment(0, "c1", "f", '{"a"'), fragment(1, "c2", "g", '{"b"')],
        [fragment(0, "c3", None, ":1}"), fragment(1, "c4", None, ":2}")],
    ],
    "without an index, whole": [[fragment(None, "c1", "f", '{"a":1}'), fragment(None, "c2", "g", '{"b":2}')]],
    "without an index, in pieces": [
        [fragment(None, "c1", "f", '{"a"')],
        [fragment(None, None, None, ":1}")],
        [fragment(None, "c2", "g", '{"b"')],
        [fragment(None, "c2", None, ":2}")],
    ],
    "all with index 0": [
        [fragment(0, "c1", "f", '{"a":1}')],
        [fragment(0, "c2", "g", '{"b"')],
        [fragment(0, arguments=":2}")],
    ],
    "arguments as objects": [[fragment(0, "c1", "f", {"a": 1})], [fragment(1, "c2", "g", {"b": 2})]],
    "name late": [[fragment(0, "c1")], [fragment(0, None, "f", '{"a":1}')], [fragment(1, "c2", "g", '{"b":2}')]],
}


@pytest.mark.parametrize("shape", FRAGMENTS)
def test_tool_calls_are_joined_from_fragments_of_every_shape(shape: str) -> None:
    decoded = Decoded(OPENAI, *(chunk(tool_calls=calls) for calls in FRAGMENTS[shape]), chunk("tool_calls"))
    found = [
        (call["id"], call["name"], json.dumps(json.loads(call["arguments"]), separators=(",", ":")))
        for call in decoded.calls
    ]
    assert found == CALLS and decoded.finish_reason == "tool_calls"


def test_calls_without_ids_get_ids_of_their_own() -> None:
    calls = [fragment(None, "", "f", "{}"), fragment(None, None, "f", "{}")]
    first, second = openai(chunk(tool_calls=calls)).calls
    assert first["id"] and second["id"] and first["id"] != second["id"]


def test_a_stop_with_tool_calls_is_a_finish_of_tool_calls() -> None:
    assert openai(chunk(tool_calls=[fragment(0, "c", "f", "{}")])).finish_reason == "tool_calls"
    assert openai(chunk(content="a")).finish_reason == "stop"


def test_a_tool_call_appears_when_it_is_complete_and_never_when_the_stream_was_cut() -> None:
    cut = Decoded(OPENAI, chunk(content="a", tool_calls=[fragment(0, "c", "f", '{"a')]))
    assert isinstance(cut.error, ProviderTruncated) and cut.content == [("text", "a")]


@pytest.mark.parametrize("calls", ["x", 7, ["x"], [None], {"a": 1}, [{"function": "x"}], [{"index": {}}]])
def test_a_tool_call_of_an_impossible_shape_breaks_nothing_but_the_answer(calls: Any) -> None:
    decoded = openai(chunk(tool_calls=calls))
    assert decoded.error is None or isinstance(decoded.error, ProviderProtocol)


def test_the_arguments_of_tool_calls_are_bounded() -> None:
    piece = "x" * 100_000
    many = [chunk(tool_calls=[fragment(0, arguments=piece)])] * (PROVIDER_EVENT_BYTES_MAX // 100_000 + 1)
    assert isinstance(openai(*many).error, TooLong)
    delta = {"type": "input_json_delta", "partial_json": piece}
    start = {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "id": "t", "name": "f"}}
    pieces = [{"type": "content_block_delta", "index": 0, "delta": delta}] * len(many)
    assert isinstance(Decoded(ANTHROPIC, start, *pieces).error, TooLong)


USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


@pytest.mark.parametrize(
    "last",
    [
        {"choices": [], "usage": USAGE},
        {"choices": [{"index": 0, "delta": {}}], "usage": USAGE},
        {"choices": [{"index": 0, "delta": {}, "usage": USAGE}]},
        {"choices": [], "x_groq": {"id": "x", "usage": USAGE}},
        {"usage": {**USAGE, "prompt_tokens_details": None, "prompt_cache_hit_tokens": 4}},
        {"usage": {**USAGE, "completion_tokens_details": [], "reasoning_tokens": 2}},
    ],
    ids=["empty choices", "LiteLLM", "Moonshot", "Groq", "DeepSeek", "Perplexity"],
)
def test_usage_is_found_in_every_place(last: Any) -> None:
    assert Decoded(OPENAI, chunk("stop", content="a"), last).usage == Usage(9, 5, False, 4, 2)


@pytest.mark.parametrize("usage", [None, {}, [], 7, "x", {"prompt_tokens": "many", "completion_tokens": -1}])
def test_usage_that_says_nothing_breaks_nothing(usage: Any) -> None:
    decoded = openai({"choices": [], "usage": usage})
    assert decoded.error is None and decoded.usage in (None, Usage(0, 0, False))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("stop", "stop"),
        ("eos", "stop"),
        ("COMPLETE", "stop"),
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("something new", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("MAX_TOKENS", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_calls", "tool_calls"),
        ("function_call", "tool_calls"),
        ("tool_use", "tool_calls"),
        ("content_filter", "content_filter"),
        ("sensitive", "content_filter"),
        ("refusal", "content_filter"),
        ("SAFETY", "content_filter"),
        ("content_filter: PROHIBITED_CONTENT", "content_filter"),
    ],
)
def test_every_word_for_the_end_has_its_meaning(word: str, expected: str) -> None:
    assert finish_reason_of(word) == expected


@pytest.mark.parametrize(
    "word", ["error", "network_error", "ERROR", "ERROR_TOXIC", "OTHER", "function_call_filter: MALFORMED_FUNCTION_CALL"]
)
def test_an_end_that_is_a_failure_is_one(word: str) -> None:
    with pytest.raises(GenerationError) as raised:
        finish_reason_of(word)
    assert raised.value.code == "provider_unavailable" and raised.value.retryable
    assert word not in FINISH_REASONS


def test_groqs_error_beside_the_chunk_is_an_error() -> None:
    decoded = openai({"choices": [{"delta": {}}], "x_groq": {"error": "over capacity"}})
    assert decoded.error is not None and "over capacity" in decoded.error.message


@pytest.mark.parametrize(
    "data", [b"", b"null", b"true", b"7", b'"x"', b"[]", b"{", b"\xff", b'{"choices":7}', b'{"choices":[7]}']
)
@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC], ids=lambda one: one.dialect)
def test_no_event_of_an_impossible_shape_escapes_as_anything_but_a_protocol_error(
    provider: Provider, data: bytes
) -> None:
    decoded = Decoded(provider, data, end=False)
    assert decoded.error is None or isinstance(decoded.error, ProviderProtocol)


@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC], ids=lambda one: one.dialect)
def test_nothing_after_the_end_counts(provider: Provider) -> None:
    after: list[Any] = [b"[DONE]", chunk(content="late"), b"not json", {"type": "error", "error": {"message": "late"}}]
    decoded = Decoded(provider, *after, end=False)
    assert decoded.decoder.done and decoded.error is None and decoded.content == []


# ── Anthropic's answers ─────────────────────────────────────────────────────────────────────────────────────────────


def start(index: Any, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: Any, type: str, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": type, **fields}}


def stop(index: Any) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


def ended(reason: str = "end_turn", **usage: int) -> list[dict[str, Any]]:
    return [{"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage}, {"type": "message_stop"}]


def test_thinking_its_signature_and_text_come_in_order() -> None:
    decoded = Decoded(
        ANTHROPIC,
        start(0, type="thinking", thinking="", signature=""),
        delta(0, "thinking_delta", thinking="Hm"),
        delta(0, "signature_delta", signature="c2ln"),
        stop(0),
        start(1, type="redacted_thinking", data="xyz"),
        stop(1),
        start(2, type="text", text=""),
        delta(2, "text_delta", text="Yes"),
        stop(2),
        *ended(),
    )
    assert decoded.content == [
        ("reasoning", "Hm"),
        ("signature", '{"provider":"anthropic","signature":"c2ln"}'),
        ("signature", '{"provider":"anthropic","redacted":"xyz"}'),
        ("text", "Yes"),
    ]
    assert decoded.finish_reason == "stop" and decoded.decoder.done


def test_what_was_decoded_goes_back_as_it_came() -> None:
    decoded = Decoded(
        ANTHROPIC,
        start(0, type="thinking", thinking=""),
        delta(0, "thinking_delta", thinking="Hm"),
        delta(0, "signature_delta", signature="c2ln"),
        stop(0),
        start(1, type="tool_use", id="t1", name="f", input={}),
        delta(1, "input_json_delta", partial_json='{"a":'),
        delta(1, "input_json_delta", partial_json="1}"),
        stop(1),
        *ended("tool_use"),
    )
    answer = Turn("assistant", tuple(decoded.deltas))
    found = messages(user("a"), answer, result("r", "t1"), provider=ANTHROPIC, reasoning_effort="low")
    assert found[1]["content"] == [
        {"type": "thinking", "thinking": "Hm", "signature": "c2ln"},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
    ]


def test_blocks_may_overlap_and_need_not_stop() -> None:
    decoded = Decoded(
        ANTHROPIC,
        start(0, type="thinking", thinking=""),
        start(1, type="tool_use", id="a", name="f"),
        start(2, type="tool_use", id="b", name="g"),
        delta(1, "input_json_delta", partial_json='{"x":'),
        delta(2, "input_json_delta", partial_json='{"y":'),
        delta(0, "thinking_delta", thinking="Hm"),
        delta(1, "input_json_delta", partial_json="1}"),
        delta(2, "input_json_delta", partial_json="2}"),
        stop(2),
        *ended("tool_use"),
    )
    assert [(call["id"], call["arguments"]) for call in decoded.calls] == [("b", '{"y":2}'), ("a", '{"x":1}')]


@pytest.mark.parametrize("fragments", [[], [""]])
def test_a_call_without_fragments_has_the_input_of_its_start_or_none(fragments: list[str]) -> None:
    pieces = [delta(0, "input_json_delta", partial_json=one) for one in fragments]
    for block, arguments in [({"input": {"a": 1}}, {"a": 1}), ({"input": {}}, {}), ({}, {})]:
        decoded = Decoded(ANTHROPIC, start(0, type="tool_use", id="t", name="f", **block), *pieces, stop(0), *ended())
        assert json.loads(decoded.calls[0]["arguments"]) == arguments


def test_tools_of_the_servers_own_and_their_results_are_no_calls_of_ours() -> None:
    decoded = Decoded(
        ANTHROPIC,
        start(0, type="server_tool_use", id="s", name="web_search", input={}),
        delta(0, "input_json_delta", partial_json='{"query":"x"}'),
        stop(0),
        start(1, type="web_search_tool_result", tool_use_id="s", content=[{"type": "web_search_result"}]),
        stop(1),
        *ended(),
    )
    assert decoded.content == [] and decoded.error is None


def test_usage_is_cumulative_and_counts_what_was_cached() -> None:
    first = {"input_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2, "output_tokens": 1}
    decoded = Decoded(
        ANTHROPIC,
        {"type": "message_start", "message": {"usage": first}},
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 4}},
        *ended(output_tokens=9),
    )
    assert decoded.usage == Usage(10, 9, False, 3)


@pytest.mark.parametrize(
    "event",
    [
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
        {"type": "error", "message": "Overloaded", "code": 529},
        b'{"error":{"code":529,"message":"Overloaded","type":"overloaded_error"}}',
        b'[{"error":{"code":529,"message":"Overloaded"}}]',
    ],
)
def test_an_error_event_of_any_shape_is_an_error_of_its_kind(event: Any) -> None:
    decoded = Decoded(ANTHROPIC, event)
    assert decoded.error is not None and decoded.error.code == "provider_unavailable"
    assert decoded.error.message == "anthropic reported an error: Overloaded"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("invalid_request_error", "provider_rejected"),
        ("authentication_error", "provider_auth"),
        ("permission_error", "provider_auth"),
        ("not_found_error", "provider_rejected"),
        ("request_too_large", "provider_rejected"),
        ("rate_limit_error", "provider_rate_limited"),
        ("api_error", "provider_unavailable"),
        ("timeout_error", "provider_unavailable"),
        ("overloaded_error", "provider_unavailable"),
        ("something_new", "provider_unavailable"),
    ],
)
def test_every_type_of_error_in_a_stream_has_its_code(kind: str, code: str) -> None:
    decoded = Decoded(ANTHROPIC, {"type": "error", "error": {"type": kind, "message": "no"}})
    assert decoded.error is not None and decoded.error.code == code


def test_a_code_beside_an_error_counts_where_there_is_none_in_it() -> None:
    decoded = Decoded(ANTHROPIC, {"type": "error", "code": 429, "error": {"message": "no"}})
    assert decoded.error is not None and decoded.error.code == "provider_rate_limited"


def test_an_event_of_an_unknown_name_is_read_over_and_one_of_a_known_name_is_not() -> None:
    decoder = DIALECTS["anthropic"].decoder(ANTHROPIC)
    decoder.decode(b"future_event", b"not json", [])
    decoder.decode(b"ping", b"{}", [])
    with pytest.raises(ProviderProtocol):
        decoder.decode(b"content_block_delta", b"not json", [])


def test_without_a_stop_reason_an_answer_is_never_whole() -> None:
    decoded = Decoded(ANTHROPIC, start(0, type="text", text="Hi"), stop(0), {"type": "message_stop"})
    assert isinstance(decoded.error, ProviderTruncated) and decoded.content == [("text", "Hi")]


def test_a_whole_message_is_read_as_its_blocks_in_order() -> None:
    found: list[Delta] = []
    decoder = DIALECTS["anthropic"].decoder(ANTHROPIC)
    blocks = [
        {"type": "thinking", "thinking": "Hm", "signature": "c2ln"},
        {"type": "text", "text": "Yes \ud83d"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": "é"}},
        {"type": "future"},
    ]
    document = {"type": "message", "content": blocks, "stop_reason": "tool_use", "usage": {"output_tokens": 3}}
    decoder.decode_document(json.dumps(document).encode(), found)
    decoder.end(found)
    texts = [(one.kind, one.text) for one in join_deltas(found)]
    assert [kind for kind, _ in texts] == ["reasoning", "signature", "text", "tool_call"]
    assert texts[2][1] == "Yes \ufffd"
    assert json.loads(json.loads(texts[3][1])["arguments"]) == {"a": "é"}


# ── characters ──────────────────────────────────────────────────────────────────────────────────────────────────────


def text_events(provider: Provider, *texts: str) -> list[Any]:
    if provider.dialect == "anthropic":
        return [start(0, type="text", text=""), *(delta(0, "text_delta", text=text) for text in texts), *ended()]
    return [*(chunk(content=text) for text in texts), chunk("stop")]


@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC], ids=lambda one: one.dialect)
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a\ud83d", "\ude00b"], "a😀b"),
        (["\ud83d", "\ude00\ud83d", "\ude00"], "😀😀"),
        (["\ud83d", "b"], "\ufffdb"),
        (["\ude00b"], "\ufffdb"),
        (["a\ud83d"], "a\ufffd"),
        (["\ud83d\ud83d", "\ude00"], "\ufffd😀"),
        (["a\0b", "\0"], "a\0b\0"),
    ],
)
def test_surrogate_pairs_are_joined_over_events_and_halves_are_replaced(
    provider: Provider, texts: list[str], expected: str
) -> None:
    decoded = Decoded(provider, *text_events(provider, *texts))
    assert decoded.content == [("text", expected)] and decoded.error is None
    assert all(one.text for one in decoded.deltas)
    "".join(one.text for one in decoded.deltas).encode()


def test_halves_in_tool_calls_and_bytes_that_are_no_utf8_are_replaced_too() -> None:
    calls = [fragment(0, "c", "f", '"\ud83d'), fragment(0, arguments='\ude00\ud83d"')]
    assert openai(chunk(tool_calls=calls)).calls[0]["arguments"] == '"😀\ufffd"'
    assert openai(b'{"choices":[{"delta":{"content":"a\xffb"}}]}').content == [("text", "a\ufffdb")]


def test_a_half_in_the_text_waits_while_reasoning_comes() -> None:
    decoded = openai(chunk(content="\ud83d"), chunk(reasoning="Hm"), chunk(content="\ude00"))
    assert decoded.content == [("reasoning", "Hm"), ("text", "😀")]
