"""LoRA training: what it changes, what it saves, and that it loads back."""

from __future__ import annotations

import functools
import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CITY, TOKEN_DIM, quicken
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from small_runs import SMALL, launch
from train_runs import ctrl_c_at, losses, stored

from gps_guidance import cli, scorers, train
from gps_guidance.encoders import GPSEncoder
from gps_guidance.lora import load_lora_encoder
from gps_guidance.lora_training import add_lora, lora_layers, save_lora
from gps_guidance.models import DiffusionModel, load_angle_model, load_model
from gps_guidance.pipeline import StableDiffusionGPSPipeline
from gps_guidance.recipe import AngleRecipe, GPSRecipe, Recipe, TextRecipe
from gps_guidance.sampling import sample_angles, sample_gps
from gps_guidance.train import train_model

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def gps_lora(base: Path, **changes: Any) -> GPSRecipe:
    recipe = GPSRecipe(
        base=str(base), resolution=32, max_train_steps=3, train_batch_size=4, learning_rate=1e-2,
        crops_per_photo=1, checkpointing_steps=1, validation_steps=2, lora_rank=2, lora_alpha=4,
        train_text_encoder=True, ema_decay=0.5)
    return replace(recipe, **changes)


def trained(dataset: Path, out: Path, recipe: Recipe) -> DiffusionModel:
    """Train a LoRA, and the model as it was in the trainer when it was saved."""
    seen: list[DiffusionModel] = []
    with pytest.MonkeyPatch.context() as patch:
        real = train.save_lora
        patch.setattr(train, "save_lora",
                      lambda model, *rest: seen.append(model) or real(model, *rest))
        train_model(dataset, out, recipe)
    return seen[0]


def loaded(base: Path, folder: Path) -> DiffusionModel:
    """The base with what ``load_lora_weights`` adds, as parts."""
    encoder = load_lora_encoder(folder)
    pipe: Any = StableDiffusionGPSPipeline.from_pretrained(base, gps_encoder=encoder)
    pipe.load_lora_weights(folder)
    return DiffusionModel(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler,
                          pipe.gps_encoder, str(folder))


def images(model: DiffusionModel) -> torch.Tensor:
    return sample_gps(model, ["a red car", "a blue car"], [(43.71, 10.39), (43.73, 10.41)],
                      (32, 32), num_inference_steps=2)


def test_a_lora_of_a_city_trains_its_layers_and_the_encoder_alone_and_loads_back(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    before, out = stored(tiny_sd_model), tmp_path / "m"
    model = trained(city_dataset, out, gps_lora(tiny_sd_model))
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "gps_loss.csv", "loss.png", FILE, "recipe.yaml", "samples-000002.png",
        "samples-000003.png", "train_report.html",
    ]
    for part in ("unet", "text_encoder", "vae"):
        state = model.modules()[part].state_dict()
        own = {key.replace(".base_layer.", "."): value for key, value in state.items()
               if "lora_" not in key}
        added = [value for key, value in state.items() if ".lora_B." in key]
        assert {f"{part}.{key}" for key in own} == {k for k in before if k.startswith(f"{part}.")}
        assert all(torch.equal(value, before[f"{part}.{key}"]) for key, value in own.items())
        assert len(added) == {"unet": 4 * 8, "text_encoder": 2 * 4, "vae": 0}[part]
        assert all(value.abs().sum() > 0 for value in added)  # each began at 0
    torch.manual_seed(0)
    fresh = GPSEncoder(TOKEN_DIM, bounds=CITY.as_tuple())
    for key, value in load_lora_encoder(out).state_dict().items():
        assert not torch.equal(value, fresh.state_dict()[key]), key
    again = loaded(tiny_sd_model, out)
    assert tuple(again.gps_encoder.config.bounds) == CITY.as_tuple()
    assert torch.equal(images(again), images(model))
    assert not torch.allclose(images(again), images(replace(
        load_model(tiny_sd_model), gps_encoder=again.gps_encoder)))
    assert all(torch.equal(value, stored(tiny_sd_model)[key]) for key, value in before.items())


def test_what_is_saved_is_small_and_says_how_it_is_used(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    """And float16 halves it."""
    size = {}
    for dtype in ("float32", "float16"):
        out = train_model(city_dataset, tmp_path / dtype, gps_lora(
            tiny_sd_model, max_train_steps=1, save_dtype=dtype, validation_steps=0,
            train_text_encoder=False))
        size[dtype] = sum(value.nbytes for value in load_file(out / FILE).values())
        assert not any(str(tiny_sd_model).encode() in path.read_bytes() for path in out.iterdir()
                       if path.name != "recipe.yaml")  # no path of this machine to share
    assert size["float16"] < 0.6 * size["float32"]
    card = ModelCard.load(tmp_path / "float32" / "README.md").text
    assert f"| LoRA of | `{tiny_sd_model.name}` |" in card
    code = card.split("```python\n")[1].split("```")[0]
    page = html.unescape((tmp_path / "float32" / "train_report.html").read_text("utf-8"))
    assert code[: code.index("image =")].strip() in page and "rank 2" in page
    code = code.replace(f"FOLDER OR HUB NAME OF {tiny_sd_model.name}", str(tiny_sd_model))
    code = code.replace("FOLDER OF THIS MODEL", str(tmp_path / "float32"))
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["image"].size == (32, 32)


def test_a_lora_of_stable_diffusion_is_megabytes(tmp_path: Path) -> None:
    """Rank 16 on the UNet of v1.4: two factors for each of four maps in each of 32 attentions."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        model: Any = DiffusionModel(unet, None, None, None, None, GPSEncoder(768), "")
        add_lora(model, GPSRecipe(lora_rank=16))
    layers = list(lora_layers(unet).parameters())
    assert len(layers) == 2 * 4 * 32
    assert sum(p.numel() for p in layers) == 3_188_736
    assert sum(p.numel() for p in model.gps_encoder.parameters()) < 2_000_000


def test_a_lora_that_stops_ends_the_same(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = gps_lora(tiny_sd_model, validation_steps=0)
    whole = train_model(city_dataset, tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        patch.setattr(train, "denoising_loss", ctrl_c_at(3, train.denoising_loss))
        with pytest.raises(KeyboardInterrupt):
            train_model(city_dataset, tmp_path / "m", recipe)
    train_model(city_dataset, tmp_path / "m", recipe)
    assert losses(tmp_path / "m", "gps") == losses(whole, "gps")
    expected, found = load_file(whole / FILE), load_file(tmp_path / "m" / FILE)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    with pytest.raises(ValueError, match="already holds a finished model"):
        train_model(city_dataset, whole, recipe)


def test_without_a_rank_the_text_encoder_trains_in_full(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    before = stored(tiny_sd_model)
    after = stored(train_model(city_dataset, tmp_path, gps_lora(tiny_sd_model, lora_rank=0)))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    for part in ("unet", "text_encoder", "vae"):
        names = {name for name in before if name.startswith(f"{part}.")}
        assert len(names & changed) > 0.9 * len(names) or (part == "vae" and not names & changed)


def test_loras_of_bearings_and_of_captions(
    miniature_dataset: Path, city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    few: dict[str, Any] = {"base": str(tiny_sd_model), "resolution": 32, "max_train_steps": 1,
                           "train_batch_size": 2, "crops_per_photo": 1, "lora_rank": 1,
                           "validation_steps": 0}
    out = train_model(miniature_dataset, tmp_path / "angle", AngleRecipe(
        **few, with_prior_preservation=False))
    pipe: Any = StableDiffusionGPSPipeline.from_pretrained(
        tiny_sd_model, gps_encoder=load_lora_encoder(out))
    pipe.load_lora_weights(out)
    assert pipe(bearing_deg=90, num_inference_steps=1).images[0].size == (32, 32)
    out = train_model(city_dataset, tmp_path / "text", TextRecipe(**few))
    plain: Any = StableDiffusionPipeline.from_pretrained(tiny_sd_model, safety_checker=None)
    plain.load_lora_weights(out)
    assert plain.get_active_adapters() == ["default_0"]
    with pytest.raises(ValueError, match="gps_encoder cannot be read"):
        load_lora_encoder(out)


def test_what_a_lora_cannot_be_is_refused(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    for changes, message in (
        ({"lora_rank": -1}, "lora_rank is -1.*at least 1, or 0 for full"),
        ({"lora_alpha": 0}, "lora_alpha 0.*at least 1, or null"),
        ({"base": "tiny"}, "lora_rank is 2.*base: tiny"),
        ({"lora_target_modules": ["to_nothing"]}, r"lora_target_modules is \['to_nothing'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            train_model(city_dataset, tmp_path, replace(gps_lora(tiny_sd_model), **changes))
    with pytest.raises(ValueError, match=f"has no {FILE}"):
        load_lora_encoder(tmp_path)


def test_a_rate_of_its_own_reaches_the_layers_of_cross_attention(tiny_sd_model: Path) -> None:
    """The layers' names are those of the UNet, and their tensors the same."""
    model = load_model(tiny_sd_model)
    model.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    layers = dict(lora_layers(model.unet).named_parameters())
    own = dict(model.unet.named_parameters())
    assert layers and all(own[name] is parameter for name, parameter in layers.items())
    recipe = GPSRecipe(learning_rate=1e-4, attention_learning_rate=5e-4)
    rates = [recipe.rate(f"unet.{name}") for name in layers]
    assert sorted(set(rates)) == [1e-4, 5e-4]
    assert rates.count(5e-4) == sum(".attn2." in name for name in layers)


def test_a_failed_save_leaves_nothing(
    tiny_gps_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gps_guidance import lora

    model = load_model(tiny_gps_model)
    add_lora(model, GPSRecipe(lora_rank=1))
    monkeypatch.setattr(lora, "save_file", ctrl_c_at(1, lora.save_file))
    with pytest.raises(KeyboardInterrupt):
        save_lora(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert save_lora(model, tmp_path) == tmp_path / FILE


# --- on top of a base, without a pipeline --------------------------------------------------------


@pytest.fixture(scope="module")
def angle_lora(miniature_dataset: Path, tiny_sd_model: Path,
               tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of UNet and text encoder that knows bearings, in half precision."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        return train_model(miniature_dataset, tmp_path_factory.mktemp("lora"), AngleRecipe(
            base=str(tiny_sd_model), resolution=32, max_train_steps=3, train_batch_size=2,
            learning_rate=1e-2, crops_per_photo=1, lora_rank=2, lora_alpha=4,
            train_text_encoder=True, validation_steps=0, with_prior_preservation=False,
            save_dtype="float16"))


def test_a_lora_merged_into_its_base_makes_the_pipelines_images(
    tiny_sd_model: Path, angle_lora: Path
) -> None:
    base, model = load_model(tiny_sd_model), load_angle_model(tiny_sd_model, angle_lora)
    pipe: Any = StableDiffusionGPSPipeline.from_pretrained(
        tiny_sd_model, gps_encoder=load_lora_encoder(angle_lora))
    pipe.load_lora_weights(angle_lora)
    for module in (pipe.unet, pipe.text_encoder):
        module.float()  # the layers were saved in half precision
    expected = sample_angles(replace(model, unet=pipe.unet, text_encoder=pipe.text_encoder,
                                     gps_encoder=pipe.gps_encoder), [30.0, 200.0],
                             num_inference_steps=2)
    merged = sample_angles(model, [30.0, 200.0], num_inference_steps=2)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    without = replace(base, gps_encoder=model.gps_encoder)
    assert (merged - sample_angles(without, [30.0, 200.0], num_inference_steps=2)).abs().max() > 0.1
    for name, module in base.modules().items():
        before, after = module.state_dict(), model.modules()[name].state_dict()
        assert before.keys() == after.keys()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert len(changed) == {"unet": 4 * 8, "text_encoder": 2 * 4, "vae": 0}[name]
        assert not any(p.requires_grad for p in model.modules()[name].parameters())


def test_a_command_samples_a_lora(tiny_sd_model: Path, angle_lora: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    assert cli.main(["sample", str(tiny_sd_model), "--lora", str(angle_lora), "--steps", "2",
                     "--bearing", "0", "90", "--out", str(picture)]) == 0
    model = load_angle_model(tiny_sd_model, angle_lora)
    images = sample_angles(model, [0.0, 90.0], num_inference_steps=2)
    expected = torch.cat(list(images), dim=2).permute(1, 2, 0)
    with Image.open(picture) as png:
        assert abs(np.asarray(png) - np.asarray(expected) * 255).max() < 1


def test_guidance_and_prompts_read_a_lora(tiny_sd_model: Path, angle_lora: Path) -> None:
    """They distil as from the folder of the same model in one piece, and know its landmark."""
    from gps_guidance.lift.guidance import GPSGuidance, GPSGuidanceConfig
    from gps_guidance.lift.plan import placement_of
    from gps_guidance.lift.prompts import GPSPromptProcessor, GPSPromptProcessorConfig

    whole = angle_lora / "whole"
    load_angle_model(tiny_sd_model, angle_lora).save_pretrained(whole)
    c2w = torch.eye(4)[None]
    c2w[:, :3, 3] = torch.tensor([1.0, 2.0, 0.0])
    batch = {"c2w": c2w, **{key: torch.zeros(1) for key in
                            ("azimuth", "elevation", "camera_distances")}}
    found = []
    for folder, lora in ((whole, None), (tiny_sd_model, str(angle_lora))):
        cfg = GPSGuidanceConfig(str(folder), lora_weights=lora)
        guidance = GPSGuidance(cfg)
        prompt = GPSPromptProcessor(GPSPromptProcessorConfig(
            pretrained_model_name_or_path=str(folder), lora_weights=lora))()
        torch.manual_seed(0)
        rgb = torch.full((1, 32, 32, 3), 0.5, requires_grad=True)
        found.append((guidance(rgb, prompt, **batch)["loss_sds"], prompt.prompt,
                      placement_of(cfg)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
    assert found[0][1] == "A photo of Miniature Tower of Pisa"


def test_a_lora_takes_the_3d_way_to_the_report(
    tiny_sd_model: Path, angle_lora: Path, miniature_dataset: Path, tmp_path: Path
) -> None:
    """The classifier of a LoRA lies in its folder; the report samples, and scores by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorers, "fit_angle_classifier", functools.partial(
            scorers.fit_angle_classifier, steps=2))
        scorers.train_angle_classifier(miniature_dataset, angle_lora)
    assert launch("--config", "gps-sds-pisa", "--train", *SMALL, "tag=lora",
                  f"exp_root_dir={tmp_path}",
                  f"system.guidance.pretrained_model_name_or_path={tiny_sd_model}",
                  f"system.guidance.lora_weights={angle_lora}") == 0
    trial = tmp_path / "gps-sds-pisa" / "lora"
    scores = json.loads((trial / "metrics.json").read_text())
    assert scores["lora_weights"] == str(angle_lora)
    assert scores["bearing_within_one_bin"] is not None
    assert "Generated for each bearing" in (trial / "report.html").read_text()


def test_a_lora_where_it_does_not_belong_is_said(
    tiny_sd_model: Path, tiny_angle_model: Path, angle_lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds a LoRA, not a model.*--lora"):
        load_angle_model(angle_lora)
    with pytest.raises(ValueError, match=f"has no {FILE}: give the folder of a LoRA"):
        load_angle_model(tiny_sd_model, tiny_angle_model)
    with pytest.raises(ValueError, match="does not fit the unet of its base.*trained on.*mismatch"):
        load_angle_model("miniature-pisa", angle_lora)
    broken = tmp_path / FILE
    broken.write_bytes((angle_lora / FILE).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{FILE} cannot be read"):
        load_angle_model(tiny_sd_model, tmp_path)
