"""Evaluation in the course of a training: the same trials every few updates, and the best policy so far kept.

It takes nothing from the training: the policy acts by its mode, in environments of its own, and the process's random
generators are put back.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_vla.common.errors import InputError
from sb3_vla.common.files import read_json
from sb3_vla.common.precision import acting_precision
from sb3_vla.distributed.ranks import generators, set_generators
from sb3_vla.evaluation.evaluation import check_fit, evaluate
from sb3_vla.evaluation.protocols import TRIAL_SEED, Protocol, find_protocol
from sb3_vla.evaluation.results import EvaluationResult
from sb3_vla.evaluation.trial_envs import VideoOptions
from sb3_vla.rollouts.metrics import EpisodeRecord, episode_metrics, in_terminal

#: name of the metric by which the best policy is chosen: the success rate, averaged over tasks
SCORE = "eval/success_once"


@dataclass(frozen=True)
class PeriodicEvaluation:
    """How a policy is measured while it learns; see :func:`sb3_vla.evaluation.evaluate` for what is not explained here.

    :param every: updates between evaluations; there is one more at the end of the training.
    :param tasks: task names; give either these or a suite.
    :param suite: ``MT10``, ``MT50``, ``ML10`` or ``ML45``.
    :param split: ``train`` or ``test``.
    :param trials_per_task: trials of each task, the same every time.
    :param trial_seed: seed of the trials.
    :param protocol: a name in :data:`sb3_vla.evaluation.protocols.PROTOCOLS`, or a protocol.
    :param num_envs: environments side by side; None for eight a process.
    :param num_workers: processes; None for one a core. They last as long as an evaluation.
    :param renderer: ``auto``, ``software``, ``egl`` or ``osmesa``.
    :param videos: films the first trials of each task, in the place of those of the evaluation before; None for none.
    :raises ValueError: if ``every`` is less than 1.
    """

    every: int
    tasks: Sequence[str] | None = None
    suite: str | None = None
    split: str = "train"
    trials_per_task: int = 10
    trial_seed: int = TRIAL_SEED
    protocol: str | Protocol = "rlinf-160"
    num_envs: int | None = None
    num_workers: int | None = None
    renderer: str = "auto"
    videos: VideoOptions | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"every={self.every} updates between evaluations; expected at least 1")

    def measured(self) -> dict[str, Any]:
        """What two results must have in common to be compared, in JSON types."""
        tasks = None if self.tasks is None else list(self.tasks)
        trials = {"tasks": tasks, "suite": self.suite, "split": self.split, "trials_per_task": self.trials_per_task}
        return {**trials, "trial_seed": self.trial_seed, "protocol": dataclasses.asdict(find_protocol(self.protocol))}


class EvaluatePeriodically(BaseCallback):
    """Measures the policy, logs ``eval/...`` and ``time/eval``, and keeps the best one as a checkpoint.

    What is measured after an update is logged with the rollout that follows, as the update itself is.

    :param evaluation: when and how.
    :param env_kwargs: what the policy sees in training: image, camera, crop, and what is for its critic.
    :param best: folder of the best policy's checkpoint. Its notes have the score as ``evaluation``; where it is of the
        same trials, only a better policy takes its place, so a training that goes on keeps it.
    :param save: writes the present policy to a folder, with these notes besides the usual ones; all ranks call it.
    :param resumed: whether a checkpoint in ``best`` is of this training.
    :param say: told of each result.
    """

    model: Any

    def __init__(
        self,
        evaluation: PeriodicEvaluation,
        env_kwargs: Mapping[str, Any],
        best: Path,
        save: Callable[[Path, dict[str, Any]], None],
        *,
        resumed: bool,
        say: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.evaluation, self.best, self.save, self.resumed, self.say = evaluation, best, save, resumed, say
        self.env_kwargs = {**env_kwargs, "renderer": evaluation.renderer}
        self.best_score: float | None = None
        self._evaluated = 0

    def _on_training_start(self) -> None:
        check_fit(self.model.policy, self.evaluation.protocol, self.env_kwargs)
        self._evaluated = 0
        self.best_score = self.model.ranks.first_does(self._known_best) if self.resumed else None

    def _on_rollout_start(self) -> None:
        updates = self.model.updates
        if updates > self._evaluated and updates % self.evaluation.every == 0:
            for name, value in self.measure().items():
                self.logger.record(name, value, exclude=None if in_terminal(name) else "stdout")

    def _on_training_end(self) -> None:
        if self.model.updates > self._evaluated:
            elapsed = int((time.time_ns() - self.model.start_time) / 1e9)
            row = {**self.measure(), "time/time_elapsed": elapsed, "time/env_steps": self.model.env_steps}
            for writer in self.logger.output_formats:
                writer.write(row, {name: () for name in row}, self.model.num_timesteps)

    def _on_step(self) -> bool:
        return True

    def measure(self) -> dict[str, float]:
        """Evaluate the present policy, and keep it if it is the best."""
        started, how = time.monotonic(), self.evaluation
        with _undisturbed(), acting_precision(self.model.bf16, self.model.device.type):
            result = evaluate(
                self.model.policy,
                tasks=how.tasks,
                suite=how.suite,
                split=how.split,
                trials_per_task=how.trials_per_task,
                trial_seed=how.trial_seed,
                protocol=how.protocol,
                num_envs=how.num_envs,
                num_workers=how.num_workers,
                env_kwargs=self.env_kwargs,
                deterministic=True,
                videos=how.videos,
                progress=False,
            )
            self._evaluated = self.model.updates
            metrics = _metrics(result)
            score = metrics[SCORE]
            if self.best_score is None or score > self.best_score:
                self.best_score = score
                notes = {"success_once": score, "updates": self.model.updates, "measured": how.measured()}
                self.save(self.best, {"evaluation": notes})
        self.say(f"after {self.model.updates} updates: success {score:.1%}, best so far {self.best_score:.1%}")
        return {**metrics, "time/eval": time.monotonic() - started}

    def _known_best(self) -> float | None:
        """Score of the checkpoint that is there, if it is of the same trials."""
        try:
            notes = read_json(self.best / "config.json")["notes"]["evaluation"]
            same = notes["measured"] == json.loads(json.dumps(self.evaluation.measured()))
            return float(notes["success_once"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # there is none, or it says nothing


def _metrics(result: EvaluationResult) -> dict[str, float]:
    """By RLinf's names, as of the episodes of a training; the return is that of one reward, for success."""
    episodes: dict[str, list[EpisodeRecord]] = {}
    for outcome in result.trials:
        success = float(outcome.success)
        episodes.setdefault(outcome.trial.task, []).append(EpisodeRecord(success, outcome.length, success))
    return episode_metrics(episodes, len(result.trials), "eval")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever happens in this context, random numbers go on behind it as if it had not been."""
    state = generators()
    try:
        yield
    finally:
        set_generators(state)
