"""3D runs of a landmark by any method, and their scores by one judge."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gps_guidance.image_text import load_image_text_scorer
from gps_guidance.lift.config import find_config
from gps_guidance.lift.export import image_grid, to_uint8, write_png
from gps_guidance.lift.report import photo_camera, render_view, truth_scores
from gps_guidance.lift.trial import clip_score_of_views, load_trial
from gps_guidance.miniature.photographer import LANDMARKS
from gps_guidance.models import resolve_model
from gps_guidance.reproduce.angles import load_classifier
from gps_guidance.reproduce.nerf import nerf_units
from gps_guidance.reproduce.outcome import Score
from gps_guidance.reproduce.settings import Landmark, slug
from gps_guidance.reproduce.work import Done, Unit

VIEWS, STRIP = 12, 96  # pictures of a strip around the landmark, and their side in pixels
LAUNCH = "import sys; from gps_guidance.lift.engine import launch; sys.exit(launch(sys.argv[1:]))"
LAUNCH_STOPPED = 130
# What of a run's scores tables show, in percent where the scale is 100.
SCORES = {"clip": 1.0, "mask_iou": 100.0, "occupancy_iou": 100.0, "bearing_within_one_bin": 100.0,
          "psnr_db": 1.0, "ssim": 100.0, "chamfer_m": 1.0, "angular_error_deg": 1.0,
          "aligned_mask_iou": 100.0, "aligned_occupancy_iou": 100.0,
          "aligned_bearing_within_one_bin": 100.0}
COLUMNS = {
    "clip": "CLIP score", "mask_iou": "mask IoU, %", "occupancy_iou": "occupancy IoU, %",
    "bearing_within_one_bin": "right bearing, %", "psnr_db": "PSNR, dB", "ssim": "SSIM, %",
    "chamfer_m": "Chamfer distance, m", "angular_error_deg": "turned by, deg",
    "aligned_mask_iou": "mask IoU after the best turn, %",
    "aligned_occupancy_iou": "occupancy IoU after it, %",
    "aligned_bearing_within_one_bin": "right bearing after it, %",
}


def method_units(landmark: Landmark, method: str, seeds: Iterable[int]) -> list[Unit]:
    """A unit for each seed of a method that the landmark's settings have, of NeRF one; none
    otherwise."""
    if method == "nerf":
        return nerf_units(landmark, next(iter(seeds)))
    changes: list[str] = []
    config = landmark.config
    if method in ("view-prompts", "perp-neg"):
        config = (landmark.view_prompts_config if method == "view-prompts"
                  else landmark.perp_neg_config)
        changes = [f"system.guidance.pretrained_model_name_or_path={landmark.text_model}",
                   f"system.prompt_processor.prompt=a photo of {landmark.name}"]
    elif method == "no-angle":
        changes = ["system.guidance.angle_dropout=1"]
    elif method == "no-prior":
        if landmark.no_prior_model is None:
            return []
        changes = [f"system.guidance.pretrained_model_name_or_path={landmark.no_prior_model}"]
    if landmark.config is None or config is None:
        return []
    changes = [*landmark.overrides, *changes]
    told = find_config(config).read_bytes() + "\n".join(changes).encode()
    version = hashlib.sha256(told).hexdigest()[:16]
    judges = {"clip": landmark.clip, "classifier": landmark.classifier, "model": landmark.model}
    return [Unit(f"{slug(landmark.name)}/{method}-{seed}", lift,
                 {"name": landmark.name, "judges": judges, "config": config,
                  "version": version, "changes": changes, "seed": seed})
            for seed in seeds]


def lift(folder: Path, name: str, judges: dict[str, str | None], config: str, version: str,
         changes: list[str], seed: int) -> dict[str, float]:
    """Run ``launch.py`` with a config and score what it grew of the landmark ``name``.

    ``version`` is the hash of the config file and its ``changes``: another is run from the start.
    ``judges`` are the folders of a CLIP and of a classifier of bearings, or with None that of the
    angle ``model``. ``trial-<version>/run`` is the run's folder, views.png a strip of bearings. It
    goes on from its last checkpoint.
    """
    trial = folder / f"trial-{version}" / "run"
    resume = []
    if (trial / "ckpts" / "last.ckpt").is_file():
        resume = [f"resume={trial / 'ckpts' / 'last.ckpt'}"]
    else:
        shutil.rmtree(trial, ignore_errors=True)
    words = ["--config", config, "--train", "--engine", "portable", "--no-report",
             f"exp_root_dir={folder}",
             f"name={trial.parent.name}", "tag=run", "use_timestamp=false", f"seed={seed}",
             f"data.n_test_views={VIEWS}", *changes, *resume]
    with open(folder / "launch.log", "w", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, "-c", LAUNCH, *words], stdout=log, stderr=log,
                              check=False).returncode
    if code == LAUNCH_STOPPED:
        raise KeyboardInterrupt
    if code:
        raise ValueError(f"launch.py {' '.join(words)} ended with {code}: see "
                         f"{folder / 'launch.log'}.")
    return score_trial(trial, folder / "views.png", name, judges)


@torch.no_grad()
def score_trial(trial: Path, strip: Path, name: str, judges: Mapping[str, str | None]
                ) -> dict[str, float]:
    """The scores of a finished trial: against the exact truth where the landmark has one, and by
    CLIP where there is a judge. ``strip`` is where its views are drawn."""
    system, plan = load_trial(trial)
    data = plan.parts["data"][1]
    found: dict[str, Any] = {}
    if name in LANDMARKS:
        classifier = load_classifier(judges["classifier"], resolve_model(str(judges["model"])))
        found |= truth_scores(LANDMARKS[name], system, classifier)
    if judges["clip"] is not None:
        scorer = load_image_text_scorer(judges["clip"])
        found["clip"] = clip_score_of_views(system, data, scorer, name)
    views = [render_view(system, *photo_camera(data, 360.0 / VIEWS * k), STRIP, STRIP)["rgb"]
             for k in range(VIEWS)]
    write_png(strip, image_grid([to_uint8(rgb) for rgb in views], VIEWS))
    return {key: float(value) for key, value in found.items() if value is not None}


def method_scores(landmarks: Iterable[Landmark], method: str, seeds: list[int],
                  done: Mapping[str, Done]) -> dict[str, Score]:
    """The scores of one method over landmarks and seeds; empty if none was run by it."""
    results = [done[unit.name].result for landmark in landmarks
               for unit in method_units(landmark, method, seeds)]
    found: dict[str, Score] = {}
    for key, scale in SCORES.items():
        values = [scale * result[key] for result in results
                  if result is not None and _is_number(result.get(key))]
        if values:
            found[key] = Score.of(values)
    return found


def _is_number(value: Any) -> bool:
    return value is not None and bool(np.isfinite(value))
