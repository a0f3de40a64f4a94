"""Checkpoints of a training: folders ``<stage>-<step>``, safetensors and JSON only.

A folder is staged under a name that begins with a dot, and renamed when it is whole; what goes is
renamed before it is removed. So a folder under its own name is complete, whenever the process died.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gps_guidance.models import disk_errors

VERSION = 1
REMEDY = "Move it away, and training starts from the one before it, or anew."


@dataclass
class Checkpoint:
    """The tensors of a stage by name, and its ``state``, of which each value is JSON.

    ``model`` has ``<module>.<key>``, ``optimizer`` ``<kind>.<module>.<key>`` with AdamW's kinds
    exp_avg, exp_avg_sq and step, ``ema`` ``<module>.<key>``; None without a moving average.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write the folder ``path``, whole or not at all. OSError if the disk is full."""
    stage = _part(path)
    try:
        with disk_errors(path):
            stage.mkdir(parents=True)
            for name in ("model", "optimizer", "ema"):
                tensors = getattr(checkpoint, name)
                if tensors is not None:
                    own = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                    save_file(own, stage / f"{name}.safetensors")
            state = {"version": VERSION, **checkpoint.state}
            (stage / "state.json").write_text(json.dumps(state, allow_nan=False), "utf-8")
            os.replace(stage, path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what ``save_checkpoint`` wrote; ValueError says which folder is not that, and why."""
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        if state["version"] != VERSION:
            raise ValueError(f"its version is {state['version']!r}, and {VERSION} is read here")
        model, optimizer = (load_file(path / f"{name}.safetensors") for name in
                            ("model", "optimizer"))
        ema = path / "ema.safetensors"
        return Checkpoint(model, optimizer, load_file(ema) if ema.is_file() else None, state)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"The checkpoint {path} cannot be read: {error}. {REMEDY}") from error


def foreign_checkpoint(path: Path, why: str) -> ValueError:
    """The error of a checkpoint that another training wrote."""
    return ValueError(f"The checkpoint {path} is of another training: {why}. Give another --out "
                      "folder, the settings that it was made with, or move it away to train anew.")


def find_checkpoints(folder: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage, oldest first. ValueError for one of before version 1."""
    for old in folder.glob(f"{stage}-*.pt"):
        raise foreign_checkpoint(old, "an earlier release wrote it")
    found = [path for path in folder.glob(f"{stage}-*")
             if re.fullmatch(rf"{re.escape(stage)}-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def clear_parts(folder: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for part in folder.glob(".*.part"):
        shutil.rmtree(part)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that no half of it ever stands under its name."""
    part = _part(path)
    os.replace(path, part)
    shutil.rmtree(part)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
