"""Training: condition dropout, the loss, and runs that stop and go on exactly."""

from __future__ import annotations

import errno
import functools
import logging
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quicken
from train_runs import ctrl_c_at, losses, stored

from gps_guidance import checkpoints, train
from gps_guidance.checkpoints import load_checkpoint
from gps_guidance.draws import dropped
from gps_guidance.encoders import AngleEncoder
from gps_guidance.interrupts import Interrupts, sigterm_as_ctrl_c
from gps_guidance.miniature import nets
from gps_guidance.models import load_angle_model, load_model
from gps_guidance.recipe import AngleRecipe, load_recipe
from gps_guidance.train import denoising_loss, draw_latents, drop_conditions, train_model

FULL_DISK = Path("/dev/full")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def from_scratch(**changes: Any) -> AngleRecipe:
    recipe = AngleRecipe(
        base="tiny", resolution=16, vae_steps=4, vae_batch_size=4, max_train_steps=6,
        train_batch_size=4, learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=1,
        ema_decay=0.9, dither_bins=True, balance_bins=0.5, angle_dropout=0.1,
        with_prior_preservation=False, crops_per_photo=2, checkpointing_steps=2,
        validation_steps=0,
    )
    return replace(recipe, **changes)


def fine_tuning(base: Path, **changes: Any) -> AngleRecipe:
    recipe = AngleRecipe(
        base=str(base), resolution=32, max_train_steps=5, train_batch_size=4, learning_rate=1e-3,
        num_class_images=2, crops_per_photo=1, checkpointing_steps=2, validation_steps=0,
    )
    return replace(recipe, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_dtype": "float8"}, "save_dtype is 'float8'.*float32, float16, bfloat16"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'.*no, bf16 or, on CUDA, fp16"),
        ({"report_to": "paper"}, "report_to is 'paper'.*none, tensorboard or wandb"),
        ({"snr_gamma": 0.0}, "snr_gamma is 0.0.*above 0"),
        ({"max_skipped_steps": 0}, "max_skipped_steps is 0.*at least 1"),
        ({"null_text": "nothing"}, "null_text is 'nothing'"),
        ({"random_flip": True}, "random_flip is true.*another bearing"),
        ({"angle_dropout": 0.95}, r"dropouts .* are \(0.1, 0.95, 0.0\).*at most 1 together"),
        ({"condition_dropout": -0.1}, "dropouts .* from 0"),
        ({"high_noise_fraction": 1.2}, "high_noise_fraction is 1.2.*from 0 to 1"),
        ({"high_noise_from": 1000}, "high_noise_from is 1000.*1000 time steps"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0.*at least 1"),
        ({"resolution": 30}, "resolution is 30.*multiples of 4"),
        ({"base": "CompVis/stable-diffusion-v1-4"}, "no model folder 'CompVis/.*hf download"),
        ({"lr_scheduler": "sometimes"}, "sometimes"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    miniature_dataset: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_model(miniature_dataset, tmp_path, from_scratch(**{"vae_steps": 1} | changes))


# --- the parts of the loss -------------------------------------------------------------------


def test_condition_dropout_by_hand() -> None:
    text, angle = torch.ones(5, 3, 2), torch.full((5, 1, 2), 2.0)
    null = torch.full((1, 3, 2), -1.0)
    draw = torch.tensor([0.04, 0.05, 0.12, 0.16, 0.99])
    which = dropped(draw, (0.05, 0.1, 0.5))
    assert which.tolist() == [0, 1, 1, 2, 3]
    words, turned = drop_conditions(text, angle, null, which)
    assert words[:, 0, 0].tolist() == [-1, 1, 1, -1, 1]
    assert turned[:, 0, 0].tolist() == [0, 0, 0, 2, 2]
    assert torch.equal(words, words[:, :1, :1].expand_as(words))


def test_condition_dropout_takes_its_fractions_of_one_draw() -> None:
    draw = (torch.arange(1000) + 0.5) / 1000
    text, angle, null = torch.ones(1000, 1, 1), torch.ones(1000, 1, 1), torch.zeros(1, 1, 1)
    which = dropped(draw, (0.1, 0.25, 0.05))
    kept_text, kept_angle = drop_conditions(text, angle, null, which)
    pairs = list(zip(kept_text.flatten().tolist(), kept_angle.flatten().tolist(), strict=True))
    assert {pair: pairs.count(pair) for pair in set(pairs)} == {
        (0.0, 0.0): 100, (1.0, 0.0): 250, (0.0, 1.0): 50, (1.0, 1.0): 600
    }
    same_text, same_angle = drop_conditions(text, angle, null, dropped(draw, (0.0, 0.0, 0.0)))
    assert same_text.all() and same_angle.all()


def test_a_drawn_latent_has_the_mean_and_deviation_of_its_moments() -> None:
    moments = torch.zeros(20000, 4, 1, 1)
    moments[:, :2] = torch.tensor([3.0, -1.0])[:, None, None]
    moments[:, 2:] = torch.log(torch.tensor([4.0, 0.25]))[:, None, None]
    torch.manual_seed(0)
    drawn = draw_latents(moments.half(), 0.5, torch.randn(20000, 2, 1, 1))
    assert drawn.dtype == torch.float32
    assert drawn.mean(dim=(0, 2, 3)).tolist() == pytest.approx([1.5, -0.5], abs=0.03)
    assert drawn.std(dim=(0, 2, 3)).tolist() == pytest.approx([1.0, 0.25], rel=0.03)


def test_the_denoising_loss_of_a_model_that_predicts_nothing(tiny_sd_model: Path) -> None:
    """Then Eq. 6 is the mean square of the noise itself."""
    model = load_model(tiny_sd_model)
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    torch.nn.init.zeros_(model.unet.conv_out.bias)
    latents, tokens = torch.randn(64, 4, 8, 8), torch.randn(64, 5, 16)
    noise = torch.randn_like(latents)
    loss = denoising_loss(model, latents, tokens, noise, torch.full((64,), 500))
    assert float(loss) == pytest.approx(float(noise.square().mean()), rel=1e-6)


def test_the_denoising_loss_teaches_unet_and_tokens(tiny_angle_model: Path) -> None:
    model = load_angle_model(tiny_angle_model)
    for module in (model.unet, model.angle):
        module.requires_grad_(True)
    text = model.encode_text([model.angle.prompt])
    tokens = torch.cat([text, model.angle(torch.tensor([40.0]))], dim=1)
    noise, steps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    denoising_loss(model, torch.randn(1, 4, 8, 8), tokens, noise, steps).backward()
    for module in (model.unet.conv_in, model.unet.conv_out, model.angle):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in model.text_encoder.parameters())


# --- from scratch ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(miniature_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run from scratch."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        recipe = from_scratch(validation_steps=3)
        return train_model(miniature_dataset, tmp_path_factory.mktemp("run") / "whole", recipe)


def test_a_run_writes_what_it_promises(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == [
        "README.md", "angle_loss.csv", "gps_encoder", "loss.png", "model_index.json",
        "recipe.yaml", "samples-000003.png", "samples-000006.png", "scheduler",
        "text_encoder", "tokenizer", "train_report.html", "unet", "vae", "vae_loss.csv",
    ]
    assert [row[0] for row in losses(whole)] == ["step", "1", "2", "3", "4", "5", "6"]
    assert [row[0] for row in losses(whole, "vae")] == ["step", "1", "2", "3", "4"]
    assert load_recipe(str(whole / "recipe.yaml")) == from_scratch(validation_steps=3)


def test_the_model_is_one_of_the_datasets_landmark(whole: Path) -> None:
    model = load_angle_model(whole)
    config = model.angle.config
    assert model.angle.prompt == "A photo of Miniature Tower of Pisa"
    assert tuple(config.center) == (43.722952, 10.396597)
    assert (config.num_bins, config.null_text, model.angle.size) == (36, "zeros", (16, 16))
    assert model.vae.config.scaling_factor == 1.0
    assert all(value.isfinite().all() for value in stored(whole).values())


def test_every_part_but_the_vae_has_learned_from_the_losses(whole: Path) -> None:
    torch.manual_seed(0)
    encoder = AngleEncoder(nets.TEXT_DIM, landmark="Miniature Tower of Pisa")
    start = nets.tiny_model([encoder.prompt], encoder)
    end = load_angle_model(whole)
    for name, module in start.modules().items():
        old, new = dict(module.named_parameters()), dict(end.modules()[name].named_parameters())
        changed = sum(not torch.equal(old[key], new[key]) for key in old)
        assert changed > 0.9 * len(old), name


def test_a_run_that_stops_in_each_stage_ends_the_same(
    miniature_dataset: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe, out = from_scratch(validation_steps=3), tmp_path / "m"
    caplog.set_level(logging.INFO, logger="gps_guidance")
    stops = [("vae_loss", 4, "vae", 3), ("denoising_loss", 6, "angle", 5)]
    for name, call, stage, step in stops:
        with monkeypatch.context() as patch:
            patch.setattr(train, name, ctrl_c_at(call, getattr(train, name)))
            with pytest.raises(KeyboardInterrupt):
                train_model(miniature_dataset, out, recipe)
        assert (out / "checkpoints" / f"{stage}-{step:07d}").is_dir()
        assert not (out / "gps_encoder").exists()
        assert f"stopped {stage} at step {step} of" in caplog.text
    assert sorted(p.name for p in (out / "checkpoints").glob("angle-*")) == [
        "angle-0000004", "angle-0000005"  # checkpoints_total_limit
    ]
    train_model(miniature_dataset, out, recipe)
    assert "resumed vae at step 3" in caplog.text and "resumed angle at step 5" in caplog.text
    assert losses(out) == losses(whole)
    assert losses(out, "vae") == losses(whole, "vae")
    ends = [(folder / "train_report.html").read_text("utf-8") for folder in (whole, out)]
    for facts in (r"stage vae</th><td>(4 steps, 0 of them skipped; 16 images)",
                  r"images/s, with checkpoints and samples\); (\d+\.\d\d dB) on training crops",
                  r"stage angle</th><td>(6 steps, 0 of them skipped; 24 images)",
                  r"conditions dropped</th><td>(.*?)</td>"):
        one, other = (re.findall(facts, end) for end in ends)
        assert one == other and len(one) == 1, facts
    expected, found = stored(whole), stored(out)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    for name in ("samples-000003.png", "samples-000006.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / "checkpoints").exists()


def test_another_seed_is_another_run(
    miniature_dataset: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "vae_loss", ctrl_c_at(3, train.vae_loss))
    with pytest.raises(KeyboardInterrupt):
        train_model(miniature_dataset, tmp_path, from_scratch(seed=1))
    found = load_checkpoint(tmp_path / "checkpoints" / "vae-0000002").state["losses"]
    assert [f"{loss:.6f}" for loss in found] != [row[1] for row in losses(whole, "vae")[1:3]]


def test_a_finished_folder_is_not_trained_again(miniature_dataset: Path, whole: Path) -> None:
    before = stored(whole)
    with pytest.raises(ValueError, match="already holds a finished model.*--out"):
        train_model(miniature_dataset, whole, from_scratch())
    assert all(torch.equal(before[name], value) for name, value in stored(whole).items())


def test_sides_without_a_photo_are_named(
    miniature_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "vae_loss", ctrl_c_at(1, train.vae_loss))
    with pytest.raises(KeyboardInterrupt):
        train_model(miniature_dataset, tmp_path, from_scratch(num_bins=4))
    assert "no photo in the bins around" not in caplog.text
    monkeypatch.setattr(train, "vae_loss", ctrl_c_at(1, train.vae_loss))
    with pytest.raises(KeyboardInterrupt):
        train_model(miniature_dataset, tmp_path, from_scratch())
    [warning] = [r.getMessage() for r in caplog.records if "no photo in the bins" in r.message]
    named = warning.split("around ")[1].split(" degrees")[0].split(", ")
    taken = set(train.load_photos(miniature_dataset, (16, 16)).bearings.round(-1) % 360)
    assert {float(b) for b in named} == {10.0 * k for k in range(36)} - taken


def test_the_trained_embedding_of_no_text_is_the_one_that_is_used(
    miniature_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With null_text "empty" and a text encoder that trains, the null tokens move with it."""
    nulls, drop = [], train.drop_conditions

    def watch(text: Any, angle: Any, null_text: torch.Tensor, *rest: Any) -> Any:
        nulls.append(null_text.detach().clone())
        return drop(text, angle, null_text, *rest)

    monkeypatch.setattr(train, "drop_conditions", watch)
    monkeypatch.setattr(train, "denoising_loss", ctrl_c_at(3, train.denoising_loss))
    with pytest.raises(KeyboardInterrupt):
        train_model(miniature_dataset, tmp_path, from_scratch(
            null_text="empty", vae_steps=1, lr_warmup_steps=0, condition_dropout=0.9))
    assert len(nulls) == 3
    assert float((nulls[0] - nulls[2]).abs().max()) > 1e-4


def test_a_run_that_cannot_go_on_says_why(miniature_dataset: Path, tmp_path: Path) -> None:
    recipe = from_scratch(vae_learning_rate=1e30, vae_steps=9, max_skipped_steps=3,
                          checkpointing_steps=0)
    with pytest.raises(ValueError, match=r"3 steps of vae in a row.*step 4: loss (nan|inf).*rate "
                       r"7.5e\+29; last finite loss \d.* at step 1\. Lower the learning rate"):
        train_model(miniature_dataset, tmp_path, recipe)
    assert not (tmp_path / "checkpoints").exists()


# --- Ctrl-C and a full disk ------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_an_update(number: signal.Signals) -> None:
    done, before = [], signal.getsignal(number)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.held(), interrupts.held():
            signal.raise_signal(number)
            done.append("the rest of the update")
        signal.raise_signal(number)  # a second one leaves what the first one does alone
        done.append("what is saved then")
    assert len(done) == 2
    assert signal.getsignal(number) is before
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(number)


def test_sigterm_is_ctrl_c_while_training() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_in_an_update_saves_the_whole_step(
    miniature_dataset: Path, tiny_sd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights after step 1 and the number 1 go into the checkpoint together."""
    real = torch.optim.AdamW.step

    def step_and_ctrl_c(self: torch.optim.AdamW, *args: Any) -> Any:
        result = real(self, *args)
        signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_ctrl_c)
    recipe = fine_tuning(tiny_sd_model, with_prior_preservation=False)
    with pytest.raises(KeyboardInterrupt):
        train_model(miniature_dataset, tmp_path, recipe)
    [path] = (tmp_path / "checkpoints").iterdir()
    saved = load_checkpoint(path)
    assert saved.state["step"] == len(saved.state["losses"]) == 1
    assert saved.state["schedule"]["last_epoch"] == 1
    steps = [value for name, value in saved.optimizer.items() if name.startswith("step.")]
    assert len(steps) == len(saved.optimizer) / 3 and {int(step) for step in steps} == {1}


@pytest.mark.skipif(not FULL_DISK.exists(), reason="/dev/full is Linux's")
def test_a_full_disk_at_a_checkpoint_is_an_os_error_and_leaves_no_part(
    miniature_dataset: Path, tiny_sd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        FULL_DISK.write_bytes(b"the other half")

    monkeypatch.setattr(checkpoints, "save_file", fill)
    recipe = fine_tuning(tiny_sd_model, with_prior_preservation=False)
    with pytest.raises(OSError) as caught:
        train_model(miniature_dataset, tmp_path, recipe)
    assert caught.value.errno == errno.ENOSPC
    assert list((tmp_path / "checkpoints").iterdir()) == []


# --- fine-tuning a base, with prior preservation ---------------------------------------------


def test_fine_tuning_with_prior_preservation(
    miniature_dataset: Path, tiny_sd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[list[str]] = []
    real = train.sample_texts

    def watch(model: Any, prompts: list[str], *args: Any, **options: Any) -> torch.Tensor:
        texts.append(prompts)
        return real(model, prompts, *args, num_inference_steps=2, **options)

    monkeypatch.setattr(train, "sample_texts", watch)
    calls: list[torch.Tensor] = []
    loss = train.denoising_loss
    monkeypatch.setattr(train, "denoising_loss",
                        lambda m, x, tokens, *rest: calls.append(tokens.detach())
                        or loss(m, x, tokens, *rest))
    prior = tmp_path / "prior"
    recipe = fine_tuning(tiny_sd_model, condition_dropout=0.0)
    whole = train_model(miniature_dataset, tmp_path / "whole", recipe, class_data_dir=prior)
    assert texts == [["A photo of Miniature Tower of Pisa"]] * 2
    images = {path.name: path.read_bytes() for path in prior.iterdir()}
    assert sorted(images) == ["00000.png", "00001.png"]
    assert len(calls) == 2 * 5  # Eq. 6 and Eq. 9 in every step
    for photo, preserved in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(photo[:, :-1], preserved[:, :-1])  # one fixed prompt
        assert photo[:, -1].abs().sum() > 0
        assert (preserved[:, -1] == 0).all()  # its angle token is zeroed (A.2.1)

    again = tmp_path / "again"
    half = replace(recipe, save_dtype="float16")
    with monkeypatch.context() as patch:
        patch.setattr(train, "denoising_loss", ctrl_c_at(8, train.denoising_loss))
        with pytest.raises(KeyboardInterrupt):  # in the second loss of step 4
            train_model(miniature_dataset, again, half, class_data_dir=prior)
    train_model(miniature_dataset, again, half, class_data_dir=prior)
    assert len(texts) == 2  # the images are reused
    assert {path.name: path.read_bytes() for path in prior.iterdir()} == images
    assert losses(again) == losses(whole)
    full, halves = stored(whole), stored(again)
    assert all(torch.equal(full[name].half(), halves[name]) for name in full)
    size = {f: sum(p.stat().st_size for p in f.rglob("*.safetensors")) for f in (whole, again)}
    assert 0.45 < size[again] / size[whole] < 0.65  # headers do not shrink

    base, model = load_model(tiny_sd_model), load_angle_model(whole)
    for part in ("vae", "text_encoder"):
        pairs = zip(base.modules()[part].parameters(), model.modules()[part].parameters(),
                    strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), part
    assert not torch.equal(base.unet.conv_in.weight, model.unet.conv_in.weight)
    assert not (whole / "vae_loss.csv").exists()
    assert model.angle.size == (32, 32)


def test_the_prior_weight_is_lambda(
    miniature_dataset: Path, tiny_sd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is that of Eq. 6 + lambda x that of Eq. 9."""
    parts: list[float] = []
    real = ctrl_c_at(3, train.denoising_loss)  # in step 2

    def watch(*args: Any) -> torch.Tensor:
        loss = real(*args)
        parts.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(train, "sample_texts", functools.partial(
        train.sample_texts, num_inference_steps=2))
    monkeypatch.setattr(train, "denoising_loss", watch)
    with pytest.raises(KeyboardInterrupt):
        train_model(miniature_dataset, tmp_path, fine_tuning(tiny_sd_model, prior_loss_weight=3.0))
    assert len(list((tmp_path / "class_images").iterdir())) == 2
    state = load_checkpoint(tmp_path / "checkpoints" / "angle-0000001").state
    photos, preserved = parts
    assert state["losses"] == [pytest.approx(photos + 3.0 * preserved, rel=1e-5)]
