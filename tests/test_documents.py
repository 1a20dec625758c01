"""What the service says about itself: /openapi.json, /docs and help, held against what it does."""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

import llmchat
from tests.client import EventStream
from tests.conftest import Server

ALL_ENDPOINTS = (*llmchat.ENDPOINTS, *llmchat.OPENAI_ENDPOINTS)
ENDPOINTS = [(one.method, one.shown_path) for one in ALL_ENDPOINTS]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as a first start has it, with one finished conversation."""
    with Server(tmp_path_factory.mktemp("documents")) as server:
        asked = {"message": "Hello", "model": "demo/reasoning", "stream": False}
        assert server.post("/api/v1/chat", asked).status_code == 200
        yield server


@pytest.fixture(scope="module")
def document(shared: Server) -> dict[str, Any]:
    response = shared.get("/openapi.json")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = response.json()
    return found


def validate(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    """Raises jsonschema.ValidationError. The document's own components are what the schema refers to."""
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def answer_schema(document: dict[str, Any], method: str, path: str, status: int) -> dict[str, Any]:
    response = document["paths"][path][method.lower()]["responses"][str(status)]
    schema: dict[str, Any] = response["content"]["application/json"]["schema"]
    return schema


# ── openapi.json ──


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.") and document["info"]["version"] == llmchat.__version__
    assert [str(error) for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


def test_a_document_with_a_mistake_would_be_noticed(document: dict[str, Any]) -> None:
    broken = {**document, "paths": {"/x": {"get": {"responses": {"200": {}}}}}}
    assert list(OpenAPIV31SpecValidator(broken).iter_errors())


def test_the_document_has_every_endpoint_and_no_other(document: dict[str, Any]) -> None:
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told == set(ENDPOINTS) and len(ENDPOINTS) == len(set(ENDPOINTS))


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    names = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_every_endpoint_is_served(shared: Server, method: str, path: str) -> None:
    response = shared.client.request(method, path.replace("{id}", "999999"), headers={"Accept": "application/json"})
    if response.status_code == 404:
        assert "there is nothing at" not in response.text
    else:
        assert not response.text.startswith('{"error":{"code":"invalid_request","message":"method:')
        assert response.status_code in (200, 400)


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/health",
        "/api/v1/help",
        "/api/v1/messages/2",
        "/api/v1/generations",
        "/api/v1/conversations",
        "/api/v1/conversations/1",
    ],
)
def test_an_answer_is_what_the_document_says(shared: Server, document: dict[str, Any], path: str) -> None:
    template = re.sub(r"\d+$", "{id}", path)
    validate(document, answer_schema(document, "GET", template, 200), shared.get(path).json())


def test_an_answer_of_another_shape_would_be_noticed(shared: Server, document: dict[str, Any]) -> None:
    wrong = {**shared.get("/api/v1/messages/2").json(), "status": "done"}
    with pytest.raises(jsonschema.ValidationError):
        validate(document, answer_schema(document, "GET", "/api/v1/messages/{id}", 200), wrong)


def test_the_answers_of_a_chat_are_what_the_document_says(shared: Server, document: dict[str, Any]) -> None:
    background = shared.post("/api/v1/chat", {"message": "x", "background": True})
    validate(document, answer_schema(document, "POST", "/api/v1/chat", 202), background.json())
    stopped = shared.post(f"/api/v1/messages/{background.json()['message_id']}/stop")
    validate(document, answer_schema(document, "POST", "/api/v1/messages/{id}/stop", 200), stopped.json())
    failed = shared.post("/api/v1/chat", {"message": "x", "model": "demo/fails", "stream": False})
    assert failed.status_code == 502
    validate(document, answer_schema(document, "POST", "/api/v1/chat", 502), failed.json())


def test_an_error_is_what_the_document_says(shared: Server, document: dict[str, Any]) -> None:
    refused = shared.post("/api/v1/chat", {"message": ""})
    validate(document, answer_schema(document, "POST", "/api/v1/chat", 400), refused.json())
    missing = shared.get("/api/v1/messages/999999")
    validate(document, answer_schema(document, "GET", "/api/v1/messages/{id}", 404), missing.json())


@pytest.mark.parametrize(
    ("body", "is_right"),
    [
        ({"message": "x"}, True),
        ({"message": [{"type": "text", "text": "x"}], "parent_id": None, "stream": False}, True),
        ({"message": "x", "temperature": 2, "max_tokens": 1, "fallbacks": ["demo/tour"]}, True),
        ({"message": "x", "reasoning_effort": "low"}, True),
        ({"message": "x", "reasoning_effort": "huge"}, False),
        ({"message": "x", "temperature": 3}, False),
        ({"message": "x", "stream": None}, False),
        ({"message": "x", "zebra": 1}, False),
        ({"message": ""}, False),
        ({}, False),
    ],
)  # fmt: skip
def test_the_schema_of_a_chat_takes_what_the_service_takes(
    shared: Server, document: dict[str, Any], body: dict[str, Any], is_right: bool
) -> None:
    asked = document["paths"]["/api/v1/chat"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    response = shared.post("/api/v1/chat", {**body, "background": True})
    assert (response.status_code == 202) == is_right, response.text
    if is_right:
        validate(document, asked, body)
        shared.post(f"/api/v1/messages/{response.json()['message_id']}/stop")
    else:
        with pytest.raises(jsonschema.ValidationError):
            validate(document, asked, body)


CONTRACT_STATUSES = {
    400: "invalid_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 409: "conflict", 413: "too_large",
    422: "provider_rejected", 429: "rate_limited", 500: "internal", 503: "overloaded draining store_unavailable",
    502: "provider_auth provider_rate_limited provider_unavailable provider_protocol provider_truncated repetition"
    " too_long",
    504: "stalled deadline_exceeded",
}  # fmt: skip


def test_a_codes_status_is_the_contracts(document: dict[str, Any]) -> None:
    contract = {code: status for status, codes in CONTRACT_STATUSES.items() for code in codes.split()}
    assert contract == llmchat.ERROR_STATUSES
    assert set(document["components"]["schemas"]["ErrorDetail"]["properties"]["code"]["enum"]) == set(contract)


# ── docs ──


def curl_lines(page: str) -> list[str]:
    return [html.unescape(line) for line in re.findall("<pre>(curl .*?)</pre>", page, re.DOTALL)]


@pytest.fixture(scope="module")
def page(shared: Server) -> str:
    response = shared.get("/docs")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    return response.text


def test_the_page_has_every_endpoint_with_a_curl_line(page: str) -> None:
    told = re.findall(r'<h2><code><span class="method">(\w+)</span>(.*?)</code></h2>', page)
    assert [(method, html.unescape(path)) for method, path in told] == ENDPOINTS
    assert len(curl_lines(page)) == len(ENDPOINTS)


def test_the_page_names_every_field_of_a_chat_and_every_error(page: str) -> None:
    for field in llmchat.ChatRequest.__struct_fields__:
        assert f"<td><code>{field}</code>" in page
    for code in llmchat.ERROR_STATUSES:
        assert f"<code>{code}</code>" in page


def test_the_page_loads_nothing(page: str) -> None:
    assert re.findall(r"<(script|link|img|iframe|object|embed|audio|video)\b", page) == []
    assert re.findall(r"(src|srcset|action|data)\s*=|url\(|@import", page) == []
    assert re.findall(r'href="([^"]*)"', page) == ["/openapi.json"]


def test_a_host_header_cannot_put_marks_into_the_page(shared: Server) -> None:
    response = shared.get("/docs", headers={"Host": "127.0.0.1<script>"})
    assert (response.status_code, response.headers["content-type"]) == (403, "application/json")
    assert "<script>" not in llmchat.docs_page(ALL_ENDPOINTS, "http://127.0.0.1<script>")


def test_every_curl_line_works(tmp_path: Path) -> None:
    server = Server(tmp_path, LLMCHAT_DEFAULT_MODEL="demo/reasoning")
    try:
        assert server.post("/api/v1/chat", {"message": "Hello", "stream": False}).json()["id"] == 2
        broken = server.post("/api/v1/chat", {"message": "x", "model": "demo/fails", "stream": False}).json()[
            "message_id"
        ]
        lines = curl_lines(server.get("/docs").text)
        for line, endpoint in zip(lines, ALL_ENDPOINTS, strict=True):
            if endpoint.path.startswith("/v1") or "-OJ" in endpoint.curl or "@" in endpoint.curl:
                continue  # these need a response to be there, or read or write a file: they have tests of their own
            body = run_curl(line.replace("/messages/2/continue", f"/messages/{broken}/continue"))
            if endpoint.streams:
                assert body.rstrip().split("\n\n")[-1].startswith("event: end\n"), line
            elif endpoint.path != "/docs":
                assert isinstance(json.loads(body), dict), line
    finally:
        server.close()


def run_curl(line: str) -> str:
    """The body that a line of the page gets, which must come with 200."""
    words = shlex.split(line)
    assert words[0] == "curl"
    more = ["-sS", "--max-time", "60", "-w", "\n%{http_code}"]
    done = subprocess.run([*words, *more], capture_output=True, text=True, timeout=90)
    body, _, status = done.stdout.rpartition("\n")
    assert (done.returncode, status) == (0, "200"), f"{line}\n{done.stdout}{done.stderr}"
    return body


# ── help ──


def test_help_lists_the_endpoints_and_the_demos_models(shared: Server) -> None:
    told = shared.get("/api/v1/help").json()
    assert [(one["method"], one["path"]) for one in told["endpoints"]] == ENDPOINTS
    (demo,) = told["providers"]
    assert (demo["name"], demo["key"], demo["error"]) == ("demo", "not needed", None)
    assert told["default_model"] == f"demo/{demo['models'][0]}" and told["unusable_keys"] == []


def test_every_model_that_help_names_can_be_asked(shared: Server) -> None:
    for model in shared.get("/api/v1/help").json()["providers"][0]["models"]:
        with EventStream(shared.url, "POST", "/api/v1/chat", {"message": "x", "model": f"demo/{model}"}) as stream:
            start = next(stream.events())
        assert start.name == "start", model
        shared.post(f"/api/v1/messages/{start.data['message_id']}/stop")


def test_health_is_served_at_the_root_too(shared: Server) -> None:
    root = shared.get("/", headers={"Accept": "application/json"}).json()
    health = shared.get("/api/v1/health").json()
    assert set(root) == set(health) and (root["status"], root["version"]) == ("ok", llmchat.__version__)
