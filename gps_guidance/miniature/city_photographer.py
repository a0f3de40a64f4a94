"""Tourists photograph Miniatown: JPEG files with EXIF GPS, time and caption, and the truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from gps_guidance import geo
from gps_guidance.miniature.album import Job, gps_exif, write_album
from gps_guidance.miniature.city import (
    ARTS,
    CENTER,
    COLOURS,
    GRID,
    HELD_OUT,
    LANDMARKS,
    OBJECTS,
    WEATHERS,
    Scene,
    caption_of,
    from_grid,
    place_of,
)
from gps_guidance.miniature.city_scene import draw_scene

GPS_NOISE_M = 4.0
MARGIN_M = 25.0  # nobody stands so near to the edge that the GPS error leads out of the city
PHOTO_SIZE = 96
BEYOND_M = 190.0  # a landmark nearer than this may be seen over the roofs

# Where crowds stand on the city's grid, how widely, and their part of all photos.
CROWDS = (
    (*LANDMARKS["clock-tower"], 42.0, 0.09), (*LANDMARKS["dome"], 42.0, 0.09),
    (*LANDMARKS["ferris-wheel"], 42.0, 0.09), (720.0, 890.0, 32.0, 0.10),
    (75.0, 285.0, 32.0, 0.11), (500.0, 510.0, 40.0, 0.07), (500.0, 380.0, 50.0, 0.04),
)
WEATHER_PARTS = (0.31, 0.23, 0.23, 0.23)
VIEW_PART = 0.12  # of the photos outdoors: no object


@dataclass(frozen=True)
class CityShot:
    """One photo: where the tourist stands and what the GPS says, (lat, lon) in degrees; what is
    seen, and a landmark over the roofs."""

    position: geo.LatLon
    gps: geo.LatLon
    scene: Scene
    beyond: str | None
    taken_at: str


def _stand(rng: np.random.Generator) -> np.ndarray:
    """A position [2] on the grid: in one of the crowds, or anywhere."""
    parts = [crowd[3] for crowd in CROWDS]
    while True:
        pick = rng.choice(len(CROWDS) + 1, p=[*parts, 1 - sum(parts)])
        if pick == len(CROWDS):
            return rng.uniform(MARGIN_M, GRID - MARGIN_M, 2)
        at = rng.normal(CROWDS[pick][:2], CROWDS[pick][2])
        if np.all((at > MARGIN_M) & (at < GRID - MARGIN_M)):
            return at


def _see(rng: np.random.Generator, place: str, every_pair: bool) -> Scene:
    if place in ARTS:
        weather = None
    else:
        weather = str(rng.choice(WEATHERS, p=WEATHER_PARTS))
        if rng.random() < VIEW_PART:
            return Scene(place, None, None, weather)
    allowed = [thing for thing in OBJECTS if every_pair or (thing, place) not in HELD_OUT]
    return Scene(place, str(rng.choice(allowed)), str(rng.choice(list(COLOURS))), weather)


def _beyond(rng: np.random.Generator, grid: np.ndarray, place: str) -> str | None:
    if place in ARTS or place in LANDMARKS:
        return None
    near = [name for name, at in LANDMARKS.items() if np.hypot(*(grid - at)) < BEYOND_M]
    return near[0] if near and rng.random() < 0.6 else None


def _time(rng: np.random.Generator, weather: str | None) -> str:
    """Snow falls from December to February, and it is night from 21 to 23 o'clock."""
    month = rng.choice([12, 1, 2]) if weather == "snow" else rng.integers(4, 11)
    hour = rng.integers(21, 24) if weather == "night" else rng.integers(9, 18)
    return f"2024:{month:02d}:{rng.integers(1, 29):02d} {hour:02d}:{rng.integers(60):02d}:00"


def plan_city_shot(rng: np.random.Generator, every_pair: bool = False) -> CityShot:
    """Draw one photo: many stand at the sights, the rest anywhere. Pairs of HELD_OUT are seen by
    ``every_pair`` alone."""
    grid = _stand(rng)
    position = from_grid(grid)
    scene = _see(rng, str(place_of(position)), every_pair)
    noisy = geo.local_m(position, CENTER) + rng.normal(0, GPS_NOISE_M, 2)
    lat, lon = geo.from_local_m(noisy, CENTER)
    return CityShot((float(position[0]), float(position[1])), (float(lat), float(lon)), scene,
                    _beyond(rng, grid, scene.place), _time(rng, scene.weather))


def _take(job: Job, every_pair: bool) -> dict[str, object]:
    seed, index, folder = job
    rng = np.random.default_rng((seed, index))
    shot = plan_city_shot(rng, every_pair)
    scene = shot.scene
    pixels = draw_scene(scene.place, scene.object, scene.colour, scene.weather, rng, PHOTO_SIZE,
                        shot.beyond)
    path = Path(folder) / f"tourist-{index:05d}.jpg"
    exif = gps_exif(*shot.gps, shot.taken_at, caption_of(scene))
    Image.fromarray(pixels).save(path, quality=92, exif=exif)
    return {
        "file": path.name, "position": [round(v, 8) for v in shot.position],
        "place": scene.place, "object": scene.object, "colour": scene.colour,
        "weather": scene.weather,
    }


def take_city_photos(
    folder: str | Path, count: int = 3000, seed: int = 0, processes: int = 1,
    every_pair: bool = False,
) -> Path:
    """Write ``count`` photos under ``folder``, and what each truly shows in ``truth.json``.

    A photo is 96 px square and carries GPS with an error of some metres, time and caption. Photo
    ``i`` depends on (seed, i) alone, so any number of processes writes the same files.
    ``every_pair`` has objects in the places of HELD_OUT too: an album for judges, not for models.
    """
    return write_album(partial(_take, every_pair=every_pair), folder, count, seed, processes,
                       "the city", "lat, lon in degrees")
