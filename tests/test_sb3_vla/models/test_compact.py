"""CompactVLA and what every model shares: shapes, invariances, the imitation loss by hand, statistics, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import TINY, StateModel, stir, tiny_model, toy_observation

from mw_envs import encode_instruction
from sb3_vla.models import CompactVLA, Context, VLAModel, compact, model_class


def velocity(model: VLAModel, observation: dict[str, Tensor], seed: int = 0) -> Tensor:
    """The model's answer at fixed noise and time, the same in every row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(model.action_horizon, model.action_dim, generator=generator)
    count = len(observation["state"])
    with torch.no_grad():
        return model.denoise(model.encode(observation), x.expand(count, -1, -1).clone(), torch.full((count,), 0.7))


@pytest.mark.parametrize(("image_size", "horizon", "dim"), [(32, 5, 4), (64, 1, 4), (96, 8, 2), (112, 3, 7)])
def test_shapes(image_size: int, horizon: int, dim: int) -> None:
    model = tiny_model(image_size=image_size, action_horizon=horizon, action_dim=dim)
    context = model.encode(toy_observation(3, image_size=image_size))
    assert context.features.shape == (3, model.feature_dim) and context.features.dtype == torch.float32
    assert model.image_size == (image_size, image_size)
    out = model.denoise(context, torch.randn(6, horizon, dim), torch.rand(6))
    assert out.shape == (6, horizon, dim) and out.dtype == torch.float32


def test_several_denoisings_per_context_equal_separate_calls() -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 4, 5, 4, generator=generator), torch.rand(3, 4, generator=generator)  # (R, N, ...)
    with torch.no_grad():
        context = model.encode(toy_observation(4))
        together = model.denoise(context, x.flatten(0, 1), t.flatten()).unflatten(0, (3, 4))
        separate = torch.stack([model.denoise(context, x[r], t[r]) for r in range(3)])
    torch.testing.assert_close(together, separate, atol=1e-5, rtol=0)
    # Otherwise the comparison means nothing: the contexts must matter.
    assert (
        together[:, 0] - model.denoise(context, x[:, [1, 0, 2, 3]].flatten(0, 1), t.flatten())[0]
    ).abs().max() > 1e-3


@pytest.mark.parametrize("key", ["image", "state", "instruction"])
def test_every_part_of_the_observation_matters(key: str) -> None:
    model = tiny_model()
    observation = toy_observation(1)
    changed = {**observation, key: toy_observation(1, "Open the drawer", seed=1)[key]}
    assert (velocity(model, observation) - velocity(model, changed)).abs().max() > 1e-4


def test_noise_and_time_matter() -> None:
    model = tiny_model()
    context = model.encode(toy_observation(1))
    x, t = torch.randn(1, 5, 4), torch.full((1,), 0.5)
    base = model.denoise(context, x, t)
    assert (base - model.denoise(context, x + 0.5, t)).abs().max() > 1e-3
    assert (base - model.denoise(context, x, t + 0.25)).abs().max() > 1e-3


def test_unseen_sentences_work_and_differ() -> None:
    model = tiny_model()
    sentences = ["Öffne die Schublade", "拉开抽屉", "x", "Open the drawer", "Open the drawer!"]
    outs = torch.cat([velocity(model, toy_observation(1, sentence)) for sentence in sentences])
    assert torch.isfinite(outs).all()
    different = (outs[:, None] - outs[None]).abs().amax((2, 3)) > 1e-6
    assert torch.equal(different, ~torch.eye(len(sentences), dtype=torch.bool))


@pytest.mark.parametrize("sentence", ["x", "Go to the left"])
def test_padding_of_the_instruction_has_no_effect(sentence: str) -> None:
    """From exactly the sentence's length to more than any environment gives."""
    model = tiny_model()
    stir(model.instruction_encoder, 0.1)
    observation = toy_observation(2, sentence)
    expected = velocity(model, observation)
    for length in (len(sentence), len(sentence) + 1, 100):
        padded = torch.zeros(2, length, dtype=torch.uint8)
        padded[:, : len(sentence)] = observation["instruction"][:, : len(sentence)]
        changed = velocity(model, {**observation, "instruction": padded})
        torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0)


def test_duplicates_and_the_batch_have_no_effect() -> None:
    model = tiny_model()
    one = toy_observation(1)
    twins = {key: value.expand(2, *value.shape[1:]).clone() for key, value in one.items()}
    other = toy_observation(1, "Open the drawer", seed=5)
    mixed = {key: torch.cat([other[key], one[key], one[key]]) for key in one}
    with torch.no_grad():
        features, pair, three = (model.encode(o).features for o in (one, twins, mixed))
    assert torch.equal(pair[0], pair[1]) and torch.equal(three[1], three[2])
    torch.testing.assert_close(pair[0], features[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(three[1], features[0], atol=1e-5, rtol=0)


def test_encoding_leaves_the_observation_alone() -> None:
    observation = toy_observation(2)
    before = {key: value.clone() for key, value in observation.items()}
    tiny_model().encode(observation)
    assert all(torch.equal(observation[key], before[key]) for key in before)


class Linear(StateModel):
    """A denoiser simple enough for a computation by hand: v = a x + b t, where a is the observation's state."""

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        scale = context.state.repeat(len(x) // len(context.state), 1)
        return scale[:, :, None] * x + 0.5 * t[:, None, None]


@pytest.mark.parametrize("draws", [1, 3])
def test_imitation_loss_by_hand(draws: int) -> None:
    model = Linear(2, 3)
    mean, std = torch.tensor([0.5, -0.5]), torch.tensor([2.0, 0.5])
    model.set_statistics({"action_mean": mean, "action_std": std})
    scale = torch.tensor([[0.3], [-0.7]])
    actions = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    torch.manual_seed(7)
    loss = model.imitation_loss({"state": scale}, actions, mask, draws=draws)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(2 * draws, 3, 2, generator=generator).double()
    time = torch.rand(2 * draws, generator=generator).double()
    errors = []
    for row in range(2 * draws):
        n = row % 2
        for step in range(3):
            if mask[n, step]:
                target = (actions[n, step].double() - mean) / std
                x = time[row] * noise[row, step] + (1 - time[row]) * target
                v = scale[n] * x + 0.5 * time[row]
                errors.append((v - (noise[row, step] - target)).square().mean().item())
    assert len(errors) == 4 * draws
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_masked_steps_do_not_matter() -> None:
    model = Linear(2, 3)
    scale, mask = torch.tensor([[0.3], [-0.7]]), torch.tensor([[True, True, False], [True, False, False]])
    actions = torch.randn(2, 3, 2)
    changed = torch.where(mask[:, :, None], actions, actions + 100)
    losses = []
    for given in (actions, changed):
        torch.manual_seed(0)
        losses.append(model.imitation_loss({"state": scale}, given, mask))
    assert torch.equal(*losses)


def test_imitation_reaches_every_parameter() -> None:
    model = tiny_model()
    observation = {
        key: torch.cat([toy_observation(4)[key], toy_observation(4, "Open the drawer", seed=1)[key]])
        for key in ("image", "state", "instruction")
    }
    model.imitation_loss(observation, torch.randn(8, 5, 4), torch.ones(8, 5, dtype=torch.bool)).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_perception_is_what_the_backbone_computes() -> None:
    model = tiny_model()
    observation = toy_observation(3)
    perception = model.perceive(observation)
    again, whole = model.encode(perception), model.encode(observation)
    assert torch.equal(again.features, whole.features)
    x, t = torch.randn(3, 5, 4), torch.full((3,), 0.3)
    assert torch.equal(model.denoise(again, x, t), model.denoise(whole, x, t))
    assert all(len(value) == 3 for value in perception.values()) and "image" not in perception
    sum(value.square().sum() for value in perception.values()).backward()  # type: ignore[union-attr]
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    backbone = {id(parameter) for parameter in model.backbone()}
    assert moved == {name for name, parameter in model.named_parameters() if id(parameter) in backbone}


def test_statistics_are_set_saved_and_used() -> None:
    model = tiny_model()
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    observation = toy_observation(2)
    before = velocity(model, observation)
    model.set_statistics({"state_mean": mean, "state_std": std})
    shifted = {**observation, "state": observation["state"] * std + mean}
    torch.testing.assert_close(velocity(model, shifted), before, atol=1e-5, rtol=0)
    model.set_statistics({"action_mean": mean, "action_std": std})
    action = torch.randn(2, 5, 4)
    torch.testing.assert_close(model.normalize_action(action), (action - mean) / std)
    torch.testing.assert_close(model.unnormalize_action(model.normalize_action(action)), action)
    saved = model.state_dict()
    for name, value in {"action_mean": mean, "action_std": std, "state_mean": mean, "state_std": std}.items():
        assert torch.equal(saved[name], value)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [({"action_men": torch.zeros(4)}, "action_men"), ({"action_mean": torch.zeros(3)}, r"\(3,\).*\(4,\)")],
)
def test_bad_statistics(statistics: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model().set_statistics(statistics)


def test_config_builds_the_same_model() -> None:
    model = tiny_model(action_horizon=3, state_dim=4)
    again = CompactVLA(**model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(velocity(again, toy_observation(2)), velocity(model, toy_observation(2)))


def test_default_size() -> None:
    """A few million parameters, as the documentation says."""
    assert 1e6 < sum(p.numel() for p in CompactVLA().parameters()) < 5e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 16}, "image_size=16"),
        ({"image_size": 100}, "image_size=100.*multiple of 16"),
        ({"width": 100}, "width=100"),
        ({"width": 0}, "width=0"),
        ({"channels": (8, 8)}, "channels"),
        ({"channels": (8, 8, 12)}, "channels"),
        ({"channels": (0, 8, 16)}, "channels"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompactVLA(**{"image_size": 32, **TINY, **options})


def test_names_give_models() -> None:
    assert model_class("compact") is CompactVLA
    with pytest.raises(ValueError, match=r"compct.*did you mean 'compact'"):
        model_class("compct")


def test_the_longest_instruction_fits() -> None:
    sentence = "x" * 64
    assert torch.isfinite(velocity(tiny_model(), toy_observation(1, sentence))).all()
    assert len(encode_instruction(sentence)) == 64


def test_attention_on_a_cpu_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 64, generator=generator, dtype=torch.float64) for n in (5, 37, 37))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(compact._attention(query, key, value), expected, atol=1e-12, rtol=0)


def test_a_hand_view_is_read_beside_the_picture() -> None:
    model = tiny_model(hand_view={"size": 48})
    observation = {**toy_observation(2), "hand_image": torch.zeros(2, 3, 48, 48, dtype=torch.uint8)}
    other = {**observation, "hand_image": torch.full((2, 3, 48, 48), 200, dtype=torch.uint8)}
    other["hand_image"][:, :, :24] = 20
    assert (velocity(model, observation) - velocity(model, other)).abs().max() > 1e-4
    context = model.encode(observation)
    assert context.features.shape == (2, model.feature_dim)
    assert {id(p) for p in model.image_encoders.parameters()} <= {id(p) for p in model.backbone()}
