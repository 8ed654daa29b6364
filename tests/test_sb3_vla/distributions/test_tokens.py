"""Action tokens against OpenVLA-OFT's recorded outputs and torch.distributions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from toy import StateModel, ToyTokens, stir

from sb3_vla.distributions import ActionTokens, make_distribution
from sb3_vla.models import Context
from sb3_vla.models.base import PERCEPTION
from sb3_vla.models.openvla_oft import openvla_token_values

REFERENCE = load_file(Path(__file__).parents[2] / "data" / "tokens.safetensors")
FIRST_ID = 31_744


class Recorded(StateModel):
    """Answers with the recorded logits, of one action of seven dimensions."""

    prediction = "tokens"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(7, 1)
        self.register_buffer("token_values", openvla_token_values())
        self.dtype = dtype

    def token_logits(self, context: Context) -> Tensor:
        return REFERENCE["action_logits_256"][:, None].to(self.dtype)


def test_tokens_equal_the_reference() -> None:
    model = Recorded()
    context = model.encode({"state": torch.zeros(2, 1)})
    tokens = make_distribution("tokens", model, 1, temperature=1.6)
    trace = {"tokens": REFERENCE["sample_tokens"] - FIRST_ID}
    mean, std = tokens.transition(model, context, trace)
    executed = torch.tensor([1, 1])
    found = tokens.log_prob(mean, std, trace, executed, "token")
    torch.testing.assert_close(found[:, 0], REFERENCE["train_logprobs"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 0], REFERENCE["sample_logprobs"], atol=1e-6, rtol=0)
    total = tokens.log_prob(mean, std, trace, executed)
    torch.testing.assert_close(total, REFERENCE["train_logprobs"].sum(1), atol=1e-5, rtol=0)
    entropy = tokens.entropy(mean, std, executed)
    assert entropy is not None
    torch.testing.assert_close(entropy, REFERENCE["train_entropy"].sum(1), atol=1e-5, rtol=0)
    # Actions of tokens: what was sampled there, and the likeliest.
    assert torch.equal(model.token_values[trace["tokens"]], REFERENCE["sample_actions_norm"])
    greedy = model.token_values[REFERENCE["greedy_tokens"] - FIRST_ID]
    assert torch.equal(tokens.mode(model, context), greedy)


def test_openvla_bins() -> None:
    """255 centers for 256 tokens, the highest token the lowest action; the two lowest tokens share one."""
    values = openvla_token_values()
    assert values.shape == (256,) and values[255].item() == pytest.approx(-1 + 1 / 255)
    assert values[0] == values[1] and values[1].item() == pytest.approx(1 - 1 / 255)
    torch.testing.assert_close(values[1:-1] - values[2:], torch.full((254,), 2 / 255))


def test_samples_follow_the_tempered_probabilities() -> None:
    model, count = ToyTokens(), 40_000
    stir(model, size=0.5)
    context = model.encode({PERCEPTION + "state": torch.ones(count, 4)})
    tokens = ActionTokens(2, temperature=1.6)
    with torch.no_grad():
        action, trace = tokens.sample(model, context, torch.Generator().manual_seed(0))
        expected = (model.token_logits(context)[0].double() / 1.6).softmax(2)  # (K, A, V)
    assert trace["tokens"].shape == (count, 2, 2) and trace["tokens"].dtype == torch.int64
    assert torch.equal(action, model.token_values[trace["tokens"]])
    frequency = torch.nn.functional.one_hot(trace["tokens"], 5).double().mean(0)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
    assert (expected.amax(2) - expected.amin(2)).min() > 0.1  # no uniform distribution


def test_closed_forms() -> None:
    model = ToyTokens()
    stir(model, size=0.5)
    state = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    context, other = (model.encode({PERCEPTION + "state": shifted}) for shifted in (state, state + 1))
    tokens = ActionTokens(2, temperature=0.7)
    executed = torch.tensor([2, 1, 0, 2])
    _, trace = tokens.sample(model, context, torch.Generator().manual_seed(0))
    mean, std = tokens.transition(model, context, trace)
    reference_mean, reference_std = tokens.transition(model, other, trace)
    p, q = (Categorical(logits=logits.double() / 0.7) for logits in (mean, reference_mean))
    run = (torch.arange(2) < executed[:, None])[:, :, None]
    for found, terms in (
        (tokens.log_prob(mean, std, trace, executed), p.log_prob(trace["tokens"])),
        (tokens.entropy(mean, std, executed), p.entropy()),
        (tokens.kl_divergence(mean, std, reference_mean, reference_std, executed), kl_divergence(p, q)),
    ):
        assert found is not None
        torch.testing.assert_close(found.double(), (terms * run).sum((1, 2)), atol=1e-5, rtol=1e-5)


def test_a_bfloat16_model_has_float32_log_probabilities() -> None:
    model = Recorded(torch.bfloat16)
    context = model.encode({"state": torch.zeros(2, 1)})
    tokens = ActionTokens(1)
    action, trace = tokens.sample(model, context)
    mean, std = tokens.transition(model, context, trace)
    log_prob = tokens.log_prob(mean, std, trace, torch.tensor([1, 1]))
    assert action.dtype == mean.dtype == std.dtype == log_prob.dtype == torch.float32
    expected = torch.log_softmax(REFERENCE["action_logits_256"].bfloat16().double(), 2)
    chosen = expected.gather(2, trace["tokens"].transpose(1, 2))[..., 0].sum(1)
    torch.testing.assert_close(log_prob.double(), chosen, atol=1e-5, rtol=0)


def test_less_noise_is_greedier() -> None:
    torch.manual_seed(0)
    model = ToyTokens()
    stir(model, size=0.5)
    context = model.encode({PERCEPTION + "state": torch.ones(200, 4)})
    tokens = ActionTokens(2)

    def greedy(noise_scale: float) -> float:
        """Share of the samples that are the mode."""
        tokens.noise_scale = noise_scale
        with torch.no_grad():
            return (tokens.sample(model, context)[0] == tokens.mode(model, context)).float().mean().item()

    assert greedy(0.01) > 0.99 > greedy(1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature=.*; expected a positive number"):
        make_distribution("tokens", ToyTokens(), 2, temperature=temperature)
