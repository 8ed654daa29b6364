"""The critic of a policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """A perceptron from the model's features and what only the critic sees to a value."""

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
        for parameter in self.layers[-1].parameters():  # an untrained critic says nothing, rather than noise
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, critic_only: list[Tensor]) -> Tensor:
        """Values, float32 (N,)."""
        return self.layers(torch.cat([self.norm(features), *critic_only], dim=1)).float()[:, 0]
