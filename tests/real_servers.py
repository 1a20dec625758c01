"""llmchat against servers that others wrote, over real sockets: LiteLLM's proxy and llama.cpp. Not part of the suite.

    python -m venv /tmp/litellm && /tmp/litellm/bin/pip install 'litellm[proxy]'
    python -m venv /tmp/llamacpp && /tmp/llamacpp/bin/pip install 'llama-cpp-python[server]' gguf
    python -m tests.real_servers --litellm /tmp/litellm/bin/python --llamacpp /tmp/llamacpp/bin/python

Each server runs in the environment of the Python that is named, on a free loopback port, and needs no network: LiteLLM
answers with mock responses, over its OpenAI and its Anthropic endpoint; llama.cpp runs a model of 70,000 random weights
that is made on the spot, so its answers are noise. A server that is not named, or not installed, is left out and named
as such. Prints a table; the exit status is 1 if a line of it failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.client import Reader
from tests.conftest import Server, wait_until
from tests.provider import unused_port

START_SECONDS = 180  # LiteLLM imports for a while
LITELLM_KEY = "sk-a-master-key-that-is-long-enough-for-it-0123456789"
LITELLM_TEXT = "Hello from a mock. Ünïcödé 😀 日本語, ok."
MOCKS = {
    "text": LITELLM_TEXT,
    "busy": "litellm.RateLimitError",
    "broken": "litellm.InternalServerError",
    "full": "litellm.ContextWindowExceededError",
}

MAKE_MODEL = """
import sys, gguf, numpy
size, width = 64, 96
writer = gguf.GGUFWriter(sys.argv[1], "llama")
tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % number for number in range(256))]
for add, value in ((writer.add_context_length, 2048), (writer.add_embedding_length, size), (writer.add_block_count, 1),
                   (writer.add_feed_forward_length, width), (writer.add_head_count, 2), (writer.add_head_count_kv, 2),
                   (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, size // 2),
                   (writer.add_vocab_size, len(tokens)), (writer.add_tokenizer_model, "llama"),
                   (writer.add_token_list, tokens), (writer.add_token_scores, [0.0] * len(tokens)),
                   (writer.add_token_types, [2, 3, 3, *[6] * 256]), (writer.add_bos_token_id, 1),
                   (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0)):
    add(value)
random = numpy.random.default_rng(7)
shapes = {"token_embd.weight": (len(tokens), size), "output.weight": (len(tokens), size), "output_norm.weight": (size,)}
shapes |= {"blk.0.attn_norm.weight": (size,), "blk.0.ffn_norm.weight": (size,), "blk.0.ffn_down.weight": (size, width)}
shapes |= {f"blk.0.attn_{name}.weight": (size, size) for name in ("q", "k", "v", "output")}
shapes |= {f"blk.0.ffn_{name}.weight": (width, size) for name in ("gate", "up")}
for name, shape in shapes.items():
    weights = numpy.ones(shape) if "norm" in name else random.normal(0, 0.5, shape)
    if name == "output.weight":
        weights *= [[4.0 if 35 <= token <= 129 else 0.0] for token in range(259)]  # ASCII, and never the end
    writer.add_tensor(name, weights.astype(numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


class Ledger:
    """The table's lines."""

    def __init__(self) -> None:
        self.failures = 0

    def check(self, server: str, what: str, test: Callable[[], str]) -> None:
        try:
            verdict = test()
        except Exception:
            self.failures += 1
            verdict = "FAILED: " + " ".join(traceback.format_exc(limit=-1).split())[-500:]
        print(f"| {server} | {what} | {verdict.replace('|', ' ')} |", flush=True)


@contextlib.contextmanager
def process(command: list[str], folder: Path, url: str, headers: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server, once it answers at `url`; ended with the context."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
    log = folder / "server.log"
    with log.open("wb") as output:
        running = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            wait_until(lambda: running.poll() is not None or answers(url, headers), f"{command[-1]}", START_SECONDS)
            assert running.poll() is None, log.read_text(errors="replace")[-2000:]
            yield running
        finally:
            running.send_signal(signal.SIGCONT)
            running.kill()
            running.wait()


def answers(url: str, headers: dict[str, str]) -> bool:
    try:
        return httpx.get(url, headers=headers, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def ask(server: Server, model: str, **more: Any) -> tuple[Reader, dict[str, Any]]:
    """A streamed chat and the message that it left, which agree."""
    reader, message_id = Reader(), 0
    with server.chat("hi", model=model, **more) as stream:
        assert stream.status == 200, stream.error
        for event in stream.events():
            reader.take(event)
            message_id = event.data["message_id"] if event.name == "start" else message_id
    message = server.message(message_id)
    assert reader.end is not None and reader.end["status"] == message["status"]
    assert server.content(message_id) == reader.content
    return reader, message


def completed(server: Server, model: str, text: str | None = None, **more: Any) -> str:
    reader, message = ask(server, model, **more)
    assert message["status"] == "completed", message["error"]
    assert text is None or reader.content == text, reader.content
    usage = message["usage"]
    return f"completed ({message['finish_reason']}), {len(reader.content)} characters, usage {usage['output_tokens']}"


def failed(server: Server, model: str, code: str, words: str, attempts: int, **more: Any) -> str:
    _, message = ask(server, model, **more)
    error = message["error"]
    assert error and error["code"] == code and words in error["message"], (message["status"], error)
    assert len(message["attempts"]) == attempts, message["attempts"]
    return f"{error['code']} after {attempts} attempts: {error['message'][:90]}"


def models_of(server: Server, name: str, expected: str) -> str:
    (provider,) = [one for one in server.get("/api/v1/help?refresh=1").json()["providers"] if one["name"] == name]
    assert expected in provider["models"], provider
    return f"{len(provider['models'])} models"


# ── LiteLLM ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_litellm(python: str, ledger: Ledger, folder: Path) -> None:
    port = unused_port()
    models = [
        {
            "model_name": name,
            "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "none", "mock_response": mock},
        }
        for name, mock in MOCKS.items()
    ]
    models.append(
        {
            "model_name": "dead",
            "litellm_params": {"model": "openai/x", "api_base": f"http://127.0.0.1:{unused_port()}", "api_key": "none"},
        }
    )
    config = {"model_list": models, "general_settings": {"master_key": LITELLM_KEY}}
    config |= {"litellm_settings": {"num_retries": 0}}
    (folder / "config.yaml").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
    script = str(Path(python).with_name("litellm"))
    command = [script, "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    settings = {
        "LITELLM_BASE_URL": f"http://127.0.0.1:{port}/v1",
        "LITELLM_API_KEY": LITELLM_KEY,
        "CLAUDE_BASE_URL": f"http://127.0.0.1:{port}",
        "CLAUDE_API_KEY": LITELLM_KEY,
        "CLAUDE_DIALECT": "anthropic",
        "LOCKED_BASE_URL": f"http://127.0.0.1:{port}/v1",
        "LOCKED_API_KEY": "sk-wrong",
    }
    headers = {"authorization": f"Bearer {LITELLM_KEY}"}
    with (
        process(command, folder, f"http://127.0.0.1:{port}/v1/models", headers),
        closing_server(folder, settings) as server,
    ):
        for name, endpoint in (("litellm", "LiteLLM, OpenAI"), ("claude", "LiteLLM, Anthropic")):
            ledger.check(endpoint, "models", lambda name=name: models_of(server, name, "text"))
            ledger.check(endpoint, "chat", lambda name=name: completed(server, f"{name}/text", LITELLM_TEXT))
            ledger.check(endpoint, "chat without a stream", lambda name=name: as_document(server, f"{name}/text"))
            for model, code, words, attempts in (
                ("busy", "provider_rate_limited", "rate limit", 3),
                ("broken", "provider_unavailable", "internal server error", 3),
                ("full", "provider_rejected", "context window", 1),
                ("dead", "provider_unavailable", "InternalServerError", 3),
                ("nobody", "provider_rejected", "nvalid model name", 1),
            ):
                arguments = (server, f"{name}/{model}", code, words, attempts)
                ledger.check(endpoint, f"error: {model}", lambda arguments=arguments: failed(*arguments))
        wrong = (server, "locked/text", "provider_rejected", "No connected db", 1)
        ledger.check("LiteLLM, OpenAI", "error: a wrong key", lambda: failed(*wrong))


def as_document(server: Server, model: str) -> str:
    response = server.post("/api/v1/chat", {"message": "hi", "model": model, "stream": False})
    assert response.status_code == 200 and response.json()["text"] == LITELLM_TEXT, response.text
    return "200"


# ── llama.cpp ───────────────────────────────────────────────────────────────────────────────────────────────────────


def check_llamacpp(python: str, ledger: Ledger, folder: Path) -> None:
    subprocess.run([python, "-c", MAKE_MODEL, "tiny.gguf"], cwd=folder, check=True, capture_output=True)
    port = unused_port()
    command = [python, "-m", "llama_cpp.server", "--model", "tiny.gguf", "--chat_format", "chatml"]
    command += ["--n_ctx", "2048", "--host", "127.0.0.1", "--port", str(port)]
    settings = {
        "LLAMACPP_BASE_URL": f"http://127.0.0.1:{port}/v1",
        "LLMCHAT_STALL_TIMEOUT_SECONDS": "2",
        "LLMCHAT_FIRST_DELTA_TIMEOUT_SECONDS": "20",
        "LLMCHAT_REPETITION_COUNT": "0",
    }
    name = "llama.cpp"
    url = f"http://127.0.0.1:{port}/v1/models"
    with process(command, folder, url, {}) as upstream, closing_server(folder, settings) as server:
        ledger.check(name, "models", lambda: models_of(server, "llamacpp", "tiny.gguf"))
        for number in range(3):
            ledger.check(name, f"chat {number + 1}", lambda: completed(server, "llamacpp/tiny.gguf", max_tokens=60))
        ledger.check(
            name, "an answer of 1,000 tokens", lambda: completed(server, "llamacpp/tiny.gguf", max_tokens=1000)
        )
        ledger.check(name, "a question over the context", lambda: too_much(server))
        ledger.check(name, "stop in the middle", lambda: stopped(server))
        ledger.check(name, "SIGSTOP in the middle", lambda: ended_by(server, upstream, signal.SIGSTOP, "stalled"))
        upstream.send_signal(signal.SIGCONT)
        ledger.check(
            name, "SIGKILL in the middle", lambda: ended_by(server, upstream, signal.SIGKILL, "provider_truncated")
        )
        gone = (server, "llamacpp/tiny.gguf", "provider_unavailable", "Connection refused", 3)
        ledger.check(name, "the next question", lambda: failed(*gone))
        ledger.check(name, "llmchat is well", lambda: str(server.get("/api/v1/health").status_code))


def too_much(server: Server) -> str:
    response = server.post("/api/v1/chat", {"message": "x" * 5000, "model": "llamacpp/tiny.gguf", "stream": False})
    error = response.json()["error"]
    assert error["code"] == "provider_truncated", error  # it answers 200 and ends the stream without a word
    return f"{response.status_code} {error['message'][:90]}"


def stopped(server: Server) -> str:
    with server.chat("hi", model="llamacpp/tiny.gguf", max_tokens=1800) as stream:
        reader = Reader()
        (start,) = stream.take(1)
        reader.take(start)
        reader.read(stream, 3)
        response = server.post(f"/api/v1/messages/{start.data['message_id']}/stop")
        assert response.json()["status"] == "stopped"
        reader.read(stream)
    assert reader.content == server.content(start.data["message_id"])
    return f"stopped, {len(reader.content)} characters kept"


def ended_by(server: Server, upstream: subprocess.Popen[bytes], number: signal.Signals, code: str) -> str:
    with server.chat("hi", model="llamacpp/tiny.gguf", max_tokens=1800) as stream:
        reader = Reader()
        (start,) = stream.take(1)
        reader.take(start)
        reader.read(stream, 3)
        upstream.send_signal(number)
        reader.read(stream)
    assert reader.end is not None and reader.end["error"] and reader.end["error"]["code"] == code, reader.end
    assert reader.content and reader.content == server.content(start.data["message_id"])
    return f"{code}, {len(reader.content)} characters kept: {reader.end['error']['message']}"


@contextlib.contextmanager
def closing_server(folder: Path, settings: dict[str, str]) -> Iterator[Server]:
    server = Server(folder, **settings)
    try:
        yield server
    finally:
        server.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.real_servers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--litellm", metavar="PYTHON", help="of an environment with litellm[proxy]")
    parser.add_argument("--llamacpp", metavar="PYTHON", help="of an environment with llama-cpp-python[server] and gguf")
    chosen = parser.parse_args()
    ledger = Ledger()
    print("| server | what | result |\n|---|---|---|", flush=True)
    for name, module, check in (
        ("litellm", "litellm", check_litellm),
        ("llamacpp", "llama_cpp.server", check_llamacpp),
    ):
        python = getattr(chosen, name) or sys.executable
        found = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0
        if not found:
            print(f"| {name} | | left out: {module} is not installed in {python} |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            check(python, ledger, Path(folder))
    return 1 if ledger.failures else 0


if __name__ == "__main__":
    sys.exit(main())
