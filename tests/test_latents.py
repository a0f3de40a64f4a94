"""The cache of latents and embeddings: what it holds, how it goes on, what it costs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import quicken
from safetensors import safe_open
from train_runs import ctrl_c_at, losses, stored

from gps_guidance import latents
from gps_guidance.dataset import Photos, load_photos
from gps_guidance.latents import Rows, photo_latents, text_embeddings
from gps_guidance.models import DiffusionModel, load_model
from gps_guidance.photos.manifest import load_manifest
from gps_guidance.recipe import GPSRecipe, Recipe
from gps_guidance.train import train_model

ROOT = Path(__file__).parents[1]
RECIPE = GPSRecipe(resolution=32, crops_per_photo=2, seed=3, min_zoom=0.8, colour_jitter=0.1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD_ROWS", 8)  # four photos of two crops


@pytest.fixture
def model(tiny_sd_model: Path) -> DiffusionModel:
    return load_model(tiny_sd_model)


@pytest.fixture
def photos(city_dataset: Path) -> Photos:
    return load_photos(city_dataset, (32, 32), need_bearings=False, in_memory=False)


def encode(photos: Photos, model: DiffusionModel, folder: Path | None,
           recipe: Recipe = RECIPE) -> Any:
    return photo_latents(photos, model.vae, recipe, folder, Accelerator())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file()}


def everything(rows: Rows) -> torch.Tensor:
    return rows[np.arange(len(rows))]


def of_photos(photos: Photos, picks: list[int]) -> Photos:
    """Some of the photos, in the order of ``picks``."""
    images = torch.stack([photos.images[k] for k in picks])
    return replace(photos, images=images, ids=[photos.ids[k] for k in picks],
                   versions=[photos.versions[k] for k in picks])


# --- what it holds -----------------------------------------------------------------------------


def test_latents_are_the_moments_of_each_crop(photos: Photos, model: DiffusionModel) -> None:
    found = encode(photos, model, None)
    assert found.shape == (12, 2, 8, 8, 8) and found.dtype == torch.float16
    for i in (0, 7):
        for k in range(2):
            name = int.from_bytes(photos.ids[i].encode(), "big")
            rng = np.random.default_rng((3, 7, name, k))
            crop = photos.crop(np.array([i]), rng, 0.8, 0.1)
            with torch.no_grad():
                moments = model.vae.encode(crop).latent_dist.parameters
            assert torch.allclose(moments[0], found[i, k].float(), atol=2e-3, rtol=2e-3)
    assert not torch.allclose(found[:, 0].float(), found[:, 1].float(), atol=2e-2)


def test_from_the_disk_they_are_bit_for_bit_those_in_memory(
    photos: Photos, model: DiffusionModel, city_dataset: Path, tmp_path: Path
) -> None:
    direct, cached = encode(photos, model, None), encode(photos, model, tmp_path)
    assert cached.shape == direct.shape and len(cached) == 12
    assert torch.equal(everything(cached), direct)
    picks, crops = np.array([11, 0, 5, 5]), np.array([1, 0, 1, 0])
    assert torch.equal(cached[picks, crops], direct[picks, crops])
    in_memory = load_photos(city_dataset, (32, 32), need_bearings=False)
    assert torch.equal(encode(in_memory, model, None), direct)
    [folder] = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 3


def test_the_cache_holds_no_position(
    photos: Photos, model: DiffusionModel, city_dataset: Path, tmp_path: Path
) -> None:
    """A shard has pixels of photos and their names, and nothing else."""
    encode(photos, model, tmp_path)
    text_embeddings([caption or "" for caption in photos.captions], model, "no", tmp_path,
                    Accelerator())
    positions = load_manifest(city_dataset).rows.select(["lat", "lon"]).to_pylist()
    written = {f"{value:.4f}".encode() for row in positions for value in row.values()}
    for path in tmp_path.rglob("*.safetensors"):
        assert not any(value in path.read_bytes() for value in written)
        with safe_open(path, "pt") as file:
            assert list(file.keys()) == ["rows"] and list(file.metadata()) == ["names"]
            names = json.loads(file.metadata()["names"])
        assert len(names) == len(set(names)) > 0


def test_texts_are_what_the_encoder_says(model: DiffusionModel, tmp_path: Path) -> None:
    words = ["a red church", "", "front view", "side " * 30, "side " * 40]  # the last two are cut
    for folder in (None, tmp_path):
        texts = text_embeddings(words, model, "no", folder, Accelerator())
        asked = ["front view", "a red church", "front view", "side " * 40]
        expected = torch.cat([model.encode_text([text]) for text in asked])
        assert torch.allclose(texts(asked), expected, atol=1e-5)
    half = text_embeddings(words, model, "bf16", tmp_path, Accelerator())
    assert torch.equal(half(asked), texts(asked).bfloat16().float())
    assert len(list(tmp_path.iterdir())) == 2
    model.text_encoder.get_input_embeddings().weight[0, 0].add_(1.0)
    text_embeddings(words, model, "no", tmp_path, Accelerator())
    assert len(list(tmp_path.iterdir())) == 3


# --- when it is computed again -----------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {"resolution": 16}, {"crops_per_photo": 1}, {"min_zoom": 0.9}, {"colour_jitter": 0.0},
    {"random_flip": True}, {"seed": 4}, "weights", "config",
])
def test_another_setting_or_vae_has_a_folder_of_its_own(
    photos: Photos, model: DiffusionModel, tmp_path: Path, change: Any
) -> None:
    encode(photos, model, tmp_path)
    before, recipe = files(tmp_path), RECIPE
    if change == "weights":
        model.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    elif change == "config":
        model.vae.register_to_config(shift_factor=0.1)
    else:
        recipe = replace(RECIPE, **change)
    images = of_photos(photos, list(range(12)))
    again = encode(replace(images, size=recipe.size), model, tmp_path, recipe)
    assert len(list(tmp_path.iterdir())) == 2
    assert before.items() <= files(tmp_path).items()
    assert torch.equal(everything(again),
                       encode(replace(images, size=recipe.size), model, None, recipe))


def test_what_does_not_change_latents_does_not_compute_them_again(
    photos: Photos, model: DiffusionModel, tiny_sd_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode(photos, model, tmp_path)
    monkeypatch.setattr(type(model.vae), "encode", None)  # would be a TypeError
    recipe = replace(RECIPE, max_train_steps=7, base="elsewhere", train_batch_size=2)
    encode(photos, load_model(tiny_sd_model), tmp_path, recipe)


def test_a_new_or_changed_photo_costs_itself_alone(
    photos: Photos, model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it comes first in the dataset, as its name wants; and the crops stay the same."""
    full = of_photos(photos, list(range(12)))
    expected = encode(full, model, None)
    encode(of_photos(photos, [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]), model, tmp_path)
    seen: list[int] = []
    real = type(model.vae).encode
    monkeypatch.setattr(type(model.vae), "encode",
                        lambda self, x: seen.append(len(x)) or real(self, x))
    found = encode(full, model, tmp_path)
    assert sum(seen) == 2 * 2
    assert torch.allclose(everything(found).float(), expected.float(), atol=2e-3, rtol=2e-3)
    seen.clear()
    fewer = encode(of_photos(photos, [4, 0]), model, tmp_path)
    assert torch.equal(everything(fewer), everything(found)[[4, 0]]) and not seen
    other = replace(full, versions=[full.versions[0] + "0", *full.versions[1:]])
    encode(other, model, tmp_path)  # the same photo, stored at another size
    assert sum(seen) == 2


# --- stops -------------------------------------------------------------------------------------


def test_after_ctrl_c_it_goes_on_with_the_next_shard(
    photos: Photos, model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    encode(photos, model, whole)
    real = type(model.vae).encode
    with monkeypatch.context() as patch:
        patch.setattr(type(model.vae), "encode", ctrl_c_at(2, real))
        with pytest.raises(KeyboardInterrupt):
            encode(photos, model, out)
    first = files(out)
    assert len(first) == 1 and first.items() <= files(whole).items()
    seen: list[int] = []
    monkeypatch.setattr(type(model.vae), "encode",
                        lambda self, x: seen.append(len(x)) or real(self, x))
    encode(photos, model, out)
    assert sum(seen) == 8 * 2
    assert files(out) == files(whole)


FILL = """
import sys
from accelerate import Accelerator
from gps_guidance import latents
from gps_guidance.dataset import load_photos
from gps_guidance.models import load_model
from gps_guidance.recipe import GPSRecipe

dataset, model, out = sys.argv[1:]
latents.SHARD_ROWS, latents.BATCH = 1, 1
photos = load_photos(dataset, (32, 32), need_bearings=False, in_memory=False)
recipe = GPSRecipe(resolution=32, crops_per_photo=1)
latents.photo_latents(photos, load_model(model).vae, recipe, latents.Path(out), Accelerator())
"""


def test_after_kill_9_it_goes_on(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", FILL, city_dataset, tiny_sd_model, out]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(whole).wait() == 0
    running = start(out)
    while not list(out.rglob("*.safetensors")) and running.poll() is None:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert 0 < len(times) < 12
    [folder] = out.iterdir()
    (folder / ".0.safetensors.1.part").write_bytes(b"half")  # as a kill in the middle of a write
    assert start(out).wait() == 0
    assert files(out) == files(whole)
    assert all(path.stat().st_mtime_ns == written for path, written in times.items())


def test_two_processes_share_the_work(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    """To the same bytes as one: with a shard a photo, each encodes every other one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", FILL, city_dataset, tiny_sd_model]
    shared = os.environ | {
        "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*command, tmp_path / "two"], stderr=subprocess.PIPE, text=True,
                         env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert "6/6" in errors[0]  # the bar of the first counts its own
    alone = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "one"], check=True, env=alone)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert len(files(tmp_path / "one")) == 12


@pytest.mark.parametrize("damage", ["cut", "empty", "no names", "fewer rows"])
def test_a_shard_that_cannot_be_read_is_said_and_computed_again(
    photos: Photos, model: DiffusionModel, tmp_path: Path, damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from safetensors.torch import load, save

    encode(photos, model, tmp_path)
    before = files(tmp_path)
    path = sorted(tmp_path.rglob("*.safetensors"))[1]
    data, rows = path.read_bytes(), load(path.read_bytes())["rows"]
    with safe_open(path, "pt") as file:
        names = file.metadata()
    path.write_bytes({"cut": data[:-1], "empty": b"", "no names": save({"rows": rows}),
                      "fewer rows": save({"rows": rows[1:].clone()}, names)}[damage])
    encode(photos, model, tmp_path)
    assert files(tmp_path) == before
    assert f"{path} cannot be read" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_names_the_file(
    photos: Photos, model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(photos, model, tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))
    path.unlink()
    monkeypatch.setattr(latents, "_sweep", lambda folder: None)
    path.with_name(f".{path.name}.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=f"disk is full: {path} needs .* goes on"):
        encode(photos, model, tmp_path)


def test_processes_that_do_not_share_the_disk_are_told(
    photos: Photos, model: DiffusionModel, tmp_path: Path
) -> None:
    class Alone(Accelerator):
        """One of two processes, which never sees what the other wrote."""

        process_index, num_processes = 1, 2

    with pytest.raises(ValueError, match="cache_dir on a disk that all machines share"):
        photo_latents(photos, model.vae, RECIPE, tmp_path, Alone())
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1  # its own share of three
    assert len(encode(photos, model, tmp_path)) == 12


# --- what it costs -----------------------------------------------------------------------------

GROWTH = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from gps_guidance import latents
from gps_guidance.dataset import PhotoFiles, Photos
from gps_guidance.recipe import GPSRecipe

def resident(kind):
    [line] = [l for l in open("/proc/self/status") if l.startswith(kind)]
    return int(line.split()[1]) / 1024

picture, out, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
torch.set_num_threads(1)
vae = AutoencoderKL(block_out_channels=(4,), layers_per_block=1, latent_channels=4,
                    norm_num_groups=4, mid_block_add_attention=False).eval()
latents.SHARD_ROWS, latents.BATCH = 16, 8
recipe = GPSRecipe(resolution=64, crops_per_photo=1)

def photos(first, count):
    names = [str(first + k) for k in range(count)]
    return Photos(PhotoFiles([Path(picture)] * count, (96, 96)), None, names, (64, 64), "", None)

latents.photo_latents(photos(0, 64), vae, recipe, out, Accelerator())  # what libraries take once
write, start, peaks = latents._write_shard, resident("VmRSS"), []

def watch(*shard):
    write(*shard)
    peaks.append(resident("VmHWM"))

latents._write_shard = watch
rows = latents.photo_latents(photos(64, count), vae, recipe, out, Accelerator())
before = resident("RssAnon")
for first in range(0, count, 50):
    rows[np.arange(first, first + 50), np.zeros(50, int)]
print(peaks[-1] - start, resident("RssAnon") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux's")
def test_memory_does_not_grow_with_the_number_of_photos(
    city_dataset: Path, tmp_path: Path
) -> None:
    """800 photos are 22 MB of pixels and 52 MB of latents more than none: neither is in memory."""
    picture = next((city_dataset / "images").iterdir())
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, picture, tmp_path, "800"], capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    encoding, reading = map(float, done.stdout.split())
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) / 2**20
    assert size > 50
    assert encoding < 20, f"{encoding} MiB"
    assert reading < 0.6 * size, f"{reading} MiB of {size}"


# --- training through it -----------------------------------------------------------------------


def test_training_through_the_cache_has_the_losses_of_training_in_memory(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    recipe = GPSRecipe(
        base=str(tiny_sd_model), resolution=32, max_train_steps=3, train_batch_size=4,
        crops_per_photo=2, validation_steps=0, learning_rate=1e-3)
    kept = tmp_path / "cache"
    folders = {"memory": None, "auto": "auto", "kept": str(kept), "again": str(kept)}
    for name, cache_dir in folders.items():
        train_model(city_dataset, tmp_path / name, replace(recipe, cache_dir=cache_dir))
        assert not (tmp_path / name / "latents").exists()  # a model to share holds no photos
    expected, weights = losses(tmp_path / "memory", "gps"), stored(tmp_path / "memory")
    assert len(expected) == 4
    for name in folders:
        assert losses(tmp_path / name, "gps") == expected
        found = stored(tmp_path / name)
        assert all(torch.equal(value, found[key]) for key, value in weights.items())
    assert sorted(path.name.split("-")[0] for path in kept.iterdir()) == ["moments", "texts"]


def test_a_run_that_stops_finds_its_latents_again(
    city_dataset: Path, tiny_sd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from gps_guidance import train

    quicken(monkeypatch)
    caplog.set_level(logging.INFO, logger="gps_guidance")
    recipe = GPSRecipe(base=str(tiny_sd_model), resolution=32, max_train_steps=3,
                       train_batch_size=4, crops_per_photo=2, validation_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(train, "denoising_loss", ctrl_c_at(2, train.denoising_loss))
        with pytest.raises(KeyboardInterrupt):
            train_model(city_dataset, tmp_path / "m", recipe)
    before = files(tmp_path / "m" / "latents")
    assert len(before) == 4  # three shards of photos, one of texts
    shutil.copytree(tmp_path / "m" / "latents", tmp_path / "copy")
    monkeypatch.setattr(type(load_model(tiny_sd_model).vae), "encode", None)
    train_model(city_dataset, tmp_path / "m", recipe)
    assert files(tmp_path / "copy") == before
    assert not (tmp_path / "m" / "latents").exists()
