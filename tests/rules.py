"""What providers refuse, as far as a request's JSON shows it: an independent reading of the dialects' rules.

    broken_openai(body)      platform.openai.com/docs/api-reference/chat, and what servers with chat templates add
    broken_mistral(body)     the same, and docs.mistral.ai/api
    broken_anthropic(body)   docs.claude.com/en/api/messages, and .../build-with-claude/extended-thinking

Each returns a sentence for each rule that a request breaks. The rules are those of the strictest server of a dialect;
what is quoted are the words of its refusal. Nothing here knows llmchat.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import msgspec

Json = dict[str, Any]
IDENTIFIER = re.compile(r"[a-zA-Z0-9_-]+")
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def broken_openai(body: Json, may_end_with_answer: bool = False) -> list[str]:
    """The rules of OpenAI's dialect that the request breaks."""
    return [f"{place}: {what}" for place, what in openai_breaks(body, may_end_with_answer)]


def broken_mistral(body: Json, may_end_with_answer: bool = False) -> list[str]:
    """The rules that the request breaks of OpenAI's dialect as Mistral speaks it."""
    return broken_openai(body, may_end_with_answer) + [f"{place}: {what}" for place, what in mistral_breaks(body)]


def broken_anthropic(body: Json, may_end_with_answer: bool = False) -> list[str]:
    """The rules of Anthropic's dialect that the request breaks."""
    return [f"{place}: {what}" for place, what in anthropic_breaks(body, may_end_with_answer)]


Breaks = Iterator[tuple[str, str]]

# ── OpenAI ──────────────────────────────────────────────────────────────────────────────────────────────────────────

OPENAI_FIELDS = {"model", "messages", "stream", "stream_options", "temperature", "max_tokens", "max_completion_tokens"}
OPENAI_FIELDS |= {"reasoning_effort", "tools", "tool_choice", "top_p", "stop", "response_format", "seed"}
OPENAI_FIELDS |= {"frequency_penalty", "presence_penalty", "parallel_tool_calls", "reasoning_split"}
MESSAGE_FIELDS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "tool_calls", "reasoning_content", "prefix", "partial"},
    "tool": {"role", "content", "tool_call_id"},
}


def openai_breaks(body: Json, may_end_with_answer: bool) -> Breaks:
    yield from ((name, "Unknown parameter") for name in body.keys() - OPENAI_FIELDS)
    messages = body["messages"]
    if not messages:
        yield "messages", "empty array. Expected an array with minimum length 1"
        return
    if {"max_tokens", "max_completion_tokens"} <= body.keys():
        yield "max_tokens", "only one of the two names"
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name, 1) < 1:
            yield name, "must be at least 1"
    yield from openai_tool_breaks(body)
    yield from openai_order_breaks(messages, may_end_with_answer)
    for index, message in enumerate(messages):
        yield from ((f"messages.{index}", what) for what in openai_message_breaks(message))
    yield from openai_call_breaks(messages)


def openai_tool_breaks(body: Json) -> Breaks:
    for index, tool in enumerate(body.get("tools", ())):
        if tool.get("type") != "function" or not is_name(tool["function"].get("name"), 64):
            yield f"tools.{index}", "is a function with a name"
    if "tools" in body and not body["tools"]:
        yield "tools", "empty array"
    if "tool_choice" in body and not body.get("tools"):
        yield "tool_choice", "is only allowed when 'tools' are specified"


def openai_order_breaks(messages: list[Json], may_end_with_answer: bool) -> Breaks:
    """Chat templates: 'Conversation roles must alternate user/assistant/user/assistant/...'."""
    roles = [message["role"] for message in messages]
    spoken = [role for role in roles if role != "system"]
    if not spoken or spoken[0] != "user":
        yield "messages", "the first message is not the user's"
    for index, (one, other) in enumerate(itertools.pairwise(roles)):
        if one == other and one in ("user", "assistant"):
            yield f"messages.{index + 1}", f"two of {one} in a row"
    if roles[-1] == "assistant" and not may_end_with_answer:
        yield "messages", "Expected last role User or Tool"


def openai_message_breaks(message: Json) -> Iterator[str]:
    role, content = message["role"], message["content"]
    yield from (f"{name} does not belong there" for name in message.keys() - MESSAGE_FIELDS[role])
    if isinstance(content, list):
        if role != "user" or not any(part["type"] == "image_url" for part in content):
            yield "content is a list without need: many servers take a string only"
        yield from (what for part in content for what in openai_part_breaks(part))
    elif content is None:
        if role != "assistant" or not message.get("tool_calls"):
            yield "content is null without tool calls"
    elif not isinstance(content, str) or (role != "tool" and not content.strip()):
        yield "content is blank"


def openai_part_breaks(part: Json) -> Iterator[str]:
    if part["type"] == "text":
        if not part["text"].strip():
            yield "a blank text part"
        return
    found = re.fullmatch(r"data:([a-z/]+);base64,(.*)", part["image_url"]["url"], re.DOTALL)
    if part["type"] != "image_url" or not found or found[1] not in IMAGE_TYPES or not BASE64.fullmatch(found[2]):
        yield "You uploaded an unsupported image"


def openai_call_breaks(messages: list[Json]) -> Breaks:
    """'An assistant message with tool_calls must be followed by tool messages responding to each tool_call_id', and
    'messages with role tool must be a response to a preceding message with tool_calls'."""
    waiting: list[str] = []
    seen: set[str] = set()
    for index, message in enumerate([*messages, {"role": "end"}]):
        place = f"messages.{index}"
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                yield place, "a result of no open call"
            else:
                waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            yield place, f"comes before the results of {waiting}"
        waiting = [call["id"] for call in message.get("tool_calls", ())]
        if "tool_calls" in message and not waiting:
            yield place, "tool_calls is empty"
        yield from ((place, f"the id {one} a second time") for one in repeated(waiting, seen))
        for call in message.get("tool_calls", ()):
            yield from ((place, what) for what in openai_one_call_breaks(call))


def openai_one_call_breaks(call: Json) -> Iterator[str]:
    if call["type"] != "function":
        yield "a call is of type function"
    if not is_name(call["id"], 40):
        yield f"tool_calls.id {call['id']!r}: string too long, or a character that other servers refuse"
    if not is_name(call["function"]["name"], 64):
        yield f"the function's name {call['function']['name']!r} does not match '^[a-zA-Z0-9_-]+$'"
    try:
        is_object = isinstance(msgspec.json.decode(call["function"]["arguments"]), dict)
    except (msgspec.MsgspecError, RecursionError):
        is_object = False
    if not is_object:
        yield "Failed to parse tool call arguments as JSON"  # llama.cpp, vLLM, SGLang


# ── Mistral ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def mistral_breaks(body: Json) -> Breaks:
    for index, message in enumerate(body["messages"]):
        named = [call["id"] for call in message.get("tool_calls", ())]
        named += [message["tool_call_id"]] if message["role"] == "tool" else []
        for one in named:
            if not re.fullmatch("[a-zA-Z0-9]{9}", one):
                yield f"messages.{index}", f"Tool call id was {one} but must be a-z, A-Z, 0-9, with a length of 9."
    if body.get("tool_choice") == "required":
        yield "tool_choice", "is auto, none, any or a tool"
    if "stream_options" in body:
        yield "stream_options", "Extra inputs are not permitted"


# ── Anthropic ───────────────────────────────────────────────────────────────────────────────────────────────────────

ANTHROPIC_FIELDS = {"model", "max_tokens", "messages", "stream", "system", "temperature", "top_p", "stop_sequences"}
ANTHROPIC_FIELDS |= {"tools", "tool_choice", "thinking"}
THINKING = ("thinking", "redacted_thinking")
ROLE_BLOCKS = {"user": {"text", "image", "tool_result"}, "assistant": {"text", "tool_use", *THINKING}}


def anthropic_breaks(body: Json, may_end_with_answer: bool) -> Breaks:
    yield from ((name, "Extra inputs are not permitted") for name in body.keys() - ANTHROPIC_FIELDS)
    messages = body["messages"]
    if not messages:
        yield "messages", "at least one message is required"
        return
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        yield "max_tokens", "Field required"
    if not body.get("system", "x").strip():
        yield "system", "text content blocks must contain non-whitespace text"
    if not 0 <= body.get("temperature", 1) <= 1:
        yield "temperature", "range: 0..1"
    yield from anthropic_order_breaks(messages, may_end_with_answer)
    for index, message in enumerate(messages):
        is_last = index == len(messages) - 1
        yield from ((f"messages.{index}", what) for what in anthropic_message_breaks(message, is_last))
    yield from anthropic_call_breaks(messages)
    yield from anthropic_tool_breaks(body)
    yield from anthropic_thinking_breaks(body)


def anthropic_order_breaks(messages: list[Json], may_end_with_answer: bool) -> Breaks:
    for index, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[index % 2]:
            yield f"messages.{index}", "roles must alternate between user and assistant, a user's first"
    if messages[-1]["role"] == "assistant" and not may_end_with_answer:
        yield "messages", "This model does not support assistant message prefill"


def anthropic_message_breaks(message: Json, is_last: bool) -> Iterator[str]:
    content = message["content"]
    if not content:
        yield "all messages must have non-empty content"
        return
    types = [block["type"] for block in content]
    yield from (f"a {one} block in a message of {message['role']}" for one in set(types) - ROLE_BLOCKS[message["role"]])
    yield from (what for block in content for what in anthropic_block_breaks(block))
    if (
        is_last
        and message["role"] == "assistant"
        and content[-1].get("text", "x") != content[-1].get("text", "x").rstrip()
    ):
        yield "final assistant content cannot end with trailing whitespace"
    if types[-1] in THINKING:
        yield "The final block in an assistant message cannot be `thinking`"
    if set(types) & set(THINKING) and types[0] not in THINKING:
        yield "the first block must be thinking or redacted_thinking. Found " + types[0]
    if "tool_result" in types[types.count("tool_result") :]:
        yield "tool_result blocks come first"


def anthropic_block_breaks(block: Json) -> Iterator[str]:
    kind = block["type"]
    if kind == "text" and not block["text"].strip():
        yield "text content blocks must contain non-whitespace text"
    elif kind == "thinking" and not (block["signature"] and isinstance(block["thinking"], str)):
        yield "thinking without a signature"
    elif kind == "redacted_thinking" and not block["data"]:
        yield "redacted thinking without data"
    elif kind == "image":
        source = block["source"]
        if (
            source["type"] != "base64"
            or source["media_type"] not in IMAGE_TYPES
            or not BASE64.fullmatch(source["data"])
        ):
            yield "an image that is none"
    elif kind == "tool_use":
        if not IDENTIFIER.fullmatch(block["id"]):
            yield "tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'"
        if not is_name(block["name"], 64):
            yield "tool_use.name: String should match pattern '^[a-zA-Z0-9_-]{1,64}$'"
        if not isinstance(block["input"], dict):
            yield "tool_use.input: Input should be a valid dictionary"


def anthropic_call_breaks(messages: list[Json]) -> Breaks:
    """'Each `tool_use` block must have a corresponding `tool_result` block in the next message', and the other way."""
    waiting: list[str] = []
    seen: set[str] = set()
    for index, message in enumerate([*messages, {"role": "end", "content": []}]):
        place = f"messages.{index}"
        results = [block["tool_use_id"] for block in message["content"] if block["type"] == "tool_result"]
        if sorted(results) != sorted(waiting):
            yield place, f"has results of {results}, to calls {waiting}"
        waiting = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
        yield from ((place, f"`tool_use` ids must be unique: {one}") for one in repeated(waiting, seen))


def anthropic_tool_breaks(body: Json) -> Breaks:
    blocks = [block for message in body["messages"] for block in message["content"]]
    if any(block["type"] in ("tool_use", "tool_result") for block in blocks) and not body.get("tools"):
        yield "tools", "Requests which include `tool_use` or `tool_result` blocks must define tools"
    for index, tool in enumerate(body.get("tools", ())):
        if not is_name(tool["name"], 64) or tool["input_schema"].get("type") != "object":
            yield f"tools.{index}", "has a name and an input_schema of type object"
    if "tool_choice" in body and not body.get("tools"):
        yield "tool_choice", "may only be specified while providing tools"


def anthropic_thinking_breaks(body: Json) -> Breaks:
    """With thinking on, the newest turn starts with thinking; with it off, none is in there. A turn is all that follows
    a question; whether a message that holds a result and words is one, the documentation leaves open: both hold."""
    messages, thinking = body["messages"], body.get("thinking")
    questions = [index for index, one in enumerate(messages) if one["role"] == "user" and not has(one, "tool_result")]
    begin = questions[-1] + 1 if questions else 0
    newest = [(index, one) for index, one in enumerate(messages) if index >= begin and one["role"] == "assistant"]
    if thinking is None:
        for index, message in newest:
            if has(message, *THINKING):
                yield (
                    f"messages.{index}",
                    "When thinking is disabled, a final assistant message cannot contain thinking",
                )
        return
    if not 1024 <= thinking["budget_tokens"] < body["max_tokens"]:
        yield "thinking", "budget_tokens: at least 1,024, and less than max_tokens"
    if body.get("temperature", 1) != 1 or body.get("top_p", 1) < 0.95:
        yield "thinking", "temperature may only be 1 and top_p not below 0.95 when thinking is enabled"
    if body.get("tool_choice", {}).get("type") in ("any", "tool"):
        yield "thinking", "Thinking may not be enabled when tool_choice forces tool use"
    if messages[-1]["role"] == "assistant":
        yield "thinking", "no prefill beside thinking"
    for index, message in newest:
        is_start = any(block["type"] != "tool_result" for block in messages[index - 1]["content"])
        if is_start and message["content"][0]["type"] not in THINKING:
            yield f"messages.{index}", "When thinking is enabled, a final assistant message must start with thinking"


# ── both ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def has(message: Json, *types: str) -> bool:
    return any(block["type"] in types for block in message["content"])


def is_name(text: Any, characters_max: int) -> bool:
    return isinstance(text, str) and bool(IDENTIFIER.fullmatch(text)) and len(text) <= characters_max


def repeated(names: list[str], seen: set[str]) -> list[str]:
    """The names that were seen before; takes them all."""
    found = [name for position, name in enumerate(names) if name in seen or name in names[:position]]
    seen.update(names)
    return found
