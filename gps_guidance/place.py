"""What a caller says about the place, as tokens: positions, bearings, areas of many positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gps_guidance import areas, geo
from gps_guidance.encoders import AngleEncoder, GPSEncoder

Encoder = GPSEncoder | AngleEncoder


@dataclass
class Place:
    """Tokens [G, M, N, D] of G places, each the mean over M locations (Eq. 8; 1 is Eq. 4).

    ``locations`` are an area's points (lat, lon) [M, 2] in degrees; None for anything else.
    """

    embeds: Tensor
    locations: np.ndarray | None = None


def encode_place(encoder: Encoder, gps: Any = None, bearing_deg: Any = None, area: Any = None,
                 streets: Any = None, num_locations: int = 64,
                 rng: np.random.Generator | None = None) -> Place | None:
    """The one place that a call gives, of :func:`encode_gps`, :func:`encode_bearing` and
    :func:`encode_area`; None if there is none, ValueError if there are several."""
    given = [name for name, value in (("gps", gps), ("bearing_deg", bearing_deg),
                                      ("area or streets", area if streets is None else streets))
             if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} were given: give one of them.")
    if gps is not None:
        return encode_gps(encoder, gps)
    if bearing_deg is not None:
        return encode_bearing(encoder, bearing_deg)
    if given:
        return encode_area(encoder, area, streets, num_locations, rng or np.random.default_rng())
    return None


def encode_gps(encoder: Encoder, gps: Any) -> Place:
    """One (lat, lon) pair in degrees, or [G, 2] of them as lists, array or tensor, as tokens.

    ValueError for another shape, for a point that is not on the globe or outside the model's
    bounds, and for a model of a landmark.
    """
    if isinstance(gps, Tensor):
        gps = gps.detach().cpu().numpy()
    points = geo.check_lat_lon(gps)
    if points.ndim > 2 or points.size == 0:
        raise ValueError(f"gps must be one (lat, lon) pair or a list of pairs, got the shape "
                         f"{list(points.shape)}.")
    if isinstance(encoder, AngleEncoder):
        raise ValueError(_not_of_a_city(encoder, points.reshape(-1, 2)[0]))
    return Place(encoder(points.reshape(-1, 2))[:, None])


def _not_of_a_city(encoder: AngleEncoder, point: np.ndarray) -> str:
    landmark = encoder.config.landmark or "a landmark"
    about = f"gps was given, but this is an angle model of {landmark}"
    if encoder.config.center is None:
        return f"{about}: give bearing_deg, the direction in degrees from which it is seen."
    bearing = float(geo.bearing_deg(point, encoder.config.center))
    return (f"{about}: give bearing_deg instead. ({point[0]:g}, {point[1]:g}) sees it from "
            f"bearing_deg={bearing:.0f}.")


def encode_bearing(encoder: Encoder, bearing_deg: Any) -> Place:
    """One bearing in degrees clockwise from north, or [G] of them, as tokens.

    Each is snapped to the nearest of the bins that the model has learned. ValueError for another
    shape, for NaN, and for a model of a city.
    """
    if isinstance(bearing_deg, Tensor):
        bearing_deg = bearing_deg.detach().cpu().numpy()
    try:
        bearings = np.asarray(bearing_deg, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"bearing_deg is {bearing_deg!r}; give degrees.") from error
    if bearings.ndim > 1 or bearings.size == 0 or not np.isfinite(bearings).all():
        raise ValueError(f"bearing_deg is {bearing_deg!r}; give one finite number of degrees "
                         "clockwise from north, or a list of them.")
    if isinstance(encoder, GPSEncoder):
        raise ValueError("bearing_deg was given, but this is a GPS model of a city: give "
                         "gps=(lat, lon) or an area.")
    num_bins = encoder.config.num_bins
    centres = geo.bin_bearing_deg(geo.bearing_bin(bearings.reshape(-1), num_bins), num_bins)
    return Place(encoder(torch.from_numpy(centres))[:, None])


def encode_area(encoder: Encoder, area: Any, streets: Any, num_locations: int,
                rng: np.random.Generator) -> Place:
    """``num_locations`` points of an area, or of the streets in it, as the tokens of one place.

    ``area`` and ``streets`` are what :func:`gps_guidance.areas.sample_area` and
    :func:`gps_guidance.areas.sample_streets` take. ValueError for a model of a landmark, and where
    the area leaves the model's bounds.
    """
    if isinstance(encoder, AngleEncoder):
        raise ValueError("An area was given, but this is an angle model of a landmark: give "
                         "bearing_deg.")
    if streets is not None:
        points = areas.sample_streets(streets, num_locations, rng, area)
    else:
        points = areas.sample_area(area, num_locations, rng)
    return Place(encoder(encoder.bounds.check(points, "area"))[None], points)


def given_place(place: Place | None, gps_embeds: Tensor, encoder: Any) -> Place:
    """Tokens that the caller gave, [G, N, D] or with locations [G, M, N, D]."""
    if place is not None:
        raise ValueError("gps_embeds was given beside a place: give one of them.")
    wanted = (encoder.num_tokens, encoder.config.cross_attention_dim)
    if gps_embeds.ndim not in (3, 4) or tuple(gps_embeds.shape[-2:]) != wanted:
        raise ValueError(f"gps_embeds has shape {list(gps_embeds.shape)}; it must be "
                         f"(places, {wanted[0]}, {wanted[1]}), as the gps_encoder returns it.")
    return Place(gps_embeds if gps_embeds.ndim == 4 else gps_embeds[:, None])


def spare_seed(generator: torch.Generator | list[torch.Generator] | None) -> int:
    """A seed from a copy of the generator's state (None: torch's own generator).

    A copy, so that the generator gives an area the same initial noise as a single place.
    """
    one = generator[0] if isinstance(generator, list) else generator or torch.default_generator
    copy = torch.Generator(device=one.device)
    copy.set_state(one.get_state())
    return int(torch.randint(2**62, (1,), generator=copy, device=one.device))


def sample_locations(count: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """``wanted`` of ``count`` locations, each as likely as any other; all if there are no more."""
    return sorted(rng.choice(count, min(wanted, count), replace=False).tolist())


def batch_size_of(prompt: Any, prompt_embeds: Tensor | None, place: Place | None) -> int:
    """How many images there are before ``num_images_per_prompt``: prompts and places broadcast."""
    prompts = 1
    if prompt_embeds is not None:
        prompts = len(prompt_embeds)
    elif isinstance(prompt, list):
        prompts = len(prompt)
    places = 1 if place is None else len(place.embeds)
    if 1 not in (prompts, places) and prompts != places:
        raise ValueError(f"There are {prompts} prompts and {places} places: give one of either, or "
                         "as many prompts as places.")
    return max(prompts, places)


def check_numbers(interval: Any, location_batch_size: int, locations_per_step: int | None) -> None:
    """Refuse an interval or a count that cannot be meant."""
    try:
        start, stop = (float(end) for end in interval)
        ordered = 0 <= start <= stop <= 1
    except (TypeError, ValueError):
        ordered = False
    if not ordered:
        raise ValueError(f"guidance_interval is {interval!r}; give two parts of the steps in "
                         "[0, 1], such as (0.1, 0.8).")
    for name, value in (("location_batch_size", location_batch_size),
                        ("locations_per_step", locations_per_step)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; give a whole number of at least 1.")
