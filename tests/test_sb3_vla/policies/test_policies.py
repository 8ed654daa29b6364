"""VLAPolicy: what it reads, what it refuses, and that Stable-Baselines3's own tools take it."""

from __future__ import annotations

import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
import torch.nn.functional as F
from gymnasium import spaces
from PIL import Image
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor
from toy import TINY, ToyEnv, stir, tiny_model, toy_ppo, toy_vec

from mw_envs import encode_instruction, fit_instruction
from sb3_vla import PPO, VLAPolicy
from sb3_vla.checkpoints import save_checkpoint
from sb3_vla.data.lerobot_reader import decode_picture
from sb3_vla.policies.loading import load_policy


def policy_for(env: gym.Env, **options: Any) -> VLAPolicy:
    options = {"model_kwargs": TINY, **options}
    policy = VLAPolicy(env.observation_space, env.action_space, lambda _: 1e-3, **options)
    stir(policy)
    return policy


def observations(count: int = 3, seed: int = 0, **options: Any) -> dict[str, np.ndarray]:
    env = toy_vec(count, **options)
    env.seed(seed)
    found = env.reset()
    assert isinstance(found, dict)
    return found


def tensors(observation: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in observation.items()}


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


# --- Observations -----------------------------------------------------------------------------------------------------


def test_both_orders_of_the_pictures_axes_give_the_same_action() -> None:
    algorithm = toy_ppo()
    last = observations(3)
    first = {**last, "image": last["image"].transpose(0, 3, 1, 2)}
    assert first["image"].shape == (3, 3, 32, 32)
    one, _ = algorithm.predict(last, deterministic=True)
    two, _ = algorithm.predict(first, deterministic=True)
    assert np.array_equal(one, two)
    single, _ = algorithm.predict({key: value[0] for key, value in last.items()}, deterministic=True)
    assert single.shape == (2, 2)
    np.testing.assert_allclose(single, one[0], atol=1e-6)
    policy = policy_for(ToyEnv())  # made for the environment's own order
    policy.load_state_dict({k: v for k, v in algorithm.policy.state_dict().items() if "value" not in k}, strict=False)
    assert np.allclose(policy.predict(last, deterministic=True)[0], one, atol=1e-6)


def test_large_pictures_are_shrunk_as_pillow_does() -> None:
    policy = policy_for(ToyEnv(image_size=480))
    assert policy.model.image_size == (96, 96)
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (20, 20, 3), np.uint8))
    image = np.asarray(coarse.resize((480, 480), Image.Resampling.BICUBIC))
    observation = observations(1, image_size=480)
    prepared = policy.prepare({**tensors(observation), "image": torch.from_numpy(image.copy())[None]})
    assert prepared["image"].shape == (1, 3, 96, 96) and prepared["image"].dtype == torch.uint8
    expected = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BILINEAR))
    difference = prepared["image"][0].permute(1, 2, 0).numpy().astype(int) - expected
    assert np.abs(difference).max() <= 1  # Pillow rounds after each of its two passes
    again = policy.prepare(prepared)
    assert all(torch.equal(again[key], prepared[key]) for key in prepared)
    assert np.isfinite(policy.predict(observation, deterministic=True)[0]).all()


@pytest.mark.parametrize(("size", "read"), [(32, 32), (96, 96), (128, 128), (144, 96), (100, 96), (480, 96)])
def test_small_pictures_are_read_as_they_are(size: int, read: int) -> None:
    assert policy_for(ToyEnv(image_size=size)).model.image_size == (read, read)


def test_shrinking_averages() -> None:
    policy = policy_for(ToyEnv(image_size=480))
    image = torch.randint(0, 256, (2, 480, 480, 3), dtype=torch.uint8)
    prepared = policy.prepare({**tensors(observations(2, image_size=480)), "image": image})["image"]
    expected = F.interpolate(image.permute(0, 3, 1, 2), (96, 96), mode="bilinear", antialias=True)
    assert (prepared.int() - expected.int()).abs().max() <= 1


def test_the_critics_observations_never_reach_the_actor() -> None:
    algorithm = toy_ppo(toy_vec(2, privileged=True))
    policy = algorithm.policy
    observation = observations(4, privileged=True)
    base_values = policy.predict_values(policy.obs_to_tensor(observation)[0])
    base_action, _ = algorithm.predict(observation, deterministic=True)
    for key in ("privileged_state", "elapsed_time"):
        changed = {**observation, key: observation[key] + 1.0}
        values = policy.predict_values(policy.obs_to_tensor(changed)[0])
        assert ((values - base_values).abs() > 1e-5).all()
        assert np.array_equal(algorithm.predict(changed, deterministic=True)[0], base_action)
    blind = {key: value for key, value in observation.items() if key in ("image", "state", "instruction")}
    assert np.array_equal(algorithm.predict(blind, deterministic=True)[0], base_action)
    for key in blind:
        other = {**observation, key: observations(4, seed=1)[key]}
        assert not np.array_equal(algorithm.predict(other, deterministic=True)[0], base_action)


def test_deterministic_actions_are_reproducible_and_others_are_not() -> None:
    algorithm = toy_ppo()
    observation = observations(2)

    def act(deterministic: bool) -> np.ndarray:
        return algorithm.predict(observation, deterministic=deterministic)[0]

    state = torch.random.get_rng_state()
    assert np.array_equal(act(True), act(True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not np.array_equal(act(False), act(False))


def test_actions_are_clipped_and_have_the_spaces_shape() -> None:
    for chunk in (None, 1, 3):
        algorithm = toy_ppo(toy_vec(2, chunk=chunk), distribution_kwargs={"std": 5.0})
        observation = observations(8)
        action, _ = algorithm.predict(observation)
        assert action.shape == ((8, 2) if chunk is None else (8, chunk, 2))
        assert action.dtype == np.float32
        assert np.abs(action).max() == 1.0
        algorithm.learn(16)


@pytest.mark.parametrize("distribution", ["gaussian", "flow_sde", "flow_cps", "flow_noise"])
def test_forward_decide_and_evaluate_agree(distribution: str) -> None:
    policy = policy_for(ToyEnv(), distribution=distribution)
    observation = policy.prepare(tensors(observations(5)))
    with torch.no_grad():
        torch.manual_seed(0)
        action, values, trace = policy.decide(observation)
        found = policy.evaluate(observation, trace, torch.full((5,), 2))
        assert action.shape == (5, 2, 2) and values.shape == found.values.shape == found.log_prob.shape == (5,)
        torch.testing.assert_close(found.values, values)
        if distribution == "gaussian":
            torch.manual_seed(0)
            same_action, same_values, log_prob = policy.forward(observation)
            assert torch.equal(same_action, action) and torch.equal(same_values[:, 0], values)
            torch.testing.assert_close(log_prob, found.log_prob)
            flat = policy.evaluate_actions(observation, action.flatten(1))
            torch.testing.assert_close(flat[1], log_prob)
            diagonal = policy.get_distribution(observation)
            torch.testing.assert_close(diagonal.log_prob(action.flatten(1)), log_prob, atol=1e-4, rtol=1e-5)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def without(key: str) -> spaces.Dict:
    return spaces.Dict({k: v for k, v in ToyEnv().observation_space.spaces.items() if k != key})


def with_space(key: str, space: spaces.Space) -> spaces.Dict:
    return spaces.Dict({**ToyEnv().observation_space.spaces, key: space})


BOX = ToyEnv().action_space


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (without("instruction"), BOX, "instruction is missing among image, state"),
        (without("image"), BOX, "image is missing"),
        (without("state"), BOX, "state is missing"),
        (spaces.Box(-1, 1, (3,)), BOX, r"needs a Dict observation.*got Box\(-1\.0, 1\.0, \(3,\)"),
        (with_space("image", spaces.Box(0, 1, (32, 32, 3), np.float32)), BOX, "image as uint8.*float32"),
        (with_space("image", spaces.Box(0, 255, (32, 32), np.uint8)), BOX, "three axes"),
        (with_space("image", spaces.Box(0, 255, (32, 32, 4), np.uint8)), BOX, r"color image.*\(32, 32, 4\)"),
        (ToyEnv().observation_space, spaces.Discrete(4), r"Box action space.*Discrete\(4\)"),
        (ToyEnv().observation_space, spaces.Box(-1, 1, (2, 3, 4)), "Box action space"),
    ],
)
def test_other_spaces_are_refused(observation_space: spaces.Space, action_space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        VLAPolicy(observation_space, action_space, lambda _: 1e-3, model_kwargs=TINY)
    assert "mw_envs" in str(caught.value) or "color" in str(caught.value)


def test_stock_environments_are_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"Dict observation.*mw_envs:MetaWorldMT50-v0"):
        PPO("VLAPolicy", "CartPole-v1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "compct"}, "Unknown model 'compct'; did you mean 'compact'"),
        ({"model_kwargs": {"wings": 2}}, "Model 'compact' does not take these options.*wings"),
        ({"model_kwargs": {**TINY, "action_dim": 7}}, r"7 dimensions.*chunks of 2 of 2"),
        ({"model_kwargs": {**TINY, "action_horizon": 1}}, "action_chunk <= 1"),
        ({"distribution": "gaussain"}, "Unknown action distribution 'gaussain'; did you mean 'gaussian'"),
        ({"distribution_kwargs": {"sdt": 1}}, "sdt"),
        ({"distribution": "tokens"}, "'tokens' is for models that predict tokens; CompactVLA predicts velocity"),
        ({"use_sde": True}, "use_sde=True has no meaning"),
        ({"trainable": "exprt"}, "trainable='exprt'; did you mean 'expert'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    env = ToyEnv()
    with pytest.raises(ValueError, match=message):
        VLAPolicy(env.observation_space, env.action_space, lambda _: 1e-3, **{"model_kwargs": TINY, **options})


# --- Stable-Baselines3 and its contrib --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm_class", "options"),
    [
        (stable_baselines3.PPO, {"n_epochs": 2, "batch_size": 16}),
        (stable_baselines3.A2C, {}),
        # As little as possible of what is slow: each conjugate gradient step goes through the network four times.
        (sb3_contrib.TRPO, {"cg_max_steps": 1, "n_critic_updates": 1, "batch_size": 16}),
    ],
)
@pytest.mark.parametrize("learn_std", [False, True])
def test_stock_algorithms_train_it(algorithm_class: Any, options: dict[str, Any], learn_std: bool) -> None:
    algorithm = algorithm_class(
        "VLAPolicy",
        toy_vec(2),
        n_steps=8,
        seed=0,
        device="cpu",
        policy_kwargs={
            "model_kwargs": TINY,
            "distribution_kwargs": {"learn_std": learn_std, "denoising_steps": 2},
        },
        **options,
    )
    stir(algorithm.policy)
    before = {key: value.clone() for key, value in algorithm.policy.state_dict().items()}
    algorithm.learn(16)
    after = algorithm.policy.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    stem = "model.image_encoders.image.grids.stem.weight"
    for part in ("model.action_out.weight", stem, "value_head.layers.0.weight"):
        assert not torch.equal(before[part], after[part]), part
    assert torch.equal(before["distribution.log_std"], after["distribution.log_std"]) is not learn_std


@pytest.mark.parametrize("name", ["SAC", "TD3", "DDPG", "TQC", "CrossQ", "ARS"])
def test_other_algorithms_say_which_train_it(name: str) -> None:
    algorithm = getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name)
    options = {} if name == "ARS" else {"buffer_size": 8}
    with pytest.raises(ValueError, match="trained by PPO and GRPO of sb3_vla, by PPO and A2C of stable_baselines3"):
        algorithm("VLAPolicy", toy_vec(2), device="cpu", **options)


def test_stock_ppo_starts_at_ratio_one() -> None:
    algorithm = stable_baselines3.PPO(
        "VLAPolicy",
        toy_vec(2),
        n_steps=8,
        batch_size=16,
        n_epochs=1,
        device="cpu",
        policy_kwargs={"model_kwargs": TINY},
    )
    stir(algorithm.policy)
    algorithm.learn(16)
    assert algorithm.logger.name_to_value["train/approx_kl"] == pytest.approx(0.0, abs=1e-7)


def test_stock_ppo_refuses_a_denoising_chain_at_once() -> None:
    steps = 0

    class Counted(ToyEnv):
        def step(self, action: np.ndarray) -> Any:
            nonlocal steps
            steps += 1
            return super().step(action)

    algorithm = stable_baselines3.PPO(
        "VLAPolicy",
        DummyVecEnv([Counted]),
        n_steps=64,
        device="cpu",
        policy_kwargs={"model_kwargs": TINY, "distribution": "flow_sde"},
    )
    with pytest.raises(ValueError, match=r"FlowSDE.*Use sb3_vla\.PPO"):
        algorithm.learn(64)
    assert steps == 0  # not after a whole rollout


def test_trust_regions_refuse_a_common_offset() -> None:
    algorithm = sb3_contrib.TRPO(
        "VLAPolicy",
        toy_vec(1),
        n_steps=8,
        batch_size=8,
        device="cpu",
        policy_kwargs={"model_kwargs": TINY, "distribution_kwargs": {"coherence": "offset"}},
    )
    with pytest.raises(ValueError, match='coherence="independent"'):
        algorithm.learn(8)


def test_stable_baselines3_evaluates_it() -> None:
    algorithm = toy_ppo()
    found: Any = evaluate_policy(
        algorithm, toy_vec(2, horizon=3), n_eval_episodes=4, return_episode_rewards=True, warn=False
    )
    rewards, lengths = found
    assert lengths == [3, 3, 3, 3]
    assert all(-4.5 < reward < 0 for reward in rewards)


# --- Save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["gaussian", "flow_sde", "flow_noise"])
def test_a_saved_algorithm_acts_and_goes_on_the_same(tmp_path: Path, distribution: str) -> None:
    algorithm = toy_ppo(distribution=distribution, value_lr=1e-3, kl_coef=0.1, target_kl=0.5)
    algorithm.policy.model.set_statistics({"action_mean": torch.tensor([0.1, 0.2])})
    algorithm.learn(16)
    algorithm.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=toy_vec(2), device="cpu")
    assert same(loaded.policy, algorithm.policy)
    observation = observations(3)
    assert np.array_equal(
        loaded.predict(observation, deterministic=True)[0], algorithm.predict(observation, deterministic=True)[0]
    )
    assert (loaded.value_lr, loaded.kl_coef, loaded.target_kl, loaded.env_steps) == (1e-3, 0.1, 0.5, 32)
    rates = [[group["lr"] for group in a.policy.optimizer.param_groups] for a in (loaded, algorithm)]
    assert rates[0] == rates[1]
    results = []
    for each in (algorithm, loaded):
        each.set_env(toy_vec(2))
        each.set_random_seed(5)
        each._last_obs = None
        each._reference = None
        each.learn(16, reset_num_timesteps=False)
        results.append(each)
    assert same(results[0].policy, results[1].policy)
    assert loaded.num_timesteps == 32 and loaded.env_steps == 64


def test_a_saved_algorithm_holds_no_pictures(tmp_path: Path) -> None:
    sizes = []
    for count, n_steps in ((1, 2), (8, 4)):
        algorithm = toy_ppo(toy_vec(count, image_size=64), n_steps=n_steps, batch_size=count * n_steps, kl_coef=0.1)
        algorithm.learn(count * n_steps)
        path = tmp_path / f"{count}.zip"
        algorithm.save(path)
        with zipfile.ZipFile(path) as archive:
            data = json.loads(archive.read("data"))
        assert not {"_last_obs", "_last_episode_starts", "rollout_buffer", "_reference", "rehearsal"} & data.keys()
        sizes.append(path.stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 4096  # neither observations nor decisions: a picture has 12,288 bytes


def test_load_needs_the_checkpoints_folder_no_more(tmp_path: Path) -> None:
    model = tiny_model(action_dim=2, action_horizon=3)
    model.set_statistics({"action_std": torch.tensor([0.5, 2.0])})
    save_checkpoint(tmp_path / "sft", model)
    algorithm = toy_ppo(policy_kwargs={"checkpoint": tmp_path / "sft"}, stirred=False)
    assert same(algorithm.policy.model, model)
    algorithm.save(tmp_path / "model")
    observation = observations(2)
    action, _ = algorithm.predict(observation, deterministic=True)
    shutil.rmtree(tmp_path / "sft")
    loaded = PPO.load(tmp_path / "model", device="cpu")
    assert np.array_equal(loaded.predict(observation, deterministic=True)[0], action)


def test_a_checkpoint_fits_or_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "sft", tiny_model(action_dim=4, action_horizon=5))
    env = ToyEnv(chunk=8, action_dim=4)
    with pytest.raises(ValueError, match="action_chunk <= 5"):
        VLAPolicy(env.observation_space, env.action_space, lambda _: 1e-3, checkpoint=tmp_path / "sft")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VLAPolicy(env.observation_space, env.action_space, lambda _: 1e-3, checkpoint=tmp_path / "nowhere")


def test_a_checkpoint_brings_its_critic_where_that_fits(tmp_path: Path) -> None:
    first = policy_for(ToyEnv(privileged=True))
    save_checkpoint(tmp_path / "both", first.model, first.value_head)
    for privileged in (True, False):
        env = ToyEnv(privileged=privileged)
        policy = VLAPolicy(env.observation_space, env.action_space, lambda _: 1e-3, checkpoint=tmp_path / "both")
        assert same(policy.value_head, first.value_head) is privileged


def test_the_policy_alone_can_be_saved(tmp_path: Path) -> None:
    policy = policy_for(ToyEnv(), distribution_kwargs={"std": 0.3})
    policy.save(str(tmp_path / "policy.pth"))
    loaded = VLAPolicy.load(str(tmp_path / "policy.pth"), device="cpu")
    assert same(loaded, policy)


@pytest.mark.parametrize(("chunk", "shape"), [(None, (3, 4)), (2, (2, 4)), (1, (4,))])
def test_a_policy_to_act_with_from_a_checkpoint_alone(
    tmp_path: Path, chunk: int | None, shape: tuple[int, ...]
) -> None:
    model = tiny_model(action_horizon=3)
    save_checkpoint(tmp_path / "sft", model)
    policy = load_policy(tmp_path / "sft", chunk)
    observation = observations(2)
    action, _ = policy.predict(observation, deterministic=True)
    assert action.shape == (2, *shape)
    whole = load_policy(tmp_path / "sft").predict(observation, deterministic=True)[0]
    np.testing.assert_array_equal(action.reshape(2, -1, 4), whole[:, : action.reshape(2, -1, 4).shape[1]])
    with pytest.raises(ValueError, match="action_chunk <= 3"):
        load_policy(tmp_path / "sft", 4)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (20, 40)])
def test_a_policy_brings_pictures_to_its_size_as_loading_did(tmp_path: Path, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image[0]).save(buffer, "PNG")
    view = {"render_size": size[0] if size[0] == size[1] else list(size), "resize": "area"}
    model = tiny_model()
    save_checkpoint(tmp_path / "sft", model, notes={"view": view})
    policy = load_policy(tmp_path / "sft")
    assert policy.observation_space["image"].shape == (*size, 3)  # type: ignore[index]
    observation = {**observations(1), "image": image}
    prepared = policy.prepare(tensors(observation))["image"][0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(prepared, decode_picture(buffer.getvalue(), 32))
    save_checkpoint(tmp_path / "small", model)
    expected = load_policy(tmp_path / "small").predict({**observation, "image": prepared[None]}, deterministic=True)[0]
    np.testing.assert_array_equal(policy.predict(observation, deterministic=True)[0], expected)


def test_an_environment_of_another_size_than_the_data_is_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "sft", tiny_model(), notes={"view": {"render_size": 64, "resize": "area"}})
    options = {"policy_kwargs": {"checkpoint": str(tmp_path / "sft")}}
    with pytest.warns(UserWarning, match=r"sft was trained on .* 64x64 .* environment's have 32x32.*image_size=64"):
        PPO("VLAPolicy", toy_vec(action_dim=4), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = PPO("VLAPolicy", toy_vec(action_dim=4, image_size=64), device="cpu", **options)
    drawn.save(tmp_path / "algorithm")
    assert PPO.load(tmp_path / "algorithm").policy.portable_kwargs["resize"] == "area"
    save_checkpoint(tmp_path / "practiced", drawn.policy.model, notes=drawn.policy.notes)
    again, seen = load_policy(tmp_path / "practiced", 2), observations(1, action_dim=4, image_size=64)
    assert again.observation_space["image"].shape == (64, 64, 3)  # type: ignore[index]
    np.testing.assert_array_equal(*(each.predict(seen, deterministic=True)[0] for each in (again, drawn)))
    with pytest.raises(ValueError, match="Unknown resize='aera'; did you mean 'area'"):
        policy_for(ToyEnv(), resize="aera")


def test_a_policy_reads_sentences_as_long_as_its_data_had(tmp_path: Path) -> None:
    model = tiny_model()
    save_checkpoint(tmp_path / "long", model, notes={"view": {"instruction_bytes": 96}})
    save_checkpoint(tmp_path / "short", model)
    seen = observations(1)
    padded = {**seen, "instruction": np.pad(seen["instruction"], ((0, 0), (0, 32)))}
    action, _ = load_policy(tmp_path / "long").predict(padded, deterministic=True)
    expected, _ = load_policy(tmp_path / "short").predict(seen, deterministic=True)
    np.testing.assert_allclose(action, expected, atol=1e-6)


# --- The simulator ----------------------------------------------------------------------------------------------------


def test_trains_and_acts_in_metaworld() -> None:
    env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", image_size=32, action_chunk=5, horizon=10)
    try:
        algorithm = PPO(
            "VLAPolicy", env, n_steps=4, batch_size=4, n_epochs=1, device="cpu", policy_kwargs={"model_kwargs": TINY}
        )
        algorithm.learn(4)
        assert algorithm.num_timesteps == 4 and algorithm.env_steps == 20
        observation, _ = env.reset(seed=0, options={"task": "reach-v3", "goal": 7, "seed": 0})
        action, _ = algorithm.predict(observation, deterministic=True)
        assert action.shape == (5, 4)
        assert np.array_equal(observation["instruction"], encode_instruction("Reach a goal position"))
    finally:
        env.close()


@pytest.mark.parametrize("length", [40, 64, 200])
def test_an_instruction_may_have_any_number_of_zeros_at_its_end(length: int) -> None:
    algorithm, seen = toy_ppo(), observations(3)
    expected, _ = algorithm.predict(seen, deterministic=True)
    other = {**seen, "instruction": fit_instruction(seen["instruction"], length)}
    assert other["instruction"].shape == (3, length)
    found, _ = algorithm.predict(other, deterministic=True)
    np.testing.assert_array_equal(found, expected)
    one, _ = algorithm.predict({key: value[1] for key, value in other.items()}, deterministic=True)
    np.testing.assert_allclose(one, expected[1], atol=1e-6)
    longer = np.full((3, 65), ord("x"), np.uint8)
    with pytest.raises(ValueError, match=r"'xx*' is longer than the 64 bytes that are read"):
        algorithm.predict({**seen, "instruction": longer})


def test_training_where_instructions_are_longer(tmp_path: Path) -> None:
    """A checkpoint goes on where they have another length: its model reads any."""
    save_checkpoint(tmp_path / "checkpoint", tiny_model(action_dim=4, action_horizon=2))
    options = {"image_size": 32, "action_chunk": 2, "horizon": 4, "instruction_bytes": 150}
    env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", **options)
    algorithm = PPO(
        "VLAPolicy",
        env,
        n_steps=4,
        batch_size=4,
        n_epochs=1,
        device="cpu",
        policy_kwargs={"checkpoint": str(tmp_path / "checkpoint")},
    )
    algorithm.learn(4)
    algorithm.save(tmp_path / "trained.zip")
    observation, _ = env.reset(seed=0)
    action, _ = PPO.load(tmp_path / "trained.zip", env=env).predict(observation, deterministic=True)
    assert action.shape == (2, 4)
    env.close()


def test_a_state_that_is_not_finite_has_no_action() -> None:
    seen = observations(2)
    seen["state"][1, 2] = np.nan
    with pytest.raises(ValueError, match=r"(?s)state is .*expected finite numbers"):
        toy_ppo().predict(seen)


CHANGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "in 0..1": (lambda o: {**o, "image": (o["image"] / 255).astype(np.float32)}, "image has type float32.*255"),
    "float64": (lambda o: {**o, "image": o["image"] / 255}, "image has type float64; expected uint8"),
    "float": (lambda o: {**o, "image": o["image"].astype(np.float32)}, "image has type float32; expected uint8"),
    "not a number": (lambda o: {**o, "image": np.full_like(o["image"], np.nan, np.float16)}, "image has type float16"),
    "black and white": (lambda o: {**o, "image": o["image"] > 127}, "image has type bool; expected uint8"),
    "below": (lambda o: {**o, "image": o["image"].astype(np.int16) - 1}, "image has values from -1 to"),
    "above": (
        lambda o: {**o, "image": o["image"].astype(np.int64) + 1},
        r"image has values from .* to 256.*Box\(0, 255",
    ),
    "with alpha": (lambda o: {**o, "image": o["image"][..., [0, 1, 2, 0]]}, r"image has shape \(.*, 4\); expected \("),
    "gray": (lambda o: {**o, "image": o["image"][..., :1]}, r"image has shape \(.*, 1\); expected \("),
    "flat": (lambda o: {**o, "image": o["image"][..., 0]}, r"image has shape \(.*32\); expected \("),
    "small": (lambda o: {**o, "image": o["image"][..., ::2, ::2, :]}, r"image has shape \(.*16, 16, 3\); expected \("),
    "words": (
        lambda o: {**o, "instruction": "reach"},
        r"instruction has shape \(\); expected \(64,\).*encode_instruction",
    ),
    "float words": (
        lambda o: {**o, "instruction": o["instruction"] / 1},
        "instruction has type float64; expected uint8",
    ),
    "odd words": (lambda o: {**o, "instruction": o["instruction"] - np.int16(1)}, "instruction has values from -1"),
    "long state": (lambda o: {**o, "state": o["state"].repeat(2, -1)}, r"state has shape \(.*8.*\); expected \(4,\)"),
    "infinite state": (lambda o: {**o, "state": o["state"] * np.inf}, "(?s)state is .*expected finite"),
    "huge state": (lambda o: {**o, "state": o["state"] * 1e60}, "(?s)state is .*expected finite"),
    "complex state": (lambda o: {**o, "state": o["state"] * 1j}, "state has type complex64; expected float32"),
    "state of words": (lambda o: {**o, "state": o["state"].astype(str)}, "state has type <U.*; expected float32"),
    "critic": (lambda o: {**o, "privileged_state": o["privileged_state"] * np.nan}, "(?s)privileged_state is .*finite"),
    "no image": (lambda o: {k: v for k, v in o.items() if k != "image"}, "has no image; it has .*instruction, .*state"),
    "no state": (lambda o: {k: v for k, v in o.items() if k != "state"}, "has no state; it has .*image, instruction"),
    "misspelt": (
        lambda o: {"instructions" if k == "instruction" else k: v for k, v in o.items()},
        "has no instruction; it has .*instructions",
    ),
    "picture": (lambda o: o["image"], "reads a dict with image, state, instruction.*got ndarray"),
    "with info": (lambda o: (o, {}), "You have passed a tuple"),
}


@pytest.fixture(scope="module")
def both_orders() -> dict[str, VLAPolicy]:
    """Made for pictures as the environment has them, and as Stable-Baselines3's algorithms turn them."""
    first = toy_ppo(toy_vec(privileged=True), model_kwargs=TINY).policy
    last = policy_for(ToyEnv(privileged=True), value_width=32)
    last.load_state_dict(first.state_dict())
    return {"channels first": first, "channels last": last}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("order", ["channels first", "channels last"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_the_space_has_no_action(
    change: str, order: str, batched: bool, both_orders: dict[str, VLAPolicy]
) -> None:
    seen = observations(2, privileged=True)
    seen = seen if batched else {key: value[0] for key, value in seen.items()}
    alter, message = CHANGES[change]
    with pytest.raises(ValueError, match=message):
        both_orders[order].predict(alter(seen), deterministic=True)


@pytest.mark.parametrize("order", ["channels first", "channels last"])
def test_what_fits_the_space_gives_the_same_action(order: str, both_orders: dict[str, VLAPolicy]) -> None:
    policy, seen = both_orders[order], observations(2, privileged=True)
    expected, _ = policy.predict(seen, deterministic=True)
    changes: list[dict[str, Any]] = [
        {"image": seen["image"].astype(np.int64)},
        {"image": seen["image"].transpose(0, 3, 1, 2)},
        {"image": seen["image"].tolist(), "instruction": seen["instruction"].tolist()},
        {"image": torch.from_numpy(seen["image"]), "state": torch.from_numpy(seen["state"])},
        {"state": seen["state"].astype(np.float64)},
        {"instruction": seen["instruction"].astype(np.int32)},
        {"reward": np.zeros(2)},
    ]
    for change in changes:
        assert np.array_equal(policy.predict({**seen, **change}, deterministic=True)[0], expected), change.keys()
    without = {key: seen[key] for key in ("image", "state", "instruction")}  # the critic's part decides nothing
    assert np.array_equal(policy.predict(without, deterministic=True)[0], expected)
    whole = {**seen, "state": np.ones((2, 4), np.int64)}
    ones = policy.predict({**seen, "state": np.ones((2, 4), np.float32)}, deterministic=True)[0]
    assert np.array_equal(policy.predict(whole, deterministic=True)[0], ones)
    with pytest.raises(ValueError, match="image of 1; state of 2"):
        policy.predict({**seen, "image": seen["image"][:1]})
    with pytest.raises(ValueError, match="image of one, without a batch axis; state of 2"):
        policy.predict({**seen, "image": seen["image"][0]})
    with pytest.raises(ValueError, match="a batch of none; expected at least one"):
        policy.predict({key: array[:0] for key, array in seen.items()})


def test_a_model_of_another_state_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", tiny_model(state_dim=7))
    with pytest.raises(ValueError, match=r"reads a state of 7 numbers; the environment's is \(4,\)"):
        PPO("VLAPolicy", toy_vec(action_dim=4), policy_kwargs={"checkpoint": str(tmp_path / "checkpoint")})
