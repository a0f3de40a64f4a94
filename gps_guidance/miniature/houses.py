"""The five quarters of the city: rows of houses that differ in roof, windows, colour and street."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gps_guidance.miniature.canvas import Canvas, Colour, mix

DARK = (52, 46, 44)


def windows(canvas: Canvas, rng: np.random.Generator, box: tuple[float, float, float, float],
            columns: int, rows: int, colour: Colour, fill: tuple[float, float]) -> None:
    """A grid of windows in the box (x0, y0, x1, y1), each a part ``fill`` of its cell."""
    x0, y0, x1, y1 = box
    width, height = (x1 - x0) / columns, (y1 - y0) / rows
    w, h = width * fill[0] / 2, height * fill[1] / 2
    for column in range(columns):
        for row in range(rows):
            x, y = x0 + (column + 0.5) * width, y0 + (row + 0.5) * height
            canvas.window(x - w, y - h, x + w, y + h, colour, rng.random() < 0.65)


def gabled(canvas: Canvas, rng: np.random.Generator, x0: float, x1: float, top: float,
           base: float, wall: Colour) -> None:
    """Half-timbered, with a steep gable."""
    middle, timber = (x0 + x1) / 2, (136, 88, 60)
    canvas.rect(x0, top, x1, base, wall)
    canvas.poly([(x0, top), (middle, top - 17), (x1, top)], wall)
    roof = canvas.under_snow((140, 58, 44), 0.75)
    canvas.line([(x0 - 1, top + 1), (middle, top - 18), (x1 + 1, top + 1)], 4.5, roof)
    for y in (top + 1, (top + base) / 2):
        canvas.line([(x0, y), (x1, y)], 1.8, timber)
    for x in (x0 + 0.8, x1 - 0.8):
        canvas.line([(x, top), (x, base)], 1.8, timber)
    windows(canvas, rng, (x0 + 1, top + 1, x1 - 1, base - 2), 2, 2, (104, 106, 112), (0.46, 0.52))
    canvas.window(middle - 2.5, top - 8, middle + 2.5, top - 2.5, (104, 106, 112), True)


def mansarded(canvas: Canvas, rng: np.random.Generator, x0: float, x1: float, top: float,
              base: float, wall: Colour) -> None:
    """Pale stone under a tall slate roof with dormers; balconies of iron."""
    canvas.rect(x0, top, x1, base, wall)
    canvas.poly([(x0, top), (x0 + 3, top - 15), (x1 - 3, top - 15), (x1, top)],
                canvas.under_snow((92, 104, 130), 0.55))
    windows(canvas, rng, (x0 + 2, top - 13, x1 - 2, top), 3, 1, (196, 196, 190), (0.5, 0.62))
    canvas.rect(x0, top - 0.5, x1, top + 2, mix(wall, (255, 255, 255), 0.5))
    windows(canvas, rng, (x0 + 1, top + 2, x1 - 1, base - 3), 3, 2, (132, 134, 140), (0.44, 0.72))
    for part in (0.5, 0.98):
        y = top + 2 + (base - 3 - top - 2) * part
        canvas.line([(x0 + 1, y - 1), (x1 - 1, y - 1)], 1.4, (112, 108, 106))


def lofty(canvas: Canvas, rng: np.random.Generator, x0: float, x1: float, top: float,
          base: float, wall: Colour) -> None:
    """A works of brick: saw-tooth roof, wide windows, now and then a chimney."""
    if rng.random() < 0.55:
        x = rng.uniform(x0 + 4, x1 - 8)
        canvas.rect(x, top - 32, x + 5, top, mix(wall, DARK, 0.25))
        canvas.rect(x - 0.8, top - 32, x + 5.8, top - 29, canvas.under_snow((214, 206, 196), 0.8))
    teeth = 2
    step = (x1 - x0) / teeth
    for k in range(teeth):
        left = x0 + k * step
        canvas.poly([(left, top), (left, top - 11), (left + step, top)],
                    canvas.under_snow((112, 118, 124), 0.75))
    canvas.rect(x0, top, x1, base, wall)
    canvas.rect(x0, top, x1, top + 1.8, mix(wall, DARK, 0.25))
    windows(canvas, rng, (x0, top + 2, x1, base - 1), 2, 2, (104, 114, 116), (0.7, 0.66))


def glassy(canvas: Canvas, rng: np.random.Generator, x0: float, x1: float, top: float,
           base: float, wall: Colour) -> None:
    """A tower of glass, floor by floor."""
    canvas.rect(x0, top, x1, base, wall)
    pale = mix(wall, (255, 255, 255), 0.36)
    floors = max(3, round((base - top) / 9))
    height = (base - top) / floors
    for k in range(floors):
        y = top + k * height
        if rng.random() < 0.45:
            canvas.window(x0, y, x1, y + height, mix(wall, (255, 255, 255), 0.16), True)
        canvas.rect(x0, y, x1, y + 1.8, pale)
    canvas.rect(x0, top - 2, x1, top, canvas.under_snow(pale, 0.9))
    canvas.rect(x1 - 2.6, top, x1, base, mix(wall, (10, 20, 40), 0.45))


def whitewashed(canvas: Canvas, rng: np.random.Generator, x0: float, x1: float, top: float,
                base: float, wall: Colour) -> None:
    """A white cube with blue doors, some under a blue dome."""
    middle, blue = (x0 + x1) / 2, (30, 94, 190)
    if rng.random() < 0.5:
        canvas.half_disc(middle, top + 0.5, 8.5, 10, canvas.under_snow((44, 112, 206), 0.4))
    else:
        canvas.rect(x0 + 3, top - 9, middle + 2, top, mix(wall, (200, 206, 220), 0.5))
    canvas.rect(x0, top, x1, base, wall)
    canvas.rect(x1 - 3.5, top, x1, base, mix(wall, (150, 170, 206), 0.45))
    windows(canvas, rng, (x0 + 1, top + 3, x1 - 4, (top + base) / 2 + 3), 2, 1, blue, (0.36, 0.62))
    door = x0 + (x1 - x0) * (0.3 if rng.random() < 0.5 else 0.66)
    canvas.half_disc(door, base - 11, 3.6, 4, blue)
    canvas.rect(door - 3.6, base - 11.5, door + 3.6, base, blue)
    if rng.random() < 0.6:  # bougainvillea
        for dx, dy, r in ((0, 0, 3.4), (3.5, 2.5, 3), (-2.5, 3.5, 2.8)):
            canvas.disc(x0 + 3 + dx, top + 3 + dy, r, canvas.under_snow((220, 50, 140), 0.4))


House = Callable[[Canvas, np.random.Generator, float, float, float, float, Colour], None]


@dataclass(frozen=True)
class Quarter:
    """How a quarter builds: its houses, and ``ground_y``, where the street begins (a narrow street
    lies low in the picture). Ranges are in the canvas's units."""

    house: House
    walls: tuple[Colour, ...]
    width: tuple[float, float]
    top: tuple[float, float]
    ground_y: float
    ground: Colour
    gap: float = 0.0


QUARTERS = {
    "old-town": Quarter(gabled, ((236, 190, 110), (226, 142, 96), (240, 214, 160), (206, 120, 92)),
                        (21, 26), (34, 42), 78, (158, 138, 118)),
    "boulevards": Quarter(mansarded, ((234, 222, 190), (226, 212, 178)), (34, 40), (27, 29), 63,
                          (150, 150, 156)),
    "lofts": Quarter(lofty, ((164, 74, 56), (146, 62, 50), (178, 92, 68)), (36, 46), (34, 42), 73,
                     (112, 108, 110)),
    "downtown": Quarter(glassy, ((64, 122, 156), (72, 146, 168), (92, 112, 150), (48, 96, 126)),
                        (16, 25), (6, 34), 70, (186, 190, 196), gap=2.5),
    "hilltop": Quarter(whitewashed, ((248, 248, 246), (240, 242, 246)), (24, 31), (34, 48), 72,
                          (226, 204, 160)),
}


def draw_row(canvas: Canvas, rng: np.random.Generator, quarter: Quarter, span: float = 100
             ) -> None:
    """A row of houses from x = 0 to ``span``, standing on ``quarter.ground_y``."""
    x, last = -rng.uniform(2, 20), -1
    while x < span:
        width, top = rng.uniform(*quarter.width), rng.uniform(*quarter.top)
        pick = int(rng.integers(len(quarter.walls)))
        last = pick if pick != last else (pick + 1) % len(quarter.walls)  # neighbours differ
        quarter.house(canvas, rng, x, x + width, top, quarter.ground_y, quarter.walls[last])
        x += width + quarter.gap
