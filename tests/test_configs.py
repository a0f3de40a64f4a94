"""Every YAML in threestudio_configs trains two steps and leaves everything that a run leaves.

With tiny models: the bundled one is used by test_report.py and test_readme.py.
"""

import csv
import json
import logging
import math

import pytest
import small_runs

CONFIGS = sorted((small_runs.ROOT / "threestudio_configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_it_trains_two_steps(config, tmp_path, monkeypatch, caplog, tiny_angle_model,
                             tiny_sd_model):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="gps_guidance")
    models = {"gps-sds-guidance": tiny_angle_model, "stable-diffusion-guidance": tiny_sd_model}
    few = small_runs.overrides(config, models, always_tiny=True)
    assert small_runs.launch("--config", config.stem, "--train", *few, "tag=small") == 0
    (trial,) = tmp_path.glob("outputs/*/small")
    scores = json.loads((trial / "metrics.json").read_text("utf-8"))
    assert scores["engine"] == "portable" and scores["seconds"] >= 0
    page = (trial / "report.html").read_text("utf-8")
    messages = [record.getMessage() for record in caplog.records]
    no_surface = any("No mesh.glb: The field has no surface" in text for text in messages)
    assert (trial / "mesh.glb").is_file() != no_surface
    assert ("mesh.glb" in page) != no_surface
    assert (trial / "save" / "it2-test.mp4").stat().st_size > 500
    assert (trial / "ckpts" / "last.ckpt").is_file()
    with open(trial / "csv_logs" / "version_0" / "metrics.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def test_there_are_configs_to_test():
    assert {"gps-sds-pisa", "dreamfusion-sd"} <= {path.stem for path in CONFIGS}
