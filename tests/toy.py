"""What the learner's tests share: a tiny model, and an environment and demonstrations that need no simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from mw_envs import encode_instruction
from sb3_vla import PPO
from sb3_vla.data.demonstrations import Demonstrations
from sb3_vla.models import CompactVLA, Context, VLAModel
from sb3_vla.models.base import PERCEPTION
from sb3_vla.policies.vla_policy import VLAPolicy
from sb3_vla.recording.videos import Mp4Writer
from sb3_vla.rollouts.buffers import ChunkRolloutBuffer, DecisionBuffer, Minibatch

TINY: dict[str, Any] = {"width": 64, "depth": 1, "channels": (8, 8, 16)}
SENTENCES = ("Go to the left", "Go to the right")
TARGETS = (-0.5, 0.5)  # of every action, by sentence


class StateModel(VLAModel):
    """A model whose context is the observation's state; tests add the denoiser."""

    def backbone(self) -> Iterator[nn.Parameter]:
        yield from ()

    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        return {PERCEPTION + "state": observation["state"]}

    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        return Context(perception[PERCEPTION + "state"], perception[PERCEPTION + "state"])


class ReadingModel(StateModel):
    """A model whose context is the state and, in the place of its last number, which of the two sentences it read."""

    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        second = torch.from_numpy(encode_instruction(SENTENCES[1])).to(observation["instruction"].device)
        which = (observation["instruction"] == second).all(1, keepdim=True).float()
        return super().perceive({"state": torch.cat([observation["state"][:, :-1], which], dim=1)})


def cosine_schedule(timesteps: int) -> Tensor:
    """abar of the squared cosine (Nichol & Dhariwal 2021, eq. 17), betas at most 0.999, float32 (timesteps,)."""
    time = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    level = torch.cos((time + 0.008) / 1.008 * torch.pi / 2).square()
    return (level[1:] / level[:-1]).clamp(min=0.001).cumprod(0).float()


class ToyDiffusion(ReadingModel):
    """A perceptron of state, noisy chunk and timestep, with dropout if wanted; T = 20 timesteps of the cosine schedule.

    :param prediction: what it says that its output is.
    """

    def __init__(
        self,
        action_dim: int = 2,
        action_horizon: int = 2,
        state_dim: int = 4,
        image_size: int = 32,
        prediction: str = "epsilon",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(action_dim, action_horizon)
        self.config = {"action_dim": action_dim, "action_horizon": action_horizon, "prediction": prediction}
        self.feature_dim, self.image_size, self.prediction = state_dim, (image_size, image_size), prediction
        self.register_buffer("alphas_cumprod", cosine_schedule(20))
        size = action_dim * action_horizon
        self.layers = nn.Sequential(
            nn.Linear(state_dim + size + 1, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, size)
        )

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        state = context.state.repeat(len(x) // len(context.state), 1)
        return self.layers(torch.cat([state, x.flatten(1), t[:, None] / 20], dim=1)).reshape(x.shape).to(x.dtype)


class ToyTokens(ReadingModel):
    """Logits of five tokens for each number of a chunk, linear in the state."""

    prediction = "tokens"

    def __init__(
        self,
        action_dim: int = 2,
        action_horizon: int = 2,
        state_dim: int = 4,
        image_size: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(action_dim, action_horizon)
        self.config = {"action_dim": action_dim, "action_horizon": action_horizon}
        self.feature_dim, self.image_size = state_dim, (image_size, image_size)
        self.register_buffer("token_values", torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0]))
        self.dropout = nn.Dropout(dropout)
        self.action_out = nn.Linear(state_dim, action_dim * action_horizon * 5)

    def token_logits(self, context: Context) -> Tensor:
        logits = self.action_out(self.dropout(context.state))
        return logits.reshape(-1, self.action_horizon, self.action_dim, 5)


class DroppingVLA(CompactVLA):
    """CompactVLA with dropout of what modulates its blocks."""

    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.dropout = nn.Dropout(dropout)

    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        context = super().contextualize(perception)
        keys_values, summary = context.state
        return Context(context.features, (keys_values, self.dropout(summary)))


#: one of each kind of prediction
TOY_MODELS: dict[str, type[VLAModel]] = {
    "toy_flow": DroppingVLA,
    "toy_diffusion": ToyDiffusion,
    "toy_tokens": ToyTokens,
}
#: every distribution, with the name of a toy model that it fits
EVERY_DISTRIBUTION: list[tuple[str, str, dict[str, Any]]] = [
    ("toy_flow", "gaussian", {}),
    ("toy_flow", "gaussian", {"coherence": "offset"}),
    ("toy_flow", "gaussian", {"learn_std": True, "std": [0.2, 0.3]}),
    ("toy_flow", "flow_sde", {}),
    ("toy_flow", "flow_sde", {"joint": True}),
    ("toy_flow", "flow_cps", {}),
    ("toy_flow", "flow_cps", {"joint": True}),
    ("toy_flow", "flow_noise", {}),
    ("toy_flow", "flow_noise", {"joint": False}),
    ("toy_diffusion", "ddpm", {"denoising_steps": 5}),
    ("toy_diffusion", "ddpm", {"denoising_steps": 5, "joint": False}),
    ("toy_diffusion", "ddim", {"denoising_steps": 5, "eta": 0.5}),
    ("toy_diffusion", "ddim", {"denoising_steps": 5, "joint": False, "trained_steps": 2}),
    ("toy_tokens", "tokens", {"temperature": 1.6}),
]


def toy_model_kwargs(model: str) -> dict[str, Any]:
    """Options of a toy model that make it small."""
    return TINY if model == "toy_flow" else {}


class ToyEnv(gym.Env):
    """Actions should equal a number that only the instruction tells; pictures and states are noise.

    :param chunk: K; None for actions without a chunk axis.
    :param horizon: decisions per episode.
    :param truncates: whether an episode ends by its limit instead of by itself.
    :param executed: environment steps that a decision is said to have run.
    :param reward: given every time instead of the negative distance from the target.
    :param privileged: whether to show what is for the critic only.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        chunk: int | None = 2,
        action_dim: int = 2,
        horizon: int = 1,
        truncates: bool = False,
        executed: int | None = None,
        reward: float | None = None,
        privileged: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.horizon, self.truncates, self.reward = horizon, truncates, reward
        self.executed = (chunk or 1) if executed is None else executed
        observed: dict[str, spaces.Space] = {
            "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
            "state": spaces.Box(-np.inf, np.inf, (4,), np.float32),
            "instruction": spaces.Box(0, 255, (64,), np.uint8),
        }
        if privileged:
            observed["privileged_state"] = spaces.Box(-np.inf, np.inf, (39,), np.float32)
            observed["elapsed_time"] = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.observation_space: spaces.Dict = spaces.Dict(observed)
        self.action_space = spaces.Box(-1.0, 1.0, (action_dim,) if chunk is None else (chunk, action_dim), np.float32)
        self.which = self.elapsed = 0
        self.weights: list[float] | None = None

    def set_task_weights(self, weights: dict[str, float]) -> None:
        self.weights = [weights.get(sentence, 1.0) for sentence in SENTENCES]

    def snapshot(self) -> dict[str, Any]:
        """What ``reset(options={"snapshot": ...})`` goes on from, as the environments of mw_envs have it."""
        names = ("which", "elapsed", "weights")
        return {"generator": self._generator, **{name: getattr(self, name) for name in names}}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        if options:
            values = dict(options["snapshot"])
            self.np_random.bit_generator.state = values.pop("generator")
            vars(self).update(values)
        elif self.weights is None:
            self.which, self.elapsed = int(self.np_random.integers(2)), 0
        else:
            second = self.weights[1] / sum(self.weights)
            self.which, self.elapsed = int(self.np_random.random() < second), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        distance = float(np.abs(action - TARGETS[self.which]).mean())
        self.elapsed += 1
        done = self.elapsed == self.horizon
        info: dict[str, Any] = {"env_steps": self.executed, "task": SENTENCES[self.which]}
        if done:
            info |= {"is_success": distance < 0.25, "elapsed_steps": self.elapsed * self.executed}
        reward = -distance if self.reward is None else self.reward
        return self._observe(), reward, done and not self.truncates, done and self.truncates, info

    def _observe(self) -> dict[str, np.ndarray]:
        self._generator = self.np_random.bit_generator.state
        shown = {
            "image": self.np_random.integers(0, 256, self.observation_space["image"].shape, np.uint8),
            "state": self.np_random.normal(size=4).astype(np.float32),
            "instruction": encode_instruction(SENTENCES[self.which]),
        }
        if "privileged_state" in self.observation_space.spaces:
            shown["privileged_state"] = self.np_random.normal(size=39).astype(np.float32)
            shown["elapsed_time"] = np.array([self.elapsed / self.horizon], np.float32)
        return shown


def toy_vec(count: int = 2, **options: Any) -> DummyVecEnv:
    makers: list[Callable[[], gym.Env]] = [partial(ToyEnv, **options)] * count
    return DummyVecEnv(makers)


def toy_ppo(
    env: DummyVecEnv | None = None,
    *,
    distribution: str = "gaussian",
    distribution_kwargs: dict[str, Any] | None = None,
    stirred: bool = True,
    trainable: str = "all",
    model: str = "compact",
    model_kwargs: dict[str, Any] = TINY,
    **options: Any,
) -> PPO:
    """PPO with the tiny model; ``stirred`` weights, because the model's own start is an action of exactly zero."""
    algorithm = PPO(
        "VLAPolicy",
        toy_vec() if env is None else env,
        **{
            "n_steps": 8,
            "batch_size": 16,
            "n_epochs": 1,
            "seed": 0,
            "device": "cpu",
            "policy_kwargs": {
                "model": model,
                "model_kwargs": model_kwargs,
                "distribution": distribution,
                "distribution_kwargs": distribution_kwargs,
                "value_width": 32,
                "trainable": trainable,
            },
            **options,
        },
    )
    if stirred:
        stir(algorithm.policy)
    return algorithm


def whole_minibatch(buffer: DecisionBuffer, indices: Tensor) -> Minibatch:
    """A minibatch that no other rank has a part in."""
    everywhere = torch.ones(len(indices), dtype=torch.bool)
    return Minibatch(indices, buffer.advantages.flatten()[indices], everywhere, len(indices))


def metrics(algorithm: BaseAlgorithm) -> dict[str, Any]:
    """What the last update logged; Stable-Baselines3 writes it out with the next rollout."""
    return dict(algorithm.logger.name_to_value)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def decisions(algorithm: PPO) -> ChunkRolloutBuffer:
    buffer: Any = algorithm.rollout_buffer
    assert isinstance(buffer, ChunkRolloutBuffer)
    return buffer


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[key]) for key, value in first.items())


def stir(module: nn.Module, size: float = 0.05, seed: int = 0) -> None:
    """Move every weight, so that nothing is zero or equal by initialization."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("log_std"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def tiny_model(**options: Any) -> CompactVLA:
    model = CompactVLA(**{"image_size": 32, **TINY, **options})
    stir(model)
    return model


def toy_observation(count: int, sentence: str = SENTENCES[0], seed: int = 0, image_size: int = 32) -> dict[str, Tensor]:
    """Tensors as a model reads them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (count, 3, image_size, image_size), generator=generator, dtype=torch.uint8),
        "state": torch.randn(count, 4, generator=generator),
        "instruction": torch.from_numpy(encode_instruction(sentence)).expand(count, -1).clone(),
    }


def toy_demonstrations(episodes: int = 6, length: int = 10, image_size: int = 32, seed: int = 0) -> Demonstrations:
    """Episodes of two tasks whose action is a number that the sentence tells, and a gripper that never moves."""
    generator = np.random.default_rng(seed)
    count = episodes * length
    episode = np.repeat(np.arange(episodes), length)
    which = episode % 2
    actions = np.zeros((count, 4), np.float32)
    actions[:, :3] = np.array(TARGETS, np.float32)[which][:, None]
    return Demonstrations(
        images=generator.integers(0, 256, (count, image_size, image_size, 3), np.uint8),
        states=generator.normal(size=(count, 4)).astype(np.float32),
        actions=actions,
        instructions=list(SENTENCES),
        instruction_index=which.astype(np.int64),
        tasks=[("left-v3", "right-v3")[i % 2] for i in range(episodes)],
        episode_index=episode,
        frame_index=np.tile(np.arange(length), episodes),
        episode_starts=np.arange(0, count, length),
        episode_ends=np.arange(length, count + 1, length),
        trials=[None] * episodes,
        camera={"image_size": image_size},
    )


def probability_of(policy: VLAPolicy, observation: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Log-probabilities of decisions that the policy takes now, by rows, computed again at every call."""
    prepared = policy.prepare(observation)
    executed = torch.full((len(observation["image"]),), 2)
    with torch.no_grad():
        _, _, trace = policy.decide(prepared)

    @torch.no_grad()
    def again(rows: Tensor) -> Tensor:
        parts = ({key: value[rows] for key, value in part.items()} for part in (prepared, trace))
        return policy.evaluate(*parts, executed[rows]).log_prob

    return again


def changed_by_an_update(algorithm: PPO, decisions: int) -> set[str]:
    """Names of the model's parameters that one update moves, which starts from ratios of exactly one.

    An update of rate zero comes first: its minibatches but the first are evaluated before the update and again in it,
    and then every ratio is one and nothing moves.
    """
    model, rate = algorithm.policy.model, algorithm.lr_schedule
    assert decisions > algorithm.batch_size  # else nothing is evaluated twice
    algorithm.lr_schedule = lambda _: 0.0
    assert not _moved_by(algorithm, decisions, model)
    shown = algorithm.logger.name_to_value
    assert shown["train/ratio_max"] == 1.0
    assert shown["actor/approx_kl"] == 0.0  # of r - 1 - log r, so the smallest ratio is one too
    algorithm.lr_schedule = rate
    return _moved_by(algorithm, decisions, model)


def _moved_by(algorithm: PPO, decisions: int, model: nn.Module) -> set[str]:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    algorithm.learn(decisions)
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def mean_reward(algorithm: BaseAlgorithm) -> float:
    """Of deterministic actions, over both instructions."""
    env = toy_vec(32)
    env.seed(123)
    observation = env.reset()
    assert isinstance(observation, dict)
    actions, _ = algorithm.predict(observation, deterministic=True)
    targets = [TARGETS[toy.which] for toy in env.envs]  # type: ignore[attr-defined]
    return -float(np.abs(actions - np.array(targets)[:, None, None]).mean())


def assert_learns_what_the_instruction_means(env: DummyVecEnv, **options: Any) -> None:
    """PPO from an untaught model, by a reward that only the instruction explains; ignoring it gives -0.5 at best.

    :param env: 16 environments.
    :param options: of :func:`toy_ppo`.
    """
    settings = {"n_steps": 4, "batch_size": 32, "n_epochs": 4, "learning_rate": 1e-3, "stirred": False}
    algorithm = toy_ppo(env, **{**settings, **options})
    assert mean_reward(algorithm) < -0.45
    algorithm.learn(16 * 64)
    assert mean_reward(algorithm) > -0.3


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Frames (T, H, W, 3) as a film."""
    with Mp4Writer(path, fps) as writer:
        for frame in frames:
            writer.append(frame)
