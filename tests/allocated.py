"""What memory takes in a test: tensors that are made, and those that are alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """Bytes of the CPU's memory that tensors take which are made in this context: now, and at most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._tensors((args, kwargs)):
            self._known.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                if func.overloadpacket is torch.ops.aten.set_:  # a storage that is there, such as a mapped file
                    continue
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._leave, storage.nbytes()).atexit = False
        return result

    def _leave(self, size: int) -> None:
        self.now -= size

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]


def alive(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of all tensors of this shape and type that somebody still holds, each memory counted once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor)]
    found = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors if t.shape == shape and t.dtype == dtype}
    return sum(found.values())
