"""What real servers sent, recorded on loopback: every recording, cut in two at every byte, decodes to the same events.

A recording is `#` lines with the request, the response's head, and its body as it came (`transcripts/`). Gemini's own
wire format is out of scope: llmchat talks to Gemini through its OpenAI-compatible endpoint. Its recording is checked as
SSE only.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmchat import Answer, Delta, IteratedReply, Provider, SseDecoder, body_words, join_deltas, models_of, text_of

RECORDINGS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))
STREAMS = [path for path in RECORDINGS if b"text/event-stream" in path.read_bytes().partition(b"\r\n\r\n")[0]]
HELLO = (
    "Hello from a tiny real model. It counts: one two three four five six seven eight nine ten, then it smiles😀日本語!"
)
MOCK = "Hello from LiteLLM mock. Ünïcödé 😀 日本語 ok."


@dataclass(frozen=True)
class Recording:
    """`path` is the request's."""

    path: str
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def dialect(self) -> str:
        return "anthropic" if self.path.endswith("/messages") else "openai"


def load(name: str) -> Recording:
    text = (Path(__file__).parent / "transcripts" / f"{name}.txt").read_bytes()
    comments, _, response = text.rpartition(b"# ----- response -----\n")
    request = re.match(rb"# (?:POST|GET) \S+?//[^/]+(\S+)", comments)
    head, _, body = response.replace(b"\r\n", b"\n").partition(b"\n\n")
    body = re.sub(rb"\n?# curl exit \d+\s*$", b"", body)
    status, *lines = head.decode().split("\n")
    headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
    return Recording(request[1].decode() if request else "", int(status.split()[1]), headers, body)


@dataclass
class Result:
    """What an answer came to."""

    deltas: list[Delta] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Any = None
    error: str | None = None


async def one_by_one(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def read(recording: Recording, *pieces: bytes) -> Result:
    """The recording's body, in these pieces, through everything that reads an answer."""

    async def run() -> Result:
        kept = {name: value for name, value in recording.headers.items() if name == "content-type"}
        reply = IteratedReply(recording.status, kept, one_by_one(*pieces))
        answer = Answer(Provider("recorded", recording.dialect, "http://127.0.0.1/v1"), reply)
        result = Result()
        await answer.receive(lambda: result.deltas.extend(answer.take()))
        result.deltas += answer.take()
        if answer.failure is not None:
            result.error = f"{answer.failure.code}: {answer.failure.message}"
        result.deltas = join_deltas(result.deltas)
        result.finish_reason, result.usage = answer.decoder.finish_reason, answer.decoder.usage
        return result

    return asyncio.run(run())


def read_whole(name: str) -> Result:
    recording = load(name)
    return read(recording, recording.body)


def counts(result: Result) -> tuple[int, int]:
    return result.usage.input_tokens, result.usage.output_tokens


# ── every recording, cut everywhere ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_a_recorded_stream_cut_at_every_byte_gives_the_same_events(path: Path) -> None:
    body = load(path.stem).body

    def events(*pieces: bytes) -> list[tuple[bytes, bytes]]:
        decoder = SseDecoder()
        return [event for piece in pieces for event in decoder.feed(piece)] + decoder.end()

    whole = events(body)
    assert len(whole) > 1 and not any(b"\n" in data for _, data in whole)
    assert events(*(body[i : i + 1] for i in range(len(body)))) == whole
    blocks = [block + b"\n\n" for block in body.split(b"\n\n")]
    for pair in dict.fromkeys(map(b"".join, itertools.pairwise(blocks))):  # a cut is forgotten at its block's end
        for cut in range(len(pair) + 1):
            assert events(pair[:cut], pair[cut:]) == events(pair), (pair, cut)
    assert events(body.replace(b"\n", b"\r\n")) == events(body.replace(b"\n", b"\r")) == whole


@pytest.mark.parametrize("path", [path for path in STREAMS if "gemini" not in path.stem], ids=lambda path: path.stem)
def test_a_recorded_stream_cut_anywhere_gives_the_same_answer(path: Path) -> None:
    recording = load(path.stem)
    body, whole = recording.body, read(recording, recording.body)
    assert whole.deltas or whole.error
    for cut in range(0, len(body) + 1, max(len(body) // 100, 1)):
        assert read(recording, body[:cut], body[cut:]) == whole, cut
    assert read(recording, *(body[i : i + 1] for i in range(len(body)))) == whole


@pytest.mark.parametrize("count", [2, 3, 4, 5, 20])
@pytest.mark.parametrize("path", [path for path in STREAMS if "gemini" not in path.stem], ids=lambda path: path.stem)
def test_a_recorded_stream_gives_the_same_answer_several_events_at_a_time(path: Path, count: int) -> None:
    recording = load(path.stem)
    blocks = [block + b"\n\n" for block in recording.body.removesuffix(b"\n\n").split(b"\n\n")]
    groups = [b"".join(blocks[start : start + count]) for start in range(0, len(blocks), count)]
    assert read(recording, *groups) == read(recording, *blocks) == read(recording, recording.body)


@pytest.mark.parametrize(
    ("odd", "error"),
    [
        (b'{"error":{"message":"the reason","type":"server_error"}}', "the reason"),
        (b'{"choices":[{"delta":{"content":"\\ud83d"}}]}', None),
        (b'{"choices":[{"delta":{"content":"x"}}]}{"choices":[]}', "is no answer"),
        (b"not JSON", "not JSON"),
        (b'{"choices":', None),
        (b'{"choices":[]}', None),
        (b'{"choices":[{"delta":{"content":"x"}},{"delta":{"content":"y"}}]}', None),
        (b'{"choices":[{"delta":{"content":"x","reasoning_content":"y"}}]}', None),
        (b'{"choices":[{"delta":{"content":"x"}}]}\nid: 7', None),
        (b'{"choices":[{"delta":{"content":"x"}}]}\n\n: keep-alive', None),
        (b'{"choices":[{"delta":{"content":"x"},"finish_reason":"length"}]}', None),
        (b'{"choices":[{"delta":{"content":"x"}}],"usage":{"prompt_tokens":7}}', None),
    ],
)
@pytest.mark.parametrize("at", [0, 10, 18, 20])
def test_an_odd_event_among_several_counts_as_if_it_came_alone(
    odd: bytes, error: str | None, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = load("llamacpp-chat-stream")
    blocks = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number for number in range(20)]
    blocks.insert(at, b"data: %b\n\n" % odd)
    at_once, one_by_one = read(recording, b"".join(blocks)), read(recording, *blocks)
    in_two = read(recording, b"".join(blocks[:11])[:-5], b"".join(blocks[:11])[-5:] + b"".join(blocks[11:]))
    monkeypatch.setattr("llmchat.SseDecoder.lines", lambda decoder, data: None)
    assert at_once == one_by_one == in_two == read(recording, *blocks)
    assert text_of(at_once.deltas).startswith("0123456789"[:at])
    assert error is None or error in str(at_once.error)


@pytest.mark.parametrize("path", [path for path in STREAMS if "gemini" not in path.stem], ids=lambda path: path.stem)
def test_a_recorded_stream_that_ends_early_is_never_complete_before_its_finish_reason(path: Path) -> None:
    recording = load(path.stem)
    whole = read(recording, recording.body)
    finish = re.search(rb'"(finish|stop)_reason": ?"', recording.body)
    end = recording.body.index(b"\n\n", finish.start()) if finish else len(recording.body) - 1
    for cut in range(0, end - 2, max(end // 60, 1)):
        part = read(recording, recording.body[:cut])
        assert part.finish_reason is None and part.error is not None
        assert text_of(whole.deltas).startswith(text_of(part.deltas))


# ── what the recordings say ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [
        ("llamacpp-chat-stream", HELLO, None),
        ("llamacpp-chat-stream-usage", HELLO, 33),
        ("llamacpp-chat-nonstream", HELLO, 33),
        ("llamacpp-anthropic-stream", HELLO, 33),
        ("llamacpp-anthropic-nonstream", HELLO, 33),
        ("litellm-chat-stream", MOCK, None),
        ("litellm-chat-stream-usage", MOCK, 16),
        ("litellm-chat-nonstream", MOCK, 20),
        ("litellm-anthropic-nonstream", "Hello from LiteLLM mock claude 😀.", 503),
        ("litellm-anthropic-openaibackend-stream", MOCK, 503),
    ],
)
def test_a_recorded_answer_is_whole(name: str, text: str, tokens: int | None) -> None:
    result = read_whole(name)
    assert result.error is None and result.finish_reason == "stop"
    assert [delta.kind for delta in result.deltas if delta.kind != "reasoning"] == ["text"]
    assert text_of(result.deltas) == text
    assert tokens is None or counts(result)[1] == tokens


def test_an_answer_that_is_decoded_after_its_end_is_whole_and_leaves_no_timer_behind() -> None:
    recording = load("llamacpp-chat-stream")

    async def run() -> list[Delta]:
        reply = IteratedReply(200, {}, one_by_one(recording.body))
        answer = Answer(Provider("recorded", recording.dialect, "http://127.0.0.1/v1"), reply)
        await answer.receive(lambda: None)
        deltas = answer.take()
        assert answer.failure is None and answer._patience is None
        return deltas

    assert text_of(asyncio.run(run())) == HELLO


def test_a_recorded_answer_of_length_ends_with_that_reason() -> None:
    assert read_whole("llamacpp-chat-length").finish_reason == "length"


def test_recorded_reasoning_comes_before_the_text() -> None:
    assert [delta.kind for delta in read_whole("llamacpp-chat-reasoning").deltas] == ["reasoning", "text"]


@pytest.mark.parametrize("name", ["llamacpp-chat-tools", "llamacpp-chat-tools-nonstream", "llamacpp-anthropic-tools"])
def test_a_recorded_tool_call_is_one_delta(name: str) -> None:
    result = read_whole(name)
    assert result.finish_reason == "tool_calls" and result.error is None
    (call,) = [json.loads(delta.text) for delta in result.deltas]
    assert call["name"] == "get_weather" and json.loads(call["arguments"])["city"] in ("Paris", "Rome") and call["id"]


@pytest.mark.parametrize("name", ["llamacpp-chat-midstream-kv-error-1"])
def test_a_recorded_error_in_the_middle_is_an_error_with_the_servers_words(name: str) -> None:
    result = read_whole(name)
    assert result.deltas and result.finish_reason is None
    assert result.error is not None and result.error.startswith("provider_unavailable: recorded reported an error: ")


REFUSALS = [path for path in RECORDINGS if not path.read_bytes().partition(b"HTTP/1.1 ")[2].startswith(b"200")]


@pytest.mark.parametrize("path", REFUSALS, ids=lambda path: path.stem)
def test_a_recorded_refusal_shows_the_servers_sentence(path: Path) -> None:
    recording = load(path.stem)
    words, kinds = body_words(recording.body)
    document = json.loads(recording.body)
    assert words == document["error"]["message"] and kinds


@pytest.mark.parametrize("name", ["litellm-models", "llamacpp-single-models"])
def test_a_recorded_list_of_models_is_read(name: str) -> None:
    assert "mock-text" in models_of(json.loads(load(name).body)) or "tiny-text" in models_of(
        json.loads(load(name).body)
    )


def test_no_recording_names_a_place_outside_of_this_machine() -> None:
    for path in RECORDINGS:
        hosts = set(re.findall(rb"# POST https?://([^/:]+)", path.read_bytes()))
        assert hosts <= {b"127.0.0.1"} and not re.search(rb"(?<![\w:/.])/(home|root|tmp|work)/", path.read_bytes())
