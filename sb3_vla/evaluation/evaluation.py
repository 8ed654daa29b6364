"""
Evaluation: a fixed list of trials under a named protocol, and a table with intervals.

::

    result = evaluate(load_policy("checkpoints/sft"), suite="MT10", trials_per_task=20)
    result.print_table()
    compare(EvaluationResult.from_json("before.json"), result).to_markdown("comparison.md")

Step limit, executed chunk and settling move success by tens of points, so a :class:`Protocol` fixes them and its name
is printed with every result. Each :class:`mw_envs.Trial` runs exactly once, in some environment of some worker process.
Which one does not matter to a policy that is deterministic, up to the rounding that another batch size may cause in a
network; a policy that samples its actions gives other results with another number of environments.
"""

from __future__ import annotations

import dataclasses
import platform
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from typing import Protocol as TypingProtocol

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from mw_envs import Trial, suite_tasks
from mw_envs.tasks import GOALS_PER_TASK, select_tasks
from sb3_vla.common.errors import InputError
from sb3_vla.common.files import temporary_path
from sb3_vla.common.progress import progress_bar
from sb3_vla.distributed.ranks import current_ranks
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv
from sb3_vla.evaluation.protocols import PROTOCOLS, TRIAL_SEED, Protocol, find_protocol
from sb3_vla.evaluation.results import Comparison, EvaluationResult, TaskRate, TrialResult, compare
from sb3_vla.evaluation.trial_envs import (
    Actions,
    Observation,
    TrialQueue,
    VideoOptions,
    env_count,
    make_trial_env,
    make_trial_vec_env,
    plain_env_kwargs,
)
from sb3_vla.models import VLAModel
from sb3_vla.policies.observations import CRITIC_KEYS
from sb3_vla.policies.views import (
    FULL_VIEW,
    described,
    hand_options,
    known_view,
    other_hand_view,
    told_hand_view,
    view_of_envs,
    warn_of_another_view,
    warn_once,
)
from sb3_vla.policies.vla_policy import VLAPolicy

__all__ = [
    "PROTOCOLS",
    "TRIAL_SEED",
    "Comparison",
    "EvaluationResult",
    "Policy",
    "Protocol",
    "TaskRate",
    "TrialQueue",
    "TrialResult",
    "VideoOptions",
    "check_fit",
    "compare",
    "evaluate",
    "find_protocol",
    "make_trial_env",
    "make_trial_vec_env",
    "seen_by",
    "trials_for",
]


class Policy(TypingProtocol):
    """
    What can be evaluated: a Stable-Baselines3 model, or anything with its ``predict`` for batches.

    Images arrive channels last, as the environment draws them. An environment that has no trial left shows its last
    observation, or zeros if it never had one. Where there are attributes ``observation_space`` and ``action_space``, as
    SB3's models have them, a misfit is reported before anything is simulated.
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
        raise InputError(f"An evaluation needs at least one trial per task, got trials_per_task={trials_per_task}.")
    return [
        Trial(task, int(seed) + number // GOALS_PER_TASK, number % GOALS_PER_TASK)
        for task in select_tasks("MT50", tasks=tasks)
        for number in range(trials_per_task)
    ]


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
    num_workers: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    deterministic: bool = True,
    videos: VideoOptions | Mapping[str, Any] | None = None,
    progress: bool = True,
    start_method: str | None = None,
    vec_env: VecEnv | None = None,
) -> EvaluationResult:
    """
    Run a policy once in each trial.

    Under ``torchrun`` ranks share the trials, and each returns the outcomes of all; all must call it.

    :param policy: a Stable-Baselines3 model, or anything with its ``predict`` for batches
    :param tasks: task names; give either these or a suite
    :param suite: ``MT10``, ``MT50``, ``ML10`` or ``ML45``
    :param split: ``train``, or ``test`` for the held-out tasks of ML10 and ML45
    :param trials_per_task: the trials are those of :func:`trials_for`; on MT50, 10 per task leave an uncertainty of
        about 5 points of the average, 50 per task about 2
    :param trial_seed: seed of the trials
    :param protocol: a name in :data:`PROTOCOLS`, or a protocol of your own
    :param num_envs: number of environments, and size of the policy's batch; ``None`` takes eight per worker process, at
        most one per trial
    :param num_workers: number of worker processes; ``None`` takes one per usable core, at most one per environment
    :param env_kwargs: what the policy sees: ``image_size``, ``crop``, ``camera``, ``renderer``, ``privileged_state``;
        what is left out is as the policy knows it, see :func:`seen_by`
    :param deterministic: passed to ``predict``
    :param videos: films the first trials of each task
    :param progress: shows a progress bar
    :param start_method: how worker processes start, as for :func:`make_trial_vec_env`
    :param vec_env: run on these environments, made by :func:`make_trial_vec_env`, which stay open; ``num_envs``,
        ``num_workers`` and ``start_method`` are theirs then
    :return: the outcomes, in the order of the trials
    :raises ValueError: for unknown names, no trials, or a policy that does not fit the environment
    :raises RuntimeError: if an environment fails or a worker stops; none is left behind then, nor after Ctrl-C
    :warns UserWarning: if the policy was trained on another camera, crop or hand view than it is to see, or a loaded
        algorithm does not say on which
    """
    trials = trials_for(_chosen_tasks(tasks, suite, split), trials_per_task, trial_seed)
    resolved = _with_chunk(find_protocol(protocol), policy)
    films = videos if videos is None or isinstance(videos, VideoOptions) else VideoOptions(**videos)
    ranks = current_ranks()
    filmed = _first_of_each_task(trials, films.per_task) if films else set()
    # Neighbors, which are of few tasks: a process takes long to construct a task's scene. Where there are fewer trials
    # than ranks, some have none.
    own = np.array_split(np.arange(len(trials)), ranks.count)[ranks.rank]
    part = _Part([trials[index] for index in own], films, {int(index - own[0]) for index in own if index in filmed})
    progress = progress and ranks.leads
    if vec_env is not None:
        settings = _settings_of(vec_env, resolved, env_kwargs)
        _check_spaces(policy, vec_env.observation_space, vec_env.action_space)
        _check_view(policy, settings["env_kwargs"])
        outcomes = _run(policy, vec_env, part, deterministic, progress)
    else:
        env_kwargs = seen_by(policy, env_kwargs)
        settings = check_fit(policy, resolved, env_kwargs)
        outcomes = ()
        if part.trials:
            count = min(len(part.trials), env_count(num_envs, num_workers))
            own_env = make_trial_vec_env(
                resolved, env_kwargs, num_envs=count, num_workers=num_workers, start_method=start_method
            )
            with _closing(own_env, films):
                outcomes = _run(policy, own_env, part, deterministic, progress)
    everyones = tuple(outcome for found in ranks.gather(outcomes) for outcome in found)
    return EvaluationResult(resolved, everyones, _versions(), settings["env_kwargs"], deterministic)


def check_fit(policy: Policy, protocol: str | Protocol, env_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Find out before anything is simulated whether :func:`evaluate` can run a policy.

    :return: what the environments are made with, as JSON gives it back
    :raises ValueError: if it cannot
    """
    env_kwargs = seen_by(policy, env_kwargs)
    probe = make_trial_env(_with_chunk(find_protocol(protocol), policy), env_kwargs)
    _check_spaces(policy, probe.observation_space, probe.action_space)
    _check_view(policy, env_kwargs)
    return probe.settings


def seen_by(policy: Policy, env_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    Arguments of environments that show a policy what it was trained on, as far as it says: camera and crop of a
    :class:`~sb3_vla.VLAPolicy`, the size of the images and what is for its critic of any with an observation space.

    :param env_kwargs: what is chosen in place of that
    """
    seen = dict(_view_of(policy) or {})
    space = getattr(policy, "observation_space", None)
    observed = space.spaces if isinstance(space, spaces.Dict) else {}
    shape = observed["image"].shape if "image" in observed else None
    if shape is not None and len(shape) == 3:
        # Stable-Baselines3 puts the channels first.
        height, width = shape[:2] if shape[2] == 3 else shape[1:]
        seen["image_size"] = height if height == width else [height, width]
    seen.update({key: True for key in CRITIC_KEYS if key in observed})
    model = _model_of(policy)
    if model is not None:
        seen.update(hand_options(model))
    return {**seen, **(env_kwargs or {})}


def _model_of(policy: Policy) -> VLAModel | None:
    model = getattr(getattr(policy, "policy", policy), "model", None)
    return model if isinstance(model, VLAModel) else None


def _view_of(policy: Policy) -> dict[str, Any] | None:
    """Of a policy, of the policy in an algorithm, or of the algorithm's environment."""
    view = getattr(getattr(policy, "policy", policy), "view", None)
    if isinstance(view, dict):
        return view
    env = policy.get_env() if isinstance(policy, BaseAlgorithm) else None
    return None if env is None or getattr(env, "closed", False) else view_of_envs(env)


def _check_view(policy: Policy, env_kwargs: Mapping[str, Any]) -> None:
    model = _model_of(policy)
    read = None if model is None else model.hand_view
    other = other_hand_view(read, [told_hand_view(env_kwargs)])
    if other is not None:
        warn_once(
            f"The policy was trained on the hand view that {read} draws, but is shown {other}, where it acts worse or "
            "fails. Where these are left out, they are those that the policy knows"
        )
    view, shown = _view_of(policy), known_view(env_kwargs)
    if view is not None:
        warn_of_another_view(view, shown or FULL_VIEW)
    elif shown is None and isinstance(policy, BaseAlgorithm) and isinstance(policy.policy, VLAPolicy):
        warn_once(  # such as one of stable_baselines3 that was loaded; of a checkpoint load_policy tells
            f"The policy does not say which view it was trained on; {described(FULL_VIEW)} is shown. Give "
            "env_kwargs={'crop': ..., 'camera': ...} if it was another, or load the algorithm with its environment"
        )


def _chosen_tasks(tasks: Sequence[str] | None, suite: str | None, split: str) -> Sequence[str]:
    if tasks is not None and suite is None:
        return tasks
    if tasks is None and suite is not None:
        return suite_tasks(suite, split)
    raise InputError(f"Give either tasks=[...] or a suite such as 'MT10', got tasks={tasks!r} and suite={suite!r}.")


def _with_chunk(protocol: Protocol, policy: Policy) -> Protocol:
    if protocol.action_chunk is not None:
        return protocol
    space = getattr(policy, "action_space", None)
    if not isinstance(space, spaces.Box):
        raise InputError(
            f"Protocol {protocol.name} executes the policy's own chunk, but {type(policy).__name__} has no "
            "action_space to tell it. Give it Box(-1, 1, (k, 4)), or use dataclasses.replace(protocol, action_chunk=k)."
        )
    return dataclasses.replace(protocol, action_chunk=space.shape[0] if len(space.shape) == 2 else 1)


def _settings_of(vec_env: VecEnv, protocol: Protocol, env_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if not all(vec_env.env_is_wrapped(TrialQueue)):
        raise InputError("vec_env cannot follow a list of trials; make it with sb3_vla.evaluation.make_trial_vec_env.")
    settings: dict[str, Any] = vec_env.get_attr("settings")[0]
    for name, wanted in (
        ("protocol", protocol),
        ("env_kwargs", None if env_kwargs is None else plain_env_kwargs(env_kwargs)),
    ):
        if wanted is not None and wanted != settings[name]:
            raise InputError(f"vec_env was made with {name}={settings[name]}, but the evaluation asks for {wanted}.")
    return settings


def _check_spaces(policy: Policy, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Compare what the policy says about itself, if it does, with the environment."""
    assert isinstance(observation_space, spaces.Dict)
    reader = getattr(policy, "policy", None)  # of an algorithm, whose own space has also what the policy leaves out
    wanted = getattr(reader if isinstance(reader, VLAPolicy) else policy, "observation_space", None)
    for key, space in wanted.items() if isinstance(wanted, spaces.Dict) else ():
        given = observation_space.spaces.get(key)
        if key == "instruction" and given is not None:  # of any length
            continue
        # Sorted, since a model's image may be channels first.
        if given is None or sorted(given.shape or ()) != sorted(space.shape or ()):
            came = "does not have it" if given is None else f"gives {given.shape}"
            raise InputError(
                f"The policy reads {key!r} of shape {space.shape}, the environment {came}. Pass what the policy was "
                "trained with, e.g. env_kwargs={'image_size': 96, 'crop': 'workspace', 'privileged_state': True}."
            )
    actions = getattr(policy, "action_space", None)
    if actions is not None and actions.shape != action_space.shape:
        raise _misfit(f"decides actions of shape {actions.shape}", action_space.shape)


def _misfit(what: str, expected: tuple[int, ...] | None) -> ValueError:
    return InputError(
        f"The policy {what}, but the protocol executes {expected} per decision. Use a protocol with the policy's "
        "chunk: dataclasses.replace(PROTOCOLS['rlinf-160'], name='...', action_chunk=k)."
    )


@contextmanager
def _closing(vec_env: SharedMemoryVecEnv, films: VideoOptions | None) -> Iterator[None]:
    """Close the workers, and delete what was not finished by those that were killed."""
    try:
        yield
    finally:
        vec_env.close()
        if films is not None:
            for process in vec_env.processes:
                for video in Path(films.directory).glob(temporary_path(Path("*.mp4"), process.pid).name):
                    video.unlink(missing_ok=True)


class _Schedule:
    """
    Deals trials out to environments.

    A process takes longer to construct a task's scene than to run an episode in it, and keeps the scene in memory. So
    an environment keeps to its task while that has trials left, then takes a task that nobody has begun, then helps
    where most is left: first with a task that its own process knows.

    :param trials: the trials
    :param shares: environments of each process
    """

    def __init__(self, trials: Sequence[Trial], shares: Sequence[Iterable[int]]) -> None:
        self._left: dict[str, deque[int]] = {}
        for index, trial in enumerate(trials):
            self._left.setdefault(trial.task, deque()).append(index)
        self._untouched = deque(self._left)
        self._task_of: dict[int, str] = {}
        self._known_to: dict[int, set[str]] = {}
        for share in shares:
            known: set[str] = set()
            self._known_to.update((number, known) for number in share)

    def next(self, number: int) -> int | None:
        """Index of an environment's next trial; ``None`` when all have been dealt out."""
        task = self._task_of.get(number)
        if task is None or not self._left[task]:
            task = self._untouched.popleft() if self._untouched else self._most_wanting(number)
            if task is None:
                return None
            self._task_of[number] = task
            self._known_to[number].add(task)
        return self._left[task].popleft()

    def _most_wanting(self, number: int) -> str | None:
        known = self._known_to[number]
        wanting = [task for task, indices in self._left.items() if indices]
        return max(wanting, key=lambda task: (task in known, len(self._left[task])), default=None)


@dataclass(frozen=True)
class _Part:
    """The trials of this rank, how they are filmed, and which by index."""

    trials: Sequence[Trial]
    films: VideoOptions | None
    filmed: set[int]


@dataclass
class _Slot:
    """What an environment does, as indices of trials: the one it runs, and the one that its next auto-reset starts."""

    running: int | None = None
    coming: int | None = None
    first_success: int | None = None


class _Run:
    """One pass through the trials."""

    def __init__(self, vec_env: VecEnv, part: _Part) -> None:
        self.vec_env = vec_env
        self.trials = trials = part.trials
        self.outcomes: dict[int, TrialResult] = {}
        self._films, self._filmed = part.films, part.filmed
        self._schedule = _Schedule(trials, getattr(vec_env, "shares", [range(vec_env.num_envs)]))
        self._slots = [_Slot() for _ in range(vec_env.num_envs)]

    def start(self) -> Observation:
        """Start a trial in each environment."""
        for number in range(self.vec_env.num_envs):
            self._assign(number)
        observations = self.vec_env.reset()
        for number in range(self.vec_env.num_envs):
            self._assign(number)
        assert isinstance(observations, dict)
        return observations

    def step(self, actions: Actions) -> tuple[Observation, npt.NDArray[np.bool_], list[TrialResult]]:
        """Execute a decision in each environment; with the observations come the outcomes of the trials that ended."""
        self._check_actions(actions)
        observations, _, dones, infos = self.vec_env.step(actions)
        ended = []
        for number, (slot, info) in enumerate(zip(self._slots, infos, strict=True)):
            if slot.running is None:
                continue
            if info["success_once"] and slot.first_success is None:
                slot.first_success = int(info["elapsed_steps"])
            if dones[number]:
                trial = Trial(info["task"], info["trial_seed"], info["goal"])
                if trial != self.trials[slot.running]:
                    raise RuntimeError(f"Environment {number} ran {trial} instead of {self.trials[slot.running]}.")
                success, at_end = bool(info["success_once"]), bool(info["success"])
                outcome = TrialResult(trial, success, slot.first_success, int(info["elapsed_steps"]), at_end)
                self.outcomes[slot.running] = outcome
                ended.append(outcome)
                self._assign(number)
        assert isinstance(observations, dict)
        return observations, dones, ended

    def _assign(self, number: int) -> None:
        """Go on to the trial that is coming and choose the one after it; ``None`` clears what an earlier run chose."""
        coming = self._schedule.next(number)
        self._slots[number] = _Slot(running=self._slots[number].coming, coming=coming)
        trial = None if coming is None else self.trials[coming]
        film = self._films if coming in self._filmed else None
        self.vec_env.env_method("assign", trial, film, indices=[number])

    def _check_actions(self, actions: Actions) -> None:
        shape = getattr(actions, "shape", None)
        expected = (self.vec_env.num_envs, *(self.vec_env.action_space.shape or ()))
        if shape != expected:
            raise _misfit(f"returned actions of shape {shape} for {expected[0]} observations", expected[1:])
        finite = np.isfinite(actions).reshape(len(actions), -1).all(axis=1)
        if not finite.all():
            number = int(np.argmin(finite))
            running = self._slots[number].running
            trial = "no trial" if running is None else self.trials[running]
            raise InputError(
                f"The policy's action for environment {number} ({trial}) is not finite: {actions[number].tolist()}"
            )


def _run(
    policy: Policy,
    vec_env: VecEnv,
    part: _Part,
    deterministic: bool,
    progress: bool,
) -> tuple[TrialResult, ...]:
    run, trials = _Run(vec_env, part), part.trials
    with progress_bar(progress, transient=True) as bar:
        row = bar.add_task("evaluating", total=len(trials), note="")
        observations = run.start()
        state, episode_start = None, np.ones(vec_env.num_envs, dtype=bool)
        while len(run.outcomes) < len(trials):
            actions, state = policy.predict(
                observations, state=state, episode_start=episode_start, deterministic=deterministic
            )
            observations, episode_start, ended = run.step(actions)
            if ended:
                done = run.outcomes.values()
                rate = sum(outcome.success for outcome in done) / len(done)
                bar.update(row, completed=len(done), note=f"success {rate:.0%}")
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


def _versions() -> dict[str, str]:
    packages = {package: version(package) for package in ("metaworld", "mujoco", "numpy")}
    return packages | {"python": platform.python_version()}
