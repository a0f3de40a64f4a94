"""LoRA layers to train, and the file that they are saved in with the encoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from gps_guidance.lora import LORA_WEIGHT_NAME_SAFE, GPSLoraLoaderMixin
from gps_guidance.models import DiffusionModel, disk_errors
from gps_guidance.recipe import Recipe

TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # attention in CLIP's text encoder


def add_lora(model: DiffusionModel, recipe: Recipe) -> None:
    """Add the recipe's LoRA layers to the UNet, and to the text encoder if that trains too.

    Their second factor is zero: the model is the same until they are trained. ValueError if there
    is no module of the recipe's ``lora_target_modules``.
    """
    targets = {"unet": recipe.lora_target_modules}
    if recipe.train_text_encoder:
        targets["text_encoder"] = TEXT_TARGETS
    for name, modules in targets.items():
        config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha or recipe.lora_rank,
                            init_lora_weights="gaussian", target_modules=list(modules))
        try:
            # not by add_adapter: that of transformers asks for releases of peft not out yet
            inject_adapter_in_model(config, model.modules()[name])
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
