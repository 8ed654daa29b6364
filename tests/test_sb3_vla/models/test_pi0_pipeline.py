"""A tiny pi0 and pi0.5, as others publish them, through everything: imitation, PPO, GRPO, evaluation, LeRobot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_observation
from toy_pi0 import HEADS, LAYOUTS, TRANSFORMERS, P, X, tiny_tokenizer, write_layout
from trainings import grpo as make_grpo
from trainings import ppo as make_ppo

from sb3_vla.checkpoints import load_checkpoint
from sb3_vla.checkpoints.formats.pi0 import save_lerobot
from sb3_vla.cli.main import main
from sb3_vla.data.collecting import collect
from sb3_vla.data.demonstrations import Demonstrations
from sb3_vla.evaluation.evaluation import evaluate
from sb3_vla.evaluation.protocols import Protocol
from sb3_vla.models import VLAModel
from sb3_vla.policies.loading import load_policy
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.training import train
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig

QUICK = {("pi0", "lerobot 0.4"), ("pi05", "openpi")}
TASK = "reach-v3"
SHORT = Protocol("short", horizon=10, action_chunk=5, settle_steps=15)
SHARED: dict[str, Any] = {
    "num_envs": 2,
    "num_workers": 1,
    "horizon": 10,
    "batch_size": 4,
    "n_epochs": 1,
    "learning_rate": 1e-3,
    "actor_warmup": 0,
    "target_kl": None,
    "trainable": "expert",
    "distribution": "flow_sde",
    "distribution_kwargs": {"denoising_steps": 2},
    "device": "cpu",
    "env": {"reward": "dense"},
}
CASES = [
    pytest.param(name, layout, marks=() if (name, layout) in QUICK else pytest.mark.slow)
    for name in ("pi0", "pi05")
    for layout in LAYOUTS
]
CASES.append(pytest.param("pi0", TRANSFORMERS, marks=pytest.mark.slow))  # which has no pi0.5


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Demonstrations:
    """An episode of the scripted expert in MetaWorld."""
    root = tmp_path_factory.mktemp("data") / "reach"
    collect(root, "MT1", tasks=[TASK], episodes_per_task=1, image_size=56, crop=None, num_workers=1, progress=False)
    return Demonstrations.load(root)


def weights(model: VLAModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: VLAModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_the_command_line_evaluates_a_published_checkpoint(tmp_path: Path) -> None:
    folder, output = write_layout(tmp_path / "published", "pi05", "lerobot"), tmp_path / "result.json"
    settings = [f"checkpoint={folder}", f"output={output}", "model_kwargs={vision: {heads: 4}}", "device=cpu"]
    assert main(["eval", *settings, "tasks=[reach-v3]", "trials_per_task=1", "protocol=rlinf-100"]) == 0
    assert TASK in output.read_text()


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_from_a_published_checkpoint_to_one(
    tmp_path: Path, demonstrations: Demonstrations, name: str, layout: str
) -> None:
    folder = write_layout(tmp_path / "published", name, layout)
    options = {**HEADS, "tokenizer": str(tiny_tokenizer(tmp_path / "tokenizer"))}
    start = load_checkpoint(folder, options).model
    before = weights(start)

    imitation = SFTConfig(
        checkpoint=str(folder), model_kwargs=options, steps=2, batch_size=4, warmup_steps=0, device="cpu", bf16=False
    )
    result = sft(demonstrations, imitation, output=tmp_path / "sft", progress=False)
    assert all(torch.isfinite(torch.tensor(row["train_loss"])) for row in result.history)
    imitated = load_checkpoint(tmp_path / "sft").model
    moved = changed(imitated, before)
    assert f"{X}model.layers.0.mlp.up_proj.weight" in moved and not any(key.startswith(P) for key in moved)

    before = weights(imitated)
    ppo = make_ppo(iterations=1, n_steps=2, critic_warmup=0, **SHARED)
    run = RunDirectory(tmp_path / "run", {})
    train(
        run,
        "ppo",
        ppo,
        checkpoint=tmp_path / "sft",
        output=tmp_path / "ppo",
        suite="MT1",
        tasks=[TASK],
        progress=False,
    )
    after_ppo = load_checkpoint(tmp_path / "ppo")
    moved = changed(after_ppo.model, before)
    assert "action_out_proj.weight" in moved and not any(key.startswith(P) for key in moved)

    before = weights(after_ppo.model)
    grpo = make_grpo(total_decisions=4, group_size=2, n_groups=1, max_groups=1, **SHARED)
    train(
        run,
        "grpo",
        grpo,
        checkpoint=tmp_path / "ppo",
        output=tmp_path / "grpo",
        suite="MT1",
        tasks=[TASK],
        progress=False,
    )
    loaded = load_checkpoint(tmp_path / "grpo")
    moved = changed(loaded.model, before)
    assert "action_out_proj.weight" in moved and not any(key.startswith(P) for key in moved)

    found = evaluate(
        load_policy(tmp_path / "grpo", 5),
        tasks=[TASK],
        trials_per_task=1,
        protocol=SHORT,
        num_envs=1,
        num_workers=1,
        progress=False,
    )
    assert len(found.trials) == 1

    observation = toy_observation(2, image_size=56)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.4, 0.8])
    with torch.no_grad():
        ours = loaded.model.denoise(loaded.model.encode(observation), x, time)
    save_lerobot(tmp_path / "lerobot", loaded.model)  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "grpo")
    again = load_checkpoint(tmp_path / "lerobot", options).model
    assert not changed(again, weights(loaded.model))
    with torch.no_grad():
        theirs = again.denoise(again.encode(observation), x, time)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
