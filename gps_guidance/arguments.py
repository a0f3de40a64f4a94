"""Arguments of a call that broadcast: prompts, places and embeddings for one batch of images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gps_guidance.place import Place


def check_numbers(interval: Any, location_batch_size: int, locations_per_step: int | None) -> None:
    """Refuse an interval or a count that cannot be meant."""
    try:
        start, stop = (float(end) for end in interval)
        ordered = 0 <= start <= stop <= 1
    except (TypeError, ValueError):
        ordered = False
    if not ordered:
        raise ValueError(f"guidance_interval is {interval!r}; give two parts of the steps in "
                         "[0, 1], such as (0.1, 0.8).")
    for name, value in (("location_batch_size", location_batch_size),
                        ("locations_per_step", locations_per_step)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; give a whole number of at least 1.")


def batch_size_of(prompt: Any, prompt_embeds: Tensor | None, place: Place | None) -> int:
    """How many images there are before ``num_images_per_prompt``: prompts and places broadcast."""
    prompts = 1
    if prompt_embeds is not None:
        prompts = len(prompt_embeds)
    elif isinstance(prompt, list):
        prompts = len(prompt)
    places = 1 if place is None else len(place.embeds)
    if 1 not in (prompts, places) and prompts != places:
        raise ValueError(f"There are {prompts} prompts and {places} places: give one of either, or "
                         "as many prompts as places.")
    return max(prompts, places)


def broadcast_embeds(name: str, embeds: Tensor, batch_size: int) -> Tensor:
    """Rows [1 or B, ...] for each of B images."""
    if len(embeds) not in (1, batch_size):
        raise ValueError(f"{name} has {len(embeds)} rows for {batch_size} images; give one row, or "
                         "one for each.")
    return embeds.expand(batch_size, -1, -1)


def broadcast_texts(name: str, texts: str | list[str], batch_size: int) -> list[str]:
    """One text, or one for each of B images, as a list of B."""
    texts = [texts] if isinstance(texts, str) else texts
    if len(texts) not in (1, batch_size):
        raise ValueError(f"{name} has {len(texts)} texts for {batch_size} images; give one, or one "
                         "for each.")
    return texts * (batch_size // len(texts))
