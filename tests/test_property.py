"""Whatever clients do: what they hold is a beginning of what is stored, at every event, and all of it at the end.

LLMCHAT_TEST_EXAMPLES=1000 python -m pytest tests/test_property.py runs more than the few dozen of every day.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as some

from tests.client import Event, EventStream, Reader
from tests.conftest import stored_content, wait_until
from tests.guarantees import Tuned, texts, varied_text
from tests.provider import (
    HARD_PIECES,
    Cut,
    Hang,
    Pause,
    Provider,
    Step,
    Steps,
    openai_end,
    openai_error_event,
    openai_reasoning,
)

EXAMPLES = int(os.environ.get("LLMCHAT_TEST_EXAMPLES", "30"))


@dataclass(frozen=True)
class Piece:
    """A delta of the provider: its kind, its hard beginning, how much filler follows, and a pause in ms before it."""

    kind: Literal["text", "reasoning"]
    start: str
    filler: int
    pause_ms: int


@dataclass(frozen=True)
class Client:
    """One subscriber: where it begins (per cent of what is there), after how many events it is cut, how it reads."""

    begins_at: int
    cuts: tuple[int, ...]
    pace: Literal["fast", "slow", "stalled"]
    is_polite: bool
    cursor_in: Literal["header", "query"]


hard_texts = some.one_of(some.sampled_from(HARD_PIECES), some.text(min_size=1, max_size=8))
pieces = some.builds(
    Piece, some.sampled_from(["text", "text", "reasoning"]), hard_texts, some.integers(0, 2500), some.integers(0, 3)
)
answers = some.builds(
    lambda pieces, times: pieces * times, some.lists(pieces, min_size=1, max_size=20), some.sampled_from([1, 2, 5])
)
clients = some.builds(
    Client,
    some.sampled_from([0, 0, 30, 99, 100]),
    some.lists(some.integers(1, 12), max_size=4).map(tuple),
    some.sampled_from(["fast", "slow", "stalled"]),
    some.booleans(),
    some.sampled_from(["header", "query"]),
)
endings = some.sampled_from(["completed", "completed", "failed", "cut", "stopped"])


@pytest.fixture(scope="module")
def server(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    """Rings of four events, queues of three, sockets that hold little: everyone lags who does not read at once."""
    tuned = Tuned(
        tmp_path_factory.mktemp("property"), shared_provider, send_bytes=2048, constants={"QUEUE_EVENTS_MAX": 3},
        LLMCHAT_RING_EVENTS="4", LLMCHAT_FLUSH_INTERVAL_MS="1", LLMCHAT_HEARTBEAT_SECONDS="0.05",
        LLMCHAT_REPETITION_COUNT="0",
    )  # fmt: skip
    with tuned:
        yield tuned


def script_of(answer: list[Piece], ending: str) -> Steps:
    steps: list[Step] = []
    for number, piece in enumerate(answer):
        text = f"{piece.start}{varied_text(piece.filler, f'{number}.')}"
        send = texts([text]) if piece.kind == "text" else openai_reasoning(text)
        steps += [Pause(piece.pause_ms / 1000), *send]
    last: dict[str, Steps] = {
        "completed": openai_end(),
        "failed": openai_error_event("over"),
        "cut": [Cut()],
        "stopped": [Hang()],
    }
    return steps + last[ending]


class Run:
    """One generation and one of its clients, with a connection of its own to the database."""

    def __init__(self, server: Tuned, message_id: int, client: Client, all_sent: threading.Event) -> None:
        self.server, self.message_id, self.client, self.all_sent = server, message_id, client, all_sent
        self.reader = Reader()

    def __call__(self) -> str:
        """Lives the client's life; returns what it holds at its end."""
        path = f"file:{self.server.db}?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True, timeout=10)) as self.database:
            known = self.server.content(self.message_id)
            self.reader.content = known[: len(known) * self.client.begins_at // 100]
            self.reader.cursor = len(self.reader.content)
            for count in (*self.client.cuts, None):
                self.visit(count)
                if self.reader.end is not None:
                    break
        assert self.reader.end is not None and "reset" not in self.reader.names
        return self.reader.content

    def visit(self, count: int | None) -> None:
        """One connection, for so many events or to the end."""
        cursor, path = str(self.reader.cursor), f"/api/v1/messages/{self.message_id}/stream"
        headers = {"Last-Event-ID": cursor} if self.client.cursor_in == "header" else {}
        path += "" if headers else f"?after={cursor}"
        receive_bytes = None if self.client.pace == "fast" else 8192
        stream = EventStream(self.server.url, "GET", path, headers=headers, receive_bytes=receive_bytes)
        with stream:
            assert stream.status == 200, stream.error
            if self.client.pace == "stalled":
                self.all_sent.wait(20)
            for number, event in enumerate(stream.events(), 1):
                self.take(event)
                if number == count:
                    break
            else:
                assert stream.ended and self.reader.end is not None, "a stream ends with its end"
            if not self.client.is_polite:
                stream.reset()

    def take(self, event: Event) -> None:
        if event.id is not None:
            assert event.id <= self.stored_length(), "a client holds what the database does not"
        self.reader.take(event)
        if self.client.pace == "slow":
            time.sleep(0.002)

    def stored_length(self) -> int:
        return len(stored_content(self.database, self.message_id))


def check(server: Tuned, provider: Provider, answer: list[Piece], crowd: list[Client], ending: str) -> None:
    asked = len(provider.chats)
    provider.script(script_of(answer, ending))
    message_id = server.start_chat("Hello")
    all_sent = threading.Event()
    with ThreadPoolExecutor(len(crowd)) as threads:
        found = [threads.submit(Run(server, message_id, client, all_sent)) for client in crowd]
        try:
            expected = sum(len(piece.start) + piece.filler for piece in answer)
            if ending == "stopped":
                stop_somewhere(server, message_id, expected * 2 // 3)
            message = server.wait_ended(message_id)
        finally:
            all_sent.set()
        contents = [one.result() for one in found]
    stored = server.content(message_id)
    assert contents == [stored] * len(crowd)
    assert "".join(delta["text"] for delta in message["content"]) == stored
    assert message["status"] == {"cut": "failed"}.get(ending, ending)
    assert ending == "stopped" or len(stored) == expected
    assert len(provider.chats) == asked + 1


def stop_somewhere(server: Tuned, message_id: int, length: int) -> None:
    """Stops the generation once so much is stored."""
    wait_until(lambda: len(server.content(message_id)) >= length, f"{length} characters")
    server.post(f"/api/v1/messages/{message_id}/stop")


def test_every_client_holds_exactly_the_content_and_never_more_than_the_database(
    server: Tuned, provider: Provider
) -> None:
    phases = [Phase.explicit, Phase.generate, Phase.shrink]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, phases=phases)
    @given(answers, some.lists(clients, min_size=1, max_size=6), endings)
    def holds(answer: list[Piece], crowd: list[Client], ending: str) -> None:
        check(server, provider, answer, crowd, ending)

    holds()
    wait_until(lambda: server.get("/api/v1/health").json()["subscribers"] == 0, "the end of all streams")
    rows = server.rows("SELECT count(*), sum(length(text)) FROM delta")[0]
    print(f"{len(provider.chats)} answers, {rows[1]:,} characters in {rows[0]:,} rows, {server.lagged} times lagging")
    assert server.get("/api/v1/health").json()["running_generations"] == 0


def test_slow_readers_of_a_long_answer_lag_and_miss_nothing(server: Tuned, provider: Provider) -> None:
    before = server.lagged
    answer = [Piece("reasoning" if number % 7 == 0 else "text", f"{number} 日本 😀", 2000, 1) for number in range(120)]
    crowd = [
        Client(0, (), "stalled", True, "header"),
        Client(0, (3, 9, 1), "stalled", False, "query"),
        Client(0, (), "slow", True, "query"),
        Client(30, (2, 2, 2), "slow", False, "header"),
        Client(0, (5, 5, 5, 5), "fast", False, "header"),
    ]
    check(server, provider, answer, crowd, "completed")
    assert server.lagged >= before + 2, "those who did not read were not waited for"
