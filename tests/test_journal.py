"""The journal: what a flush appends for many messages at once is their content, wherever one looks, until it becomes rows
of their own, and after whatever happens in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import llmchat
from tests.client import Reader
from tests.conftest import stored_content, wait_until
from tests.guarantees import gated, texts, varied_text
from tests.provider import Hang, Provider, openai_end, paced
from tests.test_generations import question, read_stream, run_engine, subscribed
from tests.test_store import new_message

Work = Callable[[llmchat.Generations], Awaitable[None]]
PIECES = ["one ", "two 日本 ", "", "three\x00 ", "😀", 'four "[7,0" ']
WHOLE = "".join(PIECES)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    llmchat.prepare_database(str(tmp_path / "x.db"), suspect=False)
    with contextlib.closing(llmchat.connect(str(tmp_path / "x.db"), read_only=False)) as connection:
        yield connection


def rows_of(connection: sqlite3.Connection, message_id: int) -> list[tuple[Any, ...]]:
    sql = "SELECT offset, kind, text, cuts_json FROM delta WHERE message_id = ? ORDER BY offset"
    return [tuple(row) for row in connection.execute(sql, (message_id,))]


def journal_of(connection: sqlite3.Connection) -> list[Any]:
    return [
        json.loads(pieces_json) for (pieces_json,) in connection.execute("SELECT pieces_json FROM journal ORDER BY id")
    ]


def started(connection: sqlite3.Connection, text: str = "Hello", **more: Any) -> llmchat.Started:
    return llmchat.start_message(connection, new_message(text, **more))


def journal_in_pieces(connection: sqlite3.Connection, message_id: int, first: int = 1) -> None:
    """Each piece of WHOLE in a flush of its own, with another message's beside it."""
    offset = 0
    for number, text in enumerate(PIECES, first):
        pieces = {999: [(0, "text", f'"{message_id}":')], message_id: [(offset, "text", text)]}
        llmchat.save_flush(connection, llmchat.Save(journalled=pieces, journal_id=number))
        offset += len(text)


# ── reading ──


def test_what_is_in_the_journal_is_content_wherever_one_looks(database: sqlite3.Connection) -> None:
    begun = started(database)
    journal_in_pieces(database, begun.message_id)
    assert rows_of(database, begun.message_id) == []
    conversation = llmchat.load_conversation(database, "local", begun.conversation_id)
    archive, _ = llmchat.archive_page(database, "local", begun.conversation_id, 0)
    follow_up = started(database, "Go on", conversation_id=begun.conversation_id, parent_id=begun.message_id)
    assert llmchat.load_message(database, "local", begun.message_id).text == WHOLE
    assert conversation.messages[-1].text == WHOLE
    assert msgspec.json.decode(archive)["messages"][-1]["content"] == [{"kind": "text", "text": WHOLE}]
    assert [llmchat.text_of(turn.content) for turn in follow_up.turns] == ["Hello", WHOLE, "Go on"]
    assert llmchat.load_page(database, "local", begun.message_id, 0).length == len(WHOLE)


@pytest.mark.parametrize("settled", range(len(PIECES) + 1))
@pytest.mark.parametrize("as_published", [False, True])
def test_every_cursor_gets_the_rest_whatever_part_is_in_rows(
    database: sqlite3.Connection, settled: int, as_published: bool
) -> None:
    """The journal still has what has become rows: it is trimmed later."""
    message_id = started(database).message_id
    journal_in_pieces(database, message_id)
    deltas = [llmchat.Delta("text", piece) for piece in PIECES[:settled]]
    llmchat.insert_rows(database, "delta", list(llmchat.joined_rows(message_id, 0, deltas)))
    assert len(rows_of(database, message_id)) == min(settled, 1)
    for cursor in range(len(WHOLE) + 1):
        page = llmchat.load_page(database, "local", message_id, cursor, as_published=as_published)
        assert "".join(delta.text for _, delta in page.pieces) == WHOLE[cursor:]
        assert page.length == len(WHOLE) and (not page.pieces or page.pieces[-1][0] == len(WHOLE))
        if as_published and cursor == 0:
            assert [delta.text for _, delta in page.pieces] == [piece for piece in PIECES if piece]


def test_an_ended_message_is_its_rows_alone(database: sqlite3.Connection) -> None:
    message_id = started(database).message_id
    journal_in_pieces(database, message_id)
    ending = llmchat.Ending("completed", "stop")
    target = new_message().targets[0]
    outcome = llmchat.Outcome(message_id, ending, target, None, (), None, 5)
    llmchat.save_flush(database, llmchat.Save(rows=[(message_id, 0, "text", "whole", None)], outcomes=[outcome]))
    assert llmchat.load_message(database, "local", message_id).text == "whole"
    assert llmchat.load_page(database, "local", message_id, 0).length == 5


# ── recovery ──


@pytest.mark.parametrize("settled", range(len(PIECES) + 1))
def test_a_start_gives_each_message_what_only_the_journal_had(
    database: sqlite3.Connection, tmp_path: Path, settled: int
) -> None:
    message_id, empty = started(database).message_id, started(database).message_id
    journal_in_pieces(database, message_id)
    deltas = [llmchat.Delta("text", piece) for piece in PIECES[:settled]]
    llmchat.insert_rows(database, "delta", list(llmchat.joined_rows(message_id, 0, deltas)))
    assert llmchat.prepare_database(str(tmp_path / "x.db"), suspect=True) == 2
    message = llmchat.load_message(database, "local", message_id)
    assert (message.status, message.text) == ("interrupted", WHOLE)
    assert llmchat.load_message(database, "local", empty).text == ""
    assert journal_of(database) == [] and rows_of(database, 999) == []
    page = llmchat.load_page(database, "local", message_id, 0, as_published=True)
    assert [delta.text for _, delta in page.pieces] == [piece for piece in PIECES if piece], "the same events"
    assert llmchat.prepare_database(str(tmp_path / "x.db"), suspect=True) == 0
    assert llmchat.load_message(database, "local", message_id).text == WHOLE


def test_a_copy_of_a_running_database_has_what_the_journal_has(database: sqlite3.Connection, tmp_path: Path) -> None:
    message_id = started(database).message_id
    journal_in_pieces(database, message_id)
    llmchat.copy_database(str(tmp_path / "x.db"), str(tmp_path / "copy.db"))
    llmchat.prepare_database(str(tmp_path / "copy.db"), suspect=False)
    with contextlib.closing(llmchat.connect(str(tmp_path / "copy.db"), read_only=False)) as copy:
        assert llmchat.load_message(copy, "local", message_id).text == WHOLE


# ── rows ──


def test_rows_hold_runs_of_a_kind_of_bounded_length_and_know_their_events() -> None:
    long = "x" * llmchat.FRAME_CHARACTERS_MAX
    deltas = [("reasoning", "a"), ("reasoning", "bc"), ("text", "d"), ("tool_call", "{}"), ("tool_call", "{}"),
              ("text", "e"), ("text", long), ("text", "f")]  # fmt: skip
    rows = list(llmchat.joined_rows(7, 5, [llmchat.Delta(*one) for one in deltas]))
    assert rows == [
        (7, 5, "reasoning", "abc", "[1,2]"), (7, 8, "text", "d", None), (7, 9, "tool_call", "{}", None),
        (7, 11, "tool_call", "{}", None), (7, 13, "text", "e", None), (7, 14, "text", long, None),
        (7, 14 + len(long), "text", "f", None),
    ]  # fmt: skip


def test_merging_stays_right_at_every_step(database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmchat, "MERGE_ROWS", 4)
    message_id, offset, content = started(database).message_id, 0, ""
    for number in range(10):
        deltas = [llmchat.Delta("text", f"{number}.{one} ") for one in range(5)]
        llmchat.insert_rows(database, "delta", list(llmchat.joined_rows(message_id, offset, deltas)))
        content += llmchat.text_of(deltas)
        offset = len(content)
    database.execute("UPDATE message SET status = 'stopped', ended_at_ms = 1 WHERE id = ?", (message_id,))
    step: int | None = 0
    while step is not None:
        step = llmchat.merge_deltas(database, message_id, 1, step)
        for as_published in (False, True):
            page = llmchat.load_page(database, "local", message_id, 0, as_published=as_published)
            assert "".join(delta.text for _, delta in page.pieces) == content
            assert page.pieces[-1][0] == page.length == len(content)
    assert rows_of(database, message_id) == [(0, "text", content, None)]


def test_what_the_journal_kept_of_an_answer_is_there_when_it_goes_on(database: sqlite3.Connection) -> None:
    """Its end could be stored, but not its rows."""
    begun = started(database)
    journal_in_pieces(database, begun.message_id)
    database.execute(
        "UPDATE message SET status = 'failed', error_json = '{}', ended_at_ms = 1 WHERE id = ?", (begun.message_id,)
    )
    target = new_message().targets[0]
    going_on = llmchat.continue_message(database, "local", begun.message_id, target)
    assert llmchat.text_of(going_on.content) == WHOLE == llmchat.text_of(going_on.turns[-1].content)
    assert llmchat.load_message(database, "local", begun.message_id).text == WHOLE


# ── the flusher ──


def test_what_was_published_is_in_the_journal_then_in_rows_and_never_lost(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "JOURNAL_SECONDS", 3600)

    async def work(generations: llmchat.Generations) -> None:
        gates = gated(provider, ["one "], ["two ", "three "], [varied_text(llmchat.JOURNAL_CHARACTERS_MAX)], ["end"])
        begun, reader = await generations.start(question(generations)), Reader()
        reading = asyncio.create_task(read_stream(await subscribed(generations, begun.message_id), reader))

        async def until(content: str) -> tuple[list[Any], str]:
            await asyncio.to_thread(wait_until, lambda: reader.content == content, f"{len(content)} characters")
            with contextlib.closing(sqlite3.connect(tmp_path / "engine.db")) as other:
                return rows_of(other, begun.message_id), stored_content(other, begun.message_id)

        assert await until("one ") == ([], "one ")
        provider.open_gate(gates[0])
        assert await until("one two three ") == ([], "one two three ")
        provider.open_gate(gates[1])
        rows, stored = await until(content := "one two three " + varied_text(llmchat.JOURNAL_CHARACTERS_MAX))
        assert stored == content and "".join(row[2] for row in rows) == content, "so much is worth rows"
        provider.open_gate(gates[2])
        await reading
        rows, stored = await until(content + "end")
        assert [row[2] for row in rows] == [content, "end"], "the end makes rows of what is left"
        assert sum(json.loads(rows[0][3])) == len(content) and json.loads(rows[0][3])[0] == len("one ")
        with contextlib.closing(sqlite3.connect(tmp_path / "engine.db")) as other:
            assert journal_of(other) == [], "once all have their rows it is empty: what is deleted then is gone"

    run_engine(tmp_path, provider, work)


def test_the_journal_stays_short_and_nobody_who_is_silent_keeps_it_long(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "JOURNAL_SECONDS", 0.1)

    async def work(generations: llmchat.Generations) -> None:
        provider.script([*texts(["silent"]), Hang()])
        provider.script([*paced(texts([f"{number:04} " for number in range(200)]), 0.01), *openai_end()])
        silent = await generations.start(question(generations))
        await asyncio.to_thread(wait_until, lambda: generations.running[silent.message_id].published == 6, "a delta")
        begun, reader, longest = await generations.start(question(generations)), Reader(), 0
        reading = asyncio.create_task(read_stream(await subscribed(generations, begun.message_id), reader))
        with contextlib.closing(sqlite3.connect(tmp_path / "engine.db")) as other:
            while not reading.done():
                await asyncio.wait([reading], timeout=0.05)
                longest = max(longest, len(journal_of(other)))
            assert [row[2] for row in rows_of(other, silent.message_id)] == ["silent"], "it was its turn"
            assert (
                len(rows_of(other, begun.message_id)) > 3 and stored_content(other, begun.message_id) == reader.content
            )
        assert 0 < longest < 60, "of some 100 flushes"
        await generations.stop("local", silent.message_id)

    run_engine(tmp_path, provider, work)


def test_the_journal_keeps_what_is_nowhere_else_however_long_it_gets(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "JOURNAL_SECONDS", 3600)

    async def work(generations: llmchat.Generations) -> None:
        provider.script([*texts(["silent"]), Hang()])
        provider.script([*paced(texts([f"{number:04} " for number in range(100)]), 0.02), Hang()])
        silent = await generations.start(question(generations))
        await asyncio.to_thread(wait_until, lambda: generations.running[silent.message_id].published == 6, "a delta")
        begun = await generations.start(question(generations))
        speaking = generations.running[begun.message_id]
        await asyncio.to_thread(wait_until, lambda: speaking.published == 500, "all of it")
        with contextlib.closing(sqlite3.connect(tmp_path / "engine.db")) as other:
            assert len(journal_of(other)) > 2 * llmchat.JOURNAL_TRIM_ROWS
            assert stored_content(other, silent.message_id) == "silent"
            assert len(stored_content(other, begun.message_id)) == 500
        for one in (silent, begun):
            await generations.stop("local", one.message_id)

    run_engine(tmp_path, provider, work)


def test_a_message_that_is_deleted_while_the_journal_has_it_takes_no_other_along(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "JOURNAL_SECONDS", 0.1)

    async def work(generations: llmchat.Generations) -> None:
        provider.script([*texts(["deleted"]), Hang()])
        gates = gated(provider, ["one "], ["two "], ["three"])
        gone = await generations.start(question(generations))
        await asyncio.to_thread(wait_until, lambda: generations.running[gone.message_id].published == 7, "a delta")
        with contextlib.closing(sqlite3.connect(tmp_path / "engine.db", timeout=10)) as other:
            other.execute("PRAGMA foreign_keys = ON")
            other.execute("DELETE FROM conversation WHERE id = ?", (gone.conversation_id,))
            other.commit()
        begun, reader = await generations.start(question(generations)), Reader()
        reading = asyncio.create_task(read_stream(await subscribed(generations, begun.message_id), reader))
        for content, gate in (("one ", gates[0]), ("one two ", gates[1])):
            await asyncio.to_thread(wait_until, lambda content=content: reader.content == content, content)
            await asyncio.sleep(0.15)
            provider.open_gate(gate)
        await reading
        assert reader.content == "one two three" and reader.end is not None and reader.end["status"] == "completed"
        assert not generations.running, "what was deleted does not run on"

    run_engine(tmp_path, provider, work)


def test_what_was_seen_of_an_answer_stays_when_the_database_refuses_the_rest(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = llmchat.save_flush

    def refuse(connection: sqlite3.Connection, flush: llmchat.Save) -> None:
        save(connection, flush)
        if "refused" in str(flush):
            raise sqlite3.IntegrityError

    monkeypatch.setattr(llmchat, "save_flush", refuse)

    async def work(generations: llmchat.Generations) -> None:
        gates = gated(provider, ["seen "], ["refused"])
        begun, reader = await generations.start(question(generations)), Reader()
        reading = asyncio.create_task(read_stream(await subscribed(generations, begun.message_id), reader))
        await asyncio.to_thread(wait_until, lambda: reader.content == "seen ", "the first delta")
        provider.open_gate(gates[0])
        await reading
        message = await generations._store.read(llmchat.load_message, "local", begun.message_id)
        assert (message.status, message.text, reader.content) == ("failed", "seen ", "seen ")

    run_engine(tmp_path, provider, work)
