"""Encodings and MLPs in pure torch, under the configuration names of threestudio / tiny-cuda-nn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIMES = (1, 2654435761, 805459861)  # Instant-NGP's spatial hash (Mueller et al., 2022, Eq. 4)


def activation(name: Any) -> Any:
    """The activation of a configuration name; ValueError for an unknown one."""
    known = {
        "none": lambda x: x, "relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
        "softplus": F.softplus, "exp": torch.exp, "silu": F.silu, "softsign": F.softsign,
        "trunc_exp": lambda x: _TruncatedExp.apply(x),
        "shifted_softplus": lambda x: F.softplus(x - 1.0),
        "shifted_exp": lambda x: torch.exp(x - 1.0),
        "shifted_trunc_exp": lambda x: _TruncatedExp.apply(x - 1.0),
        "scale_-11_01": lambda x: x * 0.5 + 0.5,
        "lin2srgb": lambda x: torch.where(
            x > 0.0031308, x.clamp_min(0.0031308).pow(1 / 2.4) * 1.055 - 0.055, 12.92 * x
        ).clamp(0, 1),
    }
    key = str(name if name is not None else "none").lower()
    if key not in known:
        raise ValueError(f"activation {name!r} is unknown; it must be one of {', '.join(known)}.")
    return known[key]


class _TruncatedExp(torch.autograd.Function):
    """exp whose gradient stops growing at x = 15, so that one sample cannot blow up a step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.exp(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * torch.exp(x.clamp(max=15))


class HashGrid(nn.Module):
    """Multiresolution hash encoding: points [N, 3] in [0, 1] -> [N, n_levels * features].

    Level l has floor(base_resolution * per_level_scale^l) cells a side; a level whose vertices fit
    in 2^log2_hashmap_size entries is stored densely.
    """

    def __init__(self, n_input_dims: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        if n_input_dims != 3:
            raise ValueError(f"HashGrid encodes 3D points, not {n_input_dims}D ones.")
        self.n_levels = int(config.get("n_levels", 16))
        self.n_features = int(config.get("n_features_per_level", 2))
        self.size = 2 ** int(config.get("log2_hashmap_size", 19))
        base = float(config.get("base_resolution", 16))
        scale = float(config.get("per_level_scale", 1.447269237440378))
        self.resolutions = [int(base * scale**level) for level in range(self.n_levels)]
        rows = [min(self.size, (r + 1) ** 3) for r in self.resolutions]
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(n, self.n_features).uniform_(-1e-4, 1e-4)) for n in rows
        )
        self.n_output_dims = self.n_levels * self.n_features

    def index(self, vertices: Tensor, level: int) -> Tensor:
        """Row of the table of integer vertices [..., 3]."""
        side = self.resolutions[level] + 1
        x, y, z = vertices.unbind(-1)
        if side**3 <= self.size:
            return x + side * (y + side * z)
        return (x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]) % self.size

    def forward(self, points: Tensor) -> Tensor:
        return torch.cat([self.level(points, k) for k in range(self.n_levels)], dim=-1)

    def level(self, points: Tensor, level: int) -> Tensor:
        """Trilinear interpolation of one level, [N, features]."""
        scaled = points.clamp(0, 1) * self.resolutions[level]
        low = scaled.detach().floor().clamp_max(self.resolutions[level] - 1)
        frac = scaled - low
        corner = low.long()
        out = torch.zeros(len(points), self.n_features, dtype=points.dtype, device=points.device)
        for k in range(8):
            bits = torch.tensor([k & 1, k >> 1 & 1, k >> 2 & 1], device=points.device)
            weight = torch.where(bits.bool(), frac, 1 - frac).prod(dim=-1, keepdim=True)
            out = out + weight * self.tables[level][self.index(corner + bits, level)]
        return out


class ProgressiveBandHashGrid(HashGrid):
    """A hash grid that opens one more level every ``update_steps`` after ``start_step``."""

    def __init__(self, n_input_dims: int, config: Mapping[str, Any]) -> None:
        super().__init__(n_input_dims, config)
        self.start_level = int(config["start_level"])
        self.start_step, self.update_steps = int(config["start_step"]), int(config["update_steps"])
        self.current_level = self.start_level

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        opened = max(global_step - self.start_step, 0) // self.update_steps
        self.current_level = min(self.start_level + opened, self.n_levels)

    def forward(self, points: Tensor) -> Tensor:
        none = points.new_zeros(len(points), 0)
        levels = [none, *(self.level(points, k) for k in range(self.current_level))]
        closed = (self.n_levels - self.current_level) * self.n_features
        return F.pad(torch.cat(levels, dim=-1), (0, closed))


class Frequency(nn.Module):
    """sin and cos of 2^k x, k = 0 .. n_frequencies - 1; with ``n_masking_step`` opened smoothly.

    Of 2^k pi x where the ``otype`` is tiny-cuda-nn's ``Frequency``.
    """

    def __init__(self, n_input_dims: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.n_frequencies = int(config["n_frequencies"])
        self.n_masking_step = int(config.get("n_masking_step", 0) or 0)
        self.base = math.pi if config["otype"] == "Frequency" else 1.0
        self.n_output_dims = n_input_dims * 2 * self.n_frequencies
        self.global_step = 0

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self.global_step = global_step

    def forward(self, points: Tensor) -> Tensor:
        parts = []
        for k in range(self.n_frequencies):
            mask = 1.0
            if self.n_masking_step > 0:
                opened = self.global_step / self.n_masking_step * self.n_frequencies - k
                mask = (1 - math.cos(math.pi * min(max(opened, 0.0), 1.0))) / 2
            phase = 2.0**k * self.base * points
            parts += [mask * torch.sin(phase), mask * torch.cos(phase)]
        return torch.cat(parts, dim=-1)


class SphericalHarmonics(nn.Module):
    """Real spherical harmonics of directions given in [0, 1]^3, up to ``degree`` 4 bands."""

    def __init__(self, n_input_dims: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.degree = int(config.get("degree", 3))
        if not 1 <= self.degree <= 4:
            raise ValueError(f"SphericalHarmonics degree is {self.degree}; it must be 1 to 4.")
        self.n_output_dims = self.degree**2

    def forward(self, directions: Tensor) -> Tensor:
        x, y, z = (directions * 2 - 1).unbind(-1)
        bands = [torch.full_like(x, 0.28209479)]
        if self.degree > 1:
            bands += [-0.48860251 * y, 0.48860251 * z, -0.48860251 * x]
        if self.degree > 2:
            bands += [1.09254843 * x * y, -1.09254843 * y * z, 0.94617470 * z * z - 0.31539157,
                      -1.09254843 * x * z, 0.54627422 * (x * x - y * y)]
        if self.degree > 3:
            bands += [0.59004359 * y * (y * y - 3 * x * x), 2.89061144 * x * y * z,
                      0.45704580 * y * (1 - 5 * z * z), 0.37317633 * z * (5 * z * z - 3),
                      0.45704580 * x * (1 - 5 * z * z), 1.44530572 * z * (x * x - y * y),
                      0.59004359 * x * (3 * y * y - x * x)]
        return torch.stack(bands, dim=-1)


class Encoding(nn.Module):
    """An encoding by its ``otype``, with the raw point in [-1, 1] in front if ``include_xyz``."""

    def __init__(self, n_input_dims: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        known: dict[str, Any] = {
            "HashGrid": HashGrid, "Grid": HashGrid,
            "ProgressiveBandHashGrid": ProgressiveBandHashGrid,
            "ProgressiveBandFrequency": Frequency, "VanillaFrequency": Frequency,
            "Frequency": Frequency, "SphericalHarmonics": SphericalHarmonics,
        }
        otype = config.get("otype")
        if otype not in known:
            raise ValueError(f"encoding otype is {otype!r}; it must be one of {', '.join(known)}.")
        self.encoding = known[otype](n_input_dims, config)
        self.include_xyz = bool(config.get("include_xyz", False))
        self.n_output_dims = self.encoding.n_output_dims + n_input_dims * self.include_xyz

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        if hasattr(self.encoding, "update_step"):
            self.encoding.update_step(epoch, global_step, on_load_weights)

    def forward(self, points: Tensor) -> Tensor:
        code = self.encoding(points)
        return torch.cat([points * 2 - 1, code], dim=-1) if self.include_xyz else code


class MLP(nn.Sequential):
    """Bias-free ReLU MLP; the fused kernels' names (FullyFusedMLP, CutlassMLP) give the same.

    In 32 bits whatever the trainer's precision, as threestudio's VanillaMLP: densities are large.
    """

    def __init__(self, n_input_dims: int, n_output_dims: int, config: Mapping[str, Any]) -> None:
        otypes = ("VanillaMLP", "FullyFusedMLP", "CutlassMLP")
        if config.get("otype") not in otypes:
            raise ValueError(f"mlp_network_config otype is {config.get('otype')!r}; it must be one "
                             f"of {', '.join(otypes)}.")
        width, hidden = int(config["n_neurons"]), int(config["n_hidden_layers"])
        layers: list[nn.Module] = [nn.Linear(n_input_dims, width, bias=False), nn.ReLU()]
        for _ in range(hidden - 1):
            layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, n_output_dims, bias=False))
        self.output_activation = activation(config.get("output_activation"))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.output_activation(super().forward(x.to(next(self.parameters()).dtype)))
