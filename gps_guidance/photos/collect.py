"""All records of all sources, each kept or rejected, with what its image says. No torch.

A record whose image is to be read goes through the journal: what a stopped run has read, the next
one does not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from gps_guidance import geo
from gps_guidance.photos import cleaning
from gps_guidance.photos.cleaning import Wanted
from gps_guidance.photos.duplicates import tile_colours_of
from gps_guidance.photos.journal import Journal
from gps_guidance.photos.manifest import (
    OWN_IMAGE,
    REJECTED,
    SCHEMA,
    TableBuilder,
    load_manifest,
    write_whole,
)
from gps_guidance.photos.reading import Record, Result, read_photos, stored_size
from gps_guidance.photos.sources import read_records
from gps_guidance.photos.web import download_all

# Beside the manifest's columns: the place in the order of the sources, and the picture's colours.
COLLECTED = SCHEMA.append(pa.field("order", pa.int64())).append(pa.field("tiles", pa.string()))
MAX_DOWNLOAD = 64 << 20  # bytes
DOWNLOADS_AHEAD = 256  # records


def records_of(sources: Sequence[str | Path], out: Path, wanted: Wanted,
               part: tuple[int, int] | None, rejected: TableBuilder) -> Iterator[pa.RecordBatch]:
    """The records of one part of the sources, without files that an earlier run wrote."""
    near = wanted.bounds.as_tuple() if wanted.bounds is not None else None

    def on_bad(source: str, detail: str) -> None:
        rejected.add({"source": source, "reason": "bad_record", "detail": detail})

    for batch in read_records(sources, near=near, on_bad=on_bad):
        mine = np.ones(len(batch), dtype=bool)
        if part is not None:
            keys = batch["source"].to_pylist()
            mine &= [zlib.crc32(key.encode()) % part[1] == part[0] - 1 for key in keys]
        for k in np.flatnonzero(batch["path"].is_valid().to_numpy(zero_copy_only=False)):
            mine[k] &= not _is_ours(Path(batch["path"][int(k)].as_py()), out)
        yield batch.filter(pa.array(mine))


def _is_ours(path: Path, out: Path) -> bool:
    """Whether an earlier run wrote this file, where ``out`` lies within a source."""
    try:
        inside = path.absolute().relative_to(out.absolute())
    except ValueError:
        return False
    own = (rf"(images|downloads)/{OWN_IMAGE.pattern}|dataset\.json|manifest\.parquet"
           r"|rejected\.parquet|takedown\.json|(journal|captions.*)\.jsonl|(shards|inspect)/.*")
    return re.fullmatch(own, inside.as_posix()) is not None


class Collector:
    """From records to rows and rejections, each with its place in the order of the sources."""

    def __init__(self, out: Path, wanted: Wanted, records_only: bool,
                 lost: AbstractSet[str] = frozenset()) -> None:
        """``lost`` are ids of photos whose image has to be made again."""
        self.out, self.wanted, self.records_only, self.lost = out, wanted, records_only, lost
        self.kept, self.rejected = TableBuilder(COLLECTED), TableBuilder(REJECTED)
        self.count = 0
        self.addresses: set[str] = set()

    def reject(self, source: str, reason: str, detail: str) -> None:
        self.rejected.add({"source": source, "reason": reason, "detail": detail})

    def take(self, record: Record, result: Result) -> None:
        """Keep or reject one photo that was read."""
        if "rejected" in result:
            self.reject(record["source"], *result["rejected"])
            return
        row = result["row"]
        columns = cleaning.landmark_columns(np.array([[row["lat"], row["lon"]]]), self.wanted)
        self.kept.add(row | {key: None if value is None else value[0]
                             for key, value in columns.items()} | {"order": record["order"]})

    def screen(self, batch: pa.RecordBatch) -> Iterator[Record]:
        """The records of ``batch`` whose image is to be read; the others are kept or rejected."""
        order = self.count + np.arange(len(batch))
        self.count += len(batch)
        placed = (batch["lat"].is_valid().to_numpy(zero_copy_only=False)
                  & batch["lon"].is_valid().to_numpy(zero_copy_only=False))
        pictured = (batch["path"].is_valid().to_numpy(zero_copy_only=False)
                    | batch["url"].is_valid().to_numpy(zero_copy_only=False))
        if self.records_only:
            pictured[:] = False
        sound = pictured | placed
        points = cleaning.positions_of(batch)
        where = np.flatnonzero(placed)
        for index, (reason, detail) in cleaning.unwanted_positions(
                points[where], self.wanted).items():
            self.reject(batch["source"][int(where[index])].as_py(), reason, detail)
            sound[where[index]] = False
        for bare in np.flatnonzero(~pictured & ~placed):
            self.reject(batch["source"][int(bare)].as_py(), "no_gps", "no position")
        self._keep_records(batch, points, order, sound & ~pictured)
        chosen = np.flatnonzero(sound & pictured)
        for record, place in zip(batch.take(pa.array(chosen)).to_pylist(), order[chosen].tolist(),
                                 strict=True):
            if record["lat"] is None or record["lon"] is None:
                record["lat"] = record["lon"] = None
            if record["path"] is None and record["url"] in self.addresses:
                self.reject(record["source"], "duplicate", "the same address as an earlier one")
                continue
            self.addresses.add(record["url"])
            yield record | {"order": place}

    def _keep_records(self, batch: pa.RecordBatch, points: geo.Array, order: np.ndarray,
                      mask: np.ndarray) -> None:
        """Rows for records whose image is not read: their id is a hash of what names them."""
        if not mask.any():
            return
        part = batch.filter(pa.array(mask))
        columns = {name: part[name] for name in part.schema.names if name != "path"}
        places = pc.cast(part["lat"], pa.string()), pc.cast(part["lon"], pa.string())
        row = pc.binary_join_element_wise(part["source"], *places, " ")
        named = pc.coalesce(part["url"], part["path"], row).to_pylist()
        columns["id"] = [hashlib.sha256(name.encode()).hexdigest()[:16] for name in named]
        columns |= cleaning.landmark_columns(points[mask], self.wanted)
        self.kept.extend(columns | {"order": order[mask]}, len(part))

    def read(self, batches: Iterable[pa.RecordBatch], processes: int, progress: bool) -> None:
        """Read all records; what is in the journal is not read again."""
        settings = {key: str(value) for key, value in vars(self.wanted).items()}
        with Journal(self.out / "journal.jsonl", settings) as journal, tqdm(
            desc="ingesting", unit="photo", total=0, disable=not progress
        ) as bar:

            def to_read() -> Iterator[Record]:
                for batch in batches:
                    bar.total += len(batch)
                    pictures = 0
                    for record in self.screen(batch):
                        pictures += 1
                        record["key"] = _key(record)
                        result = journal.get(record["key"])
                        if result and result.get("row", {}).get("id") not in self.lost:
                            self.take(record, result)
                            bar.update()
                        else:
                            yield record
                    bar.update(len(batch) - pictures)

            files = self._with_files(to_read())
            for record, result in read_photos(files, self.out, self.wanted, processes):
                self._finish(record, result, journal)
                bar.update()
        shutil.rmtree(self.out / "downloads", ignore_errors=True)

    def _finish(self, record: Record, result: Result, journal: Journal) -> None:
        if journal.get(record["key"]) != result:
            journal.add(record["key"], result)
        self.take(record, result)
        if record["url"] is not None and Path(record["path"]).parent == self.out / "downloads":
            Path(record["path"]).unlink(missing_ok=True)

    def _with_files(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records with a file each: those that have only an address are downloaded."""
        (self.out / "downloads").mkdir(exist_ok=True)
        for group in iter(lambda: list(islice(records, DOWNLOADS_AHEAD)), []):
            yield from (record for record in group if record["path"] is not None)
            remote = {record["url"]: record for record in group if record["path"] is None}
            targets = [(url, self._target(url)) for url in remote]
            for found in download_all(targets, max_bytes=MAX_DOWNLOAD):
                record = remote[found.url]
                if found.error is None:
                    yield record | {"path": str(found.target)}
                else:  # not in the journal: another run tries again
                    self.take(record, {"rejected": ["not_downloaded", found.error]})

    def _target(self, url: str) -> Path:
        return self.out / "downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.jpg"


def _key(record: Record) -> str:
    """Names a record and, of a local file, its state."""
    state: tuple[int, ...] = ()
    if record["path"] is not None:
        try:
            found = os.stat(record["path"])
            state = (found.st_size, found.st_mtime_ns)
        except OSError:
            state = (-1,)
    fields = {name: value for name, value in record.items() if name != "order"}
    return json.dumps([fields, state], sort_keys=True)


def merge(folder: Path, out: Path, collector: Collector) -> None:
    """Take over the photos and the rejections of another dataset folder."""
    found = load_manifest(folder)
    rows, wanted = found.rows, collector.wanted
    points = cleaning.positions_of(rows)
    bad = cleaning.unwanted_positions(points, wanted)
    for index, (reason, detail) in bad.items():
        collector.reject(rows["source"][index].as_py(), reason, detail)
    good = np.setdiff1d(np.arange(len(rows)), list(bad))
    rows, points = rows.take(pa.array(good)), points[good]
    for name in filter(None, rows["file"].to_pylist()):
        if stored_size(out / name) is None:
            write_whole(out / name, (folder / name).read_bytes())
    columns = {name: rows[name] for name in rows.schema.names}
    columns["tiles"] = [name and tile_colours_of(folder / name)
                        for name in rows["file"].to_pylist()]
    columns |= cleaning.landmark_columns(points, wanted)
    collector.kept.extend(columns | {"order": collector.count + np.arange(len(rows))}, len(rows))
    collector.count += len(found.rows)
    refused = pq.read_table(folder / "rejected.parquet")
    collector.rejected.extend({name: refused[name] for name in REJECTED.names}, len(refused))
