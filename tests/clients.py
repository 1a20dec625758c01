"""Other people's programs, unchanged, against a running llmchat: `python -m tests.clients [NAME …] [--silence 60]`.

Every client is installed into an environment of its own in a temporary folder (needs a network, or a mirror of the
registries), and runs there against one llmchat with both dialects upstream. A model's name says what its provider does
(`scene`). Prints a line per client, the two lines that each needs to be pointed at llmchat, and exits with 1 if one of
them failed; what cannot be installed is said and is no failure. It is no part of the suite: it takes minutes.

    python -m tests.clients          in this environment: starts the provider and llmchat, then each client, which is
    python -m tests.clients inside NAME   in the client's environment (standard library and that client only)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.provider import (
    Answer,
    Cut,
    Pause,
    Provider,
    Request,
    Script,
    Send,
    SendForever,
    anthropic_error,
    anthropic_text,
    anthropic_thinking,
    anthropic_tool_use,
    openai_error,
    openai_models,
    openai_reasoning,
    openai_text,
    openai_tool_calls,
)
from tests.tcp_proxy import TcpProxy

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "clients-token"
TEXT = "Hello, world!"
SLOW_WORDS = [f"word{number} " for number in range(40)]
CALL = ("call_1", "weather", '{"city": "Paris"}')
SCENES = ("hello", "slow", "endless", "tool", "reason", "cut", "refuse", "silent")
CLIENT_SECONDS = 400  # for one client, its silence apart
INSTALL_SECONDS = 600


# ── the provider: a model's name says what happens ──────────────────────────────────────────────────────────────────


def scene(request: Request, silence: float) -> Script:
    """What a model does."""
    text = anthropic_text if request.is_anthropic else openai_text
    name = request.field("model")
    if name == "slow":
        return text(*SLOW_WORDS, delay=0.1)
    if name == "endless":  # kept alive, so that no guard ends it before the kill -9 does
        return [*text(*SLOW_WORDS)[:6], SendForever(lambda number: b": ping\n\n", delay=1.0)]
    if name == "tool":
        messages = json.dumps(request.field("messages"))
        if "21 degrees" in messages:
            return text("It is ", "21 degrees.")
        return anthropic_tool_use(*CALL) if request.is_anthropic else openai_tool_calls(CALL)
    if name == "reason" and request.is_anthropic:
        return [*anthropic_thinking("Hm, ", "well."), *anthropic_text(TEXT, index=1)]
    if name == "reason":
        return [*openai_reasoning("Hm, ", "well."), *openai_text(TEXT)]
    if name == "cut":
        return [*text(*SLOW_WORDS, delay=0.02)[:20], Cut()]
    if name == "refuse":
        return (anthropic_error if request.is_anthropic else openai_error)(400, "the context is too long")
    if name == "silent":
        steps = text(TEXT)
        return [step for step in steps[:1] if isinstance(step, Send)] + [Pause(silence), *steps[1:]]
    return text("Hello", ", world!", delay=0.05)


class Scenes(Provider):
    """The provider that looks at the model's name."""

    def __init__(self, silence: float) -> None:
        super().__init__()
        self.silence = silence
        self.models = openai_models(*SCENES)

    def _choose(self, request: Request) -> Answer:
        if request.method == "POST":
            script = scene(request, self.silence)
            return script if isinstance(script, Answer) else Answer(steps=script)  # type: ignore[arg-type]
        return super()._choose(request)


# ── inside: what every Python client's process has ──────────────────────────────────────────────────────────────────


def base_url() -> str:
    return os.environ["OPENAI_BASE_URL"]


def own_port() -> int:
    return int(base_url().split(":")[2].split("/")[0])


def upstream_count(question: str) -> int:
    """How often the provider was asked this: what would have been paid for."""
    with urllib.request.urlopen(f"{os.environ['PROVIDER_ORIGIN']}/control/requests", timeout=10) as response:
        return sum(question in json.dumps(one["json"]) for one in json.load(response)["requests"])


def equal(met: Any, expected: Any) -> None:
    assert met == expected, f"{met!r} is not {expected!r}"


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
USER: list[Any] = [{"role": "user", "content": "Say hello"}]


# ── inside: the official package ────────────────────────────────────────────────────────────────────────────────────


def helper_of(client: Any) -> Callable[..., Any]:
    """The package's helper for a streamed chat; in its first major it is elsewhere."""
    return getattr(client.chat.completions, "stream", None) or client.beta.chat.completions.stream  # type: ignore[no-any-return]


def openai_chat(client: Any, dialect: str) -> None:
    """Whole, streamed, by the helper, with reasoning."""
    model = f"{dialect}/hello"
    whole = client.chat.completions.create(model=model, messages=USER)
    equal((whole.choices[0].message.content, whole.choices[0].finish_reason, whole.model), (TEXT, "stop", model))
    assert whole.usage.total_tokens > 0
    chunks = list(
        client.chat.completions.create(model=model, messages=USER, stream=True, stream_options={"include_usage": True})
    )
    equal("".join(one.choices[0].delta.content or "" for one in chunks if one.choices), TEXT)
    assert chunks[-1].usage.total_tokens > 0 and chunks[-2].choices[0].finish_reason == "stop"
    with helper_of(client)(model=f"{dialect}/reason", messages=USER) as stream:
        final = stream.get_final_completion()
    equal((final.choices[0].message.content, final.choices[0].message.reasoning_content), (TEXT, "Hm, well."))


def openai_tools(client: Any, dialect: str) -> None:
    """A tool's round trip, in both APIs."""
    model, tools = f"{dialect}/tool", [{"type": "function", "function": WEATHER}]
    first = client.chat.completions.create(model=model, messages=USER, tools=tools, tool_choice="auto").choices[0]
    equal((first.finish_reason, first.message.tool_calls[0].function.arguments), ("tool_calls", CALL[2]))
    with helper_of(client)(model=model, messages=USER, tools=tools) as stream:
        streamed = stream.get_final_completion().choices[0]
    equal((streamed.finish_reason, streamed.message.tool_calls[0].function.arguments), ("tool_calls", CALL[2]))
    result = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": "21 degrees"}
    second = client.chat.completions.create(model=model, messages=[*USER, first.message, result], tools=tools)
    equal(second.choices[0].message.content, "It is 21 degrees.")
    flat: list[Any] = [{"type": "function", **WEATHER, "strict": False}]
    response = client.responses.create(model=model, input="Weather?", tools=flat)
    call = next(one for one in response.output if one.type == "function_call")
    output = [{"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
    equal(
        client.responses.create(model=model, input=output, tools=flat, previous_response_id=response.id).output_text,
        "It is 21 degrees.",
    )
    history = [{"role": "user", "content": "Weather?"}, *response.output, *output]
    equal(client.responses.create(model=model, input=history, tools=flat, store=False).output_text, "It is 21 degrees.")


def openai_responses(client: Any, dialect: str) -> None:
    """Whole, and streamed by the helper; cancelled while it runs."""
    whole = client.responses.create(model=f"{dialect}/reason", input="Hi", instructions="Be kind.", metadata={"a": "b"})
    equal((whole.output_text, whole.status, whole.metadata), (TEXT, "completed", {"a": "b"}))
    equal([one.type for one in whole.output], ["reasoning", "message"])
    with client.responses.stream(model=f"{dialect}/reason", input="Hi") as stream:
        numbers = [one.sequence_number for one in stream]
        equal((numbers, stream.get_final_response().output_text), (list(range(len(numbers))), TEXT))
    running = client.responses.create(model=f"{dialect}/slow", input="Hi", background=True)
    assert running.status in ("queued", "in_progress"), running.status
    equal(client.responses.cancel(running.id).status, "cancelled")
    equal(list(client.responses.retrieve(running.id, stream=True))[-1].response.status, "cancelled")


def openai_background(client: Any, openai: Any, dialect: str) -> None:
    """The package's own example of a background stream, whose line is cut: resumed from a number, followed by the
    helper by its id; deleted."""
    seen: list[Any] = []
    with TcpProxy(own_port()) as proxy, openai.OpenAI(base_url=f"{proxy.origin}/v1") as behind_proxy:
        try:
            asked = {"model": f"{dialect}/slow", "input": "Hi", "background": True, "stream": True}
            for event in behind_proxy.responses.create(**asked):
                seen.append(event)
                if event.sequence_number == 10:
                    proxy.reset()
        except Exception as exc:  # httpx's or the package's own, by its major
            assert len(seen) > 10, exc
        else:
            raise AssertionError("a cut line passed for the end")
    last, response_id = seen[-1].sequence_number, seen[0].response.id
    equal([one.sequence_number for one in seen], list(range(last + 1)))
    assert 10 <= last < len(SLOW_WORDS), f"cut after {last}"
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=last))
    equal([one.sequence_number for one in rest], list(range(last + 1, last + 1 + len(rest))))
    equal(rest[-1].type, "response.completed")
    deltas = [one.delta for one in [*seen, *rest] if one.type == "response.output_text.delta"]
    equal("".join(deltas), "".join(SLOW_WORDS))
    with client.responses.stream(response_id=response_id, starting_after=last) as helper:
        equal([one.sequence_number for one in helper], [one.sequence_number for one in rest])
        equal(helper.get_final_response().output_text, "".join(SLOW_WORDS))
    equal(len(client.responses.input_items.list(response_id).data), 1)
    client.responses.delete(response_id)
    with contextlib.suppress(openai.NotFoundError):
        raise AssertionError(client.responses.retrieve(response_id))


def openai_errors(client: Any, openai: Any) -> None:
    """Typed errors, in-band errors, and the package's own retries, which are paid once."""
    with contextlib.suppress(openai.NotFoundError):
        raise AssertionError(client.chat.completions.create(model="nobody/x", messages=USER))
    with contextlib.suppress(openai.BadRequestError):
        raise AssertionError(client.chat.completions.create(model="openai/hello", messages=USER, n=2))
    with contextlib.suppress(openai.AuthenticationError):
        raise AssertionError(client.with_options(api_key="wrong").models.list())
    with contextlib.suppress(openai.BadRequestError):
        raise AssertionError(client.chat.completions.create(model="openai/refuse", messages=USER))
    question = f"question of process {os.getpid()}"
    with contextlib.suppress(openai.InternalServerError):
        asked: list[Any] = [{"role": "user", "content": question}]
        raise AssertionError(client.chat.completions.create(model="openai/cut", messages=asked))
    equal(upstream_count(question), 1)
    try:
        list(client.chat.completions.create(model="openai/cut", messages=USER, stream=True))
    except openai.APIError as exc:
        assert "before the answer was finished" in exc.message or "ended the stream" in exc.message, exc.message
    else:
        raise AssertionError("a cut answer passed for whole")


def openai_retry(openai: Any, dialect: str) -> None:
    """The line breaks while an answer is on its way: the package asks again, and one run is paid for, in both APIs."""
    for api in ("chat", "responses"):
        question = f"{api} {dialect} retry of process {os.getpid()}"
        asked: dict[str, Any] = {"model": f"{dialect}/slow", "extra_headers": {"Idempotency-Key": question}}
        with TcpProxy(own_port()) as proxy, openai.OpenAI(base_url=f"{proxy.origin}/v1", max_retries=2) as client:
            proxy.cut_after(0, ending="reset")
            if api == "chat":
                messages = [{"role": "user", "content": question}]
                text = client.chat.completions.create(messages=messages, **asked).choices[0].message.content
            else:
                text = client.responses.create(input=question, **asked).output_text
            equal((text, proxy.accepted), ("".join(SLOW_WORDS), 2))
        equal(upstream_count(question), 1)


async def openai_async(openai: Any) -> None:
    async with openai.AsyncOpenAI() as client:
        whole = await client.chat.completions.create(model="openai/hello", messages=USER)
        equal(whole.choices[0].message.content, TEXT)
        stream = await client.chat.completions.create(model="anthropic/hello", messages=USER, stream=True)
        equal("".join([one.choices[0].delta.content or "" async for one in stream]), TEXT)
        events = await client.responses.create(model="openai/hello", input="Hi", stream=True)
        equal([one.type async for one in events][-1], "response.completed")


def openai_silence(client: Any) -> None:
    """Heartbeats through a silent provider, in both APIs and dialects."""

    def chat(model: str) -> str:
        chunks = client.chat.completions.create(model=model, messages=USER, stream=True)
        return "".join(one.choices[0].delta.content or "" for one in chunks)

    def respond(model: str) -> str:
        with client.responses.stream(model=model, input="Hi") as stream:
            return str(stream.get_final_response().output_text)

    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(ask, f"{dialect}/silent") for ask in (chat, respond) for dialect in ("openai", "anthropic")
        ]
        equal([one.result() for one in asked], [TEXT] * 4)


def inside_openai(state: Path) -> None:
    import openai

    known = {}
    with openai.OpenAI() as client:
        listed = [one.id for one in client.models.list()]
        assert {"openai/hello", "anthropic/hello"} <= set(listed), listed
        equal(client.models.retrieve("openai/hello").id, "openai/hello")
        openai_errors(client, openai)
        asyncio.run(openai_async(openai))
        openai_silence(client)
        for dialect in ("openai", "anthropic"):
            openai_chat(client, dialect)
            openai_tools(client, dialect)
            openai_responses(client, dialect)
            openai_background(client, openai, dialect)
            openai_retry(openai, dialect)
            known[dialect] = openai_before_restart(client, dialect)
    state.write_text(json.dumps(known))


def openai_before_restart(client: Any, dialect: str) -> dict[str, Any]:
    """A response that has ended, with its events, and one that is running."""
    before = client.responses.create(model=f"{dialect}/reason", input="Hi", background=True)
    running = client.responses.create(model=f"{dialect}/endless", input="Hi", background=True)
    while (
        client.responses.retrieve(before.id).status != "completed" or not client.responses.retrieve(running.id).output
    ):
        time.sleep(0.05)
    events = [one.to_dict() for one in client.responses.retrieve(before.id, stream=True)]
    return {"before": before.id, "running": running.id, "events": events}


def inside_openai_after_restart(state: Path) -> None:
    """What was there before the kill -9 is there after it."""
    import openai

    with openai.OpenAI() as client:
        for known in json.loads(state.read_text()).values():
            equal(client.responses.retrieve(known["before"]).output_text, TEXT)
            equal([one.to_dict() for one in client.responses.retrieve(known["before"], stream=True)], known["events"])
            with client.responses.stream(response_id=known["before"], starting_after=3) as stream:
                equal([one.sequence_number for one in stream], list(range(4, len(known["events"]))))
            broken = client.responses.retrieve(known["running"])
            equal(broken.status, "failed")
            assert broken.output_text.startswith("word0 "), broken.output_text
            equal(list(client.responses.retrieve(known["running"], stream=True))[-1].type, "response.failed")


# ── inside: other people's programs ─────────────────────────────────────────────────────────────────────────────────


def inside_litellm(state: Path) -> None:
    import litellm

    def ask(model: str, **more: Any) -> Any:
        return litellm.completion(model=f"openai/{model}", messages=USER, **more)

    for dialect in ("openai", "anthropic"):
        equal(ask(f"{dialect}/hello").choices[0].message.content, TEXT)
        pieces = ask(f"{dialect}/hello", stream=True)
        equal("".join(one.choices[0].delta.content or "" for one in pieces), TEXT)
    equal(ask("openai/reason").choices[0].message.reasoning_content, "Hm, well.")
    calls = ask("openai/tool", tools=[{"type": "function", "function": WEATHER}]).choices[0].message.tool_calls
    equal(calls[0].function.name, "weather")
    equal("".join(one.choices[0].delta.content or "" for one in ask("openai/silent", stream=True)), TEXT)


def inside_langchain(state: Path) -> None:
    from langchain_openai import ChatOpenAI

    for dialect in ("openai", "anthropic"):
        for in_responses in (False, True):
            model = ChatOpenAI(model=f"{dialect}/hello", use_responses_api=in_responses)
            equal(model.invoke("Say hello").text, TEXT)
            equal("".join(one.text for one in model.stream("Say hello")), TEXT)
    tool = ChatOpenAI(model="openai/tool").bind_tools([{"type": "function", "function": WEATHER}])
    equal(tool.invoke("Weather?").tool_calls[0]["args"], {"city": "Paris"})
    equal("".join(one.text for one in ChatOpenAI(model="openai/silent").stream("Say hello")), TEXT)


LLM_MODELS = """\
- {{model_id: hello, model_name: openai/hello, api_base: "{base_url}", api_key_name: openai}}
- {{model_id: silent, model_name: anthropic/silent, api_base: "{base_url}", api_key_name: openai}}
"""


def inside_llm(state: Path) -> None:
    """The command line as somebody types it; it streams unless told not to."""
    folder = state.parent / "llm-user"
    folder.mkdir()
    (folder / "extra-openai-models.yaml").write_text(LLM_MODELS.format(base_url=base_url()))
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}
    for arguments in (["-m", "hello", "--no-stream"], ["-m", "hello"], ["-m", "silent"]):
        command = [str(Path(sys.executable).parent / "llm"), *arguments, "Say hello"]
        done = subprocess.run(
            command, env=environment, text=True, capture_output=True, timeout=CLIENT_SECONDS, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0 and done.stdout.strip() == TEXT, f"{arguments}: {done.stdout} {done.stderr}"


OPENAI_JS = """
import assert from "node:assert/strict";
import OpenAI from "openai";
const client = new OpenAI();
const text = "Hello, world!", messages = [{ role: "user", content: "Say hello" }];
const streamed = async (model) => {
  let said = "";
  for await (const chunk of await client.chat.completions.create({ model, messages, stream: true }))
    said += chunk.choices[0]?.delta?.content ?? "";
  return said;
};
for (const model of ["openai/hello", "anthropic/hello"]) {
  assert.equal((await client.chat.completions.create({ model, messages })).choices[0].message.content, text);
  assert.equal(await streamed(model), text);
  assert.equal((await client.responses.create({ model, input: "Hi" })).output_text, text);
  assert.equal((await client.responses.stream({ model, input: "Hi" }).finalResponse()).output_text, text);
}
assert((await client.models.list()).data.some((one) => one.id === "openai/hello"));
await assert.rejects(client.chat.completions.create({ model: "nobody/x", messages }), OpenAI.NotFoundError);
await assert.rejects(streamed("openai/cut"), OpenAI.APIError);
const silent = client.responses.stream({ model: "openai/silent", input: "Hi" }).finalResponse();
assert.equal(await streamed("openai/silent"), text);
assert.equal((await silent).output_text, text);
"""

AI_SDK = """
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
const openai = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY });
const text = "Hello, world!", prompt = "Say hello";
for (const name of ["openai/hello", "anthropic/hello"])
  for (const model of [openai(name), openai.chat(name)]) {
    assert.equal((await generateText({ model, prompt })).text, text);
    let said = "";
    for await (const piece of streamText({ model, prompt }).textStream) said += piece;
    assert.equal(said, text);
  }
const weather = tool({ inputSchema: z.object({ city: z.string() }), execute: async () => "21 degrees" });
for (const name of ["openai/tool", "anthropic/tool"])
  for (const model of [openai(name), openai.chat(name)]) {
    const answer = await generateText({ model, prompt, tools: { weather }, stopWhen: stepCountIs(3) });
    assert.equal(answer.text, "It is 21 degrees.");
  }
const silent = [openai("openai/silent"), openai.chat("openai/silent")];
const said = await Promise.all(silent.map((model) => streamText({ model, prompt }).text));
assert.deepEqual(said, [text, text]);
"""


# ── the clients ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Client:
    """A program of somebody else's: what to install, what to run, and what its user sets or writes."""

    packages: tuple[str, ...]
    lines: tuple[str, str]
    run: Callable[[Path], None] | None = None  # in its own Python; None: `script` with Node
    script: str = ""
    after_restart: Callable[[Path], None] | None = None


ENVIRONMENT_LINES = (
    "export OPENAI_BASE_URL=http://127.0.0.1:8000/v1",
    "export OPENAI_API_KEY=any  # or LLMCHAT_TOKEN's value",
)
CLIENTS = {
    **{
        f"openai-{major}": Client(
            (f"openai=={major}.*",), ENVIRONMENT_LINES, run=inside_openai, after_restart=inside_openai_after_restart
        )
        for major in (1, 2, 3)
    },
    "litellm": Client(
        ("litellm", "mcp"),
        (ENVIRONMENT_LINES[0], 'litellm.completion(model="openai/anthropic/claude-…", api_key="any", …)'),
        run=inside_litellm,
    ),
    "langchain": Client(
        ("langchain-openai",),
        (ENVIRONMENT_LINES[0], 'ChatOpenAI(model="anthropic/claude-…", api_key="any")'),
        run=inside_langchain,
    ),
    "llm": Client(
        ("llm",),
        (
            'echo \'- {model_id: claude, model_name: anthropic/claude-…, api_base: "http://127.0.0.1:8000/v1",'
            ' api_key_name: openai}\' >> "$(dirname "$(llm logs path)")/extra-openai-models.yaml"',
            "OPENAI_API_KEY=any llm -m claude 'Say hello'",
        ),
        run=inside_llm,
    ),
    "openai-js": Client(("openai",), ENVIRONMENT_LINES, script=OPENAI_JS),
    "ai-sdk": Client(
        ("ai", "@ai-sdk/openai", "zod"),
        (
            'const openai = createOpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "any" });',
            'streamText({ model: openai("anthropic/claude-…"), prompt: "Say hello" });',
        ),
        script=AI_SDK,
    ),
}


def install(client: Client, folder: Path) -> list[str]:
    """Installs a client into a new folder; returns the command that runs Python or Node there. Raises OSError, or
    subprocess.SubprocessError with the installer's words."""
    folder.mkdir()
    if client.run is None:
        (folder / "package.json").write_text('{"type": "module", "private": true}')
        run(["npm", "install", "--silent", "--no-fund", "--no-audit", *client.packages], folder, INSTALL_SECONDS)
        return ["node"]
    run([sys.executable, "-m", "venv", "environment"], folder, INSTALL_SECONDS)
    python = str(folder / "environment" / "bin" / "python")
    run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *client.packages], folder, INSTALL_SECONDS
    )
    return [python]


def run(command: list[str], folder: Path, seconds: float, **environment: str) -> str:
    """The command's output. Raises subprocess.CalledProcessError."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "LLMCHAT_"))}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**inherited, **environment},
        text=True,
        capture_output=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )
    done.check_returncode()
    return done.stdout


class Bench:
    """A provider, an llmchat in front of it, and the folder that everything is installed in."""

    def __init__(self, folder: Path, silence: float) -> None:
        from tests.conftest import Server

        self.folder, self.silence = folder, silence
        self.provider = Scenes(silence).start()
        home = folder / "llmchat"
        home.mkdir()
        models = ",".join(SCENES)
        self.server = Server(
            home, OPENAI_BASE_URL=self.provider.base_url, OPENAI_API_KEY="sk-test", OPENAI_MODELS=models,
            ANTHROPIC_BASE_URL=self.provider.origin, ANTHROPIC_API_KEY="sk-ant", ANTHROPIC_MODELS=models,
            LLMCHAT_TOKEN=TOKEN, LLMCHAT_ATTEMPTS="1",
        )  # fmt: skip

    def close(self) -> None:
        self.server.close()
        self.provider.close()

    def environment(self) -> dict[str, str]:
        return {
            "OPENAI_BASE_URL": f"{self.server.url}/v1", "OPENAI_API_KEY": TOKEN,
            "PROVIDER_ORIGIN": self.provider.origin, "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def start(self, name: str, client: Client) -> str:
        """Installs and runs a client; returns how it went in a word or a few lines."""
        folder = self.folder / name
        try:
            command = install(client, folder)
        except (OSError, subprocess.SubprocessError) as exc:
            return f"cannot be installed: {(getattr(exc, 'stderr', '') or str(exc)).strip()[-300:]}"
        return self.try_to_run(name, client, command, "run")

    def try_to_run(self, name: str, client: Client, command: list[str], what: str) -> str:
        folder = self.folder / name
        if client.run is None:
            (folder / "client.mjs").write_text(client.script)
            arguments = ["client.mjs"]
        else:
            arguments = ["-m", "tests.clients", "inside", name, "--state", str(folder / "state.json"), "--what", what]
        try:
            run([*command, *arguments], folder, CLIENT_SECONDS + 2 * self.silence, **self.environment())
        except subprocess.SubprocessError as exc:
            return f"FAILED: {(getattr(exc, 'stderr', '') or str(exc)).strip()[-1500:]}"
        return "ok"

    def chain(self) -> str:
        """llmchat as the provider of another llmchat: a chat and a stream through both, silence and all."""
        from tests.conftest import Server

        home = self.folder / "outer"
        home.mkdir()
        outer = Server(
            home, INNER_BASE_URL=f"{self.server.url}/v1", INNER_API_KEY=TOKEN,
            LLMCHAT_STALL_TIMEOUT_SECONDS="30", LLMCHAT_FIRST_DELTA_TIMEOUT_SECONDS="30",
        )  # fmt: skip
        try:
            assert "inner/anthropic/hello" in [one["id"] for one in outer.get("/v1/models").json()["data"]]
            for model in ("inner/openai/hello", "inner/anthropic/hello", "inner/openai/reason"):
                body = {"model": model, "messages": USER}
                equal(outer.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"], TEXT)
                assert '"finish_reason":"stop"' in outer.post("/v1/chat/completions", {**body, "stream": True}).text
            failed = outer.post("/v1/chat/completions", {"model": "inner/openai/cut", "messages": USER})
            assert failed.status_code == 502, failed.text
            refused = outer.post("/v1/chat/completions", {"model": "inner/openai/refuse", "messages": USER})
            assert refused.status_code == 400 and "context is too long" in refused.text, refused.text
            silent = {"model": "inner/openai/silent", "input": "Hi"}
            answer = outer.post("/v1/responses", silent, timeout=CLIENT_SECONDS + self.silence).json()
            equal(answer["output"][0]["content"][0]["text"], TEXT)
        except Exception:
            return f"FAILED: {traceback.format_exc(limit=3)}"
        finally:
            outer.close()
        return "ok"


def main(names: Iterable[str], silence: float) -> int:
    chosen = {name: client for name, client in CLIENTS.items() if not names or name in names}
    with tempfile.TemporaryDirectory(prefix="llmchat-clients-") as folder:
        bench = Bench(Path(folder), silence)
        try:
            with ThreadPoolExecutor(3) as pool:
                results = {name: pool.submit(bench.start, name, client) for name, client in chosen.items()}
                results |= {"llmchat": pool.submit(bench.chain)} if not names or "llmchat" in names else {}
                outcomes = {name: result.result() for name, result in results.items()}
            bench.server.kill()
            bench.server.start()
            for name, client in chosen.items():
                if client.after_restart is not None and outcomes[name] == "ok":
                    python = str(bench.folder / name / "environment" / "bin" / "python")
                    outcomes[name] = bench.try_to_run(name, client, [python], "after")
        finally:
            bench.close()
    for name, outcome in outcomes.items():
        print(f"{name:10} {outcome}")
    print()
    for name, client in chosen.items():
        print(f"{name}\n" + "".join(f"    {line}\n" for line in client.lines))
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=str(__doc__).partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*CLIENTS, 'llmchat'])}; none: all")
    parser.add_argument("--silence", type=float, default=60.0, help="seconds for which the provider says nothing")
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=["run", "after"], default="run", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = parse_arguments()
    if given.names[:1] == ["inside"]:
        inside = CLIENTS[given.names[1]]
        act = inside.run if given.what == "run" else inside.after_restart
        assert act is not None, "only Python's clients run inside"
        act(given.state)
    else:
        sys.exit(main(given.names, given.silence))
