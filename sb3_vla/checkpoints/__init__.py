"""Readers and writers of checkpoints: weights in safetensors, everything else in JSON, nothing unpickled."""

from sb3_vla.checkpoints.formats.diffusion_policy import load_diffusion_policy, save_diffusion_policy
from sb3_vla.checkpoints.formats.tinyvla import load_tinyvla, save_tinyvla
from sb3_vla.checkpoints.loading import load_checkpoint
from sb3_vla.checkpoints.native import LoadedCheckpoint, checkpoint_digest, save_checkpoint

__all__ = [
    "LoadedCheckpoint",
    "checkpoint_digest",
    "load_checkpoint",
    "load_diffusion_policy",
    "load_tinyvla",
    "save_checkpoint",
    "save_diffusion_policy",
    "save_tinyvla",
]
