from __future__ import annotations

import functools
import html
import importlib
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_core import StateCore
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

# ----------------------------------------------------------------------------------------------------------------------
# 7. Markdown
#
# An answer becomes HTML here, not in the page: one implementation, no script from elsewhere, and safe by construction:
# no HTML passes through, links go to three schemes, nothing is loaded, no element carries a style.
#
# While an answer grows, a MarkdownStream parses only its tail. A block that begins after a blank line, and whose first
# line is complete, neither continues what stands before it nor changes it. So everything before the last such block is
# settled: sent once, then left alone (a reader may be selecting in it). Two things need care. A reference definition,
# `[label]: url`, reaches back: each block remembers the labels it asked for and is rendered again when one of them
# changes. And a code block is highlighted once, when it closes: on every frame would cost the square of its length.
#
# Deliberately absent: raw HTML and footnotes, which reach across blank lines. A new rule must not do so either, nor put
# content into HTML unescaped; the tests hold every prefix of every document against render_growing(). The libraries are
# imported at first use, so that a service that has nothing to render stays small.
# ----------------------------------------------------------------------------------------------------------------------

NESTING_MAX = 100  # levels of quotes and lists (a list takes two); Python's stack ends at 1,000 frames
BRACKETS_MAX = 16  # open at once in one paragraph, item or cell
OPENER_COST_MAX = 4_000_000  # characters × openers of one paragraph, item or cell: `<http://<http://…` costs that
HIGHLIGHT_CHARACTERS_MAX = 100_000  # of a code block; a longer one is not highlighted
HIGHLIGHT_SECONDS_MAX = 0.5  # of a code block; many lexers can be made to take the square of the length
LATEX_CHARACTERS_MAX = 1_000  # of a formula: the converter recurses natively, up to 2 KB of stack per character
LATEX_LINES_MAX = 50  # of a formula that stands by itself; bounds the search for its end
OPEN_BLOCK_SECONDS_MAX = 0.2  # an open block that takes longer to render is shown as plain text
assert NESTING_MAX * 4 < 1_000 and LATEX_CHARACTERS_MAX * 2 < 8_192

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


class _TooSlow(Exception):
    """Highlighting takes too long."""


def _until(deadline: float, clock: Callable[[], float], tokens: Iterable[Any]) -> Iterator[Any]:
    for token in tokens:
        if clock() > deadline:
            raise _TooSlow
        yield token


def _highlight(code: str, language: str, clock: Callable[[], float]) -> str:
    """Code as spans with Pygments' classes; as text if its language is unknown, or it is too long or too slow."""
    is_lit = language and len(code) <= HIGHLIGHT_CHARACTERS_MAX and not _SLOW_CODE.search(code)
    lexer = _lexer(language) if is_lit else None
    if lexer is None:
        return html.escape(code)
    from pygments import format as format_tokens  # type: ignore[import-untyped]
    from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]

    tokens = _until(clock() + HIGHLIGHT_SECONDS_MAX, clock, lexer.get_tokens(code))
    try:
        return str(format_tokens(tokens, HtmlFormatter(nowrap=True)))
    except _TooSlow:
        return html.escape(code)


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
    token.content = match.group(str(match.lastgroup))
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


def _alternative(image: Token) -> Iterator[Token]:
    """The content of an image's alternative text, without the links and images in it."""
    for token in image.children or ():
        if token.type == "image":
            yield from _alternative(token)
        elif token.type not in ("link_open", "link_close"):
            yield token


def _image_as_link(image: Token) -> list[Token]:
    from markdown_it.token import Token

    url = str(image.attrs["src"])
    content = list(_alternative(image)) or [Token("text", "", 0, content=url)]
    return [Token("link_open", "a", 1, attrs={"class": "image", "href": url}), *content, Token("link_close", "a", -1)]


def _finish_inline(tokens: list[Token]) -> Iterator[Token]:
    """Inline tokens whose links open elsewhere, none inside another, and no images: to load one tells who reads."""
    is_shown: list[bool] = []  # of each link that is open
    for token in itertools.chain.from_iterable(_image_as_link(t) if t.type == "image" else [t] for t in tokens):
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


class _References(dict[str, Any]):
    """Reference definitions by label, which remember the labels that were asked for."""

    asked: set[str]

    def get(self, label: Any, default: Any = None, /) -> Any:
        self.asked.add(label)
        return super().get(label, default)


def _is_too_costly(text: str) -> bool:
    """Whether inline parsing could take the square of the length: what opens something is sought an end for."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket == "[" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest > BRACKETS_MAX or len(_OPENER.findall(text)) * len(text) > OPENER_COST_MAX


def _parse_inlines(state: StateCore) -> None:
    """Parse the text of each block, unless that is too costly, and note the labels that it asks for."""
    from markdown_it.token import Token

    references: _References = state.env["references"]
    for token in state.tokens:
        if token.type != "inline":
            continue
        references.asked = token.meta["labels"] = set()
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

    options = {"html": False, "linkify": True, "tasklists": True, "maxNesting": NESTING_MAX, "xhtmlOut": False}
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
    return {"references": _References(definitions), "highlighted": {}, "no_table_before_line": 0, "clock": clock}


def _html(tokens: Sequence[Token], environment: dict[str, Any]) -> str:
    parser = _parser()
    return str(parser.renderer.render(tokens, parser.options, environment))


def render(text: str, clock: Callable[[], float] = time.perf_counter) -> str:
    """The HTML of a finished answer. Every text has one; what is too costly to parse is shown as text."""
    environment = _environment({}, clock)
    return _html(_parser().parse(text, environment), environment)


def render_growing(text: str, clock: Callable[[], float] = time.perf_counter) -> str:
    """The HTML of an answer that still grows: render(), but with a last fence that has no end yet not highlighted."""
    text = _RETURN.sub("\n", text)
    environment = _environment({}, clock) | {"growing_line": _line_count(text)}
    return _html(_parser().parse(text, environment), environment)


def _render_plain(text: str) -> str:
    return f'<pre class="plain">{html.escape(text)}</pre>\n' if text else ""


@dataclass(frozen=True, slots=True)
class Frame:
    """What changed since the last frame.

    `settled` pairs block numbers with HTML: a number that is new is appended, in order, and one that is known is
    replaced. `open` is the HTML after the settled blocks, in place of the last. `seconds` is what the frame took.
    """

    settled: tuple[tuple[int, str], ...]
    open: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Block:
    """A settled block: its source, which can be parsed alone, and the reference labels that it asks for."""

    source: str
    labels: frozenset[str]
    html: str


def _block(source: str, tokens: Sequence[Token], environment: dict[str, Any]) -> _Block:
    labels = frozenset[str]().union(*(token.meta["labels"] for token in tokens if token.type == "inline"))
    return _Block(source, labels, _html(tokens, environment))


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
    """render_growing(), incrementally: at each frame the settled blocks and the open one, joined, are equal to it.

    A frame costs what its open block costs. A caller that pauses for ten times `Frame.seconds` bounds the share of a
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

    def frame(self) -> Frame:
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
            self._open = _render_plain(self._tail)
        return Frame(tuple(settled), self._open, self._clock() - started)

    def finish(self) -> Frame:
        """What changed, with nothing left open: the blocks, joined, are then equal to render(). No frame follows."""
        started = self._clock()
        environment = self._environment()
        tokens = _parser().parse(self._tail, environment)
        cuts = [*_cuts(self._tail, tokens), (len(tokens), len(self._tail))]
        settled = self._settle(tokens, cuts, environment)
        self._open = ""
        return Frame(tuple(settled), self._open, self._clock() - started)

    def snapshot(self) -> Frame:
        """Everything up to the last frame, for a reader who comes later."""
        return Frame(tuple(enumerate(block.html for block in self._blocks)), self._open, 0.0)

    def _environment(self) -> dict[str, Any]:
        return _environment(self._definitions, self._clock) | {"highlighted": self._highlighted}

    def _settle(
        self, tokens: list[Token], cuts: list[tuple[int, int]], environment: dict[str, Any]
    ) -> list[tuple[int, str]]:
        """Settle what lies between the cuts and keep the rest as the tail; returns the new and the changed blocks."""
        references: _References = environment["references"]
        changed = self._render_again(references)
        for (first, start), (last, end) in itertools.pairwise(cuts):
            block = _block(self._tail[start:end], tokens[first:last], environment)
            changed.append((len(self._blocks), block.html))
            self._blocks.append(block)
        cut = cuts[-1][1]
        if cut:
            cut_line = self._tail.count("\n", 0, cut)
            self._definitions |= {label: made for label, made in references.items() if made["map"][0] < cut_line}
            self._tail = self._tail[cut:]
            self._highlighted.clear()
        return changed

    def _render_again(self, references: _References) -> list[tuple[int, str]]:
        """The settled blocks that look different because a label they ask for has a new meaning."""
        targets = {label: (made["href"], made["title"]) for label, made in references.items()}
        labels = {label for label, _ in targets.items() ^ self._targets.items()}
        self._targets = targets
        changed = []
        for number, old in enumerate(self._blocks if labels else ()):
            if not labels.isdisjoint(old.labels):
                environment = _environment(references, self._clock)
                block = _block(old.source, _parser().parse(old.source, environment), environment)
                self._blocks[number] = block
                if block.html != old.html:
                    changed.append((number, block.html))
        return changed
