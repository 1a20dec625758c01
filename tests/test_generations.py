"""Generations under a failing database, and cut at every await: nothing is shown too early, lost, or left behind."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import llmchat
from tests.client import Reader, parse_event
from tests.conftest import settings_for, wait_until
from tests.guarantees import Tuned, chat_to_the_gate, gated, read_all, reader_at, texts
from tests.provider import Hang, Provider, Script, Send, openai_end, openai_text, page

PARTS = [["one "], ["two 日本 "], ["three"]]
WHOLE = "one two 日本 three"


@pytest.fixture(scope="module")
def server(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    """A server that waits a second for its database, not ten."""
    constants = {"FLUSH_PATIENCE_SECONDS": 1.0, "FLUSH_RETRY_SECONDS": 0.05, "DATABASE_BUSY_MS": 50}
    folder = tmp_path_factory.mktemp("generations")
    with Tuned(folder, shared_provider, constants=constants, LLMCHAT_HEARTBEAT_SECONDS="0.1") as tuned:
        yield tuned


@contextlib.contextmanager
def database_locked(server: Tuned) -> Iterator[None]:
    """Another program holds the database's write lock."""
    with contextlib.closing(sqlite3.connect(server.db, isolation_level=None, timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")


# ── a database that cannot be written ──


def test_nobody_sees_a_character_that_the_database_could_not_take(server: Tuned, provider: Provider) -> None:
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, *PARTS)
    with stream:
        with database_locked(server):
            provider.open_gate(gates[0])
            provider.wait_at_gate(gates[1])
            late = server.resume(message_id)
            for number, event in enumerate(stream.events()):
                assert event.name == "heartbeat", "nothing else while the database is locked"
                if number == 4:
                    break
        provider.open_gate(gates[1])
        read_all(stream, reader)
    assert reader.content == read_all(late).content == WHOLE == server.content(message_id)
    assert reader.end is not None and reader.end["status"] == "completed"


def test_a_database_that_stays_away_ends_generations_and_comes_back(server: Tuned, provider: Provider) -> None:
    before = server.rows("SELECT count(*) FROM message")[0][0]
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, *PARTS)
    with database_locked(server):
        provider.open_gate(gates[0])
        read_all(stream, reader)
        assert reader.end is not None and reader.end["status"] == "failed"
        assert reader.end["error"]["code"] == "store_unavailable" and reader.end["error"]["retryable"] is True
        assert reader.content == "one " == server.content(message_id)
        provider.chats[-1].wait_closed()
        again = read_all(server.resume(message_id))
        assert again.content == "one " and again.end == reader.end
        refused = server.post("/api/v1/chat", {"message": "Hello"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "store_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.get("/api/v1/health").status_code == 503
    message = server.wait_ended(message_id)
    assert message["status"] == "failed" and message["error"] == reader.end["error"]
    assert message["text"] == "one two 日本 ", "what had come from the provider is stored after all"
    rest = read_all(server.resume(message_id, reader.cursor), reader)
    assert rest.content == message["text"] and rest.names.count("end") == 2
    assert server.rows("SELECT count(*) FROM message")[0][0] == before + 2
    wait_until(lambda: server.get("/api/v1/health").status_code == 200, "the service's recovery")
    assert server.wait_ended(server.start_chat("Hello"))["status"] == "completed"


def test_a_whole_answer_that_cannot_be_stored_is_a_503(server: Tuned, provider: Provider) -> None:
    gates = gated(provider, ["one "], ["two"])
    asked = len(provider.chats)
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(1))
        waiting = threads.submit(server.post, "/api/v1/chat", {"message": "Hello", "stream": False})
        provider.wait_chats(asked + 1)
        provider.wait_at_gate(gates[0])
        message_id = server.rows("SELECT max(id) FROM message")[0][0]
        wait_until(lambda: server.content(message_id) == "one ", "a delta")
        with database_locked(server):
            provider.open_gate(gates[0])
            response = waiting.result(20)
    assert response.status_code == 503 and response.json()["error"]["code"] == "store_unavailable"
    assert server.wait_ended(response.json()["message_id"])["text"] == "one two"


def test_a_stop_while_the_database_is_locked_answers_when_it_is_durable(server: Tuned, provider: Provider) -> None:
    stream, reader, message_id, _ = chat_to_the_gate(server, provider, *PARTS)
    with ThreadPoolExecutor(1) as threads:
        with database_locked(server):
            stopped = threads.submit(server.post, f"/api/v1/messages/{message_id}/stop")
            provider.chats[-1].wait_closed()
            time.sleep(0.2)  # time for what must not happen
            assert not stopped.done() and server.rows("SELECT status FROM message WHERE id = ?", message_id) == [
                ("running",)
            ]
        assert stopped.result(20).json() == {"message_id": message_id, "status": "stopped"}
    assert read_all(stream, reader).content == "one "


@pytest.mark.parametrize("how", ["completed", "stopped"])
def test_nobody_is_told_of_an_end_that_is_not_stored(server: Tuned, provider: Provider, how: str) -> None:
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, ["one "], ["two"])
    with ThreadPoolExecutor(1) as threads, database_locked(server):
        if how == "stopped":
            stopped = threads.submit(server.post, f"/api/v1/messages/{message_id}/stop").result(20)
            assert stopped.status_code == 503 and stopped.json()["error"]["code"] == "store_unavailable"
        else:
            provider.open_gate(gates[0])
        read_all(stream, reader)
        assert reader.end is not None and reader.end["status"] == "failed"
        assert reader.end["error"]["code"] == "store_unavailable"
    message = server.wait_ended(message_id)
    assert message["status"] in ("failed", how)
    assert message["text"] == ("one " if how == "stopped" else "one two")


# ── one that cannot be stored, among others ──


def test_a_message_that_another_program_deletes_takes_no_other_along(server: Tuned, provider: Provider) -> None:
    spared = chat_to_the_gate(server, provider, *PARTS)
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, *PARTS)
    with contextlib.closing(sqlite3.connect(server.db, timeout=10)) as other:
        other.execute("PRAGMA foreign_keys = ON")
        other.execute("DELETE FROM message WHERE id = ?", (message_id,))
        other.commit()
    for gate in (*gates, *spared[3]):
        provider.open_gate(gate)
    read_all(stream, reader)
    assert reader.end is not None and reader.end["status"] == "failed" and reader.end["error"]["code"] == "internal"
    read_all(spared[0], spared[1])
    assert spared[1].content == WHOLE and spared[1].end is not None and spared[1].end["status"] == "completed"
    assert server.get(f"/api/v1/messages/{message_id}").status_code == 404
    assert server.get("/api/v1/generations").json() == {"generations": []}


def test_a_generation_whose_rows_are_refused_is_failed_and_can_be_deleted(server: Tuned, provider: Provider) -> None:
    """Another program has written where its row would go."""
    stream, reader, message_id, gates = chat_to_the_gate(server, provider, *PARTS)
    with contextlib.closing(sqlite3.connect(server.db, timeout=10)) as other:
        insert = "INSERT INTO delta (message_id, offset, kind, text) VALUES (?, 0, 'text', 'foreign')"
        other.execute(insert, (message_id,))
        other.commit()
    for gate in gates:
        provider.open_gate(gate)
    read_all(stream, reader)
    message = server.message(message_id)
    assert reader.end is not None and reader.end["status"] == "failed" == message["status"]
    assert message["error"]["code"] == "internal"
    assert server.client.delete(f"/api/v1/conversations/{message['conversation_id']}").status_code == 200
    assert server.get(f"/api/v1/messages/{message_id}").status_code == 404


HALF = b'{"error": {"message": "bad \\ud83d", "code": 400}}'


@pytest.mark.parametrize(
    "script",
    [[Send(b"data: " + HALF + b"\n\n")], page(400, HALF, "application/json")],
    ids=["in a stream", "as a refusal"],
)
def test_half_a_surrogate_in_a_providers_words_ends_no_more_than_its_answer(
    server: Tuned, provider: Provider, script: Script
) -> None:
    provider.script(script)
    message = server.wait_ended(server.start_chat("Hello"))
    assert message["status"] == "failed" and "bad \ufffd" in message["error"]["message"]
    assert server.wait_ended(server.start_chat("Hello again"))["status"] == "completed"


def test_a_refusal_without_retry_after_is_told_in_the_providers_words(server: Tuned, provider: Provider) -> None:
    provider.script(page(404, '{"error": {"message": "no such model"}}', "application/json"))
    response = server.post("/api/v1/chat", {"message": "Hello", "stream": False})
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "provider_rejected" and "no such model" in response.text


# ── cut at every await, in this process: every step of the event loop is a place to be cut at ──

STEPS = [*range(40), *range(40, 200, 10)]


@contextlib.asynccontextmanager
async def engine(folder: Path, provider: Provider) -> AsyncIterator[llmchat.Generations]:
    """The store and the generations of a service, without its HTTP side; nothing may be left of them afterwards."""
    config = llmchat.load_config(settings_for(provider), {"db": str(folder / "engine.db")})
    store = llmchat.Store(config.db)
    providers = llmchat.Providers(config)
    generations = llmchat.Generations(config, store, providers)
    await store.open()
    generations.open()
    try:
        yield generations
        assert not generations.running and not generations.flusher._marked and not generations.streams
        assert not generations.flusher._journal._waiting
    finally:
        await generations.close()
        await providers.close()
        await store.close()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks are left: {left}"


def question(generations: llmchat.Generations) -> llmchat.NewMessage:
    target = llmchat.Target(generations._config.providers[0], "m")
    turn = llmchat.Turn("user", (llmchat.Delta("text", "Hello"),))
    return llmchat.NewMessage("local", None, None, (turn,), None, (target,), llmchat.Parameters())


async def pass_steps(count: int) -> None:
    """Lets the event loop turn so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def read_stream(stream: llmchat.Subscriber, reader: Reader) -> None:
    with stream:
        while (data := await stream.read()) is not None:
            take(reader, data)


def take(reader: Reader, data: bytes) -> None:
    for block in filter(None, data.removeprefix(b"retry: 1000\n").split(b"\n\n")):
        reader.take(parse_event(block))


def run_engine(folder: Path, provider: Provider, work: Callable[[llmchat.Generations], Awaitable[None]]) -> None:
    async def run() -> None:
        async with engine(folder, provider) as generations:
            await asyncio.wait_for(work(generations), 60)

    asyncio.run(run())


def test_a_generation_that_is_stopped_at_any_step_ends_stopped_and_closes_its_connection(
    provider: Provider, tmp_path: Path
) -> None:
    async def work(generations: llmchat.Generations) -> None:
        before = len(provider.connections)
        for steps in STEPS:
            provider.unscript()
            provider.script([*texts(["one ", "two"]), Hang()])
            started = await generations.start(question(generations))
            reader = Reader()
            reading = asyncio.create_task(read_stream(await subscribed(generations, started.message_id), reader))
            await pass_steps(steps)
            await generations.stop("local", started.message_id)
            await reading
            message = await generations._store.read(llmchat.load_message, "local", started.message_id)
            assert message.status == "stopped" and reader.content == message.text and "one two".startswith(message.text)
            assert reader.end is not None and reader.end["status"] == "stopped"
        ours = provider.connections[before:]
        closed = "every connection's end"
        await asyncio.to_thread(wait_until, lambda: all(one.closed_at is not None for one in ours), closed)

    run_engine(tmp_path, provider, work)


async def subscribed(generations: llmchat.Generations, message_id: int, cursor: int = 0) -> llmchat.Subscriber:
    return await generations.subscribe("local", message_id, cursor)


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_a_client_that_goes_at_any_step_leaves_nothing_and_disturbs_nobody(
    provider: Provider, tmp_path: Path, how: str
) -> None:
    async def work(generations: llmchat.Generations) -> None:
        for steps in STEPS:
            provider.script([*texts(["one "]), *texts(["two"]), *openai_end()])
            started = await generations.start(question(generations))
            stream, gone = await subscribed(generations, started.message_id), Reader()
            going = asyncio.create_task(read_stream(stream, gone))
            staying = asyncio.create_task(
                read_stream(await subscribed(generations, started.message_id), reader := Reader())
            )
            await pass_steps(steps)
            _ = stream.close() if how == "closed" else going.cancel()
            await asyncio.wait([going])
            await staying
            assert reader.content == "one two" and "one two".startswith(gone.content)
            rest = reader_at("one two", len(gone.content))
            await read_stream(await subscribed(generations, started.message_id, len(gone.content)), rest)
            assert rest.content == "one two" and not generations.streams

    run_engine(tmp_path, provider, work)


def test_a_service_that_closes_at_any_step_interrupts_what_runs(provider: Provider, tmp_path: Path) -> None:
    for steps in STEPS[::4]:
        folder = tmp_path / str(steps)
        folder.mkdir()
        provider.script([*texts(["one ", "two"]), Hang()])

        async def work(generations: llmchat.Generations, steps: int = steps) -> None:
            await generations.start(question(generations))
            await pass_steps(steps)
            await generations.close()
            message = await generations._store.read(llmchat.load_message, "local", 2)
            assert message.status == "interrupted" and "one two".startswith(message.text)

        run_engine(folder, provider, work)
        provider.unscript()


def test_a_flush_that_breaks_in_an_unforeseen_way_ends_one_generation_only(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = llmchat.save_flush

    def break_for_one(connection: sqlite3.Connection, flush: llmchat.Save) -> None:
        save(connection, flush)
        if "unforeseen" in str(flush):
            raise ZeroDivisionError

    monkeypatch.setattr(llmchat, "save_flush", break_for_one)

    async def work(generations: llmchat.Generations) -> None:
        provider.script(*([*texts([text]), *openai_end()] for text in ("one", "unforeseen", "three")))
        readers = []
        for _ in range(3):
            started = await generations.start(question(generations))
            readers.append(Reader())
            await read_stream(await subscribed(generations, started.message_id), readers[-1])
        assert [reader.content for reader in readers] == ["one", "", "three"]
        assert [reader.end and reader.end["status"] for reader in readers] == ["completed", "failed", "completed"]

    run_engine(tmp_path, provider, work)


def test_nothing_comes_after_the_end_when_the_database_is_back(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FLUSH_PATIENCE_SECONDS": 0.3, "FLUSH_RETRY_SECONDS": 0.05, "DATABASE_BUSY_MS": 20}.items():
        monkeypatch.setattr(llmchat, name, value)

    async def work(generations: llmchat.Generations) -> None:
        gates = gated(provider, ["one "], ["two"])
        started = await generations.start(question(generations))
        first, late, stack = Reader(), Reader(), contextlib.ExitStack()
        reading = asyncio.create_task(read_stream(await subscribed(generations, started.message_id), first))
        await asyncio.to_thread(wait_until, lambda: first.content == "one ", "the first delta")
        generation = generations.running[started.message_id]
        with contextlib.closing(sqlite3.connect(tmp_path / "engine.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            provider.open_gate(gates[0])
            await reading
            assert first.end is not None and first.end["error"]["code"] == "store_unavailable"
            stream = stack.enter_context(await subscribed(generations, started.message_id))
            for _ in range(2):
                take(late, await stream.read() or b"")
            other.execute("ROLLBACK")
        await asyncio.to_thread(wait_until, lambda: not generations.running, "the end in the database")
        with stack:
            assert await stream.read() is None
        assert late.names == ["start", "delta", "end"] and late.content == "one "
        assert generation.ended.is_set()
        stored = await generations._store.read(llmchat.load_message, "local", started.message_id)
        assert stored.text == "one two"

    run_engine(tmp_path, provider, work)


def test_writes_that_are_refused_take_no_other_along(tmp_path: Path) -> None:
    """Forty writes in one group: every fourth raises, every fourth is cancelled, the rest is committed."""

    sql = "INSERT INTO conversation (id, owner, created_at_ms, updated_at_ms) VALUES (?, 'local', 1, 1)"

    def insert(connection: sqlite3.Connection, number: int) -> int:
        connection.execute(sql, (number + 1,))
        if number % 4 == 1:
            raise llmchat.Conflict("refused after it wrote")
        return number

    async def run() -> None:
        store = llmchat.Store(str(tmp_path / "store.db"))
        await store.open()
        try:
            tasks = [asyncio.create_task(store.write(insert, number)) for number in range(40)]
            await asyncio.sleep(0)
            for task in tasks[2::4]:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(one) for one in found[:4]] == [int, llmchat.Conflict, asyncio.CancelledError, int]
            ids = await store.read(
                lambda connection: {row[0] for row in connection.execute("SELECT id FROM conversation")}
            )
            kept = {number + 1 for number in range(40) if number % 4 in (0, 3)}
            refused = {number + 1 for number in range(40) if number % 4 == 1}
            assert kept <= ids and not refused & ids
        finally:
            await store.close()

    asyncio.run(run())


# ── the flusher's pace ──────────────────────────────────────────────────────────────────────────────────────────────


def flusher() -> Any:
    nothing: Any = None
    config: Any = SimpleNamespace(flush_interval_ms=20)
    return llmchat.Flusher(config, nothing, nothing)


@pytest.mark.parametrize(("characters", "seconds"), [(10, llmchat.FLUSH_INTERVAL_SECONDS_MAX), (100_000, 0.02)])
def test_a_costly_flush_is_followed_by_a_wait_only_if_that_makes_pieces_longer(characters: int, seconds: float) -> None:
    generation: Any = None
    paced, started_at = flusher(), time.monotonic() - 1
    pieces = [(characters, llmchat.Delta("text", "x" * characters))]
    paced._set_pace([llmchat.Flush(generation, pieces, None, False)], started_at, 1.0)
    assert paced._next_flush_at == pytest.approx(started_at - llmchat.FLUSH_BURST_SECONDS + seconds)


def test_a_single_costly_flush_does_not_slow_the_pace_down_but_many_do() -> None:
    generation: Any = None
    batch = [llmchat.Flush(generation, [(1, llmchat.Delta("text", "x"))], None, False)]
    paced, waits = flusher(), []
    for seconds in (*[0.001] * 10, 0.008, *[0.001] * 10, *[0.008] * 30):
        paced._next_flush_at = 0.0
        started_at = time.monotonic() - seconds
        paced._set_pace(batch, started_at, seconds)
        waits.append(paced._next_flush_at - started_at + llmchat.FLUSH_BURST_SECONDS)
    assert max(waits[:21]) == pytest.approx(0.02) and waits[-1] > 0.03


@pytest.mark.parametrize(
    ("held", "age", "is_busy"),
    [(0.001, 0.001, False), (0.001, 1, True), (0.5, 0.5, True)],
    ids=["at rest", "the next is due at once", "slow"],
)
def test_providers_are_read_at_the_pace_of_flushes_while_that_is_slow_or_knows_no_rest(
    held: float, age: float, is_busy: bool
) -> None:
    generation: Any = None
    paced, pieces = flusher(), [(1, llmchat.Delta("text", "x"))]
    paced._next_flush_at = started_at = time.monotonic() - age
    paced._set_pace([llmchat.Flush(generation, pieces, None, False)], started_at, held)
    assert paced._is_busy == is_busy


def test_a_slow_database_does_not_slow_the_pace_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for; the next flush may come as soon as it is ready."""
    now = [1000.0]

    class Slow:
        async def write(self, *_: Any, durable: bool) -> None:
            now[0] += 5

    class Publisher:
        def publish(self, flush: llmchat.Flush) -> None:
            now[0] += 0.001

    async def run() -> tuple[float, float]:
        paced = flusher()
        paced._store, paced._publisher = cast(Any, Slow()), cast(Any, Publisher())
        generation: Any = SimpleNamespace(message_id=1, answer=None, journalled=[])
        generation.take = lambda: llmchat.Flush(generation, [(1, llmchat.Delta("text", "x"))], None, False)
        paced.mark(generation)
        set_pace, is_paced = paced._set_pace, asyncio.Event()
        monkeypatch.setattr(paced, "_set_pace", lambda *arguments: (set_pace(*arguments), is_paced.set()))
        paced.open()
        await asyncio.wait_for(is_paced.wait(), 20)
        await paced.close()
        return paced._cost * llmchat.FLUSH_COST_AVERAGED, paced.flush_ms

    monkeypatch.setattr(llmchat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert asyncio.run(run()) == (pytest.approx(0.001), pytest.approx(5001))


@pytest.mark.parametrize("is_late", [False, True])
def test_a_provider_that_has_to_wait_is_not_kept_waiting_for_the_pace(is_late: bool) -> None:
    async def run() -> None:
        paced, answer = flusher(), SimpleNamespace(is_full=not is_late)
        generation: Any = SimpleNamespace(message_id=1, answer=answer)
        paced._next_flush_at = time.monotonic() + 3600
        paced.mark(generation)
        pacing = asyncio.create_task(paced._pace())
        if is_late:  # it is full only while the flusher sleeps
            await asyncio.sleep(0)
            assert not pacing.done()
            answer.is_full = True
            paced.mark(generation)
        await asyncio.wait_for(pacing, 20)

    asyncio.run(run())


def test_a_slow_pace_reads_the_providers_at_the_same_pace_and_loses_nothing(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every flush counts as costly here, so that answers rest between them."""
    monkeypatch.setattr(llmchat, "FLUSH_COST_RATIO", 10_000)
    monkeypatch.setattr(llmchat, "FLUSH_INTERVAL_SECONDS_MAX", 0.1)
    reads: Counter[llmchat.ProviderConnection] = Counter()
    read = llmchat.ProviderConnection.data_received
    monkeypatch.setattr(
        llmchat.ProviderConnection, "data_received", lambda one, data: (reads.update([one]), read(one, data))[1]
    )
    words = [f"{number} " for number in range(300)]
    provider.script(*[openai_text(*words, delay=0.002)] * 3)

    async def work(generations: llmchat.Generations) -> None:
        started = [await generations.start(question(generations)) for _ in range(3)]
        running = [generations.running[one.message_id] for one in started]
        await asyncio.gather(*(one.ended.wait() for one in running))
        for one in started:
            message = await generations.load_whole("local", one.message_id)
            assert (message.status, message.text) == ("completed", "".join(words))
        assert not generations.flusher._resting

    run_engine(tmp_path, provider, work)
    assert len(reads) == 3 and all(5 < count < 150 for count in reads.values()), reads
