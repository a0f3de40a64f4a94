"""Models that share parts with one beside them: bundled, loaded, trained on, uploaded, refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quicken, tiny_parts
from hub_server import Hub, go_to
from train_runs import stored

from gps_guidance.bundles import bundle
from gps_guidance.encoders import GPSEncoder
from gps_guidance.hub import push
from gps_guidance.lift.prompts import PromptProcessor, PromptProcessorConfig
from gps_guidance.models import BUNDLED, DiffusionModel, load_model
from gps_guidance.parts import PARTS, missing_parts, part_folder
from gps_guidance.pipeline import StableDiffusionGPSPipeline
from gps_guidance.recipe import GPSRecipe
from gps_guidance.train import train_model


@pytest.fixture(scope="module")
def trained(tiny_angle_model: Path, city_dataset: Path,
            tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``models``, in which ``tower`` is complete, ``base`` is a text model with the VAE
    of ``tower``, and ``city`` was trained on ``base``; and with the last two whole."""
    root = tmp_path_factory.mktemp("trained")
    bundle(tiny_angle_model, root / "models" / "tower")
    torch.manual_seed(5)
    base = tiny_parts()
    base.vae = load_model(tiny_angle_model).vae
    base.save_pretrained(root / "base")
    bundle(root / "base", root / "models" / "base", ["tower"])
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        recipe = GPSRecipe(base=str(root / "models" / "base"), resolution=32, max_train_steps=2,
                           train_batch_size=2, crops_per_photo=1, validation_steps=1)
        train_model(city_dataset, root / "city", recipe)
    bundle(root / "city", root / "models" / "city", ["base"])
    return root


@pytest.fixture
def models(trained: Path, tmp_path: Path) -> Path:
    """A copy of the three: those that belong together may be moved together."""
    return shutil.copytree(trained / "models", tmp_path / "moved")


def shared(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "model_index.json").read_text()).get("_shared", {})
    return found


def share(folder: Path, named: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_shared": named}))


def same(one: DiffusionModel, other: DiffusionModel) -> bool:
    assert one.modules().keys() == other.modules().keys()
    return all(torch.equal(value, other.modules()[part].state_dict()[key])
               for part, module in one.modules().items()
               for key, value in module.state_dict().items())


# --- what a bundle holds ---------------------------------------------------------------------


def test_a_part_is_stored_once_and_named_where_it_is(models: Path) -> None:
    """Also where the base itself has it from another: nobody is asked twice."""
    assert shared(models / "tower") == {}
    assert shared(models / "base") == {part: "tower" for part in ("vae", "tokenizer", "scheduler")}
    city = shared(models / "city")
    assert (city["vae"], city["text_encoder"], city["scheduler"]) == ("tower", "base", "tower")
    assert "unet" not in city and (models / "city" / "unet").is_dir()
    for name in ("base", "city"):
        folder = models / name
        assert missing_parts(folder) == []
        assert not [part for part in shared(folder) if (folder / part).exists()]
        assert part_folder(folder, "vae") == models / "tower" / "vae"
    weights = [path.read_bytes() for path in models.rglob("*.safetensors")]
    assert len(weights) == len(set(weights)) == 4 + 2 + 2


def test_a_bundle_has_the_last_picture_and_no_path_of_this_machine(
    models: Path, trained: Path
) -> None:
    folder = models / "city"
    assert {path.name for path in folder.iterdir()} - set(PARTS) == {
        "README.md", "gps_encoder", "gps_loss.csv", "loss.png", "model_index.json", "recipe.yaml",
        "samples.png"}
    last = trained / "city" / "samples-000002.png"
    assert (folder / "samples.png").read_bytes() == last.read_bytes()
    for path in models.rglob("*"):
        assert path.is_dir() or str(trained).encode() not in path.read_bytes(), path
    assert str(trained) in (trained / "city" / "recipe.yaml").read_text()


def test_a_changed_weight_or_setting_is_another_part(
    models: Path, trained: Path, tmp_path: Path
) -> None:
    """But who wrote a config, and under which path, is no setting."""
    whole = shutil.copytree(trained / "city", tmp_path / "whole")
    changes = ({"vae/config.json": {"_name_or_path": "/x", "_diffusers_version": "1"}},
               {"vae/config.json": {"scaling_factor": 0.4}})
    for k, files in enumerate(changes):
        for name, change in files.items():
            path = whole / name
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert ("vae" in shared(bundle(whole, models / f"v{k}", ["base"]))) == (k == 0)
    [weights] = (whole / "text_encoder").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = shared(bundle(whole, models / "v2", ["base"]))
    assert not {"vae", "text_encoder"} & set(found) and found["scheduler"] == "tower"


@pytest.mark.parametrize(("written", "same"), [
    ({"is_local": True, "max_length": 16, "padding_side": "right", "stride": 0}, True),
    ({"padding_side": "left"}, False),
])
def test_a_tokenizer_that_was_loaded_and_saved_is_the_same(
    models: Path, trained: Path, tmp_path: Path, written: dict[str, Any], same: bool
) -> None:
    """transformers then writes how it was called, also into tokenizer.json, and defaults."""
    whole = shutil.copytree(trained / "city", tmp_path / "whole")
    path = whole / "tokenizer" / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items()
                if key not in written}
    path.write_text(json.dumps(settings | written))
    assert ("tokenizer" in shared(bundle(whole, models / "again", ["base"]))) == same


def test_what_cannot_be_bundled_is_refused(models: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="something at .*city: remove it, or give another"):
        bundle(trained / "city", models / "city")
    with pytest.raises(ValueError, match="holds no finished model"):
        bundle(tmp_path, models / "new")
    with pytest.raises(ValueError, match="none is no model to share with: unet, vae"):
        bundle(trained / "city", models / "new", ["none"])
    with pytest.raises(ValueError, match="name alone.*not '../moved/base'"):
        bundle(trained / "city", models / "new", ["../moved/base"])
    assert sorted(path.name for path in models.iterdir()) == ["base", "city", "tower"]


# --- what reads it ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "city"])
def test_it_loads_as_the_complete_one(models: Path, trained: Path, name: str) -> None:
    whole, parts = load_model(trained / name), load_model(models / name)
    assert same(whole, parts)
    assert whole.scheduler.config == parts.scheduler.config
    words = ["a red church in the rain", "nothing"]
    assert torch.equal(whole.tokenize(words), parts.tokenize(words))


def image_of(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    image: torch.Tensor = pipe("a red car", gps=(43.72, 10.40), num_inference_steps=2,
                               output_type="pt", generator=torch.Generator().manual_seed(0)).images
    return image


def test_the_pipeline_is_that_of_the_complete_one(
    models: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By folder and as a bundled model; and what it saves is complete."""
    whole = StableDiffusionGPSPipeline.from_pretrained(trained / "city")
    parts = StableDiffusionGPSPipeline.from_pretrained(models / "city")
    assert torch.equal(image_of(parts), image_of(whole))
    assert {type(part) for part in parts.components.values()} == {
        type(part) for part in whole.components.values()}
    parts.save_pretrained(tmp_path / "saved")
    assert shared(tmp_path / "saved") == {}
    assert all((tmp_path / "saved" / part).is_dir() for part in PARTS)
    monkeypatch.setattr("gps_guidance.models.BUNDLED", models)
    named = StableDiffusionGPSPipeline.from_pretrained("city", torch_dtype=torch.bfloat16)
    assert named.vae.dtype == named.text_encoder.dtype == named.unet.dtype == torch.bfloat16
    assert same(load_model("city"), load_model(trained / "city"))


def test_components_of_ones_own_take_their_place(models: Path) -> None:
    text_encoder = load_model(models / "tower").text_encoder
    pipe = StableDiffusionGPSPipeline.from_pretrained(models / "city", text_encoder=text_encoder)
    assert pipe.text_encoder is text_encoder
    encoder = GPSEncoder(text_encoder.config.hidden_size, bounds=(43.7, 10.38, 43.74, 10.42))
    text = StableDiffusionGPSPipeline.from_pretrained(models / "base", gps_encoder=encoder)
    assert text.gps_encoder is encoder


def test_prompts_for_3d_are_embedded_by_shared_parts(models: Path, trained: Path) -> None:
    def tokens(folder: Path) -> torch.Tensor:
        cfg = PromptProcessorConfig(pretrained_model_name_or_path=str(folder), prompt="a tower")
        return PromptProcessor(cfg)().text_embeddings

    assert torch.equal(tokens(models / "city"), tokens(trained / "city"))


def test_training_does_not_write_over_it(models: Path, city_dataset: Path) -> None:
    recipe = GPSRecipe(base=str(models / "city"), resolution=32, max_train_steps=1)
    with pytest.raises(ValueError, match="base already holds a finished model"):
        train_model(city_dataset, models / "base", recipe)


def test_what_is_uploaded_is_complete(
    models: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    with Hub() as hub:
        go_to(hub.url, monkeypatch)
        push(models / "city", "me/city")
        files = hub.repositories["me/city"].files
    for name, content in files.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    assert shared(tmp_path / "there") == {}
    there, whole = stored(tmp_path / "there"), stored(trained / "city")
    assert there.keys() == whole.keys()
    assert all(torch.equal(value, whole[key]) for key, value in there.items())
    assert "tokenizer/tokenizer.json" in files and "scheduler/scheduler_config.json" in files


# --- what is refused -------------------------------------------------------------------------


def test_a_base_that_is_not_there_is_named_with_what_to_do(models: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(models / "base", tmp_path / "alone")
    encoder = GPSEncoder(16, bounds=(43.7, 10.38, 43.74, 10.42))
    for use in (load_model, push,
                lambda folder: bundle(folder, tmp_path / "out"),
                lambda folder: StableDiffusionGPSPipeline.from_pretrained(folder,
                                                                          gps_encoder=encoder)):
        with pytest.raises(ValueError, match="that of the model tower.*Keep both folders side by"):
            use(alone)


@pytest.mark.parametrize("name", ["../moved/tower", "/etc", "..", ".", "", "tower/", 3, None])
def test_only_a_folder_beside_it_is_read(models: Path, name: Any) -> None:
    share(models / "base", {"vae": name})
    with pytest.raises(ValueError, match="only with a folder beside it.*name alone"):
        load_model(models / "base")


@pytest.mark.parametrize(("named", "message"), [
    ({"../vae": "tower"}, "'../vae', which is none of the parts unet, vae"),
    ({"gps_encoder": "tower"}, "'gps_encoder', which is none of the parts"),
    ("tower", "model_index.json cannot be read"),
])
def test_what_names_no_parts_is_refused(models: Path, named: Any, message: str) -> None:
    share(models / "base", named)
    with pytest.raises(ValueError, match=message):
        load_model(models / "base")


# --- the bundled models ----------------------------------------------------------------------


def test_bundled_models_are_complete_together_and_store_nothing_twice() -> None:
    seen: dict[str, Path] = {}
    for folder in sorted(BUNDLED.iterdir()):
        assert missing_parts(folder) == [] or not (folder / "model_index.json").is_file()
        for path in folder.rglob("*.safetensors"):
            other = seen.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
            assert other == path, f"{path} is {other}: share it (gps_guidance.bundles.bundle)"
        for path in folder.rglob("config.json"):
            assert "_name_or_path" not in json.loads(path.read_text()), path
