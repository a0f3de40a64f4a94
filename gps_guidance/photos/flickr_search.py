"""Flickr's search as a source of records: flickr.photos.search by box and date. No torch.

The API is documented at https://www.flickr.com/services/api/flickr.photos.search.html.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from gps_guidance import geo
from gps_guidance.photos import web
from gps_guidance.photos.flickr import SIZES, row_of
from gps_guidance.photos.search import Reading, Tile, is_licence, record

logger = logging.getLogger(__name__)

ENDPOINT = "https://api.flickr.com/services/rest/"
KEY = "FLICKR_API_KEY"
FIRST_DAY = date(1970, 1, 1)
PER_HOUR = 3600  # requests that a key may make
PER_PAGE = 250  # the most that a search by box gives
LIMIT = 4000  # photos that one search gives; further pages repeat them
READINGS = 5  # of a tile whose number of photos changes while it is read
UNAVAILABLE = (0, 10, 105, 106)
INVALID_KEY = 100


class Flickr:
    """Photos taken from ``first`` to ``last``, searched for with the API key of the environment
    variable FLICKR_API_KEY.

    ``licences`` are names as in :func:`gps_guidance.photos.search.is_licence`. ValueError if there
    is no key, or Flickr refuses it, or knows none of the licences.
    """

    def __init__(
        self, first: date, last: date, licences: Sequence[str], *, endpoint: str | None = None,
        contact: str | None = None, per_hour: float | None = None, sleep: web.Sleep = time.sleep,
    ) -> None:
        self._key = os.environ.get(KEY, "").strip()
        if not self._key:
            raise ValueError(
                f"Flickr needs an API key: ask for one at "
                f"https://www.flickr.com/services/apps/create/ and set {KEY} to it, as in "
                f"`export {KEY}=...`."
            )
        self._days, self._wanted = (first, last), licences
        self._endpoint = endpoint or ENDPOINT
        self._headers = {"User-Agent": web.user_agent(contact)}
        self._limiter = web.RateLimiter(per_hour or PER_HOUR)
        self._session = web.new_session()
        self._sleep = sleep

    def root(self, bounds: geo.Bounds) -> Tile:
        return Tile("r", bounds, *self._days)

    def read(self, tile: Tile) -> Reading | None:
        """The photos of a tile; None if one search does not reach them all."""
        may_halve = tile.halves() is not None
        photos: dict[str, dict[str, Any]] = {}
        for _ in range(READINGS):
            found, totals = self._read_pages(tile, stop_above=LIMIT if may_halve else math.inf)
            if may_halve and (max(totals) > LIMIT or len(found) >= LIMIT):
                return None
            photos |= found
            if len(totals) == 1:
                break
        else:
            logger.warning("Tile %s changed in each of %d readings; it may lack new photos.",
                           tile.name, READINGS)
        full = max(totals) > LIMIT or len(photos) >= LIMIT
        records = [self._record(photo) for photo in photos.values()]
        return Reading([r for r in records if is_licence(r["licence"] or "", self._wanted)],
                       max(0, max(totals) - len(photos)) if full else 0)

    def _read_pages(
        self, tile: Tile, stop_above: float
    ) -> tuple[dict[str, dict[str, Any]], set[int]]:
        """Photos by id, and every total that was said meanwhile.

        Totals and numbers of pages are estimates: pages are read until one is empty or, beyond the
        last, repeats what is known.
        """
        found: dict[str, dict[str, Any]] = {}
        totals: set[int] = set()
        for page in range(1, 2 * LIMIT // PER_PAGE + 1):
            answer = self._search(tile, page)
            totals.add(int(answer["total"]))
            new = {str(photo["id"]): photo for photo in answer["photo"]}
            repeats = new.keys() <= found.keys()
            found |= new
            last = not new or (repeats and page >= int(answer["pages"]))
            if last or len(found) >= LIMIT or max(totals) > stop_above:
                break
        return found, totals

    def _search(self, tile: Tile, page: int) -> dict[str, Any]:
        assert tile.first and tile.last, "Flickr answers searches by box for given dates only"
        south, west, north, east = tile.bounds.as_tuple()
        return self._ask("flickr.photos.search", {
            "bbox": f"{west},{south},{east},{north}", "accuracy": 16, "has_geo": 1,
            "min_taken_date": f"{tile.first} 00:00:00", "max_taken_date": f"{tile.last} 23:59:59",
            "license": ",".join(self._licences_by_id), "media": "photos", "content_type": 1,
            # the newest come last, so that they do not shift the pages to come
            "sort": "date-posted-asc", "per_page": PER_PAGE, "page": page,
            "extras": ",".join(("geo", "license", "date_taken", "description", *SIZES)),
        })["photos"]

    @cached_property
    def _licences_by_id(self) -> dict[str, str]:
        """The licences wanted. Flickr is asked for its numbers, to which it adds now and then."""
        answer = self._ask("flickr.photos.licenses.getInfo", {})
        known = {str(each["id"]): _licence_name(each) for each in answer["licenses"]["license"]}
        wanted = {number: name for number, name in known.items() if is_licence(name, self._wanted)}
        if not wanted:
            raise ValueError(f"Flickr has no licence {', '.join(self._wanted)}: give one or more "
                             f"of {', '.join(known.values())}, or any.")
        return wanted

    def _ask(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        form = {"method": method, "api_key": self._key, "format": "json", "nojsoncallback": 1}
        return web.fetch(
            self._endpoint, form=form | arguments, decode=self._answer, max_bytes=1 << 26,
            headers=self._headers, limiter=self._limiter, session=self._session, sleep=self._sleep,
        )

    def _answer(self, body: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(body)
            if answer["stat"] == "ok":
                return answer
            code, message = int(answer["code"]), str(answer["message"])
        except (ValueError, TypeError, KeyError):
            raise web.Later("an answer that is not Flickr's JSON") from None
        if code in UNAVAILABLE:
            raise web.Later(f"Flickr is not available (code {code})")
        if code == INVALID_KEY:
            raise ValueError(f"Flickr does not know the API key in {KEY}: compare it with "
                             "https://www.flickr.com/services/apps/by/me.")
        raise ValueError(f"Flickr: {message.replace(self._key, KEY)} (code {code}).")

    def _record(self, photo: dict[str, Any]) -> dict[str, Any]:
        licence = self._licences_by_id.get(str(photo["license"]))
        return record("flickr", photo["id"], row_of(photo) | {"licence": licence})


def _licence_name(licence: dict[str, Any]) -> str:
    """The short name that a Creative Commons address spells; else the name that Flickr gives."""
    address = str(licence.get("url") or "")
    if found := re.search(r"creativecommons\.org/licenses/([a-z-]+)/(\d\.\d)", address):
        return f"CC {found[1].upper()} {found[2]}"
    if found := re.search(r"creativecommons\.org/publicdomain/(zero|mark)/(\d\.\d)", address):
        return f"{'CC0' if found[1] == 'zero' else 'Public Domain Mark'} {found[2]}"
    return str(licence["name"])
