"""DDPM and DDIM chains: against recorded chains of diffusers, the formulas in float64, and the closed-form marginal."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal
from toy import StateModel, ToyDiffusion, ToyEnv, cosine_schedule, stir, toy_ppo

from sb3_vla.distributions import DDIM, DDPM, make_distribution
from sb3_vla.distributions.diffusion import clean_and_noise
from sb3_vla.models import Context
from sb3_vla.models.base import PERCEPTION
from sb3_vla.policies.vla_policy import VLAPolicy

REFERENCE = load_file(Path(__file__).parents[2] / "data" / "diffusion.safetensors")
ALPHAS = REFERENCE["alphas_cumprod"]


class Recorded(StateModel):
    """Answers with recorded predictions by timestep."""

    prediction = "epsilon"

    def __init__(self, outputs: Tensor, timesteps: Tensor) -> None:
        super().__init__(4, 4)
        self.register_buffer("alphas_cumprod", ALPHAS)
        self.outputs = dict(zip(timesteps.tolist(), outputs, strict=True))

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([self.outputs[timestep] for timestep in t.tolist()])


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 0.0})])
def test_means_equal_the_recorded_chain(name: str, options: dict[str, Any]) -> None:
    """From each recorded state, the recorded next one, less DDPM's recorded noise; it took none in the last step."""
    outputs, chain = REFERENCE[f"{name}_model_out"], REFERENCE[f"{name}_chain"]
    steps = len(outputs)
    model = Recorded(outputs, REFERENCE[f"{name}_timesteps"])
    context = model.encode({"state": torch.zeros(1, 1)})
    diffusion = make_distribution(name, model, 4, denoising_steps=steps, min_std=1e-6, **options)
    mean, std = diffusion.transition(model, context, {"chain": chain[None]})
    noise = std[0] * REFERENCE["step_noise"][:steps] * (torch.arange(steps) < steps - 1)[:, None, None]
    # diffusers rounds the coefficients to float32, which near the data are differences of almost equal numbers.
    torch.testing.assert_close(mean[0] + (noise if name == "ddpm" else 0), chain[1:], atol=1e-5, rtol=0)
    # The mode's steps are eta = 0's from each state, so of the recorded DDIM chain its own.
    if name == "ddim":
        assert isinstance(diffusion, DDIM)
        found = [diffusion.kernel(model, context, x[None], torch.tensor([i]))[2][0] for i, x in enumerate(chain[:-1])]
        torch.testing.assert_close(torch.stack(found), chain[1:], atol=5e-6, rtol=0)
        asked = [diffusion._schedule(model, torch.tensor([i]))[0].item() for i in range(steps)]
        assert asked == REFERENCE["ddim_timesteps"].tolist() == list(range(90, -1, -10))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize(("eta", "min_std"), [(1.0, 1e-3), (0.4, 1e-3), (0.4, 0.2)])
def test_log_probabilities_in_float64(name: str, eta: float, min_std: float) -> None:
    """Every step's mean, deviation and density by the papers' formulas, on a nonlinear model's samples."""
    model = ToyDiffusion()
    stir(model)
    context = model.encode({PERCEPTION + "state": torch.randn(5, 4, generator=torch.Generator().manual_seed(1))})
    options: dict[str, Any] = {"eta": eta} if name == "ddim" else {}
    diffusion = make_distribution(name, model, 2, denoising_steps=5, min_std=min_std, **options)
    executed = torch.tensor([2, 1, 2, 0, 2])
    with torch.no_grad():
        _, trace = diffusion.sample(model, context, torch.Generator().manual_seed(0))
        mean, std = diffusion.transition(model, context, trace)
        found = diffusion.log_prob(mean, std, trace, executed, "denoising_step")
    alphas = [*model.alphas_cumprod.double()[[16, 12, 8, 4, 0]].tolist(), 1.0]
    for step in range(5):
        now, then, x = alphas[step], alphas[step + 1], trace["chain"][:, step]
        with torch.no_grad():
            eps = model.denoise(context, x, torch.full((5,), 16 - 4 * step)).double()
        x0 = ((x.double() - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
        sigma = math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        if name == "ddpm":  # Ho et al. 2020, eq. 7
            alpha = now / then
            expected = (math.sqrt(then) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - then) * x.double()) / (1 - now)
        else:  # Song et al. 2021, eq. 12 and 16
            sigma *= eta
            expected = math.sqrt(then) * x0 + math.sqrt(1 - then - sigma**2) * eps
        deviation = torch.full_like(expected, max(sigma, min_std))
        torch.testing.assert_close(mean[:, step].double(), expected, atol=5e-6, rtol=0)
        torch.testing.assert_close(std[:, step].double(), deviation, atol=1e-6, rtol=0)
        # From the float32 mean: at a deviation of 1e-3 its rounding alone moves the density.
        terms = Normal(mean[:, step].double(), deviation).log_prob(trace["chain"][:, step + 1].double())
        sums = torch.stack([row[:n].sum() for row, n in zip(terms, executed.tolist(), strict=True)])
        torch.testing.assert_close(found[:, step].double(), sums, atol=5e-3, rtol=1e-4)
    total = diffusion.log_prob(mean, std, trace, executed)
    torch.testing.assert_close(total, found.sum(1), atol=1e-4, rtol=1e-5)


def test_predictions_of_the_same_action_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 2, 2, generator=generator) for _ in range(2))
    for alpha in (0.999, 0.5, 0.01):
        level = torch.tensor(alpha, dtype=torch.float64)
        x = (level.sqrt() * x0 + (1 - level).sqrt() * eps).float()
        outputs = {"epsilon": eps, "sample": x0, "v_prediction": (level.sqrt() * eps - (1 - level).sqrt() * x0).float()}
        for prediction, output in outputs.items():
            found = clean_and_noise(prediction, output, x, level)
            # x is rounded to float32, and the weaker of the two parts is divided by its coefficient.
            torch.testing.assert_close(found, (x0, eps), atol=1e-5, rtol=0)
            assert all(value.dtype == torch.float32 for value in found)


def test_the_predicted_action_is_clipped() -> None:
    model = ToyDiffusion()
    stir(model, size=2.0)
    context = model.encode({PERCEPTION + "state": torch.randn(50, 4)})
    with torch.no_grad():
        for bound in (0.5, 1.0):
            chain = DDIM(2, eta=0.0, clip_sample=bound, denoising_steps=5)
            assert chain.mode(model, context).abs().max().item() == pytest.approx(bound)
        assert DDIM(2, eta=0.0, clip_sample=None, denoising_steps=5).mode(model, context).abs().max() > 1.5


# --- Marginals --------------------------------------------------------------------------------------------------------

MEAN, STD = 0.5, 0.3


class Spread(StateModel):
    """The exact noise prediction for data N(0.5, 0.3^2)."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.register_buffer("alphas_cumprod", cosine_schedule(1000))

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        alpha = self.alphas_cumprod[t].double()[:, None, None]
        # E[eps | x] = cov(eps, x) / var(x) (x - E x)
        return ((1 - alpha).sqrt() / (alpha * STD**2 + 1 - alpha) * (x - alpha.sqrt() * MEAN)).float()


def marginal(name: str, steps: int, eta: float = 1.0, min_std: float = 1e-3) -> tuple[float, float]:
    """Of a chain on :class:`Spread` without clipping: the recursion of its linear steps in float64."""
    stride = 1000 // steps
    alphas = [*cosine_schedule(1000).double()[[(steps - 1 - i) * stride for i in range(steps)]].tolist(), 1.0]
    mean, variance = 0.0, 1.0
    for now, then in pairwise(alphas):
        slope = math.sqrt(1 - now) / (now * STD**2 + 1 - now)
        offset = -slope * math.sqrt(now) * MEAN  # eps = slope x + offset
        sigma = math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        x0 = (1 - math.sqrt(1 - now) * slope) / math.sqrt(now), -math.sqrt(1 - now) * offset / math.sqrt(now)
        if name == "ddpm":
            alpha = now / then
            weight = math.sqrt(then) * (1 - alpha) / (1 - now)
            factor, shift = weight * x0[0] + math.sqrt(alpha) * (1 - then) / (1 - now), weight * x0[1]
        else:
            sigma *= eta
            weight = math.sqrt(1 - then - sigma**2)
            factor, shift = (math.sqrt(then) * x0[i] + weight * (slope, offset)[i] for i in (0, 1))
        mean, variance = factor * mean + shift, factor**2 * variance + max(sigma, min_std) ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [("ddpm", 1000, {}), ("ddim", 1000, {"eta": 0.5}), ("ddpm", 10, {}), ("ddim", 10, {"eta": 1.0})],
)
def test_marginals(name: str, steps: int, options: dict[str, float]) -> None:
    """Samples have the chain's marginal; at all 1,000 timesteps that is the data's, within 2 % of its deviation."""
    mean, std = marginal(name, steps, **options)
    assert_moments(samples(name, steps, **options), mean, std)
    if steps == 1000:
        assert mean == pytest.approx(MEAN, abs=1e-3) and std == pytest.approx(STD, rel=0.02)


def test_one_stochastic_step_of_ddim_has_the_marginal_too() -> None:
    """eta = 1 in one step and 0 in the others, within 2 %."""
    assert samples("ddim", 1000, joint=False).std().item() == pytest.approx(STD, rel=0.02)


def samples(name: str, steps: int, **options: Any) -> Tensor:
    model, count = Spread(), 20_000
    context = model.encode({"state": torch.zeros(count, 1)})
    chain = make_distribution(name, model, 1, denoising_steps=steps, min_std=1e-3, clip_sample=None, **options)
    return chain.sample(model, context, torch.Generator().manual_seed(0))[0].double()


def assert_moments(values: Tensor, mean: float, std: float) -> None:
    """Within five standard errors of normal samples."""
    count = values.numel()
    assert values.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(count))
    assert values.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * count))


# --- The last steps alone ---------------------------------------------------------------------------------------------


def policy_of(**options: Any) -> VLAPolicy:
    env = ToyEnv()
    return VLAPolicy(
        env.observation_space,
        env.action_space,
        lambda _: 1e-3,
        model="toy_diffusion",
        distribution="ddim",
        distribution_kwargs={"denoising_steps": 5, "trained_steps": 2, **options},
    )


def test_the_first_steps_are_the_pretrained_models(toy_models: None) -> None:
    """Changed weights change the last K' steps alone; the trace holds these."""
    policy = policy_of()
    chain = policy.distribution
    observation = policy.prepare(
        {key: torch.from_numpy(np.stack([value] * 4)) for key, value in ToyEnv().reset(seed=0)[0].items()}
    )

    def draw() -> Tensor:
        with torch.no_grad():
            torch.manual_seed(0)
            _, _, trace = policy.decide(observation)
        assert trace["chain"].shape == (4, 3, 2, 2)
        return trace["chain"]

    before = draw()
    stir(policy.model, size=0.3)
    after = draw()
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.equal(before[:, 1], after[:, 1])
    whole = make_distribution("ddim", policy.model, 2, denoising_steps=5)
    trace = {"chain": after}
    context = policy.model.encode(observation)
    mean, _ = chain.transition(policy.model, context, trace)
    for step in (3, 4):
        expected = whole.kernel(policy.model, context, after[:, step - 3], torch.full((4,), step))[0]  # type: ignore[operator]
        torch.testing.assert_close(mean[:, step - 3], expected, atol=1e-6, rtol=0)


def test_training_the_last_steps_needs_a_frozen_encoder(toy_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def learner(**options: Any) -> Any:
        return toy_ppo(
            model="toy_diffusion",
            model_kwargs={},
            distribution="ddim",
            distribution_kwargs={"denoising_steps": 5, "trained_steps": 2},
            **options,
        )

    monkeypatch.setattr(ToyDiffusion, "backbone", lambda self: self.layers[0].parameters())
    with pytest.raises(ValueError, match=r"trained_steps=2 of 5.*trainable=\"expert\""):
        learner()
    algorithm = learner(trainable="expert")
    before = {key: value.clone() for key, value in algorithm.policy.distribution.state_dict().items()}
    assert before  # the frozen copy
    algorithm.learn(16)
    assert all(torch.equal(value, before[key]) for key, value in algorithm.policy.distribution.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DDIM, {"eta": 1.5}, r"eta=1.5; expected between 0 and 1"),
        (DDIM, {"eta": math.nan}, r"eta=nan"),
        (DDPM, {"min_std": 0.0}, r"min_std=0.0; expected a positive number: a step without noise has no likelihood"),
        (DDPM, {"min_std": math.inf}, r"min_std=inf"),
        (DDPM, {"clip_sample": 0.0}, r"clip_sample=0.0; expected a positive number or None"),
        (DDPM, {"trained_steps": 30}, r"trained_steps=30; expected 1 to denoising_steps=20"),
        (DDPM, {"trained_steps": 0}, r"trained_steps=0"),
        (DDIM, {"denoising_steps": 0}, r"denoising_steps=0"),
        (DDPM, {"eta": 1.0}, r"'ddpm' does not take.*eta"),
        (DDIM, {"denoising_steps": 21}, r"denoising_steps=21; the model was trained on 20"),
    ],
)
def test_bad_options(kind: type[DDIM], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_distribution(kind.__name__.lower(), ToyDiffusion(), 2, **options)
