"""Where a UNet looks for each word of the prompt and each token of the place (Fig. 9).

    with record_attention(pipe.unet, pipe.gps_encoder.num_tokens) as record:
        image = pipe("a red car", gps=(40.7484, -73.9857)).images[0]
    tokens = name_tokens(pipe.tokenizer, "a red car", pipe.gps_encoder)
    maps = record.maps(tokens, (image.height, image.width))

The layers' own processors go on to compute what they return, so that the image is the same, bit for
bit. Means are taken as the calls go by: memory grows neither with the steps nor with the locations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor
from torch.nn.functional import interpolate

from gps_guidance.encoders import AngleEncoder, GPSEncoder

START, END, PADDING, NO_TEXT = "<start>", "<end>", "<padding>", "<no text>"
# Those that compute softmax(Q K^T / sqrt d) V of the text's tokens alone; what others attend to
# cannot be told from outside.
PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


@dataclass
class AttentionMaps:
    """One map a name: ``raw`` [T, H, W] are probabilities, whose sum over T is 1 at each pixel.

    Raw maps can be compared with each other: what a token gets, no other does.
    """

    names: list[str]
    raw: Tensor

    @property
    def normalised(self) -> Tensor:
        """Each map [T, H, W] from its least (0) to its greatest value (1), to see its shape.

        It says nothing of how much the token was looked at; a flat map is 0.
        """
        least, greatest = self.raw.amin((1, 2), True), self.raw.amax((1, 2), True)
        return (self.raw - least) / (greatest - least).clamp_min(torch.finfo(self.raw.dtype).tiny)

    def named(self) -> AttentionMaps:
        """Those of words and of the place, without start, end and padding."""
        kept = [k for k, name in enumerate(self.names)
                if name not in (START, END, PADDING, NO_TEXT)]
        return AttentionMaps([self.names[k] for k in kept], self.raw[kept])


def name_tokens(tokenizer: Any, prompt: str | None,
                gps_encoder: GPSEncoder | AngleEncoder | None = None) -> list[tuple[str, slice]]:
    """Names of the tokens that the UNet gets, in order, each with the tokens that it stands for.

    A word that the tokenizer cuts into pieces is one name, and so is all padding. Without a
    ``prompt`` an angle model has its own, as in a call of the pipeline; else the text is one name.
    Multi-vector textual inversions: give what ``pipe.maybe_convert_prompt`` makes of the prompt.
    """
    if prompt is None and isinstance(gps_encoder, AngleEncoder):
        prompt = gps_encoder.prompt
    length = tokenizer.model_max_length
    named = [(NO_TEXT, slice(0, length))] if prompt is None else _name_text(tokenizer, prompt)
    place = () if gps_encoder is None else (
        ("angle",) if isinstance(gps_encoder, AngleEncoder) else ("longitude", "latitude"))
    return named + [(name, slice(length + k, length + k + 1)) for k, name in enumerate(place)]


def _name_text(tokenizer: Any, prompt: str) -> list[tuple[str, slice]]:
    """The names of a prompt's own tokens: start, words, end, padding."""
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=length).input_ids
    end = ids.index(tokenizer.eos_token_id)
    added = tokenizer.get_added_vocab()
    named, first = [(START, slice(0, 1))], 1
    for k, piece in enumerate(tokenizer.convert_ids_to_tokens(ids[1:end]), start=1):
        if piece.endswith("</w>") or piece in added or k == end - 1:  # a long prompt is cut off
            named.append((tokenizer.decode(ids[first : k + 1]).strip(), slice(first, k + 1)))
            first = k + 1
    named.append((END, slice(end, end + 1)))
    return named + [(PADDING, slice(end + 1, length))] * (end + 1 < length)


def attention_probabilities(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor,
                            attention_mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt d) of a layer in single precision.

    Pixels [B, h * w, C] and tokens [B, T, D] -> [B, heads, h * w, T]. LoRA layers take part.
    """
    batch, tokens = encoder_hidden_states.shape[:2]
    mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
    mask = None if mask is None else mask.float()
    if attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
    query = attn.head_to_batch_dim(attn.to_q(hidden_states)).float()
    key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states)).float()
    probabilities: Tensor = attn.get_attention_scores(query, key, mask)
    return probabilities.unflatten(0, (batch, -1))


def layer_size(latent_size: tuple[int, int], num_pixels: int) -> tuple[int, int]:
    """(h, w) of a layer with so many pixels: the latents' size, halved and rounded up as often as
    the UNet's strided convolutions do; ValueError if none is."""
    height, width = latent_size
    while height * width > num_pixels:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != num_pixels:
        raise ValueError(f"A cross-attention has {num_pixels} pixels, which halving latents of "
                         f"{latent_size[0]} x {latent_size[1]} does not give: only UNets that halve"
                         " them, as Stable Diffusion's, are recorded.")
    return height, width


class AttentionRecord:
    """The mean over layers, heads and UNet calls of cross-attention probabilities, of each image.

    Made by :func:`record_attention`, whose arguments it has.
    """

    def __init__(self, num_place_tokens: int, branches: Sequence[int] | None, num_images: int
                 ) -> None:
        if branches is None and num_place_tokens < 1:
            raise ValueError("Say which predictions to record: num_place_tokens (the gps_encoder's "
                             "num_tokens) for those with a place, or branches, such as [-1] for "
                             "the last, which has the prompt.")
        self.num_place_tokens, self.branches, self.num_images = (
            num_place_tokens, branches, num_images)
        self._latent_size = (0, 0)
        self._rows: list[int] = []  # of the present call
        self._sums: dict[tuple[int, int], Tensor] = {}  # [images, T, h, w] of layers of that size
        self._counts = [0] * num_images

    def start_call(self, _unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the UNet: which rows of this call's batch are recorded."""
        sample = args[0] if args else kwargs["sample"]
        tokens = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        count, rest = divmod(len(sample), self.num_images)
        if rest or not torch.equal(sample, sample[: self.num_images].repeat(count, 1, 1, 1)):
            raise ValueError(f"The rows of a batch of {len(sample)} are not branches of "
                             f"{self.num_images} image(s): give num_images, how many images the "
                             "call makes.")
        self._latent_size = (sample.shape[-2], sample.shape[-1])
        if self.branches is None:
            place = tokens[:, -self.num_place_tokens :]
            self._rows = place.flatten(1).any(1).nonzero()[:, 0].tolist()
            return
        if not all(-count <= branch < count for branch in self.branches):
            raise ValueError(f"branches is {list(self.branches)}, but this call of the UNet has "
                             f"{count}: give some of 0 to {count - 1}.")
        self._rows = [branch % count * self.num_images + image
                      for branch in self.branches for image in range(self.num_images)]

    @torch.no_grad()
    def add(self, attn: Any, hidden_states: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
        """Record one layer of the present call, a row at a time to hold one alone in memory."""
        size = layer_size(self._latent_size, hidden_states.shape[1])
        for row in self._rows:
            one = slice(row, row + 1)
            found = attention_probabilities(attn, hidden_states[one], tokens[one],
                                            None if mask is None else mask[one])
            mean = found[0].mean(0).T.unflatten(1, size)
            if size not in self._sums:
                self._sums[size] = mean.new_zeros(self.num_images, *mean.shape)
            self._sums[size][row % self.num_images] += mean
            self._counts[row % self.num_images] += 1

    def probabilities(self, size: tuple[int, int], image: int = 0) -> Tensor:
        """The mean of each token [T, H, W] on the CPU.

        Layers are brought to ``size`` (height, width) bilinearly, which keeps the sum over T at 1;
        each has the same weight. ValueError if nothing of that image was recorded.
        """
        if not 0 <= image < self.num_images:
            raise ValueError(f"image is {image}; there are {self.num_images}, from 0 on.")
        if not self._counts[image]:
            raise ValueError(f"Nothing was recorded of image {image}: no call of the UNet had a "
                             "row with a place. Give gps or bearing_deg in the call, or say which "
                             "rows to record by branches.")
        sized = [interpolate(sums[image, None], size, mode="bilinear", align_corners=False)[0]
                 for sums in self._sums.values()]
        return torch.stack(sized).sum(0).cpu() / self._counts[image]

    def maps(self, tokens: list[tuple[str, slice]], size: tuple[int, int], image: int = 0
             ) -> AttentionMaps:
        """The maps of :func:`name_tokens`'s names, at a size (height, width) in pixels.

        Where a name stands for several tokens they are added. ValueError if the names are not
        those of as many tokens as were recorded.
        """
        found = self.probabilities(size, image)
        if tokens[-1][1].stop != len(found):
            raise ValueError(f"There are names for {tokens[-1][1].stop} tokens, but the UNet got "
                             f"{len(found)}: give the tokenizer and gps_encoder of its pipeline.")
        return AttentionMaps([name for name, _ in tokens],
                             torch.stack([found[part].sum(0) for _, part in tokens]))


class RecordingProcessor:
    """An attention processor of diffusers: records, then leaves the work to the layer's own."""

    def __init__(self, own: Any, record: AttentionRecord) -> None:
        self.own, self.record = own, record

    def __call__(self, attn: Any, hidden_states: Tensor,
                 encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
                 **kwargs: Any) -> Tensor:
        if encoder_hidden_states is not None:  # else it attends to the pixels themselves
            self.record.add(attn, hidden_states, encoder_hidden_states, attention_mask)
        found: Tensor = self.own(attn, hidden_states, encoder_hidden_states=encoder_hidden_states,
                                 attention_mask=attention_mask, **kwargs)
        return found


@contextmanager
def record_attention(unet: Any, num_place_tokens: int = 0, branches: Sequence[int] | None = None,
                     num_images: int = 1) -> Iterator[AttentionRecord]:
    """Record the cross-attention of every call of a UNet within the block, as one mean.

    The rows of a batch are one branch after another, each of ``num_images`` images, in our pipeline
    as in diffusers' own. Recorded are the branches ``branches`` (-1: the last), or where these are
    not given, those with a place: a row whose last ``num_place_tokens`` tokens are not the zeros of
    "no place", e(p,g) of Eq. 4. The locations of an area are such rows, and averaged.

    Afterwards every layer has its own processor again. ValueError for processors other than plain
    ones, such as an IP-Adapter's.
    """
    record = AttentionRecord(num_place_tokens, branches, num_images)
    layers = {name: layer for name, layer in unet.named_modules()
              if name.rpartition(".")[2] == "attn2"}  # diffusers' name of cross-attention
    if not layers:
        raise ValueError(f"{type(unet).__name__} has no cross-attention (attn2) to record; give a "
                         "UNet2DConditionModel.")
    own = {name: layer.processor for name, layer in layers.items()}
    for name, processor in own.items():
        if type(processor) not in PLAIN_PROCESSORS:
            raise ValueError(f"{name} has a {type(processor).__name__}, but attention is recorded "
                             "of plain processors only: call pipe.unload_ip_adapter() if there is "
                             "one, else unet.set_default_attn_processor().")
    hook = unet.register_forward_pre_hook(record.start_call, with_kwargs=True)
    try:
        for name, layer in layers.items():
            layer.set_processor(RecordingProcessor(own[name], record))
        yield record
    finally:
        hook.remove()
        for name, layer in layers.items():
            layer.set_processor(own[name])
