"""Hand a run to threestudio's own launch.py, in its folder, with the same command line."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gps_guidance.lift.config import find_config

logger = logging.getLogger(__name__)

MODEL_KEYS = ("resume", "system.weights", "system.guidance.pretrained_model_name_or_path",
              "system.guidance.lora_weights",
              "system.prompt_processor.pretrained_model_name_or_path",
              "system.prompt_processor.lora_weights")


def choose_engine(requested: str, folder: str | None = None) -> Path | None:
    """The clone of threestudio to run in, or None for the portable engine.

    ``folder`` names a clone; without it, the one that Python would import. ValueError if
    threestudio is asked for and not there.
    """
    if requested == "portable":
        if folder is not None:
            raise ValueError(f"--threestudio {folder} is for --engine threestudio: leave it out.")
        return None
    if folder is not None:
        return clone(folder)
    found = imported_clone()
    if requested == "threestudio":
        if found is None:
            raise ValueError(
                "--engine threestudio: threestudio is not importable. Clone it and give its folder "
                "with --threestudio FOLDER (see custom/threestudio-gps/README.md), or use --engine "
                "portable."
            )
        return found
    if found is None or not (found / "custom" / "threestudio-gps").is_dir():
        return None
    import torch

    return found if torch.cuda.is_available() else None


def clone(folder: str | Path) -> Path:
    """The absolute path of a clone of threestudio; ValueError if it is none."""
    path = Path(folder).expanduser().resolve()
    if not ((path / "launch.py").is_file() and (path / "threestudio" / "__init__.py").is_file()):
        raise ValueError(f"{folder} is no clone of threestudio: it has no launch.py and "
                         "threestudio/. Clone it: git clone "
                         "https://github.com/threestudio-project/threestudio")
    return path


def imported_clone() -> Path | None:
    """The clone of threestudio that Python would import, or None."""
    spec = importlib.util.find_spec("threestudio")
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None  # without an origin: a clone beside our own launch.py, not what is in it
    folder = Path(next(iter(spec.submodule_search_locations))).parent
    return folder if (folder / "launch.py").is_file() else None


def absolute_paths(source: Path, overrides: Sequence[str]) -> list[str]:
    """Overrides for the config's relative paths, for a process that runs in another folder."""
    from omegaconf import OmegaConf

    cfg = OmegaConf.merge(OmegaConf.load(source), OmegaConf.from_cli(list(overrides)))
    root = OmegaConf.select(cfg, "exp_root_dir") or "outputs"
    found = [f"exp_root_dir={Path(root).resolve()}"]
    for key in MODEL_KEYS:
        value = OmegaConf.select(cfg, key)
        if isinstance(value, str) and Path(value).exists():
            found.append(f"{key}={Path(value).resolve()}")
    return found


def run_threestudio(args: argparse.Namespace, overrides: Sequence[str], folder: Path) -> int:
    """threestudio's own launch.py as a process in its folder; its exit code.

    With ``--threestudio``, packages that it needs compiled are replaced where they are missing, and
    our types are there (:mod:`gps_guidance.nocompile`); else it runs as it is installed. None of
    its files is changed either way.
    """
    source = find_config(args.config).resolve()
    start = ["-m", "gps_guidance.nocompile.start"] if args.threestudio else ["launch.py"]
    command = [sys.executable, *start, "--config", str(source), f"--{args.mode}", "--gpu",
               args.gpu, *overrides, *absolute_paths(source, overrides)]
    command += ["--verbose"] if args.verbose else []
    command += ["--typecheck"] if args.typecheck else []
    logger.info("Engine: threestudio in %s", folder)
    if args.photos:
        logger.warning("--photos %s is not used: only the portable engine's report compares with "
                       "photos.", args.photos)
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {"CUDA_VISIBLE_DEVICES": args.gpu}  # before torch is imported; "cpu" hides all
    environment |= os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode
