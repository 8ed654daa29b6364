"""pi0 and pi0.5: the published implementations' numbers, what must not change them, preprocessing, and PPO."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from toy import SENTENCES, ToyEnv, stir, toy_observation, toy_vec
from toy_pi0 import DATA, NAMES, TINY_PI0, P, X, reference_model, reference_vectors, tiny_tokenizer

from sb3_vla import PPO
from sb3_vla.distributions.base import gaussian_log_prob, integrate
from sb3_vla.distributions.flow_sde import FlowSDE
from sb3_vla.models import Context, Pi0, Pi05
from sb3_vla.models.layers import rotate, rotation_of
from sb3_vla.models.pi0 import _Conditions, resize_with_pad
from sb3_vla.models.resizing import resize_by_area, resize_by_integers
from sb3_vla.policies.vla_policy import VLAPolicy

TOLERANCE = 2e-5  # of float32, against the original implementation
TIMES = (("t1", 1.0), ("t06", 0.6), ("t02", 0.2))
both = pytest.mark.parametrize("name", ["pi0", "pi05"])


@dataclasses.dataclass
class Reference:
    """A reference model with its inputs, recorded outputs and prefix."""

    model: Pi0
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    context: Context


def reference(name: str) -> Reference:
    vectors = reference_vectors(name)
    inputs = {key.removeprefix("in."): value for key, value in vectors.items() if key.startswith("in.")}
    outputs = {key.removeprefix("out."): value for key, value in vectors.items() if key.startswith("out.")}
    inputs["images"] = torch.stack([inputs[f"img{slot}"] for slot in range(3)], dim=1)
    model = reference_model(name).requires_grad_(False)
    context = make_context(model, inputs)
    return Reference(model, inputs, outputs, context)


def make_context(model: Pi0, inputs: dict[str, Tensor], cameras: int = 3, tokens: int = 12) -> Context:
    hidden, keys_values, valid = model.run_prefix(
        inputs["images"][:, :cameras],
        inputs["tokens"][:, :tokens],
        inputs["token_mask"][:, :tokens],
        inputs["img_masks"][:, :cameras],
    )
    return Context(hidden.mean(1), _Conditions(keys_values, valid, valid.sum(1), inputs["state"]))


def difference(found: Tensor, expected: Tensor, what: str = "") -> float:
    """The largest difference; with a name of what was compared it is printed, which pytest -rP shows."""
    assert found.shape == expected.shape
    largest = (found - expected).abs().max().item()
    if what:
        print(f"{what}: at most {largest:.1e}")
    return largest


# The published numbers


@both
def test_prefix(name: str) -> None:
    ref = reference(name)
    embedded = ref.model.embed_prefix(ref.inputs["images"], ref.inputs["tokens"])
    assert difference(embedded, ref.outputs["prefix_embs"], f"{name} prefix_embs") < TOLERANCE
    hidden, _, valid = ref.model.run_prefix(
        ref.inputs["images"], ref.inputs["tokens"], ref.inputs["token_mask"], ref.inputs["img_masks"]
    )
    assert torch.equal(valid, ref.outputs["prefix_pad"])
    assert difference(hidden[valid], ref.outputs["prefix_hidden"][valid], f"{name} prefix_hidden") < TOLERANCE


@both
@pytest.mark.parametrize(("tag", "time"), TIMES)
def test_suffix(name: str, tag: str, time: float) -> None:
    ref = reference(name)
    t = torch.full((2,), time)
    suffix, condition = ref.model.embed_suffix(ref.inputs["state"], ref.inputs["noise"], t)
    assert difference(suffix, ref.outputs[f"suffix_embs_{tag}"], f"{name} suffix_embs_{tag}") < TOLERANCE
    if name == "pi05":
        assert condition is not None
        assert difference(condition, ref.outputs[f"adarms_cond_{tag}"], f"{name} adarms_cond_{tag}") < TOLERANCE
    velocity, features = ref.model.denoise_features(ref.context, ref.inputs["noise"], t)
    assert difference(features, ref.outputs[f"expert_hidden_{tag}"], f"{name} expert_hidden_{tag}") < TOLERANCE
    assert difference(velocity, ref.outputs[f"v_{tag}"], f"{name} v_{tag}") < TOLERANCE


@both
def test_actions(name: str) -> None:
    ref = reference(name)
    chain = [ref.inputs["noise"]]
    for step in range(5):
        t = torch.full((2,), 1 - step / 5)
        chain.append(chain[-1] - ref.model.denoise(ref.context, chain[-1], t) / 5)
    assert difference(torch.stack(chain, dim=1), ref.outputs["euler_chain"], f"{name} euler_chain") < TOLERANCE
    actions = integrate(ref.model, ref.context, ref.inputs["noise"], 5)
    assert difference(actions, ref.outputs["actions_ode"], f"{name} actions_ode") < TOLERANCE
    assert difference(actions, ref.outputs["sample_actions"], f"{name} sample_actions") < TOLERANCE


@both
def test_flow_matching_error(name: str) -> None:
    ref = reference(name)
    x0, noise, t = ref.inputs["actions"], ref.inputs["noise"], ref.inputs["time"]
    velocity = ref.model.denoise(ref.context, torch.lerp(x0, noise, t[:, None, None]), t)
    error = (velocity - (noise - x0)).square()
    assert difference(error, ref.outputs["loss_elementwise"], f"{name} loss_elementwise") < TOLERANCE


@both
def test_flow_sde(name: str) -> None:
    ref = reference(name)
    sde = FlowSDE(action_chunk=5, noise_level=0.5, joint=True, denoising_steps=5)
    for step in range(5):
        x, index = ref.outputs["euler_chain"][:, step], torch.full((2,), step)
        mean, std, _ = sde.kernel(ref.model, ref.context, x, index)
        assert std.flatten().tolist() == pytest.approx([ref.outputs["sde_std"][step].item()] * 2, rel=2e-6)
        expected_mean = ref.outputs["sde_mean"][:, step]
        assert difference(mean, expected_mean) < 2e-6 * expected_mean.abs().max()
        reached = ref.outputs["sde_mean"][:, step] + ref.outputs["sde_std"][step] * ref.inputs["eps"]
        log_prob = gaussian_log_prob(reached, mean, std)[:, :, :4]
        expected = ref.outputs["sde_logp"][:, step]
        assert (log_prob - expected).norm() < 2e-6 * expected.norm()
        given = gaussian_log_prob(reached, expected_mean, ref.outputs["sde_std"][step])[:, :, :4]
        torch.testing.assert_close(given, expected, rtol=2e-6, atol=2e-6)


@both
def test_names_and_shapes_at_full_size(name: str) -> None:
    """The recorded list has two heads more, which are tied to an embedding or never used."""
    with torch.device("meta"):
        model = NAMES[name]()
    expected = json.loads((DATA / name / "full_names.json").read_text())
    assert len(expected) == {"pi0": 778, "pi05": 813}[name]
    heads = {f"{P}lm_head.weight", f"{X}lm_head.weight"}
    found = {key: list(parameter.shape) for key, parameter in model.named_parameters()}
    assert found == {key: shape for key, shape in expected.items() if key not in heads}


@pytest.mark.parametrize(
    ("name", "total", "expert"), [("pi0", 3_238_048_528, 314_713_120), ("pi05", 3_353_433_872, 430_098_464)]
)
def test_parameters_that_train(name: str, total: int, expert: int) -> None:
    with torch.device("meta"):
        model = NAMES[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    model.set_trainable("expert")
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == expert


def test_only_what_modulates_norms_trains() -> None:
    model = Pi05(**TINY_PI0)
    model.set_trainable("adaptive")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "time_mlp_in.weight" in trained and f"{X}model.norm.dense.weight" in trained
    assert len(trained) == 4 + 2 * (2 * 3 + 1)
    with pytest.raises(ValueError, match="Pi0 has no modulated norms"):
        Pi0(**TINY_PI0).set_trainable("adaptive")
    with pytest.raises(ValueError, match="did you mean 'expert'"):
        model.set_trainable("experts")


# What must not change the numbers


@both
def test_absent_cameras_and_padding_have_no_effect(name: str) -> None:
    ref = reference(name)
    expected = integrate(ref.model, ref.context, ref.inputs["noise"], 5)
    for changed in (
        make_context(ref.model, ref.inputs, cameras=1),
        make_context(ref.model, ref.inputs, tokens=int(ref.inputs["token_mask"].sum(1).max())),
        make_context(ref.model, {**ref.inputs, "tokens": ref.inputs["tokens"].where(ref.inputs["token_mask"], 7)}),
        make_context(
            ref.model, {**ref.inputs, "images": ref.inputs["images"] * torch.tensor([1, 0, 9])[:, None, None, None]}
        ),
    ):
        assert difference(integrate(ref.model, changed, ref.inputs["noise"], 5), expected) < 1e-6


@both
def test_the_prefix_is_blind_to_the_suffix_and_stays(name: str) -> None:
    ref = reference(name)
    conditions = ref.context.state
    before = [(key.clone(), value.clone()) for key, value in conditions.keys_values]
    first = ref.model.denoise(ref.context, ref.inputs["noise"], ref.inputs["time"])
    again = ref.model.denoise(ref.context, ref.inputs["noise"], ref.inputs["time"])
    assert torch.equal(first, again)
    for (key, value), (key0, value0) in zip(conditions.keys_values, before, strict=True):
        assert torch.equal(key, key0) and torch.equal(value, value0)


@both
def test_other_numbers_of_steps_and_actions(name: str) -> None:
    """In turns on one context, which a longer or shorter chain must not change."""
    ref = reference(name)
    for steps in (3, 1, 10, 3):
        x = ref.inputs["noise"]
        for step in range(steps):
            x = x - ref.model.denoise(ref.context, x, torch.full((2,), 1 - step / steps)) / steps
        assert difference(integrate(ref.model, ref.context, ref.inputs["noise"], steps), x) < TOLERANCE
        for chunk in (5, 2):
            acted = FlowSDE(chunk, denoising_steps=steps).mode(ref.model, ref.context)
            whole = FlowSDE(5, denoising_steps=steps).mode(ref.model, ref.context)
            assert torch.equal(acted, whole[:, :chunk])


@both
def test_one_attention_over_both_towers(name: str) -> None:
    """All tokens in one softmax, layer by layer, with the mask of blocks written out: the same velocity."""
    ref = reference(name)
    model, t = ref.model, torch.tensor([0.3, 0.8])
    towers = (model.language_model, model.expert)
    suffix, condition = model.embed_suffix(ref.inputs["state"], ref.inputs["noise"], t)
    streams = [model.embed_prefix(ref.inputs["images"], ref.inputs["tokens"]), suffix]
    conditions = [None, condition]
    length = streams[0].shape[1]
    valid = torch.cat([ref.outputs["prefix_pad"], torch.ones(2, suffix.shape[1], dtype=torch.bool)], dim=1)
    block = torch.tensor([0] * length + ([1] if name == "pi0" else []) + [2] * 5)
    allowed = (block[None] <= block[:, None]) & valid[:, None]  # (N, queries, keys)
    cosine_sine = rotation_of(valid.cumsum(1) - 1, 16)
    for layer in range(3):
        parts, gates = [], []
        for tower, x, c in zip(towers, streams, conditions, strict=True):
            normed, gate = tower.layers[layer].input_layernorm(x, c)
            attention = tower.layers[layer].self_attn
            parts.append(
                [
                    p(normed).unflatten(2, (-1, 16)).transpose(1, 2)
                    for p in (attention.q_proj, attention.k_proj, attention.v_proj)
                ]
            )
            gates.append(1 if gate is None else gate)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        query, key = rotate(query, cosine_sine), rotate(key, cosine_sine)
        scores = (query @ key.transpose(2, 3)) / 4 + torch.where(allowed[:, None], 0.0, -2.3819763e38)
        attended = (scores.softmax(3) @ value).transpose(1, 2).flatten(2)
        for which, (tower, c) in enumerate(zip(towers, conditions, strict=True)):
            own = attended[:, :length] if which == 0 else attended[:, length:]
            x = streams[which] + tower.layers[layer].self_attn.o_proj(own) * gates[which]
            normed, gate = tower.layers[layer].post_attention_layernorm(x, c)
            streams[which] = x + tower.layers[layer].mlp(normed) * (1 if gate is None else gate)
    hidden = model.expert.norm(streams[1], condition)[0][:, -5:]
    assert difference(model.denoise(ref.context, ref.inputs["noise"], t), model.action_out_proj(hidden)) < TOLERANCE


@both
def test_several_denoisings_of_a_context(name: str) -> None:
    ref = reference(name)
    x, t = (
        torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.1, 0.2, 0.5, 0.6, 0.9, 1.0]),
    )
    together = ref.model.denoise(ref.context, x, t)
    apart = torch.cat([ref.model.denoise(ref.context, x[i : i + 2], t[i : i + 2]) for i in (0, 2, 4)])
    assert difference(together, apart) < TOLERANCE


@both
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    ref = reference(name)
    for trainable in ("expert", "all"):
        ref.model.set_trainable(trainable)
        gradients = []
        for checkpointing in (False, True):
            ref.model.set_gradient_checkpointing(checkpointing)
            ref.model.zero_grad()
            context = make_context(ref.model, ref.inputs)
            ref.model.denoise(context, ref.inputs["noise"], ref.inputs["time"]).square().mean().backward()
            gradients.append({key: p.grad.clone() for key, p in ref.model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert any(key.startswith(P) for key in gradients[0]) == (trainable == "all")
        assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


# Preprocessing


@pytest.mark.parametrize("shape", [(480, 480), (96, 96), (300, 480)])
def test_openpi_resizes_as_pil_does(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    fitted = (int(224 * shape[0] / max(shape)), int(224 * shape[1] / max(shape)))
    small = np.asarray(Image.fromarray(image).resize(fitted[::-1], Image.Resampling.BILINEAR))
    expected = np.zeros((224, 224, 3), np.uint8)
    top, left = (224 - fitted[0]) // 2, (224 - fitted[1]) // 2
    expected[top : top + fitted[0], left : left + fitted[1]] = small
    model = Pi0(**{**TINY_PI0, "image_size": 224})
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    found = model.fit_image(tensor)
    assert found.dtype == torch.uint8 and np.array_equal(found[0].permute(1, 2, 0).numpy(), expected)
    pixels = model.read_image(found)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected.astype(np.float32) / 255 * 2 - 1)
    assert torch.equal(model.read_image(tensor), model.read_image(found))  # resized once, before or after it is kept


@pytest.mark.parametrize(
    ("before", "after"),
    [((480, 480), (224, 224)), ((480, 640), (168, 224)), ((57, 333), (56, 56)), ((96, 96), (224, 224))],
)
def test_integers_resize_as_pil_does(before: tuple[int, int], after: tuple[int, int]) -> None:
    """What a GPU computes, where torch has no antialiased resize of bytes."""
    image = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize(after[::-1], Image.Resampling.BILINEAR))
    found = resize_by_integers(torch.from_numpy(image).permute(2, 0, 1)[None], after)
    assert found.dtype == torch.uint8 and np.array_equal(found[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((480, 480), (224, 224)),
        ((480, 480), (96, 96)),
        ((480, 640), (168, 224)),
        ((57, 333), (56, 56)),
        ((64, 64), (32, 32)),
        ((31, 32), (31, 8)),
        ((96, 96), (224, 224)),
        ((24, 40), (32, 32)),
    ],
)
def test_areas_are_averaged_as_demonstrations_are(before: tuple[int, int], after: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
    shrinks = after[0] <= before[0] and after[1] <= before[1]
    kernel = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    expected = np.asarray(Image.fromarray(image).resize(after[::-1], kernel))
    found = resize_by_area(torch.from_numpy(image).permute(2, 0, 1)[None], after)
    assert found.dtype == torch.uint8 and np.array_equal(found[0].permute(1, 2, 0).numpy(), expected)


def test_lerobot_resizes_without_antialiasing() -> None:
    image = torch.randint(0, 256, (1, 3, 480, 480), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = Pi0(**TINY_PI0, convention="lerobot")
    assert torch.equal(model.fit_image(image), image)
    expected = F.interpolate(image.float() / 255, (56, 56), mode="bilinear", align_corners=False) * 2 - 1
    assert torch.equal(model.read_image(image), expected)
    assert (expected - Pi0(**TINY_PI0).read_image(image)).abs().max() > 0.3
    wide = resize_with_pad(torch.ones(1, 3, 40, 80), 56, antialias=False)
    assert wide[0, 0, :, 0].tolist() == [0.0] * 14 + [1.0] * 28 + [0.0] * 14


X_IN = np.array([0.3, -2.0, 0.5, 7.0])
MEAN, STD = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 2.0, 1e-4, 0.0])
LOW, HIGH = np.array([-1.0, -2.0, 0.4, 3.0]), np.array([1.0, 3.0, 0.6, 3.0])


@pytest.mark.parametrize(
    ("scheme", "convention", "into", "out_of"),
    [
        ("mean_std", "openpi", lambda x: (x - MEAN) / (STD + 1e-6), lambda x: x * (STD + 1e-6) + MEAN),
        ("mean_std", "lerobot", lambda x: (x - MEAN) / (STD + 1e-8), lambda x: x * STD + MEAN),
        (
            "quantiles",
            "openpi",
            lambda x: (x - LOW) / (HIGH - LOW + 1e-6) * 2 - 1,
            lambda x: (x + 1) / 2 * (HIGH - LOW + 1e-6) + LOW,
        ),
        (
            "quantiles",
            "lerobot",
            lambda x: 2 * (x - LOW) / np.where(HIGH == LOW, 1e-8, HIGH - LOW) - 1,
            lambda x: (x + 1) * np.where(HIGH == LOW, 1e-8, HIGH - LOW) / 2 + LOW,
        ),
    ],
)
def test_normalization(scheme: str, convention: str, into: Callable, out_of: Callable) -> None:
    model = Pi0(**TINY_PI0, convention=convention, state_scheme=scheme, action_scheme=scheme)
    values = {"mean": MEAN, "std": STD, "q01": LOW, "q99": HIGH}
    model.set_statistics(
        {
            f"{part}_{key}": torch.tensor(value, dtype=torch.float32)
            for part in ("state", "action")
            for key, value in values.items()
        }
    )
    x = torch.tensor(X_IN, dtype=torch.float32)[None]
    np.testing.assert_allclose(model.normalize_state(x)[0].numpy(), into(X_IN), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(model.normalize_action(x)[0].numpy(), into(X_IN), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(model.unnormalize_action(x)[0].numpy(), out_of(X_IN), rtol=1e-6, atol=1e-6)
    # No clipping, and the way back, but where the data never moved.
    there = model.unnormalize_action(model.normalize_action(x))
    np.testing.assert_allclose(there[0, :2].numpy(), X_IN[:2], rtol=1e-5)


def test_a_model_without_statistics_leaves_numbers_alone() -> None:
    for model in (Pi0(**TINY_PI0, convention="lerobot"), Pi05(**TINY_PI0, convention="lerobot")):
        x = torch.randn(3, 4)
        torch.testing.assert_close(model.unnormalize_action(model.normalize_action(x)), x)
        torch.testing.assert_close(model.normalize_state(x), x)


def test_prompts() -> None:
    sentence, state = (
        " Pick_the\nred puck ",
        torch.tensor(
            [
                [
                    -1.0,
                    -1.001,
                    0.0,
                    0.999,
                ]
            ]
        ),
    )
    assert Pi0(**TINY_PI0).prompts([sentence], state) == [("Pick the red puck", "\n")]
    assert Pi0(**TINY_PI0, convention="lerobot").prompts(["Pick", "Pick\n"], state) == [("Pick\n",), ("Pick\n",)]
    assert Pi05(**TINY_PI0, discrete_state_input=False).prompts(["Pick"], state) == [("Pick", "\n")]
    exact = {"convention": "lerobot"}  # which adds nothing to the interval of -1 to 1
    assert Pi05(**TINY_PI0, **exact).prompts([sentence], state) == [
        ("Task: Pick the red puck, State: 0 -1 128 255;\nAction: ",)
    ]
    padded = Pi05(**TINY_PI0, **exact, prompt_state_dim=32).prompts(["Pick"], state)
    assert padded == [("Task: Pick, State: 0 -1 128 255" + " 128" * 28 + ";\nAction: ",)]


def test_states_are_counted_as_numpy_counts_them() -> None:
    model = Pi05(**TINY_PI0, convention="lerobot", state_scheme="identity")
    edges = np.linspace(-1, 1, 257)[:-1]
    state = np.concatenate([edges, edges + 1e-4, [-1.5, 1.0, 1.5, 0.3]]).astype(np.float32).reshape(-1, 4)
    expected = np.digitize(state, edges) - 1
    found = [
        prompt[0].partition("State: ")[2].partition(";")[0]
        for prompt in model.prompts(["a"] * len(state), torch.tensor(state))
    ]
    assert [list(map(int, row.split())) for row in found] == expected.tolist()
    assert expected.min() == -1 and expected.max() == 255


def test_tokens(tmp_path: Path) -> None:
    model = Pi0(**TINY_PI0, tokenizer=str(tiny_tokenizer(tmp_path)), prompt_tokens=12)
    observation = toy_observation(2, "Go the é")
    tokens, valid = model.read_prompt(observation)
    ids = {"G": 300, "o": 340, "▁the": 358, "▁": 261, "\n": 260}
    expected = [2, ids["G"], ids["o"], ids["▁the"], ids["▁"], 4 + 0xC3, 4 + 0xA9, ids["\n"]]
    assert tokens.tolist() == [expected + [0] * 4] * 2
    assert valid.tolist() == [[True] * 8 + [False] * 4] * 2
    shorter = Pi0(**TINY_PI0, tokenizer=str(tmp_path / "tokenizer.json"), prompt_tokens=5)
    assert shorter.read_prompt(observation)[0].tolist() == [expected[:5]] * 2
    lerobot = Pi0(**TINY_PI0, tokenizer=str(tmp_path), prompt_tokens=12, convention="lerobot")
    assert torch.equal(lerobot.read_prompt(observation)[0], tokens)


def test_tokens_of_sentences_of_different_length(tmp_path: Path) -> None:
    """Each as it is alone, padding on its right."""
    model = Pi0(**TINY_PI0, tokenizer=str(tiny_tokenizer(tmp_path)), prompt_tokens=40)
    sentences = ["Push the puck to a goal", "go", "Pull the handle up"]
    alone = [toy_observation(1, sentence) for sentence in sentences]
    together = {key: torch.cat([one[key] for one in alone]) for key in alone[0]}
    tokens, valid = model.read_prompt(together)
    for row, one in enumerate(alone):
        own, shown = (part[0] for part in model.read_prompt(one))
        assert torch.equal(tokens[row], own) and torch.equal(valid[row], shown)
        count = int(shown.sum())
        assert shown.tolist() == [True] * count + [False] * (40 - count)
        assert own[0] == 2 and own[count - 1] == 260 and not own[count:].any()  # beginning, line break, padding


def test_without_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"No PaliGemma tokenizer at .*Give tokenizer=FOLDER"):
        Pi0(**TINY_PI0, tokenizer=str(tmp_path)).perceive(toy_observation(1, image_size=56))

    def gated(*_: Any, **__: Any) -> None:
        raise OSError("401: access is restricted")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    with pytest.raises(
        FileNotFoundError, match=r"google/paligemma-3b-pt-224.*access is restricted.*accept its license"
    ):
        Pi0(**TINY_PI0).perceive(toy_observation(1, image_size=56))


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    model = Pi0(**{**TINY_PI0, "vocabulary": 300}, tokenizer=str(tiny_tokenizer(tmp_path)))
    with pytest.raises(ValueError, match=r"gives token 358; the model knows 300"):
        model.perceive(toy_observation(1, image_size=56))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "image_size=100; expected a multiple of 14"),
        ({"convention": "lerobt"}, "convention='lerobt'; did you mean 'lerobot'"),
        ({"action_scheme": "std"}, "Unknown action_scheme='std'"),
        ({"padded_dim": 3}, "padded_dim=3; expected at least action_dim=4"),
        ({"expert": {"width": 32, "depth": 2}}, "they share attention"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pi0(**{**TINY_PI0, **options})


@both
def test_compiled_towers_meet_few_lengths(name: str, tmp_path: Path) -> None:
    """Prompts are padded to a multiple of 16, or to all the room there is; what is predicted stays."""
    model = reference_model(name, tokenizer=str(tiny_tokenizer(tmp_path)), prompt_tokens=40)
    x, t = torch.ones(2, 5, 32), torch.tensor([0.3, 0.9])
    for sentence, length in (("go", 16), ("Push the puck to a goal", 32), ("Push the puck to a goal, but not far", 40)):
        observation = toy_observation(2, sentence, image_size=56)
        model.compiled = False
        expected = model.denoise(model.encode(observation), x, t)
        model.compiled = True
        for context in (model.encode(observation), model.contextualize(model.perceive(observation))):
            if name == "pi0":
                assert context.state.keys_values[0][0].shape[2] == 16 + length
            assert difference(model.denoise(context, x, t), expected) < 2e-6


# Imitation


def test_times_of_imitation() -> None:
    """0.999 Beta(1.5, 1) + 0.001: mean 0.6, variance 1.5 / (2.5^2 3.5), of the Beta."""
    torch.manual_seed(0)
    t = Pi0(**TINY_PI0).sample_time(200_000, torch.device("cpu"))
    beta = (t - 0.001) / 0.999
    assert 0.001 <= t.min() and t.max() <= 1
    assert beta.mean().item() == pytest.approx(0.6, abs=3e-3)
    assert beta.var().item() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=1e-3)


@both
@pytest.mark.parametrize("convention", ["openpi", "lerobot"])
def test_imitation_loss(name: str, convention: str, tmp_path: Path) -> None:
    model = reference_model(name, convention=convention, tokenizer=str(tiny_tokenizer(tmp_path)))
    observation, actions = toy_observation(2, image_size=56), torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    torch.manual_seed(3)
    found = model.imitation_loss(observation, actions, mask)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 5, 32, generator=generator)
    t = 0.999 * torch.rand(2, generator=generator) ** (2 / 3) + 0.001
    x0 = torch.zeros(2, 5, 32)
    x0[:, :, :4] = model.normalize_action(actions)
    x = t[:, None, None] * noise + (1 - t[:, None, None]) * x0
    error = (model.denoise(model.encode(observation), x, t) - (noise - x0)).square()
    error = error.mean(2) if convention == "openpi" else error[:, :, :4].mean(2)
    assert found.item() == pytest.approx(error[mask].mean().item(), rel=1e-5)


# Reinforcement learning


AFTER_KEYS = ("self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.")


def pi0_ppo(name: str, tokenizer: Path, **policy_kwargs: Any) -> PPO:
    options = {**TINY_PI0, "tokenizer": str(tokenizer), "prompt_tokens": 40}
    algorithm = PPO(
        "VLAPolicy",
        toy_vec(image_size=64),
        n_steps=4,
        batch_size=8,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={"model": name, "model_kwargs": options, "distribution": "flow_sde", **policy_kwargs},
    )
    stir(algorithm.policy)
    return algorithm


@both
@pytest.mark.parametrize(
    ("distribution", "options"),
    [("flow_sde", {}), ("flow_sde", {"joint": True}), ("flow_noise", {}), ("flow_noise", {"joint": False})],
)
def test_the_first_ratio_is_one(name: str, distribution: str, options: dict[str, Any], tmp_path: Path) -> None:
    algorithm = pi0_ppo(name, tiny_tokenizer(tmp_path), distribution=distribution, distribution_kwargs=options)
    policy = algorithm.policy
    observation = policy.prepare(toy_observation(3, image_size=64))
    with torch.no_grad():
        _, _, trace = policy.decide(observation)
        executed = torch.full((3,), policy.action_chunk)
        first, second = (policy.evaluate(observation, trace, executed).log_prob for _ in range(2))
    assert torch.equal(first, second) and torch.isfinite(first).all()


@both
@pytest.mark.parametrize(
    ("distribution", "options"),
    [("flow_sde", {}), ("flow_sde", {"joint": True}), ("flow_noise", {}), ("flow_noise", {"joint": False})],
)
def test_ppo_begins_at_ratio_one(name: str, distribution: str, options: dict[str, Any], tmp_path: Path) -> None:
    algorithm = pi0_ppo(name, tiny_tokenizer(tmp_path), distribution=distribution, distribution_kwargs=options)
    algorithm.micro_batch_size = 3
    algorithm.learn(8)  # one epoch of one minibatch, so all of it is before the first step
    found = algorithm.logger.name_to_value
    assert found["train/ratio_max"] == 1.0 and found["actor/approx_kl"] == 0.0 and found["actor/pg_clipfrac"] == 0
    assert found["actor/grad_norm"] > 0


@both
@pytest.mark.parametrize("distribution", ["flow_sde", "flow_noise"])
def test_what_is_drawn_has_its_mean_and_deviation(name: str, distribution: str, tmp_path: Path) -> None:
    """A hundred thousand numbers: of a thousand chains, five steps, five actions, four dimensions."""
    options = {"joint": True, "denoising_steps": 5}
    policy = pi0_ppo(name, tiny_tokenizer(tmp_path), distribution=distribution, distribution_kwargs=options).policy
    observation = policy.prepare(toy_observation(1000, image_size=64))
    with torch.no_grad():
        context = policy.model.encode(observation)
        _, trace = policy.distribution.sample(policy.model, context, torch.Generator().manual_seed(1))
        mean, std = policy.distribution.transition(policy.model, context, trace)
    reached = policy.distribution._executed_part(trace["chain"][:, 1:], policy.model.action_dim)
    drawn = (reached - mean) / std
    assert drawn.shape[1] == 5
    for step in drawn.unbind(1):
        assert abs(step.mean().item()) < 5 / math.sqrt(step.numel())
        assert abs(step.std().item() - 1) < 5 / math.sqrt(2 * step.numel())


@both
@pytest.mark.parametrize("trainable", ["expert", "adaptive", "lora", "all"])
def test_gradients_are_of_what_is_trained_alone(name: str, trainable: str, tmp_path: Path) -> None:
    """And of all of it."""
    if (name, trainable) == ("pi0", "adaptive"):
        pytest.skip("pi0 has no modulated norms")
    if trainable == "lora":
        pytest.importorskip("peft")
    policy = pi0_ppo(name, tiny_tokenizer(tmp_path), trainable=trainable).policy
    observation = policy.prepare(toy_observation(3, image_size=64))
    _, _, trace = policy.decide(observation)
    policy.evaluate(observation, trace, torch.full((3,), policy.action_chunk)).log_prob.sum().backward()
    # Of PaliGemma the expert sees keys and values alone: what follows them in the last layer, it does not.
    unseen = tuple(f"{P}model.language_model.{part}" for part in ("norm", *(f"layers.2.{part}" for part in AFTER_KEYS)))
    moved = {key for key, p in policy.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    trained = {key for key, p in policy.model.named_parameters() if p.requires_grad and not key.startswith(unseen)}
    assert trained and moved == trained
    assert {key.startswith(P) for key in trained} == ({True, False} if trainable in ("lora", "all") else {False})


@both
def test_ppo_trains_the_expert_alone(name: str, tmp_path: Path) -> None:
    algorithm = pi0_ppo(name, tiny_tokenizer(tmp_path))
    before = {key: value.clone() for key, value in algorithm.policy.model.state_dict().items()}
    algorithm.learn(8)
    assert algorithm.logger.name_to_value["actor/approx_kl"] == pytest.approx(0, abs=1e-6)  # one minibatch, one epoch
    changed = {key for key, value in algorithm.policy.model.state_dict().items() if not torch.equal(value, before[key])}
    assert f"{X}model.layers.2.mlp.up_proj.weight" in changed and "action_out_proj.weight" in changed
    assert not any(key.startswith(P) for key in changed)


def test_ppo_trains_what_modulates_norms_alone(tmp_path: Path) -> None:
    algorithm = pi0_ppo("pi05", tiny_tokenizer(tmp_path), trainable="adaptive")
    before = {key: value.clone() for key, value in algorithm.policy.model.state_dict().items()}
    algorithm.learn(8)
    changed = {key for key, value in algorithm.policy.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("time_mlp") or ".dense." in key for key in changed)


@both
def test_a_cached_prefix_trains_to_the_same(name: str, tmp_path: Path) -> None:
    """With sentences of different length, whose cached prefixes have room for the longest prompt."""
    results = []
    for cached in (False, True):
        algorithm = pi0_ppo(name, tiny_tokenizer(tmp_path), cache_perception=cached)
        algorithm.learn(8)
        keys = set(algorithm.rollout_buffer.observations)
        assert ("image" in keys) != cached and ("perception/keys_values" in keys) == cached
        results.append(algorithm.policy.model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=0, atol=1e-5)


def test_a_cache_of_what_changes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_perception=True.*trainable='all'"):
        pi0_ppo("pi0", tiny_tokenizer(tmp_path), cache_perception=True, trainable="all")


@both
def test_predict_and_save(name: str, tmp_path: Path) -> None:
    algorithm = pi0_ppo(name, tiny_tokenizer(tmp_path))
    env = ToyEnv(image_size=64)
    observation, _ = env.reset(seed=0)
    action, _ = algorithm.predict(observation, deterministic=True)
    assert np.array_equal(action, algorithm.predict(observation, deterministic=True)[0])
    assert not np.array_equal(action, algorithm.predict(observation)[0])
    algorithm.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    assert np.array_equal(action, loaded.predict(observation, deterministic=True)[0])


@both
def test_what_the_model_reads_matters(name: str, tmp_path: Path) -> None:
    policy = pi0_ppo(name, tiny_tokenizer(tmp_path)).policy
    first = toy_observation(1, image_size=64)
    base = policy._predict(first, deterministic=True)
    other = toy_observation(1, SENTENCES[1], seed=1, image_size=64)
    for key in ("image", "state", "instruction"):
        assert difference(policy._predict({**first, key: other[key]}, deterministic=True), base) > 1e-6, key
    blind = pi0_ppo(
        "pi05", tmp_path, model_kwargs={**TINY_PI0, "tokenizer": str(tmp_path), "discrete_state_input": False}
    )
    base = blind.policy._predict(first, deterministic=True)
    assert torch.equal(blind.policy._predict({**first, "state": other["state"]}, deterministic=True), base)


@both
def test_the_flow_is_the_limit_of_little_noise(name: str, tmp_path: Path) -> None:
    policy = VLAPolicy(
        ToyEnv(image_size=64).observation_space,
        ToyEnv().action_space,
        lambda _: 1e-3,
        model=name,
        model_kwargs={**TINY_PI0, "tokenizer": str(tiny_tokenizer(tmp_path))},
    )
    stir(policy)
    context = policy.model.encode(toy_observation(2, image_size=64))
    noise = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))
    expected = integrate(policy.model, context, noise, 4)[:, :, :2]
    almost = FlowSDE(2, noise_level=1e-4, joint=True)
    found, _ = almost.sample(policy.model, context, torch.Generator().manual_seed(0))
    assert math.isclose(difference(found, policy.model.unnormalize_action(expected)), 0, abs_tol=2e-3)
