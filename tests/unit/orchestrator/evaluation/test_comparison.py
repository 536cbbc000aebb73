import dataclasses
import json

import numpy as np
import pytest
from evaluations import evaluation, leakage, reconstruction, subject

from orchestrator.errors import DataError
from orchestrator.evaluation.comparison import FILE, Point, TargetPoint, TaskPoint, read_points
from orchestrator.evaluation.examples import Examples, picture_rows
from orchestrator.evaluation.figures.bits import bits_curve, has_bits_curve
from orchestrator.evaluation.figures.curves import has_epsilon_curve, has_omega_curve, omega_curve, privacy_utility
from orchestrator.privacy.bounded.bounds import accuracy_bound
from orchestrator.privacy.bounded.channel import ChannelConfig

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


SHARES = (0.5, 0.3, 0.2)


def bounded_point(*, bits, own, leak, omega=0.0, shares=SHARES):
    """One task, pose, attacked for one label."""
    bound = None if bits is None else accuracy_bound(bits, SHARES).accuracy
    target = TargetPoint(
        leak=leak, baseline=0.5, bound=bound, rate_bound=None if bound is None else bound - 0.01, shares=shares
    )
    task = TaskPoint(own=own, excess=leak - 0.5, swap=None, omega=omega, bits=bits, targets={"who": target})
    return dataclasses.replace(point(), tasks={"pose": task})


def test_over_bits_accuracy_and_attackers_run_below_the_bound_beside_what_nothing_bounds():
    points = [
        bounded_point(bits=1.0, own=0.7, leak=0.55),
        bounded_point(bits=4.0, own=0.9, leak=0.65),
        bounded_point(bits=4.0, own=0.8, leak=0.75),
        bounded_point(bits=None, own=0.95, leak=1.0),
        bounded_point(bits=None, own=0.94, leak=0.98, omega=0.1),
    ]
    assert has_bits_curve(points)
    (ax,) = bits_curve(points).axes
    np.testing.assert_allclose(lines(ax)["its own task"].get_xydata(), [[1, 70], [4, 85]])
    np.testing.assert_allclose(lines(ax)["best attacker on who"].get_xydata(), [[1, 55], [4, 70]])
    bits, allowed = lines(ax)["bound on who"].get_xydata().T
    np.testing.assert_allclose(allowed, [100 * accuracy_bound(b, SHARES).accuracy for b in bits])
    assert allowed[0] == pytest.approx(50) and (np.diff(allowed) >= -1e-9).all()
    apart = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert sorted(float(line.get_ydata()[0]) for line in apart) == [94, 95, 98, 100]
    assert min(float(line.get_xdata()[0]) for line in apart) > 4, "right of every bounded feature"
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names[:3] == ["1", "4", "none"] and names[3].endswith("0.1")
    (crosses,) = [c for c in ax.collections if c.get_label() == "rate bound on who"]
    expected = 100 * accuracy_bound(1.0, SHARES).accuracy - 1
    np.testing.assert_allclose(crosses.get_offsets()[0], [1, expected])


def test_the_legend_names_what_only_a_later_panel_shows():
    one, two = (bounded_point(bits=b, own=0.9, leak=0.6) for b in (1.0, 4.0))
    other = dataclasses.replace(one.tasks["pose"], targets={"pose": one.tasks["pose"].targets["who"]})
    points = [dataclasses.replace(p, tasks={**p.tasks, "eyes": other}) for p in (one, two)]
    points[1].tasks["eyes"] = dataclasses.replace(other, bits=4.0)
    (legend,) = bits_curve(points).legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert {"its own task", "best attacker on who", "best attacker on pose"} < set(texts)
    assert len(texts) == len(set(texts))


def test_over_bits_nothing_is_drawn_of_one_budget_alone_or_of_encoders_that_are_not_bounded():
    bounded, free = bounded_point(bits=4.0, own=0.9, leak=0.6), bounded_point(bits=None, own=0.9, leak=1.0)
    assert not has_bits_curve([bounded, bounded])
    assert not has_bits_curve([free, bounded_point(bits=None, own=0.9, leak=1.0, omega=1.0)])
    assert not has_bits_curve([bounded, bounded_point(bits=None, own=0.9, leak=1.0, omega=None)]), "not known which"
    assert has_bits_curve([bounded, free])


def test_bits_and_bounds_are_read_back_and_may_be_missing_from_older_evaluations():
    channel = ChannelConfig(dimensions=4, noise=0.5)
    whole = evaluation().to_json()
    whole["subject"]["tasks"]["pose"]["module_config"]["channel"] = channel.to_json()
    whole["leakage"]["rows"][0]["bound"] = {"accuracy": 0.8}
    pose = Point.of(whole).tasks["pose"]
    assert pose.bits == channel.bits_per_image
    assert (pose.targets["eyes"].bound, pose.targets["eyes"].leak) == (0.8, pytest.approx(0.97))
    assert set(pose.targets) == {"eyes", "who"} and pose.targets["who"].bound is None
    for row in whole["leakage"]["rows"]:
        del row["rate_bound"], row["target_shares"]
    assert Point.of(whole).tasks["pose"].targets["eyes"].shares == ()
    points = [bounded_point(bits=b, own=0.9, leak=0.6, shares=()) for b in (1.0, 4.0)]
    assert "bound on who" not in lines(bits_curve(points).axes[0])
