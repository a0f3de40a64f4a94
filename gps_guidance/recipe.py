"""Recipes: every setting of a training in one small YAML file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class AngleRecipe:
    """How to train an angle model. Defaults are the paper's (A.2.1); diffusers' names where it has
    them.

    ``base`` is a Stable Diffusion folder in diffusers' layout, or "tiny" for our small networks
    from scratch, whose VAE is then trained first (the ``vae_*`` settings).
    """

    base: str = "CompVis/stable-diffusion-v1-4"
    resolution: Any = 256  # int, or [height, width]
    seed: int = 0
    max_train_steps: int = 800
    train_batch_size: int = 256
    learning_rate: float = 5e-6
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0  # 0 switches the moving average off
    prompt: str = "A photo of {landmark}"
    num_bins: int = 36
    dither_bins: bool = False  # draw one of the two nearest bins instead of snapping
    balance_bins: float = 0.0  # draw photos with probability ~ (photos in the bin) ** -this
    condition_dropout: float = 0.1  # text and angle zeroed together: the e(0, 0) of Eq. 7
    angle_dropout: float = 0.0  # angle alone zeroed; prior preservation teaches the same
    null_text: str = "zeros"
    with_prior_preservation: bool = True
    prior_loss_weight: float = 1.0
    num_class_images: int = 200
    crops_per_photo: int = 4
    min_zoom: float = 0.9
    colour_jitter: float = 0.0
    checkpointing_steps: int = 200
    checkpoints_total_limit: int = 2
    validation_steps: int = 200
    mixed_precision: str = "no"
    save_dtype: str = "float32"  # float16 halves the folder; loading gives float32 either way
    vae_steps: int = 1500
    vae_batch_size: int = 16
    vae_learning_rate: float = 3e-3
    vae_kl_weight: float = 1.5e-3

    @property
    def size(self) -> tuple[int, int]:
        one = self.resolution
        sides = [one, one] if isinstance(one, int) else one
        if not isinstance(sides, (list, tuple)) or [type(s) for s in sides] != [int, int] or (
            min(sides) < 1
        ):
            raise ValueError(f"The recipe's resolution is {one!r}; give a number of pixels or "
                             "[height,width].")
        return (sides[0], sides[1])


def load_recipe(name_or_path: str | None = None, overrides: list[str] | None = None) -> AngleRecipe:
    """A recipe from a YAML file or a bundled name, with ``key=value`` overrides.

    ValueError names an unknown key and the known ones, or the value that does not fit its key.
    """
    path = None
    if name_or_path is not None:
        path = Path(name_or_path)
        if not path.is_file():
            path = RECIPES / f"{Path(name_or_path).stem}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise ValueError(f"There is no recipe {name_or_path!r}. Give a YAML file or: {known}.")
    known_keys = [f.name for f in fields(AngleRecipe)]
    try:
        layers = [OmegaConf.load(path)] if path is not None else []
        layers.append(OmegaConf.from_dotlist(overrides or []))
        for key in (str(key) for layer in layers for key in layer):
            if key not in known_keys:
                close = difflib.get_close_matches(key, known_keys, 1)
                hint = f"Did you mean {close[0]!r}? " if close else ""
                raise ValueError(
                    f"The recipe has no key {key!r}. {hint}It has {', '.join(known_keys)}.")
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AngleRecipe), *layers))
    except (OmegaConfBaseException, YAMLError) as error:
        source = f"recipe {name_or_path}" if overrides is None else "recipe or its overrides"
        raise ValueError(f"The {source}: {' '.join(str(error).split())}") from error
    assert isinstance(recipe, AngleRecipe)
    return recipe
