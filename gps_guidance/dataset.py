"""From a dataset folder (``gps-guidance ingest``) to tensors: crops and places."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gps_guidance import geo
from gps_guidance.photos.manifest import load_manifest

STORE = 1.5  # photos are kept at this multiple of the training size, so that zoomed crops are sharp


class PhotoFiles:
    """Images uint8 [N, 3, h, w] that are read when one is asked for, ``images[index]``."""

    def __init__(self, paths: list[Path], stored: tuple[int, int]) -> None:
        self.paths, self.shape = paths, (len(paths), 3, *stored)

    def __getitem__(self, index: int) -> Tensor:
        pixels = _fit(self.paths[index], self.shape[2:])
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@dataclass
class Photos:
    """The photos of one landmark or city.

    ``images`` uint8 [N, 3, h, w] cropped to the aspect of ``size`` around the middle, ``ids`` the
    manifest's ids, ``versions`` the ids with the size of the stored image, ``size`` (height, width)
    of training crops. Of a landmark: ``bearings`` float64 [N] in degrees, and ``masks``, its
    coverage [N, H, W] in [0, 1] at ``size``, where the dataset has them. Of a city: ``bounds``. Of
    both: ``positions`` (lat, lon) float64 [N, 2] in degrees, ``captions`` and ``addresses``, None
    where a photo has none. What a dataset lacks is None.
    """

    images: Tensor | PhotoFiles
    bearings: Any  # an array or None
    ids: list[str]
    size: tuple[int, int]
    landmark: str
    center: tuple[float, float] | None
    masks: Tensor | None = None
    captions: list[str | None] = field(default_factory=list)
    addresses: list[str | None] = field(default_factory=list)
    positions: Any = None  # an array; None only in photos that come from no dataset
    bounds: geo.Bounds | None = None
    versions: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def crop(self, indices: np.ndarray, rng: np.random.Generator, min_zoom: float = 1.0,
             colour_jitter: float = 0.0, random_flip: bool = False) -> Tensor:
        """A random crop of each photo, [B, 3, H, W] in [-1, 1]: see :func:`random_crop`."""
        return torch.stack([
            random_crop(self.images[index], self.size, rng, min_zoom, colour_jitter, random_flip)
            for index in indices
        ])

    def bin_weights(self, num_bins: int, exponent: float) -> np.ndarray:
        """Probability [N] of drawing each photo: (photos in its bin) ** -exponent, normalised."""
        bins = geo.bearing_bin(self.bearings, num_bins)
        counts = np.bincount(bins, minlength=num_bins)
        weights = counts[bins].astype(np.float64) ** -exponent
        return weights / weights.sum()


def random_crop(image: Tensor, size: tuple[int, int], rng: np.random.Generator,
                min_zoom: float = 1.0, colour_jitter: float = 0.0, random_flip: bool = False
                ) -> Tensor:
    """A random crop [3, H, W] in [-1, 1] of an image uint8 [3, h, w].

    It keeps a fraction in [min_zoom, 1] of the image's sides. ``colour_jitter`` scales brightness,
    contrast and channels by up to that fraction. ``random_flip`` mirrors every other crop; a
    mirrored photo has another bearing and unreadable signs.
    """
    height, width = image.shape[-2:]
    zoom = rng.uniform(min_zoom, 1.0)
    h, w = round(height * zoom), round(width * zoom)
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    crop = image[:, top : top + h, left : left + w][None].float()
    crop = F.interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False)[0]
    if colour_jitter:
        gain = rng.uniform(1 - colour_jitter, 1 + colour_jitter)
        tint = 1 + rng.uniform(-colour_jitter, colour_jitter, 3) / 3
        mean = crop.mean()
        crop = (crop - mean) * rng.uniform(1 - colour_jitter, 1 + colour_jitter) + mean
        crop = crop * (torch.from_numpy(tint).float()[:, None, None] * gain)
    if random_flip and rng.random() < 0.5:
        crop = crop.flip(-1)
    return (crop / 127.5 - 1).clamp(-1, 1)


def load_photos(dataset: str | Path, size: tuple[int, int], split: str | None = "train",
                need_bearings: bool = True, in_memory: bool = True) -> Photos:
    """Read the manifest's photos of ``split`` (None: all) for crops of ``size`` (height, width).

    Unless ``in_memory``, images are read when they are asked for, and masks not at all.
    ValueError if there is no such photo, or, unless ``need_bearings`` is False, if the dataset has
    no landmark (bearings need a centre).
    """
    manifest = load_manifest(dataset)
    if need_bearings and manifest.center is None:
        raise ValueError(
            f"{dataset} was ingested without a landmark, so its photos have no bearings. Run "
            f'`gps-guidance ingest ... --landmark "NAME" --center lat,lon` again.'
        )
    columns = ["id", "file", "width", "height", "lat", "lon", "bearing_deg", "caption", "address",
               "split"]
    rows: list[dict[str, Any]] = manifest.rows.select(columns).to_pylist()
    rows = [row for row in rows if split is None or row["split"] == split]
    if not rows:
        raise ValueError(f"{dataset} has no photo in split {split!r}.")
    bare = sum(row["file"] is None for row in rows)
    if bare:
        raise ValueError(f"{bare} of the {len(rows)} rows of {dataset} have no image: run "
                         "`gps-guidance ingest` again without --records-only.")
    stored = (math.ceil(size[0] * STORE), math.ceil(size[1] * STORE))
    paths = [manifest.root / row["file"] for row in rows]
    images: Tensor | PhotoFiles = PhotoFiles(paths, stored)
    if in_memory:
        read = [_fit(path, stored) for path in tqdm(paths, desc="reading photos", unit="photo")]
        images = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).contiguous()
    return Photos(
        images=images,
        bearings=_column(rows, "bearing_deg") if manifest.center is not None else None,
        ids=[row["id"] for row in rows],
        size=size,
        landmark=manifest.landmark or "",
        center=manifest.center,
        masks=_load_masks(manifest.root, [row["id"] for row in rows], size) if in_memory else None,
        captions=[row["caption"] for row in rows],
        addresses=[row["address"] for row in rows],
        positions=np.stack([_column(rows, "lat"), _column(rows, "lon")], axis=1),
        bounds=manifest.bounds,
        versions=[f"{row['id']}-{row['width']}x{row['height']}" for row in rows],
    )


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _load_masks(root: Path, ids: list[str], size: tuple[int, int]) -> Tensor | None:
    """Coverage [N, H, W] from ``masks/<id>.png`` (white = landmark), if every photo has one."""
    paths = [root / "masks" / f"{name}.png" for name in ids]
    if not all(path.is_file() for path in paths):
        return None
    return torch.from_numpy(np.stack([_fit(path, size)[..., 0] for path in paths])) / 255.0


def _fit(path: Path, stored: tuple[int, int]) -> np.ndarray:
    """One photo as uint8 [h, w, 3]: the middle in the aspect of ``stored``, resized to it."""
    with Image.open(path) as stored_photo:
        photo = stored_photo.convert("RGB")
    scale = min(photo.width / stored[1], photo.height / stored[0])
    w, h = stored[1] * scale, stored[0] * scale
    left, top = (photo.width - w) / 2, (photo.height - h) / 2
    return np.asarray(
        photo.resize((stored[1], stored[0]), Image.Resampling.LANCZOS,
                     box=(left, top, left + w, top + h))
    )


def dither_bins(bearings: np.ndarray, rng: np.random.Generator, num_bins: int = 36) -> np.ndarray:
    """One of the two nearest bin centres [B] in degrees, drawn so that the mean is the bearing.

    Snapping to the nearest bin (the paper) throws the remainder away; drawing keeps it.
    """
    width = 360.0 / num_bins
    lower = np.floor(bearings / width)
    pick = lower + (rng.random(len(bearings)) < bearings / width - lower)
    return geo.bin_bearing_deg(pick, num_bins)
