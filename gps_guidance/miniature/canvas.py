"""A small painter's canvas: antialiased flat shapes, in the light of a weather. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, ...]  # RGB, or RGBA with alpha last, 0 to 255
Point = tuple[float, float]
Light = Callable[[Colour], Colour]
SUPERSAMPLING = 2
SOFTNESS = 0.007  # blur, as a part of the width: a small autoencoder loses sharper edges
SNOW = (242, 246, 250)


def mix(a: Colour, b: Colour, part: float) -> Colour:
    """``a`` with ``part`` of ``b`` in it."""
    return tuple(round(p + (q - p) * part) for p, q in zip(a[:3], b[:3], strict=True))


def plain(colour: Colour) -> Colour:
    return colour


def gain(red: float, green: float, blue: float) -> Light:
    """Light that multiplies the channels, alpha excepted."""

    def light(colour: Colour) -> Colour:
        lit = (min(255, round(v * g)) for v, g in zip(colour, (red, green, blue), strict=False))
        return (*lit, *colour[3:])

    return light


def grey(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2]


def one_colour(colour: Colour) -> Light:
    """Everything in shades of one colour, as a statue is."""

    def light(other: Colour) -> Colour:
        return (*mix((0, 0, 0), colour, 0.6 + 0.4 * min(1, grey(other) / grey(colour))), *other[3:])

    return light


@dataclass(frozen=True)
class Weather:
    """Colours of the sky from top to horizon, light on the place and on what is near."""

    sky: tuple[Colour, Colour]
    far: tuple[float, float, float]
    near: tuple[float, float, float]
    snowy: bool = False
    dark: bool = False
    wet: bool = False


SKIES = {
    "sun": Weather(((84, 156, 236), (196, 226, 250)), (1, 1, 1), (1, 1, 1)),
    "rain": Weather(((104, 112, 126), (164, 170, 178)), (0.66, 0.70, 0.76), (0.84, 0.86, 0.9),
                    wet=True),
    "snow": Weather(((190, 198, 212), (228, 232, 238)), (0.90, 0.92, 0.96), (0.97, 0.97, 1),
                    snowy=True),
    "night": Weather(((12, 16, 48), (52, 48, 100)), (0.36, 0.38, 0.56), (0.84, 0.82, 0.88),
                     dark=True),
}
INDOORS = Weather(((0, 0, 0), (0, 0, 0)), (1, 1, 1), (1, 1, 1))


class Canvas:
    """A square picture, or a part of it with its own scale and light.

    The whole picture runs from (0, 0) in its upper left to (100, 100). Every shape takes its
    colour through ``light``, unless it shines.
    """

    def __init__(self, size: int, weather: Weather) -> None:
        side = size * SUPERSAMPLING
        self.weather = weather
        self.light: Light = gain(*weather.far)
        self.image = Image.new("RGB", (side, side))
        self._draw = ImageDraw.Draw(self.image, "RGBA")
        self._origin, self._scale = (0.0, 0.0), (side / 100, side / 100)

    def at(self, x: float, y: float, scale: float, light: Light | None = None,
           flip: bool = False) -> Canvas:
        """The same picture for drawing around (x, y), ``scale`` times smaller, mirrored if
        ``flip``."""
        part = object.__new__(Canvas)
        part.image, part._draw, part.weather = self.image, self._draw, self.weather
        part.light = light or self.light
        (part._origin,) = self._pixels([(x, y)])
        sx, sy = self._scale
        part._scale = (sx * scale * (-1 if flip else 1), sy * scale)
        return part

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        (x0, y0), (sx, sy) = self._origin, self._scale
        return [(x0 + x * sx, y0 + y * sy) for x, y in points]

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, ...]:
        (a, b), (c, d) = self._pixels([(x0, y0), (x1, y1)])
        return (min(a, c), min(b, d), max(a, c), max(b, d))

    def _style(self, colour: Colour, edge: float, shines: bool = False
               ) -> tuple[Colour, Colour | None, int]:
        """Fill, outline and its width in pixels; ``edge`` is the width of a darker outline."""
        fill = colour if shines else self.light(colour)
        if not edge:
            return fill, None, 0
        return fill, self.light(mix(colour, (20, 20, 30), 0.6)), self._width(edge)

    def _width(self, width: float) -> int:
        return max(1, round(width * self._scale[1]))

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, edge: float = 0,
             shines: bool = False) -> None:
        self._draw.rectangle(self._box(x0, y0, x1, y1), *self._style(colour, edge, shines))

    def round_rect(self, x0: float, y0: float, x1: float, y1: float, radius: float,
                   colour: Colour, edge: float = 0, shines: bool = False) -> None:
        self._draw.rounded_rectangle(self._box(x0, y0, x1, y1), radius * self._scale[1],
                                     *self._style(colour, edge, shines))

    def poly(self, points: Sequence[Point], colour: Colour, edge: float = 0) -> None:
        self._draw.polygon(self._pixels(points), *self._style(colour, edge))

    def disc(self, x: float, y: float, rx: float, colour: Colour, ry: float | None = None,
             edge: float = 0, shines: bool = False) -> None:
        ry = rx if ry is None else ry
        self._draw.ellipse(self._box(x - rx, y - ry, x + rx, y + ry),
                           *self._style(colour, edge, shines))

    def ring(self, x: float, y: float, radius: float, width: float, colour: Colour,
             shines: bool = False) -> None:
        self._draw.ellipse(self._box(x - radius, y - radius, x + radius, y + radius), fill=None,
                           outline=colour if shines else self.light(colour),
                           width=self._width(width))

    def half_disc(self, x: float, y: float, rx: float, ry: float, colour: Colour,
                  edge: float = 0) -> None:
        """The upper half of an ellipse around (x, y)."""
        self._draw.pieslice(self._box(x - rx, y - ry, x + rx, y + ry), 180, 360,
                            *self._style(colour, edge))

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        self._draw.line(self._pixels(points), fill=self.light(colour), joint="curve",
                        width=self._width(width))

    def window(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, lit: bool) -> None:
        """A pane of glass, with lamp light behind it at night if ``lit``."""
        shines = lit and self.weather.dark
        self.rect(x0, y0, x1, y1, (236, 190, 104) if shines else colour, shines=shines)

    def under_snow(self, colour: Colour, part: float) -> Colour:
        """``colour`` with ``part`` of it under snow, if there is snow."""
        return mix(colour, SNOW, part) if self.weather.snowy else colour

    def sky(self) -> None:
        """Fill the picture with the sky of the weather."""
        ramp = np.linspace(0, 1, self.image.height)[:, None] ** 0.8
        top, low = (np.array(c, dtype=np.float64) for c in self.weather.sky)
        rows = np.clip(top + (low - top) * np.minimum(1, 1.5 * ramp), 0, 255).astype(np.uint8)
        column = Image.fromarray(np.ascontiguousarray(rows[:, None]))
        self.image.paste(column.resize(self.image.size, Image.Resampling.NEAREST))

    def pixels(self) -> np.ndarray:
        """The picture, uint8 [size, size, 3], as soft as a small lens makes it."""
        soft = self.image.filter(ImageFilter.BoxBlur(SOFTNESS * self.image.width))
        return np.asarray(soft.reduce(SUPERSAMPLING))
