"""The client that asks providers, without the service: HTTP/1.1 to a stand-in whose every byte a test writes.

Every test of the wire runs on uvloop and on asyncio's own loop, is bounded, and must leave nothing behind: no socket, no
timer, no task, no error that nobody looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import gzip
import inspect
import os
import shutil
import socket
import ssl
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import uvloop
from httptools import HttpParserError

import llmchat
from llmchat import HttpClient, Reply, Unreachable, WholeBody, encode_request, parse_url, proxy_of, read_whole
from tests.conftest import Server, settings_for
from tests.provider import Hang, Provider, openai_text, reset_on_close, unused_port
from tests.tcp_proxy import TcpProxy

SECONDS_MAX = 20  # of a test
BODY_BYTES_MAX = 50_000_000
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUEST_METHOD")

Test = Callable[..., Coroutine[Any, Any, None]]


def on_both_loops(test: Test) -> Callable[..., None]:
    """The test as a function for pytest: bounded, once on each event loop; it fails for what is left behind."""

    @functools.wraps(test)
    def run(loop: str, **arguments: Any) -> None:
        strays: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: strays.append(context))
            runner.run(bounded(test(**arguments)))
        gc.collect()  # what is unclosed warns now, and a warning is a failure
        assert not strays

    signature = inspect.signature(test)
    parameter = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), parameter])  # type: ignore[attr-defined]
    return pytest.mark.parametrize("loop", LOOPS)(run)


async def bounded(test: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        await test
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test meets no proxy of the machine that it runs on, nor what an earlier one's environment said."""
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    proxy_of.cache_clear()
    parse_url.cache_clear()
    yield
    proxy_of.cache_clear()
    parse_url.cache_clear()


# ── a provider that says what the test says ─────────────────────────────────────────────────────────────────────────


class Peer:
    """One connection, as the stand-in sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def request(self) -> bytes:
        """The next request, head and body. Raises IncompleteReadError where there is none."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        _, _, length = head.lower().partition(b"content-length: ")
        return head + await self.reader.readexactly(int(length.split(b"\r\n")[0] or 0))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def closed(self) -> None:
        """Returns once the client has closed."""
        with contextlib.suppress(OSError):
            while await self.reader.read(65_536):
                pass

    def reset(self) -> None:
        reset_on_close(self.writer)
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class StandIn:
    """A server on loopback. Its n-th connection takes the n-th script, and all further ones the last; then it closes.

    A script in bytes is the answer to every request. `requests` are all that came, `open` counts connections.
    """

    def __init__(self, *scripts: bytes | Script, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.scripts = scripts
        self.requests: list[bytes] = []
        self.accepted = 0
        self.problems: list[BaseException] = []
        self._tls, self._host = tls, host
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self._host, 0, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        scheme = "http" if self._tls is None else "https"
        self.url = f"{scheme}://{f'[{self._host}]' if ':' in self._host else self._host}:{self.port}/v1/chat"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()
        assert not self.problems

    @property
    def open(self) -> int:
        return len(self._tasks)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = self.scripts[min(self.accepted, len(self.scripts) - 1)]
        self.accepted += 1
        task = asyncio.get_running_loop().create_task(self._serve(script, Peer(reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, script: bytes | Script, peer: Peer) -> None:
        try:
            await self._play(script, peer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has closed
        except Exception as exc:
            self.problems.append(exc)
        finally:
            peer.writer.close()

    async def _play(self, script: bytes | Script, peer: Peer) -> None:
        if not isinstance(script, bytes):
            return await script(peer)
        while True:
            self.requests.append(await peer.request())
            await peer.send(script)


def answering(data: bytes) -> Script:
    """Takes one request, answers with these bytes, and closes."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(data)

    return script


def resetting(data: bytes) -> Script:
    """Takes one request, answers with these bytes, and resets the connection once the client may have read them."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(data)
        await asyncio.sleep(0.05)  # a reset overtakes what is not read yet: either end of the race is a broken body
        peer.reset()

    return script


def dripping(data: bytes, size: int = 1) -> Script:
    """Answers with these bytes in pieces, and leaves the closing to the client."""

    async def script(peer: Peer) -> None:
        await peer.request()
        for start in range(0, len(data), size):
            await peer.send(data[start : start + size])
            await asyncio.sleep(0)
        await peer.closed()

    return script


async def silent(peer: Peer) -> None:
    """Reads, and never says anything."""
    await peer.closed()


async def closing(_: Peer) -> None:
    """Closes as soon as there is a connection."""


async def resets(peer: Peer) -> None:
    """The same, with a reset."""
    peer.reset()


def ok(body: bytes = b"Hello", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n%b\r\n%b" % (len(body), lines.encode(), body)


def chunked(*pieces: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + last


UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"


@contextlib.asynccontextmanager
async def open_client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    try:
        yield client
    finally:
        await client.close()


async def post(client: HttpClient, url: str, body: bytes = b"{}") -> Reply:
    return await client.send("POST", url, {"accept": "*/*"}, body)


async def read(reply: Reply, bytes_max: int = BODY_BYTES_MAX) -> WholeBody:
    try:
        return await read_whole(reply, bytes_max, SECONDS_MAX)
    finally:
        await reply.close()


async def ask(client: HttpClient, url: str, body: bytes = b"{}") -> bytes:
    """The whole body of the answer to a question; it must be whole."""
    whole = await read(await post(client, url, body))
    if whole.error is not None:
        raise whole.error
    return bytes(whole.data)


async def until(condition: Callable[[], Any]) -> None:
    """Looks again and again until the condition holds; the test's own bound is the limit."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


def kept(client: HttpClient) -> int:
    return sum(map(len, client._kept.values()))


def resolve(*found: tuple[str, int], fails: OSError | None = None) -> list[str]:
    """From now on the running loop finds these addresses for every name, or fails; returns the names that are asked for."""
    asked: list[str] = []

    async def look_up(host: str, port: int, **more: Any) -> list[Any]:
        if llmchat.parse_ip(host) is not None:  # an address is found by itself, and uvloop asks for it
            return await look_up_really(host, port, **more)
        asked.append(host)
        if fails is not None:
            raise fails
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address, _ in found]
        rest = [(address, at, 0, 0) if ":" in address else (address, at) for address, at in found]
        return [(family, socket.SOCK_STREAM, 6, "", to) for family, to in zip(families, rest, strict=True)]

    look_up_really = asyncio.get_running_loop().getaddrinfo
    asyncio.get_running_loop().getaddrinfo = look_up  # type: ignore[method-assign, assignment]
    return asked


class Tls:
    """A certificate for provider.example and 127.0.0.1, which the client trusts."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
        names = "subjectAltName=DNS:provider.example,IP:127.0.0.1"
        paths = ["-addext", names, "-keyout", str(self.key), "-out", str(self.certificate)]
        subprocess.run([*command.split(), *paths], check=True, capture_output=True, timeout=60)

    def server(self, is_secure: bool) -> ssl.SSLContext | None:
        """What a stand-in needs for TLS; without it, nothing."""
        if not is_secure:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


@pytest.fixture(scope="module")
def made_tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    if shutil.which("openssl") is None:
        assert os.environ.get("CI") != "true", "openssl makes the certificate"
        pytest.skip("openssl makes the certificate")
    return Tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(made_tls: Tls, monkeypatch: pytest.MonkeyPatch) -> Tls:
    monkeypatch.setenv("SSL_CERT_FILE", str(made_tls.certificate))
    return made_tls


@pytest.fixture(params=[False, True], ids=["plain", "TLS"])
def is_secure(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# ── what is sent ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "address", "host", "target"),
    [
        ("http://127.0.0.1:11434/v1/chat", (False, "127.0.0.1", 11434), "127.0.0.1:11434", "/v1/chat"),
        ("https://api.example.org/v1", (True, "api.example.org", 443), "api.example.org", "/v1"),
        ("https://api.example.org:443/v1", (True, "api.example.org", 443), "api.example.org", "/v1"),
        ("http://api.example.org:443", (False, "api.example.org", 443), "api.example.org:443", "/"),
        (
            "HTTP://API.Example.org/V1?a=b%20c&d=é",
            (False, "api.example.org", 80),
            "api.example.org",
            "/V1?a=b%20c&d=%C3%A9",
        ),
        ("http://[::1]:8080/v1", (False, "::1", 8080), "[::1]:8080", "/v1"),
        ("https://bücher.example/v1", (True, "xn--bcher-kva.example", 443), "xn--bcher-kva.example", "/v1"),
        ("http://model_server:8000/v1", (False, "model_server", 8000), "model_server:8000", "/v1"),
    ],
)
def test_a_url_says_where_to_connect_and_what_to_ask_for(
    url: str, address: tuple[bool, str, int], host: str, target: str
) -> None:
    assert parse_url(url) == (address, host, target)


def test_a_request_has_one_host_its_headers_and_its_length() -> None:
    _, request = encode_request("POST", "http://h:1/v1?a=b", {"authorization": "Bearer k"}, '{"é":1}'.encode())
    assert request == (
        b"POST /v1?a=b HTTP/1.1\r\nhost: h:1\r\nauthorization: Bearer k\r\ncontent-length: 8\r\n\r\n"
        + '{"é":1}'.encode()
    )


def test_a_request_without_a_body_has_no_length() -> None:
    _, request = encode_request("GET", "http://h/v1/models", {}, None)
    assert request == b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n"


@on_both_loops
async def test_a_url_that_leads_nowhere_is_unreachable() -> None:
    async with open_client() as client:
        for url in (
            "http://[::1/v1",
            "http://[nope]/v1",
            "http://h:x/v1",
            "http://h:99999/v1",
            "http://127.0.0.1:99999/v1",
        ):
            with pytest.raises(Unreachable):
                await post(client, url)


@on_both_loops
async def test_a_question_of_megabytes_arrives_whole() -> None:
    async with StandIn(ok()) as provider, open_client() as client:
        body = bytes(range(256)) * 20_000
        assert await ask(client, provider.url, body) == b"Hello"
        assert provider.requests[0].endswith(b"\r\n\r\n" + body)


# ── where a body ends, and whether its connection is kept ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("data", "body", "is_kept"),
    [
        pytest.param(ok(), b"Hello", True, id="a length"),
        pytest.param(ok(b""), b"", True, id="a length of 0"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", b"", True, id="no content"),
        pytest.param(chunked(b"Hel", b"lo"), b"Hello", True, id="chunks"),
        pytest.param(chunked(), b"", True, id="no chunks"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n5;a=b;c=\"d\"\r\nHello\r\n00;e\r\n\r\n", b"Hello", True,
            id="chunks with extensions",
        ),
        pytest.param(
            chunked(b"Hello", last=b"0\r\nx-checksum: 1\r\ncontent-encoding: gzip\r\n\r\n"), b"Hello", True, id="trailers"
        ),
        pytest.param(ok().replace(b"\r\n", b"\n"), b"Hello", True, id="lines that end in LF"),
        pytest.param(ok() + b"\r\n", b"Hello", True, id="an empty line after the body"),
        pytest.param(ok(upgrade="h2,h2c", connection="Upgrade, Keep-Alive"), b"Hello", True, id="an offer to upgrade"),
        pytest.param(ok(connection="keep-alive"), b"Hello", True, id="keep-alive"),
        pytest.param(ok(connection="close"), b"Hello", False, id="close"),
        pytest.param(ok(connection="X-Other, CLOSE"), b"Hello", False, id="close, among others"),
        pytest.param(chunked(b"Hello").replace(b"1.1", b"1.0"), b"Hello", False, id="HTTP/1.0 in chunks"),
        pytest.param(ok().replace(b"1.1", b"1.0"), b"Hello", False, id="HTTP/1.0"),
        pytest.param(ok(connection="keep-alive").replace(b"1.1", b"1.0"), b"Hello", True, id="HTTP/1.0 with keep-alive"),
        pytest.param(ok() + ok(b"Other"), b"Hello", False, id="a second reply"),
        pytest.param(ok() + b"garbage", b"Hello", False, id="garbage after the body"),
        pytest.param(ok(connection="close") + b"garbage", b"Hello", False, id="garbage after the last body"),
    ],
)  # fmt: skip
@on_both_loops
async def test_a_body_is_whole_at_its_end_and_its_connection_is_kept_if_it_may_be(
    data: bytes, body: bytes, is_kept: bool
) -> None:
    async with StandIn(data) as provider, open_client() as client:
        for _ in range(3):
            assert await ask(client, provider.url) == body
        assert provider.accepted == (1 if is_kept else 3)
        assert len(provider.requests) == 3
        await until(lambda: provider.open == kept(client) == is_kept)


@pytest.mark.parametrize("data", [ok(b"Hello" * 9), chunked(b"Hello" * 8, b"Hello", last=b"0\r\na: b\r\n\r\n")])
@on_both_loops
async def test_a_reply_that_comes_byte_by_byte_is_the_same(data: bytes) -> None:
    async with StandIn(dripping(data)) as provider, open_client() as client:
        assert await ask(client, provider.url) == b"Hello" * 9
        assert kept(client) == 1


@pytest.mark.parametrize("data", [UNTIL_CLOSE + b"Hello", b"HTTP/1.0 200 OK\r\n\r\nHello"])
@on_both_loops
async def test_a_body_without_a_length_ends_with_its_connection(data: bytes) -> None:
    async with StandIn(answering(data)) as provider, open_client() as client:
        assert await ask(client, provider.url) == b"Hello"
        assert kept(client) == 0


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(ok(b"Hello").replace(b"5", b"6"), id="a length"),
        pytest.param(chunked(b"Hello", last=b""), id="between two chunks"),
        pytest.param(chunked(b"Hello", last=b"5\r\nHe"), id="within a chunk"),
        pytest.param(chunked(b"Hello", last=b"0\r\n"), id="before the end of the last chunk"),
        pytest.param(chunked(b"Hello", last=b"0\r\na: b\r\n"), id="within the trailers"),
    ],
)
@on_both_loops
async def test_a_body_that_is_cut_is_told_from_a_whole_one(data: bytes) -> None:
    async with StandIn(answering(data)) as provider, open_client() as client:
        body = await read(await post(client, provider.url))
        assert body.data.startswith(b"Hello")
        assert isinstance(body.error, ConnectionResetError)


@on_both_loops
async def test_a_reset_is_never_the_end_of_a_body() -> None:
    async with StandIn(resetting(UNTIL_CLOSE + b"Hello")) as provider, open_client() as client:
        body = await read(await post(client, provider.url))
        assert isinstance(body.error, OSError)


@pytest.mark.parametrize("last", [b"x\r\nHello\r\n", b"-1\r\n", b"fffffffffffffffff\r\n", b"1\r\nHello\r\n"])
@on_both_loops
async def test_chunks_that_are_none_break_the_body_off(last: bytes) -> None:
    async with StandIn(chunked(b"Hello", last=last)) as provider, open_client() as client:
        body = await read(await post(client, provider.url))
        assert body.data.startswith(b"Hello")
        assert isinstance(body.error, HttpParserError)
        await until(lambda: provider.open == 0)


@on_both_loops
async def test_trailers_are_no_headers() -> None:
    last = b"0\r\nretry-after: 99\r\ncontent-type: text/html\r\nlater: yes\r\n\r\n"
    async with StandIn(chunked(b"Hello", last=last)) as provider, open_client() as client:
        reply = await post(client, provider.url)
        assert (await read(reply)).data == b"Hello"
        assert reply.headers == {"transfer-encoding": "chunked"}


@on_both_loops
async def test_a_body_that_is_taken_late_is_whole() -> None:
    async with StandIn(dripping(chunked(*[b"Hello"] * 50), 16)) as provider, open_client() as client:
        reply = await post(client, provider.url)
        await until(lambda: kept(client) == 1)
        assert (await read(reply)).data == b"Hello" * 50


@on_both_loops
async def test_an_answer_before_the_question_was_taken_leaves_no_half_question_for_the_next() -> None:
    async def refuse(peer: Peer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        await asyncio.sleep(SECONDS_MAX)

    async with StandIn(refuse, ok()) as provider, open_client() as client:
        reply = await post(client, provider.url, b" " * 30_000_000)
        assert reply.status == 413 and (await read(reply)).error is None
        assert await ask(client, provider.url) == b"Hello"
        assert provider.accepted == 2


@on_both_loops
async def test_a_refusal_before_the_question_was_taken_is_read_although_the_connection_closes() -> None:
    async def refuse(peer: Peer) -> None:
        await peer.reader.read(1)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await peer.send(b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno")
        await asyncio.sleep(0.01)  # what then closes with a reset would overtake it

    async with StandIn(refuse) as provider, open_client() as client:
        for _ in range(5):
            reply = await post(client, provider.url, b" " * 30_000_000)
            assert reply.status == 413 and (await read(reply)).data == b"no"


@on_both_loops
async def test_a_provider_that_says_its_last_word_before_it_took_the_question_keeps_nobody_waiting() -> None:
    async def turn_away(peer: Peer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await peer.send(UNTIL_CLOSE + b"Hello")
        peer.writer.write_eof()
        await done.wait()

    done = asyncio.Event()
    async with StandIn(turn_away) as provider, open_client() as client:
        assert await ask(client, provider.url, b" " * 30_000_000) == b"Hello"
        done.set()


# ── heads ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_both_loops
async def test_status_and_headers_are_told_by_names_in_lower_case() -> None:
    data = b"HTTP/1.1 429 Slow Down\r\nRETRY-After:  7 \r\nX-Latin: \xe9\r\nContent-Length: 2\r\n\r\nno"
    async with StandIn(data) as provider, open_client() as client:
        reply = await post(client, provider.url)
        assert reply.status == 429
        assert reply.headers == {"retry-after": "7", "x-latin": "é", "content-length": "2"}
        assert (await read(reply)).data == b"no"


@on_both_loops
async def test_interim_replies_are_passed_over_with_their_headers() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\ncontent-encoding: gzip\r\n\r\n"
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + hints
    async with StandIn(interim + ok(), dripping(interim + ok(b"World"))) as provider:
        for expected in (b"Hello", b"World"):
            async with open_client() as client:
                reply = await post(client, provider.url)
                assert (reply.status, reply.headers) == (200, {"content-length": "5"})
                assert (await read(reply)).data == expected
                assert kept(client) == 1


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.1 101 Switching\r\nconnection: Upgrade\r\nupgrade: h2c\r\n\r\n", id="another protocol"),
        pytest.param(b"HTTP/1.1 101 Switching\r\n\r\n", id="another protocol, without saying which"),
        pytest.param(b"SSH-2.0-OpenSSH_9.9\r\n", id="SSH"),
        pytest.param(b"\x15\x03\x03\x00\x02\x02\x50", id="TLS"),
        pytest.param(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", id="HTTP/2"),
        pytest.param(b"<html>Hello</html>", id="HTTP/0.9"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="a request"),
        pytest.param(b"HTTP/1.1 OK\r\n\r\n", id="no status"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", id="two lengths"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n", id="a negative length"),
        pytest.param(chunked(b"a").replace(b"\r\n\r\n", b"\r\ncontent-length: 1\r\n\r\n", 1), id="a length and chunks"),
    ],
)
@on_both_loops
async def test_what_is_not_http_is_an_error_and_its_connection_closes(data: bytes) -> None:
    async with StandIn(data) as provider, open_client() as client:
        with pytest.raises(HttpParserError, match=r"[a-z]"):
            await post(client, provider.url)
        await until(lambda: provider.open == 0)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nx: " + b"a" * 300_000, id="a header"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000, id="headers"),
        pytest.param(b"HTTP/1.1 200 " + b"a" * 300_000, id="a first line"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 12_000, id="interim replies"),
    ],
)
@on_both_loops
async def test_a_head_without_an_end_is_an_error_and_its_connection_closes(data: bytes) -> None:
    async with StandIn(dripping(data, 10_000)) as provider, open_client() as client:
        with pytest.raises(HttpParserError, match="headers are larger than 65,536 bytes"):
            await post(client, provider.url)
        await until(lambda: provider.open == 0)


@on_both_loops
async def test_large_headers_below_the_limit_are_read() -> None:
    async with StandIn(dripping(ok(x="a" * 60_000), 10_000)) as provider, open_client() as client:
        reply = await post(client, provider.url)
        assert reply.headers["x"] == "a" * 60_000
        assert (await read(reply)).data == b"Hello"


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nx: y\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
@pytest.mark.parametrize("ending", [answering, resetting])
@on_both_loops
async def test_a_connection_that_closes_before_the_head_is_an_error(data: bytes, ending: Callable[..., Script]) -> None:
    async with StandIn(ending(data)) as provider, open_client() as client:
        with pytest.raises(ConnectionError):
            await post(client, provider.url)


@on_both_loops
async def test_a_provider_that_closes_at_once_keeps_nobody_waiting() -> None:
    async with StandIn(closing, resets, closing, resets, closing) as provider, open_client() as client:
        for _ in range(30):
            with pytest.raises((OSError, Unreachable)):
                await post(client, provider.url)


# ── connections that are kept ───────────────────────────────────────────────────────────────────────────────────────


@on_both_loops
async def test_questions_at_once_have_connections_of_their_own_which_are_all_kept() -> None:
    async with StandIn(ok()) as provider, open_client() as client:
        for _ in range(2):
            replies = await asyncio.gather(*(post(client, provider.url) for _ in range(5)))
            assert [(await read(reply)).data for reply in replies] == [b"Hello"] * 5
            assert (provider.accepted, kept(client)) == (5, 5)


@on_both_loops
async def test_a_kept_connection_is_for_its_own_address_alone() -> None:
    async with StandIn(ok(b"one")) as one, StandIn(ok(b"other")) as other, open_client() as client:
        for _ in range(2):
            assert await ask(client, one.url) == b"one"
            assert await ask(client, other.url) == b"other"
        assert (one.accepted, other.accepted, kept(client)) == (1, 1, 2)


@pytest.mark.parametrize("data", [ok(b"Surprise"), b"HTTP/1.1 408 Timeout\r\n\r\n", b"\r\n"])
@on_both_loops
async def test_what_comes_on_an_idle_connection_closes_it(data: bytes) -> None:
    speak = asyncio.Event()

    async def surprise(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        await speak.wait()
        await peer.send(data)
        await peer.closed()

    async with StandIn(surprise, ok(b"World")) as provider, open_client() as client:
        assert await ask(client, provider.url) == b"Hello"
        assert kept(client) == 1
        speak.set()
        await until(lambda: kept(client) == 0)
        assert await ask(client, provider.url) == b"World"
        await until(lambda: provider.open == 1)


@pytest.mark.parametrize("ending", [answering, resetting])
@on_both_loops
async def test_a_kept_connection_that_its_provider_closed_is_not_used_again(ending: Callable[..., Script]) -> None:
    async with StandIn(ending(ok()), ok(b"World")) as provider, open_client() as client:
        assert await ask(client, provider.url) == b"Hello"
        await until(lambda: kept(client) == 0)
        assert await ask(client, provider.url) == b"World"


@on_both_loops
async def test_a_kept_connection_that_is_about_to_be_closed_is_not_used_again() -> None:
    async with StandIn(ok()) as provider, open_client() as client:
        assert await ask(client, provider.url) == b"Hello"
        (connections,) = client._kept.values()
        for connection in connections:
            connection.transport.abort()  # which the connection is told in the loop's next turn
        assert kept(client) == 1 and await ask(client, provider.url) == b"Hello"
        assert provider.accepted == 2


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\n"])
@on_both_loops
async def test_a_question_on_a_kept_connection_that_closes_is_not_asked_twice(data: bytes) -> None:
    asked: list[bytes] = []

    async def once(peer: Peer) -> None:
        asked.append(await peer.request())
        await peer.send(ok())
        asked.append(await peer.request())
        await peer.send(data)

    async with StandIn(once) as provider, open_client() as client:
        assert await ask(client, provider.url) == b"Hello"
        with pytest.raises(ConnectionError):
            await post(client, provider.url)
        assert (len(asked), provider.accepted) == (2, 1)


@on_both_loops
async def test_a_connection_is_not_kept_for_ever() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llmchat, "KEPT_SECONDS", 0.05)
        async with StandIn(ok()) as provider, open_client() as client:
            assert await ask(client, provider.url) == b"Hello"
            await until(lambda: provider.open == 0)
            assert kept(client) == 0
            await until(lambda: client._timer is None)
            assert await ask(client, provider.url) == b"Hello"
            await until(lambda: provider.open == 0)


@on_both_loops
async def test_closing_the_client_closes_what_is_kept_and_stops_its_timer() -> None:
    async with StandIn(ok()) as provider:
        async with open_client() as client:
            await asyncio.gather(*(ask(client, provider.url) for _ in range(3)))
            timer = client._timer
            assert timer is not None and kept(client) == 3
        await until(lambda: provider.open == 0)
        assert timer.cancelled() and kept(client) == 0


@on_both_loops
async def test_a_reply_that_ends_after_the_client_was_closed_keeps_no_connection() -> None:
    finish = asyncio.Event()

    async def late(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok()[:-1])
        await finish.wait()
        await peer.send(b"o")
        await peer.closed()

    async with StandIn(late) as provider:
        async with open_client() as client:
            reply = await post(client, provider.url)
        finish.set()
        assert (await read(reply)).data == b"Hello"
        await until(lambda: provider.open == 0)
        assert kept(client) == 0


# ── pausing, closing, cancelling ────────────────────────────────────────────────────────────────────────────────────


class Flood:
    """A script that sends pieces of a body for as long as they are taken, then the last; `sent` counts their bytes."""

    def __init__(self) -> None:
        self.sent = 0
        self.is_enough = False

    async def __call__(self, peer: Peer) -> None:
        await peer.request()
        await peer.send(chunked(last=b""))
        while not self.is_enough:
            await peer.send(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
            self.sent += 65_536
        await peer.send(b"0\r\n\r\n")
        await peer.closed()

    async def stop(self) -> None:
        """Returns once the network holds as much as it can."""
        sent = -1
        while sent != self.sent:
            sent = self.sent
            await asyncio.sleep(0.2)


@on_both_loops
async def test_a_paused_reply_has_its_provider_wait_until_it_is_resumed(tls: Tls, is_secure: bool) -> None:
    flood = Flood()
    async with StandIn(flood, tls=tls.server(is_secure)) as provider, open_client() as client:
        reply = await post(client, provider.url)
        body = WholeBody(10**10)
        reply.attach(body)
        reply.pause()
        reply.pause()
        await flood.stop()
        arrived, sent = len(body.data), flood.sent
        assert arrived < sent
        flood.is_enough = True
        reply.resume()
        reply.resume()
        await body.wait()
        assert body.error is None and len(body.data) == flood.sent > arrived
        assert kept(client) == 1


@on_both_loops
async def test_a_paused_reply_whose_connection_closes_is_whole_once_it_is_resumed(tls: Tls, is_secure: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(UNTIL_CLOSE + b"Hello")
        await paused.wait()
        await peer.send(b", World" * 1_000)
        peer.writer.close()
        closed.set()

    paused, closed = asyncio.Event(), asyncio.Event()
    async with StandIn(script, tls=tls.server(is_secure)) as provider, open_client() as client:
        reply = await post(client, provider.url)
        body = WholeBody(BODY_BYTES_MAX)
        reply.attach(body)
        await until(lambda: body.data)
        reply.pause()
        paused.set()
        await closed.wait()
        await asyncio.sleep(0.05)
        assert body.data == b"Hello" and body.error is None
        reply.resume()
        await body.wait()
        assert body.data == b"Hello" + b", World" * 1_000 and body.error is None


@on_both_loops
async def test_a_paused_reply_whose_connection_is_reset_is_broken_off_once_it_is_resumed() -> None:
    flood = Flood()

    async def script(peer: Peer) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await flood(peer)
        peer.reset()

    async with StandIn(script) as provider, open_client() as client:
        reply = await post(client, provider.url)
        reply.pause()
        body = WholeBody(10**10)
        reply.attach(body)
        await until(lambda: provider.open == 0)
        reply.resume()
        await body.wait()
        assert isinstance(body.error, OSError)


@pytest.mark.parametrize("data", [ok(), ok(connection="close")])
@on_both_loops
async def test_pausing_what_is_over_does_nothing_to_the_next_reply(data: bytes) -> None:
    async with StandIn(data) as provider, open_client() as client:
        over = await post(client, provider.url)
        await read(over)
        over.pause()
        reply = await post(client, provider.url)
        over.pause()
        over.resume()
        await over.close()
        assert (await read(reply)).data == b"Hello"
        reply.resume()


@on_both_loops
async def test_closing_a_reply_closes_its_connection_at_once_and_nothing_more_is_fed(tls: Tls, is_secure: bool) -> None:
    flood = Flood()
    async with StandIn(flood, tls=tls.server(is_secure)) as provider, open_client() as client:
        reply = await post(client, provider.url)
        body = WholeBody(10**10)
        reply.attach(body)
        await until(lambda: body.data)
        await reply.close()
        await reply.close()
        reply.pause()
        reply.resume()
        fed = len(body.data)
        await until(lambda: provider.open == 0)
        assert len(body.data) == fed and kept(client) == 0


@on_both_loops
async def test_a_reply_that_nobody_takes_is_closed_without_a_trace() -> None:
    async with StandIn(ok() + b"more", chunked(b"Hello", last=b""), UNTIL_CLOSE) as provider, open_client() as client:
        for _ in range(3):
            await (await post(client, provider.url)).close()
        await until(lambda: provider.open == 0)


@on_both_loops
async def test_a_cancelled_wait_for_a_head_closes_the_connection_at_once() -> None:
    async with StandIn(dripping(b"HTTP/1.1 200")) as provider, open_client() as client:
        question = asyncio.create_task(post(client, provider.url))
        await until(lambda: provider.open == 1)
        question.cancel()
        with pytest.raises(asyncio.CancelledError):
            await question
        await until(lambda: provider.open == 0)


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["::1", "127.0.0.1"], ["127.0.0.1", "127.0.0.1"]])
@on_both_loops
async def test_a_question_cancelled_at_any_step_leaves_nothing_open(
    tls: Tls, is_secure: bool, addresses: list[str]
) -> None:
    """The step is the turn of the loop: before the look-up, in it, while connecting, in the handshake, and so on."""
    async with StandIn(dripping(chunked(b"Hello", b"World"), 8), tls=tls.server(is_secure)) as provider:
        url = provider.url.replace("127.0.0.1", "provider.example")
        resolve(*((address, provider.port) for address in addresses))
        turns, is_done = 0, False
        while not is_done:
            async with open_client() as client:
                question = asyncio.create_task(ask(client, url))
                for _ in range(turns):
                    await asyncio.sleep(0)
                is_done = question.done()
                question.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    assert await question == b"HelloWorld"
            turns += 1 + turns // 8
        await until(lambda: provider.open == 0)
        gc.collect()
        assert turns > 8


# ── connecting ──────────────────────────────────────────────────────────────────────────────────────────────────────


@on_both_loops
async def test_a_refused_connection_is_unreachable_in_plain_words() -> None:
    async with open_client() as client:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(Unreachable, match=r"Connection refused|Connect call failed"):
                await post(client, f"http://{host}:{unused_port()}/v1")


@on_both_loops
async def test_a_name_that_is_not_found_is_unreachable() -> None:
    resolve(fails=socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    async with open_client() as client:
        with pytest.raises(Unreachable, match="Name or service not known"):
            await post(client, "http://provider.example/v1")


@pytest.mark.parametrize("host", ["a..b", "a" * 70 + ".example", ".example", "a b.example"])
@on_both_loops
async def test_a_name_that_cannot_be_one_is_unreachable(host: str) -> None:
    async with open_client() as client:
        for scheme in ("http", "https"):
            with pytest.raises(Unreachable):
                await post(client, f"{scheme}://{host}:{unused_port()}/v1")


@on_both_loops
async def test_a_provider_that_never_says_a_word_of_tls_is_unreachable_in_time() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llmchat, "PROVIDER_CONNECT_SECONDS", 0.2)
        async with StandIn(silent) as provider, open_client() as client:
            await client._secure()  # takes longer than that
            with pytest.raises(Unreachable, match="no connection within"):
                await post(client, provider.url.replace("http", "https"))
            await until(lambda: provider.open == 0)


@on_both_loops
async def test_an_address_that_is_the_providers_needs_no_look_up() -> None:
    async with StandIn(ok()) as provider, open_client() as client:
        asked = resolve(fails=socket.gaierror("asked"))
        assert await ask(client, provider.url) == b"Hello"
        assert not asked


@on_both_loops
async def test_a_name_with_two_addresses_leads_to_the_one_that_answers() -> None:
    """localhost is ::1 first, and most local servers listen on 127.0.0.1 alone."""
    async with StandIn(ok()) as provider, open_client() as client:
        asked = resolve(("::1", provider.port), ("127.0.0.1", provider.port))
        assert await ask(client, provider.url.replace("127.0.0.1", "localhost")) == b"Hello"
        assert (
            asked == ["localhost"] and provider.requests[0].split(b"\r\n")[1] == b"host: localhost:%d" % provider.port
        )


@on_both_loops
async def test_a_name_none_of_whose_addresses_answers_is_unreachable() -> None:
    port = unused_port()
    async with open_client() as client:
        resolve(("::1", port), ("127.0.0.1", port))
        with pytest.raises(Unreachable):
            await post(client, f"http://localhost:{port}/v1")
        resolve()
        with pytest.raises(Unreachable):
            await post(client, f"http://localhost:{port}/v1")


@on_both_loops
async def test_an_address_that_swallows_everything_holds_up_the_next_one_for_a_moment_only() -> None:
    async with StandIn(ok()) as provider, open_client() as client:
        with contextlib.ExitStack() as sockets:
            full = sockets.enter_context(socket.create_server(("127.0.0.2", 0), backlog=0))
            for _ in range(4):  # its queue is full: one more that knocks hears nothing
                knocking = sockets.enter_context(socket.socket())
                knocking.setblocking(False)
                knocking.connect_ex(full.getsockname())
            resolve(full.getsockname(), ("127.0.0.1", provider.port))
            assert await ask(client, provider.url.replace("127.0.0.1", "provider.example")) == b"Hello"


@on_both_loops
async def test_a_provider_on_ipv6_is_asked_by_its_address() -> None:
    try:
        async with StandIn(ok(), host="::1") as provider, open_client() as client:
            assert await ask(client, provider.url) == b"Hello"
            assert provider.requests[0].split(b"\r\n")[1] == b"host: [::1]:%d" % provider.port
    except OSError as exc:
        pytest.skip(f"there is no IPv6 here: {exc}")


@on_both_loops
async def test_a_name_in_any_script_is_looked_up_and_told_in_ascii() -> None:
    async with StandIn(ok()) as provider, open_client() as client:
        asked = resolve(("127.0.0.1", provider.port))
        assert await ask(client, provider.url.replace("127.0.0.1", "bücher.example")) == b"Hello"
        assert asked == ["xn--bcher-kva.example"] and b"host: xn--bcher-kva.example" in provider.requests[0]


# ── TLS ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_both_loops
async def test_a_secure_connection_is_asked_by_name_and_kept(tls: Tls) -> None:
    names: list[str | None] = []
    context = tls.server(True)
    assert context is not None
    context.sni_callback = lambda _, name, __: names.append(name)
    context.set_alpn_protocols(["h2", "http/1.1"])
    protocols: list[str | None] = []

    async def script(peer: Peer) -> None:
        protocols.append(peer.writer.get_extra_info("ssl_object").selected_alpn_protocol())
        for _ in range(2):
            await peer.request()
            await peer.send(chunked(b"Hello"))
        await peer.closed()

    async with StandIn(script, tls=context) as provider, open_client() as client:
        resolve(("127.0.0.1", provider.port))
        for _ in range(2):
            assert await ask(client, provider.url.replace("127.0.0.1", "provider.example")) == b"Hello"
        assert (names, protocols, provider.accepted) == (["provider.example"], ["http/1.1"], 1)


@on_both_loops
async def test_a_secure_connection_to_an_address_is_checked_too(tls: Tls) -> None:
    async with StandIn(ok(), tls=tls.server(True)) as provider, open_client() as client:
        assert await ask(client, provider.url) == b"Hello"


@on_both_loops
async def test_a_certificate_for_another_name_is_refused_before_anything_is_said(tls: Tls) -> None:
    async with StandIn(ok(), tls=tls.server(True)) as provider, open_client() as client:
        resolve(("127.0.0.1", provider.port))
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            await post(client, provider.url.replace("127.0.0.1", "other.example"))
        assert not provider.requests


@on_both_loops
async def test_a_certificate_that_nobody_vouches_for_is_refused(tls: Tls) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE")
        async with StandIn(ok(), tls=tls.server(True)) as provider, open_client() as client:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await post(client, provider.url)
            assert not provider.requests


@on_both_loops
async def test_certificates_that_cannot_be_read_make_a_provider_unreachable() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", "/nowhere/certificates.pem")
        async with open_client() as client:
            with pytest.raises(Unreachable):
                await post(client, "https://127.0.0.1:9/v1")


async def plain(peer: Peer) -> None:
    await peer.reader.read(1)
    await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize("script", [plain, closing, resets])
@on_both_loops
async def test_a_provider_without_tls_is_unreachable_by_it(script: Script) -> None:
    async with StandIn(script) as provider, open_client() as client:
        with pytest.raises(Unreachable):
            await post(client, provider.url.replace("http", "https"))
        await until(lambda: provider.open == 0)


@on_both_loops
async def test_a_provider_with_tls_is_not_asked_without_it(tls: Tls) -> None:
    async with StandIn(ok(), tls=tls.server(True)) as provider, open_client() as client:
        with pytest.raises((ConnectionError, HttpParserError)):
            await post(client, provider.url.replace("https", "http"))
        assert not provider.requests


@on_both_loops
async def test_a_secure_connection_that_closes_breaks_off_or_ends_like_any_other(tls: Tls) -> None:
    async with StandIn(closing, answering(b""), answering(ok()[:-1]), answering(UNTIL_CLOSE + b"Hello"), answering(ok()),
                       ok(b"World"), tls=tls.server(True)) as provider, open_client() as client:  # fmt: skip
        for _ in range(2):
            with pytest.raises(OSError):
                await post(client, provider.url)
        assert isinstance((await read(await post(client, provider.url))).error, OSError)
        assert await ask(client, provider.url) == b"Hello"
        assert await ask(client, provider.url) == b"Hello"
        await until(lambda: kept(client) == 0)
        assert await ask(client, provider.url) == b"World"


# ── bodies that come compressed ─────────────────────────────────────────────────────────────────────────────────────

PAGES = [b"data: %d\n\n" % number for number in range(2_000)]


def deflated(*pieces: bytes, bits: int) -> bytes:
    packer = zlib.compressobj(wbits=bits)
    return b"".join(packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("identity", b"".join(PAGES)),
        ("gzip", deflated(*PAGES, bits=31)),
        ("GZIP ", deflated(*PAGES, bits=31)),
        ("x-gzip", gzip.compress(b"".join(PAGES), mtime=0)),
        ("deflate", deflated(*PAGES, bits=15)),
        ("gzip", b"".join(gzip.compress(page, mtime=0) for page in PAGES)),
        ("", b"".join(PAGES)),
        ("none", b"".join(PAGES)),
        ("utf-8", b"".join(PAGES)),
    ],
    ids=[
        "identity",
        "gzip",
        "gzip in capitals",
        "gzip at once",
        "deflate",
        "gzip in members",
        "empty",
        "none",
        "utf-8",
    ],
)
@on_both_loops
async def test_a_body_is_handed_on_as_it_was_before_it_was_compressed(encoding: str, packed: bytes) -> None:
    data = ok(packed, content_encoding=encoding)
    async with StandIn(data, dripping(data, 1000)) as provider:
        for _ in range(2):
            async with open_client() as client:
                assert await ask(client, provider.url) == b"".join(PAGES)


@pytest.mark.parametrize(
    "packed",
    [b"Hello, this is no gzip", gzip.compress(bytes(30_000_000), mtime=0), gzip.compress(b"Hello", mtime=0) + b"World"],
    ids=["no gzip", "a bomb", "rubbish after the end"],
)
@on_both_loops
async def test_a_body_that_does_not_inflate_or_inflates_beyond_the_limit_is_broken_off(packed: bytes) -> None:
    async with StandIn(ok(packed, content_encoding="gzip")) as provider, open_client() as client:
        body = await read(await post(client, provider.url))
        assert isinstance(body.error, zlib.error | ValueError)
        assert len(body.data) <= llmchat.PROVIDER_EVENT_BYTES_MAX


# ── a body in one piece ─────────────────────────────────────────────────────────────────────────────────────────────


@on_both_loops
async def test_a_body_beyond_its_limit_is_given_up_and_its_connection_closed() -> None:
    async with StandIn(Flood()) as provider, open_client() as client:
        body = await read(await post(client, provider.url), 100_000)
        assert isinstance(body.error, ValueError) and "larger than 100,000 bytes" in str(body.error)
        await until(lambda: provider.open == 0)


@on_both_loops
async def test_a_body_that_never_ends_is_taken_as_far_as_it_came() -> None:
    async with StandIn(dripping(UNTIL_CLOSE + b"Hello")) as provider, open_client() as client:
        reply = await post(client, provider.url)
        body = await read_whole(reply, BODY_BYTES_MAX, 0.3)
        assert (body.data, body.error) == (b"Hello", None)
        await reply.close()
        await until(lambda: provider.open == 0)


# ── proxies ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ANY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "http://h/v1", None),
        ({"HTTP_PROXY": ANY}, "http://h/v1", ANY),
        ({"http_proxy": ANY}, "http://h/v1", ANY),
        ({"HTTP_PROXY": ANY}, "https://h/v1", None),
        ({"HTTPS_PROXY": ANY}, "https://h/v1", ANY),
        ({"https_proxy": ANY}, "https://h/v1", ANY),
        ({"HTTPS_PROXY": ANY}, "http://h/v1", None),
        ({"HTTPS_PROXY": ANY}, "HTTPS://H/v1", ANY),
        ({"ALL_PROXY": ANY}, "http://h/v1", ANY),
        ({"all_proxy": ANY}, "https://h/v1", ANY),
        ({"ALL_PROXY": "http://other", "HTTP_PROXY": ANY}, "http://h/v1", ANY),
        ({"HTTP_PROXY": "http://other", "http_proxy": ANY}, "http://h/v1", ANY),
        ({"HTTP_PROXY": ""}, "http://h/v1", None),
        ({"HTTP_PROXY": ANY, "http_proxy": ""}, "http://h/v1", None),
        ({"HTTP_PROXY": "proxy.example:3128"}, "http://h/v1", ANY),
        ({"ALL_PROXY": "socks5://127.0.0.1:1080"}, "https://h/v1", "socks5://127.0.0.1:1080"),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "*"}, "http://h/v1", None),
        ({"HTTP_PROXY": ANY, "no_proxy": "h"}, "http://h/v1", None),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "other, H.example ,"}, "http://h.example/v1", None),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "example"}, "http://h.example/v1", None),
        ({"HTTP_PROXY": ANY, "NO_PROXY": ".example"}, "http://h.example:81/v1", None),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "ample"}, "http://h.example/v1", ANY),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "127.0.0.1"}, "http://127.0.0.1:11434/v1", None),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "127.0.0.1:11434"}, "http://127.0.0.1:11434/v1", None),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "127.0.0.1:8000"}, "http://127.0.0.1:11434/v1", ANY),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "localhost"}, "http://127.0.0.1:11434/v1", ANY),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "localhost"}, "http://localhost:11434/v1", None),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "::1"}, "http://[::1]:11434/v1", None),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "[::1]"}, "http://[::1]:11434/v1", None),
        ({"HTTP_PROXY": ANY, "NO_PROXY": "::2"}, "http://[::1]:11434/v1", ANY),
    ],
)
def test_the_environment_says_which_proxy_a_url_takes(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str, proxy: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_of(url) == proxy


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        proxy_of.cache_clear()
        yield
    proxy_of.cache_clear()


NOWHERE = "http://provider.example/v1/chat"  # which only a proxy could find


@on_both_loops
async def test_a_question_through_a_proxy_names_the_whole_address_and_its_body_comes_as_it_flows() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        proxy.requests.append(await peer.request())
        await peer.send(chunked(b"Hello", last=b""))
        await go_on.wait()
        await peer.send(b"5\r\nWorld\r\n0\r\n\r\n")
        await peer.closed()

    async with StandIn(script) as proxy, open_client() as client:
        with environment(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}"):
            reply = await client.send("POST", NOWHERE, {"authorization": "Bearer k"}, b"{}")
            assert reply.status == 200
            body = WholeBody(BODY_BYTES_MAX)
            reply.attach(body)
            await until(lambda: body.data == b"Hello")
            go_on.set()
            await body.wait()
            await reply.close()
        assert (body.data, body.error) == (b"HelloWorld", None)
        head = proxy.requests[0].lower()
        assert head.startswith(b"post http://provider.example/v1/chat http/1.1\r\n") and head.endswith(b"\r\n\r\n{}")
        assert b"\r\nhost: provider.example\r\n" in head and b"\r\nauthorization: bearer k\r\n" in head
        assert b"\r\ncontent-length: 2\r\n" in head and head.count(b"host:") == 1


@on_both_loops
async def test_a_secure_provider_is_asked_through_a_tunnel_by_its_name(tls: Tls) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.write_eof()

    async def tunnel(peer: Peer) -> None:
        proxy.requests.append(await peer.reader.readuntil(b"\r\n\r\n"))
        reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
        with contextlib.closing(writer):
            await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(pump(peer.reader, writer), pump(reader, peer.writer))

    async with StandIn(ok(), tls=tls.server(True)) as provider, StandIn(tunnel) as proxy, open_client() as client:
        with environment(HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}"):
            for _ in range(2):
                assert await ask(client, provider.url.replace("127.0.0.1", "provider.example")) == b"Hello"
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await post(client, provider.url.replace("127.0.0.1", "other.example"))
        names = [request.split(b":")[0] for request in proxy.requests]
        assert names == [b"CONNECT provider.example", b"CONNECT other.example"]
        assert [request.split(b" ")[:2] for request in provider.requests] == [[b"POST", b"/v1/chat"]] * 2


@on_both_loops
async def test_a_proxy_gets_the_password_that_stands_in_its_address() -> None:
    async with StandIn(ok()) as proxy, open_client() as client:
        with environment(HTTP_PROXY=f"http://me:secret@127.0.0.1:{proxy.port}"):
            assert await ask(client, NOWHERE) == b"Hello"
        assert b"proxy-authorization: basic bwu6c2vjcmv0\r\n" in proxy.requests[0].lower()
        with environment(HTTP_PROXY="ftp://me:secret@127.0.0.1"), pytest.raises(Unreachable) as caught:
            await post(client, NOWHERE)
        assert "secret" not in str(caught.value)


@on_both_loops
async def test_connections_to_a_proxy_are_kept_and_closed_with_the_client() -> None:
    async with StandIn(ok()) as proxy:
        with environment(ALL_PROXY=f"127.0.0.1:{proxy.port}"):
            async with open_client() as client:
                for _ in range(3):
                    assert await ask(client, NOWHERE) == b"Hello"
                assert (proxy.accepted, proxy.open) == (1, 1)
        await until(lambda: proxy.open == 0)


@on_both_loops
async def test_no_proxy_is_asked_for_an_address_that_is_excepted() -> None:
    async with StandIn(ok(b"proxy")) as proxy, StandIn(ok(b"provider")) as provider, open_client() as client:
        with environment(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}"):
            assert await ask(client, provider.url) == b"proxy"
        with environment(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}", NO_PROXY="127.0.0.1"):
            assert await ask(client, provider.url) == b"provider"


@on_both_loops
async def test_a_proxy_that_is_down_or_cannot_be_one_is_unreachable() -> None:
    port = unused_port()
    proxies = (f"http://127.0.0.1:{port}", "http://[::1", "ftp://127.0.0.1", "socks4://127.0.0.1:1", "http://h:x")
    for proxy in proxies:
        async with open_client() as client:
            with (
                environment(HTTP_PROXY=proxy),
                pytest.raises(Unreachable, match="through the proxy that the environment"),
            ):
                await post(client, NOWHERE)


@on_both_loops
async def test_a_socks_proxy_without_the_package_for_it_is_unreachable() -> None:
    with pytest.MonkeyPatch.context() as patch, environment(ALL_PROXY="socks5://127.0.0.1:1080"):
        patch.setitem(sys.modules, "socksio", None)
        async with open_client() as client:
            with pytest.raises(Unreachable, match=r"through the proxy that the environment names: .*socksio"):
                await post(client, NOWHERE)


@pytest.mark.parametrize("data", [b"HTTP/1.1 407 No\r\ncontent-length: 0\r\n\r\n", b"HTTP/1.1 502 No\r\n\r\n"])
@on_both_loops
async def test_a_proxy_that_refuses_a_tunnel_makes_a_provider_unreachable(data: bytes) -> None:
    async with StandIn(answering(data)) as proxy, open_client() as client:
        with environment(HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}"), pytest.raises(Unreachable, match=r"40|50"):
            await post(client, NOWHERE.replace("http", "https"))


@on_both_loops
async def test_a_refusal_of_a_proxy_without_a_tunnel_is_a_reply() -> None:
    async with (
        StandIn(b"HTTP/1.1 502 Bad\r\nRetry-After: 1\r\ncontent-length: 2\r\n\r\nno") as proxy,
        open_client() as client,
    ):
        with environment(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}"):
            reply = await post(client, NOWHERE)
            assert (reply.status, reply.headers["retry-after"]) == (502, "1")
            assert (await read(reply)).data == b"no"


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\n", b"garbage\r\n\r\n"])
@on_both_loops
async def test_a_proxy_that_breaks_off_before_the_head_is_an_error(data: bytes) -> None:
    async with StandIn(answering(data)) as proxy, open_client() as client:
        with environment(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}"), pytest.raises(ConnectionError):
            await post(client, NOWHERE)


@on_both_loops
async def test_a_body_through_a_proxy_that_is_cut_is_told_from_a_whole_one() -> None:
    async with StandIn(answering(chunked(b"Hello", last=b""))) as proxy, open_client() as client:
        with environment(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}"):
            body = await read(await post(client, NOWHERE))
        assert body.data == b"Hello" and body.error is not None


@on_both_loops
async def test_closing_a_reply_through_a_proxy_closes_its_connection_also_when_it_is_paused() -> None:
    async with StandIn(Flood()) as proxy, open_client() as client:
        with environment(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}"):
            for is_attached in (True, False):
                reply = await post(client, NOWHERE)
                body = WholeBody(10**10)
                if is_attached:
                    reply.attach(body)
                    reply.pause()
                    await until(lambda taken=body: taken.data)
                    assert proxy.open == 1
                await reply.close()
                await until(lambda: proxy.open == 0)


@on_both_loops
async def test_a_question_through_a_proxy_cancelled_at_any_turn_leaves_nothing_open() -> None:
    async with StandIn(dripping(chunked(b"Hello", b"World"), 8)) as proxy:
        with environment(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}"):
            turns, is_done = 0, False
            while not is_done:
                async with open_client() as client:
                    question = asyncio.create_task(ask(client, NOWHERE))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    is_done = question.done()
                    question.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        assert await question == b"HelloWorld"
                turns += 1 + turns // 8
        await until(lambda: proxy.open == 0)


# ── the whole service ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_service_streams_through_the_proxy_of_its_environment_and_past_it(
    tmp_path: Path, provider: Provider
) -> None:
    settings = {
        **settings_for(provider),
        "OPENAI_BASE_URL": "http://provider.example/v1",
        "OTHER_BASE_URL": provider.base_url,
        "NO_PROXY": "127.0.0.1",
    }
    begun = openai_text("Hel", finish=None, usage=None, done=False)
    provider.script(
        *([*begun, provider.gate(name), *openai_text("lo")] for name in ("past", "through")), [*begun, Hang()]
    )
    with TcpProxy(provider.port) as proxy, Server(tmp_path, HTTP_PROXY=proxy.origin, **settings) as server:
        for gate, model, accepted in (("past", "other/m", 0), ("through", "openai/m", 1)):
            with server.chat(model=model) as stream:
                events = stream.events()
                assert next(event.data["text"] for event in events if event.name == "delta") == "Hel"
                provider.open_gate(gate)
                assert [event.data["text"] for event in events if event.name == "delta"] == ["lo"]
            assert proxy.accepted == accepted
        message_id = server.start_chat(model="openai/m")
        request = provider.wait_chats(3)[-1]
        assert request.headers["host"] == "provider.example" and proxy.accepted == 1  # it was kept
        assert server.post(f"/api/v1/messages/{message_id}/stop").json()["status"] == "stopped"
        request.wait_closed()
