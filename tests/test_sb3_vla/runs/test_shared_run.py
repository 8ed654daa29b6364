"""A run directory of several ranks is written once, and all of them know what stands in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from sb3_vla.runs.directory import RunDirectory, RunError
from sb3_vla.runs.shared import SharedRun


def play(folder: Path, seed: int) -> dict[str, Any]:
    """A stage with a checkpoint and a row of metrics from each rank."""
    run = SharedRun(folder, {"seed": seed})
    with run.stage("ppo", {"seed": seed}, outputs=["result"]) as stage:
        latest = run.latest_checkpoint("ppo")
        if not stage.done:
            with run.checkpoint("ppo", 3) as place:
                if place is not None:
                    (place / "state").write_text("whole")
            run.append_metrics({"step": 3, "rank": run.ranks.rank})
            if run.ranks.leads:
                (folder / "result").write_text("")
    return {"stage": stage, "latest": latest, "wrote": place is not None if not stage.done else None}


def test_one_rank_writes_and_all_know(tmp_path: Path) -> None:
    alone = play(tmp_path / "alone", 0)
    first, second = run_ranks(2, lambda _: play(tmp_path / "shared", 0))
    assert first == alone and second == {**first, "wrote": False}
    shared = RunDirectory(tmp_path / "shared")
    assert shared.metrics() == [{"step": 3, "rank": 0}]
    assert (shared.path / "checkpoints" / "ppo" / "step-00000003" / "state").read_text() == "whole"
    for again in run_ranks(2, lambda _: play(tmp_path / "shared", 0)):
        assert again["stage"].done and again["latest"] == shared.latest_checkpoint("ppo")
    for changed in run_ranks(2, lambda _: play(tmp_path / "shared", 1)):
        assert not changed["stage"].done and not changed["stage"].resumed and changed["latest"] is None


def test_all_raise_what_the_first_does(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def work(rank: int) -> str:
        with pytest.raises(RunError) as caught:
            SharedRun(tmp_path / "file", {})
        return str(caught.value)

    first, second = run_ranks(2, work)
    assert first == second and "is a file; choose another name" in first


def test_a_stage_that_fails_is_not_complete(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        run = SharedRun(tmp_path, {})
        with pytest.raises(KeyError), run.stage("ppo", {}):
            raise KeyError

    run_ranks(2, work)
    assert not RunDirectory(tmp_path).done("ppo")


def test_ranks_that_go_further_and_that_fail_at_once(tmp_path: Path) -> None:
    """What rank 0 looks at to decide it looks at alone, and a stage that made nothing is what it was."""

    def work(_: int) -> list[Any]:
        run = SharedRun(tmp_path, {})
        found: list[Any] = []
        for length, seed in ((1, 0), (2, 0), (2, 1), (2, 0)):
            try:
                with run.stage("ppo", {"seed": seed}, length=length, outputs=["result"]) as stage:
                    found.append((stage.done, stage.resumed))
                    if seed == 1:
                        raise KeyError
                    with run.checkpoint("ppo", length) as place:
                        if place is not None:
                            (place / "state").write_text("whole")
                    if run.ranks.leads:
                        (tmp_path / "result").write_text("")
            except KeyError:
                found.append(KeyError)
            run.ranks.wait()
        return found

    first, second = run_ranks(2, work)
    assert first == second
    assert first == [(False, False), (False, True), (False, False), KeyError, (True, False)]
