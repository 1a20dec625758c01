"""What a delta of the benchmark says: its number and when it was sent, in 10 characters of plain ASCII.

    00k3  1f9zq  ' '
    │     └ send time: base 36, units of 10 µs of the monotonic clock, modulo 36^5 (604 s)
    └ number of the delta within its answer: base 36, from 0

Provider and client run on one machine and so share the monotonic clock: the client subtracts, and knows what the
server between them added. Numbers run on, so that a lost, doubled or misplaced character shows at once, however a
server cuts or joins the deltas; and no answer repeats itself, so that a guard against loops stays silent. About two
tokens' worth of text, which is what providers send.
"""

import itertools
import time

RECORD_CHARACTERS = 10
SEQUENCE_CHARACTERS = 4
STAMP_UNIT_SECONDS = 1e-5
STAMP_MODULUS = 36**5
DELTAS_MAX = 100_000

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
PAIRS = ["".join(pair).encode() for pair in itertools.product(DIGITS, repeat=2)]
TRIPLES = ["".join(triple).encode() for triple in itertools.product(DIGITS, repeat=3)]
SEQUENCES = [digit.encode() + triple for digit in DIGITS[:3] for triple in TRIPLES][:DELTAS_MAX]


def stamp_now() -> int:
    """The monotonic clock in stamp units."""
    return time.monotonic_ns() // 10_000 % STAMP_MODULUS


def encode_record(sequence: int, stamp: int) -> bytes:
    """The text of one delta."""
    high, low = divmod(stamp, 46_656)
    return SEQUENCES[sequence] + PAIRS[high] + TRIPLES[low] + b" "


def flat_record(sequence: int) -> bytes:
    """The text of one delta of a flat-out answer: nothing to time, so the stamp is made from the number."""
    return encode_record(sequence, sequence * 7_919_777 % STAMP_MODULUS)


def added_seconds(stamp: bytes, now: int) -> float:
    """How long ago `stamp` was written; `now` in stamp units."""
    return (now - int(stamp, 36)) % STAMP_MODULUS * STAMP_UNIT_SECONDS
