"""The hand view: the same pixels as in the full picture, from every camera, drawn or cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from mw_envs.env import CAMERAS, MetaWorldEnv
from mw_envs.hand_view import CARRIED, STANDING, HandView
from mw_envs.rendering import View, get_renderer, renderer_available, resolve_crop
from mw_envs.scene import acquire_simulator, release_simulator
from mw_envs.tasks import Trial


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
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaWorldEnv("MT10", **options)
