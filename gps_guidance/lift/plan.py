"""From a config to the parts that it names: every key checked first, nothing heavy before that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gps_guidance.lift.config import ExperimentConfig, SystemConfig, closest, structured

PARTS = ("geometry", "material", "background", "renderer", "guidance", "prompt_processor",
         "exporter")


@dataclass
class Plan:
    """A checked config: the class and the typed config of every part."""

    cfg: ExperimentConfig
    system: SystemConfig
    parts: dict[str, tuple[type, Any]]


@lru_cache(maxsize=1)
def known_types() -> dict[str, dict[str, tuple[type, type]]]:
    """Every type name that the engine answers to, by kind: its class and its config's."""
    from gps_guidance.lift import cameras, export, field, guidance, prompts, render, shading, system

    tables: dict[str, Any] = {
        "data": cameras.DATAMODULES,
        "system": {"dreamfusion-system": (system.DreamFusionSystem, SystemConfig)},
        "geometry": field.GEOMETRIES,
        "material": shading.MATERIALS,
        "background": shading.BACKGROUNDS,
        "renderer": render.RENDERERS,
        "guidance": guidance.GUIDANCES,
        "prompt_processor": prompts.PROMPT_PROCESSORS,
        "exporter": export.EXPORTERS,
    }
    return {kind: {name: entry if isinstance(entry, tuple) else (entry, entry.Config)
                   for name, entry in table.items()} for kind, table in tables.items()}


def find_type(kind: str, name: str, where: str) -> tuple[type, type]:
    """The class of a type name and its config's class; ValueError says what exists."""
    types = known_types()[kind]
    if name not in types:
        raise ValueError(f"{where} is {name!r}, which the portable engine does not have. "
                         f"{closest(name, types)} (For other types use --engine threestudio.)")
    return types[name]


def make_plan(cfg: ExperimentConfig) -> Plan:
    """Check every key and type name of a config; ValueError for the first that is wrong."""
    find_type("system", cfg.system_type, "system_type")
    system = structured(SystemConfig, cfg.system, "system")
    if system.geometry_convert_from is not None:
        raise ValueError("system.geometry_convert_from needs meshes that only threestudio has: "
                         "remove it, or use --engine threestudio.")
    data, data_config = find_type("data", cfg.data_type, "data_type")
    parts: dict[str, tuple[type, Any]] = {"data": (data, structured(data_config, cfg.data, "data"))}
    for kind in PARTS:
        where = f"system.{kind}"
        cls, config = find_type(kind, getattr(system, f"{kind}_type"), f"{where}_type")
        parts[kind] = (cls, structured(config, getattr(system, kind), where))
    return Plan(cfg, system, parts)


def build_system(plan: Plan) -> Any:
    """The LightningModule of a plan, its field freshly initialised from the seed."""
    import torch

    from gps_guidance.lift.system import DreamFusionSystem, seed_step

    seed_step(plan.cfg.seed, 0)
    built: dict[str, torch.nn.Module] = {}
    for kind in ("geometry", "material", "background"):
        cls, cfg = plan.parts[kind]
        built[kind] = cls(cfg)
    cls, cfg = plan.parts["renderer"]
    built["renderer"] = cls(cfg, geometry=built["geometry"], material=built["material"],
                            background=built["background"])
    guidance, guidance_cfg = plan.parts["guidance"]
    prompts, prompts_cfg = plan.parts["prompt_processor"]
    return DreamFusionSystem(
        plan.system, built,
        make_guidance=lambda device: guidance(guidance_cfg, device),
        make_prompt_processor=lambda device: prompts(prompts_cfg, device),
        save_dir=Path(plan.cfg.trial_dir) / "save", seed=plan.cfg.seed,
        placement=placement_of(guidance_cfg),
    )


def placement_of(guidance: Any) -> Any:
    """Landmark and centre from the angle model's folder, where the config names one."""
    from gps_guidance.lift.export import Placement
    from gps_guidance.models import angle_config

    offset = float(getattr(guidance, "north_offset_deg", 0.0))
    try:
        about = angle_config(guidance.pretrained_model_name_or_path,
                             getattr(guidance, "lora_weights", None)) or {}
    except ValueError:  # the guidance says what is wrong with the model when it is built
        about = {}
    center = about.get("center")
    return Placement(about.get("landmark", ""), tuple(center) if center else None, offset)


def find_resume(cfg: ExperimentConfig) -> None:
    """Make ``cfg.resume`` an existing file (``last``: the newest) and go on in its trial folder.

    A checkpoint of this config's own trials, ``exp_dir/tag[@time]/ckpts/``, continues that trial;
    one from elsewhere starts a new trial. ValueError if there is none.
    """
    if cfg.resume is None:
        return
    exp_dir = Path(cfg.exp_dir)
    if cfg.resume == "last":
        trials = [p for p in exp_dir.glob("*/ckpts/*.ckpt") if _is_trial(p.parents[1], cfg)]
        found = max(trials, key=lambda p: (p.stat().st_mtime_ns, p.name == "last.ckpt"),
                    default=None)
        if found is None:
            raise ValueError(f"resume=last: there is no checkpoint of {cfg.tag!r} in {exp_dir}.")
        cfg.resume = str(found)
    path = Path(cfg.resume)
    if not path.is_file():
        near = sorted(path.parent.glob("*.ckpt"))
        hint = f" There is {near[-1]}." if near else ""
        raise ValueError(f"resume={path}: there is no such file.{hint}")
    trial = path.resolve().parent.parent
    if trial.parent == exp_dir.resolve() and _is_trial(trial, cfg):
        cfg.set_timestamp(trial.name[len(cfg.tag):])


def _is_trial(folder: Path, cfg: ExperimentConfig) -> bool:
    rest = folder.name[len(cfg.tag):]
    return folder.name.startswith(cfg.tag) and (rest == "" or rest.startswith("@"))
