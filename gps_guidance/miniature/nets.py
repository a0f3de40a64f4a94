"""Tiny networks of the real classes (diffusers, transformers), for training on two CPU cores."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.models import DiffusionModel

TEXT_DIM = 128
MAX_TOKENS = 16
WORDS = re.compile(r"[^\W\d_]+|\d|(?:[^\w\s]|_)+")  # as CLIP splits a text: letters, digits, signs


def tiny_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer whose merges spell the words of ``texts`` as single tokens.

    Any other text still encodes, byte by byte.
    """
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = [b for b in range(256) if b not in letters]
    alphabet = [chr(b) for b in letters] + [chr(256 + i) for i in range(len(spare))]
    symbol_of = dict(zip([*letters, *spare], alphabet, strict=True))
    symbols = alphabet + [letter + "</w>" for letter in alphabet]
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted({w for text in texts for w in WORDS.findall(text.lower())}):
        pieces = [symbol_of[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            known = [pair for pair in pairwise(pieces) if pair in ranks]
            pair = min(known, key=ranks.__getitem__, default=(pieces[0], pieces[1]))
            if pair not in ranks:
                ranks[pair] = len(ranks)
                symbols.append("".join(pair))
            pieces = _merge(pieces, pair)
    symbols = list(dict.fromkeys([*symbols, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    pairs: Any = list(ranks)  # annotated as list[str], used as pairs
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Byte-pair encoding's step: every ``pair`` of neighbours becomes one piece."""
    merged: list[str] = []
    rest = list(pieces)
    while rest:
        found = tuple(rest[:2]) == pair
        merged.append("".join(pair) if found else rest[0])
        rest = rest[2 if found else 1 :]
    return merged


def tiny_vae(widths: tuple[int, ...] = (16, 32, 64)) -> AutoencoderKL:
    """An AutoencoderKL that shrinks images by 4 to 4 channels."""
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=min(8, widths[0]),
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=True,
    )


def tiny_unet(widths: tuple[int, int, int] = (48, 96, 128)) -> UNet2DConditionModel:
    """A UNet2DConditionModel with cross-attention on the two lower levels."""
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_DIM,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_model(texts: list[str], gps_encoder: AngleEncoder | GPSEncoder | None = None
               ) -> DiffusionModel:
    """An untrained model that knows the words of ``texts``; all parts but the VAE train together.

    ``gps_encoder`` has tokens of width TEXT_DIM; None makes a text model.
    """
    tokenizer = tiny_tokenizer(texts)
    return DiffusionModel(
        unet=tiny_unet(),
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            num_train_timesteps=1000, clip_sample=False,
        ),
        gps_encoder=gps_encoder,
        path="tiny",
    )
