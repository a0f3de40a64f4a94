"""Volume rendering of a field, and the regularisers on what was rendered.

Samples lie inside the box [-radius, radius]^3 and are dense: the same number on every ray. Outputs
carry threestudio's names; depth and positions are in scene units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ESTIMATORS = ("occgrid", "importance")


def box_interval(rays_o: Tensor, rays_d: Tensor, radius: float, near: float = 0.0,
                 far: float = 1e10) -> tuple[Tensor, Tensor]:
    """Where rays [N, 3] run inside the box: distances (near, far) [N], equal where they miss."""
    safe = torch.where(rays_d.abs() < 1e-9, 1e-9, rays_d)
    a, b = (-radius - rays_o) / safe, (radius - rays_o) / safe
    enter = torch.minimum(a, b).amax(dim=-1).clamp(min=near, max=far)
    leave = torch.maximum(a, b).amin(dim=-1).clamp(max=far)
    return enter, torch.maximum(enter, leave)


def stratified_edges(near: Tensor, far: Tensor, count: int, randomized: bool) -> Tensor:
    """Edges [N, count + 1] of even intervals between near and far [N], shifted a little per ray."""
    steps = torch.linspace(0, 1, count + 1, device=near.device, dtype=near.dtype)
    steps = steps.expand(len(near), -1)
    if randomized:
        shift = (torch.rand(len(near), 1, device=near.device) - 0.5) / count
        steps = torch.cat([steps[:, :1], steps[:, 1:-1] + shift, steps[:, -1:]], dim=1)
    return near[:, None] + steps * (far - near)[:, None]


def importance_edges(edges: Tensor, weights: Tensor, count: int, randomized: bool) -> Tensor:
    """Edges [N, count + 1] that share the weight of intervals [N, K] evenly (inverse CDF).

    A hundredth of an even share is added, so that empty space is still visited.
    """
    pdf = weights + 0.01 / weights.shape[1]
    pdf = pdf / pdf.sum(dim=1, keepdim=True)
    cdf = F.pad(pdf.cumsum(dim=1), (1, 0))
    cdf = cdf / cdf[:, -1:].clamp_min(1e-9)
    u = torch.linspace(0, 1, count + 1, device=edges.device).expand(len(edges), -1)
    if randomized:
        jitter = (torch.rand(len(edges), 1, device=edges.device) - 0.5) / count
        u = torch.cat([u[:, :1], u[:, 1:-1] + jitter, u[:, -1:]], dim=1)
    u = u.contiguous()
    above = torch.searchsorted(cdf, u, right=True).clamp(1, weights.shape[1])
    below = above - 1
    c0, c1 = cdf.gather(1, below), cdf.gather(1, above)
    e0, e1 = edges.gather(1, below), edges.gather(1, above)
    return e0 + (e1 - e0) * ((u - c0) / (c1 - c0).clamp_min(1e-9)).clamp(0, 1)


def render_weights(density: Tensor, lengths: Tensor) -> Tensor:
    """Weights [N, S] of samples with densities and interval lengths [N, S]: T_i (1 - e^(-s d)).

    They sum to the opacity 1 - exp(-sum of density x length).
    """
    optical = density * lengths
    passed = optical.cumsum(dim=1) - optical
    return torch.exp(-passed) * (1 - torch.exp(-optical))


class NeRFVolumeRenderer(nn.Module):
    """``nerf-volume-renderer``.

    ``estimator: importance`` looks at the density alone at ``num_samples_per_ray_importance``
    even intervals, then shades ``num_samples_per_ray`` placed by weight. ``occgrid`` takes even
    intervals; pruning is left to threestudio, where it saves memory.
    """

    @dataclass
    class Config:
        radius: float = 1.0
        num_samples_per_ray: int = 512
        eval_chunk_size: int = 160000
        randomized: bool = True
        near_plane: float = 0.0
        far_plane: float = 1e10
        return_comp_normal: bool = False
        return_normal_perturb: bool = False
        estimator: str = "occgrid"
        grid_prune: bool = True
        prune_alpha_threshold: bool = True
        proposal_network_config: dict[str, Any] | None = None
        prop_optimizer_config: dict[str, Any] | None = None
        prop_scheduler_config: dict[str, Any] | None = None
        num_samples_per_ray_proposal: int = 64
        num_samples_per_ray_importance: int = 64

        def __post_init__(self) -> None:
            if self.estimator not in ESTIMATORS:
                raise ValueError(f"renderer.estimator is {self.estimator!r}; the portable engine "
                                 f"has {', '.join(ESTIMATORS)}.")

    def __init__(self, cfg: Config, geometry: Any, material: Any, background: Any) -> None:
        super().__init__()
        self.cfg = cfg
        # The system owns these modules: registered here too, their weights would be saved twice.
        self.parts = {"geometry": geometry, "material": material, "background": background}
        self.needs_normal = bool(material.requires_normal)
        self.shows_normals = geometry.cfg.normal_type is not None
        self.wants_normals = False  # set by the system while the orientation loss has weight

    def forward(self, rays_o: Tensor, rays_d: Tensor, light_positions: Tensor,
                bg_color: Tensor | None = None, **batch: Any) -> dict[str, Tensor]:
        """Rays [B, H, W, 3] and lights [B, 3] to threestudio's outputs.

        ``comp_rgb``, ``comp_rgb_fg``, ``comp_rgb_bg`` [B, H, W, 3]; ``opacity``, ``depth``,
        ``z_variance`` [B, H, W, 1]; in training also per sample [B H W S, ...] ``weights``,
        ``t_dirs``, ``points`` and what the field returns; else ``comp_normal`` if normals are
        rendered. ``bg_color`` [B, 3] or [B, H, W, 3] replaces the background.
        """
        b, h, w = rays_o.shape[:3]
        origins, directions = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
        lights = light_positions[:, None, None].expand(b, h, w, 3).reshape(-1, 3)
        # threestudio keeps depth along unnormalised directions; ours are unit unless asked
        if self.training:
            out = self._rays(origins, directions, lights)
        else:
            size = max(1, self.cfg.eval_chunk_size // self.cfg.num_samples_per_ray)
            chunks = [
                self._rays(*(x[k : k + size] for x in (origins, directions, lights)))
                for k in range(0, len(origins), size)
            ]
            out = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
        background = self.parts["background"](rays_d)
        if bg_color is not None and bg_color.ndim == 2:
            bg_color = bg_color[:, None, None].expand_as(background)
        shown = background if bg_color is None else bg_color
        images: dict[str, Tensor] = {
            k: out.pop(k).reshape(b, h, w, -1)
            for k in ("comp_rgb_fg", "opacity", "depth", "z_variance", "comp_normal") if k in out
        }
        images["comp_rgb"] = images["comp_rgb_fg"] + shown * (1 - images["opacity"])
        images["comp_rgb_bg"] = background
        return images | out if self.training else images

    def _edges(self, origins: Tensor, directions: Tensor) -> Tensor:
        cfg = self.cfg
        near, far = box_interval(origins, directions, cfg.radius, cfg.near_plane, cfg.far_plane)
        randomized = self.training and cfg.randomized
        if cfg.estimator == "occgrid":
            return stratified_edges(near, far, cfg.num_samples_per_ray, randomized)
        with torch.no_grad():
            coarse = stratified_edges(near, far, cfg.num_samples_per_ray_importance, randomized)
            middle = 0.5 * (coarse[:, 1:] + coarse[:, :-1])
            points = origins[:, None] + middle[..., None] * directions[:, None]
            density = self.parts["geometry"].forward_density(points)[..., 0]
            weights = render_weights(density, coarse.diff(dim=1))
            return importance_edges(coarse, weights, cfg.num_samples_per_ray, randomized)

    def _rays(self, origins: Tensor, directions: Tensor, lights: Tensor) -> dict[str, Tensor]:
        edges = self._edges(origins, directions)
        middle, lengths = 0.5 * (edges[:, 1:] + edges[:, :-1]), edges.diff(dim=1)
        points = origins[:, None] + middle[..., None] * directions[:, None]
        normals = self.needs_normal or (self.wants_normals if self.training else self.shows_normals)
        field = self.parts["geometry"](points, output_normal=normals)
        colour = self.parts["material"](
            viewdirs=directions[:, None].expand_as(points), positions=points,
            light_positions=lights[:, None].expand_as(points), **field,
        )
        weights = render_weights(field["density"][..., 0], lengths)
        opacity = weights.sum(dim=1, keepdim=True)
        share = weights / opacity.clamp_min(1e-5)
        mean = (share * middle).sum(dim=1, keepdim=True)
        variance = (share * (middle - mean).square()).sum(dim=1, keepdim=True)
        out = {
            "comp_rgb_fg": (weights[..., None] * colour).sum(dim=1),
            "opacity": opacity,
            "depth": (weights * middle).sum(dim=1, keepdim=True),
            "z_variance": variance * (opacity > 0.5),
        }
        if "normal" in field and (not self.training or self.cfg.return_comp_normal):
            normal = F.normalize((weights[..., None] * field["normal"]).sum(dim=1), dim=-1)
            out["comp_normal"] = (normal + 1) / 2 * opacity
        if self.training:
            out |= self._samples(weights, middle, lengths, points, directions, field)
        return out

    def _samples(self, weights: Tensor, middle: Tensor, lengths: Tensor, points: Tensor,
                 directions: Tensor, field: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per-sample outputs, flattened to [rays x samples, ...]."""
        out = {
            "weights": weights[..., None], "t_points": middle[..., None],
            "t_intervals": lengths[..., None], "points": points,
            "t_dirs": directions[:, None].expand_as(points), **field,
        }
        if self.cfg.return_normal_perturb and "normal" in field:
            moved = points + 1e-2 * torch.randn_like(points)
            out["normal_perturb"] = self.parts["geometry"](moved, output_normal=True)["normal"]
        rays = torch.arange(len(weights), device=weights.device)
        out["ray_indices"] = rays[:, None].expand_as(weights)[..., None]
        flat = {key: value.reshape(-1, value.shape[-1]) for key, value in out.items()}
        return flat | {"ray_indices": flat["ray_indices"][:, 0]}


# --- regularisers ----------------------------------------------------------------------------


def orientation_loss(weights: Tensor, normal: Tensor, directions: Tensor,
                     opacity: Tensor) -> Tensor:
    """Ref-NeRF's penalty on normals that face away: sum w max(n . d, 0)^2 / number of hit pixels.

    ``weights`` [M, 1] are constants, ``normal`` and ``directions`` are [M, 3] and ``opacity`` is
    [B, H, W, 1].
    """
    away = (normal * directions).sum(-1, keepdim=True).clamp_min(0).square()
    return (weights.detach() * away).sum() / (opacity > 0).sum().clamp_min(1)


def sparsity_loss(opacity: Tensor) -> Tensor:
    """mean sqrt(opacity^2 + 0.01): less of everything."""
    return (opacity.square() + 0.01).sqrt().mean()


def opaque_loss(opacity: Tensor) -> Tensor:
    """Binary entropy of the opacity, clamped at 1e-3: each pixel solid or empty."""
    o = opacity.clamp(1e-3, 1 - 1e-3)
    return F.binary_cross_entropy(o, o)


def z_variance_loss(z_variance: Tensor, opacity: Tensor) -> Tensor:
    """Mean depth variance along the rays of pixels with opacity above one half (HiFA)."""
    solid = opacity > 0.5
    return z_variance[solid].mean() if bool(solid.any()) else z_variance.sum() * 0


RENDERERS = {"nerf-volume-renderer": NeRFVolumeRenderer}
