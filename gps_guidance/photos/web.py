"""HTTP for photos: what can be tried again is, limits hold, and no error names a secret. No torch.

An address's query and a form's fields (API keys, tokens) are in no error and no log record of
this module: errors name the host and the path.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from gps_guidance import __version__
from gps_guidance.photos.manifest import write_whole

logger = logging.getLogger(__name__)

T = TypeVar("T")
Sleep = Callable[[float], Any]
MAX_REDIRECTS = 5
LONGEST_WAIT_S = 900.0  # of a Retry-After
LONGEST_BACKOFF_S = 60.0
LATER = (408, 425, 429)  # and 5xx: the same request may succeed later
CHUNK = 1 << 16


class WebError(ValueError):
    """A request that failed for good: host, path, the reason and what to do."""


class Later(Exception):
    """A failure that may pass. ``wait_s``: how long the server asks to wait, if it does."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait_s = reason, wait_s


class RateLimiter:
    """At most ``per_hour`` requests an hour, evenly spaced; threads may share one.

    There are no bursts, so that nothing has to be remembered between runs: whoever stops and
    resumes ``n`` times makes at most ``n`` requests too many.
    """

    def __init__(self, per_hour: float) -> None:
        if not per_hour > 0:
            raise ValueError(f"per_hour is {per_hour}: give a positive number of requests.")
        self._interval_s = 3600.0 / per_hour
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, sleep: Sleep = time.sleep) -> None:
        """Sleep until the next request may be sent."""
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._interval_s
        if at > now:
            sleep(at - now)


def user_agent(contact: str | None = None) -> str:
    """Who asks: this package and, as some servers want, how to reach whoever runs it."""
    return f"gps-guidance/{__version__}" + (f" ({contact})" if contact else "")


def new_session() -> requests.Session:
    session = requests.Session()
    session.max_redirects = MAX_REDIRECTS
    session.headers["User-Agent"] = user_agent()
    return session


def fetch(
    url: str, *, max_bytes: int, decode: Callable[[bytes], T] = bytes,  # type: ignore[assignment]
    params: Mapping[str, Any] | None = None, form: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None, timeout_s: float = 30.0, attempts: int = 6,
    limiter: RateLimiter | None = None, session: requests.Session | None = None,
    sleep: Sleep = time.sleep,
) -> T:
    """The body at an http or https address, through ``decode``; WebError if it is not to be had.

    ``params`` are added to the address. ``form`` makes it a POST, which keeps its fields out of
    addresses and is not redirected. Tried ``attempts`` times, with exponential back-off and full
    jitter or as Retry-After says: after status 408, 425, 429 and 5xx, a connection that fails, is
    silent for ``timeout_s`` seconds or breaks off, and whatever ``decode`` raises :class:`Later`
    for. A body above ``max_bytes`` bytes is given up while it is read.
    """
    where = _place(url)
    reason = ""
    with nullcontext(session) if session else new_session() as client:
        for attempt in range(attempts):
            if limiter:
                limiter.wait(sleep)
            try:
                return decode(_read(client, url, where, params, form, headers, timeout_s,
                                    max_bytes))
            except Later as error:
                reason, asked = error.reason, error.wait_s
            if attempt + 1 < attempts:
                backoff = random.uniform(0.0, min(LONGEST_BACKOFF_S, 2.0**attempt))
                wait_s = max(backoff, min(asked or 0.0, LONGEST_WAIT_S))
                logger.debug("%s: %s; again in %.1f s", where, reason, wait_s)
                sleep(wait_s)
    raise WebError(f"{where}: {reason}, {attempts} times. Try again later.")


def _place(url: str) -> str:
    """Host and path of an address, for errors."""
    try:
        parts = urlsplit(url)
        host, scheme = parts.hostname, parts.scheme
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        raise WebError("An address cannot be read: give one such as "
                       "https://example.org/photo.jpg.") from None
    if scheme not in ("http", "https") or not host:
        raise WebError(f"{scheme or 'no scheme'}:{parts.path}: only http and https addresses are "
                       "downloaded.")
    return host + port + parts.path


def _read(
    client: requests.Session, url: str, where: str, params: Mapping[str, Any] | None,
    form: Mapping[str, Any] | None, headers: Mapping[str, str] | None, timeout_s: float,
    max_bytes: int,
) -> bytes:
    """One try. Every error of the library is replaced, since its text may hold the query."""
    try:
        with client.request(
            "GET" if form is None else "POST", url, params=params, data=form, headers=headers,
            timeout=timeout_s, stream=True, allow_redirects=form is None,
        ) as response:
            _check_status(response, where)
            return _body(response, where, max_bytes)
    except requests.TooManyRedirects:
        raise WebError(f"{where}: more than {MAX_REDIRECTS} redirects.") from None
    except requests.exceptions.InvalidSchema:
        raise WebError(f"{where}: redirected to something that is not http or https.") from None
    except requests.Timeout:
        raise Later(f"no answer within {timeout_s:g} s") from None
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError):
        raise Later("the connection failed or broke off") from None
    except WebError:
        raise
    except (requests.RequestException, ValueError) as error:
        raise WebError(f"{where}: not an address ({type(error).__name__}).") from None


def _check_status(response: requests.Response, where: str) -> None:
    status = response.status_code
    if status in LATER or status >= 500:
        raise Later(f"HTTP {status}", _retry_after(response.headers.get("Retry-After")))
    if status != 200:
        raise WebError(f"{where}: HTTP {status} {response.reason or ''}".rstrip() + ".")


def _retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None if it is neither."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=timezone.utc)
    return max(0.0, (at - datetime.now(timezone.utc)).total_seconds())


def _body(response: requests.Response, where: str, max_bytes: int) -> bytes:
    declared = response.headers.get("Content-Length", "")
    body = bytearray()
    if not (declared.isdecimal() and int(declared) > max_bytes):
        for chunk in response.iter_content(CHUNK):
            body += chunk
            if len(body) > max_bytes:
                break
        else:
            return bytes(body)
    raise WebError(f"{where}: more than {max_bytes} bytes.")


@dataclass(frozen=True)
class Download:
    """What became of one download: ``error`` is None if the file is at ``target``, else why not."""

    url: str = field(repr=False)
    target: Path
    error: str | None = None


class _Stopped(Exception):
    """Nobody waits for the downloads any more."""


def download_all(
    items: Iterable[tuple[str, Path]], *, max_bytes: int, workers: int = 8,
    headers: Mapping[str, str] | None = None, timeout_s: float = 30.0, attempts: int = 6,
    limiter: RateLimiter | None = None,
) -> Iterator[Download]:
    """Download (address, file) pairs; a :class:`Download` for each, in the order given.

    ``items`` is read as results are taken, never more than ``8 * workers`` ahead. Files appear
    whole; one that exists is not downloaded again, nor is a file that is named twice. A failure is
    a result; only a disk that cannot be written ends the run, with the error of
    :func:`gps_guidance.photos.manifest.write_whole`. Closing the iterator, as Ctrl-C does, ends it
    at once: requests under way are abandoned.
    """
    jobs: queue.SimpleQueue[tuple[Future[Download], str, Path] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise _Stopped

    def work() -> None:
        with new_session() as session:
            while (job := jobs.get()) is not None and not stop.is_set():
                future, url, target = job
                try:
                    future.set_result(_download(url, target, lambda url: fetch(
                        url, max_bytes=max_bytes, headers=headers, timeout_s=timeout_s,
                        attempts=attempts, limiter=limiter, session=session, sleep=pause)))
                except _Stopped:
                    return
                except BaseException as error:
                    future.set_exception(error)

    # Threads of an executor would be waited for at exit, for as long as a server is silent.
    for _ in range(workers):
        threading.Thread(target=work, name="download", daemon=True).start()
    pending: deque[tuple[str, Path, Future[Download]]] = deque()
    under_way: dict[Path, Future[Download]] = {}
    try:
        for url, target in items:
            if target not in under_way:
                under_way[target] = Future()
                jobs.put((under_way[target], url, target))
            pending.append((url, target, under_way[target]))
            if len(pending) >= 8 * workers:
                yield _take(pending, under_way)
        while pending:
            yield _take(pending, under_way)
    finally:
        stop.set()
        for _ in range(workers):
            jobs.put(None)


def _take(
    pending: deque[tuple[str, Path, Future[Download]]], under_way: dict[Path, Future[Download]]
) -> Download:
    url, target, future = pending.popleft()
    done = future.result()
    if all(other != target for _, other, _ in pending):
        del under_way[target]
    return Download(url, target, done.error)


def _download(url: str, target: Path, get: Callable[[str], bytes]) -> Download:
    if target.exists():
        return Download(url, target)
    try:
        data = get(url)
    except WebError as error:
        return Download(url, target, str(error))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, data)
    return Download(url, target)
