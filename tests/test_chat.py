"""The main job, in short: an answer streams, is stored, and is what the provider sent."""

from collections.abc import Callable

from tests.client import Reader
from tests.conftest import Server
from tests.provider import Provider, default_answer


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
