"""Judges that learn by contrast: the loss of Algorithm 1, and a training that goes on."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from gps_guidance.checkpoints import (
    Checkpoint,
    clear_parts,
    find_checkpoints,
    foreign_checkpoint,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from gps_guidance.dataset import Photos
from gps_guidance.interrupts import Interrupts
from gps_guidance.judge_recipe import JudgeRecipe
from gps_guidance.metrics import recall_at

log = logging.getLogger(__name__)

CANDIDATES = 100  # among which a judge has to find the right one when it is measured


def symmetric_cross_entropy(a: Tensor, b: Tensor, temperature: float | Tensor,
                            labels: Tensor | None = None) -> Tensor:
    """The loss of Algorithm 1 for unit rows a, b [n, C], of which row i of one belongs to row i of
    the other.

    Rows of equal ``labels`` [n] belong to each other as well: two photos with one caption are not
    each other's mistakes.
    """
    logits = a @ b.T / temperature
    labels = torch.arange(len(a), device=a.device) if labels is None else labels
    same = (labels[:, None] == labels).to(logits.dtype)
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def warm_up_cosine(step: int, warmup: int, steps: int) -> float:
    """The share of the learning rate at ``step``: a line up to 1, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def hold_out(photos: Photos, recipe: JudgeRecipe) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the photos that train, and of those that measure: drawn by the seed.

    ValueError if fewer than a batch are left to train on, or fewer than two to measure.
    """
    order = np.random.default_rng((recipe.seed, 31)).permutation(len(photos))
    count = max(2, round(recipe.held_out_fraction * len(photos)))
    kept, held = order[count:], order[:count]
    if len(kept) < recipe.train_batch_size:
        raise ValueError(f"train_batch_size is {recipe.train_batch_size}, but of {len(photos)} "
                         f"photos {len(kept)} are left to train on: lower it, or give more photos.")
    return kept, held


def fit(module: nn.Module, batch_loss: Callable[[np.ndarray, np.random.Generator], Tensor],
        photos: Photos, kept: np.ndarray, recipe: JudgeRecipe, folder: Path) -> None:
    """Train what of ``module`` needs a gradient, by ``batch_loss`` of photos drawn from ``kept``.

    What a step draws is drawn from (seed, step). Checkpoints are in ``folder``, the last one of
    which it goes on from; Ctrl-C and SIGTERM save one more. ValueError if that one is of another
    training, or for a loss that is not finite.
    """
    ids = hashlib.sha256("".join(photos.ids).encode()).hexdigest()
    run = _Run(module, recipe, {"kind": recipe.kind, "photos": ids, **asdict(recipe)}, folder)
    run.resume()
    steps = recipe.max_train_steps
    with Interrupts() as interrupts:
        try:
            for step in trange(run.step, steps, desc=recipe.kind, unit="step", initial=run.step,
                               total=steps):
                rng = np.random.default_rng((recipe.seed, 32, step))
                picks = rng.choice(kept, recipe.train_batch_size, replace=False)
                loss = batch_loss(picks, rng)
                if not torch.isfinite(loss):
                    raise ValueError(f"The loss of step {step} is {loss.item()}: lower "
                                     f"learning_rate, which is {recipe.learning_rate}.")
                run.optimizer.zero_grad()
                loss.backward()
                with interrupts.held():
                    run.update(warm_up_cosine(step, recipe.lr_warmup_steps, steps))
                    if run.step % recipe.checkpointing_steps == 0:
                        run.save()
        except KeyboardInterrupt:
            run.save()
            raise


class _Run:
    """What a training changes: the weights that need a gradient, AdamW's moments, and ``step``."""

    def __init__(self, module: nn.Module, recipe: JudgeRecipe, settings: dict[str, Any],
                 folder: Path) -> None:
        self.weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=recipe.learning_rate,
                                           weight_decay=recipe.adam_weight_decay)
        self.rate, self.settings, self.folder, self.step = recipe.learning_rate, settings, folder, 0

    def update(self, share: float) -> None:
        """One step at this share of the learning rate."""
        self.optimizer.param_groups[0]["lr"] = self.rate * share
        self.optimizer.step()
        self.step += 1

    def save(self) -> None:
        """Write a checkpoint, and remove those before it."""
        before = find_checkpoints(self.folder, self.settings["kind"])
        path = self.folder / f"{self.settings['kind']}-{self.step:07d}"
        if path in before:
            return
        names = list(self.weights)
        moments = {f"{kind}.{names[k]}": torch.as_tensor(value)
                   for k, values in self.optimizer.state_dict()["state"].items()
                   for kind, value in values.items()}
        state = {**self.settings, "step": self.step}
        save_checkpoint(Checkpoint(dict(self.weights), moments, None, state), path)
        for old in before:
            remove_checkpoint(old)

    @torch.no_grad()
    def resume(self) -> None:
        """Put the last checkpoint's weights and moments in place, if there is one."""
        clear_parts(self.folder)
        found = find_checkpoints(self.folder, self.settings["kind"])
        if not found:
            return
        saved = load_checkpoint(found[-1])
        for key, value in self.settings.items():
            if saved.state.get(key) != value:
                raise foreign_checkpoint(found[-1], f"its {key} is {saved.state.get(key)!r}, not "
                                         f"{value!r}")
        index = {name: k for k, name in enumerate(self.weights)}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, moment in saved.optimizer.items():
            kind, _, name = key.partition(".")
            moments.setdefault(index[name], {})[kind] = moment
        for name, weight in self.weights.items():
            weight.copy_(saved.model[name])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step = saved.state["step"]
        log.info("resumed at step %d from %s", self.step, found[-1])


def checkpoints_of(out: Path) -> Path:
    """Where the checkpoints of a judge in ``out`` are: beside it, as the judge is one folder that
    appears whole. ValueError if something is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already holds something. Give another --out folder, or remove it "
                         "to train again.")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(f"{out.name}-checkpoints")


def middle_square(images: Tensor, side: int) -> Tensor:
    """The middle of images [B, 3, H, W] in [0, 1] as [B, 3, side, side], as CLIP prepares them."""
    height, width = images.shape[-2:]
    if (height, width) == (side, side):
        return images
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return images[..., top : top + side, left : left + side]


@torch.no_grad()
def in_batches(embed: Callable[[Tensor], Tensor], photos: Photos, indices: np.ndarray) -> Tensor:
    """``embed`` of the middle of these photos, [N, C] on the CPU."""
    rng = np.random.default_rng(0)  # of a whole photo there is nothing to draw
    parts = [embed(photos.crop(indices[at : at + 64], rng) / 2 + 0.5).cpu()
             for at in trange(0, len(indices), 64, desc="reading photos", unit="batch")]
    return torch.cat(parts)


def recall_among_hundred(images: Tensor, others: Tensor, labels: np.ndarray) -> float:
    """R@1 of unit rows ``images`` [N, C] among ``others`` [N, C], their own and those of 99 more
    photos: the mean over whole groups of a hundred, or over all where they are fewer.

    Photos of equal ``labels`` [N] share a candidate.
    """
    size = min(CANDIDATES, len(images))
    found = []
    for at in range(0, len(images) - size + 1, size):
        _, first, right = np.unique(labels[at : at + size], return_index=True, return_inverse=True)
        scores = images[at : at + size] @ others[at : at + size][first].T
        found.append(recall_at(scores, torch.as_tensor(right)))
    return float(np.mean(found))


def start_device() -> torch.device:
    """CUDA if there is one, else the CPU; it is logged."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log.info("training on %s", device)
    return device
