"""All of a training between two iterations, so that after an interrupt it goes on as if there had been none.

Between a rollout and the next one no decision is stored, so what remains is: weights, optimiser, counters, generators,
what was logged and not yet written, and the episodes in progress. An environment tells its own by ``snapshot()`` and
takes it back with ``reset(options={"snapshot": ...})``, as :class:`mw_envs.env.MetaWorldEnv` does: its generator, the
trial, and the actions since, which are run again. That costs less than an episode once per resume, and holds without
knowing what simulator and task keep between two steps.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecTransposeImage

from sb3_vla.checkpoints.training_state import load_training_state, save_training_state
from sb3_vla.ppo import PPO

_COUNTERS = (
    "num_timesteps",
    "env_steps",
    "updates",
    "_n_updates",
    "_current_progress_remaining",
    "_trial_entropy",  # of GRPO alone
)


def save_algorithm(folder: Path, algorithm: PPO) -> None:
    """Write the state of a training, between two iterations, into a folder that there is.

    The reference policy of ``kl_coef`` is not written: whoever builds the algorithm again anchors it first.

    :raises ValueError: if the environments cannot tell their state.
    """
    env = _environment(algorithm)
    assert algorithm._last_episode_starts is not None
    rehearsal, log = algorithm.rehearsal, algorithm.logger
    values = {
        "counters": {name: getattr(algorithm, name) for name in _COUNTERS if hasattr(algorithm, name)},
        "environments": env.env_method("snapshot"),
        "episode_starts": algorithm._last_episode_starts.tolist(),
        "episodes": {task: list(episodes) for task, episodes in algorithm._episodes.items()},
        "episode_infos": list(algorithm.ep_info_buffer or ()),
        "successes": [bool(success) for success in algorithm.ep_success_buffer or ()],
        "rehearsal": None if rehearsal is None else rehearsal.generator.bit_generator.state,
        # An update's metrics are written with the next rollout's.
        "log": [[key, value, log.name_to_excluded[key]] for key, value in log.name_to_value.items()],
    }
    save_training_state(folder, {"policy": algorithm.policy}, algorithm.policy.optimizer, values)


def load_algorithm(folder: Path, algorithm: PPO) -> None:
    """Bring an algorithm that was built with the same arguments, its environments and the process's generators to a
    saved state; ``learn(..., reset_num_timesteps=False)`` then goes on. The algorithm must have its logger.

    :raises ValueError: if the state is of another algorithm or of other environments.
    """
    values = load_training_state(folder, {"policy": algorithm.policy}, algorithm.policy.optimizer)
    env, snapshots = _environment(algorithm), values["environments"]
    if len(snapshots) != env.num_envs:
        raise ValueError(f"{folder} is of {len(snapshots)} environments; this algorithm has {env.num_envs}")
    for name, value in values["counters"].items():
        setattr(algorithm, name, value)
    env.set_options([{"snapshot": snapshot} for snapshot in snapshots])
    algorithm._last_obs = env.reset()  # type: ignore[assignment]
    algorithm._last_episode_starts = np.array(values["episode_starts"], dtype=bool)
    for task, episodes in values["episodes"].items():
        algorithm._episodes[task].extend((success, length) for success, length in episodes)
    algorithm.ep_info_buffer = deque(values["episode_infos"], maxlen=algorithm._stats_window_size)
    algorithm.ep_success_buffer = deque(values["successes"], maxlen=algorithm._stats_window_size)
    if algorithm.rehearsal is not None:
        algorithm.rehearsal.generator.bit_generator.state = values["rehearsal"]
    for key, value, excluded in values["log"]:
        algorithm.logger.record(key, value, exclude=tuple(excluded))


def _environment(algorithm: PPO) -> VecEnv:
    env = algorithm.env
    assert env is not None
    wrapper: Any = env
    while isinstance(wrapper, VecEnvWrapper):
        if not isinstance(wrapper, VecTransposeImage):
            raise ValueError(f"A training can go on exactly without {type(wrapper).__name__}, whose state is not kept")
        wrapper = wrapper.venv
    if not env.has_attr("snapshot"):
        raise ValueError(
            "These environments cannot tell their state: a training can go on exactly only with a method snapshot() "
            'and a reset option "snapshot", such as those of mw_envs'
        )
    return env
