"""GPS-CLIP: laws of its two sides, DINOv2 from a folder, and its training by the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CITY
from safetensors import safe_open
from transformers import Dinov2Config, Dinov2Model

from gps_guidance import cli
from gps_guidance.gps_clip import GPSClip, start_gps_clip, train_gps_clip
from gps_guidance.judge_recipe import GPSClipRecipe

CORNERS = [(43.70, 10.38), (43.70, 10.42), (43.74, 10.38), (43.71, 10.415)]
FEW = ["base=tiny", "resolution=16", "max_train_steps=3", "train_batch_size=4",
       "lr_warmup_steps=1", "learning_rate=1e-3"]


def untrained(**options: object) -> GPSClip:
    torch.manual_seed(0)
    return GPSClip(CITY.as_tuple(), 16, widths=(8, 16), **options).eval()


def dinov2(folder: Path) -> Path:
    """An untrained DINOv2 of two small layers."""
    torch.manual_seed(4)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
                          image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_embeddings_have_unit_length_and_scores_are_cosines() -> None:
    model = untrained()
    images = torch.rand(4, 3, 20, 30)
    pictures, places = model.embed_images(images), model.embed_positions(CORNERS)
    assert pictures.shape == places.shape == (4, 16)
    for rows in (pictures, places):
        assert torch.allclose(rows.norm(dim=1), torch.ones(4))
    scores = model.score(images, CORNERS)
    assert torch.allclose(scores, 100 * (pictures * places).sum(dim=1), atol=1e-4)
    assert torch.allclose(model.similarities(images, CORNERS).diagonal(), scores, atol=1e-4)


def test_retrieval_ranks_by_the_score() -> None:
    model = untrained()
    images = torch.rand(3, 3, 16, 16)
    order, scores = model.retrieve(images, CORNERS), model.similarities(images, CORNERS).numpy()
    assert [sorted(row) for row in order] == [[0, 1, 2, 3]] * 3
    assert (np.diff(np.take_along_axis(scores, order, axis=1)) <= 0).all()


def test_both_coordinates_go_through_one_network_in_the_papers_order() -> None:
    """Algorithm 1: p(cat[f(x), f(y)]), x the longitude; six layers with GELU between them."""
    model = untrained()
    linear = [layer for layer in model.coordinate if isinstance(layer, torch.nn.Linear)]
    assert len(linear) == 6 and len(model.coordinate) == 11
    x, y = torch.tensor([[-1.0], [0.5]])  # the west edge, and three quarters to the north
    code = torch.cat([model.coordinate(x[None]), model.coordinate(y[None])], dim=1)
    expected = torch.nn.functional.normalize(model.gps_projection(code), dim=-1)
    assert torch.allclose(model.embed_positions([(43.73, 10.38)]), expected, atol=1e-5)
    with pytest.raises(ValueError, match="outside the bounds"):
        model.embed_positions([(10.40, 43.72)])


def test_it_survives_saving(tmp_path: Path) -> None:
    model = untrained()
    model.save_pretrained(tmp_path, safe_serialization=True)
    again = GPSClip.from_pretrained(tmp_path, use_safetensors=True)
    images = torch.rand(4, 3, 16, 16)
    assert again.bounds == CITY
    assert torch.equal(again.score(images, CORNERS), model.score(images, CORNERS))


def test_dinov2_comes_from_a_folder_and_stays_as_it_is(city_dataset: Path, tmp_path: Path) -> None:
    base = dinov2(tmp_path / "dinov2")
    recipe = GPSClipRecipe(base=str(base), resolution=28, max_train_steps=2, train_batch_size=4)
    out = train_gps_clip(city_dataset, tmp_path / "judge", recipe)
    judge = GPSClip.from_pretrained(out, use_safetensors=True)
    own = Dinov2Model.from_pretrained(base)
    for (name, new), old in zip(judge.backbone.named_parameters(), own.parameters(), strict=True):
        assert torch.equal(new, old), name
    start = start_gps_clip(recipe, CITY)
    assert not torch.equal(judge.image_projection.weight, start.image_projection.weight)
    image = torch.rand(1, 3, 28, 28)
    shifted = (image - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225])[:, None, None]
    assert torch.allclose(judge.features(image), own(shifted).pooler_output, atol=1e-5)
    assert judge.image_projection.weight.shape == (24, 24)  # "the same dimensionality as DINOv2"


def test_a_folder_of_something_else_is_refused(tiny_sd_model: Path, tmp_path: Path) -> None:
    for folder in (tiny_sd_model / "text_encoder", tmp_path):
        with pytest.raises(ValueError, match="holds a model of type|cannot be loaded"):
            start_gps_clip(GPSClipRecipe(base=str(folder)), CITY)
    with pytest.raises(ValueError, match="no model folder"):
        start_gps_clip(GPSClipRecipe(), CITY)


def test_it_learns_which_colour_is_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A town whose colour goes with the longitude: photos that were held out are found."""
    from gps_guidance import gps_clip
    from gps_guidance.dataset import Photos

    lons = np.linspace(CITY.west, CITY.east, 120)
    shades = np.linspace(0, 255, 120).astype(np.uint8)
    images = torch.from_numpy(np.stack([shades, 255 - shades, np.full(120, 90, np.uint8)], axis=1))
    photos = Photos(images[:, :, None, None].expand(-1, -1, 24, 24).contiguous(), None,
                    [str(k) for k in range(120)], (16, 16), "", None, bounds=CITY,
                    positions=np.stack([np.full(120, 43.72), lons], axis=1))
    monkeypatch.setattr(gps_clip, "load_photos", lambda *_, **__: photos)
    recipe = GPSClipRecipe(base="tiny", resolution=16, max_train_steps=80, train_batch_size=24,
                           learning_rate=2e-3, lr_warmup_steps=10, held_out_fraction=0.2)
    judge = GPSClip.from_pretrained(train_gps_clip("", tmp_path / "j", recipe))
    assert judge.config.held_out == 24
    assert judge.config.recall_at_1 > 0.2  # chance is 1 / 24
    assert judge.config.median_error_km < 0.4  # over 3.2 km, at random 1.1
    assert list(tmp_path.iterdir()) == [tmp_path / "j"]


def test_the_command(
    city_dataset: Path, miniature_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "judges" / "gps"
    command = ["train", "gps-clip", str(city_dataset), "--out", str(out), *FEW]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip() == f"judge: {out}"
    [weights] = out.glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        assert file.get_slice("gps_projection.weight").get_shape() == [128, 256]
    config = json.loads((out / "config.json").read_text())
    assert (config["bounds"], config["held_out"]) == (list(CITY.as_tuple()), 2)
    for argv, said in (
        (command, "already holds something"),
        ([*command[:4], str(tmp_path / "b"), "--recipe", "gps-nyc"], "neither --recipe"),
        ([*command[:4], str(tmp_path / "b"), "step=3"], "It has resolution"),
        (["train", "gps-clip", str(miniature_dataset), "--out", str(tmp_path / "b"), *FEW],
         "has no bounds"),
    ):
        assert cli.main(argv) == 2
        assert said in capsys.readouterr().err
