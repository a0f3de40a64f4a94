"""Every YAML in threestudio_configs trains two steps and leaves everything that a run leaves.

With tiny models: the bundled one is used by test_report.py and test_readme.py. Where
THREESTUDIO_PATH names a clone, each is also built by threestudio itself.
"""

import csv
import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
import yaml

from gps_guidance.geo import LANDMARKS
from gps_guidance.lift.config import load_config
from gps_guidance.lift.plan import make_plan
from gps_guidance.miniature.arch import ARCH
from gps_guidance.miniature.landmark import EYE_M as MINIATURE_EYE_M
from gps_guidance.miniature.tower import TOWER

CONFIGS = sorted((small_runs.ROOT / "threestudio_configs").glob("*.yaml"))
PAPER = {key: small_runs.ROOT / "threestudio_configs" / f"gps-sds-{key}-paper.yaml"
         for key in LANDMARKS}
PERP_NEG = small_runs.ROOT / "threestudio_configs" / "dreamfusion-pisa-perp-neg.yaml"
OTHERS = [*(path for key, path in PAPER.items() if key != "pisa"), PERP_NEG]  # close to one tried
PORTABLE = [PERP_NEG, PERP_NEG.with_name("dreamfusion-pisa.yaml")]  # keys that threestudio lacks
EYE_M = 1.6


@pytest.mark.parametrize("config", [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path in OTHERS else ())
    for path in CONFIGS])
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
    assert (scores["mask_iou"] is not None) == (config in PORTABLE)  # their prompt has a truth
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


def read(path):
    return yaml.safe_load(path.read_text("utf-8"))


def test_the_papers_landmarks_differ_in_names_and_cameras_alone():
    cameras = {"camera_distance_range", "elevation_range", "fovy_range", "eval_camera_distance",
               "eval_elevation_deg", "eval_fovy_deg"}
    rest = []
    for key, path in PAPER.items():
        config = read(path)
        assert config.pop("name") == f"gps-sds-{key}-paper"
        config["data"] = {k: v for k, v in config["data"].items() if k not in cameras}
        rest.append(config)
    assert all(config == rest[0] for config in rest)


def test_the_papers_recipe_is_as_printed():
    config = read(PAPER["pisa"])
    guidance = config["system"]["guidance"]
    assert config["trainer"]["max_steps"] == 10_000
    assert guidance["min_step_percent"] == [0, 0.98, 0.02, 8000]
    assert guidance["max_step_percent"] == [0, 0.98, 0.50, 8000]
    assert guidance["weighting_strategy"] == "sds"  # sigma^2
    assert config["system"]["optimizer"]["name"] == "Adam"
    assert config["system"]["optimizer"]["args"]["lr"] == 0.01
    assert config["system"]["material"]["ambient_only_steps"] == 1001  # steps 0 to 1000
    dreamfusion = read(small_runs.ROOT / "threestudio_configs" / "dreamfusion-sd.yaml")
    for part in ("geometry", "material", "background", "renderer", "loss", "optimizer"):
        assert config["system"][part] == dreamfusion["system"][part], part


@pytest.mark.parametrize("key", LANDMARKS)
def test_the_cameras_of_a_landmark_stand_where_its_figures_say(key):
    data, place = read(PAPER[key])["data"], LANDMARKS[key]
    comment = " ".join(re.findall(r"^ *# (.*)", PAPER[key].read_text("utf-8"), re.M))
    lat, north, lon, east = re.search(r"([\d.]+) ([NS]) ([\d.]+) ([EW])", comment).groups()
    assert float(lat) * (1 if north == "N" else -1) == place.lat
    assert float(lon) * (1 if east == "E" else -1) == place.lon
    unit, radius = (float(re.search(pattern, comment)[1]) for pattern in (
        r"One unit is ([\d.]+) m", r"a radius of (\d+) m"))
    below = place.height_m / 2 - EYE_M
    assert 2 * unit >= place.height_m  # it lies within one unit of the middle
    for ground, distance, elevation in (
        (radius / 2, data["camera_distance_range"][0], data["elevation_range"][0]),
        (radius, data["camera_distance_range"][1], data["elevation_range"][1]),
        (0.75 * radius, data["eval_camera_distance"], data["eval_elevation_deg"]),
    ):
        assert distance == pytest.approx(math.hypot(ground, below) / unit, abs=0.006)
        assert elevation == pytest.approx(-math.degrees(math.atan2(below, ground)), abs=0.06)
    for part, fovy in zip((1.0, 0.7), data["fovy_range"], strict=True):
        seen = data["eval_camera_distance"] * math.tan(math.radians(fovy / 2))
        assert 1 / seen == pytest.approx(part, abs=0.005)


def test_the_miniatures_landmarks_differ_in_model_and_cameras_alone():
    configs = []
    for landmark, name in ((TOWER, "pisa"), (ARCH, "arch")):
        config = read(small_runs.ROOT / "threestudio_configs" / f"gps-sds-{name}.yaml")
        assert config.pop("name") == f"gps-sds-{name}"
        config["system"]["guidance"].pop("pretrained_model_name_or_path")
        data = config["data"]
        below, unit = landmark.middle_m - MINIATURE_EYE_M, landmark.metres_per_unit
        distance = 0.97 * math.hypot(90, below) / unit
        assert data.pop("eval_camera_distance") == pytest.approx(distance, abs=0.01)
        elevation = -math.degrees(math.asin(below / unit / distance))
        assert data.pop("eval_elevation_deg") == pytest.approx(elevation, abs=0.1)
        assert sum(data.pop("camera_distance_range")) / 2 == pytest.approx(distance, abs=0.02)
        assert sum(data.pop("elevation_range")) / 2 == pytest.approx(elevation, abs=0.1)
        configs.append(config)
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("name", "scales"), [
    ("dreamfusion-sd", (100, 100)), ("dreamfusion-pisa", (7.5, 8.5))])
def test_the_baselines_differ_in_perp_neg_alone(name, scales):
    plain, perp_neg = (read(small_runs.ROOT / "threestudio_configs" / f"{stem}.yaml")
                       for stem in (name, f"{name}-perp-neg"))
    assert perp_neg["system"]["prompt_processor"].pop("use_perp_neg")
    assert perp_neg.pop("name") != plain.pop("name")
    assert scales == tuple(c["system"]["guidance"].pop("guidance_scale") for c in (plain, perp_neg))
    assert plain == perp_neg


def test_the_miniatures_baseline_differs_in_what_the_model_is_told_alone():
    """Its image term is 0.5 x 3 x 64 x 64 times ours at the same weight (test_guidance.py)."""
    ours, baseline = (load_config(name) for name in ("gps-sds-pisa", "dreamfusion-pisa"))
    assert (ours.data, ours.trainer, ours.seed) == (baseline.data, baseline.trainer, baseline.seed)
    told = {"guidance_type", "guidance", "prompt_processor_type", "prompt_processor", "loss"}
    assert {key for key in ours.system if ours.system[key] != baseline.system[key]} == told
    image = baseline.system["loss"].pop("lambda_sds_img") * 0.5 * 3 * 64 * 64
    assert image == pytest.approx(ours.system["loss"].pop("lambda_sds_img"))
    assert ours.system["loss"] == baseline.system["loss"]
    plan, theirs = make_plan(ours), make_plan(baseline)
    mine, other = (vars(p.parts["guidance"][1]) for p in (plan, theirs))
    differ = {key for key in set(mine) & set(other) if mine[key] != other[key]}
    assert differ == {"pretrained_model_name_or_path", "view_dependent_prompting", "guidance_scale"}


IN_THREESTUDIO = '''
import json, os, sys

sys.path.insert(0, sys.argv[1])
from gps_guidance.nocompile import host

host.prepare()
host.load_extension()
import threestudio
from threestudio.systems.base import BaseSystem
from threestudio.utils.config import load_config

for path, overrides in json.loads(sys.argv[2]):
    cfg = load_config(path, cli_args=overrides, n_gpus=1)
    data = threestudio.find(cfg.data_type)(cfg.data)
    data.setup("fit")
    system = threestudio.find(cfg.system_type)(cfg.system, resumed=False)
    system.on_fit_start()
    system.configure_optimizers()
    batch = data.train_dataset.collate(None)
    terms = system.guidance(
        system.renderer(**batch)["comp_rgb"], system.prompt_processor(), **batch)
    assert terms["loss_sds"].isfinite(), path
    print("BUILT", os.path.basename(path), flush=True)
'''


@pytest.mark.slow
def test_threestudio_itself_builds_each(tmp_path, tiny_angle_model, tiny_sd_model):
    folder = os.environ.get("THREESTUDIO_PATH")
    if not folder:
        pytest.skip("THREESTUDIO_PATH is not set: the configs were not tried in threestudio")
    models = {"gps-sds-guidance": tiny_angle_model, "stable-diffusion-guidance": tiny_sd_model}
    # embedded in this process: a child would not have the stand-ins
    runs = [(str(path), [*small_runs.overrides(path, models, always_tiny=True),
                         "system.prompt_processor.spawn=false"])
            for path in CONFIGS if path not in PORTABLE]
    environment = os.environ | {"PYTHONPATH": str(small_runs.ROOT)}
    done = subprocess.run([sys.executable, "-c", IN_THREESTUDIO, folder, json.dumps(runs)],
                          cwd=tmp_path, env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    built = re.findall(r"^BUILT (.*)$", done.stdout, re.M)
    assert built == [Path(path).name for path, _ in runs]
