"""kill -9 at any time: what a client has seen is in the database, and the next start says what became of it."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import EventStream, Reader
from tests.conftest import Server, wait_until
from tests.guarantees import (
    Tuned,
    chat_to_the_gate,
    gated,
    read_all,
    reader_at,
    running_server,
    settings_for,
    texts,
    varied_text,
)
from tests.provider import Hang, Provider, WaitFor, openai_end, openai_text, paced

STREAMS, ROUNDS = 10, 10


@pytest.fixture
def server(provider: Provider, tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path, provider) as running:
        yield running


class Watcher(threading.Thread):
    """A client in its own thread: reads until the connection breaks."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__(daemon=True)
        self.reader = Reader()
        self.message_id = 0
        self._stream: EventStream = server.chat(name)
        self.start()

    def run(self) -> None:
        with self._stream, contextlib.suppress(OSError):
            for event in self._stream.events():
                self.reader.take(event)
                self.message_id = self.message_id or event.data["message_id"]


def assert_kept(server: Server, message_id: int, reader: Reader, status: str = "interrupted") -> None:
    """The message has this status, and its content begins with everything that the client had seen."""
    message = server.message(message_id)
    content = server.content(message_id)
    assert message["status"] == status
    assert content.startswith(reader.content), f"lost {len(reader.content) - len(content)} characters"
    assert message["timing"]["total_ms"] is not None and message["timing"]["total_ms"] >= 0
    rest = read_all(server.resume(message_id, len(reader.content)), reader_at(content, len(reader.content)))
    assert rest.content == content and rest.end is not None and rest.end["status"] == status


def assert_sound(server: Server) -> None:
    assert server.rows("PRAGMA integrity_check") == [("ok",)]
    assert server.rows("PRAGMA foreign_key_check") == []
    assert server.get("/api/v1/generations").json() == {"generations": []}
    holes = server.rows(
        "SELECT count(*) FROM (SELECT offset, lag(offset + length(text)) OVER (PARTITION BY message_id ORDER BY offset)"
        " AS expected FROM delta) WHERE offset != coalesce(expected, 0)"
    )
    assert holes == [(0,)]


def test_what_was_seen_survives_ten_kills_in_the_middle_of_ten_streams(server: Server, provider: Provider) -> None:
    source = random.Random(7)
    seen: dict[int, Reader] = {}
    for number in range(ROUNDS):
        for stream in range(STREAMS):
            pieces = [varied_text(40, f"{number}.{stream}.{piece}") for piece in range(1000)]
            provider.script([*paced(texts(pieces), 0.002), Hang()])
        watchers = [Watcher(server, f"round {number}, stream {stream}") for stream in range(STREAMS)]
        wait_until(lambda: all(len(one.reader.content) > 100 for one in watchers), "a beginning of every answer")  # noqa: B023
        time.sleep(source.uniform(0, 0.3))
        server.kill()
        for one in watchers:
            one.join(20)
        seen |= {one.message_id: one.reader for one in watchers}
        server.start()
        assert len(seen) == STREAMS * (number + 1)
        assert server.rows("SELECT status, count(*) FROM message WHERE role = 'assistant' GROUP BY status") == [
            ("interrupted", len(seen))
        ]
        assert_sound(server)
        for one in watchers:
            assert_kept(server, one.message_id, one.reader)
    for message_id, reader in seen.items():
        assert server.content(message_id).startswith(reader.content)
    print(f"{len(seen)} streams, {sum(len(reader.content) for reader in seen.values()):,} characters seen")


def test_a_kill_while_nothing_runs_changes_nothing(server: Server, provider: Provider) -> None:
    first = server.wait_ended(server.start_chat("Hello"))
    server.kill()
    server.start()
    assert server.message(first["id"]) == first
    assert_sound(server)
    assert "interrupted" not in "".join(server.output)
    assert server.wait_ended(server.start_chat("Hello again"))["status"] == "completed"


def test_a_kill_before_the_first_delta_leaves_an_empty_interrupted_answer(server: Server, provider: Provider) -> None:
    provider.script([Hang()])
    message_id = server.start_chat("Nobody answers")
    server.kill()
    server.start()
    assert_kept(server, message_id, Reader())
    assert server.content(message_id - 1) == "Nobody answers", (
        "the question was committed before the provider was asked"
    )
    assert "(1 answer was interrupted" in "".join(server.output)
    assert_sound(server)


@pytest.mark.parametrize(("die", "kept"), [("in_transaction", ""), ("after_commit", "one two")])
def test_a_kill_at_the_first_flush_shows_nobody_what_is_not_stored(
    provider: Provider, tmp_path: Path, die: str, kept: str
) -> None:
    server = Tuned(tmp_path, provider, die=die)  # type: ignore[arg-type]
    with server:
        provider.script([*texts(["one two"]), Hang()])
        watcher = Watcher(server, "Hello")
        watcher.join(20)
        assert server.process.wait(20) == -9, "it died where it should"
        server.kill()
        server.tune(0, "", {}, server.environment)
        server.start()
        assert watcher.reader.content == "" and watcher.reader.names == ["start"]
        assert server.content(watcher.message_id) == kept
        assert_kept(server, watcher.message_id, watcher.reader)
        assert_sound(server)


def test_a_kill_while_another_program_holds_the_database_loses_nothing_seen(server: Server, provider: Provider) -> None:
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, ["seen, "], ["not seen"])
    with contextlib.closing(sqlite3.connect(server.db, isolation_level=None)) as other, stream:
        other.execute("BEGIN IMMEDIATE")
        provider.open_gate(gates[0])
        provider.chats[0].wait_answered()
        time.sleep(0.1)  # time for what must not happen
        server.kill()
        other.execute("ROLLBACK")
        reader.read(stream)
    server.start()
    assert reader.content == "seen, " == server.content(message_id)
    assert_kept(server, message_id, reader)
    assert_sound(server)


@pytest.mark.parametrize("streams", [1, 8])
def test_an_answer_whose_end_was_seen_is_completed_after_a_kill(
    server: Server, provider: Provider, streams: int
) -> None:
    gates = [f"last {number}" for number in range(streams)]
    for gate in gates:
        provider.script([*texts(["whole 日本 "]), WaitFor(gate), *texts(["answer"]), *openai_end()])
    watchers = [Watcher(server, "Hello") for _ in gates]
    wait_until(lambda: all(one.reader.content for one in watchers), "a beginning of every answer")
    for gate in gates:
        provider.open_gate(gate)
    wait_until(lambda: watchers[0].reader.end is not None, "the first end")
    server.kill()
    for one in watchers:
        one.join(20)
    server.start()
    for one in watchers:
        status = "completed" if one.reader.end is not None else server.message(one.message_id)["status"]
        assert status in ("completed", "interrupted")
        assert_kept(server, one.message_id, one.reader, status)
        assert status == "interrupted" or server.content(one.message_id) == "whole 日本 answer"
    assert_sound(server)


def test_a_repeat_after_a_kill_attaches_to_the_interrupted_answer(server: Server, provider: Provider) -> None:
    gated(provider, ["seen"], ["never"])
    body = {"message": "Hello", "background": True}
    key = {"Idempotency-Key": "once"}
    message_id = server.post("/api/v1/chat", body, headers=key).json()["message_id"]
    wait_until(lambda: server.content(message_id) == "seen", "the first delta")
    server.kill()
    server.start()
    assert server.post("/api/v1/chat", body, headers=key).json()["message_id"] == message_id
    assert server.message(message_id)["status"] == "interrupted" and len(provider.chats) == 1


def test_a_database_that_was_copied_in_the_middle_of_streams_is_whole(
    server: Server, provider: Provider, tmp_path: Path
) -> None:
    """SQLite's own backup, by another program, while answers stream: a second server starts on it."""
    provider.script([*paced(texts([varied_text(40, str(piece)) for piece in range(500)]), 0.002), Hang()])
    watcher = Watcher(server, "Hello")
    wait_until(lambda: len(watcher.reader.content) > 1000, "a beginning")
    folder = tmp_path / "copy"
    folder.mkdir()
    locations = [f"file:{server.db}?mode=ro", f"file:{folder / 'llmchat.db'}?mode=rwc"]
    source, copy = (sqlite3.connect(location, uri=True) for location in locations)
    with contextlib.closing(source), contextlib.closing(copy):
        source.backup(copy)
    with Server(folder, **settings_for(provider)) as second:
        content = second.content(watcher.message_id)
        assert second.message(watcher.message_id)["status"] == "interrupted"
        assert len(content) >= 1000
        assert_sound(second)
    server.post(f"/api/v1/messages/{watcher.message_id}/stop")
    watcher.join(20)
    assert watcher.reader.content.startswith(content)
    provider.script(openai_text("and on"))
    assert server.wait_ended(server.start_chat("Hello"))["text"] == "and on"
