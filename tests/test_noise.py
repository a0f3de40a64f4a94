"""Eq. 4, 7 and 8 on numbers."""

import pytest
import torch

from gps_guidance.noise import (
    angle_guidance,
    area_noise,
    dual_guidance,
    dual_guidance_weights,
    rescale_guidance,
)


def test_dual_guidance_by_hand():
    uncond, text, gps = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([10.0])
    assert dual_guidance(uncond, text, gps, 3.5, 7.5).item() == 1 + 3.5 * 2 + 7.5 * 7
    assert dual_guidance(uncond, text, gps, 1, 1).item() == 10
    assert dual_guidance(uncond, text, gps, 1, 0).item() == 3
    assert dual_guidance(uncond, text, gps, 0, 0).item() == 1


def test_predictions_without_a_weight_are_not_needed():
    text, gps = torch.tensor([3.0]), torch.tensor([10.0])
    assert dual_guidance_weights(3.5, 7.5) == (-2.5, -4.0, 7.5)
    assert dual_guidance(None, text, gps, 1, 2).item() == 3 + 2 * 7
    assert dual_guidance(torch.tensor([1.0]), None, gps, 2, 2).item() == 1 + 2 * 9
    assert dual_guidance(None, None, gps, 1, 1) is gps
    with pytest.raises(AssertionError, match="missing"):
        dual_guidance(None, text, gps, 2, 2)


def test_angle_guidance_by_hand():
    cond, uncond = torch.tensor([4.0]), torch.tensor([1.0])
    assert angle_guidance(cond, uncond, 2.0).item() == (1 + 2) * 4 - 2 * 1
    assert angle_guidance(cond, uncond, 0.0).item() == 4


def test_area_noise_is_the_mean_whatever_the_chunks_and_the_order():
    torch.manual_seed(0)
    preds = torch.randn(7, 4, 8, 8)
    whole = area_noise([preds])
    torch.testing.assert_close(whole, preds.mean(0))
    for size in (1, 2, 3, 7):
        assert torch.equal(area_noise(preds.split(size)), whole)
    assert torch.equal(area_noise(preds.flip(0).split(2)), whole)
    assert area_noise(preds.half().split(2)).dtype == torch.float16


def test_area_of_one_point_and_of_equal_points_is_the_point():
    pred = torch.randn(1, 4, 8, 8)
    assert torch.equal(area_noise([pred]), pred[0])
    assert torch.equal(area_noise(iter([pred, pred, pred])), pred[0])


def test_an_area_needs_a_point():
    with pytest.raises(ValueError, match="at least one location"):
        area_noise([])


def test_rescale_gives_the_deviation_of_the_conditional():
    torch.manual_seed(0)
    cond = torch.randn(2, 4, 8, 8)
    guided = 5 * cond
    torch.testing.assert_close(rescale_guidance(guided, cond, 1.0), cond)
    torch.testing.assert_close(rescale_guidance(guided, cond, 0.25), 4 * cond)
    assert torch.equal(rescale_guidance(guided, cond, 0.0), guided)
