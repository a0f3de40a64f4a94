"""Fully sharded training: two processes that hold parts are one that holds the whole."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_processes import finish, recipes, same_end, train
from train_runs import FSDP, losses, stored, train_together

from gps_guidance.checkpoints import find_checkpoints, load_checkpoint
from gps_guidance.recipe import GPSRecipe
from gps_guidance.sharding import prepare_sharding


def curve(out: Path, kind: str) -> list[float]:
    return [float(loss or "nan") for _, loss in losses(out, kind)[1:]]


def assert_same(found: Path, expected: Path, kind: str) -> None:
    """The same losses to 1e-4, the same weights nearly, the same names of everything."""
    assert curve(found, kind) == pytest.approx(curve(expected, kind), abs=1e-4, nan_ok=True)
    weights, others = stored(found), stored(expected)
    assert weights.keys() == others.keys()
    for key, value in others.items():
        assert float((value - weights[key]).abs().max()) < 2e-4, key
    names = [sorted(str(path.relative_to(out)) for path in out.rglob("*"))
             for out in (found, expected)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith("config.json") or name == "model_index.json":
            assert (found / name).read_text() == (expected / name).read_text()


def small(base: Path, **changes: Any) -> GPSRecipe:
    recipe: Any = replace(recipes(base)[0], max_grad_norm=0.05, **changes)
    return recipe


@pytest.mark.parametrize("changes", [
    {"gradient_accumulation_steps": 2},
    pytest.param({"train_text_encoder": True, "validation_steps": 2, "snr_gamma": 5.0,
                  "gradient_checkpointing": True, "null_text": "empty"}, marks=pytest.mark.slow),
    pytest.param({"lora_rank": 2, "train_text_encoder": True}, marks=pytest.mark.slow),
], ids=["accumulated", "whole", "lora"])
def test_two_processes_with_parts_are_one_with_the_whole(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = small(tiny_sd_model, max_train_steps=4, **changes)
    two, one = tmp_path / "two" / "m", tmp_path / "one" / "m"
    finish(train_together(2, city_dataset, two, recipe, FSDP), {0})
    accumulated = 2 * recipe.gradient_accumulation_steps
    train(city_dataset, one, replace(recipe, gradient_accumulation_steps=accumulated))
    assert_same(two, one, "gps")


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_number_of_processes(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    """SIGTERM ends both processes after the same step; what they wrote one process continues, and
    the other way round; two go on bit for bit."""
    recipe, out = small(tiny_sd_model, max_train_steps=30), tmp_path / "m"
    pair = train_together(2, city_dataset, out, recipe, FSDP)
    end = time.monotonic() + 300
    while not list((out / "checkpoints").glob("gps-*")) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(pair[1].pid, signal.SIGTERM)
    finish(pair, {1})  # a KeyboardInterrupt that nobody catches
    assert not (out / "gps_encoder").exists()
    [*_, path] = find_checkpoints(out / "checkpoints", "gps")
    saved = load_checkpoint(path)
    assert saved.ema and saved.ema.keys() <= saved.model.keys()
    assert all(tensor.shape == saved.model[name].shape for name, tensor in saved.ema.items())
    shutil.copytree(out, tmp_path / "alone")
    finish(train_together(2, city_dataset, out, recipe, FSDP), {0})
    finish(train_together(2, city_dataset, tmp_path / "whole", recipe, FSDP), {0})
    assert same_end(out, tmp_path / "whole", "gps")
    alone = replace(recipe, train_batch_size=4)
    train(city_dataset, tmp_path / "alone", alone)
    assert_same(tmp_path / "alone", out, "gps")


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    finish(train_together(2, city_dataset, tmp_path / "m", small(tiny_sd_model, max_train_steps=4),
                          FSDP | {"NAN_AT": "2"}), {0})
    found = curve(tmp_path / "m", "gps")
    assert [step for step, loss in enumerate(found, 1) if loss != loss] == [2]
    assert all(tensor.isfinite().all() for tensor in stored(tmp_path / "m").values())


def test_what_does_not_go_with_sharding_is_said(
    tiny_sd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = small(tiny_sd_model)
    for environment, changes, message in (
        ({"FSDP_VERSION": "1"}, {}, "version 1; version 2 is needed: .*--fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "leave --fsdp_offload_params out"),
        ({}, {"base": "tiny"}, "base is 'tiny'.*--multi_gpu"),
        ({}, {"use_8bit_adam": True}, "use_8bit_adam is True.*set it to false"),
    ):
        with monkeypatch.context() as patch:
            for key, value in ({"FSDP_VERSION": "2"} | environment).items():
                patch.setenv(key, value)
            with pytest.raises(ValueError, match=message):
                prepare_sharding(replace(recipe, **changes))
