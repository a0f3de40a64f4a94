"""What is random in one step of training, for the images of all processes together.

Every process draws the whole of it from (seed, step) and takes its own parts, so that the split
over processes and accumulated batches changes nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Draws:
    """Of B photos: ``picks`` and ``crops`` say which latents, ``where`` their places (of
    ``conditions.draw_places``), ``which`` what is dropped (of ``dropped``); ``posterior`` and
    ``noise`` [B, C, h, w] make latents and noisy latents, at ``timesteps`` [B].
    ``prior_*`` are the same of the images of prior preservation, or empty."""

    picks: np.ndarray
    crops: np.ndarray
    where: np.ndarray
    which: Tensor
    posterior: Tensor
    noise: Tensor
    timesteps: Tensor
    prior_picks: np.ndarray
    prior_posterior: Tensor
    prior_noise: Tensor
    prior_timesteps: Tensor

    def split(self, size: int, process: int, processes: int) -> list[Draws]:
        """The parts of ``size`` of one process: each has every ``processes``-th."""
        starts = range(process * size, len(self.picks), processes * size)
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return [Draws(**{name: value[start : start + size] for name, value in values.items()})
                for start in starts]


def dropped(draw: Tensor, dropout: tuple[float, float, float]) -> Tensor:
    """What one draw in [0, 1) a sample [B] drops: 0 all, 1 the place, 2 the text, 3 nothing.

    ``dropout`` are the shares of 0, 1 and 2, which follow each other from 0.
    """
    edges = itertools.accumulate(dropout)
    return torch.stack([draw >= edge for edge in edges]).sum(dim=0)


def draw_timesteps(count: int, num_train_timesteps: int, high_noise_fraction: float | None = None,
                   high_noise_from: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Time steps [count], even over the chain; or the fraction evenly over those from
    ``high_noise_from`` on and the rest evenly below: the layout of an image is decided there."""
    if high_noise_fraction is None:
        return torch.randint(num_train_timesteps, (count,), device=device)
    high = torch.rand(count, device=device) < high_noise_fraction
    low_steps = torch.randint(high_noise_from, (count,), device=device)
    high_steps = torch.randint(high_noise_from, num_train_timesteps, (count,), device=device)
    return torch.where(high, high_steps, low_steps)
