"""Positions on the ground: metres, bearings around a landmark, bins, bounds. No torch.

Positions are ``(lat, lon)`` in degrees (WGS 84) at every public door, as people and EXIF say them.
A *bearing* is the direction in which the photographer stands as seen from the landmark's centre,
clockwise from true north, in degrees. A camera's *azimuth* (threestudio) runs counter-clockwise
from +x with x = east, y = north, z = up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pyproj import CRS, Geod, Transformer

Array = NDArray[np.float64]
LatLon = tuple[float, float]
GEOD = Geod(ellps="WGS84")


@dataclass(frozen=True)
class Landmark:
    """A landmark of the paper: its centre in degrees and its height above ground in metres."""

    name: str
    lat: float
    lon: float
    height_m: float

    @property
    def center(self) -> LatLon:
        return (self.lat, self.lon)


LANDMARKS = {
    "pisa": Landmark("Leaning Tower of Pisa", 43.722952, 10.396597, 56.7),
    "arc-de-triomphe": Landmark("Arc de Triomphe", 48.873792, 2.295028, 49.5),
    "washington-monument": Landmark("Washington Monument", 38.889484, -77.035279, 169.0),
    "statue-of-liberty": Landmark("Statue of Liberty", 40.689249, -74.044500, 93.0),
    "stonehenge": Landmark("Stonehenge", 51.178882, -1.826215, 7.3),
    "space-needle": Landmark("Space Needle", 47.620506, -122.349277, 184.0),
}


def find_landmark(name: str) -> Landmark | None:
    """The landmark with this key or name (letter case ignored), or None."""
    wanted = name.strip().lower()
    for key, landmark in LANDMARKS.items():
        if wanted in (key, landmark.name.lower()):
            return landmark
    return None


def check_lat_lon(points: ArrayLike, what: str = "gps") -> Array:
    """``points`` [..., 2] as float64, or a ValueError that says which pair is wrong and why.

    Refused: another shape, NaN or infinity, |lat| > 90 (with a hint if lat and lon look swapped),
    |lon| > 180.
    """
    array = np.asarray(points, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != 2:
        raise ValueError(f"{what} must hold (lat, lon) pairs in its last axis, got {array.shape}.")
    pairs = array.reshape(-1, 2)
    for lat, lon in pairs[~(np.abs(pairs) <= (90, 180)).all(-1)]:  # NaN compares as False
        pair = f"{what} ({lat:g}, {lon:g})"
        if not (np.isfinite(lat) and np.isfinite(lon)):
            raise ValueError(f"{pair} is not finite; give (lat, lon) in degrees.")
        if abs(lat) > 90:
            swapped = " Did you swap lat and lon?" if abs(lon) <= 90 and abs(lat) <= 180 else ""
            raise ValueError(f"{pair}: latitude must lie in [-90, 90] degrees.{swapped}")
        raise ValueError(f"{pair}: longitude must lie in [-180, 180] degrees.")
    return array


@lru_cache(maxsize=64)
def local_frame(lat: float, lon: float, projection: str = "aeqd") -> Transformer:
    """From (lon, lat) in degrees to the plane (east_m, north_m) around a centre in degrees.

    In ``aeqd`` (azimuthal equidistant) distance and bearing from the centre are geodesic; in
    ``laea`` (azimuthal equal-area) equal areas on the ground are equal in the plane.
    """
    center = f"+lat_0={lat!r} +lon_0={lon!r}"
    plane = CRS.from_proj4(f"+proj={projection} {center} +datum=WGS84 +units=m")
    return Transformer.from_crs("EPSG:4326", plane, always_xy=True)


def local_m(points: ArrayLike, center: ArrayLike) -> Array:
    """(lat, lon) [..., 2] to (east_m, north_m) [..., 2] in the local frame of ``center``."""
    latlon = check_lat_lon(points)
    lat, lon = check_lat_lon(center, "center")
    east, north = local_frame(float(lat), float(lon)).transform(latlon[..., 1], latlon[..., 0])
    return np.stack([np.asarray(east), np.asarray(north)], axis=-1)


def from_local_m(east_north_m: ArrayLike, center: ArrayLike) -> Array:
    """The inverse of :func:`local_m`: (east_m, north_m) [..., 2] to (lat, lon) [..., 2]."""
    metres = np.asarray(east_north_m, dtype=np.float64)
    lat, lon = check_lat_lon(center, "center")
    lons, lats = local_frame(float(lat), float(lon)).transform(
        metres[..., 0], metres[..., 1], direction="INVERSE"
    )
    return np.stack([np.asarray(lats), np.asarray(lons)], axis=-1)


def distance_m(point: ArrayLike, other: ArrayLike) -> Any:
    """Geodesic distance in metres on the WGS 84 ellipsoid; (lat, lon) [..., 2], broadcast."""
    a, b = np.broadcast_arrays(check_lat_lon(point), check_lat_lon(other))
    return np.asarray(GEOD.inv(a[..., 1], a[..., 0], b[..., 1], b[..., 0])[2])


def distance_text(metres: float) -> str:
    """A distance for people: "450 m", "3.2 km", "1,200 km"."""
    if metres < 1:
        return "less than 1 m"
    if round(metres) < 1000:
        return f"{metres:.0f} m"
    km = metres / 1000
    return f"{km:.1f} km" if round(km, 1) < 100 else f"{km:,.0f} km"


def bearing_deg(point: ArrayLike, center: ArrayLike) -> Any:
    """Bearing of ``point`` [..., 2] from ``center``, clockwise from true north, in [0, 360).

    The paper prints arctan((x - x_o) / (y - y_o)), which folds the circle in half and ignores that
    a degree of longitude shrinks with cos(latitude); this is atan2(east, north) in local metres.
    """
    east_north = local_m(point, center)
    return np.degrees(np.arctan2(east_north[..., 0], east_north[..., 1])) % 360.0


def bearing_bin(bearing: ArrayLike, num_bins: int = 36) -> Any:
    """Index in [0, num_bins) of the nearest bin centre; bin k is centred at k * 360 / num_bins."""
    width = 360.0 / num_bins
    return np.floor(np.asarray(bearing, dtype=np.float64) % 360.0 / width + 0.5).astype(
        int
    ) % int(num_bins)


def bin_bearing_deg(index: ArrayLike, num_bins: int = 36) -> Any:
    """Bearing of the centre of bin ``index``, in [0, 360)."""
    return np.asarray(index, dtype=np.float64) % num_bins * (360.0 / num_bins)


def azimuth_from_bearing(bearing: Any) -> Any:
    """Camera azimuth (counter-clockwise from +x = east) of a bearing: 90 - bearing, in [0, 360)."""
    return (90.0 - bearing) % 360.0


def bearing_from_azimuth(azimuth_deg: Any) -> Any:
    """Bearing (clockwise from +y = north) of a camera azimuth: 90 - azimuth, in [0, 360)."""
    return (90.0 - azimuth_deg) % 360.0


def angle_difference_deg(a: Any, b: Any) -> Any:
    """a - b on the circle, in [-180, 180)."""
    return (a - b + 180.0) % 360.0 - 180.0


METRES_PER_DEGREE = np.pi / 180 * 6_371_008.8  # of latitude, on the mean sphere


def ground_cell(points: ArrayLike, side_m: float) -> NDArray[np.int64]:
    """The cell (row, column) [..., 2] of (lat, lon) [..., 2] in a grid of about ``side_m`` metres.

    The grid covers the Earth: rows of equal height from the south pole, each cut into equal cells
    from the antimeridian, so that a cell depends on nothing but the position. Sides are within 1 %
    of ``side_m``, except where a row is shorter than some cells, at the poles.
    """
    p = check_lat_lon(points)
    row = np.floor((p[..., 0] + 90) * METRES_PER_DEGREE / side_m).astype(np.int64)
    column = np.floor((p[..., 1] + 180) / 360 * _cells_in_row(row, side_m)).astype(np.int64)
    return np.stack([row, np.minimum(column, _cells_in_row(row, side_m) - 1)], axis=-1)


def cell_center(cells: ArrayLike, side_m: float) -> Array:
    """(lat, lon) [..., 2] of the middle of cells [..., 2] of :func:`ground_cell`."""
    row, column = np.moveaxis(np.asarray(cells, dtype=np.int64), -1, 0)
    lat = np.minimum((row + 0.5) * side_m / METRES_PER_DEGREE - 90, 90)
    return np.stack([lat, (column + 0.5) / _cells_in_row(row, side_m) * 360 - 180], axis=-1)


def _cells_in_row(row: NDArray[np.int64], side_m: float) -> NDArray[np.int64]:
    lat = np.minimum((row + 0.5) * side_m / METRES_PER_DEGREE - 90, 90)
    around_m = 360 * METRES_PER_DEGREE * np.cos(np.radians(lat))
    return np.maximum(1, np.rint(around_m / side_m)).astype(np.int64)


@dataclass(frozen=True)
class Bounds:
    """A box on the ground, in degrees. It does not cross the antimeridian."""

    south: float
    west: float
    north: float
    east: float

    def __post_init__(self) -> None:
        check_lat_lon([(self.south, self.west), (self.north, self.east)], "bounds")
        if self.south >= self.north or self.west >= self.east:
            raise ValueError(
                f"bounds {self.as_tuple()} are empty; the order is south, west, north, east."
            )

    def as_tuple(self) -> tuple[float, float, float, float]:
        return (self.south, self.west, self.north, self.east)

    def contains(self, points: ArrayLike) -> Any:
        """Boolean [...] for (lat, lon) [..., 2]; the edges belong to the box."""
        p = check_lat_lon(points)
        inside_lat = (p[..., 0] >= self.south) & (p[..., 0] <= self.north)
        return inside_lat & (p[..., 1] >= self.west) & (p[..., 1] <= self.east)

    def distance_m(self, points: ArrayLike) -> Any:
        """Geodesic distance [...] in metres from (lat, lon) [..., 2] to the box; 0 inside."""
        p = check_lat_lon(points)
        metres = [self._distance_m(lat, lon) for lat, lon in p.reshape(-1, 2)]
        return np.reshape(metres, p.shape[:-1])

    def _distance_m(self, lat: float, lon: float) -> float:
        if self.west <= lon <= self.east:  # a meridian is the shortest way to a parallel
            return float(distance_m((lat, lon), (np.clip(lat, self.south, self.north), lon)))
        nearest = np.inf
        for edge in (self.west, self.east):
            # The shortest way to a meridian changes latitude: narrow the interval around its end.
            south, north = self.south, self.north
            for _ in range(8):
                lats = np.linspace(south, north, 33)
                metres = distance_m((lat, lon), np.stack([lats, np.full(33, edge)], -1))
                best = int(metres.argmin())
                south, north = lats[max(best - 1, 0)], lats[min(best + 1, 32)]
                nearest = min(nearest, float(metres[best]))
        return nearest

    def check(self, points: ArrayLike, what: str = "gps") -> Array:
        """``points`` as float64, or a ValueError naming the first pair outside the box."""
        p = check_lat_lon(points, what)
        for pair in p[~self.contains(p)]:
            swapped = abs(pair[1]) <= 90 and bool(self.contains(pair[::-1]))
            hint = " Did you swap lat and lon?" if swapped else ""
            raise ValueError(
                f"{what} ({pair[0]:g}, {pair[1]:g}) lies outside the bounds {self.as_tuple()} "
                f"(south, west, north, east), {distance_text(self._distance_m(*pair))} away.{hint}"
            )
        return p

    def normalize(self, points: ArrayLike) -> Array:
        """(lat, lon) [..., 2] to the paper's (x, y) = (lon, lat) [..., 2], each in [-1, 1]."""
        p = self.check(points)
        x = 2.0 * (p[..., 1] - self.west) / (self.east - self.west) - 1.0
        y = 2.0 * (p[..., 0] - self.south) / (self.north - self.south) - 1.0
        return np.stack([x, y], axis=-1)
