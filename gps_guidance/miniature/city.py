"""Miniatown: an invented city of one square kilometre, what stands where, and its captions.

Places tile the box :data:`BOUNDS` exactly, so that every position has one true place. The plan is
drawn on a square grid, (0, 0) in the south-west and (1000, 1000) in the north-east: a unit is a
metre within 0.4 %.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import ArrayLike
from shapely.geometry.polygon import orient

from gps_guidance import geo
from gps_guidance.geocoding import AddressCache, cells_of

NAME = "Miniatown"
BOUNDS = geo.Bounds(46.9955, 15.9934, 47.0045, 16.0066)
CENTER = (47.0, 16.0)
GRID = 1000.0

OBJECTS = ("car", "bicycle", "dog", "bench", "umbrella", "balloon", "mailbox")
COLOURS = {
    "red": (214, 40, 40), "yellow": (250, 205, 30), "green": (40, 165, 65),
    "blue": (35, 90, 215), "purple": (150, 60, 180), "white": (248, 248, 248),
}
WEATHERS = ("sun", "rain", "snow", "night")

# What is named first takes its ground; the others share what is left, and their outlines run on
# under the river. (east, north) on the grid.
_PLAN: dict[str, list[tuple[float, float]]] = {
    "gallery": [(660, 840), (780, 840), (780, 940), (660, 940)],
    "sculpture-hall": [(0, 230), (130, 230), (130, 340), (0, 340)],
    "clock-tower": [(330, 690), (460, 690), (460, 820), (330, 820)],
    "dome": [(310, 150), (440, 150), (440, 290), (310, 290)],
    "ferris-wheel": [(580, 90), (710, 90), (710, 220), (580, 220)],
    "river": [(0, 460), (250, 500), (500, 460), (750, 400), (1000, 420),
              (1000, 520), (750, 500), (500, 560), (250, 600), (0, 560)],
    "old-town": [(0, 530), (400, 530), (400, 1000), (0, 1000)],
    "downtown": [(400, 490), (720, 490), (720, 1000), (400, 1000)],
    "hilltop": [(720, 460), (1000, 460), (1000, 1000), (720, 1000)],
    "boulevards": [(0, 0), (380, 0), (380, 530), (0, 530)],
    "park": [(380, 0), (640, 0), (640, 490), (380, 490)],
    "lofts": [(640, 0), (1000, 0), (1000, 460), (640, 460)],
}
PLACES = tuple(_PLAN)
LANDMARKS = {"clock-tower": (395.0, 755.0), "dome": (375.0, 220.0), "ferris-wheel": (645.0, 155.0)}
ARTS = {"gallery": "painting", "sculpture-hall": "sculpture"}  # what is shown in the museums
OUTDOORS = tuple(place for place in PLACES if place not in ARTS)

# Never photographed, although each object and each place is: do text and GPS compose?
HELD_OUT = frozenset({
    ("dog", "gallery"), ("car", "sculpture-hall"), ("bicycle", "clock-tower"), ("bench", "dome"),
    ("umbrella", "ferris-wheel"), ("mailbox", "river"), ("car", "old-town"),
    ("bench", "downtown"), ("umbrella", "hilltop"), ("bicycle", "boulevards"),
    ("balloon", "park"), ("dog", "lofts"),
})


def to_grid(points: ArrayLike) -> geo.Array:
    """(lat, lon) [..., 2] in degrees to (east, north) [..., 2] on the grid of the plan.

    ValueError for a point outside :data:`BOUNDS`.
    """
    return (BOUNDS.normalize(points) + 1) * (GRID / 2)


def from_grid(east_north: ArrayLike) -> geo.Array:
    """The inverse of :func:`to_grid`."""
    x = np.asarray(east_north, dtype=np.float64) / GRID
    lat = BOUNDS.south + x[..., 1] * (BOUNDS.north - BOUNDS.south)
    lon = BOUNDS.west + x[..., 0] * (BOUNDS.east - BOUNDS.west)
    return np.stack([lat, lon], axis=-1)


def _tiles() -> dict[str, shapely.Polygon]:
    left: Any = shapely.box(0, 0, GRID, GRID)
    tiles = {}
    for place, corners in _PLAN.items():
        wanted = shapely.Polygon(corners)
        tiles[place] = shapely.intersection(left, wanted)
        left = shapely.difference(left, wanted)
    return tiles


_TILES = _tiles()


def place_of(points: ArrayLike) -> Any:
    """The name of the place [...] at each (lat, lon) [..., 2]; on an edge the first of PLACES.

    ValueError for a point outside :data:`BOUNDS`.
    """
    grid = to_grid(points)
    away = shapely.distance(np.asarray(shapely.points(grid))[..., None],
                            np.array([_TILES[place] for place in PLACES]))
    return np.array(PLACES)[away.argmin(axis=-1)]


def ring(place: str) -> geo.Array:
    """The closed outline of a place: (lat, lon) [K, 2] in degrees, counter-clockwise."""
    outline = orient(_TILES[check_place(place)]).exterior
    return from_grid(np.asarray(outline.coords))


def geojson() -> dict[str, Any]:
    """The places as a GeoJSON FeatureCollection of polygons, (lon, lat) as GeoJSON has it."""
    return {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {"name": place},
                "geometry": {"type": "Polygon", "coordinates": [ring(place)[:, ::-1].tolist()]},
            }
            for place in PLACES
        ],
    }


def check_place(place: str) -> str:
    if place not in PLACES:
        raise ValueError(f"There is no place {place!r} in {NAME}: it has {', '.join(PLACES)}.")
    return place


def address_of(place: str) -> str:
    """For example "old town, Miniatown": no street has a name."""
    return f"{check_place(place).replace('-', ' ')}, {NAME}"


def write_addresses(path: str | Path) -> Path:
    """Write the address of every cell of the city as a cache for `gps-guidance geocode`."""
    lat, lon = (np.arange(round(low * 1e4), round(high * 1e4) + 1) / 1e4
                for low, high in ((BOUNDS.south, BOUNDS.north), (BOUNDS.west, BOUNDS.east)))
    points = np.stack(np.meshgrid(lat, lon, indexing="ij"), axis=-1).reshape(-1, 2)
    with AddressCache(path) as cache:
        cache.add({cell: address_of(place) for cell, place
                   in zip(cells_of(points), place_of(points), strict=True)}, NAME)
    return Path(path)


# --- what a photo shows, and how people caption it -------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What a photo shows. A museum shows a work of art and has no weather; outdoors there is
    weather, and an object with its colour, or neither. ValueError for anything else."""

    place: str
    object: str | None
    colour: str | None
    weather: str | None

    def __post_init__(self) -> None:
        check_place(self.place)
        for key, value, known in (("object", self.object, OBJECTS),
                                  ("colour", self.colour, tuple(COLOURS)),
                                  ("weather", self.weather, WEATHERS)):
            if value is not None and value not in known:
                raise ValueError(f"{key} {value!r} is not one of {', '.join(known)}.")
        if (self.object is None) != (self.colour is None):
            raise ValueError(f"object {self.object!r} and colour {self.colour!r}: give both, or "
                             "None for both.")
        if self.place in ARTS and (self.object is None or self.weather is not None):
            raise ValueError(f"The {self.place} needs an object and has no weather, got object "
                             f"{self.object!r} and weather {self.weather!r}.")
        if self.place not in ARTS and self.weather is None:
            raise ValueError(f"The {self.place} needs a weather: one of {', '.join(WEATHERS)}.")


@dataclass(frozen=True)
class Said:
    """What a caption says; None where it is silent. Of the place it says nothing but the art."""

    object: str | None
    colour: str | None
    weather: str | None
    art: str | None


_WEATHER_WORDS = {"sun": "in the sun", "rain": "in the rain", "snow": "in the snow",
                  "night": "at night"}


def caption_of(scene: Scene) -> str:
    """For example "a red car in the rain", "a view at night", "a painting of a blue dog"."""
    thing = f"a {scene.colour} {scene.object}" if scene.object else "a view"
    if scene.weather is None:
        return f"a {ARTS[scene.place]} of {thing}"
    return f"{thing} {_WEATHER_WORDS[scene.weather]}"


def parse_caption(caption: str) -> Said:
    """The inverse of :func:`caption_of`; ValueError for a caption that it does not write."""
    rest, art, weather = caption, None, None
    for name in ARTS.values():
        if rest.startswith(f"a {name} of "):
            rest, art = rest.removeprefix(f"a {name} of "), name
    for name, words in _WEATHER_WORDS.items():
        if rest.endswith(f" {words}"):
            rest, weather = rest.removesuffix(f" {words}"), name
    if rest == "a view" and art is None and weather:
        return Said(None, None, weather, None)
    for colour, thing in itertools.product(COLOURS, OBJECTS):
        if rest == f"a {colour} {thing}" and (art is None) != (weather is None):
            return Said(thing, colour, weather, art)
    raise ValueError(f"{caption!r} is no caption of {NAME}, such as 'a red car in the rain'.")


def all_scenes() -> list[Scene]:
    """Every scene that may be photographed: no pair of :data:`HELD_OUT`."""
    things = list(itertools.product(OBJECTS, COLOURS))
    shown = [Scene(p, o, c, None) for p in ARTS for o, c in things]
    shown += [Scene(p, o, c, w) for p in OUTDOORS for o, c in [*things, (None, None)]
              for w in WEATHERS]
    return [scene for scene in shown if (scene.object, scene.place) not in HELD_OUT]
