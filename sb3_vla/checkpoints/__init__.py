"""Readers and writers of checkpoints: weights in safetensors, everything else in JSON, nothing unpickled."""

from sb3_vla.checkpoints.loading import load_checkpoint
from sb3_vla.checkpoints.native import LoadedCheckpoint, checkpoint_digest, save_checkpoint

__all__ = ["LoadedCheckpoint", "checkpoint_digest", "load_checkpoint", "save_checkpoint"]
