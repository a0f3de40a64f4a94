"""Areas and streets: what is read and refused, and how evenly locations are spread."""

import json
import sys
import time
from types import SimpleNamespace

import networkx
import numpy as np
import pytest
import shapely
from scipy.stats import qmc
from shapely import LineString, MultiPolygon, Polygon, box

from gps_guidance import areas, geo

CENTER = geo.LANDMARKS["pisa"].center
SQUARE = [[10.0, 43.0], [10.1, 43.0], [10.1, 43.1], [10.0, 43.1], [10.0, 43.0]]
GEOJSON = {"type": "Polygon", "coordinates": [SQUARE]}


def rng(seed=0):
    return np.random.default_rng(seed)


def metres(east_north, center=CENTER):
    """Corners in local metres to GeoJSON's (lon, lat)."""
    return geo.from_local_m(east_north, center)[:, ::-1]


def inside(area, points):
    return shapely.contains_xy(area, points[:, 1], points[:, 0])


def feature(geometry):
    return {"type": "Feature", "properties": {}, "geometry": geometry}


def collection(*geometries):
    return {"type": "FeatureCollection", "features": [feature(g) for g in geometries]}


def line(*lonlat):
    return {"type": "LineString", "coordinates": [list(point) for point in lonlat]}


# --- reading ---


class Shaped:
    __geo_interface__ = feature(GEOJSON)


@pytest.mark.parametrize(
    "area",
    [
        GEOJSON,
        {"type": "MultiPolygon", "coordinates": [[SQUARE]]},
        feature(GEOJSON),
        collection(GEOJSON),
        {**collection(GEOJSON), "features": [feature(GEOJSON), feature(None)]},
        {"type": "GeometryCollection", "geometries": [GEOJSON]},
        {"type": "Polygon", "coordinates": [[[*corner, 12.0] for corner in SQUARE]]},  # altitudes
        Shaped(),
        Polygon(SQUARE),
        [(lat, lon) for lon, lat in SQUARE],
        np.array(SQUARE)[:-1, ::-1],
    ],
)
def test_one_square_in_every_form(area):
    read = areas.read_area(area)
    assert read.equals(Polygon(SQUARE))
    assert not read.has_z


def test_files(tmp_path):
    path = tmp_path / "area.geojson"
    path.write_text(json.dumps(collection(GEOJSON)))
    assert areas.read_area(path).equals(areas.read_area(str(path)))
    with pytest.raises(ValueError, match=r"none\.geojson cannot be read: No such file"):
        areas.read_area(tmp_path / "none.geojson")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        areas.read_area(tmp_path)
    path.write_text("{oops")
    with pytest.raises(ValueError, match=r"area\.geojson is not a GeoJSON file: Expecting"):
        areas.read_area(path)
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="is not a GeoJSON file"):
        areas.read_area(path)


def test_several_polygons_are_united():
    united = areas.read_area(collection(GEOJSON, box(10.05, 43, 10.2, 43.1).__geo_interface__))
    assert united.equals(box(10, 43, 10.2, 43.1))
    apart = areas.read_area(collection(GEOJSON, box(11, 43, 11.1, 43.1).__geo_interface__))
    assert isinstance(apart, MultiPolygon) and len(apart.geoms) == 2


POINT = {"type": "Point", "coordinates": [10, 43]}


@pytest.mark.parametrize(
    ("area", "match"),
    [
        (POINT, "holds a Point, but an area is made of polygons"),
        (LineString([[10, 43], [11, 43]]), "holds a LineString, but an area"),
        (collection(GEOJSON, POINT), "holds a Point"),
        (collection(), "area is empty"),
        (feature(None), "area is empty"),
        (Polygon(), "area is empty"),
        ({"type": "Polygon", "coordinates": []}, "area is empty"),
        ({"type": "Polygon", "coordinates": [[[10, 43], [11, 43]]]}, "a malformed Polygon"),
        ({"type": "Polygon", "coordinates": [["a", "b"]]}, "a malformed Polygon"),
        ({"type": "Topology", "objects": {}}, "'Topology' is not GeoJSON"),
        ({"latitude": 43}, "'dict' is not GeoJSON"),
        (Polygon([[10, 43], [11, 44], [11, 43], [10, 44]]),
         r"not a simple polygon: self-intersection at \(lat, lon\) = \(43\.5, 10\.5\)"),
        (Polygon([[31.2, 121.4], [31.3, 121.4], [31.3, 121.5]]),
         r"latitude must lie .* Did you swap lat and lon\? Geometry is \(lon, lat\)"),
        (box(448000, 5413000, 449000, 5414000), r"latitude must lie .* degrees of WGS 84"),
        ([(121.4, 31.2), (121.4, 31.3), (121.5, 31.3)], "Did you swap lat and lon"),
        ([(43, 10), (43, 11)], "at least 3 different corners"),
        ([(43, 10), (43, 11), (43, 10)], "at least 3 different corners"),
        ([(43, 10, 5)] * 4, r"got shape \(4, 3\)"),
        ([(43, 10), (43, 11), (44, float("nan"))], "not finite"),
        ([(43, 10), (43,)], r"not list"),
        (None, "at least 3 different corners"),
        (box(179, 10, 181, 11), "crosses the antimeridian"),
        ([(10, 179), (10, -179), (11, -179), (11, 179)], "crosses the antimeridian"),
    ],
)
def test_what_is_no_area_is_refused(area, match):
    with pytest.raises(ValueError, match=match):
        areas.read_area(area)


# --- sampling areas ---


def zone_m2(south, north):
    """Area of one radian of longitude between two parallels, by quadrature on the ellipsoid."""
    a, f = 6378137.0, 1 / 298.257223563
    e2 = f * (2 - f)
    lat = np.radians(np.linspace(south, north, 20001))
    width = a**2 * (1 - e2) * np.cos(lat) / (1 - e2 * np.sin(lat) ** 2) ** 2
    return np.trapezoid(width, lat) if hasattr(np, "trapezoid") else np.trapz(width, lat)


def test_even_on_the_ground_at_latitude_60():
    """The southern half in degrees has 57.5 % of the ground; even degrees would give it 50 %."""
    points = areas.sample_area(box(20, 50, 30, 70), 4096, rng())
    share = zone_m2(50, 60) / zone_m2(50, 70)
    assert share == pytest.approx(0.575, abs=0.001)
    assert (points[:, 0] < 60).mean() == pytest.approx(share, abs=0.003)
    assert (points[:, 1] < 25).mean() == pytest.approx(0.5, abs=0.003)
    wide = areas.sample_area(box(-40, 30, 40, 80), 20_000, rng())
    middle = zone_m2(45, 65) / zone_m2(30, 80) * 40 / 80
    in_middle = (np.abs(wide[:, 1]) < 20) & (np.abs(wide[:, 0] - 55) < 10)
    assert in_middle.mean() == pytest.approx(middle, abs=0.001)


def test_triangle_in_quarters_of_equal_ground():
    """The lines between the middles of a triangle's sides cut its ground in four equal parts."""
    corners = np.array([[0, 0], [900, 100], [200, 800]], dtype=float)
    center = (60.0, 25.0)
    points = areas.sample_area(Polygon(metres(corners, center)), 1000, rng(3))
    weights = np.linalg.solve(
        np.vstack([corners.T, np.ones(3)]),
        np.vstack([geo.local_m(points, center).T, np.ones(len(points))]))
    assert (weights > -1e-4).all()
    np.testing.assert_allclose((weights > 0.5).sum(axis=1), 250, atol=8)


def test_far_more_even_than_independent_locations():
    """Discrepancy, and the variance of counts in cells, against independent uniform locations."""
    area, num = Polygon(metres([[0, 0], [1000, 0], [1000, 1000], [0, 1000]])), 100
    even = [geo.local_m(areas.sample_area(area, num, rng(s)), CENTER) / 1000 for s in range(40)]
    independent = [rng(seed).random((num, 2)) for seed in range(40)]

    def unevenness(points):
        counts = np.histogram2d(*points.T, bins=4, range=[[0, 1], [0, 1]])[0]
        return qmc.discrepancy(points.clip(0, 1)), np.var(counts)

    ours, theirs = (np.mean([unevenness(p) for p in points], axis=0)
                    for points in (even, independent))
    assert theirs[1] == pytest.approx(num / 16 * (1 - 1 / 16), rel=0.15)
    assert ours[0] < 0.1 * theirs[0]
    assert ours[1] < 0.25 * theirs[1]


def test_no_two_locations_are_close():
    """Also where a street is twelve times as long as wide; independent ones come within 0.05."""
    for length in (1000, 12000):
        area = Polygon(metres([[0, 0], [length, 0], [length, 1000], [0, 1000]]))
        east_north = geo.local_m(areas.sample_area(area, 100, rng(1)), CENTER)
        gaps = np.linalg.norm(east_north[:, None] - east_north[None], axis=-1)
        assert gaps[np.triu_indices(100, 1)].min() > 0.3 * np.sqrt(length * 1000 / 100)


def test_a_single_location_is_anywhere_in_the_area():
    """Each side counts by its ground also with M = 1, although every second candidate misses."""
    area = Polygon(metres([[0, 0], [200, 0], [200, 100], [0, 100]]))
    points = np.concatenate([areas.sample_area(area, 1, rng(seed)) for seed in range(600)])
    assert points.shape == (600, 2) and inside(area, points).all()
    east, north = geo.local_m(points, CENTER).T
    tolerance = 3.5 * np.sqrt(1 / 7 * 6 / 7 / 600)
    for side in (east / 200, 1 - east / 200, north / 100, 1 - north / 100):
        assert (side < 1 / 7).mean() == pytest.approx(1 / 7, abs=tolerance)


def test_holes_stay_empty():
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([np.sin(turn), np.cos(turn)], -1)
    area = Polygon(metres(500 * circle), [metres(300 * circle + [50, 0])])
    points = areas.sample_area(area, 5000, rng())
    assert points.shape == (5000, 2) and inside(area, points).all()
    hole = Polygon(area.interiors[0])
    assert not inside(hole, points).any()


def test_parts_share_by_their_ground():
    """Two boxes of one size in degrees: the one at latitude 60 has about half the ground."""
    area = MultiPolygon([box(10, 0, 10.01, 0.01), box(-120, 60, -119.99, 60.01)])
    points = areas.sample_area(area, 1000, rng())
    share = zone_m2(60, 60.01) / (zone_m2(60, 60.01) + zone_m2(0, 0.01))
    assert share == pytest.approx(0.3355, abs=1e-3)
    assert abs((points[:, 1] < 0).sum() - 1000 * share) <= 1
    first = [areas.sample_area(area, 1, rng(seed))[0, 1] < 0 for seed in range(400)]
    assert np.mean(first) == pytest.approx(share, abs=0.1)


def test_both_sides_of_the_antimeridian():
    area = MultiPolygon([box(179.9, 10, 180, 10.1), box(-180, 10, -179.9, 10.1)])
    points = areas.sample_area(area, 100, rng())
    assert (points[:, 1] > 0).sum() == 50 and inside(area, points).all()


def test_thin_areas_end_quickly():
    sliver = Polygon(metres([[0, 0], [4000, 3000], [3999.4, 3000.8], [-0.6, 0.8]]))
    turn = np.linspace(0, 2 * np.pi, 721)
    circle = np.stack([np.sin(turn), np.cos(turn)], -1)
    road = Polygon(metres(2500 * circle), [metres(2499 * circle)])
    start = time.monotonic()
    for area in (sliver, road):
        points = areas.sample_area(area, 10_000, rng())
        assert points.shape == (10_000, 2) and inside(area, points).all()
    quarters = np.histogram(geo.bearing_deg(points, CENTER), 4, (0, 360))[0]
    np.testing.assert_allclose(quarters, 2500, atol=15)
    assert time.monotonic() - start < 30


def test_the_generator_decides():
    area = areas.read_area(GEOJSON)
    once, again, other = (areas.sample_area(area, 50, rng(seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(once, again)
    assert not np.isin(once, other).any()
    generator = rng(7)
    first, second = (areas.sample_area(area, 50, generator) for _ in range(2))
    assert not np.isin(first, second).any()
    pairs = [(lat, lon) for lon, lat in SQUARE]
    np.testing.assert_array_equal(
        areas.sample_area(pairs, 50, rng(7)), areas.sample_area(GEOJSON, 50, rng(7)))


@pytest.mark.parametrize("num", [0, -3, 2.5, None])
def test_numbers_that_cannot_be_drawn(num):
    with pytest.raises(ValueError, match="num_locations must be a whole number from 1 on, got"):
        areas.sample_area(GEOJSON, num, rng())


def test_what_cannot_be_sampled():
    with pytest.raises(ValueError, match=r"numpy\.random\.Generator, .* got 0"):
        areas.sample_area(GEOJSON, 5, 0)
    tiny = box(10, 43, 10 + 1e-9, 43 + 1e-9)
    with pytest.raises(ValueError, match="covers only .* square metres"):
        areas.sample_area(tiny, 5, rng())


# --- streets ---

STREET = metres([[0, 0], [300, 0], [300, 100]])  # 400 m with a corner


def test_spacing_along_a_street_is_exact():
    points = areas.sample_streets(line(*STREET), 16, rng())
    east, north = geo.local_m(points, CENTER).T
    along = np.where(north < 5e-3, east, 300 + north)
    np.testing.assert_allclose(np.diff(along), 25, atol=1e-3)
    assert 0 <= along[0] < 25
    on_it = np.minimum(np.abs(north), np.abs(east - 300))
    assert on_it.max() < 5e-3  # straight in degrees: millimetres off the geodesic


def test_streets_are_laid_end_to_end():
    """A far and a near street of 100 and 300 m take a quarter and three quarters."""
    far = metres([[0, 0], [0, 100]], (-33.9, 151.2))
    near = metres([[0, 0], [300, 0]], (60.0, 25.0))
    both = collection(line(*far), {"type": "MultiLineString", "coordinates": [near.tolist()]})
    points = areas.sample_streets(both, 40, rng())
    assert (points[:, 0] < 0).sum() == 10
    starts = [areas.sample_streets(both, 1, rng(seed))[0, 0] < 0 for seed in range(400)]
    assert np.mean(starts) == pytest.approx(0.25, abs=0.09)


def test_a_long_street_is_even_in_metres():
    """A degree of latitude is 1 % longer at 80 than at 0 degrees."""
    points = areas.sample_streets(line((20, 0), (20, 80)), 100, rng())
    steps = geo.distance_m(points[1:], points[:-1])
    np.testing.assert_allclose(steps, geo.distance_m((0, 20), (80, 20)) / 100, atol=0.5)
    assert np.ptp(np.diff(points[:, 0])) > 0.005


def test_streets_are_cut_at_the_area():
    area = Polygon(metres([[100, -50], [200, -50], [200, 50], [100, 50]]))
    points = areas.sample_streets(line(*STREET), 10, rng(), area=area)
    east, north = geo.local_m(points, CENTER).T
    np.testing.assert_allclose(np.diff(east), 10, atol=1e-3)
    assert 100 <= east.min() and east.max() <= 200
    assert np.abs(north).max() < 5e-3
    with pytest.raises(ValueError, match="No street of network lies inside the area"):
        areas.sample_streets(line(*STREET), 10, rng(), area=GEOJSON)


def graph():
    """As OSMnx makes them: directed, x and y on nodes, geometry where an edge is curved."""
    made = networkx.MultiDiGraph(crs="epsg:4326")
    for node, (lon, lat) in enumerate(STREET):
        made.add_node(node, x=lon, y=lat)
    bend = LineString([STREET[1], metres([[350, 50]])[0], STREET[2]])
    made.add_edge(0, 1, oneway=True)
    made.add_edge(1, 2, geometry=bend)
    made.add_edge(2, 1, geometry=bend.reverse())
    return made


def test_both_directions_of_an_edge_are_one_street():
    streets = areas.read_streets(graph())
    assert [len(street.coords) for street in streets.geoms] == [2, 3]
    points = areas.sample_streets(graph(), 1000, rng())
    east = geo.local_m(points, CENTER)[:, 0]
    share = 300 / (300 + 2 * np.hypot(50, 50))
    assert abs((east < 300).sum() - 1000 * share) <= 1


def test_graphml_goes_through_osmnx(monkeypatch, tmp_path):
    """OSMnx itself is not needed to test: its reader is replaced by one that returns a graph."""
    path, asked = tmp_path / "walk.graphml", []
    reader = SimpleNamespace(load_graphml=lambda path: asked.append(path) or graph())
    monkeypatch.setitem(sys.modules, "osmnx", reader)
    np.testing.assert_array_equal(
        areas.sample_streets(path, 9, rng()), areas.sample_streets(graph(), 9, rng()))
    assert asked == [path]
    reader.load_graphml = networkx.read_graphml
    with pytest.raises(ValueError, match=r"walk\.graphml cannot be read: No such file"):
        areas.read_streets(path)
    path.write_text("<oops")
    with pytest.raises(ValueError, match="not a GraphML file of OSMnx: ParseError"):
        areas.read_streets(str(path))


def test_missing_osmnx_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "osmnx", None)
    with pytest.raises(ValueError, match=r'pip install "gps-guidance\[osmnx\]"'):
        areas.sample_streets("walk.graphml", 5, rng())


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (GEOJSON, "holds a Polygon, but streets are lines"),
        (collection(line([10, 43], [11, 43]), POINT), "holds a Point"),
        (collection(), "network is empty"),
        (networkx.MultiDiGraph(), "network is empty"),
        (line([10, 43], [10, 43]), "network is empty"),
        (line([448000, 5413000], [448100, 5413000]), "latitude must lie"),
        (line([179, 43], [-179, 43]), "crosses the antimeridian"),
        ([(43, 10), (44, 10)], "'list' is not GeoJSON"),
        (networkx.path_graph(3), "a node has no 'x'"),
    ],
)
def test_what_is_no_network_is_refused(network, match):
    with pytest.raises(ValueError, match=match):
        areas.read_streets(network)
