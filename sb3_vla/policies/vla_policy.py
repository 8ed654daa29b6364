"""VLAPolicy: a Stable-Baselines3 policy around a vision-language-action model, an action distribution and a critic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import register_dataclass

from mw_envs.tasks import did_you_mean
from sb3_vla.checkpoints.folders import is_saved_algorithm
from sb3_vla.checkpoints.frozen_weights import FrozenWeights
from sb3_vla.checkpoints.loading import check_archive
from sb3_vla.checkpoints.weights import misfits
from sb3_vla.common.errors import InputError
from sb3_vla.distributed.fsdp import as_shards, in_shards, is_sharded
from sb3_vla.distributions import Trace, make_distribution
from sb3_vla.models import Context, VLAModel
from sb3_vla.models.base import is_perceived
from sb3_vla.models.lora import prepare_training
from sb3_vla.models.resizing import resize_by_area
from sb3_vla.policies.model_source import check_model, model_of_checkpoint, new_model
from sb3_vla.policies.observations import (
    CRITIC_KEYS,
    HAND_KEY,
    MODEL_KEYS,
    NORMALIZED,
    channels_first,
    check_spaces,
    fitted,
    height_and_width,
)
from sb3_vla.policies.value_head import ValueHead
from sb3_vla.policies.views import cut_from_full_view

RESIZES = ("model", "area")
#: advice in errors about a compiled policy
COMPILING = "in its place give policy_kwargs=dict(compile={}), which compiles the towers of pi0 and pi0.5"


@dataclass
class Evaluation:
    """Stored decisions under the policy's present weights.

    :param values: of the critic, float32 (N,).
    :param log_prob: of the executed part of the traces, float32 (N, ...), see :meth:`ActionDistribution.log_prob`.
    :param mean: of the random transition, see :meth:`ActionDistribution.transition`.
    :param std: its standard deviation.
    :param entropy: float32 (N,); None where the weights do not change it.
    """

    values: Tensor
    log_prob: Tensor
    mean: Tensor
    std: Tensor
    entropy: Tensor | None

    def outputs(self, of_actor: bool) -> tuple[Tensor, ...]:
        """The tensors that the loss differentiates: values, and with the actor log-probabilities."""
        return (self.values, self.log_prob) if of_actor else (self.values,)


# Where weights are sharded, torch looks into what a method returns for what the backward pass begins with.
register_dataclass(Evaluation)


class VLAPolicy(BasePolicy):
    """A vision-language-action policy for PPO, also for stock Stable-Baselines3 (Gaussian distribution).

    :param observation_space: a ``Dict`` with ``image`` (uint8, three axes), ``state`` and ``instruction`` (uint8), such
        as ``mw_envs`` gives; ``privileged_state`` and ``elapsed_time`` go to the critic alone.
    :param action_space: ``Box`` of shape (A,) or (K, A): a chunk of K actions per decision.
    :param lr_schedule: learning rate schedule.
    :param use_sde: must be False; every Stable-Baselines3 algorithm passes it.
    :param model: name in :data:`sb3_vla.models.MODELS`; None for the checkpoint's, or ``compact``.
    :param model_kwargs: the model's own options.
    :param checkpoint: folder written by :func:`sb3_vla.checkpoints.save_checkpoint`, which fixes ``model`` and
        ``model_kwargs``; or a published model, see :func:`sb3_vla.checkpoints.load_checkpoint`, of which
        ``model_kwargs`` say what it does not. A saved algorithm has all weights and no longer needs the folder, unless
        the backbone is frozen: it then has the trained weights alone, and where the folder has moved, ``load`` takes
        ``custom_objects={"policy_kwargs": ...}``.
    :param distribution: name in :data:`sb3_vla.distributions.DISTRIBUTIONS`.
    :param distribution_kwargs: the distribution's own options.
    :param value_width: width of the critic's two hidden layers.
    :param trainable: ``all``; ``expert``, all but the backbone; ``adaptive``, the layers that modulate norms (pi0.5);
        or ``lora``, adapters alone. None for the model's default: ``expert`` with pi0 and pi0.5, else ``all``.
    :param lora: options of :class:`sb3_vla.models.lora.LoRA`, for adapters in the layers that ``trainable`` freezes;
        None for no adapters, or with ``trainable="lora"`` for the defaults.
    :param frozen_bf16: keep the weights of a frozen backbone in bfloat16, which halves their memory; trained weights
        stay float32. pi0 and pi0.5 alone.
    :param gradient_checkpointing: see :meth:`sb3_vla.models.VLAModel.set_gradient_checkpointing`.
    :param resize: how images are brought to the size that the model reads: ``model`` for the model's own way, or
        ``area`` for the mean over areas, as demonstrations are shrunk when they are loaded; None for the checkpoint's.
    :param compile: arguments of ``torch.compile``, such as ``{"mode": "reduce-overhead"}``, for the towers of pi0 and
        pi0.5; ``{}`` for its defaults, None to run them as they are.
    :param cache_perception: store the features of a frozen backbone in the rollout instead of the image, so that an
        update runs the expert alone. A decision takes 114 kB with CompactVLA's default size, and megabytes with pi0.
        None for the model's default, False with pi0 and pi0.5.
    :param view: ``camera`` and ``crop`` of the images that it is trained on, which
        :func:`sb3_vla.evaluation.evaluate` uses; None for the checkpoint's. :class:`sb3_vla.PPO` takes them from the
        environment.
    :param optimizer_class: optimizer.
    :param optimizer_kwargs: its options besides the learning rate.
    :raises ValueError: if the spaces are not those of a vision-language-action environment, or the checkpoint is of
        another model than is asked for.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        model: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        distribution: str = "gaussian",
        distribution_kwargs: Mapping[str, Any] | None = None,
        value_width: int = 256,
        trainable: str | None = None,
        lora: Mapping[str, Any] | None = None,
        frozen_bf16: bool = False,
        gradient_checkpointing: bool = False,
        resize: str | None = None,
        compile: Mapping[str, Any] | None = None,
        cache_perception: bool | None = None,
        view: Mapping[str, Any] | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise InputError("use_sde=True has no meaning for VLAPolicy; choose policy_kwargs=dict(distribution=...)")
        check_spaces(observation_space, action_space)
        super().__init__(
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=dict(optimizer_kwargs or {}),
            normalize_images=False,
        )
        assert isinstance(observation_space, spaces.Dict) and isinstance(action_space, spaces.Box)
        self.action_chunk = action_space.shape[0] if len(action_space.shape) == 2 else 1
        self._channels_first = channels_first(observation_space["image"])
        if checkpoint is None:
            source = new_model(model or "compact", model_kwargs or {}, observation_space, action_space)
        else:
            source = model_of_checkpoint(checkpoint, model, model_kwargs or {}, observation_space["image"])
        self.model: VLAModel = source.model
        check_model(self.model, observation_space, action_space)
        if self.model.hand_view is None and HAND_KEY in observation_space.spaces:  # what is not read is not asked for
            read = {key: space for key, space in observation_space.items() if key != HAND_KEY}
            self.observation_space = spaces.Dict(read)
        view = source.view if view is None else view
        self._resize = source.resize if resize is None else resize
        if self._resize not in RESIZES:
            raise InputError(f"Unknown resize={self._resize!r}; {did_you_mean(self._resize, RESIZES)}")
        trainable = self.model.default_trainable if trainable is None else trainable
        if lora is None and trainable == "lora":
            lora = {}
        prepare_training(
            self.model,
            trainable,
            lora=lora,
            frozen_bf16=frozen_bf16,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )
        self._frozen_backbone = trainable != "all"
        perceives_alike = self._frozen_backbone and not any(p.requires_grad for p in self.model.backbone())
        caches = perceives_alike and self.model.caches_perception if cache_perception is None else cache_perception
        if caches and not perceives_alike:
            adapted = "" if lora is None else f" and lora={dict(lora)}"
            raise InputError(
                f'cache_perception=True keeps what changes with trainable={trainable!r}{adapted}; use "expert"'
            )
        self._caches_perception = caches
        self._frozen: FrozenWeights | None = None
        if self._frozen_backbone and checkpoint is not None:
            frozen = [f"model.{name}" for name, weights in self.model.named_parameters() if not weights.requires_grad]
            self._frozen = FrozenWeights(frozen)
        self.distribution = make_distribution(
            distribution, self.model, self.action_chunk, **dict(distribution_kwargs or {})
        )
        source.load_distribution(self.distribution, distribution, distribution_kwargs or {})
        critic = [observation_space[key] for key in CRITIC_KEYS if key in observation_space.spaces]
        critic_dim = sum((space.shape or (0,))[0] for space in critic)
        self.value_head = ValueHead(self.model.feature_dim, critic_dim, value_width)
        source.load_value_head(self.value_head)
        # A saved algorithm has all weights, and needs the checkpoint's folder only for those that are frozen.
        kwargs = source.kwargs if self._frozen is None else source.checkpoint_kwargs
        #: options of a policy that takes this one's weights
        self.portable_kwargs: dict[str, Any] = {
            **(kwargs or {}),
            "distribution": distribution,
            "distribution_kwargs": dict(distribution_kwargs or {}),
            "value_width": value_width,
            "trainable": trainable,
            "lora": None if lora is None else dict(lora),
            "frozen_bf16": frozen_bf16,
            "gradient_checkpointing": gradient_checkpointing,
            "resize": self._resize,
            "compile": None if compile is None else dict(compile),
            "cache_perception": cache_perception,
            "view": None if view is None else dict(view),
            "optimizer_class": optimizer_class,
            "optimizer_kwargs": dict(optimizer_kwargs or {}),
        }
        actor = [p for part in (self.model, self.distribution) for p in part.parameters() if p.requires_grad]
        self.optimizer = optimizer_class(
            [{"params": actor}, {"params": list(self.value_head.parameters())}],
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    @classmethod
    def load(cls, path: str, device: torch.device | str = "auto") -> VLAPolicy:
        """As in Stable-Baselines3, of what :meth:`save` wrote; :func:`load_policy` reads a checkpoint.

        :raises IsADirectoryError: for a folder; the message says how a checkpoint is used.
        :raises ValueError: for a saved algorithm.
        """
        check_archive(path, kind=cls.__name__)
        if isinstance(path, (str, Path)) and Path(path).is_file() and is_saved_algorithm(Path(path)):
            raise InputError(f"{path} is a saved algorithm; its policy is PPO.load({str(path)!r}).policy")
        return super().load(path, device)

    @property
    def view(self) -> dict[str, Any] | None:
        """Camera and crop of the images that it is trained on; None where unknown."""
        return self.portable_kwargs["view"]

    @view.setter
    def view(self, view: dict[str, Any]) -> None:
        self.portable_kwargs["view"] = view

    @property
    def notes(self) -> dict[str, Any]:
        """Notes for a checkpoint of its model: the view of its images, and the size in which they are rendered."""
        height, width = height_and_width(self.observation_space["image"], self._channels_first)  # type: ignore[index]
        drawn = {"render_size": height if height == width else [height, width]}
        resized = {} if self._resize == "model" else {"resize": self._resize}
        return {"view": {**(self.view or {}), **drawn, **resized}}

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(value, "_orig_mod"):  # torch.compile renames the weights, and archives would not load
            raise InputError(
                f"policy.{name} is what torch.compile(...) made; {COMPILING}. A part with a forward() of its own can "
                f"be compiled where it is: policy.{name}.compile()"
            )
        super().__setattr__(name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Weights by name, without those of a frozen backbone, which are in its checkpoint."""
        state = super().state_dict(*args, **kwargs)
        if self._frozen is not None:
            self._frozen.take_out(self, state, kwargs.get("prefix", ""))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See ``torch.nn.Module.load_state_dict``.

        :raises RuntimeError: if they are the weights of another model; the message is short.
        """
        if self._frozen is not None:
            state_dict = self._frozen.put_back(self, state_dict)
        own = super().state_dict()
        shared = {name: value for name, value in state_dict.items() if name in own}
        told = misfits(own, state_dict if strict else {**own, **shared})
        if told:
            raise RuntimeError(f"These are not the weights of this {type(self.model).__name__} policy: {told}")
        if not is_sharded(self):
            return super().load_state_dict(state_dict, strict, assign)
        with in_shards(self):
            return super().load_state_dict(as_shards(self, state_dict), strict, assign)

    def set_training_mode(self, mode: bool) -> None:
        """Keep dropout off in updates, too: a ratio compares two sets of weights, not two dropout masks."""
        super().set_training_mode(False)

    def forward(self, obs: dict[str, Tensor], deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Decide, for the training loop of Stable-Baselines3; :meth:`decide` is for ours.

        :return: actions (N, *action shape) not clipped, values (N, 1), log-probabilities (N,).
        :raises ValueError: for a distribution whose log-probability needs more than the action.
        """
        self._check_stock("stable_baselines3's own training loop")  # before a rollout, not after it
        obs = self.prepare(obs)
        context = self.model.encode(obs)
        values = self._values(context, obs)
        if deterministic:
            action = self.distribution.mode(self.model, context)
            log_prob = torch.zeros(len(action), device=action.device)
        else:
            action, trace = self.distribution.sample(self.model, context)
            mean, std = self.distribution.transition(self.model, context, trace)
            log_prob = self.distribution.log_prob(mean, std, trace, self._all_executed(action))
        return action.reshape(-1, *self.action_space.shape), values[:, None], log_prob  # type: ignore[misc]

    def decide(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Trace]:
        """Decide for prepared observations; the update computes log-probabilities itself, in its own precision.

        :return: actions (N, *action shape), not clipped, values (N,), and the trace.
        """
        context = self.model.encode(obs)
        action, trace = self.distribution.sample(self.model, context)
        return action.reshape(-1, *self.action_space.shape), self._values(context, obs), trace  # type: ignore[misc]

    def evaluate(
        self, obs: dict[str, Tensor], trace: Trace, executed: Tensor, logprob_type: str = "chunk"
    ) -> Evaluation:
        """Evaluate stored decisions with the present weights.

        :param obs: prepared observations.
        :param trace: from :meth:`decide`.
        :param executed: environment steps run of each chunk, int64 (N,).
        :param logprob_type: what one log-probability is of, see :meth:`ActionDistribution.log_prob`.
        """
        context = self.model.encode(obs)
        mean, std = self.distribution.transition(self.model, context, trace)
        return Evaluation(
            values=self._values(context, obs),
            log_prob=self.distribution.log_prob(mean, std, trace, executed, logprob_type),
            mean=mean,
            std=std,
            entropy=self.distribution.entropy(mean, std, executed),
        )

    def imitation_loss(
        self, observation: dict[str, Tensor], actions: Tensor, mask: Tensor, *, draws: int = 1
    ) -> Tensor:
        """The model's, see :meth:`VLAModel.imitation_loss`."""
        return self.model.imitation_loss(observation, actions, mask, draws=draws)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values (N, 1), log-probabilities (N,) and entropies (N,) or None, for Stable-Baselines3's training loop.

        :raises ValueError: for a distribution whose log-probability needs more than the action.
        """
        self._check_stock("stable_baselines3's own training loop")
        assert isinstance(obs, dict)
        actions = actions.reshape(len(actions), self.action_chunk, -1)
        found = self.evaluate(self.prepare(obs), {"action": actions}, self._all_executed(actions))
        return found.values[:, None], found.log_prob, found.entropy

    def get_distribution(self, obs: PyTorchObs) -> DiagGaussianDistribution:
        """The action distribution as one of Stable-Baselines3's, for algorithms such as sb3-contrib's TRPO.

        :raises ValueError: for a distribution that is no diagonal Gaussian, or a frozen backbone.
        """
        self._check_stock("this algorithm")
        if self._frozen_backbone:
            raise InputError('This algorithm asks every parameter for a gradient; use trainable="all" with it')
        if self.distribution.coherent:  # type: ignore[union-attr]
            raise InputError(
                'coherence="offset" is no diagonal Gaussian; use coherence="independent" with this algorithm'
            )
        assert isinstance(obs, dict)
        with sdpa_kernel(SDPBackend.MATH):  # trust regions need second derivatives, which fused attention has not
            context = self.model.encode(self.prepare(obs))
            mean, std = self.distribution.transition(self.model, context, {})
        gaussian = DiagGaussianDistribution(mean[0].numel())
        return gaussian.proba_distribution(mean.flatten(1), std.flatten(1).log())

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """The critic's values (N, 1)."""
        assert isinstance(obs, dict)
        obs = self.prepare(obs)
        return self._values(self.model.encode(obs), obs)[:, None]

    def prepare(self, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of an observation that model and critic read, as a rollout stores it.

        Images are uint8, channels first, at the size of the model; with ``cache_perception`` the features of the
        backbone take their place. A prepared observation is returned as it is.

        :param obs: tensors (N, ...) of the environment's observation.
        :raises ValueError: for an image or instruction that is not uint8.
        """
        if is_perceived(obs):
            return dict(obs)
        prepared = {key: obs[key] for key in (*MODEL_KEYS, *CRITIC_KEYS) if key in obs}
        if self.model.hand_view is not None:
            hand = obs[HAND_KEY]
            prepared[HAND_KEY] = hand if hand.shape[1] == 3 else hand.permute(0, 3, 1, 2)
        for key in ("image", "instruction"):
            if prepared[key].dtype != torch.uint8:
                raise InputError(f"VLAPolicy needs {key} as uint8; got {prepared[key].dtype}. {NORMALIZED}")
        image = prepared["image"]
        if not self._channels_first and image.shape[1] != 3:
            image = image.permute(0, 3, 1, 2)
        if self._resize == "area":
            image = resize_by_area(image, self.model.image_size)
        prepared["image"] = self.model.fit_image(image)
        if not self._caches_perception:
            return prepared
        with torch.no_grad():
            perception = self.model.perceive(prepared)
        return {**perception, **{key: prepared[key] for key in CRITIC_KEYS if key in prepared}}

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As in Stable-Baselines3; keys that the policy does not read are ignored.

        :param observation: a dict of arrays, or of batches of them (N, ...). Images may have their channels first or
            last, and an instruction any number of zeros at its end. An image of 480 x 480 pixels, where the policy
            reads smaller ones, is taken for the full view of the camera: the policy's window is cut from it, and its
            hand view where none is given.
        :raises ValueError: for an observation that does not fit the space, see :func:`fitted`, or is no dict.
        """
        if isinstance(observation, Mapping):
            space = self.observation_space
            assert isinstance(space, spaces.Dict)
            cut = cut_from_full_view(observation, self.view, self.model.hand_view, space)
            observation = fitted(cut, space)
        elif not isinstance(observation, tuple):  # for which Stable-Baselines3 has a message
            raise InputError(
                f"VLAPolicy reads a dict with {', '.join(MODEL_KEYS)}, as the environment gives it; got "
                f"{type(observation).__name__}"
            )
        return super().predict(observation, state, episode_start, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        assert isinstance(observation, dict)
        context = self.model.encode(self.prepare(observation))
        if deterministic:
            action = self.distribution.mode(self.model, context)
        else:
            action, _ = self.distribution.sample(self.model, context)
        return action.reshape(-1, *self.action_space.shape)  # type: ignore[misc]

    def _values(self, context: Context, obs: Mapping[str, Tensor]) -> Tensor:
        critic_only = [obs[key].float() for key in CRITIC_KEYS if key in self.observation_space.spaces]  # type: ignore[attr-defined]
        # The critic's gradient does not reach the features that the actor uses.
        return self.value_head(context.features.detach(), critic_only)

    def _all_executed(self, actions: Tensor) -> Tensor:
        return torch.full((len(actions),), self.action_chunk, device=actions.device)

    def _check_stock(self, who: str) -> None:
        if self.distribution.needs_trace:
            raise InputError(
                f"{who} cannot train the {type(self.distribution).__name__} distribution: its log-probability needs "
                'more than the action. Use sb3_vla.PPO, or policy_kwargs=dict(distribution="gaussian").'
            )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        del data["normalize_images"]
        return {**data, **self.portable_kwargs, "lr_schedule": self._dummy_schedule}


class NoVLAPolicy:
    """The policy registered as ``"VLAPolicy"`` with algorithms that cannot train it; it raises an error."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise InputError(
            '"VLAPolicy" is trained by PPO and GRPO of sb3_vla, by PPO and A2C of stable_baselines3 and by TRPO of '
            "sb3_contrib; this algorithm needs a policy of another kind"
        )
