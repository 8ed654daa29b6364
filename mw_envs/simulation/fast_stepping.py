"""MetaWorld's environments, made to compute the same in less time.

Each function here stands for one of MetaWorld's, SciPy's or Gymnasium's and gives its results to the last bit, but for
a reward that is not wanted.
"""

from __future__ import annotations

import functools
import math
import types
from typing import Any

import numpy as np
import numpy.typing as npt

from mw_envs.rendering.view import explained_mujoco_import

with explained_mujoco_import():
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.sawyer_xyz_env import SawyerXYZEnv
    from metaworld.utils import reward_utils


# Tasks in which it is a part of success that the gripper touches something; in others only of the reward.
_SUCCESS_BY_TOUCH = frozenset({"stick-push-v3"})


@functools.cache
def sawyer_class(task: str) -> type[SawyerXYZEnv]:
    """MetaWorld's environment of a task with the functions below in place of its own.

    Its ``reward_wanted`` may be set to False: then what it says of the reward means nothing, but success, which depends
    on no part of that, is the same.
    """
    base: Any = ALL_V3_ENVIRONMENTS[task]
    methods: dict[str, Any] = {
        "_initialize_simulation": _given_simulation,
        "_get_curr_obs_combined_no_goal": _hand_and_objects,
        "do_simulation": _simulate,
        "_get_obs": _stacked,
        "_get_quat_objects": _with_replacements(base._get_quat_objects),
        "_gripper_caging_reward": _if_wanted(_with_replacements(base._gripper_caging_reward), _nothing),
        "touching_object": _touching if task in _SUCCESS_BY_TOUCH else _if_wanted(_touching, _nothing),
        "compute_reward": _if_wanted(
            _with_replacements(base.compute_reward), _with_replacements(base.compute_reward, _NO_REWARD)
        ),
        "reward_wanted": True,
    }
    return type(base.__name__, (base,), methods)


def construct(task: str, model: mujoco.MjModel, data: mujoco.MjData) -> SawyerXYZEnv:
    """MetaWorld's environment of a task, with a model in place of one that it would compile.

    :param model: what MuJoCo compiles from the task's scene; MetaWorld changes it.
    :param data: its data as they are after a reset.
    """
    kind = sawyer_class(task)
    sawyer = kind.__new__(kind)
    vars(sawyer)["given"] = (model, data)
    kind.__init__(sawyer)
    return sawyer


def _given_simulation(self: Any) -> tuple[mujoco.MjModel, mujoco.MjData]:
    model, data = vars(self).pop("given")
    # Views of places that each step reads.
    self.hand_place, self.right_claw, self.left_claw = (
        data.xpos[model.body(name).id] for name in ("hand", "rightclaw", "leftclaw")
    )
    return model, data


def _simulate(self: SawyerXYZEnv, ctrl: npt.ArrayLike, n_frames: int) -> None:
    """Without the contact forces, which no task reads."""
    self.data.ctrl[:] = ctrl
    mujoco.mj_step(self.model, self.data, nstep=n_frames)


def _if_wanted(full: Any, short: Any) -> Any:
    """A method that does less where the reward is not wanted."""

    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        return (full if self.reward_wanted else short)(self, *arguments, **options)

    return method


def _nothing(*_: object, **__: object) -> float:
    """In the place of a part of the reward."""
    return 0.0


def stand_still(*_: object) -> None:
    """In the place of what moves a simulator."""


def look_away() -> npt.NDArray[np.float64]:
    """In the place of an observation that is not wanted."""
    return np.zeros(39)


def _hand_and_objects(self: Any) -> npt.NDArray[np.float64]:
    """MetaWorld's own vector of one moment, float64 (18,), to the last bit."""
    apart = self.right_claw - self.left_claw
    observation = np.zeros(4 + self._obs_obj_max_len)
    observation[:3] = self.hand_place
    observation[3] = min(max(math.sqrt(apart.dot(apart)) / 0.1, 0.0), 1.0)
    places, turns = self._get_pos_objects(), self._get_quat_objects()
    for number in range(len(places) // 3):
        start = 4 + 7 * number
        observation[start : start + 3] = places[3 * number : 3 * number + 3]
        observation[start + 3 : start + 7] = turns[4 * number : 4 * number + 4]
    return observation


def _stacked(self: SawyerXYZEnv) -> npt.NDArray[np.float64]:
    """This moment, the one before and the goal, float64 (39,)."""
    current = self._get_curr_obs_combined_no_goal()
    observation = np.zeros(39)
    observation[:18] = current
    observation[18:36] = self._prev_obs
    if not self._partially_observable:
        observation[36:] = self._get_pos_goal()
    self._prev_obs = current
    return observation


def _touching(self: SawyerXYZEnv, object_geom_id: int) -> bool:
    """Whether both pads of the gripper press on a geom."""
    contact, forces = self.data.contact, self.data.efc_force
    pairs, addresses = contact.geom, contact.efc_address
    of_object = (pairs == object_geom_id).any(axis=1)
    for pad in ("leftpad_geom", "rightpad_geom"):
        touching = of_object & (pairs == self.model.geom(pad).id).any(axis=1)
        if not 0 < sum(forces[addresses[touching]]):
            return False
    return True


def _with_replacements(method: Any, utils: Any = None) -> types.FunctionType:
    """A copy of a method of MetaWorld's which finds replacements under the names of what it uses."""
    names = {**method.__globals__, "Rotation": FastRotation, "reward_utils": utils or _REWARD_UTILS}
    return types.FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


def tolerance(
    x: Any,
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: Any = 0.0,
    sigmoid: Any = "gaussian",
    value_at_margin: float = 0.1,
) -> Any:
    """``metaworld.utils.reward_utils.tolerance``, without arrays in the case that nearly all rewards are."""
    lower, upper = bounds
    usual = sigmoid == "long_tail" and value_at_margin == 0.1 and isinstance(x, float)
    if not usual or lower > upper or not margin > 0:
        return reward_utils.tolerance(x, bounds, margin, sigmoid, value_at_margin)
    if lower <= x <= upper:
        return 1.0
    distance = (lower - x if x < lower else x - upper) / margin
    return float(1 / (np.float64(distance * _LONG_TAIL) ** 2 + 1))


_LONG_TAIL = np.sqrt(1 / 0.1 - 1)
_REWARD_UTILS = types.SimpleNamespace(**{**vars(reward_utils), "tolerance": tolerance})
_NO_REWARD = types.SimpleNamespace(
    **{**vars(reward_utils), **dict.fromkeys(("tolerance", "hamacher_product", "rect_prism_tolerance"), _nothing)}
)


class FastRotation:
    """Of SciPy's ``Rotation``, all that MetaWorld uses; it computes the same without checking a matrix of MuJoCo's."""

    def __init__(self, quaternion: npt.NDArray[np.float64]) -> None:
        self._quaternion = quaternion

    @classmethod
    def from_matrix(cls, matrix: npt.NDArray[np.float64]) -> FastRotation:
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
