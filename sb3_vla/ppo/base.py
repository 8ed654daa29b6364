"""What PPO and GRPO share, in the place of Stable-Baselines3's ``BaseAlgorithm`` and ``OnPolicyAlgorithm``.

Set-up, decisions and statistics of a rollout, and archives, where these must know of VLAPolicy or of several ranks.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from mw_envs.tasks import did_you_mean
from sb3_vla.checkpoints.loading import check_archive
from sb3_vla.common.batch_noise import part_of_batch
from sb3_vla.common.errors import InputError
from sb3_vla.common.optimizers import fuse_adam
from sb3_vla.common.precision import acting_precision
from sb3_vla.distributed.fsdp import is_sharded, load_optimizer_state, whole_optimizer_state, whole_weights
from sb3_vla.distributed.ranks import Ranks, current_ranks, join_for_good
from sb3_vla.policies.views import check_hand_view, view_of_envs, warn_of_another_view, with_hand_view
from sb3_vla.policies.vla_policy import COMPILING, VLAPolicy
from sb3_vla.rollouts.episodes import EpisodeStatistics
from sb3_vla.rollouts.metrics import in_terminal, rollout_metrics
from sb3_vla.rollouts.progress import SuccessBar
from sb3_vla.rollouts.stepping import Clock, Decision, Replicas, check_decision

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="VLAAlgorithm")

# Parameters of the constructor that do not come from an archive.
_NOT_LOADED = ("env", "device", "_init_setup_model")


class VLAAlgorithm(stable_baselines3.PPO):
    """Base class of the algorithms that train VLAPolicy; with any other policy it is ``stable_baselines3.PPO``."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {  # type: ignore[assignment]
        **stable_baselines3.PPO.policy_aliases,
        "VLAPolicy": VLAPolicy,
    }
    policy: Any
    #: environment steps of all ranks so far; ``num_timesteps`` counts decisions
    env_steps: int
    bf16: bool | None
    noise_scale: Any
    task_sampling: str
    #: attributes left out of a saved algorithm: images of the last observation, copies of the policy, data
    not_saved: ClassVar[tuple[str, ...]] = (
        "_last_obs",
        "_last_episode_starts",
        "_reference",
        "replicas",
        "rehearsal",
        "episodes",
        "_new_parts",
    )

    @property
    def ranks(self) -> Ranks:
        """The ranks that train together, see :mod:`sb3_vla.distributed.ranks`."""
        return current_ranks()

    @property
    def trains_vla(self) -> bool:
        """Whether the policy is a VLAPolicy."""
        return issubclass(self.policy_class, VLAPolicy)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "policy" and self.trains_vla and not isinstance(value, VLAPolicy):
            raise InputError(
                f"policy is now of class {type(value).__name__}; expected the VLAPolicy itself, of which an update "
                f"calls more than forward(). Where torch.compile(policy) is meant, {COMPILING}; several GPUs train "
                "under torchrun, adapters by policy_kwargs=dict(lora={})"
            )
        super().__setattr__(name, value)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # load() wraps the environment before it builds the algorithm, so the rank may not have joined yet.
        return stable_baselines3.PPO._wrap_env(env, verbose if join_for_good().leads else 0, monitor_wrapper)

    def _setup_model(self) -> None:
        if not self.ranks.leads:  # an archive may ask every rank to print and log
            self.verbose, self.tensorboard_log = 0, None
        self._merge_policy_kwargs()
        if not self.trains_vla:
            if self.ranks.count > 1:
                raise InputError(f"Several ranks train VLAPolicy alone; got {self.policy_class.__name__}")
            super()._setup_model()
            return
        if self.env is not None:
            self.policy_kwargs = with_hand_view(self.policy_kwargs, self.env)
        self.ranks.take_generators()  # without a seed, too, all ranks begin with the same weights
        super()._setup_model()
        if self.env is not None:
            check_hand_view(self.policy.model, self.env)
        if self.policy.view is None:
            self._take_view()
        self.policy_kwargs = self.policy.portable_kwargs
        #: how the latest training episodes ended
        self.episodes = EpisodeStatistics(self._stats_window_size)
        #: copies of the policy that decide in its place, on other accelerators
        self.replicas: Replicas | None = None
        self._rollout_seconds = 0.0

    def _merge_policy_kwargs(self) -> None:
        """Bring the archive's ``policy_kwargs`` together with those given to :meth:`load`.

        :raises ValueError: for other ones than the archive's, where the policy is not a VLAPolicy.
        """
        changed, replaced = (vars(self).pop(f"_{how}_policy_kwargs", None) for how in ("changed", "replaced"))
        base = self.policy_kwargs if replaced is None else replaced
        if not self.trains_vla:
            self.policy_kwargs = base
            if changed not in (None, base):  # Stable-Baselines3's rule
                raise InputError(f"policy_kwargs={changed}, but those of the archive are {base}")
            return
        given = {**(replaced or {}), **(changed or {})}
        other = {name for name, value in given.items() if value != self.policy_kwargs.get(name)}
        #: parts of the policy whose saved state is dropped, because load() was given other options of them
        self._new_parts = {name.partition("_")[0] for name in other} & {"distribution", "optimizer"}
        self.policy_kwargs = {**base, **given}

    def _take_view(self) -> None:
        """Note in the policy which view it is trained on from now on."""
        shown = None if self.env is None else view_of_envs(self.env)
        if shown is not None:
            if self.policy.view is not None:
                warn_of_another_view(self.policy.view, shown)
            self.policy.view = shown

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As in Stable-Baselines3.

        :raises ValueError: for environments that draw another hand view than the model reads.
        """
        super().set_env(env, force_reset)
        if self.env is not None and isinstance(getattr(self, "policy", None), VLAPolicy):
            check_hand_view(self.policy.model, self.env)

    def set_random_seed(self, seed: int | None = None) -> None:
        """As in Stable-Baselines3; the environments of all ranks, in their order, have successive seeds."""
        super().set_random_seed(seed)
        if seed is not None and self.env is not None and self.ranks.count > 1:
            self.env.seed(seed + self.ranks.rank * self.n_envs)

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        """As in Stable-Baselines3, but the first rollout knows the progress, by which it explores."""
        total_timesteps, callback = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        if self.trains_vla:
            if self.num_timesteps == 0:
                self.episodes.without_success = 0  # ep_success_buffer is new
            if total_timesteps > self.num_timesteps:
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
        return total_timesteps, callback

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        if self.trains_vla:  # the last rollout may go beyond the end
            self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """As in Stable-Baselines3, but the bar also shows the success rate."""
        if progress_bar:
            if not isinstance(callback, (list, BaseCallback)):
                callback = ConvertCallback(callback)
            callback = [*(callback if isinstance(callback, list) else [callback]), SuccessBar()]
        return super()._init_callback(callback)

    # --- Rollouts -----------------------------------------------------------------------------------------------------

    def _prepare_rollout(self, env: VecEnv) -> None:
        """Set the sampling weights of tasks, the exploration noise and the weights of replicas."""
        self.ranks.take_generators()
        if self.task_sampling == "signal":
            self.episodes.sample_tasks(env)
        self.episodes.ended = 0
        self.policy.set_training_mode(False)
        noise_scale = self._now(self.noise_scale)
        if not 0 < noise_scale < math.inf:
            left = self._current_progress_remaining
            raise InputError(f"noise_scale is {noise_scale} where {left:.0%} of the training is left; expected above 0")
        self.policy.distribution.noise_scale = noise_scale
        if self.replicas is not None:
            self.replicas.take_weights()

    def _deciding(self) -> AbstractContextManager[None]:
        """The precision of a rollout."""
        return acting_precision(self.bf16, self.device.type)

    @torch.no_grad()
    def _decide(
        self, observations: Mapping[str, np.ndarray], rows: np.ndarray | None = None, among: int | None = None
    ) -> Decision:
        """Decide for n of this rank's environments, with the noise that one process would draw for them.

        :param observations: arrays (n, ...).
        :param rows: int64 (n,), which rows of this rank's noise are theirs; None for all.
        :param among: rows of noise of each rank; None for n.
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

    def _record_episodes(self, infos: list[dict[str, Any]], dones: np.ndarray, *order: int) -> None:
        """Add episodes that ended to the statistics; with several ranks at the end of the rollout.

        :param order: sorts the steps of a rollout.
        """
        self.episodes.add(infos, dones, *order)
        if self.ranks.count == 1:
            self.episodes.count(self, self.ranks)

    def _share_rollout(self, env_steps_before: int) -> None:
        """Sum environment steps and gather episodes over ranks, in the order of one process."""
        if self.ranks.count > 1:
            self.env_steps = env_steps_before + self.ranks.total(self.env_steps - env_steps_before)
            self.episodes.count(self, self.ranks)

    def _log_rollout(self, decisions: int, env_steps: int, earned: float, clock: Clock) -> None:
        """Log :func:`rollout_metrics`.

        :param decisions: of all ranks, like ``env_steps``.
        :param earned: sum of this rank's rewards.
        """
        self._rollout_seconds = clock.elapsed()
        earned = sum(self.ranks.gather(earned))
        self._record(rollout_metrics(decisions, env_steps, earned, self._rollout_seconds, clock.seconds))
        self.logger.record("time/env_steps", self.env_steps, exclude="tensorboard")

    def _record(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.logger.record(name, value, exclude=None if in_terminal(name) else "stdout")

    def _now(self, schedule: Any) -> float:
        """The present value of a schedule."""
        return float(schedule(self._current_progress_remaining))

    def task_success(self) -> dict[str, float]:
        """Share of successes among each task's last ``stats_window_size`` training episodes, 0..1."""
        return self.episodes.success_rates()

    # --- Archives -----------------------------------------------------------------------------------------------------

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """As in Stable-Baselines3; of several ranks, all of which must call it, the first writes."""
        if self.ranks.leads:
            super().save(path, exclude, include)
        else:
            self.get_parameters()
        self.ranks.wait()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *(self.not_saved if self.trains_vla else ())]

    @classmethod
    def load(
        cls: type[SelfAlgorithm],
        path: Any,
        env: GymEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """As in Stable-Baselines3, but every option of the constructor can be changed, and is checked as there.

        :param custom_objects: values in the place of those of the archive, options of the constructor among them.
        :param kwargs: options of the constructor. ``policy_kwargs`` are merged with the archive's; with other options
            of the distribution or the optimizer, what these had learned is dropped.
        :raises TypeError: for a keyword that the constructor does not have, or a name in ``custom_objects`` that
            neither it nor an archive has.
        :raises ValueError: for a value that the constructor refuses, or the ``policy`` of another archive.
        :raises IsADirectoryError: for a folder; the message says how a checkpoint is used.
        """
        check_archive(path, cls.__name__)
        options = [name for name in inspect.signature(cls).parameters if name not in _NOT_LOADED]
        custom = dict(custom_objects or {})
        replaced = custom.pop("policy_kwargs", None)  # compared with the archive's, which it would hide
        given = {name: value for name, value in custom.items() if name in options} | kwargs
        for name in kwargs:
            if name not in options:
                raise TypeError(f"{cls.__name__} has no option {name!r}; {did_you_mean(name, options)}")
        policy = given.pop("policy", None)
        attributes = cls._as_attributes(given) | {"_replaced_policy_kwargs": replaced}
        model: Any = super().load(path, env, device, custom, print_system_info, force_reset, **attributes)
        for name in custom:  # they may also replace other attributes of an archive
            if name not in options and not hasattr(model, name):
                raise TypeError(f"custom_objects names {name!r}, which no archive holds; {did_you_mean(name, options)}")
        if policy not in (None, model.policy_class) and cls.policy_aliases.get(policy) is not model.policy_class:
            raise InputError(f"policy={policy!r}, but {path} is of {model.policy_class.__name__}; leave it out")
        for name in ("ep_info_buffer", "ep_success_buffer"):  # saved with the window that they had
            known = getattr(model, name)
            if known is not None:
                setattr(model, name, deque(known, maxlen=model._stats_window_size))
        return model

    @classmethod
    def _as_attributes(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Options of the constructor by the names of the attributes that hold them."""
        names = {"stats_window_size": "_stats_window_size", "policy_kwargs": "_changed_policy_kwargs"}
        attributes = {names.get(name, name): value for name, value in given.items()}
        if attributes.get("rollout_buffer_kwargs", {}) is None:
            attributes["rollout_buffer_kwargs"] = {}
        return attributes

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """As in Stable-Baselines3; of shards the whole, for which all ranks must call it.

        The optimizer's state, which is twice as large as the weights, is gathered on the first rank alone.
        """
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
        if isinstance(load_path_or_dict, dict) and self.trains_vla:
            load_path_or_dict = self._with_new_parts(load_path_or_dict)
        super().set_parameters(load_path_or_dict, exact_match, device)
        if not self.trains_vla:
            return
        if not is_sharded(self.policy):
            fuse_adam(self.policy.optimizer)
        else:
            for group in self.policy.optimizer.param_groups:
                group["fused"] = None  # an archive of one process says True
            load_optimizer_state(self.policy.optimizer, self.policy, self.policy.optimizer.state_dict()["state"])

    def _with_new_parts(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Saved parameters, where those of parts with other options or other weights are the present ones."""
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
        """A saved policy's weights with the present distribution's own.

        A copy of the model in the distribution (:attr:`sb3_vla.distributions.diffusion.DDIM.pretrained`) was made
        before the saved weights were loaded; it takes these.
        """
        copied = "distribution.pretrained."
        weights = {name: value for name, value in saved.items() if not name.startswith("distribution.")}
        for name, value in self.policy.state_dict().items():
            if name.startswith(copied):
                weights[name] = saved[name] if name in saved else saved[f"model.{name.removeprefix(copied)}"]
            elif name.startswith("distribution."):
                weights[name] = value
        return weights


def _group_sizes(optimizer_state: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in optimizer_state["param_groups"]]
