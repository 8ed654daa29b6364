"""Demonstrations as plain arrays, for imitation::

    collect("data/mt10", "MT10", episodes_per_task=10)
    demonstrations = Demonstrations.load("data/mt10")
    train, validation = demonstrations.split(0.1, seed=0)
    actions, mask = demonstrations.action_chunks(train[:128], horizon=5)

On disk they are LeRobot datasets; :mod:`sb3_vla.lerobot_writer` describes them.

Letters: N frames, E episodes, B frames of a batch, H x W pixels, S state and A action dimensions.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mw_envs.tasks import TASKS, Trial, did_you_mean
from sb3_vla.collecting import CollectReport, TaskReport, collect
from sb3_vla.lerobot_reader import ACTION, IMAGE, STATE, LeRobotReader
from sb3_vla.lerobot_writer import DemonstrationWriter, Episode

__all__ = ["CollectReport", "DemonstrationWriter", "Demonstrations", "Episode", "TaskReport", "collect"]

_log = logging.getLogger(__name__)
# Where the system tells of memory; and by the version of control groups the names of limit, use and counters.
_SYSTEM = Path("/")
_FIRST_VERSION = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_SECOND_VERSION = ("memory.max", "memory.current", "")


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
    :param tasks: Task name of each episode: MetaWorld's if the dataset has ``task_id``, else the sentence.
    :param episode_index: int64 ``(N,)``, 0 to E - 1 (after a selection of tasks, not the dataset's own numbers).
    :param frame_index: int64 ``(N,)``, number of the frame in its episode.
    :param episode_starts: int64 ``(E,)``, first frame of each episode.
    :param episode_ends: int64 ``(E,)``, one past its last frame.
    :param trials: Trial of each episode, None where the dataset does not name it.
    :param camera: How the pictures were taken, as far as the dataset says (``camera``, ``crop``, ...).
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
    ) -> Demonstrations:
        """Load a LeRobot dataset v3.0 with pictures as PNG or as video.

        Ranks (:mod:`sb3_vla.distributed`) must all call it. Those on one machine that load the same pictures have them
        in memory once: the first one decodes them to a file without a name in the folder for temporary files, which all
        of them map, read-only.

        :param root: Folder of the dataset.
        :param tasks: Only the episodes of these tasks; MetaWorld names or sentences.
        :param image_size: Bring the pictures to ``image_size x image_size`` while decoding (area average).
        :param rename: The dataset's feature name -> ours, e.g. ``{"observation.images.camera1": "observation.image"}``.
        :raises FileNotFoundError: If the folder or one of its files is missing.
        :raises ValueError: If the dataset has another version, lacks a feature, is empty or damaged, does not have a
            requested task, or does not fit in memory, or ranks have no room for their file.
        """
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        reader = LeRobotReader(root, rename=rename)
        reader.require([IMAGE, STATE, ACTION, "episode_index", "frame_index", "task_index"])
        has_task_id = "task_id" in reader.features
        names = [STATE, ACTION, "episode_index", "frame_index", "task_index", *(["task_id"] if has_task_id else [])]
        columns = reader.columns(names)
        # Rows of one episode are contiguous, in the order of meta/episodes; lengths tell where each begins.
        lengths = np.array([episode["length"] for episode in reader.episodes], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        expected = np.repeat([episode["episode_index"] for episode in reader.episodes], lengths)
        if not np.array_equal(columns["episode_index"], expected):
            raise ValueError(f"The data files of {root} do not hold the episodes of meta/episodes. Download it again.")
        numbers = [int(columns["task_index"][start]) for start in starts]
        unknown = sorted(set(numbers) - reader.instructions.keys())
        if unknown:
            raise ValueError(
                f"Episodes of {root} have the task_index {unknown}, which meta/tasks.parquet has no sentence for. "
                "Download it again."
            )
        sentences = [reader.instructions[number] for number in numbers]
        episode_tasks = sentences
        if has_task_id:
            by_id = {task.task_id: task.name for task in TASKS.values()}
            ids = columns["task_id"][starts].astype(int)
            episode_tasks = [by_id.get(number, sentence) for number, sentence in zip(ids, sentences, strict=True)]

        kept = _select_episodes(root, episode_tasks, sentences, tasks)
        rows = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in kept])
        _check_memory(root, reader, len(rows), image_size)
        states, actions = (columns[name][rows].astype(np.float32) for name in (STATE, ACTION))
        for name, values in ((STATE, states), (ACTION, actions)):
            if not np.isfinite(values).all():
                raise ValueError(f"{name} of {root} has {np.sum(~np.isfinite(values))} values that are not finite.")
        outside = int(np.any(np.abs(actions) > 1.0, axis=1).sum())
        if outside:
            _log.warning("%s: %d of %d actions lay outside [-1, 1] and were clipped.", root, outside, len(rows))
        instructions = list(dict.fromkeys(sentences[i] for i in kept))
        ends = np.cumsum(lengths[kept])
        return cls(
            images=_images(reader, rows, image_size),
            states=states,
            actions=np.clip(actions, -1.0, 1.0),
            instructions=instructions,
            instruction_index=np.repeat([instructions.index(sentences[i]) for i in kept], lengths[kept]),
            tasks=[episode_tasks[i] for i in kept],
            episode_index=np.repeat(np.arange(len(kept)), lengths[kept]),
            frame_index=columns["frame_index"][rows].astype(np.int64),
            episode_starts=ends - lengths[kept],
            episode_ends=ends,
            trials=[_trial(reader.episodes[i]) for i in kept],
            camera=(reader.features[IMAGE].get("info") or {}).get("camera", {}),
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
            raise ValueError(f"horizon must be at least 1 action, got {horizon}")
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
            raise ValueError(f"validation_fraction must lie in [0, 1), got {validation_fraction}")
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
        """Statistics for the normalisation of a model, of the clipped actions.

        :return: ``{"state": {...}, "action": {...}}``, each with ``mean``, ``std``, ``min``, ``max`` and the
            quantiles ``q01`` and ``q99``, float32 ``(S,)`` or ``(A,)``.
        """
        return {
            name: {
                "mean": values.mean(axis=0, dtype=np.float64).astype(np.float32),
                "std": values.std(axis=0, dtype=np.float64).astype(np.float32),
                "min": values.min(axis=0),
                "max": values.max(axis=0),
                "q01": np.quantile(values, 0.01, axis=0).astype(np.float32),
                "q99": np.quantile(values, 0.99, axis=0).astype(np.float32),
            }
            for name, values in (("state", self.states), ("action", self.actions))
        }


def _select_episodes(
    root: str | Path, tasks: Sequence[str], sentences: Sequence[str], wanted: Sequence[str] | None
) -> np.ndarray:
    if wanted is None:
        return np.arange(len(tasks))
    if isinstance(wanted, str):
        raise ValueError(f"tasks must be a list of task names, got the string {wanted!r}; write tasks=[{wanted!r}]")
    known = dict.fromkeys([*tasks, *sentences])
    for name in wanted:
        if name not in known:
            raise ValueError(f"The dataset {root} has no episode of {name!r}; {did_you_mean(name, known)}")
    kept = [i for i, names in enumerate(zip(tasks, sentences, strict=True)) if set(names) & set(wanted)]
    if not kept:
        raise ValueError("tasks is empty; name at least one task, or pass None for all of the dataset")
    return np.array(kept)


def _trial(episode: Mapping[str, Any]) -> Trial | None:
    if episode.get("trial/task") is None:
        return None
    return Trial(episode["trial/task"], episode["trial/seed"], episode["trial/goal"])


def _images(reader: LeRobotReader, rows: np.ndarray, size: int | None) -> np.ndarray:
    """Pictures of frames, once for all ranks of a machine that ask for the same."""
    from sb3_vla.distributed import current_ranks  # imports torch, which takes seconds and which reading needs not

    ranks = current_ranks()
    wanted = (socket.gethostname(), str(reader.root.resolve()), size, hashlib.sha256(rows.tobytes()).hexdigest())
    asked = ranks.gather(wanted)
    first = asked.index(wanted)
    file: Path | None = None
    images: np.ndarray | None = None
    error: Exception | None = None
    shape = (len(rows), *((size, size) if size is not None else reader.image_shape()), 3)
    try:
        if ranks.rank == first:
            try:
                if asked.count(wanted) > 1:
                    file, images = _shared_array(shape)
                images = reader.images(rows, size, images)
                images.setflags(write=file is None)  # what is shared nobody may change
            except Exception as raised:  # the others shall not wait for pictures that do not come
                error = raised
        place, error = ranks.gather((file, error))[first]
        if error is not None:
            raise error
        if images is None:
            assert place is not None
            images = np.memmap(place, np.uint8, "r", shape=shape)
        ranks.wait()  # until all have opened the file, which then needs no name
    finally:
        if file is not None:
            file.unlink()
    return np.asarray(images)


def _shared_array(shape: tuple[int, ...]) -> tuple[Path, np.ndarray]:
    """A new file in the folder for temporary files, and its content, uint8, as an array.

    :raises ValueError: if there is no room for it.
    """
    handle, name = tempfile.mkstemp(prefix="sb3_vla_pictures.")
    needed = math.prod(shape)
    try:
        if hasattr(os, "posix_fallocate"):  # a write to a mapped file that finds the disk full ends the process
            os.posix_fallocate(handle, 0, needed)
        os.ftruncate(handle, needed)
        return Path(name), np.memmap(name, np.uint8, "r+", shape=shape)
    except OSError as error:
        os.unlink(name)
        raise ValueError(
            f"The pictures that ranks of this machine share need {needed / 1e9:.1f} GB in {tempfile.gettempdir()}: "
            f"{error.strerror}. Set the variable TMPDIR to a folder with more room, or pass fewer tasks or image_size"
        ) from error
    finally:
        os.close(handle)


def _check_memory(root: str | Path, reader: LeRobotReader, frames: int, image_size: int | None) -> None:
    height, width = (image_size, image_size) if image_size is not None else reader.image_shape()
    needed, free = frames * height * width * 3, available_memory()
    if needed <= free:
        return
    fitting = [size for size in (224, 128, 96, 64) if size < min(height, width) and frames * size * size * 3 <= free]
    advice = f"image_size={fitting[0]} ({frames * fitting[0] ** 2 * 3 / 1e9:.1f} GB) or " if fitting else ""
    raise ValueError(
        f"{frames} frames of {height}x{width} pixels of {root} need {needed / 1e9:.1f} GB of memory and "
        f"{free / 1e9:.1f} GB are free. Pass {advice}fewer tasks (tasks=[...])."
    )


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of each control group around it that has a limit.

    Files that the system keeps in memory count as free, since it gives them up when memory is asked for.
    """
    limits = []
    with contextlib.suppress(OSError, ValueError):
        lines = (_SYSTEM / "proc/meminfo").read_text().splitlines()
        limits += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    for folder, (most, used, prefix) in _control_groups():
        with contextlib.suppress(OSError, ValueError):  # no number where there is no limit
            limit, taken = (int((folder / name).read_text()) for name in (most, used))
            with contextlib.suppress(OSError):
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                taken -= sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
            limits.append(max(limit - max(taken, 0), 0))
    return min(limits, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _control_groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the groups around this process, each with its version's names of limit, use and counters."""
    lines = ["0::/"]
    with contextlib.suppress(OSError):
        lines = (_SYSTEM / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _SYSTEM / "sys/fs/cgroup"
        if "memory" in controllers.split(","):
            root, names = root / "memory", _FIRST_VERSION
        elif controllers == "":
            names = _SECOND_VERSION
        else:
            continue
        # In a container the path may be the machine's, of which the root is what is seen here.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, names
            if folder == root:
                break
