"""One training loop for angle models: fine-tune a base, or train the tiny networks from scratch.

Everything random in step n is drawn from (seed, n), so that a run which stops and resumes from a
checkpoint continues exactly.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gps_guidance import geo
from gps_guidance.autoencoder import latent_shape, reconstruction_psnr, vae_loss, whiten_latents
from gps_guidance.dataset import Photos, dither_bins, encode_latents, load_photos
from gps_guidance.encoders import AngleEncoder, check_null_text
from gps_guidance.miniature.nets import tiny_model
from gps_guidance.models import DiffusionModel, load_model, save_module
from gps_guidance.recipe import AngleRecipe
from gps_guidance.sampling import sample_angles, sample_texts

log = logging.getLogger(__name__)


def train_angle(dataset: str | Path, output_dir: str | Path, recipe: AngleRecipe,
                class_data_dir: str | Path | None = None) -> Path:
    """Train an angle model on a dataset folder and save it under ``output_dir``; returns that.

    The folder also gets ``recipe.yaml``, ``angle_loss.csv``, ``vae_loss.csv``, ``loss.png`` and
    ``samples-*.png``. Run again after a stop and it resumes from its last checkpoint; ValueError
    if the folder already holds a finished model.
    """
    out = Path(output_dir)
    if (out / "gps_encoder").is_dir():
        raise ValueError(f"{out} already holds a finished angle model. Give another --out folder, "
                         "or remove it to train again.")
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if recipe.save_dtype not in dtypes:
        raise ValueError(f"The recipe's save_dtype is {recipe.save_dtype!r}; it must be one of "
                         f"{', '.join(dtypes)}.")
    if recipe.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"The recipe's mixed_precision is {recipe.mixed_precision!r}; it must be "
                         "no or bf16: the gradients of fp16 would need scaling.")
    check_null_text(recipe.null_text)
    dtype = dtypes[recipe.save_dtype]
    photos = load_photos(dataset, recipe.size)
    _warn_empty_bins(photos, recipe.num_bins)
    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(asdict(recipe)), out / "recipe.yaml")
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    model = _start_model(recipe, photos)
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    if any(side % factor for side in recipe.size):
        raise ValueError(f"The recipe's resolution is {recipe.resolution}; with this VAE, sides "
                         f"must be multiples of {factor} pixels.")
    model.to(accelerator.device)
    if recipe.base == "tiny":
        _train_vae(model, photos, recipe, out, accelerator)
    prior = None
    if recipe.with_prior_preservation:
        folder = Path(class_data_dir or out / "class_images")
        prior = _prior_latents(model, recipe, folder)
    latents = encode_latents(photos, model.vae, recipe.crops_per_photo, recipe.seed,
                             recipe.min_zoom, recipe.colour_jitter)
    _train_unet(model, photos, latents, prior, recipe, out, accelerator)
    for module in model.modules().values():
        module.to(dtype)
    model.save_pretrained(out)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return out


def _warn_empty_bins(photos: Photos, num_bins: int) -> None:
    counts = np.bincount(geo.bearing_bin(photos.bearings, num_bins), minlength=num_bins)
    empty = [f"{geo.bin_bearing_deg(k, num_bins):.0f}" for k in np.flatnonzero(counts == 0)]
    if empty:
        log.warning(
            "no photo in the bins around %s degrees: the model has to guess those sides. Add "
            "photos taken from there, or expect the landmark to be vague from them.",
            ", ".join(empty),
        )


def _start_model(recipe: AngleRecipe, photos: Photos) -> DiffusionModel:
    torch.manual_seed(recipe.seed)
    if recipe.base == "tiny":
        model = tiny_model(photos.landmark, photos.center, recipe.resolution, recipe.num_bins)
        model.angle.register_to_config(prompt=recipe.prompt, null_text=recipe.null_text)
        return model
    model = load_model(recipe.base)
    model.gps_encoder = AngleEncoder(
        cross_attention_dim=model.unet.config.cross_attention_dim, num_bins=recipe.num_bins,
        resolution=recipe.resolution, landmark=photos.landmark, center=photos.center,
        prompt=recipe.prompt, null_text=recipe.null_text,
    )
    return model


class _Run:
    """What both stages share: optimiser, learning-rate schedule, moving average, checkpoints."""

    def __init__(self, name: str, modules: dict[str, Any], steps: int, learning_rate: float,
                 recipe: AngleRecipe, out: Path, schedule: str, warmup: int) -> None:
        self.name, self.modules, self.steps, self.out = name, modules, steps, out
        self.limit = recipe.checkpoints_total_limit
        self.every = recipe.checkpointing_steps
        for module in modules.values():
            module.requires_grad_(True).train()
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, weight_decay=recipe.adam_weight_decay, fused=True
        )
        self.schedule = get_scheduler(
            schedule, self.optimizer, num_warmup_steps=warmup, num_training_steps=steps
        )
        self.ema = EMAModel(self.parameters, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.rows: list[tuple[int, float]] = []
        self.step = 0
        self.max_grad_norm, self.seed = recipe.max_grad_norm, recipe.seed

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def resume(self) -> None:
        """Continue from the newest checkpoint of this stage, if there is one."""
        found = sorted(self.folder.glob(f"{self.name}-*.pt"))
        if not found:
            return
        state = torch.load(found[-1], weights_only=True, map_location="cpu")
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.parameters[0].device)
        self.step, self.rows = state["step"], state["rows"]
        log.info("resumed %s at step %d from %s", self.name, self.step, found[-1])

    def save(self) -> None:
        """Write a checkpoint under a temporary name, then rename it, then drop the oldest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "step": self.step,
            "rows": self.rows,
        }
        path = self.folder / f"{self.name}-{self.step:07d}.pt"
        stage = path.with_suffix(".tmp")
        try:
            with open(stage, "wb") as file:  # given a path, a full disk would be a RuntimeError
                torch.save(state, file)
            os.replace(stage, path)
        finally:
            stage.unlink(missing_ok=True)
        for old in sorted(self.folder.glob(f"{self.name}-*.pt"))[: -self.limit]:
            old.unlink()

    def loop(self, accelerator: Accelerator, loss_of_step: Callable[[int], Tensor],
             after_step: Callable[[], None] | None = None) -> None:
        """Optimise ``loss_of_step`` to the last step, then put the averaged weights in place."""
        self.resume()
        began, shown = time.monotonic(), None
        with tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step") as bar:
            try:
                while self.step < self.steps:
                    torch.manual_seed(_step_seed(self.name, self.step, self.seed))
                    loss = loss_of_step(self.step)
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise ValueError(f"The loss of {self.name} is {value} at step {self.step}: "
                                         "lower its learning rate.")
                    accelerator.backward(loss)
                    torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
                    with _held_back_interrupt():
                        self._update(value)
                    shown = value if shown is None else 0.98 * shown + 0.02 * value
                    bar.update()
                    bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
                    if self.step < self.steps and self.every and self.step % self.every == 0:
                        self.save()
                    if self.step < self.steps and after_step is not None:
                        after_step()
            except KeyboardInterrupt:
                self.save()
                log.info("stopped %s at step %d of %d, saved in %s", self.name, self.step,
                         self.steps, self.folder)
                raise
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        log.info("%s: %d steps in %.0f s", self.name, self.step, time.monotonic() - began)
        self._write_losses()

    def _update(self, loss: float) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.step += 1
        self.rows.append((self.step, loss))

    def _write_losses(self) -> None:
        with open(self.out / f"{self.name}_loss.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss"])
            writer.writerows((step, f"{loss:.6f}") for step, loss in self.rows)
        plot_losses(self.out)


@contextlib.contextmanager
def _held_back_interrupt() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: a checkpoint never holds half an update."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
    if caught and callable(before):
        before(signal.SIGINT, None)


def plot_losses(out: Path) -> None:
    """Draw every ``*_loss.csv`` of a model folder, raw and averaged, as ``loss.png``."""
    files = sorted(out.glob("*_loss.csv"), reverse=True)
    figure = Figure(figsize=(5 * len(files), 3.2), layout="constrained")
    for axes, file in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        steps, losses = np.loadtxt(file, delimiter=",", skiprows=1, ndmin=2).T
        window = max(1, len(losses) // 50)
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps, losses, color="0.8", linewidth=0.5)
        axes.plot(steps[window - 1 :], mean)
        axes.set(title=file.stem.removesuffix("_loss"), xlabel="step", ylabel="loss",
                 ylim=(0, float(np.quantile(losses, 0.995)) * 1.1))
    figure.savefig(out / "loss.png", dpi=100)


def _step_seed(name: str, step: int, seed: int) -> int:
    return int(np.random.SeedSequence([seed, sum(name.encode()), step]).generate_state(1)[0])


def _train_vae(model: DiffusionModel, photos: Photos, recipe: AngleRecipe, out: Path,
               accelerator: Accelerator) -> None:
    """Train the tiny VAE on crops, then whiten its latents (scaling_factor stays 1)."""
    done = out / "vae"
    vae = model.vae.to(memory_format=torch.channels_last)
    if (done / "config.json").is_file():
        saved = type(vae).from_pretrained(done, use_safetensors=True).to(accelerator.device)
        # The layout decides how sums are rounded, so that a resumed run needs the same one.
        model.vae = saved.to(memory_format=torch.channels_last).requires_grad_(False).eval()
        return
    shape = latent_shape(vae, recipe.size)
    jitter = max(recipe.colour_jitter, 0.1)

    def loss_of_step(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 3, step))
        picks = rng.integers(len(photos), size=recipe.vae_batch_size)
        images = photos.crop(picks, rng, recipe.min_zoom, jitter).to(accelerator.device)
        noise = torch.randn(len(images), *shape).to(accelerator.device)
        with accelerator.autocast():
            return vae_loss(vae, images, recipe.vae_kl_weight, noise)[0]

    run = _Run("vae", {"vae": vae}, recipe.vae_steps, recipe.vae_learning_rate, recipe, out,
               "cosine", min(50, recipe.vae_steps // 10))
    run.loop(accelerator, loss_of_step)
    vae.requires_grad_(False).eval()
    rng = np.random.default_rng((recipe.seed, 5))
    before = reconstruction_psnr(vae, photos)
    batches = (
        photos.crop(rng.integers(len(photos), size=16), rng, recipe.min_zoom).to(accelerator.device)
        for _ in range(16)
    )
    whiten_latents(vae, batches)
    log.info("VAE: %.2f dB on training crops (%.2f before whitening)",
             reconstruction_psnr(vae, photos), before)
    save_module(vae, done)


@torch.no_grad()
def _prior_latents(model: DiffusionModel, recipe: AngleRecipe, folder: Path) -> Tensor:
    """Latent moments [N, 2C, h, w] of images that the base model makes of the fixed prompt.

    They are generated once (A.2.1), kept as PNG under ``folder`` and reused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    height, width = recipe.size
    for index in tqdm(range(recipe.num_class_images), desc="prior images", unit="image"):
        path = folder / f"{index:05d}.png"
        if not path.is_file():
            seed = _step_seed("prior", index, recipe.seed)
            image = sample_texts(model, [model.angle.prompt], (height, width), 7.5, seed=seed)[0]
            pixels = (image.permute(1, 2, 0) * 255).byte().cpu().numpy()
            Image.fromarray(pixels).save(path.with_suffix(".part"), "PNG")
            os.replace(path.with_suffix(".part"), path)
    moments = []
    for index in range(recipe.num_class_images):
        with Image.open(folder / f"{index:05d}.png") as png:
            pixels = np.asarray(png.convert("RGB").resize((width, height)))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        moments.append(model.vae.encode(image.to(model.vae.device)).latent_dist.parameters.cpu())
    return torch.cat(moments)


def draw_latents(moments: Tensor, scaling_factor: float) -> Tensor:
    """A posterior sample [B, C, h, w] of moments (mean, logvar) [B, 2C, h, w]."""
    mean, logvar = moments.float().chunk(2, dim=1)
    std = (0.5 * logvar.clamp(-30, 20)).exp()
    return (mean + std * torch.randn_like(mean)) * scaling_factor


def drop_conditions(text: Tensor, angle: Tensor, null_text: Tensor, draw: Tensor,
                    condition_dropout: float, angle_dropout: float) -> tuple[Tensor, Tensor]:
    """Condition dropout from one draw in [0, 1) for each sample [B].

    Below ``condition_dropout`` text [B, L, D] and angle [B, 1, D] are both nulled, as Eq. 7's
    unconditional branch needs; in the next ``angle_dropout`` only the angle is.
    """
    both = (draw < condition_dropout)[:, None, None]
    angle_only = (draw < condition_dropout + angle_dropout)[:, None, None]
    return torch.where(both, null_text, text), torch.where(angle_only, 0.0, angle)


def denoising_loss(model: DiffusionModel, latents: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 6: mean squared error of the predicted noise, uniform time steps; a scalar."""
    noise = torch.randn_like(latents)
    steps = model.scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(latents),), device=latents.device)
    noisy = model.scheduler.add_noise(latents, noise, timesteps)
    return F.mse_loss(model.unet(noisy, timesteps, tokens).sample.float(), noise)


def _train_unet(model: DiffusionModel, photos: Photos, moments: Tensor, prior: Tensor | None,
                recipe: AngleRecipe, out: Path, accelerator: Accelerator) -> None:
    """Eq. 6 + lambda Eq. 9 on cached latents. The text encoder trains only with tiny networks."""
    model.vae.requires_grad_(False).eval()
    trained: dict[str, Any] = {"unet": model.unet, "gps_encoder": model.angle}
    if recipe.base == "tiny":
        trained["text_encoder"] = model.text_encoder
    weights = photos.bin_weights(recipe.num_bins, recipe.balance_bins)
    bins = geo.bearing_bin(photos.bearings, recipe.num_bins)
    nearest = geo.bin_bearing_deg(bins, recipe.num_bins)
    scaling, device = model.vae.config.scaling_factor, accelerator.device
    first_null = model.null_text(1).detach()
    learned_null = "text_encoder" in trained and recipe.null_text == "empty"

    def loss_of_step(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 11, step))
        picks = rng.choice(len(photos), size=recipe.train_batch_size, p=weights)
        crops = rng.integers(moments.shape[1], size=len(picks))
        bearings = nearest[picks]
        if recipe.dither_bins:
            bearings = dither_bins(photos.bearings[picks], rng, recipe.num_bins)
        latents = draw_latents(moments[picks, crops].to(device), scaling)
        draw = torch.from_numpy(rng.random(len(picks))).to(device)
        with accelerator.autocast():
            prompt = model.encode_text([model.angle.prompt])
            null = model.null_text(1) if learned_null else first_null
            text, angle = drop_conditions(
                prompt.expand(len(picks), -1, -1), model.angle(torch.from_numpy(bearings)), null,
                draw, recipe.condition_dropout, recipe.angle_dropout,
            )
            loss = denoising_loss(model, latents, torch.cat([text, angle], dim=1))
            if prior is not None:
                chosen = rng.integers(len(prior), size=len(picks))
                latents = draw_latents(prior[chosen].to(device), scaling)
                zeros = model.angle.null(len(picks))
                tokens = torch.cat([prompt.expand(len(picks), -1, -1), zeros], dim=1)
                loss = loss + recipe.prior_loss_weight * denoising_loss(model, latents, tokens)
        return loss

    run = _Run("angle", trained, recipe.max_train_steps, recipe.learning_rate, recipe, out,
               recipe.lr_scheduler, recipe.lr_warmup_steps)

    def validate() -> None:
        if recipe.validation_steps and run.step % recipe.validation_steps == 0:
            _validation_grid(model, run, out)

    run.loop(accelerator, loss_of_step, validate)
    model.freeze()
    _validation_grid(model, run, out)


@torch.no_grad()
def _validation_grid(model: DiffusionModel, run: _Run, out: Path) -> None:
    """Twelve bearings round the landmark, as ``samples-<step>.png``, from the averaged weights."""
    averaged = run.ema if run.step < run.steps else None
    if averaged is not None:
        averaged.store(run.parameters)
    try:
        if averaged is not None:
            averaged.copy_to(run.parameters)
        model.unet.eval()
        bearings = [30.0 * k for k in range(12)]
        images = sample_angles(model, bearings, 2.0, num_inference_steps=30, seed=1)
    finally:  # Ctrl-C here would otherwise save averaged weights as the trained ones
        if averaged is not None:
            averaged.restore(run.parameters)
        model.unet.train(run.step < run.steps)
    rows = [torch.cat(list(images[k : k + 6]), dim=2) for k in (0, 6)]
    grid = torch.cat(rows, dim=1).permute(1, 2, 0).mul(255).byte().cpu().numpy()
    Image.fromarray(grid).save(out / f"samples-{run.step:06d}.png")
