"""Images of every bearing bin, and what a classifier reads from them (Table 2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gps_guidance import geo
from gps_guidance.models import DiffusionModel, load_part
from gps_guidance.sampling import sample_angles
from gps_guidance.scorers import AngleClassifier, bins_apart

BATCH = 32


def load_classifier(folder: str | Path | None, model: str | Path) -> AngleClassifier:
    """The judge of bearings in ``folder``, or with None that in the angle model's own folder.

    ValueError if there is none.
    """
    path = Path(model) / "angle_classifier" if folder is None else Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} holds no classifier of bearings: fit one on the landmark's photos by "
            f"`gps-guidance train classifier DATASET --out {model}`, or give --classifier FOLDER.")
    found: AngleClassifier = load_part(AngleClassifier.from_pretrained, path, use_safetensors=True)
    return found.float().requires_grad_(False).eval()


def every_bin(num_bins: int, images_per_bin: int) -> np.ndarray:
    """The bins of the images [num_bins * images_per_bin], in order."""
    return np.repeat(np.arange(num_bins), images_per_bin)


def sample_bins(model: DiffusionModel, bins: np.ndarray, guidance_scale: float = 2.0,
                steps: int = 50, seed: int = 0, use_angle: bool = True) -> Tensor:
    """An image of each bin by Eq. 7, [B, 3, H, W] in [0, 1]; ``use_angle`` as in
    :func:`gps_guidance.sampling.sample_angles`."""
    bearings = geo.bin_bearing_deg(bins, model.angle.config.num_bins)
    return torch.cat([
        sample_angles(model, bearings[at : at + BATCH].tolist(), guidance_scale, steps,
                      seed * 10000 + at, use_angle)
        for at in tqdm(range(0, len(bins), BATCH), desc="images", unit="batch", leave=False)])


def read_apart(classifier: AngleClassifier, images: Tensor, bins: np.ndarray) -> np.ndarray:
    """How many bins [B] away from its own each image is read."""
    found = np.concatenate([classifier.read_bins(part) for part in images.split(BATCH)])
    return bins_apart(found, bins, classifier.config.num_bins)


def angle_scores(classifier: AngleClassifier, images: Tensor, bins: np.ndarray
                 ) -> dict[str, list[float]]:
    """``angle_accuracy`` and ``within_one``: for each image 100 if its very bin is read, or one at
    most one bin away, else 0."""
    apart = read_apart(classifier, images, bins)
    return {"angle_accuracy": (100.0 * (apart < 0.5)).tolist(),
            "within_one": (100.0 * (apart < 1.5)).tolist()}
