"""LoRA files that carry the GPS encoder: an adapter without its encoder would know no place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import LORA_WEIGHT_NAME_SAFE, StableDiffusionLoraLoaderMixin
from safetensors import safe_open
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
