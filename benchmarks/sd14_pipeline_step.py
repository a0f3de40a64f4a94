"""One denoising step of StableDiffusionGPSPipeline at Stable Diffusion v1.4's size, on a CPU.

    python benchmarks/sd14_pipeline_step.py [--float32]

512 x 512 pixels, one image, the three predictions of Eq. 4, without decoding; the seconds are those
of the call, its text encoder included. The weights are random (2 GiB in a temporary folder), in
bfloat16 unless --float32. Prints JSON lines {"name", "value", "goal", "ok"}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from sd14 import measure
from stages import line

GOAL_SECONDS = 60.0
GOAL_GB = {False: 4.0, True: 8.0}  # by --float32


def run_step(folder: Path, float32: bool) -> dict[str, float]:
    """Load the model as a user would and take one step."""
    import torch

    from gps_guidance.lift import engine
    from gps_guidance.models import quiet_libraries
    from gps_guidance.pipeline import StableDiffusionGPSPipeline

    quiet_libraries()
    pipe = StableDiffusionGPSPipeline.from_pretrained(
        folder, dtype=torch.float32 if float32 else torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    start = time.perf_counter()
    latents = pipe("a photo", gps=(43.723, 10.397), num_inference_steps=1, output_type="latent",
                   generator=torch.Generator().manual_seed(0)).images
    seconds = time.perf_counter() - start
    assert latents.shape == (1, 4, 64, 64) and rows == [3], (latents.shape, rows)
    return {
        "seconds": seconds,
        "peak_memory_gb": engine.peak_memory_bytes(torch.device("cpu")) / 1e9,
        "finite": float(torch.isfinite(latents).all()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--float32", action="store_true", help="weights in float32")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # the measured child process
    args = parser.parse_args()
    if args.model is not None:
        print(json.dumps(run_step(args.model, args.float32)))
        return 0
    values = measure(__file__, "gps", sys.argv[1:])
    good = [
        line("sd14_pipeline_step.seconds", values["seconds"], GOAL_SECONDS, below=True),
        line("sd14_pipeline_step.peak_memory_gb", values["peak_memory_gb"],
             GOAL_GB[args.float32], below=True),
        line("sd14_pipeline_step.finite", values["finite"], 1),
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
