"""Model folders: what loads, what is refused and why, what is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RESOLUTION, TOKEN_DIM, tiny_parts
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.models import (
    BUNDLED,
    DiffusionModel,
    load_angle_encoder,
    load_angle_model,
    load_model,
    resolve_model,
    save_module,
)
from gps_guidance.scorers import AngleClassifier


@pytest.fixture(scope="module")
def bundled() -> DiffusionModel:
    return load_angle_model("miniature-pisa")


def weights(model: DiffusionModel) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part, module in model.modules().items() for name, value in module.state_dict().items()
    }


# --- names -----------------------------------------------------------------------------------


def test_a_bundled_name_and_a_folder_resolve(tiny_sd_model: Path) -> None:
    assert resolve_model("miniature-pisa") == BUNDLED / "miniature-pisa"
    assert resolve_model(str(tiny_sd_model)) == tiny_sd_model


def test_a_folder_of_ones_own_comes_before_a_bundled_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "miniature-pisa").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("miniature-pisa").resolve() == tmp_path / "miniature-pisa"


def test_a_missing_model_is_named_with_the_ones_there_are() -> None:
    with pytest.raises(ValueError, match="'outputs/none'.*gps-guidance train.*miniature-pisa"):
        load_angle_model("outputs/none")


# --- the bundled model -----------------------------------------------------------------------


def test_the_bundled_model_has_the_real_classes_and_is_frozen(bundled: DiffusionModel) -> None:
    assert isinstance(bundled.unet, UNet2DConditionModel)
    assert isinstance(bundled.vae, AutoencoderKL)
    assert isinstance(bundled.text_encoder, CLIPTextModel)
    assert isinstance(bundled.tokenizer, CLIPTokenizer)
    assert isinstance(bundled.scheduler, DDPMScheduler)
    assert isinstance(bundled.gps_encoder, AngleEncoder)
    for module in bundled.modules().values():
        assert not module.training
        for parameter in module.parameters():
            assert not parameter.requires_grad
            assert parameter.dtype == torch.float32
            assert parameter.isfinite().all()


def test_the_bundled_model_knows_its_landmark(bundled: DiffusionModel) -> None:
    config = bundled.angle.config
    assert bundled.angle.prompt == "A photo of Miniature Tower of Pisa"
    assert tuple(config.center) == (43.722952, 10.396597)
    assert (bundled.angle.size, config.num_bins) == ((64, 64), 36)
    ids = bundled.tokenizer(bundled.angle.prompt).input_ids
    assert bundled.tokenizer.decode(ids, skip_special_tokens=True).strip() == (
        "a photo of miniature tower of pisa"
    )
    assert len(ids) == 2 + 7  # each word is one token, between start and end


@pytest.mark.parametrize("folder", sorted(BUNDLED.iterdir()), ids=lambda folder: folder.name)
def test_a_bundled_folder_is_small_and_holds_half_precision_safetensors(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert {path.suffix for path in files} <= {
        ".json", ".safetensors", ".md", ".yaml", ".csv", ".png", ".log"
    }
    stored = [path for path in files if path.suffix == ".safetensors"]
    assert stored
    for path in stored:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_the_bundled_classifier_says_how_good_it_is() -> None:
    judge = AngleClassifier.from_pretrained(
        BUNDLED / "miniature-pisa" / "angle_classifier", use_safetensors=True
    )
    assert judge.config.num_bins == 36
    assert judge.config.held_out >= 100
    assert 0.5 < judge.config.accuracy <= judge.config.within_one <= 1.0


# --- what is refused -------------------------------------------------------------------------


def test_a_gps_model_is_not_an_angle_model(tiny_gps_model: Path) -> None:
    for load in (load_angle_model, load_angle_encoder):
        with pytest.raises(ValueError, match="GPS model.*GPSEncoder.*angle model.*train angle"):
            load(tiny_gps_model)
    city = load_model(tiny_gps_model).gps_encoder
    assert isinstance(city, GPSEncoder) and city.config.bounds == [43.70, 10.38, 43.74, 10.42]


def test_a_text_model_is_not_an_angle_model(tiny_sd_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a text model.*AngleEncoder.*train angle"):
        load_angle_model(tiny_sd_model)
    with pytest.raises(ValueError, match="holds no finished model.*train angle"):
        load_angle_model(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_an_incomplete_folder_names_what_is_missing(
    tiny_angle_model: Path, tmp_path: Path, part: str
) -> None:
    shutil.copytree(tiny_angle_model, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / part)
    with pytest.raises(ValueError, match=f"not a complete model folder: {part} missing"):
        load_angle_model(tmp_path / "m")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "gps_encoder"])
def test_only_safetensors_are_read(tiny_angle_model: Path, tmp_path: Path, part: str) -> None:
    """Pickled weights can run any code, so that a folder which has only those is refused."""
    shutil.copytree(tiny_angle_model, tmp_path / "m")
    module = load_angle_model(tiny_angle_model).modules()[part]
    [stored] = (tmp_path / "m" / part).glob("*.safetensors")
    stored.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(module.state_dict(), tmp_path / "m" / part / name)
    with pytest.raises(ValueError, match=f"{part} cannot be loaded.*safetensors"):
        load_angle_model(tmp_path / "m")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "gps_encoder"])
def test_damaged_weights_are_said(tiny_angle_model: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_angle_model, tmp_path / "m")
    [stored] = (tmp_path / "m" / part).glob("*.safetensors")
    stored.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{part} cannot be loaded"):
        load_angle_model(tmp_path / "m")


# --- what is written -------------------------------------------------------------------------


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(4)
    encoder = AngleEncoder(cross_attention_dim=TOKEN_DIM, resolution=[48, RESOLUTION],
                           landmark="Stonehenge", center=(51.178882, -1.826215),
                           null_text="empty", num_bins=12)
    model = tiny_parts(encoder)
    model.save_pretrained(tmp_path)
    again = load_angle_model(tmp_path)
    before, after = weights(model), weights(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.angle.size == (48, RESOLUTION)
    assert again.angle.prompt == "A photo of Stonehenge"
    assert torch.equal(again.scheduler.alphas_cumprod, model.scheduler.alphas_cumprod)
    assert again.scheduler.config.clip_sample is False
    prompt = "A photo of Leaning Tower of Pisa, side view"
    assert again.tokenizer(prompt).input_ids == model.tokenizer(prompt).input_ids
    model.freeze()
    assert torch.equal(again.encode_text([prompt]), model.encode_text([prompt]))


def test_half_precision_loads_as_single(tiny_angle_model: Path, tmp_path: Path) -> None:
    model = load_angle_model(tiny_angle_model)
    full = weights(load_angle_model(tiny_angle_model))
    for module in model.modules().values():
        module.half()
    model.save_pretrained(tmp_path)
    for name, value in weights(load_angle_model(tmp_path)).items():
        if value.is_floating_point():
            assert value.dtype == torch.float32
            assert torch.equal(value, full[name].half().float())


def test_the_encoder_alone(tiny_angle_model: Path) -> None:
    encoder = load_angle_encoder(tiny_angle_model)
    whole = load_angle_model(tiny_angle_model).angle
    bearings = torch.tensor([0.0, 91.0])
    assert torch.equal(encoder(bearings), whole(bearings))
    written = json.loads((tiny_angle_model / "gps_encoder" / "config.json").read_text())
    assert written["center"] == [43.722952, 10.396597]


def test_null_text_follows_the_saved_convention(
    tiny_angle_model: Path, tiny_sd_model: Path
) -> None:
    model = load_angle_model(tiny_angle_model)
    length = model.tokenizer.model_max_length
    assert torch.equal(model.null_text(2), torch.zeros(2, length, TOKEN_DIM))
    model.angle.register_to_config(null_text="empty")
    assert torch.equal(model.null_text(2)[1:], model.encode_text([""]))
    plain = load_model(tiny_sd_model)
    assert torch.equal(plain.null_text(1), plain.encode_text([""]))


class _FullDisk:
    """Something to save on a disk that is full, with the error that safetensors raises there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def save_pretrained(self, folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise SafetensorError(
            f"Error while serializing: I/O error: {os.strerror(self.number)} "
            f"(os error {self.number})"
        )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path: Path, number: int) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "old").write_text("whole")
    with pytest.raises(OSError, match="unet") as caught:
        save_module(_FullDisk(number), tmp_path / "unet")
    assert caught.value.errno == number
    assert [path.name for path in tmp_path.rglob("*")] == ["unet", "old"]


def test_another_error_of_safetensors_stays_one(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError):
        save_module(_FullDisk(errno.EIO), tmp_path / "unet")
    assert list(tmp_path.iterdir()) == []
