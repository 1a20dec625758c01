"""Several instances behind nginx, with the configuration that the README shows: owners are spread, and stay apart.

    client ──▶ nginx ──hash of the owner──▶ chat1: its own process, its own database
                                       └──▶ chat2: the same

The list of owners is made by the README's command, and the configuration taken from its text; only what a machine has
of its own (addresses, ports, paths) is put in. Where an owner lives depends on the ports, and so differs from run to
run; there are enough owners for every instance to have some. Without nginx the module is skipped; with CI=true that is
a failure.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client import EventStream, Reader
from tests.conftest import ROOT, Server, open_client, settings_for, skip_module, wait_until
from tests.guarantees import gated, read_all, read_up_to
from tests.provider import Provider, default_answer, unused_port

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
if NGINX is None:
    skip_module("there is no nginx")

SECTION = (
    (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Several instances\n")[2].partition("\n## ")[0]
)
LISTING = SECTION.partition("\n```\n")[2].partition("```")[0]
CONFIGURATION = SECTION.partition("```nginx\n")[2].partition("```")[0]
LIST = "/etc/nginx/llmchat-owners"
LISTEN, SERVER = "  listen 80;", re.compile(r"^  server \S+:8000( .*\n)", re.MULTILINE)
NAME = "chat.example.org"
TOKENS = {f"owner-{number}": f"{number:02d}-Secret_of.owner-{number}" for number in range(48)}
TOKENS["owner-0"] += "-and-a-long-one" * 10
USERS = ", ".join(f"{owner}:{token}" for owner, token in TOKENS.items())
MAIN = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxied; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
{}
}}
"""
PARTS = [default_answer("what goes through a proxy", words=12)[start : start + 10] for start in (0, 10)]
WHOLE = "".join(map("".join, PARTS))


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"the README has not one {old!r}"
    return text.replace(old, new)


def configured(folder: Path, port: int, instances: Sequence[Server]) -> str:
    """The README's configuration for these instances and this folder."""
    text = replaced(CONFIGURATION, LISTEN, f"  listen 127.0.0.1:{port};")
    text = replaced(text, LIST, str(folder / "llmchat-owners"))
    shown = list(SERVER.finditer(text))
    assert len(shown) == 2, "the README has two instances"
    servers = "".join(f"  server 127.0.0.1:{one.port}{shown[number % 2][1]}" for number, one in enumerate(instances))
    return text[: shown[0].start()] + servers + text[shown[1].end() :]


class Nginx:
    """nginx on a free port, in one unprivileged process, with what the README says. A context manager."""

    def __init__(self, folder: Path, instances: Sequence[Server]) -> None:
        folder.mkdir()
        self.port = unused_port()
        self.url = f"http://127.0.0.1:{self.port}"
        listing = ["sh", "-ec", replaced(LISTING, LIST, "llmchat-owners")]
        subprocess.run(listing, cwd=folder, env={**os.environ, "LLMCHAT_USERS": USERS}, check=True)
        assert stat.S_IMODE((folder / "llmchat-owners").stat().st_mode) == 0o600, "it holds everybody's token"
        (folder / "nginx.conf").write_text(MAIN.format(configured(folder, self.port, instances)))
        self._log = folder / "log"
        with self._log.open("w") as log:
            command_line = [str(NGINX), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
            self._process = subprocess.Popen(command_line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self._has_begun, "nginx")
        assert self._process.poll() is None, self._log.read_text()

    def __enter__(self) -> Nginx:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)

    def _has_begun(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
            return True
        return self._process.poll() is not None

    def client(self, owner: str | None = None, **headers: str) -> httpx.Client:
        """A program with the owner's token, or without one."""
        return open_client(self.url, **(bearer(owner) if owner else {}), **headers)

    def browser(self) -> httpx.Client:
        """What keeps cookies and says where its pages come from."""
        netloc = f"{NAME}:{self.port}"
        return open_client(self.url, Host=netloc, Origin=f"http://{netloc}", Accept="text/html")

    def stream(self, owner: str, method: str, path: str, body: Any = None, **headers: str) -> EventStream:
        return EventStream(self.url, method, path, body, {**bearer(owner), **headers})


@dataclass(frozen=True)
class Site:
    """Two instances behind nginx, and the instance that each owner's first conversation came to lie on."""

    nginx: Nginx
    instances: list[Server]
    homes: dict[str, Server]

    def owner_at(self, number: int) -> str:
        """Somebody who lives on this instance."""
        return next(owner for owner, home in self.homes.items() if home is self.instances[number])

    def counts(self, owner: str) -> list[int]:
        """How many conversations of the owner each instance has."""
        return [one.rows("SELECT count(*) FROM conversation WHERE owner = ?", owner)[0][0] for one in self.instances]


def bearer(owner: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[owner]}"}


def start_instance(folder: Path, provider: Provider) -> Server:
    folder.mkdir()
    settings = {"LLMCHAT_USERS": USERS, "LLMCHAT_HOSTS": NAME, "LLMCHAT_TRUSTED_PROXIES": "127.0.0.1"}
    return Server(folder, **settings, **settings_for(provider))


@contextlib.contextmanager
def down(instance: Server) -> Iterator[None]:
    """Kills the instance, and starts it again where it was."""
    instance.arguments = ("--port", str(instance.port))
    instance.kill()
    try:
        yield
    finally:
        instance.start()


def ask(client: httpx.Client) -> None:
    response = client.post("/api/v1/chat", json={"message": "Hello", "stream": False})
    assert response.status_code == 200, response.text


def conversations(nginx: Nginx, owner: str) -> list[tuple[str, int]]:
    """What an owner finds: of every conversation its title and when it began."""
    with nginx.client(owner) as client:
        found = client.get("/api/v1/conversations").json()["conversations"]
    return sorted((one["title"], one["created_at_ms"]) for one in found)


def sign_in(browser: httpx.Client, owner: str) -> None:
    response = browser.post("/sign-in", data={"token": TOKENS[owner], "next": "/"})
    assert response.status_code == 303 and response.headers["location"] == "/", response.text


def owners_on(instance: Server) -> list[str]:
    return [owner for (owner,) in instance.rows("SELECT owner FROM conversation")]


@pytest.fixture(scope="module")
def site(shared_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("instances")
    with contextlib.ExitStack() as stack:
        instances = [stack.enter_context(start_instance(folder / name, shared_provider)) for name in ("one", "two")]
        nginx = stack.enter_context(Nginx(folder / "nginx", instances))
        for owner in TOKENS:
            with nginx.client(owner) as client:
                ask(client)
        homes = {owner: one for one in instances for owner in owners_on(one)}
        yield Site(nginx, instances, homes)


# ── spread by owner ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_owner_lives_on_one_instance_and_every_instance_has_owners(site: Site) -> None:
    for owner in TOKENS:
        with site.nginx.browser() as browser:
            sign_in(browser, owner)
            ask(browser)
    assert [owner for owner in TOKENS if 0 not in site.counts(owner) or sum(site.counts(owner)) < 2] == []
    assert all(owners_on(one) for one in site.instances)


@pytest.mark.parametrize("number", [0, 1])
def test_token_cookie_and_v1_of_an_owner_meet_the_same_instance(site: Site, number: int) -> None:
    owner = site.owner_at(number)
    before = site.counts(owner)
    with site.nginx.client(owner) as program, site.nginx.browser() as browser:
        sign_in(browser, owner)
        assert browser.get("/").status_code == 200
        ask(browser)
        ask(program)
        body = {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}], "store": True}
        assert program.post("/v1/chat/completions", json=body).status_code == 200
        response = program.post("/v1/responses", json={"model": "openai/m", "input": "Hi"}).json()
        assert program.get(f"/v1/responses/{response['id']}").json()["output"] == response["output"]
        seen = [client.get("/api/v1/conversations").json()["conversations"] for client in (program, browser)]
    assert seen[0] == seen[1] and len(seen[0]) == before[number] + 4
    assert site.counts(owner)[number] == before[number] + 4 and site.counts(owner)[1 - number] == 0


@pytest.mark.parametrize("number", [0, 1])
def test_the_link_signs_in_where_its_owner_lives(site: Site, number: int) -> None:
    owner = site.owner_at(number)
    with site.nginx.browser() as browser:
        assert browser.get("/sign-in", params={"next": "/docs", "token": TOKENS[owner]}).status_code == 303
        ask(browser)
    assert site.counts(owner)[1 - number] == 0 < site.counts(owner)[number]


def test_who_signs_in_as_somebody_else_goes_where_those_live(site: Site) -> None:
    first, second = site.owner_at(0), site.owner_at(1)
    with site.nginx.browser() as browser:
        for owner in (first, second, first):
            sign_in(browser, owner)
            before = sum(site.counts(owner))
            ask(browser)
            assert sum(site.counts(owner)) == before + 1
    assert 0 in site.counts(first) and 0 in site.counts(second)


def test_a_wrong_token_signs_nobody_in(site: Site) -> None:
    with site.nginx.browser() as browser:
        response = browser.post("/sign-in", data={"token": "not-a-token-at-all", "next": "/"})
        assert response.status_code == 401 and "set-cookie" not in response.headers
        assert browser.get("/").headers["location"] == "/sign-in?next=/"


def test_somebody_elses_name_in_the_cookie_opens_nothing(site: Site) -> None:
    first, second = site.owner_at(0), site.owner_at(1)
    with site.nginx.browser() as browser:
        sign_in(browser, first)
        browser.cookies.set("llmchat_owner", second, domain="127.0.0.1", path="/")
        cookies = {"llmchat_session": browser.cookies["llmchat_session"], "llmchat_owner": second}
    with site.nginx.client(Cookie="; ".join(f"{name}={value}" for name, value in cookies.items())) as client:
        assert client.get("/api/v1/conversations").status_code == 401
    with site.nginx.client(first, Cookie=f"llmchat_owner={second}") as client:
        assert client.get("/api/v1/conversations").json()["conversations"] != []


# ── what a proxy may spoil ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [0, 1])
def test_a_stream_comes_through_as_it_grows_and_goes_on_after_a_cut(
    site: Site, provider: Provider, number: int
) -> None:
    owner, reader = site.owner_at(number), Reader()
    gates = gated(provider, *PARTS)
    stream = site.nginx.stream(owner, "POST", "/api/v1/chat", {"message": "Hello"})
    start = next(stream.events())
    reader.take(start)
    read_up_to(reader, stream, "".join(PARTS[0]))  # the provider has sent no more than this
    stream.reset()
    path, cursor = f"/api/v1/messages/{start.data['message_id']}/stream", {"Last-Event-ID": str(reader.cursor)}
    stream = site.nginx.stream(owner, "GET", path, **cursor)
    reader.take(next(stream.events()))
    provider.open_gate(gates[0])
    read_all(stream, reader)
    assert reader.content == WHOLE == site.instances[number].content(start.data["message_id"])
    assert reader.end is not None and reader.end["status"] == "completed" and reader.names.count("start") == 2


def test_a_stream_of_v1_comes_through_as_it_grows(site: Site, provider: Provider) -> None:
    gates = gated(provider, *PARTS)
    body = {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with (
        site.nginx.client(site.owner_at(0)) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        assert any(PARTS[0][0] in line for line in lines)
        provider.open_gate(gates[0])
        assert "data: [DONE]" in list(lines)


def test_a_request_that_is_too_large_is_refused_in_llmchats_words(site: Site) -> None:
    with site.nginx.client(site.owner_at(0)) as client:
        response = client.post("/api/v1/chat", json={"message": "x" * 2_000_000})
    assert response.status_code == 413 and response.json()["error"]["code"] == "too_large"


def test_failed_sign_ins_are_counted_by_the_clients_address(site: Site) -> None:
    with httpx.Client(base_url=site.nginx.url, transport=httpx.HTTPTransport(local_address="127.0.0.2")) as client:
        assert client.get("/api/v1/help", headers={"Authorization": "Bearer not-a-token"}).status_code == 401
    wait_until(lambda: any("address=127.0.0.2" in line for one in site.instances for line in one.log), "the log's line")


def test_nginx_says_whether_its_client_speaks_tls_and_not_the_client(site: Site) -> None:
    owner = site.owner_at(0)
    with site.nginx.browser() as browser:
        response = browser.post("/sign-in", data={"token": TOKENS[owner]}, headers={"X-Forwarded-Proto": "https"})
    assert [one for one in response.headers.get_list("set-cookie") if "Secure" in one] == []
    assert len(response.headers.get_list("set-cookie")) == 2


# ── instances go and come ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [0, 1])
def test_while_an_instance_is_down_its_owners_wait_and_all_others_go_on(site: Site, number: int) -> None:
    waiting, active = site.owner_at(number), site.owner_at(1 - number)
    before, rows = conversations(site.nginx, waiting), site.counts(waiting)
    with (
        down(site.instances[number]),
        site.nginx.client(waiting) as refused,
        site.nginx.client(active) as client,
    ):
        for _ in range(3):  # left to itself, nginx tries the next one at once, and goes there for 10 s
            assert refused.get("/api/v1/conversations").status_code == 502
            assert refused.post("/api/v1/chat", json={"message": "Hello"}).status_code == 502
            ask(client)
    assert conversations(site.nginx, waiting) == before != [] and site.counts(waiting) == rows


def test_an_instance_that_dies_breaks_the_stream_and_what_was_seen_goes_on_when_it_is_back(
    site: Site, provider: Provider
) -> None:
    owner, reader = site.owner_at(1), Reader()
    gated(provider, *PARTS)
    with site.nginx.stream(owner, "POST", "/api/v1/chat", {"message": "Hello"}) as stream:
        start = next(stream.events())
        reader.take(start)
        read_up_to(reader, stream, "".join(PARTS[0]))
        with down(site.instances[1]):
            assert list(stream.events()) == [] and not stream.ended, "a stream that broke looks whole"
    path, cursor = f"/api/v1/messages/{start.data['message_id']}/stream", {"Last-Event-ID": str(reader.cursor)}
    read_all(site.nginx.stream(owner, "GET", path, **cursor), reader)
    assert reader.content == "".join(PARTS[0]) and reader.end is not None and reader.end["status"] == "interrupted"


def test_an_instance_more_takes_owners_who_bring_what_they_have(
    site: Site, shared_provider: Provider, tmp_path: Path
) -> None:
    before = {owner: conversations(site.nginx, owner) for owner in TOKENS}
    with (
        start_instance(tmp_path / "three", shared_provider) as third,
        Nginx(tmp_path / "nginx", [*site.instances, third]) as nginx,
    ):
        found = {owner: conversations(nginx, owner) for owner in TOKENS}
        moved = [owner for owner in TOKENS if found[owner] == []]
        assert found == {owner: [] if owner in moved else before[owner] for owner in TOKENS}
        assert 0 < len(moved) < len(TOKENS) * 2 / 3
        for owner in moved:
            exported = site.homes[owner].get("/api/v1/export", headers=bearer(owner))
            headers = {**bearer(owner), "Content-Type": "application/json"}
            assert third.post("/api/v1/import", content=exported.content, headers=headers).status_code == 200
            assert conversations(nginx, owner) == before[owner]
