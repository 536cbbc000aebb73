"""``python -m serve.edge`` and its training sister: what they print, and how they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fake_task_server import TOKEN, FakeTaskServer
from small_head import small_head, small_map_head

from orchestrator.consumer import Consumer, ConsumerConfig
from orchestrator.errors import UnavailableError
from orchestrator.wire import FeatureContract, TaskOffer
from serve.edge import client, train
from serve.edge.__main__ import main
from serve.edge.head import Head
from serve.edge.link import Link
from serve.remote.trainer import Trained
from tasks.spec import TaskSpec


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


def test_maps_are_summed_up_and_written(server, flags, capsys, tmp_path):
    server.task = "drawing"
    z, path, folder = server.publish(2), small_map_head(tmp_path / "map.onnx"), tmp_path / "all" / "maps"
    asked = [*flags, "--task", "drawing", "--head", str(path), "--precision", "fp32"]
    assert main(asked) == 0
    drawn = Head.load(path).maps(z)
    wanted = f"a map of 2x9x6, {drawn[0].min():.4f} to {drawn[0].max():.4f}, mean {drawn[0].mean():.4f}"
    assert capsys.readouterr().out.splitlines()[0] == f"1\t2023-11-14T22:13:20.001+00:00\t{wanted}"
    assert main([*asked, "--maps", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(f"\t{folder}/2.npy")
    assert sorted(file.name for file in folder.iterdir()) == ["1.npy", "2.npy"]
    np.testing.assert_allclose(np.load(folder / "2.npy", allow_pickle=False), drawn[1], atol=1e-6)
    assert main([*asked, "--maps", str(folder), "--json", "--after", "1"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (found["sequence"], found["shape"], found["file"]) == (2, [2, 9, 6], f"{folder}/2.npy")
    assert found["mean"] == pytest.approx(drawn[1].mean(), abs=1e-6)
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["file"] is None


def test_what_was_missed_is_said(server, flags, capsys):
    server.publish(9)
    server.forget(below=5)
    assert main([*flags, "--after", "2"]) == 0
    assert "does not keep the features after 2 any more; going on from 5" in capsys.readouterr().err


def test_a_version_on_trial_is_no_mistake(server, flags, capsys):
    server.publish(1)
    server.canary = ("1.3-ffffffffffff", 0.25)
    server.publish(1, version="1.3-ffffffffffff")
    assert main(flags) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert err == "note: 25% of the features are of another version than the head's now, and are passed over\n"


def test_a_version_that_is_served_no_more_is_said_and_waited_for_with_follow(server, flags, capsys):
    server.publish(1)
    server.version = "1.3-ffffffffffff"
    assert main(flags) == 2
    assert "export the head of that version" in capsys.readouterr().err
    assert main([*flags, "--follow", "--patience-s", "0.3"]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith(
        "note: the producer serves version 1.3-ffffffffffff now; waiting for features of version 1.2-"
    )
    assert error.startswith("error: the head is for version 1.2-")


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
        (["--maps", "folder"], 2, "gives no map to write"),
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


@pytest.fixture
def trained():
    spec = TaskSpec(name="drawing", target="drawing", shape=(1, 6, 5), head="map", loss="mse", metrics=("psnr",))
    contract = FeatureContract(task="drawing", shape=(8, 4, 4))
    offer = TaskOffer(spec=spec, contract=contract, backbone="resnet18", split_index=5, n_train=10)
    consumer = Consumer(offer, ConsumerConfig(total_steps=1))
    return Trained(
        task="drawing",
        version="1.2-0123456789ab",
        reason="",
        offer=offer,
        head=consumer.head(),
        network=consumer.network(),
        test=None,
    )


def test_a_trained_head_of_maps_is_written_for_the_edge_client(trained, tmp_path):
    train._keep(trained, tmp_path)
    head = Head.load(tmp_path / "drawing" / "drawing-1.2-0123456789ab.onnx")
    assert head.card.answer_shape == (1, 6, 5)
    z = np.random.default_rng(0).standard_normal((2, 8, 4, 4)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(head.maps(z), trained.network(torch.from_numpy(z)).numpy(), atol=1e-4)


def test_a_head_that_cannot_be_written_is_said_to_be_among_the_states(trained, tmp_path):
    (tmp_path / "drawing").write_text("a file where the folder would be")
    with pytest.raises(UnavailableError, match="started again at once, has it from the states that it kept"):
        train._keep(trained, tmp_path)


def test_a_training_keeps_the_memory_that_it_freed(flags, tmp_path, monkeypatch, capsys):
    """As a hosted tenant's actor does."""
    told: list[str] = []
    monkeypatch.setattr("orchestrator.memory.keep_freed_memory", lambda: told.append("kept"))
    token = flags[flags.index("--token-file") + 1]
    asked = ["--url", "http://127.0.0.1:1", "--task", "smile", "--token-file", token, "--patience-s", "0"]
    folders = ["--key-file", str(tmp_path / "key"), "--state", str(tmp_path / "states")]
    assert train.main([*asked, *folders]) == 1
    assert told == ["kept"]
    assert "did not answer" in capsys.readouterr().err
