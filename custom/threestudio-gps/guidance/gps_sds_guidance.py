"""``gps-sds-guidance`` for threestudio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import threestudio
from omegaconf import OmegaConf
from threestudio.utils.base import BaseObject

from gps_guidance.lift.guidance import GPSGuidance, GPSGuidanceConfig

from ..requirements import register


@register("gps-sds-guidance")
class GPSSDSGuidance(BaseObject):
    """:class:`gps_guidance.lift.guidance.GPSGuidance` with its config, built by threestudio."""

    @dataclass
    class Config(GPSGuidanceConfig, BaseObject.Config):
        pass

    cfg: Config

    def configure(self) -> None:
        self.guidance = GPSGuidance(OmegaConf.to_object(self.cfg), self.device)
        threestudio.info(
            f"GPS guidance: {self.cfg.pretrained_model_name_or_path} at "
            f"{self.guidance.size[0]}x{self.guidance.size[1]} on {self.device}"
        )

    def __call__(self, rgb: Any, prompt_utils: Any, **batch: Any) -> dict[str, Any]:
        """Renders [B, H, W, 3] and threestudio's camera batch to losses and scalars."""
        return self.guidance(rgb, prompt_utils, **batch)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self.guidance.update_step(epoch, global_step, on_load_weights)
