"""Solids with exact ray intersections and occupancy, in metres: x east, y north, z up, ground at 0.

Each shape answers ``hit(origins, directions)`` for rays [N, 3] with the distance to the first
surface in front of the camera ([N], infinite where missed) and the outward normal [N, 3], and
``inside(points)`` with booleans [...]. Colour is a function of the point on the surface.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Paint = Callable[[Tensor, Tensor], Tensor]  # points [N, 3], normals [N, 3] -> RGB [N, 3]
NEAR_M = 0.5


def plain(*rgb: float) -> Paint:
    """One colour everywhere."""
    return lambda points, normals: points.new_tensor(rgb).expand_as(points)


class Shape(ABC):
    """A solid with a paint; ``clutter`` marks what is not part of the place (passers-by)."""

    paint: Paint
    clutter: bool = False

    @abstractmethod
    def hit(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Distance [N] to the first surface in front, infinite where missed, and normal [N, 3]."""

    @abstractmethod
    def inside(self, points: Tensor) -> Tensor:
        """Whether points [..., 3] lie in the solid, booleans [...]."""

    @abstractmethod
    def sphere(self) -> tuple[tuple[float, float, float], float]:
        """Centre and radius of a sphere around the solid; rays that miss it are not tested."""


@dataclass
class Ellipsoid(Shape):
    center: tuple[float, float, float]
    radii: tuple[float, float, float]
    paint: Paint
    clutter: bool = False

    def _unit(self, points: Tensor) -> Tensor:
        return (points - points.new_tensor(self.center)) / points.new_tensor(self.radii)

    def hit(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        o, d = self._unit(origins), directions / directions.new_tensor(self.radii)
        a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
        root = b * b - a * c
        t = (-b - root.clamp_min(0).sqrt()) / a
        t = torch.where((root > 0) & (t > NEAR_M), t, torch.inf)
        unit = o + torch.where(t.isfinite(), t, 0)[:, None] * d
        normals = unit / directions.new_tensor(self.radii)
        return t, torch.nn.functional.normalize(normals, dim=-1)

    def inside(self, points: Tensor) -> Tensor:
        return (self._unit(points) ** 2).sum(-1) < 1

    def sphere(self) -> tuple[tuple[float, float, float], float]:
        return self.center, max(self.radii)


@dataclass
class Frustum(Shape):
    """A capped cylinder or cone frustum from ``base`` along ``axis``; radii at base and top."""

    base: tuple[float, float, float]
    axis: tuple[float, float, float]
    height: float
    radius: float
    paint: Paint
    radius_top: float | None = None
    clutter: bool = False

    def _frame(self, like: Tensor) -> tuple[Tensor, Tensor, float, float]:
        axis = torch.nn.functional.normalize(like.new_tensor(self.axis), dim=0)
        top = self.radius if self.radius_top is None else self.radius_top
        return like.new_tensor(self.base), axis, self.radius, (top - self.radius) / self.height

    def hit(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        base, axis, r0, slope = self._frame(origins)
        o = origins - base
        oz, dz = o @ axis, directions @ axis
        op, dp = o - oz[:, None] * axis, directions - dz[:, None] * axis
        r = r0 + slope * oz
        a = (dp * dp).sum(-1) - (slope * dz) ** 2
        b = (op * dp).sum(-1) - r * slope * dz
        c = (op * op).sum(-1) - r * r
        root = (b * b - a * c).clamp_min(0).sqrt()
        a = torch.where(a.abs() < 1e-9, 1e-9, a)
        best = torch.full_like(oz, torch.inf)
        normals = torch.zeros_like(origins)
        for t in ((-b - root) / a, (-b + root) / a):
            z = oz + t * dz
            side = (t > NEAR_M) & (t < best) & (z > 0) & (z < self.height)
            side &= (b * b - a * c > 0) & (r0 + slope * z > 0)
            radial = torch.nn.functional.normalize(op + t[:, None] * dp, dim=-1) - slope * axis
            best = torch.where(side, t, best)
            normals = torch.where(side[:, None], radial, normals)
        for z_cap, sign in ((0.0, -1.0), (self.height, 1.0)):
            t = (z_cap - oz) / torch.where(dz.abs() < 1e-9, 1e-9, dz)
            rim = op + t[:, None] * dp
            cap = (t > NEAR_M) & (t < best) & ((rim * rim).sum(-1) < (r0 + slope * z_cap) ** 2)
            best = torch.where(cap, t, best)
            normals = torch.where(cap[:, None], sign * axis, normals)
        return best, torch.nn.functional.normalize(normals, dim=-1)

    def inside(self, points: Tensor) -> Tensor:
        base, axis, r0, slope = self._frame(points)
        p = points - base
        z = p @ axis
        radial = (p - z[..., None] * axis).norm(dim=-1)
        return (z > 0) & (z < self.height) & (radial < r0 + slope * z)

    def sphere(self) -> tuple[tuple[float, float, float], float]:
        norm = math.hypot(*self.axis)
        x, y, z = (
            b + 0.5 * self.height * a / norm for a, b in zip(self.axis, self.base, strict=True)
        )
        return (x, y, z), math.hypot(0.5 * self.height, max(self.radius, self.radius_top or 0))


@dataclass
class Hull(Shape):
    """A convex solid: the intersection of half-spaces n . p < offset."""

    planes: list[tuple[tuple[float, float, float], float]]
    around: tuple[tuple[float, float, float], float]  # centre and radius of an enclosing sphere
    paint: Paint
    clutter: bool = False

    def _planes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return (
            like.new_tensor([n for n, _ in self.planes]),
            like.new_tensor([offset for _, offset in self.planes]),
        )

    def hit(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        n, offset = self._planes(origins)
        facing = directions @ n.T
        t = (offset - origins @ n.T) / torch.where(facing.abs() < 1e-9, 1e-9, facing)
        enter, which = torch.where(facing < 0, t, -torch.inf).max(dim=-1)
        leave = torch.where(facing > 0, t, torch.inf).min(dim=-1).values
        hit = (enter < leave) & (enter > NEAR_M)
        return torch.where(hit, enter, torch.inf), n[which]

    def inside(self, points: Tensor) -> Tensor:
        n, offset = self._planes(points)
        return (points @ n.T < offset).all(-1)

    def sphere(self) -> tuple[tuple[float, float, float], float]:
        return self.around


def house(
    center: tuple[float, float], length: float, width: float, eaves: float, ridge: float,
    yaw_deg: float, paint: Paint,
) -> Hull:
    """A house with a gabled roof; the ridge runs along ``length``, turned ``yaw_deg`` from +x."""
    c, s = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
    along, across = (c, s, 0.0), (-s, c, 0.0)
    run, rise = width / 2, ridge - eaves
    norm = math.hypot(run, rise)
    planes = [((0.0, 0.0, -1.0), 0.0)]
    for sign in (1.0, -1.0):
        for axis, half in ((along, length / 2), (across, width / 2)):
            n = (sign * axis[0], sign * axis[1], 0.0)
            planes.append((n, half + n[0] * center[0] + n[1] * center[1]))
        roof = (sign * across[0] * rise / norm, sign * across[1] * rise / norm, run / norm)
        planes.append((roof, ridge * run / norm + roof[0] * center[0] + roof[1] * center[1]))
    around = ((*center, ridge / 2), math.hypot(length / 2, width / 2, ridge / 2))
    return Hull(planes, around, paint)


def house_paint(walls: Sequence[float], roof: Sequence[float], eaves: float) -> Paint:
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


def tree(x: float, y: float, height: float, rgb: Sequence[float]) -> list[Shape]:
    trunk = Frustum((x, y, 0.0), (0, 0, 1), height * 0.45, 1.1, plain(0.35, 0.24, 0.15))
    crown = (height * 0.32, height * 0.32, height * 0.36)
    return [trunk, Ellipsoid((x, y, height * 0.66), crown, plain(*rgb))]
