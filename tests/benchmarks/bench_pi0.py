"""Speed and memory of pi0 and pi0.5, with random weights: nothing is downloaded.

    python tests/benchmarks/bench_pi0.py --model pi0 --size full --device cuda
    python tests/benchmarks/bench_pi0.py --size tiny --device cpu --batches 1 4

A decision is one picture of 480x480, one sentence, five denoising steps. The iteration is of RLinf's size: 10,240
decisions, then four epochs of minibatches of 2,048 that train the expert; a few micro batches of it are measured and
scaled, and so is the rollout, from the largest batch of decisions. The limit is what this device multiplies large
square matrices at, measured in the same run and the same type; the share counts two operations for each weight and
token of the towers, attention and recomputation left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
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
TOKENS = 15  # of MetaWorld's longest sentences
TINY: dict[str, Any] = {
    "image_size": 56,
    "vision": {"width": 48, "depth": 2, "heads": 4, "mlp": 96},
    "vlm": {"width": 64, "mlp": 128, "depth": 3, "head_dim": 16},
    "expert": {"width": 32, "mlp": 64, "depth": 3, "head_dim": 16},
    "vocabulary": 512,
}


class Words(PromptTokenizer):
    """As many tokens as a sentence of MetaWorld's takes, without a tokenizer's file."""

    def __call__(self, prompts: Any) -> tuple[Tensor, Tensor]:
        tokens = torch.full((len(prompts), self.length), 5)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)


def make_policy(options: argparse.Namespace) -> VLAPolicy:
    """A policy with random weights, in bfloat16 where it is frozen."""
    observation_space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (480, 480, 3), np.uint8),
            "state": spaces.Box(-np.inf, np.inf, (4,), np.float32),
            "instruction": spaces.Box(0, 255, (INSTRUCTION_BYTES,), np.uint8),
        }
    )
    sizes = TINY if options.size == "tiny" else {}
    variant = {"discrete_state_input": False} if options.model == "pi05" else {}
    torch.manual_seed(0)
    with torch.device(options.device):
        policy = VLAPolicy(
            observation_space,
            spaces.Box(-1, 1, (5, 4), np.float32),
            lambda _: 1e-5,
            model=options.model,
            model_kwargs={**sizes, **variant, "prompt_tokens": TOKENS, "action_horizon": 5},
            distribution="flow_sde",
            distribution_kwargs={"denoising_steps": STEPS},
            trainable="expert",
            frozen_bf16=not options.float32,
            gradient_checkpointing=options.gradient_checkpointing,
            compile=None if options.compile is None else {"mode": options.compile},
        )
    policy.model.tokenize = Words("", TOKENS)  # type: ignore[assignment]
    return policy.to(options.device)


def observations(count: int, device: str) -> dict[str, Tensor]:
    """Random pictures with a sentence."""
    generator = torch.Generator().manual_seed(0)
    sentence = torch.from_numpy(encode_instruction("Push the puck to a goal"))
    found = {
        "image": torch.randint(0, 256, (count, 480, 480, 3), dtype=torch.uint8, generator=generator),
        "state": torch.rand(count, 4, generator=generator),
        "instruction": sentence.expand(count, -1).contiguous(),
    }
    return {key: value.to(device) for key, value in found.items()}


def seconds(call: Callable[[], object], device: str, least: float) -> float:
    """Median seconds of a call, of at least three and as many as take ``least`` seconds, after two that warm up."""

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    for _ in range(2):
        call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        wait()
        started = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def limit(device: str, kind: torch.dtype, least: float) -> float:
    """Operations a second of a large matrix product."""
    side = 1024 if device == "cpu" else 8192
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, device, least)


def operations(policy: VLAPolicy) -> tuple[int, int]:
    """Of one picture and sentence in the backbone, and of one denoising step in the expert."""
    model = policy.model
    vision = sum(p.numel() for name, p in model.vision_model.named_parameters() if "embedding" not in name)  # type: ignore[union-attr, operator]
    language = sum(p.numel() for p in model.language_model.layers.parameters())  # type: ignore[union-attr]
    expert = sum(p.numel() for p in model.expert.layers.parameters())  # type: ignore[union-attr]
    patches = (model.config["image_size"] // model.config["vision"]["patch"]) ** 2
    suffix = model.action_horizon + (1 if model.config["state_scheme"] == "mean_std" else 0)
    return 2 * (vision * patches + language * (patches + TOKENS)), 2 * expert * suffix


def peak_memory(device: str) -> float:
    """GiB: of the device, or of the process on a CPU."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["pi0", "pi05"], default="pi0")
    parser.add_argument("--size", choices=["tiny", "full"], default="full")
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
    device = options.device
    policy = make_policy(options)
    kind = torch.float32 if options.float32 else torch.bfloat16
    highest = limit(device, kind, options.seconds)
    prefix, denoise = operations(policy)
    console = Console()
    table = Table("decisions at once", "ms", "decisions/s", "share of the limit", title=f"{options.model}, {device}")
    found: dict[str, Any] = {"limit_tflops": highest / 1e12, "options": {k: str(v) for k, v in vars(options).items()}}
    rate = 0.0
    for batch in options.batches:
        seen = observations(batch, device)

        def decide(seen: dict[str, Tensor] = seen) -> None:
            with torch.no_grad(), autocast(not options.float32, torch.device(device).type):
                policy.decide(policy.prepare(seen))

        took = seconds(decide, device, options.seconds)
        rate = max(rate, batch / took)
        share = batch * (prefix + STEPS * denoise) / took / highest
        found[f"decisions_per_second_{batch}"] = batch / took
        table.add_row(str(batch), f"{1000 * took:.1f}", f"{batch / took:.1f}", f"{share:.0%}")
    console.print(table)

    micro = policy.prepare(observations(options.micro_batch, device))
    executed = torch.full((options.micro_batch,), 5, device=device)
    with torch.no_grad():
        _, _, trace = policy.decide(micro)

    def update() -> None:
        for _ in range(options.micro_batches):
            with autocast(not options.float32, torch.device(device).type):
                evaluated = policy.evaluate(micro, trace, executed)
                loss = evaluated.log_prob.mean() + evaluated.values.square().mean()
            loss.backward()
        policy.optimizer.step()
        policy.optimizer.zero_grad(set_to_none=True)

    took = seconds(update, device, options.seconds) / (options.micro_batches * options.micro_batch)
    inference, learning = DECISIONS / rate, DECISIONS * EPOCHS * took
    found |= {"inference_seconds": inference, "update_seconds": learning, "peak_gib": peak_memory(device)}
    share = (prefix + 3 * denoise) / took / highest
    rows = Table("", "seconds", title=f"An iteration of {DECISIONS:,} decisions and {EPOCHS} epochs, scaled")
    rows.add_row("inference", f"{inference:.1f}")
    rows.add_row(f"update, minibatches of {MINIBATCH:,} in parts of {options.micro_batch}", f"{learning:.1f}")
    rows.add_row("both", f"{inference + learning:.1f}")
    console.print(rows)
    console.print(
        f"update: {1 / took:.1f} decisions/s, {share:.0%} of the limit of {highest / 1e12:.3f} Top/s ({kind}); "
        f"peak memory {peak_memory(device):.2f} GiB, torch {torch.__version__}",
        highlight=False,
    )
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
