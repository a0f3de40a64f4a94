"""Photos that are the same picture again: re-encoded, resized, uploaded twice. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

# Copies of 61 real photos, shrunk to a quarter and saved at quality 50 to 85, differ from them in
# at most 3 bits of 64 and 13 levels of 255; two photos of one statue in at least 6 and 86.
MAX_BITS = 3
MAX_LEVELS = 25  # by which the mean colour of any tile may differ
TILES = 8
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


def tile_colours(photo: Image.Image) -> str:
    """The mean colours of 8 x 8 tiles of an image, in hexadecimal: 64 bits do not tell a red car
    from a blue one, these 192 bytes do."""
    small = photo.convert("RGB").resize((TILES, TILES), Image.Resampling.BOX)
    return np.asarray(small).tobytes().hex()


def tile_colours_of(path: Path) -> str:
    """:func:`tile_colours` of a stored image."""
    with Image.open(path) as photo:
        return tile_colours(photo)


def near_duplicates(hashes: Sequence[str | None], tiles: Sequence[str | None], sizes: np.ndarray
                    ) -> np.ndarray:
    """True [N] for photos that are another, larger or earlier, photo's picture again.

    ``hashes`` are difference hashes and ``tiles`` tile colours, both in hexadecimal and null
    without an image; ``sizes`` [N] are numbers of pixels.
    """
    known = [k for k, value in enumerate(hashes) if value is not None]
    rank = sorted(known, key=lambda k: (-sizes[k], k))
    codes = np.array([int(str(hashes[k]), 16) for k in rank], dtype=np.uint64)
    colours = [np.frombuffer(bytes.fromhex(str(tiles[k])), np.uint8).astype(int) for k in rank]
    gone = np.zeros(len(hashes), dtype=bool)
    pairs = near_hashes(codes)
    for i, j in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if not gone[rank[i]] and not gone[rank[j]]:
            gone[rank[j]] = np.abs(colours[i] - colours[j]).max() <= MAX_LEVELS
    return gone
