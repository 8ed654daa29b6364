"""What PPO and GRPO learn from the quickstart's imitation checkpoints: one table, one figure.

    bash examples/quickstart.sh                                       # seed 0, in runs/quickstart
    bash examples/quickstart.sh --run runs/seed1 seed=1
    python tests/benchmarks/bench_learning.py runs/quickstart runs/seed1

Each run gives a seed: its imitation checkpoint, the tasks that its own measurement chose, and PPO with Gaussian chunks,
which it has trained already. Beside it, Flow-SDE and GRPO practice the same tasks under the same settings where these
mean the same, and are measured on the same trials. Minutes are those of practice, without measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from quickstart import TEST_SEED, QuickstartConfig
from rich.console import Console
from rich.table import Table

from mw_envs import suite_tasks
from sb3_vla.common.config import load_config
from sb3_vla.data.demonstrations import Demonstrations
from sb3_vla.evaluation.evaluation import Comparison, EvaluationResult, compare, evaluate, find_protocol
from sb3_vla.policies.loading import load_policy
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.report.charts import metric_series, smoothed
from sb3_vla.runs.settings import GRPOConfig, PPOConfig
from sb3_vla.runs.training import train

GAUSSIAN, FLOW_SDE, GRPO = "PPO, Gaussian", "PPO, Flow-SDE", "GRPO, Gaussian"
_COLORS = {GAUSSIAN: "#2469b0", FLOW_SDE: "#c2571a", GRPO: "#3a8a4d"}


@dataclasses.dataclass
class Learned:
    """What one algorithm made of one seed."""

    comparison: Comparison
    tasks: list[str]
    rows: list[dict[str, Any]]


def settings(config: QuickstartConfig) -> dict[str, PPOConfig | GRPOConfig]:
    """The algorithms that the quickstart does not run, with its settings."""
    ppo = config.ppo
    shared = {field.name for field in dataclasses.fields(GRPOConfig)} & {f.name for f in dataclasses.fields(PPOConfig)}
    grpo = GRPOConfig(
        total_decisions=ppo.total_decisions, **{n: getattr(ppo, n) for n in shared if n != "total_decisions"}
    )
    # Later steps undo a part of a step's noise, so that it must be larger than a Gaussian's. With a random start,
    # whose spread is as large and in no log-probability, success rose by 3 points in place of 16.
    flow = dataclasses.replace(
        ppo, distribution="flow_sde", distribution_kwargs={"noise_level": 0.8, "fixed_start": True}
    )
    return {FLOW_SDE: flow, GRPO: grpo}


def practised_tasks(path: Path, config: QuickstartConfig) -> tuple[list[str], list[str]]:
    """Tasks that give a signal, and those that are solved already, as the quickstart chose them."""
    rates = EvaluationResult.from_json(path / "evaluation_choice.json").per_task()
    low, high = config.evaluation.lowest, config.evaluation.highest
    chosen = [task for task, rate in rates.items() if low < rate.rate.value < high]
    return chosen, [task for task, rate in rates.items() if rate.rate.value >= high]


def learn(path: Path, name: str, settings: PPOConfig | GRPOConfig, config: QuickstartConfig) -> Path:
    """Train and measure; what a former start has done is kept."""
    stage = name.lower().replace(", ", "_").replace("-", "_")
    run = RunDirectory(path / "learning" / stage, settings)
    tasks, solved = practised_tasks(path, config)
    with run.stage("train", {"settings": settings, "tasks": tasks + solved}, outputs=["trained"]) as done:
        if not done.done:
            train(
                run,
                "train",
                settings,
                checkpoint=path / "sft",
                output=run.path / "trained",
                suite=config.collect.suite,
                tasks=tasks + solved,
                demonstrations=Demonstrations.load(path / "demonstrations"),
                resume=done.resumed,
                renderer=config.renderer,
            )
    with run.stage("measure", {"evaluation": config.evaluation}, after=["train"], outputs=["evaluation.json"]) as done:
        if not done.done:
            result = evaluate(
                load_policy(run.path / "trained", find_protocol(config.evaluation.protocol).action_chunk),
                tasks=config.collect.tasks or suite_tasks(config.collect.suite),
                trials_per_task=config.evaluation.test_trials,
                trial_seed=TEST_SEED,
                protocol=config.evaluation.protocol,
                env_kwargs={"renderer": config.renderer},
            )
            result.to_json(run.path / "evaluation.json")
    return run.path


def results(path: Path, only: Sequence[str]) -> dict[str, Learned]:
    """All algorithms on one seed."""
    config = load_config(QuickstartConfig, path / "config.yaml")
    before = EvaluationResult.from_json(path / "evaluation_before.json")
    tasks, _ = practised_tasks(path, config)

    def learned(after: Path, rows: list[dict[str, Any]]) -> Learned:
        return Learned(compare(before, EvaluationResult.from_json(after)), tasks, rows)

    rows = [row for row in RunDirectory(path).metrics() if row.get("stage") == "ppo"]
    found = {GAUSSIAN: learned(path / "evaluation_after.json", rows)}
    for name, its_settings in settings(config).items():
        if name in only:
            folder = learn(path, name, its_settings, config)
            found[name] = learned(folder / "evaluation.json", list(RunDirectory(folder).metrics()))
    return found


def table(of_seeds: dict[str, dict[str, Learned]]) -> Table:
    """One row for each algorithm and seed: success before and after with the paired difference."""
    columns = ("algorithm", "run", "practiced tasks", "difference", "suite", "difference", "env steps", "minutes")
    shown = Table(*columns, title="Success in %, same trials before and after, 95 % intervals")
    for name in _COLORS:
        for run, found in of_seeds.items():
            if name not in found:
                continue
            learned = found[name]
            cells = []
            for comparison in (learned.comparison.restricted_to(learned.tasks), learned.comparison):
                before, after = comparison.before.mean_over_tasks(), comparison.after.mean_over_tasks()
                cells.append(f"{100 * before.value:.1f} -> {100 * after.value:.1f}")
                change = comparison.mean_over_tasks().difference
                cells.append(f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})")
            last = learned.rows[-1]
            shown.add_row(name, run, *cells, f"{last['time/env_steps']:,.0f}", f"{last['time/time_elapsed'] / 60:.1f}")
    return shown


def curves(of_seeds: dict[str, dict[str, Learned]], path: Path) -> None:
    """Success while exploring against environment steps: a thin line for a seed, a thick one for their mean."""
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, color in _COLORS.items():
        of_name = [found[name] for found in of_seeds.values() if name in found]
        series = [metric_series(learned.rows, "time/env_steps", "env/success_once") for learned in of_name]
        series = [(steps, smoothed(rates)) for steps, rates in series if len(steps)]
        if not series:
            continue
        for steps, rates in series:
            axes.plot(steps, rates, color=color, linewidth=0.8, alpha=0.4)
        common = np.linspace(max(s[0] for s, _ in series), min(s[-1] for s, _ in series), 100)
        mean = np.mean([np.interp(common, steps, rates) for steps, rates in series], axis=0)
        axes.plot(common, mean, color=color, linewidth=2.4, label=f"{name}, {len(series)} seeds")
    axes.set(xlabel="environment steps", ylabel="success while exploring, practiced tasks", ylim=(0, 1))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of the quickstart")
    parser.add_argument("--only", nargs="+", choices=[FLOW_SDE, GRPO], default=[FLOW_SDE, GRPO])
    parser.add_argument("--figure", type=Path, default=Path("runs/learning.png"))
    arguments = parser.parse_args()
    of_seeds = {path.name: results(path, arguments.only) for path in arguments.runs}
    Console(width=150).print(table(of_seeds))
    arguments.figure.parent.mkdir(parents=True, exist_ok=True)
    curves(of_seeds, arguments.figure)


if __name__ == "__main__":
    main()
