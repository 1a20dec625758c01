"""A provider for the tests: a real HTTP/1.1 server on a real loopback socket that does exactly what a script says.

    test ──script(answers)──▶ queue ──one per request──▶ steps ──▶ socket ──▶ the service under test
    test ◀──requests, times, who closed──────────────────────────────────────────┘

A script is made of steps (frozen values: send these bytes, pause, wait for a gate, reset …); helpers make the steps of
both dialects. An unscripted request gets `default_answer(last user message)`, which a test can compute as well.
The server has one thread and one event loop, one task per connection. It notices a client's close at any time, since
its reader calls back at the end of the input; a client that only shuts down its sending side counts as closed.
Bytes of a step are in the kernel before the next step begins. Times are seconds of `time.monotonic()`.

Sections: the thread · steps and answers · OpenAI · Anthropic · the default answer and scenarios · the server · main.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import pathlib
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Literal, Self, TypeVar

HEAD_BYTES_MAX = 1 << 20  # of a request's head
WAIT_SECONDS = 20.0  # of a test for the server, unless it says otherwise
GATE_SECONDS_MAX = 60.0  # a gate that nobody opens is a problem of the test
HANG_SECONDS_MAX = 600.0
CLOSE_SECONDS_MAX = 10.0
CREATED_AT_S = 1_700_000_000
MODEL = "test-model"
Value = TypeVar("Value")

# ---- The thread -------------------------------------------------------------------------------------------------


class WatchedReader(asyncio.StreamReader):
    """A StreamReader that calls `on_end` the moment the peer closes or resets, whoever reads at that time."""

    on_end: Callable[[], object] | None = None

    def feed_eof(self) -> None:
        super().feed_eof()
        if self.on_end:
            self.on_end()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        if self.on_end:
            self.on_end()


class LoopThread(ABC):
    """A listening loopback socket, served by an event loop in its own thread, one task per connection.

    `start` and `close` (or `with`) own all of it: after `close` no thread, task or socket is left.
    `close` raises AssertionError with `problems`, the mistakes that the server met.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.problems: list[str] = []
        self.changed = threading.Condition()
        self._tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        self.port = self._socket.getsockname()[1]
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), name=type(self).__name__)
        self._thread.daemon = True
        self._thread.start()
        if not ready.wait(WAIT_SECONDS):
            raise TimeoutError("the server's event loop did not start")
        return self

    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._loop.call_soon_threadsafe(self._closing.set)
        thread.join(CLOSE_SECONDS_MAX)
        assert not thread.is_alive(), "the server's thread did not end"
        assert not self.problems, "; ".join(self.problems)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except AssertionError:
            if kind is None:  # never hide the test's own failure
                raise

    def call(self, function: Callable[[], Value], timeout: float = WAIT_SECONDS) -> Value:
        """What `function` returns, run in the server's thread."""

        async def run() -> Value:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout)

    def wait_until(self, predicate: Callable[[], bool], what: str, timeout: float = WAIT_SECONDS) -> None:
        """Returns once `predicate` holds; TimeoutError names `what` did not happen."""
        with self.changed:
            if not self.changed.wait_for(predicate, timeout):
                raise TimeoutError(f"not within {timeout} s: {what}")

    def notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    @abstractmethod
    async def serve(self, reader: WatchedReader, writer: asyncio.StreamWriter) -> None:
        """Answers one connection, for as long as it is open."""

    async def _main(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        server = await self._loop.create_server(self._protocol, sock=self._socket)
        ready.set()
        await self._closing.wait()
        self._loop.remove_reader(self._socket.fileno())  # accepts no more; a closed server leaves open what it accepts
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # also those that accept a connection just now
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)
        server.close()
        await asyncio.sleep(0)  # the transports' last callbacks
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.wait_closed(), 1)

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        reader = WatchedReader(limit=HEAD_BYTES_MAX)
        return asyncio.StreamReaderProtocol(reader, lambda _, writer: self._accept(reader, writer))

    def _accept(self, reader: WatchedReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=0)  # so that drain() means: the kernel has it
        # asyncio leaves Nagle's algorithm on for sockets that do not name their protocol: 40 ms for each answer.
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self.serve(reader, writer))
        self._tasks[task] = writer
        reader.on_end = task.cancel
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task).transport.abort()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.problems.append(repr(error))


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    """From now on, closing the socket sends RST: a linger time of zero discards the connection (socket(7))."""
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def unused_port() -> int:
    """A loopback port on which nobody listens: connecting to it is refused."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port: int = unused.getsockname()[1]
        return port


# ---- Steps and answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """A piece of the body, in one write (and one HTTP chunk)."""

    data: bytes


@dataclass(frozen=True)
class Drip:
    """A piece of the body in writes of `size` bytes; without a `delay` in seconds the kernel may join some."""

    data: bytes
    size: int = 1
    delay: float = 0.0


@dataclass(frozen=True)
class SendForever:
    """A body until the client closes: from a function of 0, 1, 2 … or from an iterable (until that ends)."""

    source: Callable[[int], bytes] | Iterable[bytes]
    delay: float = 0.0


@dataclass(frozen=True)
class Raw:
    """Bytes on the wire as they are, outside of the body's framing."""

    data: bytes


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class WaitFor:
    """Waits until the test calls `provider.open_gate(gate)`."""

    gate: str


@dataclass(frozen=True)
class Hang:
    """Keeps the connection open and silent until the client closes."""

    seconds: float = HANG_SECONDS_MAX


@dataclass(frozen=True)
class Cut:
    """Closes politely (FIN), wherever the answer is."""


@dataclass(frozen=True)
class Reset:
    """Closes with RST."""


@dataclass(frozen=True)
class ShortBody:
    """Closes politely with the body unfinished: no last chunk, or Content-Length too large by `missing` bytes."""

    missing: int = 1


Step = Send | Drip | SendForever | Raw | Pause | WaitFor | Hang | Cut | Reset | ShortBody
Steps = list[Step]
Framing = Literal["chunked", "length", "close"]


@dataclass(frozen=True)
class Answer:
    """A response: `before` are steps ahead of the status line (`[Hang()]`: no answer at all), `steps` make the body.

    The content type is text/event-stream unless `headers` (lower case) says otherwise; None leaves a header out.
    """

    status: int = 200
    headers: Mapping[str, str | None] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    framing: Framing = "chunked"
    before: Sequence[Step] = ()

    def head(self, keep_alive: str) -> bytes:
        headers: dict[str, str | None] = {"content-type": "text/event-stream; charset=utf-8", "connection": keep_alive}
        if self.framing == "chunked":
            headers["transfer-encoding"] = "chunked"
        elif self.framing == "length":
            headers["content-length"] = str(sum(map(promised_bytes, self.steps)))
        headers.update(self.headers)
        phrases = {status.value: status.phrase for status in HTTPStatus}
        lines = [f"HTTP/1.1 {self.status} {phrases.get(self.status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def promised_bytes(step: Step) -> int:
    """What a step adds to Content-Length."""
    if isinstance(step, SendForever):
        raise ValueError("SendForever has no length: use chunked or close framing")
    if isinstance(step, Send | Drip):
        return len(step.data)
    return step.missing if isinstance(step, ShortBody) else 0


def encode_json(value: object) -> bytes:
    """Compact UTF-8: characters beyond ASCII, U+2028 too, are on the wire as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def sse(data: object, event: str | None = None) -> Send:
    """One SSE event; a string goes out as it is (a `data:` line per line), anything else as JSON."""
    text = data if isinstance(data, str) else encode_json(data).decode()
    lines = [f"event: {event}"] if event else []
    lines += [f"data: {line}" for line in text.split("\n")]
    return Send(("\n".join(lines) + "\n\n").encode())


def page(status: int, body: str | bytes, content_type: str = "text/html", **headers: str | None) -> Answer:
    """A body with Content-Length; in the names of `headers` an underscore stands for a hyphen."""
    data = body.encode() if isinstance(body, str) else body
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"content-type": content_type, **named}, [Send(data)], framing="length")


def json_answer(value: object, status: int = 200, **headers: str | None) -> Answer:
    return page(status, encode_json(value), "application/json", **headers)


def redirect(location: str, status: int = 302) -> Answer:
    return page(status, "", location=location)


def gzipped(answer: Answer) -> Answer:
    """The same answer with its body gzip-encoded, every piece flushed, so that a stream still arrives in pieces."""
    compressor = zlib.compressobj(wbits=31)
    steps: Steps = []
    for step in answer.steps:
        if isinstance(step, Send | Drip):
            step = replace(step, data=compressor.compress(step.data) + compressor.flush(zlib.Z_SYNC_FLUSH))
        steps.append(step)
    headers = {**answer.headers, "content-encoding": "gzip"}
    return replace(answer, headers=headers, steps=[*steps, Send(compressor.flush())])


def paced(sends: Iterable[Send], delay: float) -> Steps:
    """The sends, each after `delay` seconds."""
    return [step for send in sends for step in ((Pause(delay), send) if delay else (send,))]


def dripped(steps: Iterable[Step], size: int = 1, delay: float = 0.0) -> Steps:
    """The steps with every Send in pieces of `size` bytes."""
    return [Drip(step.data, size, delay) if isinstance(step, Send) else step for step in steps]


# ---- OpenAI -----------------------------------------------------------------------------------------------------
# `data: {chat.completion.chunk}` events, then `data: [DONE]` (platform.openai.com/docs/api-reference/chat-streaming).
# Helpers for streams make steps and can be joined: [*openai_reasoning("Hm"), *openai_text("Hi")]. `usage` is (input
# tokens, output tokens); `finish=None`, `usage=None` and `done=False` leave that part of the end away.

Usage = tuple[int, int]


def openai_chunk(delta: object, finish: str | None = None) -> Send:
    return _openai_event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


def openai_usage(usage: Usage) -> dict[str, int]:
    return {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}


def openai_end(finish: str | None = "stop", usage: Usage | None = None, done: bool = True) -> Steps:
    steps: Steps = [openai_chunk({}, finish)] if finish else []
    steps += [_openai_event(choices=[], usage=openai_usage(usage))] if usage else []
    return [*steps, sse("[DONE]")] if done else steps


def openai_text(
    *deltas: str, finish: str | None = "stop", usage: Usage | None = (9, 3), done: bool = True, delay: float = 0.0
) -> Steps:
    """A role chunk, a chunk per delta (`delay` seconds before each), and the end."""
    first: Step = openai_chunk({"role": "assistant", "content": ""})
    return [first, *paced((openai_chunk({"content": d}) for d in deltas), delay), *openai_end(finish, usage, done)]


def openai_reasoning(*deltas: str, field: str = "reasoning_content", delay: float = 0.0) -> Steps:
    """Reasoning without an end; `field` is `reasoning` at some providers."""
    return paced((openai_chunk({field: d, "content": None}) for d in deltas), delay)


def openai_tool_calls(
    *calls: tuple[str, str, str],
    size: int = 8,
    finish: str | None = "tool_calls",
    usage: Usage | None = (9, 3),
    done: bool = True,
) -> Steps:
    """Calls of (id, name, arguments as JSON text): id and name first, then the arguments in fragments of `size`."""
    steps: Steps = [openai_chunk({"role": "assistant", "content": None})]
    for index, (call, name, arguments) in enumerate(calls):
        function = {"name": name, "arguments": ""}
        steps.append(openai_chunk({"tool_calls": [_fragment(index, function, id=call, type="function")]}))
        for start in range(0, len(arguments), size):
            function = {"arguments": arguments[start : start + size]}
            steps.append(openai_chunk({"tool_calls": [_fragment(index, function)]}))
    return [*steps, *openai_end(finish, usage, done)]


def openai_json(text: str | None, finish: str = "stop", usage: Usage = (9, 3), **message: object) -> Answer:
    """The answer to `stream: false`; `message` adds fields, e.g. `tool_calls=[…]`, `reasoning_content="…"`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    shape = {"id": "chatcmpl-test", "object": "chat.completion", "created": CREATED_AT_S, "model": MODEL}
    return json_answer({**shape, "choices": [choice], "usage": openai_usage(usage)})


def openai_error(
    status: int, message: str, type: str = "invalid_request_error", code: str | int | None = None, **headers: str
) -> Answer:
    return json_answer({"error": {"message": message, "type": type, "param": None, "code": code}}, status, **headers)


def openai_error_event(message: str, type: str = "server_error", code: str | int | None = 500) -> Steps:
    """An error inside a 200 stream."""
    return [sse({"error": {"message": message, "type": type, "code": code}})]


def openai_models(*names: str) -> Answer:
    models = [{"id": name, "object": "model", "created": CREATED_AT_S, "owned_by": "test"} for name in names]
    return json_answer({"object": "list", "data": models})


def _openai_event(**fields: object) -> Send:
    shape = {"id": "chatcmpl-test", "object": "chat.completion.chunk", "created": CREATED_AT_S, "model": MODEL}
    return sse({**shape, **fields})


def _fragment(index: int, function: dict[str, str], **fields: str) -> dict[str, object]:
    return {"index": index, **fields, "function": function}


# ---- Anthropic --------------------------------------------------------------------------------------------------
# Named events (docs.anthropic.com/en/api/messages-streaming). Every helper makes one content block; the block with
# index 0 opens the message, a `finish` ends it: [*anthropic_thinking("Hm"), *anthropic_text("Hi", index=1)].

ANTHROPIC_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
ANTHROPIC_ERRORS |= {404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
ANTHROPIC_ERRORS |= {500: "api_error", 529: "overloaded_error"}


def anthropic_event(type: str, **fields: object) -> Send:
    return sse({"type": type, **fields}, event=type)


def anthropic_start(input_tokens: int = 9) -> Steps:
    usage = {"input_tokens": input_tokens, "output_tokens": 1}
    return [anthropic_event("message_start", message=_anthropic_message([], None, usage))]


def anthropic_end(finish: str | None = "end_turn", output_tokens: int = 3) -> Steps:
    if finish is None:
        return []
    delta = {"stop_reason": finish, "stop_sequence": None}
    end = anthropic_event("message_delta", delta=delta, usage={"output_tokens": output_tokens})
    return [end, anthropic_event("message_stop")]


def anthropic_text(
    *deltas: str, index: int = 0, finish: str | None = "end_turn", usage: Usage = (9, 3), delay: float = 0.0
) -> Steps:
    pieces = [{"type": "text_delta", "text": d} for d in deltas]
    return _anthropic_block(index, {"type": "text", "text": ""}, pieces, finish, usage, delay)


def anthropic_thinking(
    *deltas: str,
    signature: str = "c2lnbmF0dXJl",
    index: int = 0,
    finish: str | None = None,
    usage: Usage = (9, 3),
    delay: float = 0.0,
) -> Steps:
    pieces = [{"type": "thinking_delta", "thinking": d} for d in deltas]
    pieces.append({"type": "signature_delta", "signature": signature})
    block = {"type": "thinking", "thinking": "", "signature": ""}
    return _anthropic_block(index, block, pieces, finish, usage, delay)


def anthropic_tool_use(
    call: str,
    name: str,
    arguments: str,
    index: int = 0,
    size: int = 8,
    finish: str | None = "tool_use",
    usage: Usage = (9, 3),
) -> Steps:
    """One call; its arguments (JSON text) in fragments of `size` characters."""
    parts = [arguments[start : start + size] for start in range(0, len(arguments), size)]
    pieces = [{"type": "input_json_delta", "partial_json": part} for part in parts]
    block = {"type": "tool_use", "id": call, "name": name, "input": {}}
    return _anthropic_block(index, block, pieces, finish, usage, 0.0)


def anthropic_json(text: str, finish: str = "end_turn", usage: Usage = (9, 3)) -> Answer:
    tokens = {"input_tokens": usage[0], "output_tokens": usage[1]}
    return json_answer(_anthropic_message([{"type": "text", "text": text}], finish, tokens))


def anthropic_error(status: int, message: str, type: str | None = None, **headers: str) -> Answer:
    error = {"type": type or ANTHROPIC_ERRORS.get(status, "api_error"), "message": message}
    body = {"type": "error", "error": error, "request_id": "req_test"}
    return json_answer(body, status, request_id="req_test", **headers)


def anthropic_error_event(message: str, type: str = "overloaded_error") -> Steps:
    """An error inside a 200 stream."""
    return [anthropic_event("error", error={"type": type, "message": message})]


def anthropic_models(*names: str, page_size: int = 20) -> Callable[[Request], Answer]:
    """Pages of `?limit=&after_id=`, of at most `page_size` models."""

    def answer(request: Request) -> Answer:
        after = request.query.get("after_id")
        start = names.index(after) + 1 if after in names else 0
        size = min(page_size, int(request.query.get("limit", page_size)))
        shown = names[start : start + size]
        data = [{"type": "model", "id": name, "display_name": name.title()} for name in shown]
        ends = {"first_id": shown[0] if shown else None, "last_id": shown[-1] if shown else None}
        return json_answer({"data": data, "has_more": start + size < len(names), **ends})

    return answer


def _anthropic_message(content: list[object], finish: str | None, usage: dict[str, int]) -> dict[str, object]:
    shape = {"id": "msg_test", "type": "message", "role": "assistant", "model": MODEL}
    return {**shape, "content": content, "stop_reason": finish, "stop_sequence": None, "usage": usage}


def _anthropic_block(
    index: int,
    block: Mapping[str, object],
    pieces: Iterable[Mapping[str, str]],
    finish: str | None,
    usage: Usage,
    delay: float,
) -> Steps:
    steps = [] if index else anthropic_start(usage[0])
    steps.append(anthropic_event("content_block_start", index=index, content_block=block))
    steps += paced((anthropic_event("content_block_delta", index=index, delta=piece) for piece in pieces), delay)
    steps.append(anthropic_event("content_block_stop", index=index))
    return [*steps, *anthropic_end(finish, usage[1])]


# ---- The default answer and scenarios ---------------------------------------------------------------------------
# What an unscripted request gets: text that is hard on every layer it passes, the same for the same message. A scenario
# spoils that answer in one way, for either dialect.

HARD_TEXTS = ["data: [DONE]", "event: end", "data:", ": comment", "[DONE]", "]}", "\\n", "\\u2028", "<b>&amp;</b>"]
HARD_CHARACTERS = [
    "😀",
    "👩‍👩‍👧",
    "日本語",
    "e\u0301",
    "\u2028",
    "\u2029",
    "\u0085",
    "\ufeff",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
]
HARD_PIECES = [*HARD_TEXTS, *HARD_CHARACTERS, '"', "\\", "'", "`", " "]
WORDS = [
    "a",
    "stream",
    "of",
    "small",
    "words",
    "that",
    "nobody",
    "has",
    "to",
    "read",
    "but",
    "get",
    "once",
    "in",
    "order",
]


def default_answer(message: str, words: int = 60) -> list[str]:
    """The deltas of the answer to `message`: its checksum, then every hard piece once among `words` plain ones."""
    checksum = zlib.crc32(message.encode("utf-8", "surrogatepass"))
    source = random.Random(checksum)
    deltas = [*HARD_PIECES, *(" " + word for word in source.choices(WORDS, k=words))]
    source.shuffle(deltas)
    return [f"[{checksum:08x}]", *deltas]


def last_user_message(body: Any) -> str:
    """The text of a request's newest user message; of a list of parts, the text parts joined."""
    messages = body.get("messages") if isinstance(body, dict) else None
    users = [message for message in messages or [] if message.get("role") == "user"]
    content = users[-1].get("content") if users else ""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""


def default_stream(request: Request, words: int, delay: float) -> Steps:
    """The default answer as a stream in the dialect of the request's path."""
    message = last_user_message(request.json)
    deltas = default_answer(message, words)
    usage = (len(message), len(deltas))
    if request.is_anthropic:
        return anthropic_text(*deltas, usage=usage, delay=delay)
    wanted = (request.field("stream_options") or {}).get("include_usage")
    return openai_text(*deltas, usage=usage if wanted else None, delay=delay)


def default_json(request: Request, words: int) -> Answer:
    """The default answer to `stream: false`."""
    message = last_user_message(request.json)
    deltas = default_answer(message, words)
    make = anthropic_json if request.is_anthropic else openai_json
    return make("".join(deltas), usage=(len(message), len(deltas)))


SCENARIOS: dict[str, Callable[[Steps], Answer | Steps]] = {
    "default": lambda steps: steps,
    "drip": lambda steps: dripped(steps, 7),
    "cut": lambda steps: [*steps[: len(steps) // 2], Cut()],
    "reset": lambda steps: [*steps[: len(steps) // 2], Reset()],
    "hang": lambda steps: [*steps[: len(steps) // 2], Hang()],
    "silent": lambda steps: Answer(before=[Hang()]),
    "gone": lambda steps: Answer(before=[Reset()]),
    "loop": lambda steps: [*steps[:-3], _repeated(steps)],
    "limited": lambda steps: openai_error(429, "slow down", "rate_limit_error", retry_after="0.1"),
    "broken": lambda steps: page(502, "<html><h1>Bad Gateway</h1></html>"),
}


def scenario_script(name: str, steps: Steps, source: random.Random) -> Answer | Steps:
    """The answer spoilt as the scenario says; `chaos` draws one of them, half of the time the default."""
    if name == "chaos":
        name = source.choice(["default"] * len(SCENARIOS) + list(SCENARIOS))
    return SCENARIOS[name](steps)


def _repeated(steps: Steps) -> Step:
    """One delta of the answer, for ever."""
    sends = [step.data for step in steps if isinstance(step, Send)]
    return SendForever(itertools.repeat(sends[10]), delay=0.001)


# ---- The server -------------------------------------------------------------------------------------------------


@dataclass
class Connection:
    """`closed_by` tells who closed first: the client, or the provider (its script, or its own end)."""

    opened_at: float = field(default_factory=time.monotonic)
    closed_at: float | None = None
    closed_by: Literal["client", "provider"] | None = None

    def close(self, who: Literal["client", "provider"]) -> None:
        if self.closed_at is None:
            self.closed_at, self.closed_by = time.monotonic(), who


@dataclass
class Request:
    """What the provider got, and what became of it. Header names are lower-case; `json` is None if it is no JSON."""

    provider: Provider = field(repr=False)
    connection: Connection
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    json: Any = None
    arrived_at: float = field(default_factory=time.monotonic)
    answered_at: float | None = None  # when the last byte of a whole answer was with the kernel

    @property
    def is_anthropic(self) -> bool:
        return self.path == "/v1/messages"

    def field(self, name: str) -> Any:
        """A field of the JSON body, or None."""
        return self.json.get(name) if isinstance(self.json, dict) else None

    @property
    def answered_whole(self) -> bool:
        return self.answered_at is not None

    @property
    def closed_at(self) -> float | None:
        return self.connection.closed_at

    def wait_closed(self, timeout: float = WAIT_SECONDS) -> float:
        """When its connection was closed, by either side; TimeoutError if it is not."""
        self.provider.wait_until(lambda: self.closed_at is not None, f"{self.path} is closed", timeout)
        assert self.closed_at is not None
        return self.closed_at

    def wait_answered(self, timeout: float = WAIT_SECONDS) -> float:
        """When its answer had been sent whole; TimeoutError if it is not."""
        self.provider.wait_until(lambda: self.answered_whole, f"{self.path} is answered whole", timeout)
        assert self.answered_at is not None
        return self.answered_at


Script = Answer | Sequence[Step] | Callable[[Request], Answer | Sequence[Step]]


class Hangup(Exception):
    """A step ended the connection."""


class Provider(LoopThread):
    """The scripted provider; `base_url` is for the OpenAI dialect, `origin` for Anthropic's.

    `delay` (seconds before each delta), `words` and `scenario` shape the default answers; all may change at any time.
    """

    def __init__(
        self, port: int = 0, scenario: str = "default", delay: float = 0.0, words: int = 60, model: str = MODEL
    ) -> None:
        super().__init__(port)
        self._given = (scenario, delay, words, openai_models(model))
        self._begin()

    def _begin(self) -> None:
        self.models: Script
        self.scenario, self.delay, self.words, self.models = self._given
        self.requests: list[Request] = []
        self.connections: list[Connection] = []
        self._queues: dict[str | None, deque[Script]] = {None: deque()}
        self._gates: dict[str, asyncio.Event] = {}
        self._gate_arrivals: dict[str, int] = {}
        self._random = random.Random(0)

    def forget(self) -> None:
        """As new, for the next test: nothing scripted, asked or gated, settings as given. What is being sent goes on."""
        self.call(self._begin)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return self.origin + "/v1"

    @property
    def open_connections(self) -> int:
        return sum(connection.closed_at is None for connection in self.connections)

    @property
    def chats(self) -> list[Request]:
        """The POST requests."""
        return [request for request in list(self.requests) if request.method == "POST"]

    def script(self, *answers: Script, model: str | None = None) -> None:
        """Queues one answer per request to come; those for a `model` come before the common ones."""
        self._queues.setdefault(model, deque()).extend(answers)

    def unscript(self) -> None:
        """Takes back what is scripted and was not asked for."""
        self.call(lambda: self._queues.update({None: deque()}))

    def gate(self, name: str) -> WaitFor:
        return WaitFor(name)

    def open_gate(self, name: str) -> None:
        self._loop.call_soon_threadsafe(lambda: self._gate(name).set())

    def wait_at_gate(self, name: str, count: int = 1, timeout: float = WAIT_SECONDS) -> None:
        """Returns when `count` answers have come to the gate: all bytes before it are with the kernel."""
        what = f"{count} answers at the gate {name!r}"
        self.wait_until(lambda: self._gate_arrivals.get(name, 0) >= count, what, timeout)

    def wait_chats(self, count: int = 1, timeout: float = WAIT_SECONDS) -> list[Request]:
        """The POST requests, once there are `count`."""
        self.wait_until(lambda: len(self.chats) >= count, f"{count} POST requests", timeout)
        return self.chats

    def wait_open_connections(self, count: int, timeout: float = WAIT_SECONDS) -> None:
        self.wait_until(lambda: self.open_connections == count, f"{count} open connections", timeout)

    async def serve(self, reader: WatchedReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection()
        self.connections.append(connection)
        task = asyncio.current_task()
        assert task is not None

        def client_closed() -> None:
            if connection.closed_at is None:
                connection.close("client")
                task.cancel()  # its end notifies those who wait

        reader.on_end = client_closed
        try:
            while await self._exchange(connection, reader, writer):
                pass
        except (Hangup, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            connection.close("provider")
            self.notify()
        await self._hang_up(writer)

    async def _hang_up(self, writer: asyncio.StreamWriter) -> None:
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(writer.wait_closed(), 1)

    async def _exchange(self, connection: Connection, reader: WatchedReader, writer: asyncio.StreamWriter) -> bool:
        """Reads a request and answers it; whether the connection stays open."""
        request = await self._read_request(connection, reader)
        if request.path.startswith("/control/"):
            answer = self._control(request)
        else:
            self.requests.append(request)
            self.notify()
            answer = self._choose(request)
        wire = Wire(self, writer, answer)
        keep = request.headers.get("connection", "").lower() != "close" and answer.framing != "close"
        for step in answer.before:
            await wire.perform(step)
        await wire.write(answer.head("keep-alive" if keep else "close"))
        for step in answer.steps:
            await wire.perform(step)
        await wire.write(b"0\r\n\r\n" if answer.framing == "chunked" else b"")
        request.answered_at = time.monotonic()
        self.notify()
        return keep

    async def _read_request(self, connection: Connection, reader: asyncio.StreamReader) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head[:-4].split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await read_body(reader, headers)
        url = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query))
        request = Request(self, connection, method, url.path, query, headers, body)
        with contextlib.suppress(ValueError):
            request.json = json.loads(body)
        return request

    def _choose(self, request: Request) -> Answer:
        """The answer of the route: models, or the next of the queues, or the default."""
        route = (request.method, request.path)
        if route == ("GET", "/v1/models"):
            return as_answer(self.models, request)
        if route not in (("POST", "/v1/chat/completions"), ("POST", "/v1/messages")):
            return openai_error(404, f"no route {request.method} {request.path}", code="not_found")
        for queue in (self._queues.get(request.field("model")), self._queues[None]):
            if queue:
                return as_answer(queue.popleft(), request)
        script = scenario_script(self.scenario, default_stream(request, self.words, self.delay), self._random)
        if isinstance(script, Answer) or request.field("stream"):
            return as_answer(script, request)
        return default_json(request, self.words)

    def _control(self, request: Request) -> Answer:
        """For a provider in another process: POST /control/settings {scenario, delay, words}; GET /control/requests."""
        for name in {"scenario", "delay", "words"} & set(request.json or {}):
            setattr(self, name, request.json[name])
        seen = [
            {"path": r.path, "json": r.json, "answered_whole": r.answered_whole, "closed_by": r.connection.closed_by}
            for r in self.requests
        ]
        return json_answer({"open_connections": self.open_connections, "requests": seen})

    def _gate(self, name: str) -> asyncio.Event:
        return self._gates.setdefault(name, asyncio.Event())

    async def pass_gate(self, name: str) -> None:
        self._gate_arrivals[name] = self._gate_arrivals.get(name, 0) + 1
        self.notify()
        try:
            async with asyncio.timeout(GATE_SECONDS_MAX):  # wait_for() of 3.11 may lose a close that comes as it opens
                await self._gate(name).wait()
        except TimeoutError as error:
            raise TimeoutError(f"nobody opened the gate {name!r}") from error


def as_answer(script: Script, request: Request) -> Answer:
    if callable(script):
        script = script(request)
    return script if isinstance(script, Answer) else Answer(steps=script)


async def read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body


class Wire:
    """Performs the steps of one answer on one connection."""

    def __init__(self, provider: Provider, writer: asyncio.StreamWriter, answer: Answer) -> None:
        self.provider, self.writer, self.answer = provider, writer, answer

    async def perform(self, step: Step) -> None:
        match step:
            case Send(data):
                await self.send(data)
            case Raw(data):
                await self.write(data)
            case Drip(data, size, delay):
                for start in range(0, len(data), size):
                    await self.send(data[start : start + size])
                    await asyncio.sleep(delay)
            case SendForever(source, delay):
                for data in map(source, itertools.count()) if callable(source) else source:
                    await self.send(data)
                    await asyncio.sleep(delay)
            case Pause(seconds) | Hang(seconds):
                await asyncio.sleep(seconds)
            case WaitFor(gate):
                await self.provider.pass_gate(gate)
            case Reset():
                reset_on_close(self.writer)
                raise Hangup
            case Cut() | ShortBody():
                raise Hangup

    async def send(self, data: bytes) -> None:
        """A piece of the body; an empty one would end a chunked body and is left out."""
        if data and self.answer.framing == "chunked":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        await self.write(data)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        await asyncio.sleep(0)  # drain() alone does not yield: other streams, and this one's close, have their turn


# ---- main -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def provider_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A provider in its own process, started with the command line's arguments: (process, base URL)."""
    command = [sys.executable, "-m", "tests.provider", *arguments]
    root = pathlib.Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(CLOSE_SECONDS_MAX, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            base_url = process.stdout.readline().strip()
            watchdog.cancel()
            assert base_url, "the provider's process did not start"
            yield process, base_url
        finally:
            watchdog.cancel()
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.provider", description="A provider for tests.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--scenario", default="default", choices=[*SCENARIOS, "chaos"])
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each delta")
    parser.add_argument("--words", type=int, default=60, help="plain words in each answer")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with Provider(**vars(parser.parse_args())) as provider:
        print(provider.base_url, flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()
