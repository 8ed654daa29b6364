"""The command: what each part of it makes, what it refuses, and that imitation goes on after an interrupt."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import tiny_model

import sb3_vla.sft
from sb3_vla.checkpoints import save_checkpoint
from sb3_vla.cli import COMMANDS, main

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


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("eval", ["suite=MT11", "tasks=[reach-v3]"], "'MT11'"),
        ("eval", ["tasks=[hammer-v3]"], "'hammer-v3' is not in the train split of MT10"),
        ("eval", ["protocol=rlinf"], "'rlinf'"),
        ("eval", ["checkpoint=nowhere"], "nowhere does not exist"),
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
        return ["sft", f"data={demonstrations}", f"output={tmp_path / name}", "sft.checkpoint_interval=8", *SFT]

    assert main(command("whole")) == 0
    steps: list[int] = []
    imitate = sb3_vla.sft.sft

    def in_small_stretches(*arguments: Any, interrupt: bool, **options: Any) -> Any:
        def on_step(row: dict[str, float]) -> None:
            steps.append(int(row["step"]))
            if interrupt and row["step"] == 20:
                raise KeyboardInterrupt

        return imitate(*arguments, on_step=on_step, **options)

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
