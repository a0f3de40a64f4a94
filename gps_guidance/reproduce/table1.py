"""Table 1: do images suit their text and their position? Ours, and what one could do without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gps_guidance.metrics import average_score
from gps_guidance.reproduce.city import load_pairs, sample_and_score
from gps_guidance.reproduce.outcome import (
    Claim,
    Outcome,
    Score,
    Table,
    claim_above,
    claim_at_least,
)
from gps_guidance.reproduce.settings import City, Settings, slug
from gps_guidance.reproduce.work import Done, Unit, Work

TITLES = {"nearest": "GPS nearest neighbour", "address": "base model, text and address",
          "text": "base model, text", "ours": "ours", "without-text": "ours, without text"}
COLUMNS = {"clip": "CLIP score", "gps": "GPS score", "average": "average",
           "place": "right place, %", "object": "right object, %",
           "unseen_place": "place of unseen pairs, %", "unseen_object": "object of unseen pairs, %"}
PAPER = {
    "nearest": {"clip": 18.77, "gps": 13.66, "average": 16.22},
    "address": {"clip": 26.65, "gps": 4.25, "average": 15.45},
    "text": {"clip": 29.13, "gps": 1.21, "average": 15.17},
    "ours": {"clip": 27.88, "gps": 8.15, "average": 18.02},
    "without-text": {"gps": 13.71},
}
# What the miniature has to reach: of seen pairs, and of unseen ones as a part of that.
SEEN_GOAL, UNSEEN_GOAL = 85.0, 0.7


def method_units(city: City, methods: Iterable[str], seeds: Iterable[int]) -> list[Unit]:
    """A unit for each method and seed; the nearest photo is the same for every seed."""
    # without what other figures show
    about = {key: value for key, value in asdict(city).items()
             if not key.startswith(("area", "attention")) and key != "address_model"}
    return [Unit(f"{slug(city.name)}/{method}-{seed}", sample_and_score,
                 {"city": about | ({"address_model": city.address_model}
                                   if method == "address-model" else {}),
                  "method": method, "seed": seed})
            for method in methods
            for seed in ([0] if method == "nearest" else seeds)]


def units(settings: Settings) -> list[Unit]:
    return [unit for city in settings.cities
            for unit in method_units(city, TITLES, settings.seeds)]


def outcome(settings: Settings, work: Work, done: Mapping[str, Done]) -> Outcome:
    rows = {method: method_scores(settings.cities, settings.seeds, method, done)
            for method in TITLES}
    del rows["without-text"]["clip"], rows["without-text"]["average"]  # there is no text to suit
    for key in ("object", "unseen_object"):
        rows["without-text"].pop(key, None)
    table = Table("table1", {key: title for key, title in COLUMNS.items()
                             if any(key in row for row in rows.values())}, TITLES, rows, PAPER)
    sheets = [(work.at(unit) / "sheet.png", f"{TITLES[method]}, seed {settings.seeds[0]}")
              for city in settings.cities
              for method in TITLES
              for unit in method_units(city, [method], settings.seeds[:1])]
    return Outcome("Table 1. Text and position", table, sheets, claims_of(rows), [
        "Intervals are over images, by bootstrap. A judge's cosines depend on the judge: only rows "
        "of one column compare.",
        "The nearest photo is not generated: its GPS score is what a true photo of the place has.",
    ])


def method_scores(cities: Sequence[City], seeds: Sequence[int], method: str,
                  done: Mapping[str, Done]) -> dict[str, Score]:
    """The scores of one method over every city, pair and seed."""
    values: dict[str, list[float]] = {key: [] for key in COLUMNS}
    for city in cities:
        pairs = load_pairs(city.pairs)
        for unit in method_units(city, [method], seeds):
            result: Any = done[unit.name].result
            values["clip"] += result["clip"]
            values["gps"] += result["gps"]
            values["average"] += [average_score(clip, gps) for clip, gps
                                  in zip(result["clip"], result["gps"], strict=True)]
            for question in ("place", "object"):
                for row, right in zip(pairs, result.get(question, []), strict=False):
                    values[question if row["seen"] else f"unseen_{question}"].append(100.0 * right)
    return {key: Score.of(found) for key, found in values.items() if found}


def claims_of(rows: Mapping[str, Mapping[str, Score]]) -> list[Claim]:
    ours = rows["ours"]
    claims = [
        claim_above("Ours has the best average.", "average", rows, "ours",
                    ["nearest", "address", "text"]),
        claim_above("Ours has a higher GPS score than the base model, with text or with text and "
                    "address.", "gps", rows, "ours", ["address", "text"]),
        claim_above("Without text, ours has a higher GPS score than the nearest photo.", "gps",
                    rows, "without-text", ["nearest"]),
    ]
    if "place" not in ours:
        return claims
    for question in ("place", "object"):
        seen, unseen = ours[question], ours[f"unseen_{question}"]
        claims += [
            claim_at_least(f"The {question} is right in {SEEN_GOAL:g} % of images of seen pairs.",
                           seen, SEEN_GOAL),
            claim_at_least(f"In images of unseen pairs the {question} is right {UNSEEN_GOAL:g} "
                           "times as often.", unseen, UNSEEN_GOAL * seen.mean),
        ]
    return claims
