"""A model of one's own is one class, outside of the package, and one line in MODELS: it imitates, trains and acts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import toy_demonstrations, toy_vec

from sb3_vla import GRPO, PPO
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.models import MODELS, Context, VLAModel
from sb3_vla.policies import load_policy
from sb3_vla.sft import SFTConfig, sft


class OwnModel(VLAModel):
    """A linear flow of the mean color of each quarter of the image, the sum of the instruction's bytes and the state.

    :param action_dim: A.
    :param action_horizon: H.
    :param state_dim: numbers of the state.
    :param image_size: height and width of the images.
    :param width: size of the features.
    """

    def __init__(
        self, action_dim: int, action_horizon: int, state_dim: int = 4, image_size: int = 32, width: int = 16
    ) -> None:
        super().__init__(action_dim, action_horizon)
        self.config = {
            "action_dim": action_dim,
            "action_horizon": action_horizon,
            "state_dim": state_dim,
            "image_size": image_size,
            "width": width,
        }
        self.image_size, self.feature_dim = (image_size, image_size), width
        self.eye = nn.Linear(3 * 4, width)
        self.mix = nn.Linear(width + 1 + state_dim, width)
        self.velocity = nn.Linear(width + action_horizon * action_dim + 1, action_horizon * action_dim)

    def backbone(self) -> Iterator[nn.Parameter]:
        return self.eye.parameters()

    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        quarters = nn.functional.adaptive_avg_pool2d(observation["image"].float() / 255, 2).flatten(1)
        words = observation["instruction"].float().sum(1, keepdim=True) / 1000
        return {"perception/image": self.eye(quarters), "perception/words": words, "state": observation["state"]}

    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        seen = (perception["perception/image"], perception["perception/words"], perception["state"])
        features = self.mix(torch.cat(seen, dim=1)).tanh()
        return Context(features=features.float(), state=features)

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        features = context.state.repeat(len(x) // len(context.state), 1)
        return self.velocity(torch.cat([features, x.flatten(1), t[:, None]], dim=1)).reshape(x.shape)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "own", OwnModel)  # in a script: MODELS["own"] = OwnModel


def weights_of(policy: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_it_imitates_trains_and_acts_from_its_checkpoint(tmp_path: Path) -> None:
    demonstrations = toy_demonstrations(episodes=6)
    options: dict[str, Any] = {"action_horizon": 2, "steps": 40, "batch_size": 32, "warmup_steps": 1}
    config = SFTConfig(model="own", model_kwargs={"width": 24}, **options)
    history = sft(demonstrations, config, output=tmp_path / "imitated", progress=False).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    imitated = load_checkpoint(tmp_path / "imitated")
    assert isinstance(imitated.model, OwnModel) and imitated.model_kwargs["width"] == 24

    env = toy_vec(2, action_dim=4)
    policy_kwargs = {"checkpoint": tmp_path / "imitated", "distribution": "flow_sde"}
    ppo = PPO("VLAPolicy", env, n_steps=8, batch_size=8, n_epochs=2, seed=0, policy_kwargs=policy_kwargs)
    before = weights_of(ppo.policy)
    ppo.learn(48)
    after = weights_of(ppo.policy)
    assert not torch.equal(before["model.eye.weight"], after["model.eye.weight"])
    assert not torch.equal(before["value_head.layers.4.weight"], after["value_head.layers.4.weight"])

    ppo.save(tmp_path / "ppo")
    assert_same(weights_of(PPO.load(tmp_path / "ppo", env).policy), after)
    save_checkpoint(tmp_path / "trained", ppo.policy.model, ppo.policy.value_head, distribution=("flow_sde", {}))
    acting = load_policy(tmp_path / "trained", action_chunk=2)
    observation = env.reset()
    assert isinstance(observation, dict)
    actions, _ = acting.predict(observation, deterministic=True)
    assert actions.shape == (2, 2, 4)
    np.testing.assert_array_equal(actions, ppo.predict(observation, deterministic=True)[0])


@pytest.mark.parametrize("distribution", ["gaussian", "flow_cps"])
def test_a_new_one_takes_the_sizes_of_the_environment(distribution: str) -> None:
    """With a frozen backbone, whose perception the rollout keeps in the place of images."""
    policy_kwargs = {"model": "own", "trainable": "expert", "distribution": distribution}
    options: dict[str, Any] = {"group_size": 4, "n_groups": 1, "batch_size": 4, "n_epochs": 1}
    grpo = GRPO("VLAPolicy", toy_vec(4), seed=0, policy_kwargs=policy_kwargs, **options)
    before = weights_of(grpo.policy)
    grpo.learn(8)
    after = weights_of(grpo.policy)
    assert grpo.policy.model.config["action_dim"] == 2 and grpo.policy.model.action_horizon == 2
    assert torch.equal(before["model.eye.weight"], after["model.eye.weight"])
    assert not torch.equal(before["model.mix.weight"], after["model.mix.weight"])
