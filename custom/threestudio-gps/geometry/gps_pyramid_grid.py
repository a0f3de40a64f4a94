"""``gps-pyramid-grid`` for threestudio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from threestudio.models.geometry.base import BaseImplicitGeometry
from torch import Tensor

from gps_guidance.lift.field import PyramidGrid

from ..requirements import register


@register("gps-pyramid-grid")
class GPSPyramidGrid(BaseImplicitGeometry):
    """:class:`gps_guidance.lift.field.PyramidGrid` as a geometry of threestudio.

    Its parameters have the portable engine's names (``geometry.levels.<k>``), in optimiser groups
    and in checkpoints. Nothing is outside the box: threestudio's importance sampler also looks
    there.
    """

    @dataclass
    class Config(PyramidGrid.Config, BaseImplicitGeometry.Config):
        pass

    cfg: Config

    def configure(self) -> None:
        super().configure()
        field = PyramidGrid(OmegaConf.to_object(self.cfg))
        self.levels = field.levels
        self._unregistered = (field,)  # as a child its parameters would be saved twice

    @property
    def field(self) -> PyramidGrid:
        return self._unregistered[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPSPyramidGrid:
        super()._apply(fn, recurse)
        self.field._apply(fn)
        return self

    def _inside(self, points: Tensor) -> Tensor:
        """1 in the box [-radius, radius]^3 and 0 outside, for points [..., 3]: [..., 1]."""
        return (points.abs() <= self.cfg.radius).all(dim=-1, keepdim=True).to(points.dtype)

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        """Points [..., 3] to ``density``, ``features`` and, if asked, normals."""
        out = self.field(points, output_normal)
        return out | {"density": out["density"] * self._inside(points)}

    def forward_density(self, points: Tensor) -> Tensor:
        return self.field.forward_density(points) * self._inside(points)

    def forward_field(self, points: Tensor) -> tuple[Tensor, None]:
        """The density that the surface is cut from; the grid's nodes do not move."""
        return self.forward_density(points), None

    def forward_level(self, field: Tensor, threshold: float) -> Tensor:
        return threshold - field

    def export(self, points: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return {"features": self.field(points)["features"]}

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self.field.update_step(epoch, global_step, on_load_weights)
