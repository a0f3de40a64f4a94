"""One step of GPS-guided distillation at full size: Stable Diffusion v1.4's shapes, 256 px, CPU.

    python benchmarks/sd14_step.py [--half] [--batch-size 1]

The weights are random (860 M + 84 M + 123 M parameters, about 2 GiB in a temporary folder): time
and memory do not depend on their values. Prints JSON lines {"name", "value", "goal", "ok"}.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

GOAL_SECONDS = 60.0
GOAL_GIB = 8.0


def write_model(folder: Path) -> None:
    """Save an angle model of Stable Diffusion v1.4's shapes and random bfloat16 weights."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from gps_guidance.encoders import AngleEncoder
    from gps_guidance.miniature.nets import tiny_tokenizer
    from gps_guidance.models import DiffusionModel

    angle_encoder = AngleEncoder(768, resolution=256, landmark="Leaning Tower of Pisa")
    tokenizer = tiny_tokenizer([angle_encoder.prompt])
    tokenizer.model_max_length = 77
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ))
    modules: list[Any] = [unet, vae, text_encoder]
    for module in modules:
        module.to(torch.bfloat16).to_empty(device="cpu")
        fill(module)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False)
    DiffusionModel(unet, vae, text_encoder, tokenizer, scheduler, angle_encoder,
                   str(folder)).save_pretrained(folder)


def fill(module: Any) -> None:
    """Weights of deviation 1 / sqrt(fan-in) from one repeated block of numbers; unit norms."""
    import torch

    block = torch.randn(1_000_003)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            repeats = math.ceil(p.numel() / block.numel())
            p.copy_(block.repeat(repeats)[: p.numel()].view_as(p) / math.sqrt(p[0].numel()))


def run_step(folder: Path, half: bool, batch_size: int) -> dict[str, float]:
    """Load the guidance, do one step on a 64 px render, and measure it."""
    import torch

    from gps_guidance.lift.guidance import GPSGuidance, GPSGuidanceConfig
    from gps_guidance.lift.prompts import GPSPromptProcessor, GPSPromptProcessorConfig

    prompt = GPSPromptProcessor(GPSPromptProcessorConfig(
        pretrained_model_name_or_path=str(folder)))()
    guidance = GPSGuidance(GPSGuidanceConfig(str(folder), guidance_scale=3.0,
                                             half_precision_weights=half))
    c2w = torch.eye(4).repeat(batch_size, 1, 1)
    c2w[:, 0, 3] = 2.5
    zeros = torch.zeros(batch_size)
    rgb = torch.rand(batch_size, 64, 64, 3, requires_grad=True)
    start = time.perf_counter()
    out = guidance(rgb, prompt, c2w=c2w, elevation=zeros, azimuth=zeros, camera_distances=zeros)
    out["loss_sds"].backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert rgb.grad is not None
    return {
        "seconds": seconds,
        "peak_rss_gib": peak / 2**20 / (1024 if sys.platform == "darwin" else 1),
        "finite_gradient": float(torch.isfinite(rgb.grad).all() and bool(rgb.grad.any())),
        "nan_grads": out["nan_grads"],
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
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        # a process of its own: building the weights must not count as the step's memory
        child = [sys.executable, __file__, *sys.argv[1:], "--model", folder]
        done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
    values = json.loads(done.stdout.splitlines()[-1])
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
