"""Images in bytes made smaller or larger as Pillow does it, to the last bit, on any device.

torch's own antialiased resize of bytes is for the CPU alone: on a GPU it takes floating point numbers, whose rounding
is another. Pillow computes with integers, so what is left to the device is exact.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

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
    return resize_by_integers(image, size, box=shrinks)


def resize_by_integers(image: Tensor, size: tuple[int, int], box: bool = False) -> Tensor:
    """:func:`resize_bytes` by its definition: columns first, rounded to bytes, then rows.

    :param box: weigh alike all that a new pixel covers, instead of by a triangle of twice its width.
    """
    for axis, after in ((3, size[1]), (2, size[0])):
        before = image.shape[axis]
        if before == after:
            continue
        places, weights = (torch.from_numpy(part).to(image.device) for part in _taps(before, after, box))
        along = (1, 1, 1, -1) if axis == 3 else (1, 1, -1, 1)
        total = torch.full((), 1 << (_BITS - 1), dtype=torch.int32, device=image.device)
        for place, weight in zip(places, weights, strict=True):
            total = total + image.index_select(axis, place).int() * weight.reshape(along)
        image = (total >> _BITS).clamp_(0, 255).to(torch.uint8)
    return image


def _taps(before: int, after: int, box: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Which pixels of a line each new one is a mean of, and their weights in units of 2^-22; both (pixels, after).

    A box or triangle as wide as what is left out between two new pixels, normalized.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    support = stretch / 2 if box else stretch
    center = (np.arange(after) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), before)
    places = first + np.arange((last - first).max())[:, None]
    distance = (places - center + 0.5) * (1.0 / stretch)
    inside = ((distance > -0.5) & (distance <= 0.5)).astype(np.float64)
    weights = inside if box else np.maximum(1.0 - np.abs(distance), 0.0)
    weights[places >= last] = 0.0
    weights /= np.cumsum(weights, axis=0)[-1]  # one after the other, as Pillow sums them
    return np.minimum(places, before - 1), np.floor(weights * 2**_BITS + 0.5).astype(np.int32)
