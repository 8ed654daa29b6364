"""Where and how precisely to compute: bfloat16 where it is faster; weights and log-probabilities stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from stable_baselines3.common import utils

from sb3_vla.common.errors import InputError


def bf16_supported() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore")
    except OSError:  # not Linux: assume it does not, float32 is always right
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def uses_bf16(enabled: bool | None, device_type: str) -> bool:
    """Whether autocast computes in bfloat16.

    :param enabled: None for where it pays: any GPU, a processor with bfloat16 instructions.
    """
    return device_type != "cpu" or bf16_supported() if enabled is None else enabled


def autocast(enabled: bool | None, device_type: str = "cpu") -> AbstractContextManager[None]:
    """Autocast to bfloat16.

    :param enabled: see :func:`uses_bf16`.
    """
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=uses_bf16(enabled, device_type))


def acting_precision(enabled: bool | None, device_type: str) -> AbstractContextManager[None]:
    """The precision in which a policy acts, in rollouts and evaluations; an update computes log-probabilities anew.

    On a GPU it is that of the update, where float32 would take several times as long; on a CPU float32.

    :param enabled: that of the update, see :func:`uses_bf16`.
    """
    return autocast(enabled if device_type != "cpu" else False, device_type)


def get_device(name: str) -> torch.device:
    """A device by its name; ``auto`` is a GPU where there is one.

    :raises ValueError: for a GPU where PyTorch finds none, for which Stable-Baselines3 would take the processor.
    """
    device = utils.get_device(name)
    if name != "auto" and torch.device(name).type != device.type:
        raise InputError(f"device={name!r}, but PyTorch {torch.__version__} finds no such device; use device='auto'")
    return device
