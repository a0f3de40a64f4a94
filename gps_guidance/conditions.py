"""What a model is told beside the noisy latents: all that text, GPS and angle models differ in.

Each kind says with which words and encoder a model starts, which photos are drawn how often, which
texts and place tokens go with the drawn ones, and which pictures show how far training has come.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gps_guidance import geo
from gps_guidance.dataset import Photos, dither_bins
from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.geocoding import address_prompt
from gps_guidance.models import DiffusionModel
from gps_guidance.recipe import AngleRecipe, GPSRecipe, Recipe
from gps_guidance.sampling import sample_angles, sample_gps, sample_texts

log = logging.getLogger(__name__)

SAMPLES: dict[str, Any] = {"num_inference_steps": 30, "seed": 1}  # of validation pictures
ACROSS = 4  # pictures in a row of those of a text or GPS model
BEARINGS = [[30.0 * k for k in row] for row in (range(6), range(6, 12))]  # of an angle model


class TextConditions:
    """Captions alone. A photo without one is described by the empty text."""

    weights: np.ndarray | None = None  # every photo as often

    def __init__(self, recipe: Recipe, photos: Photos) -> None:
        if not any(photos.captions):
            raise ValueError(
                "No photo of the dataset has a caption, which is what a text or GPS model is "
                "trained on. Ingest photos with captions, or let a model write them with "
                "`gps-guidance caption`."
            )
        self.recipe, self.photos = recipe, photos
        self.captions = [caption or "" for caption in photos.captions]
        silent = sum(not caption for caption in self.captions)
        self.gaps = ""  # what the dataset does not tell the model
        if silent:
            self.gaps = (f"{silent} of {len(self.captions)} photos have no caption: their text is "
                         "empty.")
            log.warning("%s", self.gaps)

    @property
    def words(self) -> list[str]:
        """Every text that training uses, once."""
        return sorted(set(self.captions))

    def encoder(self, width: int) -> AngleEncoder | GPSEncoder | None:
        """The untrained encoder of the place, with tokens of ``width``."""
        return None

    def texts(self, picks: np.ndarray) -> list[str]:
        """The texts of the picked photos [B], or one that they share."""
        return [self.captions[index] for index in picks]

    def draw_places(self, picks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Where the picked photos [B] were taken: here nothing [B, 0]; else (lat, lon) [B, 2] or
        bearings [B], in degrees."""
        return np.zeros((len(picks), 0))

    def places(self, model: DiffusionModel, where: np.ndarray) -> Tensor:
        """The place tokens [B, K, D] of what ``draw_places`` gave; K is 0 here."""
        width = model.unet.config.cross_attention_dim
        return torch.zeros(len(where), 0, width, device=model.unet.device)

    @property
    def prompts(self) -> list[str]:
        """A few fixed captions, one for each row of validation pictures."""
        words = [text for text in self.words if text]
        picks = np.linspace(0, len(words) - 1, min(ACROSS, len(words))).round().astype(int)
        return [words[index] for index in picks]

    @property
    def columns(self) -> list[str]:
        """What differs within a row of validation pictures."""
        return [f"noise {k + 1}" for k in range(ACROSS)]

    @property
    def sheet(self) -> list[tuple[str, list[str]]]:
        """For each row of validation pictures what it has in common, and the names of its
        pictures, without positions."""
        return [(prompt, self.columns) for prompt in self.prompts]

    def samples(self, model: DiffusionModel) -> Tensor:
        """Validation pictures [rows, columns, 3, H, W] in [0, 1]: here captions x noises."""
        prompts = [prompt for prompt in self.prompts for _ in range(ACROSS)]
        images = sample_texts(model, prompts, self.recipe.size, **SAMPLES)
        return images.unflatten(0, (-1, ACROSS))


class AddressConditions(TextConditions):
    """Captions, and the address of each photo as more words: the paper's text baseline."""

    def __init__(self, recipe: GPSRecipe, photos: Photos) -> None:
        nameless = sum(not address for address in photos.addresses)
        if nameless == len(photos.addresses):
            raise ValueError("No photo of the dataset has an address, which the recipe's condition "
                             "asks for: run `gps-guidance geocode DATASET --cache FILE`.")
        super().__init__(recipe, photos)
        if nameless:
            said = (f"{nameless} of {len(photos)} photos have no address: their text is the "
                    "caption.")
            self.gaps = f"{self.gaps} {said}".strip()
            log.warning("%s", said)
        self.captions = [address_prompt(caption, address) for caption, address
                         in zip(self.captions, photos.addresses, strict=True)]

    @property
    def sheet(self) -> list[tuple[str, list[str]]]:
        """With numbers for the texts, whose addresses are positions in words."""
        return [(f"text {k + 1}", self.columns) for k in range(len(self.prompts))]


class GPSConditions(TextConditions):
    """Captions, and the position of each photo in the box of its city (Eq. 3)."""

    def __init__(self, recipe: GPSRecipe, photos: Photos) -> None:
        if photos.bounds is None:
            raise ValueError(
                "The dataset has no bounds, over which a GPS model normalises positions. Run "
                "`gps-guidance ingest ... --bbox SOUTH,WEST,NORTH,EAST` again."
            )
        super().__init__(recipe, photos)
        self.gps, self.bounds = recipe, photos.bounds
        self.bounds.check(photos.positions, "photo at")

    def encoder(self, width: int) -> GPSEncoder:
        return GPSEncoder(
            cross_attention_dim=width, bounds=self.bounds.as_tuple(),
            axis_embedding=self.gps.axis_embedding, match_text_scale=self.gps.match_text_scale,
            null_text=self.gps.null_text, num_photos=len(self.photos),
        )

    def draw_places(self, picks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        positions: np.ndarray = self.photos.positions[picks]
        return positions

    def places(self, model: DiffusionModel, where: np.ndarray) -> Tensor:
        assert isinstance(model.gps_encoder, GPSEncoder)
        tokens: Tensor = model.gps_encoder(where)
        return tokens

    @property
    def corners(self) -> list[tuple[float, float]]:
        """(lat, lon) halfway between the middle of the box and its corners, south-west first."""
        box = self.bounds
        return [
            (box.south + v * (box.north - box.south), box.west + u * (box.east - box.west))
            for v in (0.25, 0.75) for u in (0.25, 0.75)
        ]

    @property
    def columns(self) -> list[str]:
        return ["south-west", "south-east", "north-west", "north-east"]  # as ``corners``

    def samples(self, model: DiffusionModel) -> Tensor:
        """Captions x positions."""
        pairs = [(prompt, corner) for prompt in self.prompts for corner in self.corners]
        prompts, corners = zip(*pairs, strict=True)
        images = sample_gps(model, list(prompts), corners, self.recipe.size, **SAMPLES)
        return images.unflatten(0, (-1, len(self.corners)))


class AngleConditions:
    """One fixed prompt, and the bearing of each photo around the landmark (Eq. 6)."""

    def __init__(self, recipe: AngleRecipe, photos: Photos) -> None:
        self.recipe, self.photos = recipe, photos
        self.weights = photos.bin_weights(recipe.num_bins, recipe.balance_bins)
        bins = geo.bearing_bin(photos.bearings, recipe.num_bins)
        self.nearest = geo.bin_bearing_deg(bins, recipe.num_bins)
        self.words = [recipe.prompt.format(landmark=photos.landmark)]
        counts = np.bincount(bins, minlength=recipe.num_bins)
        empty = [f"{geo.bin_bearing_deg(k, recipe.num_bins):.0f}"
                 for k in np.flatnonzero(counts == 0)]
        self.gaps = ""
        if empty:
            self.gaps = (
                f"no photo in the bins around {', '.join(empty)} degrees: the model has to guess "
                "those sides. Add photos taken from there, or expect the landmark to be vague from "
                "them."
            )
            log.warning("%s", self.gaps)

    def encoder(self, width: int) -> AngleEncoder:
        encoder = AngleEncoder(
            cross_attention_dim=width, num_bins=self.recipe.num_bins,
            resolution=self.recipe.resolution, landmark=self.photos.landmark,
            center=self.photos.center, prompt=self.recipe.prompt, null_text=self.recipe.null_text,
            num_photos=len(self.photos),
        )
        # Zero tokens, not none: e(p, g') is e(p, 0) exactly, and all that samples, scores or
        # distils an angle model by Eq. 7 takes this one as well.
        return encoder.silence() if self.recipe.encoder == "silent" else encoder

    def texts(self, picks: np.ndarray) -> list[str]:
        return self.words

    def draw_places(self, picks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.recipe.dither_bins:
            return dither_bins(self.photos.bearings[picks], rng, self.recipe.num_bins)
        return self.nearest[picks]

    def places(self, model: DiffusionModel, where: np.ndarray) -> Tensor:
        tokens: Tensor = model.angle(torch.from_numpy(where))
        return tokens

    @property
    def sheet(self) -> list[tuple[str, list[str]]]:
        return [("", [f"{bearing:.0f}°" for bearing in row]) for row in BEARINGS]

    def samples(self, model: DiffusionModel) -> Tensor:
        """Twelve bearings round the landmark."""
        return sample_angles(model, sum(BEARINGS, []), 2.0, **SAMPLES).unflatten(0, (-1, 6))


Conditions = TextConditions | AddressConditions | GPSConditions | AngleConditions


def conditions_of(recipe: Recipe, photos: Photos) -> Conditions:
    """The conditions of a recipe's kind; ValueError if the dataset lacks what they need."""
    if isinstance(recipe, AngleRecipe):
        return AngleConditions(recipe, photos)
    if isinstance(recipe, GPSRecipe):
        kind = AddressConditions if recipe.condition == "address" else GPSConditions
        return kind(recipe, photos)
    return TextConditions(recipe, photos)
