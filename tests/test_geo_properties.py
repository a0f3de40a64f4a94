"""Laws of geo on positions that hypothesis chooses: the poles, the antimeridian and between."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gps_guidance import geo

LATS = st.floats(-90, 90, allow_subnormal=False)
LONS = st.floats(-180, 180, allow_subnormal=False)
POINTS = st.tuples(LATS, LONS)
METRES = st.floats(0.5, 50_000)
BEARINGS = st.floats(0, 360, exclude_max=True, allow_subnormal=False)
SIDES = st.floats(5, 20_000)


@given(POINTS, METRES, BEARINGS)
@example((0.0, 180.0), 100.0, 90.0)
@example((0.0, -180.0), 100.0, 270.0)
@example((90.0, 0.0), 100.0, 10.0)
@example((-90.0, 77.0), 100.0, 10.0)
def test_metres_and_degrees_are_inverse(center: geo.LatLon, metres: float, bearing: float) -> None:
    east, north = metres * np.sin(np.radians(bearing)), metres * np.cos(np.radians(bearing))
    there = geo.from_local_m((east, north), center)
    assert np.abs(there[0]) <= 90 and np.abs(there[1]) <= 180
    assert np.allclose(geo.local_m(there, center), (east, north), rtol=0, atol=1e-4)
    assert math.isclose(float(geo.distance_m(there, center)), metres, rel_tol=1e-6, abs_tol=1e-4)


@given(POINTS, st.floats(5, 50_000), BEARINGS)
@example((0.0, 180.0), 100.0, 90.0)
@example((-89.0, 180.0), 1000.0, 180.0)
def test_a_bearing_comes_back(center: geo.LatLon, metres: float, bearing: float) -> None:
    assume(abs(center[0]) < 89.9)  # at a pole every direction is south
    b = np.radians(bearing)
    there = geo.from_local_m((metres * np.sin(b), metres * np.cos(b)), center)
    off = geo.angle_difference_deg(float(geo.bearing_deg(there, center)), bearing)
    assert abs(off) < 1e-3


@given(st.floats(-1e4, 1e4), st.integers(1, 720))
def test_a_bin_is_the_nearest(bearing: float, num_bins: int) -> None:
    index = int(geo.bearing_bin(bearing, num_bins))
    assert 0 <= index < num_bins
    off = geo.angle_difference_deg(float(geo.bin_bearing_deg(index, num_bins)), bearing % 360)
    assert abs(off) <= 180 / num_bins + 1e-9
    assert geo.bearing_bin(geo.bin_bearing_deg(index, num_bins), num_bins) == index


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_angle_differences_are_short(a: float, b: float) -> None:
    off = geo.angle_difference_deg(a, b)
    assert -180 <= off < 180
    assert math.isclose(math.cos(math.radians(off)), math.cos(math.radians(a - b)), abs_tol=1e-6)


@given(BEARINGS)
def test_azimuth_and_bearing_are_inverse(bearing: float) -> None:
    back = geo.bearing_from_azimuth(geo.azimuth_from_bearing(bearing))
    assert abs(geo.angle_difference_deg(back, bearing)) < 1e-9


@given(POINTS, SIDES)
@example((90.0, 180.0), 100.0)
@example((-90.0, -180.0), 100.0)
@example((0.0, 180.0), 100.0)
def test_a_position_lies_in_its_cell(point: geo.LatLon, side: float) -> None:
    cell = geo.ground_cell(point, side)
    middle = geo.cell_center(cell, side)
    assert np.array_equal(geo.ground_cell(middle, side), cell)
    assert float(geo.distance_m(point, middle)) <= side / np.sqrt(2) * 1.02


@given(st.floats(-85, 85), LONS, st.floats(5, 500))
def test_cells_have_the_side_that_was_asked_for(lat: float, lon: float, side: float) -> None:
    row, column = geo.ground_cell((lat, lon), side)
    middle = geo.cell_center((row, column), side)
    above = geo.cell_center((row + 1, column), side)
    assert math.isclose((above[0] - middle[0]) * geo.METRES_PER_DEGREE, side, rel_tol=1e-6)
    width = 360 / np.rint(360 * geo.METRES_PER_DEGREE * np.cos(np.radians(middle[0])) / side)
    metres = width * geo.METRES_PER_DEGREE * np.cos(np.radians(middle[0]))
    assert math.isclose(metres, side, rel_tol=0.01)


@given(st.tuples(st.floats(-80, 79), st.floats(-179, 178)), st.floats(0.001, 1),
       st.floats(0, 1), st.floats(0, 1))
def test_normalised_positions_fill_the_square(corner: geo.LatLon, size: float, u: float, v: float
                                              ) -> None:
    box = geo.Bounds(*corner, corner[0] + size, corner[1] + size)
    point = (box.south + v * (box.north - box.south), box.west + u * (box.east - box.west))
    assume(bool(box.contains(point)))
    assert np.allclose(box.normalize(point), (2 * u - 1, 2 * v - 1), atol=1e-6)
