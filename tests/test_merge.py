"""The sweep over rows of old answers: fewer rows, and nothing that a reader could tell it by."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmchat
from llmchat import Delta
from tests.client import Reader
from tests.conftest import Server, wait_until
from tests.provider import Provider, openai_text

LONG_AGO_MS = 2 * 3600 * 1000
CALL = '{"id":"c1","name":"look","arguments":"{}"}'


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    path = str(tmp_path / "llmchat.db")
    llmchat.prepare_database(path, suspect=False)
    with contextlib.closing(llmchat.connect(path, read_only=False)) as connection:
        connection.execute(
            "INSERT INTO conversation (id, owner, title, created_at_ms, updated_at_ms) VALUES (1, 'local', 't', 1, 1)"
        )
        yield connection


def store_answer(connection: sqlite3.Connection, rows: list[tuple[str, str]], status: str = "completed") -> int:
    """An answer as a stream leaves it: these rows, as they are."""
    message_id = llmchat.insert_message(connection, 1, None, "assistant", status, 1000)
    offset = 0
    for kind, text in rows:
        row = (message_id, offset, kind, text)
        connection.execute("INSERT INTO delta (message_id, offset, kind, text) VALUES (?, ?, ?, ?)", row)
        offset += len(text)
    return message_id


def merge(connection: sqlite3.Connection, message_id: int, ended_at_ms: int = 1000) -> int:
    """Merges to the end as the sweep does; returns the number of transactions."""
    offset: int | None = 0
    for count in range(1, 10_000):
        step = partial(llmchat.merge_deltas, message_id=message_id, ended_at_ms=ended_at_ms, offset=offset or 0)
        (offset,) = llmchat.commit_together(connection, [step], False)
        if offset is None:
            return count
    raise AssertionError("merging goes on for ever")


def rows_of(connection: sqlite3.Connection, message_id: int) -> list[tuple[int, str, str]]:
    rows = connection.execute(
        "SELECT offset, kind, text FROM delta WHERE message_id = ? ORDER BY offset", (message_id,)
    )
    return [tuple(row) for row in rows]


def read_from(connection: sqlite3.Connection, message_id: int, cursor: int) -> list[Delta]:
    """What a subscriber with this cursor gets from the store, page by page."""
    found: list[Delta] = []
    while True:
        page = llmchat.load_page(connection, "local", message_id, cursor)
        for offset, delta in page.pieces:
            cursor += len(delta.text)
            assert offset == cursor
            found.append(delta)
        if cursor >= page.length:
            return llmchat.join_deltas(found)


def stream_rows(seed: int, count: int) -> list[tuple[str, str]]:
    """Rows of every kind, mostly short ones, as a provider's moods leave them."""
    source = random.Random(seed)
    rows: list[tuple[str, str]] = []
    while len(rows) < count:
        kind = source.choice(["text", "text", "reasoning", "tool_call", "image", "signature"])
        if kind in llmchat.MERGED_KINDS:
            alphabet = source.choice(["ab ", "é中\U0001f600", "\0\n"])
            for _ in range(source.choice([1, 2, 30, 200])):
                length = source.choice([1, 3, 20, 4_000 if source.random() < 0.1 else 5, llmchat.FRAME_CHARACTERS_MAX])
                rows.append((kind, "".join(source.choices(alphabet, k=length if source.random() < 0.2 else 3))))
        else:
            rows.append((kind, CALL))
    return rows[:count]


@pytest.mark.parametrize("seed", range(12))
def test_content_and_what_every_cursor_gets_are_the_same_before_and_after(
    database: sqlite3.Connection, seed: int
) -> None:
    message_id = store_answer(database, stream_rows(seed, 150 if seed % 2 else 1700))
    content = llmchat.load_message(database, "local", message_id).content
    length = sum(len(delta.text) for delta in content)
    source = random.Random(seed)
    cursors = {0, length, *(source.randrange(length + 1) for _ in range(60))}
    cursors |= {row[0] + step for row in source.sample(rows_of(database, message_id), 30) for step in (0, 1)}
    before = {cursor: read_from(database, message_id, min(cursor, length)) for cursor in cursors}
    merge(database, message_id)
    assert llmchat.load_message(database, "local", message_id).content == content
    assert {cursor: read_from(database, message_id, min(cursor, length)) for cursor in cursors} == before


@pytest.mark.parametrize("seed", range(4))
def test_what_is_merged_is_as_few_rows_as_the_bound_allows_and_none_is_above_it(
    database: sqlite3.Connection, seed: int
) -> None:
    message_id = store_answer(database, stream_rows(seed, 1700))
    merge(database, message_id)
    rows = rows_of(database, message_id)
    assert max(len(text) for _, _, text in rows) <= llmchat.FRAME_CHARACTERS_MAX
    for (_, kind, text), (_, next_kind, next_text) in itertools.pairwise(rows):
        if kind == next_kind and kind in llmchat.MERGED_KINDS:
            assert len(text) + len(next_text) > llmchat.FRAME_CHARACTERS_MAX, "these two would have fitted into one"
    assert merge(database, message_id) >= 1 and rows_of(database, message_id) == rows, "again changes nothing"


def test_kinds_that_are_whole_stay_as_they_are(database: sqlite3.Connection) -> None:
    rows = [
        ("tool_call", CALL),
        ("tool_call", CALL),
        ("text", "a"),
        ("image", "{}"),
        ("image", "{}"),
        ("text", "b"),
        ("text", "c"),
    ]
    message_id = store_answer(database, rows)
    merge(database, message_id)
    assert [row[1:] for row in rows_of(database, message_id)] == [*rows[:5], ("text", "bc")]


def test_ten_thousand_rows_become_few_in_transactions_of_a_few_hundred(database: sqlite3.Connection) -> None:
    message_id = store_answer(database, [("text", "word ")] * 10_000)
    transactions = merge(database, message_id)
    assert len(rows_of(database, message_id)) == 5
    assert transactions >= 20


def test_an_answer_that_runs_again_or_is_gone_is_left_alone(database: sqlite3.Connection) -> None:
    running = store_answer(database, [("text", "a"), ("text", "b")], status="running")
    assert llmchat.find_unmerged(database) is None
    assert llmchat.merge_deltas(database, running, 1000, 0) is None and len(rows_of(database, running)) == 2
    assert llmchat.merge_deltas(database, 999, 1000, 0) is None
    ended = store_answer(database, [("text", "a"), ("text", "b")])
    assert llmchat.merge_deltas(database, ended, 999, 0) is None and len(rows_of(database, ended)) == 2


def test_a_merged_answer_is_not_looked_at_again_until_it_is_continued(server: Server, provider: Provider) -> None:
    provider.script(openai_text("One ", "two ", finish="length"), openai_text("three ", "four"))
    message_id = server.start_chat("Count")
    server.wait_ended(message_id)
    with contextlib.closing(llmchat.connect(str(server.db), read_only=False)) as connection:
        ended_at_ms = server.rows("SELECT ended_at_ms FROM message WHERE id = ?", message_id)[0][0]
        assert llmchat.find_unmerged(connection) == (message_id, ended_at_ms)
        merge(connection, message_id, ended_at_ms)
        assert llmchat.find_unmerged(connection) is None
        assert server.post(f"/api/v1/messages/{message_id}/continue", {"background": True}).status_code == 202
        assert server.wait_ended(message_id)["text"] == "One two three four"
        assert llmchat.find_unmerged(connection) is not None
        merge(connection, message_id, server.rows("SELECT ended_at_ms FROM message WHERE id = ?", message_id)[0][0])
    assert server.rows("SELECT text FROM delta WHERE message_id = ?", message_id) == [("One two three four",)]


# ── when it runs ────────────────────────────────────────────────────────────────────────────────────────────────────


def age(server: Server) -> None:
    """Makes everything in a stopped server's database two hours older."""
    with contextlib.closing(sqlite3.connect(server.db)) as connection:
        columns = ("created_at_ms", "first_delta_at_ms", "ended_at_ms")
        connection.execute(f"UPDATE message SET {', '.join(f'{name} = {name} - {LONG_AGO_MS}' for name in columns)}")
        connection.commit()


def small_rows(server: Server, provider: Provider, count: int) -> int:
    """An answer of many rows; the flusher would make fewer."""
    provider.script(openai_text("word "))
    message_id = server.start_chat("Go")
    server.wait_ended(message_id)
    with contextlib.closing(sqlite3.connect(server.db, timeout=10)) as connection:
        rows = [(message_id, 5 * number, "text", "word ") for number in range(1, count)]
        connection.executemany("INSERT INTO delta (message_id, offset, kind, text) VALUES (?, ?, ?, ?)", rows)
        connection.commit()
    return message_id


def count_rows(server: Server, message_id: int) -> int:
    return int(server.rows("SELECT count(*) FROM delta WHERE message_id = ?", message_id)[0][0])


def test_old_answers_are_merged_after_a_start_and_young_ones_are_not(server: Server, provider: Provider) -> None:
    old = small_rows(server, provider, 3000)
    server.terminate()
    age(server)
    server.start()
    young = small_rows(server, provider, 300)
    wait_until(lambda: server.rows("SELECT merged FROM message WHERE id = ?", old) == [(1,)], "the merge")
    assert count_rows(server, old) == 2 and server.content(old) == "word " * 3000
    assert count_rows(server, young) == 300
    assert server.message(old)["text"] == "word " * 3000


def test_a_resume_in_flight_while_its_rows_are_merged_is_exact(server: Server, provider: Provider) -> None:
    content = "".join(f"{number} " for number in range(120_000))
    provider.script(openai_text("0 "))
    message_id = server.start_chat("Count")
    server.wait_ended(message_id)
    with contextlib.closing(llmchat.connect(str(server.db), read_only=False)) as connection:
        rows, offset = [], 2
        for number in range(1, 120_000):
            rows.append((message_id, offset, "text", f"{number} "))
            offset += len(rows[-1][3])
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO delta (message_id, offset, kind, text) VALUES (?, ?, ?, ?)", rows)
        connection.execute("COMMIT")
        ended_at_ms = server.rows("SELECT ended_at_ms FROM message WHERE id = ?", message_id)[0][0]
        readers = [Reader() for _ in range(3)]
        for number, reader in enumerate(readers):  # somewhere in a row that is about to be merged
            reader.cursor, reader.content = 100_001 * number, content[: 100_001 * number]
        streams = [server.resume(message_id, reader.cursor) for reader in readers]
        for reader, stream in zip(readers, streams, strict=True):
            reader.read(stream, 2)
        threads = [
            threading.Thread(target=reader.read, args=(stream,))
            for reader, stream in zip(readers, streams, strict=True)
        ]
        for thread in threads:
            thread.start()
        merge(connection, message_id, ended_at_ms)
        for thread in threads:
            thread.join(60)
        for stream in streams:
            stream.close()
    assert [reader.content == content for reader in readers] == [True] * 3
    assert all(reader.end is not None for reader in readers)
    assert count_rows(server, message_id) < 100


def run_app(path: Path, scenario: Callable[[Any], Any]) -> None:
    """The app in this process, for what needs its clocks changed."""

    async def run() -> None:
        config = llmchat.load_config({"LLMCHAT_DB": str(path), "LLMCHAT_LOG_LEVEL": "error"}, {})
        app = llmchat.create_app(config)
        async with app.router.lifespan_context(app):
            await scenario(app.state.service)

    asyncio.run(run())


async def start_demo(service: Any, model: str) -> int:
    target = await service.providers.resolve("demo", model)
    turns = (llmchat.Turn("user", (Delta("text", "Hello"),)),)
    new = llmchat.NewMessage("local", None, llmchat.UNSET, turns, None, (target,), llmchat.Parameters())
    return int((await service.generations.start(new)).message_id)


async def answer_of_demo(service: Any) -> int:
    """A finished answer of some dozen rows."""
    message_id = await start_demo(service, "reasoning")
    await service.generations.running[message_id].ended.wait()
    return message_id


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        for _ in itertools.count():
            if condition():
                return
            await asyncio.sleep(0.01)


async def wait_for_merge(service: Any, message_id: int) -> None:
    def merged(connection: sqlite3.Connection) -> int:
        return int(connection.execute("SELECT merged FROM message WHERE id = ?", (message_id,)).fetchone()[0])

    async with asyncio.timeout(20):
        for _ in itertools.count():
            if await service.store.read(merged):
                return
            await asyncio.sleep(0.01)


def test_an_answer_is_merged_when_its_time_has_come_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "MERGE_AFTER_SECONDS", 0.3)

    async def scenario(service: Any) -> None:
        for _ in range(2):
            message_id = await answer_of_demo(service)
            text = (await service.store.read(llmchat.load_message, "local", message_id)).text
            await wait_for_merge(service, message_id)
            assert (await service.store.read(llmchat.load_message, "local", message_id)).text == text

    run_app(tmp_path / "llmchat.db", scenario)


def test_when_nothing_has_ended_the_sweep_sleeps_without_a_timer(tmp_path: Path) -> None:
    async def scenario(service: Any) -> None:
        merger = service.generations.merger
        await until(lambda: len(merger._called._waiters) == 1)
        await answer_of_demo(service)
        await until(lambda: not merger._called._waiters)

    run_app(tmp_path / "llmchat.db", scenario)


def test_what_ends_while_the_indexer_sleeps_is_indexed_without_a_search(tmp_path: Path) -> None:
    async def scenario(service: Any) -> None:
        indexer = service.generations.indexer
        slow = await start_demo(service, "slow")
        await until(lambda: len(indexer._called._waiters) == 1)
        await service.generations.stop("local", slow)
        await until(lambda: not indexer._called._waiters)
        await until(lambda: len(indexer._called._waiters) == 1)
        assert await service.store.read(llmchat.value_of, "SELECT count(*) FROM unindexed") == 0

    run_app(tmp_path / "llmchat.db", scenario)


def test_memory_is_given_back_once_nothing_has_run_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(llmchat, "REST_SECONDS", 0.05)
    monkeypatch.setattr(llmchat, "give_back_memory", lambda: given.append("given"))

    async def scenario(service: Any) -> None:
        tidier = service.generations.tidier
        await until(lambda: len(tidier._called._waiters) == 1)
        assert not given, "nothing has run yet"
        slow = await start_demo(service, "slow")
        await answer_of_demo(service)
        await asyncio.sleep(0.3)
        assert not given, "something still runs"
        await service.generations.stop("local", slow)
        await until(lambda: bool(given) and len(tidier._called._waiters) == 1)
        assert given == ["given"]

    run_app(tmp_path / "llmchat.db", scenario)


def test_memory_is_given_back_by_a_c_library_that_can_and_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=kept.append))
    llmchat.give_back_memory()
    assert kept == [0], "the bytes to keep"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    llmchat.give_back_memory()


def test_a_database_that_cannot_be_written_stops_no_sweep_for_ever_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "MERGE_AFTER_SECONDS", 0.1)
    monkeypatch.setattr(llmchat, "CHORE_RETRY_SECONDS", 0.1)
    failures = iter([llmchat.StoreUnavailable("full"), sqlite3.DatabaseError("malformed")])
    find_unmerged = llmchat.find_unmerged

    def find(connection: sqlite3.Connection) -> Any:
        if failure := next(failures, None):
            raise failure
        return find_unmerged(connection)

    monkeypatch.setattr(llmchat, "find_unmerged", find)

    async def scenario(service: Any) -> None:
        await wait_for_merge(service, await answer_of_demo(service))

    run_app(tmp_path / "llmchat.db", scenario)
