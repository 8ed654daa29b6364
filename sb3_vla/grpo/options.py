"""Options of GRPO, checked before anything is built; each error names the value and what was expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError
from sb3_vla.grpo.groups import ADVANTAGE_TYPES

if TYPE_CHECKING:
    from sb3_vla.grpo.grpo import GRPO

EPISODE_RETURNS = ("reward", "success")


def check_groups(algorithm: GRPO) -> None:
    """:raises ValueError: for options of groups that are out of range, or that the environments cannot follow."""
    if algorithm.group_size < 2:
        raise InputError(
            f"group_size={algorithm.group_size}; expected at least 2: an episode is compared with the others of its "
            "group. 8 is usual; sb3_vla.PPO needs no groups"
        )
    if algorithm.n_groups < 1:
        raise InputError(f"n_groups={algorithm.n_groups}; expected at least 1")
    if algorithm.max_groups is not None and algorithm.max_groups < algorithm.n_groups:
        raise InputError(f"max_groups={algorithm.max_groups}; expected at least n_groups={algorithm.n_groups}")
    if algorithm.n_envs % algorithm.group_size and algorithm.group_size % algorithm.n_envs:
        raise InputError(
            f"{algorithm.n_envs} environments for groups of group_size={algorithm.group_size} episodes; expected a "
            "multiple of the group's size, or a divisor of it, with which a group takes several turns"
        )
    low, high = algorithm.success_bounds
    if not 0 <= low <= high <= 1:
        raise InputError(f"success_bounds={algorithm.success_bounds}; expected 0 <= least <= greatest <= 1")
    if not any(low <= successes / algorithm.group_size <= high for successes in range(algorithm.group_size + 1)):
        raise InputError(
            f"success_bounds={algorithm.success_bounds} keep no group of group_size={algorithm.group_size}: no share "
            f"of its episodes is between them; expected some multiple of 1/{algorithm.group_size} to be"
        )
    for name, known in (("episode_return", EPISODE_RETURNS), ("advantage_type", ADVANTAGE_TYPES)):
        value = getattr(algorithm, name)
        if value not in known:
            raise InputError(f"Unknown {name}={value!r}; {did_you_mean(value, known)}")
