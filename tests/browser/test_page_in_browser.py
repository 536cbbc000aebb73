"""What a reader sees of a page."""

import re
from dataclasses import replace

import pytest
from example_page import COMMAND, HOSTILE, LEAKS, example_page

from orchestrator.report.page import render

PHONE = {"width": 360, "height": 740}
DESK = {"width": 1200, "height": 900}
PAPER = {"width": 688, "height": 1000}  # A4 between the margins, at 96 pixels an inch

CONTRASTS = """() => {
  const channels = colour => {
    const [r, g, b, a = 1] = colour.match(/[0-9.]+/g).map(Number);
    return {rgb: [r, g, b], a};
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const {rgb, a} = channels(getComputedStyle(e).backgroundColor);
      if (a === 1) return rgb;
      if (a !== 0) throw new Error("a half transparent background: " + e.outerHTML.slice(0, 80));
    }
    return [255, 255, 255];
  };
  return [...document.body.querySelectorAll("*:not(.unseen)")]
    .filter(e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim()))
    .map(e => {
      const colours = [channels(getComputedStyle(e).color).rgb, behind(e)];
      const [low, high] = colours.map(luminance).sort((a, b) => a - b);
      return {text: e.textContent.trim().slice(0, 40), ratio: (high + 0.05) / (low + 0.05)};
    });
}"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "page.html"
    path.write_text(render(example_page()), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, file):
    """Opens a file at a size; afterwards nothing may have been said or asked for but the file."""
    contexts, said, asked = [], [], []

    def open_page(viewport, path=file, **more):
        contexts.append(browser.new_context(viewport=viewport, **more))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_load_state("networkidle")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) <= {file.as_uri()}


def top(locator):
    box = locator.bounding_box()
    assert box is not None
    assert box["width"] > 0
    assert box["height"] > 0
    return box["y"]


@pytest.mark.parametrize("viewport", [DESK, PHONE])
def test_the_guarantee_is_seen_before_any_number(opened, viewport):
    page = opened(viewport)
    for statement in example_page().statements:
        shown = page.get_by_text(statement.text)
        assert shown.is_visible()
        assert top(shown) < top(page.locator("ul.findings")) < top(page.locator("table").first)
    assert top(page.get_by_text("no guarantee", exact=True)) < viewport["height"]


@pytest.mark.parametrize("width", [320, 360, 400, 768, 1200])
def test_only_a_table_or_a_figure_scrolls_sideways_and_never_the_page(opened, width):
    page = opened({"width": width, "height": 740})
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    outside = """() => [...document.body.querySelectorAll("*:not(.unseen)")]
        .filter(e => !e.parentElement.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 0.5)
        .map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []


def test_a_wide_table_can_be_scrolled_with_the_keyboard_to_its_last_column(opened):
    page = opened(PHONE)
    region = page.get_by_role("region", name=LEAKS.title)
    last = region.locator("thead th").last
    assert last.bounding_box()["x"] > PHONE["width"]
    region.focus()
    for _ in range(60):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("e => e.getBoundingClientRect().right <= innerWidth", arg=last.element_handle())
    title = region.locator("caption span").bounding_box()
    assert 0 <= title["x"] <= PHONE["width"] / 4  # the title stays


def test_a_name_of_a_task_is_shown_and_not_run(opened):
    page = opened(DESK)
    assert page.title() == "Leakage report"
    assert page.locator("script").count() == 0
    assert page.locator("tbody th", has_text=HOSTILE).first.is_visible()


def test_a_command_is_copied_as_it_was_written(opened):
    page = opened(PHONE)
    page.locator("code").evaluate("e => getSelection().selectAllChildren(e)")
    assert page.evaluate("getSelection().toString()") == COMMAND


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(opened, scheme):
    page = opened(DESK)
    page.emulate_media(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background))) / 3
    assert brightness < 40 if scheme == "dark" else brightness > 215
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [shown for shown in contrasts if shown["ratio"] < 4.5] == []  # WCAG 2.2, AA


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE])
def test_every_figure_is_drawn_on_white(opened, scheme, viewport):
    page = opened(viewport, color_scheme=scheme)
    figures = page.locator("figure img")
    assert figures.count() == 2
    for figure in figures.all():
        assert figure.evaluate("e => e.complete && e.naturalWidth > 0")
        box = figure.bounding_box()
        assert box["width"] > 280
        assert box["height"] > 140
    assert page.locator(".card").first.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"


def test_a_link_of_the_contents_leads_to_its_section(opened):
    page = opened(PHONE)
    page.get_by_role("link", name="Faults").click()
    assert page.url.endswith("#section-2")
    assert 0 <= page.get_by_role("heading", name="Faults").bounding_box()["y"] < PHONE["height"]


def test_a_screen_reader_gets_every_row_with_its_headers(opened):
    page = opened(DESK)
    table = page.get_by_role("table", name=LEAKS.title)
    assert table.get_by_role("row").count() == 1 + len(LEAKS.rows)
    assert table.get_by_role("columnheader").all_inner_texts() == list(LEAKS.names)
    assert table.get_by_role("rowheader").count() == len(LEAKS.rows) + 3
    assert "not measured" in table.get_by_role("cell").filter(has_text="not measured").first.inner_text()


def test_paper_shows_every_table_whole_and_light(opened):
    page = opened(PAPER, color_scheme="dark")
    page.emulate_media(media="print")
    cut = "() => [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate(cut) == 0
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [shown for shown in page.evaluate(CONTRASTS) if shown["ratio"] < 4.5] == []
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF-")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 5


def test_the_policy_stops_what_should_not_be_in_a_page(browser, tmp_path):
    """As if the escaping had failed."""
    path = tmp_path / "broken.html"
    html = render(replace(example_page(), title="As it was"))
    path.write_text(html.replace("</body>", f"{HOSTILE}</body>"), encoding="utf-8")
    said = []
    with browser.new_context() as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.goto(path.as_uri())
        assert page.title() == "As it was"
    assert len([text for text in said if "Content Security Policy" in text]) >= 2
