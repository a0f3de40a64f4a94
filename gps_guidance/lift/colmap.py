"""Where tourists' photos were taken, from their pixels: COLMAP, the first half of the paper's
baseline "COLMAP followed by NeRF" (Sec. 4.5). No torch.

COLMAP gets upright copies without metadata and compares each photo with each other one. Its frame
is arbitrary: GPS is used once, at the end, to bring the finished model to metres around the
landmark, x east, y north, z up, the ground at z = 0, and to see whether it fits there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from gps_guidance import geo
from gps_guidance.photos.exif import position_of
from gps_guidance.photos.images import EXTENSIONS, open_image, upright
from gps_guidance.photos.manifest import Rejected, is_dataset, load_manifest

log = logging.getLogger(__name__)

EYE_M = 1.6  # of a photographer above the ground
GPS_ERROR_M = 10.0  # a position further off does not count when the model is brought to metres
MAX_SIZE = 1600  # pixels of a photo's longer side
ENOUGH = 0.5  # of the photos in one model, and of its cameras near their GPS; below that: failed
OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0])


@dataclass(frozen=True)
class Photo:
    """A photo file, and (lat, lon) in degrees if it has a position."""

    path: Path
    position: geo.LatLon | None


@dataclass(frozen=True)
class Camera:
    """A registered photo: its index among those given, ``c2w`` [4, 4] in metres (columns right,
    up, backward, position), and COLMAP's lens with its distortion."""

    photo: int
    c2w: geo.Array
    lens: Any

    def directions(self, height: int, width: int) -> geo.Array:
        """Directions [height, width, 3] in camera coordinates, of z-depth one, through the pixel
        centres of the photo at this size."""
        lens = type(self.lens)(self.lens.todict())
        lens.rescale(width, height)
        v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
        at = lens.cam_from_img(np.stack([u, v], axis=-1).reshape(-1, 2))
        ahead = np.concatenate([at, np.ones_like(at[:, :1])], axis=1)
        return (ahead @ OPENCV_TO_OPENGL).reshape(height, width, 3)


@dataclass(frozen=True)
class Registration:
    """What COLMAP made of ``photos`` photos.

    ``models`` has the number of photos in each model that it found, largest first; the rest is of
    the largest. ``failure`` says why the place is not reconstructed; then there are no ``cameras``
    and ``points_m`` [P, 3]. ``gps_residual_m`` is the median distance of the cameras from their GPS
    on the ground.
    """

    photos: int
    models: tuple[int, ...] = ()
    failure: str | None = None
    cameras: list[Camera] = field(default_factory=list)
    points_m: geo.Array = field(default_factory=lambda: np.zeros((0, 3)))
    reprojection_error_px: float | None = None
    gps_residual_m: float | None = None


def find_photos(source: str | Path) -> list[Photo]:
    """The photos of a dataset folder, or of a folder of image files with GPS in their metadata.

    Photos without a position take part, except in bringing the model to metres. ValueError if there
    are none.
    """
    source = Path(source)
    if is_dataset(source):
        rows = load_manifest(source).rows.select(["file", "lat", "lon"]).to_pylist()
        found = [Photo(source / row["file"], (row["lat"], row["lon"])) for row in rows]
    else:
        found = [Photo(path, _position(path)) for path in sorted(source.rglob("*"))
                 if path.suffix.lower() in EXTENSIONS]
    if not found:
        raise ValueError(f"{source} holds no photos: give a folder of geotagged image files, or a "
                         "dataset of `gps-guidance ingest`.")
    return found


def _position(path: Path) -> geo.LatLon | None:
    try:
        with open_image(path.read_bytes()) as photo:
            reading = position_of(photo)
    except Rejected:
        return None
    return reading.lat, reading.lon


def load_upright(path: Path, size: int) -> Any:
    """The photo as RGB, turned upright, no side above ``size``; ValueError if it is damaged."""
    try:
        with open_image(path.read_bytes()) as photo:
            return upright(photo, size)
    except Rejected as error:
        raise ValueError(f"{path}: {error}. Leave it out.") from error


def register(photos: Sequence[Photo], center: geo.LatLon, seed: int = 0, threads: int = -1,
             extreme: bool = False) -> Registration:
    """Poses of the photos around ``center`` (lat, lon) in degrees.

    ``threads`` is COLMAP's, -1 for all cores; with 1 the same seed gives the same poses.
    ``extreme`` takes the features of COLMAP's preset of that name, affine shapes, domain-size
    pooling and guided matching, which finds more matches, true and false, than its defaults. A
    place that COLMAP cannot reconstruct is no error: see :class:`Registration`.
    """
    pycolmap = import_pycolmap()
    models = sorted(_models(pycolmap, photos, seed, threads, extreme),
                    key=lambda model: -model.num_reg_images())
    sizes = tuple(model.num_reg_images() for model in models)
    if not models:
        return Registration(len(photos), failure="COLMAP found no model among "
                                                 f"{len(photos)} photos")
    found = Registration(len(photos), sizes,
                         reprojection_error_px=float(models[0].compute_mean_reprojection_error()))
    if sizes[0] < ENOUGH * len(photos):
        return replace(found, failure=f"the largest of {len(sizes)} models has {sizes[0]} of "
                                      f"{len(photos)} photos, fewer than half")
    return _in_metres(pycolmap, found, models[0], photos, center, seed)


def import_pycolmap() -> Any:
    """pycolmap, quiet but for errors; ValueError with the command that installs it."""
    try:
        import pycolmap
    except ImportError as error:
        raise ValueError("Poses of photos are found by COLMAP: run `pip install "
                         '"gps-guidance[colmap]"`.') from error
    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    return pycolmap


def _models(pycolmap: Any, photos: Sequence[Photo], seed: int, threads: int, extreme: bool
            ) -> list[Any]:
    """COLMAP's models of the photos; image ``<index>.png`` is that photo."""
    pycolmap.set_random_seed(seed)
    extraction, matching = pycolmap.FeatureExtractionOptions(), pycolmap.FeatureMatchingOptions()
    extraction.sift.estimate_affine_shape = extraction.sift.domain_size_pooling = extreme
    matching.guided_matching = extreme
    mapping = pycolmap.IncrementalPipelineOptions()
    mapping.random_seed = seed
    extraction.use_gpu = matching.use_gpu = False  # the same everywhere
    extraction.num_threads = matching.num_threads = mapping.num_threads = threads
    with TemporaryDirectory(prefix="colmap-") as folder:
        images, database = Path(folder) / "images", Path(folder) / "database.db"
        images.mkdir()
        for index, photo in enumerate(tqdm(photos, desc="reading photos", unit="photo")):
            load_upright(photo.path, MAX_SIZE).save(images / f"{index}.png", compress_level=1)
        log.info("COLMAP: looking for features in %d photos.", len(photos))
        pycolmap.extract_features(database, images, camera_mode=pycolmap.CameraMode.PER_IMAGE,
                                  extraction_options=extraction)
        log.info("COLMAP: matching %d pairs.", len(photos) * (len(photos) - 1) // 2)
        pycolmap.match_exhaustive(database, matching_options=matching)
        with tqdm(desc="registering photos", unit="photo") as bar:
            models = pycolmap.incremental_mapping(
                database, images, folder, options=mapping, next_image_callback=bar.update)
    return list(models.values())


def _in_metres(pycolmap: Any, found: Registration, model: Any, photos: Sequence[Photo],
               center: geo.LatLon, seed: int) -> Registration:
    """The registration with a model's cameras and points, brought to metres by robust similarity.

    Photographers are taken to stand on level ground: the plane of their positions is horizontal.
    """
    images = {int(Path(image.name).stem): image for image in model.images.values()
              if image.has_pose}
    placed = {k: position for k in images if (position := photos[k].position) is not None}
    if len(placed) < 3:
        return replace(found, failure=f"only {len(placed)} of the registered photos have a "
                                      "position: the model cannot be brought to metres")
    ground = geo.local_m(list(placed.values()), center)
    at = np.column_stack([ground, np.full(len(ground), EYE_M)])
    options = pycolmap.RANSACOptions(max_error=GPS_ERROR_M, random_seed=seed)
    fitted = pycolmap.estimate_sim3d_robust(
        np.stack([images[k].projection_center() for k in placed]), at, options)
    agree = fitted["num_inliers"] if fitted else 0
    if agree < ENOUGH * len(placed):
        return replace(found, failure=f"only {agree} of {len(placed)} cameras lie within "
                                      f"{GPS_ERROR_M:.0f} m of their GPS: the model is not of the "
                                      "place's shape")
    model.transform(fitted["tgt_from_src"])
    cameras = [Camera(k, _c2w(images[k]), model.cameras[images[k].camera_id])
               for k in sorted(images)]
    found_at = {camera.photo: camera.c2w[:2, 3] for camera in cameras}
    residuals = np.linalg.norm(np.stack([found_at[k] for k in placed]) - ground, axis=1)
    return replace(
        found, cameras=cameras,
        points_m=np.stack([point.xyz for point in model.points3D.values()]),
        gps_residual_m=float(np.median(residuals)),
    )


def _c2w(image: Any) -> geo.Array:
    c2w = np.eye(4)
    c2w[:3] = image.cam_from_world().inverse().matrix()
    c2w[:3, :3] = c2w[:3, :3] @ OPENCV_TO_OPENGL
    return c2w
