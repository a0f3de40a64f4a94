"""One step of training at Stable Diffusion v1.4's size: what moves, what stays, what is saved."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_captions
from safetensors import safe_open
from torch import Tensor
from train_runs import losses

from gps_guidance import cli, conditions, loop

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CAPTION = "a red church in the rain"  # of all photos: one row of validation pictures
RATE, DECAY = 1e-4, 1e-2  # of the recipe gps-nyc
UNET = {  # as v1.4 publishes them
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768, "downsample_padding": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "flip_sin_to_cos": True,
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "in_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_ENCODER = {
    "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 77, "num_attention_heads": 12,
    "num_hidden_layers": 12, "vocab_size": 49408,
}
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of an untrained Stable Diffusion v1.4: 2 GB, removed at the end."""
    folder = tmp_path_factory.mktemp("sd14")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.syspath_prepend(str(BENCHMARKS))
        from sd14 import write_model

        write_model(folder, "text")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture()
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "m"
    shutil.rmtree(tmp_path / "m", ignore_errors=True)  # 4 GB


def train(dataset: Path, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *given: str
          ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``train gps``, one step of one photo at 256 pixels; the encoder's weights around it."""
    around: list[dict[str, Tensor]] = []
    real = loop.Run.loop

    def watched(run: loop.Run, *args: Any) -> None:
        for end in (False, True):
            if end:
                real(run, *args)
            around.append({name: value.detach().clone()
                           for name, value in run.modules["gps_encoder"].state_dict().items()})

    monkeypatch.setattr(loop.Run, "loop", watched)
    monkeypatch.setitem(conditions.SAMPLES, "num_inference_steps", 1)
    assert cli.main([
        "train", "gps", str(dataset), "--out", str(out), "--recipe", "gps-nyc", f"base={base}",
        "resolution=256", "max_train_steps=1", "train_batch_size=1",
        "gradient_accumulation_steps=1", "gradient_checkpointing=true", "condition_dropout=0",
        "gps_dropout=0", "text_dropout=0", "cache_dir=null", *given,
    ]) == 0
    [(_, loss)] = losses(out, "gps")[1:]
    assert math.isfinite(float(loss)) and float(loss) > 0
    before, after = around
    return before, after


def weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a part, one at a time, in the order of their names."""
    [path] = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name).float()


def moved(before: Tensor, after: Tensor) -> bool:
    """Whether a gradient moved it: AdamW's first step is the rate's length, decay far shorter."""
    return float((after - before * (1 - RATE * DECAY)).abs().max()) > RATE / 2


def parts_equal(a: Path, b: Path) -> bool:
    return all(one == other and value.equal(same) for (one, value), (other, same)
               in zip(weights(a), weights(b), strict=True))


def config(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8"))
    return {key: found.get(key) for key in keys}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_trains_all_of_unet_and_encoder_and_nothing_else(
    city_dataset: Path, tmp_path: Path, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs 16 GB of memory: 860 million weights, their gradients and AdamW's two moments."""
    dataset = shutil.copytree(city_dataset, tmp_path / "city")
    write_captions(dataset, [CAPTION])
    before, after = train(dataset, base, out, monkeypatch)
    assert all(moved(before[name], after[name]) for name in before)
    count = 0
    for (name, old), (same, new) in zip(weights(base / "unet"), weights(out / "unet"), strict=True):
        assert name == same and old.shape == new.shape
        assert bool(new.isfinite().all()) and moved(old, new), name
        count += new.numel()
    assert count == 859_520_964  # the published model's
    for part in ("vae", "text_encoder"):
        assert parts_equal(base / part, out / part)
    assert config(out / "unet" / "config.json", UNET) == UNET
    assert config(out / "unet" / "config.json", {"sample_size": 0}) == {"sample_size": 32}
    assert config(out / "vae" / "config.json", VAE) == VAE
    assert config(out / "text_encoder" / "config.json", TEXT_ENCODER) == TEXT_ENCODER
    assert config(out / "scheduler" / "scheduler_config.json", SCHEDULER) == SCHEDULER


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_of_lora_trains_its_layers_and_the_encoder(
    city_dataset: Path, tmp_path: Path, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first factor waits for the second, which is zero before the first step."""
    dataset = shutil.copytree(city_dataset, tmp_path / "city")
    write_captions(dataset, [CAPTION])
    before, after = train(dataset, base, out, monkeypatch, "lora_rank=16")
    assert all(moved(before[name], after[name]) for name in before)
    layers = {name: value for name, value in weights(out) if name.startswith("unet.")}
    assert len(layers) == 2 * 128 and sum(v.numel() for v in layers.values()) == 3_188_736
    second = [value for name, value in layers.items() if name.endswith("lora.up.weight")]
    assert len(second) == 128 and all(moved(torch.zeros(1), value) for value in second)
    assert not (out / "unet").exists()
