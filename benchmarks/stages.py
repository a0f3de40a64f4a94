"""What the benchmarks share: stages that run once, and lines of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout, installed or not


def stage(out: Path, name: str, command: list[str], threads: int | None = 1) -> float:
    """Run a command of this project in a process of its own; returns its seconds.

    The log is ``out/name.log``; the seconds stay in ``out/name.json``, and a stage that has them
    is not run again. ``threads`` bounds the process's threads (None: as a user would run it).
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / f"{name}.json"
    if record.is_file():
        return float(json.loads(record.read_text())["seconds"])
    print(f"{name}: {' '.join(command)}", file=sys.stderr)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    start = time.monotonic()
    with open(out / f"{name}.log", "w") as log:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log,
                              env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed with exit code {done.returncode}: see {out / name}.log")
    seconds = time.monotonic() - start
    record.write_text(json.dumps({"seconds": round(seconds, 1), "command": command}) + "\n")
    return seconds


def launch(out: Path, config: str, name: str, overrides: list[str],
           flags: list[str] | None = None, threads: int | None = 1) -> float:
    """``launch.py --train`` as a stage, into ``out/trials/<config>/<name>``; its seconds."""
    return stage(out, name, [
        "launch.py", "--config", config, "--train", "--engine", "portable", *(flags or []),
        f"exp_root_dir={out / 'trials'}", f"name={Path(config).stem}", f"tag={name}",
        "use_timestamp=false", *overrides,
    ], threads)


def scores(out: Path, config: str, name: str) -> dict[str, Any]:
    """The ``metrics.json`` of a run of :func:`launch`."""
    path = out / "trials" / Path(config).stem / name / "metrics.json"
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def line(name: str, value: float, goal: float | None = None, below: bool = False) -> bool:
    """Print one result; a value without a goal is reported only. Returns whether it is met."""
    ok = goal is None or (value <= goal if below else value >= goal)
    print(json.dumps({"name": name, "value": round(value, 3), "goal": goal, "ok": ok}), flush=True)
    return ok
