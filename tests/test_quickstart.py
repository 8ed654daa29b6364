"""The whole way at a small size: collect, imitate, measure, practice, measure again; interrupted and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sb3_vla.evaluation.evaluation import EvaluationResult

SMALL = [
    "tasks=[drawer-close-v3, handle-press-v3]",
    "suite=metaworld_50",
    "data.episodes_per_task=2",
    "data.image_size=64",
    "sft.steps=30",
    "sft.batch_size=16",
    "sft.validation_fraction=0.0",
    "actor.model.model_kwargs={width: 64, depth: 1, channels: [8, 8, 16]}",
    "trials=2",
    "num_envs=2",
    "algorithm.rollout_epoch=1",
    "env.train.max_episode_steps=40",  # eight decisions
    "actor.global_batch_size=8",
    "runner.save_interval=1",
    "algorithm.critic_warmup=0",
]
pytestmark = pytest.mark.timeout(300)


def command(run: Path, *settings: str) -> list[str]:
    return [sys.executable, "-m", "sb3_vla", "train", "quickstart", f"run={run}", *SMALL, *settings]


def quickstart(run: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(run, *settings),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_from_nothing_to_a_table_and_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = quickstart(run, "iterations=2")
    assert first.returncode == 0, first.stdout + first.stderr
    for name in (
        "demonstrations/meta/info.json",
        "sft/model.safetensors",
        "ppo/model.safetensors",
        "evaluation_before.json",
        "evaluation_after.json",
        "comparison.md",
        "learning_curve.png",
        "before_after.png",
        "report.html",
    ):
        assert (run / name).stat().st_size > 0, name
    assert len(list((run / "videos").rglob("*.mp4"))) == 4
    assert list((run / "tensorboard").rglob("events*"))
    before, after = (EvaluationResult.from_json(run / f"evaluation_{name}.json") for name in ("before", "after"))
    assert list(before.successes) == list(after.successes)
    assert len(before.successes) == 4
    imitated, practiced = (load_file(run / name / "model.safetensors") for name in ("sft", "ppo"))
    assert any(not torch.equal(imitated[name], practiced[name]) for name in imitated)  # the actor, not the critic alone
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/rehearsal_loss"] > 0 for row in rows[1:])
    assert [row["time/total_timesteps"] for row in rows] == [16, 32]

    weights = (run / "ppo/model.safetensors").read_bytes()
    started = time.monotonic()
    again = quickstart(run, "iterations=2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert time.monotonic() - started < 60
    assert (run / "ppo/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupt_leaves_no_process_and_the_next_start_goes_on(
    sent: signal.Signals, status: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(run, "iterations=400"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while len(list((run / "checkpoints" / "ppo").glob("step-*"))) < 2:
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline, "PPO did not begin"
            time.sleep(0.2)
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # what Ctrl-C does: the whole group gets it
        else:
            process.send_signal(sent)
        output = process.communicate(timeout=60)[0].decode()
    finally:
        process.kill()
    assert process.returncode == status, output
    assert "goes on" in output and "Traceback" not in output
    for _ in range(100):  # the server that forks workers notices a moment later that it is not needed any more
        if not group_is_alive(process.pid):
            break
        time.sleep(0.1)
    assert not group_is_alive(process.pid)

    if sent == signal.SIGTERM:
        return  # what is left is the same
    done = len(list((run / "checkpoints" / "ppo").glob("step-*")))
    resumed = quickstart(run, f"iterations={done + 1}")
    # Fewer iterations are other settings, so PPO starts afresh; what came before it is kept.
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (run / "checkpoints" / "ppo.replaced-1").is_dir()


def test_bad_settings_are_told_in_one_line(tmp_path: Path) -> None:
    result = quickstart(tmp_path / "run", "sft.setps=3")
    assert result.returncode == 2
    assert "sft.steps" in result.stderr and "Traceback" not in result.stdout + result.stderr
