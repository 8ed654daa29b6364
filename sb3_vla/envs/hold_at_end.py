"""HoldAtEnd: nothing is simulated between an episode's end and the reset that somebody asked for."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

Observation = dict[str, Any]


class HoldAtEnd(gym.Wrapper[Observation, Any, Observation, Any]):
    """Makes the reset that a vector environment does by itself, as an episode ends, do nothing.

    Stable-Baselines3's vector environments go on with a new episode at once. GRPO waits for the others of the group and
    discards what is played meanwhile; with this wrapper it costs nothing. Until the next reset, steps return the last
    observation, a reward of zero and an empty info.

    :param env: any environment.
    """

    def __init__(self, env: gym.Env[Observation, Any]) -> None:
        super().__init__(env)
        self._ended = self._holding = False
        self._observation: Observation = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Reset, unless it is the first one after an episode's end and has neither seed nor options."""
        self._holding = self._ended and seed is None and not options
        self._ended = False
        if self._holding:
            return self._observation, {}
        self._observation, info = self.env.reset(seed=seed, options=options)
        return self._observation, info

    def step(self, action: Any) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Step, or stand still."""
        if self._holding:
            return self._observation, 0.0, False, False, {}
        self._observation, reward, terminated, truncated, info = self.env.step(action)
        self._ended = bool(terminated or truncated)
        return self._observation, reward, terminated, truncated, info
