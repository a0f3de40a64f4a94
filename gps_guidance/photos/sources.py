"""Where photos come from: folders, tables and answers of services, as records. No torch.

What a source was read as, and which of its columns as what, is logged at INFO; docs/formats.md
lists the kinds and the names.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from gps_guidance.photos.columns import RECORD, Box
from gps_guidance.photos.flickr import LICENCES as FLICKR_LICENCES
from gps_guidance.photos.images import EXTENSIONS
from gps_guidance.photos.tables import OnBad, open_bytes, read_csv, read_json, read_parquet
from gps_guidance.photos.takeout import match_sidecars

__all__ = ["FLICKR_LICENCES", "RECORD", "TABLES", "find_files", "read_records"]

logger = logging.getLogger(__name__)

Reader = Callable[[Path, int, "Box | None", OnBad], Iterator[pa.RecordBatch]]
TABLES: dict[str, Reader] = {
    ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet, ".json": read_json,
    ".geojson": read_json, ".jsonl": read_json, ".ndjson": read_json, ".geojsonl": read_json,
}


def find_files(sources: Sequence[str | Path]) -> Iterator[Path]:
    """Files under the sources (folders or files) in a fixed order, hidden ones left out."""
    for source in map(Path, sources):
        if source.is_file():
            yield source
        elif source.is_dir():
            for path in sorted(source.rglob("*")):
                hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
                if path.is_file() and not hidden:
                    yield path
        else:
            raise ValueError(f"There is no file or folder {source}. Give a folder of photos.")


def read_records(
    sources: Sequence[str | Path], batch_size: int = 65536, *, near: Box | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches of :data:`RECORD`, at most ``batch_size`` rows each, from all sources in turn.

    Positions are (lat, lon) in degrees, as the source has them: nothing is checked but a swap of
    the two columns, for which ``near`` (south, west, north, east) is where the photos should be.
    ``on_bad(source, detail)`` is told each row that cannot be read; without it, each source's
    number of them is a warning. ValueError for a source that is missing or of no known kind, at
    once, and for a table without a position, when it is reached.
    """
    readers = [(Path(source), _reader(Path(source))) for source in sources]
    return chain.from_iterable(
        _read(source, reader, batch_size, near, on_bad) for source, reader in readers
    )


def _read(
    source: Path, reader: Reader, batch_size: int, near: Box | None, on_bad: OnBad | None
) -> Iterator[pa.RecordBatch]:
    told: list[tuple[str, str]] = []
    tell = on_bad or (lambda where, detail: told.append((where, detail)))
    try:
        for batch in reader(source, batch_size, near, tell):
            if len(batch):
                yield batch
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        tell(source.name, f"the rest of the file is not read: {error}")
    if told:
        logger.warning("%s: %d rows cannot be read and are left out, the first is %s: %s",
                       source, len(told), *told[0])


def _reader(source: Path) -> Reader:
    """How to read a source; ValueError if it is missing, empty or of no known kind."""
    if source.is_dir():
        return _read_folder
    next(find_files([source]))  # or its error
    suffixes = [suffix.lower() for suffix in source.suffixes[-2:]]
    kind = suffixes[0] if suffixes[1:] == [".gz"] else "".join(suffixes[-1:])
    if kind in EXTENSIONS:
        return _read_folder
    if kind in TABLES:
        with open_bytes(source) as stream:
            head = stream.read(4)
        if not head:
            raise ValueError(f"{source} is empty.")
        is_parquet = head == b"PAR1"
        if is_parquet == (kind == ".parquet") and head != b"PK\3\4":
            return TABLES[kind]
    raise ValueError(
        f"{source} is of no known kind. A source is a folder of photos, a photo "
        f"({', '.join(sorted(EXTENSIONS))}), or a table ({', '.join(TABLES)}; the text ones also "
        "with .gz) whose content is what its name says."
    )


def _read_folder(
    folder: Path, batch_size: int, near: Box | None, on_bad: OnBad
) -> Iterator[pa.RecordBatch]:
    """One record a file; a sidecar of Google Takeout is none, but gives its photo what it says."""
    files = list(find_files([folder]))
    sidecars = match_sidecars(files)
    used = {path for path, _ in sidecars.values()}
    files = [path for path in files if path not in used and _is_text(path, on_bad)]
    logger.info("%s is read as photos: %d files, %d with a sidecar of Google Takeout",
                folder, len(files), len(sidecars))
    nothing: dict[str, Any] = dict.fromkeys(RECORD.names)
    for start in range(0, len(files), batch_size):
        rows = [
            nothing | {"source": path.name, "path": str(path)}
            | (sidecars[path][1] if path in sidecars else {})
            for path in files[start : start + batch_size]
        ]
        yield pa.RecordBatch.from_pylist(rows, schema=RECORD)


def _is_text(path: Path, on_bad: OnBad) -> bool:
    """Whether a file's name can be written down: old archives hold names in unknown encodings."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        on_bad(str(path.name).encode("utf-8", "replace").decode(), "its name is not UTF-8")
        return False
    return True
