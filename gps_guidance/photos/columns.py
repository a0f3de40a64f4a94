"""Tables of photos, whatever their columns are called, as records of one schema. No torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]  # south, west, north, east

RECORD = pa.schema([
    ("source", pa.string()),  # for people: a file's name, a photo's page, or "photos.csv:17"
    ("path", pa.string()),  # local image file, or null
    ("url", pa.string()),  # address to download the image from, or null
    ("lat", pa.float64()), ("lon", pa.float64()),  # degrees; null: the image's metadata may know
    ("horizontal_error_m", pa.float64()), ("heading_deg", pa.float64()),
    ("taken_at", pa.string()),  # ISO 8601 local time without a zone
    ("owner", pa.string()), ("licence", pa.string()), ("caption", pa.string()),
])

# Names by which a column is known, best first; case and punctuation do not count. Flickr's
# "accuracy" is a zoom level, not metres, and is left out on purpose.
COLUMNS: dict[str, tuple[str, ...]] = {
    "source": ("source", "page_url", "photo_page", "page", "link", "foreign_landing_url"),
    "path": ("path", "file_path", "image_path", "file", "filename", "image", "image_file"),
    "url": ("url", "image_url", "photo_url", "download_url", "thumb_2048_url",
            "thumb_original_url", "url_k", "url_h", "url_l", "fileurl_proc", "image_proc_url",
            "original_url", "url_o", "fileurl_lth", "thumb_1024_url", "url_c", "url_z"),
    "lat": ("geometry.latitude", "lat", "latitude", "lat_deg", "gps_lat", "gps_latitude",
            "decimal_latitude", "MAPLatitude", "y"),
    "lon": ("geometry.longitude", "lon", "lng", "long", "longitude", "lon_deg", "gps_lon",
            "gps_lng", "gps_long", "gps_longitude", "decimal_longitude", "MAPLongitude", "x"),
    "horizontal_error_m": ("horizontal_error_m", "horizontal_error", "horizontal_accuracy",
                           "gps_accuracy", "gps_accuracy_m", "accuracy_m",
                           "gps_horizontal_error", "MAPGPSAccuracyMeters"),
    "heading_deg": ("heading_deg", "heading", "computed_compass_angle", "compass_angle",
                    "bearing", "direction", "gps_img_direction", "MAPCompassHeading.TrueHeading"),
    "taken_at": ("taken_at", "date_taken", "taken", "datetime_original", "datetime", "shot_date",
                 "captured_at", "MAPCaptureTime", "timestamp", "date"),
    "owner": ("owner", "photographer", "author", "creator", "creator.username", "username",
              "user", "user_id", "nsid", "owner_name", "MAPSettingsUsername"),
    "licence": ("licence", "license", "licence_name", "license_name", "rights"),
    "caption": ("caption", "title", "description", "description._content"),
}
MISSING = ["", "nan", "null", "none", "na", "n/a", r"\n"]  # how programs write that there is none
WEB = "^https?://"
NUMBER = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
DATE = r"([0-9]{4})[-:_/](0[1-9]|1[0-2])[-:_/](0[1-9]|[12][0-9]|3[01])"
TIME = r"[T _]([01][0-9]|2[0-3])[:_]([0-5][0-9])[:_]([0-5][0-9])([._][0-9]*)?"
UTC = r" ?(Z|UTC|GMT|[+-]00:?00)"
# Shares of the points by which a swap of lat and lon is sure; a slip in a few rows is none.
NEARLY_ALL, MANY, NEARLY_NONE = 0.95, 0.1, 0.05


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def match_columns(names: Iterable[str], table: str) -> dict[str, list[str]]:
    """Which of a table's columns hold each field of :data:`RECORD`, best first.

    ValueError if none holds the latitude or none the longitude.
    """
    names = list(names)
    given: dict[str, str] = {}
    for name in names:
        given.setdefault(_plain(name), name)
    found = {
        column: [given[_plain(known)] for known in known_names if _plain(known) in given]
        for column, known_names in COLUMNS.items()
    }
    for column in ("lat", "lon"):
        if not found[column]:
            raise ValueError(
                f"{table} has no column for {column}: it has {', '.join(names) or 'none'}. Rename "
                f"one to any of {', '.join(COLUMNS[column])}."
            )
        del found[column][1:]  # a second choice could be of another meaning: pixels named x, y
    return {column: known_names for column, known_names in found.items() if known_names}


def _text(values: pa.Array) -> pa.Array:
    """Strings without blanks around them; null where :data:`MISSING` says so."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    text = pc.utf8_trim_whitespace(_valid(pc.cast(values, pa.string(), safe=False)))
    gone = pc.is_in(pc.utf8_lower(text), value_set=pa.array(MISSING))
    return pc.if_else(gone, pa.scalar(None, pa.string()), text)


def _valid(text: pa.Array) -> pa.Array:
    """The same strings, with bytes that are not UTF-8 replaced, as Parquet may hold them."""
    try:
        text.validate(full=True)
        return text
    except pa.ArrowInvalid:
        raw = text.cast(pa.binary()).to_pylist()
        return pa.array([b if b is None else b.decode("utf-8", "replace") for b in raw])


def _number(values: pa.Array) -> pa.Array:
    """float64; null where there is nothing, NaN where there is something that is no number."""
    kind = values.type
    if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        number = pc.cast(values, pa.float64(), safe=False)
        number = pc.if_else(pc.is_nan(number), pa.scalar(None, pa.float64()), number)
        return pc.if_else(pc.is_finite(number), number, pa.scalar(np.nan))
    text = _text(values)
    text = pc.replace_substring_regex(text, r"^([-+]?[0-9]+),([0-9]+)$", r"\1.\2")
    text = pc.if_else(pc.match_substring_regex(text, NUMBER), text, "nan")
    return pc.cast(text, pa.float64())


def _unsigned(values: pa.Array) -> pa.Array:
    """What is no number at or above zero is null: a hint is not worth a photo."""
    return pc.if_else(pc.greater_equal(values, 0.0), values, pa.scalar(None, pa.float64()))


def _heading(values: pa.Array) -> pa.Array:
    turned = pc.subtract(values, pc.multiply(360.0, pc.floor(pc.divide(values, 360.0))))
    return _unsigned(turned)


def _local_time(values: pa.Array) -> pa.Array:
    """ISO 8601 local time; null for a time in UTC.

    Where a photo was taken, the clock showed up to 14 hours more or less than UTC, and nothing
    in the result would tell. So an epoch, a "Z" or a Parquet column with a zone says nothing
    here, and the image's own metadata may. With an offset, what is written is the local time.
    """
    nothing = pa.scalar(None, pa.string())
    if pa.types.is_timestamp(values.type):
        if values.type.tz is not None:
            return pa.nulls(len(values), pa.string())
        return pc.strftime(pc.cast(values, pa.timestamp("s"), safe=False), "%Y-%m-%dT%H:%M:%S")
    text = _text(values)
    full, day = rf"^{DATE}{TIME}( ?[+-][0-9]{{2}}:?[0-9]{{2}})?$", rf"^{DATE}$"
    in_utc = pc.match_substring_regex(text, f"{UTC}$")
    known = pc.or_(pc.match_substring_regex(text, full), pc.match_substring_regex(text, day))
    text = pc.if_else(pc.and_(known, pc.invert(in_utc)), text, nothing)
    text = pc.replace_substring_regex(text, day, r"\1-\2-\3")
    return pc.replace_substring_regex(text, full, r"\1-\2-\3T\4:\5:\6")


def _local_path(values: pa.Array, folder: Path) -> pa.Array:
    """Absolute paths: relative ones start at the table's folder, ~ at the user's."""
    path = pc.replace_substring_regex(values, "^file://", "")
    home = str(Path.home()).replace("\\", r"\\")
    path = pc.replace_substring_regex(path, r"^~(/|\\|$)", home + r"\1")
    inside = pc.binary_join_element_wise(pa.scalar(str(folder)), path, "/")
    return pc.if_else(pc.match_substring_regex(path, r"^([A-Za-z]:)?[/\\]"), path, inside)


def looks_swapped(lat: np.ndarray, lon: np.ndarray, near: Box | None = None) -> bool:
    """Whether lat and lon (degrees, NaN where unknown) hold each other's values.

    Yes if many points are none on earth as given and nearly all are when swapped; or, given
    ``near`` (south, west, north, east), if nearly none lie in it and nearly all do when swapped.
    """
    known = np.isfinite(lat) & np.isfinite(lon)
    lat, lon = lat[known], lon[known]
    if not len(lat):
        return False

    def inside(box: Box, a: np.ndarray, b: np.ndarray) -> float:
        south, west, north, east = box
        return float(np.mean((south <= a) & (a <= north) & (west <= b) & (b <= east)))

    earth = (-90.0, -180.0, 90.0, 180.0)
    if inside(earth, lat, lon) < 1 - MANY and inside(earth, lon, lat) >= NEARLY_ALL:
        return True
    return near is not None and (
        inside(near, lat, lon) <= NEARLY_NONE and inside(near, lon, lat) >= NEARLY_ALL
    )


@dataclass
class Reading:
    """How one table is read. Its columns are chosen, and a swap of lat and lon is decided, on
    its first rows, and kept for all of it."""

    file: Path
    kind: str
    near: Box | None = None
    columns: dict[str, list[str]] = field(default_factory=dict)
    swap: bool | None = None

    def choose(self, names: Iterable[str]) -> None:
        """Choose the columns, and log which is read as what; ValueError without a position."""
        self.columns = match_columns(names, str(self.file))
        used = "; ".join(f"{key} from {', '.join(of)}" for key, of in self.columns.items())
        logger.info("%s is read as %s: %s", self.file, self.kind, used)

    def records(
        self, table: dict[str, pa.Array], rows: Sequence[int] | np.ndarray
    ) -> pa.RecordBatch:
        """A batch of :data:`RECORD` from columns by name and the numbers of their rows."""
        size = len(rows)

        def first(name: str, convert) -> pa.Array:
            values = [convert(table[of]) for of in self.columns.get(name, ())]
            return pc.coalesce(*values) if values else convert(pa.nulls(size, pa.string()))

        data = {name: first(name, _text) for name in ("source", "url", "owner", "licence",
                                                      "caption", "path")}
        data["taken_at"] = first("taken_at", _local_time)
        data["horizontal_error_m"] = _unsigned(first("horizontal_error_m", _number))
        data["heading_deg"] = _heading(first("heading_deg", _number))
        data["lat"], data["lon"] = self._position(first("lat", _number), first("lon", _number))

        nothing = pa.scalar(None, pa.string())
        is_url = pc.match_substring_regex(data["path"], WEB)
        data["url"] = pc.coalesce(data["url"], pc.if_else(is_url, data["path"], nothing))
        path = pc.if_else(is_url, nothing, data["path"])
        data["path"] = _local_path(path, self.file.parent.absolute())
        label = pc.binary_join_element_wise(
            pa.scalar(self.file.name), pc.cast(pa.array(rows), pa.string()), ":"
        )
        is_page = pc.match_substring_regex(data["source"], WEB)  # or it could say just "flickr"
        page = pc.if_else(is_page, data["source"], nothing)
        data["source"] = pc.coalesce(
            page, pc.replace_substring_regex(path, r"^.*[/\\]", ""), label
        )
        return pa.RecordBatch.from_arrays([data[name] for name in RECORD.names], schema=RECORD)

    def _position(self, lat: pa.Array, lon: pa.Array) -> tuple[pa.Array, pa.Array]:
        if self.swap is None:
            a, b = (values.to_numpy(zero_copy_only=False) for values in (lat, lon))
            known = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
            if len(known):
                self.swap = looks_swapped(a, b, self.near)
            if self.swap:
                logger.warning(
                    "%s has latitude and longitude swapped: (%g, %g) of column %s and %s is read "
                    "as lat %g, lon %g.", self.file, a[known[0]], b[known[0]],
                    self.columns["lat"][0], self.columns["lon"][0], b[known[0]], a[known[0]],
                )
        return (lon, lat) if self.swap else (lat, lon)
