"""A trial read back: the views are its field's, the score is the judge's of each of them."""

import math
import shutil

import pytest
import small_runs
import torch

from gps_guidance.image_text import start_small_clip
from gps_guidance.lift import cameras, trial
from gps_guidance.lift.callbacks import load_checkpoint
from gps_guidance.reproduce.evaluate import Judging, evaluate

TEXT = "A photo of Leaning Tower of Pisa"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_angle_model):
    """Two steps with a tiny model, moved away from where they were trained."""
    place = tmp_path_factory.mktemp("trial")
    config = small_runs.ROOT / "threestudio_configs" / "gps-sds-pisa.yaml"
    few = small_runs.overrides(config, {"gps-sds-guidance": tiny_angle_model}, always_tiny=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert small_runs.launch("--config", str(config), "--train", *few, "tag=small") == 0
    return shutil.move(place / "outputs" / "gps-sds-pisa" / "small", place / "moved")


@pytest.fixture(scope="module")
def loaded(folder):
    system, plan = trial.load_trial(folder)
    return system, plan.parts["data"][1]


def test_the_field_is_the_checkpoints(folder, loaded):
    saved = load_checkpoint(folder / "ckpts" / "last.ckpt")["state_dict"]
    state = loaded[0].state_dict()
    assert set(saved) == set(state) and all(torch.equal(saved[k], state[k]) for k in saved)
    assert loaded[0].true_global_step == 2 and loaded[0].guidance is None


def test_a_folder_without_a_trial_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="parsed.yaml is missing"):
        trial.load_trial(tmp_path)
    shutil.copytree(folder / "configs", tmp_path / "configs")
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        trial.load_trial(tmp_path)


def test_the_views_go_round_the_landmark_within_the_configs_ranges(loaded, monkeypatch):
    system, data = loaded
    seen = []
    original = cameras.camera_batch

    def watched(c2w, fovy, *rest):
        if len(c2w) == 1:  # the renders, not the draw
            seen.append((c2w[0], float(fovy)))
        return original(c2w, fovy, *rest)

    monkeypatch.setattr(cameras, "camera_batch", watched)
    before = torch.random.get_rng_state()
    views = trial.random_views(system, data, 12, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert views.shape == (12, 3, 16, 16) and len(seen) == 12
    assert 0 <= views.min() and views.max() <= 1 and views.std(dim=0).mean() > 1e-4
    at = torch.stack([c2w[:3, 3] for c2w, _ in seen])
    bearings = torch.rad2deg(torch.atan2(at[:, 0], at[:, 1])) % 360
    assert sorted((bearings / 30).long().tolist()) == list(range(12))  # one in each twelfth
    elevations = torch.rad2deg(torch.asin(at[:, 2] / at.norm(dim=1)))
    low, high = data.elevation_range
    assert (elevations >= low - 1e-3).all() and (elevations <= high + 1e-3).all()
    widths = [math.degrees(fovy) for _, fovy in seen]
    low, high = data.fovy_range
    assert low - 1e-3 <= min(widths) < max(widths) <= high + 1e-3
    assert torch.equal(trial.random_views(system, data, 12, seed=1), views)
    assert not torch.equal(trial.random_views(system, data, 12, seed=2), views)


def test_the_clip_score_is_the_mean_of_the_views(loaded):
    system, data = loaded
    torch.manual_seed(0)
    scorer = start_small_clip([TEXT], 16)
    score = trial.clip_score_of_views(system, data, scorer, TEXT, views=3, seed=5)
    each = [float(scorer.score(view[None], [TEXT]))
            for view in trial.random_views(system, data, 3, seed=5)]
    assert score == pytest.approx(sum(each) / 3, abs=1e-3) and len(set(each)) == 3


def test_evaluate_scores_thirty_views_by_the_models_prompt(folder, loaded, tmp_path):
    torch.manual_seed(0)
    scorer = start_small_clip([TEXT], 16)
    scorer.model.save_pretrained(tmp_path)
    scorer.tokenizer.save_pretrained(tmp_path)
    score = evaluate(str(folder), Judging(clip=str(tmp_path), seed=5))["clip"]
    assert score.count == 30
    assert score.mean == pytest.approx(trial.clip_score_of_views(*loaded, scorer, TEXT, seed=5),
                                       abs=1e-3)
