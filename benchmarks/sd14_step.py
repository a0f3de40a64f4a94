"""One step of gps-sds-pisa.yaml with a model of Stable Diffusion v1.4's shapes, 256 px, on a CPU.

    python benchmarks/sd14_step.py [--half] [--batch-size 1]

The same YAML, engine and losses as for the bundled model; overridden are the model's folder and
precision, the render size (64 px from the start), the batch size (1, the YAML has 3) and the number
of steps. The report, which samples from the model, is not part of it. The weights are random
(860 M + 84 M + 123 M parameters, 2 GiB in a temporary folder): time and memory do not depend on
their values. Prints JSON lines {"name", "value", "goal", "ok"}.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sd14 import measure

GOAL_SECONDS = 60.0
GOAL_GIB = 8.0


def run_step(folder: Path, half: bool, batch_size: int) -> dict[str, float]:
    """Train the YAML for one step with this model, without the turntable and the report."""
    import torch

    from gps_guidance.lift import engine
    from gps_guidance.lift.config import load_config
    from gps_guidance.lift.plan import build_system, make_plan
    from gps_guidance.models import quiet_libraries

    quiet_libraries()
    engine.quiet_lightning()
    plan = make_plan(load_config("gps-sds-pisa", [
        f"system.guidance.pretrained_model_name_or_path={folder}",
        f"system.guidance.half_precision_weights={str(half).lower()}",
        "data.width=64", "data.height=64", f"data.batch_size={batch_size}",
        "data.resolution_milestones=[]", "trainer.max_steps=1",
        "trainer.enable_progress_bar=false", f"exp_root_dir={folder}/outputs",
    ]))
    data, data_cfg = plan.parts["data"]
    system = build_system(plan)
    before = [p.detach().clone() for p in system.geometry.parameters()]
    device = torch.device("cpu")
    trainer = engine.make_trainer(plan, device, [], [])
    trainer.fit(system, datamodule=data(data_cfg))
    after = list(system.geometry.parameters())
    moved = all(bool((a != b).any()) for a, b in zip(after, before, strict=True))
    finite = all(bool(torch.isfinite(p).all()) for p in after)
    return {
        "seconds": system.training_seconds,
        "peak_rss_gib": engine.peak_memory_bytes(device) / 2**30,
        "finite_gradient": float(moved and finite),
        "nan_grads": float(trainer.callback_metrics["train/nan_grads"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--half", action="store_true", help="half_precision_weights: bfloat16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # the measured child process
    args = parser.parse_args()
    if args.model is not None:
        print(json.dumps(run_step(args.model, args.half, args.batch_size)))
        return 0
    # a process of its own: building the weights must not count as the step's memory
    values = measure(__file__, "angle", sys.argv[1:])
    goals = {
        "seconds": values["seconds"] < GOAL_SECONDS,
        "peak_rss_gib": values["peak_rss_gib"] < GOAL_GIB,
        "finite_gradient": values["finite_gradient"] == 1 and values["nan_grads"] == 0,
    }
    limits = {"seconds": GOAL_SECONDS, "peak_rss_gib": GOAL_GIB, "finite_gradient": 1.0}
    for name, ok in goals.items():
        print(json.dumps({"name": f"sd14_step.{name}", "value": round(values[name], 2),
                          "goal": limits[name], "ok": ok}))
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
