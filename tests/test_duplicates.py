"""The same picture again, and what only looks like it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gps_guidance.photos.duplicates import near_duplicates, near_hashes
from gps_guidance.photos.images import difference_hash


def picture(seed: int, car: str = "red") -> Image.Image:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:240j, 0:1:320j]
    waves = [np.sin(6.3 * (rng.uniform(-3, 3) * x + rng.uniform(-3, 3) * y) + rng.uniform(0, 6))
             for _ in range(9)]
    levels = np.stack([sum(waves[k::3]) for k in range(3)], axis=-1) * 40 + 128
    photo = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(photo).rectangle((140, 150, 190, 180), fill=car)
    return photo


def stored(folder: Path, photos: list[Image.Image], quality: int = 95
           ) -> tuple[list[str | None], list[str | None], np.ndarray]:
    for k, photo in enumerate(photos):
        photo.save(folder / f"{k}.jpg", quality=quality)
    return ([difference_hash(photo) for photo in photos],
            [f"{k}.jpg" for k in range(len(photos))],
            np.array([photo.width * photo.height for photo in photos]))


@pytest.mark.parametrize("max_bits", [0, 1, 3])
def test_all_pairs_within_the_distance_are_found(max_bits: int) -> None:
    """Against comparing every pair; half of the hashes are small changes of others."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64) & np.uint64(0xFFFF_0000_FFFF_0FFF)
    hashes[:150] = hashes[150:]
    for k in range(150):
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            hashes[k] ^= np.uint64(1) << np.uint64(bit)
    brute = {(i, j) for i in range(300) for j in range(i + 1, 300)
             if bin(int(hashes[i] ^ hashes[j])).count("1") <= max_bits}
    found = [tuple(pair) for pair in near_hashes(hashes, max_bits).tolist()]
    assert len(found) == len(set(found)) and set(found) == brute and brute


def test_copies_go_and_the_largest_stays(tmp_path: Path) -> None:
    photo = picture(0)
    small = photo.resize((160, 120), Image.Resampling.LANCZOS)
    hashes, files, sizes = stored(
        tmp_path, [small, picture(1), photo, photo.copy(), picture(2)], 80)
    gone = near_duplicates(hashes, files, sizes, tmp_path)
    assert gone.tolist() == [True, False, False, True, False]


def test_another_colour_in_one_place_is_another_picture(tmp_path: Path) -> None:
    photos = [picture(0, "red"), picture(0, "darkgreen")]
    hashes, files, sizes = stored(tmp_path, photos)
    distance = bin(int(str(hashes[0]), 16) ^ int(str(hashes[1]), 16)).count("1")
    assert distance <= 3, "the hashes would not even be compared"
    assert not near_duplicates(hashes, files, sizes, tmp_path).any()


def test_rows_without_an_image_stay(tmp_path: Path) -> None:
    hashes, files, sizes = stored(tmp_path, [picture(0), picture(0)])
    gone = near_duplicates(
        [None, *hashes, None], [None, *files, None], np.r_[0, sizes, 0], tmp_path)
    assert gone.tolist() == [False, False, True, False]


def test_no_photo_is_no_pair(tmp_path: Path) -> None:
    assert near_duplicates([], [], np.array([]), tmp_path).tolist() == []
