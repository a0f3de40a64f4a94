"""Ingest: what EXIF says, what is rejected and counted, and that nothing else gets through."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from gps_guidance import geo
from gps_guidance.photos import reading
from gps_guidance.photos.exif import gps_of, read_gps
from gps_guidance.photos.images import difference_hash
from gps_guidance.photos.ingest import IngestSummary
from gps_guidance.photos.ingest import ingest as ingest_photos
from gps_guidance.photos.manifest import Rejected, load_manifest

CENTER = (43.722952, 10.396597)
Dms = tuple[Any, Any, Any]
NORTH_OF_PISA: tuple[str, Dms, str, Dms] = ("N", (43, 43, 24.0), "E", (10, 23, 48.0))


def gps_exif(lat_ref: Any, lat: Any, lon_ref: Any, lon: Any, **more: Any) -> Image.Exif:
    """EXIF with a GPS position; None leaves a tag out. ``more`` are tags of the main directory."""
    exif = Image.Exif()
    tags = {1: lat_ref, 2: lat, 3: lon_ref, 4: lon}
    exif.get_ifd(0x8825).update({tag: value for tag, value in tags.items() if value is not None})
    for name, value in more.items():
        exif[{"orientation": 0x0112, "taken_at": 0x0132, "artist": 0x013B}[name]] = value
    return exif


def pixels(width: int = 96, height: int = 72, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def take(path: Path, lat: float, lon: float, seed: int = 0, **options: Any) -> Path:
    """A photo taken at a position in decimal degrees."""
    exif = gps_exif("N" if lat >= 0 else "S", (abs(lat), 0, 0), "E" if lon >= 0 else "W",
                    (abs(lon), 0, 0))
    pixels(seed=seed).save(path, exif=exif, **options)
    return path


def take_around(folder: Path, bearings: list[float], distance_m: float = 80.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, bearing in enumerate(bearings):
        b = np.radians(bearing)
        at = geo.from_local_m((distance_m * np.sin(b), distance_m * np.cos(b)), CENTER)
        take(folder / f"{index:02d}.jpg", float(at[0]), float(at[1]), seed=index)


def ingest(sources: Path, out: Path, **options: Any) -> IngestSummary:
    return ingest_photos([sources], out, progress=False, **options)


def rejections(out: Path) -> dict[str, str]:
    rows = pq.read_table(out / "rejected.parquet").to_pylist()
    return {row["source"]: row["reason"] for row in rows}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }


# --- what EXIF says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lat_ref", "lon_ref", "lat", "lon"),
    [("N", "E", 43.5, 10.25), ("S", "W", -43.5, -10.25), ("N", "W", 43.5, -10.25),
     ("S", "E", -43.5, 10.25)],
)
def test_the_hemisphere_gives_the_sign(
    tmp_path: Path, lat_ref: str, lon_ref: str, lat: float, lon: float
) -> None:
    exif = gps_exif(lat_ref, (43, 30, 0), lon_ref, (10, 15, 0))
    pixels().save(tmp_path / "a.jpg", exif=exif)
    reading = read_gps(tmp_path / "a.jpg")
    assert (reading.lat, reading.lon) == (lat, lon)


def test_degrees_minutes_seconds_are_rationals(tmp_path: Path) -> None:
    """43 deg 43' 22.6272" N = 43 + 43/60 + 22.6272/3600 = 43.722952."""
    exif = gps_exif(
        "N", (IFDRational(43), IFDRational(43), IFDRational(226272, 10000)),
        "E", (IFDRational(10), IFDRational(237958, 10000), IFDRational(0)),
        taken_at="2024:05:06 07:08:09",
    )
    pixels().save(tmp_path / "a.jpg", exif=exif)
    reading = read_gps(tmp_path / "a.jpg")
    assert reading.lat == pytest.approx(43.722952, abs=1e-9)
    assert reading.lon == pytest.approx(10 + 23.7958 / 60, abs=1e-9)
    assert reading.taken_at == "2024-05-06T07:08:09"


@pytest.mark.parametrize(
    ("exif", "reason"),
    [
        (gps_exif(None, None, None, None), "no_gps"),
        (gps_exif("N", (43, 0, 0), None, None), "no_gps"),
        (gps_exif("N", (IFDRational(0, 0), 0, 0), "E", (10, 0, 0)), "bad_gps"),
        (gps_exif("N", (43, IFDRational(1, 0), 0), "E", (10, 0, 0)), "bad_gps"),
        (gps_exif(None, (43, 0, 0), "E", (10, 0, 0)), "bad_gps"),
        (gps_exif("X", (43, 0, 0), "E", (10, 0, 0)), "bad_gps"),
        (gps_exif("N", (43, 0, 0, 0), "E", (10, 0, 0)), "bad_gps"),
        (gps_exif("N", (0, 0, 0), "E", (0, 0, 0)), "null_island"),
        (gps_exif("N", (91, 0, 0), "E", (10, 0, 0)), "out_of_range"),
        (gps_exif("N", (43, 0, 0), "W", (180, 0, 1)), "out_of_range"),
    ],
    ids=["none", "lat alone", "0/0", "1/0", "no hemisphere", "hemisphere X", "four parts",
         "null island", "lat 91", "lon -180.0003"],
)
def test_a_bad_position_is_rejected_with_its_reason(
    tmp_path: Path, exif: Image.Exif, reason: str
) -> None:
    pixels().save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(ValueError, match=rf"a\.jpg: {reason}: "):
        read_gps(tmp_path / "a.jpg")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "north", None])
def test_a_position_that_is_no_number_is_rejected(value: Any) -> None:
    exif = gps_exif("N", (43, 0, 0), "E", (10, 0, 0))
    exif.get_ifd(0x8825)[2] = (value, 0, 0)
    with pytest.raises(Rejected, match="bad_gps"):
        gps_of(exif)


def test_only_a_true_heading_is_kept() -> None:
    exif = gps_exif(*NORTH_OF_PISA)
    ifd = exif.get_ifd(0x8825)
    assert gps_of(exif).heading_deg is None
    ifd.update({16: "T", 17: IFDRational(3705, 10), 31: IFDRational(45, 10)})
    reading = gps_of(exif)
    assert reading.heading_deg == pytest.approx(10.5)
    assert reading.horizontal_error_m == pytest.approx(4.5)
    ifd[16] = "M"
    assert gps_of(exif).heading_deg is None


# --- what is written -------------------------------------------------------------------------


@pytest.mark.parametrize(("orientation", "red_corner"),
                         [(1, "top left"), (3, "bottom right"), (6, "top right"),
                          (8, "bottom left"), (2, "top right"), (4, "bottom left")])
def test_photos_are_turned_upright(tmp_path: Path, orientation: int, red_corner: str) -> None:
    photo = Image.new("RGB", (96, 64), "white")
    photo.paste("red", (0, 0, 32, 32))
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in" / "a.png", exif=gps_exif(*NORTH_OF_PISA, orientation=orientation))
    ingest(tmp_path / "in", tmp_path / "out")
    [row] = load_manifest(tmp_path / "out").rows.to_pylist()
    with Image.open(tmp_path / "out" / row["file"]) as written:
        image = written.convert("RGB")
    assert (row["width"], row["height"]) == image.size
    assert image.size == ((64, 96) if orientation in (6, 8) else (96, 64))
    right, bottom = image.width - 9, image.height - 9
    corners = {"top left": (8, 8), "top right": (right, 8), "bottom left": (8, bottom),
               "bottom right": (right, bottom)}
    red = [name for name, at in corners.items() if image.getpixel(at)[1] < 128]  # type: ignore
    assert red == [red_corner]


def test_no_metadata_leaves_with_the_image(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    exif = gps_exif(*NORTH_OF_PISA, orientation=6, artist="A. Tourist")
    pixels().save(tmp_path / "in" / "a.jpg", exif=exif, comment=b"at home", dpi=(300, 300),
                  xmp=b"<x:xmpmeta>A. Tourist</x:xmpmeta>", icc_profile=b"a profile")
    ingest(tmp_path / "in", tmp_path / "out")
    [path] = (tmp_path / "out" / "images").iterdir()
    with Image.open(path) as image:
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    data = path.read_bytes()
    assert all(word not in data for word in (b"Exif", b"Tourist", b"home", b"a profile"))


def test_a_large_photo_is_shrunk_to_image_size(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pixels(300, 200).save(tmp_path / "in" / "a.jpg", exif=gps_exif(*NORTH_OF_PISA))
    for size in (150, 90):  # and a second run with another size does not keep the first's image
        ingest(tmp_path / "in", tmp_path / "out", image_size=size)
        [row] = load_manifest(tmp_path / "out").rows.to_pylist()
        assert (row["width"], row["height"]) == (size, size * 2 // 3)
        with Image.open(tmp_path / "out" / row["file"]) as image:
            assert image.size == (size, size * 2 // 3)


def test_the_columns_about_the_place_are_those_of_geo(tmp_path: Path) -> None:
    take_around(tmp_path / "in", [0.0, 94.0, 96.0, 181.0, 272.5, 356.0])
    summary = ingest(tmp_path / "in", tmp_path / "out", landmark="Tower", center=CENTER)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.landmark, manifest.center) == ("Tower", CENTER)
    rows = manifest.rows.to_pylist()
    for row in rows:
        here = (row["lat"], row["lon"])
        assert row["bearing_deg"] == float(geo.bearing_deg(here, CENTER))
        east, north = geo.local_m(here, CENTER)
        assert (row["east_m"], row["north_m"]) == (float(east), float(north))
        assert row["distance_m"] == pytest.approx(80.0, abs=1e-3)
    bearings = {row["source"]: (row["bearing_deg"], row["bin"]) for row in rows}
    for index, (bearing, bin_) in enumerate(
        [(0, 0), (94, 9), (96, 10), (181, 18), (272.5, 27), (356, 0)]
    ):
        found, at = bearings[f"{index:02d}.jpg"]
        assert abs(geo.angle_difference_deg(found, bearing)) < 1e-3
        assert at == bin_
    assert summary.bins is not None
    assert {k: int(n) for k, n in enumerate(summary.bins) if n} == {0: 2, 9: 1, 10: 1, 18: 1, 27: 1}
    assert len(summary.empty) == 31 and 90.0 not in summary.empty and 10.0 in summary.empty


def test_a_landmark_of_the_paper_is_known_by_name(tmp_path: Path) -> None:
    take_around(tmp_path / "in", [45.0])
    for name in ("pisa", "leaning tower of PISA"):
        ingest(tmp_path / "in", tmp_path / "out", landmark=name)
        about = json.loads((tmp_path / "out" / "dataset.json").read_text())
        assert about["landmark"] == "Leaning Tower of Pisa"
        assert tuple(about["center"]) == geo.LANDMARKS["pisa"].center


def test_an_unknown_landmark_needs_its_centre(tmp_path: Path) -> None:
    take_around(tmp_path / "in", [45.0])
    with pytest.raises(ValueError, match="'Big Ben'.*pisa.*--center LAT,LON"):
        ingest(tmp_path / "in", tmp_path / "out", landmark="Big Ben")
    with pytest.raises(ValueError, match="--landmark"):
        ingest(tmp_path / "in", tmp_path / "out", center=CENTER)
    with pytest.raises(ValueError, match="--landmark"):
        ingest(tmp_path / "in", tmp_path / "out", max_distance_m=100)


def test_distance_limits(tmp_path: Path) -> None:
    for distance in (10.0, 100.0, 1000.0):
        take_around(tmp_path / "in" / f"{distance:.0f}", [120.0], distance)
    ingest(tmp_path / "in", tmp_path / "out", landmark="pisa", min_distance_m=50,
           max_distance_m=500)
    [row] = load_manifest(tmp_path / "out").rows.to_pylist()
    assert row["distance_m"] == pytest.approx(100, abs=0.01)
    table = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert sorted(r["reason"] for r in table) == ["too_far", "too_near"]
    assert {r["detail"] for r in table} == {"10.0 m from the centre", "1000 m from the centre"}


def test_bounds_keep_what_is_inside_and_its_edge(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, lat, lon in (("in", 43.5, 10.5), ("edge", 43.0, 11.0), ("north", 44.5, 10.5),
                           ("swapped", 10.5, 43.5)):
        take(tmp_path / "in" / f"{name}.jpg", lat, lon, seed=len(name))
    ingest(tmp_path / "in", tmp_path / "out", bounds=geo.Bounds(43, 10, 44, 11))
    manifest = load_manifest(tmp_path / "out")
    assert sorted(row["source"] for row in manifest.rows.to_pylist()) == ["edge.jpg", "in.jpg"]
    assert manifest.center is None
    assert manifest.rows["bearing_deg"].null_count == 2
    assert rejections(tmp_path / "out") == {
        "north.jpg": "outside_bounds", "swapped.jpg": "outside_bounds"
    }


def test_the_split_depends_on_the_photo_alone(tmp_path: Path) -> None:
    take_around(tmp_path / "in", [9.0 * k for k in range(40)])
    options = {"landmark": "pisa", "val_fraction": 0.25, "split_by": "photo"}
    ingest(tmp_path / "in", tmp_path / "out", **options)
    rows = load_manifest(tmp_path / "out").rows.to_pylist()
    for row in rows:
        val = int(hashlib.sha256(row["id"].encode()).hexdigest()[:8], 16) / 2**32 < 0.25
        assert row["split"] == ("val" if val else "train")
    assert 3 <= sum(row["split"] == "val" for row in rows) <= 18  # binomial, beyond 99.9 %
    take_around(tmp_path / "more", [9.0 * k for k in range(20)])
    ingest(tmp_path / "more", tmp_path / "half", **options)
    before = {row["id"]: row["split"] for row in rows}
    for row in load_manifest(tmp_path / "half").rows.to_pylist():
        assert before[row["id"]] == row["split"]


def test_the_perceptual_hash_survives_recompression() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 252, 4, dtype=np.uint8), (63, 1)))
    assert difference_hash(ramp) == "f" * 16
    assert difference_hash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == "0" * 16
    buffer = io.BytesIO()
    ramp.save(buffer, "JPEG", quality=60)
    with Image.open(buffer) as again:
        assert difference_hash(again) == "f" * 16


# --- what is rejected ------------------------------------------------------------------------


def spoil(folder: Path) -> dict[str, str]:
    """One good photo and one of every kind that cannot be used; returns their reasons."""
    folder.mkdir()
    good = take(folder / "a-good.jpg", *CENTER, seed=1).read_bytes()
    (folder / "b-copy.JPG").write_bytes(good)
    (folder / "c-cut.jpg").write_bytes(take(folder / "c-cut.jpg", *CENTER).read_bytes()[:3000])
    Image.new("L", (12000, 9000)).save(folder / "d-bomb.png", exif=gps_exif(*NORTH_OF_PISA))
    pixels(200, 63).save(folder / "e-small.jpg", exif=gps_exif(*NORTH_OF_PISA))
    (folder / "f-notes.txt").write_text("positions")
    (folder / "g-text.jpg").write_text("no image at all")
    (folder / "h-empty.jpg").write_bytes(b"")
    pixels().save(folder / "i-none.jpg")
    wild = bytearray(take(folder / "j-wild.jpg", *CENTER, seed=9).read_bytes())
    start = wild.index(b"Exif\0\0")
    wild[start + 14 : start + 40] = b"\xff" * 26
    (folder / "j-wild.jpg").write_bytes(bytes(wild))
    (folder / "k-no-suffix").write_bytes(good)
    (folder / ".hidden.jpg").write_bytes(good)
    return {
        "b-copy.JPG": "duplicate", "c-cut.jpg": "truncated", "d-bomb.png": "too_large",
        "e-small.jpg": "too_small", "f-notes.txt": "not_an_image", "g-text.jpg": "unreadable",
        "h-empty.jpg": "unreadable", "i-none.jpg": "no_gps", "j-wild.jpg": "no_gps",
        "k-no-suffix": "not_an_image",
    }


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_no_bad_file_ends_a_run_and_each_is_counted(tmp_path: Path) -> None:
    reasons = spoil(tmp_path / "in")
    summary = ingest(tmp_path / "in", tmp_path / "out", landmark="pisa")
    assert summary.kept == 1
    assert rejections(tmp_path / "out") == reasons
    assert sum(summary.rejected.values()) == len(reasons)
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert about["rejected"] == dict(summary.rejected)
    [row] = load_manifest(tmp_path / "out").rows.to_pylist()
    assert row["source"] == "a-good.jpg"
    data = (tmp_path / "in" / "a-good.jpg").read_bytes()
    assert row["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_every_cut_and_every_flipped_byte_is_survived(tmp_path: Path) -> None:
    """Damage anywhere in the header gives a photo or a counted rejection, never an exception."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    exif = gps_exif(*NORTH_OF_PISA, orientation=6, artist="A. Tourist",
                    taken_at="2024:05:06 07:08:09")
    for kind in ("jpg", "webp", "png", "tif"):
        pixels(70, 66).save(tmp_path / f"whole.{kind}", exif=exif)
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        for index in range(60):
            data = bytearray(whole[: rng.integers(len(whole))] if index % 4 == 0 else whole)
            for _ in range(1 + index % 6):
                data[rng.integers(min(len(data), 600))] = rng.integers(256)
            (tmp_path / "in" / f"{index:02d}.{kind}").write_bytes(bytes(data))
    (tmp_path / "in" / "whole.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes())
    summary = ingest(tmp_path / "in", tmp_path / "out")
    assert summary.kept + sum(summary.rejected.values()) == 4 * 60 + 1


def test_without_a_usable_photo_the_error_names_folder_count_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(3):
        pixels(seed=index).save(tmp_path / "in" / f"{index}.jpg")
    message = rf"{tmp_path / 'in'}.*3 x no_gps.*originals"
    with pytest.raises(ValueError, match=message):
        ingest(tmp_path / "in", tmp_path / "out", landmark="pisa")
    assert len(rejections(tmp_path / "out")) == 3
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    take_around(tmp_path / "far", [0.0], 5000)
    with pytest.raises(ValueError, match="1 x too_far.*--max-distance"):
        ingest(tmp_path / "far", tmp_path / "out", landmark="pisa", max_distance_m=100)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        ingest(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="no file or folder .*nowhere"):
        ingest(tmp_path / "nowhere", tmp_path / "out")


# --- runs ------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    take_around(tmp_path / "in", [10.0, 200.0, 300.0])
    (tmp_path / "in" / "bad.jpg").write_bytes(b"")
    for name in ("a", "b"):
        ingest(tmp_path / "in", tmp_path / name, landmark="pisa", val_fraction=0.3)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert len(first) == 7
    ingest(tmp_path / "in", tmp_path / "a", landmark="pisa", val_fraction=0.3)
    assert contents(tmp_path / "a") == first


def test_an_output_folder_within_the_source_is_not_a_source(tmp_path: Path) -> None:
    take_around(tmp_path, [10.0, 200.0])
    out = tmp_path / "dataset"
    ingest(tmp_path, out, landmark="pisa")
    first = contents(out)
    ingest(tmp_path, out, landmark="pisa")
    assert contents(out) == first
    assert rejections(out) == {}


def test_an_interrupted_ingest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_around(tmp_path / "in", [30.0 * k for k in range(6)])
    ingest(tmp_path / "in", tmp_path / "whole", landmark="pisa")
    encode, calls = reading.write_whole, []

    def stop_at_the_fourth(path: Path, data: bytes) -> None:
        calls.append(path.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        encode(path, data)

    monkeypatch.setattr(reading, "write_whole", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path / "in", tmp_path / "out", landmark="pisa")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3
    ingest(tmp_path / "in", tmp_path / "out", landmark="pisa")
    written_again = [name for name in calls[4:] if name in calls[:3]]
    assert written_again == []
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    take_around(tmp_path / "in", [0.0, 90.0])
    write, sizes = Path.write_bytes, []

    def fill_the_disk(path: Path, data: bytes) -> int:
        if sizes:
            write(path, data[:100])
            raise OSError(number, "No space left on device")
        sizes.append(len(data))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(ValueError, match=r"disk is full: .*images.*needs \d+ more bytes"):
        ingest(tmp_path / "in", tmp_path / "out", landmark="pisa")
    [image, journal] = contents(tmp_path / "out").items()
    assert image[0].startswith("images/") and len(image[1]) == sizes[0]
    assert journal[0] == "journal.jsonl" and journal[1].count(b"\n") == 2


def test_another_error_of_the_disk_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_around(tmp_path / "in", [0.0])

    def fail(path: Path, data: bytes) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="Read-only"):
        ingest(tmp_path / "in", tmp_path / "out", landmark="pisa")


def test_a_manifest_of_another_version_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a dataset folder.*gps-guidance ingest"):
        load_manifest(tmp_path)
    take_around(tmp_path / "in", [0.0])
    ingest(tmp_path / "in", tmp_path / "out", landmark="pisa")
    path = tmp_path / "out" / "dataset.json"
    path.write_text(path.read_text().replace('"version": "1"', '"version": "9"'))
    with pytest.raises(ValueError, match="version 9.*reads 1"):
        load_manifest(tmp_path / "out")


def test_photos_do_not_need_torch() -> None:
    code = "import sys, gps_guidance.photos; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "False"
