"""Training of text, GPS and angle models: fine-tune a base, or the tiny networks from scratch.

One way for the three kinds: photos become latents, then the UNet learns to remove their noise
given tokens. What the tokens are is in ``conditions``, the loop itself in ``loop``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import compute_snr
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gps_guidance.autoencoder import latent_shape, reconstruction_psnr, vae_loss, whiten_latents
from gps_guidance.card import write_card
from gps_guidance.conditions import Conditions, conditions_of
from gps_guidance.dataset import Photos, load_photos
from gps_guidance.draws import Draws, draw_timesteps, dropped
from gps_guidance.encoders import check_null_text
from gps_guidance.hub import create_repository, push, repository_name
from gps_guidance.interrupts import sigterm_as_ctrl_c
from gps_guidance.latents import Rows, photo_latents, text_embeddings
from gps_guidance.loop import Batch, Course, Run, start_accelerator, step_seed
from gps_guidance.lora import LORA_WEIGHT_NAME_SAFE
from gps_guidance.lora_training import add_lora, lora_layers, save_lora
from gps_guidance.miniature.nets import TEXT_DIM, tiny_model
from gps_guidance.models import (
    PIPELINES,
    DiffusionModel,
    load_model,
    load_vae,
    save_module,
)
from gps_guidance.parts import missing_parts
from gps_guidance.photos.manifest import write_whole
from gps_guidance.recipe import AngleRecipe, Recipe
from gps_guidance.sampling import sample_texts
from gps_guidance.sharding import restore_modules, shard
from gps_guidance.training_report import write_training_report

log = logging.getLogger(__name__)

DROPPED = ("all", "place", "text", "nothing")  # what the numbers of draws.dropped mean


@sigterm_as_ctrl_c()
def train_model(dataset: str | Path, output_dir: str | Path, recipe: Recipe,
                class_data_dir: str | Path | None = None) -> Path:
    """Train a model of the recipe's kind on a dataset folder and save it under ``output_dir``.

    The folder, which is returned, also gets ``recipe.yaml``, ``<kind>_loss.csv``, ``vae_loss.csv``,
    ``loss.png``, ``samples-*.png`` and ``train_report.html``. Run again after a stop and it resumes
    from its last checkpoint. ``class_data_dir`` keeps the images of prior preservation (angle
    models). With ``push_to_hub`` the main process then uploads it. ValueError if the folder already
    holds a finished model, if dataset and recipe do not fit, or if the Hub cannot be written to,
    which is seen at once.
    """
    out = Path(output_dir)
    _check_unfinished(out, recipe)
    recipe.check()
    check_null_text(recipe.null_text)
    if class_data_dir is not None and not isinstance(recipe, AngleRecipe):
        raise ValueError(f"class_data_dir is for prior preservation, which train {recipe.kind} "
                         "does not have: leave --class-data-dir out.")
    accelerator = start_accelerator(recipe, out)
    if recipe.push_to_hub and accelerator.is_main_process:
        create_repository(recipe.hub_model_id or repository_name(out), recipe.hub_private_repo)
    photos = load_photos(dataset, recipe.size, need_bearings=isinstance(recipe, AngleRecipe),
                         in_memory=recipe.base == "tiny")  # its VAE sees each photo many times
    conditions = conditions_of(recipe, photos)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(asdict(recipe)), out / "recipe.yaml")
    model = _start_model(recipe, conditions)
    model.to(accelerator.device)
    courses: list[Course] = []
    if recipe.base == "tiny" and recipe.vae_steps:
        courses += _train_vae(model, photos, recipe, out, accelerator)
    prior, prior_images = None, None
    if isinstance(recipe, AngleRecipe) and recipe.with_prior_preservation:
        prior_images = Path(class_data_dir or out / "class_images")
        prior = _prior_latents(model, recipe, prior_images, accelerator)
    place = out / "latents" if recipe.cache_dir == "auto" else recipe.cache_dir
    cache = None if place is None else Path(place).expanduser()
    latents = photo_latents(photos, model.vae, recipe, cache, accelerator)
    courses.append(
        _train_unet(model, conditions, latents, prior, recipe, out, accelerator, cache))
    if accelerator.is_main_process:
        _save_model(model, recipe, out)
        write_training_report(out, Path(dataset).resolve().name, conditions, courses, prior_images,
                              accelerator)
    accelerator.wait_for_everyone()
    if recipe.push_to_hub and accelerator.is_main_process:  # the others need not wait for it
        push(out, recipe.hub_model_id, recipe.hub_private_repo)
    return out


def _save_model(model: DiffusionModel, recipe: Recipe, out: Path) -> None:
    """The whole model, or what LoRA added to its base; with a card, where it knows places."""
    dtype = getattr(torch, recipe.save_dtype)
    if recipe.kind != "text":
        write_card(out, model.gps_encoder, lora_base=recipe.base if recipe.lora_rank else None)
    if recipe.lora_rank:
        save_lora(model, out, dtype)
    else:
        for module in model.modules().values():
            module.to(dtype)
        model.save_pretrained(out)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if recipe.cache_dir == "auto":  # a VAE decodes latents: a model to share has none
        shutil.rmtree(out / "latents", ignore_errors=True)


def _check_unfinished(out: Path, recipe: Recipe) -> None:
    """Refuse a folder with a finished model, unless it is ours and was not saved to the end."""
    whole = not missing_parts(out)
    index = out / "model_index.json"  # it names an encoder before that is there
    half_saved = ((out / f"{recipe.kind}_loss.csv").is_file() and index.is_file()
                  and PIPELINES[1] in index.read_text("utf-8"))
    finished = any((out / name).exists() for name in ("gps_encoder", LORA_WEIGHT_NAME_SAFE))
    if finished or (whole and not half_saved):
        upload = f" To upload it: gps-guidance push {out}." if recipe.push_to_hub else ""
        raise ValueError(f"{out} already holds a finished model. Give another --out folder, or "
                         f"remove it to train again.{upload}")


def _start_model(recipe: Recipe, conditions: Conditions) -> DiffusionModel:
    """The base with a fresh encoder; ValueError if the recipe does not fit its networks."""
    torch.manual_seed(recipe.seed)
    if recipe.base == "tiny":
        encoder = conditions.encoder(TEXT_DIM)  # first: the order decides the random weights
        model = tiny_model(conditions.words, encoder)
        if recipe.pretrained_vae_model_name_or_path is not None:
            model.vae = load_vae(recipe.pretrained_vae_model_name_or_path)
    else:
        model = load_model(recipe.base)
        model.gps_encoder = conditions.encoder(model.unet.config.cross_attention_dim)
        if recipe.lora_rank:
            add_lora(model, recipe)
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    if any(side % factor for side in recipe.size):
        raise ValueError(f"The recipe's resolution is {recipe.resolution}; with this VAE, sides "
                         f"must be multiples of {factor} pixels.")
    steps = model.scheduler.config.num_train_timesteps
    if not 0 < recipe.high_noise_from < steps:
        raise ValueError(f"The recipe's high_noise_from is {recipe.high_noise_from}; it must lie "
                         f"between 0 and the {steps} time steps of the base.")
    if not isinstance(recipe, AngleRecipe):  # an angle encoder's config says the size
        height, width = (side // factor for side in recipe.size)
        size = height if height == width else (height, width)
        model.unet.register_to_config(sample_size=size)
    predicts = model.scheduler.config.prediction_type
    if predicts not in ("epsilon", "v_prediction"):
        raise ValueError(f"The scheduler of {recipe.base} has prediction_type {predicts!r}; only "
                         "epsilon and v_prediction can be trained.")
    limit = model.tokenizer.model_max_length
    long = [text for text in conditions.words if len(model.tokenizer(text).input_ids) > limit]
    if long:
        log.warning("%d of %d texts have more than the %d tokens that the text encoder reads; the "
                    "rest is cut off.", len(long), len(conditions.words), limit)
    return model


def _train_vae(model: DiffusionModel, photos: Photos, recipe: Recipe, out: Path,
               accelerator: Accelerator) -> list[Course]:
    """Train the tiny VAE on crops, then whiten its latents (scaling_factor stays 1); returns how it
    went, if that is still known."""
    done = out / "checkpoints" / "vae"  # out / "vae" may be one in save_dtype
    vae = model.vae
    if (done / "config.json").is_file():
        saved = type(vae).from_pretrained(done, use_safetensors=True).to(accelerator.device)
        model.vae = saved.requires_grad_(False).eval()
        kept = done.with_suffix(".json")
        return [Course(**json.loads(kept.read_text("utf-8")))] if kept.is_file() else []
    shape = latent_shape(vae, recipe.size)
    jitter = max(recipe.colour_jitter, 0.1)

    size, processes = recipe.vae_batch_size, accelerator.num_processes

    def draw(step: int) -> Batch:
        rng = np.random.default_rng((recipe.seed, 3, step))
        picks = rng.integers(len(photos), size=size * processes)
        images = photos.crop(picks, rng, recipe.min_zoom, jitter, recipe.random_flip)
        noise = torch.randn(len(images), *shape)
        parts = zip(images.split(size), noise.split(size), strict=True)
        return Batch(list(parts)[accelerator.process_index :: processes], len(images))

    def loss(part: tuple[Tensor, Tensor]) -> Tensor:
        images, noise = (tensor.to(accelerator.device) for tensor in part)
        with accelerator.autocast():
            return vae_loss(vae, images, recipe.vae_kl_weight, noise)[0]

    run = Run("vae", {"vae": vae}, recipe.vae_steps, lambda _: recipe.vae_learning_rate, recipe,
              out, "cosine", min(50, recipe.vae_steps // 10))
    run.loop(accelerator, draw, loss)
    vae.requires_grad_(False).eval()
    rng = np.random.default_rng((recipe.seed, 5))
    before = reconstruction_psnr(vae, photos)
    batches = (
        photos.crop(rng.integers(len(photos), size=16), rng, recipe.min_zoom).to(accelerator.device)
        for _ in range(16)
    )
    whiten_latents(vae, batches)
    course = replace(run.course, psnr_db=reconstruction_psnr(vae, photos))
    log.info("VAE: %.2f dB on training crops (%.2f before whitening)", course.psnr_db, before)
    if accelerator.is_main_process:
        done.parent.mkdir(parents=True, exist_ok=True)
        write_whole(done.with_suffix(".json"), json.dumps(asdict(course)).encode())
        save_module(vae, done)  # last: who finds it has the other
    accelerator.wait_for_everyone()
    return [course]


@torch.no_grad()
def _prior_latents(model: DiffusionModel, recipe: AngleRecipe, folder: Path,
                   accelerator: Accelerator) -> Tensor:
    """Latent moments [N, 2C, h, w] of images that the base model makes of the fixed prompt.

    They are generated once (A.2.1), by all processes in turn, kept as PNG under ``folder`` and
    reused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    height, width = recipe.size
    own = range(accelerator.process_index, recipe.num_class_images, accelerator.num_processes)
    for index in tqdm(own, desc="prior images", unit="image"):
        path = folder / f"{index:05d}.png"
        if not path.is_file():
            seed = step_seed("prior", index, recipe.seed)
            image = sample_texts(model, [model.angle.prompt], (height, width), 7.5, seed=seed)[0]
            pixels = (image.permute(1, 2, 0) * 255).byte().cpu().numpy()
            Image.fromarray(pixels).save(path.with_suffix(".part"), "PNG")
            os.replace(path.with_suffix(".part"), path)
    accelerator.wait_for_everyone()
    moments = []
    for index in range(recipe.num_class_images):
        with Image.open(folder / f"{index:05d}.png") as png:
            pixels = np.asarray(png.convert("RGB").resize((width, height)))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        moments.append(model.vae.encode(image.to(model.vae.device)).latent_dist.parameters.cpu())
    return torch.cat(moments)


def draw_latents(moments: Tensor, scaling_factor: float, noise: Tensor) -> Tensor:
    """A posterior sample [B, C, h, w] of moments (mean, logvar) [B, 2C, h, w], by ``noise``."""
    mean, logvar = moments.float().chunk(2, dim=1)
    std = (0.5 * logvar.clamp(-30, 20)).exp()
    return (mean + std * noise) * scaling_factor


def drop_conditions(text: Tensor, place: Tensor, null_text: Tensor, which: Tensor
                    ) -> tuple[Tensor, Tensor]:
    """Drop of each sample [B] what ``dropped`` says.

    Dropped text [B, L, D] becomes ``null_text``, dropped place tokens [B, K, D] become zeros, as
    the e(p, 0) and e(0, 0) of Eq. 4 and Eq. 7 need.
    """
    which = which[:, None, None]
    no_text, no_place = (which == 0) | (which == 2), which < 2
    return torch.where(no_text, null_text, text), torch.where(no_place, 0.0, place)


def denoising_loss(model: DiffusionModel, latents: Tensor, tokens: Tensor, noise: Tensor,
                   timesteps: Tensor, snr_gamma: float | None = None) -> Tensor:
    """Eq. 3, and each term of Eq. 6: mean squared error of the predicted noise; a scalar.

    ``latents`` and ``noise`` [B, C, h, w], ``tokens`` [B, L, D], ``timesteps`` [B]. Of a model
    whose scheduler says v_prediction, the error is that of the velocity. ``snr_gamma`` weights
    samples by ``min_snr_weights``.
    """
    noisy = model.scheduler.add_noise(latents, noise, timesteps)
    prediction_type = model.scheduler.config.prediction_type
    target = noise
    if prediction_type == "v_prediction":
        target = model.scheduler.get_velocity(latents, noise, timesteps)
    predicted = model.unet(noisy, timesteps, tokens).sample.float()
    if snr_gamma is None:
        return F.mse_loss(predicted, target)
    weights = min_snr_weights(compute_snr(model.scheduler, timesteps), snr_gamma, prediction_type)
    return (weights * (predicted - target).square().mean(dim=(1, 2, 3))).mean()


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weights [B] of samples by their signal-to-noise ratios [B] (Hang et al. 2023, Min-SNR).

    The error of the clean image weighs min(snr, gamma): noise counts 1 / snr of it, velocity
    1 / (snr + 1).
    """
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


def _networks(model: DiffusionModel, recipe: Recipe) -> dict[str, Any]:
    """The networks that training changes, or with LoRA the layers in them."""
    names = ["unet", "gps_encoder"] if recipe.encoder == "trained" else ["unet"]
    if recipe.base == "tiny" or recipe.train_text_encoder:
        names.append("text_encoder")
    return {name: model.modules()[name] for name in names}


def _trained_modules(modules: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What training changes: with LoRA its layers, and the encoder in any case."""
    if recipe.lora_rank:
        return {name: module if name == "gps_encoder" else lora_layers(module)
                for name, module in modules.items()}
    return modules


def _train_unet(model: DiffusionModel, conditions: Conditions, moments: Tensor | Rows,
                prior: Tensor | None, recipe: Recipe, out: Path, accelerator: Accelerator,
                cache: Path | None) -> Course:
    """Eq. 3, or Eq. 6 with lambda x Eq. 9, on cached latents, and on cached texts where the text
    encoder does not train."""
    model.vae.requires_grad_(False).eval()
    networks = _networks(model, recipe)
    encode_text: Callable[[list[str]], Tensor] = model.encode_text
    if "text_encoder" not in networks:
        encode_text = text_embeddings(conditions.words, model, recipe.mixed_precision, cache,
                                      accelerator)
    scaling, device = model.vae.config.scaling_factor, accelerator.device
    first_null = model.null_text(1).detach()
    learned_null = "text_encoder" in networks and recipe.null_text == "empty"
    size, processes = recipe.train_batch_size, accelerator.num_processes
    shape = latent_shape(model.vae, recipe.size)
    equip_unet(model.unet, recipe)

    def draw_noises(count: int) -> tuple[Tensor, Tensor, Tensor]:
        posterior, noise = (torch.randn(count, *shape, device=device) for _ in range(2))
        return posterior, noise, draw_timesteps(
            count, model.scheduler.config.num_train_timesteps, recipe.high_noise_fraction,
            recipe.high_noise_from, device)

    def draw(step: int) -> Batch:
        rng = np.random.default_rng((recipe.seed, 11, step))
        count = size * recipe.gradient_accumulation_steps * processes
        priors = count if prior is not None else 0
        picks = rng.choice(len(moments), size=count, p=conditions.weights)
        draws = Draws(
            picks, rng.integers(moments.shape[1], size=count), conditions.draw_places(picks, rng),
            dropped(torch.from_numpy(rng.random(count)), recipe.dropout), *draw_noises(count),
            rng.integers(len(prior), size=priors) if prior is not None else picks[:0],
            *draw_noises(priors),
        )
        tally = zip(DROPPED, draws.which.bincount(minlength=4).tolist(), strict=True)
        return Batch(draws.split(size, accelerator.process_index, processes), count, dict(tally))

    def loss_of_part(part: Draws) -> Tensor:
        latents = draw_latents(moments[part.picks, part.crops].to(device), scaling, part.posterior)
        with accelerator.autocast():
            prompt = encode_text(conditions.texts(part.picks)).expand(size, -1, -1)
            null = model.null_text(1) if learned_null else first_null
            place = conditions.places(model, part.where)
            text, kept = drop_conditions(prompt, place, null, part.which.to(device))
            loss = denoising_loss(model, latents, torch.cat([text, kept], dim=1), part.noise,
                                  part.timesteps, recipe.snr_gamma)
            if prior is not None:
                assert isinstance(recipe, AngleRecipe)
                latents = draw_latents(prior[part.prior_picks].to(device), scaling,
                                       part.prior_posterior)
                tokens = torch.cat([prompt, model.angle.null(size)], dim=1)
                preserved = denoising_loss(model, latents, tokens, part.prior_noise,
                                           part.prior_timesteps, recipe.snr_gamma)
                loss = loss + recipe.prior_loss_weight * preserved
        return loss

    sharded = shard(networks.values(), accelerator)  # before LoRA's layers are taken out of them
    run = Run(recipe.kind, _trained_modules(networks, recipe), recipe.max_train_steps, recipe.rate,
              recipe, out, recipe.lr_scheduler, recipe.lr_warmup_steps, sharded)
    main = accelerator.is_main_process

    def validate() -> None:
        if recipe.validation_steps and run.step % recipe.validation_steps == 0:
            _validation_grid(model, conditions, run, out if main else None)

    run.loop(accelerator, draw, loss_of_part, validate)
    log.info("conditions dropped in %d samples: all %d, the place %d, the text %d",
             run.counts.total(), *(run.counts[what] for what in DROPPED[:3]))
    model.freeze()
    _validation_grid(model, conditions, run, out if main else None)
    restore_modules(sharded, main)
    return run.course


def equip_unet(unet: Any, recipe: Recipe) -> None:
    """What saves memory or time and changes no result, where the recipe asks for it."""
    if recipe.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if recipe.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ModuleNotFoundError, ValueError) as error:  # not installed; no CUDA
            raise ValueError("The recipe's enable_xformers_memory_efficient_attention is true, "
                             f"but: {error} `pip install \"gps-guidance[xformers]\"`, or set it "
                             "to false.") from error
    if recipe.torch_compile:
        unet.compile()  # in place: the names of its weights stay


@torch.no_grad()
def _validation_grid(model: DiffusionModel, conditions: Conditions, run: Run, out: Path | None
                     ) -> None:
    """The conditions' samples as ``samples-<step>.png``, from the averaged weights.

    ``out`` is None where another process writes it: to gather weights takes all of them.
    """
    with run.averaged():
        model.unet.eval()
        try:
            images = conditions.samples(model)
        finally:
            model.unet.train(run.step < run.steps)
    if out is None:
        return
    grid = torch.cat([torch.cat(list(row), dim=2) for row in images], dim=1)
    pixels = grid.permute(1, 2, 0).mul(255).byte().cpu().numpy()
    Image.fromarray(pixels).save(out / f"samples-{run.step:06d}.png")
