"""The part of sds.py that runs inside threestudio: our guidance and its stock one, in turns.

    python benchmarks/sds_host.py MODEL TURNS        (in threestudio's folder)

Both get the same render, cameras, prompt and weights; a step is the call and its backward pass.
Prints {"ours", "ours_512", "stock"}: seconds of each turn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path.cwd())]

from gps_guidance.lift.cameras import c2w_from_bearing, camera_batch  # noqa: E402
from gps_guidance.lift.guidance import GPSGuidance, GPSGuidanceConfig  # noqa: E402
from gps_guidance.lift.prompts import GPSPromptProcessor, GPSPromptProcessorConfig  # noqa: E402
from gps_guidance.nocompile import host  # noqa: E402

SIDE = 64  # of renders


def main(model: str, turns: int) -> None:
    host.prepare()
    import threestudio

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = {"pretrained_model_name_or_path": model, "guidance_scale": 1.0,
                                "half_precision_weights": False}
    guidances: dict[str, Callable[..., Any]] = {
        "ours": GPSGuidance(GPSGuidanceConfig(**settings), device),
        "ours_512": GPSGuidance(GPSGuidanceConfig(**settings, resolution=512), device),
        "stock": threestudio.find("stable-diffusion-guidance")(
            settings | {"view_dependent_prompting": False}),
    }
    prompts = GPSPromptProcessor(
        GPSPromptProcessorConfig(pretrained_model_name_or_path=model), device)()
    c2w = c2w_from_bearing(torch.tensor([90.0]), torch.tensor([-15.0]), torch.tensor([3.0]))
    batch = camera_batch(c2w.to(device), torch.tensor([0.76], device=device), SIDE, SIDE)
    rgb = torch.rand(1, SIDE, SIDE, 3, device=device, requires_grad=True)

    def seconds(name: str) -> float:
        start = time.perf_counter()
        out = guidances[name](rgb, prompts, **batch, rgb_as_latents=False)
        out["loss_sds"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for name in guidances:
        seconds(name)  # once to warm up
    names = list(guidances)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        for name in names if turn % 2 else reversed(names):
            found[name].append(seconds(name))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
