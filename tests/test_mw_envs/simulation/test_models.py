"""Models from disk are the compiled ones to the last byte, whatever happened to the files."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import metaworld
import numpy as np
import numpy.typing as npt
import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from mw_envs import TASKS, Trial
from mw_envs.simulation import compiled_models as models
from mw_envs.simulation.compiled_models import cache_directory, compile_model, load_model, model_bytes, scene_file
from mw_envs.simulation.scene import Simulator

# The scene that is stored whole, and two that are stored as what they have more.
SOME_TASKS = ["reach-v3", "push-v3", "hammer-v3"]
SCENES = sorted({scene_file(task) for task in TASKS})
SOME_SCENES = [scene_file(task) for task in SOME_TASKS]
EVERY_SCENE = SOME_SCENES + [
    pytest.param(scene, marks=pytest.mark.slow) for scene in SCENES if scene not in SOME_SCENES
]
HAMMER = scene_file("hammer-v3")
STEPS = 1000


def scene_name(scene: Path) -> str:
    return scene.stem


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_directory.cache_clear()
    yield cache_directory()
    cache_directory.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The scenes that have been compiled since the last look."""
    scenes: list[Path] = []

    def compiling(xml: Path) -> Any:
        scenes.append(xml)
        return compile_model(xml)

    monkeypatch.setattr(models, "compile_model", compiling)
    return scenes


@functools.cache
def reference(scene: Path) -> npt.NDArray[np.uint8]:
    return model_bytes(compile_model(scene))


def assert_loads(scene: Path) -> None:
    np.testing.assert_array_equal(model_bytes(load_model(scene)), reference(scene), strict=True)


@pytest.mark.parametrize("scene", EVERY_SCENE, ids=scene_name)
def test_a_model_from_disk_is_the_compiled_one(cache: Path, compiled: list[Path], scene: Path) -> None:
    assert_loads(scene)
    assert scene in compiled
    compiled.clear()
    assert_loads(scene)
    assert compiled == []


@pytest.mark.parametrize("task", [*SOME_TASKS[1:], "door-open-v3"])
def test_a_thousand_steps_of_a_model_from_disk_are_metaworlds(cache: Path, compiled: list[Path], task: str) -> None:
    Simulator(task)
    compiled.clear()
    simulator = Simulator(task)
    assert compiled == []
    mt1 = metaworld.MT1(task, seed=3)
    env = mt1.train_classes[task]()
    env.set_task(mt1.train_tasks[7])
    np.testing.assert_array_equal(simulator.place(Trial(task, 3, 7)), env.reset()[0])
    actions = np.random.default_rng(0).normal([0, 0, -0.1, 0.5], 0.7, (STEPS, 4)).astype(np.float32)
    for action in np.clip(actions, -1, 1):
        observation, reward, success = simulator.step(action)
        env.curr_path_length = 0  # MetaWorld's own limit is 500
        expected, expected_reward, _, _, info = env.step(action)
        np.testing.assert_array_equal(observation, expected, strict=True)
        assert (reward, success) == (float(expected_reward), bool(info["success"]))
    for name in ("qpos", "qvel", "qacc_warmstart", "mocap_pos", "xpos", "xmat", "site_xpos", "geom_xmat"):
        np.testing.assert_array_equal(getattr(simulator.data, name), getattr(env.data, name), err_msg=name)


def test_the_tasks_scenes() -> None:
    assert len(SCENES) == 36
    assert all(scene.is_file() for scene in SCENES)
    assert len({scene.stem for scene in SCENES}) == 36  # the names of the files in the cache
    for task in SOME_TASKS:
        assert scene_file(task) == Path(ALL_V3_ENVIRONMENTS[task]().fullpath)


def test_the_scenes_share_what_they_have_in_common(cache: Path) -> None:
    for scene in SOME_SCENES:
        load_model(scene)
    sizes = {path.name: path.stat().st_size for path in cache.iterdir()}
    assert set(sizes) == {"whole.mjb", *(f"{scene.stem}.npz" for scene in SOME_SCENES)}
    # The hammer's scene has a texture of 3 MB of its own.
    assert sizes["sawyer_hammer.npz"] < 0.3 * len(reference(HAMMER))
    assert sizes["sawyer_push_v3.npz"] < 0.01 * len(reference(HAMMER))
    assert sizes["sawyer_reach_v3.npz"] < 2000


# Damage


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = np.fromfile(path, np.uint8)
    content[1000::100_000] ^= 1  # wherever a scene takes its part from
    path.write_bytes(content.tobytes())


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(10_000))


def missing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [half, emptied, flipped, noise, missing])
@pytest.mark.parametrize("name", ["whole.mjb", "sawyer_hammer.npz"])
def test_damaged_files_are_replaced_in_silence(
    cache: Path, compiled: list[Path], capfd: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None]
) -> None:
    load_model(HAMMER)
    damage(cache / name)
    assert_loads(HAMMER)
    compiled.clear()
    assert_loads(HAMMER)
    assert compiled == []  # all is well again
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["whole.mjb", "sawyer_hammer.npz"])
def test_what_cannot_be_replaced_is_left_alone(cache: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    load_model(HAMMER)
    a_folder(cache / name)
    assert_loads(HAMMER)
    assert (cache / name).is_dir()
    assert not [path.name for path in cache.iterdir() if path.name.startswith(".")]  # nor is anything half done
    assert capfd.readouterr() == ("", "")


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Path]) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache_directory.cache_clear()
    for _ in range(2):
        assert_loads(HAMMER)
    assert compiled == [HAMMER] * 2
    cache_directory.cache_clear()


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        assert_loads(HAMMER)
    assert [path.name for path in cache.iterdir()] == ["whole.mjb"]
    assert_loads(HAMMER)
    assert (cache / "sawyer_hammer.npz").is_file()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    cache_directory.cache_clear()
    assert_loads(HAMMER)
    cache_directory.cache_clear()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(cache: Path, tmp_path: Path) -> None:
    load_model(HAMMER)
    path = cache / "sawyer_hammer.npz"
    for key in ("whole", "runs", "added"):
        with np.load(path) as stored:
            content = dict(stored)
        content[key] = np.array([Trap(tmp_path / "sprung")], dtype=object)
        np.savez(path, **content)  # type: ignore[arg-type]
        assert_loads(HAMMER)
        assert not (tmp_path / "sprung").exists()


# Several processes


def load_in_turn(cache: str, first: int) -> list[bytes]:
    os.environ["XDG_CACHE_HOME"] = cache
    scenes = SOME_SCENES[first:] + SOME_SCENES[:first]
    loaded = {scene: model_bytes(load_model(scene)).tobytes() for scene in scenes}
    return [loaded[scene] for scene in SOME_SCENES]


def test_processes_share_a_cache_that_they_all_fill(tmp_path: Path) -> None:
    expected = [reference(scene).tobytes() for scene in SOME_SCENES]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        for loaded in pool.starmap(load_in_turn, [(str(tmp_path), first) for first in range(3)], chunksize=1):
            assert loaded == expected
        pool.close()
        pool.join()
    (directory,) = (tmp_path / "mw_envs").iterdir()
    assert {path.name for path in directory.iterdir()} == {
        "whole.mjb",
        *(f"{scene.stem}.npz" for scene in SOME_SCENES),
    }


# Where it is


def directory_now() -> Path:
    cache_directory.cache_clear()
    return cache_directory()


def test_the_place_depends_on_all_that_the_models_depend_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = tmp_path / "metaworld" / "assets"
    assets.mkdir(parents=True)
    monkeypatch.setattr(metaworld, "__file__", str(assets.parent / "__init__.py"))
    (assets / "mesh.stl").write_bytes(b"1234")
    places = [cache, directory_now()]
    (assets / "mesh.stl").write_bytes(b"1235")
    places.append(directory_now())
    (assets / "mesh.stl").rename(assets / "other.stl")
    places.append(directory_now())
    monkeypatch.setattr(models.mujoco, "__version__", "3.0.0")
    places.append(directory_now())
    assert len(set(places)) == 5
    assert {place.parent for place in places} == {tmp_path / "mw_envs"}


@pytest.mark.parametrize("given", [None, "", "relative/path"])  # of which the standard says that it is to be ignored
def test_the_default_place(cache: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, tmp_path: Path) -> None:
    if given is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert directory_now() == tmp_path / "home" / ".cache" / "mw_envs" / cache.name
