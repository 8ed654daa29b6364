"""Environments that run a list of trials, one after the other, and film some of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mw_envs import Trial
from sb3_vla.common.errors import InputError
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv, available_cores
from sb3_vla.evaluation.protocols import Protocol
from sb3_vla.recording.episodes import EpisodeFilm, FilmOptions

Observation = dict[str, npt.NDArray[Any]]
Actions = npt.NDArray[np.float32]

# Environment arguments that the protocol or the evaluation itself decides.
_FIXED_ENV_KWARGS = ("action_chunk", "horizon", "settle_steps", "terminate_on_success", "tasks", "record_frames")
# A policy decides for a batch at little more than the cost of one, and environments of a process share its scenes.
_ENVS_PER_WORKER = 8


@dataclass(frozen=True)
class VideoOptions(FilmOptions):
    """
    Which episodes are filmed, and how.

    :param per_task: number of trials filmed, the first of each task
    """

    per_task: int = 1


class TrialQueue(gym.Wrapper[Observation, Actions, Observation, Actions]):
    """
    Makes each reset start the trial that was assigned, so that SB3's auto-reset walks a list of trials.

    Without a trial assigned it stands still: it returns its last observation and simulates nothing. An error names the
    trial.

    :param env: a MetaWorld environment
    :param settings: what the environment was made with, for the evaluation to check
    """

    def __init__(self, env: gym.Env[Observation, Actions], settings: dict[str, Any]) -> None:
        super().__init__(env)
        self.settings = settings
        self._assigned: tuple[Trial, VideoOptions | None] | None = None
        self._trial = Trial("", 0, 0)
        self._running = False
        self._video: EpisodeFilm | None = None
        assert isinstance(env.observation_space, spaces.Dict)
        self._observation: Observation = {
            key: np.zeros(space.shape or (), space.dtype) for key, space in env.observation_space.items()
        }

    def assign(self, trial: Trial | None, video: VideoOptions | None = None) -> None:
        """
        Choose what the next reset starts.

        :param trial: the trial; ``None`` to stand still
        :param video: films the episode
        """
        self._assigned = None if trial is None else (trial, video)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the assigned trial; ``seed`` and ``options`` are not looked at."""
        self._discard_video()  # of an evaluation that was broken off
        self._running = self._assigned is not None
        if self._assigned is None:
            return self._observation, {}
        (self._trial, video), self._assigned = self._assigned, None
        with self._trial_in_errors():
            self.unwrapped.record_frames = video is not None  # type: ignore[attr-defined]
            self._observation, info = self.env.reset(options=self._trial._asdict())
            if video is not None:
                self._video = EpisodeFilm(video, info, self.settings["protocol"].horizon)
        return self._observation, info

    def step(self, action: Actions) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Step the running trial, or stand still."""
        if not self._running:
            return self._observation, 0.0, False, False, {}
        with self._trial_in_errors():
            self._observation, reward, terminated, truncated, info = self.env.step(action)
            if self._video is not None:
                self._video.add(info)
                if terminated or truncated:
                    self._video.finish()
                    self._video = None
        return self._observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Give up a film that is not finished, and close the environment."""
        self._discard_video()
        super().close()

    def _discard_video(self) -> None:
        if self._video is not None:
            self._video.discard()
            self._video = None

    @contextmanager
    def _trial_in_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._running = False
            raise RuntimeError(f"{self._trial} failed: {type(error).__name__}: {error}") from error


def make_trial_env(protocol: Protocol, env_kwargs: Mapping[str, Any] | None = None) -> TrialQueue:
    """
    One environment for evaluation, with all 50 tasks.

    :param protocol: a protocol with a chunk
    :param env_kwargs: what the policy sees: ``image_size``, ``crop``, ``camera``, ``renderer``, ``privileged_state``
    :return: the environment, which simulates nothing until a trial is assigned
    :raises ValueError: if the protocol leaves the chunk open, or an argument is unknown, invalid or the protocol's
    """
    chosen = plain_env_kwargs(env_kwargs or {})
    for key in chosen:
        if key in _FIXED_ENV_KWARGS:
            raise InputError(f"env_kwargs must not hold {key!r}: the evaluation decides it; choose another protocol.")
    if protocol.action_chunk is None:
        raise InputError(f"Protocol {protocol.name} leaves the chunk to the policy; give one with dataclasses.replace.")
    try:
        env = gym.make(
            "mw_envs:MetaWorldMT50-v0",
            disable_env_checker=True,
            action_chunk=protocol.action_chunk,
            horizon=protocol.horizon,
            settle_steps=protocol.settle_steps,
            terminate_on_success=protocol.terminate_on_success,
            **chosen,
        )
    except TypeError as error:
        raise InputError(f"env_kwargs={chosen} does not fit the environment: {error}") from error
    return TrialQueue(env, {"protocol": protocol, "env_kwargs": chosen})


def make_trial_vec_env(
    protocol: Protocol,
    env_kwargs: Mapping[str, Any] | None = None,
    *,
    num_envs: int | None = None,
    num_workers: int | None = None,
    start_method: str | None = None,
) -> SharedMemoryVecEnv:
    """
    Environments in worker processes for :func:`~sb3_vla.evaluation.evaluate`; kept open, they serve several of these.

    :param protocol: a protocol with a chunk
    :param env_kwargs: as for :func:`make_trial_env`
    :param num_envs: number of environments, and size of the policy's batch; ``None`` takes eight per worker
    :param num_workers: number of processes; ``None`` takes one per usable core, at most one per environment
    :param start_method: how processes start: ``forkserver``, ``spawn`` or ``fork``; ``None`` as for
        :class:`~sb3_vla.SharedMemoryVecEnv`
    :return: the vector environment
    :raises ValueError: as for :func:`make_trial_env`, or if there is to be no environment or no worker
    :raises RuntimeError: if the workers do not start
    """
    make_trial_env(protocol, env_kwargs).close()  # an invalid argument is a clear error here, a traceback there
    env_fn = functools.partial(make_trial_env, protocol, env_kwargs)
    return SharedMemoryVecEnv([env_fn] * env_count(num_envs, num_workers), start_method, num_workers=num_workers)


def env_count(num_envs: int | None, num_workers: int | None) -> int:
    """Number of environments: what is asked for, else eight per worker process."""
    if num_envs is None:
        return _ENVS_PER_WORKER * (num_workers or available_cores())
    if num_envs < 1:
        raise InputError(f"Expected at least one environment, got num_envs={num_envs}.")
    return num_envs


def plain_env_kwargs(env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back; found out here, not when a long evaluation is to be written."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(env_kwargs)))
    except TypeError as error:
        raise InputError(f"env_kwargs must hold plain numbers, words and lists, got {env_kwargs}: {error}.") from error
    return plain
