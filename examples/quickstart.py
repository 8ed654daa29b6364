"""From nothing to a vision-language-action policy that reinforcement learning has improved, on a laptop.

    bash examples/quickstart.sh                      # sets up, then runs this
    bash examples/quickstart.sh --full               # MT50
    bash examples/quickstart.sh --run runs/mine ppo.iterations=100 seed=1

Scripted experts show the tasks, the model imitates them, is measured, practices by PPO, most often the tasks that it
solves now and then, and is measured again on the same trials. Started a second time, it goes on where it was
interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from mw_envs import suite_tasks
from sb3_vla.checkpoints.identity import checkpoint_identity, deciding_options
from sb3_vla.checkpoints.training_state import check_training_state
from sb3_vla.cli.command import run_command
from sb3_vla.common.config import deciding_settings, load_config
from sb3_vla.data import Demonstrations, collect
from sb3_vla.distributed.local_ranks import local_rank_count, local_ranks
from sb3_vla.evaluation import Comparison, EvaluationResult, VideoOptions, compare, evaluate, find_protocol
from sb3_vla.evaluation.results import TRIAL_SEED
from sb3_vla.policies import load_policy
from sb3_vla.runs.report.charts import before_after_bars, learning_curve
from sb3_vla.runs.report.report import write_report
from sb3_vla.runs.settings import PPOConfig
from sb3_vla.runs.shared import SharedRun
from sb3_vla.runs.training import train
from sb3_vla.sft import SFTConfig, sft


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
    """Trials per task before and after, and how many of these are filmed."""

    trials: int = 30
    videos_per_task: int = 1
    protocol: str = "rlinf-160"


@dataclass
class QuickstartConfig:
    """All settings; any of them can be given as ``key=value``."""

    seed: int = 0
    renderer: str = "auto"
    collect: CollectConfig = field(default_factory=CollectConfig)
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(steps=1000, seed="${seed}"))  # type: ignore[arg-type]
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            iterations=50,
            learning_rate=5e-5,
            # Wider noise costs precise tasks, such as pick-place, most of the successes from which they would learn.
            distribution_kwargs={"std": [0.12, 0.12, 0.12, 0.15], "coherence": "offset"},
            rehearsal_coef=0.5,
            seed="${seed}",  # type: ignore[arg-type]
        )
    )


# What metaworld_50_ppo_compact does, as a quickstart.
FULL = [
    "collect.suite=MT50",
    "collect.episodes_per_task=40",
    "sft.steps=5000",
    "evaluation.trials=10",
    "ppo.iterations=200",
    "ppo.final_learning_rate=5.0e-5",
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
    names = config.collect.tasks or suite_tasks(suite)

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

    def films(name: str) -> list[str]:
        return [f"videos/{name}"] if config.evaluation.videos_per_task else []

    def measure(name: str, checkpoint: Path, after: str) -> None:
        inputs = {"trials": config.evaluation.trials, "protocol": config.evaluation.protocol}
        result_file = f"evaluation_{name}.json"
        with run.stage(name, inputs, after=[after], outputs=[result_file, *films(name)]) as stage:
            if stage.done:
                return
            videos = None
            if config.evaluation.videos_per_task:
                videos = VideoOptions(run.path / "videos" / name, per_task=config.evaluation.videos_per_task)
                run.ranks.first_does(videos.prepare)
            result = evaluate(
                load_policy(checkpoint, find_protocol(config.evaluation.protocol).action_chunk),
                tasks=names,
                trials_per_task=config.evaluation.trials,
                trial_seed=TRIAL_SEED,  # demonstrations and PPO use seeds below it
                protocol=config.evaluation.protocol,
                env_kwargs={"renderer": config.renderer},
                videos=videos,
            )
            if run.ranks.leads:
                result.to_json(run.path / result_file)

    console.rule("3  measurement before")
    measure("before", run.path / "sft", after="sft")
    if run.ranks.leads and not EvaluationResult.from_json(run.path / "evaluation_before.json").mean_over_tasks().value:
        console.print("No trial was solved, so PPO may find no success to learn from; sft.steps could be more")

    console.rule("4  PPO")
    inputs = {"ppo": deciding_settings(config.ppo), "tasks": names}
    length = config.ppo.total_decisions
    with run.stage("ppo", inputs, length=length, after=["sft"], outputs=["ppo"]) as stage:
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
                tasks=names,
                demonstrations=demonstrations,
                resume=stage.resumed,
                renderer=config.renderer,
            )

    console.rule("5  measurement after, on the same trials")
    measure("after", run.path / "ppo", after="ppo")

    if not run.ranks.leads:
        return
    before = EvaluationResult.from_json(run.path / "evaluation_before.json")
    after = EvaluationResult.from_json(run.path / "evaluation_after.json")
    comparison = compare(before, after, names=("imitation", "PPO"))
    report_results(run, comparison, console)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes for this start", highlight=False)


def report_results(run: SharedRun, comparison: Comparison, console: Console) -> None:
    """Tables, figures, and where everything lies."""
    comparison.to_json(run.path / "comparison.json")
    comparison.to_markdown(run.path / "comparison.md")
    rows = [row for row in run.metrics() if row.get("stage") == "ppo"]
    learning_curve(rows, run.path / "learning_curve.png", title="PPO while practicing")
    before_after_bars(comparison, run.path / "before_after.png")
    comparison.print_table(console)
    gain = comparison.mean_over_tasks()
    console.print(
        f"mean over tasks, same trials, paired: {100 * gain.difference.value:+.1f} points, "
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
