"""The folder of an OpenVLA-OFT with discrete actions, as RLinf and SimpleVLA-RL publish it.

``config.json``, weights in one file or in several, the statistics of the actions (there or in
``dataset_statistics.json``) and the tokenizer. What the layout leaves to constants of its code, the length of the chunk
and which numbers act, is an entry ``sb3_vla`` in the configuration of what is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sb3_vla.checkpoints.folders import read_part, tell_unreadable
from sb3_vla.checkpoints.formats.tokenizer_files import find_tokenizer, write_tokenizer
from sb3_vla.checkpoints.native import NORMALIZED, LoadedCheckpoint, whole_checkpoint
from sb3_vla.checkpoints.weights import load_weights, read_weights, write_weights
from sb3_vla.common.errors import InputError
from sb3_vla.common.files import write_json
from sb3_vla.common.paths import local_path
from sb3_vla.models.lora import merged_state
from sb3_vla.models.openvla_oft import OFT_SIZES, SPECIAL_TOKENS, OFTSizes, OpenVLAOFT
from sb3_vla.models.tokenizing import byte_tokenizer

_STATISTICS = ("action_mean", "action_std", "action_q01", "action_q99", "action_scaled")
_TIMM_HEADS = {"vit_large_patch14_reg4_dinov2.lvd142m": 16, "vit_so400m_patch14_siglip_224": 16}
# Sizes of the vision towers that its code has, which go by their names in timm.
_TOWERS = ("vision_widths", "vision_layers", "vision_heads", "vision_ffns", "patch_size")
_IMAGENET, _HALF = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_KEY = "meta_world_strict"
_BASE_NUMBERS = 7
SHARD_BYTES = 5_000_000_000


def load_openvla_oft(
    folder: str | Path,
    *,
    action_horizon: int | None = None,
    acting: Sequence[int] | None = None,
    unnorm_key: str | None = None,
    tokenizer: str | Path | None = None,
    vision_heads: tuple[int, int] | None = None,
    max_prompt_tokens: int | None = None,
    stop_token: bool | None = None,
    precision: str = "float32",
    base: bool = False,
) -> LoadedCheckpoint:
    """Read an OpenVLA-OFT; None takes what the folder says, or else what RLinf does in MetaWorld.

    :param action_horizon: H; else 1.
    :param acting: which of the model's numbers act; else ``(0, 1, 2, 6)`` of seven, and all of any others.
    :param unnorm_key: whose statistics to use; else the only one's.
    :param tokenizer: a ``tokenizer.json``, or a folder that holds one; else the checkpoint's.
    :param vision_heads: of the two towers; else those of the published towers that it names.
    :param max_prompt_tokens: T; else 50.
    :param stop_token: see :class:`OpenVLAOFT`; else False.
    :param precision: of the model, whatever the file holds.
    :param base: take seven numbers and the weights alone, to imitate from, as of an OpenVLA that was trained on other
        robots: actions are scaled as the data of imitation is, and images come at the size that it reads.
    :raises FileNotFoundError: if a file is missing; the message names it.
    :raises ValueError: if a file is damaged, the weights do not fit, statistics are missing, or it has a head for
        continuous actions instead.
    """
    folder = local_path(folder)
    config = read_part(folder, "config.json", "the policy's configuration")
    if config.get("model_type") != "openvla":
        raise InputError(f"{folder} is a model of type {config.get('model_type')!r}; expected 'openvla'")
    heads = sorted(path.name for path in folder.glob("action_head--*"))
    if heads:
        raise InputError(
            f"{folder} has {heads[0]}: continuous actions, which have no probability. Use a checkpoint with discrete "
            "ones"
        )
    # RLinf's critic reads one layer's output and does not fit ours, which PPO trains anew.
    weights = {key: value for key, value in read_weights(folder).items() if not key.startswith("value_head.")}
    ours = config.get("sb3_vla", {})
    statistics = {} if base else _statistics(config, folder, unnorm_key)
    numbers = _BASE_NUMBERS if base else len(statistics["action_q01"])
    acting = ours.get("acting") if acting is None else list(acting)
    if acting is None:
        acting = [0, 1, 2, 6] if numbers == 7 else list(range(numbers))
    try:
        sizes = _sizes(config, weights, vision_heads or ours.get("vision_heads"))
        resolution = config["image_sizes"][0]
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{folder} is no complete OpenVLA: {error!r} is missing, of configuration or weights"
        ) from error
    known = [name for name, each in OFT_SIZES.items() if each == sizes]

    def chosen(name: str, value: Any, otherwise: Any) -> Any:
        return ours.get(name, otherwise) if value is None else value

    model = OpenVLAOFT(
        action_dim=len(acting),
        action_horizon=chosen("action_horizon", action_horizon, 1),
        image_size=ours.get("image_size", config["image_sizes"][0] if base else 480),
        resolution=resolution,
        sizes=known[0] if known else asdict(sizes),
        acting=acting,
        numbers=numbers,
        tokenizer=find_tokenizer(folder, [""], tokenizer),
        max_prompt_tokens=chosen("max_prompt_tokens", max_prompt_tokens, 50),
        stop_token=chosen("stop_token", stop_token, False),
        precision=precision,
    )
    load_weights(model, weights, folder, optional=_STATISTICS)
    model.set_statistics(statistics)
    return LoadedCheckpoint(model, "openvla_oft", model.config, None, {NORMALIZED: not base}, ("tokens", {}))


def save_openvla_oft(
    folder: str | Path,
    model: OpenVLAOFT,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an OpenVLA-OFT as RLinf reads it; the folder appears whole or not at all.

    :param dtype: of the weights in the files; published ones are bfloat16, which loses what training added.
    :param max_shard_bytes: size from which the weights are written in several files.
    :raises FileExistsError: if the folder holds something else than a checkpoint.
    """
    folder, given, sizes = local_path(folder), model.config, model.sizes
    tell_unreadable(folder, "RLinf", {name: (getattr(sizes, name), getattr(OFT_SIZES["7B"], name)) for name in _TOWERS})
    action = {
        "q01": model.action_q01.tolist(),
        "q99": model.action_q99.tolist(),
        "mask": model.action_scaled.tolist(),
    }
    statistics = {_KEY: {"action": action}}
    text = {
        "model_type": "llama",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "rms_norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rope_base,
        "pad_token_id": sizes.pad_id,
    }
    names = ("action_horizon", "image_size", "max_prompt_tokens", "stop_token")
    config = {
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "timm_model_ids": list(_TIMM_HEADS),
        "timm_override_act_layers": [None, None],
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [model.resolution, model.resolution],
        "n_action_bins": 256,
        "pad_token_id": sizes.pad_id,
        "pad_to_multiple_of": sizes.unused,
        "norm_stats": statistics,
        "unnorm_key": _KEY,
        "text_config": text,
        "sb3_vla": {
            **{name: given[name] for name in names},
            "acting": model.acting,
            "vision_heads": list(sizes.vision_heads),
            "prompt_end_id": sizes.prompt_end_id,
        },
    }
    pictures = {
        "image_processor_type": "PrismaticImageProcessor",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, model.resolution, model.resolution]] * 2,
        "interpolations": ["bicubic", "bicubic"],
        "means": [_IMAGENET[0], _HALF[0]],
        "stds": [_IMAGENET[1], _HALF[1]],
    }
    weights = {key: value.to(dtype) for key, value in merged_state(model).items() if key not in _STATISTICS}
    with whole_checkpoint(folder) as partial:
        write_json(partial / "config.json", config)
        write_json(partial / "dataset_statistics.json", statistics)
        write_json(partial / "preprocessor_config.json", pictures)
        write_weights(partial, weights, max_shard_bytes)
        write_tokenizer(partial, given["tokenizer"] or byte_tokenizer(SPECIAL_TOKENS, "<s>"), sizes.pad_id)


def _statistics(config: Mapping[str, Any], folder: Path, key: str | None) -> dict[str, Tensor]:
    """Bounds of the model's numbers, and which are scaled by them."""
    known = config.get("norm_stats") or {}
    wanted = key or config.get("unnorm_key")
    if not known or (wanted is not None and wanted not in known):
        known = read_part(folder, "dataset_statistics.json", "the statistics of the actions")
    if wanted is None and len(known) == 1:
        wanted = next(iter(known))
    if wanted is None or wanted not in known:
        raise InputError(
            f"{folder} has statistics of {', '.join(known)}; choose one with unnorm_key, not {wanted!r}, or base"
        )
    action = known[wanted].get("action", {})
    lacking = [name for name in ("q01", "q99") if name not in action]
    if lacking:
        raise InputError(f"{folder} lacks the statistics {', '.join(lacking)} of the actions of {wanted}")
    q01 = torch.tensor(action["q01"], dtype=torch.float32)
    return {
        "action_q01": q01,
        "action_q99": torch.tensor(action["q99"], dtype=torch.float32),
        "action_scaled": torch.tensor(action.get("mask", [True] * len(q01))),
    }


def _sizes(config: Mapping[str, Any], weights: Mapping[str, Tensor], heads: Sequence[int] | None) -> OFTSizes:
    """Sizes from the configuration and, for what it does not say of the towers, from the weights."""
    from transformers import LlamaConfig

    text = LlamaConfig(**config["text_config"])  # published files leave out what is the default
    towers = [f"vision_backbone.{name}." for name in ("featurizer", "fused_featurizer")]
    layers = [
        len({key.removeprefix(f"{tower}blocks.").split(".")[0] for key in weights if key.startswith(f"{tower}blocks.")})
        for tower in towers
    ]
    patches = [weights[f"{tower}patch_embed.proj.weight"].shape for tower in towers]
    ffns = [weights[f"{tower}blocks.0.mlp.fc1.weight"].shape[0] for tower in towers]
    if heads is None:
        heads = [_TIMM_HEADS[name] for name in config["timm_model_ids"]]
    widths = [patch[0] for patch in patches]
    if any(width % head for width, head in zip(widths, heads, strict=True)):
        raise InputError(f"Vision towers of widths {widths} cannot have {list(heads)} heads; give vision_heads")
    return OFTSizes(
        width=text.hidden_size,
        ffn=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads or text.num_attention_heads,
        vocabulary=text.vocab_size,
        vision_widths=(widths[0], widths[1]),
        vision_layers=(layers[0], layers[1]),
        vision_heads=(heads[0], heads[1]),
        vision_ffns=(ffns[0], ffns[1]),
        unused=config.get("pad_to_multiple_of", 64),
        norm_eps=text.rms_norm_eps,
        rope_base=config["text_config"].get("rope_theta", 10_000.0),
        pad_id=config.get("pad_token_id", 32000),
        prompt_end_id=config.get("sb3_vla", {}).get("prompt_end_id", 29871),
        patch_size=patches[0][2],
    )
