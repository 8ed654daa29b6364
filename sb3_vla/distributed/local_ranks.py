"""One rank per core: on a machine without a GPU, a command starts the other ranks itself.

A single process waits for its simulators and they wait for its decisions; with several ranks one computes while another
waits. An update of a network as small as CompactVLA hardly gains from a second thread; whether imitation by ranks is
faster than by threads depends on the processor.
"""

from __future__ import annotations

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

from mw_envs.machine import available_memory, usable_cores
from sb3_vla.common.errors import InputError, RankLostError
from sb3_vla.distributed.ranks import Ranks, torchrun

#: environment variable with the greatest number of ranks of a command; 1 starts no others
VARIABLE = "SB3_VLA_RANKS"
# With more, each rank would have only a few frames of a batch.
_MOST_RANKS = 8
# Memory of a rank besides the images that all ranks share: libraries, a worker with its scenes, the model.
_BYTES_OF_A_RANK = 1.5e9
# Set for a started rank: the folder in which it reports that it runs, and why it failed.
_FOLDER = "SB3_VLA_RANK_FOLDER"
# And the end of a pipe that the system closes when rank 0 ends, however that ends.
_PARENT = "SB3_VLA_PARENT_PIPE"
_SECONDS_TO_END = 60.0


def local_rank_count(shared: Sequence[int] = (), at_most: Sequence[int] = ()) -> int:
    """The number of ranks for this machine: one per core, if memory and work suffice for them; 1 if there is a GPU, or
    if something else starts the ranks.

    :param shared: numbers that the ranks must share equally, such as that of environments.
    :param at_most: upper limits, such as the frames of a batch, of which each rank needs one.
    :raises ValueError: if the variable ``SB3_VLA_RANKS`` is no whole number above 0.
    """
    import torch

    given = os.environ.get(VARIABLE, str(_MOST_RANKS))
    if not given.isdigit() or int(given) < 1:
        raise InputError(f"{VARIABLE}={given!r}; expected the number of processes that may share the work, 1 or more")
    if "WORLD_SIZE" in os.environ or torch.cuda.is_available() or _command() is None:
        return 1
    most = min(int(given), usable_cores(), max(1, int(available_memory() / _BYTES_OF_A_RANK)), *at_most)
    return max(count for count in range(1, most + 1) if all(number % count == 0 for number in shared))


@contextmanager
def local_ranks(count: int) -> Iterator[Ranks]:
    """Start the other ranks of this machine, which run the same command, and join them as rank 0. With a count of 1, or
    in a started rank, join the ranks of torchrun.

    The other ranks end with this one, and their output to the terminal is dropped.

    :param count: number of ranks, see :func:`local_rank_count`.
    :raises RankLostError: if another rank ends early; the message has its error.
    """
    command = _command()
    if count == 1 or command is None or "WORLD_SIZE" in os.environ:
        _report_start()
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
    read_end, write_end = os.pipe()
    others: list[_StartedRank] = []
    with TemporaryDirectory(prefix="sb3-vla-ranks-") as folder:
        own = {_FOLDER: folder, _PARENT: str(read_end), "OMP_NUM_THREADS": str(threads)}
        try:
            for rank in range(1, count):
                variables = {**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                others.append(_StartedRank(rank, command, variables, read_end, Path(folder)))
            _wait_for_start(others)
            with _ending_with(others), torchrun() as ranks:
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
            os.close(read_end)
            os.close(write_end)
            torch.set_num_threads(threads_before)
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)


def leave_reason(message: str) -> None:
    """In a started rank, report to rank 0 why this one ends."""
    folder = os.environ.get(_FOLDER)
    if folder is not None:
        with suppress(OSError):  # a full disk must not hide the reason
            (Path(folder) / f"reason-{os.environ['RANK']}").write_text(message, encoding="utf-8")


class _StartedRank:
    """A rank that this process started."""

    def __init__(self, rank: int, command: Sequence[str], variables: dict[str, str], pipe: int, folder: Path) -> None:
        self._rank, self._folder = rank, folder
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, env=variables, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=[pipe]
        )

    @property
    def has_started(self) -> bool:
        """Whether it is ready to join."""
        return (self._folder / f"here-{self._rank}").exists()

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    @property
    def has_failed(self) -> bool:
        """Whether the process has ended with an error."""
        return self._process.poll() not in (None, 0)

    def wait(self) -> None:
        """Wait until it has ended by itself."""
        deadline = time.monotonic() + _SECONDS_TO_END
        while not self.has_ended and time.monotonic() < deadline:
            time.sleep(0.01)

    def reason(self) -> str:
        """Why it has failed; empty if it has not, or only because another rank has."""
        deadline = time.monotonic() + 5  # it may be about to end
        while not self.has_ended and time.monotonic() < deadline:
            time.sleep(0.05)
        told = self._folder / f"reason-{self._rank}"
        if told.exists():
            return f"Rank {self._rank} of this machine: {told.read_text(encoding='utf-8')}"
        status = self._process.poll()
        if status is None or status == 2:  # 2: it lost another rank
            return ""
        killed = "; -9 mostly means that memory ran out" if status == -9 else ""
        return f"Rank {self._rank} of this machine ended with status {status}{killed}. {VARIABLE}=1 starts none"

    def end(self) -> None:
        """Kill it; its workers end with it."""
        self._process.kill()
        self._process.wait()


def _wait_for_start(others: Sequence[_StartedRank]) -> None:
    """Wait until all are ready to join, since no signal can interrupt the joining.

    :raises RankLostError: if one has ended.
    """
    while not all(other.has_started for other in others):
        for other in others:
            if other.has_ended and not other.has_started:
                raise RankLostError(other.reason() or "Another rank of this machine ended before it began")
        time.sleep(0.02)


@contextmanager
def _ending_with(others: Sequence[_StartedRank]) -> Iterator[None]:
    """End this process if another rank has failed and this one does not notice: it may wait for the other outside of
    Python, or compute for an hour before it needs the other."""
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


def _report_start() -> None:
    """In a started rank, report that it runs, and end when rank 0 ends."""
    pipe = os.environ.pop(_PARENT, None)
    if pipe is None:
        return

    def wait() -> None:
        os.read(int(pipe), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    (Path(os.environ[_FOLDER]) / f"here-{os.environ['RANK']}").touch()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command() -> list[str] | None:
    """The command that starts this process again; None if it is not known, as in a notebook or under a debugger."""
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
