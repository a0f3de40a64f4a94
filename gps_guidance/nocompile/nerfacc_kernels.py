"""Stand-ins for nerfacc's CUDA kernels, as functions of the same names, for any device.

nerfacc looks each kernel up in its module ``nerfacc.cuda`` when it is called, which is where
:func:`install` puts these. "Packed" values [N] belong to rays in chunks: ``starts`` and ``counts``
[R] say where the chunk of a ray begins and how long it is.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TINY = 1e-10  # what nerfacc's kernels take for zero


class RaySegmentsSpec(SimpleNamespace):
    """What the kernels take and give: ``vals`` and, where they are packed, whose they are."""

    def __init__(self, **tensors: Any) -> None:
        nothing = dict.fromkeys(("vals", "chunk_starts", "chunk_cnts", "ray_indices", "is_left",
                                 "is_right", "is_valid"))
        super().__init__(**nothing | tensors)


# --- sums and products along rays ----------------------------------------------------------------


def rays_of(starts: Tensor, counts: Tensor) -> Tensor:
    """The ray [N] of each packed value."""
    return torch.arange(len(starts), device=starts.device).repeat_interleave(counts)


def inclusive_sum(starts: Tensor, counts: Tensor, values: Tensor, normalize: bool,
                  backward: bool) -> Tensor:
    """Sums [N] along rays up to and with each value; with ``backward`` from it to the end."""
    ray = rays_of(starts, counts)
    # in float64: one running sum over all rays, from which what lies before a ray is taken away
    running = torch.cumsum(values.double(), 0)
    before = torch.cat([running.new_zeros(1), running])
    total = before[starts + counts] - before[starts]
    sums = running - before[starts][ray]
    if backward:
        sums = total[ray] - sums + values
    if normalize:
        sums = sums / total[ray].clamp_min(TINY)
    return sums.to(values.dtype)


def exclusive_sum(starts: Tensor, counts: Tensor, values: Tensor, normalize: bool,
                  backward: bool) -> Tensor:
    """As ``inclusive_sum``, without the value itself."""
    if normalize:
        raise ValueError("exclusive_sum: normalize needs nerfacc's CUDA kernels.")
    return inclusive_sum(starts, counts, values, False, backward) - values


def inclusive_prod_forward(starts: Tensor, counts: Tensor, values: Tensor) -> Tensor:
    """Products [N] along rays up to and with each value."""
    ray = rays_of(starts, counts)
    column = torch.arange(len(values), device=values.device) - starts[ray]
    table = values.new_ones(len(starts), int(counts.max()) if len(values) else 0)
    table[ray, column] = values
    return table.cumprod(1)[ray, column]


def exclusive_prod_forward(starts: Tensor, counts: Tensor, values: Tensor) -> Tensor:
    """Products [N] along rays before each value; 1 for the first."""
    shifted = torch.cat([values.new_ones(1), values[:-1]])[: len(values)]
    shifted[starts[counts > 0]] = 1.0
    return inclusive_prod_forward(starts, counts, shifted)


def inclusive_prod_backward(starts: Tensor, counts: Tensor, values: Tensor, products: Tensor,
                            gradient: Tensor) -> Tensor:
    """Gradient [N] of ``inclusive_prod_forward``: sum over later i of g_i y_i, over x_j."""
    later = inclusive_sum(starts, counts, gradient * products, False, True)
    return later / values.clamp_min(TINY)


def exclusive_prod_backward(starts: Tensor, counts: Tensor, values: Tensor, products: Tensor,
                            gradient: Tensor) -> Tensor:
    """Gradient [N] of ``exclusive_prod_forward``."""
    later = exclusive_sum(starts, counts, gradient * products, False, True)
    return later / values.clamp_min(TINY)


# --- samples along rays --------------------------------------------------------------------------


def searchsorted(query: RaySegmentsSpec, key: RaySegmentsSpec) -> tuple[Tensor, Tensor]:
    """Neighbours (left, right) [R, Q], as columns of ``key.vals`` [R, K], of the queries [R, Q]."""
    edges = _batched(key.vals, "searchsorted")
    return _neighbours(edges, query.vals)


def importance_sampling(intervals: RaySegmentsSpec, cdfs: Tensor, count: int, stratified: bool
                        ) -> tuple[RaySegmentsSpec, RaySegmentsSpec]:
    """``count`` intervals, and their middles, at even steps of the cdfs [R, K] of the old edges.

    ``stratified`` shifts all samples of a ray by one random part of a step.
    """
    edges = _batched(intervals.vals, "importance_sampling")
    low, high = cdfs[:, :1], cdfs[:, -1:]
    bias = torch.rand_like(low) if stratified else torch.full_like(low, 0.5)
    u = low + (torch.arange(count, device=cdfs.device) + bias) * (high - low) / count
    p0, p1 = _neighbours(cdfs, u)
    u0, u1 = cdfs.gather(1, p0), cdfs.gather(1, p1)
    t0, t1 = edges.gather(1, p0), edges.gather(1, p1)
    flat = u1 - u0 < TINY
    slope = (t1 - t0) / torch.where(flat, 1.0, u1 - u0)
    samples = torch.where(flat, (t0 + t1) / 2, t0 + (u - u0) * slope)
    middle = (samples[:, 1:] + samples[:, :-1]) / 2
    first = samples[:, :1] - (middle[:, :1] - samples[:, :1])
    final = samples[:, -1:] + (samples[:, -1:] - middle[:, -1:])
    new = torch.cat([first.maximum(edges[:, :1]), middle, final.minimum(edges[:, -1:])], 1)
    return RaySegmentsSpec(vals=new), RaySegmentsSpec(vals=samples)


def _neighbours(edges: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    right = torch.searchsorted(edges.contiguous(), values.contiguous(), right=True)
    right = right.clamp(max=edges.shape[-1] - 1)
    return (right - 1).clamp_min(0), right


def _batched(values: Tensor, name: str) -> Tensor:
    if values.dim() != 2:
        raise ValueError(f"{name}: packed intervals need nerfacc's CUDA kernels.")
    return values


@torch.no_grad()
def traverse_grids(
    rays_o: Tensor, rays_d: Tensor, rays_mask: Tensor, binaries: Tensor, aabbs: Tensor,
    t_sorted: Tensor, t_indices: Tensor, hits: Tensor, near: Tensor, far: Tensor, step_size: float,
    cone_angle: float, want_intervals: bool, want_samples: bool, want_ends: bool,
    steps_limit: int, over_allocate: bool,
) -> tuple[RaySegmentsSpec, RaySegmentsSpec, Tensor]:
    """Steps of ``step_size`` along rays [R, 3], of which those stay whose middle lies in an
    occupied cell of the grid [1, X, Y, Z]; intervals of two edges each, packed."""
    if len(binaries) != 1 or cone_angle != 0 or step_size <= 0 or steps_limit > 0:
        raise ValueError("traverse_grids: several levels of grids, a cone angle and a limit of "
                         "steps need nerfacc's CUDA kernels.")
    start, end = t_sorted[:, 0].maximum(near), t_sorted[:, 1].minimum(far)
    alive = hits[:, 0] & rays_mask & (end > start)
    start, end = torch.where(alive, start, near), torch.where(alive, end, near)
    first = ((start - near) / step_size - 0.5).ceil().clamp_min(0)  # first middle inside the box
    longest = int(((end - near) / step_size - 0.5 - first).max().ceil().clamp_min(0)) + 1
    index = first[:, None] + torch.arange(longest, device=rays_o.device)
    middle = near[:, None] + (index + 0.5) * step_size
    inside = alive[:, None] & (middle >= start[:, None]) & (middle < end[:, None])
    ray, column = inside.nonzero(as_tuple=True)
    points = rays_o[ray] + middle[ray, column, None] * rays_d[ray]
    low, high = aabbs[0, :3], aabbs[0, 3:]
    sides = torch.tensor(binaries.shape[1:], device=rays_o.device)
    cell = ((points - low) / (high - low) * sides).long().clamp_min(0).minimum(sides - 1)
    full = binaries[0][cell[:, 0], cell[:, 1], cell[:, 2]]
    ray, column = ray[full], column[full]
    left = near[ray] + index[ray, column] * step_size
    counts = torch.bincount(ray, minlength=len(rays_o))
    starts = counts.cumsum(0) - counts
    edges = torch.stack([left, left + step_size], 1).flatten()
    is_left = torch.arange(len(edges), device=edges.device) % 2 == 0
    intervals = RaySegmentsSpec(
        vals=edges, chunk_starts=2 * starts, chunk_cnts=2 * counts, is_left=is_left,
        is_right=~is_left, ray_indices=ray.repeat_interleave(2))
    samples = RaySegmentsSpec(
        vals=left + step_size / 2, chunk_starts=starts, chunk_cnts=counts, ray_indices=ray,
        is_valid=torch.ones_like(ray, dtype=torch.bool))
    return intervals, samples, end


def ray_aabb_intersect(rays_o: Tensor, rays_d: Tensor, aabbs: Tensor, near: float, far: float,
                       miss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays [R, 3] enter and leave boxes [M, 6], and whether they do: three times [R, M]."""
    one = (aabbs[:, :3] - rays_o[:, None]) / rays_d[:, None]
    two = (aabbs[:, 3:] - rays_o[:, None]) / rays_d[:, None]
    enter = torch.minimum(one, two).amax(-1)
    leave = torch.maximum(one, two).amin(-1)
    hits = (leave > enter) & (leave > 0)
    enter, leave = (torch.where(hits, t.clamp(near, far), miss) for t in (enter, leave))
    return enter, leave, hits


KERNELS = (RaySegmentsSpec, inclusive_sum, exclusive_sum, inclusive_prod_forward,
           inclusive_prod_backward, exclusive_prod_forward, exclusive_prod_backward, searchsorted,
           importance_sampling, traverse_grids, ray_aabb_intersect)


def pack_info(ray_indices: Tensor, n_rays: int | None = None) -> Tensor:
    """Where the chunk of each ray starts and how long it is [R, 2], from the sorted rays [N]."""
    counts = torch.bincount(ray_indices, minlength=n_rays or 0)
    return torch.stack([counts.cumsum(0) - counts, counts], 1)


def install(nerfacc: Any) -> None:
    """Put the stand-ins into ``nerfacc.cuda``; and ``pack_info``, which needs no kernel but
    refuses the CPU, where nerfacc calls it."""
    for kernel in KERNELS:
        setattr(nerfacc.cuda, kernel.__name__, kernel)
    nerfacc.pack_info = nerfacc.volrend.pack_info = pack_info
