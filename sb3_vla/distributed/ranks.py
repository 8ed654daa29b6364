"""Data-parallel training under ``torchrun``: how ranks meet, what they tell one another, and how they share work.

::

    with torchrun() as ranks:  # alone without torchrun
        model = PPO("VLAPolicy", make_envs(512 // ranks.count, first=ranks.rank * 512 // ranks.count))
        model.learn(1_000_000)

A script without that context is a rank, too: an algorithm that is made with an environment, imitation and
:func:`~sb3_vla.runs.training.train` join the others for the rest of the process. Each rank then has as many
environments as the script makes.

Every rank has environments, a replica of the policy and a rollout buffer of its own; ``batch_size``, ``n_groups`` and
``total_timesteps`` count what all of them have. The ranks' environments in the order of the ranks are those of one
process: noise is drawn, decisions are shuffled, advantages are normalized and tasks are weighted as one process would,
so that the number of ranks changes a result by rounding alone. A gradient is summed over ranks in flat buckets.

Whatever decides how a training goes on (divergence, a gradient that is not finite, a callback that stops) is decided by
all ranks with the same numbers. Rank 0 writes logs, checkpoints and videos.
"""

from __future__ import annotations

import atexit
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sb3_vla.common.errors import InputError, RankLostError

T = TypeVar("T")
#: longest wait for a rank that lives but does not answer, seconds: such as for rank 0 while experts play; the death of
#: one is noticed at once
TIMEOUT_SECONDS = 7200.0
# Gradients that travel at a time: enough to fill a network, little beside a model.
_BUCKET_NUMBERS = 8 * 2**20
# Numbers that a checksum looks at at a time, and what their bits are read as, by their size in bytes.
_CHECKED_NUMBERS = 2**18
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOCAL_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"))
# How many of the ranks are on this machine.
_ranks_here = 1
# Whether this process is or was a rank.
_has_joined = False


@dataclass(frozen=True)
class Ranks:
    """The processes that train together. All of them must call a method that speaks of all ranks.

    :ivar rank: this one's number.
    :ivar count: how many there are; 1 is a process alone, in which nothing is sent.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes logs, checkpoints and videos."""
        return self.rank == 0

    def share(self, total: int, name: str) -> range:
        """The numbers among ``total`` that are this rank's: as many for each, in the order of the ranks.

        :param name: what there are ``total`` of, for the message.
        :raises ValueError: if they cannot be shared equally.
        """
        if total % self.count:
            raise InputError(
                f"{name}={total} cannot be shared by {self.count} ranks; expected a multiple of {self.count}, "
                f"such as {-(-total // self.count) * self.count}"
            )
        each = total // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def rows(self, total: int, name: str) -> npt.NDArray[np.int64]:
        """The numbers among ``total`` that are this rank's, where shares may differ by one.

        :param name: what there are ``total`` of, for the message.
        :raises ValueError: if some rank would have none.
        """
        if total < self.count:
            raise InputError(f"{total} {name} for {self.count} ranks; expected at least one for each")
        return np.array_split(np.arange(total), self.count)[self.rank]

    def gather(self, value: T) -> list[T]:
        """A picklable value of every rank, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _lost_ranks_told(self.rank):
            dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """Rank 0's picklable value."""
        if self.count == 1:
            return value
        holder = [value]
        with _lost_ranks_told(self.rank):
            dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def first_does(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something, and give all ranks its picklable result.

        :raises Exception: what rank 0 raised, on all of them.
        """
        result: T | None = None
        error: Exception | None = None
        if self.leads:
            try:
                result = work()
            except Exception as raised:
                error = raised
        result, error = self.from_first((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.gather(None)

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return any(self.gather(flag))

    def total(self, value: int) -> int:
        """Sum over ranks."""
        return sum(self.gather(value))

    def sum_gradients(self, parameters: Iterable[nn.Parameter], beside: Mapping[str, float]) -> dict[str, float]:
        """Sum the gradients over ranks, in place; one that no rank has stays None.

        Sharded parameters' gradients are left alone: they are summed in the backward pass.

        :param beside: further numbers to sum; where a rank has none of a name it counts as zero.
        :return: the sums of these.
        """
        if self.count == 1:
            return dict(beside)
        whole = [parameter for parameter in parameters if parameter.requires_grad and not is_shard(parameter)]
        told = self.gather((dict(beside), [parameter.grad is not None for parameter in whole]))
        shared = [
            p for p, present in zip(whole, zip(*(flags for _, flags in told), strict=True), strict=True) if any(present)
        ]
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with _lost_ranks_told(self.rank):
            under_way = []
            for bucket in _buckets([parameter.grad for parameter in shared if parameter.grad is not None]):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                under_way.append((dist.all_reduce(flat, async_op=True), flat, bucket))
            for work, flat, bucket in under_way:
                work.wait()
                pieces = flat.split([gradient.numel() for gradient in bucket])
                torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])
        names = {name: None for numbers, _ in told for name in numbers}
        return {name: sum(numbers.get(name, 0.0) for numbers, _ in told) for name in names}

    def take_generators(self, first: int = 0) -> None:
        """Give every rank the state of one rank's generators: torch's, also on its device, NumPy's and Python's.

        :param first: that rank.
        """
        if self.count == 1:
            return
        state = self.gather(generators() if self.rank == first else None)[first]
        assert state is not None
        set_generators(state)

    def check_same(self, weights: Mapping[str, Tensor], what: str) -> None:
        """:raises ValueError: if the ranks' weights differ, such as those of other files under one name."""
        if self.count == 1:
            return
        sums = {name: _checksum(tensor) for name, tensor in weights.items()}
        for rank, other in enumerate(self.gather(sums)):
            different = [name for name in sums if other.get(name) != sums[name]]
            if different or other.keys() != sums.keys():
                raise InputError(
                    f"The weights of {what} on rank {rank} are not those on rank {self.rank} "
                    f"({', '.join(different[:3]) or 'other names'}); give all ranks the same checkpoint and seed"
                )


ALONE = Ranks()


def current_ranks() -> Ranks:
    """The ranks of the process group that this process is in; alone without one."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


@dataclass(frozen=True)
class Invitation:
    """How a process becomes a rank.

    :ivar rank: its number.
    :ivar count: how many there are.
    :ivar local_rank: number of its GPU among those that it sees, where there are any.
    :ivar local_count: how many ranks are on its machine.
    :ivar rendezvous_address: ``env://`` for what torchrun says; else ``tcp://ADDRESS:PORT`` of rank 0's machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    rendezvous_address: str = "env://"


@contextmanager
def torchrun(timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Ranks]:
    """Join the other ranks, if ``torchrun`` started this process; with one rank, and without it, do nothing.

    Each rank takes the GPU of its number on its machine, where there are any.

    :param timeout_seconds: wait for another rank after which a training is given up.
    :raises ValueError: if a machine has more ranks than GPUs.
    :raises RankLostError: if the others do not come.
    """
    count = _invited()
    if count == 1 or dist.is_initialized():
        yield current_ranks()
        return
    local_rank, local_count = (int(os.environ.get(f"LOCAL_{name}", least)) for name, least in _LOCAL_VARIABLES)
    invitation = Invitation(int(os.environ["RANK"]), count, local_rank, local_count)
    with joined(invitation, timeout_seconds) as ranks:
        yield ranks


def join_for_good() -> Ranks:
    """Join the other ranks until the process ends, if ``torchrun`` started it and it has not been a rank before.

    :raises ValueError: see :func:`torchrun`.
    :raises RankLostError: see there.
    """
    if is_left_out():
        membership = ExitStack()
        membership.enter_context(torchrun())
        atexit.register(membership.close)
    return current_ranks()


def check_membership(algorithm: str) -> None:
    """Find out whether a training is one of several that do not know of one another.

    :param algorithm: name of its class, for the message.
    :raises ValueError: if this process has not joined the ranks that ``torchrun`` started.
    :warns UserWarning: if it has left them.
    """
    if is_left_out():
        raise InputError(
            "torchrun started several ranks, which join where an algorithm is made with its environment. Give it "
            f"there, such as {algorithm}.load(path, env), or put all into `with torchrun():` of "
            "sb3_vla.distributed.ranks"
        )
    if _invited() > 1 and current_ranks().count == 1:
        warnings.warn(
            f"Rank {os.environ['RANK']} trains alone: this is behind the end of `with torchrun():`. Put it into the "
            "context, or let one rank do it",
            stacklevel=3,
        )


def is_first_rank() -> bool:
    """Whether this process is the first of the ranks that torchrun started, joined or not; or alone."""
    return _invited() == 1 or os.environ["RANK"] == "0"


def is_left_out() -> bool:
    """Whether ``torchrun`` started other ranks which this process has not joined."""
    return _invited() > 1 and not _has_joined and not dist.is_initialized()


def _invited() -> int:
    """How many ranks ``torchrun`` started, of which this process is one; 1 if it did not."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _TORCHRUN_VARIABLES) else 1


@contextmanager
def joined(invitation: Invitation, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Ranks]:
    """Join the process group within the context, whoever started this process.

    :param timeout_seconds: see :func:`torchrun`, as for what is raised.
    """
    global _ranks_here, _has_joined
    device = _own_device(invitation.local_rank)
    if invitation.count == 1:
        yield current_ranks()
        return
    # Objects and counters travel over the network of the processors, gradients over that of the GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _lost_ranks_told(invitation.rank):
        dist.init_process_group(
            backend,
            init_method=invitation.rendezvous_address,
            rank=invitation.rank,
            world_size=invitation.count,
            timeout=timedelta(seconds=timeout_seconds),
        )
        dist.barrier() if device.type == "cpu" else dist.barrier(device_ids=[device.index])
    _ranks_here, _has_joined = invitation.local_count, True
    try:
        yield current_ranks()
    finally:
        _ranks_here = 1
        dist.destroy_process_group()


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor lies in shards, see :mod:`sb3_vla.distributed.fsdp`, which takes long to import."""
    return hasattr(tensor, "full_tensor")


def ranks_on_this_machine() -> int:
    """How many ranks share the machine's cores, also before they have joined."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_left_out() else _ranks_here


def _own_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"Rank {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; give torchrun "
            f"--nproc-per-node {torch.cuda.device_count()}, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def _lost_ranks_told(rank: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo, NCCL and their store raise what they like
        if isinstance(error, RankLostError):
            raise
        raise RankLostError(
            f"Rank {rank} gives up: another rank has ended, or did not answer in time ({str(error).splitlines()[0]}). "
            "Its own message says why; the same command goes on from the last checkpoint"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, in lists of one type and of about the size of a bucket."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > _BUCKET_NUMBERS or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def generators() -> dict[str, Any]:
    """State of this process's random generators: torch's, also on its device, NumPy's and Python's."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generators(state: Mapping[str, Any]) -> None:
    """Put the generators into a state of :func:`generators`."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _checksum(tensor: Tensor) -> tuple[int, int]:
    """Of all bits, as whole numbers: their sum, and their sum by place, so that an exchange shows; no rounding."""
    if is_shard(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    total = by_place = torch.zeros((), dtype=torch.int64, device=tensor.device)
    first = 1
    for part in _in_parts(tensor.detach()):
        bits = part.flatten().contiguous().view(_WHOLE_NUMBERS.get(part.element_size(), torch.int64)).long()
        places = torch.arange(first, first + len(bits), device=bits.device)
        total, by_place = total + bits.sum(), by_place + (bits * places).sum()
        first += len(bits)
    return int(total), int(by_place)


def _in_parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers in their order, not too many at a time, whatever their order in memory is."""
    if tensor.numel() <= _CHECKED_NUMBERS:
        yield tensor
        return
    rows = _CHECKED_NUMBERS * len(tensor) // tensor.numel()
    for part in tensor.split(max(rows, 1)):
        yield from [part] if rows else _in_parts(part[0])
