"""pi0 and pi0.5 on a GPU: what is computed there is what a CPU computes, eager, compiled and in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy import SENTENCES, toy_observation, toy_vec
from toy_pi0 import TINY_PI0, P, X, reference_model, tiny_tokenizer

from sb3_vla import PPO
from sb3_vla.distributions.base import integrate
from sb3_vla.models import Pi0
from sb3_vla.models.lora import prepare_training

pytestmark = pytest.mark.gpu
both = pytest.mark.parametrize("name", ["pi0", "pi05"])
GRAPHS = {"mode": "reduce-overhead"}


def make_model(name: str, tmp_path: Path, **options: Any) -> Pi0:
    tokenizer = str(tiny_tokenizer(tmp_path / "tokenizer"))
    return reference_model(name, tokenizer=tokenizer, prompt_tokens=40, **options).requires_grad_(False)


def actions(model: Pi0, seed: int, device: str = "cuda") -> Tensor:
    observation = toy_observation(4, SENTENCES[seed % 2], seed=seed, image_size=56)
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.no_grad():
        context = model.encode({key: value.to(device) for key, value in observation.items()})
        return integrate(model, context, x, 5).cpu()


def test_pictures_are_those_of_pillow(tmp_path: Path) -> None:
    model = make_model("pi0", tmp_path, image_size=56)
    image = np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8)
    found = model.fit_image(torch.from_numpy(image).permute(2, 0, 1)[None].cuda())[0].permute(1, 2, 0)
    expected = np.asarray(Image.fromarray(image).resize((56, 56), Image.Resampling.BILINEAR))
    assert found.is_cuda and np.array_equal(found.cpu().numpy(), expected)


@both
def test_actions_are_those_of_a_cpu(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    expected = actions(model, 0, "cpu")
    torch.testing.assert_close(actions(model.cuda(), 0), expected, rtol=0, atol=1e-4)


@both
def test_bfloat16_is_near(name: str, tmp_path: Path) -> None:
    """Within 1e-2 of the size of the actions."""
    model = make_model(name, tmp_path).cuda()
    expected = actions(model, 0)
    prepare_training(model, "expert", frozen_bf16=True)
    with torch.autocast("cuda", torch.bfloat16):
        found = actions(model, 0)
    assert 0 < (found - expected).norm() / expected.norm() < 1e-2


@both
def test_graphs_replay_what_they_recorded(name: str, tmp_path: Path) -> None:
    """Other pictures and sentences in turns, long after the recording."""
    model = make_model(name, tmp_path).cuda()
    expected = [actions(model, seed) for seed in range(3)]
    model.compile_towers(GRAPHS)
    for _ in range(4):
        for seed in range(3):
            torch.testing.assert_close(actions(model, seed), expected[seed], rtol=0, atol=1e-4)


@both
@pytest.mark.parametrize("compile", [None, GRAPHS])
@pytest.mark.parametrize("cached", [False, True])
def test_ppo(name: str, compile: dict[str, Any] | None, cached: bool, tmp_path: Path) -> None:
    """In bfloat16, with gradients that add up over micro batches; the first ratio is one, the expert alone changes."""
    algorithm = PPO(
        "VLAPolicy",
        toy_vec(image_size=64, chunk=5, action_dim=4),
        n_steps=8,
        batch_size=16,
        n_epochs=1,
        micro_batch_size=4,
        seed=0,
        device="cuda",
        bf16=True,
        policy_kwargs={
            "model": name,
            "model_kwargs": {**TINY_PI0, "tokenizer": str(tiny_tokenizer(tmp_path)), "prompt_tokens": 40},
            "distribution": "flow_sde",
            "frozen_bf16": True,
            "compile": compile,
            "cache_perception": cached,
        },
    )
    before = {key: value.clone() for key, value in algorithm.policy.model.state_dict().items()}
    for _ in range(3):  # the third replays what the second recorded
        algorithm.learn(16, reset_num_timesteps=False)
        assert algorithm.logger.name_to_value["actor/approx_kl"] == pytest.approx(0, abs=1e-6)
        assert algorithm.logger.name_to_value["train/skipped_steps"] == 0
    after = algorithm.policy.model.state_dict()
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert f"{X}model.layers.2.mlp.up_proj.weight" in changed and not any(key.startswith(P) for key in changed)


@both
def test_gradients_of_graphs_add_up(name: str, tmp_path: Path) -> None:
    """What a graph gave is overwritten when it is replayed, so each gradient has to be copied before that."""
    sums = []
    for compiled in (False, True):
        model = make_model(name, tmp_path).cuda()
        prepare_training(model, "expert", compile=GRAPHS if compiled else None)
        for _ in range(4):
            model.zero_grad()
            for seed in range(3):
                observation = {k: v.cuda() for k, v in toy_observation(4, seed=seed, image_size=56).items()}
                x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(seed)).cuda()
                t = torch.full((4,), 0.5, device="cuda")
                model.denoise(model.encode(observation), x, t).square().mean().backward()
        sums.append({key: p.grad.cpu() for key, p in model.named_parameters() if p.grad is not None})
    assert sums[0].keys() == sums[1].keys()
    for key, value in sums[0].items():
        torch.testing.assert_close(sums[1][key], value, rtol=1e-3, atol=1e-5)
