"""``python -m sb3_vla`` in toy environments, which need no simulator; started by torchrun in tests.

TOY_PIDS names a folder for files ``rank-<rank>`` that hold each process's id; TOY_SECONDS is how long a step lasts.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv
from toy import ToyEnv

from sb3_vla.cli.main import main
from sb3_vla.runs import training


class SlowEnv(ToyEnv):
    """Takes its time."""

    def step(self, action: np.ndarray) -> Any:
        time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
        return super().step(action)


def make(makers: list[Any], num_workers: int | None) -> DummyVecEnv:
    return DummyVecEnv(
        [lambda: SlowEnv(chunk=5, action_dim=4, horizon=3, truncates=True, privileged=True)] * len(makers)
    )


if __name__ == "__main__":
    training.SharedMemoryVecEnv = make  # type: ignore[assignment, misc]
    if "TOY_PIDS" in os.environ:
        (Path(os.environ["TOY_PIDS"]) / f"rank-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    sys.exit(main(sys.argv[1:]))
