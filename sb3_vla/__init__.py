"""Reinforcement learning of vision-language-action policies with Stable-Baselines3.

Importing this package registers the MetaWorld environments with Gymnasium, and ``"VLAPolicy"`` with the PPO of
Stable-Baselines3 and the TRPO of sb3-contrib.
"""

import sys
from importlib.metadata import version
from pathlib import Path

# `sb3-vla doctor` and `python -m sb3_vla doctor` are asked why what is imported here fails, hangs or crashes.
if sys.argv[1:2] != ["doctor"] or Path(sys.argv[0]).name not in ("sb3-vla", "-m"):
    import sb3_contrib
    import stable_baselines3

    import mw_envs as mw_envs
    from sb3_vla.grpo import GRPO
    from sb3_vla.holding import HoldAtEnd
    from sb3_vla.policies import VLAPolicy
    from sb3_vla.ppo import PPO
    from sb3_vla.vec_env import SharedMemoryVecEnv

    stable_baselines3.PPO.policy_aliases["VLAPolicy"] = VLAPolicy  # type: ignore[assignment]
    sb3_contrib.TRPO.policy_aliases["VLAPolicy"] = VLAPolicy  # type: ignore[assignment]
    __version__ = version("sb3-vla")

__all__ = ["GRPO", "PPO", "HoldAtEnd", "SharedMemoryVecEnv", "VLAPolicy", "__version__"]
