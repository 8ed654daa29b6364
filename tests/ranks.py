"""Several ranks in a test: forked processes with the variables that torchrun sets."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

from sb3_vla.distributed.ranks import torchrun


def run_ranks(
    count: int,
    work: Callable[[int], Any],
    timeout_seconds: float = 60.0,
    patience_seconds: float = 120.0,
    joined: bool = True,
) -> list[Any]:
    """What a function of the rank gives in each of ``count`` processes that are ranks of one group.

    :param timeout_seconds: how long a rank waits for another.
    :param patience_seconds: how long this waits for a rank.
    :param joined: whether they have joined one another, or find the invitation of torchrun only.
    :raises AssertionError: with the traceback of a rank that raised.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork needs no second import, and the test may hand over what cannot be pickled.
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_be_rank, args=(rank, count, port, work, timeout_seconds, joined, pipes[rank][1]))
        for rank in range(count)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    results, errors = [], []
    for rank, (receiver, _) in enumerate(pipes):
        try:
            error, result = (
                pickle.loads(receiver.recv_bytes()) if receiver.poll(patience_seconds) else ("no answer", None)
            )
        except EOFError:
            error, result = "it died", None
        results.append(result)
        errors += [f"rank {rank}: {error}"] if error else []
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
    assert not errors, "\n".join(errors)
    return results


def _be_rank(
    rank: int,
    count: int,
    port: int,
    work: Callable[[int], Any],
    timeout_seconds: float,
    joined: bool,
    answer: Connection,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with torchrun(timeout_seconds=timeout_seconds) if joined else nullcontext():
            reply = None, work(rank)
    except BaseException:
        reply = traceback.format_exc(), None
    answer.send_bytes(pickle.dumps(reply))
    answer.close()
    os._exit(0)  # without what pytest would do at its end
