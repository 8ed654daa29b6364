"""What a training runs on a GPU, on tensors that claim to be on one and have no contents.

An operation between devices is an error there, so is a number that is made on the wrong one, and so is a look at a
result, for which the host would wait in the middle of a decision. No GPU is needed. Gradients are left out: without a
GPU torch cannot make them, and they are on the devices of what they are gradients of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from toy import TINY, ToyEnv
from toy_pi0 import TINY_PI0

from sb3_vla.models.pi0 import Pi0
from sb3_vla.policies import VLAPolicy

GPU = torch.device("cuda", 0)
COUNT = 3
PI0 = {**TINY_PI0, "prompt_tokens": 12}


@contextmanager
def fake_gpu(*, bf16: bool) -> Iterator[None]:
    """Tensors without contents; autocast by its switches, because torch.autocast asks for a real GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_autocast_enabled("cuda", bf16)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)


def to_gpu(module: nn.Module) -> None:
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)  # type: ignore[assignment]


def make_policy(model: str, model_kwargs: dict[str, Any], distribution: str, **options: Any) -> VLAPolicy:
    env = ToyEnv(chunk=5, action_dim=4, image_size=96)
    kwargs = {"model": model, "model_kwargs": model_kwargs, "distribution": distribution, **options}
    policy = VLAPolicy(env.observation_space, env.action_space, lambda _: 1e-3, **kwargs)
    if isinstance(policy.model, Pi0):  # what the tokenizer gives lies in the machine's own memory
        policy.model._shown_prompt = lambda _: (  # type: ignore[assignment, method-assign]
            torch.zeros(COUNT, 7, dtype=torch.int64),
            torch.ones(COUNT, 7, dtype=torch.bool),
            True,
        )
    return policy


def observation(policy: VLAPolicy) -> dict[str, Tensor]:
    """As an environment gives it, so that pictures are made to fit on the GPU."""
    found = {}
    for key, space in policy.observation_space.spaces.items():  # type: ignore[attr-defined]
        kind = {"uint8": torch.uint8, "float32": torch.float32}[str(space.dtype)]
        found[key] = torch.empty((COUNT, *space.shape), dtype=kind, device=GPU)
    return found


def assert_on_gpu(*found: Any) -> None:
    for tensor in torch.utils._pytree.tree_leaves(found):
        assert not isinstance(tensor, Tensor) or tensor.device == GPU, tensor


def test_it_notices() -> None:
    """What the other tests rely on."""
    with fake_gpu(bf16=True):
        here, there = torch.ones(2, 2), torch.empty(2, 2, device=GPU)
        with pytest.raises(RuntimeError, match="two devices"):
            there + here
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        assert (there @ there).dtype == torch.bfloat16


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("model", "model_kwargs", "distribution", "options"),
    [
        ("pi0", PI0, "flow_sde", {}),
        ("pi0", PI0, "flow_cps", {"frozen_bf16": True, "distribution_kwargs": {"joint": True}}),
        ("pi0", PI0, "flow_noise", {"trainable": "all"}),
        ("pi05", {**PI0, "discrete_state_input": False}, "flow_sde", {"distribution_kwargs": {"joint": True}}),
        ("pi05", {**PI0, "discrete_state_input": False}, "flow_noise", {"trainable": "adaptive"}),
        ("compact", TINY, "flow_sde", {"distribution_kwargs": {"joint": True}}),
        ("compact", TINY, "flow_noise", {}),
        ("compact", TINY, "gaussian", {}),
    ],
)
def test_a_decision_and_its_evaluation(
    model: str, model_kwargs: dict[str, Any], distribution: str, options: dict[str, Any], bf16: bool
) -> None:
    policy = make_policy(model, model_kwargs, distribution, **options)
    with fake_gpu(bf16=bf16):
        to_gpu(policy)
        prepared = policy.prepare(observation(policy))
        actions, values, trace = policy.decide(prepared)
        executed = torch.full((COUNT,), 5, device=GPU)
        found = policy.evaluate(prepared, trace, executed)
        kl = policy.distribution.kl_divergence(found.mean, found.std, found.mean, found.std, executed)
        assert_on_gpu(prepared, actions, values, trace, found.values, found.log_prob, found.entropy, kl)
        assert_on_gpu(policy._predict(observation(policy), deterministic=True), policy.predict_values(prepared))
        assert actions.shape == (COUNT, 5, 4)
        assert {found.values.dtype, found.log_prob.dtype, found.mean.dtype, found.std.dtype} == {torch.float32}
        chunks = torch.empty(COUNT, policy.model.action_horizon, 4, device=GPU)
        mask = torch.ones(chunks.shape[:2], dtype=torch.bool, device=GPU)
        assert_on_gpu(policy.imitation_loss(prepared, chunks, mask))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_kept_prefix(bf16: bool) -> None:
    """Here alone the longest prompt is asked of the GPU, once a micro batch, to leave out the room that none needs."""
    policy = make_policy("pi0", PI0, "flow_sde", cache_perception=True)
    with fake_gpu(bf16=bf16):
        to_gpu(policy)
        perceived = policy.prepare(observation(policy))
        assert_on_gpu(perceived)
        assert perceived["perception/keys_values"].shape[4] == 16 + 12
        with pytest.raises(DataDependentOutputException):
            policy.model.contextualise(perceived)
        context = policy.model._conditioned(perceived, padded=True)  # type: ignore[operator]
        assert_on_gpu(policy.distribution.sample(policy.model, context))
