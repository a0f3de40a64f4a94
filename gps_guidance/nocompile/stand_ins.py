"""Which packages are missing here, and what takes their places in this process."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import logging
import shutil
import sys
from types import ModuleType
from typing import Any, NoReturn

log = logging.getLogger(__name__)

# What threestudio imports at its top for parts that our configs do not use
OPTIONAL = ("IPython", "controlnet_aux", "envlight", "pysdf", "torchvision", "wandb")
IMPORTERS = ("threestudio", "extern")  # the packages in threestudio's folder


def install() -> list[str]:
    """Put stand-ins where packages are missing; the names of those that stand in.

    Real packages are used where they can be imported.
    """
    active = []
    if not importable("tinycudann"):
        sys.modules["tinycudann"] = importlib.import_module("gps_guidance.nocompile.tinycudann")
        active.append("tinycudann")
    if not importable("nvdiffrast.torch"):
        package = ModuleType("nvdiffrast")
        name = "gps_guidance.nocompile.nvdiffrast_torch"
        package.torch = importlib.import_module(name)  # type: ignore[attr-defined]
        sys.modules |= {"nvdiffrast": package, "nvdiffrast.torch": package.torch}
        active.append("nvdiffrast")
    if not has_kernels():
        from gps_guidance.nocompile import nerfacc_kernels

        nerfacc_kernels.install(importlib.import_module("nerfacc"))
        active.append("nerfacc's kernels")
    missing = [name for name in OPTIONAL if not importable(name)]
    log.debug("not installed, and not needed: %s", ", ".join(missing))
    let_import(missing)
    return active


def importable(name: str) -> bool:
    """Whether a package can be imported here: a compiled one may be there and still not run."""
    try:
        importlib.import_module(name)
    except Exception as error:  # without its GPU it raises what it likes
        log.debug("%s cannot be imported: %s", name, error)
        return False
    return True


def has_kernels() -> bool:
    """Whether nerfacc has a GPU and is compiled for it, or can compile itself; ImportError if it
    is not there at all."""
    import torch

    try:
        importlib.import_module("nerfacc")
    except ImportError as error:
        raise ImportError("threestudio needs nerfacc, whose CUDA code may stay uncompiled: run "
                          "`pip install nerfacc`.") from error
    if not torch.cuda.is_available():
        return False
    with contextlib.suppress(ImportError):
        importlib.import_module("nerfacc.csrc")
        return True
    return shutil.which("nvcc") is not None


class Absent:
    """Anything of a package that is not installed; ImportError when it is called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Absent:
        return Absent(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        package = self._name.partition(".")[0]
        raise ImportError(f"This config needs {self._name}, but {package} is not installed: run "
                          f"`pip install {package}`.")


def let_import(names: list[str]) -> None:
    """Let threestudio's own modules import packages that are not there.

    Other libraries still see that they are missing, and do without.
    """
    real = builtins.__import__

    def lenient(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (),
                level: int = 0) -> Any:
        importer = (globals or {}).get("__name__", "").partition(".")[0]
        package = name.partition(".")[0]
        if level == 0 and package in names and importer in IMPORTERS:
            parts = name.split(".") if fromlist else [package]
            return Absent(".".join(parts))
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = lenient  # type: ignore[assignment]
