"""Demonstrations: recorded from scripted experts, kept as LeRobot datasets, read into memory."""

from sb3_vla.data.collecting import CollectReport, collect
from sb3_vla.data.demonstrations import Demonstrations

__all__ = ["CollectReport", "Demonstrations", "collect"]
