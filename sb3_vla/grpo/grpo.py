"""Group Relative Policy Optimization (Shao et al. 2024) of vision-language-action policies, in chunks.

The same trial is played several times, and the advantage of an episode is its return relative to its group, without a
critic. A rollout is a number of such groups of whole episodes; the update is that of PPO.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from sb3_vla.common.errors import InputError
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.distributed.ranks import current_ranks, join_for_good
from sb3_vla.grpo.groups import (
    Episode,
    GroupBuffer,
    Start,
    check_same_start,
    group_advantages,
    start_episodes,
)
from sb3_vla.grpo.options import check_groups
from sb3_vla.policies.vla_policy import VLAPolicy
from sb3_vla.ppo.ppo import PPO
from sb3_vla.rollouts.stepping import Clock

SelfGRPO = TypeVar("SelfGRPO", bound="GRPO")

# Training trials have smaller seeds; evaluations have those from here on.
_END_OF_SEEDS = 2**31
# Default of max_groups, as a multiple of n_groups.
_ATTEMPTS = 4
# An episode that is longer than this never ends.
_MOST_DECISIONS = 10_000


def groups_begun(n_groups: int, max_groups: int | None) -> int:
    """Groups that a rollout plays at most, rounded up to a whole turn by the rollout; see :class:`GRPO`."""
    return _ATTEMPTS * n_groups if max_groups is None else max_groups


def groups_held(n_groups: int, max_groups: int | None, group_size: int, num_envs: int, ranks: int = 1) -> int:
    """Groups whose decisions a rank holds at most: one less than are wanted, and a whole turn on top.

    :param n_groups: as in :class:`GRPO`, like ``max_groups`` and ``group_size``.
    :param num_envs: environments of this rank.
    :param ranks: how many ranks train together.
    """
    at_once = max(1, num_envs // group_size)
    turns = -(-groups_begun(n_groups, max_groups) // (at_once * ranks))
    return min(n_groups - 1 + at_once, turns * at_once)


class GRPO(PPO):
    """GRPO for chunks; the arguments of PPO that make sense without a critic, and those below.

    A group is ``group_size`` episodes of one trial: environments are reset with the same seed, from which they draw
    task, goal and whatever else is random, and the first observations are compared. Episodes run side by side, as many
    as there are environments, and the next begin when all have ended. The environments take a whole number of groups,
    or a group takes a whole number of turns. An environment whose episode has ended gets zero actions until all others
    have ended, and what it does after its automatic reset is discarded; in
    :class:`~sb3_vla.envs.hold_at_end.HoldAtEnd` it waits instead, which saves the simulation.

    ``batch_size`` and ``total_timesteps`` count decisions, also those of groups that are dropped. The value head is
    not trained. Under ``torchrun`` ``n_groups`` and ``max_groups`` count the groups of all ranks; a group is played on
    one rank.

    :param group_size: G, episodes of one trial.
    :param n_groups: least number of groups for an update; all groups of the last turn are kept. A group is dropped, and
        another one played, if the returns of its episodes are equal, so that all advantages are zero, or if its success
        rate is out of ``success_bounds``.
    :param max_groups: groups after which a rollout ends at the latest, rounded up to a whole turn; None for four times
        ``n_groups``. The update then takes those that were kept, and is skipped if there is none.
    :param success_bounds: least and greatest success rate of a group that is kept, inclusive. The default drops groups
        of equal returns alone (dynamic sampling, Yu et al. 2025).
    :param episode_return: ``reward``, the undiscounted sum of rewards; or ``success``, 1 for an episode that
        succeeded at any time (``info["is_success"]`` at its end) and 0 for another.
    :param advantage_type: ``standardized`` or ``leave_one_out``, see :func:`~sb3_vla.grpo.groups.group_advantages`; all
        decisions of an episode have the same advantage.
    :param normalize_length: weight every episode equally, as Shao et al. do; without it every decision, which is the
        unbiased gradient of the expected return (Liu et al. 2025) but gives a failure, which lasts until the time
        limit, more weight than a quick success.
    :raises ValueError: for a value that is not among those above.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"VLAPolicy": VLAPolicy}  # type: ignore[assignment]
    has_critic = False

    def __init__(
        self,
        policy: str | type[Any],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 64,
        n_epochs: int = 4,
        clip_range: float | Schedule = 0.2,
        ent_coef: float = 0.0,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        group_size: int = 8,
        n_groups: int = 8,
        max_groups: int | None = None,
        success_bounds: tuple[float, float] = (0.0, 1.0),
        episode_return: str = "reward",
        advantage_type: str = "standardized",
        normalize_length: bool = True,
        clip_range_high: float | Schedule | None = None,
        dual_clip: float | None = None,
        logprob_type: str = "chunk",
        micro_batch_size: int | None = None,
        kl_coef: float = 0.0,
        actor_warmup: int = 0,
        rehearsal: DemonstrationBatches | None = None,
        rehearsal_coef: float = 1.0,
        rehearsal_batch_size: int = 128,
        bf16: bool | None = False,
        noise_scale: float | Schedule = 1.0,
        task_sampling: str = "uniform",
        sharding: str = "none",
    ) -> None:
        self.group_size = group_size
        self.n_groups = n_groups
        self.max_groups = max_groups
        self.success_bounds = success_bounds
        self.episode_return = episode_return
        self.advantage_type = advantage_type
        self.normalize_length = normalize_length
        if env is not None:
            join_for_good()
        #: with the environment steps so far, what the trials of a rollout are drawn from
        self._trial_entropy = _trial_entropy(seed)
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=batch_size,
            batch_size=batch_size,
            n_epochs=n_epochs,
            clip_range=clip_range,
            normalize_advantage=False,
            ent_coef=ent_coef,
            max_grad_norm=max_grad_norm,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
            clip_range_high=clip_range_high,
            dual_clip=dual_clip,
            logprob_type=logprob_type,
            micro_batch_size=micro_batch_size,
            kl_coef=kl_coef,
            actor_warmup=actor_warmup,
            rehearsal=rehearsal,
            rehearsal_coef=rehearsal_coef,
            rehearsal_batch_size=rehearsal_batch_size,
            bf16=bf16,
            noise_scale=noise_scale,
            task_sampling=task_sampling,
            sharding=sharding,
        )

    @classmethod
    def _as_attributes(cls, given: dict[str, Any]) -> dict[str, Any]:
        attributes = super()._as_attributes(given)
        if "seed" in given:
            attributes["_trial_entropy"] = _trial_entropy(given["seed"])
        return attributes

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, VLAPolicy):
            raise InputError(f'GRPO trains VLAPolicy alone; got {self.policy_class.__name__}. Use "VLAPolicy"')
        check_groups(self)
        self.n_steps = self.batch_size  # means nothing here, but any other number makes Stable-Baselines3 warn
        super()._setup_model()
        self.rollout_buffer = GroupBuffer(self.device)  # type: ignore[assignment]

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Play groups until ``n_groups`` are kept or ``max_groups`` are played; ``n_rollout_steps`` is ignored."""
        buffer: GroupBuffer = rollout_buffer
        self._prepare_rollout(env)
        buffer.reset()
        callback.on_rollout_start()
        decisions_before, env_steps_before, clock = self.num_timesteps, self.env_steps, Clock()
        generator = np.random.default_rng([self._trial_entropy, self.env_steps])
        most = groups_begun(self.n_groups, self.max_groups)
        at_once = max(1, self.n_envs // self.group_size)
        played: list[list[Episode]] = []
        kept, begun, ranks = 0, 0, self.ranks
        while kept < self.n_groups and begun < most:
            # A turn's groups are numbered rank by rank, each with a trial of its own.
            seeds = generator.integers(_END_OF_SEEDS, size=at_once * ranks.count)
            own = range(ranks.rank * at_once, (ranks.rank + 1) * at_once)
            episodes = self._play(env, np.repeat(seeds[own], self.group_size), callback, clock, begun)
            if episodes is None:
                self._share_rollout(env_steps_before)
                return False
            groups = [episodes[i : i + self.group_size] for i in range(0, len(episodes), self.group_size)]
            kept += ranks.total(
                sum(self._keep(group, buffer, begun + number) for group, number in zip(groups, own, strict=True))
            )
            begun += at_once * ranks.count
            played += groups
        buffer.spread_advantages(self.normalize_length, ranks)
        self._share_rollout(env_steps_before)
        callback.update_locals(locals())
        callback.on_rollout_end()
        earned = sum(sum(episode.rewards) for group in played for episode in group)
        self._log_rollout(self.num_timesteps - decisions_before, self.env_steps - env_steps_before, earned, clock)
        self._log_groups(played, kept)
        return True

    def _play(
        self, env: VecEnv, seeds: npt.NDArray[np.int64], callback: BaseCallback, clock: Clock, begun: int
    ) -> list[Episode] | None:
        """Play one episode for each seed, as many at once as there are environments; None if a callback stops it.

        :param seeds: int64 (n,), n a multiple of the number of environments.
        :param begun: groups of this rollout before these, which sorts the episodes.
        """
        starts: dict[int, Start] = {}
        episodes: list[Episode] = []
        for number, turn in enumerate(seeds.reshape(-1, env.num_envs).tolist()):
            with clock("simulation"):
                observations, found = start_episodes(env, turn)
            for seed, start in zip(turn, found, strict=True):
                check_same_start(starts.setdefault(seed, start), start, seed)
            under_way = [Episode() for _ in turn]
            if not self._finish(env, observations, under_way, callback, clock, (begun, number)):
                return None
            episodes += under_way
        return episodes

    def _finish(
        self,
        env: VecEnv,
        new_obs: dict[str, npt.NDArray[Any]],
        episodes: list[Episode],
        callback: BaseCallback,
        clock: Clock,
        turn: tuple[int, int],
    ) -> bool:
        """Play the episodes of all environments until they end; False if a callback stops it.

        :param new_obs: first observations.
        :param episodes: one for each environment, to which decisions are added.
        :param turn: sorts the turns of a rollout.
        """
        running = np.arange(env.num_envs)
        decisions_before, ranks, stopped = self.num_timesteps, self.ranks, False
        for count in range(_MOST_DECISIONS):
            with clock("inference"):
                seen_now = {key: values[running] for key, values in new_obs.items()}
                decision = self._decide(seen_now, running, env.num_envs)
            # Callbacks read these from the locals, by Stable-Baselines3's names.
            clipped = np.zeros((env.num_envs, *self.action_space.shape), np.float32)  # type: ignore[misc]
            clipped[running] = decision.clipped
            with clock("simulation"):
                new_obs, rewards, dones, infos = env.step(clipped)  # type: ignore[assignment]
            self.num_timesteps += len(running)
            executed = [infos[i].get("env_steps", self.policy.action_chunk) for i in running]
            self.env_steps += sum(executed)
            callback.update_locals(locals())
            stopped |= not callback.on_step()
            if stopped and ranks.count == 1:
                return False
            just_ended = np.zeros_like(dones)
            just_ended[running] = dones[running]
            self._record_episodes(infos, just_ended, *turn, count)
            observation = {key: value.cpu() for key, value in decision.observation.items()}
            trace = {key: value.cpu() for key, value in decision.trace.items()}
            for row, i in enumerate(running):
                seen = {key: value[row] for key, value in observation.items()}
                drawn = {key: value[row] for key, value in trace.items()}
                episodes[i].add(seen, drawn, rewards[i], executed[row])
                episodes[i].success = infos[i].get("is_success")
                episodes[i].lost = infos[i].get("worker_restarted", False)
            running = running[~dones[running]]
            if not len(running):
                self.num_timesteps = decisions_before + ranks.total(self.num_timesteps - decisions_before)
                # The rank with the longest episodes has drawn the noise of all ranks most often.
                lasted = ranks.gather(count)
                ranks.take_generators(lasted.index(max(lasted)))
                return not ranks.any(stopped)
        raise RuntimeError(
            f"{len(running)} of {env.num_envs} episodes have not ended after {_MOST_DECISIONS} decisions; GRPO needs "
            "episodes that end: give the environment a time limit"
        )

    def _keep(self, group: list[Episode], buffer: GroupBuffer, number: int) -> bool:
        """Store a group, unless its returns are equal or its success rate is out of bounds.

        The observations of a group that is not stored, and of an episode that a crash ended, are freed.

        :param number: of the group among those of all ranks in this rollout.
        """
        whole = [episode for episode in group if not episode.lost]
        if self.ep_success_buffer or any(episode.success is not None for episode in whole):
            for episode in whole:  # where episodes report success, one that a time limit cut silently has failed
                episode.success = bool(episode.success)
        returns = [self._return_of(episode) for episode in whole]
        kept = self._has_signal(whole, returns)
        for episode in group:
            if episode.lost or not kept:
                episode.forget()
        if kept:
            buffer.add(whole, returns, group_advantages(returns, self.advantage_type), number)
        return kept

    def _has_signal(self, group: list[Episode], returns: list[float]) -> bool:
        if len(set(returns)) < 2:
            return False
        if tuple(self.success_bounds) == (0.0, 1.0):
            return True
        low, high = self.success_bounds
        return bool(low <= np.mean([self._success_of(episode) for episode in group]) <= high)

    def _return_of(self, episode: Episode) -> float:
        if self.episode_return == "success":
            return self._success_of(episode)
        if not math.isfinite(total := sum(episode.rewards)):
            raise InputError(f"An episode's rewards sum to {total}; expected a finite number from the environment")
        return total

    def _success_of(self, episode: Episode) -> float:
        if episode.success is None:
            raise InputError(
                f'The environment does not give info["is_success"] at an episode\'s end, which episode_return='
                f"{self.episode_return!r}, success_bounds={self.success_bounds} needs; use 'reward' and (0, 1)"
            )
        return float(episode.success)

    def train(self) -> None:
        """Update the policy on the groups that were kept."""
        if self.ranks.total(len(self.rollout_buffer)) == 0:  # type: ignore[arg-type]
            warnings.warn(
                "No group of this rollout was kept: within each all episodes ended alike, or success was out of "
                "success_bounds. There is nothing to learn from it; choose tasks that are solved now and then",
                stacklevel=2,
            )
            return
        super().train()

    def _value_loss(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros((), device=self.device)  # there is no critic

    def _log_groups(self, played: list[list[Episode]], kept: int) -> None:
        record = self.logger.record
        own = {
            "return": [[sum(episode.rewards) for episode in group] for group in played],
            "success": [[float(e.success) for e in group if e.success is not None] for group in played],
        }
        told = self.ranks.gather(own)
        count = sum(len(part["return"]) for part in told)
        record("rollout/groups_played", count)
        record("rollout/groups_kept", kept)
        record("rollout/groups_kept_share", kept / count)
        for name in own:
            known = [values for part in told for values in part[name] if values]
            if known:
                record(f"rollout/group_{name}_mean", float(np.mean([np.mean(values) for values in known])))
                record(f"rollout/group_{name}_std", float(np.mean([np.std(values) for values in known])))

    def learn(
        self: SelfGRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "GRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfGRPO:
        """As :meth:`PPO.learn`; the name in TensorBoard is another, as in each algorithm of Stable-Baselines3."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)


def _trial_entropy(seed: int | None) -> int:
    """Entropy that training trials are drawn from: the seed, or without one a random number, the same on all ranks."""
    return current_ranks().from_first(int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed)
