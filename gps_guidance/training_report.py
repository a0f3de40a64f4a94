"""``train_report.html``: how a training went, on one page that can be mailed.

Pictures are within the page. No position is on it, and of folders only their names.
"""

from __future__ import annotations

import html
import io
import platform
import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from PIL import Image

from gps_guidance.card import LOAD_LORA
from gps_guidance.conditions import (
    AddressConditions,
    AngleConditions,
    Conditions,
    GPSConditions,
)
from gps_guidance.loop import Course
from gps_guidance.page import html_page, image_uri
from gps_guidance.photos.manifest import write_whole
from gps_guidance.recipe import KINDS, AngleRecipe, Recipe, as_written, shareable

GRIDS = 8  # at most so many sheets of samples
CELL = 192  # pixels, the longer side of a sample at most
PRIORS = 6  # images of prior preservation
KIND = {"text": "Text model", "gps": "GPS model", "angle": "Angle model",
        "address": "Address model"}
LOAD_TEXT_LORA = """from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("FOLDER OR HUB NAME OF {base}")
pipe.load_lora_weights("FOLDER OF THIS MODEL")"""
LOAD_ADDRESS = """from diffusers import StableDiffusionPipeline
from gps_guidance.geocoding import address_prompt

pipe = StableDiffusionPipeline.from_pretrained("{name}")
image = pipe(address_prompt("a red car", "STREET, QUARTER, TOWN")).images[0]"""
STYLE = """\
h2 { font-weight: 600; font-size: 1.15rem; margin: 2.2rem 0 .6rem } p { margin: .4rem 0 }
h3 { font-weight: 600; font-size: 1rem; margin: 1.2rem 0 .3rem } img { max-width: 100% }
th { text-align: left; font-weight: 600 } .note { color: #666 }
.gaps { background: #fbf4e6; border-left: 4px solid #d9a441; padding: .7rem 1rem; margin: 1rem 0 }
.sheet td { font-size: 11px; text-align: center; color: #555; vertical-align: top }
.sheet img { display: block; min-width: 72px; margin: auto }
.sheet th { font-weight: 400; color: #444; max-width: 220px; padding-right: 12px }
pre { background: #f4f4f4; padding: .7rem 1rem; overflow-x: auto; border-radius: 4px }
"""


def write_training_report(out: Path, dataset: str, conditions: Conditions, courses: list[Course],
                          prior_images: Path | None, accelerator: Accelerator) -> Path:
    """Write the page of a finished training into its folder ``out``, and return it.

    ``dataset`` is its name, ``courses`` how each stage went, the last being that of the UNet, and
    ``prior_images`` the folder of prior preservation. Loss curve, samples and prior images are
    those that the training left on disk.
    """
    recipe = conditions.recipe
    subject = conditions.photos.landmark or dataset
    title = f"{KIND[_kind(recipe)]} of {subject}"
    gaps = conditions.gaps[:1].upper() + conditions.gaps[1:]
    body = f"""<h1>{html.escape(title)}</h1>
{_table(_facts(dataset, conditions, courses, accelerator))}
{f'<p class="gaps">{html.escape(gaps)}</p>' if gaps else ""}
<h2>Loss</h2><img alt="loss curve" src="{image_uri("png", (out / "loss.png").read_bytes())}">
<h2>Samples while training</h2>{_samples(out, conditions)}
{_priors(prior_images, recipe)}
<h2>Settings</h2>{_settings(recipe)}
<h2>Use it</h2>{_next(out.resolve().name, recipe)}
<p class="note">{html.escape(_versions())}</p>"""
    page = out / "train_report.html"
    write_whole(page, html_page(title, body, STYLE).encode())
    return page


def _kind(recipe: Recipe) -> str:
    """One of KIND: a model of addresses is no GPS model."""
    return "address" if recipe.kind == "gps" and recipe.encoder == "none" else recipe.kind


# --- facts -----------------------------------------------------------------------------------


def _facts(dataset: str, conditions: Conditions, courses: list[Course], accelerator: Accelerator
           ) -> list[tuple[str, str]]:
    recipe = conditions.recipe
    height, width = recipe.size
    base = "small networks from scratch" if recipe.base == "tiny" else Path(recipe.base).name
    trained = f"LoRA of rank {recipe.lora_rank}" if recipe.lora_rank else "in full"
    facts = [("base", f"{base}, trained {trained}"),
             ("dataset", f"{dataset}: {len(conditions.photos):,} photos"),
             ("resolution", f"{width} x {height} pixels")]
    for course in courses:
        facts.append((f"stage {course.stage}", _course(course)))
        if course.counts:
            total = sum(course.counts.values())
            facts.append(("conditions dropped", f"in {total:,} samples: " + ", ".join(
                f"{name} {course.counts.get(key, 0):,}" for name, key in (
                    ("all", "all"), ("the place alone", "place"), ("the text alone", "text")))))
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    many = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    facts.append(("device", f"{device.type} ({name}){many}, mixed precision: "
                  f"{recipe.mixed_precision}"))
    return facts


def _course(course: Course) -> str:
    words = [f"{course.steps:,} steps, {course.skipped:,} of them skipped"]
    if course.images:
        words.append(f"{course.images:,} images in {course.seconds:,.1f} s "
                     f"({course.images / course.seconds:,.1f} images/s, with checkpoints and "
                     "samples)")
    if course.psnr_db is not None:
        words.append(f"{course.psnr_db:.2f} dB on training crops")
    return "; ".join(words)


def _table(rows: list[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
                    for name, value in rows)
    return f"<table>{lines}</table>"


def _versions() -> str:
    names = ("gps-guidance", "torch", "diffusers", "transformers", "accelerate", "peft")
    return f"Python {platform.python_version()}, " + ", ".join(
        f"{name} {version(name)}" for name in names)


# --- pictures --------------------------------------------------------------------------------


def _samples(out: Path, conditions: Conditions) -> str:
    """The sheets in the order of their steps, evenly chosen if there are many."""
    files = sorted(out.glob("samples-*.png"), key=_step)
    last = len(files) - 1
    shown = sorted({round(k * last / (GRIDS - 1)) for k in range(GRIDS)}) if files else []
    note = _columns(conditions)
    if len(shown) < len(files):
        note += f" Shown are {len(shown)} of {len(files)} sheets; all are in the folder."
    sheets = "".join(f"<h3>Step {_step(files[k]):,}</h3>{_sheet(files[k], conditions)}"
                     for k in shown)
    return f'<p class="note">{note}</p>{sheets}'


def _step(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _columns(conditions: Conditions) -> str:
    if isinstance(conditions, AngleConditions):
        return ("One picture for each of twelve bearings: where the photographer stands, clockwise "
                "from north.")
    if isinstance(conditions, GPSConditions):
        return ("Rows are prompts. Columns are four places, half-way from the middle of the "
                "dataset's box to its corners.")
    if isinstance(conditions, AddressConditions):
        return ("Rows are captions with addresses, which are not shown, as they tell where photos "
                "were taken. Columns are four noises.")
    return "Rows are prompts. Columns are four noises."


def _sheet(path: Path, conditions: Conditions) -> str:
    """A sheet, cut into its pictures, each with its name."""
    rows = conditions.sheet
    with Image.open(path) as png:
        sheet = png.convert("RGB")
    width, height = sheet.width // len(rows[0][1]), sheet.height // len(rows)
    lines = []
    for i, (title, names) in enumerate(rows):
        cells = "".join(
            _cell(sheet.crop((k * width, i * height, (k + 1) * width, (i + 1) * height)), name)
            for k, name in enumerate(names))
        heading = f"<th>{html.escape(title)}</th>" if title else ""
        lines.append(f"<tr>{heading}{cells}</tr>")
    return f'<table class="sheet">{"".join(lines)}</table>'


def _cell(picture: Image.Image, name: str) -> str:
    picture.thumbnail((CELL, CELL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return (f'<td><img alt="a sample" src="{image_uri("jpeg", buffer.getvalue())}">'
            f"{html.escape(name)}</td>")


def _priors(folder: Path | None, recipe: Recipe) -> str:
    if folder is None or not isinstance(recipe, AngleRecipe):
        return ""
    files, pictures = sorted(folder.glob("*.png"))[:PRIORS], []
    for path in files:
        with Image.open(path) as png:
            pictures.append(_cell(png.convert("RGB"), ""))
    return (f'<h2>Prior preservation</h2><p class="note">The first {len(files)} of '
            f"{recipe.num_class_images:,} images that the base made of the prompt before "
            f'training.</p><table class="sheet"><tr>{"".join(pictures)}</tr></table>')


# --- settings and what comes next ------------------------------------------------------------


def _settings(recipe: Recipe) -> str:
    settings, defaults = shareable(asdict(recipe)), shareable(asdict(KINDS[recipe.kind]()))
    changed = "".join(
        f"<tr><td>{key}</td><td>{html.escape(as_written(value))}</td>"
        f"<td>{html.escape(as_written(defaults[key]))}</td></tr>"
        for key, value in settings.items() if value != defaults[key])
    table = ("<table><tr><th>setting</th><th>here</th><th>default</th></tr>"
             f"{changed}</table>") if changed else "<p>All are the defaults.</p>"
    whole = html.escape(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return f"{table}<details><summary>The whole recipe</summary><pre>{whole}</pre></details>"


def _next(name: str, recipe: Recipe) -> str:
    model = shlex.quote(name)
    if recipe.lora_rank:
        load = LOAD_TEXT_LORA if recipe.encoder == "none" else LOAD_LORA
        lines = load.format(base=Path(recipe.base).name)
        return (f"<p>With its base, in Python, or uploaded:</p><pre>{html.escape(lines)}</pre>"
                f"<pre>gps-guidance push {html.escape(model)}</pre>")
    commands = {
        "text": [f"gps-guidance train {kind} DATASET --out {kind}-model base={model}"
                 for kind in ("gps", "angle")],
        "gps": [f'python examples/sample.py {model} --prompt "a red car" --gps LAT,LON',
                f'python examples/average.py {model} "a building" AREA.geojson'],
        "address": [LOAD_ADDRESS.format(name=name)],
        "angle": [f"gps-guidance sample {model} --out {model}.png",
                  "python launch.py --config gps-sds-sakharov.yaml --train "
                  f"system.guidance.pretrained_model_name_or_path={model}"],
    }[_kind(recipe)]
    more = ("<p>The second makes it 3D; size and cameras of your photos go into its config "
            "(docs/own-photos.md).</p>" if recipe.kind == "angle" else "")
    return (f"<p>In the folder that holds {html.escape(name)}:</p>"
            f"<pre>{html.escape(chr(10).join(commands))}</pre>{more}")
