"""Folders of tourists' photos: JPEG files with EXIF GPS, and the truth beside them. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

from PIL import ExifTags, Image, TiffImagePlugin
from tqdm import tqdm

Job = tuple[int, int, str]  # seed, index of the photo, folder
Take = Callable[[Job], dict[str, object]]


def gps_exif(lat: float, lon: float, taken_at: str, caption: str | None = None) -> Image.Exif:
    """EXIF with position (degrees, minutes, seconds to 1e-4 s, about 3 mm), time and caption."""

    def dms(value: float) -> tuple[TiffImagePlugin.IFDRational, ...]:
        seconds = Fraction(round(abs(value) * 3600 * 10000), 10000)
        parts = (seconds // 3600, seconds % 3600 // 60, seconds % 60)
        return tuple(TiffImagePlugin.IFDRational(Fraction(p)) for p in parts)

    exif = Image.Exif()
    exif[ExifTags.Base.DateTime] = taken_at
    if caption is not None:
        exif[ExifTags.Base.ImageDescription] = caption
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(
        {1: "N" if lat >= 0 else "S", 2: dms(lat), 3: "E" if lon >= 0 else "W", 4: dms(lon)}
    )
    return exif


def write_album(
    take: Take, folder: str | Path, count: int, seed: int, processes: int, what: str, frame: str
) -> Path:
    """Let ``take`` write photos 0 to ``count`` - 1 under ``folder``; its rows go to truth.json.

    ``take`` is a function of a module, so that other processes find it, and photo ``i`` depends on
    (seed, i) alone: any number of processes writes the same files. ``what`` names the world on the
    progress bar, ``frame`` says in the file how its positions are to be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(seed, index, str(folder)) for index in range(count)]
    rows = tqdm(_map(take, jobs, processes), desc=f"photographing {what}", unit="photo",
                total=count)
    about = {"frame": frame, "photos": list(rows)}
    (folder / "truth.json").write_text(json.dumps(about))
    return folder


def _map(take: Take, jobs: list[Job], processes: int) -> Iterator[dict[str, object]]:
    if processes == 1:
        yield from map(take, jobs)
    else:
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(take, jobs, chunksize=16)
