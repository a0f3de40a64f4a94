"""What stands in for CUDA packages in threestudio, each against its definition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_extension import STAND_IN
from torch import Tensor

from gps_guidance.nocompile import nerfacc_kernels as kernels
from gps_guidance.nocompile import nvdiffrast_torch as dr
from gps_guidance.nocompile import tinycudann

ROOT = Path(__file__).parents[1]
COUNTS = torch.tensor([3, 0, 1, 4, 0])
STARTS = COUNTS.cumsum(0) - COUNTS


def by_ray(values: Tensor, function) -> Tensor:
    return torch.cat([function(chunk) for chunk in values.split(COUNTS.tolist())])


def exclusive(function, first: float):
    return lambda x: torch.cat([torch.full_like(x[:1], first), function(x, 0)[:-1]])


@pytest.fixture
def values() -> Tensor:
    return torch.rand(int(COUNTS.sum()), generator=torch.Generator().manual_seed(0)) + 0.1


def test_sums_along_rays(values):
    for kernel, plain in ((kernels.inclusive_sum, lambda x: x.cumsum(0)),
                          (kernels.exclusive_sum, exclusive(torch.cumsum, 0.0))):
        wanted = by_ray(values, plain)
        assert torch.allclose(kernel(STARTS, COUNTS, values, False, False), wanted)
        backward = by_ray(values, lambda x, plain=plain: plain(x.flip(0)).flip(0))
        assert torch.allclose(kernel(STARTS, COUNTS, values, False, True), backward)
    shares = kernels.inclusive_sum(STARTS, COUNTS, values, True, False)
    assert torch.allclose(shares, by_ray(values, lambda x: x.cumsum(0) / x.sum()))


def test_a_sum_over_many_rays_stays_exact():
    counts = torch.full((20000,), 50)
    ones = torch.full((1_000_000,), 0.1)
    sums = kernels.inclusive_sum(counts.cumsum(0) - counts, counts, ones, False, False)
    assert torch.allclose(sums[-50:], 0.1 * torch.arange(1, 51), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["inclusive", "exclusive"])
def test_products_along_rays_and_their_gradients(values, name):
    forward = getattr(kernels, f"{name}_prod_forward")
    backward = getattr(kernels, f"{name}_prod_backward")
    plain = {"inclusive": lambda x: x.cumprod(0),
             "exclusive": exclusive(torch.cumprod, 1.0)}[name]
    leaf = values.clone().requires_grad_()
    wanted = by_ray(leaf, plain)
    products = forward(STARTS, COUNTS, values)
    assert torch.allclose(products, wanted)
    gradient = torch.linspace(-1, 2, len(values))
    (wanted_gradient,) = torch.autograd.grad(wanted, leaf, gradient)
    assert torch.allclose(backward(STARTS, COUNTS, values, products, gradient), wanted_gradient,
                          atol=1e-6)


def test_importance_samples_invert_the_cdf():
    edges = kernels.RaySegmentsSpec(vals=torch.tensor([[0.0, 1.0, 2.0]]))
    cdfs = torch.tensor([[0.0, 0.75, 1.0]])
    intervals, samples = kernels.importance_sampling(edges, cdfs, 4, False)
    u = (torch.arange(4) + 0.5) / 4  # the cdf rises to 3/4 in the first unit, to 1 in the second
    wanted = torch.where(u < 0.75, u / 0.75, 1 + (u - 0.75) / 0.25)
    assert torch.allclose(samples.vals[0], wanted)
    assert torch.allclose(intervals.vals[0, 1:-1], (wanted[1:] + wanted[:-1]) / 2)
    # half a gap beyond the outer samples, and not beyond the old edges
    assert torch.allclose(intervals.vals[0, [0, -1]], torch.tensor([0.0, 1.5 + 1 / 3]), atol=1e-6)
    torch.manual_seed(0)
    first = kernels.importance_sampling(edges, cdfs, 4, True)[1].vals
    assert not torch.allclose(first, samples.vals)
    assert (first.diff() > 0).all()


def test_the_neighbours_of_a_value():
    edges = kernels.RaySegmentsSpec(vals=torch.tensor([[0.0, 1.0, 2.0]]))
    left, right = kernels.searchsorted(
        kernels.RaySegmentsSpec(vals=torch.tensor([[0.5, 1.0, 5.0]])), edges)
    assert left.tolist() == [[0, 1, 1]] and right.tolist() == [[1, 2, 2]]


def traverse(rays_o, rays_d, binaries, near, far, step):
    aabbs = torch.tensor([[-1.0, -1, -1, 1, 1, 1]])
    enter, leave, hits = kernels.ray_aabb_intersect(rays_o, rays_d, aabbs, -torch.inf, torch.inf,
                                                    torch.inf)
    t, order = torch.sort(torch.cat([enter, leave], -1), -1)
    mask = torch.ones(len(rays_o), dtype=torch.bool)
    return kernels.traverse_grids(rays_o, rays_d, mask, binaries, aabbs, t, order, hits, near, far,
                                  step, 0.0, True, True, True, -1, False)


def test_steps_stay_where_their_middle_is_in_an_occupied_cell():
    generator = torch.Generator().manual_seed(1)
    rays_o = torch.tensor([[-3.0, 0.1, 0.2], [0.0, 0.0, -2.0], [5.0, 5.0, 5.0]])
    rays_d = torch.tensor([[1.0, 0.02, -0.03], [0.3, 0.1, 1.0], [1.0, 0.0, 0.0]])
    rays_d = rays_d / rays_d.norm(dim=1, keepdim=True)
    binaries = torch.rand(1, 6, 5, 4, generator=generator) < 0.5
    near, far, step = torch.tensor([0.03, 0.0, 0.0]), torch.full((3,), 3.5), 0.07
    intervals, samples, _ = traverse(rays_o, rays_d, binaries, near, far, step)
    wanted = []
    for ray in range(3):
        for k in range(200):
            middle = float(near[ray]) + (k + 0.5) * step
            point = rays_o[ray] + middle * rays_d[ray]
            if middle < 3.5 and (point.abs() < 1).all():
                x, y, z = ((point + 1) / 2 * torch.tensor([6, 5, 4])).long().tolist()
                if binaries[0, x, y, z]:
                    wanted.append((ray, middle))
    assert len(wanted) > 10
    assert samples.ray_indices.tolist() == [ray for ray, _ in wanted]
    assert torch.allclose(samples.vals, torch.tensor([middle for _, middle in wanted]), atol=1e-5)
    assert torch.allclose(intervals.vals[intervals.is_left], samples.vals - step / 2, atol=1e-6)
    assert torch.allclose(intervals.vals[intervals.is_right], samples.vals + step / 2, atol=1e-6)
    assert samples.chunk_cnts.tolist() == [sum(r == ray for r, _ in wanted) for ray in range(3)]
    packed = kernels.pack_info(samples.ray_indices, 3)
    assert torch.equal(packed, torch.stack([samples.chunk_starts, samples.chunk_cnts], 1))


def test_what_the_kernels_cannot_do_is_refused():
    with pytest.raises(ValueError, match="need nerfacc's CUDA kernels"):
        kernels.importance_sampling(kernels.RaySegmentsSpec(vals=torch.zeros(3)), torch.zeros(3),
                                    2, False)
    with pytest.raises(ValueError, match="need nerfacc's CUDA kernels"):
        traverse(torch.zeros(1, 3), torch.eye(3)[:1], torch.ones(1, 2, 2, 2, dtype=torch.bool),
                 torch.zeros(1), torch.ones(1), 0.0)


# --- nvdiffrast ----------------------------------------------------------------------------------


def test_the_nearest_triangle_is_drawn_with_its_barycentric_weights():
    low = torch.tensor([[-1.0, -1, 0.5, 1], [3, -1, 0.5, 1], [-1, 3, 0.5, 1]])  # the whole screen
    near = torch.tensor([[-1.0, -1, 0, 1], [0, -1, 0, 1], [-1, 0, 0, 1]])  # its lower left corner
    clip = torch.cat([low, near])[None]
    tri = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    rast, _ = dr.rasterize(dr.RasterizeGLContext(), clip, tri, (8, 8))
    y, x = torch.meshgrid((torch.arange(8) + 0.5) / 4 - 1, (torch.arange(8) + 0.5) / 4 - 1,
                          indexing="ij")
    front = x + y <= -1 + 1e-6
    assert torch.equal(rast[0, ..., 3], torch.where(front, 2.0, 1.0))
    assert torch.allclose(rast[0, ..., 2], torch.where(front, 0.0, 0.5))
    position, _ = dr.interpolate(clip[..., :2].contiguous(), rast, tri)
    assert torch.allclose(position[0], torch.stack([x, y], -1), atol=1e-5)


def test_weights_are_correct_in_perspective():
    clip = torch.tensor([[[-1.0, -1, 0, 1], [4, -4, 0, 4], [-1, 1, 0, 1], [4, 4, 0, 4]]])
    tri = torch.tensor([[0, 1, 2], [1, 3, 2]], dtype=torch.int32)
    depth = clip[..., 3:].contiguous()
    rast, _ = dr.rasterize(None, clip, tri, 16)
    drawn, _ = dr.interpolate(depth, rast, tri)
    x = (torch.arange(16) + 0.5) / 8 - 1
    wanted = 1 / (0.5 * (1 - x) + 0.5 * (1 + x) / 4)  # 1 / w is linear on the screen
    assert torch.allclose(drawn[0, 8, :, 0], wanted, atol=1e-4)


def test_nothing_is_drawn_behind_the_camera_or_without_area_and_gradients_are_refused():
    clip = torch.tensor([[[-1.0, -1, 0, -1], [1, -1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]])
    tri = torch.tensor([[0, 1, 2], [3, 3, 2]], dtype=torch.int32)
    assert not dr.rasterize(None, clip, tri, 8)[0].any()
    with pytest.raises(ValueError, match="install nvdiffrast"):
        dr.antialias()


# --- tinycudann, and packages that are not there -------------------------------------------------


def test_encodings_and_networks_by_tinycudanns_names():
    grid = {"otype": "HashGrid", "n_levels": 3, "n_features_per_level": 2,
            "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 2.0}
    mlp = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "none",
           "n_neurons": 8, "n_hidden_layers": 1}
    points = torch.rand(5, 3)
    encoding = tinycudann.Encoding(3, grid, dtype=torch.bfloat16)
    assert encoding(points).shape == (5, encoding.n_output_dims) == (5, 6)
    assert encoding(points).dtype == torch.bfloat16
    both = tinycudann.NetworkWithInputEncoding(3, 2, grid, mlp)
    assert both(points).shape == (5, 2)
    with pytest.raises(ValueError, match="activation 'Sine'.* Install tinycudann"):
        tinycudann.Network(3, 2, mlp | {"activation": "Sine"})


ABSENT = """
import importlib.util, sys
sys.path.insert(0, "{folder}")
from gps_guidance.nocompile.stand_ins import let_import
let_import(["nothing_here"])
import threestudio
assert importlib.util.find_spec("nothing_here") is None
try:
    import nothing_here
except ImportError:
    print("others see that it is missing")
try:
    threestudio.deep.thing()
except ImportError as error:
    print(error)
"""


def test_only_threestudio_may_import_what_is_not_there(tmp_path):
    (tmp_path / "threestudio").mkdir()
    (tmp_path / "threestudio" / "__init__.py").write_text(
        "import nothing_here\nimport nothing_here.a.b as deep\nfrom nothing_here.a import c\n")
    done = subprocess.run([sys.executable, "-c", ABSENT.format(folder=tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "others see that it is missing"
    assert "needs nothing_here.a.b.thing" in second and "pip install nothing_here" in second


CHILD = {
    "nerfacc.py": """
from types import SimpleNamespace
cuda, volrend = SimpleNamespace(), SimpleNamespace()
""",
    "threestudio/__init__.py": """
import tinycudann
import torchvision  # which no config of ours calls
def embed():
    return tinycudann.__name__
""" + STAND_IN["threestudio/__init__.py"],
    "threestudio/utils/misc.py": "def get_device():\n    return 'cuda'\n",
    "threestudio/models/networks.py": "",
    "launch.py": """
import multiprocessing
import threestudio
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("CHILD", pool.apply(threestudio.embed))
""",
}


@pytest.mark.slow
def test_child_processes_of_threestudio_have_the_stand_ins(tmp_path):
    for name, text in {**STAND_IN, **CHILD}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "gps_guidance.nocompile.start"], cwd=tmp_path,
                          capture_output=True, text=True, check=False, env=environment)
    assert "CHILD gps_guidance.nocompile.tinycudann" in done.stdout, done.stderr


def test_it_starts_in_a_clone_of_threestudio_only(tmp_path):
    done = subprocess.run([sys.executable, "-m", "gps_guidance.nocompile.start"], cwd=tmp_path,
                          capture_output=True, text=True, check=False,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 1
    assert "is no clone of threestudio" in done.stderr
