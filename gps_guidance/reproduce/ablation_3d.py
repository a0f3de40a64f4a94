"""Fig. 8, right: 3D without the angle, by words and Perp-Neg instead, and without prior
preservation; and what that is good for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gps_guidance.image_text import load_image_text_scorer
from gps_guidance.lift.export import image_grid, to_uint8, write_png
from gps_guidance.models import load_angle_encoder
from gps_guidance.reproduce.city import model_of
from gps_guidance.reproduce.outcome import Claim, Outcome, Score
from gps_guidance.reproduce.settings import Landmark, Settings, slug
from gps_guidance.reproduce.table3 import claims_of, rows_of, table_of, units_of, views_of
from gps_guidance.reproduce.work import Done, Unit, Work
from gps_guidance.sampling import sample_angles, sample_texts

RUNS = {"ours": "ours", "no-angle": "without the angle",
        "perp-neg": "DreamFusion with Perp-Neg",
        "no-prior": "without prior preservation"}
TITLES = RUNS | {"base": "the text model"}
SPREADS = ("ours", "no-prior", "base")  # whose images of the class are compared
IMAGES, BATCH = 48, 16  # of the class, whose diversity is measured


def _with_priors(settings: Settings) -> list[Landmark]:
    """Landmarks with a model by either training, a name of their class, and a judge."""
    return [landmark for landmark in settings.landmarks
            if landmark.no_prior_model and landmark.class_prompt and landmark.clip]


def units(settings: Settings) -> list[Unit]:
    return units_of(settings, RUNS) + [
        _class_unit(landmark, which, seed) for landmark in _with_priors(settings)
        for which in SPREADS for seed in settings.seeds]


def _class_unit(landmark: Landmark, which: str, seed: int) -> Unit:
    return Unit(f"{slug(landmark.name)}/class-{which}-{seed}", class_diversity,
                {"landmark": asdict(landmark), "which": which, "seed": seed})


@torch.no_grad()
def class_diversity(folder: Path, landmark: dict[str, Any], which: str, seed: int
                    ) -> dict[str, Any]:
    """How much images of the class differ: 1 - the cosine of CLIP's embeddings, mean over pairs.

    The prompt is the class's, without a bearing; sheet.png shows the images. ``which`` is one of
    SPREADS.
    """
    where = Landmark(**landmark)
    images = torch.cat([_class_images(where, which, seed * 10000 + at)
                        for at in range(0, IMAGES, BATCH)])
    write_png(folder / "sheet.png",
              image_grid([to_uint8(image.permute(1, 2, 0)) for image in images], 12))
    codes = load_image_text_scorer(str(where.clip)).embed_images(images)
    cosines = codes @ codes.T
    return {"diversity": float(1 - (cosines.sum() - cosines.trace()) / (IMAGES * (IMAGES - 1)))}


def _class_images(where: Landmark, which: str, seed: int) -> Tensor:
    prompt, scale = str(where.class_prompt), where.guidance_scale
    if which == "base":
        return sample_texts(model_of(where.text_model), [prompt] * BATCH,
                            load_angle_encoder(where.model).size, scale, where.steps, seed)
    model = model_of(where.model if which == "ours" else str(where.no_prior_model))
    return sample_angles(model, [0.0] * BATCH, scale, where.steps, seed, use_angle=False,
                         prompt=prompt)


def outcome(settings: Settings, work: Work, done: Mapping[str, Done]) -> Outcome:
    rows = rows_of(settings, RUNS, done)
    table = table_of("ablation-3d", TITLES, rows)
    made = Outcome("Ablation in 3D: angle and prior preservation (Fig. 8, right)", table,
                   views_of(settings, work, rows, RUNS))
    made.claims = claims_of(rows, ["no-angle"], "without the angle")
    if "perp-neg" in rows:
        made.claims += claims_of(rows, ["perp-neg"], "DreamFusion with Perp-Neg")
    priors = _with_priors(settings)
    if priors:
        spread = {which: Score.of(100 * _result(done, _class_unit(landmark, which, seed))
                                  for landmark in priors for seed in settings.seeds)
                  for which in SPREADS}
        table.columns["diversity"] = "diversity of the class, %"
        for which, score in spread.items():
            rows.setdefault(which, {})["diversity"] = score
        made.claims.append(Claim(
            "Without prior preservation images of the class are less diverse.",
            spread["ours"].above(spread["no-prior"]),
            f"with {spread['ours']}, without {spread['no-prior']}"))
        made.notes.append("The preserved images are of the landmark's own prompt. The class's is "
                          "another, which tells whether the model keeps what it knew.")
        made.pictures += [
            (work.at(_class_unit(landmark, which, settings.seeds[0])) / "sheet.png",
             f'"{landmark.class_prompt}", {TITLES[which]}')
            for landmark in priors for which in SPREADS]
    return made


def _result(done: Mapping[str, Done], unit: Unit) -> float:
    result = done[unit.name].result
    assert result is not None
    return float(result["diversity"])
