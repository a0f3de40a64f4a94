"""The judge of Miniatown's pictures: which place, object, colour and weather does an image show?

Fitted to new pictures of every scene, those included that no tourist photographs, so that it has
no opinion on which pairs exist.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from gps_guidance.miniature.city import (
    COLOURS,
    LANDMARKS,
    OBJECTS,
    OUTDOORS,
    PLACES,
    WEATHERS,
    Scene,
)
from gps_guidance.miniature.city_scene import draw_scene
from gps_guidance.models import save_module
from gps_guidance.scorers import convolutions

log = logging.getLogger(__name__)

# What it reads, and the answers it has; None where there is no object or no weather.
ANSWERS: dict[str, tuple[str | None, ...]] = {
    "place": PLACES, "object": (*OBJECTS, None), "colour": (*COLOURS, None),
    "weather": (*WEATHERS, None),
}
VIEW_PART = 0.12  # of the pictures outdoors: no object
BEYOND_PART = 0.2  # of the pictures in the streets: a landmark over the roofs


class SceneJudge(ModelMixin, ConfigMixin):
    """Images [B, 3, H, W] in [0, 1] -> logits [B, N] of each question's answers, ANSWERS.

    The configuration keeps the accuracy of each answer on ``held_out`` pictures of its own.
    """

    config: Any  # diffusers types it as a plain dict, but it has the arguments as attributes
    config_name: Any  # its two base classes disagree

    @register_to_config
    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 128), place: float = 0.0,
                 object: float = 0.0, colour: float = 0.0, weather: float = 0.0,
                 held_out: int = 0) -> None:
        super().__init__()
        self.features = convolutions(widths)
        self.heads = nn.ModuleDict({question: nn.Linear(widths[-1] * 4 * 4, len(answers))
                                    for question, answers in ANSWERS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        grid = F.adaptive_avg_pool2d(self.features(images.float() * 2 - 1), 4).flatten(1)
        return {question: head(grid) for question, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, list[str | None]]:
        """The likeliest answer to each question, one for each image."""
        return {question: [ANSWERS[question][k] for k in logits.argmax(dim=1).tolist()]
                for question, logits in self(images).items()}


def draw_scenes(rng: np.random.Generator, count: int, size: int) -> tuple[Tensor, list[Scene]]:
    """New pictures [B, 3, size, size] in [0, 1] of random scenes of every kind."""
    scenes, pictures = [], []
    for _ in range(count):
        place = str(rng.choice(PLACES))
        outdoors = place in OUTDOORS
        bare = outdoors and rng.random() < VIEW_PART
        scene = Scene(place, None if bare else str(rng.choice(OBJECTS)),
                      None if bare else str(rng.choice(list(COLOURS))),
                      str(rng.choice(WEATHERS)) if outdoors else None)
        streets = outdoors and place not in LANDMARKS
        seen = streets and rng.random() < BEYOND_PART
        beyond = str(rng.choice(list(LANDMARKS))) if seen else None
        scenes.append(scene)
        pictures.append(draw_scene(place, scene.object, scene.colour, scene.weather, rng, size,
                                   beyond))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, scenes


def answers_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """The right answer's number [B] to each question."""
    return {question: torch.tensor([answers.index(getattr(scene, question)) for scene in scenes])
            for question, answers in ANSWERS.items()}


def _soften(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Generated images are softer than drawn ones, and noisy; a judge of sharp ones misreads them.
    """
    scale = rng.choice([1.0, 0.75, 0.5], p=[0.4, 0.3, 0.3])
    if scale < 1:
        small = F.interpolate(images, scale_factor=float(scale), mode="bilinear", antialias=True)
        images = F.interpolate(small, images.shape[-2:], mode="bilinear")
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, (len(images), 3, 1, 1))).float()
    noise = torch.from_numpy(rng.normal(0, 0.03, images.shape)).float()
    return (images * gain + noise).clamp(0, 1)


def fit_scene_judge(size: int = 64, steps: int = 2500, batch_size: int = 48, seed: int = 0,
                    held_out: int = 1000) -> SceneJudge:
    """Fit the judge to pictures drawn as it learns, and measure it on others, for its config."""
    torch.manual_seed(seed)
    model = SceneJudge()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in trange(steps, desc="scene judge", unit="step"):
        rng = np.random.default_rng((seed, 41, step))
        images, scenes = draw_scenes(rng, batch_size, size)
        right, logits = answers_of(scenes), model(_soften(images, rng))
        loss = torch.stack([F.cross_entropy(logits[question], right[question], label_smoothing=0.05)
                            for question in ANSWERS]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    accuracy = measure(model, *draw_scenes(np.random.default_rng((seed, 42)), held_out, size))
    log.info("scene judge, on %d other pictures: %s", held_out,
             ", ".join(f"{question} {100 * part:.1f} %" for question, part in accuracy.items()))
    model.register_to_config(**accuracy, held_out=held_out)
    return model.requires_grad_(False)


def measure(model: SceneJudge, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """The fraction of images whose answer to each question is right."""
    read = model.read(images)
    return {question: float(np.mean([answer == getattr(scene, question) for answer, scene
                                     in zip(read[question], scenes, strict=True)]))
            for question in ANSWERS}


def train_scene_judge(output_dir: str | Path, steps: int = 2500, seed: int = 0) -> Path:
    """Fit the judge and save it as ``output_dir``, which is returned."""
    out = Path(output_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_module(fit_scene_judge(steps=steps, seed=seed).half(), out)
    return out
