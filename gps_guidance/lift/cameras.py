"""Cameras around the landmark: sampling, rays, bearings.

Frame: right-handed, x east, y north, z up, origin at the landmark's middle. ``c2w`` columns are
right, up, backward, position (OpenGL). Azimuth runs counter-clockwise from +x, elevation is
negative below the middle. ``random-camera-datamodule`` has threestudio's keys, defaults and batch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from gps_guidance import geo

LIGHTS = ("dreamfusion", "magic3d")
NEAR, FAR = 0.01, 100.0  # threestudio's clip planes, for mvp_mtx alone


# --- geometry --------------------------------------------------------------------------------


def position(azimuth_deg: Tensor, elevation_deg: Tensor, distance: Tensor) -> Tensor:
    """Camera positions [..., 3] from spherical coordinates [...] around the origin."""
    a, e = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    unit = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], dim=-1)
    return distance[..., None] * unit


def look_at(positions: Tensor, centers: Tensor, ups: Tensor) -> Tensor:
    """``c2w`` [B, 4, 4] of cameras at ``positions`` [B, 3] that look at ``centers`` [B, 3]."""
    forward = F.normalize(centers - positions, dim=-1)
    right = F.normalize(torch.linalg.cross(forward, ups), dim=-1)
    up = F.normalize(torch.linalg.cross(right, forward), dim=-1)
    c2w = torch.zeros(len(positions), 4, 4, dtype=positions.dtype, device=positions.device)
    c2w[:, :3] = torch.stack([right, up, -forward, positions], dim=-1)
    c2w[:, 3, 3] = 1.0
    return c2w


def c2w_from_bearing(bearing_deg: Tensor, elevation_deg: Tensor, distance: Tensor) -> Tensor:
    """``c2w`` [B, 4, 4] of cameras that see the origin from a bearing (clockwise from north)."""
    at = position(geo.azimuth_from_bearing(bearing_deg), elevation_deg, distance)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=at.dtype, device=at.device).expand_as(at)
    return look_at(at, torch.zeros_like(at), up)


def bearing_from_c2w(c2w: Tensor, north_offset_deg: float = 0.0) -> Tensor:
    """Bearing [B] in [0, 360) of each camera [B, 4, 4] as seen from the origin.

    Taken from the camera's true position; ``north_offset_deg`` is added.
    """
    bearing = torch.rad2deg(torch.atan2(c2w[:, 0, 3], c2w[:, 1, 3]))
    return torch.remainder(bearing + north_offset_deg, 360.0)


def ray_directions(height: int, width: int, fovy: Tensor) -> Tensor:
    """Directions [B, H, W, 3] in camera coordinates through pixel centres, of z-depth one.

    ``fovy`` [B] is the vertical field of view in radians.
    """
    v, u = torch.meshgrid(
        torch.arange(height, device=fovy.device) + 0.5,
        torch.arange(width, device=fovy.device) + 0.5, indexing="ij",
    )
    focal = (0.5 * height / torch.tan(0.5 * fovy))[:, None, None]
    x, y = (u - 0.5 * width) / focal, (0.5 * height - v) / focal
    return torch.stack([x, y, -torch.ones_like(x)], dim=-1)


def get_rays(directions: Tensor, c2w: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """Origins and directions [B, H, W, 3] in the scene frame."""
    rays_d = torch.einsum("bhwi,bji->bhwj", directions, c2w[:, :3, :3])
    rays_o = c2w[:, None, None, :3, 3].expand_as(rays_d)
    return rays_o, F.normalize(rays_d, dim=-1) if normalize else rays_d


def projection_matrix(fovy: Tensor, aspect: float) -> Tensor:
    """Perspective matrix [B, 4, 4] with y pointing down in clip space, as nvdiffrast wants it."""
    proj = torch.zeros(len(fovy), 4, 4, dtype=fovy.dtype, device=fovy.device)
    proj[:, 0, 0] = 1.0 / (torch.tan(0.5 * fovy) * aspect)
    proj[:, 1, 1] = -1.0 / torch.tan(0.5 * fovy)
    proj[:, 2, 2] = -(FAR + NEAR) / (FAR - NEAR)
    proj[:, 2, 3] = -2.0 * FAR * NEAR / (FAR - NEAR)
    proj[:, 3, 2] = -1.0
    return proj


def camera_batch(c2w: Tensor, fovy: Tensor, height: int, width: int,
                 light_positions: Tensor | None = None, normalize: bool = True) -> dict[str, Any]:
    """threestudio's batch for explicit cameras: ``c2w`` [B, 4, 4], ``fovy`` [B] in radians.

    The light stands at the camera unless given.
    """
    at = c2w[:, :3, 3]
    distances = at.norm(dim=-1)
    rays_o, rays_d = get_rays(ray_directions(height, width, fovy), c2w, normalize)
    proj = projection_matrix(fovy, width / height)
    return {
        "rays_o": rays_o,
        "rays_d": rays_d,
        "mvp_mtx": proj @ torch.linalg.inv(c2w),
        "proj_mtx": proj,
        "c2w": c2w,
        "camera_positions": at,
        "light_positions": at if light_positions is None else light_positions,
        "elevation": torch.rad2deg(torch.asin((at[:, 2] / distances).clamp(-1, 1))),
        "azimuth": torch.rad2deg(torch.atan2(at[:, 1], at[:, 0])),
        "camera_distances": distances,
        "fovy": fovy,
        "height": height,
        "width": width,
    }


# --- sampling --------------------------------------------------------------------------------


@dataclass
class RandomCameraConfig:
    """threestudio's keys and defaults. Angles are in degrees; ``width``, ``height`` and
    ``batch_size`` may be lists that change at ``resolution_milestones`` (steps)."""

    height: Any = 64
    width: Any = 64
    batch_size: Any = 1
    resolution_milestones: list[int] = field(default_factory=list)
    eval_height: int = 512
    eval_width: int = 512
    eval_batch_size: int = 1
    n_val_views: int = 1
    n_test_views: int = 120
    elevation_range: Any = (-10, 90)
    azimuth_range: Any = (-180, 180)
    camera_distance_range: Any = (1, 1.5)
    fovy_range: Any = (40, 70)
    camera_perturb: float = 0.1
    center_perturb: float = 0.2
    up_perturb: float = 0.02
    light_position_perturb: float = 1.0
    light_distance_range: Any = (0.8, 1.5)
    eval_elevation_deg: float = 15.0
    eval_camera_distance: float = 1.5
    eval_fovy_deg: float = 70.0
    light_sample_strategy: str = "dreamfusion"
    batch_uniform_azimuth: bool = True
    progressive_until: int = 0
    rays_d_normalize: bool = True

    def __post_init__(self) -> None:
        if self.light_sample_strategy not in LIGHTS:
            raise ValueError(f"data.light_sample_strategy is {self.light_sample_strategy!r}; it "
                             f"must be one of {', '.join(LIGHTS)}.")
        stages = {len(_listed(v)) for v in (self.height, self.width, self.batch_size)}
        if len(stages) > 1:
            raise ValueError("data.height, data.width and data.batch_size must be numbers or lists "
                             "of one length.")
        if stages != {1} and stages != {len(self.resolution_milestones) + 1}:
            raise ValueError(f"data.resolution_milestones has {len(self.resolution_milestones)} "
                             f"steps; {stages.pop()} sizes need one less than that many.")

    def stage(self, global_step: int) -> tuple[int, int, int]:
        """(height, width, batch size) at this step."""
        sizes = [_listed(v) for v in (self.height, self.width, self.batch_size)]
        index = 0
        if len(sizes[0]) > 1:
            index = bisect.bisect_right(self.resolution_milestones, global_step)
        height, width, batch = (int(size[index]) for size in sizes)
        return height, width, batch


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, int) else list(value)


def _uniform(low_high: Any, count: int) -> Tensor:
    low, high = low_high
    return torch.rand(count) * (high - low) + low


def _progress(low_high: Any, start: float, ratio: float) -> tuple[float, float]:
    low, high = low_high
    return (1 - ratio) * start + ratio * low, (1 - ratio) * start + ratio * high


def _elevations(low_high: Any, count: int) -> Tensor:
    """Half of the batches uniform in the angle, half uniform on the sphere (threestudio's mix)."""
    if torch.rand(()) < 0.5:
        return _uniform(low_high, count)
    low, high = (math.sin(math.radians(x)) for x in low_high)
    return torch.rad2deg(torch.asin(_uniform((low, high), count)))


def _lights(cfg: RandomCameraConfig, cameras: Tensor) -> Tensor:
    """Point lights [B, 3]: around the camera's direction, or above it for ``magic3d``."""
    count = len(cameras)
    distances = _uniform(cfg.light_distance_range, count)[:, None]
    if cfg.light_sample_strategy == "dreamfusion":
        jitter = torch.randn(count, 3) * cfg.light_position_perturb
        return F.normalize(cameras + jitter, dim=-1) * distances
    z = F.normalize(cameras, dim=-1)
    x = F.normalize(torch.stack([z[:, 1], -z[:, 0], torch.zeros(count)], dim=-1), dim=-1)
    y = F.normalize(torch.linalg.cross(z, x), dim=-1)
    azimuth = _uniform((-math.pi, math.pi), count)
    elevation = _uniform((math.pi / 6, math.pi / 2), count)
    local = torch.stack(
        [elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=-1
    )
    return torch.einsum("bij,bj->bi", torch.stack([x, y, z], dim=-1), local * distances)


def sample_cameras(cfg: RandomCameraConfig, global_step: int) -> dict[str, Any]:
    """A training batch of random cameras, drawn from torch's global generator.

    While ``progressive_until`` lasts, elevation and azimuth open up from the evaluation view; as
    in threestudio that is also so at step 0 where it is 0.
    """
    height, width, count = cfg.stage(global_step)
    ratio = min(1.0, global_step / (cfg.progressive_until + 1))
    elevation_deg = _elevations(
        _progress(cfg.elevation_range, cfg.eval_elevation_deg, ratio), count
    )
    low, high = _progress(cfg.azimuth_range, 0.0, ratio)
    if cfg.batch_uniform_azimuth:
        turn = (torch.rand(count) + torch.arange(count)) / count
    else:
        turn = torch.rand(count)
    azimuth_deg = turn * (high - low) + low
    distances = _uniform(cfg.camera_distance_range, count)
    at = position(azimuth_deg, elevation_deg, distances)
    at = at + (torch.rand(count, 3) * 2 - 1) * cfg.camera_perturb
    center = torch.randn(count, 3) * cfg.center_perturb
    up = torch.tensor([0.0, 0.0, 1.0]) + torch.randn(count, 3) * cfg.up_perturb
    fovy = torch.deg2rad(_uniform(cfg.fovy_range, count))
    batch = camera_batch(
        look_at(at, center, up), fovy, height, width, _lights(cfg, at), cfg.rays_d_normalize
    )
    # threestudio reports the request, not the perturbed camera; bearings come from c2w
    batch |= {"elevation": elevation_deg, "azimuth": azimuth_deg, "camera_distances": distances}
    return batch


def eval_cameras(cfg: RandomCameraConfig, split: str) -> list[dict[str, Any]]:
    """Views of one turn, one batch each with its ``index`` [1].

    For "val" the last view is not the first again; for "test" it is, as in threestudio.
    """
    views = cfg.n_val_views if split == "val" else cfg.n_test_views
    last = 360.0 * (views - 1) / views if split == "val" else 360.0
    azimuth = torch.linspace(0.0, last, views)
    at = position(azimuth, torch.full_like(azimuth, cfg.eval_elevation_deg),
                  torch.full_like(azimuth, cfg.eval_camera_distance))
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(at)
    c2w = look_at(at, torch.zeros_like(at), up)
    fovy = torch.deg2rad(torch.full_like(azimuth, cfg.eval_fovy_deg))
    batches = []
    for k in range(views):
        one = slice(k, k + 1)
        batch = camera_batch(c2w[one], fovy[one], cfg.eval_height, cfg.eval_width,
                             normalize=cfg.rays_d_normalize)
        batches.append(batch | {"index": torch.tensor([k]), "azimuth": azimuth[one]})
    return batches


class _Steps(IterableDataset):
    """Endless empty items: the system draws the cameras itself, after seeding the step."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {}


class _Views(Dataset):
    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]


class RandomCameraDataModule(pl.LightningDataModule):
    """``random-camera-datamodule``."""

    Config = RandomCameraConfig

    def __init__(self, cfg: RandomCameraConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def sample(self, epoch: int, global_step: int) -> dict[str, Any]:
        """The cameras of a training step, from torch's global generator."""
        return sample_cameras(self.cfg, global_step)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Steps(), batch_size=None)

    def _views(self, split: str) -> DataLoader:
        return DataLoader(_Views(eval_cameras(self.cfg, split)), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return self._views("val")

    def test_dataloader(self) -> DataLoader:
        return self._views("test")

    predict_dataloader = test_dataloader


DATAMODULES = {"random-camera-datamodule": RandomCameraDataModule}
