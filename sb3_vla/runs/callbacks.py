"""What happens between the iterations of a run: metrics are written, progress is shown, checkpoints are saved."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from sb3_vla.common.progress import progress_bar
from sb3_vla.common.signals import Stopped, StopRequest
from sb3_vla.ppo.ppo import PPO
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.resume import save_algorithm
from sb3_vla.runs.settings import Training

# Of progress where it is not drawn as a bar.
_SECONDS_BETWEEN_LINES = 30.0


class RunMetrics(KVWriter):
    """Logged values as rows of the run's ``metrics.jsonl``."""

    def __init__(self, run: RunDirectory, stage: str, seconds_before: float, algorithm: PPO) -> None:
        self.run = run
        self.stage = stage
        self.seconds_before = seconds_before
        self.algorithm = algorithm

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        row = {key: value for key, value in key_values.items() if isinstance(value, (int, float))}
        row["time/time_elapsed"] = row.get("time/time_elapsed", 0) + self.seconds_before
        row["time/iterations"] = self.algorithm.updates + 1  # Stable-Baselines3 counts from the last start
        self.run.append_metrics({"stage": self.stage, "time/total_timesteps": step, **row})

    def close(self) -> None: ...


class RunProgress(BaseCallback):
    """A progress bar with success rate, pace and time left, and a checkpoint every few iterations."""

    def __init__(
        self, run: RunDirectory, stage: str, training: Training, model: PPO, stop: StopRequest, shown: bool
    ) -> None:
        super().__init__()
        self.run, self.stage, self.settings, self.algorithm, self.stop = run, stage, training, model, stop
        self.unit = training.decisions_per_unit
        self.saved = model.updates
        self.started = self.printed = time.monotonic()
        self.env_steps_before, self.done_before = model.env_steps, self._done()
        self.bar = progress_bar(shown)
        self.task = self.bar.add_task(type(model).__name__, total=training.total_decisions // self.unit, note="")

    def __enter__(self) -> RunProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        # Called before each rollout, so after each update but the last.
        success = self.algorithm.task_success()
        now = ""
        if success:
            rate = sum(success.values()) / len(success)
            now = f"success while exploring {rate:.0%}  {self.algorithm.env_steps:,} env steps{self._pace()}"
        self.bar.update(self.task, completed=self._done(), note=now)
        self._print_line(now)
        updates = self.algorithm.updates
        stopped_by = self.stop.common(self.algorithm.ranks.gather)
        # At the first rollout after an interrupt there is a checkpoint already.
        due = updates % self.settings.checkpoint_interval == 0 or stopped_by is not None
        if updates > self.saved and due:
            self.save()
        if stopped_by is not None:
            raise Stopped(stopped_by)

    def _pace(self) -> str:
        """Environment steps a second since the start, updates included."""
        steps = self.algorithm.env_steps - self.env_steps_before
        return f"  {steps / (time.monotonic() - self.started):,.0f}/s" if steps else ""

    def _print_line(self, now: str) -> None:
        """Where output goes to a file a bar is not drawn, so a line now and then takes its place."""
        moment = time.monotonic()
        if self.bar.disable or self.bar.console.is_terminal or moment - self.printed < _SECONDS_BETWEEN_LINES:
            return
        self.printed = moment
        done, total = self._done(), self.settings.total_decisions // self.unit
        new = done - self.done_before
        left = f"  {timedelta(seconds=round((total - done) * (moment - self.started) / new))} left" if new else ""
        line = f"{type(self.algorithm).__name__} {done}/{total}  {now}{left}"
        self.say(line)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            self.bar.console.print(line, highlight=False, soft_wrap=True)

    def save(self) -> None:
        """Checkpoint everything that a training needs to go on."""
        self.saved = self.algorithm.updates
        self.bar.update(self.task, completed=self._done())
        with self.run.checkpoint(self.stage, self._done(), self.settings.keep_checkpoints) as folder:
            save_algorithm(folder, self.algorithm)

    def _done(self) -> int:
        return self.algorithm.num_timesteps // self.unit
