"""TinyVLA's folder: ``config.json``, weights, tokenizer and ``dataset_stats.pkl``.

Read: merged weights in safetensors, in one file or in shards, with a CLIP or SigLIP tower, the diffusion head and the
statistics in the folder or in its parent. Or the folder that its training leaves, which is merged as it is read: an
adapter (LoRA), ``non_lora_trainables.bin`` with what was trained in full, the configuration here or in the parent, and
the vision-language model that it was trained on, where ``adapter_config.json`` says.

The statistics are pickled; a reader that knows NumPy arrays and nothing else reads them, so a file that would run code
is refused.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sb3_vla.checkpoints.folders import read_part, require_file, tell_unreadable
from sb3_vla.checkpoints.formats.tokenizer_files import write_tokenizer
from sb3_vla.checkpoints.native import (
    ADAPTER_CONFIG,
    ENVIRONMENT_DIM,
    NORMALIZED,
    LoadedCheckpoint,
    place_of_configuration,
    whole_checkpoint,
)
from sb3_vla.checkpoints.weights import load_weights, read_tensors, read_weights, write_weights
from sb3_vla.common.errors import InputError, NotThereError
from sb3_vla.common.files import write_json
from sb3_vla.common.paths import local_path
from sb3_vla.models.lora import merge_adapter, merged_state
from sb3_vla.models.sizes import published_options
from sb3_vla.models.tinyvla import PADDING, PROMPT, TinyVLA

_STATISTICS = "dataset_stats.pkl"
_IN_FULL = "non_lora_trainables.bin"
#: ours and theirs
_NAMES = {
    "action_mean": "action_mean",
    "action_std": "action_std",
    "action_min": "action_min",
    "action_max": "action_max",
    "state_mean": "qpos_mean",
    "state_std": "qpos_std",
}
# Theirs normalize no state by them, so that their files have none.
_OPTIONAL = {"state_min": "qpos_min", "state_max": "qpos_max"}
# Constants that transformers used to store.
_CONSTANTS = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|\.embeddings\.position_ids$")
_LANGUAGE = (
    "attention_bias",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rotary_emb_base",
    "rotary_pct",
    "use_parallel_residual",
    "vocab_size",
)
_VISION = (
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "patch_size",
)
# What the published configuration has no word for.
_OURS = ("image_size", "prompt", "center_crop", "bf16_time", "timesteps", "normalization", "mask_padding")
# Images of the environment that TinyVLA is published for, before the crop.
_IMAGE_SIZE = 480
# The output of the language model, whose place the diffusion head takes.
_LANGUAGE_HEAD = "embed_out.weight"
#: our names of the head's weights
_HEAD = ("unet.", "combine.", "norm_after_pool.")
#: of a new head, which computes its timesteps in float32
_NEW_HEAD: dict[str, Any] = {
    "action_dim": ENVIRONMENT_DIM,
    "state_dim": ENVIRONMENT_DIM,
    "action_horizon": 16,
    "down_dims": (256, 512, 1024),
    "step_dim": 256,
    "cameras": 1,
    "image_size": 336,  # what the tower reads
    "prompt": PROMPT,
}


def load_tinyvla(folder: str | Path, base: bool = False) -> LoadedCheckpoint:
    """Read a TinyVLA as its authors' code merges and saves it.

    :param base: the folder is the vision-language model alone (Llava-Pythia), to imitate from: the diffusion head is a
        new one of the published size, for one camera and the environment's states and actions, which are normalized as
        the data of imitation is.
    :raises FileNotFoundError: if a file is missing; the message names it.
    :raises ValueError: if a file is damaged or holds more than it should, or the weights do not fit.
    """
    folder = local_path(folder)
    config = read_part(place_of_configuration(folder), "config.json", "the model's configuration")
    if (folder / ADAPTER_CONFIG).is_file():
        settings = read_part(folder, ADAPTER_CONFIG, "the adapter's settings")
        towers = _trained_on(folder, settings)
        theirs = _merged(folder, towers, settings)
    else:
        towers, theirs = folder, read_weights(folder)
    has_tokenizer = folder if (folder / "tokenizer.json").is_file() else towers
    tokenizer = read_part(has_tokenizer, "tokenizer.json", "the tokenizer; the base language model has it too")
    weights = {_our_name(key): value for key, value in theirs.items() if not _CONSTANTS.search(key)}
    try:
        options = {**_towers(config, folder), **(_NEW_HEAD if base else _head(config, weights, folder))}
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} is no complete TinyVLA configuration: {error!r}") from error
    model = TinyVLA(tokenizer=tokenizer, **options)
    if base:
        load_weights(model, _without_head(weights), folder, optional=("state_", "action_", *_HEAD))
    else:
        load_weights(model, weights, folder, optional=("state_", "action_"))
        model.set_statistics(_read_statistics(folder))
    return LoadedCheckpoint(
        model, "tinyvla", model.config, None, {NORMALIZED: not base}, ("ddim", {"denoising_steps": 10})
    )


def save_tinyvla(folder: str | Path, model: TinyVLA) -> None:
    """Write a TinyVLA as its authors' code reads it; the folder appears whole or not at all.

    What their configuration has no word for is under ``sb3_vla``.

    :raises FileExistsError: if the folder holds something else than a checkpoint.
    """
    folder, given = local_path(folder), model.config
    theirs, own = published_options("tinyvla"), {"down_dims": tuple(given["down_dims"]), "step_dim": given["step_dim"]}
    tell_unreadable(folder, "TinyVLA's code", {name: (size, theirs[name]) for name, size in own.items()})
    vision, language = (part.config.to_dict() for part in (model.vision_tower, model.gpt_neox))
    rope = language["rope_parameters"]
    language |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    hidden, seen = language["hidden_size"], vision["hidden_size"]
    config = {
        "architectures": ["LlavaPythiaForCausalLM"],
        "model_type": "llava_pythia",
        "action_head_type": "droid_diffusion",
        "action_dim": given["action_dim"],
        "state_dim": given["state_dim"],
        "chunk_size": given["action_horizon"],
        "concat": "token_cat" if model.cameras == 2 else "None",
        **{name: language[name] for name in _LANGUAGE},
        "vision_config": {
            "mm_projector": {"hidden_size": hidden, "mm_hidden_size": seen, "mm_projector_type": "mlp2x_gelu"},
            "vision_tower": {
                **{name: vision[name] for name in _VISION},
                "mm_vision_select_feature": "patch",
                "mm_vision_select_layer": -2,
                "vision_model_name_or_path": model.tower,
            },
        },
        "sb3_vla": {name: given[name] for name in _OURS},
    }
    weights = {
        _their_name(key): value
        for key, value in merged_state(model).items()
        if not key.startswith(("action_", "state_"))
    }
    statistics = {theirs: getattr(model, ours).cpu().numpy() for ours, theirs in (_NAMES | _OPTIONAL).items()}
    statistics["example_qpos"] = np.zeros((1, given["state_dim"]), np.float32)
    text = json.dumps(given["tokenizer"]) if given["tokenizer"] else model.tokenizer.to_str()
    with whole_checkpoint(folder) as partial:
        write_json(partial / "config.json", config)
        write_tokenizer(partial, text, PADDING)
        write_weights(partial, weights)
        (partial / _STATISTICS).write_bytes(pickle.dumps(statistics, protocol=4))


def _trained_on(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The folder of the vision-language model that an adapter was trained on."""
    named = local_path(str(settings.get("base_model_name_or_path")))
    for place in (named, folder / named, folder.parent / named):
        if place.is_dir():
            return place
    raise NotThereError(
        f"The adapter in {folder} was trained on {named}, which is no folder here; put the path of that "
        f"vision-language model into base_model_name_or_path of {folder / ADAPTER_CONFIG}"
    )


def _merged(folder: Path, base: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the base under what was trained in full and the adapter, by the authors' names."""
    weights = read_weights(base)
    weights.pop(_LANGUAGE_HEAD, None)
    others = folder / _IN_FULL
    if others.is_dir():  # as DeepSpeed's converter writes it, with all other weights
        others /= "pytorch_model.bin"
    if not others.is_file():
        raise NotThereError(f"Checkpoint {folder} has no {_IN_FULL} (what was trained in full beside the adapter)")
    for key, value in read_tensors(others).items():
        name = key.removeprefix("base_model.").removeprefix("model.")
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = value
    adapter = folder / "adapter_model.bin"
    if not adapter.is_file():
        adapter = require_file(folder, "adapter_model.safetensors", "the adapter's weights")
    return merge_adapter(weights, read_tensors(adapter), settings)


def _our_name(key: str) -> str:
    key = key.replace("gpt_neox.vision_tower.vision_model.", "vision_tower.")
    key = key.replace("gpt_neox.mm_projector.", "mm_projector.")
    if key.startswith("embed_out.") and key != _LANGUAGE_HEAD:
        key = key.removeprefix("embed_out.")
        if not key.startswith(("norm_after_pool.", "combine.")):
            key = "unet." + key
        key = key.replace(".blocks.0.", ".conv1.").replace(".blocks.1.", ".conv2.")
        key = re.sub(r"\.2\.conv\.", ".2.", key)
    return key


def _their_name(key: str) -> str:
    if key.startswith("vision_tower."):
        return key.replace("vision_tower.", "gpt_neox.vision_tower.vision_model.", 1)
    if key.startswith("mm_projector."):
        return "gpt_neox." + key
    if key.startswith("gpt_neox."):
        return key
    key = key.removeprefix("unet.").replace(".conv1.", ".blocks.0.").replace(".conv2.", ".blocks.1.")
    return "embed_out." + re.sub(r"^((down|up)_modules\.\d+\.2)\.", r"\1.conv.", key)


def _without_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != _LANGUAGE_HEAD and not key.startswith(_HEAD)}


def _towers(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options of vision tower and language model, from the configuration."""
    vision = config["vision_config"]["vision_tower"]
    projector = config["vision_config"]["mm_projector"]["mm_projector_type"]
    if projector != "mlp2x_gelu":
        raise InputError(f"{folder} has mm_projector_type={projector!r}; expected 'mlp2x_gelu'")
    name = vision["vision_model_name_or_path"].lower()
    return {
        "tower": "siglip" if "siglip" in name else "clip",
        "vision": {field: vision[field] for field in _VISION if field in vision},
        "language": {field: config[field] for field in _LANGUAGE if field in config},
    }


def _head(config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """The other options, from the configuration and, where it does not tell the head's sizes, from the weights."""
    head = config["action_head_type"]
    if head != "droid_diffusion":
        raise InputError(f"{folder} has action_head_type={head!r}; expected 'droid_diffusion', the head with a density")
    levels = [key for key in weights if re.fullmatch(r"unet\.down_modules\.\d+\.0\.conv1\.block\.0\.weight", key)]
    step = "unet.diffusion_step_encoder.1.weight"
    if not levels or step not in weights:
        raise InputError(
            f"The weights of {folder} have no diffusion head (embed_out.down_modules, {step}). Imitate first: a "
            "vision-language model alone is read with model_kwargs={base: true}"
        )
    return {
        "action_dim": config["action_dim"],
        "action_horizon": config["chunk_size"],
        "state_dim": config["state_dim"],
        "cameras": 2 if config["concat"] == "token_cat" else 1,
        "down_dims": [weights[key].shape[0] for key in sorted(levels)],
        "step_dim": weights[step].shape[1],
        # What the authors' code does, unless one of our models says otherwise.
        **{
            "image_size": _IMAGE_SIZE,
            "prompt": PROMPT,
            "center_crop": True,
            "bf16_time": True,
            **config.get("sb3_vla", {}),
        },
    }


def _read_statistics(folder: Path) -> dict[str, Tensor]:
    path = next((place / _STATISTICS for place in (folder, folder.parent) if (place / _STATISTICS).is_file()), None)
    if path is None:
        raise NotThereError(
            f"Checkpoint {folder} has no {_STATISTICS} (by what it normalizes), nor has its parent; "
            "copy it from the training's output folder"
        )
    try:
        found = _ArraysOnly(io.BytesIO(path.read_bytes())).load()
        names = _NAMES | {ours: theirs for ours, theirs in _OPTIONAL.items() if theirs in found}
        return {ours: torch.from_numpy(np.asarray(found[theirs], np.float32)) for ours, theirs in names.items()}
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path} is no file of statistics; expected a dictionary of arrays, {', '.join(_NAMES.values())}: {error!r}"
        ) from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain containers and NumPy arrays; whatever else a file names is refused before anything runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        # NumPy 2 moved it.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            from numpy._core import multiarray

            return getattr(multiarray, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
