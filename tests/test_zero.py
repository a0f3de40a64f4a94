"""DeepSpeed's ZeRO: two processes that share moments and gradients are one that has all."""

from __future__ import annotations

import copy
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import finish, same_end, train
from test_sharding import assert_same, curve, small
from train_runs import run_together, stored, train_small

from gps_guidance import zero
from gps_guidance.recipe import Recipe
from gps_guidance.sharding import prepare_sharding
from gps_guidance.zero import Zero


@pytest.fixture
def deepspeed() -> None:
    pytest.importorskip("deepspeed", reason='needs `pip install "gps-guidance[deepspeed]"`, and '
                        "where there is no GPU a C++ compiler")


def configured(stage: int) -> dict[str, str]:
    """As `accelerate launch --use_deepspeed --zero_stage <stage>` says it, with an accumulation and
    a clipping of its own that the recipe's must stand in for."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3", "ACCELERATE_GRADIENT_CLIPPING": "0.01"}


def train_sharing(dataset: Path, out: Path, recipe: Recipe, stage: int, nan_at: int, rank: int,
                  processes: int, port: int) -> None:
    from deepspeed import comm

    nan = {"NAN_AT": str(nan_at)} if nan_at else {}
    train_small(dataset, out, recipe, rank, processes, port, configured(stage) | nan)
    assert comm.is_initialized()  # else it was another way


def train_pair(dataset: Path, out: Path, recipe: Recipe, stage: int, nan_at: int = 0) -> list[Any]:
    return run_together(2, train_sharing, dataset, out, recipe, stage, nan_at)


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(("stage", "changes"), [
    (1, {"gradient_accumulation_steps": 2}),
    (2, {"gradient_accumulation_steps": 2}),
    (2, {"train_text_encoder": True, "validation_steps": 2, "snr_gamma": 5.0,
         "gradient_checkpointing": True, "null_text": "empty"}),
    (1, {"lora_rank": 2, "train_text_encoder": True, "mixed_precision": "bf16"}),
], ids=["1", "2", "whole", "lora"])
def test_two_processes_that_share_moments_are_one_that_has_all(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path, stage: int, changes: dict[str, Any]
) -> None:
    recipe = small(tiny_sd_model, max_train_steps=4, **changes)
    two, one = tmp_path / "two" / "m", tmp_path / "one" / "m"
    finish(train_pair(city_dataset, two, recipe, stage), {0})
    accumulated = 2 * recipe.gradient_accumulation_steps
    train(city_dataset, one, replace(recipe, gradient_accumulation_steps=accumulated))
    assert_same(two, one, "gps")


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_goes_on_with_and_without_deepspeed(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path, stage: int
) -> None:
    """SIGTERM ends both processes after the same step; two go on bit for bit, and one alone."""
    recipe, out = small(tiny_sd_model, max_train_steps=30), tmp_path / "m"
    pair = train_pair(city_dataset, out, recipe, stage)
    end = time.monotonic() + 300
    while not list((out / "checkpoints").glob("gps-*")) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(pair[1].pid, signal.SIGTERM)
    finish(pair, {1})  # a KeyboardInterrupt that nobody catches
    assert not (out / "gps_encoder").exists()
    shutil.copytree(out, tmp_path / "alone")
    finish(train_pair(city_dataset, out, recipe, stage), {0})
    finish(train_pair(city_dataset, tmp_path / "whole", recipe, stage), {0})
    assert same_end(out, tmp_path / "whole", "gps")
    train(city_dataset, tmp_path / "alone", replace(recipe, train_batch_size=4))
    assert_same(tmp_path / "alone", out, "gps")


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    finish(train_pair(city_dataset, tmp_path / "m", small(tiny_sd_model, max_train_steps=4), 2,
                      nan_at=2), {0})
    found = curve(tmp_path / "m", "gps")
    assert [step for step, loss in enumerate(found, 1) if loss != loss] == [2]
    assert all(tensor.isfinite().all() for tensor in stored(tmp_path / "m").values())


# --- the engine alone ----------------------------------------------------------------------------


class Squares(torch.nn.Module):
    """The mean square of a layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs).square().mean()


def adamw(module: Squares) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": [module.layer.weight], "lr": 1e-2},
                              {"params": [module.layer.bias], "lr": 1e-3}], fused=True)


def same_as_one_process(stage: int, rank: int, processes: int, port: int) -> None:
    os.environ |= configured(stage)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=processes)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    torch.manual_seed(0)
    module = Squares()
    other = copy.deepcopy(module)
    other_optimizer = adamw(other)
    data = torch.randn(2, processes, 4, 3)  # two passes in each process

    def start() -> Zero:
        return Zero(module, optimizer, dict(module.named_parameters()), max_norm=0.1)

    def both_step() -> None:
        with shared.no_sync():
            (shared(data[0, rank]) / 2).backward()
        (shared(data[1, rank]) / 2).backward()
        norm = shared.step(1.0)
        other(data.flatten(0, 2)).backward()
        expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        assert norm == pytest.approx(float(expected), rel=1e-5) and norm > 0.1
        other_optimizer.step()
        other_optimizer.zero_grad()
        for mine, its in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, its)

    optimizer = adamw(module)
    shared = start()
    both_step()
    [weight, _] = [group["params"][0] for group in optimizer.param_groups]
    assert optimizer.state[weight]["exp_avg"].shape == (8,)  # of 15
    before = copy.deepcopy(module.state_dict())
    shared(data[0, rank]).backward()
    shared.step(math.inf)  # although the gradient is finite
    shared(data[0, rank] * (math.nan if rank else 1.0)).backward()
    assert not math.isfinite(shared.step(1.0))
    assert all(before[key].equal(value) for key, value in module.state_dict().items())
    both_step()

    moments = shared.moments()
    assert len(moments) == (0 if rank else 6)
    for name, value in moments.items():
        kind, _, key = name.partition(".")
        torch.testing.assert_close(value, other_optimizer.state[other.get_parameter(key)][kind])
    shared.release()
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in module.parameters())
    optimizer = adamw(module)
    optimizer.load_state_dict(copy.deepcopy(other_optimizer.state_dict()))
    shared = start()
    both_step()


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_norms_and_moments_are_those_of_one_process(stage: int) -> None:
    finish(run_together(2, same_as_one_process, stage), {0})


@pytest.mark.parametrize(("environment", "changes", "message"), [
    ({"DEEPSPEED_ZERO_STAGE": "3"}, {}, "zero_stage 3, and 1 and 2 are known.*--use_fsdp"),
    ({"DEEPSPEED_ZERO_STAGE": "0"}, {}, "zero_stage 0"),
    ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "offload_optimizer_device cpu.*to none"),
    ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, {}, "offload_param_device nvme"),
    ({"DEEPSPEED_CONFIG_FILE": "zero.json"}, {}, "deepspeed_config_file.*give zero_stage"),
    ({}, {"base": "tiny"}, "base is 'tiny', which does not go with DeepSpeed.*--multi_gpu"),
    ({}, {"use_8bit_adam": True}, "use_8bit_adam is True.*set it to false"),
    ({}, {"mixed_precision": "fp16"}, "'fp16'.*bf16 or no"),
])
def test_what_does_not_go_with_deepspeed_is_said(
    tiny_sd_model: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str],
    changes: dict[str, Any], message: str,
) -> None:
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(zero, "compare_versions", lambda *_: False)
    for key, value in configured(2).items():
        monkeypatch.setenv(key, value)
    for key, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{key}", value)
    with pytest.raises(ValueError, match=message):
        prepare_sharding(replace(small(tiny_sd_model), **changes))


def test_a_deepspeed_that_is_missing_or_old_is_said(
    tiny_sd_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match=r'not installed: run `pip install "gps-guidance\[deeps'):
        prepare_sharding(small(tiny_sd_model))
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(zero, "compare_versions", lambda *_: True)
    with pytest.raises(ValueError, match="older than 0.19.8: run"):
        prepare_sharding(small(tiny_sd_model))
