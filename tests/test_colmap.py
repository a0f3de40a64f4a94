"""COLMAP on tourists' photos: its model in metres; a failure is a verdict and no error."""

import builtins
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from gps_guidance.lift import colmap, nerf
from gps_guidance.lift.cameras import ray_directions
from gps_guidance.lift.colmap import Camera, Photo, Registration, find_photos, register
from gps_guidance.miniature import photographer
from gps_guidance.miniature.tower import TOWER

needs_colmap = pytest.mark.skipif(
    importlib.util.find_spec("pycolmap") is None,
    reason='COLMAP is not installed: pip install "gps-guidance[colmap]"',
)


def plain_photos(folder, count):
    """Photos without a single feature, the last of them without a position."""
    folder.mkdir()
    for k in range(count):
        exif = None if k == count - 1 else photographer.gps_exif(
            43.7226 + 1e-4 * k, 10.3967, "2024:05:01 12:00:00")
        Image.new("RGB", (64, 48), (90, 120, 60)).save(folder / f"{k}.jpg", exif=exif or b"")
    return folder


def test_photos_of_a_folder_have_their_positions(tmp_path):
    found = find_photos(plain_photos(tmp_path / "photos", 3))
    assert [photo.path.name for photo in found] == ["0.jpg", "1.jpg", "2.jpg"]
    assert found[1].position == pytest.approx((43.7227, 10.3967), abs=1e-7)
    assert found[2].position is None
    with pytest.raises(ValueError, match="no photos"):
        find_photos(tmp_path / "nothing")


def test_photos_of_a_dataset_have_their_positions(miniature_dataset):
    found = find_photos(miniature_dataset)
    assert found and all(photo.path.is_file() and photo.position for photo in found)
    assert nerf.find_place(miniature_dataset, height_m=50.0).center == pytest.approx(TOWER.center)


def test_without_pycolmap_the_command_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "pycolmap":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r'pip install "gps-guidance\[colmap\]"'):
        register([Photo(colmap.Path("a.jpg"), None)], TOWER.center)


def test_the_frame_of_the_miniature_is_the_one_that_is_scored():
    place = nerf.find_place("photos", TOWER.name)
    points = torch.rand(5, 3) * 40
    units = TOWER.to_scene_units(points)
    assert np.allclose(place.to_scene_units(points.numpy()), units, atol=1e-6)


def test_a_place_by_name_or_by_centre_and_height():
    needle = nerf.find_place("photos", "space-needle")
    assert needle.name == "Space Needle" and needle.middle_m == 92.0
    mine = nerf.find_place("photos", "My statue", (59.9409, 30.2966), 5.0)
    assert (mine.middle_m, mine.metres_per_unit) == (2.5, 3.0)
    with pytest.raises(ValueError, match=r"landmark is 'My statue'.*give its center"):
        nerf.find_place("photos", "My statue")


def test_cameras_are_measured_against_the_truth(tmp_path):
    rows = [{"file": "a.jpg", "position_m": [0.0, 90.0, 1.7]},
            {"file": "b.jpg", "position_m": [90.0, 0.0, 1.7]}]
    (tmp_path / "truth.json").write_text(json.dumps({"photos": rows}))
    given = [Photo(tmp_path / "a.jpg", None), Photo(tmp_path / "b.jpg", None)]
    c2w = np.eye(4)
    c2w[:3, 3] = 90.0 * np.sin(np.radians(4)), 90.0 * np.cos(np.radians(4)), 1.7
    found = Registration(2, (1,), cameras=[Camera(0, c2w, None)])
    errors = nerf._camera_errors(found, given, tmp_path)
    assert errors["camera_bearing_error_deg"] == pytest.approx(4.0)
    assert errors["camera_error_m"] == pytest.approx(2 * 90 * np.sin(np.radians(2)))
    assert nerf._camera_errors(found, given, tmp_path / "elsewhere") == {}


def around_the_tower(count, focal=300.0):
    """True cameras ``c2w`` [4, 4] in metres around the tower, and COLMAP's model of them in a frame
    that is turned, shifted and a tenth as large."""
    import pycolmap

    model, true = pycolmap.Reconstruction(), []
    for k in range(count):
        at = photographer.stand_at(360.0 * k / count, 80.0 + k, colmap.EYE_M)
        c2w = photographer.look_at(at, TOWER.middle).double().numpy()
        turn = (c2w[:3, :3] @ colmap.OPENCV_TO_OPENGL).T
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(turn), -turn @ c2w[:3, 3])
        lens = pycolmap.Camera.create_from_model_id(
            k + 1, pycolmap.CameraModelId.SIMPLE_PINHOLE, focal, 128, 96)
        model.add_camera_with_trivial_rig(lens)
        model.add_image_with_trivial_frame(
            pycolmap.Image(name=f"{k}.png", camera_id=k + 1, image_id=k + 1), pose)
        model.add_point3D(np.array([k, 0.0, 5.0]), pycolmap.Track())
        true.append(c2w)
    turn = pycolmap.Rotation3d(np.array([0.3, -1.1, 0.7]))
    model.transform(pycolmap.Sim3d(0.1, turn, np.array([4.0, 5.0, -6.0])))
    return true, model


@needs_colmap
@pytest.mark.parametrize("wrong", [0, 3])
def test_a_model_is_brought_to_metres(wrong):
    """By positions by GPS, also where some are 500 m off and one photo has none."""
    import pycolmap

    true, model = around_the_tower(16)
    ground = [c2w[:2, 3] + [500.0 if k < wrong else 0.0, 0.0] for k, c2w in enumerate(true)]
    photos = [Photo(colmap.Path(f"{k}.jpg"), tuple(colmap.geo.from_local_m(at, TOWER.center)))
              for k, at in enumerate(ground)]
    photos[7] = Photo(photos[7].path, None)
    found = colmap._in_metres(pycolmap, Registration(16, (16,)), model, photos, TOWER.center, 0)
    assert found.failure is None and found.gps_residual_m < 0.01
    assert [camera.photo for camera in found.cameras] == list(range(16))
    for camera, c2w in zip(found.cameras, true, strict=True):
        assert np.allclose(camera.c2w, c2w, atol=1e-3)
    assert np.allclose(sorted(found.points_m[:, 0]), range(16), atol=1e-3)


@needs_colmap
def test_directions_are_those_of_a_camera_at_any_size():
    lens = next(iter(around_the_tower(1)[1].cameras.values()))
    fovy = 2 * torch.atan(torch.tensor([48.0 / 300.0]))
    found = Camera(0, np.eye(4), lens).directions(48, 64)
    assert np.allclose(found, ray_directions(48, 64, fovy)[0], atol=1e-6)
    assert (lens.width, lens.height) == (128, 96)


@needs_colmap
def test_a_model_of_another_shape_than_the_place_is_a_failure():
    """A symmetric landmark folds: its far side is put on its near one. GPS tells."""
    import pycolmap

    true, model = around_the_tower(16)
    ground = [c2w[:2, 3] * ([1.0, 1.0] if k < 5 else [-1.0, 0.2]) for k, c2w in enumerate(true)]
    photos = [Photo(colmap.Path(f"{k}.jpg"), tuple(colmap.geo.from_local_m(at, TOWER.center)))
              for k, at in enumerate(ground)]
    found = colmap._in_metres(pycolmap, Registration(16, (16,)), model, photos, TOWER.center, 0)
    assert "of 16 cameras lie within 10 m of their GPS" in str(found.failure)
    assert not found.cameras


@needs_colmap
def test_too_few_positions_are_a_failure():
    import pycolmap

    _, model = around_the_tower(4)
    photos = [Photo(colmap.Path(f"{k}.jpg"), None) for k in range(4)]
    found = colmap._in_metres(pycolmap, Registration(4, (4,)), model, photos, TOWER.center, 0)
    assert "only 0 of the registered photos have a position" in str(found.failure)


@needs_colmap
def test_photos_without_features_are_a_verdict(tmp_path):
    scores = nerf.nerf_from_photos(plain_photos(tmp_path / "photos", 4), tmp_path / "out",
                                   TOWER.name, threads=1)
    assert scores["verdict"] == "failed" and "no model among 4 photos" in scores["reason"]
    assert scores["registered"] == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == scores
    assert not (tmp_path / "out" / "field.safetensors").exists()
