"""The command of tenants: what it sets is what the gate does, and a token is seen once."""

from __future__ import annotations

import json
import re
import sqlite3
import stat
import time
from pathlib import Path

import pytest

from pipelines import tenants
from pipelines.command import execute
from serve.tenants.errors import Refused
from serve.tenants.gate import Gate, Places
from serve.tenants.moments import moment, span

TOKEN = re.compile(r"mm_[0-9a-f]{16}_[A-Za-z0-9_-]{43}")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> Places:
    monkeypatch.setenv("METAMORPHOSIS_HOME", str(tmp_path / "home"))
    return Places(registry=tmp_path / "home" / "tenants" / "registry.db")


def run(*flags: str) -> int:
    try:
        return execute("serve.tenants.settings:TenantsSettings", tenants.run, flags, prog="tenants.py")
    except SystemExit as end:
        return int(end.code or 0)


def add(capsys, *flags: str) -> str:
    """The token."""
    assert run("add", *flags) == 0
    (token,) = TOKEN.findall(capsys.readouterr().out)
    return token


def answer(places: Places, token: str, task="smile", verb="read", *, charge: int = 0, bits: float | None = None) -> int:
    gate = Gate(places.registry)
    try:
        admission = gate.admit(f"Bearer {token}", task=task, verb=verb)
        if charge:
            digests = [bytes([i] * 16) for i in range(charge)] if bits else []
            admission.charge(digests, "1", bits, True, charge)
    except Refused as error:
        return error.status
    finally:
        gate.close()
    return 200


def listed(capsys, *flags: str):
    capsys.readouterr()
    assert run("list", "--json", *flags) == 0
    return json.loads(capsys.readouterr().out)["tenants"]


def test_one_command_makes_a_tenant_known_grants_its_tasks_and_sets_every_quota(capsys, places):
    flags = ("--tasks", "smile,pose", "--features", "3", "--bits", "20", "--requests-per-minute", "100")
    token = add(capsys, "alice", *flags)
    assert [answer(places, token, task) for task in ("smile", "pose", "glasses")] == [200, 200, 404]
    assert answer(places, token, verb="publish") == 404
    assert [answer(places, token, charge=n) for n in (2, 2, 1, 1)] == [200, 403, 200, 403]
    assert [answer(places, token, "pose", charge=2, bits=8.0) for _ in range(2)] == [200, 403]
    (alice,) = listed(capsys)
    assert (alice["name"], alice["role"], alice["requests_per_minute"]) == ("alice", "tenant", 100)
    pose, smile = alice["grants"]
    assert (smile["features"], smile["features_limit"], smile["bits"], smile["bits_limit"]) == (3, 3, 0, 20)
    assert (pose["features"], pose["bits"]) == (2, 16)


def test_requests_per_minute_are_those_that_were_asked_for_and_can_be_any_again(capsys, places):
    token = add(capsys, "alice", "--tasks", "smile", "--requests-per-minute", "2")
    assert [answer(places, token) for _ in range(3)] == [200, 200, 429]
    assert run("grant", "alice", "--requests-per-minute", "any") == 0
    assert [answer(places, token) for _ in range(3)] == [200, 200, 200]


def test_a_bounded_task_gives_nothing_until_its_bits_are_set(capsys, places):
    token = add(capsys, "alice", "--tasks", "smile")
    assert answer(places, token, charge=1, bits=4.0) == 403
    assert run("grant", "alice", "smile", "--bits", "any") == 0
    assert answer(places, token, charge=1, bits=4.0) == 200
    assert listed(capsys)[0]["grants"][0]["bits_limit"] == "none"


@pytest.mark.parametrize(
    ("role", "may"), [("tenant", {"read", "metadata", "train"}), ("device", {"publish"}), ("operator", {"operate"})]
)
def test_a_role_may_what_it_is_for_and_nothing_else(capsys, places, role, may):
    token = add(capsys, "who", "--role", role, *(() if role == "operator" else ("--tasks", "smile")))
    verbs = ("read", "metadata", "train", "publish", "operate")
    assert {verb for verb in verbs if answer(places, token, verb=verb) == 200} == may


def test_only_the_verbs_that_are_named_are_granted_and_more_are_added(capsys, places):
    token = add(capsys, "alice", "--tasks", "smile", "--verbs", "metadata")
    assert [answer(places, token, verb=verb) for verb in ("metadata", "read")] == [200, 404]
    assert run("grant", "alice", "smile", "--verbs", "read") == 0
    assert [answer(places, token, verb=verb) for verb in ("metadata", "read", "train")] == [200, 200, 404]


def test_a_token_expires_when_it_was_asked_to(capsys, places):
    token = add(capsys, "alice", "--tasks", "smile", "--expires", "90d")
    ends = listed(capsys)[0]["tokens"][0]["expires"]
    assert ends == pytest.approx(time.time() + 90 * 86_400, abs=60)
    gate = Gate(places.registry, clock=lambda: ends)
    with pytest.raises(Refused) as refused:
        gate.admit(f"Bearer {token}", task="smile", verb="read")
    gate.close()
    assert refused.value.status == 401


def test_rotation_ends_the_old_token_at_once_or_after_its_grace(capsys, places):
    first = add(capsys, "alice", "--tasks", "smile")
    assert run("rotate", "alice", "--grace", "1h") == 0
    (second,) = TOKEN.findall(capsys.readouterr().out)
    assert [answer(places, token) for token in (first, second)] == [200, 200]
    assert run("rotate", "alice") == 0
    (third,) = TOKEN.findall(capsys.readouterr().out)
    assert [answer(places, token) for token in (first, second, third)] == [401, 401, 200]


def test_revoking_ends_one_token_all_of_them_or_a_grant(capsys, places):
    first = add(capsys, "alice", "--tasks", "smile,pose")
    run("rotate", "alice", "--grace", "1h")
    (second,) = TOKEN.findall(capsys.readouterr().out)
    assert run("revoke", "alice", "--token", first.split("_")[1]) == 0
    assert [answer(places, token) for token in (first, second)] == [401, 200]
    assert run("revoke", "alice", "--tasks", "smile") == 0
    assert [answer(places, second, task) for task in ("smile", "pose")] == [404, 200]
    assert run("revoke", "alice") == 0
    assert answer(places, second, "pose") == 401


def test_a_token_is_shown_once_and_is_in_no_file_and_no_later_output(capsys, places, tmp_path):
    token = add(capsys, "alice", "--tasks", "smile")
    for flags in (("list",), ("list", "--json"), ("audit",), ("grant", "alice", "pose"), ("revoke", "alice")):
        assert run(*flags) == 0
    said = capsys.readouterr()
    secret = token.split("_", 2)[2]
    assert secret not in said.out + said.err
    assert token.split("_")[1] in said.out  # its id is told
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_token_file_is_for_its_owner_alone_and_the_token_is_not_printed(capsys, places, tmp_path):
    path = tmp_path / "keys" / "alice.token"
    assert run("add", "alice", "--tasks", "smile", "--token-file", str(path)) == 0
    said = capsys.readouterr()
    token = path.read_text().strip()
    assert TOKEN.fullmatch(token)
    assert token not in said.out + said.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert answer(places, token) == 200
    assert run("rotate", "alice", "--token-file", str(path)) == 0, "a token may be replaced by the next"
    assert [answer(places, old) for old in (token, path.read_text().strip())] == [401, 200]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_nobody_is_added_if_the_token_file_cannot_be_written(capsys, tmp_path):
    add(capsys, "bob")
    (tmp_path / "notes.txt").write_text("mine")
    for path, says in (
        (tmp_path / "notes.txt", "already"),
        (tmp_path, "is a folder"),
        (tmp_path / "notes.txt" / "x", "cannot write the token"),
    ):
        assert run("add", "alice", "--token-file", str(path)) == 2
        assert says in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [record["name"] for record in listed(capsys)] == ["bob"]


def test_a_token_that_cannot_be_handed_over_is_revoked(capsys, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serve.private_files.os.fsync", full)
    assert run("add", "alice", "--token-file", str(tmp_path / "token")) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "tenants.py rotate alice" in said
    assert not (tmp_path / "token").exists()
    assert listed(capsys)[0]["tokens"][0]["revoked"] is not None


def test_everything_that_was_done_is_in_the_audit_log_beside_what_was_asked_for(capsys, places):
    token = add(capsys, "alice", "--tasks", "smile", "--bits", "8")
    answer(places, token, "pose")
    run("revoke", "alice", "--tasks", "smile")
    run("rotate", "alice")
    run("revoke", "alice")
    capsys.readouterr()
    assert run("audit", "--json") == 0
    *lines, head = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(line["verb"], line["task"], line["outcome"]) for line in lines] == [
        ("add", "", 200),
        ("grant", "smile", 200),
        ("quota", "smile", 200),
        ("read", "pose", 404),
        ("take back", "smile", 200),
        ("rotate", "", 200),
        ("revoke", "", 200),
    ]
    assert head["head"].startswith("7:")
    assert run("audit", "--last", "0", "--noted", head["head"]) == 0


@pytest.mark.parametrize("fault", ["changed", "cut off"])
def test_a_log_that_was_tampered_with_ends_with_status_1_and_says_where(capsys, places, fault):
    add(capsys, "alice", "--tasks", "smile,pose")
    run("audit", "--last", "0")
    head = capsys.readouterr().out.split()[-1]
    assert run("audit", "--last", "0", "--noted", head) == 0
    with sqlite3.connect(places.audit) as db:
        db.executescript("DROP TRIGGER lines_do_not_change; DROP TRIGGER lines_stay;")
        db.execute(
            "UPDATE lines SET task = 'x' WHERE number = 2"
            if fault == "changed"
            else "DELETE FROM lines WHERE number = 3"
        )
    db.close()
    capsys.readouterr()
    assert run("audit", "--noted", head) == 1
    said = capsys.readouterr()
    assert "tampered with" in said.err
    assert "alice" in said.out, "the lines are shown all the same"
    assert ("line 2" in said.err) == (fault == "changed")


def test_lines_cannot_draw_on_the_terminal_of_who_reads_them(capsys, places):
    gate = Gate(places.registry)
    gate.audit(None, task="[red]x[/red]", verb="\x1b[2Jread", outcome=404, detail="a\nb")
    gate.close()
    assert run("audit") == 0
    said = capsys.readouterr().out
    assert "[red]x[/red]" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("add", "Alice"), "lower case"),
        (("add", "alice", "--tasks", "Smile"), "lower case"),
        (("add", "alice", "--tasks", "smile", "--verbs", "write"), "no verb named 'write'"),
        (("add", "alice", "--tasks", "smile", "--verbs", "publish"), "a tenant may be granted"),
        (("add", "cam", "--role", "device", "--tasks", "smile", "--verbs", "read"), "a device may be granted publish"),
        (("add", "root", "--role", "operator", "--tasks", "smile"), "leave --tasks out"),
        (("add", "alice", "--features", "3"), "name them"),
        (("add", "alice", "--requests-per-minute", "0"), "at least 1"),
        (("add", "alice", "--tasks", "smile", "--features", "-1"), "features must be"),
        (("add", "alice", "--tasks", "smile", "--bits", "nan"), "bits must be"),
        (("add", "alice", "--expires", "soon"), "no moment"),
        (("add", "alice", "--expires", "2001-01-01"), "must expire in the future"),
        (("add", "bob"), "there is a 'bob' already"),
        (("grant", "bob"), "name tasks to grant"),
        (("grant", "alice", "smile"), "no tenant, device or operator named 'alice'"),
        (("revoke", "bob", "--token", "00"), "no token of 'bob' named '00'"),
        (("revoke", "bob", "--tasks", "smile"), "no task granted to 'bob' named 'smile'"),
        (("revoke", "bob", "--token", "00", "--tasks", "smile"), "--token or --tasks"),
        (("rotate", "bob", "--grace", "-1s"), "usage"),
        (("rotate", "bob", "--grace", "1 fortnight"), "no span of time"),
        (("list", "alice"), "no tenant, device or operator named 'alice'"),
        (("audit", "--last", "-1"), "last must be"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_changes_nothing(capsys, flags, says):
    add(capsys, "bob")
    before = listed(capsys)
    assert run(*flags) == 2
    said = capsys.readouterr().err
    if says != "usage":
        assert says in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    assert listed(capsys) == before


@pytest.mark.parametrize("flags", [("list",), ("grant", "a", "b"), ("revoke", "a"), ("rotate", "a"), ("audit",)])
def test_where_there_is_no_registry_none_is_begun_by_the_way(capsys, places, flags):
    assert run(*flags) == 2
    assert "there is no" in capsys.readouterr().err
    assert not places.registry.parent.exists()


def test_a_file_that_is_no_registry_is_left_alone(capsys, tmp_path):
    path = tmp_path / "notes.db"
    path.write_text("mine, and no SQLite file at all" * 100)
    assert run("list", "--registry", str(path)) == 1
    assert "registry of tenants" in capsys.readouterr().err
    assert path.read_text().startswith("mine")


def test_a_noted_head_that_is_none_is_refused(capsys):
    add(capsys, "bob")
    assert run("audit", "--noted", "nonsense") == 1
    assert "LINES:DIGEST" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("90d", 1_000.0 + 90 * 86_400),
        ("1.5h", 1_000.0 + 5_400),
        ("2027-01-31", 1_801_353_600.0),
        ("2027-01-31T08:00", 1_801_382_400.0),
        ("2027-01-31T08:00+01:00", 1_801_378_800.0),
        ("2027-01-31T08:00Z", 1_801_382_400.0),
    ],
)
def test_moments_are_spans_from_now_on_or_dates_in_utc(text, at):
    assert moment(text, now=1_000.0) == at


@pytest.mark.parametrize("text", ["", "d", "-1d", "1y", "nan", "2027-13-01", "9" * 9 + "w", "99999-01-01", "٣d"])
def test_what_is_no_moment_is_refused(text):
    from orchestrator.errors import ConfigError

    with pytest.raises(ConfigError, match=r"no moment|later than"):
        moment(text, now=0.0)
    if text != "9" * 9 + "w":
        with pytest.raises(ConfigError):
            span(text)


def test_the_registry_is_where_storage_or_the_flag_says(capsys, places, tmp_path):
    add(capsys, "alice")
    add(capsys, "bob", "--storage", str(tmp_path / "other"))
    add(capsys, "carol", "--registry", str(tmp_path / "own" / "r.db"))
    assert places.registry.exists()
    assert Places.in_storage(tmp_path / "other").registry.exists()
    assert {path.name for path in Path(tmp_path / "own").iterdir() if path.suffix == ".db"} == {
        "r.db",
        "r-audit.db",
        "r-bits.db",
    }
