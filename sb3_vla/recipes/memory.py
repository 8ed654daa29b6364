"""The memory that a recipe takes, before anything is allocated."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from typing import Any

import torch

from sb3_vla.checkpoints import load_checkpoint
from sb3_vla.checkpoints.folders import boxed_checkpoints
from sb3_vla.common.paths import local_path
from sb3_vla.common.precision import uses_bf16
from sb3_vla.distributed.ranks import current_ranks
from sb3_vla.models import VLAModel, make_model, takes_option
from sb3_vla.models.lora import prepare_training
from sb3_vla.models.sizes import published_options
from sb3_vla.recipes.resolve import Plan, can_begin
from sb3_vla.runs.memory_plan import MemoryPlan, plan_memory
from sb3_vla.runs.training import plan_training
from sb3_vla.sft.settings import SFTConfig

#: what MetaWorld's demonstrations have
_DIMENSIONS = {"action_dim": 4, "state_dim": 4}
#: options that say more than a checkpoint's size
_OF_ANY_SIZE = ("action_horizon", "precision")
#: options of readers, which say how a published folder is read and leave its size to it
_OF_READING = (
    "acting",
    "max_prompt_tokens",
    "norm_stats",
    "precision",
    "shifted_positions",
    "stop_token",
    "tokenizer",
    "unnorm_key",
)


def footprint(plan: Plan, sizes: Mapping[str, Any] | None = None) -> dict[str, MemoryPlan]:
    """What the stages that learn take of each rank, see :func:`sb3_vla.runs.memory_plan.plan_memory`.

    It is planned for a GPU, also on a machine without one, unless ``device`` is ``cpu``.
    A checkpoint's sizes are those that its folder tells. Where there is no such folder yet, they are those of the new
    model that the recipe describes, with pictures of the model's default size; or else the published ones.

    :param sizes: options of a checkpoint's model, to plan another size.
    :return: by the stage's name, in their order: ``sft``, and ``ppo`` or ``grpo``.
    :raises FileNotFoundError: if the checkpoint is incomplete.
    :raises ValueError: for options that the model does not take, or a checkpoint that is damaged.
    """
    ranks = max(current_ranks().count, plan.local_ranks)
    found = {}
    if plan.sft is not None:
        found["sft"] = _imitation(_on_meta(plan, sizes), plan.sft, ranks)
    if plan.training is not None:
        model = _on_meta(plan, sizes)
        found[plan.training.name] = plan_training(model, plan.training, action_chunk=plan.action_chunk, ranks=ranks)
    return found


def _imitation(model: VLAModel, config: SFTConfig, ranks: int) -> MemoryPlan:
    trainable = config.trainable or model.default_trainable
    lora = {} if config.lora is None and trainable == "lora" else config.lora
    prepare_training(model, trainable, lora=lora, frozen_bf16=config.frozen_bf16)
    return plan_memory(
        model,
        trainable=trainable,
        batch_size=-(-config.batch_size // ranks),
        bf16=uses_bf16(config.bf16, "cpu" if config.device == "cpu" else "cuda"),
        gradient_checkpointing=config.gradient_checkpointing,
        denoisings=config.draws,
        copies=1,  # the averaged weights
    )


def _on_meta(plan: Plan, sizes: Mapping[str, Any] | None) -> VLAModel:
    """The model, which a plan may change: nothing of it is allocated."""
    options = dict(plan.model_kwargs)
    if plan.begins and plan.sft is not None and plan.load is not None:
        own = {"action_horizon": plan.sft.action_horizon, "image_size": plan.load["image_size"], **_hand_view(plan)}
        options = {**_DIMENSIONS, **own, **options}
    elif sizes is None and plan.checkpoint is not None and _is_here(plan.checkpoint):
        return load_checkpoint(plan.checkpoint, options, weights=False).model
    elif sizes is None and _sized(plan.model, options):
        options = {**_DIMENSIONS, "action_horizon": plan.action_chunk, **options}
    else:  # what else it says may be no option of the model itself
        given = {key: value for key, value in options.items() if key in _OF_ANY_SIZE}
        options = {**(published_options(plan.model) if sizes is None else sizes), **given}
    return copy.deepcopy(_made(plan.model, json.dumps(options)))


def _hand_view(plan: Plan) -> dict[str, Any]:
    """The option of a new model that reads the hand view of the recipe's demonstrations."""
    loaded = (plan.load or {}).get("hand_view")
    size = (plan.collect or {}).get("hand_view") if loaded is None else loaded.size
    return {} if size is None or not takes_option(plan.model, "hand_view") else {"hand_view": {"size": size}}


def _is_here(checkpoint: str) -> bool:
    return local_path(checkpoint).is_dir() or checkpoint in boxed_checkpoints()


def _sized(model: str, options: Mapping[str, Any]) -> bool:
    """Whether options describe a new model, whose checkpoint is yet to come, and not how a published one is read."""
    return "base" not in options and can_begin(model, {k: v for k, v in options.items() if k not in _OF_READING})


@functools.cache
def _made(name: str, options: str) -> VLAModel:
    with torch.device("meta"):
        return make_model(name, json.loads(options))
