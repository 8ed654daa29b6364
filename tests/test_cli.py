"""The command: what each part of it makes, what it refuses, and that imitation goes on after an interrupt."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import tiny_model, toy_demonstrations

import sb3_vla.demonstrations
import sb3_vla.evaluation
import sb3_vla.sft
import sb3_vla.training
from sb3_vla import VLAPolicy
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.cli import COMMANDS, main
from sb3_vla.evaluation import check_fit

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


class Captured(Exception):
    pass


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

    monkeypatch.setattr(sb3_vla.evaluation, "evaluate", evaluate)
    monkeypatch.setattr(sb3_vla.training, "SharedMemoryVecEnv", environments)
    monkeypatch.chdir(tmp_path)
    view = {"camera": "corner2", "crop": "workspace"}
    save_checkpoint("said", tiny_model(action_horizon=5), notes={"view": view})
    save_checkpoint("unsaid", tiny_model(action_horizon=5))
    where = ["output=result.json", "suite=MT10"] if command == "eval" else ["run=run"]
    with warnings.catch_warnings(record=True) as told, pytest.raises(Captured):
        warnings.simplefilter("always")
        main([command, "checkpoint=said", *where, *settings])
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
    monkeypatch.setattr(sb3_vla.demonstrations.Demonstrations, "load", lambda *_, **__: data)
    imitate = ["sft", "data=data", f"output={tmp_path / 'sft'}", *SFT, "sft.steps=1"]
    assert main([*imitate, "crop=workspace"]) == 0
    assert load_checkpoint(tmp_path / "sft").notes["view"] == {"camera": "corner2", "crop": "workspace"}
    if known:
        assert main([*imitate, "crop=full"]) == 2
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
        ("train", ["ppo.batch_size=60"], "batch_size=60 does not divide a rollout of"),
        ("train", ["data=demonstrations"], "set ppo.rehearsal_coef as well"),
        ("train", ["algorithm=grpo", "data=demonstrations"], "set grpo.rehearsal_coef as well"),
        ("train", ["algorithm=trpo"], "'trpo'"),
        ("train", ["ppo.iteratoins=3"], "ppo.iterations"),
        ("train", ["grpo.group_sise=3"], "grpo.group_size"),
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
        settings = [f"run={tmp_path / 'run'}", *settings]
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
    monkeypatch.setattr(sb3_vla.sft, "sft", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["sft", f"data={demonstrations}", f"output={tmp_path}", *SFT]) == 2
    assert "holds files that are no checkpoint" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_imitation_goes_on_to_the_same_weights(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(name: str) -> list[str]:
        return ["sft", f"data={demonstrations}", f"output={tmp_path / name}", *SFT]

    assert main(command("whole")) == 0
    steps: list[int] = []
    imitate = sb3_vla.sft.sft

    def in_small_stretches(*arguments: Any, interrupt: bool, **options: Any) -> Any:
        def on_step(row: dict[str, float]) -> None:
            steps.append(int(row["step"]))
            if interrupt and row["step"] == 20:
                raise KeyboardInterrupt

        return imitate(*arguments, checkpoint_interval=8, on_step=on_step, **options)

    for interrupt, status in ((True, 130), (False, 0)):
        monkeypatch.setattr(sb3_vla.sft, "sft", lambda *a, i=interrupt, **o: in_small_stretches(*a, interrupt=i, **o))
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
    imitate = sb3_vla.sft.sft

    def watched(*arguments: Any, **options: Any) -> Any:
        def on_step(row: dict[str, float]) -> None:
            steps.append(int(row["step"]))
            if steps == [1, 2, 3, 4, 5]:
                os.kill(os.getpid(), number)

        return imitate(*arguments, on_step=on_step, **options)

    command = ["sft", f"data={demonstrations}", *SFT]
    assert main([*command, f"output={tmp_path / 'whole'}"]) == 0
    monkeypatch.setattr(sb3_vla.sft, "sft", watched)
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
