"""Lists of prompts and positions: how one is drawn, and what the bundled ones are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import shapely
from shapely.geometry import box, mapping

from gps_guidance import geo
from gps_guidance.reproduce.city import PAIRS, load_pairs

SCRIPT = Path(__file__).parents[1] / "examples" / "make_pairs.py"
ZONES = [("Uptown", box(-74.00, 40.75, -73.96, 40.80)),
         ("Downtown", box(-74.01, 40.72, -74.00, 40.73))]
SIGHTS = [(40.76, -73.99), (40.77, -73.98), (40.7999999, -73.9600001), (41.5, -73.0)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_pairs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_pairs"] = module
    spec.loader.exec_module(module)
    return module


def test_every_zone_and_concept_is_as_frequent_as_any_other(script: ModuleType) -> None:
    rows = script.draw_pairs(ZONES, SIGHTS, "here", count=129, seed=3)
    assert [row["id"] for row in rows] == [f"here-{k:04d}" for k in range(129)]
    assert sorted(Counter(row["address"] for row in rows).values()) == [64, 65]
    assert sorted(Counter(row["prompt"] for row in rows).values()) == [2] * 63 + [3]
    assert rows == script.draw_pairs(ZONES, SIGHTS, "here", count=129, seed=3)
    assert rows != script.draw_pairs(ZONES, SIGHTS, "here", count=129, seed=4)


def test_positions_lie_in_their_zone_and_some_at_its_sights(script: ModuleType) -> None:
    rows = script.draw_pairs(ZONES, SIGHTS, "here", count=40)
    for row in rows:
        zone = dict(ZONES)[row["address"]].buffer(1e-5)  # rounded to a metre
        assert shapely.contains_xy(zone, row["lon"], row["lat"])
    points = np.array([(row["lat"], row["lon"]) for row in rows])
    away = geo.distance_m(points[:, None], np.array(SIGHTS)[None])
    near = (away < script.JITTER_M + 1).sum(axis=0)
    assert (near[:3] >= 1).all() and near[3] == 0  # each once, and by chance another
    assert near.sum() <= 5


def test_the_prompt_is_drawn_apart_from_the_place(script: ModuleType) -> None:
    """Another city's positions leave the prompts as they are."""
    here = script.draw_pairs(ZONES, SIGHTS, "here", count=50)
    there = script.draw_pairs(ZONES[:1], [], "there", count=50)
    assert [row["prompt"] for row in here] == [row["prompt"] for row in there]
    assert [row["lat"] for row in here] != [row["lat"] for row in there]


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Two neighbourhoods, one of another borough, and a museum, in the files of New York."""
    zones = [("Manhattan", "East-West", box(-74.00, 40.72, -73.96, 40.80)),
             ("Manhattan", "park-cemetery-etc-Manhattan", box(-73.96, 40.72, -73.95, 40.73)),
             ("Brooklyn", "Borough Park", box(-73.99, 40.70, -73.98, 40.71))]
    features = [{"type": "Feature", "properties": {"BoroName": borough, "NTAName": name},
                 "geometry": mapping(outline)} for borough, name, outline in zones]
    (tmp_path / "nta.geojson").write_text(json.dumps({"features": features}))
    (tmp_path / "MUSEUM.csv").write_text(
        "the_geom,NAME\nPOINT (-73.98 40.75),A\n,without a place\nPOINT (oops),B\n")
    return tmp_path


def make(places: Path, city: str, out: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, city, places, "--out", places / out],
                          capture_output=True, text=True, check=False)


def test_the_same_files_give_the_same_bytes(places: Path) -> None:
    for out in ("a.json", "b.json"):
        done = make(places, "nyc", out)
        assert done.returncode == 0, done.stderr
    assert (places / "a.json").read_bytes() == (places / "b.json").read_bytes()
    rows = load_pairs(str(places / "a.json"))
    assert len(rows) == 646
    assert {row["address"] for row in rows} == {"East, West, New York", "Manhattan, New York"}


def test_a_missing_file_is_named_with_its_address(places: Path) -> None:
    refused = make(places, "paris", "a.json")
    assert refused.returncode == 2
    assert "quartier_paris.geojson is missing: download https://" in refused.stderr


@pytest.mark.parametrize(("name", "town", "zones"),
                         [("nyc", "New York", 29), ("paris", "Paris", 80)])
def test_the_bundled_lists(script: ModuleType, name: str, town: str, zones: int) -> None:
    rows = load_pairs(name)
    assert len(rows) == 646 and len({row["id"] for row in rows}) == 646
    assert set(Counter(row["prompt"] for row in rows).values()) == {10, 11}
    shares = Counter(row["address"] for row in rows)
    assert len(shares) == zones and max(shares.values()) - min(shares.values()) <= 1
    about = json.loads((PAIRS / f"{name}.json").read_text("utf-8"))["about"]
    points = np.array([(row["lat"], row["lon"]) for row in rows])
    assert geo.Bounds(*about["bounds"]).contains(points).all()
    assert tuple(about["bounds"]) == script.CITIES[name].bounds.as_tuple()
    assert len(np.unique(points, axis=0)) == 646
    for row in rows:
        assert row["address"].endswith(town) and row["prompt"] in script.CONCEPTS
    assert all(source["attribution"] and source["licence"] for source in about["sources"])
