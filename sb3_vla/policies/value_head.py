"""The critic of a policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """A perceptron with two hidden layers, from the model's features and the critic's own observations to a value.

    :param feature_dim: D, size of the model's features.
    :param critic_dim: numbers that only the critic reads.
    :param width: of the hidden layers.
    """

    def __init__(self, feature_dim: int, critic_dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.layers = nn.Sequential(
            nn.Linear(feature_dim + critic_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )
        for parameter in self.layers[-1].parameters():  # untrained values are zero, not noise
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, critic_only: list[Tensor]) -> Tensor:
        """Values, float32 (N,).

        :param features: float32 (N, D).
        :param critic_only: tensors (N, ...) with ``critic_dim`` numbers in all.
        """
        return self.layers(torch.cat([self.norm(features), *critic_only], dim=1)).float()[:, 0]
