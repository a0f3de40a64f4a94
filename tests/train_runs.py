"""Reading back, and interrupting, the trainings of several tests."""

from __future__ import annotations

import csv
import functools
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quicken
from safetensors.torch import load_file

from gps_guidance import train
from gps_guidance.recipe import Recipe
from gps_guidance.train import train_model


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


FSDP = {  # as `accelerate launch --use_fsdp --fsdp_version 2` says it
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def nan_at(call: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, but its ``call``-th value (from 1) is not a number."""
    count = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return real(*args, **options) * (float("nan") if count == call else 1.0)

    return wrapped


def train_small(dataset: Path, out: Path, recipe: Recipe, rank: int = 0, processes: int = 1,
                port: int = 0, environment: Mapping[str, str] | None = None) -> None:
    """``train_model`` in a process of its own, or as one of several as torchrun starts them."""
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TQDM_DISABLE": "1", **(environment or {})}
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        if "NAN_AT" in os.environ and rank:
            patch.setattr(train, "denoising_loss",
                          nan_at(int(os.environ["NAN_AT"]), train.denoising_loss))
        train_model(dataset, out, recipe)


def children() -> Any:
    """A multiprocessing context whose processes start in a moment: torch is imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gps_guidance.train"])
    return context


def train_together(processes: int, dataset: Path, out: Path, recipe: Recipe,
                   environment: Mapping[str, str] | None = None) -> list[Any]:
    """Start as many processes on one training, and return them."""
    target = functools.partial(train_small, environment=environment)
    return run_together(processes, target, dataset, out, recipe)


def run_together(processes: int, target: Callable[..., None], *args: Any) -> list[Any]:
    """Start ``target(*args, rank, processes, port)`` in as many processes, and return them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = [children().Process(target=target, args=(*args, rank, processes, port))
             for rank in range(processes)]
    for process in found:
        process.start()
    return found
