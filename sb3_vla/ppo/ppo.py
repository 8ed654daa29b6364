"""Proximal Policy Optimization (Schulman et al. 2017) of vision-language-action policies, in chunks.

One sample is one decision: an observation and the action chunk that the environment runs on it. With any other policy
than VLAPolicy this class is ``stable_baselines3.PPO``: its code runs.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from sb3_vla.common.optimizers import fuse_adam
from sb3_vla.common.precision import autocast
from sb3_vla.data.batches import DemonstrationBatches, shared_imitation_loss
from sb3_vla.distributed.fsdp import in_shards, is_sharded, keep_in_step, shard, whole_tensor
from sb3_vla.distributed.ranks import check_membership, join_for_good
from sb3_vla.distributions.base import logprob_mask
from sb3_vla.policies.vla_policy import Evaluation, VLAPolicy
from sb3_vla.ppo import losses, options
from sb3_vla.ppo.base import VLAAlgorithm
from sb3_vla.ppo.behavior_policy import BehaviorPolicy
from sb3_vla.rollouts.buffers import ChunkRolloutBuffer, DecisionBatch, DecisionBuffer, Minibatch, SharedRollout
from sb3_vla.rollouts.metrics import episode_metrics, ratio_metrics, update_metrics
from sb3_vla.rollouts.stepping import Clock, check_rewards, halved, step_by_halves, step_together

SelfPPO = TypeVar("SelfPPO", bound="PPO")


class PPO(VLAAlgorithm):
    """PPO for chunks; the arguments of ``stable_baselines3.PPO``, then those below.

    ``n_steps``, ``batch_size`` and ``total_timesteps`` count decisions; environment steps are logged beside them.
    ``gae_lambda`` is per decision, and so is ``gamma`` unless ``gamma_per`` says otherwise. ``target_kl`` stops an
    update at the exact KL divergence of the action distributions, averaged over the epoch so far, which no single
    ratio can dominate. ``normalize_advantage`` is over a minibatch. A step whose loss or gradient is not finite is
    skipped and counted in ``train/skipped_steps``. Schedules are functions of the remaining progress of ``learn``, from
    1 to 0.

    Under ``torchrun`` (:mod:`sb3_vla.distributed.ranks`) it joins the process group when it is given an environment.
    Each rank then has its share of the environments, ``batch_size`` and ``total_timesteps`` count the decisions of all
    ranks, and the result is that of one process with all environments, up to rounding. A callback that stops training
    stops all ranks at the end of the rollout. The first rank prints and logs.

    :param value_lr: initial learning rate of the critic, which follows the schedule of ``learning_rate``; None for that
        of the actor.
    :param clip_range_high: clip range of the ratio above one, where ``clip_range`` is that below one (DAPO, Yu et al.
        2025, eq. 10); a number or a schedule. None for ``clip_range``.
    :param gamma_per: ``decision``, or ``env_step``: a decision of n environment steps is discounted by gamma^n.
    :param dual_clip: c > 1; where the advantage A is negative the surrogate is at least c A, so that a ratio far above
        one does not dominate the update (Ye et al. 2020, eq. 5). None for no bound.
    :param huber_delta: the critic's loss is half the squared error up to this error and linear beyond it (Huber); None
        for the squared error.
    :param logprob_type: what one ratio stands for: ``chunk``, ``action``, ``token`` or ``denoising_step``, see
        :meth:`~sb3_vla.distributions.ActionDistribution.log_prob`. The surrogates of a decision's ratios, which share
        its advantage, are summed: at ratio one the gradient is the same for all types, beyond it each is clipped alone.
    :param micro_batch_size: decisions evaluated at a time, where a minibatch does not fit into memory; gradients are
        accumulated to those of the minibatch. None for all at once.
    :param kl_coef: weight of KL(policy || reference). The reference is the policy at the first update, such as that of
        imitation; it is not saved with the algorithm, see :meth:`anchor`.
    :param critic_warmup: number of first rollouts from which the critic alone learns.
    :param actor_warmup: number of rollouts after those over which the actor's learning rate rises linearly: Adam's
        first steps have full length in every weight whatever the gradient, which harms a pretrained policy.
    :param rehearsal: demonstrations whose imitation loss is added to that of each minibatch, against forgetting. They
        are not saved with the algorithm; set them again after ``load``.
    :param rehearsal_coef: weight of that loss.
    :param rehearsal_batch_size: demonstration frames per minibatch.
    :param bf16: bfloat16 autocast of the update, and on a GPU of the rollout; None where the machine computes it
        faster. Log-probabilities and weights stay float32.
    :param bootstrap_truncated: add the value of the last observation where a time limit cut an episode, as
        Stable-Baselines3 does. With False the time limit is a part of the task; show the critic ``elapsed_time`` then.
    :param noise_scale: factor of the exploration noise, a number or a schedule. A falling one brings the last updates
        near the deterministic policy, which is deployed.
    :param task_sampling: ``uniform`` leaves the environments' own weights; ``signal`` samples a task in proportion to
        the variance p (1 - p) of its recent success rate p, see
        :meth:`~sb3_vla.rollouts.episodes.EpisodeStatistics.task_weights`.
    :param overlap: simulate one half of the environments while the policy decides for the other, which pays where the
        policy runs on a GPU. Only a :class:`~sb3_vla.SharedMemoryVecEnv` without wrappers does. The policy then decides
        for two small batches in the place of one, with other exploration noise.
    :param sharding: ``none``: every rank has a replica; ``fsdp``: in an update each has a shard of the trained weights,
        of their gradients and of the optimizer's state, see :mod:`sb3_vla.distributed.fsdp`.
    """

    #: whether the value head is trained
    has_critic: ClassVar[bool] = True

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
        sharding: str = "none",
    ) -> None:
        if env is not None:
            join_for_good()
        self.value_lr = value_lr
        self.clip_range_high: Any = clip_range_high
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
        self.noise_scale: Any = noise_scale
        self.task_sampling = task_sampling
        self.overlap = overlap
        self.sharding = sharding
        self.env_steps = 0
        #: rollouts that have been trained on; ``_n_updates`` counts epochs, which ``target_kl`` may cut short
        self.updates = 0
        if self.ranks.count > 1:  # stock PPO sees one rank's part of a rollout; check_batch_size sees all of it
            warnings.filterwarnings("ignore", "You have specified a mini-batch size of")
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
            verbose=verbose if self.ranks.leads else 0,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _setup_model(self) -> None:
        options.take_schedules(self)
        if not self.trains_vla:
            options.refuse_own_options(self)
            super()._setup_model()
            return
        options.check_before_building(self)
        self.rollout_buffer_class = partial(_chunk_buffer, self.gamma_per)  # type: ignore[assignment]
        super()._setup_model()
        self.rollout_buffer_class = None
        options.check_options(self)
        self.policy.value_head.requires_grad_(self.has_critic)
        if self.sharding == "fsdp" and self.ranks.count > 1:
            policy, methods = self.policy, ("evaluate", "imitation_loss")
            shard(policy, policy.model.sharding_units(), methods, policy.optimizer, self.device, self.ranks.count)
        else:
            fuse_adam(self.policy.optimizer)
        self._idle_updates = 0
        self._reference: VLAPolicy | None = None

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As in Stable-Baselines3.

        :raises ValueError: for environments that cannot draw tasks as ``task_sampling`` says, or draw another hand view
            than the model reads.
        """
        super().set_env(env, force_reset)
        options.check_task_sampling(self)

    def anchor(self) -> None:
        """Make the present policy the reference of ``kl_coef``, as the first update does by itself."""
        # Frozen weights, most of a large model, are shared; the reference needs no optimizer.
        shared = [self.policy.optimizer, *(p for p in self.policy.parameters() if not p.requires_grad)]
        self._reference = copy.deepcopy(self.policy, {id(each): each for each in shared}).requires_grad_(False)

    def learn(
        self: SelfPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPPO:
        """Train for at least ``total_timesteps`` decisions: rollouts and updates in turn, see
        ``stable_baselines3.PPO.learn``.

        :raises ValueError: if ``torchrun`` started other ranks that this one has not joined.
        """
        name = type(self).__name__
        check_membership(name)
        if self.trains_vla:
            options.check_batch_size(self.batch_size, self.n_steps, self.n_envs * self.ranks.count, name)
            options.check_task_sampling(self)
            self.ranks.check_same(dict(self.policy.named_parameters()), "the policy")
            if reset_num_timesteps:
                self.env_steps = 0
            self._take_view()
        shown = progress_bar and self.ranks.leads
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, shown)

    # --- Rollout ------------------------------------------------------------------------------------------------------

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Collect ``n_rollout_steps`` decisions of each environment, see ``OnPolicyAlgorithm.collect_rollouts``."""
        if not self.trains_vla:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        assert self._last_obs is not None, "No previous observation was provided"
        buffer: ChunkRolloutBuffer = rollout_buffer
        self._prepare_rollout(env)
        buffer.reset()
        callback.on_rollout_start()
        env_steps_before, clock, ranks, stopped = self.env_steps, Clock(), self.ranks, False
        earned = 0.0
        steps = step_by_halves if self.overlap and halved(env) else step_together
        for decision, outcome in steps(env, self._decide, self._last_obs, n_rollout_steps, clock):  # type: ignore[arg-type]
            # Callbacks read these from the locals, by Stable-Baselines3's names.
            actions, clipped_actions, values = decision.actions, decision.clipped, decision.values
            new_obs, rewards, dones, infos = outcome.new_obs, outcome.rewards, outcome.dones, outcome.infos
            check_rewards(rewards, infos)
            earned += float(rewards.sum())
            self.num_timesteps += ranks.count * env.num_envs
            executed = np.array([info.get("env_steps", self.policy.action_chunk) for info in infos])
            self.env_steps += int(executed.sum())
            callback.update_locals(locals())
            stopped |= not callback.on_step()
            if stopped and ranks.count == 1:
                return False
            self._record_episodes(infos, dones, self.num_timesteps)
            rewards = self._bootstrap(rewards, dones, infos, executed)
            assert isinstance(self._last_episode_starts, np.ndarray)
            buffer.add(decision.observation, decision.trace, values, rewards, executed, self._last_episode_starts)
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones
        self._share_rollout(env_steps_before)
        if ranks.any(stopped):
            return False
        with torch.no_grad(), self._deciding():
            last_values = self.policy.predict_values(obs_as_tensor(new_obs, self.device))[:, 0]  # type: ignore[arg-type]
        with clock("advantages"):
            buffer.compute_returns_and_advantage(last_values, dones)
        callback.update_locals(locals())
        callback.on_rollout_end()
        decisions = n_rollout_steps * env.num_envs * ranks.count
        self._log_rollout(decisions, self.env_steps - env_steps_before, earned, clock)
        return True

    @torch.no_grad()
    def _bootstrap(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], executed: np.ndarray
    ) -> np.ndarray:
        """Add the discounted value of the last observation to the reward of episodes that were cut.

        Without ``bootstrap_truncated`` a time limit does not cut an episode but ends it; a crash of a worker always
        cuts it.

        :return: rewards, (N,).
        """
        reason = "TimeLimit.truncated" if self.bootstrap_truncated else "worker_restarted"
        cut = [i for i, done in enumerate(dones) if done and infos[i].get(reason, False)]
        if not cut:
            return rewards
        last = [infos[i]["terminal_observation"] for i in cut]
        stacked = {key: np.stack([observation[key] for observation in last]) for key in last[0]}
        with self._deciding():
            values = self.policy.predict_values(obs_as_tensor(stacked, self.device))[:, 0].cpu().numpy()
        rewards = rewards.copy()
        rewards[cut] += self.rollout_buffer.discounts(executed)[cut] * values  # type: ignore[attr-defined]
        return rewards

    # --- Update -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Update the policy on the rollout, for ``n_epochs`` or until ``target_kl`` stops it."""
        if not self.trains_vla:
            super().train()
            return
        started = time.perf_counter()
        policy = self.policy
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        self._take_reference()
        self.ranks.take_generators()
        assert isinstance(self.rollout_buffer, DecisionBuffer)
        rollout = SharedRollout(self.rollout_buffer, self.ranks)
        minibatches = rollout.minibatches(self.batch_size)
        old = self._behavior_policy(rollout.buffer, [each.indices for each in minibatches], known_soon=1)
        spare = rollout.any_decision(self.device) if is_sharded(policy) else None
        metrics: defaultdict[str, list[float]] = defaultdict(list)
        stopped = False
        with in_shards(policy):
            for epoch in range(self.n_epochs):
                divergence: list[float] = []
                if epoch > 0:
                    minibatches = rollout.minibatches(self.batch_size)
                for minibatch in minibatches:
                    loss, kl = self._accumulate_gradient(rollout.buffer, minibatch, old, metrics, spare)
                    if kl is not None and math.isfinite(loss):
                        divergence.append(kl)
                        metrics["approx_kl"].append(kl)
                        if self.target_kl is not None and np.mean(divergence) > 1.5 * self.target_kl:
                            stopped = True
                            break
                    self._optimizer_step(loss, metrics)
                self._n_updates += 1
                if stopped:
                    break
        idle = bool(metrics["skipped_steps"]) and all(metrics["skipped_steps"])
        self._idle_updates = self._idle_updates + 1 if idle else 0
        if self._idle_updates == 2:  # one may be a rare overflow
            raise RuntimeError(
                "Two updates in a row had no step with a finite gradient; the weights are those before them. Look for "
                "observations and rewards of enormous size, lower the learning rates, or train in float32 (bf16=False)"
            )
        self.updates += 1
        self._log_update(rollout, metrics, time.perf_counter() - started)

    def _accumulate_gradient(
        self,
        buffer: DecisionBuffer,
        minibatch: Minibatch,
        old: BehaviorPolicy,
        metrics: defaultdict[str, list[float]],
        spare: DecisionBatch | None = None,
    ) -> tuple[float, float | None]:
        """Gradient of a minibatch's loss, micro-batch by micro-batch, and summed over ranks.

        Every term is a mean over decisions, so a micro-batch is weighted by its share of the minibatch of all ranks.

        :param metrics: gets the terms by name.
        :param spare: with sharded weights, a decision to evaluate while other ranks have more micro-batches.
        :return: the loss, and the mean KL divergence from the behavior policy, None while the critic alone learns.
        """
        self.policy.optimizer.zero_grad(set_to_none=True)
        train_actor = self._actor_learns
        advantages = minibatch.advantages
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        advantages = advantages[minibatch.mine]
        sums: defaultdict[str, float] = defaultdict(float)
        ratio_max: list[float] = []
        start = 0
        for part in self._micro_batches(minibatch.indices):
            batch, share = buffer.batch(part), len(part) / len(minibatch)
            noted: dict[str, float] = {}
            batch.advantages = advantages[start : start + len(part)].to(self.device)
            start += len(part)
            found = self._evaluate(self.policy, batch)
            loss = self.vf_coef * self._value_loss(found.values, batch, noted)
            if train_actor:
                if not old.knows(part):  # the first minibatch, before any optimizer step
                    old.keep(part, found)
                loss = loss + self._actor_loss(found, batch, old, noted)
                with torch.no_grad():
                    noted["divergence"] = self._divergence(found, old, batch).item()
                ratio_max.append(noted.pop("ratio_max"))
            (share * loss).backward()
            noted["total"] = loss.item()
            for name, value in noted.items():
                sums[name] += share * value
        if spare is not None:
            passes = len(self._micro_batches(torch.arange(minibatch.most))) - len(
                self._micro_batches(minibatch.indices)
            )
            keep_in_step(passes, lambda: self._evaluate(self.policy, spare).outputs(train_actor))
        if train_actor and self.rehearsal is not None:
            with autocast(self.bf16, self.device.type):
                loss = shared_imitation_loss(
                    self.policy.model,
                    self.rehearsal,
                    self.rehearsal_batch_size,
                    self.ranks,
                    self.device,
                    loss_of=self.policy.imitation_loss,
                )
            (self.rehearsal_coef * loss).backward()
            sums["rehearsal_loss"] = loss.item()
            sums["total"] += self.rehearsal_coef * sums["rehearsal_loss"]
        whole = self.ranks.sum_gradients(self.policy.parameters(), sums)
        total, divergence = whole.pop("total"), whole.pop("divergence", None)
        if math.isfinite(total):  # a skipped step has no metrics
            metrics["ratio_max"] += ratio_max
            for name, value in whole.items():
                metrics[name].append(value)
        return total, divergence

    def _micro_batches(self, indices: Tensor) -> tuple[Tensor, ...]:
        return indices.split(self.micro_batch_size or len(indices)) if len(indices) else ()

    def _evaluate(self, policy: VLAPolicy, batch: DecisionBatch) -> Evaluation:
        """Evaluate stored decisions with a policy's present weights, in the precision of the update."""
        with autocast(self.bf16, self.device.type):
            return policy.evaluate(batch.observations, batch.trace, batch.executed, self.logprob_type)

    def _actor_loss(
        self, found: Evaluation, batch: DecisionBatch, old: BehaviorPolicy, noted: dict[str, float]
    ) -> Tensor:
        """Clipped surrogate, entropy bonus and divergence from the reference, a scalar.

        :param batch: its advantages are taken as they are.
        :param noted: gets the terms by name.
        """
        below = self._now(self.clip_range)
        above = below if self.clip_range_high is None else self._now(self.clip_range_high)
        old_log_prob = old.log_prob[batch.indices].to(self.device)
        counted = logprob_mask(self.logprob_type, batch.executed, found.log_prob).expand_as(found.log_prob)
        surrogate = losses.clipped_surrogate(
            found.log_prob, old_log_prob, batch.advantages, counted, below, above, self.dual_clip
        )
        loss = surrogate.of_decisions.mean()
        noted["policy_loss"] = loss.item()
        noted["policy_loss_abs"] = surrogate.of_decisions.abs().mean().item()
        noted |= ratio_metrics(surrogate.ratio, surrogate.clipped, surrogate.bounded, counted)
        if found.entropy is not None:
            entropy_loss = -found.entropy.mean()
            noted["entropy_loss"] = entropy_loss.item()
            loss = loss + self.ent_coef * entropy_loss
        if old.reference is not None:
            kl = self._divergence(found, old.reference, batch)
            noted["reference_kl"] = kl.item()
            loss = loss + self.kl_coef * kl
        return loss

    def _divergence(self, found: Evaluation, other: BehaviorPolicy, batch: DecisionBatch) -> Tensor:
        """Mean KL(policy || other)."""
        mean, std = (tensor[batch.indices].to(self.device) for tensor in (other.mean, other.std))
        return self.policy.distribution.kl_divergence(found.mean, found.std, mean, std, batch.executed).mean()

    def _value_loss(self, values: Tensor, batch: DecisionBatch, noted: dict[str, float]) -> Tensor:
        """Error of the critic, a scalar; ``noted`` as in :meth:`_actor_loss`."""
        clip_range = None if self.clip_range_vf is None else self._now(self.clip_range_vf)
        loss, clipped = losses.value_loss(values, batch.values, batch.returns, clip_range, self.huber_delta)
        if clipped is not None:
            noted["value_clip_ratio"] = clipped
        noted["value_loss"] = loss.item()
        return loss

    def _optimizer_step(self, loss: float, metrics: defaultdict[str, list[float]]) -> None:
        norm = whole_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm))
        # A clamp passes NaN on with a gradient of zero, so the gradient alone is not enough.
        finite = math.isfinite(loss) and bool(torch.isfinite(norm))
        metrics["skipped_steps"].append(float(not finite))
        if finite:
            metrics["grad_norm"].append(norm.item())
            metrics["loss"].append(loss)
            self.policy.optimizer.step()

    @property
    def _actor_learns(self) -> bool:
        return self.updates >= self.critic_warmup

    def _update_learning_rate(self, optimizers: Any) -> None:
        """Set the scheduled rates: the actor's times its warm-up, the critic's in its initial proportion to it."""
        super()._update_learning_rate(optimizers)
        if not self.trains_vla:
            return
        actor, critic = self.policy.optimizer.param_groups
        if self.value_lr is not None:
            critic["lr"] *= self.value_lr / self.lr_schedule(1.0)
        risen = (self.updates - self.critic_warmup + 1) / (self.actor_warmup + 1)
        actor["lr"] *= min(max(risen, 0.0), 1.0)

    def _take_reference(self) -> None:
        if self.kl_coef > 0 and self._reference is None:
            if self.updates > 0:
                warnings.warn(
                    "kl_coef keeps this policy near what it was when it was loaded; load an earlier one, call anchor() "
                    "and set_parameters() to take that as the reference",
                    stacklevel=3,
                )
            self.anchor()
        if self._reference is not None:
            self._reference.distribution.noise_scale = self.policy.distribution.noise_scale

    @torch.no_grad()
    def _behavior_policy(
        self, buffer: DecisionBuffer, minibatches: list[Tensor], known_soon: int = 0
    ) -> BehaviorPolicy:
        """Evaluate the rollout with the weights that took it, and with those of the reference.

        This is done in the precision of the update and in the micro-batches of its first epoch, so that ratios start
        at exactly one: rounding of a matrix product depends on the rows that are computed together.

        :param minibatches: indices of the first epoch.
        :param known_soon: number of first minibatches that are left to the update, which evaluates them itself before
            its first step.
        """
        count = buffer.advantages.numel()
        old = BehaviorPolicy(count)
        old.reference = None if self._reference is None else BehaviorPolicy(count)
        for number, indices in enumerate(minibatches if self._actor_learns else ()):
            asked = [] if number < known_soon else [(self.policy, old)]
            if self._reference is not None and old.reference is not None:
                asked.append((self._reference, old.reference))
            for batch in map(buffer.batch, self._micro_batches(indices) if asked else ()):
                for policy, kept in asked:
                    kept.keep(batch.indices, self._evaluate(policy, batch))
        return old

    def _log_update(self, rollout: SharedRollout, metrics: Mapping[str, list[float]], seconds: float) -> None:
        rates = tuple(group["lr"] for group in self.policy.optimizer.param_groups)
        values = {
            **update_metrics(metrics, rollout, rates),
            **episode_metrics(self.episodes.by_task, self.episodes.ended),
            "train/ratio_max": max(self.ranks.gather(max(metrics.get("ratio_max") or [1.0]))),
            "train/n_updates": self._n_updates,
            "train/clip_range": self._now(self.clip_range),
            "time/update_seconds": seconds,
            "time/actor_training": seconds,
            "time/step": self._rollout_seconds + seconds,
            "time/sync_weights": 0.0,  # the weights that act are those that learn
        }
        if self.clip_range_vf is not None:
            values["train/clip_range_vf"] = self._now(self.clip_range_vf)
        self._record(values)


def _chunk_buffer(gamma_per: str, n_steps: int, _: Any, __: Any, **options: Any) -> ChunkRolloutBuffer:
    """The rollout buffer, from the arguments of Stable-Baselines3's; two are the spaces."""
    return ChunkRolloutBuffer(n_steps, gamma_per=gamma_per, **options)
