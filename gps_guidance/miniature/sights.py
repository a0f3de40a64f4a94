"""Landmarks, park, river and museums of the city: what is behind the object of a photo there.

A landmark is drawn around (0, 0), the middle of its foot, about 80 units high.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gps_guidance.miniature.canvas import Canvas, Colour, mix
from gps_guidance.miniature.houses import QUARTERS, draw_row, windows

Rng = np.random.Generator
INK = (44, 44, 54)
GREENS = ((66, 140, 62), (84, 158, 70), (52, 122, 66))


def draw_tree(canvas: Canvas, x: float, y: float, size: float, green: Colour) -> None:
    """A round tree that stands at (x, y)."""
    leaves = canvas.under_snow(green, 0.45)
    canvas.rect(x - 0.09 * size, y - 0.5 * size, x + 0.09 * size, y, (104, 74, 52))
    canvas.disc(x, y - 0.72 * size, 0.4 * size, leaves)
    canvas.disc(x - 0.2 * size, y - 0.56 * size, 0.26 * size, leaves)
    canvas.disc(x + 0.22 * size, y - 0.58 * size, 0.26 * size, leaves)
    canvas.disc(x - 0.1 * size, y - 0.82 * size, 0.2 * size,
                canvas.under_snow(mix(green, (220, 240, 120), 0.25), 0.9))


def draw_fir(canvas: Canvas, x: float, y: float, size: float) -> None:
    canvas.rect(x - 0.06 * size, y - 0.2 * size, x + 0.06 * size, y, (92, 66, 48))
    for foot, width in ((0.15, 0.34), (0.42, 0.27), (0.68, 0.19)):
        canvas.poly([(x - width * size, y - foot * size), (x, y - (foot + 0.42) * size),
                     (x + width * size, y - foot * size)],
                    canvas.under_snow((36, 104, 74), 0.35 if foot < 0.6 else 0.85))


# --- landmarks -------------------------------------------------------------------------------


def clock_tower(pen: Canvas, rng: Rng) -> None:
    stone, shade = (222, 192, 146), (186, 152, 110)
    pen.rect(-14, -58, 14, 0, stone)
    pen.rect(8, -58, 14, 0, shade)
    pen.rect(-18, -62, 18, -57, mix(stone, (255, 255, 255), 0.4))
    pen.poly([(-17, -62), (0, -88), (17, -62)], pen.under_snow((52, 96, 92), 0.6))
    pen.disc(0, -44, 11.5, INK)
    pen.disc(0, -44, 9.5, (255, 246, 214), shines=pen.weather.dark)
    pen.line([(0, -51), (0, -44), (5, -41)], 2, INK)
    pen.rect(-5, -26, 4, -16, INK)


def dome(pen: Canvas, rng: Rng) -> None:
    stone, copper = (226, 226, 218), (72, 168, 140)
    for x in (-38, 38):
        pen.rect(x - 7, -44, x + 7, 0, mix(stone, INK, 0.12))
        pen.half_disc(x, -43, 7, 12, pen.under_snow(copper, 0.5))
        pen.window(x - 2, -38, x + 2, -28, INK, True)
    pen.half_disc(0, -44, 25, 32, pen.under_snow(copper, 0.5))
    pen.line([(0, -75), (0, -88)], 2.2, (226, 186, 70))
    pen.rect(-22, -50, 22, -36, stone)
    windows(pen, rng, (-21, -50, 21, -37), 5, 1, (120, 122, 126), (0.45, 0.66))
    pen.rect(-31, -36, 31, 0, stone)
    pen.poly([(-33, -28), (0, -42), (33, -28)], mix(stone, (255, 255, 255), 0.6))
    pen.rect(-28, -27, 28, 0, (158, 156, 156))
    for x in (-24, -12, 12, 24):
        pen.rect(x - 3, -27, x + 3, 0, mix(stone, (255, 255, 255), 0.2))
    pen.window(-5, -20, 5, 0, INK, True)


CABINS = ((222, 62, 62), (250, 200, 60), (70, 130, 220), (90, 180, 90))


def ferris_wheel(pen: Canvas, rng: Rng) -> None:
    steel, turn = (206, 214, 228), float(rng.uniform(0, math.pi / 4))
    pen.line([(-20, 0), (0, -46), (20, 0)], 4, mix(steel, INK, 0.3))
    rim = [turn + k * math.pi / 4 for k in range(8)]
    for angle in rim[:4]:
        x, y = 34 * math.cos(angle), 34 * math.sin(angle)
        pen.line([(-x, -46 - y), (x, -46 + y)], 1.5, steel)
    pen.ring(0, -46, 36, 3.4, (214, 84, 140), shines=pen.weather.dark)
    for k, angle in enumerate(rim):
        x, y = 35 * math.cos(angle), -46 + 35 * math.sin(angle)
        pen.round_rect(x - 5, y - 1, x + 5, y + 9, 3, CABINS[k % 4], shines=pen.weather.dark)
    pen.disc(0, -46, 5, (214, 84, 140))


LANDMARK_DRAW: dict[str, Callable[[Canvas, Rng], None]] = {
    "clock-tower": clock_tower, "dome": dome, "ferris-wheel": ferris_wheel,
}


def clock_square(canvas: Canvas, rng: Rng) -> float:
    """Arcades around a square of pale stone; returns where the ground begins."""
    wall, y = (214, 150, 116), 70
    canvas.rect(0, 46, 100, y, wall)
    canvas.rect(0, 43, 100, 47, canvas.under_snow((160, 80, 62), 0.75))
    start = -float(rng.uniform(0, 14))
    for k in range(9):
        x = start + 14 * k
        canvas.half_disc(x, 60, 4.8, 6, (140, 92, 78))
        canvas.rect(x - 4.8, 59.8, x + 4.8, y, (140, 92, 78))
        canvas.window(x - 2, 48.5, x + 2, 52.5, (140, 92, 78), rng.random() < 0.5)
    draw_ground(canvas, y, (216, 200, 180))
    clock_tower(canvas.at(50 + rng.normal(0, 9), y + 2, rng.uniform(0.72, 0.8)), rng)
    return y


def dome_square(canvas: Canvas, rng: Rng) -> float:
    y = 68
    for x in (2, 16, 84, 98):
        draw_fir(canvas, x + rng.normal(0, 2), y, rng.uniform(24, 32))
    draw_ground(canvas, y, (172, 172, 170))
    dome(canvas.at(50 + rng.normal(0, 7), y + 1, rng.uniform(0.76, 0.84)), rng)
    for k in range(4):
        canvas.rect(0, y + 5 + 8 * k, 100, y + 6.2 + 8 * k, canvas.under_snow((150, 150, 150), 0.9))
    return y


def fairground(canvas: Canvas, rng: Rng) -> float:
    y = 70
    ferris_wheel(canvas.at(50 + rng.normal(0, 8), y, rng.uniform(0.78, 0.84)), rng)
    draw_ground(canvas, y, (206, 158, 96))
    for tent, stripe in ((8, (224, 70, 60)), (92, (60, 120, 200))):
        x = tent + rng.normal(0, 3)
        canvas.rect(x - 13, y - 12, x + 13, y + 1, (244, 236, 214))
        for k in (-8.5, 0, 8.5):
            canvas.rect(x + k - 2.2, y - 12, x + k + 2.2, y + 1, stripe)
        canvas.poly([(x - 16, y - 11), (x, y - 24), (x + 16, y - 11)],
                    canvas.under_snow(stripe, 0.5))
    return y


# --- park and river --------------------------------------------------------------------------


def draw_ground(canvas: Canvas, y: float, ground: Colour, snow: float = 0.86) -> None:
    """Ground from ``y`` down, with a kerb; it shines when wet."""
    canvas.rect(0, y, 100, 100, canvas.under_snow(ground, snow))
    canvas.rect(0, y, 100, y + 2, canvas.under_snow(mix(ground, (255, 255, 255), 0.25), snow))
    if canvas.weather.wet:
        for x, row in ((20, y + 9), (74, y + 15), (40, y + 24)):
            canvas.disc(x, row, 15, (*canvas.weather.sky[1], 80), 1.8)


def park(canvas: Canvas, rng: Rng) -> float:
    y = 58
    canvas.rect(0, 44, 100, y, canvas.under_snow((58, 116, 70), 0.3))
    for k in range(7):
        canvas.disc(16 * k + rng.normal(0, 3), 45, 11, canvas.under_snow((58, 116, 70), 0.3), 8)
    draw_ground(canvas, y, (112, 178, 74), 0.8)
    left, bend = rng.uniform(30, 55), rng.normal(0, 10)
    near = left + bend
    canvas.poly([(left, y + 2), (left + 7, y + 2), (near + 40, 100), (near - 22, 100)],
                canvas.under_snow((220, 196, 150), 0.55))
    canvas.disc(rng.uniform(8, 24), y + 11, 12, (112, 176, 214), 3)  # a pond
    for x in (rng.uniform(2, 16), rng.uniform(66, 80), rng.uniform(88, 99)):
        if rng.random() < 0.3:
            draw_fir(canvas, x, y + 5, rng.uniform(38, 50))
        else:
            draw_tree(canvas, x, y + 5, rng.uniform(40, 54), GREENS[rng.integers(3)])
    return y + 8


def river(canvas: Canvas, rng: Rng) -> float:
    """The quay, the water, and the bridge with its three arches."""
    bank, quay = 47.0, 76.0
    for k in range(8):
        draw_tree(canvas, 14 * k + rng.normal(0, 3), bank + 2, rng.uniform(15, 22),
                  GREENS[rng.integers(3)])
    canvas.rect(0, bank - 2, 100, bank + 2, canvas.under_snow((150, 140, 130), 0.5))
    water, pale = (52, 124, 176), (118, 180, 214)
    canvas.rect(0, bank + 2, 100, quay, water)
    for _ in range(7):
        x, y = rng.uniform(0, 100), rng.uniform(bank + 14, quay - 3)
        canvas.rect(x - 9, y - 0.6, x + 9, y + 0.6, pale)
    stone, middle = (204, 190, 170), 50 + rng.normal(0, 8)
    canvas.poly([(-2, 46), (middle, 37), (102, 46), (102, 61), (-2, 61)], stone)
    for x in (middle - 34, middle, middle + 34):
        canvas.half_disc(x, 61, 13, 15, mix(water, (20, 40, 60), 0.35))
    canvas.line([(-2, 45), (middle, 36), (102, 45)], 2.6,
                canvas.under_snow(mix(stone, (110, 90, 80), 0.5), 0.9))
    draw_ground(canvas, quay, (186, 176, 164))
    return quay


# --- museums ---------------------------------------------------------------------------------


def gallery(canvas: Canvas, rng: Rng) -> Canvas:
    """A green hall with a framed painting; returns the canvas on which its subject is painted."""
    wall = mix((34, 98, 74), (40, 84, 70), rng.random())
    canvas.rect(0, 0, 100, 100, wall)
    canvas.rect(0, 0, 100, 5, mix(wall, (255, 255, 255), 0.35))
    canvas.rect(0, 82, 100, 100, (150, 98, 58))
    canvas.rect(0, 79, 100, 83, (92, 56, 36))
    for k in range(4):
        canvas.line([(50 + 22 * (k - 1.5), 83), (50 + 40 * (k - 1.5), 100)], 1, (122, 76, 46))
    x, y = 50 + rng.normal(0, 3), 40 + rng.normal(0, 1)
    w, h = rng.uniform(31, 33), rng.uniform(29, 31)
    for side in (-1, 1):  # the neighbours on the wall
        canvas.rect(x + side * 53 - 13, y - 16, x + side * 53 + 13, y + 16, (206, 160, 60))
        canvas.rect(x + side * 53 - 10, y - 13, x + side * 53 + 10, y + 13,
                    ((196, 170, 140), (120, 140, 160), (170, 130, 120))[rng.integers(3)])
    canvas.poly([(x - 20, 0), (x + 20, 0), (x + w + 12, 76), (x - w - 12, 76)],
                (255, 240, 190, 26))
    canvas.rect(x - w - 5, y - h - 5, x + w + 5, y + h + 5, (214, 168, 64))
    air, earth = (((236, 214, 176), (186, 150, 106)), ((198, 208, 212), (146, 148, 120)),
                  ((232, 200, 186), (164, 128, 122)))[rng.integers(3)]
    canvas.rect(x - w, y - h, x + w, y + h, air)
    canvas.rect(x - w, y + h * 0.35, x + w, y + h, earth)
    return canvas.at(x + rng.normal(0, 2), y + h * 0.82, 0.95)


def sculpture_hall(canvas: Canvas, rng: Rng) -> Canvas:
    """A rose hall with columns and a plinth; returns the canvas on which the statue stands."""
    wall = mix((196, 124, 142), (204, 136, 146), rng.random())
    canvas.rect(0, 0, 100, 100, wall)
    x = 50 + rng.normal(0, 3)
    niche = mix(wall, (116, 56, 84), 0.3)
    canvas.half_disc(x, 34, 31, 28, niche)
    canvas.rect(x - 31, 33.5, x + 31, 80, niche)
    canvas.rect(0, 80, 100, 100, (214, 202, 206))
    for k in range(5):
        canvas.poly([(x + 24 * (k - 2) - 6, 80), (x + 24 * (k - 2) + 6, 80),
                     (x + 40 * (k - 2) + 10, 100), (x + 40 * (k - 2) - 10, 100)], (150, 112, 124))
    for side in (-1, 1):
        c = x + side * 42
        canvas.rect(c - 6, 6, c + 6, 80, (236, 232, 228))
        canvas.rect(c + 2, 6, c + 6, 80, (204, 198, 204))
        canvas.rect(c - 8.5, 2, c + 8.5, 8, (244, 240, 236))
        canvas.rect(c - 8.5, 78, c + 8.5, 84, (222, 218, 220))
    canvas.disc(x, 93, 27, (70, 40, 50, 110), 4)
    canvas.rect(x - 21, 70, x + 21, 93, (238, 236, 232))
    canvas.rect(x + 12, 70, x + 21, 93, (206, 202, 206))
    canvas.rect(x - 24, 67, x + 24, 71.5, (250, 248, 244))
    return canvas.at(x, 67.5, 1.0)


# --- the whole behind the object -------------------------------------------------------------


def street(name: str) -> Callable[[Canvas, Rng], float]:
    """What draws a street of this quarter."""
    quarter = QUARTERS[name]

    def draw(canvas: Canvas, rng: Rng) -> float:
        y = quarter.ground_y
        draw_row(canvas, rng, quarter)
        draw_ground(canvas, y, quarter.ground)
        if name == "boulevards":
            for x in (rng.uniform(0, 24), rng.uniform(70, 100)):
                draw_tree(canvas, x, y + 7, 30, GREENS[1])
            for k in range(4):
                canvas.rect(30 * k, 83, 30 * k + 15, 85, canvas.under_snow((236, 236, 232), 0.5))
        if name == "downtown":
            left = rng.uniform(5, 60)
            for k in range(5):
                canvas.rect(left + 8 * k, y + 6, left + 8 * k + 4, y + 14, (240, 242, 244))
        return y

    return draw


BACKDROPS: dict[str, Callable[[Canvas, Rng], float]] = {
    "clock-tower": clock_square, "dome": dome_square, "ferris-wheel": fairground,
    "park": park, "river": river, **{name: street(name) for name in QUARTERS},
}
MUSEUMS: dict[str, Callable[[Canvas, Rng], Canvas]] = {
    "gallery": gallery, "sculpture-hall": sculpture_hall,
}
