"""Encodings and MLPs in pure torch: exact at nodes, orthonormal, with gradients."""

import math

import pytest
import torch

from gps_guidance.lift.networks import MLP, Encoding, HashGrid, ProgressiveBandHashGrid, activation

DENSE = {"otype": "HashGrid", "n_levels": 2, "n_features_per_level": 2, "base_resolution": 4,
         "per_level_scale": 2.0, "log2_hashmap_size": 19}
MLP_CONFIG = {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 2}


def random_grid(config=DENSE, kind=HashGrid):
    torch.manual_seed(0)
    grid = kind(3, config)
    for table in grid.tables:
        torch.nn.init.normal_(table)
    return grid


def test_hash_grid_sizes():
    grid = HashGrid(3, {"n_levels": 3, "base_resolution": 16, "per_level_scale": 1.5,
                        "log2_hashmap_size": 13})
    assert grid.resolutions == [16, 24, 36]
    # 17^3 vertices fit into 2^13 rows, 25^3 and 37^3 do not
    assert [tuple(t.shape) for t in grid.tables] == [(17**3, 2), (8192, 2), (8192, 2)]
    assert grid.n_output_dims == 6 and grid(torch.rand(5, 3)).shape == (5, 6)
    with pytest.raises(ValueError, match="3D points"):
        HashGrid(2, DENSE)


def test_a_dense_level_is_exact_at_its_nodes():
    grid = random_grid()
    for level, side in enumerate(grid.resolutions):
        axis = torch.arange(side + 1)
        nodes = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        rows = grid.index(nodes, level)
        assert sorted(rows.tolist()) == list(range((side + 1) ** 3))  # no two share a row
        torch.testing.assert_close(grid.level(nodes / side, level), grid.tables[level][rows])


def test_between_nodes_the_grid_is_trilinear():
    grid = random_grid()
    table = grid.tables[0]

    def node(x, y, z):
        return table[x + 5 * (y + 5 * z)]

    edge = grid.level(torch.tensor([[1.25 / 4, 0.5, 0.75]]), 0)[0]
    torch.testing.assert_close(edge, 0.75 * node(1, 2, 3) + 0.25 * node(2, 2, 3))
    middle = grid.level(torch.tensor([[2.5 / 4, 1.5 / 4, 0.5 / 4]]), 0)[0]
    corners = [node(2 + i, 1 + j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    torch.testing.assert_close(middle, torch.stack(corners).mean(0))
    inside, outside = torch.tensor([[1.0, 0.3, 0.0]]), torch.tensor([[1.7, 0.3, -2.0]])
    assert torch.equal(grid(inside), grid(outside))  # beyond the box its border counts


def test_large_levels_use_instant_ngps_hash():
    config = {**DENSE, "n_levels": 1, "base_resolution": 64, "log2_hashmap_size": 10}
    grid = random_grid(config)
    for vertex in ((0, 0, 0), (5, 3, 1), (64, 17, 40)):
        x, y, z = vertex
        expected = (x ^ (y * 2654435761) ^ (z * 805459861)) % 1024
        assert grid.index(torch.tensor(vertex), 0).item() == expected
        at = torch.tensor([vertex]) / 64
        torch.testing.assert_close(grid(at)[0], grid.tables[0][expected])


def test_gradients_reach_the_eight_corners_and_the_points():
    grid = random_grid()
    points = torch.tensor([[0.3, 0.6, 0.8]], requires_grad=True)
    grid(points).sum().backward()
    for table in grid.tables:
        touched = table.grad[:, 0].nonzero()
        assert len(touched) == 8 and table.grad.sum().item() == pytest.approx(2.0)
    assert points.grad.abs().min() > 0
    assert torch.autograd.gradcheck(
        lambda x: grid.double()(x), torch.tensor([[0.31, 0.62, 0.83]], dtype=torch.float64,
                                                 requires_grad=True))


def test_a_progressive_grid_opens_its_levels():
    config = {**DENSE, "n_levels": 4, "start_level": 1, "start_step": 10, "update_steps": 5}
    grid, points = random_grid(config, ProgressiveBandHashGrid), torch.rand(6, 3)
    full = torch.cat([grid.level(points, k) for k in range(4)], -1)
    opened = {0: 1, 10: 1, 14: 1, 15: 2, 20: 3, 25: 4, 1000: 4}
    for step, levels in opened.items():
        grid.update_step(0, step)
        code = grid(points)
        assert torch.equal(code[:, : 2 * levels], full[:, : 2 * levels]), step
        assert code.shape == (6, 8) and not code[:, 2 * levels :].any()


def test_a_progressive_grid_may_start_closed():
    config = {**DENSE, "start_level": 0, "start_step": 0, "update_steps": 5}
    grid = ProgressiveBandHashGrid(3, config)
    assert torch.equal(grid(torch.rand(2, 3)), torch.zeros(2, 4))


def test_frequencies():
    code = Encoding(3, {"otype": "VanillaFrequency", "n_frequencies": 2})
    x = torch.tensor([[0.1, 0.2, 0.3]])
    expected = torch.cat([f(k * x) for k in (1.0, 2.0) for f in (torch.sin, torch.cos)], -1)
    torch.testing.assert_close(code(x), expected)
    assert code.n_output_dims == 12
    of_tinycudann = Encoding(3, {"otype": "Frequency", "n_frequencies": 2})
    torch.testing.assert_close(of_tinycudann(x), code(math.pi * x))
    slow = Encoding(3, {"otype": "ProgressiveBandFrequency", "n_frequencies": 2,
                        "n_masking_step": 100})
    assert not slow(x).any()
    slow.update_step(0, 25)  # half of the first band's opening: (1 - cos(pi / 2)) / 2
    torch.testing.assert_close(slow(x)[:, :3], 0.5 * torch.sin(x))
    assert not slow(x)[:, 6:].any()
    slow.update_step(0, 100)
    torch.testing.assert_close(slow(x), expected)


def test_spherical_harmonics_are_orthonormal():
    """Gauss nodes in z times even azimuths integrate products of degree six exactly."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(8)
    z, turn = torch.from_numpy(nodes), torch.arange(16) * (2 * math.pi / 16)
    z, turn = (a.reshape(-1) for a in torch.meshgrid(z, turn.double(), indexing="ij"))
    flat = (1 - z * z).sqrt()
    directions = torch.stack([flat * turn.cos(), flat * turn.sin(), z], -1)
    area = torch.from_numpy(weights).repeat_interleave(16) * (2 * math.pi / 16)
    code = Encoding(3, {"otype": "SphericalHarmonics", "degree": 4})((directions + 1) / 2)
    assert code.shape[-1] == 16
    gram = torch.einsum("n,ni,nj->ij", area, code, code)
    torch.testing.assert_close(gram, torch.eye(16).double(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="degree is 5"):
        Encoding(3, {"otype": "SphericalHarmonics", "degree": 5})


def test_the_raw_point_may_go_in_front():
    code = Encoding(3, {**DENSE, "include_xyz": True})
    x = torch.rand(4, 3)
    assert code.n_output_dims == 7
    assert torch.equal(code(x)[:, :3], 2 * x - 1)


@pytest.mark.parametrize("otype", ["VanillaMLP", "FullyFusedMLP", "CutlassMLP"])
def test_mlp_is_bias_free_and_has_the_configured_layers(otype):
    mlp = MLP(5, 3, {**MLP_CONFIG, "otype": otype, "output_activation": "sigmoid"})
    linear = [m for m in mlp if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(8, 5), (8, 8), (3, 8)]
    assert all(m.bias is None for m in linear)
    torch.testing.assert_close(mlp(torch.zeros(2, 5)), torch.full((2, 3), 0.5))
    mlp(torch.rand(2, 5)).sum().backward()
    assert all(m.weight.grad is not None for m in linear)


def test_mlp_keeps_its_32_bits_under_a_half_precision_trainer():
    mlp, x = MLP(5, 3, {**MLP_CONFIG, "output_activation": "exp"}), torch.rand(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.Linear(5, 3)(x).dtype == torch.bfloat16
        inside = mlp(x)
    assert torch.equal(inside, mlp(x)) and inside.dtype == torch.float32
    assert torch.equal(mlp(x.bfloat16()), mlp(x.bfloat16().float()))


@pytest.mark.parametrize(("name", "x", "y"), [
    ("none", -2.0, -2.0), (None, 3.0, 3.0), ("ReLU", -2.0, 0.0), ("sigmoid", 0.0, 0.5),
    ("softplus", 0.0, math.log(2)), ("exp", 1.0, math.e), ("trunc_exp", 1.0, math.e),
    ("shifted_softplus", 1.0, math.log(2)), ("scale_-11_01", -0.5, 0.25), ("softsign", 1.0, 0.5),
    ("lin2srgb", 0.002, 0.02584), ("lin2srgb", 0.5, 1.055 * 0.5 ** (1 / 2.4) - 0.055),
    ("lin2srgb", 7.0, 1.0), ("shifted_exp", 1.0, 1.0), ("shifted_trunc_exp", 2.0, math.e),
])
def test_activations(name, x, y):
    assert activation(name)(torch.tensor(x)).item() == pytest.approx(y, rel=1e-5)


def test_the_truncated_exponentials_gradient_stops_growing():
    x = torch.tensor([2.0, 20.0], requires_grad=True)
    activation("trunc_exp")(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([math.exp(2), math.exp(15)], rel=1e-5)


def test_unknown_names_are_refused_with_what_exists():
    with pytest.raises(ValueError, match="activation 'gelu' is unknown.*softplus"):
        activation("gelu")
    with pytest.raises(ValueError, match="otype is 'Hash'.*HashGrid"):
        Encoding(3, {"otype": "Hash"})
    with pytest.raises(ValueError, match="otype is None.*VanillaMLP"):
        MLP(3, 1, {"n_neurons": 8, "n_hidden_layers": 1})
