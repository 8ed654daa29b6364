"""Loggers: what they are given arrives, under the reference's names too; without a network, with the real trackers."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import start
from trainings import grpo, ppo

from sb3_vla.common.config import ConfigError
from sb3_vla.rollouts.metrics import ratio_metrics
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.loggers import LoggerOptions

SMALL = dict(num_envs=2, num_workers=1, horizon=10, n_epochs=2, batch_size=4)
#: of RLinf's embodied runner with its PPO recipes
REFERENCE_NAMES = {
    *(
        f"train/actor/{name}"
        for name in (
            "policy_loss",
            "policy_loss_abs",
            "ratio",
            "ratio_abs",
            "clipped_ratio",
            "dual_cliped_ratio",
            "approx_kl",
            "clip_fraction",
            "entropy_loss",
            "total_loss",
            "grad_norm",
            "lr",
        )
    ),
    *(f"train/critic/{name}" for name in ("value_loss", "value_clip_ratio", "explained_variance", "lr")),
    "rollout/rewards",
    *(f"rollout/{of}_{which}" for of in ("advantages", "returns") for which in ("mean", "max", "min")),
    *(f"env/{name}" for name in ("success_once", "return", "episode_len", "reward", "num_trajectories")),
    *(
        f"time/{name}"
        for name in ("step", "sync_weights", "generate_rollouts", "cal_adv_and_returns", "actor_training")
    ),
}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_references_names_in_tensorboard(tmp_path: Path) -> None:
    config = ppo(iterations=2, n_steps=4, critic_warmup=0, clip_range_vf=0.2, env={"reward": "dense"}, **SMALL)
    start(tmp_path, config, suite="MT10", tasks=["reach-v3"])
    found = scalars(tmp_path / "run" / "tensorboard" / "rl")
    assert set(found) >= REFERENCE_NAMES
    value = {name: found[name][-1][1] for name in REFERENCE_NAMES}
    assert value["env/episode_len"] == 10 and value["env/success_once"] == 0
    # Chunks of five actions, so episodes of two decisions: 2 environments x 4 decisions are four.
    assert value["env/num_trajectories"] == 4
    assert value["env/reward"] == pytest.approx(value["env/return"] / 10)
    # What the last rollout's row says of episodes is from the update before: four whole ones of two decisions each.
    assert value["env/return"] == pytest.approx(2 * found["rollout/rewards"][0][1], rel=1e-6)
    assert value["env/return"] > 0
    for of in ("advantages", "returns"):
        assert value[f"rollout/{of}_min"] < value[f"rollout/{of}_mean"] < value[f"rollout/{of}_max"]
    first = {name: found[f"time/{name}"][0][1] for name in ("generate_rollouts", "cal_adv_and_returns")}
    assert value["time/step"] == pytest.approx(sum(first.values()) + value["time/actor_training"], rel=1e-5)
    assert value["train/actor/policy_loss_abs"] >= abs(value["train/actor/policy_loss"])
    assert value["train/critic/lr"] > value["train/actor/lr"] > 0


def test_ratios() -> None:
    ratio = torch.tensor([[0.5, 1.0], [4.0, 9.0]])
    bounded = torch.tensor([[False, False], [True, True]])
    counted = torch.tensor([[1.0, 1.0], [1.0, 0.0]])  # 0.5, 1 and 4
    assert ratio_metrics(ratio, ratio.clamp(0.8, 1.2), bounded, counted) == {
        "clip_fraction": pytest.approx(2 / 3),
        "ratio": pytest.approx(5.5 / 3),
        "ratio_abs": pytest.approx(3.5 / 3),
        "clipped_ratio": pytest.approx(3.0 / 3),
        "dual_clipped_ratio": pytest.approx(4.0 / 3),
        "ratio_max": 4.0,
    }


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that told all loggers."""
    pytest.importorskip("wandb")
    pytest.importorskip("swanlab")
    folder = tmp_path_factory.mktemp("everywhere")
    options = LoggerOptions(
        ["tensorboard", "csv", "json", "wandb", "swanlab"], "project", experiment="name", mode="offline"
    )
    config = grpo(total_decisions=16, group_size=2, n_groups=1, max_groups=1, env={"reward": "dense"}, **SMALL)
    start(folder, config, suite="MT10", tasks=["drawer-close-v3"], loggers=options)
    return folder / "run"


def logged(run: Path) -> list[dict[str, Any]]:
    return [row for row in RunDirectory(run).metrics() if row["stage"] == "rl"]


def test_files(everywhere: Path) -> None:
    rows = logged(everywhere)
    assert len(rows) >= 2
    with open(everywhere / "metrics_rl.csv") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (everywhere / "metrics_rl.json").read_text().splitlines()]
    assert [float(row["rollout/rewards"]) for row in table] == [row["rollout/rewards"] for row in rows]
    assert [line["rollout/rewards"] for line in lines] == [row["rollout/rewards"] for row in rows]
    board = scalars(everywhere / "tensorboard" / "rl")["rollout/rewards"]
    assert [step for step, _ in board] == [row["time/total_timesteps"] for row in rows]


def test_wandb(everywhere: Path) -> None:
    (file,) = (everywhere / "wandb").glob("offline-run-*/run-*.wandb")
    stored, rows = file.read_bytes(), logged(everywhere)
    for name in (b"rollout/rewards", b"env/success_once", b"GRPO", b"project"):
        assert name in stored
    for row in rows:
        assert json.dumps(row["rollout/rewards"]).encode() in stored
    assert json.loads((everywhere / "wandb_id.json").read_text()) in file.name


def test_swanlab(everywhere: Path) -> None:
    stored = b"".join(file.read_bytes() for file in (everywhere / "swanlab").rglob("*") if file.is_file())
    for name in (b"rollout/rewards", b"env/success_once", b"GRPO"):
        assert name in stored


def test_an_unknown_logger() -> None:
    with pytest.raises(ConfigError, match="Unknown logger 'tensorbord'; did you mean 'tensorboard'"):
        LoggerOptions(["tensorbord"])


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_tracker_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"needs its package: pip install 'sb3-vla\[{name}\]'"):
        LoggerOptions([name])
