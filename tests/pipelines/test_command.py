"""Flags, presets and exit statuses."""

from __future__ import annotations

import dataclasses
import importlib
import io

import pytest

from orchestrator.config import read_toml
from orchestrator.errors import UnavailableError
from orchestrator.settings.train import TrainSettings
from pipelines.command import execute, open_console, parse, preset_names, preset_path
from tasks.errors import ConfigError, MetaMorphosisError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_read_and_names_a_private_attribute_and_tasks(name):
    settings = read_toml(TrainSettings, preset_path(name))
    assert settings.private
    assert settings.tasks
    assert settings.dp.epsilon is not None


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults():
    settings = parse(
        TrainSettings, ["--preset", "digits", "--tasks", "large,digit", "--encoder.lr", "0.5"], prog="x", presets=True
    )
    preset = read_toml(TrainSettings, preset_path("digits"))
    assert settings.tasks == ("large", "digit")
    assert settings.encoder == dataclasses.replace(preset.encoder, lr=0.5)
    assert settings.data == preset.data


def test_names_are_separated_by_commas_with_and_without_a_preset():
    for flags in (["--preset", "digits"], ["--private", "parity"]):
        assert parse(TrainSettings, [*flags, "--tasks", "loop, large"], prog="x", presets=True).tasks == (
            "loop",
            "large",
        )


def raise_it(error):
    def run(settings):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (MetaMorphosisError("x"), 1),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "/somewhere"), 1),
        (ZeroDivisionError("ours"), 1),
    ],
)
def test_the_exit_status_says_whose_mistake_it_was(capsys, error, status):
    assert execute("orchestrator.settings.evaluate:EvaluateSettings", raise_it(error), [], prog="x") == status
    err = capsys.readouterr().err
    assert ("Traceback" in err) == isinstance(error, ZeroDivisionError)


def test_a_full_disk_is_named(capsys):
    execute(
        "orchestrator.settings.evaluate:EvaluateSettings",
        raise_it(OSError(28, "No space left on device", "/somewhere")),
        [],
        prog="x",
    )
    assert "No space left on device: /somewhere" in capsys.readouterr().err


def test_an_error_takes_along_what_was_noted_on_its_way(capsys):
    error = UnavailableError("no server")
    error.add_note("Nothing is lost")
    execute("orchestrator.settings.evaluate:EvaluateSettings", raise_it(error), [], prog="x")
    assert capsys.readouterr().err == "error: no server. Nothing is lost\n"


@pytest.mark.parametrize(("terminal", "width"), [(False, 137), (True, 80)])
def test_output_has_the_width_of_the_terminal_or_else_the_commands_own(monkeypatch, terminal, width):
    monkeypatch.setattr("sys.stdout", Screen(terminal))
    monkeypatch.setenv("COLUMNS", "80")
    assert open_console(width=137).width == width


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def test_the_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainSettings, ["--help"], prog="train.py", presets=True)
    assert end.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--preset", "--data", "--private", "--tasks", "--split-index", "--omega", "--epsilon", "--dp-mode"):
        assert flag in text


@pytest.mark.parametrize(
    "settings",
    [
        "orchestrator.settings.train:TrainSettings",
        "orchestrator.sweep.settings:SweepSettings",
        "serve.tenants.settings:TenantsSettings",
    ],
)
def test_without_the_cluster_packages_a_command_says_what_to_install(capsys, monkeypatch, settings):
    real = importlib.import_module

    def without_torch(name, *rest):
        if name == settings.partition(":")[0]:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without_torch)
    assert execute(settings, raise_it(None), [], prog="train.py") == 2
    assert "pip install 'metamorphosis-ray[cluster]'" in capsys.readouterr().err
