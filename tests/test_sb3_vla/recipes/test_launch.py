"""Recipes from the shell command to the report, at a size that takes seconds; and what stops them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from stable_baselines3.common.callbacks import CallbackList
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import tiny_model, toy_ppo
from toy_pi0 import HEADS, write_layout

from sb3_vla import PPO
from sb3_vla.checkpoints import LoadedCheckpoint, identity, load_checkpoint, native, save_checkpoint
from sb3_vla.cli.main import main
from sb3_vla.distributed import local_ranks
from sb3_vla.evaluation.evaluation import EvaluationResult
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.vla_policy import VLAPolicy
from sb3_vla.recipes import launch
from sb3_vla.recipes.resolve import make_plan
from sb3_vla.recipes.schema import load_recipe
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.shared import SharedRun

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "embodiment" / "run_embodiment.sh"
#: of every smoke run
EVERY = [
    *(f"env.{which}.tasks=[drawer-close-v3]" for which in ("train", "eval")),
    *(f"env.{which}.task_suite_name=metaworld_50" for which in ("train", "eval")),
    *(f"env.{which}.num_workers=1" for which in ("train", "eval")),
    "env.eval.max_episode_steps=10",
    "env.eval.trials_per_task=1",
]
LEARNING = [
    "runner.max_epochs=2",
    "env.train.total_num_envs=2",
    "env.train.max_episode_steps=10",
    "algorithm.rollout_epoch=1",
    "algorithm.update_epoch=1",
    "actor.global_batch_size=2",
]
# With dense rewards no two episodes end alike, so that GRPO has something to learn from.
GRPO = ["algorithm.group_size=2", "algorithm.filter_rewards=false", "env.train.dense_reward=true"]
IMITATION = ["data.episodes_per_task=1", "sft.steps=3", "sft.batch_size=4", "sft.warmup_steps=1"]
COMPACT = ["data.image_size=32", 'actor.model.model_kwargs={"width": 64, "depth": 1, "channels": [8, 8, 16]}']
#: names that RLinf logs, and ours
METRICS = {"env/success_once", "actor/approx_kl", "actor/grad_norm", "rollout/success_rate"}


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A virtual environment that setup.sh finds in place: this one's interpreter."""
    venv = tmp_path_factory.mktemp("venv")
    (venv / "bin").mkdir()
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    key = f'echo "$(cat "{ROOT}/pyproject.toml" "{ROOT}/constraints.txt" | cksum) {ROOT}"'
    stamp = subprocess.run(["bash", "-c", key], capture_output=True, text=True, check=True).stdout
    (venv / "setup.stamp").write_text(stamp)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "SB3_VLA_VENV": str(venv), "PYTHONPATH": path, "COLUMNS": "200"}


def shell(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def by_shell(environment: dict[str, str], folder: Path, *arguments: str) -> None:
    done = shell(environment, folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a recipe in this process, which has its imports done, as the only rank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(local_ranks.VARIABLE, "1")

    def run(*arguments: str) -> None:
        assert main(["train", *arguments]) == 0

    return run


def assert_complete(run: Path, result: str, trials: int = 1) -> None:
    """A checkpoint, a video that decodes, metrics by the reference's names, a report."""
    assert load_checkpoint(run / result).model is not None
    assert len(EvaluationResult.from_json(run / "evaluation_after.json").trials) == trials
    films = list((run / "videos").rglob("*.mp4"))
    assert films
    for film in films:
        with av.open(str(film)) as container:
            assert len(list(container.decode(video=0))) >= 10
    page = (run / "report.html").read_text()
    assert "drawer-close" in page
    if result != "sft":
        events = EventAccumulator(str(run / "tensorboard" / result)).Reload()
        assert METRICS <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("metaworld_50_ppo_openpi", [], (None, True)),
        ("metaworld_50_ppo_openpi", ["actor.model.precision=float32", "actor.model.frozen_bf16=false"], (False, False)),
        ("metaworld_50_grpo_openvlaoft", [], (True, False)),
        ("metaworld_50_sft_tinyvla", [], (True, False)),
        ("metaworld_50_ppo_compact", [], (False, False)),
    ],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_an_evaluation_acts_in_the_precision_of_the_recipe(
    name: str, given: list[str], expected: tuple[bool | None, bool], gpu: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    given = [*given, f"runner.logger.log_path={tmp_path}", "actor.model.model_path=somewhere"]
    recipe = load_recipe(name, given)
    plan = make_plan(recipe)
    asked: list[Any] = []
    within: list[bool] = []

    @contextlib.contextmanager
    def autocast(device: str, *, dtype: torch.dtype, enabled: bool) -> Iterator[None]:
        asked.append((device, dtype, enabled))
        within.append(True)
        yield
        within.pop()

    def evaluate(*_: Any, **__: Any) -> Any:
        assert within == [True]
        solved = SimpleNamespace(value=0.5)
        return SimpleNamespace(to_json=lambda path: path.write_text("{}"), mean_over_tasks=lambda: solved)

    loaded = SimpleNamespace(model=SimpleNamespace(image_size=(32, 32)), notes={})
    monkeypatch.setattr("sb3_vla.recipes.launch.load_checkpoint", lambda *_, **__: loaded)
    monkeypatch.setattr(
        "sb3_vla.recipes.launch.load_policy", lambda *how, **named: asked.append((*how[2:], named["frozen_bf16"]))
    )
    monkeypatch.setattr("sb3_vla.recipes.launch.evaluate", evaluate)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.autocast", autocast)
    launch._measure(
        SharedRun(plan.run, recipe), plan, {"checkpoint": None}, "before", "somewhere", {}, [], Console(quiet=True)
    )
    device = "cuda" if gpu else "cpu"
    in_bf16 = gpu and expected[0] is not False  # auto is bfloat16 on a GPU; a CPU acts in float32, as in rollouts
    assert asked == [(device, None, expected[1]), (device, torch.bfloat16, in_bf16)]


def moved(before: Path, after: Path) -> set[str]:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {name for name in old.keys() & new.keys() if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_compact_from_nothing(
    algorithm: str, environment: dict[str, str], here: Callable[..., None], tmp_path: Path
) -> None:
    """PPO by the shell command and on all cores, GRPO in this process; and a second start, which finds all done."""
    name = f"metaworld_50_{algorithm}_compact"
    settings = [*EVERY, *LEARNING, *IMITATION, *COMPACT, *(GRPO if algorithm == "grpo" else [])]
    settings += ["runner.val_check_interval=1", "env.train.video_cfg.save_video=true", "env.train.video_interval=1"]
    if algorithm == "ppo":
        by_shell(environment, tmp_path, name, *settings)
    else:
        here(name, *settings)
    run = tmp_path / "runs" / name
    assert_complete(run, algorithm)
    filmed = {film.parent.name for film in (run / "videos").rglob("*.mp4")}
    assert filmed == {"before", "train", "during", "after"}
    assert load_checkpoint(run / "checkpoints" / algorithm / "best").notes["evaluation"]["updates"] in (1, 2)
    events = EventAccumulator(str(run / "tensorboard" / algorithm)).Reload()
    assert len(events.Scalars("eval/success_once")) == len(events.Scalars("time/eval")) == 2
    assert EvaluationResult.from_json(run / "evaluation_before.json")
    weights = (run / algorithm / "model.safetensors").read_bytes()
    here(name, *settings)
    assert (run / algorithm / "model.safetensors").read_bytes() == weights


def test_each_stage_reads_its_checkpoint_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read by the policy that acts, and nowhere else; and their digest is computed once. What was trained
    is gone when the result is measured, though callbacks have bound it into a cycle."""
    save_checkpoint(tmp_path / "start", tiny_model(action_horizon=5))
    read: list[str] = []
    trained: list[weakref.ref[PPO]] = []
    held: list[list[PPO | None]] = []
    native_reader, digest = native.load_checkpoint, identity.checkpoint_digest

    def reading(folder: Path) -> LoadedCheckpoint:
        found = native_reader(folder)
        if not next(found.model.parameters()).is_meta:
            read.append(folder.name)
        return found

    def digesting(folder: str) -> str:
        read.append("digest")
        return digest(folder)

    def train(run: RunDirectory, stage: str, config: Any, *, checkpoint: str, output: Path, **_: Any) -> None:
        save_checkpoint(output, load_policy(checkpoint).model)
        algorithm = toy_ppo()
        algorithm.learn(16, CallbackList([]))
        trained.append(weakref.ref(algorithm))

    def evaluate(policy: VLAPolicy, **_: Any) -> Measured:
        held.append([algorithm() for algorithm in trained])
        return Measured()

    class Measured:
        def to_json(self, path: Path) -> None:
            path.write_text("{}")

        def mean_over_tasks(self) -> Any:
            return SimpleNamespace(value=0.5)

    monkeypatch.setattr(native, "load_checkpoint", reading)
    monkeypatch.setattr(identity, "checkpoint_digest", digesting)
    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr(launch, "evaluate", evaluate)
    monkeypatch.setattr(launch, "_tell", lambda *_: None)
    settings = [f"actor.model.model_path={tmp_path / 'start'}", f"runner.logger.log_path={tmp_path}"]
    settings += ["algorithm.rehearsal_coef=0"]
    recipe = load_recipe("metaworld_50_ppo_compact", settings)
    launch.launch(recipe, make_plan(recipe), Console(quiet=True))
    assert read == ["digest", "start", "start", "ppo"]  # evaluated, trained, and the result evaluated
    assert held == [[], [None]]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", [["-m", "sb3_vla", "train"], ["--no-python", "bash", str(SCRIPT)]])
def test_a_recipe_under_torchrun(command: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    """Two ranks play, learn and measure together, and the first of them alone writes and speaks."""
    name = "metaworld_50_ppo_compact"
    settings = [*EVERY, *LEARNING, *IMITATION, *COMPACT, "env.eval.trials_per_task=2", "runner.val_check_interval=1"]
    settings += ["env.train.video_cfg.save_video=true", "env.train.video_interval=1", "runner.save_interval=1"]
    settings += ["algorithm.critic_warmup=0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *command, name, *settings], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / name
    assert_complete(run, "ppo", trials=2)
    told = [line.split()[0] for line in done.stdout.splitlines() if str(run.relative_to(tmp_path)) in line]
    assert sorted(word for word in told if word in ("report", "TensorBoard", "checkpoint")) == [
        "TensorBoard",
        "checkpoint",
        "report",
    ]
    rows = [row for row in RunDirectory(run).metrics() if row["stage"] == "ppo"]
    # Two environments of two decisions an iteration; what follows the last update has a row of its own.
    assert [row["time/total_timesteps"] for row in rows] == [4, 8, 8]
    assert [row["time/iterations"] for row in rows] == [1, 2, 3]
    assert ["rollout/rewards" in row for row in rows] == [True, True, False]
    events = (run / "tensorboard" / "ppo").glob("events.*")  # .HOST.PROCESS.NUMBER
    assert len({file.name.split(".")[-2] for file in events}) == 1
    saved = {folder.name for folder in (run / "checkpoints" / "ppo").iterdir()}
    assert saved == {"step-00000001", "step-00000002", "best"}
    films = [film.parent.name for film in (run / "videos").rglob("*.mp4")]
    assert set(films) == {"before", "train", "during", "after"}
    assert (films.count("before"), films.count("after")) == (1, 1)
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    assert moved(run / "sft", run / "ppo")


def test_ppo_of_a_published_pi0(here: Callable[..., None], tmp_path: Path) -> None:
    published(here, tmp_path, "metaworld_50_ppo_openpi", "pi0")


PI0 = [
    ("metaworld_45_ppo_openpi", "pi0"),
    ("metaworld_50_ppo_openpi_pi05", "pi05"),
    ("metaworld_50_grpo_openpi", "pi0"),
    ("metaworld_50_grpo_openpi_pi05", "pi05"),
    ("metaworld_45_grpo_openpi", "pi0"),
    ("metaworld_50_sft_openpi", "pi0"),
    ("metaworld_50_sft_openpi_pi05", "pi05"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), PI0)
def test_published_pi0_and_pi05(name: str, model: str, environment: dict[str, str], tmp_path: Path) -> None:
    published(functools.partial(by_shell, environment, tmp_path), tmp_path, name, model)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("model", ["smolvla", "diffusion_policy", "tinyvla", "openvlaoft"])
def test_laptop_sizes_from_nothing(model: str, algorithm: str, environment: dict[str, str], tmp_path: Path) -> None:
    """Demonstrations, imitation, reinforcement and measurements, by the recipe's own sizes and distribution."""
    name = f"metaworld_50_{algorithm}_{model}_laptop"
    settings = [
        *EVERY,
        *LEARNING,
        *IMITATION,
        # Two iterations are all that there are; of them only the first is the critic's alone.
        *(GRPO if algorithm == "grpo" else ["algorithm.critic_warmup=1"]),
        "algorithm.rehearsal_batch_size=2",
    ]
    done = shell(environment, tmp_path, name, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / name
    assert_complete(run, algorithm)
    assert moved(run / "sft", run / algorithm)


def published(run: Callable[..., None], folder: Path, name: str, model: str) -> None:
    start = write_layout(folder / "published", model, "lerobot")
    kind = name.split("_")[2]
    settings = [*EVERY, f"actor.model.model_path={start}", f"actor.model.model_kwargs={json.dumps(HEADS)}"]
    if kind == "sft":
        settings += [*IMITATION, "data.image_size=56"]
    else:
        settings += [*LEARNING, "actor.micro_batch_size=1", *(GRPO if kind == "grpo" else [])]
    run(name, *settings)
    assert_complete(folder / "runs" / name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_compact_of_the_45(algorithm: str, environment: dict[str, str], tmp_path: Path) -> None:
    """The suites are the recipe's own: what is practiced is not what is measured."""
    name = f"metaworld_45_{algorithm}_compact"
    settings = [*LEARNING, *IMITATION, *COMPACT, *(GRPO if algorithm == "grpo" else [])]
    settings += ["env.train.tasks=[drawer-close-v3]", "env.train.num_workers=1", "env.eval.num_workers=1"]
    settings += ["env.eval.max_episode_steps=10", "env.eval.trials_per_task=1"]
    done = shell(environment, tmp_path, name, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    after = EvaluationResult.from_json(tmp_path / "runs" / name / "evaluation_after.json")
    assert set(after.per_task()) == {
        "bin-picking-v3",
        "box-close-v3",
        "hand-insert-v3",
        "door-lock-v3",
        "door-unlock-v3",
    }


def tiny(model: str) -> tuple[list[str], list[str]]:
    """Settings of imitation, and of what follows it, for a small new model."""
    import test_diffusion_policy
    import test_openvla_oft
    import test_smolvla
    import test_tinyvla

    sizes: dict[str, Any] = {
        "smolvla": test_smolvla.TINY,
        "tinyvla": {**test_tinyvla.TINY, "action_horizon": 8},
        "openvla_oft": test_openvla_oft.TINY,
        "diffusion_policy": {**test_diffusion_policy.SIZES, "action_horizon": 8},
        "compact": {"width": 64, "depth": 1, "channels": [8, 8, 16]},
    }
    side = 64 if model == "diffusion_policy" else 32
    fresh = [f"actor.model.model_kwargs={json.dumps(sizes[model])}", f"data.image_size={side}", *IMITATION]
    steps = [] if model in ("openvla_oft", "smolvla") else ["actor.model.num_steps=3"]
    steps += ["actor.model.noise_kwargs={trained_steps: 2}"] if model == "tinyvla" else []
    return fresh, steps


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["compact", "smolvla", "diffusion_policy", "tinyvla", "openvla_oft"])
def test_imitation_then_ppo_then_grpo(model: str, environment: dict[str, str], tmp_path: Path) -> None:
    name = model.replace("openvla_oft", "openvlaoft")
    fresh, steps = tiny(model)
    done = shell(environment, tmp_path, f"metaworld_50_sft_{name}", *EVERY, *fresh)
    assert done.returncode == 0, done.stdout + done.stderr
    start = tmp_path / "runs" / f"metaworld_50_sft_{name}"
    assert_complete(start, "sft")
    for kind in ("ppo", "grpo") if model != "openvla_oft" else ("grpo",):
        settings = [*EVERY, *LEARNING, *steps, f"actor.model.model_path={start / 'sft'}"]
        settings += ["algorithm.rehearsal_coef=0"] if model == "compact" else []
        # Rewards that are not all alike, so that there is something to learn from.
        settings += GRPO if kind == "grpo" else ["algorithm.critic_warmup=0", "env.train.dense_reward=true"]
        done = shell(environment, tmp_path, f"metaworld_50_{kind}_{name}", *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        run = tmp_path / "runs" / f"metaworld_50_{kind}_{name}"
        assert_complete(run, kind)
        if kind == "ppo":
            assert moved(start / "sft", run / "ppo")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs the right to")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_message(environment: dict[str, str], small_disk: Path, tmp_path: Path) -> None:
    """A model of full size: some checkpoints fit, not all that a run leaves; what is there is whole."""
    settings = [*EVERY, *LEARNING, *IMITATION, "data.image_size=32", f"runner.logger.log_path={small_disk}"]
    done = shell(environment, tmp_path, "metaworld_50_ppo_compact", *settings)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    run = small_disk / "metaworld_50_ppo_compact"
    there = [run / "sft", *(folder for folder in (run / "ppo",) if folder.exists())]
    assert all(load_checkpoint(folder).model is not None for folder in there)
    assert not [path for path in run.rglob("*") if ".tmp" in path.name or ".partial" in path.name]


def test_a_folder_that_cannot_be_written_is_told_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["train", "metaworld_50_ppo_compact", f"runner.logger.log_path={tmp_path / 'file'}"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("error: cannot write") and "Not a directory" in told


def test_a_disk_that_fills_while_weights_are_written_is_told_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors has an exception of its own for it."""

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sb3_vla.recipes.launch.collect", full)
    assert main(["train", "metaworld_50_ppo_compact", f"runner.logger.log_path={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error:") and "No space left" in told and "Traceback" not in told


def test_how_a_recipe_runs_begins_nothing_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage once, whatever the workers, the renderer, the paths as written, and how often it saves."""
    done: list[str] = []

    def making(name: str, *outputs: str) -> Any:
        def make(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            for output in outputs:
                (tmp_path / "runs" / "r" / output).mkdir(parents=True)
            solved = SimpleNamespace(value=0.5)
            return SimpleNamespace(
                history=[], to_json=lambda path: path.write_text("{}"), mean_over_tasks=lambda: solved
            )

        return make

    for name, outputs in {"collect": ["demonstrations"], "sft": ["sft"], "train": ["ppo"], "evaluate": []}.items():
        monkeypatch.setattr(launch, name, making(name, *outputs))
    loaded = SimpleNamespace(model=SimpleNamespace(image_size=(32, 32)), notes={}, model_name="compact")
    monkeypatch.setattr(launch, "load_checkpoint", lambda *_, **__: loaded)
    for name in ("load_policy", "_tell", "_demonstrations", "_to_rehearse"):
        monkeypatch.setattr(launch, name, lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def start(*settings: str, path: str = "runs") -> list[str]:
        done.clear()
        given = [f"runner.logger.log_path={path}", "runner.logger.experiment_name=r", *settings]
        assert main(["train", "metaworld_50_ppo_compact", *given]) == 0, capsys.readouterr().err
        return done

    assert start() == ["collect", "sft", "evaluate", "train", "evaluate"]
    for path in ("./runs", "~/runs", str(tmp_path / "runs"), "runs/../runs/"):
        assert start(path=path) == []
    assert start("runner.save_interval=3", "runner.keep_checkpoints=null", "runner.val_check_interval=5") == []
    for which in ("train", "eval"):
        assert start(f"env.{which}.num_workers=3", f"env.{which}.renderer=software") == []
    assert start("env.eval.total_num_envs=3", "actor.micro_batch_size=8", "runner.logger.logger_backends=[csv]") == []
    with pytest.warns(UserWarning, match="evaluate_after has other settings"):
        assert start("env.eval.trials_per_task=3") == ["evaluate", "evaluate"]
    assert (tmp_path / "runs" / "r" / "replaced" / "evaluate_after-1" / "evaluation_after.json").is_file()
