"""A rank for each core: where there is no GPU, a command starts the other ranks of its machine itself.

A process alone waits for its simulators, and they for its decisions; several ranks fill one another's pauses.
An update of a network as small as CompactVLA hardly gains from a second thread; whether imitation by ranks is faster
than by threads depends on the processor.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from sb3_vla.common.errors import InputError, RankLostError
from sb3_vla.common.machine import available_memory, usable_cores
from sb3_vla.distributed.ranks import Ranks, torchrun

#: how many ranks a command starts at most; 1 for none but itself
VARIABLE = "SB3_VLA_RANKS"
# More ranks than this would each have a few frames of a batch.
_MOST_RANKS = 8
# What a rank takes beside the pictures that all of them share: libraries, a worker with its scenes, the model.
_BYTES_OF_A_RANK = 1.5e9
# Of a rank that was started: the folder in which it tells that it is there, and what it could not do.
_FOLDER = "SB3_VLA_RANK_FOLDER"
# And a pipe that it reads, which ends when the first rank does, however that ends.
_LEASH = "SB3_VLA_LEASH"
_SECONDS_TO_END = 60.0


def local_rank_count(shared: Sequence[int] = (), at_most: Sequence[int] = ()) -> int:
    """Ranks for this machine: one a core, as far as its memory and the work allow; 1 where there is a GPU, or where
    somebody else starts the ranks.

    :param shared: numbers that ranks share equally, such as of environments.
    :param at_most: numbers of what each rank needs one of, such as frames of a batch.
    :raises ValueError: if the variable ``SB3_VLA_RANKS`` is no whole number above 0.
    """
    import torch

    given = os.environ.get(VARIABLE, str(_MOST_RANKS))
    if not given.isdigit() or int(given) < 1:
        raise InputError(f"{VARIABLE}={given!r}; expected how many processes may share the work, 1 for one alone")
    if "WORLD_SIZE" in os.environ or torch.cuda.is_available() or _command() is None:
        return 1
    most = min(int(given), usable_cores(), max(1, int(available_memory() / _BYTES_OF_A_RANK)), *at_most)
    return max(count for count in range(1, most + 1) if all(number % count == 0 for number in shared))


@contextmanager
def local_ranks(count: int) -> Iterator[Ranks]:
    """Be rank 0 of some ranks of this machine, and start the others: the same command, in processes of their own. With
    a count of 1, or as one of those that were started, join whom torchrun started.

    The others end with this one, and what they write to the terminal is not shown. What one of them could not do is
    told by the error.

    :param count: how many, see :func:`local_rank_count`.
    :raises RankLostError: if one of the others ends early.
    """
    command = _command()
    if count == 1 or command is None or "WORLD_SIZE" in os.environ:
        _tell_that_it_is_here()
        with torchrun() as ranks:
            yield ranks
        return
    import torch

    before, threads_before = dict(os.environ), torch.get_num_threads()
    threads = max(1, usable_cores() // count)
    port = _free_port()
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    # The name of this machine may stand for an interface that comes and goes.
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", **before, **told, "RANK": "0", "LOCAL_RANK": "0"})
    torch.set_num_threads(threads)
    leash, held = os.pipe()
    others: list[_Other] = []
    with TemporaryDirectory(prefix="sb3-vla-ranks-") as folder:
        own = {_FOLDER: folder, _LEASH: str(leash), "OMP_NUM_THREADS": str(threads)}
        try:
            for rank in range(1, count):
                variables = {**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                others.append(_Other(rank, command, variables, leash, Path(folder)))
            _wait_until_all_are_here(others)
            with _ended_with_the_others(others), torchrun() as ranks:
                yield ranks
            for other in others:
                other.wait()
        except RankLostError as error:
            reasons = [reason for other in others if (reason := other.reason())]
            if not reasons:
                raise
            raise RankLostError("; ".join(reasons)) from error
        finally:
            for other in others:
                other.end()
            os.close(leash)
            os.close(held)
            torch.set_num_threads(threads_before)
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)


def leave_reason(message: str) -> None:
    """In a rank that was started: tell the first why this one ends."""
    folder = os.environ.get(_FOLDER)
    if folder is not None:
        with suppress(OSError):  # as on a full disk, which must not take the place of the reason
            (Path(folder) / f"reason-{os.environ['RANK']}.json").write_text(json.dumps(message), encoding="utf-8")


class _Other:
    """A rank that this process started."""

    def __init__(self, rank: int, command: Sequence[str], variables: dict[str, str], leash: int, folder: Path) -> None:
        self._rank, self._folder = rank, folder
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, env=variables, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=[leash]
        )

    @property
    def is_here(self) -> bool:
        """Whether it has come as far as to join."""
        return (self._folder / f"here-{self._rank}").exists()

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    @property
    def has_failed(self) -> bool:
        """Whether it is gone without having done its part."""
        return self._process.poll() not in (None, 0)

    def wait(self) -> None:
        """Until it has ended by itself, having nothing left to do."""
        deadline = time.monotonic() + _SECONDS_TO_END
        while not self.has_ended and time.monotonic() < deadline:
            time.sleep(0.01)

    def reason(self) -> str:
        """What it could not do, if it has ended because of that."""
        deadline = time.monotonic() + 5  # it may be about to
        while not self.has_ended and time.monotonic() < deadline:
            time.sleep(0.05)
        told = self._folder / f"reason-{self._rank}.json"
        if told.exists():
            return f"Rank {self._rank} of this machine: {json.loads(told.read_text(encoding='utf-8'))}"
        status = self._process.poll()
        if status is None or status == 2:  # 2: it has lost another one
            return ""
        killed = "; -9 mostly means that memory ran out" if status == -9 else ""
        return f"Rank {self._rank} of this machine ended with status {status}{killed}. {VARIABLE}=1 does without it"

    def end(self) -> None:
        """At once: its workers end with it, and what it films is not finished without the first rank."""
        self._process.kill()
        self._process.wait()


def _wait_until_all_are_here(others: Sequence[_Other]) -> None:
    """Before joining them, which no signal could interrupt.

    :raises RankLostError: if one has ended.
    """
    while not all(other.is_here for other in others):
        for other in others:
            if other.has_ended and not other.is_here:
                raise RankLostError(other.reason() or "Another rank of this machine ended before it began")
        time.sleep(0.02)


@contextmanager
def _ended_with_the_others(others: Sequence[_Other]) -> Iterator[None]:
    """End this process if one of the others has failed, and that is not noticed when they are next needed: it may wait
    for them where Python does not run, or work alone for an hour."""
    done = threading.Event()

    def watch() -> None:
        while not any(other.has_failed for other in others):
            if done.wait(1.0):
                return
        if done.wait(_SECONDS_TO_END):
            return
        reasons = "; ".join(reason for other in others if (reason := other.reason()))
        print(f"error: {reasons or 'another rank of this machine has ended'}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(_SECONDS_TO_END):
            os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _tell_that_it_is_here() -> None:
    """In a rank that :func:`local_ranks` started: say so, and end when the first rank is gone."""
    leash = os.environ.pop(_LEASH, None)
    if leash is None:
        return

    def wait() -> None:
        os.read(int(leash), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    (Path(os.environ[_FOLDER]) / f"here-{os.environ['RANK']}").touch()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command() -> list[str] | None:
    """What starts this process again; None where that is not known, as in a notebook or under a debugger."""
    main = sys.modules.get("__main__")
    arguments, file = sys.orig_argv[1:], getattr(main, "__file__", None)
    own = len(sys.argv) - 1
    begins = arguments[: len(arguments) - own]
    if file is None or arguments[len(arguments) - own :] != sys.argv[1:] or not begins:
        return None
    spec = getattr(main, "__spec__", None)
    module = None if spec is None else spec.name.removesuffix(".__main__")
    is_module = begins[-2:] == ["-m", module]
    is_script = "-m" not in begins and Path(begins[-1]).exists() and Path(begins[-1]).resolve() == Path(file).resolve()
    return [sys.executable, *arguments] if is_module or is_script else None
