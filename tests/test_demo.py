"""The demo provider shows every state without a key: one model per state, through the same way as a real one's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmchat import DEMO_MARKDOWN, DEMO_REASONING
from tests.client import Reader
from tests.conftest import Server


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("demo"), LLMCHAT_DRAIN_SECONDS="0") as server:
        yield server


def read(demo: Server, model: str) -> Reader:
    reader = Reader()
    with demo.chat(model=model) as stream:
        reader.read(stream)
    assert reader.end is not None
    return reader


def test_help_names_the_models_of_the_demo(demo: Server) -> None:
    (provider,) = demo.get("/api/v1/help").json()["providers"]
    assert provider["name"] == "demo"
    assert provider["models"] == ["tour", "slow", "long", "markdown", "reasoning", "loop", "fails"]


def test_markdown_completes_with_everything_that_markdown_has(demo: Server) -> None:
    reader = read(demo, "demo/markdown")
    assert reader.content == DEMO_MARKDOWN and reader.end is not None
    assert (reader.end["status"], reader.end["finish_reason"]) == ("completed", "stop")


def test_reasoning_comes_before_its_answer(demo: Server) -> None:
    with demo.chat(model="demo/reasoning") as stream:
        deltas = [event.data for event in stream.events() if event.name == "delta"]
    kinds = [delta["kind"] for delta in deltas]
    assert kinds == sorted(kinds) and set(kinds) == {"reasoning", "text"}  # by the alphabet: reasoning, then text
    assert "".join(delta["text"] for delta in deltas if delta["kind"] == "reasoning") == DEMO_REASONING


def test_loop_is_caught_by_the_repetition_guard(demo: Server) -> None:
    reader = read(demo, "demo/loop")
    assert reader.end is not None and reader.end["status"] == "failed"
    assert reader.end["error"]["code"] == "repetition" and "round in circles" in reader.end["error"]["message"]
    assert 1000 <= len(reader.content) < 3000


def test_fails_breaks_off_and_keeps_what_there_was(demo: Server) -> None:
    reader = read(demo, "demo/fails")
    assert reader.end is not None and reader.end["status"] == "failed"
    assert (reader.end["error"]["code"], reader.end["error"]["retryable"]) == ("provider_truncated", True)
    assert reader.content == "This answer breaks off in the mid"


@pytest.mark.parametrize("model", ["demo/slow", "demo/long"])
def test_slow_and_long_can_be_stopped_and_keep_what_there_was(demo: Server, model: str) -> None:
    reader = Reader()
    with demo.chat(model=model) as stream:
        (start,) = stream.take(1)
        reader.take(start)
        reader.read(stream, 1)
        assert demo.post(f"/api/v1/messages/{start.data['message_id']}/stop").json()["status"] == "stopped"
        reader.read(stream)
    assert reader.end is not None and reader.end["status"] == "stopped"
    assert reader.content and reader.content == demo.content(start.data["message_id"])


def test_slow_comes_word_by_word(demo: Server) -> None:
    with demo.chat(model="demo/slow") as stream:
        deltas = [event.data["text"] for event in stream.take(3) if event.name == "delta"]
        assert deltas == ["One ", "word "]


def test_an_unknown_demo_model_is_refused_with_those_that_there_are(demo: Server) -> None:
    response = demo.post("/api/v1/chat", {"message": "Hello", "model": "demo/nothing"})
    assert response.status_code == 400 and "markdown" in response.json()["error"]["message"]
