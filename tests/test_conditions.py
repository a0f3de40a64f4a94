"""What each kind of model is told: captions, positions, bearings; and what a dataset must have."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, CITY, TOKEN_DIM, write_captions

from gps_guidance.conditions import (
    AngleConditions,
    GPSConditions,
    TextConditions,
    conditions_of,
)
from gps_guidance.dataset import Photos, load_photos
from gps_guidance.encoders import GPSEncoder
from gps_guidance.models import load_model
from gps_guidance.photos.ingest import ingest
from gps_guidance.photos.manifest import load_manifest
from gps_guidance.recipe import AngleRecipe, GPSRecipe, TextRecipe

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def photos(city_dataset: Path) -> Photos:
    return load_photos(city_dataset, (32, 32), need_bearings=False)


def test_a_city_has_captions_positions_and_bounds_but_no_bearings(
    photos: Photos, city_dataset: Path
) -> None:
    rows = load_manifest(city_dataset).rows.to_pylist()
    assert photos.captions == [row["caption"] for row in rows] == [*CAPTIONS] * 4
    assert photos.positions.dtype == np.float64
    assert photos.positions.tolist() == [[row["lat"], row["lon"]] for row in rows]
    assert photos.bounds == CITY
    assert (photos.bearings, photos.center, photos.landmark) == (None, None, "")


def test_the_kind_follows_the_recipe(photos: Photos, miniature_dataset: Path) -> None:
    assert type(conditions_of(TextRecipe(), photos)) is TextConditions
    assert type(conditions_of(GPSRecipe(), photos)) is GPSConditions
    landmark = load_photos(miniature_dataset, (32, 32))
    assert type(conditions_of(AngleRecipe(), landmark)) is AngleConditions


def test_texts_are_the_captions_of_the_picked_photos(photos: Photos) -> None:
    for conditions in (TextConditions(TextRecipe(), photos), GPSConditions(GPSRecipe(), photos)):
        assert conditions.texts(np.array([4, 0, 2])) == [CAPTIONS[1], CAPTIONS[0], CAPTIONS[2]]
        assert conditions.words == sorted(CAPTIONS)
        assert conditions.prompts == sorted(CAPTIONS)
        assert conditions.weights is None


def test_places_are_the_encoders_tokens_of_the_positions(
    photos: Photos, tiny_gps_model: Path, tiny_sd_model: Path
) -> None:
    picks = np.array([3, 3, 7])
    model = load_model(tiny_gps_model)
    conditions = GPSConditions(GPSRecipe(), photos)
    found = conditions.places(model, conditions.draw_places(picks, RNG))
    assert isinstance(model.gps_encoder, GPSEncoder)
    assert torch.equal(found, model.gps_encoder(photos.positions[picks]))
    assert found.shape == (3, 2, TOKEN_DIM)
    text = TextConditions(TextRecipe(), photos)
    none = text.places(load_model(tiny_sd_model), text.draw_places(picks, RNG))
    assert none.shape == (3, 0, TOKEN_DIM)


def test_the_encoder_is_that_of_the_recipe_and_of_the_box(photos: Photos) -> None:
    recipe = GPSRecipe(null_text="empty", axis_embedding=False, match_text_scale=False)
    config = GPSConditions(recipe, photos).encoder(16).config
    assert config.bounds == CITY.as_tuple()
    assert (config.cross_attention_dim, config.null_text) == (16, "empty")
    assert (config.axis_embedding, config.match_text_scale) == (False, False)
    assert TextConditions(TextRecipe(), photos).encoder(16) is None


def test_pictures_are_captions_by_places(photos: Photos, tiny_gps_model: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from gps_guidance import conditions as module

    monkeypatch.setitem(module.SAMPLES, "num_inference_steps", 1)
    conditions = GPSConditions(GPSRecipe(resolution=32), photos)
    assert np.allclose(conditions.corners, [(43.71, 10.39), (43.71, 10.41), (43.73, 10.39),
                                            (43.73, 10.41)])
    assert conditions.samples(load_model(tiny_gps_model)).shape == (3, 4, 3, 32, 32)
    text = TextConditions(TextRecipe(resolution=32), photos)
    assert text.samples(load_model(tiny_gps_model)).shape == (3, 4, 3, 32, 32)


def test_of_many_captions_a_few_are_shown(photos: Photos) -> None:
    many = Photos(photos.images, None, photos.ids, photos.size, "", None,
                  captions=[f"photo {k:02d}" for k in range(12)])
    assert TextConditions(TextRecipe(), many).prompts == [
        "photo 00", "photo 04", "photo 07", "photo 11"
    ]


def test_a_photo_without_a_caption_has_the_empty_text(
    city_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(city_dataset, tmp_path / "d")
    write_captions(tmp_path / "d", ["a car", None, ""])
    photos = load_photos(tmp_path / "d", (32, 32), need_bearings=False)
    assert photos.captions[:3] == ["a car", None, ""]
    conditions = TextConditions(TextRecipe(), photos)
    assert conditions.texts(np.arange(3)) == ["a car", "", ""]
    assert conditions.prompts == ["a car"]
    assert "8 of 12 photos have no caption" in caplog.text


def test_a_dataset_without_any_caption_is_refused(city_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(city_dataset, tmp_path / "d")
    write_captions(tmp_path / "d", [None])
    photos = load_photos(tmp_path / "d", (32, 32), need_bearings=False)
    for recipe in (TextRecipe(), GPSRecipe()):
        with pytest.raises(ValueError, match="No photo .* has a caption.*gps-guidance caption"):
            conditions_of(recipe, photos)


def test_a_dataset_without_bounds_is_refused_for_gps(
    miniature_photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ingest([miniature_photos], tmp_path / "d", landmark="pisa", progress=False)
    write_captions(tmp_path / "d", CAPTIONS)
    photos = load_photos(tmp_path / "d", (32, 32), need_bearings=False)
    assert photos.bounds is None and photos.bearings is not None
    with pytest.raises(ValueError, match="no bounds.*ingest .*--bbox SOUTH,WEST,NORTH,EAST"):
        conditions_of(GPSRecipe(), photos)
    caplog.clear()  # of what ingest said
    with caplog.at_level(logging.WARNING):
        conditions_of(TextRecipe(), photos)  # a text model needs no place
    assert not caplog.records


def test_a_photo_outside_the_bounds_is_named(photos: Photos) -> None:
    away = Photos(photos.images, None, photos.ids, photos.size, "", None, bounds=CITY,
                  captions=photos.captions, positions=photos.positions + [0.0, 1.0])
    with pytest.raises(ValueError, match=r"photo at \(43.*, 11.*\) lies outside the bounds"):
        conditions_of(GPSRecipe(), away)
