"""What a recipe means to the learner: the arguments of collecting, imitation, training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mw_envs.tasks import did_you_mean, select_tasks
from sb3_vla.cluster import ClusterOptions
from sb3_vla.config import ConfigError
from sb3_vla.models import MODELS
from sb3_vla.recipes import AlgorithmSection, EvalEnvSection, Recipe, TrainEnvSection
from sb3_vla.results import PROTOCOLS, TRIAL_SEED, Protocol
from sb3_vla.sft import SFTConfig
from sb3_vla.training import GRPOConfig, PPOConfig

#: names of RLinf's for suite and split
SUITES = {
    "metaworld_1": ("MT1", "train"),
    "metaworld_10": ("MT10", "train"),
    "metaworld_50": ("MT50", "train"),
    "metaworld_45_ind": ("ML45", "train"),
    "metaworld_45_ood": ("ML45", "test"),
}
#: models that learn from demonstrations alone at their default size; the others build on pretrained towers
FROM_SCRATCH = ("compact", "diffusion_policy")
_GAE_ONLY = (
    "gamma",
    "gae_lambda",
    "normalize_advantages",
    "logprob_type",
    "clip_ratio_c",
    "value_clip",
    "huber_delta",
    "critic_warmup",
)
_GRPO_ONLY = ("group_size", "filter_rewards", "rewards_lower_bound", "rewards_upper_bound", "normalize_length")


@dataclass(frozen=True)
class Plan:
    """The stages of a run.

    :param run: the run's directory.
    :param checkpoint: where training, or imitation, starts; None for a new model.
    :param model_kwargs: what that checkpoint does not say.
    :param collect: arguments of :func:`sb3_vla.collecting.collect`, without the folder; None where a dataset is given
        or none is needed.
    :param load: arguments of :meth:`sb3_vla.demonstrations.Demonstrations.load`; None where none is needed.
    :param sft: settings of imitation; None for none.
    :param config: settings of the algorithm; None for imitation alone.
    :param train: further arguments of :func:`sb3_vla.training.train`.
    :param cluster: where training runs; None for this machine alone.
    :param action_chunk: actions executed per decision; None for all that the model predicts.
    :param evaluate: arguments of :func:`sb3_vla.evaluation.evaluate`; None for no evaluation.
    :param videos_per_task: trials of each task that are filmed.
    """

    run: Path
    checkpoint: str | None
    model_kwargs: dict[str, Any]
    collect: dict[str, Any] | None
    load: dict[str, Any] | None
    sft: SFTConfig | None
    config: PPOConfig | GRPOConfig | None
    train: dict[str, Any]
    cluster: ClusterOptions | None
    action_chunk: int | None
    evaluate: dict[str, Any] | None
    videos_per_task: int

    @property
    def algorithm(self) -> str | None:
        """``ppo``, ``grpo``, or None."""
        return None if self.config is None else type(self.config).__name__.removesuffix("Config").lower()


def make_plan(recipe: Recipe, overrides: Iterable[str] = ()) -> Plan:
    """Resolve a recipe.

    :param overrides: keys that were given on the command line; one that this recipe makes no use of is refused.
    :raises ConfigError: for values that do not fit one another.
    """
    _check_algorithm(recipe)
    model = recipe.actor.model
    if model.model_type not in MODELS:
        hint = "pi0 or pi05" if model.model_type == "openpi" else did_you_mean(model.model_type, MODELS)
        raise ConfigError(f"Unknown actor.model.model_type={model.model_type!r}; {hint}")
    trains = recipe.runner.task_type == "embodied"
    begins = model.model_path is None and can_begin(recipe)
    imitates = not trains or begins
    rehearses = trains and recipe.algorithm.rehearsal_coef > 0
    _check_used(overrides, trains=trains, imitates=imitates, shows=imitates or rehearses)
    suite, split = _suite("train", recipe.env.train)
    collect = None
    if (imitates or rehearses) and recipe.data.path is None:
        collect = _collect(recipe, suite, split)
    return Plan(
        run=Path(recipe.runner.logger.log_path) / (recipe.runner.logger.experiment_name or ""),
        checkpoint=model.model_path,
        model_kwargs=dict(model.model_kwargs),
        collect=collect,
        load=_load(recipe) if imitates or rehearses else None,
        sft=_sft(recipe) if imitates else None,
        config=_algorithm(recipe) if trains else None,
        train=_train(recipe, suite, split) if trains else {},
        cluster=recipe.cluster.options(),
        action_chunk=model.num_action_chunks,
        evaluate=_evaluate(recipe.env.eval, model.num_action_chunks) if recipe.env.eval.trials_per_task > 0 else None,
        videos_per_task=recipe.env.eval.videos_per_task,
    )


def can_begin(recipe: Recipe) -> bool:
    """Whether the recipe's model can be a new one, which imitates first."""
    model = recipe.actor.model
    return model.model_type in FROM_SCRATCH or bool(model.model_kwargs)


def _check_algorithm(recipe: Recipe) -> None:
    """A key of the other algorithm would be without effect."""
    chosen, default = recipe.algorithm, AlgorithmSection()
    other = _GRPO_ONLY if chosen.adv_type == "gae" else _GAE_ONLY
    for name in other:
        if getattr(chosen, name) != getattr(default, name):
            raise ConfigError(
                f"algorithm.{name}={getattr(chosen, name)!r} means nothing with algorithm.adv_type={chosen.adv_type}; "
                "leave it out, or choose the other algorithm"
            )
    if recipe.rollout.pipeline_stage_num not in (1, 2):
        raise ConfigError(
            f"rollout.pipeline_stage_num={recipe.rollout.pipeline_stage_num}; expected 1, or 2 for simulating one half "
            "of the environments while the policy decides for the other"
        )
    if recipe.rollout.pipeline_stage_num == 2 and chosen.adv_type == "grpo":
        raise ConfigError("rollout.pipeline_stage_num=2 is for algorithm.adv_type=gae; GRPO's groups play together")


def _check_used(overrides: Iterable[str], *, trains: bool, imitates: bool, shows: bool) -> None:
    unused = {
        "cluster.": "" if trains else "imitation runs on this machine, or under torchrun",
        "sft.": "" if imitates else "training starts from actor.model.model_path without imitation",
        "data.": "" if shows else "there is neither imitation nor rehearsal",
        "algorithm.": "" if trains else "runner.task_type=sft only imitates",
        "rollout.": "" if trains else "runner.task_type=sft only imitates",
        "actor.optim.": "" if trains else "runner.task_type=sft only imitates; give sft.learning_rate and others",
    }
    for override in overrides:
        for prefix, reason in unused.items():
            if reason and override.startswith(prefix):
                raise ConfigError(f"{override} would be without effect: {reason}")


def _suite(which: str, section: TrainEnvSection | EvalEnvSection) -> tuple[str, str]:
    name = section.task_suite_name
    if name not in SUITES:
        raise ConfigError(f"Unknown env.{which}.task_suite_name={name!r}; {did_you_mean(name, SUITES)}")
    suite, split = SUITES[name]
    if suite == "MT1":
        if section.tasks is None or len(section.tasks) != 1:
            raise ConfigError(f"env.{which}.task_suite_name=metaworld_1 needs one task: env.{which}.tasks=[reach-v3]")
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
        "noise_std": recipe.data.noise_std,
        "image_size": recipe.data.image_size,
        "crop": recipe.data.crop,
        "seed": 100 * recipe.actor.seed,
        "num_workers": recipe.env.train.num_workers,
        "renderer": recipe.env.train.renderer,
    }


def _load(recipe: Recipe) -> dict[str, Any]:
    return {
        "root": recipe.data.path,
        "rename": dict(recipe.data.rename) or None,
        "tasks": recipe.env.train.tasks,
        "image_size": recipe.data.image_size,
    }


def _bf16(recipe: Recipe) -> bool | None:
    return {"float32": False, "bf16": True, "auto": None}[recipe.actor.model.precision]


def _sft(recipe: Recipe) -> SFTConfig:
    model = recipe.actor.model
    shared = {field.name: getattr(recipe.sft, field.name) for field in fields(recipe.sft)}
    return SFTConfig(
        model=model.model_type,
        model_kwargs=dict(model.model_kwargs),
        checkpoint=model.model_path,
        # A new model has to learn to see.
        trainable=model.trainable if model.model_path is not None else "all",
        bf16=_bf16(recipe),
        seed=recipe.actor.seed,
        **shared,
    )


def _algorithm(recipe: Recipe) -> PPOConfig | GRPOConfig:
    algorithm, env, actor = recipe.algorithm, recipe.env.train, recipe.actor
    model, optim, runner = actor.model, actor.optim, recipe.runner
    chunk = model.num_action_chunks or recipe.sft.action_horizon
    decisions = algorithm.rollout_epoch * -(-env.max_episode_steps // chunk)
    options = {"denoising_steps": model.num_steps, "noise_level": model.noise_level, "joint": model.joint_logprob}
    shared: dict[str, Any] = {
        "num_envs": env.total_num_envs,
        "num_workers": env.num_workers,
        "horizon": env.max_episode_steps,
        "batch_size": actor.global_batch_size,
        "epochs": algorithm.update_epoch,
        "learning_rate": optim.lr,
        "final_learning_rate": optim.lr if optim.final_lr is None else optim.final_lr,
        "clip_range": algorithm.clip_ratio_low,
        "clip_range_high": algorithm.clip_ratio_high,
        "target_kl": algorithm.target_kl,
        "ent_coef": algorithm.entropy_bonus,
        "kl_coef": algorithm.kl_beta,
        "max_grad_norm": optim.clip_grad,
        "actor_warmup": algorithm.actor_warmup,
        "trainable": model.trainable,
        "distribution": model.noise_method,
        "distribution_kwargs": {
            **{name: value for name, value in options.items() if value is not None},
            **model.noise_kwargs,
        },
        "final_noise_scale": model.final_noise_scale,
        "task_sampling": algorithm.task_sampling,
        "rehearsal_coef": algorithm.rehearsal_coef,
        "rehearsal_batch_size": algorithm.rehearsal_batch_size,
        "bf16": _bf16(recipe),
        "checkpoint_interval": runner.max_epochs if runner.save_interval == -1 else runner.save_interval,
        "seed": actor.seed,
    }
    if algorithm.adv_type == "gae":
        return PPOConfig(
            iterations=runner.max_epochs,
            decisions=decisions,
            value_lr=optim.value_lr,
            gamma=algorithm.gamma,
            gae_lambda=algorithm.gae_lambda,
            dual_clip=algorithm.clip_ratio_c,
            clip_range_vf=algorithm.value_clip,
            huber_delta=algorithm.huber_delta,
            logprob_type=algorithm.logprob_type.removesuffix("_level"),
            normalize_advantage=algorithm.normalize_advantages,
            critic_warmup=algorithm.critic_warmup,
            privileged_critic=model.privileged_critic,
            overlap=recipe.rollout.pipeline_stage_num == 2,
            micro_batch_size=actor.micro_batch_size,
            **shared,
        )
    episodes = env.total_num_envs * algorithm.rollout_epoch
    if episodes % algorithm.group_size:
        raise ConfigError(
            f"algorithm.group_size={algorithm.group_size} does not divide the {episodes} episodes of an iteration, "
            f"env.train.total_num_envs={env.total_num_envs} times algorithm.rollout_epoch={algorithm.rollout_epoch}"
        )
    bounds = (0.0, 1.0)
    if algorithm.filter_rewards:
        # RLinf's bounds are of the reward, which is the coefficient for a success.
        low, high = algorithm.rewards_lower_bound, algorithm.rewards_upper_bound
        bounds = (min(low / env.reward_coef, 1.0), min(high / env.reward_coef, 1.0))
    return GRPOConfig(
        total_decisions=runner.max_epochs * env.total_num_envs * decisions,
        group_size=algorithm.group_size,
        groups=episodes // algorithm.group_size,
        success_bounds=bounds,
        normalize_length=algorithm.normalize_length,
        **shared,
    )


def _train(recipe: Recipe, suite: str, split: str) -> dict[str, Any]:
    env, optim, model = recipe.env.train, recipe.actor.optim, recipe.actor.model
    env_kwargs: dict[str, Any] = {
        "reward": "difference" if env.use_rel_reward else "sparse",
        "terminate_on_success": not env.ignore_terminations,
    }
    if env.use_rel_reward:
        env_kwargs["reward_coef"] = env.reward_coef
    if model.num_action_chunks is not None:
        env_kwargs["action_chunk"] = model.num_action_chunks
    return {
        "suite": suite,
        "split": split,
        "tasks": env.tasks,
        "renderer": env.renderer,
        "env_kwargs": env_kwargs,
        "optimizer_kwargs": {
            "betas": (optim.adam_beta1, optim.adam_beta2),
            "eps": optim.adam_eps,
            "weight_decay": optim.weight_decay,
        },
    }


def _evaluate(section: EvalEnvSection, action_chunk: int | None) -> dict[str, Any]:
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
