"""3D fields: points in the scene frame, within [-radius, radius]^3, to density and features.

Every field answers ``field(points [..., 3], output_normal)`` with ``density`` [..., 1],
``features`` [..., n_feature_dims] and, if asked, ``normal`` and ``shading_normal`` [..., 3] (unit,
against the density's gradient), and ``forward_density(points)`` with [..., 1]. Densities are per
scene unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gps_guidance.lift.networks import MLP, Encoding, activation

NORMALS = ("finite_difference", "finite_difference_laplacian", "analytic", "pred", None)


@dataclass
class FieldConfig:
    """threestudio's keys for every implicit geometry. ``isosurface_method`` is accepted: surfaces
    are always found by marching cubes."""

    radius: float = 1.0
    isosurface: bool = True
    isosurface_method: str = "mt"
    isosurface_resolution: int = 128
    isosurface_threshold: Any = 0.0
    isosurface_chunk: int = 0
    isosurface_coarse_to_fine: bool = True
    isosurface_deformable_grid: bool = False
    isosurface_remove_outliers: bool = True
    isosurface_outlier_n_faces_threshold: Any = 0.01
    n_feature_dims: int = 3
    density_activation: str | None = "softplus"
    density_bias: Any = "blob_magic3d"
    density_blob_scale: float = 10.0
    density_blob_std: float = 0.5
    normal_type: str | None = "finite_difference"

    def __post_init__(self) -> None:
        if self.normal_type not in NORMALS:
            raise ValueError(f"geometry.normal_type is {self.normal_type!r}; it must be one of "
                             f"{', '.join(map(str, NORMALS))}.")


class Field(nn.Module, ABC):
    """What all fields share: the blob bias of the density, and normals by differences."""

    cfg: Any

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.density_activation = activation(cfg.density_activation)
        self.difference_eps = 0.01 * cfg.radius

    def unit(self, points: Tensor) -> Tensor:
        """Points to [0, 1]^3 of the box."""
        return points / (2 * self.cfg.radius) + 0.5

    def bias(self, points: Tensor) -> Tensor:
        """Density bias [..., 1] before the activation: a number, or a blob in the middle."""
        cfg = self.cfg
        if isinstance(cfg.density_bias, (int, float)):
            return torch.full_like(points[..., :1], float(cfg.density_bias))
        r = points.norm(dim=-1, keepdim=True)
        if cfg.density_bias == "blob_dreamfusion":
            return cfg.density_blob_scale * torch.exp(-0.5 * (r / cfg.density_blob_std) ** 2)
        if cfg.density_bias in ("blob_magic3d", "blob"):
            return cfg.density_blob_scale * (1 - r / cfg.density_blob_std)
        raise ValueError(f"geometry.density_bias is {cfg.density_bias!r}; it must be a number, "
                         "'blob_dreamfusion' or 'blob_magic3d'.")

    @abstractmethod
    def forward_density(self, points: Tensor) -> Tensor:
        """Density [..., 1] at points [..., 3]."""

    def difference_normal(self, points: Tensor, density: Tensor) -> Tensor:
        """Normal by one-sided (or, for ``finite_difference_laplacian``, central) differences."""
        eps = self.difference_eps
        steps = eps * torch.eye(3, dtype=points.dtype, device=points.device)
        limit, at = self.cfg.radius, points[..., None, :]
        ahead = self.forward_density((at + steps).clamp(-limit, limit))[..., 0]
        if self.cfg.normal_type == "finite_difference_laplacian":
            behind = self.forward_density((at - steps).clamp(-limit, limit))[..., 0]
            return F.normalize(0.5 * (behind - ahead) / eps, dim=-1)
        return F.normalize((density - ahead) / eps, dim=-1)

    def analytic_normal(self, points: Tensor) -> Tensor:
        """Normal by differentiation, itself differentiable."""
        with torch.enable_grad():
            at = points.detach().requires_grad_(True)
            density = self.forward_density(at)
            (grad,) = torch.autograd.grad(density.sum(), at, create_graph=torch.is_grad_enabled())
        return F.normalize(-grad, dim=-1)

    def with_normal(self, out: dict[str, Tensor], points: Tensor) -> dict[str, Tensor]:
        """``out`` with ``normal`` and ``shading_normal`` by the configured type."""
        grad = torch.is_grad_enabled()
        if self.cfg.normal_type is None:
            raise ValueError("geometry.normal_type is null, but the material or a loss needs "
                             "normals: set it to finite_difference.")
        if self.cfg.normal_type == "analytic":
            normal = self.analytic_normal(points)
            normal = normal if grad else normal.detach()
        else:
            normal = self.difference_normal(points, out["density"])
        return out | {"normal": normal, "shading_normal": normal}

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Fields without a schedule have nothing to do."""


class ImplicitVolume(Field):
    """``implicit-volume``: an encoding with MLP heads, threestudio's DreamFusion field."""

    @dataclass
    class Config(FieldConfig):
        n_input_dims: int = 3
        pos_encoding_config: dict[str, Any] = field(
            default_factory=lambda: {
                "otype": "HashGrid", "n_levels": 16, "n_features_per_level": 2,
                "log2_hashmap_size": 19, "base_resolution": 16,
                "per_level_scale": 1.447269237440378,
            }
        )
        mlp_network_config: dict[str, Any] = field(
            default_factory=lambda: {
                "otype": "VanillaMLP", "activation": "ReLU", "output_activation": "none",
                "n_neurons": 64, "n_hidden_layers": 1,
            }
        )
        finite_difference_normal_eps: float = 0.01
        isosurface_threshold: Any = 25.0
        anneal_density_blob_std_config: dict[str, Any] | None = None

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        if cfg.anneal_density_blob_std_config is not None:
            raise ValueError("geometry.anneal_density_blob_std_config is for moving scenes, which "
                             "the portable engine does not have: set it to null.")
        self.difference_eps = cfg.finite_difference_normal_eps
        self.encoding = Encoding(cfg.n_input_dims, cfg.pos_encoding_config)
        width = self.encoding.n_output_dims
        self.density_network = MLP(width, 1, cfg.mlp_network_config)
        self.feature_network = MLP(width, cfg.n_feature_dims, cfg.mlp_network_config)
        if cfg.normal_type == "pred":
            self.normal_network = MLP(width, 3, cfg.mlp_network_config)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self.encoding.update_step(epoch, global_step, on_load_weights)

    def _encode(self, points: Tensor) -> Tensor:
        flat = self.unit(points).reshape(-1, 3)
        return self.encoding(flat).reshape(*points.shape[:-1], -1)

    def forward_density(self, points: Tensor) -> Tensor:
        raw = self.density_network(self._encode(points)) + self.bias(points)
        return self.density_activation(raw)

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        code = self._encode(points)
        raw = self.density_network(code) + self.bias(points)
        out = {"density": self.density_activation(raw), "features": self.feature_network(code)}
        if output_normal and self.cfg.normal_type == "pred":
            normal = F.normalize(self.normal_network(code), dim=-1)
            return out | {"normal": normal, "shading_normal": normal}
        return self.with_normal(out, points) if output_normal else out


class VolumeGrid(Field):
    """``volume-grid``: one dense grid of density and features, trilinear."""

    @dataclass
    class Config(FieldConfig):
        grid_size: Any = (100, 100, 100)
        density_bias: Any = "blob"
        density_blob_scale: float = 5.0
        isosurface_threshold: Any = "auto"

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.grid = nn.Parameter(torch.zeros(1, cfg.n_feature_dims + 1, *cfg.grid_size))
        if cfg.normal_type == "pred":
            self.normal_grid = nn.Parameter(torch.zeros(1, 3, *cfg.grid_size))
        self.difference_eps = 2.0 * cfg.radius / max(cfg.grid_size)

    def _sample(self, points: Tensor, grid: Tensor) -> Tensor:
        return sample_volume(grid, points / self.cfg.radius, align_corners=False)

    def forward_density(self, points: Tensor) -> Tensor:
        return self.density_activation(self._sample(points, self.grid[:, :1]) + self.bias(points))

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        values = self._sample(points, self.grid)
        density = self.density_activation(values[..., :1] + self.bias(points))
        out = {"density": density, "features": values[..., 1:]}
        if output_normal and self.cfg.normal_type == "pred":
            normal = F.normalize(self._sample(points, self.normal_grid), dim=-1)
            return out | {"normal": normal, "shading_normal": normal}
        return self.with_normal(out, points) if output_normal else out


def sample_volume(volume: Tensor, points: Tensor, align_corners: bool = True) -> Tensor:
    """Trilinear values [..., C] of a volume [1, C, Z, Y, X] at points [..., 3] in [-1, 1]^3."""
    grid = points.reshape(1, 1, 1, -1, 3)
    values = F.grid_sample(volume, grid, mode="bilinear", padding_mode="border",
                           align_corners=align_corners)
    return values.reshape(volume.shape[1], -1).T.reshape(*points.shape[:-1], -1)


class PyramidGrid(Field):
    """``gps-pyramid-grid``: a sum of dense grids from coarse to fine, fast on a CPU.

    The levels are added up to one volume of the finest size once a step; a query is one trilinear
    lookup. Coarse levels move large regions together, as a hash grid's do, without its gathers.
    ``levels`` gives the nodes a side; each is its own parameter ``levels.<k>``, so that an
    optimiser can give it its own rate. Density is ``density_scale`` x activation(gain x value +
    bias) per scene unit. It is zero below the height ``floor`` and further than ``footprint`` from
    the vertical axis, so that the ground around a landmark is left to the background. Normals are
    the volume's central differences whichever ``normal_type`` is set; null leaves them out of the
    evaluation's pictures.
    """

    @dataclass
    class Config(FieldConfig):
        levels: Any = (12, 24, 48, 64)
        density_bias: Any = -7.0
        density_blob_scale: float = 5.5
        density_blob_std: float = 0.5
        density_gain: float = 4.0
        density_scale: float = 30.0
        feature_gain: float = 2.0
        isosurface_threshold: Any = 10.0
        floor: float | None = None
        footprint: float | None = None

    start: Tensor
    gain: Tensor

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        channels = cfg.n_feature_dims + 1
        self.levels = nn.ParameterList(
            nn.Parameter(torch.zeros(1, channels, n, n, n)) for n in cfg.levels
        )
        self.side = max(cfg.levels)
        axis = torch.linspace(-1, 1, self.side) * cfg.radius
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        nodes = torch.stack([x, y, z], dim=-1)
        self.register_buffer("start", self._start(nodes), persistent=False)
        gain = torch.tensor([cfg.density_gain] + [cfg.feature_gain] * cfg.n_feature_dims)
        self.register_buffer("gain", gain.view(1, -1, 1, 1, 1), persistent=False)
        self._cache: tuple[Any, Tensor] | None = None

    def _start(self, nodes: Tensor) -> Tensor:
        """The bias at the nodes [1, 1, Z, Y, X]: a number plus a Gaussian blob in the middle."""
        cfg = self.cfg
        if isinstance(cfg.density_bias, (int, float)):
            r2 = (nodes / cfg.density_blob_std).square().sum(-1)
            bias = cfg.density_blob_scale * torch.exp(-0.5 * r2) + cfg.density_bias
        else:
            bias = self.bias(nodes)[..., 0]
        return bias[None, None]

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._cache = None

    def volume(self) -> Tensor:
        """The summed pre-activation values [1, 1 + n_feature_dims, Z, Y, X], once a step.

        In training a call without gradients, by which samples are placed, takes those of the call
        with them.
        """
        wanted = torch.is_grad_enabled()
        key = (wanted or self.training, tuple(level._version for level in self.levels))
        if self._cache is None or self._cache[0] != key:
            with torch.set_grad_enabled(key[0]):
                self._cache = (key, self._sum())
        return self._cache[1] if wanted else self._cache[1].detach()

    def _sum(self) -> Tensor:
        total = torch.zeros_like(self.start)
        for level in self.levels:
            if level.shape[-1] != self.side:
                level = F.interpolate(level, (self.side,) * 3, mode="trilinear", align_corners=True)
            total = total + level
        total = total * self.gain
        return torch.cat([total[:, :1] + self.start, total[:, 1:]], dim=1)

    def _density(self, raw: Tensor, points: Tensor) -> Tensor:
        density = self.cfg.density_scale * self.density_activation(raw)
        if self.cfg.floor is not None:
            density = density * (points[..., 2:] >= self.cfg.floor)
        if self.cfg.footprint is not None:
            density = density * (points[..., :2].norm(dim=-1, keepdim=True) <= self.cfg.footprint)
        return density

    def forward_density(self, points: Tensor) -> Tensor:
        raw = sample_volume(self.volume()[:, :1], points / self.cfg.radius)
        return self._density(raw, points)

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        volume = self.volume()
        if output_normal:
            volume = torch.cat([volume, slopes(volume[:, :1])], dim=1)
        values = sample_volume(volume, points / self.cfg.radius)
        count = 1 + self.cfg.n_feature_dims
        out = {"density": self._density(values[..., :1], points), "features": values[..., 1:count]}
        if output_normal:
            # The activation is monotonic: the density falls where its argument does.
            normal = -F.normalize(values[..., count:], dim=-1)
            out |= {"normal": normal, "shading_normal": normal}
        return out


def slopes(volume: Tensor) -> Tensor:
    """Central differences of a volume [1, 1, Z, Y, X] along x, y, z: [1, 3, Z, Y, X]."""
    padded = F.pad(volume, (1,) * 6, mode="replicate")
    inner = slice(1, -1)
    dx = padded[..., inner, inner, 2:] - padded[..., inner, inner, :-2]
    dy = padded[..., inner, 2:, inner] - padded[..., inner, :-2, inner]
    dz = padded[..., 2:, inner, inner] - padded[..., :-2, inner, inner]
    return 0.5 * torch.cat([dx, dy, dz], dim=1)


GEOMETRIES = {
    "implicit-volume": ImplicitVolume,
    "volume-grid": VolumeGrid,
    "gps-pyramid-grid": PyramidGrid,
}
