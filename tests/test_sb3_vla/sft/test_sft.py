"""Imitation: the loss falls, the same seed gives the same model, averaged weights, validation, resuming, errors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocated import Allocated
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor
from toy import SENTENCES, TARGETS, TINY, tiny_model, toy_demonstrations, toy_observation
from toy_pi0 import TINY_PI0

from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.checkpoints.training_state import load_training_state, save_training_state
from sb3_vla.common.precision import autocast
from sb3_vla.data import batches as batches_module
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.distributed.fsdp import whole_optimizer_state
from sb3_vla.distributions import GaussianChunk
from sb3_vla.models import CompactVLA, DiffusionPolicy, Pi0, VLAModel, make_model
from sb3_vla.models.normalization import CONVENTIONS
from sb3_vla.policies.views import view_of
from sb3_vla.sft import imitation as sft_module
from sb3_vla.sft.imitation import SFTResult, sft
from sb3_vla.sft.settings import SFTConfig


def config(**options: Any) -> SFTConfig:
    return SFTConfig(
        **{
            "model_kwargs": dict(TINY),
            "action_horizon": 2,
            "steps": 6,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "validation_fraction": 0.0,
            "bf16": False,
            "shift": 2,
            **options,
        }
    )


def run(options: dict[str, Any] | None = None, **arguments: Any) -> SFTResult:
    return sft(toy_demonstrations(), config(**(options or {})), progress=False, **arguments)


def same(first: VLAModel, second: VLAModel) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def losses(result: SFTResult, name: str = "train_loss") -> list[float]:
    return [row[name] for row in result.history if name in row]


def test_learns_what_the_instruction_means() -> None:
    result = run({"steps": 100, "validation_fraction": 0.34, "validation_interval": 50, "ema_decay": 0.95})
    found = losses(result)
    assert len(found) == 100 and [row["step"] for row in result.history] == list(range(1, 101))
    assert np.mean(found[-10:]) < 0.75 * np.mean(found[:5])
    validation = losses(result, "validation_loss")
    assert len(validation) == 2 and validation[1] < validation[0]
    with torch.no_grad():
        for sentence, target in zip(SENTENCES, TARGETS, strict=True):
            context = result.model.encode(toy_observation(8, sentence))
            action = GaussianChunk(2, 4, denoising_steps=2).mode(result.model, context)
            assert abs(action[:, :, :3].mean().item() - target) < 0.25
            assert action[:, :, 3].abs().max() < 0.1  # the gripper that never moves, in units of the smallest deviation


def test_the_seed_decides_everything() -> None:
    first, second, third = run(), run(), run({"seed": 1})
    assert same(first.model, second.model) and losses(first) == losses(second)
    assert not same(first.model, third.model)


def test_statistics_of_the_data_are_in_the_model() -> None:
    data = toy_demonstrations()
    model = run({"steps": 1}).model
    expected = data.actions.astype(np.float64).std(0)
    expected[3] = 0.01  # does not vary: the smallest deviation instead of nothing
    np.testing.assert_allclose(model.action_std.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(model.action_mean.numpy(), data.actions.mean(0), atol=1e-6)
    buffers = dict(model.named_buffers())
    np.testing.assert_allclose(buffers["state_mean"].numpy(), data.states.mean(0), atol=1e-6)
    np.testing.assert_allclose(buffers["state_std"].numpy(), data.states.std(0), rtol=1e-5)


@pytest.mark.parametrize("low", [1.0, float(np.float32(1.0 - 1e-6))], ids=["never", "hardly"])
@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda: tiny_model(), -10.0),
        (lambda: DiffusionPolicy(image_size=64), -11.0),
        (lambda: DiffusionPolicy(image_size=64, normalization={"state": "mean_std"}), -10.0),
        *((lambda scheme=s, c=c: _pi0(scheme, c), -11.0) for s in ("min_max", "quantiles") for c in CONVENTIONS),
    ],
)
def test_what_does_not_move_in_the_data_is_not_magnified(make: Callable[[], Any], read: float, low: float) -> None:
    """A gripper that is open in all demonstrations, and closed a little afterwards."""
    data, model = toy_demonstrations(), make()
    data.states[:, 3], data.states[0, 3] = 1.0, low
    model.set_statistics(sft_module._statistics(data, model))
    state = torch.tensor([[0.0, 0.0, 0.0, 0.9]])
    if isinstance(model, DiffusionPolicy):
        found = model._normalize("state", state)
    elif isinstance(model, Pi0):
        found = model.normalize_state(state)
    else:
        found = (state - model.state_mean) / model.state_std
    assert found[0, 3].item() == pytest.approx(read, abs=2e-3)


def _pi0(scheme: str, convention: str) -> Pi0:
    return Pi0(**TINY_PI0, state_scheme=scheme, convention=convention)


@pytest.mark.parametrize("low", [1.0, float(np.float32(1.0 - 1e-6))], ids=["never", "hardly"])
@pytest.mark.parametrize("name", ["compact", "diffusion_policy", "tinyvla"])
def test_actions_that_do_not_move_in_the_data(name: str, low: float) -> None:
    data, made = toy_demonstrations(), make_model(name, {})
    data.actions[:, 3], data.actions[0, 3] = 1.0, low
    made.set_statistics(sft_module._statistics(data, made))
    action = torch.from_numpy(data.actions[1:2])
    normalized = made.normalize_action(action)
    assert normalized[0, 3].abs() <= 1.001
    torch.testing.assert_close(made.unnormalize_action(normalized), action, atol=1e-6, rtol=0)
    # Where the model's number moves by one, the action's moves by a hundredth. What a min-max model gives is clipped
    # to the range of the data, so that one that never moved stays.
    moved = (made.unnormalize_action(normalized + 1) - action)[0, 3].item()
    assert moved == pytest.approx(0.0 if low == 1.0 and hasattr(made, "action_min") else 0.01, abs=1e-5)


def test_the_result_has_averaged_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recursion averaged <- decay averaged + (1 - decay) weights, decay = min(0.9, step / (step + 10))."""
    path: list[list[Tensor]] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not path:
            path.append([p.detach().clone() for p in parameters])
        out = real(self, *args, **kwargs)
        path.append([p.detach().clone() for p in parameters])
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    result = run({"ema_decay": 0.2, "steps": 5})
    expected = [p.double() for p in path[0]]
    for number, weights in enumerate(path[1:], start=1):
        decay = min(0.2, number / (number + 10))
        expected = [decay * e + (1 - decay) * w.double() for e, w in zip(expected, weights, strict=True)]
    for ours, theirs in zip(result.model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=0)
    assert not torch.equal(next(result.model.parameters()), path[-1][0])
    assert not any(p.requires_grad for p in result.model.parameters())


def test_learning_rate_warms_up_and_falls_as_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run({"steps": 6, "warmup_steps": 2, "learning_rate": 0.01})
    expected = [0.0, 0.005, 0.01, *(0.005 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3))]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_validation_uses_other_episodes_and_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[np.ndarray, int]] = []
    real = DemonstrationBatches._batch

    def batch(self: DemonstrationBatches, index: np.ndarray, shift: int, *rest: Any) -> Any:
        seen.append((index, shift))
        return real(self, index, shift, *rest)

    monkeypatch.setattr(DemonstrationBatches, "_batch", batch)
    result = run({"steps": 8, "validation_fraction": 0.34, "validation_interval": 4, "learning_rate": 0.0})
    trained = np.unique(np.concatenate([index for index, shift in seen if shift]))
    validated = np.concatenate([index for index, shift in seen if not shift])
    assert len(validated) == len(np.unique(validated)) == 20  # two of six episodes of ten frames, once each
    assert not set(trained // 10) & set(validated // 10)
    first, second = losses(result, "validation_loss")
    assert first == second  # nothing learned, so only noise could differ


def test_no_validation_without_episodes_for_it() -> None:
    assert losses(run({"validation_interval": 1}), "validation_loss") == []


@pytest.mark.parametrize(("fraction", "interval"), [(0.0, 1), (0.34, 1), (0.34, 2)])
def test_the_bar_shows_a_validation_that_there_was(
    monkeypatch: pytest.MonkeyPatch, fraction: float, interval: int
) -> None:
    shown: list[str] = []
    real = Progress.update

    def update(self: Progress, task: Any, **fields: Any) -> None:
        shown.append(fields["note"])
        real(self, task, **fields)

    monkeypatch.setattr(Progress, "update", update)
    result = run({"steps": 2, "validation_fraction": fraction, "validation_interval": interval})
    assert all(text.startswith("loss ") and "nan" not in text for text in shown)
    validated = [fraction > 0 and step >= interval for step in (1, 2)]
    assert ["validation" in text for text in shown] == validated
    if fraction:
        assert shown[-1].endswith(f"validation {losses(result, 'validation_loss')[-1]:.3f}")


def test_batches_hold_what_they_say() -> None:
    data = toy_demonstrations()
    batches = DemonstrationBatches(data, None, 3, 0, 0)
    observation, actions, mask = next(batches.epoch(60))
    assert observation["image"].shape == (60, 3, 32, 32) and observation["image"].dtype == torch.uint8
    assert np.array_equal(observation["image"].permute(0, 2, 3, 1).numpy(), data.images)
    assert np.array_equal(observation["state"].numpy(), data.states)
    for frame in (0, 15):
        text = bytes(observation["instruction"][frame].tolist()).rstrip(b"\0").decode()
        assert text == SENTENCES[data.instruction_index[frame]]
    assert actions.shape == (60, 3, 4) and mask.dtype == torch.bool
    assert mask.sum(1)[:10].tolist() == [3] * 8 + [2, 1]
    half = DemonstrationBatches(data, np.arange(30, 60), 3, 0, 0)
    states, _, _ = half.sample(200)
    known = {row.tobytes() for row in data.states[30:]}
    assert {row.numpy().tobytes() for row in states["state"]} <= known


def test_shifted_pictures_are_whole_pixel_moves() -> None:
    data = toy_demonstrations(episodes=1, length=4)
    moved = batches_module._shifted(data.images, np.array([2] * 50), np.random.default_rng(0).integers(-3, 4, (2, 50)))
    padded = np.pad(data.images[2], ((3, 3), (3, 3), (0, 0)), mode="edge")
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in range(7) for x in range(7)}
    assert {picture.tobytes() for picture in moved} <= windows
    assert len({picture.tobytes() for picture in moved}) > 20


def test_the_checkpoint_is_the_result(tmp_path: Path) -> None:
    result = run(output=tmp_path / "sft")
    loaded = load_checkpoint(tmp_path / "sft")
    assert same(loaded.model, result.model)
    assert loaded.notes["sft"]["steps"] == 6 and loaded.notes["view"] == {"image_size": 32}
    assert [p.name for p in tmp_path.iterdir()] == ["sft"]


def test_a_checkpoint_says_what_its_data_showed(tmp_path: Path) -> None:
    data = toy_demonstrations()
    data.camera = {"crop": "workspace", "render_size": 480, "resize": "area"}
    for length, further in ((64, {}), (96, {"instruction_bytes": 96})):
        data.instruction_bytes = length
        sft(data, config(steps=1), output=tmp_path / "sft", progress=False)
        notes = load_checkpoint(tmp_path / "sft").notes
        assert notes["view"] == {**data.camera, **further}
        assert view_of(notes) == {"camera": "corner2", "crop": "workspace", "image_size": 480}


def test_an_interrupted_training_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    run({"steps": 2}, output=tmp_path / "sft")

    def stop(row: dict[str, float]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run({"seed": 1}, output=tmp_path / "sft", on_step=stop)
    assert load_checkpoint(tmp_path / "sft").notes["sft"]["steps"] == 2


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    first = run({"steps": 2}, output=tmp_path / "sft").model
    frozen = run({"steps": 2, "checkpoint": str(tmp_path / "sft"), "learning_rate": 0.0}).model
    for ours, theirs in zip(frozen.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)


def test_a_resumed_training_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    states: list[int] = []

    @contextlib.contextmanager
    def save_state(step: int) -> Iterator[Path]:
        states.append(step)
        folder = tmp_path / str(step)
        folder.mkdir()
        yield folder

    options = {"steps": 8, "validation_fraction": 0.34, "validation_interval": 4, "checkpoint_interval": 3}
    whole = run(options, save_state=save_state)
    assert states == [3, 6]
    for step in states:
        rows: list[float] = []
        torch.manual_seed(99)  # whatever was drawn since
        resumed = run(
            options, resume_from=tmp_path / str(step), on_step=lambda row, rows=rows: rows.append(row["step"])
        )
        assert rows == list(range(step + 1, 9))
        assert same(resumed.model, whole.model)
        for name in ("train_loss", "validation_loss"):
            assert losses(resumed, name) == losses(whole, name)


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"trainable": "expert"}, 1),
        ({"trainable": "expert", "checkpoint": True}, 0),
        ({"trainable": "lora", "lora": {"rank": 2, "layers": ["action_out"]}, "checkpoint": True}, 0),
        ({"trainable": "all", "checkpoint": True}, 0),
    ],
)
def test_a_state_holds_frozen_weights_once_or_not_at_all(options: dict[str, Any], copies: int, tmp_path: Path) -> None:
    """Not where a checkpoint has them; what is trained it holds with its average and Adam's two moments."""
    save_checkpoint(tmp_path / "start", tiny_model(action_horizon=2))
    if options.get("checkpoint"):
        options = {**options, "checkpoint": str(tmp_path / "start")}
    options = {**options, "steps": 4, "checkpoint_interval": 2}
    (tmp_path / "state").mkdir()
    whole = run(options, save_state=lambda _: contextlib.nullcontext(tmp_path / "state"))
    made: list[VLAModel] = []
    prepare = sft_module.prepare_training

    def noted(model: VLAModel, *arguments: Any, **settings: Any) -> None:
        prepare(model, *arguments, **settings)
        made.append(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_module, "prepare_training", noted)
        resumed = run(options, resume_from=tmp_path / "state")
    assert same(resumed.model, whole.model) and losses(resumed) == losses(whole)
    trained = sum(p.nbytes for p in made[0].parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in made[0].parameters() if not p.requires_grad)
    assert trained > 0 and (frozen > 0) == (options["trainable"] != "all")
    buffers = sum(b.nbytes for b in made[0].buffers())
    saved = sum(tensor.nbytes for tensor in load_file(tmp_path / "state" / "training_state.safetensors").values())
    assert saved - torch.get_rng_state().nbytes == pytest.approx(copies * frozen + 4 * trained + 2 * buffers, abs=512)


def test_a_state_on_another_frozen_backbone_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        save_checkpoint(tmp_path / name, tiny_model(action_horizon=2))
    (tmp_path / "state").mkdir()
    options = {"trainable": "expert", "steps": 4, "checkpoint_interval": 2}
    state = contextlib.nullcontext(tmp_path / "state")
    run({**options, "checkpoint": str(tmp_path / "one")}, save_state=lambda _: state)
    with pytest.raises(ValueError, match="trained on top of another frozen backbone"):
        run({**options, "checkpoint": str(tmp_path / "other")}, resume_from=tmp_path / "state")


def test_writing_a_state_copies_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.imitation_loss(toy_observation(2), torch.zeros(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)).backward()
    optimizer.step()
    tied = torch.nn.Linear(8, 8)
    tied.again = tied.weight
    modules = {"model": model, "tied": tied}
    with Allocated() as memory:
        save_training_state(tmp_path, modules, whole_optimizer_state(optimizer, model), {"step": 1})
    allowed = torch.get_rng_state().nbytes + tied.weight.nbytes + 4096
    assert memory.most < allowed < 0.2 * sum(p.nbytes for p in model.parameters())
    expected = [parameter.detach().clone() for parameter in (*model.parameters(), *tied.parameters())]
    with torch.no_grad():
        for parameter in (*model.parameters(), *tied.parameters()):
            parameter.zero_()
    load_training_state(tmp_path, modules, optimizer)
    for found, value in zip((*model.parameters(), *tied.parameters()), expected, strict=True):
        assert torch.equal(found, value)


def test_a_state_of_other_modules_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    save_training_state(tmp_path, {"model": model}, whole_optimizer_state(optimizer, model), {"step": 1})
    assert load_training_state(tmp_path, {"model": model}, optimizer) == {"step": 1}
    with pytest.raises(ValueError, match="state of 'model'; expected averaged"):
        load_training_state(tmp_path, {"averaged": model}, optimizer)
    with pytest.raises(ValueError, match="does not hold the state of this model"):
        load_training_state(tmp_path, {"model": tiny_model(action_horizon=9)}, optimizer)


def test_draws_and_callback() -> None:
    rows: list[dict[str, float]] = []
    run({"steps": 3, "draws": 3}, on_step=rows.append)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row.keys() >= {"step", "seconds", "train_loss"} for row in rows)


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(32, 32\), the model reads \(64, 64\).*image_size=64"):
        run({"model_kwargs": {**TINY, "image_size": 64}})


def test_actions_of_another_size_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", tiny_model(action_dim=7))
    with pytest.raises(ValueError, match="4-D actions, the model 7-D"):
        run({"checkpoint": str(tmp_path / "other")})


def test_unknown_model_and_option_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown model 'compct'; did you mean 'compact'"):
        run({"model": "compct"})
    with pytest.raises(ValueError, match=r"'compact' does not take these options.*wings"):
        run({"model_kwargs": {"wings": 2}})


def test_a_loss_that_is_not_finite_stops_with_advice() -> None:
    data = toy_demonstrations()
    data.states[:] = np.nan
    with pytest.raises(ValueError, match=r"diverged at step 1.*lower learning_rate=0\.003"):
        sft(data, config(), progress=False)


def test_a_loss_that_is_not_finite_stops_also_where_its_gradient_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CompactVLA.imitation_loss
    broken = lambda *given, **options: 0.0 * plain(*given, **options) + math.nan  # noqa: E731
    monkeypatch.setattr(CompactVLA, "imitation_loss", broken)
    with pytest.raises(ValueError, match=r"diverged at step 1 \(loss nan\)"):
        sft(toy_demonstrations(), config(), progress=False)


def test_autocast_computes_in_bfloat16_where_asked() -> None:
    x = torch.ones(2, 2)
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with autocast(enabled):
            assert (x @ x).dtype == dtype
    found = run({"steps": 2, "bf16": True})
    assert all(p.dtype == torch.float32 for p in found.model.parameters()) and np.isfinite(losses(found)).all()
