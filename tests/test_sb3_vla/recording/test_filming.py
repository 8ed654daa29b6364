"""Films of a training's episodes: whole, playable, bounded, and without an effect on what is simulated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import numpy as np
import pytest

from mw_envs import Trial
from sb3_vla import HoldAtEnd
from sb3_vla.recording.episodes import Filmed, FilmEpisodes, FilmOptions, TrainingFilms, captions
from sb3_vla.recording.videos import annotate
from sb3_vla.runs.directory import RunError

CHUNK, HORIZON = 5, 12


def make(**options: Any) -> gym.Env[Any, Any]:
    return gym.make(
        "mw_envs:MetaWorldMT1-v0",
        **{
            "task": "reach-v3",
            "image_size": 16,
            "action_chunk": CHUNK,
            "horizon": HORIZON,
            "reward": "dense",
            **options,
        },
    )


def play(env: gym.Env[Any, Any], films: list[str | None]) -> list[Any]:
    """Episodes of the same random actions; before each, what ``film`` is called with. All that they show."""
    generator, shown = np.random.default_rng(3), []
    for number, prefix in enumerate(films):
        if prefix is not None:
            env.get_wrapper_attr("film")(prefix)
        observation, info = env.reset(seed=7 if number == 0 else None, options=None)
        done, reward = False, 0.0
        while True:
            assert not {"frames", "frame_rewards"} & info.keys()
            shown.append((observation, reward, done, info))
            if done:
                break
            action = generator.uniform(-1, 1, (CHUNK, 4)).astype(np.float32)
            observation, reward, terminated, truncated, info = env.step(action)
            done = bool(terminated or truncated)
    env.close()
    return shown


def test_a_filmed_episode_is_whole_and_what_it_would_have_been(tmp_path: Path) -> None:
    films = FilmOptions(tmp_path)
    seen = play(Filmed(make(), films), [None, "iteration-000001_", None])
    np.testing.assert_equal(seen, play(make(), [None, None, None]))
    (path,) = tmp_path.iterdir()
    trial = seen[4][3]  # an episode shows its start and three decisions
    name = f"reach-v3_seed{trial['trial_seed']}_goal{trial['goal']:02d}_failure.mp4"
    assert path.name == f"iteration-000001_{name}"
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert len(frames) == 1 + HORIZON + 30
    by_hand = make(render_mode="rgb_array", action_chunk=1)
    by_hand.reset(options={"task": "reach-v3", "seed": trial["trial_seed"], "goal": trial["goal"]})
    generator = np.random.default_rng(3)
    actions = [generator.uniform(-1, 1, (CHUNK, 4)).astype(np.float32) for _ in range(6)][3:]
    drawn = [by_hand.render(), *(by_hand.step(a) and by_hand.render() for a in np.concatenate(actions)[:HORIZON])]
    by_hand.close()
    for frame, picture in zip(frames, drawn, strict=False):
        assert np.abs(frame[:480].astype(int) - picture).mean() < 3


def test_the_text_says_what_happened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[list[str]] = []

    def note(*arguments: Any) -> list[str]:
        said.append(captions(*arguments))
        return said[-1]

    drawn: list[tuple[list[str], bool | None]] = []

    def draw(frame: Any, lines: list[str], success: bool | None) -> Any:
        drawn.append((lines, success))
        return annotate(frame, lines, success)

    monkeypatch.setattr("sb3_vla.recording.episodes.captions", note)
    monkeypatch.setattr("sb3_vla.recording.episodes.annotate", draw)
    play(Filmed(make(), FilmOptions(tmp_path / "with")), ["x_"])
    assert len(said) == 1 + HORIZON
    single = make(action_chunk=1)
    (path,) = (tmp_path / "with").iterdir()
    goal = int(path.stem.split("goal")[1].split("_")[0])
    single.reset(options={"task": "reach-v3", "seed": 7, "goal": goal})
    generator = np.random.default_rng(3)
    actions = np.concatenate([generator.uniform(-1, 1, (CHUNK, 4)).astype(np.float32) for _ in range(3)])
    rewards = [0.0, *(single.step(action)[1] for action in actions[:HORIZON])]
    single.close()
    assert said == [
        captions("Reach a goal position", Trial("reach-v3", 7, goal), step, HORIZON, float(reward), False)
        for step, reward in enumerate(rewards)
    ]
    assert said[3][2] == f"step 3 of {HORIZON} · reward {rewards[3]:.2f}"
    assert drawn[: 1 + HORIZON] == [(lines, None) for lines in said]
    assert drawn[1 + HORIZON :] == [([*said[-1][:2], f"{said[-1][2]} · failure"], False)], "what stays at the end"
    play(Filmed(make(), FilmOptions(tmp_path / "without", info=False)), ["x_"])
    assert len(said) == 1 + HORIZON
    (bare,) = (tmp_path / "without").iterdir()
    with av.open(str(bare)) as video:
        assert next(video.decode(video=0)).height == 480


def test_of_groups_episodes_and_not_what_stands_still_is_filmed(tmp_path: Path) -> None:
    env = HoldAtEnd(Filmed(make(), FilmOptions(tmp_path)))
    env.reset(seed=1)
    env.get_wrapper_attr("film")("x_")
    env.reset(options={"snapshot": env.get_wrapper_attr("snapshot")()})  # goes on in the middle of an episode
    assert list(tmp_path.iterdir()) == []
    env.reset(options={"goal": 3})
    still = np.zeros((CHUNK, 4), np.float32)
    while not any(env.step(still)[2:4]):
        pass
    env.reset()
    env.step(still)
    (film,) = tmp_path.iterdir()
    assert "goal03_failure" in film.name
    env.get_wrapper_attr("film")("y_")
    env.reset(options={"goal": 4})
    env.close()  # in the middle
    assert list(tmp_path.iterdir()) == [film]


def test_the_oldest_films_make_room(tmp_path: Path) -> None:
    for number in range(3):
        old = tmp_path / f"old{number}_failure.mp4"
        old.write_bytes(bytes(400_000))
        os.utime(old, ns=(number, number))
    (tmp_path / "mine.mp4").write_bytes(bytes(2_000_000))  # no film of ours
    play(Filmed(make(), FilmOptions(tmp_path, max_mb=1)), ["x_"])
    left = sorted(path.name.split("_")[0] for path in tmp_path.iterdir())
    assert (
        left == ["mine.mp4", "old1", "old2", "x"]
        and sum(path.stat().st_size for path in tmp_path.glob("*_failure.mp4")) <= 1_000_000
    )
    play(Filmed(make(), FilmOptions(tmp_path, max_mb=1e-6)), ["y_"])
    assert sorted(path.name.split("_")[0] for path in tmp_path.iterdir()) == ["mine.mp4", "y"]


def test_every_few_iterations_the_first_environment_is_asked(tmp_path: Path) -> None:
    asked: list[Any] = []

    class Env:
        def env_method(self, *call: Any, **where: Any) -> None:
            asked.append((call, where))

    class Algorithm:
        updates, env = 0, Env()

    callback = FilmEpisodes(TrainingFilms(tmp_path, every=3))
    callback.model = Algorithm()
    for Algorithm.updates in range(7):
        callback.on_rollout_start()
    assert asked == [(("film", f"iteration-00000{n}_"), {"indices": [0]}) for n in (1, 4, 7)]


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write films to .*file/films: Not a directory"):
        FilmOptions(tmp_path / "file" / "films").prepare()
    with pytest.raises(ValueError, match=r"max_mb=0 of films; expected more than 0"):
        FilmOptions(tmp_path, max_mb=0)
    with pytest.raises(ValueError, match=r"every=0 iterations between films"):
        TrainingFilms(tmp_path, every=0)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / ".reach.123.tmp.mp4").touch()
    FilmOptions(tmp_path / "films").prepare()
    assert list((tmp_path / "films").iterdir()) == []
