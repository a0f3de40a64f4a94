"""Models of Stable Diffusion v1.4's shapes with random weights: time and memory are the same.

860 M + 84 M + 123 M parameters, 2 GiB on the disk. Imports torch only where it is used, so that a
script can start the process that it measures before its own memory has grown.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import stages  # noqa: F401  (makes a checkout importable)

LANDMARK = "Leaning Tower of Pisa"


def build_unet(narrower: int = 1) -> Any:
    """An untrained UNet with v1.4's config, channels and heads ``narrower`` times fewer; on the
    present default device."""
    from diffusers import UNet2DConditionModel

    channels = tuple(width // narrower for width in (320, 640, 1280, 1280))
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768 // narrower,
                                attention_head_dim=8 // narrower,  # how many heads there are
                                block_out_channels=channels,
                                norm_num_groups=32 // narrower)


def build_vae(narrower: int = 1) -> Any:
    """An untrained VAE with v1.4's config, channels ``narrower`` times fewer."""
    from diffusers import AutoencoderKL

    channels = tuple(width // narrower for width in (128, 256, 512, 512))
    return AutoencoderKL(
        block_out_channels=channels, layers_per_block=2, latent_channels=4,
        norm_num_groups=32 // narrower,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
    )


def build_text_encoder(tokenizer: Any, narrower: int = 1) -> Any:
    """An untrained text encoder with v1.4's config, ``narrower`` times narrower, which stops at
    this tokenizer's tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768 // narrower, intermediate_size=3072 // narrower,
        num_hidden_layers=12,
        num_attention_heads=12, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))


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


def write_model(folder: Path, kind: str, narrower: int = 1) -> None:
    """Save a model with bfloat16 weights, of a ``kind`` as ``gps-guidance train`` names them.

    They are "angle", "gps" and "text", which is Stable Diffusion itself.
    """
    import torch
    from diffusers import DDPMScheduler

    from gps_guidance.encoders import AngleEncoder, GPSEncoder
    from gps_guidance.miniature.nets import tiny_tokenizer
    from gps_guidance.models import DiffusionModel

    tokenizer = tiny_tokenizer([f"A photo of {LANDMARK}"])
    tokenizer.model_max_length = 77
    width = 768 // narrower
    gps_encoder: Any = None
    if kind == "gps":
        gps_encoder = GPSEncoder(width)
    elif kind == "angle":
        gps_encoder = AngleEncoder(width, resolution=256, landmark=LANDMARK)
    with torch.device("meta"):
        modules = [build_unet(narrower), build_vae(narrower),
                   build_text_encoder(tokenizer, narrower)]
    for module in modules:
        module.to(torch.bfloat16).to_empty(device="cpu")
        fill(module)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False)
    unet, vae, text_encoder = modules
    DiffusionModel(unet, vae, text_encoder, tokenizer, scheduler, gps_encoder,
                   str(folder)).save_pretrained(folder)


def measure(script: str, kind: str, flags: list[str]) -> dict[str, float]:
    """What ``script FLAGS --model FOLDER`` prints of a model of that kind, in a fresh process.

    The model is written by yet another process: under Linux a process's peak memory counts from
    that of the process that started it, so that this one has to stay small.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            pool.submit(write_model, Path(folder), kind).result()
        child = [sys.executable, script, *flags, "--model", folder]
        done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values
