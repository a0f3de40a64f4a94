"""How well an image suits a text: CLIP by transformers, and the training of a small one."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from gps_guidance.contrastive import (
    checkpoints_of,
    fit,
    hold_out,
    in_batches,
    middle_square,
    recall_among_hundred,
    start_device,
    symmetric_cross_entropy,
)
from gps_guidance.dataset import load_photos
from gps_guidance.judge_recipe import ClipRecipe
from gps_guidance.metrics import cosine_score
from gps_guidance.miniature.nets import MAX_TOKENS, tiny_tokenizer
from gps_guidance.models import load_part, resolve_model, save_module

log = logging.getLogger(__name__)

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP has learned
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = 100.0  # as CLIP limits it in training


class ImageTextScorer:
    """A CLIP with its tokenizer, of any size."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer

    def to(self, device: str | torch.device) -> ImageTextScorer:
        self.model.to(device)
        return self

    def tokenize(self, texts: list[str]) -> Tensor:
        """The numbers of the texts' tokens [B, L], long ones cut off."""
        length = self.model.config.text_config.max_position_embeddings
        tokens: Tensor = self.tokenizer(texts, padding="max_length", truncation=True,
                                        max_length=length, return_tensors="pt").input_ids
        return tokens

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, C] of images [B, 3, H, W] in [0, 1], of any size."""
        images = middle_square(images.float(), self.model.config.vision_config.image_size)
        images = images.to(self.model.device, self.model.dtype)
        mean, std = (images.new_tensor(x)[:, None, None] for x in (MEAN, STD))
        pooled = self.model.vision_model(pixel_values=(images - mean) / std).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Unit embeddings [B, C] of texts by the numbers of their tokens [B, L]."""
        pooled = self.model.text_model(input_ids=tokens.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    @torch.no_grad()
    def score(self, images: Tensor, texts: list[str]) -> Tensor:
        """The CLIP score of Table 1 [B]: cosine x 100 of each image with its text."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts; give one text for each "
                             "image.")
        return cosine_score(self.embed_images(images), self.embed_tokens(self.tokenize(texts)))

    @torch.no_grad()
    def similarities(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosine x 100 [B, N] of each image with each of N texts."""
        return 100 * self.embed_images(images) @ self.embed_tokens(self.tokenize(texts)).T

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Both in one folder, as CLIP's are on the Hub; safetensors only."""
        self.model.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder)


def load_image_text_scorer(name_or_path: str | Path) -> ImageTextScorer:
    """A folder of CLIP, such as a download of openai/clip-vit-large-patch14, or one of `train
    clip`; in single precision on the CPU, frozen. ValueError if it is neither."""
    folder = resolve_model(name_or_path)
    model: Any = load_part(CLIPModel.from_pretrained, folder, use_safetensors=True,
                           dtype=torch.float32)
    if model.config.model_type != "clip":
        raise ValueError(f"{folder} holds a model of type {model.config.model_type!r}; give a "
                         "folder of CLIP.")
    return ImageTextScorer(model.requires_grad_(False),
                           load_part(CLIPTokenizer.from_pretrained, folder))


def start_small_clip(texts: list[str], resolution: int) -> ImageTextScorer:
    """An untrained CLIP of 0.5 million weights that knows the words of ``texts``."""
    tokenizer = tiny_tokenizer(texts)
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": MAX_TOKENS, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": resolution, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    return ImageTextScorer(CLIPModel(config), tokenizer)


def train_clip(dataset: str | Path, output_dir: str | Path, recipe: ClipRecipe) -> Path:
    """Train a small CLIP on the captions of a dataset folder and save it as ``output_dir``, which
    is returned.

    Photos of one caption are not held against each other. Run again after a stop and it goes on;
    its checkpoints are in ``<output_dir>-checkpoints`` until it is whole. Its config has
    ``recall_at_1``, among the captions of a hundred photos, and ``held_out``, how many were held
    out of training. ValueError if there is something in ``output_dir``, if a photo has no caption,
    or if recipe and photos do not fit.
    """
    recipe.check()
    out = Path(output_dir)
    checkpoints = checkpoints_of(out)
    photos = load_photos(dataset, (recipe.resolution, recipe.resolution), need_bearings=False)
    texts = [text for text in photos.captions if text]
    if len(texts) < len(photos):
        raise ValueError(f"{len(photos) - len(texts)} of {len(photos)} photos of {dataset} have no "
                         "caption: run `gps-guidance caption` first.")
    kept, held = hold_out(photos, recipe)
    torch.manual_seed(recipe.seed)
    scorer = start_small_clip(texts, recipe.resolution).to(start_device())
    tokens = scorer.tokenize(texts)
    labels = np.unique(texts, return_inverse=True)[1]

    def batch_loss(picks: np.ndarray, rng: np.random.Generator) -> Tensor:
        images = photos.crop(picks, rng, recipe.min_zoom, recipe.colour_jitter) / 2 + 0.5
        temperature = 1 / scorer.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        return symmetric_cross_entropy(
            scorer.embed_images(images), scorer.embed_tokens(tokens[picks]), temperature,
            torch.from_numpy(labels[picks]).to(scorer.model.device))

    fit(scorer.model, batch_loss, photos, kept, recipe, checkpoints)
    with torch.no_grad():
        recall = recall_among_hundred(in_batches(scorer.embed_images, photos, held),
                                      scorer.embed_tokens(tokens[held]).cpu(), labels[held])
    log.info("CLIP: R@1 among the captions of a hundred photos %.1f %%, %d held-out photos",
             100 * recall, len(held))
    scorer.model.config.update({"recall_at_1": recall, "held_out": len(held)})
    scorer.model.to(getattr(torch, recipe.save_dtype))
    save_module(scorer, out)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return out
