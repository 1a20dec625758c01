"""Conversations as files: complete as JSON, readable as Markdown, under a name that every system takes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sqlite3
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import llmchat
from llmchat import Delta, Message
from tests.conftest import Server
from tests.provider import (
    Cut,
    Hang,
    Provider,
    anthropic_text,
    anthropic_thinking,
    openai_reasoning,
    openai_text,
    openai_tool_calls,
)

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # 1 × 1, PNG


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one conversation in which everything happens: reasoning, tools, images, branches, every end."""
    with Provider() as provider:
        provider.script(
            [*openai_reasoning("Let me ", "think."), *openai_text("Paris, ", "é中\U0001f600")],
            openai_text("Lyon?"),
            openai_tool_calls(("call_1", "weather", '{"city": "Paris"}'), ("call_2", "time", "{}")),
            openai_text("It rains."),
            [*openai_text("```python\nprint(1", finish=None, usage=None, done=False), Cut()],
            [*openai_text("I was stopp", finish=None, usage=None, done=False), Hang()],
            [*anthropic_thinking("Hm."), *anthropic_text("Signed.", index=1)],
            openai_text("Cut off", finish="length"),
        )
        settings = {"OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": "sk-secret-1", "OPENAI_MODELS": "m,n"}
        settings |= {"ANTHROPIC_BASE_URL": provider.base_url, "ANTHROPIC_API_KEY": "sk-secret-2"}
        server = Server(tmp_path_factory.mktemp("rich"), **settings, LLMCHAT_ATTEMPTS="1")
        try:
            make_rich(server)
            yield server
        finally:
            server.close()


def make_rich(server: Server) -> None:
    def ask(message: Any, **more: Any) -> dict[str, Any]:
        response = server.post("/api/v1/chat", {"message": message, "stream": False, **more})
        found = response.json()
        return server.message(found["message_id"] if "error" in found and "message_id" in found else found["id"])

    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    first = ask("# Capital?\nof France", system="Be brief.\nAlways.", temperature=0.5)
    server.post(f"/api/v1/messages/{first['id']}/regenerate", {"model": "openai/n", "stream": False})
    image = {"type": "image", "data": PIXEL, "media_type": "image/png"}
    calls = ask([{"type": "text", "text": "And here?"}, image], conversation_id=1, parent_id=first["id"], tools=[tool])
    results = [
        {"type": "tool_result", "tool_call_id": f"call_{number}", "text": f"result {number}"} for number in (1, 2)
    ]
    ask(results, conversation_id=1, parent_id=calls["id"])
    ask("Code", conversation_id=1)
    stopped = server.start_chat("Stop", conversation_id=1)
    with server.resume(stopped) as stream:
        stream.take(2)
        server.post(f"/api/v1/messages/{stopped}/stop")
    ask("Sign", conversation_id=1, model="anthropic/claude")
    ask("Go on", conversation_id=1)
    server.client.patch("/api/v1/conversations/1", json={"title": "Ünïted: a/b?\n<c>", "max_tokens": 77})


def exported(server: Server, path: str = "/api/v1/conversations/1/export") -> dict[str, Any]:
    response = server.get(path)
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    return response.json()


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_holds_everything_that_the_conversation_does(rich: Server) -> None:
    archive = exported(rich)
    assert (archive["format"], archive["version"], len(archive["conversations"])) == ("llmchat", 1, 1)
    (conversation,) = archive["conversations"]
    shown = rich.get("/api/v1/conversations/1").json()
    assert {
        name: conversation[name] for name in ("title", "system", "parameters", "created_at_ms", "updated_at_ms")
    } == {name: shown[name] for name in ("title", "system", "parameters", "created_at_ms", "updated_at_ms")}
    origins = {f"llmchat:{one['id']}-{one['created_at_ms']}": one["id"] for one in shown["messages"]}
    assert [origins[one["origin"]] for one in conversation["messages"]] == [one["id"] for one in shown["messages"]]
    for archived, message in zip(conversation["messages"], shown["messages"], strict=True):
        assert origins.get(archived["parent"]) == message["parent_id"]
        same = (
            "role",
            "status",
            "provider",
            "model",
            "content",
            "finish_reason",
            "error",
            "usage",
            "attempts",
            "created_at_ms",
        )
        assert {name: archived[name] for name in same} == {name: message[name] for name in same}
        assert archived["ended_at_ms"] - archived["created_at_ms"] == message["timing"]["total_ms"]
        first_text_ms = message["timing"]["first_text_ms"]
        first_text_at_ms = None if first_text_ms is None else archived["created_at_ms"] + first_text_ms
        assert archived["first_text_at_ms"] == first_text_at_ms
    kinds = {delta["kind"] for one in conversation["messages"] for delta in one["content"]}
    assert kinds == {"text", "reasoning", "tool_call", "image", "signature"}
    assert {one["status"] for one in conversation["messages"]} == {"completed", "stopped", "failed"}
    tools = [one for one in conversation["messages"] if one["role"] == "tool"]
    assert [one["params"] for one in tools] == [{"tool_call_id": "call_1"}, {"tool_call_id": "call_2"}]
    assert conversation["messages"][1]["params"]["temperature"] == 0.5


def test_json_is_what_the_openapi_document_says(rich: Server) -> None:
    conversation = exported(rich)["conversations"][0]
    assert llmchat.msgspec.convert(exported(rich), llmchat.Archive).conversations[0].origin == conversation["origin"]
    document = rich.get("/openapi.json").json()
    assert "application/json" in document["paths"]["/api/v1/export"]["get"]["responses"]["200"]["content"]
    both = document["paths"]["/api/v1/conversations/{id}/export"]["get"]["responses"]["200"]["content"]
    assert set(both) == {"application/json", "text/markdown"}
    assert set(document["paths"]["/api/v1/import"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "application/zip",
    }


def test_no_export_holds_a_key(rich: Server) -> None:
    for path in ("/api/v1/export", "/api/v1/conversations/1/export", "/api/v1/conversations/1/export?format=markdown"):
        assert "sk-secret" not in rich.get(path).text


def test_all_conversations_are_one_document_in_the_order_of_their_making(server: Server) -> None:
    assert exported(server, "/api/v1/export") == {"format": "llmchat", "version": 1, "conversations": []}
    for number in range(3):
        server.wait_ended(server.start_chat(f"Question {number}"))
    archive = exported(server, "/api/v1/export")
    assert [one["title"] for one in archive["conversations"]] == ["Question 0", "Question 1", "Question 2"]
    assert archive["conversations"][1:2] == exported(server, "/api/v1/conversations/2/export")["conversations"]


def test_a_running_answer_is_exported_as_far_as_it_is(server: Server, provider: Provider) -> None:
    provider.script([*openai_text("So far", finish=None, usage=None, done=False), Hang()])
    with server.chat("Go") as stream:
        stream.take(2)
        message = exported(server)["conversations"][0]["messages"][1]
        server.post("/api/v1/messages/2/stop")
    assert (message["status"], message["content"], message["ended_at_ms"]) == (
        "running",
        [{"kind": "text", "text": "So far"}],
        None,
    )


def test_a_long_export_comes_in_pages_and_an_id_between_them_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "llmchat.db")
    llmchat.prepare_database(path, suspect=False)
    with contextlib.closing(llmchat.connect(path, read_only=False)) as connection:
        connection.execute(
            "INSERT INTO conversation (id, owner, title, created_at_ms, updated_at_ms) VALUES (1, 'local', 't', 1, 1)"
        )
        ids = [llmchat.insert_message(connection, 1, None, "user", "completed", 5) for _ in range(50)]
        monkeypatch.setattr(llmchat, "SEND_BYTES_MAX", 1000)
        pages, after = [], 0
        while after is not None:
            page, after = llmchat.archive_page(connection, "local", 1, after)
            pages.append(page)
        found = json.loads(b"".join(pages))["messages"]
        assert len(pages) > 10 and max(map(len, pages)) < 2000
        assert [one["origin"] for one in found] == [f"llmchat:{one}-5" for one in ids]
        with pytest.raises(llmchat.NotFound):
            llmchat.archive_page(connection, "somebody else", 1, 0)


def test_conversations_that_are_deleted_during_an_export_are_simply_not_in_it(server: Server) -> None:
    with contextlib.closing(sqlite3.connect(server.db, timeout=10)) as connection:
        for number in range(1, 41):
            connection.execute(
                "INSERT INTO conversation (id, owner, title, created_at_ms, updated_at_ms) VALUES (?, 'local', 't', 1, 1)",
                (number,),
            )
            for _ in range(2):  # each of them more than a page
                last = llmchat.insert_message(connection, number, None, "user", "completed", 1)
                rows = [(last, 10_000 * row, "text", "x" * 10_000) for row in range(30)]
                connection.executemany("INSERT INTO delta (message_id, offset, kind, text) VALUES (?, ?, ?, ?)", rows)
        connection.commit()
    with server.client.stream("GET", "/api/v1/export") as response:
        body = response.iter_raw(100_000)
        held = next(body)
        for number in range(30, 41):
            assert server.client.delete(f"/api/v1/conversations/{number}").status_code == 200
        archive = json.loads(held + b"".join(body))
    assert [len(one["messages"]) for one in archive["conversations"]][:20] == [2] * 20
    assert len(archive["conversations"]) < 40 or not archive["conversations"][-1]["messages"]


def test_a_conversation_that_is_gone_when_its_turn_comes_leaves_a_whole_document() -> None:
    class Deleting:
        """A store in which the second of three conversations is deleted between two reads."""

        async def read(self, operation: Any, owner: str, conversation_id: int, after: int) -> Any:
            assert operation is llmchat.archive_page
            if conversation_id == 2:
                raise llmchat.NotFound("gone")
            return b'{"origin":"%d","messages":[]}' % conversation_id, None

    async def whole() -> bytes:
        return b"".join([data async for data in llmchat.archive_pieces(Deleting(), "local", [1, 2, 3])])  # type: ignore[arg-type]

    assert [one["origin"] for one in json.loads(asyncio.run(whole()))["conversations"]] == ["1", "3"]


def test_a_download_that_nobody_wants_is_not_made() -> None:
    """HEAD, and a client that has gone."""
    made, closed, sent = [], [], []

    async def frames() -> AsyncGenerator[bytes, None]:
        for number in range(100):
            made.append(number)
            yield b"x"
            await asyncio.sleep(0)

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def stays() -> dict[str, str]:
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    for method, receive in (("HEAD", stays), ("GET", gone)):
        made.clear()
        download = llmchat.Download(frames(), "text/plain", "x", close=lambda: closed.append(1))
        asyncio.run(download({"type": "http", "method": method}, receive, send))  # type: ignore[arg-type]
        assert len(made) < 5
    assert closed == [1, 1]


def test_many_exports_at_once_are_all_whole(rich: Server) -> None:
    expected = exported(rich)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(exported(rich))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 6


# ── Markdown ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_markdown_reads_from_top_to_bottom_with_models_and_dates(rich: Server) -> None:
    response = rich.get("/api/v1/conversations/1/export?format=markdown")
    assert response.headers["content-type"] == "text/markdown; charset=utf-8"
    text = response.text
    assert text.startswith("# Ünïted: a/b? <c>\n\n*15 messages, 20")
    assert "*Not here: messages in other branches (1). The export as JSON has them all.*" in text
    assert "**System prompt**\n\n> Be brief.\n> Always.\n" in text
    when = r"20\d\d-\d\d-\d\d \d\d:\d\d UTC"
    headings = re.findall(rf"^## (.*), {when}$", text, re.MULTILINE)
    assert headings == [
        "User", "Assistant (openai/m)", "User", "Assistant (openai/m)", "Tool", "Tool", "Assistant (openai/m)",
        "User", "Assistant (openai/m)", "User", "Assistant (openai/m)", "User", "Assistant (anthropic/claude)",
        "User", "Assistant (openai/m)",
    ]  # fmt: skip
    assert "> *Reasoning:* Let me think.\n\nParis, é中\U0001f600\n" in text
    assert 'Tool call `weather`:\n\n```json\n{"city": "Paris"}\n```' in text
    assert "*Image (image/png, " in text and PIXEL not in text
    assert "Lyon?" not in text, "another branch"
    assert "```python\nprint(1\n```\n\n*failed: " in text
    assert "I was stopp\n\n*stopped*\n" in text
    assert "c2lnbmF0dXJl" not in text and "> *Reasoning:* Hm.\n\nSigned.\n" in text
    assert text.endswith("Cut off\n\n*cut off: length*\n")


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("plain", "plain"),
        ("```\ncode\n```", "```\ncode\n```"),
        ("```\ncode", "```\ncode\n```"),
        ("~~~~ py\ncode\n~~~", "~~~~ py\ncode\n~~~\n~~~~"),
        ("```\n~~~\n```", "```\n~~~\n```"),
        ("```` \n```\ncode", "```` \n```\ncode\n````"),
        ("``` a`b", "``` a`b"),
        ("   ```\nx\n   `````", "   ```\nx\n   `````"),
        ("    ```\nx", "    ```\nx"),
    ],
)
def test_an_open_code_block_does_not_take_in_what_follows(text: str, closed: str) -> None:
    assert llmchat.markdown_delta(Delta("text", text)) == closed


def test_a_fence_is_longer_than_every_run_of_backticks_in_it() -> None:
    call = json.dumps({"id": "1", "name": "run", "arguments": '{"code": "````"}'})
    assert llmchat.markdown_delta(Delta("tool_call", call)).count("`````") == 2


def test_a_message_without_any_content_is_still_a_heading_with_its_end() -> None:
    message = Message(
        1, 1, None, "assistant", "interrupted", None, None, "", [], None, None, None, llmchat.NO_TIMING, [], 0
    )
    assert llmchat.markdown_message(message) == "\n## Assistant, 1970-01-01 00:00 UTC\n\n*interrupted*\n"


# ── names, and what is refused ──────────────────────────────────────────────────────────────────────────────────────


def test_the_file_is_named_after_the_title_for_old_and_new_clients(rich: Server) -> None:
    for form, ending in (("json", "json"), ("markdown", "md")):
        header = rich.get(f"/api/v1/conversations/1/export?format={form}").headers["content-disposition"]
        match = re.fullmatch(r"attachment; filename=\"([ -~]*)\"; filename\*=UTF-8''(\S+)", header)
        assert match and match[1] == f"_n_ted- a-b- -c-.{ending}" and unquote(match[2]) == f"Ünïted- a-b- -c-.{ending}"


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Plain title", "Plain title"),
        ("../../etc/passwd", "-..-etc-passwd"),
        ("a\r\nSet-Cookie: x=1", "a Set-Cookie- x=1"),
        ('quo"te\\', "quo-te-"),
        ("CON", "_CON"),
        ("nul.txt", "_nul.txt"),
        ("...", "conversation 7"),
        ("  \u202e\u200b ", "conversation 7"),
        ("", "conversation 7"),
        ("x" * 300, "x" * 80),
        ("trailing. ", "trailing"),
    ],
)
def test_a_file_name_is_safe_whatever_the_title_is(title: str, name: str) -> None:
    assert llmchat.safe_file_name(title, "conversation 7") == name
    header = llmchat.attachment(f"{name}.md")
    assert header.isascii()
    assert not re.search(r"[\r\n]", header) and header.count('"') == 2


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        (
            "/api/v1/conversations/1/export?format=pdf",
            400,
            'format: expected json | markdown, got "pdf"',
        ),
        ("/api/v1/conversations/99/export", 404, "there is no conversation 99"),
        ("/api/v1/conversations/99/export?format=markdown", 404, "there is no conversation 99"),
        ("/api/v1/conversations/x/export", 404, "there is no conversation 'x'"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_a_byte_is_sent(
    rich: Server, path: str, status: int, words: str
) -> None:
    response = rich.get(path)
    assert response.status_code == status and words in response.json()["error"]["message"]


def test_head_answers_at_once_with_the_headers_alone(rich: Server) -> None:
    response = rich.client.head("/api/v1/export")
    assert response.status_code == 200 and response.content == b""
    assert response.headers["content-disposition"].startswith("attachment; ")
