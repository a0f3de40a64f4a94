"""Score distillation here against threestudio's: the guidance alone, and the whole step.

    THREESTUDIO_PATH=FOLDER python benchmarks/sds.py

FOLDER is an untouched clone of threestudio (commit 28d9d80) with the packages of
`pip install "gps-guidance[threestudio]"`; without it one is cloned under outputs/. The model is
Stable Diffusion v1.4 with fewer channels and heads and random weights: half of them for the
guidance, where the shares of UNet and VAE, which are nearer to v1.4's the more channels there are,
decide; a quarter for whole steps. An angle model of it works at 256 pixels. Both use it in 32 bits,
at batch 1, on renders of 64 pixels, and take turns, so that a machine that grows slower or faster
does not matter.

- The guidance alone, in one process: threestudio's stock guidance always works at 512 pixels and
  always decodes. No stand-in is involved.
- The whole step, each engine by its own launch.py on sds.yaml, whose field needs no stand-in. On a
  CPU, or where nerfacc is not compiled, threestudio's renderer has stand-ins for nerfacc's sums.
  Seconds are those between checkpoints, so that starting up does not count.
- Where the portable engine's step spends its time. Backward passes are counted with their parts:
  that of the VAE's encoder with the encoder, all before it with rendering.

Prints JSON lines {"name", "value", "goal", "ok"}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from sd14 import write_model
from stages import ROOT, line

COMMIT = "28d9d80"
REPOSITORY = "https://github.com/threestudio-project/threestudio"
CONFIG = Path(__file__).with_name("sds.yaml")
HOST = Path(__file__).with_name("sds_host.py")
GUIDANCE_TURNS, STEP_TURNS = 5, 2
HALF, QUARTER = 2, 4  # of Stable Diffusion's channels
OURS = ["system.guidance_type=gps-sds-guidance",
        "system.prompt_processor_type=gps-prompt-processor",
        "system.prompt_processor.prompt=null"]


def clone() -> Path:
    """The folder of threestudio."""
    given = os.environ.get("THREESTUDIO_PATH")
    folder = Path(given) if given else ROOT / "outputs" / "threestudio"
    if not given and not folder.is_dir():
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, str(folder)], check=True)
        subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", COMMIT], check=True)
    if not (folder / "launch.py").is_file():
        raise SystemExit(f"{folder} is no clone of threestudio: set THREESTUDIO_PATH.")
    return folder.resolve()


def guidance_ratios(threestudio: Path, model: Path) -> dict[str, float]:
    """Stock seconds over ours, at the model's own size and at 512: medians over turns."""
    done = subprocess.run([sys.executable, str(HOST), str(model), str(GUIDANCE_TURNS)],
                          cwd=threestudio, stdout=subprocess.PIPE, text=True, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    return {name: median(stock / own for stock, own in zip(seconds["stock"], seconds[name],
                                                           strict=True))
            for name in ("ours", "ours_512")} | {"ours_s": median(seconds["ours"]),
                                                 "stock_s": median(seconds["stock"])}


def step_seconds(model: Path, threestudio: Path | None, overrides: list[str]) -> float:
    """Median seconds of a step of an engine's own launch.py, between its checkpoints."""
    engine = ["portable"] if threestudio is None else ["threestudio", "--threestudio",
                                                       str(threestudio)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "launch.py", "--config", str(CONFIG), "--train", "--engine", *engine,
             f"exp_root_dir={folder}", *overrides,
             f"system.guidance.pretrained_model_name_or_path={model}"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        saved = {int(path.stem.partition("step=")[2]): path.stat().st_mtime_ns
                 for path in Path(folder).rglob("*step=*.ckpt")}
    if done.returncode or len(saved) < 4:
        raise SystemExit(f"launch.py --engine {engine[0]} failed:\n{done.stdout[-4000:]}")
    steps = sorted(saved)
    return median((saved[b] - saved[a]) / 1e9 / (b - a)
                  for a, b in zip(steps[1:], steps[2:], strict=False))  # without the first ones


# --- where our step spends its time --------------------------------------------------------------


class Clock:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Count the calls of a method of an object."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)


def shares(model: Path, steps: int = 60) -> dict[str, float]:
    """Parts of the portable engine's steps, as shares of their whole."""
    import torch

    from gps_guidance.lift.config import load_config
    from gps_guidance.lift.plan import build_system, make_plan
    from gps_guidance.lift.system import build_optimizer

    plan = make_plan(load_config(str(CONFIG), [
        *OURS, f"system.guidance.pretrained_model_name_or_path={model}"]))
    system = build_system(plan)
    system.on_fit_start()
    system.renderer.wants_normals = True
    data, cfg = plan.parts["data"]
    cameras = data(cfg)
    optimizer = build_optimizer(system.cfg.optimizer, system)
    clock = Clock()
    guidance = system.guidance
    clock.wrap(guidance, "predict_noise", "unet_forward")
    for step in range(-5, steps):
        if step == 0:
            clock.seconds.clear()
            began = time.perf_counter()
        system.update_parts(0, max(step, 0))
        batch = cameras.sample(0, max(step, 0))
        with clock.part("rendering"):
            out = system(batch)
        image = out["comp_rgb"]
        leaf = image.detach().requires_grad_()
        with clock.part("vae_encoder"):  # and what is around it: noise, Eq. 7 and 10
            before = clock.seconds["unet_forward"]
            terms, _ = system.guidance_terms(out | {"comp_rgb": leaf}, batch)
            (terms["sds"] * system.weight("lambda_sds")).backward()
        clock.seconds["vae_encoder"] -= clock.seconds["unet_forward"] - before
        terms = system.regularisers(out)
        loss = sum(value * system.weight(f"lambda_{name}") for name, value in terms.items())
        with clock.part("rendering"):
            torch.autograd.backward([image, loss], [leaf.grad, None])
        optimizer.step()
        optimizer.zero_grad()
    whole = time.perf_counter() - began
    parts = {name: seconds / whole for name, seconds in clock.seconds.items()}
    return parts | {"other": 1 - sum(parts.values())}


def main() -> int:
    threestudio = clone()
    with tempfile.TemporaryDirectory() as folder:
        half, model = Path(folder) / "half", Path(folder) / "quarter"
        write_model(half, "angle", HALF)
        write_model(model, "angle", QUARTER)
        ratios = guidance_ratios(threestudio, half)
        met = [line("sds.guidance_speedup", ratios["ours"], 4.0),
               line("sds.guidance_speedup_at_512", ratios["ours_512"], 1.5)]
        line("sds.guidance_seconds", ratios["ours_s"])
        line("sds.stock_guidance_seconds", ratios["stock_s"])
        found: dict[str, list[float]] = {"portable": [], "stock": [], "ours_in_threestudio": []}
        for _ in range(STEP_TURNS):
            found["stock"].append(step_seconds(model, threestudio, []))
            found["portable"].append(step_seconds(model, None, OURS))
            found["ours_in_threestudio"].append(step_seconds(model, threestudio, OURS))
        for name in ("stock", "ours_in_threestudio"):
            ratio = median(theirs / own for theirs, own in zip(found[name], found["portable"],
                                                               strict=True))
            if name == "stock":
                met.append(line("sds.step_speedup", ratio, 3.0))
            else:
                line("sds.step_speedup_same_guidance", ratio)
        for name, seconds in found.items():
            line(f"sds.step_seconds_{name}", median(seconds))
        parts = shares(model)
        for name in ("unet_forward", "rendering", "vae_encoder"):
            line(f"sds.share_{name}", parts[name])
        met.append(line("sds.share_other", parts["other"], 0.15, below=True))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
