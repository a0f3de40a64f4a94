"""Table 3: landmarks in 3D. Ours, DreamFusion with view-dependent prompts, NeRF from photos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gps_guidance.reproduce.landmark import COLUMNS, method_scores, method_units
from gps_guidance.reproduce.outcome import Claim, Outcome, Score, Table, claim_above
from gps_guidance.reproduce.settings import Settings
from gps_guidance.reproduce.work import Done, Unit, Work

TITLES = {"ours": "ours", "view-prompts": "DreamFusion, view-dependent prompts",
          "nerf": "NeRF from photos"}
PAPER = {"nerf": {"clip": 20.57}, "view-prompts": {"clip": 29.49}, "ours": {"clip": 31.87}}
ABSOLUTE = {"mask_iou": "mask IoU", "occupancy_iou": "occupancy IoU",
            "bearing_within_one_bin": "share of right bearings"}


def units(settings: Settings) -> list[Unit]:
    return units_of(settings, TITLES)


def units_of(settings: Settings, methods: Mapping[str, str]) -> list[Unit]:
    return [unit for landmark in settings.landmarks for method in methods
            for unit in method_units(landmark, method, settings.seeds_3d)]


def outcome(settings: Settings, work: Work, done: Mapping[str, Done]) -> Outcome:
    rows = rows_of(settings, TITLES, done)
    made = Outcome("Table 3. Landmarks in 3D", table_of("table3", TITLES, rows, PAPER),
                   views_of(settings, work, rows, TITLES))
    made.claims = claims_of(rows, ["view-prompts"], "DreamFusion with view-dependent prompts")
    made.notes = [_about_nerf(settings, done),
        "Intervals are over seeds and landmarks. Absolute scores compare with the truth where it "
        "stands; a run without bearings may be coherent and stand rotated, so the scores after the "
        "best turn about the vertical are reported too.",
        "The paper's Perceptual Quality and Tourist Score are given by people and not made again.",
    ]
    return made


def _about_nerf(settings: Settings, done: Mapping[str, Done]) -> str:
    """All or nothing: of how many landmarks."""
    found = {landmark.name: done[unit.name].result or {} for landmark in settings.landmarks
             for unit in method_units(landmark, "nerf", settings.seeds_3d)}
    if not found:
        return ("NeRF from photos was not run: it needs photos, and pip install "
                "'gps-guidance[colmap]'.")
    each = [f"{name}: {one['verdict']}, COLMAP placed {one['registered']} of {one['photos']} photos"
            + (f" ({one['reason']})" if one.get("reason") else "") for name, one in found.items()]
    return f"NeRF from photos, by COLMAP and one seed. {'; '.join(each)}."


def rows_of(settings: Settings, methods: Mapping[str, str], done: Mapping[str, Done]
            ) -> dict[str, dict[str, Score]]:
    """The scores of each method that was run."""
    found = {method: method_scores(settings.landmarks, method, settings.seeds_3d, done)
             for method in methods}
    return {method: scores for method, scores in found.items() if scores}


def table_of(name: str, titles: Mapping[str, str], rows: dict[str, dict[str, Score]],
             paper: dict[str, dict[str, float]] | None = None) -> Table:
    columns = {key: title for key, title in COLUMNS.items()
               if any(key in row for row in rows.values())}
    return Table(name, columns, dict(titles), rows, paper or {})


def views_of(settings: Settings, work: Work, rows: Mapping[str, object],
             titles: Mapping[str, str]) -> list[tuple[Path, str]]:
    """A strip of views around each landmark by each method, of the first seed."""
    return [(work.at(unit) / "views.png", f"{landmark.name}: {titles[method]}, seed "
             f"{settings.seeds_3d[0]}; a view each 30 degrees of bearing, from north")
            for landmark in settings.landmarks for method in rows
            for unit in method_units(landmark, method, settings.seeds_3d[:1])
            if (work.at(unit) / "views.png").is_file()]


def claims_of(rows: Mapping[str, Mapping[str, Score]], others: list[str], what: str) -> list[Claim]:
    if not all(key in rows.get("ours", {}) for key in ABSOLUTE):
        return []  # without the truth there is nothing to claim
    return [claim_above(f"Ours has a higher {name} than {what}.", key, rows, "ours", others)
            for key, name in ABSOLUTE.items()]
