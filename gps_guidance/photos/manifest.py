"""What a dataset folder holds, and how it is written and read back (docs/formats.md). No torch."""

from __future__ import annotations

import errno
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gps_guidance import geo

VERSION = "1"
SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("file", pa.string()), ("sha256", pa.string()),
        ("phash", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
        ("lat", pa.float64()), ("lon", pa.float64()), ("horizontal_error_m", pa.float64()),
        ("heading_deg", pa.float64()), ("east_m", pa.float64()), ("north_m", pa.float64()),
        ("bearing_deg", pa.float64()), ("distance_m", pa.float64()), ("bin", pa.int32()),
        ("taken_at", pa.string()), ("owner", pa.string()), ("licence", pa.string()),
        ("source", pa.string()), ("caption", pa.string()), ("split", pa.string()),
    ],
    metadata={"gps_guidance_manifest_version": VERSION},
)
REJECTED = pa.schema([("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


class Rejected(Exception):
    """A photo that does not enter the dataset: a counted reason and a detail for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
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


def load_manifest(root: str | Path) -> Manifest:
    """Read a dataset folder back; ValueError if it is none or of another version."""
    root = Path(root)
    if not (root / "manifest.parquet").is_file() or not (root / "dataset.json").is_file():
        raise ValueError(f"{root} is not a dataset folder: make one with `gps-guidance ingest`.")
    about = json.loads((root / "dataset.json").read_text("utf-8"))
    if about["version"] != VERSION:
        raise ValueError(
            f"{root} has manifest version {about['version']}, this release reads {VERSION}: run "
            "`gps-guidance ingest` again."
        )
    center = tuple(about["center"]) if about["center"] else None
    bounds = geo.Bounds(*about["bounds"]) if about["bounds"] else None
    return Manifest(pq.read_table(root / "manifest.parquet"), root, about["landmark"], center,
                    bounds, about["rejected"], about["num_bins"])


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file at once: under a temporary name, then renamed. A full disk is a ValueError."""
    stage = path.with_name(f".{path.name}.part")
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
