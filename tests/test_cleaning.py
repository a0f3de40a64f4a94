"""Which photos of a table stay, by hand-made positions and owners, and the laws of splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import shapely

from gps_guidance import geo
from gps_guidance.photos import cleaning
from gps_guidance.photos.cleaning import Wanted

CENTER = (43.722952, 10.396597)


def around(metres: Sequence[tuple[float, float]]) -> np.ndarray:
    """(lat, lon) [N, 2] of (east, north) in metres from CENTER."""
    return geo.from_local_m(np.array(metres, dtype=float), CENTER)


def strings(*values: str | None) -> np.ndarray:
    return np.array(values, dtype=object)


def test_every_wrong_position_has_its_reason() -> None:
    points = np.array([
        [43.7, 10.4], [np.nan, 10.4], [43.7, np.inf], [0, 0], [91, 10.4], [43.7, 181], [10.4, 43.7],
    ])
    bad = cleaning.unwanted_positions(points, Wanted(bounds=geo.Bounds(43, 10, 44, 11)))
    assert {index: reason for index, (reason, _) in bad.items()} == {
        1: "bad_gps", 2: "bad_gps", 3: "null_island", 4: "out_of_range", 5: "out_of_range",
        6: "outside_bounds",
    }
    assert "10.40000, 43.70000" in bad[6][1]


def test_distances_are_from_the_centre() -> None:
    points = around([(3, 0), (50, 0), (0, -150)])
    bad = cleaning.unwanted_positions(points, Wanted(CENTER, min_distance_m=5, max_distance_m=100))
    assert bad == {
        0: ("too_near", "3.0 m from the centre"), 2: ("too_far", "150 m from the centre"),
    }


def test_an_outline_has_holes() -> None:
    ring = shapely.Polygon([(0, 0), (4, 0), (4, 4), (0, 4)], [[(1, 1), (3, 1), (3, 3), (1, 3)]])
    points = np.array([[0.5, 3.5], [2, 2], [5, 2]])  # (lat, lon)
    bad = cleaning.unwanted_positions(points, Wanted(area=ring))
    assert sorted(bad) == [1, 2]


def test_columns_about_the_landmark() -> None:
    columns = cleaning.landmark_columns(around([(30, 40), (0, -7)]), Wanted(CENTER))
    assert columns["east_m"] == pytest.approx([30, 0], abs=1e-6)
    assert columns["distance_m"] == pytest.approx([50, 7], abs=1e-6)
    assert columns["bearing_deg"] == pytest.approx([np.degrees(np.arctan2(30, 40)), 180])
    assert columns["bin"].tolist() == [4, 18]


def test_the_first_of_equal_values_stays_and_null_is_no_value() -> None:
    values = strings("a", None, "b", "a", None, "b", "b", "c")
    assert cleaning.repeated(values).tolist() == [0, 0, 0, 1, 0, 1, 1, 0]


def test_an_owner_is_limited_in_a_cell_not_elsewhere() -> None:
    here, far = (0.0, 0.0), (5000.0, 0.0)
    points = around([here, here, here, far, here, here])
    owners = strings("ann", "ann", "ann", "ann", "bob", None)
    ids = strings("3", "1", "2", "0", "4", "5")
    gone = cleaning.crowded(points, owners, ids, limit=2, side_m=100)
    assert gone.tolist() == [True, False, False, False, False, False]  # id 3 is ann's third here


def test_unknown_owners_are_not_limited() -> None:
    gone = cleaning.crowded(around([(0, 0)] * 5), strings(*[None] * 5), strings(*"abcde"), 1, 100)
    assert not gone.any()


def test_a_cell_needs_several_owners() -> None:
    points = around([(0, 0), (0, 0), (0, 0), (5000, 0), (5000, 0), (9000, 0), (9000, 0)])
    owners = strings("ann", "ann", "bob", "ann", "ann", None, None)
    gone = cleaning.lonely(points, owners, min_owners=2, side_m=100)
    assert gone.tolist() == [False] * 3 + [True] * 4


def test_blurred_positions_are_shared_and_stay_in_the_box() -> None:
    rng = np.random.default_rng(0)
    points = around(rng.uniform(-200, 200, (500, 2)))
    blurred = cleaning.blur_positions(points, 100.0)
    moved = geo.distance_m(points, blurred)
    assert moved.max() <= 100 / np.sqrt(2) * 1.01
    assert len(np.unique(blurred, axis=0)) <= 25
    assert np.array_equal(cleaning.blur_positions(blurred, 100.0), blurred)
    box = geo.Bounds(*points.min(0), *points.max(0))
    assert box.contains(cleaning.blur_positions(points, 1000.0, box)).all()


# --- splits ------------------------------------------------------------------------------------


def crowd(count: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    points = around(rng.uniform(-2000, 2000, (count, 2)))
    owners = np.array([f"owner-{k}" for k in rng.integers(300, size=count)], dtype=object)
    owners[rng.random(count) < 0.1] = None
    return points, owners, np.array([f"{k:016x}" for k in range(count)], dtype=object)


@pytest.mark.parametrize("by", ["photo", "place", "owner"])
def test_a_split_holds_about_its_fraction(by: str) -> None:
    split = cleaning.split_of(*crowd(), 0.2, by, 100.0)
    assert set(split) == {"train", "val"}
    assert np.mean(split == "val") == pytest.approx(0.2, abs=0.05)


def test_no_place_is_on_both_sides() -> None:
    points, owners, ids = crowd()
    split = cleaning.split_of(points, owners, ids, 0.2, "place", 100.0)
    cells = [tuple(cell) for cell in geo.ground_cell(points, 100.0)]
    sides: dict[tuple[int, ...], set[str]] = {}
    for cell, side in zip(cells, split, strict=True):
        sides.setdefault(cell, set()).add(side)
    assert len(sides) > 1000 and all(len(found) == 1 for found in sides.values())


@pytest.mark.parametrize("by", ["owner", "place,owner"])
def test_no_owner_is_on_both_sides(by: str) -> None:
    points, owners, ids = crowd()
    split = cleaning.split_of(points, owners, ids, 0.2, by, 100.0)
    for owner in set(owners) - {None}:
        assert len({"train", "val"} & set(split[owners == owner])) == 1


def test_by_place_and_owner_leaks_neither() -> None:
    points, owners, ids = crowd()
    split = cleaning.split_of(points, owners, ids, 0.002, "place,owner", 100.0)
    by_place = cleaning.split_of(points, owners, ids, 0.002, "place", 100.0)
    assert set(split) == {"train", "val", "none"}
    assert np.array_equal(split == "val", by_place == "val")


@pytest.mark.parametrize("by", cleaning.SPLITS)
def test_new_photos_do_not_move_old_ones(by: str) -> None:
    """But for those that only now turn out to leak."""
    points, owners, ids = crowd()
    whole = cleaning.split_of(points, owners, ids, 0.2, by, 100.0)[:2000]
    first = cleaning.split_of(points[:2000], owners[:2000], ids[:2000], 0.2, by, 100.0)
    changed = whole[whole != first]
    assert set(changed) <= ({"none"} if by == "place,owner" else set())


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="'street'.*photo; place; owner; place,owner"):
        cleaning.split_of(*crowd(10), 0.2, "street", 100.0)
