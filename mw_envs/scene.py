"""MuJoCo simulators of MetaWorld tasks: shared within a process, and placed exactly by a trial.

MetaWorld takes 0.2 s to construct a task, ignores ``reset(seed=...)`` and carries attributes over from one episode to
the next. Here a simulator is constructed once per task and process, handed from environment to environment, and taken
back to the state it had after construction before each trial; so an episode depends on its
:class:`~mw_envs.tasks.Trial` alone.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
import types
from collections import defaultdict
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mw_envs.rendering.view import Scene, explained_mujoco_import
from mw_envs.tasks import GOALS_PER_TASK, Trial, get_task

with explained_mujoco_import():
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.sawyer_xyz_env import SawyerXYZEnv

# Camera pose of the published demonstrations and checkpoints (MetaWorld 3.1 calls it corner4; 3.0 does not have it).
CORNER2_POSITION = (0.75, 0.075, 0.7)
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


class Simulator:
    """One task's MuJoCo simulation.

    :param task: a task name. ``scene`` is what renderers know it by.
    :raises ValueError: for an unknown task.
    """

    def __init__(self, task: str) -> None:
        self.task = get_task(task).name
        sawyer = _sawyer_class(task)()
        # The goal stays in the privileged state; the observation space is cached by MetaWorld before that is known.
        sawyer._partially_observable = False
        sawyer.__dict__.pop("sawyer_observation_space", None)
        sawyer._set_task_called = True
        sawyer._freeze_rand_vec = True
        self._sawyer = sawyer
        self.model: mujoco.MjModel = sawyer.model
        self.data: mujoco.MjData = sawyer.data
        self.model.cam_pos[mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, "corner2")] = CORNER2_POSITION
        known = {self.model.body(i).name: i for i in range(self.model.nbody)}
        self.scene = Scene(self.task, frozenset(known[name] for name in _BACKGROUND if name in known))
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
        for name, values in self._initial_model.items():
            getattr(self.model, name)[:] = values
        kept = {name: value for name, value in sawyer.__dict__.items() if name in _KEPT_ATTRIBUTES}
        sawyer.__dict__.clear()
        sawyer.__dict__.update(kept)
        sawyer.__dict__.update({name: _detached(value) for name, value in self._initial_attributes.items()})
        mujoco.mj_resetData(self.model, self.data)
        sawyer._last_rand_vec = goals[trial.goal].copy()

        def place_without_simulating() -> npt.NDArray[np.float64]:
            del sawyer.reset_model  # MetaWorld's own again, for the second time
            vars(sawyer).update(do_simulation=_stand_still)
            try:
                return sawyer.reset_model()
            finally:
                del sawyer.do_simulation

        # MetaWorld places the model, forgets the simulation's data and places it again; so what it simulates first, a
        # hand that takes its place, is lost.
        vars(sawyer).update(reset_model=place_without_simulating)
        observation, _ = sawyer.reset()
        return np.asarray(observation, dtype=np.float64)

    def step(self, action: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], float, bool]:
        """Simulate one environment step (1/80 s).

        :param action: shape (4,); values outside [-1, 1] are clipped.
        :return: observation (39,), MetaWorld's own dense reward (0..10), success at this very step.
        """
        self._sawyer.curr_path_length = 0  # the step limit is the environment's, and settling must not count
        # MetaWorld clips the displacement itself but not the gripper's effort.
        observation, reward, _, _, info = self._sawyer.step(np.clip(action, -1.0, 1.0))
        return observation, float(reward), bool(info["success"])

    def _goal_table(self, seed: int) -> npt.NDArray[np.float64]:
        """The 50 random vectors of ``MT1(task, seed).train_tasks``, shape (50, n), without simulating 50 resets.

        MetaWorld seeds NumPy's global generator for this; an own generator of the same kind gives the same numbers. Its
        ``reset`` places the model twice, so each goal takes the last of two draws; the draws (some tasks reject goals
        too near the object) depend on the random vectors alone, so the hand need not move. Leaves the simulation
        disturbed: :meth:`place` restores it.
        """
        if (self.task, seed) in _goal_tables:
            return _goal_tables[self.task, seed]
        sawyer = self._sawyer
        generator = np.random.RandomState(seed)
        space = cast(spaces.Box, sawyer._random_reset_space)

        def draw() -> npt.NDArray[np.float64]:
            sawyer._last_rand_vec = generator.uniform(space.low, space.high, size=space.low.size)
            return sawyer._last_rand_vec

        def hold_hand(steps: int = 50) -> None:
            sawyer.init_tcp = sawyer.tcp_center

        # Attributes of the instance, which place() removes.
        vars(sawyer).update(_get_state_rand_vec=draw, _reset_hand=hold_hand, do_simulation=_stand_still)
        table = []
        for _ in range(GOALS_PER_TASK):
            sawyer.reset_model()
            sawyer.reset_model()
            table.append(sawyer._last_rand_vec)
        _goal_tables[self.task, seed] = np.array(table)
        return _goal_tables[self.task, seed]


@functools.cache
def _sawyer_class(task: str) -> type[SawyerXYZEnv]:
    """MetaWorld's environment of a task, with the model compiled once per process and copied for each simulator."""
    base = ALL_V3_ENVIRONMENTS[task]
    compiled: list[mujoco.MjModel] = []

    def initialize_simulation(self: SawyerXYZEnv) -> tuple[mujoco.MjModel, mujoco.MjData]:
        if not compiled:
            compiled.append(base._initialize_simulation(self)[0])
        model = copy.copy(compiled[0])
        return model, mujoco.MjData(model)

    methods = {
        "_initialize_simulation": initialize_simulation,
        "_get_curr_obs_combined_no_goal": _hand_and_objects,
        "_get_quat_objects": _with_fast_rotations(base._get_quat_objects),
    }
    return type(base.__name__, (base,), methods)


def _stand_still(ctrl: object, n_frames: int) -> None:
    """In the place of a simulator's ``do_simulation``."""


def _hand_and_objects(self: SawyerXYZEnv) -> npt.NDArray[np.float64]:
    """MetaWorld's own vector of one moment, float64 (18,), to the last bit."""
    data = self.data
    apart = data.body("rightclaw").xpos - data.body("leftclaw").xpos
    observation = np.zeros(4 + self._obs_obj_max_len)
    observation[:3] = self.get_endeff_pos()
    observation[3] = min(max(math.sqrt(apart.dot(apart)) / 0.1, 0.0), 1.0)
    places, turns = self._get_pos_objects(), self._get_quat_objects()
    for number in range(len(places) // 3):
        start = 4 + 7 * number
        observation[start : start + 3] = places[3 * number : 3 * number + 3]
        observation[start + 3 : start + 7] = turns[4 * number : 4 * number + 4]
    return observation


def _with_fast_rotations(method: Any) -> types.FunctionType:
    """A copy of a method of MetaWorld's in which ``Rotation`` is :class:`_FastRotation`."""
    names = {**method.__globals__, "Rotation": _FastRotation}
    return types.FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


class _FastRotation:
    """Of SciPy's ``Rotation``, all that MetaWorld uses; it computes the same without checking a matrix of MuJoCo's."""

    def __init__(self, quaternion: npt.NDArray[np.float64]) -> None:
        self._quaternion = quaternion

    @classmethod
    def from_matrix(cls, matrix: npt.NDArray[np.float64]) -> _FastRotation:
        """Shepperd's method with Markley's choice of the largest component, as SciPy has it."""
        m = matrix.tolist()
        diagonal = [m[0][0], m[1][1], m[2][2]]
        trace = diagonal[0] + diagonal[1] + diagonal[2]
        largest = max(diagonal)
        if trace > largest:  # of equal ones SciPy takes the first, which is not the trace
            q = [m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1], 1 + trace]
        else:
            i = diagonal.index(largest)
            j, k = (i + 1) % 3, (i + 2) % 3
            q = [0.0, 0.0, 0.0, m[k][j] - m[j][k]]
            q[i] = 1 - trace + 2 * m[i][i]
            q[j] = m[j][i] + m[i][j]
            q[k] = m[k][i] + m[i][k]
        length = math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
        return cls(np.array(q) / length)

    def as_quat(self) -> npt.NDArray[np.float64]:
        """The quaternion, scalar last, (4,)."""
        return self._quaternion


def _detached(value: Any) -> Any:
    """A copy of an attribute; but a view into the simulation's data stays a view of it, as MetaWorld has it."""
    if isinstance(value, np.ndarray) and not value.flags.owndata:
        return value
    return copy.deepcopy(value)


# 2.4 kB a table; a process meets some dozens of (task, seed) pairs.
_goal_tables: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
_idle: defaultdict[str, list[Simulator]] = defaultdict(list)
_idle_lock = threading.Lock()


def acquire_simulator(task: str) -> Simulator:
    """Take an idle simulator of this task from the process, or construct one."""
    with _idle_lock:
        if _idle[task]:
            return _idle[task].pop()
    return Simulator(task)


def release_simulator(simulator: Simulator) -> None:
    """Give a simulator back for the next environment of this process that wants its task."""
    with _idle_lock:
        _idle[simulator.task].append(simulator)
