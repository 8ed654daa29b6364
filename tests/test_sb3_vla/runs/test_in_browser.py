"""The page as a browser lays it out, on a desktop and a phone, in light and dark; and that it reads itself again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from test_report import add_evaluations, add_metrics
from toy import write_mp4

from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.report.report import write_report
from sb3_vla.runs.watch import serve

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

# A frame is as wide as a phone, which a window cannot be.
LOOK = """<script>
onload = () => document.body.textContent = JSON.stringify([frames[0], frames[1]].map(frame => {
  const page = frame.document, all = selector => [...page.querySelectorAll(selector)]
  const color = (element, name) => frame.getComputedStyle(element)[name]
  return {
    width: frame.innerWidth, needs: page.documentElement.scrollWidth, page: color(page.body, "backgroundColor"),
    colors: all("svg text, td, dt, figcaption span, p, th").map(element =>
      [element.textContent, color(element, element.closest("svg") ? "fill" : "color")]),
    videos: all("video").map(video => video.getBoundingClientRect().toJSON()),
    cut: all("th").filter(head => head.scrollWidth > head.clientWidth + 1).length,
    curve: color(page.querySelector(".named path"), "stroke"),
  }
}))
</script>"""


def browse(address: str, folder: Path, *options: str) -> str:
    """The page after some seconds of its own time, without the markup's escapes."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=6000", *options, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def luminance(color: str) -> float:
    """Relative luminance of a color such as rgb(1, 2, 3), by WCAG 2."""
    channels = np.array([float(part) for part in re.findall(r"[\d.]+", color)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run", {"suite": "MT10"})
    with directory.stage("ppo", {"seed": 0}, length=100):
        pass
    add_metrics(directory)
    add_evaluations(directory)
    for name in ("before/reach-v3_seed3_goal00_failure", "after/reach-v3_seed3_goal00_success"):
        write_mp4(directory.path / "videos" / f"{name}.mp4", np.zeros((9, 120, 96, 3), np.uint8), 40)
    return directory


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_fits_and_can_be_read(run: RunDirectory, tmp_path: Path, dark: bool) -> None:
    address = write_report(run.path).as_uri()
    frames = "".join(f'<iframe src="{address}" width="{width}" height="900"></iframe>' for width in (360, 1280))
    (tmp_path / "frames.html").write_text(frames + LOOK)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    told = browse((tmp_path / "frames.html").as_uri(), tmp_path, scheme)
    phone, desktop = json.loads(re.search(r"\[\{.*\}\]", told).group())  # type: ignore[union-attr]
    for page, width in ((phone, 360), (desktop, 1280)):
        assert page["needs"] <= page["width"] == width, "only tables move sideways"
        background = luminance(page["page"])
        assert (background < 0.05) == dark
        for text, color in [*page["colors"], ("a curve", page["curve"])]:
            high, low = sorted((luminance(color) + 0.05, background + 0.05), reverse=True)
            assert high / low >= (4.5 if text != "a curve" else 2), (text, color)
        before, after = page["videos"]
        assert before["top"] == after["top"] and after["left"] > before["right"], "side by side"
        assert before["height"] - before["width"] * 120 / 96 > 60, "room for the controls below the picture"
        assert page["cut"] == 0


def test_a_watched_page_reads_itself_again(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(run.path, seconds=1) as server:
        made, asked = server.page.html, []

        def html() -> bytes:
            asked.append(True)
            if len(asked) == 2:  # by the page itself
                run.append_metrics({"stage": "ppo", "time/env_steps": 9000, "env/success_once": 0.77})
            return made()

        monkeypatch.setattr(server.page, "html", html)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        dumped = browse(server.url, tmp_path)
        server.shutdown()
        thread.join()
    assert len(asked) >= 2 and "<dd>77.0 %</dd>" in dumped and "<dd>40.0 %</dd>" not in dumped
    assert re.search(r"<time[^>]*>\d+ s ago</time>", dumped)
