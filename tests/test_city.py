"""The miniature city: places tile it, captions say all but the place, photos carry both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from gps_guidance import cli, geo
from gps_guidance.miniature import city, city_photographer
from gps_guidance.miniature.city_scene import draw_scene
from gps_guidance.photos.exif import read_gps
from gps_guidance.photos.ingest import ingest
from gps_guidance.photos.manifest import load_manifest

BBOX = ",".join(map(str, city.BOUNDS.as_tuple()))


def shots(count: int) -> list[city_photographer.CityShot]:
    return [city_photographer.plan_city_shot(np.random.default_rng((0, i))) for i in range(count)]


@pytest.fixture(scope="module")
def city_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("city") / "photos"
    return city_photographer.take_city_photos(folder, 24, seed=2)


# --- places ----------------------------------------------------------------------------------


def test_the_city_is_about_a_kilometre_wide() -> None:
    corners = geo.local_m([(city.BOUNDS.south, city.BOUNDS.west),
                           (city.BOUNDS.north, city.BOUNDS.east)], city.CENTER)
    assert corners[1] - corners[0] == pytest.approx([1000, 1000], rel=0.004)


def test_places_tile_the_bounds_exactly() -> None:
    tiles = [shapely.Polygon(city.ring(place)[:, ::-1]) for place in city.PLACES]
    box = shapely.box(city.BOUNDS.west, city.BOUNDS.south, city.BOUNDS.east, city.BOUNDS.north)
    assert all(tile.is_valid and tile.exterior.is_ccw for tile in tiles)
    assert sum(tile.area for tile in tiles) == pytest.approx(box.area, rel=1e-9)
    assert shapely.union_all(tiles).area == pytest.approx(box.area, rel=1e-9)


def test_every_point_has_the_one_place_whose_outline_holds_it() -> None:
    rng = np.random.default_rng(0)
    points = city.from_grid(rng.uniform(0, city.GRID, (3000, 2)))
    places = city.place_of(points)
    inside = np.stack([shapely.contains_xy(shapely.Polygon(city.ring(place)), *points.T)
                       for place in city.PLACES])
    assert (inside.sum(axis=0) == 1).all()
    assert (np.array(city.PLACES)[inside.argmax(axis=0)] == places).all()
    assert set(places) == set(city.PLACES)


def test_edges_and_corners_have_a_place_too() -> None:
    for place in city.PLACES:
        assert set(city.place_of(city.ring(place))) <= set(city.PLACES)
    assert city.place_of((city.BOUNDS.south, city.BOUNDS.west)) == "boulevards"
    assert city.place_of([[[city.BOUNDS.north, city.BOUNDS.east]]]).shape == (1, 1)
    with pytest.raises(ValueError, match="outside the bounds.*swap lat and lon"):
        city.place_of((16.0, 47.0))


def test_landmarks_stand_in_their_places() -> None:
    for name, at in city.LANDMARKS.items():
        assert city.place_of(city.from_grid(at)) == name
    assert city.to_grid(city.from_grid((123.0, 456.0))) == pytest.approx([123, 456])


def test_geojson_has_longitude_first() -> None:
    collection = json.loads(json.dumps(city.geojson()))
    assert [f["properties"]["name"] for f in collection["features"]] == list(city.PLACES)
    for feature in collection["features"]:
        [outline] = feature["geometry"]["coordinates"]
        assert outline[0] == outline[-1]
        assert all(15.9 < lon < 16.1 and 46.9 < lat < 47.1 for lon, lat in outline)
    with pytest.raises(ValueError, match="'harbour'.*gallery.*lofts"):
        city.ring("harbour")


# --- captions and the hold-out ---------------------------------------------------------------


def test_captions_and_their_inverse() -> None:
    for scene in city.all_scenes():
        said = city.parse_caption(city.caption_of(scene))
        assert said == city.Said(scene.object, scene.colour, scene.weather,
                                 city.ARTS.get(scene.place))


def test_captions_read_like_captions() -> None:
    def caption(*scene: str | None) -> str:
        return city.caption_of(city.Scene(*scene))

    assert caption("park", "car", "red", "rain") == "a red car in the rain"
    assert caption("lofts", None, None, "night") == "a view at night"
    assert caption("gallery", "dog", "blue", None) == "a painting of a blue dog"
    assert caption("sculpture-hall", "bench", "white", None) == "a sculpture of a white bench"


def test_captions_never_name_the_place() -> None:
    words = {word for place in city.PLACES for word in place.split("-")} - {"sculpture"}
    for scene in city.all_scenes():
        assert not words & set(city.caption_of(scene).split())


@pytest.mark.parametrize("caption", [
    "", "a car", "a red car", "a red cat in the rain", "a view", "a painting of a view at night",
    "a painting of a red car in the rain", "red car in the sun", "a red  car in the sun",
])
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="is no caption of Miniatown"):
        city.parse_caption(caption)


@pytest.mark.parametrize(("scene", "message"), [
    (("harbour", "car", "red", "sun"), "'harbour'.*river"),
    (("park", "cat", "red", "sun"), "object 'cat' is not one of car"),
    (("park", "car", "pink", "sun"), "colour 'pink' is not one of red"),
    (("park", "car", "red", "fog"), "weather 'fog' is not one of sun"),
    (("park", "car", None, "sun"), "give both"),
    (("park", "car", "red", None), "needs a weather"),
    (("gallery", "car", "red", "sun"), "has no weather"),
    (("gallery", None, None, None), "needs an object"),
])
def test_impossible_scenes_are_refused(scene: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_scene(*scene, np.random.default_rng(0))  # type: ignore[arg-type]


def test_the_hold_out_covers_every_object_and_place() -> None:
    objects, places = zip(*city.HELD_OUT, strict=True)
    assert set(objects) == set(city.OBJECTS)
    assert sorted(places) == sorted(city.PLACES)
    part = len(city.HELD_OUT) / (len(city.OBJECTS) * len(city.PLACES))
    assert 0.12 <= part <= 0.15


def test_held_out_pairs_are_never_photographed_but_their_parts_are() -> None:
    seen = Counter((shot.scene.object, shot.scene.place) for shot in shots(2000))
    every = {(thing, place) for thing in city.OBJECTS for place in city.PLACES}
    assert {pair for pair in seen if pair[0]} == every - city.HELD_OUT
    assert all((None, place) in seen for place in city.OUTDOORS)


# --- pictures --------------------------------------------------------------------------------


def test_a_picture_depends_on_labels_and_rng_alone() -> None:
    def draw(seed: int, size: int = 64, beyond: str | None = None) -> np.ndarray:
        return draw_scene("old-town", "dog", "blue", "snow", np.random.default_rng(seed), size,
                          beyond)

    assert draw(0).dtype == np.uint8 and draw(0).shape == (64, 64, 3)
    assert draw(0, 80).shape == (80, 80, 3)
    assert (draw(0) == draw(0)).all()
    assert (draw(0) != draw(1)).any()
    assert (draw(0) != draw(0, beyond="dome")).any()
    with pytest.raises(ValueError, match="'park' is no landmark.*dome"):
        draw(0, beyond="park")
    with pytest.raises(ValueError, match="size 8 is too small"):
        draw(0, 8)


@pytest.mark.parametrize("place", city.PLACES)
def test_every_object_has_its_colour(place: str) -> None:
    """The pixels nearest to the colour are more than without the object, by its size."""
    weather = None if place in city.ARTS else "sun"

    def near(thing: str, colour: str) -> int:
        picture = draw_scene(place, thing, colour, weather, np.random.default_rng(5))
        away = np.abs(picture.astype(int) - city.COLOURS["purple"]).max(axis=-1)
        return int((away < 50).sum())

    for thing in city.OBJECTS:
        assert near(thing, "purple") - near(thing, "green") > 30


def test_the_sky_tells_the_weather() -> None:
    sky = {weather: draw_scene("park", None, None, weather, np.random.default_rng(1))[:6].mean()
           for weather in city.WEATHERS}
    assert sky["night"] < 60 < sky["rain"] < sky["sun"] < sky["snow"]


# --- photos ----------------------------------------------------------------------------------


def test_a_photo_depends_on_seed_and_index_alone(city_photos: Path, tmp_path: Path) -> None:
    again = city_photographer.take_city_photos(tmp_path / "again", 20, seed=2, processes=2)
    for path in again.glob("*.jpg"):
        assert path.read_bytes() == (city_photos / path.name).read_bytes()
    rows = [json.loads((folder / "truth.json").read_text())["photos"]
            for folder in (again, city_photos)]
    assert rows[0] == rows[1][:20]
    other = city_photographer.take_city_photos(tmp_path / "other", 1, seed=3)
    name = "tourist-00000.jpg"
    assert (other / name).read_bytes() != (city_photos / name).read_bytes()


def test_exif_holds_the_noisy_position_to_a_centimetre(city_photos: Path) -> None:
    for index, row in enumerate(json.loads((city_photos / "truth.json").read_text())["photos"]):
        shot = city_photographer.plan_city_shot(np.random.default_rng((2, index)))
        reading = read_gps(city_photos / row["file"])
        read, said, true = geo.local_m(
            [(reading.lat, reading.lon), shot.gps, row["position"]], city.CENTER
        )
        assert np.linalg.norm(read - said) < 0.01
        assert np.linalg.norm(read - true) < 6 * city_photographer.GPS_NOISE_M
        assert city.place_of(row["position"]) == row["place"] == shot.scene.place
        assert reading.taken_at is not None
        hour, month = int(reading.taken_at[11:13]), int(reading.taken_at[5:7])
        assert (hour >= 21) == (row["weather"] == "night")
        assert (month in (12, 1, 2)) == (row["weather"] == "snow")


def test_crowds_gather_but_nobody_leaves_the_city() -> None:
    planned = shots(2000)
    assert city.BOUNDS.contains([shot.gps for shot in planned]).all()
    counts = Counter(shot.scene.place for shot in planned)
    area = {place: shapely.Polygon(city.ring(place)).area for place in city.PLACES}
    assert counts["dome"] / area["dome"] > 3 * counts["boulevards"] / area["boulevards"]
    assert min(counts.values()) > 80
    noise = [geo.local_m(shot.gps, city.CENTER) - geo.local_m(shot.position, city.CENTER)
             for shot in planned]
    assert np.std(noise, axis=0) == pytest.approx([city_photographer.GPS_NOISE_M] * 2, rel=0.06)


def test_landmarks_are_seen_from_nearby_only() -> None:
    for shot in shots(600):
        if shot.beyond is not None:
            away = city.to_grid(shot.position) - city.LANDMARKS[shot.beyond]
            assert np.hypot(*away) < city_photographer.BEYOND_M
            assert shot.scene.place not in city.ARTS


def test_ingest_carries_the_captions(city_photos: Path, tmp_path: Path) -> None:
    ingest([city_photos], tmp_path / "d", bounds=city.BOUNDS, progress=False)
    truth = {row["file"]: row for row in
             json.loads((city_photos / "truth.json").read_text())["photos"]}
    rows = load_manifest(tmp_path / "d").rows.to_pylist()
    assert len(rows) == len(truth) == 24
    for row in rows:
        true = truth[row["source"]]
        said = city.parse_caption(row["caption"])
        assert (said.object, said.colour, said.weather) == (
            true["object"], true["colour"], true["weather"])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p"
    assert cli.main(["miniature", "--out", str(out), "--world", "city", "--count", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert len(list(out.glob("*.jpg"))) == 3
    assert cli.main(["ingest", str(out), "--out", str(tmp_path / "d"), "--bbox", BBOX]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"3 photos in {tmp_path / 'd'}"
    assert cli.main(["miniature", "--out", str(out), "--world", "village"]) == 2
    assert "invalid choice: 'village'" in capsys.readouterr().err


def test_the_city_does_not_need_torch() -> None:
    code = ("import sys, gps_guidance.miniature.city_photographer; "
            "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "False"


def test_every_city_photo_is_square_and_small(city_photos: Path) -> None:
    for path in city_photos.glob("*.jpg"):
        with Image.open(path) as photo:
            assert photo.size == (city_photographer.PHOTO_SIZE,) * 2
