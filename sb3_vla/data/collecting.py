"""Collect demonstrations: MetaWorld's scripted experts, played by worker processes and kept as a LeRobot dataset.

>>> print(collect("data/mt10", "MT10", episodes_per_task=10))  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from mw_envs.experts import ScriptedExpert
from mw_envs.hand_view import DEFAULT_WINDOW, HandView
from mw_envs.machine import usable_cores
from mw_envs.tasks import GOALS_PER_TASK, Trial, get_task, select_tasks
from sb3_vla.common.errors import FailedError, InputError, file_errors
from sb3_vla.common.paths import local_path
from sb3_vla.common.progress import progress_bar
from sb3_vla.data.lerobot_writer import DemonstrationWriter, Episode, ImageStorage, encode_png

# Length of a burst of noise, environment steps: long enough to push the hand off its path, short enough to come back.
_BURST_STEPS = (3, 10)
_DENSE_REWARD_SCALE = 10.0  # the environment's dense reward is MetaWorld's divided by this


@dataclass
class TaskReport:
    """What collecting one task took.

    :param episodes: Successful episodes, all of them kept.
    :param attempts: Episodes played.
    :param frames: Frames in the dataset.
    :param env_steps: Environment steps played, failures included.
    :param seconds: Time of the workers, added up.
    """

    episodes: int = 0
    attempts: int = 0
    frames: int = 0
    env_steps: int = 0
    seconds: float = 0.0

    @property
    def success_rate(self) -> float:
        """Share of the attempts in which the expert succeeded."""
        return self.episodes / self.attempts if self.attempts else 0.0


@dataclass
class CollectReport:
    """What :func:`collect` did.

    :param root: Folder of the dataset.
    :param tasks: Report of each task, in the order of the dataset.
    :param seconds: Wall time.
    """

    root: Path
    tasks: dict[str, TaskReport]
    seconds: float

    @property
    def episodes(self) -> int:
        """Episodes in the dataset."""
        return sum(report.episodes for report in self.tasks.values())

    @property
    def frames(self) -> int:
        """Frames in the dataset."""
        return sum(report.frames for report in self.tasks.values())

    @property
    def env_steps(self) -> int:
        """Environment steps played, failures included."""
        return sum(report.env_steps for report in self.tasks.values())

    def __str__(self) -> str:
        width = max(map(len, self.tasks), default=0)
        lines = [
            f"{name:<{width}}  {report.episodes:4d} episodes of {report.attempts:4d} attempts"
            f" ({report.success_rate:4.0%}), {report.frames:6d} frames"
            for name, report in self.tasks.items()
        ]
        total = f"{self.episodes} episodes, {self.frames} frames in {self.seconds:.1f} s: {self.root}"
        return "\n".join([*lines, total])


def collect(
    root: str | Path,
    suite: str = "MT10",
    *,
    tasks: Sequence[str] | None = None,
    split: str = "train",
    episodes_per_task: int = 10,
    image_size: int = 96,
    crop: str | Sequence[float] | None = "workspace",
    hand_view: int | None = None,
    hand_window: float = DEFAULT_WINDOW,
    horizon: int = 200,
    noise_std: float = 0.0,
    noise_probability: float = 0.05,
    seed: int = 0,
    num_workers: int | None = None,
    image_storage: ImageStorage = "png",
    renderer: str = "auto",
    camera: str = "corner2",
    start_method: str = "forkserver",
    progress: bool = True,
    max_attempts_factor: float = 4.0,
    overwrite: bool = False,
) -> CollectReport:
    """Play MetaWorld's scripted experts and keep the successful episodes as a LeRobot dataset.

    Attempt k of a task plays the trial ``(task, seed + k // 50, k % 50)``. An episode ends with the step of its first
    success; those without one are dropped. The dataset depends on the arguments alone, not on the number or the speed
    of the workers.

    With ``noise_std`` the hand is pushed: a burst of 3 to 10 steps adds one random displacement to the action that is
    *executed*, while the stored ``action`` remains what the expert wanted in the state that it saw. So the data shows
    how to come back to the path. The gripper is left alone: an object dropped by chance teaches nothing.

    ``next.reward`` is MetaWorld's own dense reward, 0 to 10, as in ``lerobot/metaworld_mt50``.

    :param root: Folder of the new dataset.
    :param suite: ``MT1`` (with one task in ``tasks``), ``MT10``, ``MT50``, ``ML10`` or ``ML45``.
    :param tasks: A subset of the suite's tasks.
    :param split: ``train``, or ``test`` for the held-out tasks of ML10 and ML45.
    :param episodes_per_task: Successful episodes wanted of each task.
    :param image_size: Side of the square images, pixels.
    :param crop: Window of the camera's view, a name or (top, left, height, width) in fractions; None for all of it.
    :param hand_view: Side of the images of the hand view, a feature of its own; None for none.
    :param hand_window: Side of its window as a fraction of the camera's view.
    :param horizon: Steps after which an attempt has failed. More than the 160 of the usual evaluation, because the
        experts of a few tasks need about that many, and a tight limit would keep their easiest goals only.
    :param noise_std: Standard deviation of the bursts' displacement, in action units; 0 for none.
    :param noise_probability: Probability that a burst begins at a step outside a burst.
    :param seed: Seed of the trials' goals and of the noise.
    :param num_workers: Worker processes; None for one a core that this process may use.
    :param image_storage: ``png`` (exact) or ``mp4`` (smaller).
    :param renderer: ``auto``, ``software``, ``egl`` or ``osmesa``.
    :param camera: A camera of MetaWorld's.
    :param start_method: How workers start: ``forkserver``, ``spawn`` or ``fork``.
    :param progress: Show a progress bar.
    :param max_attempts_factor: Give up on a task after this many attempts per wanted episode (at least 10 attempts).
    :param overwrite: Replace the dataset at ``root``, if there is one.
    :raises FileExistsError: If ``root`` exists and may not be replaced.
    :raises ValueError: If an argument is not as above.
    :raises RuntimeError: If a task's expert fails too often, or a worker dies. Whatever an environment raises in a
        worker, e.g. for want of an OpenGL library, is raised here.
    """
    names = select_tasks(suite, split, tasks)
    if num_workers is None:
        num_workers = usable_cores()  # also where ranks share them: one of these collects, and the others wait
    _check_at_least(
        ("episodes_per_task", episodes_per_task, 1),
        ("num_workers", num_workers, 1),
        ("max_attempts_factor", max_attempts_factor, 1),
        ("noise_std", noise_std, 0),
        ("seed", seed, 0),
    )
    if not 0.0 <= noise_probability <= 1.0:
        raise InputError(f"noise_probability must lie in [0, 1], got {noise_probability}")
    settings = _WorkerSettings(
        env_kwargs={
            "tasks": list(names),
            "image_size": image_size,
            "crop": crop,
            "horizon": horizon,
            "renderer": renderer,
            "camera": camera,
            "hand_view": hand_view,
            "hand_window": hand_window,
        },
        noise_std=noise_std,
        noise_probability=noise_probability,
        seed=seed,
        encode=image_storage == "png",
    )
    _make_env(settings).close()  # refuses what it cannot do before anything is started or written
    limit = max(10, int(np.ceil(episodes_per_task * max_attempts_factor)))
    schedule = _Schedule(names, episodes_per_task, limit, horizon)
    begin = time.perf_counter()
    view: dict[str, Any] = {"camera": camera, "crop": crop if crop is None or isinstance(crop, str) else list(crop)}
    shape = (image_size, image_size, 3)
    if hand_view is not None:
        view["hand_view"] = dataclasses.asdict(HandView(hand_view, hand_window))
    hand_shape = None if hand_view is None else (hand_view, hand_view, 3)
    with (
        DemonstrationWriter(
            root,
            image_shape=shape,
            image_storage=image_storage,
            camera=view,
            hand_shape=hand_shape,
            overwrite=overwrite,
        ) as writer,
        _Workers(min(num_workers, len(names) * episodes_per_task), settings, start_method) as workers,
        progress_bar(progress) as bar,
    ):
        shown = bar.add_task("collecting", total=len(names) * episodes_per_task, note="")
        while not schedule.done:
            for worker in workers.idle():
                job = schedule.next_job(worker.task)
                if job is not None:
                    worker.submit(job)
            for outcome in workers.receive():
                schedule.finish(outcome)
                bar.update(shown, note=outcome.job.task, advance=outcome.episode is not None)
            for episode in schedule.ready():
                with file_errors("write", writer.root):
                    writer.add_episode(episode)
    return CollectReport(local_path(root), schedule.reports, time.perf_counter() - begin)


def _check_at_least(*arguments: tuple[str, float, float]) -> None:
    for name, value, minimum in arguments:
        if not value >= minimum:
            raise InputError(f"{name} must be at least {minimum}, got {value}")


@dataclass(frozen=True)
class _Job:
    task: str
    attempt: int


@dataclass
class _Outcome:
    """What became of a job; ``episode`` is None where the expert did not succeed."""

    job: _Job
    episode: Episode | None
    env_steps: int
    seconds: float


@dataclass
class _TaskState:
    next_attempt: int = 0
    running: int = 0
    waiting: dict[int, Episode | None] = field(
        default_factory=dict
    )  # finished attempts that are not in the dataset yet
    next_written: int = 0


class _Schedule:
    """Which attempts are still needed, and which finished ones come next in the dataset.

    The dataset holds the first n successful attempts of each task. Attempt k is needed if and only if fewer than n of
    those before it succeed, i.e. k < n + failures; so starting attempts by this rule never plays one in vain.
    """

    def __init__(self, tasks: Sequence[str], episodes_per_task: int, attempt_limit: int, horizon: int) -> None:
        self.reports = {name: TaskReport() for name in tasks}
        self._states = {name: _TaskState() for name in tasks}
        self._episodes_per_task = episodes_per_task
        self._attempt_limit = attempt_limit
        self._horizon = horizon

    @property
    def done(self) -> bool:
        return all(report.episodes == self._episodes_per_task for report in self.reports.values())

    def next_job(self, preferred: str | None) -> _Job | None:
        """The next attempt, of the task that the worker has loaded if possible, else of one that nobody works on."""
        open_tasks = [name for name in self.reports if self._states[name].next_attempt < self._needed(name)]
        if not open_tasks:
            return None
        task = preferred if preferred in open_tasks else min(open_tasks, key=lambda name: self._states[name].running)
        state = self._states[task]
        state.next_attempt += 1
        state.running += 1
        return _Job(task, state.next_attempt - 1)

    def finish(self, outcome: _Outcome) -> None:
        task, report, state = outcome.job.task, self.reports[outcome.job.task], self._states[outcome.job.task]
        state.running -= 1
        state.waiting[outcome.job.attempt] = outcome.episode
        report.attempts += 1
        report.env_steps += outcome.env_steps
        report.seconds += outcome.seconds
        if outcome.episode is not None:
            report.episodes += 1
            report.frames += len(outcome.episode)
        elif self._needed(task) > self._attempt_limit:
            raise FailedError(
                f"The scripted expert of {task} succeeded in {report.episodes} of {report.attempts} attempts, and "
                f"{self._episodes_per_task} episodes are wanted. Raise horizon (now {self._horizon} steps) or "
                "max_attempts_factor, lower noise_std, or leave the task out with tasks=[...]."
            )

    def ready(self) -> Iterator[Episode]:
        """Episodes whose turn has come: by task, then by attempt."""
        for name, state in self._states.items():
            while state.next_written in state.waiting:
                episode = state.waiting.pop(state.next_written)
                state.next_written += 1
                if episode is not None:
                    yield episode
            if state.next_written < self._needed(name):
                return

    def _needed(self, task: str) -> int:
        """Attempts that are needed as far as is known."""
        report = self.reports[task]
        return self._episodes_per_task + report.attempts - report.episodes


@dataclass(frozen=True)
class _WorkerSettings:
    env_kwargs: dict[str, Any]
    noise_std: float
    noise_probability: float
    seed: int
    encode: bool


@dataclass
class _Failure:
    """An exception on its way from a worker to the parent."""

    error: Exception
    trace: str


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.job: _Job | None = None
        self.task: str | None = None  # the task whose simulator the worker has loaded

    def submit(self, job: _Job) -> None:
        self.job, self.task = job, job.task
        with contextlib.suppress(BrokenPipeError):  # the worker is dead, which receive() reports
            self.connection.send(job)


class _Workers:
    """Worker processes, each with a pipe of its own: a dead one is noticed at once, and none survives the parent."""

    def __init__(self, count: int, settings: _WorkerSettings, start_method: str) -> None:
        known = multiprocessing.get_all_start_methods()
        if start_method not in known:
            raise InputError(f"Unknown start_method {start_method!r}; expected one of {', '.join(known)}")
        self._count = count
        self._settings = settings
        self._context: Any = multiprocessing.get_context(start_method)
        self._workers: list[_Worker] = []

    def __enter__(self) -> _Workers:
        forked = self._context.get_start_method() == "fork"
        if self._context.get_start_method() == "forkserver":
            # The server imports once what each worker would import again: seconds a worker, and its memory.
            self._context.set_forkserver_preload(["sb3_vla.data.collecting", "mw_envs.env"])
        try:
            for _ in range(self._count):
                ours, theirs = self._context.Pipe()
                # A forked worker has copies of our ends: open, they would keep it from noticing that we are gone.
                copies = [ours, *(worker.connection for worker in self._workers)] if forked else []
                process = self._context.Process(target=_work, args=(theirs, self._settings, copies), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def idle(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job is None]

    def receive(self) -> Iterator[_Outcome]:
        """Wait until at least one busy worker has finished its job.

        :raises RuntimeError: If a worker died.
        """
        busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]
            try:
                result = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join(timeout=5)
                raise FailedError(
                    f"A collecting process died (exit code {worker.process.exitcode}) in {worker.job}. Exit code -9 "
                    "mostly means that memory ran out: lower num_workers or image_size."
                ) from None
            if isinstance(result, _Failure):
                raise result.error from RuntimeError(f"in a collecting process:\n{result.trace}")
            worker.job = None
            yield result

    def _stop(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()


def _work(connection: Connection, settings: _WorkerSettings, copies: Sequence[Connection]) -> None:
    """Main function of a worker process: plays jobs until the parent hangs up or is gone."""
    # Ctrl-C reaches every process of a terminal; here the parent stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for copy in copies:
        copy.close()
    with contextlib.suppress(EOFError, OSError), warnings.catch_warnings():
        # MetaWorld's experts mention that their displacements will be clipped, as they are.
        warnings.filterwarnings("ignore", "Constant", UserWarning, "metaworld")
        env: gym.Env | None = None
        while True:
            job = connection.recv()
            result: _Outcome | _Failure
            try:
                env = env if env is not None else _make_env(settings)
                result = _play(env, settings, job)
            except Exception as error:
                result = _failure(error)
            connection.send(result)


def _make_env(settings: _WorkerSettings) -> gym.Env:
    return gym.make(
        "mw_envs:MetaWorldMT50-v0",  # all tasks: the suite's selection came in by `tasks`
        action_chunk=1,
        reward="dense",
        terminate_on_success=True,
        privileged_state=True,
        disable_env_checker=True,
        **settings.env_kwargs,
    )


def _failure(error: Exception) -> _Failure:
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _Failure(error, trace)


def _play(env: gym.Env, settings: _WorkerSettings, job: _Job) -> _Outcome:
    """One attempt of the expert."""
    begin = time.perf_counter()
    trial = Trial(job.task, settings.seed + job.attempt // GOALS_PER_TASK, job.attempt % GOALS_PER_TASK)
    # One generator an attempt: what happens does not depend on which worker plays it, or when.
    noise = _noise(np.random.default_rng((settings.seed, get_task(job.task).task_id, job.attempt)), settings)
    expert = ScriptedExpert(job.task)
    images: list[Any] = []
    hand_images: list[Any] = []
    states, environment_states, actions, rewards, successes = [], [], [], [], []
    observation, _ = env.reset(options=trial._asdict())
    ended = False
    while not ended:
        action = np.clip(expert.action(observation["privileged_state"]), -1.0, 1.0)
        for key, kept in (("image", images), ("hand_image", hand_images)):
            if key in observation:
                kept.append(encode_png(observation[key]) if settings.encode else observation[key])
        states.append(observation["state"])
        environment_states.append(observation["privileged_state"])
        actions.append(action)
        observation, reward, terminated, truncated, info = env.step(np.clip(action + next(noise), -1.0, 1.0))
        rewards.append(float(reward) * _DENSE_REWARD_SCALE)
        successes.append(bool(info["success"]))
        ended = terminated or truncated
    episode = None
    if successes[-1]:
        episode = Episode(
            trial=trial,
            images=images if settings.encode else np.stack(images),
            states=np.stack(states),
            environment_states=np.stack(environment_states),
            actions=np.stack(actions),
            rewards=np.array(rewards, dtype=np.float32),
            successes=np.array(successes),
            hand_images=(hand_images if settings.encode else np.stack(hand_images)) if hand_images else None,
        )
    return _Outcome(job, episode, len(actions), time.perf_counter() - begin)


def _noise(generator: np.random.Generator, settings: _WorkerSettings) -> Iterator[np.ndarray]:
    """What is added to each executed action, float32 ``(4,)``: zero, but for bursts of one displacement each."""
    while True:
        steps, offset = 1, np.zeros(4, dtype=np.float32)
        if settings.noise_std > 0 and generator.random() < settings.noise_probability:
            steps = int(generator.integers(_BURST_STEPS[0], _BURST_STEPS[1], endpoint=True))
            offset[:3] = generator.normal(0.0, settings.noise_std, size=3)
        for _ in range(steps):
            yield offset
