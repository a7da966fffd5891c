"""The same pages served while runs train: to this machine alone, under an address that nobody guesses."""

from __future__ import annotations

import gzip
import hashlib
import hmac
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from keel.errors import KeelError
from keel.lab.places import FAILED
from keel.report.page import MOST, as_json, html, index_html, payload, plotly_program, shown
from keel.report.words import run_headline, study_headline

REST = 20  # a page's data are read anew after so many times the seconds that reading took
WATCHED = ("study.json", "results.json", "summary.json", "metrics.jsonl", "rollouts.jsonl", "tokens.jsonl")
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page itself says the rest
}


@dataclass
class Held:
    """What was last read of one run or study."""

    mark: str = ""
    data: bytes = b""
    rests_until: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Shelf:
    """The runs and studies below a folder, each under a name that says nothing of its path."""

    root: Path
    most: int
    held: dict[str, Held] = field(default_factory=dict)

    def places(self) -> dict[str, Path]:
        """Where runs and studies are now, the newest first."""
        found = [self.root] if _kind(self.root) else [path for path in self.root.iterdir() if _kind(path)]
        found.sort(key=_changed, reverse=True)
        return {hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]: path for path in found}

    def data(self, name: str, path: Path) -> tuple[str, bytes]:
        """(mark, packed data): read anew when a file has changed, but not so often that it slows the training down."""
        held = self.held.setdefault(name, Held())
        with held.lock:
            mark = _mark(path)
            if held.mark != mark and time.monotonic() >= held.rests_until:
                begun = time.monotonic()
                held.data = gzip.compress(as_json(payload(shown([path]), self.most)), 3, mtime=0)
                held.mark = mark
                held.rests_until = time.monotonic() + REST * (time.monotonic() - begun)
            return held.mark, held.data


class Server:
    """One server. `url` opens it; `wait` returns when it is closed from elsewhere."""

    def __init__(self, root: Path, port: int, most: int):
        self.token = secrets.token_urlsafe(24)
        self.shelf = Shelf(root, most)
        self.http = _bound(port, type("Handler", (_Handler,), {"server_of": self}))
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    @property
    def base(self) -> str:
        return f"/{self.token}/"

    @property
    def url(self) -> str:
        alone = f"{next(iter(self.shelf.places()))}/" if _kind(self.shelf.root) else ""
        return f"http://127.0.0.1:{self.port}{self.base}{alone}"

    def wait(self) -> None:
        while self.thread.is_alive():
            self.thread.join(0.5)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@contextmanager
def serving(root: Path, *, port: int = 0, most: int = MOST) -> Iterator[Server]:
    """Serve while inside.

    Raises:
        KeelError: the folder does not exist, or the port is taken.
    """
    if not root.is_dir():
        raise KeelError(
            f"There is no folder {str(root)!r}. Expected one with runs or studies in it, such as runs/, or one of them."
        )
    server = Server(root, port, most)
    server.thread.start()
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    server_of: Server
    timeout = 30
    server_version, sys_version = "keel", ""

    def do_GET(self) -> None:
        server = self.server_of
        if self.headers.get("Host") not in (f"127.0.0.1:{server.port}", f"localhost:{server.port}"):
            self._say(403, b"not this host")  # a page elsewhere whose name was made to point here
            return
        if not hmac.compare_digest(self.path[: len(server.base)].encode(), server.base.encode()):
            self._say(404, b"nothing here")
            return
        try:
            self._answer(self.path[len(server.base) :])
        except KeelError as fault:
            self._say(500, str(fault).encode("utf-8", "replace"))

    def _answer(self, rest: str) -> None:
        server, (name, _, what) = self.server_of, rest.partition("/")
        places = server.shelf.places()
        if not rest:
            self._say(200, index_html(_entries(server, places)).encode("utf-8", "replace"), "text/html; charset=utf-8")
        elif what == "plotly" and name in places:
            self._say(200, _packed_program(), "text/javascript; charset=utf-8", packed=True)
        elif name not in places or what not in ("", "data"):
            self._say(404, b"nothing here")
        elif what == "data":
            self._data(*server.shelf.data(name, places[name]))
        else:
            page = html(shown([places[name]]), live=f"{server.base}{name}/")
            self._say(200, page.encode("utf-8", "replace"), "text/html; charset=utf-8")

    def _data(self, mark: str, data: bytes) -> None:
        if self.headers.get("If-None-Match") == f'"{mark}"':
            self._say(304, b"")
        else:
            self._say(200, data, "application/json", packed=True, mark=mark)

    def _say(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8", packed: bool = False, mark: str = "") -> None:
        self.send_response(code)
        told = {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}
        told |= {"Content-Encoding": "gzip"} if packed else {}
        told |= {"ETag": f'"{mark}"'} if mark else {}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


class _Http(ThreadingHTTPServer):
    def handle_error(self, *at: Any) -> None:
        """A browser that goes away in the middle of an answer is nothing to tell."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(*at)


def _bound(port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    try:
        return _Http(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as fault:
        raise KeelError(
            f"Port {port} of this machine cannot be served: {fault}. Expected a free one; --port 0 takes any."
        ) from None


def _kind(path: Path) -> str:
    return "study" if (path / "study.json").is_file() else "run" if (path / "config.toml").is_file() else ""


def _changed(path: Path) -> float:
    return max((file.stat().st_mtime for file in (*path.glob("*.json*"), *path.glob("*/*/metrics.jsonl"))), default=0.0)


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def _mark(path: Path) -> str:
    """Changes whenever a file that the page shows does."""
    files = [path / name for name in WATCHED]
    files += [file for pattern in (*(f"*/*/{name}" for name in WATCHED), f"*/*.{FAILED}") for file in sorted(path.glob(pattern))]
    stamps = [(str(file), (found := file.stat()).st_mtime_ns, found.st_size) for file in files if file.is_file()]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:24]


def _entries(server: Server, places: dict[str, Path]) -> list[dict[str, str]]:
    """What the first page says of each run and study."""
    told = []
    for name, path in places.items():
        try:
            what = shown([path])
            headline = study_headline(what.study) if what.study else run_headline(what.runs[0])
        except KeelError as fault:  # one that cannot be read must not hide the others
            headline = str(fault)
        told.append(
            {
                "href": f"{server.base}{name}/",
                "name": path.name,
                "kind": f"{_kind(path)}, {_ago(_changed(path))}",
                "headline": headline,
            }
        )
    return told


@lru_cache(maxsize=1)
def _packed_program() -> bytes:
    return gzip.compress(plotly_program(), 6, mtime=0)
