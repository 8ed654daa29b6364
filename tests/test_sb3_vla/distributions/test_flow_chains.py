"""Flow chains: transitions against float64 formulas on recorded velocities, marginals against the closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal
from toy import StateModel, stir, tiny_model, toy_observation

from sb3_vla.distributions import FlowCPS, FlowNoise, FlowODE, FlowSDE, make_distribution
from sb3_vla.distributions.chain import DenoisingChain
from sb3_vla.models import Context

REFERENCE = load_file(Path(__file__).parents[2] / "data" / "flow_sde.safetensors")
CHAIN = REFERENCE["euler_chain"]  # (2, 6, 5, 4), x_{i+1} = x_i - v_i / 5
VELOCITIES = (CHAIN[:, :-1].double() - CHAIN[:, 1:].double()) * 5


class Recorded(StateModel):
    """Answers with recorded velocities by flow time, and with what it was asked as features."""

    action_feature_dim = 5

    def __init__(self) -> None:
        super().__init__(4, 5)

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        return VELOCITIES[torch.arange(len(x)) % 2, ((1 - t) * 5).round().long()].float()

    def denoise_features(self, context: Context, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.denoise(context, x, t), torch.cat([x, t[:, None, None].expand(-1, 5, 1)], 2)


def recorded() -> tuple[Recorded, Context]:
    model = Recorded()
    return model, model.encode({"state": torch.zeros(2, 1)})


# --- Transitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.3, 0.5, 1.0])
def test_flow_cps_on_recorded_velocities(level: float) -> None:
    """x_s = (1 - s) x0 + s (cos(pi a / 2) x1 + sin(pi a / 2) noise) of a recorded pi0 chain, in float64."""
    model, context = recorded()
    joint = FlowCPS(5, noise_level=level, joint=True, denoising_steps=5)
    trace = {"chain": CHAIN[:, :5]}
    mean, std = joint.transition(model, context, trace)
    executed = torch.tensor([5, 3])
    total = torch.zeros(2, dtype=torch.float64)
    for step in range(4):
        t, s = 1 - step / 5, 1 - (step + 1) / 5
        x, v = CHAIN[:, step].double(), VELOCITIES[:, step]
        expected = (x - t * v) * (1 - s) + (x + (1 - t) * v) * s * math.cos(math.pi * level / 2)
        deviation = torch.full((2, 5, 4), s * math.sin(math.pi * level / 2), dtype=torch.float64)
        torch.testing.assert_close(mean[:, step].double(), expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(std[:, step].double(), deviation, atol=1e-6, rtol=0)
        terms = Normal(expected, deviation).log_prob(CHAIN[:, step + 1].double())
        of_step = torch.stack([terms[0].sum(), terms[1, :3].sum()])
        total += of_step
        one = {"chain": CHAIN[:, step : step + 2], "denoising_index": torch.full((2,), step)}
        single = FlowCPS(5, noise_level=level, denoising_steps=5)
        found = single.log_prob(*single.transition(model, context, one), one, executed)
        torch.testing.assert_close(found.double(), of_step, atol=1e-3, rtol=1e-5)
    found = joint.log_prob(mean, std, trace, executed)
    torch.testing.assert_close(found.double(), total, atol=2e-3, rtol=1e-5)


def test_flow_cps_has_no_more_noise_than_there_is() -> None:
    flow = FlowCPS(2, noise_level=0.5)
    flow.noise_scale = math.sqrt(2)
    exchanged = flow.noise(torch.tensor(0.5), torch.tensor(0.25))
    assert [part.item() for part in exchanged] == pytest.approx([0, 0.25], abs=1e-6)
    flow.noise_scale = 1.5
    with pytest.raises(ValueError, match=r"noise_scale=1.5 with noise_level=0.5 .* a noise_scale of at most 1.41421,"):
        flow.noise(torch.tensor(0.5), torch.tensor(0.25))


def test_flow_cps_never_draws_the_step_that_has_no_noise() -> None:
    model, context = Point(0.4).of(4000)
    _, trace = FlowCPS(1, denoising_steps=3).sample(model, context, torch.Generator().manual_seed(0))
    counts = torch.bincount(trace["denoising_index"], minlength=3)
    assert counts[2] == 0 and abs(counts[0].item() - 2000) < 5 * math.sqrt(1000)


def test_flow_noise_on_recorded_velocities() -> None:
    """The Euler step as mean; the deviation is the perceptron's, here recomputed in float64 from its weights."""
    model, context = recorded()
    flow = FlowNoise(5, 5, 4, noise_range=(0.04, 0.1), denoising_steps=5, widths=(7, 6))
    stir(flow, size=0.7)
    mean, std = flow.transition(model, context, {"chain": CHAIN})
    torch.testing.assert_close(mean, CHAIN[:, 1:], atol=2e-6, rtol=0)
    weights = {key: value.double() for key, value in flow.noise_head.state_dict().items()}
    for step in range(5):
        h = torch.cat([CHAIN[:, step].double(), torch.full((2, 5, 1), 1 - step / 5).double()], 2)
        for layer in (0, 2, 4):
            h = torch.tanh(h @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
        log_variance = torch.lerp(torch.tensor(math.log(0.04**2)), torch.tensor(math.log(0.1**2)), (h.float() + 1) / 2)
        torch.testing.assert_close(std[:, step], (log_variance / 2).exp(), atol=1e-6, rtol=1e-5)
    assert std.std() > 0.005  # the test would not see a constant
    reached = {"chain": torch.cat([CHAIN[:, :1], CHAIN[:, 1:] + 0.05], 1)}
    executed = torch.tensor([5, 2])
    expected = Normal(mean.double(), std.double()).log_prob(reached["chain"][:, 1:].double())
    entropy = Normal(mean.double(), std.double()).entropy()
    for found, terms in (
        (flow.log_prob(mean, std, reached, executed), expected),
        (flow.entropy(mean, std, executed), entropy),
    ):
        sums = torch.stack([terms[0].sum(), terms[1, :, :2].sum()])
        torch.testing.assert_close(found.double(), sums, atol=1e-3, rtol=1e-5)


def test_flow_noise_starts_in_the_middle_and_stays_in_its_range() -> None:
    model = tiny_model()
    context = model.encode(toy_observation(6))
    flow = make_distribution("flow_noise", model, 5, noise_range=[0.05, 0.2])
    with torch.no_grad():
        _, trace = flow.sample(model, context)
        _, std = flow.transition(model, context, trace)
        torch.testing.assert_close(std, torch.full_like(std, math.sqrt(0.05 * 0.2)))
        stir(flow, size=30.0)
        _, std = flow.transition(model, context, trace)
    assert std.min().item() == pytest.approx(0.05, rel=1e-5) and std.max().item() == pytest.approx(0.2, rel=1e-5)


def test_flow_noise_needs_features() -> None:
    with pytest.raises(ValueError, match=r"flow_noise reads the features.*Point does not give.*flow_sde"):
        make_distribution("flow_noise", Point(0.0), 1)


@pytest.mark.parametrize("flow", [FlowSDE(1), FlowSDE(1, joint=True), FlowCPS(1), FlowCPS(1, joint=True)])
def test_log_probabilities_are_float32_whatever_the_model_gives(flow: DenoisingChain) -> None:
    model, context = Point(0.4, torch.bfloat16).of(100)
    action, trace = flow.sample(model, context)
    mean, std = flow.transition(model, context, trace)
    log_prob = flow.log_prob(mean, std, trace, torch.full((100,), 1))
    for value in (action, *mean, std, log_prob, trace["chain"], flow.mode(model, context)):
        assert value.dtype == torch.float32


# --- Marginals --------------------------------------------------------------------------------------------------------


class Point(StateModel):
    """The exact velocity of a flow whose data is one point."""

    def __init__(self, point: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(1, 1)
        self.point, self.dtype = point, dtype

    def of(self, count: int) -> tuple[Point, Context]:
        return self, self.encode({"state": torch.zeros(count, 1)})

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        return ((x - self.point) / t[:, None, None]).to(self.dtype)


class Spread(StateModel):
    """The exact velocity, v = alpha x + beta, of a flow whose data is N(mean, std^2)."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__(1, 1)
        self.mean, self.std = mean, std

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        """E[noise - action | x] at time t, from the covariances of x, action and noise."""
        alpha = (t - (1 - t) * self.std**2) / (t**2 + (1 - t) ** 2 * self.std**2)
        return alpha, -self.mean - alpha * (1 - t) * self.mean

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        alpha, beta = self.coefficients(t[:, None, None])
        return alpha * x + beta


MEAN, STD = 0.5, 0.3


def predicted(
    kind: str, level: float, steps: int, only: int | None = None, fixed_start: bool = False
) -> tuple[float, float]:
    """Mean and deviation of the actions of a chain on :class:`Spread`, by the recursion of a linear chain in float64.

    :param only: the one stochastic step; None for all.
    """
    model = Spread(MEAN, STD)
    mean, variance = 0.0, 0.0 if fixed_start else 1.0
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        coefficient, std = s, 0.0
        if only in (None, step) and kind == "sde":
            sigma = level * math.sqrt(t / (1 - t if t < 1 else 1 - s))
            coefficient, std = s - sigma**2 / (2 * t * steps), sigma / math.sqrt(steps)
        elif only in (None, step) and kind == "cps":
            coefficient, std = s * math.cos(math.pi * level / 2), s * math.sin(math.pi * level / 2)
        alpha, beta = model.coefficients(t)
        factor = (1 - t * alpha) * (1 - s) + (1 + (1 - t) * alpha) * coefficient
        mean = factor * mean - t * beta * (1 - s) + (1 - t) * beta * coefficient
        variance = factor**2 * variance + std**2
    return mean, math.sqrt(variance)


def drawn(flow: Any, count: int = 40_000) -> Tensor:
    model = Spread(MEAN, STD)
    context = model.encode({"state": torch.zeros(count, 1)})
    return flow.sample(model, context, torch.Generator().manual_seed(0))[0].double().flatten()


def assert_moments(values: Tensor, mean: float, std: float) -> None:
    """Within five standard errors of normal samples."""
    assert values.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(len(values)))
    assert values.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * len(values)))


@pytest.mark.parametrize("steps", [4, 100])
@pytest.mark.parametrize(
    ("kind", "flow", "level"), [("ode", FlowODE, 0.0), ("sde", FlowSDE, 0.5), ("cps", FlowCPS, 0.5)]
)
def test_samples_have_the_chains_own_marginal(kind: str, flow: Any, level: float, steps: int) -> None:
    options = {"denoising_steps": steps} | ({} if kind == "ode" else {"noise_level": level, "joint": True})
    assert_moments(drawn(flow(1, **options)), *predicted(kind, level, steps))


@pytest.mark.parametrize(("kind", "flow"), [("sde", FlowSDE), ("cps", FlowCPS)])
def test_from_a_fixed_start_all_that_is_random_is_in_the_trace(kind: str, flow: Any) -> None:
    """The spread is that of the steps' own noise; a random start adds to it."""
    fixed, free = (predicted(kind, 0.5, 4, fixed_start=fixed) for fixed in (True, False))
    assert fixed[1] < 0.95 * free[1]
    assert_moments(drawn(flow(1, noise_level=0.5, joint=True, fixed_start=True)), *fixed)
    model, context = recorded()
    for chain in (flow(5, joint=True, fixed_start=True), FlowNoise(5, 5, 4, fixed_start=True)):
        _, trace = chain.sample(model, context, torch.Generator().manual_seed(0))
        assert not trace["chain"][:, 0].any() and trace["chain"][:, 1].std() > 0


@pytest.mark.parametrize("fixed_start", [False, True])
@pytest.mark.parametrize(("kind", "flow", "steps"), [("sde", FlowSDE, range(4)), ("cps", FlowCPS, range(3))])
def test_one_stochastic_step_has_its_marginal(kind: str, flow: Any, steps: range, fixed_start: bool) -> None:
    """A mixture over the drawn step, whose parts have the same mean."""
    moments = [predicted(kind, 0.5, 4, step, fixed_start) for step in steps]
    assert all(mean == pytest.approx(MEAN) for mean, _ in moments)
    std = math.sqrt(sum(std**2 for _, std in moments) / len(moments))
    found = drawn(flow(1, noise_level=0.5, denoising_steps=4, fixed_start=fixed_start))
    assert_moments(found, MEAN, std)


def test_flow_sde_keeps_the_flows_marginals_as_steps_get_small() -> None:
    """N(0.5, 0.3^2), closed form: within 1 % of the deviation at 200 steps, with the ODE's own error at 4."""
    for kind in ("ode", "sde"):
        mean, std = predicted(kind, 0.5, 200)
        assert mean == pytest.approx(MEAN, abs=1e-6) and std == pytest.approx(STD, rel=0.01)
    assert_moments(drawn(FlowSDE(1, joint=True, denoising_steps=200), 20_000), MEAN, predicted("sde", 0.5, 200)[1])
    for step in (0, 100, 198):
        assert predicted("sde", 0.5, 200, step)[1] == pytest.approx(STD, rel=0.01)


@pytest.mark.parametrize("level", [0.5, 1.0])
def test_flow_cps_keeps_coefficients_at_any_number_of_steps(level: float) -> None:
    """Data at one point: the state at every time s is N((1 - s) point, s^2), which Flow-SDE misses by its step."""
    model, context = Point(0.4).of(40_000)
    generator = torch.Generator().manual_seed(0)
    action, trace = FlowCPS(1, noise_level=level, joint=True).sample(model, context, generator)
    for step in range(4):
        s = 1 - step / 4
        assert_moments(trace["chain"][:, step].double().flatten(), (1 - s) * 0.4, s)
    torch.testing.assert_close(action, torch.full_like(action, 0.4), atol=1e-6, rtol=0)
    _, trace = FlowSDE(1, noise_level=0.5, joint=True).sample(model, context, generator)
    assert trace["chain"][:, 3].std().item() > 0.25 * 1.1
