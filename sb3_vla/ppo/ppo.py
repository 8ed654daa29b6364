"""Proximal Policy Optimization (Schulman et al. 2017) of vision-language-action policies, in chunks.

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
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from mw_envs.tasks import did_you_mean
from sb3_vla.checkpoints.loading import check_archive
from sb3_vla.common.batch_noise import part_of_batch
from sb3_vla.common.errors import InputError
from sb3_vla.common.precision import acting_precision, autocast
from sb3_vla.data.batches import DemonstrationBatches, shared_imitation_loss
from sb3_vla.distributed.fsdp import (
    in_shards,
    is_sharded,
    load_optimizer_state,
    shard,
    whole_optimizer_state,
    whole_tensor,
    whole_weights,
)
from sb3_vla.distributed.ranks import Ranks, check_membership, current_ranks, join_for_good
from sb3_vla.distributions.base import logprob_mask
from sb3_vla.policies.observations import HAND_KEY
from sb3_vla.policies.views import hand_views_of_envs, other_hand_view, view_of_envs, warn_of_another_view
from sb3_vla.policies.vla_policy import COMPILING, Evaluation, VLAPolicy
from sb3_vla.ppo import losses, options
from sb3_vla.ppo.behavior_policy import BehaviorPolicy
from sb3_vla.rollouts.buffers import ChunkRolloutBuffer, DecisionBatch, DecisionBuffer, Minibatch, SharedRollout
from sb3_vla.rollouts.metrics import (
    EpisodeRecord,
    episode_metrics,
    in_terminal,
    ratio_metrics,
    success_rates,
    update_metrics,
)
from sb3_vla.rollouts.progress import SuccessBar
from sb3_vla.rollouts.stepping import (
    Clock,
    Decision,
    Replicas,
    check_decision,
    check_rewards,
    halved,
    step_by_halves,
    step_together,
)

# Parameters of the constructor that do not come from an archive.
_NOT_LOADED = ("env", "device", "_init_setup_model")
# Least weight of a task that is always or never solved, where 1 is that of a task solved every other time.
_LEAST_TASK_WEIGHT = 0.1
# What a training remembers of an episode that ended.
_EPISODE_KEYS = ("task", "is_success", "elapsed_steps", "episode_return", "episode", "worker_restarted")
# Episodes of a task that tell how often it is solved now; more would lag behind the policy.
_RECENT_EPISODES = 30


class PPO(stable_baselines3.PPO):
    """PPO for chunks; the arguments of ``stable_baselines3.PPO``, then those below.

    ``n_steps``, ``batch_size`` and ``total_timesteps`` count decisions; environment steps are logged beside them.
    ``gae_lambda`` is per decision, and so is ``gamma`` unless ``gamma_per`` says otherwise. ``target_kl`` stops an
    update at the exact divergence of the action distributions, averaged over the epoch so far; what was drawn, and so
    an outlier among the ratios, has no part in it. ``normalize_advantage`` is over a minibatch. A step whose loss or
    gradient is not finite is left out and counted in ``train/skipped_steps``.
    Schedules are functions of the share of a ``learn`` that is left, which is never outside of 0 to 1.

    Under ``torchrun`` (:mod:`sb3_vla.distributed.ranks`), which it joins where it is given an environment, each rank
    gives its share of the environments, ``batch_size`` and ``total_timesteps`` count what all ranks have, and what is
    learned is what one process with all the environments would learn, up to rounding. A callback that stops training
    stops all ranks, at the end of the rollout. The first rank prints and logs.

    :param value_lr: the critic's learning rate at the start; it follows the schedule of ``learning_rate``. None: that
        of the actor.
    :param clip_range_high: how far above one the ratio may go before it is clipped, ``clip_range`` being how far below
        (DAPO, Yu et al. 2025, eq. 10); a number or a schedule. None: as far.
    :param gamma_per: ``decision``, or ``env_step``: a decision of n environment steps is discounted by gamma^n.
    :param dual_clip: where the advantage A is negative, the surrogate is not below this times A, so that a ratio far
        above one does not dominate an update (Ye et al. 2020, eq. 5). More than 1; None for no such bound.
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
    :param rehearsal: demonstrations whose imitation loss is added to each minibatch, so that what is not practiced now
        is not forgotten. They are not saved with the algorithm: set them again after ``load``.
    :param rehearsal_coef: weight of that loss.
    :param rehearsal_batch_size: demonstration frames per minibatch.
    :param bf16: bfloat16 autocast of the update, and on a GPU of the rollout; None where the machine computes it
        faster. Log-probabilities and weights stay float32.
    :param bootstrap_truncated: add the value of the last observation where a time limit cut an episode, as
        Stable-Baselines3 does. False takes the limit as a part of the task; let the critic see ``elapsed_time`` then.
    :param noise_scale: factor of the exploration noise, a number or a schedule. What acts in the end is the policy
        without noise; where that falls towards the end, the last updates fit it.
    :param task_sampling: ``uniform`` leaves the environments' own weights; ``signal`` draws a task in proportion to the
        variance p (1 - p) of its recent success, which is what a success can teach, and not below a tenth of the most.
    :param overlap: in a rollout, simulate one half of the environments while the policy decides for the other; pays
        where the policy runs on another device than the simulators. It needs a
        :class:`~sb3_vla.SharedMemoryVecEnv` without wrappers, and acts on no other environment. The policy then
        decides for two small batches instead of one: an environment meets other exploration noise than without.
    :param sharding: ``none``, every rank has a replica; or ``fsdp``, in an update each has a part of the weights that
        are trained, of their gradients and of the optimizer, see :mod:`sb3_vla.distributed.fsdp`. One rank has all of
        them.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {  # type: ignore[assignment]
        **stable_baselines3.PPO.policy_aliases,
        "VLAPolicy": VLAPolicy,
    }
    policy: Any
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
        if self.ranks.count > 1:  # it looks at this rank's part of a rollout, check_batch_size at all of it
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

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # A saved algorithm is given its environment before it is made.
        return stable_baselines3.PPO._wrap_env(env, verbose if join_for_good().leads else 0, monitor_wrapper)

    @property
    def ranks(self) -> Ranks:
        """Those that train together, see :mod:`sb3_vla.distributed.ranks`."""
        return current_ranks()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "policy" and issubclass(self.policy_class, VLAPolicy) and not isinstance(value, VLAPolicy):
            raise InputError(
                f"policy is now of class {type(value).__name__}; expected the VLAPolicy itself, of which an update "
                f"calls more than forward(). Where torch.compile(policy) is meant, {COMPILING}; several GPUs train "
                "under torchrun, adapters by policy_kwargs=dict(lora={})"
            )
        super().__setattr__(name, value)

    def _setup_model(self) -> None:
        options.take_schedules(self)
        # By load: options that take the place of the archive's, or all of them.
        changed, replaced = (vars(self).pop(f"_{how}_policy_kwargs", None) for how in ("changed", "replaced"))
        if not self.ranks.leads:  # the first prints and logs; a saved algorithm may say so of each
            self.verbose, self.tensorboard_log = 0, None
        if not issubclass(self.policy_class, VLAPolicy):
            self.policy_kwargs = self.policy_kwargs if replaced is None else replaced
            if changed not in (None, self.policy_kwargs):  # Stable-Baselines3's rule
                raise InputError(f"policy_kwargs={changed}, but those of the archive are {self.policy_kwargs}")
            options.refuse_own_options(self)
            if self.ranks.count > 1:
                raise InputError(f"Several ranks train VLAPolicy alone; got {self.policy_class.__name__}")
            super()._setup_model()
            return
        given = {**(replaced or {}), **(changed or {})}
        other = {name for name, value in given.items() if value != self.policy_kwargs.get(name)}
        #: parts of the policy for which a saved state is not taken, because load was given other options of them
        self._new_parts = {name.partition("_")[0] for name in other} & {"distribution", "optimizer"}
        self.policy_kwargs = {**(self.policy_kwargs if replaced is None else {}), **given}
        options.check_flags(self)
        options.check_numbers(self)  # before a model of billions of weights is read
        options.check_task_sampling(self)
        # The stock set-up would allocate its own buffer at the size of the raw images.
        stock = (None, DictRolloutBuffer)  # an algorithm that stable_baselines3.PPO saved names its own
        if self.rollout_buffer_class not in stock or self.rollout_buffer_kwargs:
            raise InputError(
                f"rollout_buffer_class={self.rollout_buffer_class!r}, rollout_buffer_kwargs="
                f"{self.rollout_buffer_kwargs!r}: VLAPolicy has its own rollout buffer"
            )
        self.rollout_buffer_class = _NoBuffer  # type: ignore[assignment]
        self._give_hand_view()
        self.ranks.take_generators()  # without a seed, too, all ranks begin with the same weights
        super()._setup_model()
        self.rollout_buffer_class = None
        options.check_options(self)
        self._check_hand_view()
        if self.policy.view is None:
            self._take_view()
        self.policy.value_head.requires_grad_(self.has_critic)
        if self.sharding == "fsdp" and self.ranks.count > 1:
            policy, methods = self.policy, ("evaluate", "imitation_loss")
            shard(policy, policy.model.sharding_units(), methods, policy.optimizer, self.device, self.ranks.count)
        else:
            _fuse(self.policy.optimizer)
        self.rollout_buffer = ChunkRolloutBuffer(  # type: ignore[assignment]
            self.n_steps, self.n_envs, self.device, self.gamma, self.gae_lambda, self.gamma_per
        )
        self.policy_kwargs = self.policy.portable_kwargs
        self._episodes: defaultdict[str, deque[EpisodeRecord]] = defaultdict(
            lambda: deque(maxlen=self._stats_window_size)
        )
        self._ended: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self._ended_episodes, self._rollout_seconds = 0, 0.0  # of the last rollout
        self._silent_episodes = 0  # before the first that told of success
        self._reference: VLAPolicy | None = None
        self._idle_batch: DecisionBatch | None = None
        self._idle_updates = 0
        #: copies of the policy that decide in its place, on other accelerators
        self.replicas: Replicas | None = None

    def set_random_seed(self, seed: int | None = None) -> None:
        """As in Stable-Baselines3; of the environments of all ranks in their order each has the next seed."""
        super().set_random_seed(seed)
        if seed is not None and self.env is not None and self.ranks.count > 1:
            self.env.seed(seed + self.ranks.rank * self.n_envs)

    def _give_hand_view(self) -> None:
        """A new model reads the window that the environment draws; its space tells the size of the picture alone."""
        options = self.policy_kwargs
        new = options.get("checkpoint") is None and options.get("model") in (None, "compact")
        drawn = hand_views_of_envs(self.env) if new and self.env is not None else ()
        space = getattr(self.observation_space, "spaces", {}).get(HAND_KEY)
        for hand in drawn:
            if space is not None and hand.size in space.shape:  # else a wrapper has changed it
                model_kwargs = {"hand_view": asdict(hand), **(options.get("model_kwargs") or {})}
                self.policy_kwargs = {**options, "model_kwargs": model_kwargs}

    def _check_hand_view(self) -> None:
        if self.env is None or not isinstance(getattr(self, "policy", None), VLAPolicy):
            return
        read = self.policy.model.hand_view
        shown = other_hand_view(read, hand_views_of_envs(self.env))
        if shown is not None:
            raise InputError(
                f"The model reads the hand view that {read} draws, but the environment was made with {shown}; make "
                "it with the former"
            )

    def _take_view(self) -> None:
        """From now on the policy is trained on what the environment shows."""
        shown = None if self.env is None else view_of_envs(self.env)
        if shown is not None:
            if self.policy.view is not None:
                warn_of_another_view(self.policy.view, shown)
            self.policy.view = shown

    def anchor(self) -> None:
        """Take the present policy as the reference of ``kl_coef``; the first update does so if nobody did."""
        # What is frozen is shared: it is most of a large model. The reference needs no optimizer, nor its state.
        shared = [self.policy.optimizer, *(p for p in self.policy.parameters() if not p.requires_grad)]
        self._reference = copy.deepcopy(self.policy, {id(each): each for each in shared}).requires_grad_(False)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Collect ``n_rollout_steps`` decisions of each environment; see the stock method."""
        if not isinstance(self.policy, VLAPolicy):
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

    def _prepare_rollout(self, env: VecEnv) -> None:
        """Which tasks are drawn, and how strongly the policy explores."""
        self.ranks.take_generators()
        if self.task_sampling == "signal" and self.task_success():
            env.env_method("set_task_weights", self._task_weights())
        elif self.task_sampling == "signal" and self._ended_episodes:
            warnings.warn(
                'task_sampling="signal" is without effect: no episode has ended with both info["task"] and '
                'info["is_success"]; let the environments give them, or use task_sampling="uniform"',
                stacklevel=2,
            )
        self._ended_episodes = 0
        self.policy.set_training_mode(False)
        noise_scale = self.noise_scale(self._current_progress_remaining)
        if not 0 < noise_scale < math.inf:
            left = self._current_progress_remaining
            raise InputError(f"noise_scale is {noise_scale} where {left:.0%} of the training is left; expected above 0")
        self.policy.distribution.noise_scale = noise_scale
        if self.replicas is not None:
            self.replicas.take_weights()

    def _share_rollout(self, env_steps_before: int) -> None:
        """Let every rank know of the environment steps and of the episodes of all, in the order of one process."""
        if self.ranks.count == 1:
            return
        self.env_steps = env_steps_before + self.ranks.total(self.env_steps - env_steps_before)
        ended = sorted((one for part in self.ranks.gather(self._ended) for one in part), key=lambda one: one[0])
        self._ended = []
        for _, info in ended:
            self._remember_episode(info)

    def _log_rollout(self, decisions: int, env_steps: int, earned: float, clock: Clock) -> None:
        """
        :param decisions: of all ranks, as ``env_steps``.
        :param earned: sum of this rank's rewards.
        """
        self._rollout_seconds = seconds = clock.elapsed()
        self.logger.record("rollout/rewards", sum(self.ranks.gather(earned)) / decisions)
        self.logger.record("time/generate_rollouts", seconds - clock.seconds["advantages"], exclude="stdout")
        self.logger.record("time/cal_adv_and_returns", clock.seconds["advantages"], exclude="stdout")
        self.logger.record("time/rollout_seconds", seconds)
        self.logger.record("time/env_steps", self.env_steps, exclude="tensorboard")
        self.logger.record("perf/env_steps_per_second", env_steps / seconds)
        self.logger.record("perf/decisions_per_second", decisions / seconds)
        self.logger.record("perf/simulation_share", clock.seconds["simulation"] / seconds)
        self.logger.record("perf/inference_share", clock.seconds["inference"] / seconds)

    def _deciding(self) -> AbstractContextManager[None]:
        """The precision of a rollout."""
        return acting_precision(self.bf16, self.device.type)

    @torch.no_grad()
    def _decide(
        self, observations: Mapping[str, np.ndarray], rows: np.ndarray | None = None, among: int | None = None
    ) -> Decision:
        """Decide for some environments.

        :param rows: their places among those of this rank for which noise is drawn; None for all of them.
        :param among: how many these are.
        """
        among = len(observations["instruction"]) if among is None else among
        rows = np.arange(among) if rows is None else rows
        places, total = self.ranks.rank * among + rows, self.ranks.count * among
        if self.replicas is None:
            with self._deciding(), part_of_batch(places, total):
                prepared = self.policy.prepare(obs_as_tensor(dict(observations), self.device))
                chunk, values, trace = self.policy.decide(prepared)
        else:
            prepared, chunk, values, trace = self.replicas.decide(observations, places, total)
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
        self.ranks.take_generators()
        rollout = SharedRollout(buffer, self.ranks)
        minibatches = rollout.minibatches(self.batch_size)
        compared = [minibatch.indices for minibatch in minibatches] if self._actor_learns else []
        old = self._behavior_policy(buffer, compared, known_soon=1)
        metrics: defaultdict[str, list[float]] = defaultdict(list)
        self._idle_batch = self._some_batch(buffer) if is_sharded(policy) else None
        with in_shards(policy):
            self._run_epochs(rollout, minibatches, old, clip_range, clip_range_vf, metrics)
        self.updates += 1
        self._log_update(rollout, metrics, clip_range, clip_range_vf, time.perf_counter() - started)

    def _run_epochs(
        self,
        rollout: SharedRollout,
        minibatches: list[Minibatch],
        old: BehaviorPolicy,
        clip_range: float,
        clip_range_vf: float | None,
        metrics: defaultdict[str, list[float]],
    ) -> None:
        """The steps of an update, until the policy is as far from the rollout's as it may be.

        :param minibatches: of the first epoch.
        """
        stopped = False
        for epoch in range(self.n_epochs):
            divergence: list[float] = []
            if epoch > 0:
                minibatches = rollout.minibatches(self.batch_size)
            for minibatch in minibatches:
                loss, kl = self._accumulate_gradient(rollout.buffer, minibatch, old, clip_range, clip_range_vf, metrics)
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

    def _accumulate_gradient(
        self,
        buffer: DecisionBuffer,
        minibatch: Minibatch,
        old: BehaviorPolicy,
        clip_range: float,
        clip_range_vf: float | None,
        metrics: defaultdict[str, list[float]],
    ) -> tuple[float, float | None]:
        """Gradient of a minibatch's loss, micro-batch by micro-batch, and summed over ranks.

        Every term is a mean over decisions, so a micro-batch counts by its share of those of all ranks.

        :return: the loss, and the divergence from the rollout's policy, None while the critic alone learns.
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
            noted: defaultdict[str, list[float]] = defaultdict(list)
            batch.advantages = advantages[start : start + len(part)].to(self.device)
            start += len(part)
            with autocast(self.bf16, self.device.type):
                found = self.policy.evaluate(batch.observations, batch.trace, batch.executed, self.logprob_type)
            loss = self.vf_coef * self._value_loss(found.values, batch, clip_range_vf, noted)
            if train_actor:
                if not old.knows(part):  # of the first minibatch, before any step
                    old.keep(part, found)
                loss = loss + self._actor_loss(found, batch, old, clip_range, noted)
                with torch.no_grad():
                    sums["divergence"] += share * self._divergence(found, old, batch).item()
            (share * loss).backward()
            sums["total"] += share * loss.item()
            ratio_max += noted.pop("ratio_max", [])
            for name, (value,) in noted.items():
                sums[name] += share * value
        if self._idle_batch is not None:
            others = self._micro_batches(torch.arange(minibatch.most))
            for _ in others[len(self._micro_batches(minibatch.indices)) :]:
                self._idle(self._idle_batch, train_actor)
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
        if math.isfinite(total):  # what is not is of a step that is left out
            metrics["ratio_max"] += ratio_max
            for name, value in whole.items():
                metrics[name].append(value)
        return total, divergence

    def _some_batch(self, buffer: DecisionBuffer) -> DecisionBatch:
        """A decision, of another rank where this one has none."""
        own = buffer.batch(torch.zeros(1, dtype=torch.int64)) if len(buffer) else None
        if not self.ranks.any(own is None):
            assert own is not None
            return own
        told = next(batch for batch in self.ranks.gather(own and own.to(torch.device("cpu"))) if batch is not None)
        return told.to(self.device)

    def _idle(self, batch: DecisionBatch, train_actor: bool) -> None:
        """Keep step with ranks that have more micro-batches, without a gradient: shards are gathered together."""
        found = self.policy.evaluate(batch.observations, batch.trace, batch.executed, self.logprob_type)
        loss = found.values.sum()
        if train_actor:
            loss = loss + found.log_prob.sum()
        (0.0 * loss).backward()

    def _micro_batches(self, indices: Tensor) -> tuple[Tensor, ...]:
        return indices.split(self.micro_batch_size or len(indices)) if len(indices) else ()

    def _actor_loss(
        self,
        found: Evaluation,
        batch: DecisionBatch,
        old: BehaviorPolicy,
        clip_range: float,
        metrics: defaultdict[str, list[float]],
    ) -> Tensor:
        """Clipped surrogate, entropy bonus, divergence from the reference; ``batch.advantages`` are taken as given."""
        above = clip_range
        if self.clip_range_high is not None:
            above = self.clip_range_high(self._current_progress_remaining)
        old_log_prob = old.log_prob[batch.indices].to(self.device)
        counted = logprob_mask(self.logprob_type, batch.executed, found.log_prob).expand_as(found.log_prob)
        surrogate = losses.clipped_surrogate(
            found.log_prob, old_log_prob, batch.advantages, counted, clip_range, above, self.dual_clip
        )
        policy_loss = surrogate.of_decisions.mean()
        metrics["policy_loss"].append(policy_loss.item())
        metrics["policy_loss_abs"].append(surrogate.of_decisions.abs().mean().item())
        for name, value in ratio_metrics(surrogate.ratio, surrogate.clipped, surrogate.bounded, counted).items():
            metrics[name].append(value)
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

    def _divergence(self, found: Evaluation, other: BehaviorPolicy, batch: DecisionBatch) -> Tensor:
        """Mean KL(policy || other)."""
        mean, std = (tensor[batch.indices].to(self.device) for tensor in (other.mean, other.std))
        return self.policy.distribution.kl_divergence(found.mean, found.std, mean, std, batch.executed).mean()

    def _value_loss(
        self,
        values: Tensor,
        batch: DecisionBatch,
        clip_range_vf: float | None,
        metrics: defaultdict[str, list[float]],
    ) -> Tensor:
        value_loss, changed = losses.value_loss(values, batch.values, batch.returns, clip_range_vf, self.huber_delta)
        if changed is not None:
            metrics["value_clip_ratio"].append(changed)
        metrics["value_loss"].append(value_loss.item())
        return value_loss

    def _optimizer_step(self, loss: float, metrics: defaultdict[str, list[float]]) -> None:
        norm = whole_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm))
        # A clamp gives what is not a number a gradient of zero, so the gradient alone does not tell.
        finite = math.isfinite(loss) and bool(torch.isfinite(norm))
        metrics["skipped_steps"].append(float(not finite))
        if finite:
            metrics["grad_norm"].append(norm.item())
            metrics["loss"].append(loss)
            self.policy.optimizer.step()

    @property
    def _actor_learns(self) -> bool:
        return self.updates >= self.critic_warmup

    @torch.no_grad()
    def _behavior_policy(
        self, buffer: DecisionBuffer, minibatches: list[Tensor], known_soon: int = 0
    ) -> BehaviorPolicy:
        """The rollout under the weights that took it, and under those of the reference.

        It is evaluated in the update's precision and in the micro-batches of its first epoch, so that ratios start at
        exactly one: a row of a matrix product may be rounded otherwise beside other rows.

        :param minibatches: indices, of the first epoch.
        :param known_soon: minibatches at the start that are left to the update, because it evaluates them itself before
            it makes a step.
        """
        count = buffer.advantages.numel()
        old = BehaviorPolicy(count)
        old.reference = None if self._reference is None else BehaviorPolicy(count)
        for number, indices in enumerate(minibatches):
            asked = [] if number < known_soon else [(self.policy, old)]
            if old.reference is not None:
                asked.append((self._reference, old.reference))
            for batch in map(buffer.batch, self._micro_batches(indices) if asked else ()):
                with autocast(self.bf16, self.device.type):
                    for policy, kept in asked:
                        found = policy.evaluate(batch.observations, batch.trace, batch.executed, self.logprob_type)
                        kept.keep(batch.indices, found)
        return old

    @torch.no_grad()
    def _bootstrap(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], executed: np.ndarray
    ) -> np.ndarray:
        """Add the discounted value of the last observation to rewards of episodes that a time limit cut.

        Where the limit is a part of the task it is not added, but a crash of a worker is never a part of the task.
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

    def _record_episodes(self, infos: list[dict[str, Any]], dones: np.ndarray, *when: int) -> None:
        """Remember the episodes that ended; where there are several ranks, at the end of the rollout.

        :param when: what orders the steps of a rollout.
        """
        first = self.ranks.rank * len(infos)
        for i in np.flatnonzero(dones):
            info = {key: infos[i][key] for key in _EPISODE_KEYS if key in infos[i]}
            if self.ranks.count == 1:
                self._remember_episode(info)
            else:
                self._ended.append(((*when, first + int(i)), info))

    def _remember_episode(self, info: dict[str, Any]) -> None:
        self._ended_episodes += 1
        if info.get("worker_restarted"):  # which says nothing about the policy's success
            info = {"episode": info.get("episode")}
        elif "is_success" in info:
            assert self.ep_success_buffer is not None
            self.ep_success_buffer.extend([False] * self._silent_episodes)
            self._silent_episodes = 0
        elif self.ep_success_buffer:  # others have told of success, so this one was cut before it could
            info = {"is_success": False, **info}
        else:
            self._silent_episodes += 1
        self._update_info_buffer([info], np.ones(1, dtype=bool))
        if "task" in info:
            success = info.get("is_success")
            monitored = info.get("episode", {})  # by Monitor, for environments that do not tell it themselves
            length = info.get("elapsed_steps", monitored.get("l"))
            reward = info.get("episode_return", monitored.get("r"))
            record = EpisodeRecord(None if success is None else float(success), length, reward)
            self._episodes[info["task"]].append(record)

    def task_success(self) -> dict[str, float]:
        """Share of successes among each task's last ``stats_window_size`` training episodes."""
        return success_rates(self._episodes)

    def _task_weights(self) -> dict[str, float]:
        weights = {}
        for task, episodes in self._episodes.items():
            # Laplace's rule: a task without a success among a few episodes is not yet hopeless.
            recent = list(episodes)[-_RECENT_EPISODES:]
            rate = (sum(each.success or 0.0 for each in recent) + 1) / (len(recent) + 2)
            weights[task] = max(_LEAST_TASK_WEIGHT, 4 * rate * (1 - rate))
        return weights

    def _log_update(
        self,
        rollout: SharedRollout,
        metrics: Mapping[str, list[float]],
        clip_range: float,
        clip_range_vf: float | None,
        seconds: float,
    ) -> None:
        rates = tuple(group["lr"] for group in self.policy.optimizer.param_groups)
        values = {
            **update_metrics(metrics, rollout, rates),
            **episode_metrics(self._episodes, self._ended_episodes),
            "train/ratio_max": max(self.ranks.gather(max(metrics.get("ratio_max") or [1.0]))),
            "train/n_updates": self._n_updates,
            "train/clip_range": clip_range,
            "time/update_seconds": seconds,
            "time/actor_training": seconds,
            "time/step": self._rollout_seconds + seconds,
            "time/sync_weights": 0.0,  # what acts is what learns
        }
        if clip_range_vf is not None:
            values["train/clip_range_vf"] = clip_range_vf
        for name, value in values.items():
            self.logger.record(name, value, exclude=None if in_terminal(name) else "stdout")

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
            "_ended",
            "_idle_batch",
            "_new_parts",
        ]

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """As in Stable-Baselines3; of shards the whole, for which all ranks must call it. The optimizer's state, which
        is twice as large, the first rank gets alone."""
        if not is_sharded(self.policy):
            return super().get_parameters()
        with whole_weights(self.policy, everywhere=True):
            weights = {name: tensor.clone() for name, tensor in self.policy.state_dict().items()}
        optimizer = {
            **self.policy.optimizer.state_dict(),
            "state": whole_optimizer_state(self.policy.optimizer, self.policy),
        }
        return {"policy": weights, "policy.optimizer": optimizer}

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto"
    ) -> None:
        """As in Stable-Baselines3; where there are shards all ranks must call it."""
        check_archive(load_path_or_dict, type(self).__name__)
        if isinstance(load_path_or_dict, dict) and isinstance(self.policy, VLAPolicy):
            load_path_or_dict = self._with_new_parts(load_path_or_dict)
        super().set_parameters(load_path_or_dict, exact_match, device)
        if not isinstance(self.policy, VLAPolicy):
            return
        if not is_sharded(self.policy):
            _fuse(self.policy.optimizer)
        else:
            for group in self.policy.optimizer.param_groups:
                group["fused"] = None  # that of an archive of one process
            load_optimizer_state(self.policy.optimizer, self.policy, self.policy.optimizer.state_dict()["state"])

    def _with_new_parts(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Parameters with what the present policy has, where they are of other options or of other weights."""
        new, self._new_parts = self._new_parts, set()
        if "distribution" in new and "policy" in parameters:
            parameters = {**parameters, "policy": self._with_new_distribution(parameters["policy"])}
        state, saved = self.policy.optimizer.state_dict(), parameters.get("policy.optimizer")
        if saved is None or ("optimizer" not in new and _group_sizes(saved) == _group_sizes(state)):
            return parameters
        warnings.warn(
            "The saved state of the optimizer is of other options, or of other weights than are trained now, such as "
            "by another trainable= in policy_kwargs; the optimizer begins anew",
            stacklevel=4,
        )
        return {**parameters, "policy.optimizer": state}

    def _with_new_distribution(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A policy's weights with the present distribution's own; what it has copied of the model is of those weights.

        See :attr:`sb3_vla.distributions.diffusion.DDIM.pretrained`, which was made before they were there.
        """
        copied = "distribution.pretrained."
        weights = {name: value for name, value in saved.items() if not name.startswith("distribution.")}
        for name, value in self.policy.state_dict().items():
            if name.startswith(copied):
                weights[name] = saved[name] if name in saved else saved[f"model.{name.removeprefix(copied)}"]
            elif name.startswith("distribution."):
                weights[name] = value
        return weights

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """As in Stable-Baselines3; of several ranks, all of which must call it, the first writes."""
        if self.ranks.leads:
            super().save(path, exclude, include)
        else:
            self.get_parameters()
        self.ranks.wait()

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> PPO:
        """Train for at least ``total_timesteps`` decisions; see ``stable_baselines3.PPO.learn``.

        :raises ValueError: if ``torchrun`` started other ranks that this one has not joined.
        """
        check_membership(type(self).__name__)
        if isinstance(self.policy, VLAPolicy):
            options.check_batch_size(self.batch_size, self.n_steps, self.n_envs * self.ranks.count, type(self).__name__)
            options.check_task_sampling(self)
            self.ranks.check_same(dict(self.policy.named_parameters()), "the policy")
            if reset_num_timesteps:
                self.env_steps = 0
            self._take_view()
        shown = progress_bar and self.ranks.leads
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, shown)
        return self

    @classmethod
    def load(
        cls,
        path: Any,
        env: GymEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As in Stable-Baselines3; each of the constructor's keywords, here or in ``custom_objects``, takes the place
        of what was saved and is checked as there. Of ``policy_kwargs`` here those that are given do; with other options
        of the distribution or the optimizer, what these had learned is left, and they begin anew.

        :raises TypeError: for a keyword that the constructor does not have, or a name in ``custom_objects`` that
            neither it nor an archive has.
        :raises ValueError: for a value that the constructor refuses, or the ``policy`` of another archive.
        :raises IsADirectoryError: for a folder; the message says how a checkpoint is used.
        """
        check_archive(path, cls.__name__)
        keywords = [name for name in inspect.signature(cls).parameters if name not in _NOT_LOADED]
        custom = dict(custom_objects or {})
        replaced = custom.pop("policy_kwargs", None)  # compared with the archive's, which it would hide
        given = {name: value for name, value in custom.items() if name in keywords} | kwargs
        for name in kwargs:
            if name not in keywords:
                raise TypeError(f"{cls.__name__} has no option {name!r}; {did_you_mean(name, keywords)}")
        policy = given.pop("policy", None)
        attributes = cls._as_attributes(given) | {"_replaced_policy_kwargs": replaced}
        model = super().load(path, env, device, custom, print_system_info, force_reset, **attributes)
        for name in custom:  # they may also take the place of other things that an archive holds
            if name not in keywords and not hasattr(model, name):
                raise TypeError(
                    f"custom_objects names {name!r}, which no archive holds; {did_you_mean(name, keywords)}"
                )
        if policy not in (None, model.policy_class) and cls.policy_aliases.get(policy) is not model.policy_class:
            raise InputError(f"policy={policy!r}, but {path} is of {model.policy_class.__name__}; leave it out")
        for name in ("ep_info_buffer", "ep_success_buffer"):
            known = getattr(model, name)
            if known is not None:  # what was saved has the window that it had
                setattr(model, name, deque(known, maxlen=model._stats_window_size))
        return model

    @classmethod
    def _as_attributes(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What the constructor makes of keywords whose attributes have other names."""
        names = {"stats_window_size": "_stats_window_size", "policy_kwargs": "_changed_policy_kwargs"}
        attributes = {names.get(name, name): value for name, value in given.items()}
        if attributes.get("rollout_buffer_kwargs", {}) is None:
            attributes["rollout_buffer_kwargs"] = {}
        return attributes

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        """As in Stable-Baselines3, but progress is known from the first rollout on, which explores by it."""
        total_timesteps, callback = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        if isinstance(self.policy, VLAPolicy):
            if self.num_timesteps == 0:  # its windows are new
                self._silent_episodes = 0
            if total_timesteps > self.num_timesteps:
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
        return total_timesteps, callback

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        if isinstance(self.policy, VLAPolicy):  # the last rollout goes beyond the end where it does not fit
            self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As in Stable-Baselines3.

        :raises ValueError: for environments that cannot draw tasks as ``task_sampling`` says, or draw another hand view
            than the model reads.
        """
        super().set_env(env, force_reset)
        options.check_task_sampling(self)
        self._check_hand_view()

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """As in Stable-Baselines3, but the bar also shows the success rate."""
        if progress_bar:
            if not isinstance(callback, (list, BaseCallback)):
                callback = ConvertCallback(callback)
            callback = [*(callback if isinstance(callback, list) else [callback]), SuccessBar()]
        return super()._init_callback(callback)


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam step by one kernel for all weights, unless its options say how; on a CPU that takes a third of the time
    (``tests/benchmarks/bench_learner.py``)."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        chosen = any(group.get(option) is not None for option in ("fused", "foreach"))
        if chosen or group["capturable"] or group["differentiable"]:
            continue
        group["fused"] = True
        for weights in group["params"]:  # the kernel wants the number of steps beside them
            if "step" in optimizer.state.get(weights, {}):
                optimizer.state[weights]["step"] = optimizer.state[weights]["step"].to(weights.device)


def _group_sizes(optimizer_state: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in optimizer_state["param_groups"]]


class _NoBuffer:
    """Stands in for the stock rollout buffer while VLAPolicy's own is not built yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
