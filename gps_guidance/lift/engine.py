"""The portable engine: threestudio's flags and YAML, on CPU, CUDA or MPS, with pip packages only.

:func:`launch` reads the command line, checks the whole config before anything heavy starts, builds
every part by threestudio's type names and trains, validates, tests or exports.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import inspect
import logging
import os
import platform
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gps_guidance.lift.config import ExperimentConfig, check_keys, find_config, load_config
from gps_guidance.lift.plan import Plan, build_system, find_resume, make_plan
from gps_guidance.lift.threestudio import choose_engine, run_threestudio

logger = logging.getLogger(__name__)

OK, FAILED, WRONG, STOPPED = 0, 1, 2, 130
OURS = ("accelerator", "devices", "strategy", "num_nodes", "logger", "callbacks", "plugins",
        "inference_mode", "default_root_dir", "enable_checkpointing")


@dataclass
class Run:
    """A finished run, as the report reads it.

    ``seconds`` counts training, over every resumed part of it; ``peak_memory_bytes`` is the
    device's on CUDA and the process's elsewhere; ``resumed_from`` is a checkpoint or None;
    ``photos`` is the dataset folder to compare with, or None.
    """

    trial_dir: Path
    cfg: ExperimentConfig
    system: Any
    datamodule: Any
    seconds: float
    peak_memory_bytes: int
    engine: str
    device: str
    resumed_from: str | None = None
    photos: str | None = None


# --- device and precision --------------------------------------------------------------------


def choose_device(gpu: str) -> Any:
    """The torch device for ``--gpu``: that CUDA device, else MPS, else the CPU.

    As in threestudio, CUDA_VISIBLE_DEVICES wins over the flag. ``cpu`` forces the CPU.
    """
    import torch

    if gpu == "cpu":
        return torch.device("cpu")
    if not gpu.isdigit():
        raise ValueError(f"--gpu is {gpu!r}; the portable engine runs on one device: give one "
                         "number, or cpu. For several GPUs use --engine threestudio.")
    if torch.cuda.is_available():
        index = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") else int(gpu)
        if index >= torch.cuda.device_count():
            raise ValueError(f"--gpu {gpu}: there are {torch.cuda.device_count()} CUDA devices, "
                             "counted from 0.")
        return torch.device("cuda", index)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_precision(requested: Any, device_type: str) -> Any:
    """``trainer.precision`` where the device has it; half precision off CUDA becomes 32 bits."""
    name = str(requested if requested is not None else "32-true")
    if name in ("16", "16-mixed", "16-true") and device_type != "cuda":
        logger.warning("trainer.precision %s does not work on %s: using 32-true.", name,
                       device_type)
        return "32-true"
    if name in ("bf16", "bf16-mixed", "bf16-true") and device_type == "mps":
        logger.warning("trainer.precision %s does not work on mps: using 32-true.", name)
        return "32-true"
    return requested if requested is not None else "32-true"


def device_name(device: Any) -> str:
    """``cuda:0 (name of the GPU)``, ``mps`` or ``cpu``."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def peak_memory_bytes(device: Any) -> int:
    """Peak memory: allocated on a CUDA device, else resident in this process."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


# --- Lightning's parts -----------------------------------------------------------------------


def make_loggers(plan: Plan) -> list[Any]:
    """CSV always, TensorBoard where installed, Weights & Biases where the config asks for it."""
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    folder = plan.cfg.trial_dir
    found: list[Any] = []
    if importlib.util.find_spec("tensorboard"):
        found.append(TensorBoardLogger(folder, name="tb_logs"))
    found.append(CSVLogger(folder, name="csv_logs"))
    check_keys(plan.system.loggers, ("wandb",), "system.loggers")
    wandb = plan.system.loggers.get("wandb") or {}
    check_keys(wandb, ("enable", "project", "name"), "system.loggers.wandb")
    if wandb.get("enable"):
        if not importlib.util.find_spec("wandb"):
            raise ValueError("system.loggers.wandb.enable is true but wandb is not installed: "
                             "pip install wandb, or set it to false.")
        from lightning.pytorch.loggers import WandbLogger

        found.append(WandbLogger(project=wandb.get("project"), name=wandb.get("name")))
    return found


def make_trainer(plan: Plan, device: Any, callbacks: list[Any], loggers: list[Any]) -> Any:
    """Lightning's Trainer from the ``trainer`` section; ValueError for what it does not know."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from gps_guidance.lift.callbacks import AtomicCheckpointIO, StepBar

    settings = dict(plan.cfg.trainer)
    for key in OURS:
        if key in settings:
            raise ValueError(f"trainer.{key} is set by the engine (--gpu chooses the device): "
                             "remove it.")
    check_keys(settings, inspect.signature(Trainer).parameters, "trainer")
    settings["precision"] = choose_precision(settings.get("precision"), device.type)
    if settings.get("enable_progress_bar", True):
        callbacks = [*callbacks, StepBar()]
    try:
        return Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index] if device.type == "cuda" else 1,
            callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO()],
            inference_mode=False,  # analytic normals need gradients
            default_root_dir=plan.cfg.trial_dir,
            enable_checkpointing=any(type(c).__name__ == "ModelCheckpoint" for c in callbacks),
            **{"enable_model_summary": False, **settings},
        )
    except (TypeError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error


# --- the four commands -----------------------------------------------------------------------


def train(plan: Plan, source: Path, device: Any, argv: Sequence[str],
          photos: str | None = None, report: bool = True) -> None:
    """Fit, then test, then report unless it is not wanted, as ``--train``."""
    from lightning.pytorch.callbacks import LearningRateMonitor

    from gps_guidance.lift.callbacks import ConfigSnapshot, GracefulStop, model_checkpoint

    cfg = plan.cfg
    if cfg.trainer.get("max_steps", -1) < 0 and "max_time" not in cfg.trainer:
        raise ValueError("trainer.max_steps is missing: the cameras never run out, so the config "
                         "must say how many steps to train.")
    trial = Path(cfg.trial_dir)
    if cfg.resume is None and any((trial / "ckpts").glob("*.ckpt")):
        logger.warning("%s already holds checkpoints, which this run replaces; resume=last would "
                       "continue them.", trial)
    datamodule = plan.parts["data"][0](plan.parts["data"][1])
    system = build_system(plan)
    stop = GracefulStop(trial / "ckpts" / "last.ckpt")
    callbacks = [stop, model_checkpoint(trial / "ckpts", cfg.checkpoint),
                 LearningRateMonitor(logging_interval="step"), ConfigSnapshot(source, cfg)]
    trial.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(plan, device, callbacks, make_loggers(plan))
    (trial / "cmd.txt").write_text(f"python launch.py {shlex.join(argv)}\n{versions()}\n", "utf-8")
    with stop:
        trainer.fit(system, datamodule=datamodule, ckpt_path=cfg.resume)
        trainer.test(system, datamodule=datamodule, verbose=False)
    if report:
        write_report(plan, system, datamodule, device, photos)


def evaluate(plan: Plan, device: Any, mode: str, photos: str | None = None,
             report: bool = True) -> None:
    """``--validate`` or ``--test`` of a checkpoint (of a fresh field if there is none)."""
    from gps_guidance.lift.callbacks import GracefulStop

    datamodule = plan.parts["data"][0](plan.parts["data"][1])
    system = restored(plan)
    stop = GracefulStop(Path(plan.cfg.trial_dir) / "ckpts" / "last.ckpt")
    trainer = make_trainer(plan, device, [stop], [])
    with stop:
        if mode == "validate":
            trainer.validate(system, datamodule=datamodule, verbose=False)
        else:
            trainer.test(system, datamodule=datamodule, verbose=False)
    if mode == "test" and report:
        write_report(plan, system, datamodule, device, photos)


def export_mesh(plan: Plan, device: Any) -> Path:
    """``--export``: the mesh of a checkpoint under ``save/it<step>-export/``; returns its path."""
    exporter, exporter_cfg = plan.parts["exporter"]
    if exporter_cfg.save_video:
        evaluate(plan, device, "test")
    system = restored(plan).to(device)
    system.update_parts(system.true_current_epoch, system.true_global_step)
    if exporter_cfg.fmt == "obj-mtl":
        logger.warning("system.exporter.fmt obj-mtl: the portable engine writes vertex colours, "
                       "not textures.")
    folder = system.save_dir / f"it{system.true_global_step}-export"
    path: Path = exporter(exporter_cfg)(system.geometry, system.material, system.placement, folder)
    logger.info("Mesh: %s", path)
    return path


def restored(plan: Plan) -> Any:
    """The system with the field of ``resume``."""
    system = build_system(plan)
    if plan.cfg.resume is None:
        logger.warning("No resume=... was given: this is a field that was never trained.")
    else:
        system.restore(plan.cfg.resume)
    return system


def check_photos(args: argparse.Namespace) -> None:
    """ValueError before a long run, not after it, if ``--photos`` is no dataset of a landmark."""
    from gps_guidance.photos.manifest import load_manifest

    if args.photos is None:
        return
    if load_manifest(args.photos).center is None:
        raise ValueError(f"--photos {args.photos}: its photos have no bearings, as they were "
                         "ingested without a landmark. Run `gps-guidance ingest` with --landmark.")
    if args.mode not in ("train", "test"):
        logger.warning("--photos is not used with --%s: it writes no report.", args.mode)


def write_report(plan: Plan, system: Any, datamodule: Any, device: Any,
                 photos: str | None = None) -> None:
    """metrics.json, mesh.glb and report.html of a finished run."""
    from gps_guidance.lift import report

    report.finish(Run(
        trial_dir=Path(plan.cfg.trial_dir), cfg=plan.cfg, system=system, datamodule=datamodule,
        seconds=system.training_seconds, peak_memory_bytes=peak_memory_bytes(device),
        engine="portable", device=device_name(device), resumed_from=plan.cfg.resume,
        photos=photos,
    ))


def versions() -> str:
    """One line of the versions that made a run."""
    from importlib.metadata import version

    names = ("torch", "lightning", "diffusers", "transformers")
    import gps_guidance

    return ", ".join([f"gps-guidance {gps_guidance.__version__}",
                      f"Python {platform.python_version()}",
                      *(f"{name} {version(name)}" for name in names)])


# --- command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """threestudio's flags, and ``--engine``."""
    flags = argparse.ArgumentParser(
        prog="launch.py",
        description="Reconstruct a landmark in 3D by GPS-guided score distillation.",
        epilog="Overrides: key=value, for example trainer.max_steps=500 system.guidance."
               "guidance_scale=3 resume=last",
    )
    flags.add_argument("--config", required=True,
                       help="a YAML file, or the name of one in threestudio_configs/")
    flags.add_argument("--gpu", default="0", help="number of the CUDA device, or cpu (default: 0)")
    mode = flags.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_const", dest="mode", const="train")
    mode.add_argument("--validate", action="store_const", dest="mode", const="validate")
    mode.add_argument("--test", action="store_const", dest="mode", const="test")
    mode.add_argument("--export", action="store_const", dest="mode", const="export")
    flags.add_argument("--engine", choices=("auto", "portable", "threestudio"), default="auto",
                       help="auto: threestudio where it is installed with a GPU, else portable")
    flags.add_argument("--threestudio", metavar="FOLDER",
                       help="a clone of threestudio for --engine threestudio; what it lacks of "
                            "compiled packages gets stand-ins")
    flags.add_argument("--photos", metavar="DATASET",
                       help="the landmark's photos, to score the result against them")
    flags.add_argument("--no-report", action="store_true",
                       help="neither scores (metrics.json) nor mesh.glb nor report.html at the end")
    flags.add_argument("--verbose", action="store_true", help="debug log and tracebacks")
    flags.add_argument("--gradio", action="store_true", help=argparse.SUPPRESS)
    flags.add_argument("--typecheck", action="store_true", help=argparse.SUPPRESS)
    flags.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    return flags


def start_log(verbose: bool) -> None:
    """Our log to stderr."""
    package = logging.getLogger("gps_guidance")
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        package.addHandler(handler)


def quiet_lightning() -> None:
    """No chatter from Lightning."""
    import lightning.pytorch  # noqa: F401  (it sets its own log level when imported)

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec|treespec).*")


def run_portable(args: argparse.Namespace, overrides: Sequence[str], argv: Sequence[str]) -> int:
    """Check the config, choose the device and run the command; returns the exit code."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from gps_guidance.lift.callbacks import Interrupted
    from gps_guidance.models import quiet_libraries

    if not args.verbose:
        quiet_libraries()
        quiet_lightning()
    source = find_config(args.config)
    cfg = load_config(str(source), overrides)
    find_resume(cfg)
    plan = make_plan(cfg)
    check_photos(args)
    device = choose_device(args.gpu)
    model = getattr(plan.parts["guidance"][1], "pretrained_model_name_or_path", "none")
    logger.info("Engine: portable. Device: %s. Model: %s. Trial: %s", device_name(device), model,
                cfg.trial_dir)
    try:
        if args.mode == "train":
            train(plan, source, device, argv, args.photos, not args.no_report)
        elif args.mode == "export":
            export_mesh(plan, device)
        else:
            evaluate(plan, device, args.mode, args.photos, not args.no_report)
    except (Interrupted, KeyboardInterrupt, SIGTERMException):
        logger.warning("Stopped. %s", how_to_go_on(cfg, args))
        return STOPPED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        logger.error("The disk is full (%s). Make room, then go on. %s", cfg.trial_dir,
                     how_to_go_on(cfg, args))
        return FAILED
    return OK


def how_to_go_on(cfg: ExperimentConfig, args: argparse.Namespace) -> str:
    """The command that resumes from the newest checkpoint of this trial, with the same flags."""
    trial = Path(cfg.trial_dir)
    saved = max((trial / "ckpts").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns, default=None)
    if saved is None:
        return "No checkpoint had been written yet: run the same command again."
    command = ["python", "launch.py", "--config", str(trial / "configs" / "parsed.yaml"),
               f"--{args.mode}", f"resume={saved}"]
    for flag in ("gpu", "engine", "threestudio", "photos"):
        value = getattr(args, flag)
        if value != parser().get_default(flag):
            command += [f"--{flag}", value]
    if args.no_report:
        command.append("--no-report")
    return f"Resume with: {shlex.join(command)}"


def launch(argv: Sequence[str]) -> int:
    """Run a command line (without the program's name) and return its exit code.

    0 done; 2 something in the command or config is wrong (one line says what); 1 the disk is
    full; 130 stopped by Ctrl-C or SIGTERM.
    """
    try:
        args = parser().parse_intermixed_args(list(argv))
    except SystemExit as error:
        return int(error.code or 0)
    start_log(args.verbose)
    try:
        if args.gradio:
            raise ValueError("--gradio is threestudio's own page, which this engine does not have: "
                             "open the trial's report.html and save/it<step>-test.mp4 instead.")
        folder = choose_engine(args.engine, args.threestudio)
        if folder is not None:
            return run_threestudio(args, args.overrides, folder)
        return run_portable(args, args.overrides, argv)
    except (ValueError, FileNotFoundError) as error:
        if args.verbose:
            traceback.print_exc()
        logger.error("%s", error)
        return WRONG
    except KeyboardInterrupt:
        logger.warning("Stopped before anything had started.")
        return STOPPED


