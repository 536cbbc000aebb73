"""Task features as points in a plane (the paper's Figure 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.errors import DataError
from orchestrator.evaluation.attacks.base import FloatArray
from orchestrator.evaluation.figures.drawing import MARKERS, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COMPONENTS = 50
_DRAWN = 8
"""Images whose points are joined: more of them would hide one another."""


def task_projection(features: Mapping[str, FloatArray], *, n: int = 150, seed: int = 0) -> Figure:
    """t-SNE of the features (N, C, H, W) of the same N images for every task, one cloud of points.

    A marker is a task, and the points of one image are joined: a triangle for three tasks, a line for two. Raises
    `DataError` for fewer than two tasks, features of several shapes, or fewer than ten images.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Polygon
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    tasks = list(features)
    shapes = {z.shape[1:] for z in features.values()}
    n = min([n, *(len(z) for z in features.values())])
    if len(tasks) < 2 or len(shapes) != 1 or n < 10:
        raise DataError(
            f"a projection takes at least two tasks and ten images, and features of one shape; got {len(tasks)} "
            f"task(s), {n} images and {len(shapes)} shape(s)"
        )
    rows = np.concatenate([z[:n].reshape(n, -1) for z in features.values()])
    rows = rows - rows.mean(axis=0)
    rows = PCA(min(_COMPONENTS, *rows.shape), random_state=seed).fit_transform(rows)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    points_TN2 = points.reshape(len(tasks), n, 2)

    figure = new_figure(6.4, 5.4)
    ax = figure.add_subplot()
    for task, marker, cloud in zip(tasks, MARKERS, points_TN2, strict=False):
        ax.scatter(cloud[:, 0], cloud[:, 1], s=12, marker=marker, facecolor="0.8", edgecolor="0.6", linewidth=0.4)
        ax.scatter([], [], s=26, marker=marker, facecolor="white", edgecolor="0.2", label=task)
    colours = colormaps["viridis"](np.linspace(0, 0.92, _DRAWN))
    for image, colour in zip(range(min(_DRAWN, n)), colours, strict=False):
        corners = points_TN2[:, image]
        ax.add_patch(Polygon(corners, closed=True, facecolor=(*colour[:3], 0.06), edgecolor=colour, linewidth=1.2))
        for corner, marker in zip(corners, MARKERS, strict=False):
            ax.scatter(
                corner[0], corner[1], s=34, marker=marker, facecolor=colour, edgecolor="black", linewidth=0.6, zorder=3
            )
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title("Features of the same images, by task (t-SNE)", fontsize=11)
    legend_below(figure, ax)
    return figure
