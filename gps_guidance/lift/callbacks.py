"""Lightning's side of the portable engine: checkpoints, the progress bar, stopping on Ctrl-C."""

from __future__ import annotations

import inspect
import logging
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gps_guidance.lift.config import ExperimentConfig, check_keys, dump_config
from gps_guidance.lift.export import staged

logger = logging.getLogger(__name__)


class Interrupted(BaseException):
    """The user (SIGINT) or the system (SIGTERM) asked to stop. Not an Exception, as in Python."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears under its name only when it is whole; only tensors are read back."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any,
                        storage_options: Any = None) -> None:
        with staged(path) as stage, open(stage, "wb") as file:
            nameless: Any = _Plain(file)
            torch.save(checkpoint, nameless)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu",
                        weights_only: bool | None = True) -> dict[str, Any]:
        return load_checkpoint(path, map_location)


class _Plain:
    """A file without a name: torch then writes through Python, and a full disk is an OSError."""

    def __init__(self, file: Any) -> None:
        self.write: Callable[[bytes], int] = file.write
        self.flush: Callable[[], None] = file.flush


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content, tensors and plain values only; ValueError if it is none."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such checkpoint.")
    try:
        saved = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint of this engine, or it is damaged.") from error
    if not isinstance(saved, dict) or not {"state_dict", "epoch", "global_step"} <= set(saved):
        raise ValueError(f"{path} holds no field: it is not a checkpoint of this engine.")
    return saved


def model_checkpoint(folder: Path, settings: Mapping[str, Any]) -> ModelCheckpoint:
    """Lightning's ModelCheckpoint from the ``checkpoint`` section.

    ``last.ckpt`` is always the newest, also after resuming: no ``last-v1.ckpt`` beside it.
    """
    known = [k for k in inspect.signature(ModelCheckpoint).parameters if k != "dirpath"]
    check_keys(settings, known, "checkpoint")
    try:
        return ModelCheckpoint(folder, **{"enable_version_counter": False, **settings})
    except (TypeError, MisconfigurationException) as error:
        raise ValueError(f"checkpoint: {error}") from error


class ConfigSnapshot(Callback):
    """``configs/raw.yaml`` as given and ``configs/parsed.yaml`` as used. No code, no photos."""

    def __init__(self, source: Path, cfg: ExperimentConfig) -> None:
        self.source, self.cfg = source, cfg

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(self.cfg.trial_dir) / "configs"
        folder.mkdir(parents=True, exist_ok=True)
        if self.source.resolve().parent != folder.resolve():
            shutil.copyfile(self.source, folder / "raw.yaml")
        with staged(folder / "parsed.yaml") as stage:
            stage.write_text(dump_config(self.cfg), encoding="utf-8")


class StepBar(TQDMProgressBar):
    """One bar over all steps, with the loss and the remaining time."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not sys.stdout.isatty():  # a log file that nobody watches: a line every 5 % is enough
            self._refresh_rate = max(1, trainer.max_steps // 20)
        super().on_train_start(trainer, pl_module)
        self._begin(trainer)  # a resumed run is inside its epoch already

    @property
    def total_train_batches(self) -> int | float:
        total = super().total_train_batches
        steps = self.trainer.max_steps
        return min(total, steps) if steps > 0 else total

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        """Count towards the last step; after a resume, time only what is left."""
        bar = self.train_progress_bar
        bar.set_description("Training", refresh=False)
        bar.total = trainer.max_steps if trainer.max_steps > 0 else None
        bar.initial = bar.n = trainer.global_step

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        return items


class GracefulStop(Callback):
    """Ctrl-C and SIGTERM end a run between two steps, with a checkpoint that resumes exactly.

    A second signal stops at once, without one. Use as a context manager around the run.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.saved = False
        self._requested = False
        self._training = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self._training or self._requested:
            raise Interrupted
        self.request()

    def request(self) -> None:
        """Stop at the end of the present step."""
        self._requested = True
        logger.warning("Stopping after this step, to save a checkpoint. Once more to stop now.")

    def _stop_if_requested(self, trainer: pl.Trainer) -> None:
        if self._requested and trainer.global_step > 0:
            trainer.save_checkpoint(self.checkpoint)
            self.saved = True
            raise Interrupted

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._stop_if_requested(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._training:
            self._stop_if_requested(trainer)
