"""Table 2: do images show the landmark from the bearing that was asked for?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gps_guidance import geo
from gps_guidance.dataset import load_photos
from gps_guidance.encoders import AngleEncoder
from gps_guidance.lift.export import to_uint8
from gps_guidance.miniature import photographer
from gps_guidance.models import load_angle_encoder, resolve_model
from gps_guidance.reproduce.angles import (
    BATCH,
    every_bin,
    load_classifier,
    read_apart,
    sample_bins,
)
from gps_guidance.reproduce.city import model_of
from gps_guidance.reproduce.outcome import (
    Claim,
    Outcome,
    Score,
    Table,
    claim_above,
    claim_at_least,
)
from gps_guidance.reproduce.settings import Landmark, Settings, slug
from gps_guidance.reproduce.sheets import draw_sheet, pictures, read_row, write_row
from gps_guidance.reproduce.work import Done, Unit, Work
from gps_guidance.sampling import sample_texts
from gps_guidance.scorers import AngleClassifier

TITLES = {"chance": "chance", "text": "base model, text", "no-angle": "ours, without the angle",
          "ours": "ours", "photos": "photos the classifier has not seen"}
METHODS = ("ours", "no-angle", "text")
COLUMNS = {"angle_accuracy": "angle accuracy, %", "within_one": "within one bin, %"}
PAPER = {"chance": {"angle_accuracy": 2.78}, "text": {"angle_accuracy": 3.06},
         "ours": {"angle_accuracy": 22.36}}
EXACT_GOAL, NEAR_GOAL = 60.0, 90.0  # what the miniature has to reach
SHOWN = 12  # bearings of the picture


def units(settings: Settings) -> list[Unit]:
    found = []
    for landmark in settings.landmarks:
        name, about = slug(landmark.name), {"landmark": asdict(landmark)}
        found += [Unit(f"{name}/bearings-{method}", sample_and_read,
                       {**about, "method": method, "seed": settings.seeds[0]})
                  for method in METHODS]
        found.append(Unit(f"{name}/bearings-photos", read_photos, about))
    return found


# --- pieces of work ----------------------------------------------------------------------------


def sample_and_read(folder: Path, landmark: dict[str, Any], method: str, seed: int
                    ) -> dict[str, Any]:
    """``images_per_bin`` images for each bin, and how many bins away the classifier reads each:
    ``apart``, in the order of the bins. Also shown.png, the first image of some bins."""
    where = Landmark(**landmark)
    judge = judge_of(where)
    encoder = load_angle_encoder(where.model)
    bins = every_bin(encoder.config.num_bins, where.images_per_bin)
    if method == "text":
        images = _without_bearing(where, encoder, len(bins), seed)
    else:
        images = sample_bins(model_of(where.model), bins, where.guidance_scale, where.steps, seed,
                             use_angle=method == "ours")
    first = shown_bins(encoder.config.num_bins) * where.images_per_bin
    write_row(folder / "shown.png", pictures(images[first]))
    apart = read_apart(judge, images, bins)
    return {"apart": apart.round().astype(int).tolist(), "num_bins": encoder.config.num_bins}


def _without_bearing(where: Landmark, encoder: AngleEncoder, count: int, seed: int) -> Tensor:
    """Images of the landmark's prompt by the text model."""
    return torch.cat([
        sample_texts(model_of(where.text_model), [encoder.prompt] * min(BATCH, count - at),
                     encoder.size, where.guidance_scale, where.steps, seed * 10000 + at)
        for at in range(0, count, BATCH)])


def read_photos(folder: Path, landmark: dict[str, Any]) -> dict[str, Any]:
    """What the classifier reads of photos held out of its training, as fractions. Also shown.png:
    photos from some bearings, of a procedural landmark the truth."""
    where = Landmark(**landmark)
    judge, encoder = judge_of(where), load_angle_encoder(where.model)
    num_bins = encoder.config.num_bins
    bearings = geo.bin_bearing_deg(shown_bins(num_bins), num_bins)
    procedural = photographer.LANDMARKS.get(encoder.config.landmark)
    if where.dataset is not None:
        photos = load_photos(where.dataset, encoder.size, split=None, in_memory=False)
        away = np.abs(geo.angle_difference_deg(photos.bearings[None], bearings[:, None]))
        crops = photos.crop(away.argmin(axis=1), np.random.default_rng(0))
        shown = pictures(crops / 2 + 0.5)
    elif procedural is not None:
        shown = [to_uint8(photographer.truth_view(procedural, bearing, encoder.size[0])[0]["rgb"])
                 for bearing in bearings.tolist()]
    else:
        raise ValueError(f"{where.name} is no procedural landmark: give its photos as dataset.")
    write_row(folder / "shown.png", shown)
    return {"accuracy": judge.config.accuracy, "within_one": judge.config.within_one,
            "held_out": judge.config.held_out}


def judge_of(landmark: Landmark) -> AngleClassifier:
    """The classifier of a landmark's bearings; ValueError if there is none, or of other bins than
    the model's."""
    judge = load_classifier(landmark.classifier, resolve_model(landmark.model))
    bins = load_angle_encoder(landmark.model).config.num_bins
    if judge.config.num_bins != bins:
        raise ValueError(f"The classifier of {landmark.name} reads {judge.config.num_bins} bins, "
                         f"its model has {bins}: train the classifier for this model.")
    return judge


def shown_bins(num_bins: int) -> np.ndarray:
    """Those of the picture."""
    return np.arange(0, num_bins, max(1, num_bins // SHOWN))[:SHOWN]


# --- outcome -----------------------------------------------------------------------------------


def outcome(settings: Settings, work: Work, done: Mapping[str, Done]) -> Outcome:
    def result(landmark: Landmark, row: str) -> Any:
        return done[f"{slug(landmark.name)}/bearings-{row}"].result

    rows = {"chance": _chance([result(one, "ours")["num_bins"] for one in settings.landmarks])}
    for method in reversed(METHODS):
        rows[method] = agreement([apart for one in settings.landmarks
                                  for apart in result(one, method)["apart"]])
    rows["photos"] = _photos([result(one, "photos") for one in settings.landmarks])
    sheets = [(_draw(work, landmark, result(landmark, "ours")["num_bins"]),
               f"{landmark.name} by bearing, clockwise from north. In a column, ours with and "
               "without the angle begin with the same noise.")
              for landmark in settings.landmarks]
    each = "; ".join(f"{one.name} {agreement(result(one, 'ours')['apart'])['angle_accuracy']}"
                     for one in settings.landmarks)
    procedural = all(one.dataset is None for one in settings.landmarks)
    return Outcome("Table 2. Angle accuracy", Table("table2", COLUMNS, TITLES, rows, PAPER), sheets,
                   claims_of(rows, procedural), [
        "A classifier of the landmark's photos reads the bearing of every image. Each bin is asked "
        "for equally often, so that images that know no bearing hit it once in as many times as "
        "there are bins, whatever side they prefer.",
        f"Ours, each landmark by itself: {each}.",
    ])


def agreement(apart: list[int]) -> dict[str, Score]:
    """Of images so many bins away from their own."""
    off = np.asarray(apart)
    return {"angle_accuracy": Score.of(100.0 * (off == 0)),
            "within_one": Score.of(100.0 * (off <= 1))}


def _chance(bins: list[int]) -> dict[str, Score]:
    part = 100 * float(np.mean(1 / np.asarray(bins)))
    return {"angle_accuracy": Score.of([part]), "within_one": Score.of([3 * part])}


def _photos(results: list[dict[str, Any]]) -> dict[str, Score]:
    """The classifiers' own scores; none where they do not say on how many photos."""
    found = {}
    for key, own in (("angle_accuracy", "accuracy"), ("within_one", "within_one")):
        right = [100.0 * (k < round(one[own] * one["held_out"]))
                 for one in results for k in range(one["held_out"])]
        if right:
            found[key] = Score.of(right)
    return found


def claims_of(rows: Mapping[str, Mapping[str, Score]], procedural: bool) -> list[Claim]:
    key = "angle_accuracy"
    chance = rows["chance"][key].mean
    claims = [claim_above("Ours shows the right bin more often than images without the bearing.",
                          key, rows, "ours", ["chance", "text", "no-angle"])]
    claims += [Claim(f"At chance: {TITLES[row]}.",
                     rows[row][key].low <= chance <= rows[row][key].high,
                     f"{rows[row][key]}; chance is {chance:.2f}") for row in ("text", "no-angle")]
    if procedural:
        claims += [
            claim_at_least(f"Ours shows the very bin in {EXACT_GOAL:g} % of images.",
                           rows["ours"][key], EXACT_GOAL),
            claim_at_least(f"Ours is within one bin in {NEAR_GOAL:g} % of images.",
                           rows["ours"]["within_one"], NEAR_GOAL),
        ]
    return claims


def _draw(work: Work, landmark: Landmark, num_bins: int) -> Path:
    """A sheet of the landmark from some bearings, a row a method, photos above."""
    name = slug(landmark.name)
    bins = shown_bins(num_bins)
    top = "photos" if landmark.dataset is not None else "truth"
    rows = [(title, read_row(work.folder / name / f"bearings-{row}" / "shown.png", len(bins)))
            for row, title in (("photos", top), ("ours", "ours"), ("no-angle", "without angle"),
                               ("text", "text alone"))]
    return draw_sheet(work.folder.parent / f"table2-{name}.png", rows,
                      [f"{360 * k / num_bins:.0f}°" for k in bins])
