"""COLMAP followed by NeRF on tourists' photos, the paper's second baseline of Table 3, scored.

    scores = nerf_from_photos("outputs/photos", "outputs/nerf", "Space Needle")
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from gps_guidance import geo
from gps_guidance.lift import export
from gps_guidance.lift.cameras import c2w_from_bearing
from gps_guidance.lift.colmap import Photo, Registration, find_photos, load_upright, register
from gps_guidance.lift.photo_fit import PhotoField, PosedPhoto, fit, held_out_psnr_db
from gps_guidance.lift.report import render_view, truth_scores
from gps_guidance.miniature import photographer
from gps_guidance.photos.manifest import is_dataset, load_manifest

log = logging.getLogger(__name__)

RADIUS = 1.4  # of the box, in scene units
HELD_OUT = 8  # of as many registered photos one does not train and is scored
CLEAR_OF_GROUND = 0.02  # part of the landmark's height that is left to the background with the lawn
SHOWN = 12  # bearings of the contact sheet
FILES = ("metrics.json", "field.safetensors", "place.json", "views.png", "mesh.glb")


@dataclass(frozen=True)
class Place:
    """Where the scene frame is: its origin ``middle_m`` above ``center`` (lat, lon), and one unit
    for ``metres_per_unit`` metres."""

    name: str
    center: geo.LatLon
    middle_m: float
    metres_per_unit: float

    def to_scene_units(self, points_m: geo.Array) -> geo.Array:
        """World metres [..., 3] to the scene frame."""
        return (points_m - np.array([0.0, 0.0, self.middle_m])) / self.metres_per_unit


def find_place(photos: str | Path, landmark: str | None = None, center: geo.LatLon | None = None,
               height_m: float | None = None) -> Place:
    """The place that the photos are of: a landmark by name, or any centre and height in metres.

    A dataset knows its landmark and centre. The box of the field is 1.7 times as wide as the
    landmark is high. ValueError says what is missing.
    """
    if is_dataset(photos):
        manifest = load_manifest(photos)
        landmark, center = landmark or manifest.landmark, center or manifest.center
    name = landmark or ""
    if (known := photographer.LANDMARKS.get(name)) is not None:
        return Place(name, known.center, known.middle_m, known.metres_per_unit)
    if (famous := geo.find_landmark(name)) is not None:
        name, center = famous.name, center or famous.center
        height_m = height_m or famous.height_m
    if center is None or height_m is None:
        raise ValueError(f"landmark is {landmark!r}, which is not one of "
                         f"{', '.join([*geo.LANDMARKS, *photographer.LANDMARKS])}: give its "
                         "center (lat, lon) and height_m, or another name.")
    return Place(name, center, height_m / 2, 0.6 * height_m)


def nerf_from_photos(
    photos: str | Path,
    out: str | Path,
    landmark: str | None = None,
    center: geo.LatLon | None = None,
    height_m: float | None = None,
    size: int = 128,
    steps: int = 500,
    seed: int = 0,
    threads: int = -1,
    extreme: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Poses by COLMAP, a field by its photos, scores; all that is written under ``out``.

    ``photos`` is a dataset or a folder of geotagged images, ``size`` the longer side in pixels at
    which they are compared with renders; ``threads`` and ``extreme`` are COLMAP's
    (:func:`gps_guidance.lift.colmap.register`). Returns what ``metrics.json`` gets:
    ``verdict`` is ``failed``, with the ``reason``, or ``scored``.
    """
    place, given = find_place(photos, landmark, center, height_m), find_photos(photos)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # or an earlier field would stand beside a later failure
        (out / name).unlink(missing_ok=True)
    started = time.monotonic()
    found = register(given, place.center, seed, threads, extreme)
    scores: dict[str, Any] = {"verdict": "failed", "reason": found.failure} | _about(found)
    if found.failure is None:
        scores |= {"verdict": "scored"} | _camera_errors(found, given, Path(photos))
        log.info("COLMAP: %s", scores)
        posed = posed_photos(found, given, place, size)
        floor = (CLEAR_OF_GROUND * 2 - 1) * place.middle_m / place.metres_per_unit
        field = fit([p for k, p in enumerate(posed) if k % HELD_OUT], RADIUS, floor, steps,
                    seed=seed, device=device)
        scores["held_out_psnr_db"] = held_out_psnr_db(field, posed[::HELD_OUT])
        if (known := photographer.LANDMARKS.get(place.name)) is not None:
            scores |= truth_scores(known, field)
        write_field(field, place, _usual_camera(posed), out)
    scores["seconds"] = round(time.monotonic() - started, 1)
    with export.staged(out / "metrics.json") as stage:
        stage.write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    log.info("Scores: %s", scores)
    return scores


def _about(found: Registration) -> dict[str, Any]:
    """COLMAP's part of the scores."""
    return {
        "photos": found.photos, "registered": max(found.models, default=0),
        "models": list(found.models), "points": len(found.points_m),
        "reprojection_error_px": found.reprojection_error_px,
        "gps_residual_m": found.gps_residual_m,
    }


def _camera_errors(found: Registration, photos: list[Photo], folder: Path) -> dict[str, float]:
    """Median errors of the cameras where the truth lies beside the photos (the miniature)."""
    if not (folder / "truth.json").is_file():
        return {}
    rows = json.loads((folder / "truth.json").read_text("utf-8"))["photos"]
    true_m = {row["file"]: np.array(row["position_m"]) for row in rows}
    true = np.stack([true_m[photos[camera.photo].path.name] for camera in found.cameras])
    at = np.stack([camera.c2w[:3, 3] for camera in found.cameras])
    bearing, true_bearing = (np.degrees(np.arctan2(p[:, 0], p[:, 1])) for p in (at, true))
    return {
        "camera_error_m": float(np.median(np.linalg.norm(at - true, axis=1))),
        "camera_bearing_error_deg": float(np.median(np.abs(
            geo.angle_difference_deg(bearing, true_bearing)))),
    }


def posed_photos(found: Registration, photos: list[Photo], place: Place, size: int
                 ) -> list[PosedPhoto]:
    """The registered photos in the scene frame, with ``size`` pixels on their longer side."""
    posed = []
    for camera in found.cameras:
        pixels = torch.from_numpy(np.array(load_upright(photos[camera.photo].path, size)))
        c2w = camera.c2w.copy()
        c2w[:3, 3] = place.to_scene_units(c2w[:3, 3])
        directions = camera.directions(*pixels.shape[:2])
        posed.append(PosedPhoto(pixels, torch.from_numpy(c2w).float(),
                                torch.from_numpy(directions).float()))
    return posed


def _usual_camera(photos: list[PosedPhoto]) -> tuple[float, float, float]:
    """Median distance, elevation in degrees and vertical field of view in radians of photos."""
    at = torch.stack([photo.c2w[:3, 3] for photo in photos])
    distance = at.norm(dim=1)
    elevation = torch.rad2deg(torch.asin(at[:, 2] / distance))
    edge = torch.stack([photo.directions[0, :, 1].amax() for photo in photos])
    fovy = 2 * math.atan(float(edge.median()))
    return float(distance.median()), float(elevation.median()), fovy


def write_field(field: PhotoField, place: Place, camera: tuple[float, float, float], out: Path
                ) -> None:
    """``field.safetensors``, ``place.json``, ``views.png`` of twelve bearings, ``mesh.glb``."""
    save_file({k: v.cpu().contiguous() for k, v in field.state_dict().items()},
              out / "field.safetensors")
    (out / "place.json").write_text(json.dumps(asdict(place), indent=2) + "\n", "utf-8")
    distance, elevation_deg, fovy = camera
    bearings = torch.arange(SHOWN) * (360.0 / SHOWN)
    views = c2w_from_bearing(bearings, torch.full((SHOWN,), elevation_deg),
                             torch.full((SHOWN,), distance))
    pictures = [export.to_uint8(render_view(field, c2w, fovy, 128, 128)["rgb"]) for c2w in views]
    export.write_png(out / "views.png", export.image_grid(pictures, columns=4))
    try:
        mesh = export.extract_mesh(field.geometry, field.material,
                                   placement=export.Placement(place.name, place.center))
    except ValueError as error:
        log.warning("No mesh.glb: %s", error)
        return
    export.write_mesh(mesh, out / "mesh.glb")
