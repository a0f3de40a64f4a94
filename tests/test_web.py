"""Downloads over real HTTP from a server that misbehaves: what is tried again, and what is not."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from web_server import Server

from gps_guidance.photos import web

BODY = bytes(range(256)) * 64
SECRET = "s3cr3t"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(files={"/a.jpg": BODY}) as running:
        yield running


def fetch(server: Server, path: str = f"/a.jpg?token={SECRET}", **options: Any) -> Any:
    options = {"max_bytes": 1 << 20, "timeout_s": 10, "sleep": lambda seconds: None} | options
    return web.fetch(server.url + path, **options)


def first(count: int, fault: str) -> Callable[[int, dict[str, str]], str | None]:
    """The fault, in the first ``count`` requests."""
    return lambda number, fields: fault if number <= count else None


# --- one request -----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["408", "425", "429", "429 0", "500", "502", "503 soon", "599",
                                   "hang", "drop", "truncate", "chunk"])
def test_what_may_pass_is_tried_again(server: Server, fault: str) -> None:
    server.fault = first(2, fault)
    assert fetch(server, timeout_s=0.5 if fault == "hang" else 10) == BODY
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", ["400", "401", "403", "404", "410", "304"])
def test_what_is_refused_is_not_tried_again(server: Server, fault: str) -> None:
    server.fault = first(9, fault)
    with pytest.raises(web.WebError, match=f"^127.0.0.1:[0-9]+/a.jpg: HTTP {fault}"):
        fetch(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("fault", "reason"), [("500", "HTTP 500"), ("hang", "within 0.1 s"),
                                               ("truncate", "broke off"), ("drop", "failed")])
def test_the_last_try_says_why(server: Server, fault: str, reason: str) -> None:
    server.fault = first(9, fault)
    with pytest.raises(web.WebError, match=rf"/a.jpg: .*{reason}.*, 3 times. Try again later"):
        fetch(server, attempts=3, timeout_s=0.1)
    assert len(server.requests) == 3


def test_nobody_there() -> None:
    with Server() as gone:
        pass
    with pytest.raises(web.WebError, match="the connection failed"):
        fetch(gone, attempts=2)


@pytest.mark.parametrize("path", ["?token={}", "b.jpg?token={}", "a.jpg?token={}&a=b#c"])
@pytest.mark.parametrize("fault", ["404", "500", "hang", "drop", "chunk", "302 ftp://x/{}",
                                   "302 /a.jpg?{}", "endless"])
def test_no_error_and_no_log_names_a_secret(
    server: Server, caplog: pytest.LogCaptureFixture, fault: str, path: str
) -> None:
    server.fault = lambda number, fields: fault.format(SECRET)
    caplog.set_level(logging.DEBUG, "gps_guidance")
    with pytest.raises(web.WebError) as caught:
        fetch(server, "/" + path.format(SECRET), attempts=2, timeout_s=0.05,
              params={"key": SECRET})
    assert SECRET not in f"{caught.value!r}{caplog.text}"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__ == (
        caught.value.__context__ is not None)


def test_a_form_is_in_no_address_and_not_passed_on(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even in the log of the HTTP library, which names addresses."""
    caplog.set_level(logging.DEBUG)
    server.files["/form"] = b"ok"
    assert fetch(server, "/form", form={"key": SECRET}) == b"ok"
    assert server.requests[0].fields == {"key": SECRET} and server.requests[0].method == "POST"
    assert "/form" in caplog.text and SECRET not in caplog.text
    server.fault = lambda number, fields: "307 /elsewhere"
    with pytest.raises(web.WebError, match="HTTP 307"):
        fetch(server, "/form", form={"key": SECRET})
    assert [request.path for request in server.requests] == ["/form", "/form"]


@pytest.mark.parametrize(("asked", "seconds"), [("7", 7), ("100000", 900), ("date", 30)])
def test_retry_after_is_kept_up_to_a_quarter_of_an_hour(
    server: Server, asked: str, seconds: float
) -> None:
    later = datetime.now(timezone.utc) + timedelta(seconds=30)
    server.fault = first(1, "429 " + (format_datetime(later, usegmt=True) if asked == "date"
                                      else asked))
    slept: list[float] = []
    assert fetch(server, sleep=slept.append) == BODY
    assert slept == [pytest.approx(seconds, abs=2)]


def test_back_off_doubles_and_is_random(server: Server) -> None:
    server.fault = first(99, "500")
    slept: list[float] = []
    for _ in range(12):
        with pytest.raises(web.WebError):
            fetch(server, sleep=slept.append, attempts=5)
    longest = [max(slept[k::4]) for k in range(4)]
    assert all(2.0**k / 2 < longest[k] <= 2.0**k for k in range(4))  # fails once in 1000 runs
    assert len(set(slept)) == len(slept)


@pytest.mark.parametrize("fault", [None, "endless"])
def test_a_body_above_the_limit_is_given_up(server: Server, fault: str | None) -> None:
    """With and without a declared length; the second would never end."""
    server.fault = first(9, fault or "") if fault else server.fault
    with pytest.raises(web.WebError, match=f"more than {len(BODY) - 1} bytes"):
        fetch(server, max_bytes=len(BODY) - 1)
    assert len(server.requests) == 1
    if not fault:
        assert fetch(server, max_bytes=len(BODY)) == BODY


def test_redirects_are_followed_to_http_alone_and_five_times(server: Server) -> None:
    server.fault = lambda number, fields: "302 /a.jpg" if number <= 5 else None
    assert fetch(server) == BODY
    server.fault = lambda number, fields: "302 /a.jpg"
    with pytest.raises(web.WebError, match="more than 5 redirects"):
        fetch(server)
    server.fault = lambda number, fields: "302 file:///etc/hostname"
    with pytest.raises(web.WebError, match="not http or https"):
        fetch(server)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.org/a", "a.jpg", "", "//x",
                                 "http://", "http://[::1/", "http://x:port/", "http://\x00/",
                                 f"http://{'a' * 300}.org/"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(web.WebError):
        web.fetch(url, max_bytes=9, attempts=1)


def test_what_the_decoder_does_not_like_is_tried_again(server: Server) -> None:
    server.fault = first(2, "html")

    def decode(body: bytes) -> int:
        if body != BODY:
            raise web.Later("not it", 3.0)
        return len(body)

    slept: list[float] = []
    assert fetch(server, decode=decode, sleep=slept.append) == len(BODY)
    assert slept == [3.0, 3.0]


# --- the limit -------------------------------------------------------------------------------


def test_the_limiter_spaces_the_requests_of_all_threads(server: Server) -> None:
    limiter = web.RateLimiter(3600 / 0.05)
    threads = [threading.Thread(target=fetch, args=(server,), kwargs={
        "limiter": limiter, "sleep": time.sleep}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(request.at for request in server.requests)
    assert len(times) == 8 and times[-1] - times[0] >= 7 * 0.05 - 0.04


def test_a_retry_counts_against_the_limit(server: Server) -> None:
    server.fault = first(2, "503 0")
    slept: list[float] = []
    limiter = web.RateLimiter(3.6)
    fetch(server, limiter=limiter, sleep=slept.append)
    assert [s for s in slept if s > 60] == [pytest.approx(1000, abs=9), pytest.approx(2000, abs=9)]


@pytest.mark.parametrize("per_hour", [0, -1, float("nan")])
def test_a_limit_of_nothing(per_hour: float) -> None:
    with pytest.raises(ValueError, match="per_hour"):
        web.RateLimiter(per_hour)


# --- many downloads --------------------------------------------------------------------------


def test_all_are_downloaded_in_order_and_failures_are_results(
    server: Server, tmp_path: Path
) -> None:
    server.files = {f"/{k}.jpg": bytes([k]) * 99 for k in range(40)}
    server.fault = lambda number, fields: "500 0" if number % 7 == 0 else None
    names = [f"{k}.jpg" for k in range(60)] + ["3.jpg"]
    items = [(f"{server.url}/{name}?{SECRET}", tmp_path / "images" / name) for name in names]
    items.insert(5, ("nonsense", tmp_path / "none"))
    results = list(web.download_all(items, max_bytes=99, workers=4))
    assert [(r.url, r.target) for r in results] == items
    failed = [r for r in results if r.error]
    assert [r.target.name for r in failed] == ["none", *names[40:60]]
    assert "HTTP 404" in str(failed[1].error) and SECRET not in str(failed)
    files = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert files == {f"{k}.jpg": bytes([k]) * 99 for k in range(40)}
    asked = len(server.requests)
    again = list(web.download_all(items[:4] * 3, max_bytes=99))
    assert [r.error for r in again] == [None] * 12 and len(server.requests) == asked


def test_few_are_taken_ahead(server: Server, tmp_path: Path) -> None:
    taken = itertools.count()
    endless = ((server.url + "/a.jpg", tmp_path / str(next(taken))) for _ in itertools.count())
    results = web.download_all(endless, max_bytes=1 << 20, workers=2)
    for _ in range(20):
        assert next(results).error is None
    results.close()  # type: ignore[attr-defined]
    assert next(taken) <= 20 + 16
    assert len(list(tmp_path.iterdir())) <= 20 + 16


def test_a_folder_that_cannot_be_written_ends_the_run(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        list(web.download_all([(server.url + "/a.jpg", tmp_path / "file/a")], max_bytes=1 << 20))


def test_ctrl_c_ends_at_once(server: Server, tmp_path: Path) -> None:
    """Though servers are silent for minutes, or ask for that."""
    server.fault = lambda number, fields: "hang" if number % 2 else "503 900"
    code = f"""if True:
        import os, signal, threading, time
        from pathlib import Path
        from gps_guidance.photos.web import download_all
        items = ((f"{server.url}/a.jpg?{{k}}", Path("{tmp_path}") / str(k)) for k in range(99))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            list(download_all(items, max_bytes=9, timeout_s=300))
        except KeyboardInterrupt:
            print(time.time())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert time.time() - float(done.stdout) < 5
    assert server.requests
