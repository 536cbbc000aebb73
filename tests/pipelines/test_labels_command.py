"""Labels from the producer's command to the tenant's: sealed, held, released, opened, erased."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from orchestrator.privacy.escrow import TenantKey
from orchestrator.runs.observer import SilentObserver
from orchestrator.runs.opening import open_data
from orchestrator.settings.shared import DataSettings
from pipelines import labels, tenants
from pipelines.command import execute
from serve.private_files import PrivateFile
from serve.tenants import sealed_files

SMALL = ("--image-size", "8")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("METAMORPHOSIS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert (
        execute("serve.tenants.settings:TenantsSettings", tenants.run, ["add", "alice", "--tasks", "digit"], prog="x")
        == 0
    )


def run(*flags: str) -> int:
    try:
        return execute("serve.tenants.label_settings:LabelsSettings", labels.run, flags, prog="labels.py")
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def public_key(capsys) -> str:
    assert run("key", "alice.key") == 0
    return capsys.readouterr().out.split()[-1]


def seal(public_key: str, *, not_before: str = "0s", out: str = "sealed", subset: str = "train", tenant="alice") -> int:
    flags = ("--public-key", public_key, "--not-before", not_before, "--out", out)
    return run("seal", tenant, "digit", subset, *flags, *SMALL)


@pytest.fixture
def handed_over(public_key) -> None:
    """Sealed labels, and what opens them."""
    assert seal(public_key) == 0
    assert run("release", "alice", "digit", "train", "--out", "released") == 0


def opened(key: str = "alice.key") -> int:
    return run("open", "sealed", "released", "--key-file", key, "--out", "labels.npy")


@pytest.mark.parametrize("subset", ["train", "test"])
def test_the_tenant_reads_the_labels_that_a_session_would_have_sent_it(public_key, subset):
    assert seal(public_key, subset=subset) == 0
    assert run("release", "alice", "digit", subset, "--out", "released") == 0
    assert opened() == 0
    data = open_data(DataSettings(image_size=8), SilentObserver()).training_data(("digit",))
    np.testing.assert_array_equal(np.load("labels.npy"), data.labels["digit"][subset])


def test_files_of_the_tenant_are_for_it_alone_and_its_key_is_kept(handed_over, public_key, capsys):
    opened()
    for name in ("alice.key", "sealed", "released", "labels.npy"):
        assert stat.S_IMODE(Path(name).stat().st_mode) == 0o600
    capsys.readouterr()
    assert run("key", "alice.key") == 0
    assert capsys.readouterr().out.strip() == public_key


def test_before_its_time_nothing_is_released_and_it_is_said_when_it_will_be(public_key, capsys):
    assert seal(public_key, not_before="2d") == 0
    assert run("release", "alice", "digit", "train", "--out", "released") == 2
    said = capsys.readouterr().err
    assert "not released yet" in said
    assert "not before 20" in said
    assert not Path("released").exists()
    assert opened() == 2


def test_what_was_erased_is_released_to_nobody(public_key, capsys):
    seal(public_key)
    assert run("list") == 0
    assert "alice  digit  train  not before" in capsys.readouterr().out
    assert run("erase", "alice", "digit", "train") == 0
    assert "nobody can read" in capsys.readouterr().out
    assert run("release", "alice", "digit", "train", "--out", "released") == 2
    assert run("list") == 0
    assert "no labels are held" in capsys.readouterr().out


def test_another_key_opens_nothing(handed_over, capsys):
    assert run("key", "other.key") == 0
    assert opened("other.key") == 1
    assert "cannot be opened" in capsys.readouterr().err
    assert not Path("labels.npy").exists()


def test_what_was_changed_on_the_way_is_refused(handed_over, capsys):
    for name in ("sealed", "released"):
        raw = Path(name).read_bytes()
        for position in (0, len(raw) // 2, len(raw) - 1):
            changed = bytearray(raw)
            changed[position] ^= 1
            Path(name).write_bytes(bytes(changed))
            assert opened() in {1, 2}
            said = capsys.readouterr().err
            assert said.startswith("error: ")
            assert said.count("\n") == 1
        Path(name).write_bytes(raw[:-1])
        assert opened() in {1, 2}
        assert capsys.readouterr().err.startswith("error: ")
        Path(name).write_bytes(raw)
    assert not Path("labels.npy").exists()
    assert opened() == 0


def test_a_sealed_file_says_as_which_task_it_was_sealed_and_passes_for_no_other(handed_over, capsys):
    sealed = sealed_files.read_sealed(Path("sealed"))
    forged = type(sealed)(
        task="parity",
        subset=sealed.subset,
        nonce=sealed.nonce,
        ciphertext=sealed.ciphertext,
        wrapped_key=sealed.wrapped_key,
    )
    Path("sealed").write_bytes(sealed_files.to_bytes(forged))
    assert opened() == 1
    assert "cannot be opened" in capsys.readouterr().err


def test_labels_that_cannot_be_handed_over_are_not_held(public_key, capsys, monkeypatch):
    def full(self, data: bytes) -> None:
        from orchestrator.errors import DataError

        raise DataError("cannot write the sealed labels to sealed: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("serve.tenants.sealed_files.to_bytes", lambda sealed: b"marked")
        write = PrivateFile.write
        patched.setattr(
            "serve.private_files.PrivateFile.write",
            lambda file, data: full(file, data) if data == b"marked" else write(file, data),
        )
        assert seal(public_key) == 2
    assert "seal them again" in capsys.readouterr().err
    assert seal(public_key) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("seal", "bob", "digit", "train"), "no tenant, device or operator named 'bob'"),
        (("seal", "alice", "parity", "train"), "no task that 'alice' may train named 'parity'"),
        (("seal", "alice", "digit", "train", "--public-key", "00"), "no public key"),
        (("seal", "alice", "digit", "train", "--public-key", "0" * 64), "no X25519 point"),
        (("seal", "alice", "digit", "train", "--not-before", "soon"), "no moment"),
        (("seal", "alice", "digit", "train", "--out", "alice.key"), "already"),
        (("seal", "alice", "digit", "train", "--data", "nonsense"), "nonsense"),
        (("release", "alice", "digit", "train", "--out", "released"), "No 'train' labels of task 'digit' are held"),
        (("erase", "alice", "digit", "train"), "are held for 'alice'"),
        (("open", "none", "none", "--key-file", "alice.key", "--out", "o"), "cannot read the sealed labels in none"),
        (("open", "alice.key", "none", "--key-file", "alice.key", "--out", "o"), "holds no sealed labels"),
        (("list", "--registry", "nowhere.db"), "there is no registry at"),
        (("key", "."), "cannot read the tenant's private key"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(public_key, capsys, flags, says):
    given = dict(zip(flags[4::2], flags[5::2], strict=True)) if flags[0] == "seal" else {}
    if flags[0] == "seal":
        given = {"--public-key": public_key, "--not-before": "1d", "--out": "sealed", **given}
        flags = (*flags[:4], *(part for pair in given.items() for part in pair), *SMALL)
    capsys.readouterr()
    assert run(*flags) in {1, 2}
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not Path("sealed").exists()


def test_a_key_file_of_the_wrong_size_is_none(capsys):
    Path("short.key").write_bytes(TenantKey.generate().to_bytes()[:-1])
    Path("short.key").chmod(0o600)
    assert run("key", "short.key") == 2
    assert "32 bytes" in capsys.readouterr().err
