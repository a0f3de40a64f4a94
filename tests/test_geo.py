"""Bearings, metres, bins and bounds, against geodesics and hand-computed numbers."""

import numpy as np
import pytest
from pyproj import Geod

from gps_guidance import geo

GEOD = Geod(ellps="WGS84")
LANDMARKS = sorted(geo.LANDMARKS)


@pytest.mark.parametrize("key", LANDMARKS)
@pytest.mark.parametrize("distance_m", [20.0, 300.0, 3000.0])
def test_bearing_and_distance_are_geodesic(key, distance_m):
    lat, lon = geo.LANDMARKS[key].center
    bearings = np.arange(0.0, 360.0, 7.5)
    ones = np.ones_like(bearings)
    lons, lats, _ = GEOD.fwd(lon * ones, lat * ones, bearings, distance_m * ones)
    points = np.stack([lats, lons], -1)
    error = geo.angle_difference_deg(geo.bearing_deg(points, (lat, lon)), bearings)
    assert np.abs(error).max() < 1e-5
    metres = np.linalg.norm(geo.local_m(points, (lat, lon)), axis=-1)
    np.testing.assert_allclose(metres, distance_m, atol=1e-4)


@pytest.mark.parametrize("key", LANDMARKS)
def test_metres_round_trip(key):
    center = geo.LANDMARKS[key].center
    east_north = np.random.default_rng(0).uniform(-2000, 2000, (50, 2))
    points = geo.from_local_m(east_north, center)
    np.testing.assert_allclose(geo.local_m(points, center), east_north, atol=1e-5)
    assert geo.local_m(center, center) == pytest.approx([0, 0], abs=1e-9)


def test_compass_points():
    center = geo.LANDMARKS["pisa"].center
    around = geo.from_local_m([[0, 100], [100, 0], [0, -100], [-100, 0], [-100, 100]], center)
    expected = np.array([0, 90, 180, 270, 315])
    error = geo.angle_difference_deg(geo.bearing_deg(around, center), expected)
    np.testing.assert_allclose(error, 0, atol=1e-6)


@pytest.mark.parametrize(("key", "worst_deg"), [("pisa", 9.16), ("stonehenge", 13.18)])
def test_a_degree_of_longitude_shrinks_with_the_cosine_of_latitude(key, worst_deg):
    """Bearings from raw degrees, as printed in the paper, are wrong by up to ``worst_deg``.

    With r = metres per degree of longitude / of latitude, the worst is arcsin((1 - r) / (1 + r)).
    """
    center = np.array(geo.LANDMARKS[key].center)
    turn = np.radians(np.arange(0.0, 360.0, 0.5))
    points = geo.from_local_m(100 * np.stack([np.sin(turn), np.cos(turn)], -1), center)
    d_lat, d_lon = (points - center).T
    naive = np.degrees(np.arctan2(d_lon, d_lat))
    error = geo.angle_difference_deg(naive, geo.bearing_deg(points, center))
    assert np.abs(error).max() == pytest.approx(worst_deg, abs=0.01)
    east = geo.local_m(center + [0, 1e-4], center)[0]
    north = geo.local_m(center + [1e-4, 0], center)[1]
    ratio = east / north
    assert ratio == pytest.approx(np.cos(np.radians(center[0])), rel=0.005)
    assert np.degrees(np.arcsin((1 - ratio) / (1 + ratio))) == pytest.approx(worst_deg, abs=0.01)


def test_azimuth_and_bearing_are_mirror_images():
    assert [geo.azimuth_from_bearing(b) for b in (0, 90, 180, 270)] == [90, 0, 270, 180]
    angles = np.linspace(-400, 400, 81)
    back = geo.bearing_from_azimuth(geo.azimuth_from_bearing(angles))
    np.testing.assert_allclose(geo.angle_difference_deg(back, angles), 0, atol=1e-9)


def test_bins():
    bearings = [0, 4.99, 5, 354.99, 355, 360, -5.01, 180, 175]
    assert geo.bearing_bin(bearings).tolist() == [0, 0, 1, 35, 0, 0, 35, 18, 18]
    assert geo.bin_bearing_deg([0, 1, 35, 36]).tolist() == [0, 10, 350, 0]
    centres = np.arange(36)
    assert (geo.bearing_bin(geo.bin_bearing_deg(centres)) == centres).all()
    assert geo.bearing_bin(-180.0) == geo.bearing_bin(180.0) == 18
    assert geo.bearing_bin([44.9, 45.1, 359], 4).tolist() == [0, 1, 0]


def test_angle_difference():
    assert geo.angle_difference_deg(10, 350) == 20
    assert geo.angle_difference_deg(350, 10) == -20
    assert abs(geo.angle_difference_deg(270, 90)) == 180


def test_bounds():
    bounds = geo.Bounds(43.70, 10.38, 43.74, 10.42)
    points = [[43.72, 10.40], [43.70, 10.38], [43.75, 10.40], [43.72, 10.43]]
    assert bounds.contains(points).tolist() == [True, True, False, False]
    corners = [[43.70, 10.38], [43.74, 10.42], [43.72, 10.40], [43.70, 10.42]]
    expected = [[-1, -1], [1, 1], [0, 0], [1, -1]]  # (x, y) = (lon, lat)
    np.testing.assert_allclose(bounds.normalize(corners), expected, atol=1e-9)
    with pytest.raises(ValueError, match=r"photo \(43.8, 10.4\) lies outside"):
        bounds.check([43.8, 10.4], "photo")
    with pytest.raises(ValueError, match="Did you swap lat and lon"):
        bounds.check([10.40, 43.72])
    with pytest.raises(ValueError, match="south, west, north, east"):
        geo.Bounds(43.74, 10.38, 43.70, 10.42)


def test_distance_is_geodesic():
    # One degree of the equator is 6,378,137 m x pi / 180.
    assert geo.distance_m((0, 10), (0, 11)) == pytest.approx(111_319.4908, abs=1e-3)
    # A quarter of the meridian, the metre's first definition.
    quarter = geo.distance_m([[0, 20], [0, 20]], [[90, 0], [-90, 7]])
    np.testing.assert_allclose(quarter, 10_001_965.729, atol=1e-2)
    assert geo.distance_m(geo.LANDMARKS["pisa"].center, geo.LANDMARKS["pisa"].center) == 0


@pytest.mark.parametrize(
    ("metres", "text"),
    [(0.4, "less than 1 m"), (1.2, "1 m"), (450.4, "450 m"), (999.6, "1.0 km"), (3240, "3.2 km"),
     (99_940, "99.9 km"), (99_960, "100 km"), (4_889_680, "4,890 km")],
)
def test_distances_for_people(metres, text):
    assert geo.distance_text(metres) == text


def test_distance_to_bounds():
    bounds = geo.Bounds(43.70, 10.38, 43.74, 10.42)
    # At 43.77 N a degree of latitude is 111132.95 - 559.85 cos 2l + 1.17 cos 4l = 111107.8 m;
    # at 43.72 N a degree of longitude is 111412.84 cos l - 93.5 cos 3l + 0.12 cos 5l = 80582.5 m.
    points = [[43.72, 10.40], [43.74, 10.42], [43.80, 10.40], [43.72, 10.43], [43.72, 10.37]]
    expected = [0, 0, 0.06 * 111107.8, 0.01 * 80582.5, 0.01 * 80582.5]
    np.testing.assert_allclose(bounds.distance_m(points), expected, atol=0.05)
    assert bounds.distance_m([43.75, 10.43]) == geo.distance_m((43.75, 10.43), (43.74, 10.42))


def test_the_shortest_way_to_a_meridian_is_not_along_the_parallel():
    """From (60, 90) to the meridian 0 the geodesic ends at the pole, 30 degrees away."""
    bounds = geo.Bounds(0, -10, 90, 0)
    assert bounds.distance_m((60, 90)) == pytest.approx(
        geo.distance_m((60, 90), (90, 0)), rel=1e-9)
    world = geo.Bounds(-10, -170, 10, -160)  # the other way round, over the antimeridian
    assert world.distance_m((0, 179)) == pytest.approx(11 * 111_319.4908, rel=1e-9)


def test_bounds_say_how_far_outside_a_point_lies():
    bounds = geo.Bounds(43.70, 10.38, 43.74, 10.42)
    with pytest.raises(ValueError, match=r"outside the bounds .*, 6\.7 km away\.$"):
        bounds.check([[43.72, 10.40], [43.8, 10.4]])
    with pytest.raises(ValueError, match=r"\(43.72, 10.43\) .*, 806 m away\.$"):
        bounds.check([43.72, 10.43])
    with pytest.raises(ValueError, match=r"4,890 km away\. Did you swap lat and lon\?"):
        bounds.check([10.40, 43.72])


@pytest.mark.parametrize(
    ("points", "match"),
    [
        ([float("nan"), 0], "not finite"),
        ([0, float("inf")], "not finite"),
        ([-122.3, 47.6], "Did you swap lat and lon"),
        ([95, 120], "latitude must lie"),
        ([0, 181], "longitude must lie"),
        ([1, 2, 3], r"\(lat, lon\) pairs"),
        (5, r"\(lat, lon\) pairs"),
    ],
)
def test_wrong_positions_are_refused(points, match):
    with pytest.raises(ValueError, match=match):
        geo.check_lat_lon(points)


def test_landmarks_are_found_by_key_and_by_name():
    assert geo.find_landmark("Leaning tower of Pisa") is geo.LANDMARKS["pisa"]
    assert geo.find_landmark(" SPACE-NEEDLE ") is geo.LANDMARKS["space-needle"]
    assert geo.find_landmark("Atlantis") is None
