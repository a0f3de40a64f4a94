"""Fields: hand-computed values in the box, gradients, caching, normals that point outward."""

import math

import pytest
import torch
import torch.nn.functional as F

from gps_guidance.lift.field import (
    Field,
    FieldConfig,
    ImplicitVolume,
    PyramidGrid,
    VolumeGrid,
    sample_volume,
    slopes,
)

SMALL_HASH = {"otype": "HashGrid", "n_levels": 2, "n_features_per_level": 2,
              "log2_hashmap_size": 10, "base_resolution": 4, "per_level_scale": 2.0}
CORNERS = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])


def pyramid(levels=(2, 3), **settings):
    return PyramidGrid(PyramidGrid.Config(levels=levels, **settings))


def implicit(**settings):
    torch.manual_seed(0)
    return ImplicitVolume(ImplicitVolume.Config(pos_encoding_config=SMALL_HASH, **settings))


def grid(side=2, **settings):
    return VolumeGrid(VolumeGrid.Config(grid_size=(side,) * 3, **settings))


def softplus(x):
    return math.log1p(math.exp(x))


# --- where values stand in the box -----------------------------------------------------------


def test_sample_volume_runs_x_y_z_from_corner_to_corner():
    volume = torch.zeros(1, 1, 2, 2, 3)
    volume[0, 0, 1, 0, 2] = 1.0  # z high, y low, x high
    points = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0], [0.5, -1.0, 0.0], [9.0, -9.0, 9.0]])
    assert sample_volume(volume, points)[:, 0].tolist() == [1.0, 0.0, 0.25, 1.0]
    assert sample_volume(volume, points.view(2, 2, 3)).shape == (2, 2, 1)


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_the_pyramids_corner_nodes_lie_in_the_boxs_corners(radius):
    field = pyramid((2,), radius=radius, density_bias=0.0, density_blob_scale=0.0,
                    density_activation="none", density_scale=1.0, density_gain=1.0,
                    feature_gain=1.0)
    with torch.no_grad():
        for x in (0, 1):
            for y in (0, 1):
                for z in (0, 1):
                    field.levels[0][0, :, z, y, x] = torch.tensor([1, x, y, z]) + 10.0 * x + y
    out = field(radius * CORNERS)
    x, y, z = (CORNERS / 2 + 0.5).unbind(-1)
    base = 10 * x + y
    torch.testing.assert_close(out["density"][:, 0], 1 + base)
    torch.testing.assert_close(out["features"], torch.stack([x, y, z], -1) + base[:, None])
    torch.testing.assert_close(field.forward_density(radius * CORNERS), out["density"])


def test_the_hash_grids_unit_cube_is_the_box():
    field = implicit(radius=2.0)
    torch.testing.assert_close(field.unit(2 * CORNERS), CORNERS / 2 + 0.5)
    assert torch.equal(field.unit(torch.zeros(3)), torch.full((3,), 0.5))


def test_volume_grid_is_trilinear_between_cell_centres():
    """Two cells a side: their centres are at -1/2 and 1/2 of the box, outside the border counts."""
    field = grid(radius=2.0, density_activation="none", density_bias=0.0)
    with torch.no_grad():
        field.grid[0, 0, :, :, 1] = 8.0  # density 8 in the eastern cells
        field.grid[0, 1, :, 1, :] = 4.0  # first feature 4 in the northern ones
    points = torch.tensor([[1.0, 1.0, 0.0], [0.0, -1.0, 0.3], [0.5, 0.0, -1.9], [2.0, 2.0, 2.0]])
    out = field(points)
    assert out["density"][:, 0].tolist() == [8.0, 4.0, 6.0, 8.0]
    assert out["features"][:, 0].tolist() == [4.0, 0.0, 2.0, 4.0]
    assert not out["features"][:, 1:].any()


def test_shapes_for_any_leading_dimensions():
    for field in (pyramid(), implicit(n_feature_dims=5), grid(3, n_feature_dims=5)):
        out = field(torch.rand(2, 4, 3) - 0.5, output_normal=True)
        assert out["density"].shape == (2, 4, 1)
        assert out["features"].shape == (2, 4, field.cfg.n_feature_dims)
        assert out["normal"].shape == out["shading_normal"].shape == (2, 4, 3)
        assert "normal" not in field(torch.rand(2, 3))


# --- the pyramid -----------------------------------------------------------------------------


def test_the_pyramids_volume_is_the_sum_of_its_upsampled_levels():
    field = pyramid((2, 3), density_bias=-7.0, density_blob_scale=5.5, density_blob_std=0.5,
                    density_gain=4.0, feature_gain=2.0)
    with torch.no_grad():
        field.levels[0][..., 1] = 1.0  # rises along x: 0, 1/2, 1 at three nodes
        field.levels[1][:, :, 0] = 2.0  # lowest layer
    volume = field.volume()[0]
    assert volume.shape == (4, 3, 3, 3)
    ramp = torch.tensor([0.0, 0.5, 1.0]).expand(3, 3, 3) + torch.tensor([2.0, 0, 0])[:, None, None]
    torch.testing.assert_close(volume[1], 2.0 * ramp)
    torch.testing.assert_close(volume[0] - field.start[0, 0], 4.0 * ramp)
    assert field.start[0, 0, 1, 1, 1].item() == pytest.approx(-1.5)
    assert field.start[0, 0, 1, 1, 2].item() == pytest.approx(-7 + 5.5 * math.exp(-2))
    middle = field(torch.zeros(1, 3))
    assert middle["density"].item() == pytest.approx(30 * softplus(-1.5 + 4 * 0.5), rel=1e-5)
    assert middle["features"][0].tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(("bounds", "kept"), [
    ({"floor": -0.3}, [0, 1, 1]), ({"footprint": 0.5}, [1, 1, 0]),
    ({"floor": -0.3, "footprint": 0.5}, [0, 1, 0]),
])
def test_below_the_floor_and_beyond_the_footprint_there_is_nothing(bounds, kept):
    points = torch.tensor([[0.3, 0.39, -0.31], [0.3, 0.39, -0.29], [-0.3, 0.41, 0.5]])
    whole, cut = pyramid(density_bias=0.0), pyramid(density_bias=0.0, **bounds)
    kept = torch.tensor(kept)[:, None].float()
    torch.testing.assert_close(cut.forward_density(points), whole.forward_density(points) * kept)
    assert torch.equal(cut(points)["density"], cut.forward_density(points))
    assert torch.equal(cut(points)["features"], whole(points)["features"])


def test_gradients_reach_every_level():
    field = pyramid((2, 3, 5))
    out = field(torch.rand(64, 3) * 2 - 1)
    (out["density"].sum() + out["features"].sum()).backward()
    for level in field.levels:
        assert level.grad.shape == level.shape
        assert (level.grad.abs().amax(dim=(2, 3, 4)) > 0).all()


def test_the_volume_is_summed_once_and_again_after_a_step():
    field, points = pyramid((2, 4)), torch.rand(8, 3) - 0.5
    assert field.volume() is field.volume()
    optimizer = torch.optim.Adam(field.parameters(), lr=0.1)
    for _ in range(3):  # without update_step: the change in place is noticed by itself
        before = field(points)["density"]
        before.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after = field(points)["density"]
        assert (after < before).all()
        assert after.requires_grad
    with torch.no_grad():
        frozen = field(points)["density"]
    assert not frozen.requires_grad and torch.equal(frozen, after)
    assert field(points)["density"].requires_grad  # a volume without graph is not kept for training
    other = pyramid((2, 4))
    other.volume()
    other.load_state_dict(field.state_dict())
    torch.testing.assert_close(other(points)["density"], after)


def test_placing_samples_shares_the_volume_of_training():
    field, points = pyramid((2, 4)), torch.rand(8, 3) - 0.5
    with torch.no_grad():
        placed = field.forward_density(points)
        kept = field._cache
    density = field(points)["density"]
    assert field._cache is kept and not placed.requires_grad and torch.equal(placed, density)
    density.sum().backward()
    assert all(level.grad is not None for level in field.levels)
    field.eval()
    with torch.no_grad():
        field(points)
    assert not field._cache[1].requires_grad  # pictures keep no graph


def test_a_second_backward_pass_needs_only_update_step():
    field, points = pyramid(), torch.rand(4, 3) - 0.5
    for step in range(2):  # gradient accumulation: no optimiser step in between
        field.update_step(0, step)
        field(points)["density"].sum().backward()
    assert field.levels[0].grad.abs().sum() > 0


def test_state_holds_the_levels_alone():
    assert set(pyramid((2, 3)).state_dict()) == {"levels.0", "levels.1"}


def test_slopes_are_central_differences_along_x_y_z():
    z, y, x = torch.meshgrid(*(torch.arange(4.0),) * 3, indexing="ij")
    volume = (2 * x + 3 * y - 5 * z)[None, None]
    inner = slopes(volume)[0, :, 1:-1, 1:-1, 1:-1]
    assert torch.equal(inner.amax((1, 2, 3)), torch.tensor([2.0, 3.0, -5.0]))
    assert torch.equal(inner.amin((1, 2, 3)), torch.tensor([2.0, 3.0, -5.0]))


# --- biases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "raw"), [
    (-1.5, -1.5), (2, 2.0), ("blob_magic3d", 10 * (1 - 0.5)), ("blob", 10 * (1 - 0.5)),
    ("blob_dreamfusion", 10 * math.exp(-0.5 * 0.25))])
def test_blob_biases(bias, raw):
    """At a quarter from the middle, half of the blob's deviation."""
    at = torch.tensor([[0.0, 0.15, -0.2]])
    for field in (grid(2, density_bias=bias, density_blob_scale=10.0, density_blob_std=0.5),
                  pyramid(density_bias=bias, density_blob_scale=10.0, density_blob_std=0.5)):
        assert field.bias(at).item() == pytest.approx(raw, rel=1e-6)
    field = grid(2, density_bias=bias, density_blob_scale=10.0, density_blob_std=0.5)
    assert field.forward_density(at).item() == pytest.approx(softplus(raw), rel=1e-5)


def test_implicit_density_is_the_activated_network_plus_bias():
    field = implicit(density_bias=0.25, density_activation="trunc_exp")
    points = torch.rand(5, 3) - 0.5
    raw = field.density_network(field.encoding(field.unit(points))) + 0.25
    torch.testing.assert_close(field(points)["density"], raw.exp())
    torch.testing.assert_close(field.forward_density(points), raw.exp())


def test_a_progressive_encoding_follows_the_step():
    config = {**SMALL_HASH, "otype": "ProgressiveBandHashGrid", "start_level": 1, "start_step": 0,
              "update_steps": 10}
    field = ImplicitVolume(ImplicitVolume.Config(pos_encoding_config=config))
    field.update_step(0, 10)
    assert field.encoding.encoding.current_level == 2


# --- normals ---------------------------------------------------------------------------------


def sphere_points(count=200):
    generator = torch.Generator().manual_seed(1)
    outward = F.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    return outward, outward * (0.25 + 0.3 * torch.rand(count, 1, generator=generator))


BLOB = {"density_blob_std": 0.5}
FIELDS = {
    "implicit": lambda normal: implicit(normal_type=normal, density_bias="blob_magic3d", **BLOB),
    "grid": lambda normal: grid(50, normal_type=normal, density_bias="blob_magic3d", **BLOB),
    "pyramid": lambda normal: pyramid((8, 33), normal_type=normal, **BLOB),
}


@pytest.mark.parametrize("normal_type",
                         ["finite_difference", "finite_difference_laplacian", "analytic"])
@pytest.mark.parametrize("kind", FIELDS)
def test_normals_of_a_blob_point_outward(kind, normal_type):
    outward, points = sphere_points()
    field = FIELDS[kind](normal_type)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            normal = field(points, output_normal=True)["normal"]
        assert (normal * outward).sum(-1).min() > 0.985
        torch.testing.assert_close(normal.norm(dim=-1), torch.ones(len(points)))


def test_analytic_normals_carry_a_gradient_to_the_weights():
    field = implicit(normal_type="analytic")
    _, points = sphere_points(8)
    field(points, output_normal=True)["normal"].square()[:, 0].sum().backward()
    assert field.density_network[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not field(points, output_normal=True)["normal"].requires_grad


def test_predicted_normals_are_unit():
    for field in (implicit(normal_type="pred"), grid(3, normal_type="pred")):
        with torch.no_grad():
            for name, weights in field.named_parameters():
                if name == "normal_grid":
                    weights.normal_()
        normal = field(torch.rand(9, 3) - 0.5, output_normal=True)["normal"]
        torch.testing.assert_close(normal.norm(dim=-1), torch.ones(9))


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FieldConfig, ImplicitVolume.Config, VolumeGrid.Config,
                                    PyramidGrid.Config])
def test_an_unknown_normal_type_is_refused(config):
    with pytest.raises(ValueError, match="normal_type is 'smooth'; .*finite_difference"):
        config(normal_type="smooth")


def test_what_a_field_cannot_do_is_refused():
    with pytest.raises(ValueError, match="density_bias is 'ball'"):
        grid(density_bias="ball")(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="normal_type is null"):
        implicit(normal_type=None)(torch.zeros(1, 3), output_normal=True)
    with pytest.raises(ValueError, match="anneal_density_blob_std_config"):
        implicit(anneal_density_blob_std_config={"min_anneal_step": 0})
    with pytest.raises(TypeError, match="abstract"):
        Field(FieldConfig())
