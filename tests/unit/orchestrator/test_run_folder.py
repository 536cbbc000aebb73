"""What a run remembers of itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from orchestrator.errors import CheckpointError, ConfigError, UnavailableError
from orchestrator.runs.folder import RunFolder
from orchestrator.settings.shared import RuntimeSettings
from orchestrator.settings.train import TrainSettings


@pytest.fixture
def settings(tmp_path) -> TrainSettings:
    return TrainSettings(tasks=("a",), algorithm="task", runtime=RuntimeSettings(storage=tmp_path))


def open_folder(settings: TrainSettings, *, resume: bool = False) -> RunFolder:
    return RunFolder.open("train", settings, settings.runtime, resume=resume)


def interrupt(folder: RunFolder) -> None:
    """End it as if the process had died: nothing is tidied, but the lock is gone."""
    folder._lock.release()


def test_a_resumed_run_is_the_same_run_with_the_same_secret(settings):
    first = open_folder(settings)
    secret = first.secret("encoder")
    first.remember(encoder_version="3")
    first.checkpoints("encoder", identity="x").save(4, {"w": torch.zeros(1)})
    interrupt(first)
    again = open_folder(settings, resume=True)
    assert (again.run, again.secret("encoder"), again.recall("encoder_version")) == (first.run, secret, "3")
    assert again.secret("session") != secret
    assert again.checkpoints("encoder", identity="x").newest()[0] == 4
    with pytest.raises(CheckpointError, match="another training"):
        again.checkpoints("encoder", identity="y").newest()


def test_a_users_own_seed_gives_every_part_a_stream_of_its_own(settings):
    """Noise that is used twice, on the gradients of two trainings, would cancel in their difference."""
    folder = open_folder(settings)
    seeds = [folder.secret(part, fixed=7) for part in ("encoder", "modules", "session")]
    assert len({7, *seeds}) == 4
    assert folder.secret("modules", fixed=7) == seeds[1]


def test_nothing_is_resumed_with_other_settings_or_while_the_run_goes_on(settings):
    folder = open_folder(settings)
    with pytest.raises(ConfigError, match="still going on"):
        open_folder(settings, resume=True)
    interrupt(folder)
    with pytest.raises(ConfigError, match="no interrupted run with these settings"):
        open_folder(dataclasses.replace(settings, seed=1), resume=True)
    moved = dataclasses.replace(settings, runtime=dataclasses.replace(settings.runtime, threads=7))
    assert open_folder(moved, resume=True).run == folder.run


def test_the_newest_interrupted_run_is_resumed(settings):
    runs = [open_folder(settings) for _ in range(3)]
    assert len({folder.run for folder in runs}) == 3
    interrupt(runs[0])
    interrupt(runs[1])
    assert open_folder(settings, resume=True).run == runs[1].run


def test_a_finished_run_leaves_nothing(settings):
    with open_folder(settings) as folder:
        folder.secret("encoder")
    assert not folder.path.exists()
    with pytest.raises(ConfigError, match="nothing to resume"):
        open_folder(settings, resume=True)


def test_an_error_keeps_what_can_be_resumed_and_nothing_else(settings):
    with pytest.raises(KeyError), open_folder(settings) as useless:
        raise KeyError
    assert not useless.path.exists()
    with pytest.raises(KeyError), open_folder(settings) as useful:
        useful.checkpoints("encoder", identity="x").save(1, {})
        raise KeyError
    assert open_folder(settings, resume=True).run == useful.run


@pytest.mark.parametrize(
    ("kind", "told"), [(UnavailableError, True), (KeyboardInterrupt, True), (OSError, True), (ConfigError, False)]
)
@pytest.mark.parametrize("trained", [True, False])
def test_an_error_that_passes_says_how_to_go_on_if_there_is_something_to_go_on_from(settings, kind, told, trained):
    with pytest.raises(kind) as caught, open_folder(settings) as folder:
        if trained:
            folder.remember(reservations={"encoder": 1})
        raise kind("x")
    assert any("--resume" in note for note in getattr(caught.value, "__notes__", [])) == (told and trained)


def test_only_its_owner_can_read_the_secrets(settings):
    folder = open_folder(settings)
    folder.secret("encoder")
    assert folder.path.stat().st_mode & 0o077 == 0
    assert (folder.path / "run.json").stat().st_mode & 0o077 == 0
    assert str(folder.secret("encoder")) not in repr(folder)


def test_a_damaged_memory_is_refused(settings):
    folder = open_folder(settings)
    (folder.path / "run.json").write_text("{")
    interrupt(folder)
    with pytest.raises(CheckpointError, match="damaged"):
        open_folder(settings, resume=True)
