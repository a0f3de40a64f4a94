"""The judges that learn by contrast, by the name of their command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gps_guidance.gps_clip import train_gps_clip
from gps_guidance.image_text import train_clip
from gps_guidance.judge_recipe import ClipRecipe, GPSClipRecipe, judge_recipe


def train_judge(kind: str, dataset: str | Path, output_dir: str | Path,
                overrides: Sequence[str] = ()) -> Path:
    """``train_gps_clip`` or ``train_clip`` with the recipe of ``kind`` after its overrides."""
    recipe = judge_recipe(kind, overrides)
    if isinstance(recipe, GPSClipRecipe):
        return train_gps_clip(dataset, output_dir, recipe)
    assert isinstance(recipe, ClipRecipe)
    return train_clip(dataset, output_dir, recipe)
