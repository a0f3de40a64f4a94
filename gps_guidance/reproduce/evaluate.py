"""Scores of one's own model or trial, each with its interval: ``gps-guidance evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.geo import Bounds, LatLon, distance_m
from gps_guidance.gps_clip import GPSClip
from gps_guidance.image_text import load_image_text_scorer
from gps_guidance.lift.plan import Plan
from gps_guidance.lift.report import SCORES
from gps_guidance.lift.trial import load_trial, random_views
from gps_guidance.metrics import (
    average_score,
    prompt_place_leakage,
    recall_at,
    retrieval_error_km,
)
from gps_guidance.models import DiffusionModel, load_angle_encoder, load_model, resolve_model
from gps_guidance.reproduce.angles import angle_scores, every_bin, load_classifier, sample_bins
from gps_guidance.reproduce.city import (
    BATCH,
    Pairs,
    clip_scores,
    gps_scores,
    gps_similarities,
    load_judge,
    load_pairs,
    parts,
)
from gps_guidance.reproduce.outcome import Score
from gps_guidance.sampling import sample_gps

TITLES = {
    "clip": "CLIP score", "gps": "GPS score", "average": "average",
    "recall_at_1": "own position first, %", "recall_at_10": "own position among ten, %",
    "retrieval_error_km": "error of the position, km", "leakage": "prompt-place leakage",
    "angle_accuracy": "angle accuracy, %", "within_one": "within one bin, %",
}
DETAILS = ("psnr_affine_db", "depth_error", "aligned_mask_iou", "aligned_occupancy_iou",
           "aligned_psnr_db", "bearing_within_15_deg")  # of a trial, beside SCORES
LEAKAGE_PROMPTS, LEAKAGE_POSITIONS, LEAKAGE_SEEDS = 4, 8, 4


@dataclass(frozen=True)
class Judging:
    """By whom and on what a model is judged.

    Of a GPS model ``guidance_scale`` is w_p of Eq. 4 and ``limit`` the number of pairs, None for
    all; of an angle model it is w of Eq. 7. None: what the paper's tables have here.
    """

    clip: str | None = None
    gps_clip: str | None = None
    classifier: str | None = None
    pairs: str | None = None
    lora: str | None = None
    guidance_scale: float | None = None
    gps_guidance_scale: float = 7.5
    steps: int = 50
    seed: int = 0
    images_per_bin: int = 10
    limit: int | None = None


def evaluate(model: str, judging: Judging) -> dict[str, Score]:
    """Scores by name of a GPS model, an angle model, or a finished 3D trial's folder.

    ValueError for another folder, or where a judge is missing.
    """
    if (Path(model).expanduser() / "configs").is_dir():
        return _trial_scores(Path(model).expanduser(), judging)
    loaded = load_model(model, judging.lora).to(_device())
    if isinstance(loaded.gps_encoder, AngleEncoder):
        values = _angle_values(loaded, model, judging)
    elif isinstance(loaded.gps_encoder, GPSEncoder):
        values = _gps_values(loaded, loaded.gps_encoder.bounds, judging)
    else:
        raise ValueError(f"{model} is a text model, which knows no place: give a GPS model, an "
                         "angle model, or a trial folder of launch.py.")
    return {key: Score.of(found) for key, found in values.items()}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _trial_scores(folder: Path, judging: Judging) -> dict[str, Score]:
    """Those in a trial's metrics.json, each of one field, and the CLIP score of 30 views."""
    try:
        found = json.loads((folder / "metrics.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no finished trial: {error}. Finish it by `python launch.py "
                         "--train` with resume=.../last.ckpt.") from error
    scores = {key: Score.of([float(found[key])]) for key in (*SCORES, *DETAILS)
              if found.get(key) is not None}
    if judging.clip is not None:
        scorer = load_image_text_scorer(judging.clip).to(_device())
        system, plan = load_trial(folder, _device())
        views = random_views(system, plan.parts["data"][1], seed=judging.seed)
        scores["clip"] = Score.of(scorer.score(views, [_text_of(plan)] * len(views)).tolist())
    if not scores:
        raise ValueError(f"{folder} has no scores: only the procedural landmarks have a truth. "
                         "Give --clip FOLDER, or train with --photos DATASET.")
    return scores


def _text_of(plan: Plan) -> str:
    """What a trial should show: the prompt of its config, or else of its angle model."""
    given = plan.cfg.system.get("prompt_processor", {}).get("prompt")
    guidance = plan.cfg.system.get("guidance", {})
    return str(given or load_angle_encoder(guidance["pretrained_model_name_or_path"],
                                           guidance.get("lora_weights")).prompt)


def _angle_values(model: DiffusionModel, name: str, judging: Judging) -> dict[str, list[float]]:
    classifier = load_classifier(judging.classifier, judging.lora or resolve_model(name))
    num_bins = model.angle.config.num_bins
    if classifier.config.num_bins != num_bins:
        raise ValueError(f"The classifier reads {classifier.config.num_bins} bins, but {name} has "
                         f"{num_bins}: give the classifier of this landmark.")
    bins = every_bin(num_bins, judging.images_per_bin)
    scale = 2.0 if judging.guidance_scale is None else judging.guidance_scale
    return angle_scores(classifier, sample_bins(model, bins, scale, judging.steps, judging.seed),
                        bins)


def _gps_values(model: DiffusionModel, bounds: Bounds, judging: Judging) -> dict[str, list[float]]:
    if judging.clip is None and judging.gps_clip is None:
        raise ValueError("A GPS model is judged by others: give --clip FOLDER for the texts, "
                         "--gps-clip FOLDER for the positions, or both (docs/evaluation.md).")
    if judging.pairs is None:
        raise ValueError("Give --pairs: a bundled list (nyc, paris, miniatown) or a file, of the "
                         "city that the model was trained on.")
    rows = load_pairs(judging.pairs)[: judging.limit]
    where = [(row["lat"], row["lon"]) for row in rows]
    _check_inside(bounds, where, f"The model does not cover the pairs {judging.pairs}")
    clip = None if judging.clip is None else load_image_text_scorer(judging.clip).to(_device())
    gps_clip: Any = None if judging.gps_clip is None else load_judge(judging.gps_clip)
    if gps_clip is not None:
        gps_clip.to(_device())
        _check_inside(gps_clip.bounds, where,
                      f"The judge {judging.gps_clip} does not cover the pairs {judging.pairs}")
    images = _sample(model, rows, judging, "images")
    values: dict[str, list[float]] = {}
    if clip is not None:
        values["clip"] = clip_scores(clip, rows, images)
    if gps_clip is not None:
        values["gps"] = gps_scores(gps_clip, rows, images)
    if clip is not None and gps_clip is not None:
        values["average"] = list(map(average_score, values["clip"], values["gps"]))
    if gps_clip is not None:
        values |= retrieval(gps_similarities(gps_clip, rows, images), where)
        values |= _leakage(model, gps_clip, rows, judging)
    return values


def _check_inside(bounds: Bounds, where: list[LatLon], trouble: str) -> None:
    try:
        bounds.check(where, "the position")
    except ValueError as error:
        raise ValueError(f"{trouble}: {error} Give --pairs of its own city.") from error


def _sample(model: DiffusionModel, rows: Pairs, judging: Judging, what: str) -> Tensor:
    scale = 7.5 if judging.guidance_scale is None else judging.guidance_scale
    batches = list(parts(rows, judging.seed))
    return torch.cat([
        sample_gps(model, [row["prompt"] for row in part],
                   [(row["lat"], row["lon"]) for row in part], None, scale,
                   judging.gps_guidance_scale, judging.steps, seed)
        for part, seed in tqdm(batches, desc=what, unit="batch", leave=False)])


def _leakage(model: DiffusionModel, judge: GPSClip, rows: Pairs, judging: Judging
             ) -> dict[str, list[float]]:
    """The prompt-place leakage at each of some positions of the list; of one prompt there is none.

    Positions are far apart, so that the likeliest of them by the judge is a place that can be
    told from the others; prompts are taken evenly from the list.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    prompts = prompts[:: max(1, len(prompts) // LEAKAGE_PROMPTS)][:LEAKAGE_PROMPTS]
    where = farthest([(row["lat"], row["lon"]) for row in rows], LEAKAGE_POSITIONS)
    if len(prompts) < 2 or len(where) < 2:
        return {}
    crossed = [{"prompt": prompt, "lat": lat, "lon": lon} for prompt in prompts
               for lat, lon in where for _ in range(LEAKAGE_SEEDS)]
    images = _sample(model, crossed, judging, "images for the leakage")
    places = np.concatenate([judge.retrieve(part, where)[:, 0] for part in images.split(BATCH)])
    places = places.reshape(len(prompts), len(where), LEAKAGE_SEEDS)
    return {"leakage": [prompt_place_leakage(places[:, at : at + 1]) for at in range(len(where))]}


def farthest(positions: Sequence[LatLon], count: int) -> list[LatLon]:
    """The first position, then always the one that is farthest from those before, up to ``count``
    that differ."""
    found = [positions[0]]
    away = distance_m(np.asarray(positions), np.asarray(found[0]))
    while len(found) < count and away.max() > 0:
        found.append(positions[int(away.argmax())])
        away = np.minimum(away, distance_m(np.asarray(positions), np.asarray(found[-1])))
    return found


def retrieval(scores: Tensor, positions: Sequence[LatLon]) -> dict[str, list[float]]:
    """How well a judge finds each image's own position among all [N, 2]; ``scores`` [N, N].

    R@1 and R@10 in per cent, the latter of more than ten, and the kilometres to the best one.
    """
    found = {f"recall_at_{k}": [100 * recall_at(row[None], torch.tensor([own]), k)
                                for own, row in enumerate(scores)]
             for k in (1, 10) if k < len(positions)}
    away_km = retrieval_error_km(scores, positions, positions)
    return {**found, "retrieval_error_km": away_km.tolist()}
