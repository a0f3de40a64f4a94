"""Metrics against numbers computed by hand."""

import numpy as np
import pytest
import torch

from gps_guidance import metrics


def test_psnr_of_a_constant_error() -> None:
    truth = torch.full((4, 4, 3), 0.5)
    assert metrics.psnr_db(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-4)


def test_affine_colour_fit_undoes_a_colour_cast() -> None:
    truth = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    cast = truth * torch.tensor([0.5, 0.8, 1.1]) + 0.03
    assert torch.allclose(metrics.affine_colour_fit(cast, truth), truth, atol=1e-5)


def test_mask_iou() -> None:
    a, b = torch.zeros(4, 4), torch.zeros(4, 4)
    a[:2], b[1:3] = 1.0, 1.0
    assert metrics.mask_iou(a, b) == pytest.approx(4 / 12)


def test_a_shell_on_the_ground_counts_as_solid_but_a_roofless_one_does_not() -> None:
    solid = np.zeros((8, 8, 6), bool)
    solid[2:6, 2:6, :4] = True
    shell = solid.copy()
    shell[3:5, 3:5, :3] = False
    assert metrics.occupancy_iou(shell, solid) == 1.0
    shell[3:5, 3:5, 3] = False
    assert metrics.occupancy_iou(shell, solid) == pytest.approx(48 / 64)


def test_relative_depth_error() -> None:
    depth, truth = torch.tensor([[1.1, 9.0]]), torch.tensor([[1.0, 3.0]])
    mask = torch.tensor([[True, False]])
    assert metrics.relative_depth_error(depth, truth, mask) == pytest.approx(0.1, abs=1e-6)


def test_bearing_match_finds_the_photo_despite_exposure() -> None:
    photos = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    bearings = np.arange(12) * 30.0
    darker = photos * 0.5 + 0.1
    assert metrics.bearing_match(darker, bearings, photos, bearings) == 1.0
    assert metrics.bearing_match(darker, bearings + 30, photos, bearings) == 0.0
    assert metrics.bearing_match(darker, bearings + 350, photos, bearings) == 1.0
