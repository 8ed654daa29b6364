"""The memory that a recipe takes, before anything is allocated."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sb3_vla.doctor import GIB, needed_memory
from sb3_vla.models import VLAModel, make_model
from sb3_vla.plan import Plan
from sb3_vla.training import PPOConfig


@dataclass(frozen=True)
class Footprint:
    """What :func:`footprint` finds; its text is a table.

    :param model: the model's name.
    :param parameters: of the model.
    :param trained: how many of them are trained.
    :param learner: bytes where the model is computed, see :func:`sb3_vla.doctor.needed_memory`.
    :param rollout: bytes of a rollout's pictures, in the machine's memory.
    """

    model: str
    parameters: int
    trained: int
    learner: float
    rollout: int

    def __str__(self) -> str:
        rows = (
            (self.model, f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.1f} M of them trained"),
            ("learner", f"{self.learner / GIB:.1f} GiB on the GPU, or in memory without one; large minibatches more"),
            ("rollout", f"{self.rollout / GIB:.2f} GiB in memory"),
        )
        return "\n".join(["Memory, estimated", *(f"  {name:16}{what}" for name, what in rows)])


def footprint(plan: Plan) -> Footprint:
    """Estimate a plan's memory; a checkpoint's model is taken to have its kind's default size.

    :raises ValueError: for options that the model does not take.
    """
    model = _on_meta(plan)
    trainable = plan.sft.trainable if plan.config is None and plan.sft is not None else "expert"
    trainable = plan.config.trainable if plan.config is not None else trainable
    model.set_trainable(trainable or model.default_trainable)
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    height, width = model.image_size
    return Footprint(
        plan.model, total, trained, needed_memory(total, trained), _most_decisions(plan) * height * width * 3
    )


def _on_meta(plan: Plan) -> VLAModel:
    # What a published checkpoint does not say may be no option of the model itself, such as where its statistics are.
    if not plan.begins or not plan.model_kwargs:
        return _of_default_size(plan.model)
    with torch.device("meta"):  # nothing is allocated
        return make_model(plan.model, plan.model_kwargs)


@functools.cache
def _of_default_size(name: str) -> VLAModel:
    with torch.device("meta"):
        return make_model(name, {})


def _most_decisions(plan: Plan) -> int:
    """Decisions of a rollout whose episodes all have their full length."""
    if plan.config is None:
        return 0
    if isinstance(plan.config, PPOConfig):
        return plan.config.num_envs * plan.config.decisions
    episodes = plan.config.groups * plan.config.group_size
    return episodes * -(-plan.config.horizon // plan.action_chunk)
