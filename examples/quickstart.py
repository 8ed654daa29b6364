"""From nothing to a vision-language-action policy that reinforcement learning has improved, on a laptop.

    bash examples/quickstart.sh                      # sets up, then runs this
    bash examples/quickstart.sh --full               # MT50
    bash examples/quickstart.sh --run runs/mine ppo.iterations=100 seed=1

Scripted experts show the tasks, the model imitates them, is measured, practises by PPO the tasks that it solves now and
then, and is measured again on the same trials. Started a second time, it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from mw_envs import suite_tasks
from sb3_vla.collecting import collect
from sb3_vla.config import ConfigError, load_config
from sb3_vla.demonstrations import Demonstrations
from sb3_vla.evaluation import Comparison, EvaluationResult, VideoOptions, compare, evaluate, find_protocol
from sb3_vla.figures import before_after_bars, learning_curve
from sb3_vla.policies import load_policy
from sb3_vla.report import write_report
from sb3_vla.results import TRIAL_SEED
from sb3_vla.run import RunDirectory, RunError
from sb3_vla.sft import SFTConfig, sft
from sb3_vla.stopping import Stopped, stopped_by_signals
from sb3_vla.training import PPOConfig, train

# Three sets of trials that share no goal: demonstrations and PPO use seeds below these.
TEST_SEED, CHOICE_SEED = TRIAL_SEED, TRIAL_SEED + 1_000_000


@dataclass
class CollectConfig:
    """Demonstrations: the suite or some of its tasks, episodes for each, how strongly the expert is pushed around."""

    suite: str = "MT10"
    tasks: list[str] | None = None
    episodes_per_task: int = 30
    noise_std: float = 0.5
    image_size: int = 96
    crop: str = "workspace"


@dataclass
class EvaluationConfig:
    """Trials per task: to choose what to practise, to measure before and after, and how many of these are filmed."""

    # Enough that a task solved once in thirty trials is seldom taken for one that gives signal.
    choice_trials: int = 100
    test_trials: int = 30
    lowest: float = 0.05
    highest: float = 0.95
    videos_per_task: int = 1
    protocol: str = "rlinf-160"


@dataclass
class QuickstartConfig:
    """All settings; any of them can be given as ``key=value``."""

    seed: int = 0
    renderer: str = "auto"
    collect: CollectConfig = field(default_factory=CollectConfig)
    # Many demonstrations, seen few times: such a policy is imprecise, which practice mends. Few demonstrations, seen
    # often, make one that fails wherever it was not shown, and practice finds no success there to start from.
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(steps=310, seed="${seed}"))  # type: ignore[arg-type]
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(iterations=75, rehearsal_coef=0.5, seed="${seed}"))  # type: ignore[arg-type]


FULL = [
    "collect.suite=MT50",
    "collect.episodes_per_task=25",
    "sft.steps=6000",
    "evaluation.choice_trials=10",
    "evaluation.test_trials=10",
    "evaluation.lowest=0.2",
    "evaluation.highest=0.8",
    "ppo.iterations=100",
    "ppo.distribution_kwargs={std: [0.12, 0.12, 0.12, 0.15], coherence: offset}",
    "ppo.learning_rate=2.5e-5",
    "ppo.final_learning_rate=2.5e-5",
    "ppo.rehearsal_coef=1.0",
]


def main() -> int:
    """Run all stages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory (default: runs/quickstart[-full][-seedN])")
    parser.add_argument("--full", action="store_true", help="all 50 tasks instead of 10")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, such as seed=1 or sft.steps=500")
    arguments = parser.parse_args()
    console = Console()
    folder = arguments.run
    try:
        config = load_config(QuickstartConfig, overrides=(FULL if arguments.full else []) + arguments.settings)
        if folder is None:  # another seed is another run, and does not take the place of the first
            name = "quickstart-full" if arguments.full else "quickstart"
            folder = Path("runs") / (name if config.seed == 0 else f"{name}-seed{config.seed}")
        with stopped_by_signals():
            quickstart(RunDirectory(folder, config), config, console)
    except (ConfigError, RunError, ValueError, RuntimeError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        return 2
    except Stopped as stopped:
        console.print(f"\nInterrupted by {stopped}; the same command goes on from here ({folder}).")
        return stopped.exit_code
    return 0


def quickstart(run: RunDirectory, config: QuickstartConfig, console: Console) -> None:
    """The stages in order; each is skipped if it is done with the same settings."""
    started = time.monotonic()
    suite = config.collect.suite
    seed = config.seed

    console.rule(f"1  demonstrations by scripted experts, {suite}")
    inputs = {"collect": config.collect, "seed": seed, "renderer": config.renderer}
    with run.stage("collect", inputs, outputs=["demonstrations"]) as stage:
        if not stage.done:
            report = collect(
                run.path / "demonstrations",
                suite,
                tasks=config.collect.tasks,
                episodes_per_task=config.collect.episodes_per_task,
                noise_std=config.collect.noise_std,
                image_size=config.collect.image_size,
                crop=config.collect.crop,
                seed=100 * seed,
                renderer=config.renderer,
                overwrite=True,
            )
            console.print(str(report), highlight=False)

    console.rule("2  imitation")
    demonstrations = None
    with run.stage("sft", {"sft": config.sft}, after=["collect"], outputs=["sft"]) as stage:
        if not stage.done:
            demonstrations = Demonstrations.load(run.path / "demonstrations")
            result = sft(
                demonstrations,
                config.sft,
                output=run.path / "sft",
                save_state=lambda step: run.checkpoint("sft", step),
                resume_from=run.latest_checkpoint("sft") if stage.resumed else None,
            )
            run.write_json("sft_history.json", result.history)

    def measure(name: str, checkpoint: Path, trials: int, trial_seed: int, films: bool) -> EvaluationResult:
        videos = None
        if films and config.evaluation.videos_per_task:
            videos = VideoOptions(run.path / "videos" / name, per_task=config.evaluation.videos_per_task)
        result = evaluate(
            load_policy(checkpoint, find_protocol(config.evaluation.protocol).action_chunk),
            tasks=config.collect.tasks or suite_tasks(suite),
            trials_per_task=trials,
            trial_seed=trial_seed,
            protocol=config.evaluation.protocol,
            env_kwargs={"renderer": config.renderer},
            videos=videos,
        )
        result.to_json(run.path / f"evaluation_{name}.json")
        return result

    console.rule("3  which tasks give a signal to practise on")
    with run.stage(
        "choose", {"evaluation": config.evaluation}, after=["sft"], outputs=["evaluation_choice.json"]
    ) as stage:
        if not stage.done:
            measure("choice", run.path / "sft", config.evaluation.choice_trials, CHOICE_SEED, films=False)
    choice = EvaluationResult.from_json(run.path / "evaluation_choice.json").per_task()
    rates = {task: rate.rate.value for task, rate in choice.items()}
    tasks = [task for task, rate in rates.items() if config.evaluation.lowest < rate < config.evaluation.highest]
    # Practice of other tasks may spoil these; tasks are drawn by the signal that they give, so they cost little.
    solved = [task for task, rate in rates.items() if rate >= config.evaluation.highest]
    console.print(f"solved now and then, so practised: {', '.join(tasks) or 'none'}", highlight=False)
    console.print(f"solved already, so seen again now and then: {', '.join(solved) or 'none'}", highlight=False)
    if not tasks:
        raise RunError(
            f"no task's success lies between {config.evaluation.lowest:.0%} and {config.evaluation.highest:.0%}; "
            "give sft.steps another value, or set evaluation.lowest and evaluation.highest"
        )

    console.rule("4  measurement before")
    with run.stage(
        "before", {"evaluation": config.evaluation}, after=["sft"], outputs=["evaluation_before.json"]
    ) as stage:
        if not stage.done:
            measure("before", run.path / "sft", config.evaluation.test_trials, TEST_SEED, films=True)

    console.rule(f"5  PPO on {len(tasks)} tasks")
    with run.stage("ppo", {"ppo": config.ppo, "tasks": tasks + solved}, after=["choose"], outputs=["ppo"]) as stage:
        if not stage.done:
            if config.ppo.rehearsal_coef > 0 and demonstrations is None:
                demonstrations = Demonstrations.load(run.path / "demonstrations")
            train(
                run,
                "ppo",
                config.ppo,
                checkpoint=run.path / "sft",
                output=run.path / "ppo",
                suite=suite,
                tasks=tasks + solved,
                demonstrations=demonstrations,
                resume=stage.resumed,
                renderer=config.renderer,
            )

    console.rule("6  measurement after, on the same trials")
    with run.stage(
        "after", {"evaluation": config.evaluation}, after=["ppo"], outputs=["evaluation_after.json"]
    ) as stage:
        if not stage.done:
            measure("after", run.path / "ppo", config.evaluation.test_trials, TEST_SEED, films=True)

    before = EvaluationResult.from_json(run.path / "evaluation_before.json")
    after = EvaluationResult.from_json(run.path / "evaluation_after.json")
    comparison = compare(before, after, names=("imitation", "PPO"))
    report_results(run, comparison, tasks, console)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes for this start", highlight=False)


def report_results(run: RunDirectory, comparison: Comparison, tasks: list[str], console: Console) -> None:
    """Tables, figures, and where everything lies."""
    practised = comparison.restricted_to(tasks)
    comparison.to_json(run.path / "comparison.json")
    comparison.to_markdown(run.path / "comparison.md")
    practised.to_json(run.path / "comparison_practised.json")
    practised.to_markdown(run.path / "comparison_practised.md")
    rows = [row for row in run.metrics() if row.get("stage") == "ppo"]
    learning_curve(rows, run.path / "learning_curve.png", title="PPO while practising")
    before_after_bars(comparison, run.path / "before_after.png")
    comparison.print_table(console)
    gain = practised.mean_over_tasks()
    console.rule("practised tasks")
    practised.print_table(console)
    console.print(
        f"practised tasks, same trials, paired: {100 * gain.difference.value:+.1f} points, "
        f"95 % interval {100 * gain.difference.low:+.1f} to {100 * gain.difference.high:+.1f}",
        highlight=False,
    )
    write_report(run.path)
    for what, where in {
        "report": "report.html",
        "tables": "comparison.md",
        "learning curve": "learning_curve.png",
        "before and after": "before_after.png",
        "videos": "videos",
        "TensorBoard": "tensorboard",
        "checkpoint": "ppo",
    }.items():
        console.print(f"{what:>18}  {run.path / where}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
