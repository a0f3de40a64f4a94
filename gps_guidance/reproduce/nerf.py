"""NeRF from photos, the baseline of Table 3 that is all or nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from gps_guidance.image_text import load_image_text_scorer
from gps_guidance.lift.export import read_png
from gps_guidance.lift.nerf import nerf_from_photos
from gps_guidance.miniature.photographer import LANDMARKS, take_photos
from gps_guidance.reproduce.settings import Landmark, slug
from gps_guidance.reproduce.work import Unit

PHOTOS, SCALE = 80, 4  # of a procedural landmark: how many, and how much larger than others
COLUMNS = 4  # of the sheet of views
VERDICT, REASON = "verdict", "reason"


def nerf_units(landmark: Landmark, seed: int) -> list[Unit]:
    """One unit, if COLMAP is installed and there are photos of the landmark; none otherwise."""
    procedural = landmark.dataset is None and landmark.name in LANDMARKS
    if not importlib.util.find_spec("pycolmap") or not (procedural or landmark.dataset):
        return []
    return [Unit(f"{slug(landmark.name)}/nerf-{seed}", from_photos,
                 {"name": landmark.name, "dataset": landmark.dataset, "clip": landmark.clip,
                  "seed": seed})]


def from_photos(folder: Path, name: str, dataset: str | None, clip: str | None, seed: int
                ) -> dict[str, Any]:
    """The scores of :func:`gps_guidance.lift.nerf.nerf_from_photos`, and its views' by CLIP."""
    photos = dataset or take_photos(folder / "photos", PHOTOS, seed, name=name, scale=SCALE)
    scores = nerf_from_photos(photos, folder, name, seed=seed, threads=torch.get_num_threads())
    if scores[VERDICT] == "scored" and clip is not None:
        sheet = torch.from_numpy(read_png(folder / "views.png").copy()).permute(2, 0, 1) / 255
        side = sheet.shape[2] // COLUMNS
        views = sheet.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1)
        scorer = load_image_text_scorer(clip)
        scores["clip"] = float(scorer.score(views, [name] * len(views)).mean())
    return scores
