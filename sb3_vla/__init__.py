"""Reinforcement learning of vision-language-action policies with Stable-Baselines3.

Importing this package registers the MetaWorld environments with Gymnasium, and ``"VLAPolicy"`` with the PPO and A2C of
Stable-Baselines3 and the TRPO of sb3-contrib. What it offers is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_vla.envs.hold_at_end import HoldAtEnd
    from sb3_vla.envs.shared_memory import SharedMemoryVecEnv
    from sb3_vla.grpo.grpo import GRPO
    from sb3_vla.policies.vla_policy import VLAPolicy
    from sb3_vla.ppo.ppo import PPO

    __version__: str

# Worker processes and the learner take turns on the same cores, so threads that wait must soon give theirs up. OpenMP
# reads it when torch is imported, which nothing has done yet in a command of ours.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

__all__ = ["GRPO", "PPO", "HoldAtEnd", "SharedMemoryVecEnv", "VLAPolicy", "__version__"]
_MODULES = {
    "GRPO": "grpo.grpo",
    "PPO": "ppo.ppo",
    "HoldAtEnd": "envs.hold_at_end",
    "SharedMemoryVecEnv": "envs.shared_memory",
    "VLAPolicy": "policies.vla_policy",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sb3-vla")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"sb3_vla.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    import sb3_contrib
    import stable_baselines3

    import mw_envs  # noqa: F401 (registers its environments)
    from sb3_vla.policies.vla_policy import NoVLAPolicy, VLAPolicy

    for module in (stable_baselines3, sb3_contrib):
        for name in module.__all__:
            algorithm = getattr(module, name)
            if hasattr(algorithm, "policy_aliases"):
                trains_it = name in ("PPO", "A2C", "TRPO")
                algorithm.policy_aliases["VLAPolicy"] = VLAPolicy if trains_it else NoVLAPolicy


def _is_command() -> bool:
    """Whether this process is ``sb3-vla`` or ``python -m sb3_vla``, as it was started."""
    # What was started stands before its arguments, and behind Python's own options.
    return Path(sys.orig_argv[-len(sys.argv)]).name in ("sb3-vla", "sb3_vla")


# A command uses our own algorithms; and the doctor is asked why what this imports fails, hangs or crashes.
if not _is_command():
    _register()
