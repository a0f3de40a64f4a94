"""From a folder of geotagged photos to a clean dataset folder with a manifest. No torch.

Nothing is dropped silently: every file is in ``manifest.parquet`` or, with its reason, in
``rejected.parquet``. Images are re-encoded upright and without metadata. The format is described
in docs/formats.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from gps_guidance import geo
from gps_guidance.photos.exif import GPSReading, caption_of, position_of
from gps_guidance.photos.images import EXTENSIONS, difference_hash, open_image, upright
from gps_guidance.photos.manifest import (
    REJECTED,
    SCHEMA,
    VERSION,
    Rejected,
    write_table,
    write_whole,
)
from gps_guidance.photos.sources import find_files


@dataclass
class Filters:
    """Which photos are wanted. ``center`` is (lat, lon) of the landmark."""

    center: geo.LatLon | None = None
    bounds: geo.Bounds | None = None
    min_distance_m: float = 0.0
    max_distance_m: float = math.inf
    min_size: int = 64
    image_size: int = 768
    num_bins: int = 36
    val_fraction: float = 0.0


@dataclass
class IngestSummary:
    """Counts of one ingest: photos kept, rejections by reason, photos in each bearing bin."""

    kept: int
    rejected: Counter[str]
    bins: np.ndarray | None
    out: Path

    @property
    def empty(self) -> list[float]:
        """Bearings of the bins without a photo."""
        return [] if self.bins is None else [
            float(geo.bin_bearing_deg(k, len(self.bins))) for k in np.flatnonzero(self.bins == 0)
        ]


def _place(reading: GPSReading, filters: Filters) -> dict[str, Any]:
    """The columns about the position; Rejected if it is not wanted."""
    here = (reading.lat, reading.lon)
    if filters.bounds is not None and not filters.bounds.contains(here):
        raise Rejected("outside_bounds", f"({reading.lat:.5f}, {reading.lon:.5f})")
    columns: dict[str, Any] = {
        "lat": reading.lat, "lon": reading.lon, "heading_deg": reading.heading_deg,
        "horizontal_error_m": reading.horizontal_error_m, "taken_at": reading.taken_at,
    }
    if filters.center is None:
        return columns
    east, north = geo.local_m(here, filters.center)
    distance = math.hypot(east, north)
    if distance > filters.max_distance_m:
        raise Rejected("too_far", f"{distance:.0f} m from the centre")
    if distance < filters.min_distance_m:
        raise Rejected("too_near", f"{distance:.1f} m from the centre")
    bearing = float(geo.bearing_deg(here, filters.center))
    columns |= {
        "east_m": float(east), "north_m": float(north), "distance_m": distance,
        "bearing_deg": bearing, "bin": int(geo.bearing_bin(bearing, filters.num_bins)),
    }
    return columns


def _stored_size(path: Path) -> tuple[int, int] | None:
    """Size of an image that an earlier run wrote, None if there is no whole one."""
    try:
        with Image.open(path) as photo:
            return photo.size
    except OSError:
        return None


def _ingest_one(path: Path, out: Path, filters: Filters, seen: set[str]) -> dict[str, Any]:
    """Write one photo's image and return its row; Rejected says why it does not enter."""
    if path.suffix.lower() not in EXTENSIONS:
        raise Rejected("not_an_image", path.suffix or "no extension")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Rejected("unreadable", str(error)) from error
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 in seen:
        raise Rejected("duplicate", "the same bytes as an earlier file")
    with open_image(data) as photo:
        if min(photo.size) < filters.min_size:
            raise Rejected("too_small", f"{photo.width} x {photo.height} pixels")
        columns = _place(position_of(photo), filters) | {"caption": caption_of(photo.getexif())}
        image = upright(photo, filters.image_size)
    seen.add(sha256)
    name = f"images/{sha256[:16]}.jpg"
    if _stored_size(out / name) != image.size:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        write_whole(out / name, buffer.getvalue())
    is_val = int(sha256[-8:], 16) / 2**32 < filters.val_fraction
    return {
        "id": sha256[:16], "file": name, "sha256": sha256, "phash": difference_hash(image),
        "width": image.width, "height": image.height, "source": path.name,
        "split": "val" if is_val else "train", **columns,
    }


def resolve_center(landmark: str | None, center: geo.LatLon | None) -> tuple[str | None, Any]:
    """Name and centre: the paper's landmarks are known by name, others need ``center``."""
    if landmark is None:
        if center is not None:
            raise ValueError(f"The center {center} is of no landmark: add --landmark NAME.")
        return None, None
    known = geo.find_landmark(landmark)
    if center is not None:
        lat, lon = geo.check_lat_lon(center, "center")
        return (known.name if known else landmark), (float(lat), float(lon))
    if known is None:
        names = ", ".join(geo.LANDMARKS)
        raise ValueError(
            f"The landmark {landmark!r} is not one of {names}: add --center LAT,LON, its centre in "
            "degrees."
        )
    return known.name, known.center


def ingest(
    sources: Sequence[str | Path], out: str | Path, *, landmark: str | None = None,
    center: geo.LatLon | None = None, bounds: geo.Bounds | None = None,
    min_distance_m: float = 0.0, max_distance_m: float = math.inf, min_size: int = 64,
    image_size: int = 768, val_fraction: float = 0.0, num_bins: int = 36, progress: bool = True,
) -> IngestSummary:
    """Make the dataset folder ``out`` from photos; see the module's docstring.

    Positions are (lat, lon) in degrees, distances from the landmark's centre in metres, sizes in
    pixels. Deterministic: the same sources give the same bytes, and running again resumes.
    ValueError if no photo is left, or if the disk is full.
    """
    name, at = resolve_center(landmark, center)
    if at is None and (min_distance_m > 0 or max_distance_m < math.inf):
        raise ValueError("A distance is from a landmark's centre: add --landmark NAME.")
    filters = Filters(at, bounds, min_distance_m, max_distance_m, min_size, image_size, num_bins,
                      val_fraction)
    out = Path(out)
    files = [path for path in find_files(sources) if not _is_ours(path, out)]
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    seen: set[str] = set()
    (out / "images").mkdir(parents=True, exist_ok=True)
    for path in tqdm(files, desc="ingesting", unit="file", disable=not progress):
        try:
            rows.append(_ingest_one(path, out, filters, seen))
        except Rejected as error:
            rejected.append({"source": path.name, "reason": error.reason, "detail": error.detail})
    reasons = Counter(row["reason"] for row in rejected)
    write_table(out / "rejected.parquet", rejected, REJECTED)
    if not rows:
        raise ValueError(_nothing_left(sources, reasons, len(files)))
    rows.sort(key=lambda row: row["id"])
    about = {
        "version": VERSION, "landmark": name, "center": at,
        "bounds": bounds.as_tuple() if bounds else None, "num_bins": num_bins,
        "kept": len(rows), "rejected": dict(sorted(reasons.items())),
    }
    write_whole(out / "dataset.json", (json.dumps(about, indent=2) + "\n").encode())
    write_table(out / "manifest.parquet", rows, SCHEMA)
    bins = None
    if at is not None:
        bins = np.bincount([row["bin"] for row in rows], minlength=num_bins)
    return IngestSummary(len(rows), reasons, bins, out)


def _is_ours(path: Path, out: Path) -> bool:
    """Whether an earlier run wrote this file, where ``out`` lies within a source."""
    try:
        inside = path.absolute().relative_to(out.absolute())
    except ValueError:
        return False
    own = r"(images/[0-9a-f]{16}\.jpg|dataset\.json|manifest\.parquet|rejected\.parquet)"
    return re.fullmatch(own, inside.as_posix()) is not None


def _nothing_left(sources: Iterable[Any], reasons: Counter[str], count: int) -> str:
    where = ", ".join(map(str, sources))
    if count == 0:
        return f"{where} holds no file. Give a folder of photos."
    why = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
    remedy = {
        "no_gps": "Use originals: most sites and messengers strip the GPS tag.",
        "too_far": "Raise --max-distance, or check --center (it is LAT,LON).",
        "outside_bounds": "Check the bounds (south,west,north,east).",
    }.get(reasons.most_common(1)[0][0], "")
    return f"No photo of {where} can be used ({why}). {remedy}".strip()
