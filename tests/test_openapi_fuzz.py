"""/openapi.json against the running service: generated requests, with a token and without; answers as promised.

For each operation Schemathesis makes requests that fit the schema and requests that do not. Whatever comes: no 500, a
status and a content type that the operation names, a body that fits its schema, no stack trace.
LLMCHAT_FUZZ_EXAMPLES sets how many of each kind an operation gets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode, checks

import llmchat
from tests import walk
from tests.conftest import Server
from tests.provider import Provider

EXAMPLES = int(os.environ.get("LLMCHAT_FUZZ_EXAMPLES", "12"))
CALMLY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
PROMISES = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
ENDPOINTS = llmchat.create_app(llmchat.Config()).state.service.endpoints
SCHEMA = schemathesis.openapi.from_dict(llmchat.openapi_document(ENDPOINTS))
OPERATIONS = [f"{method.upper()} {path}" for path, methods in SCHEMA.raw_schema["paths"].items() for method in methods]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Alice's server, whose provider answers in three words, so that nothing waits."""
    with Provider(words=3) as provider:
        folder = tmp_path_factory.mktemp("openapi")
        settings = {"LLMCHAT_HEARTBEAT_SECONDS": "0.05", "LLMCHAT_DRAIN_SECONDS": "0"}
        with walk.start_server(folder, provider, **settings) as running:
            running.post(f"/api/v1/messages/{walk.RUNNING}/stop")
            yield running
        assert "Traceback" not in "".join(running.log)


def cases(route: str, known: bool) -> Iterator[Any]:
    """Requests for an operation, those that fit and those that do not; `known`: the id is one of Alice's."""
    method, _, path = route.partition(" ")
    operation = SCHEMA[path][method]
    known_id = 1 if "conversations" in path else f"resp_{walk.COMPLETED}" if "responses" in path else walk.COMPLETED
    fixed = {"path_parameters": {"id": known_id}} if known else {}
    yield operation.as_strategy(GenerationMode.POSITIVE, **fixed)
    described = SCHEMA.raw_schema["paths"][path][method.lower()]
    parts = [one["schema"] for one in described["parameters"] if not (known and one["name"] == "id")]
    parts += [one.get("schema", {}) for one in described.get("requestBody", {}).get("content", {}).values()]
    if any(part not in ({}, {"type": "string"}) for part in parts):  # there is something that does not fit
        yield operation.as_strategy(GenerationMode.NEGATIVE, **fixed)


def check_operation(server: Server, route: str, known: bool, headers: dict[str, str], expected: set[int]) -> None:
    """Asks again and again, and holds what comes against the document; `expected`, if any, are the only statuses."""

    def run(case: Any) -> None:
        response = case.call(base_url=server.url, headers=headers, timeout=30)
        case.validate_response(response, checks=PROMISES)
        assert not expected or response.status_code in expected, response.status_code
        assert not re.search(r'Traceback|File ".*line \d', response.text)

    for strategy in cases(route, known):
        seed(20261123)(CALMLY(given(case=strategy)(run)))()


@pytest.mark.parametrize(
    ("route", "known"),
    [(route, False) for route in OPERATIONS] + [(route, True) for route in OPERATIONS if "{id}" in route],
)
def test_every_answer_is_as_the_document_promises(server: Server, route: str, known: bool) -> None:
    check_operation(server, route, known, {"Authorization": f"Bearer {walk.TOKENS['alice']}"}, set())


@pytest.mark.parametrize("route", OPERATIONS)
def test_without_a_token_every_answer_is_as_the_document_promises(server: Server, route: str) -> None:
    expected = {200} if "health" in route else {401}
    check_operation(server, route, "{id}" in route, {}, expected)


def test_the_document_is_the_one_that_is_served(server: Server) -> None:
    assert server.get("/openapi.json").json() == SCHEMA.raw_schema
