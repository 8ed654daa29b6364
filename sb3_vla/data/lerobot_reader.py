"""Read LeRobot datasets, format v3.0: ours, and those that LeRobot recorded or converted.

The layout is described in :mod:`sb3_vla.data.lerobot_writer`.

Letters: N frames of a dataset, H x W pixels, d numbers of a feature.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError, NotThereError
from sb3_vla.common.files import read_json
from sb3_vla.common.paths import local_path

VERSION = "v3.0"
IMAGE = "observation.image"
HAND_IMAGE = "observation.hand_image"
STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
ACTION = "action"
# Gray or colors, with or without opacity.
_CHANNELS = (1, 2, 3, 4)


class LeRobotReader:
    """Read a LeRobot dataset v3.0: ours, or one that LeRobot itself recorded or converted.

    :param root: Folder of the dataset.
    :param rename: The dataset's feature name -> the name to use here, e.g.
        ``{"observation.images.camera1": "observation.image"}``.
    :raises FileNotFoundError: If the folder or a file of the dataset is missing.
    :raises ValueError: If the dataset has another version, is empty or damaged, or ``rename`` names an unknown feature.
    """

    def __init__(self, root: str | Path, *, rename: Mapping[str, str] | None = None) -> None:
        self.root = local_path(root)
        self.info = self._read_info()
        features = self.info["features"]
        self._stored_names = {name: name for name in features}
        for stored, name in (rename or {}).items():
            if stored not in features:
                raise InputError(f"rename: {self.root} has no feature {stored!r}; {did_you_mean(stored, features)}")
            del self._stored_names[stored]
            self._stored_names[name] = stored
        #: Name -> dtype, shape and names, as in ``info.json``.
        self.features: dict[str, dict[str, Any]] = {
            name: features[stored] for name, stored in self._stored_names.items()
        }
        #: ``task_index`` -> sentence.
        self.instructions = self._read_instructions()
        #: One dictionary an episode that has frames, in order: the rows of ``meta/episodes``.
        self.episodes = self._read_episodes()
        #: Frames of each episode, and the number of its first, int64 (E,).
        self.lengths = np.array([episode["length"] for episode in self.episodes], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._files = self._find_data_files()

    def require(self, names: Sequence[str]) -> None:
        """Check that the dataset has these features.

        :raises ValueError: If one is missing; the message lists all that are, and what there is instead.
        """
        missing = [name for name in names if name not in self.features]
        if not missing:
            return
        message = f"The dataset {self.root} lacks {', '.join(missing)}; it has {', '.join(self.features)}."
        pictures = [name for name, feature in self.features.items() if feature["dtype"] in ("image", "video")]
        if IMAGE in missing and pictures:
            message += f" If one of its cameras is meant, pass rename={{{pictures[0]!r}: {IMAGE!r}}}."
        else:
            message += " If one of these is meant, pass rename={its name: the missing name}."
        raise InputError(message)

    def image_shape(self, feature: str = IMAGE) -> tuple[int, int]:
        """Height and width of a feature's stored images."""
        shape = self.features[feature]["shape"]
        if len(shape) != 3:
            raise InputError(
                f"meta/info.json of {self.root} says that {feature} has the shape {shape}; expected 3 axes."
            )
        # Both orders are in use: (3, H, W) in the published dataset, (H, W, 3) in LeRobot's recordings.
        last = shape[2] in _CHANNELS and shape[0] not in _CHANNELS
        return (shape[0], shape[1]) if last else (shape[1], shape[2])

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of all frames, episode by episode: arrays ``(N,)``, or ``(N, d)`` for features of d > 1 numbers.

        :raises ValueError: If a data file lacks a column, or holds other frames than ``meta/episodes`` says.
        """
        return {name: values[self._stored_rows] for name, values in self._stored_columns(names).items()}

    def images(
        self,
        frames: np.ndarray,
        size: int | None = None,
        out: np.ndarray | None = None,
        feature: str = IMAGE,
        look: Callable[[int, np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Decode images.

        :param frames: Numbers of the frames, as :meth:`columns` has them.
        :param size: Shrink or stretch every image to ``size x size`` while decoding; None keeps them.
        :param out: array to decode into, of what is returned; None for a new one.
        :param feature: whose images.
        :param look: called once for each image, by several threads at a time, with its position in ``frames`` and
            with the image in the size in which it is stored, uint8 ``(H, W, 3)``.
        :return: uint8 ``(len(frames), H, W, 3)``; see :func:`decode_picture`.
        :raises ValueError: If a file is damaged or lacks an image; the message names it.
        """
        height, width = (size, size) if size is not None else self.image_shape(feature)
        images = np.empty((len(frames), height, width, 3), dtype=np.uint8) if out is None else out
        decode = self._decode_videos if self.features[feature]["dtype"] == "video" else self._decode_images
        for position, image in decode(feature, frames, size, look):
            if image.shape != images.shape[1:]:
                raise InputError(
                    f"Frame {frames[position]} of {self.root} has {image.shape[0]}x{image.shape[1]} pixels, but "
                    f"meta/info.json says {height}x{width}. Pass image_size to bring all frames to one size."
                )
            images[position] = image
        return images

    def _stored_columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns in the order of the data files."""
        self.require(names)
        stored = {name: self._stored_names[name] for name in names}
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for path, _ in self._files:
            with _names_file(path):
                present = pq.read_schema(path).names
                missing = [column for column in stored.values() if column not in present]
                if missing:
                    raise InputError(f"{path} lacks the columns {', '.join(missing)} that meta/info.json promises.")
                table = pq.read_table(path, columns=list(stored.values()))
            for name, column in stored.items():
                values = _to_numpy(table.column(column))
                if values is None or (parts[name] and values.shape[1:] != parts[name][0].shape[1:]):
                    raise InputError(f"{path} has {column} of different lengths, expected one. Download it again.")
                parts[name].append(values)
        found, total = sum(rows for _, rows in self._files), self.lengths.sum()
        if found != total:
            raise InputError(
                f"The dataset {self.root} is damaged: its data files hold {found} frames, meta/episodes counts "
                f"{total}. Download or collect it again."
            )
        return {name: np.concatenate(values) for name, values in parts.items()}

    @cached_property
    def _stored_rows(self) -> np.ndarray:
        """Row in the data files of each frame; tools that merge datasets leave episodes in another order there."""
        columns = self._stored_columns(["episode_index", "frame_index"])
        episodes, frames = columns["episode_index"], columns["frame_index"]
        expected = np.repeat([episode["episode_index"] for episode in self.episodes], self.lengths)
        within = np.diff(np.repeat(np.arange(len(self.episodes)), self.lengths)) == 0
        if np.array_equal(episodes, expected) and (np.diff(frames)[within] >= 0).all():
            return np.arange(len(frames))
        order = np.lexsort((frames, episodes))
        fits = episodes[order] == expected
        fits[1:] &= (np.diff(frames[order]) > 0) | ~within
        if not fits.all():
            number = expected[np.argmin(fits)]
            raise InputError(
                f"The data files of {self.root} do not hold the episodes of meta/episodes: by episode_index and "
                f"frame_index, frames of episode {number} are missing or there twice. Download it again."
            )
        return order

    def _read_info(self) -> dict[str, Any]:
        path = self.root / "meta" / "info.json"
        if not self.root.is_dir():
            raise NotThereError(
                f"There is no dataset at {self.root}: the folder does not exist. Make one with `sb3-vla collect`, or "
                f"get one with `hf download lerobot/metaworld_mt50 --repo-type dataset --local-dir {self.root}`."
            )
        if not path.is_file():
            raise NotThereError(f"{self.root} is not a LeRobot dataset: it has no meta/info.json.")
        info = read_json(path)
        version = str(info.get("codebase_version", "unknown"))
        if version.startswith(("v1", "v2")):
            raise InputError(
                f"The dataset {self.root} has LeRobot's format {version}, expected {VERSION}. Convert it with "
                "LeRobot's convert_dataset_v21_to_v30 (from v2.0, after convert_dataset_v20_to_v21)."
            )
        if not version.startswith("v3."):
            raise InputError(f"The dataset {self.root} has format {version!r}, expected LeRobot's {VERSION}.")
        missing = [key for key in ("features", "fps", "data_path") if key not in info]
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing)}; it is no complete LeRobot dataset.")
        for name, feature in info["features"].items():
            if not isinstance(feature, dict) or not {"dtype", "shape"} <= feature.keys():
                raise InputError(f"{path} says of feature {name!r} {feature!r}, expected its dtype and shape.")
        return info

    def _read_instructions(self) -> dict[int, str]:
        path = self.root / "meta" / "tasks.parquet"
        if not path.is_file():
            raise NotThereError(f"The dataset {self.root} lacks meta/tasks.parquet, which holds its sentences.")
        with _names_file(path):
            table = pq.read_table(path)
        # Datasets converted from v2 keep the sentence as pandas' index without a name.
        sentence = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
        if sentence is None or "task_index" not in table.column_names:
            raise InputError(f"{path} has the columns {table.column_names}, expected 'task' and 'task_index'.")
        return dict(zip(table["task_index"].to_pylist(), table[sentence].to_pylist(), strict=True))

    def _read_episodes(self) -> list[dict[str, Any]]:
        paths = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            raise NotThereError(f"The dataset {self.root} lacks meta/episodes/chunk-000/file-000.parquet.")
        episodes: list[dict[str, Any]] = []
        for path in paths:
            with _names_file(path):
                names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
                episodes += pq.read_table(path, columns=names).to_pylist()
        whole, needed = ["episode_index", "length", "data/chunk_index", "data/file_index"], []
        for name, feature in self.features.items():
            if name in (IMAGE, HAND_IMAGE) and feature["dtype"] == "video":
                key = self._stored_names[name]
                whole += [f"videos/{key}/{item}" for item in ("chunk_index", "file_index")]
                needed.append(f"videos/{key}/from_timestamp")
        missing = [name for name in (*whole, *needed) if episodes and name not in episodes[0]]
        if missing:
            raise InputError(f"meta/episodes of {self.root} lacks the columns {', '.join(missing)}.")
        # One without frames has nothing to read, and no place to read it from.
        episodes = [episode for episode in episodes if episode["length"] != 0]
        if not episodes:
            raise InputError(f"The dataset {self.root} is empty: it has no episode. Collect or download it again.")
        for episode in episodes:
            for name in whole:  # pandas makes floats of whole numbers where a merged dataset lacks one
                try:
                    episode[name] = int(episode[name])
                except (KeyError, TypeError, ValueError) as error:
                    raise InputError(
                        f"Episode {episode.get('episode_index')} of {self.root} has {name}={episode.get(name)!r} in "
                        "meta/episodes, expected a whole number. Download it again."
                    ) from error
        return sorted(episodes, key=lambda episode: episode["episode_index"])

    def _find_data_files(self) -> list[tuple[Path, int]]:
        """Data files in order, each with its number of rows."""
        numbers = {(episode["data/chunk_index"], episode["data/file_index"]) for episode in self.episodes}
        files = []
        for chunk_index, file_index in sorted(numbers):
            path = self.root / self.info["data_path"].format(chunk_index=chunk_index, file_index=file_index)
            if not path.is_file():
                raise NotThereError(f"The dataset {self.root} lacks {path.relative_to(self.root)}. Download it again.")
            with _names_file(path):
                files.append((path, pq.read_metadata(path).num_rows))
        return files

    def _decode_images(
        self, feature: str, frames: np.ndarray, size: int | None, look: Callable[[int, np.ndarray], None] | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        key = self._stored_names[feature]
        stored = self._stored_rows[frames]
        positions = np.argsort(stored)
        rows = stored[positions]

        def decode(position: int, row: int, data: bytes) -> np.ndarray:
            try:
                picture = decode_picture(data, size if look is None else None)
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises where an image is damaged
                raise InputError(f"The picture in row {row} of {path} cannot be read: {error}") from error
            if look is None:
                return picture
            look(position, picture)
            return _resize(Image.fromarray(picture), size)

        first = 0  # row number of the first frame of the row group
        with ThreadPoolExecutor() as threads:
            for path, _ in self._files:
                beginning = first
                with _names_file(path), pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        last = first + file.metadata.row_group(group).num_rows
                        start, stop = np.searchsorted(rows, (first, last))
                        if start < stop:
                            pictures = file.read_row_group(group, columns=[key])[key].combine_chunks()
                            chosen = pictures.take(pa.array(rows[start:stop] - first)).to_pylist()
                            if any(not picture or picture["bytes"] is None for picture in chosen):
                                raise InputError(
                                    f"{path} does not hold the pictures themselves ({key!r} has no bytes)."
                                )
                            data = [picture["bytes"] for picture in chosen]
                            yield from zip(
                                positions[start:stop],
                                threads.map(decode, positions[start:stop], rows[start:stop] - beginning, data),
                                strict=True,
                            )
                        first = last

    def _decode_videos(
        self, feature: str, frames: np.ndarray, size: int | None, look: Callable[[int, np.ndarray], None] | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        key, fps = self._stored_names[feature], self.info["fps"]
        wanted: dict[tuple[int, int], list[tuple[float, int]]] = {}  # video file -> (time in it, position in frames)
        for position, number in enumerate(np.searchsorted(self.starts, frames, side="right") - 1):
            episode = self.episodes[number]
            file = (episode[f"videos/{key}/chunk_index"], episode[f"videos/{key}/file_index"])
            time = episode[f"videos/{key}/from_timestamp"] + (frames[position] - self.starts[number]) / fps
            wanted.setdefault(file, []).append((time, position))
        for (chunk_index, file_index), moments in sorted(wanted.items()):
            path = self.root / self.info["video_path"].format(
                video_key=key, chunk_index=chunk_index, file_index=file_index
            )
            if not path.is_file():
                raise NotThereError(f"The dataset {self.root} lacks {path.relative_to(self.root)}. Download it again.")
            for position, picture in _decode_video(path, sorted(moments), 0.5 / fps):
                if look is not None:
                    look(position, np.asarray(picture))
                yield position, _resize(picture, size)


@contextmanager
def _names_file(path: Path) -> Iterator[None]:
    """Say in an error which file cannot be read; the libraries do not."""
    try:
        yield
    except (pa.ArrowException, av.FFmpegError, OSError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise  # these say it
        raise InputError(f"{path} cannot be read: {error}. If it is damaged, download it again.") from error


def _decode_video(path: Path, wanted: list[tuple[float, int]], tolerance: float) -> Iterator[tuple[int, Image.Image]]:
    """Yield (position, image) for each (time in seconds, position), ascending in time, in one pass over the file."""
    remaining = iter(wanted)
    time, position = next(remaining)
    damaged = False
    with _names_file(path), av.open(str(path)) as container:
        if not container.streams.video:
            raise InputError(f"{path} holds no video. Download it again.")
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            # A decoder makes up what it cannot read, and what follows is drawn from that until the next key frame.
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if frame.time is None or frame.time < time - tolerance:
                continue
            if frame.time > time + tolerance:
                break
            if damaged:
                raise InputError(f"{path} is damaged at {time:.3f} s. Download it again.")
            yield position, frame.to_image()
            try:
                time, position = next(remaining)
            except StopIteration:
                return
    raise InputError(f"{path} has no frame at {time:.3f} s, where meta/episodes expects one. Download it again.")


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray | None:
    """``(N,)``, or ``(N, d)`` for a column of lists of d > 1 numbers; None where these are not of one length."""
    array = column.combine_chunks()
    while pa.types.is_nested(array.type):
        if len(pc.unique(pc.list_value_length(array))) > 1:
            return None
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    return values if len(values) == len(column) else values.reshape(len(column), -1)


def decode_picture(data: bytes, size: int | None) -> np.ndarray:
    """Decode a PNG or JPEG to uint8 ``(H, W, 3)``, or ``(size, size, 3)`` if a size is given.

    Of 16 bits the upper 8 are taken; a fourth channel, opacity, is left out.

    :raises ValueError: For an image of floating point numbers, whose range is not known.
    """
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode == "F":
            raise InputError("it has floating point numbers, expected levels of 8 or 16 bits")
        if picture.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut off at 255
            return _resize(Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB"), size)
        return _resize(picture.convert("RGB"), size)


def _resize(picture: Image.Image, size: int | None) -> np.ndarray:
    if size is not None and picture.size != (size, size):
        # The box filter averages the area of each new pixel: what a renderer at that size would have seen.
        shrinks = size <= min(picture.size)
        picture = picture.resize((size, size), Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)
    return np.asarray(picture)
