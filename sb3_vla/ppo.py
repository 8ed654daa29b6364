"""Proximal Policy Optimisation (Schulman et al. 2017) of vision-language-action policies, in chunks.

One sample is one decision: an observation and the action chunk that the environment runs on it. With any other policy
than VLAPolicy this class is ``stable_baselines3.PPO``: its code runs.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import stable_baselines3
import torch
import torch.nn.functional as F
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from mw_envs.tasks import did_you_mean
from sb3_vla.buffers import ChunkRolloutBuffer, DecisionBatch, DecisionBuffer
from sb3_vla.distributions.base import logprob_mask
from sb3_vla.policies import Evaluation, VLAPolicy
from sb3_vla.precision import autocast
from sb3_vla.progress import SuccessBar
from sb3_vla.sft import DemonstrationBatches
from sb3_vla.stepping import (
    Clock,
    Decision,
    check_decision,
    check_rewards,
    halved,
    step_by_halves,
    step_together,
)

if TYPE_CHECKING:
    from sb3_vla.cluster.rollout import Replicas

_OWN_OPTIONS = (
    "value_lr",
    "clip_range_high",
    "gamma_per",
    "dual_clip",
    "huber_delta",
    "logprob_type",
    "micro_batch_size",
    "kl_coef",
    "critic_warmup",
    "actor_warmup",
    "rehearsal",
    "bf16",
    "bootstrap_truncated",
    "task_sampling",
    "overlap",
)
TASK_SAMPLING = ("uniform", "signal")
GAMMA_PER = ("decision", "env_step")
# A ratio of e^20 says no more than one of e^10, and the gradient of e^90 is not finite.
_LARGEST_LOG_RATIO = 20.0
# Least weight of a task that is always or never solved, where 1 is that of a task solved every other time.
_LEAST_TASK_WEIGHT = 0.1
# Episodes of a task that tell how often it is solved now; more would lag behind the policy.
_RECENT_EPISODES = 30


@dataclass
class _OldPolicy:
    """What the update compares with: the rollout's decisions under the weights that took them, in buffer order."""

    log_prob: Tensor
    mean: Tensor
    std: Tensor
    reference: tuple[Tensor, Tensor] | None


class PPO(stable_baselines3.PPO):
    """PPO for chunks; the arguments of ``stable_baselines3.PPO``, then those below.

    ``n_steps``, ``batch_size`` and ``total_timesteps`` count decisions; environment steps are logged beside them.
    ``gae_lambda`` is per decision, and so is ``gamma`` unless ``gamma_per`` says otherwise. ``target_kl`` stops an
    update at the exact divergence of the action distributions, averaged over the epoch so far; what was drawn, and so
    an outlier among the ratios, has no part in it. ``normalize_advantage`` is over a minibatch. A step whose gradient
    is not finite is left out and counted in ``train/skipped_steps``.

    :param value_lr: the critic's learning rate at the start; it follows the schedule of ``learning_rate``. None: that
        of the actor.
    :param clip_range_high: how far above one the ratio may go before it is clipped, ``clip_range`` being how far below
        (DAPO, Yu et al. 2025, eq. 10); a number or a schedule. None: as far.
    :param gamma_per: ``decision``, or ``env_step``: a decision of n environment steps is discounted by gamma^n.
    :param dual_clip: where the advantage A is negative, the surrogate is not below this times A, so that a ratio far
        above one does not rule an update (Ye et al. 2020, eq. 5). More than 1; None for no such bound.
    :param huber_delta: error of a value from which on its loss grows linearly (Huber), half the square below; None for
        the square.
    :param logprob_type: what a ratio is of: ``chunk``, ``action``, ``token`` or ``denoising_step``, see
        :meth:`~sb3_vla.distributions.ActionDistribution.log_prob`. The surrogates of a decision's ratios, which share
        its advantage, are summed: at ratio one the gradient is the same for all types, then each is clipped for itself.
    :param micro_batch_size: decisions that are evaluated at a time, where a minibatch does not fit into memory; their
        gradients add up to the minibatch's. None for all of it.
    :param kl_coef: weight of KL(policy || reference), where the reference is the policy as it was at the first update:
        after imitation, the imitation policy. It is not saved with the algorithm, see :meth:`anchor`.
    :param critic_warmup: rollouts at the start from which the critic alone learns.
    :param actor_warmup: rollouts after those over which the actor's learning rate rises linearly. Adam's first steps
        are of full length in every weight, whatever the gradient; from a good policy they lead to a worse one.
    :param rehearsal: demonstrations whose imitation loss is added to each minibatch, so that what is not practised now
        is not forgotten. They are not saved with the algorithm: set them again after ``load``.
    :param rehearsal_coef: weight of that loss.
    :param rehearsal_batch_size: demonstration frames per minibatch.
    :param bf16: bfloat16 autocast of the update, None where the machine computes it faster; log-probabilities and
        weights stay float32.
    :param bootstrap_truncated: add the value of the last observation where a time limit cut an episode, as
        Stable-Baselines3 does. False takes the limit as a part of the task; let the critic see ``elapsed_time`` then.
    :param noise_scale: factor of the exploration noise, a number or a schedule. What acts in the end is the policy
        without noise; where that falls towards the end, the last updates fit it.
    :param task_sampling: ``uniform`` leaves the environments' own weights; ``signal`` draws a task in proportion to the
        variance p (1 - p) of its recent success, which is what a success can teach, and not below a tenth of the most.
    :param overlap: in a rollout, simulate one half of the environments while the policy decides for the other; pays
        where the policy runs on another device than the simulators. It needs a
        :class:`~sb3_vla.vec_env.SharedMemoryVecEnv` without wrappers, and acts on no other environment. The policy then
        decides for two small batches instead of one: an environment meets other exploration noise than without.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {  # type: ignore[assignment]
        **stable_baselines3.PPO.policy_aliases,
        "VLAPolicy": VLAPolicy,
    }
    policy: Any

    def __init__(
        self,
        policy: str | type[Any],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[Any] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        value_lr: float | None = None,
        clip_range_high: float | Schedule | None = None,
        gamma_per: str = "decision",
        dual_clip: float | None = None,
        huber_delta: float | None = None,
        logprob_type: str = "chunk",
        micro_batch_size: int | None = None,
        kl_coef: float = 0.0,
        critic_warmup: int = 0,
        actor_warmup: int = 0,
        rehearsal: DemonstrationBatches | None = None,
        rehearsal_coef: float = 1.0,
        rehearsal_batch_size: int = 128,
        bf16: bool | None = False,
        bootstrap_truncated: bool = True,
        noise_scale: float | Schedule = 1.0,
        task_sampling: str = "uniform",
        overlap: bool = False,
    ) -> None:
        self.value_lr = value_lr
        self.clip_range_high = None if clip_range_high is None else FloatSchedule(clip_range_high)
        if gamma_per not in GAMMA_PER:
            raise ValueError(f"Unknown gamma_per={gamma_per!r}; {did_you_mean(gamma_per, GAMMA_PER)}")
        self.gamma_per = gamma_per
        self.dual_clip = dual_clip
        self.huber_delta = huber_delta
        self.logprob_type = logprob_type
        self.micro_batch_size = micro_batch_size
        self.kl_coef = kl_coef
        self.critic_warmup = critic_warmup
        self.actor_warmup = actor_warmup
        self.rehearsal = rehearsal
        self.rehearsal_coef = rehearsal_coef
        self.rehearsal_batch_size = rehearsal_batch_size
        self.bf16 = bf16
        self.bootstrap_truncated = bootstrap_truncated
        self.noise_scale = FloatSchedule(noise_scale)
        if task_sampling not in TASK_SAMPLING:
            raise ValueError(f"Unknown task_sampling={task_sampling!r}; {did_you_mean(task_sampling, TASK_SAMPLING)}")
        self.task_sampling = task_sampling
        self.overlap = overlap
        self.env_steps = 0
        #: rollouts that have been trained on; ``_n_updates`` counts epochs, which ``target_kl`` may cut short
        self.updates = 0
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, VLAPolicy):
            self._refuse_own_options()
            super()._setup_model()
            return
        # The stock set-up would allocate its own buffer at the size of the raw images.
        stock = (None, DictRolloutBuffer)  # an algorithm that stable_baselines3.PPO saved names its own
        if self.rollout_buffer_class not in stock or self.rollout_buffer_kwargs:
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class!r}, rollout_buffer_kwargs="
                f"{self.rollout_buffer_kwargs!r}: VLAPolicy has its own rollout buffer"
            )
        self.rollout_buffer_class = _NoBuffer  # type: ignore[assignment]
        super()._setup_model()
        self.rollout_buffer_class = None
        self._check_options()
        self.rollout_buffer = ChunkRolloutBuffer(  # type: ignore[assignment]
            self.n_steps, self.n_envs, self.device, self.gamma, self.gae_lambda, self.gamma_per
        )
        self.policy_kwargs = self.policy.portable_kwargs
        self._episodes: defaultdict[str, deque[tuple[float, int]]] = defaultdict(
            lambda: deque(maxlen=self._stats_window_size)
        )
        self._reference: VLAPolicy | None = None
        #: copies of the policy that decide in its place, on other accelerators
        self.replicas: Replicas | None = None

    def _refuse_own_options(self) -> None:
        """Options that only VLAPolicy's update knows must not be given in vain."""
        defaults = inspect.signature(PPO.__init__).parameters
        if (self.noise_scale(0.0), self.noise_scale(1.0)) != (1.0, 1.0):
            raise ValueError(f"noise_scale acts on VLAPolicy alone; got {self.policy_class.__name__}")
        for name in _OWN_OPTIONS:
            if getattr(self, name) != defaults[name].default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} acts on VLAPolicy alone; got {self.policy_class.__name__}"
                )

    def anchor(self) -> None:
        """Take the present policy as the reference of ``kl_coef``; the first update does so if nobody did."""
        self._reference = copy.deepcopy(self.policy).requires_grad_(False)

    def _check_options(self) -> None:
        for left in (0.0, 1.0):
            if not (math.isfinite(self.noise_scale(left)) and self.noise_scale(left) > 0):
                raise ValueError(f"noise_scale is {self.noise_scale(left)} at one end of training; expected above 0")
            if self.clip_range_high is not None and not self.clip_range_high(left) >= 0:
                raise ValueError(f"clip_range_high is {self.clip_range_high(left)}; expected at least 0")
        for name, least in {"dual_clip": 1, "huber_delta": 0, "micro_batch_size": 0}.items():
            value = getattr(self, name)
            if value is not None and not value > least:
                raise ValueError(f"{name}={value}; expected more than {least}, or None")
        model, distribution = self.policy.model, self.policy.distribution
        distribution.check_trainable(model)
        distribution.check_logprob_type(self.logprob_type)
        if self.ent_coef != 0 and not distribution.has_entropy:
            raise ValueError(
                f"ent_coef={self.ent_coef} has nothing to act on: the entropy of this action distribution is fixed. "
                "Set ent_coef=0, or distribution_kwargs=dict(learn_std=True) with the Gaussian, or use flow_noise"
            )
        if self.value_lr is not None and self.lr_schedule(1.0) <= 0:
            raise ValueError("value_lr needs a learning_rate schedule that does not begin at zero")
        if self.rehearsal is not None:
            data = self.rehearsal.demonstrations
            found = (self.rehearsal.horizon, data.actions.shape[1], data.images.shape[1:3])
            expected = (model.action_horizon, model.action_dim, model.image_size)
            if found != expected:
                raise ValueError(
                    f"rehearsal has (horizon, action dimensions, image size) {found}; the model needs {expected}"
                )

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Collect ``n_rollout_steps`` decisions of each environment; see the stock method."""
        if not isinstance(self.policy, VLAPolicy):
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        assert self._last_obs is not None, "No previous observation was provided"
        buffer: ChunkRolloutBuffer = rollout_buffer
        self._prepare_rollout(env)
        buffer.reset()
        callback.on_rollout_start()
        env_steps_before, clock = self.env_steps, Clock()
        steps = step_by_halves if self.overlap and halved(env) else step_together
        for decision, outcome in steps(env, self._decide, self._last_obs, n_rollout_steps, clock):  # type: ignore[arg-type]
            # Callbacks read these from the locals, by Stable-Baselines3's names.
            actions, clipped_actions, values = decision.actions, decision.clipped, decision.values
            new_obs, rewards, dones, infos = outcome.new_obs, outcome.rewards, outcome.dones, outcome.infos
            check_rewards(rewards, infos)
            self.num_timesteps += env.num_envs
            executed = np.array([info.get("env_steps", self.policy.action_chunk) for info in infos])
            self.env_steps += int(executed.sum())
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            self._record_episodes(infos, dones)
            rewards = self._bootstrap(rewards, dones, infos, executed)
            assert isinstance(self._last_episode_starts, np.ndarray)
            buffer.add(decision.observation, decision.trace, values, rewards, executed, self._last_episode_starts)
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones
        with torch.no_grad():
            last_values = self.policy.predict_values(obs_as_tensor(new_obs, self.device))[:, 0]  # type: ignore[arg-type]
        buffer.compute_returns_and_advantage(last_values, dones)
        callback.update_locals(locals())
        callback.on_rollout_end()
        self._log_rollout(n_rollout_steps * env.num_envs, self.env_steps - env_steps_before, clock)
        return True

    def _prepare_rollout(self, env: VecEnv) -> None:
        """Which tasks are drawn, and how strongly the policy explores."""
        if self.task_sampling == "signal" and self._episodes:
            env.env_method("set_task_weights", self._task_weights())
        self.policy.set_training_mode(False)
        self.policy.distribution.noise_scale = self.noise_scale(self._current_progress_remaining)
        if self.replicas is not None:
            self.replicas.take_weights()

    def _log_rollout(self, decisions: int, env_steps: int, clock: Clock) -> None:
        seconds = clock.elapsed()
        self.logger.record("time/rollout_seconds", seconds)
        self.logger.record("time/env_steps", self.env_steps, exclude="tensorboard")
        self.logger.record("perf/env_steps_per_second", env_steps / seconds)
        self.logger.record("perf/decisions_per_second", decisions / seconds)
        self.logger.record("perf/simulation_share", clock.seconds["simulation"] / seconds)
        self.logger.record("perf/inference_share", clock.seconds["inference"] / seconds)

    @torch.no_grad()
    def _decide(self, observations: Mapping[str, np.ndarray]) -> Decision:
        if self.replicas is None:
            prepared = self.policy.prepare(obs_as_tensor(dict(observations), self.device))
            chunk, values, trace = self.policy.decide(prepared)
        else:
            prepared, chunk, values, trace = self.replicas.decide(observations)
        actions = chunk.cpu().numpy()
        check_decision(actions, values, observations)
        clipped = np.clip(actions, self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]
        return Decision(prepared, actions, clipped, values, trace)

    def train(self) -> None:
        """Update the policy on the rollout."""
        if not isinstance(self.policy, VLAPolicy):
            super().train()
            return
        started = time.perf_counter()
        policy, buffer = self.policy, self.rollout_buffer
        assert isinstance(buffer, DecisionBuffer)
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        clip_range_vf = None
        if self.clip_range_vf is not None:
            clip_range_vf = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
        if self.kl_coef > 0 and self._reference is None:
            if self.updates > 0:
                warnings.warn(
                    "kl_coef keeps this policy near what it was when it was loaded; load an earlier one, call anchor() "
                    "and set_parameters() to take that as the reference",
                    stacklevel=2,
                )
            self.anchor()
        if self._reference is not None:
            self._reference.distribution.noise_scale = policy.distribution.noise_scale
        minibatches = buffer.minibatches(self.batch_size)
        old = self._old_policy(buffer, minibatches)
        metrics: defaultdict[str, list[float]] = defaultdict(list)
        stopped = False
        for epoch in range(self.n_epochs):
            divergence: list[float] = []
            if epoch > 0:
                minibatches = buffer.minibatches(self.batch_size)
            for indices in minibatches:
                loss, kl = self._accumulate_gradient(buffer, indices, old, clip_range, clip_range_vf, metrics)
                if kl is not None:
                    divergence.append(kl)
                    metrics["approx_kl"].append(kl)
                    if self.target_kl is not None and np.mean(divergence) > 1.5 * self.target_kl:
                        stopped = True
                        break
                self._optimizer_step(loss, metrics)
            self._n_updates += 1
            if stopped:
                break
        self.updates += 1
        self._log_update(buffer, metrics, clip_range, clip_range_vf, time.perf_counter() - started)

    def _accumulate_gradient(
        self,
        buffer: DecisionBuffer,
        indices: Tensor,
        old: _OldPolicy,
        clip_range: float,
        clip_range_vf: float | None,
        metrics: defaultdict[str, list[float]],
    ) -> tuple[float, float | None]:
        """Gradient of a minibatch's loss, micro-batch by micro-batch.

        Every term is a mean over decisions, so a micro-batch counts by its share of them.

        :return: the loss, and the divergence from the rollout's policy, None while the critic alone learns.
        """
        self.policy.optimizer.zero_grad(set_to_none=True)
        train_actor = self.updates >= self.critic_warmup
        advantages = buffer.advantages.flatten()[indices]
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        total = divergence = 0.0
        start = 0
        for part in self._micro_batches(indices):
            batch, share = buffer.batch(part), len(part) / len(indices)
            batch.advantages = advantages[start : start + len(part)].to(self.device)
            start += len(part)
            with autocast(self.bf16, self.device.type):
                found = self.policy.evaluate(batch.observations, batch.trace, batch.executed, self.logprob_type)
            loss = self.vf_coef * self._value_loss(found.values, batch, clip_range_vf, metrics)
            if train_actor:
                loss = loss + self._actor_loss(found, batch, old, clip_range, metrics)
                with torch.no_grad():
                    divergence += share * self._divergence(found, (old.mean, old.std), batch).item()
            (share * loss).backward()
            total += share * loss.item()
        if train_actor and self.rehearsal is not None:
            loss = self.rehearsal_coef * self._rehearsal_loss(self.rehearsal, metrics)
            loss.backward()
            total += loss.item()
        return total, divergence if train_actor else None

    def _micro_batches(self, indices: Tensor) -> tuple[Tensor, ...]:
        return indices.split(self.micro_batch_size or len(indices))

    def _actor_loss(
        self,
        found: Evaluation,
        batch: DecisionBatch,
        old: _OldPolicy,
        clip_range: float,
        metrics: defaultdict[str, list[float]],
    ) -> Tensor:
        """Clipped surrogate, entropy bonus, divergence from the reference; ``batch.advantages`` are taken as given."""
        above = clip_range
        if self.clip_range_high is not None:
            above = self.clip_range_high(self._current_progress_remaining)
        log_ratio = found.log_prob - old.log_prob[batch.indices].to(self.device)
        ratio = torch.exp(log_ratio.clamp(max=_LARGEST_LOG_RATIO))
        counted = logprob_mask(self.logprob_type, batch.executed, ratio).expand_as(ratio)
        advantages = batch.advantages.reshape(-1, *[1] * (ratio.ndim - 1))
        clipped = torch.clamp(ratio, 1 - clip_range, 1 + above)
        surrogate = torch.min(advantages * ratio, advantages * clipped)
        if self.dual_clip is not None:
            bounded = torch.max(surrogate, self.dual_clip * advantages)
            surrogate = torch.where(advantages < 0, bounded, surrogate)
        policy_loss = -(surrogate * counted).reshape(len(ratio), -1).sum(1).mean()
        metrics["policy_loss"].append(policy_loss.item())
        metrics["clip_fraction"].append((ratio != clipped)[counted > 0].float().mean().item())
        metrics["ratio_max"].append(ratio.max().item())
        loss = policy_loss
        if found.entropy is not None:
            entropy_loss = -found.entropy.mean()
            metrics["entropy_loss"].append(entropy_loss.item())
            loss = loss + self.ent_coef * entropy_loss
        if old.reference is not None:
            kl = self._divergence(found, old.reference, batch)
            metrics["reference_kl"].append(kl.item())
            loss = loss + self.kl_coef * kl
        return loss

    def _rehearsal_loss(self, rehearsal: DemonstrationBatches, metrics: defaultdict[str, list[float]]) -> Tensor:
        observation, actions, mask = rehearsal.sample(self.rehearsal_batch_size)
        with autocast(self.bf16, self.device.type):
            loss = self.policy.model.imitation_loss(
                {key: value.to(self.device) for key, value in observation.items()},
                actions.to(self.device),
                mask.to(self.device),
            )
        metrics["rehearsal_loss"].append(loss.item())
        return loss

    def _divergence(self, found: Evaluation, other: tuple[Tensor, Tensor], batch: DecisionBatch) -> Tensor:
        """Mean KL(policy || other), where the other's mean and deviation are in buffer order."""
        mean, std = (tensor[batch.indices].to(self.device) for tensor in other)
        return self.policy.distribution.kl_divergence(found.mean, found.std, mean, std, batch.executed).mean()

    def _value_loss(
        self,
        values: Tensor,
        batch: DecisionBatch,
        clip_range_vf: float | None,
        metrics: defaultdict[str, list[float]],
    ) -> Tensor:
        if clip_range_vf is not None:
            change = values - batch.values
            metrics["value_clip_ratio"].append((change.abs() > clip_range_vf).float().mean().item())
            values = batch.values + change.clamp(-clip_range_vf, clip_range_vf)
        if self.huber_delta is None:
            value_loss = F.mse_loss(batch.returns, values)
        else:
            value_loss = F.huber_loss(batch.returns, values, delta=self.huber_delta)
        metrics["value_loss"].append(value_loss.item())
        return value_loss

    def _optimizer_step(self, loss: float, metrics: defaultdict[str, list[float]]) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        metrics["skipped_steps"].append(float(not finite))
        if finite:
            metrics["grad_norm"].append(norm.item())
            metrics["loss"].append(loss)
            self.policy.optimizer.step()

    @torch.no_grad()
    def _old_policy(self, buffer: DecisionBuffer, minibatches: list[Tensor]) -> _OldPolicy:
        """The rollout under the weights that took it, in buffer order.

        It is computed in the update's precision and in the micro-batches of its first epoch, so that ratios start at
        exactly one: a row of a matrix product may be rounded otherwise beside other rows.
        """
        parts: defaultdict[str, list[Tensor]] = defaultdict(list)
        micro_batches = [part for indices in minibatches for part in self._micro_batches(indices)]
        for batch in map(buffer.batch, micro_batches):
            with autocast(self.bf16, self.device.type):
                found = self.policy.evaluate(batch.observations, batch.trace, batch.executed, self.logprob_type)
                if self._reference is not None:
                    other = self._reference.evaluate(batch.observations, batch.trace, batch.executed)
                    parts["reference_mean"].append(other.mean.cpu())
                    parts["reference_std"].append(other.std.cpu())
            parts["log_prob"].append(found.log_prob.cpu())
            parts["mean"].append(found.mean.cpu())
            parts["std"].append(found.std.cpu())
        indices, whole = torch.cat(minibatches), {}
        for name, tensors in parts.items():
            found_in_order = torch.cat(tensors)
            whole[name] = found_in_order.new_zeros(buffer.advantages.numel(), *found_in_order.shape[1:])
            whole[name][indices] = found_in_order
        reference = (whole["reference_mean"], whole["reference_std"]) if self._reference is not None else None
        return _OldPolicy(whole["log_prob"], whole["mean"], whole["std"], reference)

    @torch.no_grad()
    def _bootstrap(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], executed: np.ndarray
    ) -> np.ndarray:
        """Add the discounted value of the last observation to rewards of episodes that a time limit cut.

        Where the limit is a part of the task it is not added, but the death of a worker is never a part of the task.
        """
        reason = "TimeLimit.truncated" if self.bootstrap_truncated else "worker_restarted"
        cut = [i for i, done in enumerate(dones) if done and infos[i].get(reason, False)]
        if not cut:
            return rewards
        last = [infos[i]["terminal_observation"] for i in cut]
        stacked = {key: np.stack([observation[key] for observation in last]) for key in last[0]}
        values = self.policy.predict_values(obs_as_tensor(stacked, self.device))[:, 0].cpu().numpy()
        rewards = rewards.copy()
        rewards[cut] += self.rollout_buffer.discounts(executed)[cut] * values  # type: ignore[attr-defined]
        return rewards

    def _record_episodes(self, infos: list[dict[str, Any]], dones: np.ndarray) -> None:
        for i in np.flatnonzero(dones):
            if "is_success" in infos[i] and "task" in infos[i]:
                success = float(infos[i]["is_success"])
                self._episodes[infos[i]["task"]].append((success, infos[i].get("elapsed_steps", 0)))

    def task_success(self) -> dict[str, float]:
        """Share of successes among each task's last ``stats_window_size`` training episodes."""
        return {task: float(np.mean([s for s, _ in episodes])) for task, episodes in sorted(self._episodes.items())}

    def _task_weights(self) -> dict[str, float]:
        weights = {}
        for task, episodes in self._episodes.items():
            # Laplace's rule: a task without a success among a few episodes is not yet hopeless.
            recent = list(episodes)[-_RECENT_EPISODES:]
            rate = (sum(success for success, _ in recent) + 1) / (len(recent) + 2)
            weights[task] = max(_LEAST_TASK_WEIGHT, 4 * rate * (1 - rate))
        return weights

    def _log_update(
        self,
        buffer: DecisionBuffer,
        metrics: Mapping[str, list[float]],
        clip_range: float,
        clip_range_vf: float | None,
        seconds: float,
    ) -> None:
        def mean(name: str) -> float:
            return float(np.mean(metrics[name])) if metrics.get(name) else 0.0

        record = self.logger.record
        # The reference's names, then Stable-Baselines3's.
        for name, value in {
            "actor/loss": mean("policy_loss"),
            "actor/grad_norm": mean("grad_norm"),
            "actor/approx_kl": mean("approx_kl"),
            "actor/pg_clipfrac": mean("clip_fraction"),
            "rollout/returns_mean": buffer.returns.mean().item(),
            "rollout/advantages_mean": buffer.advantages.mean().item(),
            "train/policy_gradient_loss": mean("policy_loss"),
            "train/approx_kl": mean("approx_kl"),
            "train/clip_fraction": mean("clip_fraction"),
            "train/ratio_max": max(metrics.get("ratio_max") or [1.0]),
            "train/loss": mean("loss"),
            "train/skipped_steps": float(np.sum(metrics.get("skipped_steps", []))),
            "train/n_updates": self._n_updates,
            "train/clip_range": clip_range,
            "time/update_seconds": seconds,
        }.items():
            record(name, value)
        if metrics.get("value_loss"):  # there is a critic
            record("actor/value_loss", mean("value_loss"))
            record("actor/value_clip_ratio", mean("value_clip_ratio"))
            record("train/value_loss", mean("value_loss"))
            values, returns = buffer.values.flatten().numpy(), buffer.returns.flatten().numpy()
            record("train/explained_variance", explained_variance(values, returns))
        if clip_range_vf is not None:
            record("train/clip_range_vf", clip_range_vf)
        for name in ("entropy_loss", "reference_kl", "rehearsal_loss"):
            if metrics.get(name):
                record(f"train/{name}", mean(name))
        episodes = [episode for window in self._episodes.values() for episode in window]
        if episodes:
            success = self.task_success()
            record("env/success_once", float(np.mean(list(success.values()))))
            record("env/episode_len", float(np.mean([length for _, length in episodes])))
            for task, rate in success.items():
                record(f"env/success_once/{task}", rate, exclude="stdout")

    def _update_learning_rate(self, optimizers: Any) -> None:
        """The schedule's rate for the actor, after its warm-up; the critic's follows in the proportion at the start."""
        super()._update_learning_rate(optimizers)
        if not isinstance(self.policy, VLAPolicy):
            return
        actor, critic = self.policy.optimizer.param_groups
        if self.value_lr is not None:
            critic["lr"] *= self.value_lr / self.lr_schedule(1.0)
        risen = (self.updates - self.critic_warmup + 1) / (self.actor_warmup + 1)
        actor["lr"] *= min(max(risen, 0.0), 1.0)
        self.logger.record("train/actor_learning_rate", actor["lr"])

    def _excluded_save_params(self) -> list[str]:
        if not issubclass(self.policy_class, VLAPolicy):
            return super()._excluded_save_params()
        # Pictures of the last observation, the reference copy and data do not belong in a saved algorithm.
        return [
            *super()._excluded_save_params(),
            "_last_obs",
            "_last_episode_starts",
            "_reference",
            "replicas",
            "rehearsal",
            "_episodes",
        ]

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> PPO:
        """Train for at least ``total_timesteps`` decisions; see ``stable_baselines3.PPO.learn``."""
        if isinstance(self.policy, VLAPolicy):
            self._check_batch_size()
            if reset_num_timesteps:
                self.env_steps = 0
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        return self

    def _check_batch_size(self) -> None:
        decisions = self.n_steps * self.n_envs
        if decisions % self.batch_size:
            divisors = [size for size in range(1, decisions + 1) if decisions % size == 0]
            nearest = min(divisors, key=lambda size: abs(size - self.batch_size))
            raise ValueError(
                f"batch_size={self.batch_size} does not divide a rollout of n_steps={self.n_steps} decisions of "
                f"{self.n_envs} environments, {decisions} in all; the nearest that does is {nearest}"
            )

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """As in Stable-Baselines3, but the bar tells the success rate too."""
        if progress_bar:
            if not isinstance(callback, (list, BaseCallback)):
                callback = ConvertCallback(callback)
            callback = [*(callback if isinstance(callback, list) else [callback]), SuccessBar()]
        return super()._init_callback(callback)


class _NoBuffer:
    """Stands in for the stock rollout buffer while VLAPolicy's own is not built yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
