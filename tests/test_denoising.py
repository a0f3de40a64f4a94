"""The denoising loss: what it predicts, how it weighs, and what leaves it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from gps_guidance.draws import Draws, draw_timesteps, dropped
from gps_guidance.models import DiffusionModel, load_model
from gps_guidance.recipe import TextRecipe
from gps_guidance.train import denoising_loss, equip_unet, min_snr_weights


class Oracle(torch.nn.Module):
    """A UNet that knows the answer, plus an error."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *_: Any) -> Any:
        return type("Output", (), {"sample": self.answer})


def model_of(prediction_type: str, answer: Tensor) -> DiffusionModel:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              prediction_type=prediction_type)
    return DiffusionModel(Oracle(answer), None, None, None, scheduler, None, "")


@pytest.fixture()
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents, noise and time steps."""
    g = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(5, 4, 8, 8, generator=g) for _ in range(2))
    return latents, noise, torch.tensor([0, 10, 400, 700, 999])


def alpha_sigma(steps: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = model_of("epsilon", steps).scheduler.alphas_cumprod[steps][:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def test_a_perfect_model_of_the_velocity_has_no_loss(batch: tuple[Tensor, ...]) -> None:
    """v = alpha e - sigma z (Salimans and Ho 2022)."""
    latents, noise, steps = batch
    alpha, sigma = alpha_sigma(steps)
    velocity = alpha * noise - sigma * latents
    tokens = torch.zeros(5, 1, 1)
    for gamma in (None, 5.0):
        perfect = model_of("v_prediction", velocity)
        assert float(denoising_loss(perfect, latents, tokens, noise, steps, gamma)) < 1e-10
        wrong = model_of("epsilon", velocity)
        assert float(denoising_loss(wrong, latents, tokens, noise, steps, gamma)) > 0.1
        exact = model_of("epsilon", noise)
        assert float(denoising_loss(exact, latents, tokens, noise, steps, gamma)) == 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_clean_image_by_the_clamped_ratio(
    batch: tuple[Tensor, ...], prediction_type: str
) -> None:
    """An error of the clean image of size 1 costs min(snr, gamma), however it is predicted."""
    latents, noise, steps = batch
    alpha, sigma = alpha_sigma(steps)
    snr = ((alpha / sigma) ** 2).flatten()
    assert compute_snr(model_of("epsilon", noise).scheduler, steps).tolist() == pytest.approx(
        snr.tolist(), rel=1e-4)
    error = torch.ones_like(latents)  # of z; the noisy latents alpha z + sigma e are given
    answers = {"epsilon": noise - alpha / sigma * error,
               "v_prediction": alpha * noise - sigma * latents - error / sigma}
    model = model_of(prediction_type, answers[prediction_type])
    loss = denoising_loss(model, latents, torch.zeros(5, 1, 1), noise, steps, snr_gamma=5.0)
    assert float(loss) == pytest.approx(float(snr.clamp(max=5.0).mean()), rel=1e-3)


def test_min_snr_weights_by_hand() -> None:
    snr = torch.tensor([0.5, 4.0, 9.0])
    assert min_snr_weights(snr, 5.0, "epsilon").tolist() == pytest.approx([1, 1, 5 / 9])
    assert min_snr_weights(snr, 5.0, "v_prediction").tolist() == pytest.approx(
        [1 / 3, 4 / 5, 1 / 2])


def loss_and_gradient(folder: Path, batch: tuple[Tensor, ...], **changes: Any
                      ) -> tuple[float, Tensor]:
    model = load_model(folder)
    model.unet.requires_grad_(True).train()
    equip_unet(model.unet, TextRecipe(**changes))
    latents, noise, steps = batch
    g = torch.Generator().manual_seed(1)
    loss = denoising_loss(model, latents, torch.randn(5, 6, 16, generator=g), noise, steps)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.unet.parameters()])


@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": True},
     pytest.param({"torch_compile": True}, marks=pytest.mark.slow)],
)
def test_what_saves_memory_or_time_leaves_loss_and_gradient(
    tiny_sd_model: Path, batch: tuple[Tensor, ...], changes: dict[str, bool]
) -> None:
    loss, gradient = loss_and_gradient(tiny_sd_model, batch)
    other, same = loss_and_gradient(tiny_sd_model, batch, **changes)
    assert other == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(same, gradient, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_computes_activations_again(
    tiny_sd_model: Path, batch: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law above holds for a flag that does nothing as well: count the calls."""
    from diffusers.models.resnet import ResnetBlock2D

    calls, forward = [], ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward",
                        lambda self, *args, **options: calls.append(self)
                        or forward(self, *args, **options))
    loss_and_gradient(tiny_sd_model, batch)
    once = len(calls)
    loss_and_gradient(tiny_sd_model, batch, gradient_checkpointing=True)
    assert once > 0 and len(calls) - once > 1.5 * once


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused where there is no CUDA")
def test_xformers_without_cuda_is_refused(tiny_sd_model: Path) -> None:
    recipe = TextRecipe(enable_xformers_memory_efficient_attention=True)
    with pytest.raises(ValueError, match="enable_xformers_memory_efficient_attention is true.*"
                       "pip install.*set it to false"):
        equip_unet(load_model(tiny_sd_model).unet, recipe)


# --- what a step draws -------------------------------------------------------------------------


def test_the_parts_of_all_processes_are_the_batch_once() -> None:
    n = 12
    noise = torch.randn(n, 2, 3, 5)
    assert noise.shape == (n, 2, 3, 5) and float(noise.std()) == pytest.approx(1, abs=0.2)
    which = dropped(torch.rand(n), (0.2, 0.2, 0.2))
    none = torch.zeros(0)
    draws = Draws(np.arange(n), np.arange(n), np.arange(n), which, noise, noise + 1,
                  draw_timesteps(n, 1000), np.arange(0), none, none, none)
    parts = [draws.split(2, process, 3) for process in range(3)]
    assert [[part.picks.tolist() for part in own] for own in parts] == [
        [[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    for own in parts:
        for part in own:
            assert torch.equal(part.noise, noise[part.picks] + 1)
            assert torch.equal(part.which, which[part.picks]) and len(part.prior_picks) == 0
