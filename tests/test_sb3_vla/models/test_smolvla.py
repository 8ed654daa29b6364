"""SmolVLA computes what LeRobot computes, reads and writes its folders, imitates, and learns by PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
    probability_of,
    toy_demonstrations,
    toy_observation,
    toy_ppo,
    toy_vec,
)

from sb3_vla import PPO
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.checkpoints.formats import smolvla as layout
from sb3_vla.checkpoints.formats.smolvla import load_smolvla, save_smolvla
from sb3_vla.checkpoints.weights import write_weights
from sb3_vla.distributions.base import integrate
from sb3_vla.models import SmolVLA
from sb3_vla.models.base import PERCEPTION
from sb3_vla.models.smolvla import expert_ffn
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig

TENSORS, RECORDS = recorded("smolvla")
TINY: dict[str, Any] = {
    "vlm": {
        "width": 48,
        "ffn": 96,
        "heads": 3,
        "kv_heads": 1,
        "head_dim": 16,
        "vocabulary": 264,
        "image_size": 32,
        "patch_size": 8,
        "vision_width": 32,
        "vision_ffn": 64,
        "vision_layers": 1,
        "vision_heads": 2,
        "scale": 2,
    },
    "layers": 2,
    "max_tokens": 24,
    "latent_dim": 8,
    "latent_state_dim": 8,
    "train_expert_only": False,
}
SINGLE, CHAIN = 2e-5, 1e-4  # largest differences of float32 outputs, and of chains and losses
MODEL_FILE = "model.safetensors"
STATE_FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"
ACTION_FILE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def write_published(folder: Path) -> Path:
    """What LeRobot 0.4.4 wrote of the tiny model."""
    write_files(folder, RECORDS["files"])
    save_file(weights_of(RECORDS["shapes"], 0), folder / MODEL_FILE)
    statistics = {
        f"{feature}.{name}": torch.tensor(value)
        for feature, values in RECORDS["statistics"].items()
        for name, value in values.items()
    }
    for name in (STATE_FILE, ACTION_FILE):
        save_file(statistics, folder / name)
    return folder


def with_options(folder: Path) -> Path:
    """The other reference in the place of what :func:`write_published` wrote."""
    write_files(folder, {"config.json": RECORDS["options_config"]})
    text = RECORDS["files"]["vlm/config.json"]["text_config"]
    edit_json(folder / "vlm" / "config.json", text_config={**text, "vocab_size": 300})
    save_file(weights_of(RECORDS["options_shapes"], 5), folder / MODEL_FILE)
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path / "published")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmolVLA:
    loaded = load_checkpoint(write_published(tmp_path_factory.mktemp("smolvla"))).model
    assert isinstance(loaded, SmolVLA)
    return loaded


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up on the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


def observation() -> dict[str, Tensor]:
    images = [picture(TENSORS[f"main/in.image_png_{index}"]) for index in range(2)]
    return {
        "image": torch.stack(images),
        "state": TENSORS["main/in.state_raw"],
        "instruction": instructions(RECORDS["tasks"]),
    }


def assert_near(found: Tensor, expected: str, tolerance: float, where: Tensor | None = None) -> None:
    difference = (found.float() - TENSORS[expected].float()).abs()
    assert found.shape == TENSORS[expected].shape
    assert (difference if where is None else difference[where]).max() <= tolerance


# --- The same numbers as the original ---------------------------------------------------------------------------------


@torch.no_grad()
def test_the_prefix_is_the_originals(model: SmolVLA) -> None:
    given = observation()
    image = model.resize(given["image"])
    assert image.shape == (2, 3, 128, 128)
    assert_near(image[:, :, ::16, ::16], "main/out.image_pre", 0.0)
    pictures = model.embed_pictures(image)
    assert_near(pictures, "main/out.connector", SINGLE)
    tokens, mask = model.tokenize(given["instruction"])
    assert torch.equal(tokens, TENSORS["main/out.tokens"]) and torch.equal(mask, TENSORS["main/out.token_mask"])
    embedded, there = model.embed_prefix(pictures, tokens, mask)
    state = model.state_token(given["state"])[:, None]
    assert_near(torch.cat([embedded, state], 1), "main/out.prefix_embs", SINGLE)
    assert torch.equal(there, TENSORS["main/out.prefix_pad"][:, :-1])
    assert torch.equal(there.cumsum(1) - 1, TENSORS["main/out.prefix_pos"][:, :-1])
    assert torch.equal(there.sum(1), TENSORS["main/out.prefix_pos"][:, -1])
    read = model.read_prefix(embedded, there)
    length = embedded.shape[1]
    for name in ("keys", "values"):
        expected = TENSORS[f"main/out.cache_{name[0]}"][:, :, :length]
        difference = (read[PERCEPTION + name][:, :, :length] - expected).abs()
        assert difference[there[:, None].expand(-1, 4, -1)].max() <= SINGLE


@pytest.mark.parametrize("kept", ["prefix", "pictures"])
@torch.no_grad()
def test_velocities_and_chain_are_the_originals(model: SmolVLA, kept: str) -> None:
    model.kept = kept
    context = model.encode(observation())
    assert_near(context.features[:, 48:], "main/out.state_token", SINGLE)
    noise = TENSORS["main/in.noise"]
    for name, time in (("t1", 1.0), ("t06", 0.6), ("t01", 0.1)):
        assert_near(model.denoise(context, noise, torch.full((2,), time)), f"main/out.v_{name}", SINGLE)
    assert_near(model.embed_actions(noise, torch.full((2,), 0.6)), "main/out.suffix_embs_t06", SINGLE)
    _, hidden = model.denoise_features(context, noise, torch.full((2,), 0.6))
    assert_near(hidden, "main/out.expert_hidden_t06", SINGLE)
    chain = integrate(model, context, noise, 10)
    assert (chain - TENSORS["main/out.euler_chain"][:, -1]).abs().max() <= CHAIN
    assert_near(model.unnormalize_action(chain[..., :4]), "main/out.action_chunk", CHAIN)
    several = model.denoise(context, noise.repeat(3, 1, 1), torch.tensor([1.0, 0.6, 0.1]).repeat_interleave(2))
    for row, name in enumerate(("t1", "t06", "t01")):
        assert_near(several[2 * row : 2 * row + 2], f"main/out.v_{name}", SINGLE)


@torch.no_grad()
def test_the_loss_is_the_originals(model: SmolVLA) -> None:
    context = model.encode(observation())
    actions, noise, time = (TENSORS[f"main/in.{name}"] for name in ("actions_raw", "loss_noise", "loss_time"))
    assert_near(model.normalize_action(actions), "main/out.actions_norm", SINGLE)
    error = model.velocity_error(context, actions, noise, time).square()
    assert_near(error, "main/out.loss_elementwise", CHAIN)
    padded = ~TENSORS["main/in.action_is_pad"]
    for mask, name in ((torch.ones_like(padded), "nopad"), (padded, "pad")):
        weight = mask[:, :, None].expand(-1, -1, 4)
        assert error[..., :4][weight].mean() == pytest.approx(TENSORS[f"main/out.loss_head_{name}"].item(), abs=CHAIN)


def test_imitation_draws_time_and_noise_of_every_dimension(model: SmolVLA) -> None:
    given, mask = observation(), ~TENSORS["main/in.action_is_pad"]
    actions = TENSORS["main/in.actions_raw"]
    with torch.no_grad():
        torch.manual_seed(0)
        found = model.imitation_loss(given, actions, mask, draws=2)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((4, 6, 32), generator=generator)
        time = 0.001 + 0.999 * torch.rand(4, generator=generator) ** (2 / 3)
        error = model.velocity_error(model.encode(given), actions.repeat(2, 1, 1), noise, time)[..., :4].square()
    weight = mask.repeat(2, 1)
    assert found.item() == pytest.approx((error.mean(2) * weight).sum().item() / weight.sum().item(), rel=1e-5)
    torch.manual_seed(0)
    times = model.sample_time(100_000, torch.device("cpu"))
    assert 0.001 <= times.min() and times.max() <= 1.0
    assert times.mean().item() == pytest.approx(0.001 + 0.999 * 0.6, abs=3e-3)  # Beta(1.5, 1) has mean 0.6


@torch.no_grad()
def test_marks_of_pictures_and_rarer_self_attention_are_the_originals(published: Path) -> None:
    """And a fixed prefix length, whose padding has no effect."""
    model = load_checkpoint(with_options(published)).model
    assert isinstance(model, SmolVLA)
    tokens, mask = model.tokenize(instructions(RECORDS["options_tasks"]))
    assert torch.equal(tokens, TENSORS["options/out.tokens"])
    embedded, there = model.embed_prefix(TENSORS["options/out.connector"], tokens, mask)
    length = embedded.shape[1]
    assert (embedded - TENSORS["options/out.prefix_embs"][:, :length]).abs().max() <= SINGLE
    pads = TENSORS["options/out.prefix_pad"]
    assert torch.equal(there, pads[:, :length]) and not pads[:, length + 1 :].any()
    state = TENSORS["options/in.state_raw"]
    context = model.contextualize({**model.read_prefix(embedded, there), "state": state})
    noise = TENSORS["options/in.noise"]
    for name, time in (("t1", 1.0), ("t06", 0.6), ("t01", 0.1)):
        assert_near(model.denoise(context, noise, torch.full((1,), time)), f"options/out.v_{name}", SINGLE)
    assert_near(integrate(model, context, noise, 4), "options/out.sample_actions", CHAIN)


@torch.no_grad()
def test_mixed_precision_is_the_originals(published: Path, tmp_path: Path) -> None:
    model = load_smolvla(published, precision="mixed").model
    assert isinstance(model, SmolVLA)
    save_smolvla(tmp_path / "mixed", model)
    types = {
        key: str(value.dtype).removeprefix("torch.")
        for key, value in load_file(tmp_path / "mixed" / MODEL_FILE).items()
    }
    assert types == RECORDS["mixed_dtypes"]
    context = model.encode(observation())
    for name, time in (("t1", 1.0), ("t06", 0.6), ("t01", 0.1)):
        assert_near(
            model.denoise(context, TENSORS["main/in.noise"], torch.full((2,), time)), f"mixed/out.v_{name}", 0.05
        )
    chunk = model.unnormalize_action(integrate(model, context, TENSORS["main/in.noise"], 10)[..., :4])
    assert_near(chunk, "mixed/out.action_chunk", 0.05)


@pytest.mark.parametrize("size", list(RECORDS["full_size"]))
def test_full_size_names_and_shapes_are_the_originals(size: str) -> None:
    expected = RECORDS["full_size"][size]
    with torch.device("meta"):
        model = SmolVLA(vlm=expected["vlm"], layers=expected["layers"], resolution=(384, 384))
    shapes = {
        layout._their_name(key): tuple(value.shape)
        for key, value in model.state_dict().items()
        if key not in layout._STATISTICS
    }
    assert digest(shapes) == expected["digest"]
    assert parameter_count(model) == expected["total"]


def test_the_experts_width_follows_from_the_language_models() -> None:
    assert [expert_ffn(width) for width in (36, 432, 720, 1536)] == [256, 1280, 2048, 4096]


def test_pictures_of_other_shapes_get_black_at_left_and_top() -> None:
    model = SmolVLA(**{**TINY, "image_size": 16})
    wide = torch.full((1, 3, 8, 16), 255, dtype=torch.uint8)
    found = model.resize(wide)
    assert found.shape == (1, 3, 32, 32)
    assert torch.equal(found[:, :, :16], torch.full((1, 3, 16, 32), -1.0))
    assert torch.equal(found[:, :, 16:], torch.ones(1, 3, 16, 32))


def test_what_others_in_a_batch_say_does_not_matter() -> None:
    """Padding of a shorter sentence is seen by nothing."""
    model = SmolVLA(**{**TINY, "image_size": 32})
    short, long = toy_observation(1, "Go left"), toy_observation(1, "Go to the right side", seed=1)
    both = {key: torch.cat([short[key], long[key]]) for key in short}
    x = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        together, alone = model.encode(both), model.encode(short)
        assert (together.features[:1] - alone.features).abs().max() < 1e-5
        assert (model.denoise(together, x, time)[:1] - model.denoise(alone, x[:1], time[:1])).abs().max() < 1e-5


# --- Published folders ------------------------------------------------------------------------------------------------


def test_round_trip_through_lerobots_layout_is_exact(published: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(published)
    assert loaded.model_name == "smolvla" and loaded.distribution == ("flow_ode", {"denoising_steps": 10})
    assert isinstance(loaded.model, SmolVLA)
    assert_told_without_weights(published)
    save_smolvla(tmp_path / "again", loaded.model)
    assert same_tensors(load_file(tmp_path / "again" / MODEL_FILE), load_file(published / MODEL_FILE))
    for name, feature in ((STATE_FILE, "observation.state"), (ACTION_FILE, "action")):
        found, expected = load_file(tmp_path / "again" / name), load_file(published / name)
        assert all(
            torch.equal(found[f"{feature}.{moment}"], expected[f"{feature}.{moment}"]) for moment in ("mean", "std")
        )
    config, expected_config = (
        json.loads((tmp_path / "again" / "config.json").read_text()),
        RECORDS["files"]["config.json"],
    )
    own = {"vlm_model_name": str(tmp_path / "again" / "vlm")}
    assert {key: expected_config[key] for key in config} | own == config
    steps = [
        step["registry_name"]
        for step in json.loads((tmp_path / "again" / "policy_preprocessor.json").read_text())["steps"]
    ]
    assert steps == [step["registry_name"] for step in RECORDS["head_files"]["policy_preprocessor.json"]["steps"]]
    again = load_checkpoint(tmp_path / "again").model
    assert same_tensors(again.state_dict(), loaded.model.state_dict())
    with torch.no_grad():
        first, second = loaded.model.encode(observation()), again.encode(observation())
    assert torch.equal(first.features, second.features)


def test_our_own_checkpoint_needs_nothing_else(published: Path, tmp_path: Path) -> None:
    model = load_checkpoint(published).model
    save_checkpoint(tmp_path / "own", model)
    again = load_checkpoint(tmp_path / "own").model
    assert same_tensors(again.state_dict(), model.state_dict()) and again.config == model.config
    tokens, _ = again.tokenize(instructions(RECORDS["tasks"]))  # type: ignore[operator]
    assert torch.equal(tokens, TENSORS["main/out.tokens"])


def test_the_present_layout_has_its_tokenizer_beside_it(published: Path) -> None:
    (published / "vlm" / "tokenizer.json").unlink()
    write_files(published, RECORDS["head_files"])
    tokens, _ = load_checkpoint(published).model.tokenize(instructions(RECORDS["tasks"]))  # type: ignore[operator]
    assert torch.equal(tokens, TENSORS["main/out.tokens"])


def tokenizer_step(folder: Path) -> dict[str, Any]:
    steps = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    (found,) = [step for step in steps if step["registry_name"] == "tokenizer_processor"]
    return found


def ids_by_transformers(folder: Path | str, texts: list[str]) -> list[list[int]]:
    """As LeRobot asks for them; the shorter one is padded on the right."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(texts, padding="longest", padding_side="right").input_ids


@pytest.mark.parametrize("written", ["model", "~/model"])
def test_lerobot_finds_all_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    """Released LeRobot looks names up in the working directory or on the hub."""
    model = SmolVLA(**TINY)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save_smolvla(written, model)
    monkeypatch.chdir(tmp_path / "elsewhere")
    step = tokenizer_step(tmp_path / "model")
    assert step["config"]["tokenizer_name"] == str(tmp_path / "model" / "tokenizer")
    assert step["artifacts"] == {"tokenizer_name": "tokenizer"}
    vlm = json.loads((tmp_path / "model" / "config.json").read_text())["vlm_model_name"]
    assert vlm == str(tmp_path / "model" / "vlm")
    tokens, mask = model.tokenize(instructions(["open the door", "push"]))
    for folder in (step["config"]["tokenizer_name"], vlm):
        assert ids_by_transformers(folder, ["open the door\n", "push\n"]) == (tokens * mask).tolist()


def test_the_processor_of_a_vlm_of_its_own_size(tmp_path: Path) -> None:
    """transformers' processor has image and video processors, which need torchvision, so its files are compared."""
    from transformers import AutoConfig, AutoTokenizer

    save_smolvla(tmp_path / "model", SmolVLA(**TINY))
    vlm = tmp_path / "model" / "vlm"
    assert {path.name for path in vlm.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((vlm / "processor_config.json").read_text()) == {"processor_class": "SmolVLMProcessor"}
    assert AutoConfig.from_pretrained(vlm).text_config.hidden_size == 48
    tokenizer = AutoTokenizer.from_pretrained(vlm)
    assert (tokenizer.fake_image_token_id, tokenizer.global_image_token_id) == (3, 4)


def test_a_vlm_in_mixed_precision_has_weights_for_lerobot_to_load(tmp_path: Path) -> None:
    """It makes the model so only where it loads them."""
    model = SmolVLA(**TINY, precision="mixed")
    save_smolvla(tmp_path / "model", model)
    weights = load_file(tmp_path / "model" / "vlm" / MODEL_FILE)
    assert sum(value.numel() for value in weights.values()) == sum(p.numel() for p in model.backbone())
    assert torch.equal(weights["model.connector.modality_projection.proj.weight"], model.connector.weight)
    again = load_smolvla(tmp_path / "model", precision="mixed").model
    assert same_tensors(again.state_dict(), model.state_dict())


def test_a_folder_that_was_moved_reads_its_own_parts(tmp_path: Path) -> None:
    """Not those that have taken the place where it was written."""
    model = SmolVLA(**TINY)
    save_smolvla(tmp_path / "there", model)
    (tmp_path / "there").rename(tmp_path / "here")
    save_smolvla(tmp_path / "there", SmolVLA(**{**TINY, "vlm": {**TINY["vlm"], "heads": 6, "head_dim": 8}}))
    (tmp_path / "there" / "tokenizer" / "tokenizer.json").write_text("{}")
    again = load_checkpoint(tmp_path / "here").model
    assert again.config == {**model.config, "tokenizer": again.config["tokenizer"]}
    assert torch.equal(again.tokenize(instructions(["push"]))[0], model.tokenize(instructions(["push"]))[0])  # type: ignore[operator]


def test_the_hubs_tokenizer_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is found wherever the folder is moved; one that only has another's place does not."""
    text = json.dumps(RECORDS["files"]["vlm/tokenizer.json"])
    (tmp_path / "cached.json").write_text(text)
    cached = {(layout.VLM_NAMES["500M"], "tokenizer.json"): str(tmp_path / "cached.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *key: cached.get(key))
    for given, name in ((text, layout.VLM_NAMES["500M"]), (None, str(tmp_path / "own" / "tokenizer"))):
        save_smolvla(tmp_path / "own", SmolVLA(**TINY, tokenizer=given))
        step = tokenizer_step(tmp_path / "own")
        assert (step["config"]["tokenizer_name"], step["artifacts"]) == (name, {"tokenizer_name": "tokenizer"})


def test_padding_is_one_of_the_tokenizers_own_tokens(tmp_path: Path) -> None:
    """transformers gives a token that a tokenizer has not a number behind the last, for which there is no embedding."""
    text = json.dumps(RECORDS["files"]["vlm/tokenizer.json"]).replace("<pad>", "<|endoftext|>")
    save_smolvla(tmp_path / "model", SmolVLA(**TINY, tokenizer=text))
    found = ids_by_transformers(tmp_path / "model" / "tokenizer", ["open the door\n", "push\n"])
    assert found[1][5:] == [0] * 9


def test_a_sentence_that_is_a_line_stays_one(model: SmolVLA) -> None:
    """LeRobot adds a newline where there is none."""
    tokens, mask = model.tokenize(instructions(["push", "push\n", "push\n\n"]))
    assert mask.sum(1).tolist() == [5, 5, 6] and torch.equal(tokens[0], tokens[1])


def old_layout(folder: Path) -> None:
    """Before LeRobot 0.4: statistics among the weights, no processors."""
    statistics = {key: value for key, value in load_file(folder / STATE_FILE).items() if key.endswith(("mean", "std"))}
    names = {
        "observation.state": "normalize_inputs.buffer_observation_state",
        "action": "unnormalize_outputs.buffer_action",
    }
    buffers = {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in statistics.items()}
    edit_tensors(folder / MODEL_FILE, buffers)
    for path in [*folder.glob("policy_*")]:
        path.unlink()


def test_the_layout_before_has_statistics_among_the_weights(published: Path) -> None:
    expected = load_checkpoint(published).model
    old_layout(published)
    assert same_tensors(load_checkpoint(published).model.state_dict(), expected.state_dict())


def test_a_base_model_of_another_robot_is_imitated_from(published: Path) -> None:
    """It has six joints and no statistics, and takes the environment's four numbers and the data's normalization."""
    features = RECORDS["files"]["config.json"]["input_features"]
    six = {"type": "STATE", "shape": [6]}
    image = {"type": "VISUAL", "shape": [3, 32, 32]}
    edit_json(
        published / "config.json",
        input_features={**features, "observation.image": image, "observation.state": six},
        output_features={"action": {"type": "ACTION", "shape": [6]}},
    )
    for name in (STATE_FILE, ACTION_FILE):
        (published / name).unlink()
    with pytest.raises(FileNotFoundError, match="statistics to normalize by"):
        load_checkpoint(published)
    with pytest.raises(ValueError, match="has no option 'bas'; did you mean 'base'"):
        load_checkpoint(published, {"bas": True})
    data = toy_demonstrations()
    config = SFTConfig(
        checkpoint=str(published),
        model_kwargs={"base": True},
        trainable="expert",
        steps=1,
        batch_size=2,
        warmup_steps=0,
        shift=0,
        validation_fraction=0.0,
        bf16=False,
    )
    model = sft(data, config, progress=False).model
    assert isinstance(model, SmolVLA) and (model.action_dim, model.state_mean.shape) == (4, (4,))
    np.testing.assert_allclose(model.state_mean.numpy(), data.states.mean(0), atol=1e-6)
    np.testing.assert_allclose(model.action_mean.numpy(), data.actions.mean(0), atol=1e-6)
    assert torch.equal(model.connector.weight, load_checkpoint(published, {"base": True}).model.connector.weight)  # type: ignore[union-attr, arg-type]


def test_statistics_that_were_never_set_are_missing(published: Path) -> None:
    old_layout(published)
    edit_tensors(published / MODEL_FILE, {"unnormalize_outputs.buffer_action.std": torch.full((4,), torch.inf)})
    with pytest.raises(ValueError, match=r"lacks the statistics action_std.*base: true"):
        load_checkpoint(published)


def test_cameras_of_other_names_are_the_environments(published: Path) -> None:
    features = RECORDS["files"]["config.json"]["input_features"]
    image = features["observation.image"]
    renamed = {
        "observation.images.camera1": image,
        "observation.images.camera2": image,
        "observation.state": features["observation.state"],
    }
    edit_json(published / "config.json", input_features=renamed, empty_cameras=1)
    assert load_checkpoint(published).model.config["absent_pictures"] == 1


def test_weights_in_several_files(published: Path, tmp_path: Path) -> None:
    model = load_checkpoint(published).model
    assert isinstance(model, SmolVLA)
    save_smolvla(tmp_path / "shards", model)
    weights = load_file(tmp_path / "shards" / MODEL_FILE)
    (tmp_path / "shards" / MODEL_FILE).unlink()
    write_weights(tmp_path / "shards", weights, max_bytes=300_000)
    shards = sorted(path.name for path in (tmp_path / "shards").glob("model-*"))
    assert len(shards) > 2 and not (tmp_path / "shards" / MODEL_FILE).exists()
    assert same_tensors(load_checkpoint(tmp_path / "shards").model.state_dict(), model.state_dict())
    (tmp_path / "shards" / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=shards[1]):
        load_checkpoint(tmp_path / "shards")


def test_positions_as_lerobot_has_them_with_some_transformers(tmp_path: Path) -> None:
    """The arithmetic of transformers 4.55 to 4.57, in which a fraction that is a little less falls before its edge."""
    model = SmolVLA(**TINY)
    save_smolvla(tmp_path / "model", model)
    edges = torch.arange(1 / 4, 1.0, 1 / 4)
    place = torch.bucketize(torch.arange(4) / 4 * (1 - 1e-6), edges, right=True)
    expected = model.vision_model.embeddings.position_embedding.weight[(place[:, None] * 4 + place).flatten()]
    shifted = load_checkpoint(tmp_path / "model", {"shifted_positions": True}).model
    assert torch.equal(shifted.vision_model.embeddings.position_embedding.weight, expected)  # type: ignore[union-attr]
    assert place.tolist() == [0, 0, 1, 2]
    save_smolvla(tmp_path / "model", SmolVLA(**TINY, resolution=(16, 16)))
    with pytest.raises(ValueError, match=r"shifted_positions=True .* vision tower's size 32; these are 16"):
        load_smolvla(tmp_path / "model", shifted_positions=True)


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def configured(**changes: Any) -> Any:
    return lambda folder: edit_json(folder / "config.json", **changes)


def reweighted(changes: dict[str, Tensor], drop: str | None = None, name: str = MODEL_FILE) -> Any:
    return lambda folder: edit_tensors(folder / name, changes, drop)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (without(MODEL_FILE), FileNotFoundError, "has no model.safetensors"),
        (without(STATE_FILE), FileNotFoundError, "statistics to normalize by"),
        (without("policy_postprocessor.json"), FileNotFoundError, "policy_postprocessor.json"),
        (without("vlm/tokenizer.json"), FileNotFoundError, "has no tokenizer.*tokenizer=<path>"),
        (without("vlm/config.json"), ValueError, "configuration of its vision-language model 'vlm'"),
        (lambda folder: (folder / MODEL_FILE).write_bytes(b"nothing"), ValueError, "model.safetensors is damaged"),
        (reweighted({}, "action.std", ACTION_FILE), ValueError, "lacks the statistics action_std"),
        (reweighted({}, "model.state_proj.bias"), ValueError, "missing state_proj.bias .1 in all"),
        (reweighted({"model.other": torch.zeros(1)}), ValueError, "unexpected other"),
        (reweighted({"model.state_proj.bias": torch.zeros(3)}), ValueError, r"shape \(3,\), expected \(48,\)"),
        (configured(num_vlm_layers=5), ValueError, "missing text_model.layers.4"),
        (configured(num_expert_layers=2), ValueError, "num_expert_layers=2"),
        (configured(attention_mode="self_attn"), ValueError, "attention_mode='self_attn'"),
        (
            configured(normalization_mapping={"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"}),
            ValueError,
            "MIN_MAX",
        ),
        (configured(input_features={}), ValueError, "expected a camera"),
        (configured(chunk_size=None, output_features=None), ValueError, "no complete SmolVLA configuration"),
    ],
)
def test_what_is_wrong_is_named(published: Path, damage: Any, error: type[Exception], message: str) -> None:
    damage(published)
    with pytest.raises(error, match=message):
        load_checkpoint(published)


def test_a_given_tokenizer_takes_the_place_of_a_missing_one(published: Path, tmp_path: Path) -> None:
    (published / "vlm" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    tokens, _ = load_smolvla(published, tokenizer=tmp_path).model.tokenize(instructions(RECORDS["tasks"]))  # type: ignore[operator]
    assert torch.equal(tokens, TENSORS["main/out.tokens"])
    with pytest.raises(FileNotFoundError, match="There is no tokenizer"):
        load_smolvla(published, tokenizer=tmp_path / "elsewhere.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vlm": "1T"}, "expected 256M, 500M, 2.2B, laptop"),
        ({"resolution": (40, 40)}, "multiple of 2"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"kept": "nothing"}, "kept='nothing'"),
        ({"action_dim": 9}, "latent_dim=8"),
        ({"tokenizer": "{}"}, "tokenizer.json"),
        ({"vlm": {**TINY["vlm"], "vocabulary": 100}}, "has 263 tokens, the model 100"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmolVLA(**{**TINY, **options})


# --- Learning ---------------------------------------------------------------------------------------------------------


def test_lerobots_choice_is_to_train_the_expert_alone() -> None:
    model = SmolVLA(**{**TINY, "train_expert_only": True})
    assert not any(parameter.requires_grad for parameter in model.backbone())
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        "expert",
        "state_proj",
        "action_in_proj",
        "action_out_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
    }


@pytest.mark.parametrize("expert_only", [True, False])
def test_what_is_trained_where_nobody_says_it(tmp_path: Path, expert_only: bool) -> None:
    """What the model, or a folder of LeRobot's, says; ``trainable`` says it above both."""
    options = {**TINY, "image_size": 32, "train_expert_only": expert_only}
    save_smolvla(tmp_path / "model", SmolVLA(**options))

    def trained(**policy_kwargs: Any) -> bool:
        policy = PPO("VLAPolicy", toy_vec(2, action_dim=4), device="cpu", policy_kwargs=policy_kwargs).policy
        assert all(p.requires_grad for p in policy.model.expert.parameters())
        return any(p.requires_grad for p in policy.model.backbone())

    made = {"model": "smolvla", "model_kwargs": options}
    assert trained(**made) is not expert_only
    assert trained(checkpoint=tmp_path / "model") is not expert_only
    assert trained(**made, trainable="all") and not trained(**made, trainable="expert")
    config = SFTConfig(checkpoint=str(tmp_path / "model"), steps=2, batch_size=2, ema_decay=0.0, shift=0)
    found = sft(toy_demonstrations(), config, progress=False).model
    before = load_checkpoint(tmp_path / "model").model
    moved = [not torch.equal(old, new) for old, new in zip(before.backbone(), found.backbone(), strict=True)]
    assert any(moved) is not expert_only


def test_imitates_then_learns_by_ppo_and_comes_back_from_lerobots_layout(tmp_path: Path) -> None:
    config = SFTConfig(
        model="smolvla",
        model_kwargs=TINY,
        action_horizon=2,
        steps=50,
        batch_size=16,
        learning_rate=3e-3,
        warmup_steps=5,
        ema_decay=0.9,
        shift=0,
    )
    result = sft(toy_demonstrations(), config, progress=False)
    losses = [row["train_loss"] for row in result.history]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert isinstance(result.model, SmolVLA)
    save_smolvla(tmp_path / "imitated", result.model)
    algorithm = PPO(
        "VLAPolicy",
        toy_vec(4, action_dim=4),
        n_steps=4,
        batch_size=16,
        n_epochs=2,
        seed=0,
        device="cpu",
        learning_rate=1e-3,
        policy_kwargs={"checkpoint": tmp_path / "imitated", "distribution": "flow_sde", "trainable": "expert"},
    )
    before = {name: parameter.clone() for name, parameter in algorithm.policy.model.named_parameters()}
    pictures: list[int] = []
    algorithm.policy.model.vision_model.register_forward_pre_hook(lambda *_: pictures.append(1))
    algorithm.learn(16)
    assert len(pictures) == 4 + 1  # the decisions of each step together, those after the last: none in the update
    kept = algorithm.rollout_buffer.observations
    assert "image" not in kept and kept["perception/keys"].shape[-4:] == (2, 4 + 24, 1, 16)  # layers, T, heads, width
    frozen = {id(parameter) for parameter in algorithm.policy.model.backbone()}
    moved = {
        name
        for name, parameter in algorithm.policy.model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    held = {name for name, parameter in algorithm.policy.model.named_parameters() if id(parameter) in frozen}
    assert not moved & held and {"state_proj.weight", "expert.layers.1.self_attn.k_proj.weight"} <= moved
    trained = algorithm.policy.model
    assert isinstance(trained, SmolVLA)
    save_smolvla(tmp_path / "trained", trained)
    assert same_tensors(load_checkpoint(tmp_path / "trained").model.state_dict(), trained.state_dict())


@pytest.mark.parametrize("trainable", ["expert", "all"])
def test_the_same_decisions_have_the_same_probability(trainable: str) -> None:
    """So that ratios are one before the first step."""
    algorithm = toy_ppo(
        toy_vec(2), model="smolvla", model_kwargs=TINY, distribution="flow_sde", trainable=trainable, stirred=False
    )
    probability, rows = probability_of(algorithm.policy, toy_observation(4)), torch.arange(4)
    first = probability(rows)
    assert torch.equal(probability(rows), first) and torch.isfinite(first).all()


def test_ppo_learns_what_the_instruction_means() -> None:
    kwargs = {**TINY, "latent_dim": 2}
    assert_learns_what_the_instruction_means(toy_vec(16), model="smolvla", model_kwargs=kwargs, distribution="flow_sde")
