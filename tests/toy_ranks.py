"""A command with ranks of its own, for tests: ``toy_ranks.py COUNT FOLDER WHAT``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from sb3_vla.cli.command import run_command
from sb3_vla.common.errors import InputError
from sb3_vla.distributed import local_ranks


def main(count: int, folder: Path, what: str) -> int:
    """Each rank notes its process, tells the first its number and threads, and does ``what``."""
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"begun-{rank}").write_text(str(os.getpid()))
    if what == "dies" and rank == 1:
        os._exit(9)
    if what == "is killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "comes late" and rank == 1:
        time.sleep(600)
    if "SECONDS" in os.environ:
        local_ranks._SECONDS_TO_END = float(os.environ["SECONDS"])

    def work() -> None:
        with local_ranks.local_ranks(count) as ranks:
            (folder / f"rank-{ranks.rank}").write_text(str(os.getpid()))
            found = ranks.gather((ranks.rank, ranks.count, torch.get_num_threads()))
            if what == "fails" and ranks.rank == 1:
                raise InputError("rank 1 is out of luck, in two lines:\nthis one")
            if what == "works alone" and ranks.rank == 1:
                os._exit(9)
            if what in ("waits", "works alone"):
                time.sleep(600)
            ranks.wait()
            if ranks.leads:
                print(found)

    return run_command(work, again="the same command goes on")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
