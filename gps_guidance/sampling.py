"""Images by DDIM, deterministic by seed: by bearing (Eq. 7), by position (Eq. 4), by text alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from gps_guidance.encoders import GPSEncoder
from gps_guidance.models import DiffusionModel
from gps_guidance.noise import angle_guidance, dual_guidance


@torch.no_grad()
def denoise_branches(model: DiffusionModel, branches: Sequence[Tensor],
                     compose: Callable[..., Tensor], size: tuple[int, int],
                     num_inference_steps: int, seed: int) -> Tensor:
    """Denoise B images, [B, 3, H, W] in [0, 1].

    ``branches`` are the tokens [B, L, D] of each prediction; ``compose`` takes one prediction
    [B, C, h, w] a branch and gives the noise of the step.
    """
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    tokens, count = torch.cat(list(branches)), len(branches)
    shape = (len(branches[0]), model.unet.config.in_channels, size[0] // factor, size[1] // factor)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(shape, generator=generator).to(tokens.device, tokens.dtype)
    for t in scheduler.timesteps:
        noise_preds = model.unet(torch.cat([latents] * count), t, tokens).sample.chunk(count)
        latents = scheduler.step(compose(*noise_preds), t, latents).prev_sample
    images = model.vae.decode(latents / model.vae.config.scaling_factor).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


def denoise(model: DiffusionModel, tokens: Tensor, null_tokens: Tensor, guidance_scale: float,
            size: tuple[int, int], num_inference_steps: int, seed: int) -> Tensor:
    """Denoise one image for each row of ``tokens`` [B, L, D] by Eq. 7; [B, 3, H, W] in [0, 1].

    ``guidance_scale`` is w of Eq. 7; w = 0 skips the unconditional branch.
    """
    branches = [tokens] if guidance_scale == 0 else [tokens, null_tokens]

    def compose(noise_pred: Tensor, noise_pred_uncond: Tensor | None = None) -> Tensor:
        if noise_pred_uncond is None:
            return noise_pred
        return angle_guidance(noise_pred, noise_pred_uncond, guidance_scale)

    return denoise_branches(model, branches, compose, size, num_inference_steps, seed)


@torch.no_grad()
def sample_angles(model: DiffusionModel, bearings_deg: Sequence[float], guidance_scale: float = 2.0,
                  num_inference_steps: int = 50, seed: int = 0, use_angle: bool = True) -> Tensor:
    """One image for each bearing, [B, 3, H, W] in [0, 1].

    ``use_angle=False`` zeroes the angle token: the text-only model, for comparison.
    """
    count = len(bearings_deg)
    text = model.encode_text([model.angle.prompt]).expand(count, -1, -1)
    null_angle = model.angle.null(count)
    bearings = torch.tensor(bearings_deg, dtype=torch.float64)
    angle = model.angle(bearings) if use_angle else null_angle
    tokens = torch.cat([text, angle], dim=1)
    null = torch.cat([model.null_text(count), null_angle], dim=1)
    return denoise(model, tokens, null, guidance_scale, model.angle.size, num_inference_steps, seed)


@torch.no_grad()
def sample_texts(model: DiffusionModel, prompts: list[str], size: tuple[int, int],
                 guidance_scale: float = 6.5, num_inference_steps: int = 50, seed: int = 0
                 ) -> Tensor:
    """One image for each prompt from the text tokens alone, [B, 3, H, W] in [0, 1].

    The unconditional branch is the embedding of "", as Stable Diffusion was trained.
    """
    tokens = model.encode_text(prompts)
    null = model.encode_text([""]).expand_as(tokens)
    return denoise(model, tokens, null, guidance_scale, size, num_inference_steps, seed)


@torch.no_grad()
def sample_gps(model: DiffusionModel, prompts: list[str], gps: Sequence[tuple[float, float]],
               size: tuple[int, int], guidance_scale: float = 3.5, gps_guidance_scale: float = 7.5,
               num_inference_steps: int = 50, seed: int = 0) -> Tensor:
    """One image for each prompt and its (lat, lon) in degrees by Eq. 4, [B, 3, H, W] in [0, 1].

    ``guidance_scale`` is w_p, ``gps_guidance_scale`` is w_g. ValueError for a position outside the
    model's bounds.
    """
    assert isinstance(model.gps_encoder, GPSEncoder)
    text, null_text = model.encode_text(prompts), model.null_text(len(prompts))
    place, null_place = model.gps_encoder(gps), model.gps_encoder.null(len(prompts))
    pairs = [(null_text, null_place), (text, null_place), (text, place)]

    def compose(uncond: Tensor, text_alone: Tensor, text_gps: Tensor) -> Tensor:
        return dual_guidance(uncond, text_alone, text_gps, guidance_scale, gps_guidance_scale)

    branches = [torch.cat(pair, dim=1) for pair in pairs]
    return denoise_branches(model, branches, compose, size, num_inference_steps, seed)
