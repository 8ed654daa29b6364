"""docs/results: a row's file holds what an evaluation found, and the tables are written from such files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from mw_envs import suite_tasks
from sb3_vla.evaluation.evaluation import trials_for
from sb3_vla.evaluation.protocols import PROTOCOLS
from sb3_vla.evaluation.results import EvaluationResult, TrialResult, compare


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    file = Path(__file__).parents[3] / "docs" / "results" / "tables.py"
    spec = importlib.util.spec_from_file_location("results_tables", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "results_tables", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def result(every: int) -> EvaluationResult:
    """Each trial but every n-th succeeds."""
    trials = trials_for(suite_tasks("MT50"), 3)
    outcomes = tuple(TrialResult(trial, i % every != 0, None, 160, i % every != 0) for i, trial in enumerate(trials))
    return EvaluationResult(PROTOCOLS["rlinf-160"], outcomes, {"mujoco": "3.3.0"}, {"image_size": 96})


def test_rows_are_read_back_and_tables_written(tables: Any, tmp_path: Path) -> None:
    made = {"title": "Ours", "commit": "abc", "commands": ["sb3-vla sft"], "machine": "two cores"}
    for name, every, given in (("one", 3, {}), ("two", 4, {"title": "Ours, PPO", "before": "one", "order": 1.0})):
        result(every).to_json(tmp_path / "evaluation.txt")
        tables.add(name, tmp_path / "evaluation.txt", {**made, **given})
    rows = {name: tables.Row(**tables.json.loads((tmp_path / f"{name}.json").read_text())) for name in ("one", "two")}
    assert rows["one"].result().successes == result(3).successes
    assert len((tmp_path / "one.json").read_text()) < 5000
    tables.write()
    text = (tmp_path / "results.md").read_text()
    average = 100 * result(4).average().value
    gain = 100 * compare(result(3), result(4)).average().difference.value
    assert f"**{average:.1f} (" in text and f"| {gain:+.1f} (" in text
    assert "pi0 + PPO, Flow-SDE" in text and "sb3-vla sft" in text and "| reach-v3 |" in text
    assert (tmp_path / "mt50.png").stat().st_size > 10_000


def test_a_row_says_how_it_was_made(tables: Any, tmp_path: Path) -> None:
    result(3).to_json(tmp_path / "evaluation.txt")
    with pytest.raises(SystemExit, match=r"commit=\.\.\. is missing"):
        tables.add("one", tmp_path / "evaluation.txt", {"title": "Ours"})
