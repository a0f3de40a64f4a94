"""Maps of areas, streets and locations, and of where a model looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.path
import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from shapely.geometry.polygon import orient

from gps_guidance import areas, geo
from gps_guidance.lift.export import staged

PAPER, GROUND, OUTLINE, STREET, POINT = "#fbfaf7", "#dcebd3", "#4d6b43", "#9a9a9a", "#c0342b"
INK = "#333333"
MARGIN, STRIP = 0.06, 0.1  # of the map's longer side: around it, and below it for the scale bar
MAX_STRETCH = 4.0  # a longer and thinner area gets more paper on its sides
COLUMNS, HEAT, VEIL = 5, "inferno", 0.7  # of attention sheets: panels a row, colours, opacity


def draw_area(
    area: Any,
    points: ArrayLike | None = None,
    path: str | Path | None = None,
    streets: Any = None,
    title: str | None = None,
) -> Figure:
    """A north-up map of an area with its holes, a scale bar and ticks in degrees.

    ``area`` as in :func:`gps_guidance.areas.read_area`, ``streets`` as in
    :func:`gps_guidance.areas.read_streets`, ``points`` (lat, lon) [M, 2] in degrees. A metre is as
    long to the east as to the north at the middle latitude, where the scale bar is true. With
    ``path`` the map is also written there as a PNG, whole or not at all.
    """
    outline = areas.read_area(area)
    lines = None if streets is None else areas.read_streets(streets)
    latlon = np.empty((0, 2)) if points is None else geo.check_lat_lon(points, "points")
    shown = shapely.union(outline, shapely.multipoints(latlon[..., ::-1].reshape(-1, 2)))
    box = _frame(*shown.bounds)
    metres_east, metres_north = _metres_per_degree(box)
    shape = (box.north - box.south) * metres_north / ((box.east - box.west) * metres_east)
    size = 6.4
    figure = Figure(figsize=(size, float(np.clip(size * shape, 2.2, 9.0)) + 0.6),
                    layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor=PAPER)
    _draw_polygons(axes, outline)
    if lines is not None:
        segments = [shapely.get_coordinates(line) for line in lines.geoms]
        axes.add_collection(LineCollection(segments, colors=STREET, linewidths=1.0, zorder=2))
    point_size = float(np.clip(3000 / max(len(latlon), 1), 2.0, 24.0))
    axes.scatter(latlon[..., 1], latlon[..., 0], s=point_size, color=POINT, linewidths=0.4,
                 edgecolors="white", zorder=3)
    axes.set(xlim=(box.west, box.east), ylim=(box.south, box.north),
             aspect=metres_north / metres_east)
    axes.set_title(title or "", color=INK)
    _draw_ticks(axes)
    _draw_scale(axes, box, metres_east)
    _draw_north(axes)
    if path is not None:
        _save(figure, path)
    return figure


def draw_attention(image: Any, maps: ArrayLike, names: Sequence[str],
                   path: str | Path | None = None) -> Figure:
    """A sheet of an image, and of it in grey under each of its attention maps with a colour bar.

    ``image`` is a PIL image or an array [H, W, 3], ``maps`` [T, H, W] and ``names`` are those of
    :class:`gps_guidance.attention.AttentionMaps`. Each map has colours of its own, from its least
    to its greatest value, which the bar says: raw maps are in per cent of the attention. With
    ``path`` the sheet is also written there as a PNG, whole or not at all.
    """
    picture, heat = np.asarray(image), np.asarray(maps)
    if heat.ndim != 3 or len(heat) != len(names) or not len(names):
        raise ValueError(f"There are {len(names)} names for maps of shape {list(heat.shape)}; give "
                         "maps [T, H, W] and T names.")
    if heat.shape[1:] != picture.shape[:2]:
        raise ValueError(f"The maps are {heat.shape[1]} x {heat.shape[2]}, the image is "
                         f"{picture.shape[0]} x {picture.shape[1]}: take the maps at its size, "
                         "(image.height, image.width).")
    rows = math.ceil((1 + len(names)) / COLUMNS)
    columns = math.ceil((1 + len(names)) / rows)
    grey = picture.reshape(*heat.shape[1:], -1).mean(-1)  # so that colour is attention's alone
    height = 2.0 * picture.shape[0] / picture.shape[1] + 0.3
    figure = Figure(figsize=(2.4 * columns, height * rows), layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    panels[0].imshow(picture)
    panels[0].set_title("image", color=INK, fontsize=9)
    for axes, name, one in zip(panels[1:], names, heat, strict=False):
        axes.imshow(grey, cmap="gray")
        shown = axes.imshow(100 * one, cmap=HEAT, alpha=VEIL)
        axes.set_title(name, color=INK, fontsize=9)
        bar = figure.colorbar(shown, ax=axes, shrink=0.8, format="%.3g %%")
        bar.locator = MaxNLocator(4)
        bar.ax.tick_params(labelsize=7, colors=INK)
    if path is not None:
        _save(figure, path)
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    with staged(path) as stage:
        figure.savefig(stage, format="png", dpi=150, bbox_inches="tight")


def _metres_per_degree(box: geo.Bounds) -> tuple[float, float]:
    """Metres per degree of longitude and of latitude in the middle of a box."""
    lat, lon = (box.south + box.north) / 2, (box.west + box.east) / 2
    step = 1e-4
    east, north = geo.local_m([[lat, lon + step], [lat + step, lon]], (lat, lon)) / step
    return float(east[0]), float(north[1])


def _frame(west: float, south: float, east: float, north: float) -> geo.Bounds:
    """What the map shows: these bounds in degrees, a margin, and a strip below."""
    metres_east, metres_north = _metres_per_degree(geo.Bounds(south, west, north, east))
    width, height = (east - west) * metres_east, (north - south) * metres_north
    longer = max(width, height)
    side = max(MARGIN * longer, (longer / MAX_STRETCH - width) / 2) / metres_east
    end = max(MARGIN * longer, (longer / MAX_STRETCH - height) / 2) / metres_north
    strip = STRIP * min(longer, 2 * (width + 2 * side * metres_east)) / metres_north
    return geo.Bounds(max(south - end - strip, -90), max(west - side, -180),
                      min(north + end, 90), min(east + side, 180))


def _draw_polygons(axes: Axes, outline: Any) -> None:
    """Fill and outline; a hole stays empty because its ring runs the other way round."""
    rings = []
    for polygon in map(orient, shapely.get_parts(outline)):
        for ring in (polygon.exterior, *polygon.interiors):
            rings.append(matplotlib.path.Path(shapely.get_coordinates(ring), closed=True))
    compound = matplotlib.path.Path.make_compound_path(*rings)
    axes.add_patch(PathPatch(compound, facecolor=GROUND, edgecolor=OUTLINE, linewidth=1.2))


def _draw_ticks(axes: Axes) -> None:
    for axis, ends in ((axes.xaxis, "EW"), (axes.yaxis, "NS")):
        low, high = axis.get_view_interval()
        ticks = np.asarray(MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high))
        places = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        axis.set_ticks(ticks, [f"{abs(tick):.{places}f}° {ends[int(tick < 0)]}" for tick in ticks])
    axes.tick_params(labelsize=8, colors=INK, direction="in", top=True, right=True)
    for spine in axes.spines.values():
        spine.set_color(INK)


def _round_length(metres: float) -> float:
    """The longest of 1, 2 or 5 times a power of ten that is not above ``metres``."""
    unit = 10.0 ** math.floor(math.log10(metres))
    return max(step * unit for step in (1, 2, 5) if step * unit <= metres)


def _draw_scale(axes: Axes, box: geo.Bounds, metres_east: float) -> None:
    width = (box.east - box.west) * metres_east
    length = _round_length(0.35 * width)
    text = f"{length:g} m" if length < 1000 else f"{length / 1000:g} km"
    left, right, y = 0.04, 0.04 + length / width, 0.035
    place = axes.transAxes
    axes.plot([left, right], [y, y], color=INK, linewidth=2.5, solid_capstyle="butt",
              transform=place)
    axes.annotate(text, ((left + right) / 2, y), (0, 4), xycoords=place,
                  textcoords="offset points", ha="center", va="bottom", fontsize=8, color=INK)


def _draw_north(axes: Axes) -> None:
    axes.annotate("N", (0.95, 0.03), (0, 20), xycoords="axes fraction", textcoords="offset points",
                  ha="center", va="bottom", fontsize=9, color=INK,
                  arrowprops={"arrowstyle": "<|-", "color": INK, "shrinkA": 0, "shrinkB": 0})
