"""Evaluation in the course of a training: it disturbs nothing, is logged, and keeps the best."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from toy import tiny_model, toy_vec
from trainings import ppo

from mw_envs import Trial
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.evaluation import callback as periodic
from sb3_vla.evaluation.callback import PeriodicEvaluation
from sb3_vla.evaluation.protocols import TRIAL_SEED, find_protocol
from sb3_vla.evaluation.results import EvaluationResult, TrialResult
from sb3_vla.runs import training
from sb3_vla.runs.directory import RunDirectory

TASKS = ("drawer-close-v3", "reach-v3")
#: successes of eight trials, evaluation by evaluation: the third is the best, and the fourth as good
SUCCESSES = {2: 3, 4: 2, 6: 5, 7: 5}


class Interrupt(Exception):
    pass


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in toy environments, which no evaluation's fit."""

    def make(makers: list[Any], num_workers: int | None) -> DummyVecEnv:
        return toy_vec(len(makers), horizon=4, chunk=5, action_dim=4, privileged=True)

    monkeypatch.setattr(training, "SharedMemoryVecEnv", make)
    monkeypatch.setattr(periodic, "check_fit", lambda *_: {})


def result(successes: int) -> EvaluationResult:
    trials = [
        TrialResult(Trial(TASKS[i // 4], TRIAL_SEED, i % 4), i < successes, None, 10 + i, i < successes)
        for i in range(8)
    ]
    return EvaluationResult(find_protocol("rlinf-160"), tuple(trials), {}, {}, True)


def train(folder: Path, evaluation: PeriodicEvaluation | None, **changes: Any) -> None:
    config = ppo(
        iterations=7, num_envs=2, n_steps=4, batch_size=8, n_epochs=1, checkpoint_interval=3, critic_warmup=0, **changes
    )
    if not (folder.parent / "start").exists():
        torch.manual_seed(0)
        save_checkpoint(folder.parent / "start", tiny_model(action_horizon=5))
    run = RunDirectory(folder, {})
    places = {"checkpoint": folder.parent / "start", "output": folder / "ppo"}
    training.train(run, "ppo", config, **places, suite="MT10", resume=True, progress=False, evaluation=evaluation)


def evaluating(monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> list[int]:
    """Replace the evaluation; numbers of the updates after which it was called."""
    called: list[int] = []
    real = periodic.EvaluatePeriodically.measure

    def measure(self: periodic.EvaluatePeriodically) -> dict[str, float]:
        updates = self.model.updates
        if updates == fails_at:
            raise Interrupt
        called.append(updates)

        def evaluate(policy: Any, **options: Any) -> EvaluationResult:
            torch.rand(3), np.random.rand(3), random.random()
            assert options["deterministic"] and options["env_kwargs"]["privileged_state"]
            return result(SUCCESSES[updates])

        monkeypatch.setattr(periodic, "evaluate", evaluate)
        return real(self)

    monkeypatch.setattr(periodic.EvaluatePeriodically, "measure", measure)
    return called


HOW = PeriodicEvaluation(2, tasks=TASKS, trials_per_task=4)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_it_changes_nothing_is_logged_and_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "without", None)
    called = evaluating(monkeypatch)
    train(tmp_path / "with", HOW)
    assert called == [2, 4, 6, 7]
    assert weights(tmp_path / "with" / "ppo") == weights(tmp_path / "without" / "ppo")
    best = tmp_path / "with" / "checkpoints" / "ppo" / "best"
    notes = load_checkpoint(best).notes
    assert (notes["evaluation"]["success_once"], notes["evaluation"]["updates"]) == (0.625, 6)
    assert notes["ppo"]["decisions"] == 6 * 8
    assert weights(best) != weights(tmp_path / "with" / "ppo")
    rows = [row for row in RunDirectory(tmp_path / "with").metrics() if "eval/success_once" in row]
    assert [row["time/iterations"] for row in rows] == [3, 5, 7, 8]  # with the rollout that follows
    assert [row["eval/success_once"] for row in rows] == [SUCCESSES[updates] / 8 for updates in called]
    assert (rows[2]["eval/success_once/drawer-close-v3"], rows[2]["eval/success_once/reach-v3"]) == (1.0, 0.25)
    assert (rows[2]["eval/episode_len"], rows[2]["eval/return"], rows[2]["eval/num_trajectories"]) == (13.5, 0.625, 8)
    assert all(row["time/eval"] >= 0 for row in rows)


def test_it_acts_in_the_precision_of_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def deciding(*how: Any) -> contextlib.AbstractContextManager[None]:
        asked.append(how)
        return contextlib.nullcontext()

    monkeypatch.setattr(periodic, "acting_precision", deciding)
    evaluating(monkeypatch)
    train(tmp_path / "run", HOW, bf16=True, device="cpu")
    assert asked == [(True, "cpu")] * 4


def test_a_training_that_goes_on_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        evaluating(patch, fails_at=7)
        with pytest.raises(Interrupt):
            train(tmp_path / "run", HOW)
    best = tmp_path / "run" / "checkpoints" / "ppo" / "best"
    before = weights(best)
    monkeypatch.setitem(SUCCESSES, 7, 4)
    called = evaluating(monkeypatch)
    train(tmp_path / "run", HOW)
    assert called == [6, 7]  # from the state after the sixth
    assert weights(best) == before and load_checkpoint(best).notes["evaluation"]["updates"] == 6
    assert [row["time/iterations"] for row in RunDirectory(tmp_path / "run").metrics()] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_best_of_other_trials_is_not_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        evaluating(patch, fails_at=7)
        with pytest.raises(Interrupt):
            train(tmp_path / "run", HOW)
    monkeypatch.setitem(SUCCESSES, 6, 1)
    monkeypatch.setitem(SUCCESSES, 7, 2)
    evaluating(monkeypatch)
    train(tmp_path / "run", PeriodicEvaluation(2, tasks=TASKS, trials_per_task=4, trial_seed=5))
    config = json.loads((tmp_path / "run" / "checkpoints" / "ppo" / "best" / "config.json").read_text())
    assert config["notes"]["evaluation"]["success_once"] == 0.25


def test_a_policy_that_does_not_fit_is_found_out_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(
        training, "SharedMemoryVecEnv", lambda makers, num_workers: toy_vec(2, chunk=5, action_dim=4, privileged=True)
    )
    monkeypatch.setattr(training.PPO, "collect_rollouts", functools.partial(pytest.fail, "it began"))
    with pytest.raises(ValueError, match="Unknown evaluation protocol 'rlinf-161'"):
        train(tmp_path / "run", PeriodicEvaluation(2, suite="MT10", protocol="rlinf-161"))


def test_at_least_every_update() -> None:
    with pytest.raises(ValueError, match=r"every=0 updates between evaluations; expected at least 1"):
        PeriodicEvaluation(0, suite="MT10")
