"""Which photos of a table stay: positions, duplicates, crowding, privacy; and splits. No torch.

Whole columns at a time, so that half a million records take seconds. Nothing here reads a file.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

from gps_guidance import geo
from gps_guidance.geo import Array
from gps_guidance.photos.manifest import Rejected

SPLITS = ("photo", "place", "owner", "place,owner")
Strings = np.ndarray  # of str or None, [N]


@dataclass(frozen=True)
class Wanted:
    """Which photos are wanted, and how they are stored.

    ``center`` is the landmark's (lat, lon) in degrees; ``bounds`` the city's box, and ``area`` its
    outline in GeoJSON's order, where one is given. Distances and sides are metres, sizes pixels.
    """

    center: geo.LatLon | None = None
    bounds: geo.Bounds | None = None
    area: Any = None  # a shapely geometry, prepared
    min_distance_m: float = 0.0
    max_distance_m: float = math.inf
    min_size: int = 64
    image_size: int = 768
    num_bins: int = 36


# --- positions ---------------------------------------------------------------------------------


def unwanted_positions(points: Array, wanted: Wanted) -> dict[int, tuple[str, str]]:
    """What is wrong with positions (lat, lon) [N, 2]: {index: (reason, detail)}.

    A NaN is ``bad_gps``; the others are ``null_island``, ``out_of_range``, ``outside_bounds``,
    ``too_far`` and ``too_near``.
    """
    bad: dict[int, tuple[str, str]] = {}
    good = np.isfinite(points).all(axis=1)
    for index in np.flatnonzero(~good):
        bad[int(index)] = ("bad_gps", f"{_pair(points[index])} is not a position")
    for index in np.flatnonzero(good & (points == 0).all(axis=1)):
        bad[int(index)] = ("null_island", "the position is (0, 0)")
    for index in np.flatnonzero(good & ~(np.abs(points) <= (90, 180)).all(axis=1)):
        bad[int(index)] = ("out_of_range", _out_of_range(points[index]))
    left = np.setdiff1d(np.arange(len(points)), list(bad))
    for index in left[~_inside(points[left], wanted)]:
        bad[int(index)] = ("outside_bounds", _pair(points[index]))
    if wanted.center is not None:
        left = np.setdiff1d(left, list(bad))
        distances = np.hypot(*geo.local_m(points[left], wanted.center).T)
        for index, distance in zip(left, distances, strict=True):
            if distance > wanted.max_distance_m:
                bad[int(index)] = ("too_far", f"{distance:.0f} m from the centre")
            elif distance < wanted.min_distance_m:
                bad[int(index)] = ("too_near", f"{distance:.1f} m from the centre")
    return bad


def _pair(point: Array) -> str:
    return f"({point[0]:.5f}, {point[1]:.5f})"


def _out_of_range(point: Array) -> str:
    try:
        geo.check_lat_lon(point)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{point} is in range")


def _inside(points: Array, wanted: Wanted) -> np.ndarray:
    if wanted.area is not None:
        return np.asarray(shapely.intersects_xy(wanted.area, points[:, 1], points[:, 0]))
    if wanted.bounds is not None:
        return np.asarray(wanted.bounds.contains(points))
    return np.ones(len(points), dtype=bool)


def check_position(lat: float, lon: float, wanted: Wanted) -> None:
    """Rejected if one position (degrees) is not wanted."""
    for reason, detail in unwanted_positions(np.array([[lat, lon]]), wanted).values():
        raise Rejected(reason, detail)


def landmark_columns(points: Array, wanted: Wanted) -> dict[str, Any]:
    """The manifest's columns about the landmark for positions (lat, lon) [N, 2]; nulls without."""
    if wanted.center is None:
        return dict.fromkeys(("east_m", "north_m", "distance_m", "bearing_deg", "bin"))
    east_north = geo.local_m(points, wanted.center)
    bearings = geo.bearing_deg(points, wanted.center)
    return {
        "east_m": east_north[:, 0], "north_m": east_north[:, 1],
        "distance_m": np.hypot(*east_north.T), "bearing_deg": bearings,
        "bin": geo.bearing_bin(bearings, wanted.num_bins),
    }


def positions_of(rows: Any) -> Array:
    """(lat, lon) [N, 2] in degrees of an Arrow table or batch; NaN where it has null."""
    return np.stack([rows[name].to_numpy(zero_copy_only=False) for name in ("lat", "lon")], axis=1)


def blur_positions(points: Array, side_m: float, bounds: geo.Bounds | None = None) -> Array:
    """Positions (lat, lon) [N, 2] moved to the middle of their ground cells of ``side_m`` metres.

    All photos of a cell get one position: unlike noise, it cannot be averaged away. A middle that
    lies outside ``bounds`` is moved to their edge.
    """
    blurred = geo.cell_center(geo.ground_cell(points, side_m), side_m)
    if bounds is None:
        return blurred
    return np.clip(blurred, (bounds.south, bounds.west), (bounds.north, bounds.east))


# --- too many, too few -------------------------------------------------------------------------


def repeated(values: Strings) -> np.ndarray:
    """True [N] for every value that an earlier row has too; null is no value."""
    codes, known = _codes(values)
    first = np.full(len(values), -1)
    unique, index = np.unique(codes, return_index=True)
    first[index] = unique
    return known & (first < 0)


def crowded(points: Array, owners: Strings, ids: Strings, limit: int, side_m: float) -> np.ndarray:
    """True [N] for photos beyond the first ``limit`` of one known owner in one ground cell.

    "First" is by id, which is a hash: the choice is even over a burst and the same in every run.
    """
    owner, known = _codes(owners)
    order = np.lexsort((np.asarray(ids, dtype=str), owner, _cell_codes(points, side_m)))
    group = np.stack([owner, _cell_codes(points, side_m)])[:, order]
    starts = np.r_[True, (np.diff(group, axis=1) != 0).any(axis=0)] if len(order) else []
    begin = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    beyond = np.empty(len(order), dtype=bool)
    beyond[order] = np.arange(len(order)) - begin >= limit
    return beyond & known


def lonely(points: Array, owners: Strings, min_owners: int, side_m: float) -> np.ndarray:
    """True [N] for photos in ground cells with fewer than ``min_owners`` different owners.

    All photos without a known owner count as one owner's: nothing says that they are several.
    """
    owner, _ = _codes(owners)
    cell = _cell_codes(points, side_m)
    pairs = np.unique(np.stack([cell, owner]), axis=1)
    cells, counts = np.unique(pairs[0], return_counts=True)
    return counts[np.searchsorted(cells, cell)] < min_owners


def _codes(values: Strings) -> tuple[np.ndarray, np.ndarray]:
    """(a number for every different value, where there is a value) [N]; null is -1."""
    array = pa.array(values, pa.string(), from_pandas=True)
    codes = array.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes.astype(np.int64), codes >= 0


def _cell_codes(points: Array, side_m: float) -> np.ndarray:
    cells = geo.ground_cell(points, side_m)
    return cells[:, 0] << 32 | cells[:, 1]


# --- splits ------------------------------------------------------------------------------------


def split_of(points: Array, owners: Strings, ids: Strings, fraction: float, by: str,
             side_m: float) -> np.ndarray:
    """"train", "val" or "none" [N]: about ``fraction`` of the units of ``by`` are val.

    ``by`` is one of :data:`SPLITS`. Of a *place*, a ground cell of ``side_m`` metres, or an
    *owner*, all photos fall on one side; an unknown owner is split by photo. With "place,owner"
    places decide, and the other photos of val's owners are "none": they would leak into train.
    Each unit is drawn by its own hash, so that more photos change nothing for those before.
    """
    check_split_by(by)
    ids = np.asarray(ids, dtype=object)
    if by == "photo":
        units = ids
    elif by == "owner":
        units = np.where(_codes(owners)[1], owners, ids)
    else:
        units = np.char.mod("%d", _cell_codes(points, side_m)).astype(object)
    names, index = np.unique(units.astype(str), return_inverse=True)
    is_val = (np.array([_draw(name) for name in names]) < fraction)[index]
    split = np.where(is_val, "val", "train").astype(object)
    if by == "place,owner":
        owner, known = _codes(owners)
        leaks = np.isin(owner, owner[is_val & known]) & known & ~is_val
        split[leaks] = "none"
    return split


def check_split_by(by: str) -> None:
    """ValueError if ``by`` is none of :data:`SPLITS`."""
    if by not in SPLITS:
        raise ValueError(f"split_by is {by!r}; it must be one of: {'; '.join(SPLITS)}.")


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
