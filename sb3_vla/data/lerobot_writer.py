"""Write LeRobot datasets, format v3.0, with nothing but pyarrow, Pillow and PyAV.

On disk a dataset is::

    meta/info.json                              features (name, dtype, shape), frame rate, totals, path templates
    meta/stats.json                             min, max, mean, std, count and quantiles of each feature
    meta/tasks.parquet                          sentence -> task_index
    meta/episodes/chunk-000/file-000.parquet    an episode a row: length, rows, where its data and its video lie
    data/chunk-000/file-000.parquet             a frame a row; images inside as PNG (feature dtype "image"), or
    videos/<feature>/chunk-000/file-000.mp4     images as video (feature dtype "video")

Many episodes share a file; a new one begins when a file has grown past the size that ``info.json`` names. The features
are those of ``lerobot/metaworld_mt50``, so whatever trains on that dataset trains on one of ours.

Letters: T frames of an episode, H x W pixels.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mw_envs.tasks import Trial, get_task
from sb3_vla.common.errors import InputError, InTheWayError, file_errors
from sb3_vla.common.files import begin_folder, entries, finish_folder, write_json
from sb3_vla.common.paths import local_path
from sb3_vla.data.lerobot_reader import ACTION, ENVIRONMENT_STATE, HAND_IMAGE, IMAGE, STATE, VERSION, decode_picture
from sb3_vla.recording.videos import Mp4Writer

ImageStorage = Literal["png", "mp4"]

_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
#: of a dataset; a folder that holds more is not replaced
_FOLDERS = ("meta", "data", "videos")
_FILES_PER_CHUNK = 1000
_DATA_FILE_MB = 100
_VIDEO_FILE_MB = 200
# A key frame every tenth of a second lets a training loop seek; without B-frames, time follows the frame.
_VIDEO_OPTIONS = {"crf": "12", "g": "8", "bf": "0"}

_AXES = ["x", "y", "z", "gripper"]
# Name -> (dtype, shape, names), in the order of the published dataset; the image comes after the environment state.
_COLUMNS: dict[str, tuple[str, tuple[int, ...], list[str] | None]] = {
    STATE: ("float32", (4,), _AXES),
    ACTION: ("float32", (4,), _AXES),
    "next.reward": ("float32", (1,), None),
    "next.success": ("bool", (1,), None),
    "next.done": ("bool", (1,), None),
    ENVIRONMENT_STATE: ("float32", (39,), ["keypoints"]),
    "task_id": ("int16", (1,), None),
    "timestamp": ("float32", (1,), None),
    "frame_index": ("int64", (1,), None),
    "episode_index": ("int64", (1,), None),
    "index": ("int64", (1,), None),
    "task_index": ("int64", (1,), None),
}
_ARROW_TYPES = {"float32": pa.float32(), "bool": pa.bool_(), "int16": pa.int16(), "int64": pa.int64()}
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
# A few frames an episode give the statistics of its images: neighbors are almost equal, and decoding all takes long.
_SAMPLED_FRAMES = 8


@dataclass
class Episode:
    """One demonstration of T frames: row t is what was seen *before* action t, and what came of that action.

    :param trial: Task, seed and goal of the episode; gives the sentence and the task id.
    :param images: uint8 ``(T, H, W, 3)``, or T images already encoded as PNG.
    :param states: float32 ``(T, 4)``, hand x, y, z in meters and gripper opening.
    :param environment_states: float32 ``(T, 39)``, MetaWorld's own observation.
    :param actions: float32 ``(T, 4)``, the action to imitate.
    :param rewards: float32 ``(T,)``, reward of step t.
    :param successes: bool ``(T,)``, whether step t ended in success.
    :param hand_images: images of the hand view, as ``images``; None where the dataset has none.
    """

    trial: Trial
    images: np.ndarray | list[bytes]
    states: np.ndarray
    environment_states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    successes: np.ndarray
    hand_images: np.ndarray | list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.actions)


def encode_png(image: np.ndarray) -> bytes:
    """Encode one uint8 ``(H, W, 3)`` image as PNG, at the fastest compression level."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def _statistics(values: np.ndarray) -> dict[str, list[Any]]:
    """Statistics of a column ``(n,)`` or ``(n, d)``: a list of d numbers each, and the count."""
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    result = {name: getattr(values, name)(axis=0).tolist() for name in ("min", "max", "mean", "std")}
    result["count"] = [len(values)]
    quantiles = np.quantile(values, list(_QUANTILES.values()), axis=0)
    return result | dict(zip(_QUANTILES, quantiles.tolist(), strict=True))


def _image_statistics(histogram: np.ndarray, frames: int) -> dict[str, list[Any]]:
    """Statistics per channel in 0..1, each of shape ``(3, 1, 1)``, from counts ``(3, 256)`` of the 256 levels."""
    levels = np.arange(256) / 255.0
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ levels
    present = [levels[np.flatnonzero(channel)] for channel in histogram]
    cumulative = share.cumsum(axis=1)
    numbers = {
        "min": np.array([channel[0] for channel in present]),
        "max": np.array([channel[-1] for channel in present]),
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0.0)),
    } | {name: levels[(cumulative >= quantile).argmax(axis=1)] for name, quantile in _QUANTILES.items()}
    return {name: value.reshape(3, 1, 1).tolist() for name, value in numbers.items()} | {"count": [frames]}


def _histogram(images: np.ndarray) -> np.ndarray:
    """Counts ``(3, 256)`` of the levels of uint8 images ``(n, H, W, 3)``."""
    return np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _place(number: int) -> dict[str, int]:
    """Chunk and number within it of the n-th file."""
    return dict(zip(("chunk_index", "file_index"), divmod(number, _FILES_PER_CHUNK), strict=True))


class DemonstrationWriter:
    """Write episodes as one LeRobot dataset v3.0.

    Everything goes to a hidden sibling of ``root`` that is renamed when complete, and ``meta/info.json`` is written
    last: an interrupted write leaves nothing that looks like a dataset. Use it as a context manager: leaving the block
    completes the dataset, an exception removes what was written so far.

    :param root: Folder of the new dataset. It may exist if it is empty.
    :param image_shape: ``(H, W, 3)``; both even for ``"mp4"``.
    :param fps: Frames per second; MetaWorld steps 80 times a second.
    :param image_storage: ``"png"`` keeps every pixel, inside the data files; ``"mp4"`` is smaller, but lossy.
    :param camera: How the images were taken (camera, crop, ...), stored with the image feature. JSON types only.
    :param hand_shape: ``(H, W, 3)`` of the images of the hand view, where episodes have them.
    :param overwrite: Replace the dataset at ``root``, once the new one is complete. A folder that is no dataset is
        never replaced.
    :raises FileExistsError: If ``root`` exists and may not be replaced.
    :raises ValueError: If an argument, or later an episode, does not fit.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_shape: tuple[int, int, int],
        fps: int = 80,
        image_storage: ImageStorage = "png",
        camera: Mapping[str, Any] | None = None,
        hand_shape: tuple[int, int, int] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.root = local_path(root).resolve()
        self.shapes = {IMAGE: tuple(image_shape)} | ({} if hand_shape is None else {HAND_IMAGE: tuple(hand_shape)})
        self.fps = fps
        self.image_storage = image_storage
        self.camera = dict(camera or {})
        self.overwrite = overwrite
        if image_storage not in ("png", "mp4"):
            raise InputError(f"image_storage must be 'png' or 'mp4', got {image_storage!r}")
        if fps <= 0:
            raise InputError(f"fps must be positive, got {fps}")
        for name, shape in (("image_shape", image_shape), ("hand_shape", hand_shape or image_shape)):
            if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
                raise InputError(f"{name} must be (height, width, 3), got {shape}")
            if image_storage == "mp4" and (shape[0] % 2 or shape[1] % 2):
                raise InputError(
                    f"Video needs an even height and width, got {shape[0]}x{shape[1]}. "
                    "Choose an even image size, or image_storage='png'."
                )
        self._directory = begin_folder(self.root, self._check_destination)
        self._data_file = 0  # number of the file that is being written
        self._data_writer: pq.ParquetWriter | None = None
        self._video_files = dict.fromkeys(self.shapes, 0)
        self._videos: dict[str, Mp4Writer] = {}
        self._schema = self._make_schema()
        self._task_index: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._frames = 0
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
        self._levels = {name: np.zeros((3, 256), dtype=np.int64) for name in self.shapes}
        self._sampled = 0
        self._open = True

    def __enter__(self) -> DemonstrationWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add_episode(self, episode: Episode) -> None:
        """Append one episode.

        :raises ValueError: If an array has the wrong shape, or the episode is empty.
        """
        self._check_episode(episode)
        length = len(episode)
        task = get_task(episode.trial.task)
        task_index = self._task_index.setdefault(task.instruction, len(self._task_index))
        columns = {
            STATE: episode.states,
            ACTION: episode.actions,
            "next.reward": episode.rewards,
            "next.success": episode.successes,
            "next.done": np.arange(length) == length - 1,
            ENVIRONMENT_STATE: episode.environment_states,
            "task_id": np.full(length, task.task_id),
            "timestamp": np.arange(length) / self.fps,
            "frame_index": np.arange(length),
            "episode_index": np.full(length, len(self._episodes)),
            "index": np.arange(self._frames, self._frames + length),
            "task_index": np.full(length, task_index),
        }
        columns = {name: np.asarray(values, dtype=_COLUMNS[name][0]) for name, values in columns.items()}
        row: dict[str, Any] = {
            "episode_index": len(self._episodes),
            "tasks": [task.instruction],
            "length": length,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + length,
            "trial/task": episode.trial.task,
            "trial/seed": episode.trial.seed,
            "trial/goal": episode.trial.goal,
        }
        pictures = _pictures(episode)
        row |= self._write_data(columns, pictures)
        if self.image_storage == "mp4":
            for name, images in pictures.items():
                row |= self._write_video(name, images)
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for name, values in columns.items():
            self._columns[name].append(values)
            row |= {f"stats/{name}/{key}": value for key, value in _statistics(values).items()}
        for name, images in pictures.items():
            levels, sampled = self._sample_levels(images)
            self._levels[name] += levels
            row |= {f"stats/{name}/{key}": value for key, value in _image_statistics(levels, sampled).items()}
        self._sampled += sampled
        self._episodes.append(row)
        self._frames += length

    def close(self) -> None:
        """Complete the dataset and move it to ``root``.

        :raises ValueError: If no episode was added.
        """
        if not self._open:
            return
        try:
            if not self._episodes:
                raise InputError(f"No episode was added to the dataset {self.root}: a dataset needs at least one.")
            with file_errors("write", self.root):
                self._close_files()
                self._write_metadata()
        except BaseException:
            self.abort()
            raise
        self._open = False
        finish_folder(self._directory, self.root, self._check_destination)

    def abort(self) -> None:
        """Give up: remove everything written so far. ``root`` stays as it was."""
        if not self._open:
            return
        self._open = False
        with contextlib.suppress(Exception):  # a file that cannot be completed is removed all the same
            self._close_files()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _check_destination(self, root: Path) -> None:
        found = [path.name for path in entries(root)]
        if not root.exists() or (root.is_dir() and not found):
            return
        others = [name for name in found if name not in _FOLDERS]
        if others or not (root / "meta" / "info.json").is_file():
            told = f" alone (it holds {', '.join(others[:3])})" if others else ""
            raise InTheWayError(
                f"{root} exists and is not a LeRobot dataset{told}, so it is left as it is. "
                "Choose another folder for the dataset, or move that one away."
            )
        if not self.overwrite:
            raise InTheWayError(
                f"{root} holds a dataset already. Choose another folder, or pass overwrite=True to replace it."
            )

    def _check_episode(self, episode: Episode) -> None:
        if not self._open:
            raise InputError(f"The writer of {self.root} is closed; create a new one for another dataset.")
        get_task(episode.trial.task)
        length = len(episode)
        if length == 0:
            raise InputError("The episode is empty: expected at least one frame.")
        expected: list[tuple[str, Any, tuple[int, ...]]] = [
            ("states", episode.states, (length, *_COLUMNS[STATE][1])),
            ("actions", episode.actions, (length, *_COLUMNS[ACTION][1])),
            ("environment_states", episode.environment_states, (length, *_COLUMNS[ENVIRONMENT_STATE][1])),
            ("rewards", episode.rewards, (length,)),
            ("successes", episode.successes, (length,)),
        ]
        pictures = _pictures(episode)
        if pictures.keys() != self.shapes.keys():
            raise InputError(f"The episode has {', '.join(pictures)}; expected {', '.join(self.shapes)}.")
        for name, images in pictures.items():
            told = "images" if name == IMAGE else "hand_images"
            if isinstance(images, np.ndarray):
                expected.append((told, images, (length, *self.shapes[name])))
            elif self.image_storage == "mp4":
                raise InputError(f"image_storage='mp4' needs the episode's {told} as an array, got PNG pictures.")
            elif len(images) != length:
                raise InputError(f"The episode has {length} actions but {len(images)} {told}.")
        for name, values, shape in expected:
            if np.shape(values) != shape:
                raise InputError(f"The episode's {name} have shape {np.shape(values)}, expected {shape}.")

    def _features(self) -> dict[str, dict[str, Any]]:
        features: dict[str, dict[str, Any]] = {
            name: {"dtype": dtype, "shape": list(shape), "names": names}
            for name, (dtype, shape, names) in _COLUMNS.items()
        }
        names = list(features)
        position = names.index(ENVIRONMENT_STATE) + 1
        pictures = {name: self._picture_feature(*shape) for name, shape in self.shapes.items()}
        return {name: features[name] for name in names[:position]} | pictures | features

    def _picture_feature(self, height: int, width: int, channels: int) -> dict[str, Any]:
        feature: dict[str, Any] = {
            "dtype": "image" if self.image_storage == "png" else "video",
            "shape": [channels, height, width],
            "names": ["channels", "height", "width"],
            "info": {"camera": self.camera},
        }
        if self.image_storage == "mp4":
            feature["info"] |= {
                "video.height": height,
                "video.width": width,
                "video.channels": channels,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.fps": self.fps,
                "video.is_depth_map": False,
                "has_audio": False,
            }
        return feature

    def _make_schema(self) -> pa.Schema:
        fields: list[pa.Field] = []
        # The same once more in the terms of Hugging Face's `datasets`, which looks for it in the file.
        described: dict[str, Any] = {}
        for name, feature in self._features().items():
            if name in self.shapes:
                if self.image_storage == "png":
                    fields.append(pa.field(name, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
                    described[name] = {"_type": "Image"}
                continue
            scalar, size = _ARROW_TYPES[feature["dtype"]], feature["shape"][0]
            value = {"_type": "Value", "dtype": feature["dtype"]}
            fields.append(pa.field(name, scalar if size == 1 else pa.list_(scalar, size)))
            described[name] = value if size == 1 else {"_type": "Sequence", "feature": value, "length": size}
        return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})

    def _write_data(
        self, columns: dict[str, np.ndarray], pictures: Mapping[str, np.ndarray | list[bytes]]
    ) -> dict[str, int]:
        arrays: list[pa.Array] = []
        for field in self._schema:
            if field.name in pictures:
                images = pictures[field.name]
                encoded = [encode_png(image) for image in images] if isinstance(images, np.ndarray) else images
                arrays.append(pa.array([{"bytes": picture, "path": None} for picture in encoded], field.type))
            elif pa.types.is_fixed_size_list(field.type):
                arrays.append(pa.FixedSizeListArray.from_arrays(columns[field.name].ravel(), field.type.list_size))
            else:
                arrays.append(pa.array(columns[field.name], field.type))
        path = self._directory / _DATA_PATH.format(**_place(self._data_file))
        if self._data_writer is not None and path.stat().st_size >= _DATA_FILE_MB * 2**20:
            self._data_writer.close()
            self._data_writer = None
            self._data_file += 1
            path = self._directory / _DATA_PATH.format(**_place(self._data_file))
        if self._data_writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data_writer = pq.ParquetWriter(path, self._schema, compression="snappy", use_dictionary=False)
        # One row group an episode: a reader that wants some tasks only skips the images of the others.
        self._data_writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        return {f"data/{name}": number for name, number in _place(self._data_file).items()}

    def _write_video(self, name: str, images: np.ndarray | list[bytes]) -> dict[str, Any]:
        if name in self._videos and self._videos[name].bytes >= _VIDEO_FILE_MB * 2**20:
            self._videos.pop(name).close()
            self._video_files[name] += 1
        place = _place(self._video_files[name])
        if name not in self._videos:
            path = self._directory / _VIDEO_PATH.format(video_key=name, **place)
            self._videos[name] = Mp4Writer(path, self.fps, _VIDEO_OPTIONS)
        video = self._videos[name]
        start = video.frames
        for image in images:
            video.append(np.asarray(image))
        return {
            **{f"videos/{name}/{key}": number for key, number in place.items()},
            f"videos/{name}/from_timestamp": start / self.fps,
            f"videos/{name}/to_timestamp": video.frames / self.fps,
        }

    def _sample_levels(self, images: np.ndarray | list[bytes]) -> tuple[np.ndarray, int]:
        chosen = np.unique(np.linspace(0, len(images) - 1, _SAMPLED_FRAMES).astype(int))
        if isinstance(images, np.ndarray):
            return _histogram(images[chosen]), len(chosen)
        return _histogram(np.stack([decode_picture(images[i], None) for i in chosen])), len(chosen)

    def _close_files(self) -> None:
        if self._data_writer is not None:
            self._data_writer.close()
            self._data_writer = None
        while self._videos:
            self._videos.popitem()[1].close()

    def _write_metadata(self) -> None:
        meta = self._directory / "meta"
        episodes = self._directory / _EPISODES_PATH
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes)
        pq.write_table(_tasks_table(self._task_index), meta / "tasks.parquet")
        statistics = {name: _statistics(np.concatenate(values)) for name, values in self._columns.items()}
        statistics |= {name: _image_statistics(levels, self._sampled) for name, levels in self._levels.items()}
        write_json(meta / "stats.json", statistics)
        info = {
            "codebase_version": VERSION,
            "robot_type": "metaworld",
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._task_index),
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": _DATA_FILE_MB,
            "video_files_size_in_mb": _VIDEO_FILE_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH if self.image_storage == "mp4" else None,
            "features": self._features(),
        }
        write_json(meta / "info.json", info)


def _pictures(episode: Episode) -> dict[str, np.ndarray | list[bytes]]:
    hand = {} if episode.hand_images is None else {HAND_IMAGE: episode.hand_images}
    return {IMAGE: episode.images, **hand}


def _tasks_table(task_index: Mapping[str, int]) -> pa.Table:
    """The sentences, with the note by which pandas, and so LeRobot, takes the column ``task`` as the table's index."""
    types = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    described = [
        {"name": name, "field_name": name, "pandas_type": pandas_type, "numpy_type": numpy_type, "metadata": None}
        for name, (pandas_type, numpy_type) in types.items()
    ]
    note = {"index_columns": ["task"], "column_indexes": [], "columns": described, "pandas_version": "2.0.0"}
    numbers = pa.array(list(task_index.values()), pa.int64())
    table = pa.table({"task_index": numbers, "task": pa.array(list(task_index), pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(note)})
