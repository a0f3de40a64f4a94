"""Fully sharded training (FSDP): each process keeps a part of every weight that trains.

The parts are DTensors. Optimiser, moving average and clipping work on them as on whole tensors, and
a module gathers its weights for the length of a pass. What is written to disk is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from gps_guidance.recipe import Recipe
from gps_guidance.zero import zero_stage

LAUNCH = "`accelerate launch --use_fsdp --fsdp_version 2`"


def asked_for(what: str) -> bool:
    """Whether accelerate is configured for "FSDP" or "DEEPSPEED"; it says so by the environment."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def prepare_sharding(recipe: Recipe) -> None:
    """Before the accelerator: ValueError for what does not go with the way in which accelerate is
    configured to shard."""
    if asked_for("DEEPSPEED"):
        zero_stage()
        way = "DeepSpeed"
    elif asked_for("FSDP"):
        _prepare_fsdp()
        way = "FSDP"
    else:
        return
    for key, bad, remedy in (("base", "tiny", "networks so small gain nothing, use --multi_gpu"),
                             ("mixed_precision", "fp16", "set it to bf16 or no"),
                             ("use_8bit_adam", True, "set it to false")):
        value = getattr(recipe, key)
        if value == bad:
            raise ValueError(f"The recipe's {key} is {value!r}, which does not go with {way}: "
                             f"{remedy}.")


def _prepare_fsdp() -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("accelerate is configured for FSDP's version 1; version 2 is needed: "
                         f"{LAUNCH}, or fsdp_version: 2 in its config file.")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError("accelerate is configured to offload FSDP's weights to the CPU, which "
                         "this loop does not know: leave --fsdp_offload_params out.")
    # else transformers reads weights in the first process alone, for accelerate to send them on
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def shard(modules: Iterable[Any], accelerator: Accelerator) -> list[Any]:
    """Leave this process its part of each weight of the modules, in place, where accelerate is
    configured for FSDP with several processes; returns the modules, else none.

    Blocks are those that their class names ``_no_split_modules``: they are gathered one at a time.
    """
    if accelerator.num_processes == 1 or not asked_for("FSDP"):
        return []
    from torch.distributed.fsdp import fully_shard  # torch 2.6

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    found = list(modules)
    for module in found:
        blocks = getattr(module, "_no_split_modules", None) or ()
        for part in reversed(list(module.modules())):  # the inner before the outer
            if part is module or type(part).__name__ in blocks:
                # also the outermost: what a pass leaves gathered would not see the next update
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return found


def restore_modules(sharded: Iterable[Any], main: bool) -> None:
    """Whole weights in the place of the parts, on the CPU, and the modules' own classes: to save
    them. All processes must call it; only in the main one the modules are good for that."""
    from torch.distributed.fsdp import FSDPModule

    for module in sharded:
        for part in list(module.modules()):
            for name, value in list(part._parameters.items()):
                if isinstance(value, DTensor):
                    tensor = whole(value.detach())
                    if main:
                        part._parameters[name] = torch.nn.Parameter(tensor.cpu(), False)
            if isinstance(part, FSDPModule):
                part.__class__ = type(part).__bases__[1]  # fully_shard put its own before it


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process may hold a part; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], main: bool) -> dict[str, Tensor]:
    """Whole tensors in the main process, parts gathered one by one to the CPU; none in the others.

    All processes must call it.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if main:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else tensor
    return found


def part_like(tensor: Tensor, own: Tensor) -> Tensor:
    """Of a whole tensor, the same on all processes, the part that ``own`` is of its own; a tensor
    of no dimension has no parts."""
    if not isinstance(own, DTensor) or tensor.ndim == 0:
        return tensor
    # nothing is sent: each process takes its part of what it has read itself
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements,
                             src_data_rank=None)
