"""The commands under torchrun: one run directory, one result, and an end for all when one rank dies."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.numpy import load_file
from toy import tiny_model
from toy_train import make

from sb3_vla.checkpoints import save_checkpoint
from sb3_vla.cli.main import main
from sb3_vla.distributed import local_ranks
from sb3_vla.runs import training
from sb3_vla.runs.directory import RunDirectory

SCRIPT = Path(__file__).parents[2] / "toy_train.py"
SETTINGS = (
    "trials=0",
    "iterations=6",
    "num_envs=4",
    "algorithm.rollout_epoch=1",
    "env.train.max_episode_steps=30",  # six decisions
    "actor.global_batch_size=12",
    "algorithm.update_epoch=2",
    "algorithm.critic_warmup=0",
    "algorithm.actor_warmup=0",
    "runner.save_interval=2",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("start"))


def save_model(folder: Path) -> Path:
    save_checkpoint(folder / "start", tiny_model(action_horizon=5))
    return folder / "start"


def launch(ranks: int, run: Path, start: Path, *settings: str, **variables: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [
            sys.executable,
            *launcher,
            str(SCRIPT),
            "train",
            "ppo",
            f"checkpoint={start}",
            f"run={run}",
            *SETTINGS,
            *settings,
        ],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "ppo" / "model.safetensors")


def test_two_ranks_write_the_run_of_one(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = launch(2, tmp_path / "2", start)
    monkeypatch.setattr(training, "SharedMemoryVecEnv", make)  # as toy_train.py does
    monkeypatch.setenv(local_ranks.VARIABLE, "1")
    assert main(["train", "ppo", f"checkpoint={start}", f"run={tmp_path / '1'}", *SETTINGS]) == 0
    code, output = finish(process)
    assert code == 0, output
    for told in (capsys.readouterr().out, output):
        assert told.count("checkpoint ") == 1  # one rank speaks
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, expected in one.items():  # Adam's steps are of full length where gradients are next to nothing
        np.testing.assert_allclose(two[name], expected, atol=2e-5, err_msg=name)
    rows = [RunDirectory(tmp_path / name).metrics() for name in ("1", "2")]
    assert len(rows[0]) == len(rows[1]) == 6
    for expected_row, row in zip(*rows, strict=True):
        for key in ("time/total_timesteps", "time/env_steps", "env/success_once", "env/episode_len"):
            assert row.get(key) == expected_row.get(key), key
    before = load_file(start / "model.safetensors")
    moved = [np.abs(one[name] - value).max() for name, value in before.items() if name.startswith("model.")]
    assert max(moved) > 5e-4  # there was something to learn, and to compare


@pytest.mark.slow
def test_the_death_of_a_rank_ends_all_and_the_run_goes_on(tmp_path: Path, start: Path) -> None:
    code, output = finish(launch(2, tmp_path / "whole", start))
    assert code == 0, output
    pids, run = tmp_path / "pids", tmp_path / "killed"
    pids.mkdir()
    process = launch(2, run, start, TOY_PIDS=str(pids), TOY_SECONDS="0.02")
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "ppo" / "step-00000002").exists():
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)
    ranks = [int((pids / f"rank-{rank}").read_text()) for rank in range(2)]
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    code, output = finish(process, 60)
    assert code != 0 and time.monotonic() - killed < 45
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not (run / "ppo").exists()
    code, output = finish(launch(2, run, start))
    assert code == 0, output
    for name, expected in weights(tmp_path / "whole").items():
        assert np.array_equal(weights(run)[name], expected), name
    assert len(RunDirectory(run).metrics()) == 6


def test_what_cannot_be_shared_is_told(tmp_path: Path, start: Path) -> None:
    settings = [*SETTINGS, "num_envs=3", "actor.global_batch_size=9"]

    def work(rank: int) -> tuple[int, str]:
        with redirect_stderr(io.StringIO()) as told:
            status = main(["train", "ppo", f"checkpoint={start}", f"run={tmp_path / 'run'}", *settings])
        return status, told.getvalue()

    for status, told in run_ranks(2, work):
        assert status == 2
        assert "num_envs=3 cannot be shared by 2 ranks; expected a multiple of 2, such as 4" in told.replace("\n", " ")
        assert "Traceback" not in told


SCRIPT_WITHOUT_CONTEXT = """
import json, pathlib, sys
from toy import TINY, ToyEnv
from sb3_vla import GRPO, PPO, HoldAtEnd

folder, is_grpo = sys.argv[1], sys.argv[2] == "GRPO"
if is_grpo:
    algorithm, env, options = GRPO, HoldAtEnd(ToyEnv(horizon=2)), {"group_size": 2, "n_groups": 2}
else:
    algorithm, env, options = PPO, ToyEnv(horizon=2), {"n_steps": 8, "seed": 3}
model = algorithm("VLAPolicy", env, batch_size=2, n_epochs=1, verbose=1, device="cpu", tensorboard_log=folder + "/log",
                  policy_kwargs={"model_kwargs": TINY}, **options)
pictures = []
model.learn(32, lambda found, _: pictures.append(int(found["new_obs"]["image"].sum())) or True)
model.save(folder + "/model.zip")
weights = sum(weight.double().sum().item() for weight in model.policy.parameters())
loaded = algorithm.load(folder + "/model.zip", env)
told = [model.ranks.count, model.num_timesteps, loaded.verbose, sum(pictures), weights]
pathlib.Path(folder, f"rank-{model.ranks.rank}.json").write_text(json.dumps(told))
"""


@pytest.mark.parametrize("algorithm", ["PPO", "GRPO"])
def test_a_script_without_the_context_joins_by_itself(algorithm: str, tmp_path: Path) -> None:
    """PPO under torchrun itself, GRPO in forks of this process, which have its imports done."""
    if algorithm == "PPO":
        (tmp_path / "script.py").write_text(SCRIPT_WITHOUT_CONTEXT)
        code, output = finish(run_script(tmp_path / "script.py", str(tmp_path), algorithm))
        assert code == 0, output
    else:

        def work(rank: int) -> str:
            sys.argv = ["script.py", str(tmp_path), algorithm]
            with redirect_stdout(io.StringIO()) as told:
                exec(SCRIPT_WITHOUT_CONTEXT, {"__name__": "__main__"})
            return told.getvalue()

        output = "".join(run_ranks(2, work, joined=False))
    # Files, since lines that two processes print at once come out torn.
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    (count, decisions, verbose, pictures, weights), others = first, second
    assert count == others[0] == 2
    assert decisions == others[1] >= 32  # of both together
    assert (verbose, others[2]) == (1, 0)
    assert pictures != others[3]  # each has episodes of its own
    assert weights == others[4]
    assert output.count("Wrapping the env with a `Monitor`") <= 2  # made and loaded, by the first
    assert output.count("total_timesteps") == output.count("| time/") >= 1  # each table once
    assert [path.name for path in (tmp_path / "log").iterdir()] == [f"{algorithm}_1"]


def run_script(script: Path, *arguments: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments],
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
