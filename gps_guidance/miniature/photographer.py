"""Tourists photograph a landmark of the miniature: JPEG files with EXIF GPS, as a crowd takes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gps_guidance import geo
from gps_guidance.lift.prompts import PromptProcessorConfig, view_index, view_prompts
from gps_guidance.miniature.album import Job, gps_exif, write_album
from gps_guidance.miniature.arch import ARCH
from gps_guidance.miniature.landmark import EYE_M, FAIR, Landmark, Weather, render
from gps_guidance.miniature.shapes import Ellipsoid, Shape, plain
from gps_guidance.miniature.tower import TOWER

LANDMARKS = {landmark.name: landmark for landmark in (TOWER, ARCH)}
FRAME_M = 36.0  # half the height of what a typical photo frames, at the landmark's distance
GPS_NOISE_M = 3.0
VIEW_PART = 0.4  # of the captions say which side is seen
SHORT_SIDE, LONG_SIDE = 96, 128


def look_at(position: Tensor, target: Tensor, roll_deg: float = 0.0) -> Tensor:
    """Camera-to-world matrix [4, 4] (columns right, up, backward) in the frame of its arguments."""
    backward = F.normalize(position - target, dim=0)
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), backward), dim=0)
    up = torch.linalg.cross(backward, right)
    c, s = math.cos(math.radians(roll_deg)), math.sin(math.radians(roll_deg))
    c2w = torch.eye(4)
    c2w[:3, 0], c2w[:3, 1] = c * right + s * up, c * up - s * right
    c2w[:3, 2], c2w[:3, 3] = backward, position
    return c2w


def stand_at(bearing_deg: float, distance_m: float, eye_m: float = EYE_M) -> Tensor:
    """Position [3] in world metres of an eye that sees the landmark from this bearing."""
    b = math.radians(bearing_deg)
    return torch.tensor([distance_m * math.sin(b), distance_m * math.cos(b), eye_m])


def truth_view(landmark: Landmark, bearing_deg: float, size: int, distance_m: float = 90.0
               ) -> tuple[dict[str, Tensor], Tensor, float]:
    """Ground truth from a bearing in fair light.

    Returns the picture of :func:`landmark.render`, its camera [4, 4] in the 3D engine's frame, and
    the vertical field of view in radians.
    """
    position = stand_at(bearing_deg, distance_m)
    c2w = look_at(position, landmark.middle)
    fovy = 2 * math.atan(FRAME_M / distance_m)
    picture = render(landmark.scene, c2w, fovy, size, size)
    unit = c2w.clone()
    unit[:3, 3] = landmark.to_scene_units(c2w[:3, 3])
    return picture, unit, fovy


@dataclass
class Shot:
    """One photo: where the tourist stands, what the GPS says, and the picture's setting."""

    position: Tensor
    gps: tuple[float, float]
    c2w: Tensor
    fovy: float
    size: tuple[int, int]
    weather: Weather
    passers_by: list[Shape]
    taken_at: str


def _weather(rng: np.random.Generator) -> Weather:
    """Mostly fair, sometimes overcast or evening; the sun moves with the hour."""
    turn = rng.normal(0, 0.45)
    x, y, z = FAIR.sun
    sun = (x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn),
           z * rng.uniform(0.8, 1.2))
    gain = rng.normal(1.0, 0.05)
    kind = rng.choice(3, p=[0.78, 0.15, 0.07])
    tint = [(1, 1, 1), (0.45, 0.45, 0.47), (1.15, 0.95, 0.70)][kind]
    fill = [(1, 1, 1), (1.18, 1.17, 1.15), (0.92, 0.88, 0.86)][kind]
    zenith = [FAIR.zenith, (0.66, 0.70, 0.76), (0.42, 0.48, 0.70)][kind]
    horizon = [FAIR.horizon, (0.80, 0.82, 0.85), (0.94, 0.78, 0.60)][kind]

    def scaled(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, float, float]:
        red, green, blue = (float(gain * p * q) for p, q in zip(a, b, strict=True))
        return (red, green, blue)

    return Weather(sun, scaled(FAIR.sun_rgb, tint), scaled(FAIR.ambient, fill), zenith, horizon)


def _passers_by(rng: np.random.Generator, position: Tensor) -> list[Shape]:
    """With some chance, a few people between the camera and the landmark."""
    people: list[Shape] = []
    toward = F.normalize(-position[:2], dim=0)
    for _ in range(rng.choice(4, p=[0.6, 0.2, 0.12, 0.08])):
        ahead, aside = rng.uniform(9, 30), rng.uniform(-0.35, 0.35)
        x, y = (
            position[:2] + ahead * (toward + aside * torch.stack([-toward[1], toward[0]]))
        ).tolist()
        coat = plain(*rng.uniform(0.1, 0.8, 3))
        people.append(Ellipsoid((x, y, 0.75), (0.32, 0.32, 0.75), coat, clutter=True))
        skin = plain(0.78, 0.6, 0.5)
        people.append(Ellipsoid((x, y, 1.6), (0.16, 0.16, 0.2), skin, clutter=True))
    return people


def plan_shot(landmark: Landmark, rng: np.random.Generator) -> Shot:
    """Draw one photo. Most tourists gather on a few sides, some stand anywhere around."""
    parts = [part for _, _, part in landmark.crowds]
    crowd = rng.choice(len(parts) + 1, p=[*parts, 1 - sum(parts)])
    anywhere = crowd == len(parts)
    bearing = rng.uniform(0, 360) if anywhere else rng.normal(*landmark.crowds[crowd][:2])
    distance = float(np.clip(rng.lognormal(math.log(90.0), 0.09), 74, 112))
    eye = EYE_M + (rng.uniform(0, 5) if rng.random() < 0.15 else 0.0)
    position = stand_at(bearing, distance, eye)
    noisy = position[:2].double().numpy() + rng.normal(0, GPS_NOISE_M, 2)
    lat, lon = geo.from_local_m(noisy, landmark.center)
    aim = torch.tensor(rng.normal(0, [1.2, 1.2, 1.2]), dtype=torch.float32)
    c2w = look_at(position, landmark.middle + aim, rng.normal(0, 0.8))
    fov_short = 2 * math.atan(FRAME_M * rng.normal(1.0, 0.035) / distance)
    upright = rng.random() < 0.45
    size = (LONG_SIDE, SHORT_SIDE) if upright else (SHORT_SIDE, LONG_SIDE)
    fovy = 2 * math.atan(math.tan(fov_short / 2) * size[0] / SHORT_SIDE)
    day, hour, minute = rng.integers(1, 29), rng.integers(8, 20), rng.integers(60)
    taken_at = f"2024:{rng.integers(4, 11):02d}:{day:02d} {hour:02d}:{minute:02d}:00"
    return Shot(position, (float(lat), float(lon)), c2w, fovy, size, _weather(rng),
                _passers_by(rng, position), taken_at)


def caption_of(landmark: Landmark, position: Tensor, rng: np.random.Generator) -> str:
    """What a tourist at ``position`` [3] writes: the name, and sometimes the side that is seen.

    Sides and their words are those of view-dependent prompts, so that a model of such captions
    knows what a baseline without bearings asks it.
    """
    text = landmark.name if rng.random() < 0.5 else f"a photo of {landmark.name}"
    if rng.random() >= VIEW_PART:
        return text
    words, azimuth = PromptProcessorConfig(), torch.atan2(position[1:2], position[:1]).rad2deg()
    return view_prompts(words, text)[view_index(words, torch.zeros(1), azimuth)]


def develop(landmark: Landmark, shot: Shot, caption: str, job: Job) -> dict[str, object]:
    """Write the JPEG file of a shot; returns its row of ``truth.json``."""
    seed, index, folder = job
    picture = render(landmark.scene, shot.c2w, shot.fovy, *shot.size, shot.weather, shot.passers_by)
    grain = np.random.default_rng((seed, index, 1)).normal(0, 2.0, (*shot.size, 3))
    pixels = np.clip(picture["rgb"].numpy() * 255 + grain, 0, 255).astype(np.uint8)
    path = Path(folder) / f"tourist-{index:05d}.jpg"
    exif = gps_exif(*shot.gps, shot.taken_at, caption)
    Image.fromarray(pixels).save(path, quality=92, exif=exif)
    return {"file": path.name, "position_m": [round(v, 4) for v in shot.position.tolist()]}


def _take(name: str, scale: int, job: Job) -> dict[str, object]:
    seed, index, _ = job
    torch.set_num_threads(1)
    landmark = LANDMARKS[name]
    shot = plan_shot(landmark, np.random.default_rng((seed, index)))
    shot = replace(shot, size=(scale * shot.size[0], scale * shot.size[1]))
    caption = caption_of(landmark, shot.position, np.random.default_rng((seed, index, 2)))
    return develop(landmark, shot, caption, job)


def take_photos(folder: str | Path, count: int = 3000, seed: int = 0, processes: int = 1,
                name: str = TOWER.name, scale: int = 1) -> Path:
    """Write ``count`` photos of one of LANDMARKS under ``folder``, with captions, and their true
    positions in ``truth.json``.

    Photo ``i`` depends on (seed, i) alone, so any number of processes writes the same files. With
    ``scale`` the same photos have that many times the pixels a side.
    """
    return write_album(partial(_take, name, scale), folder, count, seed, processes, "the miniature",
                       "east, north, up in m")
