"""Many look on at one generation: nobody waits for who does not read, and all get exactly the content."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.client import EventStream
from tests.conftest import Server, wait_until
from tests.guarantees import (
    chat_to_the_gate,
    gate_numbers,
    gated,
    read_all,
    running_server,
    texts,
    varied_text,
)
from tests.provider import Hang, Provider, WaitFor, openai_end

READING, STALLED = 25, 25
ANSWER_CHARACTERS = 4_000_000  # some 7 MB in UTF-8
# A subscriber that does not keep up holds two copies of one send (ours and the transport's), each of at most 320 KiB:
# 50 of them make 33 MB, whatever the answer's length. What is on its way is another 10 MB, and malloc keeps some.
GROWTH_BYTES_MAX = 60_000_000


def memory_bytes(server: Server, field: str) -> int:
    """VmRSS, or VmHWM, its highest ever."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="ascii")
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match
    return int(match[1]) * 1024


def digest(stream: EventStream, whole: list[int] | None = None) -> tuple[str, int, Any]:
    """What a client gets: the checksum of its content, its length, and its `end`. The ids must be contiguous.

    Puts its length into `whole` once it holds everything, before the end has come.
    """
    checksum, length, end = hashlib.sha256(), 0, None
    with stream:
        for event in stream.events():
            if event.name == "delta":
                checksum.update(event.data["text"].encode())
                length += len(event.data["text"])
                assert event.id == length
                if whole is not None and length == ANSWER_CHARACTERS:
                    whole.append(length)
            end = event.data if event.name == "end" else end
    return checksum.hexdigest(), length, end


def stalled_stream(server: Server, path: str) -> EventStream:
    """A client that has the kernel take little, and does not read."""
    return EventStream(server.url, "GET", path, receive_bytes=4096, timeout=60)


def test_readers_get_everything_while_as_many_others_never_read(provider: Provider, tmp_path: Path) -> None:
    content = varied_text(ANSWER_CHARACTERS)
    expected = (hashlib.sha256(content.encode()).hexdigest(), len(content), "completed")
    pieces = [content[start : start + 400] for start in range(0, len(content), 400)]
    gates = [f"fan {next(gate_numbers)}" for _ in range(2)]
    asked = len(provider.chats)
    settings = {"LLMCHAT_ANSWER_CHARACTERS_MAX": "10000000"}
    with (
        running_server(tmp_path, provider, **settings) as server,
        ThreadPoolExecutor(READING) as threads,
        contextlib.ExitStack() as streams,
    ):
        server.wait_ended(server.start_chat("Hello", model="n"))  # what is loaded once is loaded
        provider.script([*texts([pieces[0]]), WaitFor(gates[0]), *texts(pieces[1:]), WaitFor(gates[1]), *openai_end()])
        message_id = server.start_chat("Hello")
        path = f"/api/v1/messages/{message_id}/stream"
        stalled = [streams.enter_context(stalled_stream(server, path)) for _ in range(STALLED)]
        reading = [streams.enter_context(EventStream(server.url, "GET", path, timeout=60)) for _ in range(READING)]
        before = memory_bytes(server, "VmRSS")
        whole: list[int] = []
        found = [threads.submit(digest, stream, whole) for stream in reading]
        provider.open_gate(gates[0])
        wait_until(lambda: len(whole) == READING, "everything at everyone who reads", 60)
        growth = memory_bytes(server, "VmHWM") - before
        provider.open_gate(gates[1])
        for one in found:
            checksum, length, end = one.result()
            assert (checksum, length, end["status"]) == expected
        assert server.get("/api/v1/health").json()["subscribers"] == STALLED, "half of them have read nothing"
        for checksum, length, end in threads.map(digest, stalled):
            assert (checksum, length, end["status"]) == expected
        late = memory_bytes(server, "VmHWM") - before
        print(f"memory: {before / 1e6:.1f} MB, {growth / 1e6:+.1f} with all content out, {late / 1e6:+.1f} at last")
        assert growth < GROWTH_BYTES_MAX and late < GROWTH_BYTES_MAX
        wait_until(lambda: server.get("/api/v1/health").json()["subscribers"] == 0, "the end of all streams")
    assert len(provider.chats) == asked + 2, "one for the warm-up, one for all fifty"


def test_fifty_get_the_same_bytes(provider: Provider, tmp_path: Path) -> None:
    with running_server(tmp_path, provider) as server, ThreadPoolExecutor(50) as threads:
        parts = [["first 日本 "], *[[f"part {number} 😀 "] for number in range(20)]]
        stream, reader, message_id, gates = chat_to_the_gate(server, provider, *parts)
        others = [server.resume(message_id) for _ in range(50)]
        found = threads.map(read_all, others)
        for gate in gates:
            provider.open_gate(gate)
        read_all(stream, reader)
        assert [one.content for one in found] == [reader.content] * 50
        assert reader.content == server.content(message_id) == "".join(map("".join, parts))


def test_a_shutdown_does_not_wait_for_clients_that_never_read(provider: Provider, tmp_path: Path) -> None:
    content = varied_text(2_000_000)
    pieces = [content[start : start + 1000] for start in range(0, len(content), 1000)]
    settings = {"LLMCHAT_ANSWER_CHARACTERS_MAX": "10000000"}
    with running_server(tmp_path, provider, **settings) as server, contextlib.ExitStack() as streams:
        gate = f"fan {next(gate_numbers)}"
        provider.script([WaitFor(gate), *texts(pieces), *openai_end()])
        message_id = server.start_chat("Hello")
        path = f"/api/v1/messages/{message_id}/stream"
        for _ in range(5):
            streams.enter_context(stalled_stream(server, path))
        provider.open_gate(gate)
        assert server.wait_ended(message_id)["status"] == "completed"
        assert server.get("/api/v1/health").json()["subscribers"] == 5
        assert server.terminate(30) == 0
        assert "Traceback" not in "".join(server.log)


# ── limits ──


@pytest.fixture(scope="module")
def small(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of three subscribers a message and two generations."""
    limits = {"LLMCHAT_SUBSCRIBERS_MAX": "3", "LLMCHAT_GENERATIONS_MAX": "2"}
    with running_server(tmp_path_factory.mktemp("small"), shared_provider, **limits) as running:
        yield running


@pytest.fixture
def stop_all(small: Server) -> Iterator[None]:
    yield
    for one in small.get("/api/v1/generations").json()["generations"]:
        small.post(f"/api/v1/messages/{one['message_id']}/stop")


def assert_overloaded(status: int, headers: Any, body: Any, words: str) -> None:
    error = body["error"]
    assert status == 503 and int(headers["retry-after"]) >= 1
    assert error["code"] == "overloaded" and error["retryable"] is True
    assert words in error["message"] and error["request_id"] == headers["x-request-id"]


@pytest.mark.usefixtures("stop_all")
def test_one_subscriber_too_many_is_refused_until_another_leaves(small: Server, provider: Provider) -> None:
    stream, reader, message_id, gates = chat_to_the_gate(small, provider, ["first "], ["last"])
    others = [small.resume(message_id) for _ in range(2)]
    for _ in range(3):
        with small.resume(message_id) as refused:
            assert_overloaded(refused.status, refused.headers, refused.error, "3 streams")
    others.pop().reset()

    def found_room() -> bool:
        with small.resume(message_id) as again:
            return again.status == 200

    wait_until(found_room, "room for another")
    provider.open_gate(gates[0])
    assert read_all(others[0]).content == read_all(stream, reader).content == "first last"


def long_answer(server: Server, provider: Provider) -> tuple[int, str]:
    """A finished message that no kernel takes whole for a client that does not read: its id and its content."""
    content = varied_text(900_000)
    provider.script([*texts([content[start : start + 9000] for start in range(0, len(content), 9000)]), *openai_end()])
    message_id = server.start_chat("Hello")
    assert server.wait_ended(message_id)["text"] == content
    return message_id, content


@pytest.mark.usefixtures("stop_all")
def test_the_limit_of_subscribers_holds_for_finished_messages_too(small: Server, provider: Provider) -> None:
    message_id, content = long_answer(small, provider)
    path = f"/api/v1/messages/{message_id}/stream"
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(stalled_stream(small, path))
        with small.resume(message_id) as refused:
            assert_overloaded(refused.status, refused.headers, refused.error, "3 streams")
    wait_until(lambda: small.get("/api/v1/health").json()["subscribers"] == 0, "the end of the streams")
    assert read_all(small.resume(message_id)).content == content


def count_rows(server: Server) -> list[int]:
    return [server.rows(f"SELECT count(*) FROM {table}")[0][0] for table in ("conversation", "message", "delta")]


def test_the_limit_of_subscribers_holds_for_requests_at_the_same_time(small: Server, provider: Provider) -> None:
    message_id, _ = long_answer(small, provider)
    path = f"/api/v1/messages/{message_id}/stream"
    together = threading.Barrier(24)

    def subscribe(_: int) -> EventStream:
        together.wait(10)
        return stalled_stream(small, path)

    with ThreadPoolExecutor(24) as threads, contextlib.ExitStack() as streams:
        found = [streams.enter_context(stream) for stream in threads.map(subscribe, range(24))]
        assert sorted(stream.status for stream in found) == [200] * 3 + [503] * 21
    wait_until(lambda: small.get("/api/v1/health").json()["subscribers"] == 0, "the end of the streams")


@pytest.mark.usefixtures("stop_all")
@pytest.mark.parametrize("how", [{"background": True}, {"stream": False}, {"stream": True}])
def test_one_generation_too_many_is_refused_and_leaves_nothing(
    small: Server, provider: Provider, how: dict[str, bool]
) -> None:
    gates = gated(provider, ["one"], ["never"]) + gated(provider, ["two"], ["never"])
    running = [small.start_chat("Hello") for _ in gates]
    wait_until(lambda: all(small.content(one) for one in running), "both to be on their way")
    before, asked = count_rows(small), len(provider.chats)
    response = small.post("/api/v1/chat", {"message": "Hello", **how})
    assert_overloaded(response.status_code, response.headers, response.json(), "2 generations")
    assert count_rows(small) == before and len(provider.chats) == asked
    small.post(f"/api/v1/messages/{running[0]}/stop")
    assert small.wait_ended(small.start_chat("Now there is room"))["status"] == "completed"


@pytest.mark.usefixtures("stop_all")
def test_the_limit_of_generations_holds_for_requests_at_the_same_time(small: Server, provider: Provider) -> None:
    provider.script(*[[Hang()]] * 12)
    before = count_rows(small)
    with ThreadPoolExecutor(12) as threads:
        body = {"message": "Hello", "background": True}
        statuses = sorted(
            response.status_code for response in threads.map(lambda _: small.post("/api/v1/chat", body), range(12))
        )
    assert statuses == [202] * 2 + [503] * 10
    assert count_rows(small) == [before[0] + 2, before[1] + 4, before[2] + 2]


def test_a_full_house_is_seen_in_the_lists_and_empties_again(small: Server, provider: Provider) -> None:
    gates = gated(provider, ["one"], ["end"]) + gated(provider, ["two"], ["end"])
    running = [small.start_chat("Hello") for _ in gates]
    listed = small.get("/api/v1/generations").json()["generations"]
    assert sorted(one["message_id"] for one in listed) == running
    assert small.get("/api/v1/health").json()["running_generations"] == 2
    provider.wait_at_gate(gates[0]), provider.wait_at_gate(gates[1])
    for gate in gates:
        provider.open_gate(gate)
    for message_id in running:
        assert small.wait_ended(message_id)["status"] == "completed"
    assert small.get("/api/v1/health").json()["running_generations"] == 0


def test_a_failing_start_does_not_eat_a_place(serve: Callable[..., Server], provider: Provider) -> None:
    """Twenty refused questions, then as many generations as ever."""
    server = serve(LLMCHAT_GENERATIONS_MAX="1")
    for _ in range(20):
        assert server.post("/api/v1/chat", {"message": "Hello", "conversation_id": 99}).status_code == 404
    assert server.wait_ended(server.start_chat("Hello"))["status"] == "completed"
