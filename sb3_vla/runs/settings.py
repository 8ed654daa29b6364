"""What a training as a run is made of: the arguments of the constructors, and how long it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sb3_vla.common.errors import InputError
from sb3_vla.ppo.ppo import PPO


@dataclass(frozen=True)
class Annealed:
    """A schedule of Stable-Baselines3 from ``first`` to ``last``: ``linear``, or ``cosine`` by half a period.

    As every schedule it is read after a rollout, at the share of the training that has been played by then.
    """

    first: float
    last: float
    shape: str = "linear"

    def __call__(self, remaining: float) -> float:
        """The value where a share ``remaining`` of the training is left; beyond its ends that of the nearest end."""
        share = min(max(remaining, 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.last + (self.first - self.last) * share


@dataclass(frozen=True)
class Training:
    """A training by PPO or GRPO, see :func:`sb3_vla.runs.training.train`.

    :param algorithm: :class:`sb3_vla.PPO` or :class:`sb3_vla.GRPO`.
    :param arguments: of its constructor, but for the policy, the environments and the demonstrations.
    :param policy: arguments of :class:`sb3_vla.VLAPolicy` (``policy_kwargs``), but for the checkpoint.
    :param env: options of the environments, see :class:`mw_envs.env.MetaWorldEnv`, where they differ from what the
        checkpoint's model needs.
    :param num_envs: environments.
    :param total_decisions: of all environments and rollouts.
    :param num_workers: processes that run the environments; None for one a core.
    :param checkpoint_interval: rollouts between checkpoints.
    :param keep_checkpoints: newest checkpoints of the training's state that stay; None for all.
    """

    #: arguments that say how and where a training runs, and leave its result as it is
    INCIDENTAL: ClassVar[frozenset[str]] = frozenset(
        {"device", "gradient_checkpointing", "compile", "cache_perception", "micro_batch_size", "sharding"}
    )

    algorithm: type[PPO]
    total_decisions: int
    num_envs: int
    arguments: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    num_workers: int | None = None
    checkpoint_interval: int = 5
    keep_checkpoints: int | None = 2

    def __post_init__(self) -> None:
        size = "n_steps" if self.algorithm.has_critic else "group_size"
        needed = {
            "arguments": ("batch_size", "seed", size),
            "policy": ("trainable", "distribution", "distribution_kwargs"),
        }
        for part, names in needed.items():
            missing = [name for name in names if name not in getattr(self, part)]
            if missing:
                raise InputError(f"Training lacks {', '.join(missing)} in its {part}; a run needs to know them")

    @property
    def name(self) -> str:
        """``ppo`` or ``grpo``."""
        return self.algorithm.__name__.lower()

    @property
    def decisions_per_unit(self) -> int:
        """Decisions of an iteration, in which progress is told; with GRPO 1, whose rollouts differ in length."""
        return self.num_envs * self.arguments["n_steps"] if self.algorithm.has_critic else 1

    def deciding(self) -> dict[str, Any]:
        """What decides the result, besides the length, which a second start may extend."""
        of_constructors = {"arguments": self.arguments, "policy": self.policy}
        decide = {
            part: {name: value for name, value in given.items() if name not in self.INCIDENTAL}
            for part, given in of_constructors.items()
        }
        return {"algorithm": self.name, "num_envs": self.num_envs, "env": self.env, **decide}
