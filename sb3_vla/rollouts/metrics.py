"""What a training tells its logger: our names and Stable-Baselines3's, and beside them all of RLinf's.

RLinf's names are those of its embodied runner (``train/actor/...``, ``train/critic/...``, ``rollout/...``, ``env/...``,
``time/...``), so that curves can be laid over one another. A value is what the name says of our training: a success
rate is that of the latest episodes, averaged over tasks, and KL is exact where RLinf's is estimated from samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from stable_baselines3.common.utils import explained_variance
from torch import Tensor

from sb3_vla.rollouts.buffers import SharedRollout

# First letters of names that the table in the terminal leaves out.
_NOT_IN_TERMINAL = (
    "train/actor/",
    "train/critic/",
    "env/success_once/",
    "eval/success_once/",
    "time/generate_rollouts",
    "time/cal_adv_and_returns",
)


class EpisodeRecord(NamedTuple):
    """What is remembered of an episode: success (0 or 1), environment steps, sum of rewards; None where not known."""

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
    """How far the policy is from the rollout's, over all ratios of a minibatch that count.

    :param ratio: of probabilities, any shape.
    :param clipped: to the range of PPO.
    :param bounded: whether the dual clip acts, bool.
    :param counted: 1 for what counts, else 0.
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
    """What an update did.

    :param found: values of the update's minibatches by name.
    :param rollout: what it learned from.
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
    """How the latest episodes went.

    What no episode tells has no metric.

    :param episodes: by task.
    :param ended: how many ended in this rollout.
    :param group: what names begin with: ``env``, or ``eval`` for those of an evaluation.
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
    """Share of successes of each task, 0..1; empty where no episode told of success.

    One that ended without a word, where others tell, was cut before its end: it has not succeeded.
    """
    told = any(each.success is not None for window in episodes.values() for each in window)
    return {
        task: float(np.mean([each.success or 0.0 for each in window]))
        for task, window in sorted(episodes.items())
        if told
    }


def in_terminal(name: str) -> bool:
    """Whether the table in the terminal shows a value: not what has a second name, nor the values of each task."""
    return not name.startswith(_NOT_IN_TERMINAL)


def _spread(values: Tensor) -> dict[str, float]:
    empty = torch.zeros(1)
    values = values if len(values) else empty
    return {"mean": values.mean().item(), "max": values.max().item(), "min": values.min().item()}
