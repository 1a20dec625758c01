"""Power loss: the files as they are at a random moment, without what had not reached the disk, make a sound database.

The process is stopped (SIGSTOP) while the database and its log are copied, so that a copy is one moment. What a power
cut leaves beyond the last fsync is anyone's guess; the copies have their log cut at random places, in the middle of a
page too, its last page spoilt, or zeros at its end. SQLite takes of a log what is whole, in the order of the commits.
What was promised (a question before its provider is called, an end before it is sent) was fsynced: a copy whose log
goes at least as far as it did when a client knew of it has it.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import llmchat
from tests.client import Reader
from tests.conftest import Server, wait_until
from tests.guarantees import read_all, reader_at, running_server, texts, varied_text
from tests.provider import Hang, Provider, openai_end, paced

STREAMS, MOMENTS = 6, 5
SPOILED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "whole": lambda log, source: log,
    "cut": lambda log, source: log[: source.randrange(len(log))],
    "cut near its end": lambda log, source: log[: len(log) - source.randrange(1, min(len(log), 20_000))],
    "its last page spoilt": lambda log, source: log[:-2000] + source.randbytes(2000),
    "zeros at its end": lambda log, source: log[: -source.randrange(1, 9000)] + bytes(9000),
    "gone": lambda log, source: b"",
}


@dataclass
class Watcher:
    """A client in a thread of its own: what it holds, and how long the log was when it knew of a start and an end."""

    server: Server
    reader: Reader = field(default_factory=Reader)
    message_id: int = 0
    known: dict[str, int] = field(default_factory=dict)

    def __call__(self) -> None:
        with contextlib.suppress(OSError), self.server.chat("Hello") as stream:
            for event in stream.events():
                self.reader.take(event)
                if event.name in ("start", "end"):
                    self.known[event.name] = wal_of(self.server.db).stat().st_size
                if event.name == "start":
                    self.message_id = event.data["message_id"]


@dataclass(frozen=True)
class Moment:
    """The files of one moment, and what each client held by then: its content, and the events that it knew of."""

    database: bytes
    log: bytes
    held: dict[int, tuple[str, dict[str, int]]]


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def stopped_moment(server: Server, watchers: list[Watcher]) -> Moment:
    """A copy of the files while the process stands still and the clients have taken all that it had sent."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        before: list[int] = []
        while before != (before := [len(one.reader.content) for one in watchers]):
            time.sleep(0.1)
        held = {one.message_id: (one.reader.content, dict(one.known)) for one in watchers if one.message_id}
        return Moment(server.db.read_bytes(), wal_of(server.db).read_bytes(), held)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def moments(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> list[Moment]:
    """Copies at random moments of a few streams, some of which have ended by then."""
    source = random.Random(5)
    with running_server(tmp_path_factory.mktemp("power"), shared_provider) as server:
        for number in range(STREAMS):
            pieces = [varied_text(40, f"{number}.{piece} ") for piece in range(20 if number < 2 else 400)]
            shared_provider.script([*paced(texts(pieces), 0.005), *(openai_end() if number < 2 else [Hang()])])
        watchers = [Watcher(server) for _ in range(STREAMS)]
        threads = [threading.Thread(target=watcher) for watcher in watchers]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(one.reader.content for one in watchers), "a beginning of every answer")
        found = []
        for _ in range(MOMENTS):
            time.sleep(source.uniform(0, 0.4))
            found.append(stopped_moment(server, watchers))
        wait_until(lambda: sum("end" in one.known for one in watchers) >= 2, "the end of two answers")
        found.append(stopped_moment(server, watchers))
        server.kill()
        for thread in threads:
            thread.join(20)
    return found


def restored(folder: Path, moment: Moment, log: bytes) -> Path:
    path = folder / "llmchat.db"
    path.write_bytes(moment.database)
    wal_of(path).write_bytes(log)
    return path


def check(path: Path, moment: Moment, log: bytes) -> None:
    """A start on the files: sound, nothing runs, everyone's content is there as far as it goes, promises are kept."""
    llmchat.prepare_database(str(path), suspect=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT count(*) FROM message WHERE status = 'running'").fetchone() == (0,)
        for message_id, (content, known) in moment.held.items():
            row = connection.execute("SELECT status FROM message WHERE id = ?", (message_id,)).fetchone()
            parts = connection.execute("SELECT text FROM delta WHERE message_id = ? ORDER BY offset", (message_id,))
            stored = "".join(text for (text,) in parts)
            assert stored.startswith(content) or content.startswith(stored), "no other text, and no hole"
            assert row is not None or len(log) < known["start"], "a question that was answered to"
            if "end" in known and len(log) >= known["end"]:
                assert (row, stored) == (("completed",), content), "an end that was told"
            if log == moment.log:
                assert stored.startswith(content), "everything that was seen"


@pytest.mark.parametrize("how", SPOILED)
def test_the_files_of_any_moment_without_what_was_not_on_the_disk_are_sound(
    moments: list[Moment], tmp_path: Path, how: str
) -> None:
    source = random.Random(how)
    for moment in moments:
        for number in range(1 if how in ("whole", "gone") else 6):
            folder = tmp_path / f"{moments.index(moment)}.{number}"
            folder.mkdir()
            log = SPOILED[how](moment.log, source)
            path = restored(folder, moment, log)
            check(path, moment, log if how.startswith("cut") or log == moment.log else b"")
            shutil.rmtree(folder)


def test_clients_that_hold_more_than_the_disk_get_a_reset_and_then_everything_from_0(
    moments: list[Moment], provider: Provider, tmp_path: Path
) -> None:
    moment = moments[-1]
    longest = max(moment.held, key=lambda message_id: len(moment.held[message_id][0]))
    log = moment.log[: max(known["start"] for _, known in moment.held.values())]
    restored(tmp_path, moment, log)
    with running_server(tmp_path, provider) as server:
        shorter = 0
        for message_id, (content, _) in moment.held.items():
            stored = server.content(message_id)
            reader = read_all(server.resume(message_id, len(content)), reader_at(content, len(content)))
            assert reader.content == stored and reader.end is not None
            is_shorter = len(content) > len(stored)
            assert reader.names[:1] == (["reset"] if is_shorter else ["start"]) and reader.names.count("reset") <= 1
            assert reader.end["status"] == ("interrupted" if is_shorter else server.message(message_id)["status"])
            shorter += is_shorter
        assert shorter > 0 and len(moment.held[longest][0]) > len(server.content(longest))
        provider.script([*texts(["and on"]), *openai_end()])
        goes_on = server.resume(longest)
        goes_on.close()
        assert server.post(f"/api/v1/messages/{longest}/continue").status_code == 200
        assert server.wait_ended(longest)["text"].endswith("and on")
        assert server.rows("PRAGMA integrity_check") == [("ok",)]
