"""Gymnasium ids.

Gymnasium loads no plug-ins since 1.0: ``gym.make("mw_envs:MetaWorldMT50-v0")`` always works, the bare id after
``import mw_envs``.
"""

from __future__ import annotations

import gymnasium as gym

ENV_IDS = tuple(f"MetaWorld{suite}-v0" for suite in ("MT1", "MT10", "MT50", "ML10", "ML45"))


def register_envs() -> None:
    """Register the environments with Gymnasium; a second call does nothing."""
    for env_id in ENV_IDS:
        if env_id not in gym.registry:
            suite = env_id.removeprefix("MetaWorld").removesuffix("-v0")
            gym.register(
                env_id,
                entry_point="mw_envs.env:MetaWorldEnv",
                vector_entry_point="mw_envs.vector:make_vector_env",
                kwargs={"suite": suite},
            )
