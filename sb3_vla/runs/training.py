"""Reinforcement learning as a run: environments, PPO or GRPO, metrics, checkpoints, going on after an interrupt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from mw_envs.machine import available_memory
from mw_envs.rendering import get_renderer
from mw_envs.tasks import select_tasks
from sb3_vla.checkpoints import LoadedCheckpoint, load_checkpoint, save_checkpoint
from sb3_vla.checkpoints.native import refuse_other_files
from sb3_vla.checkpoints.training_state import check_training_state
from sb3_vla.common.errors import InputError
from sb3_vla.common.paths import local_path
from sb3_vla.common.precision import get_device, uses_bf16
from sb3_vla.common.signals import stop_request
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.data.demonstrations import Demonstrations
from sb3_vla.distributed.fsdp import whole_weights
from sb3_vla.distributed.ranks import join_for_good, ranks_on_this_machine
from sb3_vla.distributions import make_distribution
from sb3_vla.envs.hold_at_end import HoldAtEnd
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv
from sb3_vla.evaluation.callback import EvaluatePeriodically, PeriodicEvaluation
from sb3_vla.grpo.grpo import groups_held
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
from sb3_vla.ppo.ppo import PPO
from sb3_vla.recording.episodes import Filmed, FilmEpisodes, TrainingFilms
from sb3_vla.rollouts.buffers import ChunkRolloutBuffer
from sb3_vla.rollouts.stepping import Replicas
from sb3_vla.runs.callbacks import RunMetrics, RunProgress
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.loggers import LoggerOptions, Loggers
from sb3_vla.runs.memory_plan import MemoryPlan, plan_memory
from sb3_vla.runs.resume import load_algorithm
from sb3_vla.runs.settings import Training
from sb3_vla.runs.shared import SharedRun
from sb3_vla.sft.settings import SFTConfig

# What the environments show to the critic alone, in numbers; and the width of that critic.
_PRIVILEGED, _ELAPSED, _VALUE_WIDTH = 39, 1, 256
# The critic sees the simulator's state; to GRPO it tells that a group's episodes begin alike.
_ENV_DEFAULTS: dict[str, Any] = {"horizon": 160, "privileged_state": True}


class LearnerResources(Protocol):
    """Where environments and copies of the policy of one learner run, if not in its process."""

    def envs(self, env_fns: Sequence[Callable[[], gym.Env]], num_workers: int | None) -> VecEnv:
        """Environments."""

    def replicas(self, policy: VLAPolicy) -> Replicas:
        """Copies of a policy."""

    def leave(self) -> None:
        """End the copies."""


def train(
    run: RunDirectory,
    stage: str,
    training: Training,
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
    model_kwargs: Mapping[str, Any] | None = None,
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
    :param training: the algorithm, the arguments of the constructors, and how long it goes on.
    :param checkpoint: where to start; its notes tell the view that the model was trained on, and where they do not,
        ``training.env`` should have ``camera`` and ``crop``.
    :param output: folder of the resulting checkpoint.
    :param tasks: which of the suite's tasks to practice; None for all.
    :param demonstrations: for rehearsal; their pictures are shifted as far as the checkpoint's notes say that imitation
        did, or by the default of :class:`~sb3_vla.sft.SFTConfig`.
    :param resume: go on from the stage's last checkpoint, if there is one, to the same weights and the same metrics
        that a training without an interrupt gives, bit for bit.
    :param model_kwargs: what a published checkpoint does not say, see :func:`sb3_vla.checkpoints.load_checkpoint`.
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
    said, given = start.notes.get("view", {}), training.env
    view = settled_view(checkpoint, said, {key: given[key] for key in FULL_VIEW if key in given}) or FULL_VIEW
    options = _env_options(start, suite, split, tasks, {"renderer": renderer, **given, **view})
    # What imitation did to the pictures: others would teach what the model has not seen.
    shift = start.notes.get("sft", {}).get("shift", SFTConfig.shift)
    rehearsal = _rehearsal(training, demonstrations, start.model.action_horizon, shift, view)
    make = functools.partial(gym.make, f"mw_envs:MetaWorld{suite}-v0", **options)
    if resources is None:
        _refuse_early(make, options["renderer"])
    policy_kwargs = {
        "optimizer_class": torch.optim.AdamW,
        **training.policy,
        "checkpoint": str(checkpoint),
        "model_kwargs": dict(model_kwargs or {}) or None,
        "view": view,
    }
    if not training.algorithm.has_critic:
        make = functools.partial(_holding, make)
    device = get_device(training.arguments.get("device", "auto"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        plan = plan_training(start.model, training, action_chunk=options["action_chunk"], ranks=ranks.count)
        plan.check(free, available_memory() // ranks_on_this_machine())
    notes = start.notes
    del start  # of its model the sizes are known now, and the plan has changed it
    own = ranks.share(training.num_envs, "num_envs")
    makers: list[Callable[[], gym.Env]] = [make] * len(own)
    if ranks.leads:
        makers = _with_films(makers, films, evaluation)
    if resources is None:
        env: VecEnv = SharedMemoryVecEnv(makers, num_workers=training.num_workers)
    else:
        env = resources.envs(makers, training.num_workers)
    try:
        model = training.algorithm(
            "VLAPolicy", env, rehearsal=rehearsal, policy_kwargs=policy_kwargs, **training.arguments
        )
        if resources is not None:
            model.replicas = resources.replicas(model.policy)
        if model.kl_coef > 0:  # also after an interrupt it is the policy at the start
            model.anchor()
        seen = {**said, **model.policy.notes["view"]}
        save = functools.partial(_save_policy, model, training, {**notes, "view": seen}, tasks)
        logger = Logger(str(run.path), [])
        model.set_logger(logger)
        env.seed(1000 * (training.arguments["seed"] + 1) + own.start)
        latest = run.latest_checkpoint(stage, check_training_state) if resume else None
        if latest is not None:
            load_algorithm(latest, model)
        done = model.num_timesteps
        run.rewind_metrics(lambda row: row.get("stage") != stage or row["time/total_timesteps"] <= done)
        remaining = training.total_decisions - done
        if remaining > 0:
            with (
                ExitStack() as tracked,
                stop_request() as stop,
                RunProgress(run, stage, training, model, stop, progress and ranks.leads) as callback,
            ):
                callbacks: list[BaseCallback] = [callback]
                if ranks.leads:
                    opened = tracked.enter_context(Loggers(loggers or LoggerOptions(), run, stage, done + 1))
                    callbacks += opened.callbacks
                    seconds = _seconds_so_far(run, stage)
                    logger.output_formats += [*opened.writers, RunMetrics(run, stage, seconds, model)]
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
    training: Training,
    demonstrations: Demonstrations | None,
    horizon: int,
    shift: int,
    view: Mapping[str, Any],
) -> DemonstrationBatches | None:
    """Batches of what is rehearsed, if anything is.

    :param view: of what is practiced.
    """
    coefficient = training.arguments.get("rehearsal_coef", 0.0)
    if coefficient <= 0:
        return None
    if demonstrations is None:
        raise InputError(f"rehearsal_coef={coefficient} needs demonstrations; give data, or set it to 0")
    rehearsed = known_view(demonstrations.camera)
    if rehearsed is not None:
        warn_of_another_view(rehearsed, view, "The demonstrations for rehearsal show")
    return DemonstrationBatches(demonstrations, None, horizon, shift, training.arguments["seed"])


def _save_policy(
    algorithm: PPO,
    training: Training,
    notes: Mapping[str, Any],
    tasks: list[str] | None,
    folder: Path,
    further: Mapping[str, Any],
) -> None:
    """Write a policy as a checkpoint; all ranks must call it.

    :param notes: of the checkpoint at the start.
    :param further: notes besides these and what was practiced.
    """
    practice = {"decisions": algorithm.num_timesteps, "env_steps": algorithm.env_steps, "tasks": tasks}
    notes = {**notes, type(algorithm).__name__.lower(): practice, **further}
    distribution = (training.policy["distribution"], training.policy["distribution_kwargs"])
    policy = algorithm.policy
    critic = policy.value_head if algorithm.has_critic else None  # GRPO leaves it behind the actor
    with whole_weights(policy):
        if algorithm.ranks.leads:
            save_checkpoint(folder, policy.model, critic, notes, distribution, policy.distribution)


def plan_training(
    model: VLAModel, training: Training, *, action_chunk: int | None = None, ranks: int = 1
) -> MemoryPlan:
    """What a training will take of each rank's memory, see :func:`sb3_vla.runs.memory_plan.plan_memory`.

    It is planned for a GPU, also on a machine without one, unless its ``device`` is ``cpu``.

    :param model: the checkpoint's, or one of the same sizes on the meta device; it gets the adapters and the types of
        the training, and is not to be trained afterwards.
    :param action_chunk: actions executed per decision; None for all that the model predicts.
    :param ranks: which share environments and minibatches, and with ``sharding=fsdp`` what is trained.
    """
    arguments, policy, env = training.arguments, training.policy, {**_ENV_DEFAULTS, **training.env}
    trainable, lora = policy["trainable"], policy.get("lora")
    adapters = {} if lora is None and trainable == "lora" else lora
    prepare_training(model, trainable, lora=adapters, frozen_bf16=policy.get("frozen_bf16", False))
    chunk = action_chunk or model.action_horizon - model.first_action
    envs = -(-training.num_envs // ranks)
    with torch.device("meta"):
        distribution = make_distribution(policy["distribution"], model, chunk, **policy["distribution_kwargs"])
        critic_only = _ELAPSED + (_PRIVILEGED if env["privileged_state"] else 0)
        has_critic = training.algorithm.has_critic
        critic = ValueHead(model.feature_dim, critic_only, _VALUE_WIDTH).requires_grad_(has_critic)
    noted = critic_only * torch.float32.itemsize
    if has_critic:
        decisions = arguments["n_steps"]
        noted += ChunkRolloutBuffer.bytes_of_numbers
    else:
        size = arguments["group_size"]
        held = groups_held(arguments["n_groups"], arguments.get("max_groups"), size, envs, ranks)
        decisions = -(-held * size * -(-env["horizon"] // chunk) // envs)
    asked = policy.get("cache_perception")
    cached = model.caches_perception if asked is None else asked
    return plan_memory(
        model,
        trainable=trainable,
        batch_size=arguments.get("micro_batch_size") or -(-arguments["batch_size"] // ranks),
        bf16=uses_bf16(arguments.get("bf16", False), "cpu" if arguments.get("device") == "cpu" else "cuda"),
        gradient_checkpointing=policy.get("gradient_checkpointing", False),
        world_size=ranks if arguments.get("sharding") == "fsdp" else 1,
        num_envs=envs,
        decisions=decisions,
        cache_perception=cached and trainable != "all" and lora is None,
        denoisings=distribution.denoisings,
        distribution=distribution,
        critic=critic,
        noted=noted,
        copies=int(arguments.get("kl_coef", 0.0) > 0),
    )


def _env_options(
    start: LoadedCheckpoint,
    suite: str,
    split: str,
    tasks: list[str] | None,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of :func:`gymnasium.make` for environments that fit a checkpoint."""
    options: dict[str, Any] = {
        "image_size": start.model.image_size[0],
        "action_chunk": start.model.action_horizon - start.model.first_action,
        "tasks": tasks,
        "elapsed_time": True,
        **_ENV_DEFAULTS,
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
    # HoldAtEnd of GRPO stays outermost: steps after an episode's end are not filmed.
    return HoldAtEnd(Filmed(env.env, films)) if isinstance(env, HoldAtEnd) else Filmed(env, films)


def _holding(make: Callable[[], gym.Env]) -> gym.Env:
    return HoldAtEnd(make())


def _seconds_so_far(run: RunDirectory, stage: str) -> float:
    rows = [row for row in run.metrics() if row.get("stage") == stage]
    return rows[-1]["time/time_elapsed"] if rows else 0.0
