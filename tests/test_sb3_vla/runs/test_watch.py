"""The page that follows a run: what it shows and when it changes, what is served and what is not, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_report import add_evaluations, add_metrics, add_videos
from toy import write_mp4

from sb3_vla.cli.main import main
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.watch import WatchServer, serve


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """A run under way."""
    with RunDirectory(tmp_path / "run", {"suite": "MT10"}) as directory:
        directory.write_json("stages/ppo.json", {"complete": False, "length": 1600})
        add_metrics(directory)
        add_videos(directory)
        yield directory


@pytest.fixture
def server(run: RunDirectory) -> Iterator[WatchServer]:
    with serve(run.path) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(server: WatchServer, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    """An answer, to a path that is sent as it is."""
    connection = HTTPConnection(*server.server_address[:2], timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer, answer.read()


def page(server: WatchServer) -> str:
    answer, content = get(server, "/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    return content.decode()


def test_the_page_follows_the_run(run: RunDirectory, server: WatchServer) -> None:
    first = page(server)
    text = " ".join(first.split())
    assert "<b>running</b>, last metrics" in text and "setInterval(follow, 5.0 * 1000)" in text
    assert "<dt>success of the latest episodes, exploring</dt><dd>40.0 %</dd>" in text
    assert "<dt>environment steps/s, updates included</dt><dd>33</dd>" in text  # 1000 in 30 s
    for part in ("Success while training, ppo", "<title>reach-v3</title>", "suite: MT10", "videos/after/reach-v3"):
        assert part in text, part
    tag = get(server, "/")[0].headers["ETag"]
    answer, content = get(server, "/", If_None_Match=tag)
    assert (answer.status, content) == (304, b""), "nothing has changed"
    add_evaluations(run)
    row = {"stage": "ppo", "time/env_steps": 9000, "time/time_elapsed": 270.0, "env/success_once": 0.91}
    run.append_metrics({**row, "time/total_timesteps": 800})
    run.append_metrics({**row, "time/env_steps": 10000, "time/time_elapsed": 330.0, "time/total_timesteps": 1000})
    write_mp4(
        run.path / "videos" / "train" / "push-v3_seed9_goal07_failure.mp4", np.zeros((2, 32, 32, 3), np.uint8), 40
    )
    answer, content = get(server, "/", If_None_Match=tag)
    text = " ".join(content.decode().split())
    assert answer.status == 200 and "<dd>91.0 %</dd>" in text
    assert "<dt>of ppo</dt><dd>62%</dd>" in text and "<dt>minutes left, about</dt><dd>3</dd>" in text
    assert "success, mean over 3 tasks" in text and "33.3 → 50.0 %" in text
    assert text.index("push-v3, goal 7") < text.index("reach-v3, goal 0"), "the newest video comes first"
    run.write_json("stages/ppo.json", {"complete": True})
    run.close()
    assert "<b>complete</b>" in page(server)
    run.write_json("stages/ppo.json", {"complete": False, "length": 1600})
    text = page(server)
    assert "<b>not running</b>" in text and "62%" in text and "minutes left" not in text


def test_nothing_is_written_to_a_run_that_is_watched(run: RunDirectory, server: WatchServer) -> None:
    def everything() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in run.path.rglob("*"))

    # What a writer leaves for an instant while it replaces a checkpoint.
    (run.path / "checkpoints" / "ppo" / ".step-00000035.replaced.tmp").mkdir(parents=True)
    first = page(server)
    run.append_metrics({"stage": "ppo", "time/env_steps": 9000, "env/success_once": 0.91})
    before = everything()
    assert page(server) != first, "all of it was read again"
    assert everything() == before
    RunDirectory(run.path, {"suite": "MT10"}).close()  # and whoever has the run, still has it


def test_videos_are_played_in_parts(run: RunDirectory, server: WatchServer) -> None:
    address = "/videos/after/reach-v3_seed3_goal00_success.mp4"
    content = (run.path / address[1:]).read_bytes()
    assert f'src="{address}"' in page(server)
    for wanted, expected in (
        ("bytes=0-9", content[:10]),
        ("bytes=10-", content[10:]),
        ("bytes=-7", content[-7:]),
        (f"bytes=5-{10**9}", content[5:]),
    ):
        answer, part = get(server, address, Range=wanted)
        assert (answer.status, part) == (206, expected)
        first = content.index(expected)
        assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(part) - 1}/{len(content)}"
    answer, part = get(server, address)
    assert (answer.status, part, answer.headers["Content-Type"]) == (200, content, "video/mp4")
    answer, _ = get(server, address, Range=f"bytes={len(content)}-")
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{len(content)}")


def test_nothing_else_is_served(run: RunDirectory, server: WatchServer, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    for path in (outside / "secret.mp4", run.path / "videos" / "in side.mp4", run.path / "checkpoints" / "other.mp4"):
        write_mp4(path, frames, 40)
    (run.path / "videos" / "link.mp4").symlink_to(outside / "secret.mp4")
    (run.path / "videos" / "folder").symlink_to(outside)
    assert get(server, "/videos/in%20side.mp4")[0].status == 200
    for path in (
        "/config.yaml",
        "/metrics.jsonl",
        "/videos/",
        "/checkpoints/other.mp4",
        "/../outside/secret.mp4",
        "/videos/../../outside/secret.mp4",
        "/videos/..%2f..%2foutside%2fsecret.mp4",
        f"/{outside}/secret.mp4",
        f"/{str(outside).replace('/', '%2f')}%2fsecret.mp4",
        "/videos/link.mp4",
        "/videos/folder/secret.mp4",
        "/videos/gone.mp4",
        "/favicon.ico",
    ):
        answer, content = get(server, path)
        assert (answer.status, content) == (404, b"there is no such page\n"), path
    assert "secret" not in page(server) and "link.mp4" not in page(server)


def test_a_run_that_goes_away_is_told(run: RunDirectory, server: WatchServer, tmp_path: Path) -> None:
    page(server)
    run.path.rename(tmp_path / "elsewhere")
    answer, content = get(server, "/")
    assert answer.status == 404 and b"is not a run directory" in content
    (tmp_path / "elsewhere").rename(run.path)
    assert "<b>running</b>" in page(server)


def test_it_is_seen_from_this_machine_alone_unless_asked(server: WatchServer) -> None:
    assert server.server_address[0] == "127.0.0.1" and server.url == f"http://127.0.0.1:{server.server_address[1]}/"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(
    run: RunDirectory, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forever(server: WatchServer) -> None:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), number)).start()
        ThreadingHTTPServer.serve_forever(server)

    monkeypatch.setattr(WatchServer, "serve_forever", forever)
    assert main(["watch", str(run.path), "port=0"]) == 0
    told = capsys.readouterr().out
    assert f"{run.path} at http://127.0.0.1:" in told and told.endswith("stopped\n")
    port = int(told.split("127.0.0.1:")[1].split("/")[0])
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_bad_input_is_told_in_one_message(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for settings, message in (
            ([str(tmp_path / "nowhere")], f"there is no run directory {tmp_path}/nowhere"),
            ([str(tmp_path / "empty")], "is not a run directory: it has none of config.yaml"),
            ([str(run.path), f"port={port}"], f"port {port} of 127.0.0.1 is taken; choose another with port=..."),
            ([str(run.path), "port=70000"], "port=70000; expected 0 to 65535"),
            (
                [str(run.path), "host=no.such.host.invalid", "port=0"],
                "cannot serve at host=no.such.host.invalid port=0",
            ),
            ([str(run.path), "seconds=0"], "seconds=0.0; expected 1 or more"),
            ([str(run.path), "prot=1"], "did you mean 'port'"),
        ):
            assert main(["watch", *settings]) == 2
            told = " ".join(capsys.readouterr().err.split())
            assert told.startswith("error:") and message in told, told
