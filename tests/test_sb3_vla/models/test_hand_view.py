"""The hand view: the same pixels as in the full picture, from every camera, drawn or cut."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv
from toy import TINY, stir

from mw_envs.env import CAMERAS, MetaWorldEnv
from mw_envs.hand_view import CARRIED, STANDING, HandView
from mw_envs.rendering import View, get_renderer, renderer_available, resolve_crop
from mw_envs.simulation.scene import acquire_simulator, release_simulator
from mw_envs.tasks import Trial
from sb3_vla import GRPO, PPO
from sb3_vla.checkpoints import save_checkpoint
from sb3_vla.cli.main import main
from sb3_vla.data import lerobot_reader
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.data.demonstrations import Demonstrations, DemonstrationWriter, Episode
from sb3_vla.data.lerobot_writer import ImageStorage
from sb3_vla.evaluation.evaluation import Protocol, evaluate, seen_by
from sb3_vla.models import CompactVLA, make_model
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.views import cut_window
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig


def played(seed: int = 0, steps: int = 6, **options: Any) -> list[dict[str, Any]]:
    """Observations of one episode with random actions, which throw the hand about."""
    env = MetaWorldEnv("MT10", image_size=32, action_chunk=8, **options)
    observation, _ = env.reset(seed=seed, options={"task": "push-v3"})
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 4)).astype(np.float32)
    seen = [observation, *(env.step(np.tile(action, (8, 1)))[0] for action in actions)]
    env.close()
    return seen


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("border", ["shift", "black"])
def test_the_window_is_a_crop_of_the_full_picture(camera: str, border: str) -> None:
    """To the bit: of the published 480-pixel picture with a window of 64 / 480, in each camera and at its borders."""
    hand = HandView(64, 64 / 480, border)
    options = {"camera": camera, "hand_view": 64, "hand_window": 64 / 480, "hand_border": border}
    drawn = played(crop="workspace", **options)
    full = played(camera=camera, record_frames=False)
    env = MetaWorldEnv("MT10", camera=camera, action_chunk=8)
    pictures = [env.reset(seed=0, options={"task": "push-v3"})[0]["image"]]
    for action in np.random.default_rng(0).uniform(-1, 1, (6, 4)).astype(np.float32):
        pictures.append(env.step(np.tile(action, (8, 1)))[0]["image"])
    states = np.stack([observation["state"] for observation in full])
    for window, one in zip(hand.cut(np.stack(pictures), camera, states), drawn, strict=True):
        np.testing.assert_array_equal(window, one["hand_image"])


def test_the_full_picture_of_the_window_s_resolution_gives_the_window_too() -> None:
    assert HandView(64).resolution == 288
    small = [one["hand_image"] for one in played(hand_view=64)]
    env = MetaWorldEnv("MT10", image_size=288, action_chunk=8, hand_view=64)
    observation, _ = env.reset(seed=0, options={"task": "push-v3"})
    np.testing.assert_array_equal(observation["hand_image"], small[0])
    np.testing.assert_array_equal(
        HandView(64).cut(observation["image"][None], "corner2", observation["state"][None])[0], small[0]
    )


def test_the_fingertips_are_in_the_middle_of_the_window() -> None:
    """Where MuJoCo places their sites, and where the window's middle is, less than a tenth of its side apart."""
    env = MetaWorldEnv("MT1", task="reach-v3", image_size=32)
    for seed in range(3):
        state = env.reset(seed=seed)[0]["state"]
        assert env._simulator is not None
        sites = [env._simulator.data.site(f"{side}EndEffector").xpos for side in ("right", "left")]
        place = STANDING["corner2"].project(np.mean(sites, axis=0)) * 288 - HandView(64).corner("corner2", state)
        assert np.abs(place - 32).max() < 6.4, place


@pytest.mark.parametrize("task", ["reach-v3", "sweep-v3", "bin-picking-v3"])
def test_the_table_of_cameras_is_mujoco_s(task: str) -> None:
    simulator = acquire_simulator(task)
    try:
        simulator.place(Trial(task, 0, 0))
        for name, camera in STANDING.items():
            there = simulator.model.camera(name)
            axes = simulator.data.camera(name).xmat.reshape(3, 3)
            np.testing.assert_allclose(camera.position, simulator.data.camera(name).xpos, atol=1e-9)
            np.testing.assert_allclose(np.stack([camera.right, camera.up]), axes.T[:2], atol=1e-9)
            assert camera.fovy == there.fovy[0]
    finally:
        release_simulator(simulator)
    assert set(STANDING) | set(CARRIED) == set(CAMERAS)


def test_another_resolution_is_reduced_as_pillow_does() -> None:
    """A window of 40 pixels of 160, cut from a picture of 480: whole pixels, so Pillow can cut and reduce the same."""
    hand = HandView(40, 0.25)
    picture = played(hand_view=None)[0]
    env = MetaWorldEnv("MT10")
    observation, _ = env.reset(seed=0, options={"task": "push-v3"})
    row, column = hand.corner("corner2", observation["state"])
    whole = Image.fromarray(observation["image"]).resize((160, 160), Image.Resampling.BILINEAR)
    expected = np.asarray(whole)[row : row + 40, column : column + 40].astype(int)
    found = hand.cut(observation["image"][None], "corner2", picture["state"][None])[0]
    assert np.abs(found - expected).max() <= 1


def test_black_outside_the_view() -> None:
    states = np.array([[0.4, 0.4, 0.1, 0.0]], np.float32)  # at the lower border
    picture = np.full((1, 288, 288, 3), 200, np.uint8)
    assert (HandView(64).cut(picture, "corner2", states) == 200).all()
    black = HandView(64, border="black")
    corner = black.corner("corner2", states[0])
    window = black.cut(picture, "corner2", states)[0]
    (top, left, height, width), (down, right) = black.inside(*corner)
    assert 0 < height * width < 64 * 64
    expected = np.zeros((64, 64, 3), np.uint8)
    expected[down : down + height, right : right + width] = 200
    np.testing.assert_array_equal(window, expected)
    assert (top, left) == (max(corner[0], 0), max(corner[1], 0))


@pytest.mark.parametrize("kind", ["software", "egl", "osmesa"])
def test_a_part_of_a_view_is_that_part(kind: str) -> None:
    if not renderer_available(kind):
        pytest.skip(f"no {kind} here")
    renderer = get_renderer(kind)
    simulator = acquire_simulator("drawer-open-v3")
    try:
        simulator.place(Trial("drawer-open-v3", 0, 0))
        for view in (
            View("corner2", 200, 150),
            View("corner2", 96, 96, resolve_crop("workspace")),
            View("topview", 64, 64, rotated=False),
        ):
            whole = renderer.render(simulator.model, simulator.data, view, simulator.scene).astype(int)
            for seed in range(5):
                top, left = np.random.default_rng(seed).integers(0, (view.height - 40, view.width - 24))
                part = replace(view, part=(int(top), int(left), 40, 24))
                drawn = renderer.render(simulator.model, simulator.data, part, simulator.scene)
                difference = np.abs(drawn - whole[top : top + 40, left : left + 24])
                # OpenGL decides coverage anew in another frustum; ours computes the same numbers.
                assert difference.mean() <= (0.0 if kind == "software" else 1.0)
            again = renderer.render(simulator.model, simulator.data, view, simulator.scene)
            np.testing.assert_array_equal(again, whole)
    finally:
        release_simulator(simulator)


def test_the_environment_declares_it() -> None:
    env = gym.make("MetaWorldMT1-v0", task="reach-v3", image_size=32, hand_view=48)
    assert env.observation_space["hand_image"] == gym.spaces.Box(0, 255, (48, 48, 3), np.uint8)
    assert env.reset(seed=0)[0]["hand_image"].shape == (48, 48, 3)
    assert "hand_image" not in gym.make("MetaWorldMT1-v0", task="reach-v3").observation_space.spaces


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hand_view": 0}, "hand_view=0"),
        ({"hand_view": 2.5}, "hand_view=2.5"),
        ({"hand_view": True}, "hand_view=True"),
        ({"hand_view": "64"}, "hand_view='64'"),
        ({"hand_view": 64, "hand_window": 0.0}, "hand_window=0.0"),
        ({"hand_view": 64, "hand_window": 1.5}, "hand_window=1.5"),
        ({"hand_view": 64, "hand_window": float("nan")}, "hand_window=nan"),
        ({"hand_view": 64, "hand_border": "blak"}, "hand_border 'blak'.*black"),
        ({"hand_view": 64, "hand_border": 3}, "hand_border 3.*black"),
        ({"hand_view": 64, "hand_window": "0.2"}, "hand_window='0.2'"),
        ({"hand_view": 64, "hand_window": None}, "hand_window=None"),
        ({"hand_view": 64, "hand_window": True}, "hand_window=True"),
        ({"hand_window": 5.0}, "hand_window=5.0"),
        ({"hand_border": "blak"}, "hand_border 'blak'.*black"),
        ({"hand_view": 64, "hand_window": 0.05}, r"hand_window=0\.05 with hand_view=64 .*at least 0\.0667"),
        ({"hand_view": 64, "hand_window": 1e-6}, r"hand_window=1e-06 with hand_view=64 .*at least 0\.0667"),
        ({"hand_view": 64, "hand_window": 1e-320}, r"hand_window=1e-320 with hand_view=64 .*at least 0\.0667"),
        ({"hand_view": 1000, "hand_window": 1.0}, "hand_view=1000; expected at most 960"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaWorldEnv("MT10", **options)


def test_the_least_window_is_one() -> None:
    assert HandView(64, 0.0667).resolution == 960
    assert HandView(960, 1.0).resolution == 960


# --- through the chain ------------------------------------------------------------------------------------------------

SMALL = HandView(32, 2 / 3)  # of full pictures of 48 pixels


def episode(shape: int, hand: bool, length: int = 6) -> Episode:
    generator = np.random.default_rng(length)

    def pictures(side: int) -> np.ndarray:
        return generator.integers(0, 256, (length, side, side, 3), dtype=np.uint8)

    states = np.tile(np.float32([0.05, 0.6, 0.2, 1.0]), (length, 1))
    states[:, 0] += np.linspace(0, 0.2, length)
    return Episode(
        trial=Trial("reach-v3", 0, 3),
        images=pictures(shape),
        states=states.astype(np.float32),
        environment_states=np.zeros((length, 39), np.float32),
        actions=generator.uniform(-1, 1, (length, 4)).astype(np.float32),
        rewards=np.zeros(length, np.float32),
        successes=np.arange(length) == length - 1,
        hand_images=pictures(SMALL.size) if hand else None,
    )


def write(folder: Path, one: Episode, storage: ImageStorage = "png", **camera: Any) -> Path:
    height, width = np.shape(one.images)[1:3]
    hand = None if one.hand_images is None else (SMALL.size, SMALL.size, 3)
    if hand is not None:
        camera = {"hand_view": asdict(SMALL), **camera}
    shape = (height, width, 3)
    with DemonstrationWriter(
        folder, image_shape=shape, hand_shape=hand, image_storage=storage, camera=camera
    ) as writer:
        writer.add_episode(one)
        writer.add_episode(one)
    return folder


def test_a_dataset_holds_it_as_a_feature(tmp_path: Path) -> None:
    one = episode(40, hand=True)
    data = Demonstrations.load(write(tmp_path / "png", one))
    assert data.hand_images is not None and data.camera["hand_view"] == asdict(SMALL)
    np.testing.assert_array_equal(data.hand_images, np.concatenate([one.hand_images, one.hand_images]))
    video = Demonstrations.load(write(tmp_path / "mp4", one, "mp4"))
    assert video.hand_images is not None and video.hand_images.shape == data.hand_images.shape
    assert Demonstrations.load(tmp_path / "png", hand_view=SMALL).hand_images is not None
    with pytest.raises(ValueError, match=r"was recorded with hand_view=.*32, .*but hand_view=48, "):
        Demonstrations.load(tmp_path / "png", hand_view=HandView(48))


def test_notes_of_the_hand_view_are_read(tmp_path: Path) -> None:
    """One that leaves out what is the default means the same; none, or one of another picture, is told."""
    one = episode(32, hand=True)
    view = {"camera": "corner2", "crop": None}
    short = write(tmp_path / "short", one, hand_view={"size": 32, "window": 2 / 3}, **view)
    assert Demonstrations.load(short).camera["hand_view"] == asdict(SMALL)
    assert Demonstrations.load(short, hand_view=HandView(32, 0.6667)).hand_images is not None
    silent = write(tmp_path / "silent", one, hand_view=None, **view)
    with pytest.raises(ValueError, match=r"not note which window it shows; give hand_view=HandView\(size=32"):
        Demonstrations.load(silent)
    data = Demonstrations.load(silent, hand_view=SMALL)
    assert data.camera["hand_view"] == asdict(SMALL) and data.hand_images is not None
    for name, note, message in (
        ("word", "64", "noted as '64'"),
        ("sizeless", {"window": 0.5}, r"noted as .*expected size"),
        ("unknown", {"size": 32, "widow": 0.5}, "noted as .*widow"),
        ("border", {"size": 32, "border": "blak"}, f"{tmp_path}.*hand_border 'blak'"),
        ("larger", {"size": 64}, "32x32 pixels, which is not hand_view=64"),
    ):
        with pytest.raises(ValueError, match=message):
            Demonstrations.load(write(tmp_path / name, one, hand_view=note, **view))
    noted = replace(data, camera={**view, "hand_view": {"size": 32, "window": 2 / 3}})
    config = SFTConfig(steps=1, batch_size=2, model_kwargs=TINY, action_horizon=2, validation_fraction=0.0)
    assert sft(noted, config, progress=False).model.hand_view == SMALL
    sft(noted, replace(config, model_kwargs={**TINY, "hand_view": asdict(SMALL)}), progress=False)
    with pytest.raises(ValueError, match="does not note which window they show"):
        sft(replace(data, camera=view), config, progress=False)


def test_it_is_cut_from_full_views_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = episode(48, hand=False)
    opened: list[str] = []
    real_open, real_decode = av.open, lerobot_reader.decode_picture
    monkeypatch.setattr(av, "open", lambda *args, **kw: opened.append("video") or real_open(*args, **kw))
    monkeypatch.setattr(lerobot_reader, "decode_picture", lambda *args: opened.append("picture") or real_decode(*args))
    folder = write(tmp_path / "full", one)
    assert Demonstrations.load(folder).hand_images is None
    opened.clear()
    data = Demonstrations.load(folder, image_size=32, hand_view=SMALL)
    assert opened == ["picture"] * 12  # each once
    expected = SMALL.cut(np.concatenate([one.images, one.images]), "corner2", np.concatenate([one.states] * 2))
    np.testing.assert_array_equal(data.hand_images, expected)
    assert data.images.shape == (12, 32, 32, 3) and data.camera["hand_view"] == asdict(SMALL)
    film = write(tmp_path / "film", one, "mp4")
    stored = Demonstrations.load(film).images
    opened.clear()
    shown = Demonstrations.load(film, image_size=32, hand_view=SMALL)
    assert opened == ["video"]
    np.testing.assert_array_equal(shown.hand_images, SMALL.cut(stored, "corner2", shown.states))
    np.testing.assert_array_equal(shown.images, Demonstrations.load(film, image_size=32).images)
    with pytest.raises(ValueError, match="of crop=workspace, from which no hand view is cut; leave hand_view out"):
        Demonstrations.load(write(tmp_path / "crop", one, crop="workspace"), hand_view=SMALL)


def test_sft_cuts_it_from_full_views(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = write(tmp_path / "full", episode(48, hand=False), camera="corner2", crop=None)
    tiny = ["sft.model_kwargs={width: 64, depth: 1, channels: [8, 8, 16]}", "sft.steps=1", "sft.batch_size=2"]
    command = ["sft", f"data={full}", f"output={tmp_path / 'sft'}", "hand_view=32", "image_size=32", *tiny]
    assert main(command) == 0
    assert load_policy(tmp_path / "sft").model.hand_view == HandView(32)
    assert main(command) == 0 and "is complete" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "hand_view=0"]) == 2 and "hand_view=0" in capsys.readouterr().err


def test_train_cuts_it_from_full_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For rehearsal, the one that the checkpoint's model reads."""
    full = write(tmp_path / "full", episode(48, hand=False), camera="corner2", crop=None)
    save_checkpoint(tmp_path / "start", make_model("compact", {**TINY, "image_size": 32, "hand_view": asdict(SMALL)}))
    given: dict[str, Any] = {}
    monkeypatch.setattr("sb3_vla.recipes.launch.train", lambda *_, **options: given.update(options))
    options = ["ppo", f"checkpoint={tmp_path / 'start'}", f"data.path={full}", f"run={tmp_path / 'run'}", "trials=0"]
    options += ["algorithm.rehearsal_coef=1"]
    main(["train", *options])
    assert given["demonstrations"].camera["hand_view"] == asdict(SMALL)
    assert given["demonstrations"].hand_images.shape == (12, 32, 32, 3)


def test_imitation_reads_it_and_ppo_goes_on(tmp_path: Path) -> None:
    data = Demonstrations.load(write(tmp_path / "data", episode(32, hand=True), camera="corner2", crop=None))
    config = SFTConfig(steps=1, batch_size=4, model_kwargs=TINY, action_horizon=2)
    sft(data, config, output=tmp_path / "sft", progress=False)
    policy = load_policy(tmp_path / "sft")
    assert policy.model.hand_view == SMALL
    stir(policy.model)
    options = {"image_size": 32, "hand_view": 32, "hand_window": 2 / 3, "action_chunk": 2, "horizon": 4}
    assert seen_by(policy).items() >= {"hand_view": 32, "hand_window": 2 / 3, "hand_border": "shift"}.items()
    env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", **options)
    observation, _ = env.reset(seed=0)
    action, _ = policy.predict(observation, deterministic=True)
    other, _ = policy.predict({**observation, "hand_image": 255 - observation["hand_image"]}, deterministic=True)
    turned = {**observation, "hand_image": observation["hand_image"].transpose(2, 0, 1)}
    assert not np.array_equal(action, other)
    np.testing.assert_array_equal(policy.predict(turned, deterministic=True)[0], action)
    without = {key: value for key, value in observation.items() if key != "hand_image"}
    with pytest.raises(ValueError, match="The observation has no hand_image"):
        policy.predict(without)
    kwargs = {"checkpoint": str(tmp_path / "sft"), "cache_perception": False}
    rehearsal = DemonstrationBatches(data, None, 2, 1, 0)
    algorithm = PPO("VLAPolicy", env, n_steps=4, batch_size=4, policy_kwargs=kwargs, rehearsal=rehearsal, device="cpu")
    algorithm.learn(4)
    assert algorithm.rollout_buffer.observations["hand_image"].shape[2:] == (3, 32, 32)  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"the environment has none\. Make it with hand_view=32, hand_window=0\.666667"
    ):
        PPO("VLAPolicy", gym.make(env.spec, hand_view=None), policy_kwargs=kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"The model reads the hand view .*; the demonstrations have none"):
        sft(replace(data, hand_images=None, camera={}), SFTConfig(steps=1, checkpoint=str(tmp_path / "sft")))


def test_a_new_policy_reads_the_hand_view_that_the_environment_draws() -> None:
    env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", image_size=32, hand_view=48)
    algorithm = PPO("VLAPolicy", env, n_steps=2, batch_size=2, policy_kwargs={"model_kwargs": TINY}, device="cpu")
    assert algorithm.policy.model.hand_view == HandView(48)
    algorithm.learn(2)


BLACK = HandView(48, 0.5, "black")
DRAWS_BLACK = {"hand_view": 48, "hand_window": 0.5, "hand_border": "black"}


def reach(**options: Any) -> gym.Env:
    return gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", image_size=32, horizon=4, **options)


@pytest.mark.parametrize("algorithm_class", [PPO, GRPO])
def test_a_new_policy_reads_the_window_that_the_environment_draws(algorithm_class: type[PPO], tmp_path: Path) -> None:
    def drawing(**changed: Any) -> VecEnv:
        return make_vec_env(lambda: reach(privileged_state=True, **{**DRAWS_BLACK, **changed}), 2)

    env = drawing()
    assert env.get_attr("hand_view") == [BLACK, BLACK]
    sizes = {"group_size": 2, "n_groups": 1} if algorithm_class is GRPO else {"n_steps": 2}
    options: dict[str, Any] = {"batch_size": 2, "device": "cpu", **sizes}
    algorithm = algorithm_class("VLAPolicy", env, policy_kwargs={"model_kwargs": TINY}, **options)
    assert algorithm.policy.model.hand_view == BLACK
    assert seen_by(algorithm).items() >= DRAWS_BLACK.items()
    algorithm.save(tmp_path / "saved.zip")
    with pytest.raises(ValueError, match=r"hand_border='black' draws, .* made with .*hand_border='shift'"):
        algorithm_class.load(tmp_path / "saved.zip", env=drawing(hand_border="shift"), device="cpu")
    with pytest.raises(ValueError, match=r"hand_window=0\.5, .* made with .*hand_window=0\.4"):
        algorithm.set_env(drawing(hand_window=0.4))
    algorithm.set_env(drawing(hand_window=0.501))  # the same pixels
    plain = algorithm_class("VLAPolicy", env, policy_kwargs={"model_kwargs": {**TINY, "hand_view": None}}, **options)
    assert plain.policy.model.hand_view is None
    asked = {"model_kwargs": {**TINY, "hand_view": {"size": 48}}}
    with pytest.raises(ValueError, match=r"hand_window=0\.222222, .*'shift'.* made with .*hand_window=0\.5"):
        algorithm_class("VLAPolicy", env, policy_kwargs=asked, **options)


SHORT: dict[str, Any] = {
    "tasks": ["reach-v3"],
    "trials_per_task": 1,
    "protocol": Protocol("two steps", horizon=2, action_chunk=1, settle_steps=0),
    "num_workers": 1,
    "progress": False,
}


def test_a_model_without_a_hand_view_is_asked_for_none() -> None:
    """In an environment that draws one: it acts and is evaluated without."""
    env = reach(**DRAWS_BLACK)
    kwargs = {"model_kwargs": {**TINY, "hand_view": None}}
    algorithm = PPO("VLAPolicy", env, n_steps=2, batch_size=2, policy_kwargs=kwargs, device="cpu").learn(2)
    observation, _ = env.reset(seed=0)
    expected, _ = algorithm.predict(observation, deterministic=True)
    del observation["hand_image"]
    for policy in (algorithm, algorithm.policy):
        np.testing.assert_array_equal(policy.predict(observation, deterministic=True)[0], expected)
    assert len(evaluate(algorithm, **SHORT).trials) == 1
    assert len(evaluate(algorithm, env_kwargs=DRAWS_BLACK, **SHORT).trials) == 1


def test_batches_are_of_what_the_model_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Demonstrations.load(write(tmp_path / "data", episode(32, hand=True), camera="corner2", crop=None))
    given: list[bool] = []
    for name in ("imitation_loss", "encode"):
        real = getattr(CompactVLA, name)

        def noted(self: Any, observation: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            given.append("hand_image" in observation)
            return real(self, observation, *args, **kwargs)

        monkeypatch.setattr(CompactVLA, name, noted)
    for hand in (None, asdict(SMALL)):
        options = {**TINY, "hand_view": hand}
        config = SFTConfig(steps=1, batch_size=4, model_kwargs=options, action_horizon=2, validation_fraction=0.5)
        sft(data, config, progress=False)
        env = reach(hand_view=32, hand_window=2 / 3, action_chunk=2)
        rehearsal = DemonstrationBatches(data, None, 2, 1, 0)
        kwargs = {"model_kwargs": options}
        PPO("VLAPolicy", env, n_steps=2, batch_size=2, policy_kwargs=kwargs, rehearsal=rehearsal, device="cpu").learn(2)
        assert given and set(given) == {hand is not None}
        given.clear()


def test_evaluation_warns_of_another_window(tmp_path: Path) -> None:
    model = make_model("compact", {**TINY, "image_size": 32, "action_horizon": 1, "hand_view": {"size": 48}})
    save_checkpoint(tmp_path / "start", model, notes={"view": {"camera": "corner2", "crop": None}})
    policy = load_policy(tmp_path / "start")
    for changed, named in (({"hand_window": 0.5}, r"hand_window=0\.5"), ({"hand_border": "black"}, "'black'")):
        with pytest.warns(UserWarning, match=f"hand_window=0.222222, hand_border='shift' draws, but is shown.*{named}"):
            evaluate(policy, env_kwargs=changed, **SHORT)
    evaluate(policy, env_kwargs={"hand_window": 0.2222}, **SHORT)  # the same pixels


def test_a_raw_picture_of_metaworld_is_enough_to_act(tmp_path: Path) -> None:
    """The policy's window and its hand view are cut from the 480 x 480 pixels of the full view."""
    torch.manual_seed(0)
    model = make_model("compact", {**TINY, "image_size": 96, "hand_view": {"size": 64}})
    stir(model)
    save_checkpoint(tmp_path / "start", model, notes={"view": {"camera": "corner2", "crop": "workspace"}})
    policy = load_policy(tmp_path / "start")
    env = MetaWorldEnv("MT10", image_size=96, crop="workspace", hand_view=64)
    raw_env = MetaWorldEnv("MT10")
    drawn, raw = (each.reset(seed=3, options={"task": "push-v3"})[0] for each in (env, raw_env))
    assert raw["image"].shape == (480, 480, 3) and "hand_image" not in raw
    seen = {}
    real = type(policy).prepare

    def noted(self: Any, observation: Any) -> Any:
        seen.update(observation)
        return real(self, observation)

    policy.prepare = noted.__get__(policy)
    for observation in (raw, {key: np.stack([value, value]) for key, value in raw.items()}):
        actions, _ = policy.predict(observation, deterministic=True)
        for name in ("image", "hand_image"):
            shown = seen[name].numpy().astype(float)[0]
            shown = shown if shown.shape[-1] == 3 else np.moveaxis(shown, 0, -1)
            # A pixel is the mean of what it covers, where small pictures are drawn from a few samples of it.
            assert np.abs(shown - drawn[name]).mean() < 2.5, name
            assert abs((shown - drawn[name]).mean()) < 1.5, name
    expected, _ = policy.predict(drawn, deterministic=True)
    np.testing.assert_allclose(actions[0], expected, atol=0.02)
    assert np.abs(expected).max() > 0.1
    turned = {**raw, "image": np.moveaxis(raw["image"], -1, 0)}
    np.testing.assert_allclose(policy.predict(turned, deterministic=True)[0], actions[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"state has shape \(39,\); expected \(4,\), beside an image"):
        policy.predict({**raw, "state": np.zeros(39, np.float32)})
    with pytest.raises(ValueError, match="batch of none"):
        policy.predict({key: value[None][:0] for key, value in raw.items()})


def test_a_picture_of_480_pixels_that_a_policy_reads_itself_is_no_full_view(tmp_path: Path) -> None:
    model = make_model("compact", {**TINY, "image_size": 96, "hand_view": {"size": 64}})
    view = {"camera": "corner2", "crop": "workspace", "render_size": 480}
    save_checkpoint(tmp_path / "start", model, notes={"view": view})
    observation, _ = MetaWorldEnv("MT10", crop="workspace").reset(seed=0)
    with pytest.raises(ValueError, match="has no hand_image"):
        load_policy(tmp_path / "start").predict(observation)


@pytest.mark.parametrize("size", [(96, 128), (32, 16)])
def test_a_window_of_other_proportions_is_not_cut(size: tuple[int, int]) -> None:
    pictures = np.zeros((1, 480, 480, 3), np.uint8)
    assert cut_window(pictures, (0.1, 0.2, 0.3, 0.6), (48, 96)).shape == (1, 48, 96, 3)
    with pytest.raises(ValueError, match=f"is not cut to {size[0]}x{size[1]} pixels"):
        cut_window(pictures, "workspace", size)


def test_the_policy_of_the_package_opens_drawers_and_doors() -> None:
    """README's first lines: from the environment's own pictures, of tasks that it solves in 49 of 50 trials."""
    policy = load_policy("compact-mt50")
    env = gym.make("mw_envs:MetaWorldMT50-v0", action_chunk=5)
    won = []
    for task in ("drawer-open-v3", "door-open-v3", "push-v3"):
        observation, _ = env.reset(options={"task": task, "goal": 3, "seed": 11})
        ended = False
        while not ended:
            action, _ = policy.predict(observation, deterministic=True)
            observation, _, terminated, truncated, info = env.step(action)
            ended = terminated or truncated
        won.append(info["is_success"])
    assert sum(won) >= 2  # rounding differs between processors
