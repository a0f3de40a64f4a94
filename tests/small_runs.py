"""A 3D config at two steps and 16 pixels, through the real ``launch``: used by several tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gps_guidance.lift import engine
from gps_guidance.models import resolve_model

ROOT = Path(__file__).parents[1]
SMALL = [
    "use_timestamp=false", "trainer.max_steps=2", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "data.width=16", "data.height=16", "data.batch_size=1",
    "data.resolution_milestones=[]", "data.eval_width=16", "data.eval_height=16",
    "data.n_val_views=1", "data.n_test_views=4", "system.renderer.num_samples_per_ray=8",
    "system.renderer.num_samples_per_ray_importance=8", "system.geometry.isosurface_resolution=24",
]


def overrides(config: Path, models: dict[str, Path], given: tuple[str, ...] = (),
              always_tiny: bool = False) -> list[str]:
    """SMALL and what this config needs to run here.

    A model folder that does not exist (with ``always_tiny`` any) is replaced by one of ``models``,
    by guidance type, and a required prompt by two words, unless ``given`` overrides set them.
    """
    raw: dict[str, Any] = yaml.safe_load(config.read_text("utf-8"))
    system, needed = raw["system"], list(SMALL)
    chosen = dict(item.split("=", 1) for item in given if "=" in item)
    if system["geometry_type"] == "implicit-volume":
        needed.append("system.geometry.pos_encoding_config.log2_hashmap_size=10")
    key = "system.guidance.pretrained_model_name_or_path"
    model = chosen.get(key, system["guidance"]["pretrained_model_name_or_path"])
    if always_tiny or not _exists(model):
        tiny = models[system["guidance_type"]]
        needed += [f"{key}={tiny}", f"system.prompt_processor.pretrained_model_name_or_path={tiny}"]
    if (system["prompt_processor"].get("prompt") == "???"
            and "system.prompt_processor.prompt" not in chosen):
        needed.append("system.prompt_processor.prompt=a tower")
    return needed


def _exists(model: str) -> bool:
    try:
        return resolve_model(model).is_dir()
    except ValueError:
        return False


def launch(*argv: str) -> int:
    """``python launch.py`` on the CPU in the portable engine."""
    return engine.launch([*argv, "--gpu", "cpu", "--engine", "portable"])
