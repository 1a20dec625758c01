"""OpenAI's API over our messages, in raw HTTP: what goes upstream, what comes back, and that it survives."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import llmchat
from tests.conftest import Server, wait_until
from tests.provider import (
    Cut,
    Hang,
    Provider,
    Script,
    Steps,
    anthropic_error,
    anthropic_text,
    anthropic_thinking,
    anthropic_tool_use,
    openai_error,
    openai_error_event,
    openai_reasoning,
    openai_text,
    openai_tool_calls,
)

USER = [{"role": "user", "content": "Hi"}]
ASKED = {"model": "m", "messages": USER}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\nrest").decode()
RECEIVE_BYTES = 16_384  # that the kernel takes for a client that does not read
PAUSE = 0.06  # seconds between two deltas of the provider that are to be two rows, far above the flusher's interval


# ── one server for all that does not kill it, with both dialects upstream ───────────────────────────────────────────


@pytest.fixture(scope="module")
def shared_provider() -> Iterator[Provider]:
    with Provider(model="live") as running:
        yield running


def settings(provider: Provider, **more: str) -> dict[str, str]:
    return {
        "OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": "sk-test", "OPENAI_MODELS": "m,n,shared",
        "ANTHROPIC_BASE_URL": provider.origin, "ANTHROPIC_API_KEY": "sk-ant", "ANTHROPIC_MODELS": "a,shared",
        "LOCAL_BASE_URL": provider.base_url, "LLMCHAT_ATTEMPTS": "1", "LLMCHAT_HEARTBEAT_SECONDS": "0.3", **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("openai"), **settings(shared_provider)) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that forgets early: in its ring is one event, and what nobody stored goes after a second."""
    more = {"LLMCHAT_RING_EVENTS": "1", "LLMCHAT_UNSTORED_SECONDS": "1"}
    with Server(tmp_path_factory.mktemp("impatient"), **settings(shared_provider, **more)) as running:
        yield running


# ── helpers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def complete(server: Server, **body: Any) -> httpx.Response:
    return server.post("/v1/chat/completions", {"model": "openai/m", "messages": USER, **body})


def respond(server: Server, input: Any = "Hi", headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return server.post("/v1/responses", {"model": "openai/m", "input": input, **body}, headers=headers)


def frames(raw: str) -> list[str]:
    """The data of each event, after a check of the framing that the SDKs need."""
    found = []
    for block in raw.replace(": hb\n", "").split("\n\n"):
        names = [line.partition(":")[0] for line in block.split("\n") if line]
        assert names in ([], ["data"], ["event", "data"]), block
        found += [block.split("data: ", 1)[1]] if names else []
    return found


def chunks(raw: str) -> list[dict[str, Any]]:
    data = frames(raw)
    assert data[-1] == "[DONE]", raw
    return [json.loads(one) for one in data[:-1]]


def events(raw: str) -> list[dict[str, Any]]:
    """A response's events, after a check that their names and types agree."""
    found = [json.loads(one) for one in frames(raw)]
    names = [line.removeprefix("event: ") for line in raw.split("\n") if line.startswith("event: ")]
    assert names == [one["type"] for one in found]
    return found


def asked(provider: Provider) -> dict[str, Any]:
    """The body of the newest request upstream."""
    body = provider.chats[-1].json
    assert isinstance(body, dict)
    return body


def split_text(*deltas: str) -> Steps:
    """A stream whose deltas become rows of their own."""
    return openai_text(*deltas, delay=PAUSE)


def error_of(response: httpx.Response) -> dict[str, Any]:
    document = response.json()
    assert set(document["error"]) == {"message", "type", "param", "code"}, document
    return dict(document["error"])


class Raw:
    """A streamed POST or GET on a socket of its own, which can be left at any byte."""

    def __init__(
        self, server: Server, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> None:
        address = urlsplit(server.url)
        payload = b"" if body is None else json.dumps(body).encode()
        given = {
            "Host": address.netloc,
            "Content-Type": "application/json",
            "Content-Length": len(payload),
            **(headers or {}),
        }
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        self.socket.settimeout(20)
        self.socket.connect((address.hostname or "", address.port or 0))
        self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)
        self.data = b""

    def read_until(self, mark: bytes) -> None:
        while mark not in self.data:
            data = self.socket.recv(1 << 20)
            assert data, self.data[-2000:]
            self.data += data

    def read_to_end(self) -> bytes:
        while data := self.socket.recv(1 << 20):
            self.data += data
        return self.data

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_models_of_all_providers_are_listed_under_names_that_can_be_asked(server: Server) -> None:
    listed = server.get("/v1/models").json()
    ids = [one["id"] for one in listed["data"]]
    assert listed["object"] == "list" and set(map(frozenset, listed["data"])) == {
        frozenset({"id", "object", "created", "owned_by"})
    }
    assert sorted(ids) == ["anthropic/a", "anthropic/shared", "local/live", "openai/m", "openai/n", "openai/shared"]
    assert server.get("/v1/models/openai/m").json() == {
        "id": "openai/m",
        "object": "model",
        "created": 0,
        "owned_by": "openai",
    }


@pytest.mark.parametrize(
    ("name", "meant"), [("openai/m", "openai/m"), ("m", "openai/m"), ("a", "anthropic/a"), ("live", "local/live")]
)
def test_a_model_is_found_by_its_bare_name_where_only_one_provider_has_it(
    server: Server, name: str, meant: str
) -> None:
    assert complete(server, model=name).json()["model"] == meant
    assert respond(server, model=name).json()["model"] == meant


@pytest.mark.parametrize("name", ["shared", "nobody-has-it", "openai/other", "groq/x"])
def test_an_unknown_or_ambiguous_model_is_not_found(server: Server, provider: Provider, name: str) -> None:
    before = len(provider.chats)
    for response in (complete(server, model=name), respond(server, model=name), server.get(f"/v1/models/{name}")):
        error = error_of(response)
        assert response.status_code == 404 and error["code"] == "model_not_found" and error["param"] == "model"
        assert response.headers["x-should-retry"] == "false"
    assert len(provider.chats) == before


# ── chat completions: what goes upstream ────────────────────────────────────────────────────────────────────────────


def test_what_a_client_asks_goes_upstream_and_what_nobody_knows_is_ignored(server: Server, provider: Provider) -> None:
    given = {
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "stop": "END", "seed": 3, "presence_penalty": 0.5,
        "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "reasoning_effort": "low",
        "response_format": {"type": "json_object"},
    }  # fmt: skip
    harmless = {
        "user": "me",
        "logit_bias": None,
        "frequency_penalty": 0,
        "service_tier": "auto",
        "brand_new": [1],
        "n": 1,
    }
    assert complete(server, **given, **harmless).status_code == 200
    sent = asked(provider)
    assert {name: sent.get(name) for name in given if name not in ("max_tokens", "stop")} == {
        name: value for name, value in given.items() if name not in ("max_tokens", "stop")
    }
    assert sent["max_completion_tokens"] == 7 and sent["stop"] == ["END"] and sent["messages"] == USER
    assert not set(harmless) & set(sent)
    complete(server, max_completion_tokens=9, stop=["a", "b"])
    assert asked(provider)["max_completion_tokens"] == 9 and asked(provider)["stop"] == ["a", "b"]


IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
FOREIGN_IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "a cat"}
HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": [{"type": "text", "text": "In English."}]},
    {"role": "user", "name": "me", "content": [{"type": "text", "text": "See:"}, IMAGE]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "a cat"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}, {"type": "text", "text": "Really?"}]},
]  # fmt: skip


def test_a_clients_history_goes_upstream_in_openais_dialect(server: Server, provider: Provider) -> None:
    assert complete(server, messages=HISTORY, tools=[TOOL]).status_code == 200
    sent = asked(provider)["messages"]
    assert [one["role"] for one in sent] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert sent[0]["content"] == "Be brief.\n\nIn English."
    assert sent[1]["content"][1] == {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    assert sent[2]["tool_calls"] == HISTORY[3]["tool_calls"]
    assert sent[3] == {"role": "tool", "tool_call_id": "c1", "content": "a cat"}
    assert sent[4]["content"] == "A cat." and sent[5]["content"] == "Sure?\n\nReally?"


def test_a_clients_history_goes_upstream_in_anthropics_dialect(server: Server, provider: Provider) -> None:
    assert (
        complete(server, model="anthropic/a", messages=HISTORY, tools=[TOOL], tool_choice="required").status_code == 200
    )
    sent = asked(provider)
    assert sent["system"] == "Be brief.\n\nIn English." and sent["tool_choice"] == {"type": "any"}
    assert sent["tools"][0]["name"] == "look"
    kinds = [(one["role"], [block["type"] for block in one["content"]]) for one in sent["messages"]]
    assert kinds == [
        ("user", ["text", "image"]), ("assistant", ["tool_use"]), ("user", ["tool_result"]), ("assistant", ["text"]),
        ("user", ["text"]),
    ]  # fmt: skip


def test_a_system_message_between_others_stays_where_it_is(server: Server, provider: Provider) -> None:
    complete(
        server,
        messages=[
            *USER,
            {"role": "assistant", "content": "Yo"},
            {"role": "system", "content": "Now in French."},
            *USER,
        ],
    )
    assert [one["role"] for one in asked(provider)["messages"]] == ["user", "assistant", "system", "user"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [*USER, RESULT]}, "messages.1.tool_call_id"),
        ({"messages": [{"role": "system", "content": "x"}, RESULT, *USER]}, "messages.1.tool_call_id"),
        ({"messages": [*USER, CALLED, {**RESULT, "tool_call_id": "c2"}]}, "messages.2.tool_call_id"),
        ({"messages": [*USER, CALLED, RESULT, {**RESULT, "tool_call_id": "c2"}]}, "messages.3.tool_call_id"),
        ({"messages": [*USER, CALLED, {"role": "assistant", "content": "A cat."}, RESULT]}, "messages.3.tool_call_id"),
        ({"messages": [*USER, RESULT, CALLED]}, "messages.1.tool_call_id"),
        ({"messages": [{"role": "user", "content": [FOREIGN_IMAGE]}]}, "messages.0.content.0.data"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_the_field_in_openais_shape(
    server: Server, provider: Provider, body: dict[str, Any], param: str
) -> None:
    before = len(provider.chats)
    response = complete(server, **body)
    error = error_of(response)
    assert response.status_code == 400 and error["param"] == param and error["message"].startswith(param), error
    assert error["type"] == "invalid_request_error" and response.headers["x-should-retry"] == "false"
    assert len(provider.chats) == before


def test_the_refusal_of_a_result_that_nothing_called_for_names_its_id_and_keeps_nothing(server: Server) -> None:
    before = server.rows("SELECT count(*) FROM message")
    message = error_of(complete(server, messages=[*USER, RESULT], store=True))["message"]
    assert "'c1'" in message and "must be a response to a preceding message with 'tool_calls'" in message
    assert server.rows("SELECT count(*) FROM message") == before


def test_results_of_parallel_calls_may_come_in_any_order(server: Server, provider: Provider) -> None:
    calls = [{**CALL, "id": f"c{number}"} for number in range(4)]
    results = [{**RESULT, "tool_call_id": call["id"], "content": f"result {call['id']}"} for call in calls]
    both = {"role": "assistant", "content": "I look.", "tool_calls": calls}
    again = [*USER, both, results[2], results[0], results[3], results[1]]
    response = complete(server, messages=[*again, {"role": "assistant", "content": "Cats."}, *again])
    assert response.status_code == 200, response.text
    sent = [one for one in asked(provider)["messages"] if one["role"] == "tool"]
    assert [one["content"] for one in sent] == [f"result c{number}" for number in (2, 0, 3, 1)] * 2
    called = [call["id"] for one in asked(provider)["messages"] for call in one.get("tool_calls", ())]
    assert [one["tool_call_id"] for one in sent[:4]] == ["c2", "c0", "c3", "c1"] and sorted(called[:4]) == called[:4]


# ── chat completions: what comes back ───────────────────────────────────────────────────────────────────────────────


def test_a_chat_completion_comes_whole(server: Server, provider: Provider) -> None:
    provider.script([*openai_reasoning("Hm."), *openai_text("Hel", "lo", usage=(9, 3))])
    answer = complete(server).json()
    assert (
        answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion" and answer["model"] == "openai/m"
    )
    assert answer["choices"] == [
        {
            "index": 0, "logprobs": None, "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Hello", "refusal": None, "reasoning_content": "Hm."},
        }
    ]  # fmt: skip
    assert {**answer["usage"], "prompt_tokens_details": 0, "completion_tokens_details": 0} == {
        "prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": 0,
        "completion_tokens_details": 0,
    }  # fmt: skip


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_chat_completion_is_streamed_in_chunks(server: Server, provider: Provider, with_usage: bool) -> None:
    provider.script([*openai_reasoning("Hm."), *openai_text("Hel", "lo")])
    response = complete(server, stream=True, stream_options={"include_usage": with_usage})
    assert response.headers["content-type"].startswith("text/event-stream") and "id:" not in response.text.replace(
        '"id":', ""
    )
    found = chunks(response.text)
    assert len({one["id"] for one in found}) == 1 and {one["object"] for one in found} == {"chat.completion.chunk"}
    choices = [one["choices"][0] for one in found if one["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(one["delta"].get("content", "") for one in choices) == "Hello"
    assert "".join(one["delta"].get("reasoning_content", "") for one in choices) == "Hm."
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert ([one["usage"]["total_tokens"] for one in found if not one["choices"]] == [12]) is with_usage


ANTHROPIC_CALLS = [
    *anthropic_tool_use("c1", "look", '{"at": "é"}', finish=None),
    *anthropic_tool_use("c2", "look", "{}", index=1),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("model", "script"),
    [
        ("openai/m", openai_tool_calls(("c1", "look", '{"at": "é"}'), ("c2", "look", "{}"))),
        ("anthropic/a", ANTHROPIC_CALLS),
    ],
)  # fmt: skip
def test_tool_calls_come_whole_and_in_order(
    server: Server, provider: Provider, model: str, script: Steps, stream: bool
) -> None:
    provider.script(script)
    response = complete(server, model=model, stream=stream, tools=[TOOL])
    if stream:
        choices = [one["choices"][0] for one in chunks(response.text)]
        calls = [call for one in choices for call in one["delta"].get("tool_calls", [])]
        assert [call.pop("index") for call in calls] == [0, 1]
        finish = choices[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        calls, finish = choice["message"]["tool_calls"], choice["finish_reason"]
        assert choice["message"]["content"] is None
    assert [(call["id"], call["type"], call["function"]["name"]) for call in calls] == [
        ("c1", "function", "look"),
        ("c2", "function", "look"),
    ]
    assert json.loads(calls[0]["function"]["arguments"]) == {"at": "é"} and finish == "tool_calls"


CUT = [*openai_text("Some", finish=None, usage=None, done=False), Cut()]
BROKEN = [*openai_text("Some", finish=None, usage=None, done=False), *openai_error_event("it broke")]
FAILURES: dict[str, tuple[Script, int, str, str]] = {
    "rejected": (openai_error(400, "context too long"), 400, "invalid_request_error", "provider_rejected"),
    "refused key": (openai_error(401, "bad key"), 502, "server_error", "provider_auth"),
    "rate limit": (openai_error(429, "slow down", "rate_limit_error"), 429, "rate_limit_error", "rate_limit_exceeded"),
    "down": (openai_error(500, "oops"), 502, "server_error", "provider_unavailable"),
    "cut": (CUT, 502, "server_error", "provider_truncated"),
    "broken": (BROKEN, 502, "server_error", "provider_unavailable"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_an_error_that_no_sdk_repeats_by_itself(server: Server, provider: Provider, name: str) -> None:
    script, status, kind, code = FAILURES[name]
    for ask in (complete, respond):
        provider.script(script)
        response = ask(server)
        error = error_of(response)
        assert (response.status_code, error["type"], error["code"]) == (status, kind, code)
        assert response.headers["x-should-retry"] == "false" and response.json()["message_id"] > 0


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_a_stream_is_an_event_and_never_a_silent_end(
    server: Server, provider: Provider, name: str
) -> None:
    script, _, kind, code = FAILURES[name]
    provider.script(script)
    response = complete(server, stream=True)
    found = chunks(response.text)
    assert response.status_code == 200 and found[-1]["error"]["type"] == kind and found[-1]["error"]["code"] == code
    assert all(one["choices"][0]["finish_reason"] is None for one in found[:-1])
    said = "".join(one["choices"][0]["delta"].get("content", "") for one in found[:-1])
    assert said == ("Some" if name in ("cut", "broken") else "")


def test_a_failure_of_anthropics_dialect_has_the_same_shape(server: Server, provider: Provider) -> None:
    provider.script(anthropic_error(429, "slow down"))
    assert complete(server, model="anthropic/a").status_code == 429


def test_a_stopped_completion_ends_with_stop(server: Server, provider: Provider) -> None:
    provider.script([*openai_text("Some", finish=None, usage=None, done=False), Hang()])
    with Raw(server, "POST", "/v1/chat/completions", {"model": "m", "messages": USER, "stream": True}) as raw:
        raw.read_until(b"Some")
        message_id = int(raw.data.split(b'"chatcmpl-')[1].split(b'"')[0])
        assert server.post(f"/api/v1/messages/{message_id}/stop").json()["status"] == "stopped"
        raw.read_until(b"[DONE]")
    assert b'"finish_reason":"stop"' in raw.data and b'"error"' not in raw.data


def test_a_heartbeat_is_a_comment_with_one_newline_between_frames(server: Server, provider: Provider) -> None:
    for path, body in (("/v1/chat/completions", {"messages": USER}), ("/v1/responses", {"input": "Hi"})):
        provider.script([provider.gate(path), *openai_text("Hello")], model="n")
        with Raw(server, "POST", path, {"model": "n", "stream": True, **body}) as raw:
            raw.read_until(b"\n\n\r\n5\r\n: hb\n\r\n5\r\n: hb\n\r\n")
            provider.open_gate(path)
            raw.read_until(b"Hello")
    assert b": hb\n\n" not in raw.data and b"retry:" not in raw.data and b"\nid:" not in raw.data


# ── chat completions: what stays ────────────────────────────────────────────────────────────────────────────────────


def titles(server: Server, query: str = "") -> list[str]:
    return [one["title"] for one in server.get(f"/api/v1/conversations?query={query}").json()["conversations"]]


def test_a_stored_completion_is_a_conversation(server: Server) -> None:
    complete(
        server,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Keep zebras"}],
        store=True,
    )
    assert titles(server)[0] == "Keep zebras" and titles(server, "zebras") == ["Keep zebras"]
    newest = server.get("/api/v1/conversations").json()["conversations"][0]
    conversation = server.get(f"/api/v1/conversations/{newest['id']}").json()
    assert conversation["system"] == "Be brief." and [one["role"] for one in conversation["messages"]] == [
        "user",
        "assistant",
    ]


@pytest.mark.parametrize("kind", ["completion", "response"])
def test_what_is_not_stored_is_hidden_and_leaves_nothing_behind(impatient: Server, kind: str) -> None:
    if kind == "completion":
        complete(impatient, messages=[{"role": "user", "content": "Forget walruses"}])
    else:
        assert respond(impatient, "Forget walruses", store=False).json()["store"] is False
    assert titles(impatient) == [] and titles(impatient, "walruses") == []
    wait_until(lambda: impatient.rows("SELECT count(*) FROM message") == [(0,)], "the sweep")
    for table in ("conversation", "delta", "message_fts", "conversation_fts"):
        assert impatient.rows(f"SELECT count(*) FROM {table}") == [(0,)]


def test_the_sweep_takes_what_has_ended_and_nobody_reads(tmp_path: Path) -> None:
    path = str(tmp_path / "llmchat.db")
    llmchat.prepare_database(path, suspect=False)
    target = llmchat.Target(llmchat.Provider("p", "openai", "http://p.invalid/v1"), "m")
    asked = (llmchat.Turn("user", (llmchat.Delta("text", "Hi"),)),)
    new = llmchat.NewMessage("ann", None, llmchat.UNSET, asked, None, (target,), llmchat.Parameters(), hidden=True)
    with contextlib.closing(llmchat.connect(path, read_only=False)) as connection:
        sweep = partial(llmchat.sweep_unstored, connection, llmchat.now_ms() + 60_000)
        ended, running = (llmchat.start_message(connection, new).message_id for _ in "ab")
        assert llmchat.start_message(connection, new).hidden, "nobody pays for a title that nobody sees"
        stored = llmchat.start_message(connection, replace(new, hidden=False)).message_id
        for message_id in (ended, stored):
            ending = llmchat.Ending("completed", "stop")
            outcome = llmchat.Outcome(message_id, ending, target, None, (), None, 5)
            llmchat.save_flush(connection, llmchat.Save(outcomes=[outcome]))
        assert llmchat.sweep_unstored(connection, llmchat.now_ms() - 60_000, []) is not None, "it is too early"
        assert sweep([ended]) is not None, "somebody reads it"
        assert sweep([]) is None
        left = connection.execute("SELECT id FROM message WHERE role = 'assistant' ORDER BY id").fetchall()
    assert ended not in [row[0] for row in left] and {running, stored} <= {row[0] for row in left}


def test_the_sweep_waits_for_a_slow_reader(impatient: Server, provider: Provider) -> None:
    source = random.Random(1)  # characters that JSON makes 6 bytes of: more in all than the kernel takes for a socket
    pieces = ["".join(chr(source.randrange(0x0E, 0x1F)) for _ in range(1000)) for _ in range(900)]
    provider.script(openai_text(*pieces))
    with Raw(impatient, "POST", "/v1/responses", {"model": "m", "input": "Hi", "stream": True, "store": False}) as raw:
        raw.read_until(b"response.created")
        response_id = raw.data.split(b'"id":"')[1].split(b'"')[0].decode()
        path = f"/v1/responses/{response_id}/input_items"
        message_id = int(response_id.removeprefix("resp_"))
        ended = "SELECT 1 FROM message WHERE id = ? AND status = 'completed'"
        wait_until(lambda: impatient.rows(ended, message_id), "its end", 20)
        later = complete(impatient).json()["id"].removeprefix("chatcmpl-")
        wait_until(lambda: impatient.get(f"/api/v1/messages/{later}").status_code == 404, "the sweep of a later one")
        assert impatient.get(path).status_code == 200
    wait_until(lambda: impatient.get(path).status_code == 404, "its sweep, once the reader is gone")


def test_what_is_not_stored_survives_its_client(impatient: Server, provider: Provider) -> None:
    provider.script(
        [*openai_text("Hel", finish=None, usage=None, done=False), provider.gate("walk"), *openai_text("lo")]
    )
    with Raw(impatient, "POST", "/v1/responses", {"model": "m", "input": "Hi", "stream": True, "store": False}) as raw:
        raw.read_until(b"Hel")
    wait_until(lambda: impatient.get("/api/v1/health").json()["subscribers"] == 0, "the client's end")
    response_id = raw.data.split(b'"id":"')[1].split(b'"')[0].decode()
    with Raw(impatient, "GET", f"/v1/responses/{response_id}?stream=true") as again:
        again.read_until(b"Hel")
        provider.open_gate("walk")
        again.read_until(b"response.completed")
    assert impatient.get(f"/v1/responses/{response_id}").json()["status"] == "completed"
    wait_until(lambda: impatient.get(f"/v1/responses/{response_id}").status_code == 404, "the sweep")


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeat_with_the_same_key_gets_the_same_answer_for_one_payment(
    server: Server, provider: Provider, stream: bool
) -> None:
    before, key = len(provider.chats), f"once-{stream}"
    provider.script([*openai_text("On", finish=None, usage=None, done=False), provider.gate(key), *openai_text("ce")])
    body, headers = {**ASKED, "stream": stream}, {"Idempotency-Key": key, "Content-Type": "application/json"}
    with Raw(server, "POST", "/v1/chat/completions", body, headers) as first:
        provider.wait_at_gate(key)
        with Raw(server, "POST", "/v1/chat/completions", body, headers) as second:
            provider.open_gate(key)
            for raw in (first, second):
                raw.read_until(b"[DONE]" if stream else b'"Once"')
    again = server.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    ids = {raw.split(b'"id":"')[1].split(b'"')[0] for raw in (first.data, second.data, again.content)}
    assert again.status_code == 200 and len(ids) == 1 and len(provider.chats) == before + 1
    conflict = server.post("/v1/chat/completions", {**body, "temperature": 1}, headers=headers)
    assert conflict.status_code == 409 and error_of(conflict)["code"] == "conflict"
    assert conflict.headers["x-should-retry"] == "false"


# ── errors of everything else ───────────────────────────────────────────────────────────────────────────────────────


def test_errors_have_the_shape_that_their_path_promises(server: Server) -> None:
    assert error_of(server.get("/v1/nothing"))["code"] == "not_found"
    assert error_of(server.get("/v1/chat/completions"))["code"] == "invalid_request"
    assert (
        error_of(server.post("/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"}))[
            "param"
        ]
        == "body"
    )
    assert error_of(server.get("/v1/responses/42x"))["code"] == "not_found"
    assert set(server.get("/api/v1/nothing").json()["error"]) == {"code", "message", "retryable", "request_id"}


def test_an_openai_clients_key_is_the_token_and_each_owner_sees_only_their_own(
    provider: Provider, tmp_path: Path
) -> None:
    server = Server(tmp_path, **settings(provider, LLMCHAT_USERS="ann:ann-token,bob:bob-token"))
    try:
        refused = server.get("/v1/models", headers={"Authorization": "Bearer sk-wrong"})
        assert refused.status_code == 401 and error_of(refused)["code"] == "invalid_api_key"
        ann, bob = ({"Authorization": f"Bearer {name}-token"} for name in ("ann", "bob"))
        mine = respond(server, headers=ann).json()["id"]
        item = f"msg_{mine.removeprefix('resp_')}_0"
        for path in (f"/v1/responses/{mine}", f"/v1/responses/{mine}?stream=true", f"/v1/responses/{mine}/input_items"):
            assert server.get(path, headers=ann).status_code == 200
            assert server.get(path, headers=bob).status_code == 404
        assert server.post(f"/v1/responses/{mine}/cancel", headers=bob).status_code == 404
        assert server.client.delete(f"/v1/responses/{mine}", headers=bob).status_code == 404
        assert respond(server, previous_response_id=mine, headers=bob).status_code == 404
        assert respond(server, [{"type": "item_reference", "id": item}], headers=bob).status_code == 404
        assert respond(server, previous_response_id=mine, headers=ann).status_code == 200
    finally:
        server.close()


def test_the_endpoints_are_in_the_documentation(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    listed = {(one["method"], one["path"]) for one in server.get("/api/v1/help").json()["endpoints"]}
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models/{id}"),
        ("DELETE", "/v1/responses/{id}"),
    ):
        assert (method, path) in listed and method.lower() in paths[path]
        assert path in server.get("/docs").text
    errors = paths["/v1/responses"]["post"]["responses"]["400"]["content"]["application/json"]["schema"]
    assert errors == {"$ref": "#/components/schemas/OpenAIErrorAnswer"}


# ── responses ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_response_comes_whole_and_can_be_fetched_again(server: Server, provider: Provider) -> None:
    provider.script(openai_text("Hello", usage=(9, 3)))
    given = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "max_output_tokens": 50,
        "tools": [],
    }
    response = respond(server, **given).json()
    assert response["object"] == "response" and response["status"] == "completed" and response["model"] == "openai/m"
    assert {name: response[name] for name in given} == given and response["error"] is None and response["store"] is True
    message_id = response["id"].removeprefix("resp_")
    assert response["output"] == [
        {
            "id": f"msg_{message_id}_0", "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
        }
    ]  # fmt: skip
    assert response["usage"]["total_tokens"] == 12 and response["completed_at"] >= response["created_at"]
    assert asked(provider)["messages"][0] == {"role": "system", "content": "Be brief."}
    assert server.get(f"/v1/responses/{response['id']}").json() == response
    assert server.message(int(message_id))["text"] == "Hello", "it is a view of the same message"


ITEM_TYPES = {"output_text": "message", "reasoning_text": "reasoning", "function_call_arguments": "function_call"}


def check_events(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Plays the events as the SDK's helper does; returns the last one's response. Raises AssertionError."""
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    assert [one["type"] for one in found[:2]] == ["response.created", "response.in_progress"]
    assert found[0]["response"]["status"] == "in_progress" and found[0]["response"]["output"] == []
    output: list[dict[str, Any]] = []
    texts: list[str] = []
    for one in found[2:-1]:
        kind = one["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert one["output_index"] == len(output)
            output.append(one["item"])
            texts.append("")
            continue
        assert one["output_index"] == len(output) - 1 and one.get("item_id", output[-1]["id"]) == output[-1]["id"]
        if kind == "output_item.done":
            assert {**one["item"], "status": 0, "content": 0, "arguments": 0} == {
                **output[-1],
                "status": 0,
                "content": 0,
                "arguments": 0,
            }
            output[-1] = one["item"]
        elif kind.endswith(".delta"):
            assert ITEM_TYPES[kind.removesuffix(".delta")] == output[-1]["type"]
            texts[-1] += one["delta"]
        elif not kind.startswith("content_part"):
            assert one.get("text", one.get("arguments")) == texts[-1]
    final = found[-1]["response"]
    assert final["output"] == output and isinstance(final, dict)
    return final


BUSY = [
    *openai_reasoning("Hm, ", "well.", delay=PAUSE),
    *openai_text("Hel", "lo", delay=PAUSE, finish=None, usage=None, done=False),
]
MANY: Steps = [*BUSY, *openai_tool_calls(("c1", "look", "{}"), ("c2", "look", '{"a":1}'))]
SIGNED: Steps = [
    *anthropic_thinking("Hm, ", "well.", delay=PAUSE), *anthropic_text("Hel", "lo", index=1, finish=None, delay=PAUSE),
    *anthropic_tool_use("c1", "look", "{}", index=2, finish=None),
    *anthropic_tool_use("c2", "look", '{"a":1}', index=3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "script"), [("openai/m", MANY), ("anthropic/a", SIGNED)], ids=["openai", "anthropic"]
)
def test_a_response_streams_reasoning_text_and_calls_and_replays_the_same(
    server: Server, impatient: Server, provider: Provider, model: str, script: Steps
) -> None:
    for running in (server, impatient):
        provider.script(script)
        live = respond(
            running, model=model, stream=True, tools=[{"type": "function", "name": "look", "parameters": {}}]
        ).text
        found = events(live)
        final = check_events(found)
        assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call", "function_call"]
        assert final["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm, well."}]
        assert final["output"][3]["arguments"] == '{"a":1}' and final["status"] == "completed"
        replayed = running.get(f"/v1/responses/{final['id']}?stream=true").text
        assert frames(replayed) == frames(live)
        assert running.get(f"/v1/responses/{final['id']}").json() == final
        tool = asked(provider)["tools"][0]
        assert tool.get("function", tool)["name"] == "look"


def stream_rows(server: Server, provider: Provider, *texts: str) -> bytes:
    """A streamed response, each text a row of its own: the next one is sent once the client has the one before."""
    part = {"finish": None, "usage": None, "done": False}
    gates = [f"{len(provider.chats)} {number}" for number in range(len(texts))]
    pairs = zip(texts, gates, strict=True)
    steps = [step for text, gate in pairs for step in (*openai_text(text, **part), provider.gate(gate))]  # type: ignore[arg-type]
    provider.script([*steps, *openai_text()])
    with Raw(server, "POST", "/v1/responses", {"model": "m", "input": "Hi", "stream": True}) as raw:
        for text, gate in zip(texts, gates, strict=True):
            raw.read_until(b'"delta":' + json.dumps(text).encode())
            provider.open_gate(gate)
        raw.read_until(b"0\r\n\r\n")
    return raw.data


def test_each_stored_row_is_one_event(server: Server, provider: Provider) -> None:
    live = stream_rows(server, provider, "one ", "two ", "three ")
    response_id = live.split(b'"id":"')[1].split(b'"')[0].decode()
    replayed = server.get(f"/v1/responses/{response_id}?stream=true").text
    assert [one["delta"] for one in events(replayed) if one["type"].endswith(".delta")] == ["one ", "two ", "three "]
    assert [one.encode() in live for one in frames(replayed)] == [True] * 11


def test_a_stream_goes_on_after_any_number_live_and_later(impatient: Server, provider: Provider) -> None:
    """Cut off, and resumed from every number, while it runs and when it has ended: never a gap, never twice."""
    provider.script([*BUSY, provider.gate("more"), *openai_text(" wor", "ld", delay=PAUSE)])
    with Raw(impatient, "POST", "/v1/responses", {"model": "m", "input": "Hi", "stream": True}) as raw:
        raw.read_until(b'lo"')
    response_id = raw.data.split(b'"id":"')[1].split(b'"')[0].decode()
    resumed = [
        Raw(impatient, "GET", f"/v1/responses/{response_id}?stream=true&starting_after={after}")
        for after in range(-1, 12)
    ]
    provider.wait_at_gate("more")
    provider.open_gate("more")
    for one in resumed:
        one.read_until(b"0\r\n\r\n")
    whole = impatient.get(f"/v1/responses/{response_id}?stream=true").text
    found = events(whole)
    check_events(found)
    for after, one in zip(range(-1, 12), resumed, strict=True):
        numbers = [int(part.split(b",")[0]) for part in one.data.split(b'"sequence_number":')[1:]]
        assert numbers == list(range(after + 1, len(found)))
        one.socket.close()
    for after in range(len(found)):
        rest = impatient.get(f"/v1/responses/{response_id}?stream=true&starting_after={after}").text
        assert frames(rest) == frames(whole)[after + 1 :]


def test_a_response_survives_kill_9_and_its_replay_is_the_same_before_and_after(
    provider: Provider, tmp_path: Path
) -> None:
    server = Server(tmp_path, **settings(provider))
    try:
        provider.script(MANY)
        done = respond(server, stream=True).text
        provider.script([*openai_text("Half", finish=None, usage=None, done=False), Hang()])
        half = respond(server, background=True).json()
        assert half["status"] == "queued" and half["background"] is True
        message_id = int(half["id"].removeprefix("resp_"))
        wait_until(lambda: server.content(message_id) == "Half", "the first delta")
        with Raw(server, "GET", f"/v1/responses/{half['id']}?stream=true") as raw:
            raw.read_until(b'"Half"')
        server.kill()
        server.start()
        final = events(done)[-1]["response"]
        assert frames(server.get(f"/v1/responses/{final['id']}?stream=true").text) == frames(done)
        assert server.get(f"/v1/responses/{final['id']}").json() == final
        found = events(server.get(f"/v1/responses/{half['id']}?stream=true").text)
        assert [json.dumps(one, separators=(",", ":")).encode() in raw.data for one in found[:5]] == [True] * 5
        failed = check_events(found)
        assert found[-1]["type"] == "response.failed" and failed["error"]["code"] == "server_error"
        assert failed["output"][0]["content"][0]["text"] == "Half" and failed["output"][0]["status"] == "incomplete"
        assert server.get(f"/v1/responses/{half['id']}").json() == failed
    finally:
        server.close()


def test_a_shutdown_is_an_error_to_whom_it_leaves_without_the_rest(provider: Provider, tmp_path: Path) -> None:
    server = Server(tmp_path, **settings(provider, LLMCHAT_DRAIN_SECONDS="0"))
    before = len(provider.chats)
    provider.script(*([*openai_text("Half", finish=None, usage=None, done=False), Hang()] for _ in range(4)))
    asked = [(path, stream) for path in ("/v1/chat/completions", "/v1/responses") for stream in (True, False)]
    with contextlib.ExitStack() as stack:
        body = {"model": "m", "messages": USER, "input": "Hi"}
        raws = [stack.enter_context(Raw(server, "POST", path, {**body, "stream": one})) for path, one in asked]
        provider.wait_chats(before + 4)
        answers = [row[0] for row in server.rows("SELECT id FROM message WHERE status = 'running'")]
        wait_until(lambda: [server.content(one) for one in answers] == ["Half"] * 4, "the deltas", 30)
        for raw in (raws[0], raws[2]):
            raw.read_until(b'"Half"')
        assert server.terminate() == 0
        chat_stream, chat_whole, response_stream, response_whole = (raw.read_to_end() for raw in raws)
    assert b'"error":{' in chat_stream and b"[DONE]" in chat_stream and b'"finish_reason":"stop"' not in chat_stream
    assert b"event: response.failed" in response_stream
    for whole in (chat_whole, response_whole):
        assert whole.startswith(b"HTTP/1.1 500") and b"x-should-retry: false" in whole and b'"server_error"' in whole


def merge_rows(server: Server, message_id: int) -> None:
    """What the sweep of old deltas does: neighbouring rows of one kind become one."""
    with contextlib.closing(sqlite3.connect(server.db, timeout=10)) as connection, connection:
        rows = connection.execute(
            "SELECT offset, kind, text FROM delta WHERE message_id = ? ORDER BY offset", (message_id,)
        ).fetchall()
        connection.execute("DELETE FROM delta WHERE message_id = ?", (message_id,))
        merged: list[list[Any]] = []
        for offset, kind, text in rows:
            if merged and merged[-1][1] == kind and kind in ("text", "reasoning"):
                merged[-1][2] += text
            else:
                merged.append([offset, kind, text])
        connection.executemany(
            "INSERT INTO delta (message_id, offset, kind, text) VALUES (?, ?, ?, ?)",
            [(message_id, *row) for row in merged],
        )


def test_once_rows_are_merged_a_replay_is_still_valid_and_whole(server: Server, provider: Provider) -> None:
    live = stream_rows(server, provider, "one ", "two ", "three ")
    response_id = live.split(b'"id":"')[1].split(b'"')[0].decode()
    before = events(server.get(f"/v1/responses/{response_id}?stream=true").text)
    merge_rows(server, int(response_id.removeprefix("resp_")))
    after = events(server.get(f"/v1/responses/{response_id}?stream=true").text)
    assert len(after) < len(before) and check_events(after) == before[-1]["response"]
    beyond = events(server.get(f"/v1/responses/{response_id}?stream=true&starting_after={len(before) - 2}").text)
    assert [one["type"] for one in beyond] == ["response.completed"] and beyond[0]["response"] == before[-1]["response"]


@pytest.mark.parametrize("starting_after", ["x", "-2", "1.5"])
def test_a_number_that_is_none_is_refused(server: Server, starting_after: str) -> None:
    response_id = respond(server).json()["id"]
    response = server.get(f"/v1/responses/{response_id}?stream=true&starting_after={starting_after}")
    assert response.status_code == 400 and error_of(response)["param"] == "starting_after"


def test_a_cancelled_response_ends_as_incomplete_with_what_it_had(server: Server, provider: Provider) -> None:
    provider.script([*openai_text("Some", finish=None, usage=None, done=False), Hang()])
    with Raw(server, "POST", "/v1/responses", {"model": "m", "input": "Hi", "stream": True}) as raw:
        raw.read_until(b'"Some"')
        response_id = raw.data.split(b'"id":"')[1].split(b'"')[0].decode()
        cancelled = server.post(f"/v1/responses/{response_id}/cancel").json()
        raw.read_until(b"0\r\n\r\n")
    assert cancelled["status"] == "cancelled" and cancelled["output"][0]["content"][0]["text"] == "Some"
    assert b"event: response.incomplete" in raw.data and b'"status":"cancelled"' in raw.data
    assert (
        server.post(f"/v1/responses/{response_id}/cancel").json()
        == cancelled
        == server.get(f"/v1/responses/{response_id}").json()
    )
    assert (
        provider.chats[-1].wait_closed()
        and error_of(server.post("/v1/responses/resp_999999/cancel"))["code"] == "not_found"
    )


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_response_says_so_in_its_stream(server: Server, provider: Provider, name: str) -> None:
    provider.script(FAILURES[name][0])
    found = events(respond(server, stream=True).text)
    final = check_events(found)
    assert found[-1]["type"] == "response.failed" and final["status"] == "failed" and final["error"]["message"]
    assert final["error"]["code"] in ("server_error", "rate_limit_exceeded", "invalid_prompt")
    assert server.get(f"/v1/responses/{final['id']}").json() == final


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_an_answer_that_the_provider_cut_is_incomplete(
    server: Server, provider: Provider, finish: str, reason: str
) -> None:
    provider.script(openai_text("Some", finish=finish))
    found = events(respond(server, stream=True).text)
    final = check_events(found)
    assert found[-1]["type"] == "response.incomplete" and final["status"] == "incomplete"
    assert final["incomplete_details"] == {"reason": reason}


def test_a_background_response_is_queued_at_once_and_ends_by_itself(server: Server, provider: Provider) -> None:
    provider.script([provider.gate("background"), *openai_text("Hello")])
    queued = respond(server, background=True).json()
    assert queued["status"] == "queued" and queued["output"] == []
    assert server.get(f"/v1/responses/{queued['id']}").json()["status"] == "in_progress"
    provider.open_gate("background")
    wait_until(lambda: server.get(f"/v1/responses/{queued['id']}").json()["status"] == "completed", "its end")


# ── responses: what they are asked with ─────────────────────────────────────────────────────────────────────────────


def test_a_response_follows_another_without_its_instructions(server: Server, provider: Provider) -> None:
    provider.script(openai_text("One"), openai_text("Two"), openai_text("Three"))
    first = respond(server, "First?", instructions="Be brief.").json()
    second = respond(server, "Second?", previous_response_id=first["id"]).json()
    assert [(one["role"], one["content"]) for one in asked(provider)["messages"]] == [
        ("user", "First?"), ("assistant", "One"), ("user", "Second?"),
    ]  # fmt: skip
    assert second["previous_response_id"] == first["id"] and second["instructions"] is None
    respond(server, "Other?", previous_response_id=first["id"], instructions="In French.")
    assert [one["content"] for one in asked(provider)["messages"]] == ["In French.", "First?", "One", "Other?"]
    conversation = server.message(int(first["id"].removeprefix("resp_")))["conversation_id"]
    assert server.message(int(second["id"].removeprefix("resp_")))["conversation_id"] == conversation


def test_an_unstored_response_follows_a_stored_one_and_nothing_follows_it(server: Server, provider: Provider) -> None:
    first = respond(server, "First?").json()
    second = respond(server, "Second?", previous_response_id=first["id"], store=False).json()
    assert [one["role"] for one in asked(provider)["messages"]] == ["user", "assistant", "user"]
    ids = [int(one["id"].removeprefix("resp_")) for one in (first, second)]
    assert server.message(ids[0])["conversation_id"] != server.message(ids[1])["conversation_id"]
    refused = respond(server, "Third?", previous_response_id=second["id"])
    assert refused.status_code == 404 and error_of(refused)["param"] == "previous_response_id"
    for unknown in ("resp_999999", "42", "resp_x"):
        assert respond(server, previous_response_id=unknown).status_code == 404


def test_a_running_response_cannot_be_followed_yet(server: Server, provider: Provider) -> None:
    before = len(provider.chats)
    provider.script([Hang()])
    running = respond(server, background=True).json()
    provider.wait_chats(before + 1)
    response = respond(server, previous_response_id=running["id"])
    assert response.status_code == 409 and error_of(response)["param"] == "previous_response_id"
    server.post(f"/v1/responses/{running['id']}/cancel")


@pytest.mark.parametrize("model", ["openai/m", "anthropic/a"])
@pytest.mark.parametrize("how", ["previous", "items", "references"])
def test_a_functions_output_goes_back_to_its_call(server: Server, provider: Provider, model: str, how: str) -> None:
    provider.script(
        SIGNED if model == "anthropic/a" else MANY, (anthropic_text if model == "anthropic/a" else openai_text)("Done")
    )
    tools = [{"type": "function", "name": "look", "parameters": {"type": "object"}}]
    first = respond(server, "Look", model=model, tools=tools, reasoning={"effort": "low"}).json()
    outputs = [{"type": "function_call_output", "call_id": call, "output": f"result {call}"} for call in ("c1", "c2")]
    history = {
        "previous": [],
        "items": [{"role": "user", "content": "Look"}, *first["output"]],
        "references": [
            {"role": "user", "content": "Look"},
            *({"type": "item_reference", "id": one["id"]} for one in first["output"]),
        ],
    }[how]
    previous = first["id"] if how == "previous" else None
    options = {"model": model, "tools": tools, "previous_response_id": previous, "reasoning": {"effort": "low"}}
    second = respond(server, [*history, *outputs], **options)
    assert second.status_code == 200 and second.json()["output"][0]["content"][0]["text"] == "Done"
    sent = json.dumps(asked(provider)["messages"])
    assert [sent.count(word) for word in ("result c1", "result c2", "Hello", "Look")] == [1, 1, 1, 1]
    if model == "anthropic/a":
        assert ("c2lnbmF0dXJl" in sent) is (how != "items"), "signed reasoning goes back where its signature is known"


CALL_ITEM = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "a cat"}


@pytest.mark.parametrize("store", [True, False])
def test_an_output_is_refused_unless_the_previous_response_called_for_it(
    server: Server, provider: Provider, store: bool
) -> None:
    provider.script(MANY, openai_text("Two of them."), openai_text("Done"))
    tools = [{"type": "function", "name": "look", "parameters": {"type": "object"}}]
    first = respond(server, "Look", tools=tools).json()
    options = {"previous_response_id": first["id"], "tools": tools, "store": store}
    refused = respond(server, [{**OUTPUT, "call_id": "c9"}], **options)
    assert refused.status_code == 400 and error_of(refused)["param"] == "input.0.call_id"
    assert "'c9'" in error_of(refused)["message"]
    hurried = [{**OUTPUT, "call_id": "c2"}, {"role": "developer", "content": "Be brief."}, OUTPUT]
    assert respond(server, hurried, **options).status_code == 200
    assert [one["role"] for one in asked(provider)["messages"]] == ["user", "assistant", "tool", "tool", "system"]


def test_every_kind_of_input_goes_upstream(server: Server, provider: Provider) -> None:
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "auto"}
    given = [
        {"role": "developer", "content": "In English."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "See"}, image]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "A cat", "annotations": []}],
        },
        {"role": "user", "content": "Sure?"},
    ]
    form = {"type": "json_schema", "name": "cat", "schema": {"type": "object"}, "strict": True}
    response = respond(
        server,
        given,
        text={"format": form},
        tool_choice={"type": "function", "name": "look"},
        tools=[{**TOOL["function"], "type": "function"}],
    )
    assert response.status_code == 200 and response.json()["text"] == {"format": form}
    sent = asked(provider)
    assert [one["role"] for one in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["messages"][1]["content"][1]["image_url"]["url"].endswith(PNG)
    assert sent["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "cat", "schema": {"type": "object"}, "strict": True},
    }
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "look"}} and sent["tools"] == [TOOL]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input.0.type"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        ({"input": [{"role": "user", "content": "x"}, OUTPUT]}, "input.1.call_id"),
        ({"input": [{"role": "user", "content": "x"}, OUTPUT, CALL_ITEM]}, "input.1.call_id"),
        ({"input": [CALL_ITEM, {**OUTPUT, "call_id": "c2"}]}, "input.1.call_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
)
def test_what_no_response_can_be_asked_with_is_refused(server: Server, body: dict[str, Any], param: str) -> None:
    response = respond(server, **{"input": "Hi", **body})
    assert response.status_code == 400 and error_of(response)["param"] == param, response.text


@pytest.mark.parametrize("identity", ["msg_999999_0", "msg_1_99", "rs_x", "item"])
def test_a_reference_to_no_item_is_not_found(server: Server, identity: str) -> None:
    response = respond(server, [{"type": "item_reference", "id": identity}])
    assert response.status_code == 404 and error_of(response)["param"] == "input.0.id"


def test_input_items_come_in_pages(server: Server) -> None:
    first = respond(server, [{"role": "user", "content": text} for text in ("one", "two", "three")]).json()
    path = f"/v1/responses/{first['id']}/input_items"
    newest = server.get(path).json()
    assert [one["content"][0]["text"] for one in newest["data"]] == ["three", "two", "one"] and newest[
        "has_more"
    ] is False
    page = server.get(f"{path}?order=asc&limit=2").json()
    assert [one["content"][0]["text"] for one in page["data"]] == ["one", "two"] and page["has_more"] is True
    rest = server.get(f"{path}?order=asc&limit=2&after={page['last_id']}").json()
    assert [one["id"] for one in rest["data"]] == [newest["first_id"]] and rest["has_more"] is False
    second = respond(server, "more", previous_response_id=first["id"]).json()
    assert len(server.get(f"/v1/responses/{second['id']}/input_items").json()["data"]) == 1
    for query in ("limit=0", "order=up", "after=msg_x"):
        assert server.get(f"{path}?{query}").status_code == 400


def test_a_deleted_response_is_gone_with_its_input_and_what_follows_stays(server: Server, provider: Provider) -> None:
    first = respond(server, "About pelicans").json()
    second = respond(server, "Second?", previous_response_id=first["id"]).json()
    path = f"/v1/responses/{first['id']}"
    assert server.client.delete(path).json() == {"id": first["id"], "object": "response", "deleted": True}
    assert server.get(path).status_code == server.client.delete(path).status_code == 404
    assert server.get("/api/v1/conversations?query=pelicans").json()["conversations"][0]["match"]["message_id"] is None
    respond(server, "Third?", previous_response_id=second["id"])
    assert [one["content"] for one in asked(provider)["messages"] if one["role"] == "user"] == ["Second?", "Third?"]


def test_deleting_the_only_response_deletes_its_conversation_even_while_it_runs(
    server: Server, provider: Provider
) -> None:
    before = len(provider.chats)
    provider.script([Hang()])
    running = respond(server, "Delete me", background=True).json()
    provider.wait_chats(before + 1)
    conversation = server.message(int(running["id"].removeprefix("resp_")))["conversation_id"]
    assert server.client.delete(f"/v1/responses/{running['id']}").json()["deleted"] is True
    assert server.get(f"/api/v1/conversations/{conversation}").status_code == 404
    assert provider.chats[-1].wait_closed()


def test_an_answer_of_the_page_is_a_response_too(server: Server, provider: Provider) -> None:
    answer = server.post(
        "/api/v1/chat", {"message": "Hi", "model": "openai/m", "system": "Be kind.", "stream": False}
    ).json()
    response = server.get(f"/v1/responses/resp_{answer['id']}").json()
    assert response["output"][0]["content"][0]["text"] == answer["text"] and response["model"] == "openai/m"
    assert server.get(f"/v1/responses/resp_{answer['parent_id']}").status_code == 404, "a question is no response"
    respond(server, "And?", previous_response_id=response["id"])
    assert [one["role"] for one in asked(provider)["messages"]] == ["system", "user", "assistant", "user"]


# ── the official package, in its newest form ────────────────────────────────────────────────────────────────────────


def test_the_newest_openai_package_works_unchanged(server: Server, provider: Provider) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2)
    with client:
        assert "openai/m" in [one.id for one in client.models.list()]
        provider.script(
            openai_text("Hello"), [*openai_reasoning("Hm"), *openai_text("Hel", "lo")], split_text("Hel", "lo")
        )
        assert client.chat.completions.create(model="m", messages=USER).choices[0].message.content == "Hello"
        with client.chat.completions.stream(model="m", messages=USER) as stream:
            assert stream.get_final_completion().choices[0].message.content == "Hello"
        stream = client.responses.create(model="m", input="Hi", background=True, stream=True)
        response_id = next(iter(stream)).response.id
        stream.close()
        with client.responses.stream(response_id=response_id, starting_after=4) as resumed:
            numbers = [event.sequence_number for event in resumed]
            assert numbers == list(range(5, 5 + len(numbers))) and resumed.get_final_response().output_text == "Hello"
        provider.script(CUT)
        with pytest.raises(openai.APIError, match="broke before the answer was finished"):
            list(client.chat.completions.create(model="m", messages=USER, stream=True))
        before = len(provider.chats)
        provider.script(CUT)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="m", messages=USER)
        assert len(provider.chats) == before + 1, "the package does not pay for it once more"
