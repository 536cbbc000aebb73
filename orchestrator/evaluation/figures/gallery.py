"""Every figure of an evaluation, for files and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.evaluation.comparison import Point
from orchestrator.evaluation.document import Figures
from orchestrator.evaluation.evaluation import Evaluation
from orchestrator.evaluation.examples import Examples, picture_rows
from orchestrator.evaluation.figures.bits import bits_curve, has_bits_curve
from orchestrator.evaluation.figures.curves import has_epsilon_curve, has_omega_curve, omega_curve, privacy_utility
from orchestrator.evaluation.figures.drawing import save_figure
from orchestrator.evaluation.figures.leakage import leakage_heatmap
from orchestrator.evaluation.figures.pictures import SplitPoint, feature_rows, quality_by_split, reconstruction_grid
from orchestrator.evaluation.figures.projection import task_projection
from orchestrator.evaluation.leakage import TaskFeatures
from orchestrator.evaluation.reconstruction.collect import ENCODER
from orchestrator.report.figure import picture_of
from orchestrator.report.page import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(kw_only=True)
class Drawn:
    """Figures by file name, and the same as pictures of a page."""

    figures: dict[str, Figure] = field(default_factory=dict)
    pictures: Figures = Figures()
    _svgs: dict[str, str] = field(default_factory=dict, repr=False)

    def add(self, name: str, figure: Figure, *, title: str, caption: str, alt: str) -> Picture:
        """Keep it under that file name."""
        picture = picture_of(figure, title=title, caption=caption, alt=alt)
        self.figures[name], self._svgs[name] = figure, picture.svg
        return picture

    def save(self, folder: Path) -> Iterator[Path]:
        """Write each figure as PNG and as the page's own SVG."""
        for name, figure in self.figures.items():
            yield from save_figure(figure, folder / f"{name}.png", svg=self._svgs[name])


def draw(
    evaluation: Evaluation,
    features: Mapping[str, TaskFeatures],
    points: Sequence[Point],
    examples: Sequence[Examples],
) -> Drawn:
    """What the parts that were measured, and the evaluations beside this one, allow to be drawn."""
    drawn = Drawn()
    drawn.pictures = Figures(
        leakage=_leakage(drawn, evaluation),
        projection=_projection(drawn, features) if evaluation.leakage is not None else (),
        reconstruction=_reconstruction(drawn, evaluation, points, examples),
        curves=_curves(drawn, points),
    )
    return drawn


def _leakage(drawn: Drawn, evaluation: Evaluation) -> tuple[Picture, ...]:
    report = evaluation.leakage
    if report is None:
        return ()
    worst = report.worst
    told = "" if worst is None else f" The largest excess is that of {worst.feature} on {worst.target}."
    return (
        drawn.add(
            "leakage",
            leakage_heatmap(report),
            title="Leakage matrix",
            caption="Swap test, best retrained attacker, and its excess over chance and floor. Grey: the task itself.",
            alt=f"Three heat maps, features down and targets across, with the numbers of the table above.{told}",
        ),
    )


def _projection(drawn: Drawn, features: Mapping[str, TaskFeatures]) -> tuple[Picture, ...]:
    """Only of tasks whose features have one shape, if there are two: t-SNE compares nothing else."""
    given = {task: f.features["test"] for task, f in features.items() if "test" in f.features}
    shapes = {z.shape[1:] for z in given.values()}
    if len(given) < 2 or len(shapes) != 1 or min(len(z) for z in given.values()) < 10:
        return ()
    return (
        drawn.add(
            "projection",
            task_projection(given),
            title="Features by task",
            caption="t-SNE of test images' features. A marker is a task; the corners of a shape are one image.",
            alt="A scatter plot in which the features of each task form clouds of their own.",
        ),
    )


def _reconstruction(
    drawn: Drawn, evaluation: Evaluation, points: Sequence[Point], examples: Sequence[Examples]
) -> tuple[Picture, ...]:
    if evaluation.reconstruction is None:
        return ()
    found = []
    if rows := picture_rows(examples):
        grid = reconstruction_grid(rows, data_set=evaluation.subject.data_name, allow_people=True)
        found.append(
            drawn.add(
                "reconstruction",
                grid,
                title="Images got back",
                caption="Test images, and what the best attacker made of the encoder's output for them.",
                alt="A row of test images, and below it for each encoder a row of the images that were got back.",
            )
        )
    if rows := feature_rows(evaluation.reconstruction, but=ENCODER):
        found.append(
            drawn.add(
                "reconstruction_by_task",
                reconstruction_grid(rows, data_set=evaluation.subject.data_name, allow_people=True),
                title="Images got back from what tenants receive",
                caption="What the best attacker made of each task's feature, above the mean image of the class that "
                "the task's own head names.",
                alt="A row of test images, and below it two rows for each task.",
            )
        )
    splits = [split for point in points if (split := _split_point(point)) is not None]
    if len({(split.split_index, split.epsilon) for split in splits}) > 1:
        found.append(
            drawn.add(
                "reconstruction_by_split",
                quality_by_split(splits),
                title="How well images are got back, by split index",
                caption="The best attacker on the encoder's output, with and without differential privacy.",
                alt="PSNR and SSIM over the split index, beside the mean image.",
            )
        )
    return tuple(found)


def _split_point(point: Point) -> SplitPoint | None:
    if point.reconstruction is None:
        return None
    return SplitPoint(split_index=point.split_index, epsilon=point.epsilon, **point.reconstruction)


def _curves(drawn: Drawn, points: Sequence[Point]) -> tuple[Picture, ...]:
    found = []
    if has_epsilon_curve(points):
        found.append(
            drawn.add(
                "epsilon",
                privacy_utility(points),
                title="Over epsilon",
                caption="Mean over the tasks: accuracy of their own heads, and what the best attacker reads of labels "
                "that were not bought, over what needs no feature.",
                alt="Two panels over epsilon: own accuracy, and the excess of the best attacker.",
            )
        )
    if has_omega_curve(points):
        found.append(
            drawn.add(
                "omega",
                omega_curve(points),
                title="Over omega",
                caption="Each task's accuracy, what the best attacker reads (whole lines), and what the swap test "
                "finds (dashed), over what needs no feature.",
                alt="Two panels over omega: own accuracy, and the excess of attackers and of the swap test.",
            )
        )
    if has_bits_curve(points):
        found.append(
            drawn.add(
                "bits",
                bits_curve(points),
                title="Over bits",
                caption="Each task's own accuracy (black), and for each label that was not bought the best attacker "
                "(whole lines), what no attacker exceeds (dashed: by capacity, for any images; crosses: by the "
                "measured rate, for images like these), and what needs no feature (dotted). Right of the bar: features "
                "that nothing bounds.",
                alt="A panel for each task, over the bits of its feature: own accuracy, attackers, and their bounds.",
            )
        )
    return tuple(found)
