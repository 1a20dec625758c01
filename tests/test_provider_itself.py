"""The provider and the proxy of the tests do what they say: looked at with raw sockets, http.client and httpx."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests import provider as scripted
from tests.conftest import wait_until
from tests.provider import Answer, Cut, Drip, Hang, Pause, Provider, Raw, Reset, Send, SendForever, ShortBody
from tests.tcp_proxy import TcpProxy

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        yield running


@pytest.fixture
def proxy(provider: Provider) -> Iterator[TcpProxy]:
    with TcpProxy(provider.port) as running:
        yield running


def ask(message: str = "hi", **fields: object) -> dict[str, object]:
    return {"model": "m", "stream": True, "messages": [{"role": "user", "content": message}], **fields}


def post(server: Provider | TcpProxy, path: str = CHAT, **fields: object) -> httpx.Response:
    return httpx.post(server.origin + path, json=ask(**fields), timeout=10)  # type: ignore[arg-type]


def open_stream(server: Provider | TcpProxy, path: str = CHAT) -> socket.socket:
    """A socket with a request sent on it."""
    body = json.dumps(ask()).encode()
    client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body))
    return client


def read_until(client: socket.socket, end: bytes) -> bytes:
    seen = b""
    while not seen.endswith(end):
        piece = client.recv(1)
        assert piece, seen
        seen += piece
    return seen


def read_to_end(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65_536), b""))


def events(text: str) -> list[tuple[str | None, Any]]:
    """(event name, data) of each SSE event; JSON decoded."""
    found: list[tuple[str | None, Any]] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        data = lines["data"] if lines["data"] == "[DONE]" else json.loads(lines["data"])
        found.append((lines.get("event"), data))
    return found


def openai_deltas(text: str) -> list[dict[str, Any]]:
    chunks = [data for _, data in events(text) if data != "[DONE]" and data["choices"]]
    return [chunk["choices"][0]["delta"] for chunk in chunks]


def anthropic_deltas(text: str) -> list[dict[str, Any]]:
    return [data["delta"] for name, data in events(text) if name == "content_block_delta"]


# ---- The default answer -----------------------------------------------------------------------------------------


def test_an_unscripted_request_gets_the_default_answer_in_its_dialect(provider: Provider) -> None:
    expected = scripted.default_answer("hi")
    openai = openai_deltas(post(provider).content.decode())
    anthropic = anthropic_deltas(post(provider, MESSAGES).content.decode())
    assert [delta["content"] for delta in openai if delta.get("content")] == expected
    assert [delta["text"] for delta in anthropic] == expected
    assert post(provider, stream=False, model="other").json()["choices"][0]["message"]["content"] == "".join(expected)
    assert post(provider, MESSAGES, stream=False).json()["content"][0]["text"] == "".join(expected)


def test_the_default_answer_depends_on_the_message_alone_and_is_hard() -> None:
    assert scripted.default_answer("a") == scripted.default_answer("a") != scripted.default_answer("b")
    assert set(scripted.default_answer("a")) >= {
        "😀",
        "日本語",
        "\u2028",
        "data: [DONE]",
        "event: end",
        "\n",
        '"',
        "\\",
    }
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert scripted.last_user_message({"messages": [{"role": "user", "content": parts}, {"role": "tool"}]}) == "ab"


def test_usage_is_sent_when_it_is_asked_for(provider: Provider) -> None:
    assert '"usage"' not in post(provider).text
    assert '"usage"' in post(provider, stream_options={"include_usage": True}).text


# ---- The helpers of the dialects --------------------------------------------------------------------------------


def test_openai_streams_have_text_reasoning_tool_calls_and_errors(provider: Provider) -> None:
    arguments = '{"city": "Paris"}'
    provider.script(
        [*scripted.openai_reasoning("Hm"), *scripted.openai_text("Hello", " world", delay=0.001)],
        scripted.openai_tool_calls(("call_1", "weather", arguments), ("call_2", "time", "{}"), size=5),
        [*scripted.openai_text("Hel", finish=None, usage=None, done=False), *scripted.openai_error_event("died")],
    )
    text, tools, failed = (post(provider).text for _ in range(3))
    assert "".join(delta.get("content") or "" for delta in openai_deltas(text)) == "Hello world"
    assert openai_deltas(text)[0]["reasoning_content"] == "Hm"
    assert text.endswith("data: [DONE]\n\n")
    assert events(text)[-2][1]["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    calls = [call for delta in openai_deltas(tools) for call in delta.get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls if call["index"] == 0) == arguments
    assert [call["id"] for call in calls if "id" in call] == ["call_1", "call_2"]
    assert events(failed)[-1][1]["error"]["message"] == "died"


def test_anthropic_streams_have_text_thinking_tool_use_and_errors(provider: Provider) -> None:
    provider.script(
        [*scripted.anthropic_thinking("Hm", signature="sig"), *scripted.anthropic_text("Hi", index=1)],
        scripted.anthropic_tool_use("toolu_1", "weather", '{"city": "Paris"}'),
        [*scripted.anthropic_text("Hel", finish=None), *scripted.anthropic_error_event("busy")],
    )
    text, tools, failed = (events(post(provider, MESSAGES).text) for _ in range(3))
    block = ["content_block_start", "content_block_delta"]
    end = ["content_block_delta", "content_block_stop"]
    names = ["message_start", *block, *end, *block, "content_block_stop", "message_delta", "message_stop"]
    assert [name for name, _ in text] == names
    assert text[3][1]["delta"] == {"type": "signature_delta", "signature": "sig"}
    parts = [data["delta"]["partial_json"] for name, data in tools if name == "content_block_delta"]
    assert json.loads("".join(parts)) == {"city": "Paris"}
    assert tools[-2][1]["delta"]["stop_reason"] == "tool_use"
    assert failed[-1] == ("error", {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}})


def test_errors_pages_json_and_redirects_have_their_status_and_headers(provider: Provider) -> None:
    provider.script(
        scripted.openai_error(429, "slow", code="rate", retry_after="2"),
        scripted.anthropic_error(529, "busy"),
        scripted.page(502, "<h1>Bad Gateway</h1>"),
        scripted.redirect("http://127.0.0.1:9/v1"),
        scripted.openai_json("Hi", reasoning_content="Hm"),
        scripted.anthropic_json("Hi"),
    )
    limited, busy, bad, moved, openai, anthropic = (post(provider) for _ in range(6))
    assert (limited.status_code, limited.headers["retry-after"], limited.json()["error"]["code"]) == (429, "2", "rate")
    assert (busy.status_code, busy.json()["error"]["type"]) == (529, "overloaded_error")
    assert (bad.status_code, bad.headers["content-type"], bad.text) == (502, "text/html", "<h1>Bad Gateway</h1>")
    assert (moved.status_code, moved.headers["location"]) == (302, "http://127.0.0.1:9/v1")
    assert openai.json()["choices"][0]["message"]["reasoning_content"] == "Hm"
    assert anthropic.json()["usage"] == {"input_tokens": 9, "output_tokens": 3}


def test_a_gzip_encoded_stream_arrives_in_pieces(provider: Provider) -> None:
    provider.script(scripted.gzipped(Answer(steps=[Send(b"one"), provider.gate("two"), Send(b"two")])))
    with httpx.stream("POST", provider.base_url + "/chat/completions", json=ask()) as response:
        pieces = response.iter_bytes()
        assert next(pieces) == b"one"
        provider.open_gate("two")
        assert b"".join(pieces) == b"two"
    provider.script(scripted.gzipped(scripted.json_answer({"a": 1})))
    with httpx.stream("POST", provider.base_url + "/chat/completions", json=ask()) as response:
        body = b"".join(response.iter_raw())
    assert response.headers["content-length"] == str(len(body))
    assert gzip.decompress(body) == b'{"a":1}'


def test_models_may_have_any_shape(provider: Provider) -> None:
    def get(path: str = "/models") -> Any:
        return httpx.get(provider.base_url + path).json()

    assert [model["id"] for model in get()["data"]] == ["test-model"]
    provider.models = scripted.json_answer(["a"])
    assert get() == ["a"]
    provider.models = scripted.anthropic_models("a", "b", "c", page_size=2)
    first, second = get("/models?limit=100"), get("/models?limit=100&after_id=b")
    assert ([m["id"] for m in first["data"]], first["has_more"], first["last_id"]) == (["a", "b"], True, "b")
    assert ([m["id"] for m in second["data"]], second["has_more"]) == (["c"], False)
    assert httpx.get(provider.origin + "/nothing").status_code == 404
    assert provider.chats == []


# ---- The script -------------------------------------------------------------------------------------------------


def test_a_request_is_recorded_and_takes_the_next_answer_of_its_model(provider: Provider) -> None:
    provider.script(lambda request: scripted.json_answer(request.headers["x-key"]))
    provider.script(scripted.json_answer("special"), model="special")
    assert post(provider, model="special").json() == "special"
    with httpx.Client() as client:  # it stays: a client that goes at once may be seen to go first
        answer = client.post(provider.base_url + "/chat/completions", json=ask(), headers={"X-Key": "value"})
        assert answer.json() == "value"
        request = provider.wait_chats(2)[1]
        assert (request.method, request.path, request.field("model")) == ("POST", CHAT, "m")
        assert request.arrived_at <= request.wait_answered() <= time.monotonic()


def test_several_requests_share_a_connection_also_with_chunked_bodies(provider: Provider) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", provider.port, timeout=5)
    for body in (b"{}", iter([b'{"a":', b"1}"])):
        connection.request("POST", CHAT, body, encode_chunked=not isinstance(body, bytes))
        assert connection.getresponse().read()
    assert [request.json for request in provider.requests] == [{}, {"a": 1}]
    assert len(provider.connections) == provider.open_connections == 1
    connection.close()
    provider.wait_open_connections(0)
    assert provider.requests[0].closed_at == provider.requests[1].closed_at


def test_bytes_go_out_as_the_steps_say(provider: Provider) -> None:
    steps: scripted.Steps = [Drip("é".encode(), delay=0.001), Pause(0.001), SendForever([b"c", b"d"]), Raw(b"x")]
    provider.script(Answer(steps=steps, headers={"content-type": None}, before=[Pause(0.001)], framing="close"))
    provider.script(Answer(steps=[*steps[:3], Send(b"")]))
    with open_stream(provider) as client:
        head, _, body = read_to_end(client).partition(b"\r\n\r\n")
    assert (head, body) == (b"HTTP/1.1 200 OK\r\nconnection: close", b"\xc3\xa9cdx")
    with open_stream(provider) as client:
        body = read_until(client, b"0\r\n\r\n").partition(b"\r\n\r\n")[2]
    assert body == b"1\r\n\xc3\r\n1\r\n\xa9\r\n1\r\nc\r\n1\r\nd\r\n0\r\n\r\n"


@pytest.mark.parametrize("ending", [Cut(), ShortBody()])
def test_a_body_can_end_too_early(provider: Provider, ending: Cut | ShortBody) -> None:
    framing: scripted.Framing = "length" if isinstance(ending, ShortBody) else "chunked"
    provider.script(Answer(steps=[Send(b"half"), ending], framing=framing))
    with pytest.raises(httpx.RemoteProtocolError):
        post(provider)
    request = provider.chats[0]
    assert request.wait_closed() and not request.answered_whole
    assert request.connection.closed_by == "provider"


def test_a_reset_reaches_the_client_after_the_bytes_before_it(provider: Provider) -> None:
    provider.script([Send(b"half"), Reset()], Answer(before=[Reset()]))
    with open_stream(provider) as client:
        assert read_until(client, b"half")
        with pytest.raises(ConnectionResetError):
            read_to_end(client)
    with open_stream(provider) as client, pytest.raises(ConnectionResetError):
        read_to_end(client)


# ---- Who closes, and when ---------------------------------------------------------------------------------------


def endless(count: int) -> bytes:
    return b"%d " % count * 1000


@pytest.mark.parametrize(
    "step", [Hang(), Pause(60), SendForever(endless), SendForever(endless, 0.001), Drip(bytes(10**6), 1, 1.0)]
)
@pytest.mark.parametrize("reading", [True, False])
def test_a_close_of_the_client_is_noticed_at_once(provider: Provider, step: scripted.Step, reading: bool) -> None:
    provider.script([Send(b"begin"), provider.gate("begun"), step])
    client = open_stream(provider)
    provider.wait_at_gate("begun")
    provider.open_gate("begun")
    if reading:
        read_until(client, b"begin")
    before = time.monotonic()
    client.close()
    request = provider.chats[0]
    assert before <= request.wait_closed()
    assert request.connection.closed_by == "client" and not request.answered_whole
    wait_until(lambda: not provider._tasks, "the end of the answer, which nobody takes")


def test_a_client_that_does_not_read_stops_the_sender_and_is_seen_closing(provider: Provider) -> None:
    sent_bytes: list[int] = []

    def piece(_: int) -> bytes:
        sent_bytes.append(100_000)
        return bytes(100_000)

    provider.script([SendForever(piece)])
    client = open_stream(provider)
    (request,) = provider.wait_chats()
    seen = 0
    while not seen or len(sent_bytes) != seen:  # until a tenth of a second passes without a send: the buffers are full
        seen = len(sent_bytes)
        time.sleep(0.1)
        assert sum(sent_bytes) < 100_000_000
    client.close()
    assert request.wait_closed() and request.connection.closed_by == "client"


def test_waits_are_bounded_and_say_what_did_not_happen(provider: Provider) -> None:
    with pytest.raises(TimeoutError, match="gate 'never'"):
        provider.wait_at_gate("never", timeout=0.01)
    with open_stream(provider), pytest.raises(TimeoutError, match="completions is closed"):
        provider.wait_chats()[0].wait_closed(0.01)


def test_a_provider_that_forgets_is_as_new_at_the_same_address() -> None:
    with Provider(words=3) as provider:
        provider.script([Send(b"x"), provider.gate("g")], [Hang()])
        provider.script([Hang()], model="other")
        provider.delay, provider.words, provider.models = 1.0, 500, [Hang()]
        provider.open_gate("g")
        post(provider)
        address = provider.base_url
        provider.forget()
        assert provider.requests == provider.connections == [] and provider.base_url == address
        expected = "".join(scripted.default_answer("hi", 3))
        assert post(provider, stream=False, model="other").json()["choices"][0]["message"]["content"] == expected
        models = httpx.get(provider.base_url + "/models").json()["data"]
        assert [model["id"] for model in models] == [scripted.MODEL]
        assert provider.call(lambda: not provider._gate("g").is_set())


def test_hundreds_of_streams_run_at_once(provider: Provider) -> None:
    provider.script(*([*scripted.openai_text("a"), provider.gate("all")] for _ in range(300)))

    async def one(number: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        writer.write(head.encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    async def all_of_them() -> list[bytes]:
        opener = asyncio.to_thread(provider.wait_at_gate, "all", 300, 10)
        streams = asyncio.gather(*(one(number) for number in range(300)))
        await opener
        assert provider.open_connections == 300
        provider.open_gate("all")
        return await streams

    answers = asyncio.run(all_of_them())
    assert all(answer.endswith(b"0\r\n\r\n") for answer in answers)
    provider.wait_open_connections(0)


def test_close_leaves_nothing_behind_and_frees_the_port() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    threads, files = threading.active_count(), descriptors()
    with Provider() as provider:
        provider.script([Hang()], [Hang()])
        clients = [open_stream(provider) for _ in range(3)]
        provider.wait_chats(3)
    for client in clients:
        client.close()
    assert (threading.active_count(), descriptors()) == (threads, files)
    with Provider(provider.port) as again:
        assert post(again).status_code == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", scripted.unused_port()))


def test_a_mistake_in_a_script_fails_the_test_at_close() -> None:
    with pytest.raises(AssertionError, match="SendForever has no length"), Provider() as provider:
        provider.script(Answer(steps=[SendForever(endless)], framing="length"))
        with pytest.raises(httpx.RemoteProtocolError):
            post(provider)


# ---- Scenarios, and the provider as a process -------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("scenario", [*scripted.SCENARIOS, "chaos"])
def test_every_scenario_answers_as_its_name_says(provider: Provider, scenario: str, path: str) -> None:
    provider.scenario, provider.delay = scenario, 0.0001
    outcome = "whole"
    try:
        with httpx.stream("POST", provider.origin + path, json=ask(), timeout=0.5) as response:
            content = b""
            for piece in response.iter_raw():
                content += piece
                if len(content) > 40_000:
                    outcome = "endless"
                    break
            outcome = outcome if response.status_code == 200 else str(response.status_code)
    except httpx.HTTPError as error:
        outcome = type(error).__name__
    expected = {"default": "whole", "drip": "whole", "cut": "RemoteProtocolError", "reset": "ReadError"}
    expected |= {"hang": "ReadTimeout", "silent": "ReadTimeout", "gone": "ReadError", "loop": "endless"}
    expected |= {"limited": "429", "broken": "502"}
    assert outcome in ({*expected.values()} if scenario == "chaos" else {expected[scenario]})


def test_the_provider_runs_as_a_process_and_takes_settings_over_http() -> None:
    with scripted.provider_process("--scenario", "broken", "--words", "3") as (process, base_url):
        control = base_url.removesuffix("/v1") + "/control"
        assert httpx.post(base_url + "/chat/completions", json=ask()).status_code == 502
        assert httpx.post(control + "/settings", json={"scenario": "default"}).status_code == 200
        answer = httpx.post(base_url + "/chat/completions", json=ask(stream=False)).json()
        assert answer["choices"][0]["message"]["content"] == "".join(scripted.default_answer("hi", 3))
        seen = httpx.get(control + "/requests").json()["requests"]
        assert [request["path"] for request in seen] == [CHAT, CHAT]
        process.terminate()
        assert process.wait(5) == 0


# ---- The proxy --------------------------------------------------------------------------------------------------


def test_the_proxy_forwards_unchanged_and_counts(provider: Provider, proxy: TcpProxy) -> None:
    assert post(proxy).content == post(provider).content
    assert proxy.accepted == 1
    assert proxy.forwarded_bytes["to_client"] > 10_000 > proxy.forwarded_bytes["to_server"] > 0
    proxy.wait_open_connections(0)


def test_the_proxy_drips_and_nothing_is_lost(provider: Provider, proxy: TcpProxy) -> None:
    proxy.drip(1)
    assert post(proxy).content == post(provider).content


@pytest.mark.parametrize("ending", ["cut", "reset"])
def test_the_proxy_ends_all_links_on_both_sides(provider: Provider, proxy: TcpProxy, ending: str) -> None:
    provider.script([Send(b"half"), Hang()])
    with open_stream(proxy) as client:
        read_until(client, b"half\r\n")
        getattr(proxy, ending)()
        if ending == "cut":
            assert read_to_end(client) == b""
        else:
            with pytest.raises(ConnectionResetError):
                read_to_end(client)
    assert provider.chats[0].wait_closed()
    proxy.wait_open_connections(0)


@pytest.mark.parametrize("ending", ["cut", "reset"])
def test_the_proxy_ends_a_link_after_exactly_so_many_bytes(proxy: TcpProxy, ending: Any) -> None:
    proxy.cut_after(100, ending=ending)
    seen = b""
    with open_stream(proxy) as client:
        try:
            while piece := client.recv(7):
                seen += piece
        except ConnectionResetError:
            assert ending == "reset"
    assert len(seen) == 100
    assert post(proxy).status_code == 200
    proxy.cut_after(50, "to_server")
    with open_stream(proxy) as client:
        assert read_to_end(client) == b""


def test_a_frozen_proxy_accepts_and_forwards_nothing_not_even_a_close(provider: Provider, proxy: TcpProxy) -> None:
    provider.script([Send(b"a"), provider.gate("later"), Send(b"b"), provider.gate("end")])
    with open_stream(proxy) as client:
        read_until(client, b"a\r\n")
        proxy.freeze()
        provider.open_gate("later")
        provider.wait_at_gate("end")
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.thaw()
        assert read_until(client, b"b\r\n")
        proxy.freeze()
    with open_stream(proxy):
        proxy.wait_open_connections(2)
    assert provider.chats[0].closed_at is None and len(provider.chats) == 1
    proxy.cut()
    assert provider.chats[0].wait_closed()


def test_a_close_and_a_reset_pass_the_proxy(provider: Provider, proxy: TcpProxy) -> None:
    provider.script([Send(b"half"), Reset()], [Send(b"half"), Hang()])
    with open_stream(proxy) as client, pytest.raises(ConnectionResetError):
        read_to_end(client)
    with open_stream(proxy) as client:
        read_until(client, b"half\r\n")
    assert provider.chats[1].wait_closed() and provider.chats[1].connection.closed_by == "client"
    nowhere = TcpProxy(scripted.unused_port())
    with nowhere, pytest.raises(ConnectionError), open_stream(nowhere) as client:  # as early as in connect()
        read_to_end(client)
