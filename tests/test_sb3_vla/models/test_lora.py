"""Adapters, a backbone in bfloat16, and compiled towers: what they change, and what they must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import TINY, ToyEnv, stir, toy_observation, toy_vec
from toy_pi0 import HEADS, TINY_PI0, P, X, reference_model, tiny_tokenizer, write_layout

from sb3_vla import PPO
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.checkpoints.formats.pi0 import save_lerobot
from sb3_vla.distributions.base import integrate
from sb3_vla.models import CompactVLA, VLAModel
from sb3_vla.models.lora import LoRA, adapted_layers, add_lora, make_lora, merged_state, prepare_training


def velocity(model: VLAModel) -> torch.Tensor:
    """What it predicts for fixed noise."""
    observation = toy_observation(2, image_size=model.image_size[0])
    x = torch.randn(2, model.action_horizon, model.latent_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.denoise(model.encode(observation), x, torch.tensor([0.3, 0.9]))


def pi0(tmp_path: Path, name: str = "pi0", **options: Any) -> VLAModel:
    return reference_model(name, tokenizer=str(tiny_tokenizer(tmp_path / "tokenizer")), prompt_tokens=20, **options)


def ppo(checkpoint: Path | None, model_kwargs: dict[str, Any], **policy_kwargs: Any) -> PPO:
    source = {"model": "pi0"} if checkpoint is None else {"checkpoint": str(checkpoint)}
    kwargs = {**source, "model_kwargs": model_kwargs, "distribution": "flow_sde", **policy_kwargs}
    envs = toy_vec(image_size=64, chunk=5, action_dim=4)
    return PPO("VLAPolicy", envs, n_steps=4, batch_size=8, n_epochs=1, seed=0, device="cpu", policy_kwargs=kwargs)


def test_an_adapter_adds_nothing_at_first_and_merges_to_what_it_adds_later(tmp_path: Path) -> None:
    """The merged weights are W + alpha / rank B A, computed here by hand, and act as the model with adapters."""
    model = pi0(tmp_path)
    before, names = velocity(model), set(model.state_dict())
    model.set_trainable("lora")
    adapted = add_lora(model, LoRA(rank=2, alpha=6.0))
    assert torch.equal(velocity(model), before)
    layers = adapted_layers(model)
    assert set(layers) == set(adapted) and f"{P}model.vision_tower.vision_model.encoder.layers.0.mlp.fc1" in layers
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        layer.lora_B["default"].weight.data.normal_(0, 0.1, generator=generator)
    after = velocity(model)
    assert (after - before).abs().max() > 1e-3
    state = merged_state(model)
    assert set(state) == names
    name = f"{X}model.layers.1.mlp.up_proj"
    layer = layers[name]
    by_hand = layer.base_layer.weight + 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(state[f"{name}.weight"], by_hand)
    plain = pi0(tmp_path)
    plain.load_state_dict(state)
    torch.testing.assert_close(velocity(plain), after, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("part", "in_backbone", "beside"), [("backbone", True, False), ("expert", False, True)])
def test_parts(tmp_path: Path, part: str, in_backbone: bool, beside: bool) -> None:
    model = pi0(tmp_path)
    model.set_trainable("lora")
    names = add_lora(model, make_lora({"part": part, "layers": ["q_proj", "v_proj"]}))
    assert all(name.endswith(("q_proj", "v_proj")) for name in names)
    assert any(name.startswith(P) for name in names) == in_backbone
    assert any(name.startswith(X) for name in names) == beside
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{ab}.default.weight" for n in names for ab in "AB"}


def test_the_expert_in_full_and_adapters_in_the_backbone(tmp_path: Path) -> None:
    model = pi0(tmp_path, "pi05")
    prepare_training(model, "expert", lora={"rank": 2})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained if name.startswith(P))
    assert f"{X}model.layers.0.mlp.up_proj.weight" in trained and not any(".lora_" in n for n in trained if X in n)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    model = CompactVLA(**TINY)
    with pytest.raises(ValueError, match=r"No linear layer of CompactVLA for lora part='all'.*trainable=\"lora\""):
        add_lora(model, LoRA())
    with pytest.raises(ValueError, match="rank=0; expected at least 1"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="Unknown lora option 'ranks'"):
        make_lora({"ranks": 3})
    with pytest.raises(ValueError, match="Unknown lora part='experts'"):
        make_lora({"part": "experts"})
    model.set_trainable("lora")
    add_lora(model, LoRA(rank=1))
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, LoRA(rank=1))
    with pytest.raises(ValueError, match=r"CompactVLA reads its backbone in float32.*frozen_bf16=True"):
        prepare_training(CompactVLA(**TINY), "expert", frozen_bf16=True)
    with pytest.raises(ValueError, match="frozen_bf16=True is for a frozen backbone"):
        prepare_training(pi0(tmp_path), "all", frozen_bf16=True)
    with pytest.raises(ValueError, match=r"cache_perception=True keeps what changes.*lora"):
        ppo(None, {**TINY_PI0, "tokenizer": str(tiny_tokenizer(tmp_path))}, trainable="lora", cache_perception=True)


def test_ppo_with_adapters(tmp_path: Path) -> None:
    """The first ratio is one; frozen weights stay; the saved algorithm has adapters alone, and acts the same again."""
    folder = write_layout(tmp_path / "a", "pi0", "lerobot 0.4")
    options = {**HEADS, "tokenizer": str(tiny_tokenizer(tmp_path / "t"))}
    algorithm = ppo(folder, options, trainable="lora", lora={"rank": 2}, frozen_bf16=True, gradient_checkpointing=True)
    model = algorithm.policy.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    algorithm.learn(8)
    assert algorithm.logger.name_to_value["actor/approx_kl"] == pytest.approx(0, abs=1e-6)  # one minibatch, one epoch
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(".lora_B." in key for key in changed)  # at first A has no gradient, as B is zero
    assert any(key.startswith(P) for key in changed) and any(key.startswith(X) for key in changed)
    observation, _ = ToyEnv(image_size=64, chunk=5, action_dim=4).reset(seed=0)
    action, _ = algorithm.predict(observation, deterministic=True)
    algorithm.save(tmp_path / "model.zip")
    saved = {key for key in algorithm.policy.state_dict() if key.startswith("model.")}
    buffers = {f"model.{key}" for key, _ in model.named_buffers()}
    assert saved - buffers and all(".lora_" in key for key in saved - buffers)
    again = PPO.load(tmp_path / "model.zip", device="cpu")
    assert np.array_equal(again.predict(observation, deterministic=True)[0], action)
    save_lerobot(tmp_path / "b", model)  # type: ignore[arg-type]
    save_checkpoint(tmp_path / "c", model)
    merged = [load_checkpoint(tmp_path / "b", options).model, load_checkpoint(tmp_path / "c").model]
    assert all(not adapted_layers(one) for one in merged)
    torch.testing.assert_close(velocity(merged[0]), velocity(merged[1]), rtol=0, atol=1e-6)


def test_adapters_are_not_sharded(tmp_path: Path) -> None:
    policy_kwargs: dict[str, Any] = {
        "model": "pi0",
        "model_kwargs": {**TINY_PI0, "tokenizer": str(tiny_tokenizer(tmp_path)), "prompt_tokens": 40},
        "distribution": "flow_sde",
        "trainable": "lora",
    }
    env = toy_vec(2, image_size=64, chunk=5, action_dim=4)
    with pytest.raises(ValueError, match=r"sharding='fsdp' does not take adapters.*use sharding='none'"):
        PPO("VLAPolicy", env, n_steps=4, batch_size=4, device="cpu", sharding="fsdp", policy_kwargs=policy_kwargs)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_a_backbone_in_bfloat16(tmp_path: Path, name: str) -> None:
    """Actions within 1e-2, relative to their size, of those in float32; the expert, norms and embeddings stay so."""
    model = pi0(tmp_path, name)
    observation = toy_observation(4, image_size=56)
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = integrate(model, model.encode(observation), x, 5)
        prepare_training(model, "expert", frozen_bf16=True)
        found = integrate(model, model.encode(observation), x, 5)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < 1e-2
    types = {key: p.dtype for key, p in model.named_parameters()}
    assert types[f"{P}model.language_model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert types[f"{P}model.language_model.norm.weight"] == torch.float32
    tower = f"{P}model.vision_tower.vision_model."
    seen = {key for key, kind in types.items() if key.startswith(tower) and kind == torch.float32}
    parts = ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")
    assert seen == {f"{tower}embeddings.{part}" for part in parts}
    assert {kind for key, kind in types.items() if not key.startswith(P)} == {torch.float32}


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_compiled_towers_act_and_are_saved_alike(tmp_path: Path, name: str) -> None:
    model = pi0(tmp_path, name)
    save_checkpoint(tmp_path / "plain", model)
    before, names = velocity(model), list(model.state_dict())
    model.compile_towers({"backend": "aot_eager"})
    for tower in (model.language_model, model.expert):  # each is one graph, which can be replayed
        tower.compile(backend="aot_eager", dynamic=False, fullgraph=True)  # type: ignore[operator]
    found = velocity(model)
    torch.testing.assert_close(found, before, rtol=0, atol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert list(model.state_dict()) == names
    save_checkpoint(tmp_path / "compiled", model)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", "compiled")]
    assert files[0] == files[1]


def test_a_compiled_policy_trains(tmp_path: Path) -> None:
    options = {**TINY_PI0, "tokenizer": str(tiny_tokenizer(tmp_path)), "prompt_tokens": 40}
    states = []
    for settings in (None, {"backend": "eager"}):
        algorithm = ppo(None, options, compile=settings)
        stir(algorithm.policy)
        algorithm.learn(8)
        states.append(algorithm.policy.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=2e-5)
