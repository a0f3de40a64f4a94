"""Sidecars: the JSON file that Google Takeout puts beside each photo. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SUFFIX = ".supplemental-metadata"
LONGEST = 46  # UTF-16 units that Takeout leaves of a sidecar's name, ".json" and "(1)" not counted
MAX_BYTES = 1 << 20
EDITED = re.compile(
    r"-(edited|bearbeitet|modifié|editado|ha editado|modificato|bewerkt|edytowane|編集済み)(?=\W|$)"
)
NUMBERED = re.compile(r"(.*)(\(\d+\))")


def match_sidecars(files: Sequence[Path]) -> dict[Path, tuple[Path, dict[str, Any]]]:
    """For each of the photos that has one, its sidecar and what that says: lat, lon, caption."""
    known: dict[tuple[Path, str, str], Path] = {}
    for file in files:
        if file.suffix.lower() == ".json":
            known[(file.parent, *_split_number(file.stem))] = file
    read: dict[Path, dict[str, Any] | None] = {}
    found = {}
    for photo in files if known else ():
        if photo.suffix.lower() == ".json":
            continue
        for key in _names(photo.name):
            path = known.get((photo.parent, *key))
            if path is None:
                continue
            if path not in read:
                read[path] = read_sidecar(path)
            if (says := read[path]) is not None:
                found[photo] = path, says
                break
    return found


def _split_number(name: str) -> tuple[str, str]:
    """``IMG_1.jpg(1)`` as ``IMG_1.jpg`` and ``(1)``: Takeout numbers a sidecar after its name."""
    numbered = NUMBERED.fullmatch(name)
    return (numbered[1], numbered[2]) if numbered else (name, "")


def _names(photo: str) -> Iterator[tuple[str, str]]:
    """Names, with their number, that the sidecar of a photo can have, the likeliest first."""
    originals = [photo] if not EDITED.search(photo) else [photo, EDITED.sub("", photo, count=1)]
    for name in originals:
        path = Path(name)
        stem, number = _split_number(path.stem)
        for base, count in {(stem + path.suffix, number): 0, (name, ""): 0}:
            whole = base + SUFFIX
            yield from ((whole[:end], count) for end in range(len(whole), len(base) - 1, -1))
            cut = base.encode("utf-16-le")[: 2 * LONGEST].decode("utf-16-le", "ignore")
            if cut != base:
                yield cut, count
        yield stem, number


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """lat, lon (degrees) and caption of a sidecar, None for each it lacks; None for another file.

    The position is the one that Google Photos shows, which its owner may have corrected, and only
    without it the camera's. The time is not used: it is UTC, and a record's is local.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        about = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(about, dict) or not {"photoTakenTime", "geoData"} & about.keys():
        return None
    lat = lon = None
    for key in ("geoData", "geoDataExif"):
        at = about.get(key)
        if lat is None and isinstance(at, dict):
            place = at.get("latitude"), at.get("longitude")
            if all(isinstance(x, (int, float)) for x in place) and any(place):
                lat, lon = map(float, place)  # type: ignore[arg-type]
    caption = about.get("description")
    return {"lat": lat, "lon": lon,
            "caption": " ".join(caption.split()) or None if isinstance(caption, str) else None}
