"""What does not move in a view, drawn once, and which of these the software renderer keeps."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mw_envs.rendering.software import arrays

#: the fields of a background that are drawn; the other one is a map of shadows
PICTURES = ("bright", "dark", "nearness", "light_u", "light_v", "light_d", "tiles")


@dataclass(frozen=True)
class Still:
    """What does not move, seen in a view.

    :param base: the background that it was drawn over, or itself.
    :param spans: first and last pixel of each row whose samples may differ from that's, int32 (rows, 2).
    """

    background: arrays.Background
    base: arrays.Background
    spans: npt.NDArray[np.int32]

    @functools.cached_property
    def nearest(self) -> float:
        """Distance along the camera's axis of what is nearest to it, meters."""
        return 1.0 / max(float(self.background.nearness.max()), 1e-9)

    @property
    def own_bytes(self) -> int:
        """What it takes beyond its base."""
        images = sum(int(getattr(self.background, name).nbytes) for name in PICTURES)
        return int(self.background.shadows.depth.nbytes) + images


class Stills:
    """Those used last, as many as a number of bytes holds, and one in any case; several threads may use them."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[Any, Still] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Any) -> Still | None:
        """The one of a key, None where it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Any, still: Still) -> tuple[Still, list[Still]]:
        """Keep one, unless another thread has put one of that key meanwhile.

        :return: the one that is kept, and those that had to go for it.
        """
        gone = []
        with self._lock:
            kept = self._kept.setdefault(key, still)
            if kept is still:
                self._bytes += still.own_bytes
            while self._bytes > self._limit and len(self._kept) > 1:
                gone.append(self._kept.popitem(last=False)[1])
                self._bytes -= gone[-1].own_bytes
        return kept, gone

    def forget(self, base: arrays.Background) -> None:
        """Let go of those that were drawn over a background."""
        with self._lock:
            for key in [key for key, still in self._kept.items() if still.base is base]:
                self._bytes -= self._kept.pop(key).own_bytes
