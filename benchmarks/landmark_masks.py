"""Masks of a statue on its pedestal for a dataset's photos, so that a reconstruction can be scored.

    python benchmarks/landmark_masks.py DATASET

Made for the Sakharov monument: GrabCut (OpenCV) once for the dark bronze figure, in a column
around the darkest part of the photo's middle, and once for the boulder under it; the union is the
mask. Only scores use the masks, training never does. They are written to ``DATASET/masks/<id>.png``
(white = landmark), with ``masks.png``, a contact sheet to look at. Needs opencv-python-headless.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

from gps_guidance.photos.manifest import load_manifest  # noqa: E402

DARK, BRIGHT = 105, 170  # values (of 255) below which bronze lies, and above which it never does
GREY = 6  # sunlit granite is pink: at least that much more red than blue


def grab_cut(photo: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Boolean [H, W] of the largest connected foreground, from OpenCV's four seed labels."""
    cv2 = _opencv()
    cv2.setRNGSeed(0)
    labels = seeds.copy()
    cv2.grabCut(photo, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 8,
                cv2.GC_INIT_WITH_MASK)
    found = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.uint8)
    _, parts, stats, _ = cv2.connectedComponentsWithStats(found)
    largest: np.ndarray = parts == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])
    return largest


def statue_mask(photo: np.ndarray) -> np.ndarray:
    """Boolean [H, W] of figure and boulder in a photo [H, W, 3] uint8 (BGR)."""
    cv2 = _opencv()
    height, width = photo.shape[:2]
    down, across = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    value = photo.max(axis=2)
    column = np.convolve((value < DARK)[height // 10 : height * 11 // 20].mean(axis=0),
                         np.ones(width // 10), "same")
    middle = slice(int(0.3 * width), int(0.65 * width))
    off = np.abs(across - (middle.start + np.argmax(column[middle])) / width)

    figure = np.full((height, width), cv2.GC_BGD, np.uint8)
    region = (off < 0.15) & (down > 0.03) & (down < 0.68)
    figure[region] = cv2.GC_PR_BGD
    figure[region & (value < DARK) & (off < 0.11)] = cv2.GC_PR_FGD
    figure[region & (value < DARK) & (off < 0.05) & (down > 0.12) & (down < 0.6)] = cv2.GC_FGD
    figure[region & (value > BRIGHT)] = cv2.GC_BGD

    boulder = np.full((height, width), cv2.GC_BGD, np.uint8)
    boulder[(off < 0.46) & (down > 0.62) & (down < 0.94)] = cv2.GC_PR_BGD
    boulder[(off < 0.38) & (down > 0.66) & (down < 0.89)] = cv2.GC_PR_FGD
    blue, green, red = np.moveaxis(cv2.medianBlur(photo, 7).astype(int), 2, 0)
    grey = (red - blue < GREY) & (value > BRIGHT - 30)
    boulder[(green > red + GREY) | grey] = cv2.GC_BGD  # grass; slab and cars
    boulder[(off < 0.24) & (down > 0.70) & (down < 0.87)] = cv2.GC_FGD

    stone = cv2.morphologyEx(grab_cut(photo, boulder).astype(np.uint8), cv2.MORPH_OPEN,
                             np.ones((13, 13), np.uint8))  # without the slab's edge
    both = grab_cut(photo, figure).astype(np.uint8) | stone
    return cv2.morphologyEx(both, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)).astype(bool)


def write_masks(dataset: Path) -> Path:
    """Write the masks of every photo and the contact sheet; returns the masks' folder."""
    cv2 = _opencv()
    manifest = load_manifest(dataset)
    folder = dataset / "masks"
    folder.mkdir(exist_ok=True)
    tiles = []
    for row in sorted(manifest.rows.to_pylist(), key=lambda row: row["bearing_deg"]):
        with Image.open(dataset / row["file"]) as image:
            rgb = np.asarray(image.convert("RGB").resize((image.width // 2, image.height // 2)))
        mask = statue_mask(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{row['id']}.png")
        tile = Image.fromarray(np.where(mask[..., None], rgb, rgb // 4))
        tiles.append(np.asarray(tile.resize((128, 192))))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 8)
    rows = [np.concatenate(tiles[k : k + 8], axis=1) for k in range(0, len(tiles), 8)]
    Image.fromarray(np.concatenate(rows)).save(dataset / "masks.png")
    return folder


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise SystemExit("The masks are cut out with OpenCV: pip install opencv-python-headless "
                         "and run the same command again.") from error
    return cv2


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/landmark_masks.py DATASET")
    print(write_masks(Path(sys.argv[1])))
