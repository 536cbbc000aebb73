import json

import numpy as np
import pytest
from evaluations import evaluation, leakage, reconstruction, subject

from orchestrator.errors import DataError
from orchestrator.evaluation.comparison import FILE, Point, read_points
from orchestrator.evaluation.examples import Examples, picture_rows
from orchestrator.evaluation.figures.curves import has_epsilon_curve, has_omega_curve, omega_curve, privacy_utility

FINGERPRINT = "ab" * 32


def point(*, own=0.9, leak=0.97, **encoder):
    return Point.of(evaluation(subject=subject(**encoder), leakage=leakage(own=own, leak=leak)).to_json())


def test_a_point_has_the_worst_excess_of_each_task_that_is_sold():
    found = point()
    assert set(found.tasks) == {"pose", "eyes"}
    assert found.tasks["pose"].excess == pytest.approx(0.47)
    assert found.tasks["eyes"].excess == pytest.approx(0.2)
    assert (found.epsilon, found.scope, found.omega, found.split_index) == (8.0, "encoder", 0.001, 5)
    assert found.reconstruction == {"psnr": 27.0, "ssim": 0.93, "mean_image_psnr": 13.0, "mean_image_ssim": 0.3}


def test_trainings_of_one_budget_that_end_a_hair_apart_are_one_point_of_the_curve():
    assert point(epsilon=7.99432).epsilon == point(epsilon=7.9981).epsilon == 8.0


def test_evaluations_that_attacked_no_label_make_no_curve():
    silent = [Point.of(evaluation(subject=subject(epsilon=e), leakage=None).to_json()) for e in (2.0, 8.0)]
    assert not has_epsilon_curve(silent) and not has_omega_curve(silent)


def test_an_omega_that_was_not_recorded_is_not_taken_for_zero():
    assert point(omega=None).omega is None
    assert not has_omega_curve([point(omega=None), point(omega=0.0)])


def test_evaluations_are_read_from_their_folder_or_file(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(evaluation().to_json()))
    by_folder, by_file = read_points([tmp_path, tmp_path / FILE], fingerprint=FINGERPRINT)
    assert by_folder == by_file == Point.of(evaluation().to_json())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no evaluation"),
        ("{", "there is no evaluation"),
        ("[]", "no evaluation of this program's format"),
        (json.dumps({"format": 0}), "no evaluation of this program's format"),
    ],
)
def test_what_is_no_evaluation_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError, match=message):
        read_points([tmp_path], fingerprint=FINGERPRINT)


def test_an_evaluation_of_other_data_is_refused(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(evaluation(subject=subject(fingerprint="99" * 32)).to_json()))
    with pytest.raises(DataError, match="cannot be compared"):
        read_points([tmp_path], fingerprint=FINGERPRINT)


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def test_utility_and_leakage_run_over_epsilon_a_line_for_each_scope():
    points = [
        point(epsilon=None, own=0.95),
        point(epsilon=2.0, own=0.6),
        point(epsilon=8.0, own=0.8),
        point(epsilon=8.0, own=0.7, mode="whole"),
    ]
    assert has_epsilon_curve(points) and not has_epsilon_curve(points[:1])
    utility, leak = privacy_utility(points).axes
    np.testing.assert_allclose(lines(utility)["DP on the encoder"].get_xydata(), [[2, 60], [8, 80]])
    np.testing.assert_allclose(lines(utility)["DP on the whole model"].get_xydata(), [[8, 70]])
    np.testing.assert_allclose(lines(utility)["without DP"].get_ydata(), 95)
    np.testing.assert_allclose(lines(leak)["DP on the encoder"].get_ydata(), (47 + 20) / 2)


def test_several_encoders_of_one_epsilon_are_averaged_and_each_has_its_dot():
    utility = privacy_utility([point(epsilon=2.0, own=0.6), point(epsilon=2.0, own=0.8)]).axes[0]
    np.testing.assert_allclose(lines(utility)["DP on the encoder"].get_xydata(), [[2, 70]])
    np.testing.assert_allclose(sorted(utility.collections[0].get_offsets()[:, 1]), [60, 80])


def test_over_omega_the_swap_test_is_drawn_beside_the_attackers():
    points = [point(omega=0.0, own=0.9), point(omega=1.0, own=0.7, leak=0.9)]
    assert has_omega_curve(points)
    utility, leak = omega_curve(points).axes
    np.testing.assert_allclose(lines(utility)["pose"].get_xydata(), [[0, 90], [1, 70]])
    np.testing.assert_allclose(lines(leak)["pose"].get_ydata(), [47, 40])
    np.testing.assert_allclose(lines(leak)["pose, swap test"].get_ydata(), [0, 0])


def test_pictures_are_kept_beside_an_evaluation_and_shown_where_the_inputs_are_the_same(tmp_path):
    inputs = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    report = reconstruction(examples=inputs // 2, originals=inputs)
    mine = Examples.of(report, "encoder", label="split 5, no DP")
    mine.save(tmp_path)
    again = Examples.load(tmp_path)
    np.testing.assert_array_equal(again.row.images, inputs // 2)
    assert (again.row.label, again.row.ssim) == ("split 5, no DP", 0.93)
    other = Examples(originals=inputs + 1, row=mine.row)
    assert [row.label for row in picture_rows([mine, again, other])] == ["input", "split 5, no DP", "split 5, no DP"]
    assert picture_rows([]) == []


def test_where_no_picture_was_kept_there_is_none(tmp_path):
    assert Examples.load(tmp_path) is None
    assert Examples.of(reconstruction(), "encoder", label="") is None
