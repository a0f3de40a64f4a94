"""The report on a dataset: what it says of troubles, and what it never shows."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gps_guidance import cli, geo
from gps_guidance.photos.inspection import _is_within, inspect
from gps_guidance.photos.manifest import SCHEMA, VERSION, Manifest, load_manifest
from gps_guidance.photos.troubles import troubles

CENTER = (43.722952, 10.396597)
BOX = geo.Bounds(43.70, 10.38, 43.74, 10.42)


def row(index: int, **columns: Any) -> dict[str, Any]:
    """A photo that gives no reason to complain, but for what ``columns`` say."""
    return {
        "id": f"{index:016x}", "file": f"images/{index:016x}.jpg", "phash": f"{index:016x}",
        "width": 96, "height": 72, "lat": BOX.south + 0.04 * (index % 97 + 0.5) / 97,
        "lon": BOX.west + 0.04 * (index % 89 + 0.5) / 89, "horizontal_error_m": 4.0,
        "taken_at": f"20{index % 20:02d}-05-06T{index % 24:02d}:08:09", "source": f"{index}.jpg",
        "caption": f"a red car {index}", "split": "val" if index % 10 == 0 else "train", **columns,
    }


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({name: [r.get(name) for r in rows] for name in SCHEMA.names}, schema=SCHEMA)


def city(count: int = 1000, **columns: Any) -> Manifest:
    return Manifest(table([row(k, **columns) for k in range(count)]), Path("city"), bounds=BOX)


def around(bearings: list[float], distance_m: float = 100.0, **columns: Any) -> Manifest:
    """Photos of a landmark from bearings in degrees."""
    rows = []
    for k, bearing in enumerate(bearings):
        metres = distance_m * np.sin(np.radians(bearing)), distance_m * np.cos(np.radians(bearing))
        lat, lon = geo.from_local_m(metres, CENTER)
        rows.append(row(k, lat=lat, lon=lon, east_m=metres[0], north_m=metres[1],
                        distance_m=distance_m, bearing_deg=bearing % 360,
                        bin=int(geo.bearing_bin(bearing)), **columns))
    return Manifest(table(rows), Path("tower"), "The tower", CENTER)


def changed(manifest: Manifest, name: str, values: dict[int, Any]) -> Manifest:
    """The manifest with other values in some rows of a column."""
    rows = manifest.rows.to_pylist()
    for index, value in values.items():
        rows[index][name] = value
    return dataclasses.replace(manifest, rows=table(rows))


def write(manifest: Manifest, root: Path, images: int = 0) -> Path:
    """A dataset folder of the manifest, with grey images for its first rows."""
    (root / "images").mkdir(parents=True)
    pq.write_table(manifest.rows, root / "manifest.parquet")
    about = {"version": VERSION, "landmark": manifest.landmark, "center": manifest.center,
             "bounds": manifest.bounds.as_tuple() if manifest.bounds else None,
             "num_bins": manifest.num_bins, "kept": len(manifest.rows),
             "rejected": {"no_gps": 7, "too_far": 2}}
    (root / "dataset.json").write_text(json.dumps(about))
    for file in manifest.rows.column("file").to_pylist()[:images]:
        Image.new("RGB", (96, 72), "gray").save(root / file)
    return root


AROUND = [5.0 * k for k in range(72)]  # two in each bin


# --- troubles --------------------------------------------------------------------------------


def test_a_good_dataset_has_none() -> None:
    assert troubles(city()) == []
    assert troubles(around(AROUND)) == []


def test_empty_bins_are_named_and_thin_ones_added_up() -> None:
    """120 and 130 are empty; 350, 0 and 10 hold one photo each, the other 31 twenty."""
    full = [10.0 * k for k in range(36) if k not in (12, 13, 35, 0, 1)] * 20
    assert troubles(around([*full, 350, 0, 10])) == [
        "No photo in the bins around 120, 130 degrees: a model has to guess these sides. "
        "Photograph from there.",
        "The bins from 350 to 10 degrees hold 3 photos together, against 17 in the average bin: "
        "images of this side will be poor. Add photos from there.",
    ]
    assert "bin around 0 degrees holds 1 photo, against" in troubles(
        around([*[b for b in AROUND if b > 5 and b < 355] * 9, 0]))[0]


def test_an_error_of_the_position_turns_near_bearings() -> None:
    """atan(4 m / 45 m) = 5.08 degrees, atan(4 m / 46 m) = 4.97; 4 m / tan 5 = 45.7 m."""
    assert troubles(around(AROUND, 46.0)) == []
    [near] = troubles(around(AROUND, 45.0))
    assert near.startswith("72 of 72 photos were") and "good to 3.9 m" in near
    assert "assumed" not in near
    [near] = troubles(changed(around(AROUND, 46.0), "horizontal_error_m", {0: None, 1: None}))
    assert near.startswith("2 of 72 photos") and "5 m is assumed" in near
    assert "--min-distance 57 " in near


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        (city(1), "Only 1 photo: a model of a city wants 1,000 or more"),
        (around([0.0]), "Only 1 photo: even a small model of a landmark wants 30"),
        (changed(city(), "file", {3: None, 4: None}), "2 of 1,000 photos are records without an"),
        (city(caption=None), "No photo has a caption, and `gps-guidance train gps` needs captions"),
        (changed(city(), "caption", {5: None}), "1 of 1,000 photos have no caption"),
        (changed(city(), "caption", {5: '{"a": 1}', 6: "x" * 401}),
         "2 of 1,000 photos have a caption that is hardly a sentence"),
        (changed(city(), "lat", {k: BOX.south + 0.001 + 1e-7 * k for k in range(1000)}),
         "90 of the 100 cells of the box hold no photo"),
        (changed(changed(city(), "lat", dict.fromkeys(range(0, 1000, 3), 43.72)), "lon",
                 dict.fromkeys(range(0, 1000, 3), 10.4)),
         "33 % of the photos (334 of 1,000) have exactly the same position"),
        (city(horizontal_error_m=35.0), "The median horizontal error is 35 m, of 1,000 photos"),
        (changed(city(), "owner", dict.fromkeys(range(600), "Zo\u00eb")),
         "One owner, Zo\u00eb, took 60 % of the photos (600 of 1,000)"),
        (changed(city(taken_at=None), "taken_at",
                 {0: "2024-05-06T07:00:00", 1: "2024-05-06T07:59:00"}),
         "All 2 photos that say when were taken within one hour"),
        (changed(city(taken_at=None), "taken_at",
                 {0: "2024-05-06T07:00:00", 1: "2024-05-06T19:59:00", 2: "when?"}),
         "All 2 photos that say when were taken within one day"),
        (changed(city(), "height", {7: 63}), "1 of 1,000 photos have a side shorter than 64"),
        (city(split="train"), "No photo is held out"),
        (city(split="val"), "Every photo is in the split val"),
        (changed(city(), "phash", {0: f"{1:016x}"}), "1 of 100 photos held out have a twin"),
        (changed(changed(changed(city(), "taken_at", {1: "2000-05-06T00:08:59"}),
                         "lat", {1: BOX.south + 0.02 / 97}), "lon", {1: BOX.west + 0.02 / 89}),
         "1 of 100 photos held out have a twin"),
        (changed(city(), "owner", {0: "a", 1: "b"}),
         "2 of 1,000 photos have an owner but no licence"),
    ],
)
def test_each_trouble_has_its_sentence(manifest: Manifest, sentence: str) -> None:
    assert any(sentence in found for found in troubles(manifest)), troubles(manifest)


def test_most_of_a_city_in_one_cell() -> None:
    """The cell in the south-west: 600 photos, and of the others those that lie there anyway."""
    here = changed(changed(city(), "lat", {k: 43.701 + 1e-7 * k for k in range(600)}), "lon",
                   {k: 10.381 for k in range(600)})
    [sentence] = troubles(here)
    count = int(re.search(r"\((\d+) of 1,000\) lie in one cell", sentence).group(1))
    assert 600 <= count < 630


# --- the report ------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Tags, what they refer to, and the texts."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_complete_by_itself(miniature_dataset: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(miniature_dataset, tmp_path / "dataset"))
    page, found = inspect(dataset)
    assert page == dataset / "inspect" / "report.html"
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.png"]
    parsed = Parsed(page)
    assert parsed.links and all(link.startswith("data:image/") for link in parsed.links)
    assert parsed.tags.count("img") == 36 + 4  # bearings; map, rose, months, hours
    assert all(sentence in parsed.words for sentence in found) and found
    assert "Miniature Tower of Pisa" in parsed.words and "not_an_image" in parsed.words
    with Image.open(page.with_name("report.png")) as sheet:
        assert sheet.width == 1300 and np.asarray(sheet.convert("L")).std() > 10
    bytes_before = [p.read_bytes() for p in sorted(page.parent.iterdir())]
    inspect(dataset)
    assert [p.read_bytes() for p in sorted(page.parent.iterdir())] == bytes_before


def test_a_box_has_a_map_of_places(city_dataset: Path, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(city_dataset, tmp_path / "dataset"))
    words = Parsed(inspect(dataset)[0]).words
    assert "box of 3.2 km (west to east) by 4.4 km" in words
    assert "A photo for each place, north above" in words and "a red church" in words


@pytest.mark.parametrize("manifest", [city(1), around([30.0]), city(40, file=None),
                                      around(AROUND, file=None, width=None, height=None)],
                         ids=["box of one", "landmark of one", "box of records", "records"])
def test_it_works_for_few_and_without_images(manifest: Manifest, tmp_path: Path) -> None:
    page, found = inspect(write(manifest, tmp_path / "d", images=0))
    assert found and page.is_file() and page.with_name("report.png").is_file()


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    odd = ["<script>alert(1)</script>", "$\\frac{1}{2$", "\u5f20\u4f1f \U0001f600", "a & b"]
    manifest = changed(city(40), "owner", {k: odd[k % 4] for k in range(40)})
    manifest = changed(manifest, "licence", {k: odd[0] for k in range(40)})
    manifest = changed(manifest, "caption", {0: odd[0]})
    page, _ = inspect(write(manifest, tmp_path / "<script>", images=3))
    parsed = Parsed(page)
    assert "script" not in parsed.tags
    assert all(name in parsed.words for name in odd)
    assert parsed.words.count(odd[0]) == 3


@pytest.mark.parametrize("manifest", [city(40), around(AROUND)], ids=["box", "landmark"])
def test_positions_stay_in_the_dataset(manifest: Manifest, tmp_path: Path) -> None:
    dataset = write(manifest, tmp_path / "d", images=2)
    there = tmp_path / "there"
    hidden, shown = Parsed(inspect(dataset, there)[0]), Parsed(inspect(dataset)[0])
    assert "Positions are not shown" in hidden.words and "Positions are not" not in shown.words
    # one drawing less: the map
    drawings = [sum("png" in link[:20] for link in page.links) for page in (hidden, shown)]
    assert drawings == [3, 4]
    assert "north above" not in hidden.words and "a red car" not in hidden.words
    if manifest.bounds:
        asked = inspect(dataset, there, with_positions=True)[0]
        assert asked.read_bytes() == (dataset / "inspect" / "report.html").read_bytes()
    for column in ("lat", "lon"):
        for value in manifest.rows.column(column).to_pylist():
            assert f"{value:.4f}" not in shown.words


def test_links_are_followed_to_where_the_report_will_lie(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "d", target_is_directory=True)
    (tmp_path / "d" / "out").symlink_to(tmp_path, target_is_directory=True)
    for folder, within in (("d", True), ("d/x/y", True), ("link/x", True), ("d2", False),
                           ("d/../x", False), ("d/out/x", False)):
        assert _is_within(tmp_path / folder, tmp_path / "d") is within, folder


def test_a_hundred_thousand_rows_take_seconds(tmp_path: Path) -> None:
    small = city(5000).rows.drop_columns(["id", "lat"])
    rng = np.random.default_rng(0)
    rows = pa.concat_tables([small] * 20)
    columns = {name: rows.column(name) if name in rows.schema.names else None
               for name in SCHEMA.names}
    columns |= {"id": [f"{k:016x}" for k in range(len(rows))],
                "lat": rng.uniform(BOX.south, BOX.north, len(rows))}
    big = Manifest(pa.table(columns, schema=SCHEMA), tmp_path, bounds=BOX)
    dataset = write(big, tmp_path / "d", images=50)
    began = time.monotonic()
    page, _ = inspect(dataset)
    assert time.monotonic() - began < 60
    assert "100,000" in Parsed(page).words and page.stat().st_size < 5e6


def test_the_verb_prints_the_troubles_and_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write(city(1), tmp_path / "d", images=1)
    out = str(tmp_path / "o")
    assert cli.main(["inspect", str(dataset), "--out", out, "--with-positions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"- {found}" for found in troubles(load_manifest(dataset))]
    assert lines[-1] == str(tmp_path / "o" / "report.html")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "is not a dataset folder" in capsys.readouterr().err
