"""Score a reconstruction of a landmark of the miniature against its exact truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gps_guidance import geo
from gps_guidance.metrics import (
    affine_colour_fit,
    chamfer_distance,
    mask_iou,
    mean_psnr_db,
    mean_ssim,
    occupancy_iou,
    relative_depth_error,
    surface_points,
)
from gps_guidance.miniature.landmark import Landmark
from gps_guidance.miniature.photographer import truth_view
from gps_guidance.scorers import AngleClassifier, bin_agreement

VIEWS = 24
HELD_OUT_BEARINGS = [7.5 + 15.0 * k for k in range(VIEWS)]  # scored
TUNING_BEARINGS = [15.0 * k for k in range(VIEWS)]  # for choosing settings
GRID, FINE_GRID = 64, 96  # cells a side: for solids, and for surfaces
SURFACE_POINTS = 50_000  # two samples of one surface are 0.2 m apart
CHUNK = 1 << 17  # points per query of the field
DENSITY_THRESHOLD = 10.0  # per scene unit: half the light is lost within 2 m

View = Callable[[Tensor, float, int, int], dict[str, Tensor]]
Density = Callable[[Tensor], Tensor]


@torch.no_grad()
def score(landmark: Landmark, view: View, density: Density, radius: float, size: int = 64,
          classifier: AngleClassifier | None = None, bearings: list[float] | None = None
          ) -> dict[str, Any]:
    """Scores over views that were not used to choose any setting.

    ``view(c2w [4, 4], fovy, height, width)`` renders ``rgb`` [H, W, 3], ``opacity`` [H, W] and
    ``depth`` [H, W] (scene units); ``density(points [N, 3])`` is the field within [-radius,
    radius]. ``bearings`` are evenly spaced. Absolute scores, and the ``aligned_*`` ones after the
    best turn about the vertical in steps of their spacing: without a bearing a reconstruction may
    stand rotated.
    """
    bearings = HELD_OUT_BEARINGS if bearings is None else bearings
    truths, renders = [], []
    for bearing in bearings:
        picture, c2w, fovy = truth_view(landmark, bearing, size)
        truths.append(picture)
        renders.append(view(c2w, fovy, size, size))
    rgb = torch.stack([r["rgb"] for r in renders])
    true_rgb = torch.stack([t["rgb"] for t in truths])
    opacity = torch.stack([r["opacity"] for r in renders])
    masks = torch.stack([t["mask"] for t in truths])
    turn = int(np.argmax([_mean_iou(opacity.roll(-k, 0), masks) for k in range(len(bearings))]))
    step_deg = 360.0 / len(bearings)
    depths = [
        relative_depth_error(r["depth"], t["depth"] / landmark.metres_per_unit,
                             (t["mask"] == 1) & (r["opacity"] > 0.5))
        for r, t in zip(renders, truths, strict=True)
    ]
    scores: dict[str, Any] = {
        "mask_iou": _mean_iou(opacity, masks),
        "psnr_db": mean_psnr_db(rgb, true_rgb),
        "psnr_affine_db": mean_psnr_db(affine_colour_fit(rgb, true_rgb), true_rgb),
        "ssim": mean_ssim(rgb, true_rgb),
        "depth_error": float(np.nanmean(depths)),
        "aligned_turn_deg": float(geo.angle_difference_deg(turn * step_deg, 0.0)),
        "aligned_mask_iou": _mean_iou(opacity.roll(-turn, 0), masks),
        "aligned_psnr_db": mean_psnr_db(rgb.roll(-turn, 0), true_rgb),
        "aligned_ssim": mean_ssim(rgb.roll(-turn, 0), true_rgb),
        "views": len(bearings),
    }
    scores |= _solid_scores(landmark, density, radius, turn * step_deg, step_deg)
    scores |= _chamfer_scores(landmark, density, radius, turn * step_deg)
    if classifier is not None:
        scores |= _bearing_scores(classifier, rgb, bearings, turn)
    return scores


def _mean_iou(opacity: Tensor, masks: Tensor) -> float:
    return float(np.mean([mask_iou(o, m) for o, m in zip(opacity, masks, strict=True)]))


def _bearing_scores(classifier: AngleClassifier, rgb: Tensor, bearings: list[float], turn: int
                    ) -> dict[str, Any]:
    """What the judge reads from the renders [N, H, W, 3]; ``turn`` counts bearings."""
    bins = classifier.config.num_bins
    found = classifier.read_bins(rgb.permute(0, 3, 1, 2))
    true = np.asarray(bearings) / (360.0 / bins)
    return {
        "bearing_within_one_bin": bin_agreement(found, true, bins)[1],
        "aligned_bearing_within_one_bin": bin_agreement(np.roll(found, -turn), true, bins)[1],
        "classifier_within_one_bin": classifier.config.within_one,
        "classifier_held_out_photos": classifier.config.held_out,
    }


def _solid_scores(landmark: Landmark, density: Density, radius: float, turn_deg: float,
                  step_deg: float) -> dict[str, Any]:
    """Solids as they stand and turned; the turn itself to a degree, within half a step."""
    points = _grid(landmark, radius, GRID)
    shell = _sample(density, points) > DENSITY_THRESHOLD
    turned = _sample(density, _clockwise(points, turn_deg)) > DENSITY_THRESHOLD
    occupied = _occupied(landmark, points)

    def agreement(degrees: float) -> float:
        return occupancy_iou(shell, _occupied(landmark, _clockwise(points, -degrees)))

    reach = int(step_deg / 2)
    nearest_first = sorted(range(-reach, reach + 1), key=abs)
    best = max((turn_deg + offset for offset in nearest_first), key=agreement)
    return {
        "occupancy_iou": occupancy_iou(shell, occupied),
        "aligned_occupancy_iou": occupancy_iou(turned, occupied),
        "angular_error_deg": float(abs(geo.angle_difference_deg(best, 0.0))),
    }


def _chamfer_scores(landmark: Landmark, density: Density, radius: float, turn_deg: float
                    ) -> dict[str, Any]:
    """Metres between the surfaces that can be seen; None where the field has none."""
    points = _grid(landmark, radius, FINE_GRID)
    volume = _sample(density, points)
    if not (volume > DENSITY_THRESHOLD).any():
        return {"chamfer_m": None, "aligned_chamfer_m": None}

    def surface(values: np.ndarray, level: float, seed: int) -> Tensor:
        cells = torch.from_numpy(surface_points(values, level, SURFACE_POINTS, seed))
        return landmark.to_metres(points[0, 0, 0] + cells.float() * (2 * radius / FINE_GRID))

    truth = surface(_occupied(landmark, points).astype(np.float32), 0.5, seed=0).numpy()
    found = surface(volume, DENSITY_THRESHOLD, seed=1)
    return {
        "chamfer_m": chamfer_distance(found.numpy(), truth),
        "aligned_chamfer_m": chamfer_distance(_clockwise(found, -turn_deg).numpy(), truth),
    }


def _grid(landmark: Landmark, radius: float, cells: int) -> Tensor:
    """Cell centres [X, Y, Z, 3] above the ground in scene units."""
    side = (torch.arange(cells) + 0.5) / cells * 2 * radius - radius
    above = side[side > -landmark.middle_m / landmark.metres_per_unit]
    return torch.stack(torch.meshgrid(side, side, above, indexing="ij"), dim=-1)


def _sample(density: Density, points: Tensor) -> np.ndarray:
    """The field at points [X, Y, Z, 3]."""
    parts = [density(part) for part in points.reshape(-1, 3).split(CHUNK)]
    return torch.cat(parts).reshape(points.shape[:-1]).float().numpy()


def _occupied(landmark: Landmark, points: Tensor) -> np.ndarray:
    return landmark.scene.occupied(landmark.to_metres(points)).numpy()


def _clockwise(points: Tensor, turn_deg: float) -> Tensor:
    """Points [..., 3] turned about the vertical: what is seen from bearing b is then seen from
    b + turn."""
    t = np.deg2rad(turn_deg)
    turn = points.new_tensor([[np.cos(t), np.sin(t), 0], [-np.sin(t), np.cos(t), 0], [0, 0, 1]])
    return (points.reshape(-1, 3) @ turn.T).reshape(points.shape)
