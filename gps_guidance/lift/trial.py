"""A finished trial read back from its folder: its field, for more views and other scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gps_guidance.image_text import ImageTextScorer
from gps_guidance.lift.cameras import RandomCameraConfig, sample_cameras
from gps_guidance.lift.config import load_config
from gps_guidance.lift.engine import restored
from gps_guidance.lift.plan import Plan, make_plan
from gps_guidance.lift.report import render_view


def load_trial(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Any, Plan]:
    """The system of a trial folder at its last checkpoint, and the plan that it was built by.

    The diffusion model is not loaded. ``plan.parts["data"][1]`` are the cameras' settings. The
    folder may have been moved. ValueError if it holds no trial of the portable engine.
    """
    config = Path(folder) / "configs" / "parsed.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is no trial folder: configs/parsed.yaml is missing. Give what "
                         "`launch.py --train` has left, such as outputs/gps-sds-pisa/miniature@...")
    checkpoint = Path(folder) / "ckpts" / "last.ckpt"
    plan = make_plan(load_config(str(config), ["system.weights=null"]))
    plan.cfg.resume = str(checkpoint)
    return restored(plan).to(device), plan


def random_views(system: Any, data: RandomCameraConfig, views: int = 30, seed: int = 0) -> Tensor:
    """Renders [views, 3, H, W] in [0, 1] by cameras drawn as in training, of the evaluation's size.

    One stands in each ``views``-th part of the turn. torch's own random state stays as it is.
    """
    last = replace(data, height=data.eval_height, width=data.eval_width, batch_size=views,
                   resolution_milestones=[])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = sample_cameras(last, last.progressive_until + 1)
    pictures = [render_view(system, c2w, float(fovy), last.eval_height, last.eval_width)["rgb"]
                for c2w, fovy in zip(drawn["c2w"], drawn["fovy"], strict=True)]
    return torch.stack(pictures).permute(0, 3, 1, 2).clamp(0, 1)


def clip_score_of_views(system: Any, data: RandomCameraConfig, scorer: ImageTextScorer, text: str,
                        views: int = 30, seed: int = 0) -> float:
    """The CLIP score of Table 3: cosine x 100 of ``text`` with 30 random views, on average."""
    images = random_views(system, data, views, seed)
    return float(scorer.score(images, [text] * views).mean())
