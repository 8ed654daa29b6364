"""Diffusion samplers with a likelihood for each step: DDPM and DDIM (Ho et al. 2020; Song et al. 2021; DPPO 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sb3_vla.common.errors import InputError
from sb3_vla.distributions.chain import DenoisingChain
from sb3_vla.models.base import Context, VLAModel
from sb3_vla.models.lora import copy_denoiser


class DDIM(DenoisingChain):
    """DDIM's steps on the timesteps (N - 1) T // N, ..., T // N, 0, as LeRobot and diffusers take them ("leading").

    From timestep t to the next, u, with abar of the model's schedule (1 after the last step): x0 and eps from the
    model's prediction, x0 clipped (eps is not recomputed), sigma^2 = eta^2 (1 - abar_u) / (1 - abar_t)
    (1 - abar_t / abar_u), mean = sqrt(abar_u) x0 + sqrt(1 - abar_u - sigma^2) eps. The deviation is sigma, but at least
    ``min_std``, as in DPPO: without noise a step has no likelihood, and the last step has no noise of its own. DPPO
    also cuts the noise at three deviations and clips log-densities, after which a ratio is no longer one of densities;
    this is left out.
    Deterministic steps are those of eta = 0 without a floor.

    With ``trained_steps`` K' < N a frozen copy of the initial model makes the first N - K' steps, as in DPPO, and only
    the last K' are trained. The copy has all of the model but the backbone, whose features it shares; the backbone must
    therefore be frozen (``trainable="expert"``).

    :param action_chunk: K.
    :param eta: 0 for the deterministic sampler with the floor's noise alone, 1 for as much noise as DDPM has.
    :param min_std: floor of the deviation, normalized units.
    :param clip_sample: bound of the predicted action; None for none.
    :param trained_steps: K', how many of the last steps are trained; None for all.
    :param joint: whether all steps are stochastic, or one drawn for each sample.
    :param denoising_steps: N.
    """

    predictions = ("epsilon", "sample", "v_prediction")

    def __init__(
        self,
        action_chunk: int,
        eta: float = 1.0,
        min_std: float = 0.1,
        clip_sample: float | None = 1.0,
        trained_steps: int | None = None,
        joint: bool = True,
        denoising_steps: int = 10,
    ) -> None:
        super().__init__(action_chunk, denoising_steps, joint)
        if not 0 <= eta <= 1:
            raise InputError(f"eta={eta!r}; expected between 0 and 1")
        if not (math.isfinite(min_std) and min_std > 0):
            raise InputError(f"min_std={min_std!r}; expected a positive number: a step without noise has no likelihood")
        if clip_sample is not None and not clip_sample > 0:
            raise InputError(f"clip_sample={clip_sample!r}; expected a positive number or None")
        if trained_steps is not None and not 1 <= trained_steps <= denoising_steps:
            raise InputError(f"trained_steps={trained_steps}; expected 1 to denoising_steps={denoising_steps}")
        self.eta = eta
        self.min_std = min_std
        self.clip_sample = clip_sample
        self.trained_steps = trained_steps or denoising_steps
        #: the model, without its backbone, of the steps that are not trained
        self.pretrained: VLAModel | None = None

    @classmethod
    def for_model(cls, model: VLAModel, action_chunk: int, **options: Any) -> DDIM:
        """See :meth:`ActionDistribution.for_model`.

        :raises ValueError: for more denoising steps than the model's timesteps.
        """
        chain = cls(action_chunk, **options)
        if chain.denoising_steps > len(model.alphas_cumprod):
            raise InputError(
                f"denoising_steps={chain.denoising_steps}; the model was trained on {len(model.alphas_cumprod)}"
            )
        if chain.trained_steps < chain.denoising_steps:
            chain.pretrained = copy_denoiser(model)
        return chain

    @property
    def random_steps(self) -> range:
        """See :attr:`DenoisingChain.random_steps`."""
        return range(self.denoising_steps - self.trained_steps, self.denoising_steps)

    def takers(self, model: VLAModel, context: Context) -> list[tuple[VLAModel, Context]]:
        """See :meth:`DenoisingChain.takers`."""
        first = self.random_steps.start
        if first == 0:
            return super().takers(model, context)
        assert self.pretrained is not None and context.perception is not None, "trained_steps needs for_model"
        own = self.pretrained.contextualize(context.perception)
        return [(self.pretrained, own)] * first + [(model, context)] * self.trained_steps

    def check_trainable(self, model: VLAModel) -> None:
        """See :meth:`ActionDistribution.check_trainable`."""
        if self.pretrained is not None and any(parameter.requires_grad for parameter in model.backbone()):
            raise InputError(
                f"trained_steps={self.trained_steps} of {self.denoising_steps} leaves the first steps as they are, so "
                'what they perceive must stay too; use policy_kwargs=dict(trainable="expert")'
            )

    def kernel(self, model: VLAModel, context: Context, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DenoisingChain.kernel`."""
        timestep, now, then = self._schedule(model, index)
        output = model.denoise(context, x, timestep).float()
        now, then = now[:, None, None], then[:, None, None]
        x0, eps = clean_and_noise(model.prediction, output, x, now)
        if self.clip_sample is not None:
            x0 = x0.clamp(-self.clip_sample, self.clip_sample)
        variance = (1 - then) / (1 - now) * (1 - now / then)
        mean, sigma = self.step(x, x0, eps, now, then, variance)
        std = self.noise_scale * sigma.clamp(min=self.min_std)
        return mean, std.float(), _float32(then.sqrt(), x0) + _float32((1 - then).sqrt(), eps)

    def step(
        self, x: Tensor, x0: Tensor, eps: Tensor, now: Tensor, then: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation from x; ``now`` and ``then`` are abar, ``variance`` is DDPM's posterior one, float64."""
        squared = (self.noise_scale * self.eta) ** 2 * variance
        mean = _float32(then.sqrt(), x0) + _float32((1 - then - squared).clamp(min=0).sqrt(), eps)
        return mean, self.eta * variance.sqrt()

    def _schedule(self, model: VLAModel, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timestep of a step, int64, and abar before and after it, float64; (R * N,) each."""
        stride = len(model.alphas_cumprod) // self.denoising_steps
        timestep = (self.denoising_steps - 1 - index) * stride
        alphas = model.alphas_cumprod.double()
        then = torch.where(timestep >= stride, alphas[(timestep - stride).clamp(min=0)], torch.ones_like(alphas[:1]))
        return timestep, alphas[timestep], then


class DDPM(DDIM):
    """DDPM's ancestral steps: mean and variance of the posterior of x_u given x_t and x0 (Ho et al. 2020, eq. 7).

    Deterministic steps are those of DDIM. See :class:`DDIM` for the floor of the deviation and what is trained.

    :param action_chunk: K.
    :param min_std: floor of the deviation, normalized units.
    :param clip_sample: bound of the predicted action; None for none.
    :param trained_steps: how many of the last steps are trained; None for all.
    :param joint: whether all steps are stochastic, or one drawn for each sample.
    :param denoising_steps: N.
    """

    def __init__(
        self,
        action_chunk: int,
        min_std: float = 0.1,
        clip_sample: float | None = 1.0,
        trained_steps: int | None = None,
        joint: bool = True,
        denoising_steps: int = 20,
    ) -> None:
        super().__init__(action_chunk, 1.0, min_std, clip_sample, trained_steps, joint, denoising_steps)

    def step(
        self, x: Tensor, x0: Tensor, eps: Tensor, now: Tensor, then: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`DDIM.step`."""
        alpha = now / then
        mean = _float32(then.sqrt() * (1 - alpha) / (1 - now), x0) + _float32(alpha.sqrt() * (1 - then) / (1 - now), x)
        return mean, variance.sqrt()


def clean_and_noise(prediction: str, output: Tensor, x: Tensor, alpha_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted action and predicted noise, float32, from what a model puts out at x.

    :param prediction: ``epsilon``, ``sample`` or ``v_prediction`` (v = sqrt(abar) eps - sqrt(1 - abar) x0).
    :param alpha_cumprod: abar, float64, broadcastable to x.
    """
    signal, noise = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
    if prediction == "epsilon":
        return ((x - noise * output) / signal).float(), output
    if prediction == "sample":
        return output, ((x - signal * output) / noise).float()
    return (signal * x - noise * output).float(), (signal * output + noise * x).float()


def _float32(coefficient: Tensor, value: Tensor) -> Tensor:
    return coefficient.float() * value
