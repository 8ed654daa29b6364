"""Films of episodes, made where they are simulated, so that an image never leaves its process.

Every environment step is a frame of the full view, whatever the policy sees. A film appears under its name when the
episode has ended, and not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback

from mw_envs import Trial
from sb3_vla.common.errors import InputError, file_errors
from sb3_vla.common.paths import local_path, writable_folder
from sb3_vla.recording.videos import Mp4Writer, annotate, enlarge

_OUTCOMES = ("success", "failure")
# How long the last image stays, so that the outcome can be read.
_STILL_SECONDS = 0.75
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class FilmOptions:
    """
    How episodes are filmed.

    :param directory: folder of the files ``<task>_seed<seed>_goal<goal>_<success or failure>.mp4``
    :param fps: frames per second; 80 is real time
    :param info: write instruction, task, step, reward and success under each frame
    :param max_mb: megabytes of films that the folder may hold: the oldest are deleted, but never the newest; ``None``
        for no limit
    :raises ValueError: if a number is not positive
    """

    directory: str | Path
    fps: float = 40
    info: bool = True
    max_mb: float | None = None

    def __post_init__(self) -> None:
        # Here and not where films are written: a worker process may have been started with another environment.
        object.__setattr__(self, "directory", local_path(self.directory))
        for name in ("fps", "max_mb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}={value} of films; expected more than 0")

    def prepare(self) -> None:
        """
        Make the folder, and delete the unfinished files of a writer that was killed.

        :raises StorageError: if nothing can be written there
        """
        folder = Path(self.directory)
        with file_errors("write films to", folder):
            writable_folder(folder)
        for leftover in folder.glob(".*.tmp.mp4"):
            leftover.unlink(missing_ok=True)


@dataclass(frozen=True)
class TrainingFilms(FilmOptions):
    """
    Films of a training: of one episode of the first environment, every few iterations.

    :param every: iterations between them, at least 1
    """

    every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise InputError(f"every={self.every} iterations between films; expected at least 1")


def captions(instruction: str, trial: Trial, step: int, horizon: int, reward: float, success: bool) -> list[str]:
    """
    Lines below a frame.

    What changes from frame to frame has a line of its own, which is short enough never to be broken: the frames of a
    video must have one height.

    :param reward: of this environment step
    """
    return [
        instruction,
        f"{trial.task}, goal {trial.goal}",
        f"step {step} of {horizon} · reward {reward:.2f}{' · success' if success else ''}",
    ]


class EpisodeFilm:
    """
    The film of one episode of a :class:`mw_envs.env.MetaWorldEnv` that records its frames.

    :param options: how it is filmed
    :param info: of the reset; like each one given to :meth:`add` it loses its frames, which stay in the process
    :param horizon: environment steps of the episode at most, for the text
    :param prefix: of the file's name
    """

    def __init__(self, options: FilmOptions, info: dict[str, Any], horizon: int, prefix: str = "") -> None:
        self._options, self._horizon = options, horizon
        self._trial = Trial(info["task"], info["trial_seed"], info["goal"])
        self._stem = f"{prefix}{self._trial.task}_seed{self._trial.seed}_goal{self._trial.goal:02d}"
        self._succeeded = False
        self._writer = Mp4Writer(Path(options.directory) / f"{self._stem}.mp4", options.fps)
        self.add(info)

    def add(self, info: dict[str, Any]) -> None:
        """
        Append the frames of a reset or a step.

        :param info: the environment's
        """
        frames, rewards = info.pop("frames"), info.pop("frame_rewards")
        for number, (frame, reward) in enumerate(zip(frames, rewards, strict=True), start=1):
            # The environment tells of success at the end of a chunk, which is the very step where success ends it.
            success = self._succeeded or (info["success_once"] and number == len(frames))
            picture, lines = enlarge(frame), []
            if self._options.info:
                step = info["elapsed_steps"] - len(frames) + number
                lines = captions(info["instruction"], self._trial, step, self._horizon, reward, success)
            self._last = picture, lines
            self._writer.append(annotate(picture, lines, success or None) if lines else picture)
        self._succeeded = info["success_once"]

    def finish(self) -> None:
        """Give the file its name, after the episode's end, and keep the folder within its limit."""
        picture, lines = self._last
        if lines:
            last = lines[-1] if self._succeeded else f"{lines[-1]} · failure"
            picture = annotate(picture, [*lines[:-1], last], self._succeeded)
        for _ in range(round(_STILL_SECONDS * float(self._options.fps))):
            self._writer.append(picture)
        folder = Path(self._options.directory)
        names = {outcome: folder / f"{self._stem}_{outcome}.mp4" for outcome in _OUTCOMES}
        self._writer.path = names.pop("success" if self._succeeded else "failure")
        self._writer.close()
        for other in names.values():  # an earlier evaluation into this folder may have ended the other way
            other.unlink(missing_ok=True)
        if self._options.max_mb is not None:
            _delete_oldest(folder, self._options.max_mb * _MEGABYTE, keep=self._writer.path)

    def discard(self) -> None:
        """Give the film up."""
        self._writer.discard()


def _delete_oldest(folder: Path, most_bytes: float, keep: Path) -> None:
    """Delete films, the oldest first, until the others fit; other processes may do the same meanwhile."""
    films = sorted(_films(folder))
    total = sum(size for _, _, size in films)
    for _, path, size in films:
        if total <= most_bytes:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= size


def _films(folder: Path) -> Iterator[tuple[int, Path, int]]:
    """Time of the last change, path and size of each film."""
    for outcome in _OUTCOMES:
        for path in folder.glob(f"*_{outcome}.mp4"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime_ns, path, found.st_size


class Filmed(gym.Wrapper[Any, Any, Any, Any]):
    """
    Films whole episodes when asked to; what the environment does stays the same.

    :param env: a MetaWorld environment
    :param options: how it is filmed
    """

    def __init__(self, env: gym.Env[Any, Any], options: FilmOptions) -> None:
        super().__init__(env)
        self._options = options
        self._wanted: str | None = None
        self._film: EpisodeFilm | None = None

    def film(self, prefix: str) -> None:
        """
        Film the next episode that begins, from its beginning to its end.

        :param prefix: of the file's name
        """
        self._wanted = prefix

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; an episode that goes on from a snapshot is no whole one, and is not filmed."""
        self._discard()
        wanted, simulator = self._wanted, self.unwrapped
        begins = wanted is not None and "snapshot" not in (options or {})
        simulator.record_frames = begins  # type: ignore[attr-defined]
        observation, info = self.env.reset(seed=seed, options=options)
        if begins:
            assert wanted is not None
            self._film, self._wanted = EpisodeFilm(self._options, info, simulator.horizon, wanted), None  # type: ignore[attr-defined]
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._film is not None:
            self._film.add(info)
            if terminated or truncated:
                self._film.finish()
                self._film = None
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Give up a film that is not finished, and close the environment."""
        self._discard()
        super().close()

    def _discard(self) -> None:
        if self._film is not None:
            self._film.discard()
            self._film = None


class FilmEpisodes(BaseCallback):
    """
    Asks the first environment, which is :class:`Filmed`, for an episode every few iterations.

    :param options: how many, and how
    """

    model: Any

    def __init__(self, options: TrainingFilms) -> None:
        super().__init__()
        self.options = options

    def _on_rollout_start(self) -> None:
        updates = self.model.updates
        if updates % self.options.every == 0:
            self.model.env.env_method("film", f"iteration-{updates + 1:06d}_", indices=[0])

    def _on_step(self) -> bool:
        return True
