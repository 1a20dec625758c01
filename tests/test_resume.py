"""Whoever is cut off gets the rest: no gap, no duplicate, from every cursor, live or long finished."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmchat
from tests.client import EventStream, Reader
from tests.conftest import Server, stored_content, wait_until
from tests.guarantees import (
    Tuned,
    chat_to_the_gate,
    gate_numbers,
    gated,
    read_all,
    read_up_to,
    reader_at,
    running_server,
    texts,
    varied_text,
)
from tests.provider import Answer, Provider, WaitFor, default_answer, openai_end

HARD = default_answer("a text that is hard on every layer", words=12)
FIRST, REST = HARD[:25], HARD[25:]
SETTINGS = {"LLMCHAT_HEARTBEAT_SECONDS": "0.2"}


@pytest.fixture(scope="module", params=["1024", "3"], ids=["ring of 1024", "ring of 3"])
def server(
    request: pytest.FixtureRequest, shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("resume")
    with running_server(folder, shared_provider, LLMCHAT_RING_EVENTS=request.param, **SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def finished(server: Server, shared_provider: Provider) -> tuple[int, str]:
    """A completed message of many events: its id and its content."""
    shared_provider.delay = 0.012
    with server.chat("a text that is hard on every layer") as stream:
        reader = read_all(stream)
    shared_provider.delay = 0.0
    message_id = server.rows("SELECT max(id) FROM message")[0][0]
    events = "SELECT sum(json_array_length(coalesce(cuts_json, '[1]'))) FROM delta WHERE message_id = ?"
    assert server.rows(events, message_id)[0][0] > 10
    return message_id, reader.content


def start_offset(server: Server, message_id: int, headers: dict[str, str], query: str = "") -> int:
    with EventStream(server.url, "GET", f"/api/v1/messages/{message_id}/stream{query}", headers=headers) as stream:
        assert stream.status == 200, stream.error
        return int(stream.take(1)[0].data["offset"])


# ── cut and resumed ──


def test_a_stream_that_is_cut_goes_on_and_both_halves_are_the_content(server: Server, provider: Provider) -> None:
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, FIRST, REST)
    stream.reset()
    first_half = reader.content
    provider.open_gate(gates[0])
    assert server.wait_ended(message_id)["status"] == "completed"
    read_all(server.resume(message_id, reader.cursor), reader)
    assert reader.content.encode() == server.content(message_id).encode() == "".join(HARD).encode()
    assert first_half == "".join(FIRST) and reader.end is not None and reader.end["status"] == "completed"
    assert server.message(message_id)["text"] == reader.content


def test_a_stream_that_is_cut_and_resumed_while_live_misses_nothing(server: Server, provider: Provider) -> None:
    parts = [HARD[:10], HARD[10:20], HARD[20:30], HARD[30:]]
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, *parts)
    for number, gate in enumerate(gates):
        stream.reset()
        provider.open_gate(gate)
        stream = server.resume(message_id, reader.cursor)
        if number < len(gates) - 1:
            read_up_to(reader, stream, "".join(map("".join, parts[: number + 2])))
    read_all(stream, reader)
    assert reader.content == "".join(HARD) == server.content(message_id)
    assert reader.names.count("end") == 1 and "reset" not in reader.names


def test_the_provider_is_asked_once_however_often_the_client_comes_back(server: Server, provider: Provider) -> None:
    before = len(provider.chats)
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, FIRST, REST)
    stream.reset()
    for _ in range(5):
        server.resume(message_id, reader.cursor).reset()
    provider.open_gate(gates[0])
    assert server.wait_ended(message_id)["status"] == "completed"
    assert len(provider.chats) == before + 1
    assert server.message(message_id)["attempts"] == [{**server.message(message_id)["attempts"][0], "error": None}]


def test_text_that_looks_like_the_protocol_is_text(server: Server, provider: Provider) -> None:
    tricks = [
        "data: [DONE]",
        "\n\n",
        "event: end\ndata: {}\n\n",
        "id: 7\n",
        "\u2028",
        "\r\n\r\n",
        ": comment\n",
        "retry: 1\n",
    ]
    tricks += ["😀", "日本語", "\u2029\u0085\x0b\x0c\x1c", "\ufeff", "\0", "👩‍👩‍👧", '"}]}', "\\u0000"]
    gates = gated(provider, tricks[:3], tricks[3:])
    message_id = server.start_chat("Hello")
    provider.open_gate(gates[0])
    server.wait_ended(message_id)
    reader = read_all(server.resume(message_id))
    assert reader.content == "".join(tricks) == server.content(message_id)
    assert reader.names.count("end") == 1 and reader.names[-1] == "end"


# ── every cursor ──


def test_a_finished_message_resumes_from_every_cursor(server: Server, finished: tuple[int, str]) -> None:
    message_id, content = finished
    for cursor in range(len(content) + 1):
        reader = read_all(server.resume(message_id, cursor), reader_at(content, cursor))
        assert reader.content == content, f"cursor {cursor}"
        assert reader.end is not None and reader.end["status"] == "completed"


def test_a_live_message_resumes_from_every_cursor(server: Server, provider: Provider) -> None:
    provider.delay = 0.0
    known = "".join(FIRST)
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, FIRST, ["and the end"])
    streams = []
    for cursor in range(len(known) + 1):
        resumed = server.resume(message_id, cursor)
        one = reader_at(known, cursor)
        if cursor < len(known):
            read_up_to(one, resumed, known)
        streams.append((resumed, one))
    provider.open_gate(gates[0])
    for resumed, one in [(stream, reader), *streams]:
        assert read_all(resumed, one).content == known + "and the end"


@pytest.mark.parametrize("kind", ["reasoning", "tool_call"])
def test_a_cursor_counts_every_kind_of_content(server: Server, provider: Provider, kind: str) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "日本"}'}}
    delta: dict[str, Any] = {"reasoning_content": "Hm 日本 "} if kind == "reasoning" else {"tool_calls": [call]}
    chunk = texts(["x"])[0]
    other = type(chunk)(chunk.data.replace(b'{"content":"x"}', json.dumps(delta).encode()))
    provider.script([*texts(["one "]), other, *texts(["two"]), *openai_end("stop")])
    message_id = server.start_chat("Hello")
    message = server.wait_ended(message_id)
    content = server.content(message_id)
    assert {piece["kind"] for piece in message["content"]} == {"text", kind}
    assert "".join(piece["text"] for piece in message["content"]) == content
    for cursor in range(len(content) + 1):
        assert read_all(server.resume(message_id, cursor), reader_at(content, cursor)).content == content


def test_after_is_a_cursor_too(server: Server, finished: tuple[int, str]) -> None:
    message_id, content = finished
    for cursor in (0, 1, len(content) // 2, len(content)):
        stream = EventStream(server.url, "GET", f"/api/v1/messages/{message_id}/stream?after={cursor}")
        assert read_all(stream, reader_at(content, cursor)).content == content


def test_last_event_id_wins_over_after(server: Server, finished: tuple[int, str]) -> None:
    message_id, content = finished
    assert start_offset(server, message_id, {"Last-Event-ID": "7"}, "?after=3") == 7
    assert start_offset(server, message_id, {"Last-Event-ID": "7"}, "?after=nonsense") == 7
    assert start_offset(server, message_id, {"Last-Event-ID": "0"}, f"?after={len(content)}") == 0


def test_an_empty_last_event_id_is_none(server: Server, finished: tuple[int, str]) -> None:
    message_id, _ = finished
    assert start_offset(server, message_id, {"Last-Event-ID": ""}) == 0
    assert start_offset(server, message_id, {"Last-Event-ID": ""}, "?after=3") == 3


# ── what is no cursor ──

NO_CURSORS = [
    "x",
    "-1",
    "1.5",
    "0x10",
    "+",
    "%D9%A3",
    "1%202",
    "99999999999999999999",
    "9007199254740993",
    "NaN",
    "null",
]


def assert_refused(stream: EventStream, field: str) -> None:
    with stream:
        assert stream.status == 400
        assert stream.headers["content-type"] == "application/json"
        error = stream.error["error"]
        assert set(stream.error) == {"error"} and set(error) == {"code", "message", "retryable", "request_id"}
        assert error["code"] == "invalid_request" and error["retryable"] is False
        assert error["request_id"] == stream.headers["x-request-id"]
        assert error["message"].startswith(f"{field}: ")


@pytest.mark.parametrize("cursor", [*NO_CURSORS, ""])
def test_what_is_no_cursor_is_refused_in_after(server: Server, finished: tuple[int, str], cursor: str) -> None:
    path = f"/api/v1/messages/{finished[0]}/stream?after={cursor}"
    assert_refused(EventStream(server.url, "GET", path), "after")


@pytest.mark.parametrize("cursor", [cursor for cursor in NO_CURSORS if "%" not in cursor])
def test_what_is_no_cursor_is_refused_in_last_event_id(server: Server, finished: tuple[int, str], cursor: str) -> None:
    path = f"/api/v1/messages/{finished[0]}/stream"
    assert_refused(EventStream(server.url, "GET", path, headers={"Last-Event-ID": cursor}), "Last-Event-ID")


def test_a_cursor_beyond_the_end_of_a_finished_message_is_refused(server: Server, finished: tuple[int, str]) -> None:
    message_id, content = finished
    for cursor in (len(content) + 1, len(content.encode()) + 1, 2**53):
        assert_refused(EventStream(server.url, "GET", f"/api/v1/messages/{message_id}/stream?after={cursor}"), "after")


def test_a_cursor_beyond_what_a_running_message_has_is_refused(server: Server, provider: Provider) -> None:
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, FIRST, REST)
    path = f"/api/v1/messages/{message_id}/stream?after={len(reader.content) + 1}"
    assert_refused(EventStream(server.url, "GET", path), "after")
    provider.open_gate(gates[0])
    assert read_all(stream, reader).content == "".join(HARD), "who was there before is not disturbed"


@pytest.mark.parametrize("message_id", ["999999", "0", "x", "-1", "1.0", "99999999999999999999999"])
def test_a_message_that_is_not_there_cannot_be_streamed(server: Server, message_id: str) -> None:
    with EventStream(server.url, "GET", f"/api/v1/messages/{message_id}/stream") as stream:
        assert stream.status == 404 and stream.error["error"]["code"] == "not_found"


def test_a_question_can_be_streamed_like_an_answer(server: Server, provider: Provider) -> None:
    message_id = server.start_chat("What 日本 asks")
    server.wait_ended(message_id)
    reader = read_all(server.resume(message_id - 1))
    assert reader.content == "What 日本 asks" and reader.end is not None and reader.end["status"] == "completed"


# ── the ring ──


def test_a_cursor_older_than_the_ring_gets_everything_while_live(server: Server, provider: Provider) -> None:
    parts = [[f"part {number}, "] for number in range(30)]
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, *parts)
    for number, gate in enumerate(gates[:-1]):
        provider.open_gate(gate)
        read_up_to(reader, stream, "".join(map("".join, parts[: number + 2])))
    assert reader.names.count("delta") == 29, "each part is an event of its own"
    late = [(server.resume(message_id, cursor), reader_at(reader.content, cursor)) for cursor in (0, 3, 8, 100, 200)]
    for resumed, one in late:
        read_up_to(one, resumed, reader.content)
    provider.open_gate(gates[-1])
    for resumed, one in [(stream, reader), *late]:
        assert read_all(resumed, one).content == "".join(map("".join, parts))


# ── silence ──


def heartbeats(stream: EventStream, reader: Reader, count: int) -> None:
    """Reads `count` heartbeats; nothing else comes."""
    for number, event in enumerate(stream.events(), 1):
        reader.take(event)
        assert (event.name, event.id, event.data) == ("heartbeat", None, {})
        if number == count:
            return


def test_heartbeats_fill_the_silence_before_the_first_delta_and_between_deltas(
    server: Server, provider: Provider
) -> None:
    silence = [f"{name} {next(gate_numbers)}" for name in ("headers", "second")]
    steps = [*texts(["one "]), WaitFor(silence[1]), *texts(["two"]), *openai_end()]
    provider.script(Answer(before=[WaitFor(silence[0])], steps=steps))
    reader = Reader()
    with server.chat("Hello") as stream:
        reader.read(stream, 1)
        heartbeats(stream, reader, 2)
        provider.open_gate(silence[0])
        read_up_to(reader, stream, "one ")
        heartbeats(stream, reader, 2)
        provider.open_gate(silence[1])
        reader.read(stream)
    named = [name for name, before in zip(reader.names, ["", *reader.names], strict=False) if name != before]
    assert named == ["start", "heartbeat", "delta", "heartbeat", "delta", "end"] and reader.content == "one two"


def test_heartbeats_come_to_one_who_resumes_at_the_newest_cursor(server: Server, provider: Provider) -> None:
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, FIRST, REST)
    with server.resume(message_id, reader.cursor) as resumed:
        assert resumed.take(1)[0].data["offset"] == len(reader.content)
        heartbeats(resumed, Reader(), 3)
    provider.open_gate(gates[0])
    assert read_all(stream, reader).content == "".join(HARD)


# ── a lost end of the database ──


def lose_content(server: Server, message_id: int, offset: int) -> None:
    """What a power cut does: the newest commits are gone."""
    with contextlib.closing(sqlite3.connect(server.db)) as connection, connection:
        kept = stored_content(connection, message_id)[:offset]
        connection.execute("DELETE FROM journal")
        connection.execute("DELETE FROM delta WHERE message_id = ?", (message_id,))
        row = (message_id, 0, "text", kept)
        connection.execute("INSERT INTO delta (message_id, offset, kind, text) VALUES (?, ?, ?, ?)", row)


@pytest.fixture
def interrupted(provider: Provider, tmp_path: Path) -> Iterator[tuple[Server, int, Reader]]:
    """A server after a kill -9, and a message whose client holds more than the database."""
    with running_server(tmp_path, provider) as server:
        stream, reader, message_id, gates = chat_to_the_gate(server, provider, HARD[:10], HARD[10:20], HARD[20:])
        with stream:
            provider.open_gate(gates[0])
            read_up_to(reader, stream, "".join(HARD[:20]))
            server.kill()
        lose_content(server, message_id, len("".join(HARD[:10])))
        server.start()
        yield server, message_id, reader


def test_a_client_that_holds_more_than_the_database_is_reset(interrupted: tuple[Server, int, Reader]) -> None:
    server, message_id, reader = interrupted
    kept = "".join(HARD[:10])
    assert server.content(message_id) == kept and len(reader.content) > len(kept)
    reader.names.clear()
    read_all(server.resume(message_id, reader.cursor), reader)
    assert reader.names[:2] == ["reset", "start"] and reader.names.count("reset") == 1
    assert reader.content == kept
    assert reader.end is not None and reader.end["status"] == "interrupted"
    again = read_all(server.resume(message_id, len(kept)), reader_at(kept, len(kept)))
    assert "reset" not in again.names and again.content == kept
    before = read_all(server.resume(message_id, 3), reader_at(kept, 3))
    assert "reset" not in before.names and before.content == kept
    stopped = server.start_chat("Another")
    server.wait_ended(stopped)
    end = len(server.content(stopped))
    assert_refused(EventStream(server.url, "GET", f"/api/v1/messages/{stopped}/stream?after={end + 1}"), "after")


# ── a subscriber that lags ──


def test_a_subscriber_that_lags_starts_again_at_its_cursor(provider: Provider, tmp_path: Path) -> None:
    """Queues of two events, a ring of two, and a client that reads nothing while forty events pass."""
    server = Tuned(tmp_path, provider, send_bytes=4096, constants={"QUEUE_EVENTS_MAX": 2}, LLMCHAT_RING_EVENTS="2")
    with server:
        parts = [[varied_text(3000, f"{number}.")] for number in range(40)]
        stream, reader, message_id, gates = chat_to_the_gate(server, provider, *parts)
        slow = EventStream(server.url, "GET", f"/api/v1/messages/{message_id}/stream", receive_bytes=2048)
        for number, gate in enumerate(gates):
            provider.open_gate(gate)
            read_up_to(reader, stream, "".join(map("".join, parts[: number + 2])))
        wait_until(lambda: server.lagged > 0, "the slow subscriber's lagging")
        assert read_all(slow).content == "".join(map("".join, parts))
        assert read_all(stream, reader).content == server.content(message_id) == "".join(map("".join, parts))


def test_a_stream_that_cannot_go_on_ends_and_leaves_no_client_waiting() -> None:
    """Its message was deleted while the client read slowly, say. The server closes a connection on which an answer broke
    off."""

    class Broken(llmchat.Subscriber):
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        async def _catch_up(self) -> bytes:
            raise llmchat.NotFound("message_id: there is no message 1")

    sent = []

    async def run() -> None:
        async def send(message: Any) -> None:
            sent.append(message.get("body"))

        generations: Any = None
        stream = llmchat.EventStream(Broken(generations, "local", 1, 0, b"first"))
        scope = {"method": "GET", "server_send": send}
        with pytest.raises(llmchat.NotFound):
            async with asyncio.timeout(20) as patience:
                await stream(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
        assert not patience.expired()

    asyncio.run(run())
    assert sent == [None, b"first"]
