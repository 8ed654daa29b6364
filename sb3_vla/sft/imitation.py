"""Imitation: supervised fine-tuning of a model on demonstrations, before reinforcement learning."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mw_envs.tasks import INSTRUCTION_BYTES
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.checkpoints.frozen_weights import FrozenWeights, Unfrozen
from sb3_vla.checkpoints.native import NORMALIZED, refuse_other_files
from sb3_vla.checkpoints.training_state import load_training_state, save_training_state
from sb3_vla.common.errors import InputError
from sb3_vla.common.paths import local_path
from sb3_vla.common.precision import autocast, get_device
from sb3_vla.common.progress import progress_bar
from sb3_vla.common.signals import Stopped, stop_request
from sb3_vla.data.batches import DemonstrationBatches, check_hand_images, hand_view_of, shared_imitation_loss
from sb3_vla.data.demonstrations import Demonstrations
from sb3_vla.distributed.fsdp import whole_optimizer_state
from sb3_vla.distributed.ranks import join_for_good
from sb3_vla.models import VLAModel, make_model, takes_option
from sb3_vla.models.lora import prepare_training
from sb3_vla.policies.views import known_view, warn_once
from sb3_vla.sft.settings import SFTConfig

_VALIDATION_SAMPLES = 1024


@dataclass
class SFTResult:
    """A trained model and its curve.

    :param model: with averaged weights, and adapters apart where it was trained with some.
    :param history: rows of step, seconds, train_loss and, at validations, validation_loss.
    """

    model: VLAModel
    history: list[dict[str, float]]
    seconds: float


def sft(
    demonstrations: Demonstrations,
    config: SFTConfig,
    *,
    output: str | Path | None = None,
    progress: bool = True,
    on_step: Callable[[dict[str, float]], None] | None = None,
    save_state: Callable[[int], AbstractContextManager[Path]] | None = None,
    resume_from: Path | None = None,
    notes: Mapping[str, Any] | None = None,
) -> SFTResult:
    """Train a model to imitate. Under ``torchrun`` ranks share each batch, and rank 0 validates and writes.

    :param demonstrations: the data; their images must have the size the model reads.
    :param config: settings.
    :param output: folder for the resulting checkpoint.
    :param progress: show a progress bar with losses.
    :param on_step: called with each row of the history.
    :param save_state: gives the folder for the state at a step, such as ``RunDirectory.checkpoint``.
    :param resume_from: such a folder; training goes on from there to the same result as without the interrupt.
    :param notes: for the resulting checkpoint, besides steps, batch size and frames.
    :raises ValueError: if data and model do not fit, or the loss stops being finite.
    """
    ranks = join_for_good()
    if output is not None:
        refuse_other_files(local_path(output).resolve())  # before the work
    torch.manual_seed(config.seed)
    train_frames, validation_frames = demonstrations.split(config.validation_fraction, config.seed)
    model = _make_model(demonstrations, config)
    batches = DemonstrationBatches(demonstrations, train_frames, model.action_horizon, config.shift, config.seed)
    validation = []
    if ranks.leads:  # the others do not validate, and need no copy of the images
        validation = _validation_batches(demonstrations, validation_frames, model, config.seed)
    trainable = config.trainable or model.default_trainable
    prepare_training(
        model,
        trainable,
        lora={} if config.lora is None and trainable == "lora" else config.lora,
        frozen_bf16=config.frozen_bf16,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    device = get_device(config.device)
    model.to(device)
    # What is frozen is shared: it is most of a large model.
    averaged = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    averaged.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
        fused=True,
    )
    # A heavy import, which the workers of a script that imports this module are spared.
    from transformers import get_cosine_schedule_with_warmup

    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
    history: list[dict[str, float]] = []
    length = demonstrations.instruction_bytes
    view = demonstrations.camera | ({} if length == INSTRUCTION_BYTES else {"instruction_bytes": length})
    imitated = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "frames": len(demonstrations),
        "shift": config.shift,
        **(notes or {}),
    }
    modules = _saved(model, averaged, config)
    first_step = 1
    if resume_from is not None:
        state = load_training_state(resume_from, modules, optimizer)
        first_step, history = state["step"] + 1, state["history"]
        batches.generator.bit_generator.state = state["batch_generator"]
        schedule.load_state_dict(state["schedule"])
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
    if known_view(demonstrations.camera) is None:
        warn_once(
            "The demonstrations do not say which view their pictures show, so the checkpoint does not either. Give "
            'crop and camera, or set demonstrations.camera, such as {"camera": "corner2", "crop": "workspace"}'
        )
    ranks.check_same(model.state_dict(), "the model")
    started = time.perf_counter() - (history[-1]["seconds"] if history else 0.0)
    with stop_request() as stop, progress_bar(progress and ranks.leads) as bar:
        task = bar.add_task("imitation", total=config.steps, completed=first_step - 1, note="")
        for step in range(first_step, config.steps + 1):
            with autocast(config.bf16, device.type):
                loss = shared_imitation_loss(
                    model, batches, config.batch_size, ranks, device=device, draws=config.draws
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            train_loss = ranks.sum_gradients(model.parameters(), {"loss": loss.item()})["loss"]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            if not (math.isfinite(train_loss) and torch.isfinite(norm)):
                raise InputError(
                    f"Imitation diverged at step {step} (loss {train_loss}); lower learning_rate={config.learning_rate}"
                )
            optimizer.step()
            schedule.step()
            _average(averaged, model, min(config.ema_decay, step / (step + 10)))
            row = {"step": step, "seconds": time.perf_counter() - started, "train_loss": train_loss}
            if validation and (step % config.validation_interval == 0 or step == config.steps):
                row["validation_loss"] = _validation_loss(averaged, validation, config)
            history.append(row)
            if on_step is not None and ranks.leads:
                on_step(row)
            recent = np.mean([r["train_loss"] for r in history[-50:]])
            validated = next((r["validation_loss"] for r in reversed(history) if "validation_loss" in r), None)
            shown = "" if validated is None else f"  validation {validated:.3f}"
            bar.update(task, advance=1, note=f"loss {recent:.3f}{shown}")
            stopped_by = stop.common(ranks.gather)
            due = step < config.steps and (step % config.checkpoint_interval == 0 or stopped_by is not None)
            if save_state is not None and ranks.leads and due:
                values = {
                    "step": step,
                    "history": history,
                    "batch_generator": batches.generator.bit_generator.state,
                    "schedule": schedule.state_dict(),
                }
                with save_state(step) as folder:
                    save_training_state(folder, modules, whole_optimizer_state(optimizer, model), values)
            if stopped_by is not None and step < config.steps:
                raise Stopped(stopped_by)
    averaged.cpu()
    if output is not None and ranks.leads:
        save_checkpoint(output, averaged, notes={"view": view, "sft": imitated})
    return SFTResult(averaged, history, time.perf_counter() - started)


def _saved(model: VLAModel, averaged: VLAModel, config: SFTConfig) -> dict[str, nn.Module | Unfrozen]:
    """What a state holds: frozen weights, which both models share, once, and not at all where a checkpoint has them."""
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    if not names:
        return {"model": model, "averaged": averaged}
    frozen = FrozenWeights(names)
    whole = model if config.checkpoint is None else Unfrozen(model, frozen)
    return {"model": whole, "averaged": Unfrozen(averaged, frozen)}


def _make_model(demonstrations: Demonstrations, config: SFTConfig) -> VLAModel:
    if config.checkpoint is not None:
        loaded = load_checkpoint(config.checkpoint, config.model_kwargs)
        model, normalized = loaded.model, loaded.notes.get(NORMALIZED, True)
    else:
        options = {
            "action_dim": demonstrations.actions.shape[1],
            "action_horizon": config.action_horizon,
            "state_dim": demonstrations.states.shape[1],
            "image_size": demonstrations.images.shape[1],
        }
        if takes_option(config.model, "hand_view") and demonstrations.hand_images is not None:
            options["hand_view"] = dataclasses.asdict(hand_view_of(demonstrations))
        model, normalized = make_model(config.model, {**options, **config.model_kwargs}), False
    if not normalized:
        model.set_statistics(_statistics(demonstrations, model))
    if demonstrations.images.shape[1:3] != model.image_size:
        raise InputError(
            f"The demonstrations' pictures are {demonstrations.images.shape[1:3]}, the model reads {model.image_size}; "
            f"load them with image_size={model.image_size[0]}"
        )
    check_hand_images(demonstrations, model)
    if demonstrations.actions.shape[1] != model.action_dim:
        raise InputError(
            f"The data has {demonstrations.actions.shape[1]}-D actions, the model {model.action_dim}-D ones"
        )
    return model


def _statistics(demonstrations: Demonstrations, model: VLAModel) -> dict[str, Tensor]:
    """Statistics of the data, those that the model has a place for."""
    places = dict(model.named_buffers())
    return {
        f"{name}_{statistic}": torch.from_numpy(value)
        for name, values in demonstrations.statistics().items()
        for statistic, value in values.items()
        if f"{name}_{statistic}" in places
    }


def _validation_batches(
    demonstrations: Demonstrations, frames: np.ndarray, model: VLAModel, seed: int
) -> list[tuple[dict[str, Tensor], Tensor, Tensor]]:
    if len(frames) == 0:
        return []
    chosen = np.random.default_rng(seed).permutation(frames)[:_VALIDATION_SAMPLES]
    batches = DemonstrationBatches(demonstrations, np.sort(chosen), model.action_horizon, 0, seed)
    return list(batches.epoch(256, hand=model.hand_view is not None))


@torch.no_grad()
def _validation_loss(
    model: VLAModel, batches: list[tuple[dict[str, Tensor], Tensor, Tensor]], config: SFTConfig
) -> float:
    """Mean loss with the same noise at every validation, so that the curve is smooth."""
    device = model.action_mean.device
    total = count = 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for observation, actions, mask in (_moved(batch, device) for batch in batches):
            with autocast(config.bf16, device.type):
                loss = model.imitation_loss(observation, actions, mask, draws=4)
            total += loss.item() * len(actions)
            count += len(actions)
    return total / count


@torch.no_grad()
def _average(averaged: VLAModel, model: VLAModel, decay: float) -> None:
    pairs = [
        (ours, new) for ours, new in zip(averaged.parameters(), model.parameters(), strict=True) if ours is not new
    ]
    torch._foreach_lerp_([ours for ours, _ in pairs], [new for _, new in pairs], 1 - decay)


def _moved(
    batch: tuple[dict[str, Tensor], Tensor, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    observation, actions, mask = batch
    return {key: value.to(device) for key, value in observation.items()}, actions.to(device), mask.to(device)
