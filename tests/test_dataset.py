"""Photos in memory or on disk: crops, weights of bins, dithered bearings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gps_guidance import dataset
from gps_guidance.photos.ingest import ingest
from gps_guidance.photos.manifest import load_manifest

CENTER = (43.722952, 10.396597)


def make(images: torch.Tensor, bearings: list[float], size: tuple[int, int]) -> dataset.Photos:
    names = [f"{k:016x}" for k in range(len(bearings))]
    return dataset.Photos(images, np.array(bearings), names, size, "Tower", CENTER)


def noise(count: int, height: int, width: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=g)


def red_left_blue_right(height: int, width: int) -> torch.Tensor:
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    image[:, 0, :, : width // 2] = 255
    image[:, 2, :, width // 2 :] = 255
    return image


# --- crops -----------------------------------------------------------------------------------


def test_a_whole_crop_is_the_photo_from_minus_one_to_one() -> None:
    images = noise(2, 16, 24)
    crops = make(images, [0, 90], (16, 24)).crop(np.array([1, 0]), np.random.default_rng(0))
    assert torch.allclose(crops, images[[1, 0]].float() / 127.5 - 1, atol=1e-6)
    assert crops.min() == -1 and crops.max() == 1


def test_crops_depend_on_the_generator_alone() -> None:
    many = make(noise(3, 48, 48), [0, 90, 180], (32, 32))
    picks = np.array([2, 0, 1])
    a, b, c = (many.crop(picks, np.random.default_rng(s), 0.8, 0.1) for s in (5, 5, 6))
    assert a.shape == (3, 3, 32, 32)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_crops_are_never_flipped() -> None:
    one = make(red_left_blue_right(48, 48), [0], (32, 32))
    rng = np.random.default_rng(1)
    for _ in range(40):
        [crop] = one.crop(np.array([0]), rng, min_zoom=0.7, colour_jitter=0.2)
        left, right = crop[:, :, :8].mean(dim=(1, 2)), crop[:, :, -8:].mean(dim=(1, 2))
        assert left[0] > left[2] and right[2] > right[0]


def test_half_of_the_crops_are_mirrored_if_asked() -> None:
    one = make(red_left_blue_right(32, 32), [0], (32, 32))
    rng = np.random.default_rng(1)
    crops = one.crop(np.zeros(100, dtype=int), rng, random_flip=True)
    red_left = crops[:, 0, :, :8].mean(dim=(1, 2)) > 0
    assert 35 <= int(red_left.sum()) <= 65
    assert torch.equal(crops[red_left][0].flip(-1), crops[~red_left][0])


def test_a_crop_keeps_the_asked_fraction_of_the_sides() -> None:
    """A ramp of 200 columns spans 199 grey levels; a crop of half the sides spans about half."""
    ramp = torch.arange(200, dtype=torch.uint8).expand(1, 3, 200, 200)
    one = make(ramp, [0], (100, 100))
    rng = np.random.default_rng(2)
    spans = []
    for _ in range(60):
        [crop] = one.crop(np.array([0]), rng, min_zoom=0.5)
        grey = (crop + 1) * 127.5
        spans.append(float(grey.max() - grey.min()) / 199)
    assert 0.47 < min(spans) < 0.6
    assert 0.9 < max(spans) <= 1.0


def test_colour_jitter_stays_within_its_fraction() -> None:
    """A flat grey of 100 has no contrast: only the gain (1 +- j) and the tint (1 +- j/3) act."""
    flat = make(torch.full((1, 3, 8, 8), 100, dtype=torch.uint8), [0], (8, 8))
    rng = np.random.default_rng(3)
    values = torch.stack([
        (flat.crop(np.array([0]), rng, colour_jitter=0.3)[0] + 1) * 127.5 for _ in range(200)
    ])
    low, high = 100 * 0.7 * 0.9, 100 * 1.3 * 1.1
    assert low - 1e-3 <= values.min() < low + 10
    assert high - 10 < values.max() <= high + 1e-3


# --- bins ------------------------------------------------------------------------------------


def test_bin_weights_by_hand() -> None:
    """Bins of 90 degrees hold 3, 1 and 0, 0 photos."""
    four = make(noise(4, 4, 4), [0, 10, 350, 90], (4, 4))
    assert four.bin_weights(4, 0.0) == pytest.approx([1 / 4] * 4)
    assert four.bin_weights(4, 1.0) == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    root = 3**-0.5
    half = np.array([root, root, root, 1.0]) / (3 * root + 1)
    assert four.bin_weights(4, 0.5) == pytest.approx(half)


def test_dithered_bins_have_the_bearing_as_their_mean() -> None:
    rng = np.random.default_rng(0)
    for bearing, low, high in ((12.5, 10.0, 20.0), (20.0, 20.0, 20.0), (357.0, 350.0, 0.0)):
        drawn = dataset.dither_bins(np.full(20000, bearing), rng)
        assert set(drawn) <= {low, high}
        mean = np.mean((drawn - low) % 360.0)
        assert mean == pytest.approx((bearing - low) % 360.0, abs=0.15)  # 4 sigma = 0.14


def test_dithered_bins_with_another_number_of_bins() -> None:
    drawn = dataset.dither_bins(np.full(4000, 30.0), np.random.default_rng(0), num_bins=4)
    assert set(drawn) == {0.0, 90.0}
    assert np.mean(drawn == 90.0) == pytest.approx(1 / 3, abs=0.03)


# --- load_photos -----------------------------------------------------------------------------


def test_load_photos_keeps_the_middle_in_the_aspect_of_the_crops(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    wide = Image.new("RGB", (300, 100), (0, 0, 255))
    wide.paste((255, 0, 0), (100, 0, 200, 100))
    wide.save(tmp_path / "images" / "a.png")
    assert dataset._fit(tmp_path / "images" / "a.png", (50, 50))[..., 0].min() > 240
    tall = dataset._fit(tmp_path / "images" / "a.png", (20, 40))  # 200 of the 300 columns
    assert tall.shape == (20, 40, 3)
    assert (tall[10, :9, 2] > 200).all() and (tall[10, 31:, 2] > 200).all()
    assert (tall[10, 11:29, 0] > 200).all()


def test_load_photos_reads_what_ingest_wrote(miniature_dataset: Path) -> None:
    found = dataset.load_photos(miniature_dataset, (32, 24))
    rows = load_manifest(miniature_dataset).rows.to_pylist()
    assert found.ids == [row["id"] for row in rows]
    assert found.bearings.tolist() == [row["bearing_deg"] for row in rows]
    assert found.images.shape == (12, 3, 48, 36) and found.images.dtype == torch.uint8
    assert (found.landmark, found.center) == ("Miniature Tower of Pisa", CENTER)
    assert found.masks is None and found.bounds is None
    assert found.captions == [None] * 12
    assert found.positions.tolist() == [[row["lat"], row["lon"]] for row in rows]
    with Image.open(miniature_dataset / rows[0]["file"]) as photo:
        grey = np.asarray(photo.convert("RGB")).mean()
    assert abs(float(found.images[0].float().mean()) - grey) < 12


def test_load_photos_without_a_landmark_or_without_a_photo(
    miniature_photos: Path, miniature_dataset: Path, tmp_path: Path
) -> None:
    ingest([miniature_photos], tmp_path / "city", progress=False)
    with pytest.raises(ValueError, match="without a landmark.*--landmark"):
        dataset.load_photos(tmp_path / "city", (32, 32))
    with pytest.raises(ValueError, match="no photo in split 'val'"):
        dataset.load_photos(miniature_dataset, (32, 32), split="val")
    with pytest.raises(ValueError, match="not a dataset folder"):
        dataset.load_photos(tmp_path, (32, 32))


def test_a_split_of_its_own(miniature_photos: Path, tmp_path: Path) -> None:
    ingest([miniature_photos], tmp_path, landmark="pisa", val_fraction=0.4, progress=False)
    rows = load_manifest(tmp_path).rows.to_pylist()
    for split in ("train", "val"):
        wanted = [row["id"] for row in rows if row["split"] == split]
        assert dataset.load_photos(tmp_path, (32, 32), split).ids == wanted != []
    assert len(dataset.load_photos(tmp_path, (32, 32), None)) == 12


def test_masks_count_only_if_every_photo_has_one(miniature_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(miniature_dataset, tmp_path / "d")
    names = dataset.load_photos(tmp_path / "d", (32, 32)).ids
    (tmp_path / "d" / "masks").mkdir()
    for index, name in enumerate(names):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 64, 2 * index))
        mask.save(tmp_path / "d" / "masks" / f"{name}.png")
    masks = dataset.load_photos(tmp_path / "d", (32, 32)).masks
    assert masks is not None and masks.shape == (12, 32, 32)
    for index, mask_of_photo in enumerate(masks):  # white down to row index of 32
        assert float(mask_of_photo.mean()) == pytest.approx(index / 32, abs=0.01)
    assert 0 <= masks.min() and masks.max() <= 1
    (tmp_path / "d" / "masks" / f"{names[3]}.png").unlink()
    assert dataset.load_photos(tmp_path / "d", (32, 32)).masks is None


def test_a_manifest_keeps_its_num_bins(miniature_dataset: Path) -> None:
    assert json.loads((miniature_dataset / "dataset.json").read_text())["num_bins"] == 36


def test_photos_on_disk_are_those_in_memory(miniature_dataset: Path) -> None:
    memory = dataset.load_photos(miniature_dataset, (32, 24))
    disk = dataset.load_photos(miniature_dataset, (32, 24), in_memory=False)
    assert tuple(disk.images.shape) == tuple(memory.images.shape) == (12, 3, 48, 36)
    assert disk.ids == memory.ids and disk.versions == memory.versions
    picks = np.array([11, 0, 3])
    crops = [photos.crop(picks, np.random.default_rng(1), 0.8, 0.1) for photos in (memory, disk)]
    assert torch.equal(*crops)
    with Image.open(miniature_dataset / "images" / f"{disk.ids[0]}.jpg") as stored:
        assert disk.versions[0] == f"{disk.ids[0]}-{stored.width}x{stored.height}"
