"""The loop of a training by itself: skipped steps, checkpoints, signals, trackers."""

from __future__ import annotations

import csv
import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor

from gps_guidance import checkpoints
from gps_guidance.checkpoints import Checkpoint, find_checkpoints, load_checkpoint
from gps_guidance.loop import Batch, Course, Run, start_accelerator
from gps_guidance.recipe import TextRecipe

STEPS = 6


def draw(step: int) -> Batch:
    """Two parts of four made-up images."""
    return Batch([torch.randn(4, 3), torch.randn(4, 3)], 8, {"seen": 8})


def start(out: Path, steps: int = STEPS, **changes: Any) -> tuple[Run, Callable[[Tensor], Tensor]]:
    """A run that fits a plane, and its loss."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    settings: dict[str, Any] = {"learning_rate": 0.1, "ema_decay": 0.9, "checkpointing_steps": 1,
                                "checkpoints_total_limit": 0, "max_skipped_steps": 3} | changes
    recipe = TextRecipe(**settings)
    run = Run("text", {"net": net}, steps, recipe.rate, recipe, out, "cosine", 1)
    return run, lambda part: (net(part) - part.sum(dim=1, keepdim=True)).square().mean()


def finish(out: Path, **changes: Any) -> tuple[Run, dict[str, Tensor]]:
    run, loss = start(out, **changes)
    out.mkdir(exist_ok=True)
    run.loop(Accelerator(), draw, loss)
    return run, {key: value.clone() for key, value in run.modules["net"].state_dict().items()}


def rows(out: Path) -> list[list[str]]:
    with open(out / "text_loss.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    assert a and b and a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


# --- steps that are not finite -----------------------------------------------------------------


def spoilt_loss(loss: Callable[[Tensor], Tensor], net: Any, parts: range, how: str
                ) -> Callable[[Tensor], Tensor]:
    """``loss``, but of those of its calls it is not a number, or its gradient is not."""
    calls = iter(range(1, 1000))

    def spoilt(part: Tensor) -> Tensor:
        value = loss(part)
        if next(calls) not in parts:
            return value
        if how == "loss":
            return value * float("nan")
        zero = (net.weight - net.weight.detach()).sum()
        return value + zero.abs().sqrt()  # the slope of a root at 0

    return spoilt


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_schedule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    run, loss = start(tmp_path)
    with caplog.at_level(logging.INFO, logger="gps_guidance"):
        run.loop(Accelerator(), draw, spoilt_loss(loss, run.modules["net"], range(5, 6), how))
    assert [bool(loss) for _, loss in rows(tmp_path)] == [True, True, False, True, True, True]
    assert "6 steps in" in caplog.text and ", 1 skipped" in caplog.text
    two, three, four = (load_checkpoint(tmp_path / "checkpoints" / f"text-{step:07d}")
                        for step in (2, 3, 4))
    assert same(two.model, three.model) and not same(three.model, four.model)
    assert same(two.optimizer, three.optimizer) and same(two.ema, three.ema)
    assert (two.state["ema_step"], three.state["ema_step"]) == (2, 2)
    assert (two.state["schedule"]["last_epoch"], three.state["schedule"]["last_epoch"]) == (2, 3)
    assert three.state["losses"][2] is None
    assert (tmp_path / "loss.png").is_file()


def test_too_many_in_a_row_end_the_run_with_a_report(tmp_path: Path) -> None:
    run, loss = start(tmp_path)
    with pytest.raises(ValueError, match=r"3 steps of text in a row .* up to step 5: loss nan, "
                       r"gradient norm nan, learning rate 0.0\d+; last finite loss \d.* at step 2"):
        run.loop(Accelerator(), draw, spoilt_loss(loss, run.modules["net"], range(5, 99), "loss"))
    last = load_checkpoint(find_checkpoints(tmp_path / "checkpoints", "text")[-1])
    assert all(value.isfinite().all() for value in last.model.values())


def test_a_scaler_of_gradients_changes_nothing_but_skips_what_overflows(tmp_path: Path) -> None:
    """What fp16 needs on CUDA, here with float32: scales are powers of two."""
    _, plain = finish(tmp_path / "plain")
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run, loss = start(tmp_path / "scaled")
    (tmp_path / "scaled").mkdir()
    run.loop(accelerator, draw, loss)
    assert same(run.modules["net"].state_dict(), plain)
    assert rows(tmp_path / "scaled") == rows(tmp_path / "plain")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    run, loss = start(tmp_path / "huge")
    (tmp_path / "huge").mkdir()
    run.loop(accelerator, draw, loss)
    assert 1 <= run.skipped < STEPS - 1 and rows(tmp_path / "huge")[0] == ["1", ""]
    saved = load_checkpoint(find_checkpoints(tmp_path / "huge" / "checkpoints", "text")[-1])
    assert saved.state["scaler"]["scale"] < 2.0**127


# --- checkpoints -------------------------------------------------------------------------------


def test_a_checkpoint_has_every_tensor_by_its_name(tmp_path: Path) -> None:
    run, _ = finish(tmp_path)
    found = find_checkpoints(tmp_path / "checkpoints", "text")
    assert [path.name for path in found] == [f"text-{step:07d}" for step in range(1, STEPS)]
    assert sorted(path.name for path in found[-1].iterdir()) == [
        "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    for name, keys in {
        "model": {"net.weight", "net.bias"}, "ema": {"net.weight", "net.bias"},
        "optimizer": {f"{kind}.net.{key}" for kind in ("exp_avg", "exp_avg_sq", "step")
                      for key in ("weight", "bias")},
    }.items():
        with safe_open(found[-1] / f"{name}.safetensors", "pt") as file:
            assert set(file.keys()) == keys
    state = json.loads((found[-1] / "state.json").read_text())
    assert (state["version"], state["stage"], state["step"], state["seed"]) == (1, "text", 5, 0)
    assert state["counts"] == {"seen": 40} and len(state["losses"]) == 5


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_from_any_checkpoint_the_end_is_the_same(tmp_path: Path, ema_decay: float) -> None:
    whole, expected = finish(tmp_path / "whole", ema_decay=ema_decay)
    for path in find_checkpoints(tmp_path / "whole" / "checkpoints", "text"):
        out = tmp_path / path.name
        (out / "checkpoints").mkdir(parents=True)
        path.rename(out / "checkpoints" / path.name)
        run, found = finish(out, ema_decay=ema_decay)
        assert same(found, expected) and run.losses == whole.losses
        assert run.counts == whole.counts == {"seen": 8 * STEPS}


def test_a_stage_counts_the_seconds_and_images_of_all_its_parts(tmp_path: Path) -> None:
    """From a checkpoint of before they were counted, those that follow it."""
    whole, _ = finish(tmp_path)
    assert whole.course == Course("text", STEPS, 0, {"seen": 8 * STEPS}, whole.seconds, 8 * STEPS)
    found = find_checkpoints(tmp_path / "checkpoints", "text")
    states = [json.loads((path / "state.json").read_text()) for path in found]
    assert [state["images"] for state in states] == [8 * step for step in range(1, STEPS)]
    seconds = [0.0, *(state["seconds"] for state in states), whole.seconds]
    assert seconds == sorted(seconds) and len(set(seconds)) == STEPS + 1
    (found[-1] / "state.json").write_text(json.dumps(states[-1] | {"seconds": 1000.0}))
    again, _ = finish(tmp_path)
    assert 1000 < again.seconds < 1000 + 60 and again.images == 8 * STEPS
    for key in ("seconds", "images"):
        del states[-1][key]
    (found[-1] / "state.json").write_text(json.dumps(states[-1]))
    again, _ = finish(tmp_path)
    assert again.losses == whole.losses and 0 < again.seconds < 60 and again.images == 8


def test_steps_do_not_depend_on_how_they_are_cut(tmp_path: Path) -> None:
    """One batch of 8 is two accumulated ones of 4."""
    _, two = finish(tmp_path / "two")
    run, loss = start(tmp_path / "one")
    (tmp_path / "one").mkdir()
    run.loop(Accelerator(), lambda step: Batch([torch.cat(draw(step).parts)], 8), loss)
    for key, value in run.modules["net"].state_dict().items():
        assert torch.allclose(value, two[key], atol=1e-6)


def damage(path: Path, how: str) -> None:
    state = json.loads((path / "state.json").read_text())
    if how == "cut":
        whole = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(whole[:-8])
    elif how == "lost":
        (path / "optimizer.safetensors").unlink()
    elif how == "pt":
        path.with_name("text-0000003.pt").write_bytes(b"")
    else:
        key, value = how.split("=")
        (path / "state.json").write_text(json.dumps(state | {key: json.loads(value)}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "text-0000005 cannot be read: .*Move it away"),
        ("lost", "text-0000005 cannot be read: .*optimizer.*Move it away"),
        ("version=2", "text-0000005 cannot be read: its version is 2, and 1 is read here"),
        ("seed=7", "text-0000005 is of another training: its seed is 7, not 0.*--out"),
        ('optimizer="SGD"', "another training: its optimizer is 'SGD', not 'AdamW'"),
        ("pt", "text-0000003.pt is of another training: an earlier release"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path: Path, how: str, message: str) -> None:
    finish(tmp_path)
    damage(tmp_path / "checkpoints" / "text-0000005", how)
    with pytest.raises(ValueError, match=message):
        start(tmp_path)[0].resume()


def test_a_checkpoint_of_another_network_is_named(tmp_path: Path) -> None:
    finish(tmp_path)
    run, _ = start(tmp_path, ema_decay=0.0)
    with pytest.raises(ValueError, match="only one of the two has a moving average"):
        run.resume()
    recipe = TextRecipe(ema_decay=0.9)
    other = Run("text", {"net": torch.nn.Linear(4, 1)}, 1, recipe.rate, recipe, tmp_path,
                "constant", 0)
    with pytest.raises(ValueError, match="its network is another, for example in net.weight"):
        other.resume()


def test_half_a_checkpoint_is_none_and_goes(tmp_path: Path) -> None:
    part = tmp_path / "checkpoints" / ".text-0000009.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"half")
    run, _ = finish(tmp_path)
    assert run.step == STEPS and not part.exists()


def test_removing_is_renaming_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while it removes a checkpoint leaves no half of one."""
    path = tmp_path / "text-0000001"
    checkpoints.save_checkpoint(Checkpoint({}, {}, None, {"stage": "text"}), path)

    def die(folder: Path) -> None:
        (folder / "state.json").unlink()
        raise SystemExit

    monkeypatch.setattr(checkpoints.shutil, "rmtree", die)
    with pytest.raises(SystemExit):
        checkpoints.remove_checkpoint(path)
    assert find_checkpoints(tmp_path, "text") == []


# --- signals and trackers ----------------------------------------------------------------------


def test_signals_while_saving_leave_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in a step, and again, with Ctrl-C, in the save that it starts."""
    run, loss = start(tmp_path, checkpointing_steps=0)
    write = checkpoints.save_file

    def interrupted(part: Tensor) -> Tensor:
        if run.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return loss(part)

    def press_again(*args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", press_again)
        with pytest.raises(KeyboardInterrupt):
            run.loop(Accelerator(), draw, interrupted)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["text-0000002"]
    _, expected = finish(tmp_path / "whole")
    assert same(finish(tmp_path)[1], expected)


def test_tensorboard_gets_what_is_promised(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, loss = start(tmp_path, report_to="tensorboard")
    accelerator = start_accelerator(run.recipe, tmp_path)
    run.loop(accelerator, draw, loss)
    events = EventAccumulator(str(tmp_path / "logs" / "text"))
    events.Reload()
    assert {"train_loss", "lr", "grad_norm", "images_per_second", "skipped_steps"} <= set(
        events.Tags()["scalars"])
    found = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert found == [(k, pytest.approx(loss)) for k, loss in enumerate(run.losses, 1)]
    assert [e.value for e in events.Scalars("lr")][:2] == pytest.approx([0.0, 0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "wandb"}, "report_to is 'wandb', which is not installed: .*pip install"),
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16'.*CUDA.*bf16 or no"),
        ({"use_8bit_adam": True}, "bitsandbytes is not installed: run `pip install bitsandbytes`"),
    ],
)
def test_what_is_not_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("gps_guidance.loop.get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=message):
        start_accelerator(start(tmp_path, **changes)[0].recipe, tmp_path)
