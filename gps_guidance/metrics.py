"""Numbers that say how good a picture or a 3D reconstruction is. Images are in [0, 1]."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def psnr_db(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images of one shape."""
    mse = (image.double() - truth.double()).pow(2).mean()
    return float(-10 * torch.log10(mse.clamp_min(1e-12)))


def mean_psnr_db(images: Tensor, truths: Tensor) -> float:
    """The mean over pairs of :func:`psnr_db`, of two batches [N, ...]."""
    return float(np.mean([psnr_db(a, b) for a, b in zip(images, truths, strict=True)]))


def affine_colour_fit(images: Tensor, truths: Tensor) -> Tensor:
    """``images`` [..., 3] after the one affine colour map that brings them closest to ``truths``.

    The light of a landmark is not identifiable from tourists' photos; this takes it out.
    """
    x = images.reshape(-1, 3).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    solution = torch.linalg.lstsq(x, truths.reshape(-1, 3).double()).solution
    return (x @ solution).reshape(images.shape).clamp(0, 1).to(images.dtype)


def mask_iou(opacity: Tensor, mask: Tensor) -> float:
    """Intersection over union of two coverages in [0, 1] of one shape, each cut at one half."""
    a, b = opacity > 0.5, mask > 0.5
    return float((a & b).sum() / (a | b).sum().clamp_min(1))


def fill_solid(shell: np.ndarray) -> np.ndarray:
    """Fill what is enclosed in a boolean grid [X, Y, Z] that stands on the ground (z index 0).

    No photo shows the inside of a wall, so a reconstruction is a shell: whatever air cannot reach
    from the sides or from above belongs to the solid.
    """
    floor = np.ones_like(shell[:, :, :1])
    return ndimage.binary_fill_holes(np.concatenate([floor, shell], axis=2))[:, :, 1:]


def occupancy_iou(shell: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two boolean grids, the first after :func:`fill_solid`."""
    solid = fill_solid(shell)
    return float((solid & truth).sum() / max(1, (solid | truth).sum()))


def relative_depth_error(depth: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Median of |depth - truth| / truth over the pixels where ``mask`` is true."""
    return float(((depth - truth).abs() / truth)[mask].median()) if mask.any() else float("nan")


def nearest_photos(images: Tensor, photos: Tensor, blur: int = 4) -> np.ndarray:
    """Index [B] of the photo [N, 3, H, W] that each image [B, 3, H, W] resembles most.

    Both are averaged over ``blur`` x ``blur`` pixels, and each picture is brought to mean 0 and
    deviation 1, so that neither grain nor exposure decides.
    """

    def code(x: Tensor) -> Tensor:
        flat = torch.nn.functional.avg_pool2d(x.float(), blur).flatten(1)
        flat = flat - flat.mean(dim=1, keepdim=True)
        return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)

    return (code(images) @ code(photos).T).argmax(dim=1).cpu().numpy()


def bearing_match(images: Tensor, bearings: np.ndarray, photos: Tensor, photo_bearings: np.ndarray,
                  within_deg: float = 15.0) -> float:
    """Fraction of images [B, 3, H, W] whose nearest photo was taken within ``within_deg`` of the
    bearing [B] in degrees that the image should have."""
    found = photo_bearings[nearest_photos(images, photos)]
    return float(np.mean(np.abs((found - bearings + 180.0) % 360.0 - 180.0) <= within_deg))
