"""Training of text and GPS models: Eq. 3, its conditions, exact resuming, and the command line."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, CITY, quicken, write_captions
from PIL import Image
from train_runs import ctrl_c_at, losses, stored

from gps_guidance import cli, train
from gps_guidance.conditions import TextConditions
from gps_guidance.draws import draw_timesteps
from gps_guidance.encoders import GPSEncoder
from gps_guidance.loop import Run
from gps_guidance.models import load_model
from gps_guidance.recipe import AngleRecipe, GPSRecipe, Recipe, TextRecipe, load_recipe
from gps_guidance.train import denoising_loss, train_model

SMALL: dict[str, Any] = {
    "resolution": 16, "max_train_steps": 4, "train_batch_size": 4, "learning_rate": 1e-3,
    "crops_per_photo": 1, "checkpointing_steps": 2, "validation_steps": 2, "ema_decay": 0.9,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def text_recipe(**changes: Any) -> TextRecipe:
    return replace(TextRecipe(**SMALL, vae_steps=2, vae_batch_size=2), **changes)


def gps_recipe(base: Path, **changes: Any) -> GPSRecipe:
    return replace(GPSRecipe(**SMALL, base=str(base), gps_learning_rate=3e-3), **changes)


@pytest.fixture(scope="module")
def text_model(city_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted text model of the city's captions."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        return train_model(city_dataset, tmp_path_factory.mktemp("text") / "m", text_recipe())


@pytest.fixture(scope="module")
def gps_model(city_dataset: Path, text_model: Path,
              tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted GPS model, fine-tuned from it."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        out = tmp_path_factory.mktemp("gps") / "m"
        return train_model(city_dataset, out, gps_recipe(text_model))


# --- the loss ----------------------------------------------------------------------------------


def test_equation_3_by_hand(tiny_gps_model: Path) -> None:
    """With one time step and a UNet that returns a constant c: the mean of (c - e)^2."""
    model = load_model(tiny_gps_model)
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    torch.nn.init.constant_(model.unet.conv_out.bias, 0.5)
    latents, tokens = torch.randn(16, 4, 8, 8), torch.randn(16, 7, 16)
    noise, steps = torch.randn_like(latents), torch.full((16,), 500)
    expected = float((0.5 - noise).square().mean())
    loss = denoising_loss(model, latents, tokens, noise, steps)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_equation_3_is_of_the_noisy_latents_at_the_drawn_steps(tiny_gps_model: Path) -> None:
    model, g = load_model(tiny_gps_model), torch.Generator().manual_seed(0)
    latents, tokens = torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 7, 16, generator=g)
    noise, steps = torch.randn_like(latents), torch.tensor([3, 500, 999])
    alpha = model.scheduler.alphas_cumprod[steps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    expected = (model.unet(noisy, steps, tokens).sample - noise).square().mean()
    loss = denoising_loss(model, latents, tokens, noise, steps)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_time_steps_are_even_or_favour_high_noise() -> None:
    torch.manual_seed(0)
    even = draw_timesteps(20000, 1000)
    assert (even.min(), even.max()) == (0, 999)
    assert float((even >= 650).float().mean()) == pytest.approx(0.35, abs=0.015)
    biased = draw_timesteps(20000, 1000, 0.6, 650)
    assert (biased.min(), biased.max()) == (0, 999)
    high = biased >= 650
    assert float(high.float().mean()) == pytest.approx(0.6, abs=0.015)
    assert float(biased[high].float().mean()) == pytest.approx(824.5, abs=5)
    assert float(biased[~high].float().mean()) == pytest.approx(324.5, abs=10)
    assert (draw_timesteps(50, 1000, 1.0, 650) >= 650).all()
    assert (draw_timesteps(50, 1000, 0.0, 650) < 650).all()


# --- the parts of a step -----------------------------------------------------------------------


def first_tokens(dataset: Path, recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
                 ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Of the first step: text and place tokens before dropout, and the texts."""
    seen: list[Any] = []
    drop, choose = train.drop_conditions, TextConditions.texts

    def watch(text: torch.Tensor, place: torch.Tensor, *rest: Any) -> Any:
        seen.extend([text.detach(), place.detach()])
        raise KeyboardInterrupt

    def listen(self: TextConditions, picks: np.ndarray) -> list[str]:
        seen.append(choose(self, picks))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(train, "drop_conditions", watch)
        patch.setattr(TextConditions, "texts", listen)
        with pytest.raises(KeyboardInterrupt):
            train_model(dataset, out, recipe)
    assert train.drop_conditions is drop
    texts, text, place = seen
    return text, place, texts


def test_a_step_of_gps_training_sees_caption_and_position_of_the_same_photo(
    city_dataset: Path, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = gps_recipe(text_model, checkpointing_steps=0)
    text, place, texts = first_tokens(city_dataset, recipe, tmp_path, monkeypatch)
    photos = train.load_photos(city_dataset, (16, 16), need_bearings=False)
    picks = np.random.default_rng((0, 11, 0)).choice(12, size=4)
    assert texts == [photos.captions[index] for index in picks]
    assert torch.allclose(text, load_model(text_model).encode_text(texts), atol=1e-5)
    torch.manual_seed(0)
    encoder = GPSEncoder(128, bounds=CITY.as_tuple())
    assert place.shape == (4, 2, 128)
    assert torch.allclose(place, encoder(photos.positions[picks]), atol=1e-5)


def test_conditions_are_dropped_in_their_shares_and_counted(
    city_dataset: Path, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With shares that leave nothing, each sample loses one thing, and the null tokens come in."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    drop = train.drop_conditions

    def watch(*args: Any) -> Any:
        found = drop(*args)
        kept.append(found)
        return found

    monkeypatch.setattr(train, "drop_conditions", watch)
    caplog.set_level(logging.INFO, logger="gps_guidance")
    train_model(city_dataset, tmp_path, gps_recipe(
        text_model, condition_dropout=0.25, gps_dropout=0.25, text_dropout=0.5))
    [line] = [r.getMessage() for r in caplog.records if "dropped" in r.message]
    count = [int(n) for n in re.findall(r"\d+", line)]
    assert count[0] == 4 * 4 == sum(count[1:])
    no_text = torch.cat([(text == 0).all(dim=2).all(dim=1) for text, _ in kept])
    no_place = torch.cat([(place == 0).all(dim=2).all(dim=1) for _, place in kept])
    pairs = [(no_text & no_place), (~no_text & no_place), (no_text & ~no_place)]
    assert [int(pair.sum()) for pair in pairs] == count[1:]
    assert min(count[1:]) > 0


def test_a_text_model_drops_text_to_the_embedding_of_nothing(
    city_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nulls: list[torch.Tensor] = []
    drop = train.drop_conditions

    def watch(text: torch.Tensor, place: torch.Tensor, null: torch.Tensor, which: Any) -> Any:
        assert place.shape == (4, 0, 128)
        nulls.append(null.detach().clone())
        return drop(text, place, null, which)

    monkeypatch.setattr(train, "drop_conditions", watch)
    train_model(city_dataset, tmp_path, text_recipe(condition_dropout=0.9))
    assert all(null.abs().sum() > 0 for null in nulls)
    assert float((nulls[0] - nulls[3]).abs().max()) > 1e-5  # it is learned with the text encoder


def test_accumulated_batches_are_one_step(
    city_dataset: Path, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is the mean of its batches, and the optimiser steps once."""
    parts: list[float] = []
    real = train.denoising_loss

    def watch(*args: Any) -> torch.Tensor:
        loss = real(*args)
        parts.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(train, "denoising_loss", watch)
    train_model(city_dataset, tmp_path, gps_recipe(
        text_model, gradient_accumulation_steps=3, max_train_steps=2))
    assert len(parts) == 2 * 3 and len(set(parts)) == 6
    found = [float(loss) for _, loss in losses(tmp_path, "gps")[1:]]
    assert found == pytest.approx([sum(parts[:3]) / 3, sum(parts[3:]) / 3], rel=1e-5)


def test_the_encoder_has_a_rate_of_its_own(tmp_path: Path, tiny_gps_model: Path) -> None:
    model = load_model(tiny_gps_model)
    recipe = GPSRecipe(learning_rate=1e-4, gps_learning_rate=3e-3, attention_learning_rate=5e-4)
    modules = {"unet": model.unet, "gps_encoder": model.gps_encoder}
    run = Run("gps", modules, 4, recipe.rate, recipe, tmp_path, "constant", 0)
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in modules["gps_encoder"].parameters()} == {3e-3}
    for name, parameter in model.unet.named_parameters():
        assert rates[id(parameter)] == (5e-4 if ".attn2." in name else 1e-4), name
    assert len(rates) == sum(len(list(m.parameters())) for m in modules.values())


def test_without_an_axis_embedding_none_is_learned(
    city_dataset: Path, text_model: Path, tmp_path: Path
) -> None:
    train_model(city_dataset, tmp_path, gps_recipe(text_model, axis_embedding=False))
    assert (stored(tmp_path)["gps_encoder.axis"] == 0).all()


# --- whole runs --------------------------------------------------------------------------------


def test_a_text_model_is_a_model_without_a_place(text_model: Path) -> None:
    assert sorted(path.name for path in text_model.iterdir()) == [
        "loss.png", "model_index.json", "recipe.yaml", "samples-000002.png", "samples-000004.png",
        "scheduler", "text_encoder", "text_loss.csv", "tokenizer", "train_report.html", "unet",
        "vae", "vae_loss.csv",
    ]
    model = load_model(text_model)
    assert model.gps_encoder is None
    assert model.unet.config.sample_size == 4  # 16 pixels
    for caption in CAPTIONS:  # its words are the captions' words
        assert len(model.tokenizer(caption).input_ids) == 2 + len(caption.split())
    with Image.open(text_model / "samples-000004.png") as grid:
        assert grid.size == (4 * 16, 3 * 16)
    assert load_recipe(str(text_model / "recipe.yaml"), kind="text") == text_recipe()


def test_a_gps_model_loads_back_and_has_learned(text_model: Path, gps_model: Path) -> None:
    assert sorted(path.name for path in gps_model.iterdir()) == [
        "README.md", "gps_encoder", "gps_loss.csv", "loss.png", "model_index.json", "recipe.yaml",
        "samples-000002.png", "samples-000004.png", "scheduler", "text_encoder", "tokenizer",
        "train_report.html", "unet", "vae",
    ]
    model = load_model(gps_model)
    assert isinstance(model.gps_encoder, GPSEncoder)
    assert tuple(model.gps_encoder.config.bounds) == CITY.as_tuple()
    with Image.open(gps_model / "samples-000004.png") as grid:
        assert grid.size == (4 * 16, 3 * 16)
    before, after = stored(text_model), stored(gps_model)
    for name, value in before.items():  # the base's text encoder and VAE stay as they are
        assert torch.equal(value, after[name]) == (not name.startswith("unet.")), name
    torch.manual_seed(0)
    fresh = GPSEncoder(128, bounds=CITY.as_tuple()).state_dict()
    for name, value in fresh.items():
        assert not torch.equal(value, after[f"gps_encoder.{name}"]), name


@pytest.mark.parametrize("kind", ["text", "gps"])
def test_a_run_that_stops_ends_the_same(
    kind: str, city_dataset: Path, text_model: Path, gps_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    whole = text_model if kind == "text" else gps_model
    recipe: Recipe = text_recipe() if kind == "text" else gps_recipe(text_model)
    caplog.set_level(logging.INFO, logger="gps_guidance")
    with monkeypatch.context() as patch:
        patch.setattr(train, "denoising_loss", ctrl_c_at(4, train.denoising_loss))
        with pytest.raises(KeyboardInterrupt):
            train_model(city_dataset, tmp_path, recipe)
    assert not (tmp_path / "unet").exists()
    train_model(city_dataset, tmp_path, recipe)
    assert f"resumed {kind} at step 3" in caplog.text
    assert losses(tmp_path, kind) == losses(whole, kind)
    expected, found = stored(whole), stored(tmp_path)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    for name in ("samples-000002.png", "samples-000004.png"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_model_is_not_written_over(
    city_dataset: Path, text_model: Path, gps_model: Path, tmp_path: Path
) -> None:
    for out in (text_model, gps_model):
        for recipe in (text_recipe(), gps_recipe(text_model)):
            with pytest.raises(ValueError, match="already holds a finished model.*--out"):
                train_model(city_dataset, out, recipe)
    shutil.copytree(gps_model, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "gps_encoder")  # the disk was full before the last part
    train_model(city_dataset, tmp_path / "m", gps_recipe(text_model))
    found = stored(tmp_path / "m")
    assert all(torch.equal(value, found[name]) for name, value in stored(gps_model).items())


def test_what_cannot_be_trained_is_refused(
    city_dataset: Path, miniature_dataset: Path, text_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="null_text is 'zeros'; a text model"):
        train_model(city_dataset, tmp_path, text_recipe(null_text="zeros"))
    with pytest.raises(ValueError, match="No photo .* has a caption"):
        train_model(miniature_dataset, tmp_path, text_recipe())
    with pytest.raises(ValueError, match="no bounds.*--bbox"):
        train_model(miniature_dataset, tmp_path, gps_recipe(text_model))
    with pytest.raises(ValueError, match="no model folder.*gps-guidance train"):
        train_model(city_dataset, tmp_path, gps_recipe(tmp_path / "none"))
    with pytest.raises(ValueError, match="train gps does not have.*--class-data-dir"):
        train_model(city_dataset, tmp_path, gps_recipe(text_model), tmp_path)


@pytest.mark.parametrize("vae_steps", [0, 2])
def test_a_trained_vae_is_taken_or_trained_on(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path, vae_steps: int
) -> None:
    recipe = text_recipe(pretrained_vae_model_name_or_path=str(tiny_sd_model), vae_steps=vae_steps)
    out = train_model(city_dataset, tmp_path / "m", recipe)
    taken, trained = (load_model(folder).vae.state_dict() for folder in (tiny_sd_model, out))
    same = [torch.equal(value, trained[name]) for name, value in taken.items()]
    assert all(same) if vae_steps == 0 else not any(same)
    assert (out / "vae_loss.csv").exists() == (vae_steps > 0)


def test_an_angle_model_keeps_the_texts_and_images_of_its_base(
    miniature_dataset: Path, text_model: Path, tmp_path: Path
) -> None:
    recipe = AngleRecipe(**SMALL, base=str(text_model), num_class_images=1, null_text="empty")
    out = train_model(miniature_dataset, tmp_path / "m", recipe)
    for part in ("vae", "text_encoder"):
        kept, ours = (next((folder / part).glob("*.safetensors")) for folder in (text_model, out))
        assert kept.read_bytes() == ours.read_bytes(), part


def test_captions_that_are_too_long_are_counted(
    city_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(city_dataset, tmp_path / "d")
    write_captions(tmp_path / "d", ["a car", "one two " * 8])
    train_model(tmp_path / "d", tmp_path / "m", text_recipe(max_train_steps=1))
    assert "1 of 2 texts have more than the 16 tokens" in caplog.text


def test_a_city_through_the_command_line(
    city_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["resolution=16", "max_train_steps=2", "train_batch_size=2", "validation_steps=0",
           "crops_per_photo=1"]
    base, city = tmp_path / "base", tmp_path / "city"
    assert cli.main(["train", "text", str(city_dataset), "--out", str(base), "--recipe",
                     "miniature-city-base", "vae_steps=1", "vae_batch_size=2", *few]) == 0
    assert cli.main(["train", "gps", str(city_dataset), "--out", str(city), "--recipe",
                     "miniature-city", f"base={base}", "random_flip=true", *few]) == 0
    assert capsys.readouterr().out.splitlines() == [f"model: {base}", f"model: {city}"]
    assert isinstance(load_model(city).gps_encoder, GPSEncoder)
    assert cli.main(["train", "gps", str(city_dataset), "--out", str(tmp_path / "no"),
                     "--recipe", "miniature-pisa"]) == 2
    assert "`train angle`, and this is `train gps`" in capsys.readouterr().err
