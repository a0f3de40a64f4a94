"""The command: which experiments there are, and what they leave."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

from gps_guidance.reproduce import (
    ablation_3d,
    ablation_geo,
    fig6,
    fig8,
    fig9,
    table1,
    table2,
    table3,
)
from gps_guidance.reproduce.outcome import Outcome
from gps_guidance.reproduce.report import write_report
from gps_guidance.reproduce.settings import Settings, load_settings
from gps_guidance.reproduce.work import Done, Unit, Work

log = logging.getLogger(__name__)

# Each has units(settings) -> list[Unit], and outcome(settings, work, done) -> Outcome of theirs.
EXPERIMENTS: dict[str, ModuleType] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "ablation-geo": ablation_geo,
    "ablation-3d": ablation_3d,
    "fig6": fig6,
    "fig8": fig8,
    "fig9": fig9,
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
    units = {name: EXPERIMENTS[name].units(settings) for name in EXPERIMENTS}
    chosen = [name for name in EXPERIMENTS if units[name] and (not names or name in names)]
    # the page also shows what an earlier call has made
    chosen += [name for name in EXPERIMENTS if name not in chosen and units[name]
               and all(map(work.found, units[name]))]
    done = work.run(unit for name in chosen for unit in units[name])
    outcomes: dict[str, Outcome] = {}
    missing = [f"{name} is not made: the settings have nothing that it shows."
               for name in names if not units[name]]
    for name in sorted(chosen, key=list(EXPERIMENTS).index):
        failed = [f"{unit.name}: {done[unit.name].error}" for unit in units[name]
                  if done[unit.name].error]
        if failed:
            missing.append(f"{name} is not made. {' '.join(failed)}")
            continue
        outcomes[name] = _finish(name, settings, work, units[name], done)
    log.info("Open %s", write_report(folder, settings.scale, outcomes))
    return missing


def _finish(name: str, settings: Settings, work: Work, units: Sequence[Unit],
            done: Mapping[str, Done]) -> Outcome:
    """The outcome of an experiment whose units are done; its table is written, its claims told."""
    outcome: Outcome = EXPERIMENTS[name].outcome(settings, work, done)
    outcome.seconds = sum(done[unit.name].seconds for unit in units)
    if outcome.table is not None:
        outcome.table.write(work.folder.parent)
    for claim in outcome.claims:
        log.info("%s: %s: %s (%s)", name, "holds" if claim.holds else "does not hold", claim.text,
                 claim.evidence)
    return outcome

