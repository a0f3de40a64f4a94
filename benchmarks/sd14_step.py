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
import math
import subprocess
import sys
import tempfile
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

    gps_encoder = AngleEncoder(768, resolution=256, landmark="Leaning Tower of Pisa")
    tokenizer = tiny_tokenizer([gps_encoder.prompt])
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
    DiffusionModel(unet, vae, text_encoder, tokenizer, scheduler, gps_encoder,
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
    """Train the YAML for one step with this model, without the turntable and the report."""
    import torch

    from gps_guidance.lift import engine
    from gps_guidance.lift.config import load_config
    from gps_guidance.lift.plan import build_system, make_plan

    engine.quiet_libraries()
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
