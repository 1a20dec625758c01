"""The main job, in short: an answer streams, is stored, and is what the provider sent."""

from collections.abc import Callable

from tests.client import Reader
from tests.conftest import Server
from tests.provider import Cut, Pause, Provider, default_answer, openai_reasoning, openai_text


def test_a_chat_streams_the_whole_answer_and_stores_it(server: Server, provider: Provider) -> None:
    reader = Reader()
    with server.chat("Hello") as stream:
        reader.read(stream)
    assert reader.content == "".join(default_answer("Hello"))
    assert server.content(2) == reader.content
    assert reader.end is not None and reader.end["status"] == "completed"
    assert reader.names[0] == "start" and reader.names[-1] == "end" and set(reader.names[1:-1]) == {"delta"}
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["cache-control"] == "no-store, no-transform"
    assert len(provider.chats) == 1


def test_a_first_start_without_any_key_answers_through_the_demo_provider(demo_server: Server) -> None:
    reader = Reader()
    with demo_server.chat("What is this?") as stream:
        reader.read(stream)
    assert "> What is this?" in reader.content and reader.content.endswith("🙂.\n")
    assert demo_server.content(2) == reader.content


def test_a_chat_without_a_stream_gives_the_finished_message(server: Server) -> None:
    response = server.post("/api/v1/chat", {"message": "Hello", "stream": False})
    assert response.status_code == 200
    assert response.json()["text"] == "".join(default_answer("Hello"))
    assert response.json() == server.message(2)


def test_a_chat_in_the_background_answers_at_once_and_goes_on(serve: Callable[..., Server]) -> None:
    server = serve()
    message_id = server.start_chat("Hello")
    assert server.wait_ended(message_id)["text"] == "".join(default_answer("Hello"))


def test_the_timing_tells_when_the_text_began_after_the_thinking(server: Server, provider: Provider) -> None:
    provider.script([*openai_reasoning("Hm."), provider.gate("thinking"), Pause(0.01), *openai_text("Yes.")])
    reader = Reader()
    with server.chat("Hello") as stream:
        for event in stream.events():
            reader.take(event)
            if reader.content == "Hm.":
                provider.open_gate("thinking")
    timing = server.message(2)["timing"]
    assert reader.end is not None and reader.end["timing"] == timing
    assert 0 <= timing["first_delta_ms"] < timing["first_text_ms"] <= timing["total_ms"]


def test_an_answer_that_broke_off_while_thinking_has_its_first_text_when_it_is_continued(
    server: Server, provider: Provider
) -> None:
    provider.script([*openai_reasoning("Hm."), Cut()], openai_text("Yes."))
    broken = server.wait_ended(server.start_chat("Hello"))["timing"]
    assert broken["first_text_ms"] is None and broken["first_delta_ms"] is not None
    assert server.post("/api/v1/messages/2/continue", {"background": True}).status_code == 202
    timing = server.wait_ended(2)["timing"]
    assert timing["first_delta_ms"] == broken["first_delta_ms"]
    assert broken["total_ms"] <= timing["first_text_ms"] <= timing["total_ms"]
