"""The pipeline at Stable Diffusion v1.4's size: its UNet stays as it is, and a step runs here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from gps_guidance.encoders import GPSEncoder
from gps_guidance.pipeline import StableDiffusionGPSPipeline

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_the_unet_is_stable_diffusions(monkeypatch):
    """So that its checkpoints load, and adapters made for them fit."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sd14 import build_unet, build_vae

    with torch.device("meta"):
        unet, vae = build_unet(), build_vae()
        encoder = GPSEncoder(768)
    before, processors = shapes(unet), {k: type(v) for k, v in unet.attn_processors.items()}
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = StableDiffusionGPSPipeline(vae, None, None, unet, scheduler, encoder, None, None,
                                      requires_safety_checker=False)
    assert pipe.vae_scale_factor == 8 and pipe.default_size == (512, 512)

    tokens = torch.empty(3, 77 + encoder.num_tokens, 768, device="meta")
    noise = pipe.unet(torch.empty(3, 4, 64, 64, device="meta"), 500, tokens).sample
    assert noise.shape == (3, 4, 64, 64)

    assert shapes(pipe.unet) == before
    assert {k: type(v) for k, v in pipe.unet.attn_processors.items()} == processors
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964  # the published model's
    assert len(before) == 686
    keys = {shape for name, shape in before.items() if name.endswith("attn2.to_k.weight")}
    assert keys == {(width, 768) for width in (320, 640, 1280)}
    parts = {k: v for k, v in pipe.components.items() if k != "gps_encoder"}
    theirs = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    assert theirs.unet is unet and shapes(theirs.unet) == before


@pytest.mark.slow
def test_one_step_at_512_pixels(record_property):
    """The three predictions of Eq. 4 on the CPU; needs 3 GB on the disk and in memory."""
    script = BENCHMARKS / "sd14_pipeline_step.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          check=False, cwd=script.parents[1])
    lines = {line["name"].split(".")[1]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(lines) == {"seconds", "peak_memory_gb", "finite"}, done.stderr
    for name, line in lines.items():
        record_property(name, line["value"])
    assert lines["finite"]["ok"] and lines["peak_memory_gb"]["ok"], lines
