"""A command with ranks of its own, for tests: ``toy_ranks.py COUNT FOLDER [fails|waits]``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from sb3_vla.command import run_command
from sb3_vla.errors import InputError
from sb3_vla.local_ranks import local_ranks, this_command


def main(count: int, folder: Path, what: str) -> int:
    """Each rank notes its process, tells the first its number and threads, and does ``what``."""

    def work() -> None:
        with local_ranks(count, this_command()) as ranks:
            (folder / f"rank-{ranks.rank}").write_text(str(os.getpid()))
            found = ranks.gather((ranks.rank, ranks.count, torch.get_num_threads()))
            if what == "fails" and ranks.rank == 1:
                raise InputError("rank 1 is out of luck")
            if what == "waits":
                time.sleep(600)
            ranks.wait()
            print(found)

    return run_command(work, again="the same command goes on")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""))
