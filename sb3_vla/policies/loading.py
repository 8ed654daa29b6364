"""A policy from a checkpoint, without an environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from mw_envs.tasks import INSTRUCTION_BYTES
from sb3_vla.checkpoints import load_checkpoint
from sb3_vla.distributions import default_distribution
from sb3_vla.policies.observations import HAND_KEY
from sb3_vla.policies.views import settled_view
from sb3_vla.policies.vla_policy import VLAPolicy


def load_policy(
    checkpoint: str | Path,
    action_chunk: int | None = None,
    device: torch.device | str = "cpu",
    model_kwargs: Mapping[str, Any] | None = None,
    view: Mapping[str, Any] | None = None,
    frozen_bf16: bool = False,
) -> VLAPolicy:
    """Load a policy that acts, from a checkpoint; it warns where the checkpoint does not note its view.

    :param checkpoint: see :class:`VLAPolicy`.
    :param action_chunk: K, actions executed per decision; None for the whole predicted horizon.
    :param device: of the policy.
    :param model_kwargs: options that a published checkpoint does not say.
    :param view: ``camera``, ``crop`` or both, where the checkpoint does not note them or others are wanted.
    :param frozen_bf16: keep the backbone's weights in bfloat16, see :class:`VLAPolicy`.
    :raises ValueError: if the model predicts fewer actions than ``action_chunk``.
    """
    loaded = load_checkpoint(checkpoint, model_kwargs, weights=False)
    model = loaded.model
    name, options = loaded.distribution or (default_distribution(model), {})
    state_dim = int(model.config.get("state_dim", 4))
    said = loaded.notes.get("view", {})
    picture = np.broadcast_to(said.get("render_size", model.image_size), 2).tolist()
    observation_space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (*picture, 3), np.uint8),
            "state": spaces.Box(-np.inf, np.inf, (state_dim,), np.float32),
            "instruction": spaces.Box(0, 255, (said.get("instruction_bytes", INSTRUCTION_BYTES),), np.uint8),
        }
    )
    if model.hand_view is not None:
        observation_space[HAND_KEY] = spaces.Box(0, 255, (model.hand_view.size, model.hand_view.size, 3), np.uint8)
    chunk = model.action_horizon - model.first_action if action_chunk is None else action_chunk
    shape = (model.action_dim,) if chunk == 1 else (chunk, model.action_dim)
    policy = VLAPolicy(
        observation_space,
        spaces.Box(-1.0, 1.0, shape, np.float32),
        lambda _: 0.0,
        checkpoint=checkpoint,
        model_kwargs=model_kwargs,
        distribution=name,
        distribution_kwargs=options,
        view=settled_view(checkpoint, said, view or {}),
        frozen_bf16=frozen_bf16,
    )
    return policy.to(device)
