"""Areas and streets from GeoJSON or OSMnx, and locations spread evenly over them. No torch.

Geometry is in GeoJSON's order, (lon, lat) in degrees (WGS 84), and its edges are straight in these
coordinates (RFC 7946). Locations that leave this module are (lat, lon) as everywhere else.
*Evenly* means evenly in square metres of an area and in metres of a street, not in degrees.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import ArrayLike
from pyproj import Transformer
from shapely import LineString, MultiLineString, MultiPolygon, Polygon
from shapely.geometry import shape

from gps_guidance import geo
from gps_guidance.geo import Array

ORDER = "Geometry is (lon, lat) in degrees of WGS 84, as GeoJSON is."
OSMNX_HINT = 'Install OSMnx to read GraphML: pip install "gps-guidance[osmnx]"'

# The steps of a two-dimensional low-discrepancy sequence, multiples of them taken modulo 1: the
# inverses of the real root of x^3 = x + 1 and of its square (a golden ratio for the plane).
ROOT = 1.324717957244746
STEPS = np.array([1 / ROOT, 1 / ROOT**2])

# A piece of an area that fills less of its square than this is cut in two.
MIN_FILL = 0.05
MAX_CUTS = 12


# --- reading -----------------------------------------------------------------------------------


def read_area(area: Any) -> Polygon | MultiPolygon:
    """The polygons of ``area`` as one shapely geometry in GeoJSON's order, (lon, lat).

    ``area``: GeoJSON (Polygon, MultiPolygon, or Features of them, which are united) as a dict or
    as the path of a file; an object with ``__geo_interface__``, such as a shapely geometry; or the
    corners of one ring as (lat, lon) pairs [N >= 3, 2].

    ValueError if it holds no polygon or anything else besides, crosses itself or the antimeridian,
    lies beyond [-90, 90] x [-180, 180] degrees, or cannot be read.
    """
    what = _name(area, "area")
    if _is_geojson(area):
        found = list(_geometries(_load(area, what), what))
    else:
        found = [_ring(area)]
    for geometry in found:
        if geometry.geom_type not in ("Polygon", "MultiPolygon"):
            raise ValueError(
                f"{what} holds a {geometry.geom_type}, but an area is made of polygons. Draw the "
                "outline of the area, or give the (lat, lon) pairs of its corners."
            )
        _check_coordinates(geometry, what)
        if not geometry.is_valid:
            raise ValueError(f"{what} is not a simple polygon: {_flaw(geometry)}.")
    united = found[0] if len(found) == 1 else shapely.union_all(found)
    if united.is_empty:
        raise ValueError(f"{what} is empty: it holds no polygon.")
    return united


def read_streets(network: Any, area: Any = None) -> MultiLineString:
    """The streets of ``network`` in GeoJSON's order, (lon, lat), each one once.

    ``network``: GeoJSON (LineString, MultiLineString, or Features of them) as a dict or as the path
    of a file; an object with ``__geo_interface__``; a graph of OSMnx (networkx, not projected), or
    the path of its GraphML file. Of the two directed edges of a street one is kept. With ``area``
    (see :func:`read_area`) the streets are cut at its outline.

    ValueError if there is no street (inside the area), or for the reasons of :func:`read_area`.
    """
    what = _name(network, "network")
    if isinstance(network, (str, Path)) and Path(network).suffix.lower() == ".graphml":
        network = _load_graphml(network)
    if hasattr(network, "edges") and hasattr(network, "nodes"):
        found = list(_graph_lines(network, what))
    else:
        found = list(_geometries(_load(network, what), what))
    for geometry in found:
        if geometry.geom_type not in ("LineString", "MultiLineString"):
            raise ValueError(
                f"{what} holds a {geometry.geom_type}, but streets are lines: leave out all but "
                "LineString and MultiLineString."
            )
        _check_coordinates(geometry, what)
    lines = [line for line in _parts(found, "LineString") if line.length > 0]
    if not lines:
        raise ValueError(f"{what} is empty: it holds no street.")
    # Normalising gives a line and its reverse one and the same order of points.
    _, first = np.unique(shapely.to_wkb(shapely.normalize(lines)), return_index=True)
    lines = [lines[k] for k in np.sort(first)]
    if area is not None:
        outline = read_area(area)
        shapely.prepare(outline)
        lines = _parts(shapely.intersection(lines, outline), "LineString")
        if not lines:
            raise ValueError(f"No street of {what} lies inside the area.")
    return MultiLineString(lines)


def _name(source: Any, what: str) -> str:
    return f"{what} {source}" if isinstance(source, (str, Path)) else what


def _is_geojson(source: Any) -> bool:
    return isinstance(source, (str, Path, Mapping)) or hasattr(source, "__geo_interface__")


def _load(source: Any, what: str) -> Any:
    """GeoJSON as a mapping, from a mapping, from a file or from ``__geo_interface__``."""
    if not isinstance(source, (str, Path)):
        return getattr(source, "__geo_interface__", source)
    try:
        return json.loads(Path(source).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{what} is not a GeoJSON file: {error}.") from error


def _geometries(node: Any, what: str) -> Iterator[Any]:
    """Every shapely geometry in a GeoJSON object; what has no geometry is passed over."""
    kind = node.get("type") if isinstance(node, Mapping) else None
    if kind in ("FeatureCollection", "GeometryCollection"):
        key = "features" if kind == "FeatureCollection" else "geometries"
        for member in node.get(key) or ():
            yield from _geometries(member, what)
    elif kind == "Feature":
        if node.get("geometry") is not None:
            yield from _geometries(node["geometry"], what)
    elif isinstance(node, Mapping) and "coordinates" in node:
        try:
            yield shapely.force_2d(shape(node))
        except Exception as error:  # shapely raises anything on malformed coordinates
            raise ValueError(f"{what} has a malformed {kind} ({error}). {ORDER}") from error
    else:
        raise ValueError(
            f"{what}: {kind or type(node).__name__!r} is not GeoJSON; its objects have a type "
            "such as Polygon, LineString or FeatureCollection, and coordinates."
        )


def _ring(pairs: ArrayLike) -> Polygon:
    try:
        corners = np.asarray(pairs, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "area must be GeoJSON, the path of a GeoJSON file, a shapely geometry or a list of "
            f"(lat, lon) pairs, not {type(pairs).__name__}."
        ) from error
    if corners.ndim != 2 or corners.shape[1] != 2 or len(np.unique(corners, axis=0)) < 3:
        raise ValueError(
            "area must have at least 3 different corners, (lat, lon) pairs [N, 2]; got shape "
            f"{corners.shape}."
        )
    return Polygon(geo.check_lat_lon(corners, "area")[:, ::-1])


def _check_coordinates(geometry: Any, what: str) -> None:
    lines = geometry.boundary if "Polygon" in geometry.geom_type else geometry
    lonlat, line = shapely.get_coordinates(shapely.get_parts(lines), return_index=True)
    lon, lat = np.abs(lonlat).T
    jumps = (np.abs(np.diff(lonlat[:, 0])) > 180) & (line[1:] == line[:-1])
    beyond = (lon > 180) & (lon <= 360)
    if (lat <= 90).all() and (lon <= 360).all() and (jumps.any() or beyond.any()):
        raise ValueError(
            f"{what} crosses the antimeridian. Cut it there into two parts, one that ends at "
            "longitude 180 and one that begins at -180."
        )
    try:
        geo.check_lat_lon(lonlat[:, ::-1], what)
    except ValueError as error:
        raise ValueError(f"{error} {ORDER}") from error


def _flaw(geometry: Any) -> str:
    """The reason of shapely, with its place turned to (lat, lon)."""
    reason = shapely.is_valid_reason(geometry)
    found = re.fullmatch(r"(.*)\[(\S+) (\S+)\]", reason)
    if found is None:
        return reason
    return f"{found[1].lower()} at (lat, lon) = ({float(found[3]):.6g}, {float(found[2]):.6g})"


def _load_graphml(path: str | Path) -> Any:
    try:
        import osmnx
    except ImportError as error:
        raise ValueError(f"{path}: {OSMNX_HINT}") from error
    try:
        return osmnx.load_graphml(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # OSMnx raises anything on a file that it did not write
        raise ValueError(f"{path} is not a GraphML file of OSMnx: {error!r}.") from error


def _graph_lines(graph: Any, what: str) -> Iterator[LineString]:
    """Edges of an OSMnx graph: their ``geometry``, or straight from node to node (x, y)."""
    try:
        place = {node: (float(at["x"]), float(at["y"])) for node, at in graph.nodes(data=True)}
    except KeyError as error:
        raise ValueError(
            f"{what}: a node has no {error}. The nodes of an OSMnx graph have x (lon) and y (lat)."
        ) from error
    for start, end, at in graph.edges(data=True):
        yield at.get("geometry") or LineString([place[start], place[end]])


def _parts(geometries: Iterable[Any], kind: str) -> list[Any]:
    """All parts of one kind, those of collections included."""
    flat = shapely.get_parts(shapely.get_parts(list(geometries)))
    return [part for part in flat if part.geom_type == kind and not part.is_empty]


# --- sampling ----------------------------------------------------------------------------------


def sample_area(area: Any, num_locations: int, rng: np.random.Generator) -> Array:
    """Locations [num_locations, 2] (lat, lon) in degrees, spread evenly over the ground of an area.

    A randomly shifted low-discrepancy sequence in an equal-area plane: every square metre is
    equally likely, and the locations keep more even distances than independent ones. Polygons that
    lie apart share the locations by their areas, to within one. The order is not random.

    ``area`` as in :func:`read_area`; the same state of ``rng`` gives the same locations.
    """
    area = read_area(area)
    _check_draw(num_locations, rng)
    pieces = [(piece, frame) for part in _parts([area], "Polygon") for piece, frame in _cut(part)]
    square_m = np.array([piece.area for piece, _ in pieces])
    if square_m.sum() < 0.01:
        raise ValueError(f"area covers only {square_m.sum():.2g} square metres; check its corners.")
    shapely.prepare(area)
    counts = _share(square_m, num_locations, rng)
    drawn = [_fill(piece, frame, area, count, rng)
             for (piece, frame), count in zip(pieces, counts, strict=True) if count]
    return np.concatenate(drawn)


def sample_streets(
    network: Any, num_locations: int, rng: np.random.Generator, area: Any = None
) -> Array:
    """Locations [num_locations, 2] (lat, lon) in degrees, evenly spaced along streets.

    All streets, laid end to end, are divided into ``num_locations`` equal lengths (geodesic
    metres); the locations lie one length apart, from a random start. ``network`` and ``area`` as
    in :func:`read_streets`; the same state of ``rng`` gives the same locations.
    """
    lines = read_streets(network, area)
    _check_draw(num_locations, rng)
    # A straight line in degrees is no geodesic: pieces of 0.01 degrees differ by micrometres.
    lonlat, line = shapely.get_coordinates(
        shapely.get_parts(shapely.segmentize(lines, 0.01)), return_index=True
    )
    same = line[1:] == line[:-1]
    start, end = lonlat[:-1][same], lonlat[1:][same]
    length_m = np.asarray(geo.GEOD.inv(*start.T, *end.T)[2])
    ends_m = np.cumsum(length_m)
    at_m = (np.arange(num_locations) + rng.random()) * (ends_m[-1] / num_locations)
    index = np.minimum(np.searchsorted(ends_m, at_m, side="right"), len(ends_m) - 1)
    share = 1 - (ends_m[index] - at_m) / length_m[index]
    return (start[index] + share[:, None] * (end - start)[index])[:, ::-1]


def _check_draw(num_locations: int, rng: np.random.Generator) -> None:
    if not isinstance(num_locations, (int, np.integer)) or num_locations < 1:
        raise ValueError(f"num_locations must be a whole number from 1 on, got {num_locations!r}.")
    if not isinstance(rng, np.random.Generator):
        raise ValueError(
            f"rng must be a numpy.random.Generator, such as numpy.random.default_rng(0), got "
            f"{rng!r}."
        )


def _cut(part: Polygon) -> Iterator[tuple[Polygon, Transformer]]:
    """A polygon in its equal-area plane, in pieces that fill their squares well enough."""
    lon, lat = part.centroid.coords[0]
    frame = geo.local_frame(lat, lon, "laea")
    west, south, east, north = part.bounds
    # Edges straight in degrees are curved in the plane; short ones are straight in both.
    dense = shapely.segmentize(part, max(east - west, north - south) / 256)
    flat = shapely.transform(dense, lambda xy: np.stack(frame.transform(xy[:, 0], xy[:, 1]), -1))
    todo = [(piece, MAX_CUTS) for piece in _parts([shapely.make_valid(flat)], "Polygon")]
    while todo:
        piece, cuts = todo.pop()
        if piece.area == 0:
            continue
        corner, side, up = _square(piece)
        if cuts == 0 or piece.area >= MIN_FILL * (side @ side):
            yield piece, frame
            continue
        halves = [Polygon([start, start + side / 2, start + side / 2 + up, start + up])
                  for start in (corner, corner + side / 2)]
        parts = _parts(shapely.intersection(piece, halves), "Polygon")
        todo += [(part, cuts - 1) for part in parts]


def _square(piece: Polygon) -> tuple[Array, Array, Array]:
    """A corner and two sides [2] of a square around a piece, on the longer side of its rectangle.

    In the square the sequence has the same spacing in every direction.
    """
    a, b, c, d = shapely.get_coordinates(piece.minimum_rotated_rectangle)[:4]
    if np.linalg.norm(b - a) < np.linalg.norm(d - a):
        a, b, d = b, c, a
    side = b - a
    up = np.array([-side[1], side[0]])
    return a, side, up if up @ (d - a) > 0 else -up


def _share(weights: Array, total: int, rng: np.random.Generator) -> Any:
    """``total`` in whole numbers by weight, each within one of its share and right on average."""
    ends = np.cumsum(weights)
    steps = np.floor(ends / ends[-1] * total + rng.random())
    return np.diff(np.minimum(steps, total), prepend=0).astype(int)  # the sum may round up


def _fill(
    piece: Polygon, frame: Transformer, area: Any, count: int, rng: np.random.Generator
) -> Array:
    """``count`` (lat, lon) in a piece of ``area``: the sequence in its square, what is in kept.

    Those kept are taken from a random start. The first ones would not do: after a miss the next
    step lands in some places more often than in others.
    """
    corner, side, up = _square(piece)
    shapely.prepare(piece)
    fill = piece.area / (side @ side)
    size = int(min(max(1024, 1.2 * count / fill), 2**18))
    shift, found, kept = rng.random(2), [], 0
    for block in range(100 + math.ceil(2 * count / fill / size)):
        number = np.arange(block * size, (block + 1) * size)[:, None]
        plane = corner + (shift + number * STEPS) % 1 @ np.stack([side, up])
        plane = plane[shapely.contains_xy(piece, plane)]
        lon, lat = frame.transform(plane[:, 0], plane[:, 1], direction="INVERSE")
        found.append(np.stack([lat, lon], axis=-1)[shapely.contains_xy(area, lon, lat)])
        kept += len(found[-1])
        if kept >= count:
            start = rng.integers(kept - count + 1)
            return np.concatenate(found)[start : start + count]
    raise ValueError("area is too thin to find locations in it; check its corners.")
