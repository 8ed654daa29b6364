"""A training that was interrupted at any moment ends as one that was not: weights, optimizer, generators, metrics."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainings
from safetensors import SafetensorError
from safetensors.torch import load_file
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from toy import TINY, ToyEnv, stir, tiny_model, toy_demonstrations, toy_ppo, toy_vec
from trainings import grpo, ppo

from sb3_vla import GRPO, HoldAtEnd
from sb3_vla.checkpoints import save_checkpoint, training_state
from sb3_vla.checkpoints.weights import write_tensors
from sb3_vla.cli.main import main
from sb3_vla.common.signals import Stopped
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv
from sb3_vla.policies.value_head import ValueHead
from sb3_vla.ppo.ppo import PPO
from sb3_vla.recipes import resolve
from sb3_vla.runs import callbacks, training
from sb3_vla.runs.directory import RunDirectory, RunError
from sb3_vla.runs.resume import load_algorithm, save_algorithm
from sb3_vla.runs.settings import Annealed, Training

# Everything that a training carries from one iteration to the next: schedules, warm-ups, a reference, rehearsal,
# sampling by signal, a learned deviation, a rate that rises and falls.
COMMON: dict[str, Any] = {
    "n_epochs": 2,
    "learning_rate": Annealed(1e-3, 2e-5),
    "actor_warmup": 2,
    "kl_coef": 0.1,
    "ent_coef": 0.01,
    "target_kl": None,
    "distribution_kwargs": {"std": 0.2, "learn_std": True},
    "rehearsal_coef": 0.5,
    "rehearsal_batch_size": 4,
    "checkpoint_interval": 2,
}
CONFIGS: dict[str, tuple[Callable[..., Training], dict[str, Any]]] = {
    # Episodes of 4 decisions in rollouts of 6.
    "ppo": (ppo, {"iterations": 6, "num_envs": 3, "n_steps": 6, "batch_size": 9, "critic_warmup": 1}),
    # Groups of 4 episodes of 3 decisions, in two turns; so a rollout takes 6 steps, too, and there are 6 rollouts.
    "grpo": (grpo, {"total_decisions": 72, "num_envs": 2, "group_size": 4, "n_groups": 1, "batch_size": 6}),
}
UPDATES = 6 * 2 * 2  # optimizer steps: iterations, epochs, minibatches


class Interrupt(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def toys() -> Iterator[None]:
    """Train in toy environments."""

    def make(makers: list[Any], num_workers: int | None) -> DummyVecEnv:
        options: dict[str, Any] = {"chunk": 5, "action_dim": 4, "privileged": True}
        if makers[0].func is training._holding:
            return DummyVecEnv([lambda: HoldAtEnd(ToyEnv(horizon=3, **options))] * len(makers))
        return toy_vec(len(makers), horizon=4, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SharedMemoryVecEnv", make)
        # TensorBoard reads a run's files in the order of their names: the second, then how many the process had before.
        patch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10_000))
        yield


def train(folder: Path, algorithm: str = "ppo", *, progress: bool = False, **changes: Any) -> None:
    make, settings = CONFIGS[algorithm]
    config = make(**{**COMMON, **settings, **changes})
    run = RunDirectory(folder, {})
    if not (folder.parent / "start").exists():
        torch.manual_seed(0)
        save_checkpoint(folder.parent / "start", tiny_model(action_horizon=5))
    training.train(
        run,
        algorithm,
        config,
        checkpoint=folder.parent / "start",
        output=folder / algorithm,
        suite="MT10",
        demonstrations=toy_demonstrations(),
        resume=True,
        progress=progress,
    )


def interrupting(real: Callable[..., Any], call: int, *, afterwards: bool = False) -> Callable[..., Any]:
    """A function that fails at a call of it, before or after it has done its work."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not afterwards:
            raise Interrupt
        result = real(*args, **kwargs)
        if calls == call:
            raise Interrupt
        return result

    return wrapped


def outcome(folder: Path, algorithm: str = "ppo") -> dict[str, Any]:
    """All that a run leaves, without what clocks say."""
    last = RunDirectory(folder).latest_checkpoint(algorithm)
    assert last is not None
    state = json.loads((last / "training_state.json").read_text())
    state["values"]["log"] = [entry for entry in state["values"]["log"] if not entry[0].startswith(("time/", "perf/"))]
    events = EventAccumulator(str(folder / "tensorboard" / algorithm), size_guidance={"scalars": 0}).Reload()
    return {
        "checkpoint": (last.name, (last / "training_state.safetensors").read_bytes()),
        "state": state,
        "result": (folder / algorithm / "model.safetensors").read_bytes(),
        "notes": (folder / algorithm / "config.json").read_text(),
        "metrics": [
            {
                key: value
                for key, value in row.items()
                if not key.startswith(("time/", "perf/")) or key in ("time/total_timesteps", "time/iterations")
            }
            for row in RunDirectory(folder).metrics()
        ],
        "tensorboard": {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not tag.startswith(("time/", "perf/"))
        },
    }


def differences(found: Any, expected: Any) -> list[str]:
    """Names of what differs; NaN equals itself."""
    return [key for key in expected if repr(found[key]) != repr(expected[key])]


MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "in the first update": (PPO, "_optimizer_step", 2, False),
    "in the first rollout after a checkpoint": (PPO, "_record_episodes", 2 * 6 + 2, False),
    "in the middle of an update": (PPO, "_optimizer_step", UPDATES // 2 + 2, False),
    "between a rollout and its update": (PPO, "_behavior_policy", 4, False),
    "before a checkpoint is begun": (callbacks, "save_algorithm", 2, False),
    "while a checkpoint is written": (training_state, "write_tensors", 2, True),
    "after a checkpoint": (callbacks.RunProgress, "save", 2, True),
    "in the last update": (PPO, "_optimizer_step", UPDATES, False),
    "between the last checkpoint and the result": (training, "save_checkpoint", 1, False),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Outcomes by algorithm."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for algorithm in CONFIGS:
        train(folder / f"{algorithm} run", algorithm)
    return {algorithm: outcome(folder / f"{algorithm} run", algorithm) for algorithm in CONFIGS}


# What PPO and GRPO share: where neither plays nor learns. Of GRPO these are slow tests.
SHARED = [moment for moment in MOMENTS if "checkpoint" in moment and "rollout" not in moment]


@pytest.mark.parametrize(
    ("moment", "algorithm"),
    [
        *((moment, "ppo") for moment in MOMENTS),
        *((moment, "grpo") for moment in MOMENTS if moment not in SHARED),
        *(pytest.param(moment, "grpo", marks=pytest.mark.slow) for moment in SHARED),
    ],
)
def test_the_end_is_the_same_whenever_it_was_interrupted(
    moment: str, algorithm: str, tmp_path: Path, uninterrupted: dict[str, dict[str, Any]]
) -> None:
    owner, name, call, afterwards = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupting(getattr(owner, name), call, afterwards=afterwards))
        with pytest.raises(Interrupt):
            train(tmp_path / "run", algorithm)
    # Whatever a new process has in its generators.
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    train(tmp_path / "run", algorithm)
    assert differences(outcome(tmp_path / "run", algorithm), uninterrupted[algorithm]) == []
    assert len(uninterrupted[algorithm]["metrics"]) == 6


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_interrupted_again_and_again(algorithm: str, tmp_path: Path, uninterrupted: dict[str, dict[str, Any]]) -> None:
    for call in (14, 5, 6):  # the second gets past the checkpoint after the fourth iteration, the third does not
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PPO, "_optimizer_step", interrupting(PPO._optimizer_step, call))
            with pytest.raises(Interrupt):
                train(tmp_path / "run", algorithm)
    train(tmp_path / "run", algorithm)
    assert differences(outcome(tmp_path / "run", algorithm), uninterrupted[algorithm]) == []


def signalling(real: Callable[..., Any], call: int, *signals: signal.Signals) -> Callable[..., Any]:
    """A function at a call of which this process gets signals."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            for number in signals:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("method", "number", "exit_code", "algorithm"),
    [
        ("_decide", signal.SIGINT, 130, "ppo"),
        ("_decide", signal.SIGTERM, 143, "grpo"),
        ("_optimizer_step", signal.SIGTERM, 143, "ppo"),
        ("_optimizer_step", signal.SIGINT, 130, "grpo"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)  # each number, method and algorithm has its turns above
            for case in (
                ("_decide", signal.SIGTERM, 143, "ppo"),
                ("_decide", signal.SIGINT, 130, "grpo"),
                ("_optimizer_step", signal.SIGINT, 130, "ppo"),
                ("_optimizer_step", signal.SIGTERM, 143, "grpo"),
            )
        ),
    ],
)
def test_a_signal_ends_it_after_the_iteration_with_a_checkpoint(
    method: str,
    number: signal.Signals,
    exit_code: int,
    algorithm: str,
    tmp_path: Path,
    uninterrupted: dict[str, dict[str, Any]],
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    calls = {"_decide": 2 * 6 + 3, "_optimizer_step": 2 * 4 + 2}  # in the third iteration, after which none is due
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, method, signalling(getattr(PPO, method), calls[method], number))
        with pytest.raises(Stopped) as stopped:
            train(tmp_path / "run", algorithm)
    assert stopped.value.exit_code == exit_code
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    latest = RunDirectory(tmp_path / "run").latest_checkpoint(algorithm)
    assert latest is not None
    state = json.loads((latest / "training_state.json").read_text())
    assert state["values"]["counters"]["updates"] == 3
    train(tmp_path / "run", algorithm)
    assert differences(outcome(tmp_path / "run", algorithm), uninterrupted[algorithm]) == []


def test_a_second_signal_ends_it_at_once(tmp_path: Path, uninterrupted: dict[str, dict[str, Any]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "_decide", signalling(PPO._decide, 2 * 6 + 3, signal.SIGINT, signal.SIGTERM))
        with pytest.raises(Stopped, match="SIGTERM"):
            train(tmp_path / "run")
    latest = RunDirectory(tmp_path / "run").latest_checkpoint("ppo")
    assert latest is not None and latest.name == "step-00000002"
    train(tmp_path / "run")
    assert differences(outcome(tmp_path / "run"), uninterrupted["ppo"]) == []


def test_an_error_after_a_signal_is_its_consequence(tmp_path: Path) -> None:
    """As when a whole group of processes gets SIGTERM, and a worker's death is noticed first."""
    step = signalling(PPO._optimizer_step, 10, signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "_optimizer_step", interrupting(step, 10, afterwards=True))
        with pytest.raises(Stopped, match="SIGTERM") as stopped:
            train(tmp_path / "run")
    assert isinstance(stopped.value.__cause__, Interrupt)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("(os error 28)")])
def test_a_full_disk_at_the_save_that_follows_a_signal_is_told(
    error: Exception, tmp_path: Path, uninterrupted: dict[str, dict[str, Any]]
) -> None:
    calls: list[Any] = []

    def full_at_the_second(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        write_tensors(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "_decide", signalling(PPO._decide, 2 * 6 + 3, signal.SIGTERM))
        patch.setattr(training_state, "write_tensors", full_at_the_second)
        with pytest.raises(RunError, match=r"cannot write .*step-00000003: .*; free some space and start again"):
            train(tmp_path / "run")
    train(tmp_path / "run")
    assert differences(outcome(tmp_path / "run"), uninterrupted["ppo"]) == []


DAMAGES: dict[str, Callable[[Path], None]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: os.truncate(file, file.stat().st_size - 2),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file: file.unlink(),
}


@pytest.fixture(scope="module")
def interrupted(toys: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was interrupted after the checkpoints of its second and fourth iteration."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "_optimizer_step", interrupting(PPO._optimizer_step, 4 * 4 + 2))
        with pytest.raises(Interrupt):
            train(folder / "run")
    return folder


@pytest.mark.parametrize("file", ["training_state.json", "training_state.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_it_taken(
    damage: str, file: str, interrupted: Path, tmp_path: Path, uninterrupted: dict[str, dict[str, Any]]
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "run" / "checkpoints" / "ppo"
    DAMAGES[damage](folder / "step-00000004" / file)
    told = rf"step-00000004/{file} is (damaged|missing).*; ppo goes on from step-00000002 before it"
    with pytest.warns(UserWarning, match=told):
        train(tmp_path / "run")
    assert differences(outcome(tmp_path / "run"), uninterrupted["ppo"]) == []
    assert "step-00000004.damaged" in os.listdir(folder)


def test_no_state_that_is_whole(tmp_path: Path) -> None:
    train(tmp_path / "run", iterations=2)
    (tmp_path / "run" / "checkpoints" / "ppo" / "step-00000002" / "training_state.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"training_state\.safetensors is damaged: .*delete .*checkpoints/ppo to begin"):
        train(tmp_path / "run")


@pytest.mark.parametrize(("algorithm", "length"), [("ppo", "iterations"), ("grpo", "total_decisions")])
def test_a_longer_training_goes_on_from_a_finished_one(algorithm: str, length: str, tmp_path: Path) -> None:
    """Where nothing depends on how much is left, to the end of one that was long from the beginning."""
    steady = {"learning_rate": 1e-3, "noise_scale": 1.0}
    whole = CONFIGS[algorithm][1][length]
    train(tmp_path / "whole", algorithm, **steady)
    train(tmp_path / "run", algorithm, **steady, **{length: whole // 2})
    half = outcome(tmp_path / "run", algorithm)
    train(tmp_path / "run", algorithm, **steady)
    found, expected = outcome(tmp_path / "run", algorithm), outcome(tmp_path / "whole", algorithm)
    assert differences(found, expected) == [] and differences(half, expected) != []


def test_a_result_that_may_not_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PPO, "learn", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "run" / "ppo").mkdir(parents=True)
    (tmp_path / "run" / "ppo" / "thesis").touch()
    with pytest.raises(FileExistsError, match=r"holds files that are no checkpoint \(thesis\)"):
        train(tmp_path / "run")


def test_progress_that_goes_to_a_file_is_told_in_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "_SECONDS_BETWEEN_LINES", 0.0)
    train(tmp_path / "run", progress=True)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    told = [line for line in lines if "left" in line]
    assert [line.split()[1] for line in told[:5]] == [f"{done}/6" for done in range(1, 6)], lines
    assert all(
        re.search(r"success while exploring \d+% [\d,]+ env steps [\d,]+/s \d:\d\d:\d\d left", line) for line in told
    )


def test_groups_go_on_from_trials_that_no_seed_told(tmp_path: Path) -> None:
    """Without a seed the trials of the groups are drawn from a number that the state keeps."""

    def grpo() -> GRPO:
        options: dict[str, Any] = {"model": "compact", "model_kwargs": TINY}
        algorithm = GRPO("VLAPolicy", toy_vec(4), group_size=2, n_groups=2, device="cpu", policy_kwargs=options)
        algorithm.set_logger(configure(None, []))
        return algorithm

    first, second = grpo(), grpo()
    assert first._trial_entropy != second._trial_entropy
    first.learn(8)
    save_algorithm(tmp_path, first)
    load_algorithm(tmp_path, second)
    learned = []
    for algorithm in (first, second):
        torch.manual_seed(5)
        algorithm.learn(16, reset_num_timesteps=False)
        learned.append({name: value.clone() for name, value in algorithm.policy.state_dict().items()})
    assert all(torch.equal(learned[0][name], learned[1][name]) for name in learned[0])


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    train(tmp_path / "run", iterations=1)
    before = outcome(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "learn", interrupting(PPO.learn, 1))
        train(tmp_path / "run", iterations=1)
    assert differences(outcome(tmp_path / "run"), before) == []


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_what_the_comparison_would_notice(
    algorithm: str, tmp_path: Path, uninterrupted: dict[str, dict[str, Any]]
) -> None:
    """Another seed gives another end, so equality above says something."""
    train(tmp_path / "run", algorithm, seed=1)
    found = differences(outcome(tmp_path / "run", algorithm), uninterrupted[algorithm])
    assert {"checkpoint", "state", "result", "metrics", "tensorboard"} <= set(found)


# --- In MetaWorld, by SIGKILL -----------------------------------------------------------------------------------------

KILLED_WHILE_WRITING = """
import os, signal, sys
from sb3_vla.checkpoints import training_state
from sb3_vla.cli.main import main
from sb3_vla.recipes import resolve

resolve._decisions = lambda _: 6
real, written = training_state.write_tensors, []

def write_tensors(*arguments):
    real(*arguments)
    written.append(arguments)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

training_state.write_tensors = write_tensors
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_command_goes_on_in_metaworld(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "SharedMemoryVecEnv", SharedMemoryVecEnv)
    monkeypatch.setattr(resolve, "_decisions", lambda _: 6)
    torch.manual_seed(0)
    model = tiny_model(action_horizon=5)
    critic = ValueHead(model.feature_dim, 39 + 1, 256)  # with opinions, for there is no success to learn from
    stir(critic)
    save_checkpoint(tmp_path / "start", model, critic)

    def command(run: str) -> list[str]:
        # Episodes of eight decisions, rollouts of six.
        settings = ["iterations=3", "num_envs=4", "env.train.num_workers=2", "env.train.max_episode_steps=40"]
        settings += ["algorithm.rollout_epoch=1", "algorithm.update_epoch=1", "actor.global_batch_size=12"]
        settings += ["runner.save_interval=1", "algorithm.critic_warmup=0", "rollout.pipeline_stage_num=2", "trials=0"]
        tasks = "tasks=[door-open-v3, reach-v3]"
        return ["train", "ppo", f"checkpoint={tmp_path / 'start'}", f"run={tmp_path / run}", tasks, *settings]

    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *command("killed")])
    assert killed.returncode == -signal.SIGKILL
    checkpoints = tmp_path / "killed" / "checkpoints" / "ppo"
    assert re.fullmatch(r"\.step-00000002.+\.partial step-00000001", " ".join(sorted(os.listdir(checkpoints))))
    assert main(command("killed")) == 0
    assert not list(checkpoints.glob(".*"))
    assert main(command("whole")) == 0
    whole = outcome(tmp_path / "whole")
    assert differences(outcome(tmp_path / "killed"), whole) == []
    start, end = (load_file(tmp_path / where / "model.safetensors") for where in ("start", "whole/ppo"))
    for weight in ("model.action_out.weight", "value_head.layers.0.weight"):
        assert not torch.equal(start[weight], end[weight])
    episodes = [environment["actions"] for environment in whole["state"]["values"]["environments"]]
    assert all(len(actions) % 40 for actions in episodes)  # they were in progress


GROUPS_KILLED_WHILE_WRITING = """
import os, signal, sys
from trainings import grpo
from sb3_vla.runs import training
from sb3_vla.checkpoints import training_state
from sb3_vla.runs.directory import RunDirectory

def train(folder, kill):
    real, written = training_state.write_tensors, []

    def write_tensors(*arguments):
        real(*arguments)
        written.append(arguments)
        if kill and len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    training_state.write_tensors = write_tensors
    # Two groups in a rollout of one turn, and three rollouts; a dense reward, for no episode will succeed.
    config = grpo(
        total_decisions=96, num_envs=4, num_workers=2, horizon=40, group_size=2, n_groups=2, batch_size=16, n_epochs=1,
        checkpoint_interval=1, env={"reward": "dense"},
    )
    training.train(
        RunDirectory(folder + "/run", {}), "grpo", config, checkpoint=folder + "/../start",
        output=folder + "/run/grpo", suite="MT10", tasks=["door-open-v3", "reach-v3"],
        resume=True, progress=False,
    )

if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2] == "kill")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_groups_that_were_killed_go_on_in_metaworld(tmp_path: Path) -> None:
    """What is kept are environments whose episodes have ended, and which are held there."""
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "start", tiny_model(action_horizon=5))
    (tmp_path / "train_groups.py").write_text(GROUPS_KILLED_WHILE_WRITING)

    def train_groups(folder: str, how: str) -> int:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, tmp_path / "train_groups.py", tmp_path / folder, how]
        places = os.pathsep.join([str(Path(trainings.__file__).parent), str(Path(training.__file__).parents[2])])
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": places}).returncode

    assert train_groups("killed", "kill") == -signal.SIGKILL
    checkpoints = tmp_path / "killed" / "run" / "checkpoints" / "grpo"
    assert re.fullmatch(r"\.step-00000064.+\.partial step-00000032", " ".join(sorted(os.listdir(checkpoints))))
    assert train_groups("killed", "go on") == train_groups("whole", "go on") == 0
    found, whole = (outcome(tmp_path / which / "run", "grpo") for which in ("killed", "whole"))
    assert differences(found, whole) == []
    ended = [environment["actions"] for environment in whole["state"]["values"]["environments"]]
    assert [len(actions) for actions in ended] == [40] * 4
    start, end = (load_file(tmp_path / where / "model.safetensors") for where in ("start", "whole/run/grpo"))
    assert not torch.equal(start["model.action_out.weight"], end["model.action_out.weight"])


# --- What cannot be kept ----------------------------------------------------------------------------------------------


def test_what_keeps_a_state_of_its_own_is_refused(tmp_path: Path) -> None:
    algorithm = toy_ppo(VecMonitor(toy_vec()))  # type: ignore[arg-type]
    algorithm.learn(16)
    with pytest.raises(ValueError, match="without VecMonitor, whose state is not kept"):
        save_algorithm(tmp_path, algorithm)


def test_environments_that_cannot_tell_their_state_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = toy_ppo()
    algorithm.learn(16)
    monkeypatch.delattr(ToyEnv, "snapshot")
    with pytest.raises(ValueError, match=r"only with a method snapshot\(\) and a reset option"):
        save_algorithm(tmp_path, algorithm)


def test_a_state_of_other_environments_is_refused(tmp_path: Path) -> None:
    algorithm = toy_ppo()
    algorithm.learn(16)
    save_algorithm(tmp_path, algorithm)
    with pytest.raises(ValueError, match="is of 2 environments; this algorithm has 3"):
        load_algorithm(tmp_path, toy_ppo(toy_vec(3)))
