"""Settings and providers from the environment, `.env` and flags; and every way in which a start is refused."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llmchat
from tests.conftest import ROOT, Server
from tests.provider import Provider

MIGRATIONS_COUNT = len(list((ROOT / "migrations").glob("*.sql")))
DEFAULTS = {
    "HOST": "127.0.0.1", "PORT": 8000, "DB": "llmchat.db", "DEFAULT_MODEL": "", "FALLBACKS": "", "LOG_LEVEL": "info",
    "LOG_FORMAT": "text", "FLUSH_INTERVAL_MS": 20, "RING_EVENTS": 1024, "HEARTBEAT_SECONDS": 15, "DRAIN_SECONDS": 5,
    "ATTEMPTS": 3, "GENERATIONS_MAX": 256, "SUBSCRIBERS_MAX": 256, "STALL_TIMEOUT_SECONDS": 60,
    "FIRST_DELTA_TIMEOUT_SECONDS": 120, "KEEPALIVE_SECONDS": 600, "GENERATION_TIMEOUT_SECONDS": 1800,
    "ANSWER_CHARACTERS_MAX": 1_000_000, "REPETITION_COUNT": 20, "REPETITION_CHARACTERS": 1000,
    "SYSTEM": "", "TITLE_MODEL": "", "STREAMS_MAX": 4096, "UNSTORED_SECONDS": 600.0, "OWNER_GENERATIONS_MAX": 64, "OWNER_STREAMS_MAX": 256,
    "TOKEN": "", "USERS": "", "SESSION_DAYS": 30, "HOSTS": "", "CORS_ORIGINS": "", "TRUSTED_PROXIES": "",
}  # fmt: skip
NUMBERS = [one for one in llmchat.SETTINGS if one.metadata["least"] is not None]


def load(**environment: str) -> llmchat.Config:
    return llmchat.load_config(environment, {})


def refused(**environment: str) -> str:
    with pytest.raises(llmchat.StartError) as raised:
        load(**environment)
    return str(raised.value)


def run(*arguments: str, folder: Path, limit_bytes: int | None = None, **environment: str) -> tuple[int, str, str]:
    """A start that ends by itself: exit status, output, errors. `limit_bytes`: what a file may grow to."""
    limit = None
    if limit_bytes is not None:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))  # noqa: E731
    done = subprocess.run(
        [sys.executable, str(ROOT / "llmchat.py"), *arguments],
        cwd=folder, env={"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error", "COLUMNS": "200", **environment},
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, preexec_fn=limit,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def refused_start(*arguments: str, folder: Path, **more: Any) -> str:
    """The one line of a start that is refused: exit status 2, nothing on stdout, no traceback."""
    status, output, errors = run("--port", "0", *arguments, folder=folder, **more)
    assert (status, output) == (2, ""), errors
    assert errors.startswith("llmchat: ") and errors.endswith("\n") and errors.count("\n") == 1, errors
    return errors.removeprefix("llmchat: ").strip()


# ── settings ──


def test_every_setting_of_the_contract_has_its_default() -> None:
    config = load()
    assert {name: getattr(config, name.lower()) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("one", NUMBERS, ids=lambda one: one.name)
def test_a_number_is_taken_at_its_bounds_and_refused_beyond_them(one: Any) -> None:
    variable, least, most = f"LLMCHAT_{one.name.upper()}", one.metadata["least"], one.metadata["most"]
    for bound in (least, most):
        assert getattr(load(**{variable: str(bound)}), one.name) == bound
    for beyond in (least - 1, most + 1):
        message = refused(**{variable: str(beyond)})
        assert message.startswith(f"{variable}: '{beyond}' is not accepted; it is a ")
        assert message.endswith(f"number from {least:,} to {most:,}")


@pytest.mark.parametrize("text", ["x", "1e", "nan", "inf", "-inf", "1 2", "0x10", "٣٫٥", "9" * 5000])
@pytest.mark.parametrize("one", NUMBERS, ids=lambda one: one.name)
def test_what_is_no_number_is_refused(one: Any, text: str) -> None:
    variable = f"LLMCHAT_{one.name.upper()}"
    kind = "a whole number" if isinstance(one.default, int) else "a number"
    message = refused(**{variable: text})
    assert message.startswith(f"{variable}: '{text[:60]}") and f" is not accepted; it is {kind} from " in message
    assert len(message) < 300


@pytest.mark.parametrize("one", [one for one in NUMBERS if isinstance(one.default, int)], ids=lambda one: one.name)
def test_a_whole_number_is_not_a_fraction(one: Any) -> None:
    assert "it is a whole number" in refused(**{f"LLMCHAT_{one.name.upper()}": "1.5"})


@pytest.mark.parametrize(
    ("variable", "accepted"),
    [("LLMCHAT_LOG_LEVEL", ["debug", "info", "warning", "error"]), ("LLMCHAT_LOG_FORMAT", ["text", "json"])],
)
def test_a_choice_is_taken_in_any_case_and_refused_with_what_there_is(variable: str, accepted: list[str]) -> None:
    field = variable.removeprefix("LLMCHAT_").lower()
    assert [getattr(load(**{variable: word.upper()}), field) for word in accepted] == accepted
    assert refused(**{variable: "loud"}) == f"{variable}: 'loud' is not accepted; it is one of {', '.join(accepted)}"


def test_an_empty_setting_is_its_default() -> None:
    assert load(**{f"LLMCHAT_{name}": "" for name in DEFAULTS}) == load()


def test_flags_win_over_the_environment() -> None:
    config = llmchat.load_config({"LLMCHAT_PORT": "1", "LLMCHAT_HOST": "a"}, {"port": "2", "host": None, "db": "x.db"})
    assert (config.port, config.host, config.db) == (2, "a", "x.db")


def test_a_bad_setting_stops_the_start_with_one_line(tmp_path: Path) -> None:
    line = refused_start(folder=tmp_path, LLMCHAT_RING_EVENTS="many")
    assert line == "LLMCHAT_RING_EVENTS: 'many' is not accepted; it is a whole number from 1 to 100,000"
    assert list(tmp_path.iterdir()) == []


def test_a_bad_flag_is_named_by_its_setting(tmp_path: Path) -> None:
    line = refused_start("--port", "65536", folder=tmp_path)
    assert line == "LLMCHAT_PORT: '65536' is not accepted; it is a whole number from 0 to 65,535"


def test_an_unknown_flag_is_refused_without_a_traceback(tmp_path: Path) -> None:
    status, output, errors = run("--prot=1", folder=tmp_path)
    assert (status, output) == (2, "") and "unrecognized arguments: --prot" in errors and "Traceback" not in errors


def test_help_lists_every_setting_with_its_default(tmp_path: Path) -> None:
    status, output, errors = run("--help", folder=tmp_path)
    assert (status, errors) == (0, "")
    for one in llmchat.SETTINGS:
        assert re.search(rf"LLMCHAT_{one.name.upper()} .*{re.escape(one.metadata['meaning'])}", output), one.name
        assert f"[{one.default}]" in output
    for word in ("--host", "--port", "--db", "--version", "_API_KEY", "_BASE_URL", "_MODELS", "_DIALECT", ".env"):
        assert word in output


def test_version_is_one_line(tmp_path: Path) -> None:
    assert run("--version", folder=tmp_path) == (0, f"llmchat {llmchat.__version__}\n", "")


# ── .env ──


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("NAME=value", "value"),
        ("export NAME=value", "value"),
        ("  NAME = value  ", "value"),
        ("NAME=value # a comment", "value"),
        ("NAME=va#lue", "va#lue"),
        ("NAME='a # b'", "a # b"),
        ('NAME="a # b" # c', "a # b"),
        ("NAME=\"a 'quoted' word\"", "a 'quoted' word"),
        ("NAME='", "'"),
        ("NAME=", ""),
        ("NAME= # nothing", ""),
        ("NAME=a=b", "a=b"),
        ("NAME=value\r", "value"),
        ("\ufeffNAME=value", "value"),
        ("# NAME=no\n\n   \nNAME=yes", "yes"),
        ("NAME=first\nNAME=second", "second"),
        ("NAME=sk-ünïcödé🙂", "sk-ünïcödé🙂"),
    ],
)
def test_a_dotenv_line_is_read_as_it_is_meant(tmp_path: Path, line: str, value: str) -> None:
    (tmp_path / ".env").write_text(line, encoding="utf-8", newline="")
    assert llmchat.read_dotenv(tmp_path / ".env") == {"NAME": value}


@pytest.mark.parametrize("text", ["NAME", "1NAME=x", "NA ME=x", "=x", "export A B=x", "- NAME=x"])
def test_a_dotenv_line_that_is_none_is_named_by_its_number_and_never_shown(tmp_path: Path, text: str) -> None:
    (tmp_path / ".env").write_text(f"A=1\n# two\n{text}\n", encoding="utf-8")
    with pytest.raises(llmchat.StartError, match=r"^\.env: line 3 is not NAME=value$"):
        llmchat.read_dotenv(tmp_path / ".env")


def test_a_dotenv_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("sk-secret", encoding="utf-8")
    assert refused_start(folder=tmp_path) == ".env: line 1 is not NAME=value"
    (tmp_path / ".env").unlink()
    (tmp_path / ".env").mkdir()
    assert refused_start(folder=tmp_path).startswith(".env: cannot be read: ")
    (tmp_path / ".env").rmdir()
    (tmp_path / ".env").write_bytes(b"NAME=\xff")
    assert refused_start(folder=tmp_path).startswith(".env: cannot be read: ")


def test_the_environment_wins_over_dotenv_and_a_flag_over_both(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("LLMCHAT_LOG_FORMAT=json\nLLMCHAT_PORT=bad\nLLMCHAT_DB=nowhere/x.db\nX_API_KEY=k\n")
    server = Server(tmp_path, LLMCHAT_PORT="worse", LLMCHAT_LOG_FORMAT="text", LLMCHAT_DRAIN_SECONDS="0")
    assert server.output[1].startswith(f"database: {tmp_path}/llmchat.db")
    assert any(line.startswith("X_API_KEY alone switches nothing on") for line in server.output)
    server.start_chat("x")
    server.close()
    assert not server.log[0].startswith("{")


# ── providers ──


def providers_of(**environment: str) -> dict[str, llmchat.Provider]:
    return {one.name: one for one in load(**environment).providers}


@pytest.mark.parametrize(
    "name", [name for name, one in llmchat.PROVIDER_FACTS.items() if one.base_url and not one.local]
)
def test_each_variable_of_a_built_in_provider_switches_it_on(name: str) -> None:
    for variable in llmchat.PROVIDER_FACTS[name].variables:
        found = providers_of(**{variable: " key "})
        assert list(found) == [name]
        assert (found[name].key, found[name].variable) == ("key", variable)
        assert found[name].base_url.startswith("https://") and not found[name].base_url.endswith("/")


def test_the_first_variable_wins_where_there_are_two() -> None:
    assert providers_of(GEMINI_API_KEY="a", GOOGLE_API_KEY="b")["gemini"].key == "a"


def test_a_base_url_alone_switches_a_local_server_on_without_a_key() -> None:
    found = providers_of(OLLAMA_BASE_URL="http://127.0.0.1:11434/v1/")["ollama"]
    assert (found.base_url, found.key, found.dialect) == ("http://127.0.0.1:11434/v1", None, "openai")


def test_an_unknown_provider_is_made_by_its_base_url() -> None:
    found = providers_of(
        MY_BOX_BASE_URL="http://box/v1", MY_BOX_API_KEY="k", MY_BOX_MODELS=" a, b ,,c/d ", MY_BOX_DIALECT="anthropic"
    )
    box = found["my-box"]
    assert (box.base_url, box.key, box.models, box.dialect) == ("http://box/v1", "k", ("a", "b", "c/d"), "anthropic")


@pytest.mark.parametrize(
    "variable", ["GITHUB_TOKEN", "HF_TOKEN", "LMSTUDIO_API_KEY", "OPENAI_MODELS", "OPENAI_DIALECT", "AZURE_API_KEY"]
)
def test_what_may_be_set_for_other_reasons_switches_nothing_on(variable: str) -> None:
    assert list(providers_of(**{variable: "openai"})) == ["demo"]


def test_an_empty_key_is_no_key() -> None:
    assert list(providers_of(OPENAI_API_KEY="", GROQ_BASE_URL="")) == ["demo"]


def test_a_key_for_an_unknown_provider_is_told_what_to_set() -> None:
    config = load(MY_BOX_API_KEY="secret-key", OPENAI_API_KEY="k")
    assert config.unusable_keys == (
        "MY_BOX_API_KEY alone switches nothing on: set MY_BOX_BASE_URL to the address of my-box's API",
    )


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("OPENAI_BASE_URL", "api.openai.com", "it is an address such as http://127.0.0.1:11434/v1"),
        ("OPENAI_BASE_URL", "ftp://x", "it is an address such as http://127.0.0.1:11434/v1"),
        ("OPENAI_BASE_URL", "http://", "it is an address such as http://127.0.0.1:11434/v1"),
        ("OPENAI_BASE_URL", "http://a b", "it is an address such as http://127.0.0.1:11434/v1"),
        ("OPENAI_BASE_URL", "http://x:80:90 /", "it is an address such as http://127.0.0.1:11434/v1"),
        ("OPENAI_DIALECT", "grpc", "it is one of openai, anthropic"),
    ],
)
def test_a_providers_variable_that_does_not_fit_is_named(variable: str, value: str, accepted: str) -> None:
    message = refused(**{"OPENAI_API_KEY": "k", variable: value})
    assert message == f"{variable}: {value!r} is not accepted; {accepted}"


@pytest.mark.parametrize("key", ["sk-ü", "sk-a\nb", "sk\0", "sk-🙂", "sk-\x7f", "sk-a b"])
def test_a_key_that_no_header_can_carry_stops_the_start_and_is_not_shown(key: str) -> None:
    message = refused(OPENAI_API_KEY=key)
    assert re.fullmatch(r"OPENAI_API_KEY: character \d is not printable ASCII, so it cannot be a key", message)


def test_a_start_says_where_it_listens_which_database_and_which_providers(tmp_path: Path) -> None:
    server = Server(tmp_path, GROQ_API_KEY="gsk-secret", OPENAI_API_KEY="sk-secret", MY_BOX_API_KEY="box-secret")
    server.close()
    assert server.output == [
        f"llmchat {llmchat.__version__} listens on {server.url}\n",
        f"database: {tmp_path}/llmchat.db\n",
        "providers: openai, groq\n",
        "MY_BOX_API_KEY alone switches nothing on: set MY_BOX_BASE_URL to the address of my-box's API\n",
    ]


def test_a_first_start_says_that_it_is_the_demo_and_what_to_set(demo_server: Server) -> None:
    assert (
        demo_server.output[2]
        == "providers: demo (no key was found; set one such as OPENAI_API_KEY, or OLLAMA_BASE_URL)\n"
    )


def test_help_tells_what_the_environment_configured(tmp_path: Path, provider: Provider) -> None:
    settings = {
        "OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": "sk-secret", "OPENAI_MODELS": "m,n",
        "OLLAMA_BASE_URL": provider.base_url, "MY_BOX_API_KEY": "box-secret", "LLMCHAT_DEFAULT_MODEL": "openai/n",
    }  # fmt: skip
    server = Server(tmp_path, **settings)
    response = server.get("/api/v1/help")
    server.close()
    told = {one["name"]: one for one in response.json()["providers"]}
    assert (told["openai"]["key"], told["openai"]["models"], told["openai"]["base_url"]) == (
        "found",
        ["m", "n"],
        provider.base_url,
    )
    assert (told["ollama"]["key"], told["ollama"]["error"]) == ("not needed", None)
    assert response.json()["default_model"] == "openai/n"
    assert response.json()["unusable_keys"] == list(load(MY_BOX_API_KEY="k").unusable_keys)
    assert "secret" not in response.text


# ── what the database and the port can be ──


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused_start("--port", str(port), folder=tmp_path)
    assert line.startswith(f"cannot listen on 127.0.0.1 port {port}: Address already in use")
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_not_ours_is_one_line(tmp_path: Path) -> None:
    assert refused_start("--host", "192.0.2.1", folder=tmp_path).startswith("cannot listen on 192.0.2.1 port 0: ")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_text(path: Path) -> None:
    path.write_text("This is a text, and no database. " * 100)


def make_newer(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 999")
        connection.commit()


def make_foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE customer (name)")
        connection.execute("INSERT INTO customer VALUES ('Ada')")
        connection.commit()


def make_dangling(path: Path) -> None:
    path.symlink_to(path.parent / "missing" / "x.db")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_folder, "is a folder"),
        (make_text, "file is not a database"),
        (make_newer, f"is of version 999, made by a newer llmchat; this one knows {MIGRATIONS_COUNT}"),
        (make_foreign, "holds tables that are not llmchat's"),
        (make_dangling, "unable to open database file"),
    ],
)
def test_a_file_that_is_no_database_of_ours_is_refused_and_left_as_it_was(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "x.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    assert refused_start("--db", str(path), folder=tmp_path) == f"database {path}: {words}"
    assert (path.read_bytes() if path.is_file() else None) == before
    left = {one.name for one in tmp_path.iterdir()} - {"x.db", "x.db.lock"}
    assert left == set()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing/x.db", "No such file or directory"),
        ("file/x.db", "Not a directory"),
        ("/proc/x.db", "No such file or directory"),
    ],
)
def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "file").touch()
    assert refused_start("--db", path, folder=tmp_path) == f"database {path}: {words}"


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with these options; skips where that is not allowed."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount-{len(folders)}"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_folder_is_refused(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    folder = mounted("ro,size=1m")
    assert (
        refused_start("--db", str(folder / "x.db"), folder=tmp_path) == f"database {folder}/x.db: Read-only file system"
    )


def test_a_full_disk_is_refused(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    folder = mounted("size=64k")
    with contextlib.suppress(OSError):
        (folder / "filler").write_bytes(b"x" * 60 * 1024)
    line = refused_start("--db", str(folder / "x.db"), folder=tmp_path)
    assert line.startswith(f"database {folder}/x.db: ") and ("full" in line or "No space" in line or "I/O" in line)


@pytest.mark.parametrize("limit_bytes", [0, 4096, 20_000])
def test_a_database_that_may_not_grow_is_refused(tmp_path: Path, limit_bytes: int) -> None:
    line = refused_start("--db", "x.db", folder=tmp_path, limit_bytes=limit_bytes)
    assert line.startswith("database x.db: ") and len(line) > len("database x.db: ")
    server = Server(tmp_path, "--db", str(tmp_path / "x.db"))  # and with room again, it starts on what is there
    assert server.get("/api/v1/health").status_code == 200
    server.close()


def test_a_second_process_on_one_database_is_refused_and_names_the_first(tmp_path: Path) -> None:
    server = Server(tmp_path)
    line = refused_start("--db", str(server.db), folder=tmp_path)
    assert line == f"database {server.db}: another llmchat is using it (process {server.process.pid})"
    assert server.get("/api/v1/health").status_code == 200
    server.close()
    server.start()
    assert server.get("/api/v1/health").status_code == 200
    server.close()


def test_another_programs_lock_at_the_start_is_one_line(tmp_path: Path) -> None:
    Server(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "llmchat.db", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert refused_start("--db", "llmchat.db", folder=tmp_path) == "database llmchat.db: database is locked"
