"""The judge of bearings of Table 2, with its fitting."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from gps_guidance import geo
from gps_guidance.dataset import Photos, load_photos
from gps_guidance.models import load_angle_encoder, save_module

log = logging.getLogger(__name__)


def convolutions(widths: Sequence[int]) -> nn.Sequential:
    """Images [B, 3, H, W] -> maps [B, widths[-1], h, w], each layer half as large."""
    layers: list[nn.Module] = []
    for channels, width in pairwise([3, *widths]):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width),
                   nn.SiLU()]
    return nn.Sequential(*layers)


class AngleClassifier(ModelMixin, ConfigMixin):
    """Reads the bearing bin of a photo: images [B, 3, H, W] in [0, 1] -> logits [B, num_bins].

    ``accuracy`` and ``within_one`` in its configuration are its own, on photos held out of its
    training, as fractions; ``held_out`` is how many there were.
    """

    config: Any  # diffusers types it as a plain dict, but it has the arguments as attributes
    config_name: Any  # its two base classes disagree

    @register_to_config
    def __init__(self, num_bins: int = 36, widths: tuple[int, ...] = (24, 48, 96, 128),
                 accuracy: float = 0.0, within_one: float = 0.0, held_out: int = 0) -> None:
        super().__init__()
        self.features = convolutions(widths)
        self.head = nn.Linear(widths[-1] * 4 * 4, num_bins)

    def forward(self, images: Tensor) -> Tensor:
        grid = F.adaptive_avg_pool2d(self.features(images * 2 - 1), 4)
        return self.head(grid.flatten(1))

    @torch.no_grad()
    def read_bins(self, images: Tensor) -> np.ndarray:
        """The most likely bin [B] of each image."""
        return self(images).argmax(dim=1).cpu().numpy()


def bins_apart(found: np.ndarray, true: np.ndarray, num_bins: int) -> np.ndarray:
    """How many bins lie between ``found`` and ``true`` ones [B], the shorter way round."""
    step = 360.0 / num_bins
    return np.abs(geo.angle_difference_deg(found * step, true * step)) / step


def bin_agreement(found: np.ndarray, true: np.ndarray, num_bins: int) -> tuple[float, float]:
    """Fractions of ``found`` bins that equal ``true`` ones, and that lie within one bin of them."""
    apart = bins_apart(found, true, num_bins)
    return float(np.mean(apart < 0.5)), float(np.mean(apart < 1.5))


def fit_angle_classifier(photos: Photos, num_bins: int = 36, steps: int = 2000,
                         batch_size: int = 32, seed: int = 0, held_out_fraction: float = 0.1,
                         min_zoom: float = 0.95) -> AngleClassifier:
    """Fit the classifier on real photos; a random part of them only measures it.

    Augmented by crops and colour, never by flips. The held-out agreement is kept in the returned
    model's configuration and logged.
    """
    rng = np.random.default_rng((seed, 21))
    order = rng.permutation(len(photos))
    held = order[: max(1, round(held_out_fraction * len(photos)))]
    kept = order[len(held) :]
    bins = geo.bearing_bin(photos.bearings, num_bins)
    torch.manual_seed(seed)
    model = AngleClassifier(num_bins)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="bearing classifier", unit="step"):
        picks = rng.choice(kept, size=batch_size)
        images = photos.crop(picks, rng, min_zoom, colour_jitter=0.15) / 2 + 0.5
        # Renders and samples are softer than photos; a judge of sharp images alone misreads them.
        if rng.random() < 0.5:
            height, width = photos.size
            small = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
            images = F.interpolate(small, (height, width), mode="bilinear")
        images = images + 0.03 * torch.randn_like(images)
        loss = F.cross_entropy(model(images), torch.from_numpy(bins[picks]), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    images = photos.crop(held, rng) / 2 + 0.5
    exact, near = bin_agreement(model.read_bins(images), bins[held], num_bins)
    log.info("bearing classifier: %.1f %% exact, %.1f %% within one bin on %d held-out photos",
             100 * exact, 100 * near, len(held))
    model.register_to_config(accuracy=exact, within_one=near, held_out=len(held))
    return model.requires_grad_(False)


def train_angle_classifier(dataset: str | Path, model_folder: str | Path, seed: int = 0) -> Path:
    """Fit the judge that belongs to an angle model, at its size and bins, on a dataset folder.

    Written to ``<model_folder>/angle_classifier``, where a run's report looks for it; the path is
    returned. ValueError if the folder holds no angle model.
    """
    encoder = load_angle_encoder(model_folder)
    model = fit_angle_classifier(load_photos(dataset, encoder.size), encoder.config.num_bins,
                                 seed=seed)
    folder = Path(model_folder) / "angle_classifier"
    save_module(model.half(), folder)
    return folder
