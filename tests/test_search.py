"""Texts become findable together, a moment after they came: a search knows them at once, and no crash makes them unfindable."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llmchat
from tests.conftest import Server, wait_until
from tests.guarantees import chat_to_the_gate, running_server
from tests.provider import Provider
from tests.test_store import locked, new_message, opened, run

NEW = "SELECT count(*) FROM unindexed"
TARGET = new_message().targets[0]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    llmchat.prepare_database(str(tmp_path / "x.db"), suspect=False)
    with contextlib.closing(llmchat.connect(str(tmp_path / "x.db"), read_only=False)) as connection:
        yield connection


def ask(connection: sqlite3.Connection, text: str, answer: str = "", **more: Any) -> llmchat.Started:
    started = llmchat.start_message(connection, new_message(text, **more))
    outcome = llmchat.Outcome(started.message_id, llmchat.Ending("completed", "stop"), TARGET, None, (), None, 5)
    deltas = llmchat.split_delta(llmchat.Delta("text", answer)) if answer else ()
    rows = list(llmchat.joined_rows(started.message_id, 0, deltas))
    llmchat.save_flush(connection, llmchat.Save(rows=rows, outcomes=[outcome]))
    return started


def found(connection: sqlite3.Connection, query: str) -> list[int]:
    return [one.id for one in llmchat.search_conversations(connection, "local", query, 200).conversations]


def test_title_question_and_answer_are_indexed_together(database: sqlite3.Connection) -> None:
    first = ask(database, "walrus\nand tusks", "They have blubber 鲸鱼\x00after")
    second = ask(database, "seal", "They have flippers")
    assert found(database, "walrus") == found(database, "flippers") == []
    assert not llmchat.index_texts(database) and llmchat.value_of(database, NEW) == 0
    assert found(database, "walrus") == found(database, "tusks") == found(database, "鲸鱼") == [first.conversation_id]
    assert found(database, "after") == [first.conversation_id] and found(database, "flippers") == [
        second.conversation_id
    ]
    assert not llmchat.index_texts(database)


def test_many_texts_are_indexed_in_groups_that_hold_up_no_flush(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "INDEX_GROUP_CHARACTERS", 1_000)
    for number in range(80):  # three texts each, one of them long
        ask(database, f"question{number:03}", f"answer{number:03} " + "x" * 600)
    left = [llmchat.value_of(database, NEW)]
    while llmchat.index_texts(database):
        left.append(llmchat.value_of(database, NEW))
    assert left[0] == 240 and llmchat.value_of(database, NEW) == 0
    assert all(before - after <= llmchat.INDEX_GROUP_TEXTS for before, after in itertools.pairwise(left))
    assert len(left) > 40, "no group has more than a few long texts"
    assert all(len(found(database, f"{word}{number:03}")) == 1 for word in ("question", "answer") for number in (7, 79))


def test_what_ends_again_is_indexed_anew(database: sqlite3.Connection) -> None:
    started = llmchat.start_message(database, new_message("walrus"))
    for offset, text, status in ((0, "tusks ", "stopped"), (6, "blubber", "completed")):
        outcome = llmchat.Outcome(started.message_id, llmchat.Ending(status), TARGET, None, (), None, 5)
        rows = llmchat.joined_rows(started.message_id, offset, [llmchat.Delta("text", text)])
        llmchat.save_flush(database, llmchat.Save(rows=list(rows), outcomes=[outcome]))
        llmchat.index_texts(database)
        if status == "stopped":
            assert found(database, "tusks") and not found(database, "blubber")
            llmchat.continue_message(database, "local", started.message_id, TARGET)
    assert found(database, "tusks blubber") == [started.conversation_id]


def test_only_the_beginning_of_a_very_long_text_is_indexed(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    characters = llmchat.INDEXED_CHARACTERS_MAX
    long = "begin " + "x " * (characters // 2) + "y" * llmchat.FRAME_CHARACTERS_MAX + " late"
    outcome = ask(database, "long", long)
    llmchat.index_texts(database)
    assert found(database, "begin") == [outcome.conversation_id] and not found(database, "late")


def test_an_image_beside_it_makes_no_text_unfindable(database: sqlite3.Connection) -> None:
    image = llmchat.Delta("image", encode_image(llmchat.INDEXED_CHARACTERS_MAX))
    new = new_message("walrus")
    (turn,) = new.turns
    llmchat.start_message(database, replace(new, turns=(replace(turn, content=(image, *turn.content)),)))
    llmchat.index_texts(database)
    (match,) = llmchat.search_conversations(database, "local", "walrus", 9).conversations
    assert match.match and llmchat.value_of(database, "SELECT text FROM message_fts WHERE rowid > 0") == "walrus"


def encode_image(characters: int) -> str:
    return llmchat.encode_json({"media_type": "image/png", "data": "A" * characters}).decode()


def test_what_is_deleted_or_hidden_is_never_indexed(database: sqlite3.Connection) -> None:
    gone = ask(database, "walrus", "tusks")
    ask(database, "secret", "whisper", hidden=True)
    llmchat.delete_conversation(database, "local", gone.conversation_id)
    llmchat.index_texts(database)
    assert llmchat.value_of(database, NEW) == llmchat.value_of(database, "SELECT count(*) FROM message_fts") == 0


def test_a_renamed_conversation_is_found_by_its_new_title_alone(database: sqlite3.Connection) -> None:
    started = ask(database, "walrus")
    llmchat.index_texts(database)
    llmchat.update_conversation(database, "local", started.conversation_id, {"title": "narwhal"})
    llmchat.index_texts(database)
    titled = [
        one.match.message_id for one in llmchat.search_conversations(database, "local", "walrus", 9).conversations
    ]
    assert found(database, "narwhal") == [started.conversation_id] and titled == [started.message_id - 1]


def test_a_search_knows_what_came_a_moment_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmchat, "DATABASE_BUSY_MS", 50)

    async def main() -> None:
        path = tmp_path / "x.db"
        async with opened(path) as store:
            await store.write(ask, "walrus", "tusks")
            assert len((await store.search("local", "tusks", 9)).conversations) == 1
            await store.write(ask, "seal", "flippers")
            with locked(path):
                assert len((await store.search("local", "tusks", 9)).conversations) == 1, "it does without the newest"
            assert len((await store.search("local", "flippers", 9)).conversations) == 1
            for number in range(llmchat.INDEX_GROUP_TEXTS):
                await store.write(ask, f"question {number:03}", f"answer {number:03}")
            last = llmchat.INDEX_GROUP_TEXTS - 1
            assert len((await store.search("local", f"answer {last:03}", 9)).conversations) == 1, "in any group"

    run(main())


def test_texts_are_indexed_by_themselves_also_after_a_kill(provider: Provider, tmp_path: Path) -> None:
    with running_server(tmp_path, provider) as server:
        stream, _, message_id, (gate,) = chat_to_the_gate(server, provider, ["walrus "], ["tusks"])
        wait_until(lambda: indexed(server) == [(2,)], "title and question, while the answer is running")
        provider.open_gate(gate)
        server.wait_ended(message_id)
        wait_until(lambda: indexed(server) == [(3,)], "the answer")
        stream.close()
        stream, *_ = chat_to_the_gate(server, provider, ["blubber"], ["never"])
        server.kill()
        stream.close()
    with running_server(tmp_path, provider) as server:
        wait_until(lambda: indexed(server) == [(6,)], "what was interrupted")
        assert server.rows(NEW) == [(0,)]


def indexed(server: Server) -> list[tuple[int]]:
    return server.rows("SELECT count(*) FROM message_fts")
