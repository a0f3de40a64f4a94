"""Finished models on the Hub: what is uploaded, what is refused, what an upload that fails costs.

Over real HTTP, by huggingface_hub itself.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import quicken
from hub_server import TOKEN, Hub, Repository, go_to
from train_runs import run_together

from gps_guidance import cli
from gps_guidance.hub import push
from gps_guidance.lora import load_lora_encoder
from gps_guidance.models import load_model
from gps_guidance.recipe import GPSRecipe
from gps_guidance.train import train_model

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    quicken(monkeypatch)
    with Hub() as server:
        go_to(server.url, monkeypatch)
        yield server


def city(base: Path, **changes: Any) -> GPSRecipe:
    given: dict[str, Any] = {
        "base": str(base), "resolution": 32, "max_train_steps": 1, "train_batch_size": 2,
        "crops_per_photo": 1, "validation_steps": 0, "push_to_hub": True, **changes}
    return GPSRecipe(**given)


def downloaded(repository: Repository, folder: Path) -> Path:
    for name, content in repository.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_finished_model_is_uploaded_privately_and_works_from_there(
    hub: Hub, city_dataset: Path, tiny_sd_model: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    out = tmp_path / "somebody" / "city-model"
    train_model(city_dataset, out, city(tiny_sd_model, cache_dir=str(tmp_path / "cache")))
    assert list(hub.repositories) == ["me/city-model"]
    repository = hub.repositories["me/city-model"]
    assert repository.private and repository.commits == 1
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"}  # "": what the client asks for everybody
    local = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(repository.files) == local  # nothing of the training was left in the folder
    assert {"README.md", "recipe.yaml", "train_report.html", "loss.png", "gps_loss.csv",
            "samples-000001.png", "unet/config.json", "model_index.json"} < local
    for name, content in repository.files.items():
        assert str(tmp_path).encode() not in content, name
        assert str(tiny_sd_model).encode() not in content, name
        assert TOKEN.encode() not in content, name
    assert TOKEN not in caplog.text and f"uploaded {out} to {hub.url}/me/city-model" in caplog.text
    recipe = yaml.safe_load(repository.files["recipe.yaml"])
    assert recipe["base"] == tiny_sd_model.name and recipe["max_train_steps"] == 1
    here, there = load_model(out), load_model(downloaded(repository, tmp_path / "there"))
    for name, module in here.modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, there.modules()[name].state_dict()[key]), f"{name}.{key}"


def test_a_lora_is_uploaded_as_its_file(
    hub: Hub, city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    recipe = city(tiny_sd_model, lora_rank=2, hub_model_id="lab/pisa", hub_private_repo=False)
    out = train_model(city_dataset, tmp_path / "m", recipe)
    repository = hub.repositories["lab/pisa"]
    assert not repository.private
    assert set(repository.files) == {"README.md", "gps_loss.csv", "loss.png", LORA, "recipe.yaml",
                                     "samples-000001.png", "train_report.html"}
    assert repository.files[LORA] == (out / LORA).read_bytes()
    there = downloaded(repository, tmp_path / "there")
    assert load_lora_encoder(there).bounds == load_lora_encoder(out).bounds


def test_what_shows_photos_or_is_of_this_machine_stays_here(
    hub: Hub, tiny_gps_model: Path, tmp_path: Path
) -> None:
    folder = downloaded(Repository(True, {
        path.relative_to(tiny_gps_model).as_posix(): path.read_bytes()
        for path in tiny_gps_model.rglob("*") if path.is_file()}), tmp_path / "m")
    for name in ("class_images/00000.png", "latents/a/0.safetensors", "logs/gps/events.1",
                 "photo.jpg", ".gps_encoder.part/config.json", "angle_classifier/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert push(folder) == f"{hub.url}/me/m"
    files = set(hub.repositories["me/m"].files)
    assert "unet/config.json" in files and "angle_classifier/config.json" in files
    assert not [name for name in files if re.match(r"class_images|latents|logs|photo|\.", name)]


def test_nobody_is_logged_in(
    hub: Hub, city_dataset: Path, tiny_sd_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen before anything is done."""
    go_to(hub.url, monkeypatch, token=None)
    with pytest.raises(ValueError, match="Nobody is logged in.*`hf auth login`.*HF_TOKEN"):
        train_model(city_dataset, tmp_path / "m", city(tiny_sd_model))
    assert not (tmp_path / "m").exists() and hub.requests == []


@pytest.mark.parametrize(("refuses", "there", "message"), [
    (("/create", "/models/me/m"), None, "gives no repository 'm'.*403.*OWNER/NAME"),
    ((), Repository(private=False), "me/m is there and public.*hub_private_repo=false"),
])
def test_a_repository_that_cannot_be_had_is_refused_before_any_work(
    hub: Hub, city_dataset: Path, tiny_sd_model: Path, tmp_path: Path, refuses: tuple[str, ...],
    there: Repository | None, message: str
) -> None:
    hub.refuses = refuses
    hub.repositories = {"me/m": there} if there else {}
    with pytest.raises(ValueError, match=message):
        train_model(city_dataset, tmp_path / "m", city(tiny_sd_model))
    assert not (tmp_path / "m").exists()


def test_an_upload_that_fails_costs_no_model_and_its_command_uploads_again(
    hub: Hub, city_dataset: Path, tiny_sd_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a model"
    hub.refuses = ("/commit/main",)
    command = ["train", "gps", str(city_dataset), "--out", str(out), f"base={tiny_sd_model}",
               "resolution=32", "max_train_steps=1", "train_batch_size=2", "validation_steps=0",
               "lora_rank=2", "--push_to_hub", "--hub_model_id", "me/pisa"]
    assert cli.main(command) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"The model is whole in {out}, but not on the Hub" in said and "403" in said
    assert TOKEN not in said
    assert (out / LORA).is_file() and not hub.repositories["me/pisa"].files
    hub.refuses = ()
    assert cli.main(command) == 2  # it does not train again
    assert "already holds a finished model" in capsys.readouterr().err
    again = shlex.split(said.split("To upload it: ")[1])
    assert again[0] == "gps-guidance"
    assert cli.main(again[1:]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/me/pisa"
    assert LORA in hub.repositories["me/pisa"].files and hub.repositories["me/pisa"].private


def test_an_unfinished_model_is_not_uploaded(
    hub: Hub, tiny_gps_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds no finished model"):
        push(tmp_path)
    os.symlink(tiny_gps_model, tmp_path / "m")
    push(tmp_path / "m", "me/whole", private=False)
    assert not hub.repositories["me/whole"].private


def train_by_command(argv: list[str], hub: str, rank: int, processes: int, port: int) -> None:
    """``gps-guidance`` as one of several processes; what it says goes to ``<out>-<rank>.txt``."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TQDM_DISABLE": "1"}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        go_to(hub, patch, token=TOKEN if rank == 0 else None)
        with open(f"{argv[argv.index('--out') + 1]}-{rank}.txt", "w") as said:
            patch.setattr(sys, "stdout", said)
            code = cli.main(argv)
    sys.exit(code)


@pytest.mark.slow
def test_several_processes_say_and_upload_it_once(
    hub: Hub, city_dataset: Path, tiny_sd_model: Path, tmp_path: Path
) -> None:
    """And only the main process has to be logged in."""
    out = tmp_path / "m"
    argv = ["train", "gps", str(city_dataset), "--out", str(out), "--lora_rank=2", "--push_to_hub",
            "--base", str(tiny_sd_model), "--resolution=32", "--max_train_steps=2",
            "--train_batch_size=2", "--validation_steps=0", "--crops_per_photo=1"]
    pair = run_together(2, train_by_command, argv, hub.url)
    for process in pair:
        process.join(200)
    assert [process.exitcode for process in pair] == [0, 0]
    said = [Path(f"{out}-{rank}.txt").read_text() for rank in range(2)]
    assert said == [f"model: {out}\n", ""]
    assert hub.repositories["me/m"].commits == 1
    report = hub.repositories["me/m"].files["train_report.html"].decode()
    assert "2 processes" in report and "8 images in" in report
    assert hub.requests.count("POST /api/repos/create") == 2
