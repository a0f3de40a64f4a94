"""What became of each photo, written as it happens: a killed run goes on where it was. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Journal:
    """An append-only file of JSON lines: the first holds the settings, each other one result.

    Opened with other settings than those it was begun with, it starts anew. A last line that a
    kill cut short is dropped. Results stay on disk; memory holds 100 bytes for each.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._offsets: dict[bytes, int] = {}
        header = (json.dumps({"settings": dict(settings)}, sort_keys=True) + "\n").encode()
        self._file = open(path, "a+b")
        self._file.seek(0)
        if self._file.readline() != header:
            if self._file.tell():
                log.info("%s is of other settings: photos are read anew", path)
            self._file.truncate(0)
            self._file.write(header)
        self._index(len(header))

    def _index(self, start: int) -> None:
        self._file.seek(start)
        end = start
        for line in self._file:
            key = _key_of(line)
            if key is None:
                break
            self._offsets[_digest(key)] = end
            end += len(line)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def get(self, key: str) -> Any:
        """The result written for ``key``, or None."""
        offset = self._offsets.get(_digest(key))
        if offset is None:
            return None
        self._file.seek(offset)
        return json.loads(self._file.readline())["result"]

    def add(self, key: str, result: Any) -> None:
        """Write one result; it is safe from a kill of the process when this returns."""
        self._offsets[_digest(key)] = self._file.seek(0, os.SEEK_END)
        self._file.write((json.dumps({"key": key, "result": result}) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _key_of(line: bytes) -> str | None:
    """The key of a whole line, None of a broken one."""
    try:
        return str(json.loads(line)["key"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
