"""What stands in the foreground of a photo of the city: one function draws one kind of object.

Each draws around (0, 0), the middle of where it touches the ground, about 100 units wide or high,
on a canvas that is already scaled.
"""

from __future__ import annotations

from collections.abc import Callable

from gps_guidance.miniature.canvas import Canvas, Colour, mix

DARK = (38, 38, 46)
GLASS = (176, 214, 236)
EDGE = 4.0


def draw_car(pen: Canvas, colour: Colour) -> None:
    pen.poly([(-32, -30), (-20, -58), (20, -58), (36, -30)], colour, EDGE)
    pen.poly([(-22, -33), (-14, -52), (-2, -52), (-2, -33)], GLASS)
    pen.poly([(4, -33), (4, -52), (17, -52), (26, -33)], GLASS)
    pen.round_rect(-52, -35, 52, -10, 8, colour, EDGE)
    pen.disc(47, -25, 4, (255, 240, 150), shines=pen.weather.dark)
    for x in (-29, 29):
        pen.disc(x, -11, 13, DARK)
        pen.disc(x, -11, 6, (190, 190, 198))


def draw_bicycle(pen: Canvas, colour: Colour) -> None:
    for x in (-31, 31):
        pen.ring(x, -25, 26, 5, DARK)
        pen.ring(x, -25, 22, 6, colour)
    back, pedal, seat, head, front = (-31, -25), (-4, -22), (-13, -56), (20, -58), (31, -25)
    for width, paint in ((13, mix(colour, DARK, 0.75)), (8, colour)):
        pen.line([back, pedal, head, seat, pedal], width, paint)
        pen.line([back, seat], width, paint)
        pen.line([front, head, (17, -70)], width, paint)
    pen.line([(-24, -60), (-4, -60)], 8, DARK)
    pen.line([(12, -72), (30, -74)], 7, DARK)
    pen.disc(*pedal, 6, DARK)


def draw_dog(pen: Canvas, colour: Colour) -> None:
    shade = mix(colour, DARK, 0.3)
    pen.line([(-36, -52), (-50, -74)], 9, shade)
    for x, paint in ((-34, shade), (-20, colour), (18, shade), (30, colour)):
        pen.round_rect(x - 6, -36, x + 6, 0, 4, paint, 3)
    pen.round_rect(-42, -62, 38, -28, 17, colour, EDGE)
    pen.round_rect(40, -80, 62, -62, 7, colour, 3)
    pen.disc(34, -74, 20, colour, edge=EDGE)
    pen.round_rect(37, -80, 58, -63, 6, colour)
    pen.poly([(18, -92), (30, -88), (26, -62), (14, -64)], shade, 3)
    pen.disc(39, -79, 3.5, DARK)
    pen.disc(61, -76, 4.5, DARK)


def draw_bench(pen: Canvas, colour: Colour) -> None:
    for x in (-40, 40):
        pen.line([(x, -62), (x, 0)], 7, DARK)
    for top, bottom in ((-66, -53), (-48, -36), (-28, -14)):
        pen.rect(-56, top, 56, bottom, colour, 3)


def draw_umbrella(pen: Canvas, colour: Colour) -> None:
    """A person under an umbrella."""
    for x in (-8, 8):
        pen.line([(x, -26), (x, 0)], 10, (40, 44, 62))
    pen.round_rect(-19, -66, 19, -20, 9, (84, 76, 96), 3)
    pen.disc(0, -72, 12, (232, 188, 158))
    pen.line([(16, -50), (16, -96)], 4, DARK)
    pen.half_disc(4, -82, 56, 46, colour, EDGE)
    shade = mix(colour, DARK, 0.3)
    pen.half_disc(4, -82, 20, 44, shade)
    for x in (-43, -25, 4, 33, 51):
        pen.half_disc(x, -80, 10 if abs(x - 4) < 40 else 7, 5, mix(colour, DARK, 0.55))


def draw_balloon(pen: Canvas, colour: Colour) -> None:
    pen.line([(0, -54), (4, -36), (-3, -16), (0, 0)], 3.5, DARK)
    pen.poly([(-8, -46), (8, -46), (0, -58)], mix(colour, DARK, 0.4))
    pen.disc(0, -94, 36, colour, 43, edge=EDGE)
    pen.disc(-13, -111, 9, mix(colour, (255, 255, 255), 0.65), 12)
    pen.rect(-9, -8, 9, 0, DARK)


def draw_mailbox(pen: Canvas, colour: Colour) -> None:
    pen.rect(-24, -9, 24, 0, DARK)
    pen.half_disc(0, -78, 26, 24, colour, EDGE)
    pen.rect(-22, -80, 22, -7, colour, EDGE)
    pen.rect(-27, -84, 27, -76, mix(colour, DARK, 0.35))
    pen.rect(-15, -70, 15, -64, DARK)
    pen.rect(-12, -54, 12, -34, mix(colour, (255, 255, 255), 0.75), 2)


DRAW: dict[str, Callable[[Canvas, Colour], None]] = {
    "car": draw_car, "bicycle": draw_bicycle, "dog": draw_dog, "bench": draw_bench,
    "umbrella": draw_umbrella, "balloon": draw_balloon, "mailbox": draw_mailbox,
}
# width of 100 units of the object, as a part of the picture's width
SCALE = {"car": 0.42, "bicycle": 0.42, "dog": 0.42, "bench": 0.41, "umbrella": 0.40,
         "balloon": 0.36, "mailbox": 0.46}
