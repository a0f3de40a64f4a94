"""``dreamfusion-system``: one 3D field optimised until the guidance likes its renders (Sec. 3.2).

The keys, log names and files are threestudio's. Randomness is a function of (seed, global step)
alone: cameras, samples along rays, time steps and noise of a step are the same whether the run
went straight there or was stopped and resumed before it.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from gps_guidance.lift import export
from gps_guidance.lift.callbacks import load_checkpoint
from gps_guidance.lift.config import SystemConfig, check_keys, closest
from gps_guidance.lift.render import (
    opaque_loss,
    orientation_loss,
    sparsity_loss,
    z_variance_loss,
)
from gps_guidance.lift.sds import schedule

logger = logging.getLogger(__name__)

REQUIRED_LAMBDAS = ("lambda_orient", "lambda_sparsity", "lambda_opaque")
LAMBDAS = ("lambda_sds", "lambda_sds_img", "lambda_z_variance", *REQUIRED_LAMBDAS)


def seed_step(seed: int, global_step: int) -> None:
    """Seed torch (every device), NumPy and random from (seed, global step)."""
    state = np.random.SeedSequence([seed % 2**64, global_step]).generate_state(2, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))
    np.random.seed(int(state[1] & np.uint64(0xFFFFFFFF)))
    random.seed(int(state[1]))


def parameters_of(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters at a dotted name such as ``geometry`` or ``geometry.levels.0``."""
    part: Any = module
    for attribute in name.split("."):
        known = [n for n, _ in (*part.named_children(), *part.named_parameters(recurse=False))] \
            if isinstance(part, nn.Module) else []
        if attribute not in known:
            raise ValueError(f"system.optimizer.params.{name}: there is no {attribute!r}. "
                             f"{closest(attribute, known)}")
        part = getattr(part, attribute)
    return list(part.parameters()) if isinstance(part, nn.Module) else [part]


def build_optimizer(config: Mapping[str, Any], module: nn.Module) -> torch.optim.Optimizer:
    """threestudio's ``optimizer`` section (``name``, ``args``, ``params``) as a torch optimiser.

    Without ``params`` every parameter is optimised, with it only the named groups.
    """
    check_keys(config, ("name", "args", "params"), "system.optimizer")
    name, args = config.get("name"), dict(config.get("args") or {})
    known = {k for k, v in vars(torch.optim).items()
             if isinstance(v, type) and issubclass(v, torch.optim.Optimizer) and k != "Optimizer"}
    if name not in known:
        raise ValueError(f"system.optimizer.name is {name!r}; it must be a class of torch.optim. "
                         f"{closest(name, known)}")
    groups: Any = list(module.parameters())
    if config.get("params"):
        groups = [{"params": parameters_of(module, key), "name": key, **(own or {})}
                  for key, own in config["params"].items()]
        chosen = {id(p) for group in groups for p in group["params"]}
        idle = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in chosen]
        if idle:
            logger.warning("No optimiser group in system.optimizer.params holds %s: these stay as "
                           "they are.", ", ".join(sorted({n.split(".")[0] for n in idle})))
    try:
        return getattr(torch.optim, str(name))(groups, **args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"system.optimizer ({name}): {error}") from error


def build_scheduler(config: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """threestudio's ``scheduler`` section as Lightning's dict; it may nest other schedulers."""
    where = "system.scheduler"
    check_keys(config, ("name", "interval", "args", "schedulers", "milestones"), where)
    name, interval = config.get("name"), config.get("interval", "epoch")
    if interval not in ("epoch", "step"):
        raise ValueError(f"{where}.interval is {interval!r}; it must be 'epoch' or 'step'.")
    parts = [build_scheduler(part, optimizer)["scheduler"] for part in config.get("schedulers", ())]
    known = {k for k, v in vars(lr_scheduler).items()
             if isinstance(v, type) and issubclass(v, lr_scheduler.LRScheduler)}
    scheduler: Any
    if name == "SequentialLR":
        scheduler = lr_scheduler.SequentialLR(optimizer, parts, milestones=config["milestones"])
    elif name == "ChainedScheduler":
        scheduler = lr_scheduler.ChainedScheduler(parts)
    elif name in known:
        try:
            scheduler = getattr(lr_scheduler, str(name))(optimizer, **(config.get("args") or {}))
        except TypeError as error:
            raise ValueError(f"{where} ({name}): {error}") from error
    else:
        raise ValueError(f"{where}.name is {name!r}. {closest(name, known)}")
    return {"scheduler": scheduler, "interval": interval}


def check_loss(loss: Mapping[str, Any]) -> None:
    """Every ``lambda_*`` must be known, a valid schedule, and threestudio's three be there."""
    check_keys(loss, LAMBDAS, "system.loss")
    for key in REQUIRED_LAMBDAS:
        if key not in loss:
            raise ValueError(f"system.loss.{key} is missing; write {key}: 0. to turn it off.")
    for key, value in loss.items():
        try:
            schedule(value, 0, 0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"system.loss.{key} is {value!r}: {error}") from error


class DreamFusionSystem(pl.LightningModule):
    """Field, material, background and renderer with the losses around the guidance.

    The parts are built by the engine from the config; ``make_guidance`` and
    ``make_prompt_processor`` are called with the device when training starts, so that testing and
    exporting need no diffusion model. Neither enters a checkpoint.
    """

    def __init__(
        self,
        cfg: SystemConfig,
        parts: Mapping[str, nn.Module],
        make_guidance: Callable[[torch.device], Any],
        make_prompt_processor: Callable[[torch.device], Any],
        save_dir: str | Path,
        seed: int = 0,
        placement: export.Placement | None = None,
    ) -> None:
        super().__init__()
        check_loss(cfg.loss)
        self.cfg, self.seed, self.save_dir = cfg, seed, Path(save_dir)
        self.placement = placement or export.Placement()
        self.geometry, self.material = parts["geometry"], parts["material"]
        self.background = parts["background"]
        self.renderer: Any = parts["renderer"]
        self._make_guidance, self._make_prompt_processor = make_guidance, make_prompt_processor
        self.guidance: Any = None
        self.prompt_processor: Any = None
        self._restored: tuple[int, int] | None = None
        self._started: float | None = None
        self._seconds_before = 0.0
        self._frames: list[Path] = []
        if cfg.weights is not None:
            self.load_weights(cfg.weights, cfg.weights_ignore_modules or [])

    # --- state -----------------------------------------------------------------------------

    @property
    def true_global_step(self) -> int:
        """The step of the field: the trainer's, or the checkpoint's when only evaluating."""
        return self._restored[1] if self._restored else self.global_step

    @property
    def true_current_epoch(self) -> int:
        """The epoch that belongs to :attr:`true_global_step`."""
        return self._restored[0] if self._restored else self.current_epoch

    def load_weights(self, path: str, ignore: list[str]) -> tuple[int, int]:
        """Load a checkpoint's field without its optimiser; returns its (epoch, global step)."""
        saved = load_checkpoint(path)
        state = {k: v for k, v in saved["state_dict"].items()
                 if not any(k.startswith(f"{name}.") for name in ignore)}
        self.check_shapes(state)
        missing, unexpected = self.load_state_dict(state, strict=False)
        if missing or unexpected:
            logger.warning("%s: %d values of this field are not in it and %d of its values are "
                           "not used.", path, len(missing), len(unexpected))
        self._seconds_before = float(saved.get("gps_guidance", {}).get("seconds", 0.0))
        epoch, step = int(saved["epoch"]), int(saved["global_step"])
        self.update_parts(epoch, step, on_load_weights=True)
        return epoch, step

    def restore(self, path: str) -> None:
        """Load a checkpoint for evaluation or export."""
        self._restored = self.load_weights(path, [])

    def update_parts(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Tell every part that has a schedule which step comes."""
        part: Any
        for part in (self.geometry, self.material, self.background, self.renderer, self.guidance,
                     self.prompt_processor):
            if hasattr(part, "update_step"):
                part.update_step(epoch, global_step, on_load_weights=on_load_weights)

    @property
    def training_seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        now = 0.0 if self._started is None else time.monotonic() - self._started
        return self._seconds_before + now

    def check_shapes(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if a checkpoint's field has other shapes than this one."""
        for name, value in self.state_dict().items():
            there = state.get(name)
            if isinstance(there, Tensor) and there.shape != value.shape:
                raise ValueError(
                    f"The checkpoint was made with another geometry, material or background than "
                    f"this config's: {name} is {list(there.shape)} there, {list(value.shape)} here."
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gps_guidance"] = {"seed": self.seed, "seconds": self.training_seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_shapes(checkpoint["state_dict"])
        differing = sorted(set(checkpoint["state_dict"]) ^ set(self.state_dict()))
        if differing:
            raise ValueError("The checkpoint was made with another geometry, material or "
                             f"background than this config's: {differing[0]} is in one only.")
        ours = checkpoint.get("gps_guidance", {})
        self._seconds_before = float(ours.get("seconds", 0.0))
        if ours.get("seed", self.seed) != self.seed:
            logger.warning("The checkpoint was made with seed %s, this config says %s: the steps "
                           "to come differ from an uninterrupted run's.", ours["seed"], self.seed)

    # --- training --------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.cfg.optimizer, self)
        if self.cfg.scheduler is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer,
                "lr_scheduler": build_scheduler(self.cfg.scheduler, optimizer)}

    def on_fit_start(self) -> None:
        self.prompt_processor = self._make_prompt_processor(self.device)
        self.guidance = self._make_guidance(self.device)

    def on_train_start(self) -> None:
        self._started = time.monotonic()

    def on_train_end(self) -> None:
        self._seconds_before, self._started = self.training_seconds, None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.seed, self.global_step)
        self.update_parts(self.current_epoch, self.global_step)
        self.renderer.wants_normals = self.weight("lambda_orient") > 0

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return self.renderer(**batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # Lightning fetches a batch ahead of its step, before the step's seed: cameras are drawn
        # here instead, and what the loader gave is not used.
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        drawn = datamodule.sample(self.current_epoch, self.global_step)
        batch = self.transfer_batch_to_device(drawn, self.device, 0)
        out = self(batch)
        terms, facts = self.guidance_terms(out, batch)
        terms.update(self.regularisers(out))
        loss = out["comp_rgb"].new_zeros(())
        for name, value in terms.items():
            loss = loss + value * self.weight(f"lambda_{name}")
        logged: dict[str, Any] = {f"train/loss_{name}": value for name, value in terms.items()}
        logged.update({f"train/{name}": value for name, value in facts.items()})
        logged.update({f"train_params/{name}": self.weight(name) for name in self.cfg.loss})
        self.log_dict({k: torch.as_tensor(v, dtype=torch.float32) for k, v in logged.items()},
                      batch_size=1)
        self.log("loss", loss, prog_bar=True, batch_size=1)
        return loss

    def weight(self, name: str) -> float:
        """The present value of ``system.loss.<name>``; ValueError if the key is missing."""
        if name not in self.cfg.loss:
            term = name.replace("lambda_", "loss_")
            raise ValueError(f"system.loss.{name} is missing, but the guidance "
                             f"({self.cfg.guidance_type}) returns {term}: add {name}: 1.0 or 0.")
        return schedule(self.cfg.loss[name], self.true_current_epoch, self.true_global_step)

    def guidance_terms(self, out: Mapping[str, Any],
                       batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The guidance's losses by name, and its other scalars for the log."""
        with torch.autocast(self.device.type, enabled=False):  # it chooses its own precision
            result = self.guidance(out["comp_rgb"].float(), self.prompt_processor(), **batch,
                                   rgb_as_latents=False)
        terms = {k.removeprefix("loss_"): v for k, v in result.items() if k.startswith("loss_")}
        facts = {k: v for k, v in result.items() if not k.startswith("loss_")
                 and not (isinstance(v, Tensor) and v.numel() > 1)}
        return terms, facts

    def regularisers(self, out: Mapping[str, Any]) -> dict[str, Tensor]:
        """Orientation (only while its weight is positive), sparsity, opaqueness, z-variance."""
        terms = {"sparsity": sparsity_loss(out["opacity"]), "opaque": opaque_loss(out["opacity"])}
        if self.weight("lambda_orient") > 0:
            if "normal" not in out:
                raise ValueError("system.loss.lambda_orient is positive but the renderer gives no "
                                 "normals: set system.geometry.normal_type, or lambda_orient: 0.")
            terms["orient"] = orientation_loss(
                out["weights"], out["normal"], out["t_dirs"], out["opacity"])
        if "z_variance" in out and "lambda_z_variance" in self.cfg.loss:
            terms["z_variance"] = z_variance_loss(out["z_variance"], out["opacity"])
        return terms

    # --- evaluation ------------------------------------------------------------------------

    def panel(self, batch: Mapping[str, Any]) -> Any:
        """One view: colour, normal (if rendered) and opacity side by side [H, 3W, 3] uint8."""
        out = self(batch)
        names = ("comp_rgb", "comp_normal", "opacity")
        return export.side_by_side([out[name][0] for name in names if name in out])

    def on_validation_batch_start(self, batch: Any, batch_idx: int, loader: int = 0) -> None:
        self.update_parts(self.true_current_epoch, self.true_global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        index = int(batch["index"][0])
        name = f"it{self.true_global_step}-{index}.png"
        export.write_png(self.save_dir / name, self.panel(batch))

    def on_validation_batch_end(self, out: Any, batch: Any, batch_idx: int,
                                loader: int = 0) -> None:
        if self.cfg.cleanup_after_validation_step:
            free_memory()

    def on_test_start(self) -> None:
        self._frames = []

    def on_test_batch_start(self, batch: Any, batch_idx: int, loader: int = 0) -> None:
        self.update_parts(self.true_current_epoch, self.true_global_step)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        index = int(batch["index"][0])
        path = self.save_dir / f"it{self.true_global_step}-test" / f"{index}.png"
        self._frames.append(export.write_png(path, self.panel(batch)))

    def on_test_batch_end(self, out: Any, batch: Any, batch_idx: int, loader: int = 0) -> None:
        if self.cfg.cleanup_after_test_step:
            free_memory()

    def on_test_epoch_end(self) -> None:
        if not self._frames:
            return
        stem = self.save_dir / f"it{self.true_global_step}-test"
        frames = (export.read_png(path) for path in self._frames)
        export.write_video(frames, stem.with_suffix(".mp4"), fps=30)
        chosen = self._frames[:: max(1, len(self._frames) // 12)][:12]
        still = export.image_grid([export.read_png(path) for path in chosen], columns=3)
        export.write_png(stem.parent / f"{stem.name}-grid.png", still)
        logger.info("Test renders: %s.mp4", stem)


def free_memory() -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
