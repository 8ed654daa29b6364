"""Sizes that recipes start from, as options of :func:`sb3_vla.models.make_model`.

All are published ones but Diffusion Policy's, which is that of its recipe of imitation: as published it knows one task,
and no sentence.
"""

from __future__ import annotations

from typing import Any

_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def _tinyvla(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """On Pythia of these sizes."""
    language = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 50304}
    return {
        "image_size": 480,
        "action_horizon": 16,
        "vision": _CLIP_L,
        "language": {**language, "num_hidden_layers": layers, "num_attention_heads": heads},
        "down_dims": (256, 512, 1024),
        "step_dim": 256,
        "cameras": 2,
        "center_crop": True,
    }


#: name: kind, options, as the module says; of a kind's sizes the first is the one that recipes start from
PUBLISHED_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "pi0": ("pi0", {}),
    "pi0.5": ("pi05", {}),
    "SmolVLA 0.45 B": ("smolvla", {"vlm": "500M"}),
    "SmolVLA 0.24 B": ("smolvla", {"vlm": "256M"}),
    "SmolVLA 2.25 B": ("smolvla", {"vlm": "2.2B"}),
    # LeRobot's U-Net and ResNet on the images of our recipe, and with an encoder of the sentence: what
    # metaworld_50_sft_diffusion_policy makes, as the tests compare.
    "Diffusion Policy, our recipe's": (
        "diffusion_policy",
        {
            "image_size": 224,
            "crop_size": 200,
            "action_horizon": 16,
            "widths": (64, 128, 256, 512),
            "down_dims": (512, 1024, 2048),
            "step_dim": 128,
        },
    ),
    "TinyVLA-H": ("tinyvla", _tinyvla(2048, 16, 8)),
    "TinyVLA-B": ("tinyvla", _tinyvla(1024, 24, 16)),
    "TinyVLA-S": ("tinyvla", _tinyvla(512, 6, 8)),
    # Of its seven numbers the simulator takes four.
    "OpenVLA-OFT 7 B": ("openvla_oft", {"acting": (0, 1, 2, 6), "numbers": 7}),
}


def published_options(kind: str) -> dict[str, Any]:
    """Options of the size that recipes start from; none for a kind that nobody else published."""
    return next((options for of_kind, options in PUBLISHED_SIZES.values() if of_kind == kind), {})
