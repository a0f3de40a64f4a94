"""Cameras: where they stand, what their rays hit, and what a batch is a function of."""

import math
import random

import pytest
import torch

from gps_guidance import geo
from gps_guidance.lift import cameras
from gps_guidance.lift.cameras import RandomCameraConfig, RandomCameraDataModule, sample_cameras
from gps_guidance.lift.system import seed_step

BATCH_KEYS = {"rays_o", "rays_d", "mvp_mtx", "proj_mtx", "c2w", "camera_positions",
              "light_positions", "elevation", "azimuth", "camera_distances", "fovy", "height",
              "width"}
STILL = {"camera_perturb": 0.0, "center_perturb": 0.0, "up_perturb": 0.0}


def exact(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(cfg, step, seed=0):
    seed_step(seed, step)
    return sample_cameras(cfg, step)


def one_view(bearing=0.0, elevation=0.0, distance=2.0, fovy_deg=90.0, height=8, width=8):
    c2w = cameras.c2w_from_bearing(*(exact(v) for v in (bearing, elevation, distance)))
    return cameras.camera_batch(c2w, torch.deg2rad(exact(fovy_deg)), height, width)


# --- geometry --------------------------------------------------------------------------------


@pytest.mark.parametrize("elevation", [-80.0, -15.0, 0.0, 35.0, 89.0])
def test_bearing_to_azimuth_to_camera_to_bearing(elevation):
    bearing = torch.linspace(0, 359.5, 720, dtype=torch.float64)
    at = cameras.position(geo.azimuth_from_bearing(bearing), torch.full_like(bearing, elevation),
                          torch.full_like(bearing, 2.5))
    c2w = cameras.c2w_from_bearing(bearing, torch.full_like(bearing, elevation),
                                   torch.full_like(bearing, 2.5))
    assert torch.equal(c2w[:, :3, 3], at)
    error = geo.angle_difference_deg(cameras.bearing_from_c2w(c2w), bearing)
    assert error.abs().max() < 1e-6
    back = geo.bearing_from_azimuth(torch.rad2deg(torch.atan2(at[:, 1], at[:, 0])))
    assert geo.angle_difference_deg(back, bearing).abs().max() < 1e-6


def test_the_four_winds():
    """North is +y, east is +x; a photographer in the east looks west."""
    bearing = exact(0, 90, 180, 270)
    c2w = cameras.c2w_from_bearing(bearing, torch.zeros(4).double(), torch.full_like(bearing, 2))
    expected = [[0, 2, 0], [2, 0, 0], [0, -2, 0], [-2, 0, 0]]
    torch.testing.assert_close(c2w[:, :3, 3], exact(*expected), atol=1e-12, rtol=0)
    backward = c2w[1, :3, 2]
    torch.testing.assert_close(backward, exact(1, 0, 0), atol=1e-12, rtol=0)


def test_the_north_offset_is_added():
    c2w = cameras.c2w_from_bearing(exact(350.0), exact(0.0), exact(1.0))
    assert cameras.bearing_from_c2w(c2w, 30.0).item() == pytest.approx(20.0)


def test_the_eye_is_below_the_middle_where_the_elevation_is_negative():
    at = cameras.position(exact(0, 0), exact(-15, 15), exact(3, 3))
    assert at[:, 2].tolist() == pytest.approx([-3 * math.sin(math.radians(15)),
                                               3 * math.sin(math.radians(15))])
    assert one_view(elevation=-15.0)["elevation"].item() == pytest.approx(-15.0)


def test_c2w_is_a_rotation_with_right_up_backward_columns():
    c2w = cameras.c2w_from_bearing(exact(0, 77, 200), exact(-40, 0, 60), exact(1, 2, 3))
    turn = c2w[:, :3, :3]
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3).double().expand(3, 3, 3))
    assert torch.linalg.det(turn).tolist() == pytest.approx([1, 1, 1])
    assert (turn[:, 2, 1] > 0).all() and turn[:, 2, 0].abs().max() < 1e-12  # up is up, no roll
    away = torch.nn.functional.normalize(c2w[:, :3, 3], dim=-1)
    torch.testing.assert_close(turn[:, :, 2], away)
    assert c2w[:, 3].tolist() == [[0, 0, 0, 1]] * 3


def test_rays_are_unit_and_the_middle_ray_hits_the_origin():
    batch = one_view(bearing=123.0, elevation=-20.0, distance=2.5, height=9, width=7)
    rays_o, rays_d = batch["rays_o"], batch["rays_d"]
    assert rays_o.shape == rays_d.shape == (1, 9, 7, 3)
    torch.testing.assert_close(rays_d.norm(dim=-1), torch.ones(1, 9, 7).double())
    torch.testing.assert_close(rays_o[0, 4, 3] + 2.5 * rays_d[0, 4, 3], exact(0, 0, 0))
    assert batch["camera_distances"].item() == pytest.approx(2.5)


def test_fovy_is_vertical_and_pixels_are_square():
    """At 90 degrees the upper edge is as high as it is far: y = (H - 1) / H for its first row."""
    directions = cameras.ray_directions(4, 8, torch.deg2rad(exact(90.0)))
    assert directions[0, :, 0, 1].tolist() == pytest.approx([0.75, 0.25, -0.25, -0.75])
    assert directions[0, 0, :, 0].tolist() == pytest.approx(
        [-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75])
    assert (directions[..., 2] == -1).all()
    narrow = cameras.ray_directions(4, 8, torch.deg2rad(exact(45.0)))
    assert narrow[0, 0, 0, 1].item() == pytest.approx(0.75 * math.tan(math.radians(22.5)))


def test_a_point_on_a_ray_is_projected_back_to_its_pixel():
    batch = one_view(bearing=40.0, elevation=-10.0, fovy_deg=50.0, height=6, width=10)
    points = batch["rays_o"] + 1.7 * batch["rays_d"]
    clip = torch.nn.functional.pad(points, (0, 1), value=1.0) @ batch["mvp_mtx"][0].T
    ndc = clip[..., :2] / clip[..., 3:]
    v, u = torch.meshgrid(torch.arange(6) + 0.5, torch.arange(10) + 0.5, indexing="ij")
    torch.testing.assert_close(ndc[0], torch.stack([u / 5 - 1, v / 3 - 1], -1).double())


def test_rays_may_be_left_unnormalised():
    batch = cameras.eval_cameras(RandomCameraConfig(rays_d_normalize=False, eval_height=4,
                                                    eval_width=4), "val")[0]
    depth = -batch["rays_d"] @ batch["c2w"][0, :3, 2]
    torch.testing.assert_close(depth, torch.ones(1, 4, 4))


# --- sampling --------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform_azimuth", [True, False])
def test_cameras_keep_to_the_configured_ranges(uniform_azimuth):
    cfg = RandomCameraConfig(
        height=2, width=2, batch_size=16, elevation_range=(-20, 10), azimuth_range=(-180, 180),
        camera_distance_range=(2.0, 3.0), fovy_range=(40, 50), light_distance_range=(0.8, 1.5),
        batch_uniform_azimuth=uniform_azimuth, **STILL)
    batches = [drawn(cfg, step) for step in range(1, 41)]
    values = {key: torch.cat([b[key] for b in batches]) for key in (
        "elevation", "azimuth", "camera_distances", "fovy", "c2w", "light_positions")}
    spans = {"elevation": (-20, 10), "azimuth": (-180, 180), "camera_distances": (2, 3),
             "fovy": (math.radians(40), math.radians(50))}
    for key, (low, high) in spans.items():
        found = values[key]
        assert low <= found.min() < low + 0.05 * (high - low), key
        assert high - 0.05 * (high - low) < found.max() <= high, key
    lights = values["light_positions"].norm(dim=-1)
    assert lights.min() >= 0.8 and lights.max() <= 1.5
    # unperturbed: the reported angles are those of c2w
    bearing = geo.bearing_from_azimuth(values["azimuth"])
    found = cameras.bearing_from_c2w(values["c2w"])
    assert geo.angle_difference_deg(found, bearing).abs().max() < 1e-3


def test_uniform_azimuths_fall_into_equal_sectors():
    cfg = RandomCameraConfig(height=2, width=2, batch_size=4, **STILL)
    for step in range(1, 6):
        sectors = torch.div(drawn(cfg, step)["azimuth"] + 180, 90, rounding_mode="floor")
        assert sectors.tolist() == [0, 1, 2, 3]


def test_perturbed_cameras_report_the_request_and_c2w_tells_where_they_are():
    cfg = RandomCameraConfig(height=2, width=2, batch_size=8, camera_perturb=0.3)
    batch = drawn(cfg, 3)
    wanted = cameras.position(batch["azimuth"], batch["elevation"], batch["camera_distances"])
    offset = batch["camera_positions"] - wanted
    assert 0.05 < offset.abs().max() <= 0.3 + 1e-6
    assert torch.equal(batch["c2w"][:, :3, 3], batch["camera_positions"])


def test_magic3d_lights_stand_within_sixty_degrees_of_the_cameras_direction():
    cfg = RandomCameraConfig(height=2, width=2, batch_size=64, light_sample_strategy="magic3d",
                             light_distance_range=(1.0, 1.0), **STILL)
    batch = drawn(cfg, 1)
    toward = torch.nn.functional.normalize(batch["camera_positions"], dim=-1)
    cosine = (batch["light_positions"] * toward).sum(-1)
    assert cosine.min() >= 0.5 - 1e-6 and cosine.max() <= 1 + 1e-6


def test_the_first_batch_is_the_evaluation_view():
    """As in threestudio, also where progressive_until is 0."""
    cfg = RandomCameraConfig(height=2, width=2, eval_elevation_deg=15.0, **STILL)
    first = drawn(cfg, 0)
    assert first["azimuth"].tolist() == [0.0] and first["elevation"].item() == pytest.approx(15)
    half = RandomCameraConfig(height=2, width=2, batch_size=64, progressive_until=9,
                              elevation_range=(-10, 90), azimuth_range=(-180, 180), **STILL)
    batch = drawn(half, 5)  # 5 / (9 + 1): half of the way open
    assert batch["azimuth"].abs().max() <= 90 < drawn(half, 10)["azimuth"].abs().max()
    assert 2.5 <= batch["elevation"].min() and batch["elevation"].max() <= 52.5


def test_size_and_batch_change_at_the_milestones():
    cfg = RandomCameraConfig(height=[2, 4, 8], width=[3, 6, 9], batch_size=[4, 2, 1],
                             resolution_milestones=[10, 20])
    stages = {0: (2, 3, 4), 9: (2, 3, 4), 10: (4, 6, 2), 19: (4, 6, 2), 20: (8, 9, 1),
              10**6: (8, 9, 1)}
    assert {step: cfg.stage(step) for step in stages} == stages
    assert RandomCameraConfig(height=5, width=6, batch_size=7).stage(10**6) == (5, 6, 7)
    batch = drawn(cfg, 10)
    assert batch["rays_d"].shape == (2, 4, 6, 3) and (batch["height"], batch["width"]) == (4, 6)


@pytest.mark.parametrize(("settings", "message"), [
    ({"light_sample_strategy": "sun"}, "light_sample_strategy is 'sun'"),
    ({"height": [2, 4]}, "lists of one length"),
    ({"height": [2, 4], "width": [2, 4], "batch_size": [1, 1]}, "resolution_milestones has 0"),
])
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomCameraConfig(**settings)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    module = RandomCameraDataModule(RandomCameraConfig(height=2, width=2, batch_size=3))

    def sample(seed, step):
        seed_step(seed, step)
        return module.sample(0, step)

    first = sample(7, 100)
    torch.rand(11), random.random()
    sample(7, 3)
    again = sample(7, 100)
    for key, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[key])), key
    assert not torch.equal(first["c2w"], sample(8, 100)["c2w"])
    assert not torch.equal(first["c2w"], sample(7, 101)["c2w"])


def test_a_batch_has_threestudios_keys_shapes_and_units():
    batch = drawn(RandomCameraConfig(height=4, width=6, batch_size=2), 1)
    assert set(batch) == BATCH_KEYS
    shapes = {"rays_o": (2, 4, 6, 3), "rays_d": (2, 4, 6, 3), "mvp_mtx": (2, 4, 4),
              "proj_mtx": (2, 4, 4), "c2w": (2, 4, 4), "camera_positions": (2, 3),
              "light_positions": (2, 3), "elevation": (2,), "azimuth": (2,),
              "camera_distances": (2,), "fovy": (2,)}
    assert {key: tuple(batch[key].shape) for key in shapes} == shapes
    assert all(batch[key].dtype == torch.float32 for key in shapes)
    assert (batch["fovy"] < math.radians(70) + 1e-6).all()  # radians
    assert (batch["height"], batch["width"]) == (4, 6)


# --- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "expected"), [
    ("val", [0.0, 90.0, 180.0, 270.0]), ("test", [0.0, 120.0, 240.0, 360.0])])
def test_evaluation_views_are_evenly_spread(split, expected):
    cfg = RandomCameraConfig(eval_height=2, eval_width=2, n_val_views=4, n_test_views=4,
                             eval_elevation_deg=-15.0, eval_camera_distance=3.0)
    views = cameras.eval_cameras(cfg, split)
    assert [v["azimuth"].item() for v in views] == pytest.approx(expected)
    assert [v["index"].tolist() for v in views] == [[0], [1], [2], [3]]
    bearings = torch.cat([cameras.bearing_from_c2w(v["c2w"]) for v in views])
    gap = geo.angle_difference_deg(bearings, geo.bearing_from_azimuth(torch.tensor(expected)))
    assert gap.abs().max() < 1e-4
    for view in views:
        assert view["camera_distances"].item() == pytest.approx(3.0)
        assert view["elevation"].item() == pytest.approx(-15.0, abs=1e-4)
        assert torch.equal(view["light_positions"], view["camera_positions"])


def test_loaders():
    module = RandomCameraDataModule(RandomCameraConfig(eval_height=2, eval_width=2, n_val_views=2,
                                                       n_test_views=3))
    steps = iter(module.train_dataloader())
    assert [next(steps) for _ in range(3)] == [{}, {}, {}]
    assert len(module.val_dataloader()) == 2 and len(module.test_dataloader()) == 3
    assert next(iter(module.test_dataloader()))["rays_d"].shape == (1, 2, 2, 3)
