"""Metrics against numbers computed by hand."""

import numpy as np
import pytest
import torch

from gps_guidance import metrics


def test_psnr_of_a_constant_error() -> None:
    truth = torch.full((4, 4, 3), 0.5)
    assert metrics.psnr_db(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-4)


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    """(2 a b + c) / (a^2 + b^2 + c) with c = 0.01^2; no contrast, no structure."""
    a, b = torch.full((16, 16, 3), 0.2), torch.full((16, 16, 3), 0.8)
    assert metrics.ssim(a, b) == pytest.approx((0.32 + 1e-4) / (0.68 + 1e-4), abs=1e-6)


def test_ssim_sees_structure_where_psnr_sees_brightness() -> None:
    truth = torch.rand(24, 24, 3, generator=torch.Generator().manual_seed(0))
    noisy = (truth + 0.2 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)))
    brighter = truth + (noisy - truth).pow(2).mean().sqrt()
    assert metrics.psnr_db(noisy, truth) == pytest.approx(metrics.psnr_db(brighter, truth))
    assert metrics.ssim(truth, truth) == pytest.approx(1)
    assert metrics.ssim(noisy, truth) < metrics.ssim(brighter, truth) < 1
    assert metrics.ssim(1 - truth, truth) < 0
    both = metrics.mean_ssim(torch.stack([truth, noisy]), torch.stack([truth, truth]))
    assert both == pytest.approx((1 + metrics.ssim(noisy, truth)) / 2)


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


def ball(radius: float, hollow: float = 0.0) -> np.ndarray:
    """A volume that grows inwards by one a cell, 0 on a sphere around (16, 16, 16); a cavity of
    radius ``hollow`` is below 0."""
    nodes = np.stack(np.meshgrid(*[np.arange(33)] * 3, indexing="ij"), axis=-1)
    distance = np.linalg.norm(nodes - 16, axis=-1)
    return np.where(distance < hollow, -1.0, radius - distance)


def test_surface_points_lie_on_the_sphere_alone_even_if_it_is_hollow() -> None:
    for volume in (ball(10), ball(10, hollow=6)):
        points = metrics.surface_points(volume, 0.0, 4000, seed=0)
        radii = np.linalg.norm(points - 16, axis=1)
        assert points.shape == (4000, 3) and radii == pytest.approx(10, abs=0.05)
        assert np.abs(points.mean(axis=0) - 16).max() < 0.3  # evenly
        assert (metrics.surface_points(volume, 0.0, 4000, seed=0) == points).all()
    with pytest.raises(ValueError, match="no surface at 11"):
        metrics.surface_points(ball(10), 11.0, 10, seed=0)


def test_what_stands_on_the_ground_has_no_surface_below() -> None:
    block = np.zeros((12, 12, 12))
    block[3:9, 3:9, :4] = 1.0
    points = metrics.surface_points(block, 0.5, 2000, seed=0)
    assert points[:, 2].max() == pytest.approx(3.5)  # its flat top
    walls = points[points[:, 2] < 3]  # below: nothing but the four walls, half a cell outside
    offset = np.abs(walls[:, :2] - 5.5).max(axis=1)
    assert offset == pytest.approx(3, abs=0.3)


def test_the_chamfer_distance_by_hand() -> None:
    """From (0, 0, 0) and (4, 0, 0) to (1, 0, 0): 1 and 3; back: 1."""
    a, b = np.array([[0.0, 0, 0], [4, 0, 0]]), np.array([[1.0, 0, 0]])
    assert metrics.chamfer_distance(a, b) == metrics.chamfer_distance(b, a) == 1.5
    assert metrics.chamfer_distance(a, a) == 0


def test_the_chamfer_distance_of_two_spheres_is_the_difference_of_their_radii() -> None:
    spheres = [metrics.surface_points(ball(r), 0.0, 20000, seed=k) for k, r in enumerate((9, 11))]
    assert metrics.chamfer_distance(*spheres) == pytest.approx(2, abs=0.05)


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


def test_cosine_score_by_hand() -> None:
    """3-4-5: cosines 0.6, 1 and -1; length does not count."""
    images = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 2.0]])
    others = torch.tensor([[7.0, 0.0], [0.1, 0.1], [0.0, -5.0]])
    assert metrics.cosine_score(images, others).tolist() == pytest.approx([60, 100, -100], abs=1e-4)


@pytest.mark.parametrize(("clip", "gps", "average"), [
    (18.77, 13.66, 16.22), (26.65, 4.25, 15.45), (29.13, 1.21, 15.17), (27.88, 8.15, 18.02)])
def test_the_average_is_that_of_table_1(clip: float, gps: float, average: float) -> None:
    assert metrics.average_score(clip, gps) == pytest.approx(average, abs=0.00501)


def test_recall_by_hand() -> None:
    """The right one is first, second and third of three."""
    scores = torch.tensor([[9.0, 1.0, 2.0], [9.0, 8.0, 1.0], [9.0, 8.0, 1.0]])
    right = torch.tensor([0, 1, 2])
    assert [metrics.recall_at(scores, right, k) for k in (1, 2, 3)] == pytest.approx(
        [1 / 3, 2 / 3, 1])


def test_recall_of_a_judge_that_sees_no_difference_is_chance() -> None:
    right = torch.tensor([0, 3, 1])
    assert metrics.recall_at(torch.ones(3, 8), right, 2) == pytest.approx(2 / 8)
    two_equal = torch.tensor([[5.0, 5.0, 1.0, 7.0]])  # one better, then a tie of two
    found = [metrics.recall_at(two_equal, torch.tensor([0]), k) for k in (1, 2, 3)]
    assert found == [0, 0.5, 1]
    with pytest.raises(ValueError, match="k is 9, but there are 8 candidates"):
        metrics.recall_at(torch.ones(3, 8), right, 9)


def test_retrieval_error_in_km() -> None:
    """A minute of arc along the equator is 1.855 km, on the WGS 84 ellipsoid."""
    candidates = np.array([(0.0, 0.0), (0.0, 1 / 60), (1.0, 1.0)])
    scores = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    error = metrics.retrieval_error_km(scores, candidates, [(0.0, 0.0), (0.0, 1 / 60)])
    assert error == pytest.approx([6378.137 * np.pi / 180 / 60, 0], abs=1e-6)


def test_leakage_of_a_prompt_that_decides_alone_and_of_one_that_does_not() -> None:
    decides = np.broadcast_to(np.array([4, 7, 9])[:, None, None], (3, 5, 2))
    assert metrics.prompt_place_leakage(decides) == 1
    obeys = np.broadcast_to(np.arange(5)[None, :, None], (3, 5, 2))
    assert metrics.prompt_place_leakage(obeys) == 0


def test_leakage_by_hand() -> None:
    """One position and two prompts. Seeds are read as (A, A) and (A, B): of the 4 pairs between
    prompts 2 differ, of the 2 pairs within them 1."""
    assert metrics.prompt_place_leakage([[[0, 0]], [[0, 1]]]) == pytest.approx(2 / 4 - 1 / 2)
    places = [[[0, 0, 0]], [[1, 1, 0]]]  # between: 6 of 9 differ; within: 2 of 6
    assert metrics.prompt_place_leakage(places) == pytest.approx(6 / 9 - 2 / 6)


def test_leakage_of_noise_is_zero_on_average() -> None:
    rng = np.random.default_rng(0)
    found = [metrics.prompt_place_leakage(rng.integers(4, size=(3, 6, 2))) for _ in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    with pytest.raises(ValueError, match=r"shape \(3, 6, 1\)"):
        metrics.prompt_place_leakage(np.zeros((3, 6, 1)))


def test_the_bootstrap_by_hand() -> None:
    """Of 0 and 1, the mean of two draws is 0 or 1 with probability 1/4 each: at 95 % both are
    within the interval, at 40 % (30 % off on each side) neither is."""
    assert metrics.bootstrap_interval([0, 1], seed=0) == (0, 1)
    assert metrics.bootstrap_interval([0, 1], seed=0, level=0.4) == (0.5, 0.5)
    assert metrics.bootstrap_interval([3.5] * 4, seed=0) == (3.5, 3.5)


def test_the_bootstrap_of_many_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = metrics.bootstrap_interval(values, seed=2)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert metrics.bootstrap_interval(values, seed=2) == (low, high)
    for wrong in ([1.0], [], [1.0, np.nan], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="at least two finite values"):
            metrics.bootstrap_interval(wrong, seed=0)
