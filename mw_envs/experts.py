"""MetaWorld's scripted experts behind one interface."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mw_envs.tasks import get_task


class ScriptedExpert:
    """A scripted policy for one task; it reads the simulator's privileged state, not the picture.

    :param task: a task name.
    :raises ValueError: for an unknown task.
    """

    def __init__(self, task: str) -> None:
        from metaworld import policies  # imports mujoco: only when an expert is wanted

        self.task = task
        self._policy = getattr(policies, get_task(task).expert)()

    def action(self, privileged_state: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """The expert's action, float32, shape (4,), clipped to [-1, 1].

        MetaWorld's experts return displacements of up to 25; the simulator clips them, so a label must be clipped too.

        :param privileged_state: MetaWorld's own observation with the goal, shape (39,).
        """
        action = np.asarray(self._policy.get_action(np.asarray(privileged_state, dtype=np.float64)), dtype=np.float32)
        return np.clip(action, -1.0, 1.0)
