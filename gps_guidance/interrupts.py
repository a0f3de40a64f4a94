"""Ctrl-C and SIGTERM, which stop a training between two of its steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context in which the first Ctrl-C or SIGTERM raises KeyboardInterrupt, and later ones do
    nothing, so that what the first one makes is saved in peace.

    Outside of the main thread, which signals never reach, it changes nothing.
    """

    def __init__(self) -> None:
        self.pending = False  # it came while held back
        self._stopped = False
        self._holds = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """It waits for the end of the block: a checkpoint never holds half an update."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self.pending and not self._holds:
            self.stop()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._holds:
            self.pending = True
        else:
            self.stop()

    def stop(self) -> None:
        """Raise KeyboardInterrupt, once."""
        if not self._stopped:
            self._stopped = True
            raise KeyboardInterrupt


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, by which clusters and ``kill`` stop a process, raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
