"""Trainings for tests: arguments of the algorithm, of the policy and of the training side by side."""

from __future__ import annotations

import inspect
from typing import Any

from sb3_vla import GRPO, PPO, VLAPolicy
from sb3_vla.runs.settings import Annealed, Training

_SHARED: dict[str, Any] = {
    "num_envs": 16,
    "batch_size": 512,
    "n_epochs": 4,
    "learning_rate": Annealed(1.2e-4, 2e-5),
    "target_kl": 0.03,
    "actor_warmup": 5,
    "trainable": "expert",
    "distribution": "gaussian",
    "distribution_kwargs": {"std": 0.2, "coherence": "offset"},
    "optimizer_kwargs": {"betas": (0.9, 0.95), "weight_decay": 0.0},
    "noise_scale": Annealed(1.0, 0.4),
    "task_sampling": "signal",
    "rehearsal_coef": 0.0,
    "rehearsal_batch_size": 64,
    "seed": 0,
}
_PPO: dict[str, Any] = {
    "n_steps": 128,
    "value_lr": 5e-4,
    "vf_coef": 1.0,
    "critic_warmup": 2,
    "bootstrap_truncated": False,
}


def ppo(iterations: int = 60, **given: Any) -> Training:
    """PPO as the package's recipes set it up, with what is given instead."""
    settings = {**_SHARED, **_PPO, **given}
    return _training(PPO, total_decisions=iterations * settings["num_envs"] * settings["n_steps"], **settings)


def grpo(total_decisions: int = 120_000, **given: Any) -> Training:
    """GRPO as the package's recipes set it up, with what is given instead."""
    return _training(GRPO, total_decisions=total_decisions, **{**_SHARED, "group_size": 8, "n_groups": 12, **given})


def _training(algorithm: type[PPO], *, env: dict[str, Any] | None = None, **given: Any) -> Training:
    horizon = given.pop("horizon", None)
    of_algorithm, of_policy = (inspect.signature(made).parameters for made in (algorithm, VLAPolicy))
    arguments = {name: given.pop(name) for name in list(given) if name in of_algorithm}
    policy = {name: given.pop(name) for name in list(given) if name in of_policy}
    options = {**(env or {}), **({} if horizon is None else {"horizon": horizon})}
    return Training(algorithm, arguments=arguments, policy=policy, env=options, **given)
