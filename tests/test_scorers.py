"""The judge of bearings: counting agreement, fitting, and where it is kept."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gps_guidance import scorers
from gps_guidance.dataset import Photos
from gps_guidance.scorers import AngleClassifier, bin_agreement, fit_angle_classifier


def test_bin_agreement_by_hand() -> None:
    """Off by 0, 1 over the wrap, 1, 2, and by half a turn: 1 of 5 exact, 3 of 5 within one."""
    found, true = np.array([4, 35, 8, 12, 18]), np.array([4, 0, 7, 10, 0])
    assert bin_agreement(found, true, 36) == (1 / 5, 3 / 5)
    assert bin_agreement(true, found, 36) == (1 / 5, 3 / 5)


def test_bin_agreement_does_not_change_when_everything_turns() -> None:
    rng = np.random.default_rng(0)
    found, true = rng.integers(36, size=(2, 200))
    near = [bin_agreement((found + k) % 36, (true + k) % 36, 36) for k in range(36)]
    assert len(set(near)) == 1
    assert near[0] == pytest.approx((1 / 36, 3 / 36), abs=0.06)  # chance


def test_bin_agreement_with_bearings_between_bins() -> None:
    """In 12 bins of 30 degrees, bin 0 is exact up to 15 degrees and near up to 45."""
    true = np.array([14.0, -14.0, 16.0, 44.0, 46.0]) / 30.0
    assert bin_agreement(np.zeros(5), true, 12) == (2 / 5, 4 / 5)


def test_the_classifier_takes_any_size() -> None:
    model = AngleClassifier(num_bins=12).eval()
    for size in ((64, 64), (48, 32), (16, 16)):
        images = torch.rand(2, 3, *size)
        assert model(images).shape == (2, 12)
        assert model.read_bins(images).tolist() == model(images).argmax(dim=1).tolist()


def coloured(count: int) -> Photos:
    """Four sides of a landmark, each with its colour in the left half, all grey on the right."""
    sides = np.arange(count) % 4
    rng = np.random.default_rng(0)
    images = rng.integers(90, 120, (count, 3, 24, 24), dtype=np.uint8)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]], np.uint8)
    images[:, :, :, :12] = colours[sides][:, :, None, None]
    return Photos(torch.from_numpy(images), sides * 90.0, [str(k) for k in range(count)], (16, 16),
                  "Tower", (0.0, 0.0))


@pytest.fixture(scope="module")
def fitted() -> AngleClassifier:
    return fit_angle_classifier(coloured(60), num_bins=4, steps=40, batch_size=16)


def test_fitting_learns_and_measures_itself_on_photos_held_out(fitted: AngleClassifier) -> None:
    assert fitted.config.held_out == 6  # a tenth
    assert fitted.config.accuracy == fitted.config.within_one == 1.0
    assert not fitted.training
    assert not any(p.requires_grad for p in fitted.parameters())
    photos = coloured(60)
    found = fitted.read_bins(photos.crop(np.arange(60), np.random.default_rng(1)) / 2 + 0.5)
    assert bin_agreement(found, photos.bearings / 90.0, 4)[0] > 0.95


def test_an_unlearnable_label_is_measured_as_such() -> None:
    photos = coloured(60)
    photos.images[:] = 128
    fitted = fit_angle_classifier(photos, num_bins=4, steps=3, batch_size=8, held_out_fraction=0.5)
    assert fitted.config.held_out == 30
    assert fitted.config.accuracy < 0.5  # chance is 1/4: every photo is read as the same bin


def test_fitting_depends_on_the_seed_alone() -> None:
    fits = [fit_angle_classifier(coloured(24), 4, steps=3, batch_size=4, seed=s) for s in (1, 1, 2)]
    a, b, c = (torch.cat([p.flatten() for p in f.parameters()]) for f in fits)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_classifier_is_kept_with_its_angle_model(
    miniature_dataset: Path, tiny_angle_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_angle_model, tmp_path / "m")
    fit, fits = functools.partial(fit_angle_classifier, steps=3, batch_size=4), []
    monkeypatch.setattr(scorers, "fit_angle_classifier",
                        lambda *args, **options: fits.append(fit(*args, **options)) or fits[0])
    folder = scorers.train_angle_classifier(miniature_dataset, tmp_path / "m")
    assert folder == tmp_path / "m" / "angle_classifier"
    [stored] = folder.glob("*.safetensors")
    with safe_open(stored, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    again = AngleClassifier.from_pretrained(folder, use_safetensors=True,
                                            torch_dtype=torch.float32)
    assert (again.config.num_bins, again.config.held_out) == (36, 1)
    images = torch.rand(4, 3, 32, 32)
    assert torch.allclose(again(images), fits[0].float()(images), atol=1e-5)


def test_a_classifier_needs_an_angle_model(miniature_dataset: Path, tiny_gps_model: Path) -> None:
    with pytest.raises(ValueError, match="GPS model"):
        scorers.train_angle_classifier(miniature_dataset, tiny_gps_model)
