"""Denoising as a Markov chain of normal transitions: what all stochastic samplers of flows and diffusions share."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from sb3_vla.common import batch_noise as noise
from sb3_vla.common.errors import InputError
from sb3_vla.distributions.base import (
    ActionDistribution,
    Trace,
    check_denoising_steps,
    gaussian_kl,
    gaussian_log_prob,
    random_start,
    start_of_mode,
    time_grid,
)
from sb3_vla.models.base import Context, VLAModel


class DenoisingChain(ActionDistribution):
    """x_0 (noise), ..., x_N (action), each N(mean, std^2) given the one before; a subclass gives the kernel.

    ``joint=False``: one step, drawn for each sample, is stochastic; the others are deterministic. The trace holds that
    step alone, so an update needs one pass of the denoiser. ``joint=True``: all steps are stochastic, and the
    log-probability is the sum over the chain. A trace holds whole states (H, L), because the denoiser reads them whole;
    only executed steps and dimensions that act count in its density.

    :param action_chunk: K.
    :param denoising_steps: N.
    :param joint: whether all steps are stochastic.
    :param fixed_start: start chains at zero noise, as :meth:`mode` does, instead of random noise. The log-probability
        does not account for a random start, whose effect on the actions is noise in the policy gradient.
    """

    def __init__(self, action_chunk: int, denoising_steps: int, joint: bool, fixed_start: bool = False) -> None:
        super().__init__(action_chunk)
        check_denoising_steps(denoising_steps)
        self.denoising_steps = denoising_steps
        self.joint = joint
        self.fixed_start = fixed_start

    @property
    def random_steps(self) -> range:
        """The steps whose noise the trace accounts for."""
        return range(self.denoising_steps)

    @abstractmethod
    def kernel(self, model: VLAModel, context: Context, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stochastic step ``index`` (R * N,) from x (R * N, H, L), and the deterministic one.

        :return: mean, standard deviation (broadcastable to it), deterministic next state; float32.
        """

    def takers(self, model: VLAModel, context: Context) -> list[tuple[VLAModel, Context]]:
        """The model of each step, and its context."""
        return [(model, context)] * self.denoising_steps

    @property
    def denoisings(self) -> int:
        """See :attr:`ActionDistribution.denoisings`."""
        return len(self.random_steps) if self.joint else 1

    def sample(
        self, model: VLAModel, context: Context, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Trace]:
        """Run the chain; the trace holds its random steps, see :meth:`ActionDistribution.sample`.

        The trace has ``chain``, float32 (N, S + 1, H, L), the states before and after each random step, and unless
        ``joint`` the number of that step, ``denoising_index``, int64 (N,).
        """
        x = start_of_mode(model, context) if self.fixed_start else random_start(model, context, generator)
        count, device, random = len(x), x.device, self.random_steps
        drawn = noise.integers(random.start, random.stop, (count,), generator, device)
        chain = [x]
        for step, taker in enumerate(self.takers(model, context)):
            index = torch.full((count,), step, device=device)
            mean, std, deterministic = self.kernel(*taker, x, index)
            stochastic = mean + std * noise.normal(x.shape, generator, device)
            x = stochastic if self.joint else torch.where((drawn == step)[:, None, None], stochastic, deterministic)
            chain.append(x)
        action = self.executed_actions(model, x)
        stacked = torch.stack(chain, dim=1)  # (N, steps + 1, H, L)
        if self.joint:
            return action, {"chain": stacked[:, random.start : random.stop + 1]}
        rows = torch.arange(count, device=device)
        return action, {"chain": stacked[rows[:, None], torch.stack([drawn, drawn + 1], 1)], "denoising_index": drawn}

    def transition(self, model: VLAModel, context: Context, trace: Trace) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the random steps, (N, S, K, A), see :meth:`ActionDistribution.transition`."""
        chain = trace["chain"]  # (N, S + 1, H, L)
        transitions = chain.shape[1] - 1
        # All transitions of a sample at once: row r * N + n is transition r of sample n.
        start = chain[:, :-1].transpose(0, 1).flatten(0, 1)
        if self.joint:
            index = torch.tensor(self.random_steps, device=chain.device).repeat_interleave(len(chain))
        else:
            index = trace["denoising_index"].flatten().long()
        mean, std, _ = self.kernel(model, context, start, index)
        std = self._executed_part(std.expand_as(mean), model.action_dim)
        mean = self._executed_part(mean, model.action_dim)
        shape = (transitions, len(chain), *mean.shape[1:])
        return mean.reshape(shape).transpose(0, 1), std.reshape(shape).transpose(0, 1)

    def log_prob_terms(self, mean: Tensor, std: Tensor, trace: Trace, executed: Tensor) -> Tensor:
        """See :meth:`ActionDistribution.log_prob_terms`."""
        reached = self._executed_part(trace["chain"][:, 1:], mean.shape[3])
        return self._mask(gaussian_log_prob(reached, mean, std), executed)

    def kl_terms(
        self, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor, executed: Tensor
    ) -> Tensor:
        """See :meth:`ActionDistribution.kl_terms`."""
        return self._mask(gaussian_kl(mean, std, reference_mean, reference_std), executed)

    def mode(self, model: VLAModel, context: Context) -> Tensor:
        """The chain from zero noise by deterministic steps."""
        x = start_of_mode(model, context)
        for step, taker in enumerate(self.takers(model, context)):
            index = torch.full((len(x),), step, device=x.device)
            x = self.kernel(*taker, x, index)[2]
        return self.executed_actions(model, x)


class FlowChain(DenoisingChain):
    """The chain of a flow on the grid 1 = t_0 > ... > t_N = 0.

    At flow time t, with step d to s = t - d and velocity v: predicted action x0 = x - t v, predicted noise
    x1 = x + (1 - t) v, and x_s ~ N(x0 (1 - s) + x1 c, std^2). Without noise c = s, which is the Euler step x - d v.

    :param action_chunk: K.
    :param noise_level: a, above 0.
    :param joint: whether all steps that have noise are stochastic, or one of them drawn for each sample.
    :param denoising_steps: Euler steps.
    :param fixed_start: start at zero noise, see :class:`DenoisingChain`.
    """

    #: what a may be at most
    greatest_noise: float = math.inf
    #: how few steps make sense
    least_steps = 1

    def __init__(
        self,
        action_chunk: int,
        noise_level: float = 0.5,
        joint: bool = False,
        denoising_steps: int = 4,
        fixed_start: bool = False,
    ) -> None:
        super().__init__(action_chunk, denoising_steps, joint, fixed_start)
        if not (0 < noise_level <= self.greatest_noise and math.isfinite(noise_level)):
            most = "" if self.greatest_noise == math.inf else f" and at most {self.greatest_noise:g}"
            raise InputError(f"noise_level={noise_level!r}; expected above 0{most}")
        if denoising_steps < self.least_steps:
            raise InputError(f"denoising_steps={denoising_steps}; {type(self).__name__} needs {self.least_steps}")
        self.noise_level = noise_level

    def kernel(self, model: VLAModel, context: Context, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DenoisingChain.kernel`."""
        grid = time_grid(self.denoising_steps, x.device)
        t, s = grid[index], grid[index + 1]
        velocity = model.denoise(context, x, t).float()
        coefficient, std = self.noise(t, s)
        t, s, coefficient, std = (value[:, None, None] for value in (t, s, coefficient, std))
        x0 = x - t * velocity
        x1 = x + (1 - t) * velocity
        return x0 * (1 - s) + x1 * coefficient, std, x - (t - s) * velocity

    @abstractmethod
    def noise(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficient c of the predicted noise and standard deviation of the fresh, of steps from t to s, (R * N,)."""
