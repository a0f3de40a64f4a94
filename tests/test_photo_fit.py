"""A field fitted to photos of known pose: it learns the solid, the light of each photo, by seed."""

import math

import pytest
import torch

from gps_guidance.lift.cameras import c2w_from_bearing, camera_batch, ray_directions
from gps_guidance.lift.photo_fit import Appearances, PhotoField, PosedPhoto, fit, held_out_psnr_db
from gps_guidance.metrics import mask_iou

SIZE, DISTANCE, FOVY = 24, 3.0, math.radians(44)


def ball(directions, c2w):
    """A ball aside from the middle, where the field starts, red in its west and green in its east,
    before grey: colours and mask."""
    at = c2w[:3, 3] - torch.tensor([0.4, 0.2, 0.1])
    along = -(directions * at).sum(-1)
    root = along.square() - at.square().sum() + 0.3**2
    mask = root > 0
    east = (at + (along - root.clamp_min(0).sqrt())[..., None] * directions)[..., :1] > 0
    colours = torch.where(east, torch.tensor([0.2, 0.7, 0.2]), torch.tensor([0.8, 0.2, 0.2]))
    return torch.where(mask[..., None], colours, torch.tensor(0.5)), mask


def photo_from(bearing_deg, light=1.0):
    """A photo of the ball from a bearing, as bright as ``light``, and its mask."""
    c2w = c2w_from_bearing(torch.tensor([bearing_deg]), torch.tensor([-10.0]),
                           torch.tensor([DISTANCE]))[0].float()
    ahead = ray_directions(SIZE, SIZE, torch.tensor([FOVY]))[0]
    photo = PosedPhoto(torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8), c2w, ahead)
    colours, mask = ball(photo.rays()[1], c2w)
    return PosedPhoto((colours * light * 255).round().byte(), c2w, ahead), mask


@pytest.fixture(scope="module")
def fitted():
    """Fitted to eight photos, each in its own light, none from between them."""
    lights = [1.0, 0.7, 1.1, 0.9] * 2
    return fit([photo_from(45.0 * k, light)[0] for k, light in enumerate(lights)], radius=1.0,
               steps=50, rays=256)


def test_the_solid_is_found_where_no_photo_looked(fitted):
    photo, mask = photo_from(22.5)
    with torch.no_grad():
        before = PhotoField(radius=1.0).eval().render(*photo.rays())["opacity"][0, ..., 0]
        after = fitted.render(*photo.rays())["opacity"][0, ..., 0]
    assert mask_iou(before, mask) < 0.3
    assert mask_iou(after, mask) > 0.7


def test_photos_that_did_not_train_are_rendered(fitted):
    held_out = [photo_from(22.5 + 90.0 * k, 0.8)[0] for k in range(4)]
    before = held_out_psnr_db(PhotoField(radius=1.0).eval(), held_out)
    assert held_out_psnr_db(fitted, held_out) > before + 4


def test_east_is_east(fitted):
    """Seen from the south the green half is on the right: the field is not mirrored."""
    photo, mask = photo_from(180.0)
    with torch.no_grad():
        rgb = fitted.render(*photo.rays())["comp_rgb"][0]
    columns = torch.nonzero(mask)[:, 1].float()
    assert columns.mean() > SIZE / 2  # the ball stands in the east
    right = torch.arange(SIZE) > columns.mean()
    west, east = rgb[mask & ~right].mean(dim=0), rgb[mask & right].mean(dim=0)
    assert west[0] > west[1] and east[1] > east[0]


def test_the_same_seed_gives_the_same_field():
    photos = [photo_from(90.0 * k)[0] for k in range(4)]
    once, again, other = (fit(photos, radius=1.0, steps=2, rays=64, seed=seed).state_dict()
                          for seed in (3, 3, 4))
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert any(not torch.equal(once[key], other[key]) for key in once)


def test_rays_are_those_of_the_cameras():
    photo, _ = photo_from(70.0)
    batch = camera_batch(photo.c2w[None], torch.tensor([FOVY]), SIZE, SIZE)
    origins, directions = photo.rays()
    assert torch.allclose(origins, batch["rays_o"][0])
    assert torch.allclose(directions, batch["rays_d"][0], atol=1e-6)


def test_nothing_below_the_floor():
    field = PhotoField(radius=1.0, floor=-0.2)
    points = torch.tensor([[0.0, 0.0, -0.1], [0.0, 0.0, -0.3]])
    density = field.geometry.forward_density(points)
    assert density[0] > 0 and density[1] == 0


def test_an_appearance_starts_as_it_is_and_belongs_to_its_photo():
    looks, colours = Appearances(2), torch.rand(4, 3)
    assert torch.allclose(looks(colours, torch.tensor([0, 1, 1, 0])), colours)
    assert looks.change() == 0
    with torch.no_grad():
        looks.maps[1, :, 3] += 0.5
    seen = looks(colours, torch.tensor([0, 1, 1, 0]))
    assert torch.allclose(seen - colours, torch.tensor([[0.0], [0.5], [0.5], [0.0]]).expand(4, 3))


def test_no_photos_is_an_error():
    with pytest.raises(ValueError, match="no photos"):
        fit([])
