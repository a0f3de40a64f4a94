"""Images of a city by the methods of Table 1, and their scores by its judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gps_guidance import geo
from gps_guidance.dataset import Photos, load_photos
from gps_guidance.geocoding import address_prompt
from gps_guidance.gps_clip import GPSClip
from gps_guidance.image_text import load_image_text_scorer
from gps_guidance.lift.export import image_grid, to_uint8, write_png
from gps_guidance.miniature import city as miniatown
from gps_guidance.miniature.city_photographer import take_city_photos
from gps_guidance.miniature.scene_judge import SceneJudge
from gps_guidance.models import load_model, resolve_model
from gps_guidance.photos.ingest import ingest
from gps_guidance.photos.manifest import is_dataset
from gps_guidance.reproduce.settings import City
from gps_guidance.sampling import sample_gps, sample_texts

PAIRS = Path(__file__).parent / "pairs"
BATCH = 32
SHEET = 48  # images of the sheet that is kept to look at
PHOTOS, PHOTO_SEED = 6000, 0  # of the procedural city

Pairs = list[dict[str, Any]]


def load_pairs(name_or_path: str) -> Pairs:
    """A list of prompts and positions: rows with ``prompt``, ``lat``, ``lon``, and what else is
    known (docs/formats.md). ValueError if there is none."""
    path = PAIRS / f"{name_or_path}.json"
    path = path if path.is_file() else Path(name_or_path).expanduser()
    try:
        rows: Pairs = json.loads(path.read_text("utf-8"))["pairs"]
        for row in rows:
            geo.check_lat_lon((row["lat"], row["lon"]))
            if not isinstance(row["prompt"], str):
                raise ValueError(f"the prompt {row['prompt']!r} is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = ", ".join(sorted(p.stem for p in PAIRS.glob("*.json")))
        raise ValueError(f"{name_or_path} is no list of prompts and positions: {error!r}. Give "
                         f"{known}, or a JSON file with \"pairs\" of prompt, lat and lon."
                         ) from error
    return rows


def photos_of(city: City, folder: Path) -> Photos:
    """The city's photos; the procedural city's are taken and kept under ``folder`` first."""
    dataset = Path(city.dataset) if city.dataset else folder / "miniatown"
    if not city.dataset and not is_dataset(dataset):
        album = take_city_photos(folder / "miniatown-photos", PHOTOS, PHOTO_SEED)
        ingest([album], dataset, bounds=miniatown.BOUNDS)
    return load_photos(dataset, (city.resolution, city.resolution), need_bearings=False,
                       in_memory=city.dataset is None)


@cache
def model_of(name: str) -> Any:
    """The model, loaded once in a process, where it is fast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(name).to(device)


# --- methods: pairs and a seed -> images [B, 3, H, W] in [0, 1] --------------------------------


def _gps(city: City, rows: Pairs, seed: int) -> Tensor:
    return sample_gps(model_of(city.model), [row["prompt"] for row in rows], _positions(rows),
                      _size(city), city.guidance_scale, city.gps_guidance_scale, city.steps, seed)


def _gps_without_text(city: City, rows: Pairs, seed: int) -> Tensor:
    return sample_gps(model_of(city.model), None, _positions(rows), _size(city), 1.0,
                      city.gps_guidance_scale, city.steps, seed)


def _text(city: City, rows: Pairs, seed: int) -> Tensor:
    return sample_texts(model_of(city.base), [row["prompt"] for row in rows], _size(city),
                        city.guidance_scale - 1, city.steps, seed)


def _text_and_address(city: City, rows: Pairs, seed: int) -> Tensor:
    return sample_texts(model_of(city.base), _with_addresses(rows), _size(city),
                        city.guidance_scale - 1, city.steps, seed)


def _trained_on_addresses(city: City, rows: Pairs, seed: int) -> Tensor:
    assert city.address_model is not None
    return sample_texts(model_of(city.address_model), _with_addresses(rows), _size(city),
                        city.guidance_scale - 1, city.steps, seed)


METHODS: dict[str, Callable[[City, Pairs, int], Tensor]] = {
    "ours": _gps, "without-text": _gps_without_text, "text": _text, "address": _text_and_address,
    "address-model": _trained_on_addresses,
}


def nearest(photos: Photos, rows: Pairs) -> Tensor:
    """The photo that was taken nearest to each position: the paper's baseline without a model."""
    away = geo.distance_m(photos.positions[None], np.asarray(_positions(rows))[:, None])
    rng = np.random.default_rng(0)  # of a whole photo there is nothing to draw
    return photos.crop(away.argmin(axis=1), rng) / 2 + 0.5


def _positions(rows: Pairs) -> list[geo.LatLon]:
    return [(row["lat"], row["lon"]) for row in rows]


def _size(city: City) -> tuple[int, int]:
    return (city.resolution, city.resolution)


def _with_addresses(rows: Pairs) -> list[str]:
    return [address_prompt(row["prompt"], row.get("address")) for row in rows]


# --- pieces of work ----------------------------------------------------------------------------


def sample_and_score(folder: Path, city: dict[str, Any], method: str, seed: int) -> dict[str, Any]:
    """Images of every pair by one method, scored: lists with a value an image. Also sheet.png."""
    where = City(**city)
    rows = load_pairs(where.pairs)
    if method == "nearest":
        images = nearest(photos_of(where, folder), rows)
    else:
        images = torch.cat([METHODS[method](where, rows[at : at + BATCH], seed * 10000 + at)
                            for at in range(0, len(rows), BATCH)])
    step = max(1, len(images) // SHEET)
    shown = [to_uint8(image.permute(1, 2, 0)) for image in images[::step][:SHEET]]
    write_png(folder / "sheet.png", image_grid(shown, columns=12))
    return scores_of(where, rows, images)


@torch.no_grad()
def scores_of(city: City, rows: Pairs, images: Tensor) -> dict[str, list[Any]]:
    """``clip`` and ``gps``, cosines x 100 of each image with its own prompt and position; where the
    city is procedural also what its judge reads: ``place`` and ``object``, right (1) or not (0)."""
    clip = load_image_text_scorer(city.clip)
    gps_clip = GPSClip.from_pretrained(resolve_model(city.gps_clip), use_safetensors=True)
    gps_clip = gps_clip.float().eval()
    found: dict[str, list[Any]] = {
        "clip": _in_parts(lambda x, part: clip.score(x, [r["prompt"] for r in part]), images, rows),
        "gps": _in_parts(lambda x, part: gps_clip.score(x, _positions(part)), images, rows),
    }
    if city.scene_judge is not None:
        judge = SceneJudge.from_pretrained(resolve_model(city.scene_judge), use_safetensors=True)
        read = judge.float().eval().read(images)
        for question in ("place", "object"):
            found[question] = [int(answer == row[question]) for answer, row
                               in zip(read[question], rows, strict=True)]
    return found


def _in_parts(score: Callable[[Tensor, Pairs], Tensor], images: Tensor, rows: Sequence[Any]
              ) -> list[float]:
    return [round(value, 4) for at in range(0, len(images), BATCH)
            for value in score(images[at : at + BATCH], list(rows[at : at + BATCH])).tolist()]
