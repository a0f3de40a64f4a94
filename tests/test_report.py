"""What a run leaves for people: metrics.json, mesh.glb, report.html with all its pictures."""

import json
import logging
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import small_runs
import trimesh
from PIL import Image

from gps_guidance.encoders import AngleEncoder
from gps_guidance.lift import export, report
from gps_guidance.miniature.arch import ARCH
from gps_guidance.miniature.photographer import take_photos
from gps_guidance.miniature.tower import TOWER
from gps_guidance.photos.ingest import ingest
from gps_guidance.photos.manifest import load_manifest

REQUIRED = {"mask_iou", "occupancy_iou", "psnr_db", "bearing_within_one_bin", "seconds",
            "peak_memory_bytes", "model", "engine", "device"}
PISA = small_runs.ROOT / "threestudio_configs" / "gps-sds-pisa.yaml"


class Links(HTMLParser):
    """Everything that a page refers to, and its texts."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def run(folder, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        few = small_runs.overrides(PISA, {})
        code = small_runs.launch("--config", str(PISA), "--train", *few, "tag=small", *more)
    assert code == 0
    return folder / "outputs" / "gps-sds-pisa" / "small"


def read(trial):
    return json.loads((trial / "metrics.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """Two steps with the bundled model."""
    return run(tmp_path_factory.mktemp("bundled"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four photos of the miniature, with a mask for each."""
    folder = tmp_path_factory.mktemp("photos")
    take_photos(folder / "raw", 4, 0, 1)
    out = folder / "dataset"
    ingest([folder / "raw"], out, landmark=TOWER.name, center=TOWER.center, progress=False)
    (out / "masks").mkdir()
    for name in load_manifest(out).rows.column("id").to_pylist():
        Image.fromarray(np.full((96, 96), 255, np.uint8)).save(out / "masks" / f"{name}.png")
    return out


def test_the_scores_have_the_promised_keys(bundled):
    scores = read(bundled)
    assert set(scores) >= REQUIRED
    for key in ("mask_iou", "occupancy_iou", "bearing_within_one_bin"):
        assert 0 <= scores[key] <= 1, key
    assert 0 < scores["psnr_db"] < 60 and scores["seconds"] >= 0
    assert scores["peak_memory_bytes"] > 10**8  # bytes, not kilobytes
    assert (scores["model"], scores["engine"], scores["device"]) == (
        "miniature-pisa", "portable", "cpu")


def test_the_page_is_complete_by_itself(bundled):
    page = (bundled / "report.html").read_text("utf-8")
    links = Links(page)
    assert not [link for link in links.found if re.match(r"(https?:)?//|/", link)]
    assert all((bundled / link).is_file() for link in links.found)
    assert {"save/it2-test.mp4", "metrics.json", "mesh.glb"} <= set(links.found)
    pictures = [link for link in links.found if link.endswith(".png")]
    # photos, generated images, renders and truth from twelve bearings
    assert len(pictures) == len(set(pictures)) == 4 * 12
    text = " ".join(links.text)
    assert TOWER.name in text and "330°" in text
    scores = read(bundled)
    assert f"{scores['mask_iou']:.3f}" in text and f"{scores['psnr_db']:.3f}" in text


def test_the_mesh_stands_in_the_fields_box_and_says_where(bundled):
    mesh = trimesh.load(bundled / "mesh.glb", force="mesh")
    assert len(mesh.faces) > 0 and np.abs(mesh.bounds).max() <= 1.4 + 1e-5


def test_the_video_has_one_frame_a_view(bundled):
    import imageio.v2 as imageio

    frames = imageio.mimread(bundled / "save" / "it2-test.mp4", memtest=False)
    assert len(frames) == 4 and frames[0].shape == (16, 48, 3)  # colour, normal, opacity


def test_other_models_are_not_scored_against_the_miniatures_truth(tmp_path, tiny_angle_model):
    tiny = [f"system.{part}.pretrained_model_name_or_path={tiny_angle_model}"
            for part in ("guidance", "prompt_processor")]
    trial = run(tmp_path, *tiny)
    scores = read(trial)
    assert set(scores) >= REQUIRED
    assert [scores[key] for key in ("mask_iou", "occupancy_iou", "psnr_db",
                                    "bearing_within_one_bin")] == [None] * 4
    assert "not measured" in (trial / "report.html").read_text("utf-8")


def test_the_truth_is_found_by_the_models_landmark_or_by_the_prompt(tmp_path):
    AngleEncoder(8, landmark=ARCH.name).save_pretrained(tmp_path / "gps_encoder")
    silent, prompted = (SimpleNamespace(cfg=SimpleNamespace(system=system)) for system in (
        {}, {"prompt_processor": {"prompt": f"A photo of {TOWER.name}"}}))
    assert report._miniature(silent, (tmp_path, None)) is ARCH
    assert report._miniature(prompted, (tmp_path, None)) is ARCH  # the images are the model's
    assert report._miniature(prompted, None) is TOWER
    assert report._miniature(silent, None) is None


def test_a_field_without_a_surface_costs_the_mesh_alone(tmp_path, tiny_angle_model, caplog):
    caplog.set_level(logging.INFO, logger="gps_guidance")
    tiny = [f"system.{part}.pretrained_model_name_or_path={tiny_angle_model}"
            for part in ("guidance", "prompt_processor")]
    trial = run(tmp_path, *tiny, "system.geometry.density_bias=-40.",
                "system.geometry.density_blob_scale=0.")
    assert not (trial / "mesh.glb").exists()
    assert any("No mesh.glb: The field has no surface" in r.getMessage() for r in caplog.records)
    links = Links((trial / "report.html").read_text("utf-8")).found
    assert "mesh.glb" not in links and all((trial / link).is_file() for link in links)
    assert set(read(trial)) >= REQUIRED


def test_photos_are_compared_from_their_own_bearings(tmp_path, tiny_angle_model, dataset):
    tiny = [f"system.{part}.pretrained_model_name_or_path={tiny_angle_model}"
            for part in ("guidance", "prompt_processor")]
    trial = run(tmp_path, "--photos", str(dataset), *tiny)
    scores = read(trial)
    assert scores["views"] == 4 and 0 < scores["psnr_db"] < 60
    assert 0 < scores["psnr_affine_db"] < 60
    assert 0 <= scores["mask_iou"] <= 1 and 0 <= scores["bearing_within_15_deg"] <= 1
    page = (trial / "report.html").read_text("utf-8")
    assert "Photos taken nearest to each bearing" in page
    picture = export.read_png(trial / "report" / "0-00.png")
    assert picture.shape == (16, 16, 3) and picture.std() > 5
