"""The memory that a recipe takes, before anything is allocated."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from typing import Any

import torch

from sb3_vla.distributed import current_ranks
from sb3_vla.memory import MemoryPlan, plan_memory
from sb3_vla.models import VLAModel, make_model
from sb3_vla.models.lora import prepare_training
from sb3_vla.models.sizes import published_options
from sb3_vla.plan import Plan
from sb3_vla.sft import SFTConfig
from sb3_vla.training import plan_training

#: what MetaWorld's demonstrations have
_DIMENSIONS = {"action_dim": 4, "state_dim": 4}
#: options that say more than a checkpoint's size
_OF_ANY_SIZE = ("action_horizon", "precision")


def footprint(plan: Plan, sizes: Mapping[str, Any] | None = None) -> dict[str, MemoryPlan]:
    """What the stages that learn take of each rank, see :func:`sb3_vla.memory.plan_memory`.

    :param sizes: options of a checkpoint's model; None for those of the published one that recipes start from.
    :return: by the stage's name, in their order: ``sft``, and ``ppo`` or ``grpo``.
    :raises ValueError: for options that the model does not take.
    """
    ranks = current_ranks().count
    found = {}
    if plan.sft is not None:
        found["sft"] = _imitation(_on_meta(plan, sizes), plan.sft, ranks)
    if plan.config is not None and plan.algorithm is not None:
        model = _on_meta(plan, sizes)
        found[plan.algorithm] = plan_training(model, plan.config, action_chunk=plan.action_chunk, ranks=ranks)
    return found


def _imitation(model: VLAModel, config: SFTConfig, ranks: int) -> MemoryPlan:
    trainable = config.trainable or model.default_trainable
    lora = {} if config.lora is None and trainable == "lora" else config.lora
    prepare_training(model, trainable, lora=lora, frozen_bf16=config.frozen_bf16)
    return plan_memory(
        model,
        trainable=trainable,
        batch_size=-(-config.batch_size // ranks),
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        denoisings=config.draws,
        copies=1,  # the averaged weights
    )


def _on_meta(plan: Plan, sizes: Mapping[str, Any] | None) -> VLAModel:
    """The model, which a plan may change: nothing of it is allocated."""
    options = dict(plan.model_kwargs)
    if plan.begins and plan.sft is not None and plan.load is not None:
        own = {"action_horizon": plan.sft.action_horizon, "image_size": plan.load["image_size"]}
        options = {**_DIMENSIONS, **own, **options}
    elif not plan.begins:  # what else it says may be no option of the model itself
        given = {key: value for key, value in options.items() if key in _OF_ANY_SIZE}
        options = {**(published_options(plan.model) if sizes is None else sizes), **given}
    return copy.deepcopy(_made(plan.model, json.dumps(options)))


@functools.cache
def _made(name: str, options: str) -> VLAModel:
    with torch.device("meta"):
        return make_model(name, json.loads(options))
