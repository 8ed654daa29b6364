"""Reinforcement learning as a run: environments, PPO or GRPO, metrics, checkpoints, going on after an interrupt."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv

from mw_envs.rendering import get_renderer
from mw_envs.tasks import did_you_mean, select_tasks
from sb3_vla.checkpoints import LoadedCheckpoint, load_checkpoint, save_checkpoint
from sb3_vla.checkpoints.native import refuse_other_files
from sb3_vla.checkpoints.training_state import check_training_state
from sb3_vla.common.errors import InputError
from sb3_vla.common.machine import available_memory
from sb3_vla.common.paths import local_path
from sb3_vla.common.precision import get_device, uses_bf16
from sb3_vla.common.signals import Stopped, StopRequest, stop_request
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.data.demonstrations import Demonstrations
from sb3_vla.distributed.fsdp import whole_weights
from sb3_vla.distributed.ranks import join_for_good, ranks_on_this_machine
from sb3_vla.distributions import make_distribution
from sb3_vla.envs.hold_at_end import HoldAtEnd
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv
from sb3_vla.evaluation.callback import EvaluatePeriodically, PeriodicEvaluation
from sb3_vla.grpo.grpo import GRPO, groups_held
from sb3_vla.models import VLAModel
from sb3_vla.models.lora import prepare_training
from sb3_vla.policies.value_head import ValueHead
from sb3_vla.policies.views import (
    FULL_VIEW,
    HAND_OPTIONS,
    hand_options,
    known_view,
    settled_view,
    view_of,
    warn_of_another_view,
)
from sb3_vla.policies.vla_policy import VLAPolicy
from sb3_vla.ppo.options import check_batch_size
from sb3_vla.ppo.ppo import PPO
from sb3_vla.recording.episodes import Filmed, FilmEpisodes, TrainingFilms
from sb3_vla.rollouts.buffers import ChunkRolloutBuffer
from sb3_vla.rollouts.stepping import Replicas
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.loggers import LoggerOptions, Loggers
from sb3_vla.runs.memory_plan import MemoryPlan, plan_memory
from sb3_vla.runs.resume import load_algorithm, save_algorithm
from sb3_vla.runs.shared import SharedRun
from sb3_vla.sft.imitation import SFTConfig

# Of progress where it is not drawn as a bar.
_SECONDS_BETWEEN_LINES = 30.0
# What the environments show to the critic alone, in numbers; and the width of that critic.
_PRIVILEGED, _ELAPSED, _VALUE_WIDTH = 39, 1, 256


def _constant(first: float, _: float) -> Schedule:
    return lambda _: first


def _linear(first: float, last: float) -> Schedule:
    return lambda remaining: np.interp(remaining, [0, 1], [last, first]).item()


def _cosine(first: float, last: float) -> Schedule:
    return lambda remaining: last + (first - last) * (1 + math.cos(math.pi * (1 - remaining))) / 2


#: how a learning rate goes from its first to its last value, in terms of the share of a training that remains
LR_SCHEDULERS: dict[str, Callable[[float, float], Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


class LearnerResources(Protocol):
    """Where environments and copies of the policy of one learner run, if not in its process."""

    def envs(self, env_fns: Sequence[Callable[[], gym.Env]], num_workers: int | None) -> VecEnv:
        """Environments."""

    def replicas(self, policy: VLAPolicy) -> Replicas:
        """Copies of a policy."""

    def leave(self) -> None:
        """End the copies."""


@dataclass
class TrainingConfig:
    """What PPO and GRPO have in common for :func:`train`.

    A field named as an argument of the algorithm's constructor is given to it, see there; so :meth:`arguments` is the
    one place where names differ.

    :param num_envs: environments.
    :param num_workers: processes that run them; None for one a core.
    :param horizon: environment steps per episode.
    :param batch_size: decisions per minibatch.
    :param epochs: passes over a rollout.
    :param learning_rate: the actor's at the start.
    :param lr_scheduler: how it goes from there to ``final_learning_rate``: ``constant`` not at all, ``linear``, or
        ``cosine`` by half a period of a cosine. As every schedule of Stable-Baselines3's it is read after a rollout, at
        the share of the training that has been played by then.
    :param final_learning_rate: the actor's at the end, without effect on ``constant``.
    :param clip_range: of the ratio.
    :param clip_range_high: of the ratio above one, if it is another.
    :param dual_clip: factor of a negative advantage below which the surrogate does not fall; None for no bound.
    :param logprob_type: what a ratio is of: ``chunk``, ``action``, ``token`` or ``denoising_step``.
    :param target_kl: divergence at which an update stops.
    :param ent_coef: weight of the entropy bonus.
    :param kl_coef: weight of the divergence from the policy at the start.
    :param max_grad_norm: clip of the gradient's norm.
    :param actor_warmup: rollouts over which the actor's learning rate rises.
    :param trainable: ``all``, ``expert`` to freeze the model's backbone, ``adaptive`` or ``lora``.
    :param lora: options of adapters, see :class:`sb3_vla.models.lora.LoRA`; None for none, or with
        ``trainable=lora`` for the defaults.
    :param frozen_bf16: a frozen backbone's weights in bfloat16.
    :param gradient_checkpointing: layers compute again what the backward pass needs, for less memory.
    :param compile: arguments of ``torch.compile``, ``{}`` for its defaults; None for no compilation.
    :param cache_perception: whether a rollout keeps what a frozen backbone perceived, so that an update costs no more
        than the expert; None for the model's default.
    :param device: ``cpu``, ``cuda`` or ``auto``.
    :param distribution: name of the action distribution.
    :param distribution_kwargs: its options.
    :param final_noise_scale: factor of the exploration noise at the end; it falls linearly from 1.
    :param task_sampling: ``uniform``, or ``signal`` to draw more often what is solved now and then.
    :param rehearsal_coef: weight of the imitation loss on demonstrations; 0 for none.
    :param rehearsal_batch_size: frames of demonstrations per minibatch.
    :param micro_batch_size: decisions evaluated at a time, where a minibatch does not fit into memory.
    :param bf16: bfloat16 autocast of updates, and of rollouts on a GPU; None where the processor has it.
    :param sharding: ``none``; or ``fsdp``: under ``torchrun`` each rank has a part of what is trained.
    :param checkpoint_interval: rollouts between checkpoints.
    :param keep_checkpoints: newest checkpoints of the training's state that stay; None for all.
    :param seed: of environments and exploration.
    """

    algorithm: ClassVar[type[PPO]]
    _at_least_one: ClassVar[tuple[str, ...]] = ("num_envs", "horizon", "batch_size", "epochs", "checkpoint_interval")
    #: see :func:`sb3_vla.common.config.deciding_settings`
    INCIDENTAL: ClassVar[tuple[str, ...]] = (
        *("num_workers", "device", "gradient_checkpointing", "compile", "cache_perception", "micro_batch_size"),
        *("sharding", "checkpoint_interval", "keep_checkpoints"),
    )

    num_envs: int = 16
    num_workers: int | None = None
    horizon: int = 160
    batch_size: int = 512
    epochs: int = 4
    learning_rate: float = 1.2e-4
    lr_scheduler: str = "linear"
    final_learning_rate: float = 2e-5
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    logprob_type: str = "chunk"
    target_kl: float | None = 0.03
    ent_coef: float = 0.0
    kl_coef: float = 0.0
    max_grad_norm: float = 0.5
    actor_warmup: int = 5
    trainable: str = "expert"
    lora: dict[str, Any] | None = None
    frozen_bf16: bool = False
    gradient_checkpointing: bool = False
    compile: dict[str, Any] | None = None
    cache_perception: bool | None = None
    device: str = "auto"
    distribution: str = "gaussian"
    distribution_kwargs: dict[str, Any] = field(default_factory=lambda: {"std": 0.2, "coherence": "offset"})
    final_noise_scale: float = 0.4
    task_sampling: str = "signal"
    rehearsal_coef: float = 0.0
    rehearsal_batch_size: int = 64
    micro_batch_size: int | None = None
    bf16: bool | None = False
    sharding: str = "none"
    checkpoint_interval: int = 5
    keep_checkpoints: int | None = 2
    seed: int = 0

    def __post_init__(self) -> None:
        section = self.algorithm.__name__.lower()
        for name in self._at_least_one:
            if getattr(self, name) < 1:
                raise InputError(f"{section}.{name}={getattr(self, name)}; expected at least 1")
        if self.lr_scheduler not in LR_SCHEDULERS:
            known = did_you_mean(self.lr_scheduler, LR_SCHEDULERS)
            raise InputError(f"Unknown {section}.lr_scheduler={self.lr_scheduler!r}; {known}")
        if self.keep_checkpoints is not None and self.keep_checkpoints < 1:
            raise InputError(
                f"{section}.keep_checkpoints={self.keep_checkpoints}; expected at least 1, or null for all"
            )

    def arguments(self) -> dict[str, Any]:
        """Arguments of the algorithm's constructor, without those that are made from more than this configuration."""
        names = inspect.signature(self.algorithm).parameters
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name in names} | {
            "learning_rate": LR_SCHEDULERS[self.lr_scheduler](self.learning_rate, self.final_learning_rate),
            "n_epochs": self.epochs,
            "noise_scale": _linear(1.0, self.final_noise_scale),
        }


@dataclass
class PPOConfig(TrainingConfig):
    """PPO for :func:`train`; what GRPO has too is explained at :class:`TrainingConfig`.

    :param iterations: rollouts, each followed by an update.
    :param decisions: per environment and rollout.
    :param value_lr: the critic's learning rate at the start; it falls in proportion to the actor's.
    :param gamma: discount.
    :param gamma_per: ``decision`` or ``env_step``, what the discount is for.
    :param gae_lambda: per decision.
    :param bootstrap_truncated: take the time limit for an interruption of the task; else it is a part of it, and the
        critic sees how much of it is left.
    :param clip_range_vf: of the change of a value; None for no clip.
    :param huber_delta: error from which the loss of a value grows linearly; None for the square.
    :param normalize_advantage: over each minibatch.
    :param critic_warmup: rollouts from which the critic alone learns; ``actor_warmup`` counts those after them.
    :param privileged_critic: whether the critic sees the simulator's state.
    :param overlap: simulate one half of the environments while the policy decides for the other; pays with a GPU.
    """

    algorithm: ClassVar[type[PPO]] = PPO
    _at_least_one: ClassVar[tuple[str, ...]] = (*TrainingConfig._at_least_one, "iterations", "decisions")
    INCIDENTAL: ClassVar[tuple[str, ...]] = (*TrainingConfig.INCIDENTAL, "iterations")

    iterations: int = 60
    decisions: int = 128
    value_lr: float = 5e-4
    gamma: float = 0.99
    gamma_per: str = "decision"
    gae_lambda: float = 0.95
    bootstrap_truncated: bool = False
    clip_range_vf: float | None = None
    huber_delta: float | None = None
    normalize_advantage: bool = True
    critic_warmup: int = 2
    privileged_critic: bool = True
    overlap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch_size(self.batch_size, self.decisions, self.num_envs)  # before a run begins, not in its middle

    @property
    def total_decisions(self) -> int:
        """Decisions of all environments and rollouts."""
        return self.iterations * self.num_envs * self.decisions

    def arguments(self) -> dict[str, Any]:
        """See :meth:`TrainingConfig.arguments`."""
        return super().arguments() | {"n_steps": self.decisions, "vf_coef": 1.0}


@dataclass
class GRPOConfig(TrainingConfig):
    """GRPO for :func:`train`; what PPO has too is explained at :class:`TrainingConfig`, the groups at :class:`GRPO`.

    ``num_envs`` is a multiple or a divisor of ``group_size``.

    :param total_decisions: of all rollouts, those of groups that are dropped included.
    :param group_size: episodes of one trial.
    :param groups: for an update.
    :param max_groups: played for an update, at most; None for four times ``groups``.
    :param success_bounds: least and greatest share of successes of a group that counts.
    :param episode_return: ``reward``, or ``success`` for 1 or 0.
    :param advantage_type: ``standardised`` or ``leave_one_out``.
    :param normalize_length: whether each episode weighs the same, instead of each decision.
    """

    algorithm: ClassVar[type[PPO]] = GRPO
    _at_least_one: ClassVar[tuple[str, ...]] = (*TrainingConfig._at_least_one, "total_decisions", "groups")
    INCIDENTAL: ClassVar[tuple[str, ...]] = (*TrainingConfig.INCIDENTAL, "total_decisions")

    total_decisions: int = 120_000
    group_size: int = 8
    groups: int = 12
    max_groups: int | None = None
    success_bounds: tuple[float, float] = (0.0, 1.0)
    episode_return: str = "reward"
    advantage_type: str = "standardised"
    normalize_length: bool = True

    def arguments(self) -> dict[str, Any]:
        """See :meth:`TrainingConfig.arguments`."""
        return super().arguments() | {"n_groups": self.groups}


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
    env_kwargs: Mapping[str, Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    loggers: LoggerOptions | None = None,
    evaluation: PeriodicEvaluation | None = None,
    films: TrainingFilms | None = None,
    resources: LearnerResources | None = None,
) -> None:
    """Improve a checkpoint by PPO or GRPO in MetaWorld; under ``torchrun`` on all ranks, which share the environments.

    PPO's critic also sees the time that has passed and the simulator's state, which the policy does not. Metrics go to
    the run's ``metrics.jsonl`` and to ``loggers``. After SIGINT (Ctrl-C) or SIGTERM the iteration that is under way is
    finished and a checkpoint written; a second signal ends it at once.

    :param run: the run directory.
    :param stage: name under which the run keeps the training's own checkpoints.
    :param config: settings, and by their type the algorithm.
    :param checkpoint: where to start; its notes tell the view that the model was trained on, and where they do not,
        ``env_kwargs`` should have ``camera`` and ``crop``.
    :param output: folder of the resulting checkpoint.
    :param tasks: which of the suite's tasks to practise; None for all.
    :param demonstrations: for rehearsal; their pictures are shifted as far as the checkpoint's notes say that imitation
        did, or by the default of :class:`~sb3_vla.sft.SFTConfig`.
    :param resume: go on from the stage's last checkpoint, if there is one, to the same weights and the same metrics
        that a training without an interrupt gives, bit for bit.
    :param env_kwargs: options of the environments that differ, such as ``reward``, or ``action_chunk`` where fewer
        actions are executed than the model predicts.
    :param model_kwargs: what a published checkpoint does not say, see :func:`sb3_vla.checkpoints.load_checkpoint`.
    :param optimizer_kwargs: options of AdamW; None for Adam with betas (0.9, 0.95).
    :param loggers: None for TensorBoard alone, under the run's ``tensorboard/``.
    :param evaluation: measures the policy now and then, and keeps the best as a checkpoint in the run's
        ``checkpoints/STAGE/best``; what is learned stays the same. None for no evaluation.
    :param films: films episodes of the first environment; what is learned stays the same. None for no films.
    :param resources: where environments and copies of the policy run, by :func:`sb3_vla.ray.launch.train_on_cluster`;
        None for this machine. The result is the same.
    :raises Stopped: after a signal.
    """
    ranks = join_for_good()
    if ranks.count > 1 and not isinstance(run, SharedRun):
        raise InputError(f"{run.path} is written by {ranks.count} ranks; give them a sb3_vla.runs.shared.SharedRun")
    refuse_other_files(local_path(output).resolve())  # before the work
    start = load_checkpoint(checkpoint, model_kwargs, weights=False)  # the policy reads them
    said, given = start.notes.get("view", {}), dict(env_kwargs or {})
    view = settled_view(checkpoint, said, {key: given[key] for key in FULL_VIEW if key in given}) or FULL_VIEW
    options = _env_options(start, config, suite, split, tasks, {"renderer": renderer, **given, **view})
    # What imitation did to the pictures: others would teach what the model has not seen.
    shift = start.notes.get("sft", {}).get("shift", SFTConfig.shift)
    rehearsal = _rehearsal(config, demonstrations, start.model.action_horizon, shift, view)
    make = functools.partial(gym.make, f"mw_envs:MetaWorld{suite}-v0", **options)
    if resources is None:
        _refuse_early(make, options["renderer"])
    policy_kwargs = {**_policy_kwargs(config, checkpoint, model_kwargs, optimizer_kwargs), "view": view}
    if isinstance(config, GRPOConfig):
        make = functools.partial(_holding, make)
    device = get_device(config.device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        plan = plan_training(start.model, config, action_chunk=options["action_chunk"], ranks=ranks.count)
        plan.check(free, available_memory() // ranks_on_this_machine())
    notes = start.notes
    del start  # of its model the sizes are known now, and the plan has changed it
    own = ranks.share(config.num_envs, "num_envs")
    makers: list[Callable[[], gym.Env]] = [make] * len(own)
    if ranks.leads:
        makers = _with_films(makers, films, evaluation)
    if resources is None:
        env: VecEnv = SharedMemoryVecEnv(makers, num_workers=config.num_workers)
    else:
        env = resources.envs(makers, config.num_workers)
    try:
        model = config.algorithm(
            "VLAPolicy", env, rehearsal=rehearsal, policy_kwargs=policy_kwargs, **config.arguments()
        )
        if resources is not None:
            model.replicas = resources.replicas(model.policy)
        if config.kl_coef > 0:  # also after an interrupt it is the policy at the start
            model.anchor()
        seen = {**said, **model.policy.notes["view"]}
        save = functools.partial(_save_policy, model, config, {**notes, "view": seen}, tasks)
        logger = Logger(str(run.path), [])
        model.set_logger(logger)
        env.seed(1000 * (config.seed + 1) + own.start)
        latest = run.latest_checkpoint(stage, check_training_state) if resume else None
        if latest is not None:
            load_algorithm(latest, model)
        done = model.num_timesteps
        run.rewind_metrics(lambda row: row.get("stage") != stage or row["time/total_timesteps"] <= done)
        remaining = config.total_decisions - done
        if remaining > 0:
            with (
                ExitStack() as tracked,
                stop_request() as stop,
                _Progress(run, stage, config, model, stop, progress and ranks.leads) as callback,
            ):
                callbacks: list[BaseCallback] = [callback]
                if ranks.leads:
                    opened = tracked.enter_context(Loggers(loggers or LoggerOptions(), run, stage, done + 1))
                    callbacks += opened.callbacks
                    seconds = _seconds_so_far(run, stage)
                    logger.output_formats += [*opened.writers, _RunMetrics(run, stage, seconds, model)]
                    callbacks += [] if films is None else [FilmEpisodes(films)]
                if evaluation is not None:  # behind the checkpoint, from which a training goes on to the same
                    shown, best = _seen(options), run.path / "checkpoints" / stage / "best"
                    callbacks.append(
                        EvaluatePeriodically(evaluation, shown, best, save, resumed=resume, say=callback.say)
                    )
                model.learn(remaining, callbacks, reset_num_timesteps=False)
                callback.save()
    finally:
        env.close()
        if resources is not None:
            resources.leave()
    save(local_path(output), {})


def _rehearsal(
    config: PPOConfig | GRPOConfig,
    demonstrations: Demonstrations | None,
    horizon: int,
    shift: int,
    view: Mapping[str, Any],
) -> DemonstrationBatches | None:
    """Batches of what is rehearsed, if anything is.

    :param view: of what is practised.
    """
    if config.rehearsal_coef <= 0:
        return None
    if demonstrations is None:
        raise InputError(f"rehearsal_coef={config.rehearsal_coef} needs demonstrations; give data, or set it to 0")
    rehearsed = known_view(demonstrations.camera)
    if rehearsed is not None:
        warn_of_another_view(rehearsed, view, "The demonstrations for rehearsal show")
    return DemonstrationBatches(demonstrations, None, horizon, shift, config.seed)


def _save_policy(
    algorithm: PPO,
    config: PPOConfig | GRPOConfig,
    notes: Mapping[str, Any],
    tasks: list[str] | None,
    folder: Path,
    further: Mapping[str, Any],
) -> None:
    """Write a policy as a checkpoint; all ranks must call it.

    :param notes: of the checkpoint at the start.
    :param further: notes besides these and what was practised.
    """
    practice = {"decisions": algorithm.num_timesteps, "env_steps": algorithm.env_steps, "tasks": tasks}
    notes = {**notes, type(algorithm).__name__.lower(): practice, **further}
    distribution = (config.distribution, config.distribution_kwargs)
    policy = algorithm.policy
    critic = None if isinstance(config, GRPOConfig) else policy.value_head  # GRPO leaves it behind the actor
    with whole_weights(policy):
        if algorithm.ranks.leads:
            save_checkpoint(folder, policy.model, critic, notes, distribution, policy.distribution)


def plan_training(
    model: VLAModel, config: PPOConfig | GRPOConfig, *, action_chunk: int | None = None, ranks: int = 1
) -> MemoryPlan:
    """What a training will take of each rank's memory, see :func:`sb3_vla.runs.memory_plan.plan_memory`.

    It is planned for a GPU, also on a machine without one, unless ``config.device`` is ``cpu``.

    :param model: the checkpoint's, or one of the same sizes on the meta device; it gets the adapters and the types of
        the training, and is not to be trained afterwards.
    :param action_chunk: actions executed per decision; None for all that the model predicts.
    :param ranks: which share environments and minibatches, and with ``sharding=fsdp`` what is trained.
    """
    lora = {} if config.lora is None and config.trainable == "lora" else config.lora
    prepare_training(model, config.trainable, lora=lora, frozen_bf16=config.frozen_bf16)
    chunk = action_chunk or model.action_horizon - model.first_action
    envs = -(-config.num_envs // ranks)
    with torch.device("meta"):
        distribution = make_distribution(config.distribution, model, chunk, **config.distribution_kwargs)
        critic_only = _ELAPSED + (_PRIVILEGED if _sees_state(config) else 0)
        critic = ValueHead(model.feature_dim, critic_only, _VALUE_WIDTH).requires_grad_(config.algorithm.has_critic)
    noted = critic_only * torch.float32.itemsize
    if isinstance(config, GRPOConfig):
        held = groups_held(config.groups, config.max_groups, config.group_size, envs, ranks)
        decisions = -(-held * config.group_size * -(-config.horizon // chunk) // envs)
    else:
        decisions = config.decisions
        noted += ChunkRolloutBuffer.bytes_of_numbers
    cached = model.caches_perception if config.cache_perception is None else config.cache_perception
    return plan_memory(
        model,
        trainable=config.trainable,
        batch_size=config.micro_batch_size or -(-config.batch_size // ranks),
        bf16=uses_bf16(config.bf16, "cpu" if config.device == "cpu" else "cuda"),
        gradient_checkpointing=config.gradient_checkpointing,
        world_size=ranks if config.sharding == "fsdp" else 1,
        num_envs=envs,
        decisions=decisions,
        cache_perception=cached and config.trainable != "all" and lora is None,
        denoisings=distribution.denoisings,
        distribution=distribution,
        critic=critic,
        noted=noted,
        copies=int(config.kl_coef > 0),
    )


def _sees_state(config: PPOConfig | GRPOConfig) -> bool:
    return isinstance(config, GRPOConfig) or config.privileged_critic


def _env_options(
    start: LoadedCheckpoint,
    config: PPOConfig | GRPOConfig,
    suite: str,
    split: str,
    tasks: list[str] | None,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of :func:`gymnasium.make` for environments that fit a checkpoint."""
    options: dict[str, Any] = {
        "image_size": start.model.image_size[0],
        "action_chunk": start.model.action_horizon - start.model.first_action,
        "horizon": config.horizon,
        "tasks": tasks,
        # With GRPO it tells that a group's episodes begin alike.
        "privileged_state": _sees_state(config),
        "elapsed_time": True,
        **hand_options(start.model),
        **view_of(start.notes),
        **further,
    }
    chosen = select_tasks(suite, split, tasks)  # says what is wrong before there are workers
    if suite in ("ML10", "ML45"):
        options["split"] = split
    if suite == "MT1":
        options.update(task=chosen[0], tasks=None)
    return options


def _refuse_early(make: Callable[[], gym.Env], renderer: str) -> None:
    """What cannot be had is told in one line here, and by a traceback in a worker."""
    make().close()
    if renderer != "auto":
        get_renderer(renderer)


def _seen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of environments those that say what a policy sees."""
    names = ("image_size", "camera", "crop", "privileged_state", "elapsed_time", *HAND_OPTIONS)
    return {name: options[name] for name in names if name in options}


def _with_films(
    makers: list[Callable[[], gym.Env]], films: TrainingFilms | None, evaluation: PeriodicEvaluation | None
) -> list[Callable[[], gym.Env]]:
    """Of a training's environments the first is one that can be filmed; folders of films are made."""
    if evaluation is not None and evaluation.videos is not None:
        evaluation.videos.prepare()
    if films is None:
        return makers
    films.prepare()
    return [functools.partial(_filmed, makers[0], films), *makers[1:]]


def _filmed(make: Callable[[], gym.Env], films: TrainingFilms) -> gym.Env:
    env = make()
    # GRPO's, which stands still after an episode, stays outermost: what stands still is no episode.
    return HoldAtEnd(Filmed(env.env, films)) if isinstance(env, HoldAtEnd) else Filmed(env, films)


def _holding(make: Callable[[], gym.Env]) -> gym.Env:
    return HoldAtEnd(make())


def _policy_kwargs(
    config: PPOConfig | GRPOConfig,
    checkpoint: str | Path,
    model_kwargs: Mapping[str, Any] | None,
    optimizer_kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    optimizer: dict[str, Any] = {"optimizer_kwargs": {"betas": (0.9, 0.95)}}
    if optimizer_kwargs is not None:
        optimizer = {"optimizer_class": torch.optim.AdamW, "optimizer_kwargs": dict(optimizer_kwargs)}
    return {
        "checkpoint": str(checkpoint),
        "model_kwargs": dict(model_kwargs or {}) or None,
        "trainable": config.trainable,
        "lora": config.lora,
        "frozen_bf16": config.frozen_bf16,
        "gradient_checkpointing": config.gradient_checkpointing,
        "compile": config.compile,
        "cache_perception": config.cache_perception,
        "distribution": config.distribution,
        "distribution_kwargs": config.distribution_kwargs,
        **optimizer,
    }


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
    """A progress bar with success rate, pace and time left, and a checkpoint every few iterations."""

    def __init__(
        self, run: RunDirectory, stage: str, config: PPOConfig | GRPOConfig, model: PPO, stop: StopRequest, shown: bool
    ) -> None:
        super().__init__()
        self.run, self.stage, self.config, self.algorithm, self.stop = run, stage, config, model, stop
        # A rollout of GRPO has as many decisions as its episodes happen to need.
        self.unit = config.num_envs * config.decisions if isinstance(config, PPOConfig) else 1
        self.saved = model.updates
        self.started = self.printed = time.monotonic()
        self.env_steps_before, self.done_before = model.env_steps, self._done()
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
            now = f"success while exploring {rate:.0%}  {self.algorithm.env_steps:,} env steps{self._pace()}"
        self.bar.update(self.task, completed=self._done(), now=now)
        self._print_line(now)
        updates = self.algorithm.updates
        stopped_by = self.stop.common(self.algorithm.ranks.gather)
        # At the first rollout after an interrupt there is a checkpoint already.
        due = updates % self.config.checkpoint_interval == 0 or stopped_by is not None
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
        done, total = self._done(), self.config.total_decisions // self.unit
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
        with self.run.checkpoint(self.stage, self._done(), self.config.keep_checkpoints) as folder:
            save_algorithm(folder, self.algorithm)

    def _done(self) -> int:
        return self.algorithm.num_timesteps // self.unit


def _seconds_so_far(run: RunDirectory, stage: str) -> float:
    rows = [row for row in run.metrics() if row.get("stage") == stage]
    return rows[-1]["time/time_elapsed"] if rows else 0.0
