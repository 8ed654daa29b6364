"""pi0 and pi0.5 in every published layout: the same model from each, written ones read back, and clear refusals."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import assert_told_without_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import ToyEnv, toy_demonstrations, toy_observation, toy_vec
from toy_pi0 import (
    DATA,
    HEADS,
    LAYOUTS,
    NAMES,
    STATISTICS,
    TINY_PI0,
    P,
    X,
    reference_model,
    reference_vectors,
    reference_weights,
    rlinf_heads,
    tiny_tokenizer,
    transformers_pi0,
    write_json,
    write_layout,
)

from sb3_vla import GRPO, PPO
from sb3_vla.checkpoints import checkpoint_digest, load_checkpoint, save_checkpoint
from sb3_vla.checkpoints.formats.pi0 import (
    TIED,
    canonical_name,
    load_pi0,
    save_lerobot,
    save_openpi,
    sizes_beside_the_published,
)
from sb3_vla.distributions.base import integrate
from sb3_vla.distributions.flow_noise import FlowNoise
from sb3_vla.models import Pi0, Pi05
from sb3_vla.models.prompts import local_tokenizer_file
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.vla_policy import VLAPolicy
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig

both = pytest.mark.parametrize("name", ["pi0", "pi05"])


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return str(tiny_tokenizer(tmp_path / "paligemma"))


def weights_of(model: Pi0) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def assert_same_weights(found: Pi0, expected: Pi0) -> None:
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def edit(path: Path, drop: tuple[str, ...] = (), **changes: Tensor) -> None:
    tensors = load_file(path)
    save_file({key: value for key, value in {**tensors, **changes}.items() if key not in drop}, path)


# Reading


@both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(tmp_path: Path, name: str, layout: str) -> None:
    folder = write_layout(tmp_path / "a", name, layout)
    loaded = load_checkpoint(folder, HEADS)
    model = loaded.model
    assert type(model) is NAMES[name] and loaded.model_name == name
    # A tied file holds the embedding under another name, and with another value than the recorded one.
    tied = layout in ("openpi", "sharded", "lerobot 0.4")
    embedding = reference_weights(name)[
        f"{P}lm_head.weight" if tied else f"{P}model.language_model.embed_tokens.weight"
    ]
    assert torch.equal(model.language_model.embed_tokens.weight, embedding)
    expected = reference_model(name)
    expected.language_model.embed_tokens.weight.data = embedding
    assert_same_weights(model, expected)
    assert (model.action_horizon, model.action_dim, model.latent_dim, model.image_size) == (5, 4, 32, (56, 56))
    assert all(not tensor.is_meta for tensor in model.state_dict().values())
    scheme = "mean_std" if name == "pi0" else "quantiles"
    assert model.state_scheme == model.action_scheme == scheme
    lerobot = layout.startswith("lerobot")
    assert model.convention == ("lerobot" if lerobot else "openpi")
    # RLinf's folders are of its own environments; of others nobody knows which view they were trained on.
    known = {"camera": "corner2", "crop": None} if layout == "rlinf rl" else {}
    assert loaded.notes["view"] == {"render_size": 480, **known}
    for ours, theirs in (("state", "state"), ("action", "actions")):
        for statistic, values in STATISTICS[theirs].items():
            assert torch.equal(getattr(model, f"{ours}_{statistic}"), torch.tensor(values))
    noise = torch.randn(2, 5, 32)
    images = torch.randn(2, 1, 3, 56, 56)
    tokens, valid = torch.randint(3, 500, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    velocities = []
    for one in (model, expected):
        _, keys_values, shown = one.run_prefix(images, tokens, valid)
        suffix, condition = one.embed_suffix(torch.ones(2, 32), noise, torch.tensor([0.2, 0.7]))
        positions = torch.arange(suffix.shape[1])[None] + shown.sum(1, keepdim=True)
        velocities.append(one.expert(suffix, positions, None, keys_values, condition)[0])
    assert torch.equal(*velocities)  # also what is no weight, such as the vision tower's positions, is in place


@both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_tells_without_its_weights(tmp_path: Path, name: str, layout: str) -> None:
    assert_told_without_weights(write_layout(tmp_path / "a", name, layout), HEADS)


@both
def test_an_untied_embedding_wins(tmp_path: Path, name: str) -> None:
    weights = reference_weights(name)
    head, embedding = f"{P}lm_head.weight", f"{P}model.language_model.embed_tokens.weight"
    folder = write_layout(tmp_path / "a", name, "rlinf sft")
    edit(folder / "model.safetensors", **{head: weights[embedding] + 1})
    assert torch.equal(load_pi0(folder, HEADS).model.language_model.embed_tokens.weight, weights[embedding])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.action_in_proj.bias", "action_in_proj.bias"),
        ("_fsdp_wrapped_module._orig_mod.module.action_in_proj.bias", "action_in_proj.bias"),
        (f"{P}model.vision_tower.encoder.layers.0.x", f"{P}model.vision_tower.vision_model.encoder.layers.0.x"),
        (f"model.{P}model.vision_tower.vision_model.x", f"{P}model.vision_tower.vision_model.x"),
        ("model.vlm.language_model.norm.weight", f"{P}model.language_model.norm.weight"),
        ("model.vlm.vision_tower.post_layernorm.bias", f"{P}model.vision_tower.vision_model.post_layernorm.bias"),
        (f"{P}model.language_model.model.norm.weight", f"{P}model.language_model.norm.weight"),
        ("model.dit.norm.weight", f"{X}model.norm.weight"),
        ("embed_action_time.state_proj.bias", "state_proj.bias"),
    ],
)
def test_names_of_other_layouts(theirs: str, ours: str) -> None:
    assert canonical_name(theirs) == ours


@both
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_fsdp_wrapped_module."])
def test_the_names_of_a_full_size_checkpoint_are_known(name: str, prefix: str) -> None:
    """778 and 813, with the two heads."""
    original = json.loads((DATA / name / "full_names.json").read_text())
    with torch.device("meta"):
        model = NAMES[name]()
    known = {canonical_name(prefix + key) for key in original}
    assert len(known) == len(original) == {"pi0": 778, "pi05": 813}[name]
    assert known == {*weights_of(model), TIED, f"{X}lm_head.weight"}


def test_a_flattened_vision_tower(tmp_path: Path) -> None:
    """As transformers 5.6 and later name it."""
    folder = write_layout(tmp_path / "a", "pi0", "lerobot 0.4")
    path = folder / "model.safetensors"
    flat = {key.replace("vision_tower.vision_model.", "vision_tower."): value for key, value in load_file(path).items()}
    expected = load_pi0(folder, HEADS).model
    save_file(flat, path)
    assert any("vision_tower.encoder" in key for key in flat)
    assert_same_weights(load_pi0(folder, HEADS).model, expected)


def test_transformers_own_pi0(tmp_path: Path) -> None:
    """Its velocities differ because it embeds the time in float32: by 8e-5 at t = 1 (5.23)."""
    theirs = transformers_pi0()
    theirs.save_pretrained(tmp_path / "a")
    loaded = load_checkpoint(tmp_path / "a", {**HEADS, "norm_stats": "none"})
    ours = loaded.model
    assert isinstance(ours, Pi0) and ours.action_horizon == 5 and loaded.notes["layout"] == "transformers"
    vectors = reference_vectors("pi0")
    image, state, noise = vectors["in.img0"][:, None], vectors["in.state"], vectors["in.noise"]
    tokens, t = vectors["in.tokens"][:, :7].clamp(max=500), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.cat([torch.full((2, 16), 511), tokens], dim=1),
            attention_mask=torch.ones(2, 23, dtype=torch.int64),
            pixel_values=image,
            pixel_attention_mask=torch.ones(2, 1, dtype=torch.bool),
            state=state,
            noise=noise,
            timestep=t,
        ).logits
        _, keys_values, valid = ours.run_prefix(image, tokens, torch.ones(2, 7, dtype=torch.bool))
        found = denoise(ours, keys_values, valid, state, noise, t)
    assert (found - expected).abs().max() < 1e-4


def denoise(model: Pi0, keys_values: Any, valid: Tensor, state: Tensor, x: Tensor, t: Tensor) -> Tensor:
    from sb3_vla.models import Context
    from sb3_vla.models.pi0 import _Conditions

    return model.denoise(Context(valid, _Conditions(keys_values, valid, valid.sum(1), state)), x, t)


@both
def test_rlinf_heads(tmp_path: Path, name: str, tokenizer: str) -> None:
    folder = write_layout(tmp_path / "a", name, "rlinf rl")
    options = {**HEADS, "tokenizer": tokenizer}
    loaded = load_checkpoint(folder, options)
    heads = rlinf_heads(name)
    assert loaded.value_head is not None and len(loaded.value_head) == 8
    assert torch.equal(loaded.value_head["mlp.6.bias"], heads["value_head.mlp.6.bias"])
    distribution, kwargs = loaded.distribution or ("", {})
    assert distribution == "flow_noise" and kwargs["widths"] == [128, 64] and kwargs["denoising_steps"] == 5
    assert kwargs["noise_range"] == pytest.approx([0.08, 0.16])
    policy = load_policy(folder, model_kwargs=options)
    assert isinstance(policy.distribution, FlowNoise)
    features = torch.randn(2, 5, 32)
    h = features
    for index in range(3):
        layer = f"noise_head.mlp_logvar.moduleList.{index}.linear_1"
        h = torch.tanh(h @ heads[f"{layer}.weight"].T + heads[f"{layer}.bias"])
    low, high = (2 * np.log(std) for std in (0.08, 0.16))
    expected = torch.exp((low + (high - low) * (h + 1) / 2) / 2)
    context = policy.model.encode(toy_observation(2, image_size=56))
    x, index = torch.randn(2, 5, 32), torch.tensor([1, 3])
    _, std, _ = policy.distribution.kernel(policy.model, context, x, index)
    _, features = policy.model.denoise_features(context, x, torch.tensor([0.8, 0.4]))
    h = features
    for index in range(3):
        layer = f"noise_head.mlp_logvar.moduleList.{index}.linear_1"
        h = torch.tanh(h @ heads[f"{layer}.weight"].T + heads[f"{layer}.bias"])
    expected = torch.exp((low + (high - low) * (h + 1) / 2) / 2)
    torch.testing.assert_close(std, expected, rtol=1e-5, atol=0)


def test_the_prompt_of_each_lerobot_version(tmp_path: Path) -> None:
    """Version 0.4 padded the state in the prompt to 32 numbers, the current one does not; neither need be asked for."""
    old = load_checkpoint(write_layout(tmp_path / "old", "pi05", "lerobot 0.4"), HEADS).model
    new = load_checkpoint(write_layout(tmp_path / "new", "pi05", "lerobot"), HEADS).model
    assert isinstance(old, Pi05) and isinstance(new, Pi05)
    state = torch.zeros(1, 4)
    assert len(old.prompts(["go"], state)[0][0].partition("State: ")[2].split(";")[0].split()) == 32
    assert len(new.prompts(["go"], state)[0][0].partition("State: ")[2].split(";")[0].split()) == 4
    assert new.tokenize.source == str(tmp_path / "new" / "tokenizer")
    assert old.tokenize.source == "google/paligemma-3b-pt-224"


@both
@pytest.mark.parametrize("layout", ["openpi", "lerobot 0.4", "rlinf rl", "lerobot"])
def test_a_tokenizer_that_lies_with_the_weights(tmp_path: Path, name: str, layout: str) -> None:
    """Is taken, unless another is asked for."""
    folder = write_layout(tmp_path / "a", name, layout)
    tiny_tokenizer(folder / "tokenizer" if layout == "openpi" else folder)
    expected = {"openpi": folder / "tokenizer" / "tokenizer.json", "lerobot": folder / "tokenizer"}
    found = load_pi0(folder, HEADS).model
    assert isinstance(found, Pi0) and found.tokenize.source == str(expected.get(layout, folder / "tokenizer.json"))
    _, valid = found.read_prompt(toy_observation(1))
    assert valid.any()
    other = load_pi0(folder, {**HEADS, "tokenizer": "owner/other"}).model
    assert isinstance(other, Pi0) and other.tokenize.source == "owner/other"


def test_where_openpi_statistics_may_be(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "a", "pi0", "openpi")
    (stats,) = folder.rglob("norm_stats.json")
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_bytes(stats.read_bytes())
    stats.unlink()
    with pytest.raises(FileNotFoundError, match=r"needs one norm_stats.json.*it has \[\].*norm_stats=PATH"):
        load_checkpoint(folder, HEADS)
    loaded = load_checkpoint(folder, {**HEADS, "norm_stats": str(elsewhere)})
    assert loaded.model.action_std.tolist() == pytest.approx(STATISTICS["actions"]["std"])
    assert loaded.notes["normalized"]
    base = load_checkpoint(folder, {**HEADS, "norm_stats": "none"})
    assert base.model.action_std.tolist() == [1.0] * 4 and not base.notes["normalized"]
    write_json(elsewhere, {"norm_stats": {"state": STATISTICS["state"]}})
    with pytest.raises(ValueError, match="no statistics of 'actions'"):
        load_checkpoint(folder, {**HEADS, "norm_stats": str(elsewhere)})
    write_json(elsewhere, {"norm_stats": {"state": STATISTICS["state"], "actions": {"mean": [0.0] * 4}}})
    with pytest.raises(ValueError, match="normalizes the action by mean_std and lacks std"):
        load_checkpoint(folder, {**HEADS, "norm_stats": str(elsewhere)})


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_layout(tmp_path / "a", "pi0", "lerobot")
    asked = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_checkpoint("hf://owner/name@abc", HEADS).model_name == "pi0"
    load_checkpoint("hf://owner/name", HEADS)
    assert asked == [("owner/name", "abc"), ("owner/name", None)]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(FileNotFoundError, match="hf://owner/name could not be fetched from the hub: offline"):
        load_checkpoint("hf://owner/name", HEADS)


# Refusals


def test_the_other_variant(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "a", "pi05", "lerobot")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "type": "pi0"})
    with pytest.raises(ValueError, match=r"not fit Pi0: missing .*13 in all.*unexpected .*18 in all.*look like pi05"):
        load_checkpoint(folder, HEADS)
    other = write_layout(tmp_path / "other", "pi0", "lerobot")
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", {**config, "type": "pi05"})
    with pytest.raises(ValueError, match=r"not fit Pi05: missing .*18 in all.*unexpected .*13 in all.*like pi0\."):
        load_checkpoint(other, HEADS)
    with pytest.raises(ValueError, match=r"model='pi05', but the checkpoint .* is of 'pi0'"):
        policy(write_layout(tmp_path / "b", "pi0", "openpi"), model="pi05", model_kwargs=HEADS)


def test_incomplete_weights(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "a", "pi0", "openpi")
    edit(folder / "model.safetensors", drop=("state_proj.bias", f"{X}model.norm.weight"), surplus=torch.zeros(1))
    with pytest.raises(
        ValueError, match=r"missing .*norm.weight, state_proj.bias \(2 in .*unexpected surplus \(1 in all"
    ):
        load_checkpoint(folder, HEADS)
    edit(folder / "model.safetensors", drop=("action_out_proj.weight",))
    with pytest.raises(ValueError, match=r"incomplete: action_out_proj.weight is missing among \d+ weights"):
        load_checkpoint(folder, HEADS)


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "a", "pi0", "openpi")
    edit(folder / "model.safetensors", **{"state_proj.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"Pi0: state_proj.bias has shape \(9,\), expected \(32,\) \(1 in all\)"):
        load_checkpoint(folder, HEADS)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.paligemma_with_expert.paligemma.language_model.model.norm.weight", "LeRobot's pi0 before version 0.4"),
        ("llm.layers.0.attn.qkv", r"RLinf's own package \(openpi_rlinf\)"),
        ("model.vlm_with_expert.lm_expert.norm.weight", "it looks like SmolVLA"),
        ("encoder.weight", "it looks like another model"),
    ],
)
def test_other_models(tmp_path: Path, key: str, message: str) -> None:
    save_file({key: torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_pi0(tmp_path)


def test_jax_weights(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    with pytest.raises(FileNotFoundError, match="openpi's JAX layout: convert it with"):
        load_pi0(tmp_path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "a", "pi0", "rlinf rl")
    path = folder / "actor" / "model_state_dict" / "full_weights.pt"
    torch.save({**reference_weights("pi0"), "trap": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(ValueError, match=r"full_weights.pt holds more than tensors and is not loaded"):
        load_pi0(folder, HEADS)
    assert not (tmp_path / "sprung").exists()


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "a", "pi0", "sharded")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is damaged"):
        load_pi0(folder, HEADS)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model-00002-of-00002.safetensors \(weights that .*index"):
        load_pi0(folder, HEADS)
    lerobot = write_layout(tmp_path / "b", "pi0", "lerobot")
    (lerobot / "policy_preprocessor_step_6_normalizer_processor.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no policy_preprocessor_step_6_normalizer_processor\.safetensors"):
        load_checkpoint(lerobot, HEADS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_relative_actions": True}, "predicts relative actions"),
        ({"min_period": 0.01}, r"periods of \(0.01, 4.0\)"),
    ],
)
def test_what_lerobot_models_may_ask_for(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_layout(tmp_path / "a", "pi0", "lerobot")
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **change})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, HEADS)


# Writing


@both
@pytest.mark.parametrize("layout", ["lerobot 0.4", "lerobot", "openpi"])
def test_round_trip_is_exact(tmp_path: Path, name: str, layout: str) -> None:
    first = load_checkpoint(write_layout(tmp_path / "a", name, layout), HEADS).model
    assert isinstance(first, Pi0)
    (save_openpi if layout == "openpi" else save_lerobot)(tmp_path / "b", first)
    again = load_checkpoint(tmp_path / "b", HEADS).model
    assert isinstance(again, Pi0)
    moved = {"tokenizer": str(tmp_path / "b" / "tokenizer")} if layout == "lerobot" else {}
    assert again.config == {**first.config, **moved}
    state, expected = again.state_dict(), first.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


@both
def test_written_names_are_those_of_the_original(tmp_path: Path, name: str) -> None:
    """openpi's own reader is strict; it also wants the head that is never used."""
    model = reference_model(name)
    save_openpi(tmp_path / "openpi", model)
    save_lerobot(tmp_path / "lerobot", model)
    original = {k: v.shape for k, v in reference_weights(name).items() if not k.endswith("embed_tokens.weight")}
    written = load_file(tmp_path / "openpi" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in written.items()} == original
    written = load_file(tmp_path / "lerobot" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in written.items()} == {f"model.{k}": v for k, v in original.items()}


@both
def test_the_other_layout_acts_alike(tmp_path: Path, name: str, tokenizer: str) -> None:
    """openpi adds 1e-6 to what it divides by, LeRobot does not; the written statistics make up for it."""
    options = {**HEADS, "tokenizer": tokenizer}
    first = load_checkpoint(write_layout(tmp_path / "a", name, "openpi"), options).model
    assert isinstance(first, Pi0)
    first.action_std[3], first.action_q99[3] = 0.0, first.action_q01[3]  # a gripper that never moved
    save_lerobot(tmp_path / "b", first)
    second = load_checkpoint(tmp_path / "b", HEADS).model
    save_openpi(tmp_path / "c", second)  # type: ignore[arg-type]
    third = load_checkpoint(tmp_path / "c", options).model
    x, observation = torch.randn(2, 5, 4), toy_observation(2, image_size=56)
    actions = []
    for model in (first, second, third):
        torch.testing.assert_close(model.unnormalize_action(x), first.unnormalize_action(x), rtol=1e-6, atol=1e-6)
        actions.append(integrate(model, model.encode(observation), torch.ones(2, 5, 32), 3))
    torch.testing.assert_close(actions[1], actions[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(actions[2], actions[0], rtol=0, atol=1e-5)


def tokenizer_step(folder: Path) -> dict[str, Any]:
    steps = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    (found,) = [step for step in steps if step["registry_name"] == "tokenizer_processor"]
    return found


def ids_by_transformers(folder: str, texts: list[str]) -> torch.Tensor:
    """As LeRobot asks for them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"max_length": 20, "truncation": True, "padding": "max_length", "padding_side": "right"}
    return tokenizer(texts, return_tensors="pt", **options).input_ids


def with_template(tokenizer: str, single: str) -> Path:
    """A file that is the same but for what it puts around a text."""
    from tokenizers import Tokenizer, processors

    changed = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    special = [("<bos>", 2), ("<eos>", 1)]
    changed.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    path = Path(f"{tokenizer}.json")
    changed.save(str(path))
    return path


@both
@pytest.mark.parametrize(
    ("template", "written"),
    [(None, "model"), ("<bos> $A", "~/model"), ("$A <eos>", "model"), ("<bos> $A <eos>", "model")],
)
def test_lerobot_reads_the_models_tokens_from_any_directory(
    tmp_path: Path, name: str, template: str | None, written: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Released LeRobot looks names up in the working directory or on the hub, and has <bos> from the file alone."""
    source = tokenizer if template is None else str(with_template(tokenizer, template))
    model = reference_model(name, tokenizer=source, convention="lerobot", prompt_tokens=20)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save_lerobot(written, model)
    monkeypatch.chdir(tmp_path / "elsewhere")
    step = tokenizer_step(tmp_path / "model")
    assert step["config"]["tokenizer_name"] == str(tmp_path / "model" / "tokenizer")
    assert step["artifacts"] == {"tokenizer_name": "tokenizer"}
    tokens, valid = model.tokenize([("open the door\n",), ("push\n",)])
    found = ids_by_transformers(step["config"]["tokenizer_name"], ["open the door\n", "push\n"])
    assert tokens[:, 0].tolist() == [2, 2] and torch.equal(found, tokens * valid)
    written = (tmp_path / "model" / "tokenizer" / "tokenizer.json").read_bytes()
    assert (written == local_tokenizer_file(source).read_bytes()) is (template == "<bos> $A")  # type: ignore[union-attr]


def test_a_tokenizer_is_not_read_as_another_class_would(tmp_path: Path, tokenizer: str) -> None:
    """Gemma's in transformers splits at spaces, whatever the file says; and a setting may leave <bos> out."""
    write_json(Path(tokenizer) / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False})
    model = reference_model("pi0", tokenizer=tokenizer, prompt_tokens=20)
    save_lerobot(tmp_path / "model", model)
    sentence = "the theory of the other\n"
    tokens, valid = model.tokenize([(sentence,)])
    found = ids_by_transformers(tokenizer_step(tmp_path / "model")["config"]["tokenizer_name"], [sentence])
    assert torch.equal(found, tokens * valid)


def test_a_moved_folder_has_its_own_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    model = reference_model("pi0", tokenizer=tokenizer)
    save_lerobot(tmp_path / "there", model)
    (tmp_path / "there").rename(tmp_path / "here")
    again = load_checkpoint(tmp_path / "here", HEADS).model
    assert isinstance(again, Pi0) and again.tokenize.source == str(tmp_path / "here" / "tokenizer")


def test_a_tokenizer_on_the_hub_goes_by_its_name(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("google/paligemma-3b-pt-224", "owner/other"):
        save_lerobot(tmp_path / source, reference_model("pi0", tokenizer=source))
        step = tokenizer_step(tmp_path / source)
        assert step["config"]["tokenizer_name"] == source and "artifacts" not in step
        assert not (tmp_path / source / "tokenizer").exists()
    file = f"{tokenizer}/tokenizer.json"
    # LeRobot would take the newest revision.
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, revision: {"v1": file}[revision])
    save_lerobot(tmp_path / "revision", reference_model("pi0", tokenizer="owner/other@v1"))
    assert tokenizer_step(tmp_path / "revision")["config"]["tokenizer_name"] == str(tmp_path / "revision" / "tokenizer")
    # A file of one's own that is the hub's is found by that name wherever the folder goes.
    published = str(with_template(tokenizer, "<bos> $A"))
    cached = {("google/paligemma-3b-pt-224", "tokenizer.json"): published}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *key: cached.get(key))
    save_lerobot(tmp_path / "same", reference_model("pi0", tokenizer=published))
    step = tokenizer_step(tmp_path / "same")
    assert step["config"]["tokenizer_name"] == "google/paligemma-3b-pt-224" and "artifacts" in step


@pytest.mark.parametrize("source", ["own.model", "gone"])
def test_a_tokenizer_that_lerobot_cannot_have_is_told(tmp_path: Path, source: str) -> None:
    (tmp_path / "own.model").write_bytes(b"pieces")
    model = reference_model("pi0", tokenizer=str(tmp_path / source))
    with pytest.warns(UserWarning, match=f"no tokenizer like .*{source}.*names google/paligemma-3b-pt-224.*FOLDER"):
        save_lerobot(tmp_path / "model", model)
    assert tokenizer_step(tmp_path / "model")["config"]["tokenizer_name"] == "google/paligemma-3b-pt-224"


@pytest.mark.parametrize(("save", "reader"), [(save_lerobot, "LeRobot"), (save_openpi, "openpi")])
def test_sizes_that_a_layout_has_no_word_for_are_told(tmp_path: Path, save: Any, reader: str) -> None:
    with pytest.warns(UserWarning, match=rf"{reader} cannot load .*vlm.width=64 \(there: 2048\).*vocabulary=512"):
        save(tmp_path / "model", reference_model("pi0"))
    with torch.device("meta"):
        published = Pi0()
    assert all(ours == theirs for ours, theirs in sizes_beside_the_published(published).values())


def test_lerobot_without_the_state_in_the_prompt(tmp_path: Path, tokenizer: str) -> None:
    model = reference_model("pi05", discrete_state_input=False, tokenizer=tokenizer)
    save_lerobot(tmp_path / "a", model)
    again = load_checkpoint(tmp_path / "a", HEADS).model
    assert isinstance(again, Pi05) and not again.discrete_state_input


def test_what_openpi_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"openpi normalizes Pi0 by mean_std.*action_scheme='quantiles'"):
        save_openpi(tmp_path / "a", Pi0(**TINY_PI0, action_scheme="quantiles"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="is there already"):
        save_lerobot(tmp_path, reference_model("pi0"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@both
def test_our_own_layout_holds_it_too(tmp_path: Path, name: str, tokenizer: str) -> None:
    first = load_checkpoint(write_layout(tmp_path / "a", name, "lerobot"), {**HEADS, "tokenizer": tokenizer})
    save_checkpoint(tmp_path / "b", first.model, notes=first.notes, distribution=first.distribution)
    again = load_checkpoint(tmp_path / "b")
    assert again.model_name == name and again.notes == first.notes
    assert again.model_kwargs == {**first.model_kwargs, "tokenizer": str(tmp_path / "b" / "tokenizer")}
    assert again.distribution == ("flow_ode", {"denoising_steps": 7})
    state, expected = again.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("layout", ["openpi", "rlinf sft", "lerobot"])
def test_our_own_layout_goes_elsewhere(
    tmp_path: Path, layout: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokenizer that was found beside the weights, by a relative path; ours can be copied on and replaced."""
    monkeypatch.chdir(tmp_path)
    write_layout(Path("a"), "pi0", layout)
    tiny_tokenizer(Path("a"))
    observation = toy_observation(2, image_size=56)
    model = load_checkpoint(Path("a"), HEADS).model
    assert isinstance(model, Pi0)
    expected = model.read_prompt(observation)
    save_checkpoint("b", model)
    before = checkpoint_digest("b")
    shutil.rmtree("a")
    shutil.move("b", tmp_path / "away" / "c")
    monkeypatch.chdir(tmp_path / "away")
    for _ in range(2):
        again = load_checkpoint("c").model
        assert isinstance(again, Pi0)
        assert all(torch.equal(a, b) for a, b in zip(again.read_prompt(observation), expected, strict=True))
        save_checkpoint("c", again)
    assert checkpoint_digest("c") == before
    assert policy(Path("c"), model_kwargs={"tokenizer": tokenizer}).model.config["tokenizer"].endswith("tokenizer")
    with pytest.raises(ValueError, match="model_kwargs with tokenizer='owner/other'"):
        policy(Path("c"), model_kwargs={"tokenizer": "owner/other"})
    (tmp_path / "away" / "c" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert checkpoint_digest("c") != before


def test_a_sentencepiece_file_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / "big_vision.model").write_bytes(b"pieces")
    save_checkpoint(tmp_path / "b", reference_model("pi0", tokenizer=str(tmp_path / "big_vision.model")))
    assert (tmp_path / "b" / "tokenizer" / "tokenizer.model").read_bytes() == b"pieces"
    again = load_checkpoint(tmp_path / "b").model
    assert isinstance(again, Pi0) and local_tokenizer_file(again.tokenize.source) is not None


# In imitation and in a policy


@both
def test_a_base_model_is_imitated_and_written(tmp_path: Path, name: str, tokenizer: str) -> None:
    """A base model takes the data's statistics; only the expert moves; the result is written for LeRobot and acts."""
    folder = write_layout(tmp_path / "a", name, "openpi")
    options = {**HEADS, "tokenizer": tokenizer, "norm_stats": "none"}
    data = toy_demonstrations(image_size=56)
    config = SFTConfig(checkpoint=str(folder), model_kwargs=options, steps=3, batch_size=4, shift=0, bf16=False)
    result = sft(data, config, output=tmp_path / "b", progress=False)
    model, start = result.model, load_checkpoint(folder, options).model
    assert isinstance(model, Pi0)
    statistics = data.statistics()["state"]
    low, high = ("mean", "std") if name == "pi0" else ("q01", "q99")
    np.testing.assert_allclose(getattr(model, f"state_{low}"), statistics[low])
    np.testing.assert_allclose(getattr(model, f"state_{high}"), statistics[high])
    state = model.normalize_state(torch.from_numpy(data.states))
    inside = state.mean(0).abs() < 1e-4 if name == "pi0" else (state.abs() <= 1.001).float().mean(0) > 0.95
    assert inside.all()
    moved = {k for (k, a), b in zip(model.named_parameters(), start.parameters(), strict=True) if not torch.equal(a, b)}
    assert "action_out_proj.weight" in moved and not any(key.startswith(P) for key in moved)
    save_lerobot(tmp_path / "c", model)
    observation, x = toy_observation(2, image_size=56), torch.ones(2, 5, 32)
    actions = []
    for one in (model, load_checkpoint(tmp_path / "b").model, load_checkpoint(tmp_path / "c", HEADS).model):
        found = integrate(one, one.encode(observation), x, 2)
        actions.append(one.unnormalize_action(found[:, :, :4]))
    torch.testing.assert_close(actions[1], actions[0], rtol=0, atol=0)
    torch.testing.assert_close(actions[2], actions[0], rtol=0, atol=1e-5)


def policy(checkpoint: Path, **options: Any) -> VLAPolicy:
    env = ToyEnv(chunk=5, action_dim=4, image_size=64)
    return VLAPolicy(env.observation_space, env.action_space, lambda _: 1e-3, checkpoint=checkpoint, **options)


@both
def test_a_policy_of_a_published_checkpoint(tmp_path: Path, name: str, tokenizer: str) -> None:
    folder = write_layout(tmp_path / "a", name, "lerobot 0.4")
    options = {**HEADS, "tokenizer": tokenizer}
    found = policy(folder, model=name, model_kwargs=options, distribution="flow_sde")
    assert found.portable_kwargs["model"] == name and found.portable_kwargs["model_kwargs"]["tokenizer"] == tokenizer
    trained = {key for key, parameter in found.model.named_parameters() if parameter.requires_grad}
    assert trained and not any(key.startswith(P) for key in trained)
    acts = load_policy(folder, model_kwargs=options)
    assert acts.distribution.denoising_steps == 7
    observation = {"image": np.zeros((480, 480, 3), np.uint8), "state": np.zeros(4, np.float32)}
    observation["instruction"] = toy_observation(1)["instruction"][0].numpy()
    action, _ = acts.predict(observation, deterministic=True)
    assert action.shape == (5, 4) and np.isfinite(action).all()


@both
@pytest.mark.parametrize("algorithm_class", [PPO, GRPO])
def test_an_algorithm_takes_a_published_checkpoint(
    tmp_path: Path, name: str, tokenizer: str, algorithm_class: Any
) -> None:
    """By ``policy_kwargs`` alone; stock ``predict`` acts, and what is saved acts again."""
    folder = write_layout(tmp_path / "a", name, "rlinf sft")
    kwargs = {"model": name, "checkpoint": folder, "model_kwargs": {**HEADS, "tokenizer": tokenizer}}
    sizes = {"n_steps": 4} if algorithm_class is PPO else {"group_size": 4, "n_groups": 1}
    algorithm = algorithm_class(
        "VLAPolicy",
        toy_vec(4, chunk=5, action_dim=4, image_size=64),
        batch_size=4,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={**kwargs, "distribution": "flow_sde"},
        **sizes,
    )
    before = {key: value.clone() for key, value in weights_of(algorithm.policy.model).items()}
    algorithm.learn(4)
    moved = {key for key, value in weights_of(algorithm.policy.model).items() if not torch.equal(value, before[key])}
    assert "action_out_proj.weight" in moved and not any(key.startswith(P) for key in moved)
    observation, _ = ToyEnv(chunk=5, action_dim=4, image_size=64).reset(seed=0)
    action, _ = algorithm.predict(observation, deterministic=True)
    assert action.shape == (5, 4)
    algorithm.save(tmp_path / "model.zip")
    again = algorithm_class.load(tmp_path / "model.zip", device="cpu")
    assert np.array_equal(again.predict(observation, deterministic=True)[0], action)


def test_a_saved_algorithm_acts_from_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_layout(Path("a"), "pi0", "openpi")
    tiny_tokenizer(Path("paligemma"))
    (stats,) = Path("a").rglob("norm_stats.json")
    shutil.move(stats, "stats.json")
    options = {**HEADS, "tokenizer": "paligemma", "norm_stats": "stats.json"}
    env = toy_vec(4, chunk=5, action_dim=4, image_size=64)
    observation, _ = ToyEnv(chunk=5, action_dim=4, image_size=64).reset(seed=0)
    for number, trainable in enumerate(("expert", "all")):  # the first names the checkpoint, the second holds it
        kwargs = {"checkpoint": Path("a"), "model_kwargs": options, "distribution": "flow_sde", "trainable": trainable}
        algorithm = PPO("VLAPolicy", env, n_steps=4, batch_size=4, device="cpu", policy_kwargs=kwargs)
        action, _ = algorithm.predict(observation, deterministic=True)
        algorithm.save(tmp_path / f"{number}.zip")
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            again = PPO.load(tmp_path / f"{number}.zip", device="cpu")
            assert np.array_equal(again.predict(observation, deterministic=True)[0], action)
