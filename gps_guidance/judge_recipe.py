"""Settings of the judges that learn by contrast, GPS-CLIP and a small CLIP. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass
class JudgeRecipe:
    """What both judges share; names as in :class:`gps_guidance.recipe.Recipe`."""

    kind: ClassVar[str]

    resolution: int = 224  # pixels a side of the images that it reads
    seed: int = 0
    max_train_steps: int = 10000
    train_batch_size: int = 512
    learning_rate: float = 1e-4
    lr_warmup_steps: int = 500  # then a cosine to 0
    adam_weight_decay: float = 1e-2
    min_zoom: float = 0.9
    colour_jitter: float = 0.0
    checkpointing_steps: int = 200
    held_out_fraction: float = 0.1  # of the photos, that measure the judge
    save_dtype: str = "float32"  # float16 halves the folder; loading gives float32 either way

    def check(self) -> None:
        """Refuse, before any work, what cannot be trained: ValueError names the key."""
        for key in ("resolution", "max_train_steps", "checkpointing_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"The judge's {key} is {getattr(self, key)}; it must be at "
                                 "least 1.")
        if self.train_batch_size < 2:
            raise ValueError(f"The judge's train_batch_size is {self.train_batch_size}: it learns "
                             "by comparing photos, and needs at least 2.")
        if self.save_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"The judge's save_dtype is {self.save_dtype!r}; it must be float32, "
                             "float16 or bfloat16.")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"The judge's held_out_fraction is {self.held_out_fraction}; it must "
                             "be between 0 and 1.")


@dataclass
class GPSClipRecipe(JudgeRecipe):
    """How to train GPS-CLIP. Defaults are the paper's (A.1.4) where it gives one; steps, warm-up
    and weight decay are ours.

    ``base`` is a folder of DINOv2 by transformers, which stays as it is and sees the middle of each
    photo once (``min_zoom`` and ``colour_jitter`` are for "tiny"); or "tiny", a small convolutional
    network that trains with the rest.
    """

    kind = "gps-clip"

    base: str = "facebook/dinov2-base"
    temperature: float = 0.07

    def check(self) -> None:
        super().check()
        if not self.temperature > 0:
            raise ValueError(f"The judge's temperature is {self.temperature}; it must be above 0.")


@dataclass
class ClipRecipe(JudgeRecipe):
    """How to train a small CLIP on a dataset's own captions. For photos take a trained one."""

    kind = "clip"

    resolution: int = 64
    max_train_steps: int = 1500
    train_batch_size: int = 96
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 50


JUDGES: dict[str, type[JudgeRecipe]] = {r.kind: r for r in (GPSClipRecipe, ClipRecipe)}


def judge_recipe(kind: str, overrides: Sequence[str] = ()) -> JudgeRecipe:
    """The recipe of one of JUDGES with ``key=value`` overrides; ValueError for one that does not
    fit it."""
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JUDGES[kind]), given))
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in fields(JUDGES[kind]))
        raise ValueError(f"train {kind}: {' '.join(str(error).split())}. It has {known}."
                         ) from error
    assert isinstance(recipe, JudgeRecipe)
    recipe.check()
    return recipe
