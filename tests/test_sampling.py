"""Images by bearing: what they depend on, and that the bundled model's show the right side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RESOLUTION

from gps_guidance.models import BUNDLED, DiffusionModel, load_angle_model, load_model
from gps_guidance.noise import angle_guidance
from gps_guidance.sampling import sample_angles, sample_gps, sample_texts
from gps_guidance.scorers import AngleClassifier, bin_agreement


@pytest.fixture(scope="module")
def model(tiny_angle_model: Path) -> DiffusionModel:
    return load_angle_model(tiny_angle_model)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-4


def test_samples_have_a_shape_and_a_range(model: DiffusionModel) -> None:
    images = sample_angles(model, [0.0, 120.0, 240.0], num_inference_steps=2)
    assert images.shape == (3, 3, RESOLUTION, RESOLUTION)
    assert images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    assert not images.requires_grad
    tall = sample_texts(model, ["a tower"], (48, 32), num_inference_steps=2)
    assert tall.shape == (1, 3, 48, 32)


def test_the_seed_decides_and_nothing_else(model: DiffusionModel) -> None:
    torch.manual_seed(1)
    a = sample_angles(model, [30.0, 60.0], num_inference_steps=3, seed=5)
    torch.manual_seed(2)
    b = sample_angles(model, [30.0, 60.0], num_inference_steps=3, seed=5)
    assert torch.equal(a, b)
    assert differ(a, sample_angles(model, [30.0, 60.0], num_inference_steps=3, seed=6))


def test_sampling_leaves_the_models_scheduler_alone(model: DiffusionModel) -> None:
    before = model.scheduler.timesteps.clone()
    sample_angles(model, [0.0], num_inference_steps=3)
    assert torch.equal(model.scheduler.timesteps, before)


def test_a_bearing_matters_and_its_turns_do_not(model: DiffusionModel) -> None:
    # Untrained tokens move the UNet little: a large scale makes the difference plain.
    at = {b: sample_angles(model, [b], 30.0, 3, seed=0) for b in (90.0, -270.0, 450.0, 100.0)}
    assert torch.allclose(at[90.0], at[-270.0], atol=1e-5)
    assert torch.allclose(at[90.0], at[450.0], atol=1e-5)
    assert differ(at[90.0], at[100.0])


def test_without_the_angle_every_bearing_is_the_same(model: DiffusionModel) -> None:
    a = sample_angles(model, [10.0, 200.0], 4.0, 3, use_angle=False)
    b = sample_angles(model, [300.0, 77.0], 4.0, 3, use_angle=False)
    assert torch.equal(a, b)
    assert differ(a, sample_angles(model, [10.0, 200.0], 4.0, 3))


def test_each_step_is_ddim_with_equation_7(model: DiffusionModel) -> None:
    with torch.no_grad():
        text, angle = model.encode_text([model.angle.prompt]), model.angle(torch.tensor([90.0]))
        tokens = torch.cat([text, angle], dim=1)
        null = torch.zeros_like(tokens)
        scheduler = model.sampler
        scheduler.set_timesteps(4)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
        alphas = scheduler.alphas_cumprod
        for t in scheduler.timesteps.tolist():
            cond, uncond = (model.unet(latents, t, c).sample for c in (tokens, null))
            noise = angle_guidance(cond, uncond, 2.5)
            now = alphas[t]
            then = alphas[t - 250] if t >= 250 else scheduler.final_alpha_cumprod
            clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
            latents = then.sqrt() * clean + (1 - then).sqrt() * noise
        picture = model.vae.decode(latents / model.vae.config.scaling_factor).sample
    expected = (picture / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(sample_angles(model, [90.0], 2.5, 4, seed=9), expected, atol=1e-4)


def test_text_samples_use_the_empty_prompt_as_null(tiny_sd_model: Path) -> None:
    plain = load_model(tiny_sd_model)
    size = (RESOLUTION, RESOLUTION)
    a = sample_texts(plain, [""], size, 0.0, 3)
    b = sample_texts(plain, [""], size, 8.0, 3)
    assert torch.allclose(a, b, atol=1e-3)  # conditional and unconditional branch are the same
    assert differ(sample_texts(plain, ["tower of pisa"], size, 8.0, 3), b)


# --- by position -----------------------------------------------------------------------------

HERE, THERE = (43.71, 10.39), (43.735, 10.415)
SIZE = (RESOLUTION, RESOLUTION)


@pytest.fixture(scope="module")
def city(tiny_gps_model: Path) -> DiffusionModel:
    return load_model(tiny_gps_model)


def test_each_step_is_ddim_with_equation_4(city: DiffusionModel) -> None:
    scheduler = city.sampler
    scheduler.set_timesteps(3)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert city.gps_encoder is not None
    with torch.no_grad():
        text, place = city.encode_text(["tower"]), city.gps_encoder([HERE])
        zero_text, zero_place = torch.zeros_like(text), torch.zeros_like(place)
        for t in scheduler.timesteps:
            e00, ep0, epg = (
                city.unet(latents, t, torch.cat(pair, dim=1)).sample
                for pair in ((zero_text, zero_place), (text, zero_place), (text, place))
            )
            noise = e00 + 2.0 * (ep0 - e00) + 5.0 * (epg - ep0)
            latents = scheduler.step(noise, t, latents).prev_sample
        picture = city.vae.decode(latents / city.vae.config.scaling_factor).sample
    found = sample_gps(city, ["tower"], [HERE], SIZE, 2.0, 5.0, 3, seed=4)
    assert torch.allclose(found, (picture / 2 + 0.5).clamp(0, 1), atol=1e-4)


def test_scales_of_zero_ignore_position_and_text(city: DiffusionModel) -> None:
    def sample(prompt: str, gps: tuple[float, float], text: float, place: float) -> torch.Tensor:
        return sample_gps(city, [prompt], [gps], SIZE, text, place, 3, seed=0)

    assert differ(sample("tower", HERE, 3.5, 30.0), sample("tower", THERE, 3.5, 30.0))
    assert torch.equal(sample("tower", HERE, 3.5, 0.0), sample("tower", THERE, 3.5, 0.0))
    assert torch.equal(sample("tower", HERE, 0.0, 0.0), sample("pisa", THERE, 0.0, 0.0))


def test_a_position_outside_the_city_is_refused(city: DiffusionModel) -> None:
    with pytest.raises(ValueError, match="outside the bounds"):
        sample_gps(city, ["tower"], [(10.39, 43.71)], SIZE)


# --- the bundled model -----------------------------------------------------------------------


def test_the_bundled_model_shows_the_side_that_was_asked_for() -> None:
    model = load_angle_model("miniature-pisa")
    judge = AngleClassifier.from_pretrained(
        BUNDLED / "miniature-pisa" / "angle_classifier", use_safetensors=True,
        torch_dtype=torch.float32,
    ).eval()
    bearings = [0.0, 60.0, 120.0, 180.0, 240.0, 300.0]
    images = sample_angles(model, bearings, num_inference_steps=20, seed=0)
    for k in range(3):  # opposite sides
        assert float((images[k] - images[k + 3]).abs().mean()) > 0.02
    _, near = bin_agreement(judge.read_bins(images), np.array(bearings) / 10.0, 36)
    assert near >= 4 / 6  # by chance 3 / 36
    _, text_only = bin_agreement(
        judge.read_bins(sample_angles(model, bearings, num_inference_steps=20, use_angle=False)),
        np.array(bearings) / 10.0, 36,
    )
    assert text_only <= 3 / 6 < near
