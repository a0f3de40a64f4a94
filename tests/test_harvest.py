"""Harvests over real HTTP from a server that speaks as Flickr and Wikimedia Commons do: the result
is what the server has, however it misbehaves and however often the harvest is killed."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from web_server import KEY, Photo, Server

from gps_guidance import cli, geo
from gps_guidance.photos import flickr_search, web
from gps_guidance.photos import harvest as module
from gps_guidance.photos.harvest import HarvestSummary
from gps_guidance.photos.sources import read_records

BOX = geo.Bounds(43.70, 10.36, 43.74, 10.43)  # 4.4 x 5.6 km
FAST = 1e9  # requests an hour
LIMITS = [("flickr_search", "LIMIT", 400), ("flickr_search", "PER_PAGE", 25),
          ("commons_search", "LIMIT", 50)]


def take(count: int, seed: int = 0, **more: Any) -> list[Photo]:
    """Photos around two sights of the box, over 16 years, a few outside of it."""
    rng = random.Random(seed)
    photos = []
    for number in range(count):
        lat, lon = rng.choice([(43.723, 10.396), (43.715, 10.401)])
        photos.append(Photo(
            10**9 + 37 * number, rng.gauss(lat, 0.006), rng.gauss(lon, 0.006),
            datetime(2004, 1, 1) + timedelta(seconds=rng.randrange(16 * 365 * 86400)),
            licence=rng.choice("0247"), **more))
    return photos


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """With a tenth of the sites' limits, and so of the photos that tests need."""
    monkeypatch.setenv("FLICKR_API_KEY", KEY)
    for search, name, value in LIMITS:
        monkeypatch.setattr(f"gps_guidance.photos.{search}.{name}", value)
    with Server(reach=400, batch=5) as running:
        yield running


def harvest(server: Server, out: Path, provider: str = "flickr", **options: Any) -> HarvestSummary:
    bounds = options.pop("bounds", BOX)
    if provider == "commons":
        options.setdefault("contact", "me@example.org")
    defaults: dict[str, Any] = {"endpoint": getattr(server, provider), "per_hour": FAST,
                                "progress": False, "sleep": lambda seconds: None}
    return module.harvest(provider, bounds, out, **defaults | options)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text("utf-8").splitlines()]


def truth(server: Server, licences: str = "479") -> list[str]:
    return [str(p.number) for p in server.photos
            if BOX.contains((p.lat, p.lon)) and p.licence in licences]


def ids(out: Path) -> list[str]:
    return [record["id"] for record in records(out)]


# --- Flickr ----------------------------------------------------------------------------------


def test_a_record_has_what_flickr_says(server: Server, tmp_path: Path) -> None:
    server.photos = [
        Photo(7, 43.72, 10.4, datetime(2019, 5, 6, 7, 8, 9), "14", title="The tower",
              description="Leaning"),
        Photo(12, 43.72, 10.4, datetime(2019, 5, 6), "7", title="",
              description="It <i>leans</i>\n&amp; <a href='x'>stays</a>\x00 \U0001f5fc"),
    ]
    summary = harvest(server, tmp_path)
    assert (summary.photos, summary.tiles, summary.out_of_reach) == (2, 1, 0)
    assert records(tmp_path)[0] == {
        "id": "7", "provider": "flickr", "source": "https://www.flickr.com/photos/12345@N00/7",
        "url": "https://live.example.org/7_b.jpg", "lat": 43.72, "lon": 10.4,
        "taken_at": "2019-05-06T07:08:09", "owner": "12345@N00", "licence": "CC BY-SA 4.0",
        "caption": "The tower",
    }
    assert records(tmp_path)[1]["caption"] == "It leans & stays \U0001f5fc"
    assert records(tmp_path)[1]["licence"] == "No known copyright restrictions"


def test_tiles_are_halved_until_a_search_reaches_all(server: Server, tmp_path: Path) -> None:
    server.photos = take(1400)
    summary = harvest(server, tmp_path, licences=["any"])
    assert ids(tmp_path) == truth(server, "0247") and summary.photos > 1200
    assert 4 <= summary.tiles <= 16 and summary.full_tiles == 0
    assert len(set(server.searches())) == len(server.searches())
    about = json.loads((tmp_path / "harvest.json").read_text())
    assert about["complete"] and about["photos"] == summary.photos
    assert about["query"]["bounds"] == list(BOX.as_tuple())


FAULTS = ["429 0", "429 5", "500", "503 1", "hang", "truncate", "chunk", "drop", "html",
          'json {"stat": "fail", "code": 105, "message": "Service currently unavailable"}',
          'json {"stat": "fail", "code": "106", "message": "Write operation failed"}', "json []"]


@pytest.mark.parametrize("provider", ["flickr", "commons"])
def test_every_third_request_fails(
    server: Server, tmp_path: Path, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.photos = take(150)
    server.fault = lambda number, fields: (
        FAULTS[number // 3 % len(FAULTS)] if number % 3 == 0 else None)
    slept: list[float] = []
    patient = functools.partial(web.fetch, timeout_s=0.2)  # 30 s are long for a test
    monkeypatch.setattr(web, "fetch", patient)
    harvest(server, tmp_path, provider, sleep=slept.append)
    assert ids(tmp_path) == truth(server, "0247" if provider == "commons" else "47")
    assert len(slept) >= len(server.requests) // 3 and max(slept) <= 5


def test_photos_twice_on_pages_and_pages_that_never_end(server: Server, tmp_path: Path) -> None:
    server.photos = take(600)
    server.overlap, server.pages_end = 7, False
    harvest(server, tmp_path)
    assert ids(tmp_path) == truth(server)
    assert len(server.requests) < 25


@pytest.mark.parametrize("lie", [lambda true: 0, lambda true: true + 350, lambda true: true // 2,
                                 lambda true: str(true)])
def test_a_total_that_lies(server: Server, tmp_path: Path, lie: Callable[[int], Any]) -> None:
    server.photos = take(900)
    server.total = lie
    assert harvest(server, tmp_path, licences=["any"]).full_tiles == 0
    assert ids(tmp_path) == truth(server, "0247")


def test_days_are_kept(server: Server, tmp_path: Path) -> None:
    server.photos = take(300)
    harvest(server, tmp_path, first=date(2006, 1, 1), last=date(2014, 12, 31))
    known = set(truth(server))
    assert ids(tmp_path) == [str(p.number) for p in server.photos
                             if str(p.number) in known and 2006 <= p.taken.year <= 2014]


@pytest.mark.parametrize("place", ["at the end", "anywhere"])
def test_a_page_that_grows_while_it_is_read(server: Server, tmp_path: Path, place: str) -> None:
    """New photos shift the pages to come: the tile is read again, until its total stands."""
    server.photos = take(300)
    late = [replace(p, number=p.number + 1, licence="4") for p in take(40, seed=3)]

    def meanwhile(number: int) -> None:
        if 3 <= number <= 9:
            for photo in [late.pop() for _ in range(3)]:
                at = len(server.photos) if place == "at the end" else 2 * number
                server.photos.insert(at, photo)

    server.meanwhile = meanwhile
    harvest(server, tmp_path)
    assert sorted(ids(tmp_path)) == sorted(truth(server)) and len(late) == 40 - 21


def test_a_search_that_never_stands_still_ends(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.photos = take(100)
    spare = take(500, seed=9)
    server.meanwhile = lambda number: server.photos.append(
        replace(spare.pop(), number=number, licence="4"))
    harvest(server, tmp_path)
    assert set(truth(server)) - set(ids(tmp_path)) <= {str(len(server.requests))}
    assert "may lack new photos" in caplog.text and len(server.requests) < 40


def test_more_photos_in_a_spot_than_a_search_gives(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At Flickr's real limit, 4 100 in one second on one spot: no box, no day is small enough."""
    monkeypatch.setattr(flickr_search, "LIMIT", 4000)
    monkeypatch.setattr(flickr_search, "PER_PAGE", 250)
    server.reach = 4000
    spot = Photo(1, 43.7201, 10.4001, datetime(2012, 6, 1, 12))
    server.photos = [replace(spot, number=number) for number in range(1, 4101)]
    summary = harvest(server, tmp_path)
    assert (summary.photos, summary.full_tiles, summary.out_of_reach) == (4000, 1, 100)
    assert json.loads((tmp_path / "harvest.json").read_text())["out_of_reach"] == 100
    assert "out of reach: 100" in caplog.text


def test_licences_are_asked_for_and_kept(server: Server, tmp_path: Path) -> None:
    server.photos = take(400)
    harvest(server, tmp_path / "open")
    assert {r["licence"] for r in records(tmp_path / "open")} == {
        "CC BY 2.0", "No known copyright restrictions"}
    harvest(server, tmp_path / "nc", licences=["cc by-nc"])
    assert ids(tmp_path / "nc") == truth(server, "2")
    harvest(server, tmp_path / "all", licences=["any"])
    assert ids(tmp_path / "all") == truth(server, "0247")
    with pytest.raises(ValueError, match="no licence MIT: give one or more of All Rights Rese"):
        harvest(server, tmp_path / "none", licences=["MIT"])


def test_ingest_reads_the_records(server: Server, tmp_path: Path) -> None:
    server.photos = take(60)
    harvest(server, tmp_path, licences=["any"])
    rows = [row for batch in read_records([tmp_path / "records.jsonl"])
            for row in batch.to_pylist()]
    kept = records(tmp_path)
    names = ("source", "url", "lat", "lon", "taken_at", "owner", "licence", "caption")
    assert [[row[n] for n in names] for row in rows] == [[r[n] for n in names] for r in kept]
    assert all(row["path"] is None and None not in (row["url"], row["lat"]) for row in rows)


# --- the key ---------------------------------------------------------------------------------


def test_no_key(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLICKR_API_KEY")
    with pytest.raises(ValueError, match="flickr.com/services.* set FLICKR_API_KEY"):
        harvest(server, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not server.requests


def test_a_key_that_flickr_does_not_know(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FLICKR_API_KEY", "wrong-secret")
    with pytest.raises(ValueError, match="does not know the API key in FLICKR_API_KEY") as caught:
        harvest(server, tmp_path)
    assert "wrong-secret" not in f"{caught.value!r}{caplog.text}" and len(server.requests) == 1


def test_the_key_is_in_no_file_no_log_and_no_error(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.photos = take(600)
    server.fault = lambda number, fields: FAULTS[0] if number % 4 == 0 else None
    harvest(server, tmp_path, licences=["any"])
    refused = f'json {{"stat": "fail", "code": 3, "message": "Bad {KEY}"}}'
    for fault in ("404", "500", "drop", "302 /there?api_key=" + KEY, refused):
        server.fault = lambda number, fields, fault=fault: fault
        with pytest.raises(ValueError) as caught:
            harvest(server, tmp_path / fault[:3])
        assert KEY not in f"{caught.value!r}"
    assert KEY not in repr(flickr_search.Flickr(date.min, date.max, ["any"], per_hour=FAST))
    assert len(caplog.records) > 50 and KEY not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(KEY.encode() in path.read_bytes() for path in files)
    assert all(KEY not in request.path for request in server.requests)


# --- Wikimedia Commons -----------------------------------------------------------------------


def test_a_record_has_what_commons_says(server: Server, tmp_path: Path) -> None:
    tower = Photo(7, 43.72, 10.4, datetime(2019, 5, 6, 7, 8, 9), title="Torre, Pisa",
                  description="<p>La &quot;torre&quot;</p>")
    server.photos = [
        tower, replace(tower, number=8, description=""), replace(tower, number=9, kind="object"),
        replace(tower, number=10, mime="image/svg+xml"),
        replace(tower, number=11, mime="video/ogg"),
    ]
    harvest(server, tmp_path, "commons", contact="me@example.org")
    assert records(tmp_path)[0] == {
        "id": "7", "provider": "commons", "source": "https://commons.example.org/wiki/7",
        "url": "https://upload.example.org/1280px-7.jpg", "lat": 43.72, "lon": 10.4,
        "taken_at": "2019-05-06T07:08:09", "owner": "Ada & Co", "licence": "CC BY-SA 4.0",
        "caption": 'La "torre"',
    }
    assert [r["caption"] for r in records(tmp_path)] == ['La "torre"', "Torre, Pisa"]
    agents = {request.headers["User-Agent"] for request in server.requests}
    assert len(agents) == 1 and re.fullmatch(r"gps-guidance/\S+ \(me@example.org\)", agents.pop())


def test_commons_tiles_and_continuations(server: Server, tmp_path: Path) -> None:
    """A box above 400 square kilometres, and up to ten continuations of a search."""
    server.photos = take(200)
    wide = geo.Bounds(43.60, 10.30, 43.80, 10.60)
    summary = harvest(server, tmp_path, "commons", bounds=wide)
    assert ids(tmp_path) == [str(p.number) for p in server.photos]
    assert summary.tiles > 5 and len(set(server.searches())) == len(server.searches())


def test_commons_days_and_licences(server: Server, tmp_path: Path) -> None:
    server.photos = take(80)
    harvest(server, tmp_path / "days", "commons", first=date(2010, 1, 1))
    late = [str(p.number) for p in server.photos
            if p.taken.year >= 2010 and str(p.number) in truth(server, "0247")]
    assert ids(tmp_path / "days") == late
    harvest(server, tmp_path / "none", "commons", licences=["CC0"])
    assert ids(tmp_path / "none") == []


def test_commons_is_busy(server: Server, tmp_path: Path) -> None:
    server.photos = take(10)
    server.fault = lambda number, fields: (
        'json {"error": {"code": "maxlag", "info": "Waiting for a host: 6 seconds lagged"}}'
        if number <= 3 else None)
    slept: list[float] = []
    harvest(server, tmp_path, "commons", sleep=slept.append)
    assert len(ids(tmp_path)) > 0 and slept == [5.0] * 3
    server.fault = lambda number, fields: 'json {"error": {"code": "badvalue", "info": "So bad"}}'
    with pytest.raises(ValueError, match="So bad"):
        harvest(server, tmp_path / "other", "commons")


def test_more_files_in_a_spot_than_commons_gives(server: Server, tmp_path: Path) -> None:
    spot = Photo(1, 43.7201, 10.4001, datetime(2012, 6, 1, 12))
    server.photos = [replace(spot, number=number) for number in range(1, 53)]
    summary = harvest(server, tmp_path, "commons")
    assert (summary.photos, summary.full_tiles, summary.out_of_reach) == (50, 1, 0)


# --- stopping and going on -------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def nursery(server: Server, provider: str, out: Path) -> Iterator[Callable[[float], int]]:
    """A function that starts a harvest, kills it after some seconds, and returns its exit code.

    The harvests are forks of one process, since what they import takes longer than they do.
    """
    code = f"""if True:
        import os, sys, traceback
        from gps_guidance.geo import Bounds
        from gps_guidance.photos import commons_search, flickr_search
        from gps_guidance.photos.harvest import harvest
        for search, name, value in {LIMITS}:
            setattr(globals()[search], name, value)
        for _ in sys.stdin:
            pid = os.fork()
            if not pid:
                try:
                    harvest("{provider}", Bounds(*{BOX.as_tuple()}), "{out}", licences=["any"],
                            endpoint="{getattr(server, provider)}", contact="me", per_hour=72000)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as mother:
        assert mother.stdin and mother.stdout

        def run(seconds: float) -> int:
            print(file=mother.stdin, flush=True)
            pid = int(mother.stdout.readline())
            if seconds < math.inf:
                time.sleep(seconds)
                os.kill(pid, signal.SIGKILL)
            return int(mother.stdout.readline())

        yield run
        mother.stdin.close()


@pytest.mark.parametrize(("provider", "kills"), [
    ("flickr", 5), ("commons", 1),
    pytest.param("flickr", 20, marks=pytest.mark.slow),
    pytest.param("commons", 20, marks=pytest.mark.slow),
])
def test_a_killed_harvest_goes_on(
    server: Server, tmp_path: Path, provider: str, kills: int
) -> None:
    """At random moments, at 20 requests a second: the same bytes, no finished tile asked again."""
    server.photos = take((900 if provider == "flickr" else 150) * max(1, kills // 5))
    harvest(server, tmp_path / "whole", provider, licences=["any"])
    whole = contents(tmp_path / "whole")
    asked = server.searches()
    out, rng = tmp_path / "killed", random.Random(kills)
    with nursery(server, provider, out) as run:
        for _ in range(kills):
            assert run(rng.uniform(0.0, 1.4 * len(asked) * 0.05 / kills)) == -signal.SIGKILL
            done = {name: data for name, data in contents(out).items() if name[:7] == "tiles/r"}
            assert done.items() <= whole.items()  # no half-written file, and none that differs
        server.requests.clear()
        assert run(math.inf) == 0
    assert contents(out) == whole
    again = server.searches()
    assert len(set(again)) == len(again) and set(again) <= set(asked)
    finished = [json.loads(data) for data in done.values()]
    assert not {place(tile) for tile in finished} & {place_of(search) for search in again}
    times = [request.at for request in server.requests]
    assert times[-1] - times[0] >= (len(times) - 1) * 0.05 - 0.04  # 72 000 an hour


def place(tile: dict[str, Any]) -> tuple[Any, ...]:
    """The box and the days of a stored tile."""
    return *tile["bounds"], tile.get("from", ""), tile.get("to", "")


def place_of(search: tuple[str, ...]) -> tuple[Any, ...]:
    """The box and the days of a search on Flickr or Commons."""
    if search[0]:
        west, south, east, north = map(float, search[0].split(","))
    else:
        north, west, south, east = map(float, search[4].split("|"))
    return south, west, north, east, search[1][:10], search[2][:10]


@pytest.mark.parametrize("provider", ["flickr", "commons"])
def test_a_finished_harvest_asks_nothing(server: Server, tmp_path: Path, provider: str) -> None:
    server.photos = take(100)
    harvest(server, tmp_path, provider)
    before, asked = contents(tmp_path), len(server.requests)
    harvest(server, tmp_path, provider)
    assert contents(tmp_path) == before and len(server.requests) == asked


def test_a_harvest_that_failed_goes_on(server: Server, tmp_path: Path) -> None:
    server.photos = take(900)
    harvest(server, tmp_path / "whole")
    asked = len(server.searches())
    server.fault = lambda number, fields: "404" if len(server.searches()) > asked + 12 else None
    with pytest.raises(ValueError, match="HTTP 404"):
        harvest(server, tmp_path / "failed")
    assert not json.loads((tmp_path / "failed/harvest.json").read_text())["complete"]
    server.fault = lambda number, fields: None
    harvest(server, tmp_path / "failed")
    assert contents(tmp_path / "failed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_line_stops_and_goes_on(
    server: Server, tmp_path: Path, stop: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    server.photos = take(300)
    box = ",".join(map(str, BOX.as_tuple()))
    argv = ["harvest", "flickr", "--bbox", box, "--to", "2021-12-31", "--out", str(tmp_path),
            "--endpoint", server.flickr]
    child = subprocess.Popen([sys.executable, "-m", "gps_guidance.cli", *argv], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(server.requests) < 2:
        time.sleep(0.01)
    child.send_signal(stop)
    _, said = child.communicate(timeout=10)
    assert child.returncode == (130 if stop == signal.SIGINT else -stop) and KEY not in said
    harvest(server, tmp_path, last=date(2021, 12, 31))
    assert ids(tmp_path) == truth(server)
    assert cli.main(argv) == 0
    assert f"{len(truth(server))} photos in {tmp_path / 'records.jsonl'}" in capsys.readouterr().out


@pytest.mark.parametrize(("other", "message"), [
    ({"bounds": geo.Bounds(43.70, 10.36, 43.74, 10.44)}, "its bounds is .*10.43.*10.44"),
    ({"first": date(2001, 1, 1)}, "its from is 1970-01-01, not 2001-01-01"),
    ({"last": date(2001, 1, 1)}, "its to is .*, not 2001-01-01"),
    ({"licences": ["any"]}, "its licences is"), ({"provider": "commons"}, "its provider is flickr"),
])
def test_another_search_in_the_same_folder_is_refused(
    server: Server, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    harvest(server, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*new --out"):
        harvest(server, tmp_path, **other)
    assert contents(tmp_path) == before


def test_what_is_wrong_is_said(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'bing' is not one of flickr, commons"):
        module.harvest("bing", BOX, tmp_path)
    with pytest.raises(ValueError, match="--contact"):
        module.harvest("commons", BOX, tmp_path)
    with pytest.raises(ValueError, match="wrong order"):
        harvest(server, tmp_path, first=date(2020, 1, 2), last=date(2020, 1, 1))
    assert not list(tmp_path.iterdir())
    (tmp_path / "harvest.json").write_text('{"version": "0"}')
    with pytest.raises(ValueError, match="version 0"):
        harvest(server, tmp_path)
