"""bfloat16 where the machine computes it faster; weights and log-probabilities stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch


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
