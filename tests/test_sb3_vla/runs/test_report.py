"""The page about a run: its numbers, that it needs nothing beside itself, and what it says of what is not there."""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from toy import write_mp4

from mw_envs import Trial
from sb3_vla.cli.main import main
from sb3_vla.evaluation.protocols import PROTOCOLS
from sb3_vla.evaluation.published import PUBLISHED
from sb3_vla.evaluation.results import EvaluationResult, TrialResult, compare
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.report.charts import learning_curve, success_chart, svg
from sb3_vla.runs.report.contents import pasteable
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
    assert [cell.split()[0] for cell in page.row("imitation measured here")[1:]] == [
        "50.0",
        "-",
        "0.0",
        "-",
        "25.0",
        "33.3",
    ]
    assert [cell.split()[0] for cell in page.row("PPO measured here")[1:]] == ["62.5", "-", "25.0", "-", "43.8", "50.0"]
    assert [cell.split()[0] for cell in page.row("Mean over tasks")[1:]] == ["33.3", "50.0", "+16.7", "+3,"]
    assert page.row("Mean over tasks")[4] == "+3, -1"
    # The tasks that training saw are reach and push: 1/4 and 0/4 before, 3/4 and 1/4 after.
    assert [cell.split()[0] for cell in page.row("Mean over the 2 tasks")[1:4]] == ["12.5", "50.0", "+37.5"]
    assert [cell.split()[0] for cell in page.row("reach-v3")[1:4]] == ["25.0", "75.0", "+50.0"]
    interval = [100 * limit for limit in result_of(BEFORE).per_difficulty()["easy"][1:]]
    assert page.row("imitation measured here")[1].split()[1:] == [f"{interval[0]:.1f}", "to", f"{interval[1]:.1f}"]
    assert page.row("pi0 + PPO, Flow-SDE")[1:] == ["92.1", "74.6", "61.7", "84.0", "78.1", "-"]
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
        " tr th td small strong p figure figcaption svg defs g title text path use i span details summary pre a img"
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
    command = f"checkpoint={tmp_path} suite=MT50 'tasks=[reach-v3]' output={run.path}/evaluation_before.json"
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


def test_the_command_of_an_evaluation_is_told_when_its_tasks_are_known(tmp_path: Path) -> None:
    model = {"model_path": str(tmp_path)}
    run = RunDirectory(tmp_path / "run", {"actor": {"model": model}, "env": {"train": {"task_suite_name": "other"}}})
    text = Page(write_report(run.path)).text
    assert "evaluation_before.json." in text and "sb3-vla eval checkpoint" not in text
    run.write_json("stages/grpo.json", {"inputs": {"a": 3, "where": {"suite": "ML45", "split": "test", "tasks": None}}})
    (run.path / "grpo").mkdir()
    text = Page(write_report(run.path)).text
    assert f"sb3-vla eval checkpoint={tmp_path} suite=ML45 split=test output={run.path}/evaluation_before.json" in text
    assert f"sb3-vla eval checkpoint={run.path}/grpo suite=ML45 split=test output" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["nowhere"], "there is no run directory nowhere"),
        (["run={empty}"], "is not a run directory: it has none of config.yaml"),
        (["run={run}", "output={run}/config.yaml/page.html"], "config.yaml/page.html: File exists"),
        (["run={run}", "output={run}"], "is a folder; expected the name of a file"),
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


def test_a_curve_goes_through_its_points_in_the_scale_of_its_labels(tmp_path: Path) -> None:
    """Places of points, read back by the places of the axis labels, are the values; minutes stand where they passed."""
    steps, values, seconds = [100.0, 500.0, 1000.0], [0.25, 1.0, 0.5], [30.0, 200.0, 250.0]
    rows = [
        {"time/env_steps": x, "env/success_once": 0.1, "eval/success_once": y, "time/time_elapsed": z}
        for x, y, z in zip(steps, values, seconds, strict=True)
    ]
    source = svg(success_chart([*rows, {"time/env_steps": 2000.0}], "Title"), "what is said")
    labels: dict[str, list[dict[str, float]]] = {}
    for attributes, text in re.findall(r"<text([^>]*)>([^<]*)</text>", source):
        place = {name: float(value) for name, value in re.findall(r' ([xy])="([^"]+)', attributes)}
        labels.setdefault(text, []).append(place)
    (path,) = re.findall(r'<path d="([^"]+)" style="[^"]*stroke: var\(--second\)[^"]*stroke-width: 1.2', source)[:1]
    places = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), np.float64)
    assert len(places) == 3
    top, left = labels["100%"][0]["y"], labels["0"][0]["x"]
    assert 0 < top - places[1, 1] < 6, "a label stands by its height, on a line a little below"
    below = (places[:, 1] - places[1, 1]) / (labels["0%"][0]["y"] - top)
    assert below == pytest.approx([1 - value for value in values], abs=2e-3)
    per_step = (labels["500"][0]["x"] - left) / 500
    assert (places[:, 0] - left) / per_step == pytest.approx(steps, abs=2)
    minutes = {text: place["x"] for text in "01234" for place in labels[text] if place["y"] < top}
    assert sorted(minutes) == list("01234"), "round minutes"
    expected = np.interp([0, 60, 120, 180, 240], [0, *seconds], [0, *steps])
    assert (np.array(list(minutes.values())) - left) / per_step == pytest.approx(expected, abs=2)
    assert "Title" in labels and 'aria-label="what is said"' in source


def test_curves_have_names(tmp_path: Path) -> None:
    tasks = [f"task{number:02d}-v3" for number in range(14)] + ["a $b$ <c>"]
    rows = [
        {"time/env_steps": float(step), "env/success_once": 0.5}
        | {f"env/success_once/{task}": place / 20 for place, task in enumerate(tasks)}
        for step in (1, 2, 3)
    ]
    source = svg(success_chart(rows), "")
    assert re.findall(r"<title>(.*?)</title>", source) == [html.escape(task) for task in sorted(tasks)]
    written = re.findall(r"<text[^>]*>(task\d\d)</text>", source)
    assert written == [f"task{number:02d}" for number in range(12)], "the lowest at their ends"
    heights = re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>task\d\d</text>', source)
    assert np.diff(np.array(heights, np.float64)).max() < -9, "apart enough to be read"
    few = svg(success_chart([{name: value for name, value in row.items() if "task" not in name} for row in rows]), "")
    assert "a $b$ &lt;c&gt;</text>" in few
    learning_curve(rows, tmp_path / "curve.png", title="$x$")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_charts_take_the_colors_of_the_page_in_light_and_dark(run: RunDirectory) -> None:
    source = write_report(run.path).read_text()
    charts = re.findall(r"(?s)<svg.*?</svg>", source)
    assert len(charts) == 3 and not [chart for chart in charts if re.search('#[0-9a-f]{3,6}[^"0-9a-f]', chart)]
    light, dark = (dict(re.findall(r"--(\w+):([^;}]+)", part)) for part in re.findall(r":root\{([^}]+)", source))
    used = set(re.findall(r"var\(--(\w+)", source))
    assert used - {"ratio", "rate"} == set(light) == set(dark) and all(light[name] != dark[name] for name in light)


def test_what_belongs_to_a_trial_stays_together_and_says_how_it_ended(run: RunDirectory) -> None:
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    for name in ("after/door-open-v3_seed3_goal01_success.mp4", "before/door-open-v3_seed3_goal01_failure.mp4"):
        write_mp4(run.path / "videos" / name, frames, fps=40)
    write_mp4(run.path / "videos" / "train" / "iteration-000011_reach-v3_seed9_goal00_failure.mp4", frames, fps=40)
    source = write_report(run.path).read_text()
    said = [
        [
            " ".join(re.sub("<.*?>", " ", caption).split())
            for caption in re.findall("(?s)<figcaption>(.*?)</figcaption>", trial)
        ]
        for trial in re.findall('(?s)<div class="trial(?: one)?">(.*?)</div>', source)
    ]
    assert said == [["before ✕ failure", "after ✓ success"]] * 2 + [["train, iteration 11 ✕ failure"]]
    assert source.count("--ratio:0.667") == 3 and source.count("--ratio:1.000") == 2


def test_the_headline_says_both_means(run: RunDirectory) -> None:
    page = Page(write_report(run.path))
    text = " ".join(page.text.split())
    assert "success, mean over 3 tasks 33.3 → 50.0 %" in text
    assert "success, Avg: mean of the difficulty groups 25.0 → 43.8 %" in text
    (run.path / "evaluation_after.json").rename(run.path / "evaluation_other.json")
    text = " ".join(Page(write_report(run.path)).text.split())
    assert "success before, mean over 3 tasks 33.3 %" in text
    (run.path / "evaluation_before.json").unlink()
    assert "success other, mean over 3 tasks 50.0 %" in " ".join(Page(write_report(run.path)).text.split())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/home/me/.venv/bin/sb3-vla", "train", "a b"], "sb3-vla train 'a b'"),
        (["/src/sb3_vla/__main__.py", "train", "tasks=[reach-v3]"], "sb3-vla train 'tasks=[reach-v3]'"),
        (["examples/quickstart.py", "--run", "x"], "python examples/quickstart.py --run x"),
        (["mine"], "mine"),
        ("as it is", "as it is"),
        (None, ""),
    ],
)
def test_the_command_can_be_pasted(command: object, expected: str) -> None:
    assert pasteable(command) == expected
