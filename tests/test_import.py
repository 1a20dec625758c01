"""Exports that come in: ours to the last field, ChatGPT's and Claude's as their users have them, and hostile ones."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import llmchat
from tests.conftest import ROOT, Server, wait_until
from tests.provider import Provider, openai_text

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(60))
JSON = {"content-type": "application/json"}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    yield from open_database(tmp_path / "llmchat.db")


@pytest.fixture
def other_database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    yield from open_database(tmp_path / "other.db")


def open_database(path: Path) -> Iterator[sqlite3.Connection]:
    llmchat.prepare_database(str(path), suspect=False)
    with contextlib.closing(llmchat.connect(str(path), read_only=False)) as connection:
        yield connection


class Import:
    """What an import did, as the operations of the store do it; `error` is what it broke off with."""

    def __init__(self, connection: sqlite3.Connection, data: Any, owner: str = "local") -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.answer = llmchat.ImportAnswer(llmchat.ImportCount(), llmchat.ImportCount(), [])
        self.error = ""
        try:
            for group in llmchat.grouped(llmchat.read_archive(io.BytesIO(body), self.answer)):
                operation = partial(llmchat.import_records, owner=owner, answer=self.answer, records=group)
                (failure,) = llmchat.commit_together(connection, [operation], False)
                if failure is not None:
                    raise failure
        except llmchat.LlmchatError as exc:
            self.error = exc.message

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Conversations imported and present, messages imported and present."""
        one, other = self.answer.conversations, self.answer.messages
        return one.imported, one.present, other.imported, other.present

    @property
    def orphans(self) -> int:
        return self.left_out.get("a parent that is not in the file: its messages became first ones", 0)

    @property
    def left_out(self) -> dict[str, int]:
        return {one.reason: one.count for one in self.answer.left_out}


def export_of(connection: sqlite3.Connection, owner: str = "local") -> dict[str, Any]:
    parts: list[bytes] = []
    for conversation_id in llmchat.list_ids(connection, owner):
        page, after = llmchat.archive_page(connection, owner, conversation_id, 0)
        parts.append(page)
        while after is not None:
            page, after = llmchat.archive_page(connection, owner, conversation_id, after)
            parts[-1] += page
    return json.loads(llmchat.ARCHIVE_START + b",".join(parts) + llmchat.ARCHIVE_END)


def tree_of(connection: sqlite3.Connection, conversation_id: int = 1) -> list[tuple[str, str, str | None]]:
    """(role, text, the parent's text) in order."""
    messages = llmchat.load_conversation(connection, "local", conversation_id).messages
    texts = {one.id: one.text for one in messages}
    return [(one.role, one.text, texts.get(one.parent_id or 0)) for one in messages]


def path_of(connection: sqlite3.Connection, conversation_id: int = 1) -> list[str]:
    conversation = llmchat.load_conversation(connection, "local", conversation_id)
    texts = {one.id: one.text for one in conversation.messages}
    return [texts[one] for one in conversation.path]


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def some_text(source: random.Random) -> str:
    alphabet = source.choice(["abc ", "é中\U0001f600\u202e", '"\\/\b\n\u2028', "\0\x01", "<script>&"])
    return "".join(source.choices(alphabet, k=source.choice([1, 5, 300, 25_000 if source.random() < 0.1 else 9])))


def some_content(source: random.Random) -> list[dict[str, str]]:
    makers: dict[str, Callable[[], str]] = {
        "text": lambda: some_text(source),
        "reasoning": lambda: some_text(source),
        "tool_call": lambda: json.dumps({"id": "c1", "name": "look", "arguments": '{"at": "' + "x" * 20_000 + '"}'}),
        "image": lambda: json.dumps({"media_type": "image/png", "data": base64.b64encode(PNG).decode()}),
        "signature": lambda: json.dumps({"provider": "anthropic", "signature": "c2ln"}),
    }
    kinds = [source.choice(list(makers)) for _ in range(source.randrange(5))]
    merged = [
        kind
        for index, kind in enumerate(kinds)
        if kind not in llmchat.MERGED_KINDS or kinds[index - 1 : index] != [kind]
    ]
    return [{"kind": kind, "text": makers[kind]()} for kind in merged]


def some_message(source: random.Random, number: int, parent: str | None) -> dict[str, Any]:
    status = source.choice(["completed", "stopped", "failed", "interrupted"])
    error = {"code": "stalled", "message": some_text(source).replace("\0", ""), "retryable": True}
    at = 1_700_000_000_000 + source.randrange(10**9)
    return {
        "origin": f"llmchat:{number}-{at}", "parent": parent,
        "role": source.choice(["user", "assistant", "tool", "system"]),
        "status": status, "provider": source.choice([None, "openai"]), "model": source.choice([None, "gpt"]),
        "system": source.choice([None, None, "", "Of this answer alone."]),
        "params": source.choice([{}, {"temperature": 0.5, "tools": [{"name": "look"}]}, {"tool_call_id": "c1"}]),
        "content": some_content(source), "finish_reason": source.choice([None, "stop", "length", "tool_calls"]),
        "error": error if status == "failed" else None,
        "usage": source.choice([None, {"input_tokens": 1, "output_tokens": 2, "estimated": True, "cached_tokens": 3}]),
        "attempts": source.choice([[], [{"provider": "openai", "model": "m", "error": None, "ms": 3}]]),
        "created_at_ms": at, "first_delta_at_ms": source.choice([None, at + 5]),
        "first_text_at_ms": source.choice([None, at + 7]), "ended_at_ms": at + 9,
    }  # fmt: skip


def some_archive(seed: int) -> dict[str, Any]:
    source = random.Random(seed)
    conversations = []
    for number in range(1, 4):
        messages: list[dict[str, Any]] = []
        for _ in range(source.choice([0, 1, 12, 250])):
            parents = [None, *(one["origin"] for one in messages[-6:])]
            messages.append(
                some_message(source, len(messages) + 1, source.choice(parents[-3:] if messages else parents))
            )
        head = {"origin": f"llmchat:{number}-17", "title": f"T{number} é", "system": source.choice(["", "Be brief."])}
        head["parameters"] = source.choice([{}, {"max_tokens": 7}])
        conversations.append({**head, "created_at_ms": 17, "updated_at_ms": 18 + number, "messages": messages})
    return {"format": "llmchat", "version": 1, "conversations": conversations}


@pytest.mark.parametrize("seed", range(8))
def test_what_was_imported_is_exported_as_it_was(database: sqlite3.Connection, seed: int) -> None:
    archive = some_archive(seed)
    count = sum(len(one["messages"]) for one in archive["conversations"])
    found = Import(database, archive)
    assert (found.counts, found.left_out, found.error) == ((3, 0, count, 0), {}, "")
    assert export_of(database) == archive
    assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    assert llmchat.find_unmerged(database) is None, "its rows are few already"


@pytest.mark.parametrize("seed", range(2))
def test_a_second_import_adds_nothing_and_changes_nothing(database: sqlite3.Connection, seed: int) -> None:
    archive = some_archive(seed)
    first = Import(database, archive)
    before = list(database.iterdump())
    again = Import(database, archive)
    assert again.counts == (0, 3, 0, first.counts[2]) and again.left_out == {}
    assert list(database.iterdump()) == before


def test_the_order_of_members_and_white_space_do_not_matter(database: sqlite3.Connection) -> None:
    archive = some_archive(3)
    found = Import(database, json.dumps(archive, sort_keys=True, indent=1).encode("utf-8-sig"))
    assert found.error == "" and export_of(database) == archive


def test_a_conversation_travels_between_servers_with_everything_that_happened_in_it(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    from tests import test_export

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with Provider() as provider:
        provider.script(*[openai_text(f"Answer {number}") for number in range(9)])
        first = serve(folder=tmp_path / "first", OPENAI_BASE_URL=provider.base_url)
        image = {"type": "image", "data": test_export.PIXEL}
        first.post(
            "/api/v1/chat", {"message": [{"type": "text", "text": "Look"}, image], "stream": False, "system": "Short."}
        )
        first.post("/api/v1/messages/2/regenerate", {"stream": False, "temperature": 0.3})
        first.post("/api/v1/chat", {"message": "More", "conversation_id": 1, "parent_id": 2, "stream": False})
    archive = first.get("/api/v1/conversations/1/export").content
    second = serve(folder=tmp_path / "second")
    second.wait_ended(second.start_chat("Ids are different here"))
    answer = second.post("/api/v1/import", content=archive, headers=JSON)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "conversations": {"imported": 1, "present": 0}, "messages": {"imported": 5, "present": 0}, "left_out": [],
    }  # fmt: skip
    assert second.get("/api/v1/conversations/2/export").content == archive
    old, new = (server.get(f"/api/v1/conversations/{number}").json() for server, number in ((first, 1), (second, 2)))
    renamed = {one["id"]: two["id"] for one, two in zip(old["messages"], new["messages"], strict=True)}
    for one in old["messages"]:
        one.update(id=renamed[one["id"]], parent_id=renamed.get(one["parent_id"]), conversation_id=2)
    assert new == {**old, "id": 2, "path": [renamed[one] for one in old["path"]]}
    for words in ("More", "Look"):  # in a message, in the title
        search = second.get(f"/api/v1/conversations?query={words}").json()["conversations"]
        assert [one["id"] for one in search] == [2], "what came in is found"
    assert second.rows("SELECT count(*) FROM conversation_fts WHERE rowid = -2") == [(1,)]
    assert first.post("/api/v1/import", content=archive, headers=JSON).json()["messages"] == {
        "imported": 0,
        "present": 5,
    }


def test_the_instructions_of_a_response_travel_and_what_it_repeats_of_its_request_stays(
    serve: Callable[..., Server], provider: Provider, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    first, second = serve(), serve(folder=tmp_path / "second")
    asked = {"model": "openai/m", "input": "Hello", "instructions": "Only in Latin.", "metadata": {"ticket": "7"}}
    made = first.post("/v1/responses", asked).json()
    assert (made["instructions"], made["metadata"]) == ("Only in Latin.", {"ticket": "7"})
    archive = first.get("/api/v1/export").content
    assert (
        json.loads(archive)["conversations"][0]["messages"][1]["system"] == "Only in Latin."
        and b"ticket" not in archive
    )
    second.wait_ended(second.start_chat("Ids are different here"))
    assert second.post("/api/v1/import", content=archive, headers=JSON).json()["messages"]["imported"] == 2
    assert second.get("/api/v1/conversations/2/export").content == first.get("/api/v1/conversations/1/export").content
    found = second.get("/v1/responses/resp_4").json()
    assert (found["instructions"], found["metadata"], found["output"][0]["content"]) == (
        "Only in Latin.", {}, made["output"][0]["content"]
    )  # fmt: skip
    second.post("/api/v1/messages/4/regenerate", {"stream": False})
    assert provider.chats[-1].json["messages"][0] == {"role": "system", "content": "Only in Latin."}


def test_a_newer_export_adds_what_is_new_and_a_deleted_conversation_comes_back(
    database: sqlite3.Connection, other_database: sqlite3.Connection
) -> None:
    older = some_archive(3)
    conversation = max(older["conversations"], key=lambda one: len(one["messages"]))
    messages, conversation["messages"] = conversation["messages"], conversation["messages"][:5]
    older["conversations"] = [conversation]
    assert Import(database, older).counts == (1, 0, 5, 0)
    conversation["messages"] = messages
    conversation["updated_at_ms"] += 1000
    assert Import(database, older).counts == (0, 1, len(messages) - 5, 5)
    assert export_of(database) == older
    llmchat.delete_conversation(database, "local", 1)
    assert Import(database, older).counts == (1, 0, len(messages), 0)
    assert export_of(database) == older


def test_what_was_made_here_is_known_when_it_comes_home(server: Server) -> None:
    server.wait_ended(server.start_chat("Hello"))
    archive = server.get("/api/v1/export").content
    answer = server.post("/api/v1/import", content=archive, headers=JSON).json()
    assert answer["conversations"] == {"imported": 0, "present": 1} and answer["messages"] == {
        "imported": 0,
        "present": 2,
    }
    assert server.client.delete("/api/v1/conversations/1").status_code == 200
    server.post("/api/v1/import", content=archive, headers=JSON)
    server.wait_ended(server.start_chat("More", conversation_id=2))
    newer = server.get("/api/v1/export").content
    assert server.post("/api/v1/import", content=newer, headers=JSON).json()["messages"] == {
        "imported": 0,
        "present": 4,
    }
    assert server.get("/api/v1/export").content == newer


def test_an_origin_that_looks_like_a_row_which_came_from_elsewhere_is_not_that_row(
    database: sqlite3.Connection,
) -> None:
    for origin in ("elsewhere", "llmchat:1-17"):  # the first one gets the id 1
        head = {"origin": origin, "created_at_ms": 17, "updated_at_ms": 17, "messages": []}
        archive = {"format": "llmchat", "version": 1, "conversations": [head]}
        assert Import(database, archive).counts[:2] == (1, 0)


def test_another_owner_gets_a_copy_of_their_own(database: sqlite3.Connection) -> None:
    archive = some_archive(2)
    for owner in ("local", "ann", "bob"):
        assert Import(database, archive, owner).counts[:2] == (3, 0)
        assert export_of(database, owner) == archive
    assert llmchat.list_conversations(database, "ann", 10, None).conversations[0].id not in {1, 2, 3}


def test_what_was_running_comes_in_as_interrupted_and_can_be_continued(server: Server, provider: Provider) -> None:
    message = {"origin": "a", "role": "user", "created_at_ms": 5, "content": [{"kind": "text", "text": "Count"}]}
    answer = {"origin": "b", "parent": "a", "role": "assistant", "status": "running", "created_at_ms": 6}
    answer["content"] = [{"kind": "text", "text": "One, "}]
    head = {"origin": "c", "created_at_ms": 5, "updated_at_ms": 6, "messages": [message, answer]}
    server.post("/api/v1/import", {"format": "llmchat", "version": 1, "conversations": [head]})
    assert server.message(2)["status"] == "interrupted" and server.message(2)["timing"]["total_ms"] == 0
    provider.script(openai_text("two"))
    assert server.post("/api/v1/messages/2/continue", {"stream": False}).json()["text"] == "One, two"


def ours(**message: Any) -> dict[str, Any]:
    """An archive with one message that has these members."""
    whole = {"origin": "m", "role": "assistant", "created_at_ms": 5, **message}
    head = {"origin": "c", "title": "Mine", "created_at_ms": 5, "updated_at_ms": 5, "messages": [whole]}
    return {"format": "llmchat", "version": 1, "conversations": [head]}


def deltas(kind: str, *texts: str) -> list[dict[str, str]]:
    return [{"kind": kind, "text": text} for text in texts]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "robot"}, "Invalid enum value 'robot'"),
        ({"status": "done"}, "Invalid enum value 'done'"),
        ({"created_at_ms": "now"}, "Expected `integer`, got `string`"),
        ({"created_at_ms": -1}, "Expected `integer` >= 0"),
        ({"created_at_ms": 10**400}, "Expected `integer`, got `string`"),
        ({"origin": 7}, "Expected `string`, got `integer`"),
        ({"origin": ""}, "Expected `string` of length >= 1"),
        ({"origin": "x" * 201}, "Expected `string` of length <= 200"),
        ({"content": {"kind": "text"}}, "Expected `array`, got `object`"),
        ({"content": ["text"]}, "Expected `object`, got `string`"),
        ({"content": deltas("html", "x")}, "content of kind 'html'"),
        ({"content": deltas("tool_call", "x")}, "malformed"),
        ({"content": deltas("tool_call", '{"id": "1", "name": "x"}')}, "missing required field `arguments`"),
        ({"content": deltas("image", '{"media_type": "image/svg+xml", "data": "PHN2Zz4="}')}, "Invalid enum value"),
        (
            {"content": deltas("image", '{"media_type": "image/png", "data": "javascript:"}')},
            "Expected `string` matching",
        ),
        ({"content": deltas("signature", '"x"')}, "Expected `object`"),
        ({"params": {"temperature": "hot"}}, "Expected `number | null`, got `string`"),
        ({"params": {"tool_call_id": 7}}, "Expected `string | null`, got `integer`"),
        ({"params": {"x": json.loads("[" * 80 + "]" * 80)}}, "nested deeper than 64 levels"),
        ({"usage": {"input_tokens": "many"}}, "Expected `integer`, got `string`"),
        ({"attempts": {}}, "Expected `array`, got `object`"),
    ],
)
def test_a_message_that_could_not_be_ours_is_left_out_with_the_reason(
    database: sqlite3.Connection, message: dict[str, Any], words: str
) -> None:
    found = Import(database, ours(**message))
    (one,) = found.answer.left_out
    assert found.counts == (1, 0, 0, 0) and one.count == 1 and one.first == "Mine"
    assert one.reason.startswith("a message: ") and words in one.reason, one.reason


@pytest.mark.parametrize(
    "message",
    [
        {"content": deltas("text", "", "a", "", "b", "")},
        {"content": deltas("text", "half \ud83d", "\udc00 of a pair", "\0")},
        {"status": "failed"},
        {"status": "running", "ended_at_ms": 5},
        {"params": {"big": 10**300, "nan": float("nan"), "text\0": "\ud800"}, "attempts": [{"x": 1e300}]},
        {"error": {"message": "\0\udfff"}, "model": "\ud800\0", "unknown": {"deep": [[[]]]}},
        {"first_delta_at_ms": 2**53, "ended_at_ms": 0},
    ],
)
def test_what_is_strange_but_can_be_kept_comes_in_and_goes_out_again(
    database: sqlite3.Connection, other_database: sqlite3.Connection, message: dict[str, Any]
) -> None:
    assert Import(database, ours(**message)).counts == (1, 0, 1, 0)
    llmchat.load_message(database, "local", 1)
    exported = export_of(database)
    assert Import(other_database, exported).counts == (1, 0, 1, 0)
    assert export_of(other_database) == exported


def test_tokens_beyond_all_reason_are_summed_all_the_same(database: sqlite3.Connection) -> None:
    usage = {"input_tokens": 2**62, "output_tokens": 1, "estimated": False}
    archive = ours(usage=usage, created_at_ms=llmchat.now_ms())
    messages = archive["conversations"][0]["messages"]
    messages += [{**messages[0], "origin": f"more-{number}"} for number in range(3)]
    assert Import(database, archive).counts == (1, 0, 4, 0)
    (row,) = llmchat.sum_usage(database, "local", 1)
    assert row.messages == 4 and row.output_tokens == 4


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        (
            {"format": "llmchat", "version": 2, "conversations": []},
            "version: 2 was made by a newer llmchat; this one knows 1",
        ),
        ({"hello": "world"}, "body: holds no conversations of a format that is known"),
        ({}, "body: holds no conversations of a format that is known"),
        ("text", "body: cannot be imported: expected a JSON list or object, or a zip, at character 0"),
        (7, "body: cannot be imported: expected a JSON list or object, or a zip, at character 0"),
    ],
)
def test_a_document_of_another_kind_is_refused(database: sqlite3.Connection, archive: Any, words: str) -> None:
    assert Import(database, archive).error == words


def test_a_conversation_whose_head_makes_no_sense_is_left_out_and_the_next_one_is_not(
    database: sqlite3.Connection,
) -> None:
    archive = some_archive(3)
    messages = len(archive["conversations"][0]["messages"])
    archive["conversations"][0]["title"] = 7
    archive["conversations"][2]["messages"] = "none"
    found = Import(database, archive)
    assert found.counts[0] == 1 and found.error == ""
    assert found.left_out == {
        "a conversation with its messages: Expected `string`, got `integer` - at `$.title`": 1 + messages,
        "not a conversation of a format that is known": 1,
    }


def test_a_parent_that_is_missing_or_comes_later_makes_first_messages_and_is_counted(
    database: sqlite3.Connection,
) -> None:
    archive = ours()
    one = archive["conversations"][0]["messages"][0]
    archive["conversations"][0]["messages"] = [
        {**one, "origin": "a", "parent": "nobody"}, {**one, "origin": "b", "parent": "c"},
        {**one, "origin": "c", "parent": "b"}, {**one, "origin": "d", "parent": "d"},
    ]  # fmt: skip
    found = Import(database, archive)
    assert found.counts == (1, 0, 4, 0) and found.orphans == 3
    assert [row[0] for row in database.execute("SELECT parent_id FROM message ORDER BY id")] == [None, None, 2, None]


# ── ChatGPT ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def node(
    key: str, parent: str | None, children: list[str], role: str = "", text: Any = None, **more: Any
) -> dict[str, Any]:
    """A node of `mapping`, with every member that exports have; `content` and `metadata` may be given whole."""
    message = None
    if role:
        message = {
            "id": key, "author": {"role": role, "name": more.get("name"), "metadata": {}},
            "create_time": 1_700_000_000.25 + len(key), "update_time": None,
            "content": more.get("content", {"content_type": "text", "parts": [text]}),
            "status": "finished_successfully", "end_turn": True, "weight": 1.0, "metadata": more.get("metadata", {}),
            "recipient": more.get("recipient", "all"), "channel": None,
        }  # fmt: skip
    return {"id": key, "message": message, "parent": parent, "children": children}


def chatgpt(*nodes: dict[str, Any], current: str | None = None, **more: Any) -> dict[str, Any]:
    head = {"title": "A chat", "create_time": 1_700_000_000.5, "update_time": 1_700_000_099.0, "moderation_results": []}
    head |= {
        "plugin_ids": None,
        "conversation_id": "68f0-c",
        "conversation_template_id": None,
        "gizmo_id": None,
        "is_archived": False,
    }
    return {**head, "mapping": {one["id"]: one for one in nodes}, "current_node": current, **more}


def image_part(pointer: str) -> dict[str, Any]:
    return {"content_type": "image_asset_pointer", "asset_pointer": pointer, "size_bytes": 68, "width": 1, "height": 1}


GPT4 = {"model_slug": "gpt-4o", "default_model_slug": "gpt-4o", "finish_details": {"type": "stop"}, "citations": []}
WHOLE = chatgpt(
    node("root", None, ["sys"]),
    node("sys", "root", ["custom"], "system", "", metadata={"is_visually_hidden_from_conversation": True}),
    node("custom", "sys", ["u1"], "user", metadata={"is_visually_hidden_from_conversation": True}, content={
        "content_type": "user_editable_context", "user_profile": "I am Ann.", "user_instructions": "Be brief."}),
    node("u1", "custom", ["a1", "a2"], "user", "What is 2+2?"),
    node("a1", "u1", [], "assistant", "5", metadata={**GPT4, "model_slug": "gpt-3.5"}),
    node("a2", "u1", ["u2"], "assistant", "4", metadata=GPT4),
    node("u2", "a2", ["think"], "user", content={"content_type": "multimodal_text", "parts": [
        image_part("file-service://file-AbC123"), "Run this", image_part("sediment://file_00ff"), "and this",
        {"content_type": "audio_transcription", "text": "spoken", "direction": "in"},
        {"content_type": "audio_asset_pointer", "asset_pointer": "sediment://file_a", "format": "wav"}]}),
    node("think", "u2", ["recap"], "assistant", metadata=GPT4, content={"content_type": "thoughts", "thoughts": [
        {"summary": "Plan", "content": "Use Python."}, {"summary": "Then", "content": "Answer."}], "x": 1}),
    node("recap", "think", ["call"], "assistant",
         content={"content_type": "reasoning_recap", "content": "Thought for 3s"}),
    node("call", "recap", ["result"], "assistant", recipient="python", metadata=GPT4,
         content={"content_type": "code", "language": "unknown", "text": "print(2+2)"}),
    node("result", "call", ["web"], "tool", name="python", content={"content_type": "execution_output", "text": "4\n"}),
    node("web", "result", ["quote"], "assistant", recipient="web.run", metadata=GPT4,
         content={"content_type": "code", "language": "json", "text": '{"q": "sum"}'}),
    node("quote", "web", ["draw"], "tool", name="web.run", content={
        "content_type": "tether_quote", "url": "https://a.example", "text": "four", "title": "Sums"}),
    node("draw", "quote", ["code"], "tool", name="dalle.text2im", content={
        "content_type": "multimodal_text", "parts": [image_part("file-service://file-Missing")]}),
    node("code", "draw", ["error"], "assistant", metadata=GPT4,
         content={"content_type": "code", "language": "python", "text": "x = 4"}),
    node("error", "code", ["last"], "tool", content={"content_type": "system_error", "name": "e", "text": "Oh no"}),
    node("last", "error", [], "assistant", "It is 4.", metadata={**GPT4, "finish_details": {"type": "max_tokens"}}),
    current="last",
)  # fmt: skip


def test_a_chatgpt_export_comes_in_whole(database: sqlite3.Connection) -> None:
    found = Import(database, [WHOLE])
    assert found.counts == (1, 0, 13, 0) and found.error == ""
    assert found.left_out == {
        "hidden by ChatGPT": 1,
        "an image that is not in the file": 3,
        "content of the type 'audio_asset_pointer'": 1,
        "a message without content": 1,
    }
    conversation = llmchat.load_conversation(database, "local", 1)
    assert (conversation.title, conversation.system) == ("A chat", "I am Ann.\n\nBe brief.")
    assert (conversation.created_at_ms, conversation.updated_at_ms) == (1_700_000_000_500, 1_700_000_099_000)
    assert tree_of(database) == [
        ("user", "What is 2+2?", None),
        ("assistant", "5", "What is 2+2?"),
        ("assistant", "4", "What is 2+2?"),
        ("user", "Run this\nand this\nspoken", "4"),
        ("assistant", "", "Run this\nand this\nspoken"),
        ("assistant", "", ""),
        ("assistant", "", ""),
        ("tool", "4\n", ""),
        ("assistant", "", "4\n"),
        ("tool", "Sums\n\nhttps://a.example\n\nfour", ""),
        ("assistant", "```python\nx = 4\n```", "Sums\n\nhttps://a.example\n\nfour"),
        ("tool", "Oh no", "```python\nx = 4\n```"),
        ("assistant", "It is 4.", "Oh no"),
    ]
    by_text = {one.text: one for one in conversation.messages}
    assert (by_text["5"].model, by_text["4"].model, by_text["4"].provider) == ("gpt-3.5", "gpt-4o", "openai")
    assert (by_text["4"].finish_reason, by_text["It is 4."].finish_reason) == ("stop", "length")
    assert by_text["What is 2+2?"].created_at_ms == 1_700_000_002_250
    contents = [[(one.kind, one.text) for one in message.content] for message in conversation.messages]
    assert contents[4:7] == [
        [("reasoning", "Plan\n\nUse Python.\n\nThen\n\nAnswer.")],
        [("reasoning", "Thought for 3s")],
        [("tool_call", '{"id":"call","name":"python","arguments":"{\\"input\\": \\"print(2+2)\\"}"}')],
    ]
    assert contents[8] == [("tool_call", '{"id":"web","name":"web.run","arguments":"{\\"q\\": \\"sum\\"}"}')]
    assert conversation.path[-1] == max(one.id for one in conversation.messages)
    assert Import(database, [WHOLE]).counts == (0, 1, 0, 13)


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_a_zip_comes_in_with_the_images_that_its_messages_point_to(server: Server) -> None:
    body = zip_of(
        {
            "chat.html": b"<html>",
            "conversations.json": json.dumps([WHOLE]).encode(),
            "file-AbC123-photo of me.png": PNG,
            "dalle-generations/file_00ff-0123.webp": b"RIFF1234WEBP",
            "user.json": b"{}",
        }
    )
    answer = server.post("/api/v1/import", content=body, headers={"content-type": "application/zip"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["messages"] == {"imported": 13, "present": 0}
    assert {one["reason"]: one["count"] for one in answer.json()["left_out"]}["an image that is not in the file"] == 1
    content = server.message(4)["content"]
    assert [one["kind"] for one in content] == ["image", "text", "image", "text"]
    image = json.loads(content[0]["text"])
    assert (image["media_type"], base64.b64decode(image["data"])) == ("image/png", PNG)
    assert json.loads(content[2]["text"])["media_type"] == "image/webp"


def test_a_zip_in_several_parts_comes_in_in_order(database: sqlite3.Connection) -> None:
    parts = {
        f"export/conversations-{number:03}.json": json.dumps([chatgpt(
            node("u", None, [], "user", "Q"), conversation_id=f"c{number}", title=f"Part {number}")]).encode()
        for number in (2, 0, 1)
    }  # fmt: skip
    assert Import(database, zip_of(parts)).counts == (3, 0, 3, 0)
    titles = [row[0] for row in database.execute("SELECT title FROM conversation ORDER BY id")]
    assert titles == ["Part 0", "Part 1", "Part 2"]


def test_what_other_services_tools_did_does_not_go_upstream_when_their_conversation_goes_on(
    server: Server, provider: Provider
) -> None:
    assert server.post("/api/v1/import", [WHOLE]).status_code == 200
    provider.script(openai_text("Yes"))
    assert server.post("/api/v1/chat", {"message": "Sure?", "conversation_id": 1, "stream": False}).status_code == 200
    sent = provider.chats[-1].json["messages"]
    assert [one["role"] for one in sent] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "python" not in json.dumps(sent[:4]) and all("tool_calls" not in one for one in sent)
    assert sent[4]["content"].endswith("It is 4.")


def test_the_current_node_is_the_newest_leaf_also_if_it_is_an_older_sibling(database: sqlite3.Connection) -> None:
    nodes = [
        node("r", None, ["u"]), node("u", "r", ["a", "b"], "user", "Q"),
        node("a", "u", [], "assistant", "A"), node("b", "u", ["c"], "assistant", "B"), node("c", "b", [], "user", "C"),
    ]  # fmt: skip
    Import(database, [chatgpt(*nodes, current="a")])
    assert path_of(database) == ["Q", "A"]
    Import(database, [chatgpt(*nodes, current="c", conversation_id="2")])
    assert path_of(database, 2) == ["Q", "B", "C"]
    Import(database, [chatgpt(*nodes, current="u", conversation_id="3")])
    assert path_of(database, 3) == ["Q", "B", "C"], "a current node that is no leaf decides nothing"


def test_what_a_system_says_in_the_middle_goes_to_the_system_prompt_and_leaves_no_gap(
    database: sqlite3.Connection,
) -> None:
    nodes = [
        node("u", None, ["s1"], "user", "Q"), node("s1", "u", ["s2"], "system", "Be kind."),
        node("s2", "s1", ["a"], "system", "Be brief."), node("a", "s2", [], "assistant", "A"),
    ]  # fmt: skip
    found = Import(database, [chatgpt(*nodes, current="a")])
    assert found.orphans == 0 and tree_of(database) == [("user", "Q", None), ("assistant", "A", "Q")]
    assert llmchat.load_conversation(database, "local", 1).system == "Be kind.\n\nBe brief."


def test_siblings_stand_in_the_order_of_their_parents_children(database: sqlite3.Connection) -> None:
    nodes = [
        node("z", "u", [], "assistant", "1"),
        node("y", "u", [], "assistant", "2"),
        node("x", "u", [], "assistant", "3"),
    ]
    Import(database, [chatgpt(*nodes, node("u", None, ["x", "y", "z"], "user", "Q"))])
    assert [text for _, text, _ in tree_of(database)] == ["Q", "3", "2", "1"]


def test_a_newer_chatgpt_export_adds_the_new_messages_to_the_same_conversation(database: sqlite3.Connection) -> None:
    first = [node("u", None, ["a"], "user", "Q"), node("a", "u", [], "assistant", "A")]
    Import(database, [chatgpt(*first, current="a")])
    first[1]["children"] = ["u2"]
    found = Import(
        database,
        [
            chatgpt(
                *first, node("u2", "a", [], "user", "More"), current="u2", title="Renamed", update_time=1_800_000_000
            )
        ],
    )
    assert found.counts == (0, 1, 1, 2) and path_of(database) == ["Q", "A", "More"]
    conversation = llmchat.load_conversation(database, "local", 1)
    assert (conversation.title, conversation.updated_at_ms) == ("A chat", 1_800_000_000_000)


@pytest.mark.parametrize(
    ("nodes", "texts"),
    [
        ([node("a", "b", ["b"], "user", "A"), node("b", "a", ["a"], "assistant", "B")], {("A", None), ("B", "A")}),
        ([node("a", "a", ["a"], "user", "A")], {("A", None)}),
        (
            [node("t", "a", [], "user", "T"), node("a", "b", [], "user", "A"), node("b", "a", [], "user", "B")],
            {("A", None), ("B", "A"), ("T", "A")},
        ),
        ([node("a", "gone", [], "user", "A")], {("A", None)}),
        ([node("a", None, ["b", "gone", 7], "user", "A"), node("b", 7, [], "user", "B")], {("A", None), ("B", "A")}),  # type: ignore[arg-type]
        ([node("e1", "e2", []), node("e2", "e1", []), node("a", "e1", [], "user", "A")], {("A", None)}),
        ([node("r", None, ["a", "a"]), node("a", "r", [], "user", "A")], {("A", None)}),
    ],
)
def test_trees_that_are_none_lose_nothing_and_end(
    database: sqlite3.Connection, nodes: list[dict[str, Any]], texts: set[tuple[str, str | None]]
) -> None:
    found = Import(database, [chatgpt(*nodes)])
    assert (found.error, found.orphans, found.counts[2]) == ("", 0, len(texts))
    assert sorted((text, parent or "") for _, text, parent in tree_of(database)) == sorted(
        (text, parent or "") for text, parent in texts
    )


def test_how_a_circle_is_opened_does_not_depend_on_the_hashing_of_texts() -> None:
    code = (
        "import io, sys, llmchat; answer = llmchat.ImportAnswer(llmchat.ImportCount(), llmchat.ImportCount(), []);"
        "found = llmchat.read_archive(io.BytesIO(sys.stdin.buffer.read()), answer);"
        "print([(message.origin, message.parent) for _, message in found if message is not None])"
    )
    circle = chatgpt(*(node(f"n{one}", f"n{(one + 1) % 7}", [f"n{(one - 1) % 7}"], "user", "x") for one in range(7)))
    command = [sys.executable, "-c", code]
    outputs = [
        subprocess.run(
            command, input=json.dumps([circle]), cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for hash_seed in ("0", "1", "2")
    ]  # fmt: skip
    assert outputs[0].startswith("[('chatgpt:n0', None), ('chatgpt:n6', 'chatgpt:n0')") and len(set(outputs)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_links_in_circles_lose_nothing_and_come_in_once(database: sqlite3.Connection, seed: int) -> None:
    source = random.Random(seed)
    keys = [f"k{number}" for number in range(30)]
    parents = {key: source.choice([None, *keys, *keys]) for key in keys}
    nodes = [node(key, parents[key], source.sample(keys, 3), source.choice(["user", ""]), key) for key in keys]
    found = Import(database, [chatgpt(*nodes)])
    assert found.orphans == 0
    assert sorted(text for _, text, _ in tree_of(database)) == sorted(one["id"] for one in nodes if one["message"])
    ids = dict(database.execute("SELECT id, parent_id FROM message"))
    assert all(parent is None or parent < one for one, parent in ids.items()), "a parent comes first: no circle is left"


def test_a_message_in_very_many_parts_comes_in(database: sqlite3.Connection) -> None:
    content = {"content_type": "text", "parts": ["ab"] * 100_000}
    assert Import(database, [chatgpt(node("u", None, [], "user", content=content))]).counts == (1, 0, 1, 0)
    assert len(llmchat.load_message(database, "local", 1).text) == 299_999


def test_a_very_long_and_a_very_wide_tree_come_in(database: sqlite3.Connection) -> None:
    long = [
        node(f"n{number}", f"n{number - 1}" if number else None, [f"n{number + 1}"], "user", str(number))
        for number in range(4_000)
    ]
    wide = [node("r", None, [f"w{number}" for number in range(4_000)], "user", "Q")]
    wide += [node(f"w{number}", "r", [], "assistant", str(number)) for number in range(4_000)]
    hidden = [{**one, "message": None} if index % 2 else one for index, one in enumerate(long)]
    archive = [
        chatgpt(*tree, conversation_id=name) for name, tree in (("long", long), ("wide", wide), ("hidden", hidden))
    ]
    assert Import(database, archive).counts == (3, 0, 10_001, 0)
    assert len(llmchat.load_conversation(database, "local", 1).path) == 4_000
    assert len(llmchat.load_conversation(database, "local", 3).path) == 2_000


# ── Claude ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def claude(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    head = {"uuid": "c-1", "name": "With Claude", "summary": "", "created_at": "2025-01-02T03:04:05.678901Z"}
    head |= {"updated_at": "2025-01-02T03:05:00.000000+00:00", "account": {"uuid": "acc"}}
    return {**head, "chat_messages": list(messages), **more}


def said(key: str, sender: str, text: str, content: Any = None, **more: Any) -> dict[str, Any]:
    block = {"start_timestamp": None, "stop_timestamp": None, "type": "text", "text": text, "citations": []}
    at = "2025-01-02T03:04:06Z"
    shape = {"uuid": key, "text": text, "content": [block] if content is None else content, "sender": sender}
    return {**shape, "created_at": at, "updated_at": at, "attachments": [], "files": [], **more}


CLAUDE = claude(
    said("m1", "human", "Sum this up", attachments=[
        {"file_name": "a.txt", "file_size": 5, "file_type": "txt", "extracted_content": "One\nTwo"}],
        files=[{"file_name": "b.png"}]),
    said("m2", "assistant", "ignored when there are blocks", [
        {"type": "thinking", "thinking": "I look it up.", "summaries": [{"summary": "Looking"}], "cut_off": False},
        {"type": "text", "text": "Let me see. "},
        {"type": "tool_use", "id": "toolu_1", "name": "web_search", "input": {"query": "é"}, "message": "Searching"},
        {"type": "tool_result", "tool_use_id": "toolu_1", "name": "web_search", "content": [
            {"type": "knowledge", "title": "T"}, {"type": "text", "text": "found"}], "is_error": False},
        {"type": "token_budget"},
        {"type": "text", "text": "Here it is."}], stop_reason="end_turn"),
    said("m3", "human", "Thanks", []),
    said("m4", "assistant", "", [{"type": "flag", "flag": "x"}]),
    model="claude-sonnet-4-5",
)  # fmt: skip


def test_a_claude_export_comes_in_whole(database: sqlite3.Connection) -> None:
    found = Import(database, [CLAUDE])
    assert found.counts == (1, 0, 5, 0) and found.error == ""
    assert found.left_out == {
        "a file that is not in the export": 1, "content of the type 'flag'": 1, "a message without content": 1,
    }  # fmt: skip
    conversation = llmchat.load_conversation(database, "local", 1)
    assert (conversation.title, conversation.created_at_ms) == ("With Claude", 1_735_787_045_679)
    assert tree_of(database) == [
        ("user", "a.txt:\n\n```\nOne\nTwo\n```\n\nSum this up", None),
        ("assistant", "Let me see. ", "a.txt:\n\n```\nOne\nTwo\n```\n\nSum this up"),
        ("tool", "T\n\nfound", "Let me see. "),
        ("assistant", "Here it is.", "T\n\nfound"),
        ("user", "Thanks", "Here it is."),
    ]
    answer = conversation.messages[1]
    assert (answer.provider, answer.model, answer.finish_reason) == ("anthropic", "claude-sonnet-4-5", "stop")
    assert [one.kind for one in answer.content] == ["reasoning", "text", "tool_call"]
    assert json.loads(answer.content[2].text) == {"id": "toolu_1", "name": "web_search", "arguments": '{"query": "é"}'}
    assert Import(database, [CLAUDE]).counts == (0, 1, 0, 5)


def test_messages_of_claude_that_say_whom_they_follow_are_a_tree(database: sqlite3.Connection) -> None:
    root = "00000000-0000-4000-8000-000000000000"
    messages = [
        said("m1", "human", "Q", parent_message_uuid=root), said("m2", "assistant", "A", parent_message_uuid="m1"),
        said("m3", "assistant", "B", parent_message_uuid="m1"), said("m4", "human", "C", parent_message_uuid="m2"),
    ]  # fmt: skip
    Import(database, claude(*messages, current_leaf_message_uuid="m3"))
    assert {(text, parent) for _, text, parent in tree_of(database)} == {
        ("Q", None),
        ("A", "Q"),
        ("B", "Q"),
        ("C", "A"),
    }
    assert path_of(database) == ["Q", "B"]


def test_conversations_and_messages_of_claude_without_ids_are_known_when_they_come_again(
    database: sqlite3.Connection,
) -> None:
    said_twice = [said("m1", "human", "Q"), said("m1", "assistant", "A"), said("", "human", "More")]
    several = [claude(*said_twice, uuid=None, created_at=f"2025-01-0{day}T00:00:00Z") for day in (1, 2)]
    assert Import(database, several).counts == (2, 0, 6, 0)
    assert path_of(database) == ["Q", "A", "More"]
    assert Import(database, several).counts == (0, 2, 0, 6)


# ── hostile ─────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_VALUES: list[Any] = [
    None,
    7,
    -1.5,
    True,
    "text",
    [],
    {},
    [[]],
    {"a": {}},
    "\ud800\0",
    1e308,
    10**100,
    [None],
    "2025-99-99T",
]


def replaced(source: random.Random, value: Any, depth: int = 0) -> Any:
    """The value with something in it replaced by something of another type."""
    if depth > 0 and source.random() < 0.15:
        return source.choice(BAD_VALUES)
    if isinstance(value, dict):
        return {name: replaced(source, below, depth + 1) for name, below in value.items()}
    if isinstance(value, list):
        return [replaced(source, below, depth + 1) for below in value]
    return value


@pytest.mark.parametrize("shape", ["chatgpt", "claude", "ours"])
def test_wrong_types_anywhere_never_break_an_import_and_never_take_the_next_conversation_along(
    database: sqlite3.Connection, shape: str
) -> None:
    whole: Any = {"chatgpt": [WHOLE], "claude": [CLAUDE], "ours": some_archive(1)}[shape]
    good = chatgpt(node("u", None, [], "user", "Good"), title="Good")
    for seed in range(150):
        source = random.Random(seed)
        bad = replaced(source, whole)
        conversations = bad if isinstance(bad, list) else bad.get("conversations")
        conversations = conversations if isinstance(conversations, list) else [conversations]
        good["conversation_id"] = f"good-{seed}"
        found = Import(database, {"conversations": [*conversations, good]})
        assert found.error == "", seed
        assert (
            database.execute(
                "SELECT count(*) FROM conversation WHERE origin = ?", (f"chatgpt:good-{seed}",)
            ).fetchone()[0]
            == 1
        )
    for (conversation_id,) in database.execute("SELECT id FROM conversation").fetchall():
        llmchat.load_conversation(database, "local", conversation_id)
        conversation, path, others = llmchat.load_outline(database, "local", conversation_id)
        llmchat.markdown_head(conversation, len(path), others)
        for message_id in path:
            llmchat.markdown_message(llmchat.load_message(database, "local", message_id))
            llmchat.select_path(database, message_id) if message_id == path[-1] else None
    json.dumps(export_of(database)).encode()
    assert [row[0] for row in database.execute("PRAGMA integrity_check")] == ["ok"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "body: cannot be imported: expected a JSON list or object, or a zip, at character 0, where it ends"),
        (b"   \n", "body: cannot be imported: expected a JSON list or object, or a zip, at character 4, where it ends"),
        (b"[", "expecting value at character 1, where it ends"),
        (b"[1 2]", "expected , at character 3"),
        (b"[1,]", "expecting value at character 3"),
        (b"[{}] x", "something follows the end at character 5"),
        (b'[{"mapping": {}', "expected , at character 15, where it ends"),
        (b'[{"a" 1}]', "expected : at character 6"),
        (b"[{a: 1}]", "expected a name in quotes at character 2"),
        (b'["\n"]', "invalid control character at at character 2"),
        (b'["\\x"]', "invalid \\escape at character 2"),
        (b"[" * 100_000, "nested too deep at character 1"),
        (b'[{"mapping":' * 50_000, "nested too deep"),
        (b'["\xff"]', "not UTF-8: invalid start byte at character 2"),
        ("\ufeff[1,'é\U0001f600".encode() + b"\xe4\xb8", "not UTF-8: unexpected end of data at character 6"),
        ('["x"]'.encode("utf-16"), "not UTF-8: invalid start byte at character 0"),
        (b"PK\x03\x04" + b"x" * 100, "body: is a zip that is broken, or has too many files in it"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused_with_the_place(server_of_module: Server, body: bytes, words: str) -> None:
    response = server_of_module.post("/api/v1/import", content=body, headers=JSON)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert words in message and message.endswith("; 0 conversations and 0 messages came in before"), message


@pytest.fixture(scope="module")
def server_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("import")) as server:
        yield server


def test_a_file_that_breaks_off_keeps_what_was_whole_says_so_and_goes_on_when_it_is_mended(server: Server) -> None:
    conversations = [
        chatgpt(node("u", None, [], "user", f"Question {number}"), conversation_id=f"c{number}")
        for number in range(250)
    ]
    data = json.dumps(conversations).encode()
    broken = data[: data.index(b"Question 200")]
    response = server.post("/api/v1/import", content=broken, headers=JSON)
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_request"
    message = response.json()["error"]["message"]
    assert message.endswith("200 conversations and 200 messages came in before") and "at character " in message, message
    assert server.rows("SELECT count(*) FROM conversation") == [(200,)]
    answer = server.post("/api/v1/import", content=data, headers=JSON).json()
    assert answer["conversations"] == {"imported": 50, "present": 200}


@pytest.mark.parametrize("seed", range(3))
def test_a_file_that_breaks_anywhere_and_comes_again_is_in_the_end_whole_and_nothing_twice(
    database: sqlite3.Connection, seed: int
) -> None:
    archive = some_archive(seed)
    data = json.dumps(archive, ensure_ascii=False).encode()
    source = random.Random(seed)
    for at in sorted(source.randrange(len(data)) for _ in range(12)):
        assert Import(database, data[:at]).error != ""
    assert Import(database, data).error == ""
    assert export_of(database) == archive


def test_every_way_to_cut_a_document_into_chunks_gives_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    document = {
        "a": [1, -2.5e10, 1234567890123456789, "12345678901234567890", 1.5, True, None, 'é中\U0001f600\\"\n'],
        "b": {"c": []},
        "d": "x" * 50,
        "e": 0.25,
    }
    data = json.dumps([document, 17, 1.25, "end"], ensure_ascii=False, indent=1).encode()
    for size in range(1, 40):
        window = llmchat.JsonWindow(iter([data[start : start + size] for start in range(0, len(data), size)]))
        assert [window.value() for _ in window.items()] == [document, 17, 1.25, "end"], size
        window = llmchat.JsonWindow(iter([data[start : start + size] for start in range(0, len(data), size)]))
        window.step("[")
        found = {}
        for name in window.members():
            found[name] = window.value()
        assert found == document, size


@pytest.mark.parametrize(
    "chunks", [("[1.", "25, 3e", "5]"), ("[1", ".25, 300000.", "0]"), ("[1.25", ",3", "e", "5", "]")]
)
def test_a_number_that_a_chunk_cuts_in_two_is_one_number(chunks: tuple[str, ...]) -> None:
    window = llmchat.JsonWindow(iter([chunk.encode() for chunk in chunks]))
    assert [window.value() for _ in window.items()] == [1.25, 300_000.0]


def test_an_error_at_the_beginning_of_a_long_file_is_told_without_reading_on() -> None:
    read = []

    def chunks() -> Iterator[bytes]:
        for number in range(1000):
            read.append(number)
            yield b'[{"a": oops, ' if number == 0 else b" " * 1000

    window = llmchat.JsonWindow(chunks())
    window.step("[")
    with pytest.raises(llmchat.InvalidRequest, match="expecting value at character 7"):
        window.value()
    assert len(read) < 10


def test_a_value_that_is_too_wide_is_refused_before_it_is_in_memory(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "ARCHIVE_VALUE_CHARACTERS_MAX", 2_000_000)
    good = json.dumps(chatgpt(node("u", None, [], "user", "Good")))
    read = 0

    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            nonlocal read
            read += 1
            return f'[{good},{{"mapping":"'.encode() if read == 2 else b"x" * size

        def seek(self, *_: int) -> int:
            return 0

    answer = llmchat.ImportAnswer(llmchat.ImportCount(), llmchat.ImportCount(), [])
    pieces = llmchat.read_archive(Endless(), answer)  # type: ignore[arg-type]
    assert next(pieces)[0].title == "A chat"
    next(pieces)
    with pytest.raises(llmchat.InvalidRequest, match="one value is longer than 2,000,000 characters"):
        next(pieces)
    assert read < 40


def test_lone_surrogates_and_nul_become_something_that_can_be_kept(database: sqlite3.Connection) -> None:
    data = b'[{"title":"\\ud800T\\u0000","conversation_id":"\\udc00",'
    data += b'"mapping":{"\\ud83d":{"message":{"author":{"role":"user"},'
    data += b'"content":{"content_type":"text","parts":["a\\u0000b\\ud83dc\\ud83d\\ude00"]}}}}}]'
    assert Import(database, data).counts == (1, 0, 1, 0) and Import(database, data).counts == (0, 1, 0, 1)
    assert tree_of(database) == [("user", "a\ufffdb\ufffdc\U0001f600", None)]
    assert llmchat.load_conversation(database, "local", 1).title == "\ufffdT\ufffd"


def test_reasons_are_bounded_however_many_there_are(database: sqlite3.Connection) -> None:
    bad = [chatgpt(node("u", None, [], f"robot {number}", "x"), conversation_id=str(number)) for number in range(300)]
    found = Import(database, bad)
    assert len(found.answer.left_out) == llmchat.LEFT_OUT_MAX + 1
    assert sum(found.left_out.values()) == 600 and llmchat.OTHER_REASONS in found.left_out


def test_ten_thousand_conversations_come_in_and_once_only(server: Server) -> None:
    conversations = [
        chatgpt(node("r", None, ["u"]), node("u", "r", ["a"], "user", f"Question {number}"),
                node("a", "u", [], "assistant", f"Answer {number}", metadata=GPT4), conversation_id=f"c{number}")
        for number in range(10_000)
    ]  # fmt: skip
    data = json.dumps(conversations).encode()
    for counts in ({"imported": 20_000, "present": 0}, {"imported": 0, "present": 20_000}):
        answer = server.post("/api/v1/import", content=data, headers=JSON, timeout=300)
        assert answer.status_code == 200 and answer.json()["messages"] == counts and answer.json()["left_out"] == []
    assert server.rows("SELECT count(*) FROM conversation") == [(10_000,)]
    assert server.get("/api/v1/conversations?query=Question+9999").json()["conversations"][0]["title"] == "A chat"


def test_while_a_big_file_comes_in_answers_stream_on(server: Server, provider: Provider) -> None:
    conversations = [
        chatgpt(node("u", None, [], "user", "word " * 2000), conversation_id=f"c{number}") for number in range(600)
    ]
    data = json.dumps(conversations).encode()
    sent: list[float] = []

    def body() -> Iterator[bytes]:
        for start in range(0, len(data), 65_536):
            sent.append(time.monotonic())
            yield data[start : start + 65_536]

    provider.script(openai_text(*(f"{number} " for number in range(200)), delay=0.005))
    with server.chat("Count") as stream:
        stream.take(2)
        response = server.client.post("/api/v1/import", content=body(), headers=JSON, timeout=120)
        ended = server.wait_ended(2, 60)
    assert response.json()["messages"] == {"imported": 600, "present": 0}
    assert ended["status"] == "completed" and ended["text"] == "".join(f"{number} " for number in range(200))


# ── the request ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_other_content_types_are_refused(server_of_module: Server) -> None:
    for content_type in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
        response = server_of_module.post("/api/v1/import", content=b"[]", headers={"content-type": content_type})
        assert (
            response.status_code == 400
            and "send application/json or application/zip" in response.json()["error"]["message"]
        )


def test_nothing_stays_of_a_body_that_does_not_arrive_and_the_next_import_works(server: Server, tmp_path: Path) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /api/v1/import HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Content-Length: 1000000\r\n\r\n[" + b" " * 100_000)
        wait_until(lambda: refused(server), "the import that is on its way")
        assert [name.name for name in tmp_path.iterdir() if not name.name.startswith("llmchat.db")] == []
    wait_until(lambda: not refused(server), "the end of the import that broke off")


def refused(server: Server) -> bool:
    response = server.post("/api/v1/import", content=b"[]", headers=JSON)
    assert response.status_code in (200, 503), response.text
    return response.status_code == 503


def test_a_body_beyond_the_limit_is_refused(
    server_of_module: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    monkeypatch.setattr(llmchat, "ARCHIVE_BYTES_MAX", 1000)

    async def scenario() -> None:
        config = llmchat.load_config({"LLMCHAT_DB": str(tmp_path / "llmchat.db")}, {})
        app = llmchat.create_app(config)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                response = await client.post("/api/v1/import", content=b"[" + b" " * 1000, headers=JSON)
                assert response.status_code == 413 and "larger than 1,000 bytes" in response.json()["error"]["message"]
                assert (
                    await client.post("/api/v1/import", content=b"[" + b" " * 990 + b"]", headers=JSON)
                ).status_code == 200

    asyncio.run(scenario())


# ── zips ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_zip_without_conversations_is_refused(database: sqlite3.Connection) -> None:
    assert Import(database, zip_of({"readme.txt": b"hi"})).error == "body: is a zip without a conversations.json in it"


def test_what_comes_out_of_a_zip_is_bounded_however_small_it_is(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "ARCHIVE_BYTES_MAX", 3_000_000)
    good = json.dumps(chatgpt(node("u", None, [], "user", "Good")))
    found = Import(database, zip_of({"conversations.json": f"[{good},".encode() + b" " * 50_000_000 + b"1]"}))
    assert found.error == "body: what comes out of the zip has more than 3,000,000 bytes, the limit"


def test_a_zip_that_says_less_than_it_holds_is_read_no_further(database: sqlite3.Connection) -> None:
    data = bytearray(zip_of({"conversations.json": json.dumps([WHOLE]).encode() + b" " * 50_000_000}))
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(mark) + place
        data[at : at + 4] = (100).to_bytes(4, "little")
    found = Import(database, bytes(data))
    assert found.error.startswith("body: is a zip that cannot be read: Bad CRC-32") and found.counts == (0, 0, 0, 0)


def test_an_image_that_is_pointed_to_again_and_again_counts_every_time(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "ARCHIVE_BYTES_MAX", 3_000_000)
    parts = {"content_type": "multimodal_text", "parts": [image_part("file-service://file-A")] * 100}
    many = json.dumps([chatgpt(node("u", None, [], "user", content=parts))]).encode()
    found = Import(database, zip_of({"conversations.json": many, "file-A.png": PNG + b"\0" * 500_000}))
    assert "has more than 3,000,000 bytes" in found.error


def test_images_that_are_too_big_or_none_are_left_out_and_not_even_read(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "ARCHIVE_BYTES_MAX", 5_000_000)
    parts = [image_part(f"file-service://file-{name}") for name in ("Big", "Text", "../../etc/passwd", "")]
    body = json.dumps(
        [chatgpt(node("u", None, [], "user", content={"content_type": "multimodal_text", "parts": ["Look", *parts]}))]
    )
    files = {
        "conversations.json": body.encode(),
        "file-Big.png": PNG + b"\0" * llmchat.IMAGE_BYTES_MAX,
        "file-Text.png": b"hello",
    }
    found = Import(database, zip_of(files))
    assert found.left_out == {"an image that is not in the file": 4} and tree_of(database) == [("user", "Look", None)]


def break_zip(kind: str) -> bytes:
    data = bytearray(zip_of({"conversations.json": json.dumps([WHOLE]).encode() * 1}))
    if kind == "truncated":
        return bytes(data[: len(data) // 2])
    if kind == "checksum":
        at = data.index(b"PK\x01\x02") + 16
        data[at : at + 4] = b"\1\2\3\4"
    elif kind == "password":
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            data[data.index(mark) + place] |= 1
    elif kind == "method":
        for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            data[data.index(mark) + place] = 97
    elif kind == "stream":
        at = data.index(b"conversations.json") + 18
        data[at + 10 : at + 60] = b"\xff" * 50
    elif kind == "entries":
        at = data.rindex(b"PK\x05\x06") + 12
        data[at : at + 4] = (llmchat.ARCHIVE_ENTRIES_BYTES_MAX + 1).to_bytes(4, "little")
    elif kind == "zip64":
        at = data.rindex(b"PK\x05\x06")
        data[at:at] = b"PK\x06\x07" + b"\0" * 16
    return bytes(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_can_only_be_undone_all_at_once_is_refused(
    database: sqlite3.Connection, method: int
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("conversations.json", json.dumps([WHOLE]))
    found = Import(database, buffer.getvalue())
    assert found.error == "body: is a zip that cannot be read: its files are neither stored nor deflated"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "is broken, or has too many files in it"),
        ("checksum", "cannot be read: Bad CRC-32"),
        ("password", "cannot be read: File 'conversations.json' is encrypted, password required"),
        ("method", "cannot be read: its files are neither stored nor deflated"),
        ("stream", "cannot be read: Error -3 while decompressing data"),
        ("entries", "is broken, or has too many files in it"),
        ("zip64", "is broken, or has too many files in it"),
    ],
)
def test_a_zip_that_cannot_be_read_is_refused(database: sqlite3.Connection, kind: str, words: str) -> None:
    assert Import(database, break_zip("whole")).error == ""
    found = Import(database, break_zip(kind))
    assert found.error.startswith(f"body: is a zip that {words}"), found.error


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def memory_bytes(server: Server) -> int:
    """What the process has had at most so far."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux's")
def test_the_memory_of_an_import_and_of_an_export_does_not_grow_with_the_file(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "big.json"
    text = "An answer of some length. " * 40
    with file.open("w") as handle:
        handle.write("[")
        for number in range(400):
            nodes = [
                node(f"n{n}", f"n{n - 1}" if n else None, [], "user" if n % 2 == 0 else "assistant", f"{n} {text}")
                for n in range(75)
            ]
            handle.write("," * bool(number) + json.dumps(chatgpt(*nodes, conversation_id=f"c{number}")))
        handle.write("]")
    assert file.stat().st_size > 40_000_000
    server.post("/api/v1/import", [WHOLE])
    server.get("/api/v1/export")
    before = memory_bytes(server)
    with file.open("rb") as handle:
        answer = server.post("/api/v1/import", content=handle, headers=JSON, timeout=600)
    assert answer.json()["messages"] == {"imported": 30_000, "present": 0}
    imported = memory_bytes(server)
    with server.client.stream("GET", "/api/v1/export", timeout=600) as response:
        size = sum(map(len, response.iter_raw()))
    assert size > 40_000_000
    exported = memory_bytes(server)
    figures = " ".join(f"{one / 1e6:.0f}" for one in (before, imported, exported))
    print(f"memory, MB: {figures} before, after the import, after the export")
    assert imported - before < 30_000_000 and exported - before < 40_000_000
