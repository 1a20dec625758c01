"""A TCP proxy for the tests: between a client and a server on loopback it does to the bytes what bad networks do.

    client ──▶ proxy.port ──pump to_server──▶ 127.0.0.1:target_port
           ◀──pump to_client──

Each connection (a link) has two pumps; a close or reset of one side reaches the other as the same. What the test sets
holds for the open links and for later ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal

from tests.provider import WAIT_SECONDS, Hangup, LoopThread, WatchedReader, reset_on_close

Direction = Literal["to_client", "to_server"]
Ending = Literal["cut", "reset"]
READ_BYTES_MAX = 65_536


class Link:
    """One proxied connection: its task, its writers by direction, and the bytes it has forwarded in each."""

    def __init__(self, task: asyncio.Task[None], client: asyncio.StreamWriter) -> None:
        self.task = task
        self.writers: dict[Direction, asyncio.StreamWriter] = {"to_client": client}
        self.forwarded_bytes: dict[Direction, int] = {"to_client": 0, "to_server": 0}

    def end(self, ending: Ending) -> None:
        """FIN ("cut") or RST ("reset") to both sides."""
        for writer in self.writers.values():
            if ending == "reset":
                reset_on_close(writer)
                writer.transport.abort()
            writer.close()


class TcpProxy(LoopThread):
    """Forwards `port` to `target_port` until told otherwise; a context manager, like the provider.

    `accepted` counts links, `forwarded_bytes` the bytes in each direction, both since the start.
    """

    def __init__(self, target_port: int, port: int = 0) -> None:
        super().__init__(port)
        self.target_port = target_port
        self.accepted = 0
        self.forwarded_bytes: dict[Direction, int] = {"to_client": 0, "to_server": 0}
        self._links: set[Link] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._drip = (READ_BYTES_MAX, 0.0)
        self._limit: tuple[Direction, int, Ending] = ("to_client", 0, "cut")
        self._limit_times = 0

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._links)

    def cut(self) -> None:
        """Closes every link politely."""
        self.call(lambda: self._end_all("cut"))

    def reset(self) -> None:
        """Closes every link with RST."""
        self.call(lambda: self._end_all("reset"))

    def freeze(self) -> None:
        """From now on accepts and forwards nothing, not even a close: half-open connections."""
        self.call(self._flowing.clear)

    def thaw(self) -> None:
        """Forwards again, first what was held back."""
        self.call(self._flowing.set)

    def drip(self, size: int = 1, delay: float = 0.0) -> None:
        """Writes of `size` bytes with `delay` seconds after each; `drip(65536)` ends it."""
        self._drip = (size, delay)

    def cut_after(self, count: int, direction: Direction = "to_client", ending: Ending = "cut", times: int = 1) -> None:
        """Ends the next `times` links that have forwarded `count` bytes in the direction, and not a byte more."""
        self._limit, self._limit_times = (direction, count, ending), times

    def wait_open_connections(self, count: int, timeout: float = WAIT_SECONDS) -> None:
        self.wait_until(lambda: len(self._links) == count, f"{count} open connections at the proxy", timeout)

    async def serve(self, reader: WatchedReader, writer: asyncio.StreamWriter) -> None:
        reader.on_end = None  # a close is forwarded in its turn, by the pump
        task = asyncio.current_task()
        assert task is not None
        link = Link(task, writer)
        self._links.add(link)
        self.accepted += 1
        self.notify()
        try:
            await self._connect(link, reader)
        except* ConnectionError:
            link.end("reset")
        except* Hangup:
            pass
        finally:
            link.end("cut")
            self._links.discard(link)
            self.notify()

    async def _connect(self, link: Link, reader: asyncio.StreamReader) -> None:
        """Pumps in both directions until both have ended."""
        await self._flowing.wait()
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        server_writer.transport.set_write_buffer_limits(high=0)
        link.writers["to_server"] = server_writer
        async with asyncio.TaskGroup() as pumps:
            pumps.create_task(self._pump(link, reader, "to_server"))
            pumps.create_task(self._pump(link, server_reader, "to_client"))

    async def _pump(self, link: Link, reader: asyncio.StreamReader, direction: Direction) -> None:
        while data := await reader.read(READ_BYTES_MAX):
            size, delay = self._drip
            for start in range(0, len(data), size):
                await self._flowing.wait()
                await self._forward(link, direction, data[start : start + size])
                await asyncio.sleep(delay)
        await self._flowing.wait()
        with contextlib.suppress(OSError):
            link.writers[direction].write_eof()

    async def _forward(self, link: Link, direction: Direction, data: bytes) -> None:
        limited, count, ending = self._limit
        is_last = False
        if self._limit_times and direction == limited:
            data = data[: max(0, count - link.forwarded_bytes[direction])]
            is_last = link.forwarded_bytes[direction] + len(data) >= count
        link.forwarded_bytes[direction] += len(data)
        self.forwarded_bytes[direction] += len(data)
        link.writers[direction].write(data)
        await link.writers[direction].drain()
        self.notify()
        if is_last:
            self._limit_times -= 1
            link.end(ending)
            raise Hangup

    def _end_all(self, ending: Ending) -> None:
        for link in self._links:
            link.end(ending)
            link.task.cancel()
