"""A copy while it runs, a start on the copy, what a start does after a bad end, and where a database should not be."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmchat
from tests.conftest import ROOT, Server, wait_until
from tests.provider import Provider, openai_text


def backup_command(server: Server, file: Path | str, **options: str) -> subprocess.CompletedProcess[str]:
    """`llmchat backup FILE` as a process of its own, as an operator runs it."""
    command = [sys.executable, str(ROOT / "llmchat.py"), "backup", str(file), "--db", options.get("db", str(server.db))]
    return subprocess.run(
        command, cwd=server.folder, env=server.environment, text=True, capture_output=True, timeout=60
    )


def integrity(file: Path) -> str:
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def left_over(folder: Path) -> list[str]:
    """What is in the folder beside the databases and their own files."""
    return sorted(name for name in os.listdir(folder) if not re.fullmatch(r".*\.db(-wal|-shm|\.lock)?", name))


def answered(server: Server, message: str) -> str:
    response = server.post("/api/v1/chat", {"message": message, "stream": False})
    assert response.status_code == 200, response.text
    return str(response.json()["text"])


# ── the copy ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_backup_over_http_starts_as_a_database_with_everything_in_it(
    server: Server, serve: Callable[..., Server], tmp_path: Path
) -> None:
    answer = answered(server, "Keep this")
    response = server.get("/api/v1/backup")
    assert response.status_code == 200 and response.headers["content-type"] == "application/vnd.sqlite3"
    assert re.fullmatch(
        r"attachment; filename=\"llmchat-\d{4}-\d\d-\d\d-\d{6}\.db\"; filename\*=UTF-8''llmchat-[\d-]+\.db",
        response.headers["content-disposition"],
    )
    assert int(response.headers["content-length"]) == len(response.content)
    folder = tmp_path / "restored"
    folder.mkdir()
    (folder / "llmchat.db").write_bytes(response.content)
    assert integrity(folder / "llmchat.db") == "ok" and os.listdir(folder) == ["llmchat.db"], "the copy is one file"
    restored = serve(folder=folder)
    assert restored.message(2)["text"] == answer
    assert left_over(tmp_path) == ["restored"], "nothing stays beside the database"


def test_a_backup_in_the_middle_of_a_stream_holds_what_was_seen_and_disturbs_nobody(
    server: Server, provider: Provider, serve: Callable[..., Server], tmp_path: Path
) -> None:
    first = openai_text("The first half", finish=None, usage=None, done=False)
    provider.script([*first, provider.gate("half"), *openai_text(" and the rest")])
    with server.chat("Go") as stream:
        seen = "".join(event.data["text"] for event in stream.take(2) if event.name == "delta")
        result = backup_command(server, tmp_path / "copy.sqlite")
        assert result.returncode == 0, result.stderr
        copied = server.get("/api/v1/backup").content
        provider.open_gate("half")
        end = next(event for event in stream.events() if event.name == "end")
    assert end.data["status"] == "completed" and server.message(2)["text"] == "The first half and the rest"
    folder = tmp_path / "restored"
    folder.mkdir()
    (folder / "llmchat.db").write_bytes(copied)
    restored = serve(folder=folder)
    assert restored.message(2)["status"] == "interrupted" and restored.message(2)["text"] == seen == "The first half"
    assert integrity(tmp_path / "copy.sqlite") == "ok"


def test_a_backup_is_one_moment_however_much_is_written_meanwhile(tmp_path: Path) -> None:
    path = str(tmp_path / "llmchat.db")
    llmchat.prepare_database(path, suspect=False)
    with contextlib.closing(llmchat.connect(path, read_only=False)) as writer:
        writer.execute("CREATE TABLE pair (one INTEGER, other INTEGER, filler TEXT)")
        writer.executemany("INSERT INTO pair VALUES (0, 0, ?)", [("x" * 4000,)] * 2000)
        stop, rounds = threading.Event(), []

        def write_forever() -> None:
            with contextlib.closing(llmchat.connect(path, read_only=False)) as connection:
                while not stop.is_set():
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute("UPDATE pair SET one = one + 1 WHERE rowid % 100 = 0")
                    connection.execute("UPDATE pair SET other = other + 1 WHERE rowid % 100 = 0")
                    connection.execute("COMMIT")
                    rounds.append(1)

        thread = threading.Thread(target=write_forever)
        thread.start()
        try:
            wait_until(lambda: rounds, "the first write")
            for number in range(5):
                before = len(rounds)
                target = tmp_path / f"copy{number}.db"
                llmchat.copy_database(path, str(target))
                with contextlib.closing(sqlite3.connect(target)) as copy:
                    assert copy.execute("SELECT count(*), sum(one != other) FROM pair").fetchone() == (2000, 0)
                wait_until(lambda seen=before: len(rounds) > seen, "a write after the copy")
        finally:
            stop.set()
            thread.join()


def test_no_write_makes_a_copy_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "llmchat.db")
    llmchat.prepare_database(path, suspect=False)
    connect = llmchat.connect

    class WrittenMeanwhile:
        """A connection whose every backup is overtaken by a commit of somebody else."""

        def __init__(self, location: str, *, read_only: bool) -> None:
            self._connection = connect(location, read_only=read_only)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._connection, name)

        def backup(self, *arguments: Any, **options: Any) -> None:
            with contextlib.closing(connect(path, read_only=False)) as writer:
                writer.execute("CREATE TABLE later (x)")
            self._connection.backup(*arguments, **options)

    monkeypatch.setattr(llmchat, "connect", WrittenMeanwhile)
    llmchat.copy_database(path, str(tmp_path / "copy.db"))
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'later'").fetchone()[0] == 0


def test_the_command_copies_beside_a_running_server_and_without_one(server: Server, tmp_path: Path) -> None:
    answered(server, "Hello")
    beside = backup_command(server, "beside.sqlite")
    assert beside.returncode == 0 and re.search(r"backup of .*: beside\.sqlite, [\d,]+ bytes\n", beside.stdout), (
        beside.stderr
    )
    server.kill()
    after_kill = backup_command(server, "after-kill.sqlite")
    assert after_kill.returncode == 0, after_kill.stderr
    server.start()
    server.terminate()
    stopped = backup_command(server, "stopped.sqlite")
    assert stopped.returncode == 0, stopped.stderr
    for name in ("beside", "after-kill", "stopped"):
        file = tmp_path / f"{name}.sqlite"
        assert integrity(file) == "ok" and file.stat().st_mode & 0o777 == 0o600
        with contextlib.closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT count(*) FROM message").fetchone()[0] == 2
    assert left_over(tmp_path) == ["after-kill.sqlite", "beside.sqlite", "stopped.sqlite"]


@pytest.mark.parametrize(
    ("make", "file", "words"),
    [
        (
            lambda folder: (folder / "there").write_text("mine"),
            "there",
            "backup there: is there already; a backup overwrites nothing",
        ),
        (lambda folder: None, "no/such/folder/copy", "backup no/such/folder/copy: No such file or directory"),
    ],
)
def test_a_backup_that_cannot_be_made_is_one_line_and_leaves_everything_as_it_was(
    server: Server, tmp_path: Path, make: Callable[[Path], object], file: str, words: str
) -> None:
    make(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in left_over(tmp_path)}
    result = backup_command(server, file)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"llmchat: {words}\n")
    assert {name: (tmp_path / name).read_bytes() for name in left_over(tmp_path)} == before


def test_a_backup_of_what_is_no_database_of_ours_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database " * 1000)
    with contextlib.closing(sqlite3.connect(tmp_path / "other")) as connection:
        connection.execute("CREATE TABLE other (x)")
    for name, words in (
        ("text", "file is not a database"),
        ("other", "is not llmchat's"),
        ("missing", "unable to open"),
    ):
        result = backup_command(server, "copy", db=str(tmp_path / name))
        assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1, result
        assert not (tmp_path / "copy").exists() and not (tmp_path / "copy.partial").exists()
    assert not (tmp_path / "missing").exists()


def test_the_command_without_a_file_says_how_it_goes(server: Server) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "llmchat.py"), "backup"],
        env=server.environment,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 2 and "llmchat backup FILE" in result.stderr


def test_two_backups_at_once_are_refused_and_a_client_that_goes_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with contextlib.closing(
        sqlite3.connect(server.db, timeout=10)
    ) as connection:  # more than any socket's buffer takes
        connection.execute("CREATE TABLE filler AS SELECT zeroblob(40000000) AS x")
        connection.commit()
    with server.client.stream("GET", "/api/v1/backup") as held:
        assert held.status_code == 200
        body = held.iter_raw(1000)  # as long as it lives, the connection does
        assert next(body)
        refused = server.get("/api/v1/backup")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
        assert left_over(tmp_path) == [], "the copy that is being sent has no name"
    wait_until(lambda: server.client.head("/api/v1/backup").status_code == 200, "the end of the copy that nobody wants")


def test_a_copy_that_a_dead_process_left_is_removed_at_the_start_and_nothing_else(
    server: Server, tmp_path: Path
) -> None:
    server.kill()
    (tmp_path / ".llmchat-copy-0123456789abcdef").write_text("half a copy")
    (tmp_path / ".llmchat-copy-of-mine").write_text("mine")
    (tmp_path / "llmchat.db.backup").write_text("mine")
    server.start()
    assert left_over(tmp_path) == [".llmchat-copy-of-mine", "llmchat.db.backup"]


def test_a_backup_that_the_disk_has_no_room_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "llmchat.db")
    llmchat.prepare_database(path, suspect=False)
    usage = llmchat.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(llmchat.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(llmchat.StoreUnavailable, match="the disk has not as many left"):
        llmchat.open_copy(path)
    assert left_over(tmp_path) == []


# ── after a bad end ─────────────────────────────────────────────────────────────────────────────────────────────────


def damage(file: Path) -> None:
    """Makes a page in the middle unreadable, one that a start does not need."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        page = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'message_by_parent'").fetchone()[0]
    with file.open("r+b") as handle:
        handle.seek((page - 1) * size)
        handle.write(os.urandom(size))


def start_error(server: Server) -> str:
    with pytest.raises(AssertionError, match="did not start"):
        server.start()
    assert server.process.wait(20) == 2
    for reader in server._readers:
        reader.join(5)
    assert len(server.log) == 1, server.log
    return server.log[0]


def test_a_damaged_database_is_found_at_the_start_after_a_kill(server: Server) -> None:
    answered(server, "Hello")
    server.kill()
    damage(server.db)
    words = start_error(server)
    assert "is damaged" in words and "start on a backup" in words and ".recover" in words, words
    assert "is damaged" in start_error(server), "as often as it is tried"


def test_a_restored_database_is_checked_although_no_lock_file_came_with_it(server: Server) -> None:
    answered(server, "Hello")
    server.terminate()
    damage(server.db)
    os.unlink(f"{server.db}.lock")
    assert "is damaged" in start_error(server)


def test_the_lock_file_tells_how_the_last_process_ended(server: Server) -> None:
    lock = Path(f"{server.db}.lock")
    assert lock.read_text() == f"{server.process.pid}\n"
    server.kill()
    assert lock.read_text() != llmchat.CLEAN.decode()
    server.start()
    assert server.terminate() == 0
    assert lock.read_text() == llmchat.CLEAN.decode()


def test_after_a_clean_end_nothing_is_checked_and_after_any_other_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, checked = str(tmp_path / "llmchat.db"), []
    monkeypatch.setattr(llmchat, "check_database", lambda connection, path: checked.append(path))
    lock = llmchat.lock_database(path)
    assert lock.suspect
    llmchat.mark_lock(lock.descriptor, llmchat.CLEAN)
    os.close(lock.descriptor)
    again = llmchat.lock_database(path)
    llmchat.prepare_database(path, suspect=again.suspect)
    assert checked == []
    os.close(again.descriptor)
    third = llmchat.lock_database(path)
    llmchat.prepare_database(path, suspect=third.suspect)
    assert checked == [path]
    os.close(third.descriptor)


def test_a_big_database_is_checked_without_its_indexes_and_no_check_is_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "llmchat.db")
    llmchat.prepare_database(path, suspect=False)
    with contextlib.closing(llmchat.connect(path, read_only=False)) as connection:
        said: list[str] = []
        connection.set_trace_callback(said.append)
        llmchat.check_database(connection, path)
        monkeypatch.setattr(llmchat, "CHECK_BYTES_MAX", 1000)
        llmchat.check_database(connection, path)
        assert said == ["PRAGMA integrity_check(1)", "PRAGMA quick_check(1)"]
        connection.execute("CREATE TABLE filler (x)")
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO filler VALUES (?)", [(number,) for number in range(300_000)])
        connection.execute("COMMIT")
        monkeypatch.setattr(llmchat, "CHECK_SECONDS_MAX", 0)
        llmchat.check_database(connection, path)
        assert connection.execute("SELECT count(*) FROM filler").fetchone()[0] == 300_000, "the handler is gone"


# ── where it lies ───────────────────────────────────────────────────────────────────────────────────────────────────

MOUNTS = r"""/dev/vda / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
nas:/home /mnt/nas nfs4 rw 0 0
nas:/home /mnt/nas\040of\040mine nfs rw 0 0
//pc/share /mnt/share cifs rw 0 0
C:\134 /mnt/c 9p rw 0 0
me@host: /mnt/ssh fuse.sshfs rw 0 0
tmpfs /mnt/nas/fast tmpfs rw 0 0
//pc/share /twice cifs rw 0 0
/dev/vdb /twice ext4 rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/srv/chat", None),
        ("/mnt/nas", "nfs4"),
        ("/mnt/nas/deep/er", "nfs4"),
        ("/mnt/nasty", None),
        ("/mnt/nas of mine/x", "nfs"),
        ("/mnt/share/x", "cifs"),
        ("/mnt/c/Users", "9p"),
        ("/mnt/ssh", "fuse.sshfs"),
        ("/mnt/nas/fast/x", None),
        ("/twice/x", None),
    ],
)
def test_a_network_file_system_is_known_by_the_innermost_mount(folder: str, kind: str | None) -> None:
    assert llmchat.network_file_system(folder, MOUNTS) == kind


def test_mounts_that_make_no_sense_are_no_network() -> None:
    assert llmchat.network_file_system("/x", "\n\nnonsense\na b\n\\777 \\ nfs\n") is None


def test_a_database_on_a_network_is_warned_of_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"nas:/ {tmp_path.resolve()} nfs4 rw 0 0\n")
    monkeypatch.setattr(llmchat, "MOUNTS", mounts)
    llmchat.warn_of_network(str(tmp_path / "llmchat.db"))
    assert [(one.message, one.fields["type"]) for one in caplog.records] == [
        ("database on a network file system", "nfs4")
    ]
    monkeypatch.setattr(llmchat, "MOUNTS", tmp_path / "none")
    llmchat.warn_of_network(str(tmp_path / "llmchat.db"))
    assert len(caplog.records) == 1
