"""Imitation: supervised fine-tuning on demonstrations."""

from sb3_vla.sft.imitation import SFTConfig, SFTResult, sft

__all__ = ["SFTConfig", "SFTResult", "sft"]
