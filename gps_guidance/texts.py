"""Texts of a call as tokens, and what "no text" is: as the model was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class NullTextMixin:
    """In front of ``StableDiffusionPipeline``: prompts broadcast, "no text" is the model's own."""

    text_encoder: Any
    gps_encoder: Any
    _execution_device: Any

    def encode_texts(
        self, prompt: Any, negative_prompt: Any, prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None, batch_size: int, num_images_per_prompt: int,
        clip_skip: int | None, lora_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the prompt and of "no text", both of shape `(images, tokens, dim)`.

        A prompt of `None` is the model's "no text" as well.
        """
        absent = prompt is None and prompt_embeds is None
        if prompt_embeds is not None:
            prompt_embeds = _broadcast("prompt_embeds", prompt_embeds, batch_size)
        else:
            prompt = _broadcast_texts("prompt", "" if absent else prompt, batch_size)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = _broadcast(
                "negative_prompt_embeds", negative_prompt_embeds, batch_size)
        elif negative_prompt is not None:
            negative_prompt = _broadcast_texts("negative_prompt", negative_prompt, batch_size)
        text, negative = self.encode_prompt(
            prompt, self._execution_device, num_images_per_prompt, True, negative_prompt,
            prompt_embeds, negative_prompt_embeds, lora_scale, clip_skip,
        )
        if absent and self.gps_encoder.config.null_text == "zeros":
            text = torch.zeros_like(text)
        return text, negative

    def encode_prompt(
        self, prompt: Any, device: Any, num_images_per_prompt: int,
        do_classifier_free_guidance: bool, negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None, negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None, clip_skip: int | None = None,
    ) -> tuple[Any, Any]:
        """As [`StableDiffusionPipeline.encode_prompt`], with the model's own "no text".

        Where there is no negative prompt, it is what the model was trained with (`null_text` in the
        encoder's config); `None` in a pipeline without a `gps_encoder`, which cannot know it.
        """
        null_text = None if self.gps_encoder is None else self.gps_encoder.config.null_text
        given = negative_prompt is not None or negative_prompt_embeds is not None
        with _text_model_of_old(self.text_encoder):
            prompt_embeds, negative_prompt_embeds = super().encode_prompt(  # type: ignore[misc]
                prompt, device, num_images_per_prompt,
                do_classifier_free_guidance and (given or null_text == "empty"), negative_prompt,
                prompt_embeds, negative_prompt_embeds, lora_scale, clip_skip,
            )
        if do_classifier_free_guidance and not given and null_text == "zeros":
            negative_prompt_embeds = torch.zeros_like(prompt_embeds)
        return prompt_embeds, negative_prompt_embeds


def _broadcast(name: str, embeds: Tensor, batch_size: int) -> Tensor:
    """Rows [1 or B, ...] for each of B images."""
    if len(embeds) not in (1, batch_size):
        raise ValueError(f"{name} has {len(embeds)} rows for {batch_size} images; give one row, or "
                         "one for each.")
    return embeds.expand(batch_size, -1, -1)


def _broadcast_texts(name: str, texts: str | list[str], batch_size: int) -> list[str]:
    """One text, or one for each of B images, as a list of B."""
    texts = [texts] if isinstance(texts, str) else texts
    if len(texts) not in (1, batch_size):
        raise ValueError(f"{name} has {len(texts)} texts for {batch_size} images; give one, or one "
                         "for each.")
    return texts * (batch_size // len(texts))


@contextmanager
def _text_model_of_old(text_encoder: Any) -> Iterator[None]:
    """transformers 5 has no ``CLIPTextModel.text_model``, where diffusers looks for ``clip_skip``.

    Set around Module, for which it would be a part of itself.
    """
    missing = text_encoder is not None and not hasattr(text_encoder, "text_model")
    if missing:
        object.__setattr__(text_encoder, "text_model", text_encoder)
    try:
        yield
    finally:
        if missing:
            object.__delattr__(text_encoder, "text_model")
