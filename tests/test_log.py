"""The log: one line at a generation's start and end, in text or JSON, with ids and never with content or keys."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from tests.client import Reader
from tests.conftest import Server, wait_until
from tests.provider import Cut, Provider, openai_error, openai_error_event, openai_reasoning, openai_text, page

Serve = Callable[..., Server]
KEY = "sk-live-5ecretKey0123456789"
QUESTION = "a question about Quetzalcoatl"
BROKEN = "UPDATE message SET usage_json = '[]' WHERE id = 2"  # what no request can make: JSON, and no usage
ANSWER = "an answer about Xochimilco"


def log_of(server: Server) -> str:
    """The whole log and output of a server that has ended."""
    server.close()
    return "".join(server.log + server.output)


def change(server: Server, sql: str) -> None:
    """What another program does to the database."""
    with contextlib.closing(sqlite3.connect(server.db, timeout=20)) as connection:
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(sql)
        connection.commit()


def lines_of(log: str, about: str) -> list[str]:
    return [line for line in log.splitlines() if about in line]


def test_a_generation_has_one_line_at_its_start_and_one_at_its_end(server: Server, provider: Provider) -> None:
    provider.script(openai_text(ANSWER, usage=(9, 3)))
    server.wait_ended(server.start_chat(QUESTION))
    with server.resume(2) as stream:
        Reader().read(stream)
    log = log_of(server)
    start, end = lines_of(log, "generation ")
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(rf"{time} info generation started message_id=2 model=openai/m.*", start)
    assert re.fullmatch(rf"{time} info generation ended message_id=2 model=openai/m status=completed .*", end)
    assert f"characters={len(ANSWER)}" in end and re.search(r"first_delta_ms=\d+ total_ms=\d+", end)


def test_a_failed_generation_has_its_code_in_its_last_line(server: Server, provider: Provider) -> None:
    provider.script([*openai_text("half")[:-3], Cut()])
    server.wait_ended(server.start_chat("x"))
    (end,) = lines_of(log_of(server), "generation ended")
    assert "status=failed code=provider_truncated" in end


def test_the_json_format_is_one_object_per_line_with_the_same_facts(serve: Serve, provider: Provider) -> None:
    server = serve(LLMCHAT_LOG_FORMAT="json")
    provider.script(openai_text(ANSWER))
    server.wait_ended(server.start_chat(QUESTION))
    server.close()
    lines: list[dict[str, Any]] = [json.loads(line) for line in server.log]
    start, end = (line for line in lines if line["message"].startswith("generation "))
    assert {name: start[name] for name in ("level", "message", "message_id", "model")} == {
        "level": "info", "message": "generation started", "message_id": 2, "model": "openai/m",
    }  # fmt: skip
    assert (end["message"], end["status"], end["characters"]) == ("generation ended", "completed", len(ANSWER))
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)


@pytest.mark.parametrize(("level", "count"), [("debug", 2), ("INFO", 2), ("warning", 0), ("error", 0)])
def test_the_level_says_what_is_logged(serve: Serve, level: str, count: int) -> None:
    server = serve(LLMCHAT_LOG_LEVEL=level)
    server.wait_ended(server.start_chat("x"))
    assert len(lines_of(log_of(server), "generation ")) == count


def test_requests_that_are_refused_are_no_lines(server: Server) -> None:
    server.post("/api/v1/chat", {"message": 5})
    server.get("/nope")
    assert log_of(server).count("\n") == 3, "the three lines of the start"


def test_an_error_of_our_own_is_logged_under_the_request_id_and_told_no_more(server: Server) -> None:
    server.post("/api/v1/chat", {"message": "x", "stream": False})
    change(server, BROKEN)
    response = server.get("/api/v1/messages/2", headers={"X-Request-ID": "find-me"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["request_id"]) == (500, "internal", "find-me")
    assert error["message"] == "an error of llmchat's own; its log says more under this request id"
    log = log_of(server)
    assert len(lines_of(log, "request_id=find-me")) == 1 and "Traceback" in log


def test_a_value_with_spaces_or_newlines_cannot_make_another_line(server: Server, provider: Provider) -> None:
    server.post("/api/v1/chat", {"message": "x", "stream": False})
    change(server, BROKEN)
    server.get("/api/v1/messages/2", headers={"X-Request-ID": "zz zz"})
    log = log_of(server)
    assert "zz" not in log and len(lines_of(log, "request broke")) == 1


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("level", ["debug", "info"])
def test_neither_content_nor_keys_are_ever_in_the_log(serve: Serve, provider: Provider, form: str, level: str) -> None:
    server = serve(LLMCHAT_LOG_FORMAT=form, LLMCHAT_LOG_LEVEL=level, LLMCHAT_ATTEMPTS="1", OPENAI_API_KEY=KEY)
    echo = f"Incorrect API key provided: {KEY} for {QUESTION}"
    provider.script(
        openai_text(ANSWER),
        openai_error(401, echo),
        openai_error(400, echo),
        openai_error(500, echo),
        page(502, f"<html><title>Bad</title><body>{echo}</body></html>"),
        page(200, f"<html><title>Sign in</title><body>{echo}</body></html>"),
        [*openai_text(ANSWER)[:-3], *openai_error_event(echo)],
        [*openai_reasoning(ANSWER), Cut()],
    )
    more = {"system": f"system {QUESTION}", "tools": [{"name": "Popocatepetl", "parameters": {}}]}
    for _ in range(8):
        server.wait_ended(server.start_chat(QUESTION, **more))
    server.get("/api/v1/help?refresh=1")
    server.post("/api/v1/chat", {"message": QUESTION, "zebra": QUESTION})
    server.client.patch("/api/v1/conversations/1", json={"title": QUESTION})
    stored = json.dumps(server.rows("SELECT * FROM message"))
    told = "".join(server.get(f"/api/v1/messages/{2 * one}").text for one in range(1, 9))
    log = log_of(server)
    assert len(lines_of(log, "generation ended")) == 8 and len(provider.chats) == 8
    for secret in (KEY, KEY[:12], KEY[-8:], "Quetzalcoatl", "Xochimilco", "Popocatepetl"):
        assert secret not in log
    assert KEY not in stored and KEY not in told and KEY.encode() not in server.db.read_bytes()


def test_a_key_in_the_help_and_in_every_error_is_nowhere(serve: Serve, provider: Provider) -> None:
    server = serve(OPENAI_API_KEY=KEY, LLMCHAT_ATTEMPTS="1")
    provider.script(openai_error(401, f"bad key {KEY}"))
    answer = server.post("/api/v1/chat", {"message": "x", "stream": False})
    help_text = server.get("/api/v1/help").text
    assert answer.json()["error"]["code"] == "provider_auth" and "bad key" in answer.text
    assert KEY not in answer.text and KEY not in help_text
    assert json.loads(help_text)["providers"][0]["key"] == "rejected"


def test_a_broken_generation_says_so_in_the_log_and_nothing_of_it_to_the_client(
    server: Server, provider: Provider
) -> None:
    provider.script([*openai_text("begun")[:-3], provider.gate("deleted"), *openai_text("x")[1:]])
    reader = Reader()
    with server.chat("x") as stream:
        reader.read(stream, 2)
        change(server, "DELETE FROM conversation")
        provider.open_gate("deleted")
        reader.read(stream)
    assert reader.end is not None and reader.end["error"] == {
        "code": "internal", "message": "the answer cannot be stored", "retryable": False,
    }  # fmt: skip
    wait_until(lambda: any("flush refused" in line for line in server.log), "the line of the refused flush")
