"""Addresses: their text, the cache of cells, and a Nominatim server that has bad days."""

from __future__ import annotations

import logging
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CITY
from web_server import Server

from gps_guidance import __version__, cli, geocoding
from gps_guidance.geocoding import (
    AddressCache,
    Nominatim,
    address_prompt,
    address_text,
    addresses_of,
    cells_of,
    geocode,
)
from gps_guidance.miniature import city
from gps_guidance.photos.ingest import ingest
from gps_guidance.photos.manifest import load_manifest
from gps_guidance.photos.privacy import take_down

MAIL = "ada@example.org"
STREET = {"road": "5th Avenue", "suburb": "Manhattan", "city": "New York"}


@pytest.fixture
def server() -> Iterator[Server]:
    def address(lat: float, lon: float) -> dict[str, str]:
        return STREET | {"road": f"Street {lat:.4f}/{lon:.4f}"}

    with Server(address=address) as running:
        yield running


def ask(server: Server, positions: Any, cache: Path, **options: Any) -> list[str | None]:
    return addresses_of(positions, cache, **{
        "endpoint": server.nominatim, "progress": False, "sleep": lambda seconds: None} | options)


# --- texts -------------------------------------------------------------------------------------


def test_an_address_is_street_quarter_and_town_without_numbers() -> None:
    whole = {"house_number": "350", "road": "5th Avenue", "neighbourhood": "Midtown South",
             "suburb": "Manhattan", "county": "New York County", "city": "New York",
             "postcode": "10118", "country": "United States"}
    assert address_text(whole) == "5th Avenue, Midtown South, New York"
    square = {"pedestrian": "Piazza dei Miracoli", "suburb": "Pisa", "town": "Pisa"}
    assert address_text(square) == "Piazza dei Miracoli, Pisa"
    assert address_text({"village": "Avebury", "country": "United Kingdom"}) == "Avebury"
    assert address_text({"country": "United States"}) == ""


def test_a_prompt_and_an_address_are_one_text() -> None:
    assert address_prompt("a red car", "5th Avenue, New York") == "a red car, 5th Avenue, New York"
    assert address_prompt("", "Pisa") == "Pisa"
    assert address_prompt("a red car", None) == address_prompt("a red car", "") == "a red car"


# --- cells and their cache ---------------------------------------------------------------------


def test_positions_of_eleven_metres_share_a_cell() -> None:
    found = cells_of([[40.74841, -73.98566], [40.74844, -73.98574], [40.74846, -73.98574],
                      [-0.00001, 0.00001]])
    assert found == [(40.7484, -73.9857), (40.7484, -73.9857), (40.7485, -73.9857), (0.0, 0.0)]
    assert str(found[3]) == "(0.0, 0.0)"
    with pytest.raises(ValueError, match="latitude must lie in"):
        cells_of([[95.0, 10.0]])


def test_the_cache_keeps_addresses_and_who_said_them(tmp_path: Path) -> None:
    cell = (40.7484, -73.9857)
    with AddressCache(tmp_path / "a.sqlite") as cache:
        assert cache.get(cell) is None
        cache.add({cell: "5th Avenue", (0.0, 0.0): ""}, "me")
        with AddressCache(tmp_path / "a.sqlite") as other:  # another process, at the same time
            assert (other.get(cell), other.get((0.0, 0.0))) == ("5th Avenue", "")
    rows = sqlite3.connect(tmp_path / "a.sqlite").execute("SELECT * FROM addresses").fetchall()
    assert rows == [(0.0, 0.0, "", "me"), (*cell, "5th Avenue", "me")]


def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    text, table, later = (tmp_path / name for name in ("t", "d", "l"))
    text.write_text("no database at all, but long enough to be taken for the header of one" * 9)
    for path, change in ((table, "CREATE TABLE photos (id)"), (later, "PRAGMA user_version = 9")):
        with sqlite3.connect(path) as file:
            file.execute(change)
    for path in (text, table, later):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"{path}.*another --cache"):
            AddressCache(path)
        assert path.read_bytes() == before
    with pytest.raises(ValueError, match="unable to open"):
        AddressCache(tmp_path)


# --- the server --------------------------------------------------------------------------------


def test_each_cell_is_asked_about_once(server: Server, tmp_path: Path) -> None:
    positions = np.array([[40.74841, -73.98566], [40.7, -74.0], [40.74844, -73.98574]])
    found = ask(server, positions, tmp_path / "a")
    there = "Street 40.7484/-73.9857, Manhattan, New York"
    assert found == [there, "Street 40.7000/-74.0000, Manhattan, New York", there]
    asked = [request.fields for request in server.requests]
    assert [(q["lat"], q["lon"]) for q in asked] == [("40.7484", "-73.9857"), ("40.7", "-74.0")]
    assert (asked[0]["zoom"], asked[0]["accept-language"]) == ("17", "en")
    assert ask(server, positions[::-1], tmp_path / "a") == found[::-1]
    assert len(server.requests) == 2


def test_where_nothing_has_a_name_is_not_asked_about_again(tmp_path: Path) -> None:
    with Server() as sea:
        for _ in range(2):
            assert ask(sea, [[30.0, -40.0]], tmp_path / "a") == [None]
        assert len(sea.requests) == 1


def test_bad_answers_pass(server: Server, tmp_path: Path) -> None:
    """Too many requests, an error, silence, a page for people: all are tried again."""
    faults = ["429 7", "500", "hang", "html", "drop"]
    server.fault = lambda number, fields: dict(enumerate(faults, 1)).get(number)
    slept: list[float] = []
    found = ask(server, [[40.7, -74.0]], tmp_path / "a", timeout_s=0.2, sleep=slept.append)
    assert found == ["Street 40.7000/-74.0000, Manhattan, New York"]
    assert len(server.requests) == 6 and slept[0] == 7.0


def test_a_server_that_stays_away_ends_the_run_which_goes_on_later(
    server: Server, tmp_path: Path
) -> None:
    positions = [[40.7, -74.0], [40.7123, -74.0456]]
    server.fault = lambda number, fields: "503" if number > 1 else None
    with pytest.raises(ValueError, match="HTTP 503, 6 times") as error:
        ask(server, positions, tmp_path / "a", contact=MAIL)
    for secret in ("40.7", "74.0", MAIL):
        assert secret not in str(error.value)
    server.requests.clear()
    server.fault = lambda number, fields: None
    assert None not in ask(server, positions, tmp_path / "a")
    assert [request.fields["lat"] for request in server.requests] == ["40.7123"]


def test_what_the_server_refuses_is_said(server: Server, tmp_path: Path) -> None:
    server.fault = lambda number, fields: 'json {"error": "too much"}'
    with pytest.raises(ValueError, match="127.0.0.1:.* refuses to answer: too much"):
        ask(server, [[40.7, -74.0]], tmp_path / "a")


def test_ctrl_c_keeps_what_is_there(server: Server, tmp_path: Path) -> None:
    server.meanwhile = lambda number: signal.raise_signal(signal.SIGINT) if number == 3 else None
    positions = [[40.0 + k / 100, -74.0] for k in range(5)]
    with pytest.raises(KeyboardInterrupt):
        ask(server, positions, tmp_path / "a")
    with AddressCache(tmp_path / "a") as cache:
        assert [cache.get(cell) is not None for cell in cells_of(positions)] == [
            True, True, False, False, False]


def test_the_public_server_is_asked_once_a_second_and_told_by_whom(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geocoding, "ENDPOINT", server.nominatim)
    with pytest.raises(ValueError, match="say who runs them: add --contact"):
        Nominatim()
    now = [100.0]
    monkeypatch.setattr("gps_guidance.photos.web.time.monotonic", lambda: now[0])
    asked_at: list[float] = []
    server.meanwhile = lambda number: asked_at.append(now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    ask(server, [[k, 0.0] for k in range(4)], tmp_path / "a", endpoint=None, contact=MAIL,
        sleep=sleep)
    assert asked_at == [100.0, 101.0, 102.0, 103.0]
    agents = {request.headers["User-Agent"] for request in server.requests}
    assert [agent.split() for agent in agents] == [[f"gps-guidance/{__version__}", f"({MAIL})"]]
    assert MAIL not in str([request.fields for request in server.requests])


@pytest.mark.parametrize("endpoint", ["nominatim.example.org", "ftp://example.org", "https://"])
def test_an_endpoint_is_an_address(endpoint: str) -> None:
    with pytest.raises(ValueError, match="no address of a server, such as https://nominatim"):
        Nominatim(endpoint=endpoint)


def test_without_geopy_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "geopy.adapters", None)
    with pytest.raises(ValueError, match=r'pip install "gps-guidance\[geocode\]"'):
        Nominatim(contact=MAIL)


# --- datasets ----------------------------------------------------------------------------------


@pytest.fixture
def dataset(city_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(city_dataset, tmp_path / "d"))


def column(dataset: Path) -> list[str | None]:
    return load_manifest(dataset).rows["address"].to_pylist()


def test_a_dataset_gets_its_addresses_by_the_command_line(
    server: Server, dataset: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "gps_guidance")
    cache = dataset.with_name("a.sqlite")
    before = load_manifest(dataset).rows
    argv = ["geocode", str(dataset), "--cache", str(cache)]
    assert cli.main([*argv, "--offline"]) == 2
    error = capsys.readouterr().err
    assert "12 of 12 cells are not in" in error and "`gps-guidance geocode DATASET" in error
    assert not cache.exists()
    assert cli.main([*argv, "--endpoint", server.nominatim]) == 0
    assert capsys.readouterr().out == f"12 photos with an address in {dataset}\n"
    assert cli.main([*argv, "--offline"]) == 0
    rows = load_manifest(dataset).rows
    assert rows.schema.equals(before.schema, check_metadata=True)
    assert rows.drop_columns("address").equals(before.drop_columns("address"))
    assert column(dataset) == [
        f"Street {round(lat, 4):.4f}/{round(lon, 4):.4f}, Manhattan, New York"
        for lat, lon in zip(rows["lat"].to_pylist(), rows["lon"].to_pylist(), strict=True)]
    for lat in rows["lat"].to_pylist():  # 43.7...; the log is no place for positions
        assert f"{lat:.3f}" not in caplog.text


def test_photos_at_sea_are_counted(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server() as sea:
        assert cli.main(["geocode", str(dataset), "--cache", str(dataset.with_name("a")),
                         "--endpoint", sea.nominatim]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["12", "are", "where", "there",
                                                               "is", "none"]
    assert column(dataset) == [None] * 12


def test_a_dataset_of_before_is_valid(dataset: Path, tmp_path: Path) -> None:
    path = dataset / "manifest.parquet"
    pq.write_table(pq.read_table(path).drop_columns("address"), path)
    assert column(dataset) == [None] * 12
    with AddressCache(tmp_path / "a") as cache:
        rows = load_manifest(dataset).rows.to_pylist()
        cells = cells_of([[row["lat"], row["lon"]] for row in rows])
        cache.add(dict.fromkeys(cells, "Pisa"), "me")
    assert vars(geocode(dataset, tmp_path / "a", offline=True)) == {"addressed": 12, "nameless": 0}
    assert pq.read_table(path).schema.names.index("address") == 21


def test_merging_keeps_addresses_and_blurring_does_not(
    server: Server, dataset: Path, tmp_path: Path
) -> None:
    geocode(dataset, tmp_path / "a", endpoint=server.nominatim, progress=False)
    ingest([dataset], tmp_path / "merged", bounds=CITY, progress=False)
    assert column(tmp_path / "merged") == column(dataset)
    ingest([dataset], tmp_path / "blurred", bounds=CITY, blur_m=50.0, progress=False)
    assert column(tmp_path / "blurred") == [None] * 12


def test_a_photo_that_is_taken_down_takes_its_address_along(
    server: Server, dataset: Path, tmp_path: Path
) -> None:
    path = dataset / "manifest.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("owner")
    pq.write_table(table.set_column(place, table.schema.field(place), [["ada"] + ["bob"] * 11]),
                   path)
    geocode(dataset, tmp_path / "a", endpoint=server.nominatim, progress=False)
    address = column(dataset)[0]  # the server's, which is that of no other photo
    take_down(dataset, ["ada"])
    assert len(column(dataset)) == 11 and address is not None
    street = address.split(",")[0].encode()
    for file in dataset.rglob("*"):
        assert file.is_dir() or street not in file.read_bytes()
    assert address not in column(dataset)


# --- the miniature -----------------------------------------------------------------------------


def test_the_miniature_city_has_an_address_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "city" / "addresses.sqlite"
    assert cli.main(["miniature", "--world", "city", "--count", "1", "--out", str(tmp_path / "p"),
                     "--addresses", str(path)]) == 0
    rng = np.random.default_rng(0)
    positions = city.from_grid(rng.uniform(0, city.GRID, (300, 2)))
    found = addresses_of(positions, path, offline=True)
    exact = [city.address_of(place) for place in city.place_of(cells_of(positions))]
    assert found == exact and len(set(found)) == len(city.PLACES)
    assert "old town, Miniatown" in found


def test_the_tower_has_no_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["miniature", "--out", str(tmp_path / "p"), "--addresses", "a"]) == 2
    assert "landmark has no addresses" in capsys.readouterr().err and not any(tmp_path.iterdir())
