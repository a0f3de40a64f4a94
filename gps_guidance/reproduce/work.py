"""Pieces of work that are done once: each in a folder of its own, several at a time."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gps_guidance.photos.manifest import write_whole

log = logging.getLogger(__name__)

RESULT = "result.json"


@dataclass(frozen=True)
class Unit:
    """One piece: ``function(folder, **arguments)`` returns what JSON can hold, and may leave files
    in its folder. It is a function of a module, and its arguments can be JSON too."""

    name: str  # unique; its folder under the work's
    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]

    @property
    def key(self) -> dict[str, Any]:
        """By which a result is known to be this unit's."""
        called = f"{self.function.__module__}.{self.function.__qualname__}"
        return {"function": called, "arguments": json.loads(json.dumps(self.arguments))}


@dataclass(frozen=True)
class Done:
    """What a unit gave: its result, or why there is none."""

    result: dict[str, Any] | None
    seconds: float = 0.0
    error: str | None = None


class Work:
    """A folder of finished units. What is there with the same function and arguments is not done
    again; what stops half-way leaves nothing that counts."""

    def __init__(self, folder: str | Path, processes: int = 1) -> None:
        self.folder, self.processes = Path(folder), processes

    def at(self, unit: Unit) -> Path:
        return self.folder / unit.name

    def found(self, unit: Unit) -> Done | None:
        """The unit's earlier result, None if there is none or it was asked for otherwise."""
        try:
            kept = json.loads((self.at(unit) / RESULT).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        if kept.get("key") != unit.key:
            return None
        return Done(kept["result"], kept["seconds"])

    def run(self, units: Iterable[Unit]) -> dict[str, Done]:
        """Every unit's result by its name, with a progress bar. A unit that fails by a ValueError
        or OSError has its reason instead, and the others go on; Ctrl-C keeps what is finished."""
        by_name = {unit.name: unit for unit in units}
        found = {name: self.found(unit) for name, unit in by_name.items()}
        done = {name: old for name, old in found.items() if old is not None}
        waiting = [unit for unit in by_name.values() if unit.name not in done]
        bar = tqdm(total=len(by_name), initial=len(done), desc="reproducing", unit="piece")
        with bar:
            for unit, one in self._do(waiting):
                done[unit.name] = one
                bar.set_postfix_str(unit.name)
                bar.update()
                if one.error:
                    log.warning("%s: %s", unit.name, one.error)
        return {name: done[name] for name in by_name}

    def _do(self, units: list[Unit]) -> Iterable[tuple[Unit, Done]]:
        if self.processes == 1 or len(units) < 2:
            yield from ((unit, do(unit, self.at(unit))) for unit in units)
            return
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(self.processes, context, _start_process) as pool:
            waiting = {pool.submit(do, unit, self.at(unit)): unit for unit in units}
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise


def _start_process() -> None:
    """Several processes of one thread use a CPU better than one of several threads."""
    import torch

    from gps_guidance.models import quiet_libraries

    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that this one starts
    os.environ["TQDM_DISABLE"] = "1"  # one bar is enough
    torch.set_num_threads(1)
    quiet_libraries()


def do(unit: Unit, folder: Path) -> Done:
    """Do a unit now, and keep its result."""
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = unit.function(folder, **unit.arguments)
    except (ValueError, OSError) as error:
        return Done(None, time.monotonic() - start, str(error))
    done = Done(result, round(time.monotonic() - start, 1))
    kept = {"key": unit.key, "seconds": done.seconds, "result": result}
    write_whole(folder / RESULT, json.dumps(kept).encode())
    return done
