"""Numbers that say how good a picture or a 3D reconstruction is. Images are in [0, 1].

Those of the paper's tables are at the end; docs/evaluation.md has the protocol of each.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn import functional as F

from gps_guidance import geo


def psnr_db(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images of one shape."""
    mse = (image.double() - truth.double()).pow(2).mean()
    return float(-10 * torch.log10(mse.clamp_min(1e-12)))


def mean_psnr_db(images: Tensor, truths: Tensor) -> float:
    """The mean over pairs of :func:`psnr_db`, of two batches [N, ...]."""
    return float(np.mean([psnr_db(a, b) for a, b in zip(images, truths, strict=True)]))


def ssim(image: Tensor, truth: Tensor) -> float:
    """Structural similarity of two images [H, W, 3], 1 where they are equal.

    As Wang et al. (2004) define it, with a Gaussian window of deviation 1.5: at least 11 pixels a
    side. The mean of the channels.
    """
    from skimage.metrics import structural_similarity

    return float(structural_similarity(
        image.double().numpy(), truth.double().numpy(), channel_axis=-1, data_range=1.0,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False))


def mean_ssim(images: Tensor, truths: Tensor) -> float:
    """The mean over pairs of :func:`ssim`, of two batches [N, H, W, 3]."""
    return float(np.mean([ssim(a, b) for a, b in zip(images, truths, strict=True)]))


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


def surface_points(volume: np.ndarray, level: float, count: int, seed: int) -> np.ndarray:
    """Points [count, 3] spread evenly over the surface where a volume [X, Y, Z] crosses ``level``.

    The volume stands on the ground and is larger inside. As in :func:`fill_solid` what air cannot
    reach is solid, so that neither the inside of a wall nor the ground below is a surface. In units
    of the grid's spacing, from its first node. ``seed`` makes it repeatable. ValueError if there is
    no surface.
    """
    import trimesh
    from skimage.measure import marching_cubes

    shell = volume > level
    if not shell.any():
        raise ValueError(f"There is no surface at {level:g}: the volume has at most "
                         f"{volume.max():.3g}.")
    filled = np.where(fill_solid(shell) & ~shell, volume.max(), volume)
    open_below = np.pad(filled, ((1, 1), (1, 1), (0, 1)), constant_values=min(0.0, volume.min()))
    vertices, faces, _, _ = marching_cubes(open_below, level)
    mesh = trimesh.Trimesh(vertices - [1, 1, 0], faces, process=False)
    return np.asarray(trimesh.sample.sample_surface(mesh, count, seed=seed)[0])


def chamfer_distance(points: np.ndarray, others: np.ndarray) -> float:
    """Mean distance from points [N, 3] of one surface to the nearest of the other's [M, 3], and
    back: the mean of both, in the points' unit."""
    there, _ = KDTree(others).query(points)
    back, _ = KDTree(points).query(others)
    return float((there.mean() + back.mean()) / 2)


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


def cosine_score(images: Tensor, others: Tensor) -> Tensor:
    """Cosine x 100 [N] of embeddings of images [N, C] with those of their texts or positions.

    The CLIP score of Tables 1 and 3, with CLIP's embeddings; the GPS score of Table 1, with
    GPS-CLIP's (A.1.4).
    """
    return 100 * F.cosine_similarity(images.float(), others.float(), dim=-1)


def average_score(clip_score: float, gps_score: float) -> float:
    """"Avg" of Table 1: the mean of both."""
    return (clip_score + gps_score) / 2


def recall_at(scores: Tensor, right: Tensor, k: int = 1) -> float:
    """R@k: the fraction of queries that have the right candidate among their k best.

    ``scores`` [Q, C] of each query with each candidate, ``right`` [Q] the index of its own. Equal
    scores are taken in random order, on average, so that a judge that sees no difference has
    k / C. ValueError if there are not k candidates.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k is {k}, but there are {scores.shape[1]} candidates; give 1 up to "
                         "their number.")
    own = scores.gather(1, right[:, None])
    better, equal = (scores > own).sum(dim=1), (scores == own).sum(dim=1)
    return float(((k - better) / equal).clamp(0, 1).mean())


def retrieval_error_km(scores: Tensor, candidates: ArrayLike, positions: ArrayLike) -> np.ndarray:
    """Kilometres [Q] from each query's best candidate to where it really is.

    ``scores`` [Q, C] as in :func:`recall_at`, ``candidates`` [C, 2] and ``positions`` [Q, 2] as
    (lat, lon) in degrees. Of equal scores the first counts.
    """
    best = scores.argmax(dim=1).cpu().numpy()
    return np.asarray(geo.distance_m(np.asarray(candidates)[best], positions)) / 1000


def prompt_place_leakage(places: ArrayLike) -> float:
    """How much the text of a prompt changes which place is seen in the image (Sec. 4.2).

    ``places`` [P, G, S] has the place, as a number, that a judge reads from the image of each of P
    prompts at each of G positions with each of S seeds. It is how much more often two images of one
    position differ in place if their prompts differ than if their seeds alone do: half the squared
    distance between two prompts' distributions of places, estimated without bias. 0: the text says
    nothing about where (by chance a little below); 1: it decides alone. No two images may start
    from the same noise. ValueError for fewer than two prompts or seeds.
    """
    shape = np.shape(places)
    if len(shape) != 3 or min(shape) < 1 or shape[0] < 2 or shape[2] < 2:
        raise ValueError(f"The places are of shape {shape}; give [prompts, positions, seeds], with "
                         "at least two prompts and two seeds.")
    prompts, positions, seeds = shape
    read = np.unique(places, return_inverse=True)[1].reshape(shape)
    counts = (read[..., None] == np.arange(read.max() + 1)).sum(axis=2).astype(np.float64)
    pairs = np.einsum("pgc,qgc->pq", counts, counts) / positions  # of seeds that agree
    own = np.trace(pairs)
    between = (pairs.sum() - own) / (prompts * (prompts - 1) * seeds**2)
    within = (own - prompts * seeds) / (prompts * seeds * (seeds - 1))
    return float(within - between)


def bootstrap_interval(values: ArrayLike, seed: int, level: float = 0.95, resamples: int = 2000
                       ) -> tuple[float, float]:
    """Bounds of the mean of ``values`` [N], one for each seed or image: percentile bootstrap.

    ``seed`` makes it repeatable. ValueError for fewer than two values, or one that is not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) < 2 or not np.isfinite(found).all():
        raise ValueError(f"An interval needs at least two finite values in a row; given are "
                         f"{found.size} of shape {found.shape}.")
    rng = np.random.default_rng(seed)
    means = [rng.choice(found, len(found)).mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
