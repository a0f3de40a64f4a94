"""The miniature arch: a triumphal arch across an avenue, front and back almost alike.

What tells the sides apart is small, as on real ones: the colour of the banners, a statue before the
front, and what stands around. A reconstruction that is not told from where it looks may well give
it two fronts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gps_guidance.miniature.landmark import Landmark
from gps_guidance.miniature.shapes import (
    Ellipsoid,
    Frustum,
    Hull,
    Paint,
    Shape,
    block,
    house,
    house_paint,
    plain,
    tree,
)

WIDTH, DEPTH, HEIGHT = 38.0, 18.0, 42.0
GATE, CROWN = 13.0, 26.0  # width and height of the passage
STONE, SHADE, BRONZE = (0.90, 0.84, 0.72), (0.64, 0.56, 0.45), (0.22, 0.42, 0.34)
RED, BLUE = (0.78, 0.14, 0.12), (0.16, 0.26, 0.66)
EAVES = 8.0


def arch_shapes(width: float, depth: float, height: float, gate: float, crown: float, paint: Paint
                ) -> list[Shape]:
    """An arch across the east-west axis: two piers, a vault of eight sides, entablature, attic.

    ``gate`` and ``crown`` are the width and height of the passage, below 0.75 of the arch's.
    """
    pier = (width - gate) / 2
    cornice, roof = 0.76 * height, 0.82 * height
    piers = [block((0, sign * (gate + pier) / 2), depth, pier, 0, crown, paint) for sign in (1, -1)]
    vault = [_haunch(sign, degrees, depth, gate / 2, crown, paint)
             for sign in (1, -1) for degrees in (25, 60)]
    return [
        *piers, *vault,
        block((0, 0), depth, width, crown, cornice, paint),
        block((0, 0), depth + 2.4, width + 2.4, cornice, roof, paint),
        block((0, 0), depth - 2, width - 2, roof, height, paint),
    ]


def _haunch(sign: int, degrees: float, depth: float, half: float, crown: float, paint: Paint
            ) -> Hull:
    """What a tangent of the vault, ``degrees`` above its springing, leaves in a corner."""
    springing, overlap = crown - half, 0.2
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    planes = [
        ((1.0, 0.0, 0.0), depth / 2), ((-1.0, 0.0, 0.0), depth / 2),
        ((0.0, sign, 0.0), half + overlap), ((0.0, 0.0, 1.0), crown + overlap),
        ((0.0, -sign * c, -s), -half - s * springing),
    ]
    middle = (0.0, sign * half / 2, springing + half / 2)
    return Hull(planes, (middle, math.hypot(depth / 2, half, half)), paint)


def _arch_paint(points: Tensor, normals: Tensor) -> Tensor:
    """Pale stone with a dark frieze and reliefs; banners red in front and blue at the back, and a
    blind gate on either end."""
    x, y, z = points.unbind(-1)
    along, across = normals[:, 0].abs() > 0.5, normals[:, 1].abs() > 0.5
    frieze = (z > 0.70 * HEIGHT) & (z < 0.76 * HEIGHT)
    relief = along & (z > 4) & (z < 12) & ((y.abs() - 12.75).abs() < 4)
    attic = (along | across) & (z > 0.86 * HEIGHT) & (z < 0.95 * HEIGHT) & (
        torch.remainder((x + y) / 4.2, 1) < 0.6)
    gate = across & (y.abs() > WIDTH / 2 - 1) & (x.abs() < 4) & (z < 17)
    colour = points.new_tensor(STONE).expand_as(points)
    colour = torch.where((frieze | relief | attic | gate)[:, None], points.new_tensor(SHADE),
                         colour)
    banner = along & (z > 14) & (z < 27) & ((y.abs() - 12.75).abs() < 2.4)
    cloth = torch.where((x > 0)[:, None], points.new_tensor(RED), points.new_tensor(BLUE))
    return torch.where(banner[:, None], cloth, colour)


def _statue(x: float, y: float) -> list[Shape]:
    bronze = plain(*BRONZE)
    return [
        block((x, y), 5, 5, 0, 5, plain(*STONE)),
        Frustum((x, y, 5), (0, 0, 1), 8.0, 2.2, bronze, radius_top=1.2),
        Ellipsoid((x, y, 14), (1.5, 1.5, 1.7), bronze),
    ]


def build_shapes() -> list[Shape]:
    """The arch and what stands along its avenue, all within 42 m of the centre."""
    return [
        *arch_shapes(WIDTH, DEPTH, HEIGHT, GATE, CROWN, _arch_paint),
        *_statue(21, 11),
        house((17, 31), 20, 11, EAVES, 12, 8,
              house_paint((0.92, 0.88, 0.80), (0.34, 0.40, 0.48), EAVES)),
        house((-17, 31), 18, 11, EAVES, 13, -10,
              house_paint((0.74, 0.36, 0.26), (0.42, 0.20, 0.16), EAVES)),
        house((16, -32), 18, 11, EAVES, 13, -6,
              house_paint((0.90, 0.74, 0.40), (0.52, 0.34, 0.22), EAVES)),
        *tree(-12, -32, 14, (0.30, 0.46, 0.12)),
        *tree(-25, -27, 12, (0.16, 0.36, 0.14)),
        *tree(33, 20, 12, (0.14, 0.34, 0.16)),
        *tree(33, -20, 12, (0.14, 0.34, 0.16)),
        *tree(-33, 20, 12, (0.70, 0.54, 0.14)),
        *tree(-33, -18, 12, (0.70, 0.54, 0.14)),
    ]


ARCH = Landmark(
    "Miniature Arc de Triomphe", (48.873792, 2.295028), build_shapes,
    crowds=((90.0, 16.0, 0.36), (270.0, 16.0, 0.36)), middle_m=HEIGHT / 2,
)
