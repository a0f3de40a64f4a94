"""Laws that hold exactly, on tiny models of the real classes."""

import numpy as np
import pytest
import torch

from gps_guidance import geo
from gps_guidance.encoders import GPSEncoder
from gps_guidance.lift.cameras import bearing_from_c2w, c2w_from_bearing
from gps_guidance.lift.sds import schedule, timestep_range
from gps_guidance.models import load_angle_model, load_model
from gps_guidance.noise import angle_guidance, area_noise, dual_guidance


class City:
    """e(p, g), e(p, 0) and e(0, 0) of a tiny GPS model at one noisy latent."""

    def __init__(self, folder):
        self.model = load_model(folder)
        self.encoder = GPSEncoder.from_pretrained(folder / "gps_encoder")
        generator = torch.Generator().manual_seed(0)
        self.latents_noisy = torch.randn(1, 4, 8, 8, generator=generator)
        self.text = self.model.encode_text(["A photo of Pisa"])

    @torch.no_grad()
    def predict(self, text, gps):
        tokens = torch.cat([text.expand(len(gps), -1, -1), gps], dim=1)
        latents = self.latents_noisy.expand(len(gps), -1, -1, -1)
        return self.model.unet(latents, 500, tokens).sample

    def at(self, *points):
        with torch.no_grad():
            return self.predict(self.text, self.encoder(np.array(points)))

    @property
    def text_only(self):
        return self.predict(self.text, self.encoder.null(1))

    @property
    def uncond(self):
        return self.predict(torch.zeros_like(self.text), self.encoder.null(1))


@pytest.fixture(scope="module")
def city(tiny_gps_model):
    return City(tiny_gps_model)


HERE, THERE = (43.715, 10.387), (43.731, 10.409)


def test_unit_scales_give_the_fully_conditional_prediction(city):
    full = city.at(HERE)
    mixed = dual_guidance(city.uncond, city.text_only, full, 1.0, 1.0)
    torch.testing.assert_close(mixed, full, atol=1e-6, rtol=1e-5)


def test_zero_gps_scale_ignores_gps(city):
    args = city.uncond, city.text_only
    here, there = (dual_guidance(*args, city.at(p), 3.5, 0.0) for p in (HERE, THERE))
    assert torch.equal(here, there)
    assert not torch.equal(*(dual_guidance(*args, city.at(p), 3.5, 7.5) for p in (HERE, THERE)))


def test_an_area_of_one_point_or_of_equal_points_is_that_point(city):
    one = city.at(HERE)
    assert torch.equal(area_noise([one]), one[0])
    same = area_noise([city.at(HERE, HERE, HERE)])
    torch.testing.assert_close(same, one[0], atol=1e-6, rtol=1e-5)


def test_an_area_depends_neither_on_order_nor_on_chunks(city):
    points = [HERE, THERE, (43.72, 10.40), (43.735, 10.385), (43.705, 10.415)]
    whole = area_noise([city.at(*points)])
    singly = area_noise(city.at(p) for p in reversed(points))
    torch.testing.assert_close(singly, whole, atol=1e-6, rtol=1e-5)


def test_swapping_lat_and_lon_changes_the_output(city):
    """(x, y) and (y, x) in the normalised square of the city."""
    x, y = city.encoder.bounds.normalize([HERE])[0]
    swapped = (43.72 + 0.02 * x, 10.40 + 0.02 * y)
    assert city.encoder.bounds.normalize([swapped])[0] == pytest.approx([y, x])
    assert (city.at(HERE) - city.at(swapped)).abs().max() > 1e-5

    plain = GPSEncoder(16, city.encoder.bounds.as_tuple(), axis_embedding=False)
    with torch.no_grad():  # the paper's literal text cannot tell them apart
        same = [city.predict(city.text, plain([p])) for p in (HERE, swapped)]
    torch.testing.assert_close(*same, atol=1e-4, rtol=1e-4)


def test_half_a_turn_either_way_is_the_same_image(tiny_angle_model):
    model = load_angle_model(tiny_angle_model)
    tokens = model.angle(torch.tensor([-180.0, 180.0]))
    assert torch.equal(tokens[0], tokens[1])
    latents = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    with torch.no_grad():
        text = model.encode_text([model.angle.prompt]).expand(2, -1, -1)
        west, east = model.unet(latents, 10, torch.cat([text, tokens], 1)).sample
    assert torch.equal(west, east)


def test_eq_7_is_eq_4_with_both_conditions_switched_together():
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 1, 4, 8, 8).unbind(0)
    w = 2.5
    torch.testing.assert_close(
        angle_guidance(cond, uncond, w), dual_guidance(uncond, cond, cond, 1 + w, 0.0)
    )


@pytest.mark.parametrize(
    ("global_step", "expected"),
    [(0, (980, 980)), (2000, (740, 860)), (8000, (20, 500)), (10000, (20, 500))],
)
def test_the_interval_of_time_steps(global_step, expected):
    low = schedule([0, 0.98, 0.02, 8000], 0, global_step)
    high = schedule([0, 0.98, 0.50, 8000], 0, global_step)
    assert timestep_range(low, high, 1000) == expected


@pytest.mark.parametrize("key", sorted(geo.LANDMARKS))
def test_photographer_to_camera_to_bearing(key):
    """A position on the ground, the camera that stands there, and the bearing read back from it."""
    landmark = geo.LANDMARKS[key]
    turn = np.radians(np.arange(0.0, 360.0, 10.0))
    ring = 120.0 * np.stack([np.sin(turn), np.cos(turn)], -1)
    bearing = torch.as_tensor(geo.bearing_deg(geo.from_local_m(ring, landmark.center),
                                              landmark.center))
    c2w = c2w_from_bearing(bearing, torch.full_like(bearing, -10.0), torch.full_like(bearing, 2.5))
    error = geo.angle_difference_deg(bearing_from_c2w(c2w), bearing)
    assert error.abs().max() < 1e-6
