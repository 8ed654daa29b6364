"""Action distributions against recorded reference vectors, float64 recomputation and torch.distributions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence
from toy import (
    EVERY_DISTRIBUTION,
    StateModel,
    ToyEnv,
    stir,
    tiny_model,
    toy_model_kwargs,
    toy_observation,
    toy_ppo,
    toy_vec,
)

from sb3_vla.distributions import DISTRIBUTIONS as DISTRIBUTION_NAMES
from sb3_vla.distributions import FlowSDE, GaussianChunk, Trace, integrate, make_distribution
from sb3_vla.models import Context, VLAModel
from sb3_vla.policies.vla_policy import VLAPolicy

REFERENCE = load_file(Path(__file__).parents[2] / "data" / "flow_sde.safetensors")
STEPS = 5
DISTRIBUTIONS: list[tuple[str, dict[str, Any]]] = [
    ("gaussian", {}),
    ("gaussian", {"std": [0.1, 0.2, 0.3, 0.4]}),
    ("gaussian", {"coherence": "offset"}),
    ("flow_sde", {}),
    ("flow_sde", {"joint": True}),
    ("flow_cps", {}),
    ("flow_cps", {"joint": True}),
    ("flow_noise", {}),
    ("flow_noise", {"joint": False}),
]


class Replay(StateModel):
    """Answers with recorded velocities, by flow time: (N, steps, H, A)."""

    def __init__(self, velocities: Tensor) -> None:
        super().__init__(velocities.shape[3], velocities.shape[2])
        self.velocities = velocities
        self.asked: list[tuple[Tensor, Tensor]] = []

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x, t))
        steps = self.velocities.shape[1]
        row = torch.arange(len(x)) % len(self.velocities)
        return self.velocities[row, ((1 - t) * steps).round().long()]


class Pull(StateModel):
    """A velocity field that depends on x and t: v = c (x - goal) + t."""

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        return 0.8 * (x - 0.3) + t[:, None, None]


def pull(count: int, horizon: int = 3, dim: int = 2) -> tuple[Pull, Context]:
    model = Pull(dim, horizon)
    return model, model.encode({"state": torch.zeros(count, 1)})


def context_of(model: Replay) -> Context:
    return model.encode({"state": torch.zeros(len(model.velocities), 1)})


def recorded_velocities() -> Tensor:
    """Of the reference's Euler chain x_{i+1} = x_i - v_i / N, from float64."""
    chain = REFERENCE["euler_chain"].double()
    return (chain[:, :-1] - chain[:, 1:]) * STEPS


def reference_trace(step: int) -> tuple[Tensor, Tensor]:
    """The recorded x at a step, and where the recorded noise moved it."""
    start = REFERENCE["euler_chain"][:, step]
    return start, REFERENCE["sde_mean"][:, step] + REFERENCE["sde_std"][step] * REFERENCE["eps"]


def encoded(count: int) -> tuple[VLAModel, Context]:
    model = tiny_model(action_horizon=5)
    model.set_statistics({"action_mean": torch.full((4,), 0.1), "action_std": torch.tensor([0.5, 0.6, 0.7, 0.8])})
    return model, model.encode(toy_observation(count))


# --- Flow-SDE ---------------------------------------------------------------------------------------------------------


def test_reference_vectors_are_consistent() -> None:
    # The one velocity that was recorded beside the chain: float32 rounding of a difference, times N.
    torch.testing.assert_close(recorded_velocities()[:, 0].float(), REFERENCE["velocity_t1"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("step", range(STEPS))
def test_flow_sde_equals_the_reference(step: int) -> None:
    model = Replay(recorded_velocities().float())
    flow = FlowSDE(5, noise_level=0.5, denoising_steps=STEPS)
    start, end = reference_trace(step)
    trace = {"chain": torch.stack([start, end], 1), "denoising_index": torch.tensor([step, step])}
    mean, std = flow.transition(model, context_of(model), trace)
    assert mean.shape == std.shape == (2, 1, 5, 4)
    torch.testing.assert_close(mean[:, 0], REFERENCE["sde_mean"][:, step], atol=2e-6, rtol=0)
    torch.testing.assert_close(std[:, 0], REFERENCE["sde_std"][step].expand(2, 5, 4), atol=1e-6, rtol=0)
    log_prob = flow.log_prob(mean, std, trace, torch.tensor([5, 5]))
    # 20 terms, each with the error of (end - mean) / std.
    torch.testing.assert_close(log_prob, REFERENCE["sde_logp"][:, step].sum((1, 2)), atol=2e-4, rtol=0)
    log_prob = flow.log_prob(mean, std, trace, torch.tensor([2, 0]))
    expected = torch.stack([REFERENCE["sde_logp"][0, step, :2].sum(), torch.tensor(0.0)])
    torch.testing.assert_close(log_prob, expected, atol=2e-4, rtol=0)


def test_joint_flow_sde_is_the_sum_of_the_reference_steps() -> None:
    model = Replay(recorded_velocities().float())
    single = FlowSDE(5, noise_level=0.5, denoising_steps=STEPS)
    joint = FlowSDE(5, noise_level=0.5, denoising_steps=STEPS, joint=True)
    context = context_of(model)
    chain = REFERENCE["euler_chain"]
    mean, std = joint.transition(model, context, {"chain": chain})
    torch.testing.assert_close(mean, REFERENCE["sde_mean"], atol=2e-6, rtol=0)
    torch.testing.assert_close(std[0, :, 0, 0], REFERENCE["sde_std"], atol=1e-6, rtol=0)
    executed = torch.tensor([5, 3])
    summed = torch.zeros(2)
    for step in range(STEPS):
        trace = {"chain": chain[:, step : step + 2], "denoising_index": torch.full((2,), step)}
        summed += single.log_prob(*single.transition(model, context, trace), trace, executed)
    torch.testing.assert_close(joint.log_prob(mean, std, {"chain": chain}, executed), summed, atol=1e-4, rtol=1e-6)


def test_flow_sde_asks_the_model_at_its_own_x_and_time() -> None:
    model = Replay(torch.zeros(3, STEPS, 5, 4))
    flow = FlowSDE(5, denoising_steps=STEPS)
    chain, index = torch.randn(3, 2, 5, 4), torch.tensor([4, 0, 2])
    flow.transition(model, context_of(model), {"chain": chain, "denoising_index": index})
    ((x, t),) = model.asked  # one pass of the denoiser
    assert torch.equal(x, chain[:, 0])
    torch.testing.assert_close(t, torch.tensor([0.2, 1.0, 0.6]))


@pytest.mark.parametrize(
    ("steps", "table"),
    [(5, [0.5, 0.447, 0.274, 0.183, 0.112]), (4, [0.5, 0.433, 0.25, 0.144]), (1, [0.5])],
)
def test_flow_sde_deviations(steps: int, table: list[float]) -> None:
    model, context = pull(steps)
    trace = {"chain": torch.zeros(steps, 2, 3, 2), "denoising_index": torch.arange(steps)}
    _, std = FlowSDE(3, noise_level=0.5, denoising_steps=steps).transition(model, context, trace)
    torch.testing.assert_close(std[:, 0, 0, 0], torch.tensor(table), atol=5e-4, rtol=0)


def test_flow_sde_samples_have_their_mean_and_deviation() -> None:
    count = 20_000
    model, context = pull(count)
    flow = FlowSDE(3, noise_level=0.5, denoising_steps=4)
    _, trace = flow.sample(model, context, torch.Generator().manual_seed(3))
    mean, std = flow.transition(model, context, trace)
    noise = (trace["chain"][:, 1:] - mean) / std  # standard normal, whatever the step
    for step in range(4):
        chosen = noise[trace["denoising_index"] == step]
        # Five standard errors of 5,000 draws of 6 numbers.
        assert abs(chosen.mean().item()) < 5 / math.sqrt(chosen.numel())
        assert abs(chosen.std().item() - 1) < 5 / math.sqrt(2 * chosen.numel())
    counts = torch.bincount(trace["denoising_index"], minlength=4)
    assert (counts - count / 4).abs().max() < 5 * math.sqrt(count * 3 / 16)


def test_flow_sde_joint_chain_ends_in_the_action_and_starts_in_noise() -> None:
    model, context = pull(5000)
    model.set_statistics({"action_mean": torch.tensor([1.0, 2.0]), "action_std": torch.tensor([0.5, 0.25])})
    flow = FlowSDE(2, joint=True, denoising_steps=3)
    action, trace = flow.sample(model, context, torch.Generator().manual_seed(0))
    assert action.shape == (5000, 2, 2) and trace["chain"].shape == (5000, 4, 3, 2)
    expected = trace["chain"][:, -1, :2] * torch.tensor([0.5, 0.25]) + torch.tensor([1.0, 2.0])
    torch.testing.assert_close(action, expected)
    start = trace["chain"][:, 0]
    assert abs(start.mean().item()) < 5 / math.sqrt(start.numel())
    assert abs(start.std().item() - 1) < 5 / math.sqrt(2 * start.numel())


def test_flow_sde_other_steps_follow_the_ode() -> None:
    """Action and trace fit together: from the end of the stochastic step on, the Euler steps give the action."""
    model, context = pull(64)
    flow = FlowSDE(3, denoising_steps=4)
    action, trace = flow.sample(model, context, torch.Generator().manual_seed(0))
    for row in range(64):
        x = trace["chain"][row : row + 1, 1].double()
        for step in range(int(trace["denoising_index"][row]) + 1, 4):
            x = x - 0.25 * (0.8 * (x - 0.3) + 1 - step / 4)
        torch.testing.assert_close(action[row].double(), x[0], atol=1e-5, rtol=0)


def test_flow_sde_without_noise_is_the_ode() -> None:
    model, context = pull(32)
    for joint in (False, True):
        flow = FlowSDE(3, noise_level=1e-6, joint=joint, denoising_steps=4)
        action, _ = flow.sample(model, context, torch.Generator().manual_seed(1))
        start = torch.randn((32, 3, 2), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(action, integrate(model, context, start, 4), atol=1e-5, rtol=0)


def test_flow_sde_kernel_in_float64() -> None:
    """The formula of the docstring, recomputed for every step of a nonlinear model's own samples."""
    model, context = encoded(16)
    flow = FlowSDE(5, noise_level=0.7, joint=True, denoising_steps=4)
    with torch.no_grad():
        _, trace = flow.sample(model, context)
        mean, std = flow.transition(model, context, trace)
        for step in range(4):
            t, s = 1 - step / 4, 1 - (step + 1) / 4
            x = trace["chain"][:, step]
            v = model.denoise(context, x, torch.full((16,), t)).double()
            sigma = 0.7 * math.sqrt(t / (1 - t if t < 1 else 1 - s))
            x0, x1 = x.double() - t * v, x.double() + (1 - t) * v
            expected = x0 * (1 - s) + x1 * (s - sigma**2 * 0.25 / (2 * t))
            torch.testing.assert_close(mean[:, step].double(), expected, atol=5e-6, rtol=0)
            torch.testing.assert_close(std[:, step].double(), torch.full_like(expected, sigma * 0.5), atol=1e-6, rtol=0)


# --- Gaussian ---------------------------------------------------------------------------------------------------------


def test_gaussian_samples_have_their_mean_and_deviation() -> None:
    count = 50_000
    model, context = pull(count)
    std = torch.tensor([0.1, 0.4])
    for coherence in ("independent", "offset"):
        gaussian = GaussianChunk(3, 2, std=[0.1, 0.4], coherence=coherence, denoising_steps=4)
        action, trace = gaussian.sample(model, context, torch.Generator().manual_seed(0))
        assert torch.equal(trace["action"], action)
        noise = action - gaussian.mode(model, context)
        assert (noise.mean(0).abs() < 5 * std / math.sqrt(count)).all()
        assert ((noise.std(0) - std).abs() < 5 * std / math.sqrt(2 * count)).all()
        correlation = torch.corrcoef(noise[:, :, 0].T)[0, 1].item()  # of two steps of a chunk
        assert correlation == pytest.approx(1.0 if coherence == "offset" else 0.0, abs=5 / math.sqrt(count))


def test_gaussian_mode_follows_the_flow_from_zero() -> None:
    model, context = pull(1)
    model.set_statistics({"action_mean": torch.tensor([1.0, 2.0]), "action_std": torch.tensor([0.5, 0.25])})
    x = 0.0
    for step in range(4):
        x -= 0.25 * (0.8 * (x - 0.3) + 1 - step / 4)
    expected = torch.tensor([1 + 0.5 * x, 2 + 0.25 * x]).expand(1, 2, 2)
    torch.testing.assert_close(GaussianChunk(2, 2, denoising_steps=4).mode(model, context), expected)
    assert GaussianChunk(2, 2).denoising_steps == 2  # by which checkpoints act that do not say it
    torch.testing.assert_close(FlowSDE(2, denoising_steps=4).mode(model, context), expected)


def test_independent_gaussian_closed_forms() -> None:
    gaussian = GaussianChunk(3, 2, std=[0.1, 0.4], learn_std=True)
    mean, other, action = (torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(i)) * 0.3 for i in range(3))
    std = gaussian.log_std.exp().expand_as(mean)
    deviation = torch.tensor([0.1, 0.4], dtype=torch.float64).expand(7, 3, 2)
    p, q = Normal(mean.double(), deviation), Normal(other.double(), deviation)
    for steps in (3, 1, 0):
        executed = torch.full((7,), steps)
        for ours, theirs, tolerance in (
            (gaussian.log_prob(mean, std, {"action": action.flatten(1)}, executed), p.log_prob(action.double()), 1e-4),
            (gaussian.kl_divergence(mean, std, other, std, executed), kl_divergence(p, q), 1e-4),
            (gaussian.entropy(mean, std, executed), p.entropy(), 1e-6),
        ):
            assert ours is not None
            torch.testing.assert_close(ours.double(), theirs[:, :steps].sum((1, 2)), atol=tolerance, rtol=1e-5)


def test_offset_gaussian_closed_forms() -> None:
    gaussian = GaussianChunk(3, 2, std=[0.1, 0.4], coherence="offset", learn_std=True)
    mean, other, action = (torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(i)) * 0.3 for i in range(3))
    std = gaussian.log_std.exp().expand_as(mean)
    deviation = torch.tensor([0.1, 0.4], dtype=torch.float64).expand(7, 2)
    executed = torch.tensor([1, 2, 3, 1, 2, 3, 3])  # the offset is drawn once, however much of the chunk was run
    run = [
        torch.stack([row[:n].mean(0) for row, n in zip(x.double(), executed, strict=True)])
        for x in (mean, other, action)
    ]
    p, q = (Independent(Normal(center, deviation), 1) for center in run[:2])
    log_prob = gaussian.log_prob(mean, std, {"action": action}, executed)
    torch.testing.assert_close(log_prob.double(), p.log_prob(run[2]), atol=1e-4, rtol=1e-5)
    kl = gaussian.kl_divergence(mean, std, other, std, executed)
    torch.testing.assert_close(kl.double(), kl_divergence(p, q), atol=1e-4, rtol=1e-5)
    entropy = gaussian.entropy(mean, std, executed)
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), p.entropy(), atol=1e-6, rtol=0)
    nothing = torch.zeros(7, dtype=torch.int64)
    for found in (
        gaussian.log_prob(mean, std, {"action": action}, nothing),
        gaussian.kl_divergence(mean, std, other, std, nothing),
        gaussian.entropy(mean, std, nothing),
    ):
        assert found is not None and torch.equal(found, torch.zeros(7))


def test_a_common_offset_has_no_probability_of_a_step() -> None:
    gaussian = GaussianChunk(3, 2, coherence="offset")
    mean, std = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    for logprob_type in ("action", "token"):
        with pytest.raises(ValueError, match=r"one draw moves the whole chunk.*use 'chunk'"):
            gaussian.log_prob(mean, std, {"action": mean}, torch.tensor([3]), logprob_type)


@pytest.mark.parametrize("coherence", ["independent", "offset"])
def test_learned_deviation_has_the_likelihoods_gradient(coherence: str) -> None:
    gaussian = GaussianChunk(3, 2, std=0.3, coherence=coherence, learn_std=True)
    model, context = pull(5)
    with torch.no_grad():
        _, trace = gaussian.sample(model, context, torch.Generator().manual_seed(0))
    mean, std = gaussian.transition(model, context, trace)
    gaussian.log_prob(mean, std, trace, torch.full((5,), 3)).sum().backward()
    error = (trace["action"] - mean).detach().double() / 0.3
    if coherence == "offset":
        error = error.mean(1, keepdim=True)
    expected = (error.square() - 1).sum((0, 1))  # d log N / d log std = z^2 - 1
    assert gaussian.log_std.grad is not None
    torch.testing.assert_close(gaussian.log_std.grad.double(), expected, atol=1e-4, rtol=1e-5)
    fixed = GaussianChunk(3, 2, std=0.3, coherence=coherence)
    assert not fixed.log_std.requires_grad
    assert fixed.entropy(mean, std, torch.full((5,), 3)) is None


# --- All --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), DISTRIBUTIONS)
def test_log_prob_equals_torch_distributions(name: str, options: dict[str, Any]) -> None:
    model, context = encoded(6)
    distribution = make_distribution(name, model, 5, **options)
    executed = torch.tensor([5, 4, 3, 2, 1, 5])
    with torch.no_grad():
        action, trace = distribution.sample(model, context, torch.Generator().manual_seed(0))
        mean, std = distribution.transition(model, context, trace)
        found = distribution.log_prob(mean, std, trace, executed)
    assert action.shape == (6, 5, 4) and action.dtype == found.dtype == torch.float32 and found.shape == (6,)
    if options.get("coherence") == "offset":
        counts = executed.tolist()
        center, reached = (
            torch.stack([row[:n].mean(0) for row, n in zip(x.double(), counts, strict=True)])
            for x in (mean, trace["action"])
        )
        expected = Normal(center, std[:, 0].double()).log_prob(reached).sum(1)
    else:
        value = trace["action"][:, None] if name == "gaussian" else trace["chain"][:, 1:]
        mean, std = mean.reshape(value.shape), std.reshape(value.shape)
        elementwise = Normal(mean.double(), std.double()).log_prob(value.double())
        expected = torch.stack([row[:, :count].sum() for row, count in zip(elementwise, executed, strict=True)])
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), DISTRIBUTIONS)
def test_divergence_is_zero_from_itself_and_has_the_closed_form(name: str, options: dict[str, Any]) -> None:
    model, context = encoded(4)
    distribution = make_distribution(name, model, 5, **options)
    executed = torch.tensor([5, 4, 1, 0])
    with torch.no_grad():
        _, trace = distribution.sample(model, context)
        mean, std = distribution.transition(model, context, trace)
    assert torch.equal(distribution.kl_divergence(mean, std, mean, std, executed), torch.zeros(4))
    other = mean + 0.1
    found = distribution.kl_divergence(mean, std, other, std, executed)
    elementwise = kl_divergence(Normal(mean.double(), std.double()), Normal(other.double(), std.double()))
    if options.get("coherence") == "offset":
        expected = elementwise.mean(1).sum(1) * (executed > 0)  # every step differs by the same
    else:
        elementwise = elementwise.reshape(4, -1, 5, 4)
        expected = torch.stack([row[:, :count].sum() for row, count in zip(elementwise, executed, strict=True)])
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), DISTRIBUTIONS)
def test_a_generator_makes_samples_reproducible(name: str, options: dict[str, Any]) -> None:
    model, context = encoded(8)
    distribution = make_distribution(name, model, 5, **options)
    state = torch.random.get_rng_state()

    def draw(seed: int) -> list[Tensor]:
        with torch.no_grad():
            action, trace = distribution.sample(model, context, torch.Generator().manual_seed(seed))
        return [action, *trace.values()]

    first, second, third = draw(0), draw(0), draw(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], third[0])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("name", "options"), DISTRIBUTIONS)
def test_noise_scale_is_a_factor_of_the_deviation(name: str, options: dict[str, Any]) -> None:
    model, context = encoded(8)
    distribution = make_distribution(name, model, 5, **options)
    with torch.no_grad():
        _, trace = distribution.sample(model, context, torch.Generator().manual_seed(0))
        _, std = distribution.transition(model, context, trace)
        distribution.noise_scale = 0.25
        _, lowered = distribution.transition(model, context, trace)
        action, trace = distribution.sample(model, context, torch.Generator().manual_seed(0))
        mean, _ = distribution.transition(model, context, trace)
    torch.testing.assert_close(lowered, 0.25 * std)
    if name == "gaussian":
        assert (action - mean).std().item() == pytest.approx(0.25 * std.mean().item(), rel=0.5)


@pytest.mark.parametrize(("name", "options"), DISTRIBUTIONS)
def test_only_executed_steps_get_a_gradient(name: str, options: dict[str, Any]) -> None:
    if options.get("coherence") == "offset":
        pytest.skip("one offset is common to the chunk")
    model, context = encoded(1)
    distribution = make_distribution(name, model, 5, **options)
    with torch.no_grad():
        _, trace = distribution.sample(model, context)
        mean, std = distribution.transition(model, context, trace)
    mean.requires_grad_()
    distribution.log_prob(mean, std, trace, torch.tensor([2])).sum().backward()
    assert mean.grad is not None
    by_step = mean.grad.abs().reshape(-1, 5, 4).sum((0, 2))
    assert (by_step[:2] > 0).all() and torch.equal(by_step[2:], torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "options"), [("gaussian", {}), ("flow_sde", {}), ("flow_cps", {}), ("flow_noise", {})]
)
def test_chunk_is_the_start_of_the_horizon(name: str, options: dict[str, Any]) -> None:
    """K < H: the rest of the prediction is neither executed nor counted."""
    model, context = encoded(3)
    distribution = make_distribution(name, model, 2, **options)
    with torch.no_grad():
        action, trace = distribution.sample(model, context)
        mode = distribution.mode(model, context)
        mean, std = distribution.transition(model, context, trace)
        whole = make_distribution(name, model, 5, **options).mode(model, context)
        if name != "gaussian":
            changed = {**trace, "chain": trace["chain"].clone()}
            changed["chain"][:, 1, 2:] += 1.0
            executed = torch.full((3,), 2)
            same = distribution.log_prob(mean, std, changed, executed)
            assert torch.equal(same, distribution.log_prob(mean, std, trace, executed))
    assert action.shape == mode.shape == (3, 2, 4)
    assert torch.equal(mode, whole[:, :2])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gausian", {}, r"gausian.*did you mean 'gaussian'"),
        ("gaussian", {"sdt": 0.1}, r"'gaussian' does not take.*sdt"),
        ("gaussian", {"noise_level": 0.5}, r"noise_level"),
        ("gaussian", {"std": 0.0}, r"std=0.0"),
        ("gaussian", {"std": -1}, r"std=-1"),
        ("gaussian", {"std": math.nan}, r"std=nan"),
        ("gaussian", {"std": [0.1, 0.2]}, r"4 of them"),
        ("gaussian", {"coherence": "common"}, r"coherence='common'"),
        ("gaussian", {"denoising_steps": 0}, r"denoising_steps=0"),
        ("flow_sde", {"noise_level": 0.0}, r"noise_level=0.0"),
        ("flow_sde", {"noise_level": math.inf}, r"noise_level=inf"),
        ("flow_sde", {"denoising_steps": 0}, r"denoising_steps=0"),
        ("flow_sde", {"std": 0.1}, r"'flow_sde' does not take.*std"),
        ("dppo", {}, r"Unknown action distribution 'dppo'.*known: gaussian, flow_ode, flow_sde, .*tokens"),
        ("flow_cps", {"noise_level": 1.5}, r"noise_level=1.5; expected above 0 and at most 1"),
        ("flow_cps", {"noise_level": math.nan}, r"noise_level=nan"),
        ("flow_cps", {"denoising_steps": 1}, r"denoising_steps=1; FlowCPS needs 2"),
        ("flow_noise", {"noise_range": (0.2, 0.1)}, r"noise_range=\(0.2, 0.1\); expected two numbers"),
        ("flow_noise", {"noise_range": (0.0, 0.1)}, r"noise_range"),
        ("flow_noise", {"noise_range": [0.1]}, r"noise_range"),
        ("flow_noise", {"feature_dim": 3}, r"'flow_noise' does not take"),
        ("flow_ode", {"denoising_steps": 0}, r"denoising_steps=0"),
        ("ddim", {}, r"'ddim' is for models that predict epsilon or sample or v_prediction; CompactVLA predicts veloc"),
        ("tokens", {}, r"'tokens' is for models that predict tokens; .*Choose among gaussian, flow_ode, .*flow_cps"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_distribution(name, tiny_model(), 5, **options)


# --- Every distribution, through the policy ---------------------------------------------------------------------------


def decided(
    model: str, name: str, options: dict[str, Any], count: int = 6, **policy_options: Any
) -> tuple[VLAPolicy, dict[str, Tensor], Tensor, Trace]:
    """A policy, prepared observations, the actions it took and their traces."""
    env = ToyEnv()
    policy = VLAPolicy(
        env.observation_space,
        env.action_space,
        lambda _: 1e-3,
        model=model,
        model_kwargs={**toy_model_kwargs(model), **policy_options.pop("model_kwargs", {})},
        distribution=name,
        distribution_kwargs=options,
        **policy_options,
    )
    stir(policy)
    policy.set_training_mode(False)
    observation = policy.prepare(toy_observation(count))
    with torch.no_grad():
        torch.manual_seed(0)
        action, _, trace = policy.decide(observation)
    return policy, observation, action, trace


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("model", "name", "options"), EVERY_DISTRIBUTION)
def test_the_first_ratio_is_exactly_one(toy_models: None, model: str, name: str, options: Any, bf16: bool) -> None:
    """Through PPO, with a model that has dropout, in minibatches; weights do not move."""
    algorithm = toy_ppo(
        toy_vec(2, horizon=2, executed=1),
        model=model,
        model_kwargs={**toy_model_kwargs(model), "dropout": 0.5},
        distribution=name,
        distribution_kwargs=options,
        trainable="expert" if "trained_steps" in options else "all",
        batch_size=16,
        n_steps=32,
        learning_rate=0.0,
        bf16=bf16,
    )
    ratios: list[Tensor] = []
    real = algorithm._actor_loss

    def actor_loss(found: Any, batch: Any, old: Any, *rest: Any) -> Tensor:
        assert found.log_prob.dtype == torch.float32 and found.log_prob.shape == batch.advantages.shape
        ratios.append((found.log_prob - old.log_prob[batch.indices]).exp().detach())
        return real(found, batch, old, *rest)

    algorithm._actor_loss = actor_loss  # type: ignore[method-assign,assignment]
    algorithm.learn(64)
    assert [len(ratio) for ratio in ratios] == [16, 16, 16, 16]
    assert all(torch.equal(ratio, torch.ones_like(ratio)) for ratio in ratios)
    logged = algorithm.logger.name_to_value
    assert logged["train/ratio_max"] == 1.0 and logged["train/approx_kl"] == 0.0
    assert logged["actor/grad_norm"] > 0


@pytest.mark.parametrize(("model", "name", "options"), EVERY_DISTRIBUTION)
def test_a_trace_has_the_same_log_probability_again(toy_models: None, model: str, name: str, options: Any) -> None:
    """Bit for bit, with and without gradient; of executed steps alone, by every type."""
    policy, observation, action, trace = decided(model, name, options)
    executed = torch.tensor([2, 1, 2, 1, 2, 0])
    with torch.no_grad():
        first = policy.evaluate(observation, trace, executed)
    policy.set_training_mode(True)
    again = policy.evaluate(observation, trace, executed)
    assert action.dtype == first.log_prob.dtype == torch.float32
    assert torch.equal(first.log_prob, again.log_prob.detach()) and first.log_prob[5] == 0
    assert torch.isfinite(first.log_prob).all()
    kl = policy.distribution.kl_divergence(again.mean, again.std, first.mean, first.std, executed)
    assert torch.equal(kl, torch.zeros(6))
    offset = options.get("coherence") == "offset"
    shapes = {"denoising_step": (6, first.std.shape[1] if first.std.ndim == 4 and model != "toy_tokens" else 1)}
    for logprob_type, shape in {**shapes, **({} if offset else {"action": (6, 2), "token": (6, 2, 2)})}.items():
        with torch.no_grad():
            found = policy.evaluate(observation, trace, executed, logprob_type).log_prob
        assert found.dtype == torch.float32 and found.shape == shape
        torch.testing.assert_close(found.flatten(1).sum(1), first.log_prob, atol=1e-4, rtol=1e-5)
        if logprob_type in ("action", "token"):  # a step that was not run has a ratio of one
            assert torch.equal(found[1, 1], torch.zeros_like(found[1, 1]))
    with pytest.raises(ValueError, match=r"Unknown logprob_type='chunks'; did you mean 'chunk'"):
        policy.evaluate(observation, trace, executed, "chunks")


@pytest.mark.parametrize(("model", "name", "options"), EVERY_DISTRIBUTION)
def test_what_should_learn_gets_a_gradient(toy_models: None, model: str, name: str, options: Any) -> None:
    policy, observation, _, trace = decided(model, name, options)
    found = policy.evaluate(observation, trace, torch.full((6,), 2))
    found.log_prob.sum().backward(retain_graph=True)
    weight = policy.model.get_parameter("action_out.weight" if model != "toy_diffusion" else "layers.3.weight")
    assert weight.grad is not None and weight.grad.abs().max() > 0
    trained = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    owned = {key: p for key, p in policy.distribution.named_parameters() if not key.startswith("pretrained.")}
    assert bool(owned) is (name == "flow_noise" or options.get("learn_std", False))
    for key, parameter in owned.items():
        assert id(parameter) in trained and parameter.grad is not None and parameter.grad.abs().max() > 0, key
    for key, parameter in policy.distribution.named_parameters():
        if key.startswith("pretrained."):
            assert id(parameter) not in trained and parameter.grad is None
    assert (found.entropy is not None) is policy.distribution.has_entropy
    if found.entropy is not None:
        gradients = torch.autograd.grad(found.entropy.sum(), list(owned.values()) or [weight])
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        assert found.entropy.shape == (6,) and found.entropy.dtype == torch.float32


@pytest.mark.parametrize(("model", "name", "options"), [*EVERY_DISTRIBUTION, ("toy_flow", "flow_ode", {})])
def test_only_the_generator_decides(
    toy_models: None, untouched_global_rng: None, model: str, name: str, options: Any
) -> None:
    """Where one is given, samples follow from it alone; the mode is the same every time and draws nothing."""
    policy = decided_without_drawing(model, name, options)
    context = policy.model.encode(policy.prepare(toy_observation(6)))

    def draw(seed: int) -> list[Tensor]:
        action, trace = policy.distribution.sample(policy.model, context, torch.Generator().manual_seed(seed))
        return [action, *trace.values()]

    with torch.no_grad():
        first, second, third = draw(0), draw(0), draw(1)
        mode, again = (policy.distribution.mode(policy.model, context) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], third[0])
    assert torch.equal(mode, again) and mode.shape == first[0].shape == (6, 2, 2)
    assert torch.isfinite(mode).all()


def decided_without_drawing(model: str, name: str, options: dict[str, Any]) -> VLAPolicy:
    """:func:`decided`'s policy, whose initialization leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        return decided(model, name, options)[0]


@pytest.mark.parametrize(("model", "name", "options"), EVERY_DISTRIBUTION)
def test_autocast_leaves_log_probabilities_float32(toy_models: None, model: str, name: str, options: Any) -> None:
    policy, observation, _, trace = decided(model, name, options)
    executed = torch.full((6,), 2)
    with torch.no_grad():
        exact = policy.evaluate(observation, trace, executed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = policy.evaluate(observation, trace, executed)
            action, _, _ = policy.decide(observation)
    for value in (action, found.log_prob, found.mean, found.std):
        assert value.dtype == torch.float32
    assert found.entropy is None or found.entropy.dtype == torch.float32
    # The density is float32's at what bfloat16 computed, and that is near: 8 bits of the mean.
    torch.testing.assert_close(found.mean, exact.mean, atol=0.2, rtol=0.05)
    again = policy.distribution.log_prob(found.mean, found.std, trace, executed)
    assert torch.equal(again, found.log_prob)


@pytest.mark.parametrize("model", ["toy_flow", "toy_diffusion", "toy_tokens"])
@pytest.mark.parametrize("name", DISTRIBUTION_NAMES)
def test_a_distribution_fits_the_model_or_is_refused(toy_models: None, model: str, name: str) -> None:
    fitting = {other for each, other, _ in EVERY_DISTRIBUTION if each == model}
    if model == "toy_flow":
        fitting.add("flow_ode")
    if name in fitting:
        assert isinstance(decided(model, name, {})[0].distribution, DISTRIBUTION_NAMES[name])
        return
    with pytest.raises(ValueError, match=f"Distribution '{name}' is for models that predict") as caught:
        decided(model, name, {})
    offered = set(str(caught.value).rpartition("Choose among ")[2].split(", "))
    assert offered == fitting


def test_the_flow_alone_is_for_evaluation(toy_models: None) -> None:
    policy, observation, action, trace = decided("toy_flow", "flow_ode", {"denoising_steps": 3})
    context = policy.model.encode(observation)
    torch.manual_seed(0)
    start = torch.randn(6, 2, 2)
    expected = integrate(policy.model, context, start, 3)
    torch.testing.assert_close(action, expected, atol=1e-6, rtol=0)
    assert trace == {}
    zero = integrate(policy.model, context, torch.zeros(6, 2, 2), 3)
    assert torch.equal(policy.distribution.mode(policy.model, context), zero)
    message = r"flow_ode.* has no log-probability.*Train with flow_sde"
    with pytest.raises(ValueError, match=message):
        policy.evaluate(observation, trace, torch.full((6,), 2))
    with pytest.raises(ValueError, match=message):  # not after a whole rollout
        toy_ppo(distribution="flow_ode")


def test_more_dimensions_may_be_denoised_than_act() -> None:
    """All L are drawn, stored and read by the denoiser; actions, density and divergence are of the first A."""
    model, context = pull(50, dim=5)
    model.action_dim = 2
    model.set_statistics({})
    model.action_mean, model.action_std = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25])
    for name in ("flow_sde", "flow_cps"):
        flow = make_distribution(name, model, 3, joint=True)
        action, trace = flow.sample(model, context, torch.Generator().manual_seed(0))
        mean, std = flow.transition(model, context, trace)
        steps = trace["chain"].shape[1] - 1
        assert action.shape == (50, 3, 2) and trace["chain"].shape[2:] == (3, 5)
        assert mean.shape == std.shape == (50, steps, 3, 2)
        executed = torch.full((50,), 3)
        expected = Normal(mean.double(), std.double()).log_prob(trace["chain"][:, 1:, :, :2].double()).sum((1, 2, 3))
        torch.testing.assert_close(flow.log_prob(mean, std, trace, executed).double(), expected, atol=1e-3, rtol=1e-5)
        assert flow.mode(model, context).shape == (50, 3, 2)
    gaussian = make_distribution("gaussian", model, 3)
    assert gaussian.sample(model, context)[0].shape == (50, 3, 2)


def test_a_prediction_may_start_in_the_past() -> None:
    """What is executed begins at the model's first_action."""
    model, context = encoded(3)
    whole = make_distribution("flow_sde", model, 5)
    model.first_action = 2
    part = make_distribution("flow_sde", model, 3)
    with torch.no_grad():
        action, trace = part.sample(model, context, torch.Generator().manual_seed(0))
        everything, _ = whole.sample(model, context, torch.Generator().manual_seed(0))
        mean, std = part.transition(model, context, trace)
        all_mean, _ = whole.transition(model, context, trace)
    assert torch.equal(action, everything[:, 2:]) and torch.equal(mean, all_mean[:, :, 2:])
    expected = Normal(mean.double(), std.double()).log_prob(trace["chain"][:, 1:, 2:].double()).sum((1, 2, 3))
    found = part.log_prob(mean, std, trace, torch.full((3,), 3))
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
