"""GPS-CLIP (A.1.4, Algorithm 1): how well an image suits a position, with its training."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from gps_guidance.contrastive import (
    checkpoints_of,
    fit,
    hold_out,
    in_batches,
    middle_square,
    recall_among_hundred,
    start_device,
    symmetric_cross_entropy,
)
from gps_guidance.dataset import Photos, load_photos
from gps_guidance.geo import Bounds
from gps_guidance.judge_recipe import GPSClipRecipe
from gps_guidance.metrics import cosine_score, retrieval_error_km
from gps_guidance.models import load_part, resolve_model, save_module
from gps_guidance.scorers import convolutions

log = logging.getLogger(__name__)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that DINOv2 has learned
LAYERS = 6  # of the MLP for a coordinate


class GPSClip(ModelMixin, ConfigMixin):
    """Images and positions in one space, in which those that belong together are near.

    ``dinov2`` is the configuration of one, whose weights are then part of this model and stay as
    they are; None is a small convolutional network of ``widths``. Positions are normalised over
    ``bounds`` (south, west, north, east in degrees). The configuration keeps its own R@1 among a
    hundred and the median of its error in km, on ``held_out`` photos held out of its training.
    """

    config: Any  # diffusers types it as a plain dict, but it has the arguments as attributes
    config_name: Any  # its two base classes disagree

    @register_to_config
    def __init__(self, bounds: tuple[float, float, float, float] = (-90.0, -180.0, 90.0, 180.0),
                 resolution: int = 224, dinov2: dict[str, Any] | None = None,
                 widths: tuple[int, ...] = (24, 48, 96, 128), recall_at_1: float = 0.0,
                 median_error_km: float = 0.0, held_out: int = 0) -> None:
        super().__init__()
        self.bounds = Bounds(*bounds)
        self.backbone: nn.Module
        if dinov2 is None:
            dim, features = widths[-1], widths[-1] * 4 * 4
            self.backbone = convolutions(widths)
        else:
            config = Dinov2Config.from_dict(dict(dinov2))
            dim = features = config.hidden_size
            self.backbone = Dinov2Model(config).requires_grad_(False)
        self.image_projection = nn.Linear(features, dim)
        layers: list[nn.Module] = [nn.Linear(1, dim)]
        for _ in range(LAYERS - 1):
            layers += [nn.GELU(), nn.Linear(dim, dim)]
        self.coordinate = nn.Sequential(*layers)
        self.gps_projection = nn.Linear(2 * dim, dim)

    def features(self, images: Tensor) -> Tensor:
        """The backbone's features [B, F] of images [B, 3, H, W] in [0, 1], of any size."""
        weight = self.image_projection.weight
        images = middle_square(images.float(), self.config.resolution).to(weight)
        if self.config.dinov2 is None:
            return F.adaptive_avg_pool2d(self.backbone(images * 2 - 1), 4).flatten(1)
        mean, std = (images.new_tensor(x)[:, None, None] for x in (MEAN, STD))
        features: Tensor = self.backbone((images - mean) / std).pooler_output
        return features

    def project(self, features: Tensor) -> Tensor:
        """Unit embeddings [B, C] of the backbone's features [B, F]."""
        return F.normalize(self.image_projection(features), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, C] of images [B, 3, H, W] in [0, 1]."""
        return self.project(self.features(images))

    def embed_positions(self, positions: Any) -> Tensor:
        """Unit embeddings [B, C] of (lat, lon) [B, 2] in degrees; ValueError outside the bounds."""
        xy = torch.from_numpy(self.bounds.normalize(positions)).to(self.gps_projection.weight)
        code = self.coordinate(xy.reshape(-1, 2, 1))
        return F.normalize(self.gps_projection(code.flatten(1)), dim=-1)

    @torch.no_grad()
    def score(self, images: Tensor, positions: Any) -> Tensor:
        """The GPS score of Table 1 [B]: cosine x 100 of each image with its (lat, lon) [B, 2]."""
        return cosine_score(self.embed_images(images), self.embed_positions(positions))

    @torch.no_grad()
    def similarities(self, images: Tensor, positions: Any) -> Tensor:
        """Cosine x 100 [B, N] of each image with each (lat, lon) of [N, 2]."""
        return 100 * self.embed_images(images) @ self.embed_positions(positions).T

    def retrieve(self, images: Tensor, positions: Any) -> np.ndarray:
        """For each image the indices [B, N] of (lat, lon) [N, 2], the likeliest position first."""
        scores = self.similarities(images, positions)
        return scores.argsort(dim=1, descending=True, stable=True).cpu().numpy()


def start_gps_clip(recipe: GPSClipRecipe, bounds: Bounds) -> GPSClip:
    """An untrained GPS-CLIP on the recipe's base; ValueError if that is no DINOv2."""
    torch.manual_seed(recipe.seed)
    if recipe.base == "tiny":
        return GPSClip(bounds.as_tuple(), recipe.resolution).eval()
    folder = resolve_model(recipe.base)
    backbone = load_part(Dinov2Model.from_pretrained, folder, use_safetensors=True,
                         dtype=torch.float32)
    if backbone.config.model_type != "dinov2":
        raise ValueError(f"{folder} holds a model of type {backbone.config.model_type!r}; give a "
                         "folder of DINOv2, or base=tiny.")
    model = GPSClip(bounds.as_tuple(), recipe.resolution, backbone.config.to_dict()).eval()
    model.backbone.load_state_dict(backbone.state_dict())
    return model


def train_gps_clip(dataset: str | Path, output_dir: str | Path, recipe: GPSClipRecipe) -> Path:
    """Train GPS-CLIP on a dataset folder of a city and save it as ``output_dir``, which it returns.

    Run again after a stop and it goes on; its checkpoints are in ``<output_dir>-checkpoints`` until
    it is whole. ValueError if there is something in ``output_dir``, if the dataset has no bounds,
    or if recipe and photos do not fit.
    """
    recipe.check()
    out = Path(output_dir)
    checkpoints = checkpoints_of(out)
    tiny = recipe.base == "tiny"
    size = (recipe.resolution, recipe.resolution)
    photos = load_photos(dataset, size, need_bearings=False, in_memory=tiny)
    if photos.bounds is None:
        raise ValueError(f"{dataset} has no bounds, over which GPS-CLIP normalises positions. Run "
                         "`gps-guidance ingest ... --bbox S,W,N,E` again.")
    kept, held = hold_out(photos, recipe)
    model: Any = start_gps_clip(recipe, photos.bounds)
    model.to(start_device())
    known = None if tiny else in_batches(model.features, photos, np.arange(len(photos)))

    def batch_loss(picks: np.ndarray, rng: np.random.Generator) -> Tensor:
        if known is None:
            crops = photos.crop(picks, rng, recipe.min_zoom, recipe.colour_jitter) / 2 + 0.5
            features = model.features(crops)
        else:
            features = known[picks].to(model.device)
        return symmetric_cross_entropy(
            model.project(features), model.embed_positions(photos.positions[picks]),
            recipe.temperature)

    fit(model, batch_loss, photos, kept, recipe, checkpoints)
    _measure(model, photos, held)
    save_module(model.to(getattr(torch, recipe.save_dtype)), out)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return out


@torch.no_grad()
def _measure(model: GPSClip, photos: Photos, held: np.ndarray) -> None:
    """Put R@1 and the error of retrieval on photos held out into the configuration."""
    where = photos.positions[held]
    images = in_batches(model.embed_images, photos, held)
    positions = model.embed_positions(where).cpu()
    recall = recall_among_hundred(images, positions, np.arange(len(held)))
    error = float(np.median(retrieval_error_km(images @ positions.T, where, where)))
    log.info("GPS-CLIP: R@1 among a hundred %.1f %%, median error %.3f km on %d held-out photos",
             100 * recall, error, len(held))
    model.register_to_config(recall_at_1=recall, median_error_km=error, held_out=len(held))
