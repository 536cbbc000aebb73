import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from example_page import COMMAND, FAULTS, HOSTILE, LEAKS, example_page, rising_picture
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.report.page import Finding, Page, Picture, Section, Statement, render
from orchestrator.report.sheet import Sheet

VOID = {"meta", "link", "img"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="30pt"/>'


class Reader(HTMLParser):
    """What is in a page: elements with their texts in document order, and whether they nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs))
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def texts(self, tag, **attributes):
        return ["".join(texts).strip() for _, texts in self.found(tag, **attributes)]

    def found(self, tag, **attributes):
        return [
            (attrs, texts)
            for name, attrs, texts in self.elements
            if name == tag and all(attrs.get(key) == value for key, value in attributes.items())
        ]


def page_of(*sheets, **more):
    empty = Page(title="A page", subtitle="", statements=(), findings=(), sections=(), facts=(), footer="")
    return replace(empty, **{"sections": (Section(title="All", sheets=sheets),)} | more)


def grid(html):
    """The cells of the first table as a browser lays them out: one that covers several rows is in each of them."""
    body = html[html.index("</thead>") : html.index("</table>")]
    rows, pending = [], {}
    for row in re.findall(r"<tr>(.*?)</tr>", body, re.S):
        cells = [(attrs, "".join(texts)) for tag, attrs, texts in Reader(row).elements if tag in ("td", "th")]
        shown, column = [], 0
        while cells or column in pending:
            if column not in pending:
                attrs, text = cells.pop(0)
                pending[column] = [int(attrs.get("rowspan", 1)), text]
            pending[column][0] -= 1
            shown.append(pending[column][1])
            if pending[column][0] == 0:
                del pending[column]
            column += 1
        rows.append(shown)
    assert pending == {}
    return rows


def test_nothing_that_a_stranger_wrote_becomes_markup():
    names = iter(range(99))
    written = []

    def hostile():
        written.append(f"{next(names)} {HOSTILE}")
        return written[-1]

    sheet = Sheet(title=hostile(), names=[hostile(), hostile()], rows=[[hostile(), hostile()]], note=hostile())
    picture = Picture(title=hostile(), svg=SVG, caption=hostile(), alt=hostile())
    section = Section(title=hostile(), paragraphs=(hostile(),), sheets=(sheet,), pictures=(picture,), command=hostile())
    page = Page(
        title=hostile(),
        subtitle=hostile(),
        statements=(Statement(subject=hostile(), text=hostile(), strength="none"),),
        findings=(Finding(text=hostile(), mark="bad"),),
        sections=(section,),
        facts=((hostile(), hostile()),),
        footer=hostile(),
    )
    read = Reader(render(page))
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _, _ in read.elements}
    assert not [name for _, attrs, _ in read.elements for name in attrs if name.startswith("on")]
    (image,) = read.found("img")
    everything = "".join(read.texts("html")) + image[0]["alt"]
    assert len(written) == 20
    for text in written:
        assert text in everything


def test_nothing_is_loaded_from_elsewhere():
    html = render(example_page())
    read = Reader(html)
    links = [
        attrs[name] for _, attrs, _ in read.elements for name in ("src", "href", "srcset", "data") if name in attrs
    ]
    assert len(links) == 1 + 3 + 2  # icon, contents, figures
    assert all(re.match(r"#|data:(image/svg\+xml;base64)?,", link) for link in links)
    anchors = {attrs["id"] for _, attrs, _ in read.elements if "id" in attrs}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    (style,) = read.texts("style")
    assert "url(" not in style
    assert "@import" not in style


def test_the_security_policy_forbids_what_the_page_does_not_need():
    read = Reader(render(example_page()))
    ((policy, _),) = read.found("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_guarantee_comes_first_and_the_configuration_last():
    read = Reader(render(example_page()))
    assert read.texts("h2") == [
        "What is guaranteed, and what is not",
        "What was tested and found",
        "Contents",
        "1 Leakage",
        "2 Faults",
        "Configuration and versions",
    ]
    assert read.texts("h1") == ["Leakage report"]
    tags = [tag for tag, _, _ in read.elements]
    assert tags.index("h1") < tags.index("h2") < tags.index("nav") < tags.index("table") < tags.index("dl")
    assert read.texts("li")[3:] == ["Leakage", "Faults", "Configuration and versions"]


def test_strengths_and_marks_are_said_in_words():
    read = Reader(render(example_page()))
    assert read.texts("h3") == [
        "Encoder guaranteed",
        "Features measured, not guaranteed",
        "Images at query time no guarantee",
    ]
    assert [text.split()[0] for text in read.texts("li")[:3]] == ["good", "bad", "neutral"]


def test_every_cell_of_a_sheet_is_there_with_the_word_of_its_mark():
    shown = grid(render(page_of(LEAKS)))
    words = {"bad": "bad ", "good": "good ", "": "", "crashed": ""}  # "crashed" is in the cell already
    for row, mark, cells in zip(LEAKS.rows, LEAKS.marks, shown, strict=True):
        expected = ["\N{EN DASH}not measured" if cell == "-" else cell for cell in row]
        assert cells == [*expected[:-1], words[mark] + expected[-1]]


def test_the_word_of_a_mark_follows_a_text():
    assert [row[-1] for row in grid(render(page_of(FAULTS)))] == ["as before good", "as before bad"]


def test_a_mark_is_not_said_twice():
    sheet = Sheet(title="", names=["a", "b"], rows=[["x", "bad"], ["y", "badge"], ["z", "3 (crashed)"]])
    shown = grid(render(page_of(replace(sheet, marks=["bad", "bad", "crashed"]))))
    assert [row[-1] for row in shown] == ["bad", "bad badge", "3 (crashed)"]


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.sampled_from("abc")] * 4), max_size=8),
    repeated=st.frozensets(st.sampled_from("wxyz")),
    words=st.frozensets(st.sampled_from("wxyz")),
)
def test_repeated_cells_stand_in_every_row_that_they_cover(rows, repeated, words):
    html = render(page_of(Sheet(title="", names=list("wxyz"), rows=rows, repeated=repeated, words=words)))
    assert grid(html) == [list(row) for row in rows]


def test_repeated_cells_are_written_once():
    read = Reader(render(page_of(LEAKS)))
    assert [attrs["rowspan"] for attrs, _ in read.found("th", scope="rowgroup")] == ["4"] * 3
    assert read.texts("td", rowspan="4") == ["97.4", "98.1", "96.1", "98.1", "88.0", "98.1"]


def test_a_repeated_last_cell_stays_in_every_row_with_the_mark_of_that_row():
    sheet = Sheet(title="", names=["a", "b"], rows=[["x", "1"], ["x", "1"]], repeated=frozenset("ab"))
    assert grid(render(page_of(replace(sheet, marks=["good", "bad"])))) == [["x", "good 1"], ["x", "bad 1"]]


@pytest.mark.parametrize(
    ("words", "heads"),
    [({"w", "x"}, ["a", "b"]), ({"w", "y"}, ["a"]), ({"x"}, ["a"]), (set(), ["a"]), ({"w", "x", "y"}, ["a"])],
)
def test_the_words_that_a_row_begins_with_are_its_headers(words, heads):
    sheet = Sheet(title="", names=list("wxy"), rows=[list("abc")], words=frozenset(words))
    read = Reader(render(page_of(sheet)))
    assert read.texts("th", scope="row") == heads
    assert read.texts("th", scope="col") == list("wxy")


def test_tables_and_figures_are_numbered_and_named():
    read = Reader(render(example_page()))
    assert read.texts("caption") == ["Table 1. What each feature tells", "Table 2. Parties that were killed"]
    assert [text.split("\n")[0] for text in read.texts("figcaption")] == ["Figure 1. Accuracy", "Figure 2. Accuracy"]
    assert {attrs["alt"] for attrs, _ in read.found("img")} == {"A line that rises."}
    ids = [attrs["id"] for _, attrs, _ in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_command_can_be_copied_as_it_was_written():
    assert Reader(render(example_page())).texts("code") == [COMMAND]


def test_a_number_keeps_its_percent_sign_in_a_text_but_not_in_a_command():
    section = Section(title="", paragraphs=("95 % of them",), command="echo 95 %")
    read = Reader(render(page_of(sections=(section,))))
    assert "95\N{NO-BREAK SPACE}% of them" in read.texts("p")
    assert read.texts("code") == ["echo 95 %"]


def test_what_is_empty_has_no_heading():
    assert Reader(render(page_of(sections=()))).texts("h2") == []


def test_text_that_no_file_can_hold_or_that_turns_others_around_is_replaced():
    html = render(page_of(title="a\x00b\ud800c\u202ed\u2066e\x1bf", footer="tab\tand\nline"))
    assert Reader(html).texts("h1") == ["a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf"]
    assert Reader(html).texts("footer") == ["tab\tand\nline"]
    html.encode("utf-8")


@pytest.mark.parametrize("broken", [{"marks": ["good"]}, {"rows": [["a"]]}, {"rows": [["a"] * 4]}])
def test_a_sheet_whose_parts_do_not_fit_together_is_not_shown(broken):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        render(page_of(replace(FAULTS, **({"marks": ()} | broken))))


def test_a_picture_needs_a_text_for_those_who_cannot_see_it():
    with pytest.raises(AssertionError, match="'Accuracy' has no text"):
        Picture(title="Accuracy", svg=SVG, caption="", alt=" ")


@pytest.mark.parametrize(
    ("size", "width_px"), [('width="30pt"', 40), ('height="2" width="31.6px"', 32), ('width="100%"', 640), ("", 640)]
)
def test_a_picture_is_as_wide_as_it_was_drawn(size, width_px):
    assert Picture(title="", svg=f"<svg {size}/>", caption="", alt="nothing").width_px == width_px


def test_a_figure_is_a_whole_svg_on_white_whose_text_needs_no_font():
    picture = rising_picture()
    prefix = "data:image/svg+xml;base64,"
    assert picture.source.startswith(prefix)
    svg = ElementTree.fromstring(b64decode(picture.source.removeprefix(prefix)))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert picture.width_px == round(6.4 * 96)
    assert "fill: #ffffff" in picture.svg
    assert "<text" not in picture.svg
    assert "<dc:date>" not in picture.svg


def test_the_same_report_is_the_same_file():
    assert render(example_page()) == render(example_page())


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    import matplotlib as mpl

    names = [name for name in mpl.rcParams if name != "backend"]  # looking at the backend chooses one
    before = {name: mpl.rcParams[name] for name in names}
    rising_picture()
    assert {name: mpl.rcParams[name] for name in names} == before
