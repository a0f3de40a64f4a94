"""The command: which experiments there are, and what they leave."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

from gps_guidance.reproduce import (
    table1,
)
from gps_guidance.reproduce.outcome import Outcome
from gps_guidance.reproduce.report import write_report
from gps_guidance.reproduce.settings import Settings, load_settings
from gps_guidance.reproduce.work import Work

log = logging.getLogger(__name__)

# Each has units(settings) -> list[Unit], and outcome(settings, work, done) -> Outcome of theirs.
EXPERIMENTS: dict[str, ModuleType] = {
    "table1": table1,
}


def reproduce(names: Sequence[str], out: str | Path, scale: str = "miniature",
              overrides: Sequence[str] = (), processes: int | None = None) -> list[str]:
    """Do the experiments, all of them if there are no ``names``, and write tables, pictures and
    ``report.html`` under ``out``. Returns why some were not made: a sentence each.

    Called again it goes on where it stopped. ``processes`` at a time: by default one for each core
    of a CPU, one on CUDA. ValueError for an unknown name or setting.
    """
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"There is no experiment {', '.join(unknown)}: it is "
                         f"{', '.join(EXPERIMENTS)}.")
    settings = load_settings(scale, overrides)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if processes is None:
        processes = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    work = Work(folder / "work", processes)
    outcomes: dict[str, Outcome] = {}
    missing = []
    chosen = [name for name in EXPERIMENTS if not names or name in names]
    units = {name: EXPERIMENTS[name].units(settings) for name in chosen}
    done = work.run(unit for name in chosen for unit in units[name])
    for name in chosen:
        failed = [f"{unit.name}: {done[unit.name].error}" for unit in units[name]
                  if done[unit.name].error]
        if failed:
            missing.append(f"{name} is not made. {' '.join(failed)}")
            continue
        outcome = EXPERIMENTS[name].outcome(settings, work, done)
        outcome.seconds = sum(done[unit.name].seconds for unit in units[name])
        if outcome.table is not None:
            outcome.table.write(folder)
        outcomes[name] = outcome
    log.info("Open %s", write_report(folder, settings.scale, outcomes))
    return missing


def claims(outcomes: dict[str, Outcome]) -> Iterator[str]:
    """One line for each claim."""
    for name, outcome in outcomes.items():
        for claim in outcome.claims:
            yield f"{name}: {'holds' if claim.holds else 'DOES NOT HOLD'}: {claim.text}"
