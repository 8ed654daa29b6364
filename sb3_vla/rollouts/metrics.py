"""Metrics of a training under the names of this package, of Stable-Baselines3 and of RLinf.

RLinf's are those of its embodied runner (``train/actor/...``, ``train/critic/...``, ``rollout/...``, ``env/...``,
``time/...``), so that curves can be compared. Two are computed in another way: a success rate is that of the latest
episodes, averaged over tasks, and the KL divergence is exact, where RLinf estimates it from samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from stable_baselines3.common.utils import explained_variance
from torch import Tensor

from sb3_vla.rollouts.buffers import SharedRollout

# Prefixes of the metrics that the table in the terminal leaves out: second names, and values of single tasks.
_NOT_IN_TERMINAL = (
    "train/actor/",
    "train/critic/",
    "env/success_once/",
    "eval/success_once/",
    "time/generate_rollouts",
    "time/cal_adv_and_returns",
)


class EpisodeRecord(NamedTuple):
    """Success (0 or 1), environment steps and sum of rewards of an episode; None where unknown."""

    success: float | None
    length: int | None
    reward: float | None


def rollout_metrics(
    decisions: int, env_steps: int, rewards: float, seconds: float, shares: Mapping[str, float]
) -> dict[str, float]:
    """Reward and speed of a rollout.

    :param decisions: of all ranks, as ``env_steps`` and ``rewards``, the sum of all rewards.
    :param seconds: how long it took.
    :param shares: seconds spent on ``simulation``, ``inference`` and ``advantages``.
    """
    return {
        "rollout/rewards": rewards / decisions,
        "time/generate_rollouts": seconds - shares["advantages"],
        "time/cal_adv_and_returns": shares["advantages"],
        "time/rollout_seconds": seconds,
        "perf/env_steps_per_second": env_steps / seconds,
        "perf/decisions_per_second": decisions / seconds,
        "perf/simulation_share": shares["simulation"] / seconds,
        "perf/inference_share": shares["inference"] / seconds,
    }


def ratio_metrics(ratio: Tensor, clipped: Tensor, bounded: Tensor, counted: Tensor) -> dict[str, float]:
    """Statistics of a minibatch's probability ratios.

    :param ratio: pi / pi_old, any shape.
    :param clipped: the ratio within the clip range.
    :param bounded: where the dual clip acts, bool.
    :param counted: 1 for ratios of executed actions, else 0.
    """
    chosen = counted > 0
    ratio, clipped, bounded = ratio.detach()[chosen], clipped.detach()[chosen], bounded[chosen]
    return {
        "clip_fraction": (ratio != clipped).float().mean().item(),
        "ratio": ratio.mean().item(),
        "ratio_abs": (ratio - 1).abs().mean().item(),
        "clipped_ratio": clipped.mean().item(),
        "dual_clipped_ratio": (ratio * bounded).mean().item(),
        "ratio_max": ratio.max().item(),
    }


def update_metrics(
    found: Mapping[str, Sequence[float]], rollout: SharedRollout, learning_rates: tuple[float, float]
) -> dict[str, float]:
    """Metrics of an update: means over its minibatches, and statistics of its rollout.

    :param found: values of the minibatches by name.
    :param rollout: that the update learned from.
    :param learning_rates: the actor's and the critic's.
    """

    def mean(name: str) -> float:
        return float(np.mean(found[name])) if found.get(name) else 0.0

    values = {
        "actor/loss": mean("policy_loss"),
        "actor/grad_norm": mean("grad_norm"),
        "actor/approx_kl": mean("approx_kl"),
        "actor/pg_clipfrac": mean("clip_fraction"),
        "train/policy_gradient_loss": mean("policy_loss"),
        "train/approx_kl": mean("approx_kl"),
        "train/clip_fraction": mean("clip_fraction"),
        "train/loss": mean("loss"),
        "train/skipped_steps": float(np.sum(found.get("skipped_steps", []))),
        "train/actor_learning_rate": learning_rates[0],
        "train/actor/policy_loss": mean("policy_loss"),
        "train/actor/policy_loss_abs": mean("policy_loss_abs"),
        "train/actor/ratio": mean("ratio"),
        "train/actor/ratio_abs": mean("ratio_abs"),
        "train/actor/clipped_ratio": mean("clipped_ratio"),
        "train/actor/dual_cliped_ratio": mean("dual_clipped_ratio"),  # the spelling is RLinf's
        "train/actor/approx_kl": mean("approx_kl"),
        "train/actor/clip_fraction": mean("clip_fraction"),
        "train/actor/entropy_loss": mean("entropy_loss"),
        "train/actor/total_loss": mean("loss"),
        "train/actor/grad_norm": mean("grad_norm"),
        "train/actor/lr": learning_rates[0],
    }
    for name, of_decisions in {"advantages": rollout.advantages, "returns": rollout.returns}.items():
        values |= {f"rollout/{name}_{which}": value for which, value in _spread(of_decisions).items()}
    if found.get("value_loss"):  # there is a critic
        explained = float(explained_variance(rollout.values.numpy(), rollout.returns.numpy()))
        values |= {
            "actor/value_loss": mean("value_loss"),
            "actor/value_clip_ratio": mean("value_clip_ratio"),
            "train/value_loss": mean("value_loss"),
            "train/explained_variance": explained,
            "train/critic/value_loss": mean("value_loss"),
            "train/critic/value_clip_ratio": mean("value_clip_ratio"),
            "train/critic/explained_variance": explained,
            "train/critic/lr": learning_rates[1],
        }
    return values | {
        f"train/{name}": mean(name) for name in ("entropy_loss", "reference_kl", "rehearsal_loss") if found.get(name)
    }


def episode_metrics(
    episodes: Mapping[str, Iterable[EpisodeRecord]], ended: int, group: str = "env"
) -> dict[str, float]:
    """Success, length and return of the latest episodes; without metrics that no episode reports.

    :param episodes: records by task.
    :param ended: how many ended in this rollout.
    :param group: prefix of the names: ``env``, or ``eval`` for those of an evaluation.
    """
    success = success_rates(episodes)
    known = [each for window in episodes.values() for each in window]
    lengths = [each.length for each in known if each.length is not None]
    rewards = [each.reward for each in known if each.reward is not None]
    told: dict[str, float] = {}
    if success:
        told[f"{group}/success_once"] = float(np.mean(list(success.values())))
    if lengths:
        told[f"{group}/episode_len"] = float(np.mean(lengths))
    if rewards:
        told[f"{group}/return"] = float(np.mean(rewards))
    if lengths and rewards and any(lengths):
        told[f"{group}/reward"] = told[f"{group}/return"] / told[f"{group}/episode_len"]
    if told:
        told[f"{group}/num_trajectories"] = float(ended)
    return told | {f"{group}/success_once/{task}": rate for task, rate in success.items()}


def success_rates(episodes: Mapping[str, Iterable[EpisodeRecord]]) -> dict[str, float]:
    """Share of successes of each task, 0..1; empty where no episode reports success.

    Where others do, an episode that does not was cut by a time limit and has failed.
    """
    told = any(each.success is not None for window in episodes.values() for each in window)
    return {
        task: float(np.mean([each.success or 0.0 for each in window]))
        for task, window in sorted(episodes.items())
        if told
    }


def in_terminal(name: str) -> bool:
    """Whether the table in the terminal shows a metric."""
    return not name.startswith(_NOT_IN_TERMINAL)


def _spread(values: Tensor) -> dict[str, float]:
    empty = torch.zeros(1)
    values = values if len(values) else empty
    return {"mean": values.mean().item(), "max": values.max().item(), "min": values.min().item()}
