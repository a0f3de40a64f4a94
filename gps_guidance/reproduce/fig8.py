"""Fig. 8: both ablations as bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gps_guidance.lift.export import staged
from gps_guidance.reproduce import ablation_3d, ablation_geo
from gps_guidance.reproduce.outcome import Outcome, Table
from gps_guidance.reproduce.settings import Settings
from gps_guidance.reproduce.work import Done, Unit, Work

SHOWN = {"ablation-geo": ("clip", "gps"),
         "ablation-3d": ("clip", "mask_iou", "occupancy_iou", "bearing_within_one_bin")}
COLOURS = ("#2f6f9f", "#c8a24a", "#9a9a9a", "#7f5f8f")


def units(settings: Settings) -> list[Unit]:
    return ablation_geo.units(settings) + ablation_3d.units(settings)


def outcome(settings: Settings, work: Work, done: Mapping[str, Done]) -> Outcome:
    parts = [ablation_geo.outcome(settings, work, done), ablation_3d.outcome(settings, work, done)]
    path = work.folder.parent / "fig8.png"
    draw_bars([part.table for part in parts if part.table is not None], path)
    return Outcome("Fig. 8. Ablations", pictures=[(path, "Both ablations; bars are means, lines "
                                                   "their 95 % intervals. The numbers are above.")])


def draw_bars(tables: list[Table], path: Path) -> None:
    """A panel for each score of each table, a bar for each of its rows."""
    panels = [(table, key) for table in tables for key in SHOWN[table.name]
              if key in table.columns]
    figure = Figure(figsize=(2.4 * max(1, len(panels)), 3.4), layout="constrained")
    for at, (table, key) in enumerate(panels):
        _bars(figure.add_subplot(1, len(panels), at + 1), table, key)
    with staged(path) as stage:
        figure.savefig(stage, dpi=110, format="png")


def _bars(axes: Axes, table: Table, key: str) -> None:
    rows = [row for row, scores in table.rows.items() if key in scores]
    scores = [table.rows[row][key] for row in rows]
    means = [score.mean for score in scores]
    spread = [[max(0.0, s.mean - s.low) for s in scores], [max(0.0, s.high - s.mean)
                                                           for s in scores]]
    axes.bar(range(len(rows)), means, 0.7, yerr=spread, capsize=3,
             color=[COLOURS[k % len(COLOURS)] for k in range(len(rows))])
    axes.set_title(table.columns[key], fontsize=9)
    axes.set_xticks(range(len(rows)), [table.titles[row].replace(" ", "\n", 2) for row in rows],
                    fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
