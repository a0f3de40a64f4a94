"""Materials (features to colour) and backgrounds (directions to colour), threestudio's names."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gps_guidance.lift.networks import MLP, Encoding, activation


class NoMaterial(nn.Module):
    """``no-material``: the features are the colour, whatever the light."""

    @dataclass
    class Config:
        n_output_dims: int = 3
        color_activation: str = "sigmoid"
        input_feature_dims: int | None = None
        mlp_network_config: dict[str, Any] | None = None
        requires_normal: bool = False

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.requires_normal = cfg.requires_normal
        self.activation = activation(cfg.color_activation)
        self.network: nn.Module | None = None
        if cfg.input_feature_dims is not None and cfg.mlp_network_config is not None:
            self.network = MLP(cfg.input_feature_dims, cfg.n_output_dims, cfg.mlp_network_config)

    def forward(self, features: Tensor, **geometry: Any) -> Tensor:
        """Features [..., F] -> colour [..., n_output_dims]."""
        if self.network is not None:
            features = self.network(features)
        if features.shape[-1] != self.cfg.n_output_dims:
            raise ValueError(f"material.n_output_dims is {self.cfg.n_output_dims}, but the "
                             f"geometry gives {features.shape[-1]} features: make them equal.")
        return self.activation(features)

    def export(self, features: Tensor, **geometry: Any) -> dict[str, Tensor]:
        return {"albedo": self(features)[..., :3].clamp(0, 1)}


class DiffuseWithPointLight(nn.Module):
    """``diffuse-with-point-light-material``: Lambertian shading after ``ambient_only_steps``.

    In training one kind for the whole batch: albedo with probability 1 - ``diffuse_prob``, else
    without texture with ``textureless_prob``, else shaded albedo.
    """

    @dataclass
    class Config:
        ambient_light_color: Any = (0.1, 0.1, 0.1)
        diffuse_light_color: Any = (0.9, 0.9, 0.9)
        ambient_only_steps: int = 1000
        diffuse_prob: float = 0.75
        textureless_prob: float = 0.5
        albedo_activation: str = "sigmoid"
        soft_shading: bool = False
        ambient_only_on_test: bool = False

    requires_normal = True
    ambient: Tensor
    diffuse: Tensor

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.activation = activation(cfg.albedo_activation)
        self.register_buffer("ambient", torch.tensor(list(cfg.ambient_light_color)))
        self.register_buffer("diffuse", torch.tensor(list(cfg.diffuse_light_color)))
        self.ambient_only = False

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self.ambient_only = global_step < self.cfg.ambient_only_steps

    def _shading(self) -> str:
        if not self.training:
            flat = self.ambient_only or self.cfg.ambient_only_on_test
            return "albedo" if flat else "diffuse"
        if self.ambient_only or random.random() > self.cfg.diffuse_prob:
            return "albedo"
        return "textureless" if random.random() < self.cfg.textureless_prob else "diffuse"

    def forward(self, features: Tensor, positions: Tensor, shading_normal: Tensor,
                light_positions: Tensor, ambient_ratio: float | None = None,
                shading: str | None = None, **geometry: Any) -> Tensor:
        """Features [..., F] at positions [..., 3] with normals and lights [..., 3] -> RGB."""
        albedo = self.activation(features[..., :3])
        ambient, diffuse = self.ambient, self.diffuse
        if ambient_ratio is None and self.training and self.cfg.soft_shading:
            ambient_ratio = 1.0 - random.random()
        if ambient_ratio is not None:
            ambient = torch.full_like(ambient, ambient_ratio)
            diffuse = 1.0 - ambient
        shading = shading or self._shading()
        if shading == "albedo":
            return albedo
        toward = F.normalize(light_positions - positions, dim=-1)
        light = (shading_normal * toward).sum(-1, keepdim=True).clamp_min(0) * diffuse + ambient
        if shading == "textureless":
            return light.expand_as(albedo)
        if shading == "diffuse":
            return albedo.clamp(0, 1) * light
        raise ValueError(f"shading is {shading!r}; it must be albedo, textureless or diffuse.")

    def export(self, features: Tensor, **geometry: Any) -> dict[str, Tensor]:
        return {"albedo": self.activation(features[..., :3]).clamp(0, 1)}


def _random_colour(colour: Tensor, training: bool, enabled: bool, prob: float) -> Tensor:
    """``colour`` [B, ..., C], or with some probability one random colour for each image."""
    if not (training and enabled) or random.random() >= prob:
        return colour
    shape = (colour.shape[0], *(1,) * (colour.ndim - 2), colour.shape[-1])
    return torch.rand(shape).to(colour).expand_as(colour)


class SolidColor(nn.Module):
    """``solid-color-background``."""

    @dataclass
    class Config:
        n_output_dims: int = 3
        color: Any = (1.0, 1.0, 1.0)
        learned: bool = False
        random_aug: bool = False
        random_aug_prob: float = 0.5

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        colour = torch.tensor([float(c) for c in cfg.color])
        self.env_color = nn.Parameter(colour, requires_grad=cfg.learned)

    def forward(self, dirs: Tensor) -> Tensor:
        """Unit directions [B, ..., 3] -> colours [B, ..., n_output_dims]."""
        colour = self.env_color.expand(*dirs.shape[:-1], self.cfg.n_output_dims)
        return _random_colour(colour, self.training, self.cfg.random_aug, self.cfg.random_aug_prob)


class Textured(nn.Module):
    """``textured-background``: a learned environment map, equirectangular.

    As in threestudio the texture's width runs from the zenith down and its height around.
    """

    @dataclass
    class Config:
        n_output_dims: int = 3
        height: int = 64
        width: int = 64
        color_activation: str = "sigmoid"

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.activation = activation(cfg.color_activation)
        self.texture = nn.Parameter(torch.randn(1, cfg.n_output_dims, cfg.height, cfg.width))

    def forward(self, dirs: Tensor) -> Tensor:
        """Unit directions [B, ..., 3] -> colours [B, ..., n_output_dims]."""
        x, y, z = dirs.reshape(-1, 3).unbind(-1)
        down = torch.atan2((x * x + y * y).sqrt(), z) / torch.pi
        around = torch.atan2(y, x) / (2 * torch.pi) + 0.5
        uv = torch.stack([down, around], dim=-1) * 2 - 1
        colour = F.grid_sample(self.texture, uv[None, :, None], mode="bilinear",
                               padding_mode="reflection", align_corners=False)
        colour = colour.reshape(self.cfg.n_output_dims, -1).T
        return self.activation(colour.reshape(*dirs.shape[:-1], self.cfg.n_output_dims))


class NeuralEnvironmentMap(nn.Module):
    """``neural-environment-map-background``: an MLP on encoded directions."""

    @dataclass
    class Config:
        n_output_dims: int = 3
        color_activation: str = "sigmoid"
        dir_encoding_config: dict[str, Any] = field(
            default_factory=lambda: {"otype": "SphericalHarmonics", "degree": 3}
        )
        mlp_network_config: dict[str, Any] = field(
            default_factory=lambda: {
                "otype": "VanillaMLP", "activation": "ReLU", "n_neurons": 16, "n_hidden_layers": 2
            }
        )
        random_aug: bool = False
        random_aug_prob: float = 0.5
        eval_color: Any = None

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.activation = activation(cfg.color_activation)
        self.encoding = Encoding(3, cfg.dir_encoding_config)
        self.network = MLP(self.encoding.n_output_dims, cfg.n_output_dims, cfg.mlp_network_config)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self.encoding.update_step(epoch, global_step, on_load_weights)

    def forward(self, dirs: Tensor) -> Tensor:
        """Unit directions [B, ..., 3] -> colours [B, ..., n_output_dims]."""
        shape = (*dirs.shape[:-1], self.cfg.n_output_dims)
        if not self.training and self.cfg.eval_color is not None:
            return torch.tensor(list(self.cfg.eval_color)).to(dirs).expand(shape)
        code = self.encoding((dirs.reshape(-1, 3) + 1) / 2)
        colour = self.activation(self.network(code)).reshape(shape)
        return _random_colour(colour, self.training, self.cfg.random_aug, self.cfg.random_aug_prob)


MATERIALS = {"no-material": NoMaterial, "diffuse-with-point-light-material": DiffuseWithPointLight}
BACKGROUNDS = {
    "solid-color-background": SolidColor,
    "textured-background": Textured,
    "neural-environment-map-background": NeuralEnvironmentMap,
}
