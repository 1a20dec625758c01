"""Conversations as trees: regenerate, continue, branch; what goes upstream, and what is found again."""

from __future__ import annotations

import json
from typing import Any

import pytest

import llmchat
from tests.client import EventStream, Reader
from tests.conftest import Server
from tests.provider import Cut, Hang, Provider, openai_error, openai_text


def whole(server: Server, message: Any = "Hello", **more: Any) -> dict[str, Any]:
    """A finished answer."""
    response = server.post("/api/v1/chat", {"message": message, "stream": False, **more})
    assert response.status_code == 200, response.text
    return response.json()


def asked(provider: Provider, index: int = -1) -> list[tuple[str, Any]]:
    """(role, content) of what went upstream."""
    return [(one["role"], one["content"]) for one in provider.chats[index].json["messages"]]


def test_regenerate_makes_a_sibling_and_asks_the_same_question_again(server: Server, provider: Provider) -> None:
    provider.script(openai_text("One"), openai_text("Two"))
    first = whole(server, temperature=0.5)
    second = server.post(f"/api/v1/messages/{first['id']}/regenerate", {"stream": False, "model": "openai/n"}).json()
    assert (first["text"], second["text"]) == ("One", "Two")
    assert first["parent_id"] == second["parent_id"] and first["id"] != second["id"]
    assert second["model"] == "n" and provider.chats[1].json["temperature"] == 0.5
    assert asked(provider, 0) == asked(provider, 1) == [("user", "Hello")]
    conversation = server.get(f"/api/v1/conversations/{first['conversation_id']}").json()
    assert conversation["path"] == [first["parent_id"], second["id"]]
    assert [one["id"] for one in conversation["messages"] if one["parent_id"] == first["parent_id"]] == [
        first["id"],
        second["id"],
    ]


def test_only_the_path_to_the_root_goes_upstream(server: Server, provider: Provider) -> None:
    provider.script(*[openai_text(text) for text in ("A", "B", "C", "D")])
    first = whole(server, "one")
    whole(server, "two", conversation_id=first["conversation_id"])
    branch = whole(server, "other two", conversation_id=first["conversation_id"], parent_id=first["id"])
    assert asked(provider) == [("user", "one"), ("assistant", "A"), ("user", "other two")]
    fresh = whole(server, "anew", conversation_id=first["conversation_id"], parent_id=None)
    assert asked(provider) == [("user", "anew")]
    assert branch["conversation_id"] == fresh["conversation_id"]


def test_a_failed_and_an_empty_answer_leave_no_hole_in_the_history(server: Server, provider: Provider) -> None:
    provider.script(openai_error(400, "no"), openai_text(), openai_text("B"))
    assert server.post("/api/v1/chat", {"message": "one", "stream": False}).status_code == 422
    assert whole(server, "two", conversation_id=1)["text"] == ""
    whole(server, "three", conversation_id=1)
    assert asked(provider) == [("user", "one\n\ntwo\n\nthree")]


def test_continue_goes_on_in_the_same_message_and_drops_what_is_said_again(server: Server, provider: Provider) -> None:
    provider.script([*openai_text("The capital of France", finish=None, usage=None, done=False), Cut()],
                    openai_text("of France is ", "Paris."))  # fmt: skip
    reader = Reader()
    with server.chat("Capital?") as stream:
        reader.read(stream)
    assert reader.end is not None and reader.end["error"]["code"] == "provider_truncated"
    with EventStream(server.url, "POST", "/api/v1/messages/2/continue", {}) as stream:
        reader.read(stream)
    assert reader.content == "The capital of France is Paris." == server.content(2)
    message = server.message(2)
    assert message["status"] == "completed" and message["error"] is None and len(message["attempts"]) == 2
    assert [role for role, _ in asked(provider)] == ["user", "assistant", "user"]
    assert "exactly where it stopped" in asked(provider)[-1][1]


def test_continue_prefills_where_the_provider_can(serve: Any, provider: Provider) -> None:
    server = serve(LLAMACPP_BASE_URL=provider.base_url, LLAMACPP_MODELS="tiny")
    provider.script([*openai_text("ha ha ", finish=None, usage=None, done=False), Cut()], openai_text("ha ha ha"))
    server.post("/api/v1/chat", {"message": "Laugh", "stream": False, "model": "llamacpp/tiny"})
    message = server.post("/api/v1/messages/2/continue", {"stream": False}).json()
    assert message["text"] == "ha ha ha ha ha"
    assert asked(provider) == [("user", "Laugh"), ("assistant", "ha ha ")]


def test_continue_after_a_kill_joins_without_a_seam_and_with_exact_cursors(server: Server, provider: Provider) -> None:
    provider.script(
        [*openai_text("First half,", finish=None, usage=None, done=False), Hang()], openai_text(" second half.")
    )
    reader = Reader()
    with server.chat() as stream:
        reader.read(stream, 2)
    server.kill()
    server.start()
    assert server.message(2)["status"] == "interrupted"
    with EventStream(server.url, "POST", "/api/v1/messages/2/continue", {}) as stream:
        reader.read(stream)
    assert reader.content == "First half, second half." == server.content(2)
    resumed = Reader()
    with server.resume(2) as stream:
        resumed.read(stream)
    assert resumed.content == reader.content
    assert server.rows("SELECT count(*) FROM message WHERE role = 'assistant'") == [(1,)]


def test_an_answer_that_is_whole_cannot_be_continued(server: Server) -> None:
    whole(server)
    response = server.post("/api/v1/messages/2/continue")
    assert response.status_code == 409 and "broke off" in response.json()["error"]["message"]
    response = server.post("/api/v1/messages/1/continue")
    assert response.status_code == 400 and "role user" in response.json()["error"]["message"]


def test_tool_calls_come_back_and_their_results_go_out(server: Server, provider: Provider) -> None:
    from tests.provider import openai_tool_calls

    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    provider.script(openai_tool_calls(("call_1", "weather", '{"city":"Rome"}')), openai_text("Sunny."))
    answer = whole(server, "Weather?", tools=tools)
    assert answer["finish_reason"] == "tool_calls"
    assert json.loads(answer["content"][0]["text"]) == {
        "id": "call_1",
        "name": "weather",
        "arguments": '{"city":"Rome"}',
    }
    result = {"type": "tool_result", "tool_call_id": "call_1", "text": "22 °C"}
    final = whole(server, [result], conversation_id=answer["conversation_id"], tools=tools)
    assert final["text"] == "Sunny."
    messages = provider.chats[-1].json["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Rome"}'}
    assert messages[2]["tool_call_id"] == "call_1" and messages[2]["content"] == "22 °C"


def test_a_tool_call_that_nobody_answered_is_left_out_of_the_history(server: Server, provider: Provider) -> None:
    from tests.provider import openai_tool_calls

    provider.script(openai_tool_calls(("call_1", "weather", "{}")), openai_text("Fine."))
    answer = whole(server, "Weather?", tools=[{"name": "weather"}])
    whole(server, "Never mind", conversation_id=answer["conversation_id"])
    assert asked(provider) == [("user", "Weather?\n\nNever mind")]


def test_a_result_that_no_call_of_the_answer_asked_for_is_refused(server: Server, provider: Provider) -> None:
    from tests.provider import openai_tool_calls

    result = {"type": "tool_result", "tool_call_id": "call_2", "text": "22 °C"}
    provider.script(openai_tool_calls(("call_1", "weather", "{}")))
    answer = whole(server, "Weather?", tools=[{"name": "weather"}])
    for more in ({"conversation_id": answer["conversation_id"]}, {}):
        parts = [{"type": "text", "text": "Well?"}, result]
        response = server.post("/api/v1/chat", {"message": parts, "stream": False, **more})
        assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_request"
        assert response.json()["error"]["message"].startswith("message.1.tool_call_id: 'call_2' is no call of ")
    assert server.rows("SELECT (SELECT count(*) FROM conversation), (SELECT count(*) FROM message)") == [(1, 2)]


def test_a_result_may_be_sent_again_behind_an_answer_that_failed_without_a_word(
    server: Server, provider: Provider
) -> None:
    from tests.provider import openai_tool_calls

    result = {"type": "tool_result", "tool_call_id": "call_1", "text": "22 °C"}
    provider.script(openai_tool_calls(("call_1", "weather", "{}")), openai_error(400, "no"), openai_text("Warm."))
    answer = whole(server, "Weather?", tools=[{"name": "weather"}])
    again = {"conversation_id": answer["conversation_id"], "stream": False}
    assert server.post("/api/v1/chat", {"message": [result], **again}).status_code == 422
    assert whole(server, [result], **again)["text"] == "Warm."
    assert [role for role, _ in asked(provider)] == ["user", "assistant", "tool"]


def test_parameters_and_system_of_a_conversation_hold_until_they_are_unset(server: Server, provider: Provider) -> None:
    answer = whole(server, system="Be brief.")
    path = f"/api/v1/conversations/{answer['conversation_id']}"
    changed = server.client.patch(path, json={"temperature": 0.1, "max_tokens": 5, "title": "Renamed"}).json()
    assert changed["parameters"] == {"temperature": 0.1, "max_tokens": 5} and changed["title"] == "Renamed"
    whole(server, conversation_id=answer["conversation_id"], temperature=0.9)
    body = provider.chats[-1].json
    assert (body["temperature"], body["max_completion_tokens"]) == (0.9, 5) and body["messages"][0] == {
        "role": "system",
        "content": "Be brief.",
    }
    assert server.client.patch(path, json={"max_tokens": None}).json()["parameters"] == {"temperature": 0.1}


def test_a_model_names_a_conversation_unless_somebody_did(serve: Any, provider: Provider) -> None:
    from tests.conftest import wait_until

    server = serve(LLMCHAT_TITLE_MODEL="openai/n")
    provider.script(openai_text("Greetings among friends"), model="n")
    provider.script(openai_text("Hi!"), openai_text("Hi!"), openai_text("Hi!"), model="m")
    title_of = lambda number: server.get(f"/api/v1/conversations/{number}").json()["title"]  # noqa: E731
    whole(server, "Hello there")
    wait_until(lambda: title_of(1) == "Greetings among friends", "the title")
    provider.script([provider.gate("named"), *openai_text("Too late")], openai_text("In time"), model="n")
    whole(server, "Hello again")
    provider.wait_at_gate("named")
    server.client.patch("/api/v1/conversations/2", json={"title": "By hand"})
    provider.open_gate("named")
    provider.chats[-1].wait_answered()
    whole(server, "Hello at last")
    wait_until(lambda: title_of(3) == "In time", "the title of the one after it")
    assert title_of(2) == "By hand"


def test_a_model_names_a_conversation_once_however_often_its_first_answer_is_continued(
    serve: Any, provider: Provider
) -> None:
    from tests.conftest import wait_until

    server = serve(LLMCHAT_TITLE_MODEL="openai/n")
    provider.script(*[openai_text("part ", finish="length")] * 2, openai_text("end"), openai_text("Hi!"), model="m")
    provider.script(openai_text("Named"), openai_text("Next"), model="n")
    title_of = lambda number: server.get(f"/api/v1/conversations/{number}").json()["title"]  # noqa: E731
    whole(server, "Hello there")
    wait_until(lambda: title_of(1) == "Named", "the title")
    server.client.patch("/api/v1/conversations/1", json={"title": "By hand"})
    for _ in "ab":
        assert server.post("/api/v1/messages/2/continue", {"stream": False}).status_code == 200
    whole(server, "Hello again")
    wait_until(lambda: title_of(2) == "Next", "the title of the one after it")
    assert [chat.json["model"] for chat in provider.chats] == ["m", "n", "m", "m", "m", "n"] and title_of(
        1
    ) == "By hand"


def test_usage_is_summed_by_day_and_model(server: Server, provider: Provider) -> None:
    provider.script(openai_text("A", usage=(10, 2)), openai_text("B", usage=None))
    whole(server)
    whole(server)
    (row,) = server.get("/api/v1/usage").json()["usage"]
    assert row["messages"] == 2 and row["input_tokens"] > 10 and row["estimated"] is True and row["model"] == "m"


def found(server: Server, query: str) -> list[int]:
    return [one["id"] for one in server.get("/api/v1/conversations", params={"query": query}).json()["conversations"]]


def test_search_finds_titles_questions_and_answers_in_any_language(server: Server, provider: Provider) -> None:
    texts = [
        "The quick brown fox",
        "天気はとてもいいです",
        "Über naïve Café-Gäste",
        "def fibonacci(count): pass",
        "สวัสดีครับ",
    ]
    for text in texts:
        provider.script(openai_text(text))
    for number, question in enumerate(["Animals", "Wetter", "Deutsch", "Code", "Thai"], 1):
        whole(server, f"Question {number}: {question}")
    assert found(server, "quick") == [1] and found(server, "qui fo") == [1] and found(server, "QUICK Animals") == []
    assert found(server, "天気") == [2] and found(server, "いい") == [2] and found(server, "天い") == []
    assert found(server, "cafe") == [3] and found(server, "über") == [3] and found(server, "uber") == [3]
    assert found(server, "fibon") == [4] and found(server, "สวัสดี") == [5]
    assert sorted(found(server, "question")) == [1, 2, 3, 4, 5]
    match = server.get("/api/v1/conversations", params={"query": "天気"}).json()["conversations"][0]["match"]
    assert match["message_id"] == 4 and {"text": "天気", "mark": True} in match["snippet"]
    assert "".join(part["text"] for part in match["snippet"]) == "天気はとてもいいです"


def test_only_the_newest_words_of_a_long_query_match_as_prefixes_and_those_beyond_the_limit_not_at_all(
    server: Server, provider: Provider
) -> None:
    words = " ".join(f"word{number:02}x" for number in range(20))
    head = " ".join(words.split()[:8])
    provider.script(openai_text(words))
    whole(server)
    assert found(server, words) == [1] and found(server, "word09 word11") == [1]
    assert found(server, "word09 word11 word13") == [], "the first of three is not complete"
    assert found(server, "word09x word11 word13") == [1]
    assert found(server, "word09x wo") == [1] and found(server, "wo word09x") == [], "two letters, while they are typed"
    assert found(server, f"{head} beyond the limit") == [1], "eight words are looked for"
    assert found(server, f"{head[:-7]} absent") == [] == found(server, f"absent {words}")
    match = server.get("/api/v1/conversations", params={"query": "word15"}).json()["conversations"][0]["match"]
    shown = "".join(part["text"] for part in match["snippet"])
    assert shown.startswith("…") and shown.endswith("word19x") and {"text": "word15x", "mark": True} in match["snippet"]
    match = server.get("/api/v1/conversations", params={"query": "word00x"}).json()["conversations"][0]["match"]
    assert match["snippet"][0] == {"text": "word00x", "mark": True}


@pytest.mark.parametrize(
    ("text", "query", "shown"),
    [
        ("Über naïve Café-Gäste", "cafe", "Über naïve [Café]-Gäste"),
        ("天気はとてもいいです", "いい 天気", "[天気]はとても[いい]です"),
        ("İstanbul istan", "istanbul", "[İstanbul] istan"),
        ("# Hello, foo-bar foo bar", "foo-bar", "# Hello, [foo-bar] [foo bar]"),
        ("x_y z", "y", "x_[y] z"),
        ("a " * 100 + "needle" + " b" * 100, "needle", "…" + "a " * 6 + "[needle]" + " b" * 17 + "…"),
    ],
)
def test_a_snippet_marks_what_the_index_finds(text: str, query: str, shown: str) -> None:
    parts = llmchat.snippet_of(llmchat.segment(text), llmchat.word_finder(llmchat.parse_query(query)))
    assert "".join(f"[{part.text}]" if part.mark else part.text for part in parts) == shown


def test_a_query_is_text_whatever_it_holds(server: Server, provider: Provider) -> None:
    provider.script(openai_text('He said "NEAR(a b)" AND left: x* -- OR NOT'))
    whole(server)
    for query in [
        '"',
        '""',
        "*",
        "a*",
        "NEAR(",
        "near(a b)",
        "AND",
        "NOT",
        "OR OR",
        "title:x",
        "-",
        "--",
        "a AND",
        "(",
        ")",
        "^",
        "{",
        "\\",
        "'",
        "%",
        "' OR 1=1",
    ]:
        response = server.get("/api/v1/conversations", params={"query": query})
        assert response.status_code == 200, (query, response.text)
    assert found(server, "NOT left") == [1] and found(server, '"NEAR(a') == [1]


def test_what_is_deleted_or_renamed_is_found_no_more(server: Server, provider: Provider) -> None:
    provider.script(openai_text("unicorn"))
    whole(server, "zebra")
    server.client.patch("/api/v1/conversations/1", json={"title": "giraffe"})
    assert found(server, "giraffe") == [1]
    assert server.client.delete("/api/v1/conversations/1").json() == {"deleted": True}
    assert found(server, "giraffe") == found(server, "unicorn") == found(server, "zebra") == []
    for table in ("message_fts", "conversation_fts", "delta"):
        assert server.rows(f"SELECT count(*) FROM {table}") == [(0,)]
