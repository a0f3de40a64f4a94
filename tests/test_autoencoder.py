"""The small VAE: its loss, and latents brought to mean 0 and deviation 1, nothing else changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import tiny_parts

from gps_guidance.autoencoder import (
    gradient_difference,
    latent_shape,
    reconstruction_psnr,
    vae_loss,
    whiten_latents,
)
from gps_guidance.dataset import Photos
from gps_guidance.miniature.nets import tiny_vae


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return tiny_parts().vae.eval().requires_grad_(False)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_gradient_difference_by_hand() -> None:
    """A step of height 1 between two columns: 1 of 3 horizontal differences, no vertical one."""
    flat = torch.zeros(1, 1, 4, 4)
    step = flat.clone()
    step[..., 2:] = 1.0
    assert float(gradient_difference(step, flat)) == pytest.approx(1 / 3)
    assert float(gradient_difference(step + 5, step)) == 0.0  # a constant has no gradient


@pytest.mark.parametrize("widths", [(8, 16), (8, 8, 16), (8, 8, 16, 16)])
def test_latent_shape_is_that_of_the_encoder(widths: tuple[int, ...]) -> None:
    net = tiny_vae(widths)
    with torch.no_grad():
        mean = net.encode(torch.zeros(1, 3, 48, 32)).latent_dist.mean
    assert latent_shape(net, (48, 32)) == tuple(mean.shape[1:])


def test_vae_loss_is_the_sum_it_says(vae) -> None:
    x = images(2)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss, mse = vae_loss(vae, x, 0.5, noise)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.0
    pairs = zip(posterior.mean.flatten().tolist(), posterior.var.flatten().tolist(), strict=True)
    for m, v in pairs:
        kl += 0.5 * (m * m + v - 1 - math.log(v)) / posterior.mean.numel()
    expected = (y - x).abs().mean() + (y - x).square().mean() + 0.3 * gradient_difference(y, x)
    assert float(loss) == pytest.approx(float(expected) + 0.5 * kl, rel=1e-4)
    assert float(mse) == pytest.approx(float((y - x).square().mean()), rel=1e-5)


def test_vae_loss_falls_along_its_gradient(vae) -> None:
    vae.requires_grad_(True)
    x, noise = images(2), torch.zeros(2, 4, 8, 8)
    before, _ = vae_loss(vae, x, 1e-3, noise)
    before.backward()
    with torch.no_grad():
        for parameter in vae.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            parameter -= 1e-3 * parameter.grad
        assert vae_loss(vae, x, 1e-3, noise)[0] < before


def test_whitening_gives_unit_latents_and_the_same_images(vae) -> None:
    x = images(16)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture, noise = vae.decode(before.mean).sample, torch.randn_like(before.mean)
        noisy = vae.decode(before.mean + before.std * noise).sample
    mean, std = whiten_latents(vae, iter(x.split(4)))
    assert torch.allclose(mean, before.mean.mean(dim=(0, 2, 3)), atol=1e-5)
    with torch.no_grad():
        after = vae.encode(x).latent_dist
        assert torch.allclose(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4)
        assert torch.allclose(after.std, before.std / std[:, None, None], rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)
        assert torch.allclose(vae.decode(after.mean + after.std * noise).sample, noisy, atol=1e-4)


def test_whitening_twice_is_whitening_once(vae) -> None:
    x = images(8)
    whiten_latents(vae, iter([x]))
    mean, std = whiten_latents(vae, iter([x]))
    assert torch.allclose(mean, torch.zeros(4), atol=1e-4)
    assert torch.allclose(std, torch.ones(4), atol=1e-4)


def test_psnr_of_reconstructions_by_hand(vae) -> None:
    """A decoder that gives mid grey, and black photos: the error is 1/2 of the range, 6.02 dB."""
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    torch.nn.init.zeros_(vae.decoder.conv_out.bias)
    black = Photos(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), np.zeros(2), ["a", "b"], (32, 32),
                   "Tower", (0.0, 0.0))
    assert reconstruction_psnr(vae, black, count=16) == pytest.approx(20 * math.log10(2), abs=1e-4)
