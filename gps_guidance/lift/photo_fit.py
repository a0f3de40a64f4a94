"""A 3D field fitted to photos of known pose, the second half of the paper's baseline "COLMAP
followed by NeRF" (Sec. 4.5).

The field and renderer are those of ``gps-sds-pisa.yaml``; what guides them is each
pixel of the photos instead of a diffusion model. As in NeRF-W each photo has an appearance of its
own, in the simplest form: an affine map from the field's colours to the photo's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gps_guidance import metrics
from gps_guidance.lift import cameras
from gps_guidance.lift.field import PyramidGrid
from gps_guidance.lift.render import NeRFVolumeRenderer, opaque_loss, sparsity_loss
from gps_guidance.lift.shading import NoMaterial, Textured
from gps_guidance.lift.system import seed_step

SAME_COLOURS = 1.0  # weight of appearances that change nothing: or the field's colours could drift
SPARSITY, OPAQUE = 1e-3, 1e-3  # of the regularisers; opaqueness counts in the second half
OUTLIER = 0.1  # a colour difference from which on passers-by count linearly, not squared


@dataclass(frozen=True)
class PosedPhoto:
    """``pixels`` uint8 [H, W, 3], ``c2w`` [4, 4] in scene units (columns right, up, backward,
    position), and ``directions`` [H, W, 3] through the pixel centres in camera coordinates."""

    pixels: Tensor
    c2w: Tensor
    directions: Tensor

    @property
    def colours(self) -> Tensor:
        """[H, W, 3] in [0, 1]."""
        return self.pixels / 255

    def rays(self) -> tuple[Tensor, Tensor]:
        """Origins and unit directions [H, W, 3] in the scene frame."""
        origins, directions = cameras.get_rays(self.directions[None], self.c2w[None])
        return origins[0], directions[0]


class PhotoField(nn.Module):
    """Field, material, background and renderer; called with a batch of rays it renders them."""

    def __init__(self, radius: float = 1.4, floor: float | None = None) -> None:
        super().__init__()
        self.geometry = PyramidGrid(PyramidGrid.Config(radius=radius, floor=floor))
        self.material = NoMaterial(NoMaterial.Config())
        self.background = Textured(Textured.Config(height=128, width=64))
        nn.init.zeros_(self.background.texture)  # grey, where no photo looks
        shape = NeRFVolumeRenderer.Config(radius=radius, estimator="importance",
                                          num_samples_per_ray=24, num_samples_per_ray_importance=48)
        self.renderer = NeRFVolumeRenderer(shape, self.geometry, self.material, self.background)

    @property
    def device(self) -> torch.device:
        return self.background.texture.device

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """threestudio's batch (``rays_o``, ``rays_d`` [B, H, W, 3]) to its outputs."""
        out: dict[str, Tensor] = self.renderer(**batch)
        return out

    def render(self, origins: Tensor, directions: Tensor) -> dict[str, Tensor]:
        """The outputs of rays [H, W, 3]; without light, which this material does not need."""
        rays = {"rays_o": origins[None], "rays_d": directions[None]}
        return self(rays | {"light_positions": origins.new_zeros(1, 3)})


class Appearances(nn.Module):
    """An affine map of colours for each photo, at first the identity."""

    def __init__(self, photos: int) -> None:
        super().__init__()
        self.same: Tensor
        self.register_buffer("same", torch.eye(3, 4))
        self.maps = nn.Parameter(self.same.repeat(photos, 1, 1))

    def forward(self, colours: Tensor, photo: Tensor) -> Tensor:
        """Colours [N, 3] as they are in the photos of index [N]."""
        maps = self.maps[photo]
        return torch.einsum("nij,nj->ni", maps[:, :, :3], colours) + maps[:, :, 3]

    def change(self) -> Tensor:
        """Mean square of what the maps change."""
        return (self.maps - self.same).square().mean()


def fit(photos: Sequence[PosedPhoto], radius: float = 1.4, floor: float | None = None,
        steps: int = 500, rays: int = 2048, seed: int = 0, device: str | torch.device = "cpu"
        ) -> PhotoField:
    """A field within [-radius, radius]^3 that looks like the photos, by ``rays`` pixels a step.

    Below the height ``floor`` (scene units) it is empty: the ground is left to the background.
    ValueError without photos.
    """
    if not photos:
        raise ValueError("There are no photos to fit a field to; give at least one.")
    seed_step(seed, 0)
    field, looks = PhotoField(radius, floor).to(device), Appearances(len(photos)).to(device)
    colours = torch.cat([photo.pixels.reshape(-1, 3) for photo in photos]).to(device)
    directions = torch.cat([photo.directions.reshape(-1, 3) for photo in photos]).to(device)
    c2w = torch.stack([photo.c2w for photo in photos]).to(device)
    owner = torch.repeat_interleave(
        torch.arange(len(photos)), torch.tensor([photo.pixels[..., 0].numel() for photo in photos])
    ).to(device)
    optimizer = _optimizer(field, looks)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    bar = tqdm(range(steps), desc="fitting the field to the photos", unit="step")
    for step in bar:
        seed_step(seed, step + 1)
        field.train()
        field.geometry.update_step(0, step)
        chosen = torch.randint(len(colours), (rays,), device=device)
        photo = owner[chosen]
        ahead = torch.einsum("nij,nj->ni", c2w[photo, :3, :3], directions[chosen])
        out = field.render(c2w[photo, :3, 3][None], F.normalize(ahead, dim=-1)[None])
        seen = looks(out["comp_rgb"].reshape(-1, 3), photo)
        error = F.huber_loss(seen, colours[chosen] / 255, delta=OUTLIER)
        loss = error + SAME_COLOURS * looks.change() + SPARSITY * sparsity_loss(out["opacity"])
        if step >= steps // 2:
            loss = loss + OPAQUE * opaque_loss(out["opacity"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(error=f"{float(error.detach()):.4f}")
    return field.eval()


def _optimizer(field: PhotoField, looks: Appearances) -> torch.optim.Optimizer:
    """Adam with the learning rates of ``gps-sds-pisa.yaml``."""
    rates = (0.05, 0.05, 0.025, 0.0125)
    groups = [{"params": [level], "lr": rate}
              for level, rate in zip(field.geometry.levels, rates, strict=True)]
    groups += [{"params": [field.background.texture], "lr": 0.05},
               {"params": [looks.maps], "lr": 0.005}]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-8)


@torch.no_grad()
def held_out_psnr_db(field: PhotoField, photos: Sequence[PosedPhoto]) -> float:
    """Mean PSNR of renders of photos that did not train, each after its best affine colour map."""
    found = []
    for photo in photos:
        origins, directions = photo.rays()
        render = field.render(origins.to(field.device), directions.to(field.device))
        rgb = render["comp_rgb"][0].cpu()
        fitted = metrics.affine_colour_fit(rgb, photo.colours)
        found.append(metrics.psnr_db(fitted, photo.colours))
    return float(np.mean(found))
