"""``python -m serve.edge`` and its training sister: what they print, and how they refuse."""

from __future__ import annotations

import json

import pytest
from fake_task_server import TOKEN, FakeTaskServer
from small_head import small_head

from serve.edge import client, train
from serve.edge.__main__ import main
from serve.edge.link import Link


@pytest.fixture
def server(monkeypatch):
    """The command's server."""
    server = FakeTaskServer()
    monkeypatch.setattr(client, "Link", lambda *a, **k: Link(*a, **{**k, "transport": server.transport()}))
    return server


@pytest.fixture
def flags(tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    head = small_head(tmp_path / "head.onnx")
    return ["--url", "https://x.example", "--task", "smile", "--token-file", str(token), "--head", str(head)]


def test_it_prints_a_line_a_feature(server, flags, capsys):
    server.publish(3)
    assert main(flags) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert lines[0][1] == "2023-11-14T22:13:20.001+00:00"
    assert {line[2] for line in lines} <= {"no", "yes", "unsure"}
    assert all(1 / 3 <= float(line[3]) <= 1 for line in lines)


def test_json_lines_hold_every_class(server, flags, capsys):
    server.publish(2)
    assert main([*flags, "--json", "--after", "1", "--precision", "int8"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["sequence"] == 2
    assert found["version"] == server.version
    assert sum(found["probabilities"]) == pytest.approx(1)


def test_what_was_missed_is_said(server, flags, capsys):
    server.publish(9)
    server.forget(below=5)
    assert main([*flags, "--after", "2"]) == 0
    assert "does not keep the features after 2 any more; going on from 5" in capsys.readouterr().err


def test_follow_ends_with_the_users_interrupt(server, flags, capsys):
    server.publish(1)

    def before(request):
        if request.url.params.get("after") == "1":
            raise KeyboardInterrupt

    server.before = before
    assert main([*flags, "--follow"]) == 130
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        (["--task", "other"], 2, "the head is of task 'smile'"),
        (["--url", "http://x.example"], 2, "is not encrypted"),
        (["--head", "missing.onnx"], 2, "cannot read the head missing.onnx"),
        (["--token-file", "missing"], 2, "cannot read the token in missing"),
        (["--ca", "missing.pem"], 2, "cannot read the certificate authority in missing.pem"),
        (["--state", "missing/place"], 2, "cannot keep the place"),
        (["--after", "-1"], 2, "go on after 0 or more"),
        (["--patience-s", "-1"], 2, "the total >= 0"),
    ],
)
def test_a_mistake_is_one_line(server, flags, capsys, change, status, told):
    assert main([*flags, *change]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1


def test_a_token_that_others_can_read_is_refused(server, flags, capsys, tmp_path):
    (tmp_path / "token").chmod(0o644)
    assert main(flags) == 2
    assert "others can read the token" in capsys.readouterr().err


def test_a_key_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "key"
    made = train.read_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert train.read_key(path).to_bytes() == made.to_bytes()
    path.chmod(0o640)
    with pytest.raises(train.DataError, match="others can read the key"):
        train.read_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(train.DataError, match="is no tenant's key"):
        train.read_key(path)
    with pytest.raises(train.DataError, match="cannot write a new key"):
        train.read_key(tmp_path / "missing" / "key")
