import dataclasses

import numpy as np
import pytest
from evaluations import reconstruction
from PIL import Image

from orchestrator.errors import DataError, PrivacyRefusal
from orchestrator.evaluation.figures.drawing import save_figure
from orchestrator.evaluation.figures.pictures import (
    PictureRow,
    SplitPoint,
    feature_rows,
    may_draw,
    quality_by_split,
    reconstruction_grid,
)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    names = ("input", "k=5, without DP", "k=5, epsilon 8")
    return [
        PictureRow(label=name, images=rng.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8), ssim=None if i == 0 else 0.5)
        for i, name in enumerate(names)
    ]


def points():
    quality = {(5, None): 0.9, (6, None): 0.8, (5, 8.0): 0.85, (6, 8.0): 0.7}
    return [
        SplitPoint(split_index=k, epsilon=e, psnr=30 * q, ssim=q, mean_image_psnr=12.0, mean_image_ssim=0.4)
        for (k, e), q in quality.items()
    ]


def test_the_grid_shows_every_picture_as_it_is(rows):
    figure = reconstruction_grid(rows, data_set="digits")
    drawn = [ax.images[0].get_array() for ax in figure.axes]
    np.testing.assert_array_equal(np.stack(drawn).reshape(3, 4, 8, 8, 3), np.stack([row.images for row in rows]))
    labels = [ax.get_ylabel() for ax in figure.axes[::4]]
    assert labels == ["input", "k=5, without DP\nSSIM 0.50", "k=5, epsilon 8\nSSIM 0.50"]


def test_each_task_s_pictures_stand_above_its_class_mean_and_the_encoder_s_are_elsewhere():
    inputs = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    whole = reconstruction(examples=inputs // 2, originals=inputs)
    mean = dataclasses.replace(whole.rows[0].mean_image, ssim=0.4)
    pose = dataclasses.replace(whole.rows[0], feature="pose", class_mean=mean, class_mean_examples=inputs // 3)
    both = dataclasses.replace(whole, rows=(*whole.rows, pose))
    found = feature_rows(both, but="encoder")
    assert [(row.label, row.ssim) for row in found] == [("input", None), ("pose", 0.93), ("class mean, pose", 0.4)]
    for row, images in zip(found, (inputs, inputs // 2, inputs // 3), strict=True):
        np.testing.assert_array_equal(row.images, images)
    assert feature_rows(whole, but="encoder") == []
    assert feature_rows(dataclasses.replace(both, originals=None), but="encoder") == []


def test_pictures_that_may_show_people_are_drawn_only_where_that_was_allowed(rows):
    with pytest.raises(PrivacyRefusal, match="celeba may show people"):
        reconstruction_grid(rows, data_set="celeba")
    assert reconstruction_grid(rows, data_set="celeba", allow_people=True).axes
    assert may_draw("digits") and not may_draw("celeba") and may_draw("celeba", allow_people=True)


def test_lines_run_over_the_split_index_with_and_without_privacy_and_the_mean_image():
    psnr, ssim = quality_by_split(points()).axes
    lines = {line.get_label(): line for line in ssim.lines}
    assert list(lines) == ["without DP", "with DP, epsilon 8", "mean training image"]
    np.testing.assert_allclose(lines["without DP"].get_xydata(), [[5, 0.9], [6, 0.8]])
    np.testing.assert_allclose(lines["with DP, epsilon 8"].get_xydata(), [[5, 0.85], [6, 0.7]])
    assert len({line.get_linestyle() for line in lines.values()}) == len(lines)
    assert len({line.get_marker() for line in lines.values()}) == len(lines)
    assert psnr.lines[0].get_ydata()[0] == 27


def test_figures_are_saved_as_png_and_svg(rows, tmp_path):
    figures = {"grid": reconstruction_grid(rows, data_set="digits"), "lines": quality_by_split(points())}
    for name, figure in figures.items():
        png, svg = save_figure(figure, tmp_path / f"{name}.png")
        with Image.open(png) as image:
            assert image.size[0] > 300
        assert "<svg" in svg.read_text()


def test_nothing_to_draw_is_an_error():
    with pytest.raises(DataError):
        reconstruction_grid([], data_set="digits")
    with pytest.raises(DataError):
        quality_by_split([])
