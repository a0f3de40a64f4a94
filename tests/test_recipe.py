"""Recipes: defaults, the bundled files, overrides, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from gps_guidance.geo import LANDMARKS
from gps_guidance.recipe import KINDS, RECIPES, AngleRecipe, GPSRecipe, TextRecipe, load_recipe

KIND_OF = {"miniature-city-base": "text", "miniature-monuments": "text", "miniature-city": "gps",
           "miniature-city-address": "gps", "gps-nyc": "gps", "gps-paris": "gps"}
FROM_SCRATCH = {"miniature-city-base", "miniature-city-address", "miniature-monuments",
                "miniature-pisa", "tiny-landmark"}


def test_the_defaults_are_the_papers() -> None:
    """Sec. A.2.1: AdamW, constant lr 5e-6, no warm-up, batch 256, 256 px, 800 steps, lambda 1."""
    recipe = load_recipe()
    assert recipe == AngleRecipe()
    assert recipe.base == "CompVis/stable-diffusion-v1-4"
    assert (recipe.learning_rate, recipe.lr_scheduler, recipe.lr_warmup_steps) == (
        5e-6, "constant", 0
    )
    assert (recipe.train_batch_size, recipe.size, recipe.max_train_steps) == (256, (256, 256), 800)
    assert recipe.with_prior_preservation and recipe.prior_loss_weight == 1.0
    assert (recipe.num_bins, recipe.dither_bins, recipe.balance_bins) == (36, False, 0.0)
    assert (recipe.prompt, recipe.null_text) == ("A photo of {landmark}", "zeros")
    assert (recipe.ema_decay, recipe.colour_jitter) == (0.0, 0.0)


def test_the_defaults_of_a_gps_model_are_the_papers() -> None:
    """Sec. 4.1, A.1: 512 px, AdamW 1e-4, batch 512, 15k steps, 5 % of each dropout."""
    recipe = load_recipe(kind="gps")
    assert recipe == GPSRecipe()
    assert recipe.base == "CompVis/stable-diffusion-v1-4"
    assert (recipe.learning_rate, recipe.lr_scheduler, recipe.lr_warmup_steps) == (
        1e-4, "constant", 0
    )
    assert (recipe.train_batch_size, recipe.max_train_steps) == (512, 15000)
    assert recipe.size == (512, 512)
    assert recipe.dropout == (0.05, 0.05, 0.05)
    assert (recipe.null_text, recipe.high_noise_fraction, recipe.random_flip) == (
        "zeros", None, False
    )
    names = ["unet.conv_in.weight", "gps_encoder.axis", "unet.mid_block.attn2.to_k.weight"]
    assert [recipe.rate(name) for name in names] == [1e-4] * 3
    own = GPSRecipe(gps_learning_rate=2e-3, attention_learning_rate=5e-4)
    assert [own.rate(name) for name in names] == [1e-4, 2e-3, 5e-4]


def test_the_dropouts_of_the_other_kinds() -> None:
    assert TextRecipe().dropout == (0.1, 0.0, 0.0)
    assert AngleRecipe(angle_dropout=0.2).dropout == (0.1, 0.2, 0.0)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_bundled_recipe_loads_by_name_and_by_path(path: Path) -> None:
    kind = KIND_OF.get(path.stem, "angle")
    recipe = load_recipe(path.stem, kind=kind)
    assert type(recipe) is KINDS[kind]
    assert recipe == load_recipe(str(path), kind=kind)
    for key, value in OmegaConf.to_container(OmegaConf.load(path)).items():  # type: ignore
        assert getattr(recipe, str(key)) == value
    recipe.check()
    if isinstance(recipe, AngleRecipe):  # from scratch there is no original model to preserve
        assert recipe.with_prior_preservation == (recipe.base != "tiny")
    assert (recipe.base == "tiny") == (path.stem in FROM_SCRATCH)
    assert all(side % 16 == 0 for side in recipe.size)


def test_the_recipes_of_the_cities() -> None:
    base = load_recipe("miniature-city-base", kind="text")
    city = load_recipe("miniature-city", kind="gps")
    assert city.base == "models/miniature-city-base" and city.size == base.size
    assert (city.high_noise_fraction, city.high_noise_from) == (0.45, 650)
    assert city.rate("gps_encoder.axis") > city.rate("unet.conv_in.weight")
    for name in ("gps-nyc", "gps-paris"):
        recipe, paper = load_recipe(name, kind="gps"), GPSRecipe()
        assert recipe.train_batch_size * recipe.gradient_accumulation_steps == 512
        for key in ("base", "resolution", "max_train_steps", "learning_rate", "lr_scheduler",
                    "adam_weight_decay", "dropout", "null_text", "high_noise_fraction"):
            assert getattr(recipe, key) == getattr(paper, key)


def test_the_recipes_of_the_monuments() -> None:
    base = load_recipe("miniature-monuments", kind="text")
    arch = load_recipe("miniature-arch")
    assert arch.base == "models/miniature-monuments" and arch.size == base.size
    assert arch.null_text == base.null_text  # what the base knows as no text


def test_a_trained_vae_is_for_tiny_networks_alone() -> None:
    TextRecipe(pretrained_vae_model_name_or_path="miniature-pisa", vae_steps=0).check()
    with pytest.raises(ValueError, match="'miniature-pisa', but the base m has a VAE"):
        TextRecipe(base="m", pretrained_vae_model_name_or_path="miniature-pisa").check()
    with pytest.raises(ValueError, match="vae_steps is 0.*pretrained_vae_model_name_or_path"):
        TextRecipe(vae_steps=0).check()


def test_the_recipes_of_the_landmarks() -> None:
    """All six are the defaults, which are the paper's, split into batches for one card."""
    assert {path.stem for path in RECIPES.glob("angle-*.yaml")} == {f"angle-{k}" for k in LANDMARKS}
    paper = AngleRecipe()
    for key, landmark in LANDMARKS.items():
        recipe = load_recipe(f"angle-{key}")
        assert recipe.train_batch_size * recipe.gradient_accumulation_steps == 256
        assert recipe.gradient_checkpointing and recipe.mixed_precision == "bf16"
        assert replace(recipe, train_batch_size=256, gradient_accumulation_steps=1,
                       gradient_checkpointing=False, mixed_precision="no") == paper
        text = (RECIPES / f"angle-{key}.yaml").read_text("utf-8")
        assert landmark.name in text and f"--recipe angle-{key} " in text


def test_a_recipe_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match="'dither_bins'. It is a key of `train angle`.*train gps"):
        load_recipe("miniature-pisa", kind="gps")
    with pytest.raises(ValueError, match="'attention_learning_rate'. It is a key of `train gps`"):
        load_recipe("miniature-city", kind="text")


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 7\nmax_train_steps: 10\nresolution: [96, 64]\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"), ["max_train_steps=20", "ema_decay=0.5"])
    assert (recipe.seed, recipe.max_train_steps, recipe.ema_decay) == (7, 20, 0.5)
    assert recipe.size == (96, 64)
    assert load_recipe(None, ["resolution=[32,48]"]).size == (32, 48)
    assert load_recipe(None, ["prompt=a {landmark} at noon"]).prompt == "a {landmark} at noon"
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_recipe(str(tmp_path / "empty.yaml")) == AngleRecipe()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", ["max_train_step=3"], r"no key 'max_train_step'\. Did you mean 'max_train_steps'\?"),
        ("learning_rat: 3", [], "no key 'learning_rat'.*'learning_rate'.*vae_steps"),
        ("", ["optimizer.lr=1"], "no key 'optimizer'"),
        ("", ["max_train_steps=many"], "'many'.*Integer.*max_train_steps"),
        ("seed: [1", [], "recipe"),
        ("- seed\n- 3\n", [], "recipe|no key"),
        ("", ["seed"], "seed"),
    ],
)
def test_a_wrong_recipe_is_said_in_one_line(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(str(tmp_path / "mine.yaml"), overrides)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_bundled_ones() -> None:
    with pytest.raises(ValueError, match="'nowhere'.*gps-nyc.*miniature-pisa, tiny-landmark"):
        load_recipe("nowhere")


@pytest.mark.parametrize("resolution", ["wide", [64], [64, 0], 0, [64, 64, 3], 1.5, None])
def test_a_resolution_is_one_or_two_numbers(resolution: Any) -> None:
    with pytest.raises(ValueError, match=r"resolution is .*\[height,width\]"):
        AngleRecipe(resolution=resolution).size  # noqa: B018
