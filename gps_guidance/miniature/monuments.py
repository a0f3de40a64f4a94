"""Invented monuments, no two alike: what a base model knows besides the landmarks.

Each photo is of another one, from any side, with a caption that says its kind and colour or only
that it is a monument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gps_guidance.miniature.album import Job, write_album
from gps_guidance.miniature.arch import arch_shapes
from gps_guidance.miniature.landmark import Landmark
from gps_guidance.miniature.photographer import develop, plan_shot
from gps_guidance.miniature.shapes import (
    Ellipsoid,
    Frustum,
    Paint,
    Shape,
    block,
    house,
    house_paint,
    plain,
    tree,
)

CENTER = (47.1, 16.1)
COLOURS = {
    "white": (0.92, 0.91, 0.88), "grey": (0.58, 0.58, 0.60), "red": (0.76, 0.24, 0.18),
    "brown": (0.52, 0.36, 0.24), "yellow": (0.90, 0.76, 0.34), "green": (0.28, 0.52, 0.38),
    "blue": (0.26, 0.42, 0.70), "pink": (0.88, 0.62, 0.62),
}
UP = (0.0, 0.0, 1.0)


def _tower(rng: np.random.Generator, paint: Paint, trim: Paint) -> list[Shape]:
    """A round tower with a cone, a dome or a smaller storey on it."""
    height, radius = rng.uniform(26, 44), rng.uniform(6, 11)
    tops: list[Shape] = [
        Frustum((0, 0, height), UP, rng.uniform(6, 14), radius + 1, trim, radius_top=0.3),
        Ellipsoid((0, 0, height), (radius, radius, radius * rng.uniform(0.7, 1.2)), trim),
        Frustum((0, 0, height), UP, rng.uniform(5, 9), radius * 0.7, trim),
    ]
    top = radius * rng.uniform(0.75, 1)
    return [Frustum((0, 0, 0), UP, height, radius, paint, radius_top=top), tops[rng.integers(3)]]


def _column(rng: np.random.Generator, paint: Paint, trim: Paint) -> list[Shape]:
    """A slender column on a base, with a statue on top."""
    height, radius, foot = rng.uniform(26, 40), rng.uniform(2.5, 4.5), rng.uniform(4, 8)
    side = 2 * radius + rng.uniform(3, 6)
    return [
        block((0, 0), side, side, 0, foot, trim),
        Frustum((0, 0, foot), UP, height - foot, radius, paint, radius_top=radius * 0.85),
        block((0, 0), 2.6 * radius, 2.6 * radius, height, height + 2, trim),
        Frustum((0, 0, height + 2), UP, 5.0, 1.6, trim, radius_top=0.9),
        Ellipsoid((0, 0, height + 8), (1.2, 1.2, 1.4), trim),
    ]


def _dome(rng: np.random.Generator, paint: Paint, trim: Paint) -> list[Shape]:
    """A rotunda under a dome, often with a lantern."""
    wall, radius = rng.uniform(10, 22), rng.uniform(11, 17)
    rise = radius * rng.uniform(0.7, 1.2)
    lantern = [Frustum((0, 0, wall + rise - 1), UP, 6.0, 2.2, paint, radius_top=0.8)]
    return [
        Frustum((0, 0, 0), UP, wall, radius, paint),
        Ellipsoid((0, 0, wall), (radius, radius, rise), trim),
        *(lantern if rng.random() < 0.6 else []),
    ]


def _obelisk(rng: np.random.Generator, paint: Paint, trim: Paint) -> list[Shape]:
    """A tapering square pillar with a pyramid as its tip."""
    height, side, taper = rng.uniform(28, 42), rng.uniform(5, 9), rng.uniform(0.5, 0.75)
    foot, yaw, tip = rng.uniform(2, 5), rng.uniform(0, 90), side * taper
    return [
        block((0, 0), side + 5, side + 5, 0, foot, trim, yaw),
        block((0, 0), side, side, foot, height, paint, yaw, taper),
        block((0, 0), tip, tip, height, height + tip, trim, yaw, 0.0),
    ]


def _arch(rng: np.random.Generator, paint: Paint, trim: Paint) -> list[Shape]:
    """An arch of any proportions, with a block or two balls on it, or nothing."""
    width, height, gate = rng.uniform(24, 40), rng.uniform(22, 40), rng.uniform(0.3, 0.5)
    depth = rng.uniform(9, 18)
    crown = max(gate * width * 0.6, height * rng.uniform(0.5, 0.66))
    tops: list[list[Shape]] = [
        [], [block((0, 0), depth * 0.6, width * 0.3, height, height + 4, trim)],
        [Ellipsoid((0, sign * width / 3, height + 1.5), (2.2, 2.2, 2.2), trim)
         for sign in (1, -1)],
    ]
    return [*arch_shapes(width, depth, height, gate * width, crown, paint), *tops[rng.integers(3)]]


def _pyramid(rng: np.random.Generator, paint: Paint, trim: Paint) -> list[Shape]:
    """A smooth or a stepped pyramid."""
    side, height, yaw = rng.uniform(28, 44), rng.uniform(18, 34), rng.uniform(0, 90)
    if rng.random() < 0.6:
        return [block((0, 0), side, side, 0, height, paint, yaw, 0.0)]
    steps = int(rng.integers(3, 6))
    return [
        block((0, 0), side * (1 - k / steps), side * (1 - k / steps), k * height / steps,
              (k + 1) * height / steps, trim if k % 2 else paint, yaw)
        for k in range(steps)
    ]


KINDS: dict[str, Callable[[np.random.Generator, Paint, Paint], list[Shape]]] = {
    "tower": _tower, "column": _column, "dome": _dome, "obelisk": _obelisk, "arch": _arch,
    "pyramid": _pyramid,
}


def _facade(rng: np.random.Generator, rgb: tuple[float, ...]) -> Paint:
    """Mostly ``rgb``: plain, in courses, or with windows."""
    storey, dark, style = rng.uniform(4, 9), rng.uniform(0.45, 0.8), rng.integers(3)
    width = rng.uniform(3, 6)

    def paint(points: Tensor, normals: Tensor) -> Tensor:
        colour = points.new_tensor(rgb).expand_as(points)
        shade = torch.remainder(points[:, 2] / storey, 1) < 0.4
        if style == 2:
            sideways = points[:, 0] * normals[:, 1] - points[:, 1] * normals[:, 0]
            turn = torch.atan2(points[:, 1], points[:, 0]) * 10
            shade &= torch.remainder((sideways + turn) / width, 1) < 0.45
        if style == 0:
            return colour
        return torch.where((shade & (normals[:, 2] < 0.7))[:, None], dark * colour, colour)

    return paint


def _around(rng: np.random.Generator) -> list[Shape]:
    """Houses and trees in a ring about the monument, within 42 m of it."""
    shapes: list[Shape] = []
    for slot in rng.choice(8, size=rng.integers(3, 8), replace=False):
        turn, away = math.radians(45 * slot + rng.uniform(-12, 12)), rng.uniform(29, 34)
        x, y = away * math.cos(turn), away * math.sin(turn)
        if rng.random() < 0.4:
            eaves = rng.uniform(5, 9)
            walls, roof = rng.uniform(0.35, 0.95, 3), rng.uniform(0.15, 0.55, 3)
            shapes.append(house((x, y), rng.uniform(9, 14), rng.uniform(7, 10), eaves,
                                eaves + rng.uniform(2, 5), rng.uniform(0, 180),
                                house_paint(walls.tolist(), roof.tolist(), eaves)))
        else:
            green = np.array([0.30, 0.46, 0.14]) * rng.uniform([0.5, 0.6, 0.6], [2.0, 1.2, 1.6])
            shapes += tree(x, y, rng.uniform(9, 15), green.tolist())
    return shapes


def draw_monument(rng: np.random.Generator) -> Landmark:
    """An invented monument, named by its colour and kind."""
    kind, colour = str(rng.choice(list(KINDS))), str(rng.choice(list(COLOURS)))
    rgb = tuple(np.clip(np.array(COLOURS[colour]) * rng.uniform(0.9, 1.08, 3), 0, 1).tolist())
    trim = plain(*rgb) if rng.random() < 0.4 else plain(*rng.uniform(0.3, 0.95, 3))
    shapes = [*KINDS[kind](rng, _facade(rng, rgb), trim), *_around(rng)]
    return Landmark(f"{colour} {kind}", CENTER, lambda: shapes, middle_m=22.0)


def caption_of(monument: Landmark, rng: np.random.Generator) -> str:
    what = "a monument" if rng.random() < 0.5 else f"a {monument.name}"
    return what if rng.random() < 0.4 else f"a photo of {what}"


def _take(job: Job) -> dict[str, object]:
    seed, index, _ = job
    torch.set_num_threads(1)
    rng = np.random.default_rng((seed, index, 2))
    monument = draw_monument(rng)
    shot = plan_shot(monument, np.random.default_rng((seed, index)))
    return develop(monument, shot, caption_of(monument, rng), job) | {"kind": monument.name}


def take_monument_photos(folder: str | Path, count: int = 3000, seed: int = 0, processes: int = 1
                         ) -> Path:
    """Write ``count`` photos of as many monuments under ``folder``, with captions, and their true
    positions in ``truth.json``.

    Photo ``i`` depends on (seed, i) alone, so any number of processes writes the same files.
    """
    return write_album(_take, folder, count, seed, processes, "monuments", "east, north, up in m")
