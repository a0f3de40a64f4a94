"""Sources: every kind of folder, table and answer of a service gives the same records."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gps_guidance.photos.columns import looks_swapped
from gps_guidance.photos.sources import FLICKR_LICENCES, RECORD, read_records

PISA = (43.72, 10.39)
NEAR_PISA = (43.6, 10.2, 43.9, 10.6)


def read(*sources: Path, **options: Any) -> list[dict[str, Any]]:
    batches = list(read_records(sources, **options))
    assert all(batch.schema == RECORD for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def positions(rows: list[dict[str, Any]]) -> list[tuple[float | None, float | None]]:
    return [(row["lat"], row["lon"]) for row in rows]


# --- CSV -------------------------------------------------------------------------------------


def test_every_field_of_a_csv_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "photos.csv", (
        "File,Image URL,LAT,Long,gps_accuracy,Compass Angle,datetaken,Photographer,License,Title\n"
        'a/b.jpg,http://x/b.jpg,43.72,10.39,4.5,-90,2024:05:06 07:08:09,Ann,CC BY 4.0,"Torre, è"\n'
    ))
    assert read(path) == [{
        "source": "b.jpg", "path": str(tmp_path / "a" / "b.jpg"), "url": "http://x/b.jpg",
        "lat": 43.72, "lon": 10.39, "horizontal_error_m": 4.5, "heading_deg": 270.0,
        "taken_at": "2024-05-06T07:08:09", "owner": "Ann", "licence": "CC BY 4.0",
        "caption": "Torre, è",
    }]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_and_delimiters(tmp_path: Path, encoding: str, delimiter: str) -> None:
    rows = [["lat", "lon", "caption"], ['"43,72"', '"-10,39"', "è 塔"], ["+43.5", "1e1", ""]]
    path = write(tmp_path / "a.csv", "\r\n".join(delimiter.join(r) for r in rows), encoding)
    found = read(path)
    assert positions(found) == [(43.72, -10.39), (43.5, 10.0)]
    assert [row["caption"] for row in found] == ["è 塔", None]
    assert [row["source"] for row in found] == ["a.csv:2", "a.csv:3"]


def test_quoted_newlines_and_gz(tmp_path: Path) -> None:
    text = 'lat,lon,caption\n1,2,"one\ntwo ""three"""\n3,4,x\n'
    plain = write(tmp_path / "a.csv", text)
    packed = tmp_path / "a.CSV.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    rows = read(plain)
    assert [row["caption"] for row in rows] == ['one\ntwo "three"', "x"]
    assert [row["source"] for row in rows] == ["a.csv:2", "a.csv:3"]
    assert positions(read(packed)) == positions(rows) == [(1, 2), (3, 4)]


def test_what_is_no_number_is_nan_and_what_is_missing_null(tmp_path: Path) -> None:
    values = ["north", "43.7.2", "inf", "1,234,5", "", "NaN", "NULL", "None", r"\N"]
    path = write(tmp_path / "a.csv", "x;y;heading;accuracy_m\n" + "".join(
        f"10;{value};{value};-1\n" for value in values))
    rows = read(path)
    assert [row["lat"] is not None and np.isnan(row["lat"]) for row in rows] == [
        True, True, True, True, False, False, False, False, False]
    assert all(row["lat"] is None for row in rows[4:])
    assert all(row["heading_deg"] is row["horizontal_error_m"] is None for row in rows)


def test_a_broken_row_is_told_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "lat,lon\n1,2\n3\n4,5\n6,7,8\n9,10\n")
    bad: list[tuple[str, str]] = []
    rows = read(path, on_bad=lambda *told: bad.append(told))
    assert [row["source"] for row in rows] == ["a.csv:2", "a.csv:4", "a.csv:6"]
    assert bad == [("a.csv:3", "1 columns instead of 2"), ("a.csv:5", "3 columns instead of 2")]


def test_numbers_of_rows_go_on_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gps_guidance.photos.tables.BLOCK_BYTES", 64)
    lines = [f"{k},{k}" if k % 7 else "broken" for k in range(2, 80)]
    path = write(tmp_path / "a.csv", "lat,lon\n" + "\n".join(lines))
    bad: list[str] = []
    batches = list(read_records([path], batch_size=3, on_bad=lambda source, _: bad.append(source)))
    assert max(len(batch) for batch in batches) == 3
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert [row["source"] for row in rows] == [f"a.csv:{k}" for k in range(2, 80) if k % 7]
    assert all(row["source"] == f"a.csv:{row['lat']:.0f}" for row in rows)
    assert bad == [f"a.csv:{k}" for k in range(7, 80, 7)]


def test_a_quote_that_is_never_closed_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'lat,lon,note\n1,2,x\n3,4,"' + "5,6,y\n" * 20000)
    bad: list[tuple[str, str]] = []
    assert positions(read(path, on_bad=lambda *told: bad.append(told))) == [(1, 2)]
    assert bad == [("a.csv:3", "a quote is opened and never closed")]
    path = write(tmp_path / "b.csv", 'lat,lon,note\n1,2,x\n3,4,"' + "5,6,y\n" * 2_000_000)
    read(path, on_bad=lambda *told: bad.append(told))
    assert bad[1][0] == "b.csv" and "rest of the file is not read" in bad[1][1]


def test_bytes_that_are_not_utf_8_cost_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "lat,lon,caption\n1,2,café\n3,4,tea\n", "latin-1")
    assert [row["caption"] for row in read(path)] == ["caf\ufffd", "tea"]


def test_without_a_callback_broken_rows_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(write(tmp_path / "a.csv", "lat,lon\n1\n2\n3,4\n"))
    [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "a.csv: 2 rows cannot be read" in record.getMessage()
    assert "a.csv:2: 1 columns instead of 2" in record.getMessage()


def test_flickrs_accuracy_is_not_metres(tmp_path: Path) -> None:
    [row] = read(write(tmp_path / "a.csv", "lat,lon,accuracy\n1,2,16\n"))
    assert row["horizontal_error_m"] is None


def test_paths_and_addresses(tmp_path: Path) -> None:
    names = ["b.jpg", "../c.jpg", "/d/e.jpg", "~/f.jpg", "http://x/g.jpg", "file:///h.jpg", ""]
    path = write(tmp_path / "t" / "a.csv", "lat,lon,image\n" + "".join(f"1,2,{n}\n" for n in names))
    rows = read(path)
    folder = tmp_path / "t"
    assert [row["path"] for row in rows] == [
        f"{folder}/b.jpg", f"{folder}/../c.jpg", "/d/e.jpg", f"{Path.home()}/f.jpg", None,
        "/h.jpg", None]
    assert [row["url"] for row in rows] == [None] * 4 + ["http://x/g.jpg", None, None]
    assert [row["source"] for row in rows] == [
        "b.jpg", "c.jpg", "e.jpg", "f.jpg", "a.csv:6", "h.jpg", "a.csv:8"]


def test_the_photos_page_is_the_source_and_a_word_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "lat,lon,source\n1,2,https://x/photo/1\n3,4,flickr\n")
    assert [row["source"] for row in read(path)] == ["https://x/photo/1", "a.csv:3"]


@pytest.mark.parametrize(("text", "taken_at"), [
    ("2024:05:06 07:08:09", "2024-05-06T07:08:09"), ("2024-05-06T07:08:09", "2024-05-06T07:08:09"),
    ("2024-05-06 07:08:09.250", "2024-05-06T07:08:09"),
    ("2024_05_06_07_08_09_000", "2024-05-06T07:08:09"),
    ("2024-05-06T07:08:09+02:00", "2024-05-06T07:08:09"), ("2024-05-06", "2024-05-06"),
    ("2024-05-06T07:08:09Z", None), ("2024-05-06T07:08:09+00:00", None), ("1714972089", None),
    ("0000-00-00 00:00:00", None), ("2024-13-01", None), ("May 2024", None), ("", None),
])
def test_only_a_local_time_is_kept(tmp_path: Path, text: str, taken_at: str | None) -> None:
    [row] = read(write(tmp_path / "a.csv", f"lat,lon,date\n1,2,{text}\n"))
    assert row["taken_at"] == taken_at


def test_the_best_name_counts_and_the_next_fills_in(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "y,x,latitude,lon,title,caption,lat\n"
                 "9,9,8,2,title,caption,1\n9,9,8,2,title,,\n")
    rows = read(path)
    assert positions(rows) == [(1, 2), (None, 2)]
    assert [row["caption"] for row in rows] == ["caption", "title"]


def test_what_was_read_as_what_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    read(write(tmp_path / "a.tsv", "My Lat\tlat.\tLNG\n1\t2\t3\n"))
    assert "a.tsv is read as CSV with '\\t' between columns: " in caplog.text
    assert "lat from lat.; lon from LNG" in caplog.text


def test_a_table_without_a_position_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,northing,lon\n1,2,3\n")
    with pytest.raises(ValueError, match=r"a\.csv has no column for lat: it has id, northing, lon\."
                                         r".*latitude.*MAPLatitude"):
        read(path)


# --- swapped columns -------------------------------------------------------------------------


@pytest.mark.parametrize(("lat", "lon", "near", "swapped"), [
    ([35.6] * 20, [139.7] * 20, None, False),
    ([139.7] * 20, [35.6] * 20, None, True),
    ([10.4] * 20, [43.7] * 20, None, False),  # Pisa, or a place in Somalia
    ([10.4] * 20, [43.7] * 20, NEAR_PISA, True),
    ([43.7] * 20, [10.4] * 20, NEAR_PISA, False),
    ([43.7] * 20 + [143.7], [10.4] * 21, None, False),  # a slip of one row
    ([43.7] * 20 + [143.7], [10.4] * 21, NEAR_PISA, False),
    ([10.4] * 30 + [0.0], [43.7] * 30 + [0.0], NEAR_PISA, True),
    ([60.0] * 20, [30.0] * 20, NEAR_PISA, False),  # elsewhere either way
    ([430.0] * 20, [10.4] * 20, None, False),  # none on earth either way
    ([np.nan], [np.nan], NEAR_PISA, False),
    ([], [], None, False),
])
def test_a_swap_is_seen_only_where_it_is_sure(lat: Any, lon: Any, near: Any, swapped: bool) -> None:
    assert looks_swapped(np.array(lat, float), np.array(lon, float), near) is swapped


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_swapped_columns_are_swapped_back_with_a_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"lat": [139.7] * 5 + [35.0], "lon": [35.6] * 5 + [139.0]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if name == "a.parquet":
        pq.write_table(pa.table(columns), tmp_path / name)
    elif name == "a.csv":
        write(tmp_path / name, "lat,lon\n" + "".join(f"{r['lat']},{r['lon']}\n" for r in rows))
    else:
        write(tmp_path / name, "\n".join(map(json.dumps, rows)))
    found = read(tmp_path / name, batch_size=5)  # decided on the first five, kept for the sixth
    assert positions(found) == [(35.6, 139.7)] * 5 + [(139.0, 35.0)]
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "swapped: (139.7, 35.6)" in record.getMessage()
    assert "lat 35.6, lon 139.7" in record.getMessage()


# --- Parquet and JSON ------------------------------------------------------------------------


def test_parquet_of_any_types(tmp_path: Path) -> None:
    table = pa.table({
        "lat": pa.array([43.72, None, float("nan")], pa.float32()),
        "lon": pa.array([10, 11, 12], pa.int16()),
        "url": pa.array(["http://x/1", "http://x/2", None], pa.large_string()),
        "user": pa.array(["a", "b", "a"]).dictionary_encode(),
        "user_tags": pa.array([["x"], [], None]),
        "taken_at": pa.array([1714979289, None, 0], pa.timestamp("s")),
        "MAPCompassHeading": pa.array([{"TrueHeading": 370.0}, None, {"TrueHeading": None}]),
    })
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", batch_size=2)
    assert rows[0]["lat"] == pytest.approx(43.72, abs=1e-5) and rows[0]["lon"] == 10.0
    assert [row["lat"] for row in rows[1:]] == [None, None]
    assert [row["url"] for row in rows] == ["http://x/1", "http://x/2", None]
    assert [row["owner"] for row in rows] == ["a", "b", "a"]
    assert [row["taken_at"] for row in rows] == ["2024-05-06T07:08:09", None, "1970-01-01T00:00:00"]
    assert [row["heading_deg"] for row in rows] == [10.0, None, None]
    assert [row["source"] for row in rows] == [f"a.parquet:{k}" for k in (1, 2, 3)]
    zoned = table.set_column(5, "taken_at", table["taken_at"].cast(pa.timestamp("s", "UTC")))
    pq.write_table(zoned, tmp_path / "b.parquet")
    assert [row["taken_at"] for row in read(tmp_path / "b.parquet")] == [None] * 3


def test_broken_lines_of_jsonl_are_told(tmp_path: Path) -> None:
    lines = ['{"lat": 1, "lon": 2}', '{"lat": 1, "lo', "", "[" * 100_000, "7",
             '{"lat": "x", "lon": 4}',
             '{"lat": 5, "lon": 6, "caption": "\\ud83d", "tags": ["a"]}']
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\n".join(lines))
    bad: list[tuple[str, str]] = []
    rows = read(path, on_bad=lambda *told: bad.append(told))
    assert [row["source"] for row in rows] == ["a.jsonl:1", "a.jsonl:6", "a.jsonl:7"]
    assert [row["lon"] for row in rows] == [2, 4, 6] and np.isnan(rows[1]["lat"])
    assert rows[2]["caption"] == "?"
    assert [source for source, _ in bad] == ["a.jsonl:2", "a.jsonl:4", "a.jsonl:5"]


def test_every_line_with_flipped_bytes_is_a_record_or_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    line = b'{"lat": 43.72, "lon": 10.39, "url": "http://x/1.jpg", "date": "2024-05-06"}'
    row = b"43.72,10.39,http://x/1.jpg,2024-05-06"
    for name, whole, head in (("a.jsonl", line, line), ("a.csv", row, b"lat,lon,url,date")):
        lines = [head, whole]
        for _ in range(1000):
            data = bytearray(whole)
            for place in rng.integers(len(data), size=rng.integers(1, 4)):
                data[place] = rng.choice([b for b in range(256) if b not in b'\r\n"'])
            lines.append(bytes(data))
        (tmp_path / name).write_bytes(b"\n".join(lines))
        bad: list[str] = []
        rows = read(tmp_path / name, on_bad=lambda source, _, bad=bad: bad.append(source))
        seen = [row["source"] for row in rows] + bad
        first = 1 if name == "a.jsonl" else 2
        assert sorted(int(source.split(":")[1]) for source in seen) == list(range(first, 1003))
        assert min(len(rows), len(bad)) > 50


POINTS = {"type": "FeatureCollection", "features": [
    {"type": "Feature", "geometry": {"type": "Point", "coordinates": [10.39, 43.72, 4.0]},
     "properties": {"image": "a.jpg", "title": "Torre", "y": 7}},
    {"type": "Feature", "geometry": None, "properties": {"image": "b.jpg", "title": None}},
]}


@pytest.mark.parametrize("indent", [None, 2])
def test_geojson_has_the_longitude_first(tmp_path: Path, indent: int | None) -> None:
    rows = read(write(tmp_path / "a.geojson", json.dumps(POINTS, indent=indent)))
    assert positions(rows) == [PISA, (None, None)]
    assert [row["path"] for row in rows] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    assert rows[0]["caption"] == "Torre"


def flickr_photo(**more: Any) -> dict[str, Any]:
    return {"id": "53", "owner": "12@N01", "secret": "abc", "server": "65535", "farm": 66,
            "title": "Torre &amp; prato", "ispublic": 1, **more}


PLACED = {"latitude": "43.72", "longitude": 10.39, "accuracy": "16", "license": "11",
          "datetaken": "2024-05-06 07:08:09", "datetakengranularity": 0, "datetakenunknown": "0",
          "description": {"_content": "<b>The</b> tower"}}


def flickr_page(*photos: dict[str, Any]) -> str:
    return json.dumps({"photos": {"page": 1, "pages": 1, "photo": photos}, "stat": "ok"})


@pytest.mark.parametrize(("name", "wrap"), [
    ("a.json", lambda photo: flickr_page(photo)),
    ("a.json", lambda photo: f"jsonFlickrApi({flickr_page(photo)})"),
    ("a.jsonl", lambda photo: f"jsonFlickrApi({flickr_page(photo)});\n"),
    ("a.json", lambda photo: json.dumps([photo], indent=1)),
    ("a.jsonl", lambda photo: json.dumps(photo)),
    ("a.json", lambda photo: json.dumps(json.loads(flickr_page(photo)), indent=4)),
])
def test_a_photo_of_flickr(tmp_path: Path, name: str, wrap: Any) -> None:
    photo = flickr_photo(**PLACED, url_o="https://x/o.jpg", url_l="https://x/l.jpg")
    assert read(write(tmp_path / name, wrap(photo))) == [{
        "source": "https://www.flickr.com/photos/12@N01/53", "path": None,
        "url": "https://x/l.jpg", "lat": 43.72, "lon": 10.39, "horizontal_error_m": None,
        "heading_deg": None, "taken_at": "2024-05-06T07:08:09", "owner": "12@N01",
        "licence": "CC BY 4.0", "caption": "Torre & prato",
    }]


@pytest.mark.parametrize(("more", "expected"), [
    ({"latitude": 0, "longitude": 0, "accuracy": 0}, {"lat": None, "lon": None}),
    ({"latitude": "0", "longitude": "0", "accuracy": "16"}, {"lat": None, "lon": None}),
    ({"latitude": 0, "longitude": 10, "accuracy": 16}, {"lat": 0.0, "lon": 10.0}),
    ({}, {"lat": None, "url": "https://live.staticflickr.com/65535/53_abc_b.jpg"}),
    ({"license": 99}, {"licence": "Flickr licence 99"}),
    ({"license": 0}, {"licence": "All Rights Reserved"}),
    ({"datetaken": "2024-01-01 00:00:00", "datetakengranularity": "6"}, {"taken_at": None}),
    ({"datetaken": "2024-01-01 00:00:00", "datetakenunknown": 1}, {"taken_at": None}),
    ({"title": {"_content": ""}, "description": {"_content": "<b>The</b>\ntower"}},
     {"caption": "The tower"}),
    ({"url_z": "https://x/z.jpg", "url_o": "https://x/o.jpg"}, {"url": "https://x/o.jpg"}),
])
def test_what_flickr_leaves_open(tmp_path: Path, more: Any, expected: Any) -> None:
    [row] = read(write(tmp_path / "a.json", flickr_page(flickr_photo(**more))))
    assert {key: row[key] for key in expected} == expected


def test_a_page_that_failed_is_told(tmp_path: Path) -> None:
    failed = json.dumps({"stat": "fail", "code": 105, "message": "Service unavailable"})
    path = write(tmp_path / "a.jsonl", flickr_page(flickr_photo()) + "\n" + failed)
    bad: list[tuple[str, str]] = []
    assert len(read(path, on_bad=lambda *told: bad.append(told))) == 1
    assert bad == [("a.jsonl:2", "Flickr answered 'Service unavailable'")]


def test_the_licences_of_flickr_have_their_numbers() -> None:
    assert sorted(FLICKR_LICENCES) == list(range(17))
    assert FLICKR_LICENCES[4] == "CC BY 2.0" and FLICKR_LICENCES[16] == "CC BY-NC-ND 4.0"


def test_mapillary(tmp_path: Path) -> None:
    api = {"id": "1", "captured_at": 1507560881000, "compass_angle": 200.5,
           "thumb_2048_url": "https://x/1.jpg", "creator": {"username": "ann", "id": "7"},
           "geometry": {"type": "Point", "coordinates": [10.4, 43.7]},
           "computed_geometry": {"type": "Point", "coordinates": [10.39, 43.72]}}
    other = {**api, "computed_geometry": None}
    [row, plain] = read(write(tmp_path / "a.json", json.dumps({"data": [api, other]})))
    assert positions([row, plain]) == [PISA, (43.7, 10.4)]
    assert (row["heading_deg"], row["taken_at"], row["owner"], row["url"]) == (
        200.5, None, "ann", "https://x/1.jpg")
    tools = [{"MAPLatitude": 43.72, "MAPLongitude": 10.39, "MAPGPSAccuracyMeters": 3,
              "MAPCompassHeading": {"TrueHeading": 5.5, "MagneticHeading": 4.0},
              "MAPCaptureTime": "2024_05_06_07_08_09_000", "filename": "/photos/a.jpg"}]
    [row] = read(write(tmp_path / "mapillary_image_description.json", json.dumps(tools, indent=4)))
    assert positions([row]) == [PISA]
    assert (row["heading_deg"], row["horizontal_error_m"], row["taken_at"], row["path"]) == (
        5.5, 3.0, "2024-05-06T07:08:09", "/photos/a.jpg")


def test_kartaview(tmp_path: Path) -> None:
    photo = {"id": "1", "lat": "43.72", "lng": "10.39", "heading": "74.00", "gpsAccuracy": "8",
             "shotDate": "2024-05-06 07:08:09.000", "fileurlProc": "https://x/1.jpg"}
    answer = write(tmp_path / "a.json", json.dumps({"result": {"data": [photo]}}))
    table = write(tmp_path / "a.csv", ",".join(photo) + "\n" + ",".join(photo.values()))
    for [row] in (read(answer), read(table)):
        assert positions([row]) == [PISA]
        assert (row["heading_deg"], row["horizontal_error_m"], row["taken_at"], row["url"]) == (
            74.0, 8.0, "2024-05-06T07:08:09", "https://x/1.jpg")


# --- kinds and errors ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", b"x", r"a\.txt is of no known kind.*folder of photos.*\.jpg.*\.csv.*\.gz"),
    ("a.xlsx", b"PK\3\4", "no known kind"), ("a.csv", b"PK\3\4", "no known kind"),
    ("a.csv", b"PAR1", "no known kind"), ("a.parquet", b"lat,lon", "no known kind"),
    ("a.csv", b"", "is empty"), ("a.jsonl.gz", gzip.compress(b""), "is empty"),
])
def test_an_unknown_kind_is_refused_at_once(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records([tmp_path, tmp_path / name])


def test_a_missing_source_and_a_broken_parquet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file or folder .*nowhere"):
        read_records([tmp_path / "nowhere"])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet is no whole Parquet"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "text"), [
    ("a.csv", "lat,lon\n"), ("a.csv", "lat,lon"), ("a.jsonl", "\n\n"), ("a.json", "[]"),
    ("a.geojson", '{"type": "FeatureCollection", "features": []}'),
])
def test_a_table_without_rows_has_no_records(tmp_path: Path, name: str, text: str) -> None:
    bad: list[str] = []
    assert read(write(tmp_path / name, text), on_bad=lambda *told: bad.append(str(told))) == []
    assert bad == []


def test_a_cut_file_gives_what_is_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [f"{lat:.9f},{lon:.9f}" for lat, lon in rng.uniform(-80, 80, (50_000, 2))]
    packed = gzip.compress(("lat,lon\n" + "\n".join(lines)).encode(), compresslevel=1)
    rows = [json.dumps({"lat": 1, "lon": 2})] * 3
    bad: list[tuple[str, str]] = []
    (tmp_path / "a.csv.gz").write_bytes(packed[: len(packed) // 2])
    write(tmp_path / "b.jsonl", "\n".join(rows)[:-4])
    found = read(tmp_path / "a.csv.gz", tmp_path / "b.jsonl", on_bad=lambda *t: bad.append(t))
    assert [source for source, _ in bad] == ["a.csv.gz", "b.jsonl:3"]
    assert positions(found[-2:]) == [(1, 2)] * 2


def test_several_sources_follow_each_other(tmp_path: Path) -> None:
    write(tmp_path / "photos" / "a.jpg", "")
    table = write(tmp_path / "a.csv", "lat,lon\n1,2\n")
    assert [row["source"] for row in read(table, tmp_path / "photos")] == ["a.csv:2", "a.jpg"]
