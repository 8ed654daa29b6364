"""LeRobot's processors: the steps before and after a policy, in ``policy_preprocessor.json`` and
``policy_postprocessor.json``, and the statistics by which two of them normalize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sb3_vla.checkpoints.folders import require_file
from sb3_vla.checkpoints.weights import read_tensors, write_tensors
from sb3_vla.common.errors import InputError
from sb3_vla.common.files import read_json, write_json

IMAGE, STATE, ACTION = "observation.image", "observation.state", "action"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"


def step(name: str, **config: Any) -> dict[str, Any]:
    """A step by its registered name, with its settings."""
    return {"registry_name": name, "config": config}


#: with which every preprocessor begins
FIRST_STEPS = (step("rename_observations_processor", rename_map={}), step("to_batch_processor"))
DEVICE = step("device_processor", device="cpu", float_dtype=None)


def write_processors(
    folder: Path,
    steps: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    norm_map: Mapping[str, str],
    statistics: Mapping[str, Tensor],
) -> None:
    """Write both processors and the statistics.

    :param steps: of the preprocessor, among them an empty :data:`NORMALIZER`.
    :param inputs: features of observations, as in the configuration.
    :param outputs: features of actions.
    :param norm_map: how each type of feature is normalized.
    :param statistics: by ``<feature>.<statistic>``.
    """
    features = {NORMALIZER: {**inputs, **outputs}, UNNORMALIZER: outputs}
    for kind, listed in ((PREPROCESSOR, steps), (POSTPROCESSOR, (step(UNNORMALIZER), DEVICE))):
        written = []
        for index, each in enumerate(listed):
            name = each["registry_name"]
            if name in features:
                file = f"{kind}_step_{index}_{name}.safetensors"
                each = {**step(name, eps=1e-8, features=features[name], norm_map=norm_map), "state_file": file}
                write_tensors(folder / file, statistics)
            written.append(each)
        write_json(folder / f"{kind}.json", {"name": kind, "steps": written})


def read_steps(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The steps of :data:`PREPROCESSOR` or :data:`POSTPROCESSOR`; empty if there is no such file.

    :raises DamagedError: if the file is damaged.
    """
    path = folder / f"{kind}.json"
    return list(read_json(path).get("steps", [])) if path.is_file() else []


def find_step(folder: Path, kind: str, name: str) -> dict[str, Any]:
    """A step by its registered name.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is damaged, or has no such step.
    """
    require_file(folder, f"{kind}.json", "the steps around the policy; LeRobot >= 0.4 writes it")
    for found in read_steps(folder, kind):
        if found.get("registry_name") == name:
            return found
    raise InputError(f"{folder / kind}.json has no step {name!r}; copy it again")


def read_statistics(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics of normalizer and unnormalizer by ``<feature>.<statistic>``; empty for one that names no file.

    :raises FileNotFoundError: if a file is missing.
    :raises ValueError: if a file is damaged, or has not the step.
    """

    def tensors(kind: str, name: str) -> dict[str, Tensor]:
        file = find_step(folder, kind, name).get("state_file")
        return {} if file is None else read_tensors(require_file(folder, file, "statistics to normalize by"))

    return tensors(PREPROCESSOR, NORMALIZER), tensors(POSTPROCESSOR, UNNORMALIZER)
