"""Images of an angle model by bearing (Eq. 7), or by text alone. DDIM, deterministic by seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from gps_guidance.models import DiffusionModel
from gps_guidance.noise import angle_guidance


@torch.no_grad()
def denoise(model: DiffusionModel, tokens: Tensor, null_tokens: Tensor, guidance_scale: float,
            size: tuple[int, int], num_inference_steps: int, seed: int) -> Tensor:
    """Denoise one image for each row of ``tokens`` [B, L, D] by Eq. 7; [B, 3, H, W] in [0, 1].

    ``guidance_scale`` is w of Eq. 7; w = 0 skips the unconditional branch.
    """
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    shape = (len(tokens), model.unet.config.in_channels, size[0] // factor, size[1] // factor)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(shape, generator=generator).to(tokens.device, tokens.dtype)
    for t in scheduler.timesteps:
        if guidance_scale == 0:
            noise_pred = model.unet(latents, t, tokens).sample
        else:
            both = model.unet(
                torch.cat([latents, latents]), t, torch.cat([tokens, null_tokens])
            ).sample
            noise_pred_cond, noise_pred_uncond = both.chunk(2)
            noise_pred = angle_guidance(noise_pred_cond, noise_pred_uncond, guidance_scale)
        latents = scheduler.step(noise_pred, t, latents).prev_sample
    images = model.vae.decode(latents / model.vae.config.scaling_factor).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


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
