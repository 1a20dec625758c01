"""The store: migrations whole or not at all, constraints that hold, writes in groups, a locked database waited for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import llmchat
from tests.client import EventStream, Reader
from tests.conftest import ROOT, Server, wait_until
from tests.provider import Provider, openai_text

INSERT_MESSAGE = (
    "INSERT INTO message"
    " (conversation_id, parent_id, role, status, created_at_ms, ended_at_ms, error_json, params_json)"
    " VALUES (:conversation_id, :parent_id, :role, :status, :created_at_ms, :ended_at_ms, :error_json, :params_json)"
)
INSERT_DELTA = "INSERT INTO delta (message_id, offset, kind, text) VALUES (?, ?, ?, ?)"
MESSAGE = {
    "conversation_id": 1, "parent_id": None, "role": "user", "status": "completed", "created_at_ms": 1,
    "ended_at_ms": 1, "error_json": None, "params_json": "{}",
}  # fmt: skip
TARGET = llmchat.Target(llmchat.Provider("demo", "openai", "http://demo.invalid/v1"), "tour")


@contextlib.contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(
        sqlite3.connect(path, isolation_level=None, timeout=20, check_same_thread=False)
    ) as connection:
        connection.execute("PRAGMA foreign_keys=ON")
        yield connection


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program that holds the database's write lock."""
    with connected(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[llmchat.Store]:
    store = llmchat.Store(str(path))
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def new_message(text: str = "hello", **more: Any) -> llmchat.NewMessage:
    values: dict[str, Any] = {"conversation_id": None, "parent_id": llmchat.UNSET, "system": None, **more}
    return llmchat.NewMessage(
        "local",
        turns=(llmchat.Turn("user", (llmchat.Delta("text", text),)),),
        targets=(TARGET,),
        parameters=llmchat.Parameters(),
        **values,
    )


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


# ── migrations ──


@pytest.fixture
def migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the migrations that the test may add to."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for script in (ROOT / "migrations").glob("*.sql"):
        (folder / script.name).write_bytes(script.read_bytes())
    monkeypatch.setattr(llmchat, "MIGRATIONS", folder)
    return folder


def add_migration(folder: Path, text: str) -> int:
    """Writes the next migration; returns its number."""
    number = len(list(folder.glob("*.sql"))) + 1
    (folder / f"{number:04}_more.sql").write_text(text, encoding="utf-8")
    return number


def version_of(path: Path) -> int:
    with connected(path) as connection:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        return version


def tables_of(path: Path) -> set[str]:
    with connected(path) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}


def test_a_new_database_has_every_migration_and_no_backup(tmp_path: Path, migrations: Path) -> None:
    number = add_migration(migrations, "CREATE TABLE more (a TEXT) STRICT;\n-- the end; really\n")
    llmchat.prepare_database(str(tmp_path / "x.db"), suspect=False)
    assert version_of(tmp_path / "x.db") == number
    assert {"conversation", "message", "delta", "more"} <= tables_of(tmp_path / "x.db")
    assert [one.name for one in tmp_path.iterdir() if "before" in one.name] == []


def test_a_migration_that_breaks_in_its_middle_leaves_nothing_of_itself(tmp_path: Path, migrations: Path) -> None:
    path, before = tmp_path / "x.db", len(list(migrations.iterdir()))
    llmchat.prepare_database(str(path), suspect=False)
    number = add_migration(migrations, "CREATE TABLE half (a TEXT) STRICT;\nCREATE TABLE message (b TEXT) STRICT;\n")
    with pytest.raises(llmchat.StartError, match=r"^database .*x\.db: table message already exists$"):
        llmchat.prepare_database(str(path), suspect=False)
    assert version_of(path) == before and "half" not in tables_of(path)
    (migrations / f"{number:04}_more.sql").write_text("CREATE TABLE whole (a TEXT) STRICT;\n", encoding="utf-8")
    llmchat.prepare_database(str(path), suspect=False)
    assert version_of(path) == number and "whole" in tables_of(path)


def test_the_migrations_before_a_broken_one_stay(tmp_path: Path, migrations: Path) -> None:
    number = add_migration(migrations, "CREATE TABLE good (a TEXT) STRICT;\n")
    add_migration(migrations, "CREATE TABLE half (a TEXT) STRICT;\nNOT SQL;\n")
    with pytest.raises(llmchat.StartError, match="syntax error"):
        llmchat.prepare_database(str(tmp_path / "x.db"), suspect=False)
    assert version_of(tmp_path / "x.db") == number
    assert "good" in tables_of(tmp_path / "x.db") and "half" not in tables_of(tmp_path / "x.db")


def test_an_existing_database_is_backed_up_beside_itself_before_it_is_migrated(
    tmp_path: Path, migrations: Path
) -> None:
    path, before = tmp_path / "x.db", len(list(migrations.iterdir()))
    llmchat.prepare_database(str(path), suspect=False)
    with connected(path) as connection:
        connection.execute(
            "INSERT INTO conversation (owner, title, created_at_ms, updated_at_ms) VALUES ('local', 'kept', 1, 1)"
        )
    number = add_migration(migrations, "DELETE FROM conversation;\n")
    llmchat.prepare_database(str(path), suspect=False)
    backup = tmp_path / f"x.db.before-{number:04}"
    assert version_of(backup) == before
    with connected(backup) as connection:
        assert connection.execute("SELECT title FROM conversation").fetchall() == [("kept",)]
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_database_that_is_up_to_date_is_not_backed_up(tmp_path: Path, migrations: Path) -> None:
    for _ in range(2):
        llmchat.prepare_database(str(tmp_path / "x.db"), suspect=False)
    assert {one.name for one in tmp_path.iterdir()} == {"x.db", "migrations"}


def test_a_newer_database_is_refused(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "x.db"
    number = add_migration(migrations, "CREATE TABLE more (a TEXT) STRICT;\n")
    llmchat.prepare_database(str(path), suspect=False)
    (migrations / f"{number:04}_more.sql").unlink()
    with pytest.raises(llmchat.StartError, match=f"is of version {number}, made by a newer llmchat"):
        llmchat.prepare_database(str(path), suspect=False)


# ── constraints ──


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    llmchat.prepare_database(str(tmp_path / "x.db"), suspect=False)
    with connected(tmp_path / "x.db") as connection:
        connection.execute(
            "INSERT INTO conversation (id, owner, created_at_ms, updated_at_ms) VALUES (1, 'local', 1, 1)"
        )
        connection.execute(INSERT_MESSAGE, MESSAGE)
        yield connection


@pytest.mark.parametrize(
    "change",
    [
        {"role": "robot"}, {"status": "done"}, {"conversation_id": 7}, {"parent_id": 7}, {"created_at_ms": "now"},
        {"status": "running"}, {"status": "running", "ended_at_ms": 1}, {"ended_at_ms": None}, {"status": "failed"},
        {"status": "failed", "error_json": "{"}, {"params_json": "no JSON"}, {"conversation_id": None}, {"role": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_message_that_cannot_be_is_refused_by_the_schema(
    database: sqlite3.Connection, change: dict[str, Any]
) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        database.execute(INSERT_MESSAGE, {**MESSAGE, **change})
    assert database.execute("SELECT count(*) FROM message").fetchone() == (1,)


@pytest.mark.parametrize(
    "row",
    [
        (1, -1, "text", "x"),
        (1, 0, "song", "x"),
        (7, 0, "text", "x"),
        (1, 0, "text", None),
        (1, 0, "text", b"x"),
        (1, "a", "text", "x"),
    ],
    ids=str,
)
def test_a_delta_that_cannot_be_is_refused_by_the_schema(database: sqlite3.Connection, row: tuple[Any, ...]) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        database.execute(INSERT_DELTA, row)


def test_two_deltas_at_one_offset_are_refused_by_the_schema(database: sqlite3.Connection) -> None:
    database.execute("INSERT INTO delta (message_id, offset, kind, text) VALUES (1, 0, 'text', 'a')")
    with pytest.raises(sqlite3.IntegrityError):
        database.execute("INSERT INTO delta (message_id, offset, kind, text) VALUES (1, 0, 'text', 'b')")


def test_a_deleted_conversation_takes_its_messages_and_deltas_along(database: sqlite3.Connection) -> None:
    database.execute("INSERT INTO delta (message_id, offset, kind, text) VALUES (1, 0, 'text', 'a')")
    database.execute("DELETE FROM conversation WHERE id = 1")
    counts = "SELECT (SELECT count(*) FROM message), (SELECT count(*) FROM delta)"
    assert database.execute(counts).fetchone() == (0, 0)


# ── group commit ──


def test_an_operation_that_is_refused_takes_no_other_along(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "x.db") as store:
            waits = [
                store.write(llmchat.start_message, new_message("before")),
                store.write(llmchat.start_message, new_message("refused", conversation_id=99)),
                store.write(llmchat.start_message, new_message("between")),
                store.write(lambda connection: connection.execute(INSERT_DELTA, (99, 0, "text", "x"))),
                store.write(llmchat.start_message, new_message("after")),
            ]
            before, refused, between, broken, after = await asyncio.gather(*waits, return_exceptions=True)
        assert isinstance(refused, llmchat.NotFound) and isinstance(broken, sqlite3.IntegrityError)
        assert [one.conversation_id for one in (before, between, after)] == [1, 2, 3]  # type: ignore[union-attr]

    run(main())
    with connected(tmp_path / "x.db") as connection:
        titles = connection.execute("SELECT title FROM conversation ORDER BY id").fetchall()
    assert titles == [("before",), ("between",), ("after",)]


def test_an_operation_that_is_refused_halfway_leaves_no_half(tmp_path: Path) -> None:
    def half(connection: sqlite3.Connection) -> None:
        llmchat.start_message(connection, new_message("half"))
        raise llmchat.Conflict("after the insert")

    async def main() -> None:
        async with opened(tmp_path / "x.db") as store:
            results = await asyncio.gather(
                store.write(half), store.write(llmchat.start_message, new_message("whole")), return_exceptions=True
            )
        assert isinstance(results[0], llmchat.Conflict) and isinstance(results[1], llmchat.Started)

    run(main())
    with connected(tmp_path / "x.db") as connection:
        assert connection.execute("SELECT title FROM conversation").fetchall() == [("whole",)]
        assert connection.execute("SELECT count(*) FROM message").fetchone() == (2,)


def test_what_waits_together_is_committed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    commit_together = llmchat.commit_together

    def counted(connection: sqlite3.Connection, operations: Any, durable: bool) -> list[Any]:
        groups.append(len(operations))
        return commit_together(connection, operations, durable)

    monkeypatch.setattr(llmchat, "commit_together", counted)

    async def main() -> None:
        async with opened(tmp_path / "x.db") as store:
            await asyncio.gather(*(store.write(llmchat.start_message, new_message(str(one))) for one in range(100)))

    run(main())
    assert sum(groups) == 101 and len(groups) <= 4, "a hundred writes and the one that closes the store"


def test_a_promise_is_fsynced_and_a_delta_is_not(tmp_path: Path) -> None:
    def synchronous(connection: sqlite3.Connection) -> int:
        level: int = connection.execute("PRAGMA synchronous").fetchone()[0]
        return level

    async def main() -> None:
        async with opened(tmp_path / "x.db") as store:
            assert await store.write(synchronous) == 1  # NORMAL
            assert await store.write(synchronous, durable=True) == 2  # FULL
            assert await store.write(synchronous) == 1

    run(main())


def test_what_waits_when_the_store_closes_is_still_committed(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "x.db") as store:
            waiting = asyncio.ensure_future(store.write(llmchat.start_message, new_message("last words")))
            await asyncio.sleep(0)
        assert (await waiting).message_id == 2

    run(main())
    with connected(tmp_path / "x.db") as connection:
        assert connection.execute("SELECT title FROM conversation").fetchall() == [("last words",)]


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "x.db") as store:
            with pytest.raises(llmchat.StoreUnavailable, match="readonly"):
                await store.read(llmchat.start_message, new_message("x"))

    run(main())


def test_all_that_one_read_finds_is_of_one_moment(tmp_path: Path) -> None:
    path = str(tmp_path / "x.db")

    def count_around_a_write(connection: sqlite3.Connection) -> list[int]:
        counts = []
        for text in ("one", "two"):
            counts.append(connection.execute("SELECT count(*) FROM conversation").fetchone()[0])
            with contextlib.closing(llmchat.connect(path, read_only=False)) as writer:
                llmchat.start_message(writer, new_message(text))
        return counts

    async def main() -> None:
        async with opened(Path(path)) as store:
            assert await store.read(count_around_a_write) == [0, 0]
            assert await store.read(count_around_a_write) == [2, 2]

    run(main())


def test_an_answer_that_is_not_stored_and_broke_off_is_kept_for_a_while_from_the_recovery_on(tmp_path: Path) -> None:
    path = str(tmp_path / "x.db")
    llmchat.prepare_database(path, suspect=False)
    with contextlib.closing(llmchat.connect(path, read_only=False)) as connection:
        for hidden in (True, False):
            llmchat.start_message(connection, new_message(hidden=hidden))
        connection.execute("UPDATE conversation SET updated_at_ms = 1")
        assert llmchat.prepare_database(path, suspect=False) == 2
        rows = connection.execute("SELECT hidden, updated_at_ms > 1 FROM conversation ORDER BY id")
        assert list(map(tuple, rows)) == [(1, 1), (0, 0)]


# ── a database that is locked ──


def test_a_lock_of_three_seconds_delays_an_answer_and_loses_nothing(server: Server, provider: Provider) -> None:
    provider.script([*openai_text("before ")[:-3], provider.gate("locked"), *openai_text("while ", "after")[1:]])
    reader = Reader()
    with server.chat("x") as stream:
        reader.read(stream, 2)
        with locked(server.db):
            provider.open_gate("locked")
            assert server.get("/api/v1/messages/2").json()["text"] == "before ", "reading goes on"
            time.sleep(3)
            assert server.content(2) == "before "
        reader.read(stream)
    assert reader.content == "before while after" == server.content(2)
    assert reader.end is not None and reader.end["status"] == "completed"
    assert server.message(2)["status"] == "completed"


def test_a_question_that_meets_a_lock_is_refused_whole_and_may_be_repeated(server: Server, provider: Provider) -> None:
    body, headers = {"message": "x", "stream": False}, {"Idempotency-Key": "k"}
    with locked(server.db):
        refused = server.post("/api/v1/chat", body, headers=headers)
        health = server.get("/api/v1/health")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert refused.json()["error"]["retryable"] is True and int(refused.headers["retry-after"]) >= 1
    assert (health.status_code, health.json()["database_writable"], health.json()["status"]) == (
        503,
        False,
        "store_unavailable",
    )
    assert provider.chats == [] and server.rows("SELECT count(*) FROM conversation") == [(0,)]
    assert server.post("/api/v1/chat", body, headers=headers).status_code == 200
    assert server.get("/api/v1/health").status_code == 200


def can_connect(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


@contextlib.contextmanager
def impatient(
    tmp_path: Path, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., EventStream]]:
    """A service in this process that gives a locked database a second; yields what starts a chat in it."""
    monkeypatch.setattr(llmchat, "DATABASE_BUSY_MS", 50)
    monkeypatch.setattr(llmchat, "FLUSH_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(llmchat, "FLUSH_RETRY_SECONDS", 0.05)
    environment = {"OPENAI_BASE_URL": provider.base_url, "OPENAI_MODELS": "m", "LLMCHAT_HEARTBEAT_SECONDS": "3600"}
    config = llmchat.load_config({**environment, "LLMCHAT_PORT": "0", "LLMCHAT_DB": str(tmp_path / "x.db")}, {})
    started, ports, stop = threading.Event(), [], threading.Event()

    async def main() -> None:
        import uvicorn

        with llmchat.open_socket(config) as listener:
            app = llmchat.create_app(config)
            async with app.router.lifespan_context(app):
                settings = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None)
                server = uvicorn.Server(settings)
                serving = asyncio.ensure_future(server._serve([listener]))  # `serve` would take the signals
                ports.append(listener.getsockname()[1])
                started.set()
                await asyncio.to_thread(stop.wait)
                server.should_exit = True
                await serving

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert started.wait(20)
        wait_until(lambda: can_connect(ports[0]), "the service")
        url = f"http://127.0.0.1:{ports[0]}"
        yield lambda method="POST", path="/api/v1/chat", body=None: EventStream(url, method, path, body)
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def test_a_lock_beyond_the_patience_fails_the_answer_and_the_service_recovers(
    tmp_path: Path, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider.script(
        [*openai_text("before ")[:-3], provider.gate("locked"), *openai_text("while")[1:-2], provider.gate("never")]
    )
    reader = Reader()
    with impatient(tmp_path, provider, monkeypatch) as connect:
        with connect(body={"message": "x"}) as stream, locked(tmp_path / "x.db"):
            request = provider.wait_chats()[0]
            provider.wait_at_gate("locked")
            provider.open_gate("locked")
            reader.read(stream)
            assert reader.end is not None and reader.end["error"] is not None
            assert (reader.end["status"], reader.end["error"]["code"]) == ("failed", "store_unavailable")
            assert reader.end["error"]["retryable"] is True and reader.content in ("", "before ")
            assert request.wait_closed() > 0, "the provider is not read on"
        wait_until(lambda: status_of(tmp_path / "x.db", 2) == "failed", "the failed message in the database")
        again = Reader()
        with connect(body={"message": "again"}) as stream:
            again.read(stream)
        assert again.end is not None and again.end["status"] == "completed"
        resumed = Reader()
        with connect("GET", "/api/v1/messages/2/stream") as stream:
            resumed.read(stream)
        assert resumed.content == "before while", "what came meanwhile is stored after all"
        assert resumed.end is not None and resumed.end["error"]["code"] == "store_unavailable"


def status_of(path: Path, message_id: int) -> str:
    with connected(path) as connection:
        status: str = connection.execute("SELECT status FROM message WHERE id = ?", (message_id,)).fetchone()[0]
        return status
