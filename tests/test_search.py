"""Tiles of a search, and what texts and licences of photo sites mean."""

from __future__ import annotations

from datetime import date, timedelta

import pytest

from gps_guidance import geo
from gps_guidance.photos.search import Tile, is_licence, local_time, plain_text


def test_halves_cover_the_tile_and_end() -> None:
    """A day of 2.2 x 1.6 km is halved across its height until 2.2 km / 2^5 = 69 m."""
    tile = Tile("r", geo.Bounds(43.71, 10.39, 43.73, 10.41), date(2020, 2, 28), date(2020, 3, 1))
    leaves, stack = [], [tile]
    while stack:
        halves = stack[-1].halves()
        if halves is None:
            leaves.append(stack.pop())
        else:
            stack.pop()
            stack += halves
    assert len({leaf.name for leaf in leaves}) == len(leaves) == 3 * 2**10
    assert all(leaf.first == leaf.last for leaf in leaves)
    assert all(50 <= side < 100 for leaf in leaves[::99] for side in leaf.sides_m())
    area = sum((leaf.bounds.north - leaf.bounds.south) * (leaf.bounds.east - leaf.bounds.west)
               for leaf in leaves)
    assert area == pytest.approx(3 * 0.02 * 0.02)


def test_long_times_are_halved_first() -> None:
    box = geo.Bounds(43.70, 10.36, 43.74, 10.43)
    tile = Tile("r", box, date(1970, 1, 1), date(2020, 1, 1))
    one, two = tile.halves() or (tile, tile)
    assert one.bounds == two.bounds == box and (one.name, two.name) == ("r0", "r1")
    assert one.last and two.first and two.first - one.last == timedelta(days=1)


@pytest.mark.parametrize(("text", "plain"), [
    ("a <b>b</b>\n c", "a b c"), ("I <3 Pisa > Rome", "I <3 Pisa > Rome"), ("&lt;&amp;", "<&"),
    ("\u200b \ud83d", None), ("", None), (None, None), ("<img src='x'>", None),
])
def test_plain_text(text: str | None, plain: str | None) -> None:
    assert plain_text(text) == plain


@pytest.mark.parametrize(("text", "time"), [
    ("2019-05-06 07:08:09", "2019-05-06T07:08:09"), ("2019-05-06T07:08:09Z", "2019-05-06T07:08:09"),
    ("2019-05-06, in the morning", "2019-05-06"), ("2019-00-00 00:00:00", None), ("May 2019", None),
    ("", None), (None, None),
])
def test_local_time(text: str | None, time: str | None) -> None:
    assert local_time(text) == time


@pytest.mark.parametrize(("name", "wanted", "known"), [
    ("CC BY 2.0", ["CC BY"], True), ("CC BY-SA 3.0 de", ["cc by-sa"], True),
    ("CC BY-NC 2.0", ["CC BY"], False), ("CC BY 2.0", ["CC BY 4.0", "cc by 2.0"], True),
    ("CC0", ["CC0"], True), ("CC0 1.0", ["CC0"], True), ("All Rights Reserved", ["any"], True),
    ("", ["CC0"], False), ("", ["any"], True),
])
def test_is_licence(name: str, wanted: list[str], known: bool) -> None:
    assert is_licence(name, wanted) == known
