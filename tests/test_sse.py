"""The SSE decoder, by the parsing rules of https://html.spec.whatwg.org/multipage/server-sent-events.html (9.2.6).

The numbers are those of the rules in their order there: 1 the byte order mark, 2 the lines' ends, 3 a blank line, 4 a
comment, 5 a colon within, 6 no colon, 7 the fields, 8 dispatch, 9 the end of the stream.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmchat import (
    PROVIDER_EVENT_BYTES_MAX,
    PROVIDER_WORDS_CHARACTERS_MAX,
    STRANGE_BYTES_MAX,
    ProviderProtocol,
    SseDecoder,
)

Events = list[tuple[bytes, bytes]]
BOM = b"\xef\xbb\xbf"


def decode(*pieces: bytes) -> Events:
    decoder = SseDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)] + decoder.end()


def data_of(*pieces: bytes) -> list[bytes]:
    return [data for _, data in decode(*pieces)]


# ── 1: "strip one leading U+FEFF BYTE ORDER MARK" ───────────────────────────────────────────────────────────────────


def test_1_a_byte_order_mark_before_the_stream_is_dropped() -> None:
    assert data_of(BOM + b"data: a\n\n") == [b"a"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_1_a_byte_order_mark_is_dropped_where_it_is_cut(cut: int) -> None:
    stream = BOM + b"data: a\n\n"
    assert data_of(stream[:cut], b"", stream[cut:]) == [b"a"]


def test_1_only_one_byte_order_mark_is_dropped_and_only_at_the_start() -> None:
    assert data_of(BOM + BOM + b"data: a\n\ndata: b\n\n") == [b"b"]
    assert data_of(b"data: a\n\n" + BOM + b"data: b\n\ndata: " + BOM + b"c\n\n") == [b"a", BOM + b"c"]


def test_1_a_stream_that_ends_within_a_byte_order_mark_has_no_event() -> None:
    assert decode(BOM[:2]) == []


# ── 2: "lines must be separated by CRLF, LF or CR" ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ends", list(itertools.product([b"\n", b"\r", b"\r\n"], repeat=4)), ids=str)
def test_2_every_mixture_of_line_ends_gives_the_same_events_however_it_is_cut(ends: tuple[bytes, ...]) -> None:
    first, second, third, fourth = ends
    stream = b"event: x" + first + b"data: 1" + second + third + b"data: 2" + fourth + fourth
    one_end = second + third == b"\r\n"  # so there is no blank line
    expected = [(b"x", b"1\n2")] if one_end else [(b"x", b"1"), (b"", b"2")]
    for cut in range(len(stream) + 1):
        assert decode(stream[:cut], stream[cut:]) == expected
    assert decode(*(stream[i : i + 1] for i in range(len(stream)))) == expected


def test_2_an_event_is_delivered_at_its_end_also_when_that_is_a_cr_which_an_lf_may_follow() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: a\r\r") == [(b"", b"a")]
    assert decoder.feed(b"\ndata: b\r\n\r") == [(b"", b"b")]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_2_no_other_character_ends_a_line(character: str) -> None:
    payload = f'{{"content":"a{character}b"}}'.encode()
    assert data_of(b"data: " + payload + b"\n\n") == [payload]


# ── 3 and 8: a blank line dispatches ────────────────────────────────────────────────────────────────────────────────


def test_3_blank_lines_without_an_event_before_them_dispatch_nothing() -> None:
    assert decode(b"\n\n\n\r\n\r\n\rdata: a\n\n\n\n\n") == [(b"", b"a")]


def test_8_without_data_nothing_is_dispatched_and_the_name_is_forgotten() -> None:
    assert decode(b"event: lost\n\ndata: a\n\n") == [(b"", b"a")]


def test_8_the_specifications_own_examples() -> None:
    assert data_of(b"data: YHOO\ndata: +2\ndata: 10\n\n") == [b"YHOO\n+2\n10"]
    assert decode(b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n") == [
        (b"", b"first event"),
        (b"", b"second event"),
        (b"", b" third event"),
    ]
    assert data_of(b"data\n\ndata\ndata\n\n") == [b"", b"\n"]
    assert data_of(b"data:test\n\ndata: test\n\n") == [b"test", b"test"]


# ── 4, 5, 6, 7: comments and fields ─────────────────────────────────────────────────────────────────────────────────


def test_4_comments_are_read_over_wherever_they_stand() -> None:
    assert decode(b": OPENROUTER PROCESSING\n\n:\n\ndata: a\n: keep-alive\ndata: b\n\n:data: c\n\n") == [(b"", b"a\nb")]


def test_5_one_space_after_the_colon_is_dropped_and_no_more() -> None:
    assert data_of(b"data:a\n\ndata: a\n\ndata:  a\n\ndata:\ta\n\ndata:a:b: c\n\n") == [
        b"a",
        b"a",
        b" a",
        b"\ta",
        b"a:b: c",
    ]


def test_6_a_line_without_a_colon_is_a_field_without_a_value() -> None:
    assert decode(b"data\ndata: a\nevent\n\n") == [(b"", b"\na")]


def test_7_the_last_name_counts_and_names_are_exact() -> None:
    assert decode(b"event: a\nevent: b\ndata: 1\n\n") == [(b"b", b"1")]
    assert decode(b"Data: 1\n data: 2\ndata : 3\n\n") == []


def test_7_id_retry_and_unknown_fields_are_read_over() -> None:
    assert decode(b"id: 7\nretry: 10\nwhatever: x\nid: \x00\nretry: soon\ndata: a\n\n") == [(b"", b"a")]


# ── 9: the end; our departure 2 ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tail", [b"", b"\n", b"\r", b"\r\n"])
def test_9_an_event_that_the_streams_end_leaves_undelimited_is_delivered(tail: bytes) -> None:
    assert decode(b"data: a\n\nevent: x\ndata: b" + tail) == [(b"", b"a"), (b"x", b"b")]


def test_9_an_end_without_data_delivers_nothing() -> None:
    assert decode(b"data: a\n\n: bye\nevent: x\n") == [(b"", b"a")]


# ── the limit, the time, and what is no SSE ─────────────────────────────────────────────────────────────────────────


def test_an_event_of_seven_megabytes_in_small_pieces_arrives_whole() -> None:
    payload = bytes(range(32, 127)) * (7 * 1024 * 1024 // 95)
    stream = b"data: " + payload + b"\n\ndata: next\n\n"
    assert data_of(*(stream[i : i + 16384] for i in range(0, len(stream), 16384))) == [payload, b"next"]


def test_the_time_for_a_large_event_grows_with_its_size_and_not_with_its_square() -> None:
    class Counting(bytearray):
        """Counts how many bytes are searched."""

        searched = 0

        def rfind(self, sub: bytes, start: int = 0, *rest: int) -> int:  # type: ignore[override]
            Counting.searched += len(self) - start
            return super().rfind(sub, start, *rest)

    decoder, piece = SseDecoder(), b"x" * 16384
    decoder.feed(b"data: ")
    decoder._buffer = Counting(decoder._buffer)
    for _ in range(448):
        assert decoder.feed(piece) == []
    assert 448 * 16384 <= Counting.searched <= 448 * (16384 + 2)


@pytest.mark.parametrize("size", [16384, PROVIDER_EVENT_BYTES_MAX + 100])
def test_an_event_over_the_limit_is_refused_with_the_limit_however_it_comes(size: int) -> None:
    stream = b"data: " + b"x" * PROVIDER_EVENT_BYTES_MAX + b"\n\n"
    decoder = SseDecoder()
    with pytest.raises(ProviderProtocol, match="8,388,608"):
        for start in range(0, len(stream), size):
            decoder.feed(stream[start : start + size])


def test_an_event_of_exactly_the_limit_is_taken() -> None:
    payload = b"x" * (PROVIDER_EVENT_BYTES_MAX - len(b"data: "))
    assert data_of(b"data: " + payload + b"\n\n") == [payload]


def test_many_small_events_over_the_limit_together_are_taken() -> None:
    decoder = SseDecoder()
    block = b"data: " + b"x" * 1000 + b"\n\n"
    taken = sum(len(decoder.feed(block * 1000)) for _ in range(9))
    assert taken == 9000 and decoder.end() == []


def test_what_is_no_sse_is_kept_for_the_error_and_bounded() -> None:
    decoder = SseDecoder()
    decoder.feed(b": comment\n\nevent: x\n\nid: 1\nretry: 5\n\n")
    assert decoder.strange == b""
    decoder.feed(b"<html>\n\n<h1>Bad Gateway</h1>\n\n")
    assert decoder.strange == b"<html>\n\n<h1>Bad Gateway</h1>\n\n"
    for _ in range(100):
        decoder.feed(b"<p>" + b"x" * 1000 + b"\n\n")
    assert PROVIDER_WORDS_CHARACTERS_MAX < len(decoder.strange) < 2 * STRANGE_BYTES_MAX


# ── any stream, cut anywhere ────────────────────────────────────────────────────────────────────────────────────────

fields = st.sampled_from(
    [b"data: ", b"data:", b"data", b"event: ", b"event:", b"id: ", b"retry: ", b":", b": ", b"x", b""]
)
values = st.sampled_from(
    [b"", b"a", b" b", "é😀".encode(), "\u2028\u0085".encode(), b'{"a":1}', b"[DONE]", b":", b"\x00", BOM]
)
line_ends = st.sampled_from([b"\n", b"\n\n", b"\r", b"\r\r", b"\r\n", b"\r\n\r\n", b"\n\r", b""])
lines = st.builds(lambda *parts: b"".join(parts), fields, values, line_ends)
streams = st.lists(lines, max_size=20).map(b"".join) | st.binary(max_size=100)


@settings(max_examples=300, deadline=None)
@given(st.booleans(), streams, st.data())
def test_any_stream_cut_anywhere_gives_the_same_events(marked: bool, stream: bytes, data: st.DataObject) -> None:
    stream = BOM * marked + stream
    whole = decode(stream)
    assert decode(*(stream[i : i + 1] for i in range(len(stream)))) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    assert decode(*(stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)]))) == whole


plain = st.sampled_from([b"data: a\n\n", b'data: {"a":1}\n\n', b"data: [DONE]\n\n", b"data: \n\n"])


@settings(max_examples=500, deadline=None)
@given(st.lists(plain | plain | plain | lines, max_size=12), st.data())
def test_several_events_at_once_are_the_same_events_or_left_alone(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    decoder, events = SseDecoder(), []
    for first, last in itertools.pairwise([0, *cuts, len(stream)]):
        piece = stream[first:last]
        at_once = decoder.lines(piece)
        if at_once is not None and not any(b"\n" in line for line in at_once):  # else its decoder finds out
            decoder.pass_over(piece)
            events += [(b"", line) for line in at_once]
        else:
            events += decoder.feed(piece)
    assert events + decoder.end() == decode(stream)


def test_plain_events_are_there_at_once_wherever_they_are_cut() -> None:
    several = b'data: {"number": 12345}\n\n' * 200
    for cut in range(len(several) - 100, len(several)):
        decoder = SseDecoder()
        lines = decoder.lines(several[:cut])
        assert lines
        decoder.pass_over(several[:cut])
        assert lines + (decoder.lines(several[cut:] + several) or []) == [b'{"number": 12345}'] * 400
    decoder.pass_over(several)
    assert decoder.feed(BOM + b"data: 1\n\n") == []  # it would be dropped before the first event only
    assert decoder.lines(several.replace(b"\n", b"\r\n")) is None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([b"", b"delta", b"x y"]), st.binary(max_size=20)), max_size=8))
def test_what_is_encoded_is_decoded(events: Events) -> None:
    events = [(name, data.replace(b"\r", b"\n")) for name, data in events]
    stream = b"".join(
        b"event: %b\n" % name + b"".join(b"data: %b\n" % line for line in data.split(b"\n")) + b"\n"
        for name, data in events
    )
    assert decode(stream) == events
