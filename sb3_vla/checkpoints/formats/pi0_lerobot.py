"""LeRobot's configuration and processors of pi0 and pi0.5, read and written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

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
    read_steps,
    step,
    write_processors,
)
from sb3_vla.checkpoints.formats.tokenizer_files import TOKENIZER, beginning_with, lerobot_step, write_tokenizer
from sb3_vla.common.errors import InputError
from sb3_vla.common.files import write_json
from sb3_vla.models import Pi0, Pi05
from sb3_vla.models.normalization import STATISTICS
from sb3_vla.models.pi0 import PALIGEMMA
from sb3_vla.models.prompts import BOS, is_hub_name, local_tokenizer_file, tokenizer_file

_SCHEMES = {"MEAN_STD": "mean_std", "QUANTILES": "quantiles", "MIN_MAX": "min_max", "IDENTITY": "identity"}
_FEATURES = {"state": STATE, "action": ACTION}
_STATE_PROMPT = "pi05_prepare_state_tokenizer_processor_step"


def read(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Options of the model, and the statistics by our names; None where the folder has no processors.

    :param config: contents of ``config.json``.
    :raises ValueError: for what this package cannot do, such as relative actions.
    """
    if config.get("use_relative_actions"):
        raise InputError(f"{folder} predicts relative actions (use_relative_actions); MetaWorld's are the model's own")
    periods = config.get("min_period", 4e-3), config.get("max_period", 4.0)
    if periods != (4e-3, 4.0):
        raise InputError(f"{folder} embeds time with periods of {periods}; only (0.004, 4.0) is known")
    options: dict[str, Any] = {"convention": "lerobot"}
    named = {"action_horizon": "chunk_size", "prompt_tokens": "tokenizer_max_length"}
    options |= {ours: config[theirs] for ours, theirs in named.items() if theirs in config}
    for name, features in (("state", config.get("input_features")), ("action", config.get("output_features"))):
        shape = ((features or {}).get(_FEATURES[name]) or {}).get("shape")
        if shape:
            options[f"{name}_dim"] = shape[0]
    steps = read_steps(folder, PREPROCESSOR)
    if not steps:
        return options, None
    tokenizer = _tokenizer(folder, steps)
    if tokenizer is not None:
        options["tokenizer"] = tokenizer
    if config["type"] == "pi05":
        written = [each for each in steps if each.get("registry_name") == _STATE_PROMPT]
        options["discrete_state_input"] = bool(written)
        # Version 0.4 wrote the padded state; what came after it knows relative actions and writes the real numbers.
        if written and "use_relative_actions" not in config:
            options["prompt_state_dim"] = config.get("max_state_dim", 32)
    normalizer = find_step(folder, PREPROCESSOR, NORMALIZER)
    norm_map = normalizer.get("config", {}).get("norm_map", config.get("normalization_mapping", {}))
    for name in _FEATURES:
        scheme = norm_map.get(name.upper(), "IDENTITY")
        if scheme not in _SCHEMES:
            raise InputError(f"{folder} normalizes the {name} by {scheme!r}; known: {', '.join(_SCHEMES)}")
        options[f"{name}_scheme"] = _SCHEMES[scheme]
    before, after = read_statistics(folder)
    # What comes out is what the environment gets, should the two differ.
    tensors = {**before, **{key: value for key, value in after.items() if key.startswith(f"{ACTION}.")}}
    statistics = {
        f"{ours}_{key}": tensors[f"{feature}.{key}"].float().flatten()
        for ours, feature in _FEATURES.items()
        for key in STATISTICS
        if f"{feature}.{key}" in tensors
    }
    return options, statistics


def write(folder: Path, name: str, model: Pi0, statistics: Mapping[str, Tensor], final: Path) -> None:
    """Write ``config.json``, both processors with their statistics, and the tokenizer where it is on this machine.

    :param name: ``pi0`` or ``pi05``.
    :param statistics: by our names.
    :param final: the folder's path when it is whole.
    """
    scheme_names = {ours: theirs for theirs, ours in _SCHEMES.items()}
    norm_map = {
        "VISUAL": "IDENTITY",
        "STATE": scheme_names[model.state_scheme],
        "ACTION": scheme_names[model.action_scheme],
    }
    inputs = {
        IMAGE: {"type": "VISUAL", "shape": [3, 480, 480]},
        STATE: {"type": "STATE", "shape": [model.config["state_dim"]]},
    }
    outputs = {ACTION: {"type": "ACTION", "shape": [model.action_dim]}}
    config = {
        "type": name,
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "float32",
        "chunk_size": model.action_horizon,
        "n_action_steps": model.action_horizon,
        "max_state_dim": model.latent_dim,
        "max_action_dim": model.latent_dim,
        "num_inference_steps": 10,
        "min_period": 4e-3,
        "max_period": 4.0,
        "image_resolution": list(model.image_size),
        "empty_cameras": 0,
        "tokenizer_max_length": model.config["prompt_tokens"],
        "normalization_mapping": norm_map,
    }
    prompt = [step("pi0_new_line_processor")]
    if isinstance(model, Pi05):
        if model.prompt_state_dim is None:
            config["use_relative_actions"] = False
        if model.discrete_state_input:
            prompt = [step(_STATE_PROMPT, max_state_dim=model.prompt_state_dim or model.latent_dim, task_key="task")]
    write_json(folder / "config.json", config)
    reading = {
        "max_length": model.config["prompt_tokens"],
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
    }
    text = _write_tokenizer(folder, model.tokenize.source, reading, final)
    # The prompt of pi0.5 tells the normalized state.
    rest = [step(NORMALIZER), *prompt, text, DEVICE] if name == "pi05" else [*prompt, text, DEVICE, step(NORMALIZER)]
    named = {
        f"{feature}.{key}": statistics[f"{ours}_{key}"] for ours, feature in _FEATURES.items() for key in STATISTICS
    }
    write_processors(folder, [*FIRST_STEPS, *rest], inputs, outputs, norm_map, named)


def _write_tokenizer(folder: Path, source: str, reading: Mapping[str, Any], final: Path) -> dict[str, Any]:
    """The tokenizer into a checkpoint, where it is a file that LeRobot reads, and LeRobot's step with it.

    :param source: see :class:`sb3_vla.models.prompts.PromptTokenizer`.
    :param reading: other settings of the step.
    """
    repository, _, revision = source.partition("@")
    file = local_tokenizer_file(source)
    if file is None and is_hub_name(source) and revision:  # LeRobot takes the newest one of a name
        file = tokenizer_file(source)
    if file is not None and file.suffix == ".json":
        # The class that transformers 5 takes for PaliGemma's has its <bos> from the file alone.
        text = beginning_with(file.read_text(encoding="utf-8"), BOS)
        write_tokenizer(folder / TOKENIZER, text)
        return lerobot_step(reading, text, final, [PALIGEMMA])
    if file is not None or not is_hub_name(source):
        warnings.warn(
            f"LeRobot reads no tokenizer like {source!r}, so {final} names {PALIGEMMA}, which must be the same. Give "
            "tokenizer=FOLDER with tokenizer.json to have it in the checkpoint",
            stacklevel=4,
        )
        repository = PALIGEMMA
    return step("tokenizer_processor", **reading, tokenizer_name=repository)


def _tokenizer(folder: Path, steps: list[dict[str, Any]]) -> str | None:
    """The tokenizer that came with the checkpoint, or the one that its processor names."""
    for each in steps:
        if each.get("registry_name") == "tokenizer_processor":
            name = (each.get("artifacts") or {}).get("tokenizer_name") or each.get("config", {}).get("tokenizer_name")
            if name and (folder / name).is_dir():
                return str((folder / name).resolve())
            return name or None
    return None
