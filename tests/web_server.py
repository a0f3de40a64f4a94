"""A real HTTP server on this machine that speaks as Flickr, Wikimedia Commons and Nominatim
document it, over photos and addresses that a test makes, and misbehaves when a test says so."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

KEY = "0123456789abcdef-secret"
# Not in the order of the licences' age: who harvests has to ask.
LICENCES = {
    "0": ("All Rights Reserved", ""),
    "2": ("Attribution-NonCommercial License", "https://creativecommons.org/licenses/by-nc/2.0/"),
    "4": ("Attribution License", "https://creativecommons.org/licenses/by/2.0/"),
    "7": ("No known copyright restrictions", "https://www.flickr.com/commons/usage/"),
    "9": ("Public Domain Dedication (CC0)", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "14": ("CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/"),
}


@dataclass(frozen=True)
class Photo:
    number: int
    lat: float
    lon: float
    taken: datetime
    licence: str = "4"
    title: str = "IMG_1234"
    description: str = ""
    mime: str = "image/jpeg"
    kind: str = "camera"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    fields: dict[str, str]
    headers: Mapping[str, str]
    at: float


@dataclass
class Server:
    """``fault(number, fields)`` names what goes wrong with a request (:meth:`_Handler.fail`);
    ``total(true)`` is what Flickr says of a search with ``true`` photos; ``meanwhile(number)``
    runs before each answer; ``overlap`` photos of a page are repeated on the next one. A search of
    Flickr's reaches ``reach`` photos; Commons describes ``batch`` files in an answer.
    ``address(lat, lon)`` is what Nominatim says of a position, None at sea."""

    photos: list[Photo] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    fault: Callable[[int, dict[str, str]], str | None] = lambda number, fields: None
    total: Callable[[int], int] = lambda true: true
    meanwhile: Callable[[int], None] = lambda number: None
    address: Callable[[float, float], dict[str, str] | None] = lambda lat, lon: None
    overlap: int = 0
    reach: int = 4000
    batch: int = 50
    pages_end: bool = True
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Server:
        server = self
        self.released = threading.Event()
        self._lock = threading.Lock()

        class Handler(_Handler):
            owner = server

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def flickr(self) -> str:
        return self.url + "/services/rest/"

    @property
    def commons(self) -> str:
        return self.url + "/w/api.php"

    @property
    def nominatim(self) -> str:
        return self.url + "/nominatim"

    def searches(self) -> list[tuple[str, ...]]:
        """Box, days and page of every search, for both sites."""
        names = ("bbox", "min_taken_date", "max_taken_date", "page", "ggsbbox", "iicontinue")
        return [tuple(request.fields.get(name, "") for name in names) for request in self.requests
                if "bbox" in request.fields or "ggsbbox" in request.fields]

    def note(self, request: Request) -> int:
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
            self.meanwhile(number)
        return number

    # --- Flickr ------------------------------------------------------------------------------

    def answer_flickr(self, fields: dict[str, str]) -> dict[str, Any]:
        if fields.get("api_key") != KEY:
            key = fields.get("api_key")
            return {"stat": "fail", "code": 100, "message": f"Invalid API Key ({key})"}
        if fields["method"] == "flickr.photos.licenses.getInfo":
            return {"stat": "ok", "licenses": {"license": [
                {"id": number, "name": name, "url": url}
                for number, (name, url) in LICENCES.items()]}}
        if "min_taken_date" not in fields:
            return {"stat": "fail", "code": 3, "message": f"No limit, {fields['api_key']}"}
        assert fields["method"] == "flickr.photos.search" and int(fields["per_page"]) <= 250
        west, south, east, north = map(float, fields["bbox"].split(","))
        first, last = (datetime.fromisoformat(fields[f"{end}_taken_date"])
                       for end in ("min", "max"))
        found = [p for p in self.photos
                 if south <= p.lat <= north and west <= p.lon <= east
                 and first <= p.taken <= last and p.licence in fields["license"].split(",")]
        size, page = int(fields["per_page"]), int(fields["page"])
        reached = found[:self.reach]
        pages = -(-len(found) // size)
        if not self.pages_end or len(found) > self.reach:  # the last page is given again and again
            page = max(1, min(page, -(-len(reached) // size)))
        start = max(0, (page - 1) * size - self.overlap)
        return {"stat": "ok", "photos": {
            "page": page, "pages": pages, "perpage": size, "total": self.total(len(found)),
            "photo": [flickr_json(p) for p in reached[start:page * size]]}}

    # --- Commons -----------------------------------------------------------------------------

    def answer_commons(self, fields: dict[str, str]) -> dict[str, Any]:
        north, west, south, east = map(float, fields["ggsbbox"].split("|"))
        if (north - south) * (east - west) * 111e3**2 * 0.7 > 4e8:
            return {"error": {"code": "toobig", "info": "Bounding box is too big"}}
        found = [p for p in self.photos if south <= p.lat <= north and west <= p.lon <= east]
        found = found[:int(fields["ggslimit"])]
        start = int(fields.get("iicontinue", 0))
        pages = [commons_json(p, with_info=start <= index < start + self.batch)
                 for index, p in enumerate(found)]
        answer: dict[str, Any] = {"query": {"pages": pages}} if pages else {"batchcomplete": True}
        if start + self.batch < len(found):
            answer["continue"] = {"iicontinue": str(start + self.batch),
                                  "continue": "||coordinates"}
        return answer


    # --- Nominatim ---------------------------------------------------------------------------

    def answer_nominatim(self, fields: dict[str, str]) -> dict[str, Any]:
        assert (fields["format"], fields["addressdetails"]) == ("json", "1")
        lat, lon = float(fields["lat"]), float(fields["lon"])
        if not (abs(lat) <= 90 and abs(lon) <= 180):
            return {"error": {"code": 400, "message": "out of range"}}
        parts = self.address(lat, lon)
        if parts is None:
            return {"error": "Unable to geocode"}
        shown = {**parts, "postcode": "10001", "country": "Country", "country_code": "xx"}
        return {"place_id": 1, "osm_type": "way", "osm_id": 1, "lat": str(lat), "lon": str(lon),
                "licence": "Data (c) OpenStreetMap contributors, ODbL 1.0",
                "display_name": ", ".join(shown.values()), "address": shown}


def flickr_json(photo: Photo) -> dict[str, Any]:
    return {
        "id": str(photo.number), "owner": "12345@N00", "secret": "5ec", "server": "65535",
        "title": photo.title, "description": {"_content": photo.description},
        "license": photo.licence, "latitude": str(photo.lat), "longitude": photo.lon,
        "accuracy": "16", "datetaken": photo.taken.isoformat(" "), "datetakenunknown": "0",
        "url_l": f"https://live.example.org/{photo.number}_b.jpg", "width_l": "1024",
        "url_m": f"https://live.example.org/{photo.number}.jpg",
    }


def commons_json(photo: Photo, with_info: bool) -> dict[str, Any]:
    page: dict[str, Any] = {"pageid": photo.number, "ns": 6, "title": f"File:{photo.title}.jpg",
                            "coordinates": [{"lat": photo.lat, "lon": photo.lon, "primary": True,
                                             "globe": "earth", "type": photo.kind}]}
    if with_info:
        said = {"LicenseShortName": "CC BY-SA 4.0", "Artist": '<a href="//x">Ada &amp; Co</a>',
                "ImageDescription": photo.description,
                "DateTimeOriginal": photo.taken.isoformat(" ")}
        upload = "https://upload.example.org"
        page["imageinfo"] = [{
            "user": "Ada", "mime": photo.mime, "timestamp": "2020-01-01T00:00:00Z",
            "url": f"{upload}/{photo.number}.jpg",
            "thumburl": f"{upload}/1280px-{photo.number}.jpg",
            "descriptionurl": f"https://commons.example.org/wiki/{photo.number}",
            "extmetadata": {name: {"value": value} for name, value in said.items()}}]
    return page


class _Http(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the game; anything else is said as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or answers wait 40 ms for an acknowledgement
    owner: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(dict(parse_qsl(urlsplit(self.path).query)))

    def do_POST(self) -> None:
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._answer(dict(parse_qsl(form)))

    def _answer(self, fields: dict[str, str]) -> None:
        path = urlsplit(self.path).path
        number = self.owner.note(
            Request(self.command, path, fields, self.headers, time.monotonic()))
        fault = self.owner.fault(number, fields)
        if path == "/services/rest/" and self.command == "POST":
            body = json.dumps(self.owner.answer_flickr(fields)).encode()
        elif path == "/w/api.php":
            body = json.dumps(self.owner.answer_commons(fields)).encode()
        elif path == "/nominatim/reverse":
            body = json.dumps(self.owner.answer_nominatim(fields)).encode()
        elif path in self.owner.files:
            body = self.owner.files[path]
        else:
            fault, body = fault or "404", b""
        if fault:
            self.fail(fault, body)
        else:
            self.send(200, body)

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def fail(self, fault: str, body: bytes) -> None:
        """``fault`` is a status with what Retry-After says, "429 7"; a status with where to go,
        "302 /there"; or one of the words below."""
        name, _, more = fault.partition(" ")
        if name in ("301", "302", "307"):
            self.send(int(name), b"", Location=more)
        elif name.isdecimal():
            self.send(int(name), b"no", **({"Retry_After": more} if more else {}))
        elif name == "hang":
            self.owner.released.wait(30)
            self.close_connection = True
        elif name == "html":
            self.send(200, b"<html>We are sorry.</html>")
        elif name == "json":
            self.send(200, more.encode())
        elif name == "endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while not self.owner.released.is_set():
                self.wfile.write(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
        else:
            assert name in ("truncate", "chunk", "drop"), name
            self.close_connection = True
            if name == "truncate":
                self.send_response(200)
                self.send_header("Content-Length", str(len(body) + 10))
                self.end_headers()
                self.wfile.write(body)
            if name == "chunk":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % (len(body) + 10) + body)
