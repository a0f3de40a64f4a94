"""Wikimedia Commons' search as a source of records: files by box. No torch.

The API is documented at https://commons.wikimedia.org/w/api.php?action=help&modules=query and in
https://www.mediawiki.org/wiki/API:Etiquette.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from datetime import date
from typing import Any

from gps_guidance import geo
from gps_guidance.photos import web
from gps_guidance.photos.search import Reading, Tile, is_licence, local_time, plain_text, record

ENDPOINT = "https://commons.wikimedia.org/w/api.php"
PER_HOUR = 3600  # no number is set for reading; requests are to be few and one at a time
LIMIT = 500  # files that one search gives; it has no further pages
LARGEST_M2 = 0.9 * 20_000.0**2  # a box may be as large as a square of 20 km; areas are estimates
SMALLEST_M = 15.0  # nor may it be below 100 square metres
LAG_S = 5
BUSY = ("maxlag", "ratelimited", "readonly")


class Commons:
    """Files dated from ``first`` to ``last``, where given, searched for without a key.

    ``contact``, a page or an e-mail address of whoever searches, is sent with every request;
    ``licences`` are names as in :func:`gps_guidance.photos.search.is_licence`. ValueError if there
    is no contact.
    """

    def __init__(
        self, first: date | None, last: date | None, licences: Sequence[str], *,
        endpoint: str | None = None, contact: str | None = None, per_hour: float | None = None,
        sleep: web.Sleep = time.sleep,
    ) -> None:
        if not contact:
            raise ValueError("Wikimedia asks programs to say who runs them: add --contact with "
                             "your e-mail address or a page of yours.")
        self._days = str(first or date.min), str(last or date.max)
        self._dated = bool(first or last)
        self._wanted = licences
        self._endpoint = endpoint or ENDPOINT
        self._headers = {"User-Agent": web.user_agent(contact)}
        self._limiter = web.RateLimiter(per_hour or PER_HOUR)
        self._session = web.new_session()
        self._sleep = sleep

    def root(self, bounds: geo.Bounds) -> Tile:
        return Tile("r", bounds, smallest_m=SMALLEST_M)

    def read(self, tile: Tile) -> Reading | None:
        """The photos of a tile; None if one search does not reach them all."""
        height_m, width_m = tile.sides_m()
        if height_m * width_m > LARGEST_M2:
            return None
        pages = self._pages(tile)
        full = len(pages) >= LIMIT
        if full and tile.halves() is not None:
            return None
        records = [made for page in pages.values() if (made := self._record(page))]
        return Reading(records, None if full else 0)

    def _pages(self, tile: Tile) -> dict[int, dict[str, Any]]:
        """What the API says of each file, collected over its continuations."""
        south, west, north, east = tile.bounds.as_tuple()
        query = {
            "action": "query", "format": "json", "formatversion": 2, "maxlag": LAG_S,
            "generator": "geosearch", "ggsnamespace": 6, "ggslimit": LIMIT,
            "ggsbbox": f"{north}|{west}|{south}|{east}",
            "prop": "imageinfo|coordinates", "colimit": LIMIT, "coprop": "type",
            "iiprop": "url|extmetadata|size|timestamp|user|mime", "iiurlwidth": 1280,
        }
        pages: dict[int, dict[str, Any]] = {}
        onward: dict[str, Any] = {}
        while True:
            answer = web.fetch(
                self._endpoint, params=query | onward, decode=_answer, max_bytes=1 << 26,
                headers=self._headers, limiter=self._limiter, session=self._session,
                sleep=self._sleep,
            )
            for page in answer.get("query", {}).get("pages", []):
                pages.setdefault(page["pageid"], {}).update(page)
            before, onward = onward, answer.get("continue", {})
            if not onward:
                return pages
            if onward == before:
                raise ValueError(f"{self._endpoint} repeats itself: try again later.")

    def _record(self, page: dict[str, Any]) -> dict[str, Any] | None:
        """A record; None for what is no photo that is wanted."""
        if not page.get("imageinfo") or not page.get("coordinates"):
            return None
        info, place = page["imageinfo"][0], page["coordinates"][0]
        mime = info.get("mime", "")
        if not mime.startswith("image/") or mime == "image/svg+xml":
            return None
        if place.get("type") == "object":  # where a thing in the picture is, not the photographer
            return None
        says = {key: plain_text(str(each.get("value", "")))
                for key, each in info.get("extmetadata", {}).items()}
        licence = says.get("LicenseShortName") or says.get("UsageTerms") or ""
        taken_at = says.get("DateTimeOriginal")
        first, last = self._days
        in_time = first <= (local_time(taken_at) or "")[:10] <= last
        if (self._dated and not in_time) or not is_licence(licence, self._wanted):
            return None
        title = re.sub(r"^File:|\.\w+$", "", page["title"])
        return record("commons", page["pageid"], {
            "source": info["descriptionurl"], "url": info.get("thumburl") or info["url"],
            "lat": place["lat"], "lon": place["lon"], "taken_at": taken_at,
            "owner": says.get("Artist") or info.get("user"), "licence": licence,
            "caption": says.get("ImageDescription") or title,
        })


def _answer(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
        error = answer.get("error")
        if error is None and not answer.keys() & {"query", "batchcomplete", "continue"}:
            raise ValueError
    except (ValueError, AttributeError):
        raise web.Later("an answer that is not MediaWiki's JSON") from None
    if error is None:
        return answer
    code = str(error.get("code"))
    if code in BUSY or code.startswith("internal_api_error"):
        raise web.Later(f"Wikimedia is busy ({code})", float(LAG_S))
    raise ValueError(f"Wikimedia Commons: {error.get('info', code)} ({code}).")
