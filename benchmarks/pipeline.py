"""Seconds and memory of StableDiffusionGPSPipeline against what the same UNet costs without it.

    python benchmarks/pipeline.py [--threads 2] [--repetitions 9]

Contenders take turns in one process, in alternating order, and a ratio is the median over the turns
of the ratio within each, so that a machine that grows slower or faster does not matter. Ratios do
not depend on the values of the weights, which are random. The distances between images do: they
take a trained model of the miniature city, from the folder that GPS_MODEL names, a bundled one or
outputs/miniature-city/model; without one they are left out. Prints JSON lines {"name", "value",
"goal", "ok"}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from stages import ROOT, line

from gps_guidance import compose
from gps_guidance.encoders import GPSEncoder
from gps_guidance.lift import engine
from gps_guidance.miniature import city
from gps_guidance.miniature.nets import tiny_vae
from gps_guidance.models import BUNDLED, quiet_libraries
from gps_guidance.noise import area_noise
from gps_guidance.pipeline import StableDiffusionGPSPipeline

LATENT, TOKEN_DIM, TEXT_TOKENS = 32, 256, 77
HERE = (47.0, 16.0)
LOCATIONS, FEW, ROWS = 64, 8, 16  # of an area, of a step's sample, of a call of the UNet
SEEDS = (0, 1)


def make_unet(widths: tuple[int, ...] = (64, 128, 192, 256), attending: int = 3,
              latent: int = LATENT, in_channels: int = 4) -> Any:
    """An untrained UNet, 23 M parameters, so that all else is small beside it.

    Its lowest ``attending`` levels have cross-attention.
    """
    torch.manual_seed(0)
    plain = len(widths) - attending
    return UNet2DConditionModel(
        sample_size=latent, in_channels=in_channels, out_channels=4, block_out_channels=widths,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * attending,
        up_block_types=("CrossAttnUpBlock2D",) * attending + ("UpBlock2D",) * plain,
        layers_per_block=1, cross_attention_dim=TOKEN_DIM, attention_head_dim=8, norm_num_groups=8,
    ).eval()


def make_scheduler() -> Any:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         clip_sample=False, steps_offset=1, set_alpha_to_one=False)


def make_pipeline(kind: Any, unet: Any, *encoder: Any) -> Any:
    """A pipeline of that class without a text encoder: texts are given as tokens."""
    pipe = kind(tiny_vae(), None, None, unet, make_scheduler(), *encoder, None, None,
                requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gps_pipeline(unet: Any) -> Any:
    encoder = GPSEncoder(TOKEN_DIM, bounds=astuple(city.BOUNDS))
    return make_pipeline(StableDiffusionGPSPipeline, unet, encoder)


def texts(count: int) -> dict[str, Any]:
    """Prompt and negative prompt of ``count`` tokens each, and latents, of a call."""
    prompt, negative = torch.randn(2, 1, count, TOKEN_DIM, generator=torch.Generator()).unbind()
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "output_type": "latent"}


def take_turns(contenders: dict[str, Callable[[], Any]], repetitions: int
               ) -> Iterator[dict[str, float]]:
    """The contenders' seconds in each of so many turns, after one that warms up."""
    names = list(contenders)
    for turn in range(-1, repetitions):
        seconds = {}
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            contenders[name]()
            seconds[name] = time.perf_counter() - start
        if turn >= 0:
            yield seconds


def ratio(turns: list[dict[str, float]], a: str, b: str) -> float:
    spread = sorted(turn[a] / turn[b] for turn in turns)
    print(f"{a} / {b}: {spread[0]:.3f} to {spread[-1]:.3f} in {len(spread)} turns, "
          f"{median(turn[a] for turn in turns):.2f} s / {median(turn[b] for turn in turns):.2f} s",
          file=sys.stderr)
    return median(spread)


def rows_of(unet: Any, run: Callable[[], Any]) -> list[int]:
    """How many rows went through the UNet in each of its calls."""
    found: list[int] = []
    handle = unet.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    run()
    handle.remove()
    return found


def against_pix2pix(repetitions: int) -> bool:
    """Three predictions a step here and in diffusers' own pipeline of three branches."""
    steps = 8
    ours = gps_pipeline(make_unet())
    theirs = make_pipeline(StableDiffusionInstructPix2PixPipeline, make_unet(in_channels=8))
    # The image comes as latents, so that theirs encodes none; its text has as many tokens as ours
    # has with those of the place.
    image = torch.randn(1, 4, LATENT, LATENT)
    place = ours.gps_encoder.num_tokens
    contenders: dict[str, Callable[[], Any]] = {
        "gps": lambda: ours(gps=HERE, guidance_scale=3.5, gps_guidance_scale=7.5,
                            num_inference_steps=steps, **texts(TEXT_TOKENS)),
        "instruct_pix2pix": lambda: theirs(
            image=image, guidance_scale=7.5, image_guidance_scale=1.5, num_inference_steps=steps,
            **texts(TEXT_TOKENS + place)),
    }
    for pipe, run in zip((ours, theirs), contenders.values(), strict=True):
        assert rows_of(pipe.unet, run) == [3] * steps
    turns = list(take_turns(contenders, 3 * repetitions))  # they are short
    return line("pipeline.step_vs_instruct_pix2pix", ratio(turns, "gps", "instruct_pix2pix"), 1.02,
                below=True)


@torch.no_grad()
def bare_loop(unet: Any, rows: int, chunk: int, steps: int) -> None:
    """The UNet on ``rows`` rows a step, ``chunk`` a call, and the scheduler's steps: no more."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, LATENT, LATENT)
    tokens = torch.randn(rows, TEXT_TOKENS + GPSEncoder.num_tokens, TOKEN_DIM)
    for t in scheduler.timesteps:
        for part in tokens.split(chunk):
            noise = unet(latents.expand(len(part), -1, -1, -1), t, part, return_dict=False)[0]
        latents = scheduler.step(noise[:1], t, latents, return_dict=False)[0]


def areas(repetitions: int) -> bool:
    """Eq. 8 against the UNet alone, against a call for each location, and against its sample."""
    steps, rows = 3, LOCATIONS + 2
    pipe = gps_pipeline(make_unet())

    def area(locations_per_step: int | None = None) -> None:
        pipe(area=city.ring("park"), num_locations=LOCATIONS, location_batch_size=ROWS,
             locations_per_step=locations_per_step, num_inference_steps=steps, **texts(TEXT_TOKENS))

    contenders: dict[str, Callable[[], Any]] = {
        "area": area,
        "batched_unet": lambda: bare_loop(pipe.unet, rows, ROWS, steps),
        "loop": lambda: bare_loop(pipe.unet, rows, 1, steps),
        "area_of_8_per_step": lambda: area(FEW),
    }
    assert (rows_of(pipe.unet, area) == rows_of(pipe.unet, contenders["batched_unet"])
            == [ROWS, ROWS, ROWS, ROWS, 2] * steps)
    assert rows_of(pipe.unet, contenders["loop"]) == [1] * rows * steps
    assert rows_of(pipe.unet, contenders["area_of_8_per_step"]) == [FEW + 2] * steps
    turns = list(take_turns(contenders, repetitions))
    good = [
        line("pipeline.area_vs_batched_unet", ratio(turns, "area", "batched_unet"), 1.02,
             below=True),
        line("pipeline.area_vs_loop", ratio(turns, "area", "loop"), 0.8, below=True),
        line("pipeline.locations_per_step_8_speedup", ratio(turns, "area", "area_of_8_per_step"),
             5),
    ]
    return all(good)


# --- memory -----------------------------------------------------------------------------------

# A narrow UNet on large latents, so that predictions that are kept, 0.6 MB each, weigh against the
# process; more rows a call of the UNet would weigh more. 16 locations are several full calls, as
# 256 are: the predictions of the first and of the last call live while the next one runs.
MEMORY_UNET = ((8, 8, 8, 16), 1, 192)  # widths, attending, latent
MEMORY_LOCATIONS, MEMORY_ROWS = (16, 256), 4


def peak_of_area(locations: int, keep: bool) -> int:
    """Bytes at the peak of this process, after one step of Eq. 8; ``keep`` all predictions."""
    if keep:
        compose.area_noise = lambda predictions: area_noise(list(predictions))
    unet = make_unet(*MEMORY_UNET)
    gps_pipeline(unet)(area=city.ring("park"), num_locations=locations, num_inference_steps=1,
                       location_batch_size=MEMORY_ROWS, **texts(TEXT_TOKENS))
    return engine.peak_memory_bytes(torch.device("cpu"))


def memory(threads: int) -> bool:
    """Peaks of whole processes, one for each number of locations."""
    def peak(locations: int, *flags: str) -> int:
        child = [sys.executable, __file__, "--threads", str(threads), "--memory", str(locations),
                 *flags]
        # glibc: large blocks go back at once, else 5 % are what its free lists happen to keep
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True,
                              env=environment)
        return int(done.stdout)

    few, many = (peak(count) for count in MEMORY_LOCATIONS)
    kept = peak(MEMORY_LOCATIONS[1], "--keep")
    print(f"peaks: {few / 1e6:.0f} MB, {many / 1e6:.0f} MB, {kept / 1e6:.0f} MB if all predictions "
          "were kept", file=sys.stderr)
    good = [
        line("pipeline.area_memory_256_vs_16", many / few, 1.05, below=True),
        # what the line above would say of memory that grows with M: the benchmark sees it
        line("pipeline.area_memory_if_kept", kept / few, 1.15),
    ]
    return all(good)


# --- distances --------------------------------------------------------------------------------


def city_model() -> Path | None:
    """The folder of a trained GPS model of the miniature city, or None."""
    if os.environ.get("GPS_MODEL"):
        return Path(os.environ["GPS_MODEL"])
    for folder in [*sorted(BUNDLED.iterdir()), ROOT / "outputs" / "miniature-city" / "model"]:
        config = folder / "gps_encoder" / "config.json"
        if config.is_file() and json.loads(config.read_text())["_class_name"] == "GPSEncoder":
            return folder
    return None


def distances() -> None:
    """What a sample of 8 locations a step changes in an image, next to what the seed changes."""
    folder = city_model()
    if folder is None:
        print("no distances: there is no model of the miniature city (GPS_MODEL names its folder)",
              file=sys.stderr)
        return
    print(f"distances: {folder}", file=sys.stderr)
    pipe = StableDiffusionGPSPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def image(place: str, seed: int, locations_per_step: int | None = None) -> Any:
        return pipe("a view in the sun", area=city.ring(place), num_locations=LOCATIONS,
                    locations_per_step=locations_per_step, output_type="pt",
                    generator=torch.Generator().manual_seed(seed)).images

    def rms(a: Any, b: Any) -> float:
        return float((a - b).square().mean().sqrt())

    sampled, other = [], []
    for place in ("park", "old-town", "downtown"):
        exact = {seed: image(place, seed) for seed in SEEDS}
        sampled += [rms(image(place, seed, FEW), exact[seed]) for seed in SEEDS]
        other += [rms(exact[a], exact[b]) for a, b in itertools.combinations(SEEDS, 2)]
    line("pipeline.sampled_distance", sum(sampled) / len(sampled))
    line("pipeline.seed_distance", sum(other) / len(other))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)  # the measured child process
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory is not None:
        print(peak_of_area(args.memory, args.keep))
        return 0
    quiet_libraries()
    # Memory first: a process's peak counts from that of the one that started it (Linux).
    good = [memory(args.threads), against_pix2pix(args.repetitions), areas(args.repetitions)]
    distances()
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
