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
from typing import Any

from rich.console import Console

from mw_envs import suite_tasks
from sb3_vla.checkpoints.training_state import check_training_state
from sb3_vla.collecting import collect
from sb3_vla.command import run_command
from sb3_vla.config import deciding_settings, load_config
from sb3_vla.demonstrations import Demonstrations
from sb3_vla.evaluation import Comparison, EvaluationResult, VideoOptions, compare, evaluate, find_protocol
from sb3_vla.figures import before_after_bars, learning_curve
from sb3_vla.identity import checkpoint_identity, deciding_options
from sb3_vla.local_ranks import local_rank_count, local_ranks
from sb3_vla.policies import load_policy
from sb3_vla.report import write_report
from sb3_vla.results import TRIAL_SEED
from sb3_vla.run import RunError
from sb3_vla.sft import SFTConfig, sft
from sb3_vla.shared_run import SharedRun
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
    hand_view: int | None = 64
    horizon: int = 160


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
    parser.add_argument("--run", help="run directory (default: runs/quickstart[-full][-seedN])")
    parser.add_argument("--full", action="store_true", help="all 50 tasks instead of 10")
    parser.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, such as seed=1 or sft.steps=500")
    arguments = parser.parse_args()

    def work() -> None:
        folder = arguments.run
        config = load_config(QuickstartConfig, overrides=(FULL if arguments.full else []) + arguments.settings)
        if folder is None:  # another seed is another run, and does not take the place of the first
            name = "quickstart-full" if arguments.full else "quickstart"
            folder = Path("runs") / (name if config.seed == 0 else f"{name}-seed{config.seed}")
        frames = (config.sft.batch_size, config.ppo.batch_size, config.ppo.rehearsal_batch_size)
        count = local_rank_count([config.ppo.num_envs], frames) if __name__ == "__main__" else 1
        with local_ranks(count) as ranks, SharedRun(folder, config) as run:
            quickstart(run, config, Console(quiet=not ranks.leads))

    again = "the same command goes on"
    return run_command(work, again=again, show_traceback=arguments.traceback, errors=Console())


def quickstart(run: SharedRun, config: QuickstartConfig, console: Console) -> None:
    """The stages in order; each is skipped if it is done with the same settings."""
    started = time.monotonic()
    suite = config.collect.suite
    seed = config.seed

    console.rule(f"1  demonstrations by scripted experts, {suite}")
    with run.stage("collect", {"collect": config.collect, "seed": seed}, outputs=["demonstrations"]) as stage:
        if not stage.done:
            settings = {**vars(config.collect), "seed": 100 * seed, "renderer": config.renderer, "overwrite": True}
            report = run.ranks.first_does(lambda: collect(run.path / "demonstrations", **settings))
            console.print(str(report), highlight=False)

    console.rule("2  imitation")
    demonstrations = None
    start = {"checkpoint": checkpoint_identity(config.sft.checkpoint), **deciding_options(config.sft.model_kwargs)}
    with run.stage(
        "sft", {"sft": deciding_settings(config.sft), "start": start}, after=["collect"], outputs=["sft"]
    ) as stage:
        if not stage.done:
            demonstrations = Demonstrations.load(run.path / "demonstrations")
            result = sft(
                demonstrations,
                config.sft,
                output=run.path / "sft",
                save_state=lambda step: run.checkpoint("sft", step),
                resume_from=run.latest_checkpoint("sft", check_training_state) if stage.resumed else None,
            )
            run.write_json("sft_history.json", result.history)

    def trials(count: int) -> dict[str, Any]:
        return {"trials": count, "protocol": config.evaluation.protocol}

    def films(name: str) -> list[str]:
        return [f"videos/{name}"] if config.evaluation.videos_per_task else []

    def measure(name: str, checkpoint: Path, trials: int, trial_seed: int, filmed: bool) -> None:
        videos = None
        if filmed and config.evaluation.videos_per_task:
            videos = VideoOptions(run.path / "videos" / name, per_task=config.evaluation.videos_per_task)
            run.ranks.first_does(videos.prepare)
        result = evaluate(
            load_policy(checkpoint, find_protocol(config.evaluation.protocol).action_chunk),
            tasks=config.collect.tasks or suite_tasks(suite),
            trials_per_task=trials,
            trial_seed=trial_seed,
            protocol=config.evaluation.protocol,
            env_kwargs={"renderer": config.renderer},
            videos=videos,
        )
        if run.ranks.leads:
            result.to_json(run.path / f"evaluation_{name}.json")

    console.rule("3  which tasks give a signal to practise on")
    with run.stage(
        "choose", trials(config.evaluation.choice_trials), after=["sft"], outputs=["evaluation_choice.json"]
    ) as stage:
        if not stage.done:
            measure("choice", run.path / "sft", config.evaluation.choice_trials, CHOICE_SEED, filmed=False)
    choice = run.ranks.first_does(lambda: EvaluationResult.from_json(run.path / "evaluation_choice.json").per_task())
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
        "before",
        trials(config.evaluation.test_trials),
        after=["sft"],
        outputs=["evaluation_before.json", *films("before")],
    ) as stage:
        if not stage.done:
            measure("before", run.path / "sft", config.evaluation.test_trials, TEST_SEED, filmed=True)

    console.rule(f"5  PPO on {len(tasks)} tasks")
    inputs = {"ppo": deciding_settings(config.ppo), "tasks": tasks + solved}
    length = config.ppo.total_decisions
    with run.stage("ppo", inputs, length=length, after=["choose"], outputs=["ppo"]) as stage:
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
        "after",
        trials(config.evaluation.test_trials),
        after=["ppo"],
        outputs=["evaluation_after.json", *films("after")],
    ) as stage:
        if not stage.done:
            measure("after", run.path / "ppo", config.evaluation.test_trials, TEST_SEED, filmed=True)

    if not run.ranks.leads:
        return
    before = EvaluationResult.from_json(run.path / "evaluation_before.json")
    after = EvaluationResult.from_json(run.path / "evaluation_after.json")
    comparison = compare(before, after, names=("imitation", "PPO"))
    report_results(run, comparison, tasks, console)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes for this start", highlight=False)


def report_results(run: SharedRun, comparison: Comparison, tasks: list[str], console: Console) -> None:
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
