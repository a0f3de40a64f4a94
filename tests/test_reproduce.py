"""The reproduction: work that is done once, numbers by hand, and each figure on tiny models."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CITY, RESOLUTION
from omegaconf import OmegaConf

from gps_guidance import cli
from gps_guidance.gps_clip import GPSClip
from gps_guidance.lift.config import find_config
from gps_guidance.lift.export import read_png, write_png
from gps_guidance.miniature.scene_judge import SceneJudge
from gps_guidance.reproduce import angles, fig6, fig9, run, sheets, table1, table2
from gps_guidance.reproduce.outcome import (
    Claim,
    Outcome,
    Score,
    Table,
    claim_above,
    claim_at_least,
)
from gps_guidance.reproduce.report import write_report
from gps_guidance.reproduce.settings import SCALES, City, Settings, load_settings
from gps_guidance.reproduce.work import RESULT, Done, Unit, Work
from gps_guidance.scorers import AngleClassifier

# --- settings ----------------------------------------------------------------------------------


def test_the_miniature_needs_nothing_and_can_be_changed() -> None:
    found = load_settings("miniature", ["seeds=[7]", "cities.0.model=mine", "cities.0.steps=3"])
    assert (found.scale, found.seeds) == ("miniature", [7])
    assert (found.cities[0].model, found.cities[0].steps) == ("mine", 3)
    assert found.cities[0].resolution == 64
    assert set(found.cities[0].area_names) <= set(fig6.areas_of(found.cities[0]))


@pytest.mark.parametrize(("scale", "overrides", "said"), [
    ("tiny", [], "give miniature, miniature-arch, paper or a YAML"),
    ("miniature", ["cities.0.speed=3"], "The settings have"),
    ("miniature", ["seeds=many"], "The settings have"),
    ("miniature", ["seeds"], "is not key=value"),
    ("paper", [], r"needs cities\.0\.model, cities\.0\.base, .*as key=value"),
])
def test_what_does_not_fit_is_refused(scale: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_settings(scale, overrides)


def test_the_papers_scale_loads_once_it_is_filled_in() -> None:
    with pytest.raises(ValueError) as error:
        load_settings("paper")
    keys = re.findall(r"\w+\.\d\.\w+", str(error.value))
    assert len(keys) == (SCALES / "paper.yaml").read_text().count(": ???")
    found = load_settings("paper", [f"{key}=my-{key.rpartition('.')[2]}" for key in keys])
    assert [city.name for city in found.cities] == ["New York City", "Paris"]
    assert {city.base for city in found.cities} == {"my-base"}
    assert [one.text_model for one in found.landmarks] == ["my-base"] * 6
    for one in found.landmarks:
        assert one.clip == "my-clip"
        assert one.overrides == ["system.guidance.pretrained_model_name_or_path=my-model"]
        for config in (one.config, one.view_prompts_config, one.perp_neg_config):
            assert config is not None and find_config(config).is_file()


# --- work --------------------------------------------------------------------------------------


def double(folder: Path, number: int) -> dict[str, Any]:
    with (folder.parent / "calls").open("a") as calls:
        calls.write(f"{folder.name} ")
    if number < 0:
        raise ValueError(f"{number} is negative")
    if number == 0:
        raise KeyboardInterrupt
    return {"double": 2 * number}


def calls(work: Work) -> list[str]:
    return (work.folder / "calls").read_text().split()


def units(*numbers: int) -> list[Unit]:
    return [Unit(f"unit-{k}", double, {"number": number}) for k, number in enumerate(numbers)]


def test_a_unit_is_done_once_until_it_is_asked_for_otherwise(tmp_path: Path) -> None:
    work = Work(tmp_path)
    done = work.run(units(3, 4))
    assert [one.result for one in done.values()] == [{"double": 6}, {"double": 8}]
    assert list(done) == ["unit-0", "unit-1"]
    again = Work(tmp_path).run(units(3, 5))
    assert [one.result for one in again.values()] == [{"double": 6}, {"double": 10}]
    assert calls(work) == ["unit-0", "unit-1", "unit-1"]
    (work.at(units(3)[0]) / RESULT).write_text('{"key"')  # half a file
    assert work.run(units(3))["unit-0"].result == {"double": 6}
    assert calls(work)[3:] == ["unit-0"]


def test_what_fails_has_a_reason_and_is_tried_again(tmp_path: Path) -> None:
    work = Work(tmp_path)
    done = work.run(units(-1, 2))
    assert (done["unit-0"].result, done["unit-0"].error) == (None, "-1 is negative")
    assert done["unit-1"].result == {"double": 4}
    work.run(units(-1, 2))
    assert calls(work) == ["unit-0", "unit-1", "unit-0"]


def test_an_interrupted_unit_leaves_nothing_that_counts(tmp_path: Path) -> None:
    work = Work(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work.run(units(1, 0, 2))
    assert [work.found(unit) is not None for unit in units(1, 0, 2)] == [True, False, False]


@pytest.mark.slow  # each process imports torch
def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    many, one = Work(tmp_path / "many", 2), Work(tmp_path / "one")
    for folder in (many.folder, one.folder):
        folder.mkdir()
    results = [[done.result for done in work.run(units(5, -6, 7)).values()] for work in (many, one)]
    assert results[0] == results[1] == [{"double": 10}, None, {"double": 14}]


# --- numbers -----------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    score = Score.of([0, 0, 100, 100] * 25)
    assert (score.mean, score.count) == (50, 100)
    # 95 % of means of 100 fair coins lie within 50 +- 1.96 * 5
    assert score.low == pytest.approx(40, abs=1.5) and score.high == pytest.approx(60, abs=1.5)
    assert Score.of([3.0]) == Score(3.0, 3.0, 3.0, 1)
    assert str(Score.of([3.0])) == "3.00"
    assert str(Score(2.0, 1.0, 3.0, 9)) == "2.00 [1.00, 3.00]"
    assert Score(5, 4, 6, 9).above(Score(3, 2, 3.9, 9))
    assert not Score(5, 4, 6, 9).above(Score(3, 2, 4.0, 9))
    for values in ([], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="finite"):
            Score.of(values)


def test_claims_by_hand() -> None:
    rows = {"ours": {"x": Score(5, 4, 6, 9)}, "a": {"x": Score(1, 0, 2, 9)},
            "b": {"x": Score(4, 3, 4.5, 9)}, "c": {}}
    assert claim_above("", "x", rows, "ours", ["a", "c", "not there"]).holds
    overlapping = claim_above("", "x", rows, "ours", ["a", "b"])
    assert not overlapping.holds
    assert overlapping.evidence == ("ours 5.00 [4.00, 6.00]; a 1.00 [0.00, 2.00]; "
                                    "b 4.00 [3.00, 4.50]")
    assert claim_at_least("", rows["ours"]["x"], 5.0).holds
    assert not claim_at_least("", rows["ours"]["x"], 5.1).holds


TABLE = Table("t", {"x": "an x", "y": "a y"}, {"ours": "our <way>", "theirs": "theirs"},
              {"ours": {"x": Score(5, 4, 6, 9), "y": Score.of([2.0])}},
              {"ours": {"x": 7.0}, "theirs": {"x": 8.125}})


def test_a_table_in_three_formats(tmp_path: Path) -> None:
    TABLE.write(tmp_path)
    assert (tmp_path / "t.md").read_text() == (
        "|  | an x | a y | paper: an x |\n| --- | --- | --- | --- |\n"
        "| our <way> | 5.00 [4.00, 6.00] | 2.00 | 7.00 |\n| theirs |  |  | 8.12 |\n")
    assert json.loads((tmp_path / "t.json").read_text()) == {
        "rows": {"ours": {"x": 5, "y": 2}}, "intervals": {"ours": {"x": [4, 6], "y": [2, 2]}},
        "counts": {"ours": {"x": 9, "y": 1}}, "paper": {"ours": {"x": 7}, "theirs": {"x": 8.125}}}
    with (tmp_path / "t.csv").open() as file:
        [row] = csv.DictReader(file)
    assert (row["row"], row["x"], row["x_low"], row["y_count"]) == ("ours", "5", "4", "1")


def test_the_page_holds_tables_claims_and_pictures(tmp_path: Path) -> None:
    picture = write_png(tmp_path / "p.png", np.zeros((2, 3, 3)))
    outcome = Outcome("A title", TABLE, [(picture, "a caption")],
                      [Claim("One is so.", True, "5 > 4"), Claim("Two is not.", False, "1 < 2")])
    page = write_report(tmp_path, "miniature", {"t": outcome}).read_text()
    assert "1 of 2 claims hold" in page
    assert "our &lt;way&gt;" in page and "8.12" in page and "a caption" in page
    assert page.count("data:image/png;base64,") == 1
    assert page.index("Two is not.") > page.index('class="fails"')


def test_sheets_keep_their_images(tmp_path: Path) -> None:
    row = [np.full((4, 6, 3), shade, np.uint8) for shade in (0, 90, 255)]
    sheets.write_row(tmp_path / "row.png", row)
    for kept, image in zip(sheets.read_row(tmp_path / "row.png", 3), row, strict=True):
        assert np.array_equal(kept, image)
    sheet = read_png(sheets.draw_sheet(tmp_path / "s.png", [("a", row), ("b", row[:1])], "xyz"))
    assert sheet.shape[1] > sheet.shape[0] > 100


# --- the command -------------------------------------------------------------------------------


def experiment(name: str, number: int) -> ModuleType:
    module: Any = ModuleType(name)
    module.units = lambda settings: [Unit(name, double, {"number": number * settings.seeds[0]})]
    module.outcome = lambda settings, work, done: Outcome(name, Table(
        name, {"x": "x"}, {"r": "r"}, {"r": {"x": Score.of([done[name].result["double"]])}}))
    return module


def test_one_that_fails_does_not_stop_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty: Any = ModuleType("empty")
    empty.units = lambda settings: []
    monkeypatch.setattr(run, "EXPERIMENTS", {"bad": experiment("bad", -1), "empty": empty,
                                             "good": experiment("good", 4)})
    def command(*names: str) -> int:
        return cli.main(["reproduce", *names, "--processes", "1", "--out", str(tmp_path / "o"),
                         "seeds=[1]"])

    assert command() == 2
    said = capsys.readouterr()
    assert "bad is not made. bad: -1 is negative" in said.err and "empty" not in said.err
    assert said.out.strip() == f"{tmp_path / 'o'}/report.html"
    assert json.loads((tmp_path / "o" / "good.json").read_text())["rows"] == {"r": {"x": 8}}
    assert not (tmp_path / "o" / "bad.json").exists()
    assert command("good") == 0
    assert command("empty") == 2  # but what was made before is on the page still
    assert "empty is not made" in capsys.readouterr().err
    assert 'id="good"' in (tmp_path / "o" / "report.html").read_text()
    assert (tmp_path / "o" / "work" / "calls").read_text().split().count("good") == 1
    assert command("table9") == 2
    assert "it is bad, empty, good" in capsys.readouterr().err


# --- Table 1 by hand ---------------------------------------------------------------------------


def test_table_1_by_hand(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "lat": 0, "lon": 0, "seen": seen} for seen in (True, True, False)]
    (tmp_path / "pairs.json").write_text(json.dumps({"pairs": rows}))
    city = City("Town", "m", "b", str(tmp_path / "pairs.json"), "c", "g")
    result = {"clip": [10, 20, 30], "gps": [0, 0, 60], "place": [1, 0, 1], "object": [1, 1, 0]}
    done = {unit.name: Done(result) for unit in table1.method_units(city, ["ours"], [1, 2])}
    assert sorted(done) == ["town/ours-1", "town/ours-2"]
    scores = table1.method_scores([city], [1, 2], "ours", done)
    means = {key: (score.mean, score.count) for key, score in scores.items()}
    assert means == {"clip": (20, 6), "gps": (20, 6), "average": (20, 6), "place": (50, 4),
                     "object": (100, 4), "unseen_place": (100, 2), "unseen_object": (0, 2)}


# --- Table 2, Fig. 6 and Fig. 9 ----------------------------------------------------------------


def test_agreement_by_hand() -> None:
    scores = table2.agreement([0, 0, 1, 5])
    assert (scores["angle_accuracy"].mean, scores["within_one"].mean) == (50, 75)
    photos = table2._photos([{"accuracy": 0.75, "within_one": 1.0, "held_out": 4},
                             {"accuracy": 0.5, "within_one": 0.5, "held_out": 6}])
    assert photos["angle_accuracy"].mean == pytest.approx(60)  # 3 and 3 of 10
    assert photos["within_one"].mean == pytest.approx(70)
    assert table2._photos([{"accuracy": 0.0, "within_one": 0.0, "held_out": 0}]) == {}


def test_the_claims_of_table_2() -> None:
    at_chance = {"angle_accuracy": Score(3, 1, 5, 360)}
    rows = {"chance": table2._chance([36]), "text": at_chance, "no-angle": at_chance,
            "ours": {"angle_accuracy": Score(70, 65, 75, 9), "within_one": Score(88, 85, 90, 9)}}
    assert rows["chance"]["angle_accuracy"].mean == pytest.approx(100 / 36)
    assert rows["chance"]["within_one"].mean == pytest.approx(300 / 36)
    held = [claim.holds for claim in table2.claims_of(rows, True)]
    assert held == [True, True, True, True, False]
    rows["text"] = {"angle_accuracy": Score(6, 4, 8, 360)}
    assert [claim.holds for claim in table2.claims_of(rows, False)] == [True, False, True]


def test_objects_and_place_in_fig_9() -> None:
    city = City("Town", "m", "b", "p", "c", "g", scene_judge="s", attention_places={"A": [0, 0]},
                attention_prompts=["a red car in the sun", "a view at night"])
    done = {"town/attention-0-a": Done({"with_place": [["a", 0.9], ["car", -0.5]]}),
            "town/attention-1-a": Done({"with_place": [["view", 0.4]]})}
    [score] = fig9.objects_with_place(Settings("s", [city], []), done)
    assert (score.mean, score.count) == (-0.5, 1)
    assert fig9.apart_from_place(score).holds
    city.scene_judge = None
    assert fig9.objects_with_place(Settings("s", [city], []), done) == []


def test_areas_have_names(tmp_path: Path) -> None:
    city = City("Town", "m", "b", "p", "c", "g")
    assert fig6.areas_of(city) == {}
    city.area_names = ["park", "moon"]
    with pytest.raises(ValueError, match="moon"):
        fig6.areas_of(city)
    city.areas = str(tmp_path / "no.geojson")
    with pytest.raises(ValueError, match="no.geojson has not the areas of Town"):
        fig6.areas_of(city)


def box(name: str, west: float, east: float) -> dict[str, Any]:
    south, north = CITY.south, CITY.north
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {"type": "Feature", "properties": {"name": name},
            "geometry": {"type": "Polygon", "coordinates": [ring]}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_angle_model: Path, tiny_sd_model: Path,
         tiny_gps_model: Path, city_dataset: Path, miniature_dataset: Path) -> Path:
    """What the command leaves of a city and a landmark with untrained models and judges."""
    folder = tmp_path_factory.mktemp("reproduce")
    torch.manual_seed(0)
    judges: list[tuple[str, Any]] = [
        ("classifier", AngleClassifier(36, (8, 16), 0.5, 1.0, 4)),
        ("gps-clip", GPSClip(CITY.as_tuple(), 16, widths=(8, 16))),
        ("scene", SceneJudge((8, 16))),
    ]
    for name, judge in judges:
        judge.save_pretrained(folder / name)
    (folder / "areas.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [
        box("Whole", CITY.west, CITY.east), box("Also whole", CITY.west, CITY.east - 0.001)]}))
    settings = {
        "scale": "mine", "seeds": [3, 4],
        "cities": [{
            "name": "Pisa", "model": str(tiny_gps_model), "base": str(tiny_sd_model),
            "pairs": "miniatown", "clip": "none", "gps_clip": str(folder / "gps-clip"),
            "dataset": str(city_dataset), "scene_judge": str(folder / "scene"),
            "areas": str(folder / "areas.geojson"), "area_locations": 3, "steps": 2,
            "attention_prompts": ["a red car in the sun"],
            "attention_places": {"The tower": [43.723, 10.3966]}, "resolution": RESOLUTION,
        }],
        "landmarks": [{
            "name": "The tower", "model": str(tiny_angle_model), "text_model": str(tiny_sd_model),
            "classifier": str(folder / "classifier"), "dataset": str(miniature_dataset),
            "steps": 1, "images_per_bin": 2,
        }],
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "mine.yaml")
    command(folder)
    return folder / "out"


def command(folder: Path, *more: str) -> None:
    assert cli.main(["reproduce", "table2", "fig6", "fig9", "--scale", str(folder / "mine.yaml"),
                     "--out", str(folder / "out"), "--processes", "1", *more]) == 0


def test_table_2_of_untrained_models(made: Path) -> None:
    table = json.loads((made / "table2.json").read_text())
    assert list(table["rows"]) == ["chance", "text", "no-angle", "ours", "photos"]
    for row in table["rows"].values():
        assert 0 <= row["angle_accuracy"] <= row["within_one"] <= 100
    assert table["counts"]["ours"] == {"angle_accuracy": 72, "within_one": 72}  # 2 of 36 bins
    assert table["rows"]["photos"] == {"angle_accuracy": 50, "within_one": 100}
    assert table["paper"]["ours"]["angle_accuracy"] == 22.36
    assert read_png(made / "work/the-tower/bearings-ours/shown.png").shape == (32, 12 * 32, 3)


def test_fig_6_and_9_of_untrained_models(made: Path) -> None:
    table = json.loads((made / "fig6.json").read_text())
    assert list(table["rows"]) == ["Whole", "Also whole", "all", "chance"]
    assert table["rows"]["chance"] == {"own": 50, "place": pytest.approx(100 / 12)}
    assert table["counts"]["all"]["gps"] == 4  # two areas, two seeds
    photos = json.loads((made / "work/pisa/area-photos" / RESULT).read_text())["result"]["photos"]
    assert photos == {"Whole": 12, "Also whole": 12}
    found = json.loads((made / "work/pisa/attention-0-the-tower" / RESULT).read_text())["result"]
    assert [name for name, _ in found["with_place"]][:5] == ["a", "red", "car", "in", "the"]
    assert all(-1 <= value <= 1 for _, value in found["with_place"])


def test_the_page_of_a_reproduction(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert re.findall(r'<h2 id="(\w+)"', page) == ["table2", "fig6", "fig9"]
    assert page.count("data:image/png") == 4
    assert "43.72" not in page and "10.39" not in page  # no position


def test_nothing_is_made_twice(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled again")

    before = (made / "table2.json").read_bytes()
    samplers: list[tuple[Any, str]] = [
        (angles, "sample_angles"), (table2, "sample_texts"), (fig6, "sample_average"),
        (fig9, "sample_gps")]
    for module, name in samplers:
        monkeypatch.setattr(module, name, fail)
    command(made.parent)
    assert (made / "table2.json").read_bytes() == before
    with pytest.raises(AssertionError, match="sampled again"):
        command(made.parent, "landmarks.0.guidance_scale=3")


def test_the_truth_of_a_procedural_landmark(tmp_path: Path) -> None:
    about: dict[str, Any] = {"name": "x", "model": "miniature-pisa", "text_model": ""}
    found = table2.read_photos(tmp_path, about)
    assert found["held_out"] > 100 and found["within_one"] > 0.9
    shown = sheets.read_row(tmp_path / "shown.png", 12)
    assert shown[0].shape == (64, 64, 3) and not np.array_equal(shown[0], shown[6])


@pytest.mark.parametrize(("change", "said"), [
    ({}, "holds no classifier"), ({"classifier": "bins"}, "reads 12 bins"),
    ({"model": "gps"}, "GPS model"),
])
def test_a_landmark_without_a_judge(
    tmp_path: Path, tiny_angle_model: Path, tiny_gps_model: Path, change: dict[str, str], said: str
) -> None:
    AngleClassifier(12, (8, 16)).save_pretrained(tmp_path / "bins")
    AngleClassifier(36, (8, 16)).save_pretrained(tmp_path / "right")
    about = {"name": "x", "model": str(tiny_angle_model), "text_model": ""}
    if "classifier" in change:
        about["classifier"] = str(tmp_path / change["classifier"])
    if "model" in change:
        about |= {"model": str(tiny_gps_model), "classifier": str(tmp_path / "right")}
    with pytest.raises(ValueError, match=said):
        table2.read_photos(tmp_path, about)
