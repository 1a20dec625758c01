# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "starlette>=1.0,<2",
#   "uvicorn>=0.40,<1",
#   "uvloop>=0.21,<1; sys_platform != 'win32'",
#   "httptools>=0.6.4,<1",
#   "httpx>=0.28,<0.29",
#   "aiohappyeyeballs>=2.4,<3",
#   "aiosqlite>=0.22,<0.23",
#   "anyio>=4.6,<5",
#   "msgspec>=0.20,<0.23",
#   "markdown-it-py>=4.3,<5",
#   "linkify-it-py>=2.0.3,<3",
#   "Pygments>=2.19,<3",
# ]
# ///
"""llmchat: one Python file, one SQLite file, every provider. What you have seen is saved; what is saved can be resumed.

The way of a delta, one direction, no way back:

    provider ──▶ Answer.feed ──▶ FLUSHER: dialect.decode ──▶ generation.pending ──commit──▶ SQLite (WAL)
                 bytes, kept                                                           │ then, and only then
                                                                                       ▼
                                        SSE ◀── each subscriber: its socket, or its queue ◀── frame ──▶ ring

Words, one per thing:

    provider       a configured endpoint with its key; its dialect is its wire format
    conversation   a tree of messages linked by parent_id
    generation     the running production of one assistant message; it outlives the request that started it
    delta          a piece of content: a kind (text, reasoning, tool_call, …) and its characters
    offset         a position in a message's content: the code points of all deltas before it
    cursor         the offset up to which a subscriber has the content (Last-Event-ID)
    subscriber     one open SSE response; it resumes from its cursor: no gap, no duplicate
    frame          an event as it goes out, encoded once for all subscribers
    ring           the newest published frames of a generation, in memory, bounded
    flush          one transaction that commits the pending deltas of all generations

Read it top to bottom. A section uses only itself and those above it; within one, a caller may stand above its helpers:

     1 Limits          5 Dialects       9 Providers     13 Identity
     2 Errors          6 Repetition    10 Store         14 HTTP
     3 Configuration   7 Markdown      11 Archives      15 OpenAI view
     4 Events, SSE     8 HTTP client   12 Generations   16 main

Invariants, worth stating by their absence: no producer and no flush awaits a subscriber; no content is published before
it is committed; no text is ever a control signal; above the HTTP client the only I/O is to read .env; only Store and
Archives contain SQL; nothing above HTTP makes a response to a client; os.environ appears once.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import contextlib
import email.utils
import functools
import gc
import gzip
import hashlib
import hmac
import html
import importlib
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import secrets
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
import unicodedata
import urllib.parse
import zlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    BinaryIO,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    TypeVar,
    cast,
    get_args,
)
from urllib.parse import quote

import aiosqlite
import msgspec
import uvicorn
from aiohappyeyeballs import start_connection
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    import ssl

    import httpx
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_core import StateCore
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

__version__ = "0.1.0"
__all__ = ["Config", "create_app", "load_config", "main"]

T = TypeVar("T")

# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 1. Limits
#
# Bounds, each with its unit and its reason. One that a user may want to move is a setting and stands in section 3, one
# that belongs to a single algorithm stands with it; these are the ones whose change would need thought, because others
# lean on them. The asserts say how. Units and "max" come last in a name.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

REQUEST_BYTES_MAX = 1_000_000  # a request's body: some 200,000 words, more than any model's context takes
IMAGE_REQUEST_BYTES_MAX = 20_000_000  # the same, when there are images in it
IMAGE_BYTES_MAX = 10_000_000  # one image, decoded; providers take 5 to 20 MB
SYSTEM_CHARACTERS_MAX = 100_000  # of a system prompt
NESTING_MAX = 64  # lists and objects inside each other in a body: parsers on the way have limits of their own
SIGN_IN_BYTES_MAX = 4_096  # the sign-in form
HEAD_BYTES_MAX = 64 * 1024  # of a request or a reply: its first line and headers
HEAD_SECONDS = 20  # for them to come
BODY_STALL_SECONDS = 30  # between two pieces of a body
BODY_BYTES_PER_SECOND = 2_000  # of a body, at least, on the whole
HEALTH_SECONDS = 1  # how long strangers are told the same of the database: each look at it is a write
HEADER_BYTES_MAX = 200  # X-Request-ID and Idempotency-Key: they are logged and stored

FRAME_CHARACTERS_MAX = 10_000  # of one delta event and one row: at most 6 bytes each as JSON, so a frame is ≤ 64 KiB
SEND_BYTES_MAX = 256 * 1024  # of a subscriber's queue, which goes out in one send: 50 stalled readers = 13 MB
RING_BYTES_MAX = 256 * 1024  # of a generation's ring, beside the setting for its events

ARRIVED_BYTES_MAX = 128 * 1024  # of one answer, not yet taken by the flusher; beyond it, its provider has to wait
PROVIDER_EVENT_BYTES_MAX = 8 * 1024 * 1024  # one SSE event of a provider: a whole tool call or image may be in it
PROVIDER_WORDS_CHARACTERS_MAX = 500  # of a provider's own words that go into an error message
STRANGE_BYTES_MAX = 16 * 1024  # of what a provider sends in place of events: its words are searched for in it
END_LINES = 3  # the newest of many: why it ended, what it took, [DONE]
PROVIDER_CONNECT_SECONDS = 15  # to open a connection, TLS included
FINISH_SECONDS = 5  # that an answer with a finish_reason waits for its usage and its end
LINGER_SECONDS = 0.25  # that an answer whose end has come waits for that of its connection, to use it again
EYEBALLS_SECONDS = 0.25  # until another of a provider's addresses is tried as well (RFC 8305)
KEPT_SECONDS = 15  # that a connection is kept for the next question, at least; at most twice as long
REFUSAL_SECONDS = 10  # to read the body of an error, which some servers never end
REFUSAL_BYTES_MAX = 1_000_000  # of it
MODELS_SECONDS = 10  # to ask a provider for its models
MODELS_CACHE_SECONDS = 600  # how long that answer is good

RETRY_DELAY_SECONDS = 0.5  # before the second attempt; doubles from there
RETRY_DELAY_SECONDS_MAX = 8  # of our own backoff
RETRY_AFTER_SECONDS_MAX = 120  # a provider that asks for more is not waited for

FLUSH_INTERVAL_SECONDS_MAX = 0.25  # the slowest pace that still feels live
FLUSH_PIECE_CHARACTERS = 200  # as many in a piece on average, and waiting makes the next flush hardly cheaper
FLUSH_COST_AVERAGED = 10  # flushes
FLUSH_COST_RATIO = 4  # flushes may hold the event loop for one part in this many of the time
FLUSH_SLOW_RATIO = 1.5  # times the fastest interval, and providers are read at the same pace
FLUSH_PATIENCE_SECONDS = 10  # how long a failing flush is tried again before its generations end
FLUSH_RETRY_SECONDS = 0.5  # between those tries

JOURNAL_CHARACTERS_MAX = 2_000  # of a message in the journal: as many are worth a page of their own
JOURNAL_SECONDS = 0.5  # that they may stay there, if not more are due at once than
JOURNAL_SHARE = 16  # one part in this many, rounded up, at each flush
JOURNAL_TRIM_ROWS = 16  # of the journal that nobody needs any more, before they are deleted

WRITER_CACHE_KILOBYTES = 1_000  # of pages: twice as many cost 20 KB a stream at 500 streams, and saved nothing
READER_CACHE_KILOBYTES = 2_000  # SQLite's default: a long conversation opens in it
DATABASE_BUSY_MS = 2_000  # how long another program's lock is waited for within one try
WAL_BYTES_MAX = 8_000_000  # of the log that is kept once it was copied back: twice what it grows to by itself
TITLE_CHARACTERS_MAX = 80  # of a title made from the first message
TITLE_LINE_CHARACTERS_MAX = 500  # of the line that it is made from: the search for marks looks at nothing longer
QUERY_CHARACTERS_MAX = 500  # of a search
LIST_LIMIT_MAX = 200  # conversations in one answer
SWEPT_MAX = 100  # conversations that one transaction deletes: flushes wait behind it
SWEEP_SECONDS_MIN = 0.25  # between two of those
FALLBACKS_MAX = 8  # models named in one request
STARTED_WAIT_SECONDS = 0.05  # between looks at a message that runs but is not yet known here

ARCHIVE_BYTES_MAX = 1_000_000_000  # of a file that is imported, and of what comes out of it if it is a zip
ARCHIVE_ENTRIES_BYTES_MAX = 20_000_000  # of a zip's table of contents, which is read whole
ARCHIVE_VALUE_CHARACTERS_MAX = 32_000_000  # of one message of ours or one conversation of others: it is held in memory
ARCHIVE_GROUP_CHARACTERS = 256 * 1024  # of content that is imported in one transaction; the last message may go beyond
ARCHIVE_GROUP_MESSAGES = 100  # the same
ARCHIVE_READ_BYTES = 256 * 1024  # of one read
LEFT_OUT_MAX = 50  # different reasons that an import tells

REST_SECONDS = 10  # without an answer, before free memory is given back
CHORE_RETRY_SECONDS = 60  # after the database refused what is done after answers' ends
MERGE_AFTER_SECONDS = 3600  # since an answer's end, before its rows are merged: whoever was cut off is back by then
MERGE_ROWS = 500  # looked at in one transaction: a few milliseconds
CHORE_COST_RATIO = 4  # merging may take one part in this many of the time, and one; indexing too
INDEX_AFTER_SECONDS = 2.0  # since a text came, before it is indexed with what came meanwhile; a search does not wait

CHECK_BYTES_MAX = 256_000_000  # of a database that is checked indexes and all after an unclean end
CHECK_SECONDS_MAX = 10  # of that check: a start may not wait for a disk for ever
BACKUP_STEP_PAGES = 256  # of one step of a copy, 1 MB: between two steps it can be given up
DOWNLOAD_BYTES = 256 * 1024  # of one send of a file

assert FRAME_CHARACTERS_MAX * 6 <= 64 * 1024, "a frame must fit what proxies pass on at once"
assert FRAME_CHARACTERS_MAX * 6 <= RING_BYTES_MAX, "the ring must hold at least one event"
assert FRAME_CHARACTERS_MAX * 6 <= SEND_BYTES_MAX, "a queue must hold at least one event"
assert IMAGE_REQUEST_BYTES_MAX * 3 // 2 < ARCHIVE_VALUE_CHARACTERS_MAX, "what could be sent must come in again"
assert DATABASE_BUSY_MS / 1000 < FLUSH_PATIENCE_SECONDS, "a busy database must be tried more than once"

# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 2. Errors
#
# One tree. A class is a code of the contract, with its HTTP status and whether the same request can be expected to go
# better later; an instance adds the words. The same value is rendered as an HTTP error, stored with a failed message,
# and sent in `end`, so all three say the same. Messages name the field, the limit and the value that was met; they
# never hold a key, a path of the server, or a traceback: what only the operator may see goes to the log under the
# request's id. A new code is a new class: nothing else needs to know it.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class LlmchatError(Exception):
    """Anything that goes wrong in a way we foresaw. `retry_after_seconds` becomes a Retry-After header."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message.encode("utf-8", "replace").decode()  # a provider's words may hold half a surrogate pair
        self.retry_after_seconds = retry_after_seconds

    def detail(self) -> dict[str, Any]:
        """The error as it is stored and sent: {"code", "message", "retryable"}."""
        return {"code": self.code, "message": self.message, "retryable": self.retryable}


class InternalError(LlmchatError):
    pass


class InvalidRequest(LlmchatError):
    code, status = "invalid_request", 400


class ModelNotFound(InvalidRequest):
    """A request names a model that nobody has."""


class Unauthorized(LlmchatError):
    code, status = "unauthorized", 401


class Forbidden(LlmchatError):
    code, status = "forbidden", 403


class NotFound(LlmchatError):
    code, status = "not_found", 404


class Conflict(LlmchatError):
    code, status = "conflict", 409


class TooLarge(LlmchatError):
    code, status = "too_large", 413


class RateLimited(LlmchatError):
    code, status, retryable = "rate_limited", 429, True


class Overloaded(LlmchatError):
    code, status, retryable = "overloaded", 503, True


class Draining(LlmchatError):
    code, status, retryable = "draining", 503, True


class StoreUnavailable(LlmchatError):
    code, status, retryable = "store_unavailable", 503, True


class GenerationError(LlmchatError):
    """Ends a generation as `failed`. `retryable` says whether *continue* makes sense."""


class ProviderError(GenerationError):
    """What a provider did. `transient`: the same request may succeed in a moment (asked only before the first delta)."""

    code, status = "provider_protocol", 502

    def __init__(self, message: str, *, transient: bool = False, retry_after_seconds: float | None = None) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)
        self.transient = transient


class ProviderProtocol(ProviderError):
    code, retryable = "provider_protocol", True


class ProviderTruncated(ProviderError):
    code, retryable = "provider_truncated", True


class ProviderUnavailable(ProviderError):
    code, retryable = "provider_unavailable", True


class ProviderRateLimited(ProviderError):
    code, retryable = "provider_rate_limited", True


class ProviderAuth(ProviderError):
    code = "provider_auth"


class ProviderRejected(ProviderError):
    code, status = "provider_rejected", 422


class Stalled(ProviderError):
    code, status, retryable = "stalled", 504, True


class DeadlineExceeded(GenerationError):
    code, status, retryable = "deadline_exceeded", 504, True


class Repetition(GenerationError):
    code, status = "repetition", 502


class TooLong(GenerationError):
    code, status = "too_long", 502


def error_classes(root: type[LlmchatError] = LlmchatError) -> Iterator[type[LlmchatError]]:
    """The whole tree, for what looks a class up by its code."""
    yield root
    for below in root.__subclasses__():
        yield from error_classes(below)


ERROR_STATUSES = {error.code: error.status for error in error_classes()}


# What the decoder's complaints call types by Python's names, as JSON and /openapi.json call them.
JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def in_json_words(complaint: Exception) -> str:
    """What a decoder says: 'Expected `string | null`, got `integer`'; the names of fields stay as they are."""
    names = "|".join(JSON_TYPES)
    return re.sub(
        r"(?<=xpected )`[^`]*`|(?<=, got )`[^`]*`",
        lambda types: re.sub(rf"\b({names})\b", lambda one: JSON_TYPES[one[0]], types[0]),
        str(complaint),
    )


class StartError(Exception):
    """The service cannot start. Its one line is printed and the exit status is 2; there is no traceback."""


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 3. Configuration
#
# The environment and `.env` are read once, here, into a frozen value that the rest of the program is handed. The
# fields of Config are the settings: name, type, default, bounds and meaning in one line each, and everything that
# speaks of settings (the parser, --help, the README's table, which a test holds against this) reads it off them. A
# value that does not fit stops the start with one line that names it and says what is accepted. Providers are found
# by their variables: a key or a base URL switches one on. There is no configuration file and no reload: a restart is
# one second and loses nothing.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def setting(
    default: Any, meaning: str, *, least: float | None = None, most: float | None = None, choices: str = ""
) -> Any:
    """A field of Config, read from LLMCHAT_<NAME>; its unit is the end of its name or part of its meaning."""
    bounds = {"meaning": meaning, "least": least, "most": most, "choices": tuple(choices.split())}
    return field(default=default, metadata=bounds, repr=not meaning.startswith("secret"))


@dataclass(frozen=True)
class ProviderFacts:
    """What is known of a provider before anyone has a key: the row of the built-in table.

    `variables` hold the key, the first one found wins. `local`: the address is this machine's, a key switches
    nothing on and none is needed. `quirks` name departures from the dialect; sections 5 and 9 say what each does.
    """

    base_url: str | None
    variables: tuple[str, ...]
    dialect: str = "openai"
    local: bool = False
    models_url: str | None = None
    quirks: frozenset[str] = frozenset()


def facts(base_url: str | None, variables: str, *quirks: str, **more: Any) -> ProviderFacts:
    return ProviderFacts(base_url, tuple(variables.split()), quirks=frozenset(quirks), **more)


# Adding a provider is one line. GITHUB_TOKEN and HF_TOKEN are not here: they are often set for other reasons.
PROVIDER_FACTS: dict[str, ProviderFacts] = {
    "openai": facts("https://api.openai.com/v1", "OPENAI_API_KEY", "max_completion_tokens"),
    "anthropic": facts("https://api.anthropic.com", "ANTHROPIC_API_KEY ANTHROPIC_AUTH_TOKEN", dialect="anthropic"),
    "gemini": facts(
        "https://generativelanguage.googleapis.com/v1beta/openai",
        "GEMINI_API_KEY GOOGLE_API_KEY GOOGLE_GENERATIVE_AI_API_KEY",
    ),
    "groq": facts("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": facts(
        "https://api.mistral.ai/v1",
        "MISTRAL_API_KEY",
        *("no_stream_options", "tool_choice_any", "prefill_prefix", "nine_character_ids"),
    ),
    "deepseek": facts("https://api.deepseek.com", "DEEPSEEK_API_KEY", "reasoning_back"),
    "openrouter": facts("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "prefill"),
    "together": facts("https://api.together.xyz/v1", "TOGETHER_API_KEY TOGETHER_AI_API_KEY TOGETHERAI_API_KEY"),
    "xai": facts("https://api.x.ai/v1", "XAI_API_KEY", "repeated_reasoning"),
    "fireworks": facts("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY FIREWORKS_AI_API_KEY"),
    "cerebras": facts("https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    "perplexity": facts("https://api.perplexity.ai", "PERPLEXITY_API_KEY PERPLEXITYAI_API_KEY", "no_stream_options"),
    "cohere": facts("https://api.cohere.ai/compatibility/v1", "COHERE_API_KEY CO_API_KEY", "no_stream_options"),
    "nvidia": facts("https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY NVIDIA_NIM_API_KEY"),
    "sambanova": facts("https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
    "moonshot": facts("https://api.moonshot.ai/v1", "MOONSHOT_API_KEY", "prefill_partial"),
    "zai": facts("https://api.z.ai/api/paas/v4", "ZAI_API_KEY ZHIPU_API_KEY ZHIPUAI_API_KEY"),
    "dashscope": facts("https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY QWENCLOUD_API_KEY"),
    "huggingface": facts("https://router.huggingface.co/v1", "HUGGINGFACE_API_KEY"),
    "github": facts(
        "https://models.github.ai/inference", "GITHUB_API_KEY", models_url="https://models.github.ai/catalog/models"
    ),
    "deepinfra": facts("https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    "hyperbolic": facts("https://api.hyperbolic.xyz/v1", "HYPERBOLIC_API_KEY"),
    "novita": facts("https://api.novita.ai/openai", "NOVITA_API_KEY"),
    "minimax": facts("https://api.minimax.io/v1", "MINIMAX_API_KEY", "reasoning_split"),
    "ai21": facts("https://api.ai21.com/studio/v1", "AI21_API_KEY"),
    "vercel": facts("https://ai-gateway.vercel.sh/v1", "AI_GATEWAY_API_KEY VERCEL_AI_GATEWAY_API_KEY"),
    "nebius": facts("https://api.tokenfactory.nebius.com/v1", "NEBIUS_API_KEY"),
    "siliconflow": facts("https://api.siliconflow.com/v1", "SILICONFLOW_API_KEY"),
    "inception": facts("https://api.inceptionlabs.ai/v1", "INCEPTION_API_KEY"),
    "meta-llama": facts("https://api.llama.com/compat/v1", "LLAMA_API_KEY META_LLAMA_API_KEY"),
    "baseten": facts("https://inference.baseten.co/v1", "BASETEN_API_KEY"),
    "friendli": facts("https://api.friendli.ai/serverless/v1", "FRIENDLI_API_KEY FRIENDLI_TOKEN FRIENDLIAI_API_KEY"),
    "chutes": facts("https://llm.chutes.ai/v1", "CHUTES_API_KEY"),
    "scaleway": facts("https://api.scaleway.ai/v1", "SCALEWAY_API_KEY SCW_SECRET_KEY"),
    "ovhcloud": facts("https://oai.endpoints.kepler.ai.cloud.ovh.net/v1", "OVHCLOUD_API_KEY"),
    "venice": facts("https://api.venice.ai/api/v1", "VENICE_API_KEY VENICE_AI_API_KEY"),
    "poe": facts("https://api.poe.com/v1", "POE_API_KEY"),
    "requesty": facts("https://router.requesty.ai/v1", "REQUESTY_API_KEY"),
    "wandb": facts("https://api.inference.wandb.ai/v1", "WANDB_API_KEY"),
    "stepfun": facts("https://api.stepfun.com/v1", "STEPFUN_API_KEY"),
    "upstage": facts("https://api.upstage.ai/v1/solar", "UPSTAGE_API_KEY"),
    "volcengine": facts("https://ark.cn-beijing.volces.com/api/v3", "VOLCENGINE_API_KEY ARK_API_KEY"),
    "azure": facts(None, "AZURE_OPENAI_API_KEY AZURE_API_KEY", "api_key_header", "max_completion_tokens"),
    "ollama": facts("https://ollama.com/v1", "OLLAMA_API_KEY"),
    "lmstudio": facts("http://127.0.0.1:1234/v1", "LMSTUDIO_API_KEY LM_STUDIO_API_KEY", local=True),
    "llamacpp": facts("http://127.0.0.1:8080/v1", "LLAMACPP_API_KEY", "prefill", local=True),
    "vllm": facts("http://127.0.0.1:8000/v1", "VLLM_API_KEY HOSTED_VLLM_API_KEY", local=True),
    "litellm": facts("http://127.0.0.1:4000/v1", "LITELLM_API_KEY", local=True),
    "transformers": facts("http://127.0.0.1:8000/v1", "TRANSFORMERS_API_KEY", local=True),
}

DIALECT_NAMES = ("openai", "anthropic")
DEMO = "demo"
DEMO_MODELS = ("tour", "slow", "long", "markdown", "reasoning", "loop", "fails")
DEMO_HOST = "demo.invalid"  # RFC 2606: no such host can exist; section 9 answers for it without a network


@dataclass(frozen=True)
class Provider:
    """A configured endpoint. `variable` is where its key comes from, for messages; the key itself is never shown."""

    name: str
    dialect: str
    base_url: str
    key: str | None = field(default=None, repr=False)
    variable: str = ""
    models: tuple[str, ...] = ()
    models_url: str | None = None
    quirks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Config:
    """Every setting and every provider, as the environment gives them."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "TCP port to listen on; 0 takes a free one", least=0, most=65535)
    db: str = setting("llmchat.db", "path of the SQLite database")
    default_model: str = setting("", "`provider/model` when a request names none; empty: the first one that is found")
    fallbacks: str = setting(
        "", "comma list of `provider/model`, tried in order when a model fails before its first delta"
    )
    system: str = setting("", "system prompt of new conversations")
    title_model: str = setting(
        "", "`provider/model` that names a conversation after its first answer; empty: its first line does"
    )
    log_level: str = setting("info", "what is logged", choices="debug info warning error")
    log_format: str = setting("text", "how it is logged", choices="text json")
    flush_interval_ms: int = setting(20, "shortest time between two flushes, in ms", least=0, most=250)
    ring_events: int = setting(1024, "newest events of a generation that are kept in memory", least=1, most=100_000)
    heartbeat_seconds: float = setting(
        15.0, "silence on a stream before a heartbeat, in seconds", least=0.05, most=3600
    )
    drain_seconds: float = setting(
        5.0, "how long running generations may go on at shutdown, in seconds", least=0, most=3600
    )
    attempts: int = setting(3, "attempts at a model before its first delta, retries included", least=1, most=10)
    generations_max: int = setting(256, "generations that run at once", least=1, most=100_000)
    subscribers_max: int = setting(256, "open streams of one message", least=1, most=100_000)
    stall_timeout_seconds: float = setting(
        60.0, "silence of a provider between two deltas, in seconds", least=0.05, most=86_400
    )
    first_delta_timeout_seconds: float = setting(
        120.0, "wait for a provider's first delta, in seconds", least=0.05, most=86_400
    )
    keepalive_seconds: float = setting(
        600.0, "how long a provider's keep-alives hold those two off, in seconds", least=0, most=86_400
    )
    generation_timeout_seconds: float = setting(1800.0, "a whole generation, in seconds", least=0.1, most=604_800)
    answer_characters_max: int = setting(1_000_000, "characters of one answer", least=1, most=100_000_000)
    repetition_count: int = setting(
        20, "repeats of a period that count as a loop; 0 turns the guard off", least=0, most=100_000
    )
    repetition_characters: int = setting(
        1000, "characters that the repeats must fill as well; 0 turns the guard off", least=0, most=1_000_000
    )
    unstored_seconds: float = setting(
        600.0, "how long an answer that its client did not store stays after its end, in seconds", least=1, most=86_400
    )
    streams_max: int = setting(4096, "open streams in all", least=1, most=1_000_000)
    owner_generations_max: int = setting(
        64, "generations that run at once for one of several users", least=1, most=100_000
    )
    owner_streams_max: int = setting(256, "open streams of one of several users", least=1, most=1_000_000)
    token: str = setting("", "secret that clients show; needed, and else made, when listening beyond this machine")
    users: str = setting("", "secret list `name:token,…`: several users, each with conversations of their own")
    session_days: int = setting(30, "how long the page stays signed in, in days", least=1, most=3650)
    hosts: str = setting(
        "", "comma list of names under which the service is reached, beside addresses and localhost; * is any"
    )
    cors_origins: str = setting("", "comma list of origins whose pages may use the API with a token")
    trusted_proxies: str = setting(
        "", "comma list of addresses or networks whose X-Forwarded-For and -Proto are believed"
    )
    providers: tuple[Provider, ...] = ()
    unusable_keys: tuple[str, ...] = ()  # one sentence each: the variable, and what to set

    def provider(self, name: str) -> Provider | None:
        return next((provider for provider in self.providers if provider.name == name), None)


SETTINGS = tuple(one for one in fields(Config) if "meaning" in one.metadata)


def load_config(environment: Mapping[str, str], flags: Mapping[str, str | None]) -> Config:
    """Reads every setting; flags win over the environment. Raises StartError with one line for a value that is off."""
    given = {f"LLMCHAT_{name.upper()}": value for name, value in flags.items() if value is not None}
    merged = {**environment, **given}
    values = {one.name: parse_setting(one, merged.get(f"LLMCHAT_{one.name.upper()}", "")) for one in SETTINGS}
    providers = find_providers(merged)
    return Config(**values, providers=providers, unusable_keys=find_unusable_keys(merged, providers))


def parse_setting(one: Any, text: str) -> Any:
    """The value of one setting; an empty text is its default."""
    if not text:
        return one.default
    name, bounds, kind = f"LLMCHAT_{one.name.upper()}", one.metadata, type(one.default)
    if bounds["choices"] and text.lower() in bounds["choices"]:
        return text.lower()
    if bounds["choices"]:
        raise StartError(f"{name}: {text[:60]!r} is not accepted; it is one of {', '.join(bounds['choices'])}")
    if kind is str:
        return text
    with contextlib.suppress(ValueError):
        value = kind(text)
        if bounds["least"] <= value <= bounds["most"]:
            return value
    what = "a whole number" if kind is int else "a number"
    raise StartError(
        f"{name}: {text[:60]!r} is not accepted; it is {what} from {bounds['least']:,} to {bounds['most']:,}"
    )


def find_providers(environment: Mapping[str, str]) -> tuple[Provider, ...]:
    """The providers that the environment switches on, the built-in ones first; `demo` when there is none."""
    addressed = [
        name.removesuffix("_BASE_URL").lower().replace("_", "-")
        for name, value in sorted(environment.items())
        if name.endswith("_BASE_URL") and value
    ]
    names = dict.fromkeys([*PROVIDER_FACTS, *addressed])
    found = [provider for name in names if (provider := find_provider(name, environment))]
    return tuple(found) or (Provider(DEMO, "openai", f"http://{DEMO_HOST}/v1", models=DEMO_MODELS),)


def find_unusable_keys(environment: Mapping[str, str], providers: Sequence[Provider]) -> tuple[str, ...]:
    """A sentence for each key that switches no provider on: its variable, and what to set."""
    owners = {variable: name for name, one in PROVIDER_FACTS.items() for variable in one.variables}
    found = {provider.name for provider in providers}
    sentences = []
    for variable, value in sorted(environment.items()):
        if not value or (variable not in owners and not variable.endswith("_API_KEY")):
            continue
        name = owners.get(variable) or variable.removesuffix("_API_KEY").lower().replace("_", "-")
        if name not in found:
            address = f"{name.upper().replace('-', '_')}_BASE_URL"
            sentences.append(f"{variable} alone switches nothing on: set {address} to the address of {name}'s API")
    known = {f"LLMCHAT_{one.name.upper()}" for one in SETTINGS}
    others = r"(?!LLMCHAT_)|LLMCHAT_(SERVICE|PORT|TEST)_"  # LLMCHAT_SERVICE_HOST and the like come from Kubernetes
    mistaken = [name for name in sorted(environment) if name not in known and not re.match(others, name)]
    return (*sentences, *(f"{name} is no setting; --help lists them" for name in mistaken))


def find_provider(name: str, environment: Mapping[str, str]) -> Provider | None:
    """The provider that <NAME>_API_KEY or <NAME>_BASE_URL switches on, or None. Raises StartError."""
    prefix = name.upper().replace("-", "_")
    known = PROVIDER_FACTS.get(name) or ProviderFacts(None, ())
    variables = (*known.variables, f"{prefix}_API_KEY")
    variable = next((one for one in variables if environment.get(one)), None)
    given = environment.get(f"{prefix}_BASE_URL")
    address = given or (known.base_url if variable and not known.local else None)
    if not address:
        return None
    told = known.variables or variable or f"{prefix}_DIALECT" in environment or f"{prefix}_MODELS" in environment
    if not told and not address.startswith(("http://", "https://")):
        return None  # some other program's APP_BASE_URL=/app
    dialect = environment.get(f"{prefix}_DIALECT") or known.dialect
    if dialect not in DIALECT_NAMES:
        raise StartError(f"{prefix}_DIALECT: {dialect!r} is not accepted; it is one of {', '.join(DIALECT_NAMES)}")
    return Provider(
        name=name,
        dialect=dialect,
        base_url=check_base_url(f"{prefix}_BASE_URL", address),
        key=check_key(variable, environment[variable]) if variable else None,
        variable=variable or variables[0],
        models=tuple(one.strip() for one in environment.get(f"{prefix}_MODELS", "").split(",") if one.strip()),
        models_url=known.models_url if not given else None,
        quirks=known.quirks,
    )


def check_key(variable: str, text: str) -> str:
    """A key that an HTTP header can carry. Raises StartError, which does not show it."""
    if found := re.search(r"[^!-~]", text.strip()):
        raise StartError(f"{variable}: character {found.start() + 1} is not printable ASCII, so it cannot be a key")
    return text.strip()


def check_base_url(variable: str, text: str) -> str:
    """An http(s) URL without its last slash. A path is kept as it is given: /v1 is never put in."""
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", text.strip()):
        shown = re.sub(r"(?s)[^/]*@|[?#].*", "…", text)  # what stands there may be a password or a key
        raise StartError(
            f"{variable}: {shown[:200]!r} is not accepted; it is an address such as http://127.0.0.1:11434/v1"
        )
    return text.strip().rstrip("/")


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables of a `.env` file: NAME=value lines, # comments, optional `export` and quotes. No file: none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise StartError(f".env: cannot be read: {exc}") from exc
    variables = {}
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = re.fullmatch(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)", stripped)
        if not match:
            raise StartError(f".env: line {number} is not NAME=value")
        variables[match[1]] = unquote(match[2])
    return variables


def is_open_to_others(path: Path) -> bool:
    """Whether anybody but a file's owner may read it; where the system has no such modes, no."""
    try:
        return os.name == "posix" and bool(path.stat().st_mode & 0o077)
    except FileNotFoundError:
        return False


def unquote(text: str) -> str:
    """A value of `.env`: in quotes as it stands, else up to a comment that has a space before it."""
    quoted = re.match(r"""(["'])(.*)\1\s*(?:#.*)?$""", text)
    return quoted[2] if quoted else re.split(r"(?:^|\s+)#", text, maxsplit=1)[0].rstrip()


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 4. Events and SSE
#
# The values that travel, and the wire format they travel in, both ways. Pure. Content is made of deltas; everything
# else on a stream (start, reset, notice, heartbeat, end) is about content and is never confused with it, because the
# kind of an event is its name, never its text. A frame is an event encoded; a content event's `id` is the offset after
# it. Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html
# The decoder works on bytes and splits at CR, LF and CRLF only (1): a text splitter would also cut at U+2028 and its
# like, which JSON leaves as they are. Departures: (2) an event that the stream's end leaves undelimited is delivered,
# since some providers do not send the last blank line, and the dialect decides whether it is whole; (3) `id` and
# `retry` of a provider are read over: nobody resumes from a provider.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

MERGED_KINDS = frozenset({"text", "reasoning"})  # the other kinds are one delta each, whole, never joined


class Delta(Struct, frozen=True, gc=False):
    """A piece of content. `text` of a tool_call is {"id", "name", "arguments"} as JSON; of an image {"media_type",
    "data"}; of a signature what a provider wants back beside its reasoning. Encoded, it is a delta event's data."""

    kind: str
    text: str


class Usage(Struct, frozen=True, omit_defaults=True):
    """Tokens as the provider counted them, or our estimate. `input_tokens` includes the cached ones."""

    input_tokens: int
    output_tokens: int
    estimated: bool
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Timing(Struct, frozen=True):
    """Milliseconds since the request was committed; None: has not happened."""

    first_delta_ms: int | None
    total_ms: int | None
    first_text_ms: int | None = None  # later than first_delta_ms by as long as the model thought


NO_TIMING = Timing(None, None)


def add_usage(one: Usage | None, other: Usage | None) -> Usage | None:
    if one is None or other is None:
        return one or other
    return Usage(
        one.input_tokens + other.input_tokens,
        one.output_tokens + other.output_tokens,
        one.estimated or other.estimated,
        one.cached_tokens + other.cached_tokens,
        one.reasoning_tokens + other.reasoning_tokens,
    )


class Ending(NamedTuple):
    """How a generation ended: everything that the terminal transaction writes."""

    status: str
    finish_reason: str | None = None
    error: dict[str, Any] | None = None


encode_json = msgspec.json.Encoder().encode
decode_json = msgspec.json.Decoder().decode


def runs_of(deltas: Sequence[Delta]) -> list[tuple[str, list[str]]]:
    """The texts of deltas by runs of a kind; of kinds that must stay whole, each is a run."""
    if len(deltas) == 1:  # as they mostly come
        return [(deltas[0].kind, [deltas[0].text])]
    runs = []
    for kind, run in itertools.groupby(deltas, operator.attrgetter("kind")):
        texts = [delta.text for delta in run]
        runs += [(kind, texts)] if kind in MERGED_KINDS else [(kind, [text]) for text in texts]
    return runs


def join_deltas(deltas: Sequence[Delta]) -> list[Delta]:
    """The same content in as few deltas as there are runs of a kind."""
    return [Delta(kind, "".join(texts)) for kind, texts in runs_of(deltas)]


def split_delta(delta: Delta) -> Sequence[Delta]:
    """The delta in pieces that make frames of at most 64 KiB; kinds that must stay whole stay whole."""
    if len(delta.text) <= FRAME_CHARACTERS_MAX or delta.kind not in MERGED_KINDS:
        return (delta,)
    starts = range(0, len(delta.text), FRAME_CHARACTERS_MAX)
    return [Delta(delta.kind, delta.text[start : start + FRAME_CHARACTERS_MAX]) for start in starts]


def text_of(deltas: Iterable[Delta]) -> str:
    return "".join(delta.text for delta in deltas if delta.kind == "text")


def quarter_tokens(text: str) -> int:
    """A guess for when nobody counted, in quarters of a token: four ASCII characters make one, or one of any other."""
    return len(text) if text.isascii() else len(text) + 3 * sum(not character.isascii() for character in text)


def estimate_tokens(deltas: Iterable[Delta]) -> int:
    return (sum(quarter_tokens(delta.text) for delta in deltas) + 3) // 4


def encode_event(name: str, data: Any, offset: int | None = None) -> bytes:
    """One SSE frame; JSON has no raw newline, so its data is always one line."""
    identity = b"" if offset is None else b"id: %d\n" % offset
    return b"%sevent: %s\ndata: %s\n\n" % (identity, name.encode(), encode_json(data))


def encode_delta(delta: Delta, offset: int) -> bytes:
    """The frame of a delta; `offset` is the one after it. Encoded once, for every subscriber."""
    return b"id: %d\nevent: delta\ndata: %s\n\n" % (offset, encode_json(delta))


def offset_of(frame: bytes, before: int) -> int:
    """The offset after an event, by its id; one without an id is where the event before it was."""
    return int(frame[4 : frame.index(b"\n")]) if frame.startswith(b"id: ") else before


HEARTBEAT_FRAME = encode_event("heartbeat", {})
RESET_FRAME = encode_event("reset", {}, 0)
SSE_FIELDS = frozenset({b"data", b"event", b"id", b"retry", b""})
RETRY_LINE = b"retry: 1000\n"  # ms a browser's EventSource waits before it comes back


class SseDecoder:
    """Turns bytes, cut anywhere, into events. Raises ProviderProtocol for an event over PROVIDER_EVENT_BYTES_MAX.

    `strange` keeps the beginning of what is no SSE at all: a page or a bare error, the provider's words for a failure.
    """

    __slots__ = ("_buffer", "_last_was_cr", "_started", "strange")

    def __init__(self) -> None:
        self.strange = bytearray()
        self._buffer = bytearray()
        self._last_was_cr = False
        self._started = False

    def lines(self, data: bytes) -> list[bytes] | None:
        """What is the data of the events that these bytes complete if each is one line of data, as they mostly are.

        That is not looked at here: whoever decodes many lines at once finds out, and if it is so, has them passed over.
        None, or if that fails: `feed`.
        """
        end = data.rfind(b"\n\n")
        if end < 0 or self._last_was_cr or len(self._buffer) + len(data) > PROVIDER_EVENT_BYTES_MAX:
            return None
        whole = bytes(self._buffer) + data[:end]
        return whole[6:].split(b"\n\ndata: ") if whole.startswith(b"data: ") and b"\r" not in data else None

    def pass_over(self, data: bytes) -> None:
        """The events whose lines were found in these bytes are done with; what is after them begins the next one."""
        self._started = True
        self._buffer[:] = data[data.rfind(b"\n\n") + 2 :]

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The events that these bytes complete: (name, data), the name empty where none was given."""
        if self._last_was_cr or b"\r" in data:
            data = self._fold_newlines(data)
        if not self._started:
            data = self._drop_byte_order_mark(data)
        if not self._buffer and len(data) <= PROVIDER_EVENT_BYTES_MAX and data.endswith(b"\n\n"):  # as it mostly comes
            if data.startswith(b"data: ") and data.find(b"\n") == len(data) - 2:
                return [(b"", data[6:-2])]
            blocks = data[:-2].split(b"\n\n")
        else:
            blocks = self._split(data)
        events = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                events.append((b"", block[6:]))
            elif event := self._parse(block):
                events.append(event)
        return events

    def _split(self, data: bytes) -> list[bytes]:
        """The blocks between blank lines that these bytes complete; the rest is kept."""
        buffer = self._buffer
        searched = max(len(buffer) - 1, 0)
        buffer += data
        end = buffer.rfind(b"\n\n", searched)
        blocks = bytes(memoryview(buffer)[:end]).split(b"\n\n") if end >= 0 else []
        del buffer[: end + 2 if end >= 0 else 0]
        if (size := max(map(len, [buffer, *blocks]))) > PROVIDER_EVENT_BYTES_MAX:
            raise ProviderProtocol(f"one event is larger than {PROVIDER_EVENT_BYTES_MAX:,} bytes, the limit: {size:,}")
        return blocks

    def end(self) -> list[tuple[bytes, bytes]]:
        """What the end of the stream leaves: an undelimited last event, if there is one (departure 2)."""
        event = self._parse(bytes(self._buffer))
        self._buffer.clear()
        return [event] if event else []

    def _parse(self, block: bytes) -> tuple[bytes, bytes] | None:
        event = parse_sse_block(block)
        if event is None and len(self.strange) < STRANGE_BYTES_MAX and not only_sse_fields(block):
            self.strange += block[:STRANGE_BYTES_MAX] + b"\n\n"
        return event

    def _fold_newlines(self, data: bytes) -> bytes:
        """CR and CRLF become LF, also where a cut parted them (1)."""
        if self._last_was_cr and data.startswith(b"\n"):
            data = data[1:]
            self._last_was_cr = False
        if data:
            self._last_was_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _drop_byte_order_mark(self, data: bytes) -> bytes:
        held = bytes(self._buffer) + data
        self._buffer.clear()
        if len(held) < 3 and b"\xef\xbb\xbf".startswith(held):
            self._buffer += held
            return b""
        self._started = True
        return held.removeprefix(b"\xef\xbb\xbf")


def parse_sse_block(block: bytes) -> tuple[bytes, bytes] | None:
    """The event of the lines between two blank lines, or None if they carry no data (comments, keep-alives)."""
    name, data = b"", []
    for line in block.split(b"\n"):
        field_name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field_name == b"data":
            data.append(value)
        elif field_name == b"event":
            name = value
    return (name, b"\n".join(data)) if data else None


def only_sse_fields(block: bytes) -> bool:
    """Whether every line is a field of the specification, a comment, or empty."""
    return all(line.partition(b":")[0] in SSE_FIELDS for line in block.split(b"\n"))


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 5. Dialects
#
# A dialect is a provider's wire format, and pure: it builds the request's path, headers and body from turns, and its
# decoder turns decoded SSE events into deltas, usage and a finish_reason, or raises a ProviderError. It knows nothing
# of connections, retries or storage. Two dialects cover the field; a provider's departures from one are quirks, named
# where they are acted on. A stream that ends without a finish_reason was cut, whatever else it said: `end` raises
# ProviderTruncated then, and `[DONE]` is neither necessary nor sufficient.
#
# A new dialect needs: `path`, `headers`, `prefills`, `body`, `models_path`, a decoder with `decode`, `decode_document` and
# `end`, a line in DIALECTS and in DIALECT_NAMES, and a recording of every one of its ends.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Turn:
    """A message as it goes upstream; `tool_call_id` is set on role `tool`, and `id_field` is where a request has it."""

    role: str
    content: tuple[Delta, ...]
    tool_call_id: str | None = None
    id_field: str = ""  # empty: the turn is stored


class Parameters(Struct, frozen=True, omit_defaults=True):
    """What a request may say beside its turns; None: the provider's default. Stored with the message."""

    temperature: float | None = None
    max_tokens: int | None = None
    reasoning_effort: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    top_p: float | None = None
    stop: list[str] | None = None
    response_format: dict[str, Any] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    parallel_tool_calls: bool | None = None


NO_PARAMETERS = Parameters()


@dataclass(frozen=True)
class Question:
    """Everything that one request to a provider is built from; `system` empty: none."""

    model: str
    system: str
    turns: tuple[Turn, ...]
    parameters: Parameters
    continues: bool = False  # the last turn is an answer that broke off; the new one goes on with it


class Dialect(Protocol):
    """One wire format. `body` returns what is sent as JSON; `path` is appended to the provider's base URL."""

    models_path: str

    def path(self, provider: Provider) -> str: ...
    def headers(self, provider: Provider) -> dict[str, str]: ...
    def prefills(self, quirks: frozenset[str]) -> bool: ...
    def body(self, provider: Provider, quirks: frozenset[str], question: Question) -> dict[str, Any]: ...
    def decoder(self, provider: Provider) -> Decoder: ...


def alternate(turns: Iterable[Turn]) -> list[Turn]:
    """The turns as every provider accepts them: none empty, a user's first, no two of user or assistant in a row.

    Strict servers refuse two neighbours of one role, and a history has them: a failed answer without a character
    between two questions, a stopped one that was asked again.
    """
    kept: list[Turn] = []
    for turn in turns:
        if not says_something(turn):
            continue
        if turn.role == "assistant" and all(one.role == "system" for one in kept):
            continue
        if kept and turn.role == kept[-1].role != "tool":
            parted = (Delta("text", "\n\n"),) if kept[-1].content[-1].kind == turn.content[0].kind == "text" else ()
            kept[-1] = Turn(turn.role, kept[-1].content + parted + turn.content)
        else:
            kept.append(turn)
    return kept


def says_something(turn: Turn) -> bool:
    """Whether a turn holds what a provider takes: not blank text or reasoning alone, as a stopped answer may. A tool's
    result may be empty, for it answers a call."""
    return turn.role == "tool" or any(
        delta.text.strip() if delta.kind == "text" else delta.kind in ("image", "tool_call", "tool_result")
        for delta in turn.content
    )


# What a turn of each role may hold upstream. An import can bring anything: an image in an answer, a call in a question.
ROLE_KINDS = {
    "user": frozenset({"text", "image"}),
    "assistant": frozenset({"text", "reasoning", "signature", "tool_call"}),
    "system": frozenset({"text"}),
    "tool": frozenset({"text"}),
}
TOOL_NAME_CHARACTERS_MAX = 64
TOOL_CALL_ID_CHARACTERS_MAX = 40  # OpenAI's limit; Anthropic has the pattern, and both want an id once in a request


def is_answer(turn: Turn) -> bool:
    """Whether tools' results behind a turn are of its calls: an answer that failed before a character is passed over."""
    return turn.role == "assistant" and says_something(turn)


def called_ids(turn: Turn) -> set[str]:
    return {json.loads(delta.text)["id"] for delta in turn.content if delta.kind == "tool_call"}


def answered(turns: Sequence[Turn], quirks: frozenset[str]) -> list[Turn]:
    """The turns with what their roles may hold, without tool calls that nobody answered and without results of no call
    or of one that has a result: every provider refuses them. Who sends a result of no call is told so before
    (`refuse_unasked_results`); one that is stored, by an import or on a branch, is left out here, and the conversation
    goes on. Calls come after a question, their results right behind them, whatever was said in between, and have ids
    that the provider takes, whoever made them."""
    kept: list[Turn] = []
    names: dict[str | None, str] = {}  # of the open calls: their ids here, and upstream
    taken: set[str] = set()
    asked, place = False, 0  # of the next result
    for position, turn in enumerate(turns):
        if not ROLE_KINDS[turn.role].issuperset([one.kind for one in turn.content]):
            turn = replace(turn, content=tuple(one for one in turn.content if one.kind in ROLE_KINDS[turn.role]))
        if turn.role == "tool":
            if name := names.pop(turn.tool_call_id, None):
                kept.insert(place, replace(turn, tool_call_id=name))
                place += 1
            continue
        asked = asked or (turn.role == "user" and says_something(turn))
        if is_answer(turn):
            following = itertools.takewhile(lambda other: not is_answer(other), turns[position + 1 :])
            results = {other.tool_call_id for other in following if other.role == "tool"} if asked else set()
            content, names = name_calls(turn.content, results, taken, quirks)
            turn, place = replace(turn, content=content), len(kept) + 1
        kept.append(turn)
    return kept


def name_calls(
    content: Iterable[Delta], results: set[str | None], taken: set[str], quirks: frozenset[str]
) -> tuple[tuple[Delta, ...], dict[str | None, str]]:
    """An answer's content with only the calls that have a result, and the ids that those have upstream, by their own;
    what is `taken` already is given to no other."""
    kept: list[Delta] = []
    names: dict[str | None, str] = {}
    for delta in content:
        if delta.kind == "tool_call":
            call = json.loads(delta.text)
            if call["id"] not in results or call["id"] in names:
                continue
            names[call["id"]] = name = tool_call_id(call["id"], taken, quirks)
            taken.add(name)
            if name != call["id"]:
                delta = Delta("tool_call", encode_json({**call, "id": name}).decode())
        kept.append(delta)
    return tuple(kept), names


def tool_call_id(identity: str, taken: Iterable[str], quirks: frozenset[str]) -> str:
    """The id itself where the provider takes it, else one made of it, the same in each request."""
    pattern, start, digits = rf"[a-zA-Z0-9_-]{{1,{TOOL_CALL_ID_CHARACTERS_MAX}}}", "call_", 24
    if "nine_character_ids" in quirks:  # Mistral: "must be a-z, A-Z, 0-9, with a length of 9"
        pattern, start, digits = "[a-zA-Z0-9]{9}", "", 9
    if re.fullmatch(pattern, identity) and identity not in taken:
        return identity
    made = (hashlib.sha256(f"{number} {identity}".encode()).hexdigest()[:digits] for number in itertools.count())
    return next(name for one in made if (name := start + one) not in taken)


def tool_name(name: str) -> str:
    """A called tool's name; models and imports have names that no provider takes, such as `web.run`."""
    return re.sub("[^a-zA-Z0-9_-]", "_", name)[:TOOL_NAME_CHARACTERS_MAX] or "_"


def function_of(tool: Mapping[str, Any]) -> dict[str, Any] | None:
    """The function in a tool of any shape (OpenAI's, the bare function, Anthropic's), its schema in `parameters`; None:
    something of the provider's own, such as a web search, which goes out as it is."""
    if tool.get("type") not in (None, "function", "custom"):
        return None
    function = dict(tool["function"]) if isinstance(tool.get("function"), dict) else dict(tool)
    if "input_schema" in function:
        function["parameters"] = function.pop("input_schema")
    return {name: value for name, value in function.items() if name not in ("type", "cache_control")}


CONTINUE_PROMPT = (
    "Your last answer was cut off. Continue it exactly where it stopped, beginning with the very next character. "
    "Do not repeat any of it, do not start again, and do not comment on this."
)


def ask_to_continue(turns: list[Turn]) -> list[Turn]:
    """The turns with a request behind an answer at their end, for who takes no prefill."""
    if turns and turns[-1].role == "assistant":
        return [*turns, Turn("user", (Delta("text", CONTINUE_PROMPT),))]
    return turns


# What providers call the end, by ours; then their words for an answer that broke.
FINISH_REASONS = {
    word: ours
    for ours, words in {
        "stop": "stop end_turn stop_sequence eos eos_token pause_turn COMPLETE STOP",
        "length": "length max_tokens model_context_window_exceeded MAX_TOKENS",
        "tool_calls": "tool_calls function_call tool_use",
        "content_filter": "content_filter content_filtered sensitive refusal guardrail_intervened"
        " SAFETY RECITATION BLOCKLIST PROHIBITED_CONTENT SPII",
    }.items()
    for word in words.split()
}
BROKEN_REASONS = frozenset({"error", "network_error", "OTHER", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS"})


def finish_reason_of(word: str) -> str:
    """Our finish_reason for a provider's; one that nobody knows is a `stop`. Raises ProviderError for a broken end.

    Gemini's OpenAI endpoint puts its own word behind ours, as in "function_call_filter: MALFORMED_FUNCTION_CALL".
    """
    word = word.rpartition(": ")[2]
    if word in BROKEN_REASONS or word.startswith(("ERROR", "MALFORMED")):
        raise ProviderUnavailable(
            f"the provider ended the answer with finish_reason {shorten(word, None)!r}", transient=True
        )
    return FINISH_REASONS.get(word, "stop")


# The types and codes that providers put into an error's body, as the HTTP status that means the same.
ERROR_TYPE_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "api_error": 500,
    "server_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
SPENT_CODES = ("insufficient_quota", "billing_hard_limit_reached", "credit_balance_too_low")  # waiting does not help
NESTED_WORDS_MAX = 8  # how deep an error's sentence may be


def provider_error(provider: Provider, status: int, words: str, kinds: Sequence[str], said: str = "") -> ProviderError:
    """The error for an HTTP status, or for the one that an in-band error means; `words` are the provider's own."""
    message = f"{provider.name} {said or f'answered {status}'}: {shorten(words, provider.key)}"
    if status in (401, 403) or (status == 400 and re.search(r"\bapi[ _-]?key\b", words, re.I)):  # 400: Gemini, xAI
        hint = f"; check {provider.variable}" if provider.variable else ""
        return ProviderAuth(message + hint)
    if status == 429:
        return ProviderRateLimited(message, transient=not is_spent(words, kinds))
    if status in (408, 409) or status >= 500:
        return ProviderUnavailable(message, transient=True)
    if status < 400:
        return ProviderProtocol(message)
    return ProviderRejected(message)


def is_spent(words: str, kinds: Sequence[str]) -> bool:
    """Whether an error says that there is no money left: then no retry makes sense, whatever else it says."""
    return any(code in kinds or code in words for code in SPENT_CODES)


def in_band_error(provider: Provider, data: bytes) -> ProviderError:
    """The error for an error object inside an answer, in whatever shape it comes."""
    words, kinds = body_words(data)
    status = next((int(kind) for kind in kinds if re.fullmatch("[45][0-9][0-9]", kind)), None)
    status = status or next((ERROR_TYPE_STATUSES[kind] for kind in kinds if kind in ERROR_TYPE_STATUSES), 500)
    return provider_error(provider, status, words, kinds, "reported an error")


def no_answer(provider: Provider, data: bytes) -> ProviderError:
    """The error for what came in place of an answer: a bare error (Gemini), a page, or something else altogether."""
    if data.lstrip().startswith((b"{", b"[")) and b'"error"' in data:
        return in_band_error(provider, data)
    words = shorten(body_words(data)[0], provider.key)
    return ProviderProtocol(f"{provider.name} sent something that is no answer: {words}")


def body_words(body: bytes) -> tuple[str, list[str]]:
    """The sentence in an error's body, and its code, type and status; a page is reduced to its text.

    Every shape that is about: {"error": {"message"}}, {"error": "…"}, {"message"}, {"detail"}, a list of one of them,
    {"detail": [{"loc", "msg"}]} (FastAPI). What has no sentence is shown as it is.
    """
    text = body.decode("utf-8", "replace").strip("\ufeff \t\r\n")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return (text_of_page(text) if text.startswith("<") else text) or "(an empty body)", []
    kinds: list[str] = []
    place = ""
    for _ in range(NESTED_WORDS_MAX):
        if isinstance(found, list) and found:
            found = found[0]
        elif isinstance(found, dict):
            kinds = [str(found[key]) for key in ("code", "type", "status") if found.get(key)] or kinds
            place = f"{'.'.join(map(str, found['loc']))}: " if isinstance(found.get("loc"), list) else place
            found = next((found[key] for key in ("error", "message", "detail", "msg") if found.get(key)), None)
    return (place + found if isinstance(found, str) and found else text), kinds


def text_of_page(page: str) -> str:
    """The words of an HTML page, without scripts and styles; in linear time, whatever the page is."""
    hidden = r"<(script|style)\b.*?(?:</\1\s*>|\Z)|</?[a-z!][^<>]*>"
    return html.unescape(re.sub(hidden, " ", page, flags=re.DOTALL | re.IGNORECASE)).strip()


def shorten(words: str, key: str | None) -> str:
    """Words in one storable line of bounded length, without the key that some providers repeat."""
    line = " ".join(without_halves(words.replace(key, "…") if key else words).replace("\0", " ").split())
    return line if len(line) <= PROVIDER_WORDS_CHARACTERS_MAX else line[: PROVIDER_WORDS_CHARACTERS_MAX - 1] + "…"


def without_halves(text: str) -> str:
    """The text with surrogate pairs joined and halves of them as U+FFFD: JSON's escapes allow what UTF-8 cannot hold."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def count(value: Any) -> int:
    """A token count as providers send them: missing, null and nonsense are 0."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0


def within(document: Mapping[str, Any], outer: str, inner: str) -> Any:
    """A value one level down, where there is such a level."""
    found = document.get(outer)
    return found.get(inner) if isinstance(found, dict) else None


@dataclass(slots=True)
class ToolCall:
    """A tool call whose arguments are still coming. Their text is joined once, at the end."""

    identity: str = ""
    name: str = ""
    fragments: list[str] = field(default_factory=list)

    def delta(self) -> Delta:
        """The complete call. Gemini may send none of the ids that a tool's result must name: then one is made."""
        identity = self.identity or f"call_{random.getrandbits(64):016x}"
        texts = {"id": identity, "name": self.name, "arguments": "".join(self.fragments)}
        return Delta("tool_call", encode_json({name: without_halves(text) for name, text in texts.items()}).decode())


Chunk = TypeVar("Chunk")


class Decoder(ABC):
    """Decodes one answer; it is used once. Here is what the dialects share: the end, and text whose surrogate pairs a
    provider has cut between two events.

    `done`: the dialect's own end has come, nothing after it counts. `held_characters`: of tool calls, which are no
    delta before they are complete; that they grow is a sign of life.
    """

    __slots__ = ("_halves", "_mending", "_provider", "done", "finish_reason", "held_characters", "usage")

    def __init__(self, provider: Provider) -> None:
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.done = False
        self.held_characters = 0
        self._provider = provider
        self._halves: dict[str, str] = {}  # by kind: the first half of a pair
        self._mending = False

    @abstractmethod
    def decode(self, name: bytes, data: bytes, deltas: list[Delta]) -> None:
        """Appends what one SSE event brings. Raises ProviderError."""

    def decode_lines(self, lines: Sequence[bytes], deltas: list[Delta]) -> bool:
        """The same for many events at once; False, with nothing done: they need `decode`, as where one is several lines."""
        return False

    @abstractmethod
    def decode_document(self, body: bytes, deltas: list[Delta]) -> None:
        """The same for an answer that came as one JSON document. Raises ProviderError."""

    def end(self, deltas: list[Delta]) -> None:
        """Takes the end of the stream. Raises ProviderTruncated if the answer was not whole."""
        if self.finish_reason is None:
            raise ProviderTruncated(f"{self._provider.name} ended the stream before the answer was finished")
        deltas.extend(Delta(kind, "\ufffd") for kind in self._halves)

    def _decode_leniently(self, data: bytes, kind: type[Chunk]) -> Chunk:
        """For what the strict decoder refuses although it is JSON: half a surrogate pair, broken UTF-8, a list of one."""
        try:
            document = json.loads(data.decode("utf-8", "replace"))
            chunk = msgspec.convert(document[0] if isinstance(document, list) and document else document, kind)
        except (ValueError, RecursionError, msgspec.ValidationError) as exc:
            raise no_answer(self._provider, data) from exc
        self._mending = True
        return chunk

    def _mend(self, deltas: list[Delta], first: int) -> None:
        """Joins halves over the cut; a half that stays alone becomes U+FFFD, for nothing could store it."""
        mended = []
        for delta in deltas[first:]:
            text = self._halves.pop(delta.kind, "") + delta.text
            if delta.kind in MERGED_KINDS and "\ud800" <= text[-1] <= "\udbff":
                self._halves[delta.kind], text = text[-1], text[:-1]
            mended += [Delta(delta.kind, without_halves(text))] if text else []
        deltas[first:] = mended
        self._mending = bool(self._halves)

    def _hold(self, call: ToolCall, text: str) -> None:
        """Keeps a fragment of a call's arguments. Raises TooLong."""
        call.fragments.append(text)
        self.held_characters += len(text)
        if self.held_characters > PROVIDER_EVENT_BYTES_MAX:
            raise TooLong(f"the tool calls are longer than {PROVIDER_EVENT_BYTES_MAX:,} characters, the limit")


# ── OpenAI's chat completions: openai-python, types/chat/chat_completion_chunk.py ───────────────────────────────────


class ChatDelta(Struct, gc=False):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None
    refusal: Any = None


class ChatChoice(Struct, gc=False):
    delta: ChatDelta | None = None
    message: ChatDelta | None = None
    finish_reason: str | None = None
    usage: Any = None


class ChatChunk(Struct, gc=False):
    """One chunk of a stream, or a whole answer. What providers disagree on stays untyped and is looked at below."""

    choices: list[ChatChoice] | None = None
    usage: Any = None
    error: Any = None
    x_groq: Any = None


class TextDelta(Struct, gc=False):
    content: str
    reasoning_content: None = None
    reasoning: None = None
    tool_calls: None = None
    refusal: None = None


class TextChoice(Struct, gc=False):
    delta: TextDelta
    finish_reason: None = None
    usage: None = None


class TextChunk(Struct, gc=False):
    """A chunk with text and nothing else, as nearly all are: what is in no other needs no look."""

    choices: tuple[TextChoice]
    usage: None = None
    error: None = None
    x_groq: None = None


CHAT_CHUNK, TEXT_CHUNK = msgspec.json.Decoder(ChatChunk), msgspec.json.Decoder(TextChunk)


class OpenAIDecoder(Decoder):
    __slots__ = ("_calls", "_calls_by_index", "_is_plain", "_last_reasoning")

    def __init__(self, provider: Provider) -> None:
        super().__init__(provider)
        self._calls: list[ToolCall] = []  # complete only at the end
        self._calls_by_index: dict[int, ToolCall] = {}
        self._last_reasoning: str | None = None
        self._is_plain = True  # the newest chunk was text alone, and so probably is the next

    def decode(self, name: bytes, data: bytes, deltas: list[Delta]) -> None:
        if self.done or not data:
            return
        if data.startswith(b"[DONE]"):
            self.done = True
            return
        if name == b"error":
            raise in_band_error(self._provider, data)
        first = len(deltas)
        try:
            chunk = CHAT_CHUNK.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            chunk = self._decode_leniently(data, ChatChunk)
        self._decode_chunk(chunk, data, deltas)
        if self._mending:
            self._mend(deltas, first)

    def decode_lines(self, lines: Sequence[bytes], deltas: list[Delta]) -> bool:
        if self.done or self._mending:
            return False
        if self._is_plain and self._decode_plain(lines, deltas):
            return True
        body, last = lines[:-END_LINES], lines[-END_LINES:]  # what may be the end is like no other
        if any(b"\n" in line for line in last):
            return False
        if body and not self._decode_plain(body, deltas) and not self._decode_many(body, deltas):
            return False
        for data in last:
            self.decode(b"", data, deltas)
        return True

    def _decode_plain(self, lines: Sequence[bytes], deltas: list[Delta]) -> bool:
        """Takes chunks that are nothing but text; False, with nothing done: some are more."""
        try:
            chunks = TEXT_CHUNK.decode_lines(b"\n".join(lines))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            chunks = []
        self._is_plain = len(chunks) == len(lines)
        if self._is_plain:
            deltas += [Delta("text", text) for chunk in chunks if (text := chunk.choices[0].delta.content)]
        return self._is_plain

    def _decode_many(self, lines: Sequence[bytes], deltas: list[Delta]) -> bool:
        """Takes chunks of all kinds; False, with nothing done: not every line is one."""
        try:
            chunks = CHAT_CHUNK.decode_lines(b"\n".join(lines))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        if len(chunks) != len(lines):
            return False
        for chunk, data in zip(chunks, lines, strict=True):
            self._decode_chunk(chunk, data, deltas)
        return True

    def _decode_chunk(self, chunk: ChatChunk, data: bytes, deltas: list[Delta]) -> None:
        if chunk.error:
            raise in_band_error(self._provider, data)
        if chunk.choices:
            self._decode_choice(chunk.choices[0], deltas)
        if chunk.usage or chunk.x_groq:
            self._decode_extras(chunk)

    def _decode_choice(self, choice: ChatChoice, deltas: list[Delta]) -> None:
        delta = choice.delta or choice.message
        if delta is not None:
            content = delta.content
            if isinstance(content, str) and not (
                delta.reasoning_content or delta.reasoning or delta.tool_calls or delta.refusal
            ):
                if content:
                    deltas.append(Delta("text", content))
                    self._is_plain = True
            else:
                self._decode_rest(delta, deltas)
        if choice.finish_reason:
            self.finish_reason = finish_reason_of(choice.finish_reason)
        if choice.usage:  # Moonshot
            self._decode_usage(choice.usage)

    def _decode_rest(self, delta: ChatDelta, deltas: list[Delta]) -> None:
        """Everything but text alone: reasoning under either name, parts (Mistral), refusals, tool calls."""
        reasoning = delta.reasoning_content or delta.reasoning
        if isinstance(reasoning, str) and reasoning:
            # Quirk of xAI: a reasoning delta may come twice in a row (AI SDK, packages/xai).
            if not (reasoning == self._last_reasoning and "repeated_reasoning" in self._provider.quirks):
                deltas.append(Delta("reasoning", reasoning))
            self._last_reasoning = reasoning
        parts = delta.content if isinstance(delta.content, list) else [delta.content]
        deltas.extend(part for item in parts for part in parts_of(item))
        if isinstance(delta.refusal, str) and delta.refusal:
            deltas.append(Delta("text", delta.refusal))
        fragments = (
            delta.tool_calls if isinstance(delta.tool_calls, list) else [delta.tool_calls] if delta.tool_calls else []
        )
        for fragment in fragments:
            self._collect(fragment)

    def _collect(self, fragment: Any) -> None:
        """Takes a fragment of a tool call."""
        if not isinstance(fragment, dict):
            raise ProviderProtocol(f"{self._provider.name}: a tool call is {type(fragment).__name__}, not an object")
        function = fragment.get("function")
        function = function if isinstance(function, dict) else {}
        call = self._call_of(fragment.get("index"), fragment.get("id") or "", function.get("name") or "")
        arguments = function.get("arguments") or ""
        self._hold(call, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))

    def _call_of(self, index: Any, identity: Any, name: Any) -> ToolCall:
        """The call that a fragment belongs to, by its index, or begun by it.

        Without an index (Gemini) a new id, or a name without an id, begins the next call. With one, so does another id
        together with a name: some gateways give every call the index 0.
        """
        identity, name, indexed = str(identity), str(name), isinstance(index, int)
        call = self._calls_by_index.get(index) if indexed else next(reversed(self._calls), None)
        if call is not None:
            is_other = identity not in ("", call.identity)
            begins = is_other and name and call.identity if indexed else is_other or (name and not identity)
        if call is None or begins:
            call = ToolCall()
            self._calls.append(call)
            if indexed:
                self._calls_by_index[index] = call
        call.identity, call.name = call.identity or identity, call.name or name
        return call

    def _decode_extras(self, chunk: ChatChunk) -> None:
        """Usage, and what Groq puts beside it."""
        groq = chunk.x_groq if isinstance(chunk.x_groq, dict) else {}
        if groq.get("error"):
            raise in_band_error(self._provider, encode_json(groq))
        self._decode_usage(chunk.usage or groq.get("usage"))

    def _decode_usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            cached = within(usage, "prompt_tokens_details", "cached_tokens") or usage.get("prompt_cache_hit_tokens")
            reasoning = within(usage, "completion_tokens_details", "reasoning_tokens") or usage.get("reasoning_tokens")
            self.usage = Usage(
                input_tokens=count(usage.get("prompt_tokens")),
                output_tokens=count(usage.get("completion_tokens")),
                estimated=False,
                cached_tokens=count(cached),
                reasoning_tokens=count(reasoning),
            )

    def decode_document(self, body: bytes, deltas: list[Delta]) -> None:
        self.decode(b"", body, deltas)
        if self.finish_reason is None and not deltas:
            raise no_answer(self._provider, body)

    def end(self, deltas: list[Delta]) -> None:
        super().end(deltas)
        deltas.extend(call.delta() for call in self._calls)
        if self._calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"


def parts_of(item: Any) -> Iterator[Delta]:
    """A part of content: a string, {"type": "text", "text"} or {"type": "thinking", "thinking": [{"text"}]}."""
    if isinstance(item, str):
        item = {"text": item}
    if isinstance(item, dict) and item.get("type") == "thinking":
        thinking = item.get("thinking")
        texts = (
            [part.get("text") for part in thinking if isinstance(part, dict)]
            if isinstance(thinking, list)
            else [thinking]
        )
        yield from (Delta("reasoning", text) for text in texts if isinstance(text, str) and text)
    elif isinstance(item, dict) and isinstance(item.get("text"), str) and item["text"]:
        yield Delta("text", item["text"])


# The fields that make a provider take an answer at the end of the messages as the beginning of its own, by quirk.
PREFILL_FIELDS: dict[str, dict[str, bool]] = {
    "prefill": {},
    "prefill_prefix": {"prefix": True},  # Mistral
    "prefill_partial": {"partial": True},  # Moonshot
}


class OpenAIDialect:
    models_path = "/models"
    decoder = OpenAIDecoder

    def path(self, provider: Provider) -> str:
        return "/chat/completions"

    def headers(self, provider: Provider) -> dict[str, str]:
        if not provider.key:
            return {}
        if "api_key_header" in provider.quirks:  # Azure
            return {"api-key": provider.key}
        return {"authorization": f"Bearer {provider.key}"}

    def prefills(self, quirks: frozenset[str]) -> bool:
        return "no_prefill" not in quirks and not quirks.isdisjoint(PREFILL_FIELDS)

    def body(self, provider: Provider, quirks: frozenset[str], question: Question) -> dict[str, Any]:
        turns = alternate(answered(question.turns, quirks))
        if question.continues and not self.prefills(quirks):  # else an answer at the end is the client's business
            turns = ask_to_continue(turns)
        messages = [self._message(turn, quirks) for turn in turns]
        if turns and turns[-1].role == "assistant":
            for quirk in quirks & PREFILL_FIELDS.keys():
                messages[-1] |= PREFILL_FIELDS[quirk]
        system = [{"role": "system", "content": question.system}] if question.system.strip() else []
        parameters = self._parameters(quirks, question.parameters)
        return {"model": question.model, "messages": system + messages, "stream": True, **parameters}

    def _parameters(self, quirks: frozenset[str], parameters: Parameters) -> dict[str, Any]:
        asked: dict[str, Any] = msgspec.to_builtins(parameters)
        if "max_completion_tokens" in quirks and "max_tokens" in asked:
            asked["max_completion_tokens"] = asked.pop("max_tokens")
        if "no_stream_options" not in quirks:
            asked["stream_options"] = {"include_usage": True}
        if "reasoning_split" in quirks:  # MiniMax: thinking beside the content, not inside it
            asked["reasoning_split"] = True
        if "tools" in asked:
            asked["tools"] = [openai_tool(tool) for tool in asked["tools"]]
        if "tool_choice_any" in quirks and asked.get("tool_choice") == "required":  # Mistral's word for it
            asked["tool_choice"] = "any"
        return asked

    def _message(self, turn: Turn, quirks: frozenset[str]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role, "content": text_of(turn.content)}
        calls = [json.loads(delta.text) for delta in turn.content if delta.kind == "tool_call"]
        if any(delta.kind == "image" for delta in turn.content):
            said = (delta for delta in join_deltas(turn.content) if delta.kind == "image" or delta.text.strip())
            message["content"] = [openai_part(delta) for delta in said]
        if calls:
            message["content"] = message["content"] if message["content"].strip() else None
            message["tool_calls"] = [openai_tool_call(call) for call in calls]
        if turn.role == "tool":
            message["tool_call_id"] = turn.tool_call_id
        if "reasoning_back" in quirks and calls:  # DeepSeek wants the reasoning back beside the tool calls it led to
            message["reasoning_content"] = "".join(one.text for one in turn.content if one.kind == "reasoning")
        return message


def openai_part(delta: Delta) -> dict[str, Any]:
    """A part of list content, which only a message with an image has: some servers take nothing but a string."""
    if delta.kind == "text":
        return {"type": "text", "text": delta.text}
    image = json.loads(delta.text)
    return {"type": "image_url", "image_url": {"url": f"data:{image['media_type']};base64,{image['data']}"}}


def openai_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = function_of(tool)
    return tool if function is None else {"type": "function", "function": function}


def parse_arguments(text: str) -> dict[str, Any]:
    """A tool call's arguments as the object that they should be; what a model garbled goes in as it was."""
    try:
        value = decode_json(text or "{}")
    except (msgspec.MsgspecError, RecursionError):  # msgspec refuses what no encoder could send: NaN, half a pair
        return {"arguments": text}
    return value if isinstance(value, dict) else {"arguments": value}


def openai_tool_call(call: Mapping[str, str]) -> dict[str, Any]:
    """A stored tool call in OpenAI's shape. Its arguments are a text, but one that servers with chat templates parse
    (llama.cpp, vLLM, SGLang) and refuse for good, with all that follows, if it is no object."""
    arguments = call["arguments"] or "{}"
    value = parse_arguments(arguments)
    text = arguments if value.keys() != {"arguments"} else encode_json(value).decode()
    return {"id": call["id"], "type": "function", "function": {"name": tool_name(call["name"]), "arguments": text}}


# ── Anthropic's Messages: anthropic-sdk-python, _streaming.py and types/ ─────────────────────────────────────────────

ANTHROPIC_VERSION = "2023-06-01"
ANTHROPIC_MAX_TOKENS = 8192  # the dialect demands a number; what every current model accepts
THINKING_TOKENS = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16_384}  # budget per reasoning_effort


class BlockDelta(Struct, gc=False):
    """Any delta of any block, and of the message; types that are not known have fields of other types."""

    text: Any = None
    thinking: Any = None
    partial_json: Any = None
    signature: Any = None
    stop_reason: Any = None


class AnthropicEvent(Struct, gc=False):
    """Any event of the stream, or a whole message (type `message`, whose blocks are in `content`)."""

    type: str = ""
    index: Any = 0
    delta: BlockDelta | None = None
    content_block: dict[str, Any] | None = None
    message: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    error: Any = None
    content: list[dict[str, Any]] | None = None
    stop_reason: str | None = None


decode_anthropic_event = msgspec.json.Decoder(AnthropicEvent).decode


class AnthropicDecoder(Decoder):
    __slots__ = ("_calls", "_usage")

    def __init__(self, provider: Provider) -> None:
        super().__init__(provider)
        self._calls: dict[Any, ToolCall] = {}  # by their block's index, because servers let blocks overlap
        self._usage: dict[str, Any] = {}  # cumulative: a later number replaces an earlier one

    def decode(self, name: bytes, data: bytes, deltas: list[Delta]) -> None:
        if self.done or not data:
            return
        if data.startswith(b"[DONE]"):  # gateways that know one end for all
            self.done = True
            return
        if name == b"error":  # the event's name decides: some send an error of another shape
            raise in_band_error(self._provider, data)
        first = len(deltas)
        try:
            event = decode_anthropic_event(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if name and not name.startswith((b"message_", b"content_block_")):  # unknown events are to be ignored
                return
            event = self._decode_leniently(data, AnthropicEvent)
        if event.error or event.type == "error":
            raise in_band_error(self._provider, data)
        self._decode_event(event, deltas)
        if self._mending:
            self._mend(deltas, first)

    def _decode_event(self, event: AnthropicEvent, deltas: list[Delta]) -> None:
        if event.type == "content_block_delta" and event.delta:
            self._decode_delta(event.index, event.delta, deltas)
        elif event.type == "content_block_start" and event.content_block:
            self._start_block(event.index, event.content_block, deltas)
        elif event.type == "content_block_stop":
            self._stop_block(event.index, deltas)
        elif event.type == "message_start" and event.message:
            self._count(event.message.get("usage"))
        elif event.type == "message_delta":
            self._count(event.usage)
            self._finish(event.delta.stop_reason if event.delta else None)
        elif event.type == "message_stop":
            self.done = True

    def _decode_delta(self, index: Any, delta: BlockDelta, deltas: list[Delta]) -> None:
        if isinstance(delta.text, str) and delta.text:
            deltas.append(Delta("text", delta.text))
        elif isinstance(delta.thinking, str) and delta.thinking:
            deltas.append(Delta("reasoning", delta.thinking))
        elif isinstance(delta.partial_json, str) and index in self._calls:
            self._hold(self._calls[index], delta.partial_json)
        if isinstance(delta.signature, str) and delta.signature:
            deltas.append(self._signature({"signature": delta.signature}))

    def _start_block(self, index: Any, block: dict[str, Any], deltas: list[Delta]) -> None:
        """A block may begin with content, and in a document has all of it. A tool call is complete when it stops."""
        kind = block.get("type")
        if kind == "tool_use":
            self._calls[index] = ToolCall(str(block.get("id") or ""), str(block.get("name") or ""))
            if block.get("input"):
                self._hold(self._calls[index], json.dumps(block["input"], ensure_ascii=False))
        elif kind == "redacted_thinking":
            deltas.append(self._signature({"redacted": str(block.get("data") or "")}))
        elif kind in ("text", "thinking"):
            self._decode_delta(index, msgspec.convert(block, BlockDelta), deltas)

    def _stop_block(self, index: Any, deltas: list[Delta]) -> None:
        if (call := self._calls.pop(index, None)) is not None:
            call.fragments = call.fragments if any(call.fragments) else ["{}"]
            deltas.append(call.delta())

    def _finish(self, word: Any) -> None:
        if isinstance(word, str):
            self.finish_reason = finish_reason_of(word)

    def _signature(self, what: dict[str, str]) -> Delta:
        """What must go back with the reasoning before it, and only to the provider that signed it."""
        what = {key: without_halves(text) for key, text in what.items()}
        return Delta("signature", encode_json({"provider": self._provider.name, **what}).decode())

    def _count(self, usage: Any) -> None:
        if not isinstance(usage, dict) or not usage:
            return
        self._usage.update({name: value for name, value in usage.items() if value is not None})
        cached = count(self._usage.get("cache_read_input_tokens"))
        written = count(self._usage.get("cache_creation_input_tokens"))
        self.usage = Usage(
            input_tokens=count(self._usage.get("input_tokens")) + cached + written,
            output_tokens=count(self._usage.get("output_tokens")),
            estimated=False,
            cached_tokens=cached,
        )

    def decode_document(self, body: bytes, deltas: list[Delta]) -> None:
        event = self._decode_leniently(body, AnthropicEvent)
        if event.error or event.type == "error":
            raise in_band_error(self._provider, body)
        if event.content is None:
            raise no_answer(self._provider, body)
        for index, block in enumerate(event.content):
            self._start_block(index, block, deltas)
            self._stop_block(index, deltas)
        deltas[:] = [Delta(delta.kind, without_halves(delta.text)) for delta in deltas]
        self._mending = False
        self._count(event.usage)
        self._finish(event.stop_reason)

    def end(self, deltas: list[Delta]) -> None:
        super().end(deltas)
        for index in list(self._calls):  # some servers stop blocks only at the very end, or never
            self._stop_block(index, deltas)


class AnthropicDialect:
    models_path = "/v1/models?limit=1000"
    decoder = AnthropicDecoder

    def path(self, provider: Provider) -> str:
        return "/messages" if provider.base_url.endswith("/v1") else "/v1/messages"

    def headers(self, provider: Provider) -> dict[str, str]:
        headers = {"anthropic-version": ANTHROPIC_VERSION}
        if provider.key and provider.variable == "ANTHROPIC_AUTH_TOKEN":
            headers["authorization"] = f"Bearer {provider.key}"
        elif provider.key:
            headers["x-api-key"] = provider.key
        return headers

    def body(self, provider: Provider, quirks: frozenset[str], question: Question) -> dict[str, Any]:
        parameters = question.parameters
        turns = [anthropic_turn(turn, provider) for turn in answered(question.turns, quirks) if turn.role != "system"]
        systems = [question.system, *(text_of(turn.content) for turn in question.turns if turn.role == "system")]
        outgoing = alternate(turns) if self.prefills(quirks) else ask_to_continue(alternate(turns))
        messages: list[dict[str, Any]] = [{"role": turn.role, "content": anthropic_blocks(turn)} for turn in outgoing]
        prefilled = bool(outgoing) and outgoing[-1].role == "assistant"
        if prefilled and (last := messages[-1]["content"][-1])["type"] == "text":
            last["text"] = last["text"].rstrip()  # a prefill that ends in white space is refused
        tool_choice = anthropic_tool_choice(parameters.tool_choice) if parameters.tools else None
        tools = [anthropic_tool(tool) for tool in parameters.tools or ()]
        if not tools and (tools := tools_in(messages)):  # a request whose messages hold calls has to define tools
            tool_choice = {"type": "none"}
        # Thinking excludes a prefill and a forced tool.
        is_forced = isinstance(tool_choice, dict) and tool_choice.get("type") in ("any", "tool")
        budget = THINKING_TOKENS.get(parameters.reasoning_effort or "", 0)
        if prefilled or is_forced or not budget or not starts_with_thinking(messages):
            budget = 0
            drop_newest_thinking(messages)
        body = {
            "model": question.model,
            "messages": messages,
            "stream": True,
            "system": "\n\n".join(filter(str.strip, systems)) or None,
            "stop_sequences": parameters.stop or None,
            "tools": tools or None,
            "tool_choice": tool_choice,
            **anthropic_sampling(parameters, budget),
        }
        return {name: value for name, value in body.items() if value is not None}

    def prefills(self, quirks: frozenset[str]) -> bool:
        return "no_prefill" not in quirks


def anthropic_sampling(parameters: Parameters, budget: int) -> dict[str, Any]:
    """What depends on the tokens for thinking, which count as output; it excludes a temperature and a top_p."""
    max_tokens = (parameters.max_tokens or ANTHROPIC_MAX_TOKENS) + budget
    if budget:
        return {"max_tokens": max_tokens, "thinking": {"type": "enabled", "budget_tokens": budget}}
    temperature = parameters.temperature and min(parameters.temperature, 1.0)
    return {"max_tokens": max_tokens, "temperature": temperature, "top_p": parameters.top_p}


def anthropic_turn(turn: Turn, provider: Provider) -> Turn:
    """A turn with two kinds of this dialect's own, whose text is their block. `tool_result`: it is a part of the user's
    turn. `thinking`: the reasoning that this provider signed, just as it was; it refuses any other."""
    if turn.role == "tool":
        result = {"type": "tool_result", "tool_use_id": turn.tool_call_id, "content": text_of(turn.content)}
        return Turn("user", (Delta("tool_result", encode_json(result).decode()),))
    kept: list[Delta] = []
    reasoning = ""
    for delta in join_deltas(turn.content):
        if delta.kind == "signature":
            signed = json.loads(delta.text)
            block = {"type": "thinking", "thinking": reasoning, "signature": signed.get("signature")}
            if "redacted" in signed:
                block = {"type": "redacted_thinking", "data": signed["redacted"]}
            if signed.get("provider") == provider.name:
                kept.append(Delta("thinking", encode_json(block).decode()))
        elif delta.kind != "reasoning":
            kept.append(delta)
        reasoning = delta.text if delta.kind == "reasoning" else ""
    return replace(turn, content=tuple(kept))


def is_thinking(block: Mapping[str, Any]) -> bool:
    return block["type"] in ("thinking", "redacted_thinking")


def anthropic_blocks(turn: Turn) -> list[dict[str, Any]]:
    blocks = []
    for delta in join_deltas(turn.content):
        block = {"type": "text", "text": delta.text} if delta.kind == "text" else json.loads(delta.text)
        if delta.kind == "image":
            block = {"type": "image", "source": {"type": "base64", **block}}
        elif delta.kind == "tool_call":
            arguments = parse_arguments(block["arguments"])
            block = {"type": "tool_use", "id": block["id"], "name": tool_name(block["name"]), "input": arguments}
        if delta.kind != "text" or delta.text.strip():  # a blank text is refused
            blocks.append(block)
    if not is_thinking(blocks[0]):  # thinking stands first or not at all
        blocks = [block for block in blocks if not is_thinking(block)]
    while is_thinking(blocks[-1]):  # and never last, where an answer was stopped
        blocks.pop()
    return blocks


# To Anthropic, the answers since the last question are one turn, tool calls, their results and all; with thinking on, it
# has to start with thinking, and off, it may hold none: docs.claude.com, extended thinking, "Toggling thinking modes".


def newest_turn(messages: Sequence[dict[str, Any]]) -> int:
    """Where the messages behind the last question begin. A message with a tool's result is no question."""
    questions = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "user" and all(block["type"] != "tool_result" for block in message["content"])
    ]
    return questions[-1] + 1 if questions else 0


def starts_with_thinking(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether thinking may be on: the newest turn starts with it, also where something was said beside a result."""
    for index in range(newest_turn(messages), len(messages)):
        before, message = messages[index - 1], messages[index]
        is_start = any(block["type"] != "tool_result" for block in before["content"])
        if message["role"] == "assistant" and is_start and not is_thinking(message["content"][0]):
            return False
    return True


def drop_newest_thinking(messages: Sequence[dict[str, Any]]) -> None:
    """Takes the thinking out of the newest turn; in earlier ones it does no harm."""
    for message in messages[newest_turn(messages) :]:
        message["content"] = [block for block in message["content"] if not is_thinking(block)]


def tools_in(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools that earlier answers called, as definitions that say no more than their names."""
    blocks = (block for message in messages for block in message["content"])
    names = dict.fromkeys(block["name"] for block in blocks if block["type"] == "tool_use")
    return [{"name": name, "input_schema": {"type": "object", "properties": {}}} for name in names]


def anthropic_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = function_of(tool)
    if function is None:
        return tool
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    described = {"description": function["description"]} if function.get("description") else {}
    return {"name": function.get("name", ""), **described, "input_schema": schema}


def anthropic_tool_choice(choice: Any) -> Any:
    """OpenAI's tool_choice, a word or a function's name, as Anthropic's; what has another shape goes out as it is."""
    if isinstance(choice, str):
        return {"type": {"required": "any"}.get(choice, choice)}
    name = within(choice, "function", "name") if isinstance(choice, dict) else None
    return {"type": "tool", "name": name} if name else choice


DIALECTS: dict[str, Dialect] = {"openai": OpenAIDialect(), "anthropic": AnthropicDialect()}
assert tuple(DIALECTS) == DIALECT_NAMES


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 6. Repetition
#
# A model that goes round in circles is paid for until its token limit. The text is looked at whenever it has grown by
# a step, at offsets that depend on the text alone: however it is cut into deltas, the verdict falls at the same one.
# The newest characters, as many as the longest period has, are searched for further back: their nearest earlier copy
# is exactly one period away. The same period again a step later means that the run has grown by that step, so a few
# thousand characters are all that is kept, whatever the settings. The text is held backwards because `rfind` crawls
# through nearly periodic text, and a forward `find` in a window this much longer than what it looks for never does.
# The same delta many times in a row is a circle before it is long enough to be one otherwise, but only if it has the
# letters for a word: rulers, indents, zeros and base64 padding arrive like that. An empty delta says nothing.
# Tables, markup, code and data have equal rows: with a line break, a period or delta must go on for twice as long.
# Absent on purpose: almost-repetitions (a counter in each round) and meaning. Those end at the answer's length limit.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

REPETITION_PERIOD_CHARACTERS_MAX = 1_000  # a long paragraph; one period and this many more are the least evidence
REPETITION_STEP_CHARACTERS = 100  # from look to look: shares out a look's cost; a verdict lags less than two steps
REPETITION_PROBE_CHARACTERS = 64  # searched for first: where these are not there again, no period is
REPETITION_PROBED_CHARACTERS = (
    REPETITION_PERIOD_CHARACTERS_MAX + REPETITION_PROBE_CHARACTERS
)  # in the newest of the text
REPETITION_WINDOW_CHARACTERS = 4_000  # what is kept and searched
REPETITION_BEFORE = "".join(  # what stands before a text: control characters in no order, which take a byte each
    random.Random(0).choices([*map(chr, range(32)), *map(chr, range(128, 160))], k=REPETITION_WINDOW_CHARACTERS)
)
REPETITION_DELTAS = 100  # the same delta as often as this, in a row
REPETITION_DELTA_LETTERS_MIN = 2  # different letters in such a delta

assert REPETITION_STEP_CHARACTERS <= REPETITION_PERIOD_CHARACTERS_MAX  # or two looks might see two circles as one
assert REPETITION_WINDOW_CHARACTERS >= 4 * REPETITION_PERIOD_CHARACTERS_MAX  # from 3 times on, CPython's find is linear


class RepetitionGuard:
    """Watches one kind of content of one generation for circles; useless after its first alarm.

    A circle is a period repeated until it has passed both `count` repetitions and `characters` characters, and never
    less than the evidence of one period and 1,000 characters. A 0 in either turns the guard off, same deltas too.
    """

    def __init__(self, count: int, characters: int) -> None:
        self._count = count
        self._characters = characters
        self._is_on = bool(count and characters)
        self._delta = ""
        self._delta_count = 0
        self._pending = ""  # not looked at yet: less than a step
        self._newest_first = REPETITION_BEFORE  # the text backwards; never shorter, so that `find` stays linear
        self._period_characters = 0  # of the run that the text ends with; 0 for none
        self._run_characters = 0

    def feed(self, texts: Sequence[str]) -> str | None:
        """Takes deltas; returns the period once the text goes round in circles, else None."""
        if not self._is_on:
            return None
        delta, count = self._delta, self._delta_count
        for text in texts:
            if text == delta:
                count += 1
                if count >= REPETITION_DELTAS and is_repeated(delta, count):
                    return delta
            elif text:
                delta, count = text, 1
        self._delta, self._delta_count = delta, count
        self._pending += "".join(texts)
        return self._repeated_period() if len(self._pending) >= REPETITION_STEP_CHARACTERS else None

    def _repeated_period(self) -> str | None:
        pending, step = self._pending, REPETITION_STEP_CHARACTERS
        end = len(pending) - len(pending) % step
        self._pending = pending[end:]
        looks = (self._look(pending[start : start + step]) for start in range(0, end, step))
        return next(filter(None, looks), None)

    def _look(self, step: str) -> str | None:
        newest_first = self._newest_first = (step[::-1] + self._newest_first)[:REPETITION_WINDOW_CHARACTERS]
        period_characters = newest_first.find(
            newest_first[:REPETITION_PROBE_CHARACTERS], 1, REPETITION_PROBED_CHARACTERS
        )
        if period_characters > 0:
            period_characters = newest_first.find(newest_first[:REPETITION_PERIOD_CHARACTERS_MAX], period_characters)
        if not 0 < period_characters <= REPETITION_PERIOD_CHARACTERS_MAX:
            self._period_characters = 0
            return None
        if period_characters == self._period_characters:
            self._run_characters += REPETITION_STEP_CHARACTERS
        else:
            self._period_characters = period_characters
            self._run_characters = REPETITION_PERIOD_CHARACTERS_MAX + period_characters
        period = newest_first[:period_characters][::-1]
        enough_characters = max(self._count * period_characters, self._characters)
        if "\n" in period:
            enough_characters = 2 * (enough_characters - REPETITION_STEP_CHARACTERS)  # twice, with the lag
        return period if self._run_characters >= enough_characters else None


def is_repeated(delta: str, count: int) -> bool:
    """Whether so many of the same delta in a row are a circle by now."""
    if count != (2 * REPETITION_DELTAS if "\n" in delta else REPETITION_DELTAS):
        return False
    return sum(map(str.isalpha, set(delta))) >= REPETITION_DELTA_LETTERS_MIN


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 7. Markdown
#
# An answer becomes HTML here, not in the page: one implementation, no script from elsewhere, and safe by construction:
# no HTML passes through, links go to three schemes, nothing is loaded, no element carries a style.
#
# While an answer grows, a MarkdownStream parses only its tail. A block that begins after a blank line, and whose first
# line is complete, neither continues what stands before it nor changes it. So everything before the last such block is
# settled: sent once, then left alone (a reader may be selecting in it). Two things need care. A reference definition,
# `[label]: url`, reaches back: blocks with brackets are rendered again when there is a new one. And a code block is
# highlighted once, when it closes: on every frame would cost the square of its length.
#
# Deliberately absent: raw HTML and footnotes, which reach across blank lines. A new rule must not do so either, nor put
# content into HTML unescaped; the tests hold every prefix of every document against a full render. The libraries are
# imported at first use, so that a service that has nothing to render stays small.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

MARKDOWN_NESTING_MAX = 100  # levels of quotes and lists (a list takes two); Python's stack ends at 1,000 frames
BRACKETS_MAX = 16  # open at once in one paragraph, item or cell
OPENER_COST_MAX = 4_000_000  # characters × openers of one paragraph, item or cell: `<http://<http://…` costs that
HIGHLIGHT_CHARACTERS_MAX = 100_000  # of a code block; a longer one is not highlighted
HIGHLIGHT_SECONDS_MAX = 0.5  # of a code block; many lexers can be made to take the square of the length
LATEX_CHARACTERS_MAX = 1_000  # of a formula: the converter recurses natively, up to 2 KB of stack per character
LATEX_LINES_MAX = 50  # of a formula that stands by itself; bounds the search for its end
OPEN_BLOCK_SECONDS_MAX = 0.2  # an open block that takes longer to render is shown as plain text
assert MARKDOWN_NESTING_MAX * 4 < 1_000 and LATEX_CHARACTERS_MAX * 2 < 8_192

_RETURN = re.compile(r"\r\n?")
_SAFE_URL = re.compile(r"https?://[^/]|mailto:[^/]", re.IGNORECASE)
_BRACKET = re.compile(r"[\[\]]")
_OPENER = re.compile(r"[\[(<:]")
_SLOW_CODE = re.compile(r"[^\n]{1000}|\s{300}")  # one match of a lexer's pattern could take seconds, uninterrupted

_TO_DOLLAR = rf"(?:[^$`\\]|\\.){{1,{LATEX_CHARACTERS_MAX}}}+"
_TO_BRACKET = rf".{{1,{LATEX_CHARACTERS_MAX}}}?"
_BLOCK_MATH = re.compile(
    rf"(?:\$\$(?P<dollars>{_TO_DOLLAR})\$\$|\\\[(?P<brackets>{_TO_BRACKET})\\\])[ \t]*(?:\n|\Z)", re.DOTALL
)
_INLINE_MATH = re.compile(  # "from $5 to $10" is none: a closing $ has no space before it and no digit after it
    rf"\$\$(?P<dollars>{_TO_DOLLAR})\$\$|\$(?!\s)(?P<dollar>{_TO_DOLLAR})(?<!\s)\$(?!\d)"
    rf"|\\\((?P<parentheses>{_TO_BRACKET})\\\)",
    re.DOTALL,
)
_MATHML_ALIGNMENT = re.compile(r' style="text-align: (left|right)[^"]*"')
_MATHML_DROPPED = re.compile(r' (?:style|id)="[^"]*"')
_MATHML = re.compile(
    r"<math[ >](?:[^<]|</?m[a-z]+(?: (?:accent|accentunder|class|columnspan|depth|display|displaystyle|fence|form"
    r"|height|largeop|linethickness|lspace|mathvariant|maxsize|minsize|movablelimits|notation|rspace|scriptlevel"
    r'|separator|stretchy|symmetric|voffset|width)="[^"<>]*")*/?>)*+'
)


def _line_count(text: str) -> int:
    return text.count("\n") + (not text.endswith("\n"))


# Code


@functools.lru_cache(maxsize=64)
def _lexer(language: str) -> Any:
    """The Pygments lexer of a language, or None. It strips no newlines, for code is copied from the page."""
    from pygments.lexers import get_lexer_by_name  # type: ignore[import-untyped]
    from pygments.util import ClassNotFound  # type: ignore[import-untyped]

    try:
        return get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return None


def _highlight(code: str, language: str, clock: Callable[[], float]) -> str:
    """Code as spans with Pygments' classes; as text if its language is unknown, or it is too long or too slow."""
    is_lit = language and len(code) <= HIGHLIGHT_CHARACTERS_MAX and not _SLOW_CODE.search(code)
    lexer = _lexer(language) if is_lit else None
    if lexer is None:
        return html.escape(code)
    from pygments import format as format_tokens  # type: ignore[import-untyped]
    from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]

    deadline = clock() + HIGHLIGHT_SECONDS_MAX
    tokens = []
    for token in lexer.get_tokens(code):
        if clock() > deadline:
            return html.escape(code)
        tokens.append(token)
    return str(format_tokens(tokens, HtmlFormatter(nowrap=True)))


def _figure(code: str, language: str) -> str:
    name = html.escape(language or "text")
    return (
        f'<figure class="code" data-language="{name}"><figcaption>{name}</figcaption>'
        f'<button type="button" class="copy">Copy</button><pre><code>{code}</code></pre></figure>\n'
    )


def _render_fence(_: object, tokens: Sequence[Token], index: int, options: object, environment: dict[str, Any]) -> str:
    """A code block, highlighted unless it has not ended yet: unclosed, up to the last line of a growing answer."""
    fence = tokens[index]
    language = (fence.info.split() or [""])[0]
    first_line, end_line = fence.map or (0, 0)
    is_closed = end_line - first_line == 2 + (_line_count(fence.content) if fence.content else 0)
    if not is_closed and end_line == environment.get("growing_line"):
        return _figure(html.escape(fence.content), language)
    highlighted: dict[tuple[str, str], str] = environment["highlighted"]
    key = (language, fence.content)
    if key not in highlighted:
        highlighted[key] = _highlight(fence.content, language.lower(), environment["clock"])
    return _figure(highlighted[key], language)


def _render_indented_code(_: object, tokens: Sequence[Token], index: int, *rest: object) -> str:
    return _figure(html.escape(tokens[index].content), "")


# Formulas. `$…$`, `$$…$$` and the `\(…\)`, `\[…\]` that many models prefer, if the package math-core is installed.


@functools.cache
def _mathml_converter() -> Any:
    """math-core's converter, or None without the package. It answers an error with HTML, which is not MathML."""
    try:
        return importlib.import_module("math_core").LatexToMathML(continue_on_error=True)
    except ImportError:
        return None


def _parse_inline_math(state: StateInline, silent: bool) -> bool:
    match = _INLINE_MATH.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not silent:
        _push_math(state, "math_inline", match)
    state.pos = match.end()
    return True


def _parse_block_math(state: StateBlock, first_line: int, end_line: int, silent: bool) -> bool:
    start = state.bMarks[first_line] + state.tShift[first_line]
    if state.is_code_block(first_line) or not state.src.startswith(("$$", "\\["), start):
        return False
    line, end_line = first_line, min(end_line, first_line + LATEX_LINES_MAX)
    while line < end_line and not state.isEmpty(line) and state.sCount[line] >= state.blkIndent:
        line += 1
    match = _BLOCK_MATH.match(state.getLines(first_line, line, state.blkIndent, False).lstrip(" "))
    if match is None:
        return False
    if not silent:
        state.line = first_line + _line_count(match.group())
        _push_math(state, "math_block", match).map = [first_line, state.line]
    return True


def _push_math(state: StateBlock | StateInline, kind: str, match: re.Match[str]) -> Token:
    token = state.push(kind, "math", 0)
    formula = match.group(str(match.lastgroup))
    token.content = formula.encode("utf-8", "replace").decode()  # half a pair would stop its parser
    token.markup = match.group().strip()
    return token


def _render_math(_: object, tokens: Sequence[Token], index: int, *rest: object) -> str:
    """A formula as MathML; as its source if it has an error, or if the result holds anything that is not MathML."""
    token = tokens[index]
    is_display = token.markup.startswith(("$$", "\\["))
    mathml = _mathml_converter().convert_with_local_state(token.content, displaystyle=is_display)
    mathml = _MATHML_DROPPED.sub("", _MATHML_ALIGNMENT.sub(r' class="align-\1"', mathml))
    if not _MATHML.fullmatch(mathml):
        mathml = f'<code class="math">{html.escape(token.markup)}</code>'
    return mathml if token.type == "math_inline" else f'<p class="math">{mathml}</p>\n'


# Tables, links and images


def _parse_table(state: StateBlock, first_line: int, end_line: int, silent: bool) -> bool:
    """A table, unless it has more cells than characters: missing cells are filled in, hundreds for two bytes."""
    from markdown_it.rules_block import table

    if first_line < state.env["no_table_before_line"] or not table(state, first_line, end_line, True):
        return False
    columns = state.src.count("|", state.bMarks[first_line], state.eMarks[first_line]) + 1
    last_line = first_line
    while last_line + 1 < end_line and not state.isEmpty(last_line + 1):
        last_line += 1
    if columns * (last_line - first_line + 1) > state.eMarks[last_line] - state.bMarks[first_line]:
        state.env["no_table_before_line"] = last_line + 1  # or each of its lines would be looked at again
        return False
    return silent or table(state, first_line, end_line, False)


def _render_table_edge(renderer: Any, tokens: Sequence[Token], index: int, options: Any, environment: Any) -> str:
    tag: str = renderer.renderToken(tokens, index, options, environment)
    return f'<div class="table">{tag}' if tokens[index].nesting == 1 else f"{tag}</div>\n"


def _images_as_links(tokens: Iterable[Token]) -> Iterator[Token]:
    from markdown_it.token import Token

    for token in tokens:
        if token.type != "image":
            yield token
            continue
        url = str(token.attrs["src"])
        yield Token("link_open", "a", 1, attrs={"class": "image", "href": url})
        yield from _images_as_links(token.children or [Token("text", "", 0, content=url)])
        yield Token("link_close", "a", -1)


def _finish_inline(tokens: list[Token]) -> Iterator[Token]:
    """Inline tokens whose links open elsewhere, none inside another, and no images: to load one tells who reads."""
    is_shown: list[bool] = []  # of each link that is open
    for token in _images_as_links(tokens):
        if token.type == "link_open":
            is_shown.append(bool(token.attrs["href"]) and not any(is_shown))
            token.attrs |= {"rel": "noopener noreferrer nofollow", "target": "_blank"}
        if token.type not in ("link_open", "link_close") or is_shown[-1]:
            yield token
        if token.type == "link_close":
            is_shown.pop()


def _finish_tokens(state: StateCore) -> None:
    for token in state.tokens:
        if token.children:
            token.children = list(_finish_inline(token.children))
        elif style := token.attrs.pop("style", ""):  # only cells have one: "text-align:right"
            token.attrs["class"] = str(style).replace("text-align:", "align-")


# The parser


def _is_too_costly(text: str) -> bool:
    """Whether inline parsing could take the square of the length: what opens something is sought an end for."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket == "[" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest > BRACKETS_MAX or len(_OPENER.findall(text)) * len(text) > OPENER_COST_MAX


def _parse_inlines(state: StateCore) -> None:
    """Parse the text of each block, unless that is too costly."""
    from markdown_it.token import Token

    for token in state.tokens:
        if token.type != "inline":
            continue
        token.children = []
        if _is_too_costly(token.content):
            token.children.append(Token("text", "", 0, content=token.content))
        else:
            state.md.inline.parse(token.content, state.md, state.env, token.children)


@functools.cache
def _parser() -> MarkdownIt:
    """CommonMark with tables, strikethrough, task lists, links from full URLs, and formulas if they can be shown."""
    from markdown_it import MarkdownIt

    class Parser(MarkdownIt):
        def validateLink(self, url: str) -> bool:
            return _SAFE_URL.match(url) is not None

    options = {"html": False, "linkify": True, "tasklists": True, "maxNesting": MARKDOWN_NESTING_MAX, "xhtmlOut": False}
    parser = Parser("commonmark", options).enable(["linkify", "strikethrough", "table"])
    assert parser.linkify is not None
    parser.linkify.set({"fuzzy_link": False, "fuzzy_email": False})  # `main.py` is no link
    parser.core.ruler.at("inline", _parse_inlines)
    parser.core.ruler.push("finish_tokens", _finish_tokens)
    parser.block.ruler.at("table", _parse_table, {"alt": ["paragraph", "reference"]})
    if _mathml_converter() is not None:
        parser.inline.ruler.before("escape", "math_inline", _parse_inline_math)
        interrupted = ["paragraph", "reference", "blockquote", "list"]
        parser.block.ruler.before("fence", "math_block", _parse_block_math, {"alt": interrupted})
    rules: dict[str, Callable[..., str]] = {
        "fence": _render_fence,
        "code_block": _render_indented_code,
        "table_open": _render_table_edge,
        "table_close": _render_table_edge,
        "math_inline": _render_math,
        "math_block": _render_math,
    }
    for name, rule in rules.items():
        parser.add_render_rule(name, rule)
    return parser


# Rendering


def _environment(definitions: dict[str, Any], clock: Callable[[], float]) -> dict[str, Any]:
    """What the rules above share during one parse."""
    return {"references": dict(definitions), "highlighted": {}, "no_table_before_line": 0, "clock": clock}


def _html(tokens: Sequence[Token], environment: dict[str, Any]) -> str:
    parser = _parser()
    return str(parser.renderer.render(tokens, parser.options, environment))


def render(text: str, clock: Callable[[], float] = time.perf_counter) -> str:
    """The HTML of a finished answer. Every text has one; what is too costly to parse is shown as text."""
    environment = _environment({}, clock)
    return _html(_parser().parse(text, environment), environment)


@dataclass(frozen=True, slots=True)
class HtmlFrame:
    """What an `html` event says: what changed since the one before.

    `settled` pairs block numbers with HTML: a number that is new is appended, in order, and one that is known is
    replaced. `open` is the HTML after the settled blocks, in place of the last. `seconds` is what the frame took.
    """

    settled: tuple[tuple[int, str], ...]
    open: str
    seconds: float


class _Block(NamedTuple):
    """A settled block: its source, which can be parsed alone, and whether a reference definition may change it."""

    source: str
    html: str
    has_brackets: bool


def _cuts(text: str, tokens: Sequence[Token]) -> list[tuple[int, int]]:
    """Where text may be cut without changing what it means: (index of a token, offset in the text), first (0, 0)."""
    offsets = [0, *(match.end() for match in re.finditer("\n", text))]
    cuts = [(0, 0)]
    for index, token in enumerate(tokens):
        if index and token.level == 0 and token.map:
            line = token.map[0]
            is_complete = line + 1 < len(offsets)
            if is_complete and not text[offsets[line - 1] : offsets[line]].strip(" \t\n"):
                cuts.append((index, offsets[line]))
    return cuts


class MarkdownStream:
    """render(), incrementally: at each frame the settled blocks and the open one, joined, are equal to it, but for a code
    block at the end that has not closed yet: it is not highlighted.

    A frame costs what its open block costs. A caller that pauses for ten times its `seconds` bounds the share of a
    core; an open block that is too slow all the same is plain text, tried again each time it has doubled. Blocks and
    their numbers depend on the text alone, not on when frames were taken.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._blocks: list[_Block] = []
        self._tail = ""
        self._open = ""
        self._follows_return = False
        self._plain_below = 0  # characters of a tail that is not parsed
        self._definitions: dict[str, Any] = {}  # made by settled blocks
        self._targets: dict[str, tuple[str, str]] = {}  # URL and title of each label in the last frame
        self._highlighted: dict[tuple[str, str], str] = {}  # of the open block

    def feed(self, text: str) -> None:
        """Append characters, cut anywhere, even within "\\r\\n"."""
        if text:
            rest = text.removeprefix("\n") if self._follows_return else text
            self._follows_return = text.endswith("\r")
            self._tail += _RETURN.sub("\n", rest)

    def frame(self) -> HtmlFrame:
        """What changed, and the open block as it stands."""
        started = self._clock()
        settled: list[tuple[int, str]] = []
        is_slow = len(self._tail) < self._plain_below
        if not is_slow:
            environment = self._environment() | {"growing_line": _line_count(self._tail)}
            tokens = _parser().parse(self._tail, environment)
            cuts = _cuts(self._tail, tokens)
            settled = self._settle(tokens, cuts, environment)
            self._open = _html(tokens[cuts[-1][0] :], environment)
            is_slow = not settled and self._clock() - started > OPEN_BLOCK_SECONDS_MAX
            self._plain_below = 2 * len(self._tail) if is_slow else 0
        if is_slow:
            self._open = f'<pre class="plain">{html.escape(self._tail)}</pre>\n' if self._tail else ""
        return HtmlFrame(tuple(settled), self._open, self._clock() - started)

    def finish(self) -> HtmlFrame:
        """What changed, with nothing left open: the blocks, joined, are then equal to render(). No frame follows."""
        started = self._clock()
        environment = self._environment()
        tokens = _parser().parse(self._tail, environment)
        cuts = [*_cuts(self._tail, tokens), (len(tokens), len(self._tail))]
        settled = self._settle(tokens, cuts, environment)
        self._open = ""
        return HtmlFrame(tuple(settled), self._open, self._clock() - started)

    def snapshot(self) -> HtmlFrame:
        """Everything up to the last frame, for a reader who comes later."""
        return HtmlFrame(tuple(enumerate(block.html for block in self._blocks)), self._open, 0.0)

    def _environment(self) -> dict[str, Any]:
        return _environment(self._definitions, self._clock) | {"highlighted": self._highlighted}

    def _settle(
        self, tokens: list[Token], cuts: list[tuple[int, int]], environment: dict[str, Any]
    ) -> list[tuple[int, str]]:
        """Settle what lies between the cuts and keep the rest as the tail; returns the new and the changed blocks."""
        references: dict[str, Any] = environment["references"]
        changed = self._render_again(references)
        for (first, start), (last, end) in itertools.pairwise(cuts):
            block_tokens = tokens[first:last]
            rendered = _html(block_tokens, environment)
            has_brackets = any(token.type == "inline" and "[" in token.content for token in block_tokens)
            changed.append((len(self._blocks), rendered))
            self._blocks.append(_Block(self._tail[start:end], rendered, has_brackets))
        cut = cuts[-1][1]
        if cut:
            cut_line = self._tail.count("\n", 0, cut)
            self._definitions |= {label: made for label, made in references.items() if made["map"][0] < cut_line}
            self._tail = self._tail[cut:]
            self._highlighted.clear()
        return changed

    def _render_again(self, references: dict[str, Any]) -> list[tuple[int, str]]:
        """The settled blocks that look different because a reference definition is new or has changed."""
        targets = {label: (made["href"], made["title"]) for label, made in references.items()}
        changed: list[tuple[int, str]] = []
        if targets == self._targets:
            return changed
        self._targets = targets
        for number, old in enumerate(self._blocks):
            if old.has_brackets:
                environment = _environment(references, self._clock)
                rendered = _html(_parser().parse(old.source, environment), environment)
                self._blocks[number] = old._replace(html=rendered)
                changed += [(number, rendered)] if rendered != old.html else []
        return changed


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 8. HTTP client
#
# How a question gets to a provider and its reply back: on a connection of our own, HTTP/1.1 over the parser that uvicorn
# has on the other side, for between here and the flush is where a stream spends its time. No task wakes for what a read
# brings: it goes to the Body that was attached, which may have the reply pause. Only what has to take a proxy goes
# through httpx. Absent on purpose: redirects, which would carry the key elsewhere, cookies, and HTTP/2, which would put
# all streams of a provider behind one lost packet.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def reason_of(exc: BaseException) -> str:
    """An exception's own words, or its name when it has none."""
    return shorten(str(exc), None) or type(exc).__name__


# ── bodies: who takes what comes ──────────────────────────────────────────────────────────────────────────────────────


class Body(Protocol):
    """Who takes the body of a reply: piece by piece as it comes, then its end, or why there is none."""

    def feed(self, data: bytes) -> None: ...
    def finish(self) -> None: ...
    def break_off(self, exc: BaseException) -> None: ...


class WholeBody(Body):
    """A body that is wanted in one piece; `error` says why it is not whole."""

    def __init__(self, bytes_max: int) -> None:
        self.data = bytearray()
        self.error: BaseException | None = None
        self._bytes_max = bytes_max
        self._over = asyncio.Event()

    def feed(self, data: bytes) -> None:
        self.data += data
        if len(self.data) > self._bytes_max:
            self.break_off(ValueError(f"it is larger than {self._bytes_max:,} bytes, the limit"))

    def finish(self) -> None:
        self._over.set()

    def break_off(self, exc: BaseException) -> None:
        self.error = self.error or exc
        self._over.set()

    async def wait(self) -> None:
        await self._over.wait()


# Others (`none`, a charset) mean nothing. The last three are none that InflatedBody knows: they break an answer off.
COMPRESSIONS = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")


class InflatedBody(Body):
    """Takes a body that comes compressed, although that was not asked for, and hands it on as it was before."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._inflater = zlib.decompressobj(32 + zlib.MAX_WBITS)  # gzip or zlib, by its first bytes

    def feed(self, data: bytes) -> None:
        try:
            inflated = self._inflate(data)
        except (zlib.error, ValueError) as exc:
            self.break_off(exc)
        else:
            self._body.feed(inflated)

    def _inflate(self, data: bytes) -> bytes:
        inflated, rest = b"", data
        while rest:
            if self._inflater.eof:  # one member after another (RFC 1952, 2.2)
                self._inflater = zlib.decompressobj(32 + zlib.MAX_WBITS)
            inflated += self._inflater.decompress(rest, PROVIDER_EVENT_BYTES_MAX + 1 - len(inflated))
            if len(inflated) > PROVIDER_EVENT_BYTES_MAX:
                raise ValueError(f"{len(data):,} bytes inflate to more than {PROVIDER_EVENT_BYTES_MAX:,}, the limit")
            rest = self._inflater.unused_data
        return inflated

    def finish(self) -> None:
        self._body.finish()

    def break_off(self, exc: BaseException) -> None:
        self._body.break_off(exc)


# ── replies: where it comes from ──────────────────────────────────────────────────────────────────────────────────────


class Reply(ABC):
    """What came back: a status, headers by their names in lower case, and a body that goes to whom `attach` says."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}

    def attach(self, body: Body) -> None:
        """What of the body is there goes to it at once, the rest as it comes."""
        is_compressed = self.headers.get("content-encoding", "").lower() in COMPRESSIONS
        self._attach(InflatedBody(body) if is_compressed else body)

    @abstractmethod
    def _attach(self, body: Body) -> None: ...

    @abstractmethod
    def pause(self) -> None:
        """Has the provider wait."""

    @abstractmethod
    def resume(self) -> None: ...

    @abstractmethod
    async def close(self) -> None:
        """Nothing more of it is wanted; unless it was whole, its connection closes at once."""


class IteratedReply(Reply):
    """A reply whose body is an iterator's; a task reads it."""

    def __init__(self, status: int, headers: Mapping[str, str], pieces: AsyncIterator[bytes]) -> None:
        super().__init__(status, headers)
        self._pieces = pieces
        self._room = asyncio.Event()
        self._room.set()
        self._task: asyncio.Task[None] | None = None

    def _attach(self, body: Body) -> None:
        self._task = asyncio.create_task(self._read(body), name="reply")

    def pause(self) -> None:
        self._room.clear()

    def resume(self) -> None:
        self._room.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, body: Body) -> None:
        try:
            async for data in self._pieces:
                body.feed(data)
                await self._room.wait()
        except Exception as exc:
            body.break_off(exc)
        else:
            body.finish()


class ProxiedReply(IteratedReply):
    """A reply that httpx got, through a proxy."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(response.status_code, response.headers, response.aiter_raw())
        self._response = response

    async def close(self) -> None:
        await super().close()
        await self._response.aclose()


class Exchange(Reply):
    """A reply on a connection of our own. What the parser finds, it tells to `on_…`
    (https://github.com/MagicStack/httptools); HTTP/1.1 is RFC 9112."""

    def __init__(self, connection: ProviderConnection) -> None:
        super().__init__(0, {})
        self._pieces: list[bytes] = []  # of the body, which nobody has taken yet
        self.on_body = self._pieces.append  # the parser's for every chunk, so no function of ours
        self._connection: ProviderConnection | None = connection  # None: nothing more will come
        self._body: Body | None = None
        self._error: BaseException | None = None
        self._head: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._head_bytes = 0
        self._is_interim = self._is_complete = self._is_reusable = False
        self._parser = HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )

    async def head(self) -> None:
        """Returns when status and headers are there. Raises OSError, HttpParserError."""
        await self._head
        if not self.status and self._error is not None:
            raise self._error

    # ── what the parser tells ──

    def on_message_begin(self) -> None:
        if self._is_complete:
            raise HttpParserError("a second reply to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # or it is a trailer, which is no header (RFC 9112, 7.1.2)
            self.headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._is_interim = status < 200
        if self._is_interim:
            self.headers.clear()
        else:
            self.status = status

    def on_message_complete(self) -> None:
        self._is_complete = not self._is_interim
        self._is_reusable = self._parser.should_keep_alive()  # it knows only now

    # ── what the connection tells ──

    def take(self, data: bytes) -> None:
        """What a read brought."""
        try:
            self._parser.feed_data(data)
        except HttpParserError as exc:
            self._error = exc
        except HttpParserUpgrade:
            self._error = HttpParserError("it wants to speak another protocol")
        if not self._head.done():
            self._head_bytes += len(data)
            if self.status:
                self._head.set_result(None)
            elif self._head_bytes > HEAD_BYTES_MAX:
                self._error = HttpParserError(f"its headers are larger than {HEAD_BYTES_MAX:,} bytes, the limit")
        if self._is_complete or self._error is not None:
            self._end()
        self._hand_on()

    def lose(self, exc: BaseException | None) -> None:
        """The connection is gone. Where nothing says how long a body is, that is its end."""
        is_bounded = "content-length" in self.headers or "chunked" in self.headers.get("transfer-encoding", "").lower()
        self._is_complete = exc is None and self.status != 0 and not is_bounded
        self._error = exc or ConnectionResetError("it was closed")
        self._end()
        self._hand_on()

    def _end(self) -> None:
        """Nothing more will come: the connection is free again, if it can be."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(self._is_complete and self._is_reusable and self._error is None)
        if self._is_complete:
            self._error = None
        del self._parser  # which holds this
        if not self._head.done():
            self._head.set_result(None)

    def _hand_on(self) -> None:
        body = self._body
        if body is None:
            return
        if self._pieces:
            data = b"".join(self._pieces)
            self._pieces.clear()
            body.feed(data)
        if self._connection is None:
            self._body = None
            body.finish() if self._error is None else body.break_off(self._error)

    # ── what is done with a reply ──

    def _attach(self, body: Body) -> None:
        self._body = body
        self._hand_on()

    def pause(self) -> None:
        if self._connection is not None and not self._connection.transport.is_closing():
            self._connection.transport.pause_reading()

    def resume(self) -> None:
        if self._connection is not None and not self._connection.transport.is_closing():
            self._connection.transport.resume_reading()

    async def close(self) -> None:
        self._body = None
        if self._connection is not None:
            self._end()


# ── connections ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Address(NamedTuple):
    """Where a connection leads."""

    is_secure: bool
    host: str
    port: int


class ProviderConnection(asyncio.Protocol):
    """A connection to a provider: one exchange at a time, and kept for the next one if the last went well."""

    transport: asyncio.Transport

    def __init__(self, client: HttpClient, address: Address) -> None:
        self.address = address
        self.kept_since = 0.0  # monotonic seconds
        self._client = client
        self._exchange: Exchange | None = None

    async def exchange(self, request: bytes) -> Reply:
        """The reply to a request, once its head is there. Raises OSError, HttpParserError."""
        exchange = self._exchange = Exchange(self)
        self.transport.write(request)
        try:
            await exchange.head()
        except BaseException:
            await exchange.close()
            raise
        return exchange

    def release(self, is_reusable: bool) -> None:
        self._exchange = None
        is_sent = not self.transport.get_write_buffer_size()  # a provider may answer before it has read the question
        if is_reusable and is_sent and not self.transport.is_closing() and not self._client.is_closed:
            self._client.keep(self)
        else:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.take(data)
        else:
            self.transport.abort()  # nobody asked for anything

    def eof_received(self) -> None:
        self.transport.abort()  # a polite close would wait until the question is sent, which may be never

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.forget(self)
        if self._exchange is not None:
            self._exchange.lose(exc)


class Unreachable(Exception):
    """No connection could be opened."""


class HttpClient:
    """HTTP/1.1 to the providers, without cookies and redirects; through a proxy where the environment names one."""

    def __init__(self) -> None:
        self._kept: dict[Address, dict[ProviderConnection, None]] = {}  # the newest last
        self._timer: asyncio.TimerHandle | None = None
        self._proxied: dict[str, httpx.AsyncHTTPTransport] = {}  # by the proxy's URL
        self._tls: ssl.SSLContext | None = None
        self.is_closed = False

    async def close(self) -> None:
        self.is_closed = True
        for kept in list(self._kept.values()):
            for connection in list(kept):
                connection.transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        for transport in self._proxied.values():
            await transport.aclose()

    async def send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Reply:
        """One request. Raises Unreachable, OSError, HttpParserError."""
        proxy = proxy_of(url)
        if proxy is not None:
            return await self._send_through(proxy, method, url, headers, body)
        address, request = encode_request(method, url, headers, body)
        connection = self._kept_connection(address) or await self._connect(address)
        return await connection.exchange(request)

    async def _connect(self, address: Address) -> ProviderConnection:
        """A new connection; where a name has several addresses, to the first that answers (RFC 8305). Raises Unreachable."""
        loop = asyncio.get_running_loop()
        make = partial(ProviderConnection, self, address)
        name = address.host if address.is_secure else None
        try:
            async with asyncio.timeout(PROVIDER_CONNECT_SECONDS):
                tls = await self._secure() if address.is_secure else None
                if parse_ip(address.host) is not None:  # saves a thread the look-up
                    _, connection = await loop.create_connection(make, address.host, address.port, ssl=tls)
                else:
                    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
                    opened = await start_connection(found, happy_eyeballs_delay=EYEBALLS_SECONDS)
                    _, connection = await loop.create_connection(make, sock=opened, ssl=tls, server_hostname=name)
        except TimeoutError as exc:
            raise Unreachable(f"no connection within {PROVIDER_CONNECT_SECONDS} s") from exc
        except ConnectionError as exc:
            raise Unreachable(os.strerror(exc.errno) if exc.errno else reason_of(exc)) from exc
        except (OSError, ValueError, OverflowError) as exc:  # the last for a port that is none
            raise Unreachable(reason_of(exc)) from exc
        return connection

    async def _secure(self) -> ssl.SSLContext:
        """What certificates are checked against: certifi's, or what SSL_CERT_FILE and SSL_CERT_DIR name."""
        if self._tls is None:
            import httpx

            self._tls = await asyncio.to_thread(httpx.create_ssl_context)
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls

    async def _send_through(
        self, proxy: str, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> Reply:
        import httpx

        extensions = {"timeout": {"connect": PROVIDER_CONNECT_SECONDS}}
        no_way = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.InvalidURL, ValueError, ImportError)
        try:
            if proxy not in self._proxied:
                limits = httpx.Limits(max_connections=None)
                self._proxied[proxy] = httpx.AsyncHTTPTransport(proxy=httpx.Proxy(proxy), limits=limits)
            request = httpx.Request(method, url, headers=dict(headers), content=body, extensions=extensions)
            return ProxiedReply(await self._proxied[proxy].handle_async_request(request))
        except no_way as exc:
            raise Unreachable(f"through the proxy that the environment names: {reason_of(exc)}") from exc
        except httpx.HTTPError as exc:
            raise ConnectionError(reason_of(exc)) from exc

    # ── kept connections ──

    def _kept_connection(self, address: Address) -> ProviderConnection | None:
        """The one that was used last, and is still open."""
        kept = self._kept.get(address)
        while kept:
            connection, _ = kept.popitem()
            if not connection.transport.is_closing():
                return connection
        return None

    def keep(self, connection: ProviderConnection) -> None:
        connection.kept_since = time.monotonic()
        self._kept.setdefault(connection.address, {})[connection] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._expire)

    def forget(self, connection: ProviderConnection) -> None:
        self._kept.get(connection.address, {}).pop(connection, None)

    def _expire(self) -> None:
        """Closes what was kept for too long; a timer that sets itself anew while there is anything."""
        oldest = time.monotonic() - KEPT_SECONDS
        for kept in self._kept.values():
            for connection in [one for one in kept if one.kept_since <= oldest]:
                connection.transport.abort()
                del kept[connection]
        self._kept = {address: kept for address, kept in self._kept.items() if kept}
        self._timer = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._expire) if self._kept else None


def encode_request(method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> tuple[Address, bytes]:
    """Where a request goes, and its bytes. Raises Unreachable for a URL that leads nowhere."""
    address, host, target = parse_url(url)
    length = {} if body is None else {"content-length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"host": host, **headers, **length}.items())
    return address, f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + (body or b"")


@functools.lru_cache(maxsize=256)
def parse_url(url: str) -> tuple[Address, str, str]:
    """The address in a URL, and what a request says of host and target. Raises Unreachable."""
    import httpx

    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise Unreachable(reason_of(exc)) from exc
    is_secure = parts.scheme == "https"
    address = Address(is_secure, parts.raw_host.decode(), parts.port or (443 if is_secure else 80))
    return address, parts.netloc.decode(), parts.raw_path.decode()


def parse_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


@functools.lru_cache(maxsize=256)
def proxy_of(url: str) -> str | None:
    """The proxy that the environment (or the system) names for a URL; None: there is none. Raises Unreachable."""
    from urllib.request import getproxies, proxy_bypass

    (is_secure, name, _), host, _ = parse_url(url)
    proxies = getproxies()
    proxy = proxies.get("https" if is_secure else "http") or proxies.get("all")
    if not proxy or proxy_bypass(host) or proxy_bypass(name):  # an IPv6 address in brackets, with its port, or without
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 9. Providers
#
# What a reply brings is kept as it comes (Answer.feed), and decoded in one go by whoever wants deltas (Answer.take). The
# demo provider's reply is one too, so that a first start without a key takes nearly the same way. Every way in which a
# question can fail becomes a ProviderError here; what follows from it (retry, fallback, the end of the generation) is
# decided in section 12.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

DEMO_TEXT = """\
Hello! This answer comes from llmchat's built-in **demo** provider: no key, no network, the same text every time. \
You wrote:

> {question}

Everything else about it is real. Each piece of this text was committed to the database before you saw it, so you can \
close the connection in the middle and come back:

```bash
curl -N http://127.0.0.1:8000/api/v1/messages/2/stream -H 'Last-Event-ID: 120'
```

| what happens | what you get |
|---|---|
| you disconnect | the answer goes on, and waits for you |
| you stop it | the part that is there is kept |
| the server is killed | everything you saw is still there |

To talk to a real model, set a key such as `OPENAI_API_KEY` or an address such as \
`OLLAMA_BASE_URL=http://127.0.0.1:11434/v1`, and start again. 你好, ¡hola!, 🙂.
"""
DEMO_MARKDOWN = """\
# A heading

A paragraph with *emphasis*, **strong words**, `code`, ~~a mistake~~ and [a link](https://example.org/).

1. first
2. second
   - nested
   - [x] done
   - [ ] to do

```python
def fibonacci(count: int) -> list[int]:
    numbers = [0, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers[:count]
```

| language | since | typed |
|:---|---:|:---:|
| Python | 1991 | gradually |
| C | 1972 | yes |

> A quotation, and after it a rule.

---

The end.
"""
DEMO_REASONING = (
    "The user wants to see how reasoning looks. I think about it for a moment, then I answer in one sentence.\n"
)


class Demo(NamedTuple):
    """A demo model: its answer, the pause after each piece of it, the pattern of a piece, and what it thinks first."""

    text: str
    pause_seconds: float = 0.015
    piece: str = r"(?s).{1,4}"
    reasoning: str = ""


DEMOS = {
    "tour": Demo(DEMO_TEXT),
    "slow": Demo("One word a second: this is what a large model on a small machine feels like.\n", 1.0, r"\S+\s*"),
    "long": Demo(
        "".join(f"Paragraph {number} of a long answer, to scroll and to stop.\n\n" for number in range(1, 1001)), 0.005
    ),
    "markdown": Demo(DEMO_MARKDOWN),
    "reasoning": Demo("That is how it looks: the reasoning first, then the answer.\n", reasoning=DEMO_REASONING),
    "loop": Demo("This model goes round in circles. " * 2000, 0.001),
    "fails": Demo("This answer breaks off in the mid"),
}
assert tuple(DEMOS) == DEMO_MODELS


async def demo_stream(model: str, question: str) -> AsyncIterator[bytes]:
    """A demo model's answer as a provider would send it. `fails` breaks off without a finish_reason."""
    demo = DEMOS[model]
    deltas = [{"reasoning_content": word} for word in re.findall(r"\S+\s*", demo.reasoning)]
    text = demo.text.replace("{question}", shorten(question, None))
    deltas += [{"content": piece} for piece in re.findall(demo.piece, text)]
    for delta in deltas:
        yield b"data: %s\n\n" % encode_json({"choices": [{"index": 0, "delta": delta}]})
        await asyncio.sleep(demo.pause_seconds)
    if model != "fails":
        yield b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        yield b"data: [DONE]\n\n"


def answer_demo(question: bytes) -> Reply:
    """The demo provider's reply to a question, without a network."""
    asked = decode_json(question)
    content = asked["messages"][-1]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return IteratedReply(200, {}, demo_stream(asked["model"], text))


class Target(NamedTuple):
    """Whom a question goes to."""

    provider: Provider
    model: str

    def __str__(self) -> str:
        return f"{self.provider.name}/{self.model}"


@dataclass(frozen=True)
class ModelList:
    """A provider's models as they were last asked; `error` says why there are none."""

    models: tuple[str, ...]
    error: str | None
    asked_at: float  # monotonic seconds


class Answer(Body):
    """An open answer. What arrives is kept as it came until `take` decodes all of it in one go.

    `heard_at` is when its provider last sent anything, keep-alives included, `grown_at` when a tool call last grew,
    which is no delta before it is whole (monotonic seconds). `is_full`: so much has arrived that the provider has to
    wait until it is taken. `failure` is set once the answer cannot go on.
    """

    def __init__(self, provider: Provider, reply: Reply) -> None:
        self.provider = provider
        self.decoder = DIALECTS[provider.dialect].decoder(provider)
        self.heard_at, self.grown_at = time.monotonic(), 0.0
        self.is_paused = False
        self.failure: GenerationError | None = None
        self._reply = reply
        self._on_arrival: Callable[[], object] = lambda: None
        self._arrived: list[bytes] = []
        self._arrived_bytes = 0
        self._sse = SseDecoder()
        self._document: bytearray | None = None  # of an answer that is no stream
        self._is_sniffed = False
        self._broken: ProviderTruncated | None = None  # the connection, before its end
        self._is_at_end = self._is_decoded = False
        self._over = asyncio.Event()  # nothing that comes now would count
        self._patience: asyncio.TimerHandle | None = None

    async def receive(self, on_arrival: Callable[[], object]) -> None:
        """Takes in the answer, to its end, whatever that is; `on_arrival` is called when there is something to `take`.

        No task wakes for what arrives, and nothing is decoded before somebody takes it: this is where a stream spends
        its time.
        """
        self._on_arrival = on_arrival
        self._reply.attach(self)
        try:
            await self._over.wait()
        finally:
            self._over.set()
            if self._patience is not None:
                self._patience.cancel()
            await self._reply.close()

    # ── what the reply tells ──

    def feed(self, data: bytes) -> None:
        """Keeps bytes as they come."""
        if self._over.is_set():
            return
        self.heard_at = time.monotonic()
        is_first = not self._arrived
        self._arrived.append(data)
        self._arrived_bytes += len(data)
        if self.is_full:
            self.pause()
        if is_first or self.is_full:
            self._on_arrival()

    def finish(self) -> None:
        """The body has ended, or has been given its time to."""
        self._is_at_end = True
        self._over.set()

    def break_off(self, exc: BaseException) -> None:
        """The connection broke. Unless the answer was whole by then, that is its failure."""
        if not self._over.is_set():
            words = f"the connection to {self.provider.name} broke before the answer was finished"
            self._broken = ProviderTruncated(words, transient=True)
            self._broken.__cause__ = exc
            self.finish()

    # ── what the generation calls ──

    @property
    def is_full(self) -> bool:
        return self._arrived_bytes > ARRIVED_BYTES_MAX

    def pause(self) -> None:
        """Reads no more of it for now."""
        if not self.is_paused:
            self.is_paused = True
            self._reply.pause()

    def resume(self) -> None:
        if self.is_paused:
            self.is_paused = False
            self._reply.resume()

    def fail(self, failure: GenerationError) -> None:
        """Ends it: nothing more of this answer is wanted."""
        self.failure = self.failure or failure
        self._over.set()

    def take(self) -> list[Delta]:
        """The deltas of everything that has arrived since the last time."""
        data, was_full = b"".join(self._arrived), self.is_full
        self._arrived.clear()
        self._arrived_bytes = 0
        deltas: list[Delta] = []
        failure = None
        if data and self.failure is None and not self.decoder.done:
            failure = self._decode(data, deltas)
            if self._is_whole():
                self._set_patience(bool(deltas))
        if self._is_at_end and failure is None and self.failure is None and not self._is_decoded:
            self._is_decoded = True
            failure = (None if self._is_whole() else self._broken) or self._decode_end(deltas)
        if failure is not None:
            self.fail(failure)
        if was_full:
            self.resume()  # last, since more may arrive in it, and the end
        return deltas

    def _is_whole(self) -> bool:
        return self.decoder.done or self.decoder.finish_reason is not None

    def _set_patience(self, has_grown: bool) -> None:
        """An answer that is whole does not wait for its connection to end.

        A moment is given to that, though: the usage may come after the finish_reason, and a connection that was read to
        its end can be used again.
        """
        if self._over.is_set():
            return
        if self._patience is None or self.decoder.done or has_grown:
            if self._patience is not None:
                self._patience.cancel()
            seconds = LINGER_SECONDS if self.decoder.done else FINISH_SECONDS
            self._patience = asyncio.get_running_loop().call_later(seconds, self.finish)

    def _decode(self, data: bytes, deltas: list[Delta]) -> GenerationError | None:
        """Fills `deltas`; an error is returned, not raised, so that what came before it is not lost."""
        if not self._is_sniffed:
            # By its first bytes, not by a label, an answer is a stream or one document: a stream is asked for, and what
            # comes instead is mislabelled too. DeepSeek sends blank lines while one waits.
            data = data.lstrip(b" \t\r\n\xef\xbb\xbf")
            self._is_sniffed = bool(data)
            if data.startswith((b"{", b"[", b"<")):
                self._document = bytearray()
        if self._document is not None:
            self._document += data
            too_large = len(self._document) > PROVIDER_EVENT_BYTES_MAX
            words = f"{self.provider.name}'s answer is larger than {PROVIDER_EVENT_BYTES_MAX:,} bytes, the limit"
            return ProviderProtocol(words) if too_large else None
        held_characters = self.decoder.held_characters
        try:
            lines = self._sse.lines(data)
            if lines is not None and self.decoder.decode_lines(lines, deltas):
                self._sse.pass_over(data)
            else:
                for name, payload in self._sse.feed(data):
                    self.decoder.decode(name, payload, deltas)
        except GenerationError as exc:
            return exc
        if self.decoder.held_characters != held_characters:
            self.grown_at = self.heard_at
        return None

    def _decode_end(self, deltas: list[Delta]) -> GenerationError | None:
        try:
            if self._document is not None:
                self.decoder.decode_document(bytes(self._document), deltas)
            with contextlib.suppress(ProviderProtocol):  # half an event: the answer was cut, and `end` says so
                for name, payload in self._sse.end():
                    self.decoder.decode(name, payload, deltas)
            self.decoder.end(deltas)
        except ProviderTruncated as exc:
            return no_answer(self.provider, bytes(self._sse.strange)) if self._sse.strange else exc
        except GenerationError as exc:
            return exc
        return None


async def read_whole(reply: Reply, bytes_max: int, seconds: float) -> WholeBody:
    """What there is of a reply's body: some servers never end one, and some break off."""
    body = WholeBody(bytes_max)
    reply.attach(body)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await body.wait()
    return body


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """How long a provider asks to wait, by `retry-after-ms`, or `retry-after` as seconds or an HTTP date."""
    readings: tuple[Callable[[], float], ...] = (
        lambda: float(headers["retry-after-ms"]) / 1000,
        lambda: float(headers["retry-after"]),
        lambda: email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time(),
    )
    for read in readings:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            if (seconds := read()) == seconds:  # `float` takes "nan"
                return max(seconds, 0.0)
    return None


def retry_delay(error: ProviderError, attempt: int) -> float | None:
    """Seconds before attempt `attempt` + 1; None: another one makes no sense."""
    if not error.transient or (error.retry_after_seconds or 0.0) > RETRY_AFTER_SECONDS_MAX:
        return None
    backoff = min(RETRY_DELAY_SECONDS * 2 ** (attempt - 1), RETRY_DELAY_SECONDS_MAX)
    jittered = backoff * random.uniform(0.75, 1.25)
    return jittered if error.retry_after_seconds is None else error.retry_after_seconds


# What a provider's refusal can teach: words in its 400 or 422, and the quirk that the next try then has.
LEARNT_QUIRKS = {
    b"stream_options": "no_stream_options",
    b"max_completion_tokens": "max_completion_tokens",
    b"prefill": "no_prefill",
    b"a-z, A-Z, 0-9, with a length of 9": "nine_character_ids",  # Mistral's models have it with other providers too
}


PROVIDER_HEADERS = {
    "user-agent": f"llmchat/{__version__}", "accept": "*/*", "accept-encoding": "identity",
    "content-type": "application/json",
}  # fmt: skip


class Providers:
    """The configured providers: asks them questions, knows their models, remembers what they refused."""

    def __init__(self, config: Config) -> None:
        self.rejected: set[str] = set()  # names of providers that refused their key; a list of models may need none
        self._config = config
        self._client = HttpClient()
        self._learnt: dict[str, frozenset[str]] = {}
        self._models: dict[str, ModelList] = {}

    async def close(self) -> None:
        await self._client.close()

    @asynccontextmanager
    async def ask(self, target: Target, question: Question) -> AsyncIterator[Answer]:
        """Posts a question; the connection closes with the context, at once when it is cancelled.

        Raises ProviderError. A refusal that names a field which this provider does not take is learnt from, and the
        question goes out once more without it; every round learns something, so there are few.
        """
        provider = target.provider
        reply = await self._post(provider, question)
        try:
            while reply.status != 200:
                error, body = await self._refusal(provider, reply)
                quirk = next((quirk for word, quirk in LEARNT_QUIRKS.items() if word in body), None)
                if reply.status not in (400, 422) or quirk is None or quirk in self._quirks(provider):
                    raise error
                await reply.close()
                self._learnt[provider.name] = self._quirks(provider) | {quirk}
                reply = await self._post(provider, question)
            self.rejected.discard(provider.name)
            yield Answer(provider, reply)
        finally:
            await reply.close()

    async def ask_whole(self, target: Target, question: Question) -> list[Delta]:
        """A question's whole answer. Raises GenerationError."""
        deltas: list[Delta] = []
        async with self.ask(target, question) as answer:
            await answer.receive(lambda: deltas.extend(answer.take()))
            deltas += answer.take()
            if answer.failure is not None:
                raise answer.failure
        return deltas

    def prefills(self, provider: Provider) -> bool:
        """Whether a broken-off answer is continued by a prefill, not by asking."""
        return DIALECTS[provider.dialect].prefills(self._quirks(provider))

    def _quirks(self, provider: Provider) -> frozenset[str]:
        return provider.quirks | self._learnt.get(provider.name, frozenset())

    async def _post(self, provider: Provider, question: Question) -> Reply:
        dialect = DIALECTS[provider.dialect]
        body = encode_json(dialect.body(provider, self._quirks(provider), question))
        if provider.name == DEMO:
            return answer_demo(body)
        return await self._send(provider, "POST", provider.base_url + dialect.path(provider), body)

    async def _send(self, provider: Provider, method: str, url: str, body: bytes | None) -> Reply:
        """One request; the reply's body is still to come. Raises ProviderError."""
        headers = {**PROVIDER_HEADERS, **DIALECTS[provider.dialect].headers(provider)}
        try:
            return await self._client.send(method, url, headers, body)
        except Unreachable as exc:
            what = f"{provider.name} cannot be reached at {provider.base_url}: {shorten(str(exc), provider.key)}"
            raise ProviderUnavailable(what, transient=True) from exc
        except OSError as exc:
            what = f"{provider.name} broke the connection before it answered: {shorten(reason_of(exc), provider.key)}"
            raise ProviderUnavailable(what, transient=True) from exc
        except HttpParserError as exc:
            reason = shorten(reason_of(exc), provider.key)
            raise ProviderProtocol(f"{provider.name} answered with something that is not HTTP: {reason}") from exc

    async def _refusal(self, provider: Provider, reply: Reply) -> tuple[ProviderError, bytes]:
        """The error for a status other than 200, and the body that it was read from."""
        body = bytes((await read_whole(reply, REFUSAL_BYTES_MAX, REFUSAL_SECONDS)).data)
        words, kinds = body_words(body)
        if 300 <= reply.status < 400:
            words = f"a redirect to {reply.headers.get('location', 'nowhere')}, which is not followed"
        error = provider_error(provider, reply.status, words, kinds)
        error.retry_after_seconds = retry_after_seconds(reply.headers)
        should_retry = reply.headers.get("x-should-retry")
        if should_retry in ("true", "false"):
            error.transient = should_retry == "true" and not is_spent(words, kinds)
        if isinstance(error, ProviderAuth):
            self.rejected.add(provider.name)
        return error, body

    # ── models ──

    async def list_models(self, provider: Provider, age_seconds_max: float = MODELS_CACHE_SECONDS) -> ModelList:
        """A provider's models, asked live unless they are given or were asked lately enough; never raises."""
        known = self._models.get(provider.name)
        if provider.models:
            return ModelList(provider.models, None, 0.0)
        if known is None or time.monotonic() - known.asked_at >= age_seconds_max:
            try:
                async with asyncio.timeout(MODELS_SECONDS):
                    models, error = await self._fetch_models(provider), None
            except TimeoutError:
                models, error = (), f"{provider.name} did not answer within {MODELS_SECONDS} s"
            except ProviderError as exc:
                models, error = (), exc.message
            known = self._models[provider.name] = ModelList(models, error, time.monotonic())
        return known

    async def _fetch_models(self, provider: Provider) -> tuple[str, ...]:
        path = DIALECTS[provider.dialect].models_path
        base_url = provider.base_url.removesuffix("/v1") if path.startswith("/v1") else provider.base_url
        reply = await self._send(provider, "GET", provider.models_url or base_url + path, None)
        try:
            if reply.status != 200:
                raise (await self._refusal(provider, reply))[0]
            body = await read_whole(reply, PROVIDER_EVENT_BYTES_MAX, MODELS_SECONDS)
            if body.error is not None:
                raise ProviderTruncated(f"the connection to {provider.name} broke: {reason_of(body.error)}")
            return tuple(dict.fromkeys(models_of(decode_json(bytes(body.data)))))
        except msgspec.DecodeError as exc:
            raise ProviderProtocol(f"{provider.name}'s list of models is not JSON") from exc
        finally:
            await reply.close()

    # ── from a request's words to a target ──

    async def resolve(self, provider_name: str | None, model: str | None, name: str = "model") -> Target:
        """The target that a request means; `name` is the field to blame. Raises InvalidRequest."""
        wanted = model or ""
        provider = self._find(provider_name, "provider") if provider_name is not None else None
        if provider is None:
            wanted = wanted or self._config.default_model
            prefix, _, rest = wanted.partition("/")
            if rest and (provider := self._config.provider(prefix)):
                wanted = rest
            elif wanted:
                return await self._find_by_model(wanted, name)
        provider = provider or self._config.providers[0]
        return self._check(Target(provider, wanted or await self._first_model(provider)), name)

    async def _find_by_model(self, wanted: str, name: str) -> Target:
        """The target of a model without its provider: where only one has it, or there is only one. Raises ModelNotFound.

        The lists that the configuration gives come first; only then are the providers asked for theirs.
        """
        providers = self._config.providers
        found = [Target(one, wanted) for one in providers if wanted in one.models]
        if not found and len(providers) > 1 and self._config.provider(wanted) is None:
            listed = await asyncio.gather(*map(self.list_models, providers))
            found = [Target(one, wanted) for one, its in zip(providers, listed, strict=True) if wanted in its.models]
        prefix = wanted.partition("/")[0]
        if len(providers) == 1 and prefix not in PROVIDER_FACTS:
            found = [self._check(Target(providers[0], wanted), name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ModelNotFound(f"{name}: several providers have {wanted!r}; write one of {', '.join(map(str, found))}")
        self._find(prefix, name)
        raise ModelNotFound(
            f"{name}: {wanted!r} does not say which provider; write provider/model, or name the provider too"
        )

    def _find(self, wanted: str, name: str) -> Provider:
        provider = self._config.provider(wanted)
        if provider is not None:
            return provider
        configured = ", ".join(one.name for one in self._config.providers)
        known = PROVIDER_FACTS.get(wanted)
        hint = f"; set {known.variables[0]} to switch it on" if known else "; a model is written provider/model"
        raise ModelNotFound(f"{name}: provider {wanted!r} is not configured; there is {configured}{hint}")

    def _check(self, target: Target, name: str) -> Target:
        """Refuses a model that is known not to be there: where the list is given, not asked."""
        models = target.provider.models
        if models and target.model not in models:
            raise ModelNotFound(
                f"{name}: {target.provider.name} has no model {target.model!r}; it has {', '.join(models)}"
            )
        return target

    async def _first_model(self, provider: Provider) -> str:
        """What an unnamed model means: the first that the provider lists and that can be meant for chat."""
        listed = await self.list_models(provider)
        for model in listed.models:
            if not re.search(r"embed|whisper|tts|dall-e|moderation|image|audio|realtime|rerank|transcri", model):
                return model
        reason = f": {listed.error}" if listed.error else ""
        raise InvalidRequest(
            f"model: is absent, and {provider.name} lists none{reason}; name one, or set LLMCHAT_DEFAULT_MODEL"
        )


def models_of(document: Any) -> list[str]:
    """The ids in a list of models: {"data": […]}, {"models": […]} or a bare list."""
    listed = document.get("data") or document.get("models") if isinstance(document, dict) else document
    items = listed if isinstance(listed, list) else []
    names = [item.get("id") or item.get("name") if isinstance(item, dict) else item for item in items]
    return [name.removeprefix("models/") for name in names if isinstance(name, str)]


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 10. Store
#
# SQL is here and in Archives. Two connections, each in the thread that aiosqlite gives it: one writes, one reads. An
# operation is a plain function of a sqlite3 connection and runs as a whole in that thread, so transactions never
# interleave and there is nothing to lock. Writes are committed in groups: whatever waits when the writer comes free
# goes into one transaction, each operation in a savepoint of its own, so that one that is refused takes no other
# along; a hundred new chats cost a handful of fsyncs. `synchronous` is NORMAL (a commit survives kill -9), and FULL for
# a group that holds a promise (it survives a power cut). Migrations only go forward, each in a transaction with its
# step of user_version. A second process on the same file is refused by a lock beside it, not by SQLite's own, so that
# backups and curious people may read. Deliberately absent: an ORM, a pool, and any write outside `Store.write`.
#
# A message's content is its rows in `delta`, in order. While it runs, what the journal (a table of ours, none of
# SQLite's files) has beyond them is content too: a flush appends one row there for all messages, which touches a page
# or two, where a row of its own for each message would touch a page for each. Once there is enough of a message, or at
# a flush after half a second, and in any case in the transaction of its end, that becomes rows of its own, which know
# the lengths of the events they were published in (`cuts_json`). The journal may keep it for a while: an offset before
# the end of a message's rows counts no more.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

MIGRATIONS = Path(__file__).resolve().parent / "migrations"
SQLITE_VERSION_MIN = (3, 37, 0)  # STRICT tables


class Message(Struct):
    """A message, wherever one is given. `content` is the runs of its deltas; `text` is the text among them."""

    id: int
    conversation_id: int
    parent_id: int | None
    role: str
    status: Literal["running", "completed", "stopped", "failed", "interrupted"]
    provider: str | None
    model: str | None
    text: str
    content: list[Delta]
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"] | None
    error: dict[str, Any] | None
    usage: Usage | None
    timing: Timing
    attempts: list[dict[str, Any]]
    created_at_ms: int
    html: str | UnsetType = UNSET  # of an ended answer, with ?render=html


class SnippetPart(Struct, frozen=True):
    """A piece of a snippet; `mark`: this is what was searched for."""

    text: str
    mark: bool


class Match(Struct, frozen=True):
    """Where a search found a conversation; `message_id` null: in its title."""

    message_id: int | None
    snippet: list[SnippetPart]


class ConversationSummary(Struct, omit_defaults=True):
    """A conversation in a list. `running`: one of its messages is being generated. `match` only in a search."""

    id: int
    title: str
    system: str
    parameters: Parameters
    created_at_ms: int
    updated_at_ms: int
    running: bool
    match: Match | None = None


class Conversation(ConversationSummary, kw_only=True):
    """A conversation with its tree: messages by id, siblings in order; `path` leads to the newest leaf."""

    messages: list[Message]
    path: list[int]


class ConversationList(Struct):
    """Newest activity first. `next_before` is the `before` of the following page; null: there is none."""

    conversations: list[ConversationSummary]
    next_before: str | None


@dataclass(frozen=True)
class NewMessage:
    """What a request adds to a conversation: a user's content, and the answer that is to come.

    `conversation_id` None: a new conversation. `parent_id` UNSET: the newest leaf; None: a new first message.
    `turns` are a user's content or the results of tools; empty when an answer is generated once more.
    """

    owner: str
    conversation_id: int | None
    parent_id: int | UnsetType | None
    turns: tuple[Turn, ...]
    system: str | None
    targets: tuple[Target, ...]  # whom to ask, and then the fallbacks
    parameters: Parameters
    idempotency_key: str | None = None
    request_hash: str | None = None
    hidden: bool = False  # a new conversation that is in no list and is deleted some time after it has ended
    answer_system: str | None = None  # the system prompt of this answer alone; None: the conversation's
    response: Mapping[str, Any] | None = None  # what a response of section 15 repeats of its request


@dataclass(frozen=True)
class Started:
    """A committed question, and all that its generation begins with. `turns` lead from the root to the question.

    `content` and what follows it are an answer's that is continued; there `turns` end with that answer.
    """

    conversation_id: int
    message_id: int
    parent_id: int | None
    system: str = ""
    turns: tuple[Turn, ...] = ()
    parameters: Parameters = NO_PARAMETERS
    repeated: bool = False  # an earlier request with the same Idempotency-Key has started it
    status: str = "running"
    hidden: bool = False
    content: tuple[Delta, ...] = ()
    usage: Usage | None = None
    timing: Timing = NO_TIMING
    attempts: tuple[dict[str, Any], ...] = ()


class Session(NamedTuple):
    """A sign-in of the page, as it is stored. `token_hash` is of cookie and token together: who reads the database or
    a backup of it has nothing to try guesses at a token on."""

    cookie_hash: str
    owner: str
    token_hash: str
    expires_at_ms: int


Row = tuple[int, int, str, str, str | None]  # of the table delta: message_id, offset, kind, text, cuts_json
Piece = tuple[int, str, str]  # of a message in the journal: offset, kind, text


@dataclass(frozen=True)
class Outcome:
    """What the terminal transaction writes of a message; milliseconds count from created_at_ms."""

    message_id: int
    ending: Ending
    target: Target
    usage: Usage | None  # None: nothing was asked that would cost anything
    attempts: tuple[dict[str, Any], ...]
    first_delta_ms: int | None
    total_ms: int
    first_text_ms: int | None = None


class Save(NamedTuple):
    """What a flush writes: content that goes into the journal, content that becomes its messages' own rows, with what
    the journal had of them before, and the ends of some."""

    journalled: Mapping[int, Sequence[Piece]] = {}  # by message
    rows: Sequence[Row] = ()
    outcomes: Sequence[Outcome] = ()
    journal_id: int = 0  # of the row that `journalled` makes
    journal_floor: int = 0  # nobody needs the journal's rows before it
    is_trimming: bool = False  # and they go now


class Page(NamedTuple):
    """Content from a cursor on: (offset after, delta) pairs, and the message as of the same moment."""

    pieces: list[tuple[int, Delta]]
    length: int  # of the whole content, code points
    message: Message  # without content


class Database(aiosqlite.Connection):
    """An aiosqlite connection that runs a whole function in its thread: one switch of threads per operation."""

    async def run(self, operation: Callable[..., T], *arguments: Any) -> T:
        return cast(T, await self._execute(operation, self._conn, *arguments))  # type: ignore[no-untyped-call]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def connect(path: str, *, read_only: bool) -> sqlite3.Connection:
    """A connection with every pragma that the program relies on; transactions are begun by hand."""
    mode = "ro" if read_only else "rwc"
    location = f"{Path(path).absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(location, uri=True, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    cache_kilobytes = READER_CACHE_KILOBYTES if read_only else WRITER_CACHE_KILOBYTES
    connection.create_function("segment", 1, segment, deterministic=True)
    connection.create_function("owner_token", 1, owner_token, deterministic=True)
    try:
        connection.executescript(
            f"PRAGMA busy_timeout={DATABASE_BUSY_MS}; PRAGMA journal_size_limit={WAL_BYTES_MAX};"
            "PRAGMA foreign_keys=ON; PRAGMA synchronous=NORMAL; PRAGMA temp_store=MEMORY;"
            f"PRAGMA cache_size=-{cache_kilobytes}"
        )
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def value_of(connection: sqlite3.Connection, query: str, *arguments: Any, **named: Any) -> Any:
    """The first value of the first row; None: there is no row."""
    row = connection.execute(query, named or arguments).fetchone()
    return None if row is None else row[0]


def insert_row(connection: sqlite3.Connection, table: str, **columns: Any) -> int:
    """Stores a row; returns its id."""
    places = ", ".join("?" * len(columns))
    query = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})"
    return cast(int, connection.execute(query, tuple(columns.values())).lastrowid)


async def open_database(path: str, *, read_only: bool) -> Database:
    """A connection with a thread of its own; whoever gets it closes it."""
    database = Database(partial(connect, path, read_only=read_only), 64)
    await database
    return database


DAMAGED_ADVICE = "; start on a backup with --db, or save what can be read: sqlite3 DAMAGED .recover | sqlite3 NEW"


def create_private(path: str) -> None:
    """Makes a file for its owner alone, which must not be there; what SQLite puts beside it takes the same mode."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def disk_reason(exc: sqlite3.Error | OSError) -> str:
    """What SQLite or the system says, without the path."""
    return getattr(exc, "strerror", None) or reason_of(exc)


def prepare_database(path: str, *, suspect: bool) -> int:
    """Creates or migrates the file and ends what a dead process left running. Returns how many messages that were.

    `suspect`: nobody knows how its last process ended, so it is checked first. Raises StartError with one line for
    everything that a file can be and a database cannot.
    """
    if sqlite3.sqlite_version_info < SQLITE_VERSION_MIN:
        raise StartError(f"SQLite {sqlite3.sqlite_version} is too old; llmchat needs 3.37 or later")
    if Path(path).is_dir():
        raise StartError(f"database {path}: is a folder")
    try:
        with contextlib.suppress(FileExistsError):
            create_private(path)
        with contextlib.closing(connect(path, read_only=False)) as connection:
            if suspect:
                check_database(connection, path)
            migrate(connection, path)
            connection.execute("PRAGMA journal_mode=WAL")  # after it, since it writes: a refused file stays as it was
            return interrupt_running(connection)
    except (sqlite3.Error, OSError) as exc:
        damaged = getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CORRUPT
        raise StartError(f"database {path}: {disk_reason(exc)}{DAMAGED_ADVICE if damaged else ''}") from exc


def check_database(connection: sqlite3.Connection, path: str) -> None:
    """Looks for damage, as a power cut or a broken disk leaves it. Raises StartError.

    A big file is checked without its indexes, and a check that takes too long is given up: it is a net, not a gate.
    """
    pragma = "integrity_check" if os.path.getsize(path) <= CHECK_BYTES_MAX else "quick_check"
    deadline = time.monotonic() + CHECK_SECONDS_MAX
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
    try:
        found = value_of(connection, f"PRAGMA {pragma}(1)")
    except sqlite3.OperationalError as exc:
        if getattr(exc, "sqlite_errorcode", 0) != sqlite3.SQLITE_INTERRUPT:
            raise
    else:
        if found != "ok":
            raise StartError(f"database {path}: is damaged ({' '.join(found.split())}){DAMAGED_ADVICE}")
    finally:
        connection.set_progress_handler(None, 0)


def copy_database(path: str, target: str) -> None:
    """A copy of the database as it is at one moment, also while it is written to, in a single file.

    The open transaction holds that moment: without it every commit of the writer would begin the copy anew. In WAL
    mode it holds nobody up; only the log cannot shrink until it ends. Raises sqlite3.Error.
    """
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    with contextlib.closing(connect(path, read_only=True)) as source:
        source.execute("BEGIN")
        if not value_of(source, "SELECT 1 FROM sqlite_schema WHERE name = 'conversation'"):
            raise sqlite3.DatabaseError("is not llmchat's")
        with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy:
            source.backup(copy, pages=BACKUP_STEP_PAGES, sleep=0)
            copy.execute("PRAGMA journal_mode=DELETE")  # so that nothing beside the file belongs to it


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Applies what is new in migrations/, each file in its own transaction together with its number."""
    scripts = sorted(MIGRATIONS.glob("[0-9][0-9][0-9][0-9]_*.sql"))
    have, want = value_of(connection, "PRAGMA user_version"), len(scripts)
    if have > want:
        raise StartError(f"database {path}: is of version {have}, made by a newer llmchat; this one knows {want}")
    if have == want:
        return
    if have > 0:
        copy_database(path, f"{path}.before-{want:04}")
    elif value_of(connection, "SELECT count(*) FROM sqlite_schema"):
        raise StartError(f"database {path}: holds tables that are not llmchat's")
    for number, script in enumerate(scripts[have:], have + 1):
        with connection:  # commits, or rolls back
            connection.execute("BEGIN IMMEDIATE")
            for statement in sql_statements(script.read_text(encoding="utf-8")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")


def sql_statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: `executescript` would commit first, and half a migration could stay."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def open_copy(path: str) -> BinaryIO:
    """A copy of the database in a file beside it that has no name any more: its end is the end of the copy.

    Raises StoreUnavailable, also when the disk has no room for it beside what is being streamed.
    """
    folder = Path(path).absolute().parent
    try:
        needed = os.path.getsize(path) * 1.1
        if shutil.disk_usage(folder).free < needed:
            raise StoreUnavailable(f"a copy of the database takes {needed:,.0f} bytes; the disk has not as many left")
        name = folder / f".llmchat-copy-{random.getrandbits(64):016x}"
        try:
            copy_database(path, str(name))
            return name.open("rb")
        finally:
            name.unlink(missing_ok=True)
    except (sqlite3.Error, OSError) as exc:
        raise StoreUnavailable(f"the database cannot be copied: {disk_reason(exc)}", retry_after_seconds=5) from exc


def remove_left_copies(path: str) -> None:
    """Copies that a dead process was making."""
    for name in Path(path).absolute().parent.glob(".llmchat-copy-*"):
        if re.fullmatch(r"\.llmchat-copy-[0-9a-f]{16}(-journal)?", name.name):
            name.unlink(missing_ok=True)


def save_backup(path: str, target: str) -> int:
    """What `llmchat backup FILE` does; returns the file's bytes. Raises StartError, also if the file is there already.

    The name is taken first and the copy put in its place when it is whole: never half a backup under that name.
    """
    partial_copy = f"{target}.partial"
    try:
        create_private(target)
    except OSError as exc:
        is_there = "is there already; a backup overwrites nothing"
        raise StartError(f"backup {target}: {is_there if isinstance(exc, FileExistsError) else exc.strerror}") from exc
    try:
        copy_database(path, partial_copy)
        os.replace(partial_copy, target)
    except BaseException as exc:
        for name in (partial_copy, f"{partial_copy}-journal", target):
            Path(name).unlink(missing_ok=True)
        if isinstance(exc, sqlite3.Error | OSError):
            raise StartError(f"backup of {path}: {reason_of(exc)}") from exc
        raise
    return os.path.getsize(target)


NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|ncpfs|ceph|glusterfs|lustre|gfs2?|ocfs2|davfs|virtiofs|vboxsf|"
    r"fuse\.(sshfs|s3fs|rclone|gcsfuse|grpcfuse|osxfs|glusterfs|ceph\w*|davfs2?|gvfsd-fuse|mergerfs)"
)


def network_file_system(folder: str, mounts: str) -> str | None:
    """The type of the file system under a folder if it is one that several machines may share; None: it is not.

    `mounts` is /proc/mounts; its paths have spaces and backslashes as octal escapes (man 5 fstab).
    """
    longest, kind = 0, ""
    for line in mounts.splitlines():
        _, escaped, kind_there, *_ = [*line.split(" "), "", "", ""]
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), escaped)
        if place and f"{folder}/".startswith(place.rstrip("/") + "/") and len(place) >= longest:
            longest, kind = len(place), kind_there  # of two on the same place, the later one is what is seen
    return kind if NETWORK_FILE_SYSTEMS.fullmatch(kind) else None


def interrupt_running(connection: sqlite3.Connection) -> int:
    """Recovery: what still runs in the file belongs to a process that died."""
    connection.execute("BEGIN IMMEDIATE")
    empty_journal(connection)
    rows = connection.execute(
        "UPDATE message SET status = 'interrupted', ended_at_ms = max(?, created_at_ms) WHERE status = 'running'"
        " RETURNING id, conversation_id",
        (now_ms(),),
    ).fetchall()
    ended_now = "UPDATE conversation SET updated_at_ms = ? WHERE id = ? AND hidden = 1"
    connection.executemany(ended_now, [(now_ms(), conversation_id) for _, conversation_id in rows])
    mark_unindexed(connection, [message_id for message_id, _ in rows])
    connection.execute("COMMIT")
    return len(rows)


# ── full text ───────────────────────────────────────────────────────────────────────────────────────────────────────
#
# An FTS5 table for titles and one for texts. Their tokenizer knows words between spaces; scripts that have none (Chinese,
# Japanese, Thai, …) go in character by character and are searched as phrases. Whatever a user types is text: every
# word of it is quoted, and matches as a prefix. Texts do not go in with the transaction that brings them: each that
# writes to FTS5 makes a segment, and an answer alone costs five times what it costs among many. It leaves their ids in
# `unindexed`, and `index_texts` takes them in together, a moment later, or when somebody searches. In both tables rows
# have minus the id of what they index: FTS5 reads fastest upwards, and the newest are wanted first.

UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff])"
)
INDEXED_CHARACTERS_MAX = 200_000  # of one message's text: other writes wait while it is indexed, some 20 ms
INDEX_GROUP_CHARACTERS = 50_000  # of text that one transaction indexes; the last message may go beyond
INDEX_GROUP_TEXTS = 200  # the same
SEARCH_WORDS_MAX = 8  # of one query; a character of a script without spaces counts as one
SEARCH_PREFIX_CHARACTERS_MIN = 3  # of a word that matches as a prefix, one less of the last, which is being typed
SEARCH_PREFIX_WORDS_MAX = 2  # newest words of a query that match as prefixes
INDEXED_PREFIX_CHARACTERS_MAX = 3  # of the prefixes that the index has, like words
SEARCH_PREFIXED_MAX = 64  # words that a longer prefix is replaced by; where there are more, FTS5 merges all their rows
SEARCH_MATCHES_MAX = 200  # newest matches that are looked at; the word "the" is in every message
SNIPPET_WORDS_BEFORE, SNIPPET_WORDS = 6, 24  # of a snippet: before what was found, and in all
SNIPPET_CHARACTERS_BEFORE, SNIPPET_CHARACTERS_MAX = 120, 1_000  # the same
WORD = re.compile(r"[^\W_]+")
SNIPPET = re.compile(rf"(?:[\W_]*[^\W_]+){{0,{SNIPPET_WORDS}}}")
WORDS_BEFORE = re.compile(rf"(?:[\W_]*[^\W_]+){{0,{SNIPPET_WORDS_BEFORE}}}")  # of what was found, backwards
MARK_START, MARK_END = "\x02", "\x03"
MARKED_UNSPACED = re.compile(rf" ?([{MARK_START}{MARK_END}]*{UNSPACED.pattern}[{MARK_START}{MARK_END}]*) ?")
MARK = re.compile(f"([{MARK_START}{MARK_END}])")


def segment(text: str | None) -> str:
    """The text as it is indexed: marks in one character with their letters, a space around every character of a script
    that has none."""
    text = text or ""
    return text if text.isascii() else UNSPACED.sub(r" \1 ", unicodedata.normalize("NFC", text))


def unsegment(text: str) -> str:
    """A piece of indexed text as it was before; marks around its words stay."""
    if not text.isascii():
        text = MARKED_UNSPACED.sub(r"\1", text)
    return text.replace(MARK_END + MARK_START, "")


class Folding(dict[int, str]):
    """For `str.translate`: each letter as the tokenizer compares it, one for one: without case, Latin ones without marks."""

    def __missing__(self, code: int) -> str:
        letter = chr(code).casefold()
        letter = letter if len(letter) == 1 else chr(code).lower()[0]
        base = unicodedata.normalize("NFD", letter)[0]
        self[code] = base if base.isascii() else letter
        return self[code]


FOLDING = Folding()


def fold(text: str) -> str:
    """The text as the tokenizer compares it, of the same length."""
    return text.lower() if text.isascii() else text.translate(FOLDING)


@functools.lru_cache(maxsize=256)
def owner_token(owner: str) -> str:
    """An owner as one word of the index."""
    return "o" + hashlib.sha256(owner.encode()).hexdigest()[:16]


def mark_unindexed(connection: sqlite3.Connection, ids: Sequence[int]) -> None:
    """Has `index_texts` take these in: messages', and negative ones of conversations whose titles they are."""
    connection.execute("INSERT OR IGNORE INTO unindexed SELECT value FROM json_each(?)", (json.dumps(ids),))


AMONG = "IN (SELECT value FROM json_each(?))"


def unindex(connection: sqlite3.Connection, ids: Sequence[int]) -> None:
    """Makes what has these ids, as `mark_unindexed` knows them, unfindable."""
    rows = {"message_fts": [-one for one in ids if one > 0], "conversation_fts": [one for one in ids if one < 0]}
    for table, row_ids in rows.items():
        connection.execute(f"DELETE FROM {table} WHERE rowid {AMONG}", (json.dumps(row_ids),))


UNINDEXED_SIZES = (
    "SELECT json_group_array(json_array(id, (SELECT sum(length(text)) FROM delta WHERE message_id = unindexed.id"
    f"  AND kind = 'text'))) FROM (SELECT id FROM unindexed LIMIT {INDEX_GROUP_TEXTS}) AS unindexed"
)
TEXTS_TO_INDEX = (
    "SELECT json_group_array(json_array(id, owner, text)) FROM ("
    "SELECT * FROM (SELECT -id AS id, owner, title AS text FROM conversation"
    " WHERE hidden = 0 AND id IN (SELECT -value FROM json_each(:ids))"
    " UNION ALL SELECT message.id, owner, (SELECT group_concat(text, '') FROM (SELECT text FROM delta"
    f"  WHERE message_id = message.id AND kind = 'text' AND offset < {INDEXED_CHARACTERS_MAX} + (SELECT coalesce("
    "   sum(length(text)), 0) FROM delta WHERE message_id = message.id AND kind != 'text') ORDER BY offset))"
    " FROM message JOIN conversation ON conversation.id = conversation_id"
    " WHERE hidden = 0 AND message.id IN (SELECT value FROM json_each(:ids))) ORDER BY abs(id) DESC)"
)


def index_texts(connection: sqlite3.Connection) -> bool:
    """Makes a group of what is unindexed findable; returns whether there is more. It takes a handful of statements, however
    much that is (see `insert_rows`). What is gone by now, or hidden, is passed over; of a text that is very long, not
    much more than its beginning is read."""
    ids, characters = [], 0
    for row_id, size in json.loads(value_of(connection, UNINDEXED_SIZES)):
        if characters < INDEX_GROUP_CHARACTERS:
            ids.append(row_id)
            characters += min(size or 0, INDEXED_CHARACTERS_MAX)
    newest_first = json.loads(value_of(connection, TEXTS_TO_INDEX, ids=json.dumps(ids)))
    rows = [
        (row_id, owner_token(owner), segment(text[:INDEXED_CHARACTERS_MAX]))
        for row_id, owner, text in newest_first
        if text
    ]
    unindex(connection, ids)
    insert_rows(connection, "message_fts (rowid, owner, text)", [(-row[0], *row[1:]) for row in rows if row[0] > 0])
    insert_rows(connection, "conversation_fts (rowid, owner, title)", [row for row in rows if row[0] < 0])
    connection.execute(f"DELETE FROM unindexed WHERE id {AMONG}", (json.dumps(ids),))
    return len(ids) == INDEX_GROUP_TEXTS or characters >= INDEX_GROUP_CHARACTERS


WORDS_WITH_PREFIX = (  # from each one straight to the next: how often they occur is not read
    "WITH RECURSIVE word (term, number) AS (SELECT (SELECT term FROM message_term WHERE term >= :prefix LIMIT 1), 1"
    " UNION ALL SELECT (SELECT term FROM message_term WHERE term >= word.term || char(1) LIMIT 1), number + 1 FROM word"
    f"  WHERE term < :end AND number <= {SEARCH_PREFIXED_MAX})"
    " SELECT term FROM word WHERE term < :end"
)


class Phrase(NamedTuple):
    """A word of a query: the tokens that have to follow one another, the last perhaps as a prefix."""

    tokens: tuple[str, ...]
    is_prefix: bool

    def expression(self) -> str:
        return f'"{" ".join(self.tokens)}"' + ("*" if self.is_prefix else "")

    def expanded(self, connection: sqlite3.Connection) -> str:
        """The expression; a prefix that the index does not have is replaced by the words of the texts that begin so. FTS5
        would merge all their rows before it gave the first; of the words themselves it reads as many as are asked for."""
        *before, last = self.tokens
        if self.is_prefix and len(last) > INDEXED_PREFIX_CHARACTERS_MAX:
            found = connection.execute(WORDS_WITH_PREFIX, {"prefix": last, "end": last + chr(sys.maxunicode)})
            words = [row[0] for row in found]
            if 0 < len(words) <= SEARCH_PREFIXED_MAX:
                return f"({' OR '.join(Phrase((*before, word), False).expression() for word in words)})"
        return self.expression()

    def pattern(self) -> str:
        """What finds it in a folded text. It begins with the letters themselves, which `re` looks for first."""
        first, *others = self.tokens
        parts = [rf"{first}(?<![^\W_]{first})", *others]
        return r"[\W_]+".join(parts) + (r"[^\W_]*" if self.is_prefix else r"(?![^\W_])")


def parse_query(query: str) -> list[Phrase]:
    """The words of a query; whatever is no letter or digit only parts them. What is too much for a search is left away."""
    phrases: list[Phrase] = []
    left = SEARCH_WORDS_MAX
    for word in dict.fromkeys(query.split()):
        if tokens := tuple(WORD.findall(fold(segment(word))))[:left]:
            left -= len(tokens)
            phrases.append(Phrase(tokens, False))
    for back, phrase in enumerate(phrases[: -SEARCH_PREFIX_WORDS_MAX - 1 : -1], start=1):
        long_enough = len(phrase.tokens[-1]) >= SEARCH_PREFIX_CHARACTERS_MIN - (back == 1)
        phrases[-back] = phrase._replace(is_prefix=long_enough)
    return phrases


def is_only_owner(connection: sqlite3.Connection, owner: str) -> bool:
    """Whether all that is indexed is this owner's."""
    shown = "FROM conversation WHERE hidden = 0"
    ends = connection.execute(f"SELECT (SELECT min(owner) {shown}), (SELECT max(owner) {shown})").fetchone()
    return tuple(ends) == (owner, owner)


def find_matches(
    connection: sqlite3.Connection, owner: str, phrases: Sequence[Phrase], limit: int
) -> dict[int, int | None]:
    """The conversations that match, and in which message; None: in their title. Those come first, then the newest messages.

    Only the newest matches are looked at, in the index's own order, so that a word that is everywhere costs no more
    than a rare one: relevance (bm25) would have to count all of them.
    """
    mine = "" if is_only_owner(connection, owner) else f"owner:{owner_token(owner)} AND "
    words = " AND ".join(phrase.expression() for phrase in phrases)
    best: dict[int, int | None] = dict(
        connection.execute(
            "SELECT -rowid, NULL FROM conversation_fts WHERE conversation_fts MATCH ? ORDER BY rowid LIMIT ?",
            (f"{mine}title:({words})", limit),
        ).fetchall()
    )
    if len(best) < limit:
        words = " AND ".join(phrase.expanded(connection) for phrase in phrases)
        newest_first = connection.execute(
            "SELECT (SELECT conversation_id FROM message WHERE id = -message_fts.rowid), -rowid FROM message_fts"
            " WHERE message_fts MATCH ? ORDER BY rowid LIMIT ?",
            (f"{mine}text:({words})", SEARCH_MATCHES_MAX),
        )
        for conversation_id, message_id in newest_first:
            best.setdefault(conversation_id, message_id)
            if len(best) == limit:
                break
    return best


def search_conversations(connection: sqlite3.Connection, owner: str, query: str, limit: int) -> ConversationList:
    """The conversations that match, the best first, each with a snippet."""
    phrases = parse_query(query)
    matches = find_matches(connection, owner, phrases, limit) if phrases else {}
    rows = connection.execute(f"{SELECT_CONVERSATION} WHERE id {AMONG}", (json.dumps([*matches]),))
    conversations = {row["id"]: row for row in rows}
    row_ids = [-message_id for message_id in matches.values() if message_id is not None]
    texts = dict(
        connection.execute(
            f"SELECT -rowid, text FROM message_fts WHERE rowid {AMONG}", (json.dumps(row_ids),)
        ).fetchall()
    )
    wanted, summaries = word_finder(phrases), []
    for conversation_id, message_id in matches.items():
        row = conversations[conversation_id]
        text = segment(row["title"]) if message_id is None else texts[message_id]
        summaries.append(summary_of(row, Match(message_id, snippet_of(text, wanted))))
    return ConversationList(summaries, None)


def search_if_complete(connection: sqlite3.Connection, owner: str, query: str, limit: int) -> ConversationList | None:
    """The same; None while there is something that the index does not have yet."""
    if value_of(connection, "SELECT EXISTS (SELECT 1 FROM unindexed)"):
        return None
    return search_conversations(connection, owner, query, limit)


def word_finder(phrases: Sequence[Phrase]) -> re.Pattern[str]:
    """What finds any of the phrases in a folded text."""
    longest_first = sorted((phrase.pattern() for phrase in phrases), key=len, reverse=True)
    return re.compile("|".join(longest_first))


def snippet_of(text: str, wanted: re.Pattern[str]) -> list[SnippetPart]:
    """The words around the first find in an indexed text, as parts; the marked ones were searched for."""
    lowered = text.lower()  # all that most texts need, and many times faster than `fold`
    first = (len(lowered) == len(text) and wanted.search(lowered)) or wanted.search(fold(text))
    at = first.start() if first else 0
    backwards = text[max(at - SNIPPET_CHARACTERS_BEFORE, 0) : at][::-1]
    start = at - len(WORDS_BEFORE.match(backwards)[0])  # type: ignore[index]  # it also matches no word
    if start <= SNIPPET_CHARACTERS_BEFORE and not WORD.search(text, 0, start):
        start = 0
    longest = start + SNIPPET_CHARACTERS_MAX
    words_end = SNIPPET.match(text, start, longest).end()  # type: ignore[union-attr]  # it also matches no word
    end = words_end if WORD.search(text, words_end) else min(len(text), longest)
    shown, pieces, last = text[start:end], ["…" if start > 0 else ""], 0
    for found in wanted.finditer(fold(shown)):
        pieces += [shown[last : found.start()], MARK_START, shown[found.start() : found.end()], MARK_END]
        last = found.end()
    pieces += [shown[last:], "…" if end < len(text) else ""]
    parts, mark = [], False
    for piece in MARK.split(unsegment("".join(pieces))):
        if piece in (MARK_START, MARK_END):
            mark = piece == MARK_START
        elif piece:
            parts.append(SnippetPart(piece, mark))
    return parts


CLEAN = b"ended cleanly\n"  # what the lock file says when nobody holds it; else it has the holder's number


class Lock(NamedTuple):
    descriptor: int
    suspect: bool  # its last holder did not say that it ended cleanly: it died, or was elsewhere, as after a restore


def lock_database(path: str) -> Lock:
    """Takes the lock beside the database for as long as its descriptor is open. Raises StartError.

    A lock of the system's, so that it goes with its process, however that dies; not on the database itself, because
    closing any descriptor of that file would drop SQLite's own locks (https://sqlite.org/howtocorrupt.html, 2.2).
    """
    import fcntl

    descriptor = -1
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        suspect = os.read(descriptor, len(CLEAN)) != CLEAN
        mark_lock(descriptor, b"%d\n" % os.getpid())
    except BlockingIOError as exc:
        holder = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise StartError(f"database {path}: another llmchat is using it (process {holder})") from exc
    except OSError as exc:
        if descriptor >= 0:
            os.close(descriptor)
        raise StartError(f"database {path}: {exc.strerror or exc}") from exc
    return Lock(descriptor, suspect)


def mark_lock(descriptor: int, words: bytes) -> None:
    """Writes into the lock file; on the disk, because a power cut must not leave an older word."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, words, 0)
    os.fsync(descriptor)


# ── operations: what runs in a connection's thread ──────────────────────────────────────────────────────────────────


def commit_together(
    connection: sqlite3.Connection, operations: Sequence[Callable[..., Any]], durable: bool
) -> list[Any]:
    """Runs the operations in one transaction. Returns the value, or the exception, of each.

    `durable`: the commit is fsynced. Raises sqlite3.Error if the transaction as a whole could not be committed; then
    nothing of it is stored. As few statements as can be: after each, this thread waits for the interpreter.
    """
    if durable:
        connection.execute("PRAGMA synchronous=FULL")
    try:
        connection.execute("BEGIN IMMEDIATE")
        is_alone = len(operations) == 1
        outcomes = [run_operation(connection, operation, is_alone=is_alone) for operation in operations]
        if connection.in_transaction:
            connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk has rolled it back already
            connection.execute("ROLLBACK")
        raise
    finally:
        if durable:
            connection.execute("PRAGMA synchronous=NORMAL")
    return outcomes


def run_operation(connection: sqlite3.Connection, operation: Callable[..., Any], *, is_alone: bool) -> Any:
    """The value of an operation, or the exception of one that is refused. Alone, it needs no savepoint."""
    if not is_alone:
        connection.execute("SAVEPOINT operation")
    try:
        value = operation(connection)
    except Exception as exc:
        if is_disk_error(exc):
            raise
        connection.execute("ROLLBACK" if is_alone else "ROLLBACK TO operation")
        value = exc
    if not is_alone:
        connection.execute("RELEASE operation")
    return value


def is_disk_error(exc: Exception) -> bool:
    """Whether the disk or the file is to blame (full, locked, unreadable, corrupt), not the operation."""
    return isinstance(exc, sqlite3.OperationalError) or type(exc) is sqlite3.DatabaseError


def read_at_once(connection: sqlite3.Connection, operation: Callable[..., T], *arguments: Any) -> T:
    with connection:
        connection.execute("BEGIN")
        return operation(connection, *arguments)


def touch(connection: sqlite3.Connection) -> None:
    """Writes a page and changes nothing: proves that the database can be written."""
    connection.execute(f"PRAGMA user_version = {value_of(connection, 'PRAGMA user_version')}")


COLUMNS_SHOWN = (
    "id", "conversation_id", "parent_id", "role", "status", "provider", "model", "finish_reason", "created_at_ms"
)  # fmt: skip


def message_of(row: sqlite3.Row, content: Sequence[Delta]) -> Message:
    joined, created_at_ms = join_deltas(content), row["created_at_ms"]
    times = (row["first_delta_at_ms"], row["ended_at_ms"], row["first_text_at_ms"])
    return Message(
        **{name: row[name] for name in COLUMNS_SHOWN},
        text=text_of(joined),
        content=joined,
        error=json.loads(row["error_json"]) if row["error_json"] else None,
        usage=msgspec.json.decode(row["usage_json"], type=Usage) if row["usage_json"] else None,
        timing=Timing(*(None if at is None else at - created_at_ms for at in times)),
        attempts=json.loads(row["attempts_json"]),
    )


def whole_message(connection: sqlite3.Connection, row: sqlite3.Row) -> Message:
    """The message of a row, with its content."""
    rows = connection.execute("SELECT kind, text FROM delta WHERE message_id = ? ORDER BY offset", (row["id"],))
    return message_of(row, with_journalled(connection, row, [Delta(*one) for one in rows]))


def start_message(connection: sqlite3.Connection, new: NewMessage) -> Started:
    """Stores a question and the running message of its answer. Raises NotFound, InvalidRequest, Conflict."""
    if earlier := find_repeated(connection, new):
        return earlier
    conversation_id, parent_id = new.conversation_id, new.parent_id
    asked_ids = []
    if conversation_id is None:
        if isinstance(parent_id, int):
            raise InvalidRequest(f"parent_id: {parent_id} was given without the conversation_id that it belongs to")
        conversation_id, parent_id = insert_conversation(connection, new), None
        asked_ids.append(-conversation_id)
    else:
        require_conversation(connection, new.owner, conversation_id)
        parent_id = find_parent(connection, conversation_id, parent_id)
    path = [*select_path(connection, parent_id)]
    refuse_unasked_results(path, new.turns)
    for turn in new.turns:
        params_json = encode_json({"tool_call_id": turn.tool_call_id} if turn.tool_call_id else {}).decode()
        parent_id = insert_message(
            connection, conversation_id, parent_id, turn.role, "completed", now_ms(), params_json=params_json
        )
        insert_content(connection, parent_id, turn.content)
        asked_ids.append(parent_id)
        path.append(Turn(turn.role, tuple(join_deltas(turn.content)), turn.tool_call_id))
    if not new.hidden:
        mark_unindexed(connection, asked_ids)
    return insert_answer(connection, new, conversation_id, parent_id, path)


def refuse_unasked_results(path: Sequence[Turn], turns: Iterable[Turn]) -> None:
    """Raises InvalidRequest for a tool's result of a request that the answer before it, there or in the path to it, did not
    call for: no provider would get it. OpenAI refuses it too; in which order results come, and what is said in between,
    makes no difference."""
    last = next(filter(is_answer, reversed(path)), None)
    called = called_ids(last) if last is not None else set()
    for turn in turns:
        if is_answer(turn):
            called = called_ids(turn)
        if turn.id_field and turn.tool_call_id not in called:
            words = "a message with role 'tool' must be a response to a preceding message with 'tool_calls'"
            raise InvalidRequest(f"{turn.id_field}: {turn.tool_call_id!r} is no call of the answer before it; {words}")


def insert_answer(
    connection: sqlite3.Connection, new: NewMessage, conversation_id: int, parent_id: int | None, path: Sequence[Turn]
) -> Started:
    """Stores the running message of an answer to `parent_id`, to which the path leads; parameters that the request leaves
    open are the conversation's."""
    created_at_ms = now_ms()
    params_json, system, hidden = connection.execute(
        "UPDATE conversation SET updated_at_ms = ?, system = coalesce(?, system) WHERE id = ?"
        " RETURNING params_json, system, hidden",
        (created_at_ms, new.system, conversation_id),
    ).fetchone()
    asked = {**json.loads(params_json), **msgspec.to_builtins(new.parameters)}
    message_id = insert_message(
        connection, conversation_id, parent_id, "assistant", "running", created_at_ms,
        provider=new.targets[0].provider.name, model=new.targets[0].model, params_json=encode_json(asked).decode(),
        idempotency_key=new.idempotency_key, request_hash=new.request_hash, system=new.answer_system,
        response_json=encode_json(new.response).decode() if new.response is not None else None,
    )  # fmt: skip
    return Started(
        conversation_id,
        message_id,
        parent_id,
        system if new.answer_system is None else new.answer_system,
        tuple(path),
        msgspec.convert(asked, Parameters),
        hidden=bool(hidden),
    )


def regenerate_message(connection: sqlite3.Connection, message_id: int, new: NewMessage) -> Started:
    """Stores a running sibling of an answer. Raises NotFound, InvalidRequest, Conflict."""
    if earlier := find_repeated(connection, new):
        return earlier
    row = select_answer(connection, new.owner, message_id)
    asked = {**json.loads(row["params_json"]), **msgspec.to_builtins(new.parameters)}
    new = replace(new, parameters=msgspec.convert(asked, Parameters), answer_system=row["system"])
    path = select_path(connection, row["parent_id"])
    return insert_answer(connection, new, row["conversation_id"], row["parent_id"], path)


def continue_message(connection: sqlite3.Connection, owner: str, message_id: int, target: Target) -> Started:
    """Sets an answer that broke off running again, in place. Raises NotFound, InvalidRequest, Conflict."""
    row = select_answer(connection, owner, message_id)
    ended = row["status"] if row["status"] != "completed" else f"completed, with finish_reason {row['finish_reason']}"
    if row["status"] == "running" or (row["status"] == "completed" and row["finish_reason"] != "length"):
        raise Conflict(f"message_id: message {message_id} is {ended}; only an answer that broke off can be continued")
    connection.execute(
        "UPDATE message SET status = 'running', finish_reason = NULL, error_json = NULL, ended_at_ms = NULL,"
        " merged = 0, provider = ?, model = ? WHERE id = ?",
        (target.provider.name, target.model, message_id),
    )
    settle(connection, message_id, journal_pieces(connection, message_id))  # what `abandon` could not make rows of
    before = whole_message(connection, row)
    return Started(
        row["conversation_id"],
        message_id,
        row["parent_id"],
        row["conversation_system"] if row["system"] is None else row["system"],
        select_path(connection, message_id),
        msgspec.json.decode(row["params_json"], type=Parameters),
        hidden=bool(row["hidden"]),
        content=tuple(before.content),
        usage=before.usage,
        timing=before.timing,
        attempts=tuple(before.attempts),
    )


def select_answer(connection: sqlite3.Connection, owner: str, message_id: int) -> sqlite3.Row:
    row = select_message(connection, owner, message_id)
    if row["role"] != "assistant":
        raise InvalidRequest(
            f"message_id: message {message_id} is of role {row['role']}; only an answer can be generated"
        )
    return row


def find_repeated(connection: sqlite3.Connection, new: NewMessage) -> Started | None:
    """The message that a request with the same Idempotency-Key started. Raises Conflict if it was another request."""
    if new.idempotency_key is None:
        return None
    row = connection.execute(
        "SELECT message.* FROM message JOIN conversation ON conversation.id = conversation_id"
        " WHERE idempotency_key = ? AND owner = ?",
        (new.idempotency_key, new.owner),
    ).fetchone()
    if row is None:
        return None
    if row["request_hash"] != new.request_hash:
        raise Conflict(f"Idempotency-Key: {new.idempotency_key!r} was used with another request")
    return Started(row["conversation_id"], row["id"], row["parent_id"], repeated=True, status=row["status"])


def insert_conversation(connection: sqlite3.Connection, new: NewMessage) -> int:
    title, created_at_ms = make_title("\n".join(text_of(turn.content) for turn in new.turns)), now_ms()
    return insert_row(
        connection, "conversation", owner=new.owner, title=title, system=new.system or "", hidden=new.hidden,
        created_at_ms=created_at_ms, updated_at_ms=created_at_ms,
    )  # fmt: skip


def make_title(text: str) -> str:
    """The first line that says something, without Markdown's marks, cut at a word."""
    lines = [line.strip()[:TITLE_LINE_CHARACTERS_MAX] for line in text.split("\n") if line.strip()]
    bare = (re.sub(r"^(\s|>|[#*+-]+\s)+", "", line) for line in lines if not line.startswith(("```", "~~~")))
    plain = (re.sub(r"(?<!\w)([*_`~]{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)", r"\2", line) for line in bare)
    title = " ".join(next((line for line in plain if re.search(r"\w", line)), lines[0] if lines else "").split())
    if len(title) <= TITLE_CHARACTERS_MAX:
        return title
    cut = title[: TITLE_CHARACTERS_MAX - 1]
    return (cut[: cut.rfind(" ")] if " " in cut[TITLE_CHARACTERS_MAX // 2 :] else cut).rstrip(" ,;:.") + "…"


SELECT_CONVERSATION = (
    "SELECT *, EXISTS (SELECT 1 FROM message WHERE status = 'running' AND conversation_id = conversation.id) AS running"
    " FROM conversation"
)


def require_conversation(connection: sqlite3.Connection, owner: str, conversation_id: int) -> sqlite3.Row:
    """The conversation's row. Raises NotFound, also for another owner's: that it exists is nobody's business."""
    query = f"{SELECT_CONVERSATION} WHERE id = ? AND owner = ?"
    row = connection.execute(query, (conversation_id, owner)).fetchone()
    if row is None:
        raise NotFound(f"conversation_id: there is no conversation {conversation_id}")
    return cast(sqlite3.Row, row)


def newest_leaf(connection: sqlite3.Connection, conversation_id: int) -> int | None:
    """It is the newest message of all."""
    return cast(
        "int | None", value_of(connection, "SELECT max(id) FROM message WHERE conversation_id = ?", conversation_id)
    )


def find_parent(connection: sqlite3.Connection, conversation_id: int, parent_id: int | UnsetType | None) -> int | None:
    """The message that a new one follows. UNSET: the newest leaf."""
    if parent_id is UNSET:
        return newest_leaf(connection, conversation_id)
    of_parent = "SELECT conversation_id FROM message WHERE id = ?"
    if parent_id is not None and value_of(connection, of_parent, parent_id) != conversation_id:
        raise InvalidRequest(f"parent_id: there is no message {parent_id} in conversation {conversation_id}")
    return parent_id


def insert_message(
    connection: sqlite3.Connection, conversation_id: int, parent_id: int | None, role: str, status: str,
    created_at_ms: int, **more: Any,
) -> int:  # fmt: skip
    more.setdefault("ended_at_ms", None if status == "running" else created_at_ms)
    of_all = {"role": role, "status": status, "created_at_ms": created_at_ms}
    return insert_row(connection, "message", conversation_id=conversation_id, parent_id=parent_id, **of_all, **more)


def insert_content(connection: sqlite3.Connection, message_id: int, content: Iterable[Delta]) -> None:
    """Stores content that is whole, in rows of bounded length."""
    rows: list[Row] = []
    offset = 0
    for delta in content:
        for piece in split_delta(delta):
            rows.append((message_id, offset, piece.kind, piece.text, None))
            offset += len(piece.text)
    insert_rows(connection, "delta", rows)


def insert_rows(connection: sqlite3.Connection, table: str, rows: Sequence[Sequence[Any]]) -> None:
    """Stores rows in one statement, however many: after each, this thread would have to wait for the interpreter,
    which the event loop's has taken meanwhile. SQLite takes the rows apart by itself; only its JSON has no NUL."""
    if len(rows) > 1 and b"\\u0000" not in (encoded := encode_json(rows)):
        values = ", ".join(f"json_extract(value, '$[{column}]')" for column in range(len(rows[0])))
        connection.execute(f"INSERT INTO {table} SELECT {values} FROM json_each(?)", (encoded.decode(),))
    elif rows:
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' for _ in rows[0])})", rows)


def joined_rows(message_id: int, offset: int, deltas: Iterable[Delta]) -> Iterator[Row]:
    """Deltas from an offset on, in as few rows as there are runs of a kind; each row knows what it was joined from."""
    pieces = []
    for delta in deltas:
        pieces.append((offset, delta.kind, delta.text))
        offset += len(delta.text)
    for group in group_rows(pieces):
        texts = [text for _, _, text in group]
        cuts_json = encode_json([len(text) for text in texts]).decode() if len(texts) > 1 else None
        yield message_id, group[0][0], group[0][1], "".join(texts), cuts_json


def journal_pieces(connection: sqlite3.Connection, message_id: int) -> Iterator[Piece]:
    """All that the journal has of a message, also what has become rows of its own."""
    rows = connection.execute(
        "SELECT json_extract(pieces_json, ?) FROM journal WHERE instr(pieces_json, ?) ORDER BY id",
        (f'$."{message_id}"', f'"{message_id}":'),
    )
    for (pieces_json,) in rows:
        yield from json.loads(pieces_json)


def beyond(pieces: Iterable[Piece], end: int) -> list[Delta]:
    """Those of a message's pieces that its own rows, which end there, do not have; each once."""
    deltas = []
    for offset, kind, text in pieces:
        if offset >= end:
            deltas.append(Delta(kind, text))
            end = offset + len(text)
    return deltas


def with_journalled(connection: sqlite3.Connection, row: sqlite3.Row, content: list[Delta]) -> list[Delta]:
    """The whole content of a message's row, given what its own rows have of it."""
    if row["status"] != "running":
        return content
    return content + beyond(journal_pieces(connection, row["id"]), sum(len(delta.text) for delta in content))


def content_end(connection: sqlite3.Connection, message_id: int) -> int:
    """The offset at which a message's own rows end."""
    newest = "SELECT offset, text FROM delta WHERE message_id = ? ORDER BY offset DESC LIMIT 1"
    row = connection.execute(newest, (message_id,)).fetchone()
    return row["offset"] + len(row["text"]) if row is not None else 0


def settle(connection: sqlite3.Connection, message_id: int, pieces: Iterable[Piece]) -> None:
    """Makes rows of what the journal has of a message beyond its own."""
    end = content_end(connection, message_id)
    insert_rows(connection, "delta", list(joined_rows(message_id, end, beyond(pieces, end))))


def empty_journal(connection: sqlite3.Connection) -> None:
    """Recovery: gives running messages what the journal has of them."""
    pieces: defaultdict[int, list[Piece]] = defaultdict(list)
    for (pieces_json,) in connection.execute("SELECT pieces_json FROM journal ORDER BY id"):
        for message_id, more in json.loads(pieces_json).items():
            pieces[int(message_id)] += more
    for (message_id,) in connection.execute("SELECT id FROM message WHERE status = 'running'").fetchall():
        settle(connection, message_id, pieces[message_id])
    connection.execute("DELETE FROM journal")


def save_flush(connection: sqlite3.Connection, save: Save) -> None:
    """A flush: new content of running messages, and the ends of some. The one place that sets a terminal status."""
    if save.journalled:
        entry = (save.journal_id, encode_json(save.journalled).decode())
        connection.execute("INSERT INTO journal VALUES (?, ?)", entry)
    insert_rows(connection, "delta", save.rows)
    if save.is_trimming:
        connection.execute("DELETE FROM journal WHERE id < ?", (save.journal_floor,))
    for outcome in save.outcomes:
        ending = outcome.ending
        connection.execute(
            "UPDATE message SET status = ?, finish_reason = ?, error_json = ?, usage_json = ?, attempts_json = ?, provider = ?,"
            " model = ?, first_delta_at_ms = created_at_ms + ?, first_text_at_ms = created_at_ms + ?, ended_at_ms = created_at_ms + ?"
            " WHERE id = ? AND status = 'running'",
            (
                ending.status, ending.finish_reason, encode_json(ending.error).decode() if ending.error else None,
                encode_json(outcome.usage).decode() if outcome.usage else None, encode_json(outcome.attempts).decode(), outcome.target.provider.name,
                outcome.target.model, outcome.first_delta_ms, outcome.first_text_ms, outcome.total_ms, outcome.message_id,
            ),
        )  # fmt: skip
        connection.execute(
            "UPDATE conversation SET updated_at_ms = max(updated_at_ms, ?)"
            " WHERE id = (SELECT conversation_id FROM message WHERE id = ?)",
            (now_ms(), outcome.message_id),
        )
    if save.outcomes:
        mark_unindexed(connection, [outcome.message_id for outcome in save.outcomes])


def find_unmerged(connection: sqlite3.Connection) -> tuple[int, int] | None:
    """The answer that has waited longest for its rows to be merged, and when it ended; None: there is none."""
    row = connection.execute(
        "SELECT id, ended_at_ms FROM message WHERE merged = 0 AND role = 'assistant' AND ended_at_ms IS NOT NULL"
        " ORDER BY ended_at_ms LIMIT 1"
    ).fetchone()
    return None if row is None else (row[0], row[1])


def merge_deltas(connection: sqlite3.Connection, message_id: int, ended_at_ms: int, offset: int) -> int | None:
    """Merges some rows of an ended answer, from this offset on. Returns where to go on; None: all is done.

    Rows that follow each other and are of one kind become one of at most FRAME_CHARACTERS_MAX, which bounds a page.
    No character changes its offset, so no cursor can tell. Nothing is done if the answer runs again, or is gone.
    """
    ended = "SELECT 1 FROM message WHERE id = ? AND ended_at_ms = ?"
    if connection.execute(ended, (message_id, ended_at_ms)).fetchone() is None:
        return None
    rows = connection.execute(
        "SELECT offset, kind, CASE WHEN kind IN ('text', 'reasoning') THEN text END FROM delta"
        " WHERE message_id = ? AND offset >= ? ORDER BY offset LIMIT ?",
        (message_id, offset, MERGE_ROWS),
    ).fetchall()
    last = offset
    for group in group_rows(rows):
        last = group[0][0]
        if len(group) > 1:
            between = (message_id, last + 1, group[-1][0])
            connection.execute("DELETE FROM delta WHERE message_id = ? AND offset BETWEEN ? AND ?", between)
            values = ("".join(text for _, _, text in group), message_id, last)
            merged = "UPDATE delta SET text = ?, cuts_json = NULL WHERE message_id = ? AND offset = ?"
            connection.execute(merged, values)
    if len(rows) == MERGE_ROWS:
        return last
    connection.execute("UPDATE message SET merged = 1 WHERE id = ?", (message_id,))
    return None


def group_rows(rows: Iterable[tuple[int, str, str | None]]) -> Iterator[list[tuple[int, str, str]]]:
    """Rows (offset, kind, text) in the groups that may become one row each."""
    group: list[Any] = []
    characters = 0
    for row in rows:
        _, kind, text = row
        characters += len(text or "")
        if group and (kind not in MERGED_KINDS or kind != group[0][1] or characters > FRAME_CHARACTERS_MAX):
            yield group
            group, characters = [], len(text or "")
        group.append(row)
    if group:
        yield group


PATH = (
    "WITH RECURSIVE path (id, parent_id, depth) AS (SELECT id, parent_id, 0 FROM message WHERE id = ?"
    " UNION ALL SELECT message.id, message.parent_id, depth + 1 FROM path JOIN message ON message.id = path.parent_id)"
)


def path_ids(connection: sqlite3.Connection, message_id: int | None) -> list[int]:
    """The ids from the root to a message; None: there is none."""
    rows = connection.execute(f"{PATH} SELECT id FROM path ORDER BY depth DESC", (message_id,))
    return [found for (found,) in rows]


def select_path(connection: sqlite3.Connection, message_id: int | None) -> tuple[Turn, ...]:
    """The turns from the root to a message, with their content; None: there are none."""
    if message_id is None:
        return ()
    rows = connection.execute(
        f"{PATH} SELECT message.id, role, status, params_json, kind, text FROM path JOIN message USING (id)"
        " LEFT JOIN delta ON delta.message_id = message.id ORDER BY depth DESC, offset",
        (message_id,),
    )
    found: dict[int, tuple[sqlite3.Row, list[Delta]]] = {}
    for row in rows:
        content = found.setdefault(row["id"], (row, []))[1]
        content += [Delta(row["kind"], row["text"])] if row["kind"] else []
    return tuple(
        Turn(
            row["role"],
            tuple(join_deltas(with_journalled(connection, row, content))),
            json.loads(row["params_json"]).get("tool_call_id"),
        )
        for row, content in found.values()
    )


def select_message(connection: sqlite3.Connection, owner: str, message_id: int) -> sqlite3.Row:
    """A message's row, with what its conversation has to say. Raises NotFound, also for another owner's."""
    row = connection.execute(
        "SELECT message.*, hidden, conversation.system AS conversation_system"
        " FROM message JOIN conversation ON conversation.id = conversation_id WHERE message.id = ? AND owner = ?",
        (message_id, owner),
    ).fetchone()
    if row is None:
        raise NotFound(f"message_id: there is no message {message_id}")
    return cast(sqlite3.Row, row)


def load_message(connection: sqlite3.Connection, owner: str, message_id: int) -> Message:
    return whole_message(connection, select_message(connection, owner, message_id))


def deltas_from(connection: sqlite3.Connection, message_id: int, cursor: int, *, as_published: bool) -> Iterator[Delta]:
    """What a message's own rows have beyond a cursor, which may stand inside of one."""
    rows = connection.execute(
        "SELECT offset, kind, text, cuts_json FROM delta WHERE message_id = :id AND offset >= coalesce("
        "(SELECT max(offset) FROM delta WHERE message_id = :id AND offset <= :cursor), 0) ORDER BY offset",
        {"id": message_id, "cursor": cursor},
    )
    for offset, kind, text, cuts_json in rows:
        start = 0
        for length in json.loads(cuts_json) if cuts_json and as_published else (len(text),):
            unread = text[max(cursor - offset, start) : start + length]
            start += length
            if unread:
                yield Delta(kind, unread)


def load_page(
    connection: sqlite3.Connection, owner: str, message_id: int, cursor: int, *, as_published: bool = False
) -> Page:
    """Some content from a cursor on, four frames or so, in pieces that make frames of at most 64 KiB.

    `as_published`: each piece is what it was when it was published, as long as its rows have not been merged."""
    row = select_message(connection, owner, message_id)
    end, tail = content_end(connection, message_id), []
    for delta in beyond(journal_pieces(connection, message_id), end) if row["status"] == "running" else ():
        if unread := delta.text[max(cursor - end, 0) :]:
            tail.append(Delta(delta.kind, unread))
        end += len(delta.text)
    found, characters = [], 0
    for delta in itertools.chain(deltas_from(connection, message_id, cursor, as_published=as_published), tail):
        found.append(delta)
        characters += len(delta.text)
        if characters >= FRAME_CHARACTERS_MAX * 4:
            break
    pieces, offset = [], cursor
    for delta in found if as_published else join_deltas(found):
        for piece in split_delta(delta):
            offset += len(piece.text)
            pieces.append((offset, piece))
    return Page(pieces, end, message_of(row, ()))


def summary_of(row: sqlite3.Row, match: Match | None = None) -> ConversationSummary:
    names = ("id", "title", "system", "created_at_ms", "updated_at_ms")
    parameters, running = msgspec.json.decode(row["params_json"], type=Parameters), bool(row["running"])
    return ConversationSummary(
        **{name: row[name] for name in names}, parameters=parameters, running=running, match=match
    )


def list_conversations(
    connection: sqlite3.Connection, owner: str, limit: int, before: tuple[int, int] | None
) -> ConversationList:
    """A page of an owner's conversations; `before` is (updated_at_ms, id) of the last one on the page before."""
    rows = connection.execute(
        f"{SELECT_CONVERSATION} WHERE owner = ? AND hidden = 0 AND (updated_at_ms, id) < (?, ?)"
        " ORDER BY updated_at_ms DESC, id DESC LIMIT ?",
        (owner, *(before or (2**63 - 1, 2**63 - 1)), limit + 1),
    ).fetchall()
    page = [summary_of(row) for row in rows[:limit]]
    return ConversationList(page, f"{page[-1].updated_at_ms}-{page[-1].id}" if len(rows) > limit else None)


def load_conversation(connection: sqlite3.Connection, owner: str, conversation_id: int) -> Conversation:
    summary = summary_of(require_conversation(connection, owner, conversation_id))
    rows = connection.execute(
        "SELECT * FROM message WHERE conversation_id = ? ORDER BY id", (conversation_id,)
    ).fetchall()
    contents: dict[int, list[Delta]] = {row["id"]: [] for row in rows}
    for message_id, kind, text in connection.execute(
        "SELECT message_id, kind, text FROM delta WHERE message_id IN"
        " (SELECT id FROM message WHERE conversation_id = ?) ORDER BY message_id, offset",
        (conversation_id,),
    ):
        contents[message_id].append(Delta(kind, text))
    messages = [message_of(row, with_journalled(connection, row, contents[row["id"]])) for row in rows]
    path = path_ids(connection, newest_leaf(connection, conversation_id))
    return Conversation(**msgspec.structs.asdict(summary), messages=messages, path=path)


def update_conversation(
    connection: sqlite3.Connection, owner: str, conversation_id: int, changes: Mapping[str, Any]
) -> ConversationSummary:
    """Sets title, system or parameters; that is no activity, so the conversation keeps its place in the list."""
    row = require_conversation(connection, owner, conversation_id)
    values = {"title": row["title"], "system": row["system"], **json.loads(row["params_json"]), **changes}
    title, system = values.pop("title"), values.pop("system")
    params_json = encode_json({name: value for name, value in values.items() if value is not None}).decode()
    connection.execute(
        "UPDATE conversation SET title = ?, system = ?, params_json = ? WHERE id = ?",
        (title, system, params_json, conversation_id),
    )
    if title != row["title"]:
        mark_unindexed(connection, [-conversation_id])
    return summary_of(require_conversation(connection, owner, conversation_id))


def delete_conversation(connection: sqlite3.Connection, owner: str, conversation_id: int) -> list[int]:
    """Deletes a conversation with everything in it, unless messages of it are running: then it returns those."""
    require_conversation(connection, owner, conversation_id)
    running = connection.execute(
        "SELECT id FROM message WHERE status = 'running' AND conversation_id = ?", (conversation_id,)
    ).fetchall()
    if not running:
        messages = connection.execute("SELECT id FROM message WHERE conversation_id = ?", (conversation_id,))
        unindex(connection, [-conversation_id, *(row[0] for row in messages)])
        connection.execute("DELETE FROM conversation WHERE id = ?", (conversation_id,))
    return [row[0] for row in running]


def sweep_unstored(connection: sqlite3.Connection, ended_before_ms: int, watched: Sequence[int]) -> int | None:
    """Deletes hidden conversations in which nothing has happened since then, unless somebody reads one of the messages
    `watched`. Returns when the oldest that is left ended; None: there is none."""
    ended = (
        "hidden = 1 AND id NOT IN (SELECT conversation_id FROM message WHERE status = 'running'"
        " UNION ALL SELECT conversation_id FROM message WHERE id IN (SELECT value FROM json_each(:watched)))"
    )
    connection.execute(
        f"DELETE FROM conversation WHERE id IN (SELECT id FROM conversation WHERE {ended} AND updated_at_ms <= :before"
        f" ORDER BY updated_at_ms LIMIT {SWEPT_MAX})",
        {"watched": json.dumps(watched), "before": ended_before_ms},
    )
    oldest = connection.execute(f"SELECT min(updated_at_ms) FROM conversation WHERE {ended}", {"watched": "[]"})
    return cast("int | None", oldest.fetchone()[0])


# ── what a response of section 15 needs: the answer, what it was asked with, what it follows ──


def select_response(connection: sqlite3.Connection, owner: str, message_id: int) -> sqlite3.Row:
    """The row of an answer. Raises NotFound, also for a message of another role."""
    with contextlib.suppress(NotFound):
        row = select_message(connection, owner, message_id)
        if row["role"] == "assistant":
            return row
    raise NotFound(f"response_id: there is no response resp_{message_id}")


def load_response(connection: sqlite3.Connection, owner: str, message_id: int) -> tuple[Message, dict[str, Any]]:
    """An answer, and what its response repeats of its request (nothing, for one that the page asked for)."""
    row = select_response(connection, owner, message_id)
    asked = {"store": not row["hidden"], "instructions": row["system"], **json.loads(row["response_json"] or "{}")}
    asked.pop("input_turns", None)
    return whole_message(connection, row), asked


def input_ids(connection: sqlite3.Connection, row: sqlite3.Row) -> list[int]:
    """The ids of the messages that an answer was asked with, oldest first."""
    path = path_ids(connection, row["parent_id"])
    count = json.loads(row["response_json"] or "{}").get("input_turns", 1)
    return path[max(len(path) - count, 0) :]


def load_input(connection: sqlite3.Connection, owner: str, message_id: int) -> list[tuple[int, Turn]]:
    """What an answer was asked with: (message id, turn), oldest first."""
    row = select_response(connection, owner, message_id)
    ids, turns = input_ids(connection, row), select_path(connection, row["parent_id"])
    return list(zip(ids, turns[len(turns) - len(ids) :], strict=True))


def load_previous(connection: sqlite3.Connection, owner: str, message_id: int) -> tuple[int, tuple[Turn, ...]]:
    """The conversation of an answer that another one is to follow, and the turns up to it. Raises NotFound, Conflict."""
    row = select_response(connection, owner, message_id)
    if row["hidden"]:
        raise NotFound(f"previous_response_id: resp_{message_id} was not stored")
    if row["status"] == "running":
        raise Conflict(f"previous_response_id: resp_{message_id} is still in progress")
    return row["conversation_id"], select_path(connection, message_id)


def delete_response(connection: sqlite3.Connection, owner: str, message_id: int) -> bool:
    """Deletes an answer, and what it was asked with unless another answer has that too; what follows them stays and
    moves up. An empty conversation goes along. Returns False, and does nothing, while the answer is running."""
    row = select_response(connection, owner, message_id)
    if row["status"] == "running":
        return False
    doomed, parent_id = [message_id], row["parent_id"]
    for asked_id in reversed(input_ids(connection, row)):
        if value_of(connection, "SELECT count(*) FROM message WHERE parent_id = ?", asked_id) > 1:
            break
        doomed.append(asked_id)
        parent_id = value_of(connection, "SELECT parent_id FROM message WHERE id = ?", asked_id)
    connection.execute("UPDATE message SET parent_id = ? WHERE parent_id = ?", (parent_id, message_id))
    unindex(connection, doomed)
    connection.execute(f"DELETE FROM message WHERE id {AMONG}", (json.dumps(doomed),))
    if newest_leaf(connection, row["conversation_id"]) is None:
        delete_conversation(connection, owner, row["conversation_id"])
    return True


def is_unnamed(connection: sqlite3.Connection, owner: str, conversation_id: int) -> bool:
    """Whether a conversation has no title but the one that its first message made."""
    first_id = value_of(connection, "SELECT min(id) FROM message WHERE conversation_id = ?", conversation_id)
    path = select_path(connection, first_id)
    title = value_of(connection, "SELECT title FROM conversation WHERE id = ? AND owner = ?", conversation_id, owner)
    return bool(path) and title == make_title(text_of(path[0].content))


def awaits_title(connection: sqlite3.Connection, owner: str, conversation_id: int, message_id: int) -> bool:
    """Whether a model may name a conversation, now that this message is completed: after its first answer, and once."""
    first_answer = "SELECT min(id) FROM message WHERE conversation_id = ? AND role = 'assistant'"
    is_first = value_of(connection, first_answer, conversation_id) == message_id
    return is_first and is_unnamed(connection, owner, conversation_id)


def title_conversation(connection: sqlite3.Connection, owner: str, conversation_id: int, title: str) -> None:
    """Sets a title that a model made, unless somebody has set one meanwhile."""
    if is_unnamed(connection, owner, conversation_id):
        update_conversation(connection, owner, conversation_id, {"title": title})


def load_sessions(connection: sqlite3.Connection) -> list[Session]:
    """Every session that has not expired, the newest last."""
    rows = connection.execute("SELECT * FROM session WHERE expires_at_ms > ? ORDER BY expires_at_ms", (now_ms(),))
    return [Session(*row) for row in rows]


def insert_session(connection: sqlite3.Connection, session: Session) -> None:
    connection.execute("DELETE FROM session WHERE expires_at_ms <= ?", (now_ms(),))
    connection.execute("INSERT INTO session VALUES (?, ?, ?, ?)", session)


def delete_session(connection: sqlite3.Connection, cookie_hash: str) -> None:
    connection.execute("DELETE FROM session WHERE cookie_hash = ?", (cookie_hash,))


class UsageRow(Struct):
    """What one model used on one day (UTC). `estimated`: some of it was not counted by the provider."""

    day: str
    provider: str | None
    model: str | None
    messages: int
    input_tokens: int
    output_tokens: int
    estimated: bool


def sum_usage(connection: sqlite3.Connection, owner: str, days: int) -> list[UsageRow]:
    rows = connection.execute(
        "SELECT date(message.created_at_ms / 1000, 'unixepoch') AS day, provider, model, count(*),"
        " CAST(total(json_extract(usage_json, '$.input_tokens')) AS INTEGER),"
        " CAST(total(json_extract(usage_json, '$.output_tokens')) AS INTEGER),"
        " max(json_extract(usage_json, '$.estimated')) FROM message JOIN conversation ON conversation.id = conversation_id"
        " WHERE owner = ? AND usage_json IS NOT NULL AND message.created_at_ms >= ?"
        " GROUP BY day, provider, model ORDER BY day DESC, provider, model",
        (owner, now_ms() - days * 86_400_000),
    )
    return [
        UsageRow(day, provider, model, messages, asked, answered, bool(estimated))
        for day, provider, model, messages, asked, answered, estimated in rows
    ]


class Store:
    """The database. Every method may raise StoreUnavailable."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = -1
        self._writer: Database | None = None
        self._reader: Database | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: list[tuple[Callable[..., Any], bool, asyncio.Future[Any]]] = []
        self._wake = asyncio.Event()
        self._is_writable = True
        self._touched_at = float("-inf")

    async def open(self) -> int:
        """Locks, migrates and recovers the file; returns how many messages were interrupted. Raises StartError."""
        lock = lock_database(self._path)
        self._lock = lock.descriptor
        try:
            await asyncio.to_thread(remove_left_copies, self._path)
            interrupted = await asyncio.to_thread(partial(prepare_database, self._path, suspect=lock.suspect))
            self._writer = await open_database(self._path, read_only=False)
            self._reader = await open_database(self._path, read_only=True)
        except BaseException:
            await self.close()
            raise
        self._task = asyncio.create_task(self._write_forever(), name="writer")
        return interrupted

    async def close(self) -> None:
        """Ends the writer after what already waits, then both connections, then the lock."""
        if self._task is not None:
            with contextlib.suppress(StoreUnavailable):
                await self.write(lambda connection: None)  # whatever waits is committed before this
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for database in (self._reader, self._writer):
            if database is not None:
                await database.close()
        if self._lock >= 0:
            if self._task is not None:  # it was open, so what is left behind was not found damaged
                with contextlib.suppress(OSError):
                    mark_lock(self._lock, CLEAN)
            os.close(self._lock)
            self._lock = -1

    async def read(self, operation: Callable[..., T], *arguments: Any) -> T:
        """Runs an operation that only reads, in the reader's thread: all that it finds is of one moment."""
        assert self._reader is not None, "the store is open"
        try:
            return await self._reader.run(read_at_once, operation, *arguments)
        except sqlite3.Error as exc:
            raise StoreUnavailable(f"the database cannot be read: {reason_of(exc)}", retry_after_seconds=1) from exc

    async def search(self, owner: str, query: str, limit: int) -> ConversationList:
        """What matches a query, also in texts that came a moment ago, unless they cannot be indexed now."""
        found = await self.read(search_if_complete, owner, query, limit)
        if found is None:
            with contextlib.suppress(StoreUnavailable):
                while await self.write(index_texts):
                    pass
            found = await self.read(search_conversations, owner, query, limit)
        return found

    async def open_copy(self) -> BinaryIO:
        """A copy of the whole database, made on a connection of its own: nobody waits. Whoever gets it closes it."""
        return await asyncio.to_thread(open_copy, self._path)

    async def write(self, operation: Callable[..., T], *arguments: Any, durable: bool = False) -> T:
        """Runs an operation in the next group; returns when that is committed. `durable`: and fsynced."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        bound = (lambda connection: operation(connection, *arguments)) if arguments else operation
        self._waiting.append((bound, durable, future))
        self._wake.set()
        return await future

    async def is_writable(self, seconds: float) -> bool:
        """Whether a write goes through; what was found within the last `seconds` is good enough."""
        if time.monotonic() - self._touched_at > seconds:
            self._touched_at = time.monotonic()
            try:
                await self.write(touch)
                self._is_writable = True
            except StoreUnavailable:
                self._is_writable = False
        return self._is_writable

    async def _write_forever(self) -> None:
        """The only writer: takes all that waits, commits it together, tells each how it went."""
        assert self._writer is not None, "the store is open"
        while True:
            await self._wake.wait()
            self._wake.clear()
            group, self._waiting = self._waiting, []
            durable = any(one[1] for one in group)
            try:
                outcomes = await self._writer.run(commit_together, [one[0] for one in group], durable)
            except sqlite3.Error as exc:
                error = StoreUnavailable(f"the database cannot be written: {reason_of(exc)}", retry_after_seconds=1)
                error.__cause__ = exc
                outcomes = [error] * len(group)
            for (_, _, future), outcome in zip(group, outcomes, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 11. Archives
#
# Conversations as files, and back.
#
# An archive is {"format": "llmchat", "version": 1, "conversations": […]}, complete but for keys, which are stored
# nowhere, and ids, which belong to one database. In their place stands an origin: what a conversation or a message is
# called wherever it goes. What came in keeps the origin that it came with; what was made here is called
# `llmchat:<id>-<created_at_ms>`, since an id is never used again. So what comes in a second time is known, also in the
# database that it came from. For the same reason what /v1/responses repeats of a request stays here: a response's name
# is its message's id, and what it says of the one before it names another.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

Milliseconds = Annotated[int, Meta(ge=0, le=2**53)]
Role = Literal["user", "assistant", "system", "tool"]
Origin = Annotated[str, Meta(min_length=1, max_length=200)]


class ArchivedMessage(Struct, kw_only=True):
    """A message in an archive. `parent` is the origin of the message that it follows; null: it is a first one."""

    origin: Origin
    parent: Origin | None = None
    role: Role
    status: Literal["running", "completed", "stopped", "failed", "interrupted"] = "completed"
    provider: str | None = None
    model: str | None = None
    system: str | None = None  # of this answer alone; null: the conversation's
    params: dict[str, Any] = {}
    content: list[Delta] = []
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"] | None = None
    error: dict[str, Any] | None = None
    usage: Usage | None = None
    attempts: list[dict[str, Any]] = []
    created_at_ms: Milliseconds
    first_delta_at_ms: Milliseconds | None = None
    first_text_at_ms: Milliseconds | None = None
    ended_at_ms: Milliseconds | None = None


class ArchivedConversation(Struct, kw_only=True):
    """A conversation in an archive; its messages stand in the order in which they were made."""

    origin: Origin
    title: str = ""
    system: str = ""
    parameters: Parameters = NO_PARAMETERS
    created_at_ms: Milliseconds
    updated_at_ms: Milliseconds
    messages: list[ArchivedMessage] = []


class Archive(Struct):
    """What an export is, and what an import takes."""

    format: Literal["llmchat"]
    version: Literal[1]
    conversations: list[ArchivedConversation]


ARCHIVE_START, ARCHIVE_END = b'{"format":"llmchat","version":1,"conversations":[', b"]}\n"


def origin_of(row_id: int, created_at_ms: int, origin: str | None) -> str:
    return origin or f"llmchat:{row_id}-{created_at_ms}"


def list_ids(connection: sqlite3.Connection, owner: str) -> list[int]:
    """The ids of an owner's conversations."""
    rows = connection.execute("SELECT id FROM conversation WHERE owner = ? AND hidden = 0 ORDER BY id", (owner,))
    return [conversation_id for (conversation_id,) in rows]


def archive_page(
    connection: sqlite3.Connection, owner: str, conversation_id: int, after: int
) -> tuple[bytes, int | None]:
    """A conversation as JSON, from behind a message's id on (0: from its head on), as far as one send goes.

    Returns it with the last message's id; None: the conversation is whole. Raises NotFound instead of its head.
    """
    page = bytearray() if after else archived_head(require_conversation(connection, owner, conversation_id))
    rows = connection.execute(
        "SELECT message.*, parent.origin AS parent_origin, parent.created_at_ms AS parent_created_at_ms"
        " FROM message LEFT JOIN message AS parent ON parent.id = message.parent_id"
        " WHERE message.conversation_id = ? AND message.id > ? ORDER BY message.id",
        (conversation_id, after),
    )
    for row in rows:
        page += b"," * bool(after) + encode_json(archived_message(connection, row))
        after = row["id"]
        if len(page) > SEND_BYTES_MAX:
            return bytes(page), after
    return bytes(page + b"]}"), None


def archived_head(row: sqlite3.Row) -> bytearray:
    """A conversation as JSON up to its first message."""
    head = ArchivedConversation(
        origin=origin_of(row["id"], row["created_at_ms"], row["origin"]),
        parameters=msgspec.json.decode(row["params_json"], type=Parameters),
        **{name: row[name] for name in ("title", "system", "created_at_ms", "updated_at_ms")},
    )
    return bytearray(encode_json(head).removesuffix(b"]}"))


def archived_message(connection: sqlite3.Connection, row: sqlite3.Row) -> ArchivedMessage:
    message = msgspec.structs.asdict(whole_message(connection, row))
    parent = (row["parent_id"], row["parent_created_at_ms"], row["parent_origin"])
    return ArchivedMessage(
        origin=origin_of(row["id"], row["created_at_ms"], row["origin"]),
        parent=None if row["parent_id"] is None else origin_of(*parent),
        system=row["system"],
        params=json.loads(row["params_json"]),
        first_delta_at_ms=row["first_delta_at_ms"],
        first_text_at_ms=row["first_text_at_ms"],
        ended_at_ms=row["ended_at_ms"],
        **{name: value for name, value in message.items() if name in ArchivedMessage.__struct_fields__},
    )


def load_outline(
    connection: sqlite3.Connection, owner: str, conversation_id: int
) -> tuple[ConversationSummary, list[int], int]:
    """A conversation, the ids of its messages from the first to the newest, and how many are in other branches."""
    summary = summary_of(require_conversation(connection, owner, conversation_id))
    path = path_ids(connection, newest_leaf(connection, conversation_id))
    count = value_of(connection, "SELECT count(*) FROM message WHERE conversation_id = ?", conversation_id)
    return summary, path, count - len(path)


def markdown_head(conversation: ConversationSummary, messages: int, others: int) -> str:
    """The beginning of a conversation as Markdown."""
    title = " ".join(conversation.title.split()) or f"Conversation {conversation.id}"
    span = f"{utc(conversation.created_at_ms)} to {utc(conversation.updated_at_ms)}"
    lines = [f"# {title}", f"*{messages} messages, {span}*"]
    if others:
        lines.append(f"*Not here: messages in other branches ({others}). The export as JSON has them all.*")
    if conversation.system:
        lines.append("**System prompt**\n\n" + quoted(conversation.system))
    return "\n\n".join(lines) + "\n"


def markdown_message(message: Message) -> str:
    """A message as Markdown: who and when, then its content, each kind in a form that can be read."""
    model = "/".join(filter(None, (message.provider, message.model)))
    who = f" ({model})" if model and message.role == "assistant" else ""
    blocks = [
        f"## {message.role.capitalize()}{who}, {utc(message.created_at_ms)}",
        *filter(None, map(markdown_delta, message.content)),
    ]
    if message.error is not None:
        blocks.append(f"*{message.status}: {message.error.get('message', '')}*")
    elif message.status != "completed":
        blocks.append(f"*{message.status}*")
    elif message.finish_reason not in (None, "stop", "tool_calls"):
        blocks.append(f"*cut off: {message.finish_reason}*")
    return "\n" + "\n\n".join(blocks) + "\n"


def markdown_delta(delta: Delta) -> str:
    if delta.kind == "text":
        return close_fence(delta.text.strip("\n"))
    if delta.kind == "reasoning":
        return quoted(f"*Reasoning:* {delta.text.strip()}")
    if delta.kind == "tool_call":
        call = json.loads(delta.text)
        return f"Tool call `{call['name']}`:\n\n{fenced(call['arguments'] or '{}', 'json')}"
    if delta.kind == "image":
        image = json.loads(delta.text)
        return f"*Image ({image['media_type']}, {len(image['data']) * 3 // 4:,} bytes)*"
    return ""  # a signature is for its provider


def utc(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(milliseconds // 1000))


def quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def fenced(text: str, language: str) -> str:
    """The text as a code block; the fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def close_fence(text: str) -> str:
    """The text with its last code block closed: an answer that broke off in one would take in all that follows."""
    fence = ""
    for found in re.finditer(r"^ {0,3}(`{3,}|~{3,})(.*)$", text, re.MULTILINE):
        if not fence and not (found[1][0] == "`" and "`" in found[2]):
            fence = found[1]
        elif fence and found[1].startswith(fence) and not found[2].strip():
            fence = ""
    return f"{text}\n{fence}" if fence else text


# ── what comes in ─────────────────────────────────────────────────────────────────────────────────────────────────────
#
# Three formats become one stream of records: ours; ChatGPT's `conversations.json`, a list of trees under `mapping`; and
# Claude's, a list of `chat_messages`. Neither service documents its own; these are the shapes that their users find in
# their exports. A zip, as both deliver it, is read for its conversations and for the images that they point to. A file
# is read through a window that holds one message of ours or one conversation of theirs, and comes in with a few
# messages in a transaction: whatever breaks, what came before is in, and the same file, mended, brings the rest and
# nothing twice. What is there is never changed. What cannot come in is counted by its reason.
#
# The tools of other services cannot be called from here. Their calls and results are kept to be read, the results
# without an id, so that neither goes upstream when such a conversation goes on (see `answered`).

OTHER_REASONS = "other reasons"
Record = tuple[ArchivedConversation, ArchivedMessage | None]  # None: the conversation begins


class ImportCount(Struct):
    """`present` was there already, and stayed as it was."""

    imported: int = 0
    present: int = 0


class LeftOut(Struct):
    """Something that did not come in: why, how often, and where it was first."""

    reason: str
    count: int
    first: str


class ImportAnswer(Struct):
    conversations: ImportCount
    messages: ImportCount
    left_out: list[LeftOut]

    def leave_out(self, reason: str, where: str, count: int = 1) -> None:
        known = {one.reason: one for one in self.left_out}
        reason = shorten(reason, None)
        if reason not in known and len(known) >= LEFT_OUT_MAX:
            reason = OTHER_REASONS
        if reason not in known:
            known[reason] = LeftOut(reason, 0, shorten(where, None))
        known[reason].count += count
        self.left_out = list(known.values())


NOT_SPACE = re.compile(r"[^ \t\r\n]")
CUT_CHARACTERS = 32  # a value this close to the window's end may go on beyond it
SCAN_JSON = json.JSONDecoder(
    parse_int=lambda digits: int(digits) if len(digits) < 20 else digits,  # what no encoder takes becomes text
    parse_constant=lambda word: None,  # NaN and its like are no JSON
).raw_decode


class JsonWindow:
    """A JSON document, read value by value through a window of text that is as wide as its widest value.

    Raises InvalidRequest with the position for what is no JSON or too wide.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._texts = codecs.iterdecode(chunks, "utf-8-sig")
        self._text = ""
        self._at = 0
        self._gone = 0  # characters before the window
        self._ended = False

    @property
    def position(self) -> int:
        """Of the next character in the document."""
        return self._gone + self._at

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while (found := NOT_SPACE.search(self._text, self._at)) is None:
            self._at = len(self._text)
            if self._ended:
                return ""
            self._widen()
        self._at = found.start()
        return found[0]

    def step(self, character: str) -> None:
        """Steps over the next character, which must be this one."""
        if self.peek() != character:
            self.refuse(f"expected {character}")
        self._at += 1

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = SCAN_JSON(self._text, self._at)
            except json.JSONDecodeError as exc:
                is_cut = "Unterminated" in exc.msg or exc.pos + CUT_CHARACTERS >= len(self._text)
                if self._ended or not is_cut:
                    self.refuse(exc.msg.lower(), exc.pos)
            except RecursionError:
                self.refuse("nested too deep")
            else:
                if self._ended or end + CUT_CHARACTERS < len(self._text):
                    self._at = end
                    return value
            self._widen()

    def items(self, brackets: str = "[]") -> Iterator[None]:
        """Steps through a list; at each step the next value is to be read."""
        self.step(brackets[0])
        if self.peek() != brackets[1]:
            yield
        while self.peek() != brackets[1]:
            self.step(",")
            yield
        self.step(brackets[1])

    def members(self) -> Iterator[str]:
        """Steps through an object; at each step, whose name is given, the value is to be read."""
        for _ in self.items("{}"):
            if self.peek() != '"':
                self.refuse("expected a name in quotes")
            name = self.value()
            self.step(":")
            yield name

    def _widen(self) -> None:
        """Drops what was read, and doubles the rest."""
        parts = [self._text[self._at :]]
        self._gone += self._at
        self._at, wanted = 0, len(parts[0]) + 1
        if wanted > ARCHIVE_VALUE_CHARACTERS_MAX:
            self.refuse(f"one value is longer than {ARCHIVE_VALUE_CHARACTERS_MAX:,} characters, the limit,")
        try:
            while wanted > 0:
                parts.append(next(self._texts))
                wanted -= len(parts[-1])
        except StopIteration:
            self._ended = True
        except UnicodeDecodeError as exc:
            self.refuse(f"not UTF-8: {exc.reason}", sum(map(len, parts)) + len(exc.object[: exc.start].decode()))
        self._text = "".join(parts)

    def refuse(self, what: str, at: int | None = None) -> NoReturn:
        at = self._at if at is None else at
        ends = ", where it ends" if self._ended and not self._text[at:].strip() else ""
        raise InvalidRequest(f"body: cannot be imported: {what} at character {self._gone + at:,}{ends}")


@dataclass
class ArchiveFile:
    """A file that is read. `image` finds an image by ChatGPT's name for it; None: it is not there."""

    window: JsonWindow
    answer: ImportAnswer
    image: Callable[[str], Delta | None]
    where: str = ""  # what is read just now: its title, or its place in the file

    def leave_out(self, reason: str, count: int = 1) -> None:
        self.answer.leave_out(reason, self.where, count)


def storable(value: Any, depth: int = 1) -> Any:
    """A value of a file as the database and every encoder can hold it. Raises ValueError for deep nesting."""
    if isinstance(value, str):
        return without_halves(value).replace("\0", "\ufffd")
    if isinstance(value, dict | list) and depth > NESTING_MAX:
        raise ValueError(f"nested deeper than {NESTING_MAX} levels")
    if isinstance(value, dict):
        return {storable(name): storable(below, depth + 1) for name, below in value.items()}
    return [storable(below, depth + 1) for below in value] if isinstance(value, list) else value


# ── ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class StoredCall(Struct):
    """The text of a tool_call."""

    id: str
    name: str
    arguments: str


class StoredImage(Struct):
    """The text of an image."""

    media_type: Literal["image/png", "image/jpeg", "image/gif", "image/webp"]
    data: Annotated[str, Meta(pattern="^[A-Za-z0-9+/]+={0,2}$")]


class StoredParameters(Parameters, frozen=True):
    """The params of a message."""

    tool_call_id: str | None = None


STORED_KINDS: dict[str, Any] = {"tool_call": StoredCall, "image": StoredImage, "signature": dict[str, str]}
NOT_OURS = (msgspec.MsgspecError, ValueError)


def our_conversation(head: dict[str, Any], messages: Iterator[Any], source: ArchiveFile) -> Iterator[Record]:
    """A conversation of our own format; a message that makes no sense is left out, and so is all below a head."""
    try:
        conversation = msgspec.convert(storable({**head, "messages": []}), ArchivedConversation)
    except NOT_OURS as exc:
        source.leave_out(f"a conversation with its messages: {in_json_words(exc)}", 1 + sum(1 for _ in messages))
        return
    source.where = conversation.title or source.where
    yield conversation, None
    for value in messages:
        try:
            message = our_message(value)
        except NOT_OURS as exc:
            source.leave_out(f"a message: {in_json_words(exc)}")
        else:
            yield conversation, message


def our_message(value: Any) -> ArchivedMessage:
    """A message of an archive. Raises ValueError and MsgspecError for what could not be one."""
    content = value.pop("content", []) if isinstance(value, dict) else []
    message = msgspec.convert(storable(value), ArchivedMessage)
    msgspec.convert(message.params, StoredParameters)
    for delta in msgspec.convert(content, list[Delta]):
        if delta.kind in STORED_KINDS:
            msgspec.json.decode(delta.text, type=STORED_KINDS[delta.kind])
        elif delta.kind not in MERGED_KINDS:
            raise ValueError(f"content of kind {delta.kind!r}")
        message.content += [Delta(delta.kind, without_halves(delta.text))] if delta.text else []
    return message


# ── ChatGPT's and Claude's ────────────────────────────────────────────────────────────────────────────────────────────


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def texts_in(document: Any, *names: str) -> list[str]:
    """Those of these members that are texts with something in them."""
    found = [document.get(name) for name in names] if isinstance(document, dict) else []
    return [storable(one) for one in found if isinstance(one, str) and one.strip()]


def text_in(document: Any, *names: str) -> str:
    """The first of these members that is a text with something in it; empty: none is."""
    return next(iter(texts_in(document, *names)), "")


def deltas_of(kind: str, texts: Sequence[str], between: str = "\n\n") -> list[Delta]:
    """Texts as one delta; no texts, no delta."""
    return [Delta(kind, between.join(texts))] if texts else []


def milliseconds_of(document: Mapping[str, Any], *names: str) -> int:
    """The first time among these members, as seconds since 1970 or as ISO 8601, in milliseconds; 0: there is none."""
    for value in map(document.get, names):
        with contextlib.suppress(ValueError, OverflowError):
            if isinstance(value, str):
                at = datetime.fromisoformat(value)
                value = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
            if isinstance(value, int | float) and 0 <= value < 2**43:
                return round(value * 1000)
    return 0


def foreign_origin(service: str, *names: Any) -> str:
    """An origin of the first name that is one. Other people's names may be anything, so a strange one is hashed."""
    name = next((one for one in names if isinstance(one, str) and one), json.dumps(names))
    plain = re.fullmatch(r"[\x21-\x7e]{1,100}", name)
    return f"{service}:{name if plain else hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()}"


def parents_first(parents: Mapping[str, str | None]) -> Iterable[str]:
    """Every node after its parent, else in the order given. A circle is cut above the node that is met first."""
    placed: dict[str, None] = {}
    for node in parents:
        climbed: dict[str, None] = {}
        above: str | None = node
        while above is not None and above not in placed and above not in climbed:
            climbed[above] = None
            above = parents.get(above)
        circle = [above] if above in climbed else []
        placed.update(dict.fromkeys([*circle, *reversed(climbed)]))
    return placed


def foreign_conversation(
    service: str, document: Mapping[str, Any], parents: Mapping[str, str | None],
    made: Mapping[str, Sequence[ArchivedMessage]],
) -> ArchivedConversation:  # fmt: skip
    """A conversation of another service from what its nodes became: each message is linked to the next one above it,
    the newest leaf is the last of all, and what the system said becomes the system prompt."""
    created_at_ms = milliseconds_of(document, "create_time", "created_at") or now_ms()
    said: list[str] = []
    kept: list[ArchivedMessage] = []
    above: dict[str | None, str | None] = {}
    for node in parents_first(parents):
        above[node] = above.get(parents.get(node))
        for message in made.get(node, ()):  # it may be a parent that is not there
            if message.role == "system":
                said.append(text_of(message.content))
                continue
            message.created_at_ms = message.created_at_ms or created_at_ms
            message.parent, above[node] = above[node], message.origin
            kept.append(message)
    newest = above.get(text_in(document, "current_node", "current_leaf_message_uuid"))
    if newest not in {message.parent for message in kept}:
        kept.sort(key=lambda message: message.origin == newest)
    asked = next((text_of(message.content) for message in kept if message.role == "user"), "")
    ids = [document.get(name) for name in ("conversation_id", "id", "uuid", "created_at")]
    return ArchivedConversation(
        origin=foreign_origin(service, *ids, next(iter(made), None)),
        title=text_in(document, "title", "name")[:200] or make_title(asked),
        system="\n\n".join(said)[:SYSTEM_CHARACTERS_MAX],
        created_at_ms=created_at_ms,
        updated_at_ms=max(milliseconds_of(document, "update_time", "updated_at"), created_at_ms),
        messages=kept,
    )


def foreign_message(
    origin: str, role: str, content: list[Delta], message: Mapping[str, Any], source: ArchiveFile, **answer: Any
) -> list[ArchivedMessage]:
    """The message, or nothing if it cannot come in. `answer`: what is known of one of an assistant."""
    if role not in get_args(Role):
        source.leave_out(f"a message of the role {role!r}")
    elif content:
        known = answer if role == "assistant" else {}
        at = milliseconds_of(message, "create_time", "created_at")
        return [ArchivedMessage(origin=origin, role=cast(Role, role), content=content, created_at_ms=at, **known)]
    elif role != "system":  # the first one of most conversations says nothing
        source.leave_out("a message without content")
    return []


def foreign_call(call_id: str, name: str, arguments: str) -> list[Delta]:
    """A call of another service's tool; arguments that are no JSON become its only one."""
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        arguments = json.dumps({"input": arguments}, ensure_ascii=False)
    call = StoredCall(storable(call_id), name, storable(arguments))
    return [Delta("tool_call", encode_json(call).decode())]


def chatgpt_conversation(document: Mapping[str, Any], source: ArchiveFile) -> ArchivedConversation:
    """{title, create_time, update_time, mapping: {id: {parent, children, message}}, current_node, conversation_id}.

    A node's own word for its parent counts more than another's for its children, whose order is the siblings'.
    """
    nodes = {key: node for key, node in document["mapping"].items() if isinstance(node, dict)}
    claimed: dict[str, tuple[int, str | None]] = {}
    for key, node in nodes.items():
        for rank, child in enumerate(listed(node.get("children"))):
            if isinstance(child, str):
                claimed.setdefault(child, (rank, key))
    parents: dict[str, str | None] = {}
    for key in sorted(nodes, key=lambda key: claimed.get(key, (0,))[0]):
        given = nodes[key].get("parent")
        parents[key] = given if isinstance(given, str) and given in nodes else claimed.get(key, (0, None))[1]
    made = {key: chatgpt_message(key, node.get("message"), source) for key, node in nodes.items()}
    return foreign_conversation("chatgpt", document, parents, made)


def chatgpt_message(key: str, message: Any, source: ArchiveFile) -> list[ArchivedMessage]:
    """What a node becomes: a message, or nothing. Nodes without a message only hold the tree together."""
    if not isinstance(message, dict):
        return []
    role, kind = text_in(message.get("author"), "role"), text_in(message.get("content"), "content_type")
    if kind == "user_editable_context":  # the user's own instructions, hidden as they are
        role = "system"
    elif kind == "model_editable_context" or within(message, "metadata", "is_visually_hidden_from_conversation"):
        source.leave_out("hidden by ChatGPT")
        return []
    finish = text_in(within(message, "metadata", "finish_details"), "type")
    return foreign_message(
        foreign_origin("chatgpt", key), role, chatgpt_deltas(key, role, message, source), message, source,
        provider="openai", model=text_in(message.get("metadata"), "model_slug") or None,
        status="stopped" if finish == "interrupted" else "completed", finish_reason=FINISH_REASONS.get(finish),
    )  # fmt: skip


def chatgpt_deltas(key: str, role: str, message: Mapping[str, Any], source: ArchiveFile) -> list[Delta]:
    """A message's content; what is addressed to a tool is a call of it."""
    content, recipient = message.get("content"), text_in(message, "recipient")
    deltas = chatgpt_content(content, source) if isinstance(content, dict) else []
    if role != "assistant":
        return deltas
    if recipient not in ("", "all"):
        return foreign_call(key, recipient, text_in(content, "text") or text_of(deltas))
    kept = [delta for delta in deltas if delta.kind != "image"]
    if len(kept) < len(deltas):
        source.leave_out("an image in an answer, which no provider takes back")
    return kept


def chatgpt_content(content: dict[str, Any], source: ArchiveFile) -> list[Delta]:
    """What a message's content says, whichever of its many shapes it has."""
    kind, text = text_in(content, "content_type"), text_in(content, "text")
    if kind in ("thoughts", "reasoning_recap"):
        thoughts = [texts_in(one, "summary", "content") for one in (content, *listed(content.get("thoughts")))]
        return deltas_of("reasoning", [text for texts in thoughts for text in texts])
    if kind == "code":
        return deltas_of("text", [fenced(text, text_in(content, "language"))] if text else [])
    if kind == "user_editable_context":
        return deltas_of("text", texts_in(content, "user_profile", "user_instructions"))
    parts = (chatgpt_part(part, source) for part in listed(content.get("parts")) or [content])
    runs = itertools.groupby(filter(None, parts), key=lambda delta: delta.kind)
    joined = (deltas_of(kind, [one.text for one in run], "\n") if kind == "text" else run for kind, run in runs)
    return list(itertools.chain.from_iterable(joined))


def chatgpt_part(part: Any, source: ArchiveFile) -> Delta | None:
    """A part of a message: a text, an image, or one of the objects that tools leave."""
    part = {"content_type": "text", "text": part} if isinstance(part, str) else part
    kind, body = text_in(part, "content_type"), text_in(part, "text", "result", "content", "name")
    if kind == "image_asset_pointer":
        if image := source.image(text_in(part, "asset_pointer")):
            return image
        source.leave_out("an image that is not in the file")
    elif kind.endswith(("asset_pointer", "video")) or (not body and kind not in ("text", "multimodal_text")):
        source.leave_out(f"content of the type {kind or 'none'!r}")
    elif body:
        return Delta("text", "\n\n".join([*texts_in(part, "title", "url"), body]))
    return None


def claude_conversation(document: Mapping[str, Any], source: ArchiveFile) -> ArchivedConversation:
    """{uuid, name, created_at, updated_at, chat_messages: [{uuid, sender, text, content, created_at, attachments}]}.

    The messages are a list; where they say whom they follow, a tree.
    """
    parents: dict[str, str | None] = {}
    made: dict[str, list[ArchivedMessage]] = {}
    before: str | None = None
    for index, message in enumerate(document["chat_messages"]):
        if not isinstance(message, dict):
            source.leave_out("a message that is no object")
            continue
        key = text_in(message, "uuid")
        key = key if key and key not in made else f"#{index}"
        parents[key] = text_in(message, "parent_message_uuid") if "parent_message_uuid" in message else before
        made[key] = claude_messages(key, message, text_in(document, "model"), source)
        before = key
    return foreign_conversation("claude", document, parents, made)


def claude_messages(key: str, message: Mapping[str, Any], model: str, source: ArchiveFile) -> list[ArchivedMessage]:
    """What a message becomes: itself, and where tools gave results in it, one for each of those and one after it."""
    role = text_in(message, "sender").replace("human", "user")
    runs = [(role, claude_attachments(message, source))]
    for index, block in enumerate(listed(message.get("content")) or [{"type": "text", "text": message.get("text")}]):
        if text_in(block, "type") == "tool_result":
            runs += [("tool", claude_result(block.get("content"))), (role, [])]
        else:
            runs[-1][1].extend(claude_block(block, f"{key}-{index}", source))
    finish_reason = FINISH_REASONS.get(text_in(message, "stop_reason"))
    answer: dict[str, Any] = {"provider": "anthropic", "model": model or None, "finish_reason": finish_reason}
    made: list[ArchivedMessage] = []
    for index, run in [one for one in enumerate(runs) if one[1][1]] or [(0, runs[0])]:
        origin = foreign_origin("claude", f"{key}/{index}" if index else key)
        made += foreign_message(origin, *run, message, source, **answer)
    return made


def claude_attachments(message: Mapping[str, Any], source: ArchiveFile) -> list[Delta]:
    """The texts of attached files; of other files an export has no more than the names."""
    texts = [
        f"{text_in(attached, 'file_name') or 'Attachment'}:\n\n{fenced(text, '')}\n\n"
        for attached in listed(message.get("attachments"))
        if (text := text_in(attached, "extracted_content"))
    ]
    for _ in listed(message.get("files")):
        source.leave_out("a file that is not in the export")
    return deltas_of("text", texts, "")


def claude_block(block: Any, call_id: str, source: ArchiveFile) -> list[Delta]:
    kind = text_in(block, "type")
    if kind in ("text", "voice_note"):
        return deltas_of("text", texts_in(block, "text"))
    if kind == "thinking":
        return deltas_of("reasoning", texts_in(block, "thinking"))
    if kind == "tool_use":
        arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
        return foreign_call(text_in(block, "id") or call_id, text_in(block, "name"), arguments)
    if kind != "token_budget":
        source.leave_out(f"content of the type {kind or 'none'!r}")
    return []


def claude_result(content: Any) -> list[Delta]:
    """What a tool gave back, as text."""
    blocks = [{"text": content}] if isinstance(content, str) else listed(content)
    texts = list(filter(None, (text_in(block, "text", "title", "url") for block in blocks)))
    return deltas_of("text", texts or ([shorten(json.dumps(content), None)] if content else []))


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_document(source: ArchiveFile) -> Iterator[Record]:
    """A list of conversations; or an archive of ours, which has one; or one conversation by itself."""
    start = source.window.peek()
    if start not in ("{", "["):
        source.window.refuse("expected a JSON list or object, or a zip,")
    yield from read_object(source) if start == "{" else read_list(source)
    if source.window.peek():
        source.window.refuse("something follows the end")


def read_list(source: ArchiveFile) -> Iterator[Record]:
    for _ in source.window.items():
        yield from read_conversation(source)


def read_object(source: ArchiveFile) -> Iterator[Record]:
    """An archive of ours, or a list under the same name, or one conversation of another service by itself."""
    window, head, has_list = source.window, dict[str, Any](), False
    for name in window.members():
        if name != "conversations" or window.peek() != "[":
            head[name] = window.value()
            continue
        if head.get("format") == "llmchat" and head.get("version") != 1:
            version = shorten(str(head.get("version")), None)
            raise InvalidRequest(f"version: {version} was made by a newer llmchat; this one knows 1")
        has_list = True
        yield from read_list(source)
    if "mapping" in head or "chat_messages" in head:
        yield from whole_conversation(head, source)
    elif not has_list:
        raise InvalidRequest("body: holds no conversations of a format that is known")


def read_conversation(source: ArchiveFile) -> Iterator[Record]:
    """The next conversation. Messages of ours are read one by one: they may hold many images."""
    window, head, is_read = source.window, dict[str, Any](), False
    source.where = f"character {window.position:,}"
    if window.peek() != "{":
        window.value()
        source.leave_out("not a conversation")
        return
    for name in window.members():
        if name == "messages" and "origin" in head and window.peek() == "[":
            is_read = True
            yield from our_conversation(head, (window.value() for _ in window.items()), source)
        else:
            head[name] = window.value()
    if not is_read:
        yield from whole_conversation(head, source)


def whole_conversation(head: dict[str, Any], source: ArchiveFile) -> Iterator[Record]:
    """A conversation that was read whole, of whatever service."""
    source.where = text_in(head, "title", "name") or source.where
    if "origin" in head and isinstance(head.get("messages"), list):
        yield from our_conversation(head, iter(head.pop("messages")), source)
        return
    try:
        if isinstance(head.get("mapping"), dict):
            found = chatgpt_conversation(head, source)
        elif isinstance(head.get("chat_messages"), list):
            found = claude_conversation(head, source)
        else:
            source.leave_out("not a conversation of a format that is known")
            return
    except (ValueError, RecursionError) as exc:
        source.leave_out(f"a conversation that makes no sense: {reason_of(exc)}")
        return
    if not found.messages:
        source.leave_out("a conversation without a message")
        return
    yield found, None
    for message in found.messages:
        yield found, message


IMAGE_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}


def image_type(data: bytes) -> str | None:
    """What the bytes of an image say that it is, whatever its label does; None: no image that providers take."""
    return next((kind for start, kind in IMAGE_SIGNATURES.items() if data.startswith(start)), None)


IMAGE_NAME = re.compile(r"file[-_][A-Za-z0-9]+")


@contextlib.contextmanager
def zip_errors() -> Iterator[None]:
    """Raises InvalidRequest for everything that can be wrong with a zip; one with a password, or packed in a way that
    zipfile does not know, is a RuntimeError."""
    import zipfile

    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError) as exc:
        raise InvalidRequest(f"body: is a zip that cannot be read: {reason_of(exc)}") from exc


def check_zip_entries(file: BinaryIO) -> None:
    """Raises InvalidRequest if the table of contents is too big to be read (APPNOTE.TXT, 4.3.16 and 4.3.15)."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - 65_557)  # the end record, 22 bytes, and the longest comment
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    entries_bytes = int.from_bytes(tail[end + 12 : end + 16], "little")
    if end < 0 or entries_bytes > ARCHIVE_ENTRIES_BYTES_MAX or b"PK\x06\x07" in tail[max(end - 20, 0) : end]:
        raise InvalidRequest("body: is a zip that is broken, or has too many files in it")
    file.seek(0)


class Unzipper:
    """Reads files of a zip, in all no more than ARCHIVE_BYTES_MAX: a small zip can hold a world of zeros."""

    def __init__(self, file: BinaryIO) -> None:
        import zipfile

        check_zip_entries(file)
        with zip_errors():
            self._archive = zipfile.ZipFile(file)
        self._left = ARCHIVE_BYTES_MAX
        named = ((IMAGE_NAME.match(name.rpartition("/")[2]), name) for name in self._archive.namelist())
        self._images = {found[0]: name for found, name in named if found}

    def documents(self) -> list[str]:
        """The files that hold conversations, in order. Raises InvalidRequest: there is none."""
        names = [name for name in self._archive.namelist() if re.search(r"(^|/)conversations(-\d+)?\.json$", name)]
        if not names:
            raise InvalidRequest("body: is a zip without a conversations.json in it")
        return sorted(names)

    def read(self, name: str) -> Iterator[bytes]:
        """A file in pieces; no more comes out than its entry says.

        Only deflate's can be taken out in pieces: of bzip2's and LZMA's one may be gigabytes.
        """
        entry = self._archive.getinfo(name)
        self._left -= entry.file_size
        if self._left < 0:
            raise TooLarge(f"body: what comes out of the zip has more than {ARCHIVE_BYTES_MAX:,} bytes, the limit")
        with zip_errors():
            if entry.compress_type not in (0, 8):
                raise ValueError("its files are neither stored nor deflated")
            with self._archive.open(name) as file:
                while data := file.read(ARCHIVE_READ_BYTES):
                    yield data

    def image(self, pointer: str) -> Delta | None:
        """The image that `file-service://file-…` or `sediment://file_…` points to."""
        found = IMAGE_NAME.match(pointer.rpartition("/")[2])
        name = self._images.get(found[0]) if found else None
        if name is None or self._archive.getinfo(name).file_size > IMAGE_BYTES_MAX:
            return None
        data = b"".join(self.read(name))
        if (media_type := image_type(data)) is None:
            return None
        stored = {"media_type": media_type, "data": base64.b64encode(data).decode()}
        return Delta("image", encode_json(stored).decode())


def read_archive(file: BinaryIO, answer: ImportAnswer) -> Iterator[Record]:
    """The records of a file, which is JSON, or a zip with JSON in it. Raises InvalidRequest, TooLarge."""
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if is_zip:
        unzipper = Unzipper(file)
        for name in unzipper.documents():
            yield from read_document(ArchiveFile(JsonWindow(unzipper.read(name)), answer, unzipper.image))
    else:
        chunks = iter(partial(file.read, ARCHIVE_READ_BYTES), b"")
        yield from read_document(ArchiveFile(JsonWindow(chunks), answer, lambda pointer: None))


# ── into the database ─────────────────────────────────────────────────────────────────────────────────────────────────


def grouped(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records in groups for one transaction each; those before a failure come before it."""
    lightest = ARCHIVE_GROUP_CHARACTERS // ARCHIVE_GROUP_MESSAGES
    group: list[Record] = []
    weight = 0
    try:
        for conversation, message in records:
            group.append((conversation, message))
            weight += max(lightest, sum(len(delta.text) for delta in message.content) if message else 0)
            if weight >= ARCHIVE_GROUP_CHARACTERS:
                yield group
                group, weight = [], 0
    except LlmchatError:
        yield group
        raise
    yield group


def import_records(connection: sqlite3.Connection, owner: str, answer: ImportAnswer, records: Sequence[Record]) -> None:
    """Stores what is not there yet, and counts it."""
    for conversation, message in records:
        conversation_id = find_by_origin(connection, "conversation", "owner", owner, conversation.origin)
        if message is None:
            answer.conversations.imported += conversation_id is None
            answer.conversations.present += conversation_id is not None
        if conversation_id is None:
            conversation_id = import_conversation(connection, owner, conversation)
        if message is None:
            continue
        find = partial(find_by_origin, connection, "message", "conversation_id", conversation_id)
        if find(message.origin) is not None:
            answer.messages.present += 1
            continue
        parent_id = None if message.parent is None else find(message.parent)
        if message.parent is not None and parent_id is None:
            reason = "a parent that is not in the file: its messages became first ones"
            answer.leave_out(reason, conversation.title)
        import_message(connection, owner, conversation_id, parent_id, message)
        answer.messages.imported += 1
        connection.execute(
            "UPDATE conversation SET updated_at_ms = ? WHERE id = ? AND updated_at_ms < ?",
            (conversation.updated_at_ms, conversation_id, conversation.updated_at_ms),
        )
    while index_texts(connection):
        pass


def find_by_origin(
    connection: sqlite3.Connection, table: str, scope: str, within: str | int, origin: str
) -> int | None:
    """The id of what has this origin, because it came in with it or because it was made here."""
    made_here = re.fullmatch("llmchat:([0-9]{1,15})-([0-9]{1,15})", origin)
    found = value_of(
        connection,
        f"SELECT id FROM {table} WHERE {scope} = ? AND origin = ? UNION ALL"
        f" SELECT id FROM {table} WHERE {scope} = ? AND origin IS NULL AND id = ? AND created_at_ms = ?",
        *(within, origin, within, *(made_here.groups() if made_here else (None, None))),
    )
    return cast("int | None", found)


def import_conversation(connection: sqlite3.Connection, owner: str, conversation: ArchivedConversation) -> int:
    columns = {
        name: getattr(conversation, name) for name in ("origin", "title", "system", "created_at_ms", "updated_at_ms")
    }
    params_json = encode_json(conversation.parameters).decode()
    conversation_id = insert_row(connection, "conversation", owner=owner, params_json=params_json, **columns)
    mark_unindexed(connection, [-conversation_id])
    return conversation_id


def import_message(
    connection: sqlite3.Connection, owner: str, conversation_id: int, parent_id: int | None, message: ArchivedMessage
) -> None:
    """Stores a message that is not there yet. Nobody produces what was running: it is interrupted."""
    error = message.error
    if message.status == "failed" and error is None:
        error = InternalError("the error was not kept").detail()
    message_id = insert_message(
        connection, conversation_id, parent_id, message.role,
        "interrupted" if message.status == "running" else message.status, message.created_at_ms,
        provider=message.provider, model=message.model, params_json=encode_json(message.params).decode(),
        system=message.system, finish_reason=message.finish_reason, error_json=None if error is None else encode_json(error).decode(),
        usage_json=None if message.usage is None else encode_json(message.usage).decode(),
        attempts_json=encode_json(message.attempts).decode(), first_delta_at_ms=message.first_delta_at_ms,
        first_text_at_ms=message.first_text_at_ms,
        ended_at_ms=message.created_at_ms if message.ended_at_ms is None else message.ended_at_ms,
        origin=message.origin, merged=1,
    )  # fmt: skip
    insert_content(connection, message_id, message.content)
    mark_unindexed(connection, [message_id])


async def import_archive(store: Store, owner: str, file: BinaryIO) -> ImportAnswer:
    """Brings in a file, a few messages in a transaction. Raises InvalidRequest and TooLarge, which say what came in."""
    answer = ImportAnswer(ImportCount(), ImportCount(), [])
    groups = grouped(read_archive(file, answer))
    failure: LlmchatError | None = None
    try:
        while (group := await asyncio.to_thread(next, groups, None)) is not None:
            await store.write(import_records, owner, answer, group)
    except (InvalidRequest, TooLarge) as exc:
        failure = exc
    await store.write(touch, durable=True)  # and with it everything before
    if failure is not None:
        came = f"{answer.conversations.imported:,} conversations and {answer.messages.imported:,} messages"
        raise type(failure)(f"{failure.message}; {came} came in before") from failure
    return answer


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 12. Generations
#
# The way of a delta. A producer (one task per generation, owned here and by no request) asks its provider and sleeps
# until the answer's end. What arrives meanwhile is kept as bytes and tells the flusher (one task), which has every such
# generation decode them (`collect`), commits what all of them have pending in one transaction, and only then publishes
# it: encoded once, into the generation's ring and to every subscriber. So no client ever holds a character that the
# database does not, many generations share a decoder's run and a commit, and a fast stream coalesces into fewer, larger
# events by itself. The flusher works at once when it was idle and paces itself by what a flush costs.
#
# A subscriber is one loop, the same for a first connection, a resume, a laggard and a finished message: what lies
# between its cursor and the ring comes from the store, then the ring, then what is published. A client that keeps up is
# written to then and there, without waking a task; for one that does not, there is a queue. Nobody waits for it: a
# queue that is full is thrown away, and the loop begins again at its cursor.
#
# Whoever ends a generation (the producer, stop, a guard, drain) calls `_end`, first one wins, and the flusher writes it
# together with the last deltas. If the database cannot be written, pending content is kept and tried again, reading
# from the providers pauses because what has arrived is bounded, and after FLUSH_PATIENCE_SECONDS the generations end as
# `failed` for everyone who looks on; their content and status are still written when the database is back.
#
# Also here, since they follow an answer's start or end: the indexing of its texts, its title, the merging of its rows,
# the sweep of what nobody stored, and the return of memory.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

log = logging.getLogger("llmchat")

SEAM_CHARACTERS_MAX = 400  # of an answer's end that a continuation may repeat
SEAM_CHARACTERS_MIN = 4  # a shorter repeat is a coincidence
QUEUE_EVENTS_MAX = 256  # of one subscriber; beyond it, or beyond SEND_BYTES_MAX, it lags
TITLE_SECONDS = 60  # for a model to name a conversation
TITLE_SAMPLE_CHARACTERS = 2_000  # of the question and of the answer that it is shown
TITLE_PROMPT = (
    "Give this conversation a title of two to six words, in its own language. Answer with the title alone.\n\n"
    "User: {question}\n\nAssistant: {answer}"
)
FLUSH_BURST_SECONDS = 0.02  # how far the pace may be ahead of itself: a stream at 50 deltas/s is never held up


def start_data(about: Generation | Message, message_id: int, status: str, offset: int) -> dict[str, Any]:
    """The data of a `start` event."""
    return {
        "conversation_id": about.conversation_id,
        "message_id": message_id,
        "parent_id": about.parent_id,
        "provider": about.provider,
        "model": about.model,
        "status": status,
        "offset": offset,
    }


def encode_start(data: dict[str, Any]) -> bytes:
    return RETRY_LINE + encode_event("start", data, data["offset"])


def encode_end(ending: Ending, usage: Usage | None, timing: Timing) -> bytes:
    """The last frame of every stream."""
    return encode_event(
        "end",
        {
            "status": ending.status,
            "finish_reason": ending.finish_reason,
            "usage": usage,
            "timing": timing,
            "error": ending.error,
        },
    )


def encode_end_of(message: Message) -> bytes:
    return encode_end(Ending(message.status, message.finish_reason, message.error), message.usage, message.timing)


class Seam:
    """Joins a continued answer to what was there: drops what the model says again.

    Text is held back only while it may still be a repeat. `least` is how many characters make a repeat: models that
    are asked to go on begin again at a word or a sentence, those that are given a prefill at most with white space.
    """

    def __init__(self, before: str, prefilled: bool) -> None:
        self._before = before[len(before.rstrip()) :] if prefilled else before[-SEAM_CHARACTERS_MAX:]
        self._least = 1 if prefilled else SEAM_CHARACTERS_MIN
        self._held: str | None = ""

    def join(self, deltas: Iterable[Delta]) -> list[Delta]:
        """The deltas without what the text says again."""
        joined = [Delta("text", self.feed(one.text)) if one.kind == "text" else one for one in deltas]
        return [one for one in joined if one.text]

    def feed(self, text: str) -> str:
        """What of the text is new, as far as that is known yet."""
        if self._held is None:
            return text
        self._held += text
        longest = range(len(self._held) + 1, len(self._before) + 1)
        if any(self._before[-length:].startswith(self._held) for length in longest):
            return ""
        return self.end()

    def end(self) -> str:
        """What was held back and is no repeat; from here on, everything passes."""
        held, self._held = self._held or "", None
        lengths = range(min(len(held), len(self._before)), self._least - 1, -1)
        repeat = next((length for length in lengths if self._before.endswith(held[:length])), 0)
        return held[repeat:]


class Subscription:
    """Where a subscriber meets what is published. `cursor` follows what was sent, or taken out of the queue to be.

    While its subscriber waits, everything before has been sent, and a frame goes straight to `send_now`, without waking a
    task; only what that refuses, since the client does not keep up, is queued.
    """

    __slots__ = ("_bytes", "_is_awaited", "_send_now", "cursor", "lagging", "queue")

    def __init__(self, cursor: int, send_now: Callable[[bytes], bool]) -> None:
        self.cursor = cursor
        self.queue: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(QUEUE_EVENTS_MAX)
        self.lagging = False
        self._bytes = 0
        self._is_awaited = False
        self._send_now = send_now

    def put(self, offset: int, frame: bytes) -> None:
        """Takes a frame, or gives up: whoever reads too slowly starts again from the store."""
        if self._is_awaited and self._send_now(frame):
            self.cursor = offset
        elif self.queue.full() or self._bytes > SEND_BYTES_MAX:
            self.lagging = True
            self.drop()
            self.wake()
        elif not self.lagging:
            self._bytes += len(frame)
            self._is_awaited = False
            self.queue.put_nowait((offset, frame))

    def wake(self, frame: bytes = b"") -> None:
        """Has the reader look up, should it wait, with a frame that is no content."""
        if self.queue.empty():
            self._is_awaited = False
            self.queue.put_nowait((self.cursor, frame))

    def drop(self) -> None:
        while not self.queue.empty():
            self.queue.get_nowait()
        self._bytes = 0

    async def get(self) -> bytes:
        """Everything that is pending, joined for a single send; waits for the first."""
        self._is_awaited = self.queue.empty()
        try:
            offset, frame = await self.queue.get()
        finally:
            self._is_awaited = False
        if self.queue.empty():
            self._bytes = 0
            self.cursor = offset
            return frame
        frames = [frame]
        while not self.queue.empty():
            offset, frame = self.queue.get_nowait()
            frames.append(frame)
        self._bytes = 0
        self.cursor = offset
        return b"".join(frames)


RENDER_SECONDS_MIN = 0.1  # between two frames of HTML
RENDERED_CHARACTERS_MAX = 4_000_000  # of HTML of ended messages that is remembered
RENDER_COST_RATIO = 10  # rendering takes at most one part in this many of the time


class Rendering:
    """A generation's text as HTML, rendered once for all who asked for it, and only while somebody does.

    Its subscribers get `html` events in place of text deltas: blocks by number that are new or have changed, and the
    open one. There is no ring and no cursor in HTML: whoever comes, or comes back, gets everything once, and replaces
    what differs. Markdown is parsed in a thread, so that an expensive answer holds up nobody else's.
    """

    def __init__(self) -> None:
        self.subscriptions: set[Subscription] = set()
        self._stream = MarkdownStream()
        self.ended = asyncio.Event()  # the `end` event is out
        self._fed = ""  # text that waits for the next frame
        self._others: list[Delta] = []  # content that is no text
        self._end_frame = b""
        self._wake = asyncio.Event()
        self.offset = 0  # of what has been fed
        self._snapshot = HtmlFrame((), "", 0.0)

    def feed(self, offset: int, delta: Delta) -> None:
        """Takes committed content, once. Text goes into the next frame; everything else goes out as the delta it is."""
        if offset <= self.offset:
            return
        self.offset = offset
        if delta.kind == "text":
            self._fed += delta.text
            self._wake.set()
            return
        self._others.append(delta)
        self.publish(offset, encode_delta(delta, offset))

    def end(self, frame: bytes) -> None:
        """Takes the `end` event: it goes out after the last frame of HTML."""
        self._end_frame = frame
        self._wake.set()

    def attach(self, send_now: Callable[[bytes], bool]) -> tuple[Subscription, bytes]:
        """A new subscription, and everything up to now."""
        subscription = Subscription(self.offset, send_now)
        self.subscriptions.add(subscription)
        self._wake.set()
        others = b"".join(encode_delta(delta, self.offset) for delta in join_deltas(self._others))
        return subscription, others + encode_html(self._snapshot, self.offset)

    async def render_forever(self) -> None:
        """Renders what was fed, frame by frame, until the end is out."""
        is_last = False
        while not is_last:
            await self._wake.wait()
            self._wake.clear()
            is_last = bool(self._end_frame)
            if not self.subscriptions or not (self._fed or is_last):
                continue
            text, self._fed, offset = self._fed, "", self.offset
            frame = await asyncio.to_thread(self._render, text, is_last)
            self.publish(offset, encode_html(frame, offset))
            if not is_last:
                await asyncio.sleep(max(RENDER_SECONDS_MIN, RENDER_COST_RATIO * frame.seconds))
        self.ended.set()
        self.publish(self.offset, self._end_frame)

    def _render(self, text: str, is_last: bool) -> HtmlFrame:
        self._stream.feed(text)
        frame = self._stream.finish() if is_last else self._stream.frame()
        self._snapshot = self._stream.snapshot()
        return frame

    def publish(self, offset: int, data: bytes) -> None:
        """Puts an event before everyone who looks on."""
        for subscription in self.subscriptions:
            subscription.put(offset, data)


def encode_html(frame: HtmlFrame, offset: int) -> bytes:
    return encode_event("html", {"settled": frame.settled, "open": frame.open}, offset)


class Flush(NamedTuple):
    """What one generation gives to a flush: pieces of content with the offset after each, and perhaps its end.

    `is_settled`: with what the journal has of it, they are to be rows of its own; else they go into the journal too.
    """

    generation: Generation
    pieces: list[tuple[int, Delta]]
    outcome: Outcome | None
    is_settled: bool

    def journal_pieces(self) -> list[Piece]:
        return [(offset - len(delta.text), delta.kind, delta.text) for offset, delta in self.pieces]

    def rows(self) -> Iterator[Row]:
        generation = self.generation
        deltas = [*generation.journalled, *(delta for _, delta in self.pieces)]
        return joined_rows(generation.message_id, generation.settled, deltas)


class Attempt:
    """One question to one model: its answer, if it comes to that, and the clock that catches its silence (monotonic
    seconds)."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.started_at = time.monotonic()
        self.last_delta_at: float | None = None
        self.answer: Answer | None = None
        self.timeout: asyncio.Timeout | None = None  # while it is under way
        self.seam: Seam | None = None
        self.is_over = False

    def silent_until(self, config: Config) -> float:
        """When it counts as stalled if nothing comes; keep-alives move that, but not for ever."""
        if self.timeout is None or (self.answer is not None and self.answer.is_full):
            return float("inf")
        since = self.last_delta_at or self.started_at
        if self.answer is not None:
            since = max(since, self.answer.grown_at)
        patience = config.first_delta_timeout_seconds if self.last_delta_at is None else config.stall_timeout_seconds
        heard = self.answer.heard_at if self.answer is not None else since
        return max(since + patience, min(heard + patience, since + config.keepalive_seconds))

    def expire(self) -> None:
        """It has stalled: what waits for it gets a TimeoutError."""
        if self.timeout is not None and not self.timeout.expired():
            self.timeout.reschedule(asyncio.get_running_loop().time())

    def stalled(self) -> Stalled:
        since = self.last_delta_at or self.started_at
        what = "no first delta" if self.last_delta_at is None else "no further delta"
        return Stalled(f"{self.target.provider.name} sent {what} for {time.monotonic() - since:.1f} s")

    def record(self, error: dict[str, Any] | None) -> dict[str, Any]:
        """As it is kept with the message."""
        elapsed_ms = round((time.monotonic() - self.started_at) * 1000)
        return {"provider": self.target.provider.name, "model": self.target.model, "error": error, "ms": elapsed_ms}


class Ring:
    """The newest published frames, bounded in number and bytes. Their ids are their offsets: a stream's memory is
    mostly this."""

    def __init__(self, offset: int, events_max: int) -> None:
        self._frames: deque[bytes] = deque()
        self._floor = offset  # before the oldest frame
        self._bytes = 0
        self._events_max = events_max

    def append(self, frames: Sequence[bytes], size: int) -> None:
        self._frames.extend(frames)
        self._bytes += size
        while len(self._frames) > self._events_max or (self._bytes > RING_BYTES_MAX and len(self._frames) > 1):
            dropped = self._frames.popleft()
            self._floor = offset_of(dropped, self._floor)
            self._bytes -= len(dropped)

    def beyond(self, cursor: int) -> list[bytes] | None:
        """The frames that a cursor lacks; None: the ring does not reach it.

        The cursor must be where an event ends, as every cursor that was handed out is; one that stands inside an
        event goes to the store, which can cut.
        """
        offset, is_at_event, beyond = self._floor, cursor == self._floor, []
        for frame in self._frames if cursor >= self._floor else ():
            offset = offset_of(frame, offset)
            is_at_event = is_at_event or offset == cursor
            if offset > cursor or cursor == 0:
                beyond.append(frame)
        return beyond if is_at_event else None

    @property
    def newest(self) -> bytes:
        return self._frames[-1]


class Generation:
    """The running production of one message: what is pending, what was published, who looks on.

    `offset` counts what was taken for a flush, `published` what every subscriber may have, `settled` what the message's
    own rows have. All of it lives in the event loop's thread; nothing here waits.
    """

    def __init__(self, owner: str, started: Started, targets: tuple[Target, ...], config: Config) -> None:
        self.owner = owner
        self.started = started
        self.message_id = started.message_id
        self.conversation_id = started.conversation_id
        self.parent_id = started.parent_id
        self.targets = targets
        self.attempt: Attempt | None = None  # the newest
        self.attempts = list(started.attempts)  # records of those that are over
        self.ending: Ending | None = None
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        # monotonic seconds
        self.started_at = time.monotonic()
        self.first_delta_at: float | None = None
        self.first_text_at: float | None = None
        # content on its way
        self.pending: list[Delta] = []
        self.journalled: list[Delta] = []  # in the journal: what the message's own rows do not have yet
        self.characters = self._quarter_tokens = 0  # of the whole answer
        self.offset = self.settled = self.published = sum(len(delta.text) for delta in started.content)
        # who looks on
        self.subscriptions: set[Subscription] = set()
        self.ended = asyncio.Event()  # the `end` event is out
        self.rendering: Rendering | None = None
        self._ring = Ring(self.published, config.ring_events)
        # the guards over content
        self._characters_max = config.answer_characters_max
        self._circles = {
            kind: RepetitionGuard(config.repetition_count, config.repetition_characters)
            for kind in sorted(MERGED_KINDS)
        }

    @property
    def answer(self) -> Answer | None:
        """The one that is being taken in, or was last."""
        return self.attempt.answer if self.attempt is not None else None

    @property
    def target(self) -> Target:
        return self.attempt.target if self.attempt is not None else self.targets[0]

    @property
    def provider(self) -> str:
        return self.target.provider.name

    @property
    def model(self) -> str:
        return self.target.model

    # ── content ──

    def collect(self) -> None:
        """Decodes what has arrived, into pending. What the guards catch in it ends the answer."""
        attempt = self.attempt
        if attempt is None or attempt.answer is None or self.ending is not None:
            return
        try:
            if deltas := attempt.answer.take():
                attempt.last_delta_at = time.monotonic()
                self.add(deltas if attempt.seam is None else attempt.seam.join(deltas))
        except GenerationError as exc:
            attempt.answer.fail(exc)

    def add(self, deltas: list[Delta]) -> None:
        """Takes content into pending. Raises GenerationError when a guard catches something in it."""
        if self.first_delta_at is None:
            self.first_delta_at = time.monotonic()
        if self.first_text_at is None and any(one.kind == "text" for one in deltas):
            self.first_text_at = time.monotonic()
        circle = None
        for kind, texts in runs_of(deltas):
            delta = Delta(kind, "".join(texts))
            self.pending.append(delta)
            self.characters += len(delta.text)
            if kind in self._circles:
                circle = circle or self._circles[kind].feed(texts)
        if self.characters > self._characters_max:
            raise TooLong(
                f"the answer is longer than {self._characters_max:,} characters (LLMCHAT_ANSWER_CHARACTERS_MAX)"
            )
        if circle is not None:
            raise Repetition(f"the model goes round in circles, repeating {shorten(circle, None)!r}")

    def take(self) -> Flush | None:
        """Everything there is to flush, with the outcome if this is the last; None: nothing."""
        self.collect()
        if not self.pending and self.ending is None:
            return None
        pieces = []
        for delta in self.pending if len(self.pending) == 1 else join_deltas(self.pending):
            for piece in split_delta(delta):
                self.offset += len(piece.text)
                self._quarter_tokens += quarter_tokens(piece.text)
                pieces.append((self.offset, piece))
        self.pending = []
        outcome = self.outcome() if self.ending is not None else None
        is_much = self.offset - self.settled >= JOURNAL_CHARACTERS_MAX
        return Flush(self, pieces, outcome, is_settled=is_much or outcome is not None)

    def outcome(self) -> Outcome:
        """What the terminal transaction writes; a continued answer's figures are the sums of its runs."""
        assert self.ending is not None, "only what has ended has an outcome"
        before = self.started.timing
        earlier = before.total_ms or 0
        first, first_text = (
            known if known is not None or at is None else round((at - self.started_at) * 1000) + earlier
            for known, at in ((before.first_delta_ms, self.first_delta_at), (before.first_text_ms, self.first_text_at))
        )
        total = round((time.monotonic() - self.started_at) * 1000) + earlier
        attempts = tuple(self.attempts)
        if self.attempt is not None and not self.attempt.is_over:
            attempts = (*attempts, self.attempt.record(self.ending.error))
        return Outcome(self.message_id, self.ending, self.target, self.usage(), attempts, first, total, first_text)

    def usage(self) -> Usage | None:
        """The tokens of all runs of this answer, as the provider counted if it came to that: before the end it has said
        at most what went in. None: nothing was asked that would cost anything."""
        if self.answer is None:
            return self.started.usage
        counted, written = self.answer.decoder.usage, (self._quarter_tokens + 3) // 4
        if counted is None:
            counted = Usage(sum(estimate_tokens(turn.content) for turn in self.started.turns), written, estimated=True)
        elif self.answer.decoder.finish_reason is None:
            output_tokens = max(counted.output_tokens, written)
            counted = msgspec.structs.replace(counted, output_tokens=output_tokens, estimated=True)
        return add_usage(self.started.usage, counted)

    # ── publishing ──

    def publish(self, offset: int, frames: Sequence[bytes]) -> None:
        """Puts committed events, or one that carries no content, before everyone who looks on; `offset` is the one after
        them."""
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        self._ring.append(frames, len(data))
        self.published = offset
        for subscription in self.subscriptions:
            subscription.put(offset, data)

    def attach(self, cursor: int, send_now: Callable[[bytes], bool]) -> tuple[Subscription, bytes] | None:
        """A subscription from this cursor on and the part of the ring that it lacks; None: the ring does not reach it."""
        beyond = self._ring.beyond(cursor) if cursor <= self.published else None
        if beyond is None:
            return None
        if self.ended.is_set() and not beyond:
            beyond = [self._ring.newest]
        subscription = Subscription(self.published, send_now)
        self.subscriptions.add(subscription)
        return subscription, b"".join(beyond)


class Publisher(Protocol):
    """What the flusher tells of its work."""

    def publish(self, flush: Flush) -> None:
        """It is committed."""

    async def abandon(self, generation: Generation) -> None:
        """The database works, but refuses this one."""

    def give_up(self, error: StoreUnavailable) -> None:
        """The database has been away for too long."""


class Worker(ABC):
    """One task, from `open` to `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.create_task(self._work_forever(), name=self._name)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @abstractmethod
    async def _work_forever(self) -> None: ...


class Journal:
    """Whose content is in the journal, longest first. It goes by what is committed."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Generation, int, float]] = {}  # by message: since which row, and when
        self._newest_id = self._floor = 0

    def add_due(self, batch: dict[int, Flush]) -> None:
        """Settles those that have waited long enough; a few at each flush, so that none takes much longer for it."""
        until, share = time.monotonic() - JOURNAL_SECONDS, math.ceil(len(self._waiting) / JOURNAL_SHARE)
        for message_id, (generation, _, since) in itertools.islice(self._waiting.items(), share):
            if since > until:
                break
            flush = batch.get(message_id) or Flush(generation, [], None, is_settled=True)
            batch[message_id] = flush._replace(is_settled=True)

    def save(self, batch: Sequence[Flush]) -> Save:
        """What a batch writes; its row in the journal has a number that was never used."""
        settled = {flush.generation.message_id for flush in batch if flush.is_settled}
        journalled = {flush.generation.message_id: flush.journal_pieces() for flush in batch if not flush.is_settled}
        self._newest_id += bool(journalled)
        needed = (row_id for message_id, (_, row_id, _) in self._waiting.items() if message_id not in settled)
        floor = next(needed, self._newest_id + (not journalled))
        is_over = floor > self._newest_id and floor > self._floor
        return Save(
            journalled=journalled,
            rows=[row for flush in batch if flush.is_settled for row in flush.rows()],
            outcomes=[flush.outcome for flush in batch if flush.outcome is not None],
            journal_id=self._newest_id,
            journal_floor=floor,
            is_trimming=is_over or floor - self._floor >= JOURNAL_TRIM_ROWS,
        )

    def committed(self, batch: Sequence[Flush], save: Save) -> None:
        """That is written: what was settled has left the journal, the rest has come into it."""
        now = time.monotonic()
        self._floor = save.journal_floor if save.is_trimming else self._floor
        for flush in batch:
            generation = flush.generation
            generation.journalled += [delta for _, delta in flush.pieces]
            if flush.is_settled:
                self.forget(generation)
                generation.settled += sum(len(delta.text) for delta in generation.journalled)
                generation.journalled = []
            else:
                self._waiting.setdefault(generation.message_id, (generation, save.journal_id, now))

    def forget(self, generation: Generation) -> None:
        self._waiting.pop(generation.message_id, None)


class Flusher(Worker):
    """Commits what all generations have pending: one task, one transaction after the other. Nobody else writes what they
    produce. It works at once when it was idle, and paces itself by what a flush costs.

    While that makes it slow, or one flush follows on the other, providers are read at the same pace: an answer that has
    something to take rests until the next flush, before which all that rest are read in one turn of the loop. A read
    costs more than the deltas in it.
    """

    def __init__(self, config: Config, store: Store, publisher: Publisher) -> None:
        super().__init__("flusher")
        self.flush_ms = 0.0  # what the last flush took
        self._config = config
        self._store = store
        self._publisher = publisher
        self._journal = Journal()
        self._marked: dict[int, Generation] = {}
        self._resting: list[Answer] = []
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._next_flush_at = 0.0
        self._cost = 0.0  # seconds that a flush holds the event loop, averaged
        self._is_busy = False

    def mark(self, generation: Generation) -> None:
        """There is something to flush."""
        self._marked[generation.message_id] = generation
        self._wake.set()
        answer = generation.answer
        if answer is not None and answer.is_full:
            self._hurry.set()
        elif answer is not None and self._is_busy:
            answer.pause()

    def forget(self, generation: Generation) -> None:
        self._marked.pop(generation.message_id, None)
        self._journal.forget(generation)

    async def _work_forever(self) -> None:
        while True:
            if not self._resting:
                await self._wake.wait()
            await self._pace()
            await self._read_on()
            self._wake.clear()
            started_at = time.monotonic()
            marked, self._marked = self._marked, {}
            batch = {one: flush for one, generation in marked.items() if (flush := generation.take()) is not None}
            self._resting = [one.answer for one in marked.values() if one.answer is not None and one.answer.is_paused]
            if batch:
                self._journal.add_due(batch)
                waited = await self._flush(list(batch.values()))
                self.flush_ms = (time.monotonic() - started_at) * 1000
                self._set_pace(batch.values(), started_at, time.monotonic() - started_at - waited)

    async def _pace(self) -> None:
        """Waits for the next flush's turn, unless a provider has to wait for it."""
        self._hurry.clear()
        wait = self._next_flush_at - time.monotonic()
        if wait > 0 and not any(one.answer is not None and one.answer.is_full for one in self._marked.values()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), wait)

    async def _read_on(self) -> None:
        """Has everything read that came for the answers that rest."""
        resting, self._resting = self._resting, []
        for answer in resting:
            answer.resume()
        if resting:
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # asyncio's own loop, unlike uvloop, needs two turns for it

    def _set_pace(self, batch: Iterable[Flush], started_at: float, held: float) -> None:
        """When the next flush may come, by the seconds for which flushes hold the event loop: how long the database takes
        slows nothing down but the flush itself. Waiting makes pieces fewer and longer; where they are long, it gains
        nothing."""
        self._cost += (held - self._cost) / FLUSH_COST_AVERAGED
        pieces = [delta for flush in batch for _, delta in flush.pieces]
        characters = sum(len(delta.text) for delta in pieces)
        gain = min(1.0, FLUSH_PIECE_CHARACTERS * len(pieces) / max(characters, 1))
        fastest = self._config.flush_interval_ms / 1000
        interval = min(max(fastest, self._cost * FLUSH_COST_RATIO * gain), FLUSH_INTERVAL_SECONDS_MAX)
        paced_from = max(self._next_flush_at, started_at - FLUSH_BURST_SECONDS)
        self._next_flush_at = min(paced_from, started_at) + interval
        self._is_busy = interval > FLUSH_SLOW_RATIO * fastest or self._next_flush_at < time.monotonic()

    async def _flush(self, batch: Sequence[Flush]) -> float:
        """Commits a batch, however long the database makes it wait, and has it published. Returns the seconds waited."""
        save = self._journal.save(batch)
        saved_at = time.monotonic()
        try:
            await self.commit(save)
        except Exception:  # the database works, but something in here does not go in: find it, spare the others
            if len(batch) > 1:
                for flush in batch:
                    await self._flush([flush])
            else:
                await self._publisher.abandon(batch[0].generation)
            return time.monotonic() - saved_at
        waited = time.monotonic() - saved_at
        self._journal.committed(batch, save)
        for flush in batch:
            self._publisher.publish(flush)
        return waited

    async def commit(self, save: Save) -> None:
        failing_since: float | None = None
        while True:
            try:
                await self._store.write(save_flush, save, durable=bool(save.outcomes))
            except StoreUnavailable as exc:
                if failing_since is None:
                    failing_since = time.monotonic()
                    log.error("flush failed", extra={"fields": {"error": exc.message}})
                elif time.monotonic() - failing_since > FLUSH_PATIENCE_SECONDS:
                    self._publisher.give_up(exc)
                await asyncio.sleep(FLUSH_RETRY_SECONDS)
            else:
                if failing_since is not None:
                    seconds = round(time.monotonic() - failing_since, 1)
                    log.info("flush works again", extra={"fields": {"after_seconds": seconds}})
                return


class Chore(Worker):
    """Work that is due some time after an answer's start or end. It says in how many seconds it is due again; None: there
    is none.

    One task, which looks at the start and when `wake` says that something has begun or ended; it sleeps until more is
    due, and without a timer when there is none.
    """

    def __init__(self, name: str, work: Callable[[], Awaitable[float | None]]) -> None:
        super().__init__(name)
        self._work = work
        self._called = asyncio.Event()

    def wake(self) -> None:
        """There may be something to do."""
        self._called.set()

    async def _work_forever(self) -> None:
        while True:
            self._called.clear()
            try:
                seconds = await self._work()
            except (StoreUnavailable, sqlite3.Error) as exc:
                log.warning(f"{self._name} failed", extra={"fields": {"error": reason_of(exc)}})
                seconds = CHORE_RETRY_SECONDS
            if seconds is None:
                await self._called.wait()
            else:
                await asyncio.sleep(seconds)


async def merge_what_is_due(store: Store) -> float | None:
    """Merges the rows of answers that ended a while ago: a stream leaves one every half second.

    Between small transactions it leaves the database to the others.
    """
    while (found := await store.read(find_unmerged)) is not None:
        message_id, ended_at_ms = found
        wait = MERGE_AFTER_SECONDS - (now_ms() - ended_at_ms) / 1000
        if wait > 0:
            return min(wait, MERGE_AFTER_SECONDS)  # a clock that was set back is not waited for
        offset: int | None = 0
        while offset is not None:
            started_at = time.monotonic()
            offset = await store.write(merge_deltas, message_id, ended_at_ms, offset)
            await asyncio.sleep((time.monotonic() - started_at) * CHORE_COST_RATIO)
    return None


async def index_what_is_new(store: Store) -> None:
    """Makes findable what has come, with what comes a moment later."""
    has_more = True
    await asyncio.sleep(INDEX_AFTER_SECONDS)
    while has_more:
        started_at = time.monotonic()
        has_more = await store.write(index_texts)
        await asyncio.sleep((time.monotonic() - started_at) * CHORE_COST_RATIO)


def give_back_memory() -> None:
    """Returns free memory to the system. glibc keeps what it has once needed: after a busy hour that is half of it all.
    (https://man7.org/linux/man-pages/man3/malloc_trim.3.html)"""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # other systems' C libraries do without
        ctypes.CDLL(None).malloc_trim(0)


class Generations:
    """Everything that runs: starts it, stops it, streams it, drains it."""

    def __init__(self, config: Config, store: Store, providers: Providers) -> None:
        self.flusher = Flusher(config, store, self)
        self.indexer = Chore("indexer", partial(index_what_is_new, store))
        self.merger = Chore("merger", partial(merge_what_is_due, store))
        self.sweeper = Chore("sweeper", self._sweep)
        self.tidier = Chore("tidier", self._tidy)
        self.running: dict[int, Generation] = {}
        self.draining = False
        self.streams: Counter[int] = Counter()  # open streams per message
        self.owner_streams: Counter[str] = Counter()  # and per owner
        self._config = config
        self._store = store
        self._providers = providers
        self._starting: Counter[str] = Counter()  # by owner: what is being committed and will run
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy_at: float | None = None  # when an answer last ended; None: memory has been given back since
        self._rendered: dict[tuple[int, int, str], str] = {}
        self._rendered_characters = 0

    def open(self) -> None:
        for one in (self.flusher, self.indexer, self.merger, self.sweeper, self.tidier):
            one.open()

    async def close(self) -> None:
        """Ends what still runs, then the flusher. `drain` was patient; this is not."""
        for generation in list(self.running.values()):
            self._end(generation, Ending("interrupted"))
        for task in self._tasks:
            task.cancel()
        tasks = [generation.task for generation in self.running.values() if generation.task is not None]
        await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
        for chore in (self.indexer, self.merger, self.sweeper, self.tidier):
            await chore.close()
        await self._wait_until_all_ended(FLUSH_PATIENCE_SECONDS)
        await self.flusher.close()

    async def drain(self) -> None:
        """Takes no new generations, gives the running ones `drain_seconds`, ends the rest as interrupted."""
        self.draining = True
        if self.running:
            log.info("draining", extra={"fields": {"running": len(self.running)}})
        await self._wait_until_all_ended(self._config.drain_seconds)
        for generation in list(self.running.values()):
            self._end(generation, Ending("interrupted"))
        await self._wait_until_all_ended(FLUSH_PATIENCE_SECONDS)

    async def _wait_until_all_ended(self, seconds: float) -> None:
        waits = [asyncio.ensure_future(generation.ended.wait()) for generation in self.running.values()]
        if waits:
            _, late = await asyncio.wait(waits, timeout=seconds)
            for wait in late:
                wait.cancel()

    # ── start and stop ──

    async def start(self, new: NewMessage) -> Started:
        """Commits the question and starts its answer. Raises Draining, Overloaded, and what start_message raises."""
        return await self._start(new.owner, new.targets, start_message, new, asked=new)

    async def regenerate(self, message_id: int, new: NewMessage) -> Started:
        """Starts a sibling of an answer. Raises as `start` does."""
        return await self._start(new.owner, new.targets, regenerate_message, message_id, new, asked=new)

    async def go_on(self, owner: str, message_id: int, target: Target) -> Started:
        """Goes on with an answer that broke off, in the same message. Raises as `start` does."""
        return await self._start(owner, (target,), continue_message, owner, message_id, target)

    async def _start(
        self, owner: str, targets: tuple[Target, ...], operation: Callable[..., Started], *arguments: Any,
        asked: NewMessage | None = None,
    ) -> Started:  # fmt: skip
        try:
            self._check_room(owner)
        except LlmchatError:
            keyed = asked is not None and asked.idempotency_key is not None
            if keyed and (earlier := await self._store.read(find_repeated, asked)):
                return earlier  # a repeat asks for nothing new
            raise
        self._starting[owner] += 1
        try:
            started = await self._store.write(operation, *arguments, durable=True)
        finally:
            self._starting[owner] -= 1
        if not started.repeated:
            self._launch(Generation(owner, started, targets, self._config))
        return started

    def _check_room(self, owner: str) -> None:
        """Whether one more generation may start. Raises Draining, RateLimited, Overloaded."""
        if self.draining:
            raise Draining("the server is shutting down", retry_after_seconds=self._config.drain_seconds + 1)
        theirs = sum(one.owner == owner for one in self.running.values()) + self._starting[owner]
        if self._config.users and theirs >= self._config.owner_generations_max:
            words = f"{theirs} of your generations are running, the limit (LLMCHAT_OWNER_GENERATIONS_MAX)"
            raise RateLimited(words, retry_after_seconds=5)
        if len(self.running) + self._starting.total() >= self._config.generations_max:
            words = f"{self._config.generations_max} generations are running, the limit (LLMCHAT_GENERATIONS_MAX)"
            raise Overloaded(words, retry_after_seconds=5)

    def _launch(self, generation: Generation) -> None:
        self.running[generation.message_id] = generation
        generation.task = asyncio.create_task(self._produce(generation), name=f"generation {generation.message_id}")
        self._watch(generation)
        self.indexer.wake()
        fields = {"message_id": generation.message_id, "model": str(generation.target)}
        log.info("generation started", extra={"fields": fields})

    def find(self, owner: str, message_id: int) -> Generation | None:
        """The owner's running generation of this message, if there is one."""
        generation = self.running.get(message_id)
        return generation if generation is not None and generation.owner == owner else None

    async def stop(self, owner: str, message_id: int) -> None:
        """Ends a running generation; returns when that is durable. On any other message it does nothing.

        Raises StoreUnavailable if it has ended, but the database could not take it.
        """
        generation = self.find(owner, message_id)
        if generation is None:
            return
        self._end(generation, Ending("stopped"))
        await generation.ended.wait()
        if self.running.get(message_id) is generation:
            raise StoreUnavailable("the answer has ended, but that cannot be stored now", retry_after_seconds=1)

    def _end(self, generation: Generation, ending: Ending) -> None:
        """The end of a generation, whoever wants it; the first one counts. Its provider's connection closes now."""
        if generation.ending is None:
            generation.collect()
            generation.ending = ending
            self.flusher.mark(generation)
        if generation.timer is not None:
            generation.timer.cancel()
        if generation.task is not None and generation.task is not asyncio.current_task():
            generation.task.cancel()

    # ── the producer ──

    async def _produce(self, generation: Generation) -> None:
        """The outermost frame of a generation: whatever happens in it becomes its ending."""
        try:
            ending = await self._run(generation)
        except LlmchatError as exc:
            ending = Ending("failed", error=exc.detail())
        except asyncio.CancelledError:
            self._end(generation, Ending("interrupted"))
            raise
        except Exception:
            log.exception("generation broke", extra={"fields": {"message_id": generation.message_id}})
            ending = Ending("failed", error=InternalError("an error of llmchat's own; its log says more").detail())
        self._end(generation, ending)

    async def _run(self, generation: Generation) -> Ending:
        """Tries the targets in turn, each with its retries, until one answers. Raises GenerationError.

        Only before the first delta: after it, another try would pay twice and repeat text.
        """
        failure: GenerationError | None = None
        for target in generation.targets:
            if failure is not None:
                self._notice(generation, "falling_back", failure, to=str(target))
            for number in range(1, self._config.attempts + 1):
                attempt = generation.attempt = Attempt(target)
                failure = await self._ask(generation, attempt)
                generation.attempts.append(attempt.record(None if failure is None else failure.detail()))
                attempt.is_over = True
                if failure is None:
                    assert attempt.answer is not None, "an attempt that went well had an answer"
                    return Ending("completed", finish_reason=attempt.answer.decoder.finish_reason)
                if generation.first_delta_at is not None:
                    raise failure
                delay = retry_delay(failure, number) if isinstance(failure, ProviderError) else None
                if delay is None or number == self._config.attempts:
                    break
                self._notice(generation, "retrying", failure, attempt=number + 1, delay_ms=round(delay * 1000))
                await asyncio.sleep(delay)
        assert failure is not None, "there is at least one target"
        raise failure

    async def _ask(self, generation: Generation, attempt: Attempt) -> GenerationError | None:
        """Asks once, and takes the answer in. Returns what went wrong, or None."""
        started, target = generation.started, attempt.target
        question = Question(
            target.model, started.system, started.turns, started.parameters, continues=bool(started.content)
        )
        try:
            async with (
                asyncio.timeout(None) as attempt.timeout,
                self._providers.ask(target, question) as attempt.answer,
            ):
                if started.content:
                    attempt.seam = Seam(text_of(started.content), self._providers.prefills(target.provider))
                await attempt.answer.receive(partial(self.flusher.mark, generation))
                generation.collect()
                return attempt.answer.failure
        except TimeoutError:
            return attempt.stalled()
        except GenerationError as exc:
            return exc
        finally:
            attempt.timeout = None
            if attempt.seam is not None and (rest := attempt.seam.end()) and generation.ending is None:
                generation.add([Delta("text", rest)])

    def _notice(self, generation: Generation, code: str, failure: GenerationError, **more: Any) -> None:
        data = {"code": code, **more, "error": failure.detail()}
        notice = encode_event("notice", data)
        generation.publish(generation.published, [notice])
        if generation.rendering is not None:
            generation.rendering.publish(generation.published, notice)

    def _watch(self, generation: Generation) -> None:
        """The guards' clock: one timer per generation, which looks whether a bound was passed and sets itself anew."""
        now = time.monotonic()
        deadline = generation.started_at + self._config.generation_timeout_seconds
        if now >= deadline:
            error = DeadlineExceeded(f"the generation ran for {self._config.generation_timeout_seconds:g} s, the limit")
            self._end(generation, Ending("failed", error=error.detail()))
            return
        attempt = generation.attempt
        due = attempt.silent_until(self._config) if attempt is not None else float("inf")
        if attempt is not None and now >= due:
            attempt.expire()
        patience = min(self._config.stall_timeout_seconds, self._config.first_delta_timeout_seconds)
        wait = min(deadline - now, patience, due - now if due > now else patience)
        generation.timer = asyncio.get_running_loop().call_later(wait, self._watch, generation)

    # ── what the flusher tells ──

    async def abandon(self, generation: Generation) -> None:
        """A generation whose rows the database refuses, as when its message was deleted by another program.

        What it had in its hands is dropped, so that at least its end can be stored, if there is still a message; and what
        clients have seen of it, if that is not what the database refuses.
        """
        log.exception("flush refused", extra={"fields": {"message_id": generation.message_id}})
        self._end(generation, Ending("failed"))
        generation.ending = Ending("failed", error=InternalError("the answer cannot be stored").detail())
        outcome = replace(generation.outcome(), usage=None, attempts=())
        for rows in (list(joined_rows(generation.message_id, generation.settled, generation.journalled)), []):
            with contextlib.suppress(sqlite3.Error):
                await self.flusher.commit(Save(rows=rows, outcomes=[outcome]))
                break
        self.flusher.forget(generation)
        self.running.pop(generation.message_id, None)
        if not generation.ended.is_set():
            self._announce(generation, outcome, generation.published)

    def give_up(self, error: StoreUnavailable) -> None:
        """The database has been away for too long: everything that runs ends, before all who look on, as failed.

        Also what was just completed or stopped: nobody is told of an end that is not stored.
        """
        failed = Ending("failed", error=error.detail())
        for generation in self.running.values():
            self._end(generation, failed)
            if not generation.ended.is_set():
                generation.ending = failed
                self._announce(generation, generation.outcome(), generation.published)

    def publish(self, flush: Flush) -> None:
        """What was committed, to everyone who looks on."""
        generation = flush.generation
        if not generation.ended.is_set():  # else `end` is out, and what the database has beyond it is for a resume
            if generation.rendering is not None:
                for offset, delta in flush.pieces:
                    generation.rendering.feed(offset, delta)
            frames = [encode_delta(delta, offset) for offset, delta in flush.pieces]
            reached = flush.pieces[-1][0] if frames else generation.published
            if flush.outcome is not None:
                self._announce(generation, flush.outcome, reached, frames)
            elif frames:
                generation.publish(reached, frames)
        if flush.outcome is not None:
            self._busy_at = time.monotonic()
            self.indexer.wake()
            self.merger.wake()
            self.tidier.wake()
            self.running.pop(generation.message_id, None)
            if (
                self._config.title_model
                and flush.outcome.ending.status == "completed"
                and not generation.started.hidden
            ):
                self._keep(asyncio.create_task(self._title(generation), name=f"title {generation.conversation_id}"))
            if generation.started.hidden:
                self.sweeper.wake()

    async def _sweep(self) -> float | None:
        """Deletes answers that nobody stored, some time after their end: a client that lost its connection, or asks again
        with the same Idempotency-Key, has that long to come back. Those that somebody still reads wait."""
        kept_ms = round(self._config.unstored_seconds * 1000)
        oldest_ms = await self._store.write(sweep_unstored, now_ms() - kept_ms, list(self.streams))
        return max((oldest_ms + kept_ms - now_ms()) / 1000, SWEEP_SECONDS_MIN) if oldest_ms is not None else None

    async def _tidy(self) -> float | None:
        """Gives memory back once nothing has happened for a while."""
        if self._busy_at is None:
            return None
        if self.running or time.monotonic() - self._busy_at < REST_SECONDS:
            return REST_SECONDS
        self._busy_at = None
        await asyncio.to_thread(give_back_memory)
        return None

    def _keep(self, task: asyncio.Task[None]) -> None:
        """Owns a task until it has ended; `close` awaits it."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _title(self, generation: Generation) -> None:
        """Lets a model name the conversation after its first answer. Nobody waits for it, and a failure is no more than a
        line in the log."""
        try:
            async with asyncio.timeout(TITLE_SECONDS):
                ids = (generation.owner, generation.conversation_id, generation.message_id)
                if not await self._store.read(awaits_title, *ids):
                    return
                target = await self._providers.resolve(None, self._config.title_model, "LLMCHAT_TITLE_MODEL")
                message = await self._store.read(load_message, generation.owner, generation.message_id)
                asked = text_of(generation.started.turns[-1].content) if generation.started.turns else ""
                prompt = TITLE_PROMPT.format(
                    question=asked[:TITLE_SAMPLE_CHARACTERS], answer=message.text[:TITLE_SAMPLE_CHARACTERS]
                )
                question = Question(target.model, "", (Turn("user", (Delta("text", prompt),)),), Parameters())
                deltas = await self._providers.ask_whole(target, question)
            title = make_title(text_of(deltas).strip().strip('"'))
            if title:
                await self._store.write(title_conversation, generation.owner, generation.conversation_id, title)
        except (LlmchatError, TimeoutError) as exc:
            fields = {"conversation_id": generation.conversation_id, "error": reason_of(exc)}
            log.warning("no title", extra={"fields": fields})

    def _announce(
        self, generation: Generation, outcome: Outcome, offset: int, frames: Sequence[bytes] = ()
    ) -> None:  # fmt: skip
        """Tells everyone who looks on how it ended, in one piece with the last of its content, which ends at `offset`."""
        timing = Timing(outcome.first_delta_ms, outcome.total_ms, outcome.first_text_ms)
        end = encode_end(outcome.ending, outcome.usage, timing)
        generation.ended.set()
        generation.publish(offset, [*frames, end])
        if generation.rendering is not None:
            generation.rendering.end(end)
        fields = {
            "message_id": outcome.message_id,
            "model": str(outcome.target),
            "status": outcome.ending.status,
            "code": outcome.ending.error["code"] if outcome.ending.error else None,
            "characters": generation.characters,
            "first_delta_ms": outcome.first_delta_ms,
            "total_ms": outcome.total_ms,
        }
        log.info(
            "generation ended", extra={"fields": {name: value for name, value in fields.items() if value is not None}}
        )

    # ── subscribers ──

    async def subscribe(self, owner: str, message_id: int, cursor: int, name: str = "after") -> Subscriber:
        """A stream from a cursor on; `name` is what the request calls it. Raises NotFound, InvalidRequest."""
        about, status, length = await self._look_at(owner, message_id, cursor)
        reset = cursor > length and status == "interrupted"  # after a power cut a client may hold more than the disk
        if cursor > length and not reset:
            raise InvalidRequest(f"{name}: {cursor} is beyond the end of message {message_id}, which is at {length}")
        cursor = 0 if reset else cursor
        first = encode_start(start_data(about, message_id, status, cursor))
        return Subscriber(self, owner, message_id, cursor, RESET_FRAME + first if reset else first)

    async def subscribe_to_html(self, owner: str, message_id: int) -> HtmlSubscriber:
        """A stream of HTML; it has no cursor. Raises NotFound."""
        about, status, _ = await self._look_at(owner, message_id, 0)
        return HtmlSubscriber(self, owner, message_id, 0, encode_start(start_data(about, message_id, status, 0)))

    async def subscribe_to_view(self, owner: str, message_id: int, view: View) -> ViewSubscriber:
        """An open stream of all events, translated. Raises NotFound, Overloaded."""
        about, status, _ = await self._look_at(owner, message_id, 0)
        return ViewSubscriber(self, owner, message_id, encode_start(start_data(about, message_id, status, 0)), view)

    async def _look_at(self, owner: str, message_id: int, cursor: int) -> tuple[Generation | Message, str, int]:
        """What a new stream is about, its status and its length. Raises NotFound."""
        generation = self.find(owner, message_id)
        if generation is not None and cursor <= generation.published:
            return generation, "running", generation.published
        page = await self._store.read(load_page, owner, message_id, cursor)  # a moment ahead of what was published
        return page.message, page.message.status, page.length

    def check_streams(self, owner: str, message_id: int = 0) -> None:
        """Whether one more stream may be opened now, of this message or of one to come. Raises Overloaded, RateLimited."""
        if self.streams.get(message_id, 0) >= self._config.subscribers_max:
            limit = f"{self._config.subscribers_max} streams of message {message_id} are open, the limit"
            raise Overloaded(f"{limit} (LLMCHAT_SUBSCRIBERS_MAX)", retry_after_seconds=5)
        if self.owner_streams.total() >= self._config.streams_max:
            raise Overloaded(
                f"{self._config.streams_max} streams are open, the limit (LLMCHAT_STREAMS_MAX)", retry_after_seconds=5
            )
        if self._config.users and self.owner_streams.get(owner, 0) >= self._config.owner_streams_max:
            limit = f"{self._config.owner_streams_max} of your streams are open, the limit (LLMCHAT_OWNER_STREAMS_MAX)"
            raise RateLimited(limit, retry_after_seconds=5)

    async def rendering(self, generation: Generation) -> Rendering | None:
        """The generation's one Rendering, made when it is first asked for; None if the generation ended meanwhile."""
        rendering = Rendering()
        while generation.rendering is None and rendering.offset < generation.published:
            page = await self.load(generation.owner, generation.message_id, rendering.offset)
            for offset, delta in page.pieces:
                rendering.feed(offset, delta)
        if generation.ended.is_set():
            return None
        if generation.rendering is None:
            generation.rendering = rendering
            self._keep(asyncio.create_task(rendering.render_forever(), name=f"rendering {generation.message_id}"))
        return generation.rendering

    async def load(self, owner: str, message_id: int, cursor: int) -> Page:
        return await self._store.read(load_page, owner, message_id, cursor)

    async def load_published(self, owner: str, message_id: int, cursor: int) -> Page:
        return await self._store.read(partial(load_page, as_published=True), owner, message_id, cursor)

    async def load_whole(self, owner: str, message_id: int) -> Message:
        return await self._store.read(load_message, owner, message_id)

    async def render_message(self, message: Message) -> str:
        """An ended message's text as HTML; the newest ones are remembered."""
        key = (message.id, len(message.text), message.status)
        found = self._rendered.pop(key, None)
        if found is None:
            found = await asyncio.to_thread(render, message.text)
            self._rendered_characters += len(found) if key not in self._rendered else 0
        self._rendered[key] = found  # newest last
        while self._rendered_characters > RENDERED_CHARACTERS_MAX:
            self._rendered_characters -= len(self._rendered.pop(next(iter(self._rendered))))
        return found

    @property
    def heartbeat_seconds(self) -> float:
        return self._config.heartbeat_seconds


class Subscriber:
    """The whole life of an open stream, from its cursor to `end`; a context, in which it counts for its message's limit and
    its heart beats. `close` may be called at any time, from a callback."""

    def __init__(self, generations: Generations, owner: str, message_id: int, cursor: int, first: bytes) -> None:
        self._generations = generations
        self._owner = owner
        self._message_id = message_id
        self._cursor = cursor
        self._first = first
        self._source: Generation | Rendering | None = None  # what is subscribed to
        self._subscription: Subscription | None = None
        self._closed = False
        self._finished = False
        self._sent_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self.write: Callable[[bytes], bool] | None = None  # sends, unless the client does not keep up

    def __enter__(self) -> Subscriber:
        """Raises Overloaded, RateLimited."""
        self._generations.check_streams(self._owner, self._message_id)
        self._generations.streams[self._message_id] += 1
        self._generations.owner_streams[self._owner] += 1
        self._beat()
        return self

    def __exit__(self, *_: object) -> None:
        self._detach()
        if self._timer is not None:
            self._timer.cancel()
        self._generations.owner_streams[self._owner] -= 1
        self._generations.streams[self._message_id] -= 1
        if not self._generations.streams[self._message_id]:  # there will be many messages
            del self._generations.streams[self._message_id]

    def close(self) -> None:
        """The client is gone: whatever the stream waits for, it ends now."""
        self._closed = True
        if self._subscription is not None:
            self._subscription.wake()

    def _send_now(self, data: bytes) -> bool:
        """Sends what comes while `read` waits. The end is left to `read`, which must return."""
        if self.write is None or self._source is None or self._source.ended.is_set() or not self.write(data):
            return False
        self._sent_at = time.monotonic()
        return True

    @property
    def is_over(self) -> bool:
        """Whether the client has everything, once it has what was read."""
        if self._subscription is None or self._source is None or self._subscription.lagging:
            return self._finished
        return self._source.ended.is_set() and self._subscription.queue.empty()

    async def read(self) -> bytes | None:
        """What is to be sent next, everything that is there in one piece; None: the stream is over."""
        data, self._first = self._first, b""
        while not data:
            if self._closed or self.is_over:
                return None
            if self._subscription is None or self._subscription.lagging:
                self._detach()
                data = await self._catch_up()
            else:
                data = await self._subscription.get()
        self._sent_at = time.monotonic()
        return data

    async def _catch_up(self) -> bytes:
        """What the ring has beyond the cursor, from where the queue goes on; else some of what the store has."""
        generation = self._generations.running.get(self._message_id)
        attached = generation.attach(self._cursor, self._send_now) if generation is not None else None
        if generation is not None and attached is not None:
            return self._attach(generation, *attached)
        page = await self._load()
        frames = [encode_delta(delta, offset) for offset, delta in page.pieces]
        self._cursor = page.pieces[-1][0] if page.pieces else self._cursor
        if page.message.status != "running" and self._cursor >= page.length:
            self._finished = True
            frames.append(encode_end_of(page.message))
        if not frames:
            await asyncio.sleep(STARTED_WAIT_SECONDS)
        return b"".join(frames)

    async def _load(self) -> Page:
        return await self._generations.load(self._owner, self._message_id, self._cursor)

    def _attach(self, source: Generation | Rendering, subscription: Subscription, missed: bytes) -> bytes:
        self._source, self._subscription, self._cursor = source, subscription, subscription.cursor
        return missed

    def _detach(self) -> None:
        if self._source is not None and self._subscription is not None:
            self._source.subscriptions.discard(self._subscription)
            self._cursor = self._subscription.cursor
        self._source = self._subscription = None

    def _beat(self) -> None:
        """Sends a heartbeat once nothing was sent for a while; one timer that sets itself anew."""
        seconds = self._generations.heartbeat_seconds
        silent = time.monotonic() - self._sent_at
        if silent >= seconds:
            if self._subscription is not None:
                self._subscription.wake(HEARTBEAT_FRAME)
            silent = 0.0
        self._timer = asyncio.get_running_loop().call_later(seconds - silent, self._beat)


class HtmlSubscriber(Subscriber):
    """The same with the text as HTML: `html` events in place of text deltas."""

    async def _catch_up(self) -> bytes:
        generation = self._generations.running.get(self._message_id)
        rendering = await self._generations.rendering(generation) if generation is not None else None
        if rendering is not None:
            return self._attach(rendering, *rendering.attach(self._send_now))
        message = await self._generations.load_whole(self._owner, self._message_id)
        if message.status == "running":
            await asyncio.sleep(STARTED_WAIT_SECONDS)
            return b""
        self._finished = True
        length = sum(len(delta.text) for delta in message.content)
        others = [encode_delta(delta, length) for delta in message.content if delta.kind != "text"]
        html_text = await self._generations.render_message(message)
        return b"".join([*others, encode_html(HtmlFrame(((0, html_text),), "", 0.0), length), encode_end_of(message)])


class View(Protocol):
    """Another wire format for our events, one event in and any number out; it is used by one stream, from its start."""

    def translate(self, name: bytes, data: bytes) -> bytes: ...


class ViewSubscriber(Subscriber):
    """The same in another wire format. It always begins at the start, and gets every event as it was when it was
    published, also from the store, so that whatever a view counts comes out the same every time."""

    def __init__(self, generations: Generations, owner: str, message_id: int, first: bytes, view: View) -> None:
        super().__init__(generations, owner, message_id, 0, first)
        self._view = view

    def _send_now(self, data: bytes) -> bool:
        """What is translated cannot be taken back."""
        return False

    async def read(self) -> bytes | None:
        while (data := await super().read()) is not None:
            events = filter(None, map(parse_sse_block, data.split(b"\n\n")))
            if translated := b"".join([self._view.translate(*event) for event in events]):
                return translated
        return None

    async def _load(self) -> Page:
        return await self._generations.load_published(self._owner, self._message_id, self._cursor)


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 13. Identity
#
# Who asks, and whether they may. On the loopback address without a token everybody is the one owner `local`, since
# whoever is on this machine could read the file as well; elsewhere a request shows a token (a program in its
# Authorization header, the page by a session cookie that signing in made). Every row has an owner, every query of
# section 10 is given one, and another owner's ids do not exist. Three attacks need no stolen token, and are refused
# before anything else: a name that resolves to this machine (DNS rebinding: the Host must be known; an address always
# is, for nobody can rebind it), a foreign page that posts with the user's cookie (the Origin of every write must be
# ours), and guessing (failures slow down their address, and everybody). Tokens are compared as hashes, in constant
# time, all of them each time. Deliberately absent: passwords, registration, roles. A proxy can add those.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

LOCAL_OWNER = "local"
SESSION_COOKIE = "llmchat_session"
PUBLIC_PATHS = frozenset({"/api/v1/health", "/sign-in"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
FORWARDING_HEADERS = frozenset(
    {b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip"}
)
CROSS_ORIGIN_HEADERS = [  # what a listed origin's page may send and read
    (b"access-control-allow-methods", b"GET, POST, PATCH, DELETE"),
    (b"access-control-allow-headers", b"authorization, content-type, idempotency-key, last-event-id, x-request-id"),
    (b"access-control-expose-headers", b"x-request-id, retry-after, location"),
    (b"access-control-max-age", b"600"),
    (b"cross-origin-resource-policy", b"cross-origin"),
    (b"vary", b"origin"),
]
FAILURES_FREE = 5  # failed sign-ins of one address before it has to wait
FAILURES_FREE_IN_ALL = 100  # and of all addresses together
FAILURE_SECONDS = 10  # for one failure to be forgotten; of all together, a tenth of it
FAILURES_ADDRESSES_MAX = 10_000  # addresses that are remembered; then the oldest is forgotten
TOKEN_CHARACTERS_MIN = 8  # of a token that somebody sets
TOKEN_WORDS = f"at least {TOKEN_CHARACTERS_MIN} printable ASCII characters without a space"


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def bind_token(cookie: str, token_hash: str) -> str:
    """What ties a session to the token that it began with."""
    return hmac.new(cookie.encode("utf-8", "surrogateescape"), token_hash.encode(), hashlib.sha256).hexdigest()


def is_loopback(host: str) -> bool:
    address = parse_ip(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def host_of(netloc: str) -> str:
    """'example.org' of 'Example.org:8000', '::1' of '[::1]:8000'; empty if it is neither."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*))(?::[0-9]+)?", netloc)
    return (match[1] or match[2] or "").lower() if match else ""


def bare_address(text: str) -> str:
    """An address as it is compared and logged: without a port, a zone, or IPv6 around an IPv4; empty if it is none."""
    match = re.fullmatch(r"\[([^\[\]]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+|(.*)", text.strip()[:100])
    found = "".join(filter(None, match.groups())) if match else ""
    address = parse_ip(found.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address or "")


def header_of(scope: Scope, name: bytes) -> str:
    """A request header; of one that came several times all, joined as RFC 9110 says; empty if there is none."""
    return ", ".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


def is_foreign(scope: Scope) -> bool:
    """Whether a browser says that another site's page, or another port's, made it ask."""
    return header_of(scope, b"sec-fetch-site") in ("cross-site", "same-site")


def peer_of(scope: Scope) -> str:
    """The address at the other end of the connection; empty if it has none."""
    return bare_address(scope["client"][0]) if scope.get("client") else ""


def cookie_of(scope: Scope) -> str:
    return HTTPConnection(scope).cookies.get(SESSION_COOKIE, "")


def comma_list(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def checked_list(setting: str, text: str, pattern: str, example: str) -> list[str]:
    """A setting's comma list. Raises StartError for an entry that does not fit."""
    for one in comma_list(text):
        if not re.fullmatch(pattern, one):
            raise StartError(f"{setting}: {one[:60]!r} is not accepted; it is a list such as {example}")
    return comma_list(text)


def parse_networks(text: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    try:
        return [ipaddress.ip_network(one, strict=False) for one in comma_list(text)]
    except ValueError as exc:
        raise StartError(f"LLMCHAT_TRUSTED_PROXIES: {reason_of(exc)}; it is a list of addresses and networks") from exc


def token_path(config: Config) -> str:
    return f"{config.db}.token"


def with_token(config: Config) -> tuple[Config, bool]:
    """The configuration with the token that it needs, and whether that was made now. Raises StartError."""
    if config.token or config.users or is_loopback(config.host):
        return config, False
    path = Path(token_path(config))
    try:
        is_new = not path.exists()
        if is_new:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(24) + "\n")
        elif is_open_to_others(path):
            path.chmod(0o600)
            log.warning(f"{path} was open to others and is not any more; delete it for a new token")
        token = path.read_text("latin-1").strip()
    except OSError as exc:
        reason = f"a token is needed to listen on {config.host}, and cannot be kept: {exc.strerror}"
        raise StartError(f"{path}: {reason}") from exc
    if not is_token(token):
        raise StartError(f"{path}: holds no token, which is {TOKEN_WORDS}; delete it for a new one")
    return replace(config, token=token), is_new


def is_token(text: str) -> bool:
    """Whether a token can be one: long enough, and made of what every client can put into a header."""
    return re.fullmatch(f"[\x21-\x7e]{{{TOKEN_CHARACTERS_MIN},}}", text) is not None


def token_owners(config: Config) -> dict[str, str]:
    """Owner by hash of token. Raises StartError; no message of it shows an entry, since a token may be at any place."""
    owners = {hash_secret(config.token): LOCAL_OWNER} if config.token else {}
    if config.token and not is_token(config.token):
        raise StartError(f"LLMCHAT_TOKEN: has {len(config.token)} characters; it is {TOKEN_WORDS}")
    for number, pair in enumerate(comma_list(config.users), 1):
        name, _, token = pair.partition(":")
        if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name) or not is_token(token):
            raise StartError(f"LLMCHAT_USERS: entry {number} is not accepted; it is name:token, {TOKEN_WORDS}")
        if hash_secret(token) in owners or name in owners.values():
            raise StartError(f"LLMCHAT_USERS: the name or the token of entry {number} is there twice")
        owners[hash_secret(token)] = name
    if not owners and (config.users or not is_loopback(config.host)):
        raise StartError(f"LLMCHAT_USERS: has no entry, and nobody may come in without a token on {config.host!r}")
    return owners


class Throttle:
    """Failed sign-ins: each costs its address, and everybody, some of a budget that refills by itself.

    An address from which somebody came in is spared the common budget, so that strangers cannot lock out those who
    are known; its own budget it keeps, or a user could guess other users' tokens. IPv6 counts by /64: that is what a
    single machine is given.
    """

    def __init__(self) -> None:
        self._failures: dict[str, tuple[float, float]] = {}  # address, or "" for all: how many, as of when
        self._known: dict[str, None] = {}  # addresses that were let in, the newest last

    def wait_seconds(self, address: str) -> float:
        """How long this address has to wait before it may try again; 0: not at all."""
        key = self._key(address)
        return max(self._wait(key), 0.0 if key in self._known else self._wait(""))

    def fail(self, address: str) -> None:
        for key in (self._key(address), ""):
            self._remember(self._failures, key, (self._count(key) + 1, time.monotonic()))

    def succeed(self, address: str) -> None:
        self._remember(self._known, self._key(address), None)

    def _key(self, address: str) -> str:
        return str(ipaddress.ip_network(f"{address}/64", strict=False)) if ":" in address else address or "-"

    def _remember(self, table: dict[str, T], key: str, value: T) -> None:
        table.pop(key, None)
        table[key] = value
        if len(table) > FAILURES_ADDRESSES_MAX:
            del table[next(iter(table))]

    def _count(self, key: str) -> float:
        count, at = self._failures.get(key, (0.0, 0.0))
        return max(count - (time.monotonic() - at) / (FAILURE_SECONDS if key else FAILURE_SECONDS / 10), 0.0)

    def _wait(self, key: str) -> float:
        free, seconds = (FAILURES_FREE, FAILURE_SECONDS) if key else (FAILURES_FREE_IN_ALL, FAILURE_SECONDS / 10)
        return max(self._count(key) - free + 1, 0.0) * seconds


class Gate:
    """Admits requests: sets scope["owner"], or raises what section 2 has for it."""

    def __init__(self, config: Config, store: Store) -> None:
        names = checked_list("LLMCHAT_HOSTS", config.hosts, r"\*|[A-Za-z0-9_.-]+(:[0-9]+)?", "chat.example.org")
        pattern, example = r"https?://[a-z0-9_.:\[\]-]+", "https://app.example.org"
        self._store = store
        self._owners = token_owners(config)
        self._proxies = parse_networks(config.trusted_proxies)
        self._hosts = {"localhost", config.host.lower(), *(one.partition(":")[0].lower() for one in names)}
        self._origins = set(checked_list("LLMCHAT_CORS_ORIGINS", config.cors_origins, pattern, example))
        self._session_seconds = config.session_days * 86_400
        self._sessions: dict[str, Session] = {}
        self._throttle = Throttle()

    async def open(self) -> None:
        self._sessions = {one.cookie_hash: one for one in await self._store.read(load_sessions)}

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a token."""
        return not self._owners

    def admit(self, scope: Scope) -> None:
        """Raises Forbidden, Unauthorized, RateLimited."""
        self._check_host(scope)
        self._check_origin(scope)
        self._check_forwarded(scope)
        scope["owner"] = LOCAL_OWNER if self.is_open else self._find_owner(scope)
        if scope["owner"] is None and scope["path"] not in PUBLIC_PATHS and not scope["path"].startswith("/web/"):
            raise Unauthorized("a token is needed: send Authorization: Bearer …, or open /sign-in in a browser")

    def _check_host(self, scope: Scope) -> None:
        netloc = header_of(scope, b"host")
        host = host_of(netloc)
        is_ours = host in self._hosts or host.endswith(".localhost") or "*" in self._hosts
        if not is_ours and parse_ip(host) is None:
            raise Forbidden(f"host: {netloc[:200]!r} is not a name of this service; LLMCHAT_HOSTS lists its names")

    def _check_origin(self, scope: Scope) -> None:
        """A browser says which page a request comes from; a program says nothing, and cannot be made to write by one.

        A foreign page may link here. Anything else of it is refused, reading too: a backup or a search costs something
        even if the page is not shown what came.
        """
        origin = header_of(scope, b"origin")
        if scope["method"] in SAFE_METHODS:
            refused = is_foreign(scope) and header_of(scope, b"sec-fetch-mode") not in ("", "navigate")
        else:
            same = not origin or origin.partition("://")[2].lower() == header_of(scope, b"host").lower()
            refused = is_foreign(scope) or not same
        if refused and origin not in self._origins:
            shown = repr(origin[:200]) if origin else "another site"
            raise Forbidden(
                f"origin: pages of {shown} may not use this service; LLMCHAT_CORS_ORIGINS lists those that may"
            )

    def _check_forwarded(self, scope: Scope) -> None:
        """Without a token only this machine may ask, and what a proxy passes on comes from anywhere."""
        is_forwarded = any(name in FORWARDING_HEADERS for name, _ in scope["headers"])
        if is_forwarded and self.is_open and not self._is_proxy(peer_of(scope)):
            raise Forbidden(
                "a proxy has passed this request on, and nobody needs a token here: set LLMCHAT_TOKEN, or"
                " LLMCHAT_TRUSTED_PROXIES if the proxy itself decides who may come in"
            )

    def cross_origin_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The headers that let a listed origin's page read the answer; none for all others."""
        origin = header_of(scope, b"origin")
        if origin not in self._origins:
            return []
        return [(b"access-control-allow-origin", origin.encode()), *CROSS_ORIGIN_HEADERS]

    def _find_owner(self, scope: Scope) -> str | None:
        scheme, _, token = header_of(scope, b"authorization").partition(" ")
        if scheme.lower() == "bearer":
            return self.owner_of_token(scope, token.strip())
        cookie = cookie_of(scope)
        session = self._sessions.get(hash_secret(cookie)) if cookie else None
        if session is None or session.expires_at_ms <= now_ms():
            return None
        known = (bind_token(cookie, token_hash) for token_hash, name in self._owners.items() if name == session.owner)
        return session.owner if any(hmac.compare_digest(one, session.token_hash) for one in known) else None

    def owner_of_token(self, scope: Scope, token: str) -> str:
        """Raises Unauthorized; RateLimited after too many of those."""
        address = self.address_of(scope)
        if wait := self._throttle.wait_seconds(address):
            raise RateLimited(f"too many failed sign-ins; wait {math.ceil(wait)} s", retry_after_seconds=wait)
        shown = hash_secret(token)
        found = [name for known, name in self._owners.items() if hmac.compare_digest(known, shown)]
        if not found:
            self._throttle.fail(address)
            log.warning("sign-in failed", extra={"fields": {"address": address, "request_id": scope["request_id"]}})
            raise Unauthorized("the token is not right")
        self._throttle.succeed(address)
        return found[0]

    def address_of(self, scope: Scope) -> str:
        """The client's address: the newest that no trusted proxy vouches for."""
        address = peer_of(scope)
        for hop in reversed(comma_list(header_of(scope, b"x-forwarded-for"))):
            if not self._is_proxy(address) or not bare_address(hop):
                break
            address = bare_address(hop)
        return address

    def _is_proxy(self, address: str) -> bool:
        return bool(address) and any(ipaddress.ip_address(address) in network for network in self._proxies)

    def is_encrypted(self, scope: Scope) -> bool:
        """Whether the browser speaks TLS: to us, to a proxy that we trust, or as the Origin of its own page says."""
        said = header_of(scope, b"x-forwarded-proto").rpartition(",")[2].strip().lower()
        of_page = header_of(scope, b"origin").lower().startswith("https://")
        return scope["scheme"] == "https" or of_page or (self._is_proxy(peer_of(scope)) and said == "https")

    async def sign_in(self, scope: Scope, token: str) -> str:
        """A new session for whoever has this token; returns its cookie. Raises Unauthorized, RateLimited."""
        owner = self.owner_of_token(scope, token)
        cookie = secrets.token_urlsafe(32)
        expires_at_ms = now_ms() + self._session_seconds * 1000
        session = Session(hash_secret(cookie), owner, bind_token(cookie, hash_secret(token)), expires_at_ms)
        await self._store.write(insert_session, session, durable=True)
        self._sessions[session.cookie_hash] = session
        secure = "; Secure" if self.is_encrypted(scope) else ""
        return f"{SESSION_COOKIE}={cookie}; Max-Age={self._session_seconds}; Path=/; HttpOnly; SameSite=Lax{secure}"

    async def sign_out(self, scope: Scope) -> str:
        """Ends the session; returns the cookie that takes the old one away."""
        cookie_hash = hash_secret(cookie_of(scope))
        await self._store.write(delete_session, cookie_hash, durable=True)
        self._sessions.pop(cookie_hash, None)
        return f"{SESSION_COOKIE}=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax"


def owner_of(request: Request) -> str:
    """The owner that a request speaks for."""
    owner = request.scope["owner"]
    assert owner is not None, "the gate admits no one else here"
    return cast(str, owner)


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 14. HTTP
#
# A handler parses, authorises, calls and renders; what it can raise is in section 2, and one renderer turns that into
# the error shape. ENDPOINTS is the API: the routes, /openapi.json, /docs and `help` are all read off it, so none of
# them can say something else. Bodies and query strings are converted to the types that also make the schema; what they
# refuse is told with the field, what was expected and the value that came. A stream is sent past Starlette's response
# classes, straight to the server, and to its socket as long as the client keeps up. The envelope around everything gives
# a request its id and its headers, and turns what was raised into a response.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

Characters = Annotated[str, Meta(min_length=1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
MaxTokens = Annotated[int, Meta(ge=1, le=10_000_000)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high"]
RowId = Annotated[int, Meta(ge=1, le=2**53)]
SystemPrompt = Annotated[str, Meta(max_length=SYSTEM_CHARACTERS_MAX)]
ModelName = Annotated[str, Meta(min_length=1, max_length=200, description="`provider/model`")]


class TextPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A part of a message that is text."""

    text: Characters


class ImagePart(Struct, forbid_unknown_fields=True, tag_field="type", tag="image"):
    """A part of a message that is an image, as base64 or as a data URL; never an address to fetch."""

    data: Annotated[str, Meta(min_length=1, description="base64, or a data URL")]
    media_type: Literal["image/png", "image/jpeg", "image/gif", "image/webp"] | None = None


class ToolResultPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="tool_result"):
    """What a tool that the last answer called gave; its text may be empty."""

    tool_call_id: Annotated[str, Meta(min_length=1, max_length=200)]
    text: str


class ContinueRequest(Struct, forbid_unknown_fields=True):
    """How the rest of an answer is to come."""

    model: ModelName | None = None
    provider: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    stream: bool = True
    background: bool = False


class Asked(ContinueRequest, kw_only=True, forbid_unknown_fields=True):
    """What every request for an answer may say; absent or null is the conversation's, or the provider's, default."""

    temperature: Temperature | None = None
    max_tokens: MaxTokens | None = None
    reasoning_effort: ReasoningEffort | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: Any = None
    fallbacks: Annotated[list[ModelName], Meta(max_length=FALLBACKS_MAX)] | None = None


class ChatRequest(Asked, kw_only=True, forbid_unknown_fields=True):
    """A question. Null is the same as absent, but for parent_id."""

    message: Characters | Annotated[list[TextPart | ImagePart | ToolResultPart], Meta(max_length=64)]
    conversation_id: Annotated[RowId, Meta(description="absent: a new conversation")] | None = None
    parent_id: (
        Annotated[RowId, Meta(description="absent: the newest leaf; null: a new first message")] | UnsetType | None
    ) = UNSET
    system: Annotated[SystemPrompt, Meta(description="kept with the conversation")] | None = None


class RegenerateRequest(Asked, kw_only=True, forbid_unknown_fields=True):
    """Another answer to the same question; what is absent is as it was for the first."""


class ConversationChanges(Struct, forbid_unknown_fields=True):
    """What of a conversation can be set; absent fields stay as they are. A parameter that is null is unset again."""

    title: Annotated[str, Meta(max_length=200, pattern=r"\S")] | UnsetType = UNSET
    system: SystemPrompt | UnsetType = UNSET
    temperature: Temperature | UnsetType | None = UNSET
    max_tokens: MaxTokens | UnsetType | None = UNSET
    reasoning_effort: ReasoningEffort | UnsetType | None = UNSET


class RenderQuery(Struct):
    render: Annotated[Literal["html"], Meta(description="answers as HTML too")] | UnsetType = UNSET


class StreamQuery(RenderQuery):
    after: Annotated[int, Meta(ge=0, le=2**53, description="the cursor; a Last-Event-ID header wins over it")] = 0


class ConversationsQuery(Struct):
    query: Annotated[str, Meta(max_length=QUERY_CHARACTERS_MAX, description="words, each matched as a prefix")] = ""
    limit: Annotated[int, Meta(ge=1, le=LIST_LIMIT_MAX)] = 50
    before: (
        Annotated[str, Meta(pattern="^[0-9]{1,15}-[0-9]{1,15}$", description="the next_before of the page before")]
        | UnsetType
    ) = UNSET


class UsageQuery(Struct):
    days: Annotated[int, Meta(ge=1, le=3660, description="how far back")] = 30


class ExportQuery(Struct):
    format: Annotated[Literal["json", "markdown"], Meta(description="complete, or to read")] = "json"


class HelpQuery(Struct):
    refresh: Annotated[bool, Meta(description="ask the providers for their models now")] = False


class LastEventId(Struct):
    offset: Annotated[int, Meta(ge=0, le=2**53)] = msgspec.field(name="Last-Event-ID")


class ErrorDetail(Struct):
    code: Literal[tuple(sorted(set(ERROR_STATUSES)))]  # type: ignore[valid-type]
    message: str
    retryable: bool
    request_id: str


class ErrorAnswer(Struct, omit_defaults=True):
    """Every error. `message_id`: the failed message, when there is one."""

    error: ErrorDetail
    message_id: int | None = None


class StartedAnswer(Struct):
    """A generation that was started in the background."""

    conversation_id: int
    message_id: int
    parent_id: int | None
    status: str


class StatusAnswer(Struct):
    message_id: int
    status: Literal["running", "completed", "stopped", "failed", "interrupted"]


class RunningGeneration(Struct):
    message_id: int
    conversation_id: int
    provider: str
    model: str
    characters: int
    seconds: float
    subscribers: int


class GenerationList(Struct):
    generations: list[RunningGeneration]


class HealthAnswer(Struct):
    """`status` is `ok`, `draining` or `store_unavailable`; the last two come with 503. Strangers get nothing else."""

    status: str
    version: str | UnsetType = UNSET
    database_writable: bool | UnsetType = UNSET
    running_generations: int | UnsetType = UNSET
    subscribers: int | UnsetType = UNSET
    last_flush_ms: float | UnsetType = UNSET
    uptime_seconds: float | UnsetType = UNSET


class ProviderHelp(Struct):
    name: str
    dialect: str
    base_url: str
    key: Literal["found", "missing", "rejected", "not needed"]
    models: list[str]
    error: str | None


class EndpointHelp(Struct):
    method: str
    path: str
    summary: str


class HelpAnswer(Struct):
    """`token_needed`: somebody can sign out."""

    version: str
    token_needed: bool
    default_model: str | None
    endpoints: list[EndpointHelp]
    providers: list[ProviderHelp]
    unusable_keys: list[str]


class UsageAnswer(Struct):
    """Newest day first, then by provider and model."""

    usage: list[UsageRow]


class DeletedAnswer(Struct):
    deleted: bool


@dataclass(frozen=True)
class Service:
    """Everything that a handler works with; built once by create_app."""

    config: Config
    store: Store
    providers: Providers
    generations: Generations
    gate: Gate
    endpoints: tuple[Endpoint, ...]
    started_at: float  # monotonic seconds
    at_work: set[str] = field(default_factory=set)  # kinds of work that are done once at a time
    web: dict[str, WebFile] = field(default_factory=dict)  # the page's files, read when one is first asked for


def service_of(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode_json(value), status, headers, "application/json")


# ── what comes in ───────────────────────────────────────────────────────────────────────────────────────────────────


async def read_json(request: Request, kind: type[T], bytes_max: int = REQUEST_BYTES_MAX) -> tuple[T, bytes]:
    """The body as a value of this type (none is an empty object), and as it came. Raises InvalidRequest, TooLarge."""
    body = await read_body(request, bytes_max)
    if body:
        check_content_type(request, "application/json")
    try:
        document = json.loads(body.decode() or "{}")
    except RecursionError as exc:
        raise InvalidRequest(f"body: is nested deeper than {NESTING_MAX} levels, the limit") from exc
    except ValueError as exc:
        raise InvalidRequest(f"body: is not JSON in UTF-8: {exc}") from exc
    refuse_unstorable(document)
    return convert(document, kind), body


def check_content_type(request: Request, *accepted: str) -> None:
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() not in accepted:
        raise InvalidRequest(f"content-type: {given or 'none'!r} is not accepted; send {' or '.join(accepted)}")


async def read_body(request: Request, bytes_max: int) -> bytes:
    return b"".join([data async for data in body_pieces(request, bytes_max)])


async def body_pieces(request: Request, bytes_max: int) -> AsyncIterator[bytes]:
    """The body as it comes. Raises TooLarge, and InvalidRequest for one that comes too slowly or not to its end."""
    loop, size, has_more = asyncio.get_running_loop(), 0, True
    started = loop.time()
    while has_more:
        now = loop.time()
        deadline = BODY_STALL_SECONDS + min(now, started + size / BODY_BYTES_PER_SECOND)
        try:
            async with asyncio.timeout_at(deadline):
                message = await request.receive()
        except TimeoutError as exc:
            limits = f"nothing for {BODY_STALL_SECONDS} s, or under {BODY_BYTES_PER_SECOND:,} bytes/s on the whole"
            raise InvalidRequest(f"body: came too slowly: {limits}") from exc
        if message["type"] == "http.disconnect":
            raise InvalidRequest("body: the connection was closed before it was whole")
        data, has_more = message.get("body", b""), message.get("more_body", False)
        size += len(data)
        if size > bytes_max:
            raise TooLarge(f"body: is larger than {bytes_max:,} bytes, the limit")
        yield data


def refuse_unstorable(value: Any, path: str = "", depth: int = 1) -> None:
    """Raises InvalidRequest, with its place, for what something on the way could not hold.

    At a NUL C code ends, SQLite's own functions among it; half of a surrogate pair is no UTF-8; other parsers have
    limits of their own on nesting and numbers.
    """
    trouble = None
    if isinstance(value, str) and ("\0" in value or (not value.isascii() and re.search("[\ud800-\udfff]", value))):
        trouble = "has a NUL character or half of a surrogate pair, which is not accepted"
    elif isinstance(value, float) and not math.isfinite(value):
        trouble = f"{value} is not accepted; it is a number within the range of 64-bit floats"
    elif isinstance(value, dict | list) and depth > NESTING_MAX:
        trouble = f"is nested deeper than {NESTING_MAX} levels, the limit"
    if trouble:
        raise InvalidRequest(f"{printable(path, 60) or 'body'}: {trouble}")
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        place = f"{path}.{key!s:.60}" if path else f"{key!s:.60}"
        if isinstance(key, str):
            refuse_unstorable(key, place)
        refuse_unstorable(one, place, depth + 1)


def convert(value: Any, kind: type[T], strict: bool = True) -> T:
    """A value of this type from JSON's; `strict=False`: from a query string's texts. Raises InvalidRequest."""
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(explain_validation(exc, value, kind)) from exc


def explain_validation(error: Exception, document: Any, kind: Any) -> str:
    """A decoder's complaint as field, expectation and value: 'temperature: expected `number` <= 2.0, got 7'."""
    said = in_json_words(error)
    match = re.fullmatch(r"(?s)(.*) - at `\$(.*)`", said)
    complaint, path = match.groups() if match else (said, "")
    names = re.findall(r"[\w-]+", path)
    if found := re.fullmatch(r"(?s)Object (contains unknown|missing required) field `(.*)`", complaint):
        words = "is required" if found[1] == "missing required" else "is not a field of this request"
        return f"{printable('.'.join([*names, found[2]]))}: {words}"
    value = document
    for name in names:
        value = value[int(name) if isinstance(value, list) else name]
    shown = json.dumps(value)
    if len(shown) > 60:
        shown = f"{shown[:57]}… ({len(shown):,} characters)"
    expected = complaint[:1].lower() + complaint[1:].partition(", got")[0]
    if expected.startswith("invalid") and (choices := choices_of(kind, names[-1])):
        expected = f"expected {' | '.join(choices)}"
    return f"{'.'.join(names) or 'body'}: {expected}, got {shown}"


def choices_of(kind: Any, name: str) -> list[str]:
    """The words of which a field is one, wherever in the type it is."""
    types = msgspec.json.schema_components([kind])[1].values()
    found = [one["properties"][name] for one in types if name in one.get("properties", {})]
    return [word for schema in found for one in (schema, *schema.get("anyOf", ())) for word in one.get("enum", ())]


def printable(text: str, most: int = 200) -> str:
    """A client's own words in a form that any log and any JSON can hold."""
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[:most])
    return shown if len(text) <= most else f"{shown}…"


def path_id(request: Request, name: str) -> int:
    """The id in a path. Raises NotFound for what cannot be one."""
    text = request.path_params["id"]
    if not re.fullmatch("[0-9]{1,15}", text):
        raise NotFound(f"{name}: there is no {name.removesuffix('_id')} {text[:40]!r}")
    return int(text)


def read_query(request: Request, kind: type[T]) -> T:
    """The query string as a value of this type. Raises InvalidRequest."""
    return convert(dict(request.query_params), kind, strict=False)


def cursor_of(request: Request) -> tuple[int, str]:
    """Where a stream begins, and the name under which the request says so: what a browser sends when it comes back,
    else `after`. Raises InvalidRequest."""
    last = request.headers.get("last-event-id")  # empty is what a browser has before the first event
    if last:
        return convert({"Last-Event-ID": last}, LastEventId, strict=False).offset, "Last-Event-ID"
    return read_query(request, StreamQuery).after, "after"


def wants_html(request: Request) -> bool:
    return read_query(request, RenderQuery).render is not UNSET


# ── what goes out ───────────────────────────────────────────────────────────────────────────────────────────────────


def error_response(error: LlmchatError, request_id: str) -> Response:
    """The one rendering of an error."""
    detail = ErrorDetail(error.code, error.message, error.retryable, request_id)
    return json_response(ErrorAnswer(detail), error.status, error_headers(error))


def error_headers(error: LlmchatError) -> dict[str, str]:
    """What a client is to know of an error before it reads the words."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 503 or error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds or 1)))
    return headers


async def watch_client(receive: Receive) -> None:
    """Returns once the client is gone, or the response is complete: the server says so only to who asks."""
    while (await receive())["type"] != "http.disconnect":
        pass


def direct_write(send: Send) -> Callable[[bytes], bool] | None:
    """What sends a piece of a streamed body at once, and refuses if the client does not keep up; None under a server
    that is not ours. It does what uvicorn's `send` does for such a piece, which is a coroutine and so takes a task."""
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle):
        return None

    def write(data: bytes) -> bool:
        if cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    return write


def cancel_on_failure(other: asyncio.Task[Any], task: asyncio.Task[Any]) -> None:
    """Lets no task go on that waits for what another one, which has failed, was to bring about."""
    if not task.cancelled() and task.exception() is not None:
        other.cancel()


class EventStream(Response):
    """A Server-Sent Events response: sends a subscriber's frames until its end or the client's."""

    media_type = "text/event-stream"
    HEADERS: ClassVar[list[tuple[bytes, bytes]]] = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store, no-transform"),
        (b"x-accel-buffering", b"no"),
    ]

    def __init__(self, subscriber: Subscriber) -> None:
        self._subscriber = subscriber

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._subscriber as subscriber:  # refuses before anything is sent
            # A task of its own sends, and this one only waits for the client: to wake a task is to climb through all the
            # layers that await each other in it, and here are a dozen.
            sending = asyncio.create_task(self._send(subscriber, scope, send), name="stream")
            sending.add_done_callback(partial(cancel_on_failure, cast("asyncio.Task[Any]", asyncio.current_task())))
            try:
                await watch_client(receive)
            finally:
                subscriber.close()
                await sending

    async def _send(self, subscriber: Subscriber, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.HEADERS})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        send = scope["server_send"]  # the envelope has nothing to do after the headers
        subscriber.write = direct_write(send)
        data = await subscriber.read()  # with the headers, in one piece
        while data is not None and not subscriber.is_over:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            data = await subscriber.read()
        await send({"type": "http.response.body", "body": data or b"", "more_body": False})


class Download(StreamingResponse):
    """A file for the client to keep: sends what a generator yields, in its own time. `close` is called in any case."""

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], media_type: str, file_name: str, length: int | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        sized = {} if length is None else {"Content-Length": str(length)}
        super().__init__(pieces, 200, {"Content-Disposition": attachment(file_name), **sized}, media_type)
        self._pieces = pieces
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(watch_client(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                await self._send(send, gone)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            self._close()

    async def _send(self, send: Send, gone: asyncio.Future[None]) -> None:
        async with contextlib.aclosing(self._pieces) as pieces:
            async for data in pieces:
                if gone.done():
                    return
                await send({"type": "http.response.body", "body": data, "more_body": True})


def attachment(file_name: str) -> str:
    """A Content-Disposition: the name in UTF-8 for whoever knows RFC 6266 and 5987, and in ASCII for everybody else."""
    plain = re.sub(r"[^A-Za-z0-9 ._()+-]", "_", file_name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(file_name, safe='')}"


async def read_chunks(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    while data := await asyncio.to_thread(file.read, DOWNLOAD_BYTES):
        yield data


# Of every response that does not say otherwise. A JSON answer that a browser is made to show as a page can do nothing.
SECURITY_HEADERS = {
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",  # one URL answers each owner differently; no cache on the way may mix them up
}


def routing_error(error: HTTPException, scope: Scope) -> LlmchatError:
    """No such path, or not with this method."""
    if error.headers and "Allow" in error.headers:
        return InvalidRequest(f"method: {scope['method']} is not accepted here; use {error.headers['Allow']}")
    return NotFound(f"path: there is nothing at {printable(scope['path'])}; GET /api/v1/help lists what there is")


class Envelope:
    """The outermost layer: a request's id and owner, the headers of every response, and what becomes of an exception."""

    def __init__(self, app: ASGIApp, gate: Gate, render_error: Callable[[LlmchatError, Scope], Response]) -> None:
        self._app = app
        self._gate = gate
        self._render_error = render_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["request_id"], scope["server_send"] = find_request_id(scope), send
        envelope = EnvelopedSend(scope["request_id"], send, self._gate.cross_origin_headers(scope))
        try:
            if scope["method"] == "OPTIONS" and envelope.cross_origin:
                response = Response(status_code=204)
            else:
                self._gate.admit(scope)
                await self._app(scope, receive, envelope)
                return
        except Exception as exc:
            response = self._refuse(exc, scope)
        if not envelope.started:
            await response(scope, receive, envelope)

    def _refuse(self, error: Exception, scope: Scope) -> Response:
        if isinstance(error, Unauthorized) and wants_page(scope):
            return redirect(f"/sign-in?next={urllib.parse.quote(scope['path'])}")
        if isinstance(error, HTTPException):
            response = self._render_error(routing_error(error, scope), scope)
            response.status_code = error.status_code
            response.headers.update(error.headers or {})
            return response
        if not isinstance(error, LlmchatError):
            log.exception("request broke", extra={"fields": {"request_id": scope["request_id"], "path": scope["path"]}})
            error = InternalError("an error of llmchat's own; its log says more under this request id")
        return self._render_error(error, scope)


class EnvelopedSend:
    """The server's `send`, with the headers that every response gets."""

    def __init__(self, request_id: str, send: Send, cross_origin: list[tuple[bytes, bytes]]) -> None:
        self.started = False
        self.cross_origin = cross_origin
        self._request_id = request_id.encode()
        self._send = send

    async def __call__(self, message: AsgiMessage) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            own = [(b"x-request-id", self._request_id), (b"date", http_date())]
            given = dict([*message["headers"], *self.cross_origin])
            security = [pair for pair in SECURITY_HEADERS.items() if pair[0] not in given]
            message["headers"] = [*message["headers"], *self.cross_origin, *security, *own]
        await self._send(message)


def find_request_id(scope: Scope) -> str:
    """The client's X-Request-ID if it is one that can be logged, else a new one."""
    given = header_of(scope, b"x-request-id")
    is_plain = len(given) <= HEADER_BYTES_MAX and re.fullmatch(r"[A-Za-z0-9._:/+=-]+", given)
    return given if is_plain else f"{random.getrandbits(64):016x}"


def http_date() -> bytes:
    return email.utils.formatdate(usegmt=True).encode()


# ── handlers ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def chat(request: Request) -> Response:
    service = service_of(request)
    asked, body = await read_json(request, ChatRequest, IMAGE_REQUEST_BYTES_MAX)
    check_answer(request, asked)
    turns = turns_of(asked.message)
    refuse_large(body, turns)
    system = asked.system
    if system is None and asked.conversation_id is None:
        system = service.config.system or None
    new = await new_message(request, asked, body, turns, asked.conversation_id, asked.parent_id, system)
    return await answer_started(request, asked, await service.generations.start(new))


async def regenerate(request: Request) -> Response:
    message_id = path_id(request, "message_id")
    asked, body = await read_again(request, RegenerateRequest, message_id)
    new = await new_message(request, asked, body + str(message_id).encode(), ())
    started = await service_of(request).generations.regenerate(message_id, new)
    return await answer_started(request, asked, started)


async def continue_answer(request: Request) -> Response:
    service, message_id = service_of(request), path_id(request, "message_id")
    asked, _ = await read_again(request, ContinueRequest, message_id)
    target = await service.providers.resolve(asked.provider, asked.model)
    started = await service.generations.go_on(owner_of(request), message_id, target)
    return await answer_started(request, asked, started)


async def read_again(request: Request, kind: type[T], message_id: int) -> tuple[T, bytes]:
    """What is asked of an answer that is there; without another model, of its own."""
    value, body = await read_json(request, kind)
    asked: Any = value
    check_answer(request, asked)
    message = await service_of(request).store.read(load_message, owner_of(request), message_id)
    if asked.model is None and asked.provider is None and message.model:
        asked.provider, asked.model = message.provider, message.model
    return value, body


def check_answer(request: Request, asked: Any) -> None:
    """Refuses what could not be streamed before it is paid for. Raises Overloaded, RateLimited."""
    if asked.stream and not getattr(asked, "background", False):
        service_of(request).generations.check_streams(owner_of(request))


def refuse_large(body: bytes, turns: Sequence[Turn]) -> None:
    """Raises TooLarge for a body that only images may fill."""
    if len(body) > REQUEST_BYTES_MAX and not any(delta.kind == "image" for turn in turns for delta in turn.content):
        raise TooLarge(f"body: has {len(body):,} bytes; without images the limit is {REQUEST_BYTES_MAX:,}")


async def new_message(
    request: Request, asked: Asked, body: bytes, turns: tuple[Turn, ...],
    conversation_id: int | None = None, parent_id: int | UnsetType | None = UNSET, system: str | None = None,
) -> NewMessage:  # fmt: skip
    """What a request means. Raises InvalidRequest for a model that nobody has, before anything is stored."""
    service, key = service_of(request), idempotency_key(request)
    names = asked.fallbacks if asked.fallbacks is not None else comma_list(service.config.fallbacks)
    target = await service.providers.resolve(asked.provider, asked.model)
    return NewMessage(
        owner=owner_of(request),
        conversation_id=conversation_id,
        parent_id=parent_id,
        turns=turns,
        system=system,
        targets=(target, *[await service.providers.resolve(None, name, "fallbacks") for name in names]),
        parameters=msgspec.convert(asked, Parameters, from_attributes=True),
        idempotency_key=key,
        request_hash=hashlib.sha256(body).hexdigest() if key else None,
    )


def idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= HEADER_BYTES_MAX and key.isascii() and key.isprintable()):
        limit = f"1 to {HEADER_BYTES_MAX} printable ASCII characters"
        raise InvalidRequest(f"Idempotency-Key: has {len(key)} characters; it is {limit}")
    return key


def turns_of(message: str | list[TextPart | ImagePart | ToolResultPart]) -> tuple[Turn, ...]:
    """A request's message as turns: the results of tools each in one of its own, then what the user says."""
    results, content = [], []
    for index, part in enumerate([TextPart(message)] if isinstance(message, str) else message):
        if isinstance(part, ImagePart):
            content.append(image_of(part, f"message.{index}"))
        elif isinstance(part, TextPart):
            content.append(Delta("text", part.text))
        else:
            text = (Delta("text", part.text),) if part.text else ()
            results.append(Turn("tool", text, part.tool_call_id, f"message.{index}.tool_call_id"))
    turns = (*results, Turn("user", tuple(content))) if content else tuple(results)
    if not any(map(says_something, turns)):
        raise InvalidRequest("message: is empty; it has at least one character that is not a space")
    return turns


def image_of(part: ImagePart, name: str) -> Delta:
    """An image as content. Raises InvalidRequest, TooLarge; its bytes say what it is, whatever its label does."""
    head, comma, rest = part.data.partition(",")
    encoded = rest if comma and head.startswith("data:") and head.endswith(";base64") else part.data
    try:
        data = base64.b64decode(encoded, validate=True)
    except ValueError as exc:
        words = "is neither base64 nor a data URL with base64; an address is not fetched"
        raise InvalidRequest(f"{name}.data: {words}") from exc
    if len(data) > IMAGE_BYTES_MAX:
        raise TooLarge(f"{name}.data: has {len(data):,} bytes; the limit is {IMAGE_BYTES_MAX:,}")
    found = image_type(data)
    if found is None or part.media_type not in (None, found):
        words = f"is {found or 'no image'}; accepted are PNG, JPEG, GIF and WebP under their own media_type"
        raise InvalidRequest(f"{name}.data: {words}")
    return Delta("image", encode_json({"media_type": found, "data": encoded}).decode())


async def answer_started(request: Request, asked: ContinueRequest, started: Started) -> Response:
    """A generation in the form that its request asked for: at once, as a stream from its start, or whole."""
    message_id = started.message_id
    if asked.background:
        answer = StartedAnswer(started.conversation_id, message_id, started.parent_id, started.status)
        return json_response(answer, 202, {"Location": f"/api/v1/messages/{message_id}"})
    if asked.stream:
        cursor = sum(len(delta.text) for delta in started.content)
        return EventStream(await service_of(request).generations.subscribe(owner_of(request), message_id, cursor))
    message, error = await ended_message(request, message_id)
    if error is None:
        return json_response(message)
    status = ERROR_STATUSES.get(error["code"], 500)
    answer_error = ErrorAnswer(ErrorDetail(**error, request_id=request.scope["request_id"]), message_id)
    return json_response(answer_error, status, {"Retry-After": "1"} if status == 503 else None)


async def ended_message(request: Request, message_id: int) -> tuple[Message, dict[str, Any] | None]:
    """The message once it has ended, and its error. The generation knows that too when the database is away."""
    service, owner = service_of(request), owner_of(request)
    generation = service.generations.find(owner, message_id)
    if generation is not None:
        await generation.ended.wait()
    message = await service.store.read(load_message, owner, message_id)
    if generation is not None and generation.ending is not None:
        return message, generation.ending.error
    if generation is None and message.status == "running":  # a repeat, a moment before what it repeats is known here
        await asyncio.sleep(STARTED_WAIT_SECONDS)
        return await ended_message(request, message_id)
    return message, message.error


async def get_message(request: Request) -> Response:
    message = await service_of(request).store.read(load_message, owner_of(request), path_id(request, "message_id"))
    await add_html(request, message)
    return json_response(message)


async def add_html(request: Request, *messages: Message) -> None:
    """Gives ended answers their HTML, if it was asked for; a running one has a stream for it."""
    for message in messages if wants_html(request) else ():
        if message.role == "assistant" and message.status != "running":
            message.html = await service_of(request).generations.render_message(message)


async def stream_message(request: Request) -> Response:
    generations, owner, message_id = service_of(request).generations, owner_of(request), path_id(request, "message_id")
    if wants_html(request):
        return EventStream(await generations.subscribe_to_html(owner, message_id))
    return EventStream(await generations.subscribe(owner, message_id, *cursor_of(request)))


async def stop_message(request: Request) -> Response:
    message = await stopped_message(request, path_id(request, "message_id"))
    return json_response(StatusAnswer(message.id, message.status))


async def stopped_message(request: Request, message_id: int) -> Message:
    """The message, which has ended. One that is stored as running and about to be launched is waited for."""
    service, owner = service_of(request), owner_of(request)
    while True:
        await service.generations.stop(owner, message_id)
        message = await service.store.read(load_message, owner, message_id)
        if message.status != "running":
            return message
        await asyncio.sleep(STARTED_WAIT_SECONDS)


async def list_generations(request: Request) -> Response:
    running = [one for one in service_of(request).generations.running.values() if one.owner == owner_of(request)]
    generations = [
        RunningGeneration(
            message_id=one.message_id,
            conversation_id=one.conversation_id,
            provider=one.provider,
            model=one.model,
            characters=one.published,
            seconds=round(time.monotonic() - one.started_at, 3),
            subscribers=len(one.subscriptions),
        )
        for one in running
    ]
    return json_response(GenerationList(generations))


async def get_usage(request: Request) -> Response:
    days = read_query(request, UsageQuery).days
    return json_response(UsageAnswer(await service_of(request).store.read(sum_usage, owner_of(request), days)))


async def get_conversations(request: Request) -> Response:
    store, owner, asked = service_of(request).store, owner_of(request), read_query(request, ConversationsQuery)
    if asked.query.strip():
        return json_response(await store.search(owner, asked.query, asked.limit))
    before = None if asked.before is UNSET else tuple(map(int, asked.before.split("-")))
    return json_response(await store.read(list_conversations, owner, asked.limit, before))


async def get_conversation(request: Request) -> Response:
    conversation_id = path_id(request, "conversation_id")
    conversation = await service_of(request).store.read(load_conversation, owner_of(request), conversation_id)
    await add_html(request, *conversation.messages)
    return json_response(conversation)


async def patch_conversation(request: Request) -> Response:
    conversation_id = path_id(request, "conversation_id")
    asked, _ = await read_json(request, ConversationChanges)
    changes = {name: value for name, value in msgspec.structs.asdict(asked).items() if value is not UNSET}
    store, owner = service_of(request).store, owner_of(request)
    return json_response(await store.write(update_conversation, owner, conversation_id, changes, durable=True))


async def remove_conversation(request: Request) -> Response:
    service, owner, conversation_id = service_of(request), owner_of(request), path_id(request, "conversation_id")
    while running := await service.store.write(delete_conversation, owner, conversation_id, durable=True):
        for message_id in running:
            await service.generations.stop(owner, message_id)
    return json_response(DeletedAnswer(True))


async def get_health(request: Request) -> Response:
    service, is_known = service_of(request), request.scope["owner"] is not None
    generations = service.generations
    writable = await service.store.is_writable(0 if is_known else HEALTH_SECONDS)
    answer = HealthAnswer("store_unavailable" if not writable else "draining" if generations.draining else "ok")
    if is_known:
        answer.version = __version__
        answer.database_writable = writable
        answer.running_generations = len(generations.running)
        answer.subscribers = sum(generations.streams.values())
        answer.last_flush_ms = round(generations.flusher.flush_ms, 3)
        answer.uptime_seconds = round(time.monotonic() - service.started_at, 3)
    return json_response(answer) if answer.status == "ok" else json_response(answer, 503, {"Retry-After": "1"})


async def get_help(request: Request) -> Response:
    service = service_of(request)
    age_seconds_max = 0 if read_query(request, HelpQuery).refresh else MODELS_CACHE_SECONDS
    listed = await asyncio.gather(*(provider_help(service, one, age_seconds_max) for one in service.config.providers))
    endpoints = [EndpointHelp(one.method, one.shown_path, one.summary) for one in service.endpoints]
    first = next((f"{one.name}/{one.models[0]}" for one in listed if one.models), None)
    default, unusable = service.config.default_model or first, list(service.config.unusable_keys)
    return json_response(HelpAnswer(__version__, not service.gate.is_open, default, endpoints, listed, unusable))


async def provider_help(service: Service, provider: Provider, age_seconds_max: float) -> ProviderHelp:
    models = await service.providers.list_models(provider, age_seconds_max)
    key: Literal["found", "missing", "rejected", "not needed"] = "found" if provider.key else "not needed"
    if provider.name in service.providers.rejected:
        key = "rejected" if provider.key else "missing"
    return ProviderHelp(provider.name, provider.dialect, provider.base_url, key, list(models.models), models.error)


async def export_conversation(request: Request) -> Response:
    service, owner, conversation_id = service_of(request), owner_of(request), path_id(request, "conversation_id")
    form = read_query(request, ExportQuery).format
    conversation, path, others = await service.store.read(load_outline, owner, conversation_id)
    name = safe_file_name(conversation.title, f"conversation {conversation_id}")
    if form == "json":
        return Download(archive_pieces(service.store, owner, [conversation_id]), "application/json", f"{name}.json")
    pieces = markdown_pieces(service.store, owner, path, markdown_head(conversation, len(path), others))
    return Download(pieces, "text/markdown; charset=utf-8", f"{name}.md")


async def export_all(request: Request) -> Response:
    store, owner = service_of(request).store, owner_of(request)
    pieces = archive_pieces(store, owner, await store.read(list_ids, owner))
    return Download(pieces, "application/json", file_name_of_now("json"))


def file_name_of_now(ending: str) -> str:
    return time.strftime(f"llmchat-%Y-%m-%d-%H%M%S.{ending}", time.gmtime())


ARCHIVE_TYPES = ("application/json", "application/zip", "application/x-zip-compressed")


async def import_conversations(request: Request) -> Response:
    service = service_of(request)
    check_content_type(request, *ARCHIVE_TYPES)
    with alone(service, "import"):
        async with spool(request, service.config.db) as file:
            return json_response(await import_archive(service.store, owner_of(request), file))


@asynccontextmanager
async def spool(request: Request, database: str) -> AsyncIterator[BinaryIO]:
    """The request's body as a file without a name, beside the database: /tmp is often memory."""
    try:
        opened = await asyncio.to_thread(partial(tempfile.TemporaryFile, dir=Path(database).parent))
        with cast(BinaryIO, opened) as file:
            async for data in body_pieces(request, ARCHIVE_BYTES_MAX):
                await asyncio.to_thread(file.write, data)
            await asyncio.to_thread(file.seek, 0)
            yield file
    except OSError as exc:
        raise StoreUnavailable(f"body: cannot be kept: {exc.strerror}", retry_after_seconds=10) from exc


async def archive_pieces(store: Store, owner: str, ids: Sequence[int]) -> AsyncGenerator[bytes, None]:
    """An archive of these conversations; a page of messages at a time is in memory."""
    yield ARCHIVE_START
    comma = b""
    for conversation_id in ids:
        with contextlib.suppress(NotFound):  # deleted meanwhile
            page, after = await store.read(archive_page, owner, conversation_id, 0)
            yield comma + page
            comma = b",\n"
            while after is not None:
                page, after = await store.read(archive_page, owner, conversation_id, after)
                yield page
    yield ARCHIVE_END


async def markdown_pieces(store: Store, owner: str, path: Sequence[int], head: str) -> AsyncGenerator[bytes, None]:
    yield head.encode()
    for message_id in path:
        yield markdown_message(await store.read(load_message, owner, message_id)).encode()


def safe_file_name(title: str, otherwise: str) -> str:
    """A title as a file name that every system takes: no separator, no device's name, no leading dot, no long one."""
    name = "".join("-" if one in '/\\:*?"<>|' else one if one.isprintable() else " " for one in title)
    name = " ".join(name.split()).strip(". ")[:TITLE_CHARACTERS_MAX].strip(". ")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        name = f"_{name}"
    return name or otherwise


@contextlib.contextmanager
def alone(service: Service, what: str) -> Iterator[None]:
    """Holds a kind of work that is done once at a time, for the sake of the disk. Raises Overloaded."""
    if what in service.at_work:
        raise Overloaded(f"{what}: another one is running; try again when it has ended", retry_after_seconds=10)
    service.at_work.add(what)
    try:
        yield
    finally:
        service.at_work.discard(what)


async def get_backup(request: Request) -> Response:
    service = service_of(request)
    if service.config.users:
        raise Forbidden(
            "backup: would hold every owner's conversations; run `llmchat backup FILE` on the server itself"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone(service, "backup"))
        file = stack.enter_context(await service.store.open_copy())
        size, close = os.fstat(file.fileno()).st_size, stack.pop_all().close  # the download closes now
    return Download(read_chunks(file), "application/vnd.sqlite3", file_name_of_now("db"), size, close)


async def get_openapi(request: Request) -> Response:
    return json_response(openapi_document(service_of(request).endpoints))


async def get_docs(request: Request) -> Response:
    return html_page(docs_page(service_of(request).endpoints, str(request.base_url).rstrip("/")))


# ── pages that stand alone: the docs and the sign-in ────────────────────────────────────────────────────────────────

PAGE_STYLE = """
:root { color-scheme: light dark; --accent: light-dark(#0b6b53, #62d0ae); --soft: light-dark(#5f655d, #9aa59f); --line: light-dark(#d3cec2, #3b4341);
  font: 16px/1.6 -apple-system, "Segoe UI", Roboto, Ubuntu, Cantarell, "Noto Sans", "Liberation Sans", Arial, sans-serif;
  background: light-dark(#fcfbf8, #161918); color: light-dark(#20241f, #e3e8e4) }
body { max-width: 54rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.05rem } h2 code { font-weight: 600 }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem }
pre { padding: .75rem 1rem; overflow-x: auto; border-radius: .5rem; background: color-mix(in srgb, currentColor 7%, transparent) }
table { border-collapse: collapse; font-size: .9rem } td, th { text-align: left; vertical-align: top; padding: .15rem 1rem .15rem 0 }
.method { display: inline-block; min-width: 4rem; color: var(--accent) }
.sign-in { max-width: 22rem; margin: 18vh auto 0 } .sign-in h1 { margin: 0 0 1.25rem; font-size: 1.6rem; letter-spacing: -.02em }
.sign-in label { font-weight: 500 } .sign-in small { display: block; margin-top: 1rem; color: var(--soft) }
.sign-in :is(input, button) { font: inherit; width: 100%; box-sizing: border-box; padding: .65rem .9rem; border-radius: .75rem }
.sign-in input { margin: .35rem 0 .75rem; border: 1px solid var(--line); background: light-dark(#fff, #1d2120); color: inherit }
.sign-in button { border: 0; font-weight: 500; background: var(--accent); color: light-dark(#fff, #0b1f18); cursor: pointer }
.sign-in :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
.error { color: light-dark(#a3211a, #ff9d94) }
"""
PAGE_POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(PAGE_STYLE.encode()).digest()).decode()}';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def html_page(body: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A page without a script and without another file. With no-referrer a browser posts a form with `Origin: null`."""
    document = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>llmchat</title><style>{PAGE_STYLE}</style><body>{body}</html>"
    )
    own = {"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "same-origin"}
    return HTMLResponse(document, status, {**own, **(headers or {})})


async def sign_in(request: Request) -> Response:
    """The form; with a token, from the form or from the link that the first start printed, the sign-in itself."""
    gate, is_link = service_of(request).gate, request.method != "POST"
    form = "" if is_link else (await read_body(request, SIGN_IN_BYTES_MAX)).decode("utf-8", "replace")
    given = request.query_params if is_link else dict(urllib.parse.parse_qsl(form))
    next_path = given.get("next", "/")
    if gate.is_open:
        return redirect("/")
    if "token" not in given or (is_link and is_foreign(request.scope)):
        return sign_in_form(next_path)
    try:
        cookie = await gate.sign_in(request.scope, given["token"].strip())
    except LlmchatError as exc:
        return sign_in_form(next_path, exc)
    return redirect(next_path, {"Set-Cookie": cookie})


async def sign_out(request: Request) -> Response:
    return redirect("/sign-in", {"Set-Cookie": await service_of(request).gate.sign_out(request.scope)})


def sign_in_form(next_path: str, error: LlmchatError | None = None) -> Response:
    said = f'<p class="error" role="alert">{html.escape(error.message)}' if error is not None else ""
    form = (
        f'<form class="sign-in" method="post" action="/sign-in"><h1>llmchat</h1>{said}'
        f'<p><label>Token<input name="token" type="password" autocomplete="current-password" required autofocus></label>'
        f'<input type="hidden" name="next" value="{html.escape(next_path)}"><button>Sign in</button>'
        "<small>It is what <code>LLMCHAT_TOKEN</code> or <code>LLMCHAT_USERS</code> says where llmchat runs; without either,"
        " a link to sign in was printed when it first started.</small></form>"
    )
    return html_page(form) if error is None else html_page(form, error.status, error_headers(error))


def redirect(path: str, headers: Mapping[str, str] | None = None) -> Response:
    """303 to a path of ours; anything that a browser could take for another site becomes `/`."""
    safe = path if re.fullmatch(r"/(?![/\\])[\x21-\x7e]*", path) else "/"
    return Response(status_code=303, headers={"Location": safe, **(headers or {})})


def wants_page(scope: Scope) -> bool:
    """Whether a browser asks, to show the answer."""
    return scope["method"] == "GET" and "text/html" in header_of(scope, b"accept")


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────
#
# The files of web/ and nothing else of the disk: read, hashed and compressed at the first request for any of them, then
# served from memory. What names them in HTML and in the manifest carries their hash, so a browser keeps each for ever
# and asks only for the page itself, which is usually 304. Streams and API answers are never compressed.

WEB = Path(__file__).resolve().parent / "web"
WEB_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
PAGE_HEADERS = {  # of every file of the page; same-origin, not no-referrer: that would make a form's Origin null
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "Vary": "Accept, Accept-Encoding",
}


class WebFile(NamedTuple):
    """A file of the page as it goes out, plain and with gzip."""

    content: bytes
    packed: bytes
    media_type: str
    digest: str


def load_web_files(folder: Path) -> dict[str, WebFile]:
    """The page's files by name, each one's mentions of the others with their hash."""
    files: dict[str, WebFile] = {}

    def with_hash(mention: re.Match[bytes]) -> bytes:
        file = files.get(mention[1].decode())
        return mention[0] if file is None else mention[0] + b"?v=" + file.digest.encode()

    sources = {path: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in WEB_TYPES}
    for path, source in sorted(sources.items(), key=lambda pair: (b"/web/" in pair[1], pair[0].name == "index.html")):
        content = re.sub(rb"/web/([\w.-]+)", with_hash, source)
        digest = hashlib.sha256(content).hexdigest()[:16]
        files[path.name] = WebFile(content, gzip.compress(content, mtime=0), WEB_TYPES[path.suffix], digest)
    return files


def web_response(request: Request, name: str) -> Response:
    """A file of the page, or 304. Raises NotFound."""
    service = service_of(request)
    if not service.web and WEB.is_dir():
        service.web.update(load_web_files(WEB))
    file = service.web.get(name)
    if file is None:
        raise NotFound(f"path: there is no file {printable(name, 60)!r} of the page")
    forever = request.query_params.get("v") == file.digest
    cached = "public, max-age=31536000, immutable" if forever else "no-cache"
    headers = {**PAGE_HEADERS, "Cache-Control": cached, "ETag": f'W/"{file.digest}"'}
    if file.digest in request.headers.get("if-none-match", ""):
        return Response(None, 304, headers)
    if re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", request.headers.get("accept-encoding", "")):
        return Response(file.packed, 200, {**headers, "Content-Encoding": "gzip"}, file.media_type)
    return Response(file.content, 200, headers, file.media_type)


async def get_web_file(request: Request) -> Response:
    return web_response(request, request.path_params["name"])


async def get_page(request: Request) -> Response:
    return web_response(request, "index.html")


async def get_root(request: Request) -> Response:
    """The page to a browser, health to everybody else."""
    if "text/html" in request.headers.get("accept", ""):
        return await get_page(request)
    answer = await get_health(request)
    answer.headers["Vary"] = "Accept"
    return answer


# ── the table of endpoints, and what is read off it ─────────────────────────────────────────────────────────────────


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One call of the API. `answer`, `body` and `query` are types; `curl` is what follows the URL in its example."""

    method: str
    path: str
    handler: Handler
    summary: str
    answer: Any = None
    body: Any = None
    query: Any = None
    streams: bool = False
    errors: tuple[int, ...] = ()  # statuses that do not follow from the rest
    curl: str = ""
    media: tuple[str, ...] = ()  # of an answer, beside the JSON that `answer` describes
    accepts: tuple[str, ...] = ()  # media types of a body that no type describes
    error: Any = ErrorAnswer  # the shape of those errors
    example_id: str = ""
    id_schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "integer", "minimum": 1})

    @property
    def shown_path(self) -> str:
        """The path without the router's own notation."""
        return self.path.replace(":path}", "}")

    @property
    def statuses(self) -> list[int]:
        """Of every error that it can answer with."""
        statuses = {*self.errors, 401, 403, 429, 500}
        statuses |= {400} if self.query else {400, 413} if self.body or self.accepts else set()
        return sorted(statuses | ({404} if "{id}" in self.shown_path else set()))


JSON_CURL = "-H 'Content-Type: application/json' -d "
OF_ANSWERS = (404, 409, 422, 502, 503, 504)  # what a question can end in

ENDPOINTS = (
    Endpoint("GET", "/", get_root, "the page to a browser, the state of the service to everybody else", HealthAnswer, errors=(503,)),
    Endpoint("GET", "/api/v1/health", get_health, "whether the service can do its work", HealthAnswer, errors=(503,)),
    Endpoint("GET", "/api/v1/help", get_help, "what can be done, with which providers and models", HelpAnswer, query=HelpQuery),
    Endpoint(
        "POST", "/api/v1/chat", chat, "asks a question: streams the answer, or gives it whole, or starts it in the background",
        Message, ChatRequest, streams=True, errors=OF_ANSWERS, curl="-N " + JSON_CURL + """'{"message": "Hello"}'""",
    ),
    Endpoint("GET", "/api/v1/messages/{id}", get_message, "a message: content, status, error, usage, timing", Message, query=RenderQuery),
    Endpoint(
        "GET", "/api/v1/messages/{id}/stream", stream_message, "a message's content from the cursor on, live or long finished",
        query=StreamQuery, streams=True, errors=(503,), curl="-N -H 'Last-Event-ID: 5'",
    ),
    Endpoint("POST", "/api/v1/messages/{id}/stop", stop_message, "ends a running answer; what is there of it is kept", StatusAnswer, errors=(503,)),
    Endpoint(
        "POST", "/api/v1/messages/{id}/regenerate", regenerate, "another answer to the same question, beside this one",
        Message, RegenerateRequest, streams=True, errors=OF_ANSWERS, curl="-N " + JSON_CURL + """'{"temperature": 1}'""",
    ),
    Endpoint(
        "POST", "/api/v1/messages/{id}/continue", continue_answer, "goes on with an answer that broke off, in place",
        Message, ContinueRequest, streams=True, errors=OF_ANSWERS, curl="-N -X POST",
    ),
    Endpoint("GET", "/api/v1/generations", list_generations, "what is running now", GenerationList),
    Endpoint("GET", "/api/v1/conversations", get_conversations, "conversations, newest activity first", ConversationList, query=ConversationsQuery),
    Endpoint("GET", "/api/v1/conversations/{id}", get_conversation, "a conversation with its tree of messages", Conversation, query=RenderQuery),
    Endpoint(
        "PATCH", "/api/v1/conversations/{id}", patch_conversation, "sets a conversation's title, system prompt or parameters",
        ConversationSummary, ConversationChanges, curl="-X PATCH " + JSON_CURL + """'{"title": "Greetings"}'""",
    ),
    Endpoint("DELETE", "/api/v1/conversations/{id}", remove_conversation, "deletes a conversation with everything in it", DeletedAnswer),
    Endpoint(
        "GET", "/api/v1/conversations/{id}/export", export_conversation,
        "a conversation as a file, complete but for keys, ids and what /v1/responses repeats of its requests",
        Archive, query=ExportQuery, curl="-OJ", media=("text/markdown",),
    ),
    Endpoint(
        "POST", "/api/v1/import", import_conversations, "brings in an export: llmchat's, ChatGPT's or Claude's", ImportAnswer,
        errors=(503,), accepts=ARCHIVE_TYPES[:2], curl="-H 'Content-Type: application/json' --data-binary @conversations.json",
    ),
    Endpoint("GET", "/api/v1/export", export_all, "all conversations as one file", Archive, curl="-OJ"),
    Endpoint(
        "GET", "/api/v1/backup", get_backup, "a copy of the whole database, to start on with --db",
        errors=(503,), curl="-OJ", media=("application/vnd.sqlite3",),
    ),
    Endpoint("GET", "/api/v1/usage", get_usage, "tokens by day and model", UsageAnswer, query=UsageQuery),
    Endpoint("GET", "/openapi.json", get_openapi, "this API as OpenAPI 3.1"),
    Endpoint("GET", "/docs", get_docs, "this API, to read", media=("text/html",)),
)  # fmt: skip


def routes_of(endpoints: Iterable[Endpoint]) -> list[Route]:
    """One route per path, so that a wrong method is told all that are right."""
    by_path: dict[str, dict[str, Handler]] = {}
    for one in endpoints:
        by_path.setdefault(one.path, {})[one.method] = one.handler
    return [Route(path, partial(dispatch, handlers), methods=list(handlers)) for path, handlers in by_path.items()]


async def dispatch(handlers: Mapping[str, Handler], request: Request) -> Response:
    return await handlers["GET" if request.method == "HEAD" else request.method](request)


PAGE_ROUTES = [
    Route("/c/{id}", get_page, methods=["GET"]),
    Route("/web/{name}", get_web_file, methods=["GET"]),
    Route("/sign-in", sign_in, methods=["GET", "POST"]),
    Route("/sign-out", sign_out, methods=["POST"]),
]


def fields_of(kind: Any) -> dict[str, Any]:
    """The schemas of a type's fields; of None there are none."""
    return cast(dict[str, Any], msgspec.json.schema_components([kind])[1][kind.__name__]["properties"]) if kind else {}


def openapi_document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """OpenAPI 3.1, from the types that validate the requests and encode the answers."""
    named = {kind for one in endpoints for kind in (one.body, one.answer, one.error) if kind} | {StartedAnswer}
    types = sorted(named, key=lambda kind: cast(str, kind.__name__))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    references = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        paths.setdefault(one.shown_path, {})[one.method.lower()] = operation_of(one, references)
    words = "Answers that survive: streamed, stored, resumed."
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmchat", "version": __version__, "description": words},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],  # on this machine alone none is needed
    }


def operation_of(one: Endpoint, references: Mapping[Any, Any]) -> dict[str, Any]:
    answer: Any = {"type": "object"} if one.error is not ErrorAnswer else references.get(one.answer)  # OpenAI's own
    content = {"application/json": {"schema": answer}} if answer else {}
    content |= {"text/event-stream": {}} if one.streams else {}
    content |= {media: {} for media in one.media}
    responses = {"200": {"description": one.summary, "content": content}}
    if one.streams and one.body and one.answer:
        started = {"application/json": {"schema": references[StartedAnswer]}}
        responses["202"] = {"description": "started in the background", "content": started}
    for status in one.statuses:
        shape = references[HealthAnswer if one.answer is HealthAnswer and status == 503 else one.error]
        responses[str(status)] = {"description": "an error", "content": {"application/json": {"schema": shape}}}
    parameters = [{"name": name, "in": "query", "schema": schema} for name, schema in fields_of(one.query).items()]
    if "{id}" in one.shown_path:
        parameters.append({"name": "id", "in": "path", "required": True, "schema": one.id_schema})
    operation: dict[str, Any] = {"summary": one.summary, "operationId": one.handler.__name__, "parameters": parameters}
    accepted: dict[str, Any] = {media: {} for media in one.accepts}
    accepted |= {"application/json": {"schema": references[one.body]}} if one.body else {}
    if accepted:
        operation["requestBody"] = {"required": True, "content": accepted}
    return {**operation, "responses": responses}


def docs_page(endpoints: Sequence[Endpoint], base_url: str) -> str:
    """The API as a page that needs nothing else: no script, no other file."""
    sections = "".join(docs_section(one, base_url) for one in endpoints)
    codes = "".join(f"<tr><td><code>{code}</code><td>{status}" for code, status in ERROR_STATUSES.items())
    return (
        f"<h1>llmchat {__version__}</h1>"
        f'<p>Every call with a line to try it. The same for machines: <a href="/openapi.json">/openapi.json</a>.'
        f"{sections}<h2>Errors</h2><pre>"
        f'{{"error": {{"code": "not_found", "message": "…", "retryable": false, "request_id": "…"}}}}</pre>'
        f"<table><tr><th>code<th>status{codes}</table>"
    )


def docs_section(one: Endpoint, base_url: str) -> str:
    fields = {f"?{name}=": schema for name, schema in fields_of(one.query).items()} | fields_of(one.body)
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code><td>{html.escape(describe_schema(schema))}"
        for name, schema in fields.items()
    )
    url = base_url + one.shown_path.replace("{id}", one.example_id or ("2" if "messages" in one.path else "1"))
    options = one.curl or ("" if one.method == "GET" else f"-X {one.method}")
    return (
        f'<h2><code><span class="method">{one.method}</span>{html.escape(one.shown_path)}</code></h2>'
        f"<p>{html.escape(one.summary)}<pre>{html.escape(f'curl {url} {options}'.strip())}</pre><table>{rows}</table>"
    )


def describe_schema(schema: Mapping[str, Any]) -> str:
    """A field in a few words: its type, its bounds, its default, its meaning."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(describe_schema(one) for one in schema["anyOf"]))
    kinds = schema.get("enum") or [schema.get("$ref", schema.get("type", "anything")).rpartition("/")[2]]
    bounds = [f"{name} {schema[name]:,}" for name in ("minimum", "maximum", "minLength", "maxLength") if name in schema]
    default = [f"default {json.dumps(schema['default'])}"] if schema.get("default") is not None else []
    meaning = f" ({schema['description']})" if "description" in schema else ""
    return ", ".join([" | ".join(kinds), *bounds, *default]) + meaning


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 15. OpenAI view
#
# The API that everybody's tools speak, as a translation of the same messages: a chat completion and a response are each
# a message of ours, started, committed, stopped and resumed by section 12 like any other, so both survive a lost
# connection, and a restart as far as they had come. `chatcmpl-42` and `resp_42` are message 42. There is one
# translation each way per format: what a client sends has a method `turn`, and a view takes our events one by one
# (ChatView, ResponseView); a finished response goes through the same view. What a client did not ask to store lies in
# a hidden conversation, and is swept LLMCHAT_UNSTORED_SECONDS after its end.
#
# What the official SDKs need, found by running them: (1) on a stream neither `id:` nor `retry:`, and a heartbeat is a
# comment with one newline: their decoder hands an event without data on to the JSON parser; (2) a chat stream that ends
# without a finish_reason passes for whole, so a failure is an error event, then [DONE]; (3) on /v1/responses a
# top-level error event is raised, so there a failure is `response.failed`; (4) their helper replays from 0 and counts:
# sequence_number comes from what is stored alone; (5) they repeat a request after a 5xx, which could be paid twice:
# x-should-retry says when not to. https://platform.openai.com/docs/api-reference
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

OPENAI_PREFIX = "/v1/"
OPENAI_MESSAGES_MAX = 4096  # of one request
OPENAI_HEARTBEAT = b": hb\n"  # (1)
METADATA_MAX = 16  # pairs, as OpenAI has it
INPUT_ITEMS_MAX = 100  # of one page

# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# Where OpenAI's status or code for the same is another than ours, so that SDKs raise what their users catch.
OPENAI_STATUSES = {**ERROR_STATUSES, "provider_rejected": 400, "provider_rate_limited": 429, "model_not_found": 404}
OPENAI_CODES = {
    "unauthorized": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded",
    "provider_rate_limited": "rate_limit_exceeded",
}
OpenAIErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class OpenAIErrorDetail(Struct):
    message: str
    type: OpenAIErrorType
    param: str | None
    code: str


class OpenAIErrorAnswer(Struct, omit_defaults=True):
    """Every error on /v1. `message_id`: the failed message, when there is one."""

    error: OpenAIErrorDetail
    message_id: int | None = None


def openai_error(code: str, message: str) -> tuple[int, OpenAIErrorDetail]:
    """An error's status and shape in OpenAI's API. Our messages begin with the field that they are about."""
    status = OPENAI_STATUSES.get(code, 500)
    if status >= 500:
        return status, OpenAIErrorDetail(message, "server_error", None, OPENAI_CODES.get(code, code))
    field_name = re.match(r"([a-zA-Z_][\w.-]*): ", message)
    kind: OpenAIErrorType = "rate_limit_error" if status == 429 else "invalid_request_error"
    return status, OpenAIErrorDetail(message, kind, field_name[1] if field_name else None, OPENAI_CODES.get(code, code))


def render_error(error: LlmchatError, scope: Scope) -> Response:
    """An error in the shape that its path promises. Nothing was started, so a repeat costs nothing (5)."""
    if not scope["path"].startswith(OPENAI_PREFIX):
        return error_response(error, scope["request_id"])
    code = "model_not_found" if isinstance(error, ModelNotFound) else error.code
    status, detail = openai_error(code, error.message)
    headers = {**error_headers(error), "x-should-retry": "true" if error.retryable else "false"}
    return json_response(OpenAIErrorAnswer(detail), status, headers)


INTERRUPTED = {
    "code": "server_error",
    "message": "llmchat was stopped before the answer was finished; its text is kept",
}

# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────
#
# Clients send many fields that they do not need: what is unknown is ignored, and what is known is checked. What would
# change the answer's shape and cannot be had is refused, by `refuse_unsupported`.


class OpenAIText(Struct, tag_field="type", tag="text"):
    text: str


class InputText(OpenAIText, tag="input_text"):
    """A text in a response's input."""


class OutputText(OpenAIText, tag="output_text"):
    """A text in a response's output, given back."""


class OpenAIRefusal(OpenAIText, tag="refusal"):
    text: str = msgspec.field(name="refusal")


class ImageUrl(Struct):
    url: Annotated[str, Meta(description="a data URL; an address is not fetched")]


class OpenAIImage(Struct, tag_field="type", tag="image_url"):
    image_url: ImageUrl | str


class InputImage(OpenAIImage, tag="input_image"):
    """An image in a response's input."""


Texts = str | list[OpenAIText | InputText | OutputText | OpenAIRefusal]
TextsAndImages = str | list[OpenAIText | InputText | OutputText | OpenAIRefusal | OpenAIImage | InputImage]


def content_of(content: str | Sequence[OpenAIText | OpenAIImage] | None, name: str) -> tuple[Delta, ...]:
    """A message's content as deltas; texts that were parts of their own stay paragraphs of their own."""
    deltas: list[Delta] = []
    for index, part in enumerate([OpenAIText(content)] if isinstance(content, str) else content or []):
        if isinstance(part, OpenAIImage):
            url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            deltas.append(image_of(ImagePart(url), f"{name}.content.{index}"))
        elif part.text:
            parted = bool(deltas) and deltas[-1].kind == "text"
            deltas.append(Delta("text", f"\n\n{part.text}" if parted else part.text))
    return tuple(join_deltas(deltas))


class CalledFunction(Struct):
    name: str
    arguments: str = ""


def called_delta(identity: str, called: CalledFunction) -> Delta:
    call = {"id": identity, "name": called.name, "arguments": called.arguments}
    return Delta("tool_call", encode_json(call).decode())


class OpenAIToolCall(Struct):
    id: str
    function: CalledFunction


class SystemMessage(Struct, tag_field="role", tag="system"):
    content: Texts

    def turn(self, name: str) -> Turn:
        return Turn("system", content_of(self.content, name))


class DeveloperMessage(SystemMessage, tag="developer"):
    """The newer name of a system message."""


class UserMessage(Struct, tag_field="role", tag="user"):
    content: TextsAndImages

    def turn(self, name: str) -> Turn:
        return Turn("user", content_of(self.content, name))


class AssistantMessage(Struct, tag_field="role", tag="assistant"):
    content: Texts | None = None
    reasoning_content: str | None = None
    tool_calls: list[OpenAIToolCall] | None = None

    def turn(self, name: str) -> Turn:
        reasoning = [Delta("reasoning", self.reasoning_content)] if self.reasoning_content else []
        calls = [called_delta(call.id, call.function) for call in self.tool_calls or ()]
        return Turn("assistant", (*reasoning, *content_of(self.content, name), *calls))


class ToolMessage(Struct, tag_field="role", tag="tool"):
    tool_call_id: Annotated[str, Meta(min_length=1, max_length=200)]
    content: Texts

    def turn(self, name: str) -> Turn:
        return Turn("tool", content_of(self.content, name), self.tool_call_id, f"{name}.tool_call_id")


class StreamOptions(Struct):
    include_usage: bool | None = None


class Sampling(Struct):
    """What both of OpenAI's requests may say about how a model is to answer."""

    model: ModelName | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None


class ChatCompletionRequest(Sampling, kw_only=True):
    """OpenAI's chat completion. Unknown fields are ignored; `store`: keep it as a conversation."""

    messages: Annotated[
        list[SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage],
        Meta(min_length=1, max_length=OPENAI_MESSAGES_MAX),
    ]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Annotated[str, Meta(max_length=20)] | None = None
    seed: int | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    n: int | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    modalities: list[str] | None = None
    functions: Any = None


class ReasoningOptions(Struct):
    effort: Annotated[str, Meta(max_length=20)] | None = None


class TextOptions(Struct):
    format: dict[str, Any] | None = None


class ResponseRequest(Sampling, kw_only=True):
    """OpenAI's response. Unknown fields are ignored. `instructions` are for this response alone; without `store` it is
    deleted some time after its end; it survives a lost connection with or without `background`."""

    input: str | Annotated[list[dict[str, Any]], Meta(max_length=OPENAI_MESSAGES_MAX)] = ""
    instructions: Annotated[str, Meta(max_length=SYSTEM_CHARACTERS_MAX)] | None = None
    previous_response_id: Annotated[str, Meta(max_length=100)] | None = None
    background: bool | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=METADATA_MAX)] | None = None
    max_output_tokens: MaxTokens | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    conversation: Any = None
    prompt: Any = None


UNSUPPORTED = {  # field: what is accepted of it, and the advice to who sends anything else
    "n": (1, "a request has 1 answer"),
    "logprobs": (False, "probabilities are not kept"),
    "modalities": (["text"], "answers are text"),
    "functions": ([], "use tools"),
    "conversation": (None, "use previous_response_id"),
    "prompt": (None, "use instructions and input"),
}


def refuse_unsupported(asked: Sampling) -> None:
    """Raises InvalidRequest for what no answer of ours could hold."""
    for name, (accepted, advice) in UNSUPPORTED.items():
        value = getattr(asked, name, None)
        if value not in (None, accepted):
            raise InvalidRequest(f"{name}: {printable(json.dumps(value), 60)} is not accepted; {advice}")


async def new_answer(
    request: Request, asked: Sampling, body: bytes, turns: Sequence[Turn], **parameters: Any
) -> NewMessage:
    """What both requests mean alike; `parameters` go upstream beside those that both name as we do."""
    refuse_unsupported(asked)
    refuse_large(body, turns)
    if not any(map(says_something, turns)):
        name = "messages" if isinstance(asked, ChatCompletionRequest) else "input"
        raise InvalidRequest(f"{name}: is empty; it has at least one character that is not a space")
    named_alike = {name: getattr(asked, name, None) for name in Parameters.__struct_fields__}
    new = await new_message(request, Asked(model=asked.model), body, tuple(turns))
    return replace(new, parameters=Parameters(**{**named_alike, **parameters}))


async def ended_answer(request: Request, message_id: int) -> tuple[Message, Response | None]:
    """An answer once it has ended, and the response if it failed: a repeat would be paid again, so no SDK shall (5)."""
    message, error = await ended_message(request, message_id)
    if error is None and message.status in ("interrupted", "running"):
        error = INTERRUPTED
    if error is None:
        return message, None
    status, detail = openai_error(error["code"], error["message"])
    return message, json_response(OpenAIErrorAnswer(detail, message_id), status, {"x-should-retry": "false"})


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class EndData(Struct):
    """The data of an `end` event."""

    status: str
    finish_reason: str | None
    usage: Usage | None
    timing: Timing
    error: dict[str, Any] | None


decode_delta = msgspec.json.Decoder(Delta).decode
decode_end = msgspec.json.Decoder(EndData).decode


class OpenAIView(Protocol):
    """A format of OpenAI's for our events: what each of them becomes."""

    def start(self, start: Mapping[str, Any]) -> bytes: ...
    def take(self, delta: Delta) -> bytes: ...
    def end(self, end: EndData) -> bytes: ...

    def translate(self, name: bytes, data: bytes) -> bytes:
        if name == b"delta":
            return self.take(decode_delta(data))
        if name == b"heartbeat":
            return OPENAI_HEARTBEAT
        if name == b"start":
            return self.start(decode_json(data))
        return self.end(decode_end(data)) if name == b"end" else b""


async def stream_view(request: Request, message_id: int, view: OpenAIView) -> Response:
    return EventStream(await service_of(request).generations.subscribe_to_view(owner_of(request), message_id, view))


def openai_usage(usage: Usage | None, given: str, made: str) -> dict[str, Any] | None:
    """Tokens under the names that an API has for what was given and what was made of it."""
    if usage is None:
        return None
    return {
        f"{given}_tokens": usage.input_tokens,
        f"{given}_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        f"{made}_tokens": usage.output_tokens,
        f"{made}_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


# ── chat completions ────────────────────────────────────────────────────────────────────────────────────────────────


class ChatView(OpenAIView):
    """Our events as chunks of a chat completion. The first chunk names the role, as every client expects."""

    def __init__(self, message_id: int, with_usage: bool) -> None:
        self._message_id = message_id
        self._with_usage = with_usage
        self._calls = 0
        self._head = b""
        self._tail = b',"usage":null}\n\n' if with_usage else b"}\n\n"

    def start(self, start: Mapping[str, Any]) -> bytes:
        shape = {
            "id": f"chatcmpl-{self._message_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": f"{start['provider']}/{start['model']}",
        }
        self._head = b"data: " + encode_json(shape)[:-1]
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> bytes:
        choice = encode_json({"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason})
        return b'%s,"choices":[%s]%s' % (self._head, choice, self._tail)

    def take(self, delta: Delta) -> bytes:
        if delta.kind == "text":
            return self._chunk({"content": delta.text})
        if delta.kind == "reasoning":
            return self._chunk({"reasoning_content": delta.text})
        if delta.kind == "tool_call":
            call = {"index": self._calls, **openai_tool_call(json.loads(delta.text))}
            self._calls += 1
            return self._chunk({"tool_calls": [call]})
        return b""

    def end(self, end: EndData) -> bytes:
        error = INTERRUPTED if end.status == "interrupted" else end.error
        if error is not None:
            last = b"data: %s\n\n" % encode_json(OpenAIErrorAnswer(openai_error(error["code"], error["message"])[1]))
        else:
            last = self._chunk({}, end.finish_reason or "stop")
            if self._with_usage:
                usage = encode_json(openai_usage(end.usage, "prompt", "completion"))
                last += b'%s,"choices":[],"usage":%s}\n\n' % (self._head, usage)
        return last + b"data: [DONE]\n\n"


def chat_completion(message: Message) -> dict[str, Any]:
    calls = [openai_tool_call(json.loads(delta.text)) for delta in message.content if delta.kind == "tool_call"]
    reasoning = "".join(delta.text for delta in message.content if delta.kind == "reasoning")
    said = {
        "role": "assistant", "content": message.text if message.text or not calls else None, "refusal": None,
        **({"reasoning_content": reasoning} if reasoning else {}), **({"tool_calls": calls} if calls else {}),
    }  # fmt: skip
    return {
        "id": f"chatcmpl-{message.id}",
        "object": "chat.completion",
        "created": message.created_at_ms // 1000,
        "model": f"{message.provider}/{message.model}",
        "choices": [{"index": 0, "message": said, "logprobs": None, "finish_reason": message.finish_reason or "stop"}],
        "usage": openai_usage(message.usage, "prompt", "completion"),
    }


async def create_chat_completion(request: Request) -> Response:
    asked, body = await read_json(request, ChatCompletionRequest, IMAGE_REQUEST_BYTES_MAX)
    check_answer(request, asked)
    turns = [message.turn(f"messages.{index}") for index, message in enumerate(asked.messages)]
    new = await new_answer(
        request, asked, body, turns, max_tokens=asked.max_completion_tokens or asked.max_tokens,
        stop=[asked.stop] if isinstance(asked.stop, str) else asked.stop,
        frequency_penalty=asked.frequency_penalty or None, presence_penalty=asked.presence_penalty or None,
    )  # fmt: skip
    leading = list(itertools.takewhile(lambda turn: turn.role == "system", turns))
    system = "\n\n".join(text_of(turn.content) for turn in leading)
    new = replace(new, turns=tuple(turns[len(leading) :]), system=system, hidden=not asked.store)
    started = await service_of(request).generations.start(new)
    if asked.stream:
        with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return await stream_view(request, started.message_id, ChatView(started.message_id, with_usage))
    message, failure = await ended_answer(request, started.message_id)
    return failure or json_response(chat_completion(message))


# ── responses: input ────────────────────────────────────────────────────────────────────────────────────────────────
#
# Input is a list of items, and so is output: a message, reasoning, a call, the result of one. Ours are messages with
# runs of deltas; an item's id says which message and which run of it, so a client may send the item back, or its id.


class InputMessage(Struct, tag_field="type", tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: TextsAndImages

    def turn(self, name: str) -> Turn:
        return Turn("system" if self.role == "developer" else self.role, content_of(self.content, name))


class InputCall(CalledFunction, tag_field="type", tag="function_call", kw_only=True):
    call_id: Annotated[str, Meta(min_length=1, max_length=200)]

    def turn(self, name: str) -> Turn:
        return Turn("assistant", (called_delta(self.call_id, self),))


class InputCallOutput(Struct, tag_field="type", tag="function_call_output"):
    call_id: Annotated[str, Meta(min_length=1, max_length=200)]
    output: Texts

    def turn(self, name: str) -> Turn:
        return Turn("tool", content_of(self.output, name), self.call_id, f"{name}.call_id")


class ReasoningText(Struct):
    text: str


class InputReasoning(Struct, tag_field="type", tag="reasoning"):
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None

    def turn(self, name: str) -> Turn:
        text = "\n\n".join(one.text for one in self.content or self.summary or ())
        return Turn("assistant", (Delta("reasoning", text),) if text else ())


class ItemReference(Struct, tag_field="type", tag="item_reference"):
    id: str


class InputItems(Struct):
    input: list[InputMessage | InputCall | InputCallOutput | InputReasoning | ItemReference]


def items_of(given: str | Sequence[dict[str, Any]]) -> InputItems:
    """A response's input as typed items; what has no type is a message. Raises InvalidRequest."""
    listed = [{"role": "user", "content": given}] if isinstance(given, str) else given
    document = {"input": [{**one, "type": one.get("type") or "message"} for one in listed]}
    try:
        return msgspec.convert(document, InputItems)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(explain_validation(exc, document, InputItems)) from exc


async def turns_of_input(request: Request, given: str | Sequence[dict[str, Any]]) -> list[Turn]:
    """A response's input as turns; neighbouring items of an assistant are one. Raises InvalidRequest, NotFound."""
    turns: list[Turn] = []
    for index, item in enumerate(items_of(given).input):
        name = f"input.{index}"
        turn = await referenced_turn(request, item.id, name) if isinstance(item, ItemReference) else item.turn(name)
        if turns and turn.role == turns[-1].role == "assistant":
            turns[-1] = replace(turns[-1], content=turns[-1].content + turn.content)
        else:
            turns.append(turn)
    return turns


def group_items(content: Sequence[Delta]) -> list[list[Delta]]:
    """An answer's content by output item. A signature belongs to the reasoning before it, and is no item."""
    groups: list[list[Delta]] = []
    for delta in join_deltas(content):
        if delta.kind != "signature":
            groups.append([delta])
        elif groups:
            groups[-1].append(delta)
    return groups


async def referenced_turn(request: Request, item_id: str, name: str) -> Turn:
    """What an item's id stands for. Raises NotFound."""
    match = re.fullmatch(r"(msg|rs|fc)_([0-9]{1,15})_([0-9]{1,6})", item_id)
    if match is not None:
        with contextlib.suppress(NotFound):
            message = await service_of(request).store.read(load_message, owner_of(request), int(match[2]))
            items = group_items(message.content) if message.role == "assistant" else [message.content]
            if message.role != "tool" and int(match[3]) < len(items):
                return Turn(message.role, tuple(items[int(match[3])]))
    raise NotFound(f"{name}.id: there is no item {printable(item_id, 60)!r}")


def message_id_of(response_id: str, name: str) -> int:
    """Raises NotFound for what is no id of a response."""
    match = re.fullmatch(r"resp_([0-9]{1,15})", response_id)
    if match is None:
        raise NotFound(f"{name}: there is no response {printable(response_id, 60)!r}")
    return int(match[1])


def response_format_of(options: TextOptions | None) -> dict[str, Any] | None:
    """The `text.format` of a response as a chat completion has it: its schema one level further in."""
    form = options.format if options is not None else None
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def tool_choice_of(choice: Any) -> Any:
    """The `tool_choice` of a response as a chat completion has it."""
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


# What a response object repeats of its request, and what it says of what the request left out.
REPEATED: dict[str, Any] = {
    "background": False, "metadata": {}, "previous_response_id": None, "max_output_tokens": None, "temperature": None,
    "top_p": None, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}},
}  # fmt: skip


async def new_response(request: Request, asked: ResponseRequest, body: bytes) -> NewMessage:
    """What a request for a response means: it goes where the one before it is if it is stored, else behind a copy.
    Raises InvalidRequest, NotFound, Conflict."""
    turns = await turns_of_input(request, asked.input)
    new = await new_answer(
        request, asked, body, turns, max_tokens=asked.max_output_tokens, tool_choice=tool_choice_of(asked.tool_choice),
        reasoning_effort=asked.reasoning.effort if asked.reasoning is not None else None,
        response_format=response_format_of(asked.text),
    )  # fmt: skip
    repeated = {name: value for name in REPEATED if (value := getattr(asked, name)) is not None}
    repeated |= {"model": str(new.targets[0]), "input_turns": len(turns)}
    new = replace(new, answer_system=asked.instructions, response=repeated, hidden=asked.store is False)
    if asked.previous_response_id is None:
        return new
    previous_id = message_id_of(asked.previous_response_id, "previous_response_id")
    conversation_id, before = await service_of(request).store.read(load_previous, owner_of(request), previous_id)
    if new.hidden:
        return replace(new, turns=before + new.turns)
    return replace(new, conversation_id=conversation_id, parent_id=previous_id)


# ── responses: output ───────────────────────────────────────────────────────────────────────────────────────────────

RUNNING = EndData("running", None, None, NO_TIMING, None)
RESPONSE_STATUSES = {
    "running": "in_progress",
    "completed": "completed",
    "stopped": "cancelled",
    "failed": "failed",
    "interrupted": "failed",
}
ITEM_STATUSES = {"in_progress": "in_progress", "completed": "completed"}  # of the last item; else incomplete
INCOMPLETE_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}
RESPONSE_ERROR_CODES = {"provider_rate_limited": "rate_limit_exceeded", "provider_rejected": "invalid_prompt"}
TERMINAL_EVENTS = {"completed": "response.completed", "failed": "response.failed"}  # else response.incomplete


def response_shape(message: Message, repeated: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a response object that is known when it is created, and repeats its request."""
    return {
        "id": f"resp_{message.id}",
        "object": "response",
        "created_at": message.created_at_ms // 1000,
        "model": f"{message.provider}/{message.model}",
        "truncation": "disabled",
        **REPEATED,
        **repeated,
    }


def response_outcome(created_at: int, end: EndData | Message) -> dict[str, Any]:
    """Everything of a response object that its end decides, once it has come."""
    status, error, incomplete = RESPONSE_STATUSES[end.status], end.error, None
    if status == "completed" and end.finish_reason in INCOMPLETE_REASONS:
        status, incomplete = "incomplete", {"reason": INCOMPLETE_REASONS[end.finish_reason]}
    if end.status == "interrupted":
        error = INTERRUPTED
    if error is not None:
        error = {"code": RESPONSE_ERROR_CODES.get(error["code"], "server_error"), "message": error["message"]}
    return {
        "status": status,
        "completed_at": created_at + (end.timing.total_ms or 0) // 1000 if status == "completed" else None,
        "error": error,
        "incomplete_details": incomplete,
        "usage": openai_usage(end.usage, "input", "output"),
    }


class ItemKind(NamedTuple):
    """How a kind of content looks as an output item: the item, its events' name and what each says beside its text, and
    the part that the text is in; a call has none."""

    prefix: str
    item: dict[str, Any]
    event: str
    fields: dict[str, Any]
    part: dict[str, Any] | None


ITEM_KINDS = {
    "text": ItemKind(
        "msg", {"type": "message", "role": "assistant", "content": []}, "response.output_text",
        {"content_index": 0, "logprobs": []}, {"type": "output_text", "annotations": [], "logprobs": []},
    ),
    "reasoning": ItemKind(
        "rs", {"type": "reasoning", "summary": [], "content": []}, "response.reasoning_text",
        {"content_index": 0}, {"type": "reasoning_text"},
    ),
    "tool_call": ItemKind("fc", {"type": "function_call"}, "response.function_call_arguments", {}, None),
}  # fmt: skip


class ResponseView(OpenAIView):
    """Our events as those of a response, and its output items; `shape` is what is known of the response at its start.

    Every event is numbered, and the numbers follow from what is stored alone: two at the start, one for each delta as it
    was published, and those that open and close an item where the kind of content changes. Those up to `after` are left
    out. Once rows were merged there are fewer: whoever then asks for what is after a number beyond the end gets the end.
    """

    def __init__(self, message_id: int, shape: Mapping[str, Any], after: int = -1) -> None:
        self.items: list[dict[str, Any]] = []
        self._message_id = message_id
        self._shape = shape
        self._after = after
        self._number = 0
        self._kind: str | None = None  # of the open item; None: there is none
        self._texts: list[str] = []  # of the open item

    def start(self, start: Mapping[str, Any]) -> bytes:
        begun = {**self._shape, **response_outcome(self._shape["created_at"], RUNNING), "output": []}
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def take(self, delta: Delta) -> bytes:
        """The events of a piece of content."""
        events, call = b"", json.loads(delta.text) if delta.kind == "tool_call" else None
        if delta.kind != self._kind or delta.kind not in MERGED_KINDS:
            events = self.close("completed") + self._open(delta.kind, call)
        if self._kind is None:
            return events
        text = delta.text if call is None else call["arguments"] or "{}"
        self._texts.append(text)
        kind = ITEM_KINDS[self._kind]
        return events + self._item_event(f"{kind.event}.delta", **kind.fields, delta=text)

    def _open(self, name: str, call: Mapping[str, str] | None) -> bytes:
        """The events that begin an item; signatures and the like are none."""
        if name not in ITEM_KINDS:
            return b""
        self._kind, kind = name, ITEM_KINDS[name]
        identity = f"{kind.prefix}_{self._message_id}_{len(self.items)}"
        named = {"call_id": call["id"], "name": call["name"], "arguments": ""} if call is not None else {}
        self.items.append({"id": identity, **kind.item, **named, "status": "in_progress"})
        events = self._event("response.output_item.added", output_index=len(self.items) - 1, item=self.items[-1])
        if kind.part is not None:
            events += self._item_event("response.content_part.added", content_index=0, part={**kind.part, "text": ""})
        return events

    def close(self, status: str) -> bytes:
        """The events that end the open item, if there is one."""
        if self._kind is None:
            return b""
        kind, item, text = ITEM_KINDS[self._kind], self.items[-1], "".join(self._texts)
        self._kind = None
        self._texts.clear()
        item["status"] = status
        if kind.part is None:
            item["arguments"] = text
            events = self._item_event(f"{kind.event}.done", name=item["name"], arguments=text)
        else:
            part = {**kind.part, "text": text}
            item["content"] = [part]
            events = self._item_event(f"{kind.event}.done", **kind.fields, text=text)
            events += self._item_event("response.content_part.done", content_index=0, part=part)
        return events + self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def end(self, end: EndData) -> bytes:
        events, response = self._finish(end)
        if self._after > self._number:
            self._after = self._number - 1
        return events + self._event(TERMINAL_EVENTS.get(response["status"], "response.incomplete"), response=response)

    def response(self, message: Message) -> dict[str, Any]:
        """The response object of a message as it is now."""
        for delta in message.content:
            self.take(delta)
        return self._finish(message)[1]

    def _finish(self, end: EndData | Message) -> tuple[bytes, dict[str, Any]]:
        """The events that end the last item, and the response object."""
        outcome = response_outcome(self._shape["created_at"], end)
        events = self.close(ITEM_STATUSES.get(outcome["status"], "incomplete"))
        return events, {**self._shape, **outcome, "output": self.items}

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._number
        self._number += 1
        if number <= self._after:
            return b""
        data = encode_json({"type": kind, "sequence_number": number, **fields})
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


# ── responses: handlers ─────────────────────────────────────────────────────────────────────────────────────────────


async def load_view(request: Request, message_id: int, after: int = -1) -> tuple[Message, ResponseView]:
    """An answer as it is now, and a view for it."""
    message, repeated = await service_of(request).store.read(load_response, owner_of(request), message_id)
    return message, ResponseView(message_id, response_shape(message, repeated), after)


async def response_now(request: Request, message_id: int) -> dict[str, Any]:
    """The response object as it is now."""
    message, view = await load_view(request, message_id)
    return view.response(message)


async def stream_response(request: Request, message_id: int, after: int) -> Response:
    return await stream_view(request, message_id, (await load_view(request, message_id, after))[1])


class ResponseQuery(Struct):
    stream: Annotated[bool, Meta(description="the events, live or long finished")] = False
    starting_after: Annotated[int, Meta(ge=-1, le=2**53, description="events with a greater sequence_number")] = -1


class InputItemsQuery(Struct):
    limit: Annotated[int, Meta(ge=1, le=INPUT_ITEMS_MAX)] = 20
    order: Annotated[Literal["asc", "desc"], Meta(description="by age")] = "desc"
    after: Annotated[str, Meta(description="the last_id of the page before")] | UnsetType = UNSET


async def create_response(request: Request) -> Response:
    asked, body = await read_json(request, ResponseRequest, IMAGE_REQUEST_BYTES_MAX)
    check_answer(request, asked)
    started = await service_of(request).generations.start(await new_response(request, asked, body))
    if asked.stream:
        return await stream_response(request, started.message_id, -1)
    if asked.background:
        shown = await response_now(request, started.message_id)
        return json_response({**shown, "status": "queued"} if shown["status"] == "in_progress" else shown)
    _, failure = await ended_answer(request, started.message_id)
    return failure or json_response(await response_now(request, started.message_id))


def response_of_path(request: Request) -> int:
    return message_id_of(request.path_params["id"], "response_id")


async def get_response(request: Request) -> Response:
    message_id = response_of_path(request)
    asked = read_query(request, ResponseQuery)
    if asked.stream:
        return await stream_response(request, message_id, asked.starting_after)
    return json_response(await response_now(request, message_id))


async def cancel_response(request: Request) -> Response:
    message_id = response_of_path(request)
    await stopped_message(request, message_id)
    return json_response(await response_now(request, message_id))


async def remove_response(request: Request) -> Response:
    service, owner, message_id = service_of(request), owner_of(request), response_of_path(request)
    while not await service.store.write(delete_response, owner, message_id, durable=True):
        await service.generations.stop(owner, message_id)
    return json_response({"id": f"resp_{message_id}", "object": "response", "deleted": True})


def input_part(delta: Delta) -> dict[str, Any]:
    if delta.kind != "image":
        return {"type": "input_text", "text": delta.text}
    image = json.loads(delta.text)
    return {"type": "input_image", "detail": "auto", "image_url": f"data:{image['media_type']};base64,{image['data']}"}


def input_items_of(message_id: int, turn: Turn) -> list[dict[str, Any]]:
    """A turn of a response's input as items; what an assistant said has the shape that it had as output."""
    if turn.role == "assistant":
        view = ResponseView(message_id, {})
        for delta in turn.content:
            view.take(delta)
        view.close("completed")
        return view.items
    if turn.role == "tool":
        output = {"call_id": turn.tool_call_id, "output": text_of(turn.content)}
        return [{"id": f"fco_{message_id}_0", "type": "function_call_output", **output, "status": "completed"}]
    said = {"role": turn.role, "content": [input_part(delta) for delta in turn.content]}
    return [{"id": f"msg_{message_id}_0", "type": "message", **said, "status": "completed"}]


async def list_input_items(request: Request) -> Response:
    """A page of what a response was asked with, newest first unless `order=asc`."""
    asked = read_query(request, InputItemsQuery)
    turns = await service_of(request).store.read(load_input, owner_of(request), response_of_path(request))
    items = [item for message_id, turn in turns for item in input_items_of(message_id, turn)]
    ordered = items if asked.order == "asc" else items[::-1]
    ids = [item["id"] for item in ordered]
    if asked.after is not UNSET and asked.after not in ids:
        raise InvalidRequest(f"after: there is no item {printable(asked.after, 60)!r} in this response's input")
    first = 0 if asked.after is UNSET else ids.index(asked.after) + 1
    shown = ids[first : first + asked.limit] or [None]
    return json_response({
        "object": "list", "data": ordered[first : first + asked.limit], "first_id": shown[0], "last_id": shown[-1],
        "has_more": first + asked.limit < len(items),
    })  # fmt: skip


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def openai_model(target: Target) -> dict[str, Any]:
    return {"id": str(target), "object": "model", "created": 0, "owned_by": target.provider.name}


async def list_openai_models(request: Request) -> Response:
    service = service_of(request)
    listed = await asyncio.gather(*map(service.providers.list_models, service.config.providers))
    pairs = zip(service.config.providers, listed, strict=True)
    data = [openai_model(Target(provider, model)) for provider, of_one in pairs for model in of_one.models]
    return json_response({"object": "list", "data": data})


async def get_openai_model(request: Request) -> Response:
    providers = service_of(request).providers
    target = await providers.resolve(None, request.path_params["id"])
    listed = await providers.list_models(target.provider)
    if listed.models and target.model not in listed.models:
        raise ModelNotFound(f"model: {target.provider.name} has no model {printable(target.model, 60)!r}")
    return json_response(openai_model(target))


# ── the table of these endpoints ────────────────────────────────────────────────────────────────────────────────────

RESPONSE_ID = {"type": "string", "pattern": "^resp_[0-9]+$"}
OpenAIEndpoint = partial(Endpoint, error=OpenAIErrorAnswer)
OfResponse = partial(OpenAIEndpoint, id_schema=RESPONSE_ID, example_id="resp_2")

OPENAI_ENDPOINTS = (
    OpenAIEndpoint("GET", "/v1/models", list_openai_models, "for OpenAI clients: the models of all providers"),
    OpenAIEndpoint(
        "GET", "/v1/models/{id:path}", get_openai_model, "one of them",
        errors=(404,), id_schema={"type": "string"}, example_id="demo/tour",
    ),
    OpenAIEndpoint(
        "POST", "/v1/chat/completions", create_chat_completion, "OpenAI's chat completion, with any model",
        body=ChatCompletionRequest, streams=True, errors=(400, 404, 409, 413, 429, 502, 503, 504),
        curl=JSON_CURL + """'{"messages": [{"role": "user", "content": "Hello"}]}'""",
    ),
    OpenAIEndpoint(
        "POST", "/v1/responses", create_response, "OpenAI's response, with any model",
        body=ResponseRequest, streams=True, errors=(400, 404, 409, 413, 429, 502, 503, 504),
        curl=JSON_CURL + """'{"input": "Hello"}'""",
    ),
    OfResponse(
        "GET", "/v1/responses/{id}", get_response, "a response, or its events once more", streams=True,
        query=ResponseQuery, errors=(400, 404, 503),
    ),
    OfResponse(
        "DELETE", "/v1/responses/{id}", remove_response, "deletes a response and what it was asked with",
        errors=(404,), curl="-X DELETE",
    ),
    OfResponse(
        "POST", "/v1/responses/{id}/cancel", cancel_response, "ends a running response", errors=(404,), curl="-X POST",
    ),
    OfResponse(
        "GET", "/v1/responses/{id}/input_items", list_input_items, "what a response was asked with",
        query=InputItemsQuery, errors=(400, 404),
    ),
)  # fmt: skip


# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 16. main
#
# `create_app` builds everything from a Config and opens it in its lifespan, whose end is the one place that says in
# which order things close. The server is uvicorn's with four changes: a signal drains first, while requests are still
# answered; a second signal exits at once; it waits for an event instead of looking ten times a second, so an idle
# service sleeps; and a request's head is bounded in size and time (Connection). Its shutdown would otherwise wait for
# ever on an open stream: draining ends the subscribers first.
# ═════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

SWITCH_SECONDS = 0.001  # what a thread of the store waits for a busy event loop; Python's 5 ms add up per statement
CLOSE_SECONDS = 3  # what responses that are still being sent get, once everything has ended


class LogFormatter(logging.Formatter):
    """One line per event: `time level message key=value …`, or the same as JSON, whose ASCII has no character that a
    terminal obeys or a log's reader takes for the end of a line."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        given: dict[str, Any] = getattr(record, "fields", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._json:
            line = {"time": at, "level": record.levelname.lower(), "message": record.getMessage(), **given}
            return json.dumps({**line, "trace": trace} if trace else line, default=str)
        pairs = "".join(f" {name}={self._quote(value)}" for name, value in given.items())
        return f"{at} {record.levelname.lower()} {record.getMessage()}{pairs}" + (f"\n{trace}" if trace else "")

    def _quote(self, value: Any) -> str:
        text = str(value)
        return text if re.fullmatch(r"[^\s\"=]+", text) and text.isprintable() else json.dumps(text)


def open_log(config: Config) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(config.log_format))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    for noisy in ("asyncio", "aiosqlite", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are about what strangers send


class App(Starlette):
    """Starlette with our envelope in place of its layers: one error renderer, and little between a stream and its socket."""

    def build_middleware_stack(self) -> ASGIApp:
        return Envelope(self.router, self.state.service.gate, render_error)


def create_app(config: Config) -> Starlette:
    """The service as an ASGI application; its lifespan opens and closes everything."""
    store = Store(config.db)
    providers = Providers(config)
    generations = Generations(config, store, providers)
    gate = Gate(config, store)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.interrupted = await store.open()
        warn_of_network(config.db)
        generations.open()
        await gate.open()
        try:
            yield
        finally:
            await generations.close()
            await providers.close()
            await store.close()

    endpoints = (*ENDPOINTS, *OPENAI_ENDPOINTS)
    app = App(routes=[*routes_of(endpoints), *PAGE_ROUTES], lifespan=lifespan)
    app.router.redirect_slashes = False  # a path is right, or it is told what there is
    app.state.service = Service(config, store, providers, generations, gate, endpoints, time.monotonic())
    return app


MOUNTS = Path("/proc/mounts")  # Linux


def warn_of_network(path: str) -> None:
    """A line in the log if the database is where SQLite's locks and its shared memory cannot be relied on."""
    with contextlib.suppress(OSError):
        folder = os.path.realpath(Path(path).absolute().parent)
        kind = network_file_system(folder, MOUNTS.read_text(encoding="utf-8", errors="replace"))
        if kind is not None:
            advice = "SQLite can lose data there: https://sqlite.org/useovernet.html; put the database on a local disk"
            fields_of_line = {"type": kind, "folder": folder, "advice": advice}
            log.warning("database on a network file system", extra={"fields": fields_of_line})


def open_socket(config: Config) -> socket.socket:
    """A listening socket; on `::` also for IPv4. Raises StartError with one line if the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, dualstack_ipv6=both)
    except OSError as exc:
        raise StartError(f"cannot listen on {config.host} port {config.port}: {exc.strerror or exc}") from exc


NO_REQUEST = InvalidRequest("this is not a request of HTTP/1.1")
HEAD_TOO_LARGE = TooLarge(f"head: the request's line and headers are larger than {HEAD_BYTES_MAX:,} bytes, the limit")


def refusal(status: int, error: LlmchatError) -> bytes:
    """The whole response to what is no request."""
    request_id = f"{random.getrandbits(64):016x}"
    response = error_response(error, request_id)
    own = [(b"x-request-id", request_id.encode()), (b"date", http_date()), (b"connection", b"close")]
    lines = [b"%s: %s\r\n" % pair for pair in [*response.raw_headers, *SECURITY_HEADERS.items(), *own]]
    return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (status, HTTPStatus(status).phrase.encode(), b"".join(lines), response.body)


class Connection(HttpToolsProtocol):
    """uvicorn's connection with bounds on a request's head: a stranger may neither fill the memory nor just sit there.

    The timer runs whenever a head is awaited: from the connection's start, from a request's first byte, and from any
    byte after an answer (blank lines, the rest of a body that nobody read), for uvicorn's own timer ends with such a
    byte. `_head_bytes` is what came since a request or a piece of a body began, and the whole head when it is complete;
    so it bounds one endless line too, and trailers, which are dropped: nothing after a body may pass for a header.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._await_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_timer is not None:  # else it is a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._end_head()
        self._head_bytes = len(self.url) + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)
        if self._head_bytes > HEAD_BYTES_MAX:
            raise TooLarge("the parser hands this on as an error of its own")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = asyncio.get_running_loop().call_later(HEAD_SECONDS, self.transport.close)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no request, unless that would go into the middle of another answer; and closes."""
        running = self.cycle is not None and not self.cycle.response_complete
        if not self.pipeline and not (running and (self.cycle.response_started or not self.cycle.more_body)):
            too_large = self._head_bytes > HEAD_BYTES_MAX
            self.transport.write(refusal(431, HEAD_TOO_LARGE) if too_large else refusal(400, NO_REQUEST))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, draining first."""

    def __init__(self, config: uvicorn.Config, generations: Generations, greeting: Callable[[], None]) -> None:
        super().__init__(config)
        self._generations = generations
        self._greeting = greeting
        self._loop = asyncio.get_running_loop()
        self._signalled = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()  # what was imported stays: the collector need not look at all of it again and again
        self._greeting()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # whatever was committed is safe; nothing else is worth waiting for
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._signalled.set)

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._signalled.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._generations.drain()
        timer = self._loop.call_later(CLOSE_SECONDS, self._abort_connections)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _abort_connections(self) -> None:
        """Ends what clients that do not read keep open, so that their streams end as when a client goes away."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def serve(config: Config) -> None:
    """Runs the service until a signal. Raises StartError."""
    with open_socket(config) as listener:
        config, is_new_token = with_token(config)
        app = create_app(config)
        async with app.router.lifespan_context(app):
            settings = uvicorn.Config(
                app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False,
                server_header=False, date_header=False, proxy_headers=False, timeout_graceful_shutdown=CLOSE_SECONDS + 1,
            )  # fmt: skip
            host, port = listener.getsockname()[:2]
            greeting = partial(greet, config, host, port, app.state.interrupted, is_new_token)
            await Server(settings, app.state.service.generations, greeting).serve([listener])


def greet(config: Config, host: str, port: int, interrupted: int, is_new_token: bool) -> None:
    """Where it listens, which database it uses, which providers it found; what to set for keys it cannot use; how to
    sign in with a token that was made now. That link is shown this once; the token stays in its file."""
    shown = f"[{host}]" if ":" in host else host
    found = ", ".join(one.name for one in config.providers)
    hint = " (no key was found; set one such as OPENAI_API_KEY, or OLLAMA_BASE_URL)" if found == DEMO else ""
    what = "1 answer was" if interrupted == 1 else f"{interrupted} answers were"
    ended = f" ({what} interrupted; the text is kept)" if interrupted else ""
    print(f"llmchat {__version__} listens on http://{shown}:{port}")
    print(f"database: {Path(config.db).absolute()}{ended}")
    print(f"providers: {found}{hint}", *config.unusable_keys, sep="\n", flush=True)
    if is_new_token:
        reached = "127.0.0.1" if host in ("0.0.0.0", "::") else shown
        print(
            f"sign in at http://{reached}:{port}/sign-in?token={config.token} (kept in {token_path(config)})",
            flush=True,
        )


def parse_arguments_of_main(arguments: Sequence[str] | None) -> argparse.Namespace:
    lines = [f"  LLMCHAT_{one.name.upper():30} {one.metadata['meaning']} [{one.default}]" for one in SETTINGS]
    parser = argparse.ArgumentParser(
        prog="llmchat",
        description="A self-hosted chat with any LLM: one Python file, one SQLite file, and nothing that you have seen is lost.",
        epilog="settings, from the environment or .env:\n"
        + "\n".join(lines)
        + "\n\nproviders: <PROVIDER>_API_KEY switches one on; <PROVIDER>_BASE_URL too, for local servers;\n"
        "  <PROVIDER>_MODELS (comma list) and <PROVIDER>_DIALECT (openai | anthropic) say more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=("backup",), help="copies the database, also while it runs")
    parser.add_argument("file", nargs="?", help="where the backup goes; nothing is overwritten")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", help="TCP port to listen on")
    parser.add_argument("--db", help="path of the SQLite database")
    parser.add_argument("--version", action="version", version=f"llmchat {__version__}")
    parsed = parser.parse_args(arguments)
    if (parsed.command is None) != (parsed.file is None):
        parser.error("backup needs the name of a file: llmchat backup FILE")
    return parsed


def new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Windows has none
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 after an orderly shutdown, 2 if it could not start."""
    sys.setswitchinterval(SWITCH_SECONDS)
    flags = vars(parse_arguments_of_main(arguments))
    command, file = flags.pop("command"), flags.pop("file")
    try:
        config = load_config({**read_dotenv(Path(".env")), **os.environ}, flags)
        if command == "backup":
            print(f"backup of {config.db}: {file}, {save_backup(config.db, file):,} bytes")
            return 0
        open_log(config)
        if is_open_to_others(Path(".env")):
            log.warning("others on this machine can read .env with the keys in it; chmod 600 .env")
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serve(config))
    except StartError as exc:
        print(f"llmchat: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
