"""Maps: the right shape on the ground, what is drawn where, and whole files only."""

import numpy as np
import pytest
import shapely
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from shapely import Polygon

from gps_guidance import areas, geo, viz

CENTER = (60.0, 25.0)  # a degree of longitude is half as long as one of latitude


def square(side_m, offset=(0, 0)):
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * side_m + offset
    return geo.from_local_m(corners, CENTER)[:, ::-1]


PARK = Polygon(square(1000), [square(400, (300, 300))])
STREETS = {"type": "LineString", "coordinates": square(600, (200, 200)).tolist()}


def pixel_of(figure, lon, lat):
    FigureCanvasAgg(figure).draw()
    return figure.axes[0].transData.transform((lon, lat))


def colour_at(figure, lon, lat):
    x, y = pixel_of(figure, lon, lat)
    image = np.asarray(figure.canvas.buffer_rgba())
    return "#" + bytes(image[image.shape[0] - 1 - int(y), int(x), :3]).hex()


def test_a_square_on_the_ground_is_a_square_on_the_map():
    figure = viz.draw_area(PARK)
    corners = np.array([pixel_of(figure, *corner) for corner in square(1000)])
    sides = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)
    np.testing.assert_allclose(sides, sides[0], rtol=2e-3)
    assert corners[2, 1] > corners[0, 1] and corners[1, 0] > corners[0, 0]  # north up, east right


def test_the_hole_is_empty():
    figure = viz.draw_area(PARK)
    (lat, lon), (hole_lat, hole_lon) = geo.from_local_m([[150, 500], [500, 500]], CENTER)
    assert colour_at(figure, lon, lat) == viz.GROUND
    assert colour_at(figure, hole_lon, hole_lat) == viz.PAPER


def test_points_and_streets_lie_where_they_are():
    point = geo.from_local_m([150, 500], CENTER)
    figure = viz.draw_area(PARK, [point], streets=STREETS, title="Park")
    assert colour_at(figure, point[1], point[0]) == viz.POINT
    (street,) = figure.axes[0].collections[0].get_segments()
    np.testing.assert_array_equal(street, STREETS["coordinates"])
    assert figure.axes[0].get_title() == "Park"


def test_points_outside_the_area_are_shown():
    point = geo.from_local_m([2500, 500], CENTER)
    west, east = viz.draw_area(PARK, point[None]).axes[0].get_xlim()
    assert west < point[1] < east


@pytest.mark.parametrize(("side_m", "text"), [(10, "2 m"), (1000, "200 m"), (7000, "2 km")])
def test_the_scale_bar_is_true(side_m, text):
    figure = viz.draw_area(Polygon(square(side_m)))
    (bar,) = figure.axes[0].lines
    corner = [pixel_of(figure, *corner) for corner in square(side_m)[:2]]
    ends = bar.get_transform().transform(bar.get_xydata())
    metres = side_m * np.ptp(ends[:, 0]) / np.linalg.norm(corner[1] - corner[0])
    number, unit = text.split()
    assert metres == pytest.approx(float(number) * {"m": 1, "km": 1000}[unit], rel=5e-3)
    assert text in [label.get_text() for label in figure.axes[0].texts]
    assert "N" in [label.get_text() for label in figure.axes[0].texts]


def test_ticks_are_degrees_with_their_hemisphere():
    axes = viz.draw_area(shapely.box(-0.02, -0.02, 0.02, 0.02)).axes[0]
    east = [label.get_text() for label in axes.get_xticklabels()]
    north = [label.get_text() for label in axes.get_yticklabels()]
    assert east == ["0.02° W", "0.00° E", "0.02° E"]
    assert north[:2] == ["0.02° S", "0.00° N"]


@pytest.mark.parametrize("size_m", [(5000, 1), (1, 5000)])
def test_thin_areas_get_a_map_of_readable_shape(size_m):
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size_m
    area = Polygon(geo.from_local_m(corners, CENTER)[:, ::-1])
    axes = viz.draw_area(area, areas.sample_area(area, 20, np.random.default_rng(0))).axes[0]
    (west, east), (south, north) = axes.get_xlim(), axes.get_ylim()
    width, height = geo.local_m([(south, east), (north, west)], (south, west))
    assert 0.2 < height[1] / width[0] < 5.5


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "maps" / "park.png"
    figure = viz.draw_area(PARK, path=path)
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 500
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(type(figure), "savefig", full)
    with pytest.raises(OSError, match="no space"):
        viz.draw_area(PARK, path=path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="an area is made of polygons"):
        viz.draw_area(shapely.Point(10, 43))
    with pytest.raises(ValueError, match="Did you swap lat and lon"):
        viz.draw_area(PARK, [(121.0, 31.0)])


PICTURE = Image.new("RGB", (6, 4), "red")
HEAT = np.arange(72, dtype=np.float32).reshape(3, 4, 6) / 1000


def test_attention_is_drawn_over_the_image_in_per_cent(tmp_path):
    figure = viz.draw_attention(PICTURE, HEAT, ["car", "longitude", "latitude"],
                                tmp_path / "sheet.png")
    titles = {axes.get_title(): axes for axes in figure.axes}
    assert list(titles)[:4] == ["image", "car", "longitude", "latitude"]
    (whole,) = titles["image"].images
    np.testing.assert_array_equal(whole.get_array(), np.asarray(PICTURE))
    for name, heat in zip(("car", "longitude", "latitude"), HEAT, strict=True):
        grey, shown = titles[name].images
        assert np.asarray(grey.get_array()).shape == (4, 6)
        np.testing.assert_allclose(shown.get_array(), 100 * heat)
        assert shown.get_clim() == pytest.approx((100 * heat.min(), 100 * heat.max()))
        labels = [tick.get_text() for tick in shown.colorbar.ax.get_yticklabels()]
        assert labels and all(label.endswith(" %") for label in labels)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 200


def test_many_maps_fill_rows():
    heat = np.repeat(HEAT, 3, axis=0)
    panels = viz.draw_attention(np.asarray(PICTURE), heat, list("abcdefghi")).axes[:10]
    assert [len(axes.images) for axes in panels] == [1] + 9 * [2]
    assert panels[0].get_subplotspec().get_gridspec().get_geometry() == (2, 5)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"2 names for maps of shape \[3, 4, 6\]"):
        viz.draw_attention(PICTURE, HEAT, ["a", "b"])
    with pytest.raises(ValueError, match=r"maps are 4 x 3, the image is 4 x 6.*image.height"):
        viz.draw_attention(PICTURE, HEAT[..., :3], ["a", "b", "c"])
