"""What every test of the running service shares: a real server process, a real provider, a real SSE client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Self

import httpx
import pytest

from tests.client import EventStream
from tests.provider import Provider

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 20


STORED = (
    "SELECT 0, offset, text FROM delta WHERE message_id = :id"
    " UNION ALL SELECT id, 0, json_extract(pieces_json, '$.\"' || :id || '\"') FROM journal ORDER BY 1, 2"
)


def stored_content(connection: sqlite3.Connection, message_id: int) -> str:
    """The content of a message, of every kind, as a database has it at one moment: its own rows, then what the journal
    has beyond them."""
    content = ""
    for entry, at, found in connection.execute(STORED, {"id": message_id}):
        pieces = [(at, "", found)] if not entry else json.loads(found or "[]")
        for offset, _, text in pieces:
            if not entry or offset >= len(content):
                assert offset == len(content), (
                    f"message {message_id} has {len(content)} characters, then some at {offset}"
                )
                content += text
    return content


class Server:
    """One llmchat process on a free port, ended by `close` or `with`. Its environment holds what the test gives."""

    program: tuple[str, ...] = (str(ROOT / "llmchat.py"),)  # what Python runs

    def __init__(self, folder: Path, *arguments: str, **settings: str) -> None:
        self.folder = folder
        self.db = folder / "llmchat.db"
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        self.environment = {**inherited, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "error", **settings}
        self.arguments = arguments
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the process, again after an end; returns once it listens. Raises AssertionError with its output."""
        self.process = subprocess.Popen(
            [sys.executable, *self.program, "--port", "0", "--db", str(self.db), *self.arguments],
            cwd=self.folder, env=self.environment, text=True, bufsize=1, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.output: list[str] = []
        self.log: list[str] = []
        self._readers = [
            threading.Thread(target=self._collect, args=(pipe, lines), daemon=True)
            for pipe, lines in ((self.process.stdout, self.output), (self.process.stderr, self.log))
        ]
        for reader in self._readers:
            reader.start()
        wait_until(
            lambda: len(self.output) >= 3 or self.process.poll() is not None, "the server's start", START_SECONDS
        )
        match = re.search(r"http://\S+", "".join(self.output))
        assert match, f"did not start: {self.output} {self.log}"
        self.url = match[0]
        self.client = open_client(self.url)

    def _collect(self, pipe: Any, lines: list[str]) -> None:
        with pipe:
            lines.extend(pipe)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, **({"json": body} if body is not None else {}), **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def message(self, message_id: int) -> dict[str, Any]:
        response = self.get(f"/api/v1/messages/{message_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, message: str = "Hello", **more: Any) -> EventStream:
        """A streamed chat."""
        return EventStream(self.url, "POST", "/api/v1/chat", {"message": message, **more})

    def resume(self, message_id: int, cursor: int | None = None) -> EventStream:
        headers = {} if cursor is None else {"Last-Event-ID": str(cursor)}
        return EventStream(self.url, "GET", f"/api/v1/messages/{message_id}/stream", headers=headers)

    def start_chat(self, message: str = "Hello", **more: Any) -> int:
        """A chat in the background; returns the id of its answer."""
        response = self.post("/api/v1/chat", {"message": message, "background": True, **more})
        assert response.status_code == 202, response.text
        return int(response.json()["message_id"])

    def wait_ended(self, message_id: int, seconds: float = 20) -> dict[str, Any]:
        wait_until(lambda: self.message(message_id)["status"] != "running", f"the end of message {message_id}", seconds)
        return self.message(message_id)

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a second, independent connection sees in the database."""
        with contextlib.closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(sql, values).fetchall()

    def content(self, message_id: int) -> str:
        """The stored content of a message, of every kind, as a second connection sees it."""
        with contextlib.closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True, timeout=10)) as connection:
            return stored_content(connection, message_id)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self._reap()

    def terminate(self, seconds: float = 20) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(seconds)
        return self._reap()

    def _reap(self) -> int:
        status = self.process.wait(20)
        for reader in self._readers:
            reader.join(5)
        self.client.close()
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._reap()


def open_client(url: str, **headers: str) -> httpx.Client:
    """A client for a server on loopback. It loads no certificates, which takes longer than most requests."""
    return httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False, verify=False)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 20) -> None:
    """Looks again and again until the condition holds. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.01)


def skip_module(reason: str) -> NoReturn:
    """Skips the module that lacks something; with CI=true that is a failure."""
    assert os.environ.get("CI") != "true", reason
    pytest.skip(reason, allow_module_level=True)


def settings_for(provider: Provider) -> dict[str, str]:
    """The environment in which the provider `openai` is this one."""
    return {"OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": "sk-test", "OPENAI_MODELS": "m,n"}


@pytest.fixture(scope="module")
def shared_provider() -> Iterator[Provider]:
    """The provider of a module, for its servers to ask. A test takes `provider`, which is the same."""
    with Provider() as running:
        yield running


@pytest.fixture(autouse=True)
def forgetful(request: pytest.FixtureRequest) -> None:
    """No test meets what an earlier one scripted, asked or set: of a shared provider nothing is left but its address."""
    if "shared_provider" in request.fixturenames:
        request.getfixturevalue("shared_provider").forget()


@pytest.fixture
def provider(shared_provider: Provider) -> Provider:
    return shared_provider


@pytest.fixture
def serve(tmp_path: Path, provider: Provider) -> Iterator[Callable[..., Server]]:
    """Starts servers whose provider `openai` is the test's; settings as keywords, flags as arguments."""
    with contextlib.ExitStack() as servers:

        def start(*arguments: str, folder: Path = tmp_path, **settings: str) -> Server:
            return servers.enter_context(Server(folder, *arguments, **{**settings_for(provider), **settings}))

        yield start


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()


@pytest.fixture
def demo_server(tmp_path: Path) -> Iterator[Server]:
    """A server as a first start has it: nothing configured."""
    with Server(tmp_path) as running:
        yield running
