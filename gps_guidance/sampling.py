"""Images of a model in memory, deterministic by seed: by bearing, by position, by text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from gps_guidance.models import DiffusionModel
from gps_guidance.pipeline import StableDiffusionGPSPipeline


def _sample(kind: Any, model: DiffusionModel, prompts: Any, seed: int,
            size: tuple[int, int] | None, **call: Any) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], on the CPU, of a pipeline around the model's parts."""
    parts = {name: part for name, part in model.modules().items()
             if name != "gps_encoder" or kind is StableDiffusionGPSPipeline}
    pipe = kind(**parts, tokenizer=model.tokenizer, scheduler=model.sampler, safety_checker=None,
                feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    height, width = size or (None, None)
    images: Tensor = pipe(prompts, height=height, width=width, output_type="pt",
                          generator=torch.Generator().manual_seed(seed), **call).images
    return images.float().cpu()


def sample_angles(model: DiffusionModel, bearings_deg: Sequence[float], guidance_scale: float = 2.0,
                  num_inference_steps: int = 50, seed: int = 0, use_angle: bool = True,
                  prompt: str | None = None) -> Tensor:
    """One image for each bearing by Eq. 7, [B, 3, H, W] in [0, 1]; ``guidance_scale`` is its w.

    ``use_angle=False`` zeroes the angle token: the text-only model, for comparison. ``prompt`` is
    another than the model's own.
    """
    scale = 1 + guidance_scale
    return _sample(StableDiffusionGPSPipeline, model, prompt, seed, None,
                   bearing_deg=list(bearings_deg), guidance_scale=scale,
                   gps_guidance_scale=scale if use_angle else 0.0,
                   num_inference_steps=num_inference_steps)


def sample_texts(model: DiffusionModel, prompts: list[str], size: tuple[int, int],
                 guidance_scale: float = 6.5, num_inference_steps: int = 50, seed: int = 0
                 ) -> Tensor:
    """One image for each prompt from the text tokens alone, [B, 3, H, W] in [0, 1].

    The unconditional branch is the embedding of "", as Stable Diffusion was trained, with the
    weight w = ``guidance_scale`` of Eq. 7.
    """
    return _sample(StableDiffusionPipeline, model, prompts, seed, size,
                   guidance_scale=1 + guidance_scale, num_inference_steps=num_inference_steps)


def sample_gps(model: DiffusionModel, prompts: list[str] | None,
               gps: Sequence[tuple[float, float]], size: tuple[int, int] | None,
               guidance_scale: float = 3.5, gps_guidance_scale: float = 7.5,
               num_inference_steps: int = 50, seed: int = 0) -> Tensor:
    """One image for each prompt and its (lat, lon) in degrees by Eq. 4, [B, 3, H, W] in [0, 1].

    ``guidance_scale`` is w_p, ``gps_guidance_scale`` is w_g. Without ``prompts`` the images are of
    the places alone. ValueError for a position outside the model's bounds.
    """
    return _sample(StableDiffusionGPSPipeline, model, prompts, seed, size, gps=list(gps),
                   guidance_scale=guidance_scale, gps_guidance_scale=gps_guidance_scale,
                   num_inference_steps=num_inference_steps)


def sample_average(model: DiffusionModel, prompt: str, area: Any, size: tuple[int, int],
                   guidance_scale: float = 3.5, gps_guidance_scale: float = 7.5,
                   num_locations: int = 64, num_inference_steps: int = 50, seed: int = 0) -> Tensor:
    """One image for a whole area by Eq. 8, [1, 3, H, W] in [0, 1].

    ``area`` is as in :func:`gps_guidance.areas.read_area`. The seed's initial noise is the same for
    every area.
    """
    return _sample(StableDiffusionGPSPipeline, model, prompt, seed, size, area=area,
                   guidance_scale=guidance_scale, gps_guidance_scale=gps_guidance_scale,
                   num_locations=num_locations, num_inference_steps=num_inference_steps)
