"""CSV, Parquet and JSON files read as batches of records, never a whole table at once. No torch."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv

from gps_guidance.photos import flickr
from gps_guidance.photos.columns import Box, Reading

OnBad = Callable[[str, str], None]

DELIMITERS = ",;\t|"
BLOCK_BYTES = 1 << 22
MAX_FIELD_BYTES = 1 << 16  # no caption is so long: a quote was opened and never closed
# Where answers of services keep their list of photos.
LISTS = (("photos", "photo"), ("photoset", "photo"), ("features",), ("data",), ("result", "data"),
         ("currentPageItems",))
LINES = {".jsonl", ".ndjson", ".geojsonl"}
BLANK = b" \t\r\n\x1e\xef\xbb\xbf"  # with the mark of UTF-8 and that of a record
JSONP = re.compile(rb"\s*[\w.$]+\((.*)\)\s*;?\s*", re.DOTALL)


def open_bytes(file: Path) -> BinaryIO:
    """A file's bytes, unzipped if its name ends in .gz."""
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore


def read_csv(
    file: Path, batch_size: int, near: Box | None, on_bad: OnBad
) -> Iterator[pa.RecordBatch]:
    """Rows of a CSV or TSV file, UTF-8 or (with its mark) UTF-16; row 1 is the header."""
    delimiter, names = _header(file)
    reading = Reading(file, f"CSV with {delimiter!r} between columns", near)
    reading.choose(names)
    used = sorted({of for columns in reading.columns.values() for of in columns} | {names[-1]})
    skipped: list[int] = []

    def skip(row: Any) -> str:
        skipped.append(row.number)
        on_bad(f"{file.name}:{row.number}",
               f"{row.actual_columns} columns instead of {row.expected_columns}")
        return "skip"

    with _text_of(file) as text:
        reader = arrow_csv.open_csv(
            io.BufferedReader(_Utf8(text)),
            read_options=arrow_csv.ReadOptions(  # one thread, or rows have no numbers
                use_threads=False, block_size=BLOCK_BYTES, column_names=names),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=used, column_types={name: pa.string() for name in used}),
        )
        start = 1
        for block in reader:
            rows = np.setdiff1d(np.arange(start, start + len(block) + len(skipped)), skipped)
            rows = rows[: len(block)]
            start = int(rows[-1]) + 1 if len(rows) else start
            for batch, numbers in _slices(block, rows, batch_size):
                long = np.zeros(len(batch), bool)
                for column in batch.columns:
                    size = pc.fill_null(pc.binary_length(column), 0)
                    long |= size.to_numpy(zero_copy_only=False) > MAX_FIELD_BYTES
                for number in numbers[long]:
                    on_bad(f"{file.name}:{number}", "a quote is opened and never closed")
                rest = ~long & (numbers > 1)
                batch = batch.filter(pa.array(rest))
                yield reading.records(dict(zip(used, batch.columns, strict=True)), numbers[rest])


def _text_of(file: Path) -> io.TextIOWrapper:
    """A file's text; bytes that are none are replaced: an accent is not worth a row."""
    with open_bytes(file) as raw:
        utf16 = raw.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return io.TextIOWrapper(open_bytes(file), "utf-16" if utf16 else "utf-8-sig", "replace", "")


class _Utf8(io.RawIOBase):
    """A text as bytes again, for pyarrow, which stops at a broken row that is not UTF-8."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.rest = text, b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        self.rest = self.rest or self.text.read(1 << 16).encode()
        size = min(len(target), len(self.rest))
        target[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def _header(file: Path) -> tuple[str, list[str]]:
    """Delimiter and column names of a CSV file, the names made unique."""
    with _text_of(file) as text:
        line = next((line for line in text if line.strip()), "")
        delimiter = max(DELIMITERS, key=lambda d: len(_split([line], d)))
        try:
            names = _split(chain([line], text), delimiter)
        except csv.Error as error:
            raise ValueError(f"{file} has no header that can be read: {error}") from error
    return delimiter, [f"{name}#{k}" if name in names[:k] else name for k, name in enumerate(names)]


def _split(lines: Iterable[str], delimiter: str) -> list[str]:
    return next(csv.reader(lines, delimiter=delimiter), [])


def _slices(
    block: pa.RecordBatch, rows: np.ndarray, size: int
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    for start in range(0, len(block), size):
        yield block.slice(start, size), rows[start : start + size]


def read_parquet(
    file: Path, batch_size: int, near: Box | None, on_bad: OnBad
) -> Iterator[pa.RecordBatch]:
    """Rows of a Parquet file, the first being row 1; fields of a struct are ``struct.field``."""
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no whole Parquet file: {error}") from error
    reading = Reading(file, "Parquet", near)
    flat = parquet.schema_arrow.empty_table().flatten().schema
    reading.choose(item.name for item in flat if not pa.types.is_nested(item.type))
    used = {of for columns in reading.columns.values() for of in columns}
    top = [name for name in parquet.schema_arrow.names
           if name in used or any(of.startswith(f"{name}.") for of in used)]
    start = 1
    for batch in parquet.iter_batches(batch_size, columns=top):
        table = pa.Table.from_batches([batch]).flatten()
        arrays = {name: pa.concat_arrays(table[name].chunks) for name in used}
        yield reading.records(arrays, np.arange(start, start + len(batch)))
        start += len(batch)


def read_json(
    file: Path, batch_size: int, near: Box | None, on_bad: OnBad
) -> Iterator[pa.RecordBatch]:
    """Photos of a JSON file: one object a line, a list, GeoJSON, or answers of a service's API.

    A record's number is its line, or its place where a document holds many. A document of more
    than one line is read whole; large ones belong into lines.
    """
    reading: Reading | None = None
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []

    def batch() -> pa.RecordBatch:
        nonlocal reading
        if reading is None:
            reading = Reading(file, kind, near)
            reading.choose(dict.fromkeys(chain.from_iterable(rows)))
        used = {of for columns in reading.columns.values() for of in columns}
        table = {name: _array([row.get(name) for row in rows]) for name in used}
        return reading.records(table, numbers)

    for number, found in _objects(file, on_bad):
        if not rows and reading is None:
            kind = ("photos of Flickr's API" if flickr.is_photo(found)
                    else "GeoJSON" if found.get("type") == "Feature" else "JSON")
        rows.append(_row(found))
        numbers.append(number)
        if len(rows) == batch_size:
            yield batch()
            rows, numbers = [], []
    if rows:
        yield batch()


def _array(values: list[Any]) -> pa.Array:
    """Values of one type as an array of it, of several as text."""
    try:
        return pa.array(values)
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        return pa.array([None if value is None else str(value).encode("utf-8", "replace").decode()
                         for value in values])


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """An object as one level of columns: ``outer.inner`` for what is within another."""
    if flickr.is_photo(found):
        return flickr.row_of(found)
    inner = found.get("properties")
    if found.get("type") == "Feature" and isinstance(inner, dict):
        found = {**found, **inner, "geometry": found.get("geometry")}
    row: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            row |= {f"{key}.{name}": of for name, of in value.items()
                    if not isinstance(of, (dict, list))}
        elif not isinstance(value, list):
            row[key] = value
    for key in ("geometry", "computed_geometry"):  # the second is Mapillary's correction
        point = found.get(key)
        at = point.get("coordinates") if isinstance(point, dict) else None
        if isinstance(at, list) and len(at) in (2, 3):
            row["geometry.longitude"], row["geometry.latitude"] = at[:2]
    return row


def _objects(file: Path, on_bad: OnBad) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every photo's object with its number; what is none is told to ``on_bad``."""
    by_line = bool(LINES & {suffix.lower() for suffix in file.suffixes})
    with open_bytes(file) as stream:
        for line, document, error in _documents(stream, by_line):
            if error is not None:
                on_bad(f"{file.name}:{line}" if line else file.name, error)
                continue
            for place, found in enumerate(_photos_of(document), start=1):
                number = line if line and found is document else place
                if not isinstance(found, dict):
                    on_bad(f"{file.name}:{number}", f"no object but {str(found)[:80]!r}")
                elif found.get("stat") == "fail":
                    on_bad(f"{file.name}:{number}", f"Flickr answered {found.get('message')!r}")
                else:
                    yield number, found


def _documents(stream: BinaryIO, by_line: bool) -> Iterator[tuple[int | None, Any, str | None]]:
    """Line, document, and what is wrong with it; without a line, where the file is one document:
    it is if its first line is none of its own, unless ``by_line``."""
    number: int | None
    for number, text in enumerate(stream, start=1):
        if not text.strip(BLANK):
            continue
        document, error = _parsed(text)
        if error is not None and not by_line:
            number, (document, error) = None, _parsed(text + stream.read())
        by_line = True
        yield number, document, error


def _parsed(text: bytes) -> tuple[Any, str | None]:
    """The document in JSON or JSONP, or what is wrong with it."""
    wrapped = JSONP.fullmatch(text)
    try:
        return json.loads(wrapped[1] if wrapped else text.lstrip(b"\x1e")), None
    except (ValueError, RecursionError) as error:
        return None, f"no JSON: {error}"


def _photos_of(document: Any) -> list[Any]:
    if isinstance(document, list):
        return document
    for keys in LISTS:
        found = document
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, list):
            return found
    return [document]
