"""Reconstructions as pictures (the paper's Figure 8), and their quality over the split index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.errors import DataError, PrivacyRefusal
from orchestrator.evaluation.figures.drawing import BASELINE, COLOURS, legend_below, new_figure, plain_axes
from orchestrator.evaluation.reconstruction.report import ReconstructionReport
from tasks.datasets.table import ImageArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WITHOUT_PEOPLE = frozenset({"digits"})
"""Data sets whose pictures show nobody."""

_PLAIN, _PRIVATE = COLOURS[:2]


def may_draw(data_set: str, *, allow_people: bool = False) -> bool:
    """Whether pictures of this data set may be drawn: those without people, and others only where that was allowed."""
    return allow_people or data_set in WITHOUT_PEOPLE


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureRow:
    """A row of the grid: the same images, as one attacker got them back."""

    label: str
    images: ImageArray = field(repr=False)
    """(n, S, S, 3)."""
    ssim: float | None = None
    """Written beside the row: of all test rows, not of the few that are drawn."""


def picture_row(report: ReconstructionReport, feature: str, attack: str, *, label: str) -> PictureRow:
    """One attack's examples from a report, of its first seed that came through. Raises `DataError` if it has none."""
    summary = next(summary for summary in report.row(feature).attacks if summary.attack == attack)
    for result in summary.completed:
        if result.examples is not None and result.scores is not None:
            return PictureRow(label=label, images=result.examples, ssim=result.scores.ssim)
    raise DataError(f"{attack} left no pictures of {feature!r}: it crashed, or n_examples was 0")


def feature_rows(report: ReconstructionReport, *, but: str) -> list[PictureRow]:
    """The input, and for each feature its best attacker above the mean image of the class that its head names.

    ``but`` is a feature that is left out. Empty where no pictures were kept, or nothing else was attacked.
    """
    rows = []
    for row in report.rows:
        if row.feature == but or report.originals is None:
            continue
        if row.best is not None:
            rows.append(picture_row(report, row.feature, row.best.attack, label=row.feature))
        if row.class_mean_examples is not None and row.class_mean is not None:
            label = f"class mean, {row.feature}"
            rows.append(PictureRow(label=label, images=row.class_mean_examples, ssim=row.class_mean.ssim))
    return [PictureRow(label="input", images=report.originals), *rows] if rows and report.originals is not None else []


def reconstruction_grid(rows: Sequence[PictureRow], *, data_set: str, allow_people: bool = False) -> Figure:
    """The input on top, then what attackers got back. Raises `PrivacyRefusal` where pictures may show people."""
    if not may_draw(data_set, allow_people=allow_people):
        raise PrivacyRefusal(
            f"pictures of {data_set} may show people: reconstructions of them are drawn only where that is allowed "
            f"expressly (without asking: {', '.join(sorted(WITHOUT_PEOPLE))})"
        )
    n_columns = min((len(row.images) for row in rows), default=0)
    if not n_columns:
        raise DataError("there is no picture to draw")
    figure = new_figure(1.9 + 0.8 * n_columns, 0.35 + 0.84 * len(rows))
    axes = figure.subplots(len(rows), n_columns, squeeze=False)
    for row, across in zip(rows, axes, strict=True):
        for image, ax in zip(row.images, across, strict=False):
            ax.imshow(image, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            for side in ax.spines.values():
                side.set_color("0.8")
        text = row.label if row.ssim is None else f"{row.label}\nSSIM {row.ssim:.2f}"
        across[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
    figure.suptitle("What attackers get back from the feature", fontsize=10)
    return figure


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPoint:
    """How well images of one encoder were got back."""

    split_index: int
    epsilon: float | None
    """None: the encoder was trained without differential privacy."""
    psnr: float
    ssim: float
    mean_image_psnr: float
    mean_image_ssim: float

    @classmethod
    def of(cls, report: ReconstructionReport, feature: str, *, split_index: int, epsilon: float | None) -> SplitPoint:
        """The best attack on one feature of a report. Raises `DataError` if every attack crashed."""
        row = report.row(feature)
        if row.best is None:
            raise DataError(f"every attack on {feature!r} crashed: there is nothing to draw")
        return cls(
            split_index=split_index,
            epsilon=epsilon,
            psnr=row.best.mean("psnr"),
            ssim=row.best.mean("ssim"),
            mean_image_psnr=row.mean_image.psnr,
            mean_image_ssim=row.mean_image.ssim,
        )


def quality_by_split(points: Sequence[SplitPoint]) -> Figure:
    """PSNR and SSIM of the best attack over the split index, with and without DP; the mean image as what needs none."""
    if not points:
        raise DataError("there is no split index to draw")
    figure = new_figure(8.4, 3.4)
    for position, (measure, label) in enumerate((("psnr", "PSNR, dB"), ("ssim", "SSIM"))):
        ax = figure.add_subplot(1, 2, position + 1)
        _draw_lines(ax, points, measure)
        ax.set_ylabel(label)
        ax.set_xlabel("split index")
        ax.set_xticks(sorted({point.split_index for point in points}))
        plain_axes(ax)
    figure.axes[1].set_ylim(min(0.0, *(p.ssim for p in points)), 1.0)
    legend_below(figure, figure.axes[0])
    figure.suptitle("How well the best attacker gets the image back", fontsize=11)
    return figure


def _draw_lines(ax: Axes, points: Sequence[SplitPoint], measure: str) -> None:
    private = sorted({p.epsilon for p in points if p.epsilon is not None})
    styles: list[tuple[float | None, str, str, str, str]] = [(None, _PLAIN, "-", "o", "without DP")]
    dashes, markers = ("--", "-.", ":"), ("s", "^", "D")
    styles += [
        (epsilon, _PRIVATE, dashes[i % 3], markers[i % 3], f"with DP, epsilon {epsilon:g}")
        for i, epsilon in enumerate(private)
    ]
    for epsilon, colour, line, marker, label in styles:
        chosen = sorted((p for p in points if p.epsilon == epsilon), key=lambda p: p.split_index)
        if chosen:
            values = [getattr(p, measure) for p in chosen]
            ax.plot([p.split_index for p in chosen], values, line, color=colour, marker=marker, label=label)
    baseline = {p.split_index: getattr(p, f"mean_image_{measure}") for p in points}
    splits = sorted(baseline)
    ax.plot(splits, [baseline[s] for s in splits], ":", color=BASELINE, marker="_", label="mean training image")
