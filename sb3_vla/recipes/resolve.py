"""What a recipe means to the learner: the arguments of collecting, imitation, training and evaluation."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from mw_envs.hand_view import HandView
from mw_envs.tasks import INSTRUCTION_BYTES, did_you_mean, select_tasks
from sb3_vla.checkpoints import load_checkpoint
from sb3_vla.common.config import ConfigError
from sb3_vla.common.errors import InputError
from sb3_vla.common.paths import local_path
from sb3_vla.distributed.local_ranks import local_rank_count
from sb3_vla.evaluation.callback import PeriodicEvaluation
from sb3_vla.evaluation.protocols import PROTOCOLS, TRIAL_SEED, Protocol
from sb3_vla.evaluation.trial_envs import VideoOptions
from sb3_vla.grpo.grpo import GRPO
from sb3_vla.models import MODELS
from sb3_vla.policies.views import given_view
from sb3_vla.ppo.options import check_batch_size
from sb3_vla.ppo.ppo import PPO
from sb3_vla.ray import ClusterOptions
from sb3_vla.recipes.schema import (
    ClusterSection,
    EvalEnvSection,
    LoggerSection,
    Recipe,
    TrainEnvSection,
    VideoSection,
)
from sb3_vla.recording.episodes import TrainingFilms
from sb3_vla.runs.loggers import LoggerOptions
from sb3_vla.runs.settings import Annealed, Training
from sb3_vla.sft.settings import SFTConfig, SFTSettings

#: suite and split by RLinf's names, and by ours
SUITES = {
    "metaworld_1": ("MT1", "train"),
    "metaworld_10": ("MT10", "train"),
    "metaworld_50": ("MT50", "train"),
    "metaworld_45_ind": ("ML45", "train"),
    "metaworld_45_ood": ("ML45", "test"),
    **{suite: (suite, "train") for suite in ("MT1", "MT10", "MT50", "ML10", "ML45")},
}
#: models whose recipes need neither options nor a checkpoint; others train from nothing where options are given
FROM_SCRATCH = ("compact",)
#: options that say how a checkpoint is read, not how large a new model is
_OF_READING = ("base", "precision")


@dataclass(frozen=True)
class Plan:
    """The stages of a run.

    :param run: the run's directory.
    :param model: its name.
    :param checkpoint: where training, or imitation, starts; None for a new model.
    :param model_kwargs: what that checkpoint does not say.
    :param collect: arguments of :func:`sb3_vla.data.collect`, without the folder; None where a dataset is given
        or none is needed.
    :param load: arguments of :meth:`sb3_vla.data.Demonstrations.load`; None where none is needed.
    :param sft: settings of imitation; None for none.
    :param training: by PPO or GRPO; None for imitation alone.
    :param where: the suite, its tasks and the renderer, further arguments of :func:`sb3_vla.runs.training.train`.
    :param loggers: where metrics go; None for imitation alone.
    :param cluster: where training runs; None for this machine alone.
    :param action_chunk: actions executed per decision.
    :param evaluate: arguments of :func:`sb3_vla.evaluation.evaluate`; None for no evaluation.
    :param acting: in which precision the policy is evaluated: ``bf16``, for
        :func:`sb3_vla.common.precision.acting_precision`, and
        ``frozen_bf16``.
    :param videos: how its trials are filmed; None for no films. A relative folder is one of the run's.
    :param periodic: evaluations in the course of training; None for none.
    :param films: films of training; None for none. A relative folder is one of the run's.
    """

    run: Path
    model: str
    checkpoint: str | None
    model_kwargs: dict[str, Any]
    collect: dict[str, Any] | None
    load: dict[str, Any] | None
    sft: SFTConfig | None
    training: Training | None
    where: dict[str, Any]
    loggers: LoggerOptions | None
    cluster: ClusterOptions | None
    action_chunk: int
    evaluate: dict[str, Any] | None
    acting: dict[str, bool | None]
    videos: VideoOptions | None
    periodic: PeriodicEvaluation | None
    films: TrainingFilms | None

    @property
    def begins(self) -> bool:
        """Whether the model is a new one, which needs no checkpoint."""
        return self.checkpoint is None and can_begin(self.model, self.model_kwargs)

    @property
    def local_ranks(self) -> int:
        """Ranks that a machine without a GPU trains such a model with: more than one of a network that is small enough
        to fit several times."""
        if self.model not in FROM_SCRATCH or self.cluster is not None:
            return 1
        shared, at_most = [], [] if self.sft is None else [self.sft.batch_size]
        if self.training is not None:
            arguments = self.training.arguments
            shared.append(self.training.num_envs)
            at_most += [arguments[name] for name in ("batch_size", "rehearsal_batch_size") if name in arguments]
            if "group_size" in arguments:  # a group is played on one rank
                groups = self.training.num_envs // arguments["group_size"]
                shared.append(groups)
                at_most.append(max(1, groups))
        return local_rank_count(shared, at_most)


def make_plan(recipe: Recipe, given: Iterable[str] = ()) -> Plan:
    """Resolve a recipe.

    :param given: keys that somebody set on purpose, see :func:`sb3_vla.recipes.schema.given_keys`; one that this recipe
        makes no use of is refused.
    :raises ConfigError: for values that do not fit one another.
    """
    read: set[str] = set()
    recipe = _completed(recipe)
    plan = _resolve(cast(Recipe, _Reading(recipe, "", read)))
    unused = [keys for keys in given if not any(_covers(read, key) for key in keys.split(" or "))]
    if unused:
        decides = ("runner.task_type", "algorithm.adv_type", "actor.model.model_path", "data.path")
        now = ", ".join(f"{key}={_value(recipe, key)}" for key in decides)
        raise ConfigError(f"{', '.join(unused)} would be without effect in this recipe ({now}); leave it out")
    return plan


def _completed(recipe: Recipe) -> Recipe:
    """With what the checkpoint says where the recipe leaves it open."""
    model = recipe.actor.model
    if model.model_type is not None and model.num_action_chunks is not None:
        return recipe
    if model.model_path is None:
        raise ConfigError(
            "Nothing says where to start; give checkpoint=FOLDER, or checkpoint=compact-mt50, which comes with the "
            "package"
        )
    found = load_checkpoint(model.model_path, dict(model.model_kwargs), weights=False)
    predicted = found.model.action_horizon - found.model.first_action
    filled = replace(
        model,
        model_type=found.model_name if model.model_type is None else model.model_type,
        num_action_chunks=predicted if model.num_action_chunks is None else model.num_action_chunks,
    )
    return replace(recipe, actor=replace(recipe.actor, model=filled))


def _chunk(recipe: Recipe) -> int:
    chunk = recipe.actor.model.num_action_chunks
    assert chunk is not None  # it is completed
    if chunk < 1:
        raise ConfigError(f"actor.model.num_action_chunks={chunk}; expected at least 1")
    return chunk


def _covers(read: set[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in read)


class _Reading:
    """A section that notes which of its keys are read."""

    def __init__(self, section: Any, path: str, read: set[str]) -> None:
        self._section, self._path, self._read = section, path, read

    def __getattr__(self, name: str) -> Any:
        value, path = getattr(self._section, name), f"{self._path}.{name}".removeprefix(".")
        if is_dataclass(value):
            return _Reading(value, path, self._read)
        self._read.add(path)
        return value


def _value(recipe: Recipe, key: str) -> Any:
    value = functools.reduce(getattr, key.split("."), cast(Any, recipe))
    return "null" if value is None else value


def _resolve(recipe: Recipe) -> Plan:
    model, name = recipe.actor.model, _model_name(recipe)
    trains = recipe.runner.task_type == "embodied"
    begins = model.model_path is None and can_begin(name, model.model_kwargs)
    imitates = not trains or begins
    shows = imitates or recipe.algorithm.rehearsal_coef > 0
    if recipe.env.eval.trials_per_task < 0 or recipe.actor.seed < 0:
        raise ConfigError(
            f"env.eval.trials_per_task={recipe.env.eval.trials_per_task} and actor.seed={recipe.actor.seed}; expected "
            "at least 0"
        )
    evaluates = recipe.env.eval.trials_per_task > 0
    evaluate = _evaluate(recipe.env.eval, _chunk(recipe)) if evaluates else None
    videos = _videos(recipe.env.eval) if evaluates else None
    suite, split = _suite("train", recipe.env.train)
    return Plan(
        run=local_path(recipe.runner.logger.log_path) / (recipe.runner.logger.experiment_name or ""),
        model=name,
        checkpoint=model.model_path,
        model_kwargs=dict(model.model_kwargs),
        collect=_collect(recipe, suite, split) if shows and recipe.data.path is None else None,
        load=_load(recipe, suite, split) if shows else None,
        sft=_sft(recipe, name) if imitates else None,
        training=_training(recipe) if trains else None,
        where=_where(recipe, suite, split) if trains else {},
        loggers=_loggers(recipe.runner.logger) if trains else None,
        cluster=ClusterSection.options(recipe.cluster) if trains else None,  # notes which keys it reads
        action_chunk=_chunk(recipe),
        evaluate=evaluate,
        acting={"bf16": _bf16(recipe), "frozen_bf16": trains and model.frozen_bf16},
        videos=videos,
        periodic=_periodic(recipe.runner.val_check_interval, evaluate, videos) if trains else None,
        films=_films(recipe.env.train) if trains else None,
    )


def _model_name(recipe: Recipe) -> str:
    model = recipe.actor.model
    assert model.model_type is not None  # it is completed
    if model.model_type not in MODELS:
        hint = "pi0 or pi05" if model.model_type == "openpi" else did_you_mean(model.model_type, MODELS)
        raise ConfigError(f"Unknown actor.model.model_type={model.model_type!r}; {hint}")
    return model.model_type


def can_begin(model: str, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a model can be a new one, which imitates first: by its default size, or one that is given."""
    return model in FROM_SCRATCH or any(name not in _OF_READING for name in model_kwargs)


def _suite(which: str, section: TrainEnvSection | EvalEnvSection) -> tuple[str, str]:
    name = section.task_suite_name
    if name not in SUITES:
        raise ConfigError(f"Unknown env.{which}.task_suite_name={name!r}; {did_you_mean(name, SUITES)}")
    suite, split = SUITES[name]
    if suite == "MT1":
        if section.tasks is None or len(section.tasks) != 1:
            raise ConfigError(f"env.{which}.task_suite_name={name} needs one task: env.{which}.tasks=[reach-v3]")
    else:
        try:
            select_tasks(suite, split, section.tasks)
        except ValueError as error:
            raise ConfigError(f"env.{which}.tasks: {error}") from error
    return suite, split


def _collect(recipe: Recipe, suite: str, split: str) -> dict[str, Any]:
    return {
        "suite": suite,
        "split": split,
        "tasks": recipe.env.train.tasks,
        "episodes_per_task": recipe.data.episodes_per_task,
        "horizon": recipe.data.horizon,
        "noise_std": recipe.data.noise_std,
        "image_size": recipe.data.image_size,
        "crop": recipe.data.crop,
        "hand_view": recipe.data.hand_view,
        "seed": 100 * recipe.actor.seed,
        "num_workers": recipe.env.train.num_workers,
        "renderer": recipe.env.train.renderer,
    }


def _load(recipe: Recipe, suite: str, split: str) -> dict[str, Any]:
    own, tasks = recipe.data.path is None, recipe.env.train.tasks
    implied = not own and tasks is None and suite != "MT50"
    if implied:  # of a dataset of all tasks, none that is held out
        tasks = list(select_tasks(suite, split))
    # What experts are recorded with they have; a key only where it decides, since a run knows its stages by these.
    hand_view = None if own else recipe.data.hand_view
    return {
        **({} if hand_view is None else {"hand_view": HandView(hand_view)}),
        **({"allow_missing": True} if implied else {}),
        "root": recipe.data.path,
        "rename": None if own else dict(recipe.data.rename) or None,
        "tasks": tasks,
        "image_size": recipe.data.image_size,
        "instruction_bytes": INSTRUCTION_BYTES if own else recipe.data.instruction_bytes,
    }


_BF16 = {"float32": False, "bf16": True, "auto": None}


def _bf16(recipe: Recipe) -> bool | None:
    return _BF16[recipe.actor.model.precision]


def _lora(recipe: Recipe) -> dict[str, Any] | None:
    lora = recipe.actor.model.lora
    return None if lora is None else dict(lora)


def _sft(recipe: Recipe, model_name: str) -> SFTConfig:
    model = recipe.actor.model
    shared = {field.name: getattr(recipe.sft, field.name) for field in fields(SFTSettings)}
    return SFTConfig(
        model=model_name,
        model_kwargs=dict(model.model_kwargs),
        checkpoint=model.model_path,
        action_horizon=_chunk(recipe),
        lora=_lora(recipe),
        gradient_checkpointing=model.gradient_checkpointing,
        bf16=_BF16[recipe.sft.precision or model.precision],
        seed=recipe.actor.seed,
        **shared,
    )


def _training(recipe: Recipe) -> Training:
    _check_counts(recipe)
    algorithm, env, actor = recipe.algorithm, recipe.env.train, recipe.actor
    optim, runner = actor.optim, recipe.runner
    falls = optim.lr_scheduler != "constant"
    arguments: dict[str, Any] = {
        "learning_rate": Annealed(optim.lr, optim.final_lr, optim.lr_scheduler) if falls else optim.lr,
        "batch_size": actor.global_batch_size,
        "n_epochs": algorithm.update_epoch,
        "clip_range": algorithm.clip_ratio_low,
        "clip_range_high": algorithm.clip_ratio_high,
        "dual_clip": algorithm.clip_ratio_c,
        "logprob_type": algorithm.logprob_type.removesuffix("_level"),
        "target_kl": algorithm.target_kl,
        "ent_coef": algorithm.entropy_bonus,
        "kl_coef": algorithm.kl_beta,
        "max_grad_norm": optim.clip_grad,
        "actor_warmup": algorithm.actor_warmup,
        "noise_scale": Annealed(1.0, actor.model.final_noise_scale),
        "task_sampling": algorithm.task_sampling,
        "rehearsal_coef": algorithm.rehearsal_coef,
        "micro_batch_size": actor.micro_batch_size,
        "bf16": _bf16(recipe),
        "sharding": actor.sharding,
        "seed": actor.seed,
    }
    if algorithm.rehearsal_coef > 0:
        arguments["rehearsal_batch_size"] = algorithm.rehearsal_batch_size
    own, total_decisions = (_grpo if algorithm.adv_type == "grpo" else _ppo)(recipe)
    return Training(
        algorithm=GRPO if algorithm.adv_type == "grpo" else PPO,
        arguments={**arguments, **own},
        policy=_policy(recipe),
        env=_env(recipe),
        num_envs=env.total_num_envs,
        num_workers=env.num_workers,
        total_decisions=total_decisions,
        checkpoint_interval=runner.max_epochs if runner.save_interval == -1 else runner.save_interval,
        keep_checkpoints=runner.keep_checkpoints,
    )


def _check_counts(recipe: Recipe) -> None:
    """Before a run begins, and by the keys that were written."""
    counts = {
        "runner.max_epochs": recipe.runner.max_epochs,
        "env.train.total_num_envs": recipe.env.train.total_num_envs,
        "env.train.max_episode_steps": recipe.env.train.max_episode_steps,
        "algorithm.rollout_epoch": recipe.algorithm.rollout_epoch,
        "algorithm.update_epoch": recipe.algorithm.update_epoch,
        "actor.global_batch_size": recipe.actor.global_batch_size,
    }
    if recipe.algorithm.adv_type == "grpo":
        counts["algorithm.group_size"] = recipe.algorithm.group_size
    for key, count in counts.items():
        if count < 1:
            raise ConfigError(f"{key}={count}; expected at least 1")
    if not recipe.actor.optim.lr > 0:
        raise ConfigError(f"actor.optim.lr={recipe.actor.optim.lr}; expected above 0")
    if recipe.runner.save_interval < 1 and recipe.runner.save_interval != -1:
        raise ConfigError(
            f"runner.save_interval={recipe.runner.save_interval}; expected at least 1, or -1 for the end alone"
        )
    if recipe.runner.keep_checkpoints is not None and recipe.runner.keep_checkpoints < 1:
        raise ConfigError(
            f"runner.keep_checkpoints={recipe.runner.keep_checkpoints}; expected at least 1, or null for all"
        )


def _decisions(recipe: Recipe) -> int:
    """Of an environment in an iteration whose episodes all have their full length."""
    episode = -(-recipe.env.train.max_episode_steps // _chunk(recipe))
    return recipe.algorithm.rollout_epoch * episode


def _ppo(recipe: Recipe) -> tuple[dict[str, Any], int]:
    """Arguments that PPO alone has, and the decisions of all its rollouts."""
    algorithm, num_envs, decisions = recipe.algorithm, recipe.env.train.total_num_envs, _decisions(recipe)
    stages = recipe.rollout.pipeline_stage_num
    if stages not in (1, 2):
        raise ConfigError(
            f"rollout.pipeline_stage_num={stages}; expected 1, or 2 for simulating one half of the environments while "
            "the policy decides for the other"
        )
    try:
        check_batch_size(recipe.actor.global_batch_size, decisions, num_envs)
    except InputError as error:
        raise ConfigError(f"actor.global_{error}") from error
    arguments = {
        "n_steps": decisions,
        "value_lr": recipe.actor.optim.value_lr,
        "vf_coef": 1.0,
        "gamma": algorithm.gamma,
        "gae_lambda": algorithm.gae_lambda,
        "clip_range_vf": algorithm.value_clip,
        "huber_delta": algorithm.huber_delta,
        "normalize_advantage": algorithm.normalize_advantages,
        "critic_warmup": algorithm.critic_warmup,
        "bootstrap_truncated": False,  # the time limit is a part of the task, and the critic sees the time left
        "overlap": stages == 2,
    }
    return arguments, recipe.runner.max_epochs * num_envs * decisions


def _grpo(recipe: Recipe) -> tuple[dict[str, Any], int]:
    """Arguments that GRPO alone has, and the decisions of all its rollouts if no episode ended early."""
    algorithm, num_envs = recipe.algorithm, recipe.env.train.total_num_envs
    if recipe.rollout.pipeline_stage_num != 1:
        raise ConfigError(
            f"rollout.pipeline_stage_num={recipe.rollout.pipeline_stage_num} is for algorithm.adv_type=gae; GRPO's "
            "groups play together"
        )
    episodes = num_envs * algorithm.rollout_epoch
    if episodes % algorithm.group_size:
        raise ConfigError(
            f"algorithm.group_size={algorithm.group_size} does not divide the {episodes} episodes of an iteration, "
            f"env.train.total_num_envs={num_envs} times algorithm.rollout_epoch={algorithm.rollout_epoch}"
        )
    if max(num_envs, algorithm.group_size) % min(num_envs, algorithm.group_size):
        raise ConfigError(
            f"env.train.total_num_envs={num_envs} for groups of algorithm.group_size={algorithm.group_size} episodes; "
            "expected a multiple or a divisor"
        )
    arguments = {
        "success_bounds": _success_bounds(recipe),
        "group_size": algorithm.group_size,
        "n_groups": episodes // algorithm.group_size,
        "normalize_length": algorithm.normalize_length,
    }
    return arguments, recipe.runner.max_epochs * num_envs * _decisions(recipe)


def _success_bounds(recipe: Recipe) -> tuple[float, float]:
    """RLinf's bounds are of a group's mean reward, which is the coefficient for a success."""
    algorithm, env = recipe.algorithm, recipe.env.train
    if not algorithm.filter_rewards:
        return 0.0, 1.0
    if env.dense_reward:
        raise ConfigError("algorithm.filter_rewards=true bounds a reward of success; set env.train.dense_reward=false")
    coefficient = env.reward_coef if env.use_rel_reward else 1.0
    low, high = algorithm.rewards_lower_bound / coefficient, algorithm.rewards_upper_bound / coefficient
    if not any(low <= successes / algorithm.group_size <= high for successes in range(1, algorithm.group_size)):
        raise ConfigError(
            f"algorithm.rewards_lower_bound={algorithm.rewards_lower_bound} and rewards_upper_bound="
            f"{algorithm.rewards_upper_bound} keep no group of algorithm.group_size={algorithm.group_size} episodes in "
            f"which some succeed and some fail: a success earns {coefficient:g}, so they are shares of {low:g} and "
            f"{high:g}; {0.1 * coefficient:g} and {0.9 * coefficient:g} are usual"
        )
    return low, min(high, 1.0)


def _where(recipe: Recipe, suite: str, split: str) -> dict[str, Any]:
    env = recipe.env.train
    return {"suite": suite, "split": split, "tasks": env.tasks, "renderer": env.renderer}


def _policy(recipe: Recipe) -> dict[str, Any]:
    model, optim = recipe.actor.model, recipe.actor.optim
    options = {"denoising_steps": model.num_steps, "noise_level": model.noise_level, "joint": model.joint_logprob}
    return {
        "trainable": model.trainable,
        "lora": _lora(recipe),
        "frozen_bf16": model.frozen_bf16,
        "gradient_checkpointing": model.gradient_checkpointing,
        "compile": model.compile,
        "cache_perception": model.cache_perception,
        "distribution": model.noise_method,
        "distribution_kwargs": {
            **{name: value for name, value in options.items() if value is not None},
            **model.noise_kwargs,
        },
        "optimizer_kwargs": {
            "betas": (optim.adam_beta1, optim.adam_beta2),
            "eps": optim.adam_eps,
            "weight_decay": optim.weight_decay,
        },
    }


def _env(recipe: Recipe) -> dict[str, Any]:
    env, model = recipe.env.train, recipe.actor.model
    options: dict[str, Any] = {
        "horizon": env.max_episode_steps,
        "reward": "dense" if env.dense_reward else "difference" if env.use_rel_reward else "sparse",
        "terminate_on_success": not env.ignore_terminations,
        "action_chunk": _chunk(recipe),
    }
    if options["reward"] == "difference":
        options["reward_coef"] = env.reward_coef
    if recipe.algorithm.adv_type == "gae":
        options["privileged_state"] = model.privileged_critic
    if model.model_path is not None:
        options.update(given_view(model.crop, model.camera))
    return options


def _loggers(section: LoggerSection) -> LoggerOptions:
    return LoggerOptions(list(section.logger_backends), section.project_name, section.experiment_name, section.mode)


def _evaluate(section: EvalEnvSection, action_chunk: int) -> dict[str, Any]:
    suite, split = _suite("eval", section)
    tasks = section.tasks if suite == "MT1" else list(select_tasks(suite, split, section.tasks))
    horizon = section.max_episode_steps
    known = {(protocol.horizon, protocol.action_chunk): protocol for protocol in PROTOCOLS.values()}
    ours = Protocol(f"{horizon} steps", horizon=horizon, action_chunk=action_chunk, settle_steps=15)
    return {
        "tasks": tasks,
        "trials_per_task": section.trials_per_task,
        "trial_seed": TRIAL_SEED + section.seed,
        "protocol": known.get((horizon, action_chunk), ours),
        "num_envs": section.total_num_envs,
        "num_workers": section.num_workers,
        "renderer": section.renderer,
    }


def _periodic(interval: int, evaluate: dict[str, Any] | None, videos: VideoOptions | None) -> PeriodicEvaluation | None:
    if interval == -1:
        return None
    if interval < 1:
        raise ConfigError(f"runner.val_check_interval={interval}; expected at least 1, or -1 for no evaluation")
    if evaluate is None:
        raise ConfigError(
            f"runner.val_check_interval={interval} has no trials: env.eval.trials_per_task=0; set one of the two"
        )
    return PeriodicEvaluation(interval, **evaluate, videos=videos)


def _videos(section: EvalEnvSection) -> VideoOptions | None:
    style, count = _film_style("eval", section.video_cfg), section.videos_per_task
    return VideoOptions(**style, per_task=count) if style is not None and count > 0 else None


def _films(section: TrainEnvSection) -> TrainingFilms | None:
    style, every = _film_style("train", section.video_cfg), section.video_interval
    if every < 1:
        raise ConfigError(f"env.train.video_interval={every}; expected at least 1")
    return None if style is None else TrainingFilms(**style, every=every)


def _film_style(which: str, section: VideoSection) -> dict[str, Any] | None:
    """None for no films; what is set besides ``save_video=false`` waits for them, and is no mistake."""
    base, info, most = section.video_base_dir, section.info_on_video, section.max_mb
    if most is not None and not most > 0:
        raise ConfigError(f"env.{which}.video_cfg.max_mb={most}; expected more than 0, or null for no limit")
    if not section.save_video:
        return None
    return {"directory": "videos" if base is None else str(local_path(base).absolute()), "info": info, "max_mb": most}
