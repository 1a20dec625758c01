"""The benchmark's client must notice what it is there to notice."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from client import Connection, Failure, FlatReader, Reader, fetch
from records import RECORD_CHARACTERS, STAMP_MODULUS, added_seconds, encode_record, flat_record, stamp_now
from report import BARS, Results, number, render, spread

END = b'event: end\ndata: {"status":"completed"}\n\n'


def event(*sequences: int) -> bytes:
    """One delta event of llmchat that carries these records."""
    text = b"".join(encode_record(sequence, stamp_now()) for sequence in sequences)
    return b'id: 0\nevent: delta\ndata: {"kind":"text","text":"%b"}\n\n' % text


def read(reader: Reader, *pieces: bytes) -> Reader:
    for piece in pieces:
        reader.take(piece)
    reader.finish()
    return reader


def test_deltas_that_are_joined_or_cut_by_the_server_are_all_counted_once():
    body = event(0) + event(1, 2, 3) + END
    reader = read(Reader(4), *(body[at : at + 1] for at in range(len(body))))
    assert (reader.received, reader.lost, reader.doubled, reader.failure) == (4, 0, 0, "")


def test_a_delta_cut_in_two_events_is_one_delta():
    record = encode_record(0, stamp_now()).decode()
    halves = [b'data: {"kind":"text","text":"%b"}\n\n' % half.encode() for half in (record[:3], record[3:])]
    reader = read(Reader(1), *halves, END)
    assert (reader.received, reader.lost, reader.doubled) == (1, 0, 0)


@pytest.mark.parametrize(
    ("sequences", "lost", "doubled"),
    [((0, 1, 3), 10, 0), ((0, 1, 1, 2, 3), 0, 10), ((0, 2, 1, 3), 10, 10), ((0, 1), 20, 0), ((), 40, 0)],
)
def test_lost_doubled_and_misplaced_characters_are_counted(sequences, lost, doubled):
    reader = read(Reader(4), event(*sequences), END)
    assert (reader.lost, reader.doubled) == (lost, doubled)


def test_a_flat_out_answer_is_checked_as_strictly_as_a_paced_one():
    def body(*sequences):
        text = b"".join(map(flat_record, sequences))
        return b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\ndata: [DONE]\n\n' % text

    assert read(FlatReader(3), body(0, 1, 2)).received == 3
    assert read(FlatReader(3), body(0, 2)).lost == RECORD_CHARACTERS
    assert read(FlatReader(3), body(0, 1, 1, 2)).doubled == RECORD_CHARACTERS


def test_an_answer_without_its_end_is_a_failure():
    assert read(Reader(1), event(0)).failure.startswith("no end")


def test_latency_survives_the_wrap_of_the_stamp():
    stamp = encode_record(0, STAMP_MODULUS - 100)[4:9]
    assert added_seconds(stamp, 100) == pytest.approx(0.002)


@pytest.mark.parametrize("piece", [1, 2, 7, 10_000])
def test_http_bodies_are_read_however_the_network_cuts_them(piece):
    answers = {
        b"/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
        b"/length": b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\nabcde",
        b"/empty": b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        answer = answers[head.split()[1]]
        for at in range(0, len(answer), piece):
            writer.write(answer[at : at + piece])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def ask() -> list[tuple[int, bytes]]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return [await fetch(port, "GET", target.decode()) for target in answers]

    assert asyncio.run(ask()) == [(200, b"abcde"), (404, b"abcde"), (204, b"")]


def test_a_bar_is_met_on_its_own_side_of_the_limit_only():
    results: Results = {("c100", "llmchat"): [{"cpu_us": 40.0, "p99_ms": 31.0}]}
    results["c100", "passthrough"] = [{"cpu_us": 100.0}]
    report = render(results, ["llmchat", "passthrough"], ["a fact"])
    assert "CPU a delta / passthrough's ≤ 0.45 | 0.40 | ✓ |" in report
    assert "added p99 ms ≤ 30.0 | 31.0 | ✗ |" in report
    assert "500 streams" not in report


def test_every_bar_says_when_it_was_not_measured():
    assert all("not measured" in bar.line({}) for bar in BARS)


def test_figures_show_the_median_between_the_extremes():
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00–3.00)"
    assert spread([0.5], "kept_up") == "50.0 %"
    assert number(12345.6) == "12,346"


def test_a_connection_that_closes_early_raises():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab")
        await writer.drain()
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await Connection(port).request(b"GET / HTTP/1.1\r\n\r\n", lambda body: None)

    with pytest.raises(Failure, match="connection lost"):
        asyncio.run(ask())
