"""``gps-prompt-processor`` for threestudio."""

from __future__ import annotations

from dataclasses import dataclass

import threestudio
from omegaconf import OmegaConf
from threestudio.utils.base import BaseObject

from gps_guidance.lift.prompts import (
    GPSPromptProcessor,
    GPSPromptProcessorConfig,
    PromptUtils,
)

from ..requirements import register


@register("gps-prompt-processor")
class GPSPromptProcessorObject(BaseObject):
    """:class:`gps_guidance.lift.prompts.GPSPromptProcessor`, built by threestudio.

    Prompts are embedded in this process. threestudio's own processors start a child that never
    loads ``custom/``, and keep embeddings on disk by the model's path, where a retrained model
    would meet stale ones.
    """

    @dataclass
    class Config(GPSPromptProcessorConfig, BaseObject.Config):
        pass

    cfg: Config

    def configure(self) -> None:
        self.processor = GPSPromptProcessor(OmegaConf.to_object(self.cfg), self.device)
        threestudio.info(f"GPS prompt: {self.processor.prompt!r}")

    def __call__(self) -> PromptUtils:
        return self.processor()
