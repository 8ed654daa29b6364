"""Diffusion Policy: LeRobot's numbers, its folder, its key names at full size, imitation and PPO.

Tolerances are those of independent float32 implementations: 2e-5 for a tensor, 1e-4 for chains and losses.
"""

from __future__ import annotations

import functools
import io
import json
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
from published import assert_told_without_weights
from reference_weights import reference_weight
from safetensors.torch import load_file, save_file
from toy import SENTENCES, TARGETS, changed_by_an_update, probability_of, stir, toy_demonstrations, toy_ppo, toy_vec
from toy import toy_observation as any_observation

from sb3_vla import PPO
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint, save_diffusion_policy
from sb3_vla.distributions import make_distribution
from sb3_vla.models import Context, DiffusionPolicy, make_model
from sb3_vla.models.diffusion import noise_schedule, shrink
from sb3_vla.policies.loading import load_policy
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig

DATA = Path(__file__).parents[2] / "data" / "diffusion_policy"
TINY: dict[str, Any] = {
    "image_size": 64,
    "action_horizon": 4,
    "widths": (16, 16, 16, 16),
    "keypoints": 4,
    "down_dims": (16, 32),
    "step_dim": 8,
    "instruction_dim": 16,
    "timesteps": 20,
}
SIZES = {key: value for key, value in TINY.items() if key not in ("image_size", "action_horizon")}
DDIM = {"denoising_steps": 5}
toy_observation = functools.partial(any_observation, image_size=64)


@functools.cache
def recorded() -> dict[str, torch.Tensor]:
    tensors = load_file(DATA / "io.safetensors")
    pictures = [Image.open(io.BytesIO(tensors.pop(f"in.image_png.{i}").numpy().tobytes())) for i in range(2)]
    tensors["in.image"] = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    return tensors


def assert_recorded(name: str, value: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(value, recorded()[f"out.{name}"], atol=atol, rtol=0)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_published(tmp_path_factory.mktemp("published") / "diffusion")


def make_published(folder: Path) -> Path:
    """The folder as LeRobot wrote it."""
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("io.*", "full_size.json"))
    config = json.loads((DATA / "config.json").read_text())
    tiny = DiffusionPolicy(
        action_horizon=16,
        crop_size=84,
        n_obs_steps=2,
        instruction_dim=0,
        widths=(16, 16, 32, 64),
        keypoints=8,
        down_dims=config["down_dims"],
        step_dim=16,
    )
    weights = {
        f"diffusion.{key}": reference_weight(f"diffusion.{key}", tuple(value.shape), seed=3)
        for key, value in tiny.state_dict().items()
        if key.startswith(("rgb_encoder.", "unet."))
    }
    weights["diffusion.rgb_encoder.pool.pos_grid"] = tiny.rgb_encoder.pool.pos_grid
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(published: Path) -> DiffusionPolicy:
    loaded = load_checkpoint(published).model
    assert isinstance(loaded, DiffusionPolicy)
    return loaded


def context_of(model: DiffusionPolicy, history: bool = True) -> Context:
    chosen = slice(None) if history else slice(1)
    image, state = recorded()["in.image"][chosen], recorded()["in.state_raw"][chosen]
    return model.encode({"image": image[None], "state": state[None]})


# --- LeRobot's numbers ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encoder(model: DiffusionPolicy) -> None:
    pixels = model._normalize("image", recorded()["in.image"].float() / 255)
    assert_recorded("image_resized", shrink(pixels, 96)[..., ::8, ::8])
    window = model.window(recorded()["in.image"])
    assert_recorded("image_cropped_corner", window[..., :4, :4])
    cut = {0: 4, 1: 4, 3: 3, 4: 3}
    h = window
    for number, layer in enumerate(model.rgb_encoder.backbone):
        h = layer(h)
        if number == 1:  # recorded after the activation that follows in place
            assert_recorded("backbone_1", h[..., ::4, ::4].relu())
        elif number != 2:
            step = cut.get(number, 1)
            assert_recorded(f"backbone_{number}", h[..., ::step, ::step])
    assert_recorded("keypoints", model.rgb_encoder.pool(h))
    assert_recorded("rgb_feat", model.rgb_encoder(window))
    assert_recorded("state_norm", model._normalize("state", recorded()["in.state_raw"]))
    assert_recorded("global_cond", context_of(model).state)
    assert torch.equal(context_of(model).features, context_of(model).state)


@torch.no_grad()
def test_unet(model: DiffusionPolicy) -> None:
    x, t, condition = (recorded()[f"in.unet_{name}"] for name in ("x", "t", "cond"))
    assert_recorded("unet_sinusoid", model.unet.sinusoid(t, 16))
    assert_recorded("unet_temb", model.unet.diffusion_step_encoder(model.unet.sinusoid(t, 16)))
    assert_recorded("unet_out", model.unet(x, t, condition))
    assert_recorded("unet_out", model.denoise(Context(condition, condition), x, t))


@torch.no_grad()
def test_schedule_and_loss(model: DiffusionPolicy) -> None:
    assert_recorded("alphas_cumprod", noise_schedule("squaredcos_cap_v2", 100), atol=1e-7)
    x0 = model.normalize_action(recorded()["in.actions_raw"])
    assert_recorded("actions_norm", x0)
    torch.testing.assert_close(model.unnormalize_action(x0), recorded()["in.actions_raw"], atol=1e-6, rtol=0)
    x, target = model.noised(x0, recorded()["in.loss_noise"], recorded()["in.loss_t"])
    assert_recorded("loss_noisy_actions", x)
    predicted = model.denoise(context_of(model), x, recorded()["in.loss_t"])
    assert_recorded("loss_pred", predicted)
    error = (predicted - target).square()
    assert_recorded("loss", error.mean()[None], atol=1e-4)
    # LeRobot 0.4.4 divides by all elements, later versions and ours by those that count.
    valid = ~recorded()["in.action_is_pad"][:, :, None]
    assert_recorded("loss_masked", (error * valid).mean()[None], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("key", "name", "options", "cut"),
    [
        ("ddpm_chain", "ddpm", {"denoising_steps": 100}, 10),
        ("ddpm_short_chain", "ddpm", {"denoising_steps": 10}, 1),
        ("ddim_chain", "ddim", {"denoising_steps": 10, "eta": 0.0}, 1),
    ],
)
def test_chains(model: DiffusionPolicy, key: str, name: str, options: dict[str, Any], cut: int) -> None:
    """Our distributions with next to no floor of the noise; DDIM without noise is its deterministic step."""
    chain = make_distribution(name, model, 8, min_std=1e-12, **options)
    context, x = context_of(model), recorded()["in.noise"]
    states = [x]
    for step in range(options["denoising_steps"]):
        mean, std, deterministic = chain.kernel(model, context, x, torch.tensor([step]))  # type: ignore[operator]
        x = mean + std * recorded()["in.step_noise"][step] if name == "ddpm" else deterministic
        states.append(x)
    assert_recorded(key, torch.stack(states, 1)[:, ::cut], atol=1e-4)
    if key == "ddpm_chain":
        assert_recorded("action_chunk", chain.executed_actions(model, x), atol=1e-4)


@torch.no_grad()
def test_one_observation_stands_for_all(model: DiffusionPolicy) -> None:
    """As LeRobot does with the first one of an episode."""
    single = model.encode({"image": recorded()["in.image"][:1], "state": recorded()["in.state_raw"][:1]})
    torch.testing.assert_close(context_of(model, history=False).state, single.state, atol=0, rtol=0)
    chain, x = make_distribution("ddpm", model, 8, denoising_steps=100, min_std=1e-12), recorded()["in.noise"]
    for step in range(100):
        mean, std, _ = chain.kernel(model, single, x, torch.tensor([step]))  # type: ignore[operator]
        x = mean + std * recorded()["in.step_noise"][step]
    assert_recorded("select_action_obs0_repeated", chain.executed_actions(model, x), atol=1e-4)
    with pytest.raises(ValueError, match="image has 3 observations; expected 1 or n_obs_steps=2"):
        model.encode({"image": recorded()["in.image"][[0, 0, 1]][None], "state": recorded()["in.state_raw"][:1]})


# --- Folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("0.4.4_defaults_480px", {"image_size": 480}),
        ("HEAD_defaults_480px", {"image_size": 480, "norm": "batch", "action_horizon": 64}),
        ("resize240_crop216", {"image_size": 240, "crop_size": 216}),
    ],
)
def test_full_size_has_lerobots_weights(name: str, options: dict[str, Any]) -> None:
    full = {"widths": (64, 128, 256, 512), "down_dims": (512, 1024, 2048), "step_dim": 128, "instruction_dim": 0}
    with torch.device("meta"):
        policy = DiffusionPolicy(**{"action_horizon": 16, "n_obs_steps": 2, **full, **options})
    ours = {key: list(value.shape) for key, value in policy.state_dict().items() if key.startswith(("rgb_", "unet"))}
    theirs = json.loads((DATA / "full_size.json").read_text())[name]
    assert ours == {key.removeprefix("diffusion.").replace("encoder.0.", "encoder."): v for key, v in theirs.items()}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip_through_lerobots_folder(published: Path, tmp_path: Path) -> None:
    """Every tensor to the bit, every setting of the original, and the same files."""
    loaded = load_checkpoint(published)
    assert loaded.distribution == ("ddpm", {"denoising_steps": 100, "clip_sample": 1.0})
    assert_told_without_weights(published)
    save_diffusion_policy(tmp_path / "again", loaded.model, loaded.distribution)  # type: ignore[arg-type]
    assert files(tmp_path / "again") == files(published)
    for name in sorted(files(published)):
        if name.endswith(".safetensors"):
            before, after = load_file(published / name), load_file(tmp_path / "again" / name)
            assert before.keys() == after.keys()
            assert all(torch.equal(value, after[key]) for key, value in before.items()), name
    again = load_checkpoint(tmp_path / "again")
    assert (again.model_kwargs, again.distribution) == (loaded.model_kwargs, loaded.distribution)
    written, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", published))
    assert set(written) <= set(original)
    differing = {key for key in written if written[key] != original[key]}
    assert differing <= {"input_features", "n_action_steps", "drop_n_last_frames", "crop_ratio", "num_inference_steps"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"widths": (16, 32, 64, 128)}, r"widths=\(16, 32, 64, 128\) \(there: \(64, 128, 256, 512\)\)"),
        ({"instruction_dim": 64}, r"instruction_dim=64 \(there: 0\)"),
        ({"action_horizon": 6}, r"action_horizon=6 \(there: a multiple of 4\)"),
    ],
)
def test_what_lerobot_cannot_load_is_told(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    """The laptop's sizes, which its layout has no word for; what it loads is saved without one."""
    theirs = {**TINY, "widths": (64, 128, 256, 512), "instruction_dim": 0}
    with pytest.warns(UserWarning, match=f"LeRobot cannot load .*policy, which sb3_vla reads: the model has {told}"):
        save_diffusion_policy(tmp_path / "policy", DiffusionPolicy(**{**theirs, **options}))
    assert load_checkpoint(tmp_path / "policy").model.config["widths"] == list({**theirs, **options}["widths"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_diffusion_policy(tmp_path / "theirs", DiffusionPolicy(**theirs))


def test_with_instructions_and_native(tmp_path: Path) -> None:
    policy = DiffusionPolicy(**TINY, norm="batch", crop_size=48, n_obs_steps=2, mask_padding=False)
    stir(policy)
    save_diffusion_policy(tmp_path / "lerobot", policy)
    save_checkpoint(tmp_path / "native", policy)
    for folder in ("lerobot", "native"):
        again = load_checkpoint(tmp_path / folder).model
        assert again.config == policy.config
        state = again.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in policy.state_dict().items())


def test_the_older_layouts(published: Path, tmp_path: Path) -> None:
    """Statistics among the weights, no processor files; a numbered encoder; square crop without a ratio."""
    folder = tmp_path / "older"
    folder.mkdir()
    weights = load_file(published / "model.safetensors")
    weights = {key.replace("rgb_encoder.", "rgb_encoder.0."): value for key, value in weights.items()}
    for key, value in load_file(published / "policy_preprocessor_step_3_normalizer_processor.safetensors").items():
        feature, _, moment = key.rpartition(".")
        place = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
        weights[f"{place}.buffer_{feature.replace('.', '_')}.{moment}"] = value
    save_file(weights, folder / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    del config["resize_shape"], config["crop_ratio"]
    config["input_features"]["observation.image"]["shape"] = [3, 96, 96]
    (folder / "config.json").write_text(json.dumps(config))
    old, new = load_checkpoint(folder), load_checkpoint(published)
    assert old.model_kwargs == new.model_kwargs
    state = old.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in new.model.state_dict().items())


def _edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def _edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return edit


NORMALIZER = "policy_preprocessor_step_3_normalizer_processor.safetensors"
STATISTICS = (NORMALIZER, "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
FINAL = "diffusion.unet.final_conv.1.weight"


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no model.safetensors"),
        (lambda f: (f / NORMALIZER).unlink(), FileNotFoundError, rf"no {NORMALIZER} \(statistics"),
        (lambda f: (f / "policy_postprocessor.json").unlink(), FileNotFoundError, "no policy_postprocessor.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 20), ValueError, "model.safetensors is damaged"),
        (lambda f: (f / "policy_preprocessor.json").write_text("{"), ValueError, "preprocessor.json is damaged"),
        (lambda f: (f / "policy_preprocessor.json").write_text("{}"), ValueError, "has no step 'normalizer_processor'"),
        (_edit_tensors("model.safetensors", lambda t: t.pop(FINAL)), ValueError, r"missing unet.final_conv.1.weight"),
        (
            _edit_tensors("model.safetensors", lambda t: t.update({FINAL: torch.zeros(3, 16, 1)})),
            ValueError,
            r"unet.final_conv.1.weight has shape \(3, 16, 1\), expected \(4, 16, 1\)",
        ),
        (
            _edit_tensors("model.safetensors", lambda t: t.update({"diffusion.unet.more": torch.zeros(1)})),
            ValueError,
            "unexpected unet.more",
        ),
        (
            _edit_tensors("model.safetensors", lambda t: t.pop("diffusion.rgb_encoder.backbone.5.0.conv1.weight")),
            ValueError,
            "has no diffusion.rgb_encoder.backbone.5.0.conv1.weight; it is no Diffusion Policy",
        ),
        (
            lambda f: [_edit_tensors(name, lambda t: t.pop("observation.state.max"))(f) for name in STATISTICS],
            ValueError,
            "no max of observation.state, by which it normalizes",
        ),
        (_edit_config(lambda c: c.pop("down_dims")), ValueError, "no complete Diffusion Policy.*down_dims"),
        (_edit_config(lambda c: c.update(vision_backbone="resnet50")), ValueError, "vision_backbone='resnet50'"),
        (_edit_config(lambda c: c.update(beta_schedule="x")), ValueError, "beta_schedule='x'; expected one of"),
        (
            _edit_config(lambda c: c["input_features"].update({"observation.images.wrist": {"type": "VISUAL"}})),
            ValueError,
            "observation.images.wrist.*expected one camera and observation.state",
        ),
        (
            _edit_config(lambda c: c["input_features"].update({"observation.environment_state": {"type": "ENV"}})),
            ValueError,
            "observation.environment_state; expected one camera",
        ),
        (_edit_config(lambda c: c["normalization_mapping"].update(ACTION="QUANTILES")), ValueError, "'quantiles'"),
        (_edit_config(lambda c: c.update(resize_shape=[96, 80])), ValueError, r"resize_shape=\[96, 80\].*squares"),
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
        ({"action_horizon": 5, "down_dims": (16, 32, 64)}, "action_horizon=5 with 3 levels.*multiple of 4, such as 8"),
        ({"n_obs_steps": 9}, "n_obs_steps=9; expected 1 to action_horizon=4"),
        ({"crop_size": 65}, "crop_size=65; expected 1 to image_size=64"),
        ({"crop_size": 32}, "Pictures of 32 pixels leave one cell"),
        ({"resnet": "resnet19"}, "resnet='resnet19'"),
        ({"norm": "layer"}, "norm='layer'"),
        ({"widths": (8, 16, 16, 16)}, r"widths=\(8, 16, 16, 16\); expected four multiples of 16"),
        ({"down_dims": (12, 16)}, r"down_dims=\(12, 16\); expected multiples of groups=8"),
        ({"prediction": "eps"}, "prediction='eps'"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
        ({"normalization": {"state": "minmax"}}, "normalization 'minmax'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model("diffusion_policy", {**TINY, **options})


# --- The model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"film_scale": False}, {"norm": "batch"}, {"n_obs_steps": 3}])
def test_denoisings_together_equal_separate_ones(options: dict[str, Any]) -> None:
    """R denoisings of each context, rows of others do not matter, and picture, state, instruction and time do."""
    policy = make_model("diffusion_policy", {**TINY, **options})
    stir(policy)
    observation = toy_observation(3)
    observation["instruction"][1] = toy_observation(1, SENTENCES[1])["instruction"][0]
    x, t = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 17, 18, 19])
    context = policy.encode(observation)
    assert context.features.shape == (3, policy.feature_dim) and context.features.dtype == torch.float32
    together = policy.denoise(context, x, t)
    for row in range(6):
        one = policy.encode({key: value[row % 3 : row % 3 + 1] for key, value in observation.items()})
        alone = policy.denoise(one, x[row : row + 1], t[row : row + 1])[0]
        torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=0)
    for changed in (
        {"image": 255 - observation["image"]},
        {"state": observation["state"] + 1},
        {"instruction": toy_observation(3, "Open the drawer")["instruction"]},
    ):
        other = policy.denoise(policy.encode({**observation, **changed}), x, t)
        assert ((other - together).abs().amax((1, 2)) > 1e-6).all(), next(iter(changed))
    assert ((policy.denoise(context, x, (t + 5) % 20) - together).abs().amax((1, 2)) > 1e-5).all()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_loss_by_hand(prediction: str, mask_padding: bool) -> None:
    """The definition, with the horizon beginning one step in the past and two samples' ends padded."""
    policy = make_model(
        "diffusion_policy", {**TINY, "n_obs_steps": 2, "prediction": prediction, "mask_padding": mask_padding}
    )
    policy.set_statistics({"action_min": torch.tensor([-1.0, -2, 0, 0]), "action_max": torch.tensor([1.0, 2, 2, 0.5])})
    observation, actions = toy_observation(3), torch.rand(3, 4, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        torch.manual_seed(5)
        found = policy.imitation_loss(observation, actions, mask, draws=2)
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(6, 4, 4, generator=generator)
        t = torch.randint(20, (6,), generator=generator)
        context = policy.encode(observation)
        total = count = 0.0
        for row in range(6):
            chunk = torch.stack([actions[row % 3, max(step - 1, 0)] for step in range(4)])
            x0 = (chunk - torch.tensor([-1.0, -2, 0, 0])) / torch.tensor([2, 4, 2, 0.5]) * 2 - 1
            alpha = noise_schedule("squaredcos_cap_v2", 20)[t[row]]
            x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise[row]
            v = alpha.sqrt() * noise[row] - (1 - alpha).sqrt() * x0
            target = {"epsilon": noise[row], "sample": x0, "v_prediction": v}[prediction]
            one = Context(context.features, context.state[row % 3 : row % 3 + 1])
            error = (policy.denoise(one, x[None], t[row : row + 1])[0] - target).square().mean(1)
            counted = torch.tensor([0.0, *mask[row % 3, :3].tolist()]) if mask_padding else torch.ones(4)
            total, count = total + (error * counted).sum().item(), count + counted.sum().item()
    assert found.item() == pytest.approx(total / count, rel=1e-5)


def test_a_number_that_never_changed_is_read_as_lerobot_does() -> None:
    """LeRobot's 2 (x - min) / width - 1, with 1e-8 in place of a width of nothing."""
    policy = make_model("diffusion_policy", dict(TINY))
    bounds = torch.tensor([0.0, 0.3, 1.0, -0.5])
    policy.set_statistics({"state_min": bounds, "state_max": bounds + torch.tensor([0.0, 0.0, 0.0, 1.0])})
    policy.set_statistics({"action_min": bounds, "action_max": bounds})
    state = torch.tensor([[0.0, 0.3, 1.0, 0.25]])
    torch.testing.assert_close(policy._normalize("state", state), torch.tensor([[-1.0, -1, -1, 0.5]]))  # type: ignore[operator]
    chunk = torch.linspace(-1, 1, 5)[:, None].expand(5, 4)
    torch.testing.assert_close(policy.unnormalize_action(chunk), bounds.expand(5, 4), atol=2e-8, rtol=0)


def test_imitates_and_acts(tmp_path: Path) -> None:
    """SFT on toy data, what the sentences mean; the saved policy acts by them."""
    config = SFTConfig(
        model="diffusion_policy",
        model_kwargs={**SIZES, "prediction": "sample"},  # learnt sooner than noise
        action_horizon=4,
        steps=80,
        batch_size=16,
        draws=4,
        learning_rate=3e-3,
        warmup_steps=5,
        ema_decay=0.9,
        shift=2,
        validation_fraction=0.34,
        validation_interval=40,
        bf16=False,
    )
    data = toy_demonstrations(image_size=64)
    result = sft(data, config, output=tmp_path / "sft", progress=False)
    losses = [row["train_loss"] for row in result.history]
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:5])
    np.testing.assert_allclose(result.model.action_max.numpy(), data.actions.max(0))  # type: ignore[union-attr, operator]
    policy = load_policy(tmp_path / "sft")
    assert policy.action_space.shape == (4, 4)
    for sentence, target in zip(SENTENCES, TARGETS, strict=True):
        observation = {key: value.numpy() for key, value in toy_observation(4, sentence).items()}
        observation["image"] = observation["image"].transpose(0, 2, 3, 1)
        actions, _ = policy.predict(observation, deterministic=True)
        assert np.abs(actions[..., :3].mean() - target) < 0.2
        assert np.abs(actions[..., 3]).max() < 1e-6  # the gripper that never moves


# --- Reinforcement learning -------------------------------------------------------------------------------------------


def learner(
    distribution: str, options: dict[str, Any], trainable: str = "all", prediction: str = "epsilon", **others: Any
) -> PPO:
    return toy_ppo(
        env=toy_vec(4, image_size=64),
        model="diffusion_policy",
        model_kwargs={**TINY, "prediction": prediction},
        distribution=distribution,
        distribution_kwargs=options,
        trainable=trainable,
        **{"n_steps": 8, "batch_size": 16, **others},
    )


@pytest.mark.parametrize(
    ("distribution", "options", "trainable"),
    [
        ("ddpm", {"denoising_steps": 5, "trained_steps": 2}, "expert"),  # DPPO's
        ("ddpm", {"denoising_steps": 5}, "all"),
        ("ddim", {**DDIM, "joint": False}, "all"),
    ],
)
def test_ppo(distribution: str, options: dict[str, Any], trainable: str) -> None:
    """An update changes what is trained and nothing else, from a ratio of exactly one."""
    algorithm = learner(distribution, options, trainable)
    moved = changed_by_an_update(algorithm, 32)
    assert any(key.startswith("unet.") for key in moved)
    assert any(key.startswith("rgb_encoder.") for key in moved) == (trainable == "all")
    assert not any(key.endswith(("mean", "std", "min", "max", "pos_grid")) for key in moved)


def test_the_same_decisions_have_the_same_probability() -> None:
    """Beside whichever others they are evaluated, but for rounding."""
    algorithm = learner("ddpm", {"denoising_steps": 5, "trained_steps": 2}, "expert")
    probability, rows = probability_of(algorithm.policy, toy_observation(6)), torch.arange(6)
    first = probability(rows)
    assert torch.equal(probability(rows), first)
    parts = torch.cat([probability(part) for part in (rows[:2], rows[2:])])
    torch.testing.assert_close(parts, first, atol=1e-3, rtol=0)


def test_ppo_learns_the_toy() -> None:
    """The expert alone, above a random encoder of the sentences."""
    algorithm = learner(
        "ddim",
        {**DDIM, "min_std": 0.2},
        "expert",
        prediction="sample",
        n_steps=16,
        batch_size=32,
        learning_rate=3e-3,
        n_epochs=4,
    )
    start = reward_of(algorithm)
    algorithm.set_random_seed(3)
    algorithm.learn(64 * 45)
    assert reward_of(algorithm) > start + 0.15  # two seeds: 0.18 and 0.50, this one 0.50


def reward_of(algorithm: PPO) -> float:
    found = []
    for sentence, target in zip(SENTENCES, TARGETS, strict=True):
        observation = {key: value.numpy() for key, value in toy_observation(16, sentence).items()}
        observation["image"] = observation["image"].transpose(0, 2, 3, 1)
        actions, _ = algorithm.predict(observation, deterministic=True)
        found.append(-np.abs(actions - target).mean())
    return float(np.mean(found))


def test_ppo_in_metaworld(published: Path) -> None:
    """The published policy, two decisions of reach, an update."""
    env = gym.make("mw_envs:MetaWorldMT1-v0", task="reach-v3", reward="dense", image_size=96, action_chunk=4, horizon=8)
    algorithm = PPO(
        "VLAPolicy",
        env,
        n_steps=2,
        batch_size=2,
        n_epochs=1,
        device="cpu",
        seed=0,
        policy_kwargs={"checkpoint": published, "distribution": "ddim", "distribution_kwargs": DDIM},
    )
    before = algorithm.policy.model.unet.final_conv[1].weight.clone()
    algorithm.learn(2)
    assert algorithm.env_steps == 8
    assert not torch.equal(before, algorithm.policy.model.unet.final_conv[1].weight)
    env.close()
