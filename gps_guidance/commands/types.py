"""What arguments of the verbs may be: a text -> its value, or the reason why not."""

from __future__ import annotations

import argparse
import math
from datetime import date

from gps_guidance import geo


def pair(text: str) -> geo.LatLon:
    """``LAT,LON`` in degrees."""
    try:
        lat, lon = map(float, text.split(","))
        geo.check_lat_lon((lat, lon))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAT,LON in degrees. {error}") from error
    return lat, lon


def box(text: str) -> geo.Bounds:
    """``SOUTH,WEST,NORTH,EAST`` in degrees."""
    try:
        south, west, north, east = map(float, text.split(","))
        return geo.Bounds(south, west, north, east)
    except ValueError as error:
        message = f"{text!r}: give south,west,north,east. {error}"
        raise argparse.ArgumentTypeError(message) from error


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def day(text: str) -> date:
    """``YYYY-MM-DD``."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day, such as 2019-05-31") from error


def part(text: str) -> tuple[int, int]:
    """``K/N``: the K-th of N parts."""
    try:
        k, n = map(int, text.split("/"))
    except ValueError:
        k, n = 0, 0
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 1 <= K <= N")
    return k, n


def metres(text: str) -> float:
    """A finite number of metres, at least 0."""
    try:
        metres = float(text)
    except ValueError:
        metres = math.nan
    if not 0 <= metres < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of metres")
    return metres


def fraction(text: str) -> float:
    """A number from 0 to below 1."""
    try:
        part = float(text)
    except ValueError:
        part = math.nan
    if not 0 <= part < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to below 1")
    return part
