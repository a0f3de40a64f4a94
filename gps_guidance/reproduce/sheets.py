"""Pictures of an experiment: rows of images with names before the rows and above the columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from gps_guidance.lift.export import (
    image_grid,
    read_png,
    side_by_side,
    staged,
    to_uint8,
    write_png,
)
from gps_guidance.viz import INK

GAP = 0.05  # between images, of their height
WIDTH, MARGIN, MAX_CELL = 12.0, 1.6, 1.5  # inches: of a sheet, of its rows' names, of an image


def pictures(images: Tensor) -> list[np.ndarray]:
    """Images [B, 3, H, W] in [0, 1] as uint8 [H, W, 3]."""
    return [to_uint8(image.permute(1, 2, 0)) for image in images]


def write_row(path: str | Path, images: Sequence[Any]) -> None:
    """Keep images of one size for :func:`read_row`."""
    write_png(path, side_by_side(images))


def read_row(path: str | Path, count: int) -> list[np.ndarray]:
    """The ``count`` images [H, W, 3] of a row."""
    return np.split(read_png(path), count, axis=1)


def draw_sheet(path: str | Path, rows: Sequence[tuple[str, Sequence[Any]]],
               columns: Sequence[str]) -> Path:
    """A PNG of rows, each a name and its images [H, W, 3] of one size, one for each column; where
    a row has fewer the rest is white."""
    height, width = to_uint8(rows[0][1][0]).shape[:2]
    gap = max(1, round(GAP * height))
    blank = np.full((height + gap, width + gap, 3), 255, dtype=np.uint8)
    cells = []
    for _, images in rows:
        for k in range(len(columns)):
            cell = blank.copy()
            if k < len(images):
                cell[:height, :width] = to_uint8(images[k])
            cells.append(cell)
    grid = image_grid(cells, len(columns))
    side = min(MAX_CELL, (WIDTH - MARGIN) / len(columns))
    scale = side / (width + gap)  # inches a pixel
    figure = Figure(figsize=(MARGIN + scale * grid.shape[1], 0.4 + scale * grid.shape[0]),
                    facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid)
    axes.set_xticks([width / 2 + k * (width + gap) for k in range(len(columns))], columns)
    axes.set_yticks([height / 2 + k * (height + gap) for k in range(len(rows))],
                    [name for name, _ in rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=10, colors=INK)
    axes.spines[:].set_visible(False)
    with staged(path) as stage:
        figure.savefig(stage, format="png", dpi=150, bbox_inches="tight")
    return Path(path)
