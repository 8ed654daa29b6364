"""MetaWorld as a Gymnasium environment of pictures, instructions and the hand's state."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mw_envs.errors import InputError
from mw_envs.hand_view import DEFAULT_WINDOW, HandView, check_window
from mw_envs.rendering import FULL_VIEW, RENDERERS, View, get_renderer, resolve_crop
from mw_envs.simulation.scene import Simulator, acquire_simulator, release_simulator
from mw_envs.tasks import (
    GOALS_PER_TASK,
    INSTRUCTION_BYTES,
    TASKS,
    Trial,
    did_you_mean,
    encode_instruction,
    get_task,
    select_tasks,
)

REWARDS = ("sparse", "difference", "dense")
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
# MetaWorld hangs these upside down; the published data turns their pictures by 180 degrees.
_TURNED_CAMERAS = ("corner", "corner2", "corner3", "corner4")
ACTION_DIM = 4
_RESET_OPTIONS = ("task", "goal", "seed", "snapshot")
# Bounds of the hand's position (meters) and of the gripper's opening, MetaWorld's own.
_STATE_LOW = np.array([-0.525, 0.348, -0.0525, 0.0], dtype=np.float32)
_STATE_HIGH = np.array([0.525, 1.025, 0.7, 1.0], dtype=np.float32)
_PRIVILEGED_LIMIT = 10.0
_RENDER_SIZE = 480
_STEPS_PER_SECOND = 80  # of the simulated time
_SETTLE_ACTION = np.zeros(ACTION_DIM, dtype=np.float32)


class MetaWorldEnv(gym.Env[dict[str, Any], npt.NDArray[np.float32]]):
    """Manipulation tasks of MetaWorld, seen through a camera and told by a sentence.

    **Observation** (``Dict``): ``image`` uint8 (H, W, 3); ``state`` float32 (4,), the hand's x, y, z in meters and the
    gripper's opening 0..1; ``instruction`` uint8 (instruction_bytes,), zero-padded UTF-8
    (:func:`mw_envs.decode_instruction`); with ``hand_view`` also ``hand_image`` uint8 (hand_view, hand_view, 3), a
    window of the same camera's view around the hand; with ``privileged_state`` also MetaWorld's own vector with the
    goal, float32 (39,).

    **Action**: ``Box(-1, 1, (4,))``, three displacements of the hand (1 is a centimeter) and the gripper (-1 opens, 1
    closes); with ``action_chunk=k > 1`` ``Box(-1, 1, (k, 4))``, of which a step runs as many as the episode lasts and
    draws one frame. Values outside the box are clipped by the simulator.

    **Episode**: ends at success (``terminate_on_success``), is truncated after ``horizon`` environment steps.
    ``reset(seed=s, options={"task": ..., "goal": g})`` places the trial (task, s, g); ``options["seed"]`` takes the
    place of ``s`` where a reset must not reseed the generator (Stable-Baselines3's vector environments give each worker
    its own seed). What options leave open is drawn from the environment's own generator, the task with
    ``task_weights``. ``reset(options={"snapshot": s})`` goes on from :meth:`snapshot` instead.

    **Info**: ``task``, ``goal``, ``trial_seed``, ``instruction``, ``success`` (at this step), ``success_once`` (so
    far), ``is_success`` (the same, under the name that others look for), ``env_steps`` (run by this call),
    ``elapsed_steps`` (run since the reset), ``episode_return`` (sum of rewards so far), and ``frames`` with
    ``record_frames``. All are there at every step, because a time limit outside may make any of them the last one.

    ``metadata["render_fps"]`` is the number of pictures that a second of the simulation gives, 80 / ``action_chunk``.
    ``copy.deepcopy`` and ``pickle`` give an environment that goes on as this one does, with a simulator of its own.

    :param suite: ``MT1``, ``MT10``, ``MT50``, ``ML10`` or ``ML45``.
    :param task: the task of ``MT1``.
    :param split: ``train``, or ``test`` for the held-out tasks of ML10 and ML45.
    :param tasks: a subset of the suite's tasks.
    :param task_weights: relative frequency of tasks, by name; a task that is not named weighs 1.
    :param action_chunk: environment steps per action.
    :param horizon: environment steps per episode.
    :param reward: ``sparse``: 1 at the first success, else 0; ``difference``: change of success since the step before;
        ``dense``: MetaWorld's own, divided by 10. Summed over the steps of a chunk.
    :param reward_coef: factor of the ``difference`` reward.
    :param terminate_on_success: whether success ends the episode.
    :param settle_steps: zero actions after a reset, not counted.
    :param image_size: side of the square picture, or (height, width).
    :param instruction_bytes: length of the observation's ``instruction``.
    :param camera: a camera of MetaWorld's; ``corner2`` stands where the published data has it.
    :param crop: window of the view, a name in :data:`mw_envs.rendering.CROPS` or (top, left, height, width).
    :param hand_view: side of ``hand_image`` in pixels, see :class:`mw_envs.hand_view.HandView`; None for no such image.
    :param hand_window: side of its window as a fraction of the camera's full view, whatever ``crop`` is.
    :param hand_border: ``shift`` moves a window that reaches beyond the view back inside, ``black`` leaves black what
        lies outside.
    :param renderer: ``auto``, ``software``, ``egl`` or ``osmesa``; see :func:`mw_envs.rendering.get_renderer`.
    :param privileged_state: whether the observation holds the simulator's state, for a critic or a scripted expert.
    :param elapsed_time: whether the observation holds ``elapsed_time``, float32 (1,), the share of the horizon that has
        passed, for a critic.
    :param record_frames: whether ``info["frames"]`` holds a 480x480 picture of each environment step, uint8
        (n, 480, 480, 3), and ``info["frame_rewards"]`` the reward of each, n floats.
    :param render_mode: None or ``rgb_array``.
    :raises ValueError: for a value that is not among those above; the message names the value and what is expected.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": _STEPS_PER_SECOND}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(
        self,
        suite: str = "MT50",
        *,
        task: str | None = None,
        split: str = "train",
        tasks: Sequence[str] | None = None,
        task_weights: Mapping[str, float] | None = None,
        action_chunk: int = 1,
        horizon: int = 160,
        reward: str = "sparse",
        reward_coef: float = 1.0,
        terminate_on_success: bool = True,
        settle_steps: int = 15,
        image_size: int | tuple[int, int] = 480,
        instruction_bytes: int = INSTRUCTION_BYTES,
        camera: str = "corner2",
        crop: str | Sequence[float] | None = None,
        hand_view: int | None = None,
        hand_window: float = DEFAULT_WINDOW,
        hand_border: str = "shift",
        renderer: str = "auto",
        privileged_state: bool = False,
        elapsed_time: bool = False,
        record_frames: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.tasks = _tasks_of(suite, task, split, tasks)
        self.set_task_weights(task_weights or {})
        self.action_chunk = _positive("action_chunk", action_chunk)
        rate = _STEPS_PER_SECOND / self.action_chunk
        self.metadata = {**self.metadata, "render_fps": int(rate) if rate.is_integer() else rate}
        self.horizon = _positive("horizon", horizon)
        self.settle_steps = _positive("settle_steps", settle_steps, minimum=0)
        self.reward = _one_of("reward", reward, REWARDS)
        self.reward_coef = _finite("reward_coef", reward_coef)
        self.terminate_on_success = _flag("terminate_on_success", terminate_on_success)
        self.instruction_bytes = _positive("instruction_bytes", instruction_bytes)
        for name in self.tasks:
            encode_instruction(TASKS[name].instruction, self.instruction_bytes, f"task {name}")
        height, width = _height_and_width(image_size)
        self._view = View(
            _one_of("camera", camera, CAMERAS),
            height,
            width,
            resolve_crop(crop),
            camera in _TURNED_CAMERAS,
        )
        self._render_view = View(camera, _RENDER_SIZE, _RENDER_SIZE, rotated=self._view.rotated)
        check_window(hand_window, hand_border)  # also where they are without effect
        #: the window that ``hand_image`` shows, None for no such image
        self.hand_view = None if hand_view is None else HandView(hand_view, hand_window, hand_border)
        self._renderer = _one_of("renderer", renderer, RENDERERS)
        self.record_frames = _flag("record_frames", record_frames)
        if render_mode not in (None, "rgb_array"):
            raise InputError(f"render_mode={render_mode!r}; expected None or 'rgb_array'")
        self.render_mode = render_mode

        observation: dict[str, spaces.Space[Any]] = {
            "image": spaces.Box(0, 255, (self._view.height, self._view.width, 3), np.uint8),
            "state": spaces.Box(_STATE_LOW, _STATE_HIGH, dtype=np.float32),
            "instruction": spaces.Box(0, 255, (self.instruction_bytes,), np.uint8),
        }
        if self.hand_view is not None:
            observation["hand_image"] = spaces.Box(0, 255, (self.hand_view.size, self.hand_view.size, 3), np.uint8)
        if _flag("privileged_state", privileged_state):
            observation["privileged_state"] = spaces.Box(-_PRIVILEGED_LIMIT, _PRIVILEGED_LIMIT, (39,), np.float32)
        if _flag("elapsed_time", elapsed_time):
            observation["elapsed_time"] = spaces.Box(0.0, 1.0, (1,), np.float32)
        self._observed = frozenset(observation)
        self.observation_space = spaces.Dict(observation)
        shape = (ACTION_DIM,) if self.action_chunk == 1 else (self.action_chunk, ACTION_DIM)
        self.action_space = spaces.Box(-1.0, 1.0, shape, np.float32)

        self._simulator: Simulator | None = None
        self._trial_seed: int | None = None
        self._trial: Trial | None = None
        self._elapsed_steps, self._return = 0, 0.0
        self._success = self._success_once = self._ended = False
        self._metaworld_observation = np.zeros(39)
        self._actions: list[list[float]] = []  # of the episode, one an environment step

    def set_task_weights(self, weights: Mapping[str, float]) -> None:
        """Change how often each task is drawn, from the next reset on.

        :param weights: relative frequencies by task name; a task that is not named weighs 1.
        :raises ValueError: for a task that this environment does not have, or weights that are negative or all zero.
        """
        for name in weights:
            if name not in self.tasks:
                raise InputError(f"task_weights names {name!r}; {did_you_mean(name, self.tasks)}")
        values = np.array([float(weights.get(name, 1.0)) for name in self.tasks])
        if not np.all(np.isfinite(values)) or values.min() < 0 or values.sum() == 0:
            raise InputError(f"task_weights must be finite, not negative and not all zero; got {dict(weights)}")
        self._task_probabilities = values / values.sum()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Place a trial and let it settle; see the class.

        :param seed: seeds the generator, and is the trial's seed.
        :param options: any of ``task``, ``goal`` (0..49) and ``seed`` of the trial; or ``snapshot`` alone.
        :raises ValueError: for an unknown option or an invalid value.
        """
        super().reset(seed=seed)
        options = options or {}
        if "snapshot" in options:
            self._restore(options)
        else:
            if seed is not None:
                self._trial_seed = _whole_number("seed", seed, 2**32)
            elif self._trial_seed is None:
                self._trial_seed = int(self.np_random.integers(2**32))
            self._begin(self._choose_trial(options))
        info = self._info(env_steps=0)
        if self.record_frames:
            info["frames"], info["frame_rewards"] = self._draw(self._render_view)[None], [0.0]
        return self._observation(), info

    @property
    def camera_view(self) -> dict[str, Any]:
        """What the pictures show: ``camera``, and ``crop`` as (top, left, height, width)."""
        return {"camera": self._view.camera, "crop": list(self._view.crop)}

    def snapshot(self) -> dict[str, Any]:
        """All that decides what this environment does next, in JSON types.

        ``reset(options={"snapshot": ...})`` takes an environment made with the same arguments there, bit for bit: it
        runs the episode's actions again from its trial, and gives the observation that was seen last.

        :raises gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._trial is None:
            raise gym.error.ResetNeeded("There is no state to keep yet; call reset() first")
        return {
            "generator": self.np_random.bit_generator.state,
            "trial_seed": self._trial_seed,
            "task_probabilities": self._task_probabilities.tolist(),
            "trial": list(self._trial),
            "actions": list(self._actions),
        }

    def _restore(self, options: Mapping[str, Any]) -> None:
        if len(options) > 1:
            raise InputError(f"Reset option 'snapshot' goes alone; got also {sorted(options.keys() - {'snapshot'})}")
        snapshot = options["snapshot"]
        try:
            trial = Trial(*snapshot["trial"])
            probabilities = np.array(snapshot["task_probabilities"], dtype=np.float64)
            if trial.task not in self.tasks or probabilities.shape != (len(self.tasks),):
                raise InputError(f"it is of other tasks than {', '.join(self.tasks)}")
            self.np_random.bit_generator.state = snapshot["generator"]
            self._trial_seed, actions = snapshot["trial_seed"], snapshot["actions"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"Reset option 'snapshot' is not what snapshot() of such an environment gave: {error}"
            ) from error
        self._task_probabilities = probabilities
        self._begin(trial)
        for action in actions:
            self._advance(np.array(action, dtype=np.float32))

    def _begin(self, trial: Trial) -> None:
        """Place a trial and let it settle."""
        self._trial = trial
        self._place(trial)
        self._elapsed_steps, self._return = 0, 0.0
        self._success = self._success_once = self._ended = False
        self._actions = []

    def _place(self, trial: Trial) -> None:
        if self._simulator is None or self._simulator.task != trial.task:
            self._release()
            self._simulator = acquire_simulator(trial.task)
        self._metaworld_observation = self._simulator.place(trial)
        for _ in range(self.settle_steps):
            self._metaworld_observation, _, _ = self._simulator.step(_SETTLE_ACTION, reward_wanted=False)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: all but the simulator."""
        return {**vars(self), "_simulator": self._simulator is not None, "_actions": list(self._actions)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become the environment of that state; a simulator of its own runs the episode again."""
        vars(self).update(state, _simulator=None)
        if state["_simulator"]:
            assert self._trial is not None
            self._place(self._trial)
            for action in self._actions:
                self._simulate(np.array(action, dtype=np.float32))

    def step(self, action: npt.NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Run an action, or the chunk's actions until the episode ends.

        :raises ValueError: if the action has another shape than the action space or is not finite.
        :raises gymnasium.error.ResetNeeded: before the first reset and after the episode's end.
        """
        action = np.asarray(action, dtype=np.float32)
        if action.shape != self.action_space.shape:
            raise InputError(
                f"Action of shape {action.shape}; expected {self.action_space.shape} (action_chunk={self.action_chunk})"
            )
        if not np.all(np.isfinite(action)):
            raise InputError(f"Action has a value that is not finite: {action.tolist()}")
        if self._simulator is None or self._ended:
            raise gym.error.ResetNeeded("The episode has ended or not begun; call reset() first")

        total_reward, env_steps = 0.0, 0
        frames, rewards = [], []
        for step_action in action.reshape(-1, ACTION_DIM):
            reward, terminated, truncated = self._advance(step_action)
            total_reward += reward
            env_steps += 1
            if self.record_frames:
                frames.append(self._draw(self._render_view))
                rewards.append(reward)
            if self._ended:
                break
        info = self._info(env_steps)
        if self.record_frames:
            info["frames"], info["frame_rewards"] = np.stack(frames), rewards
        return self._observation(), total_reward, terminated, truncated, info

    def _advance(self, action: npt.NDArray[np.float32]) -> tuple[float, bool, bool]:
        """One environment step: reward, terminated, truncated."""
        dense_reward, success = self._simulate(action)
        reward = self._step_reward(dense_reward, success)
        self._success, self._success_once = success, self._success_once or success
        self._elapsed_steps += 1
        self._return += reward
        self._actions.append(action.tolist())
        terminated = success and self.terminate_on_success
        truncated = not terminated and self._elapsed_steps >= self.horizon
        self._ended = terminated or truncated
        return reward, terminated, truncated

    def _simulate(self, action: npt.NDArray[np.float32]) -> tuple[float, bool]:
        """MetaWorld's reward, nan where nothing asks for it, and success."""
        assert self._simulator is not None
        self._metaworld_observation, dense_reward, success = self._simulator.step(action, self.reward == "dense")
        return dense_reward, success

    def render(self) -> npt.NDArray[np.uint8] | None:
        """The camera's full view now, uint8 (480, 480, 3), if ``render_mode`` is ``rgb_array``."""
        if self.render_mode is None:
            gym.logger.warn('render() does nothing without a render mode; use gym.make(id, render_mode="rgb_array")')
            return None
        if self._simulator is None:
            raise gym.error.ResetNeeded("There is nothing to render yet; call reset() first")
        return self._draw(self._render_view)

    def close(self) -> None:
        """Give the simulator back to the process."""
        self._release()

    def _release(self) -> None:
        if self._simulator is not None:
            release_simulator(self._simulator)
            self._simulator = None

    def _choose_trial(self, options: Mapping[str, Any]) -> Trial:
        for key in options:
            if key not in _RESET_OPTIONS:
                raise InputError(f"Unknown reset option {key!r}; {did_you_mean(key, _RESET_OPTIONS)}")
        task = options.get("task")
        if task is None:
            task = self.tasks[self.np_random.choice(len(self.tasks), p=self._task_probabilities)]
        elif task not in self.tasks:
            get_task(task)
            raise InputError(f"Task {task!r} is not in this environment; {did_you_mean(task, self.tasks)}")
        goal = options.get("goal")
        if goal is None:
            goal = self.np_random.integers(GOALS_PER_TASK)
        seed = options.get("seed")
        if seed is None:
            seed = self._trial_seed
        return Trial(task, _whole_number("seed", seed, 2**32), _whole_number("goal", goal, GOALS_PER_TASK))

    def _step_reward(self, dense_reward: float, success: bool) -> float:
        """Reward of one environment step; ``self._success`` is still that of the step before."""
        if self.reward == "dense":
            return dense_reward / 10.0
        if self.reward == "difference":
            return self.reward_coef * (float(success) - float(self._success))
        return float(success and not self._success_once)

    def _observation(self) -> dict[str, npt.NDArray[Any]]:
        metaworld = self._metaworld_observation.astype(np.float32)
        assert self._trial is not None
        observation: dict[str, npt.NDArray[Any]] = {
            "image": self._draw(self._view),
            "state": np.clip(metaworld[:4], _STATE_LOW, _STATE_HIGH),
            "instruction": encode_instruction(TASKS[self._trial.task].instruction, self.instruction_bytes),
        }
        if self.hand_view is not None:
            observation["hand_image"] = self._draw_hand(self.hand_view, observation)
        if "privileged_state" in self._observed:
            observation["privileged_state"] = np.clip(metaworld, -_PRIVILEGED_LIMIT, _PRIVILEGED_LIMIT)
        if "elapsed_time" in self._observed:
            observation["elapsed_time"] = np.array([self._elapsed_steps / self.horizon], dtype=np.float32)
        return observation

    def _draw(self, view: View) -> npt.NDArray[np.uint8]:
        assert self._simulator is not None
        simulator = self._simulator
        return get_renderer(self._renderer).render(simulator.model, simulator.data, view, simulator.scene)

    def _draw_hand(self, hand: HandView, observation: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
        view, side = self._view, hand.resolution
        if view.crop == FULL_VIEW and (view.height, view.width) == (side, side):  # it is in the picture already
            cut: npt.NDArray[np.uint8] = hand.cut(observation["image"][None], view.camera, observation["state"][None])[
                0
            ]
            return cut
        part, (down, right) = hand.inside(*hand.corner(view.camera, observation["state"]))
        window = np.zeros((hand.size, hand.size, 3), np.uint8)
        if min(part[2:]) > 0:
            drawn = self._draw(View(view.camera, side, side, rotated=view.rotated, part=part))
            window[down : down + part[2], right : right + part[3]] = drawn
        return window

    def _info(self, env_steps: int) -> dict[str, Any]:
        assert self._trial is not None
        return {
            "task": self._trial.task,
            "goal": self._trial.goal,
            "trial_seed": self._trial.seed,
            "instruction": TASKS[self._trial.task].instruction,
            "success": self._success,
            "success_once": self._success_once,
            "is_success": self._success_once,
            "env_steps": env_steps,
            "elapsed_steps": self._elapsed_steps,
            "episode_return": self._return,
        }


def _tasks_of(suite: str, task: str | None, split: str, tasks: Sequence[str] | None) -> tuple[str, ...]:
    if suite != "MT1":
        if task is not None:
            raise InputError(f"task={task!r} belongs to MetaWorldMT1-v0; for {suite} use tasks=[{task!r}]")
        return select_tasks(suite, split, tasks)
    if task is None or tasks is not None or split != "train":
        raise InputError(
            'MT1 takes one task and neither tasks nor split: gym.make("MetaWorldMT1-v0", task="reach-v3"); '
            f"got task={task!r}, tasks={tasks!r}, split={split!r}"
        )
    return (get_task(task).name,)


def _height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(image_size, (tuple, list)):
        if len(image_size) != 2:
            raise InputError(f"image_size={image_size!r}; expected one number or (height, width)")
        height, width = image_size
        return _positive("image_size", height), _positive("image_size", width)
    side = _positive("image_size", image_size)
    return side, side


def _positive(name: str, value: Any, minimum: int = 1) -> int:
    if not _is_whole(value) or value < minimum:
        raise InputError(f"{name}={value!r}; expected a whole number of at least {minimum}")
    return int(value)


def _whole_number(name: str, value: Any, end: int) -> int:
    if not _is_whole(value) or not 0 <= value < end:
        raise InputError(f"Reset option {name}={value!r}; expected a whole number from 0 to {end - 1}")
    return int(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value).is_integer()


def _finite(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or not np.isfinite(float(value)):
        raise InputError(f"{name}={value!r}; expected a finite number")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):  # the string "false" would be true
        raise InputError(f"{name}={value!r}; expected True or False")
    return bool(value)


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise InputError(f"Unknown {name} {value!r}; {did_you_mean(value, known)}")
    return value
