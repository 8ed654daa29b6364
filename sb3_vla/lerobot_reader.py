"""Read LeRobot datasets, format v3.0: ours, and those that LeRobot recorded or converted.

The layout is described in :mod:`sb3_vla.lerobot_writer`.

Letters: N frames of a dataset, H x W pixels, d numbers of a feature.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mw_envs.tasks import did_you_mean
from sb3_vla.checkpoints.layout import read_json

VERSION = "v3.0"
IMAGE = "observation.image"
STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
ACTION = "action"


class LeRobotReader:
    """Read a LeRobot dataset v3.0: ours, or one that LeRobot itself recorded or converted.

    :param root: Folder of the dataset.
    :param rename: The dataset's feature name -> the name to use here, e.g.
        ``{"observation.images.camera1": "observation.image"}``.
    :raises FileNotFoundError: If the folder or a file of the dataset is missing.
    :raises ValueError: If the dataset has another version, is empty or damaged, or ``rename`` names an unknown feature.
    """

    def __init__(self, root: str | Path, *, rename: Mapping[str, str] | None = None) -> None:
        self.root = Path(root)
        self.info = self._read_info()
        features = self.info["features"]
        self._stored_names = {name: name for name in features}
        for stored, name in (rename or {}).items():
            if stored not in features:
                raise ValueError(f"rename: {self.root} has no feature {stored!r}; {did_you_mean(stored, features)}")
            del self._stored_names[stored]
            self._stored_names[name] = stored
        #: Name -> dtype, shape and names, as in ``info.json``.
        self.features: dict[str, dict[str, Any]] = {
            name: features[stored] for name, stored in self._stored_names.items()
        }
        #: ``task_index`` -> sentence.
        self.instructions = self._read_instructions()
        #: One dictionary an episode, in order: the rows of ``meta/episodes``.
        self.episodes = self._read_episodes()
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
        raise ValueError(message)

    def image_shape(self) -> tuple[int, int]:
        """Height and width of the stored pictures."""
        shape = self.features[IMAGE]["shape"]
        # Both orders are in use: (3, H, W) in the published dataset, (H, W, 3) in LeRobot's recordings.
        return (shape[0], shape[1]) if shape[2] in (1, 3) and shape[0] not in (1, 3) else (shape[1], shape[2])

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of all frames: arrays ``(N,)``, or ``(N, d)`` for features of d numbers.

        :raises ValueError: If a data file lacks a column, or holds other frames than ``meta/episodes`` says.
        """
        self.require(names)
        stored = [self._stored_names[name] for name in names]
        tables = []
        for path, _ in self._files:
            present = pq.read_schema(path).names
            missing = [name for name in stored if name not in present]
            if missing:
                raise ValueError(f"{path} lacks the columns {', '.join(missing)} that meta/info.json promises.")
            tables.append(pq.read_table(path, columns=stored))
        table = pa.concat_tables([table.select(stored) for table in tables], promote_options="permissive")
        total = sum(int(episode["length"]) for episode in self.episodes)
        if len(table) != total:
            raise ValueError(
                f"The dataset {self.root} is damaged: its data files hold {len(table)} frames, meta/episodes counts "
                f"{total}. Download or collect it again."
            )
        return {name: _to_numpy(table.column(column)) for name, column in zip(names, stored, strict=True)}

    def images(self, rows: np.ndarray, size: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Decode pictures.

        :param rows: Row numbers of the frames, ascending.
        :param size: Shrink or stretch every picture to ``size x size`` while decoding; None keeps them.
        :param out: array to decode into, of what is returned; None for a new one.
        :return: uint8 ``(len(rows), H, W, 3)``.
        """
        height, width = (size, size) if size is not None else self.image_shape()
        images = np.empty((len(rows), height, width, 3), dtype=np.uint8) if out is None else out
        decode = self._decode_videos if self.features[IMAGE]["dtype"] == "video" else self._decode_images
        for position, image in decode(rows, size):
            if image.shape != images.shape[1:]:
                raise ValueError(
                    f"Frame {rows[position]} of {self.root} has {image.shape[0]}x{image.shape[1]} pixels, but "
                    f"meta/info.json says {height}x{width}. Pass image_size to bring all frames to one size."
                )
            images[position] = image
        return images

    def _read_info(self) -> dict[str, Any]:
        path = self.root / "meta" / "info.json"
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"There is no dataset at {self.root}: the folder does not exist. Make one with `sb3-vla collect`, or "
                f"get one with `hf download lerobot/metaworld_mt50 --repo-type dataset --local-dir {self.root}`."
            )
        if not path.is_file():
            raise FileNotFoundError(f"{self.root} is not a LeRobot dataset: it has no meta/info.json.")
        info = read_json(path.parent, path.name, "what a LeRobot dataset holds")
        version = str(info.get("codebase_version", "unknown"))
        if version.startswith(("v1", "v2")):
            raise ValueError(
                f"The dataset {self.root} has LeRobot's format {version}, expected {VERSION}. Convert it with "
                "LeRobot's convert_dataset_v21_to_v30 (from v2.0, after convert_dataset_v20_to_v21)."
            )
        if not version.startswith("v3."):
            raise ValueError(f"The dataset {self.root} has format {version!r}, expected LeRobot's {VERSION}.")
        missing = [key for key in ("features", "fps", "data_path") if key not in info]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; it is no complete LeRobot dataset.")
        for name, feature in info["features"].items():
            if not isinstance(feature, dict) or not {"dtype", "shape"} <= feature.keys():
                raise ValueError(f"{path} says of feature {name!r} {feature!r}, expected its dtype and shape.")
        return info

    def _read_instructions(self) -> dict[int, str]:
        path = self.root / "meta" / "tasks.parquet"
        if not path.is_file():
            raise FileNotFoundError(f"The dataset {self.root} lacks meta/tasks.parquet, which holds its sentences.")
        table = pq.read_table(path)
        # Datasets converted from v2 keep the sentence as pandas' index without a name.
        sentence = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
        if sentence is None or "task_index" not in table.column_names:
            raise ValueError(f"{path} has the columns {table.column_names}, expected 'task' and 'task_index'.")
        return dict(zip(table["task_index"].to_pylist(), table[sentence].to_pylist(), strict=True))

    def _read_episodes(self) -> list[dict[str, Any]]:
        paths = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            raise FileNotFoundError(f"The dataset {self.root} lacks meta/episodes/chunk-000/file-000.parquet.")
        episodes: list[dict[str, Any]] = []
        for path in paths:
            names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            episodes += pq.read_table(path, columns=names).to_pylist()
        if not episodes:
            raise ValueError(f"The dataset {self.root} is empty: it has no episode. Collect or download it again.")
        needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for name, feature in self.features.items():
            if name == IMAGE and feature["dtype"] == "video":
                key = self._stored_names[IMAGE]
                needed += [f"videos/{key}/{item}" for item in ("chunk_index", "file_index", "from_timestamp")]
        missing = [name for name in needed if name not in episodes[0]]
        if missing:
            raise ValueError(f"meta/episodes of {self.root} lacks the columns {', '.join(missing)}.")
        return sorted(episodes, key=lambda episode: episode["episode_index"])

    def _find_data_files(self) -> list[tuple[Path, int]]:
        """Data files in order, each with its number of rows."""
        numbers = {(episode["data/chunk_index"], episode["data/file_index"]) for episode in self.episodes}
        files = []
        for chunk_index, file_index in sorted(numbers):
            path = self.root / self.info["data_path"].format(chunk_index=chunk_index, file_index=file_index)
            if not path.is_file():
                raise FileNotFoundError(
                    f"The dataset {self.root} lacks {path.relative_to(self.root)}. Download it again."
                )
            files.append((path, pq.read_metadata(path).num_rows))
        return files

    def _decode_images(self, rows: np.ndarray, size: int | None) -> Iterator[tuple[int, np.ndarray]]:
        key = self._stored_names[IMAGE]
        first = 0  # row number of the first frame of the row group
        with ThreadPoolExecutor() as threads:
            for path, _ in self._files:
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        last = first + file.metadata.row_group(group).num_rows
                        start, stop = np.searchsorted(rows, (first, last))
                        if start < stop:
                            pictures = file.read_row_group(group, columns=[key])[key].combine_chunks()
                            chosen = pictures.take(pa.array(rows[start:stop] - first)).to_pylist()
                            if any(not picture or picture["bytes"] is None for picture in chosen):
                                raise ValueError(
                                    f"{path} does not hold the pictures themselves ({key!r} has no bytes)."
                                )
                            data = [picture["bytes"] for picture in chosen]
                            yield from zip(
                                range(start, stop), threads.map(decode_picture, data, [size] * len(data)), strict=True
                            )
                        first = last

    def _decode_videos(self, rows: np.ndarray, size: int | None) -> Iterator[tuple[int, np.ndarray]]:
        key, fps = self._stored_names[IMAGE], self.info["fps"]
        lengths = np.array([episode["length"] for episode in self.episodes])
        starts = np.cumsum(lengths) - lengths
        wanted: dict[tuple[int, int], list[tuple[float, int]]] = {}  # video file -> (time in it, position in rows)
        for position, number in enumerate(np.searchsorted(starts, rows, side="right") - 1):
            episode = self.episodes[number]
            file = (episode[f"videos/{key}/chunk_index"], episode[f"videos/{key}/file_index"])
            time = episode[f"videos/{key}/from_timestamp"] + (rows[position] - starts[number]) / fps
            wanted.setdefault(file, []).append((time, position))
        for (chunk_index, file_index), frames in sorted(wanted.items()):
            path = self.root / self.info["video_path"].format(
                video_key=key, chunk_index=chunk_index, file_index=file_index
            )
            if not path.is_file():
                raise FileNotFoundError(
                    f"The dataset {self.root} lacks {path.relative_to(self.root)}. Download it again."
                )
            yield from _decode_video(path, sorted(frames), 0.5 / fps, size)


def _decode_video(
    path: Path, wanted: list[tuple[float, int]], tolerance: float, size: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (position, picture) for each (time in seconds, position), ascending in time, in one pass over the file."""
    remaining = iter(wanted)
    time, position = next(remaining)
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if frame.time is None or frame.time < time - tolerance:
                continue
            if frame.time > time + tolerance:
                break
            yield position, _resize(frame.to_image(), size)
            try:
                time, position = next(remaining)
            except StopIteration:
                return
    raise ValueError(f"{path} has no frame at {time:.3f} s, where meta/episodes expects one. Download it again.")


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """``(N,)``, or ``(N, d)`` for a column of lists of d numbers."""
    array = column.combine_chunks()
    nested = False
    while pa.types.is_nested(array.type):
        array, nested = array.flatten(), True
    values = array.to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1) if nested and len(values) != len(column) else values


def decode_picture(data: bytes, size: int | None) -> np.ndarray:
    """Decode a PNG or JPEG to uint8 ``(H, W, 3)``, or ``(size, size, 3)`` if a size is given."""
    with Image.open(io.BytesIO(data)) as picture:
        return _resize(picture.convert("RGB"), size)


def _resize(picture: Image.Image, size: int | None) -> np.ndarray:
    if size is not None and picture.size != (size, size):
        # The box filter averages the area of each new pixel: what a renderer at that size would have seen.
        shrinks = size <= min(picture.size)
        picture = picture.resize((size, size), Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)
    return np.asarray(picture)
