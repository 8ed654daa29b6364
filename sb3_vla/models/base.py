"""What a vision-language-action model offers: an encoder, run once per decision, and a denoiser of action chunks.

Letters used for shapes in this package: N samples, H action horizon (predicted), K action chunk (executed, K <= H),
A action dimensions, D context features, R denoisings per context.
Flow time runs from 1 (noise) to 0 (data): x_t = t noise + (1 - t) action, velocity = noise - action (as in pi0).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PERCEPTION = "perception/"


def is_perceived(observation: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of :meth:`VLAModel.perceive` rather than an observation."""
    return any(key.startswith(PERCEPTION) for key in observation)


@dataclass
class Context:
    """An encoded observation.

    :param features: what the critic and other heads may read, float32, shape (N, D).
    :param state: whatever the model's denoiser needs.
    """

    features: Tensor
    state: Any


class VLAModel(nn.Module, ABC):
    """A vision-language-action model; observations are the tensors of a batched environment observation.

    :param action_dim: A.
    :param action_horizon: H.
    """

    #: size of :attr:`Context.features`
    feature_dim: int
    #: (height, width) of the pictures the model reads; larger ones are shrunk before they are stored
    image_size: tuple[int, int]
    #: constructor arguments, JSON values, from which a checkpoint builds the model again
    config: dict[str, Any]

    def __init__(self, action_dim: int, action_horizon: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.action_horizon = action_horizon
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_std", torch.ones(action_dim))
        self.action_mean: Tensor
        self.action_std: Tensor

    @abstractmethod
    def backbone(self) -> Iterator[nn.Parameter]:
        """The parameters of :meth:`perceive`."""

    @abstractmethod
    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """The backbone's part of the encoding, which a rollout can keep where the backbone is frozen.

        :param observation: ``image`` uint8 (N, 3, height, width), ``state`` float32 (N, S), ``instruction`` uint8
            (N, L).
        :return: tensors of N rows, their names beginning with :data:`PERCEPTION`, and what passes unchanged.
        """

    @abstractmethod
    def contextualise(self, perception: dict[str, Tensor]) -> Context:
        """The rest of the encoding, from what :meth:`perceive` gave."""

    def encode(self, observation: dict[str, Tensor]) -> Context:
        """Encode observations, or what :meth:`perceive` made of them."""
        if not is_perceived(observation):
            observation = self.perceive(observation)
        return self.contextualise(observation)

    @abstractmethod
    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of the flow, float32, shape of x.

        :param x: noisy chunks in normalised units, float32 (R * N, H, A); row r * N + n belongs to context n.
        :param t: flow time of each row in [0, 1], float32 (R * N,).
        """

    def normalise_action(self, action: Tensor) -> Tensor:
        """Environment units to the model's, any leading shape."""
        return (action - self.action_mean) / self.action_std

    def unnormalise_action(self, action: Tensor) -> Tensor:
        """The model's units to the environment's, any leading shape."""
        return action * self.action_std + self.action_mean

    @torch.no_grad()
    def set_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Take normalisation statistics into the model's buffers.

        :param statistics: ``action_mean``, ``action_std`` (A,) and whatever else the model normalises by, such as
            ``state_mean``, ``state_std`` (S,).
        :raises ValueError: for an unknown name or a wrong shape.
        """
        buffers = dict(self.named_buffers())
        for name, value in statistics.items():
            if name not in buffers or buffers[name].shape != value.shape:
                expected = {
                    key: tuple(buffer.shape) for key, buffer in buffers.items() if key.endswith(("mean", "std"))
                }
                raise ValueError(f"Statistics {name!r} of shape {tuple(value.shape)}; expected among {expected}")
            buffers[name].copy_(value)

    def imitation_loss(
        self,
        observation: dict[str, Tensor],
        actions: Tensor,
        mask: Tensor,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Conditional flow matching (Lipman et al. 2023, eq. 14): mean squared error of the velocity, a scalar.

        :param actions: expert chunks in environment units, float32 (N, H, A).
        :param mask: which steps are within the episode, bool (N, H).
        :param draws: noise draws per encoded observation.
        """
        context = self.encode(observation)
        x0 = self.normalise_action(actions).repeat(draws, 1, 1)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        t = self.sample_time(len(x0), generator, x0.device)
        x = torch.lerp(x0, noise, t[:, None, None])
        error = (self.denoise(context, x, t) - (noise - x0)).square().mean(dim=2)
        weight = mask.to(error.dtype).repeat(draws, 1)
        return (error * weight).sum() / weight.sum()

    def sample_time(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Flow times of a training batch, (count,): uniform in (0, 1)."""
        return torch.rand(count, generator=generator, device=device)
