"""Options of torch's optimizers."""

from __future__ import annotations

import torch


def fuse_adam(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam and AdamW step by one kernel for all weights, unless their options say how.

    On a CPU that takes a third of the time (``tests/benchmarks/bench_learner.py``).
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        chosen = any(group.get(option) is not None for option in ("fused", "foreach"))
        if chosen or group["capturable"] or group["differentiable"]:
            continue
        group["fused"] = True
        for weights in group["params"]:  # the kernel reads the number of steps on the device of the weights
            if "step" in optimizer.state.get(weights, {}):
                optimizer.state[weights]["step"] = optimizer.state[weights]["step"].to(weights.device)
