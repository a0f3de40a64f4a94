"""The miniature tower: it leans among other buildings and is different from every side."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gps_guidance.miniature.landmark import Landmark
from gps_guidance.miniature.shapes import (
    Ellipsoid,
    Frustum,
    Shape,
    house,
    house_paint,
    plain,
    tree,
)

MIDDLE_M = 25.0
LEAN_DEG, LEAN_BEARING_DEG = 8.0, 200.0


def _lean_axis() -> tuple[float, float, float]:
    lean, bearing = math.radians(LEAN_DEG), math.radians(LEAN_BEARING_DEG)
    return (
        math.sin(lean) * math.sin(bearing),
        math.sin(lean) * math.cos(bearing),
        math.cos(lean),
    )


def _tower_paint(points: Tensor, normals: Tensor) -> Tensor:
    """Six storeys of pale marble over dark arcades; a red banner north-east, a portal west."""
    storey = torch.remainder(points[:, 2] / 6.5, 1.0)
    arcade = ((storey > 0.30) & (storey < 0.72)).float()[:, None]
    marble, shade = points.new_tensor([0.93, 0.89, 0.80]), points.new_tensor([0.66, 0.58, 0.48])
    colour = marble + (shade - marble) * arcade
    bearing = torch.rad2deg(torch.atan2(normals[:, 0], normals[:, 1])) % 360
    banner = ((bearing - 50).abs() < 28) & (points[:, 2] > 9) & (points[:, 2] < 33)
    portal = ((bearing - 275).abs() < 30) & (points[:, 2] < 9)
    colour = torch.where(banner[:, None], points.new_tensor([0.80, 0.12, 0.12]), colour)
    return torch.where(portal[:, None], points.new_tensor([0.20, 0.12, 0.10]), colour)


def build_shapes() -> list[Shape]:
    """The tower and what stands around it, all within 42 m of the centre."""
    axis = _lean_axis()
    foot = tuple(-a * MIDDLE_M * 0.5 if i < 2 else 0.0 for i, a in enumerate(axis))
    top = tuple(f + 40.0 * a for f, a in zip(foot, axis, strict=True))
    return [
        Frustum(foot, axis, 40.0, 9.0, _tower_paint),  # type: ignore[arg-type]
        Frustum(top, axis, 8.0, 6.5, plain(0.86, 0.80, 0.68)),  # type: ignore[arg-type]
        house((-17, 24), 30, 15, 12, 20, 25,
              house_paint((0.90, 0.84, 0.72), (0.45, 0.30, 0.26), 12)),
        house((-27, -14), 16, 12, 9, 14, 80,
              house_paint((0.82, 0.42, 0.24), (0.55, 0.20, 0.14), 9)),
        house((22, -23), 18, 11, 8, 13, -35,
              house_paint((0.36, 0.52, 0.76), (0.25, 0.27, 0.36), 8)),
        Frustum((25, 12, 0), (0, 0, 1), 10.0, 8.5, plain(0.92, 0.90, 0.86)),
        Ellipsoid((25, 12, 10), (8.5, 8.5, 8.0), plain(0.24, 0.56, 0.50)),
        *tree(12, 31, 15, (0.16, 0.36, 0.14)),
        *tree(-32, 6, 13, (0.30, 0.46, 0.12)),
        *tree(-6, -31, 14, (0.62, 0.56, 0.14)),
        *tree(35, -6, 12, (0.18, 0.40, 0.20)),
    ]


TOWER = Landmark(
    "Miniature Tower of Pisa", (43.722952, 10.396597), build_shapes,
    crowds=((40.0, 25.0, 0.25), (195.0, 30.0, 0.2), (290.0, 20.0, 0.15)), middle_m=MIDDLE_M,
)
