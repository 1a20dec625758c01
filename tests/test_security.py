"""Safe by default, each test an attack: strangers, other owners, hostile pages, broken clients, one's own logs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import os
import re
import socket
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import llmchat
from tests import walk
from tests.client import EventStream
from tests.conftest import Server, open_client, wait_until
from tests.guarantees import Tuned, running_server
from tests.provider import Hang, Provider, openai_error, openai_text, redirect

ALICE, BOB, CAROL = walk.TOKENS.values()
SECONDS = 20


def ask(
    server: Server, method: str, path: str, token: str | None = None, headers: Any = None, **more: Any
) -> httpx.Response:
    """One request on a connection of its own, with exactly these headers beside httpx's."""
    given = [*(headers.items() if isinstance(headers, dict) else headers or ())]
    given += [("Authorization", f"Bearer {token}")] if token is not None else []
    with open_client(server.url) as client:
        return client.request(method, path, headers=given, **more)


def from_address(address: str) -> dict[str, str]:
    """What the trusted proxy of `users` says of a client: so each test has failures of its own."""
    return {"X-Forwarded-For": address}


def sign_in(server: Server, token: str, **headers: str) -> httpx.Response:
    return ask(server, "POST", "/sign-in", headers=headers, data={"token": token})


def cookie_of(response: httpx.Response) -> dict[str, str]:
    assert response.status_code == 303, response.text
    return {"Cookie": response.headers["set-cookie"].partition(";")[0]}


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), SECONDS)


def send_raw(server: Server, data: bytes) -> bytes:
    """All that comes back until the server closes."""
    with connect(server) as client:
        client.sendall(data)
        return read_to_end(client)


def read_to_end(client: socket.socket) -> bytes:
    received = bytearray()
    try:
        while data := client.recv(65_536):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)


def statuses(received: bytes) -> list[int]:
    return [int(one) for one in re.findall(rb"HTTP/1\.1 (\d+)", received)]


@pytest.fixture(scope="module")
def users(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Alice's and Bob's server behind a trusted proxy; what Alice has is in tests/walk.py."""
    settings = {
        "LLMCHAT_TRUSTED_PROXIES": "127.0.0.0/8",
        "LLMCHAT_CORS_ORIGINS": "https://app.example.org",
        "LLMCHAT_HOSTS": "chat.example.org",
        "LLMCHAT_DRAIN_SECONDS": "0",
    }
    with walk.start_server(tmp_path_factory.mktemp("users"), shared_provider, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def local(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as it is on a laptop: no token."""
    with running_server(tmp_path_factory.mktemp("local"), shared_provider) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a token that waits half a second where others wait half a minute."""
    constants = {"HEAD_SECONDS": 0.5, "BODY_STALL_SECONDS": 0.5, "BODY_BYTES_PER_SECOND": 1_000_000}
    folder = tmp_path_factory.mktemp("hasty")
    with Tuned(folder, shared_provider, constants=constants, LLMCHAT_TOKEN=ALICE) as server:
        yield server


# ── who may come in ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_on_a_public_address_a_token_is_made_kept_to_oneself_and_shown_once(serve: Callable[..., Server]) -> None:
    server = serve("--host", "0.0.0.0")
    wait_until(lambda: any("/sign-in?token=" in line for line in server.output), "the link")
    link = re.search(r"http://127\.0\.0\.1:\d+(/sign-in\?token=(\S+))", "".join(server.output))
    assert link and len(link[2]) >= 32
    kept = Path(f"{server.db}.token")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and kept.read_text().strip() == link[2]
    assert ask(server, "GET", "/api/v1/conversations").status_code == 401
    assert ask(server, "GET", "/api/v1/conversations", link[2]).status_code == 200
    cookie = cookie_of(ask(server, "GET", link[1]))
    assert ask(server, "GET", "/api/v1/conversations", headers=cookie).status_code == 200
    server.terminate()
    server.start()
    assert ask(server, "GET", "/api/v1/conversations", link[2]).status_code == 200
    assert ask(server, "GET", "/api/v1/conversations", headers=cookie).status_code == 200
    server.terminate()
    assert link[2] not in "".join([*server.output, *server.log])


def test_a_token_file_that_others_can_read_is_taken_away_from_them(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    kept = tmp_path / "llmchat.db.token"
    kept.write_text(ALICE + "\n")
    kept.chmod(0o644)
    server = serve("--host", "0.0.0.0")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert ask(server, "GET", "/api/v1/usage", ALICE).status_code == 200
    assert any("warning" in line and "open to others" in line for line in server.log)


@pytest.mark.parametrize("content", ["", "\n", "   ", "short", "\xff\xfe\x00", "two words of it"])
def test_a_token_file_without_a_token_lets_nobody_in(tmp_path: Path, content: str) -> None:
    (tmp_path / "db.token").write_text(content, "latin-1")
    with pytest.raises(llmchat.StartError, match="holds no token"):
        llmchat.with_token(llmchat.Config(host="0.0.0.0", db=str(tmp_path / "db")))


@pytest.mark.parametrize("users", [",", " , ", ",,,"])
@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_list_of_users_without_a_user_lets_nobody_in(users: str, host: str) -> None:
    with pytest.raises(llmchat.StartError, match="has no entry"):
        llmchat.token_owners(llmchat.with_token(llmchat.Config(host=host, users=users))[0])


def test_nobody_comes_in_without_a_token_beyond_this_machine() -> None:
    with pytest.raises(llmchat.StartError, match="nobody may come in"):
        llmchat.create_app(llmchat.Config(host="0.0.0.0"))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org", "localhost.", ""]
)
def test_only_the_loopback_address_goes_without_a_token(host: str, tmp_path: Path) -> None:
    config, is_new = llmchat.with_token(llmchat.Config(host=host, db=str(tmp_path / "db")))
    assert is_new and len(config.token) >= 32


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_the_loopback_address_needs_no_token(host: str) -> None:
    assert llmchat.with_token(llmchat.Config(host=host)) == (llmchat.Config(host=host), False)


@pytest.mark.parametrize("token", ["short", "        ", "pässword-ü-long", "with a space", "tab\tinside-it"])
def test_a_token_that_no_header_can_carry_or_that_is_short_stops_the_start(token: str) -> None:
    with pytest.raises(llmchat.StartError, match="LLMCHAT_TOKEN") as refused:
        llmchat.token_owners(llmchat.Config(token=token))
    assert token not in str(refused.value)


@pytest.mark.parametrize(
    "users",
    [
        "no-colon-secret-1",
        "a:short",
        "secret-secret-1:bob",
        "é:secret-secret-1",
        "a:secret-secret-1,a:secret-secret-2",
        "a:secret-secret-1,b:secret-secret-1",
        "a:secret secret-1",
    ],
)
def test_a_user_that_does_not_fit_stops_the_start_and_shows_no_token(users: str) -> None:
    with pytest.raises(llmchat.StartError, match=r"LLMCHAT_USERS: .*entry \d") as refused:
        llmchat.token_owners(llmchat.Config(users=users))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("number", "header"),
    list(
        enumerate(
            [
                "Bearer",
                "Bearer x",
                f"Bearer {ALICE}x",
                f"Bearer {ALICE[:-1]}",
                f"Bearer {ALICE.upper()}",
                f"Bearer {ALICE} {ALICE}",
                f"Bearer {ALICE}, Bearer {ALICE}",
                "Bearer null",
                f"Basic {ALICE}",
                ALICE,
                f"Token {ALICE}",
                "Bearer " + "a" * 60_000,
            ]
        )
    ),
)
def test_what_is_not_the_token_is_refused(users: Server, number: int, header: str) -> None:
    response = ask(
        users, "GET", "/api/v1/conversations", headers={"Authorization": header, **from_address(f"10.0.0.{number}")}
    )
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"


def test_a_token_at_any_other_place_is_none(users: Server) -> None:
    for headers in ({"Cookie": f"llmchat_session={ALICE}"}, {"X-Api-Key": ALICE}, {"Cookie": f"token={ALICE}"}):
        assert ask(users, "GET", "/api/v1/conversations", headers=headers).status_code == 401
    assert ask(users, "GET", f"/api/v1/conversations?token={ALICE}").status_code == 401


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    genuine = llmchat.hmac.compare_digest
    monkeypatch.setattr(
        llmchat.hmac, "compare_digest", lambda one, other: compared.append((one, other)) or genuine(one, other)
    )
    gate = llmchat.Gate(llmchat.Config(users=walk.USERS), llmchat.Store("unused"))
    assert gate.owner_of_token(scope_of(), ALICE) == "alice"
    assert len(compared) == 3 and all(len(one) == len(other) == 64 for one, other in compared)


# ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_session_cookie_is_out_of_reach_for_scripts_and_other_sites(users: Server) -> None:
    response = sign_in(users, ALICE)
    name, *attributes = response.headers["set-cookie"].split("; ")
    assert re.fullmatch(r"llmchat_session=[\w-]{43}", name)
    assert sorted(attributes) == ["HttpOnly", f"Max-Age={30 * 86_400}", "Path=/", "SameSite=Lax"]


@pytest.mark.parametrize("proto", ["https", "HTTPS", "http, https"])
def test_behind_a_trusted_tls_proxy_the_cookie_is_secure(users: Server, proto: str) -> None:
    assert sign_in(users, ALICE, **{"X-Forwarded-Proto": proto}).headers["set-cookie"].endswith("; Secure")


def test_a_page_that_came_by_tls_gets_a_secure_cookie_whatever_the_proxy_says(users: Server) -> None:
    response = sign_in(users, ALICE, Host="chat.example.org", Origin="https://chat.example.org")
    assert response.headers["set-cookie"].endswith("; Secure")


def test_a_session_ends_with_its_sign_out_its_time_and_its_token(serve: Callable[..., Server]) -> None:
    server = serve(LLMCHAT_TOKEN=ALICE)
    kept, ended, stale = (cookie_of(sign_in(server, ALICE)) for _ in range(3))
    assert (
        ask(server, "POST", "/sign-out", headers=ended).headers["set-cookie"].startswith("llmchat_session=; Max-Age=0")
    )
    assert [ask(server, "GET", "/api/v1/usage", headers=one).status_code for one in (kept, ended, stale)] == [
        200,
        401,
        200,
    ]
    server.terminate()
    expire(server, stale["Cookie"])
    server.start()
    assert [ask(server, "GET", "/api/v1/usage", headers=one).status_code for one in (kept, ended, stale)] == [
        200,
        401,
        401,
    ]
    server.terminate()
    server.environment["LLMCHAT_TOKEN"] = BOB
    server.start()
    assert [ask(server, "GET", "/api/v1/usage", headers=one).status_code for one in (kept, ended, stale)] == [
        401,
        401,
        401,
    ]


def expire(server: Server, cookie: str) -> None:
    with contextlib.closing(sqlite3.connect(server.db)) as connection, connection:
        cookie_hash = hashlib.sha256(cookie.partition("=")[2].encode()).hexdigest()
        done = connection.execute(
            "UPDATE session SET expires_at_ms = ? WHERE cookie_hash = ?", (llmchat.now_ms(), cookie_hash)
        )
        assert done.rowcount == 1


def test_a_session_that_expires_while_the_server_runs_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, cookie = signed_in_gate()
    scope = scope_of(("cookie", f"llmchat_session={cookie}"))
    gate.admit(scope)
    assert scope["owner"] == "alice"
    later = llmchat.now_ms() + 30 * 86_400_000
    monkeypatch.setattr(llmchat, "now_ms", lambda: later)
    with pytest.raises(llmchat.Unauthorized):
        gate.admit(scope_of(("cookie", f"llmchat_session={cookie}")))


def signed_in_gate() -> tuple[Any, str]:
    class Nothing:
        async def write(self, *_: Any, **__: Any) -> None:
            pass

    gate = llmchat.Gate(llmchat.Config(users=walk.USERS), Nothing())  # type: ignore[arg-type]
    cookie = asyncio.run(gate.sign_in(scope_of(), ALICE))
    return gate, cookie.partition("=")[2].partition(";")[0]


def scope_of(
    *headers: tuple[str, str], client: str = "192.0.2.1", method: str = "GET", path: str = "/x"
) -> dict[str, Any]:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in (("host", "localhost"), *headers)]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "headers": encoded,
        "client": (client, 1),
        "scheme": "http",
        "request_id": "r",
    }


def test_the_database_holds_neither_token_nor_cookie_nor_anything_to_guess_them_on(users: Server) -> None:
    cookie = cookie_of(sign_in(users, ALICE))["Cookie"].partition("=")[2]
    assert users.rows("SELECT count(*) FROM session WHERE owner = 'alice'")[0][0] >= 1
    content = b"".join(path.read_bytes() for path in users.folder.iterdir())
    for secret in (ALICE, BOB, cookie, *(hashlib.sha256(token.encode()).hexdigest() for token in (ALICE, BOB))):
        assert secret.encode() not in content
    for stored in users.rows("SELECT cookie_hash, token_hash FROM session"):
        for one in stored:
            assert ask(users, "GET", "/api/v1/usage", headers={"Cookie": f"llmchat_session={one}"}).status_code == 401


def test_the_files_are_for_their_owner_alone(users: Server) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in users.folder.iterdir()}
    assert {"llmchat.db", "llmchat.db-wal", "llmchat.db.lock"} <= set(modes) and set(modes.values()) == {0o600}


# ── other owners ────────────────────────────────────────────────────────────────────────────────────────────────────


def alices_things(server: Server) -> Any:
    """All that Alice has, as she sees it; the seconds of what runs go on."""
    things = [
        server.get(path).json()
        for path in ("/api/v1/conversations", "/api/v1/conversations/1", "/api/v1/conversations/2")
    ]
    running = server.get("/api/v1/generations").json()["generations"]
    return things, [(one["message_id"], one["characters"]) for one in running]


def test_an_outsiders_walk_gets_nothing(users: Server) -> None:
    wait_until(lambda: users.message(walk.RUNNING)["text"] == walk.SECRET, "what runs")
    before = alices_things(users)
    stranger = from_address("203.0.113.1")
    carol = {"Authorization": f"Bearer {CAROL}", **from_address("203.0.113.2")}
    visits = [*walk.walk(users, "stranger", stranger), *walk.walk(users, "carol", carol)]
    assert [visit for visit in visits if visit.status != visit.expected] == []
    assert [visit for visit in visits if visit.leaks] == []
    assert alices_things(users) == before


def test_what_the_walk_asks_for_is_there_for_its_owner(users: Server) -> None:
    """Else a 404 would say nothing."""
    for route, rule in walk.RULES.items():
        method, path = route.split()
        if rule is walk.PRIVATE and method == "GET":
            for one in walk.paths_of(path):
                headers = {"Authorization": f"Bearer {ALICE}"}
                with httpx.stream(
                    "GET", users.url + one, headers=headers, trust_env=False, timeout=SECONDS
                ) as response:
                    assert response.status_code == 200, one


def test_another_owners_cookie_gets_no_more_than_the_token(users: Server) -> None:
    before = alices_things(users)
    carol = {**cookie_of(sign_in(users, CAROL, **from_address("203.0.113.3"))), **from_address("203.0.113.3")}
    visits = list(walk.walk(users, "carol", carol))
    wrong = [
        visit for visit in visits if (visit.status != visit.expected and visit.route != "GET /sign-in") or visit.leaks
    ]
    last = max(index for index, visit in enumerate(visits) if visit.route == "POST /sign-out")
    assert wrong == [] and last == len(visits) - 1
    assert alices_things(users) == before


def test_another_owners_streams_of_html_and_heads_are_not_there(users: Server) -> None:
    for path in (
        "/api/v1/messages/2/stream?render=html",
        "/api/v1/messages/4/stream?render=html",
        "/api/v1/messages/2?render=html",
        "/api/v1/messages/4/stream?after=3",
        "/api/v1/conversations/1?render=html",
    ):
        assert ask(users, "GET", path, BOB).status_code == 404
        assert ask(users, "HEAD", path, BOB).status_code == 404
        assert ask(users, "HEAD", path).status_code == 401


def test_what_is_another_owners_is_told_in_the_words_of_what_is_not_there(users: Server) -> None:
    for method, path, body in (
        ("GET", "/api/v1/messages/{}", None),
        ("GET", "/api/v1/messages/{}/stream", None),
        ("POST", "/api/v1/messages/{}/stop", None),
        ("POST", "/api/v1/messages/{}/regenerate", {}),
        ("POST", "/api/v1/messages/{}/continue", {}),
        ("DELETE", "/api/v1/conversations/{}", None),
    ):
        words = []
        for one in ("2", "999"):
            response = ask(users, method, path.format(one), BOB, json=body)
            error = response.json()["error"]
            words.append(
                (response.status_code, error["code"], error["message"].replace(one, "N"), sorted(response.headers))
            )
        assert words[0] == words[1]


def test_another_owners_message_is_no_parent(users: Server) -> None:
    mine = ask(users, "POST", "/api/v1/chat", BOB, json={"message": "Mine", "stream": False}).json()["conversation_id"]
    answers = []
    for parent_id in (walk.COMPLETED, 999):
        body = {"message": "x", "stream": False, "conversation_id": mine, "parent_id": parent_id}
        answers.append(
            ask(users, "POST", "/api/v1/chat", BOB, json=body).json()["error"]["message"].replace(str(parent_id), "N")
        )
    assert answers[0] == answers[1] and "there is no message" in answers[0]


def test_a_search_finds_nothing_of_another_owner(users: Server) -> None:
    for query in (
        walk.SECRET,
        "Rosebud",
        f'"{walk.SECRET}" OR owner:*',
        "* OR 1",
        "o" + hashlib.sha256(b"alice").hexdigest()[:16],
    ):
        assert ask(users, "GET", "/api/v1/conversations", BOB, params={"query": query}).json()["conversations"] == []
    assert users.get("/api/v1/conversations", params={"query": walk.SECRET}).json()["conversations"] != []


def test_another_owners_idempotency_key_is_free(users: Server) -> None:
    response = ask(
        users,
        "POST",
        "/api/v1/chat",
        BOB,
        headers={"Idempotency-Key": walk.SECRET},
        json={"message": "Bob's", "stream": False},
    )
    assert response.status_code == 200 and response.json()["id"] != walk.COMPLETED and walk.SECRET not in response.text


def test_health_says_less_to_strangers(users: Server) -> None:
    assert ask(users, "GET", "/api/v1/health").json() == {"status": "ok"}
    assert {"version", "running_generations", "uptime_seconds"} <= set(
        ask(users, "GET", "/api/v1/health", ALICE).json()
    )


def test_strangers_do_not_keep_the_disk_busy_through_health(tmp_path: Path) -> None:
    async def count() -> int:
        store, written = llmchat.Store(str(tmp_path / "db")), 0
        await store.open()
        genuine = store.write

        async def write(*arguments: Any, **more: Any) -> Any:
            nonlocal written
            written += 1
            return await genuine(*arguments, **more)

        store.write = write  # type: ignore[method-assign]
        assert all([await store.is_writable(3600) for _ in range(50)])
        store.write = genuine  # type: ignore[method-assign]
        await store.close()
        return written

    assert asyncio.run(count()) == 1


# ── hostile pages ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "evil.example#localhost",
        "localhost evil.example",
        "",
        ":{port}",
        "[::1",
        "localhost:80:80",
        "xn--lcalhost-1za",
        "localhost.",
    ],
)
@pytest.mark.parametrize("path", ["/api/v1/health", "/sign-in", "/api/v1/conversations"])
def test_a_name_that_is_not_ours_is_refused_before_all_else(local: Server, host: str, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: {host.format(port=local.port)}\r\nConnection: close\r\n\r\n"
    received = send_raw(local, request.encode())
    assert statuses(received) == [403] and b'"forbidden"' in received


def test_no_host_or_two_are_refused(local: Server) -> None:
    assert statuses(send_raw(local, b"GET /api/v1/health HTTP/1.0\r\n\r\n")) == [403]
    two = b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert statuses(send_raw(local, two)) in ([403], [400])
    absolute = b"GET http://localhost/api/v1/health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert statuses(send_raw(local, absolute)) == [403]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "192.168.7.7", "[::1]:{port}", "chat.localhost"]
)
def test_names_of_this_machine_and_addresses_are_ours(local: Server, host: str) -> None:
    assert ask(local, "GET", "/api/v1/health", headers={"Host": host.format(port=local.port)}).status_code == 200


def test_a_listed_name_is_ours_on_any_port(users: Server) -> None:
    assert ask(users, "GET", "/api/v1/health", headers={"Host": "Chat.example.org:8443"}).status_code == 200
    assert ask(users, "GET", "/api/v1/health", headers={"Host": "a.chat.example.org"}).status_code == 403


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.example",
        "https://evil.example",
        "http://127.0.0.1:1",
        "http://127.0.0.1:{port}.evil.example",
        "http://127.0.0.1:{port}@evil.example",
        "http://evil.example/127.0.0.1:{port}",
        "file://",
        "127.0.0.1:{port}",
        "app://x",
    ],
)
def test_a_foreign_page_may_not_write(local: Server, origin: str) -> None:
    before = local.rows("SELECT count(*) FROM message")
    headers = {"Origin": origin.format(port=local.port)}
    assert (
        ask(local, "POST", "/api/v1/chat", headers=headers, json={"message": "Hi", "stream": False}).status_code == 403
    )
    assert local.rows("SELECT count(*) FROM message") == before


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_every_route_that_writes_looks_where_a_request_comes_from(users: Server, headers: dict[str, str]) -> None:
    writes = [route.split() for route in walk.routes() if not route.startswith("GET ")]
    assert ["POST", "/sign-in"] in writes and len(writes) >= 8
    for method, path in writes:
        assert ask(users, method, path.replace("{id}", "2"), ALICE, headers=headers).status_code == 403, path


def test_our_own_page_and_programs_may_write(local: Server) -> None:
    chat = {"message": "Hi", "stream": False}
    own = {"Origin": local.url, "Sec-Fetch-Site": "same-origin"}
    assert ask(local, "POST", "/api/v1/chat", headers=own, json=chat).status_code == 200
    assert ask(local, "POST", "/api/v1/chat", json=chat).status_code == 200


@pytest.mark.parametrize("mode", ["no-cors", "cors", "websocket"])
def test_a_foreign_page_cannot_make_a_browser_read_here(local: Server, mode: str) -> None:
    for site in ("cross-site", "same-site"):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
        assert ask(local, "GET", "/api/v1/help?refresh=1", headers=headers).status_code == 403


def test_a_foreign_page_may_link_here(local: Server) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert ask(local, "GET", "/docs", headers=headers).status_code == 200


def test_a_foreign_page_cannot_sign_a_browser_in_with_a_token_of_its_own(users: Server) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    response = ask(users, "GET", f"/sign-in?token={BOB}", headers=headers)
    assert response.status_code == 200 and "set-cookie" not in response.headers and "<form" in response.text


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "text/plain; application/json",
    ],
)
def test_a_form_of_a_foreign_page_is_no_json(local: Server, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    response = ask(local, "POST", "/api/v1/chat", headers=headers, content=b'{"message": "Hi", "stream": false}')
    assert response.status_code == 400 and "content-type" in response.json()["error"]["message"]


def test_no_origin_is_allowed_that_is_not_listed(users: Server) -> None:
    for origin in ("https://evil.example", "null", "https://app.example.org.evil.example", "http://app.example.org"):
        for method in ("GET", "OPTIONS"):
            response = ask(
                users, method, "/api/v1/health", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
            )
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_listed_origin_may_ask_with_a_token_and_never_with_a_cookie(users: Server) -> None:
    headers = {"Origin": "https://app.example.org", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    preflight = ask(users, "OPTIONS", "/api/v1/chat", headers={**headers, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 204 and "authorization" in preflight.headers["access-control-allow-headers"]
    response = ask(users, "GET", "/api/v1/conversations", ALICE, headers=headers)
    assert response.headers["access-control-allow-origin"] == "https://app.example.org" and response.status_code == 200
    assert "origin" in response.headers["vary"].lower()
    for one in (preflight, response):
        assert "access-control-allow-credentials" not in one.headers


@pytest.mark.parametrize(
    "origins", ["*", "null", "app.example.org", "https://app.example.org/", "https://*.example.org", "javascript://x"]
)
def test_origins_that_are_everybody_or_nobody_stop_the_start(origins: str) -> None:
    with pytest.raises(llmchat.StartError, match="LLMCHAT_CORS_ORIGINS"):
        llmchat.create_app(llmchat.Config(cors_origins=origins))


@pytest.mark.parametrize("hosts", ["https://chat.example.org", "a b", "chat.example.org/x", "*.example.org", "[::1"])
def test_names_that_cannot_be_a_host_stop_the_start(hosts: str) -> None:
    with pytest.raises(llmchat.StartError, match="LLMCHAT_HOSTS"):
        llmchat.create_app(llmchat.Config(hosts=hosts))


def responses_of_every_kind(server: Server) -> Iterator[tuple[str, Any]]:
    """What a browser can be made to see, errors of the connection included."""
    for method, path, headers, more in (
        ("GET", "/api/v1/conversations", {}, {}),
        ("GET", "/docs", {}, {}),
        ("GET", "/openapi.json", {}, {}),
        ("GET", "/sign-in", {}, {}),
        ("GET", "/nothing", {}, {}),
        ("GET", "/api/v1/messages/2/stream", {}, {}),
        ("HEAD", "/api/v1/messages/2", {}, {}),
        ("POST", "/api/v1/chat", {}, {"content": b"x"}),
        ("DELETE", "/api/v1/health", {}, {}),
        ("OPTIONS", "/api/v1/chat", {}, {}),
        ("GET", "/api/v1/health/", {}, {}),
        ("POST", "/sign-out", {}, {}),
        ("GET", "/api/v1/usage", {"Host": "evil.example"}, {}),
        ("POST", "/api/v1/chat", {"Origin": "null"}, {}),
        ("OPTIONS", "/api/v1/chat", {"Origin": "https://app.example.org"}, {}),
    ):
        yield f"{method} {path} {headers}", ask(server, method, path, ALICE, headers=headers, **more).headers
    yield "401", ask(server, "GET", "/api/v1/usage").headers
    yield "redirect to sign in", ask(server, "GET", "/api/v1/usage", headers={"Accept": "text/html"}).headers
    yield "signed in", sign_in(server, ALICE).headers
    yield "wrong token", sign_in(server, "wrong", **from_address("198.51.100.77")).headers
    for data in (b"garbage\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"):
        head = send_raw(server, data).partition(b"\r\n\r\n")[0].split(b"\r\n", 1)[1]
        yield data[:10].decode(), dict(re.findall(r"(?m)^([\w-]+): ([^\r]*)", head.decode()))


def test_every_response_tells_browsers_to_do_nothing_with_it(users: Server) -> None:
    for what, headers in responses_of_every_kind(users):
        policy = headers["content-security-policy"]
        assert (
            policy.startswith("default-src 'none'") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        ), what
        assert "base-uri 'none'" in policy and "form-action" in policy, what
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY", what
        assert headers["referrer-policy"] in ("no-referrer", "same-origin"), what
        assert "cache-control" in headers and "x-request-id" in headers, what
        assert "server" not in headers and "x-powered-by" not in headers, what


def test_the_sign_in_form_is_posted_with_its_origin(users: Server) -> None:
    """Under `no-referrer` a browser posts a form with `Origin: null` (Fetch standard, 3.1), which is refused here."""
    response = ask(users, "GET", "/sign-in")
    assert (
        response.headers["referrer-policy"] == "same-origin"
        and "form-action 'self'" in response.headers["content-security-policy"]
    )


@pytest.mark.parametrize(
    "path",
    [
        "/docs",
        "/sign-in",
        "/sign-in?next=%22%3E%3Cscript%3Ealert(1)%3C/script%3E",
        "/sign-in?next=%27onfocus=alert(1)%20x",
    ],
)
def test_our_pages_run_and_load_nothing(users: Server, path: str) -> None:
    text = ask(users, "GET", path, ALICE).text
    assert "<script" not in text and "src=" not in text and "@import" not in text and "<link" not in text
    attributes = re.sub(r'"[^"]*"', '""', text)
    assert not re.search(r"<[^>]*\son\w+\s*=", attributes)


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "/\n/evil.example",
        "javascript:alert(1)",
        " //evil.example",
        "evil.example",
        "/x\r\nSet-Cookie: a=b",
        "/x y",
        "///evil.example",
        "",
        "/é",
    ],
)
def test_signing_in_leads_to_no_other_site(users: Server, target: str) -> None:
    response = ask(users, "POST", "/sign-in", data={"token": ALICE, "next": target})
    assert response.status_code == 303 and response.headers["location"] == "/"


def test_signing_in_leads_back_to_the_page_that_was_asked_for(users: Server) -> None:
    asked = ask(users, "GET", "/c/7%22x", headers={"Accept": "text/html"})
    assert (asked.status_code, asked.headers["location"]) == (303, "/sign-in?next=/c/7%22x")
    response = ask(users, "POST", "/sign-in", data={"token": ALICE, "next": "/c/7"})
    assert response.headers["location"] == "/c/7"


@pytest.mark.parametrize("path", ["//evil.example/", "//evil.example/%2f..", "/api/v1/health/", "/\\evil.example/"])
def test_no_path_redirects_to_another_site(users: Server, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ALICE}\r\nConnection: close\r\n\r\n"
    head = send_raw(users, request.encode()).partition(b"\r\n\r\n")[0].decode()
    location = re.search(r"(?mi)^location: (.*?)\r?$", head)
    assert location is None or re.match(r"(http://localhost)?/(?![/\\])", location[1])


# ── guessing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_who_guesses_waits_and_nobody_else_does(users: Server) -> None:
    guesser, neighbour = from_address("198.51.100.1"), from_address("198.51.100.2")
    found = [ask(users, "GET", "/api/v1/usage", f"guess-{number}", guesser) for number in range(7)]
    assert [response.status_code for response in found] == [401] * 5 + [429] * 2
    assert 1 <= int(found[-1].headers["retry-after"]) <= 10 and found[-1].json()["error"]["code"] == "rate_limited"
    assert ask(users, "GET", "/api/v1/usage", ALICE, guesser).status_code == 429
    page = sign_in(users, ALICE, **guesser)
    assert page.status_code == 429 and "retry-after" in page.headers and "set-cookie" not in page.headers
    assert ask(users, "GET", f"/sign-in?token={ALICE}", headers=guesser).status_code == 429
    assert ask(users, "GET", "/api/v1/usage", ALICE, neighbour).status_code == 200
    assert ask(users, "GET", "/api/v1/health", headers=guesser).status_code == 200


@pytest.mark.usefixtures("hasty_session")  # which has to come before the guesses
def test_a_stranger_cannot_choose_the_address_that_is_slowed_down(hasty: Server) -> None:
    found = [ask(hasty, "GET", "/api/v1/usage", "guess", from_address(f"198.51.100.{number}")) for number in range(6)]
    assert [response.status_code for response in found] == [401] * 5 + [429]


def test_a_trailer_cannot_choose_it_either(users: Server) -> None:
    body = b"token=wrong-token"
    found = []
    for number in range(6):
        request = (
            b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 198.51.100.9\r\n"
            b"Transfer-Encoding: chunked\r\nTrailer: X-Forwarded-For\r\nConnection: close\r\n\r\n"
            b"%x\r\n%s\r\n0\r\nX-Forwarded-For: 198.51.100.1%d\r\n\r\n"
        ) % (len(body), body, number)
        found += statuses(send_raw(users, request))
    assert found == [401] * 5 + [429]


@pytest.mark.parametrize(
    ("client", "forwarded", "address"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["1.1.1.1"], "192.0.2.1"),
        ("10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["6.6.6.6, 1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["6.6.6.6", "1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["6.6.6.6, 1.1.1.1, 10.0.0.2"], "1.1.1.1"),
        ("10.0.0.1", ["1.1.1.1:4711"], "1.1.1.1"),
        ("10.0.0.1", ["[2001:db8::7]:4711"], "2001:db8::7"),
        ("10.0.0.1", ["2001:DB8:0::7"], "2001:db8::7"),
        ("::ffff:10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        ("fd00::1", ["::ffff:1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1, <script>"], "10.0.0.1"),
        ("10.0.0.1", ["a" * 60_000], "10.0.0.1"),
        ("10.0.0.1", [", ,"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.2"], "10.0.0.2"),
        ("", ["1.1.1.1"], ""),
    ],
)
def test_a_clients_address_is_the_newest_that_no_trusted_proxy_has(
    client: str, forwarded: list[str], address: str
) -> None:
    config = llmchat.Config(token=ALICE, trusted_proxies="10.0.0.0/8, fd00::/8")
    scope = scope_of(*(("x-forwarded-for", one) for one in forwarded), client=client)
    assert llmchat.Gate(config, llmchat.Store("unused")).address_of(scope) == address


@pytest.mark.parametrize("proxies", ["proxy.example.org", "10.0.0.0/33", "10.0.0.1-10.0.0.9", "*"])
def test_trusted_proxies_that_are_no_addresses_stop_the_start(proxies: str) -> None:
    with pytest.raises(llmchat.StartError, match="LLMCHAT_TRUSTED_PROXIES"):
        llmchat.create_app(llmchat.Config(trusted_proxies=proxies))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The throttle's time, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(llmchat.time, "monotonic", lambda: now[0])
    return now


def test_guesses_are_forgotten_one_by_one(clock: list[float]) -> None:
    throttle = llmchat.Throttle()
    for _ in range(5):
        assert throttle.wait_seconds("192.0.2.1") == 0
        throttle.fail("192.0.2.1")
    assert throttle.wait_seconds("192.0.2.1") == pytest.approx(10)
    clock[0] += 10
    assert throttle.wait_seconds("192.0.2.1") == 0
    throttle.fail("192.0.2.1")
    assert throttle.wait_seconds("192.0.2.1") == pytest.approx(10)


def test_guesses_from_everywhere_slow_down_who_is_unknown_and_not_who_is_known(clock: list[float]) -> None:
    throttle = llmchat.Throttle()
    throttle.succeed("203.0.113.5")
    for number in range(100):
        throttle.fail(f"198.51.100.{number}")
    assert throttle.wait_seconds("192.0.2.1") > 0 and throttle.wait_seconds("203.0.113.5") == 0
    clock[0] += 2
    assert throttle.wait_seconds("192.0.2.1") == 0


def test_who_is_known_is_slowed_down_for_guesses_of_their_own(clock: list[float]) -> None:
    throttle = llmchat.Throttle()
    throttle.succeed("203.0.113.5")
    for _ in range(5):
        throttle.fail("203.0.113.5")
        throttle.succeed("203.0.113.5")
    assert throttle.wait_seconds("203.0.113.5") > 0


def test_the_addresses_of_one_ipv6_machine_are_one(clock: list[float]) -> None:
    throttle = llmchat.Throttle()
    for number in range(5):
        throttle.fail(f"2001:db8:0:1::{number:x}")
    assert throttle.wait_seconds("2001:db8:0:1:ffff::1") > 0 and throttle.wait_seconds("2001:db8:0:2::1") == 0


def test_guesses_from_many_addresses_do_not_fill_the_memory(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmchat, "FAILURES_ADDRESSES_MAX", 100)
    throttle = llmchat.Throttle()
    for number in range(1000):
        throttle.fail(f"10.0.{number // 256}.{number % 256}")
        throttle.succeed(f"10.1.{number // 256}.{number % 256}")
    assert len(throttle._failures) <= 101 and len(throttle._known) <= 100 and throttle.wait_seconds("192.0.2.1") > 0


# ── proxies without a token ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host", "X-Forwarded-Proto"]
)
def test_what_a_proxy_passes_on_needs_a_token(local: Server, header: str) -> None:
    response = ask(local, "GET", "/api/v1/conversations", headers={header: "203.0.113.9"})
    assert response.status_code == 403 and "LLMCHAT_TOKEN" in response.json()["error"]["message"]


def test_a_proxy_that_is_trusted_may_let_people_in_itself() -> None:
    gate = llmchat.Gate(llmchat.Config(trusted_proxies="10.0.0.1"), llmchat.Store("unused"))
    scope = scope_of(("x-forwarded-for", "203.0.113.9"), client="10.0.0.1")
    gate.admit(scope)
    assert scope["owner"] == "local"
    with pytest.raises(llmchat.Forbidden):
        gate.admit(scope_of(("x-forwarded-for", "203.0.113.9"), client="10.0.0.2"))


# ── slow, huge and broken requests ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n",
        b"GET",
        b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 1000,
    ],
)
def test_a_head_that_does_not_come_ends_the_connection(hasty: Server, data: bytes) -> None:
    assert statuses(send_raw(hasty, data)) == []


HEALTH = b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("after", [b"\r\n", b"\r\n\r\n\r\n", b"GET /"])
def test_bytes_after_an_answer_do_not_keep_a_connection(hasty: Server, after: bytes) -> None:
    with connect(hasty) as client:
        client.sendall(HEALTH)
        received = client.recv(65_536)
        client.sendall(after)
        received += read_to_end(client)
    assert set(statuses(received)) == {200}


def test_the_rest_of_a_body_that_nobody_reads_does_not_keep_a_connection(hasty: Server) -> None:
    with connect(hasty) as client:
        client.sendall(b"POST /api/v1/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{")
        received = client.recv(65_536)
        client.sendall(b"a")
        received += read_to_end(client)
    assert statuses(received) == [401]


AS_ALICE = f"Host: localhost\r\nAuthorization: Bearer {ALICE}\r\n"
CHAT_HEAD = f"POST /api/v1/chat HTTP/1.1\r\n{AS_ALICE}Content-Type: application/json\r\n".encode()


def test_a_body_that_stalls_is_refused(hasty: Server, hasty_session: dict[str, str]) -> None:
    received = send_raw(
        hasty, session_head(hasty_session) + b'Content-Length: 100\r\nConnection: close\r\n\r\n{"message"'
    )
    assert statuses(received) == [400] and b"too slowly" in received


def test_an_import_that_stalls_does_not_hold_the_next(hasty: Server, hasty_session: dict[str, str]) -> None:
    head = session_head(hasty_session).replace(b"/api/v1/chat", b"/api/v1/import")
    for _ in range(2):
        received = send_raw(hasty, head + b"Content-Length: 100\r\nConnection: close\r\n\r\n[")
        assert statuses(received) == [400] and b"too slowly" in received


def test_a_body_that_trickles_is_refused(hasty: Server, hasty_session: dict[str, str]) -> None:
    stop = threading.Event()
    with connect(hasty) as client:
        client.sendall(session_head(hasty_session) + b"Content-Length: 1000000\r\nConnection: close\r\n\r\n")

        def trickle() -> None:
            while not stop.wait(0.1):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        received = read_to_end(client)
        stop.set()
        thread.join(SECONDS)
    assert statuses(received) == [400] and b"too slowly" in received


@pytest.fixture(scope="module")
def hasty_session(hasty: Server) -> dict[str, str]:
    return cookie_of(sign_in(hasty, ALICE))


def session_head(session: dict[str, str]) -> bytes:
    lines = [
        "POST /api/v1/chat HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Cookie: {session['Cookie']}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n"


@pytest.mark.parametrize("size", [70_000, 1_000_000])
@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 15_000 + b"X: ",
    ],
)
def test_a_huge_head_is_refused(users: Server, start: bytes, size: int) -> None:
    with connect(users) as client:
        try:
            client.sendall(start + b"a" * size)
            client.sendall(b" HTTP/1.1\r\n\r\n" if start == b"GET /" else b"\r\n\r\n")
        except OSError:
            pass  # it has closed already
        received = read_to_end(client)
    assert statuses(received) in ([431], [])


def test_a_huge_head_in_one_piece_is_refused_with_words(users: Server) -> None:
    received = send_raw(users, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 12_000 + b"\r\n")
    assert statuses(received) == [431] and b'"too_large"' in received and b"65,536 bytes" in received


def test_the_bytes_of_one_head_do_not_count_for_the_next(users: Server) -> None:
    def head(size: int) -> bytes:
        return b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * (size // 6) + b"\r\n"

    with connect(users) as client, client.makefile("rb") as received:

        def read_status() -> bytes:
            status = received.readline()
            length = next(line for line in received if line.startswith(b"content-length: "))
            while received.readline() != b"\r\n":
                pass
            received.read(int(length.split()[1]))
            return status

        client.sendall(head(60_000))
        assert read_status() == b"HTTP/1.1 200 OK\r\n"
        client.sendall(head(30_000)[:20_000])
        users.get("/api/v1/health")  # answered once those bytes were read
        client.sendall(head(30_000)[20_000:])
        assert read_status() == b"HTTP/1.1 200 OK\r\n"


def resident_kilobytes(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("line", [b"a: b\r\n", b"x" * 1000])
def test_endless_trailers_are_cut_off(users: Server, line: bytes) -> None:
    before = resident_kilobytes(users)
    piece, sent = line * (65_536 // len(line)), 0
    with connect(users) as client:
        client.sendall(
            b"POST /api/v1/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: "
        )
        try:
            while sent < 64_000_000:
                client.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
    assert sent < 64_000_000 and resident_kilobytes(users) - before < 20_000


GET_USAGE = f"GET /api/v1/usage HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ALICE}\r\n\r\n".encode()
POST = f"POST /sign-out HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ALICE}\r\n".encode()


@pytest.mark.parametrize(
    "request_",
    [
        POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nX" + GET_USAGE,
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nX" + GET_USAGE,
        POST + b"Content-Length: 0\r\nContent-Length: 6\r\n\r\n" + GET_USAGE,
        POST + b"Content-Length: 5, 6\r\n\r\n" + GET_USAGE,
        POST + b"Content-Length: +5\r\n\r\n" + GET_USAGE,
        POST + b"Content-Length: 0x10\r\n\r\n" + GET_USAGE,
        POST + b"Content-Length: -1\r\n\r\n" + GET_USAGE,
        POST + b"Content-Length : 5\r\n\r\n" + GET_USAGE,
        POST + b"Content-Length: 99999999999999999999\r\n\r\n" + GET_USAGE,
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + GET_USAGE,
        POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + GET_USAGE,
        POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + GET_USAGE,
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + GET_USAGE,
        POST + b" Content-Length: 5\r\n\r\n" + GET_USAGE,
        POST + b"X: y\n\r\n" + GET_USAGE,
        POST + b"X: y\r\n Content-Length: 5\r\n\r\n" + GET_USAGE,
        POST + b"X\0Y: z\r\n\r\n" + GET_USAGE,
        POST + b"Bad Name: z\r\n\r\n" + GET_USAGE,
        POST + b": z\r\n\r\n" + GET_USAGE,
    ],
)
def test_a_request_whose_end_is_unclear_carries_no_other_in(users: Server, request_: bytes) -> None:
    with connect(users) as client:
        client.sendall(request_)
        client.shutdown(socket.SHUT_WR)
        client.settimeout(8)  # uvicorn's own wait for another request is 5 s
        received = read_to_end(client)
    assert b'"usage"' not in received and statuses(received) in ([400], [303], [])


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\n{}\r\n0\r\n\r\n",
        b"-1\r\n{}\r\n0\r\n\r\n",
        b"0x2\r\n{}\r\n0\r\n\r\n",
        b"2\r\n{}X\r\n0\r\n\r\n",
        b"ffffffffffffffffff\r\n{}",
        b"2\n{}\n0\n\n",
        b"2 \r\n{}\r\n0\r\n\r\n",
    ],
)
def test_garbage_for_chunks_is_refused_in_the_shape_of_every_error(users: Server, chunks: bytes) -> None:
    received = send_raw(users, CHAT_HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks)
    assert statuses(received) == [400] and received.count(b'"invalid_request"') == 1


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\0" * 1000,
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused_in_the_shape_of_every_error(users: Server, data: bytes) -> None:
    received = send_raw(users, data)
    assert (
        statuses(received) == [400]
        and b'"error":{"code":"invalid_request"' in received
        and b"Traceback" not in received
    )
    length = int(re.search(rb"content-length: (\d+)", received)[1])  # type: ignore[index]
    assert len(received.partition(b"\r\n\r\n")[2]) == length


def test_garbage_behind_a_running_stream_does_not_get_into_it(users: Server) -> None:
    with connect(users) as client:
        request = f"GET /api/v1/messages/{walk.RUNNING}/stream HTTP/1.1\r\n{AS_ALICE}\r\n"
        client.sendall(request.encode())
        received = client.recv(65_536)
        client.sendall(b"garbage\r\n\r\n")
        received += read_to_end(client)
    assert statuses(received) == [200] and b"invalid_request" not in received


def test_pipelined_requests_are_answered_in_their_order(users: Server) -> None:
    one = f"GET /api/v1/messages/{{}} HTTP/1.1\r\n{AS_ALICE}Connection: {{}}\r\n\r\n"
    received = send_raw(
        users, (one.format(1, "keep-alive") + one.format(999, "keep-alive") + one.format(2, "close")).encode()
    )
    assert statuses(received) == [200, 404, 200]
    assert [int(found) for found in re.findall(rb'\{"id":(\d+),"conversation_id"', received)] == [1, 2]


def test_an_upgrade_is_not_done_and_not_logged(users: Server) -> None:
    headers = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"
    upgrade = b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n"
    assert statuses(send_raw(users, upgrade)) == [200]
    assert not [line for line in users.log if "pgrade" in line or "WebSocket" in line or "Invalid HTTP" in line]


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def limited(serve: Callable[..., Server]) -> Server:
    return serve(
        LLMCHAT_USERS=walk.USERS,
        LLMCHAT_OWNER_GENERATIONS_MAX="2",
        LLMCHAT_GENERATIONS_MAX="3",
        LLMCHAT_OWNER_STREAMS_MAX="3",
        LLMCHAT_STREAMS_MAX="5",
        LLMCHAT_SUBSCRIBERS_MAX="4",
        LLMCHAT_DRAIN_SECONDS="0",
    )


def start_many(server: Server, token: str, count: int) -> list[httpx.Response]:
    """So many chats at the same moment, in the background."""
    with ThreadPoolExecutor(count) as pool:
        body = {"message": "Hi", "background": True}
        return list(pool.map(lambda _: ask(server, "POST", "/api/v1/chat", token, json=body), range(count)))


def test_generations_are_limited_per_owner_and_in_all_also_in_a_burst(limited: Server, provider: Provider) -> None:
    provider.script(*[[*openai_text("x", finish=None, usage=None, done=False), Hang()]] * 3)
    alices = start_many(limited, ALICE, 12)
    assert sorted(response.status_code for response in alices) == [202] * 2 + [429] * 10
    bobs = start_many(limited, BOB, 4)
    assert sorted(response.status_code for response in bobs) == [202] + [503] * 3
    for response in (*alices, *bobs):
        if response.status_code != 202:
            assert response.json()["error"]["code"] == {429: "rate_limited", 503: "overloaded"}[response.status_code]
            assert int(response.headers["retry-after"]) >= 1 and response.json()["error"]["retryable"] is True
    assert limited.rows("SELECT count(*) FROM message WHERE role = 'assistant'") == [(3,)]


def open_stream(server: Server, token: str, message_id: int) -> EventStream:
    return EventStream(
        server.url, "GET", f"/api/v1/messages/{message_id}/stream", headers={"Authorization": f"Bearer {token}"}
    )


def test_streams_are_limited_per_owner_and_in_all_also_in_a_burst(limited: Server, provider: Provider) -> None:
    provider.script(*[[*openai_text("x", finish=None, usage=None, done=False), Hang()]] * 2)
    mine, theirs = (start_many(limited, token, 1)[0].json()["message_id"] for token in (ALICE, BOB))
    with ThreadPoolExecutor(10) as pool:
        streams = list(pool.map(lambda _: open_stream(limited, ALICE, mine), range(10)))
    assert sorted(stream.status for stream in streams) == [200] * 3 + [429] * 7
    streams += [open_stream(limited, BOB, theirs) for _ in range(3)]
    assert [stream.status for stream in streams[10:]] == [200, 200, 503]
    for stream in streams:
        if stream.status != 200:
            assert stream.error["error"]["code"] == {429: "rate_limited", 503: "overloaded"}[stream.status]
            assert int(stream.headers["retry-after"]) >= 1
    streams.append(open_stream(limited, BOB, mine))
    assert streams[-1].status == 404, "another owner's message is not there, however busy it is"
    answers = "SELECT count(*) FROM message WHERE role = 'assistant'"
    asked = limited.rows(answers)
    for path, body in (
        ("/api/v1/chat", {"message": "Hi"}),
        ("/v1/responses", {"input": "Hi", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
    ):
        refused = ask(limited, "POST", path, ALICE, json=body)
        assert refused.status_code in (429, 503)
    assert limited.rows(answers) == asked, "what cannot be streamed is not paid for"
    for stream in streams:
        stream.close()
    wait_until(
        lambda: ask(limited, "GET", "/api/v1/health", ALICE).json()["subscribers"] == 0, "the end of the streams"
    )
    with open_stream(limited, ALICE, mine) as again:
        assert again.status == 200


# ── against oneself ─────────────────────────────────────────────────────────────────────────────────────────────────

KEY = "sk-proj-Zx9-secret-of-the-operator"


def test_a_key_is_nowhere_but_at_its_provider(serve: Callable[..., Server], provider: Provider) -> None:
    server = serve(
        OPENAI_API_KEY=KEY, OPENAI_MODELS="", LLMCHAT_LOG_LEVEL="debug", LLMCHAT_ATTEMPTS="1", STRAY_API_KEY=KEY
    )
    provider.script(
        openai_text("All is well."),
        openai_error(401, f"Incorrect API key provided: {KEY}."),
        openai_error(400, f"<html>Authorization: Bearer {KEY}</html>"),
        redirect(f"http://127.0.0.1:1/?key={KEY}"),
        openai_text("x", finish=None, usage=None, done=False),
    )
    chat = {"message": "Hi", "stream": False, "model": "openai/m"}
    seen = [ask(server, "POST", "/api/v1/chat", json=chat) for _ in range(5)]
    paths = [route.removeprefix("GET ") for route in walk.routes() if route.startswith("GET ")]
    seen += [
        ask(server, "GET", path.replace("{id}", str(one)))
        for path in paths
        for one in (range(1, 11) if "{id}" in path else (0,))
    ]
    assert [response.status_code for response in seen[:5]] == [200, 502, 422, 502, 502]
    assert provider.chats[-1].headers["authorization"] == f"Bearer {KEY}"
    for response in seen:
        assert KEY not in response.text and KEY not in str(response.headers), response.request.url
    server.terminate()
    assert KEY not in "".join([*server.output, *server.log]) and len(server.log) >= 5
    for path in server.folder.iterdir():
        assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_providers_redirect_is_not_followed_with_the_key(local: Server, provider: Provider, status: int) -> None:
    with Provider() as elsewhere:
        provider.script(redirect(f"{elsewhere.base_url}/chat/completions", status))
        response = ask(local, "POST", "/api/v1/chat", json={"message": "Hi", "stream": False, "model": "openai/m"})
        assert response.status_code == 502 and "not followed" in response.json()["error"]["message"]
        assert elsewhere.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@127.0.0.1/v1",
        "http://s3cret@127.0.0.1/v1",
        "http://127.0.0.1/v1?key=s3cret",
        "http://127.0.0.1/v1#s3cret",
        "file:///etc/passwd",
        "ftp://x/v1",
        "gopher://x",
        "http:///v1",
        "//x/v1",
        "http://a\nb/v1",
        "http://a b/v1",
        "http://a/v1\r\nX: y",
        "javascript:x",
    ],
)
def test_a_base_url_that_is_no_plain_address_stops_the_start_and_shows_no_secret(url: str) -> None:
    with pytest.raises(llmchat.StartError, match="OPENAI_BASE_URL") as refused:
        llmchat.load_config({"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k"}, {})
    assert "s3cret" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("mode", "warned"), [(0o644, True), (0o640, True), (0o600, False)])
def test_an_env_file_that_others_can_read_gives_a_warning(
    serve: Callable[..., Server], tmp_path: Path, mode: int, warned: bool
) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"GROQ_API_KEY={KEY}\n")
    dotenv.chmod(mode)
    server = serve()
    server.terminate()
    assert any("warning" in line and "chmod 600 .env" in line for line in server.log) is warned
    assert KEY not in "".join([*server.log, *server.output])


HOSTILE = (
    "openai/x\n2026-01-01T00:00:00.000Z error forged\x1b[2J\x1b]0;title\x07\u2028\u0085\x9b31m\u202e status=completed"
)


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_that_a_client_sends_writes_lines_or_escapes_into_the_log(
    serve: Callable[..., Server], form: str
) -> None:
    server = serve(OPENAI_MODELS="", LLMCHAT_TOKEN=ALICE, LLMCHAT_LOG_FORMAT=form, LLMCHAT_TRUSTED_PROXIES="127.0.0.1")
    assert ask(
        server, "POST", "/api/v1/chat", ALICE, json={"message": "Hi", "stream": False, "model": HOSTILE}
    ).status_code in (200, 422, 502)
    hostile = [("X-Request-ID", "a b=c"), ("X-Forwarded-For", "1.1.1.1\x9b31m"), ("User-Agent", "\x9b31m")]
    with connect(server) as client:
        head = (
            "GET /%0a%0d%1b[2J HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong-one\r\nConnection: close\r\n"
        )
        client.sendall(
            head.encode() + b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in hostile) + b"\r\n"
        )
        assert statuses(read_to_end(client)) == [401]
    wait_until(lambda: any("sign-in failed" in line for line in server.log), "the line")
    server.terminate()
    lines = "".join(server.log).removesuffix("\n").split("\n")
    start = r"\d{4}-\d\d-\d\dT\S+Z (info|warning|error|debug) " if form == "text" else r'\{"time": "'
    assert len(lines) == 3
    for line in lines:
        assert re.match(start, line) and line.isprintable(), line


def test_an_error_of_our_own_shows_no_stack(local: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the envelope with an application that breaks: the words are in the log only."""

    async def broken(*_: Any) -> None:
        raise RuntimeError(f"secret {KEY}")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    def render(error: llmchat.LlmchatError, scope: Any) -> Any:
        return llmchat.error_response(error, scope["request_id"])

    gate = llmchat.Gate(llmchat.Config(), llmchat.Store("unused"))
    asyncio.run(llmchat.Envelope(broken, gate, llmchat.render_error)(scope_of(), None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 500 and b"secret" not in sent[1]["body"] and b"RuntimeError" not in sent[1]["body"]


def test_the_client_library_of_these_tests_sends_what_it_is_told(users: Server) -> None:
    """A guard for the tests above: a header that never left would let them pass."""
    connection = http.client.HTTPConnection("127.0.0.1", users.port, timeout=SECONDS)
    connection.request("GET", "/api/v1/health", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 403
    connection.close()
