"""Scores of one's own model: by which judge, of which pairs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CITY

from gps_guidance import cli
from gps_guidance.gps_clip import GPSClip
from gps_guidance.image_text import start_small_clip
from gps_guidance.reproduce.angles import angle_scores, every_bin
from gps_guidance.reproduce.evaluate import Judging, _leakage, evaluate, farthest, retrieval
from gps_guidance.scorers import AngleClassifier

FEW = ["--steps", "1", "--seed", "4"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained CLIP."""
    folder = tmp_path_factory.mktemp("judges") / "clip"
    torch.manual_seed(0)
    scorer = start_small_clip(["a red car", "a dog"], 16)
    scorer.model.save_pretrained(folder)
    scorer.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gps_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges") / "gps-clip"
    torch.manual_seed(1)
    GPSClip(CITY.as_tuple(), 16, widths=(8, 16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "here.json"
    rows = [{"prompt": prompt, "lat": 43.71 + 0.002 * k, "lon": 10.40}
            for k, prompt in enumerate(["a red car", "a dog"] * 2)]
    path.write_text(json.dumps({"pairs": rows}))
    return path


def test_a_gps_model_by_both_judges(tiny_gps_model: Path, clip: Path, gps_clip: Path, pairs: Path,
                                    tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    words = ["evaluate", tiny_gps_model, "--clip", clip, "--gps-clip", gps_clip, "--pairs", pairs,
             "--limit", 3, "--out", out, *FEW]
    assert cli.main(list(map(str, words))) == 0
    scores = json.loads(out.read_text())
    assert set(scores) == {"clip", "gps", "average", "recall_at_1", "retrieval_error_km", "leakage"}
    for score in scores.values():
        assert score["count"] == 3 and score["low"] <= score["mean"] <= score["high"]
    assert scores["average"]["mean"] == pytest.approx(
        (scores["clip"]["mean"] + scores["gps"]["mean"]) / 2)
    assert "CLIP score" in (shown := capsys.readouterr().out) and "(of 3)" in shown
    alone = evaluate(str(tiny_gps_model), Judging(clip=str(clip), pairs=str(pairs), limit=3,
                                                  steps=1, seed=4))
    assert set(alone) == {"clip"}
    assert alone["clip"].mean == pytest.approx(scores["clip"]["mean"], abs=1e-3)


def test_retrieval_is_right_where_the_judge_is() -> None:
    """Three places a tenth of a degree of latitude apart, the last image taken for the first's."""
    positions = [(43.0, 10.0), (43.1, 10.0), (43.2, 10.0)]
    scores = torch.tensor([[9.0, 1.0, 1.0], [1.0, 9.0, 1.0], [9.0, 1.0, 2.0]])
    found = retrieval(scores, positions)
    assert found["recall_at_1"] == [100, 100, 0]
    assert "recall_at_10" not in found
    assert found["retrieval_error_km"] == pytest.approx([0, 0, 22.22], abs=0.01)


def test_positions_are_taken_far_apart() -> None:
    line = [(0.0, 0.01 * k) for k in (5, 4, 0, 9, 9)]
    assert farthest(line, 3) == [(0.0, 0.05), (0.0, 0.0), (0.0, 0.09)]
    assert len(farthest(line, 9)) == 4  # no position twice


@pytest.mark.parametrize(("shown", "leakage"), [("lat", 0), ("prompt", 1)])
def test_leakage_is_of_text_alone(monkeypatch: pytest.MonkeyPatch, shown: str, leakage: float
                                  ) -> None:
    """Images that show the place of their position, or one that their prompt decides."""
    rows = [{"prompt": f"prompt {k % 5}", "lat": float(k), "lon": 0.0} for k in range(40)]
    asked: list[dict[str, object]] = []

    def sample(_model: object, crossed: list[dict[str, object]], *_: object) -> torch.Tensor:
        asked.extend(crossed)
        known = sorted({row[shown] for row in crossed}, key=str)
        return torch.tensor([known.index(row[shown]) for row in crossed])

    class Judge:
        def retrieve(self, images: torch.Tensor, _positions: object) -> np.ndarray:
            return images[:, None].numpy()

    monkeypatch.setattr("gps_guidance.reproduce.evaluate._sample", sample)
    found = _leakage(None, Judge(), rows, Judging())["leakage"]  # type: ignore[arg-type]
    assert found == pytest.approx([leakage] * 8)
    assert len(asked) == 4 * 8 * 4
    assert _leakage(None, Judge(), rows[:1], Judging()) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(("options", "message"), [
    ({"pairs": "miniatown"}, "give --clip FOLDER for the texts"),
    ({"clip": "nowhere"}, "Give --pairs"),
    ({"clip": "nowhere", "pairs": "miniatown"}, "does not cover the pairs miniatown"),
])
def test_what_a_gps_model_needs(tiny_gps_model: Path, options: dict[str, str], message: str
                                ) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(str(tiny_gps_model), Judging(**options))


def test_a_judge_of_another_city_is_refused(tiny_gps_model: Path, pairs: Path, tmp_path: Path
                                            ) -> None:
    GPSClip((47.0, 10.0, 48.0, 11.0), 16, widths=(8, 16)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="The judge .* does not cover the pairs"):
        evaluate(str(tiny_gps_model), Judging(gps_clip=str(tmp_path / "other"), pairs=str(pairs)))


def test_a_text_model_knows_no_place(tiny_sd_model: Path) -> None:
    with pytest.raises(ValueError, match="is a text model, which knows no place"):
        evaluate(str(tiny_sd_model), Judging())


def test_an_angle_model_by_its_classifier(tiny_angle_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gps-guidance train classifier DATASET"):
        evaluate(str(tiny_angle_model), Judging())
    torch.manual_seed(0)
    AngleClassifier(36, widths=(8, 8)).half().save_pretrained(tmp_path / "judge")
    judging = Judging(classifier=str(tmp_path / "judge"), images_per_bin=1, steps=1)
    scores = evaluate(str(tiny_angle_model), judging)
    assert set(scores) == {"angle_accuracy", "within_one"}
    assert scores["angle_accuracy"].count == 36
    assert scores["angle_accuracy"].mean <= scores["within_one"].mean
    AngleClassifier(8, widths=(8, 8)).save_pretrained(tmp_path / "coarse")
    with pytest.raises(ValueError, match="reads 8 bins, but .* has 36"):
        evaluate(str(tiny_angle_model), Judging(classifier=str(tmp_path / "coarse")))


def test_bins_are_counted_round_the_circle() -> None:
    """A classifier that always reads bin 0: right once in 36 images, within one bin thrice."""
    torch.manual_seed(0)
    judge = AngleClassifier(36, widths=(8, 8)).eval()
    with torch.no_grad():
        judge.head.weight.zero_()
        judge.head.bias.zero_()[0] = 1
    bins = every_bin(36, 2)
    assert np.bincount(bins).tolist() == [2] * 36
    scores = angle_scores(judge, torch.rand(72, 3, 16, 16), bins)
    assert np.mean(scores["angle_accuracy"]) == pytest.approx(100 / 36)
    assert np.flatnonzero(scores["within_one"]).tolist() == [0, 1, 2, 3, 70, 71]


def test_a_trial_has_what_it_was_scored_by(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    with pytest.raises(ValueError, match="no finished trial"):
        evaluate(str(tmp_path), Judging())
    metrics = {"mask_iou": 0.9, "psnr_db": 21.5, "occupancy_iou": None, "seconds": 60.0}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    scores = evaluate(str(tmp_path), Judging())
    assert {key: (score.mean, score.count) for key, score in scores.items()} == {
        "mask_iou": (0.9, 1), "psnr_db": (21.5, 1)}
    (tmp_path / "metrics.json").write_text(json.dumps({"seconds": 60.0, "mask_iou": None}))
    with pytest.raises(ValueError, match="--photos DATASET"):
        evaluate(str(tmp_path), Judging())
