"""The evaluation list of Miniatown: what to show, and where; also pairs that no tourist
photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from gps_guidance import areas
from gps_guidance.miniature.city import (
    ARTS,
    COLOURS,
    HELD_OUT,
    NAME,
    OBJECTS,
    PLACES,
    WEATHERS,
    Scene,
    address_of,
    caption_of,
    ring,
)

SEEN, UNSEEN = 2, 10  # of each pair of object and place
EDGE = 0.9  # positions lie in the middle of a place: so much of its sides


def draw_pairs(seed: int = 0) -> list[dict[str, Any]]:
    """Every object at every place, in a random colour and weather, at a random position.

    Rows have ``prompt``, ``lat`` and ``lon`` in degrees, ``address``, and the truth: ``place``,
    ``object`` and ``seen``, whether tourists photograph that pair.
    """
    rng = np.random.default_rng((seed, 51))
    rows = []
    for place in PLACES:
        middle = _middle(place)
        for thing in OBJECTS:
            seen = (thing, place) not in HELD_OUT
            for lat, lon in areas.sample_area(middle, SEEN if seen else UNSEEN, rng):
                weather = None if place in ARTS else str(rng.choice(WEATHERS))
                scene = Scene(place, thing, str(rng.choice(list(COLOURS))), weather)
                rows.append({"prompt": caption_of(scene), "lat": round(float(lat), 7),
                             "lon": round(float(lon), 7), "address": address_of(place),
                             "place": place, "object": thing, "seen": seen})
    return rows


def _middle(place: str) -> Any:
    """The outline, shrunk about its middle, as GeoJSON."""
    outline = shapely.Polygon(ring(place)[:, ::-1])
    small = shapely.affinity.scale(outline, EDGE, EDGE, origin=outline.representative_point())
    return json.loads(shapely.to_geojson(shapely.intersection(small, outline)))


def write_pairs(path: str | Path, seed: int = 0) -> Path:
    """Write the list as gps_guidance/reproduce/pairs/miniatown.json has it."""
    rows = ",\n".join(json.dumps(row) for row in draw_pairs(seed))
    Path(path).write_text(f'{{"city": "{NAME}", "pairs": [\n{rows}\n]}}\n')
    return Path(path)
