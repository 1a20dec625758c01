"""A disk that is full, that takes nothing more, that another program has locked; a log that grows; a clock that jumps.

Each fault meets a server that runs. `full` is a real file system of a few megabytes with no room left, where mounts are
allowed; where they are not, and always as `refused`, it is a limit of the system on the size of the files that the
process writes (setrlimit(2), RLIMIT_FSIZE: every write fails, as on a file system that was made read-only under a
process; a remount itself is refused by the kernel while a file is open for writing). `locked` is another program that
holds the database's write lock.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import llmchat
from tests.client import Reader
from tests.conftest import ROOT, Server, wait_until
from tests.guarantees import (
    PROGRAM,
    Tuned,
    chat_to_the_gate,
    gate_numbers,
    gated,
    read_all,
    reader_at,
    running_server,
    texts,
    varied_text,
)
from tests.provider import Provider, SendForever, WaitFor, openai_end

DISK_BYTES = 20_000_000
ARRIVED_BYTES_MAX = 5_000
PARTS = [["one "], ["two 日本 "], ["three"]]
WHOLE = "one two 日本 three"
CONVERSATIONS = 10_000
YEAR_SECONDS = 365 * 24 * 3600


def run_mount(*arguments: str) -> bool:
    try:
        return subprocess.run([*arguments], capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bool]]:
    """A folder on a file system of its own, and whether it is one: where mounts are not allowed it is a folder."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = run_mount("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder))
    yield folder, mounted
    if mounted:
        assert run_mount("umount", "--lazy", str(folder))


def tuned(folder: Path, provider: Provider, patience_seconds: float) -> Tuned:
    constants = {
        "FLUSH_PATIENCE_SECONDS": patience_seconds,
        "FLUSH_RETRY_SECONDS": 0.05,
        "DATABASE_BUSY_MS": 50,
        "ARRIVED_BYTES_MAX": ARRIVED_BYTES_MAX,
    }
    folder.mkdir()
    more = {"LLMCHAT_HEARTBEAT_SECONDS": "0.1", "LLMCHAT_FLUSH_INTERVAL_MS": "5"}
    return Tuned(folder, provider, constants=constants, **more)


@pytest.fixture(scope="module")
def patient(shared_provider: Provider, small_disk: tuple[Path, bool]) -> Iterator[Tuned]:
    """A server that waits for its disk for as long as a test may take."""
    with tuned(small_disk[0] / "patient", shared_provider, 60) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(shared_provider: Provider, small_disk: tuple[Path, bool]) -> Iterator[Tuned]:
    """A server that waits for its disk for half a second."""
    with tuned(small_disk[0] / "impatient", shared_provider, 0.5) as server:
        yield server


# ── the faults ──

Fault = Callable[[Server], AbstractContextManager[None]]


@contextlib.contextmanager
def refused(server: Server) -> Iterator[None]:
    """Every write of the process to a file fails."""
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def locked(server: Server) -> Iterator[None]:
    """Another program holds the write lock."""
    with contextlib.closing(sqlite3.connect(server.db, isolation_level=None, timeout=20)) as other:
        other.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")


def fill(folder: Path) -> list[Path]:
    """Files that take what is left of a file system, to the last byte."""
    ballast = folder / f"ballast {next(gate_numbers)}"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass
    return [ballast]


@contextlib.contextmanager
def full(server: Server) -> Iterator[None]:
    """No room is left, also not within the log, which else would be written from its beginning again."""
    with contextlib.closing(sqlite3.connect(server.db, isolation_level=None, timeout=20)) as other:
        wait_until(lambda: other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, "an empty log")
    ballast = fill(server.folder)
    try:
        yield
    finally:
        for file in ballast:
            file.unlink()


@pytest.fixture(params=["full", "refused", "locked"])
def fault(request: pytest.FixtureRequest, small_disk: tuple[Path, bool]) -> Fault:
    faults: dict[str, Fault] = {"full": full if small_disk[1] else refused, "refused": refused, "locked": locked}
    return faults[request.param]


def unable(server: Server) -> bool:
    """Whether the service itself says that it cannot write. It looks each time, and thereby fills what is left."""
    return server.get("/api/v1/health").status_code == 503


def assert_sound(server: Server) -> None:
    assert server.rows("PRAGMA integrity_check") == [("ok",)] and server.rows("PRAGMA foreign_key_check") == []
    assert server.rows("SELECT count(*) FROM message WHERE status = 'running'") == [(0,)]
    assert server.get("/api/v1/health").status_code == 200
    assert server.wait_ended(server.start_chat("And now?"))["status"] == "completed", "it goes on without a restart"
    assert "Traceback" not in "".join(server.log)


# ── before, during and after an answer ──


def test_a_question_before_the_disk_is_back_is_refused_whole_and_may_be_repeated(
    patient: Tuned, provider: Provider, fault: Fault
) -> None:
    body, key = {"message": "Hello" * 1000, "stream": False}, {"Idempotency-Key": f"before {next(gate_numbers)}"}
    with fault(patient):
        wait_until(lambda: unable(patient), "the fault")
        counts = patient.rows("SELECT count(*) FROM conversation"), len(provider.chats)
        answer = patient.post("/api/v1/chat", body, headers=key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert answer.json()["error"]["retryable"] is True and int(answer.headers["retry-after"]) >= 1
        assert (patient.rows("SELECT count(*) FROM conversation"), len(provider.chats)) == counts, "nobody was paid"
        assert patient.get("/api/v1/conversations").status_code == 200, "reading goes on"
    assert patient.post("/api/v1/chat", body, headers=key).status_code == 200
    assert_sound(patient)


def test_what_comes_while_the_disk_takes_nothing_is_kept_and_shown_when_it_is_stored(
    patient: Tuned, provider: Provider, fault: Fault
) -> None:
    stream, reader, message_id, gates = chat_to_the_gate(patient, provider, *PARTS)
    with stream:
        with fault(patient):
            wait_until(lambda: unable(patient), "the fault")
            provider.open_gate(gates[0])
            provider.wait_at_gate(gates[1])
            for number, event in enumerate(stream.events()):
                assert event.name == "heartbeat", "nothing else is shown"
                if number == 4:
                    break
            assert patient.content(message_id) == "one "
        provider.open_gate(gates[1])
        read_all(stream, reader)
    assert reader.content == WHOLE == patient.content(message_id)
    assert reader.end is not None and reader.end["status"] == "completed"
    assert_sound(patient)


def test_the_provider_is_not_read_on_while_the_disk_takes_nothing(
    patient: Tuned, provider: Provider, fault: Fault
) -> None:
    pieces = [varied_text(200, f"{number} ") for number in range(1200)]
    taken: list[int] = []

    def next_piece() -> Iterator[bytes]:
        for number, piece in enumerate(pieces):
            taken.append(number)
            yield b": " + b"p" * 20_000 + b"\n\n" + texts([piece])[0].data  # more than the kernel holds for both

    gate = f"flood {next(gate_numbers)}"
    provider.script([WaitFor(gate), SendForever(next_piece()), *openai_end()])
    with patient.chat("Hello") as stream:
        reader = Reader()
        reader.read(stream, 1)
        with fault(patient):
            wait_until(lambda: unable(patient), "the fault")
            provider.open_gate(gate)
            wait_until(lambda: is_still(taken), "the end of reading", 30)
            assert len(taken) < len(pieces), "its bytes wait in the kernel and at the provider"
        reader.read(stream)
    assert reader.content == "".join(pieces), "and are read when there is room again"
    assert_sound(patient)


def is_still(taken: list[int]) -> bool:
    """Whether something was taken, and nothing more in half a second."""
    before = len(taken)
    time.sleep(0.5)
    return 0 < before == len(taken)


def test_a_disk_that_stays_away_ends_the_answer_honestly_and_what_came_is_stored_later(
    impatient: Tuned, provider: Provider, fault: Fault
) -> None:
    stream, reader, message_id, gates = chat_to_the_gate(impatient, provider, *PARTS)
    with stream, fault(impatient):
        wait_until(lambda: unable(impatient), "the fault")
        provider.open_gate(gates[0])
        deadline = time.monotonic() + 60
        for event in stream.events():
            reader.take(event)
            assert time.monotonic() < deadline, "an end, although nothing can be stored"
        assert reader.end is not None and reader.end["status"] == "failed"
        assert (reader.end["error"]["code"], reader.end["error"]["retryable"]) == ("store_unavailable", True)
        assert reader.content == "one " == impatient.content(message_id), "nobody saw what is not stored"
        assert provider.chats[-1].wait_closed() > 0
    message = impatient.wait_ended(message_id)
    assert (message["status"], message["error"]) == ("failed", reader.end["error"])
    assert message["text"] == "one two 日本 "
    assert read_all(impatient.resume(message_id, reader.cursor), reader).content == message["text"]
    assert_sound(impatient)


def test_an_ended_answer_is_read_in_full_from_a_disk_that_takes_nothing(
    patient: Tuned, provider: Provider, fault: Fault
) -> None:
    gated(provider, [WHOLE])
    message = patient.wait_ended(patient.start_chat("Hello"))
    with fault(patient):
        wait_until(lambda: unable(patient), "the fault")
        assert patient.message(message["id"]) == message
        assert read_all(patient.resume(message["id"], 4), reader_at(WHOLE, 4)).content == WHOLE
        assert patient.post(f"/api/v1/messages/{message['id']}/stop").json()["status"] == "completed"
        deletion = patient.client.delete(f"/api/v1/conversations/{message['conversation_id']}")
        assert deletion.status_code == 503 and patient.message(message["id"]) == message, "and is not half deleted"
    assert patient.client.delete(f"/api/v1/conversations/{message['conversation_id']}").status_code == 200
    assert_sound(patient)


# ── kill and start on such a disk ──

LIMITED = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY));"
LIMITED += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def start_refused(folder: Path, *program: str) -> str:
    """A start that must fail; returns what it said."""
    done = subprocess.run(
        [sys.executable, *program, "--port", "0", "--db", str(folder / "llmchat.db")],
        cwd=folder, env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"llmchat: database {folder / 'llmchat.db'}: ")
    return done.stderr


def test_a_start_on_a_full_disk_says_so_in_one_line_and_a_later_one_has_everything(
    provider: Provider, small_disk: tuple[Path, bool]
) -> None:
    folder, mounted = small_disk
    folder /= "start"
    folder.mkdir()
    with running_server(folder, provider) as server:
        stream, reader, message_id, _ = chat_to_the_gate(server, provider, *PARTS)
        with stream:
            server.kill()
        program = str(ROOT / "llmchat.py")
        ballast = fill(folder) if mounted else []
        start_refused(folder, program) if mounted else start_refused(folder, "-c", LIMITED, program)
        for file in ballast:
            file.unlink()
        server.start()
        assert server.message(message_id)["status"] == "interrupted"
        assert server.content(message_id).startswith(reader.content)
        assert_sound(server)


def test_a_start_on_a_disk_that_is_read_only_says_so_in_one_line(
    provider: Provider, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("read-only")
    program = str(ROOT / "llmchat.py")
    mounted = run_mount("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder))
    try:
        with running_server(folder, provider) as server:
            message = server.wait_ended(server.start_chat("Hello"))
        if mounted:
            assert run_mount("mount", "-o", "remount,ro", str(folder))
            assert "Read-only file system" in start_refused(folder, program)
            assert run_mount("mount", "-o", "remount,rw", str(folder))
        else:
            start_refused(folder, "-c", LIMITED, program)
        with running_server(folder, provider) as server:
            assert server.message(message["id"]) == message
    finally:
        if mounted:
            run_mount("umount", "--lazy", str(folder))


# ── the log of the database ──


def wal_bytes(server: Server) -> int:
    return server.db.with_name(server.db.name + "-wal").stat().st_size


def test_a_log_that_grew_while_a_reader_slept_is_copied_back_and_cut(provider: Provider, tmp_path: Path) -> None:
    with running_server(tmp_path, provider, LLMCHAT_ANSWER_CHARACTERS_MAX="10000000") as server:
        with contextlib.closing(
            sqlite3.connect(f"file:{server.db}?mode=ro", uri=True, isolation_level=None)
        ) as sleeper:
            sleeper.execute("BEGIN")
            assert sleeper.execute("SELECT count(*) FROM message").fetchone() == (0,)
            content = varied_text(6_000_000)
            gated(provider, [content[start : start + 5000] for start in range(0, len(content), 5000)])
            message_id = server.start_chat("Hello")
            assert server.wait_ended(message_id, 60)["status"] == "completed"
            grown = wal_bytes(server)
            assert grown > llmchat.WAL_BYTES_MAX, "while it slept, nothing could be copied back"
            assert sleeper.execute("SELECT count(*) FROM message").fetchone() == (0,), "and it saw its own moment"
            sleeper.execute("COMMIT")
        for _ in range(3):
            server.wait_ended(server.start_chat("Hello"))
        print(f"the log had {grown:,} bytes, then {wal_bytes(server):,}")
        assert wal_bytes(server) <= llmchat.WAL_BYTES_MAX
        assert server.db.stat().st_size > 6_000_000 and server.content(message_id) == content
        assert_sound(server)


# ── ten thousand deletions ──


def insert_conversations(path: Path, count: int) -> None:
    """Conversations of two messages each, as another program would bring them in."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        numbers = f"WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < {count})"
        connection.execute(
            f"{numbers} INSERT INTO conversation (id, owner, title, created_at_ms, updated_at_ms)"
            " SELECT n, 'local', 'title', n, n FROM number"
        )
        for role, shift in (("user", 1), ("assistant", 0)):
            connection.execute(
                f"{numbers} INSERT INTO message (id, conversation_id, parent_id, role, status, created_at_ms, ended_at_ms)"
                f" SELECT 2 * n - {shift}, n, CASE '{role}' WHEN 'user' THEN NULL ELSE 2 * n - 1 END, '{role}',"
                " 'completed', n, n FROM number"
            )
        insert = "INSERT INTO delta (message_id, offset, kind, text)"
        connection.execute(f"{insert} SELECT id, 0, 'text', 'some words' FROM message")
        connection.execute("COMMIT")


def delete_all(port: int, ids: range) -> int:
    """Deletions that are all sent at once on one connection; returns how many were answered with 200."""
    requests = b"".join(
        b"DELETE /api/v1/conversations/%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % (id, port) for id in ids
    )
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        sender = threading.Thread(target=connection.sendall, args=(requests,))
        sender.start()
        answers = b""
        while answers.count(b"HTTP/1.1 ") < len(ids) or not answers.endswith(b"}"):
            data = connection.recv(1 << 16)
            assert data, "the server hung up"
            answers += data
        sender.join()
    return answers.count(b"HTTP/1.1 200")


def delete_on_forty_connections(port: int) -> int:
    """Everything, all at once; returns how many deletions were answered with 200."""
    share = CONVERSATIONS // 40
    with ThreadPoolExecutor(40) as threads:
        parts = [range(first, first + share) for first in range(1, CONVERSATIONS + 1, share)]
        return sum(threads.map(lambda part: delete_all(port, part), parts))


def test_ten_thousand_conversations_are_deleted_at_once_while_an_answer_goes_on(
    provider: Provider, tmp_path: Path
) -> None:
    with running_server(tmp_path, provider) as server:
        server.terminate()
        insert_conversations(server.db, CONVERSATIONS)
        server.start()
        over = threading.Event()
        numbered = (
            texts([f"{number} "])[0].data
            for number in itertools.takewhile(lambda _: not over.is_set(), itertools.count())
        )
        provider.script([SendForever(numbered, 0.02), *openai_end()])
        times: list[float] = []
        reader = Reader()

        def read() -> None:
            with server.chat("Hello") as stream:
                for event in stream.events():
                    times.append(time.monotonic())
                    reader.take(event)

        follower = threading.Thread(target=read)
        follower.start()
        wait_until(lambda: len(times) > 2, "the answer's beginning")
        began, before = time.monotonic(), len(times)
        deleted = delete_on_forty_connections(server.port)
        seconds, seen = time.monotonic() - began, len(times) - before
        gap = max(later - earlier for earlier, later in itertools.pairwise(times))
        over.set()
        follower.join(60)
        print(f"{CONVERSATIONS:,} deletions in {seconds:.1f} s; meanwhile {seen} deltas, the longest wait {gap:.2f} s")
        assert deleted == CONVERSATIONS
        assert seen > seconds, "at least one delta a second"
        assert reader.end is not None and reader.end["status"] == "completed"
        assert reader.content == server.content(2 * CONVERSATIONS + 2)
        assert server.rows("SELECT count(*) FROM conversation") == [(1,)]
        assert server.rows("SELECT count(*) FROM delta WHERE message_id <= ?", 2 * CONVERSATIONS) == [(0,)]
        assert_sound(server)


# ── clocks that jump ──

CLOCK = """
import os, time
real, real_ns = time.time, time.time_ns


def shift():
    with open(os.environ["CLOCK"]) as file:
        return int(file.read() or 0)


time.time = lambda: real() + shift()
time.time_ns = lambda: real_ns() + shift() * 10**9
"""


class Shifted(Tuned):
    """A server whose wall clock the test moves."""

    program = ("-c", CLOCK + PROGRAM)

    def __init__(self, folder: Path, provider: Provider) -> None:
        self.clock = folder / "clock"
        self.shift(0)
        super().__init__(folder, provider, CLOCK=str(self.clock), LLMCHAT_HEARTBEAT_SECONDS="0.1")

    def shift(self, seconds: int) -> None:
        written = self.clock.with_suffix(".new")
        written.write_text(str(seconds), encoding="ascii")
        written.replace(self.clock)


@pytest.fixture
def shifted(provider: Provider, tmp_path: Path) -> Iterator[Shifted]:
    with contextlib.closing(Shifted(tmp_path, provider)) as server:
        yield server


@pytest.mark.parametrize("jump", [YEAR_SECONDS, -YEAR_SECONDS], ids=["forward", "back"])
def test_a_clock_that_jumps_in_the_middle_of_an_answer_changes_neither_its_end_nor_its_duration(
    shifted: Shifted, provider: Provider, jump: int
) -> None:
    began = time.monotonic()
    stream, reader, message_id, gates = chat_to_the_gate(shifted, provider, *PARTS)
    with stream:
        shifted.shift(jump)
        for event in stream.events():
            assert event.name == "heartbeat", "no guard takes the jump for silence"
            break
        for gate in gates:
            provider.open_gate(gate)
        read_all(stream, reader)
    message = shifted.message(message_id)
    assert reader.content == WHOLE and (message["status"], message["error"]) == ("completed", None)
    elapsed_ms = (time.monotonic() - began) * 1000
    assert 0 <= message["timing"]["first_delta_ms"] <= message["timing"]["total_ms"] <= elapsed_ms
    ended, created = shifted.rows("SELECT ended_at_ms, created_at_ms FROM message WHERE id = ?", message_id)[0]
    assert 0 <= ended - created <= elapsed_ms
    shifted.kill()
    shifted.start()
    assert shifted.message(message_id) == message
    assert_sound(shifted)


def test_a_kill_before_the_clock_was_set_back_leaves_no_answer_that_ended_before_it_began(
    shifted: Shifted, provider: Provider
) -> None:
    stream, reader, message_id, _ = chat_to_the_gate(shifted, provider, *PARTS)
    with stream:
        shifted.kill()
    shifted.shift(-YEAR_SECONDS)
    shifted.start()
    message = shifted.message(message_id)
    assert message["status"] == "interrupted" and message["timing"]["total_ms"] >= 0
    assert shifted.content(message_id) == reader.content


def test_lists_are_whole_and_in_one_order_however_the_clock_was_set(shifted: Shifted) -> None:
    ids = []
    for jump in (0, YEAR_SECONDS, 0, -YEAR_SECONDS, 0, 2 * YEAR_SECONDS):
        shifted.shift(jump)
        ids.append(shifted.wait_ended(shifted.start_chat(f"at {jump}"))["conversation_id"])
    found, before = [], None
    while True:
        parameters = {"limit": "1", **({"before": before} if before else {})}
        page = shifted.get("/api/v1/conversations", params=parameters).json()
        found += page["conversations"]
        if not (before := page["next_before"]):
            break
    assert sorted(one["id"] for one in found) == sorted(ids), "each once"
    times = [one["updated_at_ms"] for one in found]
    assert times == sorted(times, reverse=True)
    assert [one["id"] for one in shifted.get("/api/v1/conversations").json()["conversations"]] == [
        one["id"] for one in found
    ]
    assert all(one["created_at_ms"] <= one["updated_at_ms"] for one in found)
