"""Speed of ingest: against the script one would write, and of half a million records.

    python benchmarks/ingest.py

needs exifread and imagehash (`pip install exifread imagehash`) for the comparison. The photos are
2,000 procedural ones of 1600 x 1200 pixels with EXIF GPS; both sides read the position, hash the
picture and write a small upright JPEG of it, ours with everything else that ingest does. Prints
JSON lines {"name", "value", "goal", "ok"}; nothing else should run meanwhile.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from stages import ROOT, line

from gps_guidance.miniature.album import gps_exif

PHOTOS, RECORDS, SIDE = 2000, 500_000, 256
CENTER = (43.722952, 10.396597)


def take(job: tuple[str, int]) -> None:
    """A photo with smooth structure and some grain, as a camera would store it."""
    folder, index = job
    rng = np.random.default_rng(index)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((1600, 1200), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = pixels + rng.integers(-6, 7, pixels.shape)
    lat, lon = np.array(CENTER) + rng.uniform(-0.002, 0.002, 2)
    exif = gps_exif(float(lat), float(lon), "2024:05:06 07:08:09")
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
        f"{folder}/{index:05d}.jpg", quality=92, exif=exif)


def obvious(folder: Path, out: Path) -> int:
    """What a user would write: Pillow, exifread and imagehash in a loop."""
    import exifread
    import imagehash

    def degrees(tag: object, ref: object) -> float:
        d, m, s = (float(value.num) / value.den for value in tag.values)  # type: ignore[attr-defined]
        return (d + m / 60 + s / 3600) * (-1 if str(ref) in "SW" else 1)

    out.mkdir()
    rows = []
    for path in sorted(folder.glob("*.jpg")):
        with open(path, "rb") as file:
            tags = exifread.process_file(file, details=False)
        lat = degrees(tags["GPS GPSLatitude"], tags["GPS GPSLatitudeRef"])
        lon = degrees(tags["GPS GPSLongitude"], tags["GPS GPSLongitudeRef"])
        photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        code = imagehash.dhash(photo)
        photo.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        photo.save(out / path.name, quality=95)
        rows.append((path.name, lat, lon, str(code)))
    with open(out / "photos.csv", "w", newline="") as table:
        csv.writer(table).writerows(rows)
    return len(rows)


def ours(arguments: list[str]) -> tuple[float, int]:
    """Seconds of one ingest, and the peak memory in bytes of its largest process."""
    command = [sys.executable, "-m", "gps_guidance.cli", "ingest", *arguments]
    began = time.perf_counter()
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(run.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def write_records(path: Path) -> None:
    """Half a million records of a city as a harvest gives them, one in twenty not usable."""
    rng = np.random.default_rng(0)
    lat = rng.uniform(40.70, 40.88, RECORDS)
    lon = rng.uniform(-74.02, -73.91, RECORDS)
    spoiled = rng.random(RECORDS)
    lat[spoiled < 0.02] += 10
    lat[(spoiled >= 0.02) & (spoiled < 0.03)] = 0
    lon[(spoiled >= 0.02) & (spoiled < 0.03)] = 0
    owners = rng.integers(40_000, size=RECORDS)
    numbers = np.where(rng.random(RECORDS) < 0.02, 7, np.arange(RECORDS))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "lat", "lon", "owner", "licence", "caption", "taken_at"])
        for k in range(RECORDS):
            writer.writerow([
                f"https://example.org/{numbers[k]}.jpg", f"{lat[k]:.6f}", f"{lon[k]:.6f}",
                f"{owners[k]}@N00", "CC BY 2.0", f"a view of the city, number {k}",
                f"2014-0{1 + k % 9}-11T12:34:56",
            ])


def compare_photos(folder: Path) -> list[bool]:
    """Photos a second of both, in turn, three times; the best of each counts."""
    (folder / "photos").mkdir()
    with ProcessPoolExecutor() as pool:
        list(pool.map(take, [(str(folder / "photos"), k) for k in range(PHOTOS)], chunksize=50))
    theirs, mine = [], []
    for turn in range(3):
        began = time.perf_counter()
        assert obvious(folder / "photos", folder / f"theirs-{turn}") == PHOTOS
        theirs.append(time.perf_counter() - began)
        seconds, _ = ours([str(folder / "photos"), "--landmark", "pisa", "--image-size", str(SIDE),
                           "--out", str(folder / f"ours-{turn}")])
        mine.append(seconds)
        for name in ("theirs", "ours"):
            shutil.rmtree(folder / f"{name}-{turn}")
    line("ingest.photos_a_second", PHOTOS / min(mine))
    line("ingest.photos_a_second_of_the_script", PHOTOS / min(theirs))
    return [line("ingest.speed_over_the_script", min(theirs) / min(mine), 1.8)]


def clean_records(folder: Path) -> list[bool]:
    write_records(folder / "records.csv")
    seconds, memory = ours([
        str(folder / "records.csv"), "--bbox", "40.70,-74.02,40.88,-73.91", "--records-only",
        "--max-per-owner", "20", "--val-fraction", "0.1", "--out", str(folder / "records"),
    ])
    return [line("ingest.records_seconds", seconds, 60, below=True),
            line("ingest.records_peak_gb", memory / 1e9, 1.5, below=True)]


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        good = clean_records(Path(name)) + compare_photos(Path(name))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
