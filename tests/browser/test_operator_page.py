"""What an operator sees in a browser: a published catalog behind the page, over HTTP, with real requests counted."""

from __future__ import annotations

import io
import random
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn
from PIL import Image
from served import CATALOG, Shop, png
from test_page_in_browser import CONTRASTS

from serve.arguments import CatalogArgs, TaskArgs, VersionArgs
from serve.deployment.state import Deployed, Deployments, DeploymentsFile
from serve.front import build_front
from serve.operator.page import AppState
from serve.operator.pictures import maps_png
from serve.operator.routes import Office
from serve.operator.viewer import CatalogViewer
from serve.traffic import SLOT_S, SLOTS, TrafficMeter

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1200, "height": 900}
HOSTILE = "<script>alert(1)</script>"


class Site:
    """The page on a port of this machine."""

    def __init__(self, shop: Shop) -> None:
        self.shop, self.folder = shop, shop.state / "serving"
        self.token = shop.registry.add("root", "operator").token.text
        source = CatalogArgs(tracking_uri=shop.catalog.uri, catalog=CATALOG, storage=str(shop.home))

        def args(task: str, **more: object) -> Deployed:
            registry, streams = str(shop.places.registry), str(self.folder / "streams")
            version = VersionArgs(encoder_version="1", version=shop.lane(task).version)
            return Deployed(
                args=TaskArgs(task=task, source=source, registry=registry, streams=streams, current=version, **more)
            )

        canary = VersionArgs(encoder_version="2", version=shop.lane("loop", "2").version)
        tasks = {"digit": args("digit"), "large": args("large"), "loop": args("loop", canary=canary, share=0.1)}
        self.folder.mkdir()
        path = self.folder / "deployments.json"
        DeploymentsFile(path).write(Deployments(tasks=tasks))
        self._count()
        self.viewer = CatalogViewer(path)
        office = Office(gate=shop.gate, viewer=self.viewer, traffic=self.folder / "traffic", states=_states)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        config = uvicorn.Config(
            build_front(shop.gate, office), port=int(self.url.rpartition(":")[2]), log_level="warning", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)

    def _count(self) -> None:
        """A quarter of an hour of requests, as a replica would have counted them."""
        now, random_ = time.time(), random.Random(0)
        moment = now
        meter = TrafficMeter(self.folder / "traffic", clock=lambda: moment)
        for slot in range(SLOTS):
            moment = now - SLOT_S * (SLOTS - slot)
            for task, verb, n in (("loop", "read", 12), ("loop", "publish", 4), ("digit", "read", 2)):
                for _ in range(random_.randrange(n + 1)):
                    seconds = random_.lognormvariate(-4.5, 0.6)
                    meter.request(tenant="alice", task=task, verb=verb, status=200, seconds=seconds)
        meter.request(tenant="alice", task="loop", verb="read", status=503, seconds=0.2)
        meter.close()


def _states():
    return {
        "loop": AppState(state="RUNNING", replicas="2 running"),
        "large": AppState(state="RUNNING", replicas="1 running"),
        "digit": AppState(state="DEPLOYING", replicas="1 starting", message="waiting for room"),
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory, shop_template):
    with Shop(shop_template, tmp_path_factory.mktemp("state")) as shop:
        opened = Site(shop)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, site):
    """Opens the page, signed in; afterwards nothing may have been said, and nobody else asked."""
    contexts, said, asked = [], [], []

    def open_page(viewport, *, sign_in=True, **more):
        contexts.append(browser.new_context(viewport=viewport, **more))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(site.url)
        if sign_in:
            page.get_by_label("Token").fill(site.token)
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url(f"{site.url}/")
        return page

    open_page.asked, open_page.said = asked, said
    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith((f"{site.url}/", "data:"))} == set()


def look_at(page, number):
    page.get_by_label("Digit").fill(str(number))
    page.get_by_role("button", name="Look", exact=True).click()
    page.get_by_text(f"Digit {number} of").first.wait_for()


def trained(page, site):
    """The look after every decoder is trained: the page asks again by itself."""
    look_at(page, 3)
    site.viewer.looker.wait()
    page.locator("[data-waiting]").wait_for(state="detached", timeout=60_000)


@pytest.mark.parametrize("viewport", [DESK, PHONE])
def test_the_token_opens_the_page_and_nothing_else_does(opened, site, viewport):
    page = opened(viewport, sign_in=False)
    assert page.url == f"{site.url}/login"
    page.get_by_label("Token").fill("mm_0000000000000000_" + "a" * 43)
    page.get_by_role("button", name="Sign in").click()
    assert page.get_by_role("alert").inner_text() == "This token does not open this page."
    assert "401" in opened.said.pop()  # the browser's own word
    page.get_by_label("Token").fill(site.token)
    page.get_by_role("button", name="Sign in").click()
    assert page.get_by_role("heading", name="Served features").is_visible()
    assert page.url == f"{site.url}/"
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert page.evaluate("document.cookie") == ""
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0
    assert not any(site.token in url for url in opened.asked)
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url(f"{site.url}/login")
    assert page.context.cookies() == []
    page.goto(site.url)
    assert page.url == f"{site.url}/login"


def test_what_is_served_is_told_in_tables_that_a_screen_reader_gets(opened, site):
    page = opened(DESK)
    tasks = page.get_by_role("table", name="What is served at /tasks/NAME")
    assert tasks.get_by_role("rowheader").all_inner_texts() == ["digit", "large", "loop"]
    cells = tasks.inner_text()
    for text in (
        site.shop.lane("loop").version,
        "canary",
        "2 running",
        "deploying",
        "waiting for room",
        "64\N{MULTIPLICATION SIGN}4",
    ):
        assert text in cells
    requests = page.get_by_role("table", name="Of all replicas, over the last 15 minutes")
    assert requests.get_by_role("rowheader").all_inner_texts() == ["digit", "loop", "loop"]
    assert page.locator(".statement").count() >= 1


@pytest.mark.parametrize("viewport", [DESK, PHONE])
def test_a_look_at_a_digit_shows_maps_answers_and_reconstructions(opened, site, viewport):
    page = opened(viewport)
    trained(page, site)
    assert page.locator("img.maps").count() == 6  # four features, and the output of two encoders
    assert page.get_by_alt_text("What a decoder made of", exact=False).count() == 6
    for image in page.locator("#look img").all():
        assert image.evaluate("e => e.complete && e.naturalWidth > 0")
    swap = page.get_by_role("table", name="What the head of a column says of the feature of a row")
    assert swap.get_by_role("columnheader").count() == 4
    assert swap.get_by_role("rowheader").count() == 4
    assert swap.get_by_role("cell", name="does not fit").count() == 6  # a bounded feature, and three maps
    assert page.locator("td.own").count() == 4
    assert page.get_by_text("test images it reaches SSIM").count() == 6
    before = page.locator("img.maps").first.get_attribute("src")
    page.get_by_role("button", name="Next").click()
    page.get_by_text("Digit 4 of").first.wait_for()
    assert page.locator("img.maps").first.get_attribute("src") != before


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_only_a_table_scrolls_sideways_and_never_the_page(opened, site, width):
    page = opened({"width": width, "height": 844})
    trained(page, site)
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    outside = """() => [...document.body.querySelectorAll("*:not(.unseen)")]
        .filter(e => !e.parentElement.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 0.5)
        .map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(opened, site, scheme):
    page = opened(DESK, color_scheme=scheme)
    trained(page, site)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [shown for shown in contrasts if shown["ratio"] < 4.5] == []  # WCAG 2.2, AA


def kept(site):
    """Every file but those that any request changes."""
    return sorted(path for path in site.shop.state.rglob("*") if "traffic" not in path.parts)


def test_an_image_of_ones_own_is_sent_after_a_click_and_kept_nowhere(opened, site, tmp_path):
    path = tmp_path / "own.png"
    path.write_bytes(png(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)))
    before = kept(site)
    page = opened(DESK)
    posts = []
    page.on("request", lambda request: posts.append(request.url) if request.method == "POST" else None)
    page.get_by_label("An image of your own").set_input_files(path)
    page.wait_for_timeout(300)
    assert posts == []
    page.get_by_role("button", name="Look at it").click()
    page.get_by_text("The image that you brought").first.wait_for()
    assert posts == [f"{site.url}/look"]
    assert page.locator("img.maps").count() == 6
    assert kept(site) == before
    (tmp_path / "own.txt").write_text(HOSTILE)
    page.get_by_label("An image of your own").set_input_files(tmp_path / "own.txt")
    page.get_by_role("button", name="Look at it").click()
    assert "There is nothing to see" in page.get_by_role("alert").inner_text()


def test_the_page_works_without_scripts(opened, site):
    page = opened(PHONE, java_script_enabled=False)
    page.get_by_label("Digit").fill("3")
    page.get_by_role("button", name="Look", exact=True).click()
    assert page.get_by_text("Digit 3 of").first.is_visible()
    assert page.locator("img.maps").count() == 6
    assert not page.get_by_label("An image of your own").is_visible()


def test_the_numbers_refresh_by_themselves(opened, site):
    page = opened(DESK)
    row = page.get_by_role("row", name="large publish")
    assert row.count() == 0
    meter = TrafficMeter(site.folder / "traffic", clock=lambda: time.time() - SLOT_S)
    meter.request(tenant="alice", task="large", verb="publish", status=200, seconds=0.01)
    meter.close()
    row.wait_for(timeout=15_000)
    assert "1" in row.inner_text()


def test_the_policy_stops_what_should_not_be_in_a_page(browser, site):
    """As if the escaping had failed."""
    said = []
    with browser.new_context() as context:
        page = context.new_page()
        page.route(f"{site.url}/login", _broken)
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append("ran"))
        page.goto(f"{site.url}/login")
        assert "ran" not in said
    assert len([text for text in said if "Content Security Policy" in text]) >= 3


def _broken(route):
    response = route.fetch()
    hostile = f"{HOSTILE}<img src=x onerror=alert(2)><img src=http://127.0.0.1:9/x><p style='color:red'>x</p>"
    route.fulfill(response=response, body=response.text().replace("</main>", f"{hostile}</main>"))


def test_maps_are_pictures_of_numbers(site):
    """What a browser is sent is a PNG, its maps side by side."""
    z = np.arange(4 * 2 * 2, dtype=np.float32).reshape(4, 2, 2)
    with Image.open(io.BytesIO(maps_png(z))) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (40, 4 * 40 + 3 * 4, 4)
    assert len(np.unique(pixels[pixels[..., 3] == 255][:, :3], axis=0)) == 16
