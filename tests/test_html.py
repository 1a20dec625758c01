"""Answers as HTML: rendered once, incrementally, equal to the full render, for whoever looks on and whenever they come."""

from __future__ import annotations

import pytest

from llmchat import render
from tests.client import Event, EventStream
from tests.conftest import Server
from tests.provider import Answer, Hang, Provider, openai_reasoning, openai_text

MARKDOWN = "# Title\n\nA *paragraph* with [a link][late].\n\n```python\nx = 1\n```\n\n- one\n- two\n\n[late]: https://example.org/\n\nEnd."


class Page:
    """What a page holds: blocks by number, the open one, and what is no text."""

    def __init__(self) -> None:
        self.blocks: dict[int, str] = {}
        self.open = ""
        self.reasoning = ""
        self.end: dict | None = None

    def take(self, event: Event) -> None:
        if event.name == "start":
            self.__init__()
        elif event.name == "html":
            self.blocks.update(dict(event.data["settled"]))
            self.open = event.data["open"]
        elif event.name == "delta":
            assert event.data["kind"] == "reasoning"
            self.reasoning += event.data["text"]
        elif event.name == "end":
            self.end = event.data

    @property
    def html(self) -> str:
        return "".join(block for _, block in sorted(self.blocks.items())) + self.open


def html_stream(server: Server, message_id: int) -> EventStream:
    return EventStream(server.url, "GET", f"/api/v1/messages/{message_id}/stream?render=html")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_html_that_came_in_pieces_is_the_full_render(server: Server, provider: Provider, size: int) -> None:
    pieces = [MARKDOWN[start : start + size] for start in range(0, len(MARKDOWN), size)]
    provider.script([provider.gate("go"), *openai_reasoning("Hm."), *openai_text(*pieces, delay=0.005)])
    message_id = server.start_chat("Hi")
    page = Page()
    with html_stream(server, message_id) as stream:
        provider.open_gate("go")
        for event in stream.events():
            page.take(event)
    assert page.html == render(MARKDOWN) and page.reasoning == "Hm."
    assert page.end is not None and page.end["status"] == "completed"
    assert server.get(f"/api/v1/messages/{message_id}?render=html").json()["html"] == page.html


def test_who_comes_late_gets_everything_at_once_and_then_the_rest(server: Server, provider: Provider) -> None:
    provider.script(
        [
            *openai_text("First.\n\nSecond.\n\nThi", finish=None, usage=None, done=False),
            provider.gate("go"),
            *openai_text("rd."),
        ]
    )
    with server.chat("Hi") as plain:
        assert plain.take(2)[-1].name == "delta"
        page = Page()
        with html_stream(server, 2) as stream:
            events = stream.events()
            while "Thi" not in page.html:
                page.take(next(events))
            assert page.blocks[0] == "<p>First.</p>\n"
            late = Page()
            with html_stream(server, 2) as second:
                provider.open_gate("go")
                for event in second.events():
                    late.take(event)
            for event in events:
                page.take(event)
    assert late.html == page.html == render("First.\n\nSecond.\n\nThird.")


def test_a_finished_message_streams_as_html_too(server: Server, provider: Provider) -> None:
    provider.script([*openai_reasoning("Hm."), *openai_text("**Bold**")])
    server.post("/api/v1/chat", {"message": "Hi", "stream": False})
    page = Page()
    with html_stream(server, 2) as stream:
        for event in stream.events():
            page.take(event)
    assert page.html == "<p><strong>Bold</strong></p>\n" and page.reasoning == "Hm." and page.end is not None
    conversation = server.get("/api/v1/conversations/1?render=html").json()
    assert [one.get("html") for one in conversation["messages"]] == [None, page.html]


def test_a_stopped_answer_ends_its_html(server: Server, provider: Provider) -> None:
    provider.script([*openai_text("Some *text", finish=None, usage=None, done=False), Hang()])
    message_id = server.start_chat("Hi")
    page = Page()
    with html_stream(server, message_id) as stream:
        for event in stream.events():
            page.take(event)
            if "text" in page.html and page.end is None and event.name == "html":
                server.post(f"/api/v1/messages/{message_id}/stop")
    assert page.end is not None and page.end["status"] == "stopped" and page.html == render("Some *text")


def test_another_rendering_is_refused(server: Server) -> None:
    server.post("/api/v1/chat", {"message": "Hi", "stream": False})
    response = server.get("/api/v1/messages/2?render=pdf")
    assert response.status_code == 400 and "render: expected html" in response.json()["error"]["message"]


def test_a_retry_is_announced_on_a_stream_of_html_too(server: Server, provider: Provider) -> None:
    provider.script(Answer(503, {}, [], before=(provider.gate("refuse"),)), openai_text("Here."))
    message_id = server.start_chat("Hi")
    with html_stream(server, message_id) as stream:
        events = stream.events()
        names = [next(events).name, next(events).name]
        provider.open_gate("refuse")
        names += [event.name for event in events]
    assert names[:3] == ["start", "html", "notice"] and names[-1] == "end"
