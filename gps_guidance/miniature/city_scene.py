"""Pictures of the city: what a tourist's camera sees, as pixels and with exact labels."""

from __future__ import annotations

import numpy as np

from gps_guidance.miniature.canvas import INDOORS, SKIES, Canvas, Weather, gain, one_colour
from gps_guidance.miniature.city import COLOURS, LANDMARKS, Scene
from gps_guidance.miniature.sights import BACKDROPS, LANDMARK_DRAW, MUSEUMS
from gps_guidance.miniature.things import DRAW, SCALE

Rng = np.random.Generator


def draw_scene(
    place: str, object: str | None, colour: str | None, weather: str | None, rng: Rng,
    size: int = 64, beyond: str | None = None,
) -> np.ndarray:
    """A new picture of a scene, uint8 [size, size, 3].

    ``rng`` draws all that the labels leave open: houses, clouds, where the object stands. A
    landmark ``beyond`` is seen over the roofs. In a museum ``weather`` is None; outdoors ``object``
    and ``colour`` may both be. ValueError for what the city does not have (see :class:`Scene`).
    """
    scene = Scene(place, object, colour, weather)
    if beyond is not None and beyond not in LANDMARKS:
        raise ValueError(f"beyond {beyond!r} is no landmark: one of {', '.join(LANDMARKS)}.")
    if size < 48:
        raise ValueError(f"size {size} is too small for what is drawn: give at least 48 pixels.")
    if scene.weather is None:
        return _museum(scene, rng, size)
    return _outdoors(scene, rng, size, beyond)


def _museum(scene: Scene, rng: Rng, size: int) -> np.ndarray:
    assert scene.object is not None and scene.colour is not None  # Scene has checked
    canvas = Canvas(size, INDOORS)
    canvas.light = gain(*rng.normal(1, 0.02, 3))
    at = MUSEUMS[scene.place](canvas, rng)
    rgb = COLOURS[scene.colour]
    light = one_colour(rgb) if scene.place == "sculpture-hall" else None
    pen = at.at(0, 0, SCALE[scene.object] * rng.uniform(0.92, 1.04), light, rng.random() < 0.5)
    DRAW[scene.object](pen, rgb)
    return canvas.pixels()


def _outdoors(scene: Scene, rng: Rng, size: int, beyond: str | None) -> np.ndarray:
    assert scene.weather is not None
    weather = SKIES[scene.weather]
    canvas = Canvas(size, weather)
    canvas.light = gain(*(np.array(weather.far) * rng.normal(1, 0.03)))
    canvas.sky()
    _heavens(canvas, rng)
    if beyond is not None:
        LANDMARK_DRAW[beyond](canvas.at(rng.uniform(20, 80), 52, rng.uniform(0.5, 0.6)), rng)
    ground_y = BACKDROPS[scene.place](canvas, rng)
    if scene.object is not None and scene.colour is not None:
        _foreground(canvas, rng, scene.object, scene.colour, weather, ground_y)
    _falling(canvas, rng)
    return canvas.pixels()


def _foreground(canvas: Canvas, rng: Rng, object: str, colour: str, weather: Weather,
                ground_y: float) -> None:
    """The object somewhere on the ground, in the light of a lamp at night."""
    x, y = rng.uniform(30, 70), rng.uniform(max(85, ground_y + 10), 95)
    scale = SCALE[object] * rng.uniform(0.9, 1.08)
    if weather.dark:
        canvas.disc(x, y - 1, 34, (255, 226, 150, 70), 7, shines=True)
    else:
        canvas.disc(x, y - 1, 52 * scale, (20, 20, 40, 70), 3)
    light = gain(*weather.near)
    DRAW[object](canvas.at(x, y, scale, light, rng.random() < 0.5), COLOURS[colour])


def _heavens(canvas: Canvas, rng: Rng) -> None:
    """Clouds in fair weather, moon and stars at night."""
    if canvas.weather.dark:
        for _ in range(5):
            canvas.disc(rng.uniform(0, 100), rng.uniform(2, 30), 0.8, (230, 230, 250), shines=True)
        x, y = rng.uniform(8, 92), rng.uniform(8, 16)
        canvas.disc(x, y, 5.5, (248, 240, 204), shines=True)
    elif not (canvas.weather.wet or canvas.weather.snowy):
        for _ in range(2):
            x, y = rng.uniform(0, 100), rng.uniform(5, 22)
            for dx, dy, r in ((-8, 1, 5), (0, -1, 7), (9, 1, 5)):
                canvas.disc(x + dx, y + dy, r, (255, 255, 255, 200), r * 0.6)


def _falling(canvas: Canvas, rng: Rng) -> None:
    """Few and large drops or flakes: fine noise is lost on a small autoencoder."""
    canvas.light = gain(1, 1, 1)
    if canvas.weather.wet:
        for _ in range(16):
            x, y = rng.uniform(0, 105), rng.uniform(-5, 95)
            canvas.line([(x, y), (x - 3, y + 11)], 1.1, (206, 216, 232, 150))
    if canvas.weather.snowy:
        for _ in range(20):
            canvas.disc(rng.uniform(0, 100), rng.uniform(0, 100), rng.uniform(1.1, 1.7),
                        (255, 255, 255, 230))
