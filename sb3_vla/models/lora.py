"""Adapters of low rank (LoRA, Hu et al. 2022), by ``peft``, beside linear layers whose own weights stay as they are.

Before the first update an adapter adds nothing, so a policy with adapters acts as the one without. Checkpoints for
others hold the sum of weight and adapter under the layer's plain name (:func:`merged_state`): every reader of the
layout, ours included, takes them for an ordinary model. What an interrupted training goes on from keeps them apart.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError, NotInstalledError
from sb3_vla.models.base import VLAModel

_ADAPTER = "default"
# What peft's files put before a layer's name.
_SAVED = "base_model.model."
_PARTS = ("all", "backbone", "expert")


@dataclass(frozen=True)
class LoRA:
    """Settings of adapters.

    :param rank: of an adapter.
    :param alpha: an adapter's product is scaled by ``alpha / rank``; None for the rank.
    :param part: ``backbone``, ``expert`` for all but the backbone, or ``all``.
    :param layers: endings of the names of the linear layers that get one, such as ``("q_proj", "v_proj")``; None for
        all of the part.
    """

    rank: int = 16
    alpha: float | None = None
    part: Literal["all", "backbone", "expert"] = "all"
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora rank={self.rank}; expected at least 1")
        if self.part not in _PARTS:
            raise InputError(f"Unknown lora part={self.part!r}; {did_you_mean(self.part, _PARTS)}")


def make_lora(options: Mapping[str, Any]) -> LoRA:
    """Settings from a configuration.

    :raises ValueError: for an unknown option or a value that cannot be.
    """
    known = LoRA.__dataclass_fields__
    for name in options:
        if name not in known:
            raise InputError(f"Unknown lora option {name!r}; {did_you_mean(name, known)}")
    layers = options.get("layers")
    return LoRA(**{**options, "layers": None if layers is None else tuple(layers)})


def add_lora(model: VLAModel, lora: LoRA) -> list[str]:
    """Put adapters beside a model's linear layers that are not trained themselves; adapters alone gain a gradient.

    Call it after :meth:`VLAModel.set_trainable`, or before it with ``trainable="lora"``.

    :return: names of the layers that have one.
    :raises ImportError: without ``peft``.
    :raises ValueError: if no layer is left for one, or the model has adapters already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise NotInstalledError('LoRA needs peft: pip install "sb3-vla[lora]"') from error
    if adapted_layers(model):
        raise InputError(f"{type(model).__name__} has adapters already; load it again without them for other ones")
    backbone = {id(parameter) for parameter in model.backbone()}
    names = []
    for name, layer in model.named_modules():
        if type(layer) is not nn.Linear or layer.weight.requires_grad:
            continue
        inside = id(layer.weight) in backbone
        wanted = lora.part == "all" or inside == (lora.part == "backbone")
        if wanted and (lora.layers is None or name.endswith(lora.layers)):
            names.append(name)
    if not names:
        raise InputError(
            f"No linear layer of {type(model).__name__} for lora part={lora.part!r}, layers={lora.layers}: they are "
            'trained themselves, or none has such a name. Use trainable="lora", or another part'
        )
    # peft takes the gradient from all else.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alpha = lora.rank if lora.alpha is None else lora.alpha
    settings = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    for parameter in trained:
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # beside weights in bfloat16, too, in which most steps of an optimizer are rounded away
            parameter.data = parameter.data.float()
    return names


def prepare_training(
    model: VLAModel,
    trainable: str,
    *,
    lora: Mapping[str, Any] | None = None,
    frozen_bf16: bool = False,
    gradient_checkpointing: bool = False,
    compile: Mapping[str, Any] | None = None,
) -> None:
    """Make a model ready to be trained, or planned; see :class:`sb3_vla.VLAPolicy` for the options.

    :raises ValueError: for what the model cannot do.
    """
    model.set_trainable(trainable)
    if lora is not None:
        add_lora(model, make_lora(lora))
    if frozen_bf16:
        model.halve_backbone()
    if gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    if compile is not None:
        model.compile_towers(compile)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer has an adapter."""
    return bool(adapted_layers(model))


def copy_denoiser(model: VLAModel) -> VLAModel:
    """A frozen copy of a model without its backbone and without adapters: what they add is in the copy's weights.

    It can contextualize and denoise; parts that only perceive are left out, which are most of a large model.
    """
    backbone = {id(parameter) for parameter in model.backbone()}
    left_out: dict[int, Any] = {}
    for part in model.children():
        held = {id(parameter) for parameter in part.parameters()}
        if held and held <= backbone:
            left_out[id(part)] = nn.Identity()
    copied = copy.deepcopy(model, left_out)
    for name, layer in adapted_layers(copied).items():
        layer.merge()  # type: ignore[operator]
        copied.set_submodule(name, layer.get_base_layer())  # type: ignore[operator]
    return copied.requires_grad_(False)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state as if it had no adapters: what they add is in the weights.

    Of a model without adapters it is its own state.
    """
    adapted = adapted_layers(model)
    state = {}
    for name, value in model.state_dict().items():
        if ".lora_" in name:
            continue
        layer, _, own = name.rpartition(".base_layer.")
        if own == "weight" and layer in adapted:
            delta = adapted[layer].get_delta_weight(_ADAPTER)  # type: ignore[operator]
            value = (value.float() + delta.float()).to(value.dtype)
        state[f"{layer}.{own}" if layer in adapted else name] = value
    return state


def merge_adapter(
    weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Weights and an adapter that ``peft`` saved: W + alpha / r B A (Hu et al. 2022, section 4.1), there in float32.

    With rank-stabilized scaling the factor is alpha / sqrt(r) (Kalajdzievski 2023).

    :param weights: of all layers by name.
    :param adapter: ``base_model.model.LAYER.lora_A.weight`` (r, in) and ``.lora_B.weight`` (out, r).
    :param settings: content of its ``adapter_config.json``.
    :raises ValueError: for an adapter of another kind, or that does not fit the weights.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(f"The adapter has peft_type={kind!r}; expected 'LORA'")
    for name in ("use_dora", "fan_in_fan_out", "alpha_pattern", "modules_to_save"):
        if settings.get(name):
            raise InputError(f"The adapter has {name}={settings[name]!r}, which is not read; merge it by peft first")
    parts = {key.removeprefix(_SAVED).replace(f".{_ADAPTER}.", "."): value for key, value in adapter.items()}
    device = torch.get_default_device()  # meta where a model is only described: nothing is added up then
    weights, parts = ({key: value.to(device) for key, value in some.items()} for some in (weights, parts))
    merged = dict(weights)
    for key, down in parts.items():
        layer, _, part = key.rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise InputError(
                f"The adapter holds {_SAVED}{key}; expected lora_A.weight and lora_B.weight of layers alone"
            )
        other = "lora_B.weight" if part == "A.weight" else "lora_A.weight"
        if f"{layer}.{other}" not in parts:
            raise InputError(f"The adapter has {key} without its {other}")
        if part == "B.weight":
            continue
        rank, name = len(down), f"{layer}.weight"
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        delta = scale * parts[f"{layer}.{other}"].float() @ down.float()
        expected = tuple(merged[name].shape) if name in merged else "none, for there is no such layer"
        if delta.shape != expected:
            raise InputError(f"The adapter of {name} is {tuple(delta.shape)}, expected {expected}")
        merged[name] = merged[name].float() + delta
    return merged
