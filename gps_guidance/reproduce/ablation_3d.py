"""Fig. 8, right: 3D without the angle and without prior preservation; and what that is good for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gps_guidance.image_text import load_image_text_scorer
from gps_guidance.lift.export import image_grid, to_uint8, write_png
from gps_guidance.models import load_angle_model
from gps_guidance.reproduce.outcome import Claim, Outcome, Score
from gps_guidance.reproduce.settings import Landmark, Settings, slug
from gps_guidance.reproduce.table3 import claims_of, rows_of, table_of, units_of, views_of
from gps_guidance.reproduce.work import Done, Unit, Work
from gps_guidance.sampling import sample_angles

TITLES = {"ours": "ours", "no-angle": "without the angle",
          "no-prior": "without prior preservation"}
IMAGES = 48  # of the class, whose diversity is measured


def _with_priors(settings: Settings) -> list[Landmark]:
    """Landmarks with a model by either training, a name of their class, and a judge."""
    return [landmark for landmark in settings.landmarks
            if landmark.no_prior_model and landmark.class_prompt and landmark.clip]


def units(settings: Settings) -> list[Unit]:
    return units_of(settings, TITLES) + [
        _class_unit(landmark, which, seed) for landmark in _with_priors(settings)
        for which in ("ours", "no-prior") for seed in settings.seeds]


def _class_unit(landmark: Landmark, which: str, seed: int) -> Unit:
    model = landmark.model if which == "ours" else landmark.no_prior_model
    return Unit(f"{slug(landmark.name)}/class-{which}-{seed}", class_diversity,
                {"model": model, "prompt": landmark.class_prompt, "clip": landmark.clip,
                 "steps": landmark.steps, "seed": seed})


@torch.no_grad()
def class_diversity(folder: Path, model: str, prompt: str, clip: str, steps: int, seed: int
                    ) -> dict[str, Any]:
    """How much images of the class differ: 1 - the cosine of CLIP's embeddings, mean over pairs.

    The prompt is the class's, without a bearing; sheet.png shows the images.
    """
    loaded = load_angle_model(model)
    images = torch.cat([sample_angles(loaded, [0.0] * 16, 2.0, steps, seed * 10000 + at,
                                      use_angle=False, prompt=prompt)
                        for at in range(0, IMAGES, 16)])
    write_png(folder / "sheet.png",
              image_grid([to_uint8(image.permute(1, 2, 0)) for image in images], 12))
    codes = load_image_text_scorer(clip).embed_images(images)
    cosines = codes @ codes.T
    return {"diversity": float(1 - (cosines.sum() - cosines.trace()) / (IMAGES * (IMAGES - 1)))}


def outcome(settings: Settings, work: Work, done: Mapping[str, Done]) -> Outcome:
    rows = rows_of(settings, TITLES, done)
    table = table_of("ablation-3d", TITLES, rows)
    made = Outcome("Ablation in 3D: angle and prior preservation (Fig. 8, right)", table,
                   views_of(settings, work, rows, TITLES))
    made.claims = claims_of(rows, ["no-angle"], "without the angle")
    priors = _with_priors(settings)
    if priors:
        spread = {which: Score.of(100 * _result(done, _class_unit(landmark, which, seed))
                                  for landmark in priors for seed in settings.seeds)
                  for which in ("ours", "no-prior")}
        table.columns["diversity"] = "diversity of the class, %"
        for which, score in spread.items():
            rows.setdefault(which, {})["diversity"] = score
        made.claims.append(Claim(
            "Without prior preservation images of the class are less diverse.",
            spread["ours"].above(spread["no-prior"]),
            f"with {spread['ours']}, without {spread['no-prior']}"))
        made.pictures += [
            (work.at(_class_unit(landmark, which, settings.seeds[0])) / "sheet.png",
             f'"{landmark.class_prompt}", {"with" if which == "ours" else "without"} prior '
             "preservation") for landmark in priors for which in ("ours", "no-prior")]
    return made


def _result(done: Mapping[str, Done], unit: Unit) -> float:
    result = done[unit.name].result
    assert result is not None
    return float(result["diversity"])
