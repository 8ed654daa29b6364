"""LeRobot's folder of a SmolVLA: ``config.json``, weights, processors' files, tokenizer.

Read: the layout with processor files (LeRobot >= 0.4), with or without the tokenizer beside them, and the one before
it, with statistics among the weights. Of several cameras the first is the environment's. What the folder lacks of the
vision-language model, its sizes and its tokenizer, comes from a folder inside it, from what is known of the published
ones, or from the hub. Written: the layout with processor files and tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sb3_vla.checkpoints.folders import read_part
from sb3_vla.checkpoints.formats.lerobot import (
    ACTION,
    DEVICE,
    FIRST_STEPS,
    IMAGE,
    NORMALIZER,
    PREPROCESSOR,
    STATE,
    find_step,
    read_statistics,
    step,
    write_processors,
)
from sb3_vla.checkpoints.formats.tokenizer_files import TOKENIZER, find_tokenizer, lerobot_step, write_tokenizer
from sb3_vla.checkpoints.native import ENVIRONMENT_DIM, NORMALIZED, LoadedCheckpoint, whole_checkpoint
from sb3_vla.checkpoints.weights import load_weights, read_weights, write_weights
from sb3_vla.common.errors import InputError
from sb3_vla.common.files import write_json
from sb3_vla.common.paths import local_path
from sb3_vla.models.lora import merged_state
from sb3_vla.models.smolvla import SPECIAL_TOKENS, SmolVLA
from sb3_vla.models.tokenizing import byte_tokenizer

#: the published vision-language models, by their names here
VLM_NAMES = {
    "256M": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "500M": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "2.2B": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
}
# Subfolder of a checkpoint with a vision-language model that is none of them.
_VLM = "vlm"
# What LeRobot and the processor of the vision-language model ask its tokenizer for.
_NAMED_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
}
# Names of the model's parts there; the empty one comes last.
_PARTS = {
    "vision_model.": "model.vlm_with_expert.vlm.model.vision_model.",
    "connector.": "model.vlm_with_expert.vlm.model.connector.modality_projection.proj.",
    "text_model.": "model.vlm_with_expert.vlm.model.text_model.",
    "lm_head.": "model.vlm_with_expert.vlm.lm_head.",
    "expert.": "model.vlm_with_expert.lm_expert.",
    "": "model.",
}
_STATISTICS = ("action_mean", "action_std", "state_mean", "state_std")
_NORM_MAP = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}


def load_smolvla(
    folder: str | Path,
    tokenizer: str | Path | None = None,
    precision: str = "float32",
    base: bool = False,
    shifted_positions: bool = False,
) -> LoadedCheckpoint:
    """Read a SmolVLA as LeRobot publishes it.

    :param tokenizer: a ``tokenizer.json``, or a folder that holds one; None to find it.
    :param precision: of the model, see :class:`SmolVLA`; training wants float32, whatever the file holds.
    :param base: take the weights alone, to imitate from, as of a model that was trained on other robots: states and
        actions are four numbers each, as the environment has them, and normalized as the data of imitation is.
    :param shifted_positions: act as LeRobot does with transformers 4.55 to 4.57 and the vision tower in float32: every
        patch of the image has the position of the one above and to the left of it. For what was trained there; the
        model that is read has it in its weights, and acts the same everywhere.
    :raises FileNotFoundError: if a file is missing; the message names it.
    :raises ValueError: if a file is damaged, the weights do not fit, statistics or tokenizer are missing, or the policy
        needs what this model has not.
    """
    folder = local_path(folder)
    config = read_part(folder, "config.json", "the policy's configuration")
    if config.get("type") != "smolvla":
        raise InputError(f"{folder} is a policy of type {config.get('type')!r}; expected 'smolvla'")
    _check_supported(config, folder)
    # A compiled model's files have the compiler's wrapper in their names.
    weights = {key.replace("._orig_mod.", "."): value for key, value in read_weights(folder).items()}
    buffers = {key: weights.pop(key) for key in [*weights] if not key.startswith("model.")}
    try:
        options = _options(config, weights, folder)
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{folder / 'config.json'} is no complete SmolVLA configuration: {error!r}") from error
    options["tokenizer"] = _tokenizer(config, folder, tokenizer)
    if base:
        options |= {"action_dim": ENVIRONMENT_DIM, "state_dim": ENVIRONMENT_DIM}
    model = SmolVLA(**options, precision=precision)
    load_weights(model, {_our_name(key): value for key, value in weights.items()}, folder, optional=_STATISTICS)
    if shifted_positions:
        _shift_positions(model)
    if not base:
        model.set_statistics(_statistics(config, buffers, folder))
    sampler = ("flow_ode", {"denoising_steps": int(config.get("num_steps", 10))})
    return LoadedCheckpoint(model, "smolvla", model.config, None, {NORMALIZED: not base}, sampler)


def save_smolvla(folder: str | Path, model: SmolVLA, denoising_steps: int = 10) -> None:
    """Write a SmolVLA as LeRobot does; the folder appears whole or not at all.

    :param denoising_steps: Euler steps that LeRobot takes with it.
    :raises FileExistsError: if the folder holds something else than a checkpoint.
    """
    folder, given = local_path(folder), model.config
    published = VLM_NAMES.get(given["vlm"]) if isinstance(given["vlm"], str) else None
    size, action_dim, horizon = given["image_size"], given["action_dim"], given["action_horizon"]
    inputs = {
        IMAGE: {"type": "VISUAL", "shape": [3, size, size]},
        STATE: {"type": "STATE", "shape": [given["state_dim"]]},
    }
    for index in range(given["absent_pictures"]):
        inputs[f"observation.images.empty_camera_{index}"] = {"type": "VISUAL", "shape": [3, 480, 640]}
    outputs = {ACTION: {"type": "ACTION", "shape": [action_dim]}}
    config = {
        "type": "smolvla",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "device": "cpu",
        "use_amp": False,
        "chunk_size": horizon,
        "n_action_steps": horizon,
        "normalization_mapping": _NORM_MAP,
        "max_state_dim": given["latent_state_dim"],
        "max_action_dim": given["latent_dim"],
        "resize_imgs_with_padding": given["resolution"][::-1],
        "empty_cameras": given["absent_pictures"],
        "adapt_to_pi_aloha": False,
        "use_delta_joint_actions_aloha": False,
        "tokenizer_max_length": given["max_tokens"],
        "num_steps": denoising_steps,
        "use_cache": True,
        "freeze_vision_encoder": given["train_expert_only"],
        "train_expert_only": given["train_expert_only"],
        "train_state_proj": True,
        # LeRobot takes a relative path from its working directory.
        "vlm_model_name": published or str(folder.absolute() / _VLM),
        "load_vlm_weights": given["precision"] == "mixed",
        "add_image_special_tokens": given["image_special_tokens"],
        "attention_mode": "cross_attn",
        "prefix_length": -1,
        "pad_language_to": "longest",
        "num_expert_layers": -1,
        "num_vlm_layers": given["layers"],
        "self_attn_every_n_layers": given["self_attn_every"],
        "expert_width_multiplier": given["expert_width"],
        "min_period": given["min_period"],
        "max_period": given["max_period"],
    }
    statistics = {
        f"{feature}.{moment}": getattr(model, f"{ours}_{moment}")
        for feature, ours in ((ACTION, "action"), (STATE, "state"))
        for moment in ("mean", "std")
    }
    weights = {_their_name(key): value for key, value in merged_state(model).items() if key not in _STATISTICS}
    words = {
        "max_length": given["max_tokens"],
        "task_key": "task",
        "padding_side": "right",
        "padding": "longest",
        "truncation": True,
    }
    text = given["tokenizer"] or byte_tokenizer(SPECIAL_TOKENS)
    steps = [
        *FIRST_STEPS,
        step("smolvla_new_line_processor"),
        lerobot_step(words, text, folder, VLM_NAMES.values()),
        DEVICE,
        step(NORMALIZER),
    ]
    with whole_checkpoint(folder) as partial:
        write_json(partial / "config.json", config)
        write_weights(partial, weights)
        write_processors(partial, steps, inputs, outputs, _NORM_MAP, statistics)
        write_tokenizer(partial / TOKENIZER, text)
        if published is None:
            _write_vlm(partial / _VLM, model, text, weights)


def _shift_positions(model: SmolVLA) -> None:
    """Give each patch the position of the one above and to the left of it; the first row's and column's stay there."""
    side, own = model.sizes.image_size, model.resolution[0]
    if own != side:
        raise InputError(f"shifted_positions=True is for pictures of the vision tower's size {side}; these are {own}")
    table = model.vision_model.get_parameter("embeddings.position_embedding.weight").data
    before = (torch.arange(math.isqrt(len(table))) - 1).clamp(min=0)
    table.copy_(table.unflatten(0, (len(before), -1))[before][:, before].flatten(0, 1))


def _check_supported(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what changes the computation and is not built here."""
    layers = config.get("num_expert_layers", -1)
    expected = {
        "attention_mode": ("cross_attn", config.get("attention_mode", "cross_attn")),
        "num_expert_layers": (-1, -1 if layers in (0, config.get("num_vlm_layers", 16)) else layers),
        "adapt_to_pi_aloha": (False, config.get("adapt_to_pi_aloha", False)),
        "use_delta_joint_actions_aloha": (False, config.get("use_delta_joint_actions_aloha", False)),
        "normalization_mapping": (_NORM_MAP, dict(config.get("normalization_mapping", _NORM_MAP))),
        "n_obs_steps": (1, config.get("n_obs_steps", 1)),
    }
    for name, (wanted, found) in expected.items():
        if found != wanted:
            raise InputError(f"{folder} has {name}={found!r}; this SmolVLA has {wanted!r} alone")


def _options(config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """The model's options from LeRobot's configuration, without the tokenizer."""
    features = {**config["input_features"], **config["output_features"]}
    kinds = {name: feature["type"] for name, feature in features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "VISUAL" and "empty_camera" not in name]
    if not pictures or kinds.get(STATE) != "STATE" or kinds.get(ACTION) != "ACTION":
        raise InputError(f"{folder} has the features {', '.join(kinds)}; expected a camera, {STATE} and {ACTION}")
    others = sum(kind == "VISUAL" for kind in kinds.values()) - 1
    height, width = features[pictures[0]]["shape"][1:]
    resolution = config.get("resize_imgs_with_padding", (512, 512))
    inner = "model.vlm_with_expert.lm_expert.layers."
    return {
        "action_dim": features[ACTION]["shape"][0],
        "action_horizon": config["chunk_size"],
        "state_dim": features[STATE]["shape"][0],
        "image_size": max(height, width),
        # LeRobot's order is width, height.
        "resolution": [height, width] if resolution is None else list(resolution)[::-1],
        "vlm": _vlm_of(config["vlm_model_name"], folder),
        "layers": config.get("num_vlm_layers", 16)
        or len({key.removeprefix(inner).split(".")[0] for key in weights if key.startswith(inner)}),
        "self_attn_every": max(config.get("self_attn_every_n_layers", 2), 0),
        "expert_width": config.get("expert_width_multiplier", 0.75),
        "min_period": config.get("min_period", 4e-3),
        "max_period": config.get("max_period", 4.0),
        "latent_dim": config.get("max_action_dim", 32),
        "latent_state_dim": config.get("max_state_dim", 32),
        "max_tokens": config.get("tokenizer_max_length", 48),
        "image_special_tokens": config.get("add_image_special_tokens", False),
        "absent_pictures": min(config.get("empty_cameras", 0), others),
        "train_expert_only": config.get("train_expert_only", True),
    }


def _vlm_of(name: str, folder: Path) -> str | dict[str, Any]:
    """A published vision-language model's name here, or the sizes in its configuration."""
    for ours, theirs in VLM_NAMES.items():
        if name == theirs:
            return ours
    from transformers import AutoConfig

    inside = folder / (Path(name).name if Path(name).is_absolute() else name)  # ours, which may have been moved
    try:
        config = AutoConfig.from_pretrained(inside if inside.is_dir() else name)
        text, vision = config.text_config, config.vision_config
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder} needs the configuration of its vision-language model {name!r}, which is no folder in it, none "
            f"of {', '.join(VLM_NAMES.values())}, and not found on the hub. Put its config.json into {inside}"
        ) from error
    return {
        "width": text.hidden_size,
        "ffn": text.intermediate_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "vocabulary": text.vocab_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "vision_width": vision.hidden_size,
        "vision_ffn": vision.intermediate_size,
        "vision_layers": vision.num_hidden_layers,
        "vision_heads": vision.num_attention_heads,
        "scale": config.scale_factor,
        "norm_eps": text.rms_norm_eps,
    }


def _write_vlm(folder: Path, model: SmolVLA, text: str, weights: Mapping[str, Tensor]) -> None:
    """All that LeRobot loads of a vision-language model that is not on the hub: configuration, processor and tokenizer.

    :param text: contents of a ``tokenizer.json``.
    :param weights: the policy's, by LeRobot's names.
    """
    write_tokenizer(folder, text, named=_NAMED_TOKENS)
    write_json(folder / "config.json", _vlm_config(model))
    kinds = {"processor_class": "SmolVLMProcessor", "image_processor_type": "SmolVLMImageProcessor"}
    write_json(folder / "preprocessor_config.json", kinds)
    write_json(folder / "processor_config.json", {"processor_class": "SmolVLMProcessor"})
    if model.config["precision"] == "mixed":  # LeRobot makes it so where it loads these weights, before the policy's
        vlm = _PARTS["lm_head."].removesuffix("lm_head.")
        write_weights(folder, {k.removeprefix(vlm): value for k, value in weights.items() if k.startswith(vlm)})


def _vlm_config(model: SmolVLA) -> dict[str, Any]:
    """The ``config.json`` of the vision-language model, as transformers reads it."""
    sizes = model.sizes
    text = {
        "model_type": "llama",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": model.config["layers"],
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
        "rms_norm_eps": sizes.norm_eps,
    }
    vision = {
        "model_type": "smolvlm_vision",
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.vision_ffn,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
    }
    return {
        "model_type": "smolvlm",
        "scale_factor": sizes.scale,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }


def _tokenizer(config: Mapping[str, Any], folder: Path, given: str | Path | None) -> str:
    places = [config["vlm_model_name"]]
    if (folder / f"{PREPROCESSOR}.json").is_file():
        reads = find_step(folder, PREPROCESSOR, "tokenizer_processor")
        named = reads.get("artifacts", {}).get("tokenizer_name", reads["config"].get("tokenizer_name"))
        places = list(dict.fromkeys([named, *places])) if named else places
    return find_tokenizer(folder, places, given)


def _statistics(config: Mapping[str, Any], buffers: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Mean and deviation of states and actions, from among the weights or from the processors' files."""
    found: dict[str, Tensor] = {}
    if buffers:
        names = {"state": "buffer_observation_state", "action": "buffer_action"}
        for ours, theirs in names.items():
            for moment in ("mean", "std"):
                values = [value for key, value in buffers.items() if key.endswith(f"{theirs}.{moment}")]
                if values and all(torch.equal(value, values[0]) for value in values):
                    found[f"{ours}_{moment}"] = values[0]
    else:
        for tensors, feature, ours in zip(read_statistics(folder), (STATE, ACTION), ("state", "action"), strict=True):
            for moment in ("mean", "std"):
                if f"{feature}.{moment}" in tensors:
                    found[f"{ours}_{moment}"] = tensors[f"{feature}.{moment}"]
    # LeRobot marks what was never set with infinities.
    lacking = [name for name in _STATISTICS if name not in found or not torch.isfinite(found[name]).all()]
    if lacking:
        raise InputError(
            f"{folder} lacks the statistics {', '.join(lacking)}, or holds several that differ. Copy the files again, "
            "or imitate first: a base model has none, and is read with model_kwargs={base: true}"
        )
    return {name: value.float() for name, value in found.items()}


def _our_name(key: str) -> str:
    return next(ours + key.removeprefix(theirs) for ours, theirs in _PARTS.items() if key.startswith(theirs))


def _their_name(key: str) -> str:
    return next(theirs + key.removeprefix(ours) for ours, theirs in _PARTS.items() if key.startswith(ours))
