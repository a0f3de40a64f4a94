"""From a folder of geotagged photos to a clean dataset folder with a manifest. No torch.

Nothing is dropped silently: every file is in ``manifest.parquet`` or, with its reason, in
``rejected.parquet``. Images are re-encoded upright and without metadata. The format is described
in docs/formats.md.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from gps_guidance import geo

log = logging.getLogger(__name__)

VERSION = "1"
EXTENSIONS = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".heic", ".heif"}
SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("file", pa.string()), ("sha256", pa.string()),
        ("phash", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
        ("lat", pa.float64()), ("lon", pa.float64()), ("horizontal_error_m", pa.float64()),
        ("heading_deg", pa.float64()), ("east_m", pa.float64()), ("north_m", pa.float64()),
        ("bearing_deg", pa.float64()), ("distance_m", pa.float64()), ("bin", pa.int32()),
        ("taken_at", pa.string()), ("owner", pa.string()), ("licence", pa.string()),
        ("source", pa.string()), ("caption", pa.string()), ("split", pa.string()),
    ],
    metadata={"gps_guidance_manifest_version": VERSION},
)
REJECTED = pa.schema([("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

# What cameras and phones write into ImageDescription by themselves: it says nothing of the photo.
CAMERA_CAPTIONS = re.compile(
    r"((olympus|(konica )?minolta|kodak|pentax) )?digital( still)? camera|sony dsc"
    r"|samsung( csc)?|<?(digimax|kenox|samsung) .*|exif[_ ]jpeg[_ ]picture|dcim.*"
    r"|(dscn?|dscf|imgp?|pict|gopr|pxl)[_-]?\d[\d_]*(\.jpe?g)?"  # the file's name
    r"|(cof|dav|edf|hdr|mde|oznor|rhdr|sdr)|default|screenshot|untitled",
    re.IGNORECASE,
)


class Rejected(Exception):
    """A photo that does not enter the dataset: a counted reason and a detail for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class GPSReading:
    """What a photo says about where it was taken; angles in degrees, None where it is silent."""

    lat: float
    lon: float
    horizontal_error_m: float | None = None
    heading_deg: float | None = None
    taken_at: str | None = None


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


@dataclass
class Manifest:
    """A dataset folder as read back: its rows, and the landmark with its centre (lat, lon) or the
    box of the city."""

    rows: pa.Table
    root: Path
    landmark: str | None = None
    center: geo.LatLon | None = None
    bounds: geo.Bounds | None = None
    counts: dict[str, int] = field(default_factory=dict)


# --- EXIF ------------------------------------------------------------------------------------


def _ratio(value: Any) -> float:
    """A rational of EXIF as a float; Rejected for 0/0, NaN and non-numbers."""
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise Rejected("bad_gps", f"{value!r} is not a number") from error
    if not math.isfinite(number):
        raise Rejected("bad_gps", f"{value!r} is not finite")
    return number


def _text(value: Any) -> str:
    raw = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return raw.strip("\x00 ").upper()


def _degrees(value: Any, ref: Any, positive: str, negative: str) -> float:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(parts) <= 3:
        raise Rejected("bad_gps", f"{value!r} is not degrees, minutes, seconds")
    degrees = sum(_ratio(part) / 60**k for k, part in enumerate(parts))
    sign = _text(ref)[:1]
    if sign not in (positive, negative):
        raise Rejected("bad_gps", f"the hemisphere is {ref!r}, not {positive} or {negative}")
    return -degrees if sign == negative else degrees


def gps_of(exif: Image.Exif) -> GPSReading:
    """The position in EXIF; Rejected with ``no_gps``, ``bad_gps``, ``null_island`` or
    ``out_of_range``."""
    ifd = exif.get_ifd(ExifTags.IFD.GPSInfo)
    tag = ExifTags.GPS
    if tag.GPSLatitude not in ifd or tag.GPSLongitude not in ifd:
        raise Rejected("no_gps", "no GPS position in the metadata")
    lat = _degrees(ifd[tag.GPSLatitude], ifd.get(tag.GPSLatitudeRef), "N", "S")
    lon = _degrees(ifd[tag.GPSLongitude], ifd.get(tag.GPSLongitudeRef), "E", "W")
    if lat == 0 and lon == 0:
        raise Rejected("null_island", "the position is (0, 0)")
    try:
        geo.check_lat_lon((lat, lon))
    except ValueError as error:
        raise Rejected("out_of_range", str(error)) from error
    return GPSReading(
        lat, lon, _optional(ifd.get(tag.GPSHPositioningError)), _heading(ifd), _taken_at(exif)
    )


def _optional(value: Any) -> float | None:
    try:
        return None if value is None else _ratio(value)
    except Rejected:
        return None


def _heading(ifd: dict[int, Any]) -> float | None:
    """Direction of view from true north; a magnetic one is not used."""
    if _text(ifd.get(ExifTags.GPS.GPSImgDirectionRef, "T"))[:1] != "T":
        return None
    value = _optional(ifd.get(ExifTags.GPS.GPSImgDirection))
    return None if value is None else value % 360.0


def _taken_at(exif: Image.Exif) -> str | None:
    raw = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
    raw = _text(raw or exif.get(ExifTags.Base.DateTime))
    try:
        return datetime.strptime(raw[:19], "%Y:%m:%d %H:%M:%S").isoformat()
    except ValueError:
        return None


def caption_of(exif: Image.Exif) -> str | None:
    """What EXIF's ImageDescription says, in one line; None if nothing, or a camera's own default
    (:data:`CAMERA_CAPTIONS`)."""
    try:
        raw = exif.get(ExifTags.Base.ImageDescription)
    except Exception:  # Pillow raises anything on damaged EXIF; a caption is not worth a photo
        return None
    text = raw.decode("latin-1") if isinstance(raw, bytes) else str(raw or "")
    try:
        text = text.encode("latin-1").decode("utf-8")  # ASCII by the book, UTF-8 in practice
    except UnicodeError:
        pass
    printable = "".join(c if c.isprintable() else " " for c in text.split("\x00")[0])
    caption = " ".join(printable.split())
    return None if not caption or CAMERA_CAPTIONS.fullmatch(caption) else caption


def read_gps(path: str | Path) -> GPSReading:
    """The position of one photo file; ValueError says what is missing or wrong."""
    try:
        with _open(Path(path).read_bytes()) as photo:
            return _gps(photo)
    except Rejected as error:
        raise ValueError(f"{path}: {error}") from error


def _gps(photo: Image.Image) -> GPSReading:
    try:
        return gps_of(photo.getexif())
    except Rejected:
        raise
    except Exception as error:  # Pillow raises anything on damaged EXIF
        raise Rejected("bad_gps", f"{type(error).__name__}: {error}") from error


# --- one photo -------------------------------------------------------------------------------


def _open(data: bytes) -> Image.Image:
    """Open an image of any supported kind; Rejected with ``unreadable`` or ``too_large``."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its own text has an address, other in every run
        raise Rejected("unreadable", "no known image format") from error
    except Exception as error:  # decoders raise anything on damaged files
        raise Rejected("unreadable", f"{type(error).__name__}: {error}") from error


def _upright(photo: Image.Image, image_size: int) -> Image.Image:
    """The photo turned upright, RGB, no side above ``image_size``; Rejected if it is damaged."""
    try:
        photo.load()
        upright = ImageOps.exif_transpose(photo).convert("RGB")
    except Image.DecompressionBombError as error:
        raise Rejected("too_large", str(error)) from error
    except Exception as error:  # decoders raise anything on damaged files
        reason = "truncated" if "truncat" in str(error).lower() else "unreadable"
        raise Rejected(reason, f"{type(error).__name__}: {error}") from error
    upright.info.clear()  # or the JPEG writer copies the photographer's comment
    upright.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
    return upright


def difference_hash(photo: Image.Image) -> str:
    """64-bit perceptual hash: whether each of 9 x 8 grey pixels is brighter than its neighbour."""
    small = np.asarray(photo.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    bits = (np.diff(small, axis=1) > 0).flatten()
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


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
    with _open(data) as photo:
        if min(photo.size) < filters.min_size:
            raise Rejected("too_small", f"{photo.width} x {photo.height} pixels")
        columns = _place(_gps(photo), filters) | {"caption": caption_of(photo.getexif())}
        upright = _upright(photo, filters.image_size)
    seen.add(sha256)
    name = f"images/{sha256[:16]}.jpg"
    if _stored_size(out / name) != upright.size:
        buffer = io.BytesIO()
        upright.save(buffer, "JPEG", quality=95)
        _write(out / name, buffer.getvalue())
    is_val = int(sha256[-8:], 16) / 2**32 < filters.val_fraction
    return {
        "id": sha256[:16], "file": name, "sha256": sha256, "phash": difference_hash(upright),
        "width": upright.width, "height": upright.height, "source": path.name,
        "split": "val" if is_val else "train", **columns,
    }


# --- the whole -------------------------------------------------------------------------------


def find_files(sources: Sequence[str | Path]) -> Iterator[Path]:
    """Files under the sources (folders or files) in a fixed order, hidden ones left out."""
    for source in map(Path, sources):
        if source.is_file():
            yield source
        elif source.is_dir():
            for path in sorted(source.rglob("*")):
                hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
                if path.is_file() and not hidden:
                    yield path
        else:
            raise ValueError(f"There is no file or folder {source}. Give a folder of photos.")


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
    _write_table(out / "rejected.parquet", rejected, REJECTED)
    if not rows:
        raise ValueError(_nothing_left(sources, reasons, len(files)))
    rows.sort(key=lambda row: row["id"])
    about = {
        "version": VERSION, "landmark": name, "center": at,
        "bounds": bounds.as_tuple() if bounds else None, "num_bins": num_bins,
        "kept": len(rows), "rejected": dict(sorted(reasons.items())),
    }
    _write(out / "dataset.json", (json.dumps(about, indent=2) + "\n").encode())
    _write_table(out / "manifest.parquet", rows, SCHEMA)
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


def load_manifest(root: str | Path) -> Manifest:
    """Read a dataset folder back; ValueError if it is none or of another version."""
    root = Path(root)
    if not (root / "manifest.parquet").is_file() or not (root / "dataset.json").is_file():
        raise ValueError(f"{root} is not a dataset folder: make one with `gps-guidance ingest`.")
    about = json.loads((root / "dataset.json").read_text("utf-8"))
    if about["version"] != VERSION:
        raise ValueError(
            f"{root} has manifest version {about['version']}, this release reads {VERSION}: run "
            "`gps-guidance ingest` again."
        )
    center = tuple(about["center"]) if about["center"] else None
    bounds = geo.Bounds(*about["bounds"]) if about["bounds"] else None
    return Manifest(pq.read_table(root / "manifest.parquet"), root, about["landmark"], center,
                    bounds, about["rejected"])


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    _write(path, buffer.getvalue())


def _write(path: Path, data: bytes) -> None:
    """Write a file at once: under a temporary name, then renamed. A full disk is a ValueError."""
    stage = path.with_name(f".{path.name}.part")
    try:
        stage.write_bytes(data)
        os.replace(stage, path)
    except OSError as error:
        stage.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"The disk is full: {path} needs {len(data)} more bytes. Make room and run the same "
            "command again; it goes on where it stopped."
        ) from error
