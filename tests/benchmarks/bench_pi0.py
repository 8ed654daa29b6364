"""Speed and memory of pi0 and pi0.5, with random weights: nothing is downloaded.

    python tests/benchmarks/bench_pi0.py --compile reduce-overhead
    python tests/benchmarks/bench_pi0.py --model pi05
    python tests/benchmarks/bench_pi0.py --size tiny --batches 1 4 --micro-batch 8 --seconds 0.2

A decision is one picture of 480x480, one sentence, five denoising steps, in the precision of a rollout. The iteration
is of RLinf's size: 10,240 decisions, then four epochs of minibatches of 2,048 that train the expert. It is scaled, not
run: the rollout from the batch that decides fastest, the update from a few micro batches and a step of the optimiser
after them, which in the real one comes after more. It is given twice: with the prefix run again in the update, and with
its keys and values kept in main memory, to which the rollout copies them and of which each micro batch takes its own.
The limit is what this device multiplies large square matrices at, measured in the same run and the same type; the share
counts two operations for each weight and token of the towers, attention and recomputation left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mw_envs.tasks import INSTRUCTION_BYTES, encode_instruction
from sb3_vla.models.prompts import PromptTokenizer
from sb3_vla.policies import VLAPolicy
from sb3_vla.precision import autocast

DECISIONS, EPOCHS, MINIBATCH, STEPS = 10_240, 4, 2048, 5
SHORTEST, LONGEST = 8, 15  # tokens of MetaWorld's sentences
ROOM = 16  # of a prompt
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 56,
        "vision": {"width": 48, "depth": 2, "heads": 4, "mlp": 96},
        "vlm": {"width": 64, "mlp": 128, "depth": 3, "head_dim": 16},
        "expert": {"width": 32, "mlp": 64, "depth": 3, "head_dim": 16},
        "vocabulary": 512,
    },
    "middle": {
        "vision": {"width": 384, "depth": 9, "heads": 6, "mlp": 1536},
        "vlm": {"width": 512, "mlp": 2048, "depth": 6, "head_dim": 64},
        "expert": {"width": 256, "mlp": 1024, "depth": 6, "head_dim": 64},
        "vocabulary": 4096,
    },
    "full": {},
}


class Sentences(PromptTokenizer):
    """As many tokens as MetaWorld's sentences take, the longest first, without a tokenizer's file."""

    def __call__(self, prompts: Sequence[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
        lengths = LONGEST - torch.arange(len(prompts)) % (LONGEST - SHORTEST + 1)
        valid = torch.arange(self.length) < lengths[:, None]
        return valid * 5, valid


def make_policy(options: argparse.Namespace) -> VLAPolicy:
    """A policy with random weights, in bfloat16 where it is frozen."""
    observation_space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (480, 480, 3), np.uint8),
            "state": spaces.Box(-np.inf, np.inf, (4,), np.float32),
            "instruction": spaces.Box(0, 255, (INSTRUCTION_BYTES,), np.uint8),
        }
    )
    variant = {"discrete_state_input": False} if options.model == "pi05" else {}
    torch.manual_seed(0)
    with torch.device(options.device):
        policy = VLAPolicy(
            observation_space,
            spaces.Box(-1, 1, (5, 4), np.float32),
            lambda _: 1e-5,
            model=options.model,
            model_kwargs={**SIZES[options.size], **variant, "prompt_tokens": ROOM, "action_horizon": 5},
            distribution="flow_sde",
            distribution_kwargs={"denoising_steps": STEPS},
            trainable="expert",
            frozen_bf16=not options.float32,
            gradient_checkpointing=options.gradient_checkpointing,
            compile=None if options.compile is None else {"mode": options.compile},
        )
    policy.model.tokenize = Sentences("", ROOM)  # type: ignore[assignment]
    return policy.to(options.device)


def observations(count: int, device: torch.device) -> dict[str, Tensor]:
    """Random pictures with a sentence."""
    generator = torch.Generator().manual_seed(0)
    sentence = torch.from_numpy(encode_instruction("Push the puck to a goal"))
    found = {
        "image": torch.randint(0, 256, (count, 480, 480, 3), dtype=torch.uint8, generator=generator),
        "state": torch.rand(count, 4, generator=generator),
        "instruction": sentence.expand(count, -1).contiguous(),
    }
    return {key: value.to(device) for key, value in found.items()}


class Device:
    """What is measured, and how.

    :param device: where.
    :param float32: instead of bfloat16.
    :param least: seconds of a measurement.
    """

    def __init__(self, device: torch.device, float32: bool, least: float) -> None:
        self.device, self.float32, self.least = device, float32, least
        self.kind = torch.float32 if float32 else torch.bfloat16

    def autocast(self) -> Any:
        """The precision of rollout and update."""
        return autocast(not self.float32, self.device.type)

    def wait(self) -> None:
        """Until what was asked for is computed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Median of a call, of at least three and as many as take the least time, after three that warm up."""
        for _ in range(3):  # one compiles, one records what the third repeats
            call()
        times: list[float] = []
        while len(times) < 3 or sum(times) < self.least:
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - started)
        return float(np.median(times))

    def limit(self) -> float:
        """Operations a second of a large matrix product."""
        side = 1024 if self.device.type == "cpu" else 8192
        left, right = (torch.randn(side, side, device=self.device, dtype=self.kind) for _ in range(2))
        return 2 * side**3 / self.seconds(lambda: left @ right)

    def forget_peak(self) -> None:
        """Begin to look for the largest memory anew; of a process on a CPU the largest stays."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        """GiB: of the device, or of the process on a CPU."""
        if self.device.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return torch.cuda.max_memory_allocated(self.device) / 2**30


def operations(policy: VLAPolicy) -> tuple[int, int]:
    """Of one picture and sentence in the backbone, and of one denoising step in the expert."""
    model: Any = policy.model
    vision = sum(p.numel() for name, p in model.vision_model.named_parameters() if "embedding" not in name)
    language = sum(p.numel() for p in model.language_model.layers.parameters())
    expert = sum(p.numel() for p in model.expert.layers.parameters())
    patches = (model.config["image_size"] // model.config["vision"]["patch"]) ** 2
    suffix = model.action_horizon + hasattr(model, "state_proj")
    return 2 * (vision * patches + language * (patches + LONGEST)), 2 * expert * suffix


def decide(policy: VLAPolicy, on: Device, batch: int) -> float:
    """Seconds of decisions of a batch, from the pictures that the simulators gave."""
    seen = observations(batch, on.device)

    def call() -> None:
        with torch.no_grad(), on.autocast():
            policy.decide(policy.prepare(seen))

    return on.seconds(call)


def update(policy: VLAPolicy, on: Device, size: int, count: int, kept: bool) -> tuple[float, float, int]:
    """Seconds per decision of an update, and of what the rollout copies for it, and bytes kept of a decision.

    :param size: of a micro batch.
    :param count: micro batches, after which the optimiser makes a step.
    :param kept: whether the update begins from the prefix's keys and values.
    """
    executed = torch.full((size,), 5, device=on.device)
    with torch.no_grad(), on.autocast():
        seen = policy.prepare(observations(size, on.device))
        _, _, trace = policy.decide(seen)
        if kept:
            seen = policy.model.perceive(seen)
    stored = {key: value.cpu() for key, value in seen.items()}
    placed = list(seen.values()) if kept else []
    copying = on.seconds(lambda: [value.cpu() for value in placed]) / size
    del seen, placed[:]

    def call() -> None:
        for _ in range(count):
            rows = torch.randperm(size)
            batch = {key: value[rows].to(on.device, non_blocking=True) for key, value in stored.items()}
            with on.autocast():
                evaluated = policy.evaluate(batch, trace, executed)
                loss = evaluated.log_prob.mean() + evaluated.values.square().mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        policy.optimizer.step()
        policy.optimizer.zero_grad(set_to_none=True)

    took = on.seconds(call) / (count * size)
    return took, copying, sum(value[0].numel() * value.element_size() for value in stored.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["pi0", "pi05"], default="pi0")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--micro-batches", type=int, default=4, help="that are measured")
    parser.add_argument("--compile", metavar="MODE", help="torch.compile's mode, such as default or reduce-overhead")
    parser.add_argument("--float32", action="store_true", help="instead of bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of a measurement")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    on = Device(torch.device(options.device), options.float32, options.seconds)
    policy = make_policy(options)
    highest = on.limit()
    prefix, denoise = operations(policy)
    console = Console()
    name = torch.cuda.get_device_name(on.device) if on.device.type == "cuda" else "CPU"
    console.print(
        f"{options.model}, {options.size}: {sum(p.numel() for p in policy.model.parameters()):,} parameters on {name}, "
        f"which multiplies matrices at {highest / 1e12:.3f} Top/s ({on.kind}); torch {torch.__version__}, "
        f"compile={options.compile}",
        highlight=False,
    )
    found: dict[str, Any] = {"limit_tops": highest / 1e12, "options": {k: str(v) for k, v in vars(options).items()}}

    table = Table("decisions at once", "ms", "decisions/s", "share of the limit", "peak GiB", title="A rollout's batch")
    rate = 0.0
    for batch in options.batches:
        on.forget_peak()
        try:
            took = decide(policy, on, batch)
        except torch.OutOfMemoryError:
            table.add_row(str(batch), *["out of memory"] * 4)
            continue
        rate = max(rate, batch / took)
        share = batch * (prefix + STEPS * denoise) / took / highest
        found[f"decisions_per_second_{batch}"] = batch / took
        table.add_row(str(batch), f"{1000 * took:.1f}", f"{batch / took:.1f}", f"{share:.0%}", f"{on.peak():.2f}")
    console.print(table)

    title = f"An iteration: {DECISIONS:,} decisions, {EPOCHS} epochs, minibatches of {MINIBATCH:,}; scaled, not run"
    rows = Table(
        "prefix in the update",
        "inference s",
        "update s",
        "both s",
        "share of the limit",
        "peak GiB",
        "kept",
        title=title,
    )
    for kept in (False, True):
        label = "kept" if kept else "run again"
        on.forget_peak()
        try:
            took, copying, size = update(policy, on, options.micro_batch, options.micro_batches, kept)
        except torch.OutOfMemoryError:
            rows.add_row(label, *["out of memory"] * 6)
            continue
        if not rate:  # no batch fitted
            break
        inference, learning = DECISIONS * (1 / rate + copying), DECISIONS * EPOCHS * took
        share = ((0 if kept else prefix) + 3 * denoise) / took / highest
        found[label] = {"inference_seconds": inference, "update_seconds": learning, "peak_gib": on.peak()}
        rows.add_row(
            label,
            f"{inference:.1f}",
            f"{learning:.1f}",
            f"{inference + learning:.1f}",
            f"{share:.0%}",
            f"{on.peak():.2f}",
            f"{size * DECISIONS / 2**30:.1f} GiB",
        )
    console.print(rows)
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
