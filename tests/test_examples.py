"""The scripts in examples/ run as their pages say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from shapely.geometry import box, mapping

ROOT = Path(__file__).parents[1]


def run(folder, script, *args):
    return subprocess.run([sys.executable, ROOT / "examples" / script, *map(str, args)], cwd=folder,
                          capture_output=True, text=True, check=False)


def test_a_landmark_by_bearing(tmp_path):
    done = run(tmp_path, "sample.py", "--bearings", 0, 90, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "sample.png").size == (128, 64)


def test_a_city_by_position(tiny_gps_model, tmp_path):
    done = run(tmp_path, "sample.py", tiny_gps_model, "--prompt", "front view", "back view",
               "--steps", 1, "--gps", "43.71,10.40", "43.72,10.40", "43.73,10.40")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "sample.png").size == (3 * 32, 2 * 32)
    refused = run(tmp_path, "sample.py", tiny_gps_model)
    assert refused.returncode == 2 and "add --gps LAT,LON" in refused.stderr


@pytest.mark.parametrize("streets", [False, True])
def test_an_area(tiny_gps_model, tmp_path, streets):
    area = box(10.39, 43.71, 10.41, 43.73)
    (tmp_path / "area.geojson").write_text(json.dumps(mapping(area)))
    given = []
    if streets:
        (tmp_path / "roads.geojson").write_text(json.dumps(mapping(area.boundary)))
        given = ["--streets", "roads.geojson", "--per-step", 2]
    done = run(tmp_path, "average.py", tiny_gps_model, "a building", "area.geojson",
               "--locations", 4, "--steps", 2, *given)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "average.png").size == (32, 32)
    assert min(Image.open(tmp_path / "average-map.png").size) > 200


def test_attention_in_a_city(tiny_gps_model, tmp_path):
    done = run(tmp_path, "attention.py", tiny_gps_model, "front view", "--gps", "43.71,10.40",
               "--steps", 2, "--out", "maps.png")
    assert done.returncode == 0, done.stderr
    assert min(Image.open(tmp_path / "maps.png").size) > 200


def test_photos_that_colmap_cannot_place(tmp_path):
    pytest.importorskip("pycolmap", reason='pip install "gps-guidance[colmap]"')
    done = run(tmp_path, "nerf_from_photos.py", "--miniature", "Miniature Tower of Pisa",
               "--count", 3, "--scale", 1, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "nerf" / "metrics.json").read_text())
    assert json.loads(done.stdout)["verdict"] == "failed"
    refused = run(tmp_path, "nerf_from_photos.py")
    assert refused.returncode == 2 and "--miniature NAME" in refused.stderr
