"""Whatever comes from outside: no crash, no hang, and what a parser lets through is what its users rely on.

Inputs are bounded in size, so that a test that ends has ended in bounded time. LLMCHAT_FUZZ_EXAMPLES multiplies the
number of examples.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

import llmchat
from tests.conftest import Server
from tests.test_markdown import FRAGMENTS, assert_harmless
from tests.test_security import connect, read_to_end, scope_of, statuses

FACTOR = float(os.environ.get("LLMCHAT_FUZZ_EXAMPLES", "0.35"))
PROVIDER = llmchat.Provider("p", "openai", "http://127.0.0.1/v1", key="sk-fuzz")
KINDS = {"text", "reasoning", "tool_call", "image", "signature"}


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=round(examples * FACTOR),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


# ── what a provider sends ───────────────────────────────────────────────────────────────────────────────────────────

PIECES = st.sampled_from(
    [
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"data:",
        b"data: ",
        b"data",
        b"event: x",
        b"event",
        b":",
        b": ping",
        b"id: 1",
        b"retry: 9",
        b"{}",
        b"[DONE]",
        b"\xef\xbb\xbf",
        "é\u2028\u0085".encode(),
        b"\xff",
        b"\x00",
        b"<html>",
        b"x",
    ]
)
LINES = st.sampled_from([b"data: x", b"data:y", b"event: e", b": ping", b"id: 1", b"\xef\xbb\xbfdata: z", b"<html>"])
NEWLINES = st.sampled_from([b"\n", b"\r", b"\r\n"])
STREAMS = st.lists(LINES | NEWLINES, max_size=30) | st.lists(PIECES | st.binary(max_size=20), max_size=40)


def decode_stream(pieces: list[bytes]) -> list[tuple[bytes, bytes]]:
    decoder = llmchat.SseDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)] + decoder.end()


@fuzz(1000)
@given(STREAMS)
def test_a_stream_gives_the_same_events_however_it_is_cut(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    expected = decode_stream([whole])
    assert decode_stream(pieces) == decode_stream([whole[index : index + 1] for index in range(len(whole))]) == expected
    for name, data in expected:
        assert b"\n" not in name and b"\r" not in name + data


NAMES = st.sampled_from(
    [
        "choices",
        "delta",
        "content",
        "reasoning_content",
        "reasoning",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "index",
        "id",
        "finish_reason",
        "usage",
        "prompt_tokens",
        "completion_tokens",
        "error",
        "message",
        "code",
        "type",
        "text",
        "object",
        "role",
        "refusal",
        "model",
        "thinking",
        "partial_json",
        "signature",
        "content_block",
        "stop_reason",
        "input_tokens",
        "output_tokens",
        "reasoning_details",
        "prompt_tokens_details",
    ]
)
WORDS = st.sampled_from(
    [
        "",
        "stop",
        "length",
        "tool_calls",
        "text",
        "text_delta",
        "thinking_delta",
        "input_json_delta",
        "signature_delta",
        "tool_use",
        "thinking",
        "message_start",
        "message_delta",
        "message_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "ping",
        "error",
        "overloaded_error",
        "429",
        "\ud83d",
        "\ude00",
        "sk-fuzz",
        "MALFORMED_FUNCTION_CALL",
        "\0",
        "{",
        '{"a": 1}',
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS | st.text(max_size=10)
JSON = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=4), max_leaves=12
)


def shaped(below: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Chunks that are near what the dialects send, with anything at any place."""
    call = st.fixed_dictionaries(
        {},
        optional={
            "index": below,
            "id": below,
            "function": below | st.fixed_dictionaries({"name": below, "arguments": below}),
        },
    )
    delta = st.fixed_dictionaries(
        {}, optional={"content": below, "reasoning_content": below, "tool_calls": st.lists(call, max_size=3) | below}
    )
    choice = st.fixed_dictionaries(
        {}, optional={"delta": delta | below, "message": delta | below, "finish_reason": below, "index": below}
    )
    chunk = st.fixed_dictionaries(
        {}, optional={"choices": st.lists(choice, max_size=2) | below, "usage": below, "error": below}
    )
    block = st.fixed_dictionaries(
        {"type": WORDS},
        optional={
            "text": below,
            "id": below,
            "name": below,
            "input": below,
            "thinking": below,
            "signature": below,
            "partial_json": below,
            "stop_reason": below,
        },
    )
    event = st.fixed_dictionaries(
        {"type": WORDS},
        optional={
            "index": below,
            "delta": block | below,
            "content_block": block | below,
            "usage": below,
            "message": below,
            "error": below,
            "content": st.lists(block, max_size=3) | below,
            "stop_reason": below,
        },
    )
    return chunk | event | below


EVENTS = st.lists(
    st.tuples(
        WORDS.map(lambda word: word.encode("utf-8", "replace")),
        shaped(JSON).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30),
    ),
    max_size=8,
)


def check_deltas(deltas: list[Any]) -> None:
    """Whatever a dialect makes of an answer can be stored, sent and told apart."""
    for delta in deltas:
        assert delta.kind in KINDS and isinstance(delta.text, str) and delta.text
        delta.text.encode()
        assert "\0" not in delta.text
        llmchat.encode_delta(delta, 1)


def check_failure(error: llmchat.ProviderError) -> None:
    assert "sk-fuzz" not in error.message and "\n" not in error.message and len(error.message) < 1000
    json.dumps(error.detail()).encode()


@pytest.mark.parametrize("dialect", llmchat.DIALECT_NAMES)
def test_whatever_a_provider_streams_is_an_answer_or_an_error(dialect: str) -> None:
    @fuzz(500)
    @given(EVENTS)
    def run(events: list[tuple[bytes, bytes]]) -> None:
        decoder, deltas = llmchat.DIALECTS[dialect].decoder(PROVIDER), []
        try:
            for name, data in events:
                decoder.decode(name, data, deltas)
            decoder.end(deltas)
        except llmchat.ProviderError as exc:
            check_failure(exc)
        check_deltas(deltas)
        if decoder.usage is not None:
            assert min(decoder.usage.input_tokens, decoder.usage.output_tokens) >= 0
        assert decoder.finish_reason in (None, "stop", "length", "tool_calls", "content_filter")

    run()


@pytest.mark.parametrize("dialect", llmchat.DIALECT_NAMES)
def test_whatever_document_a_provider_sends_is_an_answer_or_an_error(dialect: str) -> None:
    @fuzz(500)
    @given(shaped(JSON).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=50))
    def run(body: bytes) -> None:
        decoder, deltas = llmchat.DIALECTS[dialect].decoder(PROVIDER), []
        try:
            decoder.decode_document(body, deltas)
            decoder.end(deltas)
        except llmchat.ProviderError as exc:
            check_failure(exc)
        check_deltas(deltas)

    run()


@fuzz(500)
@given(
    shaped(JSON).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200),
    st.sampled_from([302, 400, 401, 403, 404, 408, 429, 500, 503, 529]),
)
def test_whatever_body_an_error_has_is_one_line_without_the_key(body: bytes, status: int) -> None:
    words, kinds = llmchat.body_words(body)
    check_failure(llmchat.provider_error(PROVIDER, status, words, kinds))
    check_failure(llmchat.in_band_error(PROVIDER, body))


@fuzz(500)
@given(
    st.dictionaries(
        st.sampled_from(["retry-after", "retry-after-ms"]),
        st.text(string.printable, max_size=40) | st.floats().map(str) | st.integers().map(str),
    )
)
def test_whatever_wait_a_provider_asks_for_is_a_time_from_now_on_or_none(headers: dict[str, str]) -> None:
    seconds = llmchat.retry_after_seconds(headers)
    assert seconds is None or seconds >= 0


@fuzz(500)
@given(shaped(JSON))
def test_whatever_list_of_models_comes_has_names_or_nothing(document: Any) -> None:
    assert all(isinstance(name, str) for name in llmchat.models_of(document))


# ── what a model writes ─────────────────────────────────────────────────────────────────────────────────────────────

MARKUP = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "](javascript:alert(1))",
    "<svg/onload=x>",
    "&#x6a;avascript:",
    "[a]: data:text/html,x\n\n",
    "![](//evil)",
    "<!--",
    "]]>",
    "\u202e",
    "\0",
    "\ufffd",
    "`" * 5,
    "~~~\n",
    "|\n|-|\n",
    "$\\href{javascript:x}{y}$",
    "\\(\\url{x}\\)",
    "<a href='",
    'http://a.b/"x',
]
TEXTS = st.lists(st.sampled_from([*FRAGMENTS, *MARKUP]) | st.text(max_size=20), max_size=30).map("".join)


@fuzz(400)
@given(TEXTS)
def test_whatever_a_model_writes_is_harmless_html(text: str) -> None:
    assert_harmless(llmchat.render(text))


@fuzz(200)
@given(TEXTS, st.integers(1, 30))
def test_whatever_a_model_streams_is_harmless_html_at_every_frame(text: str, size: int) -> None:
    stream = llmchat.MarkdownStream(lambda: 0.0)
    settled = ""
    for start in range(0, len(text), size):
        stream.feed(text[start : start + size])
        frame = stream.frame()
        settled += "".join(block for _, block in frame.settled)
        assert_harmless(settled + frame.open)
    stream.finish()


@pytest.mark.parametrize(
    "piece",
    [
        "[",
        "![",
        "](",
        "*",
        "**a ",
        "_a",
        "`",
        "<",
        "> ",
        "- ",
        "1. ",
        "|",
        "|a",
        "$",
        "\\(",
        "&",
        "[a](",
        "[a]:",
        "~~",
        "#",
        "\t",
        "a\n",
        "<a ",
        "http://",
    ],
)
def test_a_long_repetition_of_markup_is_rendered(piece: str) -> None:
    """The known bad cases of Markdown parsers: 20,000 characters that take minutes where the parser is quadratic."""
    assert_harmless(llmchat.render(piece * (20_000 // len(piece))))


# ── what a client sends ─────────────────────────────────────────────────────────────────────────────────────────────

PARAMETERS = (
    st.text(max_size=30)
    | st.integers().map(str)
    | st.sampled_from(["-1", "+1", "1e3", "٣", " 7 ", "0x10", "1_000", "9" * 30, "NaN", "1-1", "٣-٣", "1\n-1"])
)


def request_of(query: dict[str, str], headers: dict[str, str], body: bytes = b"") -> Request:
    scope = scope_of(*((name, value) for name, value in headers.items()))
    scope |= {"query_string": llmchat.urllib.parse.urlencode(query, errors="replace").encode(), "path_params": {}}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(scope, receive)


@fuzz(500)
@given(PARAMETERS)
def test_whatever_cursor_comes_is_an_offset_or_refused(text: str) -> None:
    header = text.encode("ascii", "replace").decode()
    for request in (request_of({"after": text}, {}), request_of({}, {"last-event-id": header})):
        try:
            assert 0 <= llmchat.cursor_of(request)[0] <= 2**53
        except llmchat.InvalidRequest as exc:
            assert len(exc.message) < 300
    with contextlib.suppress(llmchat.InvalidRequest):
        before = llmchat.read_query(request_of({"before": text}, {}), llmchat.ConversationsQuery).before
        assert max(map(int, before.split("-"))) < 2**63
    request = request_of({}, {})
    request.scope["path_params"] = {"id": text}
    with contextlib.suppress(llmchat.NotFound):
        assert 0 <= llmchat.path_id(request, "message_id") < 2**63


BODY_NAMES = st.sampled_from(
    [
        *llmchat.ChatRequest.__struct_fields__,
        *llmchat.ConversationChanges.__struct_fields__,
        "type",
        "text",
        "data",
        "tool_call_id",
        "\0",
        "\ud800",
    ]
)
BODIES = st.recursive(
    SCALARS | WORDS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(BODY_NAMES, below, max_size=5),
    max_leaves=12,
)
RAW_BODIES = (
    BODIES.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=40)
    | st.integers(1, 3000).map(lambda depth: b"[" * depth + b"]" * depth)
)


@pytest.mark.parametrize(
    "kind", [llmchat.ChatRequest, llmchat.RegenerateRequest, llmchat.ContinueRequest, llmchat.ConversationChanges]
)
def test_whatever_body_comes_fits_or_is_refused_in_a_line(kind: Any) -> None:
    @fuzz(700)
    @given(RAW_BODIES)
    def run(body: bytes) -> None:
        request = request_of({}, {"content-type": "application/json", "content-length": str(len(body))}, body)
        try:
            value, _ = asyncio.run(llmchat.read_json(request, kind))
        except llmchat.InvalidRequest as exc:
            assert exc.message.isprintable() and len(exc.message) < 1000, exc.message
        else:
            assert isinstance(value, kind)
            llmchat.encode_json(value)
            if isinstance(value, llmchat.ChatRequest):
                check_message(value.message)

    run()


def check_message(message: Any) -> None:
    try:
        turns = llmchat.turns_of(message)
    except (llmchat.InvalidRequest, llmchat.TooLarge) as exc:
        assert exc.message.isprintable() and len(exc.message) < 1000
    else:
        check_deltas([delta for turn in turns for delta in turn.content])


HEADER_NAMES = st.sampled_from(
    [
        "host",
        "origin",
        "cookie",
        "authorization",
        "x-forwarded-for",
        "x-forwarded-proto",
        "sec-fetch-site",
        "sec-fetch-mode",
        "x-request-id",
    ]
)
HEADER_WORDS = st.sampled_from(
    [
        "localhost",
        "127.0.0.1:8000",
        "[::1]",
        "[",
        "]",
        ":",
        "@",
        ",",
        ";",
        "=",
        "llmchat_session=",
        "Bearer ",
        "bearer",
        "Basic x",
        "null",
        "https://",
        "http://localhost",
        "::ffff:",
        "%25",
        "fe80::1%eth0",
        "1.2.3.4",
        "999.1.1.1",
        "\x9b",
        "é",
        " ",
        "cross-site",
    ]
)
HEADER_VALUES = st.lists(
    HEADER_WORDS | st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=10), max_size=6
).map("".join)


@fuzz(1500)
@given(
    st.lists(st.tuples(HEADER_NAMES, HEADER_VALUES), max_size=6),
    st.sampled_from(["GET", "POST", "OPTIONS", "HEAD"]),
    st.sampled_from(["/x", "/sign-in", "/api/v1/health"]),
)
def test_whatever_headers_come_nobody_gets_in_without_the_token(
    headers: list[tuple[str, str]], method: str, path: str
) -> None:
    config = llmchat.Config(
        token="token-of-the-fuzz", trusted_proxies="192.0.2.0/24, ::/0", cors_origins="https://a.example"
    )
    gate = llmchat.Gate(config, llmchat.Store("unused"))
    scope = scope_of(*headers, method=method, path=path)
    if headers and headers[0][0] == "host":
        del scope["headers"][0]  # else there are two, which is refused at once
    scope["request_id"] = llmchat.find_request_id(scope)
    assert re.fullmatch(r"[A-Za-z0-9._:/+=-]{1,200}", scope["request_id"])
    gate.is_encrypted(scope)
    llmchat.wants_page(scope)
    assert all(isinstance(value, bytes) for _, value in gate.cross_origin_headers(scope))
    assert llmchat.bare_address(gate.address_of(scope)) == gate.address_of(scope)
    try:
        gate.admit(scope)
    except (llmchat.Forbidden, llmchat.Unauthorized, llmchat.RateLimited) as exc:
        assert len(exc.message) < 1200
    else:
        assert scope["owner"] is None and path in llmchat.PUBLIC_PATHS


@fuzz(1000)
@given(
    st.lists(
        st.sampled_from(
            ["/", "\\", "//", ".", "..", "evil.example", "@", ":", "?", "#", "%2f", "\t", "\r\n", " ", "https:", "a"]
        )
        | st.text(max_size=5),
        max_size=8,
    ).map("".join)
)
def test_wherever_a_sign_in_is_to_lead_it_leads_to_a_path_of_ours(target: str) -> None:
    location = llmchat.redirect(target).headers["location"]
    resolved = llmchat.urllib.parse.urlsplit(llmchat.urllib.parse.urljoin("http://ours.example/sign-in", location))
    assert location.startswith("/") and not location.startswith(("//", "/\\")) and resolved.netloc == "ours.example"
    page = llmchat.sign_in_form(target).body.decode()
    assert page.count("<form") == 1 and page.count("<input") == 2 and "<script" not in page


@fuzz(500)
@given(
    st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")),
    st.sampled_from(["text", "json"]),
)
def test_whatever_is_logged_is_one_printable_line(value: str, form: str) -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "said", None, None)
    record.fields = {"value": value, "status": 1}
    line = llmchat.LogFormatter(form).format(record)
    assert line.isprintable()
    if form == "json":
        assert json.loads(line)["value"] == value
    else:
        shown = re.search(r" value=(\".*\"|\S+) status=1$", line)
        assert shown and (json.loads(shown[1]) if shown[1].startswith('"') else shown[1]) == value


# ── what an operator writes ─────────────────────────────────────────────────────────────────────────────────────────

DOTENV = st.lists(
    st.sampled_from(
        [
            b"\n",
            b"=",
            b"#",
            b" ",
            b"'",
            b'"',
            b"export ",
            b"NAME",
            b"OPENAI_API_KEY=",
            b"\\",
            b"\r\n",
            b"\xef\xbb\xbf",
            "é".encode(),
        ]
    )
    | st.binary(max_size=6),
    max_size=25,
).map(b"".join)


def test_whatever_an_env_file_holds_is_read_or_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / ".env"

    @fuzz(1000)
    @given(DOTENV)
    def run(content: bytes) -> None:
        path.write_bytes(content)
        try:
            variables = llmchat.read_dotenv(path)
        except llmchat.StartError as exc:
            assert "\n" not in str(exc)
        else:
            assert all(
                re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) and "\n" not in value for name, value in variables.items()
            )

    run()


SETTINGS = st.sampled_from(
    [f"LLMCHAT_{one.name.upper()}" for one in llmchat.SETTINGS]
    + ["OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODELS", "X_BASE_URL", "X_API_KEY", "X_DIALECT"]
)
VALUES = PARAMETERS | st.sampled_from(
    [
        "a:token-token-1,b:token-token-2",
        "http://localhost/v1",
        "https://a@b/",
        "info",
        "10.0.0.0/8",
        "*",
        ",",
        "::/0",
        "https://a.example",
    ]
)


@fuzz(1500)
@given(st.dictionaries(SETTINGS, VALUES, max_size=5))
def test_whatever_the_environment_says_is_taken_or_refused_in_a_line(environment: dict[str, str]) -> None:
    try:
        config = llmchat.load_config(environment, {})
        gate = llmchat.Gate(config, llmchat.Store("unused"))
    except llmchat.StartError as exc:
        assert "\n" not in str(exc) and len(str(exc)) < 1000
    else:
        assert gate.is_open is False or llmchat.is_loopback(config.host)


# ── what comes over the wire ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("fuzz")) as running:
        yield running
    assert "Traceback" not in "".join(running.log), running.log


WIRE = st.lists(
    st.sampled_from(
        [
            b"GET",
            b"POST",
            b"PATCH",
            b" ",
            b"/",
            b"/api/v1/health",
            b"/api/v1/messages/",
            b"/docs",
            b"?after=",
            b" HTTP/1.1",
            b"\r\n",
            b"\r\n\r\n",
            b"\n",
            b"Host: localhost\r\n",
            b"Host: ",
            b"Content-Length: 5\r\n",
            b"Content-Length: ",
            b"Transfer-Encoding: chunked\r\n",
            b"Content-Type: application/json\r\n",
            b"Connection: close\r\n",
            b"Connection: keep-alive\r\n",
            b"Expect: 100-continue\r\n",
            b"Upgrade: h2c\r\n",
            b"Cookie: ",
            b"Last-Event-ID: ",
            b"5\r\n{}\r\n0\r\n\r\n",
            b"{}",
            b"%00",
            b"%",
            b":",
        ]
    )
    | st.binary(max_size=12),
    max_size=20,
)


def test_whatever_comes_over_the_wire_is_answered_or_refused(server: Server) -> None:
    @fuzz(300)
    @given(st.booleans(), WIRE)
    def run(begins_well: bool, pieces: list[bytes]) -> None:
        start = b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n" if begins_well else b""
        with connect(server) as client:
            client.sendall(start + b"".join(pieces) + b"\r\nX: \x01\r\n\r\n\x00garbage that no parser takes\r\n\r\n")
            received = read_to_end(client)
        assert 500 not in statuses(received) and b"Traceback" not in received

    run()
    assert server.get("/api/v1/health").json()["status"] == "ok"
