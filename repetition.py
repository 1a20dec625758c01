# ---- 6. Repetition ----------------------------------------------------------------------------------------------
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

REPETITION_PERIOD_CHARACTERS_MAX = 1_000  # a long paragraph; one period and this many more are the least evidence
REPETITION_STEP_CHARACTERS = 100  # from look to look: shares out a look's cost; a verdict lags less than two steps
REPETITION_WINDOW_CHARACTERS = 4_000  # what is kept and searched
REPETITION_BEFORE = "".join(map(chr, range(0xE000, 0xE000 + REPETITION_WINDOW_CHARACTERS)))  # private use, each once
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
        self._delta = ""
        self._delta_count = 0
        self._pending = ""  # not looked at yet: less than a step
        self._newest_first = REPETITION_BEFORE  # the text backwards; never shorter, so that `find` stays linear
        self._period_characters = 0  # of the run that the text ends with; 0 for none
        self._run_characters = 0

    def feed(self, text: str) -> str | None:
        """Takes a delta; returns the period once the text goes round in circles, else None."""
        if not text or not self._count or not self._characters:
            return None
        return self._repeated_delta(text) or self._repeated_period(text)

    def _repeated_delta(self, delta: str) -> str | None:
        self._delta_count = self._delta_count + 1 if delta == self._delta else 1
        self._delta = delta
        if self._delta_count != (2 * REPETITION_DELTAS if "\n" in delta else REPETITION_DELTAS):
            return None
        letters = sum(map(str.isalpha, set(delta)))
        return delta if letters >= REPETITION_DELTA_LETTERS_MIN else None

    def _repeated_period(self, text: str) -> str | None:
        self._pending += text
        if len(self._pending) < REPETITION_STEP_CHARACTERS:
            return None
        pending, step = self._pending, REPETITION_STEP_CHARACTERS
        end = len(pending) - len(pending) % step
        self._pending = pending[end:]
        looks = (self._look(pending[start : start + step]) for start in range(0, end, step))
        return next(filter(None, looks), None)

    def _look(self, step: str) -> str | None:
        newest_first = (step[::-1] + self._newest_first)[:REPETITION_WINDOW_CHARACTERS]
        self._newest_first = newest_first
        period_characters = newest_first.find(newest_first[:REPETITION_PERIOD_CHARACTERS_MAX], 1)
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
