"""The pipeline on disk: folders, Stable Diffusion checkpoints, the Hub, LoRA files, model cards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOKEN_DIM
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.pipeline import StableDiffusionGPSPipeline

ROOT = Path(__file__).parents[1]
CENTRE = (43.72, 10.40)


def load(folder, **kwargs):
    pipe = StableDiffusionGPSPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_of(pipe, **kwargs):
    given = {"prompt": "front view", "gps": CENTRE, "num_inference_steps": 2, "output_type": "np",
             "generator": torch.Generator().manual_seed(0), **kwargs}
    return pipe(**given).images


# --- folders ------------------------------------------------------------------------------------


def test_a_trained_folder_is_a_pipeline(tiny_gps_model, tmp_path):
    pipe = load(tiny_gps_model)
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.gps_encoder)} == {
        torch.float32}
    pipe.save_pretrained(tmp_path / "again")
    assert not list(tmp_path.rglob("*.bin"))
    again = load(tmp_path / "again")
    assert again.gps_encoder.bounds == pipe.gps_encoder.bounds
    assert np.array_equal(image_of(again), image_of(pipe))


def test_the_bundled_model_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = load("miniature-pisa")
    assert pipe.gps_encoder.prompt == "A photo of Miniature Tower of Pisa"
    assert pipe.default_size == (64, 64)


def test_half_precision_weights(tiny_gps_model):
    pipe = load(tiny_gps_model, dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.gps_encoder.dtype == torch.bfloat16
    assert np.isfinite(image_of(pipe)).all()


@pytest.mark.parametrize("own", [True, False])
def test_a_checkpoint_of_stable_diffusion_takes_an_encoder(tiny_sd_model, tmp_path, own):
    source = tiny_sd_model
    if own:  # a folder as diffusers itself writes it, with PNDM and no encoder
        source = tmp_path / "sd"
        StableDiffusionPipeline.from_pretrained(tiny_sd_model).save_pretrained(source)
    encoder = GPSEncoder(TOKEN_DIM, bounds=(43.70, 10.38, 43.74, 10.42))
    pipe = load(source, gps_encoder=encoder)
    before = image_of(pipe)
    pipe.save_pretrained(tmp_path / "with")
    assert np.array_equal(image_of(load(tmp_path / "with")), before)


def test_components_move_between_pipelines(tiny_gps_model):
    """``from_pipe`` both ways, without a copy of any weight."""
    pipe = load(tiny_gps_model)
    before = image_of(pipe)
    text = StableDiffusionPipeline.from_pipe(pipe)
    assert text.unet is pipe.unet and text.vae is pipe.vae
    again = StableDiffusionGPSPipeline.from_pipe(text, gps_encoder=pipe.gps_encoder)
    assert all(again.components[name] is part for name, part in pipe.components.items())
    assert np.array_equal(image_of(again), before)


def test_a_checkpoint_without_an_encoder_says_so(tiny_sd_model):
    with pytest.raises(ValueError, match="has no gps_encoder. Give one"):
        load(tiny_sd_model)


def test_custom_pipeline_from_any_working_directory(tiny_gps_model, tmp_path):
    """As from the Hub: one folder, the pipeline by its file, in a process of its own."""
    folder = tmp_path / "hub" / "city"
    load(tiny_gps_model).save_pretrained(folder)
    code = f"""
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(
    {str(folder)!r}, custom_pipeline={str(ROOT / "pipelines" / "stable_diffusion_gps.py")!r},
    trust_remote_code=True)
image = pipe("front view", gps={CENTRE!r}, num_inference_steps=2).images[0]
print(type(pipe).__name__, image.size)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=False, env=_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "StableDiffusionGPSPipeline (32, 32)"


def test_a_folder_may_carry_the_pipelines_file(tiny_gps_model, tmp_path):
    """The community layout: the file beside the weights, named in ``custom_pipeline``."""
    load(tiny_gps_model).save_pretrained(tmp_path / "city")
    shutil.copy(ROOT / "pipelines" / "stable_diffusion_gps.py", tmp_path / "city")
    code = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("city", custom_pipeline="stable_diffusion_gps",
                                         trust_remote_code=True)
print(type(pipe).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=False, env=_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["StableDiffusionGPSPipeline"]


def _environment(tmp_path):
    import os

    return os.environ | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
                         "HF_HUB_OFFLINE": "1"}


# --- model cards and the Hub --------------------------------------------------------------------


def test_the_card_says_what_users_must_know(tiny_gps_model, tmp_path):
    pipe = load(tiny_gps_model)
    pipe.gps_encoder.register_to_config(num_photos=512, photo_license="CC BY 4.0")
    pipe.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "other" and card.data.library_name == "diffusers"
    for wanted in ("(43.7, 10.38, 43.74, 10.42)", "512", "zero tokens", "CC BY 4.0",
                   "gps=(43.72000, 10.40000)"):
        assert wanted in card.text, card.text


def test_the_card_of_a_landmark(tmp_path):
    from gps_guidance.card import model_card

    encoder = AngleEncoder(TOKEN_DIM, landmark="A Tower", null_text="empty", center=(43.7, 10.4))
    card = model_card(encoder, license="apache-2.0")
    assert card.data.license == "apache-2.0"
    for wanted in ("A photo of A Tower", "(43.7, 10.4)", 'embedding of ""', "bearing_deg=90"):
        assert wanted in card.text


def test_a_card_that_somebody_wrote_stays(tiny_gps_model, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    load(tiny_gps_model).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_push_to_hub_uploads_the_folder_with_its_card(tiny_gps_model, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from diffusers.utils import hub_utils

    def upload(repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(hub_utils, "create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe = load(tiny_gps_model)
    pipe.push_to_hub("me/city")
    assert "bounds (south, west, north, east)" in (tmp_path / "me/city/README.md").read_text()
    assert np.array_equal(image_of(load(tmp_path / "me/city")), image_of(pipe))


# --- LoRA ---------------------------------------------------------------------------------------


def lora_file(pipe, folder, encoder=None, seed=0):
    """A LoRA of the UNet with random weights, as a trainer saves it; alpha is not the rank."""
    unet = type(pipe.unet).from_config(pipe.unet.config)
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False,
                                target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = unet.peft_config["default"].to_dict()
    StableDiffusionGPSPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, gps_encoder=encoder, unet_lora_adapter_metadata=metadata)
    return folder


def test_the_encoder_travels_with_the_lora(tiny_sd_model, tmp_path):
    base = load(tiny_sd_model, gps_encoder=GPSEncoder(TOKEN_DIM, bounds=(0, 0, 1, 1)))
    torch.manual_seed(9)
    trained = GPSEncoder(TOKEN_DIM, bounds=(43.70, 10.38, 43.74, 10.42), num_freqs=6)
    folder = lora_file(base, tmp_path, trained)
    assert (folder / "pytorch_lora_weights.safetensors").stat().st_size < 100_000
    own = base.gps_encoder
    before = image_of(base, gps=(0.5, 0.5))

    base.load_lora_weights(folder, adapter_name="pisa")
    assert base.gps_encoder.bounds == trained.bounds
    for key, value in trained.state_dict().items():
        assert torch.equal(base.gps_encoder.state_dict()[key], value)
    with_lora = image_of(base)
    base.set_adapters("pisa", 0.0)
    without = image_of(base)
    assert not np.allclose(with_lora, without)
    base.set_adapters("pisa", 1.0)
    assert np.array_equal(image_of(base), with_lora)
    base.fuse_lora()
    np.testing.assert_allclose(image_of(base), with_lora, atol=1e-4)
    base.unfuse_lora()

    base.unload_lora_weights()
    assert base.gps_encoder is own
    np.testing.assert_allclose(image_of(base, gps=(0.5, 0.5)), before, atol=1e-5)


def test_a_lora_keeps_its_alpha_and_stable_diffusion_reads_the_rest(tiny_gps_model, tmp_path):
    pipe = load(tiny_gps_model)
    plain, whole = lora_file(pipe, tmp_path / "plain"), lora_file(pipe, tmp_path / "whole",
                                                                 pipe.gps_encoder)
    pipe.load_lora_weights(plain)
    expected = image_of(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(whole)
    assert np.array_equal(image_of(pipe), expected)
    tensors = load_file(whole / "pytorch_lora_weights.safetensors")
    assert json.loads(bytes(tensors["gps_encoder.config"].tolist()))["_class_name"] == "GPSEncoder"
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tensors)  # a dictionary works as a file does


def test_two_loras_one_encoder(tiny_gps_model, tmp_path):
    pipe = load(tiny_gps_model)
    first, second = (GPSEncoder(TOKEN_DIM, bounds=(43.70, 10.38, 43.74, 10.42)) for _ in "ab")
    pipe.load_lora_weights(lora_file(pipe, tmp_path / "a", first, 1), adapter_name="a")
    pipe.load_lora_weights(lora_file(pipe, tmp_path / "b", second, 2), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 0.5])
    assert torch.equal(pipe.gps_encoder.axis, second.axis)
    assert set(pipe.get_active_adapters()) == {"a", "b"}


def test_a_damaged_encoder_in_a_lora_is_refused(tiny_gps_model, tmp_path):
    pipe = load(tiny_gps_model)
    folder = lora_file(pipe, tmp_path, pipe.gps_encoder)
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    del tensors["gps_encoder.axis"]
    with pytest.raises(ValueError, match="gps_encoder cannot be read"):
        pipe.load_lora_weights(tensors)
