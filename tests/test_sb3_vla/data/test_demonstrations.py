"""Demonstrations: the dataset on disk, what is loaded from it, and collecting with the scripted experts."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import subprocess
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ranks import run_ranks
from toy import TINY

from mw_envs import TASKS, Trial, decode_instruction
from mw_envs.hand_view import HandView
from mw_envs.rendering import RendererUnavailableError
from sb3_vla.data import collecting, demonstrations, lerobot_reader, lerobot_writer
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.data.demonstrations import Demonstrations, DemonstrationWriter, Episode, collect
from sb3_vla.data.lerobot_writer import encode_png
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig

SIZE = 32
# The published lerobot/metaworld_mt50, and next.done; dtype and shape as its info.json has them.
FEATURES = {
    "observation.state": ("float32", [4]),
    "action": ("float32", [4]),
    "next.reward": ("float32", [1]),
    "next.success": ("bool", [1]),
    "next.done": ("bool", [1]),
    "observation.environment_state": ("float32", [39]),
    "observation.image": ("image", [3, SIZE, SIZE]),
    "task_id": ("int16", [1]),
    "timestamp": ("float32", [1]),
    "frame_index": ("int64", [1]),
    "episode_index": ("int64", [1]),
    "index": ("int64", [1]),
    "task_index": ("int64", [1]),
}


def pictures(generator: np.random.Generator, length: int) -> np.ndarray:
    """Smooth gradients, each frame with a brightness of its own: video keeps them, and a shifted frame is noticed."""
    ramp = np.linspace(0, 60, SIZE)
    base = ramp[:, None, None] + ramp[None, :, None] + generator.uniform(0, 30, 3)
    return np.clip(base[None] + 12.0 * (np.arange(length) % 11)[:, None, None, None], 0, 255).astype(np.uint8)


def make_episode(task: str, length: int, seed: int, scale: float = 0.5) -> Episode:
    generator = np.random.default_rng(seed)
    return Episode(
        trial=Trial(task, 7, seed % 50),
        images=pictures(generator, length),
        states=generator.normal(size=(length, 4)).astype(np.float32),
        environment_states=generator.normal(size=(length, 39)).astype(np.float32),
        actions=np.clip(generator.normal(0, scale, (length, 4)), -1, 1).astype(np.float32),
        rewards=generator.random(length).astype(np.float32),
        successes=np.arange(length) == length - 1,
    )


EPISODES = [("push-v3", 5), ("reach-v3", 3), ("push-back-v3", 4), ("push-v3", 2), ("reach-v3", 6)]


def write(root: Path, episodes: list[Episode] | None = None, **options: Any) -> list[Episode]:
    episodes = episodes or [make_episode(task, length, seed) for seed, (task, length) in enumerate(EPISODES)]
    with DemonstrationWriter(root, image_shape=(SIZE, SIZE, 3), **options) as writer:
        for episode in episodes:
            writer.add_episode(episode)
    return episodes


def joined(episodes: list[Episode], name: str) -> np.ndarray:
    return np.concatenate([getattr(episode, name) for episode in episodes])


def edit_info(root: Path, **changes: Any) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the format ------------------------------------------------------------------------------------------------------


def test_png_round_trip_is_exact(tmp_path: Path) -> None:
    episodes = write(tmp_path / "set")
    loaded = Demonstrations.load(tmp_path / "set")
    assert loaded.images.dtype == np.uint8 and loaded.states.dtype == loaded.actions.dtype == np.float32
    for name in ("images", "states", "actions"):
        np.testing.assert_array_equal(getattr(loaded, name), joined(episodes, name))
        assert getattr(loaded, name).flags.c_contiguous
    assert loaded.tasks == [task for task, _ in EPISODES]
    assert loaded.trials == [episode.trial for episode in episodes]
    assert loaded.episode_starts.tolist() == [0, 5, 8, 12, 14] and loaded.episode_ends.tolist() == [5, 8, 12, 14, 20]
    assert loaded.episode_index.tolist() == [0] * 5 + [1] * 3 + [2] * 4 + [3] * 2 + [4] * 6
    assert loaded.frame_index.tolist() == [frame for _, length in EPISODES for frame in range(length)]
    sentences = [loaded.instructions[i] for i in loaded.instruction_index]
    assert sentences == [TASKS[task].instruction for task, length in EPISODES for _ in range(length)]


def test_pictures_encoded_beforehand_give_the_same_dataset(tmp_path: Path) -> None:
    episodes = write(tmp_path / "arrays")
    encoded = [dataclasses.replace(e, images=[encode_png(image) for image in np.asarray(e.images)]) for e in episodes]
    write(tmp_path / "encoded", encoded)
    for file in ("meta/stats.json", "data/chunk-000/file-000.parquet"):
        assert (tmp_path / "arrays" / file).read_bytes() == (tmp_path / "encoded" / file).read_bytes()


def test_video_round_trip(tmp_path: Path) -> None:
    episodes = write(tmp_path / "set", image_storage="mp4")
    loaded = Demonstrations.load(tmp_path / "set")
    original = joined(episodes, "images").astype(float)
    error = np.square(loaded.images - original).mean(axis=(1, 2, 3))
    # 38 dB on every single frame; neighboring frames differ by 12 levels, which would be 26 dB.
    assert (10 * np.log10(255**2 / np.maximum(error, 1e-9)) > 38).all()
    np.testing.assert_array_equal(loaded.actions, joined(episodes, "actions"))
    selected = Demonstrations.load(tmp_path / "set", tasks=["push-back-v3", "reach-v3"])
    np.testing.assert_array_equal(selected.images, loaded.images[np.r_[5:12, 14:20]])

    path = tmp_path / "set/videos/observation.image/chunk-000/file-000.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", Fraction(80))
    head = path.read_bytes()
    assert head.index(b"moov") < head.index(b"mdat"), "a browser needs the index in front"
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert info["features"]["observation.image"]["dtype"] == "video"
    assert info["features"]["observation.image"]["info"]["video.codec"] == "h264"
    assert info["video_path"] == "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    assert "observation.image" not in pq.read_schema(tmp_path / "set/data/chunk-000/file-000.parquet").names
    rows = pq.read_table(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    key = "videos/observation.image"
    assert [row[f"{key}/from_timestamp"] for row in rows] == pytest.approx([0, 5 / 80, 8 / 80, 12 / 80, 14 / 80])
    assert [row[f"{key}/to_timestamp"] for row in rows] == pytest.approx([5 / 80, 8 / 80, 12 / 80, 14 / 80, 20 / 80])


def test_features_and_info(tmp_path: Path) -> None:
    write(tmp_path / "set", camera={"camera": "corner2", "crop": "workspace"})
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert {name: (feature["dtype"], feature["shape"]) for name, feature in info["features"].items()} == FEATURES
    assert list(info["features"]) == list(FEATURES)
    expected = {
        "codebase_version": "v3.0",
        "robot_type": "metaworld",
        "fps": 80,
        "total_episodes": 5,
        "total_frames": 20,
        "total_tasks": 2,
        "splits": {"train": "0:5"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }
    assert {name: info[name] for name in expected} == expected
    assert Demonstrations.load(tmp_path / "set").camera == {"camera": "corner2", "crop": "workspace"}


def test_data_columns(tmp_path: Path) -> None:
    episodes = write(tmp_path / "set")
    table = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet")
    assert table.schema.field("observation.image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.field("action").type.list_size == 4
    assert table.schema.field("task_id").type == pa.int16() and table.schema.field("next.success").type == pa.bool_()
    described = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert set(described) == set(FEATURES) and described["observation.image"] == {"_type": "Image"}
    columns = table.to_pydict()
    assert columns["index"] == list(range(20))
    assert columns["next.done"] == [i in (4, 7, 11, 13, 19) for i in range(20)] == columns["next.success"]
    assert columns["timestamp"] == pytest.approx([frame / 80 for _, n in EPISODES for frame in range(n)])
    np.testing.assert_array_equal(columns["next.reward"], joined(episodes, "rewards"))
    np.testing.assert_array_equal(columns["observation.environment_state"], joined(episodes, "environment_states"))
    rows = pq.read_table(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [
        (0, 5), (5, 8), (8, 12), (12, 14), (14, 20),
    ]  # fmt: skip
    assert [row["length"] for row in rows] == [5, 3, 4, 2, 6]
    assert rows[1]["tasks"] == ["Reach a goal position"]
    np.testing.assert_allclose(rows[1]["stats/action/mean"], episodes[1].actions.mean(axis=0), rtol=1e-6)


def test_tasks_that_share_a_sentence_share_a_task_index(tmp_path: Path) -> None:
    write(tmp_path / "set")
    table = pq.read_table(tmp_path / "set/meta/tasks.parquet")
    assert table.to_pydict() == {"task_index": [0, 1], "task": ["Push the puck to a goal", "Reach a goal position"]}
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"], (
        "LeRobot looks sentences up by index"
    )
    data = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet").to_pydict()
    assert data["task_index"] == [0] * 5 + [1] * 3 + [0] * 4 + [0] * 2 + [1] * 6
    ids = [TASKS[task].task_id for task, length in EPISODES for _ in range(length)]
    assert data["task_id"] == ids and TASKS["push-v3"].task_id != TASKS["push-back-v3"].task_id
    assert Demonstrations.load(tmp_path / "set", tasks=["push-back-v3"]).tasks == ["push-back-v3"]
    sentence = Demonstrations.load(tmp_path / "set", tasks=["Push the puck to a goal"])
    assert sentence.tasks == ["push-v3", "push-back-v3", "push-v3"] and sentence.instructions == [
        "Push the puck to a goal"
    ]


def test_stored_statistics_against_numpy(tmp_path: Path) -> None:
    episodes = write(tmp_path / "set")  # at most 6 frames an episode: all of them are sampled
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    actions = joined(episodes, "actions").astype(np.float64)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats["action"][name], getattr(actions, name)(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0), rtol=1e-12)
    assert stats["action"]["count"] == stats["observation.image"]["count"] == [20]
    channels = joined(episodes, "images").astype(np.float64).transpose(3, 0, 1, 2).reshape(3, -1) / 255
    for name in ("min", "max", "mean", "std"):
        value = np.array(stats["observation.image"][name])
        assert value.shape == (3, 1, 1)
        np.testing.assert_allclose(value.ravel(), getattr(channels, name)(axis=1), rtol=1e-9)
    median = np.quantile(channels, 0.5, axis=1, method="inverted_cdf")
    np.testing.assert_allclose(np.ravel(stats["observation.image"]["q50"]), median, rtol=1e-12)


@pytest.mark.parametrize("image_storage", ["png", "mp4"])
def test_files_roll_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_storage: str) -> None:
    monkeypatch.setattr(lerobot_writer, "_DATA_FILE_MB", 0)
    monkeypatch.setattr(lerobot_writer, "_VIDEO_FILE_MB", 0)
    monkeypatch.setattr(lerobot_writer, "_FILES_PER_CHUNK", 2)
    episodes = write(tmp_path / "set", image_storage=image_storage)
    files = sorted(str(path.relative_to(tmp_path / "set/data")) for path in (tmp_path / "set/data").glob("*/*"))
    assert files == [f"chunk-00{i // 2}/file-00{i % 2}.parquet" for i in range(5)]
    loaded = Demonstrations.load(tmp_path / "set")
    np.testing.assert_array_equal(loaded.actions, joined(episodes, "actions"))
    np.testing.assert_allclose(loaded.images, joined(episodes, "images"), atol=0 if image_storage == "png" else 8)
    selected = Demonstrations.load(tmp_path / "set", tasks=["reach-v3"])
    np.testing.assert_array_equal(selected.images, loaded.images[np.r_[5:8, 14:20]])


# --- writing that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_storage", ["png", "mp4"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_write_leaves_nothing(tmp_path: Path, image_storage: Any, error: type[BaseException]) -> None:
    with (
        pytest.raises(error),
        DemonstrationWriter(tmp_path / "set", image_shape=(SIZE, SIZE, 3), image_storage=image_storage) as writer,
    ):
        writer.add_episode(make_episode("reach-v3", 3, 0))
        assert not list(tmp_path.rglob("info.json")), "while it is written it must not look like a dataset"
        assert not (tmp_path / "set").exists()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_failure_while_completing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(lerobot_writer, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_writer_without_episodes(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="No episode was added"),
        DemonstrationWriter(tmp_path / "s", image_shape=(8, 8, 3)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_existing_folders(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.png").write_bytes(b"x")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is not a LeRobot dataset"):
            write(tmp_path / "holiday", overwrite=overwrite)
    assert (tmp_path / "holiday" / "photo.png").exists()
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write(tmp_path / "empty")
    replacement = write(tmp_path / "empty", [make_episode("reach-v3", 4, 9)], overwrite=True)
    np.testing.assert_array_equal(Demonstrations.load(tmp_path / "empty").actions, replacement[0].actions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "holiday"]


@pytest.mark.parametrize("where", ["a link", "the working directory", "a mount"])
def test_folders_that_cannot_be_renamed(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, read, and replaced, at the end of the work."""
    folder = tmp_path / "set"
    (tmp_path / "big disk").mkdir()
    if where == "a link":
        folder.symlink_to(tmp_path / "big disk")
    else:
        folder.mkdir()
    if where == "the working directory":
        monkeypatch.chdir(folder)
        folder = Path(".")
    mount = ["mount", "--bind", str(tmp_path / "big disk"), str(folder)]
    if where == "a mount" and subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs the right to")
    try:
        write(folder)
        with pytest.raises(FileExistsError, match="overwrite=True"):
            write(folder)
        replacement = write(folder, [make_episode("reach-v3", 4, 9)], overwrite=True)
        np.testing.assert_array_equal(Demonstrations.load(folder).actions, replacement[0].actions)
        assert sorted(os.listdir(folder)) == ["data", "meta"]
        (folder / "meta" / "notes").touch()
        (folder / "thesis").touch()
        with pytest.raises(FileExistsError, match=r"is not a LeRobot dataset alone \(it holds thesis\)"):
            write(folder, overwrite=True)
        assert sorted(os.listdir(folder)) == ["data", "meta", "thesis"]
    finally:
        if where == "a mount":
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert sorted(os.listdir(tmp_path)) == ["big disk", "set"]


def test_failed_replacement_keeps_the_old_dataset(tmp_path: Path) -> None:
    episodes = write(tmp_path / "set")
    with (
        pytest.raises(RuntimeError),
        DemonstrationWriter(tmp_path / "set", image_shape=(SIZE, SIZE, 3), overwrite=True) as writer,
    ):
        writer.add_episode(make_episode("reach-v3", 3, 0))
        raise RuntimeError
    np.testing.assert_array_equal(Demonstrations.load(tmp_path / "set").actions, joined(episodes, "actions"))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": np.zeros((3, 7))}, r"actions have shape \(3, 7\), expected \(3, 4\)"),
        ({"images": np.zeros((3, 8, 8, 3), np.uint8)}, r"images have shape \(3, 8, 8, 3\), expected \(3, 32, 32, 3\)"),
        ({"images": [b"x"]}, "3 actions but 1 images"),
        ({"actions": np.zeros((0, 4))}, "is empty"),
        ({"trial": Trial("push-v2", 0, 0)}, "push-v3"),
    ],
)
def test_episode_that_does_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    episode = dataclasses.replace(make_episode("reach-v3", 3, 0), **change)
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "set", [episode])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_storage": "gif"}, "'png' or 'mp4', got 'gif'"),
        ({"image_storage": "mp4", "image_shape": (31, 32, 3)}, "even height and width, got 31x32"),
        ({"image_shape": (32, 32)}, r"must be \(height, width, 3\)"),
        ({"fps": 0}, "fps must be positive"),
    ],
)
def test_writer_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemonstrationWriter(tmp_path / "set", **({"image_shape": (32, 32, 3)} | options))
    assert list(tmp_path.iterdir()) == []


# --- datasets of other origin ----------------------------------------------------------------------------------------


def write_foreign(root: Path, image_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A dataset as LeRobot's own tools leave it: other names and orders, lists of variable length, no task_id."""
    generator = np.random.default_rng(3)
    key, lengths, file_of = "observation.images.camera1", [4, 3, 5], [0, 0, 1]
    starts = np.cumsum([0, *lengths])
    images = np.stack([np.full((24, 40, 3), 20 * i, np.uint8) for i in range(12)])
    actions = generator.normal(0, 8, (12, 4)).astype(np.float32)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    video = image_dtype == "video"
    episodes = []
    for file in (0, 1):
        numbers = [e for e in range(3) if file_of[e] == file]
        rows = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in numbers])
        columns: dict[str, Any] = {
            "observation.state": pa.array([[float(i), 0.0] for i in rows], pa.list_(pa.float64())),
            "action": pa.array(actions[rows].tolist(), pa.list_(pa.float32())),
            "frame_index": pa.array([i - starts[e] for e in numbers for i in range(starts[e], starts[e + 1])]),
            "episode_index": pa.array([e for e in numbers for _ in range(lengths[e])]),
            "task_index": pa.array([[1, 0, 1][e] for e in numbers for _ in range(lengths[e])]),
        }
        if video:
            path = root / f"videos/{key}/chunk-000/file-00{file}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            with av.open(str(path), "w") as container:
                stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
                stream.width, stream.height, stream.pix_fmt = 40, 24, "yuv420p"
                for i in rows:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(images[i], format="rgb24")))
                container.mux(stream.encode())
        else:
            columns[key] = pa.array([{"bytes": encode_png(images[i]), "path": f"frame-{i}.png"} for i in rows])
        pq.write_table(pa.table(columns), root / f"data/chunk-000/file-00{file}.parquet", row_group_size=2)
        for e in numbers:
            row = {"episode_index": e, "length": lengths[e], "data/chunk_index": 0, "data/file_index": file}
            times = {"chunk_index": 0, "file_index": file, "from_timestamp": (starts[e] - rows[0]) / 10}
            episodes.append(row | {f"videos/{key}/{name}": value for name, value in times.items()})
    for number, episode in enumerate(reversed(episodes)):  # several files, and not in the order of the episodes
        pq.write_table(pa.Table.from_pylist([episode]), root / f"meta/episodes/chunk-000/file-00{number}.parquet")
    pq.write_table(
        pa.table({"task_index": [0, 1], "__index_level_0__": ["Reach a goal position", "Push the puck to a goal"]}),
        root / "meta/tasks.parquet",
    )
    scalar = {"dtype": "int64", "shape": [1], "names": None}
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            key: {"dtype": image_dtype, "shape": [24, 40, 3], "names": ["height", "width", "channels"]},
            "observation.state": {"dtype": "float64", "shape": [2], "names": None},
            "action": {"dtype": "float32", "shape": [4], "names": None},
            "frame_index": scalar,
            "episode_index": scalar,
            "task_index": scalar,
        },
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return images, actions


@pytest.mark.parametrize("image_dtype", ["image", "video"])
def test_foreign_dataset(tmp_path: Path, image_dtype: str) -> None:
    images, actions = write_foreign(tmp_path / "set", image_dtype)
    rename = {"observation.images.camera1": "observation.image"}
    loaded = Demonstrations.load(tmp_path / "set", rename=rename)
    np.testing.assert_allclose(loaded.images, images, atol=0 if image_dtype == "image" else 2)  # next frame: 20 levels
    np.testing.assert_array_equal(loaded.actions, np.clip(actions, -1, 1))
    assert loaded.states.dtype == np.float32 and loaded.states[:, 0].tolist() == list(range(12))
    assert loaded.instructions == ["Push the puck to a goal", "Reach a goal position"]
    assert loaded.tasks == ["Push the puck to a goal", "Reach a goal position", "Push the puck to a goal"]
    assert loaded.trials == [None] * 3 and loaded.camera == {}
    small = Demonstrations.load(tmp_path / "set", rename=rename, image_size=8, tasks=["Reach a goal position"])
    assert small.images.shape == (3, 8, 8, 3) and small.episode_ends.tolist() == [3]
    np.testing.assert_allclose(small.images.mean(axis=(1, 2, 3)), [80, 100, 120], atol=2)

    with pytest.raises(ValueError, match=r"lacks observation\.image.*rename=\{'observation\.images\.camera1'"):
        Demonstrations.load(tmp_path / "set")
    with pytest.raises(ValueError, match=r"no feature 'observation\.images\.camera'; did you mean"):
        Demonstrations.load(tmp_path / "set", rename={"observation.images.camera": "observation.image"})


def test_actions_are_clipped_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    episode = make_episode("reach-v3", 4, 0)
    episode.actions[1] = [24.0, -15.0, 0.5, 1.0]
    write(tmp_path / "set", [episode])
    loaded = Demonstrations.load(tmp_path / "set")
    assert loaded.actions[1].tolist() == [1.0, -1.0, 0.5, 1.0]
    np.testing.assert_array_equal(loaded.actions[[0, 2, 3]], episode.actions[[0, 2, 3]])
    assert "1 of 4 actions lay outside [-1, 1] and were clipped" in caplog.text
    stats = loaded.statistics()["action"]
    np.testing.assert_allclose(stats["mean"], np.clip(episode.actions, -1, 1).mean(axis=0), rtol=1e-6)
    assert stats["max"][0] == 1.0 and stats["min"][1] == -1.0


def edit_columns(path: Path, **columns: Any) -> None:
    """Other values in a parquet file, by the names of its columns; a dot in them is written as two underscores."""
    table = pq.read_table(path)
    for name, values in columns.items():
        name = name.replace("__", ".")
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path)


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """The data of :data:`EPISODES` at ``set``."""
    write(tmp_path / "set")
    return tmp_path / "set/data/chunk-000/file-000.parquet"


def test_a_sentence_a_frame(tmp_path: Path, data_file: Path) -> None:
    numbers = pq.read_table(data_file)["task_index"].to_numpy().copy()
    push = numbers[0]
    numbers[17:] = push  # the end of the last episode
    for stored in (numbers, numbers.astype(np.float64)):  # pandas makes floats of whole numbers in a merged dataset
        edit_columns(data_file, task_index=stored)
        loaded = Demonstrations.load(tmp_path / "set")
        expected = [TASKS["push-v3" if number == push else "reach-v3"].instruction for number in numbers]
        assert [loaded.instructions[i] for i in loaded.instruction_index] == expected
        assert loaded.instruction_index.dtype == np.int64
        assert loaded.tasks == [task for task, _ in EPISODES]
        shown, _, _ = next(DemonstrationBatches(loaded, np.arange(20), 2, 0, 0).epoch(20))
        assert [decode_instruction(row) for row in shown["instruction"].numpy()] == expected
    # An episode is of all that is said in it.
    selected = Demonstrations.load(tmp_path / "set", tasks=[TASKS["push-v3"].instruction])
    assert selected.episode_ends.tolist() == [5, 9, 11, 17] and len(set(selected.instruction_index[14:])) == 1
    assert selected.instruction_index[11] != selected.instruction_index[14]
    numbers[18] = 7
    edit_columns(data_file, task_index=numbers)
    with pytest.raises(ValueError, match=r"task_index \[7\], which meta/tasks\.parquet has no sentence for"):
        Demonstrations.load(tmp_path / "set")


def test_an_episode_is_of_a_task_that_all_its_frames_name(tmp_path: Path, data_file: Path) -> None:
    ids = pq.read_table(data_file)["task_id"].to_numpy().astype(np.float64)
    ids[7], ids[8:12] = TASKS["drawer-open-v3"].task_id, np.nan  # another in the second episode, none in the third
    edit_columns(data_file, task_id=ids)
    said = {name: TASKS[name].instruction for name in ("reach-v3", "push-back-v3")}
    names = [said[name] if number in (1, 2) else name for number, (name, _) in enumerate(EPISODES)]
    assert Demonstrations.load(tmp_path / "set").tasks == names


@pytest.mark.parametrize("image_storage", ["png", "mp4"])
@pytest.mark.parametrize("empty", [[0], [2], [4], [0, 1, 3]])
def test_an_episode_without_frames_is_none(tmp_path: Path, image_storage: str, empty: list[int]) -> None:
    write(tmp_path / "set", image_storage=image_storage)
    whole = Demonstrations.load(tmp_path / "set")
    kept = ~np.isin(whole.episode_index, empty)
    left = [number for number in range(5) if number not in empty]
    data, episodes = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(tmp_path / "set" / data).filter(pa.array(kept)), tmp_path / "set" / data)
    lengths = [0 if number in empty else length for number, (_, length) in enumerate(EPISODES)]
    places = [None if number in empty else 0 for number in range(5)]
    edit_columns(tmp_path / "set" / episodes, length=lengths, **{"data/file_index": places})
    loaded = Demonstrations.load(tmp_path / "set")
    for name in ("images", "states", "actions", "frame_index"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(whole, name)[kept])
    assert loaded.tasks == [whole.tasks[number] for number in left]
    assert loaded.trials == [whole.trials[number] for number in left]
    assert [loaded.instructions[i] for i in loaded.instruction_index] == [
        whole.instructions[i] for i in whole.instruction_index[kept]
    ]
    assert np.array_equal(np.sort(np.concatenate(loaded.split(0.5, 0))), np.arange(len(loaded)))
    gone = {whole.tasks[number] for number in empty} - set(loaded.tasks)
    for name in gone:
        with pytest.raises(ValueError, match=f"no episode of '{name}'"):
            Demonstrations.load(tmp_path / "set", tasks=[name])


def test_a_dataset_of_empty_episodes_is_empty(tmp_path: Path) -> None:
    write(tmp_path / "set")
    edit_columns(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet", length=[0] * 5)
    with pytest.raises(ValueError, match="is empty: it has no episode"):
        Demonstrations.load(tmp_path / "set")


@pytest.mark.parametrize("stored", [["number"], ["list"], ["list", "number"]])
def test_features_of_one_number(tmp_path: Path, data_file: Path, stored: list[str]) -> None:
    """LeRobot stores plain numbers, others lists of one; a merged dataset may have both."""
    table = pq.read_table(data_file)
    values = {name: np.stack(table[name].to_pylist())[:, 0] for name in ("observation.state", "action")}
    for file, way in enumerate(stored):
        path = data_file.with_name(f"file-00{file}.parquet")
        rows = slice(12 * file, None if file == len(stored) - 1 else 12)
        pq.write_table(table.slice(rows.start)[: rows.stop], path)
        kept = {name: list(x[rows]) if way == "number" else [[y] for y in x[rows]] for name, x in values.items()}
        edit_columns(path, observation__state=kept["observation.state"], action=kept["action"])
    files = [0, 0, 0, len(stored) - 1, len(stored) - 1]
    edit_columns(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet", **{"data/file_index": files})
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    for name in values:
        info["features"][name]["shape"] = [1]
    edit_info(tmp_path / "set", features=info["features"])
    loaded = Demonstrations.load(tmp_path / "set")
    np.testing.assert_array_equal(loaded.states, values["observation.state"][:, None].astype(np.float32))
    np.testing.assert_array_equal(loaded.actions, values["action"][:, None].astype(np.float32))
    assert loaded.action_chunks(np.array([0]), 3)[0].shape == (1, 3, 1)
    config = SFTConfig(model_kwargs=dict(TINY), steps=1, batch_size=4, shift=0, validation_fraction=0.0, bf16=False)
    assert sft(loaded, config, progress=False).model.action_dim == 1


LEVELS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
GRAY = LEVELS[..., :1].repeat(3, axis=2)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.fromarray(LEVELS[..., 0]), GRAY),
        (Image.fromarray(np.ascontiguousarray(LEVELS[..., :2]), "LA"), GRAY),
        (Image.fromarray(LEVELS, "RGBA"), LEVELS[..., :3]),
        (Image.fromarray(LEVELS[..., 0].astype(np.uint16) * 257), GRAY),  # the same gray in 16 bits
        (Image.fromarray(LEVELS[..., 0].astype(np.uint16) * 256 + 255), GRAY),
    ],
    ids=["gray", "gray and opacity", "colors and opacity", "16 bits", "16 bits, cut off"],
)
def test_channels_and_bits_of_pictures(tmp_path: Path, data_file: Path, picture: Image.Image, expected: Any) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    edit_columns(data_file, observation__image=[{"bytes": buffer.getvalue(), "path": None}] * 20)
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    channels = len(picture.getbands())
    for shape in ([channels, SIZE, SIZE], [SIZE, SIZE, channels]):
        info["features"]["observation.image"]["shape"] = shape
        edit_info(tmp_path / "set", features=info["features"])
        np.testing.assert_array_equal(Demonstrations.load(tmp_path / "set").images[3], expected)


def test_a_picture_without_levels_is_refused(tmp_path: Path, data_file: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.ones((SIZE, SIZE), np.float32)).save(buffer, "TIFF")
    edit_columns(data_file, observation__image=[{"bytes": buffer.getvalue(), "path": None}] * 20)
    with pytest.raises(ValueError, match=r"row 0 of .*file-000\.parquet cannot be read: it has floating point numbers"):
        Demonstrations.load(tmp_path / "set")


@pytest.mark.parametrize("image_storage", ["png", "mp4"])
def test_rows_in_any_order(tmp_path: Path, image_storage: str) -> None:
    """Tools that merge datasets leave files, episodes and frames in another order than the episodes' numbers."""
    write(tmp_path / "set", image_storage=image_storage)
    expected = Demonstrations.load(tmp_path / "set")
    data, episodes = tmp_path / "set/data/chunk-000", tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(data / "file-000.parquet")
    mixed = np.random.default_rng(0).permutation(20)
    by_episode = np.r_[14:20, 0:5, 8:14, 5:8]
    first = [1.0, 0.0, 1.0, 0.0, 1.0]  # the file of each episode
    second = np.isin(expected.episode_index, [0, 2, 4])
    for rows in (mixed, by_episode, np.r_[np.flatnonzero(~second), np.flatnonzero(second)]):
        pq.write_table(table.take(pa.array(rows)), data / "file-000.parquet", row_group_size=3)
        if rows is not mixed and rows is not by_episode:
            for file, part in enumerate((~second, second)):
                pq.write_table(table.filter(pa.array(part)), data / f"file-00{file}.parquet")
            edit_columns(episodes, **{"data/file_index": first})
        loaded = Demonstrations.load(tmp_path / "set")
        for name in ("images", "states", "actions", "frame_index", "episode_index", "instruction_index"):
            np.testing.assert_array_equal(getattr(loaded, name), getattr(expected, name))
        selected = Demonstrations.load(tmp_path / "set", tasks=["reach-v3"])
        np.testing.assert_array_equal(selected.images, expected.images[np.r_[5:8, 14:20]])


def test_numbers_of_a_merged_dataset_are_whole(tmp_path: Path) -> None:
    """Where one of the datasets lacked a column, pandas makes floats of its numbers and NaN of what is missing."""
    write(tmp_path / "set", image_storage="mp4")
    expected = Demonstrations.load(tmp_path / "set")
    path = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    whole = {name: table[name].to_numpy() for name in table.column_names if not name.startswith("stats/")}
    floats = {name: x.astype(np.float64) for name, x in whole.items() if np.issubdtype(x.dtype, np.integer)}
    assert {"trial/seed", "trial/goal", "length", "data/file_index"} <= floats.keys()
    for name in ("trial/seed", "trial/goal"):
        floats[name][1:3] = np.nan
    edit_columns(path, **floats, **{"trial/task": [whole["trial/task"][0], None, None, *whole["trial/task"][3:]]})
    loaded = Demonstrations.load(tmp_path / "set")
    assert loaded.trials == [expected.trials[0], None, None, *expected.trials[3:]]
    assert all(type(number) is int for trial in loaded.trials if trial for number in trial[1:])
    np.testing.assert_array_equal(loaded.images, expected.images)
    edit_columns(path, **{"data/file_index": [0.0, np.nan, 0.0, 0.0, 0.0]})
    with pytest.raises(ValueError, match=r"Episode 1 of .* has data/file_index=nan in meta/episodes, expected a whole"):
        Demonstrations.load(tmp_path / "set")


# --- datasets that cannot be read ------------------------------------------------------------------------------------


def test_missing_dataset_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder does not exist.*sb3-vla collect"):
        Demonstrations.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no meta/info\.json"):
        Demonstrations.load(tmp_path / "empty")
    for name in (
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
        "videos/observation.image/chunk-000/file-000.mp4",
    ):
        write(tmp_path / "set", image_storage="mp4", overwrite=True)
        (tmp_path / "set" / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            Demonstrations.load(tmp_path / "set")


@pytest.mark.parametrize(
    ("version", "message"), [("v2.1", "format v2.1, expected v3.0. Convert it"), ("v4.0", "'v4.0', expected")]
)
def test_other_versions(tmp_path: Path, version: str, message: str) -> None:
    write(tmp_path / "set")
    edit_info(tmp_path / "set", codebase_version=version)
    with pytest.raises(ValueError, match=message):
        Demonstrations.load(tmp_path / "set")


def test_missing_columns(tmp_path: Path) -> None:
    write(tmp_path / "set")
    features = json.loads((tmp_path / "set/meta/info.json").read_text())["features"]
    edit_info(
        tmp_path / "set", features={k: v for k, v in features.items() if k not in ("action", "observation.state")}
    )
    with pytest.raises(ValueError, match=r"lacks observation\.state, action; it has next\.reward"):
        Demonstrations.load(tmp_path / "set")
    edit_info(tmp_path / "set", features=features)
    path = tmp_path / "set/data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["action"]), path)
    with pytest.raises(ValueError, match=r"file-000\.parquet lacks the columns action"):
        Demonstrations.load(tmp_path / "set")


def test_damaged_descriptions_of_a_dataset(tmp_path: Path) -> None:
    write(tmp_path / "set")
    info = tmp_path / "set/meta/info.json"
    whole = json.loads(info.read_text())
    del whole["features"]["action"]["dtype"]
    for text, expected in (
        (info.read_text()[:-20], r"info\.json is damaged"),
        ("[]", "found list"),
        (json.dumps(whole), "of feature 'action' .*expected its dtype and shape"),
    ):
        before = info.read_text()
        info.write_text(text)
        with pytest.raises(ValueError, match=expected):
            Demonstrations.load(tmp_path / "set")
        info.write_text(before)
    tasks = tmp_path / "set/meta/tasks.parquet"
    table = pq.read_table(tasks)
    pq.write_table(table.slice(0, 0), tasks)
    with pytest.raises(ValueError, match=r"have the task_index \[0.*tasks\.parquet has no sentence for"):
        Demonstrations.load(tmp_path / "set")


def test_damaged_and_empty_datasets(tmp_path: Path) -> None:
    write(tmp_path / "set")
    data = tmp_path / "set/data/chunk-000/file-000.parquet"
    table = pq.read_table(data)
    pq.write_table(table.slice(0, 15), data)
    with pytest.raises(ValueError, match="hold 15 frames, meta/episodes counts 20"):
        Demonstrations.load(tmp_path / "set")
    swapped = table["episode_index"].to_numpy().copy()
    swapped[4] = 1  # a frame of the first episode is told to be of the second, where there is one already
    twice = table.set_column(table.column_names.index("episode_index"), "episode_index", pa.array(swapped))
    again = table.take(pa.array([5, 5, *range(2, 20)]))  # a frame twice, and not in order
    for damaged in (twice, again):
        pq.write_table(damaged, data)
        with pytest.raises(ValueError, match=r"do not hold the episodes of meta/episodes: .*frames of episode 0 are"):
            Demonstrations.load(tmp_path / "set")
    episodes = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(episodes).slice(0, 0), episodes)
    with pytest.raises(ValueError, match="is empty: it has no episode"):
        Demonstrations.load(tmp_path / "set")


def test_lists_of_different_lengths_are_refused(tmp_path: Path, data_file: Path) -> None:
    for last in ([[0.5] * 4, [0.5] * 3], [[0.5] * 5, [0.5] * 3], [[0.5] * 4, None]):
        edit_columns(data_file, action=[[0.5] * 4] * 18 + last)
        with pytest.raises(ValueError, match=f"{data_file} has action of different lengths"):
            Demonstrations.load(tmp_path / "set")


@pytest.mark.parametrize(
    "name",
    [
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
        "videos/observation.image/chunk-000/file-000.mp4",
    ],
)
@pytest.mark.parametrize("left", [0, 3, 0.5])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, left: float) -> None:
    write(tmp_path / "set", image_storage="mp4")
    path = tmp_path / "set" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if left < 1 else int(left)])
    with pytest.raises(ValueError, match=f"{path} (cannot be read|has no frame)"):
        Demonstrations.load(tmp_path / "set")
    path.write_bytes(bytes(range(256)) * 8)
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        Demonstrations.load(tmp_path / "set")


def test_a_damaged_part_of_a_video_is_named(tmp_path: Path) -> None:
    """A decoder that meets garbage may give up, or make up frames."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)  # so that a frame is many bytes
    episodes = [dataclasses.replace(make_episode("reach-v3", 20, 0), images=noise)]
    episodes.append(dataclasses.replace(make_episode("push-v3", 20, 1), images=noise))
    write(tmp_path / "set", episodes, image_storage="mp4")
    path = tmp_path / "set/videos/observation.image/chunk-000/file-000.mp4"
    whole = path.read_bytes()
    for share in (0.6, 0.7, 0.8):
        place = int(share * len(whole))
        path.write_bytes(whole[:place] + b"\xff" * 256 + whole[place + 256 :])
        with pytest.raises(ValueError, match=f"{path} (is damaged at|cannot be read)"):
            Demonstrations.load(tmp_path / "set")
    assert len(Demonstrations.load(tmp_path / "set", tasks=["reach-v3"])) == 20  # before the damage


def test_a_damaged_picture_is_named(tmp_path: Path, data_file: Path) -> None:
    pictures_of = [row["bytes"] for row in pq.read_table(data_file)["observation.image"].to_pylist()]
    for broken in (b"", b"garbage", pictures_of[7][:60], pictures_of[7][:-40]):
        stored = [{"bytes": broken if row == 7 else picture, "path": None} for row, picture in enumerate(pictures_of)]
        edit_columns(data_file, observation__image=stored)
        with pytest.raises(ValueError, match=f"The picture in row 7 of {data_file} cannot be read"):
            Demonstrations.load(tmp_path / "set")


@pytest.mark.parametrize("text", ["x" * 65, "引き出しを開けて赤いブロックを中に入れてください", ""])  # 72 bytes
def test_a_sentence_that_does_not_fit_is_named(tmp_path: Path, data_file: Path, text: str) -> None:
    length = len(text.encode())
    edit_columns(tmp_path / "set/meta/tasks.parquet", task=["Push", text])
    root = tmp_path / "set"
    with pytest.raises(ValueError) as caught:
        Demonstrations.load(root)
    for part in (str(root), "task_index 1", repr(text), f"got {length} bytes", "1 to 64 bytes"):
        assert part in str(caught.value)
    assert (f"load the dataset with instruction_bytes={length}" in str(caught.value)) == (length > 64)
    assert Demonstrations.load(root, tasks=["push-v3"]).instructions == ["Push"]  # where it is not needed
    if length:
        loaded = Demonstrations.load(root, instruction_bytes=length)
        shown, _, _ = next(DemonstrationBatches(loaded, np.arange(20), 2, 0, 0).epoch(20))
        assert shown["instruction"].shape == (20, length)
        assert decode_instruction(shown["instruction"][5].numpy()) == text


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    episode = make_episode("reach-v3", 3, 0)
    episode.actions[2, 1] = np.nan
    write(tmp_path / "set", [episode])
    with pytest.raises(ValueError, match=r"action of .* has 1 values that are not finite"):
        Demonstrations.load(tmp_path / "set")


def test_a_selection_of_which_some_may_be_missing(tmp_path: Path) -> None:
    write(tmp_path / "set")
    whole = Demonstrations.load(tmp_path / "set")
    loaded = Demonstrations.load(tmp_path / "set", tasks=[whole.tasks[0], "hammer-v3"], allow_missing=True)
    assert set(loaded.tasks) == {whole.tasks[0]}
    with pytest.raises(ValueError, match="no episode of 'hammer-v3'"):
        Demonstrations.load(tmp_path / "set", tasks=["hammer-v3"], allow_missing=True)


def test_selection_errors(tmp_path: Path) -> None:
    write(tmp_path / "set")
    for tasks, message in (
        (["pusch-v3"], "no episode of 'pusch-v3'; did you mean 'push-v3'"),
        ("push-v3", r"write tasks=\['push-v3'\]"),
        ([], "tasks is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            Demonstrations.load(tmp_path / "set", tasks=tasks)
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, got 0"):
        Demonstrations.load(tmp_path / "set", image_size=0)


def test_memory_is_checked_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episode = dataclasses.replace(make_episode("reach-v3", 3, 0), images=np.zeros((3, 256, 256, 3), np.uint8))
    with DemonstrationWriter(tmp_path / "set", image_shape=(256, 256, 3)) as writer:
        writer.add_episode(episode)
    monkeypatch.setattr(demonstrations, "available_memory", lambda: 3 * 128 * 128 * 3)
    with pytest.raises(ValueError, match=r"3 frames of 256x256 pixels .* Pass image_size=128 .* or fewer tasks"):
        Demonstrations.load(tmp_path / "set")
    assert Demonstrations.load(tmp_path / "set", image_size=128).images.shape == (3, 128, 128, 3)
    with pytest.raises(ValueError, match=r"need 0\.0 GB of memory"):
        Demonstrations.load(tmp_path / "set", image_size=128, hand_view=HandView(64))
    monkeypatch.undo()
    assert 2**20 < demonstrations.available_memory() < 2**50


# --- shared by ranks --------------------------------------------------------------------------------------------------


def own_bytes() -> int:
    """Memory of this process that it shares with nobody and no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.fixture
def two_tasks(tmp_path: Path) -> Path:
    with DemonstrationWriter(tmp_path / "set", image_shape=(32, 32, 3)) as writer:
        for name in ("reach-v3", "push-back-v3"):
            writer.add_episode(make_episode(name, 24, 0))
    return tmp_path / "set"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux tells of a process")
def test_ranks_of_a_machine_hold_pictures_once(two_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory that they map, in no folder; a rank that asks for others has its own, as on another machine."""
    monkeypatch.setattr("tempfile.tempdir", str(two_tasks.parent / "missing"))
    expected = Demonstrations.load(two_tasks, image_size=896)  # 116 MB, much more than threads that decode leave
    few = Demonstrations.load(two_tasks, image_size=32, tasks=["reach-v3"])
    hand = HandView(16, 0.5)
    cut = Demonstrations.load(two_tasks, hand_view=hand)

    def work(rank: int) -> tuple[int, bool, bool, list[bool]]:
        before = own_bytes()
        loaded = Demonstrations.load(two_tasks, image_size=896)
        grown, handles = own_bytes() - before, len(os.listdir("/proc/self/fd"))
        frames = np.arange(0, 48, 5)
        same = np.array_equal(loaded.images, expected.images) and loaded.images[frames].flags.writeable
        same &= not loaded.images.flags.writeable
        other = Demonstrations.load(two_tasks, image_size=32, tasks=["reach-v3"] if rank == 2 else None)
        alike = np.array_equal(other.images[: len(few)], few.images) and len(other) == (24 if rank == 2 else 48)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:  # of other processes
                patch.setattr("sb3_vla.data.demonstrations.socket.gethostname", lambda: "elsewhere")
            found = Demonstrations.load(two_tasks, hand_view=hand)
        assert found.hand_images is not None
        alike &= np.array_equal(found.images, cut.images) and np.array_equal(found.hand_images, cut.hand_images)
        writeable = [each.flags.writeable for each in (found.images, found.hand_images)]
        del other, found  # which have their memory open
        assert len(os.listdir("/proc/self/fd")) == handles
        return grown, same, alike, writeable

    for rank, (grown, same, alike, writeable) in enumerate(run_ranks(3, work)):
        assert grown < expected.images.nbytes // 3
        assert same and alike
        assert writeable == [rank == 1] * 2


def test_ranks_are_told_what_the_one_that_decodes_found(two_tasks: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    def work(_: int) -> list[str]:
        messages = []
        for owner, name in ((os, "posix_fallocate"), (lerobot_reader, "decode_picture")):
            with pytest.MonkeyPatch.context() as patch, pytest.raises((ValueError, OSError)) as caught:
                patch.setattr(owner, name, full)
                Demonstrations.load(two_tasks)
            messages.append(str(caught.value))
        return messages

    for no_room, damaged in run_ranks(2, work):
        assert "share need 0.0 GB of memory: Cannot allocate memory. Pass fewer tasks or image_size" in no_room
        assert "Cannot allocate memory" in damaged and "share" not in damaged


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_resizing_averages_areas(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    write(tmp_path / "set", [dataclasses.replace(make_episode("reach-v3", 2, 0), images=images)])
    loaded = Demonstrations.load(tmp_path / "set", image_size=8).images
    areas = images.reshape(2, 8, 4, 8, 4, 3).astype(float).mean(axis=(2, 4))
    np.testing.assert_allclose(loaded, areas, atol=1.0)  # rounded once per axis
    larger = Demonstrations.load(tmp_path / "set", image_size=64).images
    expected = Image.fromarray(images[1]).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(larger[1], np.asarray(expected))


def test_data_says_at_which_size_it_was_drawn(tmp_path: Path) -> None:
    taken = {"camera": "corner2", "crop": "workspace"}
    write(tmp_path / "set", camera=taken)
    for size, shrunk in ((None, {}), (SIZE, {}), (8, {"render_size": SIZE, "resize": "area"})):
        assert Demonstrations.load(tmp_path / "set", image_size=size).camera == {**taken, **shrunk}
    # Pictures that were shrunk before they were stored.
    write(tmp_path / "again", camera={"render_size": 480, "resize": "area"})
    assert Demonstrations.load(tmp_path / "again", image_size=8).camera == {"render_size": 480, "resize": "area"}
    write_foreign(tmp_path / "foreign", "image")
    rename = {"observation.images.camera1": "observation.image"}
    wide = Demonstrations.load(tmp_path / "foreign", rename=rename, image_size=8)
    assert wide.camera == {"render_size": [24, 40], "resize": "area"}


def test_action_chunks_by_hand(tmp_path: Path) -> None:
    write(tmp_path / "set")  # episodes: frames 0-4, 5-7, 8-11, 12-13, 14-19
    loaded = Demonstrations.load(tmp_path / "set")
    chunks, mask = loaded.action_chunks(np.array([0, 3, 7, 12, 19]), 3)
    rows = [[0, 1, 2], [3, 4, 4], [7, 7, 7], [12, 13, 13], [19, 19, 19]]
    np.testing.assert_array_equal(chunks, loaded.actions[rows])
    assert mask.tolist() == [
        [True, True, True], [True, True, False], [True, False, False], [True, True, False], [True, False, False],
    ]  # fmt: skip
    assert chunks.shape == (5, 3, 4) and chunks.dtype == np.float32
    chunks, mask = loaded.action_chunks(np.arange(20), 1)
    np.testing.assert_array_equal(chunks[:, 0], loaded.actions)
    assert mask.all()
    with pytest.raises(ValueError, match="horizon must be at least 1 action, got 0"):
        loaded.action_chunks(np.array([0]), 0)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Demonstrations:
    """Ten episodes of reach, ten of push, five of push-back and one of drawer-open, two or three frames each."""
    root = tmp_path_factory.mktemp("many") / "set"
    names = ["reach-v3"] * 10 + ["push-v3"] * 10 + ["push-back-v3"] * 5 + ["drawer-open-v3"]
    write(root, [make_episode(task, 2 + seed % 2, seed) for seed, task in enumerate(names)])
    return Demonstrations.load(root)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_is_by_episode_and_stratified(many: Demonstrations, seed: int) -> None:
    train, validation = many.split(0.2, seed)
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(many)))
    assert not set(many.episode_index[train]) & set(many.episode_index[validation])
    held_out = [many.tasks[episode] for episode in set(many.episode_index[validation])]
    counts = {task: held_out.count(task) for task in set(many.tasks)}
    assert counts == {"reach-v3": 2, "push-v3": 2, "push-back-v3": 1, "drawer-open-v3": 0}
    again = many.split(0.2, seed)
    np.testing.assert_array_equal(again[1], validation)


def test_split_shares_and_seeds(many: Demonstrations) -> None:
    assert any(not np.array_equal(many.split(0.2, 0)[1], many.split(0.2, seed)[1]) for seed in (1, 2, 3))
    for seed in range(5):
        _, validation = many.split(0.1, seed)
        held_out = [many.tasks[episode] for episode in sorted(set(many.episode_index[validation]))]
        assert held_out.count("reach-v3") == held_out.count("push-v3") == 1 and len(held_out) in (2, 3)
    train, validation = many.split(0.0, 0)
    assert len(train) == len(many) and len(validation) == 0
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"validation_fraction must lie in \[0, 1\)"):
            many.split(fraction, 0)


def test_statistics_against_numpy(many: Demonstrations) -> None:
    stats = many.statistics()
    for name, values in (("state", many.states), ("action", many.actions)):
        for statistic in ("mean", "std", "min", "max"):
            expected = getattr(values.astype(np.float64), statistic)(axis=0)
            np.testing.assert_allclose(stats[name][statistic], expected, rtol=1e-6, atol=1e-7)
            assert stats[name][statistic].dtype == np.float32
        for statistic, share in (("q01", 1), ("q99", 99)):
            expected = np.percentile(values.astype(np.float64), share, axis=0)
            np.testing.assert_allclose(stats[name][statistic], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("low", [1.0, np.float32(1.0 - 1e-6), 0.995])
def test_statistics_of_what_hardly_moves(many: Demonstrations, low: float) -> None:
    data = dataclasses.replace(many, states=many.states.copy(), actions=many.actions.copy())
    for values in (data.states, data.actions):
        values[:, 3] = 1.0
        values[::9, 3] = low
    for name, statistics in data.statistics().items():
        assert all(value.dtype == np.float32 for value in statistics.values())
        assert statistics["std"][3] == np.float32(0.01)
        for lower, upper in (("min", "max"), ("q01", "q99")):
            assert statistics[lower][3] == np.float32(low)
            width = 0.0 if (name, low, upper) == ("action", 1.0, "max") else 0.02
            np.testing.assert_allclose(statistics[upper][3], low + width, rtol=1e-6)
    moving = {name: {key: value[:3] for key, value in found.items()} for name, found in data.statistics().items()}
    for name, found in many.statistics().items():
        for key, value in found.items():
            np.testing.assert_array_equal(moving[name][key], value[:3])


# --- collecting ------------------------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_collect_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tasks": ["reach-v3", "drawer-close-v3"],
        "episodes_per_task": 2,
        "image_size": 32,
        "noise_std": 0.5,
        "seed": 3,
        "progress": False,
    }
    report = collect(tmp_path / "one", "MT10", num_workers=1, **options)
    collect(tmp_path / "two", "MT10", num_workers=2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    loaded = Demonstrations.load(tmp_path / "one")
    assert loaded.tasks == ["reach-v3", "reach-v3", "drawer-close-v3", "drawer-close-v3"]
    assert loaded.trials[0] == Trial("reach-v3", 3, 0)
    assert loaded.camera == {"camera": "corner2", "crop": "workspace"}
    assert loaded.images.shape[1:] == (32, 32, 3) and loaded.images.std() > 10
    assert np.abs(loaded.actions).max() <= 1
    data = pq.read_table(tmp_path / "one/data/chunk-000/file-000.parquet").to_pydict()
    ends = [int(end) - 1 for end in loaded.episode_ends]
    assert [i for i, success in enumerate(data["next.success"]) if success] == ends, "cut at the first success"
    assert max(data["next.reward"]) == pytest.approx(10.0, abs=1.0), "MetaWorld's own scale"
    np.testing.assert_allclose(np.array(data["observation.environment_state"])[:, :4], loaded.states, atol=1e-6)
    assert report.episodes == 4 and report.frames == len(loaded) <= report.env_steps
    assert report.tasks["reach-v3"].success_rate == 2 / report.tasks["reach-v3"].attempts
    assert "drawer-close-v3" in str(report)


def test_noise_moves_the_hand_but_not_the_label(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": ["reach-v3"], "episodes_per_task": 1, "image_size": 16, "progress": False}
    collect(tmp_path / "clean", **options)
    collect(tmp_path / "noisy", noise_std=1.0, noise_probability=0.3, **options)
    clean, noisy = (Demonstrations.load(tmp_path / name) for name in ("clean", "noisy"))
    np.testing.assert_array_equal(clean.states[0], noisy.states[0])
    assert len(clean) != len(noisy) or np.abs(clean.states - noisy.states).max() > 0.01
    from mw_envs.experts import ScriptedExpert

    data = pq.read_table(tmp_path / "noisy/data/chunk-000/file-000.parquet").to_pydict()
    expert = ScriptedExpert("reach-v3")  # reach's expert has no memory
    with pytest.warns(UserWarning, match="Constant"):
        labels = [expert.action(np.array(state)) for state in data["observation.environment_state"]]
    np.testing.assert_allclose(noisy.actions, labels, atol=1e-5)


def fake_play(env: Any, settings: Any, job: Any) -> Any:
    """Plays nothing: attempts 1, 3, 5, ... of push-v3 fail; the quicker, the later the attempt."""
    time.sleep(0.02 * (3 - job.attempt % 4))
    episode = make_episode(job.task, 3, job.attempt + 100 * TASKS[job.task].task_id)
    failed = job.task == "push-v3" and job.attempt % 2 == 1
    return collecting._Outcome(job, None if failed else episode, 3, 0.0)


FAKE: dict[str, Any] = {"image_size": SIZE, "start_method": "fork", "progress": False}


def test_attempts_are_accepted_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_play", fake_play)
    for workers in (1, 3):
        report = collect(
            tmp_path / str(workers), tasks=["push-v3", "reach-v3"], episodes_per_task=3, num_workers=workers, **FAKE
        )
        assert (report.tasks["push-v3"].attempts, report.tasks["push-v3"].episodes) == (5, 3)
        assert report.tasks["push-v3"].success_rate == 0.6 and report.tasks["reach-v3"].attempts == 3
        assert report.env_steps == 24 and report.frames == 18
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    loaded = Demonstrations.load(tmp_path / "1")
    expected = [fake_play(None, None, collecting._Job("push-v3", attempt)).episode for attempt in (0, 2, 4)]
    np.testing.assert_array_equal(loaded.actions[:9], joined(expected, "actions"))
    assert multiprocessing.active_children() == []


def test_expert_that_fails_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_play", lambda _env, _settings, job: collecting._Outcome(job, None, 200, 0.0))
    with pytest.raises(RuntimeError, match=r"expert of reach-v3 succeeded in 0 of \d+ attempts.*horizon \(now 200"):
        collect(tmp_path / "set", tasks=["reach-v3"], episodes_per_task=2, num_workers=2, **FAKE)
    assert list(tmp_path.iterdir()) == [] and multiprocessing.active_children() == []


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def unavailable(*_: Any) -> Any:
    raise RendererUnavailableError("install libegl1")


@pytest.mark.parametrize(
    ("play", "error", "message"),
    [
        (lambda *_: os._exit(3), RuntimeError, r"process died \(exit code 3\) in .*reach-v3"),
        (unavailable, RendererUnavailableError, "install libegl1"),
    ],
)
def test_worker_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(collecting, "_play", play)
    with pytest.raises(error, match=message):
        collect(tmp_path / "set", tasks=["reach-v3"], num_workers=2, **FAKE)
    assert list(tmp_path.iterdir()) == [] and multiprocessing.active_children() == []


def test_interrupt_leaves_no_process_and_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_play", fake_play)
    monkeypatch.setattr(DemonstrationWriter, "add_episode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "set", tasks=["reach-v3"], num_workers=2, **FAKE)
    assert list(tmp_path.iterdir()) == [] and multiprocessing.active_children() == []


def alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(env: Any, settings: Any, job: Any) -> Any:
        (tmp_path / f"pid-{os.getpid()}").touch()
        return fake_play(env, settings, job)

    monkeypatch.setattr(collecting, "_play", play)
    options = FAKE | {"tasks": ["reach-v3"], "episodes_per_task": 10_000, "num_workers": 2}
    parent = multiprocessing.get_context("fork").Process(target=collect, args=(tmp_path / "set",), kwargs=options)
    parent.start()
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.join()
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 2 and not any(map(alive, pids))
    assert not (tmp_path / "set").exists() and not list(tmp_path.rglob("info.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "MT11"}, "MT11"),
        ({"tasks": ["reach-v2"]}, "reach-v3"),
        ({"suite": "MT1"}, "MT1 is a single task"),
        ({"episodes_per_task": 0}, "episodes_per_task must be at least 1, got 0"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"noise_std": -1.0}, "noise_std must be at least 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"noise_probability": 1.5}, r"noise_probability must lie in \[0, 1\], got 1.5"),
        ({"image_size": 0}, "image_size"),
        ({"camera": "corner9"}, "corner9"),
        ({"crop": "nowhere"}, "nowhere"),
        ({"renderer": "vulkan"}, "vulkan"),
        ({"image_storage": "mp4", "image_size": 33}, "even"),
        ({"start_method": "thread"}, "start_method"),
    ],
)
def test_collect_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(tmp_path / "set", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_collect_refuses_a_folder_before_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set")
    monkeypatch.setattr(collecting._Workers, "__enter__", interrupt)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        collect(tmp_path / "set", tasks=["reach-v3"], progress=False)
