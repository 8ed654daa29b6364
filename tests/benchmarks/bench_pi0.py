"""Speed, memory and accuracy of pi0 and pi0.5, with random weights: nothing is downloaded.

    python tests/benchmarks/bench_pi0.py                     # on a GPU: compiled with CUDA graphs, in bfloat16
    python tests/benchmarks/bench_pi0.py --model pi05
    python tests/benchmarks/bench_pi0.py --compile none --batches 1 64
    python tests/benchmarks/bench_pi0.py --size tiny --batches 1 4 --micro-batch 8 --seconds 0.2

A decision is one picture of 480x480, which comes from main memory, one sentence and five denoising steps, in the
precision of a rollout. The iteration is of RLinf's size: 10,240 decisions, whose log-probabilities PPO evaluates again
but for those of the first minibatch, then four epochs of minibatches of 2,048 that train the expert. It is scaled, not
run: the rollout from the batch that decides fastest, the update from a few micro batches and a step of the optimizer
after them, which in the real one comes after more. It is given twice: with the prefix run again in the update, and with
its keys and values kept in main memory, to which the rollout copies them and of which each micro batch takes its own.
The limit is what this device multiplies large square matrices at, measured in the same run and the same type; the share
counts two operations for each weight and token of the towers, attention and recomputation left out. On a GPU the peak
is what torch reserved, graphs included, and no more than ``--memory`` may be reserved. Each number of decisions is
compiled for itself, which takes minutes: ``--batches 1 64`` is enough for the targets.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

from mw_envs.tasks import INSTRUCTION_BYTES, encode_instruction
from sb3_vla.common.precision import autocast
from sb3_vla.distributions.base import integrate
from sb3_vla.models.gemma import AdaptiveRMSNorm
from sb3_vla.models.prompts import PromptTokenizer
from sb3_vla.policies.vla_policy import Evaluation, VLAPolicy

DECISIONS, EPOCHS, MINIBATCH, STEPS = 10_240, 4, 2048, 5
SHORTEST, LONGEST = 8, 15  # tokens of MetaWorld's sentences
ROOM = 16  # of a prompt
MOST_CALLS = 1000  # of a measurement
GIGABYTE = 10**9
WAYS = ("run again", "kept")  # the prefix in the update
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 56,
        "vision": {"width": 48, "depth": 2, "heads": 4, "mlp": 96},
        "vlm": {"width": 64, "mlp": 128, "depth": 3, "head_dim": 16},
        "expert": {"width": 32, "mlp": 64, "depth": 3, "head_dim": 16},
        "vocabulary": 512,
    },
    "middle": {
        "image_size": 224,
        "vision": {"width": 384, "depth": 9, "heads": 6, "mlp": 1536},
        "vlm": {"width": 512, "mlp": 2048, "depth": 6, "head_dim": 64},
        "expert": {"width": 256, "mlp": 1024, "depth": 6, "head_dim": 64},
        "vocabulary": 4096,
    },
    "full": {"image_size": 224},
}


class Sentences(PromptTokenizer):
    """As many tokens as MetaWorld's sentences take, the longest first, without a tokenizer's file."""

    def __call__(self, prompts: Sequence[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
        lengths = LONGEST - torch.arange(len(prompts)) % (LONGEST - SHORTEST + 1)
        valid = torch.arange(self.length) < lengths[:, None]
        return valid * 5, valid


def make_policy(options: argparse.Namespace) -> VLAPolicy:
    """A policy with random weights in float32."""
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
            gradient_checkpointing=options.gradient_checkpointing,
            optimizer_kwargs={"fused": True},  # as PPO has it
        )
    for norm in policy.modules():
        if isinstance(norm, AdaptiveRMSNorm):  # new ones close their branches, which would hide what is rounded there
            torch.nn.init.normal_(norm.dense.weight, std=0.02)
            torch.nn.init.normal_(norm.dense.bias, std=0.5)
    policy.model.tokenize = Sentences("", ROOM)  # type: ignore[assignment]
    return policy.to(options.device)


def observations(count: int) -> dict[str, np.ndarray]:
    """Random pictures with a sentence, as simulators give them."""
    generator = np.random.default_rng(0)
    sentence = encode_instruction("Push the puck to a goal")
    return {
        "image": generator.integers(0, 256, (count, 480, 480, 3), dtype=np.uint8),
        "state": generator.random((count, 4), dtype=np.float32),
        "instruction": np.tile(sentence, (count, 1)),
    }


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
        total = 0.0
        while len(times) < 3 or (total < self.least and len(times) < MOST_CALLS):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - started)
            total += times[-1]
        return float(np.median(times))

    def limit(self) -> float:
        """Operations a second of a large matrix product."""
        side = 1024 if self.device.type == "cpu" else 8192
        left, right = (torch.randn(side, side, device=self.device, dtype=self.kind) for _ in range(2))
        return 2 * side**3 / self.seconds(lambda: left @ right)

    def forget_peak(self) -> None:
        """Begin to look for the largest memory anew, without what earlier sizes left in graphs; of a process on a CPU
        the largest stays."""
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes: reserved on the device, or of the process on a CPU."""
        if self.device.type == "cpu":
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return torch.cuda.max_memory_reserved(self.device)


def operations(policy: VLAPolicy) -> tuple[int, int]:
    """Of one picture and sentence in the backbone, and of one denoising step in the expert."""
    model: Any = policy.model
    vision = sum(p.numel() for name, p in model.vision_model.named_parameters() if "embedding" not in name)
    language = sum(p.numel() for p in model.language_model.layers.parameters())
    expert = sum(p.numel() for p in model.expert.layers.parameters())
    patches = (model.config["image_size"] // model.config["vision"]["patch"]) ** 2
    suffix = model.action_horizon + hasattr(model, "state_proj")
    return 2 * (vision * patches + language * (patches + LONGEST)), 2 * expert * suffix


def actions(policy: VLAPolicy, on: Device, count: int, half: bool) -> Tensor:
    """Of so many observations, from a fixed start, normalized."""
    model = policy.model
    start = torch.randn(count, model.action_horizon, model.latent_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), autocast(half, on.device.type):
        context = model.encode(policy.prepare(obs_as_tensor(observations(count), on.device)))
        return integrate(model, context, start.to(on.device), STEPS)[:, :, : model.action_dim].cpu()


def decide(policy: VLAPolicy, on: Device, batch: int) -> float:
    """Seconds of decisions of a batch, from the pictures that the simulators gave to the actions that they get."""
    seen = observations(batch)

    def call() -> None:
        with torch.no_grad(), on.autocast():
            policy.decide(policy.prepare(obs_as_tensor(seen, on.device)))[0].cpu()

    return on.seconds(call)


@dataclass
class Update:
    """Of one decision.

    :param learning: seconds in an epoch.
    :param knowing: seconds until the rollout's log-probability is known in the update's precision.
    :param copying: seconds of the rollout to copy what is kept.
    :param size: bytes kept.
    """

    learning: float
    knowing: float
    copying: float
    size: int


def update(policy: VLAPolicy, on: Device, size: int, count: int, kept: bool) -> Update:
    """Measure an update.

    :param size: of a micro batch.
    :param count: micro batches, after which the optimizer makes a step.
    :param kept: whether the update begins from the prefix's keys and values.
    """
    executed = torch.full((size,), 5, device=on.device)
    with torch.no_grad(), on.autocast():
        seen = policy.prepare(obs_as_tensor(observations(size), on.device))
        if kept:
            seen = policy.model.perceive(seen)
        _, _, trace = policy.decide(seen)
    stored = {key: value.cpu() for key, value in seen.items()}
    copying = on.seconds(lambda: [value.cpu() for value in seen.values()]) / size if kept else 0.0
    seen = {}

    def evaluate() -> Evaluation:
        rows = torch.randperm(size)
        batch = {key: value[rows].to(on.device, non_blocking=True) for key, value in stored.items()}
        with on.autocast():
            return policy.evaluate(batch, trace, executed)

    def know() -> None:
        with torch.no_grad():
            evaluate()

    def learn() -> None:
        for _ in range(count):
            evaluated = evaluate()
            (evaluated.log_prob.mean() + evaluated.values.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        policy.optimizer.step()
        policy.optimizer.zero_grad(set_to_none=True)

    knowing, learning = on.seconds(know) / size, on.seconds(learn) / (count * size)
    return Update(learning, knowing, copying, sum(value[0].numel() * value.element_size() for value in stored.values()))


def targets(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """What one GPU is to reach at full size, what was found, and whether it is enough; without what was not run."""
    ways = [found[way] for way in WAYS if way in found]
    told = []
    if "decisions_per_second_1" in found:
        took = 1000 / found["decisions_per_second_1"]
        told.append(("a decision <= 12 ms", f"{took:.1f} ms", took <= 12))
    if "decisions_per_second_64" in found:
        rate = found["decisions_per_second_64"]
        told.append((">= 340 decisions/s, 64 at once", f"{rate:.1f}/s", rate >= 340))
    if ways:
        both = min(way["inference_seconds"] + way["update_seconds"] for way in ways)
        told.append(("inference and update of an iteration <= 120 s", f"{both:.1f} s", both <= 120))
        peak = max(min(way["peak_bytes"] for way in ways), found.get("peak_bytes_64", 0))
        told.append(("training the expert in 80 GB", f"{peak / GIGABYTE:.1f} GB", peak <= 80 * GIGABYTE))
    for name, error in found["errors"].items():
        told.append((f"actions in {name} within 1e-2 of float32", f"{error:.1e}", error <= 1e-2))
    return told


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["pi0", "pi05"], default="pi0")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--micro-batches", type=int, default=4, help="that are measured")
    parser.add_argument(
        "--compile",
        metavar="MODE",
        default="reduce-overhead" if gpu else "none",
        help="torch.compile's mode, or none; reduce-overhead by default on a GPU",
    )
    parser.add_argument("--float32", action="store_true", help="instead of bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--memory", type=float, default=80.0, help="GB that may be reserved on a GPU")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of a measurement")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    return parser.parse_args()


def main() -> None:
    options = parse()
    on = Device(torch.device(options.device), options.float32, options.seconds)
    if on.device.type == "cuda":
        torch.cuda.set_device(on.device if on.device.index is not None else 0)
        whole = torch.cuda.get_device_properties(on.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory * GIGABYTE / whole))
    console = Console(width=120, highlight=False)
    policy = make_policy(options)
    highest = on.limit()
    prefix, denoise = operations(policy)
    name = torch.cuda.get_device_name(on.device) if on.device.type == "cuda" else "CPU"
    console.print(
        f"{options.model}, {options.size}: {sum(p.numel() for p in policy.model.parameters()):,} parameters on {name}, "
        f"which multiplies matrices at {highest / 1e12:.3f} Top/s ({on.kind}); torch {torch.__version__}, "
        f"compile={options.compile}"
    )
    found: dict[str, Any] = {
        "device": name,
        "limit_tops": highest / 1e12,
        "options": {k: str(v) for k, v in vars(options).items()},
        "errors": {},
    }

    fewest = min(options.batches)
    exact = actions(policy, on, fewest, half=False)
    if not options.float32:
        policy.model.halve_backbone()
        found["errors"]["bfloat16"] = _apart(actions(policy, on, fewest, half=True), exact)
    if options.compile != "none":
        policy.model.compile_towers({"mode": options.compile})
        kind = "float32" if options.float32 else "bfloat16"
        for _ in range(3):  # the third replays what the second recorded
            compiled = actions(policy, on, fewest, half=not options.float32)
        found["errors"][f"{kind}, compiled"] = _apart(compiled, exact)

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
        peak = on.peak()
        found |= {f"decisions_per_second_{batch}": batch / took, f"peak_bytes_{batch}": peak}
        table.add_row(str(batch), f"{1000 * took:.1f}", f"{batch / took:.1f}", f"{share:.0%}", f"{peak / 2**30:.2f}")
    console.print(table)

    title = f"An iteration: {DECISIONS:,} decisions, {EPOCHS} epochs, minibatches of {MINIBATCH:,}; scaled, not run"
    columns = ("inference s", "update s", "both s", "share of the limit", "peak GiB", "kept GiB")
    rows = Table("prefix in the update", *columns, title=title)
    for way in WAYS if rate else ():  # unless no batch fitted
        on.forget_peak()
        try:
            one = update(policy, on, options.micro_batch, options.micro_batches, kept=way == "kept")
        except torch.OutOfMemoryError:
            policy.optimizer.zero_grad(set_to_none=True)
            rows.add_row(way, *["out of memory"] * len(columns))
            continue
        inference = DECISIONS * (1 / rate + one.copying)
        learning = DECISIONS * EPOCHS * one.learning + (DECISIONS - MINIBATCH) * one.knowing
        share = ((0 if way == "kept" else prefix) + 3 * denoise) / one.learning / highest
        peak, kept = on.peak(), one.size * DECISIONS / 2**30
        found[way] = {"inference_seconds": inference, "update_seconds": learning, "peak_bytes": peak, "kept_gib": kept}
        numbers = [f"{seconds:.1f}" for seconds in (inference, learning, inference + learning)]
        rows.add_row(way, *numbers, f"{share:.0%}", f"{peak / 2**30:.2f}", f"{kept:.1f}")
    console.print(rows)

    judged = Table("set for one GPU at full size", "found", "", title=f"Targets; here {options.size} on {name}")
    for target, value, met in targets(found):
        judged.add_row(target, value, "met" if met else "MISSED")
    console.print(judged)
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


def _apart(some: Tensor, others: Tensor) -> float:
    return ((some - others).norm() / others.norm()).item()


if __name__ == "__main__":
    main()
