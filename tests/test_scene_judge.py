"""The judge of Miniatown's pictures, and the city's evaluation list."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from gps_guidance.miniature.city import (
    HELD_OUT,
    OBJECTS,
    PLACES,
    Scene,
    address_of,
    parse_caption,
    place_of,
)
from gps_guidance.miniature.city_photographer import plan_city_shot
from gps_guidance.miniature.pairs import SEEN, UNSEEN, draw_pairs, write_pairs
from gps_guidance.miniature.scene_judge import (
    ANSWERS,
    SceneJudge,
    answers_of,
    draw_scenes,
    fit_scene_judge,
    measure,
)
from gps_guidance.models import resolve_model
from gps_guidance.reproduce.city import PAIRS, load_pairs


@pytest.fixture(scope="module")
def bundled():
    folder = resolve_model("miniature-scene-judge")
    return SceneJudge.from_pretrained(folder, use_safetensors=True).float().eval()


def test_the_bundled_judge_reads_new_pictures_of_every_pair(bundled):
    images, scenes = draw_scenes(np.random.default_rng(5), 200, 64)
    assert min(measure(bundled, images, scenes).values()) >= 0.97
    assert min(bundled.config[question] for question in ANSWERS) >= 0.97
    assert bundled.config.held_out >= 1000


def test_it_reads_pairs_that_no_tourist_photographs(bundled):
    from gps_guidance.miniature.city import ARTS
    from gps_guidance.miniature.city_scene import draw_scene

    rng = np.random.default_rng(6)
    for thing, place in sorted(HELD_OUT):
        weather = None if place in ARTS else "sun"
        pictures = [draw_scene(place, thing, "red", weather, rng) for _ in range(4)]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
        read = bundled.read(images)
        assert read["place"].count(place) >= 3 and read["object"].count(thing) >= 3


def test_answers_are_numbered_as_the_judge_has_them():
    scenes = [Scene("river", "dog", "red", "rain"), Scene("lofts", None, None, "night")]
    right = answers_of(scenes)
    assert [ANSWERS["object"][k] for k in right["object"].tolist()] == ["dog", None]
    assert [ANSWERS["place"][k] for k in right["place"].tolist()] == ["river", "lofts"]
    assert [ANSWERS["weather"][k] for k in right["weather"].tolist()] == ["rain", "night"]


def test_a_short_fit_learns_the_weather_and_is_repeatable():
    first, second = (fit_scene_judge(size=48, steps=40, batch_size=16, held_out=40)
                     for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert first.config.weather > 0.5  # of four, and none in the museums


def test_tourists_see_no_held_out_pair_and_photos_for_judges_do():
    def seen(every_pair):
        shots = [plan_city_shot(np.random.default_rng((3, k)), every_pair) for k in range(1500)]
        return {(shot.scene.object, shot.scene.place) for shot in shots}

    assert not seen(False) & HELD_OUT
    assert len(seen(True) & HELD_OUT) > len(HELD_OUT) / 2


def test_the_list_has_every_pair_at_a_position_of_its_place():
    rows = draw_pairs()
    assert all(place_of((row["lat"], row["lon"])) == row["place"] for row in rows)
    assert all(parse_caption(row["prompt"]).object == row["object"] for row in rows)
    assert all(row["address"] == address_of(row["place"]) for row in rows)
    assert all(row["seen"] == ((row["object"], row["place"]) not in HELD_OUT) for row in rows)
    counts = Counter((row["object"], row["place"]) for row in rows)
    assert len(counts) == len(OBJECTS) * len(PLACES)
    assert {counts[pair] for pair in HELD_OUT} == {UNSEEN}
    assert {count for pair, count in counts.items() if pair not in HELD_OUT} == {SEEN}
    assert sum(row["seen"] for row in rows) >= 100 and UNSEEN * len(HELD_OUT) >= 100


def test_the_bundled_list_is_what_the_code_writes(tmp_path):
    written = write_pairs(tmp_path / "miniatown.json")
    assert written.read_bytes() == (PAIRS / "miniatown.json").read_bytes()
    assert load_pairs("miniatown") == draw_pairs()


def test_a_list_that_is_none_is_refused_with_the_known_ones(tmp_path):
    bad = tmp_path / "bad.json"
    for text in ("{}", "no json", json.dumps({"pairs": [{"prompt": "a", "lat": 100, "lon": 0}]}),
                 json.dumps({"pairs": [{"prompt": 1, "lat": 10, "lon": 0}]})):
        bad.write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json is no list .*miniatown"):
            load_pairs(str(bad))
    with pytest.raises(ValueError, match="miniatown"):
        load_pairs("nowhere")
