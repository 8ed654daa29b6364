"""PPO with VLAPolicy as users of Stable-Baselines3 know an algorithm: its tools, its files, its errors."""

from __future__ import annotations

import inspect
import json
import math
import re
import zipfile
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium.wrappers import FrameStackObservation
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)
from toy import TINY, ToyEnv, stir, tiny_model, toy_demonstrations, toy_ppo, toy_vec

from sb3_vla import GRPO, PPO, VLAPolicy
from sb3_vla.checkpoints import save_checkpoint
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.rollouts.episodes import EpisodeStatistics


def observed(count: int = 3, **options: Any) -> dict[str, np.ndarray]:
    env = toy_vec(count, **options)
    env.seed(0)
    found = env.reset()
    assert isinstance(found, dict)
    return found


def act(algorithm: Any, observation: dict[str, np.ndarray]) -> np.ndarray:
    return algorithm.predict(observation, deterministic=True)[0]


def data_of(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("data"))


# --- The constructor and the update -----------------------------------------------------------------------------------


def test_arguments_are_stable_baselines3s_then_our_own_by_keyword() -> None:
    ours = list(inspect.signature(PPO.__init__).parameters.values())
    theirs = list(inspect.signature(stable_baselines3.PPO.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(p.default is not inspect.Parameter.empty for p in ours[len(theirs) :])
    learn = [inspect.signature(cls.learn).parameters for cls in (PPO, stable_baselines3.PPO)]
    assert [(p.name, p.default) for p in learn[0].values()] == [(p.name, p.default) for p in learn[1].values()]


@pytest.mark.parametrize("options", [{}, {"clip_range_vf": 0.05, "ent_coef": 0.01, "normalize_advantage": False}])
@pytest.mark.parametrize("chunk", [None, 2])
def test_one_update_is_that_of_stable_baselines3(chunk: int | None, options: dict[str, Any]) -> None:
    """Minibatches are whole rollouts, so that only the order of sums differs; plain gradient steps."""
    found: list[Any] = []
    for algorithm_class in (PPO, stable_baselines3.PPO):
        algorithm = algorithm_class(
            "VLAPolicy",
            toy_vec(2, chunk=chunk, horizon=3, truncates=True),
            **{"n_steps": 8, "batch_size": 16, "n_epochs": 3, "seed": 0, "device": "cpu", "learning_rate": 0.05},  # type: ignore[arg-type]
            policy_kwargs={
                "model_kwargs": TINY,
                "value_width": 32,
                "distribution_kwargs": {"learn_std": True},
                "optimizer_class": torch.optim.SGD,
            },
            **options,
        )
        stir(algorithm.policy)
        algorithm.learn(16)
        found.append(algorithm)
    ours, theirs = found
    for name in ("rewards", "values", "advantages", "returns"):
        stored = getattr(theirs.rollout_buffer, name)  # an update turns all but the rewards to (environment, step)
        expected = stored.T if name == "rewards" else stored.reshape(2, 8)
        np.testing.assert_allclose(getattr(ours.rollout_buffer, name).numpy(), expected, atol=2e-5, err_msg=name)
    for name, weights in theirs.policy.state_dict().items():
        torch.testing.assert_close(ours.policy.state_dict()[name], weights, atol=2e-5, rtol=1e-4)
    mine, stock = ours.logger.name_to_value, theirs.logger.name_to_value
    for name in ("policy_gradient_loss", "value_loss", "clip_fraction", "entropy_loss", "explained_variance"):
        assert mine[f"train/{name}"] == pytest.approx(stock[f"train/{name}"], abs=1e-4), name
    for name in ("train/n_updates", "train/clip_range", "train/learning_rate"):
        assert mine[name] == stock[name]


# --- Callbacks, logs and progress -------------------------------------------------------------------------------------


class Locals(BaseCallback):
    """Keeps the names that callbacks find at a step."""

    seen: set[str]

    def _on_step(self) -> bool:
        self.seen = set(self.locals)
        return True


def test_callbacks_find_stable_baselines3s_names() -> None:
    names = {}
    for algorithm_class in (PPO, stable_baselines3.PPO):
        watch = Locals()
        algorithm_class(
            "VLAPolicy", toy_vec(2), n_steps=8, batch_size=16, device="cpu", policy_kwargs={"model_kwargs": TINY}
        ).learn(16, watch)
        names[algorithm_class] = watch.seen
    # Our rollout computes no log-probabilities; the others are what its loops count with.
    assert names[stable_baselines3.PPO] - names[PPO] <= {"log_probs", "obs_tensor", "n_steps", "idx", "done"}


def test_evaluation_during_training(tmp_path: Path) -> None:
    evaluation = EvalCallback(
        VecMonitor(toy_vec(2, horizon=3)),
        n_eval_episodes=4,
        eval_freq=4,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        deterministic=True,
        verbose=0,
    )
    algorithm = toy_ppo(toy_vec(2, horizon=3))
    algorithm.learn(32, evaluation)
    found = np.load(tmp_path / "evaluations.npz")
    assert found["timesteps"].tolist() == [8, 16, 24, 32] and found["results"].shape == (4, 4)
    assert found["successes"].shape == (4, 4) and (found["ep_lengths"] == 3).all()
    best = PPO.load(tmp_path / "best_model", device="cpu")
    assert act(best, observed()).shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("callback", "decisions"),
    [
        (lambda: StopTrainingOnMaxEpisodes(max_episodes=2), 8),  # two for each of two environments
        (
            lambda: EvalCallback(
                toy_vec(1), StopTrainingOnRewardThreshold(-100.0), eval_freq=5, n_eval_episodes=2, verbose=0
            ),
            10,
        ),
        (
            lambda: EvalCallback(
                toy_vec(1, reward=1.0),
                callback_after_eval=StopTrainingOnNoModelImprovement(1, min_evals=1),
                eval_freq=2,
                n_eval_episodes=1,
                verbose=0,
            ),
            12,  # evaluations at 4, 8 and 12: one is new, two are no better, and one of those is patience
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped", "ignore:Training and eval env are not")
def test_callbacks_stop_training(callback: Callable[[], BaseCallback], decisions: int) -> None:
    algorithm = toy_ppo(toy_vec(2, horizon=2))
    algorithm.learn(64, callback())
    assert algorithm.num_timesteps == decisions
    stock = stable_baselines3.PPO(
        "VLAPolicy", toy_vec(2, horizon=2), n_steps=8, batch_size=16, policy_kwargs={"model_kwargs": TINY}, device="cpu"
    )
    stock.learn(64, callback())
    assert stock.num_timesteps == decisions


def test_checkpoints_during_training(tmp_path: Path) -> None:
    env = VecNormalize(toy_vec(2), norm_obs=False)
    algorithm = toy_ppo(env)  # type: ignore[arg-type]
    algorithm.learn(32, CheckpointCallback(8, str(tmp_path), save_vecnormalize=True))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"rl_model_16_steps.zip", "rl_model_32_steps.zip", "rl_model_vecnormalize_32_steps.pkl"} <= names
    loaded = PPO.load(tmp_path / "rl_model_16_steps.zip", device="cpu")
    assert loaded.num_timesteps == 16 and loaded.env_steps == 32


class LongNames(gym.Wrapper):
    """Tasks whose names agree in more letters than a table shows."""

    def step(self, action: Any) -> Any:
        *rest, info = self.env.step(action)
        info["task"] = "a-task-with-a-name-of-very-many-letters-" + info["task"]
        return *rest, info


def test_every_log_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    algorithm = toy_ppo(DummyVecEnv([lambda: LongNames(ToyEnv())] * 4))
    algorithm.set_logger(configure(str(tmp_path), ["stdout", "log", "json", "csv", "tensorboard"]))
    algorithm.learn(96)
    algorithm.logger.close()
    shown = capsys.readouterr().out
    assert "success_once" in shown and "a-task" not in shown and "approx_kl" in shown
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    names = [f"env/success_once/a-task-with-a-name-of-very-many-letters-Go to the {side}" for side in ("left", "right")]
    assert len(rows) == 3 and all(0 <= rows[-1][name] <= 1 for name in names)
    assert names[0] in (tmp_path / "progress.csv").read_text().splitlines()[0]
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_the_progress_bar_tells_the_success_rate(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    class Count(BaseCallback):
        def _init_callback(self) -> None:
            calls.append(0)

        def _on_step(self) -> bool:
            return True

    for callback in (None, Count(), [Count()], lambda *_: True):
        algorithm = toy_ppo(toy_vec(2))
        algorithm.learn(32, callback, progress_bar=True)
        assert algorithm.ep_success_buffer is not None
        rate = f"{np.mean(algorithm.ep_success_buffer):.0%}"
        assert f"success {rate}" in capsys.readouterr().out
    assert len(calls) == 2


# --- Acting, and wrappers ---------------------------------------------------------------------------------------------


def video(env: VecEnv, folder: Path) -> VecEnv:
    pytest.importorskip("moviepy")
    return VecVideoRecorder(env, str(folder), lambda step: step == 0, video_length=2)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env, _: VecMonitor(env),
        lambda env, _: VecNormalize(env, norm_obs=False),
        lambda env, _: VecNormalize(env, norm_obs_keys=["state"]),
        video,
    ],
)
def test_trains_and_is_evaluated_under_wrappers(wrap: Callable[[VecEnv, Path], VecEnv], tmp_path: Path) -> None:
    env = wrap(toy_vec(2, horizon=2), tmp_path)
    algorithm = toy_ppo(env)  # type: ignore[arg-type]
    before = algorithm.policy.model.action_out.bias.detach().clone()
    algorithm.learn(32)
    assert not torch.equal(algorithm.policy.model.action_out.bias, before)
    mean, _ = evaluate_policy(algorithm, env, n_eval_episodes=4, warn=False)
    assert math.isfinite(mean)
    env.close()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (partial(VecFrameStack, n_stack=4), r"one color image.*\(12, 32, 32\).*leave VecFrameStack.* out"),
        (partial(VecFrameStack, n_stack=4, channels_order="first"), "several pictures in one.*leave VecFrameStack"),
        (
            lambda _: DummyVecEnv([lambda: FrameStackObservation(ToyEnv(), 4)]),
            r"\(4, 32, 32, 3\).*leave .*FrameStackObs",
        ),
        (VecNormalize, r'image as uint8.*float32.*VecNormalize\(env, norm_obs_keys=\["state"\]\)'),
        (lambda env: VecMonitor(VecNormalize(env, norm_obs_keys=["image", "state"])), "image as uint8.*norm_obs_keys="),
        (partial(VecNormalize, norm_obs_keys=["instruction"]), r"instruction as uint8.*float32.*norm_obs_keys"),
    ],
)
def test_wrappers_that_a_model_could_not_read_through_are_refused(wrap: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_ppo(wrap(toy_vec(2))).learn(16)


# --- Parameters, environments, going on -------------------------------------------------------------------------------


def test_parameters_are_taken_and_given() -> None:
    first, second = toy_ppo(seed=0), toy_ppo(seed=1, policy_kwargs={"model_kwargs": TINY, "value_width": 32})
    stir(second.policy, seed=1)
    first.learn(16)
    assert not np.array_equal(act(first, observed()), act(second, observed()))
    second.set_parameters(first.get_parameters())
    assert np.array_equal(act(first, observed()), act(second, observed()))
    one, two = (algorithm.policy.optimizer.state_dict() for algorithm in (first, second))
    assert torch.equal(one["state"][0]["exp_avg"], two["state"][0]["exp_avg"])
    bias = {"policy": {"model.action_out.bias": torch.tensor([0.5, -0.5])}}
    with pytest.raises(RuntimeError, match=r"not the weights of this CompactVLA policy: missing .* in all\)"):
        second.set_parameters(bias)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        second.set_parameters({"policy": first.policy.state_dict()})
    second.set_parameters(bias, exact_match=False)  # type: ignore[arg-type]
    assert second.policy.model.action_out.bias.tolist() == [0.5, -0.5]
    untouched = [name for name in first.policy.state_dict() if name != "model.action_out.bias"]
    assert all(torch.equal(first.policy.state_dict()[k], second.policy.state_dict()[k]) for k in untouched)


def test_the_weights_of_another_model_are_one_short_error(tmp_path: Path) -> None:
    wide = toy_ppo(model_kwargs={**TINY, "width": 128})
    wide.save(tmp_path / "wide")
    algorithm = toy_ppo()
    before = {name: value.clone() for name, value in algorithm.policy.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"has shape \(.*expected.*in all\)") as caught:
        algorithm.set_parameters(str(tmp_path / "wide"), device="cpu")
    assert len(str(caught.value)) < 500
    assert all(torch.equal(value, before[name]) for name, value in algorithm.policy.state_dict().items())


def test_another_environment(tmp_path: Path) -> None:
    algorithm = toy_ppo(toy_vec(2))
    algorithm.learn(16)
    algorithm.set_env(toy_vec(2, horizon=2))
    algorithm.learn(16, reset_num_timesteps=False)
    assert algorithm.num_timesteps == 32
    with pytest.raises(AssertionError, match=r"\(4 != 2\).*PPO\.load\(path, env\)"):
        algorithm.set_env(toy_vec(4))
    with pytest.raises(ValueError, match="Action spaces do not match"):
        algorithm.set_env(toy_vec(2, chunk=1))
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        algorithm.set_env(toy_vec(2, privileged=True))
    algorithm.save(tmp_path / "saved")
    loaded = PPO.load(tmp_path / "saved", toy_vec(4), device="cpu", batch_size=8)
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64 and loaded.rollout_buffer.n_envs == 4
    # An evaluation needs no minibatches.
    one = PPO.load(tmp_path / "saved", toy_vec(1), device="cpu")
    assert evaluate_policy(one, toy_vec(1), n_eval_episodes=1, warn=False)[0] < 0


def test_training_goes_on_or_begins_again() -> None:
    rates: list[float] = []
    algorithm = toy_ppo(learning_rate=lambda left: 1e-3 * left)
    algorithm.learn(32)
    assert (algorithm.num_timesteps, algorithm.env_steps) == (32, 64)
    before = algorithm._last_obs
    resets: list[int] = []
    assert algorithm.env is not None
    real = algorithm.env.reset
    algorithm.env.reset = lambda: (resets.append(1), real())[1]  # type: ignore[method-assign]
    algorithm.learn(32, reset_num_timesteps=False)
    rates.append(algorithm.policy.optimizer.param_groups[0]["lr"])
    assert not resets and before is not None
    assert (algorithm.num_timesteps, algorithm.env_steps) == (64, 128)
    algorithm.learn(32)
    assert resets and (algorithm.num_timesteps, algorithm.env_steps) == (32, 64)
    assert rates == [0.0]


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_the_one_is_read_by_the_other(tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_steps": 8, "batch_size": 16, "device": "cpu", "policy_kwargs": {"model_kwargs": TINY}}
    for first, second in ((stable_baselines3.PPO, PPO), (PPO, stable_baselines3.PPO)):
        algorithm = first("VLAPolicy", toy_vec(2), **options).learn(16)
        algorithm.save(tmp_path / "saved")
        loaded = second.load(tmp_path / "saved", toy_vec(2), device="cpu")
        assert np.array_equal(act(loaded, observed()), act(algorithm, observed()))
        loaded.learn(16, reset_num_timesteps=False)
        assert loaded.num_timesteps == 32


def test_load_takes_custom_objects_and_options(tmp_path: Path) -> None:
    algorithm = toy_ppo(learning_rate=lambda left: 1e-3 * left, noise_scale=lambda left: 0.5 + 0.5 * left)
    algorithm.learn(16)
    algorithm.save(tmp_path / "saved", exclude=["tensorboard_log"])
    custom = {"learning_rate": 5e-4, "lr_schedule": lambda _: 5e-4, "clip_range": 0.1}
    loaded = PPO.load(tmp_path / "saved", toy_vec(2), "cpu", custom_objects=custom, n_epochs=2, value_lr=1e-3)
    assert loaded.device == torch.device("cpu") and loaded.n_epochs == 2
    loaded.learn(16, reset_num_timesteps=False)
    assert [group["lr"] for group in loaded.policy.optimizer.param_groups] == [5e-4, 1e-3]
    assert loaded.clip_range(0.5) == 0.1 and loaded.noise_scale(0.0) == 0.5  # type: ignore[operator]
    with open(tmp_path / "saved.zip", "rb") as file:
        again = PPO.load(file, device="cpu")  # type: ignore[arg-type]
    assert again.env is None and np.array_equal(act(again, observed()), act(algorithm, observed()))


# Another value than the default of each keyword of the constructors.
COMMON: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 8,
    "n_epochs": 2,
    "clip_range": 0.1,
    "ent_coef": 0.5,
    "max_grad_norm": 0.25,
    "target_kl": 0.5,
    "stats_window_size": 7,
    "tensorboard_log": "logs",
    "policy_kwargs": {"distribution_kwargs": {"std": 0.3, "learn_std": True}},
    "verbose": 1,
    "seed": 5,
    "clip_range_high": 0.3,
    "dual_clip": 3.0,
    "logprob_type": "action",
    "micro_batch_size": 4,
    "kl_coef": 0.1,
    "actor_warmup": 1,
    "rehearsal": DemonstrationBatches(toy_demonstrations(), None, 2, 0, 0),
    "rehearsal_coef": 0.5,
    "rehearsal_batch_size": 4,
    "bf16": True,
    "noise_scale": 0.5,
    "task_sampling": "signal",
    "sharding": "fsdp",
}
CHANGED: dict[type[PPO], dict[str, Any]] = {
    PPO: COMMON
    | {
        "n_steps": 4,
        "gamma": 0.5,
        "gae_lambda": 0.5,
        "clip_range_vf": 0.3,
        "normalize_advantage": False,
        "vf_coef": 0.25,
        "value_lr": 1e-2,
        "gamma_per": "env_step",
        "huber_delta": 1.0,
        "critic_warmup": 1,
        "bootstrap_truncated": False,
        "overlap": True,
        "sde_sample_freq": 4,
    },
    GRPO: COMMON
    | {
        "group_size": 2,
        "n_groups": 3,
        "max_groups": 12,
        "success_bounds": (0.25, 0.75),
        "episode_return": "success",
        "advantage_type": "leave_one_out",
        "normalize_length": False,
    },
}
REFUSED: dict[str, Any] = {
    "use_sde": True,
    "rollout_buffer_class": RolloutBuffer,
    "rollout_buffer_kwargs": {"gamma": 1.0},
}


def _plain(value: Any) -> Any:
    """What an attribute is, for comparison: of a schedule its values, of statistics what they hold."""
    if isinstance(value, FloatSchedule):
        return [value(left) for left in (0.0, 0.5, 1.0)]
    if isinstance(value, EpisodeStatistics):
        return value.window, value.by_task, value.ended, value.without_success
    return list(value) if isinstance(value, (deque, tuple)) else value


@pytest.mark.parametrize("through", ["keyword", "custom_objects"])
@pytest.mark.parametrize("algorithm", [PPO, GRPO])
def test_every_keyword_of_the_constructor_works_through_load(
    algorithm: type[PPO], through: str, tmp_path: Path
) -> None:
    model = {"model_kwargs": {**TINY, "action_dim": 4}, "value_width": 32}
    model["distribution_kwargs"] = {"learn_std": True}
    default: dict[str, Any] = {"policy_kwargs": model, "device": "cpu", "batch_size": 16}
    default |= {"n_steps": 8} if algorithm is PPO else {"group_size": 4}
    env = partial(toy_vec, 4, action_dim=4)
    algorithm("VLAPolicy", env(), **default).save(tmp_path / "saved")
    changed = CHANGED[algorithm]
    keywords = inspect.signature(algorithm).parameters.keys() - {"policy", "env", "device", "_init_setup_model"}
    assert keywords - REFUSED.keys() == changed.keys()
    for name, value in changed.items():
        full = {**model, **value} if name == "policy_kwargs" else value
        given: dict[str, Any] = {name: value} if through == "keyword" else {"custom_objects": {name: full}}
        loaded = algorithm.load(tmp_path / "saved", env(), device="cpu", **given)
        built = algorithm("VLAPolicy", env(), **{**default, name: full})
        # Beside what is random, an algorithm is what it would be by its constructor.
        for key in vars(built).keys() - {"policy", "env", "device", "rollout_buffer", "_trial_entropy"}:
            assert _plain(vars(loaded)[key]) == _plain(vars(built)[key]), (name, key)
        if name == "seed":
            assert getattr(loaded, "_trial_entropy", 5) == 5


@pytest.mark.parametrize("algorithm", [PPO, GRPO])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("task_sampling", "signals", "Unknown task_sampling='signals'; did you mean 'signal'"),
        ("sharding", "fsdp2", "Unknown sharding='fsdp2'; did you mean 'fsdp'"),
        ("clip_range_high", -0.1, "clip_range_high is -0.1; expected at least 0"),
        ("noise_scale", 0.0, "noise_scale is 0.0 at one end of training; expected above 0"),
        ("noise_scale", None, "noise_scale=None; expected a number"),
        ("dual_clip", 1.0, "dual_clip=1.0; expected more than 1, or None"),
        ("logprob_type", "step", "Unknown logprob_type='step'"),
        ("batch_size", 0, "batch_size=0; expected at least 1"),
        ("n_epochs", 0, "n_epochs=0; expected at least 1"),
        ("bf16", "no", "bf16='no'; expected True or False, or None"),
        ("policy", "MlpPolicy", "policy='MlpPolicy', but"),
    ],
)
def test_load_checks_what_it_changes(
    algorithm: type[PPO], option: str, value: Any, message: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"policy_kwargs": {"model_kwargs": TINY}, "device": "cpu", "batch_size": 16}
    options |= {"n_steps": 8} if algorithm is PPO else {"group_size": 2}
    algorithm("VLAPolicy", toy_vec(2), **options).save(tmp_path / "saved")
    for given in ({option: value}, {"custom_objects": {option: value}}):
        with pytest.raises(ValueError, match=re.escape(message)):
            algorithm.load(tmp_path / "saved", toy_vec(2), device="cpu", **given)
    assert algorithm.load(tmp_path / "saved", policy="VLAPolicy", device="cpu").policy_class is VLAPolicy


def test_load_refuses_what_the_constructor_does_not_take(tmp_path: Path) -> None:
    toy_ppo().save(tmp_path / "ppo")
    with pytest.raises(TypeError, match="PPO has no option 'clip_range_hihg'; did you mean 'clip_range_high'"):
        PPO.load(tmp_path / "ppo", clip_range_hihg=0.3)
    with pytest.raises(ValueError, match="Unknown gamma_per='env_steps'; did you mean 'env_step'"):
        PPO.load(tmp_path / "ppo", gamma_per="env_steps")
    GRPO("VLAPolicy", toy_vec(8), policy_kwargs={"model_kwargs": TINY}, device="cpu").save(tmp_path / "grpo")
    with pytest.raises(TypeError, match="names 'clip_range_hihg', which no archive holds; did you mean 'clip_range_h"):
        PPO.load(tmp_path / "ppo", custom_objects={"clip_range_hihg": 0.3})
    kept = {"lr_schedule": lambda _: 0.0, "learning_rate": 0.0, "observation_space": toy_vec(2).observation_space}
    assert PPO.load(tmp_path / "ppo", custom_objects=kept).learning_rate == 0.0
    for option in ("gamma", "value_lr", "overlap"):
        with pytest.raises(TypeError, match=f"GRPO has no option '{option}'"):
            GRPO.load(tmp_path / "grpo", **{option: 0.5})  # type: ignore[arg-type]
    for option, value in REFUSED.items():
        with pytest.raises(ValueError, match="VLAPolicy"):
            PPO.load(tmp_path / "ppo", **{option: value})
    nothing: dict[str, Any] = {"rollout_buffer_class": None, "rollout_buffer_kwargs": None, "policy_kwargs": None}
    assert PPO.load(tmp_path / "ppo", **nothing).rollout_buffer_kwargs == {}


@pytest.mark.parametrize("trained", [("all", "expert"), ("expert", "all")])
def test_a_loaded_algorithm_may_train_other_weights(trained: tuple[str, str], tmp_path: Path) -> None:
    """Whose moments the archive does not have."""
    algorithm = toy_ppo(trainable=trained[0])
    algorithm.learn(16)
    algorithm.save(tmp_path / "saved")
    with pytest.warns(UserWarning, match="of other weights than are trained now, .* begins anew"):
        loaded = PPO.load(tmp_path / "saved", toy_vec(2), device="cpu", policy_kwargs={"trainable": trained[1]})
    for name, weights in algorithm.policy.named_parameters():
        assert torch.equal(weights, loaded.policy.get_parameter(name)), name
    backbone = [weights.clone() for weights in loaded.policy.model.backbone()]
    loaded.learn(16)
    moved = [not torch.equal(*pair) for pair in zip(backbone, loaded.policy.model.backbone(), strict=True)]
    assert any(moved) == (trained[1] == "all")


def test_other_options_of_distribution_and_optimizer_act_on_a_loaded_algorithm(tmp_path: Path) -> None:
    """What the archive says of them does not take their place again."""
    algorithm = toy_ppo(distribution_kwargs={"learn_std": True, "std": 0.5})
    algorithm.learn(16)
    algorithm.save(tmp_path / "saved")
    load = partial(PPO.load, tmp_path / "saved", device="cpu")
    learned = algorithm.policy.distribution.log_std
    same = load(policy_kwargs={"distribution_kwargs": {"learn_std": True, "std": 0.5}})
    assert torch.equal(same.policy.distribution.log_std, learned)
    std = {"distribution_kwargs": {"learn_std": True, "std": 0.75}}
    whole = {**algorithm.policy_kwargs, **std}
    for wider in (load(policy_kwargs=std), load(custom_objects={"policy_kwargs": whole})):
        assert wider.policy.distribution.log_std.exp().tolist() == pytest.approx([0.75] * 2)
    kept = load(custom_objects={"policy_kwargs": algorithm.policy_kwargs})
    assert torch.equal(kept.policy.distribution.log_std, learned)
    with pytest.warns(UserWarning, match="begins anew"):
        flow = load(policy_kwargs={"distribution": "flow_sde", "distribution_kwargs": {}})
    assert type(flow.policy.distribution).__name__ == "FlowSDE"
    for options in ({"optimizer_kwargs": {"betas": (0.5, 0.75)}}, {"optimizer_class": torch.optim.SGD}):
        with pytest.warns(UserWarning, match="begins anew"):
            loaded = load(env=toy_vec(2), policy_kwargs=options)
        fresh = loaded.policy.optimizer
        assert type(fresh) is options.get("optimizer_class", torch.optim.Adam) and not fresh.state
        assert fresh.param_groups[0].get("betas") == options.get("optimizer_kwargs", {}).get("betas")
        loaded.learn(16)


def test_steps_that_stay_are_of_the_archive_also_with_other_options(toy_models: None, tmp_path: Path) -> None:
    """Those that it has, or those of its model where it has none."""
    options: dict[str, Any] = {"model": "toy_diffusion", "model_kwargs": {}, "trainable": "expert"}
    for saved in (2, 5):
        kwargs = {"denoising_steps": 5, "trained_steps": saved}
        algorithm = toy_ppo(distribution="ddim", distribution_kwargs=kwargs, learning_rate=0.1, **options)
        algorithm.learn(16)
        algorithm.save(tmp_path / "saved")
        given = {"distribution_kwargs": {**kwargs, "trained_steps": 3}}
        loaded = PPO.load(tmp_path / "saved", device="cpu", policy_kwargs=given).policy
        assert loaded.distribution.trained_steps == 3
        stays = algorithm.policy.model if saved == 5 else algorithm.policy.distribution.pretrained
        for name, weights in loaded.distribution.pretrained.named_parameters():
            assert torch.equal(weights, stays.get_parameter(name)), (saved, name)


def test_a_loaded_window_of_statistics_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    algorithm = toy_ppo(toy_vec(2))
    algorithm.learn(64)
    assert algorithm.ep_success_buffer is not None and len(algorithm.ep_success_buffer) > 5
    algorithm.save(tmp_path / "saved")
    loaded = PPO.load(tmp_path / "saved", toy_vec(2), device="cpu", stats_window_size=5)
    assert list(loaded.ep_success_buffer) == list(algorithm.ep_success_buffer)[-5:]
    loaded.learn(16, reset_num_timesteps=False)
    assert len(loaded.ep_success_buffer) == 5


def test_options_of_ours_are_loaded_into_an_archive_of_theirs(tmp_path: Path) -> None:
    theirs = stable_baselines3.PPO("VLAPolicy", toy_vec(2), policy_kwargs={"model_kwargs": TINY}, device="cpu")
    theirs.save(tmp_path / "saved")
    for given in ({"clip_range_high": 0.3}, {"custom_objects": {"clip_range_high": 0.3}}):
        assert PPO.load(tmp_path / "saved", device="cpu", **given).clip_range_high(0.5) == 0.3  # type: ignore[arg-type]
    stock = PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, device="cpu")
    stock.save(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"dual_clip=3\.0 acts on VLAPolicy alone"):
        PPO.load(tmp_path / "stock", dual_clip=3.0)
    with pytest.raises(ValueError, match=r"policy_kwargs=.*, but those of the archive are {}"):
        PPO.load(tmp_path / "stock", policy_kwargs={"net_arch": [8]})
    assert PPO.load(tmp_path / "stock", policy_kwargs={}, n_epochs=3).n_epochs == 3


def test_load_with_another_number_of_environments(tmp_path: Path) -> None:
    toy_ppo().save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"of 3 environments, 24 in all; .*PPO.load\(path, env, batch_size=12\)"):
        PPO.load(tmp_path / "saved", toy_vec(3), "cpu").learn(24)
    assert PPO.load(tmp_path / "saved", toy_vec(3), "cpu", batch_size=12).learn(24).num_timesteps == 24


def frozen(folder: Path, **options: Any) -> PPO:
    kwargs = {"checkpoint": folder, "trainable": "expert", "value_width": 32}
    return toy_ppo(policy_kwargs=kwargs, stirred=False, **options)


def test_a_frozen_backbone_stays_out_of_the_file(tmp_path: Path) -> None:
    model = tiny_model(action_dim=2, action_horizon=2, channels=(32, 64, 128))
    save_checkpoint(tmp_path / "sft", model)
    algorithm = frozen(tmp_path / "sft", n_epochs=2)
    algorithm.learn(16)
    algorithm.save(tmp_path / "part")
    whole = toy_ppo(policy_kwargs={"checkpoint": tmp_path / "sft", "value_width": 32}, stirred=False)
    whole.learn(16)
    whole.save(tmp_path / "whole")
    held = sum(p.numel() * 4 for p in model.backbone())
    sizes = [(tmp_path / f"{name}.zip").stat().st_size for name in ("whole", "part")]
    # Once the weights and twice in Adam's moments.
    assert sizes[0] - sizes[1] > 0.95 * 3 * held > 0.5 * sizes[0]

    loaded = PPO.load(tmp_path / "part", toy_vec(2), device="cpu")
    for name, weights in algorithm.policy.named_parameters():
        assert torch.equal(weights, loaded.policy.get_parameter(name)), name
    assert np.array_equal(act(loaded, observed()), act(algorithm, observed()))
    loaded.learn(16, reset_num_timesteps=False)
    assert loaded.num_timesteps == 32
    loaded.policy.save(str(tmp_path / "policy.pth"))
    alone = VLAPolicy.load(str(tmp_path / "policy.pth"), device="cpu")
    assert np.array_equal(act(alone, observed()), act(loaded, observed()))
    algorithm.set_parameters(loaded.get_parameters())
    assert np.array_equal(act(algorithm, observed()), act(loaded, observed()))


def test_a_file_without_its_backbone_is_refused_on_another(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "sft", tiny_model(action_dim=2, action_horizon=2))
    algorithm = frozen(tmp_path / "sft")
    algorithm.learn(16)
    algorithm.save(tmp_path / "part")
    (tmp_path / "sft").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"sft does not exist"):
        PPO.load(tmp_path / "part", device="cpu")
    moved = {"policy_kwargs": {"checkpoint": tmp_path / "moved", "trainable": "expert", "value_width": 32}}
    loaded = PPO.load(tmp_path / "part", device="cpu", custom_objects=moved)
    assert np.array_equal(act(loaded, observed()), act(algorithm, observed()))
    other = tiny_model(action_dim=2, action_horizon=2)
    stir(other, seed=7)
    save_checkpoint(tmp_path / "sft", other)
    with pytest.raises(RuntimeError, match="another frozen backbone than this policy's"):
        PPO.load(tmp_path / "part", device="cpu")
    with pytest.raises(RuntimeError, match="another frozen backbone than this policy's"):
        frozen(tmp_path / "sft").policy.load_state_dict(toy_ppo().policy.state_dict())


def test_a_backbone_without_a_checkpoint_is_saved(tmp_path: Path) -> None:
    algorithm = toy_ppo(trainable="expert")
    algorithm.save(tmp_path / "saved")
    loaded = PPO.load(tmp_path / "saved", device="cpu")
    assert np.array_equal(act(loaded, observed()), act(algorithm, observed()))


# --- Bad input --------------------------------------------------------------------------------------------------------


class Spoilt(ToyEnv):
    """From its third decision on it gives a reward, or a state, that is no number."""

    def __init__(self, spoilt: str, **options: Any) -> None:
        super().__init__(horizon=100, **options)
        self.spoilt = spoilt

    def step(self, action: np.ndarray) -> Any:
        assert np.isfinite(action).all()
        observation, reward, *rest = super().step(action)
        if self.elapsed >= 3 and self.spoilt == "reward":
            reward = math.inf
        elif self.elapsed >= 3:
            observation[self.spoilt][0] = math.nan
        return observation, reward, *rest


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("reward", r"Environment 1 \(task Go to the (left|right)\) gave the reward inf; expected a finite number"),
        ("state", r"1 of 2 environments are not finite; their observation .* in state: mend the environment"),
        ("privileged_state", r"1 of 2 environments are not finite; .* in privileged_state: mend the environment"),
    ],
)
@pytest.mark.parametrize("distribution", ["gaussian", "flow_sde"])
def test_what_is_no_number_is_refused_where_it_appears(spoilt: str, message: str, distribution: str) -> None:
    env = DummyVecEnv([lambda: ToyEnv(horizon=100, privileged=True), lambda: Spoilt(spoilt, privileged=True)])
    algorithm = toy_ppo(env, distribution=distribution)
    before = {name: value.clone() for name, value in algorithm.policy.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        algorithm.learn(64)
    assert algorithm.num_timesteps <= 6  # decisions of two environments, long before the rollout's end
    assert all(torch.equal(value, before[name]) for name, value in algorithm.policy.state_dict().items())


def test_weights_that_are_no_numbers_are_refused_before_a_step() -> None:
    env = DummyVecEnv([lambda: Spoilt("state")] * 2)
    algorithm = toy_ppo(env)
    with torch.no_grad():
        algorithm.policy.model.action_out.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"2 of 2 environments are not finite; .*weights are at fault"):
        algorithm.learn(64)
    assert algorithm.num_timesteps == 0


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize(("batch_size", "nearest"), [(5, 4), (12, 8), (64, 16)])
def test_a_batch_that_does_not_divide_the_rollout_is_refused(batch_size: int, nearest: int) -> None:
    algorithm = toy_ppo(batch_size=batch_size)
    message = (
        rf"batch_size={batch_size} does not divide .* n_steps=8 .* 2 environments, 16 in all; .* is {nearest}; for "
    )
    message += rf"a saved algorithm PPO.load\(path, env, batch_size={nearest}\)$"
    with pytest.raises(ValueError, match=message):
        algorithm.learn(16)
    assert algorithm.num_timesteps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "toy_tokens"}, r"model='toy_tokens', but the checkpoint .*sft is of 'compact'; leave model"),
        ({"model_kwargs": {"width": 96}}, r"model_kwargs with width=96, but the checkpoint .*sft has width=64; leave"),
        ({"model_kwargs": {"wings": 2}}, r"wings=2, but the checkpoint .*sft has no wings; leave"),
        ({"model": "compact", "model_kwargs": {"width": 64, "channels": (8, 8, 16)}}, None),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, toy_models: None, options: dict[str, Any], message: str | None
) -> None:
    save_checkpoint(tmp_path / "sft", tiny_model(action_dim=2, action_horizon=2))
    kwargs = {"checkpoint": tmp_path / "sft", **options}
    if message is None:  # the same model in other words
        toy_ppo(policy_kwargs=kwargs, stirred=False)
        return
    with pytest.raises(ValueError, match=message):
        toy_ppo(policy_kwargs=kwargs)
