"""Every mistake gets one readable line, the right exit status, and publishes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.catalog import catalogs
from pipelines import add_task, evaluate, train
from pipelines.command import execute

QUICK = [
    *("--image-size", "16", "--split-index", "5", "--head", "linear", "--device", "cpu", "--threads", "1"),
    *(
        "--epochs",
        "1",
        "--encoder.epochs",
        "1",
        "--batch-size",
        "32",
        "--encoder.batch-size",
        "32",
        "--engine",
        "process",
    ),
]
SOLD = ["--private", "who", "--tasks", "pose"]


def run_train(*flags: str) -> int:
    try:
        return execute("orchestrator.settings.train:TrainSettings", train.run, flags, prog="train.py", presets=True)
    except SystemExit as end:
        return int(end.code or 0)


def run_add(*flags: str) -> int:
    try:
        return execute("orchestrator.settings.add_task:AddTaskSettings", add_task.run, flags, prog="add_task.py")
    except SystemExit as end:
        return int(end.code or 0)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of standard error: the one that says what is wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert not any(line.startswith("Traceback") for line in lines), "a user's mistake must not show a trace"
    return lines[-1]


def nothing_published(home: Path) -> bool:
    return not (home / "mlflow.db").exists() or catalogs(f"sqlite:///{home}/mlflow.db") == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset", "nope"], "known: celeba, digits, faces, statefarm"),
        (["--preset", "digits", "--tasks", "lop,large"], "no task named 'lop'; known: digit, large, loop, parity"),
        (["--preset", "digits", "--private", "colour"], "no task named 'colour'"),
        (["--preset", "digits", "--tasks", "loop,parity"], "either hidden or sold"),
        (["--preset", "digits", "--tasks", "loop,loop"], "named twice"),
        (["--preset", "digits", "--epsilon", "0"], "epsilon must be a finite number > 0"),
        (["--preset", "digits", "--epsilon", "-3"], "epsilon must be a finite number > 0"),
        (["--preset", "digits", "--epsilon", "nan"], "epsilon must be a finite number > 0"),
        (["--preset", "digits", "--delta", "2"], "delta must be > 0 and < 1"),
        (["--preset", "digits", "--split-index", "0", *QUICK[-2:]], "split index"),
        (["--preset", "digits", "--split-index", "10", *QUICK[-2:]], "split index"),
        (["--preset", "digits", "--backbone", "vgg", *QUICK[-2:]], "resnet18"),
        (["--preset", "digits", "--omega", "-1"], "omega must be a finite number >= 0"),
        (["--preset", "digits", "--epochs", "0"], "at least 1"),
        (["--preset", "digits", "--lr", "-1"], "lr must be a positive number"),
        (["--preset", "digits", "--algorithm", "task"], "leave --epsilon out"),
        (["--tasks", "loop"], "name it with --private"),
        (["--private", "parity"], "name at least one with --tasks"),
        (["--preset", "digits", "--data", "imagenet", *QUICK[-2:]], "digits"),
        (["--preset", "digits", "--catalog", "a/b", *QUICK[-2:]], "catalog name"),
        (["--preset", "digits", "--resume", *QUICK[-2:]], "nothing to resume"),
        (["--preset", "digits", "--phase", "tasks", *QUICK[-2:]], "train one first"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_with_what_is_allowed(home, capsys, flags, said):
    assert run_train(*flags) == 2
    assert said in complaint(capsys)
    assert nothing_published(home)


def test_an_unknown_flag_or_a_value_of_the_wrong_type_exits_with_2(home, capsys):
    assert run_train("--preset", "digits", "--epslion", "4") == 2
    assert "--epslion" in capsys.readouterr().err
    assert run_train("--preset", "digits", "--epochs", "many") == 2
    assert "many" in capsys.readouterr().err
    assert [path.name for path in home.iterdir()] == ["mlflow.db"], "as the test made it"


def test_an_unknown_key_in_a_preset_file_is_refused(home, tmp_path, capsys):
    preset = tmp_path / "mine.toml"
    preset.write_text('private = "parity"\ntasks = ["loop"]\n[dp]\nepslion = 4.0\n')
    assert run_train("--preset", str(preset)) == 2
    said = complaint(capsys)
    assert "epslion" in said
    assert "epsilon" in said


def corrupt_one(columns):
    columns["image"][17] = b"\x89PNG not an image"


def truncate_one(columns):
    columns["image"][17] = columns["image"][17][: len(columns["image"][17]) // 2]


def null_label(columns):
    columns["pose"][5] = None


def empty_label(columns):
    columns["pose"][5] = ""


def no_images(columns):
    columns["picture"] = columns.pop("image")


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        (corrupt_one, SOLD, "row 17"),
        (truncate_one, SOLD, "row 17"),
        (corrupt_one, SOLD, "--skip-corrupt"),
        (null_label, SOLD, "row 5"),
        (empty_label, SOLD, "row 5"),
        (no_images, SOLD, "image"),
        (lambda c: None, ["--private", "who", "--tasks", "smile"], "glasses, pose, who"),
        (lambda c: None, ["--private", "age", "--tasks", "pose"], "no task named 'age'"),
        (lambda c: None, ["--private", "who", "--tasks", "site"], "class"),
        (lambda c: None, [*SOLD, "--group-by", "city"], "city"),
        (lambda c: None, [*SOLD, "--split", "0.5", "0.5", "0.5", "0.5"], "sum"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_the_reason(home, write_parquet, capsys, change, flags, said):
    assert run_train("--data", write_parquet(change), *flags, *QUICK) == 2
    assert said in complaint(capsys)
    assert nothing_published(home)


def test_a_file_that_is_missing_empty_or_not_parquet_is_refused(home, tmp_path, capsys):
    for name, content in (
        ("empty.parquet", b""),
        ("text.parquet", b"name,age\n"),
        ("cut.parquet", b"PAR1" + b"\0" * 64),
    ):
        (tmp_path / name).write_bytes(content)
        assert run_train("--data", f"parquet:{tmp_path / name}", *SOLD, *QUICK) == 2
        assert name in complaint(capsys)
    assert run_train("--data", f"parquet:{tmp_path}/none.parquet", *SOLD, *QUICK) == 2
    assert "none.parquet" in complaint(capsys)
    assert nothing_published(home)


def test_a_table_without_rows_is_refused(home, write_parquet, capsys):
    assert run_train("--data", write_parquet(rows=0), *SOLD, *QUICK) == 2
    assert "no rows" in complaint(capsys)
    assert nothing_published(home)


def test_a_corrupt_image_can_be_skipped_and_is_counted(home, write_parquet, capsys):
    assert run_train("--data", write_parquet(corrupt_one), *SOLD, *QUICK, "--skip-corrupt") == 0
    out = capsys.readouterr().out
    assert "left out 1 image" in out
    assert "17" in out


def test_a_tracking_server_that_does_not_answer_is_named_before_any_training(home, capsys):
    assert run_train("--preset", "digits", "--tracking-uri", "http://127.0.0.1:9", *QUICK) == 2
    said = complaint(capsys)
    assert "127.0.0.1:9" in said


def test_a_training_that_diverges_publishes_no_task(home, write_parquet, capsys):
    assert run_train("--data", write_parquet(), *SOLD, *QUICK, "--lr", "1e30", "--epochs", "3") == 1
    assert "no task was published" in complaint(capsys)
    from orchestrator.catalog import Catalog

    # Phase 1 was whole, and its private branch with it; nothing of phase 2 is there.
    assert set(Catalog(f"sqlite:///{home}/mlflow.db", "faces").tasks("1")) == {"who"}


def test_what_cannot_be_added_is_refused_and_what_is_there_stays(home, write_parquet, capsys):
    data = write_parquet()
    assert run_train("--data", data, *SOLD, *QUICK, "--epsilon", "8") == 0
    from orchestrator.catalog import Catalog

    catalog = Catalog(f"sqlite:///{home}/mlflow.db", "faces")
    before = catalog.published_hashes("1")
    capsys.readouterr()
    quick = ["--engine", "process", "--threads", "1", "--epochs", "1"]
    for task, said in (
        ("pose", "already published"),
        ("who", "private attribute"),
        ("smile", "glasses, pose, who"),
        ("site", "class"),
    ):
        assert run_add(task, *quick) == 2
        assert said in complaint(capsys)
    assert run_add("glasses", *quick, "--encoder-version", "7") == 2
    assert "known: 1" in complaint(capsys)
    other = write_parquet(lambda c: c["who"].reverse(), name="other.parquet")
    assert run_add("glasses", *quick, "--data", other, "--catalog", "faces") == 2
    assert "not the data that the encoder was trained on" in complaint(capsys)
    assert catalog.published_hashes("1") == before
    moved = Path(data.removeprefix("parquet:")).rename(home / "moved.parquet")
    assert run_add("glasses", *quick, "--data", f"parquet:{moved}", "--catalog", "faces") == 0
    after = catalog.published_hashes("1")
    assert {name: after[name] for name in before} == before
    assert set(catalog.tasks("1")) == {"who", "pose", "glasses"}


def test_evaluating_what_was_never_trained_says_what_to_do(home, capsys):
    assert (
        execute(
            "orchestrator.settings.evaluate:EvaluateSettings", evaluate.run, ["--engine", "process"], prog="evaluate.py"
        )
        == 2
    )
    assert "train an encoder first" in complaint(capsys)
