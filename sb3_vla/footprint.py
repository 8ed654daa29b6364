"""The memory that a recipe takes, before anything is allocated."""

from __future__ import annotations

import copy
import functools
import json

import torch

from sb3_vla.distributed import current_ranks
from sb3_vla.memory import MemoryPlan, plan_memory
from sb3_vla.models import VLAModel, make_model
from sb3_vla.plan import Plan
from sb3_vla.sft import SFTConfig
from sb3_vla.training import plan_training

#: what MetaWorld's demonstrations have
_DIMENSIONS = {"action_dim": 4, "state_dim": 4}


def footprint(plan: Plan) -> dict[str, MemoryPlan]:
    """What the stages that learn take of each rank, see :func:`sb3_vla.memory.plan_memory`.

    A checkpoint's model is taken to have its kind's default size.

    :return: by the stage's name, in their order: ``sft``, and ``ppo`` or ``grpo``.
    :raises ValueError: for options that the model does not take.
    """
    ranks = current_ranks().count
    found = {}
    if plan.sft is not None:
        found["sft"] = _imitation(_on_meta(plan), plan.sft, ranks)
    if plan.config is not None and plan.algorithm is not None:
        found[plan.algorithm] = plan_training(_on_meta(plan), plan.config, action_chunk=plan.action_chunk, ranks=ranks)
    return found


def _imitation(model: VLAModel, config: SFTConfig, ranks: int) -> MemoryPlan:
    return plan_memory(
        model,
        trainable=config.trainable,
        batch_size=-(-config.batch_size // ranks),
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        denoisings=config.draws,
        copies=1,  # the averaged weights
    )


def _on_meta(plan: Plan) -> VLAModel:
    """The model, which a plan may change: nothing of it is allocated."""
    options = dict(plan.model_kwargs)
    if plan.begins and plan.sft is not None and plan.load is not None:
        own = {"action_horizon": plan.sft.action_horizon, "image_size": plan.load["image_size"]}
        options = {**_DIMENSIONS, **own, **options}
    elif not plan.begins:  # what it does not say may be no option of the model itself
        options = {}
    return copy.deepcopy(_made(plan.model, json.dumps(options)))


@functools.cache
def _made(name: str, options: str) -> VLAModel:
    with torch.device("meta"):
        return make_model(name, json.loads(options))
