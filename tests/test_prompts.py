"""Prompts by camera, as threestudio defines the views; and the tokens that they become."""

import math

import pytest
import torch

from gps_guidance.lift.prompts import (
    PROMPT_PROCESSORS,
    VIEWS,
    GPSPromptProcessor,
    GPSPromptProcessorConfig,
    PromptProcessor,
    PromptProcessorConfig,
    perp_neg_weight,
    view_index,
    view_prompts,
)
from gps_guidance.models import load_angle_model, load_model


@pytest.fixture
def prompt(tiny_sd_model):
    def make(**values):
        values = {"prompt": "a tower", **values}
        cfg = PromptProcessorConfig(pretrained_model_name_or_path=str(tiny_sd_model), **values)
        return PromptProcessor(cfg)()

    return make


def test_views_follow_threestudios_thresholds():
    expected = {0.0: "front", 44.9: "front", 45.0: "side", -44.9: "front", 330.0: "front",
                90.0: "side", 135.0: "side", 136.0: "back", 180.0: "back", -170.0: "back",
                200.0: "back"}
    azimuth = torch.tensor(list(expected))
    index = view_index(PromptProcessorConfig(), torch.zeros_like(azimuth), azimuth)
    assert [VIEWS[i] for i in index] == list(expected.values())
    elevation = torch.tensor([59.0, 61.0, 61.0])
    above = view_index(PromptProcessorConfig(), elevation, torch.tensor([0.0, 0.0, 180.0]))
    assert [VIEWS[i] for i in above] == ["front", "overhead", "overhead"]
    narrow = PromptProcessorConfig(front_threshold=10.0, back_threshold=10.0)
    assert view_index(narrow, torch.zeros(2), torch.tensor([20.0, 160.0])).tolist() == [0, 0]


def test_view_prompts():
    assert view_prompts(PromptProcessorConfig(prompt_back="rear"), "a tower") == [
        "a tower, side view", "a tower, front view", "rear", "a tower, overhead view"]
    assert view_prompts(PromptProcessorConfig(view_dependent_prompt_front=True), "a tower") == [
        "side view of a tower", "front view of a tower", "backside view of a tower",
        "overhead view of a tower"]


def test_embeddings_are_cond_then_uncond(prompt, tiny_sd_model):
    utils = prompt(negative_prompt="blurry")
    cameras = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 180.0]), torch.ones(2)
    model = load_model(tiny_sd_model)
    texts = ["a tower, front view", "a tower, back view", "blurry", "blurry"]
    torch.testing.assert_close(utils.get_text_embeddings(*cameras), model.encode_text(texts))
    plain = utils.get_text_embeddings(*cameras, False)
    torch.testing.assert_close(plain, model.encode_text(["a tower"] * 2 + ["blurry"] * 2))
    assert not plain.requires_grad


def test_gps_prompt_is_that_of_the_model(tiny_angle_model):
    cfg = GPSPromptProcessorConfig(pretrained_model_name_or_path=str(tiny_angle_model))
    utils = GPSPromptProcessor(cfg)()
    assert utils.prompt == "A photo of Leaning Tower of Pisa"
    expected = load_angle_model(tiny_angle_model).encode_text([utils.prompt])
    torch.testing.assert_close(utils.text_embeddings, expected)
    assert not utils.uncond_text_embeddings.any()  # null_text: zeros

    other = GPSPromptProcessorConfig("snow", pretrained_model_name_or_path=str(tiny_angle_model))
    assert GPSPromptProcessor(other)().prompt == "snow"


def test_a_model_retrained_in_place_is_embedded_anew(tmp_path, tiny_sd_model):
    import shutil

    folder = shutil.copytree(tiny_sd_model, tmp_path / "model")
    cfg = PromptProcessorConfig("a tower", pretrained_model_name_or_path=str(folder))
    before = PromptProcessor(cfg)().text_embeddings
    text_encoder = load_model(folder).text_encoder
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight.mul_(2)
    text_encoder.save_pretrained(folder / "text_encoder")
    assert not torch.equal(PromptProcessor(cfg)().text_embeddings, before)


def test_perp_neg_at_the_views_themselves_and_between(prompt):
    utils = prompt(use_perp_neg=True)
    side, front, back, overhead = utils.text_embeddings_vd
    azimuth = torch.tensor([0.0, 90.0, 180.0, 45.0, -135.0, 0.0])
    elevation = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 80.0])
    tokens, weights = utils.get_text_embeddings_perp_neg(elevation, azimuth, torch.ones(6))
    text, uncond, first, second = tokens.chunk(4)
    expected = [front, side, back, (front + side) / 2, (side + back) / 2, overhead]
    torch.testing.assert_close(text, torch.stack(expected))
    torch.testing.assert_close(uncond, utils.uncond_text_embeddings.expand(6, -1, -1))
    torch.testing.assert_close(first, torch.stack([front, side, side, front, side, front]))
    torch.testing.assert_close(second, torch.stack([side, front, front, side, front, side]))
    assert weights.shape == (6, 2) and not weights[5].any()
    # a front view does not repel the front, a back view does repel both
    assert weights[0, 0].item() == pytest.approx(-(4 * math.exp(-0.5) - 2.426), abs=1e-6)
    assert abs(weights[0, 0]) < 1e-3 and (weights[2] < -0.3).all()
    assert weights[4, 0].item() == pytest.approx(-(math.exp(-0.25) - 0.606), abs=1e-6)


def test_perp_neg_needs_views(prompt):
    with pytest.raises(ValueError, match="view_dependent_prompting"):
        prompt(use_perp_neg=True).get_text_embeddings_perp_neg(
            torch.zeros(1), torch.zeros(1), torch.ones(1), False
        )


def test_perp_neg_weight():
    assert perp_neg_weight((2.0, 1.0, 0.5), torch.tensor(0.0)).item() == -2.5


def test_all_keys_of_threestudio_are_accepted():
    known = PromptProcessorConfig.__dataclass_fields__
    for key in ("prompt prompt_front prompt_side prompt_back prompt_overhead negative_prompt "
                "pretrained_model_name_or_path overhead_threshold front_threshold back_threshold "
                "view_dependent_prompt_front use_cache spawn use_perp_neg perp_neg_f_sb "
                "perp_neg_f_fsb perp_neg_f_fs perp_neg_f_sf use_prompt_debiasing "
                "pretrained_model_name_or_path_prompt_debiasing prompt_debiasing_mask_ids").split():
        assert key in known
    assert {name: cls.Config for name, cls in PROMPT_PROCESSORS.items()} == {
        "stable-diffusion-prompt-processor": PromptProcessorConfig,
        "gps-prompt-processor": GPSPromptProcessorConfig,
    }


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"use_prompt_debiasing": True}, "use_prompt_debiasing"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "lib:tower_of_pisa"}, "lib:tower_of_pisa"),
        ({"pretrained_model_name_or_path": "nowhere/model"}, "There is no model folder"),
    ],
)
def test_wrong_configs_are_refused(values, match, tiny_sd_model):
    values = {"pretrained_model_name_or_path": str(tiny_sd_model), **values}
    with pytest.raises(ValueError, match=match):
        PromptProcessor(PromptProcessorConfig(**values))


def test_gps_prompts_refuse_negative_prompts_and_text_models(tiny_angle_model, tiny_sd_model):
    with pytest.raises(ValueError, match="negative_prompt is 'blurry'"):
        GPSPromptProcessor(GPSPromptProcessorConfig(
            negative_prompt="blurry", pretrained_model_name_or_path=str(tiny_angle_model)))
    with pytest.raises(ValueError, match="not an angle model"):
        GPSPromptProcessor(
            GPSPromptProcessorConfig(pretrained_model_name_or_path=str(tiny_sd_model))
        )
