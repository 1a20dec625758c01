"""The servers side by side: how each is started, pinned, asked for work, weighed and stopped.

A server gets one core to itself; this process, with the client in it, and the provider share another one. Every
measurement gets a fresh server, so that none inherits the memory or the connections of the one before. What a server
used is read from the operating system for its whole process tree, all threads included (Linux only).
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from client import encode_request

HERE = Path(__file__).resolve().parent
START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 10.0
ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")  # what servers inherit: no keys, no settings
LLMCHAT_SETTINGS = {
    "LLMCHAT_GENERATIONS_MAX": "2000",
    "LLMCHAT_SUBSCRIBERS_MAX": "2000",
    "LLMCHAT_LOG_LEVEL": "warning",
}
NGINX_CONFIGURATION = """
worker_processes 1;
error_log stderr error;
pid {directory}/nginx.pid;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    keepalive_requests 1000000;
    upstream provider {{ server 127.0.0.1:{provider}; keepalive 1000; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        location = /api/v1/health {{ return 200 "ok"; }}
        location / {{
            proxy_pass http://provider;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


class ServerError(Exception):
    """A server that does not start, or died."""


def pick_cores() -> tuple[int, int]:
    """The server's core and the one that provider and client share; the same one if there is no second."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def process_tree(pid: int) -> list[int]:
    """The process and all that descend from it."""
    pids = [pid]
    for parent in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids.extend(int(child) for child in (task / "children").read_text().split())
    return pids


def cpu_seconds(pid: int) -> float:
    """CPU that a process tree has used, user and system, all threads, from the kernel's per-process clock.

    The clock's id is made of the pid as clock_getcpuclockid(3) does; nanoseconds, where /proc/PID/stat has 10 ms.
    """
    total = 0.0
    for process in process_tree(pid):
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~process << 3) | 2)
    return total


def busy_seconds() -> float:
    """CPU that the whole machine has used: all cores, everything but idle and waiting for the disk."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Resident memory of a process tree (VmRSS: shared pages count in each process)."""
    total = 0
    for process in process_tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) * 1024
    return total


@dataclass(frozen=True)
class Setup:
    """What every server of a run is started with."""

    python: str
    llmchat: Path
    nginx: str
    directory: Path  # for databases and configurations, on a real disk
    provider_port: int
    server_core: int


@dataclass
class Running:
    """A server that answers."""

    name: str
    port: int
    process: subprocess.Popen
    start_seconds: float  # spawn to the first 200 of health
    idle_bytes: int  # resident, before any other request
    log: Path = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def resident_bytes(self) -> int:
        return resident_bytes(self.pid)

    def chat_request(self, model: str) -> bytes:
        """The request for a streamed answer of the provider's `model`."""
        question = "What is the difference between a queue and a stack?"
        if self.name == "llmchat":
            body = {"model": f"openai/{model}", "message": question, "stream": True}
            return encode_request("POST", "/api/v1/chat", json.dumps(body).encode())
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "stream": True, "messages": messages}
        return encode_request("POST", "/v1/chat/completions", json.dumps(body).encode())

    def stop(self) -> None:
        stop_process(self.process)


def stop_process(process: subprocess.Popen) -> None:
    """Asks the process to end, then makes it."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def command(setup: Setup, name: str, directory: Path, port: int) -> list[str]:
    """The command line that starts a server."""
    provider = f"http://127.0.0.1:{setup.provider_port}/v1"
    if name == "llmchat":
        return [setup.python, "-m", setup.llmchat.stem, "--port", str(port), "--db", str(directory / "llmchat.db")]
    if name in ("passthrough", "tuned"):
        return [
            setup.python,
            str(HERE / "passthrough.py"),
            str(port),
            provider,
            *(["--tuned"] if name == "tuned" else []),
        ]
    if name == "bare":
        return [setup.python, str(HERE / "bare.py"), str(port)]
    assert name == "nginx", name
    configuration = directory / "nginx.conf"
    text = NGINX_CONFIGURATION.format(directory=directory, port=port, provider=setup.provider_port)
    configuration.write_text(text)
    return [setup.nginx, "-p", str(directory), "-c", str(configuration), "-g", "daemon off;"]


def start_server(setup: Setup, name: str, directory: Path, settings: dict[str, str] | None = None) -> Running:
    """Starts a server on its core and waits for health; `settings` are further variables for llmchat."""
    port = free_port()
    line = command(setup, name, directory, port)
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if name == "llmchat":
        environment |= LLMCHAT_SETTINGS | {"PYTHONPATH": str(setup.llmchat.parent)} | (settings or {})
        environment["OPENAI_BASE_URL"] = f"http://127.0.0.1:{setup.provider_port}/v1"
    log = directory / f"{name}.log"
    with log.open("ab") as output:
        started = time.perf_counter()
        process = subprocess.Popen(line, env=environment, cwd=directory, stdout=output, stderr=output)
        os.sched_setaffinity(process.pid, {setup.server_core})
    wait_for_health(process, port, log)
    seconds = time.perf_counter() - started
    for pid in process_tree(process.pid):
        os.sched_setaffinity(pid, {setup.server_core})
    time.sleep(0.3)
    return Running(name, port, process, seconds, resident_bytes(process.pid), log)


def wait_for_health(process: subprocess.Popen, port: int, log: Path) -> None:
    """Returns at the first 200 of health; asks again every half millisecond."""
    request = encode_request("GET", "/api/v1/health", headers="Connection: close\r\n")
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"ended with {process.returncode}: {log.read_text(errors='replace')[-800:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(request)
            if b" 200 " in connection.recv(65_536).partition(b"\r\n")[0]:
                return
        time.sleep(0.0005)
    stop_process(process)
    raise ServerError(f"no health within {START_SECONDS_MAX:.0f} s: {log.read_text(errors='replace')[-800:]}")


def start_provider(python: str, core: int) -> tuple[subprocess.Popen, int]:
    """Starts the provider on `core`: the process and its port."""
    port = free_port()
    process = subprocess.Popen([python or sys.executable, str(HERE / "provider.py"), str(port)])
    os.sched_setaffinity(process.pid, {core})
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process, port
        time.sleep(0.01)
    stop_process(process)
    raise ServerError("the provider does not start")
