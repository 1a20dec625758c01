"""Before the first delta: retries, lessons of a refusal, fallbacks. And stop, which may come at any time."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llmchat import ProviderError, ProviderUnavailable, retry_after_seconds, retry_delay
from tests import provider as wire
from tests.client import Reader
from tests.conftest import Server, wait_until
from tests.provider import Answer, Hang, Provider, Request, Script, Step, openai_error, openai_text, unused_port

# ── pure ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, float("inf")),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9.0),
        ({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}, 0.0),
        ({"retry-after": "Mon, 99 Foo 2001"}, None),
    ],
)
def test_retry_after_is_read_in_every_form(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_seconds(httpx.Headers(headers)) == seconds


def test_retry_after_is_read_as_a_date() -> None:
    wait = retry_after_seconds({"retry-after": email.utils.formatdate(time.time() + 90, usegmt=True)})
    assert wait is not None and 80 < wait <= 90


def transient(seconds: float | None = None) -> ProviderError:
    return ProviderUnavailable("gone", transient=True, retry_after_seconds=seconds)


def test_the_delay_doubles_is_jittered_and_bounded() -> None:
    for attempt, middle in enumerate([0.5, 1, 2, 4, 8, 8, 8], 1):
        delays = [retry_delay(transient(), attempt) or 0.0 for _ in range(200)]
        assert middle * 0.75 <= min(delays) < middle * 0.9 and middle * 1.1 < max(delays) <= middle * 1.25


def test_a_provider_that_says_how_long_is_believed_up_to_two_minutes() -> None:
    assert retry_delay(transient(3.0), 1) == 3.0
    assert retry_delay(transient(0.0), 5) == 0.0
    assert retry_delay(transient(120.0), 1) == 120.0
    assert retry_delay(transient(120.1), 1) is None
    assert retry_delay(transient(float("inf")), 1) is None


def test_what_is_not_transient_is_not_tried_again() -> None:
    assert retry_delay(ProviderUnavailable("gone", retry_after_seconds=1.0), 1) is None


# ── through the service ─────────────────────────────────────────────────────────────────────────────────────────────

NAMES = ("openai", "alpha", "beta", "gamma", "delta", "spare")


def settings(provider: Provider, **more: str) -> dict[str, str]:
    addresses = {f"{name.upper()}_BASE_URL": provider.base_url for name in NAMES}
    keys = {"OPENAI_API_KEY": "sk-wrong", "ANTHROPIC_API_KEY": "sk-ant"}
    return {**addresses, **keys, "ANTHROPIC_BASE_URL": provider.origin, **more}


@pytest.fixture(scope="module")
def service(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("retries"), **settings(shared_provider)) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With fallbacks of its own, and little patience for a first delta."""
    more = {"LLMCHAT_FALLBACKS": "spare/env, anthropic/env-2", "LLMCHAT_FIRST_DELTA_TIMEOUT_SECONDS": "2"}
    with Server(tmp_path_factory.mktemp("impatient"), **settings(shared_provider, **more)) as server:
        yield server


def ask(server: Server, **more: Any) -> tuple[Reader, list[Any], dict[str, Any]]:
    """A streamed chat: what its reader holds, its notices, and the message afterwards."""
    reader, notices, message_id = Reader(), [], 0
    with server.chat(**more) as stream:
        for event in stream.events():
            reader.take(event)
            if event.name == "start":
                message_id = event.data["message_id"]
            elif event.name == "notice":
                assert event.id is None
                notices.append(event.data)
    message = server.message(message_id)
    assert reader.end is not None and message["status"] == reader.end["status"]
    assert reader.content == server.content(message_id)
    return reader, notices, message


def requests_for(provider: Provider, model: str) -> list[Request]:
    return [request for request in provider.chats if request.field("model") == model]


def test_http_529_twice_and_then_an_answer_is_two_notices_and_one_answer(service: Server, provider: Provider) -> None:
    busy = openai_error(529, "Overloaded", "overloaded_error", retry_after_ms="20")
    provider.script(busy, busy, openai_text("Here ", "I am"), model="busy")
    reader, notices, message = ask(service, model="openai/busy")
    assert reader.content == "Here I am" and message["status"] == "completed" and message["error"] is None
    assert [(notice["code"], notice["attempt"], notice["delay_ms"]) for notice in notices] == [
        ("retrying", 2, 20),
        ("retrying", 3, 20),
    ]
    assert {notice["error"]["code"] for notice in notices} == {"provider_unavailable"}
    assert {notice["error"]["message"] for notice in notices} == {"openai answered 529: Overloaded"}
    failed = {"code": "provider_unavailable", "message": "openai answered 529: Overloaded", "retryable": True}
    assert [attempt["error"] for attempt in message["attempts"]] == [failed, failed, None]
    assert all(attempt["provider"] == "openai" and attempt["model"] == "busy" for attempt in message["attempts"])
    assert all(isinstance(attempt["ms"], int) and attempt["ms"] >= 0 for attempt in message["attempts"])
    first, second, third = requests_for(provider, "busy")
    assert second.arrived_at - first.arrived_at >= 0.02 and third.arrived_at - second.arrived_at >= 0.02


def test_a_wrong_key_is_not_tried_again_and_the_error_says_which_variable_to_look_at(
    service: Server, provider: Provider
) -> None:
    provider.script(openai_error(401, "Incorrect API key", code="invalid_api_key"), model="locked")
    reader, notices, message = ask(service, model="openai/locked")
    assert message["error"]["code"] == "provider_auth" and "check OPENAI_API_KEY" in message["error"]["message"]
    assert "sk-wrong" not in json.dumps(message) and not message["error"]["retryable"]
    assert notices == [] and len(requests_for(provider, "locked")) == 1 and reader.content == ""
    found = {one["name"]: one["key"] for one in service.get("/api/v1/help").json()["providers"]}
    assert found["openai"] == "rejected" and found["alpha"] == "not needed"
    ask(service, model="openai/unlocked")
    found = {one["name"]: one["key"] for one in service.get("/api/v1/help").json()["providers"]}
    assert found["openai"] == "found"


def test_attempts_end_after_three_and_the_last_error_counts(service: Server, provider: Provider) -> None:
    answers = [openai_error(503, f"no {number}", retry_after_ms="1") for number in (1, 2, 3, 4)]
    provider.script(*answers, model="hopeless")
    _, notices, message = ask(service, model="openai/hopeless")
    assert message["error"]["message"] == "openai answered 503: no 3"
    assert len(notices) == 2 and len(message["attempts"]) == 3


def test_a_retry_date_is_waited_for(service: Server, provider: Provider) -> None:
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    provider.script(openai_error(429, "slow", retry_after=date), model="dated")
    with service.chat(model="openai/dated") as stream:
        start, notice = stream.take(2)
        assert notice.name == "notice" and 30_000 < notice.data["delay_ms"] <= 60_000
        assert service.post(f"/api/v1/messages/{start.data['message_id']}/stop").json()["status"] == "stopped"


# ── what a refusal teaches ──────────────────────────────────────────────────────────────────────────────────────────

FASTAPI = {
    "detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "Extra inputs not permitted"}]
}
PARAM = {"error": {"message": "Unknown parameter.", "param": "stream_options", "type": "invalid_request_error"}}


@pytest.mark.parametrize(
    ("name", "status", "body"),
    [("alpha", 400, PARAM), ("beta", 422, FASTAPI)],
    ids=["in OpenAI's shape", "in FastAPI's"],
)
def test_stream_options_are_dropped_when_a_provider_refuses_them_and_never_sent_again(
    service: Server, provider: Provider, name: str, status: int, body: Any
) -> None:
    provider.script(wire.json_answer(body, status), model=f"{name}-strict")
    reader, notices, message = ask(service, model=f"{name}/{name}-strict")
    assert message["status"] == "completed" and reader.content and notices == [] and len(message["attempts"]) == 1
    ask(service, model=f"{name}/{name}-strict")
    sent = [request.field("stream_options") for request in requests_for(provider, f"{name}-strict")]
    assert sent == [{"include_usage": True}, None, None]


def test_max_tokens_becomes_max_completion_tokens_when_a_provider_says_so_also_after_another_lesson(
    service: Server, provider: Provider
) -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    provider.script(wire.json_answer(PARAM, 400), openai_error(400, words), model="gamma-o")
    _, _, message = ask(service, model="gamma/gamma-o", max_tokens=7)
    assert message["status"] == "completed"
    bodies = [request.json for request in requests_for(provider, "gamma-o")]
    assert [("max_tokens" in body, "max_completion_tokens" in body, "stream_options" in body) for body in bodies] == [
        (True, False, True),
        (True, False, False),
        (False, True, False),
    ]
    assert bodies[-1]["max_completion_tokens"] == 7


def test_ids_of_tool_calls_become_what_mistrals_models_take_when_another_provider_has_one(
    service: Server, provider: Provider
) -> None:
    words = "Tool call id was call_1 but must be a-z, A-Z, 0-9, with a length of 9."
    provider.script(openai_error(400, words), model="beta-devstral")
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a cat"},
    ]
    response = service.post("/v1/chat/completions", {"model": "beta/beta-devstral", "messages": messages})
    assert response.status_code == 200, response.text
    first, second = (request.json["messages"][1:] for request in requests_for(provider, "beta-devstral"))
    assert first[0]["tool_calls"][0]["id"] == first[1]["tool_call_id"] == "call_1"
    assert second[0]["tool_calls"][0]["id"] == second[1]["tool_call_id"] != "call_1"
    assert len(second[1]["tool_call_id"]) == 9 and second[1]["tool_call_id"].isalnum()


def test_a_field_that_is_refused_although_it_was_left_out_is_an_error(service: Server, provider: Provider) -> None:
    provider.script(wire.json_answer(PARAM, 400), wire.json_answer(PARAM, 400), model="delta-odd")
    _, _, message = ask(service, model="delta/delta-odd")
    assert message["error"]["code"] == "provider_rejected" and len(requests_for(provider, "delta-odd")) == 2


# ── fallbacks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_when_a_provider_fails_before_its_first_delta_the_fallback_answers(service: Server, provider: Provider) -> None:
    provider.script(openai_error(400, "No such model"), model="first")
    reader, notices, message = ask(service, model="openai/first", fallbacks=["anthropic/second", "spare/third"])
    assert (message["status"], message["provider"], message["model"]) == ("completed", "anthropic", "second")
    assert [(one["code"], one["to"], one["error"]["code"]) for one in notices] == [
        ("falling_back", "anthropic/second", "provider_rejected")
    ]
    attempts = [(one["provider"], one["model"], one["error"] and one["error"]["code"]) for one in message["attempts"]]
    assert attempts == [("openai", "first", "provider_rejected"), ("anthropic", "second", None)]
    assert reader.content == "".join(wire.default_answer("Hello")) and not requests_for(provider, "third")


def test_fallbacks_come_after_all_retries_and_have_retries_of_their_own(service: Server, provider: Provider) -> None:
    busy = openai_error(503, "busy", retry_after_ms="1")
    provider.script(busy, busy, busy, model="busy-1")
    provider.script(busy, openai_text("At last"), model="busy-2")
    reader, notices, message = ask(service, model="openai/busy-1", fallbacks=["spare/busy-2"])
    assert [notice["code"] for notice in notices] == ["retrying", "retrying", "falling_back", "retrying"]
    assert reader.content == "At last" and len(message["attempts"]) == 5


def test_a_provider_that_cannot_be_reached_falls_back(
    provider: Provider, tmp_path_factory: pytest.TempPathFactory
) -> None:
    given = settings(provider, OPENAI_BASE_URL=f"http://127.0.0.1:{unused_port()}/v1", LLMCHAT_ATTEMPTS="1")
    with Server(tmp_path_factory.mktemp("unreachable"), **given) as server:
        _, _, message = ask(server, model="openai/x", fallbacks=["spare/reached"])
        assert (message["status"], message["provider"]) == ("completed", "spare")
        assert "Connection refused" in message["attempts"][0]["error"]["message"]


def test_after_the_first_delta_nothing_is_tried_again(service: Server, provider: Provider) -> None:
    cut: list[Step] = [*openai_text("Half an ans", finish=None, usage=None, done=False), wire.Reset()]
    provider.script(cut, model="cut")
    reader, notices, message = ask(service, model="openai/cut", fallbacks=["spare/unused"])
    assert message["error"]["code"] == "provider_truncated" and message["error"]["retryable"]
    assert reader.content == "Half an ans" and notices == [] and not requests_for(provider, "unused")


def test_when_every_fallback_fails_the_last_error_counts_and_all_are_kept(service: Server, provider: Provider) -> None:
    provider.script(openai_error(400, "one"), model="f-1")
    provider.script(openai_error(404, "two"), model="f-2")
    _, notices, message = ask(service, model="openai/f-1", fallbacks=["spare/f-2"])
    assert message["error"]["message"] == "spare answered 404: two" and message["model"] == "f-2"
    assert len(notices) == 1 and [one["error"]["message"][-3:] for one in message["attempts"]] == ["one", "two"]


def test_an_unknown_fallback_is_refused_before_anything_is_asked(service: Server, provider: Provider) -> None:
    body = {"message": "Hello", "model": "openai/never", "fallbacks": ["nobody/x"]}
    response = service.post("/api/v1/chat", body)
    assert response.status_code == 400 and "fallbacks" in response.json()["error"]["message"]
    assert not requests_for(provider, "never")


def test_silence_before_the_first_delta_falls_back_to_what_the_environment_names(
    impatient: Server, provider: Provider
) -> None:
    provider.script([Hang()], model="silent")
    _, notices, message = ask(impatient, model="openai/silent")
    assert (message["status"], message["provider"], message["model"]) == ("completed", "spare", "env")
    assert [notice["code"] for notice in notices] == ["falling_back"]
    assert message["attempts"][0]["error"]["code"] == "stalled"
    assert requests_for(provider, "silent")[0].connection.closed_by == "client"


def test_the_environments_fallbacks_are_tried_in_order(impatient: Server, provider: Provider) -> None:
    provider.script(openai_error(400, "one"), model="wrong")
    provider.script(openai_error(400, "two"), model="env")
    _, _, message = ask(impatient, model="openai/wrong")
    assert [one["model"] for one in message["attempts"]] == ["wrong", "env", "env-2"]


def test_a_request_that_names_no_fallback_overrules_the_environment(impatient: Server, provider: Provider) -> None:
    provider.script(openai_error(400, "one"), model="alone")
    _, _, message = ask(impatient, model="openai/alone", fallbacks=[])
    assert message["error"]["code"] == "provider_rejected" and len(message["attempts"]) == 1


# ── stop, at any time ───────────────────────────────────────────────────────────────────────────────────────────────

PHASES: dict[str, list[Script]] = {
    "before the head": [Answer(before=[Hang()])],
    "after the head": [[Hang()]],
    "between attempts": [openai_error(503, "later", retry_after="60")],
    "in the middle": [[*openai_text("Some", finish=None, usage=None, done=False), Hang()]],
    "after the finish_reason": [[*openai_text("Some", done=False), Hang()]],
    "within an error's body": [Answer(401, {"content-type": "text/plain"}, [wire.Send(b"no"), Hang()])],
}


@pytest.mark.parametrize("phase", PHASES)
def test_stop_ends_a_generation_in_every_phase(service: Server, provider: Provider, phase: str) -> None:
    provider.script(*PHASES[phase], model=phase)
    with service.chat(model=f"openai/{phase}", fallbacks=["spare/not-asked"]) as stream:
        reader = Reader()
        reader.read(stream, 2 if phase in ("in the middle", "after the finish_reason", "between attempts") else 1)
        wait_until(lambda: requests_for(provider, phase), "the request")
        message_id = service.get("/api/v1/generations").json()["generations"][0]["message_id"]
        stopped = service.post(f"/api/v1/messages/{message_id}/stop")
        assert stopped.status_code == 200 and stopped.json()["status"] == "stopped"
        reader.read(stream)
    message = service.message(message_id)
    assert reader.end is not None and (reader.end["status"], message["status"], message["error"]) == (
        "stopped",
        "stopped",
        None,
    )
    assert (
        reader.content == message["text"] == ("Some" if phase in ("in the middle", "after the finish_reason") else "")
    )
    (attempt,) = message["attempts"]
    assert (attempt["provider"], attempt["model"]) == ("openai", phase)
    (request,) = requests_for(provider, phase)
    if not request.answered_whole:
        request.wait_closed()
        assert request.connection.closed_by == "client"
    assert not requests_for(provider, "not-asked")


# ── connections ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_answer_leaves_its_connection_open_to_be_used_again(service: Server, provider: Provider) -> None:
    for _ in range(3):
        ask(service, model="openai/reuse")
    requests = requests_for(provider, "reuse")
    assert all(request.answered_whole and request.closed_at is None for request in requests)
    assert requests[1].connection is requests[2].connection


# ── what goes back with the next question ───────────────────────────────────────────────────────────────────────────


def conversation_of(server: Server, message: dict[str, Any]) -> dict[str, Any]:
    return {"conversation_id": message["conversation_id"]}


def test_signed_thinking_goes_back_to_the_provider_that_signed_it_and_to_no_other(
    service: Server, provider: Provider
) -> None:
    thinking = [*wire.anthropic_thinking("Hm. ", "Yes.", signature="c2ln"), *wire.anthropic_text("Yes!", index=1)]
    provider.script(thinking, model="thinker")
    _, _, message = ask(service, model="anthropic/thinker")
    assert [part["kind"] for part in message["content"]] == ["reasoning", "signature", "text"]
    ask(service, message="Sure?", model="anthropic/thinker", **conversation_of(service, message))
    ask(service, message="Really?", model="openai/other", **conversation_of(service, message))
    second = requests_for(provider, "thinker")[1].json["messages"]
    assert second[1] == {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm. Yes.", "signature": "c2ln"},
            {"type": "text", "text": "Yes!"},
        ],
    }
    third = requests_for(provider, "other")[0].json["messages"]
    assert third[1] == {"role": "assistant", "content": "Yes!"} and "c2ln" not in json.dumps(third)


def test_a_tool_call_is_one_delta_and_without_a_result_it_does_not_go_back(service: Server, provider: Provider) -> None:
    call = ("call_1", "get_weather", '{"city":"Zürich"}')
    provider.script(wire.openai_tool_calls(call, size=3), model="tools")
    tools = [{"name": "get_weather", "parameters": {"type": "object"}}]
    _, _, message = ask(service, model="openai/tools", tools=tools)
    assert message["finish_reason"] == "tool_calls"
    (part,) = message["content"]
    assert part["kind"] == "tool_call"
    assert json.loads(part["text"]) == {"id": "call_1", "name": "get_weather", "arguments": '{"city":"Zürich"}'}
    ask(service, message="Never mind", model="openai/tools", **conversation_of(service, message))
    first, second = requests_for(provider, "tools")
    assert first.json["tools"] == [{"type": "function", "function": tools[0]}]
    assert second.json["messages"] == [{"role": "user", "content": "Hello\n\nNever mind"}]


def test_a_failed_answer_without_a_character_leaves_no_gap_in_the_next_request(
    service: Server, provider: Provider
) -> None:
    provider.script(openai_error(400, "no"), model="gap")
    _, _, message = ask(service, model="openai/gap")
    ask(service, message="Again", model="openai/gap", **conversation_of(service, message))
    assert requests_for(provider, "gap")[1].json["messages"] == [{"role": "user", "content": "Hello\n\nAgain"}]


def test_usage_of_an_answer_that_was_cut_is_an_estimate(service: Server, provider: Provider) -> None:
    provider.script([*wire.anthropic_text("x" * 400, finish=None, usage=(77, 1)), wire.Cut()], model="counted")
    _, _, message = ask(service, model="anthropic/counted")
    assert message["usage"]["input_tokens"] == 77
    assert message["usage"]["output_tokens"] == 100 and message["usage"]["estimated"] is True


def test_tokens_that_nobody_counted_are_guessed_by_script(service: Server, provider: Provider) -> None:
    scripts = [wire.openai_text(text, usage=None) for text in ("你好，世界！", "abcd efgh")]
    provider.script(*scripts, model="uncounted")
    usages = [ask(service, model="openai/uncounted")[2]["usage"] for _ in scripts]
    assert [usage["output_tokens"] for usage in usages] == [6, 3] and all(usage["estimated"] for usage in usages)


def test_the_log_of_all_this_holds_no_traceback_and_no_key(service: Server) -> None:
    log = "".join(service.log)
    assert "Traceback" not in log and "sk-wrong" not in log and "generation ended" in log
