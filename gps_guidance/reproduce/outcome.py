"""What an experiment ends with: a table beside the paper's, pictures, and which claims hold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gps_guidance.metrics import bootstrap_interval
from gps_guidance.photos.manifest import write_whole


@dataclass(frozen=True)
class Score:
    """A mean of ``count`` values with its 95 % interval, of which one value alone has none."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Score:
        """Of values one for each image or seed; ValueError for none, or one that is not finite."""
        found = np.asarray(list(values), dtype=np.float64)
        if len(found) == 1 and np.isfinite(found).all():
            return cls(float(found[0]), float(found[0]), float(found[0]), 1)
        low, high = bootstrap_interval(found, seed=0)
        return cls(float(found.mean()), low, high, len(found))

    def above(self, other: Score) -> bool:
        """Whether this interval lies wholly above the other."""
        return self.low > other.high

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass
class Table:
    """Scores by row and column. ``columns`` and ``titles`` say how keys are shown, ``paper`` has
    the paper's numbers by row and column."""

    name: str
    columns: dict[str, str]
    titles: dict[str, str]
    rows: dict[str, dict[str, Score]]
    paper: dict[str, dict[str, float]] = field(default_factory=dict)

    def cells(self) -> list[list[str]]:
        """The header, and each row: its title, our scores, and the paper's numbers."""
        stated = [key for key in self.columns if any(key in row for row in self.paper.values())]
        head = ["", *self.columns.values(), *(f"paper: {self.columns[key]}" for key in stated)]
        lines = [head]
        for row in [*self.rows, *(row for row in self.paper if row not in self.rows)]:
            ours, theirs = self.rows.get(row, {}), self.paper.get(row, {})
            lines.append([self.titles[row], *(str(ours.get(key, "")) for key in self.columns),
                          *(f"{theirs[key]:.2f}" if key in theirs else "" for key in stated)])
        return lines

    def markdown(self) -> str:
        head, *rows = self.cells()
        return "\n".join(f"| {' | '.join(line)} |" for line in
                         [head, ["---"] * len(head), *rows]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """``rows`` has means, ``intervals`` their bounds, ``counts`` of how many values."""
        def each(get: Any) -> dict[str, dict[str, Any]]:
            return {row: {key: get(score) for key, score in scores.items()}
                    for row, scores in self.rows.items()}

        return {"rows": each(lambda s: s.mean), "intervals": each(lambda s: [s.low, s.high]),
                "counts": each(lambda s: s.count), "paper": self.paper}

    def write(self, folder: str | Path) -> None:
        """``<name>.md``, ``<name>.csv`` and ``<name>.json``."""
        text = io.StringIO()
        keys = [(key, part) for key in self.columns for part in ("mean", "low", "high", "count")]
        sheet = csv.writer(text, lineterminator="\n")
        sheet.writerow(["row", *(key if part == "mean" else f"{key}_{part}" for key, part in keys)])
        for row, scores in self.rows.items():
            sheet.writerow([row, *(getattr(scores[key], part) if key in scores else ""
                                   for key, part in keys)])
        for suffix, data in (("md", self.markdown()), ("csv", text.getvalue()),
                             ("json", json.dumps(self.as_json(), indent=2) + "\n")):
            write_whole(Path(folder) / f"{self.name}.{suffix}", data.encode())


@dataclass(frozen=True)
class Claim:
    """A sentence that the numbers bear out or do not, with the numbers."""

    text: str
    holds: bool
    evidence: str


@dataclass
class Outcome:
    """What one experiment shows. ``pictures`` are (path, caption), ``notes`` sentences about how
    the numbers came about and what is missing."""

    title: str
    table: Table | None = None
    pictures: list[tuple[Path, str]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def claim_above(text: str, key: str, rows: Mapping[str, Mapping[str, Score]], better: str,
                others: Sequence[str]) -> Claim:
    """That ``better``'s interval lies wholly above that of each of ``others``; of rows that are
    there."""
    there = [row for row in others if row in rows and key in rows[row]]
    own = rows[better][key]
    return Claim(text, all(own.above(rows[row][key]) for row in there),
                 f"{better} {own}; " + "; ".join(f"{row} {rows[row][key]}" for row in there))


def claim_at_least(text: str, score: Score, goal: float) -> Claim:
    """That a mean reaches ``goal``."""
    return Claim(text, score.mean >= goal, f"{score}, of {score.count}; the goal is {goal:g}")
