"""The miniature: exact geometry, photos as a crowd takes them, captions, scores against the truth.
"""

import json
import math

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.nn import functional as F

from gps_guidance import cli, geo
from gps_guidance.lift.prompts import PromptProcessorConfig, view_prompts
from gps_guidance.miniature import arch, monuments, photographer, shapes, tower, truth
from gps_guidance.miniature.arch import ARCH
from gps_guidance.miniature.tower import TOWER
from gps_guidance.models import resolve_model
from gps_guidance.scorers import AngleClassifier

PAINT = shapes.plain(0.5, 0.5, 0.5)
MONUMENTS = [shape for kind in monuments.KINDS.values()
             for shape in kind(np.random.default_rng(1), PAINT, PAINT)]
SHAPES = [*tower.build_shapes(), *arch.build_shapes(), *MONUMENTS]


def rays(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays from points around the scene towards points near its middle."""
    g = torch.Generator().manual_seed(seed)
    origins = F.normalize(torch.randn(count, 3, generator=g), dim=-1) * 120
    targets = torch.randn(count, 3, generator=g) * 12 + torch.tensor([0.0, 0.0, 15.0])
    return origins, F.normalize(targets - origins, dim=-1)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: type(s).__name__)
def test_the_hit_is_where_the_ray_enters_the_solid(shape: shapes.Shape) -> None:
    origins, directions = rays(4000)
    t, normals = shape.hit(origins, directions)
    hit = t.isfinite()
    before = origins[hit] + (t[hit, None] - 0.02) * directions[hit]
    after = origins[hit] + (t[hit, None] + 0.02) * directions[hit]
    grazing = (normals[hit] * directions[hit]).sum(-1).abs() < 0.1
    assert not shape.inside(before)[~grazing].any()
    clear = shape.inside(after)[~grazing]
    assert (~clear).sum() <= 1 + 0.02 * len(clear)  # rays that cut a corner
    assert ((normals[hit] * directions[hit]).sum(-1) < 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: type(s).__name__)
def test_a_missed_ray_meets_no_inside_point(shape: shapes.Shape) -> None:
    origins, directions = rays(1500, seed=1)
    t, _ = shape.hit(origins, directions)
    missed = ~t.isfinite()
    along = torch.linspace(1, 240, 600)
    points = origins[missed, None] + along[:, None] * directions[missed, None]
    inside = shape.inside(points.reshape(-1, 3)).reshape(points.shape[:2])
    assert inside.any(dim=1).float().mean() < 0.01  # rays that only graze


def test_every_point_of_a_solid_lies_in_its_sphere() -> None:
    g = torch.Generator().manual_seed(0)
    points = (torch.rand(40000, 3, generator=g) - 0.5) * 90 + torch.tensor([0.0, 0.0, 25.0])
    for shape in SHAPES:
        center, radius = shape.sphere()
        inside = points[shape.inside(points)]
        assert ((inside - inside.new_tensor(center)).norm(dim=-1) <= radius + 1e-4).all()


def test_the_tower_leans_to_its_bearing() -> None:
    x, y, z = tower._lean_axis()
    assert math.degrees(math.acos(z)) == pytest.approx(tower.LEAN_DEG)
    assert math.degrees(math.atan2(x, y)) % 360 == pytest.approx(tower.LEAN_BEARING_DEG)


def test_views_from_all_sides_differ() -> None:
    masks = [photographer.truth_view(TOWER, b, 32)[0]["mask"] > 0.5 for b in range(0, 360, 30)]
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            assert float((a & b).sum() / (a | b).sum()) < 0.95


def test_a_photo_from_the_east_shows_the_baptistery_in_front() -> None:
    """Handedness: standing north-east (65 degrees) the dome is straight ahead, not mirrored."""
    picture, c2w, _ = photographer.truth_view(TOWER, 64.0, 64)
    assert c2w[0, 3] > 0 and c2w[1, 3] > 0
    teal = (picture["rgb"][..., 1] > picture["rgb"][..., 0] * 1.3) & (picture["mask"] > 0.9)
    columns = torch.nonzero(teal[20:40])[:, 1].float()
    assert abs(columns.mean() - 32) < 6


def test_depth_and_occupancy_agree() -> None:
    scene = TOWER.scene
    picture, c2w, fovy = photographer.truth_view(TOWER, 100.0, 48)
    solid = picture["mask"] == 1
    assert (picture["depth"][solid] < 140).all()
    assert picture["depth"][picture["mask"] == 0].isinf().all()
    assert bool(scene.occupied(torch.tensor([0.0, 0.0, 20.0])))
    assert not bool(scene.occupied(torch.tensor([0.0, 0.0, 60.0])))


def test_frames_round_trip() -> None:
    points = torch.randn(10, 3)
    assert torch.allclose(TOWER.to_scene_units(TOWER.to_metres(points)), points, atol=1e-5)


def test_photos_carry_gps_and_are_reproducible(tmp_path) -> None:
    photographer.take_photos(tmp_path / "a", 3, seed=5)
    photographer.take_photos(tmp_path / "b", 3, seed=5, processes=2)
    positions = json.loads((tmp_path / "a" / "truth.json").read_text())["photos"]
    for row in positions:
        a, b = tmp_path / "a" / row["file"], tmp_path / "b" / row["file"]
        assert a.read_bytes() == b.read_bytes()
        gps = Image.open(a).getexif().get_ifd(0x8825)
        lat, lon = (float(v[0]) + float(v[1]) / 60 + float(v[2]) / 3600 for v in (gps[2], gps[4]))
        east_north = geo.local_m((lat, lon), TOWER.center)
        assert np.linalg.norm(east_north - row["position_m"][:2]) < 6 * photographer.GPS_NOISE_M


def test_more_pixels_are_of_the_same_photo(tmp_path) -> None:
    photographer.take_photos(tmp_path / "small", 2, seed=5)
    photographer.take_photos(tmp_path / "large", 2, seed=5, scale=2)
    for path in sorted((tmp_path / "small").glob("*.jpg")):
        small, large = (Image.open(p) for p in (path, tmp_path / "large" / path.name))
        assert large.size == (2 * small.width, 2 * small.height)
        apart = np.asarray(large.reduce(2), dtype=float) - np.asarray(small, dtype=float)
        assert np.abs(apart).mean() < 6
        assert dict(large.getexif().get_ifd(0x8825)) == dict(small.getexif().get_ifd(0x8825))


def test_exif_keeps_the_hemisphere() -> None:
    ifd = photographer.gps_exif(-33.857, -151.215, "2024:01:01 12:00:00").get_ifd(0x8825)
    assert (ifd[1], ifd[3]) == ("S", "W")
    assert [float(v) for v in ifd[2]] == pytest.approx([33, 51, 25.2])


def turned(offset_deg: float):
    """View and density of the truth itself, seen from b + offset as it should be from b."""
    def view(c2w, fovy, height, width):
        bearing = math.degrees(math.atan2(c2w[0, 3], c2w[1, 3])) - offset_deg
        picture, *_ = photographer.truth_view(TOWER, bearing, height)
        return {
            "rgb": picture["rgb"], "opacity": picture["mask"],
            "depth": picture["depth"] / TOWER.metres_per_unit,
        }

    def density(points):
        t = math.radians(offset_deg)
        x = points[:, 0] * math.cos(t) - points[:, 1] * math.sin(t)
        y = points[:, 0] * math.sin(t) + points[:, 1] * math.cos(t)
        world = torch.stack([x, y, points[:, 2]], dim=-1)
        return TOWER.scene.occupied(TOWER.to_metres(world)).float() * 20

    return view, density


def test_the_truth_scores_perfectly() -> None:
    exact = truth.score(TOWER, *turned(0.0), radius=1.4, size=32)
    for key in ("mask_iou", "occupancy_iou", "ssim", "aligned_ssim"):
        assert exact[key] == pytest.approx(1.0, abs=1e-3), key
    assert exact["depth_error"] < 1e-5
    assert exact["angular_error_deg"] == 0
    # two samples of one surface, half a cell of the grid apart
    assert exact["chamfer_m"] == exact["aligned_chamfer_m"] < 0.3


def test_a_turned_truth_is_wrong_as_it_stands_and_right_when_aligned() -> None:
    rotated = truth.score(TOWER, *turned(45.0), radius=1.4, size=32)
    assert rotated["mask_iou"] < 0.8 and rotated["ssim"] < 0.5 and rotated["chamfer_m"] > 2
    assert rotated["aligned_turn_deg"] == pytest.approx(45.0)
    assert rotated["aligned_mask_iou"] > 0.999 and rotated["aligned_ssim"] > 0.999
    assert rotated["aligned_occupancy_iou"] > 0.97 and rotated["aligned_chamfer_m"] < 0.3


def test_bearings_are_read_as_they_stand_and_aligned() -> None:
    """The bundled judge on the truth's own pictures, as if they were seen from 45 degrees on."""
    judge = AngleClassifier.from_pretrained(
        resolve_model("miniature-pisa") / "angle_classifier", use_safetensors=True).float().eval()
    bearings = truth.HELD_OUT_BEARINGS
    rgb = torch.stack([photographer.truth_view(TOWER, b, 64)[0]["rgb"] for b in bearings])
    straight = truth._bearing_scores(judge, rgb, bearings, 0)
    rotated = truth._bearing_scores(judge, rgb.roll(3, 0), bearings, 3)
    assert straight["bearing_within_one_bin"] > 0.9
    assert rotated["bearing_within_one_bin"] < 0.2
    assert rotated["aligned_bearing_within_one_bin"] == straight["bearing_within_one_bin"]


def test_the_angular_error_is_measured_to_a_degree() -> None:
    scores = truth._solid_scores(TOWER, turned(-64)[1], 1.4, 300, 15.0)  # the nearest step
    assert scores["angular_error_deg"] == pytest.approx(64)


def test_a_field_without_a_surface_has_no_chamfer_distance() -> None:
    scores = truth._chamfer_scores(TOWER, lambda points: points[:, 0] * 0, 1.4, 0.0)
    assert scores == {"chamfer_m": None, "aligned_chamfer_m": None}


def test_front_and_back_of_the_arch_are_almost_alike() -> None:
    """What invites two fronts: outlines that agree once mirrored, under banners that do not."""
    views = {b: photographer.truth_view(ARCH, b, 64)[0] for b in (90.0, 270.0, 0.0)}
    front, back, side = (view["mask"] > 0.5 for view in views.values())

    def iou(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a & b).sum() / (a | b).sum())

    middle = (slice(None), slice(12, 52))  # the arch, without houses
    assert iou(front[middle], back.flip(1)[middle]) > 0.9 > iou(front[middle], side[middle]) + 0.2
    red, _, blue = (views[90.0]["rgb"] - views[270.0]["rgb"].flip(1)).unbind(-1)
    assert int((red > 0.3).sum()) > 20 and int((blue < -0.2).sum()) > 20


def test_the_photos_of_the_tower_are_what_they_were(tmp_path) -> None:
    """Models were trained on them: captions and other landmarks changed no pixel."""
    rows = json.loads((photographer.take_photos(tmp_path, 2, seed=3) / "truth.json").read_text())
    assert [row["position_m"] for row in rows["photos"]] == [
        pytest.approx(at, abs=1e-3) for at in ([-37.8484, 85.4436, 1.7], [0.4008, -76.1996, 1.7])]
    pictures = [np.asarray(Image.open(tmp_path / row["file"])) for row in rows["photos"]]
    means = [[float(v) for v in picture.mean(axis=(0, 1))] for picture in pictures]
    assert means == [pytest.approx(m, abs=0.5) for m in (
        [127.0, 149.67, 162.52], [114.67, 141.22, 153.53])]


def test_most_photos_of_the_arch_are_of_front_or_back() -> None:
    rng = np.random.default_rng(0)
    at = np.array([photographer.plan_shot(ARCH, rng).position[:2].tolist() for _ in range(400)])
    bearings = np.degrees(np.arctan2(at[:, 0], at[:, 1])) % 180
    assert 0.6 < (np.abs(bearings - 90) < 30).mean() < 0.9
    assert (np.abs(bearings - 90) > 60).any()


def test_captions_say_the_side_as_view_dependent_prompts_do() -> None:
    rng, said = np.random.default_rng(0), []
    for bearing, side in ((90, 1), (60, 1), (180, 0), (0, 0), (270, 2), (300, 2)):
        position = photographer.stand_at(bearing, 90.0)
        found = [photographer.caption_of(ARCH, position, rng) for _ in range(200)]
        prompts = ("a photo of Miniature Arc de Triomphe", "Miniature Arc de Triomphe")
        words = [view_prompts(PromptProcessorConfig(), prompt)[side] for prompt in prompts]
        assert set(found) == {*prompts, *words}
        said += [caption in words for caption in found]
    assert np.mean(said) == pytest.approx(photographer.VIEW_PART, abs=0.04)


def test_monuments_are_of_every_kind_and_named_by_it() -> None:
    drawn = [monuments.draw_monument(np.random.default_rng((0, i))) for i in range(200)]
    names = {monument.name for monument in drawn}
    assert {name.split()[1] for name in names} == set(monuments.KINDS)
    assert {name.split()[0] for name in names} == set(monuments.COLOURS)
    points = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0))
    points = (points - torch.tensor([0.5, 0.5, 0.0])) * torch.tensor([110.0, 110.0, 75.0])
    up = torch.arange(0.5, 70) * torch.tensor([[0.0], [0.0], [1.0]])
    for monument in drawn[:20]:
        assert 15 < up.T[monument.scene.occupied(up.T)][:, 2].max() < 62  # in the 3D engine's box
        assert points[monument.scene.occupied(points)][:, :2].norm(dim=-1).max() < 45
    captions = {monuments.caption_of(drawn[0], np.random.default_rng(i)) for i in range(60)}
    assert captions == {"a monument", "a photo of a monument", f"a {drawn[0].name}",
                        f"a photo of a {drawn[0].name}"}


@pytest.mark.parametrize("world", ["arch", "monuments"])
def test_other_worlds_by_the_command_line(world: str, tmp_path) -> None:
    for out, processes in (("a", "1"), ("b", "2")):
        assert cli.main(["miniature", "--world", world, "--out", str(tmp_path / out), "--count",
                         "2", "--seed", "4", "--processes", processes]) == 0
    for name in ("tourist-00000.jpg", "tourist-00001.jpg", "truth.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with Image.open(tmp_path / "a" / "tourist-00000.jpg") as photo:
        caption = photo.getexif()[ExifTags.Base.ImageDescription]
    assert ("Arc de Triomphe" in caption) == (world == "arch")
