"""Reinforcement learning as a run: environments, PPO or GRPO, metrics, checkpoints, going on after an interrupt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.type_aliases import Schedule
from torch.utils.tensorboard import SummaryWriter

from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.demonstrations import Demonstrations
from sb3_vla.grpo import GRPO
from sb3_vla.holding import HoldAtEnd
from sb3_vla.ppo import PPO
from sb3_vla.resume import load_algorithm, save_algorithm
from sb3_vla.run import RunDirectory
from sb3_vla.sft import DemonstrationBatches
from sb3_vla.vec_env import SharedMemoryVecEnv

if TYPE_CHECKING:
    from sb3_vla.cluster.seat import Seat


@dataclass
class PPOConfig:
    """PPO for :func:`train`.

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
    :param gamma: discount.
    :param gamma_per: ``decision`` or ``env_step``, what the discount is for.
    :param gae_lambda: per decision.
    :param bootstrap_truncated: take the time limit for an interruption of the task; else it is a part of it, and the
        critic sees how much of it is left.
    :param clip_range: of the ratio.
    :param clip_range_high: of the ratio above one, if it is another.
    :param dual_clip: factor of a negative advantage below which the surrogate does not fall; None for no bound.
    :param clip_range_vf: of the change of a value; None for no clip.
    :param huber_delta: error from which the loss of a value grows linearly; None for the square.
    :param logprob_type: what a ratio is of: ``chunk``, ``action``, ``token`` or ``denoising_step``.
    :param normalize_advantage: over each minibatch.
    :param target_kl: divergence at which an update stops.
    :param ent_coef: weight of the entropy bonus.
    :param kl_coef: weight of the divergence from the policy at the start.
    :param max_grad_norm: clip of the gradient's norm.
    :param critic_warmup: rollouts from which the critic alone learns.
    :param actor_warmup: rollouts after those over which the actor's learning rate rises.
    :param privileged_critic: whether the critic sees the simulator's state.
    :param trainable: ``all``, or ``expert`` to freeze the model's backbone.
    :param distribution: name of the action distribution.
    :param distribution_kwargs: its options.
    :param final_noise_scale: factor of the exploration noise at the end; it falls linearly from 1.
    :param task_sampling: ``uniform``, or ``signal`` to draw more often what is solved now and then.
    :param rehearsal_coef: weight of the imitation loss on demonstrations; 0 for none.
    :param rehearsal_batch_size: frames of demonstrations per minibatch.
    :param overlap: simulate one half of the environments while the policy decides for the other; pays with a GPU.
    :param micro_batch_size: decisions evaluated at a time, where a minibatch does not fit into memory.
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
    gamma_per: str = "decision"
    gae_lambda: float = 0.95
    bootstrap_truncated: bool = False
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    clip_range_vf: float | None = None
    huber_delta: float | None = None
    logprob_type: str = "chunk"
    normalize_advantage: bool = True
    target_kl: float | None = 0.03
    ent_coef: float = 0.0
    kl_coef: float = 0.0
    max_grad_norm: float = 0.5
    critic_warmup: int = 2
    actor_warmup: int = 5
    privileged_critic: bool = True
    trainable: str = "expert"
    distribution: str = "gaussian"
    distribution_kwargs: dict[str, Any] = field(default_factory=lambda: {"std": 0.2, "coherence": "offset"})
    final_noise_scale: float = 0.4
    task_sampling: str = "signal"
    rehearsal_coef: float = 0.0
    rehearsal_batch_size: int = 64
    overlap: bool = False
    micro_batch_size: int | None = None
    bf16: bool | None = False
    checkpoint_interval: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "num_envs", "decisions", "horizon", "batch_size", "epochs", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"ppo.{name}={getattr(self, name)}; expected at least 1")

    @property
    def total_decisions(self) -> int:
        """Decisions of all environments and rollouts."""
        return self.iterations * self.num_envs * self.decisions


@dataclass
class GRPOConfig:
    """GRPO for :func:`train`; what both have is explained at :class:`PPOConfig`, the groups at :class:`GRPO`.

    :param total_decisions: of all rollouts, those of groups that are dropped included.
    :param num_envs: a multiple or a divisor of ``group_size``.
    :param group_size: episodes of one trial.
    :param groups: for an update.
    :param max_groups: played for an update, at most; None for four times ``groups``.
    :param success_bounds: least and greatest share of successes of a group that counts.
    :param advantage_type: ``standardised`` or ``leave_one_out``.
    :param normalize_length: whether each episode weighs the same, instead of each decision.
    :param clip_range_high: how far above one the ratio may go; None for ``clip_range``.
    :param actor_warmup: rollouts over which the learning rate rises.
    :param checkpoint_interval: rollouts between checkpoints.
    """

    total_decisions: int = 120_000
    num_envs: int = 16
    num_workers: int | None = None
    horizon: int = 160
    group_size: int = 8
    groups: int = 12
    max_groups: int | None = None
    success_bounds: tuple[float, float] = (0.0, 1.0)
    advantage_type: str = "standardised"
    normalize_length: bool = True
    batch_size: int = 512
    epochs: int = 4
    learning_rate: float = 1.2e-4
    final_learning_rate: float = 2e-5
    clip_range: float = 0.2
    clip_range_high: float | None = None
    target_kl: float | None = 0.03
    ent_coef: float = 0.0
    kl_coef: float = 0.0
    max_grad_norm: float = 0.5
    actor_warmup: int = 5
    trainable: str = "expert"
    distribution: str = "gaussian"
    distribution_kwargs: dict[str, Any] = field(default_factory=lambda: {"std": 0.2, "coherence": "offset"})
    final_noise_scale: float = 0.4
    task_sampling: str = "signal"
    rehearsal_coef: float = 0.0
    rehearsal_batch_size: int = 64
    bf16: bool | None = False
    checkpoint_interval: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("total_decisions", "num_envs", "horizon", "groups", "batch_size", "epochs", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"grpo.{name}={getattr(self, name)}; expected at least 1")


def train(
    run: RunDirectory,
    stage: str,
    config: PPOConfig | GRPOConfig,
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
    seat: Seat | None = None,
) -> None:
    """Improve a checkpoint by PPO or GRPO in MetaWorld.

    PPO's critic also sees the time that has passed and the simulator's state, which the policy does not. Metrics go to
    the run's ``metrics.jsonl`` and to TensorBoard under ``tensorboard/``.

    :param run: the run directory.
    :param stage: name under which the run keeps the training's own checkpoints.
    :param config: settings, and by their type the algorithm.
    :param checkpoint: where to start; its notes tell the view that the model was trained on.
    :param output: folder of the resulting checkpoint.
    :param tasks: which of the suite's tasks to practise; None for all.
    :param demonstrations: for rehearsal.
    :param resume: go on from the stage's last checkpoint, if there is one, to the same weights and the same metrics
        that a training without an interrupt gives, bit for bit.
    :param seat: where environments and copies of the policy run, by :func:`sb3_vla.cluster.launch.train_on_cluster`;
        None for this machine. The result is the same.
    """
    start = load_checkpoint(checkpoint)
    view = view_of(start.notes)
    env_kwargs = {
        "image_size": start.model.image_size[0],
        "action_chunk": start.model.action_horizon - start.model.first_action,
        "horizon": config.horizon,
        "tasks": tasks,
        # With GRPO it tells that a group's episodes begin alike.
        "privileged_state": isinstance(config, GRPOConfig) or config.privileged_critic,
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
    make = functools.partial(gym.make, f"mw_envs:MetaWorld{suite}-v0", **env_kwargs)
    if isinstance(config, GRPOConfig):
        make = functools.partial(_holding, make)
    if seat is None:
        env = SharedMemoryVecEnv([make] * config.num_envs, num_workers=config.num_workers)
    else:
        env = seat.envs([make] * config.num_envs, config.num_workers)
    try:
        model: PPO
        if isinstance(config, GRPOConfig):
            model = _grpo(config, env, checkpoint, rehearsal)
        else:
            model = _ppo(config, env, checkpoint, rehearsal)
        if seat is not None:
            model.replicas = seat.replicas(model.policy)
        if config.kl_coef > 0:  # also after an interrupt it is the policy at the start
            model.anchor()
        logger = Logger(str(run.path), [])
        model.set_logger(logger)
        env.seed(1000 * (config.seed + 1))
        latest = run.latest_checkpoint(stage) if resume else None
        if latest is not None:
            load_algorithm(latest, model)
        done = model.num_timesteps
        run.rewind_metrics(lambda row: row.get("stage") != stage or row["time/total_timesteps"] <= done)
        logger.output_formats += [
            _TensorBoard(str(run.path / "tensorboard" / stage), first_step=done + 1),
            _RunMetrics(run, stage, _seconds_so_far(run, stage), model),
        ]
        remaining = config.total_decisions - done
        if remaining > 0:
            with _Progress(run, stage, config, model, progress) as callback:
                model.learn(remaining, callback, reset_num_timesteps=False)
                callback.save()
    finally:
        env.close()
        if seat is not None:
            seat.leave()
    practice = {"decisions": model.num_timesteps, "env_steps": model.env_steps, "tasks": tasks}
    notes = {**start.notes, type(model).__name__.lower(): practice}
    distribution = (config.distribution, config.distribution_kwargs)
    policy = model.policy
    critic = None if isinstance(config, GRPOConfig) else policy.value_head  # GRPO leaves it behind the actor
    save_checkpoint(output, policy.model, critic, notes, distribution, policy.distribution)


def _holding(make: Callable[[], gym.Env]) -> gym.Env:
    return HoldAtEnd(make())


def _ppo(
    config: PPOConfig, env: SharedMemoryVecEnv, checkpoint: str | Path, rehearsal: DemonstrationBatches | None
) -> PPO:
    return PPO(
        "VLAPolicy",
        env,
        learning_rate=_linear(config.learning_rate, config.final_learning_rate),
        value_lr=config.value_lr,
        n_steps=config.decisions,
        batch_size=config.batch_size,
        n_epochs=config.epochs,
        gamma=config.gamma,
        gamma_per=config.gamma_per,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        clip_range_high=config.clip_range_high,
        dual_clip=config.dual_clip,
        clip_range_vf=config.clip_range_vf,
        huber_delta=config.huber_delta,
        logprob_type=config.logprob_type,
        normalize_advantage=config.normalize_advantage,
        micro_batch_size=config.micro_batch_size,
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
        bootstrap_truncated=config.bootstrap_truncated,
        noise_scale=_linear(1.0, config.final_noise_scale),
        task_sampling=config.task_sampling,
        overlap=config.overlap,
        bf16=config.bf16,
        seed=config.seed,
        policy_kwargs=_policy_kwargs(config, checkpoint),
    )


def _grpo(
    config: GRPOConfig, env: SharedMemoryVecEnv, checkpoint: str | Path, rehearsal: DemonstrationBatches | None
) -> GRPO:
    return GRPO(
        "VLAPolicy",
        env,
        learning_rate=_linear(config.learning_rate, config.final_learning_rate),
        batch_size=config.batch_size,
        n_epochs=config.epochs,
        clip_range=config.clip_range,
        clip_range_high=config.clip_range_high,
        target_kl=config.target_kl,
        ent_coef=config.ent_coef,
        kl_coef=config.kl_coef,
        max_grad_norm=config.max_grad_norm,
        group_size=config.group_size,
        n_groups=config.groups,
        max_groups=config.max_groups,
        success_bounds=config.success_bounds,
        advantage_type=config.advantage_type,
        normalize_length=config.normalize_length,
        actor_warmup=config.actor_warmup,
        rehearsal=rehearsal,
        rehearsal_coef=config.rehearsal_coef,
        rehearsal_batch_size=config.rehearsal_batch_size,
        noise_scale=_linear(1.0, config.final_noise_scale),
        task_sampling=config.task_sampling,
        bf16=config.bf16,
        seed=config.seed,
        policy_kwargs=_policy_kwargs(config, checkpoint),
    )


def _linear(first: float, last: float) -> Schedule:
    return lambda remaining: np.interp(remaining, [0, 1], [last, first]).item()


def _policy_kwargs(config: PPOConfig | GRPOConfig, checkpoint: str | Path) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint),
        "trainable": config.trainable,
        "distribution": config.distribution,
        "distribution_kwargs": config.distribution_kwargs,
        "optimizer_kwargs": {"betas": (0.9, 0.95)},
    }


def view_of(notes: dict[str, Any]) -> dict[str, Any]:
    """Camera and crop that a checkpoint's model was trained on; the full default view if it does not say.

    Where pictures were drawn larger than the model reads them, also the size.
    """
    camera = notes.get("view", {})
    drawn = {"image_size": camera["render_size"]} if "render_size" in camera else {}
    return {"camera": camera.get("camera", "corner2"), "crop": camera.get("crop"), **drawn}


class _TensorBoard(TensorBoardOutputFormat):
    """Values for TensorBoard, which hides what was written from ``first_step`` on before an interrupt."""

    def __init__(self, folder: str, first_step: int) -> None:
        super().__init__(folder)
        self.writer.close()
        self.writer = SummaryWriter(folder, purge_step=first_step)


class _RunMetrics(KVWriter):
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


class _Progress(BaseCallback):
    """A progress bar with the success rate, and a checkpoint every few iterations."""

    def __init__(self, run: RunDirectory, stage: str, config: PPOConfig | GRPOConfig, model: PPO, shown: bool) -> None:
        super().__init__()
        self.run, self.stage, self.config, self.algorithm = run, stage, config, model
        # A rollout of GRPO has as many decisions as its episodes happen to need.
        self.unit = config.num_envs * config.decisions if isinstance(config, PPOConfig) else 1
        self.saved = model.updates
        columns = (
            TextColumn(type(model).__name__),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
        )
        self.bar = Progress(*columns, disable=not shown)
        self.task = self.bar.add_task("", total=config.total_decisions // self.unit, now="")

    def __enter__(self) -> _Progress:
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
            now = f"success while exploring {rate:.0%}  {self.algorithm.env_steps:,} env steps"
        self.bar.update(self.task, completed=self._done(), now=now)
        updates = self.algorithm.updates
        # At the first rollout after an interrupt there is a checkpoint already.
        if updates > self.saved and updates % self.config.checkpoint_interval == 0:
            self.save()

    def save(self) -> None:
        """Checkpoint everything that a training needs to go on."""
        self.saved = self.algorithm.updates
        self.bar.update(self.task, completed=self._done())
        with self.run.checkpoint(self.stage, self._done()) as folder:
            save_algorithm(folder, self.algorithm)

    def _done(self) -> int:
        return self.algorithm.num_timesteps // self.unit


def _seconds_so_far(run: RunDirectory, stage: str) -> float:
    rows = [row for row in run.metrics() if row.get("stage") == stage]
    return rows[-1]["time/time_elapsed"] if rows else 0.0
