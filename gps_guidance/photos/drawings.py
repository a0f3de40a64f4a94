"""The drawings of a report on a dataset: map, rose of bearings, bars, contact sheet. No torch."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from gps_guidance import geo
from gps_guidance.photos.manifest import Manifest
from gps_guidance.photos.troubles import GRID, bin_counts, cell_counts, numbers, times

INK, SOFT, BLUE, RED = "#333333", "#d9d9d9", "#2f6f9f", "#c0342b"
MANY = 1500  # photos, above which the map shows densities and not points


@dataclass
class Cell:
    """A place in the contact sheet: what it is, how many photos it has, and one of them."""

    label: str
    count: int
    picture: Image.Image


def east_north(manifest: Manifest) -> np.ndarray:
    """Metres [N, 2] from the landmark's centre, the middle of the box, or the median photo."""
    latlon = np.stack([numbers(manifest, "lat"), numbers(manifest, "lon")], axis=1)
    box = manifest.bounds
    middle = ((box.south + box.north) / 2, (box.west + box.east) / 2) if box else (
        tuple(np.median(latlon, axis=0)))
    return geo.local_m(latlon, manifest.center or middle)


def extent(manifest: Manifest, metres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """South-west and north-east corner [2] of what the map shows: all photos but a far hundredth,
    and the centre of a landmark."""
    low, high = np.quantile(metres, (0.005, 0.995), axis=0)
    if manifest.center:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    return low, high


def draw_map(axes: Axes, manifest: Manifest) -> None:
    metres = east_north(manifest)
    low, high = extent(manifest, metres)
    half = max(float((high - low).max()) / 2 * 1.1, 5.0)
    (x, y) = (low + high) / 2
    inside = (np.abs(metres - (x, y)) <= half).all(axis=1)
    points = metres[inside]
    if len(points) > MANY:
        drawn = axes.hexbin(points[:, 0], points[:, 1], gridsize=36, mincnt=1, norm=LogNorm(),
                            cmap="YlGnBu", linewidths=0.1,
                            extent=(x - half, x + half, y - half, y + half))
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.7, pad=0.02, format="%g")
        bar.set_label("photos in a cell", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    else:
        size = float(np.clip(3000 / max(len(points), 1), 6, 36))
        axes.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, alpha=0.6, linewidths=0)
    if manifest.center:
        axes.plot(0, 0, marker="*", markersize=15, color=RED, markeredgecolor="white")
        distance = float(np.median(np.hypot(*points.T)))
        axes.add_patch(Circle((0, 0), distance, fill=False, color=RED, linewidth=0.8,
                              linestyle=":"))
    axes.set(xlim=(x - half, x + half), ylim=(y - half, y + half), aspect="equal")
    axes.set_xlabel("metres east", fontsize=8, color=INK)
    axes.set_ylabel("metres north", fontsize=8, color=INK)
    axes.grid(color=SOFT, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    beyond = f", {len(metres) - len(points):,} beyond" if not inside.all() else ""
    ring = "; dotted: their median distance" if manifest.center else ""
    _name(axes, f"Where ({len(points):,} photos{beyond}{ring})")


def draw_rose(axes: Any, manifest: Manifest) -> None:
    """Photos in each bearing bin; the empty ones are red at the rim."""
    counts = bin_counts(manifest)
    width = 2 * np.pi / len(counts)
    angles = width * np.arange(len(counts))
    top = max(int(counts.max()), 1)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.bar(angles, counts, width * 0.92, color=BLUE)
    empty = counts == 0
    axes.bar(angles[empty], 0.05 * top, width * 0.92, bottom=1.02 * top, color=RED)
    axes.set_ylim(0, 1.08 * top)
    axes.set_thetagrids(range(0, 360, 30))
    axes.set_rgrids([top / 2, top], ["", ""])
    axes.grid(color=SOFT, linewidth=0.6)
    axes.spines["polar"].set_visible(False)
    _name(axes, f"Bearings: up to {top:,} photos in a bin, {int(empty.sum())} of {len(counts)} "
          "bins empty (red)")


def draw_numbers(axes: Axes, manifest: Manifest) -> None:
    """How many cells of a city hold how many photos."""
    counts = cell_counts(manifest).ravel()
    axes.bar(range(len(counts)), np.sort(counts)[::-1], width=1.0, color=BLUE)
    axes.set_xlim(-0.5, len(counts) - 0.5)
    axes.set_xticks([])
    axes.spines[["top", "right"]].set_visible(False)
    empty = int((counts == 0).sum())
    _name(axes, f"Photos in each of {GRID} x {GRID} cells, the fullest first; {empty} empty")


def draw_bars(axes: Axes, title: str, rows: list[tuple[str, int]], longest: int) -> None:
    """A bar for each row, as thick as where there are ``longest`` of them."""
    labels = [textwrap.shorten(name, 26, placeholder="...") or name[:26] for name, _ in rows]
    counts = [count for _, count in rows]
    bars = axes.barh(range(len(rows)), counts, color=BLUE, height=0.65)
    axes.bar_label(bars, [f" {count:,}" for count in counts], fontsize=8, color=INK)
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.set_ylim(longest - 0.4, -0.6)
    axes.set_xlim(0, 1.2 * max(counts, default=1))
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if not rows:
        axes.text(0.02, 0.9, "none", transform=axes.transAxes, color=INK, va="top")
    _name(axes, title)


def draw_dates(axes: Axes, manifest: Manifest) -> None:
    """By month, or by year if that makes more than three years."""
    when = times(manifest)
    months = np.array([t.year * 12 + t.month - 1 for t in when], dtype=int)
    by_year = len(months) > 0 and np.ptp(months) > 36
    steps = months // 12 if by_year else months
    if len(steps):
        counts = np.bincount(steps - steps.min())
        axes.bar(range(len(counts)), counts, color=BLUE)
        shown = range(0, len(counts), max(1, len(counts) // 6))
        first = int(steps.min())
        axes.set_xticks(shown, [str(first + k) if by_year else
                                f"{(first + k) // 12}-{(first + k) % 12 + 1:02d}" for k in shown])
        axes.set_xlim(min(-0.6, len(counts) / 2 - 3), max(len(counts) - 0.4, len(counts) / 2 + 2))
    _clean(axes, f"Photos by {'year' if by_year else 'month'}", len(when))


def draw_hours(axes: Axes, manifest: Manifest) -> None:
    when = times(manifest)
    axes.bar(range(24), np.bincount([t.hour for t in when] or [0], minlength=24) * bool(when),
             color=BLUE)
    axes.set_xticks(range(0, 24, 3))
    axes.set_xlim(-0.6, 23.6)
    _clean(axes, "Photos by hour of day, local time", len(when))


def _clean(axes: Axes, title: str, count: int) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if not count:
        axes.axis("off")
        axes.text(0.02, 0.9, "no photo says when", transform=axes.transAxes, color=INK, va="top")
    _name(axes, title)


def _name(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, parse_math=False)
    axes.tick_params(labelsize=8, colors=INK)


def draw_sheet(axes: Axes, columns: int, cells: list[Cell], title: str) -> None:
    width, height = cells[0].picture.size
    gap, label = 6, 18 if any(cell.label for cell in cells) else 6
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * (width + gap), rows * (height + label)), "white")
    for k, cell in enumerate(cells):
        left, top = k % columns * (width + gap), k // columns * (height + label) + label
        sheet.paste(cell.picture, (left, top))
        axes.text(left + width / 2, top - 4, cell.label, fontsize=7, ha="center", color=INK)
    axes.imshow(sheet)
    axes.axis("off")
    _name(axes, title)
