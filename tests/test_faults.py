"""The fault table: every way in which a provider is known to fail, through the whole service, and what comes of it.

Each case is a script for the provider on a real socket, in both dialects where it makes sense. All cases run at once,
side by side on shared servers, and are told apart by the model's name; each is asked for twice, as a stream and as a
JSON document. What every case has to show is in `check`. `python -m tests.test_faults` prints the table as Markdown.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmchat import ERROR_STATUSES, PROVIDER_EVENT_BYTES_MAX
from tests import provider as wire
from tests.client import Reader
from tests.conftest import Server
from tests.provider import (
    Answer,
    Cut,
    Drip,
    Hang,
    Pause,
    Provider,
    Raw,
    Reset,
    Script,
    Send,
    SendForever,
    ShortBody,
    Step,
    Steps,
    gzipped,
    json_answer,
    page,
    redirect,
    sse,
    unused_port,
)

KEY = "sk-a-key-that-must-not-be-shown"
TEXT = ("Hello", ", ", "wörld 😀", "\n\n", "data: [DONE]")
WHOLE = "".join(TEXT)
SOON = {"retry_after_ms": "5"}
DIALECTS = ("openai", "anthropic")
WAIT_SECONDS = 60
WORKERS = 24
PAGE = (
    "<!doctype html><html><head><title>Oh no</title><style>b{}</style><script>if (a<b) {}</script></head>"
    "<body><h1>Bad&nbsp;Gateway</h1></body></html>"
)

# ── the cases ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    """One fault. `script` gives the answers, one per attempt, for a dialect; the rest is what is expected.

    `code` None: it is completed. `words` are in the error's message. `content` is what must be kept; None: something.
    `server` names the settings that it runs under; `attempt_code` is that of each attempt, where it is another.
    """

    name: str
    script: Callable[[str], list[Script]]
    code: str | None = None
    words: str = ""
    content: str | None = ""
    attempts: int = 1
    retryable: bool | None = None
    finish_reason: str | None = None
    dialects: tuple[str, ...] = DIALECTS
    server: str = "patient"
    attempt_code: str | None = None
    notices: int | None = None


CASES: list[Case] = []


def case(name: str, code: str | None = None, words: str = "", **expected: Any) -> Callable[..., Any]:
    """Adds the decorated script to the table."""

    def add(script: Callable[[str], Any]) -> Callable[[str], Any]:
        attempts = expected.get("attempts", 1)

        def answers(dialect: str) -> list[Script]:
            return [script(dialect)] * attempts

        if code is None:
            expected.setdefault("content", WHOLE)
            expected.setdefault("finish_reason", "stop")
        CASES.append(Case(name, answers, code, words, **expected))
        return script

    return add


def text(dialect: str, *deltas: str, end: bool = True, **more: Any) -> Steps:
    """Text as a stream; without an end there is no finish_reason."""
    if dialect == "anthropic":
        return wire.anthropic_text(*(deltas or TEXT), **({} if end else {"finish": None}), **more)
    options = {} if end else {"finish": None, "usage": None, "done": False}
    return wire.openai_text(*(deltas or TEXT), **options, **more)


def refusal(dialect: str, status: int, message: str, **more: str) -> Answer:
    make = wire.anthropic_error if dialect == "anthropic" else wire.openai_error
    return make(status, message, **more)


def error_event(dialect: str, message: str, kind: str) -> Steps:
    if dialect == "anthropic":
        return wire.anthropic_error_event(message, kind)
    return wire.openai_error_event(message, kind, None)


REFUSALS = [
    (400, "provider_rejected", 1),
    (401, "provider_auth", 1),
    (402, "provider_rejected", 1),
    (403, "provider_auth", 1),
    (404, "provider_rejected", 1),
    (408, "provider_unavailable", 3),
    (409, "provider_unavailable", 3),
    (413, "provider_rejected", 1),
    (422, "provider_rejected", 1),
    (429, "provider_rate_limited", 3),
    (500, "provider_unavailable", 3),
    (503, "provider_unavailable", 3),
    (529, "provider_unavailable", 3),
]
for status, code, attempts in REFUSALS:
    case(f"HTTP {status}", code, f"answered {status}: The provider's own words, 你好", attempts=attempts)(
        lambda dialect, status=status: refusal(dialect, status, "The provider's own words, 你好", **SOON)
    )


@case("HTTP 502 with a page", "provider_unavailable", "answered 502: Oh no Bad Gateway", attempts=3)
def _(dialect: str) -> Script:
    return page(502, PAGE, **SOON)


@case("HTTP 500 as plain text", "provider_unavailable", "answered 500: Internal Server Error", attempts=3)
def _(dialect: str) -> Script:
    return page(500, "Internal Server Error", "text/plain", **SOON)


@case("HTTP 500 without a body", "provider_unavailable", "answered 500: (an empty body)", attempts=3)
def _(dialect: str) -> Script:
    return page(500, "", "text/plain", **SOON)


@case("HTTP 204", "provider_protocol", "answered 204")
def _(dialect: str) -> Script:
    return Answer(204, {"transfer-encoding": None, "content-type": None}, framing="close")


@case("HTTP 400 of 100,000 characters", "provider_rejected", "xxxx…")
def _(dialect: str) -> Script:
    return refusal(dialect, 400, "x" * 100_000)


@case("HTTP 422 as FastAPI says it", "provider_rejected", "body.messages: Input should be a valid list")
def _(dialect: str) -> Script:
    return json_answer({"detail": [{"loc": ["body", "messages"], "msg": "Input should be a valid list"}]}, 422)


@case("HTTP 400 as Gemini says it: a list of one, a key", "provider_auth", "API key not valid; check ")
def _(dialect: str) -> Script:
    return json_answer([{"error": {"code": 400, "message": "API key not valid", "status": "INVALID_ARGUMENT"}}], 400)


@case("HTTP 401 that repeats the key", "provider_auth", "Incorrect API key provided: …; check ")
def _(dialect: str) -> Script:
    return refusal(dialect, 401, f"Incorrect API key provided: {KEY}")


@case("HTTP 400 with half a surrogate pair and a NUL", "provider_rejected", "oh \ufffd no")
def _(dialect: str) -> Script:
    return page(400, '{"error":{"message":"oh \\ud83d\\u0000 no"}}', "application/json")


@case("HTTP 500 nested 100,000 deep", "provider_unavailable", "answered 500: [[[[", attempts=3)
def _(dialect: str) -> Script:
    return page(500, "[" * 100_000, "application/json", **SOON)


@case("HTTP 429 insufficient_quota", "provider_rate_limited", "You exceeded your quota", dialects=("openai",))
def _(dialect: str) -> Script:
    return wire.openai_error(429, "You exceeded your quota", "insufficient_quota", "insufficient_quota", **SOON)


@case("HTTP 429 insufficient_quota, x-should-retry: true", "provider_rate_limited", "quota", dialects=("openai",))
def _(dialect: str) -> Script:
    more = {"x_should_retry": "true", **SOON}
    return wire.openai_error(429, "You exceeded your quota", "insufficient_quota", "insufficient_quota", **more)


@case("HTTP 400, x-should-retry: true", "provider_rejected", "once more", attempts=3)
def _(dialect: str) -> Script:
    return refusal(dialect, 400, "once more", x_should_retry="true", **SOON)


@case("HTTP 503, x-should-retry: false", "provider_unavailable", "gone")
def _(dialect: str) -> Script:
    return refusal(dialect, 503, "gone", x_should_retry="false", **SOON)


@case("HTTP 503, Retry-After: 121", "provider_unavailable", "later")
def _(dialect: str) -> Script:
    return refusal(dialect, 503, "later", retry_after="121")


@case("HTTP 503, Retry-After: nan", "provider_unavailable", "never", attempts=3)
def _(dialect: str) -> Script:
    return refusal(dialect, 503, "never", retry_after="nan", retry_after_ms="nan")


@case(
    "HTTP 302",
    "provider_protocol",
    "answered 302: a redirect to http://127.0.0.1:9/v1/elsewhere, which is not followed",
)
def _(dialect: str) -> Script:
    return redirect("http://127.0.0.1:9/v1/elsewhere")


@case("an error whose body never ends", "provider_auth", "answered 401: half a sen")
def _(dialect: str) -> Script:
    return Answer(401, {"content-type": "text/plain"}, [Send(b"half a sen"), Hang()])


@case("connection refused", "provider_unavailable", ": Connection refused", attempts=3, server="closed")
def _(dialect: str) -> Script:
    return []


@case("reset before the head", "provider_unavailable", "broke the connection before it answered", attempts=3)
def _(dialect: str) -> Script:
    return Answer(before=[Reset()])


@case("closed before the head", "provider_unavailable", "broke the connection before it answered", attempts=3)
def _(dialect: str) -> Script:
    return Answer(before=[Cut()])


@case("not HTTP at all", "provider_protocol", "something that is not HTTP")
def _(dialect: str) -> Script:
    return Answer(before=[Raw(b"220 mail.example ESMTP ready\r\n\r\n"), Cut()])


@case("reset after the head", "provider_truncated", "broke", attempts=3)
def _(dialect: str) -> Script:
    return [Pause(0.01), Reset()]


@case("reset in the middle", "provider_truncated", "broke", content=WHOLE, retryable=True)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), Pause(0.1), Reset()]


@case("closed in the middle of an event", "provider_truncated", "broke", content=WHOLE, retryable=True)
def _(dialect: str) -> Script:
    last = text(dialect, "lost", end=False)[-1]
    assert isinstance(last, Send)
    return [*text(dialect, end=False), Send(last.data[: len(last.data) // 2]), Cut()]


@case("a Content-Length that is not kept", "provider_truncated", "broke", content=WHOLE)
def _(dialect: str) -> Script:
    return Answer(steps=[*text(dialect, end=False), ShortBody(100)], framing="length")


@case("a chunked body without its end", "provider_truncated", "broke", content=WHOLE)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), ShortBody()]


@case("an orderly end without a finish_reason", "provider_truncated", "before the answer was finished", content=WHOLE)
def _(dialect: str) -> Script:
    return text(dialect, end=False)


@case("the same on a body that its connection ends", "provider_truncated", "before the answer", content=WHOLE)
def _(dialect: str) -> Script:
    return Answer(steps=text(dialect, end=False), framing="close")


@case("the end mark without a finish_reason", "provider_truncated", "before the answer was finished", content=WHOLE)
def _(dialect: str) -> Script:
    end = wire.anthropic_event("message_stop") if dialect == "anthropic" else sse("[DONE]")
    return [*text(dialect, end=False), end]


@case("no end mark, but a finish_reason")
def _(dialect: str) -> Script:
    if dialect == "anthropic":
        return text(dialect)[:-1]
    return wire.openai_text(*TEXT, done=False)


@case("no end mark, a finish_reason, and the connection stays open")
def _(dialect: str) -> Script:
    steps = text(dialect)[:-1] if dialect == "anthropic" else wire.openai_text(*TEXT, done=False, usage=None)
    return [*steps, Hang()]


@case("the end mark, and the connection stays open")
def _(dialect: str) -> Script:
    return [*text(dialect), Hang()]


@case("the end mark, and keep-alives for ever")
def _(dialect: str) -> Script:
    return [*text(dialect), SendForever(lambda _: b": still here\n\n", 0.01)]


@case("more text after the end mark")
def _(dialect: str) -> Script:
    return [*text(dialect), *text(dialect, "too late")]


@case("reset after the finish_reason")
def _(dialect: str) -> Script:
    return [*text(dialect)[:-1], Pause(0.1), Reset()]


@case("an error in the middle", "provider_unavailable", "reported an error: It broke", content=WHOLE, retryable=True)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), *error_event(dialect, "It broke", "server_error")]


@case("a rate limit in the middle", "provider_rate_limited", "reported an error: Slower", content=WHOLE)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), *error_event(dialect, "Slower", "rate_limit_error")]


@case("an error of another shape, by its event's name", "provider_unavailable", "Context size exceeded", content=WHOLE)
def _(dialect: str) -> Script:
    body = {"code": 500, "message": "Context size exceeded", "type": "server_error"}
    return [*text(dialect, end=False), sse(body, "error")]


@case("an error event that is no JSON", "provider_unavailable", "reported an error: out of memory", content=WHOLE)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), sse("out of memory", "error")]


@case(
    "an error in the middle with choices: []", "provider_rate_limited", "Upstream", content=WHOLE, dialects=("openai",)
)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), sse({"error": {"code": 429, "message": "Upstream"}, "choices": []})]


@case("a bare error after events", "provider_rejected", "reported an error: Prompt too long", content=WHOLE)
def _(dialect: str) -> Script:
    error = '{\n  "error": {\n    "code": 400,\n    "message": "Prompt too long"\n  }\n}\n'
    return [*text(dialect, end=False), Send(error.encode())]


@case("a transient error before the first delta", "provider_unavailable", "Overloaded", attempts=3)
def _(dialect: str) -> Script:
    return [Pause(0.01), *error_event(dialect, "Overloaded", "overloaded_error")]


@case("a lasting error before the first delta", "provider_rejected", "reported an error: Too long")
def _(dialect: str) -> Script:
    return error_event(dialect, "Too long", "invalid_request_error")


for word in ("error", "network_error"):
    case(f"finish_reason {word}", "provider_unavailable", repr(word), content=WHOLE, dialects=("openai",))(
        lambda dialect, word=word: wire.openai_text(*TEXT, finish=word)
    )


@case("HTTP 200 with a page", "provider_protocol", "something that is no answer: Oh no Bad Gateway")
def _(dialect: str) -> Script:
    return page(200, PAGE)


@case("a page that says it is a stream", "provider_protocol", "something that is no answer: Oh no Bad Gateway")
def _(dialect: str) -> Script:
    return page(200, PAGE, "text/event-stream")


@case("an error document with HTTP 200", "provider_rate_limited", "reported an error: Slow down", attempts=1)
def _(dialect: str) -> Script:
    return json_answer({"error": {"message": "Slow down: insufficient_quota", "code": "429"}})


@case("JSON that is no answer", "provider_protocol", 'something that is no answer: {"status":"ok"}')
def _(dialect: str) -> Script:
    return json_answer({"status": "ok"})


@case("JSON cut in the middle", "provider_protocol", 'something that is no answer: {"choi')
def _(dialect: str) -> Script:
    return page(200, '{"choices": [{"mess', "application/json")


@case("an empty body", "provider_truncated", "before the answer was finished")
def _(dialect: str) -> Script:
    return page(200, "", "text/event-stream")


@case("garbage", "provider_protocol", "something that is no answer: ")
def _(dialect: str) -> Script:
    return page(200, bytes(range(128, 256)) * 20 + b"\n\n", "text/event-stream")


@case("an event that is no JSON", "provider_protocol", "something that is no answer: not json", content=WHOLE)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), sse("not json")]


@case("an event nested 100,000 deep", "provider_protocol", "something that is no answer: {", content=WHOLE)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), sse('{"usage":' + "[" * 100_000)]


@case("an event over 8 MiB", "provider_protocol", "8,388,608", content=WHOLE)
def _(dialect: str) -> Script:
    size = PROVIDER_EVENT_BYTES_MAX // 16384 + 20
    return [*text(dialect, end=False), Send(b"data: "), *[Send(b"x" * 16384)] * size, Hang()]


@case("an event of one line that never ends", "provider_protocol", "8,388,608", content=WHOLE)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), SendForever(lambda _: b"x" * 65536)]


# ── what looks like a fault and is none ─────────────────────────────────────────────────────────────────────────────


@case("a JSON document in answer to stream: true")
def _(dialect: str) -> Script:
    return wire.anthropic_json(WHOLE) if dialect == "anthropic" else wire.openai_json(WHOLE)


@case("a JSON document after blank lines, as text/plain")
def _(dialect: str) -> Script:
    answer = wire.anthropic_json(WHOLE) if dialect == "anthropic" else wire.openai_json(WHOLE)
    return Answer(200, {"content-type": "text/plain"}, [Send(b"\n\n"), Pause(0.05), Send(b"\n"), *answer.steps])


@case("a stream that says it is JSON")
def _(dialect: str) -> Script:
    return Answer(200, {"content-type": "application/json"}, text(dialect))


@case("gzip")
def _(dialect: str) -> Script:
    return gzipped(Answer(steps=text(dialect)))


@case("one byte at a time")
def _(dialect: str) -> Script:
    return wire.dripped(text(dialect))


@case("CRLF, a byte order mark, comments, several data lines")
def _(dialect: str) -> Script:
    sends = [step.data for step in text(dialect) if isinstance(step, Send)]
    crlf = [data.replace(b'{"', b'{\ndata: "', 1).replace(b"\n", b"\r\n") for data in sends]
    return [Send(b"\xef\xbb\xbf: hello\r\n\r\n"), *[Drip(b": keep-alive\r\n\r\n" + data, 5) for data in crlf]]


@case("a last event that nothing delimits", dialects=("openai",))
def _(dialect: str) -> Script:
    end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
    return [*text(dialect, end=False), Send(end)]


@case("empty choices, null and absent deltas", dialects=("openai",))
def _(dialect: str) -> Script:
    odd: list[object] = [
        {"choices": [], "prompt_filter_results": []},
        {"choices": None},
        {"id": "x"},
        {"choices": [{"index": 0}]},
        {"choices": [{"index": 0, "delta": None, "finish_reason": None}]},
        {"choices": [{"delta": {"content": None, "tool_calls": None, "reasoning_content": ""}}], "usage": None},
        {"choices": [{"delta": {"content": []}}], "error": None},
    ]
    return [*map(sse, odd), *text(dialect), *map(sse, odd)]


@case("unknown events and blocks", dialects=("anthropic",))
def _(dialect: str) -> Script:
    odd = [
        sse({"type": "ping"}, "ping"),
        sse("not json", "future_event"),
        wire.anthropic_event("future_event", delta="a string", error=None),
        wire.anthropic_event("content_block_start", index=7, content_block={"type": "future", "text": 1}),
        wire.anthropic_event("content_block_delta", index=7, delta={"type": "future_delta", "text": {"a": 1}}),
        wire.anthropic_event("content_block_delta", index=7, delta={"type": "citations_delta", "citation": {"x": 1}}),
        wire.anthropic_event("content_block_stop", index=7),
    ]
    steps = text(dialect)
    return [odd[0], steps[0], *odd, *steps[1:]]


@case("half a surrogate pair in each of two events, and one alone", content="a😀b\ufffdc\ufffd")
def _(dialect: str) -> Script:
    deltas = ["a\ud83d", "\ude00b", "\ud83d", "c\ud83d"]
    steps: Steps = []
    for step in text(dialect, *"0123"):
        assert isinstance(step, Send)
        data = step.data
        for number, delta in enumerate(deltas):
            escaped = delta.encode("ascii", "backslashreplace")
            data = data.replace(b'"%d"' % number, b'"' + escaped + b'"')
        steps.append(Send(data))
    return steps


@case("a NUL in the content, first and within", content="\0a\0b")
def _(dialect: str) -> Script:
    return text(dialect, "\0", "a\0b")


@case("a refusal by the model's filter", finish_reason="content_filter")
def _(dialect: str) -> Script:
    return _with_finish(dialect, "content_filter", "refusal")


@case("an answer that reached its limit", finish_reason="length")
def _(dialect: str) -> Script:
    return _with_finish(dialect, "length", "max_tokens")


@case("an unknown finish_reason")
def _(dialect: str) -> Script:
    return _with_finish(dialect, "because", "because")


def _with_finish(dialect: str, openai: str, anthropic: str) -> Steps:
    if dialect == "anthropic":
        return wire.anthropic_text(*TEXT, finish=anthropic)
    return wire.openai_text(*TEXT, finish=openai)


# ── guards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@case("silence before the head", "stalled", "sent no first delta for ", server="impatient")
def _(dialect: str) -> Script:
    return Answer(before=[Hang()])


@case("silence after the head", "stalled", "sent no first delta for ", server="impatient")
def _(dialect: str) -> Script:
    return [Hang()]


@case(
    "silence in the middle", "stalled", "sent no further delta for ", content=WHOLE, retryable=True, server="impatient"
)
def _(dialect: str) -> Script:
    return [*text(dialect, end=False), Hang()]


@case("nothing but keep-alives", "stalled", "sent no first delta for ", server="impatient")
def _(dialect: str) -> Script:
    return [SendForever(lambda _: b": OPENROUTER PROCESSING\n\n", 0.05)]


@case("nothing but keep-alives in the middle", "stalled", "sent no further delta", content=WHOLE, server="impatient")
def _(dialect: str) -> Script:
    keepalive = sse({"type": "ping"}, "ping").data if dialect == "anthropic" else b": keep-alive\n\n"
    return [*text(dialect, end=False), SendForever(lambda _: keepalive, 0.05)]


@case("keep-alives for longer than the stall timeout, then text", server="impatient")
def _(dialect: str) -> Script:
    pauses: list[Step] = [step for _ in range(12) for step in (Send(b": wait\n\n"), Pause(0.1))]
    steps = text(dialect)
    return [*steps[:2], *pauses, *steps[2:]]


@case("past the deadline", "deadline_exceeded", "ran for 4 s, the limit", content=None, server="hurried")
def _(dialect: str) -> Script:
    return [*opening(dialect), SendForever(lambda number: _delta(dialect, f"{number} "), 0.05)]


@case(
    "past the deadline while waiting for a retry",
    "deadline_exceeded",
    "ran for 4 s, the limit",
    server="hurried",
    attempt_code="provider_unavailable",
    notices=1,
)
def _(dialect: str) -> Script:
    return refusal(dialect, 503, "later", retry_after="60")


@case("an answer that is too long", "too_long", "2,000 characters", content=None, server="impatient")
def _(dialect: str) -> Script:
    return [*opening(dialect), SendForever(lambda number: _delta(dialect, f"{number} "))]


@case("a circle in the text", "repetition", "goes round in circles, repeating ", content=None)
def _(dialect: str) -> Script:
    pieces = itertools.cycle(_delta(dialect, piece) for piece in ("And so", " on and", " on. "))
    return [*opening(dialect), SendForever(pieces, 0.001)]


@case("a circle in the reasoning", "repetition", "goes round in circles, repeating ", content=None)
def _(dialect: str) -> Script:
    pieces = itertools.cycle(_delta(dialect, piece, "thinking") for piece in ("Wait,", " let me see again.", " Hm. "))
    return [*opening(dialect), SendForever(pieces, 0.001)]


@case("the same delta a hundred times", "repetition", "goes round in circles, repeating 'no'", content="no " * 100)
def _(dialect: str) -> Script:
    return [*opening(dialect), *[Send(_delta(dialect, "no "))] * 100, Hang()]


def opening(dialect: str) -> Steps:
    """What comes before the first delta."""
    if dialect == "anthropic":
        block = {"type": "text", "text": ""}
        return [*wire.anthropic_start(), wire.anthropic_event("content_block_start", index=0, content_block=block)]
    return [wire.openai_chunk({"role": "assistant", "content": None})]


def _delta(dialect: str, piece: str, kind: str = "text") -> bytes:
    """One delta's event."""
    if dialect == "anthropic":
        name = "text_delta" if kind == "text" else "thinking_delta"
        return wire.anthropic_event("content_block_delta", index=0, delta={"type": name, kind: piece}).data
    return wire.openai_chunk({"content" if kind == "text" else "reasoning_content": piece}).data


# ── running them all ────────────────────────────────────────────────────────────────────────────────────────────────

SERVERS: dict[str, dict[str, str]] = {
    "patient": {},
    "impatient": {
        "LLMCHAT_STALL_TIMEOUT_SECONDS": "1",
        "LLMCHAT_FIRST_DELTA_TIMEOUT_SECONDS": "3",
        "LLMCHAT_KEEPALIVE_SECONDS": "4",
        "LLMCHAT_ANSWER_CHARACTERS_MAX": "2000",
    },
    "hurried": {"LLMCHAT_GENERATION_TIMEOUT_SECONDS": "4"},
    "closed": {},
}


@dataclass
class Run:
    """What became of a case in a dialect: the stream's reader, and the answer to the same as a document."""

    case: Case
    dialect: str
    reader: Reader = field(default_factory=Reader)
    message: dict[str, Any] = field(default_factory=dict)
    message_id: int = 0
    stored: str = ""
    document_status: int = 0
    document: dict[str, Any] = field(default_factory=dict)
    problem: BaseException | None = None

    @property
    def model(self) -> str:
        return f"{self.dialect}: {self.case.name}"

    @property
    def error(self) -> dict[str, Any]:
        return (self.reader.end or {}).get("error") or {}


class Table:
    """All cases, run at once against one provider and one server per kind of settings."""

    def __init__(self, folder: Path, provider: Provider, cases: list[Case]) -> None:
        self.provider = provider
        self.servers: dict[str, Server] = {}
        self._folder = folder
        self.runs = {run.model: run for one in cases for run in (Run(one, dialect) for dialect in one.dialects)}

    def __enter__(self) -> Table:
        for name in sorted({run.case.server for run in self.runs.values()} | {"patient"}):
            (self._folder / name).mkdir()
            port = unused_port() if name == "closed" else self.provider.port
            settings = {
                "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1",
                "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port}",
                "OTHER_BASE_URL": f"http://127.0.0.1:{port}/v1",
                "OPENAI_API_KEY": KEY,
                "ANTHROPIC_API_KEY": KEY,
            }
            self.servers[name] = Server(self._folder / name, **settings, **SERVERS[name])
            # The first one loads the HTTP client.
            warm_up = {"message": "Hello", "model": "openai/warm-up", "stream": False}
            self.servers[name].post("/api/v1/chat", warm_up, timeout=WAIT_SECONDS)
        for run in self.runs.values():
            self.provider.script(*run.case.script(run.dialect), model=run.model)
            self.provider.script(*run.case.script(run.dialect), model=run.model + " (document)")
        with ThreadPoolExecutor(WORKERS) as workers:
            list(workers.map(self._run, self.runs.values()))
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers.values():
            server.close()

    def _run(self, run: Run) -> None:
        server = self.servers[run.case.server]
        model, deadline = f"{run.dialect}/{run.model}", time.monotonic() + WAIT_SECONDS
        try:
            with server.chat("Hello", model=model) as stream:
                assert stream.status == 200, stream.error
                for event in stream.events():
                    run.message_id = event.data["message_id"] if event.name == "start" else run.message_id
                    run.reader.take(event)
                    assert time.monotonic() < deadline, f"no end within {WAIT_SECONDS} s"
            run.message = server.message(run.message_id)
            run.stored = server.content(run.message_id)
            body = {"message": "Hello", "model": model + " (document)", "stream": False}
            response = server.post("/api/v1/chat", body, timeout=WAIT_SECONDS)
            run.document_status, run.document = response.status_code, response.json()
        except BaseException as exc:
            run.problem = exc


def check(table: Table, run: Run) -> None:
    """What every case has to show."""
    expected = run.case
    if run.problem is not None:
        raise run.problem
    assert run.reader.end is not None, run.reader.names
    check_ending(run)
    assert run.reader.content == expected.content or (expected.content is None and run.reader.content)
    assert run.stored == run.reader.content == "".join(part["text"] for part in run.message["content"])
    attempts = run.message["attempts"]
    assert len(attempts) == expected.attempts
    codes = [attempt["error"] and attempt["error"]["code"] for attempt in attempts]
    assert codes == [expected.attempt_code or expected.code] * expected.attempts
    assert {(attempt["provider"], attempt["model"]) for attempt in attempts} == {(run.dialect, run.model)}
    notices = expected.attempts - 1 if expected.notices is None else expected.notices
    assert run.reader.names.count("notice") == notices
    check_connections(table, run)
    assert table.servers[expected.server].get("/api/v1/health").status_code == 200


def check_ending(run: Run) -> None:
    """The stream's end, the stored message and the document say the same, and it is what is expected."""
    expected, end = run.case, run.reader.end
    assert end is not None
    for name in ("status", "finish_reason", "error", "usage"):
        assert run.message[name] == end[name]
    if expected.code is None:
        assert (end["status"], end["error"]) == ("completed", None), end["error"]
        assert end["finish_reason"] == expected.finish_reason
        assert run.document_status == 200 and run.document["text"] == run.message["text"]
        return
    assert (end["status"], run.error["code"]) == ("failed", expected.code), run.error
    assert expected.words in run.error["message"]
    assert len(run.error["message"]) < 700 and KEY not in str(run.message)
    assert expected.retryable in (None, run.error["retryable"])
    if expected.code == "provider_auth":
        assert f"check {run.dialect.upper()}_API_KEY" in run.error["message"]
    assert run.document_status == ERROR_STATUSES[expected.code]
    assert run.document["error"]["code"] == expected.code and run.document["message_id"] > 0


def check_connections(table: Table, run: Run) -> None:
    """As many requests as attempts, and each one's connection is closed unless its answer was read whole."""
    requests = [request for request in table.provider.chats if request.field("model") == run.model]
    assert len(requests) == (0 if run.case.server == "closed" else run.case.attempts)
    for request in requests:
        if not request.answered_whole:
            request.wait_closed(20)


def find_runs() -> list[str]:
    return [f"{dialect}: {one.name}" for one in CASES for dialect in one.dialects]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    """Runs the cases that were selected."""
    wanted = {item.callspec.params.get("model") for item in request.session.items if hasattr(item, "callspec")}
    cases = [one for one in CASES if any(f"{dialect}: {one.name}" in wanted for dialect in one.dialects)]
    with Provider() as provider, Table(tmp_path_factory.mktemp("faults"), provider, cases) as running:
        yield running


@pytest.mark.parametrize("model", find_runs())
def test_a_fault_ends_honestly(table: Table, model: str) -> None:
    check(table, table.runs[model])


def test_a_redirect_takes_no_key_along(table: Table) -> None:
    assert not [request for request in table.provider.requests if "elsewhere" in request.path]


def main() -> None:
    """Prints the table as Markdown."""
    print("| case | dialect | attempts | status | code | HTTP | message |\n|---|---|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        Provider() as provider,
        Table(Path(folder), provider, CASES) as table,
    ):
        for run in table.runs.values():
            end = run.reader.end or {"status": repr(run.problem), "finish_reason": None}
            words = (
                " ".join(run.error.get("message", "").split()).replace("|", "\\|").replace(str(provider.port), "PORT")
            )
            words = words if len(words) <= 160 else words[:159] + "…"
            code = run.error.get("code") or f"({end['finish_reason']})"
            attempts = len(run.message.get("attempts", []))
            cells = (run.case.name, run.dialect, attempts, end["status"], code, run.document_status, words)
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
