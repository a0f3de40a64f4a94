"""Schedules, weights and Eq. 10 against hand-computed numbers."""

import pytest
import torch

from gps_guidance.lift import sds


@pytest.mark.parametrize(
    ("value", "epoch", "step", "expected"),
    [
        (3, 5, 7, 3.0),
        (0.25, 0, 0, 0.25),
        ([0.0, 10.0, 100], 0, 0, 0.0),
        ([0.0, 10.0, 100], 9, 25, 2.5),
        ([0.0, 10.0, 100], 0, 1000, 10.0),
        ([50, 2.0, 4.0, 100], 0, 10, 2.0),
        ([50, 2.0, 4.0, 100], 0, 75, 3.0),
        ([0, 2.0, 4.0, 10.0], 5, 99, 3.0),  # a float end counts epochs
        ([0, 0.0, 2.0, 100, 8.0, 1000], 0, 50, 1.0),
        ([0, 0.0, 2.0, 100, 8.0, 1000], 0, 550, 5.0),
        ([0, 0.0, 2.0, 100, 8.0, 1000], 0, 5000, 8.0),
        ([0, 0.0, 2.0, 10, 8.0, 20, 0.0, 40], 0, 30, 4.0),
    ],
)
def test_schedule(value, epoch, step, expected):
    assert sds.schedule(value, epoch, step) == pytest.approx(expected)


def test_schedule_reads_omegaconf_lists():
    from omegaconf import OmegaConf

    assert sds.schedule(OmegaConf.create([0, 0.98, 0.02, 8000]), 0, 4000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "value", [[1.0], [1, 2], [0, 1, 2, 3, 4], [0, 1.0, 2.0, 0], "0.5", None, True, ["a", 1, 2]]
)
def test_bad_schedules_are_refused(value):
    with pytest.raises(ValueError, match="schedule"):
        sds.schedule(value, 0, 0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.02, 0.98, (20, 980)), (0.74, 0.86, (740, 860)), (0, 1, (0, 999)), (1, 1, (999, 999))],
)
def test_timestep_range(low, high, expected):
    assert sds.timestep_range(low, high, 1000) == expected


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.2), (-0.1, 0.5), (0.1, 1.1)])
def test_impossible_timestep_ranges_are_refused(low, high):
    with pytest.raises(ValueError, match="min_step_percent"):
        sds.timestep_range(low, high, 1000)


def test_weights():
    alphas, timesteps = torch.tensor([0.81, 0.36]), torch.tensor([1, 0, 1])
    expected = {
        "sds": [0.64, 0.19, 0.64],
        "uniform": [1.0, 1.0, 1.0],
        "fantasia3d": [0.6 * 0.64, 0.9 * 0.19, 0.6 * 0.64],
    }
    for strategy, values in expected.items():
        weight = sds.sds_weight(alphas, timesteps, strategy)
        assert weight.shape == (3, 1, 1, 1)
        torch.testing.assert_close(weight.flatten(), torch.tensor(values))
    with pytest.raises(ValueError, match="fantasia3d"):
        sds.sds_weight(alphas, timesteps, "sigma")


def test_loss_has_exactly_the_gradient_of_eq_10():
    torch.manual_seed(0)
    latents = (1e4 * torch.randn(3, 4, 5, 5)).requires_grad_(True)  # large: no rounding either
    noise_pred, noise = torch.randn(2, 3, 4, 5, 5).unbind(0)
    grad = sds.sds_grad(noise_pred, noise, torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1))
    torch.testing.assert_close(grad[1], 0.5 * (noise_pred - noise)[1])

    loss = sds.sds_loss(latents, grad)
    (got,) = torch.autograd.grad(loss, latents)
    assert torch.equal(got, grad / 3)
    torch.testing.assert_close(loss, 0.5 * grad.square().sum() / 3)

    (doubled,) = torch.autograd.grad(2 * sds.sds_loss(latents, grad), latents)
    assert torch.equal(doubled, 2 * (grad / 3))


def test_loss_treats_the_gradient_as_a_constant():
    latents = torch.ones(1, 1, 1, 1, requires_grad=True)
    sds.sds_loss(latents, 3 * latents).backward()
    assert latents.grad is not None and latents.grad.item() == 3.0


def test_predicted_latents_invert_the_noising():
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, 3, 3).unbind(0)
    alpha_bar = torch.tensor([0.9, 0.2]).view(2, 1, 1, 1)
    noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(sds.predicted_latents(noisy, noise, alpha_bar), clean)


def test_image_term():
    alpha_bar = torch.tensor(0.36).view(1, 1, 1, 1)
    weight = sds.image_weight(1 - alpha_bar, alpha_bar)
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.48]))  # sqrt(0.36 * 0.64)
    images = torch.full((1, 3, 2, 2), 0.75, requires_grad=True)
    decoded = torch.full((1, 3, 2, 2), 0.25, requires_grad=True)
    loss = sds.image_loss(images, decoded, weight)
    loss.backward()
    assert loss.item() == pytest.approx(0.48 * 0.25)
    torch.testing.assert_close(images.grad, torch.full((1, 3, 2, 2), 2 * 0.48 * 0.5 / 12))
    assert decoded.grad is None


def test_perp_neg_counts_only_the_perpendicular_part():
    uncond = torch.zeros(1, 2, 1, 1)
    text = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    negatives = torch.tensor([[5.0, 3.0], [7.0, 0.0]]).view(2, 1, 2, 1, 1)
    out = sds.perp_neg_guidance(text, uncond, negatives, torch.tensor([[-0.5, -9.0]]), 10.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([20.0, -15.0]))
