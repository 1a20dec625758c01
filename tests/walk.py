"""An outsider's walk: every route of the service, without a token and with another owner's, and what came back.

    python -m tests.walk        prints the table

Alice has conversations; a stranger has no token; Carol has her own, and nothing else. Every route that the application
has must have a rule here: one without a rule fails the walk, so that a new route is looked at first.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import llmchat
from tests.conftest import Server, open_client
from tests.provider import Hang, Provider, openai_text

SECRET = "Rosebud-4711"  # in everything that Alice has
TOKENS = {"alice": "alice-token-0001", "bob": "bob-token-000002", "carol": "carol-token-0003"}
USERS = ",".join(f"{name}:{token}" for name, token in TOKENS.items())
COMPLETED, RUNNING = 2, 4  # messages of Alice's: the answers in her conversations 1 and 2
CHAT = {"message": "Hi", "stream": False}


@dataclass(frozen=True)
class Rule:
    """What a route must say to a stranger and to Carol; `{id}` in its path is one of Alice's, `body` names hers too.

    `lists`: the answer is a list of one's own, so Carol's is empty.
    """

    stranger: int
    carol: int
    body: Any = None
    form: dict[str, str] | None = None
    lists: bool = False


PRIVATE = Rule(401, 404)  # a thing of Alice's
OWN = Rule(401, 200)  # nothing of Alice's is in it
LIST = Rule(401, 200, lists=True)
RULES = {
    "GET /": OWN,
    "GET /api/v1/health": Rule(200, 200),
    "GET /api/v1/help": OWN,
    "POST /api/v1/chat": Rule(401, 404, {**CHAT, "conversation_id": 1}),
    "GET /api/v1/messages/{id}": PRIVATE,
    "GET /api/v1/messages/{id}/stream": PRIVATE,
    "POST /api/v1/messages/{id}/stop": PRIVATE,
    "POST /api/v1/messages/{id}/regenerate": Rule(401, 404, {}),
    "POST /api/v1/messages/{id}/continue": Rule(401, 404, {}),
    "GET /api/v1/generations": LIST,
    "GET /api/v1/conversations": LIST,
    "GET /api/v1/conversations/{id}": PRIVATE,
    "PATCH /api/v1/conversations/{id}": Rule(401, 404, {"title": "Carol was here"}),
    "DELETE /api/v1/conversations/{id}": PRIVATE,
    "GET /api/v1/usage": LIST,
    "GET /openapi.json": OWN,
    "GET /docs": OWN,
    "GET /api/v1/conversations/{id}/export": PRIVATE,
    "GET /api/v1/export": OWN,
    "POST /api/v1/import": Rule(401, 400, {"no": "archive"}),
    "GET /api/v1/backup": Rule(401, 403),
    "GET /c/{id}": OWN,
    "GET /web/{name}": Rule(200, 200),
    "GET /v1/models": OWN,
    "GET /v1/models/{id:path}": OWN,
    "POST /v1/chat/completions": Rule(401, 400, {"model": "openai/m", "messages": []}),
    "POST /v1/responses": Rule(401, 404, {"model": "openai/m", "input": "Hi", "previous_response_id": "resp_2"}),
    "GET /v1/responses/{id}": PRIVATE,
    "DELETE /v1/responses/{id}": PRIVATE,
    "POST /v1/responses/{id}/cancel": PRIVATE,
    "GET /v1/responses/{id}/input_items": PRIVATE,
    "GET /sign-in": Rule(200, 200),
    "POST /sign-in": Rule(401, 401, form={"token": "a-guess-of-theirs", "next": "https://evil.example/"}),
    "POST /sign-out": Rule(401, 303),
}


@dataclass(frozen=True)
class Visit:
    """One request of the walk, and what came back."""

    route: str
    path: str
    who: str
    expected: int
    status: int
    code: str
    leaks: bool


def routes() -> list[str]:
    """Every route of the application itself, not of a list that could forget one: 'METHOD /path'."""
    found = [
        f"{method} {route.path}"
        for route in llmchat.create_app(llmchat.Config()).routes
        for method in sorted(route.methods - {"HEAD"})
    ]
    return sorted(found, key=lambda name: (list(RULES).index(name) if name in RULES else len(RULES), name))


def start_server(folder: Path, provider: Provider, **settings: str) -> Server:
    """A server with Alice's things in it: a finished conversation and one whose answer runs."""
    given = {
        "OPENAI_BASE_URL": provider.base_url,
        "OPENAI_API_KEY": "sk-walk",
        "OPENAI_MODELS": "m",
        "LLMCHAT_USERS": USERS,
    }
    server = Server(folder, **{**given, **settings})
    server.client.headers["Authorization"] = f"Bearer {TOKENS['alice']}"
    provider.script(
        openai_text(f"{SECRET} it is."), [*openai_text(SECRET, finish=None, usage=None, done=False), Hang()]
    )
    asked = {"message": f"Is it {SECRET}?", "system": SECRET, "stream": False}
    assert server.post("/api/v1/chat", asked, headers={"Idempotency-Key": SECRET}).json()["id"] == COMPLETED
    assert server.start_chat(f"And {SECRET}?") == RUNNING
    provider.wait_chats(2)
    return server


def paths_of(path: str) -> Iterator[str]:
    """The path with Alice's ids, also of what runs."""
    if "{id}" not in path:
        yield path.replace("{name}", "app.js").replace("{id:path}", "openai/m")
        return
    for one in (1, 2) if "conversations" in path or path.startswith("/c/") else (COMPLETED, RUNNING):
        yield path.replace("{id}", f"resp_{one}" if path.startswith("/v1/responses") else str(one))


def walk(server: Server, who: str, headers: dict[str, str]) -> Iterator[Visit]:
    """Every route as this one asks for it. Raises AssertionError for a route without a rule."""
    with open_client(server.url, **headers) as client:
        for route in routes():
            assert route in RULES, (
                f"{route} has no rule in tests/walk.py: what may a stranger and another owner get of it?"
            )
            rule = RULES[route]
            method, _, path = route.partition(" ")
            for one in paths_of(path):
                content = (
                    {"data": rule.form}
                    if rule.form is not None
                    else {"json": rule.body}
                    if rule.body is not None
                    else {}
                )
                response = client.request(method, one, **content)
                expected = rule.stranger if who == "stranger" else rule.carol
                yield Visit(route, one, who, expected, response.status_code, code_of(response), leaks(response, rule))


def code_of(response: httpx.Response) -> str:
    """The error's code, or in a word what there was instead."""
    if "json" not in response.headers.get("content-type", ""):
        return response.headers.get("content-type", "nothing").partition(";")[0]
    document = response.json()
    error = document.get("error") if isinstance(document, dict) else None
    return error["code"] if error else "its own" if len(response.content) > 30 else json.dumps(document)


def leaks(response: httpx.Response, rule: Rule) -> bool:
    """Whether anything of Alice's is in it."""
    filled = rule.lists and response.status_code == 200 and any(response.json().values())
    return filled or SECRET in response.text or SECRET in str(response.headers)


def table(visits: list[Visit]) -> str:
    """Markdown: a line per route, a column per visitor."""
    lines = ["| route | without a token | another owner's token |", "|---|---|---|"]
    for route in dict.fromkeys(visit.route for visit in visits):
        cells = []
        for who in ("stranger", "carol"):
            found = {f"{visit.status} {visit.code}" for visit in visits if visit.route == route and visit.who == who}
            cells.append(", ".join(sorted(found)))
        lines.append(f"| `{route}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Provider() as provider,
        start_server(Path(folder), provider) as server,
    ):
        visits = [
            *walk(server, "stranger", {}),
            *walk(server, "carol", {"Authorization": f"Bearer {TOKENS['carol']}"}),
        ]
    print(table(visits))


if __name__ == "__main__":
    main()
