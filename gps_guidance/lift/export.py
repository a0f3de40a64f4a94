"""What leaves a 3D run as files: images, the turntable video, the mesh. Every write is atomic.

Frame of every mesh: x east, y north, z up, origin at the landmark's centre, one unit = one unit of
the field. glTF itself says y-up; the file keeps our z-up coordinates and says so in its scene's
extras, together with the landmark's centre.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gps_guidance.lift.cameras import bearing_from_c2w

UInt8 = NDArray[np.uint8]
CHUNK = 1 << 17  # points per field query


@contextlib.contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """A path to write to in the same folder; it becomes ``path`` at once when the block ends.

    If the block raises (disk full, Ctrl-C), the unfinished file is removed and ``path`` is as
    before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield stage
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)


def to_uint8(image: Tensor | NDArray[Any]) -> UInt8:
    """Image [H, W, 3] or grayscale [H, W] or [H, W, 1] in [0, 1] -> [H, W, 3] uint8, rounded."""
    array = image.detach().float().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8:
        array = (array.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return np.broadcast_to(array, (*array.shape[:2], 3)) if array.shape[2] == 1 else array


def side_by_side(images: Iterable[Tensor | NDArray[Any]]) -> UInt8:
    """Images of one height joined left to right -> [H, sum of W, 3] uint8."""
    return np.concatenate([to_uint8(image) for image in images], axis=1)


def image_grid(images: list[UInt8], columns: int) -> UInt8:
    """Equal-sized images [H, W, 3] in rows of ``columns``; unused cells are white."""
    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    grid = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * height, (i % columns) * width
        grid[top : top + height, left : left + width] = image
    return grid


def write_png(path: str | Path, image: Tensor | NDArray[Any]) -> Path:
    """Write an image ([0, 1] floats or uint8) as PNG."""
    with staged(path) as stage:
        Image.fromarray(to_uint8(image)).save(stage, format="PNG")
    return Path(path)


def read_png(path: str | Path) -> UInt8:
    """Read an RGB image [H, W, 3] uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_video(frames: Iterable[Tensor | NDArray[Any]], path: str | Path, fps: int = 30) -> Path:
    """Write frames [H, W, 3] as an H.264 MP4 that browsers play (odd sizes gain one edge pixel).

    ValueError if there is no frame.
    """
    import imageio.v2 as imageio

    with staged(path) as stage:
        count = 0
        writer: Any = imageio.get_writer(
            stage, format="FFMPEG", mode="I", fps=fps, codec="libx264", quality=8,
            pixelformat="yuv420p", macro_block_size=1,
        )
        with writer:
            for frame in frames:
                image = to_uint8(frame)
                odd = ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0))
                writer.append_data(np.pad(image, odd, mode="edge"))
                count += 1
        if count == 0:
            raise ValueError(f"{path}: there is no frame to write.")
    return Path(path)


@dataclass
class Placement:
    """Where a field stands on the ground; written into the mesh's metadata.

    ``north_offset_deg`` is the guidance's: the bearing given to a camera on the field's +y axis.
    """

    landmark: str = ""
    center: tuple[float, float] | None = None  # (lat, lon) in degrees
    north_offset_deg: float = 0.0

    def metadata(self) -> dict[str, Any]:
        """JSON for the GLB scene's extras."""
        about: dict[str, Any] = {"up": "+z", "north": "+y", "east": "+x", "landmark": self.landmark}
        if self.center is not None:
            about["center_lat_deg"], about["center_lon_deg"] = map(float, self.center)
        return about


def rotation_to_true_north(north_offset_deg: float) -> NDArray[np.float64]:
    """Rotation [3, 3] about z from the field's axes to x = true east, y = true north.

    A camera on the field's +y axis has some bearing b; after the rotation it stands at b.
    """
    c2w = torch.eye(4, dtype=torch.float64)[None]
    c2w[0, 1, 3] = 1.0
    bearing = math.radians(float(bearing_from_c2w(c2w, north_offset_deg)[0]))
    cos, sin = math.cos(bearing), math.sin(bearing)
    return np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])


@torch.no_grad()
def sample_density(density: Callable[[Tensor], Tensor], radius: float, resolution: int,
                   device: torch.device) -> NDArray[np.float32]:
    """Density [R, R, R] at the nodes of a grid over [-radius, radius]^3, axes x, y, z."""
    axis = torch.linspace(-radius, radius, resolution)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
    parts = [density(chunk.to(device)).float().cpu().reshape(-1) for chunk in points.split(CHUNK)]
    return torch.cat(parts).reshape(resolution, resolution, resolution).numpy()


def iso_level(volume: NDArray[np.float32], threshold: float | str) -> float:
    """The level of the surface: a number, or "auto" for the mean of the positive densities."""
    positive = volume[volume > 1e-5] if threshold == "auto" else np.array([float(threshold)])
    level = float(positive.mean()) if positive.size else 0.0
    if not volume.min() < level < volume.max():
        raise ValueError(
            f"The field has no surface at density {level:g}: it spans {volume.min():.3g} to "
            f"{volume.max():.3g}. Set system.geometry.isosurface_threshold between them (or to "
            "auto), or train longer."
        )
    return level


def extract_mesh(
    geometry: Any,
    material: Any = None,
    resolution: int | None = None,
    threshold: float | str | None = None,
    placement: Placement | None = None,
) -> Any:
    """The surface of a field by marching cubes -> ``trimesh.Trimesh`` with vertex colours.

    ``resolution`` nodes an axis and density ``threshold`` default to the geometry's own settings.
    The mesh is closed at the border of the box, in the frame of this module, with the
    ``placement`` in ``mesh.metadata``. ValueError if the field has no surface at the threshold.
    """
    import trimesh
    from skimage.measure import marching_cubes

    cfg, placement = geometry.cfg, placement or Placement()
    resolution = resolution or int(cfg.isosurface_resolution)
    threshold = cfg.isosurface_threshold if threshold is None else threshold
    device = next(iter([*geometry.parameters(), *geometry.buffers()])).device
    volume = sample_density(geometry.forward_density, cfg.radius, resolution, device)
    level = iso_level(volume, threshold)
    vertices, faces, _, _ = marching_cubes(np.pad(volume, 1, constant_values=0.0), level)
    nodes = (vertices - 1.0).clip(0.0, resolution - 1.0)
    points = -cfg.radius + nodes * (2.0 * cfg.radius / (resolution - 1))
    mesh = trimesh.Trimesh(points, faces[:, ::-1], process=False)
    if mesh.volume < 0:
        mesh.invert()
    if getattr(cfg, "isosurface_remove_outliers", True):
        mesh = remove_outliers(mesh, getattr(cfg, "isosurface_outlier_n_faces_threshold", 0.01))
    colors = vertex_colors(geometry, material, np.asarray(mesh.vertices), device)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colors)
    mesh.vertices = mesh.vertices @ rotation_to_true_north(placement.north_offset_deg).T
    mesh.metadata.update(placement.metadata())
    return mesh


def remove_outliers(mesh: Any, faces_threshold: int | float) -> Any:
    """Drop connected parts with fewer faces than a number, or than a fraction of the largest."""
    import trimesh
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    pairs = np.asarray(mesh.face_adjacency)
    count = len(mesh.faces)
    links = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, part_of_face = connected_components(links, directed=False)
    sizes = np.bincount(part_of_face)
    fewest = faces_threshold
    if isinstance(faces_threshold, float):
        fewest = faces_threshold * sizes.max()
    keep = (sizes >= min(fewest, sizes.max()))[part_of_face]
    kept: trimesh.Trimesh = mesh.submesh([np.flatnonzero(keep)], append=True)
    return kept


@torch.no_grad()
def vertex_colors(geometry: Any, material: Any, vertices: NDArray[Any],
                  device: torch.device) -> UInt8:
    """Albedo at the vertices -> RGBA [V, 4] uint8."""
    colors = []
    for chunk in torch.as_tensor(vertices, dtype=torch.float32).split(CHUNK):
        features = geometry(chunk.to(device), output_normal=False)["features"]
        rgb = features[..., :3].sigmoid()
        if material is not None:
            rgb = material.export(features=features)["albedo"]
        colors.append(rgb.float().cpu())
    rgb = to_uint8(torch.cat(colors)[None])[0]
    return np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], axis=1)


def write_mesh(mesh: Any, path: str | Path) -> Path:
    """Write a mesh as ``.glb`` or ``.obj``; its metadata goes into the GLB scene's extras.

    An OBJ has no such place: the metadata are comments in its header.
    """
    import trimesh

    path = Path(path)
    if path.suffix == ".glb":
        scene = trimesh.Scene([mesh])
        scene.metadata.update(mesh.metadata)
        data = scene.export(file_type="glb")
    elif path.suffix == ".obj":
        header = ", ".join(f"{key}: {value}" for key, value in mesh.metadata.items())
        data = mesh.export(file_type="obj", header=header).encode()
    else:
        raise ValueError(f"{path.name}: a mesh is written as .glb or .obj.")
    with staged(path) as stage:
        stage.write_bytes(data)
    return path


class MeshExporter:
    """``mesh-exporter``: writes the surface when the command says ``--export``."""

    @dataclass
    class Config:
        """threestudio's keys. The portable engine writes vertex colours, never texture images:
        the keys of unwrapping and textures are accepted and unused."""

        save_video: bool = False
        fmt: str = "obj-mtl"
        save_name: str = "model"
        save_normal: bool = False
        save_uv: bool = True
        save_texture: bool = True
        texture_size: int = 1024
        texture_format: str = "jpg"
        xatlas_chart_options: dict[str, Any] = field(default_factory=dict)
        xatlas_pack_options: dict[str, Any] = field(default_factory=dict)
        context_type: str = "gl"

        def __post_init__(self) -> None:
            if self.fmt not in ("obj", "obj-mtl", "glb"):
                raise ValueError(f"system.exporter.fmt is {self.fmt!r}; it must be 'obj', "
                                 "'obj-mtl' or 'glb'.")

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, geometry: Any, material: Any, placement: Placement,
                 folder: str | Path) -> Path:
        """Write ``folder/save_name.obj`` or ``.glb`` and return its path."""
        suffix = ".glb" if self.cfg.fmt == "glb" else ".obj"
        mesh = extract_mesh(geometry, material, placement=placement)
        return write_mesh(mesh, Path(folder) / f"{self.cfg.save_name}{suffix}")


EXPORTERS = {"mesh-exporter": MeshExporter}
