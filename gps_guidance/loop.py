"""The loop of every training: optimiser, moving average, checkpoints, exact resuming.

Everything random in step n is drawn from (seed, n), so that a run which stops and resumes from a
checkpoint continues exactly.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from gps_guidance.recipe import Recipe

log = logging.getLogger(__name__)


class Run:
    """One stage: optimiser, learning-rate schedule, moving average, checkpoints.

    ``rate`` gives the learning rate of a parameter by its name, that of its module before it.
    """

    def __init__(self, name: str, modules: dict[str, Any], steps: int,
                 rate: Callable[[str], float], recipe: Recipe, out: Path, schedule: str,
                 warmup: int) -> None:
        self.name, self.modules, self.steps, self.out = name, modules, steps, out
        self.limit = recipe.checkpoints_total_limit
        self.every = recipe.checkpointing_steps
        for module in modules.values():
            module.requires_grad_(True).train()
        groups: dict[float, list[torch.nn.Parameter]] = {}
        for prefix, module in modules.items():
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(rate(f"{prefix}.{key}"), []).append(parameter)
        self.parameters = [p for group in groups.values() for p in group]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": lr} for lr, group in groups.items()],
            weight_decay=recipe.adam_weight_decay, fused=True,
        )
        self.schedule = get_scheduler(
            schedule, self.optimizer, num_warmup_steps=warmup, num_training_steps=steps
        )
        self.ema = EMAModel(self.parameters, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.rows: list[tuple[int, float]] = []
        self.step = 0
        self.max_grad_norm, self.seed = recipe.max_grad_norm, recipe.seed

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def resume(self) -> None:
        """Continue from the newest checkpoint of this stage, if there is one."""
        found = sorted(self.folder.glob(f"{self.name}-*.pt"))
        if not found:
            return
        state = torch.load(found[-1], weights_only=True, map_location="cpu")
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.parameters[0].device)
        self.step, self.rows = state["step"], state["rows"]
        log.info("resumed %s at step %d from %s", self.name, self.step, found[-1])

    def save(self) -> None:
        """Write a checkpoint under a temporary name, then rename it, then drop the oldest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "step": self.step,
            "rows": self.rows,
        }
        path = self.folder / f"{self.name}-{self.step:07d}.pt"
        stage = path.with_suffix(".tmp")
        try:
            with open(stage, "wb") as file:  # given a path, a full disk would be a RuntimeError
                torch.save(state, file)
            os.replace(stage, path)
        finally:
            stage.unlink(missing_ok=True)
        for old in sorted(self.folder.glob(f"{self.name}-*.pt"))[: -self.limit]:
            old.unlink()

    def loop(self, accelerator: Accelerator, losses_of_step: Callable[[int], Iterable[Tensor]],
             after_step: Callable[[], None] | None = None) -> None:
        """Optimise the sum of ``losses_of_step`` to the last step, then put the averaged weights in
        place. Each loss is differentiated before the next is computed."""
        self.resume()
        began, shown = time.monotonic(), None
        with tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step") as bar:
            try:
                while self.step < self.steps:
                    torch.manual_seed(step_seed(self.name, self.step, self.seed))
                    value = 0.0
                    for loss in losses_of_step(self.step):
                        value += float(loss.detach())
                        if not math.isfinite(value):
                            raise ValueError(f"The loss of {self.name} is {value} at step "
                                             f"{self.step}: lower its learning rate.")
                        accelerator.backward(loss)
                    torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
                    with held_back_interrupt():
                        self._update(value)
                    shown = value if shown is None else 0.98 * shown + 0.02 * value
                    bar.update()
                    bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
                    if self.step < self.steps and self.every and self.step % self.every == 0:
                        self.save()
                    if self.step < self.steps and after_step is not None:
                        after_step()
            except KeyboardInterrupt:
                self.save()
                log.info("stopped %s at step %d of %d, saved in %s", self.name, self.step,
                         self.steps, self.folder)
                raise
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        log.info("%s: %d steps in %.0f s", self.name, self.step, time.monotonic() - began)
        self._write_losses()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the place of the trained ones, for the length of the block."""
        ema = self.ema if self.step < self.steps else None  # after the last step they stay there
        if ema is not None:
            ema.store(self.parameters)
        try:
            if ema is not None:
                ema.copy_to(self.parameters)
            yield
        finally:  # Ctrl-C here would otherwise save averaged weights as the trained ones
            if ema is not None:
                ema.restore(self.parameters)

    def _update(self, loss: float) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.step += 1
        self.rows.append((self.step, loss))

    def _write_losses(self) -> None:
        with open(self.out / f"{self.name}_loss.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss"])
            writer.writerows((step, f"{loss:.6f}") for step, loss in self.rows)
        plot_losses(self.out)


@contextlib.contextmanager
def held_back_interrupt() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: a checkpoint never holds half an update."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
    if caught and callable(before):
        before(signal.SIGINT, None)


def plot_losses(out: Path) -> None:
    """Draw every ``*_loss.csv`` of a model folder, raw and averaged, as ``loss.png``."""
    files = sorted(out.glob("*_loss.csv"), reverse=True)
    figure = Figure(figsize=(5 * len(files), 3.2), layout="constrained")
    for axes, file in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        steps, losses = np.loadtxt(file, delimiter=",", skiprows=1, ndmin=2).T
        window = max(1, len(losses) // 50)
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps, losses, color="0.8", linewidth=0.5)
        axes.plot(steps[window - 1 :], mean)
        axes.set(title=file.stem.removesuffix("_loss"), xlabel="step", ylabel="loss",
                 ylim=(0, float(np.quantile(losses, 0.995)) * 1.1))
    figure.savefig(out / "loss.png", dpi=100)


def step_seed(name: str, step: int, seed: int) -> int:
    """torch's seed for one step of the stage ``name``."""
    return int(np.random.SeedSequence([seed, sum(name.encode()), step]).generate_state(1)[0])
