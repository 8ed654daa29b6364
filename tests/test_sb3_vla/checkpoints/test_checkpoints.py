"""Checkpoint folders: bit-exact round trip, one clear error for each way to be broken, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from published import assert_told_without_weights
from safetensors.torch import load_file, save_file
from toy import ToyEnv, tiny_model, toy_observation, toy_ppo

from sb3_vla import PPO
from sb3_vla.checkpoints import checkpoint_digest, load_checkpoint, native, save_checkpoint, weights
from sb3_vla.checkpoints.identity import checkpoint_identity
from sb3_vla.distributions.flow_sde import FlowSDE
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.value_head import ValueHead
from sb3_vla.policies.vla_policy import VLAPolicy


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint", tiny_model(), notes={"step": 7})
    return tmp_path / "checkpoint"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor], drop: str | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in {**tensors, **changes}.items() if k != drop}, folder / "model.safetensors")


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model, value_head = tiny_model(action_horizon=3), ValueHead(7, 2, 8)
    model.set_statistics({"action_mean": torch.randn(4), "state_std": torch.rand(4) + 0.1})
    save_checkpoint(tmp_path / "a" / "b", model, value_head, {"sft": {"steps": 3}})
    loaded = load_checkpoint(tmp_path / "a" / "b")
    assert loaded.model_name == "compact" and loaded.notes == {"sft": {"steps": 3}}
    assert loaded.model.config == model.config
    expected = model.state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert loaded.value_head is not None
    assert all(torch.equal(loaded.value_head[key], value) for key, value in value_head.state_dict().items())
    observation = toy_observation(2)
    assert torch.equal(loaded.model.encode(observation).features, model.encode(observation).features)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]


def test_without_a_critic(saved: Path) -> None:
    assert load_checkpoint(saved).value_head is None


def test_a_checkpoint_replaces_the_one_before(saved: Path) -> None:
    model = tiny_model(action_horizon=2)
    for _ in range(3):
        save_checkpoint(saved, model)
    loaded = load_checkpoint(saved)
    assert loaded.model.action_horizon == 2 and loaded.notes == {}
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="no checkpoint"):
        save_checkpoint(tmp_path, tiny_model())
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    save_checkpoint(tmp_path / "new", tiny_model())
    load_checkpoint(tmp_path / "new")


@pytest.mark.parametrize("broken", ["save_file", "os.replace", "second os.replace"])
def test_an_interrupted_write_keeps_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = load_checkpoint(saved)
    real_replace, calls = native.os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += source.is_dir()  # not of the files in it
        if calls == (2 if broken.startswith("second") else 1):
            raise KeyboardInterrupt
        real_replace(source, target)

    def save(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        if broken == "save_file":
            patch.setattr(weights, "save_file", save)
        else:
            patch.setattr(native.os, "replace", replace)
        with pytest.raises((OSError, KeyboardInterrupt)):
            save_checkpoint(saved, tiny_model(action_horizon=2))
    after = load_checkpoint(saved)
    assert after.notes == before.notes == {"step": 7}
    assert after.model.action_horizon == before.model.action_horizon
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint"]
    save_checkpoint(saved, tiny_model(action_horizon=2))
    assert load_checkpoint(saved).model.action_horizon == 2


def test_what_a_killed_writer_left_does_not_stop_the_next(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it could clear up
        save_checkpoint(saved, tiny_model(action_horizon=2))
    for horizon in (3, 4):
        save_checkpoint(saved, tiny_model(action_horizon=horizon))
        assert load_checkpoint(saved).model.action_horizon == horizon


def test_the_policy_acts_by_the_distribution_it_was_trained_with(tmp_path: Path) -> None:
    options = {"denoising_steps": 7, "noise_level": 0.25}
    save_checkpoint(tmp_path / "a", tiny_model(), distribution=("flow_sde", options))
    assert load_checkpoint(tmp_path / "a").distribution == ("flow_sde", options)
    found = load_policy(tmp_path / "a").distribution
    assert isinstance(found, FlowSDE) and (found.denoising_steps, found.noise_level) == (7, 0.25)
    save_checkpoint(tmp_path / "a", tiny_model())
    assert load_checkpoint(tmp_path / "a").distribution is None
    assert load_policy(tmp_path / "a").distribution.denoising_steps == 2


@pytest.mark.parametrize(
    ("name", "options"), [("flow_noise", {"noise_range": (0.05, 0.2)}), ("gaussian", {"learn_std": True, "std": 0.3})]
)
def test_what_a_distribution_learned_is_kept(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """With the name and options that it was learned with; with others it starts anew."""
    trained = tiny_model()
    save_checkpoint(tmp_path / "a", trained)
    env = ToyEnv(chunk=5, action_dim=4)

    def policy(**choice: Any) -> VLAPolicy:
        return VLAPolicy(env.observation_space, env.action_space, lambda _: 1e-3, checkpoint=tmp_path / "a", **choice)

    first = policy(distribution=name, distribution_kwargs=options)
    fresh = {key: value.clone() for key, value in first.distribution.state_dict().items()}
    for parameter in first.distribution.parameters():
        torch.nn.init.normal_(parameter)
    learned = first.distribution.state_dict()
    save_checkpoint(tmp_path / "a", trained, None, {}, (name, options), first.distribution)
    for found in (policy(distribution=name, distribution_kwargs=options), load_policy(tmp_path / "a")):
        state = found.distribution.state_dict()
        assert state.keys() == learned.keys() and all(torch.equal(state[key], learned[key]) for key in learned)
    other = policy(distribution=name, distribution_kwargs={**options, "denoising_steps": 3}).distribution.state_dict()
    last = list(fresh)[-1]
    assert torch.equal(other[last], fresh[last]) and not torch.equal(other[last], learned[last])
    save_checkpoint(tmp_path / "a", trained, distribution=(name, options))  # as one without the weights
    assert load_checkpoint(tmp_path / "a").distribution_weights is None
    assert torch.equal(load_policy(tmp_path / "a").distribution.state_dict()[last], fresh[last])


@pytest.mark.parametrize("key", ["type", "model_type"])
def test_a_layout_that_nothing_reads(tmp_path: Path, key: str) -> None:
    """Said before weights are looked for, which may have other names."""
    (tmp_path / "config.json").write_text(json.dumps({key: "act"}))
    with pytest.raises(
        ValueError, match=r"says that it is 'act'.*expected diffusion, llava_pythia, openvla, pi0, pi05, smolvla"
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("entry", [5, ["gaussian"], ["gaussian", 5], {"gaussian": {}}])
def test_a_distribution_that_is_none(saved: Path, entry: Any) -> None:
    edit_config(saved, distribution=entry)
    with pytest.raises(ValueError, match=r"is no sb3_vla checkpoint configuration"):
        load_checkpoint(saved)


def test_a_digest_tells_checkpoints_apart(saved: Path) -> None:
    first = checkpoint_digest(saved)
    assert checkpoint_digest(saved) == first
    save_checkpoint(saved, tiny_model(), notes={"step": 8})
    assert checkpoint_digest(saved) != first
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        checkpoint_digest(saved.parent)


def test_a_digest_reads_a_little_at_a_time(saved: Path) -> None:
    save_file({"weights": torch.rand(8 * 2**20)}, saved / "model.safetensors")  # 32 MiB
    whole = (saved / "config.json").read_bytes() + (saved / "model.safetensors").read_bytes()
    expected = hashlib.sha256(whole).hexdigest()
    del whole
    tracemalloc.start()
    try:
        assert checkpoint_digest(saved) == expected
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_what_it_tells_needs_no_weights(tmp_path: Path) -> None:
    notes = {"sft": {"steps": 3}, "view": {"crop": "workspace"}}
    save_checkpoint(
        tmp_path / "own", tiny_model(action_horizon=3), notes=notes, distribution=("flow_sde", {"joint": True})
    )
    before = torch.get_rng_state()
    assert_told_without_weights(tmp_path / "own")
    torch.set_rng_state(before)
    load_checkpoint(tmp_path / "own", weights=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_writer_killed_between_its_two_renames_loses_nothing(saved: Path) -> None:
    saved.rename(saved.with_name(f".{saved.name}.old"))
    assert load_checkpoint(saved).notes == {"step": 7}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        load_checkpoint(saved)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected config\.json"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.fixture
def elsewhere(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with what may be taken for a checkpoint."""
    monkeypatch.chdir(tmp_path)
    toy_ppo().save("model.zip")
    torch.save({"a": torch.zeros(1)}, "weights.pt")
    (tmp_path / "run").mkdir()
    shutil.copytree(saved, tmp_path / "run" / "ppo")
    shutil.copytree(saved, tmp_path / "own")
    return tmp_path


SAVED_ALGORITHM = r"model.zip is an algorithm that was saved; .*PPO.load\('model.zip'\).*save_checkpoint\(folder"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.zip", SAVED_ALGORITHM),
        ("model", f"folder model does not exist.*{SAVED_ALGORITHM}"),
        ("weights.pt", "weights.pt is a file; a checkpoint is a folder with config.json"),
        ("own/model.safetensors", "is a file; a checkpoint is the folder with its config.json: own$"),
        ("run", r"run has no config.json; it holds \['ppo'\]. Give a checkpoint in it: run/ppo"),
        (
            "lerobot/smolvla_base",
            "lerobot/smolvla_base does not exist.*on the Hugging Face hub write hf://lerobot/smolvla_b",
        ),
        ("hf:lerobot/pi0@main", "hub write hf://lerobot/pi0@main"),
        ("https://huggingface.co/lerobot/pi0", "hub write hf://lerobot/pi0"),
        ("../nowhere", "hub write hf://owner/name"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(elsewhere: Path, given: str, message: str) -> None:
    for load in (load_checkpoint, load_policy):
        with pytest.raises(FileNotFoundError, match=message):
            load(given)  # type: ignore[operator]
    if given != "run":
        with pytest.raises(FileNotFoundError, match=message):
            checkpoint_digest(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "own",
            r"own is a checkpoint; PPO.load reads the file that PPO.save wrote.*'checkpoint': 'own'.*policy\('own'\)",
        ),
        ("run", "run is a folder; PPO.load reads the file .*; checkpoints in it are run/ppo"),
        (".", r"\. is a folder; .*there is model.zip; checkpoints in it are .*own"),
        ("hf://lerobot/pi0", "hf://lerobot/pi0 is a checkpoint; PPO.load reads the file"),
        ("lerobot/pi0", "no lerobot/pi0.zip; .*'checkpoint': 'hf://lerobot/pi0'"),
        ("nowhere", "nowhere"),
    ],
)
def test_what_is_no_saved_algorithm_says_what_it_is(elsewhere: Path, given: str, message: str) -> None:
    algorithm = toy_ppo()
    for path in (given, Path(given)) if "://" not in given else (given,):
        for load in (PPO.load, algorithm.set_parameters):
            with pytest.raises(OSError, match=message):
                load(path)  # type: ignore[operator]
    with pytest.raises(
        OSError, match=message.replace("PPO.load", "VLAPolicy.load").replace("PPO.save", "VLAPolicy.save")
    ):
        VLAPolicy.load(given)
    with pytest.raises(
        ValueError, match=r"model.zip is a saved algorithm; its policy is PPO.load\('model.zip'\).policy"
    ):
        VLAPolicy.load("model.zip")
    for path in ("model", "model.zip", elsewhere / "model.zip"):
        assert isinstance(PPO.load(path), PPO)
    with open("model.zip", "rb") as file:
        algorithm.set_parameters(file)


def test_missing_weight(saved: Path) -> None:
    edit_weights(saved, {}, drop="model.action_out.weight")
    with pytest.raises(ValueError, match=r"missing action_out\.weight"):
        load_checkpoint(saved)


def test_unexpected_weight(saved: Path) -> None:
    edit_weights(saved, {"model.lora": torch.zeros(1)})
    with pytest.raises(ValueError, match="unexpected lora"):
        load_checkpoint(saved)


def test_wrong_shape(saved: Path) -> None:
    edit_weights(saved, {"model.action_out.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"action_out\.bias has shape \(9,\), expected \(4,\)"):
        load_checkpoint(saved)


def test_weights_of_another_configuration(saved: Path) -> None:
    kwargs = json.loads((saved / "config.json").read_text())["model_kwargs"]
    edit_config(saved, model_kwargs={**kwargs, "action_horizon": 9})
    with pytest.raises(ValueError, match=r"action_position has shape \(5, 64\), expected \(9, 64\)"):
        load_checkpoint(saved)


@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_truncated_weights(saved: Path, keep: int) -> None:
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_checkpoint(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x80"])
def test_damaged_configuration(saved: Path, text: str) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"config\.json (is no sb3_vla checkpoint configuration|is damaged|holds list)"
    ):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "sb3-vla-99"}, "format 'sb3-vla-99'; expected 'sb3-vla-2'"),
        ({"model": "compct"}, "Unknown model 'compct'; did you mean 'compact'"),
        ({"model_kwargs": {"wings": 2}}, "does not describe a 'compact' model.*wings"),
        ({"model_kwargs": [1]}, "does not describe a 'compact' model"),
        ({"model_kwargs": {"image_size": 33}}, "image_size=33"),
    ],
)
def test_other_configuration(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved)


def test_nothing_is_unpickled(saved: Path) -> None:
    """The folder holds JSON and safetensors alone; a pickle under the weights' name is refused."""
    torch.save({"model": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(saved)


def test_weights_in_half_the_size_are_read_as_float32(tmp_path: Path) -> None:
    model = tiny_model(hand_view={"size": 32})
    model.set_statistics({"action_mean": torch.full((4,), 1 / 3)})
    save_checkpoint(tmp_path / "whole", model)
    save_checkpoint(tmp_path / "half", model, bf16=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    half = load_checkpoint(tmp_path / "half").model.state_dict()
    for name, exact in load_checkpoint(tmp_path / "whole").model.state_dict().items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], exact, rtol=2**-8, atol=1e-30)
    assert torch.equal(half["action_mean"], model.action_mean)  # what numbers are normalized by is exact


def test_a_checkpoint_of_the_package_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_vla.checkpoints.folders.BOX", tmp_path / "box")
    monkeypatch.chdir(tmp_path)
    boxed, own = tiny_model(), tiny_model(action_horizon=7)
    save_checkpoint(tmp_path / "box" / "small", boxed)
    assert load_checkpoint("small").model.action_horizon == boxed.action_horizon
    assert checkpoint_digest("small") == checkpoint_digest(tmp_path / "box" / "small")
    assert checkpoint_identity("small") == checkpoint_digest("small")
    with pytest.raises(FileNotFoundError, match="With the package comes small"):
        load_checkpoint("smal")
    save_checkpoint(tmp_path / "small", own)  # a folder of one's own comes first
    assert load_checkpoint("small").model.action_horizon == 7
