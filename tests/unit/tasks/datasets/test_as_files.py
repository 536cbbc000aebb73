"""`python -m tasks.datasets` writes images that decode to those that were trained on."""

from __future__ import annotations

import numpy as np

from tasks.datasets import open_dataset
from tasks.datasets.__main__ import main
from tasks.datasets.decoding import decode_image


def test_files_decode_to_the_images_of_the_data_set(tmp_path, capsys):
    folder = tmp_path / "new" / "frames"
    assert main(["digits", str(folder), "--count", "3", "--image-size", "16"]) == 0
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    wanted = open_dataset("digits", image_size=16).images[:3]
    np.testing.assert_array_equal([decode_image(file.read_bytes(), 16) for file in files], wanted)
    assert "3 images in" in capsys.readouterr().out


def test_what_cannot_be_opened_or_written_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    for arguments in (["digit", str(tmp_path)], ["digits", str(tmp_path / "taken")]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m tasks.datasets: error: ") and error.count("\n") == 1
