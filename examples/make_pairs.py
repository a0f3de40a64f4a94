"""A list of prompts and positions of a city, as Table 1 is measured on, from public place data.

    python examples/make_pairs.py nyc PLACES --out nyc.json
    python examples/make_pairs.py paris PLACES --out paris.json

PLACES is a folder with the files of ``CITIES`` below, under their own names. The paper's lists are
not published; the bundled ones (``--pairs nyc``, ``--pairs paris``) were made by these two lines.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.geometry import shape

from gps_guidance import areas, geo

COUNT = 646  # of each city: the paper has 1,292 of both
JITTER_M = 30.0  # around a museum, as far as a phone errs
DECIMALS = 5  # of a degree: a metre

# What is to be seen, never where. Each is as often in a list as any other, to within one.
CONCEPTS = (
    "a bagel", "a cup of coffee", "breakfast", "an ice cream", "a pizza", "a birthday cake",
    "a bowl of fruit", "a bottle of wine", "a car", "a bicycle", "a motorcycle", "a bus",
    "a boat", "a hot air balloon", "a train", "an umbrella", "a chair", "a piano", "a guitar",
    "a clock", "a book", "a hat", "a pair of shoes", "a flag", "a vase of flowers", "a tree",
    "a dog", "a cat", "a horse", "a tiger", "an elephant", "a bird", "a fish", "a dinosaur",
    "a tourist", "a bride", "a dancer", "a street musician", "a chef", "a runner",
    "children playing", "a crowd of people", "superman", "batman", "spiderman", "a robot",
    "an astronaut", "a statue", "a painting", "a mural", "a mosaic", "a portrait of a woman",
    "a rainy day", "a snowy day", "a foggy morning", "a sunset", "a street at night",
    "autumn leaves", "cherry blossoms", "fireworks", "an aerial view", "a building", "a staircase",
    "a concert",
)


@dataclass(frozen=True)
class Source:
    """A file of public data: its name in PLACES, where it is to be had, and on what terms."""

    file: str
    url: str
    attribution: str
    licence: str


@dataclass(frozen=True)
class City:
    """``zones`` are outlines with names, ``sights`` a table of museums, ``water`` is no ground.

    ``bounds`` are those with which the city's photos are ingested, ``address`` says a zone's name
    from its properties, ``position`` a museum's (lat, lon) from its row.
    """

    name: str
    bounds: geo.Bounds
    zones: Source
    address: Callable[[dict[str, Any]], str | None]
    sights: Source
    position: Callable[[dict[str, str]], tuple[float, float]]
    water: Source | None = None


def _nta(zone: dict[str, Any]) -> str | None:
    if zone["BoroName"] != "Manhattan":
        return None
    name = zone["NTAName"].replace("-", ", ")
    return "Manhattan, New York" if name.startswith("park") else f"{name}, New York"


def _quarter(zone: dict[str, Any]) -> str:
    number = int(zone["c_ar"])
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number, "th")
    return f"{zone['l_qu']}, {number}{ending} arrondissement, Paris"


def _wkt(row: dict[str, str]) -> tuple[float, float]:
    point = shapely.from_wkt(row["the_geom"])
    return point.y, point.x


GITHUB = "https://raw.githubusercontent.com"
ODBL = "ODbL 1.0"
CITIES = {
    "nyc": City(
        "New York", geo.Bounds(40.70, -74.02, 40.88, -73.91),
        Source("nta.geojson",
               f"{GITHUB}/NYCPlanning/map-styles/730cf891ddc5d3930aacea6038d2259852367425/data/"
               "nta.geojson",
               "Neighborhood Tabulation Areas, New York City Department of City Planning",
               "NYC Open Data: no restriction of use"),
        _nta,
        Source("MUSEUM.csv",
               f"{GITHUB}/vmantillacolon85/artdatanalysisfiles/"
               "874f31b713989d939bb75c612380995b823d4196/MUSEUM.csv",
               "New York City Museums, NYC Open Data",
               "NYC Open Data: no restriction of use"),
        _wkt),
    "paris": City(
        "Paris", geo.Bounds(48.81, 2.22, 48.91, 2.47),
        Source("quartier_paris.geojson",
               f"{GITHUB}/annaduan09/30daymapchallenge-day-14-parc-monceau-and-beyond/"
               "e4542be278ca86c99783bf3e86ac9699158f3777/quartier_paris.geojson",
               "Quartiers administratifs, Ville de Paris, opendata.paris.fr", ODBL),
        _quarter,
        Source("liste-et-localisation-des-musees-de-france.csv",
               f"{GITHUB}/digitalkosovski/cartographie2/2eebcd4b6796b14ffbb352fc7dc5ed6e66363d43/"
               "liste-et-localisation-des-musees-de-france.csv",
               "Liste et localisation des Musées de France, Ministère de la Culture",
               "Licence Ouverte"),
        lambda row: (float(row["latitude"]), float(row["longitude"])),
        Source("plan-de-voirie-voies-deau.geojson",
               f"{GITHUB}/annaduan09/30daymapchallenge-day-14-parc-monceau-and-beyond/"
               "e4542be278ca86c99783bf3e86ac9699158f3777/plan-de-voirie-voies-deau.geojson",
               "Plan de voirie, voies d'eau, Ville de Paris, opendata.paris.fr", ODBL)),
}


def read_zones(city: City, places: Path) -> list[tuple[str, Any]]:
    """Each zone's address and the ground in it, within the city's bounds and without its water."""
    ground = shapely.box(city.bounds.west, city.bounds.south, city.bounds.east, city.bounds.north)
    if city.water is not None:
        water = json.loads((places / city.water.file).read_text("utf-8"))["features"]
        ground -= shapely.union_all([shapely.make_valid(shape(f["geometry"])) for f in water])
    zones = []
    for feature in json.loads((places / city.zones.file).read_text("utf-8"))["features"]:
        address = city.address(feature["properties"])
        outline = shapely.make_valid(shape(feature["geometry"])) & ground
        pieces = [part for part in shapely.get_parts(outline) if part.geom_type == "Polygon"]
        if address is not None and pieces:
            zones.append((address, shapely.multipolygons(pieces)))
    return sorted(zones, key=lambda zone: zone[0])


def read_sights(city: City, places: Path) -> list[tuple[float, float]]:
    """(lat, lon) of the museums; rows without a position are left out."""
    lines = (places / city.sights.file).read_text("utf-8-sig").splitlines()
    found = []
    for row in csv.DictReader(lines, delimiter=";" if ";" in lines[0] else ","):
        try:
            found.append(city.position(row))
        except (ValueError, TypeError, shapely.errors.ShapelyError):
            continue
    return found


def draw_positions(zone: Any, sights: Sequence[tuple[float, float]], count: int,
                   rng: np.random.Generator) -> np.ndarray:
    """``count`` (lat, lon) in a zone: up to half at its museums, each at most once and within
    JITTER_M of it; the others spread evenly over its ground."""
    inside = [sight for sight in sights if shapely.contains_xy(zone, sight[1], sight[0])]
    picked = rng.permutation(len(inside))[: count // 2]
    near = []
    for index in picked:
        away_m = JITTER_M * np.sqrt(rng.random((100, 1))) * _directions(rng.random(100))
        tried = geo.from_local_m(away_m, inside[index])
        kept = tried[shapely.contains_xy(zone, tried[:, 1], tried[:, 0])]
        near.append(kept[0] if len(kept) else np.array(inside[index]))
    spread = areas.sample_area(zone, count - len(near), rng)
    return np.concatenate([np.reshape(near, (-1, 2)), spread])


def _directions(turns: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=-1)


def draw_pairs(zones: Sequence[tuple[str, Any]], sights: Sequence[tuple[float, float]], name: str,
               count: int = COUNT, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a list in random order: as many in each zone as in any other, to within one.

    Positions and prompts come from random numbers of their own: a text says nothing about where.
    """
    rng, texts = np.random.default_rng((seed, 0)), np.random.default_rng((seed, 1))
    shares = np.full(len(zones), count // len(zones))
    shares[rng.permutation(len(zones))[: count % len(zones)]] += 1
    found = [(address, position)
             for (address, zone), share in zip(zones, shares, strict=True) if share
             for position in draw_positions(zone, sights, int(share), rng).round(DECIMALS).tolist()]
    rounds = -(-count // len(CONCEPTS))
    prompts = np.concatenate([texts.permutation(CONCEPTS) for _ in range(rounds)])[:count].tolist()
    rows = []
    for number, (index, prompt) in enumerate(zip(rng.permutation(count), prompts, strict=True)):
        address, (lat, lon) = found[index]
        rows.append({"id": f"{name}-{number:04d}", "prompt": prompt, "lat": lat, "lon": lon,
                     "address": address})
    return rows


def about(city: City, places: Path, seed: int) -> dict[str, Any]:
    """What the list was made of, on what terms, and by which seed."""
    used = [source for source in (city.zones, city.sights, city.water) if source is not None]
    return {
        "made_by": f"examples/make_pairs.py, seed {seed}",
        "bounds": city.bounds.as_tuple(),
        "address": "the name of the outline around the position; no geocoder was asked",
        "licence": ODBL if any(source.licence == ODBL for source in used) else "Apache-2.0",
        "sources": [{"url": source.url, "attribution": source.attribution,
                     "licence": source.licence,
                     "sha256": hashlib.sha256((places / source.file).read_bytes()).hexdigest()}
                    for source in used],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("city", choices=sorted(CITIES))
    parser.add_argument("places", type=Path, help="folder of the city's files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()

    city = CITIES[args.city]
    for source in filter(None, (city.zones, city.sights, city.water)):
        if not (args.places / source.file).is_file():
            parser.error(f"{args.places / source.file} is missing: download {source.url}")
    rows = draw_pairs(read_zones(city, args.places), read_sights(city, args.places), args.city,
                      seed=args.seed)
    head = {"city": city.name, "about": about(city, args.places, args.seed)}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2]
    args.out.write_text(f'{text},\n "pairs": [\n{lines}\n]}}\n', "utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
