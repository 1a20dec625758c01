"""Markdown: what an answer looks like, that a growing one looks the same, and that none is dangerous or too costly."""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import llmchat as markdown
from llmchat import MarkdownStream, render


class Page:
    """What a browser holds: block elements by number, and one open element after them."""

    def __init__(self) -> None:
        self.blocks: dict[int, str] = {}
        self.open = ""

    def show(self, frame: markdown.HtmlFrame) -> None:
        for number, block in frame.settled:
            assert number <= len(self.blocks), "blocks are numbered without a gap"
            self.blocks[number] = block
        self.open = frame.open

    @property
    def html(self) -> str:
        return "".join(self.blocks.values()) + self.open


class Clock:
    """A clock that advances by `step_seconds` whenever it is read."""

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.now = 0.0
        self.step_seconds = step_seconds

    def __call__(self) -> float:
        self.now += self.step_seconds
        return self.now


def render_growing(text: str) -> str:
    """What a growing answer looks like: render(), but with a last fence that has no end yet not highlighted."""
    text = re.sub(r"\r\n?", "\n", text)
    environment = markdown._environment({}, Clock()) | {"growing_line": markdown._line_count(text)}
    return markdown._html(markdown._parser().parse(text, environment), environment)


def stream_of(text: str) -> MarkdownStream:
    stream = MarkdownStream(Clock())
    stream.feed(text)
    return stream


def assert_equal_at_every_prefix(text: str, piece_characters: int = 1) -> None:
    stream, page = MarkdownStream(Clock()), Page()
    for start in range(0, len(text), piece_characters):
        stream.feed(text[start : start + piece_characters])
        page.show(stream.frame())
        prefix = text[: start + piece_characters]
        assert page.html == render_growing(prefix), prefix
    page.show(stream.finish())
    assert page.html == render(text)


# What Markdown becomes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a *b* **c** ~~d~~ `e`", "<p>a <em>b</em> <strong>c</strong> <s>d</s> <code>e</code></p>\n"),
        ("about ~5 or ~6", "<p>about ~5 or ~6</p>\n"),
        ("a  \nb\nc", "<p>a<br>\nb\nc</p>\n"),
        ("<b>x</b> &amp; <", "<p>&lt;b&gt;x&lt;/b&gt; &amp; &lt;</p>\n"),
        ("see main.py, example.com, me@example.com", "<p>see main.py, example.com, me@example.com</p>\n"),
        ("3. a\n4. b", '<ol start="3">\n<li>a</li>\n<li>b</li>\n</ol>\n'),
        ("![x](data:image/png;base64,AAAA)", "<p>![x](data:image/png;base64,AAAA)</p>\n"),
        ("[a]() ![b]()", "<p>a b</p>\n"),
        ("[x](/etc/passwd) [y](#z) [z](//a.example)", "<p>[x](/etc/passwd) [y](#z) [z](//a.example)</p>\n"),
        ("a[^1]\n\n[^1]: no footnote", "<p>a[^1]</p>\n<p>[^1]: no footnote</p>\n"),
        ("", ""),
        ("\n\n", ""),
    ],
)
def test_markdown_becomes_html(text: str, expected: str) -> None:
    assert render(text) == expected


LINK = 'rel="noopener noreferrer nofollow" target="_blank"'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](https://x.example/?b&c 'd')", f'<a href="https://x.example/?b&amp;c" title="d" {LINK}>a</a>'),
        ("https://x.example/main.py.", f'<a href="https://x.example/main.py" {LINK}>https://x.example/main.py</a>.'),
        ("<mailto:a@b.example>", f'<a href="mailto:a@b.example" {LINK}>mailto:a@b.example</a>'),
        ("<a@b.example>", f'<a href="mailto:a@b.example" {LINK}>a@b.example</a>'),
        ("[a]\n\n[a]: https://x.example", f'<a href="https://x.example" {LINK}>a</a>'),
        (
            "![a *b*](https://x.example/i.png)",
            f'<a class="image" href="https://x.example/i.png" {LINK}>a <em>b</em></a>',
        ),
        ("![](https://x.example/i)", f'<a class="image" href="https://x.example/i" {LINK}>https://x.example/i</a>'),
        ("[![a](https://i.example/b)](https://x.example)", f'<a href="https://x.example" {LINK}>a</a>'),
        ("[a <https://y.example>](https://x.example)", f'<a href="https://x.example" {LINK}>a https://y.example</a>'),
        (
            "![![a](https://i.example) [b](https://j.example)](https://x.example)",
            f'<a class="image" href="https://x.example" {LINK}>a b</a>',
        ),
    ],
)
def test_links_open_elsewhere_and_images_are_links(text: str, expected: str) -> None:
    assert render(text) == f"<p>{expected}</p>\n"


def test_a_table_scrolls_by_itself_and_aligns_by_class() -> None:
    table = render("|a|b|c|d|\n|-|:-|:-:|-:|\n|1|2|3|4|\n")
    assert table.startswith('<div class="table"><table>') and table.endswith("</table>\n</div>\n")
    assert re.findall(r"<t[hd].*?>", table) == [
        "<thead>",
        *("<th>", '<th class="align-left">', '<th class="align-center">', '<th class="align-right">'),
        *("<td>", '<td class="align-left">', '<td class="align-center">', '<td class="align-right">'),
    ]


def test_task_lists_have_disabled_checkboxes_and_lose_no_text() -> None:
    tasks = render("- [ ] a\n- [x] b\n- [ ]\n  c\n- [ ](d)\n")
    assert re.findall(r"<input[^>]*>", tasks) == [
        '<input class="task-list-item-checkbox" disabled="" type="checkbox">',
        '<input class="task-list-item-checkbox" disabled="" type="checkbox" checked="">',
    ]
    assert "<li>[ ]\nc</li>" in tasks and "<li>[ ](d)</li>" in tasks


def test_a_code_block_has_its_language_a_copy_button_and_classes() -> None:
    assert render("```python title\ndef f(): ...\n```\n") == (
        '<figure class="code" data-language="python"><figcaption>python</figcaption>'
        '<button type="button" class="copy">Copy</button><pre><code><span class="k">def</span><span class="w"> </span>'
        '<span class="nf">f</span><span class="p">():</span> <span class="o">...</span>\n</code></pre></figure>\n'
    )


@pytest.mark.parametrize("text", ["```nolanguage\n<b>\n```", "```\n<b>\n```", "    <b>\n", "~~~'\"><i>\n<b>\n~~~"])
def test_code_in_an_unknown_language_is_text(text: str) -> None:
    assert "<pre><code>&lt;b&gt;\n</code></pre></figure>\n" in render(text)


def test_a_code_block_above_the_limit_is_not_highlighted() -> None:
    line = "def f(): pass\n"
    count = markdown.HIGHLIGHT_CHARACTERS_MAX // len(line)
    assert "<span" in render("```python\n" + line * count + "```\n", Clock())
    assert "<span" not in render("```python\n" + line * (count + 1) + "```\n", Clock())


def test_code_that_is_slow_to_highlight_is_text() -> None:
    code = "```python\ndef f(): pass\n```"
    assert "<span" in render(code, Clock(step_seconds=0.01))
    assert "<span" not in render(code, Clock(step_seconds=markdown.HIGHLIGHT_SECONDS_MAX))
    assert "<span" not in render("```python\nx = '" + "a" * 1_000 + "'\n```")
    assert "<span" not in render("```python\nx = 1\n" + " \n" * 200 + "\n```")


@pytest.mark.parametrize("language", ["python", "js", "html", "console", "c++", "json", "diff", "text", "yaml", "SQL"])
@pytest.mark.parametrize("code", ["\n\n a = '<&>' # \t\n\n\n", "a\u2028b\x0cc\n", "x", "'unclosed\n$ ls\n>>> 1\n{\n"])
def test_what_is_copied_from_a_code_block_is_the_code(language: str, code: str) -> None:
    for block in (render(f"````{language}\n{code}\n````\n"), render(f"````{language}\n{code}")):
        inner = block[block.index("<code>") + len("<code>") : block.index("</code>")]
        assert html.unescape(re.sub(r"</?span[^>]*>", "", inner)).rstrip("\n") == code.rstrip("\n")


# Formulas


@pytest.fixture
def without_math(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "math_core", None)
    markdown._mathml_converter.cache_clear()
    markdown._parser.cache_clear()
    yield
    markdown._mathml_converter.cache_clear()
    markdown._parser.cache_clear()


X = "<math><mi>x</mi></math>"
BIG_X = '<math display="block"><mi>x</mi></math>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"$x$ is \(x\), 5", f"<p>{X} is {X}, 5</p>\n"),
        ("a $$x$$ b", f"<p>a {BIG_X} b</p>\n"),
        ("so:\n$$\nx\n$$\nand", f'<p>so:</p>\n<p class="math">{BIG_X}</p>\n<p>and</p>\n'),
        ("\\[\nx\n\\]", f'<p class="math">{BIG_X}</p>\n'),
        ("> $$\n> x\n> $$", f'<blockquote>\n<p class="math">{BIG_X}</p>\n</blockquote>\n'),
        ("from $5 to $10, US$1/US$2", "<p>from $5 to $10, US$1/US$2</p>\n"),
        ("`$x$` \\$x$", "<p><code>$x$</code> $x$</p>\n"),
        ("$x", "<p>$x</p>\n"),
        ("$$\nx\n\ny\n$$", "<p>$$\nx</p>\n<p>y\n$$</p>\n"),
        (r"$\nosuchcommand<$", '<p><code class="math">$\\nosuchcommand&lt;$</code></p>\n'),
        ("$" + "x" * 1001 + "$", "<p>$" + "x" * 1001 + "$</p>\n"),
    ],
)
def test_formulas_become_mathml(text: str, expected: str) -> None:
    assert render(text) == expected


def test_a_formula_over_several_lines_is_not_a_list() -> None:
    assert "<mo>+</mo><mi>b</mi>" in render("$$\na\n+ b\n$$")


def test_aligned_formulas_align_by_class() -> None:
    formula = render(r"$$\begin{align}a&=b\\c&=d\end{align}$$")
    assert 'class="align-right"' in formula and " style=" not in formula


def test_without_the_package_formulas_stay_text(without_math: None) -> None:
    assert render("$x$ $$x$$\n\n$$\nx\n$$") == "<p>$x$ $$x$$</p>\n<p>$$\nx\n$$</p>\n"


# A growing answer is equal to render_growing at every prefix

DOCUMENTS = (Path(__file__).parent / "data" / "markdown.txt").read_text("utf-8").split("\n%%%\n")


@pytest.mark.parametrize("text", DOCUMENTS)
def test_a_growing_document_is_equal_at_every_prefix(text: str) -> None:
    assert_equal_at_every_prefix(text)
    assert_equal_at_every_prefix(text.replace("\n", "\r\n"))


def test_all_documents_after_one_another_are_equal_at_every_prefix() -> None:
    assert_equal_at_every_prefix("\n\n".join(DOCUMENTS), piece_characters=97)


@pytest.mark.skipif(
    not os.environ.get("COMMONMARK_JSON"), reason="COMMONMARK_JSON names no file of the spec's examples"
)
def test_every_example_of_the_specification_is_equal_at_every_prefix() -> None:
    examples = json.loads(Path(os.environ["COMMONMARK_JSON"]).read_text("utf-8"))
    for case in examples:
        assert_equal_at_every_prefix(case["markdown"])
        assert_equal_at_every_prefix(case["markdown"].replace("/url", "https://x.example/"))


FRAGMENTS = [
    *(
        "a",
        "b c",
        "word ",
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\n",
        "\n\n",
        "\n\n",
        "\r\n",
        "\r",
        "\r\n\r\n",
        "\\",
        "é",
        "👩‍💻",
    ),
    *("\u2028", "\x0b", "\x0c", "\x85", "\xa0", "\0", "\u202e", "1", "2.", "1. ", "1) ", "10. ", "- ", "* ", "+ ", "-"),
    *("--", "---\n", "===\n", "***\n", "# ", "###### ", "#", "> ", ">", ">> ", "    code\n", "`", "``", "```", "````"),
    *("```python\n", "~~~", "~~~ js\n", "```\n", "   ```\n", "def f():\n", "*", "**", "_", "__", "~~", "|", "|a|b|\n"),
    *(
        "|-|-|\n",
        "|:-:|-:|\n",
        "a | b\n",
        "[a]",
        "[b][a]",
        "[a][]",
        "![a]",
        "[",
        "]",
        "(",
        ")",
        "[a](https://x.example)",
    ),
    *(
        "[a]: https://a.example\n",
        "[a]: https://a.example 'title'\n",
        "[b]: <https://b.example>\n\n",
        "[a]:",
        "[A]: x\n",
    ),
    *("[a]: https://c.example\n", "https://x.example/y", "<https://x.example>", "<", ">", "<b>", "</b>", "<!--", "-->"),
    *(
        "<div>\n",
        "&amp;",
        "&#0;",
        "&",
        "!",
        ":",
        "- [ ] ",
        "- [x] ",
        "$",
        "$$",
        "$$\n",
        "$x$",
        "\\(",
        "\\)",
        "\\[\n",
        "\\]\n",
    ),
]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join))
@example("[a]\n\nb\n\n[a]: https://a.example\n\nc\n")
@example("- a\n\n  ```\n  b\n\nc\n\n[a]: x")
@example("\r```python\na")
@example("a\r\r\nb\r\n\r\nc")
def test_any_text_is_equal_at_every_prefix(text: str) -> None:
    assert_equal_at_every_prefix(text)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), max_size=12))
def test_blocks_and_their_numbers_do_not_depend_on_when_frames_are_taken(pieces: list[str]) -> None:
    growing, page = MarkdownStream(Clock()), Page()
    for piece in pieces:
        growing.feed(piece)
        page.show(growing.frame())
    at_once = stream_of("".join(pieces))
    at_once.frame()
    assert page.blocks == dict(at_once.snapshot().settled) == dict(growing.snapshot().settled)
    growing.finish(), at_once.finish()
    never_framed = stream_of("".join(pieces))
    assert never_framed.finish().settled == at_once.snapshot().settled == growing.snapshot().settled


# What is sent


def test_a_settled_block_is_sent_once() -> None:
    stream, sent = MarkdownStream(Clock()), []
    for character in "# a\n\nb *c*\n\n```python\nd\n```\n\n- e\n\nf\n":
        stream.feed(character)
        sent += stream.frame().settled
    sent += stream.finish().settled
    assert [number for number, _ in sent] == [0, 1, 2, 3, 4]


def test_a_frame_without_news_has_no_settled_blocks() -> None:
    stream = stream_of("a\n\nb\n")
    assert [number for number, _ in stream.frame().settled] == [0]
    assert stream.frame() == markdown.HtmlFrame((), "<p>b</p>\n", 0.0)


def test_only_blocks_that_name_a_late_definition_are_sent_again() -> None:
    stream = stream_of("plain\n\n[a] here\n\n`[a]` code\n\n![b] [A]\n\n")
    stream.feed("end\n")
    assert [number for number, _ in stream.frame().settled] == [0, 1, 2, 3]
    stream.feed("\n[a]: https://a.example")
    first = stream.frame().settled
    assert [number for number, _ in first] == [1, 3]
    assert 'href="https://a.example"' in first[0][1]
    stream.feed("/more\n")
    again = stream.frame().settled
    assert [number for number, _ in again] == [1, 3] and 'href="https://a.example/more"' in again[0][1]
    stream.feed("\nnext\n\nlast\n")
    assert [number for number, _ in stream.frame().settled] == [4, 5]


def test_the_first_definition_of_a_label_wins_over_a_later_one() -> None:
    stream = stream_of("[a]: https://one.example\n\n[a]\n\nb\n\n")
    stream.frame()
    stream.feed("[a]: https://two.example\n\n[a]\n\nend\n")
    assert "https://one.example" in stream.frame().settled[-1][1]


def test_a_growing_code_block_is_plain_and_highlighted_once_when_it_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    highlighted: list[str] = []
    highlight = markdown._highlight
    monkeypatch.setattr(markdown, "_highlight", lambda *arguments: highlighted.append("") or highlight(*arguments))
    stream = stream_of("```python\ndef f(): ...\n``")
    frame = stream.frame()
    assert 'data-language="python"' in frame.open and "<span" not in frame.open and not highlighted
    stream.feed("`")
    assert "<span" in stream.frame().open and len(highlighted) == 1
    for character in "\n\nA long line that has no end yet":
        stream.feed(character)
        assert "<span" in stream.frame().open
    assert len(highlighted) == 1


def test_a_code_block_that_is_cut_off_is_highlighted_at_the_end() -> None:
    stream = stream_of("```python\ndef f(): ...\n")
    assert "<span" not in stream.frame().open
    assert "<span" in dict(stream.finish().settled)[0]


def test_a_reader_who_comes_later_gets_everything_so_far() -> None:
    stream = stream_of("a [x]\n\nb\n\n[x]: https://x.example\n\nc *d")
    page, late = Page(), Page()
    page.show(stream.frame())
    late.show(stream.snapshot())
    assert late.html == page.html == render_growing("a [x]\n\nb\n\n[x]: https://x.example\n\nc *d")


@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n"])
def test_a_line_ending_may_come_in_two_pieces(ending: str) -> None:
    stream = MarkdownStream(Clock())
    for piece in ["a", *ending, "", *ending, "b"]:
        stream.feed(piece)
        stream.frame()
    assert (
        render(f"a{ending}{ending}b")
        == "".join(block for _, block in stream.finish().settled)
        == "<p>a</p>\n<p>b</p>\n"
    )


def test_an_open_block_that_is_too_slow_is_plain_text_until_it_has_doubled_or_settled() -> None:
    clock = Clock(step_seconds=markdown.OPEN_BLOCK_SECONDS_MAX * 1.01)
    stream = MarkdownStream(clock)
    stream.feed("- *a*\n")
    assert stream.frame().open == '<pre class="plain">- *a*\n</pre>\n'
    clock.step_seconds = 0.0
    stream.feed("- b\n")
    assert stream.frame().open == '<pre class="plain">- *a*\n- b\n</pre>\n'
    stream.feed("- c\n")
    assert stream.frame().open == render("- *a*\n- b\n- c\n")
    clock.step_seconds = markdown.OPEN_BLOCK_SECONDS_MAX * 1.01
    stream.feed("\nd\n")
    frame = stream.frame()
    assert frame.settled == ((0, render("- *a*\n- b\n- c\n")),) and frame.open == "<p>d</p>\n"


def test_a_frame_tells_what_it_took() -> None:
    stream = MarkdownStream(Clock(step_seconds=0.01))
    stream.feed("a")
    assert stream.frame().seconds == pytest.approx(0.02)


def test_importing_the_module_loads_no_library() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(markdown.__file__).parent)!r})\n"
        f"import {markdown.__name__} as module\n"
        "libraries = {'markdown_it', 'pygments', 'linkify_it', 'math_core'}\n"
        "assert not libraries & set(sys.modules); module.render('a'); assert 'markdown_it' in sys.modules\n"
        "assert 'pygments' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Answers that mean harm

PLAIN_ELEMENTS = "em strong s h1 h2 h3 h4 h5 h6 hr br blockquote table thead tbody tr figcaption"
CLASS_ELEMENTS = "p th td div ul li pre span code"
ELEMENTS = {
    **{element: set[str]() for element in PLAIN_ELEMENTS.split()},
    **{element: {"class"} for element in CLASS_ELEMENTS.split()},
    "ol": {"start", "class"},
    "a": {"href", "title", "rel", "target", "class"},
    "input": {"class", "type", "disabled", "checked"},
    "figure": {"class", "data-language"},
    "button": {"class", "type"},
}
MATHML = re.compile(
    "math|m(i|n|o|s|text|space|row|frac|sqrt|root|style|error|padded|phantom|enclose|table|tr|td)|m(sub|sup"
    "|subsup|under|over|underover|multiscripts|prescripts)"
)
MATHML_ATTRIBUTE = re.compile(
    "class|display(style)?|scriptlevel|mathvariant|stretchy|symmetric|fence|form|accent(under)?"
    "|largeop|movablelimits|separator|[lr]space|(min|max)size|linethickness|columnspan|width|height"
    "|depth|voffset|notation"
)
EMPTY = {"br", "hr", "input"}


class Inspector(HTMLParser):
    """Reads HTML as a page would, and fails at whatever the service must never send."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        is_math = MATHML.fullmatch(tag)
        assert is_math or tag in ELEMENTS, tag
        assert len({name for name, _ in attributes}) == len(attributes)
        for name, value in attributes:
            assert MATHML_ATTRIBUTE.fullmatch(name) if is_math else name in ELEMENTS[tag], (tag, name)
            if name == "href":
                assert re.match(r"https?://[^/]|mailto:[^/]", value or "", re.IGNORECASE), value
                assert not re.search(r"[\x00-\x20\\]", value or ""), value
        assert tag != "a" or "a" not in self.opened
        if tag == "a":
            assert dict(attributes)["rel"] == "noopener noreferrer nofollow" and dict(attributes)["target"] == "_blank"
        if tag == "input":
            assert {"type": "checkbox", "disabled": ""}.items() <= dict(attributes).items()
        if tag not in EMPTY:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert MATHML.fullmatch(tag)
        self.handle_starttag(tag, attributes)
        self.opened.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def assert_harmless(page: str) -> None:
    inspector = Inspector()
    inspector.feed(page)
    inspector.close()
    assert not inspector.opened
    assert "\0" not in page


URLS = [
    *(
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        " javascript:alert(1)",
        "javascript&colon;alert(1)",
        "\x01javascript:alert(1)",
    ),
    *(
        "java\tscript:alert(1)",
        "java\nscript:alert(1)",
        "javascript&#58;alert(1)",
        "&#106;avascript:alert(1)",
        "jav&#x0A;ascript:alert(1)",
    ),
    *(
        "&#x6A&#x61&#x76&#x61&#x73&#x63&#x72&#x69&#x70&#x74:alert(1)",
        "javascript:alert&lpar;1&rpar;",
        "%6aavascript:alert(1)",
    ),
    *(
        "vbscript:msgbox(1)",
        "data:text/html,<script>alert(1)</script>",
        "data:image/png;base64,AAAA",
        "DATA:image/svg+xml,<svg/onload=alert(1)>",
    ),
    *(
        "file:///etc/passwd",
        "ftp://x.example",
        "blob:https://x.example/1",
        "about:blank",
        "view-source:https://x.example",
        "ws://x",
    ),
    *(
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/api/conversations",
        "#top",
        "?a=b",
        "",
        "x",
        "https:evil",
        "https:/evil",
    ),
    *(
        "https:///evil.example",
        "http://",
        "mailto:",
        "mailto://x",
        'https://x.example/"onmouseover="alert(1)',
        "https://x.example/'><svg>",
    ),
    *(
        "https://x.example/`onclick=`",
        "https://[::1]:80/",
        "https://[",
        "https://x.example:99999999/",
        "https://\u202egro.elgoog/",
    ),
    *(
        "https://xn--80ak6aa92e.com/",
        "https://x.example/\0",
        "https://x.example/\ud800",
        "http://user:pass@x.example",
        "HTTPS://X.EXAMPLE",
    ),
    *(
        "feed:javascript:alert(1)",
        "x-javascript:alert(1)",
        "intent://x#Intent;end",
        "tel:1",
        "sms:1",
        "javascript://x.example/%0aalert(1)",
    ),
]
URL_FORMS = [
    "[a]({})",
    "[a](<{}>)",
    "<{}>",
    "![a]({})",
    "[a]: {}\n\n[a] ![a]",
    "{}",
    "[a]({} 'b\" onclick=\"c')",
    "[![a]({0})]({0})",
]

HOSTILE = [
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<svg onload=alert(1)>",
        "<svg><script>alert(1)</script></svg>",
    ),
    *(
        "<iframe src=javascript:alert(1)>",
        "<!--<img src=x onerror=alert(1)>-->",
        "<![CDATA[<b>]]>",
        "<?php echo 1 ?>",
        "<!DOCTYPE html>",
    ),
    *(
        "<a href=javascript:alert(1)>x</a>",
        "<style>*{display:none}</style>",
        "<base href=//evil.example>",
        "<meta http-equiv=refresh>",
    ),
    *(
        "<form action=//evil.example><input name=q>",
        "<math><mtext></mtext><mglyph><svg><mtext><textarea>",
        "<div style=position:fixed>x</div>",
    ),
    *(
        "</p></div></body>",
        "</code></pre><script>alert(1)</script>",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "&#60;script&#62;",
        "&#x3c;b&#x3e;",
    ),
    *(
        "<details open ontoggle=alert(1)>",
        "<x onclick=alert(1)>",
        "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    ),
    *(
        "`<script>`",
        "`` <b> ``",
        "    <script>alert(1)</script>\n",
        "```\n</code></pre><script>alert(1)</script>\n```",
        "```html\n<script>alert(1)</script>\n```",
    ),
    *(
        '```"><script>alert(1)</script>\nx\n```',
        "```' onclick='alert(1)\nx\n```",
        '```python" onclick="alert(1)\nx\n```',
        "~~~&quot;onclick=1\nx\n~~~",
    ),
    *(
        "```<b>\n```",
        "```\x00\x01\nx\n```",
        "```../../etc/passwd\nx\n```",
        "```python\n'</span></code><script>\n```",
        "```svg\n<svg onload=x>\n```",
    ),
    *(
        '[a](https://x.example "\\"><script>alert(1)</script>")',
        "[a](https://x.example '&quot; onclick=&quot;')",
        "[<script>](https://x.example)",
    ),
    *(
        '[a"b](https://x.example)',
        '!["onerror="alert(1)](https://x.example)',
        "![<img src=x>](https://x.example)",
        "![a]('\"><b>')",
    ),
    *(
        "[[a](https://x.example)](https://y.example)",
        "[a [b](https://x.example) c](https://y.example)",
        "![[a](https://x.example)](https://y.example)",
    ),
    *(
        "[![![a](https://x.example)](https://y.example)](https://z.example)",
        "[https://x.example](https://y.example)",
        "[<https://x.example>](https://y.example)",
    ),
    *(
        '<https://x.example/"onclick="alert(1)>',
        "<https://x.example/<script>>",
        'https://x.example/"><script>',
        "https://x.example/?a=<b>&c='\"",
    ),
    *(
        "https://x.example/*a*_b_`c`",
        "<javascript:alert(1)@x.example>",
        '<a@b.example" onclick="x>',
        "mailto:a@b.example?subject=<script>",
    ),
    *(
        "[x]: javascript:alert(1)\n\n[x] [x][] ![x]",
        "[x]: <javascript:alert(1)>\n[x]",
        "[x]: https://x.example \"'onclick='\"\n\n[x]",
        "[<b>]: https://x.example\n\n[<b>]",
    ),
    *(
        '|<b>|"|\n|-|-|\n|<script>alert(1)</script>|`<b>`|',
        '|a|\n|:-:" onclick="x|\n|b|',
        "|[a](javascript:x)|\n|-|\n|![b](data:,x)|",
    ),
    *(
        "- [ ] <script>",
        "- [x] [a](javascript:alert(1))",
        '- [ ]" onclick="x',
        "1234567890. x",
        "999999999. <b>",
        "# <script>alert(1)</script>",
        "> <svg onload=x>",
    ),
    *(
        "$\\text{<svg/onload=alert(1)>}$",
        "$\\href{javascript:alert(1)}{x}$",
        '$\\color{red"onclick="x}{y}$',
        '$\\class{a" b}{x}$',
        "$<img src=x onerror=alert(1)>$",
    ),
    *(
        '$$\\begin{equation}x\\label{a"onclick="b}\\end{equation}$$',
        "$\\style{position:fixed}{x}$",
        "$\\unicode{x3c}script$",
        "$&lt;b&gt;$",
        "$</math><script>$",
    ),
    *(
        "$\\def\\a{\\a\\a}\\a$",
        "$\\text{\\$</mtext><b>}$",
        "\\(\\text{<b>}\\)",
        "\\[\n\\text{</math><img src=x>}\n\\]",
        "$\\includegraphics{https://x.example}$",
        "$\\nosuch<b>$",
    ),
    *(
        "$\\color{url(javascript:x)}x$",
        "$\\rule{1em}{1em}\\hspace{9999em}x$",
        "$\\operatorname{<b>}\\mathrm{</mi><b>}$",
        "$\\begin{array}{<b>}a\\end{array}$",
        "$%\n<b>$",
    ),
    *(
        "\0<script\0>alert(1)</script>",
        "<scr\0ipt>",
        "\x08\x1b[31m<b>\x7f",
        "\u202e<script>\u202c",
        "\ufeff<b>",
        "\u2028<b>\u2029",
        "＜script＞",
        "\x0b<b>\x0c",
        "\ud800<b>",
    ),
    *(
        "*<b>*",
        "**<a href=x>**",
        "~~<i>~~",
        "_<u onclick=x>_",
        "\\<script>",
        "\\&lt;b>",
        "&",
        "&#0;&#xD800;&#x110000;&bogus;",
        "<",
        "a<b>c",
        "<b",
        "<<b>>",
        "--><b>",
    ),
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_answer_puts_anything_but_known_elements_into_the_page(text: str) -> None:
    for form in (
        "{}",
        "> {}",
        "- {}\n  {}",
        "a {} b {}",
        "**{}**",
        "[{}](https://x.example)",
        "![{}](https://x.example)",
        "|a|\n|-|\n|{}|",
    ):
        assert_harmless(render(form.replace("{}", text)))
        assert_harmless(render_growing(form.replace("{}", text)))


@pytest.mark.parametrize("url", URLS)
def test_no_answer_links_to_anything_but_http_and_mail(url: str) -> None:
    for form in URL_FORMS:
        assert_harmless(render(form.replace("{0}", url).replace("{}", url)))


def test_harmful_answers_without_the_math_package_are_harmless_too(without_math: None) -> None:
    for text in HOSTILE:
        assert_harmless(render(text))


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from([*HOSTILE, *URLS, *FRAGMENTS]), max_size=12).map("".join))
def test_harmful_answers_glued_together_are_harmless(text: str) -> None:
    assert_harmless(render(text))


def test_the_plain_form_of_a_slow_block_is_escaped() -> None:
    stream = MarkdownStream(Clock(step_seconds=1.0))
    stream.feed("<script>alert('1')</script>")
    assert_harmless(stream.frame().open)


# Answers that cost too much. They have no time limit: without the bounds of the module they take minutes.

COSTLY = {
    **{
        f"20 KB of {piece!r}": piece * (20_000 // len(piece))
        for piece in ["![", "[", "[a](", "*a ", "*_", "`", "<", "<http://"]
    },
    **{
        f"20 KB of {piece!r}": piece * (20_000 // len(piece))
        for piece in [">", "> ", "- ", "1. ", "::", "$a ", "\\(a ", "&a", "~~a "]
    },
    **{
        f"20 KB of {piece!r}": piece * (20_000 // len(piece))
        for piece in ["[a\n", "[a]: <\n", "a|\n", "|\n-|\n", "$$a\n", "\\[a\n", "-\n", "# \n"]
    },
    "backticks of all lengths": "".join("`" * length + "a" for length in range(1, 200)),
    "nested images": "![" * 1_000 + "](https://x.example)" * 1_000,
    "nested links": "[" * 1_000 + "](https://x.example)" * 1_000,
    "paragraphs of brackets": ("[" * markdown.BRACKETS_MAX + "*a" * 300 + "\n\n") * 30,
    "lines of quotes": (">" * 200 + "a\n") * 100,
    "nested lists": "".join("  " * depth + "- a\n" for depth in range(140)),
    "a table with missing cells": "|x" * 100 + "|\n" + "|-" * 100 + "|\n" + "a\n" * 5_000,
    "tables with missing cells": ("|x" * 100 + "|\n" + "|-" * 100 + "|\n" + "a\n" * 100) * 20,
    "code that Java's lexer takes the square of": "```java\n" + "a\n" * 10_000 + "```\n",
    "code of blank lines": "```python\n" + "\n \n" * 10_000 + "```\n",
    "nested formulas": "$" + "{" * 499 + "}" * 499 + "$ $" + r"\sqrt" * 190 + "x$",
}


@pytest.mark.parametrize("text", COSTLY.values(), ids=COSTLY.keys())
def test_a_costly_answer_is_rendered(text: str) -> None:
    finished = render(text)
    assert_harmless(finished)
    assert len(finished) < 20 * len(text)
    stream, page = MarkdownStream(), Page()
    stream.feed(text[:-1])
    page.show(stream.frame())
    stream.feed(text[-1])
    page.show(stream.finish())
    assert page.html == finished


def test_text_that_is_too_costly_to_parse_is_shown_as_it_is() -> None:
    brackets = "[" * (markdown.BRACKETS_MAX + 1)
    assert render(f"{brackets} *a*\n\n*b*") == f"<p>{brackets} *a*</p>\n<p><em>b</em></p>\n"
    assert render(f"{brackets[1:]} *a*") == f"<p>{brackets[1:]} <em>a</em></p>\n"
    assert "<em>" in render("[x] (y) " * 400 + "*a*") and "<em>" not in render("[x] (y) " * 600 + "*a*")


def test_a_table_may_leave_some_cells_out_but_not_most() -> None:
    table = "|a|b|c|d|\n|-|-|-|-|\n"
    assert "<table>" in render(table + "| some words |\n| more words |\n| |\n")
    assert "<table>" not in render(table + "e\n" * 20)


def test_lines_that_are_no_table_are_looked_at_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from markdown_it.rules_block import StateBlock

    looks: list[int] = []
    is_empty = StateBlock.isEmpty
    monkeypatch.setattr(StateBlock, "isEmpty", lambda state, line: looks.append(line) or is_empty(state, line))
    assert "<table>" not in render("a|b|c|d\n-|-|-|-\n" * 100 + "a\n" * 1_000)
    assert len(looks) < 10 * 1_200


def test_deep_stacks_are_deep_enough() -> None:
    def at_depth(depth: int, text: str) -> str:
        return render(text) if depth == 0 else at_depth(depth - 1, text)

    for text in ("> " * 300 + "a", "- " * 300 + "a", "[" * 16 + "a" + "](https://x.example)" * 16, "> - " * 200 + "a"):
        assert at_depth(300, text)


def test_every_kind_of_document_is_here() -> None:
    rendered = "".join(render(document) for document in DOCUMENTS)
    elements = set(re.findall(r"<([a-z]+\d?)", rendered))
    assert elements >= set(ELEMENTS) | {"math"}, set(ELEMENTS) - elements
    assert len(DOCUMENTS) > 100 and len(HOSTILE) + len(URLS) > 150
    assert all(any(mark in document for document in DOCUMENTS) for mark in itertools.chain("\t\u2028\xa0", ["\n\n\n"]))
