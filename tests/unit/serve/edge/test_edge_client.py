"""The edge client against a server of the documented protocol: order, outages, versions, and what it refuses."""

from __future__ import annotations

import itertools
import json

import httpx
import numpy as np
import pytest
from fake_task_server import TOKEN, FakeTaskServer
from small_head import CARD, small_head, small_map_head

from serve.edge import EdgeClient, Head
from serve.edge.errors import AnswerError, NotServedError, RefusedError, UnreachableError, VersionMismatchError
from serve.edge.link import Link, Patience
from tasks.errors import ConfigError, DataError

URL = "https://features.example"


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return Head.load(small_head(tmp_path_factory.mktemp("head") / "head.onnx"))


@pytest.fixture
def server():
    return FakeTaskServer()


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def client_of(server, clock=None, *, token=TOKEN, task="smile", patience=None, **options):
    clock, patience = clock or Clock(), patience or Patience()
    link = Link(URL, token, transport=server.transport(), sleep=clock.sleep, clock=clock, patience=patience)
    return EdgeClient(URL, task, token, link=link, **options)


@pytest.mark.parametrize(("precision", "off"), [("fp32", 0), ("fp16", 2e-3), ("int8", 2e-2)])
def test_features_come_in_the_precision_that_was_asked_for(server, precision, off):
    z = server.publish(3)
    found = client_of(server, precision=precision).features()
    np.testing.assert_allclose(found.z, z, atol=off)
    assert (found.sequence, found.last, found.version) == ((1, 2, 3), 3, server.version)
    assert server.requests[0].headers["accept"] == f"application/x-safetensors;precision={precision}"
    assert server.requests[0].headers["accept-encoding"] == "zstd"


def test_the_latest_and_nothing(server):
    client = client_of(server)
    assert client.latest() is None
    assert client.features() is None
    server.publish(5)
    assert client.latest().sequence == (5,)
    assert client.features(after=2, limit=2).sequence == (3, 4)
    assert client.features(after=5) is None
    assert client.metadata()["shape"] == [8, 4, 4]


def test_predictions_are_those_of_the_head_each_once_and_in_order(server, head):
    z = server.publish(40)
    found = list(client_of(server, precision="fp32").predictions(head, limit=16))
    assert [p.sequence for p in found] == list(range(1, 41))
    assert [p.label for p in found] == [a.label for a in head.answers(z)]
    assert [p.probability for p in found] == pytest.approx([a.probability for a in head.answers(z)])


def test_maps_are_those_of_the_head_each_once_and_in_order(head, tmp_path):
    server, drawing = FakeTaskServer("drawing"), Head.load(small_map_head(tmp_path / "map.onnx"))
    z, state = server.publish(20), tmp_path / "place.json"
    client = client_of(server, task="drawing", precision="fp32")
    found = list(client.maps(drawing, limit=8, after=2, state=state))
    assert [m.sequence for m in found] == list(range(3, 21))
    np.testing.assert_allclose(np.stack([m.map for m in found]), drawing.maps(z[2:]), atol=1e-6)
    assert list(client.maps(drawing, state=state)) == []
    with pytest.raises(ConfigError, match="ask for its maps"):
        next(client.predictions(drawing))
    with client_of(server) as other, pytest.raises(ConfigError, match="ask for its predictions"):
        next(other.maps(head))


def test_following_goes_on_through_outages_and_hands_out_nothing_twice(server, head):
    """Every second request fails in one of the ways that pass; more is published meanwhile."""
    failures = itertools.cycle(
        [
            httpx.ConnectError("no route"),
            httpx.ReadTimeout("slow"),
            httpx.Response(503, headers={"Retry-After": "3"}),
            httpx.Response(429),
            httpx.RemoteProtocolError("cut off"),
            httpx.Response(502),
            httpx.Response(504),
        ]
    )
    turns = itertools.count()

    def before(request):
        if next(turns) % 2 == 0:
            failure = next(failures)
            if isinstance(failure, Exception):
                raise failure
            return failure
        server.publish(2)
        return None

    server.before = before
    clock = Clock()
    predictions = client_of(server, clock).predictions(head, follow=True, limit=3)
    found = [p.sequence for p in itertools.islice(predictions, 60)]
    assert found == list(range(1, 61))
    assert any(slept >= 3 for slept in clock.slept)


def test_the_place_is_kept_over_a_restart(server, head, tmp_path):
    server.publish(10)
    state = tmp_path / "place.json"
    first = client_of(server).predictions(head, state=state, limit=4)
    assert [p.sequence for p in itertools.islice(first, 6)] == [1, 2, 3, 4, 5, 6]
    first.close()  # while the sixth is in its user's hands: it is handed out again
    assert [p.sequence for p in client_of(server).predictions(head, state=state)] == [6, 7, 8, 9, 10]
    server.publish(1)
    assert [p.sequence for p in client_of(server).predictions(head, state=state)] == [11]
    assert json.loads(state.read_text())["after"] == 11


def test_a_place_in_another_stream_is_no_place_in_this_one(server, head, tmp_path):
    state = tmp_path / "place.json"
    for text, told in (("{}", "does not hold"), ("junk", "does not hold")):
        state.write_text(text)
        with pytest.raises(DataError, match=told):
            next(client_of(server).predictions(head, state=state))
    state.write_text(json.dumps({"format": 1, "url": "https://other.example", "task": "smile", "after": 3}))
    with pytest.raises(DataError, match="another stream"):
        next(client_of(server).predictions(head, state=state))
    with pytest.raises(DataError, match="cannot keep the place"):
        next(client_of(server).predictions(head, state=tmp_path / "missing" / "place.json"))


def test_a_client_that_was_away_too_long_is_told_what_it_missed(server, head):
    server.publish(20)
    server.forget(below=12)
    gaps = []
    found = client_of(server).predictions(head, after=5, on_gap=lambda *gap: gaps.append(gap))
    assert [p.sequence for p in found] == list(range(12, 21))
    assert gaps == [(5, 12)]


def test_a_head_answers_only_features_of_its_version(server, head):
    server.publish(2)
    server.version = "1.3-ffffffffffff"
    server.publish(3)
    found = []
    with pytest.raises(VersionMismatchError, match=r"for version 1\.2-0123456789ab .* gives version 1\.3-ff"):
        found.extend(client_of(server).predictions(head))
    server.before = lambda request: (
        None if "features" not in request.url.path else server._body(request, server.published[-1:])
    )
    with pytest.raises(VersionMismatchError):
        list(client_of(server).predictions(head))


def test_a_version_that_the_server_never_had_is_no_missing_task(server, head):
    """It answers 404 to both."""

    def before(request):
        wanted = request.url.params.get("version")
        if wanted not in {None, server.version}:
            return httpx.Response(404, json={"title": "there is no such task for this token"})
        return None

    server.before, server.version = before, "1.3-ffffffffffff"
    with client_of(server) as client, pytest.raises(VersionMismatchError, match=r"gives version 1\.3-ff"):
        list(client.predictions(head))


def test_a_head_of_another_task_is_refused_before_anything_is_asked(server, head):
    with client_of(server, task="other") as client, pytest.raises(ConfigError, match=r"of task 'smile', and .*'other'"):
        list(client.predictions(head))
    assert not server.requests


def test_the_features_of_another_version_are_passed_over_while_the_heads_is_served(server, head):
    """A canary of another version is in the same stream."""
    server.publish(2)
    server.publish(2, version="1.3-ffffffffffff")
    server.publish(1)
    assert [p.sequence for p in client_of(server).predictions(head)] == [1, 2, 5]


def test_a_head_of_the_version_on_trial_answers_the_share_of_features_that_is_its_own(server, head):
    server.canary, server.version = (CARD.version, 0.1), "1.1-aaaaaaaaaaaa"
    assert list(client_of(server).predictions(head)) == []
    server.publish(3)
    server.publish(1, version=CARD.version)
    server.publish(2)
    assert [p.sequence for p in client_of(server).predictions(head)] == [4]


def test_a_follower_is_told_what_share_is_of_its_version_and_waits_while_none_is(server, head):
    """A canary comes, takes all, and is rolled back."""
    other, told = "1.3-ffffffffffff", []
    served = iter([(CARD.version, None), (CARD.version, (other, 0.1)), (other, None), (other, None)])

    def before(request):
        own = max(number for number, version, _ in server.published if version == CARD.version)
        if request.url.path.endswith("features") and own <= int(request.url.params["after"]):
            server.version, server.canary = next(served, (CARD.version, None))
            if server.version == CARD.version:
                told.append("published")
                server.publish(1, version=other if server.canary else None)

    server.publish(1)
    server.before, clock = before, Clock()
    predictions = client_of(server, clock).predictions(head, follow=True, on_others=lambda *seen: told.append(seen))
    assert [p.sequence for p in itertools.islice(predictions, 3)] == [1, 2, 4]
    assert told == ["published", "published", (0.9, CARD.version), (0.0, other), "published"]
    assert clock.slept


def test_a_follower_gives_up_when_its_version_was_not_served_for_its_patience(server, head):
    server.publish(1)
    server.version, clock = "1.3-ffffffffffff", Clock()
    predictions = client_of(server, clock, patience=Patience(total_s=30.0, longest_s=4.0)).predictions(
        head, follow=True
    )
    assert next(predictions).sequence == 1
    with pytest.raises(VersionMismatchError):
        next(predictions)
    assert 30 <= clock.now < 35


def test_a_server_that_stays_away_is_given_up_in_one_line(server):
    def refuse(request):
        raise httpx.ConnectError("connection refused")

    server.before, clock = refuse, Clock()
    with pytest.raises(UnreachableError, match=f"{URL} did not answer for .* ConnectError: connection refused"):
        client_of(server, clock, patience=Patience(total_s=30.0, longest_s=4.0)).latest()
    assert 25 < clock.now <= 30
    assert len(clock.slept) > 3


def test_a_retry_after_beyond_ones_patience_is_not_waited_for(server):
    server.before, clock = lambda _: httpx.Response(503, headers={"Retry-After": "3600"}), Clock()
    with pytest.raises(UnreachableError, match="503"):
        client_of(server, clock).latest()
    assert clock.slept == []


def test_refusals_are_told_apart_and_not_tried_again(server):
    for options, kind in (({"token": TOKEN[:-1] + "B"}, RefusedError), ({"task": "other"}, NotServedError)):
        server.requests.clear()
        with pytest.raises(kind):
            client_of(server, **options).latest()
        assert len(server.requests) == 1
    server.before = lambda _: httpx.Response(400, json={"status": 400, "title": "limit is out of range"})
    with pytest.raises(AnswerError, match="limit is out of range"):
        client_of(server).features(limit=10**9)


@pytest.mark.parametrize(
    "body", [b"", b"<html>hello</html>", b"\x80\x04\x95", bytes(64)], ids=["empty", "html", "pickle", "zeros"]
)
def test_an_answer_that_is_no_feature_is_refused(server, body):
    server.before = lambda _: httpx.Response(200, content=body)
    with pytest.raises(AnswerError, match="cannot be read"):
        client_of(server).latest()


def test_an_answer_that_is_too_large_is_not_taken_whole(server):
    link = Link(URL, TOKEN, transport=server.transport())
    server.before = lambda _: httpx.Response(200, content=bytes(10_000))
    with pytest.raises(AnswerError, match="more than the 1,000 bytes"):
        link.request("GET", "/", max_bytes=1000)
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(10_000_000))
    packed = {"Content-Encoding": "zstd"}
    server.before = lambda _: httpx.Response(200, stream=httpx.ByteStream(bomb), headers=packed)
    with pytest.raises(AnswerError, match="cannot be unpacked"):
        link.request("GET", "/", max_bytes=5000)


def test_numbers_that_do_not_rise_are_refused(server, head):
    server.publish(3)
    server.published.reverse()
    with pytest.raises(AnswerError, match="do not rise"):
        client_of(server).features()


@pytest.mark.parametrize("url", ["features.example", "ftp://features.example", "https://", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="is no address"):
        EdgeClient(url, "smile", TOKEN)


def test_a_token_does_not_go_over_the_network_in_clear():
    with pytest.raises(ConfigError, match="not encrypted"):
        EdgeClient("http://features.example:8000", "smile", TOKEN)
    for url in ("http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"):
        EdgeClient(url, "smile", TOKEN).close()
    EdgeClient("http://features.example:8000", "smile", TOKEN, plain_http=True).close()


@pytest.mark.parametrize("token", ["", "  ", "a b", "naïve", "two\nlines"])
def test_what_cannot_be_a_token_is_refused(token):
    with pytest.raises(ConfigError, match="token"):
        EdgeClient(URL, "smile", token)


def test_the_card_is_what_the_head_says(head):
    assert head.card == CARD
