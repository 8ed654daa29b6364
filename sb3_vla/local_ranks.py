"""A rank for each core: where there is no GPU, a command starts the other ranks of its machine itself.

A network as small as CompactVLA hardly gains from a second thread, which waits more than it works; two processes of one
thread each, which share every batch, take half the time of one (``tests/benchmarks/bench_learner.py``).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from sb3_vla.distributed import RankLostError, Ranks, torchrun
from sb3_vla.machine import usable_cores

#: how many ranks a command starts at most; 1 for none but itself
VARIABLE = "SB3_VLA_RANKS"
# A pipe that a started rank reads: it ends when the first rank does, however that ends.
_LEASH = "SB3_VLA_LEASH"
_SECONDS_TO_END = 60.0


def local_rank_count(*shared: int) -> int:
    """Ranks for this machine: one a core, and no more than what is shared equally allows; 1 where there is a GPU, or
    where torchrun has started ranks.

    :param shared: numbers that ranks share equally, such as of environments.
    """
    import torch

    if "WORLD_SIZE" in os.environ or torch.cuda.is_available():
        return 1
    most = min(usable_cores(), int(os.environ.get(VARIABLE, "1024")))
    return max(count for count in range(1, most + 1) if all(number % count == 0 for number in shared))


@contextmanager
def local_ranks(count: int, command: Sequence[str]) -> Iterator[Ranks]:
    """Be rank 0 of some ranks of this machine, and start the others; or one of those that were started already.

    The others end with this one. What they write to the terminal is not shown; the last line of one that ended early is
    told.

    :param count: how many, see :func:`local_rank_count`.
    :param command: what starts this process, and so the others.
    :raises RankLostError: if one of the others ends early.
    """
    if count == 1 or "WORLD_SIZE" in os.environ:
        _follow_the_first()
        with torchrun() as ranks:
            yield ranks
        return
    import torch

    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    own = {**told, "LOCAL_WORLD_SIZE": str(count), "RANK": "0", "LOCAL_RANK": "0"}
    threads = max(1, usable_cores() // count)
    torch.set_num_threads(threads)
    leash, held = os.pipe()
    others: list[_Other] = []
    os.environ.update(own)
    try:
        for rank in range(1, count):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads), _LEASH: str(leash)}
            others.append(_Other(rank, command, {**os.environ, **numbers}, leash))
        os.close(leash)
        with torchrun() as ranks:
            yield ranks
        for other in others:
            other.wait()
    except RankLostError as error:
        said = [line for other in others if (line := other.last_words())]
        if not said:
            raise
        raise RankLostError(f"{error}. {'; '.join(said)}") from error
    finally:
        for other in others:
            other.end()
        os.close(held)
        for name in own:
            os.environ.pop(name, None)


class _Other:
    """A rank that this process started."""

    def __init__(self, rank: int, command: Sequence[str], environment: dict[str, str], leash: int) -> None:
        self._rank = rank
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[leash],
        )

    def wait(self) -> None:
        """Until it has ended by itself; it has nothing left to do."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_END)

    def last_words(self) -> str:
        """How it ended, if it did so before it was asked to."""
        deadline = time.monotonic() + 5
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._process.poll() in (None, 0):
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"Rank {self._rank} ended with status {self._process.returncode}" + (f": {lines[-1]}" if lines else "")

    def end(self) -> None:
        # It writes nothing that could be left half done, and its own workers end with it.
        self._process.kill()
        self._process.wait()
        self._errors.close()


def _follow_the_first() -> None:
    """In a rank that :func:`local_ranks` started: end when the first rank is gone."""
    leash = os.environ.pop(_LEASH, None)
    if leash is None:
        return

    def wait() -> None:
        os.read(int(leash), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def this_command() -> list[str]:
    """What started this process."""
    return [sys.executable, *sys.orig_argv[1:]]
