"""The paper in miniature from the bundled models: how long it takes, and what comes out.

    python benchmarks/reproduce.py

Runs ``gps-guidance reproduce`` one experiment after the other into ``outputs/reproduce``; Tables 1
to 3 share nothing, so that each one's minutes are those of making it alone, and of the others what
they add. Needs ``pip install -e ".[colmap]"``. Prints JSON lines {"name", "value", "goal", "ok"}.
"""

from __future__ import annotations

import json
import re
import sys

from stages import ROOT, line, stage

OUT = ROOT / "outputs" / "reproduce"
TABLES = ("table1", "table2", "table3")
OTHERS = ("ablation-geo", "ablation-3d", "fig6", "fig8", "fig9")
MOST_MINUTES, MOST_TABLE_MINUTES = 60, 20
GOALS = {"table1": {"place": 85, "object": 85},
         "table2": {"angle_accuracy": 60, "within_one": 90}}  # of ours
CLAIM = re.compile(rf"\b({'|'.join(TABLES + OTHERS)}): (holds|does not hold): ")


def main() -> int:
    seconds = {name: stage(OUT, name, ["-m", "gps_guidance.cli", "reproduce", name, "--out",
                                       str(OUT / "report")], threads=None)
               for name in TABLES + OTHERS}
    good = [line(f"reproduce.minutes.{name}", spent / 60,
                 MOST_TABLE_MINUTES if name in TABLES else None, below=True)
            for name, spent in seconds.items()]
    good.append(line("reproduce.minutes", sum(seconds.values()) / 60, MOST_MINUTES, below=True))
    for table, goals in GOALS.items():
        ours = json.loads((OUT / "report" / f"{table}.json").read_text())["rows"]["ours"]
        good += [line(f"reproduce.{table}.{key}", ours[key], goal) for key, goal in goals.items()]
    for name in seconds:
        told = [held == "holds" for found, held in CLAIM.findall((OUT / f"{name}.log").read_text())
                if found == name]
        if told:
            line(f"reproduce.claims_that_hold.{name}", sum(told))
            line(f"reproduce.claims.{name}", len(told))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
