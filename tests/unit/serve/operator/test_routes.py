"""Who gets to see the operator's page, what a form needs, and what every answer says to the browser."""

from __future__ import annotations

import pytest
from operator_page import HOSTILE, ORIGIN, Desk

from orchestrator.errors import UnavailableError
from serve.operator.sessions import LIFETIME_S
from serve.tenants.audit import AuditLog
from serve.tenants.gate import Places

BEHIND = [("GET", "/"), ("GET", "/look?sample=3"), ("POST", "/look"), ("GET", "/traffic"), ("POST", "/logout")]
HOST_COOKIE = "__Host-mm-operator"


@pytest.fixture
def desk(tmp_path):
    opened = Desk(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def inside(desk):
    assert desk.login().status_code == 303
    return desk


def shown(response) -> bool:
    return "/tasks/NAME" in response.text or "Digit 3" in response.text


def audited(desk) -> list[tuple[str, str, int, str]]:
    with AuditLog(Places(registry=desk.registry_path).audit) as log:
        return [(line.tenant, line.verb, line.outcome, line.detail) for line in log.lines()]


@pytest.mark.parametrize(("method", "path"), BEHIND)
def test_nobody_sees_anything_without_signing_in(desk, method, path):
    response = desk.request(method, path)
    assert response.status_code in {303, 401}
    assert not shown(response)
    assert desk.viewer.asked == []


def test_an_operators_token_opens_the_page(inside):
    page = inside.request("GET", "/")
    assert page.status_code == 200
    assert "Signed in as root" in page.text
    for cell in ("1.1-0123456789ab", "95.3", "+31.4", "0.21", "canary", "2 running", "4.00", "2.50"):
        assert cell in page.text


def test_the_cookie_is_for_this_server_alone_and_for_half_an_hour(desk):
    (cookie,) = desk.login().headers.get_list("set-cookie")
    name, *rules = [part.strip() for part in cookie.split(";")]
    assert name.startswith("mm-operator=")
    assert {rule.lower() for rule in rules} == {"httponly", "samesite=strict", "path=/", "max-age=1800"}
    assert desk.root not in cookie


@pytest.mark.parametrize(("base_url", "tls"), [("https://root.test", False), ("http://root.test", True)])
def test_under_tls_the_cookie_never_travels_without(tmp_path, base_url, tls):
    desk = Desk(tmp_path, base_url=base_url, tls=tls)
    (cookie,) = desk.login().headers.get_list("set-cookie")
    desk.close()
    assert cookie.startswith(f"{HOST_COOKIE}=")
    assert "; secure" in cookie.lower()


def test_a_token_that_opens_nothing_here_is_answered_alike_whatever_it_is(desk):
    tenant = desk.registry.add("alice", "tenant").token.text
    desk.registry.grant("alice", "loop")
    camera = desk.registry.add("camera", "device").token.text
    gone = desk.registry.add("old", "operator").token.text
    desk.registry.revoke("old")
    answers = [desk.login(token) for token in (tenant, camera, gone, "mm_0_0", "x" * 300, desk.root[:-1] + "_")]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert not any(answer.headers.get_list("set-cookie") for answer in answers)
    assert not shown(desk.request("GET", "/"))


def test_a_session_ends_by_itself_whatever_is_done_meanwhile(inside):
    for _ in range(3):
        inside.clock.now += LIFETIME_S / 3 - 1
        assert shown(inside.request("GET", "/"))
    inside.clock.now += 3
    ended = inside.request("GET", "/")
    assert ended.status_code == 303
    assert ended.headers["location"] == "/login"
    assert inside.request("GET", "/traffic").status_code == 401


def test_a_token_that_is_revoked_opens_nothing_from_the_next_request_on(inside):
    assert shown(inside.request("GET", "/"))
    inside.registry.revoke("root")
    assert not shown(inside.request("GET", "/look?sample=3"))
    assert inside.request("GET", "/").status_code == 303


def test_signing_out_ends_the_session_and_not_only_the_cookie(inside):
    kept = inside.cookies.copy() if hasattr(inside.cookies, "copy") else dict(inside.cookies)
    response = inside.request("POST", "/logout", data={"form_token": inside.form_token()})
    assert response.status_code == 303
    assert response.headers["location"] == "/login"
    assert "max-age=0" in response.headers["set-cookie"].lower()
    for name, value in dict(kept).items():
        inside.cookies.set(name, value, domain="root.test")
    assert inside.request("GET", "/").status_code == 303


def test_a_new_sign_in_ends_the_session_before_it(inside):
    before = dict(inside.cookies)
    inside.login()
    after = dict(inside.cookies)
    assert before != after
    inside.cookies.clear()
    inside.cookies.set("mm-operator", before["mm-operator"], domain="root.test")
    assert inside.request("GET", "/").status_code == 303


@pytest.mark.parametrize("cookie", ["", "mm-operator", "x" * 43, "\x80\xff", "a; b=c"])
def test_a_cookie_that_was_made_up_opens_nothing(desk, cookie):
    response = desk.request("GET", "/", headers={"Cookie": f"mm-operator={cookie}".encode("latin-1")})
    assert response.status_code == 303


def test_a_token_in_the_place_of_a_cookie_opens_nothing(desk):
    """A bearer header is for programs, and a page that took one would take it from any script."""
    assert not shown(desk.request("GET", "/", headers={"Authorization": f"Bearer {desk.root}"}))
    desk.cookies.set("mm-operator", desk.root, domain="root.test")
    assert not shown(desk.request("GET", "/"))


FOREIGN = [
    {"Origin": "http://evil.test"},
    {"Origin": "null"},
    {"Origin": "http://root.test.evil.test"},
    {"Origin": "http://root.test", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "http://root.test", "Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_a_form_of_another_page_is_not_taken(inside, headers):
    """Even one that somehow has the secret, and a browser that sends the cookie."""
    form_token = inside.form_token()
    assert inside.request("POST", "/logout", data={"form_token": form_token}, headers=headers).status_code == 403
    asked = {**headers, "X-Form-Token": form_token}
    assert inside.request("POST", "/look", content=b"image", headers=asked).status_code == 403
    assert inside.viewer.asked == []
    assert inside.request("POST", "/login", data={"token": inside.root}, headers=headers).status_code == 403
    assert shown(inside.request("GET", "/"))


@pytest.mark.parametrize("form_token", [None, "", "x" * 43])
def test_a_form_without_the_sessions_secret_is_not_taken(inside, form_token):
    """Even one of this origin."""
    fields = {} if form_token is None else {"form_token": form_token}
    assert inside.request("POST", "/logout", data=fields).status_code == 403
    headers = {} if form_token is None else {"X-Form-Token": form_token}
    assert inside.request("POST", "/look", content=b"image", headers=headers).status_code == 403
    assert inside.viewer.asked == []
    assert shown(inside.request("GET", "/"))


def test_the_secret_of_one_session_is_none_of_another(inside):
    other = inside.form_token()
    inside.login()
    assert inside.request("POST", "/logout", data={"form_token": other}).status_code == 403


def test_every_answer_forbids_scripts_frames_caches_and_requests_elsewhere(inside):
    paths = [("GET", "/"), ("GET", "/login"), ("GET", "/look?sample=3"), ("GET", "/traffic"), ("GET", "/look?sample=x")]
    files = [("GET", "/operator.css"), ("GET", "/operator.js")]
    for method, path in [*paths, *files, ("POST", "/logout"), ("POST", "/login"), ("GET", "/")]:
        headers = inside.request(method, path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["form-action"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["img-src"] == "data:"
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        # Under no-referrer a browser calls its own forms' origin null, and nobody could sign in.
        assert headers["referrer-policy"] == "same-origin"


def test_what_strangers_wrote_is_text(inside):
    form_token = inside.form_token()
    pages = [
        inside.request("GET", "/").text,
        inside.request("GET", "/look?sample=3").text,
        inside.request("POST", "/look", content=b"no image", headers={"X-Form-Token": form_token}).text,
    ]
    for page in pages:
        assert HOSTILE not in page
        assert "&lt;script&gt;alert(1)" in page
        assert "style=" not in page  # the policy would not apply it


def test_a_look_is_at_what_was_asked_for(inside):
    assert "Digit 7" in inside.request("GET", "/look?sample=7").text
    assert "Digit 8" in inside.request("GET", "/?sample=8").text  # without scripts
    look = inside.request("POST", "/look", content=b"image", headers={"X-Form-Token": inside.form_token()})
    assert look.status_code == 200
    assert inside.viewer.asked == [(7, None), (8, None), (1, b"image")]


@pytest.mark.parametrize("sample", ["-1", "x", "1e3", "9" * 10, "٣", "1.0", ""])
def test_a_number_that_is_none_is_refused(inside, sample):
    assert inside.request("GET", "/look", params={"sample": sample}).status_code == 400
    assert inside.viewer.asked == []


def test_an_image_that_is_too_large_is_not_looked_at(inside):
    headers = {"X-Form-Token": inside.form_token()}
    assert inside.request("POST", "/look", content=bytes(1001), headers=headers).status_code == 413
    assert inside.viewer.asked == []


def test_a_catalog_that_is_away_leaves_the_page_and_says_so(inside):
    inside.viewer.error = UnavailableError("MLflow does not answer")
    page = inside.request("GET", "/")
    assert page.status_code == 200
    assert "MLflow does not answer" in page.text


def test_a_fault_of_the_program_tells_nothing(inside):
    inside.viewer.error = RuntimeError("secret /home/me")
    page = inside.request("GET", "/")
    assert page.status_code == 500
    assert "secret" not in page.text


def test_too_many_requests_are_refused_with_the_time_to_wait(inside):
    inside.registry.set_rate("root", 2)
    answers = [inside.request("GET", "/traffic") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert int(answers[-1].headers["retry-after"]) > 0
    assert inside.request("GET", "/").status_code == 429


def test_what_was_done_is_written_down_and_what_refreshes_itself_is_not(inside):
    inside.request("GET", "/")
    inside.request("GET", "/traffic")
    inside.request("POST", "/look", content=b"image", headers={"X-Form-Token": "wrong"})
    done = [line for line in audited(inside) if line[0] == "root"]
    assert done == [
        ("root", "operate", 200, "signed in"),
        ("root", "operate", 200, "GET /"),
        ("root", "operate", 403, "POST /look"),
    ]


def test_a_sign_in_that_fails_is_written_down(desk):
    desk.login("mm_0000000000000000_" + "a" * 43)
    assert audited(desk) == [("", "operate", 401, "")]


def test_below_the_page_there_is_nothing_as_before(inside):
    bearer = {"Authorization": f"Bearer {inside.root}"}
    for method, path in [("GET", "/tasks/loop/metadata"), ("PUT", "/"), ("GET", "/look/x"), ("POST", "/traffic")]:
        assert inside.request(method, path).status_code == 401
        assert inside.request(method, path, headers=bearer).status_code == 404


def test_the_origin_is_that_of_the_host_that_was_asked(inside):
    assert inside.base_url == ORIGIN
    assert inside.login(origin="http://root.test:8000").status_code == 403
