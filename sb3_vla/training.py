"""Reinforcement learning as a run: environments, PPO, metrics, checkpoints, going on after an interrupt."""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat

from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.checkpoints.training_state import load_training_state, save_training_state
from sb3_vla.demonstrations import Demonstrations
from sb3_vla.ppo import PPO
from sb3_vla.run import RunDirectory
from sb3_vla.sft import DemonstrationBatches
from sb3_vla.vec_env import SharedMemoryVecEnv


@dataclass
class PPOConfig:
    """Settings of :func:`train_ppo`.

    :param iterations: rollouts, each followed by an update.
    :param num_envs: environments.
    :param num_workers: processes that run them; None for one a core.
    :param decisions: per environment and rollout.
    :param horizon: environment steps per episode.
    :param batch_size: decisions per minibatch.
    :param epochs: passes over a rollout.
    :param learning_rate: the actor's at the start.
    :param final_learning_rate: the actor's at the end; it falls linearly.
    :param value_lr: the critic's at the start; it falls in proportion.
    :param gamma: discount per decision.
    :param gae_lambda: per decision.
    :param clip_range: of the ratio.
    :param clip_range_vf: of the change of a value; None for no clip.
    :param target_kl: divergence at which an update stops.
    :param ent_coef: weight of the entropy bonus.
    :param kl_coef: weight of the divergence from the policy at the start.
    :param max_grad_norm: clip of the gradient's norm.
    :param critic_warmup: rollouts from which the critic alone learns.
    :param actor_warmup: rollouts after those over which the actor's learning rate rises.
    :param trainable: ``all``, or ``expert`` to freeze the model's backbone.
    :param distribution: name of the action distribution.
    :param distribution_kwargs: its options.
    :param final_noise_scale: factor of the exploration noise at the end; it falls linearly from 1.
    :param task_sampling: ``uniform``, or ``signal`` to draw more often what is solved now and then.
    :param rehearsal_coef: weight of the imitation loss on demonstrations; 0 for none.
    :param rehearsal_batch_size: frames of demonstrations per minibatch.
    :param overlap: simulate one half of the environments while the policy decides for the other; pays with a GPU.
    :param bf16: bfloat16 autocast of updates; None where the processor has it.
    :param checkpoint_interval: iterations between checkpoints.
    :param seed: of environments and exploration.
    """

    iterations: int = 60
    num_envs: int = 16
    num_workers: int | None = None
    decisions: int = 128
    horizon: int = 160
    batch_size: int = 512
    epochs: int = 4
    learning_rate: float = 1.2e-4
    final_learning_rate: float = 2e-5
    value_lr: float = 5e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    clip_range_vf: float | None = None
    target_kl: float | None = 0.03
    ent_coef: float = 0.0
    kl_coef: float = 0.0
    max_grad_norm: float = 0.5
    critic_warmup: int = 2
    actor_warmup: int = 5
    trainable: str = "expert"
    distribution: str = "gaussian"
    distribution_kwargs: dict[str, Any] = field(default_factory=lambda: {"std": 0.2, "coherence": "offset"})
    final_noise_scale: float = 0.4
    task_sampling: str = "signal"
    rehearsal_coef: float = 0.0
    rehearsal_batch_size: int = 64
    overlap: bool = False
    bf16: bool | None = False
    checkpoint_interval: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "num_envs", "decisions", "horizon", "batch_size", "epochs", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"ppo.{name}={getattr(self, name)}; expected at least 1")


def train_ppo(
    run: RunDirectory,
    stage: str,
    config: PPOConfig,
    *,
    checkpoint: str | Path,
    output: str | Path,
    suite: str,
    split: str = "train",
    tasks: list[str] | None = None,
    demonstrations: Demonstrations | None = None,
    resume: bool = False,
    progress: bool = True,
    renderer: str = "auto",
) -> None:
    """Improve a checkpoint by PPO in MetaWorld.

    The critic also sees the simulator's state and the time that has passed, which the policy does not. Metrics go to
    the run's ``metrics.jsonl`` and to TensorBoard under ``tensorboard/``.

    :param run: the run directory.
    :param stage: name under which the run keeps the training's own checkpoints.
    :param config: settings.
    :param checkpoint: where to start; its notes tell the view that the model was trained on.
    :param output: folder of the resulting checkpoint.
    :param tasks: which of the suite's tasks to practise; None for all.
    :param demonstrations: for rehearsal.
    :param resume: go on from the stage's last checkpoint, if there is one.
    """
    start = load_checkpoint(checkpoint)
    view = view_of(start.notes)
    env_kwargs = {
        "image_size": start.model.image_size[0],
        "action_chunk": start.model.action_horizon,
        "horizon": config.horizon,
        "tasks": tasks,
        "privileged_state": True,
        "elapsed_time": True,
        "renderer": renderer,
        **view,
    }
    if suite in ("ML10", "ML45"):
        env_kwargs["split"] = split
    if suite == "MT1":
        if tasks is None or len(tasks) != 1:
            raise ValueError(f"MT1 practises one task, got tasks={tasks}; give one, or another suite")
        env_kwargs.update(task=tasks[0], tasks=None)
    rehearsal = None
    if config.rehearsal_coef > 0:
        if demonstrations is None:
            raise ValueError(f"rehearsal_coef={config.rehearsal_coef} needs demonstrations; give data, or set it to 0")
        rehearsal = DemonstrationBatches(demonstrations, None, start.model.action_horizon, shift=4, seed=config.seed)
    rates = [config.final_learning_rate, config.learning_rate]
    make = functools.partial(gym.make, f"mw_envs:MetaWorld{suite}-v0", **env_kwargs)
    env = SharedMemoryVecEnv([make] * config.num_envs, num_workers=config.num_workers)
    try:
        model = PPO(
            "VLAPolicy",
            env,
            learning_rate=lambda remaining: np.interp(remaining, [0, 1], rates).item(),
            value_lr=config.value_lr,
            n_steps=config.decisions,
            batch_size=config.batch_size,
            n_epochs=config.epochs,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip_range,
            clip_range_vf=config.clip_range_vf,
            target_kl=config.target_kl,
            ent_coef=config.ent_coef,
            vf_coef=1.0,
            kl_coef=config.kl_coef,
            max_grad_norm=config.max_grad_norm,
            critic_warmup=config.critic_warmup,
            actor_warmup=config.actor_warmup,
            rehearsal=rehearsal,
            rehearsal_coef=config.rehearsal_coef,
            rehearsal_batch_size=config.rehearsal_batch_size,
            # The limit is a part of the task, and the critic sees how much of it is left.
            bootstrap_truncated=False,
            noise_scale=lambda remaining: np.interp(remaining, [0, 1], [config.final_noise_scale, 1.0]).item(),
            task_sampling=config.task_sampling,
            overlap=config.overlap,
            bf16=config.bf16,
            seed=config.seed,
            policy_kwargs={
                "checkpoint": str(checkpoint),
                "trainable": config.trainable,
                "distribution": config.distribution,
                "distribution_kwargs": config.distribution_kwargs,
                "optimizer_kwargs": {"betas": (0.9, 0.95)},
            },
        )
        latest = run.latest_checkpoint(stage) if resume else None
        if config.kl_coef > 0:  # also after an interrupt it is the policy at the start
            model.anchor()
        if latest is not None:
            _restore(model, latest)
        done = model.num_timesteps
        run.rewind_metrics(lambda row: row.get("stage") != stage or row["time/total_timesteps"] <= done)
        # Other trials after a resume than at the start.
        env.seed(1000 * (config.seed + 1) + done)
        writers: list[KVWriter] = [
            TensorBoardOutputFormat(str(run.path / "tensorboard" / stage)),
            _RunMetrics(run, stage, _seconds_so_far(run, stage)),
        ]
        model.set_logger(Logger(str(run.path), writers))
        per_iteration = config.num_envs * config.decisions
        remaining = config.iterations * per_iteration - done
        with _Progress(run, stage, config, model, progress) as callback:
            if remaining > 0:
                model.learn(remaining, callback, reset_num_timesteps=False)
            callback.save()
    finally:
        env.close()
    notes = {**start.notes, "ppo": {"iterations": config.iterations, "env_steps": model.env_steps, "tasks": tasks}}
    distribution = (config.distribution, config.distribution_kwargs)
    policy = model.policy
    save_checkpoint(output, policy.model, policy.value_head, notes, distribution, policy.distribution)


def view_of(notes: dict[str, Any]) -> dict[str, Any]:
    """Camera and crop that a checkpoint's model was trained on; the full default view if it does not say.

    Where pictures were drawn larger than the model reads them, also the size.
    """
    camera = notes.get("view", {})
    drawn = {"image_size": camera["render_size"]} if "render_size" in camera else {}
    return {"camera": camera.get("camera", "corner2"), "crop": camera.get("crop"), **drawn}


class _RunMetrics(KVWriter):
    """Logged values as rows of the run's ``metrics.jsonl``."""

    def __init__(self, run: RunDirectory, stage: str, seconds_before: float) -> None:
        self.run = run
        self.stage = stage
        self.seconds_before = seconds_before

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        row = {key: value for key, value in key_values.items() if isinstance(value, (int, float))}
        row["time/time_elapsed"] = row.get("time/time_elapsed", 0) + self.seconds_before
        self.run.append_metrics({"stage": self.stage, "time/total_timesteps": step, **row})

    def close(self) -> None: ...


class _Progress(BaseCallback):
    """A progress bar with the success rate, and a checkpoint every few iterations."""

    def __init__(self, run: RunDirectory, stage: str, config: PPOConfig, model: PPO, shown: bool) -> None:
        super().__init__()
        self.run, self.stage, self.config, self.algorithm = run, stage, config, model
        columns = (
            TextColumn("PPO"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
        )
        self.bar = Progress(*columns, disable=not shown)
        self.task = self.bar.add_task("PPO", total=config.iterations, now="")

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        # Called before each rollout, so after each update but the last.
        done = self._iterations_done()
        success = self.algorithm.task_success()
        now = ""
        if success:
            rate = sum(success.values()) / len(success)
            now = f"success while exploring {rate:.0%}  {self.algorithm.env_steps:,} env steps"
        self.bar.update(self.task, completed=done, now=now)
        if done and done % self.config.checkpoint_interval == 0:
            self.save()

    def save(self) -> None:
        """Checkpoint everything that a training needs to go on."""
        model = self.algorithm
        self.bar.update(self.task, completed=self._iterations_done())
        values = {
            "num_timesteps": model.num_timesteps,
            "env_steps": model.env_steps,
            "n_updates": model._n_updates,
            "updates": model.updates,
            "episodes": {task: list(episodes) for task, episodes in model._episodes.items()},
        }
        with self.run.checkpoint(self.stage, self._iterations_done()) as folder:
            save_training_state(folder, {"policy": model.policy}, model.policy.optimizer, values)

    def _iterations_done(self) -> int:
        return self.algorithm.num_timesteps // (self.config.num_envs * self.config.decisions)


def _restore(model: PPO, folder: Path) -> None:
    values = load_training_state(folder, {"policy": model.policy}, model.policy.optimizer)
    model.num_timesteps = values["num_timesteps"]
    model.env_steps = values["env_steps"]
    model._n_updates = values["n_updates"]
    model.updates = values["updates"]
    for task, episodes in values["episodes"].items():
        model._episodes[task] = deque(map(tuple, episodes), maxlen=model._stats_window_size)


def _seconds_so_far(run: RunDirectory, stage: str) -> float:
    rows = [row for row in run.metrics() if row.get("stage") == stage]
    return rows[-1]["time/time_elapsed"] if rows else 0.0
