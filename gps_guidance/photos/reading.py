"""Photo files to stored images and rows of the manifest, on all cores. No torch."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from PIL import Image

from gps_guidance.photos.cleaning import Wanted, check_position
from gps_guidance.photos.columns import RECORD
from gps_guidance.photos.duplicates import tile_colours
from gps_guidance.photos.exif import GPSReading, caption_of, position_of
from gps_guidance.photos.images import EXTENSIONS, difference_hash, open_image, upright
from gps_guidance.photos.manifest import Rejected, write_whole

Record = dict[str, Any]  # one row of RECORD, and what the caller wants to find again
Result = dict[str, Any]  # {"row": columns of the manifest} or {"rejected": [reason, detail]}
CHUNK = 8  # photos a task: less waiting between processes


def read_photo(record: Record, out: Path, wanted: Wanted) -> Record:
    """Write one photo's image under ``out`` and return its row; Rejected says why it is left out.

    What the record says of position, time and caption counts before the photo's own metadata.
    """
    path = Path(record["path"])
    if path.suffix.lower() not in EXTENSIONS:
        raise Rejected("not_an_image", path.suffix or "no extension")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Rejected("unreadable", f"{type(error).__name__}: {error.strerror}") from error
    with open_image(data) as photo:
        if min(photo.size) < wanted.min_size:
            raise Rejected("too_small", f"{photo.width} x {photo.height} pixels")
        columns = _metadata(record, photo)
        check_position(columns["lat"], columns["lon"], wanted)
        image = upright(photo, wanted.image_size)
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"images/{sha256[:16]}.jpg"
    if stored_size(out / name) != image.size:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        write_whole(out / name, buffer.getvalue())
    return columns | {
        "id": sha256[:16], "file": name, "sha256": sha256, "phash": difference_hash(image),
        "width": image.width, "height": image.height, "tiles": tile_colours(image),
    }


def _metadata(record: Record, photo: Image.Image) -> Record:
    reading: GPSReading | None = None
    try:
        reading = position_of(photo)
    except Rejected:
        if record["lat"] is None:
            raise
    row = {name: record[name] for name in RECORD.names if name != "path"}
    if record["lat"] is None and reading is not None:
        row |= {"lat": reading.lat, "lon": reading.lon,
                "horizontal_error_m": reading.horizontal_error_m}
    if reading is not None:
        for name in ("heading_deg", "taken_at"):
            row[name] = getattr(reading, name) if row[name] is None else row[name]
    if row["caption"] is None:
        row["caption"] = caption_of(photo.getexif())
    return row


def stored_size(path: Path) -> tuple[int, int] | None:
    """Size of an image that an earlier run wrote, None if there is no whole one."""
    try:
        with Image.open(path) as photo:
            return photo.size
    except OSError:
        return None


# --- on all cores ------------------------------------------------------------------------------


def read_photos(records: Iterable[Record], out: Path, wanted: Wanted, processes: int
                ) -> Iterator[tuple[Record, Result]]:
    """Each record with its result, in order, by ``processes``; never an error for a bad photo.

    Records are taken as they are needed. A decoder that crashes takes down its process, not the
    run: the photos at hand are then read one by one, and the one at fault is ``unreadable``.
    """
    if processes == 1:
        yield from ((record, _result(record, out, wanted)) for record in records)
        return
    records = iter(records)
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    waiting: deque[tuple[list[Record], Future[list[Result]]]] = deque()
    pool = _pool(processes, out, wanted)
    try:
        while True:
            for chunk in islice(chunks, 3 * processes - len(waiting)):
                waiting.append((chunk, pool.submit(_results, chunk)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            try:
                results = future.result()
            except BrokenProcessPool:
                pool.shutdown(cancel_futures=True)
                results = list(_one_by_one(chunk, out, wanted))
                pool = _pool(processes, out, wanted)
                waiting = deque((c, pool.submit(_results, c)) for c, _ in waiting)
            yield from zip(chunk, results, strict=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(record: Record, out: Path, wanted: Wanted) -> Result:
    try:
        return {"row": read_photo(record, out, wanted)}
    except Rejected as error:
        return {"rejected": [error.reason, error.detail]}


def _one_by_one(records: list[Record], out: Path, wanted: Wanted) -> Iterator[Result]:
    """Results of records one of which crashes the process that reads it."""
    pool = _pool(1, out, wanted)
    for record in records:
        try:
            yield pool.submit(_results, [record]).result()[0]
        except BrokenProcessPool:
            pool.shutdown()
            pool = _pool(1, out, wanted)
            yield {"rejected": ["unreadable", "the decoder crashed"]}
    pool.shutdown()


_given: tuple[Path, Wanted]  # of a worker process, once for all its photos


def _pool(processes: int, out: Path, wanted: Wanted) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, get_context("spawn"), _start, (out, wanted))


def _start(out: Path, wanted: Wanted) -> None:
    global _given
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _given = (out, wanted)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody: without this, its workers would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _results(records: list[Record]) -> list[Result]:
    return [_result(record, *_given) for record in records]
