"""A real landmark on the CPU, from 32 photos to 3D, with its ablations over three seeds.

    GPS_GUIDANCE_PHOTOS=FOLDER python benchmarks/real_landmark.py

``FOLDER/sakharov`` holds the photos of the Sakharov monument (PhotogrammetryTasks2024, MIT). Every
stage is a documented command, run as a user would; what is finished under
``outputs/real-landmark`` is not run again. Prints JSON lines {"name", "value", "goal", "ok"};
the stages' seconds are those of the machine at hand, two runs of the 3D stage at a time.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from stages import ROOT, launch, line, scores, stage

OUT = ROOT / "outputs" / "real-landmark"
DATASET, MODEL = OUT / "dataset", OUT / "model"
CONFIG = "gps-sds-sakharov.yaml"
LANDMARK = ["--landmark", "Sakharov monument", "--center", "59.940900,30.296600"]
SEEDS = (0, 1, 2)
NO_ANGLE = ["system.guidance.angle_dropout=1"]
EQ10_ALONE = ["system.guidance.use_img_loss=false", "system.loss.lambda_sds=0.01"]


def make_model(photos: Path) -> float:
    """Ingest, masks and training; returns the seconds of ingest and training."""
    cli = ["-m", "gps_guidance.cli"]
    seconds = stage(OUT, "ingest", [*cli, "ingest", str(photos), *LANDMARK, "--out", str(DATASET)])
    stage(OUT, "masks", [str(ROOT / "benchmarks" / "landmark_masks.py"), str(DATASET)])
    return seconds + stage(OUT, "train", [*cli, "train", "angle", str(DATASET), "--out", str(MODEL),
                                          "--recipe", "tiny-landmark"])


def reconstruct(run: tuple[str, list[str]]) -> float:
    """One 3D run; returns its seconds, start and report included."""
    name, overrides = run
    model = f"system.guidance.pretrained_model_name_or_path={MODEL}"
    return launch(OUT, CONFIG, name, [model, *overrides], ["--photos", str(DATASET)])


def generated_match() -> tuple[float, float, float]:
    """(PSNR of the VAE on training crops, match of generated photos, match of text-only ones)."""
    import numpy as np
    import torch

    from gps_guidance.autoencoder import reconstruction_psnr
    from gps_guidance.dataset import load_photos
    from gps_guidance.metrics import bearing_match
    from gps_guidance.models import load_angle_model
    from gps_guidance.sampling import sample_angles

    model = load_angle_model(MODEL)
    photos = load_photos(DATASET, model.angle.size)
    real = photos.crop(np.arange(len(photos)), np.random.default_rng(0)) / 2 + 0.5
    bearings = np.repeat(10.0 * np.arange(36), 2)
    found = []
    for use_angle in (True, False):
        images = torch.cat([
            sample_angles(model, list(bearings[k : k + 12]), seed=k, use_angle=use_angle)
            for k in range(0, len(bearings), 12)
        ])
        found.append(bearing_match(images, bearings, real, photos.bearings))
    return reconstruction_psnr(model.vae, photos, min_zoom=0.93), found[0], found[1]


def report(minutes: float) -> bool:
    """Print every line; True if all goals are met."""
    vae_db, match, text_match = generated_match()
    good = [
        line("real_landmark.minutes_photos_to_3d", minutes, 60, below=True),
        line("real_landmark.vae_db", vae_db, 26),
        line("real_landmark.generated_match", match, 0.9),
        line("real_landmark.generated_match_text_only", text_match, 0.2, below=True),
    ]
    goals = {"psnr_db": 17.5, "mask_iou": 0.70, "bearing_within_15_deg": 30 / 32}
    ours, without = ([scores(OUT, CONFIG, f"{kind}-{seed}") for seed in SEEDS]
                     for kind in ("angle", "no-angle"))
    for seed in SEEDS:
        good += [line(f"real_landmark.{key}.{seed}", ours[seed][key], goal)
                 for key, goal in goals.items()]
        for key in goals:
            line(f"real_landmark.no_angle.{key}.{seed}", without[seed][key])
        for key, goal in (("psnr_db", 2.5), ("mask_iou", 0.15)):
            above = ours[seed][key] - without[seed][key]
            good.append(line(f"real_landmark.{key}_above_no_angle.{seed}", above, goal))
    for key in ("psnr_db", "mask_iou"):
        above = mean(run[key] for run in ours) - mean(run[key] for run in without)
        line(f"real_landmark.{key}_above_no_angle.mean", above)
    alone = scores(OUT, CONFIG, "eq10-alone-0")
    for key in ("psnr_db", "psnr_affine_db", "mask_iou", "bearing_within_15_deg"):
        line(f"real_landmark.eq10_alone.{key}.0", alone[key])
    return all(good)


def main() -> int:
    folder = os.environ.get("GPS_GUIDANCE_PHOTOS")
    photos = Path(folder or "") / "sakharov"
    if not folder or not photos.is_dir():
        print("Set GPS_GUIDANCE_PHOTOS to the folder that holds sakharov/, the 32 photos of the "
              "monument with GPS tags (see benchmarks/README.md).", file=sys.stderr)
        return 2
    seconds = make_model(photos)
    runs = [(f"angle-{s}", [f"seed={s}"]) for s in SEEDS]
    runs += [(f"no-angle-{s}", [f"seed={s}", *NO_ANGLE]) for s in SEEDS]
    runs += [("eq10-alone-0", EQ10_ALONE)]
    with ThreadPoolExecutor(2) as pool:
        reconstructions = list(pool.map(reconstruct, runs))
    return 0 if report((seconds + reconstructions[0]) / 60) else 1


if __name__ == "__main__":
    sys.exit(main())
