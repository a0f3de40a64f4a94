"""What the searches of photo sites share: tiles to ask for, records to keep, licences. No torch."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Any, Protocol

from gps_guidance import geo

# Licences that let everybody use and change a photo, whatever for.
OPEN_LICENCES = ("CC BY", "CC BY-SA", "CC0", "Public Domain Mark", "Public domain",
                 "No known copyright restrictions", "United States Government Work")


@dataclass(frozen=True)
class Tile:
    """A box of ground and, where ``first`` and ``last`` are given, of days, both included.

    ``name`` is its place in the tree of halves: "r", its halves "r0" and "r1", and so on. No half
    has a side below ``smallest_m`` metres.
    """

    name: str
    bounds: geo.Bounds
    first: date | None = None
    last: date | None = None
    smallest_m: float = 50.0

    def sides_m(self) -> tuple[float, float]:
        """Height and, half-way up, width of the box in metres."""
        box = self.bounds
        lat, lon = (box.south + box.north) / 2, (box.west + box.east) / 2
        return (float(geo.distance_m((box.south, lon), (box.north, lon))),
                float(geo.distance_m((lat, box.west), (lat, box.east))))

    def halves(self) -> tuple[Tile, Tile] | None:
        """The tile cut across its longest extent, counted in days and in ``smallest_m``; None if
        it cannot be cut."""
        height_m, width_m = self.sides_m()
        days = (self.last - self.first).days + 1 if self.first and self.last else 1
        side_m = max(height_m, width_m)
        one, two = replace(self, name=self.name + "0"), replace(self, name=self.name + "1")
        if self.first and days >= 2 and days >= side_m / self.smallest_m:
            middle = self.first + timedelta(days=days // 2)
            return replace(one, last=middle - timedelta(days=1)), replace(two, first=middle)
        if side_m < 2 * self.smallest_m:
            return None
        box = self.bounds
        if height_m >= width_m:
            lat = (box.south + box.north) / 2
            return (replace(one, bounds=replace(box, north=lat)),
                    replace(two, bounds=replace(box, south=lat)))
        lon = (box.west + box.east) / 2
        return (replace(one, bounds=replace(box, east=lon)),
                replace(two, bounds=replace(box, west=lon)))


@dataclass
class Reading:
    """The records of a tile. ``out_of_reach``: how many more the site has but does not give in any
    query; None if there are some and the site does not say how many."""

    records: list[dict[str, Any]]
    out_of_reach: int | None = 0


class Source(Protocol):
    """A photo site that is searched tile by tile."""

    def root(self, bounds: geo.Bounds) -> Tile:
        """The tile that holds everything that is searched for."""

    def read(self, tile: Tile) -> Reading | None:
        """The photos of a tile; None if it has to be halved first."""


def record(provider: str, photo_id: Any, row: dict[str, Any]) -> dict[str, Any]:
    """One photo as it is stored (docs/formats.md), from a row with the columns of a record."""
    texts = {name: plain_text(row[name]) for name in ("source", "url", "owner", "licence",
                                                      "caption")}
    return {"id": str(photo_id), "provider": provider, "lat": _number(row["lat"]),
            "lon": _number(row["lon"]), "taken_at": local_time(row["taken_at"]), **texts}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def plain_text(text: str | None) -> str | None:
    """One line without HTML and without what cannot be printed; None if nothing is left."""
    bare = html.unescape(re.sub(r"<[a-zA-Z/!][^>]*>", " ", text or ""))
    return " ".join("".join(c if c.isprintable() else " " for c in bare).split()) or None


def local_time(text: str | None) -> str | None:
    """ISO 8601 of a text that starts with a date, or with date and time; None for any other."""
    found = re.match(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d:\d\d)?", text or "")
    if not found:
        return None
    try:
        moment = datetime.fromisoformat(found.group())
    except ValueError:  # such as the month 00, for a photo of some time in a year
        return None
    return moment.isoformat() if found.group(1) else moment.date().isoformat()


def is_licence(name: str, wanted: Sequence[str]) -> bool:
    """Whether a licence is one of ``wanted``: names with or without version, or "any"."""
    known = {"any", name.lower(), re.sub(r"[ -]\d\.\d.*$", "", name.lower())}
    return any(choice.lower() in known for choice in wanted)
