"""Every tensor that the original programs recorded, none left out: what ``tests/data/references/names.json`` lists.

Tolerances are those of independent float32 implementations: 2e-5 for single tensors and 1e-4 for chains and losses;
0.1, and 0.15 for chains and losses, besides 2^-7 of the number, where the original computes in bfloat16. There the
squares of single errors are compared by their roots, which are single numbers: where a prediction is d off, the square
of its error e is about 2 |e| d off, and the largest e is 5. Token ids, masks and timesteps are exact. Hidden states of
tokens that are not there mean nothing and are not compared, except where the original averages them.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_diffusion_policy
import test_openvla_oft
import test_smolvla
import test_tinyvla
import torch
import torch.nn.functional as F
from published import instructions, picture, weights_of
from safetensors.torch import load_file
from torch import Tensor, nn

from sb3_vla.checkpoints import load_checkpoint
from sb3_vla.checkpoints.formats.smolvla import load_smolvla
from sb3_vla.distributions import ActionTokens, make_distribution
from sb3_vla.models import Context, DiffusionPolicy, SmolVLA, TinyVLA
from sb3_vla.models.base import PERCEPTION
from sb3_vla.models.compact import time_embedding
from sb3_vla.models.diffusion import shrink, step_sinusoid
from sb3_vla.models.smolvla import rotate
from sb3_vla.models.tinyvla import bf16_sinusoid

DATA = Path(__file__).parents[2] / "data" / "references"
NAMES: dict[str, list[str]] = json.loads((DATA / "names.json").read_text())
SINGLE, SUM, BF16, BF16_CHAIN = 2e-5, 1e-4, 0.1, 0.15
SHIPPED_CHAIN = 0.15  # TinyVLA's in bfloat16 by our sampler, which rounds elsewhere; 0.11 was measured
SQUARES = ("mixed_loss_elementwise",)
SUMS = ("chain", "loss", "actions", "sample", "select_action", "action_chunk", "euler", "model_out", "eps", "cond")


def stored(reference: str, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole record, part of which other tests keep."""
    return {**others, **load_file(DATA / f"{reference}.safetensors")}


def assert_every(
    reference: str, record: dict[str, Tensor], found: dict[str, Tensor], valid: dict[str, Tensor] | None = None
) -> None:
    """Compare all outputs; ``valid`` says which entries of an output mean something, for those in which not all do."""
    expected = {name.removeprefix("out.") for name in NAMES[reference] if name.startswith("out.")}
    assert expected == found.keys(), (expected - found.keys(), found.keys() - expected)
    wrong = []
    largest = dict.fromkeys(("single", "sums", "bfloat16"), 0.0)
    for name in sorted(expected):
        theirs, ours = record[f"out.{name}"], found[name]
        if ours.shape != theirs.shape:
            wrong.append(f"{name}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
            continue
        if not theirs.is_floating_point():
            if not torch.equal(ours.to(theirs.dtype), theirs):
                wrong.append(f"{name}: not the same")
            continue
        if name in SQUARES:
            theirs, ours = theirs.sqrt(), ours.sqrt()
        sums = name not in SQUARES and any(part in name for part in SUMS)
        low = name.endswith("_bf16") or name.startswith("mixed_")
        tolerance: Any = (BF16_CHAIN if sums else BF16) if low else (SUM if sums else SINGLE)
        if low:  # and a unit in the last place of a large number: bfloat16 has eight bits
            tolerance = tolerance + theirs.float().abs() * 2**-7
        difference = (ours.float() - theirs.float()).abs()
        relative = difference / tolerance
        if valid and name in valid:
            there = valid[name].expand(difference.shape)
            difference, relative = difference[there], relative[there]
        kind = "bfloat16" if low else "sums" if sums else "single"
        largest[kind] = max(largest[kind], difference.max().item())
        if not relative.max() <= 1:  # nan is no small difference
            wrong.append(f"{name}: {relative.max():.2f} times the tolerance apart")
    print(f"{reference}: at most", *(f"{kind} {value:.1e}" for kind, value in largest.items()))  # pytest -rP shows it
    assert not wrong, "\n".join(wrong)


@contextmanager
def inputs_of(modules: dict[str, nn.Module], outputs: bool = False) -> Iterator[dict[str, list[Tensor]]]:
    """What modules are given, or give, by their names, call by call."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str) -> Any:
        if outputs:
            return lambda _, __, output: seen[name].append(output.detach().clone())
        return lambda _, given: seen[name].append(given[0].detach().clone())

    handles = [
        module.register_forward_hook(watch(name)) if outputs else module.register_forward_pre_hook(watch(name))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# --- SmolVLA ----------------------------------------------------------------------------------------------------------


def smolvla_outputs(model: SmolVLA, record: dict[str, Tensor], image: Tensor, tasks: list[str], steps: int) -> Any:
    """What SmolVLA computes of a record's inputs, by the record's names, and the prefix' mask."""
    found: dict[str, Tensor] = {}
    norms = {f"text.{i}": layer.input_layernorm for i, layer in enumerate(model.text_model.layers)}
    norms |= {f"expert.{i}": layer.input_layernorm for i, layer in enumerate(model.expert.layers)}
    found["image_pre"] = model.resize(image)
    blocks = {str(i): block for i, block in enumerate(model.vision_model.encoder.layers)}
    with inputs_of(blocks) as before, inputs_of(blocks, outputs=True) as after:
        last = model.vision_model(pixel_values=found["image_pre"].to(model.connector.weight.dtype)).last_hidden_state
    found["vision_hidden"] = torch.stack([before["0"][0], *(after[name][0] for name in blocks)], 1)
    found["vision_last"] = last
    found["connector"] = pictures = model.embed_pictures(found["image_pre"])
    tokens, mask = model.tokenize(instructions(tasks))
    found["tokens"], found["token_mask"] = tokens, mask
    embedded, there = model.embed_prefix(pictures, tokens, mask)
    state = record["in.state_raw"]
    token = model.state_token(state)[:, None]
    length = embedded.shape[1] + 1
    padded = record["out.prefix_pad"].shape[1] - length  # a fixed length's zeros are behind the state
    with inputs_of(norms) as seen, inputs_of({"last": model.text_model.norm}, outputs=True) as normed:
        perception = model.read_prefix(embedded, there)
        context = model.contextualize({**perception, "state": state})
    found["state_norm"] = (state - model.state_mean) / (model.state_std + 1e-8)
    found["state_padded"] = F.pad(found["state_norm"], (0, 32 - state.shape[1]))
    torch.testing.assert_close(model.state_proj(found["state_padded"]), token[:, 0], atol=1e-6, rtol=0)
    found["image_masks"] = torch.ones(len(state), 1, dtype=torch.bool)
    found["prefix_embs"] = F.pad(torch.cat([embedded, token], 1), (0, 0, 0, padded))
    pad = F.pad(F.pad(there, (0, 1), value=True), (0, padded))
    found["prefix_pad"] = pad
    found["prefix_pos"] = pad.cumsum(1) - 1
    # Language and picture do not see the state, which begins a block of its own.
    block = F.pad(torch.zeros(len(state), length - 1, dtype=torch.bool), (0, 1), value=True)
    found["prefix_att"] = F.pad(block, (0, padded))
    number = found["prefix_att"].cumsum(1)
    found["prefix_mask2d"] = (number[:, None] <= number[:, :, None]) & pad[:, None] & pad[:, :, None]
    layers = [torch.cat(seen[f"text.{i}"], 1) for i in range(len(model.text_model.layers))]
    found["prefix_layer_inputs"] = F.pad(torch.stack(layers, 1), (0, 0, 0, padded))
    found["prefix_hidden"] = F.pad(torch.cat(normed["last"], 1), (0, 0, 0, padded))
    keys, values = [], []
    for layer, hidden in zip(model.text_model.layers, layers, strict=True):
        _, key, value = layer.self_attn.project(layer.input_layernorm(hidden))
        keys.append(rotate(key, found["prefix_pos"][:, :length]))
        values.append(value)
    # The last token is the state's, whose keys are not kept with the prefix.
    width = length - 1
    assert torch.equal(
        torch.stack(keys, 1)[:, :, :width][there[:, None].expand(-1, len(keys), -1)],
        perception[PERCEPTION + "keys"][:, :, :width][there[:, None].expand(-1, len(keys), -1)],
    )
    found["cache_k"] = F.pad(torch.stack(keys, 1), (0, 0, 0, 0, 0, padded))
    found["cache_v"] = F.pad(torch.stack(values, 1), (0, 0, 0, 0, 0, padded))
    noise = record["in.noise"]
    for name, moment in (("t1", 1.0), ("t06", 0.6), ("t01", 0.1)):
        t = torch.full((len(state),), moment)
        found[f"suffix_embs_{name}"] = model.embed_actions(noise, t)
        found[f"time_emb_{name}"] = time_embedding(t, model.action_feature_dim, model.min_period, model.max_period)
        with inputs_of(norms) as seen:
            found[f"v_{name}"], hidden = model.denoise_features(context, noise, t)
        found[f"expert_hidden_{name}"] = torch.stack(
            [*(seen[f"expert.{i}"][0] for i in range(len(model.expert.layers))), hidden], 1
        )
    chain, velocities = [noise], []
    for step in range(steps):
        velocities.append(model.denoise(context, chain[-1], torch.full((len(state),), 1 - step / steps)))
        chain.append(chain[-1] - velocities[-1] / steps)
    found["euler_chain"], found["euler_v"] = torch.stack(chain, 1), torch.stack(velocities, 1)
    found["sample_actions"] = chain[-1]
    found["action_chunk_norm"] = chain[-1][..., :4]
    found["action_chunk"] = model.unnormalize_action(chain[-1][..., :4])
    found["select_action_first"] = found["action_chunk"][:, 0]
    actions = record["in.actions_raw"]
    found["actions_norm"] = model.normalize_action(actions)
    error = model.velocity_error(context, actions, record["in.loss_noise"], record["in.loss_time"]).square()
    found["loss_elementwise"] = error
    weight = (~record["in.action_is_pad"])[:, :, None].float()
    found["loss_mean_nopad"], found["loss_mean_pad"] = error.mean()[None], (error * weight).mean()[None]
    found["loss_head_nopad"] = error[..., :4].mean()[None]
    found["loss_head_pad"] = ((error[..., :4] * weight).sum() / (4 * weight.sum()))[None]
    return found, pad


def valid_rows(pad: Tensor) -> dict[str, Tensor]:
    per_layer = pad[:, None, :, None]
    return {
        "prefix_embs": pad[:, :, None],
        "mixed_prefix_embs": pad[:, :, None],
        "prefix_hidden": pad[:, :, None],
        "mixed_prefix_hidden": pad[:, :, None],
        "prefix_layer_inputs": per_layer,
        "cache_k": per_layer[..., None],
        "cache_v": per_layer[..., None],
    }


@torch.no_grad()
def test_smolvla_in_both_precisions(tmp_path: Path) -> None:
    """In float32, and in the mixed precision of LeRobot's files."""
    others = {k.removeprefix("main/"): v for k, v in test_smolvla.TENSORS.items() if k.startswith("main/")}
    record = stored("smolvla", others)
    folder = test_smolvla.write_published(tmp_path / "published")
    image, tasks = test_smolvla.observation()["image"], test_smolvla.RECORDS["tasks"]
    model = load_checkpoint(folder).model
    assert isinstance(model, SmolVLA)
    found, pad = smolvla_outputs(model, record, image, tasks, 10)
    mixed = load_smolvla(folder, precision="mixed").model
    assert isinstance(mixed, SmolVLA)
    mixed.vision_model.config._attn_implementation = "eager"  # type: ignore[union-attr] # as recorded
    again, _ = smolvla_outputs(mixed, record, image, tasks, 10)
    names = {name.removeprefix("out.mixed_") for name in NAMES["smolvla"] if name.startswith("out.mixed_")}
    assert_every("smolvla", record, {**found, **{f"mixed_{name}": again[name] for name in names}}, valid_rows(pad))


@torch.no_grad()
def test_smolvla_with_marks_fixed_length_and_rarer_self_attention(tmp_path: Path) -> None:
    others = {k.removeprefix("options/"): v for k, v in test_smolvla.TENSORS.items() if k.startswith("options/")}
    record = stored("smolvla_options", others)
    model = load_checkpoint(test_smolvla.with_options(test_smolvla.write_published(tmp_path / "published"))).model
    assert isinstance(model, SmolVLA)
    image = picture(record["in.image_png"])[None]
    found, pad = smolvla_outputs(model, record, image, test_smolvla.RECORDS["options_tasks"], 4)
    assert_every("smolvla_options", record, found, valid_rows(pad))


# --- Diffusion Policy -------------------------------------------------------------------------------------------------


def ddim_step(alphas: Tensor, x: Tensor, noise: Tensor, t: int, stride: int) -> Tensor:
    """A step of DDIM that rounds every intermediate result to the precision of x, as the original does; ours steps in
    float32, whatever the precision of the model."""
    noise = noise.to(x.dtype)
    here, there = alphas[t], alphas[t - stride] if t >= stride else torch.tensor(1.0)
    x0 = ((x - (1 - here).sqrt() * noise) / here.sqrt()).clamp(-1, 1)
    return there.sqrt() * x0 + (1 - there).sqrt() * noise


def diffusion_chain(
    model: Any, name: str, steps: int, context: Context, noise: Tensor, step_noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """States (N, steps + 1, H, L), the model's outputs, timesteps; DDIM without noise."""
    options = {} if name == "ddpm" else {"eta": 0.0}
    sampler: Any = make_distribution(name, model, 8, denoising_steps=steps, min_std=1e-12, **options)
    states, outputs, timesteps = [noise], [], []
    for step in range(steps):
        index = torch.tensor([step])
        timesteps.append(sampler._schedule(model, index)[0])
        outputs.append(model.denoise(context, states[-1], timesteps[-1]))
        if noise.dtype == torch.bfloat16:
            states.append(ddim_step(model.alphas_cumprod, states[-1], outputs[-1], timesteps[-1].item(), 100 // steps))
            continue
        mean, std, deterministic = sampler.kernel(model, context, states[-1], index)
        states.append(deterministic if step_noise is None else mean + std * step_noise[step])
    return torch.stack(states, 1), torch.stack(outputs, 1), torch.cat(timesteps)


@torch.no_grad()
def test_diffusion_policy_in_all_its_chains(tmp_path: Path) -> None:
    record = stored("diffusion_policy", test_diffusion_policy.recorded())
    model = load_checkpoint(test_diffusion_policy.make_published(tmp_path / "published")).model
    assert isinstance(model, DiffusionPolicy)
    image, found = record["in.image"], {}
    normalized = model._normalize("image", image.float() / 255)
    found["image_norm_8x"] = normalized[..., ::8, ::8]
    found["image_resized"] = shrink(normalized, 96)
    window = model.window(image)
    found["image_cropped_corner"] = window[..., :4, :4]
    h = window
    for number, layer in enumerate(model.rgb_encoder.backbone):
        h = layer(h)
        if number != 2:
            step = 4 if number < 2 else 1
            shown = h.relu() if number == 1 else h  # recorded after the activation that follows in place
            found[f"backbone_{number}"] = shown[..., ::step, ::step]
    found["keypoints"], found["rgb_feat"] = model.rgb_encoder.pool(h), model.rgb_encoder(window)
    found["state_norm"] = model._normalize("state", record["in.state_raw"])
    context = test_diffusion_policy.context_of(model)
    found["global_cond"] = context.state
    x, t, condition = (record[f"in.unet_{name}"] for name in ("x", "t", "cond"))
    found["unet_sinusoid"] = model.unet.sinusoid(t, 16)
    found["unet_temb"] = model.unet.diffusion_step_encoder(found["unet_sinusoid"])
    # The second block of each level down, those in the middle, and the second of the level up.
    down, middle, up = model.unet.down_modules, model.unet.mid_modules, model.unet.up_modules
    blocks = dict(zip("01234", [down[0][1], down[1][1], *middle, up[0][1]], strict=True))  # type: ignore[index]
    with inputs_of(blocks, outputs=True) as outputs:
        found["unet_out"] = model.unet(x, t, condition)
    found |= {f"unet_block_{name}": output[0] for name, output in outputs.items()}
    found["alphas_cumprod"] = alphas = model.alphas_cumprod
    found["betas"] = 1 - alphas / F.pad(alphas[:-1], (1, 0), value=1.0)
    noise, step_noise = record["in.noise"], record["in.step_noise"]
    for key, name, steps in (("ddpm", "ddpm", 100), ("ddpm_short", "ddpm", 10), ("ddim", "ddim", 10)):
        drawn = step_noise if name == "ddpm" else None
        chain, output, timesteps = diffusion_chain(model, name, steps, context, noise, drawn)
        found[f"{key}_chain"], found[f"{key}_timesteps"] = chain, timesteps
        if key != "ddpm_short":
            found[f"{key}_model_out"] = output
    found["sample"] = found["ddpm_chain"][:, -1]
    found["action_chunk_norm"] = found["sample"][:, 1:9]
    sampler = make_distribution("ddpm", model, 8, denoising_steps=100)
    found["action_chunk"] = sampler.executed_actions(model, found["sample"])  # type: ignore[operator]
    single = model.encode({"image": image[:1], "state": record["in.state_raw"][:1]})
    alone = diffusion_chain(model, "ddpm", 100, single, noise, step_noise)[0][:, -1]
    found["select_action_obs0_repeated"] = sampler.executed_actions(model, alone)  # type: ignore[operator]
    found["actions_norm"] = x0 = model.normalize_action(record["in.actions_raw"])
    found["loss_noisy_actions"], target = model.noised(x0, record["in.loss_noise"], record["in.loss_t"])
    found["loss_pred"] = model.denoise(context, found["loss_noisy_actions"], record["in.loss_t"])
    error = (found["loss_pred"] - target).square()
    found["loss"] = error.mean()[None]
    # LeRobot 0.4.4 divides by all elements, later versions and ours by those that count.
    found["loss_masked"] = (error * ~record["in.action_is_pad"][:, :, None]).mean()[None]
    assert_every("diffusion_policy", record, found)


# --- TinyVLA ----------------------------------------------------------------------------------------------------------


def tinyvla_head(model: TinyVLA, record: dict[str, Tensor], condition: Tensor, training: Tensor) -> dict[str, Tensor]:
    """What the head gives, from the condition of a decision and the pooled states of a training batch."""
    found = {"temb_sinusoid": model.unet.sinusoid(record["in.head_t"], 16)}
    dtype = model.combine.weight.dtype
    found["temb"] = model.unet.diffusion_step_encoder(found["temb_sinusoid"].to(dtype))
    pooled = model.norm_after_pool(record["in.head_hidden"].to(dtype).mean(1))
    head = model.combine(torch.cat([pooled, record["in.head_state"].to(dtype)], 1))
    found["head_out"] = model.denoise(Context(head, head), record["in.head_x"].to(dtype), record["in.head_t"])
    context = Context(condition, condition.to(dtype))
    states, outputs, _ = diffusion_chain(model, "ddim", 10, context, record["in.noise"].to(dtype))
    found["ddim_chain"], found["ddim_eps"] = states.float(), outputs
    found["actions_norm"], found["actions"] = states[:, -1].float(), model.unnormalize_action(states[:, -1].float())[0]
    x0 = model.normalize_action(record["in.actions_raw"])
    x, target = model.noised(x0, record["in.loss_noise"], record["in.loss_t"])
    state = model._normalize("state", record["in.state_raw"]).to(dtype)
    many = model.combine(torch.cat([model.norm_after_pool(training.to(dtype)), state], 1))
    found["train_eps"] = model.denoise(Context(many, many), x.to(dtype), record["in.loss_t"])
    valid = ~record["in.is_pad"][:, :, None]
    found["train_loss"] = ((found["train_eps"].float() - target).square() * valid).mean()[None]
    return found


def assert_shipped_sampler(
    reference: str, model: TinyVLA, record: dict[str, Tensor], perception: dict[str, Tensor]
) -> None:
    """The sampler that is used, head under autocast and steps in float32, beside the original's chain in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        states, _, _ = diffusion_chain(model, "ddim", 10, model.contextualize(perception), record["in.noise"])
    assert states.dtype == torch.float32
    apart = (states - record["out.ddim_chain_bf16"].float()).abs().max().item()
    print(f"{reference}: our sampler under autocast at most {apart:.2g} from the original's in bfloat16")
    assert apart < SHIPPED_CHAIN


def in_bfloat16(model: TinyVLA) -> Any:
    """A copy as the original computes it in bfloat16: the schedule, statistics and the rotation's frequencies stay
    float32, and no attention is fused."""
    low = copy.deepcopy(model).bfloat16()
    for name, buffer in model.named_buffers():
        owner, _, own = name.rpartition(".")
        setattr(low.get_submodule(owner), own, buffer)
    for part in (low.vision_tower, low.gpt_neox):
        part.config._attn_implementation = "eager"
    return low


def pooled_in_bfloat16(low: Any, pixels: Tensor, sentences: Tensor) -> Tensor:
    """Mean of the last states of pictures (N, cameras, 3, s, s) and sentences, padding included."""
    seen = [low.look(view) for view in pixels.bfloat16().unbind(1)]
    return low.read(*low.sequence(torch.cat(seen, 1), sentences)).mean(1)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_tinyvla_in_three_precisions(tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, with the timestep embedded in bfloat16 as the original does, and all in bfloat16."""
    reference = "tinyvla" if tower == "clip" else "tinyvla_siglip"
    record = stored(reference, test_tinyvla.recorded(tower))
    model = load_checkpoint(test_tinyvla.make_published(tmp_path / "published", tower)).model
    assert isinstance(model, TinyVLA)
    sentence, image = instructions([test_tinyvla.LANGS[0]]), record["in.image"]
    found: dict[str, Tensor] = {}
    # A shape of the original's, 456 of 480 pixels; that the stretched window is the same shows that ours has it too.
    found["crop95_shape"] = torch.tensor([2, 3, 456, 456])
    found["image_crop95_8x"] = model.crop(image.float())[..., ::8, ::8]
    pixels = model.pixels(image)
    found["pixel_values"], found["pixel_values_r"] = pixels[:1], pixels[1:]
    hidden = model.vision_tower(pixel_values=pixels[:1], output_hidden_states=True).hidden_states
    found["vision_hidden"] = torch.stack(hidden, 1)
    found["vision_selected"] = hidden[-2][:, 1:] if tower == "clip" else hidden[-2]
    seen = model.look(pixels)
    found["projected"] = seen[:1]
    with monkeypatch.context() as uncropped:
        uncropped.setattr(model, "center_crop", False)
        found["pixel_values_nocrop"] = model.pixels(image[:1])
    before, after = model.prompt.split("<image>")

    def ids(sentence: str, after: str = after) -> list[int]:
        return [
            *model.tokenizer.encode(before).ids,
            -200,
            *model.tokenizer.encode(after.format(instruction=sentence)).ids,
        ]

    found["input_ids"] = torch.tensor([ids(test_tinyvla.LANGS[0])])
    found["attention_mask"] = torch.ones_like(found["input_ids"], dtype=torch.bool)
    embedded, mask = model.sequence(seen.flatten(0, 1)[None], sentence)
    found["llm_embeds"], found["llm_attention_mask"] = embedded, mask
    states = model.gpt_neox(
        inputs_embeds=embedded, attention_mask=mask.long(), use_cache=False, output_hidden_states=True
    ).hidden_states
    found["llm_hidden"] = torch.stack(states, 1)
    found["llm_last"] = model.read(embedded, mask)
    found["llm_last_single_camera"] = model.read(*model.sequence(seen[:1], sentence))
    perception = model.perceive({"image": image[None], "state": record["in.state_raw"][:1], "instruction": sentence})
    found["cond_pooled"] = perception[PERCEPTION + "pooled"]
    found["cond_norm"] = model.norm_after_pool(found["cond_pooled"])
    found["cond"] = model.contextualize(perception).state
    found["state_norm"] = model._normalize("state", record["in.state_raw"])
    found["alphas_cumprod"] = model.alphas_cumprod
    assert_shipped_sampler(reference, model, record, perception)
    low = in_bfloat16(model)
    parts = [low.norm_after_pool(pooled_in_bfloat16(low, pixels[None], sentence)), found["state_norm"][:1].bfloat16()]
    condition = low.combine(torch.cat(parts, 1))
    # In training the prompt has one space more, and the original pools the padding, too.
    monkeypatch.setattr(model, "prompt", model.prompt.replace("ASSISTANT: ", "ASSISTANT:  "))
    rows = [ids(language, model.prompt.split("<image>")[1]) for language in test_tinyvla.LANGS]
    longest = max(len(row) for row in rows)
    found["train_ids"] = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    found["train_mask"] = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    pairs = [record[f"out.train_pixel_values{view}"] for view in ("", "_r")]
    # Two samples: the decision's two pictures, and the same exchanged.
    found["train_pixel_values"], found["train_pixel_values_r"] = pixels, pixels.flip(0)
    sentences = instructions(list(test_tinyvla.LANGS))
    embedded, mask = model.sequence(torch.cat([model.look(pair) for pair in pairs], 1), sentences)
    found["train_llm_embeds"], found["train_llm_mask"] = embedded, mask
    found["train_llm_last"] = model.read(embedded, mask)
    found["actions_norm_train"] = x0 = model.normalize_action(record["in.actions_raw"])
    found["train_noisy"] = model.noised(x0, record["in.loss_noise"], record["in.loss_t"])[0]
    found["ddim_timesteps"] = diffusion_chain(model, "ddim", 10, model.contextualize(perception), record["in.noise"])[2]
    pooled = found["train_llm_last"].mean(1)
    for ending, sinusoid in (("", step_sinusoid), ("_bf16time", bf16_sinusoid)):
        monkeypatch.setattr(model.unet, "sinusoid", sinusoid)
        found |= {name + ending: value for name, value in tinyvla_head(model, record, found["cond"], pooled).items()}
    low.prompt, low.unet.sinusoid = model.prompt, bf16_sinusoid
    pooled = pooled_in_bfloat16(low, torch.stack(pairs, 1), sentences)
    found |= {f"{name}_bf16": value for name, value in tinyvla_head(low, record, condition, pooled).items()}
    assert_every(reference, record, found)


# --- OpenVLA-OFT ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_openvla_oft_in_both_sequences(tmp_path: Path) -> None:
    record = stored("openvla_oft", test_openvla_oft.TENSORS)
    folder = test_openvla_oft.write_published(tmp_path / "published")
    model, given = test_openvla_oft.reference(folder), test_openvla_oft.observation()
    found: dict[str, Tensor] = {}
    tokens, mask = model.tokenize(given["instruction"])
    found["input_ids"], found["attention_mask"] = tokens, mask
    image = found["pixel_values"] = model.normalize_image(given["image"])
    found["dino_patches"] = model.vision_backbone.featurizer(image[:, :3])
    found["siglip_patches"] = model.vision_backbone.fused_featurizer(image[:, 3:])
    patches = found["projected"] = model.projector(model.vision_backbone(image))
    embedded, there = model.embed(tokens, mask, patches)
    found["llm_embeds"], found["llm_mask"], found["llm_pos"] = embedded, there, there.cumsum(1) - 1
    layers = {str(i): layer for i, layer in enumerate(model.language_model.model.layers)}
    with inputs_of(layers) as seen:
        last = model.read(embedded, there)
    found["llm_hidden"] = torch.stack([*(seen[name][0] for name in layers), last], 1)
    context = model.encode(given)
    found["first_logit_index"] = torch.tensor([patches.shape[1] + tokens.shape[1] - 1])
    assert torch.equal(context.features, last[:, found["first_logit_index"].item()])
    logits = model.token_logits(context)
    found["action_logits_256"] = logits[:, 0]
    found["action_logits_full_logsumexp"] = model.language_model.lm_head(context.state[:, :7]).logsumexp(2)
    greedy, tempered = ActionTokens(1), ActionTokens(1, temperature=1.6)
    chosen = logits.argmax(3)
    found["greedy_tokens"] = chosen + model.first_action_id
    found["greedy_actions"] = greedy.mode(model, context)
    executed = torch.ones(2, dtype=torch.int64)

    def log_prob(distribution: ActionTokens, tokens: Tensor) -> Tensor:
        trace = {"tokens": tokens}
        return distribution.log_prob(*distribution.transition(model, context, trace), trace, executed, "token")[:, 0]

    found["greedy_logprobs_untempered"] = log_prob(greedy, chosen)
    # What the original drew: the largest of tempered logits and Gumbel noise.
    drawn = (logits[:, 0] / 1.6 + record["in.gumbel"]).argmax(2)[:, None]
    found["sample_tokens"] = drawn + model.first_action_id
    found["sample_logprobs"] = found["train_logprobs"] = log_prob(tempered, drawn)
    found["sample_actions_norm"] = model.token_values[drawn]
    found["sample_actions"] = model.unnormalize_action(found["sample_actions_norm"])
    mean, std = tempered.transition(model, context, {})
    own = torch.log_softmax(mean / std, 3)
    found["train_entropy"] = -(own.exp() * own).sum(3)[:, 0]
    torch.testing.assert_close(tempered.entropy(mean, std, executed), found["train_entropy"].sum(1))
    # The critic of this project is another perceptron on the same features; the original's weights on them:
    head = weights_of({k: v for k, v in test_openvla_oft.RECORDS["shapes"].items() if k.startswith("value_head.")}, 13)
    head = {key: value.bfloat16().float() for key, value in head.items()}
    h = context.features
    for layer in ("0", "2"):
        h = F.gelu(F.linear(h, head[f"value_head.mlp.{layer}.weight"], head[f"value_head.mlp.{layer}.bias"]))
    found["values"] = found["train_values"] = F.linear(h, head["value_head.mlp.4.weight"])
    official = test_openvla_oft.reference(folder, stop_token=True)
    first = {key: value[:1] for key, value in given.items()}
    context = official.encode(first)
    tokens, mask = official.tokenize(first["instruction"])
    found["official_input_ids"] = tokens[mask][None]
    _, there = official.embed(tokens, mask, patches[:1])
    found["official_seq_len"] = there.sum(1)
    found["official_hidden"] = context.state[:, :7]
    found["official_logits_256"] = official.token_logits(context)[:, 0]
    # openvla-oft takes the likeliest of all tokens; one that is no action is the nearest that is.
    likeliest = official.language_model.lm_head(context.state[:, :7]).argmax(2) - official.first_action_id
    found["official_actions"] = official.unnormalize_action(official.token_values[likeliest.clamp(0, 255)])
    targets = record["in.sft_tokens"][:1, None] - model.first_action_id
    found["official_sft_loss"] = official.token_loss(context, targets, torch.ones(1, 1, dtype=torch.bool))[None]
    there = record["out.llm_mask"]
    valid = {"llm_hidden": there[:, None, :, None], "llm_embeds": there[:, :, None]}
    assert_every("openvla_oft", record, found, valid)
