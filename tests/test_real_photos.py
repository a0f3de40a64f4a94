"""Ingest of real photos, in the folder that GPS_GUIDANCE_PHOTOS names."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from gps_guidance import geo
from gps_guidance.photos.ingest import ingest
from gps_guidance.photos.manifest import load_manifest


def test_all_photos_of_the_sakharov_monument_enter(real_photos: Path, tmp_path: Path) -> None:
    center = (59.940900, 30.296600)
    summary = ingest([real_photos / "sakharov"], tmp_path / "out", landmark="Sakharov monument",
                     center=center)
    assert summary.kept == 32
    assert dict(summary.rejected) == {"not_an_image": 1}  # positions.csv
    rows = {row["source"]: row
            for row in load_manifest(tmp_path / "out").rows.to_pylist()}
    assert {int(row["bearing_deg"] // 30) for row in rows.values()} == set(range(12))
    with open(real_photos / "sakharov" / "positions.csv", newline="") as file:
        for known in csv.DictReader(file):
            row = rows[known["file"]]
            off = geo.angle_difference_deg(row["bearing_deg"], float(known["bearing_deg"]))
            assert abs(off) < 0.1
            assert row["distance_m"] == pytest.approx(float(known["radius_m"]), rel=5e-3)
            with Image.open(tmp_path / "out" / row["file"]) as image:
                assert not image.getexif()


def test_edge_cases_of_real_cameras(real_photos: Path, tmp_path: Path) -> None:
    """Six have GPS; the malformed and corrupted ones, the four portraits and the HEIC have none."""
    ingest([real_photos / "exif-edge"], tmp_path / "out")
    rows = {row["source"]: row
            for row in load_manifest(tmp_path / "out").rows.to_pylist()}
    assert sorted(rows) == [f"DSCN{n:04d}.jpg" for n in (10, 12, 21, 25, 27, 29)]
    first = rows["DSCN0010.jpg"]  # 43 deg 28' 2.814" N, 11 deg 53' 6.45599999" E
    assert first["lat"] == pytest.approx(43 + 28 / 60 + 2.814 / 3600, abs=1e-9)
    assert first["lon"] == pytest.approx(11 + 53 / 60 + 6.45599999 / 3600, abs=1e-9)
    assert first["taken_at"] == "2008-10-22T16:28:39"
    small = {f"image0{n}.jpg": "too_small" for n in (1551, 1713, 1980)}
    none = {f"image0{n}.jpg": "no_gps" for n in ("0971", 1088, 1137, 2206)}
    none |= {name: "no_gps" for name in
             ["corrupted.jpg", "iphone_13_pro_max.HEIC",
              *(f"portrait_{n}.jpg" for n in (1, 3, 6, 8))]}
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert {row["source"]: row["reason"] for row in rejected} == small | none


def test_a_heic_without_position_gets_it_from_a_table(real_photos: Path, tmp_path: Path) -> None:
    path = real_photos / "exif-edge" / "iphone_13_pro_max.HEIC"
    (tmp_path / "places.csv").write_text(f"file,lat,lon\n{path},43.7,10.4\n")
    ingest([tmp_path / "places.csv"], tmp_path / "out", landmark="pisa")
    [row] = load_manifest(tmp_path / "out").rows.to_pylist()
    with Image.open(tmp_path / "out" / row["file"]) as image:
        assert image.size == (row["width"], row["height"]) and max(image.size) == 768
        assert min(band[1] - band[0] for band in image.getextrema()) > 100, "a flat picture"


def test_a_walk_in_lund_lies_in_lund(real_photos: Path, tmp_path: Path) -> None:
    summary = ingest([real_photos / "lund"], tmp_path / "out",
                     bounds=geo.Bounds(55.68, 13.15, 55.74, 13.25))
    assert (summary.kept, dict(summary.rejected), summary.bins) == (29, {}, None)
