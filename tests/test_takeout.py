"""Folders as sources: each file is a record, and Google Takeout's sidecars give what they know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_sources import PISA, positions, read, write

from gps_guidance.photos.sources import RECORD


def test_every_file_of_a_folder_is_a_record(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/c.JPG", "b.json", "notes.txt", ".hidden.jpg"):
        write(tmp_path / "in" / name, "{}")
    rows = read(tmp_path / "in", batch_size=3)
    assert [row["source"] for row in rows] == ["c.JPG", "b.jpg", "b.json", "notes.txt"]
    assert rows[0]["path"] == str(tmp_path / "in" / "a" / "c.JPG")
    assert all(row[key] is None for row in rows for key in RECORD.names[2:])
    assert read(tmp_path / "in" / "b.jpg") == rows[1:2]


LONG = "123456789012345678901234567890123456789012345"  # 45 characters
EMOJI = "😀" * 25  # of two UTF-16 units each


@pytest.mark.parametrize(("photo", "sidecar"), [
    ("IMG_1.jpg", "IMG_1.jpg.json"), ("IMG_1.jpg", "IMG_1.json"),
    ("IMG_1.jpg", "IMG_1.jpg.supplemental-metadata.json"), ("IMG_1.jpg", "IMG_1.jpg.suppl.json"),
    ("IMG_1.jpg", "IMG_1.jpg.s.json"), ("IMG_1(1).jpg", "IMG_1.jpg(1).json"),
    ("IMG_1(1).jpg", "IMG_1(1).jpg.json"),
    ("IMG_1(12).jpg", "IMG_1.jpg.supplemental-metadata(12).json"),
    ("IMG_1-edited.jpg", "IMG_1.jpg.json"), ("IMG_1-edited(1).jpg", "IMG_1.jpg(1).json"),
    ("IMG_1-bearbeitet.jpg", "IMG_1.jpg.supplemental-meta.json"),
    (f"{LONG}67.jpg", f"{LONG}6.json"), (f"{LONG}.jpg", f"{LONG}..json"),
    (f"{LONG}6(3).jpg", f"{LONG}6(3).json"), (f"{EMOJI}.jpg", f"{'😀' * 23}.json"),
])
def test_a_sidecar_of_takeout_gives_its_photo_the_position(
    tmp_path: Path, photo: str, sidecar: str
) -> None:
    write(tmp_path / photo, "")
    about = {"title": photo, "description": "At  the\ntower", "photoTakenTime": {"timestamp": "1"},
             "geoData": {"latitude": 43.72, "longitude": 10.39, "altitude": 0.0}}
    write(tmp_path / sidecar, json.dumps(about))
    [row] = read(tmp_path)
    assert positions([row]) == [PISA]
    assert (row["source"], row["caption"], row["taken_at"]) == (photo, "At the tower", None)


@pytest.mark.parametrize(("photo", "other"), [
    ("IMG_1.jpg", "IMG_1.jpg(1).json"), ("IMG_1(1).jpg", "IMG_1.jpg.json"),
    ("IMG_12.jpg", "IMG_1.json"), (f"{LONG}6.jpg", f"{LONG}.j.json"),
])
def test_anothers_sidecar_is_not_taken(tmp_path: Path, photo: str, other: str) -> None:
    write(tmp_path / photo, "")
    write(tmp_path / other, json.dumps({"geoData": {"latitude": 1.0, "longitude": 2.0}}))
    rows = read(tmp_path)
    assert {row["source"] for row in rows} == {photo, other}
    assert positions(rows) == [(None, None)] * 2


@pytest.mark.parametrize(("geo", "expected"), [
    ({"geoData": {"latitude": 1.0, "longitude": 2.0}, "geoDataExif": {"latitude": 3.0,
      "longitude": 4.0}}, (1.0, 2.0)),
    ({"geoData": {"latitude": 0.0, "longitude": 0.0}, "geoDataExif": {"latitude": 3.0,
      "longitude": 4.0}}, (3.0, 4.0)),
    ({"geoData": {"latitude": 0.0, "longitude": 0.0}}, (None, None)),
    ({"photoTakenTime": {}, "geoData": "x"}, (None, None)),
])
def test_what_google_photos_shows_counts_before_the_camera(
    tmp_path: Path, geo: Any, expected: Any
) -> None:
    write(tmp_path / "a.jpg", "")
    write(tmp_path / "a.jpg.json", json.dumps(geo))
    assert positions(read(tmp_path)) == [expected]


def test_an_edited_copy_shares_the_sidecar(tmp_path: Path) -> None:
    for name in ("a.jpg", "a-edited.jpg"):
        write(tmp_path / name, "")
    write(tmp_path / "a.jpg.json", json.dumps({"geoData": {"latitude": 1.0, "longitude": 2.0}}))
    assert positions(read(tmp_path)) == [(1.0, 2.0)] * 2
