"""CLIP as a judge: a tiny one of the real classes from a folder, and one trained on captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from gps_guidance import cli
from gps_guidance.image_text import MEAN, STD, load_image_text_scorer
from gps_guidance.miniature.nets import tiny_tokenizer

TEXTS = ["a red car", "a blue car at night", "a house"]
FEW = ["resolution=16", "max_train_steps=3", "train_batch_size=4", "lr_warmup_steps=1"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained CLIP of two small layers a side."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(TEXTS)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
              ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_scores_are_those_of_transformers(clip: Path) -> None:
    scorer = load_image_text_scorer(clip)
    images = torch.rand(3, 3, 32, 32)
    pixels = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    inputs = scorer.tokenizer(TEXTS, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        out = model(pixel_values=pixels, **inputs)
    cosines = 100 * out.image_embeds @ out.text_embeds.T
    assert torch.allclose(scorer.similarities(images, TEXTS), cosines, atol=1e-4)
    assert torch.allclose(scorer.score(images, TEXTS), cosines.diagonal(), atol=1e-4)
    with pytest.raises(ValueError, match="3 images and 2 texts"):
        scorer.score(images, TEXTS[:2])


def test_images_are_prepared_as_clip_does(clip: Path) -> None:
    """Shorter side to 32, bicubic, the middle: as PIL does it, within a level of 255."""
    ramp = np.linspace(0, 255, 96 * 60).reshape(60, 96)
    photo = np.stack([ramp, ramp[::-1], np.sin(ramp) * 40 + 128], axis=-1).astype(np.uint8)
    small = Image.fromarray(photo).resize((51, 32), Image.Resampling.BICUBIC).crop((9, 0, 41, 32))
    scorer = load_image_text_scorer(clip)
    images = [torch.from_numpy(np.array(x)).permute(2, 0, 1)[None] / 255 for x in (photo, small)]
    a, b = (scorer.embed_images(x).detach() for x in images)
    assert float((a * b).sum()) > 0.9999


def test_long_texts_are_cut_off(clip: Path) -> None:
    scorer = load_image_text_scorer(clip)
    assert scorer.tokenize(["a red car " * 20, "a"]).shape == (2, 16)


def test_a_folder_of_something_else_is_refused(tiny_sd_model: Path, tmp_path: Path) -> None:
    for folder in (tiny_sd_model / "unet", tmp_path):
        with pytest.raises(ValueError, match="holds a model of type|cannot be loaded"):
            load_image_text_scorer(folder)


def test_train_clip(city_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clip"
    command = ["train", "clip", str(city_dataset), "--out", str(out), *FEW]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip() == f"judge: {out}"
    assert list(tmp_path.iterdir()) == [out]
    assert json.loads((out / "config.json").read_text())["held_out"] == 2
    scorer = load_image_text_scorer(out)
    assert not any(p.requires_grad for p in scorer.model.parameters())
    scores = scorer.score(torch.rand(2, 3, 40, 30), ["a red car", "a blue car"])
    assert scores.shape == (2,) and (scores.abs() <= 100).all()
    assert cli.main(command) == 2
    assert "already holds something" in capsys.readouterr().err


def test_train_clip_needs_captions(
    miniature_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "clip", str(miniature_dataset), "--out", str(tmp_path / "c")]) == 2
    assert "gps-guidance caption" in capsys.readouterr().err


def test_a_small_clip_tells_colours_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gps_guidance import image_text
    from gps_guidance.dataset import Photos
    from gps_guidance.judge_recipe import ClipRecipe

    colours = {"a red wall": (200, 40, 40), "a green wall": (40, 200, 40),
               "a blue wall": (40, 40, 200), "a grey wall": (120, 120, 120)}
    texts = list(colours) * 12
    pixels = torch.tensor([colours[text] for text in texts], dtype=torch.uint8)
    photos = Photos(pixels[:, :, None, None].expand(-1, -1, 24, 24).contiguous(), None,
                    [str(k) for k in range(48)], (16, 16), "", None, captions=texts)
    monkeypatch.setattr(image_text, "load_photos", lambda *_, **__: photos)
    recipe = ClipRecipe(resolution=16, max_train_steps=40, train_batch_size=16, lr_warmup_steps=5,
                        learning_rate=3e-3, held_out_fraction=0.25)
    scorer = load_image_text_scorer(image_text.train_clip("", tmp_path / "c", recipe))
    assert scorer.model.config.recall_at_1 == 1  # of four captions
    walls = torch.tensor([*colours.values()])[:, :, None, None].expand(-1, -1, 16, 16) / 255
    assert scorer.similarities(walls, [*colours]).argmax(dim=1).tolist() == [0, 1, 2, 3]
