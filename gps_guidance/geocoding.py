"""Addresses of positions, for the model that is told where by words (Sec. 4.2, Fig. 8). No torch.

Positions are rounded to a grid, so that photos of one place are asked about once and the server is
not told more than the cell. Answers are kept in a cache file, one at a time: whoever stops goes on
from there. Its format is described in docs/formats.md.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike
from tqdm import tqdm

from gps_guidance import geo
from gps_guidance.photos import web
from gps_guidance.photos.manifest import load_manifest, write_table

log = logging.getLogger(__name__)

VERSION = 1
DECIMALS = 4  # of a cell's middle, in degrees: cells of 11 m from north to south, or less
ENDPOINT = "https://nominatim.openstreetmap.org"
PER_HOUR = 3600  # by the public server's policy: one a second
ZOOM = 17  # Nominatim's for streets; of houses it knows numbers, which no picture shows
LANGUAGE = "en"  # CLIP's
MAX_BYTES = 1 << 20
# Of each group the first that Nominatim knows: a street, a quarter, a town.
PARTS = (
    ("road", "pedestrian", "footway", "path"),
    ("neighbourhood", "quarter", "suburb", "borough", "city_district"),
    ("city", "town", "village", "hamlet", "municipality"),
)


def address_prompt(prompt: str, address: str | None) -> str:
    """The text that says what and where, "a red car, 5th Avenue, New York": of the photos that an
    address model is trained on, and for its images and those of Stable Diffusion."""
    return ", ".join(filter(None, (prompt, address)))


def address_text(parts: Mapping[str, str]) -> str:
    """Street, quarter and town out of the ``address`` of Nominatim's answer; "" without them."""
    names = [next(filter(None, map(parts.get, keys)), None) for keys in PARTS]
    return ", ".join(dict.fromkeys(filter(None, names)))  # a town may be its own quarter


def cells_of(positions: ArrayLike) -> list[geo.LatLon]:
    """The middle of the cell of each (lat, lon) [N, 2] in degrees."""
    cells = np.round(geo.check_lat_lon(positions), DECIMALS) + 0.0  # no -0.0
    return [(lat, lon) for lat, lon in cells.tolist()]


class AddressCache:
    """The file of what is known of cells; each answer is on the disk when ``add`` returns.

    ValueError if the file is something else, or cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._file = sqlite3.connect(path, timeout=60.0)
            version = self._file.execute("PRAGMA user_version").fetchone()[0]
            foreign = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version != VERSION and (version or foreign):
                raise ValueError(f"{path} is no cache of addresses of version {VERSION}: give "
                                 "another --cache.")
            if not version:
                self._file.executescript(f"""
                    BEGIN;
                    CREATE TABLE IF NOT EXISTS addresses (
                        lat REAL NOT NULL, lon REAL NOT NULL, address TEXT NOT NULL,
                        source TEXT NOT NULL, PRIMARY KEY (lat, lon)
                    ) WITHOUT ROWID;
                    PRAGMA user_version = {VERSION};
                    COMMIT;
                """)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ValueError(f"{self.path} cannot be used as a cache of addresses: {error}. Give "
                             "another --cache, or make room.") from error

    def get(self, cell: geo.LatLon) -> str | None:
        """What is known of a cell: "" if it has no address, None if nobody has asked yet."""
        with self._errors():
            row = self._file.execute("SELECT address FROM addresses WHERE lat = ? AND lon = ?",
                                     cell).fetchone()
        return None if row is None else row[0]

    def add(self, addresses: Mapping[geo.LatLon, str], source: str) -> None:
        """Store the addresses of cells, and who says so."""
        rows = [(*cell, address, source) for cell, address in addresses.items()]
        with self._errors(), self._file:
            self._file.executemany("INSERT OR REPLACE INTO addresses VALUES (?, ?, ?, ?)", rows)

    def __enter__(self) -> AddressCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Nominatim:
    """A Nominatim server, asked by GeoPy, one question at a time.

    The public one is asked once a second at most, and told by ``contact`` who asks; another
    ``endpoint``, an http or https address, as fast as it answers. ValueError without a contact for
    the public server, or without GeoPy.
    """

    def __init__(self, contact: str | None = None, endpoint: str | None = None, *,
                 timeout_s: float = 30.0, sleep: web.Sleep = time.sleep) -> None:
        parts = urlsplit(endpoint or ENDPOINT)
        self.source, public = parts.netloc, urlsplit(ENDPOINT).hostname
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The endpoint {endpoint!r} is no address of a server, such as "
                             f"{ENDPOINT}.")
        limiter = None
        if parts.hostname == public:
            if not contact:
                raise ValueError("The public Nominatim asks programs to say who runs them: add "
                                 "--contact with your e-mail address or a page of yours.")
            limiter = web.RateLimiter(PER_HOUR)
        session = web.new_session()

        def get(url: str, headers: Mapping[str, str]) -> Any:
            return web.fetch(url, decode=_decode, max_bytes=MAX_BYTES, headers=headers,
                             timeout_s=timeout_s, limiter=limiter, session=session, sleep=sleep)

        self._geocoder = _geocoder(get, parts.scheme, parts.netloc + parts.path,
                                   web.user_agent(contact))

    def address(self, cell: geo.LatLon) -> str:
        """The address text of (lat, lon) in degrees, "" if there is none, as at sea. ValueError if
        the server refuses or stays away."""
        from geopy.exc import GeopyError

        try:
            found = self._geocoder.reverse(cell, language=LANGUAGE, zoom=ZOOM)
        except GeopyError as error:
            raise ValueError(f"{self.source} refuses to answer: {error}") from None
        return "" if found is None else address_text(found.raw.get("address", {}))


def _geocoder(get: Callable[[str, Mapping[str, str]], Any], scheme: str, domain: str,
              user_agent: str) -> Any:
    """GeoPy's client. It says what to ask and reads the answer; ``get`` is the way to the server,
    as GeoPy's own neither waits as long as a server asks nor keeps positions out of its errors."""
    try:
        from geopy.adapters import BaseSyncAdapter
        from geopy.geocoders import Nominatim as Client
    except ImportError:
        raise ValueError("Addresses are asked for by GeoPy: run `pip install "
                         "\"gps-guidance[geocode]\"`.") from None

    class Adapter(BaseSyncAdapter):  # type: ignore[misc]
        def get_json(self, url: str, *, timeout: float, headers: Mapping[str, str]) -> Any:
            return get(url, headers)

        get_text = get_json

    return Client(scheme=scheme, domain=domain, user_agent=user_agent, adapter_factory=Adapter)


def _decode(body: bytes) -> Any:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise web.Later("an answer that is not Nominatim's JSON")
    return answer


def addresses_of(
    positions: ArrayLike, cache: str | Path, *, contact: str | None = None,
    endpoint: str | None = None, offline: bool = False, progress: bool = True,
    timeout_s: float = 30.0, sleep: web.Sleep = time.sleep,
) -> list[str | None]:
    """The address of each (lat, lon) [N, 2] in degrees, None where there is none, as at sea.

    What ``cache`` does not have is asked of a server (:class:`Nominatim`) and put there, or, if
    ``offline``, a ValueError.
    """
    cells = cells_of(positions)
    nothing = offline and not Path(cache).is_file()
    with AddressCache(":memory:" if nothing else cache) as known:
        found = {cell: known.get(cell) for cell in dict.fromkeys(cells)}
        missing = [cell for cell, address in found.items() if address is None]
        if missing and offline:
            raise ValueError(
                f"{len(missing)} of {len(found)} cells are not in {cache}, and nobody is asked: "
                f"run `gps-guidance geocode DATASET --cache {cache} --contact MAIL` without "
                "--offline.")
        if missing:
            server = Nominatim(contact, endpoint, timeout_s=timeout_s, sleep=sleep)
            log.info("%d of %d cells are not in %s: %s is asked", len(missing), len(found), cache,
                     server.source)
            for cell in tqdm(missing, desc="geocoding", unit="cell", disable=not progress):
                address = found[cell] = server.address(cell)
                known.add({cell: address}, server.source)
    return [found[cell] or None for cell in cells]


@dataclass
class GeocodeSummary:
    """How many photos have an address, and how many are where there is none."""

    addressed: int
    nameless: int


def geocode(dataset: str | Path, cache: str | Path, **options: Any) -> GeocodeSummary:
    """Write the column ``address`` of a dataset's manifest anew, from its positions.

    ``options`` are those of :func:`addresses_of`. The manifest is written at the end, at once; what
    a stopped run has asked is in the cache. ValueError for what is no dataset.
    """
    manifest = load_manifest(dataset)
    rows = manifest.rows
    positions = np.stack([rows["lat"].to_numpy(), rows["lon"].to_numpy()], axis=1)
    found = addresses_of(positions, cache, **options)
    place = rows.schema.get_field_index("address")
    write_table(manifest.root / "manifest.parquet",
                rows.set_column(place, rows.schema.field(place), pa.array(found, pa.string())))
    return GeocodeSummary(len(found) - found.count(None), found.count(None))
