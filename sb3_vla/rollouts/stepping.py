"""Decisions and steps of a rollout: all environments together, or in two halves that overlap."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage
from torch import Tensor

from sb3_vla.common.errors import InputError
from sb3_vla.distributions import Trace
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv

Observations = dict[str, npt.NDArray[Any]]


@dataclass
class Decision:
    """A policy's decisions for N environments.

    :param observation: from :meth:`VLAPolicy.prepare`.
    :param actions: float32 (N, *action shape).
    :param clipped: actions clipped to the bounds of the action space, which the environments execute.
    :param values: of the critic, float32 (N,).
    :param trace: from the distribution.
    """

    observation: dict[str, Tensor]
    actions: npt.NDArray[np.float32]
    clipped: npt.NDArray[np.float32]
    values: Tensor
    trace: Trace


@dataclass
class Outcome:
    """Result of a step of N environments, see ``VecEnv.step``."""

    new_obs: Observations
    rewards: npt.NDArray[np.float32]
    dones: npt.NDArray[np.bool_]
    infos: list[dict[str, Any]]


Decide = Callable[[Observations], Decision]


def check_decision(actions: npt.NDArray[Any], values: Tensor, observations: Mapping[str, npt.NDArray[Any]]) -> None:
    """Check actions and values before the environments step.

    :param actions: of N environments, (N, ...).
    :param values: (N,).
    :param observations: from which the policy computed both, for the message.
    :raises ValueError: if an action or a value is infinite or not a number.
    """
    if np.isfinite(actions).all() and bool(torch.isfinite(values).all()):
        return
    finite = np.isfinite(actions.reshape(len(actions), -1)).all(1) & torch.isfinite(values).cpu().numpy()
    broken = [
        key
        for key, value in observations.items()
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all()
    ]
    cause = (
        f"their observation has such numbers itself, in {', '.join(broken)}: mend the environment"
        if broken
        else "their observations are finite, so the weights are at fault: go back to an earlier checkpoint and lower "
        "learning_rate or max_grad_norm"
    )
    raise InputError(f"Actions or values for {(~finite).sum()} of {len(finite)} environments are not finite; {cause}")


def check_rewards(rewards: npt.NDArray[Any], infos: list[dict[str, Any]]) -> None:
    """Check rewards, one of which would spoil the advantages of the whole rollout.

    :param rewards: (N,).
    :param infos: of the same environments; the message names the task, if they do.
    :raises ValueError: if one is infinite or not a number.
    """
    for i in np.flatnonzero(~np.isfinite(rewards)):
        task = f" (task {infos[i]['task']})" if "task" in infos[i] else ""
        raise InputError(f"Environment {i}{task} gave the reward {rewards[i]}; expected a finite number")


#: prepared observation, chunk, values and trace, from :meth:`VLAPolicy.prepare` and :meth:`VLAPolicy.decide`
Decided = tuple[dict[str, Tensor], Tensor, Tensor, Trace]


class Replicas(Protocol):
    """Copies of the policy that decide in its place, on other accelerators."""

    def take_weights(self) -> None:
        """Copy the learner's weights and noise scale to all replicas."""

    def decide(
        self, observations: Mapping[str, npt.NDArray[Any]], places: npt.NDArray[np.int64], total: int
    ) -> Decided:
        """Decide for N observations.

        :param observations: arrays (N, ...).
        :param places: int64 (N,), the row of each among the ``total`` rows of noise.
        :param total: observations of all ranks.
        """


class Clock:
    """Seconds spent on each kind of work."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Count what runs in this context."""
        started = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - started


def halved(env: VecEnv) -> SharedMemoryVecEnv | None:
    """The vectorized environment that can step its halves one after another, or None.

    None where it is inside another wrapper than Stable-Baselines3's own, which would not see these steps.
    """
    inner = env.venv if isinstance(env, VecTransposeImage) else env
    return inner if isinstance(inner, SharedMemoryVecEnv) and inner.num_envs > 1 else None


def step_together(
    env: VecEnv, decide: Decide, observations: Observations, count: int, clock: Clock
) -> Iterator[tuple[Decision, Outcome]]:
    """Decide for all environments, then step them, ``count`` times.

    :param env: N environments.
    :param decide: the policy.
    :param observations: the present ones.
    :param count: steps.
    :param clock: measures ``inference``, and ``simulation`` as far as it is waited for.
    :return: iterator of decisions and their outcomes.
    """
    for _ in range(count):
        with clock("inference"):
            decision = decide(observations)
        with clock("simulation"):
            outcome = Outcome(*env.step(decision.clipped))  # type: ignore[arg-type]
        yield decision, outcome
        observations = outcome.new_obs


def step_by_halves(
    env: VecEnv, decide: Decide, observations: Observations, count: int, clock: Clock
) -> Iterator[tuple[Decision, Outcome]]:
    """As :func:`step_together`, but one half of the environments simulates while the policy decides for the other.

    When a step is yielded, both halves have begun the next one, if there is a next.

    :param env: one of which :func:`halved` is not None.
    """
    vec_env = halved(env)
    assert vec_env is not None
    halves = vec_env.halves

    def begin(half: int, seen: Observations) -> Decision:
        with clock("inference"):
            decision = decide(seen)
        vec_env.step_half_async(half, decision.clipped)
        return decision

    def end(half: int) -> Outcome:
        with clock("simulation"):
            outcome = Outcome(*vec_env.step_half_wait(half))  # type: ignore[arg-type]
        return _transposed(outcome, env) if isinstance(env, VecTransposeImage) else outcome

    under_way = [begin(half, {key: value[halves[half]] for key, value in observations.items()}) for half in (0, 1)]
    for left in reversed(range(count)):
        decisions, outcomes = list(under_way), []
        for half in (0, 1):
            outcomes.append(end(half))
            if left:
                under_way[half] = begin(half, outcomes[half].new_obs)
        yield _joined(decisions, halves), _joined(outcomes, halves)


def _transposed(outcome: Outcome, env: VecTransposeImage) -> Outcome:
    outcome.new_obs = env.transpose_observations(outcome.new_obs)  # type: ignore[assignment]
    for info in outcome.infos:
        if "terminal_observation" in info:
            info["terminal_observation"] = env.transpose_observations(info["terminal_observation"])
    return outcome


def _joined(of_halves: list[Any], halves: tuple[npt.NDArray[np.int64], ...]) -> Any:
    """The halves' decisions, or outcomes, as those of all environments in their order."""
    order = np.argsort(np.concatenate(halves))
    parts = {field.name: [getattr(half, field.name) for half in of_halves] for field in fields(of_halves[0])}
    return type(of_halves[0])(**{name: _in_order(values, order) for name, values in parts.items()})


def _in_order(parts: list[Any], order: npt.NDArray[np.int64]) -> Any:
    if isinstance(parts[0], dict):
        return {key: _in_order([part[key] for part in parts], order) for key in parts[0]}
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[torch.from_numpy(order).to(parts[0].device)]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)[order]
    joined = [item for part in parts for item in part]
    return [joined[place] for place in order]
