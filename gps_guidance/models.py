"""Model folders: an angle model is loaded by folder, or by the name of a bundled one.

The folder has diffusers' layout (``unet vae text_encoder tokenizer scheduler``) plus
``gps_encoder``, whose config says whether it encodes a bearing (AngleEncoder) or a position
(GPSEncoder); see docs/formats.md. Only safetensors are read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.lora import (
    CONFIG_KEY,
    load_lora_encoder,
    lora_encoder_tensors,
    lora_file,
    merge_lora,
)
from gps_guidance.parts import PARTS, missing_parts, part_folder

BUNDLED = Path(__file__).parent / "miniature" / "models"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionGPSPipeline")  # without, with a place


@dataclass
class DiffusionModel:
    """The parts of a latent diffusion model; ``gps_encoder`` is None for a text model."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    gps_encoder: AngleEncoder | GPSEncoder | None
    path: str

    def modules(self) -> dict[str, Any]:
        named = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        if self.gps_encoder is not None:
            named["gps_encoder"] = self.gps_encoder
        return named

    def to(self, device: str | torch.device) -> DiffusionModel:
        for module in self.modules().values():
            module.to(device)
        return self

    def freeze(self) -> DiffusionModel:
        for module in self.modules().values():
            module.requires_grad_(False).eval()
        return self

    @property
    def angle(self) -> AngleEncoder:
        """The encoder of the bearing, where the caller knows that this is an angle model."""
        assert isinstance(self.gps_encoder, AngleEncoder)
        return self.gps_encoder

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> the numbers of their tokens [B, L], long ones cut off."""
        tokens: Tensor = self.tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.tokenizer.model_max_length,
        ).input_ids
        return tokens

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> CLIP's last hidden state [B, L, D]."""
        return self.text_encoder(self.tokenize(prompts).to(self.text_encoder.device))[0]

    def null_text(self, batch_size: int) -> Tensor:
        """The tokens of "no text" [B, L, D] by the convention saved with the weights."""
        null = self.encode_text([""]).expand(batch_size, -1, -1)
        encoder = self.gps_encoder
        convention = "empty" if encoder is None else encoder.config.null_text
        return torch.zeros_like(null) if convention == "zeros" else null

    def save_pretrained(self, folder: str | Path) -> None:
        """Write every part under ``folder``, safetensors only, with what makes it a pipeline of
        diffusers; the GPS encoder comes last, so that a folder which has one is complete."""
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        self.sampler.save_pretrained(Path(folder) / "scheduler")
        self._write_index(Path(folder))
        for name, module in self.modules().items():
            save_module(module, Path(folder) / name)

    @property
    def sampler(self) -> Any:
        """The scheduler that makes images; training and distillation use its noise levels alone.

        Offset and last step are those of Stable Diffusion.
        """
        return DDIMScheduler.from_config(self.scheduler.config, steps_offset=1,
                                         set_alpha_to_one=False)

    def _write_index(self, folder: Path) -> None:
        """``model_index.json``, by which diffusers' ``from_pretrained`` finds the parts."""
        parts = {**self.modules(), "tokenizer": self.tokenizer, "scheduler": self.sampler}
        index: dict[str, Any] = {
            "_class_name": PIPELINES[self.gps_encoder is not None],
            "_diffusers_version": diffusers.__version__, "requires_safety_checker": False,
            **{name: [None, None] for name in ("feature_extractor", "image_encoder",
                                               "safety_checker")},
        }
        for name, part in parts.items():
            module = type(part).__module__
            ours = module.startswith("gps_guidance.")
            index[name] = [module if ours else module.split(".")[0], type(part).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_module(module: Any, folder: Path) -> None:
    """``save_pretrained``, whole or not at all. OSError if the disk is full."""
    stage = folder.with_name(f".{folder.name}.part")
    try:
        with disk_errors(folder):
            module.save_pretrained(stage, safe_serialization=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk is an OSError that names ``path``, not a SafetensorError."""
    try:
        yield
    except SafetensorError as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if f"os error {number})" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def quiet_libraries() -> None:
    """For commands: no bars for reading model files, which take a second, and none of the advice
    that diffusers and transformers give to programmers."""
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def bundled_model(name: str | Path) -> Path | None:
    """The folder of the bundled model of that name, None if there is none."""
    folder = BUNDLED / str(name)
    return folder if folder.parent == BUNDLED and folder.is_dir() else None


def resolve_model(name_or_path: str | Path) -> Path:
    """The folder of a path, or of a bundled model's name; ValueError says what was looked for."""
    for folder in (Path(name_or_path).expanduser(), bundled_model(name_or_path)):
        if folder is not None and folder.is_dir():
            return folder
    bundled = sorted(p.name for p in BUNDLED.iterdir()) if BUNDLED.is_dir() else []
    raise ValueError(
        f"There is no model folder {str(name_or_path)!r}. Give a folder on this machine in "
        "diffusers' layout (what `gps-guidance train` wrote, or a download by `hf download "
        f"NAME --local-dir FOLDER`), or a bundled model: {', '.join(bundled) or 'none'}."
    )


def load_model(name_or_path: str | Path, lora_weights: str | Path | None = None
               ) -> DiffusionModel:
    """Load any model folder in diffusers' layout, float32 on the CPU, frozen.

    With a LoRA's folder ``lora_weights`` that model is its base: the LoRA's layers are added to its
    weights, and the LoRA's encoder takes the place of its own.
    """
    folder = resolve_model(name_or_path)
    missing = missing_parts(folder)
    if missing and lora_file(folder).is_file():
        raise ValueError(f"{folder} holds a LoRA, not a model: give the model that it was trained "
                         "on, and this folder as its LoRA (--lora, or lora_weights).")
    if missing:
        raise ValueError(
            f"{folder} is not a complete model folder: {', '.join(missing)} missing. It must hold "
            f"{', '.join(PARTS)} and, for an angle or GPS model, gps_encoder."
        )
    safe: dict[str, Any] = {"use_safetensors": True, "torch_dtype": torch.float32}
    model = DiffusionModel(
        unet=load_part(UNet2DConditionModel.from_pretrained, part_folder(folder, "unet"), **safe),
        vae=load_vae(folder),
        text_encoder=load_part(CLIPTextModel.from_pretrained, part_folder(folder, "text_encoder"),
                               use_safetensors=True, dtype=torch.float32),
        tokenizer=load_part(CLIPTokenizer.from_pretrained, part_folder(folder, "tokenizer")),
        scheduler=load_part(DDPMScheduler.from_pretrained, part_folder(folder, "scheduler")),
        gps_encoder=_load_encoder(_encoder_folder(folder, lora_weights)),
        path=str(name_or_path) if lora_weights is None else f"{name_or_path} with {lora_weights}",
    )
    if lora_weights is not None:
        merge_lora(model.modules(), lora_weights)
    return model.freeze()


def load_vae(name_or_path: str | Path) -> AutoencoderKL:
    """The VAE alone of a model folder or a bundled model, float32 on the CPU."""
    vae: AutoencoderKL = load_part(
        AutoencoderKL.from_pretrained, part_folder(resolve_model(name_or_path), "vae"),
        use_safetensors=True, torch_dtype=torch.float32,
    )
    return vae


def load_part(from_pretrained: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """``from_pretrained(folder, **options)``; ValueError if the folder does not have what it reads.
    """
    try:
        return from_pretrained(folder, **options)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: it needs its config and its weights as "
                         f"safetensors. {' '.join(str(error).split())}") from error


def angle_config(name_or_path: str | Path, lora_weights: str | Path | None = None
                 ) -> dict[str, Any] | None:
    """The encoder's configuration if the folder holds an angle model, else None; loads no weights.

    ``name_or_path`` may also be a LoRA's folder, and ``lora_weights`` is as in
    :func:`load_model`. ValueError if there is no such folder or its configuration cannot be read.
    """
    config = _encoder_config(_encoder_folder(resolve_model(name_or_path), lora_weights))
    return config if config and config["_class_name"] == AngleEncoder.__name__ else None


def _encoder_folder(folder: Path, lora_weights: str | Path | None) -> Path:
    """Of a model folder and the LoRA on top of it, that with the encoder to use."""
    if lora_weights is not None and lora_encoder_tensors(lora_weights):
        return lora_file(lora_weights).parent
    return folder


def _encoder_config(folder: Path) -> dict[str, Any] | None:
    """The encoder's configuration in a model folder or a LoRA, None if it has no encoder."""
    path = folder / "gps_encoder" / "config.json"
    known = (AngleEncoder.__name__, GPSEncoder.__name__)
    try:
        if path.parent.is_dir():
            text = path.read_text("utf-8")
        elif lora_file(folder).is_file() and (own := lora_encoder_tensors(folder)):
            text = bytes(own[CONFIG_KEY].tolist()).decode("utf-8")
        else:
            return None
        config: dict[str, Any] = json.loads(text)
        if config["_class_name"] not in known:
            raise ValueError(f"{config['_class_name']!r} is not {' or '.join(known)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of an encoder: {error}") from error
    return config


def _load_encoder(folder: Path) -> AngleEncoder | GPSEncoder | None:
    """The encoder in a model folder or a LoRA, None if it has none."""
    config = _encoder_config(folder)
    if config is None:
        return None
    if not (folder / "gps_encoder").is_dir():
        return load_lora_encoder(folder)
    kind = AngleEncoder if config["_class_name"] == AngleEncoder.__name__ else GPSEncoder
    encoder: AngleEncoder | GPSEncoder = load_part(
        kind.from_pretrained, folder / "gps_encoder", use_safetensors=True,
        torch_dtype=torch.float32,
    )
    return encoder


def _check_angle(name_or_path: str | Path, lora_weights: str | Path | None) -> None:
    """ValueError if these are a GPS model or a plain text model."""
    folder = _encoder_folder(resolve_model(name_or_path), lora_weights)
    config = _encoder_config(folder)
    if config is None or config["_class_name"] != AngleEncoder.__name__:
        plain = "a text model" if part_folder(folder, "unet").is_dir() else "no finished model"
        kind = "a GPS model of a city (GPSEncoder)" if config else plain
        raise ValueError(
            f"{folder} holds {kind}, but an angle model (AngleEncoder) is needed here. Train one "
            f"with `gps-guidance train angle`, or use the bundled miniature-pisa."
        )


def load_angle_model(name_or_path: str | Path, lora_weights: str | Path | None = None
                     ) -> DiffusionModel:
    """:func:`load_model` of an angle model; ValueError if it is a GPS model or a plain text
    model."""
    _check_angle(name_or_path, lora_weights)
    return load_model(name_or_path, lora_weights)


def load_angle_encoder(name_or_path: str | Path, lora_weights: str | Path | None = None
                       ) -> AngleEncoder:
    """The angle encoder alone, of a model or a LoRA; its configuration says landmark, centre, bins,
    size and prompt."""
    _check_angle(name_or_path, lora_weights)
    encoder = _load_encoder(_encoder_folder(resolve_model(name_or_path), lora_weights))
    assert isinstance(encoder, AngleEncoder)
    return encoder
