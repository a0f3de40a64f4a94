"""Photos that are the same picture again: re-encoded, resized, uploaded twice. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

# Copies of 61 real photos, shrunk to a quarter and saved at quality 50 to 85, differ from them in
# at most 3 bits of 64 and 13 levels of 255; two photos of one statue in at least 6 and 86.
MAX_BITS = 3
MAX_LEVELS = 25.0  # by which the mean colour of any tile may differ
TILES = 16
POPCOUNT = np.array([bin(k).count("1") for k in range(256)], dtype=np.uint8)
AT_ONCE = 1 << 21  # comparisons


def near_hashes(hashes: np.ndarray, max_bits: int = MAX_BITS) -> np.ndarray:
    """Pairs (i, j), i < j, [P, 2] of ``hashes`` uint64 [N] that differ in at most ``max_bits``.

    Two hashes that differ in b bits agree wholly in one of b + 1 slices of their bits: only hashes
    that share a slice are compared.
    """
    edges = np.linspace(0, 64, max_bits + 2).astype(int)
    found = [np.empty((0, 2), dtype=np.int64)]
    for low, high in pairwise(edges):
        piece = hashes >> np.uint64(low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(piece[order]) != 0, True])
        for begin, end in pairwise(starts[:-1].tolist() + [len(order)]):
            if end - begin > 1:
                found += _compare(hashes, order[begin:end], max_bits)
    pairs = np.sort(np.concatenate(found), axis=1)
    return np.unique(pairs, axis=0)


def _compare(hashes: np.ndarray, members: np.ndarray, max_bits: int) -> Iterator[np.ndarray]:
    rows = max(1, AT_ONCE // len(members))
    for start in range(0, len(members), rows):
        block = members[start : start + rows]
        differing = hashes[block][:, None] ^ hashes[members][None]
        bits = POPCOUNT[differing.view(np.uint8)].reshape(*differing.shape, 8).sum(axis=-1)
        i, j = np.nonzero(bits <= max_bits)
        ahead = j > i + start
        yield np.stack([block[i[ahead]], members[j[ahead]]], axis=1)


def near_duplicates(hashes: list[str | None], files: list[str | None], sizes: np.ndarray,
                    root: Path) -> np.ndarray:
    """True [N] for photos that are another, larger or earlier, photo's picture again.

    ``hashes`` are difference hashes in hexadecimal, ``files`` the images under ``root``, ``sizes``
    [N] their numbers of pixels. Pictures with near hashes are compared in colour before one goes:
    64 bits do not tell a red car from a blue one.
    """
    known = [k for k, value in enumerate(hashes) if value is not None]
    rank = sorted(known, key=lambda k: (-sizes[k], k))
    codes = np.array([int(str(hashes[k]), 16) for k in rank], dtype=np.uint64)
    tiles = _tiles_of([str(files[k]) for k in rank], root)
    gone = np.zeros(len(hashes), dtype=bool)
    pairs = near_hashes(codes)
    for i, j in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if not gone[rank[i]] and not gone[rank[j]]:
            gone[rank[j]] = np.abs(tiles(i) - tiles(j)).max() <= MAX_LEVELS
    return gone


def _tiles_of(files: list[str], root: Path) -> Callable[[int], np.ndarray]:
    """A function that gives the mean colours [TILES, TILES, 3] of the k-th image."""

    @lru_cache(maxsize=20_000)
    def tiles(index: int) -> np.ndarray:
        with Image.open(root / files[index]) as photo:
            photo.draft("RGB", (4 * TILES, 4 * TILES))
            small = photo.convert("RGB").resize((TILES, TILES), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float32)

    return tiles
