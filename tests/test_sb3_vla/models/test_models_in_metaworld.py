"""Every published kind of model, at a size that trains from scratch, in the simulator: imitate, PPO, GRPO, measure.

So few steps teach nothing. What is looked at is that each stage reads what the one before it wrote in the model's own
published layout, that it trains from ratios of exactly one, and that the algorithms are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import same_tensors
from stable_baselines3.common.vec_env import DummyVecEnv
from toy import TINY, changed_by_an_update

from mw_envs.env import MetaWorldEnv
from sb3_vla import GRPO, PPO, HoldAtEnd
from sb3_vla.checkpoints import load_checkpoint, save_diffusion_policy, save_tinyvla
from sb3_vla.checkpoints.formats.openvla_oft import save_openvla_oft
from sb3_vla.checkpoints.formats.smolvla import save_smolvla
from sb3_vla.data.collecting import collect
from sb3_vla.data.demonstrations import Demonstrations
from sb3_vla.evaluation.evaluation import evaluate
from sb3_vla.evaluation.protocols import Protocol
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.views import view_of
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig

TASK, CHUNK, HORIZON = "drawer-close-v3", 4, 8
VIEW: dict[str, Any] = {"image_size": 64, "crop": "workspace"}
DECISIONS = 2 * HORIZON // CHUNK  # of an episode in each of two environments
SHORT = Protocol("short", horizon=HORIZON, action_chunk=CHUNK, settle_steps=15)


@dataclass(frozen=True)
class Way:
    """How a model is made small, explored with, and written.

    :param model_kwargs: the laptop's size, with pictures as small as its towers read.
    :param distribution: name and options of what it explores by.
    :param save: writes its published layout.
    :param trainable: part that is trained by reinforcement.
    """

    model_kwargs: dict[str, Any]
    distribution: tuple[str, dict[str, Any]]
    save: Callable[[Path, Any], None]
    trainable: str = "expert"


WAYS = {
    "smolvla": Way(
        {"vlm": "laptop", "layers": 2, "resolution": (64, 64)}, ("flow_sde", {"denoising_steps": 3}), save_smolvla
    ),
    "diffusion_policy": Way({}, ("ddim", {"denoising_steps": 3}), save_diffusion_policy, "all"),
    "tinyvla": Way({}, ("ddim", {"denoising_steps": 3, "trained_steps": 2}), save_tinyvla),
    "openvla_oft": Way(
        {"sizes": "laptop", "resolution": 56, "max_prompt_tokens": 96},
        ("tokens", {"temperature": 1.6}),
        save_openvla_oft,
    ),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models") / "demonstrations"
    collect(root, "MT50", tasks=[TASK], episodes_per_task=1, num_workers=1, progress=False, **VIEW)
    return root


@pytest.fixture(scope="module")
def demonstrations(recorded: Path) -> Demonstrations:
    return Demonstrations.load(recorded)


def environment() -> HoldAtEnd:
    """Two of them make a group; their episodes are of one length, so that nothing is held for PPO."""
    return HoldAtEnd(
        MetaWorldEnv(
            tasks=[TASK], reward="dense", action_chunk=CHUNK, horizon=HORIZON, terminate_on_success=False, **VIEW
        )
    )


@pytest.mark.parametrize("name", WAYS)
def test_from_demonstrations_to_a_table(demonstrations: Demonstrations, tmp_path: Path, name: str) -> None:
    way = WAYS[name]
    config = SFTConfig(
        model=name,
        model_kwargs=way.model_kwargs,
        action_horizon=CHUNK,
        steps=3,
        batch_size=4,
        warmup_steps=0,
        shift=0,
        validation_fraction=0.0,
        bf16=False,
    )
    imitated = sft(demonstrations, config, progress=False)
    folder = tmp_path / "imitated"
    way.save(folder, imitated.model)
    state = imitated.model.state_dict()

    for algorithm_class, own in ((PPO, {"n_steps": DECISIONS // 2}), (GRPO, {"group_size": 2, "n_groups": 1})):
        algorithm = algorithm_class(
            "VLAPolicy",
            DummyVecEnv([environment] * 2),
            policy_kwargs={
                "checkpoint": folder,
                "distribution": way.distribution[0],
                "distribution_kwargs": way.distribution[1],
                "trainable": way.trainable,
            },
            batch_size=2,
            n_epochs=1,
            learning_rate=1e-3,
            seed=0,
            device="cpu",
            **own,  # type: ignore[arg-type]
        )
        trained = algorithm.policy.model
        assert same_tensors(trained.state_dict(), state)  # all that the stage before it left, through its own layout
        moved = changed_by_an_update(algorithm, DECISIONS)
        assert algorithm.env_steps == DECISIONS * CHUNK
        frozen = {id(value) for value in trained.backbone()} if way.trainable == "expert" else set()
        held = {key for key, value in trained.named_parameters() if id(value) in frozen}
        assert moved and not moved & held
        folder, state = tmp_path / algorithm_class.__name__, trained.state_dict()
        way.save(folder, trained)
        algorithm.env.close()  # type: ignore[union-attr]

    assert same_tensors(load_checkpoint(folder).model.state_dict(), state)
    result = evaluate(
        load_policy(folder, CHUNK),
        tasks=[TASK],
        trials_per_task=2,
        protocol=SHORT,
        num_envs=2,
        num_workers=1,
        env_kwargs=VIEW,
        progress=False,
    )
    assert [found.trial.task for found in result.trials] == [TASK] * 2


def test_pictures_that_were_shrunk_for_imitation_are_shrunk_alike_afterwards(recorded: Path, tmp_path: Path) -> None:
    """From the data's size to the model's, to the last bit: in evaluation, in training, and after each is saved."""
    data = Demonstrations.load(recorded, image_size=32)
    config = SFTConfig(
        model_kwargs=dict(TINY), action_horizon=CHUNK, steps=1, batch_size=4, validation_fraction=0.0, bf16=False
    )
    sft(data, config, output=tmp_path / "sft", progress=False)
    view = view_of(load_checkpoint(tmp_path / "sft").notes)
    assert view == {"camera": "corner2", "crop": VIEW["crop"], "image_size": VIEW["image_size"]}
    env = MetaWorldEnv(tasks=[TASK], action_chunk=CHUNK, **view)
    assert data.trials[0] is not None
    observation, _ = env.reset(options=data.trials[0]._asdict())
    algorithm = PPO(
        "VLAPolicy", env, n_steps=2, batch_size=2, device="cpu", policy_kwargs={"checkpoint": tmp_path / "sft"}
    )
    algorithm.save(tmp_path / "algorithm")
    start = load_policy(tmp_path / "sft")
    assert start.observation_space["image"].shape == observation["image"].shape  # type: ignore[index]
    acted = []
    for policy in (start, algorithm.policy, PPO.load(tmp_path / "algorithm", env).policy):
        seen = policy.prepare(policy.obs_to_tensor(observation)[0])["image"]
        assert np.array_equal(seen[0].permute(1, 2, 0).numpy(), data.images[0])
        acted.append(policy.predict(observation, deterministic=True)[0])
    np.testing.assert_array_equal(acted[0], acted[1])
    np.testing.assert_array_equal(acted[0], acted[2])
