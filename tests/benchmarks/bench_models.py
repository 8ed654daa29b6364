"""Decisions a second and peak memory of every model, with random weights.

    python tests/benchmarks/bench_models.py --size full --batch 1 16        # published sizes, on a GPU
    python tests/benchmarks/bench_models.py --size laptop --batch 1 8       # sizes that train from scratch, anywhere

A decision is one picture, one sentence and one action chunk, drawn with the steps that the model is published with, in
the precision of the published files: weights of SmolVLA mixed, of OpenVLA-OFT bfloat16, of the others float32.
Sentences are read byte by byte, which makes prompts up to three times as long as the published tokenizers do.
Each model runs in a process of its own, and the peak is that of acting at the largest batch, without the model's
making: of the accelerator's memory as PyTorch's allocator counts it, or of the process's resident memory on a CPU,
where what was resident before the model was made is taken off. The time is the median over the rounds, the first two
of which are not counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
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

_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def _tinyvla(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """On Pythia of these sizes."""
    language = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 50304}
    return {
        "image_size": 480,
        "action_horizon": 16,
        "vision": _CLIP_L,
        "language": {**language, "num_hidden_layers": layers, "num_attention_heads": heads},
        "down_dims": (256, 512, 1024),
        "step_dim": 256,
        "cameras": 2,
        "centre_crop": True,
    }


#: label: model, its options, distribution, its options
FULL: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "Diffusion Policy": (
        "diffusion_policy",
        {
            "image_size": 480,
            "action_horizon": 16,
            "n_obs_steps": 2,
            "instruction_dim": 0,
            "widths": (64, 128, 256, 512),
            "down_dims": (512, 1024, 2048),
            "step_dim": 128,
        },
        "ddim",
        {"denoising_steps": 10},
    ),
    "TinyVLA-S": ("tinyvla", _tinyvla(512, 6, 8), "ddim", {"denoising_steps": 10}),
    "TinyVLA-B": ("tinyvla", _tinyvla(1024, 24, 16), "ddim", {"denoising_steps": 10}),
    "TinyVLA-H": ("tinyvla", _tinyvla(2048, 16, 8), "ddim", {"denoising_steps": 10}),
    "SmolVLA 0.24 B": ("smolvla", {"vlm": "256M", "precision": "mixed"}, "flow_sde", {"denoising_steps": 10}),
    "SmolVLA 0.45 B": ("smolvla", {"vlm": "500M", "precision": "mixed"}, "flow_sde", {"denoising_steps": 10}),
    "SmolVLA 2.25 B": ("smolvla", {"vlm": "2.2B", "precision": "mixed"}, "flow_sde", {"denoising_steps": 10}),
    "OpenVLA-OFT 7 B": (
        "openvla_oft",
        {"precision": "bfloat16", "acting": (0, 1, 2, 6), "numbers": 7, "max_prompt_tokens": 96},
        "tokens",
        {},
    ),
}
#: those of the recipes whose names end in ``_laptop``
LAPTOP: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="laptop")
    parser.add_argument("--models", nargs="*", help="labels, all by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="decisions at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write what was measured to this file, too")
    options = parser.parse_args()
    labels = options.models or list(SIZES[options.size])
    unknown = [label for label in labels if label not in SIZES[options.size]]
    if unknown:
        parser.error(f"no model {unknown[0]!r} of size {options.size}; expected {', '.join(SIZES[options.size])}")
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
