"""TinyVLA: its authors' numbers, their folder, key names at full size, imitation and PPO.

Tolerances are those of independent float32 implementations: 2e-5 for a tensor, 1e-4 for what sums up many and for
chains and losses; tokens and masks are exact.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from published import assert_told_without_weights, edit_json, edit_tensors
from reference_weights import reference_weight
from safetensors.torch import load_file, save_file
from torch import nn
from toy import changed_by_an_update, stir, toy_demonstrations, toy_observation, toy_ppo, toy_vec

from mw_envs import encode_instruction
from sb3_vla import PPO
from sb3_vla.checkpoints import checkpoint_digest, load_checkpoint, save_checkpoint, save_tinyvla
from sb3_vla.checkpoints.formats.tinyvla import _NEW_HEAD, _their_name
from sb3_vla.distributions import make_distribution
from sb3_vla.models import Context, TinyVLA, make_model
from sb3_vla.models.diffusion import step_sinusoid
from sb3_vla.models.resizing import resize_by_integers
from sb3_vla.models.tinyvla import bf16_sinusoid
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.vla_policy import VLAPolicy
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig

DATA = Path(__file__).parents[2] / "data" / "tinyvla"
LANGS = ("Push the puck to a goal", "Open a door with a revolving joint")
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY: dict[str, Any] = {
    "image_size": 32,
    "action_horizon": 4,
    "vision": {**_TOWER, "image_size": 32, "patch_size": 16},
    "language": {**_TOWER, "vocab_size": 258},
    "down_dims": (16, 32),
    "step_dim": 8,
    "timesteps": 20,
}


@functools.cache
def recorded(tower: str) -> dict[str, torch.Tensor]:
    tensors = load_file(DATA / f"{tower}.safetensors")
    if tower == "clip":
        pictures = [Image.open(io.BytesIO(tensors.pop(f"in.image_png.{i}").numpy().tobytes())) for i in range(2)]
        tensors["in.image"] = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    else:
        tensors["in.image"] = recorded("clip")["in.image"]
    return tensors


def assert_recorded(tower: str, name: str, value: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(value, recorded(tower)[f"out.{name}"], atol=atol, rtol=0)


def make_published(folder: Path, tower: str) -> Path:
    """The folder as its authors' code wrote it."""
    folder.mkdir()
    shutil.copy(DATA / f"{tower}.json", folder / "config.json")
    for name in ("tokenizer.json", "dataset_stats.pkl"):
        shutil.copy(DATA / name, folder)
    config = json.loads((DATA / f"{tower}.json").read_text())
    vision = {key: value for key, value in config["vision_config"]["vision_tower"].items() if key in VISION}
    language = {key: config[key] for key in LANGUAGE}
    sizes = {"vision": vision, "language": language, "tower": tower}
    tiny = TinyVLA(action_horizon=16, image_size=480, down_dims=(16, 32, 48), step_dim=16, **sizes)
    shapes = {_their_name(key): tuple(value.shape) for key, value in weights_of(tiny).items()}
    save_file(
        {key: reference_weight(key, shape, seed=7) for key, shape in shapes.items()}, folder / "model.safetensors"
    )
    return folder


VISION = {*_TOWER, "image_size", "patch_size", "hidden_act", "layer_norm_eps"}
LANGUAGE = {*_TOWER, "vocab_size"}


def weights_of(model: TinyVLA) -> dict[str, torch.Tensor]:
    """What is no statistic."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith(("action_", "state_"))}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_published(tmp_path_factory.mktemp("published") / "clip", "clip")


@pytest.fixture(scope="module")
def models(published: Path) -> dict[str, TinyVLA]:
    siglip = make_published(published.parent / "siglip", "siglip")
    return {"clip": load_checkpoint(published).model, "siglip": load_checkpoint(siglip).model}  # type: ignore[dict-item]


def instructions(*sentences: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([encode_instruction(sentence) for sentence in sentences]))


# --- Its authors' numbers ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_pictures(models: dict[str, TinyVLA], tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = models[tower], recorded(tower)
    pixels = model.pixels(found["in.image"])
    assert_recorded(tower, "pixel_values", pixels[:1])
    assert_recorded(tower, "pixel_values_r", pixels[1:])
    hidden = model.vision_tower(pixel_values=pixels[:1], output_hidden_states=True).hidden_states
    assert_recorded(tower, "vision_hidden", torch.stack(hidden, 1))
    assert_recorded(tower, "projected", model.look(pixels)[:1])
    monkeypatch.setattr(model, "center_crop", False)
    assert_recorded(tower, "pixel_values_nocrop", model.pixels(found["in.image"][:1]))


@pytest.mark.parametrize(("source", "size"), [(480, 336), (64, 56), (30, 75)])
def test_interpolation_is_pillows(source: int, size: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (source, source, 3), np.uint8)
    expected = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
    found = resize_by_integers(torch.from_numpy(picture).permute(2, 0, 1)[None], (size, size), "cubic")
    np.testing.assert_array_equal(found[0].permute(1, 2, 0).numpy(), np.asarray(expected))


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_condition(models: dict[str, TinyVLA], tower: str) -> None:
    """From two pictures and from one, and that of a batch as of each alone, shorter and longer sentences."""
    model, found = models[tower], recorded(tower)
    pixels = torch.cat([found["out.pixel_values"], found["out.pixel_values_r"]])
    sentence = instructions(LANGS[0])
    embeddings, mask = model.sequence(model.look(pixels).flatten(0, 1)[None], sentence)
    assert_recorded(tower, "llm_embeds", embeddings[:, ::8])
    assert torch.equal(mask, found["out.llm_attention_mask"])
    assert_recorded(tower, "llm_last", model.read(embeddings, mask)[:, ::8])
    single = model.read(*model.sequence(model.look(pixels[:1]), sentence))
    assert_recorded(tower, "llm_last_single_camera", single[:, ::8])
    observation = {"image": found["in.image"][None], "state": found["in.state_raw"][:1], "instruction": sentence}
    perception = model.perceive(observation)
    assert_recorded(tower, "cond_pooled", perception["perception/pooled"])
    assert_recorded(tower, "cond_norm", model.norm_after_pool(perception["perception/pooled"]), atol=1e-4)
    context = model.contextualize(perception)
    assert_recorded(tower, "cond", context.state, atol=1e-4)
    together = {**{key: value.expand(2, *value.shape[1:]) for key, value in observation.items()}}
    together["instruction"] = instructions(*LANGS)
    torch.testing.assert_close(model.encode(together).state[:1], context.state, atol=2e-5, rtol=0)
    once = model.encode({**observation, "image": found["in.image"][:1]}).state
    twice = model.encode({**observation, "image": found["in.image"][:1].expand(2, -1, -1, -1)[None]}).state
    torch.testing.assert_close(once, twice, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("bf16_time", [False, True])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_head(models: dict[str, TinyVLA], tower: str, bf16_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = models[tower], recorded(tower)
    assert model.unet.sinusoid is bf16_sinusoid  # published weights were trained so
    ending = "_bf16time" if bf16_time else ""
    monkeypatch.setattr(model.unet, "sinusoid", bf16_sinusoid if bf16_time else step_sinusoid)
    if tower == "clip":
        assert_recorded(tower, "temb_sinusoid" + ending, model.unet.sinusoid(found["in.head_t"], 16))
        pooled = model.norm_after_pool(found["in.head_hidden"].mean(1))
        condition = model.combine(torch.cat([pooled, found["in.head_state"]], 1))
        predicted = model.denoise(Context(condition, condition), found["in.head_x"], found["in.head_t"])
        assert_recorded(tower, "head_out" + ending, predicted)
    chain = make_distribution("ddim", model, 16, denoising_steps=10, eta=0.0)
    context, x = Context(found["out.cond"], found["out.cond"]), found["in.noise"]
    states = [x]
    for step in range(10):
        x = chain.kernel(model, context, x, torch.tensor([step]))[2]  # type: ignore[operator]
        states.append(x)
    assert_recorded(tower, "ddim_chain" + ending, torch.stack(states, 1), atol=1e-4)
    assert_recorded(tower, "actions" + ending, model.unnormalize_action(x)[0], atol=1e-4)


@torch.no_grad()
def test_training_batch(models: dict[str, TinyVLA], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sentences, padded; the original pools the padding too and divides by all elements."""
    model, found = models["clip"], recorded("clip")
    monkeypatch.setattr(model.unet, "sinusoid", step_sinusoid)
    monkeypatch.setattr(model, "prompt", model.prompt.replace("ASSISTANT: ", "ASSISTANT:  "))
    x0 = model.normalize_action(found["in.actions_raw"])
    assert_recorded("clip", "actions_norm_train", x0)
    assert_recorded("clip", "state_norm", model._normalize("state", found["in.state_raw"]))
    x, target = model.noised(x0, found["in.loss_noise"], found["in.loss_t"])
    assert_recorded("clip", "train_noisy", x)
    seen = [model.look(found[f"out.train_pixel_values{view}"]) for view in ("", "_r")]
    embeddings, mask = model.sequence(torch.cat(seen, dim=1), instructions(*LANGS))
    assert torch.equal(mask, found["out.train_llm_mask"])
    states = model.read(embeddings, mask)
    assert_recorded("clip", "train_llm_last", states[:, ::8])
    context = model.contextualize({"perception/pooled": states.mean(1), "state": found["in.state_raw"]})
    predicted = model.denoise(context, x, found["in.loss_t"])
    assert_recorded("clip", "train_eps", predicted)
    valid = ~found["in.is_pad"][:, :, None]
    assert_recorded("clip", "train_loss", ((predicted - target).square() * valid).mean()[None], atol=1e-4)


def test_tokens(models: dict[str, TinyVLA]) -> None:
    model, expected = models["clip"], recorded("clip")["out.input_ids"][0].tolist()
    before, after = model.prompt.split("<image>")
    after = after.format(instruction=LANGS[0])
    assert [*model.tokenizer.encode(before).ids, -200, *model.tokenizer.encode(after).ids] == expected


# --- Folders ----------------------------------------------------------------------------------------------------------


def full_size(hidden: int, layers: int, heads: int) -> TinyVLA:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    language = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    with torch.device("meta"):
        return TinyVLA(
            action_horizon=16,
            vision={**vision, "image_size": 336, "patch_size": 14},
            language={**language, "num_attention_heads": heads, "vocab_size": 50304},
            down_dims=(256, 512, 1024),
            step_dim=256,
        )


def test_full_size_has_their_weights() -> None:
    expected = json.loads((DATA / "full_size.json").read_text())
    ours = {_their_name(key): list(value.shape) for key, value in weights_of(full_size(512, 6, 8)).items()}
    assert ours == expected["pythia70m"]
    for name, sizes in {"pythia410m": (1024, 24, 16), "pythia1b": (2048, 16, 8)}.items():
        assert sum(value.numel() for value in weights_of(full_size(*sizes)).values()) == expected["totals"][name]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_round_trip_through_their_folder(
    models: dict[str, TinyVLA], published: Path, tmp_path: Path, tower: str
) -> None:
    before = published.parent / tower
    save_tinyvla(tmp_path / "again", models[tower])
    old, new = load_file(before / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(value, new[key]) for key, value in old.items())
    again = load_checkpoint(tmp_path / "again")
    state = again.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in models[tower].state_dict().items())
    expected, found = (json.loads((f / "config.json").read_text()) for f in (before, tmp_path / "again"))
    common = set(expected) & set(found)
    assert {"chunk_size", "concat", "rotary_pct", "hidden_size", "action_head_type"} <= common
    assert {key: found[key] for key in common - {"vision_config"}} == {
        key: expected[key] for key in common - {"vision_config"}
    }
    assert again.distribution == ("ddim", {"denoising_steps": 10})


def test_its_tokenizer_is_transformers_too(tmp_path: Path) -> None:
    """As the authors' code asks for it, with a token to pad by: the one that their batches have."""
    from transformers import AutoTokenizer

    model = TinyVLA(image_size=32)
    save_tinyvla(tmp_path / "theirs", model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    found = tokenizer(["open the door<|endoftext|>", "push"], padding="longest").input_ids
    expected = [model.tokenizer.encode(text).ids for text in ("open the door<|endoftext|>", "push")]
    assert found == [expected[0], expected[1] + [1] * 10]


def test_a_unet_that_their_code_has_not_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"TinyVLA's code cannot load .*down_dims=\(64, 128, 256\) \(there: \(256,"):
        save_tinyvla(tmp_path / "theirs", TinyVLA(image_size=32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_tinyvla(tmp_path / "same", TinyVLA(image_size=32, down_dims=[256, 512, 1024], step_dim=256))


def test_from_scratch_through_both_folders(tmp_path: Path) -> None:
    model = TinyVLA(**TINY, tower="siglip", mask_padding=False)
    stir(model)
    save_tinyvla(tmp_path / "theirs", model)
    save_checkpoint(tmp_path / "ours", model)
    observation = toy_observation(2)
    with torch.no_grad():
        expected = model.encode(observation).state
        for folder in ("theirs", "ours"):
            again = load_checkpoint(tmp_path / folder).model
            assert torch.equal(again.encode(observation).state, expected)
            assert not again.mask_padding and again.image_size == (32, 32)  # type: ignore[union-attr]


def test_shards_and_statistics_in_the_parent(published: Path, tmp_path: Path) -> None:
    """And constants that transformers once stored."""
    folder = tmp_path / "run" / "checkpoint"
    shutil.copytree(published, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(2)
    names = sorted(weights)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "dataset_stats.pkl").rename(folder.parent / "dataset_stats.pkl")
    found, expected = load_checkpoint(folder).model.state_dict(), load_checkpoint(published).model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_the_vision_language_model_alone_is_imitated_from(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llava-Pythia has the language model's own output, no statistics and no settings of a head."""
    folder = tmp_path / "base"
    shutil.copytree(published, folder)
    (folder / "dataset_stats.pkl").unlink()
    config = json.loads((folder / "config.json").read_text())
    for name in ("action_head_type", "action_dim", "state_dim", "chunk_size", "concat"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    theirs = load_file(folder / "model.safetensors")
    towers = {key: value for key, value in theirs.items() if not key.startswith("embed_out.")}
    language = torch.zeros(config["vocab_size"], config["hidden_size"])
    save_file({**towers, "embed_out.weight": language}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no complete TinyVLA configuration.*action_head_type"):
        load_checkpoint(folder)
    monkeypatch.setitem(_NEW_HEAD, "down_dims", (16, 32))
    monkeypatch.setitem(_NEW_HEAD, "image_size", 32)
    data = toy_demonstrations()
    settings = SFTConfig(
        checkpoint=str(folder),
        model_kwargs={"base": True},
        trainable="expert",
        steps=1,
        batch_size=2,
        warmup_steps=0,
        shift=0,
        validation_fraction=0.0,
        bf16=False,
    )
    model = sft(data, settings, progress=False).model
    assert isinstance(model, TinyVLA) and (model.action_dim, model.action_horizon, model.cameras) == (4, 16, 1)
    np.testing.assert_allclose(model.state_mean.numpy(), data.states.mean(0), atol=1e-6)
    found = {_their_name(key): value for key, value in weights_of(model).items()}
    assert all(torch.equal(found[key], value) for key, value in towers.items())


ADAPTED = ("query_key_value", "dense", "q_proj", "v_proj")


def module_of(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Modules that have these weights by their names; linear layers where an adapter belongs."""
    root = nn.Module()
    for key, value in weights.items():
        layer, _, leaf = key.rpartition(".")
        module, matrix = root, weights.get(f"{layer}.weight")
        for name in layer.split("."):
            if name not in module._modules:
                linear = name in ADAPTED and matrix is not None
                module.add_module(name, nn.Linear(*reversed(matrix.shape)) if linear else nn.Module())
            module = module.get_submodule(name)
        module.register_parameter(leaf, nn.Parameter(value.clone()))
    return root


def make_adapter(
    published: Path, root: Path, tower: str, settings: dict[str, Any], converted: bool
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of an adapter as their training writes it, and the weights that peft merges it to.

    :param converted: all weights in a folder, as DeepSpeed's converter leaves them; else in a file those trained in
        full.
    """
    import peft

    base, folder = root / "base", root / "run" / "checkpoint-2"
    weights = load_file(published.parent / tower / "model.safetensors")
    base.mkdir()
    language = {key: value for key, value in weights.items() if not key.startswith("embed_out.")}
    save_file({**language, "embed_out.weight": torch.ones(258, 32)}, base / "model.safetensors")
    shutil.copy(DATA / "tokenizer.json", base)
    folder.mkdir(parents=True)
    shutil.copy(published.parent / tower / "config.json", folder.parent)
    shutil.copy(DATA / "dataset_stats.pkl", folder.parent)
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=list(ADAPTED), **settings)
    adapted = peft.get_peft_model(module_of(weights), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    in_full, everything = {}, {}
    for key, value in adapted.named_parameters():
        if any(part in key for part in ("lora_", "embed_out.", "mm_projector.")):
            value.data.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
            if "lora_" not in key:
                in_full[key] = value.data.clone()
        everything[key] = value.data.clone()
    adapted.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    others = folder / "non_lora_trainables.bin"
    if converted:
        others.mkdir()
        torch.save(everything, others / "pytorch_model.bin")
    else:
        torch.save(in_full, others)
    return folder, dict(adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    ("tower", "settings", "converted"), [("clip", {}, False), ("siglip", {"use_rslora": True}, True)]
)
def test_a_folder_of_an_adapter(
    models: dict[str, TinyVLA], published: Path, tmp_path: Path, tower: str, settings: dict[str, Any], converted: bool
) -> None:
    folder, expected = make_adapter(published, tmp_path, tower, settings, converted)
    model = load_checkpoint(folder).model
    assert isinstance(model, TinyVLA)
    found = {_their_name(key): value for key, value in weights_of(model).items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=2e-6, rtol=0, msg=key)
    key = "gpt_neox.layers.1.attention.query_key_value.weight"
    before = load_file(published.parent / tower / "model.safetensors")[key]
    assert (found[key] - before).abs().max() > 0.01
    assert torch.equal(model.action_mean, models[tower].action_mean)
    assert_told_without_weights(folder)
    digest = checkpoint_digest(folder)
    name = "adapter_model.safetensors"
    edit_tensors(folder / name, {key: value + 1 for key, value in load_file(folder / name).items()})
    assert checkpoint_digest(folder) != digest


LAYER = "base_model.model.gpt_neox.layers.0.attention.dense"


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            lambda f: edit_json(f / "adapter_config.json", base_model_name_or_path="no/such/pythia"),
            FileNotFoundError,
            "trained on no/such/pythia.*base_model_name_or_path of .*adapter_config.json",
        ),
        (lambda f: edit_json(f / "adapter_config.json", use_dora=True), ValueError, "use_dora=True"),
        (lambda f: edit_json(f / "adapter_config.json", peft_type="IA3"), ValueError, "peft_type='IA3'"),
        (lambda f: (f / "non_lora_trainables.bin").unlink(), FileNotFoundError, "no non_lora_trainables.bin"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "no adapter_model.safetensors"),
        (
            lambda f: torch.save({"x": Trap(f / "sprung")}, f / "non_lora_trainables.bin"),
            ValueError,
            "more than tensors",
        ),
        (
            lambda f: edit_tensors(f / "adapter_model.safetensors", {}, drop=f"{LAYER}.lora_B.weight"),
            ValueError,
            "layers.0.attention.dense.lora_A.* without its lora_B",
        ),
        (
            lambda f: edit_tensors(f / "adapter_model.safetensors", {f"{LAYER}.lora_B.weight": torch.zeros(7, 3)}),
            ValueError,
            r"adapter of gpt_neox.layers.0.attention.dense.weight is \(7, 64\), expected \(64, 64\)",
        ),
        (
            lambda f: edit_tensors(
                f / "adapter_model.safetensors",
                {f"base_model.model.x.lora_{part}.weight": torch.ones(3, 3) for part in "AB"},
            ),
            ValueError,
            "adapter of x.weight",
        ),
        (
            lambda f: edit_tensors(f / "adapter_model.safetensors", {"base_model.model.y.weight": torch.ones(1)}),
            ValueError,
            "base_model.model.y.weight",
        ),
    ],
)
def test_an_adapter_that_does_not_fit(
    published: Path, tmp_path: Path, damage: Callable[[Path], Any], kind: type[Exception], message: str
) -> None:
    folder, _ = make_adapter(published, tmp_path, "clip", {}, False)
    damage(folder)
    with pytest.raises(kind, match=message):
        load_checkpoint(folder)
    assert not (folder / "sprung").exists()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_statistics_run_no_code(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(published, folder)
    for sprung in (Trap(tmp_path / "sprung"), np.array([Trap(tmp_path / "sprung")], dtype=object)):
        (folder / "dataset_stats.pkl").write_bytes(pickle.dumps({"action_mean": sprung}))
        with pytest.raises(ValueError, match=r"no file of statistics.*mkdir, which is no array"):
            load_checkpoint(folder)
        assert not (tmp_path / "sprung").exists()


def _edit(change: Callable[[dict[str, Any]], Any], name: str = "config.json") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def _pop(key: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.startswith(key)]:
            del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, r"no tokenizer.json \(the tokenizer; the base"),
        (lambda f: (f / "dataset_stats.pkl").unlink(), FileNotFoundError, "no dataset_stats.pkl.*nor has its parent"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, r"no model.safetensors \(the weights"),
        (lambda f: (f / "dataset_stats.pkl").write_bytes(b"x"), ValueError, "no file of statistics"),
        (lambda f: (f / "dataset_stats.pkl").write_bytes(pickle.dumps({})), ValueError, "of arrays.*action_mean"),
        (_edit(lambda c: c.pop("model"), "tokenizer.json"), ValueError, "no tokenizer.json"),
        (_edit(lambda c: c.update(action_head_type="act")), ValueError, "action_head_type='act'; expected 'droid_diff"),
        (_edit(lambda c: c.pop("chunk_size")), ValueError, "no complete TinyVLA configuration.*chunk_size"),
        (_edit(lambda c: c.update(vocab_size=200)), ValueError, "tokenizer has 258 tokens.*vocab_size=200"),
        (_edit(lambda c: c.update(num_hidden_layers=4)), ValueError, "missing gpt_neox.layers.3"),
        (
            lambda f: edit_tensors(f / "model.safetensors", {"embed_out.combine.bias": torch.zeros(3)}),
            ValueError,
            r"combine.bias has shape \(3,\), expected \(64,\)",
        ),
        (
            _edit(lambda c: c["vision_config"]["mm_projector"].update(mm_projector_type="linear")),
            ValueError,
            "'linear'",
        ),
        (_pop("embed_out.combine.bias"), ValueError, "missing combine.bias"),
        (_pop("embed_out.down"), ValueError, "no diffusion head"),
    ],
)
def test_what_does_not_fit(
    published: Path, tmp_path: Path, damage: Callable[[Path], None], kind: type[Exception], message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(published, folder)
    damage(folder)
    with pytest.raises(kind, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action_horizon": 3}, "action_horizon=3 with 2 levels.*multiple of 2, such as 4"),
        ({"tower": "dino"}, "tower='dino'"),
        ({"cameras": 3}, "cameras=3; expected 1 or 2"),
        ({"prompt": "{instruction}"}, "expected one <image>"),
        ({"prompt": "<image>"}, "expected one <image>"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model("tinyvla", {**TINY, **options})


# --- Imitation and reinforcement learning -----------------------------------------------------------------------------


def test_imitates(tmp_path: Path) -> None:
    config = SFTConfig(
        model="tinyvla",
        model_kwargs={key: value for key, value in TINY.items() if key not in ("image_size", "action_horizon")},
        action_horizon=4,
        steps=80,
        batch_size=16,
        draws=4,
        learning_rate=3e-3,
        warmup_steps=5,
        shift=0,
        validation_fraction=0.0,
        bf16=False,
    )
    result = sft(toy_demonstrations(), config, output=tmp_path / "sft", progress=False)
    losses = [row["train_loss"] for row in result.history]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])
    policy = load_policy(tmp_path / "sft", action_chunk=2)
    observation = {key: value.numpy() for key, value in toy_observation(3).items()}
    observation["image"] = observation["image"].transpose(0, 2, 3, 1)
    actions, _ = policy.predict(observation, deterministic=True)
    assert actions.shape == (3, 2, 4) and np.isfinite(actions).all()


@pytest.mark.parametrize(
    ("distribution", "options", "trainable"),
    [
        ("ddim", {"denoising_steps": 5, "trained_steps": 2}, "expert"),
        ("ddpm", {"denoising_steps": 4, "joint": False}, "all"),
    ],
)
def test_ppo(distribution: str, options: dict[str, Any], trainable: str) -> None:
    """An update changes what is trained, from a ratio of one; a frozen backbone is cached as one vector a decision."""
    algorithm = toy_ppo(
        env=toy_vec(4),
        model="tinyvla",
        model_kwargs=TINY,
        distribution=distribution,
        distribution_kwargs=options,
        trainable=trainable,
    )
    moved = changed_by_an_update(algorithm, 32)
    assert any(key.startswith("unet.") for key in moved) and "combine.weight" in moved
    frozen = trainable == "expert"
    assert any(key.startswith(("gpt_neox.", "vision_tower.", "mm_projector.")) for key in moved) != frozen
    stored = algorithm.rollout_buffer.observations
    assert ("perception/pooled" in stored) == frozen and ("image" in stored) != frozen


@pytest.mark.parametrize(
    ("trainable", "lora"), [("expert", None), ("lora", {"part": "expert", "rank": 2})], ids=["expert", "lora"]
)
def test_what_the_first_steps_read_is_frozen_with_them(
    trainable: str, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Where the trained steps begin stays, through training and files; what stays is held once."""
    options = {"denoising_steps": 5, "trained_steps": 2}
    kwargs = {"distribution": "ddim", "distribution_kwargs": options, "trainable": trainable, "lora": lora}
    algorithm = toy_ppo(
        toy_vec(4, action_dim=4),
        policy_kwargs={"model": "tinyvla", "model_kwargs": TINY, **kwargs},
        stirred=False,
        learning_rate=1e-2,
    )

    def draw(policy: VLAPolicy) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return policy.distribution.sample(policy.model, policy.model.encode(toy_observation(3)))[1]["chain"]

    before = draw(algorithm.policy)
    learned = [name for name, p in algorithm.policy.model.named_parameters() if p.requires_grad]
    assert any("combine" in name for name in learned)
    assert any("unet" in name for name in learned)
    algorithm.learn(32)
    after = draw(algorithm.policy)
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.equal(before[:, 1], after[:, 1])

    algorithm.save(tmp_path / "saved")
    assert torch.equal(draw(PPO.load(tmp_path / "saved", device="cpu").policy), after)
    policy = algorithm.policy
    save_checkpoint(tmp_path / "checkpoint", policy.model, None, {}, ("ddim", options), policy.distribution)
    model = load_checkpoint(tmp_path / "checkpoint").model
    again = toy_ppo(
        toy_vec(4, action_dim=4), policy_kwargs={"checkpoint": tmp_path / "checkpoint", **kwargs}, stirred=False
    )
    torch.testing.assert_close(draw(again.policy), after, atol=1e-5, rtol=0)

    backbone = {id(p) for p in model.backbone()}
    expert = sum(p.numel() for p in model.parameters() if id(p) not in backbone)
    assert sum(p.numel() for p in policy.distribution.parameters()) == expert
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    copied = {name.removeprefix("distribution.pretrained.") for name in tensors if name.startswith("distribution.")}
    assert copied and not any(name.startswith(("gpt_neox", "vision_tower", "mm_projector")) for name in copied)
    assert not any("lora" in name for name in copied)


def test_ppo_in_metaworld(published: Path) -> None:
    """The published policy, two decisions of reach, an update of the head."""
    env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", reward="dense", action_chunk=4, horizon=8)
    options = {"denoising_steps": 5, "trained_steps": 2}
    algorithm = PPO(
        "VLAPolicy",
        env,
        n_steps=2,
        batch_size=2,
        n_epochs=1,
        device="cpu",
        seed=0,
        policy_kwargs={
            "checkpoint": published,
            "distribution": "ddim",
            "distribution_kwargs": options,
            "trainable": "expert",
        },
    )
    before = algorithm.policy.model.combine.weight.clone()
    algorithm.learn(2)
    assert algorithm.env_steps == 8
    assert not torch.equal(before, algorithm.policy.model.combine.weight)
    env.close()
