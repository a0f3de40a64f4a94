"""From geotagged photos and records to a clean dataset folder with a manifest. No torch.

Nothing is dropped silently: every record is in ``manifest.parquet`` or, with its reason, in
``rejected.parquet``. Images are re-encoded upright and without metadata. The format is described
in docs/formats.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gps_guidance import geo
from gps_guidance.areas import read_area
from gps_guidance.photos import cleaning
from gps_guidance.photos.cleaning import Wanted
from gps_guidance.photos.collect import Collector, merge, records_of
from gps_guidance.photos.duplicates import near_duplicates
from gps_guidance.photos.manifest import (
    OWN_IMAGE,
    REJECTED,
    SCHEMA,
    VERSION,
    TableBuilder,
    is_dataset,
    write_table,
    write_whole,
)
from gps_guidance.photos.privacy import owned_by, taken_down
from gps_guidance.photos.reading import stored_size
from gps_guidance.photos.shards import write_shards


@dataclass(frozen=True)
class Rules:
    """What is asked of the dataset as a whole, once its photos are read; sides are in metres.

    ``max_per_owner`` photos of one owner stay in a cell of ``cell_m``; cells with fewer than
    ``min_owners_per_cell`` owners go; ``blur_m`` moves positions to the middle of larger cells.
    ``split_by`` is one of ``cleaning.SPLITS``, for whose places ``block_m`` is the side.
    """

    keep_near_duplicates: bool = False
    max_per_owner: int | None = None
    cell_m: float = 100.0
    min_owners_per_cell: int = 1
    blur_m: float = 0.0
    val_fraction: float = 0.0
    split_by: str = "place"
    block_m: float = 100.0

    def __post_init__(self) -> None:
        cleaning.check_split_by(self.split_by)
        for name in ("cell_m", "block_m"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give metres above 0.")

    @property
    def hides_positions(self) -> bool:
        """Whether exact positions must stay nowhere in the folder, neither in details of rejections
        nor in the journal (another run then reads all images again)."""
        return self.blur_m > 0 or self.min_owners_per_cell > 1


@dataclass
class IngestSummary:
    """Counts of one ingest: photos kept, rejections by reason, photos in each bearing bin."""

    kept: int
    rejected: Counter[str]
    bins: np.ndarray | None
    out: Path

    @property
    def empty(self) -> list[float]:
        """Bearings of the bins without a photo."""
        return [] if self.bins is None else [
            float(geo.bin_bearing_deg(k, len(self.bins))) for k in np.flatnonzero(self.bins == 0)
        ]


def resolve_center(landmark: str | None, center: geo.LatLon | None) -> tuple[str | None, Any]:
    """Name and centre: the paper's landmarks are known by name, others need ``center``."""
    if landmark is None:
        if center is not None:
            raise ValueError(f"The center {center} is of no landmark: add --landmark NAME.")
        return None, None
    known = geo.find_landmark(landmark)
    if center is not None:
        lat, lon = geo.check_lat_lon(center, "center")
        return (known.name if known else landmark), (float(lat), float(lon))
    if known is None:
        names = ", ".join(geo.LANDMARKS)
        raise ValueError(
            f"The landmark {landmark!r} is not one of {names}: add --center LAT,LON, its centre in "
            "degrees."
        )
    return known.name, known.center


def ingest(
    sources: Sequence[str | Path], out: str | Path, *, landmark: str | None = None,
    center: geo.LatLon | None = None, bounds: geo.Bounds | str | Path | None = None,
    min_distance_m: float = 0.0, max_distance_m: float = math.inf, min_size: int = 64,
    image_size: int = 768, num_bins: int = 36, records_only: bool = False,
    part: tuple[int, int] | None = None, shard_mb: float | None = None, processes: int = 1,
    progress: bool = True, **rules: Any,
) -> IngestSummary:
    """Make the dataset folder ``out`` from photos; see the module's docstring.

    ``sources`` as :func:`gps_guidance.photos.sources.read_records` reads them, and dataset folders,
    which are merged. Positions are (lat, lon) in degrees, distances from the landmark's centre in
    metres, sizes in pixels; ``bounds`` are a box, or a GeoJSON file with an outline. With
    ``records_only`` no image is read or downloaded. ``part`` (k, n) takes the k-th of n parts, from
    1, of the records: n machines share the work, and another ingest merges the folders. With
    ``shard_mb`` the photos are also written as WebDataset shards of that size. More than one of
    ``processes`` needs a caller that may be imported (``if __name__ == "__main__"``). ``rules`` are
    fields of :class:`Rules`.

    Deterministic: the same sources give the same bytes, and running again resumes. ValueError if no
    photo is left, or if the disk is full.
    """
    name, at = resolve_center(landmark, center)
    if at is None and (min_distance_m > 0 or max_distance_m < math.inf):
        raise ValueError("A distance is from a landmark's centre: add --landmark NAME.")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ValueError(f"part is {part[0]}/{part[1]}; give K/N with 1 <= K <= N.")
    box, area = _bounds(bounds)
    wanted = Wanted(at, box, area, min_distance_m, max_distance_m, min_size, image_size, num_bins)
    rule, out = Rules(**rules), Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    _sweep(out)
    folders = [Path(s) for s in sources if is_dataset(s) and Path(s).resolve() != out.resolve()]
    loose = [source for source in sources if Path(source) not in folders]

    def collect(lost: frozenset[str]) -> tuple[Collector, _Selection]:
        found = Collector(out, wanted, records_only, lost)
        for folder in folders:
            merge(folder, out, found)
        if loose:
            found.read(records_of(loose, out, wanted, part, found.rejected), processes, progress)
        # By source first: the order is the same however the work was shared.
        rows = found.kept.table().sort_by([("source", "ascending"), ("order", "ascending")])
        return found, _select(rows, out, rule, wanted)

    found, chosen = collect(frozenset())
    lost = _without_image(out, chosen.rows)
    if lost:  # an earlier run left these out and removed their images, or someone else did
        found, chosen = collect(lost)
    refused = pa.concat_tables([found.rejected.table(), chosen.rejected.table()])
    if rule.hides_positions:
        refused = refused.set_column(2, REJECTED.field("detail"), pa.array([""] * len(refused)))
    refused = refused.sort_by([(column, "ascending") for column in REJECTED.names])
    reasons = Counter(refused["reason"].to_pylist())
    write_table(out / "rejected.parquet", refused)
    if not len(chosen.rows):
        raise ValueError(_nothing_left(sources, reasons))
    _write_dataset(out, chosen.rows, name, wanted, reasons)
    if rule.hides_positions:
        (out / "journal.jsonl").unlink(missing_ok=True)
    if shard_mb is not None:
        write_shards(out, shard_mb, progress)
    bins = None
    if at is not None:
        bins = np.bincount(chosen.rows["bin"].to_numpy(), minlength=num_bins)
    return IngestSummary(len(chosen.rows), reasons, bins, out)


def _bounds(bounds: geo.Bounds | str | Path | None) -> tuple[geo.Bounds | None, Any]:
    """The box, and the outline where a GeoJSON file gives one."""
    if bounds is None or isinstance(bounds, geo.Bounds):
        return bounds, None
    area = read_area(Path(bounds))
    west, south, east, north = area.bounds
    return geo.Bounds(south, west, north, east), area


def _sweep(out: Path) -> None:
    """Remove what a killed run left half written."""
    for stage in [*out.glob(".*.part"), *(out / "images").glob(".*.part")]:
        stage.unlink()


# --- the whole ---------------------------------------------------------------------------------


class _Selection:
    """Rows from which some are left out, each with its reason."""

    def __init__(self, rows: pa.Table) -> None:
        self.rows, self.rejected = rows, TableBuilder(REJECTED)

    def leave_out(self, gone: np.ndarray, reason: str, detail: str) -> None:
        count = int(gone.sum())
        if count:
            sources = self.rows["source"].filter(pa.array(gone))
            self.rejected.extend({"source": sources, "reason": [reason] * count,
                                  "detail": [detail] * count}, count)
            self.rows = self.rows.filter(pa.array(~gone))

    def strings(self, name: str) -> np.ndarray:
        return self.rows[name].to_numpy(zero_copy_only=False)


def _select(rows: pa.Table, out: Path, rules: Rules, wanted: Wanted) -> _Selection:
    """Apply the rules about the whole to rows in the order of their sources."""
    found = _Selection(rows)
    owners = found.strings("owner")
    found.leave_out(owned_by(owners, taken_down(out)), "taken_down", "its owner asked for it")
    found.leave_out(cleaning.repeated(found.strings("id")), "duplicate",
                    "the same bytes or address as an earlier one")
    if not rules.keep_near_duplicates:
        sizes = np.array(pc.multiply(found.rows["width"], found.rows["height"]).fill_null(0))
        gone = near_duplicates(found.rows["phash"].to_pylist(),
                               found.rows["tiles"].to_pylist(), sizes)
        found.leave_out(gone, "near_duplicate", "the same picture as another photo")
    points = cleaning.positions_of(found.rows)
    if rules.max_per_owner is not None:
        gone = cleaning.crowded(points, found.strings("owner"), found.strings("id"),
                                rules.max_per_owner, rules.cell_m)
        found.leave_out(gone, "owner_limit", f"its owner has {rules.max_per_owner} photos within "
                        f"{rules.cell_m:g} m of here already")
        points = points[~gone]
    if rules.min_owners_per_cell > 1:
        gone = cleaning.lonely(points, found.strings("owner"), rules.min_owners_per_cell,
                               rules.cell_m)
        found.leave_out(gone, "few_owners", f"fewer than {rules.min_owners_per_cell} owners have "
                        f"photos within {rules.cell_m:g} m of here")
        points = points[~gone]
    columns: dict[str, Any] = {}
    if rules.blur_m > 0 and len(points):
        points = cleaning.blur_positions(points, rules.blur_m, wanted.bounds)
        columns = {"lat": points[:, 0], "lon": points[:, 1],
                   "horizontal_error_m": np.full(len(points), rules.blur_m / math.sqrt(2)),
                   "address": [None] * len(points)}  # of the exact position
        columns |= cleaning.landmark_columns(points, wanted)
    columns["split"] = cleaning.split_of(points, found.strings("owner"), found.strings("id"),
                                         rules.val_fraction, rules.split_by, rules.block_m)
    for name, values in columns.items():
        index = SCHEMA.get_field_index(name)
        if values is not None:
            found.rows = found.rows.set_column(index, SCHEMA[index], pa.array(
                values, SCHEMA[index].type))
    found.rows = found.rows.select(SCHEMA.names).cast(SCHEMA)
    return found


def _without_image(out: Path, rows: pa.Table) -> frozenset[str]:
    """Ids of photos whose image is not there, whole."""
    columns = [rows[name].to_pylist() for name in ("id", "file", "width", "height")]
    return frozenset(key for key, file, *size in zip(*columns, strict=True)
                     if file is not None and stored_size(out / file) != tuple(size))


def _write_dataset(out: Path, rows: pa.Table, name: str | None, wanted: Wanted,
                   reasons: Counter[str]) -> None:
    """Remove the images of photos that did not stay, then write dataset.json and the manifest."""
    kept = set(rows["file"].to_pylist())
    for image in (out / "images").iterdir():
        if OWN_IMAGE.fullmatch(image.name) and f"images/{image.name}" not in kept:
            image.unlink()
    about = {
        "version": VERSION, "landmark": name, "center": wanted.center,
        "bounds": wanted.bounds.as_tuple() if wanted.bounds else None,
        "num_bins": wanted.num_bins, "kept": len(rows), "rejected": dict(sorted(reasons.items())),
    }
    write_whole(out / "dataset.json", (json.dumps(about, indent=2) + "\n").encode())
    write_table(out / "manifest.parquet", rows.sort_by("id"))


def _nothing_left(sources: Iterable[Any], reasons: Counter[str]) -> str:
    where = ", ".join(map(str, sources))
    if not reasons:
        return f"{where} holds no file. Give a folder of photos."
    why = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
    remedy = {
        "no_gps": "Use originals: most sites and messengers strip the GPS tag.",
        "too_far": "Raise --max-distance, or check --center (it is LAT,LON).",
        "outside_bounds": "Check the bounds (south,west,north,east).",
    }.get(reasons.most_common(1)[0][0], "")
    return f"No photo of {where} can be used ({why}). {remedy}".strip()
