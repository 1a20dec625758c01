"""Shutdown: running answers may end, what does not is interrupted, everyone is told, the database is closed, exit 0."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import sqlite3
from collections.abc import Callable

import pytest

from tests.client import Reader
from tests.conftest import Server, wait_until
from tests.provider import Hang, Provider, openai_text, sse

BOTH_SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
Serve = Callable[..., Server]


def assert_closed(server: Server) -> None:
    """Exit status 0, nothing on the log that a shutdown should not have, and a database without leftovers."""
    assert server.process.wait(30) == 0
    server._reap()
    log = "".join(server.log)
    assert "Traceback" not in log and "error" not in log.replace("error=", ""), log
    assert not server.db.with_name("llmchat.db-wal").exists()
    with contextlib.closing(sqlite3.connect(server.db)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM message WHERE status = 'running'").fetchone() == (0,)


def wait_draining(server: Server) -> None:
    wait_until(lambda: server.get("/api/v1/health").json()["status"] == "draining", "the drain")


@BOTH_SIGNALS
def test_a_signal_to_an_idle_server_ends_it_with_0(server: Server, number: signal.Signals) -> None:
    server.chat("Hello").close()
    server.wait_ended(2)
    server.process.send_signal(number)
    assert_closed(server)


@BOTH_SIGNALS
def test_a_running_answer_may_end_while_the_server_drains(
    serve: Serve, provider: Provider, number: signal.Signals
) -> None:
    server = serve(LLMCHAT_DRAIN_SECONDS="60")
    provider.script([*openai_text("begun, ")[:-3], provider.gate("drain"), *openai_text("and ended")[1:]])
    reader = Reader()
    with server.chat("x") as stream:
        reader.read(stream, 2)
        server.process.send_signal(number)
        wait_draining(server)
        provider.open_gate("drain")
        reader.read(stream)
        assert stream.ended, "the response was whole"
    assert reader.content == "begun, and ended"
    assert reader.end is not None and reader.end["status"] == "completed"
    assert_closed(server)
    assert server.rows("SELECT status FROM message WHERE id = 2") == [("completed",)]
    assert server.content(2) == reader.content


def test_a_draining_server_refuses_new_chats_and_answers_the_rest(serve: Serve, provider: Provider) -> None:
    server = serve(LLMCHAT_DRAIN_SECONDS="60")
    provider.script([*openai_text("begun, ")[:-3], provider.gate("drain"), *openai_text("and ended")[1:]])
    message_id = server.start_chat("x")
    wait_until(lambda: server.message(message_id)["text"], "the first delta")
    server.process.send_signal(signal.SIGTERM)
    wait_draining(server)
    refused = server.post("/api/v1/chat", {"message": "one more"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.json()["error"]["retryable"] is True and int(refused.headers["retry-after"]) == 61
    health = server.get("/api/v1/health")
    assert (health.status_code, health.json()["status"], health.json()["running_generations"]) == (503, "draining", 1)
    assert [one["message_id"] for one in server.get("/api/v1/generations").json()["generations"]] == [message_id]
    assert server.get("/api/v1/conversations").status_code == 200
    reader = Reader()
    with server.resume(message_id) as stream:
        reader.read(stream, 2)
        provider.open_gate("drain")
        reader.read(stream)
    assert reader.content == "begun, and ended" and reader.end is not None
    assert_closed(server)
    assert server.rows("SELECT count(*) FROM conversation") == [(1,)]


@BOTH_SIGNALS
def test_what_does_not_end_in_time_is_interrupted_and_kept(
    serve: Serve, provider: Provider, number: signal.Signals
) -> None:
    server = serve(LLMCHAT_DRAIN_SECONDS="0.2")
    provider.script(*([*openai_text(f"kept {one}")[:-3], Hang()] for one in range(3)), [Hang()])
    readers = [Reader() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(server.chat("x")) for _ in readers]
        for reader, stream in zip(readers, streams, strict=True):
            reader.read(stream, 2)
        silent = server.start_chat("before its first delta")
        provider.wait_chats(4)
        server.process.send_signal(number)
        for reader, stream in zip(readers, streams, strict=True):
            reader.read(stream)
            assert stream.ended, "the response was whole"
    assert_closed(server)
    for reader, message_id in zip(readers, (2, 4, 6), strict=True):
        assert reader.content == server.content(message_id) and reader.content.startswith("kept ")
        assert reader.end is not None and (reader.end["status"], reader.end["error"]) == ("interrupted", None)
    assert server.rows("SELECT DISTINCT status FROM message WHERE role = 'assistant'") == [("interrupted",)]
    assert server.content(silent) == ""
    assert all(request.closed_at is not None for request in provider.chats)


def test_an_interrupted_answer_is_there_after_the_restart(serve: Serve, provider: Provider) -> None:
    server = serve(LLMCHAT_DRAIN_SECONDS="0")
    provider.script([*openai_text("kept")[:-3], Hang()])
    message_id = server.start_chat("x")
    wait_until(lambda: server.message(message_id)["text"] == "kept", "the first delta")
    assert server.terminate() == 0
    server.start()
    message = server.message(message_id)
    assert (message["status"], message["text"], message["error"]) == ("interrupted", "kept", None)
    assert "were interrupted" not in server.output[1], "the shutdown had ended it, not the start"
    reader = Reader()
    with server.resume(message_id) as stream:
        reader.read(stream)
    assert reader.content == "kept" and reader.end is not None and reader.end["status"] == "interrupted"


def test_a_chat_that_waits_for_its_whole_answer_is_told_of_the_interruption(serve: Serve, provider: Provider) -> None:
    server = serve(LLMCHAT_DRAIN_SECONDS="0")
    provider.script([*openai_text("partial")[:-3], Hang()])
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/api/v1/chat", b'{"message":"x","stream":false}', headers)
    wait_until(lambda: server.content(2) == "partial", "the first delta")
    server.process.send_signal(signal.SIGTERM)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 200 and b'"status":"interrupted"' in body and b'"text":"partial"' in body
    assert_closed(server)


def test_a_second_signal_exits_at_once(serve: Serve, provider: Provider) -> None:
    server = serve(LLMCHAT_DRAIN_SECONDS="3600")
    provider.script([*openai_text("kept")[:-3], Hang()])
    message_id = server.start_chat("x")
    wait_until(lambda: server.message(message_id)["text"] == "kept", "the first delta")
    server.process.send_signal(signal.SIGTERM)
    wait_draining(server)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 128 + signal.SIGINT
    server._reap()
    server.environment["LLMCHAT_DRAIN_SECONDS"] = "0"
    server.start()
    assert "1 answers were interrupted" in server.output[1] or "1 answer was interrupted" in server.output[1]
    assert (server.message(message_id)["status"], server.message(message_id)["text"]) == ("interrupted", "kept")


def test_a_reader_that_reads_nothing_does_not_hold_the_shutdown(serve: Serve, provider: Provider) -> None:
    server = serve(LLMCHAT_DRAIN_SECONDS="0", LLMCHAT_ANSWER_CHARACTERS_MAX="100000000", LLMCHAT_REPETITION_COUNT="0")
    pieces = [sse({"choices": [{"index": 0, "delta": {"content": f"{one:05}" * 20_000}}]}) for one in range(80)]
    provider.script([*pieces, Hang()])
    message_id = server.start_chat("x")
    stored = "SELECT sum(length(text)) FROM delta WHERE message_id = ?"
    wait_until(lambda: server.rows(stored, message_id) == [(8_000_000,)], "the answer", 60)
    with server.resume(message_id) as stalled, server.resume(message_id) as reading:
        next(iter(stalled.events()))
        reader = Reader()
        reader.read(reading, 2)
        server.process.send_signal(signal.SIGTERM)
        reader.read(reading)
        assert reader.end is not None and len(reader.content) == 8_000_000
        assert_closed(server)
    assert server.rows("SELECT status FROM message WHERE id = ?", message_id) == [("interrupted",)]


def test_idle_and_half_open_connections_do_not_hold_the_shutdown(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20)) for _ in range(3)]
        idle[1].sendall(b"GET /api/v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")  # kept alive
        answer = b""
        while not answer.endswith(b"}"):
            answer += idle[1].recv(65_536)
        assert answer.startswith(b"HTTP/1.1 200")
        idle[2].sendall(b"GET /api/v1/health HTTP/1.1\r\nHo")  # half a head
        assert server.get("/api/v1/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert_closed(server)
        assert [one.recv(65_536) for one in idle] == [b"", b"", b""]


def test_a_body_that_never_ends_does_not_hold_the_shutdown(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        lines = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(f"POST /api/v1/chat HTTP/1.1\r\n{lines}{{".encode())
        assert server.get("/api/v1/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert_closed(server)
    assert server.rows("SELECT count(*) FROM conversation") == [(0,)]


def test_a_signal_right_after_the_start_ends_it_orderly(serve: Serve) -> None:
    server = serve()
    server.process.send_signal(signal.SIGTERM)
    assert_closed(server)
