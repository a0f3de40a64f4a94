"""Volume rendering against closed formulae; regularisers against numbers worked out by hand."""

import math

import pytest
import torch

from gps_guidance.lift import cameras
from gps_guidance.lift.field import Field, FieldConfig, PyramidGrid
from gps_guidance.lift.render import (
    NeRFVolumeRenderer,
    box_interval,
    importance_edges,
    opaque_loss,
    orientation_loss,
    render_weights,
    sparsity_loss,
    stratified_edges,
    z_variance_loss,
)
from gps_guidance.lift.shading import NoMaterial, SolidColor, Textured


class Solid(Field):
    """Density and colour logits by a function of position: real fields as small as they get."""

    def __init__(self, density, colour=lambda p: torch.zeros_like(p), radius=1.0, normal_type=None):
        super().__init__(FieldConfig(radius=radius, normal_type=normal_type))
        self.density, self.colour = density, colour

    def forward_density(self, points):
        return self.density(points)

    def forward(self, points, output_normal=False):
        out = {"density": self.density(points), "features": self.colour(points)}
        return self.with_normal(out, points) if output_normal else out


def fog(sigma):
    return Solid(lambda p: torch.full_like(p[..., :1], sigma))


def ball(radius=0.5, sigma=1e4, colour=(40.0, -40.0, -40.0)):
    return Solid(lambda p: sigma * (p.norm(dim=-1, keepdim=True) < radius).float(),
                 lambda p: torch.tensor(colour).expand_as(p))


def renderer(geometry, background=None, train=False, **settings):
    settings = {"radius": geometry.cfg.radius, "num_samples_per_ray": 200, **settings}
    background = background or SolidColor(SolidColor.Config(color=(0.0, 0.0, 1.0)))
    material = NoMaterial(NoMaterial.Config(requires_normal=settings.pop("normals", False)))
    built = NeRFVolumeRenderer(NeRFVolumeRenderer.Config(**settings), geometry, material,
                               background)
    return built.train(train)


def view(size=9, bearing=30.0, distance=3.0):
    c2w = cameras.c2w_from_bearing(torch.tensor([bearing]), torch.tensor([-10.0]),
                                   torch.tensor([distance]))
    return cameras.camera_batch(c2w, torch.tensor([math.radians(40.0)]), size, size)


# --- intervals and samples -------------------------------------------------------------------


def test_box_interval_by_hand():
    origins = torch.tensor([[3.0, 0, 0], [0, 0, 0], [3, 5, 0], [3, 0, 0], [3, 3, 0]])
    directions = torch.tensor([[-1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [1, 0, 0],
                               [-(0.5**0.5), -(0.5**0.5), 0]])
    near, far = box_interval(origins, directions, 1.0)
    assert near[:2].tolist() == [2.0, 0.0] and far[:2].tolist() == [4.0, 1.0]
    assert torch.equal(near[2:4], far[2:4])  # one passes beside the box, one looks away from it
    assert (near[4].item(), far[4].item()) == pytest.approx((2 * 2**0.5, 4 * 2**0.5))
    clipped = box_interval(origins[:1], directions[:1], 1.0, near=2.5, far=3.5)
    assert [x.item() for x in clipped] == [2.5, 3.5]


def test_stratified_edges_cover_the_interval():
    near, far = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    even = stratified_edges(near, far, 4, randomized=False)
    assert even.tolist() == [[1.0, 1.5, 2.0, 2.5, 3.0], [2.0] * 5]
    torch.manual_seed(0)
    moved = stratified_edges(near, far, 4, randomized=True)
    assert torch.equal(moved[:, 0], near) and torch.equal(moved[:, -1], far)
    shift = moved[0, 1:-1] - even[0, 1:-1]
    assert (moved.diff(dim=1) >= 0).all() and 0 < shift.abs().max() <= 0.25
    torch.testing.assert_close(shift, shift[:1].expand(3))


def test_importance_edges_follow_the_weights():
    edges = torch.linspace(0, 8, 9)[None]
    even = importance_edges(edges, torch.ones(1, 8), 4, randomized=False)
    torch.testing.assert_close(even, torch.tensor([[0.0, 2, 4, 6, 8]]))
    weights = torch.zeros(1, 8)
    weights[0, 3] = 1.0  # all between 3 and 4
    for randomized in (False, True):
        placed = importance_edges(edges, weights, 100, randomized)
        assert (placed.diff(dim=1) >= 0).all()
        assert (placed[0, 0], placed[0, -1]) == (0, 8)
        inside = ((placed >= 3) & (placed <= 4)).float().mean()
        assert 0.97 < inside < 1.0  # a hundredth is left for what looks empty
    empty = importance_edges(edges, torch.zeros(1, 8), 8, randomized=False)
    torch.testing.assert_close(empty, edges)


def test_weights_by_hand():
    """Two intervals with optical depths log 2 and log 4: half, then three quarters of the half."""
    weights = render_weights(torch.tensor([[math.log(2), 2 * math.log(4)]]),
                             torch.tensor([[1.0, 0.5]]))
    assert weights[0].tolist() == pytest.approx([0.5, 0.375])
    density, lengths = torch.rand(5, 20) * 9, torch.rand(5, 20)
    opacity = 1 - torch.exp(-(density * lengths).sum(1))
    torch.testing.assert_close(render_weights(density, lengths).sum(1), opacity)


# --- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("estimator", ["occgrid", "importance"])
def test_fog_has_the_opacity_of_its_thickness(estimator, train):
    batch = view()
    near, far = box_interval(batch["rays_o"].reshape(-1, 3), batch["rays_d"].reshape(-1, 3), 1.0)
    out = renderer(fog(0.7), train=train, num_samples_per_ray=7, estimator=estimator)(**batch)
    expected = (1 - torch.exp(-0.7 * (far - near))).view(1, 9, 9, 1)
    assert expected.max() > 0.7 > expected.min()
    torch.testing.assert_close(out["opacity"], expected)
    torch.testing.assert_close(out["comp_rgb_fg"], 0.5 * expected.expand(-1, -1, -1, 3))
    blue = torch.tensor([0.0, 0.0, 1.0])
    torch.testing.assert_close(out["comp_rgb"], 0.5 * expected + (1 - expected) * blue)


def test_fogs_depth_and_its_variance():
    """Distances in fog are exponential, cut off at the far side."""
    out = renderer(fog(1.5), num_samples_per_ray=2000)(**view(size=1))
    origin, direction = (view(size=1)[k].reshape(1, 3) for k in ("rays_o", "rays_d"))
    near, far = (x.item() for x in box_interval(origin, direction, 1.0))
    sigma, length = 1.5, far - near
    e = math.exp(sigma * length)
    mean = near + 1 / sigma - length / (e - 1)
    variance = 1 / sigma**2 - length**2 * e / (e - 1) ** 2
    assert (out["depth"] / out["opacity"]).item() == pytest.approx(mean, rel=1e-4)
    assert out["z_variance"].item() == pytest.approx(variance, rel=1e-3)


@pytest.mark.parametrize("estimator", ["occgrid", "importance"])
def test_an_opaque_ball_hides_the_background_at_its_distance(estimator):
    batch = view(size=15)
    out = renderer(ball(), estimator=estimator, num_samples_per_ray=160,
                   num_samples_per_ray_importance=160)(**batch)
    o, d = batch["rays_o"], batch["rays_d"]
    middle = -(o * d).sum(-1, keepdim=True)
    miss2 = (o + middle * d).square().sum(-1, keepdim=True)
    hit, clear = miss2 < 0.45**2, miss2 > 0.5**2
    distance = middle - (0.25 - miss2).clamp_min(0).sqrt()
    assert hit.sum() > 20 and clear.sum() > 20
    assert (out["depth"] - distance)[hit].abs().max() < 3.5 / 160
    assert out["opacity"][hit].min() > 0.999 and out["opacity"][clear].max() == 0
    red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1])
    torch.testing.assert_close(out["comp_rgb"], torch.where(hit, red, out["comp_rgb"]))
    torch.testing.assert_close(out["comp_rgb"], torch.where(clear, blue, out["comp_rgb"]))
    torch.testing.assert_close(out["comp_rgb_bg"], blue.expand(1, 15, 15, 3))


def test_a_given_background_colour_replaces_the_background():
    batch, green = view(size=3), torch.tensor([[0.0, 1.0, 0.0]])
    empty = renderer(fog(0.0))
    assert torch.equal(empty(**batch, bg_color=green)["comp_rgb"], green.expand(1, 3, 3, 3))
    picture = torch.rand(1, 3, 3, 3)
    assert torch.equal(empty(**batch, bg_color=picture)["comp_rgb"], picture)


def test_importance_samples_gather_where_the_density_is():
    thin = Solid(lambda p: 2000.0 * ((p[..., :1] > 0.3) & (p[..., :1] < 0.4)).float())
    batch = view(size=1, bearing=90.0)  # from the east: along -x
    shares = {}
    for estimator in ("occgrid", "importance"):
        torch.manual_seed(0)
        out = renderer(thin, train=True, estimator=estimator, num_samples_per_ray=32,
                       num_samples_per_ray_importance=64)(**batch)
        x = out["points"][:, 0]
        shares[estimator] = ((x > 0.28) & (x < 0.42)).float().mean().item()
        assert out["opacity"].item() > 0.999
    assert shares["occgrid"] < 0.15 and shares["importance"] > 0.8


def test_chunks_do_not_change_a_picture():
    torch.manual_seed(0)
    field = PyramidGrid(PyramidGrid.Config(levels=(4, 8), density_bias=-2.0))
    for level in field.levels:
        torch.nn.init.normal_(level, std=0.3)
    background = Textured(Textured.Config(height=4, width=8))
    pictures = []
    for chunk in (16 * 10**6, 16 * 7, 1):
        render = renderer(field, background, num_samples_per_ray=16, eval_chunk_size=chunk)
        with torch.no_grad():
            pictures.append(render(**view(size=5)))
    assert set(pictures[0]) == {"comp_rgb", "comp_rgb_fg", "comp_rgb_bg", "opacity", "depth",
                                "z_variance", "comp_normal"}
    for other in pictures[1:]:
        for key, value in pictures[0].items():
            torch.testing.assert_close(other[key], value, msg=key)


def test_two_cameras_in_one_batch_are_two_pictures():
    field = Solid(lambda p: 5.0 * (p[..., :1] > 0).float(), lambda p: 3 * p)
    c2w = cameras.c2w_from_bearing(torch.tensor([10.0, 200.0]), torch.zeros(2), torch.full((2,), 3))
    fovy = torch.tensor([0.6, 0.8])
    both = renderer(field)(**cameras.camera_batch(c2w, fovy, 4, 6))
    for k in range(2):
        one = slice(k, k + 1)
        single = renderer(field)(**cameras.camera_batch(c2w[one], fovy[one], 4, 6))
        torch.testing.assert_close(both["comp_rgb"][one], single["comp_rgb"])


def test_training_gives_threestudios_per_sample_outputs():
    field = Solid(lambda p: torch.exp(-p.square().sum(-1, keepdim=True)),
                  normal_type="finite_difference")
    render = renderer(field, train=True, normals=True, num_samples_per_ray=5,
                      return_comp_normal=True, return_normal_perturb=True)
    out = render(**view(size=2))
    samples = 2 * 2 * 5
    widths = {"weights": 1, "t_points": 1, "t_intervals": 1, "points": 3, "t_dirs": 3,
              "density": 1, "features": 3, "normal": 3, "shading_normal": 3, "normal_perturb": 3}
    for name, width in widths.items():
        assert out[name].shape == (samples, width), name
    assert out["ray_indices"].tolist() == [k for k in range(4) for _ in range(5)]
    total = torch.zeros(4).index_add(0, out["ray_indices"], out["weights"][:, 0])
    torch.testing.assert_close(total.view(1, 2, 2, 1), out["opacity"])
    where = view(size=2)["rays_o"].reshape(4, 1, 3) + (
        out["t_points"].view(4, 5, 1) * view(size=2)["rays_d"].reshape(4, 1, 3))
    torch.testing.assert_close(out["points"].view(4, 5, 3), where)
    outward = torch.nn.functional.normalize(out["points"], dim=-1)
    assert (out["normal"] * outward).sum(-1).min() > 0.95


def test_normals_are_computed_where_they_are_wanted():
    field = Solid(lambda p: torch.exp(-p.square().sum(-1, keepdim=True)),
                  normal_type="finite_difference")
    render = renderer(field, train=True, num_samples_per_ray=3)
    assert "normal" not in render(**view(size=1))
    render.wants_normals = True  # the orientation loss has weight
    assert "normal" in render(**view(size=1))
    assert "comp_normal" in render.eval()(**view(size=1))
    field.cfg.normal_type = None
    assert "comp_normal" not in renderer(field)(**view(size=1))


def test_the_parts_weights_are_not_registered_twice():
    assert not renderer(PyramidGrid(PyramidGrid.Config(levels=(2,)))).state_dict()


def test_gradients_flow_from_colour_to_field_and_background():
    field = PyramidGrid(PyramidGrid.Config(levels=(4,), density_bias=-1.0))
    background = SolidColor(SolidColor.Config(learned=True))
    renderer(field, background, train=True, num_samples_per_ray=8)(**view())["comp_rgb"].sum() \
        .backward()
    assert (field.levels[0].grad.abs().amax(dim=(2, 3, 4)) > 0).all()
    assert background.env_color.grad.abs().min() > 0


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="renderer.estimator is 'proposal'.*occgrid, importance"):
        NeRFVolumeRenderer.Config(estimator="proposal")


# --- regularisers ----------------------------------------------------------------------------


def test_sparsity_by_hand():
    opacity = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    assert sparsity_loss(opacity).item() == pytest.approx((0.1 + math.sqrt(1.01)) / 2)


def test_opaqueness_by_hand():
    half = opaque_loss(torch.full((1, 2, 2, 1), 0.5)).item()
    assert half == pytest.approx(math.log(2))
    edge = -(0.999 * math.log(0.999) + 0.001 * math.log(0.001))
    for value in (0.0, 1.0):
        assert opaque_loss(torch.full((1, 2, 2, 1), value)).item() == pytest.approx(edge, rel=1e-4)


def test_orientation_by_hand():
    """0.5 x max(-1, 0)^2 + 0.25 x 1^2 + 1 x 0.6^2 over the two pixels that were hit."""
    weights = torch.tensor([[0.5], [0.25], [1.0]], requires_grad=True)
    normal = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, -0.6, 0.8]], requires_grad=True)
    directions = torch.tensor([[-1.0, 0, 0], [-1, 0, 0], [0, -1, 0]])
    opacity = torch.tensor([0.9, 0.0, 0.1]).view(1, 1, 3, 1)
    loss = orientation_loss(weights, normal, directions, opacity)
    assert loss.item() == pytest.approx((0.25 + 0.36) / 2)
    loss.backward()
    assert weights.grad is None and normal.grad[0].abs().max() == 0
    nothing = orientation_loss(weights, normal, directions, torch.zeros(1, 1, 3, 1))
    assert math.isfinite(nothing.item())


def test_z_variance_by_hand():
    variance = torch.tensor([0.2, 0.4, 9.0]).view(1, 1, 3, 1).requires_grad_()
    opacity = torch.tensor([0.6, 1.0, 0.5]).view(1, 1, 3, 1)
    assert z_variance_loss(variance, opacity).item() == pytest.approx(0.3)
    nothing = z_variance_loss(variance, 0 * opacity)
    assert nothing.item() == 0 and nothing.requires_grad


def test_regularisers_push_in_the_direction_that_they_name():
    opacity = torch.tensor([0.2, 0.8]).view(1, 1, 2, 1).requires_grad_()
    opaque_loss(opacity).backward()
    low, high = opacity.grad.flatten().tolist()
    assert low > 0 > high  # downhill: 0.2 goes down, 0.8 goes up
    opacity.grad = None
    sparsity_loss(opacity).backward()
    assert (opacity.grad > 0).all()


def test_box_interval_is_used_with_the_renderers_radius():
    wide = Solid(lambda p: torch.ones_like(p[..., :1]), radius=2.0)
    outs = [renderer(wide, radius=radius)(**view(size=1, bearing=90.0, distance=5.0))["opacity"]
            for radius in (0.5, 1.0)]
    thickness = [-math.log(1 - out.item()) for out in outs]
    tilt = math.cos(math.radians(10))
    assert thickness == pytest.approx([1 / tilt, 2 / tilt], rel=1e-4)
