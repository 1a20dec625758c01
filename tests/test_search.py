"""Texts become findable together, a moment after they came: a search knows them at once, and no crash makes them unfindable."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import unicodedata
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
INDEXED = "SELECT (SELECT count(*) FROM message_fts) + (SELECT count(*) FROM conversation_fts)"
TARGET = new_message().targets[0]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    llmchat.prepare_database(str(tmp_path / "x.db"), suspect=False)
    with contextlib.closing(llmchat.connect(str(tmp_path / "x.db"), read_only=False)) as connection:
        yield connection


def ask(
    connection: sqlite3.Connection, text: str, answer: str = "", owner: str = "local", **more: Any
) -> llmchat.Started:
    started = llmchat.start_message(connection, replace(new_message(text, **more), owner=owner))
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


def test_a_prefix_finds_every_word_that_begins_so_the_newest_first(database: sqlite3.Connection) -> None:
    def said(text: str) -> int:
        return ask(database, "question", text).conversation_id

    asked = [said(f"a whal{number:03}") for number in range(llmchat.SEARCH_PREFIXED_MAX + 20)]
    other = said("wha l whak xwhal")
    pairs = [said(f"sperm-whal{ending}") for ending in ("e", "es")]
    while llmchat.index_texts(database):
        pass
    assert found(database, "whal") == [*pairs[::-1], *asked[::-1]], "more words than an expression is given"
    assert found(database, "whal00") == asked[9::-1] and found(database, "whal000") == asked[:1]
    assert found(database, "sperm-whal") == found(database, "sperm-whale") == pairs[::-1]
    assert found(database, "wha") == [*pairs[::-1], other, *asked[::-1]] and found(database, "whal00 nothing") == []


@pytest.mark.parametrize(
    "word", ["чайный", "Ёжики", "ΣΊΣΥΦΟΣ", "İstanbul", "ſtraße", "tiếng", "nai\u0308ve", "한국어로", "हिन्दी"]
)
def test_a_word_is_found_in_any_case_whole_and_by_its_beginning(database: sqlite3.Connection, word: str) -> None:
    started = ask(database, "walrus", f"before {word} after")
    llmchat.index_texts(database)
    cases = {one for one in (word.lower(), word.upper()) if len(one) == len(word)}
    for query in {word, word[:-1], unicodedata.normalize("NFC", word)} | cases:
        assert found(database, query) == [started.conversation_id], query
    (match,) = llmchat.search_conversations(database, "local", word, 9).conversations
    assert match.match and any(part.mark for part in match.match.snippet)


def test_letters_are_folded_as_the_index_does_it(database: sqlite3.Connection) -> None:
    unlike = []
    for code in range(0x80, 0x10000):  # Unicode 6.1 is what FTS5 knows: what got an upper case later, it cannot fold
        letter = chr(code)
        if letter.isalpha() and not llmchat.UNSPACED.match(letter):
            database.execute("INSERT INTO message_fts (rowid, text) VALUES (?, ?)", (code, f"a{letter}b"))
    for code, term in database.execute("SELECT doc, term FROM message_term").fetchall():
        if term != llmchat.fold(f"a{chr(code)}b"):
            unlike.append(chr(code))
    assert len(unlike) < 350 and not [one for one in unlike if "a" <= one <= "ƿ" or "ΐ" <= one <= "ԣ"], "".join(unlike)


def test_each_owner_finds_what_is_theirs_beside_others_and_alone(database: sqlite3.Connection) -> None:
    mine = ask(database, "walrus tusks").conversation_id
    llmchat.index_texts(database)
    assert found(database, "walr") == found(database, "walrus") == [mine]
    theirs = ask(database, "walrus whiskers", owner="other").conversation_id
    llmchat.index_texts(database)
    assert found(database, "walr") == found(database, "walrus") == [mine]
    others = llmchat.search_conversations(database, "other", "walr", 9).conversations
    assert [one.id for one in others] == [theirs]
    assert llmchat.search_conversations(database, "third", "walrus", 9).conversations == []


def test_what_was_indexed_in_one_table_is_found_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, path = tmp_path / "migrations", str(tmp_path / "x.db")
    folder.mkdir()
    for script in sorted(llmchat.MIGRATIONS.glob("*.sql"))[:8]:
        (folder / script.name).write_bytes(script.read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr(llmchat, "MIGRATIONS", folder)
        llmchat.prepare_database(path, suspect=False)
    with contextlib.closing(llmchat.connect(path, read_only=False)) as connection:
        started = [llmchat.start_message(connection, new_message(text)) for text in ("walrus", "seal")]
        for one, text in zip(started, ("walrus", "seal"), strict=True):
            token, question_id = llmchat.owner_token("local"), one.message_id - 1
            columns = "INSERT INTO message_fts (rowid, owner, title, text) VALUES (?, ?, ?, ?)"
            connection.execute(columns, (question_id, token, None, f"{text} 鲸  鱼 "))
            connection.execute(columns, (-one.conversation_id, token, f"about {text}", None))
        connection.execute("DELETE FROM unindexed")
        connection.commit()
    llmchat.prepare_database(path, suspect=False)
    with contextlib.closing(llmchat.connect(path, read_only=False)) as connection:
        ids = [one.conversation_id for one in started]
        assert found(connection, "鲸鱼") == ids[::-1] and found(connection, "about walr") == ids[:1]
        llmchat.delete_conversation(connection, "local", ids[0])


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
    assert match.match and llmchat.value_of(database, "SELECT text FROM message_fts") == "walrus"


def encode_image(characters: int) -> str:
    return llmchat.encode_json({"media_type": "image/png", "data": "A" * characters}).decode()


def test_what_is_deleted_or_hidden_is_never_indexed(database: sqlite3.Connection) -> None:
    gone = ask(database, "walrus", "tusks")
    ask(database, "secret", "whisper", hidden=True)
    llmchat.delete_conversation(database, "local", gone.conversation_id)
    llmchat.index_texts(database)
    assert llmchat.value_of(database, NEW) == llmchat.value_of(database, INDEXED) == 0


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
    return server.rows(INDEXED)
