"""Trainings in processes of their own: killed at any moment, and several on one model."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_runs import children, losses, stored, train_small, train_together

from gps_guidance.checkpoints import load_checkpoint
from gps_guidance.recipe import AngleRecipe, GPSRecipe, Recipe, TextRecipe

SMALL: dict[str, Any] = {
    "resolution": 16, "max_train_steps": 24, "train_batch_size": 4, "learning_rate": 1e-3,
    "crops_per_photo": 1, "checkpointing_steps": 1, "validation_steps": 0, "ema_decay": 0.9,
    "vae_steps": 4, "vae_batch_size": 4,
}


def train(dataset: Path, out: Path, recipe: Recipe) -> Path:
    """To the end, in one other process."""
    process = children().Process(target=train_small, args=(dataset, out, recipe))
    process.start()
    process.join()
    assert process.exitcode == 0
    return out


def same_end(a: Path, b: Path, *stages: str) -> bool:
    weights, others = stored(a), stored(b)
    return (weights.keys() == others.keys()
            and all(weights[name].equal(others[name]) for name in weights)
            and all(losses(a, stage) == losses(b, stage) for stage in stages))


# --- kill -9 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_end_is_the_same(
    city_dataset: Path, tmp_path: Path, kills: int
) -> None:
    recipe = TextRecipe(**SMALL, save_dtype="float16")
    idle = children().Process(target=time.sleep, args=(0,))  # starts the server, which imports
    idle.start()
    idle.join()
    began = time.monotonic()
    whole = train(city_dataset, tmp_path / "whole", recipe)
    length = time.monotonic() - began
    rng, out, killed, loaded = np.random.default_rng(kills), tmp_path / "m", 0, 0
    while killed < kills:
        process = children().Process(target=train_small, args=(city_dataset, out, recipe))
        process.start()
        process.join(rng.uniform(0.1, 0.9) * length)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
            for path in (out / "checkpoints").glob("[a-z]*-*"):
                loaded += bool(load_checkpoint(path).state)
        else:  # it was done before
            assert process.exitcode == 0 and same_end(out, whole, "vae", "text")
            shutil.rmtree(out)
    assert loaded
    if not (out / "text_encoder").is_dir():  # else the kill came after the last file
        train(city_dataset, out, recipe)
    assert same_end(out, whole, "vae", "text")


# --- two processes on one model ------------------------------------------------------------------


def finish(processes: list[Any], codes: set[int]) -> None:
    for process in processes:
        process.join(300)
    assert {process.exitcode for process in processes} <= codes


def recipes(base: Path) -> list[Recipe]:
    few = SMALL | {"resolution": 32, "max_train_steps": 12, "train_batch_size": 2,
                   "checkpointing_steps": 5, "base": str(base)}
    return [GPSRecipe(**few),
            AngleRecipe(**few, num_class_images=2, dither_bins=True, angle_dropout=0.2)]


@pytest.mark.parametrize("kind", [0, 1], ids=["gps", "angle"])
def test_two_processes_are_one_with_twice_the_batch(
    city_dataset: Path, miniature_dataset: Path, tiny_sd_model: Path, tmp_path: Path, kind: int
) -> None:
    """Or with twice the accumulated batches: the same losses to 1e-4."""
    dataset, recipe = (city_dataset, miniature_dataset)[kind], recipes(tiny_sd_model)[kind]
    finish(train_together(2, dataset, tmp_path / "two", recipe), {0})
    once = train(dataset, tmp_path / "once", replace(recipe, train_batch_size=4))
    twice = train(dataset, tmp_path / "twice", replace(recipe, gradient_accumulation_steps=2))
    name = recipe.kind
    curve = [float(loss) for _, loss in losses(tmp_path / "two", name)[1:]]
    assert len(curve) == 12 and max(curve) - min(curve) > 1e-2
    weights = stored(tmp_path / "two")
    for other in (once, twice):
        expected = [float(loss) for _, loss in losses(other, name)[1:]]
        assert curve == pytest.approx(expected, abs=1e-4)
        for key, value in stored(other).items():
            assert float((value - weights[key]).abs().max()) < 2e-4, key
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in once.iterdir())


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    """SIGTERM for one of them ends both after the same step."""
    recipe = replace(recipes(tiny_sd_model)[0], max_train_steps=40, checkpointing_steps=2)
    out = tmp_path / "m"
    pair = train_together(2, city_dataset, out, recipe)
    end = time.monotonic() + 200
    while not list((out / "checkpoints").glob("gps-*")) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(pair[1].pid, signal.SIGTERM)
    finish(pair, {1})  # a KeyboardInterrupt that nobody catches
    assert not (out / "gps_encoder").exists()
    finish(train_together(2, city_dataset, out, recipe), {0})
    finish(train_together(2, city_dataset, tmp_path / "whole", recipe), {0})
    assert same_end(out, tmp_path / "whole", "gps")
