"""Reading back, and interrupting, the trainings of several tests."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a model folder."""
    return {
        f"{path.parent.name}.{name}": value
        for path in sorted(folder.rglob("*.safetensors")) for name, value in load_file(path).items()
    }


def losses(folder: Path, name: str = "angle") -> list[list[str]]:
    with open(folder / f"{name}_loss.csv", newline="") as file:
        return list(csv.reader(file))


def ctrl_c_at(call: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, but in its ``call``-th call (from 1) Ctrl-C is pressed."""
    count = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    return wrapped
