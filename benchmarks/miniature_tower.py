"""The main job on the bundled miniature, over three seeds, with and without the angle.

    python benchmarks/miniature_tower.py

First the README's command as it is, alone on the machine (its time and memory); then two more
seeds, the text-only ablation (the same text, time steps and views, but never an angle) and Eq. 10
without the image term, two at a time. Scores are over 24 held-out views. Prints JSON lines
{"name", "value", "goal", "ok"}; what is finished under ``outputs/miniature-tower`` is kept.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from stages import ROOT, launch, line, scores

OUT = ROOT / "outputs" / "miniature-tower"
CONFIG = "gps-sds-pisa.yaml"
SEEDS = (0, 1, 2)
NO_ANGLE = ["system.guidance.angle_dropout=1"]
EQ10_ALONE = ["system.guidance.use_img_loss=false", "system.loss.lambda_sds=0.01"]
GOALS = {"mask_iou": 0.86, "occupancy_iou": 0.68, "psnr_db": 22.5, "bearing_within_one_bin": 0.95}


def report(main_seconds: float) -> bool:
    """Print every line; True if all goals are met."""
    first = scores(OUT, CONFIG, "angle-0")
    good = [
        line("miniature_tower.minutes", main_seconds / 60, 6, below=True),
        line("miniature_tower.peak_memory_gb", first["peak_memory_bytes"] / 1e9, 4, below=True),
    ]
    for seed in SEEDS:
        ours = scores(OUT, CONFIG, f"angle-{seed}")
        good += [line(f"miniature_tower.{key}.{seed}", ours[key], goal)
                 for key, goal in GOALS.items()]
        line(f"miniature_tower.psnr_affine_db.{seed}", ours["psnr_affine_db"])
    for seed in SEEDS:
        without = scores(OUT, CONFIG, f"no-angle-{seed}")
        for key in (*GOALS, "aligned_turn_deg", "aligned_mask_iou", "aligned_occupancy_iou",
                    "aligned_psnr_db"):
            line(f"miniature_tower.no_angle.{key}.{seed}", without[key])
    alone = scores(OUT, CONFIG, "eq10-alone-0")
    for key in (*GOALS, "psnr_affine_db"):
        line(f"miniature_tower.eq10_alone.{key}.0", alone[key])
    return all(good)


def main() -> int:
    main_seconds = launch(OUT, CONFIG, "angle-0", [], threads=None)
    runs = [(f"angle-{s}", [f"seed={s}"]) for s in SEEDS[1:]]
    runs += [(f"no-angle-{s}", [f"seed={s}", *NO_ANGLE]) for s in SEEDS]
    runs += [("eq10-alone-0", EQ10_ALONE)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: launch(OUT, CONFIG, *run), runs))
    return 0 if report(main_seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
