"""What a reproduction runs on: models, judges, data, seeds. One YAML a scale. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

SCALES = Path(__file__).parent / "scales"


@dataclass
class City:
    """A city, with the models and judges of Table 1; each a folder or a bundled model's name.

    ``dataset`` are its photos, null those of the procedural city. ``pairs`` is a file of prompts
    and positions, or the name of a bundled list.
    """

    name: str
    model: str  # of text and GPS
    base: str  # of text alone, which it was fine-tuned from
    pairs: str
    clip: str
    gps_clip: str
    dataset: str | None = None
    address_model: str | None = None  # fine-tuned on addresses instead of GPS
    scene_judge: str | None = None  # reads place and object; of the procedural city alone
    areas: str | None = None  # GeoJSON of the areas of Fig. 6; null: of the procedural city
    area_names: list[str] = field(default_factory=list)
    area_prompt: str = "building"
    area_locations: int = 64  # M of Eq. 8
    # Fig. 9 has each prompt at each place, a name with its lat and lon; the name is what is shown
    attention_prompts: list[str] = field(default_factory=list)
    attention_places: dict[str, list[float]] = field(default_factory=dict)
    resolution: int = 512
    guidance_scale: float = 7.5  # w_p of Eq. 4, and of text alone
    gps_guidance_scale: float = 7.5  # w_g
    steps: int = 50


@dataclass
class Landmark:
    """A landmark, with its angle model, its baselines and the configs that lift them to 3D."""

    name: str
    model: str
    text_model: str  # of text alone: Table 2's Stable Diffusion, Table 3's DreamFusion
    classifier: str | None = None  # null: the model's own folder has it
    dataset: str | None = None  # photos; null: those of the procedural landmark
    no_prior_model: str | None = None  # trained without prior preservation
    class_prompt: str | None = None
    guidance_scale: float = 2.0  # w of Eq. 7 for images
    steps: int = 50
    images_per_bin: int = 10
    attention_bearing: float = 45.0  # of Fig. 9, in degrees
    clip: str | None = None  # null: no CLIP score of the 3D views
    config: str | None = None  # gps-sds-...; null: no 3D
    view_prompts_config: str | None = None
    perp_neg_config: str | None = None
    overrides: list[str] = field(default_factory=list)  # key=value of each 3D run


@dataclass
class Settings:
    """Everything about a reproduction. ``seeds`` are of images, ``seeds_3d`` of 3D runs."""

    scale: str
    cities: list[City]
    landmarks: list[Landmark]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    seeds_3d: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])


def slug(name: str) -> str:
    """A name as part of a file's."""
    return name.lower().replace(" ", "-")


def _missing(node: Any, at: str = "") -> Iterator[str]:
    """Keys whose value is ``???``, as key=value spells them; not those that refer to one."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(
        node, list) else ()
    for key, value in inside:
        yield from _missing(value, f"{at}.{key}" if at else str(key))
    if node == "???":
        yield at


def load_settings(scale: str, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a bundled scale or of a YAML file of one's own, after ``key=value`` changes.

    ``cities.0.model=FOLDER`` changes one of a list. ValueError for a key or value that does not
    fit, or one that is still missing (``???``).
    """
    path = SCALES / f"{scale}.yaml" if "/" not in scale and "." not in scale else Path(scale)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SCALES.glob("*.yaml")))
        raise ValueError(f"There are no settings {scale!r}: give {known} or a YAML file.")
    cfg = OmegaConf.load(path)
    try:
        for word in overrides:
            key, equals, value = word.partition("=")
            if not equals:
                raise ValueError(f"{word!r} is not key=value.")
            OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=False)
        missing = list(_missing(OmegaConf.to_container(cfg, resolve=False)))
        if missing:
            raise ValueError(f"{path} needs {', '.join(missing)}: say them as key=value, or copy "
                             "the file, fill it in and give its path as --scale.")
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), cfg))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        known = ", ".join(f.name for kind in (Settings, City, Landmark) for f in fields(kind))
        raise ValueError(f"{path}: {' '.join(str(error).split())}. The settings have {known}."
                         ) from error
    assert isinstance(found, Settings)
    return found
