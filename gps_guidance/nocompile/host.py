"""What an untouched threestudio needs around it: stand-ins, a device, our extension."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from gps_guidance.nocompile import stand_ins

log = logging.getLogger(__name__)

EXTENSION = Path(__file__).parents[2] / "custom" / "threestudio-gps"


def prepare() -> None:
    """Install what is missing and say it, then import threestudio; on a machine without CUDA also
    tell it so. ImportError names what has no stand-in."""
    active = stand_ins.install()
    in_main = multiprocessing.parent_process() is None
    if active and in_main:
        log.warning("Stand-ins in pure torch for %s (docs/threestudio.md says what they cannot "
                    "do).", ", ".join(active))
    import torch

    if not torch.cuda.is_available():
        _without_cuda()
        if in_main:
            log.warning("No CUDA here: threestudio runs on the CPU, in 32 bits.")


def _without_cuda() -> None:
    """threestudio takes CUDA for given in five places; each gets the CPU instead."""
    import pytorch_lightning
    import torch

    cpu = torch.device("cpu")

    class NoDevice(contextlib.nullcontext[None]):
        """``torch.cuda.device(...)`` with nothing to choose."""

    class Trainer(pytorch_lightning.Trainer):
        """Lightning's, on the CPU whatever launch.py asks for."""

        def __init__(self, **settings: Any) -> None:
            cpu_alone = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
            super().__init__(**settings | cpu_alone)

    torch.cuda.device = NoDevice  # type: ignore[assignment, misc]
    pytorch_lightning.Trainer = Trainer  # type: ignore[misc]
    misc = importlib.import_module("threestudio.utils.misc")
    networks = importlib.import_module("threestudio.models.networks")
    networks.get_rank = lambda: cpu  # type: ignore[attr-defined]
    given = misc.get_device
    for name, module in list(sys.modules.items()):  # where it was imported by name
        if name.startswith("threestudio") and getattr(module, "get_device", None) is given:
            module.get_device = lambda: cpu  # type: ignore[attr-defined]


def load_extension() -> None:
    """Register our types as if ``custom/threestudio-gps`` lay in threestudio's folder.

    ImportError ends the launch with its reason, where threestudio would print it and go on.
    """
    spec = importlib.util.spec_from_file_location("threestudio-gps", EXTENSION / "__init__.py",
                                                  submodule_search_locations=[str(EXTENSION)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    log.info("Extension: %s", EXTENSION)
