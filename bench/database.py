"""Row database: the list, the search, a long conversation and the start with 100,000 messages in the database.

llmchat makes the database and the first chat itself; the rest is added in SQL, since 100,000 chats through the API
would take longer than the rest of the benchmark. 1,990 conversations have 50 messages, one has 500. The words are
drawn as words of a language are: few very often, most seldom. Every tenth conversation is in Chinese characters, drawn
in the same way. What is searched for: see `searches`.
"""

import random
import re
import sqlite3
import time
from collections.abc import Iterator
from itertools import accumulate, product
from pathlib import Path
from urllib.parse import quote

from client import Connection, Failure, encode_request
from rows import Figures
from servers import Running

CONVERSATIONS = [500, *[50] * 1_990]  # messages in each
MESSAGE_WORDS = 60
MESSAGE_CHARACTERS = 200  # of one in Chinese
CHINESE_EVERY = 10
LISTS, SEARCHES, OPENINGS = 200, 100, 60  # SEARCHES of each kind

SYLLABLES = ["ba", "ce", "do", "fi", "gu", "ka", "le", "mo", "ni", "pu", "ra", "se", "to", "vi", "zu", "an", "er", "is"]
WORDS = ["".join(syllables) for syllables in product(SYLLABLES, repeat=3)]
WEIGHTS = list(accumulate(1 / (rank + 5) for rank in range(len(WORDS))))
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 3_000)]
RANDOM = random.Random(5)
RANDOM.shuffle(WORDS)  # else the frequent words would begin alike
RANDOM.shuffle(CHARACTERS)


def sentences() -> Iterator[str]:
    """The same texts every time, in the order of CONVERSATIONS."""
    chance = random.Random(7)
    for number, messages in enumerate(CONVERSATIONS):
        is_chinese = number % CHINESE_EVERY == CHINESE_EVERY - 1
        for _ in range(messages):
            if is_chinese:
                yield "".join(chance.choices(CHARACTERS, cum_weights=WEIGHTS[: len(CHARACTERS)], k=MESSAGE_CHARACTERS))
            else:
                yield " ".join(chance.choices(WORDS, cum_weights=WEIGHTS, k=MESSAGE_WORDS))


def fill(path: Path, home: Path) -> None:
    """Adds the conversations to a database that llmchat has made and in which there is one chat; moves it to `home`."""
    now = int(time.time() * 1000)
    with sqlite3.connect(path) as database:
        owner = database.execute("SELECT owner FROM conversation").fetchone()[0]
        texts = sentences()
        for number, messages in enumerate(CONVERSATIONS):
            at = now - 3_600_000 - number * 60_000
            title = f"Conversation {number}"
            conversation = database.execute(
                "INSERT INTO conversation (owner, title, created_at_ms, updated_at_ms) VALUES (?, ?, ?, ?)",
                (owner, title, at, at),
            ).lastrowid
            add_messages(database, conversation or 0, messages, at, texts)
        add_to_search(database)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    path.parent.rename(home)


def add_messages(database: sqlite3.Connection, conversation: int, count: int, at: int, texts: Iterator[str]) -> None:
    """A chain of `count` messages, user and assistant in turn."""
    parent = None
    for number in range(count):
        role, provider = ("assistant", "openai") if number % 2 else ("user", None)
        parent = database.execute(
            "INSERT INTO message (conversation_id, parent_id, role, status, provider, model, finish_reason,"
            " created_at_ms, first_delta_at_ms, ended_at_ms) VALUES (?, ?, ?, 'completed', ?, ?, ?, ?, ?, ?)",
            (conversation, parent, role, provider, provider and "bench", provider and "stop", at, at, at),
        ).lastrowid
        database.execute(
            "INSERT INTO delta (message_id, offset, kind, text) VALUES (?, 0, 'text', ?)", (parent, next(texts))
        )


def add_to_search(database: sqlite3.Connection) -> None:
    """Adds what is missing in the full-text tables, where the first chat shows how an owner is written there.

    Chinese goes in character by character. Message n and the title of conversation n have row -n, newest first.
    """
    (owner,) = database.execute("SELECT owner FROM message_fts LIMIT 1").fetchone()
    database.create_function("apart", 1, lambda text: re.sub("([\u4e00-\u9fff])", r" \1 ", text), deterministic=True)
    database.execute(
        "INSERT INTO message_fts (rowid, owner, text) SELECT -message_id, ?, apart(text) FROM delta"
        " WHERE -message_id NOT IN (SELECT rowid FROM message_fts) ORDER BY message_id DESC",
        (owner,),
    )
    database.execute(
        "INSERT INTO conversation_fts (rowid, owner, title) SELECT -id, ?, title FROM conversation"
        " WHERE -id NOT IN (SELECT rowid FROM conversation_fts) ORDER BY id DESC",
        (owner,),
    )


def searches() -> dict[str, list[str]]:
    """What is searched for, by kind. Hostile: words that are each in many messages and never in one together, long
    lists of short beginnings, and syntax, which is text here."""
    chance = random.Random(11)
    often, seldom, often_chinese = WORDS[:20], WORDS[2_000:], CHARACTERS[:20]
    syllables = sorted({word[:2] for word in WORDS})
    hostile = [
        lambda: f"{chance.choice(often)} {chance.choice(often_chinese)}",
        lambda: " ".join(chance.choices(syllables, k=16)),
        lambda: " ".join(chance.choices(often, k=16)),
        lambda: "".join(chance.choices(often_chinese, k=100)),
        lambda: f'"{chance.choice(often)}* OR NEAR({chance.choice(often)} {chance.choice(often)})^ -- {{x}}:',
        lambda: " ".join(chance.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=16)),
    ]
    kinds = {
        "rare": lambda: chance.choice(seldom),
        "frequent": lambda: " ".join(chance.choices(often, k=chance.choice([1, 1, 2, 3]))),
        "chinese": lambda: "".join(chance.choices(often_chinese, k=chance.choice([1, 2, 2, 3]))),
        "prefix": lambda: chance.choice(WORDS)[: chance.choice([2, 3, 4])],
        "hostile": lambda: chance.choice(hostile)(),
    }
    address = "/api/v1/conversations?query="
    return {kind: [address + quote(make()) for _ in range(SEARCHES)] for kind, make in kinds.items()}


async def timed(connection: Connection, targets: list[str]) -> tuple[float, float, int]:
    """p50 and p99 of the requests in ms, and the bytes of all the answers."""
    seconds, size = [], 0
    for target in targets:
        pieces: list[bytes] = []
        started = time.perf_counter()
        status = await connection.request(encode_request("GET", target), pieces.append)
        seconds.append(time.perf_counter() - started)
        size += sum(map(len, pieces))
        if status != 200:
            raise Failure(f"{target}: {status} {b''.join(pieces)[:200]!r}")
    seconds.sort()
    return seconds[len(seconds) // 2] * 1e3, seconds[len(seconds) * 99 // 100] * 1e3, size


async def run_database(running: Running, path: Path) -> Figures:
    """`list_ms`, `open_ms`, `search_<kind>_ms` (p99), the worst of these as `search_ms`, the median of all searches as
    `search_p50_ms`, and the start on the filled database (`start_ms`)."""
    with sqlite3.connect(path) as database:
        longest = database.execute(
            "SELECT conversation_id FROM message GROUP BY conversation_id ORDER BY count(*) DESC LIMIT 1"
        ).fetchone()[0]
    database.close()
    connection = Connection(running.port)
    found: dict[str, tuple[float, float, int]] = {}
    try:
        _, lists, _ = await timed(connection, ["/api/v1/conversations"] * LISTS)
        for kind, targets in searches().items():
            found[kind] = await timed(connection, targets)
        p50, _, _ = await timed(connection, [target for targets in searches().values() for target in targets])
        _, opened, opened_size = await timed(connection, [f"/api/v1/conversations/{longest}"] * OPENINGS)
    finally:
        connection.close()
    sizes = {kind: size for kind, (_, _, size) in found.items() if kind != "hostile"}
    if min(sizes.values()) < SEARCHES * 100 or opened_size < OPENINGS * 500 * MESSAGE_WORDS:
        raise Failure(f"searches brought {sizes} bytes, openings {opened_size}: not what was stored")
    figures = {f"search_{kind}_ms": p99 for kind, (_, p99, _) in found.items()}
    figures |= {"list_ms": lists, "search_p50_ms": p50, "search_ms": max(figures.values()), "open_ms": opened}
    return figures | {"start_ms": running.start_seconds * 1e3}
