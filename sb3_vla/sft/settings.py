"""Settings of imitation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from sb3_vla.common.errors import InputError


@dataclass
class SFTSettings:
    """How imitation learns, whatever the model.

    :param trainable: what is trained, see :class:`sb3_vla.VLAPolicy`; None for the model's default.
    :param steps: optimizer steps.
    :param batch_size: frames a step.
    :param draws: noise draws per frame.
    :param learning_rate: peak of a cosine with linear warm-up.
    :param warmup_steps: steps of the warm-up.
    :param weight_decay: AdamW's.
    :param max_grad_norm: clip of the gradient's norm.
    :param ema_decay: of the averaged weights that are kept.
    :param shift: images are shifted by up to this many pixels.
    :param validation_fraction: share of episodes kept out, for the validation loss.
    :param validation_interval: steps between validations.
    :param checkpoint_interval: steps between the states from which an interrupted training goes on.
    """

    trainable: str | None = None
    steps: int = 500
    batch_size: int = 128
    draws: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    shift: int = 2
    validation_fraction: float = 0.05
    validation_interval: int = 250
    checkpoint_interval: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "draws", "validation_interval", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise InputError(f"sft.{name}={getattr(self, name)}; expected at least 1")


@dataclass
class SFTConfig(SFTSettings):
    """Settings of :func:`sft`: those of :class:`SFTSettings`, and the model.

    :param model: name in :data:`sb3_vla.models.MODELS`.
    :param model_kwargs: the model's own options.
    :param checkpoint: start from this checkpoint's model instead of a new one; of a published one, model_kwargs are
        what it does not say. A model that comes without normalization gets that of the data.
    :param lora: options of adapters, see :class:`sb3_vla.models.lora.LoRA`; None for none, or with
        ``trainable=lora`` for the defaults.
    :param frozen_bf16: a frozen backbone's weights in bfloat16.
    :param gradient_checkpointing: layers compute again what the backward pass needs, for less memory.
    :param device: ``cpu``, ``cuda`` or ``auto``; the result is on the CPU.
    :param bf16: bfloat16 autocast; None where the processor computes it faster.
    :param action_horizon: H, length of the predicted chunk.
    :param seed: of weights, order and noise.
    """

    #: see :func:`sb3_vla.common.config.deciding_settings`; of the checkpoint the contents decide
    INCIDENTAL: ClassVar[tuple[str, ...]] = (
        *("checkpoint", "model_kwargs", "gradient_checkpointing", "device"),
        *("validation_interval", "checkpoint_interval"),
    )

    model: str = "compact"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    lora: dict[str, Any] | None = None
    frozen_bf16: bool = False
    gradient_checkpointing: bool = False
    device: str = "auto"
    bf16: bool | None = None
    action_horizon: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action_horizon < 1:
            raise InputError(f"sft.action_horizon={self.action_horizon}; expected at least 1")
