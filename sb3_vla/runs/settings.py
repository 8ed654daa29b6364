"""Settings of a training by PPO or GRPO as a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from stable_baselines3.common.type_aliases import Schedule

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError
from sb3_vla.grpo.grpo import GRPO
from sb3_vla.ppo.options import check_batch_size
from sb3_vla.ppo.ppo import PPO


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


@dataclass
class TrainingConfig:
    """What PPO and GRPO have in common for :func:`sb3_vla.runs.training.train`.

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
    """PPO for :func:`sb3_vla.runs.training.train`; what GRPO has too is explained at :class:`TrainingConfig`.

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
    """GRPO for :func:`sb3_vla.runs.training.train`; what PPO has too is explained at :class:`TrainingConfig`, the
    groups at :class:`sb3_vla.GRPO`.

    ``num_envs`` is a multiple or a divisor of ``group_size``.

    :param total_decisions: of all rollouts, those of groups that are dropped included.
    :param group_size: episodes of one trial.
    :param groups: for an update.
    :param max_groups: played for an update, at most; None for four times ``groups``.
    :param success_bounds: least and greatest share of successes of a group that counts.
    :param episode_return: ``reward``, or ``success`` for 1 or 0.
    :param advantage_type: ``standardized`` or ``leave_one_out``.
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
    advantage_type: str = "standardized"
    normalize_length: bool = True

    def arguments(self) -> dict[str, Any]:
        """See :meth:`TrainingConfig.arguments`."""
        return super().arguments() | {"n_groups": self.groups}
