"""What a run leaves for people: ``metrics.json``, ``mesh.glb``, ``report.html``, ``report.png``."""

from __future__ import annotations

import contextlib
import html
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from gps_guidance import geo, metrics
from gps_guidance.dataset import Photos, load_photos
from gps_guidance.lift import cameras, export
from gps_guidance.miniature import photographer, truth
from gps_guidance.miniature.landmark import Landmark, render
from gps_guidance.models import angle_config, load_angle_model, resolve_model
from gps_guidance.page import html_page
from gps_guidance.sampling import sample_angles
from gps_guidance.scorers import AngleClassifier

log = logging.getLogger(__name__)

COLUMNS = 12  # bearings shown in the report
Rows = list[tuple[str, list[np.ndarray]]]
Source = tuple[Path, str | None] | None  # of the images: a model's folder, and its LoRA's
SCORES = ("mask_iou", "occupancy_iou", "psnr_db", "bearing_within_one_bin")


def finish(run: Any) -> dict[str, Any]:
    """Score a finished run (:class:`gps_guidance.lift.engine.Run`) and write its files."""
    guidance = run.cfg.system.get("guidance", {})
    model_name = str(guidance.get("pretrained_model_name_or_path", ""))
    source: Source = None
    with contextlib.suppress(ValueError):  # a Hub id, or a folder that has gone since: it is done
        folder, lora = resolve_model(model_name), guidance.get("lora_weights")
        angle_config(folder, lora)
        source = folder, lora
    photos = _input_photos(run)
    scores: dict[str, Any] = {name: None for name in SCORES}
    scores |= _scores(run, source, photos)
    scores |= {
        "seconds": round(run.seconds, 1),
        "peak_memory_bytes": run.peak_memory_bytes,
        "model": model_name,
        "lora_weights": guidance.get("lora_weights"),
        "engine": run.engine,
        "device": run.device,
    }
    with export.staged(run.trial_dir / "metrics.json") as stage:
        stage.write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    _write_mesh(run)
    rows = _rows(run, source, photos)
    _write_html(run, scores, rows)
    _write_sheet(run.trial_dir / "report.png", rows)
    shown = {k: round(v, 3) for k, v in scores.items() if isinstance(v, float)}
    log.info("Scores: %s", shown)
    log.info("Open %s", run.trial_dir / "report.html")
    return scores


def _write_mesh(run: Any) -> None:
    """``mesh.glb``; a field that has no surface yet costs the mesh, not the scores."""
    system = run.system
    try:
        mesh = export.extract_mesh(system.geometry, system.material, placement=system.placement)
    except ValueError as error:
        log.warning("No mesh.glb: %s", error)
        return
    export.write_mesh(mesh, run.trial_dir / "mesh.glb")


@torch.no_grad()
def render_view(system: Any, c2w: Tensor, fovy: float, height: int, width: int
                ) -> dict[str, Tensor]:
    """One picture of the field: ``rgb`` [H, W, 3], ``opacity`` and ``depth`` [H, W], on the CPU.

    ``c2w`` [4, 4] in scene units, ``fovy`` in radians; diffuse shading is off (albedo), as the
    light of the photos is already in the colours.
    """
    device = system.device
    batch = cameras.camera_batch(c2w[None].to(device), torch.tensor([fovy], device=device),
                                 height, width)
    system.eval()
    out = system(batch)
    return {
        "rgb": out["comp_rgb"][0].cpu(),
        "opacity": out["opacity"][0, ..., 0].cpu(),
        "depth": out["depth"][0, ..., 0].cpu(),
    }


def _miniature(run: Any, source: Source) -> Landmark | None:
    """The landmark of the miniature, which has a truth, that the angle model is of or, without one,
    that the prompt names; else None."""
    about = angle_config(*source) if source else None
    if about is not None:
        return photographer.LANDMARKS.get(about.get("landmark", ""))
    prompt = run.cfg.system.get("prompt_processor", {}).get("prompt") or ""
    return next((place for name, place in photographer.LANDMARKS.items() if name in prompt), None)


def _input_photos(run: Any) -> Photos | None:
    """The photos of ``--photos DATASET`` at the size at which views are scored."""
    if run.photos is None:
        return None
    data = run.datamodule.cfg
    return load_photos(run.photos, _size(data), split=None)


def _size(data: Any) -> tuple[int, int]:
    """(height, width) of training renders at their finest."""
    def last(value: Any) -> int:
        return int(value if isinstance(value, int) else list(value)[-1])

    return last(data.height), last(data.width)


def _scores(run: Any, source: Source, photos: Photos | None) -> dict[str, Any]:
    if (landmark := _miniature(run, source)) is not None:
        return truth_scores(landmark, run.system, _classifier(source))
    return _photo_scores(run, photos) if photos is not None else {}


def truth_scores(landmark: Landmark, system: Any, classifier: AngleClassifier | None = None,
                 bearings: list[float] | None = None) -> dict[str, Any]:
    """:func:`gps_guidance.miniature.truth.score` of a run's system, a loaded trial's too."""
    geometry = system.geometry
    return truth.score(
        landmark, lambda c2w, fovy, h, w: render_view(system, c2w, fovy, h, w),
        lambda points: geometry.forward_density(points.to(system.device)).cpu(),
        float(geometry.cfg.radius), classifier=classifier, bearings=bearings,
    )


def _classifier(source: Source) -> AngleClassifier | None:
    """The judge of the model that the images are of: a LoRA has its own, or none."""
    folder = None if source is None else Path(source[1] or source[0])
    if folder is None or not (folder / "angle_classifier").is_dir():
        return None
    path = folder / "angle_classifier"
    return AngleClassifier.from_pretrained(path, use_safetensors=True).eval()


def photo_camera(data: Any, bearing_deg: float) -> tuple[Tensor, float]:
    """The evaluation camera of a data section at a bearing: (c2w [4, 4], fovy in radians)."""
    c2w = cameras.c2w_from_bearing(
        torch.tensor([bearing_deg]), torch.tensor([data.eval_elevation_deg]),
        torch.tensor([data.eval_camera_distance]),
    )[0].float()
    return c2w, float(np.deg2rad(data.eval_fovy_deg))


def _photo_scores(run: Any, photos: Photos) -> dict[str, Any]:
    """Against photos: each is compared with a render from its own bearing.

    With masks in the dataset (``masks/<id>.png``, white = landmark) also ``mask_iou``.
    """
    data = run.datamodule.cfg
    height, width = photos.size
    views = [
        render_view(run.system, *photo_camera(data, float(b)), height, width)
        for b in photos.bearings
    ]
    renders = torch.stack([v["rgb"] for v in views])
    real = _full_crops(photos).permute(0, 2, 3, 1)
    fitted = metrics.affine_colour_fit(renders, real)
    scores: dict[str, Any] = {
        "psnr_db": metrics.mean_psnr_db(renders, real),
        "psnr_affine_db": metrics.mean_psnr_db(fitted, real),
        "bearing_within_15_deg": metrics.bearing_match(
            renders.permute(0, 3, 1, 2), photos.bearings, real.permute(0, 3, 1, 2), photos.bearings
        ),
        "views": len(photos),
    }
    masks = photos.masks
    if masks is not None:
        scores["mask_iou"] = float(
            np.mean([metrics.mask_iou(v["opacity"], m) for v, m in zip(views, masks, strict=True)])
        )
    return scores


def _full_crops(photos: Photos) -> Tensor:
    """Every photo at its training size, uncropped, [N, 3, H, W] in [0, 1]."""
    return photos.crop(np.arange(len(photos)), np.random.default_rng(0)) / 2 + 0.5


# --- pictures --------------------------------------------------------------------------------


def _rows(run: Any, source: Source, photos: Photos | None) -> Rows:
    """The report's pictures by bearing: title and ``COLUMNS`` images a row."""
    data = run.datamodule.cfg
    height, width = _size(data)
    bearings = [360.0 / COLUMNS * k for k in range(COLUMNS)]
    rows: Rows = []
    landmark = _miniature(run, source)
    if photos is not None:
        real = _full_crops(photos)
        picks = [_nearest(photos.bearings, bearing) for bearing in bearings]
        rows.append(("Photos taken nearest to each bearing", _pictures(real[picks])))
    elif landmark is not None:
        rows.append(("Photos, as tourists take them", _tourist_photos(landmark, bearings, height)))
    if source is not None and angle_config(*source) is not None:
        model = load_angle_model(*source)
        generated = sample_angles(model, bearings, guidance_scale=2.0)
        rows.append(("Generated for each bearing", _pictures(generated)))
    renders = [render_view(run.system, *photo_camera(data, b), height, width) for b in bearings]
    rows.append(("The 3D landmark from each bearing", [export.to_uint8(r["rgb"]) for r in renders]))
    if landmark is not None:
        truths = [photographer.truth_view(landmark, b, height)[0]["rgb"] for b in bearings]
        rows.append(("Ground truth", [export.to_uint8(t) for t in truths]))
    return rows


def _nearest(bearings: np.ndarray, bearing_deg: float) -> int:
    return int(np.abs(geo.angle_difference_deg(bearings, bearing_deg)).argmin())


def _tourist_photos(landmark: Landmark, bearings: list[float], size: int) -> list[np.ndarray]:
    """For each bearing the first of some procedural photos that was taken close to it."""
    rng = np.random.default_rng(0)
    shots = [photographer.plan_shot(landmark, rng) for _ in range(300)]
    at = np.array([geo.bearing_deg(shot.gps, landmark.center) for shot in shots])
    pictures = []
    for bearing in bearings:
        shot = shots[_nearest(at, bearing)]
        rgb = render(landmark.scene, shot.c2w, shot.fovy, *shot.size, shot.weather,
                     shot.passers_by)["rgb"].permute(2, 0, 1)[None]
        h, w = rgb.shape[2:]
        side = min(h, w)
        top, left = (h - side) // 2, (w - side) // 2
        square = rgb[..., top : top + side, left : left + side]
        pictures += _pictures(
            torch.nn.functional.interpolate(square, (size, size), mode="bilinear", antialias=True)
        )
    return pictures


def _pictures(images: Tensor) -> list[np.ndarray]:
    return [export.to_uint8(image.permute(1, 2, 0)) for image in images]


def _write_html(run: Any, scores: dict[str, Any], rows: Rows) -> None:
    folder = run.trial_dir / "report"
    bearings = "".join(f"<th>{360 / COLUMNS * k:.0f}°</th>" for k in range(COLUMNS))
    body = []
    for index, (title, images) in enumerate(rows):
        cells = []
        for k, image in enumerate(images):
            export.write_png(folder / f"{index}-{k:02d}.png", image)
            cells.append(f'<td><img src="report/{index}-{k:02d}.png" alt="{title}"></td>')
        body.append(f'<tr><td class="title" colspan="{COLUMNS}">{html.escape(title)}</td></tr>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    step = run.system.true_global_step
    video = f"save/it{step}-test.mp4"
    table = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{_shown(v)}</td></tr>" for k, v in scores.items()
    )
    normals = "surface normal, " if run.system.renderer.shows_normals else ""
    mesh = '<a href="mesh.glb">mesh.glb</a>, ' if (run.trial_dir / "mesh.glb").is_file() else ""
    panels = f"colour, {normals}opacity"
    landmark = run.system.placement.landmark or run.cfg.name
    style = """\
img { width: 90px; image-rendering: auto; display: block; border-radius: 3px }
.top { display: flex; gap: 2rem; align-items: flex-start }
.title { padding-top: 1rem; font-weight: 600 }
video { width: 576px; border-radius: 6px }
.scores td:last-child { text-align: right; font-family: monospace }
"""
    content = f"""<h1>{html.escape(landmark)}, lifted to 3D from GPS-tagged photos</h1>
<p>Model <code>{html.escape(scores["model"])}</code>, {run.engine} engine on
{html.escape(run.device)},
{scores["seconds"]:.0f} seconds of training, {scores["peak_memory_bytes"] / 2**30:.1f} GiB at most.
Files: {mesh}<a href="{video}">turntable</a>, <a href="metrics.json">metrics.json</a>.</p>
<div class="top"><div><video src="{video}" autoplay loop muted controls></video>
<p>One turn: {panels}.</p></div><table class="scores">{table}</table></div>
<p>Each column is one bearing: where the photographer stands, clockwise from north.</p>
<table><tr>{bearings}</tr>{"".join(body)}</table>"""
    with export.staged(run.trial_dir / "report.html") as stage:
        stage.write_text(html_page(f"{landmark} in 3D", content, style), "utf-8")


def _write_sheet(path: Path, rows: Rows) -> None:
    """The report's rows as one picture, to show where a page cannot be opened."""
    strips = [np.concatenate(images, axis=1) for _, images in rows]
    width = rows[0][1][0].shape[1]
    figure = Figure(figsize=(12, sum(12 * s.shape[0] / s.shape[1] + 0.3 for s in strips) + 0.3),
                    layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for (title, _), strip, ax in zip(rows, strips, axes, strict=True):
        ax.imshow(strip)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_yticks([])
        ax.set_xticks([width * (k + 0.5) for k in range(COLUMNS)],
                      [f"{360 / COLUMNS * k:.0f}°" for k in range(COLUMNS)] if ax is axes[-1]
                      else [""] * COLUMNS)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    with export.staged(path) as stage:
        figure.savefig(stage, dpi=100, format="png")


def _shown(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))
