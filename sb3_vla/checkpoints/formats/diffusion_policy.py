"""LeRobot's folder of a Diffusion Policy: ``config.json``, ``model.safetensors`` and the processors' files.

Read: the layout with processor files (LeRobot >= 0.4) and the one before it, with statistics among the weights; one
camera, ResNet-18 or -34. Written: the former, with one encoder for all cameras. A model that reads instructions, which
is ours, has an entry ``sb3_vla`` in its configuration; LeRobot loads neither it nor a ResNet of other widths, and a
warning says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sb3_vla.checkpoints.folders import read_part, tell_unreadable
from sb3_vla.checkpoints.formats.lerobot import (
    ACTION,
    DEVICE,
    FIRST_STEPS,
    IMAGE,
    NORMALIZER,
    STATE,
    read_statistics,
    step,
    write_processors,
)
from sb3_vla.checkpoints.native import LoadedCheckpoint, whole_checkpoint
from sb3_vla.checkpoints.weights import load_weights, read_weights, write_weights
from sb3_vla.common.errors import InputError
from sb3_vla.common.files import write_json
from sb3_vla.common.paths import local_path
from sb3_vla.models.diffusion import NORMALIZATIONS, SCHEDULES
from sb3_vla.models.diffusion_policy import RESNETS, DiffusionPolicy
from sb3_vla.models.lora import merged_state
from sb3_vla.models.sizes import published_options

_PARTS = ("rgb_encoder.", "unet.", "instruction_encoder.")
_MOMENTS = ("mean", "std", "min", "max")
_FEATURE_TYPES = {"image": "VISUAL", "state": "STATE", "action": "ACTION"}


def load_diffusion_policy(folder: str | Path) -> LoadedCheckpoint:
    """Read a Diffusion Policy as LeRobot publishes it.

    :raises FileNotFoundError: if a file is missing; the message names it.
    :raises ValueError: if a file is damaged, the weights do not fit, statistics are missing, or the policy needs what
        this model has not: other observations, other networks.
    """
    folder = local_path(folder)
    config = read_part(folder, "config.json", "the policy's configuration")
    weights = read_weights(folder)
    try:
        image = _one_camera(config, folder)
        buffers = {key: weights.pop(key) for key in [*weights] if not key.startswith("diffusion.")}
        weights = {_our_name(key): value for key, value in weights.items()}
        options = _options(config, image, weights, folder)
        distribution = _sampler(config)
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{folder / 'config.json'} is no complete Diffusion Policy configuration: {error!r}"
        ) from error
    model = DiffusionPolicy(**options)
    load_weights(model, weights, folder, optional=("image_", "state_", "action_"))
    if not buffers:
        before, after = read_statistics(folder)
        buffers = {**before, **after}
    _load_statistics(model, buffers, image, folder)
    return LoadedCheckpoint(model, "diffusion_policy", model.config, None, {}, distribution)


def save_diffusion_policy(
    folder: str | Path,
    model: DiffusionPolicy,
    distribution: tuple[str, Mapping[str, Any]] = ("ddim", {"denoising_steps": 10}),
) -> None:
    """Write a Diffusion Policy as LeRobot does; the folder appears whole or not at all.

    :param distribution: name and options of the sampler: its kind, steps and clipping go into the configuration.
    :raises ValueError: for a distribution that is no sampler of a diffusion.
    :raises FileExistsError: if the folder holds something else than a checkpoint.
    """
    name, sampler = distribution
    if name not in ("ddpm", "ddim"):
        raise InputError(f"distribution={name!r}; expected 'ddpm' or 'ddim', the samplers that LeRobot knows")
    size, clip = model.image_size[0], sampler.get("clip_sample", 1.0)
    folder, given = local_path(folder), model.config
    horizon, multiple = given["action_horizon"], 2 ** len(given["down_dims"])
    tell_unreadable(
        folder,
        "LeRobot",
        {
            "widths": (tuple(given["widths"]), published_options("diffusion_policy")["widths"]),
            "instruction_dim": (given["instruction_dim"], 0),
            "action_horizon": (horizon, horizon if horizon % multiple == 0 else f"a multiple of {multiple}"),
        },
    )
    norm_map = {kind: given["normalization"][feature].upper() for feature, kind in _FEATURE_TYPES.items()}
    inputs = {
        IMAGE: {"type": "VISUAL", "shape": [3, size, size]},
        STATE: {"type": "STATE", "shape": [given["state_dim"]]},
    }
    outputs = {ACTION: {"type": "ACTION", "shape": [given["action_dim"]]}}
    cropped = model.crop_size != size
    config = {
        "type": "diffusion",
        "n_obs_steps": model.n_obs_steps,
        "input_features": inputs,
        "output_features": outputs,
        "device": "cpu",
        "use_amp": False,
        "horizon": model.action_horizon,
        "n_action_steps": model.action_horizon - model.first_action,
        "normalization_mapping": norm_map,
        "drop_n_last_frames": 0,
        "vision_backbone": given["resnet"],
        "resize_shape": [size, size],
        # LeRobot takes the whole part of side times ratio.
        "crop_ratio": (model.crop_size + 0.5) / size if cropped else 1.0,
        "crop_shape": [model.crop_size] * 2 if cropped else None,
        "crop_is_random": True,
        "pretrained_backbone_weights": None,
        "use_group_norm": given["norm"] == "group",
        "spatial_softmax_num_keypoints": given["keypoints"],
        "use_separate_rgb_encoder_per_camera": False,
        "down_dims": given["down_dims"],
        "kernel_size": given["kernel_size"],
        "n_groups": given["groups"],
        "diffusion_step_embed_dim": given["step_dim"],
        "use_film_scale_modulation": given["film_scale"],
        "noise_scheduler_type": name.upper(),
        "num_train_timesteps": given["timesteps"],
        "beta_schedule": given["schedule"],
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": given["prediction"],
        "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else clip,
        "num_inference_steps": sampler.get("denoising_steps", 10),
        "do_mask_loss_for_padding": given["mask_padding"],
        **({"sb3_vla": {"instruction_dim": given["instruction_dim"]}} if given["instruction_dim"] else {}),
    }
    statistics = {
        f"{feature}.{moment}": getattr(model, f"{ours}_{moment}")
        for feature, ours in ((ACTION, "action"), (IMAGE, "image"), (STATE, "state"))
        for moment in _MOMENTS
    }
    parts = {key: value for key, value in merged_state(model).items() if key.startswith(_PARTS)}
    with whole_checkpoint(folder) as partial:
        write_json(partial / "config.json", config)
        write_weights(partial, {f"diffusion.{key}": value for key, value in parts.items()})
        steps = [*FIRST_STEPS, DEVICE, step(NORMALIZER)]
        write_processors(partial, steps, inputs, outputs, norm_map, statistics)


def _one_camera(config: Mapping[str, Any], folder: Path) -> str:
    """Name of the image among the inputs, which must be that, the state and nothing else."""
    kinds = {name: feature["type"] for name, feature in config["input_features"].items()}
    images = [name for name, kind in kinds.items() if kind == "VISUAL"]
    if len(images) != 1 or kinds.get(STATE) != "STATE" or len(kinds) != 2:
        raise InputError(
            f"{folder} reads {', '.join(kinds)}; expected one camera and {STATE}, which is what the environment gives"
        )
    shape = config["input_features"][images[0]]["shape"]
    if shape[1] != shape[2] and not config.get("resize_shape"):
        raise InputError(f"{folder} reads pictures of shape {shape}; expected square ones")
    return images[0]


def _our_name(key: str) -> str:
    """A separate encoder for each camera has a number, with one camera too (LeRobot's later default)."""
    return key.removeprefix("diffusion.").replace("rgb_encoder.0.", "rgb_encoder.", 1)


def _options(config: Mapping[str, Any], image: str, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """The model's options from LeRobot's configuration and, for the ResNet's widths, from the weights."""

    def known(name: str, values: Any) -> Any:
        if config[name] not in values:
            raise InputError(f"{folder} has {name}={config[name]!r}; expected one of {', '.join(values)}")
        return config[name]

    stems = [f"rgb_encoder.backbone.{stage}.0.conv1.weight" for stage in (4, 5, 6, 7)]
    missing = [stem for stem in stems if stem not in weights]
    if missing:
        raise InputError(f"{folder / 'model.safetensors'} has no diffusion.{missing[0]}; it is no Diffusion Policy")
    resize, crop = config.get("resize_shape"), config.get("crop_shape")
    size = (resize or config["input_features"][image]["shape"][1:])[0]
    if resize:  # the crop then follows from the ratio
        ratio = config.get("crop_ratio", 1.0)
        crop = [int(side * ratio) for side in resize] if ratio < 1 else None
    if (resize and resize[0] != resize[1]) or (crop and crop[0] != crop[1]):
        raise InputError(f"{folder} has resize_shape={resize} and crop_shape={crop}; expected squares")
    modes = {feature: config["normalization_mapping"][kind].lower() for feature, kind in _FEATURE_TYPES.items()}
    for mode in modes.values():
        if mode not in NORMALIZATIONS:
            raise InputError(f"{folder} normalizes by {mode!r}; expected one of {', '.join(NORMALIZATIONS)}")
    return {
        "action_dim": config["output_features"][ACTION]["shape"][0],
        "action_horizon": config["horizon"],
        "state_dim": config["input_features"][STATE]["shape"][0],
        "image_size": size,
        "crop_size": crop[0] if crop else None,
        "n_obs_steps": config["n_obs_steps"],
        "instruction_dim": config.get("sb3_vla", {}).get("instruction_dim", 0),
        "resnet": known("vision_backbone", RESNETS),
        "widths": [weights[stem].shape[0] for stem in stems],
        "norm": "group" if config["use_group_norm"] else "batch",
        "keypoints": config["spatial_softmax_num_keypoints"],
        "down_dims": config["down_dims"],
        "kernel_size": config["kernel_size"],
        "groups": config["n_groups"],
        "step_dim": config["diffusion_step_embed_dim"],
        "film_scale": config["use_film_scale_modulation"],
        "prediction": config["prediction_type"],
        "timesteps": config["num_train_timesteps"],
        "schedule": known("beta_schedule", SCHEDULES),
        "normalization": modes,
        "mask_padding": config.get("do_mask_loss_for_padding", False),
    }


def _sampler(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The action distribution that samples as LeRobot does, but for the floor of its noise."""
    return config["noise_scheduler_type"].lower(), {
        "denoising_steps": config["num_inference_steps"] or config["num_train_timesteps"],
        "clip_sample": config["clip_sample_range"] if config["clip_sample"] else None,
    }


def _load_statistics(model: DiffusionPolicy, found: Mapping[str, Tensor], image: str, folder: Path) -> None:
    needed = {"identity": (), "mean_std": ("mean", "std"), "min_max": ("min", "max")}
    taken = {}
    for ours, feature in (("image", image), ("state", STATE), ("action", ACTION)):
        before = feature.replace(".", "_")  # the older layout
        for moment in _MOMENTS:
            names = (
                f"{feature}.{moment}",
                f"normalize_inputs.buffer_{before}.{moment}",
                f"unnormalize_outputs.buffer_{before}.{moment}",
            )
            value = next((found[name] for name in names if name in found), None)
            if value is not None:
                taken[f"{ours}_{moment}"] = value.float()
            elif moment in needed[model.normalization[ours]]:
                raise InputError(
                    f"{folder} has no {moment} of {feature}, by which it normalizes ({model.normalization[ours]}); "
                    f"expected {names[0]} in a processor's file, found {sorted(found)}"
                )
    model.set_statistics(taken)
