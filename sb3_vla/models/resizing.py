"""Images in bytes made smaller or larger as Pillow does it, to the last bit, on any device.

torch's own antialiased resize of bytes is for the CPU alone: on a GPU it takes floating point numbers, whose rounding
is another. Pillow computes with integers, so what is left to the device is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["box", "triangle", "cubic"]
_BITS = 22  # after the binary point of a weight


def resize_bytes(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize.

    :param image: uint8 (N, C, height, width).
    :param size: height and width to have.
    :return: uint8 (N, C, *size).
    """
    if image.device.type == "cpu":
        return F.interpolate(image, size, mode="bilinear", antialias=True)
    return resize_by_integers(image, size)


def resize_by_area(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The mean of what each new pixel covers; bilinear where a side becomes longer. It is what loading demonstrations
    does to their images.

    Parameters as of :func:`resize_bytes`.
    """
    shrinks = size[0] <= image.shape[2] and size[1] <= image.shape[3]
    return resize_by_integers(image, size, "box" if shrinks else "triangle")


def resize_by_integers(image: Tensor, size: tuple[int, int], kernel: Kernel = "triangle") -> Tensor:
    """Pillow's resize: columns first, rounded to bytes, then rows. Parameters as of :func:`resize_bytes`.

    :param kernel: weights of the pixels by their distance: ``box`` (area average), ``triangle`` (bilinear, that of
        :func:`resize_bytes`) or ``cubic`` (Keys 1981, a = -1/2).
    """
    for axis, after in ((3, size[1]), (2, size[0])):
        before = image.shape[axis]
        if before == after:
            continue
        places, weights = (torch.from_numpy(part).to(image.device) for part in _taps(before, after, kernel))
        along = (1, 1, 1, -1) if axis == 3 else (1, 1, -1, 1)
        total = torch.full((), 1 << (_BITS - 1), dtype=torch.int32, device=image.device)
        for place, weight in zip(places, weights, strict=True):
            total = total + image.index_select(axis, place).int() * weight.reshape(along)
        image = (total >> _BITS).clamp_(0, 255).to(torch.uint8)
    return image


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


#: by name: half its width, and its value at a distance, both in units of the coarser grid's pixels
_KERNELS: dict[Kernel, tuple[float, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]]] = {
    "box": (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).astype(np.float64)),
    "triangle": (1.0, lambda x: np.maximum(1.0 - np.abs(x), 0.0)),
    "cubic": (2.0, _cubic),
}


def _taps(before: int, after: int, kernel: Kernel) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Which pixels of a line each new one is a mean of, and their weights in units of 2^-22; both (pixels, after)."""
    width, value = _KERNELS[kernel]
    scale = before / after
    stretch = max(scale, 1.0)
    support = width * stretch
    center = (np.arange(after) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), before)
    places = first + np.arange((last - first).max())[:, None]
    weights = value((places - center + 0.5) * (1.0 / stretch))
    weights[places >= last] = 0.0
    weights /= np.cumsum(weights, axis=0)[-1]  # one after the other, as Pillow sums them
    return np.minimum(places, before - 1), np.trunc(weights * 2**_BITS + np.copysign(0.5, weights)).astype(np.int32)
