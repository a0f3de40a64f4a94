"""Train the small AutoencoderKL that stands where a real Stable Diffusion VAE would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gps_guidance.dataset import Photos


def gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    """L1 difference of the image gradients of a and b [B, C, H, W]: keeps edges sharp."""
    dx = (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()
    return dx + (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()


def vae_loss(vae: Any, images: Tensor, kl_weight: float, sample: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, mse) of images [B, 3, H, W] in [-1, 1] for posterior noise ``sample`` [B, C, h, w].

    L1 + MSE + 0.3 gradient difference + kl_weight x KL per latent element.
    """
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * sample).sample
    mse = F.mse_loss(decoded, images)
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    sharp = gradient_difference(decoded, images)
    return F.l1_loss(decoded, images) + mse + 0.3 * sharp + kl_weight * kl, mse


def latent_shape(vae: Any, size: tuple[int, int]) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of images of ``size``."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return (vae.config.latent_channels, size[0] // factor, size[1] // factor)


@torch.no_grad()
def whiten_latents(vae: Any, batches: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Fold per-channel mean and deviation of the latents into the 1x1 quant convolutions.

    Afterwards latents have mean 0 and deviation 1 in each channel, so that ``scaling_factor`` is
    1, and reconstructions are unchanged. Returns the mean and deviation [C] that were folded.
    """
    means = torch.cat([vae.encode(x).latent_dist.mean for x in batches])
    mean, std = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    scale = torch.cat([1 / std, torch.ones_like(std)])
    quant.weight.mul_(scale[:, None, None, None])
    quant.bias.mul_(scale)
    quant.bias[:channels] -= mean / std
    quant.bias[channels:] -= 2 * std.log()  # the log-variance shrinks with the latents
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight.mul_(std[None, :, None, None])
    return mean, std


@torch.no_grad()
def reconstruction_psnr(vae: Any, photos: Photos, count: int = 64, seed: int = 0,
                        min_zoom: float = 1.0) -> float:
    """Mean PSNR in dB (images in [0, 1]) of ``count`` crops decoded from their latent means."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(0, count, 16):
        x = photos.crop(rng.integers(len(photos), size=16), rng, min_zoom).to(vae.device)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((x - y) / 2).pow(2).mean(dim=(1, 2, 3))
        values.append(-10 * mse.log10())
    return float(torch.cat(values).mean())
