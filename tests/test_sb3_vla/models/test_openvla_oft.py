"""OpenVLA-OFT computes what RLinf computes, reads and writes its folders, imitates, and learns by PPO."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published import (
    assert_told_without_weights,
    digest,
    edit_json,
    edit_tensors,
    instructions,
    parameter_count,
    picture,
    recorded,
    same_tensors,
    weights_of,
    write_files,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import (
    assert_learns_what_the_instruction_means,
    changed_by_an_update,
    probability_of,
    toy_demonstrations,
    toy_observation,
    toy_ppo,
    toy_vec,
)

from sb3_vla import PPO
from sb3_vla.checkpoints import checkpoint_digest, load_checkpoint, save_checkpoint
from sb3_vla.checkpoints.formats import openvla_oft as layout
from sb3_vla.checkpoints.formats.openvla_oft import load_openvla_oft, save_openvla_oft
from sb3_vla.distributions import ActionTokens
from sb3_vla.models import OpenVLAOFT
from sb3_vla.models.lora import adapted_layers, prepare_training
from sb3_vla.models.openvla_oft import OFT_SIZES, SPECIAL_TOKENS
from sb3_vla.models.tokenizing import byte_tokenizer
from sb3_vla.recipes.resolve import make_plan
from sb3_vla.recipes.schema import load_recipe
from sb3_vla.runs.memory_plan import GIB
from sb3_vla.runs.training import plan_training
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig

TENSORS, RECORDS = recorded("openvla_oft")
MODEL_FILE = "model.safetensors"
TEXT = RECORDS["files"]["config.json"]["text_config"]
#: what the tiny reference's files do not say: its towers' heads, the length of its prompts
READ: dict[str, Any] = {"vision_heads": (2, 2), "max_prompt_tokens": 88}
TINY: dict[str, Any] = {
    "sizes": {
        "width": 48,
        "ffn": 96,
        "layers": 2,
        "heads": 3,
        "kv_heads": 3,
        "vocabulary": 576,
        "vision_widths": [32, 32],
        "vision_layers": [2, 2],
        "vision_heads": [2, 2],
        "vision_ffns": [64, 64],
        "unused": 0,
        "pad_id": 0,
        "prompt_end_id": 260,
    },
    "resolution": 28,
    "max_prompt_tokens": 72,
}
SINGLE, LOSS = 2e-5, 1e-4  # largest differences of float32 outputs, and of losses


def write_published(folder: Path) -> Path:
    """A folder as RLinf reads it; the tokenizer is that of the reference, a token for each byte."""
    write_files(folder, RECORDS["files"])
    weights = weights_of(RECORDS["shapes"], 13)
    save_file({key: value.bfloat16() for key, value in weights.items()}, folder / MODEL_FILE)
    (folder / "tokenizer.json").write_text(byte_tokenizer(SPECIAL_TOKENS, "<s>"))
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path / "published")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("openvla_oft"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up on the network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


def reference(folder: Path, **options: Any) -> OpenVLAOFT:
    """The tiny reference; all its seven numbers act, for comparison."""
    model = load_openvla_oft(folder, acting=range(7), **READ, **options).model
    assert isinstance(model, OpenVLAOFT)
    return model


def observation() -> dict[str, Tensor]:
    image = picture(TENSORS["in.image_png"])
    rolled = image.roll(int(TENSORS["in.image_raw_b1_shift"]), 2)
    return {"image": torch.stack([image, rolled]), "instruction": instructions(RECORDS["tasks"])}


def assert_near(found: Tensor, expected: str, tolerance: float, where: Tensor | None = None) -> None:
    difference = (found - TENSORS[expected]).abs()
    assert found.shape == TENSORS[expected].shape
    assert (difference if where is None else difference[where]).max() <= tolerance


# --- The same numbers as the original ---------------------------------------------------------------------------------


@torch.no_grad()
def test_what_it_reads_is_the_originals(folder: Path) -> None:
    model, given = reference(folder), observation()
    tokens, mask = model.tokenize(given["instruction"])
    assert torch.equal(tokens, TENSORS["out.input_ids"]) and torch.equal(mask, TENSORS["out.attention_mask"])
    image = model.normalize_image(given["image"])
    assert_near(image[:, :, ::4, ::4], "out.pixel_values", 1e-6)
    assert_near(model.vision_backbone.featurizer(image[:, :3]), "out.dino_patches", SINGLE)
    assert_near(model.vision_backbone.fused_featurizer(image[:, 3:]), "out.siglip_patches", SINGLE)
    patches = model.projector(model.vision_backbone(image))
    assert_near(patches, "out.projected", SINGLE)
    embedded, there = model.embed(tokens, mask, patches)
    assert torch.equal(there, TENSORS["out.llm_mask"])
    assert torch.equal(there.cumsum(1) - 1, TENSORS["out.llm_pos"])
    assert_near(model.read(embedded, there), "out.llm_hidden", SINGLE, there)


@torch.no_grad()
def test_logits_tokens_and_actions_are_the_originals(folder: Path) -> None:
    model = reference(folder)
    context = model.encode(observation())
    logits = model.token_logits(context)
    assert_near(logits[:, 0], "out.action_logits_256", SINGLE)
    everything = model.language_model.lm_head(context.state[:, :7]).logsumexp(2)
    assert_near(everything, "out.action_logits_full_logsumexp", SINGLE)
    assert torch.equal(logits.argmax(3) + model.first_action_id, TENSORS["out.greedy_tokens"])
    distribution = ActionTokens(1, temperature=1.6)
    assert_near(distribution.mode(model, context), "out.greedy_actions", SINGLE)
    trace = {"tokens": TENSORS["out.sample_tokens"] - model.first_action_id}
    mean, std = distribution.transition(model, context, trace)
    executed = torch.ones(2, dtype=torch.int64)
    found = distribution.log_prob(mean, std, trace, executed, "token")
    assert_near(found[:, 0], "out.sample_logprobs", SINGLE)
    assert distribution.entropy(mean, std, executed).tolist() == pytest.approx(
        TENSORS["out.train_entropy"].sum(1).tolist(), abs=LOSS
    )
    assert_near(model.unnormalize_action(model.token_values[trace["tokens"]]), "out.sample_actions", SINGLE)


@torch.no_grad()
def test_with_the_stop_token_it_is_openvla_ofts(folder: Path) -> None:
    """Logits and, for the tokens that were recorded, the loss."""
    model = reference(folder, stop_token=True)
    context = model.encode({key: value[:1] for key, value in observation().items()})
    assert_near(context.state[:, :7], "out.official_hidden", SINGLE)
    assert_near(model.token_logits(context)[:, 0], "out.official_logits_256", SINGLE)
    tokens = TENSORS["in.sft_tokens"][:1, None] - model.first_action_id
    loss = model.token_loss(context, tokens, torch.ones(1, 1, dtype=torch.bool))
    assert loss.item() == pytest.approx(TENSORS["out.official_sft_loss"].item(), abs=LOSS)


def test_full_size_names_and_shapes_are_the_originals() -> None:
    with torch.device("meta"):
        model = OpenVLAOFT(acting=(0, 1, 2, 6), numbers=7)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in layout._STATISTICS}
    assert digest(shapes) == RECORDS["full_size"]["digest"]
    assert parameter_count(model) == RECORDS["full_size"]["total"]


@torch.no_grad()
def test_four_of_seven_numbers_act(folder: Path) -> None:
    every, acting = reference(folder), load_openvla_oft(folder, **READ).model
    given, places = observation(), [0, 1, 2, 6]
    assert acting.action_dim == 4 and acting.config["acting"] == places
    logits = acting.token_logits(acting.encode(given))
    assert torch.equal(logits, every.token_logits(every.encode(given))[:, :, places])
    found = ActionTokens(1).mode(acting, acting.encode(given))
    assert torch.equal(found, ActionTokens(1).mode(every, every.encode(given))[:, :, places])


def test_an_action_becomes_the_token_whose_center_is_nearest(folder: Path) -> None:
    model = reference(folder)
    low, high = model.action_q01, model.action_q99
    actions = torch.rand((64, 1, 7), generator=torch.Generator().manual_seed(0)) * (high - low) + low
    tokens = model.action_tokens(actions)
    back = model.unnormalize_action(model.token_values[tokens])
    # Half a bin of 2 / 255 in units of a range of 2; a number that is not scaled has the range -1 ... 1.
    half_bin = torch.where(model.action_scaled, (high - low) / 255 / 2, 1 / 255)
    assert ((back - actions).abs() <= half_bin + 1e-6).all()
    beyond = torch.full((1, 1, 7), 100.0)
    assert torch.equal(model.action_tokens(beyond), torch.zeros(1, 1, 7, dtype=torch.int64))
    assert torch.equal(model.action_tokens(-beyond), torch.full((1, 1, 7), 255))


def test_the_loss_leaves_out_what_is_beyond_the_episode() -> None:
    model = OpenVLAOFT(**{**TINY, "action_horizon": 2, "image_size": 32})
    given, actions = toy_observation(3), torch.rand(3, 2, 4)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    with torch.no_grad():
        found = model.imitation_loss(given, actions, mask)
        context = model.encode(given)
        hidden = context.state[:, :8]
        targets = model.action_tokens(actions).flatten(1) + model.first_action_id
        each = F.cross_entropy(model.language_model.lm_head(hidden).transpose(1, 2), targets, reduction="none")
    assert found.item() == pytest.approx(each.reshape(3, 2, 4)[mask].mean().item(), rel=1e-5)


# --- Published folders ------------------------------------------------------------------------------------------------


def test_round_trip_through_the_published_layout_is_exact(published: Path, tmp_path: Path) -> None:
    model = load_openvla_oft(published, **READ).model
    assert isinstance(model, OpenVLAOFT)
    save_openvla_oft(tmp_path / "again", model, dtype=torch.bfloat16)
    expected = {key: value for key, value in load_file(published / MODEL_FILE).items() if "value_head" not in key}
    assert same_tensors(load_file(tmp_path / "again" / MODEL_FILE), expected)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    original = RECORDS["files"]["config.json"]
    for key in ("model_type", "image_sizes", "timm_model_ids", "pad_token_id", "unnorm_key", "n_action_bins"):
        assert config[key] == original[key]
    assert {key: config["text_config"][key] for key in original["text_config"]} == original["text_config"]
    loaded = load_checkpoint(tmp_path / "again")
    assert loaded.model_name == "openvla_oft" and loaded.distribution == ("tokens", {})
    assert loaded.model.config == model.config
    assert_told_without_weights(tmp_path / "again")
    assert same_tensors(loaded.model.state_dict(), model.state_dict())
    save_checkpoint(tmp_path / "own", model)
    assert same_tensors(load_checkpoint(tmp_path / "own").model.state_dict(), model.state_dict())


def test_the_padding_is_the_models(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = byte_tokenizer(("<unk>", "<s>", "</s>", "<PAD>"), "<s>")
    sizes = {**asdict(OFT_SIZES["laptop"]), "pad_id": 3}
    save_openvla_oft(tmp_path / "own", OpenVLAOFT(sizes=sizes, resolution=56, image_size=96, tokenizer=text))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert tokenizer.pad_token_id == 3 and tokenizer("ab").input_ids[0] == 1


def test_towers_that_their_code_has_not_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"RLinf cannot load .*vision_widths=\(96, 96\) \(there: \(1024, 1152\)\)"):
        save_openvla_oft(tmp_path / "own", OpenVLAOFT(sizes="laptop", resolution=56, image_size=96))


def test_weights_in_several_files(published: Path, tmp_path: Path) -> None:
    model = load_openvla_oft(published, **READ).model
    assert isinstance(model, OpenVLAOFT)
    save_openvla_oft(tmp_path / "shards", model, max_shard_bytes=1_000_000)
    shards = sorted((tmp_path / "shards").glob("model-*"))
    assert len(shards) > 2
    assert same_tensors(load_checkpoint(tmp_path / "shards").model.state_dict(), model.state_dict())
    before = checkpoint_digest(tmp_path / "shards")
    edit_tensors(shards[-1], {"extra": torch.zeros(1)})
    assert checkpoint_digest(tmp_path / "shards") != before


def test_half_precision_is_half_the_size(published: Path) -> None:
    model = load_openvla_oft(published, precision="bfloat16", acting=range(7), **READ).model
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    with torch.no_grad():
        found = model.token_logits(model.encode(observation()))
    assert_near(found[:, 0], "out.action_logits_256", 0.1)


def test_statistics_in_their_own_file(published: Path) -> None:
    expected = load_openvla_oft(published, **READ).model
    edit_json(published / "config.json", norm_stats={})
    assert same_tensors(load_openvla_oft(published, **READ).model.state_dict(), expected.state_dict())
    (published / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_statistics\.json"):
        load_openvla_oft(published, **READ)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: (path / MODEL_FILE).unlink(), FileNotFoundError, "has no model.safetensors"),
        (lambda path: (path / "tokenizer.json").unlink(), FileNotFoundError, "has no tokenizer"),
        (lambda path: (path / MODEL_FILE).write_bytes(b"nothing"), ValueError, "is damaged"),
        (lambda path: edit_tensors(path / MODEL_FILE, {}, "projector.fc1.bias"), ValueError, "missing projector.fc1"),
        (
            lambda path: edit_tensors(path / MODEL_FILE, {"projector.fc1.bias": torch.zeros(3)}),
            ValueError,
            r"projector.fc1.bias has shape \(3,\), expected",
        ),
        (
            lambda path: edit_json(path / "config.json", text_config={**TEXT, "num_hidden_layers": 4}),
            ValueError,
            "missing language_model.model.layers.3",
        ),
        (lambda path: edit_json(path / "config.json", image_sizes=None), ValueError, "no complete OpenVLA"),
        (lambda path: (path / "action_head--1_checkpoint.pt").touch(), ValueError, "continuous actions"),
        (
            lambda path: edit_json(path / "config.json", norm_stats={"a": {"action": {"q01": [0.0]}}}, unnorm_key="a"),
            ValueError,
            "lacks the statistics q99",
        ),
    ],
)
def test_what_is_wrong_is_named(published: Path, damage: Any, error: type[Exception], message: str) -> None:
    damage(published)
    with pytest.raises(error, match=message):
        load_openvla_oft(published, **READ)


def test_statistics_of_several_tasks_want_a_choice(published: Path) -> None:
    with pytest.raises(ValueError, match="meta_world_strict; choose one with unnorm_key, not 'bridge'"):
        load_openvla_oft(published, unnorm_key="bridge", **READ)


def test_a_base_model_of_other_robots_is_imitated_from(published: Path) -> None:
    """It has statistics of others alone; those of the data are of the numbers that act, and take their places."""
    edit_json(published / "config.json", norm_stats={"bridge": {"action": {"q01": [0.0] * 7}}})
    options = {**READ, "base": True}
    side = RECORDS["files"]["config.json"]["image_sizes"][0]
    loaded = load_checkpoint(published, options)
    assert loaded.model.image_size == (side, side) and loaded.model.action_dim == 4
    data = toy_demonstrations(image_size=side)
    config = SFTConfig(
        checkpoint=str(published),
        model_kwargs=options,
        steps=1,
        batch_size=2,
        warmup_steps=0,
        shift=0,
        validation_fraction=0.0,
        bf16=False,
    )
    model = sft(data, config, progress=False).model
    low = torch.from_numpy(data.statistics()["action"]["q01"])
    assert isinstance(model, OpenVLAOFT)
    torch.testing.assert_close(model.action_q01[[0, 1, 2, 6]], low)
    assert torch.equal(model.action_q01[3:6], -torch.ones(3))


def test_towers_want_heads_that_fit(published: Path) -> None:
    with pytest.raises(ValueError, match=r"widths \[32, 24\] cannot have \[16, 16\] heads; give vision_heads"):
        load_checkpoint(published)


def test_a_prompt_that_is_too_long_is_an_error() -> None:
    model = OpenVLAOFT(**{**TINY, "image_size": 32, "max_prompt_tokens": 40})
    with pytest.raises(ValueError, match="max_prompt_tokens=40"):
        model.encode(toy_observation(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "13B"}, "expected 7B, laptop"),
        ({"precision": "int4"}, "precision='int4'"),
        ({"resolution": 30}, "multiple of 14"),
        ({"acting": (0, 1, 2), "numbers": 7}, "4 different places"),
        ({"acting": (0, 1, 2, 7), "numbers": 7}, "of 7 numbers"),
        ({"sizes": {**TINY["sizes"], "vocabulary": 500}}, "those from 244 on are actions"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenVLAOFT(**{**TINY, **options})


# --- Learning ---------------------------------------------------------------------------------------------------------


def test_imitates_then_learns_by_ppo_and_comes_back_from_the_published_layout(tmp_path: Path) -> None:
    config = SFTConfig(
        model="openvla_oft",
        model_kwargs=TINY,
        action_horizon=2,
        steps=40,
        batch_size=16,
        learning_rate=3e-3,
        warmup_steps=5,
        ema_decay=0.9,
        shift=0,
    )
    result = sft(toy_demonstrations(), config, progress=False)
    losses = [row["train_loss"] for row in result.history]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    assert isinstance(result.model, OpenVLAOFT)
    save_openvla_oft(tmp_path / "imitated", result.model)
    algorithm = PPO(
        "VLAPolicy",
        toy_vec(4, action_dim=4),
        n_steps=4,
        batch_size=16,
        n_epochs=2,
        seed=0,
        device="cpu",
        learning_rate=1e-3,
        policy_kwargs={
            "checkpoint": tmp_path / "imitated",
            "distribution": "tokens",
            "distribution_kwargs": {"temperature": 1.6},
            "trainable": "expert",
        },
    )
    trained = algorithm.policy.model
    before = {name: parameter.clone() for name, parameter in trained.named_parameters()}
    algorithm.learn(16)
    moved = {name for name, parameter in trained.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(name.startswith("language_model.") for name in moved)
    assert isinstance(trained, OpenVLAOFT)
    save_openvla_oft(tmp_path / "trained", trained)
    assert same_tensors(load_checkpoint(tmp_path / "trained").model.state_dict(), trained.state_dict())


def test_adapters_are_float32_beside_weights_in_bfloat16() -> None:
    """From ratios of exactly one; in bfloat16 most of an optimizer's small steps would be rounded away."""
    algorithm = toy_ppo(
        toy_vec(4, chunk=1, action_dim=4),
        model="openvla_oft",
        model_kwargs={**TINY, "precision": "bfloat16"},
        distribution="tokens",
        distribution_kwargs={"temperature": 1.6},
        trainable="lora",
        stirred=False,
    )
    model = algorithm.policy.model
    types = {".lora_" in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    moved = changed_by_an_update(algorithm, 32)
    assert moved and all(".lora_" in name for name in moved)


def test_an_adapter_of_the_output_layer_acts_and_is_merged(tmp_path: Path) -> None:
    model, given = OpenVLAOFT(**{**TINY, "image_size": 32}), toy_observation(2)
    prepare_training(model, "lora", lora={"rank": 2, "layers": ["lm_head"]})
    with torch.no_grad():
        before = model.token_logits(model.encode(given))
        (layer,) = adapted_layers(model).values()
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[index, union-attr]
        after = model.token_logits(model.encode(given))
        save_openvla_oft(tmp_path / "merged", model)
        merged = load_checkpoint(tmp_path / "merged").model
        found = merged.token_logits(merged.encode(given))
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(found, after, atol=LOSS, rtol=1e-5)


def test_seven_billion_parameters_train_on_one_gpu_of_80_gb() -> None:
    """By the recipe for it, as it stands, on the meta device."""
    recipe = load_recipe("metaworld_50_grpo_openvlaoft_lora", ["actor.model.model_path=somewhere"])
    training = make_plan(recipe).training
    assert training is not None and not training.algorithm.has_critic
    with torch.device("meta"):
        model = OpenVLAOFT(acting=(0, 1, 2, 6), numbers=7, precision="bfloat16")
    plan = plan_training(model, training, action_chunk=1)
    plan.check(int(79.6 * GIB))  # of an H100 with 80 GB
    assert plan.weights > 2 * 7.54e9 and plan.gradients < 1 * GIB


def test_the_same_decisions_have_the_same_probability() -> None:
    """So that ratios are one before the first step."""
    algorithm = toy_ppo(toy_vec(2), model="openvla_oft", model_kwargs=TINY, distribution="tokens", stirred=False)
    probability, rows = probability_of(algorithm.policy, toy_observation(4)), torch.arange(4)
    first = probability(rows)
    assert torch.equal(probability(rows), first) and torch.isfinite(first).all()


def test_ppo_learns_what_the_instruction_means() -> None:
    assert_learns_what_the_instruction_means(
        toy_vec(16, chunk=1, action_dim=1), model="openvla_oft", model_kwargs=TINY, distribution="tokens"
    )
