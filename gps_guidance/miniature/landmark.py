"""A landmark of the miniature: solids in a light, and where the crowd stands.

World frame: metres, x east, y north, z up, the ground at z = 0, the landmark's centre above the
origin. The 3D engine's scene frame has its origin at the landmark's middle and one unit for
``metres_per_unit`` metres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from gps_guidance import geo
from gps_guidance.miniature.shapes import Shape

EYE_M = 1.7
GRASS = (0.42, 0.55, 0.28)


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
    """Renders solids on a meadow, with exact mask, depth and occupancy."""

    def __init__(self, shapes: list[Shape]) -> None:
        self.shapes = shapes

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


@dataclass(frozen=True)
class Landmark:
    """A place that a crowd photographs, centred above the origin of its world frame.

    ``center`` is (lat, lon) in degrees. Of ``crowds`` each is the bearing in degrees where one
    gathers, its spread, and its part of all photos; who is in none stands anywhere around.
    ``middle_m`` is the height of the scene frame's origin above ground.
    """

    name: str
    center: geo.LatLon
    build_shapes: Callable[[], list[Shape]]
    crowds: tuple[tuple[float, float, float], ...] = ()
    middle_m: float = 25.0
    metres_per_unit: float = 30.0

    @cached_property
    def scene(self) -> Scene:
        return Scene(self.build_shapes())

    @property
    def middle(self) -> Tensor:
        """The scene frame's origin [3] in world metres."""
        return torch.tensor([0.0, 0.0, self.middle_m])

    def to_scene_units(self, points_m: Tensor) -> Tensor:
        """World metres [..., 3] to the 3D engine's frame."""
        return (points_m - self.middle) / self.metres_per_unit

    def to_metres(self, points: Tensor) -> Tensor:
        """The 3D engine's frame [..., 3] to world metres."""
        return points * self.metres_per_unit + self.middle


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
