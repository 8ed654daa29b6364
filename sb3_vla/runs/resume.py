"""All of a training between two iterations, so that after an interrupt it goes on as if there had been none.

Between a rollout and the next one no decision is stored, so what remains is: weights, optimizer, counters, generators,
what was logged and not yet written, and the episodes in progress. An environment tells its own by ``snapshot()`` and
takes it back with ``reset(options={"snapshot": ...})``, as :class:`mw_envs.env.MetaWorldEnv` does: its generator, the
trial, and the actions since, which are run again. That costs less than an episode once per resume, and holds without
knowing what simulator and task keep between two steps.

Of several ranks it is one state: their generators are the same, and their environments stand in one list. So a training
also goes on with another number of ranks, which share that list anew.
"""

from __future__ import annotations

import warnings
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecTransposeImage

from sb3_vla.checkpoints.training_state import load_training_state, save_training_state
from sb3_vla.common.errors import InputError
from sb3_vla.distributed.fsdp import whole_optimizer_state, whole_weights
from sb3_vla.distributed.ranks import Ranks
from sb3_vla.ppo.ppo import PPO
from sb3_vla.rollouts.metrics import EpisodeRecord

_COUNTERS = (
    "num_timesteps",
    "env_steps",
    "updates",
    "_n_updates",
    "_current_progress_remaining",
    "_trial_entropy",  # of GRPO alone
)


def save_algorithm(folder: Path | None, algorithm: PPO) -> None:
    """Write the state of a training, between two iterations, into a folder that there is; all ranks must call it.

    :param folder: None on the ranks that do not write.

    The reference policy of ``kl_coef`` is not written: whoever builds the algorithm again anchors it first.

    :raises ValueError: if the environments cannot tell their state.
    """
    env = _environment(algorithm)
    assert algorithm._last_episode_starts is not None
    rehearsal, log, ranks = algorithm.rehearsal, algorithm.logger, algorithm.ranks
    values = {
        "ranks": ranks.count,
        "counters": {name: getattr(algorithm, name) for name in _COUNTERS if hasattr(algorithm, name)},
        "environments": _of_all(ranks, env.env_method("snapshot")),
        "episode_starts": _of_all(ranks, algorithm._last_episode_starts.tolist()),
        "episodes": {task: list(episodes) for task, episodes in algorithm.episodes.by_task.items()},
        "episodes_without_success": algorithm.episodes.without_success,
        "episode_infos": list(algorithm.ep_info_buffer or ()),
        "successes": [bool(success) for success in algorithm.ep_success_buffer or ()],
        "rehearsal": None if rehearsal is None else rehearsal.generator.bit_generator.state,
        # An update's metrics are written with the next rollout's.
        "log": [[key, value, log.name_to_excluded[key]] for key, value in log.name_to_value.items()],
    }
    optimizer_state = whole_optimizer_state(algorithm.policy.optimizer, algorithm.policy)
    with whole_weights(algorithm.policy):
        if folder is not None:
            save_training_state(folder, {"policy": algorithm.policy}, optimizer_state, values)


def load_algorithm(folder: Path, algorithm: PPO) -> None:
    """Bring an algorithm that was built with the same arguments, its environments and the process's generators to a
    saved state; ``learn(..., reset_num_timesteps=False)`` then goes on. The algorithm must have its logger.

    :raises ValueError: if the state is of another algorithm or of other environments.
    """
    values = load_training_state(folder, {"policy": algorithm.policy}, algorithm.policy.optimizer)
    env, ranks = _environment(algorithm), algorithm.ranks
    count = env.num_envs * ranks.count
    if len(values["environments"]) != count:
        raise InputError(f"{folder} is of {len(values['environments'])} environments; this algorithm has {count}")
    own = slice(ranks.rank * env.num_envs, (ranks.rank + 1) * env.num_envs)
    if values["ranks"] != ranks.count:
        warnings.warn(
            f"This training ran on {values['ranks']} rank(s) and goes on with {ranks.count}: to the same result up to "
            "rounding, not bit for bit",
            stacklevel=2,
        )
    for name, value in values["counters"].items():
        setattr(algorithm, name, value)
    env.set_options([{"snapshot": snapshot} for snapshot in values["environments"][own]])
    algorithm._last_obs = env.reset()  # type: ignore[assignment]
    algorithm._last_episode_starts = np.array(values["episode_starts"][own], dtype=bool)
    for task, episodes in values["episodes"].items():
        algorithm.episodes.by_task[task].extend(EpisodeRecord(*episode) for episode in episodes)
    algorithm.episodes.without_success = values["episodes_without_success"]
    algorithm.ep_info_buffer = deque(values["episode_infos"], maxlen=algorithm._stats_window_size)
    algorithm.ep_success_buffer = deque(values["successes"], maxlen=algorithm._stats_window_size)
    if algorithm.rehearsal is not None:
        algorithm.rehearsal.generator.bit_generator.state = values["rehearsal"]
    for key, value, excluded in values["log"]:
        algorithm.logger.record(key, value, exclude=tuple(excluded))


def _of_all(ranks: Ranks, values: list[Any]) -> list[Any]:
    return [value for part in ranks.gather(values) for value in part]


def _environment(algorithm: PPO) -> VecEnv:
    env = algorithm.env
    assert env is not None
    wrapper: Any = env
    while isinstance(wrapper, VecEnvWrapper):
        if not isinstance(wrapper, VecTransposeImage):
            raise InputError(f"A training can go on exactly without {type(wrapper).__name__}, whose state is not kept")
        wrapper = wrapper.venv
    if not env.has_attr("snapshot"):
        raise InputError(
            "These environments cannot tell their state: a training can go on exactly only with a method snapshot() "
            'and a reset option "snapshot", such as those of mw_envs'
        )
    return env
