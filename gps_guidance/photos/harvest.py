"""Records of photos of an area, from the search of a photo site; images are not fetched. No torch.

The area is searched in tiles, each halved until one search reaches all its photos. A tile is stored
when it has been read, at once, so that a run that was stopped in any way goes on from there, and
ends with the bytes of one that was not. The format is described in docs/formats.md.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gps_guidance import geo
from gps_guidance.photos import web
from gps_guidance.photos.commons_search import Commons
from gps_guidance.photos.flickr_search import FIRST_DAY, Flickr
from gps_guidance.photos.manifest import write_whole
from gps_guidance.photos.search import OPEN_LICENCES, Source, Tile

logger = logging.getLogger(__name__)

VERSION = "1"
PROVIDERS = ("flickr", "commons")


@dataclass
class HarvestSummary:
    """``full_tiles`` are the smallest possible tiles that hold more photos than the site gives,
    ``out_of_reach`` the number of those photos, where the site says it."""

    records: Path
    photos: int
    tiles: int
    full_tiles: int
    out_of_reach: int


def harvest(
    provider: str, bounds: geo.Bounds, out: str | Path, *, first: date | None = None,
    last: date | None = None, licences: Sequence[str] | None = None, contact: str | None = None,
    endpoint: str | None = None, per_hour: float | None = None, progress: bool = True,
    sleep: web.Sleep = time.sleep,
) -> HarvestSummary:
    """Write ``out/records.jsonl``: the photos that "flickr" or "commons" has within ``bounds``.

    ``first`` and ``last`` are days of taking, included; Flickr is searched from 1970 to today by
    default. ``licences`` are names, with or without version, or "any"; by default those that
    let everybody use and change a photo (all of Commons'). ``contact`` says who asks, at most
    ``per_hour`` times an hour. ValueError if ``out`` holds the harvest of another search, or the
    site refuses or stays away.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"The provider {provider!r} is not one of {', '.join(PROVIDERS)}.")
    out = Path(out)
    about = out / "harvest.json"
    query = _query(provider, bounds, first, last, licences, _stored_query(about))
    days = [date.fromisoformat(query[key]) if query[key] else None for key in ("from", "to")]
    if all(days) and days[0] > days[1]:  # type: ignore[operator]
        raise ValueError(f"The days {days[0]} to {days[1]} are in the wrong order.")
    kind: Any = Flickr if provider == "flickr" else Commons
    source: Source = kind(*days, query["licences"], endpoint=endpoint, contact=contact,
                          per_hour=per_hour, sleep=sleep)
    (out / "tiles").mkdir(parents=True, exist_ok=True)
    if not about.exists():
        _write_json(about, {"version": VERSION, "query": query, "complete": False})
    lines: dict[str, str] = {}
    losses: list[int | None] = []
    for tile in _read_tiles(source, bounds, out / "tiles", progress):
        losses.append(tile["out_of_reach"])
        for record in tile["records"]:  # a photo on an edge is in two tiles, and the first counts
            lines.setdefault(record["id"], json.dumps(record, ensure_ascii=False) + "\n")
    ordered = sorted(lines, key=lambda photo_id: (len(photo_id), photo_id))
    write_whole(out / "records.jsonl", "".join(lines[photo_id] for photo_id in ordered).encode())
    full = [loss for loss in losses if loss != 0]
    summary = HarvestSummary(out / "records.jsonl", len(lines), len(losses), len(full),
                             sum(loss or 0 for loss in full))
    _write_json(about, {
        "version": VERSION, "query": query, "complete": True,
        "photos": summary.photos, "tiles": summary.tiles, "full_tiles": summary.full_tiles,
        "out_of_reach": summary.out_of_reach,
    })
    if full:
        logger.warning("%d tiles hold more photos than %s gives, out of reach: %s", len(full),
                       provider, summary.out_of_reach or "it does not say how many")
    return summary


def _query(
    provider: str, bounds: geo.Bounds, first: date | None, last: date | None,
    licences: Sequence[str] | None, stored: dict[str, Any] | None,
) -> dict[str, Any]:
    """The search as ``harvest.json`` keeps it; ValueError if that is of another."""
    if provider == "flickr":
        first = first or FIRST_DAY
        if last is None:  # today, when it began
            last = date.fromisoformat(stored["to"]) if stored and stored["to"] else date.today()
    if licences is None:
        licences = OPEN_LICENCES if provider == "flickr" else ("any",)
    query = {
        "provider": provider, "bounds": list(bounds.as_tuple()),
        "from": str(first) if first else None, "to": str(last) if last else None,
        "licences": sorted(licences),
    }
    for key, value in query.items():
        if stored is not None and stored[key] != value:
            raise ValueError(f"The folder holds the harvest of another search: its {key} is "
                             f"{stored[key]}, not {value}. Give a new --out, or the same search.")
    return query


def _stored_query(about: Path) -> dict[str, Any] | None:
    if not about.exists():
        return None
    stored = json.loads(about.read_text("utf-8"))
    if stored.get("version") != VERSION:
        raise ValueError(f"{about} has version {stored.get('version')}, this release writes "
                         f"{VERSION}: give a new --out.")
    return stored["query"]


def _read_tiles(
    source: Source, bounds: geo.Bounds, folder: Path, progress: bool
) -> Iterator[dict[str, Any]]:
    """What is stored of the tiles without halves, in the order of their names; what is not stored
    yet is read and stored."""
    waiting = [source.root(bounds)]
    with tqdm(desc="harvesting", unit="tile", total=1, disable=not progress) as bar:
        while waiting:
            tile = waiting.pop()
            path = folder / f"{tile.name}.json"
            if not path.exists():
                _write_json(path, _read_tile(source, tile))
            stored = json.loads(path.read_bytes())
            if "records" in stored:
                yield stored
            else:
                waiting += reversed(tile.halves() or ())
                bar.total += 2
            bar.update()


def _read_tile(source: Source, tile: Tile) -> dict[str, Any]:
    about: dict[str, Any] = {"bounds": list(tile.bounds.as_tuple())}
    if tile.first:
        about |= {"from": str(tile.first), "to": str(tile.last)}
    reading = source.read(tile)
    if reading is None:
        return about | {"halves": [tile.name + "0", tile.name + "1"]}
    return about | {"out_of_reach": reading.out_of_reach, "records": reading.records}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())
