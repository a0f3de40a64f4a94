"""Ingest as a whole: many kinds of sources, many processes, kills, parts, rules, takedowns."""

from __future__ import annotations

import csv
import functools
import hashlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_photos import CENTER, contents, gps_exif, pixels, rejections, take, take_around

from gps_guidance import cli, geo
from gps_guidance.photos import reading
from gps_guidance.photos.exif import read_gps
from gps_guidance.photos.ingest import ingest
from gps_guidance.photos.manifest import load_manifest
from gps_guidance.photos.privacy import take_down
from gps_guidance.photos.sources import RECORD

BOX = geo.Bounds(43.70, 10.37, 43.75, 10.42)
COLUMNS = ("file", "lat", "lon", "owner", "licence", "caption")


def table(folder: Path, rows: list[dict[str, Any]], name: str = "photos.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def at(east: float, north: float) -> dict[str, float]:
    lat, lon = geo.from_local_m((east, north), CENTER)
    return {"lat": float(lat), "lon": float(lon)}


def rows_of(out: Path) -> list[dict[str, Any]]:
    return load_manifest(out).rows.to_pylist()


def album(folder: Path, count: int) -> Path:
    """Photos all around the tower, and among them one of nearly every kind that is left out."""
    take_around(folder, [float(b) for b in np.linspace(0, 350, count)])
    (folder / "notes.txt").write_text("a")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photo")
    (folder / "cut.jpg").write_bytes((folder / "00.jpg").read_bytes()[:-2000])
    (folder / "same.jpg").write_bytes((folder / "01.jpg").read_bytes())
    take(folder / "far.jpg", 44.7, 10.4, seed=99)
    pixels(seed=98).save(folder / "silent.jpg")
    pixels(20, 20).save(folder / "small.jpg", exif=gps_exif("N", (43.7, 0, 0), "E", (10.4, 0, 0)))
    return folder


# --- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("packet", [
    '<d exif:GPSLatitude="43,43,22.6272N" exif:GPSLongitude="10,23.79582W"/>',
    "<d><exif:GPSLatitude>43,43,22.6272N</exif:GPSLatitude>"
    "<exif:GPSLongitude>10,23.79582W</exif:GPSLongitude></d>",
    '<d exif:GPSLatitude = "43.722952" exif:GPSLongitude = "-10.396597"/>',
])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_position_in_xmp_alone(tmp_path: Path, packet: str, suffix: str) -> None:
    """43 deg 43' 22.6272" = 43.722952 deg; 10 deg 23.79582' = 10.396597 deg, to the west."""
    path = tmp_path / f"a{suffix}"
    options: dict[str, Any] = {"xmp": packet.encode()}
    if suffix == ".png":
        from PIL.PngImagePlugin import PngInfo

        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", packet)
    if suffix == ".tif":
        options = {"tiffinfo": {700: packet.encode()}}
    pixels().save(path, **options)
    reading_ = read_gps(path)
    assert (reading_.lat, reading_.lon) == pytest.approx((43.722952, -10.396597), abs=1e-7)


def test_what_the_table_says_counts_before_the_photo(tmp_path: Path) -> None:
    take(tmp_path / "in" / "a.jpg" if (tmp_path / "in").mkdir() is None else tmp_path, 43.71, 10.39)
    source = table(tmp_path / "in", [
        {"file": "a.jpg", **at(30, 40), "owner": "ann", "licence": "CC BY 4.0", "caption": "a dog"},
    ])
    ingest([source], tmp_path / "out", landmark="pisa", progress=False)
    [row] = rows_of(tmp_path / "out")
    assert row["distance_m"] == pytest.approx(50, abs=1e-3)
    assert (row["owner"], row["licence"], row["caption"]) == ("ann", "CC BY 4.0", "a dog")
    assert (tmp_path / "out" / row["file"]).is_file()


def test_a_row_without_position_takes_that_of_its_photo(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    take(tmp_path / "in" / "a.jpg", 43.7225, 10.3962)
    source = table(tmp_path / "in", [{"file": "a.jpg", "lat": "", "lon": "", "owner": "ann"}])
    ingest([source], tmp_path / "out", landmark="pisa", progress=False)
    [row] = rows_of(tmp_path / "out")
    assert (row["lat"], row["owner"]) == (pytest.approx(43.7225), "ann")


def test_records_alone_are_cleaned_without_any_image(tmp_path: Path) -> None:
    source = table(tmp_path, [
        {"url": "https://example.org/1.jpg", **at(30, 40)},
        {"url": "https://example.org/2.jpg", **at(0, 5000)},
        {"url": "https://example.org/1.jpg", **at(30, 40)},
        {"url": "https://example.org/3.jpg", "lat": "", "lon": ""},
        {"url": "https://example.org/4.jpg", "lat": 0, "lon": 0},
    ])
    summary = ingest([source], tmp_path / "out", landmark="pisa", max_distance_m=200,
                     records_only=True, progress=False)
    [row] = rows_of(tmp_path / "out")
    assert (row["file"], row["sha256"], row["url"]) == (None, None, "https://example.org/1.jpg")
    assert row["id"] == hashlib.sha256(b"https://example.org/1.jpg").hexdigest()[:16]
    assert row["bearing_deg"] == pytest.approx(np.degrees(np.arctan2(30, 40)), abs=1e-3)
    assert dict(summary.rejected) == {
        "too_far": 1, "duplicate": 1, "no_gps": 1, "null_island": 1,
    }


class _Files(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server of ``tmp_path / "web"``."""
    (tmp_path / "web").mkdir()
    _Files.asked.clear()
    handler = functools.partial(_Files, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_addresses_are_downloaded_once(tmp_path: Path, web: str) -> None:
    for k in range(3):
        pixels(seed=k).save(tmp_path / "web" / f"{k}.jpg")
    urls = [f"{web}/{k}.jpg" for k in (0, 1, 2, 7)]
    rows = [{"url": url, **at(30 + k, 40)} for k, url in enumerate([*urls, urls[0]])]
    source, out = table(tmp_path / "in", rows), tmp_path / "out"
    ingest([source], out, landmark="pisa", progress=False)
    assert [row["url"] for row in sorted(rows_of(out), key=lambda r: r["url"])] == urls[:3]
    assert sorted(rejections(out).values()) == ["duplicate", "not_downloaded"]
    assert not (out / "downloads").exists()
    before, whole = len(_Files.asked), contents(out)
    pixels(seed=7).save(tmp_path / "web" / "7.jpg")
    ingest([source], out, landmark="pisa", progress=False)
    assert _Files.asked[before:] == ["/7.jpg"], "only what failed is asked for again"
    assert len(rows_of(out)) == 4 and set(whole) < set(contents(out))


# --- many processes, kills, parts --------------------------------------------------------------


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    album(tmp_path / "in", 30)
    for processes in (1, 2):
        ingest([tmp_path / "in"], tmp_path / str(processes), landmark="pisa", max_distance_m=500,
               processes=processes, progress=False)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert set(rejections(tmp_path / "1").values()) == {
        "not_an_image", "unreadable", "truncated", "duplicate", "too_far", "no_gps", "too_small",
    }


def test_a_decoder_that_crashes_costs_one_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that reads this photo dies: its file name makes a .pth-like hook kill it."""
    album(tmp_path / "in", 30)
    take(tmp_path / "in" / "deadly.jpg", 43.7225, 10.3962, seed=77)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "read = pathlib.Path.read_bytes\n"
        "def deadly(path):\n"
        "    if path.name == 'deadly.jpg':\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return read(path)\n"
        "pathlib.Path.read_bytes = deadly\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"), prepend=":")
    ingest([tmp_path / "in"], tmp_path / "out", landmark="pisa", processes=2, progress=False)
    assert rejections(tmp_path / "out")["deadly.jpg"] == "unreadable"
    assert len(rows_of(tmp_path / "out")) == 31  # the album's 30 and far.jpg


def test_killed_at_twenty_moments_and_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL in four series of five, each when a random number of images is there, or all; after
    each series the next run ends as if undisturbed."""
    album(tmp_path / "in", 150)
    moments = random.Random(0)

    def command(out: Path, processes: int) -> list[str]:
        return [sys.executable, "-m", "gps_guidance.cli", "ingest", str(tmp_path / "in"),
                "--landmark", "pisa", "--out", str(out), "--processes", str(processes)]

    subprocess.run(command(tmp_path / "whole", 1), check=True, capture_output=True)
    killed = 0
    for series in range(4):
        out, processes = tmp_path / f"killed-{series}", 1 + series % 2
        images = out / "images"
        images.mkdir(parents=True)
        for enough in [*sorted(moments.sample(range(1, 145), 4)), 150]:
            run = subprocess.Popen(command(out, processes), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
            while run.poll() is None and len(os.listdir(images)) < enough:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.02))
            run.kill()
            killed += run.wait() == -signal.SIGKILL
            with pytest.raises(ProcessLookupError):  # no worker outlives its parent
                for _ in range(2000):
                    os.killpg(run.pid, 0)
                    time.sleep(0.01)
        subprocess.run(command(out, processes), check=True, capture_output=True)
        assert contents(out) == contents(tmp_path / "whole")
    assert killed >= 16, "most runs were to be killed before their end"


def test_parts_of_several_machines_merge_into_the_whole(tmp_path: Path) -> None:
    album(tmp_path / "in", 24)
    options: dict[str, Any] = {"landmark": "pisa", "max_distance_m": 500, "progress": False}
    ingest([tmp_path / "in"], tmp_path / "whole", **options)
    parts = [tmp_path / f"part-{k}" for k in (1, 2, 3)]
    for k, folder in enumerate(parts, 1):
        ingest([tmp_path / "in"], folder, part=(k, 3), **options)
        assert 0 < len(rows_of(folder)) < 24
    ingest(parts, tmp_path / "merged", **options)
    whole, merged = contents(tmp_path / "whole"), contents(tmp_path / "merged")
    del whole["journal.jsonl"]
    assert merged == whole


def test_a_merged_dataset_can_have_another_centre(tmp_path: Path) -> None:
    take_around(tmp_path / "in", [0.0, 90.0])
    ingest([tmp_path / "in"], tmp_path / "one", landmark="pisa", progress=False)
    ingest([tmp_path / "one"], tmp_path / "two", landmark="other", center=(43.73, 10.396597),
           progress=False)
    assert all(90 < row["bearing_deg"] < 270 for row in rows_of(tmp_path / "two"))


# --- rules -------------------------------------------------------------------------------------


def test_the_same_picture_again_is_left_out_unless_it_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((640, 480))
    exif = gps_exif("N", (43.7225, 0, 0), "E", (10.3962, 0, 0))
    photo.save(tmp_path / "in" / "a.jpg", exif=exif, quality=90)
    photo.resize((320, 240)).save(tmp_path / "in" / "b.jpg", exif=exif, quality=70)
    ingest([tmp_path / "in"], tmp_path / "out", landmark="pisa", progress=False)
    assert rejections(tmp_path / "out") == {"b.jpg": "near_duplicate"}
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1
    ingest([tmp_path / "in"], tmp_path / "out", landmark="pisa", keep_near_duplicates=True,
           progress=False)
    assert len(rows_of(tmp_path / "out")) == 2
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def crowd(folder: Path) -> Path:
    """Records of three owners in one cell, one of them with a burst, and a lonely one far off."""
    rows = [{"url": f"https://example.org/a{k}.jpg", **at(1, 1), "owner": "ann"} for k in range(9)]
    rows += [{"url": "https://example.org/b.jpg", **at(1, 2), "owner": "bob"},
             {"url": "https://example.org/c.jpg", **at(2, 1), "owner": "cem"},
             {"url": "https://example.org/h.jpg", **at(1500, 0), "owner": "ann"}]
    return table(folder, rows)


def test_bursts_and_lonely_places(tmp_path: Path) -> None:
    summary = ingest([crowd(tmp_path)], tmp_path / "out", bounds=BOX, records_only=True,
                     max_per_owner=2, min_owners_per_cell=3, progress=False)
    assert dict(summary.rejected) == {"owner_limit": 7, "few_owners": 1}
    assert sorted(row["owner"] for row in rows_of(tmp_path / "out")) == ["ann", "ann", "bob", "cem"]


def test_exact_positions_stay_nowhere_when_they_are_blurred(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    take(tmp_path / "in" / "a.jpg", 43.722512, 10.396213)
    take(tmp_path / "in" / "b.jpg", 43.912345, 10.412345, seed=1)
    out = tmp_path / "out"
    ingest([tmp_path / "in"], out, bounds=BOX, blur_m=50, progress=False)
    [row] = rows_of(out)
    moved = geo.distance_m((row["lat"], row["lon"]), (43.722512, 10.396213))
    assert 1 < moved <= row["horizontal_error_m"] == pytest.approx(50 / np.sqrt(2))
    assert rejections(out) == {"b.jpg": "outside_bounds"}
    for name, data in contents(out).items():
        assert not any(digits in data for digits in (b"43.7225", b"10.3962", b"43.9123")), name
    assert not (out / "journal.jsonl").exists()


def test_an_outline_is_followed_more_closely_than_its_box(tmp_path: Path) -> None:
    triangle = [[10.37, 43.70], [10.42, 43.70], [10.37, 43.75], [10.37, 43.70]]
    (tmp_path / "area.geojson").write_text(
        json.dumps({"type": "Polygon", "coordinates": [triangle]}))
    source = table(tmp_path, [
        {"url": "https://example.org/in.jpg", "lat": 43.71, "lon": 10.38},
        {"url": "https://example.org/out.jpg", "lat": 43.74, "lon": 10.41},
    ])
    ingest([source], tmp_path / "out", bounds=tmp_path / "area.geojson", records_only=True,
           progress=False)
    [row] = rows_of(tmp_path / "out")
    assert row["url"].endswith("in.jpg")
    assert load_manifest(tmp_path / "out").bounds == geo.Bounds(43.70, 10.37, 43.75, 10.42)


@pytest.mark.parametrize(("options", "message"), [
    ({"split_by": "street"}, "split_by is 'street'"), ({"cell_m": 0}, "cell_m is 0"),
    ({"part": (3, 2)}, "part is 3/2"),
])
def test_wrong_options_are_named_before_any_work(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ingest([tmp_path / "nothing"], tmp_path / "out", landmark="pisa", **options)
    assert not (tmp_path / "out").exists()


# --- shards and takedown -----------------------------------------------------------------------


def test_shards_hold_every_photo_once(tmp_path: Path) -> None:
    take_around(tmp_path / "in", [15.0 * k for k in range(24)])
    out = tmp_path / "out"
    ingest([tmp_path / "in"], out, landmark="pisa", val_fraction=0.3, split_by="photo",
           shard_mb=0.04, progress=False)
    shards = sorted((out / "shards").glob("*.tar"))
    assert len(shards) > 3
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            assert names[::2] == [name.replace(".json", ".jpg") for name in names[1::2]]
            for name in names[::2]:
                row = json.load(tar.extractfile(name.replace(".jpg", ".json")))  # type: ignore[arg-type]
                assert shard.name.startswith(row["split"] + "-")
                found[row["id"]] = tar.extractfile(name).read()  # type: ignore[union-attr]
    assert found == {row["id"]: (out / row["file"]).read_bytes() for row in rows_of(out)}


def test_an_owner_is_taken_down_for_good(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = []
    for k, owner in enumerate(["ann", "bob", "ann", None]):
        pixels(seed=k).save(tmp_path / "in" / f"{k}.jpg")
        rows.append({"file": f"{k}.jpg", **at(10 * k, 40), "owner": owner or ""})
    source, out = table(tmp_path / "in", rows), tmp_path / "out"
    ingest([source], out, landmark="pisa", shard_mb=50, progress=False)
    mine = [row["id"] for row in rows_of(out) if row["owner"] == "ann"]
    (out / "masks").mkdir()
    (out / "masks" / f"{mine[0]}.png").write_bytes(b"mask")
    assert cli.main(["takedown", str(out), "ann"]) == 0
    assert {row["owner"] for row in rows_of(out)} == {"bob", None}
    assert json.loads((out / "dataset.json").read_text())["kept"] == 2
    for name, data in contents(out).items():
        assert not any(key in name or key.encode() in data for key in mine), name
        assert b'"ann"' not in data and b'\\"ann\\"' not in data, name
    ingest([source], out, landmark="pisa", progress=False)
    assert sorted(rejections(out).values()) == ["taken_down", "taken_down"]
    assert len(list((out / "images").iterdir())) == 2


def test_a_folder_of_one_owner_is_not_emptied(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest([table(tmp_path, [{"url": "https://example.org/1.jpg", **at(3, 4), "owner": "ann"}])],
           out, landmark="pisa", records_only=True, progress=False)
    before = contents(out)
    with pytest.raises(ValueError, match="delete the folder"):
        take_down(out, ["ann"])
    assert contents(out) == before


def test_a_photo_keeps_its_bytes_when_it_is_read_by_hand(tmp_path: Path) -> None:
    """``read_photo`` on a large photo: stored at the size asked for, hashed as it came."""
    (tmp_path / "images").mkdir()
    path = take(tmp_path / "a.jpg", 43.7225, 10.3962)
    large = Image.open(path).resize((2000, 1500))
    large.save(path, exif=Image.open(path).getexif())
    record = dict.fromkeys(RECORD.names) | {"path": str(path)}
    row = reading.read_photo(record, tmp_path, reading.Wanted(image_size=256))
    assert (row["width"], row["height"]) == (256, 192)
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    stored = Image.open(io.BytesIO((tmp_path / row["file"]).read_bytes()))
    exact = large.resize((256, 192), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(stored, float) - np.asarray(exact, float)).mean() < 12
