import errno
import hashlib
import itertools
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.exceptions import MlflowException

from orchestrator import catalog_registry
from orchestrator.catalog import Catalog, catalogs
from orchestrator.catalog_records import EncoderRecord, TaskEntry, TaskRecord
from orchestrator.catalog_registry import Registry
from orchestrator.checkpoint import weights_hash
from orchestrator.errors import (
    AlreadyPublishedError,
    CheckpointError,
    ConfigError,
    MetaMorphosisError,
    NotPublishedError,
    PublishConflictError,
    UnavailableError,
)
from orchestrator.mlflow_store import check_reachable, open_client, sqlite_path
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.tracking import open_tracker
from tasks.spec import TaskSpec

GUARANTEE = Guarantee(
    mode="surrogate_then_freeze", n_train=100, covers=("encoder",), excludes=("heads",), epsilon=2.5, delta=1e-3
)
_names = itertools.count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the module: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def catalog(store: str) -> Catalog:
    """An empty catalog of its own for every test."""
    return Catalog(store, f"catalog{next(_names)}")


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(3, 2, generator=generator), "a.bias": torch.randn(3, generator=generator)}


def encoder_record(**changes: Any) -> EncoderRecord:
    values: dict[str, Any] = {
        "backbone": "resnet18",
        "split_index": 6,
        "image_size": 64,
        "feature_shape": (128, 8, 8),
        "data_fingerprint": "f" * 64,
        "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "flip": False,
        "data": {"settings": {"data": "digits", "split_seed": 0}, "private": None},
        "guarantee": GUARANTEE.to_json(),
        "run_id": "run-of-the-encoder",
    }
    return EncoderRecord(**(values | changes))


def entry(task: str, seed: int = 0, **changes: Any) -> TaskEntry:
    values: dict[str, Any] = {
        "spec": TaskSpec(name=task, target=task, classes=("no", "yes")),
        "module_config": {"kind": "cross_sec", "channels": 128},
        "module_state": weights(seed),
        "head_config": {"kind": "linear", "n_outputs": 2},
        "head_state": weights(seed + 1000),
        "metrics": {"accuracy": 0.75},
        "guarantee": GUARANTEE.to_json(),
    }
    return TaskEntry(**(values | changes))


def with_encoder(catalog: Catalog) -> Catalog:
    catalog.publish_encoder(encoder_record(), weights(99))
    return catalog


def publish(catalog: Catalog, *tasks: str, expected: tuple[str, ...] = (), seed: int = 0) -> list[TaskRecord]:
    return catalog.publish_tasks("latest", [entry(t, seed) for t in tasks], expected=frozenset(expected))


def artefacts(catalog: Catalog) -> Path:
    database = sqlite_path(catalog.uri)
    assert database is not None
    return database.parent / "artifacts" / f"{catalog.name}.catalog"


# -- encoders ----------------------------------------------------------------------------------------------------------


def test_a_published_encoder_comes_back_with_its_weights_and_everything_that_was_said_of_it(catalog: Catalog) -> None:
    published = catalog.publish_encoder(encoder_record(), weights(1))
    found, state = Catalog(catalog.uri, catalog.name).encoder("latest")
    assert weights_hash(state) == weights_hash(weights(1))
    assert found == published
    assert (found.version, found.feature_shape, found.run_id) == ("1", (128, 8, 8), "run-of-the-encoder")
    assert re.fullmatch(r"[0-9a-f]{64}", found.weights_sha256)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found.created)
    assert Guarantee.from_json(dict(found.guarantee)) == GUARANTEE


def test_versions_count_up_and_an_old_one_stays_as_it_is(catalog: Catalog) -> None:
    for seed in range(3):
        catalog.publish_encoder(encoder_record(split_index=5 + seed), weights(seed))
    assert [(e.version, e.split_index) for e in catalog.encoders()] == [("1", 5), ("2", 6), ("3", 7)]
    assert catalog.encoder_versions() == ["1", "2", "3"]
    assert catalog.encoder("latest")[0].version == "3"
    assert weights_hash(catalog.encoder("1")[1]) == weights_hash(weights(0))


def test_an_unknown_encoder_is_named_beside_the_known_ones(catalog: Catalog) -> None:
    with pytest.raises(NotPublishedError, match=f"no encoder is published in catalog '{catalog.name}' at sqlite"):
        catalog.encoder("latest")
    with_encoder(with_encoder(catalog))
    for version in ("7", "0", "-1", "one", "", "²"):
        with pytest.raises(NotPublishedError, match=rf"no encoder '{version}' in catalog .*; known: 1, 2, or latest"):
            catalog.encoder(version)
        with pytest.raises(NotPublishedError):
            catalog.tasks(version)


def test_the_catalogs_of_a_store_are_those_with_an_encoder(catalog: Catalog) -> None:
    assert catalog.name not in catalogs(catalog.uri)
    open_client(catalog.uri).create_registered_model(
        f"{catalog.name}.encoder"
    )  # a publisher that died before the version
    open_client(catalog.uri).create_registered_model(f"{catalog.name}-of somebody else.encoder")
    assert catalog.name not in catalogs(catalog.uri)
    with_encoder(catalog)
    assert catalog.name in catalogs(catalog.uri)
    assert catalogs(catalog.uri) == sorted(catalogs(catalog.uri))


@pytest.mark.parametrize("name", ["", "a.b", "a b", "-a", "a/b", "x" * 64, "a'b", "a%"])
def test_a_name_that_could_be_mistaken_for_another_is_refused(store: str, name: str) -> None:
    with pytest.raises(ConfigError, match="choose one with --catalog"):
        Catalog(store, name)


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_published_tasks_come_back_with_modules_heads_and_everything_that_was_said_of_them(catalog: Catalog) -> None:
    with_encoder(catalog)
    metrics = {"accuracy": 0.9, "auc": math.nan}
    smile, hidden, own = catalog.publish_tasks(
        "1",
        [
            entry("smile", 1, metrics=metrics),
            entry("age", 2, private=True),
            entry("own_head", 3, head_config=None, head_state=None, module_state={}),
        ],
        expected=frozenset(),
        run_id="run-of-the-tasks",
    )
    found = Catalog(catalog.uri, catalog.name).tasks("latest")
    assert list(found) == ["smile", "age", "own_head"]
    assert [found[t].to_json() for t in found] == [r.to_json() for r in (smile, hidden, own)]
    assert found["smile"].metrics["accuracy"] == 0.9
    assert math.isnan(found["smile"].metrics["auc"])
    assert [found[t].private for t in found] == [False, True, False]
    assert {(r.version, r.encoder_version, r.run_id) for r in found.values()} == {("1.1", "1", "run-of-the-tasks")}
    assert found["smile"].guarantee_text == GUARANTEE.statement()
    assert found["smile"].spec == TaskSpec(name="smile", target="smile", classes=("no", "yes"))

    record, module, head = catalog.load_task("1", "smile")
    assert record.to_json() == smile.to_json()
    assert weights_hash(module) == weights_hash(weights(1))
    assert head is not None
    assert weights_hash(head) == weights_hash(weights(1001))
    assert catalog.load_task("1", "own_head")[1:] == ({}, None)
    with pytest.raises(NotPublishedError, match=r"no task 'frown' .* for encoder 1 .*; known: age, own_head, smile"):
        catalog.load_task("1", "frown")


def test_tasks_belong_to_one_encoder(catalog: Catalog) -> None:
    with_encoder(catalog)
    publish(catalog, "smile")
    with_encoder(catalog)
    assert catalog.tasks("latest") == {}
    publish(catalog, "smile", seed=5)
    assert weights_hash(catalog.load_task("1", "smile")[1]) == weights_hash(weights(0))
    assert weights_hash(catalog.load_task("2", "smile")[1]) == weights_hash(weights(5))
    assert catalog.tasks("2")["smile"].version == "2.1"


def test_the_registry_shows_every_network_with_its_guarantee_and_lineage(catalog: Catalog) -> None:
    with_encoder(catalog)
    (record,) = publish(catalog, "smile")
    client = open_client(catalog.uri)
    expected = {
        f"{catalog.name}.encoder": catalog.encoder()[0].weights_sha256,
        f"{catalog.name}.module.smile": record.module_sha256,
        f"{catalog.name}.head.smile": record.head_sha256,
    }
    for name, digest in expected.items():
        (version,) = client.search_model_versions(f"name = '{name}'")
        assert version.tags["weights_sha256"] == digest
        assert version.tags["guarantee"] == GUARANTEE.short()
        assert version.tags["training_run"] == "run-of-the-encoder"
        assert version.description == GUARANTEE.statement()
        folder = Path(client.get_model_version_download_uri(name, version.version))
        assert hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest() == digest
        assert (folder / "config.json").exists()


def test_every_published_file_is_safetensors_or_json(catalog: Catalog) -> None:
    with_encoder(catalog)
    publish(catalog, "smile", "age")
    files = [p for p in artefacts(catalog).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    assert len(files) == 3 + 9


# -- compare and swap --------------------------------------------------------------------------------------------------


def test_a_task_is_published_once_and_never_changes(catalog: Catalog) -> None:
    with_encoder(catalog)
    publish(catalog, "smile")
    before = catalog.published_hashes("latest")
    for expected in ((), ("smile",)):
        with pytest.raises(AlreadyPublishedError, match="task 'smile' is already published for encoder 1"):
            publish(catalog, "age", "smile", expected=expected, seed=7)
    assert catalog.published_hashes("latest") == before
    assert list(catalog.tasks("latest")) == ["smile"]


def test_a_task_published_meanwhile_is_a_conflict_that_names_it(catalog: Catalog) -> None:
    with_encoder(catalog)
    publish(catalog, "smile")
    with pytest.raises(PublishConflictError, match=r"published for encoder 1 after this training began: smile\."):
        publish(catalog, "age")
    assert list(catalog.tasks("latest")) == ["smile"]
    (record,) = publish(catalog, "age", expected=("smile",))
    assert record.version == "1.2"
    with pytest.raises(PublishConflictError, match="no longer published for encoder 1: glasses"):
        publish(catalog, "hat", expected=("smile", "age", "glasses"))
    assert list(catalog.tasks("latest")) == ["smile", "age"]


def test_publishing_to_no_encoder_nothing_or_one_task_twice(catalog: Catalog) -> None:
    with pytest.raises(NotPublishedError):
        publish(catalog, "smile")
    with_encoder(catalog)
    assert publish(catalog) == []
    with pytest.raises(ConfigError, match="named twice"):
        publish(catalog, "smile", "smile")
    assert catalog.tasks("latest") == {}


def test_of_publishers_at_the_same_moment_exactly_one_wins_and_the_others_learn_who(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_encoder(catalog)
    n = 4
    barrier, take = threading.Barrier(n), Registry.take
    outcomes: dict[str, object] = {}

    def take_together(self: Registry, name: str, tags: Any, *, description: str) -> bool:
        if ".publication." in name:
            barrier.wait(60)
        return take(self, name, tags, description=description)

    def work(task: str) -> None:
        try:
            outcomes[task] = publish(Catalog(catalog.uri, catalog.name), task)[0]
        except MetaMorphosisError as error:
            outcomes[task] = error

    monkeypatch.setattr(Registry, "take", take_together)
    threads = [threading.Thread(target=work, args=(f"task{i}",)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [task for task, outcome in outcomes.items() if isinstance(outcome, TaskRecord)]
    losers = [outcome for task, outcome in outcomes.items() if task != winner]
    assert [type(error) for error in losers] == [PublishConflictError] * (n - 1)
    assert all(f": {winner}." in str(error) for error in losers)
    assert list(catalog.tasks("latest")) == [winner]
    with pytest.raises(NotPublishedError):
        catalog.load_task("latest", next(t for t in outcomes if t != winner))
    # What the losers uploaded is gone from the list of runs.
    client = open_client(catalog.uri)
    experiment = client.get_experiment_by_name(f"{catalog.name}.catalog")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_the_same_task_twice_at_the_same_moment_is_published_once(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_encoder(catalog)
    take, rival = Registry.take, Catalog(catalog.uri, catalog.name)

    def overtaken(self: Registry, name: str, tags: Any, *, description: str) -> bool:
        monkeypatch.setattr(Registry, "take", take)
        publish(rival, "smile", seed=3)
        return take(self, name, tags, description=description)

    monkeypatch.setattr(Registry, "take", overtaken)
    with pytest.raises(AlreadyPublishedError):
        publish(catalog, "smile", seed=4)
    assert weights_hash(catalog.load_task("latest", "smile")[1]) == weights_hash(weights(3))


CHILD = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]) / "tests/unit/orchestrator"))
from test_catalog import Catalog, Registry, MetaMorphosisError, publish

uri, name, task, folder = sys.argv[2:6]
take = Registry.take

def together(self, model, tags, *, description):
    if ".publication." in model:
        (Path(folder) / f"{task}.ready").touch()
        while not (Path(folder) / "go").exists():
            time.sleep(0.001)
        if task == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return take(self, model, tags, description=description)

Registry.take = together
try:
    publish(Catalog(uri, name), task)
    print("won")
except MetaMorphosisError as error:
    print(type(error).__name__)
"""


def test_of_processes_at_the_same_moment_exactly_one_wins_and_a_killed_one_leaves_nothing(
    catalog: Catalog, tmp_path: Path
) -> None:
    with_encoder(catalog)
    root, tasks = Path(__file__).parents[3], ("first", "second", "killed")
    children = {
        task: subprocess.Popen(
            [sys.executable, "-c", CHILD, str(root), catalog.uri, catalog.name, task, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
            cwd=tmp_path,
        )
        for task in tasks
    }
    end = time.monotonic() + 240
    while len(list(tmp_path.glob("*.ready"))) < len(tasks):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert catalog.tasks("latest") == {}
    (tmp_path / "go").touch()
    answers = {task: child.communicate(timeout=240)[0].strip() for task, child in children.items()}
    assert children["killed"].returncode == -9
    assert sorted(answers.values()) == ["", "PublishConflictError", "won"]
    (winner,) = [task for task, answer in answers.items() if answer == "won"]
    assert list(catalog.tasks("latest")) == [winner]
    catalog.load_task("latest", winner)
    with pytest.raises(NotPublishedError):
        catalog.load_task("latest", "killed")


# -- a publisher that dies, a server that fails ------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing that it would have done afterwards happens."""


class Mortal:
    """A client whose process dies when its n-th call of MLflow is done."""

    def __init__(self, client: Any, calls: int) -> None:
        self._client, self._left = client, calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            result = method(*args, **kwargs) if self._left >= 0 else None
            if self._left <= 0:
                raise Killed
            return result

        return call


def mortal(catalog: Catalog, calls: int) -> Catalog:
    dying = Catalog(catalog.uri, catalog.name)
    dying.__dict__["_client"] = Mortal(open_client(catalog.uri), calls)
    return dying


def test_a_publisher_of_tasks_that_dies_after_any_call_leaves_all_or_nothing(catalog: Catalog) -> None:
    seen = []
    pair = [entry(task, head_config=None, head_state=None) for task in ("smile", "age")]
    for calls in range(1, 100):
        with_encoder(catalog)
        try:
            mortal(catalog, calls).publish_tasks("latest", pair, expected=frozenset())
        except Killed:
            survived = False
        else:
            survived = True
        visible = list(Catalog(catalog.uri, catalog.name).tasks("latest"))
        assert visible in ([], ["smile", "age"])
        for task in visible:
            catalog.load_task("latest", task)
        seen.append(bool(visible))
        if survived:
            break
        publish(catalog, "hat", expected=tuple(visible))  # the dead one holds nobody up
    assert survived
    assert seen == sorted(seen)
    assert len(set(seen)) == 2


def test_a_publisher_of_an_encoder_that_dies_after_any_call_leaves_all_or_nothing(catalog: Catalog) -> None:
    known = 0
    for calls in range(1, 100):
        try:
            mortal(catalog, calls).publish_encoder(encoder_record(image_size=calls), weights(calls))
        except Killed:
            survived = False
        else:
            survived = True
        versions = Catalog(catalog.uri, catalog.name).encoder_versions()
        assert len(versions) in (known, known + 1)
        if len(versions) > known:
            record, state = catalog.encoder("latest")
            assert (record.image_size, weights_hash(state)) == (calls, weights_hash(weights(calls)))
        known = len(versions)
        if survived:
            break
    assert survived
    assert 1 <= known < calls


class Forgetful:
    """A client whose server does what it is asked, once or twice, but whose answer is lost."""

    def __init__(self, client: Any, method: str, times: int) -> None:
        self._client, self._method, self._times = client, method, times

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name != self._method:
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            for _ in range(self._times):
                method(*args, **kwargs)
            raise MlflowException("the connection was reset")

        return call


def forgetful(catalog: Catalog, method: str, times: int = 1) -> Catalog:
    confused = Catalog(catalog.uri, catalog.name)
    confused.__dict__["_client"] = Forgetful(open_client(catalog.uri), method, times)
    return confused


def test_a_publication_whose_answer_was_lost_is_recognised_as_ours(catalog: Catalog) -> None:
    with_encoder(catalog)
    (record,) = publish(forgetful(catalog, "create_registered_model"), "smile")
    assert catalog.tasks("latest")["smile"].to_json() == record.to_json()


@pytest.mark.parametrize("times", [1, 2])
def test_an_encoder_whose_answer_was_lost_is_published_once(catalog: Catalog, times: int) -> None:
    record = forgetful(catalog, "create_model_version", times).publish_encoder(encoder_record(), weights(1))
    assert record.version == "1"
    assert catalog.encoder_versions() == ["1"]
    assert with_encoder(catalog).encoder_versions() == ["1", str(times + 1)]


@pytest.mark.parametrize("method", ["log_artifacts", "create_run", "create_registered_model", "search_model_versions"])
def test_a_failing_server_is_an_error_that_says_so_and_nothing_is_published(catalog: Catalog, method: str) -> None:
    with_encoder(catalog)
    with pytest.raises(UnavailableError, match=r"MLflow at sqlite.* failed: the connection was reset"):
        publish(forgetful(catalog, method, times=0), "smile")
    assert catalog.tasks("latest") == {}
    publish(catalog, "smile")


@pytest.mark.parametrize("method", ["get_run", "create_model_version"])
def test_an_encoder_whose_server_goes_away_after_the_upload_is_not_published(catalog: Catalog, method: str) -> None:
    with pytest.raises(UnavailableError, match="the connection was reset"):
        forgetful(catalog, method, times=0).publish_encoder(encoder_record(), weights(1))
    assert catalog.encoder_versions() == []


@pytest.mark.parametrize("method", ["get_run", "create_model_version"])
def test_tasks_are_published_even_if_the_list_for_people_cannot_be_made(
    catalog: Catalog, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    with_encoder(catalog)
    publish(forgetful(catalog, method, times=0), "smile")
    assert list(catalog.tasks("latest")) == ["smile"]
    assert "the tasks are published, but" in caplog.text


def test_a_full_disk_publishes_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    with_encoder(catalog)
    client = open_client(catalog.uri)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(client, "log_artifacts", full)
    catalog.__dict__["_client"] = client
    catalog.__dict__.pop("_files", None)
    with pytest.raises(OSError, match="No space left"):
        publish(catalog, "smile")
    assert Catalog(catalog.uri, catalog.name).tasks("latest") == {}


# -- what was published stays ------------------------------------------------------------------------------------------


def test_adding_a_task_changes_no_byte_of_what_was_there(catalog: Catalog) -> None:
    with_encoder(catalog)
    publish(catalog, "smile", "age")
    before = catalog.published_hashes("latest")
    assert sorted(before) == sorted(
        ["encoder: manifest.json", "encoder: encoder/config.json", "encoder: encoder/weights.safetensors"]
        + ["publication 1: manifest.json"]
        + [
            f"publication 1: {task}/{part}/{file}"
            for task in ("age", "smile")
            for part in ("head", "module")
            for file in ("config.json", "weights.safetensors")
        ]
    )
    publish(catalog, "hat", expected=("smile", "age"), seed=9)
    after = catalog.published_hashes("latest")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 5
    record, _, _ = catalog.load_task("latest", "hat")
    assert after["publication 2: hat/module/weights.safetensors"] == record.module_sha256
    assert after["publication 2: hat/head/weights.safetensors"] == record.head_sha256


def flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture
def published(catalog: Catalog) -> Iterator[tuple[Catalog, Callable[[str], Path]]]:
    with_encoder(catalog)
    publish(catalog, "smile")

    def file(name: str) -> Path:
        (path,) = artefacts(catalog).glob(f"*/artifacts/{name}")
        return path

    yield Catalog(catalog.uri, catalog.name), file


@pytest.mark.parametrize("name", ["smile/module/weights.safetensors", "smile/head/config.json"])
def test_a_tampered_task_is_not_loaded_and_its_hash_tells(
    published: tuple[Catalog, Callable[[str], Path]], name: str
) -> None:
    catalog, file = published
    before = catalog.published_hashes("latest")
    flip_last_bit(file(name))
    with pytest.raises(CheckpointError, match=f"{name} of .* was changed after it was published"):
        catalog.load_task("latest", "smile")
    after = catalog.published_hashes("latest")
    assert {n for n in before if before[n] != after[n]} == {f"publication 1: {name}"}


def test_a_weights_file_and_its_config_that_were_replaced_together_are_not_loaded(
    published: tuple[Catalog, Callable[[str], Path]],
) -> None:
    from orchestrator.checkpoint import save_weights

    catalog, file = published
    save_weights(file("smile/module/weights.safetensors"), weights(55), {"kind": "cross_sec", "channels": 128})
    with pytest.raises(CheckpointError, match="was changed after it was published"):
        catalog.load_task("latest", "smile")


def test_a_tampered_encoder_or_manifest_is_not_loaded(published: tuple[Catalog, Callable[[str], Path]]) -> None:
    catalog, file = published
    flip_last_bit(file("encoder/weights.safetensors"))
    with pytest.raises(CheckpointError, match="was changed"):
        catalog.encoder("latest")
    (manifest,) = [p for p in artefacts(catalog).rglob("manifest.json") if '"tasks"' in p.read_text()]
    manifest.write_text(manifest.read_text().replace('"private": false', '"private": true '))
    with pytest.raises(CheckpointError, match=r"manifest of publication .* was changed"):
        Catalog(catalog.uri, catalog.name).tasks("latest")


def test_a_lost_file_is_named(published: tuple[Catalog, Callable[[str], Path]]) -> None:
    catalog, file = published
    file("smile/head/weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"smile/head/weights\.safetensors of .* is gone"):
        catalog.load_task("latest", "smile")
    with pytest.raises(CheckpointError, match=r"has lost smile/head/weights\.safetensors"):
        catalog.published_hashes("latest")
    for manifest in list(artefacts(catalog).rglob("manifest.json")):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: somebody removed it"):
        Catalog(catalog.uri, catalog.name).encoder("latest")


def test_a_record_of_another_version_of_the_program_is_refused() -> None:
    data = encoder_record().to_json()
    assert EncoderRecord.from_json(data) == encoder_record()
    with pytest.raises(CheckpointError, match=r"unknown or missing keys \(colour\)"):
        EncoderRecord.from_json(data | {"colour": "red"})
    with pytest.raises(CheckpointError, match=r"unknown or missing keys \(flip\)"):
        EncoderRecord.from_json({k: v for k, v in data.items() if k != "flip"})


# -- names and pages ---------------------------------------------------------------------------------------------------


def test_an_underscore_in_a_catalogs_name_stands_for_itself(store: str) -> None:
    names = ("like_this", "likexthis", "Like_this")
    for i, name in enumerate(names):
        with_encoder(Catalog(store, name))
        publish(Catalog(store, name), f"task{i}")
    assert [list(Catalog(store, name).tasks("1")) for name in names] == [["task0"], ["task1"], ["task2"]]


def test_more_publications_than_fit_on_a_page_are_all_found(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(12):
        with_encoder(catalog)
    expected: tuple[str, ...] = ()
    for i in range(11):
        publish(catalog, f"task{i}", expected=expected)
        expected += (f"task{i}",)
    monkeypatch.setattr(catalog_registry, "_PAGE", 4)
    assert catalog.encoder_versions() == [str(v) for v in range(1, 13)]
    assert tuple(catalog.tasks("latest")) == expected
    assert catalog.tasks("latest")["task10"].version == "12.11"


# -- a tracking server ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_works_over_http_and_a_server_that_dies_holds_nobody_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Runs a real `mlflow server`, and ends it halfway."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = (
        f"-m mlflow server --host 127.0.0.1 --port {port} --workers 1 --backend-store-uri sqlite:///{tmp_path}/s.db"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command.split(), "--artifacts-destination", str(tmp_path / "artifacts")],
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            start_new_session=True,
        )
    try:
        wait_for(uri)
        capfd.readouterr()
        tracker = open_tracker(
            uri, experiment="http", run_name="r", params={"lr": 1}, tags={}, spool=tmp_path / "spool"
        )
        tracker.log_metrics(0, {"loss": 1.0})
        tracker.log_text("hello", "a/b.txt")
        catalog = Catalog(uri, "digits")
        encoder = catalog.publish_encoder(encoder_record(run_id=tracker.run_id), weights(1))
        publish(catalog, "smile", "age")
        with pytest.raises(PublishConflictError, match="smile"):
            publish(catalog, "hat")
        before = catalog.published_hashes("latest")
        publish(catalog, "hat", expected=("smile", "age"))
        assert before.items() < catalog.published_hashes("latest").items()
        again = Catalog(uri, "digits")
        assert list(again.tasks("1")) == ["smile", "age", "hat"]
        assert again.encoder()[0] == encoder
        assert weights_hash(again.load_task("latest", "hat")[1]) == weights_hash(weights(0))
        assert catalogs(uri) == ["digits"]
        for name in ("encoder", "module.hat"):
            (version,) = open_client(uri).search_model_versions(f"name = 'digits.{name}'")
            assert version.source.startswith("mlflow-artifacts:/")
        other = open_tracker(uri, experiment="http", run_name="r2", params={}, tags={}, parent_run_id=tracker.run_id)
        assert other.finish() == 0
        run = open_client(uri).get_run(tracker.run_id)
        assert (run.data.params, run.data.metrics) == ({"lr": "1"}, {"loss": 1.0})
        assert capfd.readouterr() == ("", "")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with within(1):
        tracker.log_metrics(1, {"loss": 0.5})
        tracker.log_text("late", "late.txt")
    with within(30):
        assert tracker.finish() == 3
    with within(60), pytest.raises(UnavailableError, match="failed"):
        catalog.tasks("latest")
    with within(5), pytest.raises(UnavailableError, match="no tracking server answers"):
        Catalog(uri, "digits").tasks("latest")


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def wait_for(uri: str) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            return check_reachable(uri)
        except UnavailableError:
            assert time.monotonic() < end
            time.sleep(0.5)
