"""What a vision-language-action model offers: an encoder, run once per decision, and a denoiser of action chunks.

Letters used for shapes in this package: N samples, H action horizon (predicted), K action chunk (executed, K <= H),
A action dimensions, L dimensions that are denoised (the first A of them act), D context features, R denoisings per
context, V tokens of the action vocabulary.
Flow time runs from 1 (noise) to 0 (data): x_t = t noise + (1 - t) action, velocity = noise - action (as in pi0).
Diffusion timesteps are integers: x_t = sqrt(abar_t) action + sqrt(1 - abar_t) noise (Ho et al. 2020).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mw_envs.hand_view import HandView
from mw_envs.tasks import did_you_mean
from sb3_vla.common import batch_noise as draw
from sb3_vla.common.errors import InputError
from sb3_vla.models.recomputing import Recomputing

SizesT = TypeVar("SizesT")

PERCEPTION = "perception/"
#: what a model may predict: a flow's velocity; a diffusion's noise, clean action or v (Salimans & Ho 2022); tokens
PREDICTIONS = ("velocity", "epsilon", "sample", "v_prediction", "tokens")
#: parts of a model that can be trained
TRAINABLE = ("all", "expert", "adaptive", "lora")


def sizes_of(
    model: str, option: str, given: str | Mapping[str, Any], known: Mapping[str, SizesT], kind: type[SizesT]
) -> SizesT:
    """A model's sizes, by name or one by one.

    :param model: its name, for the message.
    :param option: the option's name, for the message.
    :param given: a name among ``known``, or what ``kind`` takes.
    :raises ValueError: for an unknown name.
    :raises TypeError: for sizes that ``kind`` does not have, or that lack one.
    """
    if isinstance(given, str):
        if given not in known:
            raise InputError(f"{model} {option}={given!r}; expected {', '.join(known)}, or the sizes")
        return known[given]
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def is_perceived(observation: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of :meth:`VLAModel.perceive` rather than an observation."""
    return any(key.startswith(PERCEPTION) for key in observation)


@dataclass
class Context:
    """An encoded observation.

    :param features: what the critic and other heads may read, float32, shape (N, D).
    :param state: whatever the model's denoiser needs.
    :param perception: what :meth:`VLAModel.perceive` gave, from which another copy of the model makes its own context.
    """

    features: Tensor
    state: Any
    perception: dict[str, Tensor] | None = None


class VLAModel(nn.Module, ABC):
    """A vision-language-action model; observations are the tensors of a batched environment observation.

    :param action_dim: A.
    :param action_horizon: H.
    """

    #: size of :attr:`Context.features`
    feature_dim: int
    #: (height, width) of the images the model reads; larger ones are shrunk before they are stored
    image_size: tuple[int, int]
    #: the window of the camera's view that it reads as ``hand_image``, None for a model that reads ``image`` alone
    hand_view: HandView | None = None
    #: constructor arguments, JSON values, from which a checkpoint builds the model again
    config: dict[str, Any]
    #: one of :data:`PREDICTIONS`; it decides which action distributions fit
    prediction: str = "velocity"
    #: what a policy trains unless told otherwise, see :class:`sb3_vla.VLAPolicy`
    default_trainable: str = "all"
    #: whether a rollout keeps what a frozen backbone perceived unless told otherwise
    caches_perception: bool = True
    #: place in the horizon of the first action to execute; later than 0 where the prediction starts in the past
    first_action: int = 0
    #: tokens of the longest prompt, of a model whose ``tokenize`` makes ids and mask of instructions; else None
    prompt_length: int | None = None
    #: size of the second tensor of :meth:`denoise_features`, None where there is none
    action_feature_dim: int | None = None
    #: of a diffusion model: abar_t of the timesteps that it was trained on, float32 (T,)
    alphas_cumprod: Tensor
    #: of a token model: the action that each token means, in normalized units, float32 (V,)
    token_values: Tensor

    def __init__(self, action_dim: int, action_horizon: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.action_horizon = action_horizon
        #: L; more than A where the model was pretrained on wider actions
        self.latent_dim = action_dim
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_std", torch.ones(action_dim))
        #: see :meth:`set_gradient_checkpointing`
        self.gradient_checkpointing = False
        self.action_mean: Tensor
        self.action_std: Tensor

    @staticmethod
    def is_same_option(name: str, one: Any, other: Any) -> bool:
        """Whether two values of a constructor argument, as JSON gives them, make the same model."""
        return bool(one == other)

    @staticmethod
    def with_full_paths(options: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments; those that name a file here do it from another working directory, too."""
        return dict(options)

    def local_tokenizer(self) -> Path | None:
        """The tokenizer's file of which a checkpoint needs a copy, if it is on this machine."""
        return None

    @abstractmethod
    def backbone(self) -> Iterator[nn.Parameter]:
        """The parameters of :meth:`perceive`."""

    def adaptive_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that modulate the norms of the expert, where a model has some apart from the rest."""
        yield from ()

    def sharding_units(self) -> Iterator[nn.Module]:
        """Layers that are always run by calling them, so that each can be gathered for itself where weights are sharded
        over GPUs (:mod:`sb3_vla.distributed.fsdp`)."""
        yield from ()

    def set_trainable(self, trainable: str) -> None:
        """Leave a gradient to one part of the model, and to the adapters that it has.

        :param trainable: ``all``, ``expert`` for all but the backbone, ``adaptive`` for
            :meth:`adaptive_parameters`, or ``lora`` for nothing else, see :func:`sb3_vla.models.lora.add_lora`.
        :raises ValueError: for an unknown part, or one that the model has not.
        """
        if trainable not in TRAINABLE:
            raise InputError(f"Unknown trainable={trainable!r}; {did_you_mean(trainable, TRAINABLE)}")
        adaptive = list(self.adaptive_parameters())
        if trainable == "adaptive" and not adaptive:
            raise InputError(f'{type(self).__name__} has no modulated norms to train alone; use trainable="expert"')
        adapters = [parameter for name, parameter in self.named_parameters() if ".lora_" in name]
        self.requires_grad_(trainable in ("all", "expert"))
        for parameter in self.backbone() if trainable == "expert" else ():
            parameter.requires_grad_(False)
        for parameter in (*(adaptive if trainable == "adaptive" else ()), *adapters):
            parameter.requires_grad_(True)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Whether layers keep their inputs alone for the backward pass and compute the rest again: the same gradients
        with less memory and about a third more work.

        :raises ValueError: if the model has no layers that do.
        """
        layers = [module for module in self.modules() if isinstance(module, Recomputing)]
        if enabled and not layers:
            raise InputError(f"{type(self).__name__} has no gradient checkpointing; lower micro_batch_size instead")
        for module in layers:
            module.recomputes = enabled
        self.gradient_checkpointing = enabled

    def halve_backbone(self) -> None:
        """Keep the backbone's frozen weights in bfloat16.

        :raises ValueError: if the model does not compute with such, or its backbone is trained.
        """
        raise InputError(f"{type(self).__name__} reads its backbone in float32; leave frozen_bf16=True out")

    def compile_towers(self, options: Mapping[str, Any]) -> None:
        """Compile what takes the time; names of weights and what is saved stay as they are.

        :param options: of ``torch.compile``.
        :raises ValueError: if the model has nothing that is compiled.
        """
        raise InputError(f"{type(self).__name__} is not compiled; leave compile={dict(options)} out")

    @abstractmethod
    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """The backbone's part of the encoding, which a rollout can keep where the backbone is frozen.

        :param observation: ``image`` uint8 (N, 3, height, width), ``state`` float32 (N, S), ``instruction`` uint8
            (N, L), and ``hand_image`` uint8 (N, 3, size, size) where :attr:`hand_view` is set.
        :return: tensors of N rows, their names beginning with :data:`PERCEPTION`, and what passes unchanged.
        """

    @abstractmethod
    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        """The rest of the encoding, from what :meth:`perceive` gave."""

    def fit_image(self, image: Tensor) -> Tensor:
        """Images, uint8 (N, 3, height, width), at the size in which a rollout keeps them."""
        if image.shape[2:] == self.image_size:
            return image
        resized = F.interpolate(image.float(), self.image_size, mode="bilinear", antialias=True)
        return resized.round_().clamp_(0, 255).to(torch.uint8)

    def encode(self, observation: dict[str, Tensor]) -> Context:
        """Encode observations, or what :meth:`perceive` made of them."""
        if not is_perceived(observation):
            observation = self.perceive(observation)
        context = self.contextualize(observation)
        context.perception = observation
        return context

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """What :attr:`prediction` says, shape of x; every model but a token model has it.

        :param x: noisy chunks in normalized units, float32 (R * N, H, L); row r * N + n belongs to context n.
        :param t: flow time of each row in [0, 1], float32 (R * N,), or its diffusion timestep, int64 (R * N,).
        """
        raise NotImplementedError(f"{type(self).__name__} predicts {self.prediction} and has no denoiser")

    def denoise_features(self, context: Context, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`denoise`, and the features of each action from which it came, (R * N, H, action_feature_dim)."""
        raise NotImplementedError(f"{type(self).__name__} gives no features of its actions")

    def token_logits(self, context: Context) -> Tensor:
        """Logits of the action tokens, (N, H, A, V), all decoded in parallel; a token model has it."""
        raise NotImplementedError(f"{type(self).__name__} predicts {self.prediction} and has no tokens")

    def normalize_action(self, action: Tensor) -> Tensor:
        """Environment units to the model's, any leading shape."""
        return (action - self.action_mean) / self.action_std

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """The model's units to the environment's, any leading shape."""
        return action * self.action_std + self.action_mean

    @torch.no_grad()
    def set_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Take normalization statistics into the model's buffers.

        :param statistics: ``action_mean``, ``action_std`` (A,) and whatever else the model normalizes by, such as
            ``state_mean``, ``state_std`` (S,).
        :raises ValueError: for an unknown name or a wrong shape.
        """
        buffers = dict(self.named_buffers())
        for name, value in statistics.items():
            if name not in buffers or buffers[name].shape != value.shape:
                expected = {
                    key: tuple(buffer.shape) for key, buffer in buffers.items() if key.endswith(("mean", "std"))
                }
                raise InputError(f"Statistics {name!r} of shape {tuple(value.shape)}; expected among {expected}")
            buffers[name].copy_(value)

    def imitation_loss(
        self, observation: dict[str, Tensor], actions: Tensor, mask: Tensor, *, draws: int = 1
    ) -> Tensor:
        """Conditional flow matching (Lipman et al. 2023, eq. 14): mean squared error of the velocity, a scalar.

        :param actions: expert chunks in environment units, float32 (N, H, A).
        :param mask: which steps are within the episode, bool (N, H).
        :param draws: noise draws per encoded observation.
        """
        context = self.encode(observation)
        x0 = self.normalize_action(actions).repeat(draws, 1, 1)
        noise = draw.normal(x0.shape, device=x0.device)
        t = self.sample_time(len(x0), x0.device)
        x = torch.lerp(x0, noise, t[:, None, None])
        error = (self.denoise(context, x, t) - (noise - x0)).square().mean(dim=2)
        weight = mask.to(error.dtype).repeat(draws, 1)
        return (error * weight).sum() / weight.sum()

    def imitation_weight(self, mask: Tensor) -> float:
        """How many numbers the mean of :meth:`imitation_loss` is over, up to a factor that is the same for all batches.

        :param mask: as there.
        """
        return mask.sum().item()

    def sample_time(self, count: int, device: torch.device) -> Tensor:
        """Flow times of a training batch, (count,): uniform in (0, 1)."""
        return draw.uniform((count,), device=device)
