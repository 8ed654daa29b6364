"""MuJoCo simulators of MetaWorld tasks: shared within a process, and placed exactly by a trial.

MetaWorld takes 0.2 s to construct a task, ignores ``reset(seed=...)`` and carries attributes over from one episode to
the next. Here a simulator is handed from environment to environment, and taken back to the state it had after
construction before each trial; so an episode depends on its :class:`~mw_envs.tasks.Trial` alone.

A simulator takes 22 MB, nearly all of it the compiled model. Tasks of one scene take turns with one model, so an
environment that draws from all 50 tasks comes to have 36; a process keeps at most 50 that no environment uses.
"""

from __future__ import annotations

import copy
import threading
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mw_envs.rendering.view import Scene, explained_mujoco_import
from mw_envs.simulation.compiled_models import load_model, scene_file
from mw_envs.simulation.fast_stepping import construct, look_away, stand_still
from mw_envs.tasks import GOALS_PER_TASK, Trial, get_task

with explained_mujoco_import():
    import mujoco

# Camera pose of the published demonstrations and checkpoints (MetaWorld 3.1 calls it corner4; 3.0 does not have it).
CORNER2_POSITION = (0.75, 0.075, 0.7)
_HAND_DOWN = np.array([1.0, 0.0, 1.0, 0.0])  # a quaternion that MuJoCo normalizes
# Bodies of the base scene, which no task moves: floor, table, walls around it, the robot's stand.
_BACKGROUND = (
    "world",
    "tablelink",
    "RetainingWall",
    "controller_box",
    "pedestal_feet",
    "torso",
    "pedestal",
    "right_arm_base_link",
)
# All that MetaWorld's resets write in the model: places of bodies and of goal markers.
_MODEL_FIELDS = ("body_pos", "site_pos")
# Attributes that belong to the process, not to the episode.
_KEPT_ATTRIBUTES = frozenset({"model", "data", "mujoco_renderer", "_np_random", "_np_random_seed"})
_IDLE_SIMULATORS = 50
_GOAL_TABLES = 1000  # of 2.4 kB


class Simulator:
    """One task's MuJoCo simulation.

    :param task: a task name. ``scene`` is what renderers know it by.
    :param predecessor: a simulator of the same scene, which is not used any more: its model is taken over.
    :raises ValueError: for an unknown task.
    """

    def __init__(self, task: str, predecessor: Simulator | None = None) -> None:
        self.task = get_task(task).name
        self.scene_file = scene_file(task)
        if predecessor is None:
            self.model = load_model(self.scene_file)
            self.data = mujoco.MjData(self.model)
        else:
            assert predecessor.scene_file == self.scene_file
            predecessor.restore()
            self.model, self.data = predecessor.model, predecessor.data
        # Views of what each step writes.
        self._mocap_pos, self._mocap_quat, self._ctrl = self.data.mocap_pos, self.data.mocap_quat, self.data.ctrl
        sawyer = construct(task, self.model, self.data)
        # The goal stays in the privileged state; the observation space is cached by MetaWorld before that is known.
        sawyer._partially_observable = False
        sawyer.__dict__.pop("sawyer_observation_space", None)
        sawyer._set_task_called = True
        sawyer._freeze_rand_vec = True
        self._sawyer = sawyer
        space = sawyer.sawyer_observation_space
        self._lowest, self._highest = space.low, space.high
        self.model.cam_pos[mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, "corner2")] = CORNER2_POSITION
        known = {self.model.body(i).name: i for i in range(self.model.nbody)}
        self.scene = Scene(self.scene_file.stem, frozenset(known[name] for name in _BACKGROUND if name in known))
        self._initial_model = {name: getattr(self.model, name).copy() for name in _MODEL_FIELDS}
        self._initial_attributes = {
            name: _detached(value) for name, value in sawyer.__dict__.items() if name not in _KEPT_ATTRIBUTES
        }

    def place(self, trial: Trial) -> npt.NDArray[np.float64]:
        """Take the simulation to the trial's initial state.

        :return: MetaWorld's observation with the goal, float64, shape (39,).
        """
        sawyer = self._sawyer
        goals = self._goal_table(trial.seed)
        self.restore()
        sawyer._last_rand_vec = goals[trial.goal].copy()

        def place_without_simulating() -> npt.NDArray[np.float64]:
            del sawyer.reset_model  # MetaWorld's own again, for the second time
            vars(sawyer).update(do_simulation=stand_still)
            try:
                return sawyer.reset_model()
            finally:
                del sawyer.do_simulation

        # MetaWorld places the model, forgets the simulation's data and places it again; so what it simulates first, a
        # hand that takes its place, is lost.
        vars(sawyer).update(reset_model=place_without_simulating)
        observation, _ = sawyer.reset()
        return np.asarray(observation, dtype=np.float64)

    def restore(self) -> None:
        """Take the simulation back to what it was after construction."""
        for name, values in self._initial_model.items():
            getattr(self.model, name)[:] = values
        mujoco.mj_resetData(self.model, self.data)
        attributes = vars(self._sawyer)
        kept = {name: value for name, value in attributes.items() if name in _KEPT_ATTRIBUTES}
        attributes.clear()
        attributes.update(kept)
        attributes.update({name: _detached(value) for name, value in self._initial_attributes.items()})

    def step(
        self, action: npt.NDArray[np.float32], reward_wanted: bool = True
    ) -> tuple[npt.NDArray[np.float64], float, bool]:
        """Simulate one environment step (1/80 s): what MetaWorld's own ``step`` does, without its limit of 500.

        MetaWorld clips the displacement but not the gripper's effort. It also moves goal markers before
        ``mj_forward``, which undoes that, and computes contact forces that nothing reads.

        :param action: shape (4,); values outside [-1, 1] are clipped.
        :param reward_wanted: without it a step takes a fifth less time.
        :return: observation (39,), MetaWorld's own dense reward (0..10), or nan if it is not wanted, success at this
            very step.
        """
        sawyer, data = self._sawyer, self.data
        vars(sawyer)["reward_wanted"] = reward_wanted
        action = np.minimum(np.maximum(action, -1.0), 1.0)
        hand = self._mocap_pos + action[:3] * sawyer.action_scale
        np.minimum(np.maximum(hand, sawyer.mocap_low), sawyer.mocap_high, out=self._mocap_pos)
        self._mocap_quat[:] = _HAND_DOWN
        self._ctrl[:] = action[3], -action[3]
        mujoco.mj_step(self.model, data, nstep=sawyer.frame_skip)
        mujoco.mj_forward(self.model, data)
        observation = np.minimum(np.maximum(sawyer._get_obs(), self._lowest), self._highest)
        reward, info = sawyer.evaluate_state(observation, action)
        return observation, float(reward) if reward_wanted else np.nan, bool(info["success"])

    def _goal_table(self, seed: int) -> npt.NDArray[np.float64]:
        """The 50 random vectors of ``MT1(task, seed).train_tasks``, shape (50, n), without simulating 50 resets.

        MetaWorld seeds NumPy's global generator for this; an own generator of the same kind gives the same numbers. Its
        ``reset`` places the model twice, so each goal takes the last of two draws; the draws (some tasks reject goals
        too near the object) depend on the random vectors alone, so the hand need not move. Leaves the simulation
        disturbed: :meth:`place` restores it.
        """
        known = _goal_tables.get((self.task, seed))
        if known is not None:
            return known
        sawyer = self._sawyer
        generator = np.random.RandomState(seed)
        space = cast(spaces.Box, sawyer._random_reset_space)

        def draw() -> npt.NDArray[np.float64]:
            sawyer._last_rand_vec = generator.uniform(space.low, space.high, size=space.low.size)
            return sawyer._last_rand_vec

        def hold_hand(steps: int = 50) -> None:
            sawyer.init_tcp = sawyer.tcp_center

        # Attributes of the instance, which place() removes.
        vars(sawyer).update(
            _get_state_rand_vec=draw,
            _reset_hand=hold_hand,
            do_simulation=stand_still,
            set_state=stand_still,
            _get_obs=look_away,
        )
        rows = []
        for _ in range(GOALS_PER_TASK):
            sawyer.reset_model()
            sawyer.reset_model()
            rows.append(sawyer._last_rand_vec)
        table = np.array(rows)
        with _shared_lock:
            while len(_goal_tables) >= _GOAL_TABLES:
                del _goal_tables[next(iter(_goal_tables))]
            _goal_tables[self.task, seed] = table
        return table


def _detached(value: Any) -> Any:
    """A copy of an attribute; but a view into the simulation's data stays a view of it, as MetaWorld has it."""
    if isinstance(value, np.ndarray):
        return value.copy() if value.flags.owndata else value
    if isinstance(value, _UNCHANGING):
        return value
    return copy.deepcopy(value)


_UNCHANGING = (bool, int, float, str, np.generic, type(None), spaces.Space)
_goal_tables: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
_idle: list[Simulator] = []  # those given back last at the end
_shared_lock = threading.Lock()  # of what the process's threads share


def acquire_simulator(task: str) -> Simulator:
    """Take from the process an idle simulator of this task, or make one, of an idle one of the same scene if it can."""
    wanted = scene_file(task)
    predecessor = None
    with _shared_lock:
        of_scene = [simulator for simulator in reversed(_idle) if simulator.scene_file == wanted]
        if of_scene:
            predecessor = next((simulator for simulator in of_scene if simulator.task == task), of_scene[0])
            _idle.remove(predecessor)
    if predecessor is not None and predecessor.task == task:
        return predecessor
    return Simulator(task, predecessor)


def release_simulator(simulator: Simulator) -> None:
    """Give a simulator back for the next environment of this process that wants its task or its scene."""
    with _shared_lock:
        _idle.append(simulator)
        del _idle[:-_IDLE_SIMULATORS]
