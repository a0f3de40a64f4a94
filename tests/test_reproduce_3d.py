"""Table 3, both ablations and Fig. 8: numbers by hand, and one run of two steps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from gps_guidance.image_text import start_small_clip
from gps_guidance.lift.export import read_png
from gps_guidance.reproduce import ablation_3d, ablation_geo, fig8, nerf, table3
from gps_guidance.reproduce.landmark import method_scores, method_units
from gps_guidance.reproduce.outcome import Score, Table
from gps_guidance.reproduce.settings import Landmark, Settings, load_settings
from gps_guidance.reproduce.work import Done, Work

TOWER = Landmark(name="Miniature Tower of Pisa", model="miniature-pisa", text_model="monuments",
                 config="gps-sds-pisa.yaml", view_prompts_config="dreamfusion-pisa.yaml",
                 overrides=["trainer.max_steps=2"])
SETTINGS = Settings(scale="test", cities=[], landmarks=[TOWER], seeds_3d=[0, 1])


def result(mask: float, turn: float = 0.0) -> dict[str, Any]:
    return {"mask_iou": mask, "occupancy_iou": mask / 2, "bearing_within_one_bin": mask,
            "angular_error_deg": turn}


def done_by(units: list[Any], masks: dict[str, list[float]]) -> dict[str, Done]:
    """Results of 3D units by method, a value a seed."""
    found = {}
    for unit in units:
        method, _, seed = unit.name.rpartition("/")[2].rpartition("-")
        found[unit.name] = Done(result(masks[method][int(seed)]), 60.0)
    return found


def test_a_method_changes_what_it_is_about_and_nothing_else() -> None:
    ours, without = (method_units(TOWER, method, [3])[0] for method in ("ours", "no-angle"))
    assert ours.name == "miniature-tower-of-pisa/ours-3" and ours.arguments["seed"] == 3
    assert ours.arguments["config"] == without.arguments["config"] == "gps-sds-pisa.yaml"
    assert ours.arguments["changes"] == ["trainer.max_steps=2"]
    assert without.arguments["changes"] == ["trainer.max_steps=2",
                                            "system.guidance.angle_dropout=1"]
    prompts = method_units(TOWER, "view-prompts", [0, 1])
    assert [unit.arguments["config"] for unit in prompts] == ["dreamfusion-pisa.yaml"] * 2
    assert prompts[0].arguments["changes"][1:] == [
        "system.guidance.pretrained_model_name_or_path=monuments",
        "system.prompt_processor.prompt=a photo of Miniature Tower of Pisa"]
    json.dumps(ours.key)


def test_methods_that_the_settings_do_not_have_are_left_out() -> None:
    assert method_units(TOWER, "perp-neg", [0]) == []
    assert method_units(TOWER, "no-prior", [0]) == []
    bare = Landmark(name="a", model="miniature-pisa", text_model="b")
    assert method_units(bare, "ours", [0]) == []


def test_nerf_is_one_unit_where_colmap_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, count in ((None, 0), (object(), 1)):
        monkeypatch.setattr(nerf.importlib.util, "find_spec", lambda _, found=found: found)
        assert len(method_units(TOWER, "nerf", [4, 5])) == count
    monkeypatch.setattr(nerf.importlib.util, "find_spec", lambda _: object())
    elsewhere = Landmark(name="Space Needle", model="a", text_model="b", config="gps-sds-pisa")
    assert method_units(elsewhere, "nerf", [0]) == []  # there are no photos of it


def test_scores_are_percent_over_seeds() -> None:
    units = method_units(TOWER, "ours", [0, 1])
    done = done_by(units, {"ours": [0.5, 0.7]})
    found = method_scores([TOWER], "ours", [0, 1], done)
    assert found["mask_iou"].mean == pytest.approx(60)
    assert found["angular_error_deg"].mean == 0 and "clip" not in found


def test_table_3_by_hand(tmp_path: Path) -> None:
    units = [unit for unit in table3.units(SETTINGS) if "nerf" not in unit.name]
    done = done_by(units, {"ours": [0.9, 0.8], "view-prompts": [0.3, 0.4]})
    settings = Settings(scale="test", cities=[], landmarks=[TOWER], seeds_3d=[0, 1])
    rows = table3.rows_of(settings, {"ours": "", "view-prompts": ""}, done)
    assert rows["view-prompts"]["mask_iou"].mean == pytest.approx(35)
    claims = table3.claims_of(rows, ["view-prompts", "perp-neg"], "prompts")
    assert len(claims) == 3 and all(claim.holds for claim in claims)
    rows["view-prompts"]["mask_iou"] = Score(85, 80, 95, 2)
    assert [claim.holds for claim in table3.claims_of(rows, ["view-prompts"], "")] == [
        False, True, True]


def test_without_the_truth_there_are_no_claims() -> None:
    assert table3.claims_of({"ours": {"clip": Score(30, 30, 30, 1)}}, [], "") == []


def test_the_ablations_outcome(tmp_path: Path) -> None:
    units = ablation_3d.units(SETTINGS)
    assert [unit.name.rpartition("/")[2] for unit in units] == [
        "ours-0", "ours-1", "no-angle-0", "no-angle-1"]
    done = done_by(units, {"ours": [0.9, 0.8], "no-angle": [0.2, 0.3]})
    made = ablation_3d.outcome(SETTINGS, Work(tmp_path / "work"), done)
    assert made.table is not None and set(made.table.rows) == {"ours", "no-angle"}
    assert [claim.holds for claim in made.claims] == [True] * 3
    assert made.pictures == []  # none was drawn


def test_diversity_is_reported_where_there_are_models_of_both_kinds() -> None:
    both = Landmark(name="a", model="m", text_model="t", no_prior_model="n", class_prompt="a tower",
                    clip="c")  # and no config: no 3D
    units = ablation_3d.units(Settings(scale="", cities=[], landmarks=[both], seeds=[0, 1]))
    assert [unit.name for unit in units] == [
        f"a/class-{which}-{seed}" for which in ("ours", "no-prior", "base") for seed in (0, 1)]


def test_diversity_is_of_the_images(tmp_path: Path, tiny_angle_model: Path, tiny_sd_model: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """0 for images that are all alike, more for what models draw from other noises."""
    torch.manual_seed(0)
    scorer = start_small_clip(["a tower"], 16)
    scorer.model.save_pretrained(tmp_path / "clip")
    scorer.tokenizer.save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(ablation_3d, "IMAGES", 4)
    monkeypatch.setattr(ablation_3d, "BATCH", 2)
    where = asdict(Landmark(
        name="a", model=str(tiny_angle_model), text_model=str(tiny_sd_model), steps=1,
        no_prior_model=str(tiny_angle_model), class_prompt="a tower", clip=str(tmp_path / "clip")))

    def diversity(which: str) -> float:
        (tmp_path / which).mkdir(exist_ok=True)
        return float(ablation_3d.class_diversity(tmp_path / which, where, which, 0)["diversity"])

    found = {which: diversity(which) for which in ablation_3d.SPREADS}
    assert found["ours"] == found["no-prior"] > 1e-5 and found["base"] > 1e-5
    assert read_png(tmp_path / "base" / "sheet.png").shape[2] == 3
    monkeypatch.setattr(ablation_3d, "_class_images", lambda *_: torch.ones(2, 3, 16, 16))
    assert diversity("ours") == pytest.approx(0, abs=1e-5)


def test_gps_against_addresses_by_hand() -> None:
    def row(clip: float, gps: float) -> dict[str, Score]:
        return {"clip": Score(clip, clip - 1, clip + 1, 9), "gps": Score(gps, gps - 1, gps + 1, 9)}

    better, alike = ablation_geo.claims_of({"ours": row(30, 9), "address-model": row(31, 4)})
    assert better.holds and alike.holds
    worse, apart = ablation_geo.claims_of({"ours": row(30, 5), "address-model": row(40, 4)})
    assert not worse.holds and not apart.holds


def test_a_city_without_a_model_of_addresses_has_no_such_ablation() -> None:
    assert ablation_geo.units(load_settings("miniature", ["cities.0.address_model=null"])) == []
    units = ablation_geo.units(load_settings("miniature", ["cities.0.address_model=mine"]))
    assert {unit.name.rpartition("-")[0] for unit in units} == {
        "miniatown/ours", "miniatown/address-model", "miniatown/text"}


def test_bars_are_drawn(tmp_path: Path) -> None:
    rows = {"ours": {"mask_iou": Score(90, 88, 92, 5)},
            "no-angle": {"mask_iou": Score(20, 9, 30, 5)}}
    table = Table("ablation-3d", {"mask_iou": "mask IoU, %"}, ablation_3d.TITLES, rows)
    fig8.draw_bars([table], tmp_path / "bars.png")
    picture = read_png(tmp_path / "bars.png")
    assert picture.shape[0] > 100 and len(torch.from_numpy(picture.copy()).unique()) > 20


@pytest.mark.slow
def test_a_run_of_two_steps_is_scored_and_resumed(tmp_path: Path) -> None:
    small = ["trainer.max_steps=2", "data.n_test_views=2", "data.eval_width=16",
             "data.eval_height=16", "trainer.val_check_interval=2"]
    tower = Landmark(name=TOWER.name, model="miniature-pisa", text_model="", overrides=small,
                     config="gps-sds-pisa.yaml", clip="miniature-clip-landmarks")
    unit = method_units(tower, "ours", [0])[0]
    work = Work(tmp_path / "work")
    done = work.run([unit])[unit.name]
    assert done.error is None and done.result is not None
    assert {"clip", "mask_iou", "bearing_within_one_bin"} <= set(done.result)
    assert (work.at(unit) / "views.png").is_file()
    (work.at(unit) / "result.json").unlink()
    assert work.run([unit])[unit.name].result == done.result  # from its checkpoint
