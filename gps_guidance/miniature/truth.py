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
    mask_iou,
    mean_psnr_db,
    occupancy_iou,
    relative_depth_error,
)
from gps_guidance.miniature.landmark import Landmark
from gps_guidance.miniature.photographer import truth_view
from gps_guidance.scorers import AngleClassifier, bin_agreement

VIEWS = 24
HELD_OUT_BEARINGS = [7.5 + 15.0 * k for k in range(VIEWS)]  # scored
TUNING_BEARINGS = [15.0 * k for k in range(VIEWS)]  # for choosing settings
GRID = 64
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
    radius]. Absolute scores, and the ``aligned_*`` ones after the best turn about the vertical in
    steps of 15 degrees: without a bearing a reconstruction may stand rotated.
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
    points, occupied = _occupancy_grid(landmark, radius)
    depths = [
        relative_depth_error(r["depth"], t["depth"] / landmark.metres_per_unit,
                             (t["mask"] == 1) & (r["opacity"] > 0.5))
        for r, t in zip(renders, truths, strict=True)
    ]
    scores: dict[str, Any] = {
        "mask_iou": _mean_iou(opacity, masks),
        "occupancy_iou": _occupancy(density, points, occupied, 0.0),
        "psnr_db": mean_psnr_db(rgb, true_rgb),
        "psnr_affine_db": mean_psnr_db(affine_colour_fit(rgb, true_rgb), true_rgb),
        "depth_error": float(np.nanmean(depths)),
        "aligned_turn_deg": float(geo.angle_difference_deg(turn * 360.0 / len(bearings), 0.0)),
        "aligned_mask_iou": _mean_iou(opacity.roll(-turn, 0), masks),
        "aligned_psnr_db": mean_psnr_db(rgb.roll(-turn, 0), true_rgb),
        "aligned_occupancy_iou": _occupancy(
            density, points, occupied, turn * 360.0 / len(bearings)
        ),
        "views": len(bearings),
    }
    if classifier is not None:
        bins = classifier.config.num_bins
        found = classifier.read_bins(rgb.permute(0, 3, 1, 2))
        exact, near = bin_agreement(found, np.asarray(bearings) / (360.0 / bins), bins)
        scores |= {
            "bearing_within_one_bin": near,
            "classifier_within_one_bin": classifier.config.within_one,
            "classifier_held_out_photos": classifier.config.held_out,
        }
    return scores


def _mean_iou(opacity: Tensor, masks: Tensor) -> float:
    return float(np.mean([mask_iou(o, m) for o, m in zip(opacity, masks, strict=True)]))


def _occupancy_grid(landmark: Landmark, radius: float) -> tuple[Tensor, np.ndarray]:
    """Cell centres [X, Y, Z, 3] above the ground in scene units, and the truth there."""
    side = (torch.arange(GRID) + 0.5) / GRID * 2 * radius - radius
    above = side[side > -landmark.middle_m / landmark.metres_per_unit]
    points = torch.stack(torch.meshgrid(side, side, above, indexing="ij"), dim=-1)
    return points, landmark.scene.occupied(landmark.to_metres(points)).numpy()


def _occupancy(density: Density, points: Tensor, occupied: np.ndarray, turn_deg: float) -> float:
    """Occupancy IoU of the field turned about the vertical: seen from bearing b + turn, it is
    compared with the truth from b."""
    t = np.deg2rad(turn_deg)
    clockwise = points.new_tensor(
        [[np.cos(t), np.sin(t), 0], [-np.sin(t), np.cos(t), 0], [0, 0, 1]]
    )
    where = (points.reshape(-1, 3) @ clockwise.T).contiguous()
    shell = density(where).reshape(points.shape[:-1]) > DENSITY_THRESHOLD
    return occupancy_iou(shell.numpy(), occupied)
