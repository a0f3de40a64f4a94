"""What a photo's own metadata says: position, heading, time, caption. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from gps_guidance import geo
from gps_guidance.photos.images import open_image
from gps_guidance.photos.manifest import Rejected

# What cameras and phones write into ImageDescription by themselves: it says nothing of the photo.
CAMERA_CAPTIONS = re.compile(
    r"((olympus|(konica )?minolta|kodak|pentax) )?digital( still)? camera|sony dsc"
    r"|samsung( csc)?|<?(digimax|kenox|samsung) .*|exif[_ ]jpeg[_ ]picture|dcim.*"
    r"|(dscn?|dscf|imgp?|pict|gopr|pxl)[_-]?\d[\d_]*(\.jpe?g)?"  # the file's name
    r"|(cof|dav|edf|hdr|mde|oznor|rhdr|sdr)|default|screenshot|untitled",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class GPSReading:
    """What a photo says about where it was taken; angles in degrees, None where it is silent."""

    lat: float
    lon: float
    horizontal_error_m: float | None = None
    heading_deg: float | None = None
    taken_at: str | None = None


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
    return replace(
        _checked(lat, lon), horizontal_error_m=_optional(ifd.get(tag.GPSHPositioningError)),
        heading_deg=_heading(ifd), taken_at=_taken_at(exif),
    )


def _checked(lat: float, lon: float) -> GPSReading:
    if lat == 0 and lon == 0:
        raise Rejected("null_island", "the position is (0, 0)")
    try:
        geo.check_lat_lon((lat, lon))
    except ValueError as error:
        raise Rejected("out_of_range", str(error)) from error
    return GPSReading(lat, lon)


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
    """What EXIF's ImageDescription says, in one line; None if nothing, or what a program wrote: a
    camera's own default (:data:`CAMERA_CAPTIONS`), or JSON, as Mapillary's, with the position."""
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
    said = caption and not caption.startswith("{") and not CAMERA_CAPTIONS.fullmatch(caption)
    return caption if said else None


def read_gps(path: str | Path) -> GPSReading:
    """The position of one photo file; ValueError says what is missing or wrong."""
    try:
        with open_image(Path(path).read_bytes()) as photo:
            return position_of(photo)
    except Rejected as error:
        raise ValueError(f"{path}: {error}") from error


def position_of(photo: Image.Image) -> GPSReading:
    """The position in the photo's EXIF or, if that has none, in its XMP; Rejected as ``gps_of``."""
    try:
        exif = photo.getexif()
        try:
            return gps_of(exif)
        except Rejected as error:
            if error.reason != "no_gps":
                raise
            reading = xmp_gps(_xmp(photo))
            if reading is None:
                raise
            return replace(reading, taken_at=_taken_at(exif))
    except Rejected:
        raise
    except Exception as error:  # Pillow raises anything on damaged EXIF
        raise Rejected("bad_gps", f"{type(error).__name__}: {error}") from error


def _xmp(photo: Image.Image) -> str:
    """The photo's XMP packet, where Pillow leaves it for each format; empty if there is none."""
    for key in ("xmp", "XML:com.adobe.xmp"):
        packet = photo.info.get(key)
        if packet:
            return packet.decode("utf-8", "replace") if isinstance(packet, bytes) else str(packet)
    return ""


def xmp_gps(packet: str) -> GPSReading | None:
    """The position in an XMP packet (exif:GPSLatitude and exif:GPSLongitude), None if it has none.

    As attributes or elements, in XMP's own form, "43,43,22.6N" or "43,43.377N", or in degrees, as
    some programs write. Only these two are looked for: no XML of strangers is parsed. Rejected as
    ``gps_of``.
    """
    found = [re.search(rf'GPS{axis}(?:\s*=\s*["\']|>)\s*([^"\'<]+)', packet)
             for axis in ("Latitude", "Longitude")]
    if found[0] is None or found[1] is None:
        return None
    lat = _xmp_degrees(found[0][1].strip(), "N", "S")
    lon = _xmp_degrees(found[1][1].strip(), "E", "W")
    return _checked(lat, lon)


def _xmp_degrees(text: str, positive: str, negative: str) -> float:
    ref = text[-1:].upper()
    if ref in (positive, negative):
        return _degrees(tuple(text[:-1].split(",")), ref, positive, negative)
    return _ratio(text)
