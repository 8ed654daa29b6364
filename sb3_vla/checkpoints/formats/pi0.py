"""Checkpoints of pi0 and pi0.5 as others publish them: openpi, LeRobot, RLinf and transformers; openpi's and LeRobot's
are written as well."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sb3_vla.checkpoints.folders import HUB, local_folder, new_folder, tell_unreadable
from sb3_vla.checkpoints.formats import pi0_lerobot
from sb3_vla.checkpoints.native import LoadedCheckpoint
from sb3_vla.checkpoints.weights import check_weights, read_weights, tensor_names, weight_files, write_weights
from sb3_vla.common.errors import InputError, NotThereError
from sb3_vla.common.files import read_json, write_json
from sb3_vla.common.paths import local_path
from sb3_vla.models import Pi0, Pi05
from sb3_vla.models.gemma import GemmaSize
from sb3_vla.models.lora import merged_state
from sb3_vla.models.normalization import STATISTICS
from sb3_vla.models.pi0 import EXPERT_SIZE, PALIGEMMA, VLM_SIZE, VOCABULARY, VisionSize
from sb3_vla.models.prompts import find_tokenizer_file

P = "paligemma_with_expert.paligemma."
X = "paligemma_with_expert.gemma_expert."
EMBEDDING, TIED = f"{P}model.language_model.embed_tokens.weight", f"{P}lm_head.weight"
# Heads of the expert over words that it never says, and an embedding that it never reads.
UNUSED = (f"{X}lm_head.weight", f"{X}model.embed_tokens.weight")
#: how large the images of RLinf's and LeRobot's MetaWorld data are
_RENDER_SIZE = 480
#: what RLinf's environments show
_RLINF_VIEW = {"camera": "corner2", "crop": None}
#: as ``norm_stats``, for a model that was not yet trained on data of the environment
UNNORMALIZED = "none"
#: types of LeRobot's configurations, and our names of the models
NAMES: dict[str, type[Pi0]] = {"pi0": Pi0, "pi05": Pi05}
_RL_HEADS = ("value_head.", "noise_head.")
_KNOWN_NAMES = re.compile(r".*(paligemma_with_expert|vlm\.language_model|action_in_proj)")
# Euler steps to an action: openpi's and LeRobot's default, and RLinf's in MetaWorld.
_STEPS, _RLINF_STEPS = 10, 5


def load_pi0(source: str | Path, options: Mapping[str, Any] | None = None) -> LoadedCheckpoint:
    """Read a checkpoint of pi0 or pi0.5.

    :param source: folder, or ``hf://owner/name`` or ``hf://owner/name@revision`` on the Hugging Face hub.
    :param options: options of the model that differ from what the checkpoint says, above all ``tokenizer`` where the
        folder has none, and with openpi's and RLinf's, which do not say them, ``action_horizon`` and
        ``discrete_state_input``; and ``norm_stats``, the path of a ``norm_stats.json`` where the folder has none, or
        ``"none"`` for a base model.
    :return: with RLinf's value head, for whoever has such a critic, and its noise head as a ``flow_noise``.
    :raises FileNotFoundError: if weights or statistics are missing.
    :raises ValueError: if the weights are no pi0's or pi0.5's; the message says what is missing and unexpected.
    """
    folder = local_folder(source)
    given = dict(options or {})
    norm_stats = given.pop("norm_stats", None)
    config = _config(folder)
    found = _read(folder)
    name = config["type"] if config.get("type") in NAMES else found.name
    statistics: dict[str, Tensor] | None
    if config.get("type") in NAMES:
        layout, said, statistics = "lerobot", *pi0_lerobot.read(folder, config)
    else:
        layout = "rlinf" if found.heads else "transformers" if "model_type" in config else "openpi"
        said, statistics = _openpi_options(config), None
    if norm_stats is not None or statistics is None:
        statistics = _norm_stats(folder, norm_stats)
    tokenizer = find_tokenizer_file(folder)
    if tokenizer is not None and not Path(said.get("tokenizer", PALIGEMMA)).is_dir():
        said["tokenizer"] = str(tokenizer.resolve())
    for part in ("vision", "vlm", "expert"):
        given[part] = {**found.sizes[part], **given.get(part, {})}
    chosen = {**found.sizes, **said, **given}
    if layout != "lerobot" and statistics:  # where openpi says nothing of the data's width, its statistics do
        chosen = {**_widths(statistics, chosen["padded_dim"]), **chosen}
    model = _build(name, chosen, folder)
    hint = (
        f"The names look like {found.name}." if found.name != name else "The file is incomplete, or of another model."
    )
    check_weights(model, found.weights, folder, tuple(name for name, _ in model.named_buffers()), hint)
    device = torch.get_default_device()
    weights = {key: value.to(device, torch.float32) for key, value in found.weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if statistics:
        _set_statistics(model, statistics, folder)
    view = {"render_size": _RENDER_SIZE, **(_RLINF_VIEW if layout == "rlinf" else {})}
    notes = {"layout": layout, "view": view, "normalized": bool(statistics)}
    value_head = {key.removeprefix("value_head."): t for key, t in found.heads.items() if key.startswith("value_head.")}
    steps = _RLINF_STEPS if found.heads else config.get("num_inference_steps", _STEPS)
    distribution, noise_head = _distribution(found.heads, steps)
    return LoadedCheckpoint(model, name, model.config, value_head or None, notes, distribution, noise_head)


def is_pi0(source: str | Path) -> bool:
    """Whether this is a folder, or a repository on the hub, that :func:`load_pi0` should be asked to read."""
    if str(source).startswith(HUB):
        return True
    folder = local_path(source)
    try:
        config = _config(folder)
    except ValueError:  # whoever wrote it, our own reader says best what is wrong
        return False
    if "format" in config:
        return False
    if config.get("type") in NAMES:
        return True
    names: list[str] = []
    with suppress(ValueError, OSError):  # of a file that is damaged or not there, which its reader tells
        for path in weight_files(folder):
            names += tensor_names(path)
    return any(_KNOWN_NAMES.match(name) for name in names)


def save_lerobot(folder: str | Path, model: Pi0) -> None:
    """Write a model as LeRobot reads it, so that it acts the same there.

    LeRobot resizes images in its own way; a model with openpi's convention will see slightly different ones.

    :raises FileExistsError: if the folder is there and not empty.
    """
    name = "pi05" if isinstance(model, Pi05) else "pi0"
    tell_unreadable(folder, "LeRobot", sizes_beside_the_published(model))
    with new_folder(folder) as partial:
        weights = {f"model.{key}": tensor for key, tensor in _openpi_weights(model).items()}
        write_weights(partial, weights)
        pi0_lerobot.write(partial, name, model, statistics_for(model, "lerobot"), local_path(folder))


def save_openpi(folder: str | Path, model: Pi0, asset_id: str = "lerobot/metaworld_mt50") -> None:
    """Write a model as openpi reads it, with its statistics under ``assets/<asset_id>``.

    :raises ValueError: for a normalization that openpi does not have.
    :raises FileExistsError: if the folder is there and not empty.
    """
    if {model.state_scheme, model.action_scheme} != {model.scheme}:
        raise InputError(
            f"openpi normalizes {type(model).__name__} by {model.scheme}; this one has state_scheme="
            f"{model.state_scheme!r} and action_scheme={model.action_scheme!r}. Write LeRobot's layout instead."
        )
    tell_unreadable(folder, "openpi", sizes_beside_the_published(model))
    with new_folder(folder) as partial:
        write_weights(partial, _openpi_weights(model))
        config = {
            "action_dim": model.latent_dim,
            "action_horizon": model.action_horizon,
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "precision": "float32",
        }
        write_json(partial / "config.json", config)
        found = statistics_for(model, "openpi")
        stats = {
            theirs: {key: found[f"{ours}_{key}"].tolist() for key in ("mean", "std", "q01", "q99")}
            for theirs, ours in (("state", "state"), ("actions", "action"))
        }
        (partial / "assets" / asset_id).mkdir(parents=True)
        write_json(partial / "assets" / asset_id / "norm_stats.json", {"norm_stats": stats})


def statistics_for(model: Pi0, convention: str) -> dict[str, Tensor]:
    """Statistics with which another convention normalizes as the model does: what openpi adds to a deviation or an
    interval goes into it."""
    shift = {"openpi": 1e-6, "lerobot": 0.0}
    difference = shift[model.convention] - shift[convention]
    found = {}
    for part in ("state", "action"):
        for statistic in STATISTICS:
            widened = statistic in ("std", "max", "q99")
            value = getattr(model, f"{part}_{statistic}").cpu()
            found[f"{part}_{statistic}"] = value + difference if widened and difference else value.clone()
    return found


@dataclass
class _Found:
    """What a folder's weights are.

    :param name: ``pi0`` or ``pi05``, by the names.
    :param weights: by our names, without what is not used.
    :param sizes: options of the model that the shapes tell.
    :param heads: RLinf's value and noise heads.
    """

    name: str
    weights: dict[str, Tensor]
    sizes: dict[str, Any]
    heads: dict[str, Tensor]


def _read(folder: Path) -> _Found:
    if not weight_files(folder):
        jax = (folder / "params").is_dir() or (folder / "_METADATA").is_file()
        advice = "It looks like openpi's JAX layout: convert it with openpi's convert_jax_model_to_pytorch.py. "
        raise NotThereError(f"{folder} has no *.safetensors and no full_weights.pt. {advice if jax else ''}")
    raw = read_weights(folder)
    named = {canonical_name(key): tensor for key, tensor in raw.items()}
    heads = {key: tensor for key, tensor in named.items() if key.startswith(_RL_HEADS)}
    weights = {key: tensor for key, tensor in named.items() if key not in heads and key not in UNUSED}
    tied = weights.pop(TIED, None)
    if EMBEDDING not in weights and tied is not None:  # where both are there the embedding is what was trained
        weights[EMBEDDING] = tied
    guess = _guess(raw, weights)
    if guess not in NAMES:
        shown = ", ".join(list(raw)[:3])
        raise InputError(f"{folder} holds no pi0 or pi0.5 that can be read: it looks like {guess}. It has {shown}, ...")
    try:
        sizes = _sizes(weights)
    except KeyError as error:
        raise InputError(f"{folder} is incomplete: {error.args[0]} is missing among {len(weights)} weights") from error
    return _Found(guess, weights, sizes, heads)


def canonical_name(name: str) -> str:
    """A weight's name in openpi's layout, from any of the layouts."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    while name.startswith(("module.", "model.")):
        name = name.partition(".")[2]
    renamed = {
        "vlm.": f"{P}model.",
        "dit.": f"{X}model.",
        "embed_action_time.": "",
        f"{P}model.language_model.model.": f"{P}model.language_model.",
    }
    for theirs, ours in renamed.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    tower = f"{P}model.vision_tower."
    if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
        name = f"{tower}vision_model." + name.removeprefix(tower)
    return name


def _guess(raw: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    if any("normalize_inputs." in key or f"{P}language_model." in key for key in raw):
        return "LeRobot's pi0 before version 0.4, another implementation; take a checkpoint of 0.4 or later"
    if any(key.startswith(("img.", "llm.")) for key in weights):
        return "RLinf's own package (openpi_rlinf) with fused projections; export it in openpi's layout"
    if any("vlm_with_expert." in key for key in raw):
        return "SmolVLA"
    if not any(key.startswith(P) for key in weights):
        return "another model"
    if "time_mlp_in.weight" in weights:
        return "pi05"
    return "pi0"


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of the model, from the shapes of its weights."""
    vision, language = f"{P}model.vision_tower.vision_model.", f"{P}model.language_model."
    vision_width, _, patch, _ = weights[f"{vision}embeddings.patch_embedding.weight"].shape
    patches = len(weights[f"{vision}embeddings.position_embedding.weight"])
    return {
        "vision": {
            "width": vision_width,
            "depth": _depth(weights, f"{vision}encoder.layers."),
            "mlp": len(weights[f"{vision}encoder.layers.0.mlp.fc1.weight"]),
            "patch": patch,
        },
        "vlm": _tower(weights, language),
        "expert": _tower(weights, f"{X}model."),
        "vocabulary": len(weights[EMBEDDING]),
        "image_size": math.isqrt(patches) * patch,
        "padded_dim": len(weights["action_out_proj.weight"]),
    }


def _tower(weights: Mapping[str, Tensor], prefix: str) -> dict[str, int]:
    query = weights[f"{prefix}layers.0.self_attn.q_proj.weight"]
    head_dim = len(query) // GemmaSize.heads  # which all published ones have
    return {
        "width": query.shape[1],
        "mlp": len(weights[f"{prefix}layers.0.mlp.up_proj.weight"]),
        "depth": _depth(weights, f"{prefix}layers."),
        "head_dim": head_dim,
        "kv_heads": len(weights[f"{prefix}layers.0.self_attn.k_proj.weight"]) // head_dim,
    }


def _depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max((int(key[len(prefix) :].partition(".")[0]) for key in weights if key.startswith(prefix)), default=0)


def _build(name: str, options: dict[str, Any], folder: Path) -> Pi0:
    """The model on the meta device but for its buffers."""
    try:
        with torch.device("meta"):
            model = NAMES[name](**options)
    except TypeError as error:
        raise InputError(f"{folder}: {name} does not take these options ({error})") from error
    reference = NAMES[name](**{**options, **_SMALL})
    for key, buffer in reference.named_buffers():
        parent, _, own = key.rpartition(".")
        persistent = key in reference.state_dict()
        if own == "position_ids":
            count = model.get_submodule(parent).get_buffer(own).shape[-1]
            buffer = torch.arange(count).expand(1, -1)
        model.get_submodule(parent).register_buffer(own, buffer, persistent=persistent)
    return model


# The same buffers as a model of any size.
_SMALL: dict[str, Any] = {
    "vision": {"width": 8, "depth": 1, "heads": 1, "mlp": 8, "patch": 14},
    "vlm": {"width": 8, "mlp": 8, "depth": 1, "heads": 1, "head_dim": 8},
    "expert": {"width": 8, "mlp": 8, "depth": 1, "heads": 1, "head_dim": 8},
    "vocabulary": 1,
    "image_size": 14,
}


def _config(folder: Path) -> dict[str, Any]:
    """The configuration, of which openpi's older and RLinf's folders have none."""
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _openpi_options(config: Mapping[str, Any]) -> dict[str, Any]:
    horizon = config.get("action_horizon", config.get("chunk_size"))
    return {} if horizon is None else {"action_horizon": horizon}


def _norm_stats(folder: Path, given: str | Path | None) -> dict[str, Tensor]:
    """Statistics of a ``norm_stats.json``, by our names; empty for none."""
    if given == UNNORMALIZED:
        return {}
    found = [local_path(given)] if given is not None else sorted(folder.rglob("norm_stats.json"))
    if len(found) != 1 or not found[0].is_file():
        shown = (
            f"{given} is not there" if given is not None else f"it has {[str(p.relative_to(folder)) for p in found]}"
        )
        raise NotThereError(
            f"{folder} needs one norm_stats.json, by which its states and actions are normalized; {shown}. Give "
            f'norm_stats=PATH among the model\'s options, or norm_stats="{UNNORMALIZED}" for a base model to fine-tune'
        )
    groups = read_json(found[0])
    groups = groups.get("norm_stats", groups)
    statistics = {}
    for theirs, ours in (("state", "state"), ("actions", "action")):
        if theirs not in groups:
            raise InputError(f"{found[0]} has no statistics of {theirs!r}; it has {', '.join(groups)}")
        for statistic, values in groups[theirs].items():
            if values is not None:
                statistics[f"{ours}_{statistic}"] = torch.tensor(values, dtype=torch.float32)
    return statistics


def _widths(statistics: Mapping[str, Tensor], padded_dim: int) -> dict[str, int]:
    """Widths of the data, unless its statistics were padded."""
    widths = {f"{name}_dim": len(statistics[f"{name}_mean"]) for name in ("state", "action")}
    return {key: width for key, width in widths.items() if width < padded_dim}


def _set_statistics(model: Pi0, statistics: Mapping[str, Tensor], folder: Path) -> None:
    """Statistics into a model; those of padded data are cut to its width."""
    needed = {"mean_std": ("mean", "std"), "quantiles": ("q01", "q99"), "min_max": ("min", "max"), "identity": ()}
    for name, scheme in (("state", model.state_scheme), ("action", model.action_scheme)):
        size = model.config[f"{name}_dim"]
        lacking = [key for key in needed[scheme] if len(statistics.get(f"{name}_{key}", ())) < size]
        if lacking:
            raise InputError(
                f"{folder} normalizes the {name} by {scheme} and lacks {', '.join(lacking)} of {size} numbers; "
                f"it has {', '.join(f'{key} {tuple(value.shape)}' for key, value in statistics.items())}"
            )
        known = {
            key: statistics[key] for key in (f"{name}_{statistic}" for statistic in STATISTICS) if key in statistics
        }
        model.set_statistics({key: value[:size] for key, value in known.items() if len(value) >= size})


def _distribution(
    heads: Mapping[str, Tensor], steps: int
) -> tuple[tuple[str, dict[str, Any]], dict[str, Tensor] | None]:
    """The flow itself, or with RLinf's noise head, a perceptron with tanh, ``flow_noise`` and its weights."""
    layers = [key for key in heads if key.startswith("noise_head.") and key.endswith(".weight")]
    if not layers:
        return ("flow_ode", {"denoising_steps": steps}), None
    weights = {}
    prefix = "noise_head.mlp_logvar.moduleList."
    for index in range(len(layers)):
        for kind in ("weight", "bias"):
            weights[f"noise_head.{2 * index}.{kind}"] = heads[f"{prefix}{index}.linear_1.{kind}"].float()
    widths = [len(weights[f"noise_head.{2 * index}.bias"]) for index in range(len(layers) - 1)]
    noise_range = [math.exp(float(heads[f"noise_head.logvar_{end}"]) / 2) for end in ("min", "max")]
    options = {"widths": widths, "noise_range": noise_range, "denoising_steps": steps}
    return ("flow_noise", options), weights


def sizes_beside_the_published(model: Pi0) -> dict[str, tuple[Any, Any]]:
    """What neither layout has a word for, see :func:`tell_unreadable`."""
    published: dict[str, VisionSize | GemmaSize] = {"vision": VisionSize(), "vlm": VLM_SIZE, "expert": EXPERT_SIZE}
    sizes = {
        f"{part}.{name}": (model.config[part][name], value)
        for part, size in published.items()
        for name, value in asdict(size).items()
    }
    return {**sizes, "vocabulary": (model.config["vocabulary"], VOCABULARY)}


def _openpi_weights(model: Pi0) -> dict[str, Tensor]:
    """All weights under openpi's names. The embedding is tied to PaliGemma's head, whose name alone is written, as
    safetensors does it; openpi and LeRobot also want the expert's head, which they never use."""
    buffers = dict(model.named_buffers())
    weights = {name: tensor for name, tensor in merged_state(model).items() if name not in buffers}
    weights[TIED] = weights.pop(EMBEDDING)
    vocabulary, width = model.config["vocabulary"], model.config["expert"]["width"]
    weights[UNUSED[0]] = torch.zeros(vocabulary, width, dtype=torch.bfloat16)
    return weights
