"""The loop of every training: optimiser, moving average, checkpoints, exact resuming.

Everything random in step n is drawn from (seed, n) for the images of all processes together, so
that a run which stops and resumes from a checkpoint continues exactly, and a step does not depend
on how its images are split over processes and accumulated batches.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, patch_environment
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from gps_guidance.checkpoints import (
    Checkpoint,
    clear_parts,
    find_checkpoints,
    foreign_checkpoint,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from gps_guidance.interrupts import Interrupts
from gps_guidance.recipe import Recipe
from gps_guidance.sharding import asked_for, gather, part_like, prepare_sharding, whole
from gps_guidance.zero import Zero

log = logging.getLogger(__name__)


def start_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """The accelerator of a training; ValueError for a precision or a way to spread the work over
    processes that cannot be had here. Its trackers write below ``out``."""
    if recipe.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("The recipe's mixed_precision is 'fp16', whose gradients are scaled on "
                         "CUDA alone, and there is none here: set it to bf16 or no.")
    known = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if recipe.report_to not in ("none", *known):  # accelerate would go on without
        raise ValueError(f"The recipe's report_to is {recipe.report_to!r}, which is not installed: "
                         f"run `pip install {recipe.report_to}`, or set it to none.")
    prepare_sharding(recipe)
    AcceleratorState._reset_state()  # of another training in this process, in another precision
    world = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate say it
    # with DeepSpeed too, precision and accumulation are the recipe's, and the engine is the loop's
    with patch_environment(accelerate_use_deepspeed="false",
                           accelerate_gradient_accumulation_steps="1"):
        accelerator = Accelerator(
            # else, without CUDA, accelerate takes torchrun's processes for so many lone ones
            cpu=world > 1 and not torch.cuda.is_available(),
            mixed_precision=recipe.mixed_precision, project_dir=out / recipe.logging_dir,
            log_with=None if recipe.report_to == "none" else recipe.report_to,
        )
    if accelerator.num_processes != world:
        raise ValueError(f"WORLD_SIZE is {world}, but accelerate found {accelerator.num_processes} "
                         "process(es): start them with torchrun or `accelerate launch`.")
    known_types = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU,
                   DistributedType.FSDP)
    if accelerator.distributed_type not in known_types:
        raise ValueError(f"accelerate is configured for {accelerator.distributed_type.value}, "
                         "which this loop does not know: use MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED "
                         "or NO.")
    if not accelerator.is_main_process:
        logging.getLogger("gps_guidance").setLevel(logging.WARNING)
    return accelerator


@dataclass
class Batch:
    """What a step is made of: the ``parts`` of this process, one backward pass each, the number of
    ``images`` in all processes together, and ``counts`` of what was drawn for them."""

    parts: list[Any]
    images: int
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Course:
    """How a stage went: ``steps`` and how many of them were ``skipped``, ``counts`` of what was
    drawn, the ``seconds`` of its loop, checkpoints and pictures included, and the ``images`` seen
    in them. All resumed parts count, but what a killed process did since its last checkpoint.
    ``psnr_db`` is that of a VAE's reconstructions."""

    stage: str
    steps: int
    skipped: int
    counts: dict[str, int]
    seconds: float
    images: int
    psnr_db: float | None = None


class Objective(torch.nn.Module):
    """A loss as the forward pass of the modules that it trains: what DDP can wrap.

    Of modules that are ``sharded`` instead, it has DDP's ``no_sync`` itself.
    """

    def __init__(self, modules: dict[str, Any], loss: Callable[[Any], Tensor],
                 sharded: Sequence[Any] = ()) -> None:
        super().__init__()
        self.trained, self.loss = torch.nn.ModuleDict(modules), loss
        self.sharded = tuple(sharded)

    def forward(self, part: Any) -> Tensor:
        return self.loss(part)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the block add up in each process, and nothing is sent."""
        for module in self.sharded:
            module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for module in self.sharded:
                module.set_requires_gradient_sync(True)


class Run:
    """One stage: optimiser, learning-rate schedule, moving average, checkpoints.

    ``rate`` gives the learning rate of a parameter by its name, that of its module before it;
    ``sharded`` are the modules of which this process has parts (:mod:`gps_guidance.sharding`).
    """

    def __init__(self, name: str, modules: dict[str, Any], steps: int,
                 rate: Callable[[str], float], recipe: Recipe, out: Path, schedule: str,
                 warmup: int, sharded: Sequence[Any] = ()) -> None:
        self.sharded = sharded
        self.zero: Zero | None = None
        self.name, self.modules, self.steps, self.out = name, modules, steps, out
        self.recipe = recipe
        for module in modules.values():
            module.requires_grad_(True).train()
        groups: dict[float, dict[str, torch.nn.Parameter]] = {}
        for prefix, module in modules.items():
            for key, parameter in module.named_parameters():
                groups.setdefault(rate(f"{prefix}.{key}"), {})[f"{prefix}.{key}"] = parameter
        named = {name: p for group in groups.values() for name, p in group.items()}
        self.names, self.parameters = list(named), list(named.values())
        self.optimizer = _adamw(
            [{"params": list(group.values()), "lr": lr} for lr, group in groups.items()], recipe)
        self.schedule = get_scheduler(
            schedule, self.optimizer, num_warmup_steps=warmup, num_training_steps=steps
        )
        self.ema = EMAModel(self.parameters, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.step = 0
        self.losses: list[float | None] = []  # None: the step was skipped
        self.counts: Counter[str] = Counter()
        self.seconds, self.images = 0.0, 0
        self.interrupts = Interrupts()

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    @property
    def skipped(self) -> int:
        """How many steps changed nothing because their loss or gradient was not finite."""
        return self.losses.count(None)

    @property
    def skipped_in_a_row(self) -> int:
        """How many of them are the last ones."""
        return next((k for k, loss in enumerate(reversed(self.losses)) if loss is not None),
                    len(self.losses))

    @property
    def course(self) -> Course:
        return Course(self.name, self.step, self.skipped, dict(self.counts), self.seconds,
                      self.images)

    def resume(self, scaler: Any = None) -> None:
        """Continue from the newest checkpoint of this stage, if there is one; ValueError if it
        cannot be read or is not of this training."""
        found = find_checkpoints(self.folder, self.name)
        if not found:
            return
        saved = load_checkpoint(found[-1])
        here = self._checkpoint(scaler)
        state = saved.state
        for key in ("stage", "seed", "optimizer"):
            if state[key] != here.state[key]:
                raise foreign_checkpoint(found[-1], f"its {key} is {state[key]!r}, not "
                                         f"{here.state[key]!r}")
        if (saved.ema is None) != (here.ema is None):
            raise foreign_checkpoint(found[-1], "only one of the two has a moving average")
        for tensors, own in ((saved.model, here.model), (saved.ema or {}, here.ema or {})):
            odd = {key for key in tensors.keys() | own.keys() if key not in tensors
                   or key not in own or tensors[key].shape != own[key].shape}
            if odd:
                raise foreign_checkpoint(found[-1], f"its network is another, for example in "
                                         f"{min(odd)}")
        self._restore(saved, scaler)
        log.info("resumed %s at step %d from %s", self.name, self.step, found[-1])

    def _restore(self, saved: Checkpoint, scaler: Any) -> None:
        for name, module in self.modules.items():
            module.load_state_dict({key: part_like(saved.model[f"{name}.{key}"], own)
                                    for key, own in module.state_dict().items()})
        moments: dict[int, dict[str, Any]] = {}
        index = {name: k for k, name in enumerate(self.names)}
        for key, value in saved.optimizer.items():
            kind, _, name = key.partition(".")
            k = index[name]
            count = value.ndim == 0 and not value.is_floating_point()  # bitsandbytes' step
            moments.setdefault(k, {})[kind] = (int(value) if count else
                                               part_like(value, self.parameters[k]))
        state = saved.state
        groups = self.optimizer.state_dict()["param_groups"]
        for group, lr in zip(groups, state["schedule"]["_last_lr"], strict=True):
            group["lr"] = lr
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.schedule.load_state_dict(dict(state["schedule"]))
        if self.ema is not None and saved.ema is not None:
            for name, shadow in zip(self.names, self.ema.shadow_params, strict=True):
                shadow.copy_(part_like(saved.ema[name], shadow))
            self.ema.optimization_step = state["ema_step"]
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        self.step, self.losses = state["step"], state["losses"]
        self.counts = Counter(state["counts"])
        # those of before had neither: what is measured from here on is then all that is known
        self.seconds, self.images = state.get("seconds", 0.0), state.get("images", 0)

    def _moments(self) -> dict[str, Tensor]:
        return {f"{kind}.{self.names[k]}": torch.as_tensor(value)
                for k, state in self.optimizer.state_dict()["state"].items()
                for kind, value in state.items()}

    def _checkpoint(self, scaler: Any) -> Checkpoint:
        return Checkpoint(
            model={f"{name}.{key}": value for name, module in self.modules.items()
                   for key, value in module.state_dict().items()},
            optimizer=self._moments() if self.zero is None else self.zero.moments(),
            ema=dict(zip(self.names, self.ema.shadow_params, strict=True)) if self.ema else None,
            state={
                "stage": self.name, "step": self.step, "seed": self.recipe.seed,
                "optimizer": type(self.optimizer).__name__,
                "schedule": self.schedule.state_dict(),
                "ema_step": self.ema.optimization_step if self.ema else None,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "counts": dict(self.counts), "losses": self.losses,
                "seconds": self.seconds, "images": self.images,
            },
        )

    def save(self, accelerator: Accelerator) -> None:
        """Write a checkpoint, then drop the oldest: the main process alone, the others wait."""
        path = self.folder / f"{self.name}-{self.step:07d}"
        main = accelerator.is_main_process
        if not path.is_dir():
            own = self._checkpoint(accelerator.scaler)
            found = Checkpoint(gather(own.model, main), gather(own.optimizer, main),
                               None if own.ema is None else gather(own.ema, main), own.state)
            if main:
                save_checkpoint(found, path)
                limit = self.recipe.checkpoints_total_limit
                for old in find_checkpoints(self.folder, self.name)[:-limit]:
                    remove_checkpoint(old)
        accelerator.wait_for_everyone()

    def loop(self, accelerator: Accelerator, draw: Callable[[int], Batch],
             loss: Callable[[Any], Tensor], after_step: Callable[[], None] | None = None) -> None:
        """Optimise the mean ``loss`` of the parts that ``draw`` gives for each step, to the last
        step, then put the averaged weights in place.

        A step whose loss or gradient is not finite is skipped: weights, optimiser and average stay
        as they are, the step counts, and the learning rate's schedule goes on. ValueError after
        ``max_skipped_steps`` in a row. ``after_step`` is called in all processes.
        """
        main = accelerator.is_main_process
        if main:
            clear_parts(self.folder)
        self.resume(accelerator.scaler)
        objective: Any = Objective(self.modules, loss, self.sharded)
        if accelerator.num_processes > 1 and asked_for("DEEPSPEED"):
            named = dict(zip(self.names, self.parameters, strict=True))
            self.zero = objective = Zero(objective, self.optimizer, named,
                                         self.recipe.max_grad_norm)
        elif accelerator.num_processes > 1 and not self.sharded:
            objective = accelerator.prepare(objective)
        began, first, shown = time.monotonic(), self.step, math.nan
        before = self.seconds
        bar = tqdm(total=self.steps, initial=first, desc=self.name, unit="step", disable=not main)
        with self._trackers(accelerator), self.interrupts, bar:
            # processes stop after the same step, as they agree in _optimise
            together = accelerator.num_processes > 1
            hold = self.interrupts.held() if together else contextlib.nullcontext()
            try:
                with hold:
                    while self.step < self.steps:
                        batch = draw_step(draw, self.name, self.step, self.recipe.seed)
                        values = self._optimise(accelerator, objective, batch)
                        self.seconds = before + time.monotonic() - began
                        values["images_per_second"] = (
                            batch.images * (self.step - first) / (time.monotonic() - began))
                        accelerator.log(values, step=self.step)
                        value = values["train_loss"]
                        if math.isfinite(value):
                            shown = value if math.isnan(shown) else 0.98 * shown + 0.02 * value
                        bar.set_postfix({
                            "loss": f"{shown:.4f}",
                            "images/s": f"{values['images_per_second']:.1f}"}, refresh=False)
                        bar.update()
                        every = self.recipe.checkpointing_steps
                        if self.step < self.steps and every and self.step % every == 0:
                            self.save(accelerator)
                        if self.step < self.steps and after_step is not None:
                            after_step()
                            accelerator.wait_for_everyone()
            except KeyboardInterrupt:
                self.save(accelerator)
                log.info("stopped %s at step %d of %d, saved in %s", self.name, self.step,
                         self.steps, self.folder)
                raise
        self.seconds = before + time.monotonic() - began
        if self.zero is not None:
            self.zero.release()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        log.log(logging.WARNING if self.skipped_in_a_row else logging.INFO,
                "%s: %d steps in %.0f s, %d skipped", self.name, self.step,
                self.seconds, self.skipped)
        if main:
            self._write_losses()

    def _optimise(self, accelerator: Accelerator, objective: Any, batch: Batch
                  ) -> dict[str, float]:
        """One step; returns what is to be logged of it."""
        value = 0.0
        for k, part in enumerate(batch.parts):
            last = k + 1 == len(batch.parts)
            with contextlib.nullcontext() if last else objective.no_sync():
                loss = objective(part) / len(batch.parts)
                value += float(loss.detach())
                accelerator.backward(loss)
        stop = False
        if accelerator.num_processes > 1:
            told = torch.tensor([value, float(self.interrupts.pending)], device=accelerator.device)
            means: Any = accelerator.reduce(told, "mean")
            value, stop = float(means[0]), bool(means[1] > 0)
        scaler = accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.zero is not None:
            norm = self.zero.step(value)  # or not, if it is not finite
        else:
            norm = float(whole(torch.nn.utils.clip_grad_norm_(self.parameters,
                                                              self.recipe.max_grad_norm)))
        lr = float(self.schedule.get_last_lr()[0])
        finite = math.isfinite(value) and math.isfinite(norm)
        with self.interrupts.held():
            if finite:
                if self.zero is None:
                    (self.optimizer.step() if scaler is None else scaler.step(self.optimizer))
                if self.ema is not None:
                    self.ema.step(self.parameters)
            if scaler is not None:
                scaler.update()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.losses.append(value if finite else None)
            self.counts.update(batch.counts)
            self.images += batch.images
        if not finite:
            self._report_skipped(value, norm, lr)
        if stop:
            self.interrupts.stop()
        return {"train_loss": value, "lr": lr, "grad_norm": norm, "skipped_steps": self.skipped}

    def _report_skipped(self, value: float, norm: float, lr: float) -> None:
        row, limit = self.skipped_in_a_row, self.recipe.max_skipped_steps
        log.warning("skipped step %d of %s: loss %s, gradient norm %s", self.step, self.name,
                    value, norm)
        if row < min(limit, self.steps):
            return
        last = self.step - row
        finite = f"{self.losses[last - 1]:.6g} at step {last}" if last else "none"
        raise ValueError(
            f"{row} steps of {self.name} in a row had a loss or gradient that is not finite, up to "
            f"step {self.step}: loss {value}, gradient norm {norm}, learning rate {lr:g}; last "
            f"finite loss {finite}. Lower the learning rate (or lengthen its warm-up), or "
            "max_grad_norm; with fp16, try bf16. The same command goes on from the last "
            f"checkpoint in {self.folder}, if there is one."
        )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the place of the trained ones, for the length of the block."""
        ema = self.ema if self.step < self.steps else None  # after the last step they stay there
        if ema is None:
            yield
            return
        with self.interrupts.held():
            ema.store(self.parameters)
            ema.copy_to(self.parameters)
        try:
            yield
        finally:  # Ctrl-C here would otherwise save averaged weights as the trained ones
            with self.interrupts.held():
                ema.restore(self.parameters)

    @contextlib.contextmanager
    def _trackers(self, accelerator: Accelerator) -> Iterator[None]:
        """TensorBoard or W&B, as ``report_to`` says: one run a stage."""
        plain = {key: value for key, value in asdict(self.recipe).items()
                 if isinstance(value, (str, int, float, bool))}
        accelerator.init_trackers(self.name, config=plain)
        try:
            yield
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.trackers = []

    def _write_losses(self) -> None:
        with open(self.out / f"{self.name}_loss.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss"])
            writer.writerows((step, "" if loss is None else f"{loss:.6f}")
                             for step, loss in enumerate(self.losses, 1))
        plot_losses(self.out)


def _adamw(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    if not recipe.use_8bit_adam:
        return torch.optim.AdamW(groups, weight_decay=recipe.adam_weight_decay, fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "The recipe's use_8bit_adam is true, but the package bitsandbytes is not installed: "
            "run `pip install bitsandbytes`, or set it to false."
        ) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, weight_decay=recipe.adam_weight_decay)
    return optimizer


def plot_losses(out: Path) -> None:
    """Draw every ``*_loss.csv`` of a model folder, raw and averaged, as ``loss.png``."""
    files = sorted(out.glob("*_loss.csv"), reverse=True)
    figure = Figure(figsize=(5 * len(files), 3.2), layout="constrained")
    for axes, file in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        rows = np.genfromtxt(file, delimiter=",", skip_header=1).reshape(-1, 2)
        steps, losses = rows[np.isfinite(rows[:, 1])].T  # without the skipped
        window = max(1, len(losses) // 50)
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps, losses, color="0.8", linewidth=0.5)
        axes.plot(steps[window - 1 :], mean)
        axes.set(title=file.stem.removesuffix("_loss"), xlabel="step", ylabel="loss",
                 ylim=(0, float(np.quantile(losses, 0.995)) * 1.1))
    figure.savefig(out / "loss.png", dpi=100)


def draw_step(draw: Callable[[int], Batch], name: str, step: int, seed: int) -> Batch:
    """The batch of one step, with torch's generators seeded for it."""
    torch.manual_seed(step_seed(name, step, seed))
    return draw(step)


def step_seed(name: str, step: int, seed: int) -> int:
    """torch's seed for one step of the stage ``name``."""
    return int(np.random.SeedSequence([seed, sum(name.encode()), step]).generate_state(1)[0])
