"""The command: what each part of it makes, what it refuses, and that imitation goes on after an interrupt."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import tiny_model, toy_demonstrations

import sb3_vla.data.demonstrations
import sb3_vla.evaluation.evaluation
import sb3_vla.runs.directory
import sb3_vla.runs.training
import sb3_vla.sft.imitation
from sb3_vla import VLAPolicy
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.cli.main import COMMANDS, main
from sb3_vla.common.signals import stop_request
from sb3_vla.evaluation.evaluation import check_fit
from sb3_vla.recipes import launch
from sb3_vla.runs.directory import RunDirectory, RunError

SFT = [
    "sft.steps=24",
    "sft.batch_size=8",
    "sft.validation_fraction=0.0",
    "sft.bf16=false",
    "sft.model_kwargs={width: 64, depth: 1, channels: [8, 8, 16]}",
]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "demonstrations"
    collect = ["collect", f"output={folder}", "suite=MT10", "tasks=[drawer-close-v3]", "episodes_per_task=1"]
    assert main([*collect, "image_size=32"]) == 0
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint", tiny_model(action_horizon=5))
    return tmp_path / "checkpoint"


def test_eval_writes_a_result_and_a_table(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    settings = [f"checkpoint={checkpoint}", f"output={output}", "tasks=[reach-v3]", "trials_per_task=1"]
    assert main(["eval", *settings, "action_chunk=2"]) == 0
    assert json.loads(output.read_text())["protocol"]["name"] == "rlinf-160 with chunk 2"
    assert "reach-v3" in json.dumps(json.loads(output.read_text()))
    assert "reach" in output.with_suffix(".md").read_text()


class Captured(BaseException):
    """What no command takes for an error of its own."""


@pytest.mark.parametrize(
    ("settings", "expected", "warning"),
    [
        ([], {"camera": "corner2", "crop": "workspace"}, None),
        (["crop=full"], {"camera": "corner2", "crop": "full"}, "trained on camera=corner2 with crop=workspace, but"),
        (["camera=corner"], {"camera": "corner", "crop": "workspace"}, "trained on camera=corner2 with crop=workspace"),
        (["checkpoint=unsaid"], {}, "unsaid does not say which view"),
        (["checkpoint=unsaid", "crop=workspace"], {"camera": "corner2", "crop": "workspace"}, None),
        (["checkpoint=unsaid", "crop=[0, 0, 1, 0.5]"], {"camera": "corner2", "crop": [0, 0, 1, 0.5]}, None),
        (["checkpoint=unsaid", "camera=corner"], {"camera": "corner", "crop": None}, None),
    ],
)
@pytest.mark.parametrize("command", ["eval", "train"])
def test_what_a_checkpoint_is_shown(
    command: str,
    settings: list[str],
    expected: dict[str, Any],
    warning: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The view that the checkpoint says, or the one that is given where it says none."""
    shown: dict[str, Any] = {}

    def evaluate(policy: VLAPolicy, **options: Any) -> None:
        shown.update(check_fit(policy, options["protocol"], options["env_kwargs"])["env_kwargs"])
        raise Captured

    def environments(makers: list[Any], **_: Any) -> None:
        shown.update(makers[0].keywords)
        raise Captured

    monkeypatch.setattr(sb3_vla.evaluation.evaluation, "evaluate", evaluate)
    monkeypatch.setattr(sb3_vla.runs.training, "SharedMemoryVecEnv", environments)
    monkeypatch.chdir(tmp_path)
    view = {"camera": "corner2", "crop": "workspace"}
    save_checkpoint("said", tiny_model(action_horizon=5), notes={"view": view})
    save_checkpoint("unsaid", tiny_model(action_horizon=5))
    begin = (
        ["eval", "output=result.json", "suite=MT10"] if command == "eval" else ["train", "ppo", "run=run", "trials=0"]
    )
    with warnings.catch_warnings(record=True) as told, pytest.raises(Captured):
        warnings.simplefilter("always")
        main([*begin, "checkpoint=said", *settings])
    assert shown["image_size"] == 32
    if command == "train":  # environments are told what evaluations leave to their default
        expected = {"camera": "corner2", "crop": None, **expected}
    assert {name: shown[name] for name in ("camera", "crop") if name in shown} == expected
    messages = [str(each.message) for each in told if issubclass(each.category, UserWarning)]
    assert len(messages) == (warning is not None) and all(str(warning) in message for message in messages)


@pytest.mark.parametrize("known", [{}, {"camera": "corner2", "crop": "workspace"}])
def test_imitation_notes_the_view_of_the_data(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = toy_demonstrations()
    data.camera = dict(known)
    monkeypatch.setattr(sb3_vla.data.demonstrations.Demonstrations, "load", lambda *_, **__: data)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "meta").mkdir(parents=True)
    imitate = ["sft", "data=data", *SFT, "sft.steps=1"]
    assert main([*imitate, "output=sft", "crop=workspace"]) == 0
    assert load_checkpoint(tmp_path / "sft").notes["view"] == {"camera": "corner2", "crop": "workspace"}
    if known:
        assert main([*imitate, "output=other", "crop=full"]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "data was recorded with camera=corner2 with crop=workspace, but camera=corner2 with crop=full" in told
    else:
        data.camera = {}
        with pytest.warns(UserWarning, match="do not say which view their pictures show"):
            assert main(imitate) == 0


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("eval", ["crop=workspce"], "did you mean 'workspace'"),
        ("train", ["crop=[0, 0, 2, 1]"], "crop=[0, 0, 2, 1]; expected (top, left, height, width)"),
        ("train", ["camera=corner22"], "Unknown camera 'corner22'; did you mean 'corner2'"),
        ("sft", ["crop=workspce"], "did you mean 'workspace'"),
        ("eval", ["suite=MT11", "tasks=[reach-v3]"], "'MT11'"),
        ("eval", ["tasks=[hammer-v3]"], "'hammer-v3' is not in the train split of MT10"),
        ("eval", ["protocol=rlinf"], "'rlinf'"),
        ("eval", ["checkpoint=nowhere"], "nowhere does not exist"),
        ("eval", ["checkpoint=lerobot/smolvla_base"], "write hf://lerobot/smolvla_base"),
        ("train", ["checkpoint=lerobot/smolvla_base"], "write hf://lerobot/smolvla_base"),
        ("eval", ["output=result.md"], "output=result.md; expected the name of a JSON file"),
        ("train", ["actor.global_batch_size=60"], "batch_size=60 does not divide a rollout of"),
        ("train", ["algorithm.adv_type=trpo"], "'trpo'"),
        ("train", ["iteratoins=3"], "unknown key 'iteratoins'"),
        ("train", ["algorithm.group_sise=3"], "algorithm.group_size"),
        ("sft", ["data=nowhere"], "nowhere"),
    ],
)
def test_bad_settings_are_told_in_one_message(
    command: str,
    settings: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command != "sft":
        settings = [f"checkpoint={checkpoint}", *settings]
    if command == "train":
        settings = ["ppo", f"run={tmp_path / 'run'}", *settings]
    assert main([command, *settings]) == 2
    told = capsys.readouterr().err
    assert "error:" in told and message in " ".join(told.split()), told
    assert "Traceback" not in told


def test_a_gpu_that_is_not_there_is_no_processor(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = [f"checkpoint={checkpoint}", f"output={tmp_path / 'result.json'}", "tasks=[reach-v3]", "device=cuda"]
    assert main(["eval", *settings]) == 2
    assert "device='cuda', but PyTorch" in " ".join(capsys.readouterr().err.split())


def test_imitation_refuses_a_folder_of_other_files_before_the_work(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sb3_vla.sft.imitation, "sft", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["sft", f"data={demonstrations}", f"output={tmp_path}", *SFT]) == 2
    assert "holds files that are no checkpoint" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_imitation_goes_on_to_the_same_weights(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(name: str) -> list[str]:
        return ["sft", f"data={demonstrations}", f"output={tmp_path / name}", "sft.checkpoint_interval=8", *SFT]

    assert main(command("whole")) == 0
    steps: list[int] = []
    imitate = sb3_vla.sft.imitation.sft

    def in_small_stretches(*arguments: Any, interrupt: bool, **options: Any) -> Any:
        def on_step(row: dict[str, float]) -> None:
            steps.append(int(row["step"]))
            if interrupt and row["step"] == 20:
                raise KeyboardInterrupt

        return imitate(*arguments, on_step=on_step, **options)

    for interrupt, status in ((True, 130), (False, 0)):
        monkeypatch.setattr(
            sb3_vla.sft.imitation, "sft", lambda *a, i=interrupt, **o: in_small_stretches(*a, interrupt=i, **o)
        )
        assert main(command("broken")) == status
    assert steps == [*range(1, 21), *range(17, 25)]
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_imitation_after_the_step_with_a_checkpoint(
    number: signal.Signals, status: int, demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    imitate = sb3_vla.sft.imitation.sft

    def watched(*arguments: Any, **options: Any) -> Any:
        def on_step(row: dict[str, float]) -> None:
            steps.append(int(row["step"]))
            if steps == [1, 2, 3, 4, 5]:
                os.kill(os.getpid(), number)

        return imitate(*arguments, on_step=on_step, **options)

    command = ["sft", f"data={demonstrations}", *SFT]
    assert main([*command, f"output={tmp_path / 'whole'}"]) == 0
    monkeypatch.setattr(sb3_vla.sft.imitation, "sft", watched)
    assert main([*command, f"output={tmp_path / 'broken'}"]) == status
    assert main([*command, f"output={tmp_path / 'broken'}"]) == 0
    assert steps == [*range(1, 25)]
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize("command", ["collect", "eval"])
def test_sigterm_ends_what_has_no_checkpoint_at_once(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, _ = COMMANDS[command]

    def run(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setitem(COMMANDS, command, (kind, run))
    assert main([command]) == 143
    assert "the same command starts again" in " ".join(capsys.readouterr().out.split())


# --- What a second start does ----------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """In place of each training: whether it goes on. Its result tells how many there were before."""
    calls: list[tuple[str, bool]] = []

    def train(run: RunDirectory, name: str, training: Any, *, output: Path, resume: bool, **_: Any) -> None:
        with run.checkpoint(name, training.total_decisions) as folder:
            (folder / "state").write_text("")
        run.append_metrics({"stage": name, "start": len(calls)})
        output.mkdir(exist_ok=True)
        (output / "result").write_text(f"{len(calls)}")
        calls.append((name, resume))

    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr(launch, "_to_rehearse", lambda *_: None)
    return calls


REHEARSING = ["algorithm.rehearsal_coef=1", "trials=0"]
CIRCUMSTANCES = [
    *("env.train.num_workers=2", "runner.keep_checkpoints=null", "runner.save_interval=7", "renderer=software"),
    *("actor.micro_batch_size=8", "actor.model.gradient_checkpointing=true"),
]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_what_does_not_decide_the_result_begins_nothing_anew(
    algorithm: str,
    checkpoint: Path,
    demonstrations: Path,
    trained: list[tuple[str, bool]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Paths as they are written, where things lie, and how they run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(demonstrations, tmp_path / "data")

    def train(*settings: str, run: str = "r", start: str = "checkpoint", data: str = "data") -> int:
        given = [f"run={run}", f"checkpoint={start}", f"data.path={data}", *REHEARSING]
        return main(["train", algorithm, *given, *settings])

    assert train() == 0
    for path in ("./r", str(tmp_path / "r"), "~/r", "r/../r/"):
        assert train(run=path) == 0
    for start in ("./checkpoint", str(checkpoint), "~/checkpoint"):
        assert train(start=start) == 0
    shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.copytree(tmp_path / "data", tmp_path / "moved data")
    assert train(start="copy", data="./moved data") == 0
    for setting in CIRCUMSTANCES:
        assert train(setting) == 0
    assert trained == [(algorithm, False)]
    assert RunDirectory("r").metrics() == [{"stage": algorithm, "start": 0}] and not (tmp_path / "~").exists()
    assert train("iterations=61") == 0 and trained[-1] == (algorithm, True)
    assert not (tmp_path / "r" / "replaced").exists()


@pytest.mark.parametrize("changed", ["seed", "checkpoint", "data", "tasks", "length", "view"])
def test_what_decides_the_result_moves_the_earlier_one_aside(
    changed: str, checkpoint: Path, demonstrations: Path, trained: list[tuple[str, bool]], tmp_path: Path
) -> None:
    data = shutil.copytree(demonstrations, tmp_path / "data")
    command = ["train", "ppo", f"run={tmp_path / 'r'}", f"checkpoint={checkpoint}", f"data.path={data}"]
    command += REHEARSING
    assert main(command) == 0
    if changed == "checkpoint":
        save_checkpoint(checkpoint, tiny_model(action_horizon=4))
    if changed == "data":
        stats = data / "meta" / "stats.json"
        stats.write_text(stats.read_text().replace("0", "1", 1))
    settings = {
        "seed": "seed=1",
        "tasks": "tasks=[reach-v3]",
        "length": "iterations=59",
        "view": "crop=workspace",
    }.get(changed)
    with pytest.warns(UserWarning, match="ppo has other settings than before"):
        assert main([*command, *([settings] if settings else [])]) == 0
    assert trained == [("ppo", False)] * 2
    assert (tmp_path / "r" / "ppo" / "result").read_text() == "1"
    assert (tmp_path / "r" / "replaced" / "ppo-1" / "ppo" / "result").read_text() == "0"


def test_imitation_is_neither_repeated_nor_overwritten(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a link, to what it points to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big disk")
    command = ["sft", f"data={demonstrations}", "output=link", *SFT, "sft.steps=2"]
    weights = tmp_path / "big disk" / "model.safetensors"
    assert main(command) == 0
    first = weights.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sb3_vla.sft.imitation, "sft", lambda *_, **__: pytest.fail("it began"))
        for setting in ("sft.device=cpu", "sft.checkpoint_interval=7", "sft.validation_interval=7"):
            assert main([*command, "output=big disk", setting]) == 0
            assert "big disk is complete" in " ".join(capsys.readouterr().out.split())
        assert main([*command, "sft.seed=1"]) == 2
        assert "made with other settings; choose another output" in " ".join(capsys.readouterr().err.split())
    assert weights.read_bytes() == first
    assert main([*command, "sft.seed=1", "overwrite=true"]) == 0
    assert weights.read_bytes() != first and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["big disk", "link"]


def test_imitations_into_one_folder_wait_for_each_other(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second one begins when the first has ended, or ends without touching what the first has under way."""
    monkeypatch.chdir(tmp_path)
    command = ["sft", f"data={demonstrations}", "output=s", *SFT, "sft.steps=2"]
    hold, status = sb3_vla.runs.directory._hold, []

    def holding(folder: Path) -> Any:
        monkeypatch.setattr(sb3_vla.runs.directory, "_hold", hold)
        status.append(main([*command, "sft.seed=1"]))  # another process, which has the folder until it has ended
        return hold(folder)

    monkeypatch.setattr(sb3_vla.runs.directory, "_hold", holding)
    assert main(command) == 2 and status == [0]
    assert "made with other settings" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "sft.seed=1"]) == 0  # which is complete
    with RunDirectory(".s.unfinished", {}) as other:  # as of another process
        monkeypatch.setattr(sb3_vla.runs.directory, "_PATIENCE_SECONDS", 0.0)
        other.write_json("state.json", {})
        main([*command, "sft.seed=1"])
        assert (other.path / "state.json").exists()


def test_imitation_into_the_working_directory_goes_on_too(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sft", f"data={demonstrations}", "output=.", *SFT, "sft.steps=4"]
    imitate, steps = sb3_vla.sft.imitation.sft, []

    def stopping(*arguments: Any, **options: Any) -> Any:
        def on_step(row: dict[str, float]) -> None:
            steps.append(int(row["step"]))
            if steps == [1, 2]:
                os.kill(os.getpid(), signal.SIGTERM)

        return imitate(*arguments, on_step=on_step, **options)

    monkeypatch.setattr(sb3_vla.sft.imitation, "sft", stopping)
    assert main(command) == 143
    assert main(command) == 0
    assert steps == [1, 2, 3, 4] and sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("command", ["collect", "sft", "train", "eval"])
def test_a_home_directory_is_expanded_in_every_setting(
    command: str,
    checkpoint: Path,
    demonstrations: Path,
    trained: list[tuple[str, bool]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "home"
    shutil.copytree(checkpoint, home / "start")
    shutil.copytree(demonstrations, home / "data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    short = ["tasks=[drawer-close-v3]"]
    settings = {
        "collect": ["output=~/new", *short, "episodes_per_task=1", "image_size=32"],
        "sft": ["data=~/data", "output=~/new", *SFT, "sft.steps=1"],
        "train": [
            "ppo",
            "checkpoint=~/start",
            "run=~/new",
            "data.path=~/data",
            "algorithm.rehearsal_coef=1",
            "trials=0",
        ],
        "eval": ["checkpoint=~/start", "output=~/new/r.json", "videos=~/films", "trials_per_task=1", *short],
    }[command]
    assert main([command, *settings]) == 0
    assert (home / "new").is_dir() and (command != "eval" or list((home / "films").glob("*.mp4")))
    assert not (tmp_path / "~").exists()


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, KeyError])
def test_a_fault_of_ours_keeps_its_traceback(
    error: type[Exception],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def mistaken(*_: Any, **__: Any) -> None:
        raise error("a [mistake]")

    monkeypatch.setattr(launch, "train", mistaken)
    command = ["train", "ppo", "trials=0", f"checkpoint={checkpoint}", f"run={tmp_path / 'run'}"]
    assert main(command) == 2
    told = capsys.readouterr().err
    kept = tmp_path / "run" / "traceback.txt"
    assert len(told.splitlines()) == 1 and f"error: {error.__name__}: " in told and "a [mistake]" in told
    assert f"its traceback is in {kept}" in told and "--traceback" in told
    assert "in mistaken" in kept.read_text()
    assert main([*command, "--traceback"]) == 2
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told and "in mistaken" in told


def test_a_fault_without_a_run_directory_has_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistaken(*_: Any) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(COMMANDS, "eval", (COMMANDS["eval"][0], mistaken))
    assert main(["eval"]) == 2
    (kept,) = tmp_path.iterdir()
    assert f"its traceback is in {kept}" in capsys.readouterr().err and "in mistaken" in kept.read_text()


def test_what_follows_a_signal_is_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of somebody else may be the signal's consequence; a full disk is none."""
    faults = iter([RuntimeError("a worker [died]\nof it"), RunError("cannot write x: No space left on device")])

    def train(*_: Any, **__: Any) -> None:
        with stop_request():
            os.kill(os.getpid(), signal.SIGTERM)
            raise next(faults)

    monkeypatch.setattr(launch, "train", train)
    command = ["train", "ppo", "trials=0", f"checkpoint={checkpoint}", f"run={tmp_path / 'run'}"]
    assert main(command) == 143
    told = capsys.readouterr().out.strip()
    assert "\ninterrupted by SIGTERM, after which this happened: RuntimeError: a worker [died]; the same" in told
    assert "of it" in (tmp_path / "run" / "traceback.txt").read_text()
    assert main(command) == 2
    assert capsys.readouterr().err.strip() == "error: cannot write x: No space left on device"
