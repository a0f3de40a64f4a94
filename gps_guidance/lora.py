"""LoRA: layers to train, and files that also carry the GPS encoder.

An adapter without its encoder would know no place.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import LORA_WEIGHT_NAME_SAFE, StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.models import DiffusionModel, disk_errors
from gps_guidance.recipe import Recipe

TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # attention in CLIP's text encoder
PREFIX = "gps_encoder."
CONFIG_KEY = "gps_encoder.config"  # the encoder's config.json as bytes, a tensor like the others


class GPSLoraLoaderMixin(StableDiffusionLoraLoaderMixin):
    """``StableDiffusionLoraLoaderMixin``, where the encoder is saved, loaded and unloaded too.

    Encoders do not add up as adapters do: the last one loaded is the one in use, until
    ``unload_lora_weights`` brings the pipeline's own back.
    """

    unet: Any
    gps_encoder: Any
    register_modules: Any
    _own_gps_encoder: Any = None

    @classmethod
    def save_lora_weights(  # type: ignore[override]  # as diffusers' own do
        cls, save_directory: str | os.PathLike[Any], *,
        gps_encoder: GPSEncoder | AngleEncoder | None = None, weight_name: Any = None,
        **kwargs: Any,
    ) -> None:
        """As ``StableDiffusionPipeline.save_lora_weights``, with the encoder in the same file."""
        super().save_lora_weights(save_directory, weight_name=weight_name, **kwargs)
        if gps_encoder is None:
            return
        path = Path(save_directory) / (weight_name or LORA_WEIGHT_NAME_SAFE)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: the encoder travels in safetensors files only; leave "
                             "safe_serialization on.")
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        stage = path.with_name(f".{path.name}.part")
        try:
            save_file(tensors | encoder_tensors(gps_encoder), stage, metadata)
            os.replace(stage, path)
        finally:
            stage.unlink(missing_ok=True)

    @classmethod
    def lora_state_dict(  # type: ignore[override]
        cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any
    ) -> Any:
        """As ``StableDiffusionPipeline.lora_state_dict``, from safetensors, without the encoder."""
        tensors, *rest = cls._whole_lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        return ({k: v for k, v in tensors.items() if not k.startswith(PREFIX)}, *rest)

    @classmethod
    def _whole_lora_state_dict(cls, source: Any, **kwargs: Any) -> Any:
        return super().lora_state_dict(source, **{"use_safetensors": True, **kwargs})

    def load_lora_weights(  # type: ignore[override]
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As ``StableDiffusionPipeline.load_lora_weights``; an encoder in the file replaces the
        pipeline's."""
        source = pretrained_model_name_or_path_or_dict
        super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)
        where = {k: v for k, v in kwargs.items() if k not in ("hotswap", "low_cpu_mem_usage")}
        tensors = self._whole_lora_state_dict(source, **where)[0]
        own = {key: value for key, value in tensors.items() if key.startswith(PREFIX)}
        if own:
            if self._own_gps_encoder is None:
                self._own_gps_encoder = self.gps_encoder
            self._use_encoder(encoder_from_tensors(own))

    def unload_lora_weights(self) -> None:
        """Remove every adapter, and bring the pipeline's own encoder back."""
        super().unload_lora_weights()
        if self._own_gps_encoder is not None:
            self._use_encoder(self._own_gps_encoder)
            self._own_gps_encoder = None

    def _use_encoder(self, encoder: Any) -> None:
        encoder.to(self.unet.device, self.unet.dtype)
        self.register_modules(gps_encoder=encoder)


def encoder_tensors(encoder: GPSEncoder | AngleEncoder) -> dict[str, Tensor]:
    """The encoder's weights and configuration as tensors, for a LoRA file."""
    config = torch.frombuffer(bytearray(encoder.to_json_string().encode()), dtype=torch.uint8)
    weights = {PREFIX + key: value.contiguous() for key, value in encoder.state_dict().items()}
    return weights | {CONFIG_KEY: config}


def encoder_from_tensors(tensors: dict[str, Tensor]) -> GPSEncoder | AngleEncoder:
    """The inverse of :func:`encoder_tensors`; ValueError if they are no whole encoder."""
    weights = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    try:
        config = json.loads(bytes(weights.pop("config").tolist()))
        kinds = {kind.__name__: kind for kind in (GPSEncoder, AngleEncoder)}
        encoder: Any = kinds[config["_class_name"]].from_config(config)
        encoder.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"The LoRA file's gps_encoder cannot be read: {error}") from error
    return encoder.requires_grad_(False).eval()


def add_lora(model: DiffusionModel, recipe: Recipe) -> None:
    """Add the recipe's LoRA layers to the UNet, and to the text encoder if that trains too.

    Their second factor is zero: the model is the same until they are trained. ValueError if there
    is no module of the recipe's ``lora_target_modules``, or if transformers, which adds those of
    the text encoder, wants another release of peft.
    """
    targets = {"unet": recipe.lora_target_modules}
    if recipe.train_text_encoder:
        targets["text_encoder"] = TEXT_TARGETS
    for name, modules in targets.items():
        config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha or recipe.lora_rank,
                            init_lora_weights="gaussian", target_modules=list(modules))
        try:
            model.modules()[name].add_adapter(config)
        except ValueError as error:
            key = "lora_target_modules" if name == "unet" else "train_text_encoder"
            raise ValueError(f"The recipe's {key} is {getattr(recipe, key)}: {error}") from error


def lora_layers(module: nn.Module) -> nn.Module:
    """The LoRA parameters of a module, shared with it and under their own names, alone."""
    root = nn.Module()
    for name, parameter in module.named_parameters():
        if "lora_" not in name:
            continue
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(last, parameter)
    return root


def save_lora(model: DiffusionModel, folder: str | Path, dtype: torch.dtype = torch.float32
              ) -> Path:
    """Write the LoRA layers and the encoder as one file for ``load_lora_weights``, and return it.

    The file appears whole or not at all.
    """
    folder = Path(folder)
    layers: dict[str, Any] = {}
    for name in ("unet", "text_encoder"):
        module = model.modules()[name]
        if getattr(module, "peft_config", None):
            state = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
            layers[f"{name}_lora_layers"] = {k: v.to(dtype).cpu() for k, v in state.items()}
            about = module.peft_config["default"].to_dict() | {"base_model_name_or_path": None}
            layers[f"{name}_lora_adapter_metadata"] = about  # without the path on this machine
    encoder: Any = model.gps_encoder
    stage = folder / ".lora.part"
    try:
        with disk_errors(folder / LORA_WEIGHT_NAME_SAFE):
            GPSLoraLoaderMixin.save_lora_weights(
                stage, gps_encoder=None if encoder is None else encoder.to(dtype), **layers)
        return (stage / LORA_WEIGHT_NAME_SAFE).replace(folder / LORA_WEIGHT_NAME_SAFE)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def load_lora_encoder(folder: str | Path) -> GPSEncoder | AngleEncoder:
    """The encoder in the LoRA file of a folder: what makes a pipeline of its base model.

    ValueError if there is none.
    """
    path = Path(folder) / LORA_WEIGHT_NAME_SAFE
    if not path.is_file():
        raise ValueError(f"{folder} has no {LORA_WEIGHT_NAME_SAFE}: give the folder of a LoRA.")
    own = {key: value for key, value in load_file(path).items() if key.startswith(PREFIX)}
    return encoder_from_tensors(own)
