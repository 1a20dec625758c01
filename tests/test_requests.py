"""What bad input gets: the error shape with the field, its limit and its value, and nothing half-created."""

from __future__ import annotations

import itertools
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import llmchat
from tests.client import EventStream, Reader
from tests.conftest import Server
from tests.guarantees import running_server
from tests.provider import Provider, default_answer, openai_text

JSON = {"content-type": "application/json"}
COUNTS = "SELECT (SELECT count(*) FROM conversation), (SELECT count(*) FROM message), (SELECT count(*) FROM delta)"


@pytest.fixture(scope="module")
def shared_provider() -> Iterator[Provider]:
    with Provider(words=5) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, shared_provider: Provider) -> Iterator[Server]:
    """One server for the module: what it refuses leaves nothing behind. Conversation 1 has messages 1 and 2."""
    folder, more = tmp_path_factory.mktemp("requests"), {"OLLAMA_BASE_URL": shared_provider.base_url}
    with running_server(folder, shared_provider, **more, OLLAMA_MODELS="x") as server:
        assert server.post("/api/v1/chat", {"message": "first", "stream": False}).json()["id"] == 2
        assert server.post("/api/v1/chat", {"message": "second", "stream": False}).json()["id"] == 4
        yield server
    assert "Traceback" not in "".join(server.log)


def error_of(response: httpx.Response, status: int, code: str) -> str:
    """The message of an error, once everything else about its shape has been checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"code", "message", "retryable", "request_id"}
    assert (error["code"], error["retryable"]) == (code, False)
    assert error["request_id"] == response.headers["x-request-id"]
    assert len(error["message"]) < 500, "a message is for a person to read"
    message: str = error["message"]
    return message


def refuse(server: Server, body: bytes | dict[str, Any], status: int = 400, code: str = "invalid_request") -> str:
    """Posts to the chat what must be refused; returns the message. Nothing in the database has changed."""
    before = server.rows(COUNTS)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = error_of(server.post("/api/v1/chat", content=content, headers=JSON), status, code)
    assert server.rows(COUNTS) == before
    return message


def nested(depth: int, inner: str = "") -> bytes:
    """A chat request with a list `depth` levels deep among its tools."""
    return b'{"message":"x","tools":[{"a":%s%s%s}]}' % (b"[" * depth, inner.encode(), b"]" * depth)


# ── the body as a whole ──


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "message: is required"),
        (b"hello", "body: is not JSON in UTF-8: Expecting value: line 1 column 1 (char 0)"),
        (b'{"message":"x",}', "body: is not JSON in UTF-8: "),
        (b'{"message":"x"} and more', "body: is not JSON in UTF-8: Extra data: line 1 column 17"),
        (b'{"message":"x","temperature":NaN}', "temperature: nan is not accepted"),
        (b'{"message":"x","temperature":-Infinity}', "temperature: -inf is not accepted"),
        (b'{"message":"\xff"}', "body: is not JSON in UTF-8: 'utf-8' codec can't decode byte 0xff in position 12"),
        (
            '{"message":"x"}'.encode("utf-16"),
            "body: is not JSON in UTF-8: 'utf-8' codec can't decode byte 0xff in position 0",
        ),
        (b'\xef\xbb\xbf{"message":"x"}', "body: is not JSON in UTF-8: Unexpected UTF-8 BOM"),
        (b"[]", "body: expected `object`, got []"),
        (b"null", "body: expected `object`, got null"),
        (b'"hello"', 'body: expected `object`, got "hello"'),
        (b"[" * 100_000, "body: is nested deeper than 64 levels, the limit"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(shared: Server, body: bytes, message: str) -> None:
    assert refuse(shared, body).startswith(message)


@pytest.mark.parametrize(
    ("headers", "met"),
    [
        ({}, "none"),
        ({"content-type": "text/plain"}, "text/plain"),
        ({"content-type": "application/jsonx"}, "application/jsonx"),
    ],
)
def test_another_content_type_is_refused_and_named(shared: Server, headers: dict[str, str], met: str) -> None:
    response = shared.post("/api/v1/chat", content=b'{"message":"x"}', headers=headers)
    message = error_of(response, 400, "invalid_request")
    assert message == f"content-type: {met!r} is not accepted; send application/json"


def test_a_content_type_may_have_a_charset_and_capitals(shared: Server) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    response = shared.post("/api/v1/chat", content=b'{"message":"x","stream":false}', headers=headers)
    assert response.status_code == 200


def test_a_body_of_2_mb_is_too_large(shared: Server) -> None:
    message = refuse(shared, {"message": "x" * 2_000_000}, 413, "too_large")
    assert message == "body: has 2,000,015 bytes; without images the limit is 1,000,000"


def test_a_body_beyond_every_limit_is_not_even_read(shared: Server) -> None:
    message = refuse(shared, {"message": "x" * 21_000_000}, 413, "too_large")
    assert message == "body: is larger than 20,000,000 bytes, the limit"


def test_a_chunked_body_without_an_end_is_cut_off_at_the_limit(shared: Server) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), 20) as connection:
        lines = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(f"PATCH /api/v1/conversations/1 HTTP/1.1\r\n{lines}".encode())
        for _ in range(16):
            connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        assert b"413 " in connection.recv(65_536).split(b"\r\n")[0]


def test_a_body_just_below_the_limit_is_taken(shared: Server) -> None:
    body = {"message": "x" * 999_900, "background": True}
    response = shared.post("/api/v1/chat", body)
    assert response.status_code == 202
    assert len(shared.message(shared.wait_ended(response.json()["message_id"])["parent_id"])["text"]) == 999_900


def test_a_client_that_goes_away_in_the_middle_of_its_body_leaves_nothing(shared: Server) -> None:
    before = shared.rows(COUNTS)
    with socket.create_connection(("127.0.0.1", shared.port), 20) as connection:
        lines = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(f'POST /api/v1/chat HTTP/1.1\r\n{lines}{{"message":'.encode())
    assert shared.get("/api/v1/health").status_code == 200
    assert shared.rows(COUNTS) == before


# ── fields ──


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "message: is required"),
        ({"message": "x", "zebra": 1}, "zebra: is not a field of this request"),
        ({"message": "x", "Message": "x"}, "Message: is not a field of this request"),
        ({"message": [{"type": "text", "text": "x", "size": 1}]}, "message.0.size: is not a field of this request"),
        ({"message": [{"type": "text"}]}, "message.0.text: is required"),
        ({"message": [{"type": "video", "text": "x"}]}, 'message.0.type: expected text | '),
        ({"message": ["x"]}, 'message.0: expected `object`, got "x"'),
        ({"message": 5}, "message: expected `string | array`, got 5"),
        ({"message": None}, "message: expected `string | array`, got null"),
        ({"message": ""}, 'message: expected `string` of length >= 1, got ""'),
        ({"message": " \n\t\u3000"}, "message: is empty; it has at least one character that is not a space"),
        ({"message": []}, "message: is empty; it has at least one character"),
        ({"message": [{"type": "text", "text": " "}]}, "message: is empty; it has at least one character"),
        ({"message": "x", "stream": None}, "stream: expected `boolean`, got null"),
        ({"message": "x", "stream": "yes"}, 'stream: expected `boolean`, got "yes"'),
        ({"message": "x", "background": 1}, "background: expected `boolean`, got 1"),
        ({"message": "x", "temperature": "1"}, 'temperature: expected `number | null`, got "1"'),
        ({"message": "x", "temperature": 7}, "temperature: expected `number` <= 2.0, got 7"),
        ({"message": "x", "temperature": -0.1}, "temperature: expected `number` >= 0.0, got -0.1"),
        ({"message": "x", "max_tokens": 0}, "max_tokens: expected `integer` >= 1, got 0"),
        ({"message": "x", "max_tokens": 1.5}, "max_tokens: expected `integer | null`, got 1.5"),
        ({"message": "x", "system": 5}, "system: expected `string | null`, got 5"),
        ({"message": "x", "tools": {}}, "tools: expected `array | null`, got {}"),
        ({"message": "x", "tools": [1]}, "tools.0: expected `object`, got 1"),
        ({"message": "x", "tools": [{}] * 129}, "tools: expected `array` of length <= 128, got [{}"),
        ({"message": "x", "conversation_id": True}, "conversation_id: expected `integer | null`, got true"),
        ({"message": "x", "conversation_id": 0}, "conversation_id: expected `integer` >= 1, got 0"),
        ({"message": "x", "conversation_id": 1, "parent_id": "2"}, 'parent_id: expected `integer | null`, got "2"'),
        ({"message": "x", "max_tokens": 2**53 + 1}, "max_tokens: expected `integer` <= 10000000, got 9007199254740993"),
        ({"message": "x", "fallbacks": ["openai/m", 5]}, "fallbacks.1: expected `string`, got 5"),
        ({"message": "x", "fallbacks": ["openai/m"] * 9}, "fallbacks: expected `array` of length <= 8, got ["),
    ],
)  # fmt: skip
def test_a_field_that_does_not_fit_is_named_with_its_limit_and_its_value(
    shared: Server, body: dict[str, Any], message: str
) -> None:
    assert refuse(shared, body).startswith(message)


KINDS = [
    llmchat.ChatRequest, llmchat.RegenerateRequest, llmchat.ContinueRequest, llmchat.ConversationChanges,
    llmchat.ConversationsQuery, llmchat.StreamQuery, llmchat.ChatCompletionRequest, llmchat.ResponseRequest,
    llmchat.InputItems,
]  # fmt: skip
WRONG = [None, True, -7, 1.5, "x" * 300_000, [True], [[]], [{}], {}, {"a": 7}]


@pytest.mark.parametrize("kind", KINDS)
def test_no_refusal_of_a_type_uses_pythons_name_for_it(kind: Any) -> None:
    """Backticks hold types; JSON's, and /openapi.json's, are the only ones that a client knows."""
    refusals, fields = [], llmchat.fields_of(kind)
    valid = {"message": "x", "messages": [{"role": "user", "content": "x"}]}
    for name, wrong in itertools.product(fields, WRONG):
        try:
            llmchat.convert({**{one: value for one, value in valid.items() if one in fields}, name: wrong}, kind)
        except llmchat.InvalidRequest as refusal:
            refusals.append(refusal.message)
    types = {word for message in refusals for types in re.findall("`([^`]*)`", message) for word in types.split(" | ")}
    assert len(types) > 1 and types <= {"string", "integer", "number", "boolean", "array", "object", "null"}


def test_a_field_with_the_name_of_a_type_keeps_it(shared: Server) -> None:
    assert refuse(shared, {"message": "x", "str": 1}) == "str: is not a field of this request"


def test_a_choice_that_is_not_one_is_told_the_choices(shared: Server) -> None:
    message = refuse(shared, {"message": "x", "reasoning_effort": "huge"})
    assert message.startswith("reasoning_effort: expected ") and message.endswith(', got "huge"')
    assert set(re.findall(r"\w+", message)) >= {"none", "minimal", "low", "medium", "high"}


def test_a_long_value_is_shown_short_with_its_length(shared: Server) -> None:
    message = refuse(shared, {"message": "x", "system": "s" * 100_001})
    assert message == f'system: expected `string` of length <= 100000, got "{"s" * 56}… (100,003 characters)'


def test_a_long_unknown_field_is_shown_short_and_on_one_line(shared: Server) -> None:
    message = refuse(shared, {"message": "x", "line\n" + "z" * 500_000: 1})
    assert message.startswith("line\\nzzz") and message.endswith("z…: is not a field of this request")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"message":"x","conversation_id":1e400}', "conversation_id: inf is not accepted"),
        (b'{"message":"x","temperature":1e999}', "temperature: inf is not accepted"),
        (b'{"message":"x","max_tokens":' + b"9" * 5000 + b"}", "body: is not JSON in UTF-8: Exceeds the limit"),
        (b'{"message":"x","tools":[{"a":1e999}]}', "tools.0.a: inf is not accepted"),
        (b'{"message":"x","tools":[{"a":' + b"9" * 5000 + b"}]}", "body: is not JSON in UTF-8: Exceeds the limit"),
        (
            b'{"message":"x","max_tokens":-9223372036854775809}',
            "max_tokens: expected `integer` >= 1, got -9223372036854775809",
        ),
    ],
)
def test_a_huge_number_is_out_of_range(shared: Server, body: bytes, message: str) -> None:
    assert refuse(shared, body).startswith(message)


def test_a_field_given_twice_has_the_last_value_as_json_parsers_have_it(shared: Server) -> None:
    response = shared.post("/api/v1/chat", content=b'{"message":"a","message":"b","stream":false}', headers=JSON)
    assert shared.message(response.json()["parent_id"])["text"] == "b"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"message": "a\0b"}, "message: has a NUL character"),
        ({"message": [{"type": "text", "text": "\0"}]}, "message.0.text: has a NUL character"),
        ({"message": "x", "system": "ab\0"}, "system: has a NUL character"),
        ({"message": "x", "model": "\0"}, "model: has a NUL character"),
        ({"message": "x", "fallbacks": ["\0"]}, "fallbacks.0: has a NUL character"),
        ({"message": "x", "tools": [{"a": {"b": ["\0"]}}]}, "tools.0.a.b.0: has a NUL character"),
        ({"message": "x", "tools": [{"a\0": 1}]}, "tools.0.a\\x00: has a NUL character"),
    ],
)
def test_a_nul_is_refused_wherever_it_is(shared: Server, body: dict[str, Any], place: str) -> None:
    assert refuse(shared, body).startswith(place)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"message":"\\ud800"}', "message"),
        (b'{"message":"\\udc00\\ud83d"}', "message"),
        (b'{"message":[{"type":"text","text":"\\ud83d"}]}', "message.0.text"),
        (b'{"message":"x","system":"a\\udfffb"}', "system"),
        (b'{"message":"x","tools":[{"a":{"b":["\\ud800"]}}]}', "tools.0.a.b.0"),
        (b'{"message":"x","tools":[{"\\ud800":1}]}', "tools.0.\\ud800"),
        (b'{"message":"x","tools":[{"\\ud800":"\\ud800"}]}', "tools.0.\\ud800"),
        (b'{"message":"x","\\ud800":1}', "\\ud800"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_is(shared: Server, body: bytes, place: str) -> None:
    message = refuse(shared, body)
    assert message.startswith(f"{place}: has ") and "half of a surrogate pair" in message


def test_a_whole_surrogate_pair_is_one_character(shared: Server) -> None:
    response = shared.post("/api/v1/chat", content=b'{"message":"\\ud83d\\ude42","stream":false}', headers=JSON)
    assert shared.message(response.json()["parent_id"])["text"] == "🙂"


@pytest.mark.parametrize("body", [nested(62), nested(450), nested(450, '"\\ud800"'), nested(900), nested(100_000)])
def test_deep_nesting_is_refused(shared: Server, body: bytes) -> None:
    assert refuse(shared, body).endswith(": is nested deeper than 64 levels, the limit")


def test_nesting_within_the_limit_goes_upstream_as_it_came(shared: Server, provider: Provider) -> None:
    response = shared.post("/api/v1/chat", content=nested(60)[:-1] + b',"stream":false}', headers=JSON)
    assert response.status_code == 200
    assert json.dumps(provider.chats[-1].field("tools")[0]["function"]["a"]) == "[" * 60 + "]" * 60


# ── what does not exist ──


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "nope/m"}, "model: provider 'nope' is not configured; there is openai, ollama; a model is"),
        ({"model": "gpt"}, "model: provider 'gpt' is not configured; there is openai, ollama; a model is"),
        ({"model": "groq/m"}, "model: provider 'groq' is not configured; there is openai, ollama; set GROQ_API_KEY"),
        ({"provider": "groq"}, "provider: provider 'groq' is not configured; there is openai, ollama; set "),
        ({"model": "openai/gpt-9"}, "model: openai has no model 'gpt-9'; it has m, n"),
        ({"provider": "openai", "model": "gpt-9"}, "model: openai has no model 'gpt-9'; it has m, n"),
        ({"model": "openai/"}, "model: 'openai/' does not say which provider; write provider/model, or name the"),
        ({"model": ""}, 'model: expected `string` of length >= 1, got ""'),
        ({"fallbacks": ["openai/gpt-9"]}, "fallbacks: openai has no model 'gpt-9'; it has m, n"),
    ],
)  # fmt: skip
def test_an_unknown_provider_or_model_is_told_what_there_is(shared: Server, body: dict[str, Any], message: str) -> None:
    assert refuse(shared, {"message": "x", **body}).startswith(message)


def test_an_unknown_provider_is_named_without_talk_of_models(shared: Server) -> None:
    message = refuse(shared, {"message": "x", "provider": "nope"})
    assert message.startswith("provider: provider 'nope' is not configured; there is openai, ollama")


def test_an_unknown_conversation_is_not_found(shared: Server) -> None:
    message = refuse(shared, {"message": "x", "conversation_id": 99_999}, 404, "not_found")
    assert message == "conversation_id: there is no conversation 99999"


@pytest.mark.parametrize("parent_id", [99_999, 4])
def test_a_parent_that_is_unknown_or_of_another_conversation_is_refused(shared: Server, parent_id: int) -> None:
    message = refuse(shared, {"message": "x", "conversation_id": 1, "parent_id": parent_id})
    assert message == f"parent_id: there is no message {parent_id} in conversation 1"


def test_a_parent_without_its_conversation_is_refused(shared: Server) -> None:
    message = refuse(shared, {"message": "x", "parent_id": 2})
    assert message == "parent_id: 2 was given without the conversation_id that it belongs to"


@pytest.mark.parametrize(
    "text", ["abc", "-1", "1.0", "9" * 400, "%00", "%EF%BC%91", "1%0A", "+1", "0", "999999999999999"]
)
@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("GET", "/api/v1/messages/{}", "message"),
        ("GET", "/api/v1/messages/{}/stream", "message"),
        ("POST", "/api/v1/messages/{}/stop", "message"),
        ("GET", "/api/v1/conversations/{}", "conversation"),
        ("PATCH", "/api/v1/conversations/{}", "conversation"),
        ("DELETE", "/api/v1/conversations/{}", "conversation"),
    ],
)
def test_an_id_that_no_one_has_is_not_found(shared: Server, method: str, path: str, what: str, text: str) -> None:
    body = {"json": {"title": "x"}} if method == "PATCH" else {}
    message = error_of(shared.client.request(method, path.format(text), **body), 404, "not_found")
    assert message.startswith(f"{what}_id: there is no {what} ")


@pytest.mark.parametrize(
    "path", ["/nope", "/api/v1/messages", "/api/v1/messages/", "/api/v1/messages/1%2F2", "/%ff%00", "/.env"]
)
def test_an_unknown_path_is_not_found_and_says_where_to_look(shared: Server, path: str) -> None:
    message = error_of(shared.get(path), 404, "not_found")
    assert message.startswith("path: there is nothing at /") and message.endswith(
        "; GET /api/v1/help lists what there is"
    )
    assert message.isprintable()


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/api/v1/chat", "POST"),
        ("PUT", "/api/v1/chat", "POST"),
        ("OPTIONS", "/api/v1/chat", "POST"),
        ("DELETE", "/api/v1/health", "GET, HEAD"),
        ("PROPFIND", "/", "GET, HEAD"),
        ("POST", "/api/v1/conversations/1", "DELETE, GET, HEAD, PATCH"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(shared: Server, method: str, path: str, allowed: str) -> None:
    response = shared.client.request(method, path)
    message = error_of(response, 405, "invalid_request")
    assert message == f"method: {method} is not accepted here; use {response.headers['allow']}"
    assert sorted(response.headers["allow"].split(", ")) == allowed.split(", ")


def test_a_wrong_method_is_told_the_right_ones_in_openais_shape(shared: Server) -> None:
    response = shared.get("/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/", 200), ("/api/v1/health", 200), ("/docs", 200), ("/api/v1/conversations/1", 200), ("/api/v1/messages/2", 200),
     ("/api/v1/chat", 405), ("/api/v1/messages/abc", 404), ("/nope", 404)],
)  # fmt: skip
def test_head_gets_the_head_alone(shared: Server, path: str, status: int) -> None:
    response = shared.client.head(path)
    assert (response.status_code, response.content) == (status, b"")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", 'limit: expected `integer` >= 1, got "0"'),
        ("limit=201", 'limit: expected `integer` <= 200, got "201"'),
        ("limit=ten", 'limit: expected `integer`, got "ten"'),
        ("limit=", 'limit: expected `integer`, got ""'),
        (f"limit={'9' * 5000}", "limit: integer value out of range, got "),
        ("limit=%D9%A1", "limit: expected `integer`, got "),
        ("before=x", "before: expected `string` matching regex "),
        ("before=1-2-3", "before: expected `string` matching regex "),
        ("before=", "before: expected `string` matching regex "),
        (f"query={'q' * 501}", "query: expected `string` of length <= 500, got "),
    ],
)
def test_a_query_that_does_not_fit_is_named_with_its_bounds(shared: Server, query: str, message: str) -> None:
    assert error_of(shared.get(f"/api/v1/conversations?{query}"), 400, "invalid_request").startswith(message)


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "9" * 300, "0x1"])
def test_a_cursor_that_is_no_offset_is_refused(shared: Server, cursor: str) -> None:
    by_header = shared.get("/api/v1/messages/2/stream", headers={"Last-Event-ID": cursor})
    by_query = shared.get("/api/v1/messages/2/stream", params={"after": cursor})
    for name, response in (("Last-Event-ID", by_header), ("after", by_query)):
        assert error_of(response, 400, "invalid_request").startswith(f"{name}: expected `integer`")


def test_a_cursor_beyond_the_end_is_told_where_the_end_is(shared: Server) -> None:
    length = len(shared.message(2)["text"])
    by_header = shared.get("/api/v1/messages/2/stream?after=1", headers={"Last-Event-ID": str(length + 1)})
    by_query = shared.get(f"/api/v1/messages/2/stream?after={length + 1}")
    words = f"{length + 1} is beyond the end of message 2, which is at {length}"
    assert error_of(by_header, 400, "invalid_request") == f"Last-Event-ID: {words}"
    assert error_of(by_query, 400, "invalid_request") == f"after: {words}"


# ── headers ──


@pytest.mark.parametrize("given", ["ok-1", "a.b:c/d+e=F_9", "x" * 200])
def test_a_request_id_comes_back(shared: Server, given: str) -> None:
    good = shared.get("/api/v1/health", headers={"X-Request-ID": given})
    bad = shared.get("/nope", headers={"X-Request-ID": given})
    assert good.headers["x-request-id"] == given == bad.json()["error"]["request_id"]


@pytest.mark.parametrize("given", [b"", b"x" * 201, b"a b", "é".encode(), b'"', b"<b>"])
def test_a_request_id_that_cannot_be_logged_is_replaced(shared: Server, given: bytes) -> None:
    made = shared.get("/api/v1/health", headers={"X-Request-ID": given}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", made)


@pytest.mark.parametrize(("key", "length"), [(b"", 0), (b"k" * 201, 201), ("é".encode(), 2), (b"a\tb", 3)])
def test_an_idempotency_key_that_cannot_be_kept_is_refused(shared: Server, key: bytes, length: int) -> None:
    before = shared.rows(COUNTS)
    response = shared.post("/api/v1/chat", {"message": "x"}, headers={"Idempotency-Key": key})
    message = error_of(response, 400, "invalid_request")
    assert message == f"Idempotency-Key: has {length} characters; it is 1 to 200 printable ASCII characters"
    assert shared.rows(COUNTS) == before


def test_a_repeat_with_the_same_key_attaches_to_the_first_run(shared: Server, provider: Provider) -> None:
    calls = len(provider.chats)
    body, headers = {"message": "pay once", "stream": False}, {"Idempotency-Key": "key-1"}
    answers = [shared.post("/api/v1/chat", body, headers=headers).json() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2] and answers[0]["status"] == "completed"
    assert len(provider.chats) == calls + 1


def test_repeats_at_the_same_moment_make_one_provider_call(shared: Server, provider: Provider) -> None:
    calls = len(provider.chats)
    body, headers = {"message": "all at once", "stream": False}, {"Idempotency-Key": "key-2"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: shared.post("/api/v1/chat", body, headers=headers).json(), range(8)))
    assert {answer["id"] for answer in answers} == {answers[0]["id"]}
    assert {answer["text"] for answer in answers} == {"".join(default_answer("all at once", 5))}
    assert len(provider.chats) == calls + 1


def test_a_repeat_streams_a_running_answer_from_its_start(shared: Server, provider: Provider) -> None:
    provider.script([*openai_text("one")[:-3], provider.gate("repeat"), *openai_text(" two")[1:]])
    body, headers = {"message": "twice"}, {"Idempotency-Key": "key-3"}
    readers = [Reader(), Reader()]
    streams = [EventStream(shared.url, "POST", "/api/v1/chat", body, headers) for _ in readers]
    provider.open_gate("repeat")
    for reader, stream in zip(readers, streams, strict=True):
        with stream:
            reader.read(stream)
    assert [reader.content for reader in readers] == ["one two", "one two"]


def test_a_repeat_in_the_background_tells_the_status_that_is(shared: Server) -> None:
    body, headers = {"message": "later", "background": True}, {"Idempotency-Key": "key-4"}
    message_id = shared.post("/api/v1/chat", body, headers=headers).json()["message_id"]
    shared.wait_ended(message_id)
    repeated = shared.post("/api/v1/chat", body, headers=headers)
    assert (repeated.status_code, repeated.json()["message_id"], repeated.json()["status"]) == (
        202,
        message_id,
        "completed",
    )


def test_a_used_key_with_another_body_is_a_conflict(shared: Server, provider: Provider) -> None:
    headers = {"Idempotency-Key": "key-5"}
    assert shared.post("/api/v1/chat", {"message": "a", "stream": False}, headers=headers).status_code == 200
    calls, before = len(provider.chats), shared.rows(COUNTS)
    response = shared.post("/api/v1/chat", {"message": "b", "stream": False}, headers=headers)
    message = error_of(response, 409, "conflict")
    assert message == "Idempotency-Key: 'key-5' was used with another request"
    assert (len(provider.chats), shared.rows(COUNTS)) == (calls, before)


# ── conversations ──


def ask(server: Server, message: str = "x", **more: Any) -> dict[str, Any]:
    """A finished answer."""
    response = server.post("/api/v1/chat", {"message": message, "stream": False, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def turns_of(provider: Provider) -> list[tuple[str, str]]:
    """What the newest question sent upstream."""
    return [(turn["role"], turn["content"]) for turn in provider.chats[-1].field("messages")]


def test_a_conversation_has_its_messages_as_a_tree(shared: Server) -> None:
    first = ask(shared, "root")
    branch = ask(shared, "again", conversation_id=first["conversation_id"], parent_id=first["id"])
    other = ask(shared, "other", conversation_id=first["conversation_id"], parent_id=first["id"])
    second_root = ask(shared, "new", conversation_id=first["conversation_id"], parent_id=None)
    found = shared.get(f"/api/v1/conversations/{first['conversation_id']}").json()
    parents = {message["id"]: message["parent_id"] for message in found["messages"]}
    assert parents[first["parent_id"]] is None and parents[second_root["parent_id"]] is None
    assert parents[branch["parent_id"]] == first["id"] == parents[other["parent_id"]]
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"] * 4
    assert next(message for message in found["messages"] if message["id"] == other["id"]) == other
    assert found["title"] == "root" and found["running"] is False


def test_an_absent_parent_means_the_newest_leaf(shared: Server, provider: Provider) -> None:
    first = ask(shared, "one")
    second = ask(shared, "two", conversation_id=first["conversation_id"])
    assert shared.message(second["parent_id"])["parent_id"] == first["id"]
    assert turns_of(provider) == [("user", "one"), ("assistant", first["text"]), ("user", "two")]


def test_a_branch_sends_its_own_path_and_nothing_of_its_siblings(shared: Server, provider: Provider) -> None:
    first = ask(shared, "one")
    ask(shared, "two", conversation_id=first["conversation_id"])
    ask(shared, "three", conversation_id=first["conversation_id"], parent_id=first["id"])
    assert turns_of(provider) == [("user", "one"), ("assistant", first["text"]), ("user", "three")]


def test_a_null_parent_sends_a_new_first_message_alone(shared: Server, provider: Provider) -> None:
    first = ask(shared, "one")
    ask(shared, "two", conversation_id=first["conversation_id"], parent_id=None)
    assert turns_of(provider) == [("user", "two")]


def test_a_system_prompt_is_kept_with_the_conversation_and_sent_every_time(shared: Server, provider: Provider) -> None:
    first = ask(shared, "one", system="Be brief.")
    ask(shared, "two", conversation_id=first["conversation_id"])
    assert turns_of(provider)[0] == ("system", "Be brief.")
    assert shared.get(f"/api/v1/conversations/{first['conversation_id']}").json()["system"] == "Be brief."


def test_a_system_prompt_changes_by_a_later_chat_and_by_patch(shared: Server, provider: Provider) -> None:
    first = ask(shared, "one", system="Be brief.")
    ask(shared, "two", conversation_id=first["conversation_id"], system="Be long.")
    assert turns_of(provider)[0] == ("system", "Be long.")
    shared.client.patch(f"/api/v1/conversations/{first['conversation_id']}", json={"system": ""})
    ask(shared, "three", conversation_id=first["conversation_id"])
    assert turns_of(provider)[0] == ("user", "one")


def test_a_failed_answer_leaves_a_history_that_alternates(shared: Server, provider: Provider) -> None:
    provider.script([])  # an answer that ends before it began
    failed = shared.post("/api/v1/chat", {"message": "one", "stream": False})
    assert failed.status_code == 502
    conversation_id = shared.message(failed.json()["message_id"])["conversation_id"]
    ask(shared, "two", conversation_id=conversation_id)
    assert turns_of(provider) == [("user", "one\n\ntwo")]


def test_a_question_asked_beside_a_question_is_joined_to_it(shared: Server, provider: Provider) -> None:
    first = ask(shared, "one")
    ask(shared, "and two", conversation_id=first["conversation_id"], parent_id=first["parent_id"])
    assert turns_of(provider) == [("user", "one\n\nand two")]


def test_a_page_of_conversations_leads_to_the_next_while_new_ones_come(shared: Server) -> None:
    made = [ask(shared, f"page {number}")["conversation_id"] for number in range(5)]
    found, before = [], None
    for _ in range(3):
        page = shared.get("/api/v1/conversations", params={"limit": 2, **({"before": before} if before else {})}).json()
        found += [one["id"] for one in page["conversations"]]
        before = page["next_before"]
        ask(shared, "a newcomer")
    assert found[:5] == made[::-1] and len(set(found)) == 6


def test_the_last_page_has_no_next(shared: Server) -> None:
    total = shared.rows("SELECT count(*) FROM conversation")[0][0]
    assert total < 200
    page = shared.get("/api/v1/conversations?limit=200").json()
    assert len(page["conversations"]) == total and page["next_before"] is None
    assert [one["updated_at_ms"] for one in page["conversations"]] == sorted(
        (one["updated_at_ms"] for one in page["conversations"]), reverse=True
    )


def test_new_activity_brings_a_conversation_to_the_top_and_a_new_title_does_not(shared: Server) -> None:
    old, new = ask(shared, "old")["conversation_id"], ask(shared, "new")["conversation_id"]
    shared.client.patch(f"/api/v1/conversations/{old}", json={"title": "renamed"})
    assert [one["id"] for one in shared.get("/api/v1/conversations?limit=2").json()["conversations"]] == [new, old]
    ask(shared, "more", conversation_id=old)
    assert [one["id"] for one in shared.get("/api/v1/conversations?limit=2").json()["conversations"]] == [old, new]


def test_a_patch_sets_what_it_names_and_leaves_the_rest(shared: Server) -> None:
    conversation_id = ask(shared, "x", system="s")["conversation_id"]
    changed = shared.client.patch(f"/api/v1/conversations/{conversation_id}", json={"title": "T 🙂"}).json()
    assert (changed["id"], changed["title"], changed["system"]) == (conversation_id, "T 🙂", "s")
    assert shared.client.patch(f"/api/v1/conversations/{conversation_id}", json={}).json() == changed


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"title": ""}, "title: expected `string` matching regex '\\\\S', got "),
        ({"title": " \n"}, "title: expected `string` matching regex '\\\\S', got "),
        ({"title": None}, "title: expected `string`, got null"),
        ({"title": "t" * 201}, "title: expected `string` of length <= 200, got "),
        ({"titel": "x"}, "titel: is not a field of this request"),
        ({"system": None}, "system: expected `string`, got null"),
        ({"title": "a\0"}, "title: has a NUL character"),
        ([], "body: expected `object`, got []"),
    ],
)
def test_a_patch_that_does_not_fit_changes_nothing(shared: Server, body: Any, message: str) -> None:
    before = shared.get("/api/v1/conversations/1").json()
    response = shared.client.patch("/api/v1/conversations/1", json=body)
    assert error_of(response, 400, "invalid_request").startswith(message)
    assert shared.get("/api/v1/conversations/1").json() == before


def test_a_deleted_conversation_is_gone_with_everything_in_it(shared: Server) -> None:
    answer = ask(shared, "to be deleted")
    before = shared.rows("SELECT count(*) FROM delta WHERE message_id IN (?, ?)", answer["id"], answer["parent_id"])
    assert before[0][0] >= 2
    response = shared.client.delete(f"/api/v1/conversations/{answer['conversation_id']}")
    assert (response.status_code, response.json()) == (200, {"deleted": True})
    for path in (f"/api/v1/messages/{answer['id']}", f"/api/v1/conversations/{answer['conversation_id']}"):
        assert shared.get(path).status_code == 404
    assert shared.client.delete(f"/api/v1/conversations/{answer['conversation_id']}").status_code == 404
    assert shared.rows("SELECT count(*) FROM delta WHERE message_id IN (?, ?)", answer["id"], answer["parent_id"]) == [
        (0,)
    ]
    assert ask(shared, "new")["conversation_id"] > answer["conversation_id"], "an id is never used again"


def test_deleting_a_conversation_ends_what_runs_in_it(shared: Server, provider: Provider) -> None:
    provider.script([*openai_text("begun")[:-3], provider.gate("never opened")])
    reader = Reader()
    with shared.chat("to be deleted while it runs") as stream:
        reader.read(stream, 2)
        request = provider.chats[-1]
        conversation_id = shared.rows("SELECT max(id) FROM conversation")[0][0]
        assert shared.client.delete(f"/api/v1/conversations/{conversation_id}").status_code == 200
        reader.read(stream)
    assert request.wait_closed() > 0
    assert reader.content == "begun" and reader.end is not None and reader.end["status"] == "stopped"
    assert shared.get("/api/v1/generations").json() == {"generations": []}
    assert shared.rows("SELECT count(*) FROM message WHERE conversation_id = ?", conversation_id) == [(0,)]
    assert shared.rows("SELECT count(*) FROM delta LEFT JOIN message ON id = message_id WHERE id IS NULL") == [(0,)]


def test_head_of_a_stream_is_answered_while_the_answer_still_runs(shared: Server, provider: Provider) -> None:
    provider.script([*openai_text("begun")[:-3], provider.gate("head"), *openai_text(".")[1:]])
    message_id = shared.start_chat("x")
    response = shared.client.head(f"/api/v1/messages/{message_id}/stream")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert shared.message(message_id)["status"] == "running"
    provider.open_gate("head")
    assert shared.wait_ended(message_id)["text"] == "begun."


@pytest.mark.parametrize(
    ("message", "title"),
    [
        ("Hello", "Hello"),
        ("\n\n   Hello\tthere  \n second line", "Hello there"),
        ("# A *bold* `plan`", "A bold plan"),
        ("> - quoted point", "quoted point"),
        ("What does my_function_name do?", "What does my_function_name do?"),
        ("What is 2 * 3 - 1?", "What is 2 * 3 - 1?"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("---\n***\nafter the rules", "after the rules"),
        ("word " * 100, "word word word word word word word word word word word word word word word…"),
        ("x" * 500, "x" * 79 + "…"),
        ("汉" * 500, "汉" * 79 + "…"),
        ("🙂🎉", "🙂🎉"),
        ("?!", "?!"),
        ("a\u2028b\u0085c", "a b c"),
        ("مرحبا بالعالم", "مرحبا بالعالم"),
    ],
)
def test_a_title_is_the_first_line_that_says_something(shared: Server, message: str, title: str) -> None:
    answer = ask(shared, message)
    assert shared.get(f"/api/v1/conversations/{answer['conversation_id']}").json()["title"] == title
