"""The page about a run: its numbers, that it needs nothing beside itself, and what it says of what is not there."""

from __future__ import annotations

import base64
import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mw_envs import Trial
from sb3_vla.cli.main import main
from sb3_vla.evaluation.published import PUBLISHED
from sb3_vla.evaluation.results import PROTOCOLS, EvaluationResult, TrialResult, compare
from sb3_vla.recording.videos import write_mp4
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.report.charts import Line, line_chart
from sb3_vla.runs.report.report import write_report

VOID = {"meta", "img", "br"}
EVIL = "<script>alert('1')</script>&\"'"
BEFORE = {"reach-v3": [0, 0, 1, 0], "push-v3": [0, 0, 0, 0], "door-open-v3": [1, 1, 0, 1]}
AFTER = {"reach-v3": [1, 1, 1, 0], "push-v3": [0, 1, 0, 0], "door-open-v3": [1, 0, 0, 1]}


class Page(HTMLParser):
    """A page as a reader has it: rows of the tables, all text, attributes; fails where tags do not close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], "these tags are never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes out of order at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} "
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += f"{data} "

    def row(self, heading: str) -> list[str]:
        """The cells of the first row whose heading begins like this."""
        rows = ([" ".join(cell.split()) for cell in row] for row in self.rows)
        return next(row for row in rows if row and row[0].startswith(heading))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def result_of(successes: dict[str, list[int]]) -> EvaluationResult:
    outcomes = tuple(
        TrialResult(Trial(task, 3, goal), bool(success), 50 if success else None, 50 if success else 160, bool(success))
        for task, values in successes.items()
        for goal, success in enumerate(values)
    )
    return EvaluationResult(PROTOCOLS["rlinf-160"], outcomes, {"mujoco": "3.3.0"}, {"image_size": 96})


def add_evaluations(run: RunDirectory) -> None:
    before, after = result_of(BEFORE), result_of(AFTER)
    before.to_json(run.path / "evaluation_before.json")
    after.to_json(run.path / "evaluation_after.json")
    compare(before, after, ("imitation", "PPO")).to_json(run.path / "comparison.json")


def add_metrics(run: RunDirectory) -> None:
    for step in range(1, 9):
        tasks = {"env/success_once/reach-v3": step / 10, "env/success_once/push-v3": 0.0}
        row = {"stage": "ppo", "time/env_steps": 1000 * step, "time/time_elapsed": 30.0 * step, "actor/approx_kl": 0.01}
        run.append_metrics(row if step == 1 else {**row, "env/success_once": step / 20, **tasks})


def add_videos(run: RunDirectory) -> list[Path]:
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    names = ["before/reach-v3_seed3_goal00_failure.mp4", "after/reach-v3_seed3_goal00_success.mp4"]
    for name in names:
        write_mp4(run.path / "videos" / name, frames, fps=40)
    return [run.path / "videos" / name for name in names]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that is complete."""
    directory = RunDirectory(tmp_path / "run", {"suite": "MT10", "checkpoint": "checkpoints/sft"})
    with directory.stage("ppo", {"seed": 0}):
        pass
    add_metrics(directory)
    add_evaluations(directory)
    add_videos(directory)
    return directory


def test_the_numbers_are_those_of_the_evaluations(run: RunDirectory) -> None:
    assert main(["report", str(run.path)]) == 0
    page = Page(run.path / "report.html")
    # By hand: easy is the mean of reach 1/4 and door-open 3/4 before, 3/4 and 2/4 after; hard is push, 0/4 and 1/4.
    assert [cell.split()[0] for cell in page.row("imitation measured here")[1:]] == ["50.0", "-", "0.0", "-", "25.0"]
    assert [cell.split()[0] for cell in page.row("PPO measured here")[1:]] == ["62.5", "-", "25.0", "-", "43.8"]
    assert [cell.split()[0] for cell in page.row("Mean over tasks")[1:]] == ["33.3", "50.0", "+16.7", "+3,"]
    assert page.row("Mean over tasks")[4] == "+3, -1"
    # The tasks that training saw are reach and push: 1/4 and 0/4 before, 3/4 and 1/4 after.
    assert [cell.split()[0] for cell in page.row("Mean over the 2 tasks")[1:4]] == ["12.5", "50.0", "+37.5"]
    assert [cell.split()[0] for cell in page.row("reach-v3")[1:4]] == ["25.0", "75.0", "+50.0"]
    interval = [100 * limit for limit in result_of(BEFORE).per_difficulty()["easy"][1:]]
    assert page.row("imitation measured here")[1].split()[1:] == [f"{interval[0]:.1f}", "to", f"{interval[1]:.1f}"]
    assert page.row("pi0 + PPO, Flow-SDE")[1:] == ["92.1", "74.6", "61.7", "84.0", "78.1"]
    assert "published" in page.row("pi0 SFT")[0] and "measured" not in page.row("pi0 SFT")[0]
    assert "the levels cannot be compared" in page.text
    assert "What is missing" not in page.text
    for part in (
        "Success while training, ppo",
        "solved by PPO only (3)",
        "solved by imitation only (1)",
        "checkpoints/sft",
    ):
        assert part in page.text, part


def test_the_page_needs_nothing_beside_itself(run: RunDirectory, tmp_path: Path) -> None:
    videos = sorted((run.path / "videos").rglob("*.mp4"))
    page = Page(write_report(run.path, tmp_path / "elsewhere" / "page.html"))
    assert page.all("script") == page.all("link") == page.all("a") == []
    films = [film["src"].removeprefix("data:video/mp4;base64,") for film in page.all("video")]
    assert sorted(map(base64.b64decode, films)) == sorted(path.read_bytes() for path in videos)
    assert all(film["poster"].startswith("data:image/jpeg;base64,") for film in page.all("video"))
    assert all(picture.get("aria-label") and picture["role"] == "img" for picture in page.all("svg"))
    assert all("url(" not in value for _, attributes in page.tags for value in attributes.values())
    source = (tmp_path / "elsewhere" / "page.html").read_text()
    assert "http://" not in source and "https://" not in source
    assert "default-src 'none'" in next(tag["content"] for tag in page.all("meta") if "http-equiv" in tag)


def test_videos_beyond_the_limit_are_linked(run: RunDirectory, tmp_path: Path) -> None:
    videos = sorted((run.path / "videos").rglob("*.mp4"))
    one = max(path.stat().st_size for path in videos) / 1e6
    page = Page(write_report(run.path, tmp_path / "out" / "page.html", embed_mb=1.5 * one))
    assert len(page.all("video")) == 1
    (link,) = page.all("a")
    # Before comes before after, so that is the one in the page.
    assert (tmp_path / "out" / link["href"]).resolve() == videos[0].resolve()
    assert "after" in str(videos[0]) and "1 of 2 videos are linked" in page.text


def test_whatever_stands_in_the_files_is_text(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a<b>&", {"suite": EVIL})
    run.write_json(
        "versions.json", {"command": [EVIL], "packages": {EVIL: EVIL}, "git": {"revision": EVIL}, "python": 3}
    )
    run.write_json(f"stages/{EVIL.replace('/', '')}.json", {"complete": True, "finished": EVIL})
    add_evaluations(run)
    run.write_json("comparison.json", {"names": [EVIL, "PPO"]})
    for step in (1, 2, 3):
        row = {"stage": EVIL, "time/env_steps": step, "env/success_once": 0.5, f"env/success_once/{EVIL}": 0.5}
        run.append_metrics({**row, "actor/loss": EVIL, EVIL: step})
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    write_mp4(run.path / "videos" / "x\"onerror='y" / "<b>.mp4", frames, 40)
    (run.path / "videos" / "broken<b>.mp4").write_bytes(b"no video")
    page = Page(write_report(run.path, embed_mb=0))
    allowed = (
        "html head meta title style body main header h1 h2 h3 dl div dt dd section ul li table caption thead tbody"
    )
    allowed += (
        " tr th td small strong p figure figcaption svg line text rect path polyline i span details summary pre a img"
    )
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert EVIL in page.text and "cannot be read" in page.text
    (link,) = page.all("a")
    assert link["href"] == "videos/x%22onerror%3D%27y/%3Cb%3E.mp4"


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", {"checkpoint": str(tmp_path), "suite": "MT1", "tasks": ["reach-v3"]})
    page = Page(write_report(run.path))
    assert "metrics.jsonl has no row yet" in page.text and "none has begun" in page.text
    command = (
        f"checkpoint={tmp_path} suite=MT50 'tasks=['\"'\"'reach-v3'\"'\"']' output={run.path}/evaluation_before.json"
    )
    assert command in page.text
    with pytest.raises(KeyboardInterrupt), run.stage("ppo", {"seed": 0}):
        with run.checkpoint("ppo", 35):
            pass
        raise KeyboardInterrupt
    add_metrics(run)
    result_of(BEFORE).to_json(run.path / "evaluation_before.json")
    (run.path / "evaluation_after.json").write_text('{"format": ')
    page = Page(write_report(run.path))
    assert "stage 'ppo': it is not complete, its last checkpoint is step-00000035" in page.text
    assert "evaluation_after.json, which cannot be read" in page.text
    assert "Success while training" in page.text and page.row("before measured here")[5].startswith("25.0")
    dataclasses.replace(result_of(AFTER), protocol=PROTOCOLS["rlinf-100"]).to_json(run.path / "evaluation_after.json")
    assert "A comparison needs one protocol" in Page(write_report(run.path)).text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["nowhere"], "there is no run directory nowhere"),
        (["run={empty}"], "is not a run directory: it has none of config.yaml"),
        (["run={run}", "output={run}/config.yaml/page.html"], "cannot write the report"),
        (["run={run}", "output={run}"], "choose a file with output=..."),
        (["{run}", "embed_mb=-1"], "embed_mb=-1.0; expected 0"),
        (["{run}", "outptu=x"], "did you mean 'output'"),
    ],
)
def test_bad_input_is_told_in_one_message(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"run": str(RunDirectory(tmp_path / "run", {}).path), "empty": str(tmp_path / "empty")}
    (tmp_path / "empty").mkdir()
    assert main(["report", *(setting.format_map(places) for setting in settings)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("error:") and message in told, told
    there = sorted(path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".lock"))
    assert there == ["config.yaml", "versions.json"]


def test_published_averages_are_the_means_of_their_groups() -> None:
    assert len(PUBLISHED) == 9
    for row in PUBLISHED:
        assert row.average == pytest.approx(np.mean(row.rates), abs=0.051), row.method


def test_a_line_goes_through_its_points_in_the_scale_of_its_labels(tmp_path: Path) -> None:
    """Places of points, read back by the places of the axis labels, are the values."""
    x, y = np.array([0.0, 50.0, 100.0, np.nan]), np.array([0.0, 0.25, 1.0, 0.5])
    (tmp_path / "chart.html").write_text(line_chart([Line(x, y)], "Title", "steps", percent=True))
    page = Page(tmp_path / "chart.html")
    grid = sorted(float(line["y1"]) for line in page.all("line"))
    (points,) = [line["points"] for line in page.all("polyline")]
    places = np.array([[float(part) for part in point.split(",")] for point in points.split()])
    assert (grid[-1] - places[:, 1]) / (grid[-1] - grid[0]) == pytest.approx([0, 0.25, 1], abs=1e-3)
    across = [float(line[end]) for line in page.all("line")[:1] for end in ("x1", "x2")]
    assert (places[:, 0] - across[0]) / (across[1] - across[0]) == pytest.approx([0, 0.5, 1], abs=1e-3)
    assert page.text.split()[:3] == ["Title", "0", "%"]
