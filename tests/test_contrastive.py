"""The loss of Algorithm 1, and a training that is stopped and goes on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gps_guidance import contrastive
from gps_guidance.contrastive import (
    fit,
    hold_out,
    middle_square,
    recall_among_hundred,
    symmetric_cross_entropy,
    warm_up_cosine,
)
from gps_guidance.dataset import Photos
from gps_guidance.judge_recipe import ClipRecipe, GPSClipRecipe, judge_recipe


def test_the_loss_by_hand() -> None:
    """Two orthogonal pairs at temperature 1: logits are the identity, -log(e / (e + 1)) a row."""
    eye = torch.eye(2)
    expected = math.log(1 + math.exp(-1))
    assert float(symmetric_cross_entropy(eye, eye, 1.0)) == pytest.approx(expected)
    assert float(symmetric_cross_entropy(eye, eye, 0.5)) == pytest.approx(
        math.log(1 + math.exp(-2)))
    swapped = float(symmetric_cross_entropy(eye, eye.flip(0), 1.0))
    assert swapped == pytest.approx(expected + 1)


def test_the_loss_is_symmetric_and_is_algorithm_1() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = F.normalize(torch.randn(2, 5, 8, generator=generator), dim=-1)
    logits, labels = a @ b.T / 0.07, torch.arange(5)
    literal = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss = symmetric_cross_entropy(a, b, 0.07)
    assert torch.allclose(loss, literal)
    assert torch.allclose(loss, symmetric_cross_entropy(b, a, 0.07))


def test_rows_of_one_label_belong_together() -> None:
    """All alike: log 2 to tell the two apart, and with one label for both nothing better."""
    same = torch.ones(2, 1)
    for labels in (None, torch.tensor([0, 0])):
        assert float(symmetric_cross_entropy(same, same, 1.0, labels)) == pytest.approx(math.log(2))
    eye = torch.eye(2)
    together = symmetric_cross_entropy(eye, eye, 1.0, torch.tensor([3, 3]))
    assert float(together) == pytest.approx(math.log(1 + math.e) - 0.5)


def test_warm_up_and_cosine() -> None:
    shares = [warm_up_cosine(step, 4, 12) for step in (0, 3, 4, 8, 12)]
    assert shares == pytest.approx([0.25, 1, 1, 0.5, 0])


def test_the_middle_square() -> None:
    images = torch.zeros(1, 3, 8, 24)
    images[..., 8:16] = 1.0
    assert torch.equal(middle_square(images, 8), torch.ones(1, 3, 8, 8))
    assert middle_square(images, 4).shape == (1, 3, 4, 4)
    tall = middle_square(torch.rand(2, 3, 31, 17), 14)
    assert tall.shape == (2, 3, 14, 14)
    assert 0 <= tall.min() and tall.max() <= 1


def test_recall_among_a_hundred_counts_shared_labels_once() -> None:
    """250 rows: two whole groups. All right; then two of a hundred alike, and one label for all."""
    rows = F.normalize(torch.randn(250, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    every = np.arange(250)
    assert recall_among_hundred(rows, rows, every) == 1
    rows[1] = rows[0]
    assert recall_among_hundred(rows, rows, every) == pytest.approx(1 - 1 / 200)
    labels = every.copy()
    labels[1] = 0
    assert recall_among_hundred(rows, rows, labels) == 1
    assert recall_among_hundred(torch.ones(40, 2), torch.ones(40, 2), every[:40]) == (
        pytest.approx(1 / 40))


# --- training --------------------------------------------------------------------------------

PHOTOS = Photos(torch.zeros(12, 3, 6, 6, dtype=torch.uint8), None, [str(k) for k in range(12)],
                (4, 4), "", None)
RECIPE = ClipRecipe(max_train_steps=6, train_batch_size=4, lr_warmup_steps=2,
                    checkpointing_steps=2, learning_rate=0.1)


class Line(nn.Module):
    """A weight that trains and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self, picks: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        target = torch.from_numpy(rng.normal(size=3)) + float(picks.sum())
        return (self.weight - target).pow(2).mean()


def trained(folder: Path, recipe: ClipRecipe = RECIPE, stop: int | None = None) -> torch.Tensor:
    """The weight after training; Ctrl-C while step ``stop`` computes its loss."""
    line, seen = Line(), []

    def loss(picks: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        seen.append(1)
        if len(seen) - 1 == stop:
            raise KeyboardInterrupt
        return line.loss(picks, rng)

    fit(line, loss, PHOTOS, np.arange(10), recipe, folder)
    assert torch.equal(line.frozen, torch.ones(2))
    return line.weight.detach()


@pytest.mark.parametrize("stop", [0, 3, 5])
def test_a_training_that_was_stopped_is_the_one_that_was_not(tmp_path: Path, stop: int) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop=stop)
    assert [p.name for p in (tmp_path / "cut").iterdir()] == [f"clip-{stop:07d}"]
    assert torch.equal(trained(tmp_path / "cut"), whole)
    assert not torch.equal(trained(tmp_path / "other", replace(RECIPE, seed=1)), whole)


def test_a_checkpoint_of_other_settings_or_photos_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, stop=3)
    with pytest.raises(ValueError, match="learning_rate is 0.1, not 0.2"):
        trained(tmp_path, replace(RECIPE, learning_rate=0.2))
    monkeypatch.setattr(PHOTOS, "ids", ["other"] * 12)
    with pytest.raises(ValueError, match="its photos is"):
        trained(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    line = Line()
    with pytest.raises(ValueError, match="loss of step 0 is nan: lower learning_rate"):
        fit(line, lambda *_: line.weight.sum() * math.nan, PHOTOS, np.arange(10), RECIPE, tmp_path)


def test_what_is_held_out_never_trains() -> None:
    kept, held = hold_out(PHOTOS, RECIPE)
    assert sorted([*kept, *held]) == list(range(12))
    assert len(held) == 2  # a tenth of twelve is one, and two are needed
    with pytest.raises(ValueError, match="train_batch_size is 11, but of 12 photos 10 are left"):
        hold_out(PHOTOS, replace(RECIPE, train_batch_size=11))


def test_the_folder_of_a_judge_has_to_be_empty(tmp_path: Path) -> None:
    assert contrastive.checkpoints_of(tmp_path / "j") == tmp_path / "j-checkpoints"
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="already holds something"):
        contrastive.checkpoints_of(tmp_path)


# --- recipes ---------------------------------------------------------------------------------


def test_the_defaults_of_gps_clip_are_the_papers() -> None:
    """A.1.4: DINOv2 ViT-B/14, batch 512, temperature 0.07, learning rate 1e-4."""
    recipe = judge_recipe("gps-clip")
    assert recipe == GPSClipRecipe()
    assert (recipe.train_batch_size, recipe.learning_rate) == (512, 1e-4)
    assert (GPSClipRecipe().base, GPSClipRecipe().temperature) == ("facebook/dinov2-base", 0.07)


@pytest.mark.parametrize(("kind", "wrong", "said"), [
    ("gps-clip", ["tempreature=1"], "tempreature.*It has .*temperature"),
    ("clip", ["seed=some"], "seed"),
    ("clip", ["train_batch_size=1"], "train_batch_size is 1.*at least 2"),
    ("clip", ["resolution=0"], "resolution is 0"),
    ("clip", ["held_out_fraction=1"], "held_out_fraction is 1"),
    ("gps-clip", ["temperature=0"], "temperature is 0"),
])
def test_what_is_no_setting_is_refused(kind: str, wrong: list[str], said: Any) -> None:
    with pytest.raises(ValueError, match=said):
        judge_recipe(kind, wrong)
    assert judge_recipe("gps-clip", ["base=tiny", "seed=3"]) == GPSClipRecipe(base="tiny", seed=3)
