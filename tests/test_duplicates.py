"""The same picture again, and what only looks like it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gps_guidance.photos.duplicates import near_duplicates, near_hashes, tile_colours
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


def described(photos: list[Image.Image]) -> tuple[list[str], list[str], np.ndarray]:
    return ([difference_hash(photo) for photo in photos], [tile_colours(p) for p in photos],
            np.array([photo.width * photo.height for photo in photos]))


def saved(photo: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


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


def test_copies_go_and_the_largest_stays() -> None:
    photo = picture(0)
    small = saved(photo.resize((160, 120), Image.Resampling.LANCZOS), 60)
    gone = near_duplicates(*described([small, picture(1), photo, saved(photo, 80), picture(2)]))
    assert gone.tolist() == [True, False, False, True, False]


def test_another_colour_in_one_place_is_another_picture() -> None:
    hashes, tiles, sizes = described([picture(0, "red"), picture(0, "darkgreen")])
    distance = bin(int(hashes[0], 16) ^ int(hashes[1], 16)).count("1")
    assert distance <= 3, "the hashes would not even be compared"
    assert not near_duplicates(hashes, tiles, sizes).any()


def test_rows_without_an_image_stay() -> None:
    hashes, tiles, sizes = described([picture(0), picture(0)])
    gone = near_duplicates([None, *hashes, None], [None, *tiles, None], np.r_[0, sizes, 0])
    assert gone.tolist() == [False, False, True, False]


def test_no_photo_is_no_pair() -> None:
    assert near_duplicates([], [], np.array([])).tolist() == []
