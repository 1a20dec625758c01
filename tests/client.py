"""An SSE client of the tests' own, on a raw socket: it can read slowly, stop anywhere, and vanish at once."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Event:
    """One event as the specification delivers it; `id` is None where the frame had none."""

    name: str
    id: int | None
    data: Any


class EventStream:
    """One request whose answer is a stream; a context manager. A status other than 200 is in `status` and `error`."""

    def __init__(
        self,
        url: str,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 20,
        receive_bytes: int | None = None,
    ) -> None:
        """`receive_bytes` bounds what the kernel takes for a client that does not read."""
        address = urlsplit(url)
        self._socket = socket.socket()
        self._socket.settimeout(timeout)
        if receive_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.connect((address.hostname, address.port))
        self._unread = b""
        self._frames = b""
        self.ended = False  # the response was whole
        payload = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"Host: {address.netloc}", f"Content-Length: {len(payload)}"]
        lines += ["Content-Type: application/json"] if body is not None else []
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self._socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)
        head = self._read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        self.status = int(head[0].split()[1])
        self.headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        self.error = self._read_error() if self.status != 200 else None

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Goes away politely."""
        self._socket.close()

    def reset(self) -> None:
        """Goes away as a killed process on a cut line does: RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def events(self) -> Iterator[Event]:
        """Events until the response ends. A connection that breaks ends it too; `ended` tells which."""
        chunks = self._chunks()
        while True:
            while b"\n\n" in self._frames:
                block, self._frames = self._frames.split(b"\n\n", 1)
                yield parse_event(block)
            data = next(chunks, None)
            if data is None:
                return
            self._frames += data

    def take(self, count: int) -> list[Event]:
        """The next `count` events that are not heartbeats."""
        found: list[Event] = []
        for event in self.events():
            if event.name != "heartbeat":
                found.append(event)
            if len(found) == count:
                break
        return found

    def _read_error(self) -> Any:
        length = int(self.headers.get("content-length", "0"))
        while len(self._unread) < length:
            self._receive()
        return json.loads(self._unread[:length])

    def _receive(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._unread += data

    def _read_until(self, mark: bytes) -> bytes:
        while mark not in self._unread:
            self._receive()
        head, self._unread = self._unread.split(mark, 1)
        return head

    def _chunks(self) -> Iterator[bytes]:
        """The body's chunks; what was received of one is kept between calls."""
        while not self.ended:
            try:
                size = int(self._read_until(b"\r\n"), 16)
                while len(self._unread) < size + 2:
                    self._receive()
            except (ConnectionError, TimeoutError):
                return
            data, self._unread = self._unread[:size], self._unread[size + 2 :]
            if size == 0:
                self.ended = True
            else:
                yield data


def parse_event(block: bytes) -> Event:
    """The event of one frame, by the specification's rules."""
    name, identity, data = "message", None, []
    for line in block.split(b"\n"):
        key, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if key == b"event":
            name = value.decode()
        elif key == b"id":
            identity = int(value)
        elif key == b"data":
            data.append(value)
    return Event(name, identity, json.loads(b"\n".join(data)))


class Reader:
    """What a client of the contract holds: it appends every delta, and nothing else."""

    def __init__(self) -> None:
        self.content = ""
        self.cursor: int | None = None
        self.end: dict[str, Any] | None = None
        self.names: list[str] = []

    def take(self, event: Event) -> None:
        """Takes an event. Raises AssertionError if the stream breaks its contract."""
        self.names.append(event.name)
        if event.name == "reset":
            self.content = ""
        elif event.name == "start":
            assert event.data["offset"] == len(self.content) == event.id, "a start carries the cursor's offset"
        elif event.name == "delta":
            self.content += event.data["text"]
            assert event.id == len(self.content), "an id is the offset after its event"
        elif event.name == "end":
            self.end = event.data
        if event.id is not None:
            self.cursor = event.id

    def read(self, stream: EventStream, count: int | None = None) -> None:
        """Takes `count` events, or all that come."""
        for number, event in enumerate(stream.events(), 1):
            self.take(event)
            if number == count:
                break
