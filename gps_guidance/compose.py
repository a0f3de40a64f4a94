"""One step of Eq. 4 or 8: which predictions are needed, and how they go through the UNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gps_guidance.noise import area_noise, dual_guidance, dual_guidance_weights, rescale_guidance


class Branch(NamedTuple):
    """The conditions of one prediction for a batch of B images."""

    text: Tensor  # [B, L, D]
    place: Tensor  # [B or 1, N, D]
    images: Sequence[Tensor]  # an IP-Adapter's embeddings [B, ...], one tensor an adapter


@dataclass
class Conditions:
    """What a step composes for B images.

    ``text`` and ``negative`` are [B, L, D]; ``places`` [B or 1, M, N, D] are the tokens of M
    locations, or None; ``images`` and ``negative_images`` an IP-Adapter's embeddings.
    """

    text: Tensor
    negative: Tensor
    places: Tensor | None
    images: Sequence[Tensor] = ()
    negative_images: Sequence[Tensor] = ()

    def branches(self, weights: tuple[float, float, float], num_tokens: int) -> list[Branch]:
        """The predictions that have a weight: e(0,0), e(p,0), then e(p,g) of each location."""
        nowhere = self.text.new_zeros(1, num_tokens, self.text.shape[-1])
        found = []
        if weights[0]:
            found.append(Branch(self.negative, nowhere, self.negative_images))
        if weights[1]:
            found.append(Branch(self.text, nowhere, self.images))
        if weights[2]:
            assert self.places is not None
            found += [Branch(self.text, place, self.images) for place in self.places.unbind(1)]
        return found


def predict(unet: Any, model_input: Tensor, t: Tensor, branches: Sequence[Branch], chunk_size: int,
            timestep_cond: Tensor | None = None, **kwargs: Any) -> Iterator[Tensor]:
    """The prediction [B, C, h, w] of each branch, ``chunk_size`` branches a call of the UNet."""
    batch = len(model_input)
    for start in range(0, len(branches), chunk_size):
        chunk = branches[start : start + chunk_size]
        tokens = [torch.cat([b.text, b.place.expand(batch, -1, -1)], dim=1) for b in chunk]
        images = [torch.cat(one) for one in zip(*(b.images for b in chunk), strict=True)]
        yield from unet(
            model_input.repeat(len(chunk), 1, 1, 1),
            t,
            encoder_hidden_states=torch.cat(tokens),
            timestep_cond=None if timestep_cond is None else timestep_cond.repeat(len(chunk), 1),
            added_cond_kwargs={"image_embeds": images} if images else None,
            return_dict=False,
            **kwargs,
        )[0].unflatten(0, (len(chunk), batch))


def guided_noise(unet: Any, model_input: Tensor, t: Tensor, conditions: Conditions,
                 scales: tuple[float, float], num_tokens: int, chunk_size: int,
                 guidance_rescale: float = 0.0, **kwargs: Any) -> Tensor:
    """Eq. 4, or 8 where there are several locations; only predictions with a weight are computed.

    ``model_input`` [B, C, h, w] are the latents as the UNet takes them, ``scales`` (w_p, w_g),
    ``num_tokens`` N, ``chunk_size`` how many predictions of the batch one call of the UNet makes;
    other arguments are :func:`predict`'s.
    """
    weights = dual_guidance_weights(*scales)
    branches = conditions.branches(weights, num_tokens)
    found = predict(unet, model_input, t, branches, chunk_size, **kwargs)
    noise_pred_uncond = next(found) if weights[0] else None
    noise_pred_text = next(found) if weights[1] else None
    noise_pred_text_gps = area_noise(one[None] for one in found) if weights[2] else None
    noise_pred = dual_guidance(noise_pred_uncond, noise_pred_text, noise_pred_text_gps, *scales)
    conditional = noise_pred_text if noise_pred_text_gps is None else noise_pred_text_gps
    if guidance_rescale and conditional is not None:
        return rescale_guidance(noise_pred, conditional, guidance_rescale)
    return noise_pred
