"""The worlds that tourists photograph, by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from gps_guidance.miniature.arch import ARCH
from gps_guidance.miniature.city_photographer import take_city_photos
from gps_guidance.miniature.monuments import take_monument_photos
from gps_guidance.miniature.photographer import take_photos

# folder, number of photos, seed, processes -> the folder
WORLDS: dict[str, Callable[[Path, int, int, int], Path]] = {
    "landmark": take_photos,
    "arch": partial(take_photos, name=ARCH.name),
    "monuments": take_monument_photos,
    "city": take_city_photos,
    "city-every-pair": partial(take_city_photos, every_pair=True),
}
