"""What a dataset folder holds, and how it is written and read back (docs/formats.md). No torch."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gps_guidance import geo

VERSION = "1"
OWN_IMAGE = re.compile(r"[0-9a-f]{16}\.jpg")  # under images/
SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("file", pa.string()), ("sha256", pa.string()),
        ("phash", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
        ("lat", pa.float64()), ("lon", pa.float64()), ("horizontal_error_m", pa.float64()),
        ("heading_deg", pa.float64()), ("east_m", pa.float64()), ("north_m", pa.float64()),
        ("bearing_deg", pa.float64()), ("distance_m", pa.float64()), ("bin", pa.int32()),
        ("taken_at", pa.string()), ("owner", pa.string()), ("licence", pa.string()),
        ("source", pa.string()), ("url", pa.string()), ("caption", pa.string()),
        ("address", pa.string()), ("split", pa.string()),
    ],
    metadata={"gps_guidance_manifest_version": VERSION},
)
REJECTED = pa.schema([("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

# Why a photo is left out, as docs/formats.md says at length.
REASONS = frozenset({
    "not_an_image", "bad_record", "unreadable", "truncated", "not_downloaded", "too_large",
    "too_small", "no_gps", "bad_gps", "null_island", "out_of_range", "outside_bounds", "too_far",
    "too_near", "duplicate", "near_duplicate", "taken_down", "owner_limit", "few_owners",
})


class Rejected(Exception):
    """A photo that does not enter the dataset: one of :data:`REASONS`, and a detail for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass
class Manifest:
    """A dataset folder as read back: its rows, and the landmark with its centre (lat, lon) or the
    box of the city."""

    rows: pa.Table
    root: Path
    landmark: str | None = None
    center: geo.LatLon | None = None
    bounds: geo.Bounds | None = None
    counts: dict[str, int] = field(default_factory=dict)
    num_bins: int = 36


def is_dataset(folder: str | Path) -> bool:
    """Whether this is a dataset folder."""
    return all((Path(folder) / name).is_file() for name in ("dataset.json", "manifest.parquet"))


def load_manifest(root: str | Path) -> Manifest:
    """Read a dataset folder back; ValueError if it is none or of another version."""
    root = Path(root)
    if not is_dataset(root):
        raise ValueError(f"{root} is not a dataset folder: make one with `gps-guidance ingest`.")
    about = json.loads((root / "dataset.json").read_text("utf-8"))
    if about["version"] != VERSION:
        raise ValueError(
            f"{root} has manifest version {about['version']}, this release reads {VERSION}: run "
            "`gps-guidance ingest` again."
        )
    center = tuple(about["center"]) if about["center"] else None
    bounds = geo.Bounds(*about["bounds"]) if about["bounds"] else None
    rows = pq.read_table(root / "manifest.parquet")
    if "address" not in rows.schema.names:  # written before there was this column
        index = SCHEMA.get_field_index("address")
        rows = rows.add_column(index, SCHEMA[index], pa.nulls(len(rows), SCHEMA[index].type))
    return Manifest(rows, root, about["landmark"], center, bounds, about["rejected"],
                    about["num_bins"])


class TableBuilder:
    """A table that grows by rows or by tables; rows do not stay Python objects for long."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema, self._tables = schema, [schema.empty_table()]
        self._rows: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one row; what it does not have is null."""
        self._rows.append(row)
        if len(self._rows) >= 4096:
            self._flush()

    def extend(self, columns: Mapping[str, Any], count: int) -> None:
        """Add ``count`` rows by columns; missing ones, and those that are None, are null."""
        self._flush()
        arrays = [
            pa.nulls(count, field.type) if columns.get(field.name) is None
            else pa.array(columns[field.name], field.type, from_pandas=True)
            for field in self._schema
        ]
        self._tables.append(pa.Table.from_arrays(arrays, schema=self._schema))

    def _flush(self) -> None:
        if self._rows:
            self._tables.append(pa.Table.from_pylist(
                [{name: row.get(name) for name in self._schema.names} for row in self._rows],
                schema=self._schema,
            ))
            self._rows = []

    def table(self) -> pa.Table:
        self._flush()
        return pa.concat_tables(self._tables).combine_chunks()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file at once; the same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file at once: under a temporary name, then renamed. A full disk is a ValueError."""
    stage = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        stage.write_bytes(data)
        os.replace(stage, path)
    except OSError as error:
        stage.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"The disk is full: {path} needs {len(data)} more bytes. Make room and run the same "
            "command again; it goes on where it stopped."
        ) from error
