"""Batches of demonstrations, and the imitation loss on a batch that ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mw_envs.hand_view import HandView
from mw_envs.tasks import encode_instruction
from sb3_vla.common.batch_noise import part_of_batch
from sb3_vla.common.errors import InputError
from sb3_vla.data.demonstrations import Demonstrations
from sb3_vla.distributed.ranks import Ranks
from sb3_vla.models import VLAModel


class DemonstrationBatches:
    """Batches of demonstrations as tensors, for imitation and for rehearsal beside reinforcement learning.

    :param demonstrations: the data.
    :param frames: which frames to draw from, None for all.
    :param horizon: H.
    :param shift: random shift of the images, pixels.
    :param seed: of order and shifts.
    """

    def __init__(
        self, demonstrations: Demonstrations, frames: np.ndarray | None, horizon: int, shift: int, seed: int
    ) -> None:
        self.demonstrations = demonstrations
        self.frames = np.arange(len(demonstrations)) if frames is None else frames
        self.horizon = horizon
        self.shift = shift
        self.generator = np.random.default_rng(seed)
        length = demonstrations.instruction_bytes
        self._instructions = np.stack(
            [encode_instruction(text, length, "the demonstrations") for text in demonstrations.instructions]
        )

    def sample(
        self, size: int, rows: np.ndarray | None = None, *, hand: bool = True
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """A batch with replacement: observation, actions (N, H, A), mask (N, H).

        :param size: of the batch.
        :param rows: which N of it are wanted, None for all; the generator goes on as if all were.
        :param hand: whether the hand view, where the demonstrations have one, is among the observation.
        """
        return self._batch(self.generator.choice(self.frames, size), self.shift, rows, hand)

    def epoch(self, size: int, *, hand: bool = True) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """All frames once, in order, not shifted; see :meth:`sample`."""
        for start in range(0, len(self.frames), size):
            yield self._batch(self.frames[start : start + size], 0, None, hand)

    def _batch(
        self, index: np.ndarray, shift: int, rows: np.ndarray | None, hand: bool
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        data = self.demonstrations
        rows = np.arange(len(index)) if rows is None else rows
        pictures = {"image": data.images}
        if hand and data.hand_images is not None:
            pictures["hand_image"] = data.hand_images
        shown = {}
        for name, images in pictures.items():
            moves = self.generator.integers(-shift, shift + 1, (2, len(index)))[:, rows] if shift else None
            chosen = images[index[rows]] if moves is None else _shifted(images, index[rows], moves)
            shown[name] = torch.from_numpy(chosen).permute(0, 3, 1, 2)
        index = index[rows]
        actions, mask = data.action_chunks(index, self.horizon)
        observation = {
            **shown,
            "state": torch.from_numpy(data.states[index]),
            "instruction": torch.from_numpy(self._instructions[data.instruction_index[index]]),
        }
        return observation, torch.from_numpy(actions), torch.from_numpy(mask)


def shared_imitation_loss(
    model: VLAModel,
    batches: DemonstrationBatches,
    size: int,
    ranks: Ranks,
    device: torch.device | str = "cpu",
    draws: int = 1,
    loss_of: Callable[..., Tensor] | None = None,
) -> Tensor:
    """What this rank's part of a batch adds to the mean imitation loss of the batch; alone, all of it.

    :param batches: those of all ranks must have the same generator.
    :param size: of the batch.
    :param loss_of: what runs the model's ``imitation_loss``; None for the model itself.
    """
    rows = ranks.rows(size, "frames of a batch")
    observation, actions, mask = batches.sample(size, rows, hand=model.hand_view is not None)
    weight = model.imitation_weight(mask)
    with part_of_batch(rows, size):
        loss = (loss_of or model.imitation_loss)(
            {key: value.to(device) for key, value in observation.items()},
            actions.to(device),
            mask.to(device),
            draws=draws,
        )
    return weight / sum(ranks.gather(weight)) * loss


def check_hand_images(demonstrations: Demonstrations, model: VLAModel) -> None:
    """:raises ValueError: if a model reads a hand view that demonstrations do not show."""
    wanted = model.hand_view
    if wanted is None:
        return
    found = None if demonstrations.hand_images is None else hand_view_of(demonstrations)
    if found != wanted:
        raise InputError(
            f"The model reads the hand view that {wanted} draws; the demonstrations have {found or 'none'}. Record "
            f"them with hand_view={wanted.size}, or load those of full views with Demonstrations.load(..., "
            "hand_view=...)"
        )


def hand_view_of(demonstrations: Demonstrations) -> HandView:
    """The window that the images of the hand show.

    :raises ValueError: if the demonstrations do not note it.
    """
    if demonstrations.camera.get("hand_view") is None:
        raise InputError(
            "The demonstrations have hand_images, and demonstrations.camera does not note which window they show; set "
            'demonstrations.camera["hand_view"] = {"size": ..., "window": ..., "border": ...}'
        )
    return HandView.noted(demonstrations.camera["hand_view"])


def _shifted(images: np.ndarray, index: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Images moved by whole pixels (2, N), edges repeated (DrQ, Kostrikov et al. 2021)."""
    height, width = images.shape[1:3]
    rows = np.clip(np.arange(height) + moves[0][:, None], 0, height - 1)
    columns = np.clip(np.arange(width) + moves[1][:, None], 0, width - 1)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
