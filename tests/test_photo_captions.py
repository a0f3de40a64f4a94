"""Captions of photos: what a person wrote, not what a camera writes by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from test_photos import CENTER, NORTH_OF_PISA, gps_exif, ingest, pixels, take

from gps_guidance.photos.exif import caption_of
from gps_guidance.photos.manifest import load_manifest


@pytest.mark.parametrize(
    ("description", "caption"),
    [
        ("A red car in the rain", "A red car in the rain"),
        ("  two\r\nlines\tand  a tab ", "two lines and a tab"),
        ("Caf\u00e9 \u2615".encode(), "Caf\u00e9 \u2615"),
        (b"Caf\xe9", "Caf\u00e9"),
        ("the end\x00rubbish", "the end"),
        ("my digital camera", "my digital camera"),
        ("Sony Centre", "Sony Centre"),
        *[(text, None) for text in (
            None, "", "   ", "\x00\x00", "OLYMPUS DIGITAL CAMERA         ", "SONY DSC", "DCIM",
            "DCIM\\100MEDIA\\DJI_0001.JPG", "KONICA MINOLTA DIGITAL CAMERA", "Samsung CSC",
            "<Digimax S600 / Samsung #1>", "Exif_JPEG_PICTURE", "DSC_0042", "IMG_1234.jpg",
            "sdr", "Untitled", '{ "MAPLatitude": 55.7, "MAPLongitude": 13.2 }',
        )],
    ],
)
def test_the_caption_is_a_persons(description: str | bytes | None, caption: str | None) -> None:
    exif = Image.Exif()
    if description is not None:
        exif[0x010E] = description
    assert caption_of(exif) == caption


def test_captions_reach_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for kind in ("jpg", "png", "webp"):
        exif = gps_exif(*NORTH_OF_PISA)
        exif[0x010E] = f"A dog in a {kind}"
        pixels(seed=len(kind) + ord(kind[0])).save(tmp_path / "in" / f"a.{kind}", exif=exif)
    take(tmp_path / "in" / "none.jpg", *CENTER, seed=99)
    ingest(tmp_path / "in", tmp_path / "out")
    rows = load_manifest(tmp_path / "out").rows.to_pylist()
    assert {row["source"]: row["caption"] for row in rows} == {
        **{f"a.{kind}": f"A dog in a {kind}" for kind in ("jpg", "png", "webp")},
        "none.jpg": None,
    }
