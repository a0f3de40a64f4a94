"""Baselines and ablations in the one training loop: address for GPS, no bearing, text alone."""

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
from conftest import CAPTIONS, TOKEN_DIM, quicken
from diffusers import StableDiffusionPipeline
from train_runs import losses, stored

from gps_guidance import cli
from gps_guidance.conditions import AddressConditions, AngleConditions, conditions_of
from gps_guidance.dataset import load_photos
from gps_guidance.geocoding import AddressCache, address_prompt, cells_of, geocode
from gps_guidance.lora import load_lora_encoder
from gps_guidance.miniature.nets import tiny_model
from gps_guidance.models import load_angle_model, load_model
from gps_guidance.photos.manifest import load_manifest
from gps_guidance.recipe import AngleRecipe, GPSRecipe
from gps_guidance.sampling import sample_angles, sample_texts
from gps_guidance.train import train_model

STREETS = ("Via Roma", "Piazza Manin", "Via Santa Maria")
FEW: dict[str, Any] = {
    "max_train_steps": 2, "train_batch_size": 4, "learning_rate": 1e-3, "crops_per_photo": 1,
    "validation_steps": 0,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


@pytest.fixture(scope="module")
def addressed(city_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset folder of twelve captioned photos, of which each has an address but the last."""
    out = Path(shutil.copytree(city_dataset, tmp_path_factory.mktemp("addressed") / "d"))
    rows = load_manifest(out).rows.to_pylist()
    cells = cells_of([[row["lat"], row["lon"]] for row in rows])
    assert len(set(cells)) == 12
    with AddressCache(out.with_name("cache")) as cache:
        cache.add({cell: f"{STREETS[k % 3]}, Pisa" for k, cell in enumerate(cells)}, "me")
        cache.add({cells[11]: ""}, "me")
    geocode(out, out.with_name("cache"), offline=True)
    return out


@pytest.fixture(scope="module")
def address_model(addressed: Path, tiny_sd_model: Path,
                  tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        out = tmp_path_factory.mktemp("address-model") / "m"
        return train_model(addressed, out, address_recipe(tiny_sd_model))


def address_recipe(base: Path | str, **changes: Any) -> GPSRecipe:
    return replace(GPSRecipe(**FEW, base=str(base), resolution=16, condition="address",
                             null_text="empty"), **changes)


def no_angle(base: Path | str, **changes: Any) -> AngleRecipe:
    recipe = AngleRecipe(**FEW, base=str(base), resolution=16, condition="text",
                         num_class_images=1, vae_steps=1, vae_batch_size=2)
    return replace(recipe, **changes)


# --- an address for GPS ------------------------------------------------------------------------


def test_the_address_is_told_after_the_caption(
    addressed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = load_photos(addressed, (16, 16), need_bearings=False)
    recipe = address_recipe("tiny")
    conditions = conditions_of(recipe, photos)
    assert type(conditions) is AddressConditions
    assert conditions.texts(np.array([1, 3, 11])) == [
        "a blue car, Piazza Manin, Pisa", "a red church in the rain, Via Roma, Pisa", CAPTIONS[2]]
    assert conditions.texts(np.array([4])) == [address_prompt(CAPTIONS[1], photos.addresses[4])]
    assert conditions.encoder(TOKEN_DIM) is None
    assert "1 of 12 photos have no address" in caplog.text
    # a GPS model loses something of 15 % of its samples, this one the text of as many
    assert recipe.dropout == (pytest.approx(0.15), 0.0, 0.0)
    assert replace(recipe, condition="gps").dropout == (0.05, 0.05, 0.05)


def test_an_address_model_is_trained_and_saved_as_a_text_model(
    addressed: Path, tiny_sd_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gps_guidance")
    out = train_model(addressed, tmp_path / "m", address_recipe(tiny_sd_model))
    assert not (out / "gps_encoder").exists() and len(losses(out, "gps")) == 3
    before, after = load_model(tiny_sd_model), load_model(out)
    assert after.gps_encoder is None
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight)
    card, recipe = (out / "README.md").read_text(), (out / "recipe.yaml").read_text()
    assert "Images by text and address" in card and "address_prompt(" in card
    assert "condition: address" in recipe
    rows = load_manifest(addressed).rows.to_pylist()
    words = [*STREETS, "Pisa", *(f"{row['lat']:.4f}" for row in rows)]
    for text in (card, recipe, caplog.text.replace(str(tmp_path), "")):
        assert not any(word in text for word in words)
    for again in (address_recipe(tiny_sd_model), GPSRecipe(base=str(tiny_sd_model))):
        with pytest.raises(ValueError, match="already holds a finished model"):
            train_model(addressed, out, again)


def test_its_report_tells_no_address(address_model: Path) -> None:
    page = (address_model / "train_report.html").read_text("utf-8")
    text = re.sub(r'"data:[^"]+"', "", page)
    assert "<h1>Address model of d</h1>" in text and "<th>text 1</th>" in text
    assert "1 of 12 photos have no address: their text is the caption." in text
    assert not [name for name in (*STREETS, "Pisa", *CAPTIONS) if name in text]


def test_the_python_of_its_card_makes_images_of_addresses(address_model: Path) -> None:
    code = (address_model / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for old, new in (("FOLDER OR HUB NAME OF THIS MODEL", str(address_model)),
                     (")).images", "), num_inference_steps=1).images")):
        assert old in code
        code = code.replace(old, new)
    found: dict[str, Any] = {}
    exec(code, found)
    assert type(found["pipe"]) is StableDiffusionPipeline and found["image"].size == (16, 16)


def test_another_address_is_another_image(address_model: Path) -> None:
    model = load_model(address_model)
    prompts = [address_prompt("a red car", street) for street in (*STREETS[:2], None)]
    one, other, bare = (sample_texts(model, [prompt], (16, 16), num_inference_steps=1)
                        for prompt in prompts)
    again = sample_texts(model, prompts[:1], (16, 16), num_inference_steps=1)
    assert torch.equal(one, again)
    assert not torch.equal(one, other) and not torch.equal(one, bare)


def test_the_text_baseline_is_trained_from_a_base(
    addressed: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    out, few = tmp_path / "m", [f"{key}={value}" for key, value in FEW.items()]
    assert cli.main(["train", "text", str(addressed), "--out", str(out), "resolution=16",
                     f"base={tiny_sd_model}", *few]) == 0
    before, after = stored(tiny_sd_model), stored(out)
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"unet"} and not (out / "gps_encoder").exists()


def test_an_address_model_from_scratch_knows_its_streets(addressed: Path) -> None:
    photos = load_photos(addressed, (16, 16), need_bearings=False)
    conditions = conditions_of(address_recipe("tiny"), photos)
    model = tiny_model(conditions.words, conditions.encoder(TOKEN_DIM))
    tokens = model.tokenizer("a red church in the rain, Via Santa Maria, Pisa").input_ids
    assert len(tokens) == 6 + 1 + 3 + 1 + 1 + 2  # words, signs, start and end


def test_an_address_lora_has_its_base_on_the_card(
    addressed: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    out = train_model(addressed, tmp_path / "m", address_recipe(tiny_sd_model, lora_rank=2))
    card = (out / "README.md").read_text()
    assert f"HUB NAME OF {tiny_sd_model.name}" in card and "load_lora_weights" in card
    assert StableDiffusionPipeline.lora_state_dict(out, use_safetensors=True)


@pytest.mark.parametrize(("recipe", "message"), [
    (GPSRecipe(base="tiny", condition="street"), "condition is 'street'.* gps or address"),
    (AngleRecipe(base="tiny", condition="gps"), "condition is 'gps'.* angle or text"),
    (GPSRecipe(base="tiny", condition="address"), "null_text is 'zeros'.*add null_text=empty"),
    (GPSRecipe(base="tiny", condition="address", null_text="empty"),
     "No photo .* has an address.*`gps-guidance geocode DATASET --cache FILE`"),
])
def test_what_does_not_fit_is_refused(
    city_dataset: Path, miniature_dataset: Path, tmp_path: Path, recipe: Any, message: str
) -> None:
    dataset = city_dataset if recipe.kind == "gps" else miniature_dataset
    with pytest.raises(ValueError, match=message):
        train_model(dataset, tmp_path, recipe)


# --- no bearing --------------------------------------------------------------------------------


def test_the_images_of_a_model_without_the_bearing_do_not_depend_on_it(
    miniature_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    recipe = no_angle(tiny_sd_model, with_prior_preservation=False)
    out = train_model(miniature_dataset, tmp_path / "m", recipe)
    model = load_angle_model(out)
    bearings = torch.arange(0.0, 360.0, 7.5)
    assert torch.equal(model.angle(bearings), model.angle.null(len(bearings)))
    one, other = (sample_angles(model, [bearing], num_inference_steps=2) for bearing in (0.0, 90.0))
    assert torch.equal(one, other)
    before = load_model(tiny_sd_model)
    assert not torch.equal(before.unet.conv_in.weight, model.unet.conv_in.weight)
    assert "changes nothing: trained without it" in (out / "README.md").read_text()
    assert "condition: text" in (out / "recipe.yaml").read_text()


def test_without_the_bearing_the_same_is_drawn(miniature_dataset: Path) -> None:
    """Photos, crops, noise and bearings: the two differ in what the tokens say alone."""
    photos = load_photos(miniature_dataset, (16, 16))
    with_it, without = (AngleConditions(no_angle("tiny", condition=condition, dither_bins=True),
                                        photos) for condition in ("angle", "text"))
    picks = np.arange(12)
    drawn = [c.draw_places(picks, np.random.default_rng(3)) for c in (with_it, without)]
    assert np.array_equal(*drawn) and with_it.words == without.words
    torch.manual_seed(0)
    assert not with_it.encoder(TOKEN_DIM).is_silent
    after = torch.rand(1)
    torch.manual_seed(0)
    assert without.encoder(TOKEN_DIM).is_silent and torch.equal(torch.rand(1), after)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {}, {"lora_rank": 2}, {"with_prior_preservation": False, "base": "tiny"},
])
def test_no_bearing_by_every_way_of_training(
    miniature_dataset: Path, tiny_sd_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = replace(no_angle(tiny_sd_model), **changes)
    out = train_model(miniature_dataset, tmp_path / "m", recipe)
    encoder = load_lora_encoder(out) if recipe.lora_rank else load_angle_model(out).angle
    assert encoder.is_silent
    assert (out / "class_images").is_dir() == recipe.with_prior_preservation
