"""Demonstrations as plain arrays, for imitation::

    collect("data/mt10", "MT10", episodes_per_task=10)
    demonstrations = Demonstrations.load("data/mt10")
    train, validation = demonstrations.split(0.1, seed=0)
    actions, mask = demonstrations.action_chunks(train[:128], horizon=5)

On disk they are LeRobot datasets; :mod:`sb3_vla.data.lerobot_writer` describes them.

Letters: N frames, E episodes, B frames of a batch, H x W pixels, S state and A action dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mw_envs.hand_view import HandView
from mw_envs.machine import available_memory
from mw_envs.rendering import FULL_VIEW
from mw_envs.tasks import INSTRUCTION_BYTES, TASKS, Trial, did_you_mean, encode_instruction
from sb3_vla.common.errors import InputError
from sb3_vla.data.collecting import CollectReport, TaskReport, collect
from sb3_vla.data.lerobot_reader import ACTION, HAND_IMAGE, IMAGE, STATE, LeRobotReader
from sb3_vla.data.lerobot_writer import DemonstrationWriter, Episode

__all__ = ["CollectReport", "DemonstrationWriter", "Demonstrations", "Episode", "TaskReport", "collect"]

_log = logging.getLogger(__name__)
_SMALLEST_STD = np.float32(1e-2)


@dataclass
class Demonstrations:
    """Demonstrations in memory, frame by frame; the frames of an episode are contiguous.

    Actions are clipped to [-1, 1]: the published ``lerobot/metaworld_mt50`` holds the experts' raw outputs, up to 24,
    and the simulator clips them too.

    :param images: uint8 ``(N, H, W, 3)``, what was seen before each action.
    :param states: float32 ``(N, S)``.
    :param actions: float32 ``(N, A)``.
    :param instructions: The different sentences.
    :param instruction_index: int64 ``(N,)``, each frame's row of ``instructions``.
    :param tasks: Task name of each episode: MetaWorld's if the dataset has ``task_id``, else its first sentence.
    :param episode_index: int64 ``(N,)``, 0 to E - 1 (after a selection of tasks, not the dataset's own numbers).
    :param frame_index: int64 ``(N,)``, number of the frame in its episode.
    :param episode_starts: int64 ``(E,)``, first frame of each episode.
    :param episode_ends: int64 ``(E,)``, one past its last frame.
    :param trials: Trial of each episode, None where the dataset does not name it.
    :param camera: How the images were taken, as far as the dataset says (``camera``, ``crop``, ...); where they were
        brought to another size, also from which (``render_size``), and how (``resize``).
    :param instruction_bytes: Bytes that a sentence may have, and to which a model's are padded.
    :param hand_images: uint8 ``(N, size, size, 3)``, the hand view, of which ``camera["hand_view"]`` tells the window;
        None where there is none.
    """

    images: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    instructions: list[str]
    instruction_index: np.ndarray
    tasks: list[str]
    episode_index: np.ndarray
    frame_index: np.ndarray
    episode_starts: np.ndarray
    episode_ends: np.ndarray
    trials: list[Trial | None]
    camera: dict[str, Any]
    instruction_bytes: int = INSTRUCTION_BYTES
    hand_images: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.actions)

    @classmethod
    def load(
        cls,
        root: str | Path,
        *,
        tasks: Sequence[str] | None = None,
        image_size: int | None = None,
        rename: Mapping[str, str] | None = None,
        instruction_bytes: int = INSTRUCTION_BYTES,
        hand_view: HandView | None = None,
        allow_missing: bool = False,
    ) -> Demonstrations:
        """Load a LeRobot dataset v3.0 with images as PNG or as video.

        Ranks (:mod:`sb3_vla.distributed.ranks`) must all call it. Those on one machine that load the same images have
        them in memory once, read-only: the first one decodes them to memory that all of them map.

        :param root: Folder of the dataset.
        :param tasks: Only the episodes of these tasks; MetaWorld names, or sentences that are said in them.
        :param image_size: Bring the images to ``image_size x image_size`` while decoding (area average). A model that
            is trained on them is then shown what the environment draws at their own size, brought to this one alike.
        :param rename: The dataset's feature name -> ours, e.g. ``{"observation.images.camera1": "observation.image"}``.
        :param instruction_bytes: Bytes of UTF-8 that a sentence may have.
        :param hand_view: The hand view to have. A dataset that was recorded with one has it in any case, where it does
            not note which, it is this one; from one of full views, such as the published ``lerobot/metaworld_mt50``, it
            is cut while loading.
        :param allow_missing: Whether the dataset may lack some of ``tasks``, though not all.
        :raises FileNotFoundError: If the folder or one of its files is missing.
        :raises ValueError: If the dataset has another version, lacks a feature, is empty or damaged, does not have a
            requested task, has a longer sentence, another hand view or one that nobody names, or does not fit in
            memory.
        """
        if image_size is not None and image_size < 1:
            raise InputError(f"image_size must be at least 1 pixel, got {image_size}")
        reader = LeRobotReader(root, rename=rename)
        reader.require([IMAGE, STATE, ACTION, "episode_index", "frame_index", "task_index"])
        has_task_id = "task_id" in reader.features
        names = [STATE, ACTION, "episode_index", "frame_index", "task_index", *(["task_id"] if has_task_id else [])]
        columns = reader.columns(names)
        starts, lengths = reader.starts, reader.lengths
        numbers = _unique_of_each(columns["task_index"], starts)
        said = set().union(*numbers)
        unknown = sorted(number for number in said if not isinstance(reader.instructions.get(number), str))
        if unknown:
            raise InputError(
                f"Episodes of {root} have the task_index {unknown}, which meta/tasks.parquet has no sentence for. "
                "Download it again."
            )
        sentences = [[reader.instructions[number] for number in of_episode] for of_episode in numbers]
        episode_tasks = [of_episode[0] for of_episode in sentences]
        if has_task_id:
            by_id = {task.task_id: task.name for task in TASKS.values()}
            for episode, ids in enumerate(_unique_of_each(columns["task_id"], starts)):
                if len(ids) == 1:
                    episode_tasks[episode] = by_id.get(ids[0], episode_tasks[episode])

        kept = _select_episodes(root, episode_tasks, sentences, tasks, allow_missing)
        rows = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in kept])
        _check_memory(root, reader, len(rows), image_size, hand_view)
        # A feature of one number is stored as a plain column, or as lists of one.
        states, actions = (columns[name][rows].reshape(len(rows), -1).astype(np.float32) for name in (STATE, ACTION))
        for name, values in ((STATE, states), (ACTION, actions)):
            if not np.isfinite(values).all():
                raise InputError(f"{name} of {root} has {np.sum(~np.isfinite(values))} values that are not finite.")
        outside = int(np.any(np.abs(actions) > 1.0, axis=1).sum())
        if outside:
            _log.warning("%s: %d of %d actions lay outside [-1, 1] and were clipped.", root, outside, len(rows))
        said_by_frame = columns["task_index"][rows].tolist()
        spoken = {number: reader.instructions[number] for number in dict.fromkeys(said_by_frame)}
        _check_instructions(root, spoken, instruction_bytes)
        instructions = list(dict.fromkeys(spoken.values()))
        index = {number: instructions.index(sentence) for number, sentence in spoken.items()}
        ends = np.cumsum(lengths[kept])
        view = _view(reader, image_size)
        hand_images = None
        if HAND_IMAGE in reader.features:
            view["hand_view"] = dataclasses.asdict(_recorded_hand_view(reader, view.get("hand_view"), hand_view))
            hand_images = _images(reader, rows, None, HAND_IMAGE)
        if hand_view is None or HAND_IMAGE in reader.features:
            images = _images(reader, rows, image_size)
        else:
            _check_full_view(reader, view, hand_view)
            camera = view.get("camera", "corner2")  # the published one's where the dataset does not say it
            images, hand_images = _images_and_cuts(reader, rows, image_size, hand_view, camera, states)
            view["hand_view"] = dataclasses.asdict(hand_view)
        return cls(
            images=images,
            states=states,
            actions=np.clip(actions, -1.0, 1.0),
            instructions=instructions,
            instruction_index=np.array([index[number] for number in said_by_frame], dtype=np.int64),
            tasks=[episode_tasks[i] for i in kept],
            episode_index=np.repeat(np.arange(len(kept)), lengths[kept]),
            frame_index=columns["frame_index"][rows].astype(np.int64),
            episode_starts=ends - lengths[kept],
            episode_ends=ends,
            trials=[_trial(reader.episodes[i]) for i in kept],
            camera=view,
            instruction_bytes=instruction_bytes,
            hand_images=hand_images,
        )

    def action_chunks(self, indices: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """The action of each frame and those that followed.

        :param indices: int ``(B,)``, frames.
        :param horizon: Length of a chunk.
        :return: Actions float32 ``(B, horizon, A)``, and bool ``(B, horizon)``, False past the end of the episode,
            where its last action is repeated.
        :raises ValueError: If ``horizon`` is not positive.
        """
        if horizon < 1:
            raise InputError(f"horizon must be at least 1 action, got {horizon}")
        indices = np.asarray(indices)
        ends = self.episode_ends[self.episode_index[indices]][:, None]
        frames = indices[:, None] + np.arange(horizon)
        return self.actions[np.minimum(frames, ends - 1)], frames < ends

    def split(self, validation_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Divide the frames by whole episodes, each task in proportion.

        Every task keeps at least one episode for training, so tasks with a single one are not validated.

        :param validation_fraction: Share of the episodes for validation, in [0, 1).
        :param seed: Which episodes; the same seed gives the same division.
        :return: Frames for training and for validation, int64, ascending.
        :raises ValueError: If the fraction lies outside [0, 1).
        """
        if not 0.0 <= validation_fraction < 1.0:
            raise InputError(f"validation_fraction must lie in [0, 1), got {validation_fraction}")
        generator = np.random.default_rng(seed)
        names = np.array(self.tasks)
        order = generator.permutation(np.unique(names))
        validated = np.zeros(len(names), dtype=bool)
        due = 0.0
        for name in order:
            # What a task's share leaves over is passed on, so that 10 % of 5 episodes takes one from every second task.
            episodes = generator.permutation(np.flatnonzero(names == name))
            due += validation_fraction * len(episodes)
            count = min(int(due + 0.5), len(episodes) - 1)
            due -= count
            validated[episodes[:count]] = True
        of_validation = validated[self.episode_index]
        return np.flatnonzero(~of_validation), np.flatnonzero(of_validation)

    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Statistics for the normalization of a model, of the clipped actions.

        What a model divides by is never next to nothing, or a number that hardly moves in the data would be magnified
        without bound where it does move: a deviation is at least 0.01, and the upper end of a range at least 0.02 above
        the lower one. Alone the ``max`` of an action that is always the same is its ``min``: what a model gives lies
        between the two, so it gives that action.

        :return: ``{"state": {...}, "action": {...}}``, each with ``mean``, ``std``, ``min``, ``max`` and the
            quantiles ``q01`` and ``q99``, float32 ``(S,)`` or ``(A,)``.
        """
        found = {}
        for name, values in (("state", self.states), ("action", self.actions)):
            low, high = values.min(axis=0), values.max(axis=0)
            always = (low == high) & (name == "action")
            q01, q99 = (np.quantile(values, share, axis=0).astype(np.float32) for share in (0.01, 0.99))
            found[name] = {
                "mean": values.mean(axis=0, dtype=np.float64).astype(np.float32),
                "std": np.maximum(values.std(axis=0, dtype=np.float64).astype(np.float32), _SMALLEST_STD),
                "min": low,
                "max": np.where(always, high, np.maximum(high, low + 2 * _SMALLEST_STD)),
                "q01": q01,
                "q99": np.maximum(q99, q01 + 2 * _SMALLEST_STD),
            }
        return found


def _select_episodes(
    root: str | Path,
    tasks: Sequence[str],
    sentences: Sequence[Sequence[str]],
    wanted: Sequence[str] | None,
    allow_missing: bool,
) -> np.ndarray:
    """Numbers of the episodes of the wanted tasks.

    :param tasks: each episode's name.
    :param sentences: what is said in each episode.
    """
    if wanted is None:
        return np.arange(len(tasks))
    if isinstance(wanted, str):
        raise InputError(f"tasks must be a list of task names, got the string {wanted!r}; write tasks=[{wanted!r}]")
    names = [{task, *said} for task, said in zip(tasks, sentences, strict=True)]
    known = sorted(set().union(*names))
    for name in wanted:
        if name not in known and not (allow_missing and set(wanted) & set(known)):
            raise InputError(f"The dataset {root} has no episode of {name!r}; {did_you_mean(name, known)}")
    kept = [i for i, found in enumerate(names) if found & set(wanted)]
    if not kept:
        raise InputError("tasks is empty; name at least one task, or pass None for all of the dataset")
    return np.array(kept)


def _unique_of_each(values: np.ndarray, starts: np.ndarray) -> list[list[Any]]:
    """The different values of each episode, in the order in which they come."""
    return [list(dict.fromkeys(part.tolist())) for part in np.split(values, starts[1:])]


def _check_instructions(root: str | Path, sentences: Mapping[int, str], limit: int) -> None:
    for number, sentence in sentences.items():
        try:
            encode_instruction(sentence, limit, f"task_index {number} in the dataset {root}")
        except ValueError as error:
            longest = max(len(text.encode("utf-8")) for text in sentences.values())
            advice = f"; load the dataset with instruction_bytes={longest} as well" if longest > limit else ""
            raise InputError(f"{error}{advice}") from error


def _view(reader: LeRobotReader, image_size: int | None) -> dict[str, Any]:
    """How the images were taken, as far as the dataset says, and at which size where they are given another."""
    camera = (reader.features[IMAGE].get("info") or {}).get("camera")
    view = dict(camera) if isinstance(camera, Mapping) else {}
    height, width = reader.image_shape()
    if image_size is None or (height, width) == (image_size, image_size):
        return view
    return {"render_size": height if height == width else [height, width], "resize": "area", **view}


def _trial(episode: Mapping[str, Any]) -> Trial | None:
    """The trial; in a merged dataset, of which not all name it, numbers come as floats and nothing as None or NaN."""
    task = episode.get("trial/task")
    return Trial(task, int(episode["trial/seed"]), int(episode["trial/goal"])) if isinstance(task, str) else None


def _recorded_hand_view(reader: LeRobotReader, note: object, asked: HandView | None) -> HandView:
    """What a dataset's images of the hand show: as it notes, or else as it is asked for."""
    height, width = reader.image_shape(HAND_IMAGE)
    if note is None and asked is None:
        raise InputError(
            f"{reader.root} has {HAND_IMAGE} and does not note which window it shows; give "
            f"hand_view=HandView(size={height}, window=..., border=...)"
        )
    try:
        recorded = asked if note is None else HandView.noted(note)
    except ValueError as error:
        raise InputError(f"{reader.root}: {error}") from error
    assert recorded is not None
    if asked not in (None, recorded):
        raise InputError(f"{reader.root} was recorded with {recorded}, but {asked} is asked for; leave hand_view out")
    if (height, width) != (recorded.size, recorded.size):
        raise InputError(f"{reader.root} has {HAND_IMAGE} of {height}x{width} pixels, which is not {recorded}")
    return recorded


def _check_full_view(reader: LeRobotReader, view: Mapping[str, Any], hand: HandView) -> None:
    """:raises ValueError: for images from which no hand view can be cut."""
    crop, (height, width) = view.get("crop"), reader.image_shape()
    if crop not in (None, "full") and tuple(crop) != FULL_VIEW:
        raise InputError(
            f"{reader.root} holds pictures of crop={crop}, from which no hand view is cut; leave hand_view "
            f"out, or record the dataset with hand_view={hand.size}"
        )
    if height != width:
        raise InputError(f"A hand view is cut from square pictures; {reader.root} has {height}x{width} pixels")


def _images(reader: LeRobotReader, rows: np.ndarray, size: int | None, feature: str = IMAGE) -> np.ndarray:
    """Images of frames, once for all ranks of a machine that ask for the same."""
    shape = (len(rows), *((size, size) if size is not None else reader.image_shape(feature)), 3)

    def decode(into: np.ndarray) -> None:
        reader.images(rows, size, into.reshape(shape), feature)

    return _once(reader, rows, (feature, size), math.prod(shape), decode).reshape(shape)


def _images_and_cuts(
    reader: LeRobotReader, rows: np.ndarray, size: int | None, hand: HandView, camera: str, states: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_images`, and the hand view, which is cut from each image of the full view as it is decoded."""
    shape = (len(rows), *((size, size) if size is not None else reader.image_shape()), 3)
    hand_shape, count = (len(rows), hand.size, hand.size, 3), math.prod(shape)

    def decode(into: np.ndarray) -> None:
        windows = into[count:].reshape(hand_shape)

        def cut(position: int, picture: np.ndarray) -> None:
            windows[position] = hand.cut(picture[None], camera, states[position : position + 1])[0]

        reader.images(rows, size, into[:count].reshape(shape), look=cut)

    both = _once(reader, rows, (IMAGE, size, hand, camera), count + math.prod(hand_shape), decode)
    return both[:count].reshape(shape), both[count:].reshape(hand_shape)


def _once(
    reader: LeRobotReader, rows: np.ndarray, what: tuple[Any, ...], count: int, decode: Callable[[np.ndarray], None]
) -> np.ndarray:
    """What is decoded, uint8 (count,), in memory once for all ranks of a machine that ask for the same.

    :param what: of these rows, to tell it from other things.
    :param decode: writes into such an array.
    """
    from sb3_vla.distributed.ranks import (
        current_ranks,  # imports torch, which takes seconds and which reading needs not
    )

    ranks = current_ranks()
    wanted = (_can_share_with(), str(reader.root.resolve()), what, hashlib.sha256(rows.tobytes()).hexdigest())
    asked = ranks.gather(wanted)
    first = asked.index(wanted)
    shared: int | None = None
    decoded: np.ndarray | None = None
    error: Exception | None = None
    try:
        if ranks.rank == first:
            try:
                if asked.count(wanted) > 1:
                    shared = _shared_memory(count)
                    decoded = np.memmap(_place(shared), np.uint8, "r+", shape=count)
                else:
                    decoded = np.empty(count, np.uint8)
                decode(decoded)
                decoded.setflags(write=shared is None)  # what is shared nobody may change
            except Exception as raised:  # the others shall not wait for images that do not come
                error = raised
        place, error = ranks.gather((None if shared is None else _place(shared), error))[first]
        if error is not None:
            raise error
        if decoded is None:
            assert place is not None
            decoded = np.memmap(place, np.uint8, "r", shape=count)
        ranks.wait()  # until all have opened it, who then keep it alive
    finally:
        if shared is not None:
            os.close(shared)
    return np.asarray(decoded)


def _can_share_with() -> tuple[Any, ...]:
    """Ranks for which this is the same see one another's processes, and so their memory."""
    return socket.gethostname(), os.readlink("/proc/self/ns/pid")


def _place(handle: int) -> str:
    return f"/proc/{os.getpid()}/fd/{handle}"


def _shared_memory(count: int) -> int:
    """A handle to so many bytes of memory, which end with the last process that has them open.

    :raises ValueError: if there is no room for it.
    """
    handle = os.memfd_create("sb3_vla_pictures")
    try:
        os.posix_fallocate(handle, 0, count)  # a write to mapped memory that finds no room ends the process
    except OSError as error:
        os.close(handle)
        raise InputError(
            f"The pictures that ranks of this machine share need {count / 1e9:.1f} GB of memory: {error.strerror}. "
            "Pass fewer tasks or image_size"
        ) from error
    return handle


def _check_memory(
    root: str | Path, reader: LeRobotReader, frames: int, image_size: int | None, hand_view: HandView | None
) -> None:
    height, width = (image_size, image_size) if image_size is not None else reader.image_shape()
    needed, free = frames * height * width * 3, available_memory()
    if HAND_IMAGE in reader.features:
        needed += frames * math.prod(reader.image_shape(HAND_IMAGE)) * 3
    elif hand_view is not None:
        needed += frames * hand_view.size**2 * 3
    if needed <= free:
        return
    fitting = [size for size in (224, 128, 96, 64) if size < min(height, width) and frames * size * size * 3 <= free]
    advice = f"image_size={fitting[0]} ({frames * fitting[0] ** 2 * 3 / 1e9:.1f} GB) or " if fitting else ""
    raise InputError(
        f"{frames} frames of {height}x{width} pixels of {root} need {needed / 1e9:.1f} GB of memory and "
        f"{free / 1e9:.1f} GB are free. Pass {advice}fewer tasks (tasks=[...])."
    )
