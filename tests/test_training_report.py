"""The page that a training ends with: what it says, shows, and keeps to itself."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CAPTIONS, quicken, write_captions
from PIL import Image
from train_runs import stored

from gps_guidance import cli, train
from gps_guidance.conditions import conditions_of
from gps_guidance.dataset import load_photos
from gps_guidance.loop import Course
from gps_guidance.recipe import AngleRecipe, GPSRecipe, TextRecipe
from gps_guidance.train import train_model
from gps_guidance.training_report import GRIDS, write_training_report


class Page(HTMLParser):
    """A page's pictures in order with the heading and the text of their cell, its links, text and
    blocks of commands; tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.heading, self.text, self.links = "", "", []
        self.pictures: list[SimpleNamespace] = []
        self.rows: list[str] = []
        self.blocks: list[str] = []
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag in ("img", "meta"):
            if tag == "img":
                kind, _, data = str(given["src"]).partition(";base64,")
                picture = Image.open(io.BytesIO(base64.b64decode(data)))
                assert given["alt"] and kind == f"data:image/{str(picture.format).lower()}"
                self.pictures.append(SimpleNamespace(heading=self.heading, name="",
                                                     image=picture.convert("RGB")))
            return
        self.open.append(tag)
        if tag in ("h2", "h3"):
            self.heading = ""
        if tag == "pre":
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        inside = self.open[-1] if self.open else ""
        if inside in ("h2", "h3"):
            self.heading += data
        elif inside == "td" and self.pictures and not self.pictures[-1].name:
            self.pictures[-1].name = data
        elif inside == "th":
            self.rows.append(data)
        elif inside == "pre":
            self.blocks[-1] += data

    def of(self, heading: str) -> list[SimpleNamespace]:
        return [picture for picture in self.pictures if picture.heading.startswith(heading)]

    def sees(self, picture: SimpleNamespace, pixels: np.ndarray) -> None:
        """The picture is that one, as JPEG."""
        assert np.abs(np.asarray(picture.image).astype(float) - pixels).mean() < 6


FEW: dict[str, Any] = {"resolution": 32, "train_batch_size": 4, "crops_per_photo": 1}


@pytest.fixture(scope="module")
def city_run(city_dataset: Path, tiny_sd_model: Path, tmp_path_factory: pytest.TempPathFactory
             ) -> tuple[Path, GPSRecipe]:
    """Folder of a GPS model from four of twelve photos without a caption, and its dataset."""
    root = tmp_path_factory.mktemp("somebody")
    shutil.copytree(city_dataset, root / "small-city")
    write_captions(root / "small-city", (*CAPTIONS, None))
    recipe = GPSRecipe(**FEW, base=str(tiny_sd_model), max_train_steps=4, validation_steps=2,
                       gps_dropout=0.5, cache_dir=str(root / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        train_model(root / "small-city", root / "city-model", recipe)
    return root, recipe


def test_the_page_of_a_city(city_run: tuple[Path, GPSRecipe]) -> None:
    root, recipe = city_run
    out = root / "city-model"
    page = Page(out / "train_report.html")
    for wanted in ("GPS model of small-city", "small-city: 12 photos", "32 x 32 pixels",
                   "3 of 12 photos have no caption", "4 steps, 0 of them skipped; 16 images in",
                   "Rows are prompts. Columns are four places", f"torch {torch.__version__}",
                   "peft", "accelerate", "transformers", "diffusers", "trained in full", "cpu"):
        assert wanted in page.text, wanted
    dropped = re.search(r"in 16 samples: all (\d+), the place alone (\d+), the text alone (\d+)",
                        page.text)
    assert dropped and int(dropped[2]) > 4
    [loss] = page.of("Loss")
    with Image.open(out / "loss.png") as png:
        assert np.array_equal(np.asarray(loss.image), np.asarray(png.convert("RGB")))
    steps = list(dict.fromkeys(p.heading for p in page.of("Step")))
    assert steps == ["Step 2", "Step 4"]
    for step in (2, 4):
        shown = page.of(f"Step {step}")
        assert [picture.name for picture in shown] == [
            "south-west", "south-east", "north-west", "north-east"] * 3
        sheet = np.asarray(Image.open(out / f"samples-{step:06d}.png").convert("RGB"))
        assert sheet.shape == (3 * 32, 4 * 32, 3)
        for k, picture in enumerate(shown):
            row, column = divmod(k, 4)
            page.sees(picture, sheet[32 * row :, 32 * column :][:32, :32])
    assert [row for row in page.rows if row in CAPTIONS] == sorted(CAPTIONS) * 2


def test_its_settings_are_those_that_differ(city_run: tuple[Path, GPSRecipe]) -> None:
    root, recipe = city_run
    text = (root / "city-model" / "train_report.html").read_text("utf-8")
    rows = re.findall(r"<tr><td>(\w+)</td><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert {key: (here, default) for key, here, default in rows} == {
        "base": (Path(recipe.base).name, "stable-diffusion-v1-4"), "resolution": ("32", "512"),
        "train_batch_size": ("4", "512"), "crops_per_photo": ("1", "4"),
        "max_train_steps": ("4", "15000"), "validation_steps": ("2", "200"),
        "gps_dropout": ("0.5", "0.05"), "cache_dir": ("cache", "auto"),
    }
    folded = text.split("<details>")[1].split("</details>")[0]
    assert "<summary>" in folded and "attention_learning_rate: null" in folded


def test_the_page_can_be_mailed(city_run: tuple[Path, GPSRecipe]) -> None:
    """It needs no other file, and tells neither where photos were taken nor whose folder it is."""
    root, recipe = city_run
    path = root / "city-model" / "train_report.html"
    page, text = Page(path), re.sub(r'"data:[^"]+"', "", path.read_text("utf-8"))
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert "url(" not in text and "http" not in text
    rows = pq.read_table(root / "small-city" / "manifest.parquet").to_pylist()
    for row in rows:
        for value in (f"{row['lat']:.3f}", f"{row['lon']:.3f}", row["id"]):
            assert value not in page.text
    assert "43.7" not in page.text and "10.3" not in page.text and "10.4" not in page.text
    for folder in (root, Path(recipe.base).parent, Path.home()):
        assert str(folder) not in page.text
    assert path.stat().st_size < 200_000


def test_many_sheets_are_thinned_out(
    city_run: tuple[Path, GPSRecipe], tmp_path: Path
) -> None:
    root, recipe = city_run
    out = tmp_path / "m"
    shutil.copytree(root / "city-model", out)
    for step in range(6, 42, 2):
        shutil.copy(out / "samples-000002.png", out / f"samples-{step:06d}.png")
    conditions = conditions_of(recipe, load_photos(root / "small-city", recipe.size,
                                                   need_bearings=False))
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    counts = {"all": 1, "place": 2, "text": 3, "nothing": 10}
    write_training_report(out, "<b>", conditions, [
        Course("gps", 40, 7, counts, 8.0, 32), Course("vae", 3, 0, {}, 0.0, 0, 20.125)], None,
        accelerator)
    page = Page(out / "train_report.html")
    steps = [int(h.split()[1]) for h in dict.fromkeys(p.heading for p in page.of("Step"))]
    assert len(steps) == GRIDS and steps == sorted(steps) and (steps[0], steps[-1]) == (2, 40)
    assert max(np.diff(steps)) <= 6
    for wanted in ("Shown are 8 of 20 sheets", "40 steps, 7 of them skipped; 32 images in 8.0 s "
                   "(4.0 images/s", "in 16 samples: all 1, the place alone 2, the text alone 3",
                   "3 steps, 0 of them skipped; 20.12 dB", "2 processes", "GPS model of <b>"):
        assert wanted in page.text, wanted


def test_the_page_of_a_landmark_shows_the_prior(
    miniature_dataset: Path, tiny_sd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    sample = train.sample_texts
    monkeypatch.setattr(train, "sample_texts",
                        lambda *args, **named: sample(*args, num_inference_steps=2, **named))
    recipe = AngleRecipe(**FEW, base=str(tiny_sd_model), max_train_steps=1, num_class_images=2)
    out = train_model(miniature_dataset, tmp_path / "tower", recipe, tmp_path / "prior")
    page = Page(out / "train_report.html")
    assert "Angle model of Miniature Tower of Pisa" in page.text
    assert "No photo in the bins around 10, 20," in page.text
    assert [p.name for p in page.of("Step 1")] == [f"{30 * k}°" for k in range(12)]
    sheet = np.asarray(Image.open(out / "samples-000001.png").convert("RGB"))
    for k, picture in enumerate(page.of("Step 1")):
        row, column = divmod(k, 6)
        page.sees(picture, sheet[32 * row :, 32 * column :][:32, :32])
    priors = page.of("Prior preservation")
    for k, picture in enumerate(priors):
        page.sees(picture, np.asarray(Image.open(tmp_path / "prior" / f"{k:05d}.png")))
    assert len(priors) == 2 and "first 2 of 2 images" in page.text
    [command, _] = page.blocks[-1].splitlines()
    monkeypatch.chdir(tmp_path)
    before = stored(out)
    assert cli.main([*command.split()[1:], "--steps", "2"]) == 0
    assert (tmp_path / "tower.png").is_file() and stored(out).keys() == before.keys()


def test_what_a_text_model_is_for(city_dataset: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)
    recipe = TextRecipe(resolution=16, vae_steps=1, vae_batch_size=2, max_train_steps=1,
                        train_batch_size=2, crops_per_photo=1, validation_steps=0)
    out = train_model(city_dataset, tmp_path / "base", recipe)
    page = Page(out / "train_report.html")
    assert [p.name for p in page.of("Step 1")] == [f"noise {k}" for k in (1, 2, 3, 4)] * 3
    assert re.search(r"1 steps, 0 of them skipped; 2 images in .*; \d+\.\d\d dB", page.text)
    kinds = []
    for line in page.blocks[-1].splitlines():
        args = cli._parse(line.split()[1:])
        assert (args.verb, args.overrides) == ("train", ["base=base"])
        kinds.append(args.kind)
    assert kinds == ["gps", "angle"]
