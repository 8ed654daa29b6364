"""Options of PPO and GRPO, checked before anything is built; each error names the value and what was expected."""

from __future__ import annotations

import inspect
import math
from numbers import Real
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecFrameStack, unwrap_vec_wrapper

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError
from sb3_vla.data.batches import check_hand_images
from sb3_vla.distributed.fsdp import SHARDING
from sb3_vla.models.lora import has_adapters
from sb3_vla.policies.observations import STACKED

if TYPE_CHECKING:
    from sb3_vla.ppo.ppo import PPO

TASK_SAMPLING = ("uniform", "signal")
GAMMA_PER = ("decision", "env_step")
# Least and greatest value of numbers, which NaN is not between.
_RANGES = (
    ("gamma", 0.0, 1.0),
    ("gae_lambda", 0.0, 1.0),
    *((name, 0.0, math.inf) for name in ("ent_coef", "vf_coef", "kl_coef", "rehearsal_coef", "max_grad_norm")),
    *((name, 0, math.inf) for name in ("critic_warmup", "actor_warmup")),
    *((name, 1, math.inf) for name in ("batch_size", "n_steps", "n_epochs", "rehearsal_batch_size")),
)
# Switches; bf16 may be None as well.
_FLAGS = ("normalize_advantage", "bootstrap_truncated", "overlap", "normalize_length", "bf16")
#: options that are a number or a function of the remaining progress, 1 to 0
SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "clip_range_high", "noise_scale")

_OWN_OPTIONS = (
    "value_lr",
    "clip_range_high",
    "gamma_per",
    "dual_clip",
    "huber_delta",
    "logprob_type",
    "micro_batch_size",
    "kl_coef",
    "critic_warmup",
    "actor_warmup",
    "rehearsal",
    "bf16",
    "bootstrap_truncated",
    "task_sampling",
    "overlap",
    "sharding",
)
_CHOICES = {"gamma_per": GAMMA_PER, "task_sampling": TASK_SAMPLING, "sharding": SHARDING}


def take_schedules(algorithm: PPO) -> None:
    """Turn options that may be schedules into those of Stable-Baselines3.

    :raises ValueError: for a value that is neither a number nor a function, and for an unknown choice.
    """
    for name in SCHEDULES:
        setattr(algorithm, name, _number_or_schedule(name, getattr(algorithm, name)))
    algorithm.noise_scale = FloatSchedule(algorithm.noise_scale)
    if algorithm.clip_range_high is not None:
        algorithm.clip_range_high = FloatSchedule(algorithm.clip_range_high)
    for name, known in _CHOICES.items():
        value = getattr(algorithm, name)
        if value not in known:
            raise InputError(f"Unknown {name}={value!r}; {did_you_mean(str(value), known)}")


def refuse_own_options(algorithm: PPO) -> None:
    """:raises ValueError: for options that act on VLAPolicy alone."""
    from sb3_vla.ppo.ppo import PPO

    defaults = inspect.signature(PPO.__init__).parameters
    if (algorithm.noise_scale(0.0), algorithm.noise_scale(1.0)) != (1.0, 1.0):
        raise InputError(f"noise_scale acts on VLAPolicy alone; got {algorithm.policy_class.__name__}")
    for name in _OWN_OPTIONS:
        if getattr(algorithm, name) != defaults[name].default:
            raise InputError(
                f"{name}={getattr(algorithm, name)!r} acts on VLAPolicy alone; got {algorithm.policy_class.__name__}"
            )


def check_before_building(algorithm: PPO) -> None:
    """Find mistakes before a model of billions of weights is read.

    :raises ValueError: for an option that is out of its range, or that the environments cannot follow.
    """
    _check_flags(algorithm)
    _check_numbers(algorithm)
    check_task_sampling(algorithm)
    # An archive of stable_baselines3.PPO names its own buffer.
    if algorithm.rollout_buffer_class not in (None, DictRolloutBuffer) or algorithm.rollout_buffer_kwargs:
        raise InputError(
            f"rollout_buffer_class={algorithm.rollout_buffer_class!r}, rollout_buffer_kwargs="
            f"{algorithm.rollout_buffer_kwargs!r}: VLAPolicy has its own rollout buffer"
        )


def _check_flags(algorithm: PPO) -> None:
    """:raises ValueError: for a switch that is a string, which Python takes for True."""
    for name in _FLAGS:
        value = getattr(algorithm, name, None)
        if isinstance(value, str):
            raise InputError(f"{name}={value!r}; expected True or False{', or None' if name == 'bf16' else ''}")


def _check_numbers(algorithm: PPO) -> None:
    """:raises ValueError: for a number out of its range, a schedule at either end of the training."""
    rate, clip_range = FloatSchedule(algorithm.learning_rate), FloatSchedule(algorithm.clip_range)
    for left in (0.0, 1.0):
        if not 0 < algorithm.noise_scale(left) < math.inf:
            raise InputError(f"noise_scale is {algorithm.noise_scale(left)} at one end of training; expected above 0")
        for name, schedule in (("learning_rate", rate), ("clip_range", clip_range)):
            if not 0 <= schedule(left) < math.inf:
                raise InputError(f"{name} is {schedule(left)} at one end of training; expected at least 0")
        if algorithm.clip_range_high is not None and not algorithm.clip_range_high(left) >= 0:
            raise InputError(f"clip_range_high is {algorithm.clip_range_high(left)}; expected at least 0")
        if algorithm.clip_range_vf is not None and not FloatSchedule(algorithm.clip_range_vf)(left) > 0:
            raise InputError(f"clip_range_vf={algorithm.clip_range_vf}; expected more than 0, or None")
    for name, least, most in _RANGES:
        value = getattr(algorithm, name, least)
        if not least <= value <= most:
            allowed = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
            raise InputError(f"{name}={value}; expected {allowed}")
    for name, least in {"dual_clip": 1, "huber_delta": 0, "micro_batch_size": 0, "target_kl": 0}.items():
        value = getattr(algorithm, name)
        if value is not None and not value > least:
            raise InputError(f"{name}={value}; expected more than {least}, or None")
    if algorithm.value_lr is not None and not 0 <= algorithm.value_lr < math.inf:
        raise InputError(f"value_lr={algorithm.value_lr}; expected at least 0, or None")
    if algorithm.value_lr is not None and rate(1.0) <= 0:
        raise InputError("value_lr needs a learning_rate schedule that does not begin at zero")
    if algorithm.normalize_advantage and algorithm.batch_size == 1:
        raise InputError("batch_size=1 leaves nothing to normalize; expected at least 2, or normalize_advantage=False")


def check_task_sampling(algorithm: PPO) -> None:
    """:raises ValueError: if the environments cannot draw tasks as ``task_sampling`` says."""
    if (
        algorithm.task_sampling == "signal"
        and algorithm.env is not None
        and not algorithm.env.has_attr("set_task_weights")
    ):
        raise InputError(
            "task_sampling='signal' draws tasks by set_task_weights(weights by task), which these environments do not "
            "have, unlike those of mw_envs; use task_sampling='uniform'"
        )


def check_options(algorithm: PPO) -> None:
    """:raises ValueError: for options that do not fit the policy or one another."""
    stack = None if algorithm.env is None else unwrap_vec_wrapper(algorithm.env, VecFrameStack)
    if stack is not None:  # the observation space does not show that images are stacked along an axis
        raise InputError(f"{type(stack).__name__} gives VLAPolicy several pictures in one. {STACKED}")
    model, distribution = algorithm.policy.model, algorithm.policy.distribution
    distribution.check_trainable(model)
    distribution.check_logprob_type(algorithm.logprob_type)
    if algorithm.ent_coef != 0 and not distribution.has_entropy:
        raise InputError(
            f"ent_coef={algorithm.ent_coef} has nothing to act on: the entropy of this action distribution is fixed. "
            "Set ent_coef=0, or distribution_kwargs=dict(learn_std=True) with the Gaussian, or use flow_noise"
        )
    if algorithm.sharding == "fsdp" and has_adapters(algorithm.policy):
        raise InputError(
            "sharding='fsdp' does not take adapters (lora), which are small enough for every rank to have them "
            "whole; use sharding='none'"
        )
    if algorithm.sharding == "fsdp" and algorithm.kl_coef > 0:
        raise InputError(
            f"kl_coef={algorithm.kl_coef} needs a whole copy of the policy, which sharding='fsdp' has not; choose one"
        )
    if algorithm.rehearsal is not None:
        data = algorithm.rehearsal.demonstrations
        check_hand_images(data, model)
        found = (algorithm.rehearsal.horizon, data.actions.shape[1], data.images.shape[1:3])
        expected = (model.action_horizon, model.action_dim, model.image_size)
        if found != expected:
            raise InputError(
                f"rehearsal has (horizon, action dimensions, image size) {found}; the model needs {expected}"
            )


def check_batch_size(batch_size: int, n_steps: int, n_envs: int, algorithm: str | None = None) -> None:
    """Check that the batch size divides a rollout.

    :param batch_size: decisions of a minibatch.
    :param n_steps: decisions of each environment in a rollout.
    :param n_envs: environments of all ranks.
    :param algorithm: name of the class, which may have been loaded with other environments, for the message.
    :raises ValueError: if it does not; the message names the nearest size that does.
    """
    decisions = n_steps * n_envs
    if decisions % batch_size:
        divisors = [size for size in range(1, decisions + 1) if decisions % size == 0]
        nearest = min(divisors, key=lambda size: abs(size - batch_size))
        fix = f"; for a saved algorithm {algorithm}.load(path, env, batch_size={nearest})" if algorithm else ""
        raise InputError(
            f"batch_size={batch_size} does not divide a rollout of n_steps={n_steps} decisions of {n_envs} "
            f"environments, {decisions} in all; the nearest that does is {nearest}{fix}"
        )


def _number_or_schedule(name: str, value: Any) -> Any:
    """A number as a float, because Stable-Baselines3 takes no NumPy numbers for schedules, or a function as it is.

    :raises ValueError: for anything else.
    """
    optional = name in ("clip_range_vf", "clip_range_high")
    if isinstance(value, Real):
        return float(value)
    if callable(value) or (optional and value is None):
        return value
    or_none = ", None" if optional else ""
    raise InputError(f"{name}={value!r}; expected a number{or_none} or a function of the share of training left")
