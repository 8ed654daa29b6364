"""
Evaluation: a fixed list of trials under a named protocol, and a table with intervals.

::

    result = evaluate(model, suite="MT10", trials_per_task=20, env_kwargs={"image_size": 96})
    result.print_table()
    compare(EvaluationResult.from_json("before.json"), result).to_markdown("comparison.md")

Step limit, executed chunk and settling move success by tens of points, so a :class:`Protocol` fixes them and its name
is printed with every result. Each :class:`mw_envs.Trial` runs exactly once, in worker processes. Which worker runs it
does not matter to a policy that is deterministic, up to the rounding that another batch size may cause in a network; a
policy that samples its actions gives other results with another number of workers.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import os
import platform
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from typing import Protocol as TypingProtocol

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from mw_envs import DIFFICULTIES, TASKS, Trial, suite_tasks
from mw_envs.tasks import GOALS_PER_TASK, did_you_mean, select_tasks
from sb3_vla.statistics import (
    Estimate,
    PairedDifference,
    average_weights,
    check_same_trials,
    paired_difference,
    success_interval,
    wilson_interval,
)
from sb3_vla.videos import Mp4Writer, annotate, atomic_path, enlarge, temporary_path

Observation = dict[str, npt.NDArray[Any]]
Actions = npt.NDArray[np.float32]

# Far from the small seeds that training starts its environments with, so that no training episode is a trial.
TRIAL_SEED = 10_000
# Environment arguments that the protocol or the evaluation itself decides.
_FIXED_ENV_KWARGS = ("action_chunk", "horizon", "settle_steps", "terminate_on_success", "tasks", "record_frames")
_FORMAT = "sb3-vla evaluation 1"


class Policy(TypingProtocol):
    """
    What can be evaluated: a Stable-Baselines3 model, or anything with its ``predict`` for batches.

    Images arrive channels last, as the environment draws them. Where there are attributes ``observation_space`` and
    ``action_space``, as SB3's models have them, a misfit is reported before anything is simulated.
    """

    def predict(
        self,
        observation: Observation,
        state: Any = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[Actions, Any]:
        """
        Choose actions.

        :param observation: each array ``(N, ...)``
        :param state: what the call before returned
        :param episode_start: bool, shape ``(N,)``, where an episode has just begun
        :param deterministic: whether to take the mode instead of a sample
        :return: actions ``(N, k, 4)``, or ``(N, 4)`` for a chunk of one, and the state for the next call
        """


@dataclass(frozen=True)
class Protocol:
    """
    What success depends on beside the policy and the trials.

    :param name: printed with every result
    :param horizon: environment steps per episode (80 are one second)
    :param action_chunk: actions executed per decision; ``None`` takes the policy's own chunk
    :param settle_steps: zero actions after a reset, not counted
    :param terminate_on_success: end the episode at the first success. Success at any step counts either way, but only
        an episode that runs on tells whether success lasts (``success_at_end``)
    """

    name: str
    horizon: int
    action_chunk: int | None
    settle_steps: int
    terminate_on_success: bool = True

    def __str__(self) -> str:
        chunk = "the policy's chunk" if self.action_chunk is None else f"chunk {self.action_chunk}"
        return f"{self.name} ({self.horizon} steps, {chunk}, {self.settle_steps} settle steps, success at any step)"


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # RLinf's table: its stand-alone script.
        Protocol("rlinf-160", horizon=160, action_chunk=5, settle_steps=15),
        # RLinf's evaluation within training on MT50, which settles for one step more than the script.
        Protocol("rlinf-100", horizon=100, action_chunk=5, settle_steps=16),
        # LeRobot's evaluation command, with MetaWorld's own step limit.
        Protocol("lerobot-500", horizon=500, action_chunk=None, settle_steps=0),
    )
}


@dataclass(frozen=True)
class VideoOptions:
    """
    Which episodes are filmed. Every environment step is a frame of the full view, whatever the policy sees.

    :param directory: folder of the files ``<task>_seed<seed>_goal<goal>_<success or failure>.mp4``
    :param per_task: number of trials filmed, the first of each task
    :param fps: frames per second; 80 is real time
    """

    directory: str | Path
    per_task: int = 1
    fps: float = 40


@dataclass(frozen=True)
class TrialResult:
    """
    The outcome of one trial.

    :param trial: task, seed and goal
    :param success: whether there was a success at any step
    :param steps_to_success: environment steps until the end of the chunk that brought success; ``None`` without success
    :param length: environment steps of the episode
    :param success_at_end: whether the last step was a success
    """

    trial: Trial
    success: bool
    steps_to_success: int | None
    length: int
    success_at_end: bool


@dataclass(frozen=True)
class TaskRate:
    """Successes of one task, and its rate with the Wilson interval."""

    successes: int
    trials: int
    rate: Estimate


def trials_for(tasks: Sequence[str], trials_per_task: int, seed: int = TRIAL_SEED) -> list[Trial]:
    """
    The fixed trials of an evaluation: goals 0, 1, ... 49 of the table with this seed, then those of the next seed.

    :param tasks: task names
    :param trials_per_task: number of trials of each task, at least 1
    :param seed: seed of the first table of goals
    :return: the trials, task by task
    :raises ValueError: for an unknown or repeated task, no task, or no trial
    """
    if trials_per_task < 1:
        raise ValueError(f"An evaluation needs at least one trial per task, got trials_per_task={trials_per_task}.")
    return [
        Trial(task, int(seed) + number // GOALS_PER_TASK, number % GOALS_PER_TASK)
        for task in select_tasks("MT50", tasks=tasks)
        for number in range(trials_per_task)
    ]


def find_protocol(protocol: str | Protocol) -> Protocol:
    """
    Look a protocol up by name; a protocol itself is returned as it is.

    :param protocol: a name in :data:`PROTOCOLS`, or a protocol of your own
    :return: the protocol
    :raises ValueError: for an unknown name; the message offers the nearest known one
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"Unknown evaluation protocol {protocol!r}; {did_you_mean(protocol, PROTOCOLS)}.")
    return PROTOCOLS[protocol]


class TrialQueue(gym.Wrapper[Observation, Actions, Observation, Actions]):
    """
    Makes each reset start the trial that was assigned, so that SB3's auto-reset walks a list of trials.

    Without a trial assigned it stands still: it returns its last observation and simulates nothing. What goes wrong
    comes back as ``info["failure"]``, because a worker process that dies takes its error message with it.

    :param env: a MetaWorld environment
    :param settings: what the environment was made with, for :func:`evaluate` to check
    """

    def __init__(self, env: gym.Env[Observation, Actions], settings: dict[str, Any]) -> None:
        super().__init__(env)
        self.settings = settings
        self._assigned: tuple[Trial, VideoOptions | None] | None = None
        self._trial = Trial("", 0, 0)
        self._running = False
        self._video: Mp4Writer | None = None
        assert isinstance(env.observation_space, spaces.Dict)
        self._observation: Observation = {
            key: np.zeros(space.shape or (), space.dtype) for key, space in env.observation_space.items()
        }

    def assign(self, trial: Trial, video: VideoOptions | None = None) -> None:
        """
        Choose what the next reset starts.

        :param trial: the trial
        :param video: films the episode
        """
        self._assigned = (trial, video)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the assigned trial; ``seed`` and ``options`` are not looked at."""
        self._discard_video()  # of an evaluation that was broken off
        self._running = self._assigned is not None
        if self._assigned is None:
            return self._observation, {}
        (self._trial, video), self._assigned = self._assigned, None
        try:
            self.unwrapped.record_frames = video is not None  # type: ignore[attr-defined]
            self._observation, info = self.env.reset(options=self._trial._asdict())
            if video is not None:
                name = f"{self._trial.task}_seed{self._trial.seed}_goal{self._trial.goal:02d}.mp4"
                self._video = Mp4Writer(Path(video.directory) / name, video.fps)
                self._film(self._video, info)
        except Exception as error:
            return self._observation, self._failed(error)
        return self._observation, info

    def step(self, action: Actions) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Step the running trial, or stand still."""
        if not self._running:
            return self._observation, 0.0, False, False, {}
        try:
            self._observation, reward, terminated, truncated, info = self.env.step(action)
            if self._video is not None:
                self._film(self._video, info)
                if terminated or truncated:
                    self._finish(self._video, info["success_once"])
        except Exception as error:
            return self._observation, 0.0, False, False, self._failed(error)
        return self._observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Give up a film that is not finished, and close the environment."""
        self._discard_video()
        super().close()

    def _film(self, video: Mp4Writer, info: dict[str, Any]) -> None:
        frames = info.pop("frames")  # they stay in the worker
        for number, frame in enumerate(frames, start=1):
            # The environment tells of success at the end of a chunk, which is the very step where success ends it.
            success = info["success_once"] and number == len(frames)
            step = info["elapsed_steps"] - len(frames) + number
            status = (
                f"{self._trial.task}, goal {self._trial.goal}  ·  step {step} of {self.settings['protocol'].horizon}"
            )
            lines = [info["instruction"], status + ("  ·  success" if success else "")]
            self._last_frame = annotate(enlarge(frame), lines, success)
            video.append(self._last_frame)

    def _finish(self, video: Mp4Writer, success: bool) -> None:
        for _ in range(round(0.75 * float(video.fps))):  # the outcome stays readable
            video.append(self._last_frame)
        stem = video.path.stem
        names = {outcome: video.path.with_name(f"{stem}_{outcome}.mp4") for outcome in ("success", "failure")}
        video.path = names.pop("success" if success else "failure")
        video.close()
        self._video = None
        for other in names.values():  # an earlier evaluation into this folder may have ended the other way
            other.unlink(missing_ok=True)

    def _discard_video(self) -> None:
        if self._video is not None:
            self._video.discard()
            self._video = None

    def _failed(self, error: Exception) -> dict[str, Any]:
        self._running = False
        return {"failure": f"{type(error).__name__}: {error}"}


def make_trial_env(protocol: Protocol, env_kwargs: Mapping[str, Any] | None = None) -> TrialQueue:
    """
    One environment for evaluation, with all 50 tasks.

    :param protocol: a protocol with a chunk
    :param env_kwargs: what the policy sees: ``image_size``, ``crop``, ``camera``, ``renderer``, ``privileged_state``
    :return: the environment, which simulates nothing until a trial is assigned
    :raises ValueError: if the protocol leaves the chunk open, or an argument is unknown, invalid or the protocol's
    """
    chosen = _plain(env_kwargs or {})
    for key in chosen:
        if key in _FIXED_ENV_KWARGS:
            raise ValueError(f"env_kwargs must not hold {key!r}: the evaluation decides it; choose another protocol.")
    if protocol.action_chunk is None:
        raise ValueError(f"Protocol {protocol.name} leaves the chunk to the policy; give one with dataclasses.replace.")
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
        raise ValueError(f"env_kwargs={chosen} does not fit the environment: {error}") from error
    return TrialQueue(env, {"protocol": protocol, "env_kwargs": chosen})


def make_trial_vec_env(
    protocol: Protocol,
    env_kwargs: Mapping[str, Any] | None = None,
    *,
    num_envs: int,
    start_method: str = "forkserver",
) -> SubprocVecEnv:
    """
    Worker processes for :func:`evaluate`; kept alive, they serve several evaluations without starting again.

    :param protocol: a protocol with a chunk
    :param env_kwargs: as for :func:`make_trial_env`
    :param num_envs: number of workers
    :param start_method: how processes start: ``forkserver``, ``spawn`` or ``fork``
    :return: the vector environment
    :raises ValueError: as for :func:`make_trial_env`
    :raises RuntimeError: if the workers do not start
    """
    make_trial_env(protocol, env_kwargs).close()  # an invalid argument is a clear error here, a dead process there
    try:
        return SubprocVecEnv([functools.partial(make_trial_env, protocol, env_kwargs)] * num_envs, start_method)
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(
            "The evaluation's worker processes did not start; their own message stands above. A script must call "
            'evaluate() under `if __name__ == "__main__":`, because the workers import it.'
        ) from error


def evaluate(
    policy: Policy,
    *,
    tasks: Sequence[str] | None = None,
    suite: str | None = None,
    split: str = "train",
    trials_per_task: int = 20,
    trial_seed: int = TRIAL_SEED,
    protocol: str | Protocol = "rlinf-160",
    num_envs: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    deterministic: bool = True,
    videos: VideoOptions | Mapping[str, Any] | None = None,
    progress: bool = True,
    start_method: str = "forkserver",
    vec_env: VecEnv | None = None,
) -> EvaluationResult:
    """
    Run a policy once in each trial.

    :param policy: a Stable-Baselines3 model, or anything with its ``predict`` for batches
    :param tasks: task names; give either these or a suite
    :param suite: ``MT10``, ``MT50``, ``ML10`` or ``ML45``
    :param split: ``train``, or ``test`` for the held-out tasks of ML10 and ML45
    :param trials_per_task: the trials are those of :func:`trials_for`; on MT50, 10 per task leave an uncertainty of
        about 5 points of the average, 50 per task about 2
    :param trial_seed: seed of the trials
    :param protocol: a name in :data:`PROTOCOLS`, or a protocol of your own
    :param num_envs: number of worker processes, and size of the policy's batch; ``None`` takes one per CPU core
    :param env_kwargs: what the policy sees: ``image_size``, ``crop``, ``camera``, ``renderer``, ``privileged_state``
    :param deterministic: passed to ``predict``
    :param videos: films the first trials of each task
    :param progress: shows a progress bar
    :param start_method: how worker processes start
    :param vec_env: run on these environments, made by :func:`make_trial_vec_env`, which stay open; ``num_envs`` and
        ``start_method`` are theirs then
    :return: the outcomes, in the order of the trials
    :raises ValueError: for unknown names, no trials, or a policy that does not fit the environment
    :raises RuntimeError: if a worker stops; none is left behind then, nor after Ctrl-C
    """
    trials = trials_for(_chosen_tasks(tasks, suite, split), trials_per_task, trial_seed)
    resolved = _with_chunk(find_protocol(protocol), policy)
    films = videos if videos is None or isinstance(videos, VideoOptions) else VideoOptions(**videos)
    if vec_env is not None:
        settings = _settings_of(vec_env, resolved, env_kwargs)
        _check_spaces(policy, vec_env.observation_space, vec_env.action_space)
        outcomes = _run(policy, vec_env, trials, deterministic, films, progress)
    else:
        probe = make_trial_env(resolved, env_kwargs)
        settings = probe.settings
        _check_spaces(policy, probe.observation_space, probe.action_space)
        workers = min(len(trials), _worker_count(num_envs))
        own = make_trial_vec_env(resolved, env_kwargs, num_envs=workers, start_method=start_method)
        with _closing(own, films):
            outcomes = _run(policy, own, trials, deterministic, films, progress)
    return EvaluationResult(resolved, outcomes, _versions(), settings["env_kwargs"], deterministic)


def _chosen_tasks(tasks: Sequence[str] | None, suite: str | None, split: str) -> Sequence[str]:
    if tasks is not None and suite is None:
        return tasks
    if tasks is None and suite is not None:
        return suite_tasks(suite, split)
    raise ValueError(f"Give either tasks=[...] or a suite such as 'MT10', got tasks={tasks!r} and suite={suite!r}.")


def _with_chunk(protocol: Protocol, policy: Policy) -> Protocol:
    if protocol.action_chunk is not None:
        return protocol
    space = getattr(policy, "action_space", None)
    if not isinstance(space, spaces.Box):
        raise ValueError(
            f"Protocol {protocol.name} executes the policy's own chunk, but {type(policy).__name__} has no "
            "action_space to tell it. Give it Box(-1, 1, (k, 4)), or use dataclasses.replace(protocol, action_chunk=k)."
        )
    return dataclasses.replace(protocol, action_chunk=space.shape[0] if len(space.shape) == 2 else 1)


def _worker_count(num_envs: int | None) -> int:
    if num_envs is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_envs < 1:
        raise ValueError(f"Expected at least one worker process, got num_envs={num_envs}.")
    return num_envs


def _settings_of(vec_env: VecEnv, protocol: Protocol, env_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if not all(vec_env.env_is_wrapped(TrialQueue)):
        raise ValueError("vec_env cannot follow a list of trials; make it with sb3_vla.evaluation.make_trial_vec_env.")
    settings: dict[str, Any] = vec_env.get_attr("settings")[0]
    for name, wanted in (("protocol", protocol), ("env_kwargs", None if env_kwargs is None else _plain(env_kwargs))):
        if wanted is not None and wanted != settings[name]:
            raise ValueError(f"vec_env was made with {name}={settings[name]}, but the evaluation asks for {wanted}.")
    return settings


def _plain(env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back; found out here, not when a long evaluation is to be written."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(env_kwargs)))
    except TypeError as error:
        raise ValueError(f"env_kwargs must hold plain numbers, words and lists, got {env_kwargs}: {error}.") from error
    return plain


def _check_spaces(policy: Policy, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Compare what the policy says about itself, if it does, with the environment."""
    assert isinstance(observation_space, spaces.Dict)
    wanted = getattr(policy, "observation_space", None)
    for key, space in wanted.items() if isinstance(wanted, spaces.Dict) else ():
        given = observation_space.spaces.get(key)
        # Sorted, since a model's image may be channels first.
        if given is None or sorted(given.shape or ()) != sorted(space.shape or ()):
            came = "does not have it" if given is None else f"gives {given.shape}"
            raise ValueError(
                f"The policy reads {key!r} of shape {space.shape}, the environment {came}. Pass what the policy was "
                "trained with, e.g. env_kwargs={'image_size': 96, 'crop': 'workspace', 'privileged_state': True}."
            )
    actions = getattr(policy, "action_space", None)
    if actions is not None and actions.shape != action_space.shape:
        raise _misfit(f"decides actions of shape {actions.shape}", action_space.shape)


def _misfit(what: str, expected: tuple[int, ...] | None) -> ValueError:
    return ValueError(
        f"The policy {what}, but the protocol executes {expected} per decision. Use a protocol with the policy's "
        "chunk: dataclasses.replace(PROTOCOLS['rlinf-160'], name='...', action_chunk=k)."
    )


@contextmanager
def _closing(vec_env: SubprocVecEnv, films: VideoOptions | None) -> Iterator[None]:
    """Close the workers; after an error or Ctrl-C end them at once, for they may hang in the middle of a step."""
    try:
        yield
        vec_env.close()
    except BaseException:
        for process in vec_env.processes:
            process.terminate()
        for process in vec_env.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
            unfinished = temporary_path(Path("*.mp4"), process.pid).name
            for video in Path(films.directory).glob(unfinished) if films else ():
                video.unlink(missing_ok=True)
        for remote in vec_env.remotes:
            remote.close()
        vec_env.closed = True
        raise


class _Schedule:
    """
    Deals trials out to workers.

    A worker keeps to a task while it has trials left, then takes one that nobody has begun, then helps where most is
    left: a task's first episode in a process constructs its scene, which takes longer than an episode.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._left: dict[str, deque[int]] = {}
        for index, trial in enumerate(trials):
            self._left.setdefault(trial.task, deque()).append(index)
        self._untouched = deque(self._left)
        self._task_of_worker: dict[int, str] = {}

    def next(self, worker: int) -> int | None:
        """Index of the worker's next trial; ``None`` when all have been dealt out."""
        task = self._task_of_worker.get(worker)
        if task is None or not self._left[task]:
            most_left = max(self._left, key=lambda name: len(self._left[name]))
            task = self._untouched.popleft() if self._untouched else most_left
            self._task_of_worker[worker] = task
        return self._left[task].popleft() if self._left[task] else None


@dataclass
class _Worker:
    """What a worker does, as indices of trials: the one it runs, and the one that its next auto-reset starts."""

    running: int | None = None
    coming: int | None = None
    first_success: int | None = None


class _Run:
    """One pass through the trials."""

    def __init__(self, vec_env: VecEnv, trials: Sequence[Trial], films: VideoOptions | None) -> None:
        self.vec_env = vec_env
        self.trials = trials
        self.outcomes: dict[int, TrialResult] = {}
        self._films = films
        self._filmed = _first_of_each_task(trials, films.per_task) if films else set()
        self._schedule = _Schedule(trials)
        self._workers = [_Worker() for _ in range(vec_env.num_envs)]

    def start(self) -> Observation:
        """Start a trial in each worker."""
        for number in range(self.vec_env.num_envs):
            self._assign(number)
        observations = self.vec_env.reset()
        self._raise_failure(self.vec_env.reset_infos, starting=True)
        for number in range(self.vec_env.num_envs):
            self._assign(number)
        assert isinstance(observations, dict)
        return observations

    def step(self, actions: Actions) -> tuple[Observation, npt.NDArray[np.bool_], list[TrialResult]]:
        """Execute a decision in each worker; with the observations come the outcomes of the trials that ended."""
        self._check_actions(actions)
        observations, _, dones, infos = self.vec_env.step(actions)
        self._raise_failure(infos, starting=False)
        self._raise_failure(self.vec_env.reset_infos, starting=True)
        ended = []
        for number, (worker, info) in enumerate(zip(self._workers, infos, strict=True)):
            if worker.running is None:
                continue
            if info["success_once"] and worker.first_success is None:
                worker.first_success = int(info["elapsed_steps"])
            if dones[number]:
                trial = Trial(info["task"], info["trial_seed"], info["goal"])
                if trial != self.trials[worker.running]:
                    raise RuntimeError(f"Worker {number} ran {trial} instead of {self.trials[worker.running]}.")
                success, at_end = bool(info["success_once"]), bool(info["success"])
                outcome = TrialResult(trial, success, worker.first_success, int(info["elapsed_steps"]), at_end)
                self.outcomes[worker.running] = outcome
                ended.append(outcome)
                self._assign(number)
        assert isinstance(observations, dict)
        return observations, dones, ended

    def doing(self, number: int, starting: bool = False) -> str:
        """A worker and its trial, for an error message."""
        index = self._workers[number].coming if starting else self._workers[number].running
        return f"worker {number}, " + ("without a trial" if index is None else str(self.trials[index]))

    def _assign(self, number: int) -> None:
        coming = self._schedule.next(number)
        self._workers[number] = _Worker(running=self._workers[number].coming, coming=coming)
        if coming is not None:
            film = self._films if coming in self._filmed else None
            self.vec_env.env_method("assign", self.trials[coming], film, indices=[number])

    def _raise_failure(self, infos: Sequence[Mapping[str, Any]], starting: bool) -> None:
        for number, info in enumerate(infos):
            if "failure" in info:
                raise RuntimeError(f"The environment failed ({self.doing(number, starting)}): {info['failure']}")

    def _check_actions(self, actions: Actions) -> None:
        shape = getattr(actions, "shape", None)
        expected = (self.vec_env.num_envs, *(self.vec_env.action_space.shape or ()))
        if shape != expected:
            raise _misfit(f"returned actions of shape {shape} for {expected[0]} observations", expected[1:])
        finite = np.isfinite(actions).reshape(len(actions), -1).all(axis=1)
        if not finite.all():
            number = int(np.argmin(finite))
            raise ValueError(f"The policy's action is not finite ({self.doing(number)}): {actions[number].tolist()}")


def _run(
    policy: Policy,
    vec_env: VecEnv,
    trials: Sequence[Trial],
    deterministic: bool,
    films: VideoOptions | None,
    progress: bool,
) -> tuple[TrialResult, ...]:
    run = _Run(vec_env, trials, films)
    try:
        with _progress_bar(len(trials), progress) as report:
            observations = run.start()
            state, episode_start = None, np.ones(vec_env.num_envs, dtype=bool)
            while len(run.outcomes) < len(trials):
                actions, state = policy.predict(
                    observations, state=state, episode_start=episode_start, deterministic=deterministic
                )
                observations, episode_start, ended = run.step(actions)
                report(ended)
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(_obituary(vec_env, run)) from error
    return tuple(run.outcomes[index] for index in range(len(trials)))


def _first_of_each_task(trials: Sequence[Trial], per_task: int) -> set[int]:
    """Indices of the first trials of each task."""
    seen: Counter[str] = Counter()
    chosen = set()
    for index, trial in enumerate(trials):
        seen[trial.task] += 1
        if seen[trial.task] <= per_task:
            chosen.add(index)
    return chosen


@contextmanager
def _progress_bar(total: int, enabled: bool) -> Iterator[Callable[[Sequence[TrialResult]], None]]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("episodes, success {task.fields[rate]}"))
    bar = Progress(TextColumn("Evaluating"), *columns, TimeRemainingColumn(), disable=not enabled, transient=True)
    row = bar.add_task("", total=total, rate="-")
    done: list[TrialResult] = []

    def report(ended: Sequence[TrialResult]) -> None:
        if ended:
            done.extend(ended)
            rate = sum(outcome.success for outcome in done) / len(done)
            bar.update(row, completed=len(done), rate=f"{rate:.0%}")

    with bar:
        yield report


def _obituary(vec_env: VecEnv, run: _Run) -> str:
    """Which worker process died, and of what."""
    dead = []
    for number, process in enumerate(getattr(vec_env, "processes", ())):
        process.join(timeout=0.5)
        if not process.is_alive():
            dead.append(f"{run.doing(number)}, exit code {process.exitcode}")
    return (
        f"A worker process of the evaluation stopped ({'; '.join(dead) or 'unknown which'}). Exit code -9 usually "
        "means that memory ran out: use a smaller num_envs. Other codes: its own message stands above."
    )


def _versions() -> dict[str, str]:
    packages = {package: version(package) for package in ("metaworld", "mujoco", "numpy")}
    return packages | {"python": platform.python_version()}


class _Report(abc.ABC):
    """What has a table for the terminal and for Markdown."""

    @abc.abstractmethod
    def _table(self) -> _Table: ...

    def to_markdown(self, path: str | Path | None = None) -> str:
        """
        The table as Markdown.

        :param path: also written to this file
        :return: the text
        """
        return _written(self._table().markdown(), path)

    def print_table(self, console: Console | None = None) -> None:
        """
        Print the table to a terminal.

        :param console: where to; ``None`` takes the standard output
        """
        self._table().print(console or Console())


@dataclass(frozen=True)
class EvaluationResult(_Report):
    """
    What an evaluation measured.

    ``average()`` is the field's headline number, the mean of the means of the difficulty groups; ``mean_over_tasks()``
    counts all tasks the same. Intervals are at 95 %: a bootstrap over trials, and for a single task Wilson's.

    :param protocol: the protocol, with the chunk that was executed
    :param trials: outcomes in the order of the trials
    :param versions: versions of what decides the simulation
    :param env_kwargs: what the policy saw, as far as it was not the default
    :param deterministic: whether the policy was asked for the mode; if not, the result is one sample
    """

    protocol: Protocol
    trials: tuple[TrialResult, ...]
    versions: dict[str, str]
    env_kwargs: dict[str, Any]
    deterministic: bool = True

    @property
    def successes(self) -> dict[Trial, bool]:
        """Success by trial."""
        return {outcome.trial: outcome.success for outcome in self.trials}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, from easy to very hard."""
        return tuple(task for tasks in self.groups.values() for task in tasks)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The tasks of each difficulty group that has any here."""
        names = sorted({outcome.trial.task for outcome in self.trials})
        groups = {group: tuple(name for name in names if TASKS[name].difficulty == group) for group in DIFFICULTIES}
        return {group: tasks for group, tasks in groups.items() if tasks}

    def per_task(self) -> dict[str, TaskRate]:
        """Successes, trials and rate of each task."""
        trials = Counter(outcome.trial.task for outcome in self.trials)
        won = Counter(outcome.trial.task for outcome in self.trials if outcome.success)
        return {
            task: TaskRate(won[task], trials[task], wilson_interval(won[task], trials[task])) for task in self.tasks
        }

    def per_difficulty(self) -> dict[str, Estimate]:
        """Mean over the tasks of each difficulty group that has any here."""
        return {group: self.restricted_to(tasks).mean_over_tasks() for group, tasks in self.groups.items()}

    def average(self) -> Estimate:
        """Mean of the group means. A group without a task here is left out; :attr:`groups` has the others."""
        return self._mean(average_weights([TASKS[task].difficulty for task in self.tasks]))

    def mean_over_tasks(self) -> Estimate:
        """Mean over the tasks."""
        return self._mean(None)

    def mean_success_at_end(self) -> Estimate | None:
        """Mean over the tasks of success at the last step; ``None`` where episodes end at the first success."""
        if self.protocol.terminate_on_success:
            return None
        at_end = tuple(dataclasses.replace(outcome, success=outcome.success_at_end) for outcome in self.trials)
        return dataclasses.replace(self, trials=at_end).mean_over_tasks()

    def restricted_to(self, tasks: Sequence[str]) -> EvaluationResult:
        """
        The same measurement of some of the tasks.

        :param tasks: task names
        :return: the result with their trials only
        :raises ValueError: if there is no task, or one that was not evaluated
        """
        if not tasks:
            raise ValueError("Expected at least one task, got none.")
        for task in tasks:
            if task not in self.tasks:
                raise ValueError(f"Task {task!r} was not evaluated; {did_you_mean(task, self.tasks)}.")
        return dataclasses.replace(
            self, trials=tuple(outcome for outcome in self.trials if outcome.trial.task in tasks)
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """
        The result as JSON: a summary for other programs, and one line per trial.

        :param path: also written to this file
        :return: the text
        """
        head = {
            "format": _FORMAT,
            "protocol": dataclasses.asdict(self.protocol),
            "env_kwargs": self.env_kwargs,
            "deterministic": self.deterministic,
            "versions": self.versions,
            "average": self.average()._asdict() | {"groups": list(self.groups)},
            "mean_over_tasks": self.mean_over_tasks()._asdict(),
            "per_difficulty": {group: mean._asdict() for group, mean in self.per_difficulty().items()},
            "per_task": {
                task: {"successes": rate.successes, "trials": rate.trials} | rate.rate._asdict()
                for task, rate in self.per_task().items()
            },
        }
        rows = [outcome.trial._asdict() | _without(vars(outcome), "trial") for outcome in self.trials]
        lines = ",\n    ".join(json.dumps(row) for row in rows)
        text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "trials": [\n    {lines}\n  ]\n}}\n'
        return _written(text, path)

    @classmethod
    def from_json(cls, path: str | Path) -> EvaluationResult:
        """
        Read a result that :meth:`to_json` wrote.

        :param path: the file
        :return: an equal result
        :raises ValueError: if the file is not one
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            if stored["format"] != _FORMAT:
                raise ValueError(f"its format is {stored['format']!r}")
            trials = tuple(
                TrialResult(Trial(row["task"], row["seed"], row["goal"]), **_without(row, *Trial._fields))
                for row in stored["trials"]
            )
            protocol = Protocol(**stored["protocol"])
            return cls(protocol, trials, stored["versions"], stored["env_kwargs"], stored["deterministic"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of the format {_FORMAT!r}: {error!r}.") from error

    def _mean(self, weights: npt.NDArray[np.float64] | None) -> Estimate:
        rates = self.per_task().values()
        return success_interval([rate.successes for rate in rates], [rate.trials for rate in rates], weights)

    def _table(self) -> _Table:
        rates, means = self.per_task(), self.per_difficulty()
        sections = [
            [(task, f"{rates[task].successes}/{rates[task].trials}", *_percent(rates[task].rate)) for task in tasks]
            for tasks in self.groups.values()
        ]
        summary = [(_title(group), "", *_percent(mean)) for group, mean in means.items()]
        summary.append((_average_title(self.groups), "", *_percent(self.average())))
        summary.append(("Mean over tasks", "", *_percent(self.mean_over_tasks())))
        at_end = self.mean_success_at_end()
        if at_end is not None:
            summary.append(("Mean over tasks at the last step", "", *_percent(at_end)))
        columns = ("Task", "Successes", "Success %", "95 % interval")
        return _Table(self.protocol, columns, sections, summary, [*_missing_groups(self.groups), _circumstances(self)])


@dataclass(frozen=True)
class Comparison(_Report):
    """
    Two evaluations on the same trials, made by :func:`compare`.

    :param before: the first
    :param after: the second
    :param names: their names in tables and figures
    """

    before: EvaluationResult
    after: EvaluationResult
    names: tuple[str, str] = ("before", "after")

    def per_task(self) -> dict[str, PairedDifference]:
        """Paired difference of each task."""
        return {task: self.restricted_to([task]).mean_over_tasks() for task in self.before.tasks}

    def per_difficulty(self) -> dict[str, PairedDifference]:
        """Paired difference of the mean of each difficulty group that has a task here."""
        return {group: self.restricted_to(tasks).mean_over_tasks() for group, tasks in self.before.groups.items()}

    def average(self) -> PairedDifference:
        """Paired difference of the mean of the group means."""
        weights = average_weights([TASKS[task].difficulty for task in self.before.tasks]).tolist()
        by_task = dict(zip(self.before.tasks, weights, strict=True))
        return paired_difference(self.before.successes, self.after.successes, by_task)

    def mean_over_tasks(self) -> PairedDifference:
        """Paired difference of the mean over tasks."""
        return paired_difference(self.before.successes, self.after.successes)

    def restricted_to(self, tasks: Sequence[str]) -> Comparison:
        """
        The same comparison of some of the tasks.

        :param tasks: task names
        :return: the comparison of their trials only
        :raises ValueError: if there is no task, or one that was not evaluated
        """
        return Comparison(self.before.restricted_to(tasks), self.after.restricted_to(tasks), self.names)

    def to_json(self, path: str | Path | None = None) -> str:
        """
        The comparison as JSON; the trials themselves are in the two results.

        :param path: also written to this file
        :return: the text
        """
        tasks, groups, (average, mean) = self._entries()
        content = {
            "format": "sb3-vla comparison 1",
            "protocol": dataclasses.asdict(self.before.protocol),
            "names": list(self.names),
            "average": average.json() | {"groups": list(groups)},
            "mean_over_tasks": mean.json(),
            "per_difficulty": {group: entry.json() for group, entry in groups.items()},
            "per_task": {task: entry.json() for task, entry in tasks.items()},
        }
        return _written(json.dumps(content, indent=2) + "\n", path)

    def _entries(self) -> tuple[dict[str, _Entry], dict[str, _Entry], tuple[_Entry, _Entry]]:
        """What stands in the table: by task, by group, and the two means."""
        one, other = self.before.per_task(), self.after.per_task()
        tasks = {task: _Entry(one[task].rate, other[task].rate, paired) for task, paired in self.per_task().items()}
        before, after = self.before.per_difficulty(), self.after.per_difficulty()
        groups = {group: _Entry(before[group], after[group], paired) for group, paired in self.per_difficulty().items()}
        average = _Entry(self.before.average(), self.after.average(), self.average())
        mean = _Entry(self.before.mean_over_tasks(), self.after.mean_over_tasks(), self.mean_over_tasks())
        return tasks, groups, (average, mean)

    def _table(self) -> _Table:
        tasks, groups, (average, mean) = self._entries()
        sections = [[(task, *tasks[task].cells()) for task in names] for names in self.before.groups.values()]
        summary = [(_title(group), *entry.cells()) for group, entry in groups.items()]
        summary.append((_average_title(groups), *average.cells()))
        summary.append(("Mean over tasks", *mean.cells()))
        paired = mean.paired
        notes = [
            *_missing_groups(groups),
            f"{paired.gained} of {paired.trials} trials gained, {paired.lost} lost, McNemar p = {paired.p_value:.2g}.",
            _circumstances(self.before),
        ]
        if _circumstances(self.before) != _circumstances(self.after):
            notes.append(f"{self.names[1]}: {_circumstances(self.after)}")
        columns = ("Task", f"{self.names[0]} %", f"{self.names[1]} %", "Difference", "95 % interval, paired")
        return _Table(self.before.protocol, columns, sections, summary, notes)


def compare(
    before: EvaluationResult, after: EvaluationResult, names: tuple[str, str] = ("before", "after")
) -> Comparison:
    """
    Compare two policies that ran the same trials under the same protocol.

    :param before: the first result
    :param after: the second result
    :param names: what to call them in tables and figures
    :return: the comparison
    :raises ValueError: if the protocols or the trials differ
    """
    for field in ("name", "horizon", "settle_steps"):
        one, other = getattr(before.protocol, field), getattr(after.protocol, field)
        if one != other:
            raise ValueError(f"A comparison needs one protocol, but its {field} is {one!r} before and {other!r} after.")
    check_same_trials(before.successes, after.successes)
    return Comparison(before, after, names)


@dataclass(frozen=True)
class _Entry:
    """One line of a comparison."""

    before: Estimate
    after: Estimate
    paired: PairedDifference

    def json(self) -> dict[str, Any]:
        paired = vars(self.paired) | {"difference": self.paired.difference._asdict()}
        return {"before": self.before._asdict(), "after": self.after._asdict()} | paired

    def cells(self) -> tuple[str, ...]:
        return _percent(self.before)[0], _percent(self.after)[0], *_percent(self.paired.difference, sign="+")


@dataclass(frozen=True)
class _Table:
    """A table on its way to the terminal or to Markdown."""

    protocol: Protocol
    columns: tuple[str, ...]
    sections: Sequence[Sequence[tuple[str, ...]]]
    summary: Sequence[tuple[str, ...]]
    notes: list[str]

    def markdown(self) -> str:
        rows = [row for section in self.sections for row in section]
        rows += [tuple(f"**{cell}**" if cell else "" for cell in row) for row in self.summary]
        rule = ("---", *["---:"] * (len(self.columns) - 1))
        table = "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, rule, *rows))
        return "\n\n".join([f"Protocol {self.protocol}", table, *self.notes]) + "\n"

    def print(self, console: Console) -> None:
        table = RichTable()
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for section in self.sections:
            for row in section:
                table.add_row(*row)
            table.add_section()
        for row in self.summary:
            table.add_row(*row, style="bold")
        # Beside the table, not as its title and caption, which are broken at its width.
        console.print(f"Protocol {self.protocol}", style="bold", highlight=False)
        console.print(table)
        console.print("\n".join(self.notes), highlight=False)


def _percent(estimate: Estimate, sign: str = "") -> tuple[str, str]:
    value, low, high = (f"{100 * number:{sign}.1f}" for number in estimate)
    return value, f"{low} to {high}"


def _title(difficulty: str) -> str:
    return difficulty.replace("_", " ").capitalize()


def _average_title(groups: Mapping[str, Any]) -> str:
    return f"Avg (mean of {len(groups)} groups)" if len(groups) > 1 else "Avg (of one group)"


def _missing_groups(groups: Mapping[str, Any]) -> list[str]:
    missing = [group.replace("_", " ") for group in DIFFICULTIES if group not in groups]
    return [f"Avg leaves out the groups without a task here: {', '.join(missing)}."] if missing else []


def _circumstances(result: EvaluationResult) -> str:
    seen = ", ".join(f"{name}={value!r}" for name, value in result.env_kwargs.items())
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    mode = "" if result.deterministic else "sampled actions, "
    return f"{len(result.trials)} trials, {mode}{seen or 'default observations'}, {versions}."


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return text
