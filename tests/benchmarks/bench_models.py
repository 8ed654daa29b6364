"""Decisions a second and peak memory of every model, with random weights; the memory of training it, planned.

    python tests/benchmarks/bench_models.py --size full --batch 1 16        # published sizes, on a GPU
    python tests/benchmarks/bench_models.py --size laptop --batch 1 8       # sizes that train from scratch, anywhere
    python tests/benchmarks/bench_models.py --memory                        # of training, planned, without a GPU

A decision is one picture, one sentence and one action chunk, drawn with the steps that the model is published with, in
the precision of the published files: weights of SmolVLA mixed, of OpenVLA-OFT bfloat16, of the others float32.
Sentences are read byte by byte, which makes prompts up to three times as long as the published tokenizers do.
Each model runs in a process of its own, and the peak is that of acting at the largest batch, without the model's
making: of the accelerator's memory as PyTorch's allocator counts it, or of the process's resident memory on a CPU,
where what was resident before the model was made is taken off. The time is the median over the rounds, the first two
of which are not counted. ``--memory`` plans the recipes for one GPU, see :mod:`sb3_vla.recipes.memory`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mw_envs import encode_instruction
from sb3_vla.distributions import make_distribution
from sb3_vla.models import VLAModel, make_model
from sb3_vla.models.sizes import PUBLISHED_SIZES
from sb3_vla.recipes.memory import footprint
from sb3_vla.recipes.resolve import make_plan
from sb3_vla.recipes.schema import load_recipe
from sb3_vla.runs.memory_plan import MemoryPlan

#: of the options that each is published with, or acts with: what its weights are, and how actions are drawn
_EXPLORES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "diffusion_policy": ({}, "ddim", {"denoising_steps": 10}),
    "tinyvla": ({}, "ddim", {"denoising_steps": 10}),
    "smolvla": ({"precision": "mixed"}, "flow_sde", {"denoising_steps": 10}),
    "openvla_oft": ({"precision": "bfloat16", "max_prompt_tokens": 96}, "tokens", {}),
}
#: label: model, its options, distribution, its options; of pi0 see bench_pi0.py
FULL: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    label: (name, {**options, **_EXPLORES[name][0]}, *_EXPLORES[name][1:])
    for label, (name, options) in PUBLISHED_SIZES.items()
    if name in _EXPLORES
}
#: those of the recipes whose names end in ``_laptop``
LAPTOP: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "CompactVLA": ("compact", {"action_horizon": 5}, "gaussian", {"coherence": "offset"}),
    "Diffusion Policy": ("diffusion_policy", {}, "ddim", {"denoising_steps": 10}),
    "TinyVLA": ("tinyvla", {"image_size": 96}, "ddim", {"denoising_steps": 10}),
    "SmolVLA": (
        "smolvla",
        {"vlm": "laptop", "layers": 4, "action_horizon": 5, "max_tokens": 64, "image_size": 96},
        "flow_sde",
        {"denoising_steps": 10},
    ),
    "OpenVLA-OFT": (
        "openvla_oft",
        {"sizes": "laptop", "resolution": 98, "max_prompt_tokens": 120, "image_size": 96},
        "tokens",
        {},
    ),
}
SIZES = {"full": FULL, "laptop": LAPTOP}
#: kind: recipes of imitation and of reinforcement that train it on one GPU
RECIPES = {
    "compact": ("sft_compact", "ppo_compact"),
    "pi0": ("sft_openpi", "ppo_openpi"),
    "pi05": ("sft_openpi_pi05", "ppo_openpi_pi05"),
    "smolvla": ("sft_smolvla", "ppo_smolvla"),
    "diffusion_policy": ("sft_diffusion_policy", "ppo_diffusion_policy"),
    "tinyvla": ("sft_tinyvla", "ppo_tinyvla"),
    "openvla_oft": ("sft_openvlaoft", "grpo_openvlaoft_lora"),
}
TRAINED = {"CompactVLA": ("compact", {}), **PUBLISHED_SIZES}


def observation(model: VLAModel, count: int, device: str) -> dict[str, Tensor]:
    image = torch.randint(0, 256, (count, 3, *model.image_size), dtype=torch.uint8, device=device)
    sentence = torch.from_numpy(encode_instruction("Push the puck to a goal")).to(device)
    return {"image": image, "state": torch.zeros(count, 4, device=device), "instruction": sentence.repeat(count, 1)}


def median_seconds(run: Callable[[], object], rounds: int, device: str) -> float:
    seconds = []
    for number in range(rounds + 2):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def resident(what: str) -> int:
    """Bytes of this process, on Linux: ``VmRSS`` now, or ``VmHWM`` at most since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def forget_peak(device: str) -> None:
    """So that what was held while the model was made is not counted."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure(label: str, options: argparse.Namespace, answer: Any) -> None:
    """One model, in a process of its own; sends what it found, or what went wrong."""
    try:
        answer.send(_measure(label, options))
    except torch.OutOfMemoryError:
        answer.send({"error": "out of memory"})
    except Exception as error:
        answer.send({"error": f"{type(error).__name__}: {error}"})
        raise


def _measure(label: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    device = options.device
    name, model_kwargs, distribution, distribution_kwargs = SIZES[options.size][label]
    before = resident("VmRSS")
    with torch.device(device):
        model = make_model(name, model_kwargs)
    model.to(device).eval().requires_grad_(False)
    chunk = min(5, model.action_horizon - model.first_action)
    explores = make_distribution(distribution, model, chunk, **distribution_kwargs).to(device)
    forget_peak(device)
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": {},
    }
    for count in options.batch:
        seen = observation(model, count, device)

        def act(seen: dict[str, Tensor] = seen) -> object:
            with torch.no_grad():
                return explores.sample(model, model.encode(seen))

        found["seconds"][count] = median_seconds(act, options.rounds, device) / count
    found["acting"] = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before
    return found


def run_apart(label: str, options: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(label, options, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return {"error": "its process died"}
    finally:
        process.join()


def planned(label: str) -> tuple[MemoryPlan, MemoryPlan]:
    """Of imitation and of reinforcement, by the recipes as they stand."""
    kind, sizes = TRAINED[label]
    found = []
    for recipe in RECIPES[kind]:
        start = [] if recipe.startswith("sft") else ["actor.model.model_path=somewhere"]
        found += footprint(make_plan(load_recipe(f"metaworld_50_{recipe}", start)), sizes).values()
    return found[0], found[1]


def print_memory(labels: list[str]) -> None:
    console = Console(width=160)
    for label in labels:
        for recipe, plan in zip(RECIPES[TRAINED[label][0]], planned(label), strict=True):
            console.print(f"{label}, metaworld_50_{recipe}: {plan.device / 2**30:.1f} GiB on the device, ", end="")
            console.print(f"{plan.buffer / 2**30:.1f} GiB of rollouts in main memory. {plan.settings}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="laptop")
    parser.add_argument("--models", nargs="*", help="labels, all by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="decisions at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write what was measured to this file, too")
    parser.add_argument("--memory", action="store_true", help="of training at full size, planned, and nothing else")
    options = parser.parse_args()
    known: Collection[str] = TRAINED if options.memory else SIZES[options.size]
    labels = options.models or list(known)
    unknown = [label for label in labels if label not in known]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; expected {', '.join(known)}")
    if options.memory:
        return print_memory(labels)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    table = Table(title=f"{options.size} sizes, random weights, {where}; median of {options.rounds}")
    columns = [f"decisions/s, {count} at once" for count in options.batch]
    for column in ("", "parameters, M", *columns, "peak memory, GiB"):
        table.add_column(column, justify="right")
    results = {}
    for label in labels:
        found = results[label] = run_apart(label, options)
        if "error" in found:
            table.add_row(label, found["error"])
            continue
        rates = [f"{1 / found['seconds'][count]:.1f}" for count in options.batch]
        table.add_row(label, f"{found['parameters'] / 1e6:.1f}", *rates, f"{found['acting'] / 2**30:.2f}")
    Console(width=140).print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"where": where, "size": options.size, "models": results}, file, indent=1)


if __name__ == "__main__":
    main()
