"""Tiny pi0 and pi0.5: the reference vectors' models, a tokenizer, and their checkpoints in every published layout."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor

from sb3_vla.models import Pi0, Pi05

DATA = Path(__file__).parent / "data"
NAMES = {"pi0": Pi0, "pi05": Pi05}
#: sizes of the reference models
TINY_PI0: dict[str, Any] = {
    "image_size": 56,
    "vision": {"width": 48, "depth": 2, "heads": 4, "mlp": 96},
    "vlm": {"width": 64, "mlp": 128, "depth": 3, "head_dim": 16},
    "expert": {"width": 32, "mlp": 64, "depth": 3, "head_dim": 16},
    "vocabulary": 512,
}
#: what no layout says of a tiny vision tower
HEADS = {"vision": {"heads": 4}}
LAYOUTS = ("openpi", "lerobot 0.4", "lerobot", "rlinf sft", "rlinf rl", "sharded")
TRANSFORMERS = "transformers"
P, X = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
STATISTICS: dict[str, dict[str, list[float]]] = {
    "state": {
        "mean": [0.1, 0.6, 0.2, 0.5],
        "std": [0.1, 0.2, 0.05, 0.3],
        "q01": [-0.3, 0.3, 0.0, 0.0],
        "q99": [0.4, 0.9, 0.4, 1.0],
    },
    "actions": {
        "mean": [0.0, 0.1, -0.2, 0.3],
        "std": [0.5, 1.5, 1.0, 0.8],
        "q01": [-2.0, -3.0, -1.0, -1.0],
        "q99": [2.5, 3.0, 1.5, 1.0],
    },
}


def reference_weights(name: str) -> dict[str, Tensor]:
    return load_file(DATA / name / "model.safetensors")


def reference_vectors(name: str) -> dict[str, Tensor]:
    return load_file(DATA / name / "io.safetensors")


def reference_model(name: str, **options: Any) -> Pi0:
    model = NAMES[name](**{**TINY_PI0, **options})
    unexpected = model.load_state_dict(reference_weights(name), strict=False).unexpected_keys
    assert sorted(unexpected) == [f"{X}lm_head.weight", f"{P}lm_head.weight"]
    return model


def tiny_tokenizer(folder: Path) -> Path:
    """A byte-pair tokenizer with Gemma's special tokens, normalizer and byte fallback, and 512 entries at most."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "▁"]
    tokens += [chr(code) for code in range(33, 127)] + ["th", "the", "▁the"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_layout(folder: Path, name: str, layout: str) -> Path:
    """The reference model as a checkpoint, as others lay it out; transformers' with weights of its own."""
    folder.mkdir(parents=True)
    weights = reference_weights(name)
    tied = {key: tensor for key, tensor in weights.items() if not key.endswith("embed_tokens.weight")}
    if layout == "openpi":
        save_file(tied, folder / "model.safetensors")
        write_json(folder / "config.json", {"action_dim": 32, "action_horizon": 5, "precision": "float32"})
        write_norm_stats(folder / "assets" / "some_dataset", padded=False)
    elif layout == "sharded":
        names = sorted(tied)
        files = {"model-00001-of-00002.safetensors": names[:30], "model-00002-of-00002.safetensors": names[30:]}
        for file, part in files.items():
            save_file({key: tied[key] for key in part}, folder / file)
        index = {key: file for file, part in files.items() for key in part}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        write_norm_stats(folder / "assets" / "some_dataset", padded=False)
    elif layout == "rlinf sft":
        save_file(weights, folder / "model.safetensors")
        write_norm_stats(folder / "lerobot" / "metaworld_mt50", padded=True)
    elif layout == "rlinf rl":
        path = folder / "actor" / "model_state_dict" / "full_weights.pt"
        path.parent.mkdir(parents=True)
        torch.save({f"_fsdp_wrapped_module.{k}": t for k, t in {**weights, **rlinf_heads(name)}.items()}, path)
        write_norm_stats(folder / "lerobot" / "metaworld_mt50", padded=True)
    elif layout == TRANSFORMERS:
        transformers_pi0().save_pretrained(folder)
        write_norm_stats(folder / "assets" / "some_dataset", padded=False)
    else:
        write_lerobot(folder, name, weights if layout == "lerobot" else tied, current=layout == "lerobot")
    return folder


def transformers_pi0() -> Any:
    """transformers' own pi0 of the same sizes, with weights of its own; the test is skipped where it has none."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "PI0ForConditionalGeneration"):
        pytest.skip("this transformers has no pi0")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}
    text = {"model_type": "gemma", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, **heads}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96}
    vision |= {"num_attention_heads": 4, "patch_size": 14, "image_size": 56, "vision_use_head": False}
    config = transformers.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": {**text, "vocab_size": 512},
            "vision_config": vision,
            "projection_dim": 64,
            "image_token_id": 511,
        },
        dit_config={**text, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 512},
        chunk_size=5,
    )
    torch.manual_seed(0)
    return transformers.PI0ForConditionalGeneration(config).eval()


def rlinf_heads(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = {
        "noise_head.logvar_min": torch.tensor([0.08]).square().log(),
        "noise_head.logvar_max": torch.tensor([0.16]).square().log(),
    }
    widths = [32 if name == "pi0" else 64, 512, 256, 128, 1]
    for index, (inner, outer) in enumerate(pairwise(widths)):
        heads[f"value_head.mlp.{2 * index}.weight"] = torch.randn(outer, inner, generator=generator)
        heads[f"value_head.mlp.{2 * index}.bias"] = torch.randn(outer, generator=generator)
    widths = [32, 128, 64, 32]
    for index, (inner, outer) in enumerate(pairwise(widths)):
        layer = f"noise_head.mlp_logvar.moduleList.{index}.linear_1"
        heads[f"{layer}.weight"] = torch.randn(outer, inner, generator=generator) / inner**0.5
        heads[f"{layer}.bias"] = torch.randn(outer, generator=generator)
    return heads


def write_norm_stats(folder: Path, padded: bool) -> None:
    folder.mkdir(parents=True)
    pad = [0.0] * 28 if padded else []
    stats = {name: {key: values + pad for key, values in group.items()} for name, group in STATISTICS.items()}
    write_json(folder / "norm_stats.json", {"norm_stats": stats})


def write_lerobot(folder: Path, name: str, weights: dict[str, Tensor], current: bool) -> None:
    """As version 0.4 (prompt with the padded state, tied embedding) or the current one (tokenizer, one more step)."""
    save_file({f"model.{key}": tensor for key, tensor in weights.items()}, folder / "model.safetensors")
    scheme = "MEAN_STD" if name == "pi0" else "QUANTILES"
    norm_map = {"VISUAL": "IDENTITY", "STATE": scheme, "ACTION": scheme}
    config = {
        "type": name,
        "input_features": {
            "observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, 224, 224]},
            "observation.state": {"type": "STATE", "shape": [4]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [4]}},
        "chunk_size": 5,
        "n_action_steps": 5,
        "max_state_dim": 32,
        "max_action_dim": 32,
        "num_inference_steps": 7,
        "image_resolution": [56, 56],
        "tokenizer_max_length": 48 if name == "pi0" else 200,
        "min_period": 0.004,
        "max_period": 4.0,
        "normalization_mapping": norm_map,
        **({"use_relative_actions": False, "relative_exclude_joints": []} if current else {}),
    }
    write_json(folder / "config.json", config)
    normalizer = step("normalizer_processor", eps=1e-8, features={}, norm_map=norm_map)
    unnormalizer = step("unnormalizer_processor", eps=1e-8, features={}, norm_map=norm_map)
    tokenizer = step("tokenizer_processor", max_length=48, tokenizer_name="google/paligemma-3b-pt-224")
    if current:
        tiny_tokenizer(folder / "tokenizer")
        tokenizer = {
            **step("tokenizer_processor", tokenizer_name="tokenizer"),
            "artifacts": {"tokenizer_name": "tokenizer"},
        }
    start = [step("rename_observations_processor"), step("to_batch_processor")]
    relative = [step("relative_actions_processor")] if current else []
    if name == "pi0":
        steps = [*start, step("pi0_new_line_processor"), tokenizer, step("device_processor"), *relative, normalizer]
    else:
        prompt = step("pi05_prepare_state_tokenizer_processor_step", max_state_dim=32)
        steps = [*start, *relative, normalizer, prompt, tokenizer, step("device_processor")]
    tensors = {
        f"{feature}.{key}": torch.tensor(values)
        for ours, feature in (("state", "observation.state"), ("actions", "action"))
        for key, values in STATISTICS[ours].items()
    }
    for kind, listed in (
        ("policy_preprocessor", steps),
        ("policy_postprocessor", [unnormalizer, step("device_processor")]),
    ):
        for index, one in enumerate(listed):
            if one in (normalizer, unnormalizer):
                one["state_file"] = f"{kind}_step_{index}_{one['registry_name']}.safetensors"
                save_file(tensors, folder / one["state_file"])
        write_json(folder / f"{kind}.json", {"name": kind, "steps": listed})


def step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
