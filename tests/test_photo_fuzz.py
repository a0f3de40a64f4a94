"""Damaged metadata and damaged files: a reason each time, no crash, no hang, no full memory."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gps_guidance.photos.cleaning import Wanted
from gps_guidance.photos.exif import position_of, xmp_gps
from gps_guidance.photos.images import open_image
from gps_guidance.photos.manifest import REASONS, Rejected
from gps_guidance.photos.reading import read_photo
from gps_guidance.photos.sources import RECORD

NOTHING = dict.fromkeys(RECORD.names)
MEMORY = 512 << 20  # bytes a single photo may cost


def jpeg(exif: bytes = b"", size: tuple[int, int] = (96, 72), **options: object) -> bytes:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif, **options)
    return buffer.getvalue()


def geotagged() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a red car in the rain"
    exif[0x0132] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8825).update({1: "N", 2: (43, 43, 22.6), 3: "E", 4: (10, 23, 47.7), 31: 4.5})
    return exif.tobytes()


def check(data: bytes) -> None:
    """Either a sane position or one of the known reasons."""
    try:
        with open_image(data) as photo:
            reading = position_of(photo)
    except Rejected as error:
        assert error.reason in REASONS
    else:
        assert abs(reading.lat) <= 90 and abs(reading.lon) <= 180


@settings(max_examples=10_000, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_for_exif(blob: bytes) -> None:
    check(jpeg(b"Exif\x00\x00" + blob, (8, 8)))


@settings(max_examples=3_000, deadline=None)
@given(st.lists(st.tuples(st.integers(6, 300), st.integers(0, 255)), min_size=1, max_size=12))
def test_geotagged_exif_with_some_bytes_changed(changes: list[tuple[int, int]]) -> None:
    blob = bytearray(geotagged())
    for place, value in changes:
        blob[place % (len(blob) - 6) + 6] = value
    check(jpeg(bytes(blob), (8, 8)))


@settings(max_examples=2_000, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_in_xmp(lat: str, lon: str) -> None:
    try:
        reading = xmp_gps(f'<x exif:GPSLatitude="{lat}" exif:GPSLongitude="{lon}"/>')
    except Rejected as error:
        assert error.reason in REASONS
    else:
        assert reading is None or abs(reading.lat) <= 90 and abs(reading.lon) <= 180


def test_a_thousand_mutated_files(tmp_path: Path) -> None:
    """Bytes changed, cut out, doubled, cut off; all of the file, not just its metadata."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    whole = jpeg(geotagged())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reasons: dict[str, int] = {}
    slowest = 0.0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(2, len(data))] = rng.integers(256)
        if rng.random() < 0.3:
            data = data[: rng.integers(4, len(data))]
        if rng.random() < 0.3:
            a, b = sorted(rng.integers(2, len(data) + 1, 2))
            data = data[:b] + data[a:]
        (tmp_path / "a.jpg").write_bytes(data)
        began = time.perf_counter()
        try:
            read_photo(NOTHING | {"path": str(tmp_path / "a.jpg")}, tmp_path, Wanted())
            reasons["kept"] = reasons.get("kept", 0) + 1
        except Rejected as error:
            reasons[error.reason] = reasons.get(error.reason, 0) + 1
        slowest = max(slowest, time.perf_counter() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(reasons.values()) == 1000 and len(reasons) >= 3, reasons
    assert grown < MEMORY and slowest < 20


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """A 40,000 x 40,000 PNG of 200 kB, with at most 1.5 GB of address space beyond what is used."""
    Image.new("1", (40_000, 40_000)).save(tmp_path / "bomb.png")
    code = f"""
import resource
from pathlib import Path
from gps_guidance.photos.cleaning import Wanted
from gps_guidance.photos.manifest import Rejected
from gps_guidance.photos.reading import read_photo
from gps_guidance.photos.sources import RECORD
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1536 << 20),) * 2)
record = dict.fromkeys(RECORD.names) | {{"path": {str(tmp_path / "bomb.png")!r}}}
record |= {{"lat": 1.0, "lon": 1.0}}
try:
    read_photo(record, Path({str(tmp_path)!r}), Wanted())
except Rejected as error:
    print(error.reason)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "too_large"
