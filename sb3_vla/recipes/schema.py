"""Recipes: what a training in MetaWorld is made of, as typed YAML with the key paths of RLinf's recipes.

A recipe lies in ``sb3_vla/recipes/yaml/NAME.yaml``, also in an installed package. It says what differs from the
defaults below, or from the recipe that it names as its ``base``: a file beside it, or else one of these.
:mod:`sb3_vla.recipes.resolve` says what its keys mean to the learner; every key that is taken is used. Keys of RLinf's
that are not taken are refused with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mw_envs.tasks import INSTRUCTION_BYTES, did_you_mean
from sb3_vla.common.config import ConfigError, leaves, load_config, read_layers
from sb3_vla.common.paths import local_path
from sb3_vla.ray import ClusterOptions, PlacementError
from sb3_vla.sft.settings import SFTSettings

RECIPES = Path(__file__).parent / "yaml"


@dataclass
class LoggerSection:
    """Where a run lies, in ``log_path/experiment_name``, and where its metrics go besides.

    :param log_path: folder of runs.
    :param project_name: of trackers.
    :param experiment_name: the run's; None for the recipe's name.
    :param logger_backends: of ``tensorboard``, ``csv``, ``json``, ``wandb`` and ``swanlab``.
    :param mode: ``online``, or ``offline`` to keep what trackers would send in the run's directory.
    """

    log_path: str = "runs"
    project_name: str = "sb3-vla"
    experiment_name: str | None = None
    logger_backends: list[str] = field(default_factory=lambda: ["tensorboard"])
    mode: Literal["online", "offline"] = "online"


@dataclass
class RunnerSection:
    """How long a run lasts, and what it keeps.

    :param task_type: ``embodied``: reinforcement learning; ``sft``: imitation alone.
    :param max_epochs: iterations: rollouts, each followed by an update; with grpo as many decisions as these would
        take if all episodes had their full length.
    :param val_check_interval: iterations between evaluations on the trials of ``env.eval``, of which the best policy is
        kept beside the states; -1 for none.
    :param save_interval: iterations between the states from which an interrupted run goes on; -1 for the end alone.
    :param keep_checkpoints: newest of these states that stay; null for all.
    """

    task_type: Literal["embodied", "sft"] = "embodied"
    max_epochs: int = 1000
    val_check_interval: int = -1
    save_interval: int = 50
    keep_checkpoints: int | None = 2
    logger: LoggerSection = field(default_factory=LoggerSection)


@dataclass
class AlgorithmSection:
    """PPO (``adv_type: gae``) or GRPO.

    :param adv_type: ``gae`` with a critic, ``grpo`` with groups of episodes of one trial.
    :param rollout_epoch: episodes of full length that each environment plays in an iteration.
    :param update_epoch: passes over a rollout.
    :param gamma: discount per decision (gae).
    :param gae_lambda: per decision (gae).
    :param normalize_advantages: over each minibatch (gae).
    :param logprob_type: what a ratio is of: ``chunk_level``, ``action_level``, ``token_level`` or
        ``denoising_step_level``.
    :param clip_ratio_low: how far below one a ratio may go before it is clipped.
    :param clip_ratio_high: how far above one.
    :param clip_ratio_c: dual clip; None for none.
    :param value_clip: clip of the change of a value; None for none (gae).
    :param huber_delta: error from which the loss of a value grows linearly; None for its square (gae).
    :param entropy_bonus: weight of the entropy.
    :param kl_beta: weight of the divergence from the policy at the start.
    :param target_kl: divergence at which an update stops; None for never.
    :param critic_warmup: iterations at the start from which the critic alone learns (gae).
    :param actor_warmup: iterations over which the actor's learning rate then rises.
    :param task_sampling: ``uniform``, or ``signal`` to draw more often the tasks that are solved now and then.
    :param group_size: episodes of one trial (grpo).
    :param filter_rewards: whether a group counts only between the bounds (grpo).
    :param rewards_lower_bound: least mean reward of a group's episodes (grpo); a success earns
        ``env.train.reward_coef``.
    :param rewards_upper_bound: greatest one (grpo).
    :param normalize_length: whether each episode weighs the same, instead of each decision (grpo).
    :param rehearsal_coef: weight of the imitation loss on the demonstrations of ``data``; 0 for none.
    :param rehearsal_batch_size: frames of them per minibatch.
    """

    adv_type: Literal["gae", "grpo"] = "gae"
    rollout_epoch: int = 8
    update_epoch: int = 4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    normalize_advantages: bool = True
    logprob_type: Literal["chunk_level", "action_level", "token_level", "denoising_step_level"] = "chunk_level"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float | None = None
    value_clip: float | None = 0.2
    huber_delta: float | None = 10.0
    entropy_bonus: float = 0.0
    kl_beta: float = 0.0
    target_kl: float | None = None
    critic_warmup: int = 0
    actor_warmup: int = 0
    task_sampling: Literal["uniform", "signal"] = "uniform"
    group_size: int = 8
    filter_rewards: bool = False
    rewards_lower_bound: float = 0.1
    rewards_upper_bound: float = 0.9
    normalize_length: bool = True
    rehearsal_coef: float = 0.0
    rehearsal_batch_size: int = 64


@dataclass
class VideoSection:
    """Films of episodes, with a frame for every environment step.

    :param save_video: whether there are any.
    :param info_on_video: write instruction, task, step, reward and success under each frame.
    :param video_base_dir: folder for a folder of films each of training (``train``) and the evaluations (``before``,
        ``during``, ``after``); null for the run's ``videos``, from where the report takes them.
    :param max_mb: megabytes of films in each of these folders, beyond which the oldest are deleted; null for no limit.
    """

    save_video: bool = True
    info_on_video: bool = True
    video_base_dir: str | None = None
    max_mb: float | None = 500.0


@dataclass
class TrainEnvSection:
    """The environments of training.

    :param task_suite_name: ``metaworld_50``, ``metaworld_45_ind`` (training tasks of ML45), ``metaworld_45_ood`` (the
        five held out), ``metaworld_10`` and ``metaworld_1`` (with one task in ``tasks``).
    :param tasks: some of the suite's tasks; None for all.
    :param total_num_envs: environments.
    :param num_workers: processes that run them; None for one a core.
    :param max_episode_steps: environment steps of an episode.
    :param dense_reward: MetaWorld's own reward of every step, divided by ten, instead of one for success.
    :param use_rel_reward: reward the change of success, instead of the first success.
    :param reward_coef: factor of that reward.
    :param ignore_terminations: go on after a success until the time limit.
    :param renderer: ``auto``, ``software``, ``egl`` or ``osmesa``.
    :param video_cfg: films of episodes of one environment.
    :param video_interval: iterations between the episodes that are filmed.
    """

    task_suite_name: str = "metaworld_50"
    tasks: list[str] | None = None
    total_num_envs: int = 64
    num_workers: int | None = None
    max_episode_steps: int = 100
    dense_reward: bool = False
    use_rel_reward: bool = True
    reward_coef: float = 1.0
    ignore_terminations: bool = False
    renderer: str = "auto"
    video_cfg: VideoSection = field(default_factory=lambda: VideoSection(save_video=False))
    video_interval: int = 10


@dataclass
class EvalEnvSection:
    """The trials before, during and after training, always the same.

    :param task_suite_name: see :class:`TrainEnvSection`.
    :param tasks: some of the suite's tasks; None for all.
    :param total_num_envs: environments side by side; None for eight a core.
    :param num_workers: processes that run them; None for one a core.
    :param max_episode_steps: environment steps of a trial; 160 is that of RLinf's table.
    :param trials_per_task: trials of each task; 0 for no evaluation.
    :param seed: which trials; another seed gives others, but for those beyond 50 a task, which are the next seed's.
    :param videos_per_task: trials of each task that are filmed.
    :param renderer: ``auto``, ``software``, ``egl`` or ``osmesa``.
    :param video_cfg: how they are filmed.
    """

    task_suite_name: str = "metaworld_50"
    tasks: list[str] | None = None
    total_num_envs: int | None = None
    num_workers: int | None = None
    max_episode_steps: int = 160
    trials_per_task: int = 10
    seed: int = 0
    videos_per_task: int = 1
    renderer: str = "auto"
    video_cfg: VideoSection = field(default_factory=VideoSection)


@dataclass
class EnvSection:
    """Environments."""

    train: TrainEnvSection = field(default_factory=TrainEnvSection)
    eval: EvalEnvSection = field(default_factory=EvalEnvSection)


@dataclass
class ClusterSection:
    """Where a run's processes are: on this machine alone, or on a Ray cluster.

    :param num_nodes: nodes of the cluster that take part.
    :param component_placement: accelerators of ``actor``, ``env`` and ``rollout``, such as ``{env: 0-3, rollout: 4-7,
        actor: "0"}``, see :mod:`sb3_vla.ray.placement`; None for one process and its workers on this machine.
    """

    num_nodes: int = 1
    component_placement: dict[str, str] | None = None

    def options(self) -> ClusterOptions | None:
        """The placement; None for this machine alone.

        :raises PlacementError: for what no cluster can have.
        """
        if self.component_placement is not None:
            return ClusterOptions(self.num_nodes, self.component_placement)
        if self.num_nodes != 1:
            raise PlacementError(
                f"cluster.num_nodes={self.num_nodes} needs a placement; give cluster.component_placement="
                '{"actor,env,rollout": all}'
            )
        return None


@dataclass
class RolloutSection:
    """How rollouts are made.

    :param pipeline_stage_num: 2 simulates one half of the environments while the policy decides for the other.
    """

    pipeline_stage_num: int = 1


@dataclass
class ModelSection:
    """The policy.

    :param model_type: name in :data:`sb3_vla.models.MODELS`; None for that of the checkpoint.
    :param model_path: checkpoint to start from, a folder or ``hf://owner/name`` on the Hugging Face hub. None for a new
        model, which imitates the demonstrations of ``data`` first; only models that train from scratch can do without.
    :param model_kwargs: the model's own options: of a new one, or what a published checkpoint does not say.
    :param crop: window of the view that the model sees, such as ``workspace``, where ``model_path`` does not say it.
    :param camera: whose view it sees, where ``model_path`` does not say it.
    :param trainable: ``all``, ``expert`` to freeze the backbone, ``adaptive`` (pi0.5), or ``lora`` for adapters alone.
    :param lora: options of adapters in what ``trainable`` leaves frozen, see :class:`sb3_vla.models.lora.LoRA`; None
        for none, or with ``trainable: lora`` for the defaults.
    :param frozen_bf16: a frozen backbone's weights in bfloat16 (pi0, pi0.5), also while it is evaluated; not with
        ``trainable: all``.
    :param gradient_checkpointing: layers compute again what the backward pass needs, for less memory.
    :param compile: arguments of ``torch.compile``, such as ``{mode: reduce-overhead}``; None for no compilation.
    :param cache_perception: whether a rollout keeps what a frozen backbone perceived, so that an update costs no more
        than the expert; None for the model's default.
    :param num_action_chunks: actions executed per decision, and predicted by a new model whose model_kwargs do not say;
        None for all that the checkpoint's model predicts.
    :param noise_method: the action distribution, a name in :data:`sb3_vla.distributions.DISTRIBUTIONS`.
    :param num_steps: denoising steps; None for the distribution's default.
    :param noise_level: of ``flow_sde`` and ``flow_cps``; None for the default.
    :param joint_logprob: whether all denoising steps are stochastic, instead of one; None for the default.
    :param noise_kwargs: the distribution's other options.
    :param final_noise_scale: factor of the exploration noise at the end; it falls linearly from 1.
    :param privileged_critic: whether the critic sees the simulator's state (gae).
    :param precision: of updates, and on a GPU of rollouts and evaluations: ``float32``, ``bf16``, or ``auto`` for what
        the machine computes faster.
    """

    model_type: str | None = "pi0"
    model_path: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    crop: Any = None
    camera: str | None = None
    trainable: str = "expert"
    lora: dict[str, Any] | None = None
    frozen_bf16: bool = False
    gradient_checkpointing: bool = False
    compile: dict[str, Any] | None = None
    cache_perception: bool | None = None
    num_action_chunks: int | None = 5
    noise_method: str = "flow_sde"
    num_steps: int | None = None
    noise_level: float | None = None
    joint_logprob: bool | None = None
    noise_kwargs: dict[str, Any] = field(default_factory=dict)
    final_noise_scale: float = 1.0
    privileged_critic: bool = False
    precision: Literal["float32", "bf16", "auto"] = "float32"


@dataclass
class OptimSection:
    """AdamW.

    :param lr: the actor's learning rate.
    :param lr_scheduler: ``constant``; or ``linear`` or ``cosine``, on which it falls to ``final_lr`` over the training.
    :param final_lr: at the end, of one that falls.
    :param value_lr: the critic's; it falls in proportion (gae).
    :param adam_beta1: of the gradient's mean.
    :param adam_beta2: of its square's.
    :param adam_eps: added to the deviation.
    :param weight_decay: per step, in proportion to the learning rate.
    :param clip_grad: clip of the gradient's norm.
    """

    lr: float = 1e-5
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    final_lr: float = 0.0
    value_lr: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0


@dataclass
class ActorSection:
    """The learner.

    :param seed: of everything that is random but the trials of evaluation.
    :param global_batch_size: decisions per optimizer step.
    :param micro_batch_size: decisions that are evaluated at a time; None for all of them.
    :param sharding: where several ranks train ``none``, all of what is trained is on each of them; or ``fsdp``, a part.
    """

    seed: int = 42
    global_batch_size: int = 2048
    micro_batch_size: int | None = None
    sharding: Literal["none", "fsdp"] = "none"
    model: ModelSection = field(default_factory=ModelSection)
    optim: OptimSection = field(default_factory=OptimSection)


@dataclass
class DataSection:
    """Demonstrations, for imitation and rehearsal.

    :param path: a LeRobot dataset; None to have scripted experts play the tasks of ``env.train``.
    :param rename: the dataset's feature names to ours.
    :param episodes_per_task: successful episodes that the experts play of each task.
    :param horizon: environment steps after which an attempt of theirs has failed.
    :param noise_std: of the pushes that lead an expert off its path.
    :param image_size: side of the pictures that are kept, which is what the model reads.
    :param crop: window of the view that experts are shown in: ``workspace``, or ``full``.
    :param hand_view: side of a second picture around the hand, which CompactVLA reads as well; a dataset's is cut from
        its pictures of the full view, where it was not recorded with this one. None for none but a dataset's own.
    :param instruction_bytes: bytes of UTF-8 that a sentence may have.
    """

    path: str | None = None
    rename: dict[str, str] = field(default_factory=dict)
    episodes_per_task: int = 25
    horizon: int = 200
    noise_std: float = 0.5
    image_size: int = 96
    crop: str = "full"
    hand_view: int | None = None
    instruction_bytes: int = INSTRUCTION_BYTES


@dataclass
class SFTSection(SFTSettings):
    """Imitation, by default as published models are fine-tuned; what is not explained here is at
    :class:`sb3_vla.sft.settings.SFTSettings`.

    :param trainable: see ``actor.model.trainable``.
    :param precision: of imitation: ``float32``, ``bf16``, or ``auto`` for what the machine computes faster; None for
        ``actor.model.precision``.
    """

    trainable: str | None = "all"
    steps: int = 20_000
    batch_size: int = 64
    learning_rate: float = 2.5e-5
    warmup_steps: int = 1000
    precision: Literal["float32", "bf16", "auto"] | None = None


@dataclass
class Recipe:
    """Everything about a run."""

    runner: RunnerSection = field(default_factory=RunnerSection)
    algorithm: AlgorithmSection = field(default_factory=AlgorithmSection)
    env: EnvSection = field(default_factory=EnvSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    actor: ActorSection = field(default_factory=ActorSection)
    data: DataSection = field(default_factory=DataSection)
    sft: SFTSection = field(default_factory=SFTSection)

    #: what a recipe of one's own can build on
    BASES: ClassVar[Path] = RECIPES
    #: short names of everyday settings, and RLinf's names of the same things
    ALIASES: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "tasks": ("env.train.tasks", "env.eval.tasks"),
        "suite": ("env.train.task_suite_name", "env.eval.task_suite_name"),
        "renderer": ("env.train.renderer", "env.eval.renderer"),
        "checkpoint": "actor.model.model_path",
        "crop": "actor.model.crop",
        "camera": "actor.model.camera",
        "seed": "actor.seed",
        "iterations": "runner.max_epochs",
        "learning_rate": "actor.optim.lr",
        "num_envs": "env.train.total_num_envs",
        "trials": "env.eval.trials_per_task",
        "actor.model.openpi.noise_level": "actor.model.noise_level",
        "actor.model.openpi.noise_method": "actor.model.noise_method",
        "actor.model.openpi.joint_logprob": "actor.model.joint_logprob",
        "actor.model.openpi.num_steps": "actor.model.num_steps",
        "rollout.model.model_path": "actor.model.model_path",
        "actor.optim.warmup_style": "actor.optim.lr_scheduler",
        "actor.optim.min_lr": "actor.optim.final_lr",
    }
    #: RLinf's keys that would mean nothing here
    REFUSED: ClassVar[dict[str, str]] = {
        "defaults": "a recipe builds on another by base: NAME.yaml",
        "hydra": "there is no Hydra here",
        "runner.max_steps": "give runner.max_epochs",
        "runner.only_eval": "sb3-vla eval measures a checkpoint",
        "runner.resume_dir": "the same command goes on where it was interrupted",
        "runner.ckpt_path": "give actor.model.model_path",
        "algorithm.loss_type": "algorithm.adv_type says it: gae is PPO with a critic, grpo has none",
        "algorithm.loss_agg_func": "give algorithm.normalize_length with grpo",
        "algorithm.reward_type": "a decision's reward is the sum over its chunk",
        "algorithm.entropy_type": "the entropy is that of the chunk",
        "algorithm.kl_penalty": "algorithm.kl_beta weighs the exact divergence",
        "algorithm.bootstrap_type": "the time limit is a part of the task, and the critic sees the time left",
        "algorithm.sampling_params": "give actor.model.noise_kwargs, such as {temperature: 1.6} with tokens",
        "algorithm.eval_rollout_epoch": "give env.eval.trials_per_task",
        "algorithm.reward_coef": "give env.train.reward_coef",
        "env.train.auto_reset": "PPO's environments reset by themselves, GRPO's never do",
        "env.train.max_steps_per_rollout_epoch": "a rollout epoch is env.train.max_episode_steps long",
        "env.train.seed": "actor.seed is that of the environments as well",
        "env.train.group_size": "give algorithm.group_size",
        "env.train.env_type": "the environments are MetaWorld's",
        "env.train.init_params": "pictures are drawn as the checkpoint's model was trained on them",
        "env.eval.auto_reset": "each trial is played once",
        "env.eval.ignore_terminations": "success at any step counts",
        "env.eval.group_size": "give env.eval.trials_per_task",
        "env.eval.env_type": "the environments are MetaWorld's",
        "env.enable_offload": "nothing is moved off the GPU between phases",
        "rollout.enable_offload": "nothing is moved off the GPU between phases",
        "rollout.backend": "the policy acts by the model that learns",
        "actor.enable_offload": "nothing is moved off the GPU between phases",
        "actor.training_backend": "torch trains; start under torchrun for several GPUs",
        "actor.fsdp_config": "start under torchrun for several GPUs, and give actor.sharding=fsdp",
        "actor.checkpoint_save_path": "give runner.logger.log_path",
        "actor.model.openpi.train_expert_only": "give actor.model.trainable: expert, all or adaptive",
        "actor.model.openpi.config_name": "give actor.model.model_type: pi0 or pi05",
        "actor.model.openpi.detach_critic_input": "the critic never bends the features that the actor uses",
        "actor.model.openpi": "its options stand in actor.model",
        "actor.model.add_value_head": "PPO has one, GRPO has none",
        "actor.model.action_dim": "the environments have four",
        "actor.optim.min_lr_rate": "give actor.optim.final_lr",
        "actor.optim.total_training_steps": "a schedule lasts for all of runner.max_epochs",
        "actor.optim.num_cycles": "a cosine falls once, by half a period",
        "actor.optim.lr_warmup_steps": "give algorithm.actor_warmup, in iterations",
        "actor.optim.lr_warmup_steps_ratio": "give algorithm.actor_warmup, in iterations",
        "actor.optim.critic_warmup_steps": "give algorithm.critic_warmup, in iterations",
    }


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package; what some of them share has an underscore before its name."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.name.startswith("_"))


def find_recipe(name: str) -> Path:
    """The file of a recipe: one that comes with the package by its name, or any by its path.

    :raises ConfigError: if there is none; the message offers the nearest.
    """
    path = local_path(name)
    if path.suffix in (".yaml", ".yml"):
        shipped = RECIPES / path
        # Of one that is not there, whoever reads it says so.
        return shipped if shipped.is_file() and not path.exists() else path
    if name not in recipe_names():
        raise ConfigError(f"Unknown recipe {name!r}; {did_you_mean(name, recipe_names())}. sb3-vla train --list")
    return RECIPES / f"{name}.yaml"


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    :param name: see :func:`find_recipe`.
    :param overrides: ``key=value`` strings.
    :raises ConfigError: for a recipe that is not there or does not fit :class:`Recipe`.
    """
    path = find_recipe(name)
    recipe = load_config(Recipe, path, with_run(overrides))
    if recipe.runner.logger.experiment_name is None:
        # Another seed is another run, and does not take the place of the first.
        seed = recipe.actor.seed
        other = "" if seed == load_config(Recipe, path).actor.seed else f"-seed{seed}"
        recipe.runner.logger.experiment_name = f"{path.stem}{other}"
    return recipe


def with_run(overrides: Iterable[str]) -> list[str]:
    """``key=value`` strings in which ``run=FOLDER``, the run's directory, is given by its two keys.

    :raises ConfigError: if that is no name of a folder.
    """
    full: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip() != "run":
            full.append(override)
            continue
        folder = value.strip().strip("\"'")
        place = local_path(folder)
        place = place if place.name else place.resolve()
        if not folder or not place.name:
            raise ConfigError(f"run={value} is no folder for a run; give one such as run=runs/mine")
        full += [
            f"runner.logger.log_path={json.dumps(str(place.parent))}",
            f"runner.logger.experiment_name={json.dumps(place.name)}",
        ]
    return full


def given_keys(name: str, overrides: Iterable[str] = ()) -> list[str]:
    """Keys that somebody set on purpose: on the command line and in a recipe file of their own, and not those of the
    package's recipes or of the files that a recipe builds on.

    Of a section that the command line changes, the file's keys do not count: what it says may turn them off.

    :param name: see :func:`find_recipe`.
    :return: keys; of a short name for two of them ``ONE or OTHER``.
    """
    overrides, file = list(overrides), find_recipe(name)
    _, own = read_layers(file, RECIPES)[-1]
    said = [_keys(override.partition("=")[0].strip()) for override in with_run(overrides)]
    changed = {key.rpartition(".")[0] for keys in said for key in keys}
    paths = [] if file.parent == RECIPES else [path for path in leaves(own) if path.rpartition(".")[0] not in changed]
    return [" or ".join(keys) for keys in [*map(_keys, paths), *said]]


def _keys(given: str) -> tuple[str, ...]:
    """What a key stands for."""
    found = Recipe.ALIASES.get(given, given)
    return (found,) if isinstance(found, str) else found


def summary(name: str) -> str:
    """What a recipe is for: the comment on its first line.

    :param name: see :func:`find_recipe`.
    """
    path = find_recipe(name)
    read_layers(path, RECIPES)  # for the errors
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
