"""Stand-in for ``nvdiffrast.torch``: rasterisation and interpolation, enough to export meshes.

Exact in what is drawn, without its gradients: optimising a mesh needs nvdiffrast itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 4_000_000  # pixels of bounding boxes at a time


class RasterizeGLContext:
    """A context has no state here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


RasterizeCudaContext = RasterizeGLContext


@torch.no_grad()
def rasterize(glctx: Any, pos: Tensor, tri: Tensor, resolution: tuple[int, int] | int,
              ranges: Any = None, grad_db: bool = True) -> tuple[Tensor, Tensor]:
    """(u, v, z/w, triangle + 1) [B, H, W, 4], zero where nothing is, and empty derivatives.

    ``pos`` [B, V, 4] is in clip space, ``tri`` [F, 3] int; row 0 is at y = -1. Triangles that
    cross the camera's plane are left out.
    """
    if pos.dim() != 3:
        raise ValueError(f"rasterize: pos has shape {tuple(pos.shape)}; without nvdiffrast there "
                         "is [B, V, 4] alone.")
    size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    out = torch.stack([_rasterize_one(vertices, tri.long(), *size) for vertices in pos])
    return out, torch.zeros(*out.shape[:3], 0, device=pos.device)


def _rasterize_one(clip: Tensor, tri: Tensor, height: int, width: int) -> Tensor:
    """One view [H, W, 4]: every pixel of every triangle's bounding box, then the nearest."""
    w = clip[:, 3]
    half = clip.new_tensor([width, height]) / 2
    screen = (clip[:, :2] / w[:, None] + 1) * half  # pixel (i, j) is centred at (i + .5, j + .5)
    depth = clip[:, 2] / w
    corners = screen[tri]  # [F, 3, 2]
    low = (corners.amin(1) - 0.5).ceil().clamp_min(0).long()
    limit = torch.tensor([width, height], device=clip.device)
    high = torch.minimum((corners.amax(1) - 0.5).floor().long() + 1, limit)
    boxes = (high - low).clamp_min(0)
    area = boxes.prod(1) * (w[tri] > 0).all(1)
    best = torch.full((height * width,), torch.inf, dtype=clip.dtype, device=clip.device)
    out = clip.new_zeros(height * width, 4)
    for faces in _chunks(area):
        face = faces.repeat_interleave(area[faces])
        begin = area[faces].cumsum(0) - area[faces]
        step = torch.arange(len(face), device=clip.device) - begin.repeat_interleave(area[faces])
        column, row = low[face, 0] + step % boxes[face, 0], low[face, 1] + step // boxes[face, 0]
        weights = _barycentric(corners[face], torch.stack([column, row], 1) + 0.5)
        z, pixel = (weights * depth[tri[face]]).sum(1), row * width + column
        inside = (weights >= 0).all(1) & (z.abs() <= 1)
        face, pixel, z, weights = face[inside], pixel[inside], z[inside], weights[inside]
        best.scatter_reduce_(0, pixel, z, "amin")
        front = z == best[pixel]
        face, pixel, z, weights = face[front], pixel[front], z[front], weights[front]
        weights = weights / w[tri[face]]  # perspective: what is linear is attribute / w
        weights = weights / weights.sum(1, keepdim=True)
        out[pixel] = torch.stack([weights[:, 0], weights[:, 1], z, face + 1.0], 1)
    return out.reshape(height, width, 4)


def _chunks(area: Tensor) -> list[Tensor]:
    """The faces that cover something, in groups of about CHUNK pixels."""
    faces = area.nonzero()[:, 0]
    group = area[faces].cumsum(0) // CHUNK
    return [faces[group == k] for k in group.unique()]


def _barycentric(corners: Tensor, points: Tensor) -> Tensor:
    """Weights [N, 3] of the corners [N, 3, 2] at points [N, 2]; NaN for triangles without area."""
    a, b, c = corners.unbind(1)

    def cross(u: Tensor, v: Tensor) -> Tensor:
        return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]

    whole = cross(b - a, c - a)
    parts = cross(b - points, c - points), cross(c - points, a - points)
    first, second = (part / whole for part in parts)
    return torch.stack([first, second, 1 - first - second], 1)


def interpolate(attr: Tensor, rast: Tensor, tri: Tensor, rast_db: Any = None,
                diff_attrs: Any = None) -> tuple[Tensor, Tensor]:
    """Attributes [B or 1, V, C] at the pixels of ``rast``, [B, H, W, C]; zero where nothing is."""
    face = rast[..., 3].long()
    corners = tri.long()[(face - 1).clamp_min(0)]  # [B, H, W, 3]
    values = torch.stack([attr[k if len(attr) > 1 else 0][corners[k]] for k in range(len(rast))])
    u, v = rast[..., 0, None], rast[..., 1, None]
    mixed = values[..., 0, :] * u + values[..., 1, :] * v + values[..., 2, :] * (1 - u - v)
    return mixed * (face > 0)[..., None], torch.zeros(*mixed.shape[:3], 0, device=attr.device)


def antialias(*args: Any, **kwargs: Any) -> Tensor:
    """Refused: it is where nvdiffrast's gradients come from."""
    raise ValueError("nvdiffrast is not installed, and its antialiasing, by which meshes are "
                     "optimised, has no stand-in: install nvdiffrast, or choose a volume renderer.")
