"""A report on a dataset folder, to look at before training: ``report.html`` and ``report.png``.

No torch. Positions are shown in metres, and only in a report that stays in the dataset's folder,
unless asked.
"""

from __future__ import annotations

import html
import io
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from gps_guidance import geo
from gps_guidance.page import html_page, image_uri
from gps_guidance.photos import drawings
from gps_guidance.photos.drawings import INK
from gps_guidance.photos.images import open_image, upright
from gps_guidance.photos.manifest import Manifest, Rejected, load_manifest, write_whole
from gps_guidance.photos.troubles import numbers, texts, times, troubles

PAPER = "#eeeeee"
THUMB = 108  # pixels, side of a square picture; others have its area
SHEET = 96  # about so many pictures of a city
NO_POSITIONS = ("Positions are not shown, because this report lies outside the dataset's folder; "
                "--with-positions shows them.")
STYLE = """\
h2 { font-weight: 600; font-size: 1.15rem; margin: 2.2rem 0 .6rem } p { margin: .4rem 0 }
.row { display: flex; gap: 2.5rem; flex-wrap: wrap; align-items: flex-start }
.figure { max-width: 100% } .troubles { background: #fbf4e6; border-left: 4px solid #d9a441;
padding: .7rem 1rem .7rem 2.2rem; margin: 1rem 0 } .troubles li { margin: .25rem 0 }
.sheet { display: grid; gap: 6px; max-width: 1200px }
.sheet figure { margin: 0; font-size: 11px; text-align: center; color: #555 }
.sheet img { width: 100%; border-radius: 3px; display: block }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #2f6f9f; height: .7rem; border-radius: 2px; min-width: 1px }
.note { color: #666 } th { text-align: left; font-weight: 600 }
"""


def inspect(dataset: str | Path, out: str | Path | None = None, *, with_positions: bool = False
            ) -> tuple[Path, list[str]]:
    """Write the report on a dataset folder into ``out`` (default: ``DATASET/inspect``).

    Returns the page's path and what training will have trouble with
    (:func:`gps_guidance.photos.troubles.troubles`). An ``out`` beyond the dataset's folder gets no
    positions unless ``with_positions``. ValueError if the folder is no dataset.
    """
    manifest = load_manifest(dataset)
    folder = manifest.root / "inspect" if out is None else Path(out)
    shown = with_positions or _is_within(folder, manifest.root)
    found = troubles(manifest)
    columns, cells = _contact_sheet(manifest, shown)
    folder.mkdir(parents=True, exist_ok=True)
    page = _page(manifest, found, columns, cells, shown)
    write_whole(folder / "report.html", page.encode())
    write_whole(folder / "report.png", _overview(manifest, found, columns, cells, shown))
    return folder / "report.html", found


def _is_within(folder: Path, root: Path) -> bool:
    """Links are followed: what counts is where the files will lie."""
    return folder.resolve().is_relative_to(root.resolve())


# --- facts -----------------------------------------------------------------------------------


def _title(manifest: Manifest) -> str:
    if manifest.landmark:
        return f"Photos of {manifest.landmark}"
    return f"Photos of {manifest.root.resolve().name}"


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What it is, in a few lines: name and value."""
    total = len(manifest.rows)
    kind = "landmark" if manifest.center else "place"
    if manifest.bounds:
        box = manifest.bounds
        middle = ((box.south + box.north) / 2, (box.west + box.east) / 2)
        west, east = (middle[0], box.west), (middle[0], box.east)
        width = geo.distance_text(float(geo.distance_m(west, east)))
        height = geo.distance_text(float(geo.distance_m((box.south, middle[1]),
                                                        (box.north, middle[1]))))
        kind = f"box of {width} (west to east) by {height}"
    facts = [("kind", kind), ("photos kept", f"{total:,}"),
             ("files rejected", f"{sum(manifest.counts.values()):,}")]
    splits = Counter(texts(manifest, "split"))
    facts.append(("splits", ", ".join(f"{name} {n:,}" for name, n in splits.most_common())))
    w, h = numbers(manifest, "width"), numbers(manifest, "height")
    w, h = w[~np.isnan(w)], h[~np.isnan(h)]
    if len(w):
        shapes = {"landscape": w > h, "portrait": w < h, "square": w == h}
        facts.append(("pixels", f"{np.median(w):.0f} x {np.median(h):.0f} in the median, shorter "
                      f"side at least {min(w.min(), h.min()):.0f}; " + ", ".join(
                          f"{are.sum():,} {shape}" for shape, are in shapes.items() if are.any())))
    said = sum(text is not None for text in texts(manifest, "caption"))
    facts.append(("captions", f"{said:,} of {total:,}"))
    when = times(manifest)
    if when:
        facts.append(("taken", f"{min(when):%Y-%m-%d} to {max(when):%Y-%m-%d} ({len(when):,} "
                      "photos say when)"))
    if manifest.center:
        distance = numbers(manifest, "distance_m")
        facts.append(("distance", f"{np.median(distance):.0f} m in the median, "
                      f"{distance.min():.0f} to {distance.max():.0f} m"))
    return facts


def _ranking(values: Iterable[str | None], none: str, most: int = 8) -> list[tuple[str, int]]:
    """The commonest values with their counts; the rest together, and those that are null, last."""
    counts = Counter(values)
    missing = counts.pop(None, 0)
    ranked = counts.most_common()
    rows = ranked[:most]
    if ranked[most:]:
        rows.append((f"{len(ranked) - most:,} more", sum(n for _, n in ranked[most:])))
    return [(str(name), n) for name, n in rows] + ([(none, missing)] if missing else [])


def _rankings(manifest: Manifest) -> dict[str, list[tuple[str, int]]]:
    rejected = sorted(manifest.counts.items(), key=lambda item: (-item[1], item[0]))
    return {
        "Why files were rejected": rejected,
        "Licences": _ranking(texts(manifest, "licence"), "not given"),
        "Owners": _ranking(texts(manifest, "owner"), "not given"),
    }


# --- contact sheet ---------------------------------------------------------------------------


def _contact_sheet(manifest: Manifest, with_positions: bool) -> tuple[int, list[drawings.Cell]]:
    """Columns and cells: by bearing, by place with north above, or, where a place must not be told,
    photos from all over the manifest."""
    if manifest.center:
        num_bins = manifest.num_bins
        bins = manifest.rows.column("bin").to_numpy()
        middle = geo.bin_bearing_deg(bins, num_bins)
        off = np.abs(geo.angle_difference_deg(numbers(manifest, "bearing_deg"), middle))
        labels = [f"{geo.bin_bearing_deg(k, num_bins):.0f}°" for k in range(num_bins)]
        return 12, _cells(manifest, bins, off, labels)
    if not with_positions:
        total = len(manifest.rows)
        groups = np.arange(total) * min(total, SHEET) // total
        return 12, _cells(manifest, groups, np.zeros(total), [""] * (int(groups[-1]) + 1))
    east, north = drawings.east_north(manifest).T
    low, high = drawings.extent(manifest, np.stack([east, north], axis=1))
    width, height = high - low
    side = max(width, height, 1.0)  # a street is shown with what lies beside it
    pad = np.maximum(0, np.array([side, 0.6 * side]) - (width, height)) / 2
    low, high = low - pad, high + pad
    width, height = high - low
    columns = round(np.sqrt(SHEET * width / height))
    rows = round(SHEET / columns)
    across = (east - low[0]) / width * columns
    down = (high[1] - north) / height * rows
    column = np.clip(across.astype(int), 0, columns - 1)
    row = np.clip(down.astype(int), 0, rows - 1)
    off = np.hypot(across - column - 0.5, down - row - 0.5)
    return columns, _cells(manifest, row * columns + column, off, [""] * (rows * columns))


def _cells(manifest: Manifest, group: np.ndarray, off: np.ndarray, labels: list[str]
           ) -> list[drawings.Cell]:
    """For each group of photos [N] the readable one with the smallest ``off`` [N], of the first
    three."""
    counts = np.bincount(group, minlength=len(labels))
    order = np.lexsort((off, group))
    starts = np.concatenate([[0], np.cumsum(counts)])
    files = manifest.rows.column("file")
    size, cells = _thumbnail_size(manifest), []
    for k, label in enumerate(labels):
        candidates = (files[int(i)].as_py() for i in order[starts[k] : starts[k + 1]][:3])
        pictures = (_thumbnail(manifest.root / file, size) for file in candidates if file)
        picture = next((p for p in pictures if p is not None), Image.new("RGB", size, PAPER))
        cells.append(drawings.Cell(label, int(counts[k]), picture))
    return cells


def _thumbnail_size(manifest: Manifest) -> tuple[int, int]:
    """Width and height in the median photo's aspect, which most crops then leave whole."""
    aspects = numbers(manifest, "width") / numbers(manifest, "height")
    known = aspects[~np.isnan(aspects)]
    aspect = float(np.clip(np.median(known), 0.6, 1.7)) if len(known) else 1.0
    return round(THUMB * aspect**0.5), round(THUMB / aspect**0.5)


def _thumbnail(path: Path, size: tuple[int, int]) -> Image.Image | None:
    """The middle of a photo, None if it cannot be read."""
    try:
        with open_image(path.read_bytes()) as photo:
            return ImageOps.fit(upright(photo, max(photo.size)), size)
    except (Rejected, OSError):
        return None


# --- the two files ---------------------------------------------------------------------------


def _sheet_title(manifest: Manifest, with_positions: bool) -> str:
    if manifest.center:
        return "A photo for each bearing: where the photographer stands, clockwise from north"
    return "A photo for each place, north above" if with_positions else "Some of the photos"


def _png(figure: Figure, dpi: int = 100) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # names in scripts that the font lacks; the page has them
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _overview(manifest: Manifest, found: list[str], columns: int, cells: list[drawings.Cell],
              with_positions: bool) -> bytes:
    """``report.png``: everything but the captions on one sheet."""
    lines = [f"{name}: {value}" for name, value in _facts(manifest)]
    lines += ["", "What training will have trouble with" if found else "Nothing stands out.", *(
        line for sentence in found
        for line in textwrap.wrap(sentence, 150, initial_indent="-  ", subsequent_indent="    "))]
    width, height = cells[0].picture.size
    rows = math.ceil(len(cells) / columns)
    sheet_height = 12.5 * rows * (height + 18) / (columns * (width + 6))
    rankings = _rankings(manifest)
    longest = max(len(ranking) for ranking in rankings.values())
    heights = [0.18 * len(lines) + 0.4, 5.0, 0.24 * longest + 0.4,
               1.8 if times(manifest) else 0.6, sheet_height + 0.3]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(5, 6, height_ratios=heights)
    head = figure.add_subplot(grid[0, :])
    head.axis("off")
    head.set_title(_title(manifest), loc="left", fontsize=15, color=INK, parse_math=False)
    head.text(0, 1, "\n".join(lines), va="top", fontsize=9, color=INK, linespacing=1.45,
              transform=head.transAxes, parse_math=False)
    place = figure.add_subplot(grid[1, :3])
    if with_positions:
        drawings.draw_map(place, manifest)
    else:
        place.axis("off")
        place.text(0, 0.5, textwrap.fill(NO_POSITIONS, 60), color=INK, transform=place.transAxes)
    if manifest.center:
        drawings.draw_rose(figure.add_subplot(grid[1, 3:], projection="polar"), manifest)
    else:
        drawings.draw_numbers(figure.add_subplot(grid[1, 3:]), manifest)
    for k, (title, ranking) in enumerate(rankings.items()):
        drawings.draw_bars(figure.add_subplot(grid[2, 2 * k : 2 * k + 2]), title, ranking, longest)
    drawings.draw_dates(figure.add_subplot(grid[3, :3]), manifest)
    drawings.draw_hours(figure.add_subplot(grid[3, 3:]), manifest)
    drawings.draw_sheet(figure.add_subplot(grid[4, :]), columns, cells,
                _sheet_title(manifest, with_positions))
    return _png(figure)


def _page(manifest: Manifest, found: list[str], columns: int, cells: list[drawings.Cell],
          with_positions: bool) -> str:
    facts = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>"
                    for name, value in _facts(manifest))
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found)
    trouble = f'<ul class="troubles">{listed}</ul>' if found else "<p>Nothing stands out.</p>"
    where = (_figure(manifest, drawings.draw_map, "map of the positions", (6, 5))
             if with_positions else f'<p class="note">{NO_POSITIONS}</p>')
    if manifest.center:
        where += _figure(manifest, drawings.draw_rose, "rose of bearings", (5, 5),
                         "polar")
    else:
        where += _figure(manifest, drawings.draw_numbers, "photos by cell", (5, 5))
    when = _figure(manifest, drawings.draw_dates, "photos by date", (6, 2.2))
    when += _figure(manifest, drawings.draw_hours, "photos by hour", (5, 2.2))
    tables = "".join(_bars(title, rows) for title, rows in _rankings(manifest).items())
    sheet = "".join(f"<figure>{_img(cell)}{cell.label} <b>{cell.count:,}</b></figure>"
                    for cell in cells)
    title = _title(manifest)
    return html_page(title, f"""<h1>{html.escape(title)}</h1>
<table>{facts}</table>
<h2>What training will have trouble with</h2>{trouble}
<h2>Where</h2><div class="row">{where}</div>
<h2>{_sheet_title(manifest, with_positions)}</h2>
<p class="note">The number is that of all photos there; grey: none to show.</p>
<div class="sheet" style="grid-template-columns: repeat({columns}, 1fr)">{sheet}</div>
<h2>When</h2><div class="row">{when}</div>
<div class="row">{tables}</div>
<h2>Captions</h2>{_captions(manifest, with_positions)}""", STYLE)


def _figure(manifest: Manifest, draw: Callable[[Axes, Manifest], None], alt: str,
            size: tuple[float, float], projection: str | None = None) -> str:
    """A drawing as an image within the page."""
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    draw(figure.add_subplot(projection=projection), manifest)
    return (f'<img class="figure" width="{96 * size[0]:.0f}" alt="{alt}" '
            f'src="{image_uri("png", _png(figure, 120))}">')


def _img(cell: drawings.Cell) -> str:
    buffer = io.BytesIO()
    cell.picture.save(buffer, "JPEG", quality=85)
    alt = f"a photo from {cell.label}" if cell.label else "a photo"
    return f'<img alt="{alt}" src="{image_uri("jpeg", buffer.getvalue())}">'


def _bars(title: str, rows: list[tuple[str, int]]) -> str:
    total = sum(count for _, count in rows)
    lines = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{count:,}</td>'
        f'<td class="n">{100 * count / total:.0f} %</td>'
        f'<td><div class="bar" style="width: {120 * count / total:.0f}px"></div></td></tr>'
        for name, count in rows)
    return f"<div><h2>{title}</h2><table>{lines or '<tr><td>none</td></tr>'}</table></div>"


def _captions(manifest: Manifest, with_positions: bool) -> str:
    """How many, and examples, which may name a place."""
    said = [text for text in texts(manifest, "caption") if text]
    if not said:
        return "<p>No photo has one.</p>"
    examples = said[:: max(1, len(said) // 8)][:8] if with_positions else []
    listed = "".join(f"<li>{html.escape(textwrap.shorten(text, 300))}</li>" for text in examples)
    return f"<p>{len(said):,} of {len(manifest.rows):,} photos have one.</p><ul>{listed}</ul>"
