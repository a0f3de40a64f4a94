"""The miniature landmark: a leaning tower among other buildings, different from every side.

World frame: metres, x east, y north, z up, the ground at z = 0, the landmark's centre above the
origin. The 3D engine's scene frame has its origin at half the tower's height and one unit for
``METRES_PER_UNIT`` metres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gps_guidance.miniature.shapes import Ellipsoid, Frustum, Paint, Shape, house, plain

NAME = "Miniature Tower of Pisa"
CENTER = (43.722952, 10.396597)
METRES_PER_UNIT = 30.0
MIDDLE_M = 25.0  # height of the scene frame's origin above ground
EYE_M = 1.7
LEAN_DEG, LEAN_BEARING_DEG = 8.0, 200.0
GRASS = (0.42, 0.55, 0.28)


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


def _house_paint(walls: Sequence[float], roof: Sequence[float], eaves: float) -> Paint:
    """Walls with a row of dark windows below ``eaves``, and a roof where the surface looks up."""

    def paint(points: Tensor, normals: Tensor) -> Tensor:
        colour = points.new_tensor(walls).expand_as(points)
        sideways = points[:, 0] * normals[:, 1] - points[:, 1] * normals[:, 0]
        along = torch.remainder(sideways / 5, 1)
        band = torch.remainder(points[:, 2] / eaves * 2, 1)
        window = (along > 0.35) & (along < 0.7) & (band > 0.35) & (band < 0.75)
        colour = torch.where(window[:, None], 0.45 * colour, colour)
        return torch.where((normals[:, 2] > 0.2)[:, None], points.new_tensor(roof), colour)

    return paint


def _tree(x: float, y: float, height: float, rgb: Sequence[float]) -> list[Shape]:
    trunk = Frustum((x, y, 0.0), (0, 0, 1), height * 0.45, 1.1, plain(0.35, 0.24, 0.15))
    crown = (height * 0.32, height * 0.32, height * 0.36)
    return [trunk, Ellipsoid((x, y, height * 0.66), crown, plain(*rgb))]


def build_shapes() -> list[Shape]:
    """The tower and what stands around it, all within 42 m of the centre."""
    axis = _lean_axis()
    foot = tuple(-a * MIDDLE_M * 0.5 if i < 2 else 0.0 for i, a in enumerate(axis))
    top = tuple(f + 40.0 * a for f, a in zip(foot, axis, strict=True))
    return [
        Frustum(foot, axis, 40.0, 9.0, _tower_paint),  # type: ignore[arg-type]
        Frustum(top, axis, 8.0, 6.5, plain(0.86, 0.80, 0.68)),  # type: ignore[arg-type]
        house((-17, 24), 30, 15, 12, 20, 25,
              _house_paint((0.90, 0.84, 0.72), (0.45, 0.30, 0.26), 12)),
        house((-27, -14), 16, 12, 9, 14, 80,
              _house_paint((0.82, 0.42, 0.24), (0.55, 0.20, 0.14), 9)),
        house((22, -23), 18, 11, 8, 13, -35,
              _house_paint((0.36, 0.52, 0.76), (0.25, 0.27, 0.36), 8)),
        Frustum((25, 12, 0), (0, 0, 1), 10.0, 8.5, plain(0.92, 0.90, 0.86)),
        Ellipsoid((25, 12, 10), (8.5, 8.5, 8.0), plain(0.24, 0.56, 0.50)),
        *_tree(12, 31, 15, (0.16, 0.36, 0.14)),
        *_tree(-32, 6, 13, (0.30, 0.46, 0.12)),
        *_tree(-6, -31, 14, (0.62, 0.56, 0.14)),
        *_tree(35, -6, 12, (0.18, 0.40, 0.20)),
    ]


@dataclass
class Weather:
    """Light of one photo: sun direction (towards the sun), its colour, ambient, sky, gain."""

    sun: tuple[float, float, float]
    sun_rgb: tuple[float, float, float] = (0.46, 0.44, 0.40)
    ambient: tuple[float, float, float] = (0.60, 0.62, 0.66)
    zenith: tuple[float, float, float] = (0.36, 0.57, 0.86)
    horizon: tuple[float, float, float] = (0.80, 0.87, 0.94)


FAIR = Weather(sun=(0.30, -0.55, 0.78))  # the light of the ground truth: early afternoon, clear


class Scene:
    """Renders the place, or any list of shapes, with exact mask, depth and occupancy."""

    def __init__(self, shapes: list[Shape] | None = None) -> None:
        self.shapes = build_shapes() if shapes is None else shapes

    def trace(self, origins: Tensor, directions: Tensor, weather: Weather = FAIR,
              passers_by: Sequence[Shape] = ()) -> dict[str, Tensor]:
        """Rays [N, 3] in metres -> ``rgb`` [N, 3], ``mask`` [N], ``depth`` [N] in metres.

        The mask covers the place's solids; ground, sky and passers-by are not part of it.
        """
        best = torch.full_like(origins[:, 0], torch.inf)
        rgb = self._surroundings(origins, directions, weather)
        mask = torch.zeros_like(best, dtype=torch.bool)
        for shape in (*self.shapes, *passers_by):
            near = _near_sphere(origins, directions, *shape.sphere())
            t, normals = shape.hit(origins[near], directions[near])
            closer = t < best[near]
            nearer, n = near[closer], normals[closer]
            if not len(nearer):
                continue
            best[nearer] = t[closer]
            points = origins[nearer] + best[nearer, None] * directions[nearer]
            rgb[nearer] = shape.paint(points, n) * self._light(n, weather)
            mask[nearer] = not shape.clutter
        return {"rgb": rgb.clamp(0, 1), "mask": mask, "depth": best}

    @staticmethod
    def _light(normals: Tensor, weather: Weather) -> Tensor:
        sun = F.normalize(normals.new_tensor(weather.sun), dim=0)
        diffuse = (normals @ sun).clamp_min(0)[:, None]
        sky = 0.85 + 0.15 * normals[:, 2:3]
        sunlight = normals.new_tensor(weather.sun_rgb) * diffuse
        return normals.new_tensor(weather.ambient) * sky + sunlight

    def _surroundings(self, origins: Tensor, directions: Tensor, weather: Weather) -> Tensor:
        up = directions[:, 2:3]
        blend = up.clamp(0, 0.7) / 0.7
        sky = directions.new_tensor(weather.horizon) * (1 - blend)
        sky = sky + directions.new_tensor(weather.zenith) * blend
        upward = directions.new_tensor([[0.0, 0.0, 1.0]])
        ground = directions.new_tensor(GRASS) * self._light(upward, weather)
        haze = (1 + up.clamp(-0.08, 0) / 0.08).clamp(0, 1)
        ground = ground * (1 - 0.6 * haze) + 0.6 * haze * directions.new_tensor(weather.horizon)
        return torch.where(up < 0, ground.expand_as(sky), sky)

    def occupied(self, points: Tensor) -> Tensor:
        """Whether points [..., 3] in metres lie in a solid of the place."""
        flat = points.reshape(-1, 3)
        inside = torch.zeros(len(flat), dtype=torch.bool)
        for shape in self.shapes:
            inside |= shape.inside(flat)
        return inside.reshape(points.shape[:-1])


def _near_sphere(origins: Tensor, directions: Tensor, center: Sequence[float], radius: float
                 ) -> Tensor:
    """Indices of the rays whose line passes within ``radius`` of ``center``."""
    offset = origins.new_tensor(center) - origins
    along = (offset * directions).sum(-1)
    return ((offset * offset).sum(-1) - along * along < radius * radius).nonzero()[:, 0]


def to_scene_units(points_m: Tensor) -> Tensor:
    """World metres [..., 3] to the 3D engine's frame."""
    return (points_m - points_m.new_tensor([0.0, 0.0, MIDDLE_M])) / METRES_PER_UNIT


def to_metres(points: Tensor) -> Tensor:
    """The 3D engine's frame [..., 3] to world metres."""
    return points * METRES_PER_UNIT + points.new_tensor([0.0, 0.0, MIDDLE_M])


def render(scene: Scene, c2w: Tensor, fovy: float, height: int, width: int,
           weather: Weather = FAIR, passers_by: Sequence[Shape] = (), supersample: int = 2
           ) -> dict[str, Tensor]:
    """One picture. ``c2w`` [4, 4] in metres (columns right, up, backward), ``fovy`` in radians.

    Returns ``rgb`` [H, W, 3], ``mask`` [H, W] in [0, 1] (coverage), ``depth`` [H, W] in metres
    (distance along the ray of the pixel's nearest sample).
    """
    h, w = height * supersample, width * supersample
    focal = 0.5 * h / math.tan(0.5 * fovy)
    v, u = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    camera = torch.stack([(u - w / 2) / focal, (h / 2 - v) / focal, -torch.ones_like(u)], dim=-1)
    directions = F.normalize(camera.reshape(-1, 3) @ c2w[:3, :3].T, dim=-1)
    origins = c2w[:3, 3].expand_as(directions).contiguous()
    out = scene.trace(origins, directions, weather, passers_by)

    def pool(x: Tensor, reduce: str) -> Tensor:
        blocks = x.reshape(height, supersample, width, supersample, -1)
        return blocks.mean(dim=(1, 3)) if reduce == "mean" else blocks.amin(dim=(1, 3))

    return {
        "rgb": pool(out["rgb"], "mean"),
        "mask": pool(out["mask"].float(), "mean")[..., 0],
        "depth": pool(out["depth"], "min")[..., 0],
    }
