"""LoRA files, which also carry the GPS encoder: in pipelines, and merged into a model's weights.

An adapter without its encoder would know no place.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import LORA_WEIGHT_NAME_SAFE, StableDiffusionLoraLoaderMixin
from diffusers.utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gps_guidance.encoders import AngleEncoder, GPSEncoder

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


def lora_file(folder: str | Path) -> Path:
    """The file of a LoRA's folder."""
    return Path(folder).expanduser() / LORA_WEIGHT_NAME_SAFE


def lora_encoder_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of the encoder in the LoRA file of a folder, empty if it carries none.

    ValueError if there is no such file, or it cannot be read.
    """
    path = lora_file(folder)
    if not path.is_file():
        raise ValueError(f"{folder} has no {LORA_WEIGHT_NAME_SAFE}: give the folder of a LoRA.")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(PREFIX)}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def load_lora_encoder(folder: str | Path) -> GPSEncoder | AngleEncoder:
    """The encoder in the LoRA file of a folder: what makes a pipeline of its base model.

    ValueError if there is none.
    """
    return encoder_from_tensors(lora_encoder_tensors(folder))


def merge_lora(modules: dict[str, Any], folder: str | Path) -> None:
    """Add the layers in the LoRA file of a folder to the weights of ``unet`` and ``text_encoder``,
    as far as ``modules`` has them.

    The modules are then as they were without LoRA, in structure and speed. ValueError if the
    layers do not fit, as those of another base.
    """
    path = lora_file(folder)
    state, alphas, about = GPSLoraLoaderMixin.lora_state_dict(
        path.parent, weight_name=path.name, return_lora_metadata=True)
    state = {key: value.float() for key, value in state.items()}  # to add in single precision
    for name in ("unet", "text_encoder"):
        module = modules.get(name)
        if module is None or not any(key.startswith(f"{name}.") for key in state):
            continue
        try:
            load = getattr(GPSLoraLoaderMixin, f"load_lora_into_{name}")
            load(state, alphas, module, metadata=about)
            for layer in module.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.merge(safe_merge=True)
        except (ValueError, RuntimeError) as error:
            first = " ".join(str(error).split("\n", 2)[:2])  # of a line for each layer
            raise ValueError(f"The LoRA {folder} does not fit the {name} of its base; give the "
                             f"model that it was trained on. {first}") from error
        recurse_remove_peft_layers(module)
        del module.peft_config
        module._hf_peft_config_loaded = False  # else save_pretrained looks for an adapter
