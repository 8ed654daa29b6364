"""``sb3-vla watch RUN``: the page of a run, served on this machine and up to date while the run goes on."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import threading
import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from rich.console import Console

from sb3_vla.common.errors import InputError, RunError
from sb3_vla.runs.directory import RunDirectory

_NEWEST = 12  # trials whose videos are shown
_ON_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


@dataclass
class WatchCommand:
    """Serve a page that follows a run: success, curves, videos, settings; ``sb3-vla watch RUN`` for short.

    :param run: run directory, of a run that is under way or has ended.
    :param host: address to serve at; 127.0.0.1 is seen from this machine alone, 0.0.0.0 from everywhere.
    :param port: of the address; 0 for any that is free.
    :param seconds: between two readings of the page.
    """

    run: str = "runs/ppo"
    host: str = "127.0.0.1"
    port: int = 8765
    seconds: float = 5.0


def run_watch(command: WatchCommand, console: Console) -> None:
    """``sb3-vla watch``; ends by Ctrl-C or SIGTERM."""
    if not command.seconds >= 1:
        raise InputError(f"seconds={command.seconds}; expected 1 or more")
    with serve(command.run, command.host, command.port, command.seconds) as server:
        console.print(f"{command.run} at {server.url}; Ctrl-C ends it", highlight=False, soft_wrap=True)
        if command.host not in _ON_THIS_MACHINE:
            console.print(f"Whoever reaches {command.host} can read it: its settings, command and videos.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("stopped")


def serve(run: str | Path, host: str = "127.0.0.1", port: int = 0, seconds: float = 5.0) -> WatchServer:
    """
    A server of a run's page, to be started by ``serve_forever``.

    :param run: run directory
    :param host: name or address of this machine
    :param port: 0 for any that is free
    :param seconds: between two readings of the page
    :raises RunError: if there is no such run, or nothing can be served at that address
    """
    page = LivePage(RunDirectory(run), seconds)
    page.html()  # says what is wrong with the run, before anything is served
    if not 0 <= port < 2**16:
        raise InputError(f"port={port}; expected 0 to 65535")
    try:
        return WatchServer(host, port, page)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RunError(
                f"port {port} of {host} is taken; choose another with port=..., or port=0 for any"
            ) from error
        raise RunError(f"cannot serve at host={host} port={port}: {error.strerror or error}") from error


class LivePage:
    """The page of a run, made anew when something in the run directory has changed."""

    def __init__(self, run: RunDirectory, seconds: float) -> None:
        self.run, self.seconds = run, seconds
        self._lock = threading.Lock()  # matplotlib's settings are of the process
        self._made: tuple[Any, bytes] = (None, b"")

    def html(self) -> bytes:
        """
        The page, in UTF-8.

        :raises RunError: if the directory is gone, or no run's
        """
        # With the other commands this module is loaded; what draws and decodes is not.
        from sb3_vla.runs.report.contents import find_videos, read_contents
        from sb3_vla.runs.report.report import render, trial_videos

        with self._lock:
            run, metrics = self.run.path, self.run.path / "metrics.jsonl"
            files = [*run.glob("*.*"), *run.glob("stages/*.json")]
            state = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files if path.is_file()]
            found = _is_held(run), find_videos(run), state
            if found != self._made[0]:
                contents = read_contents(self.run)
                complete = contents.stages and all(stage.get("complete") for stage in contents.stages.values())
                written = metrics.stat().st_mtime if metrics.exists() else None
                live = {
                    "state": "running" if found[0] else "complete" if complete else "not running",
                    "written": written and datetime.fromtimestamp(written, timezone.utc).isoformat(timespec="seconds"),
                    "seconds": self.seconds,
                }
                trials = trial_videos(contents.videos, lambda path: (self.address(path), True), newest=_NEWEST)
                notes = [f"The newest first, {sum(map(len, trials))} of {len(contents.videos)}."]
                self._made = found, render(contents, trials, notes, live).encode()
            return self._made[1]

    def address(self, video: Path) -> str:
        """Where a video is served."""
        return f"/{quote(video.relative_to(self.run.path).as_posix())}"

    def video(self, address: str) -> Path | None:
        """The video of the run that is served at an address; None for any other file, inside of the run or not."""
        from sb3_vla.runs.report.contents import find_videos

        known = {video.path.relative_to(self.run.path).as_posix(): video.path for video in find_videos(self.run.path)}
        return known.get(unquote(address).removeprefix("/"))


class WatchServer(ThreadingHTTPServer):
    """Serves a page at ``/``, and the run's videos."""

    daemon_threads = True  # a browser that keeps its connection does not keep the command

    def __init__(self, host: str, port: int, page: LivePage) -> None:
        self.page = page
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _Handler)
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        try:
            if path == "/":
                self._send_page(self.server.page.html())
            elif (video := self.server.page.video(path)) is not None:
                self._send_video(video)
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"there is no such page\n")
        except (RunError, FileNotFoundError) as error:  # the run was moved, or a video deleted
            self._answer(HTTPStatus.NOT_FOUND, f"{error}\n".encode())
        except ConnectionError:
            self.close_connection = True  # the browser went away

    def _send_page(self, html: bytes) -> None:
        """The page, or that it is still the one that the browser has."""
        tag = f'"{zlib.crc32(html):08x}"'
        if self.headers.get("If-None-Match") == tag:
            self._answer(HTTPStatus.NOT_MODIFIED, ETag=tag)
        else:
            self._answer(HTTPStatus.OK, html, "text/html; charset=utf-8", ETag=tag)

    def _send_video(self, path: Path) -> None:
        """A video or the part of it that is asked for, as players do to move in it."""
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "bytes=-"))
        begin, end = wanted.groups() if wanted else ("", "")
        first = int(begin) if begin else max(size - int(end), 0) if end else 0
        last = min(int(end), size - 1) if begin and end else size - 1
        if first > last:
            self._answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, Content_Range=f"bytes */{size}")
            return
        with open(path, "rb") as file:
            file.seek(first)
            part = file.read(last - first + 1)
        if begin or end:
            status, headers = HTTPStatus.PARTIAL_CONTENT, {"Content_Range": f"bytes {first}-{last}/{size}"}
        else:
            status, headers = HTTPStatus.OK, {}
        self._answer(status, part, "video/mp4", Accept_Ranges="bytes", **headers)

    def _answer(
        self, status: HTTPStatus, content: bytes = b"", kind: str = "text/plain; charset=utf-8", **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Cache-Control": "no-cache", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", f"{len(content)}")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a page that reads itself every few seconds would fill the terminal."""


def _is_held(run: Path) -> bool:
    """Whether a process has the run directory, which its lock tells."""
    try:
        descriptor = os.open(run / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once; a writer waits longer for it
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
