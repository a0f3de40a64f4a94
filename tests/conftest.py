"""Tiny models of the real diffusers and transformers classes, saved once per session."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.geo import Bounds
from gps_guidance.miniature.nets import tiny_tokenizer
from gps_guidance.miniature.photographer import take_photos
from gps_guidance.models import DiffusionModel
from gps_guidance.photos.ingest import ingest

TOKEN_DIM = 16
RESOLUTION = 32  # pixels; latents are 8 x 8

# What a shell runs in the background ignores Ctrl-C, and Python then leaves it so; tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny_parts(gps_encoder: AngleEncoder | GPSEncoder | None = None) -> DiffusionModel:
    """An untrained latent diffusion model: f4 VAE, two-level UNet, two-layer CLIP text encoder."""
    tokenizer = tiny_tokenizer(["A photo of Leaning Tower of Pisa, side front back view"])
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TOKEN_DIM, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=TOKEN_DIM,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return DiffusionModel(
        unet=UNet2DConditionModel(
            sample_size=RESOLUTION // 4, in_channels=4, out_channels=4, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
            cross_attention_dim=TOKEN_DIM, attention_head_dim=2, norm_num_groups=4,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4,
            norm_num_groups=4, scaling_factor=0.5, sample_size=RESOLUTION,
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        gps_encoder=gps_encoder,
        path="tiny",
    )


@pytest.fixture(scope="session")
def tiny_angle_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny angle model of Pisa, 32 px."""
    folder = tmp_path_factory.mktemp("tiny-angle")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = AngleEncoder(
            cross_attention_dim=TOKEN_DIM, resolution=RESOLUTION, landmark="Leaning Tower of Pisa",
            center=(43.722952, 10.396597),
        )
        tiny_parts(encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny text-to-image model, 32 px."""
    folder = tmp_path_factory.mktemp("tiny-sd")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tiny_parts().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gps_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny GPS model of a city around Pisa, 32 px."""
    folder = tmp_path_factory.mktemp("tiny-gps")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        encoder = GPSEncoder(cross_attention_dim=TOKEN_DIM, bounds=(43.70, 10.38, 43.74, 10.42))
        tiny_parts(encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_photos() -> Path:
    """Folder with the real photo sets ``sakharov``, ``lund`` and ``exif-edge``."""
    folder = os.environ.get("GPS_GUIDANCE_PHOTOS")
    if not folder:
        pytest.skip("GPS_GUIDANCE_PHOTOS does not name a folder of real photos")
    return Path(folder)


@pytest.fixture(scope="session")
def miniature_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of twelve photos of the miniature, as JPEG with EXIF GPS."""
    return take_photos(tmp_path_factory.mktemp("miniature") / "photos", 12, seed=3)


@pytest.fixture(scope="session")
def miniature_dataset(miniature_photos: Path) -> Path:
    """Dataset folder of the twelve photos, without their captions."""
    out = miniature_photos.with_name("dataset")
    ingest([miniature_photos], out, landmark="Miniature Tower of Pisa",
           center=(43.722952, 10.396597), progress=False)
    write_captions(out, [None])
    return out


CITY = Bounds(43.70, 10.38, 43.74, 10.42)
CAPTIONS = ("a red church in the rain", "a blue car", "a red car at night")


def write_captions(dataset: Path, captions: Sequence[str | None]) -> None:
    """Put captions, over and over in the order of the rows, into a dataset folder's manifest."""
    path = dataset / "manifest.parquet"
    table = pq.read_table(path)
    column = [captions[k % len(captions)] for k in range(len(table))]
    place = table.schema.get_field_index("caption")
    captioned = table.set_column(place, table.schema.field(place), pa.array(column, pa.string()))
    pq.write_table(captioned, path)


@pytest.fixture(scope="session")
def city_dataset(miniature_photos: Path) -> Path:
    """Dataset folder of the twelve photos in a box around Pisa, with captions."""
    out = miniature_photos.with_name("city")
    ingest([miniature_photos], out, bounds=CITY, progress=False)
    write_captions(out, CAPTIONS)
    return out


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Training with ``base: tiny``: the same classes with fewer channels, samples in two steps."""
    from gps_guidance import conditions
    from gps_guidance.miniature import nets

    patch.setattr(nets, "tiny_unet", functools.partial(nets.tiny_unet, (8, 16, 16)))
    patch.setattr(nets, "tiny_vae", functools.partial(nets.tiny_vae, (8, 8, 16)))
    patch.setitem(conditions.SAMPLES, "num_inference_steps", 2)
