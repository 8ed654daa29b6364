"""The ``sb3-vla`` command: collect, sft, train, eval, compare, report, watch, doctor.

What a command works with is imported when it begins, so that ``--help`` and ``--list`` answer at once.

Each command takes its settings as ``key=value``, a YAML file by ``--config``, and prints all of them with ``--help``.
``train`` takes the name of a recipe, or a file, and ``key=value``, see :mod:`sb3_vla.recipes.schema`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mw_envs.hand_view import HandView
from mw_envs.tasks import INSTRUCTION_BYTES, select_tasks
from sb3_vla.cli import doctor
from sb3_vla.cli.command import run_command
from sb3_vla.common.config import ConfigError, deciding_settings, load_config, to_yaml
from sb3_vla.common.errors import InTheWayError
from sb3_vla.common.files import finish_exchange, hidden_beside, read_json
from sb3_vla.common.paths import writable_file
from sb3_vla.evaluation.protocols import TRIAL_SEED
from sb3_vla.runs.watch import WatchCommand, run_watch
from sb3_vla.sft.settings import SFTConfig


@dataclass
class CollectCommand:
    """Play scripted experts and write a LeRobot dataset.

    :param output: folder of the dataset.
    :param suite: MT1 (with one task in ``tasks``), MT10, MT50, ML10 or ML45.
    :param split: train or test.
    :param tasks: a subset of the suite's tasks.
    :param episodes_per_task: successful episodes to keep.
    :param image_size: side of the pictures.
    :param crop: window of the view: ``workspace``, or ``full``.
    :param hand_view: side of the pictures of the hand view, which a model of one's own reads as well; None for none.
    :param horizon: steps after which an attempt has failed; 160 keeps what ends within the usual evaluation.
    :param noise_std: of the pushes that lead the expert off its path.
    :param image_storage: ``png`` or ``mp4``.
    :param seed: of the trials.
    :param overwrite: replace a dataset that is there.
    """

    output: str = "demonstrations"
    suite: str = "MT10"
    split: str = "train"
    tasks: list[str] | None = None
    episodes_per_task: int = 20
    image_size: int = 96
    crop: str = "workspace"
    hand_view: int | None = 64
    horizon: int = 200
    noise_std: float = 0.5
    image_storage: str = "png"
    seed: int = 0
    renderer: str = "auto"
    overwrite: bool = False


@dataclass
class SFTCommand:
    """Imitate demonstrations.

    :param data: folder of a LeRobot dataset.
    :param output: folder of the checkpoint.
    :param image_size: shrink the pictures to this while loading.
    :param crop: window of the view that the pictures are of, where the dataset does not say it: ``workspace``, ``full``
        or ``[top, left, height, width]`` in fractions.
    :param camera: which camera's view, where the dataset does not say it.
    :param hand_view: side of the hand view to cut from pictures of the full view; a dataset that was recorded with one
        has it anyway.
    :param rename: the dataset's feature names to ours.
    :param instruction_bytes: bytes of UTF-8 that a sentence may have.
    :param overwrite: replace a checkpoint that is there.
    """

    data: str = "demonstrations"
    output: str = "checkpoints/sft"
    image_size: int | None = None
    crop: Any = None
    camera: str | None = None
    hand_view: int | None = None
    tasks: list[str] | None = None
    rename: dict[str, str] = field(default_factory=dict)
    instruction_bytes: int = INSTRUCTION_BYTES
    sft: SFTConfig = field(default_factory=SFTConfig)
    overwrite: bool = False


@dataclass
class EvalCommand:
    """Measure a checkpoint.

    :param checkpoint: what to measure.
    :param output: JSON file of the result; a Markdown table goes beside it.
    :param protocol: rlinf-160, rlinf-100, evo1-400 or lerobot-500.
    :param action_chunk: actions executed per decision; None for the protocol's. A model that predicts fewer, such as
        OpenVLA-OFT with its one, needs it.
    :param trials_per_task: trials, fixed by ``trial_seed``.
    :param model_kwargs: what a published checkpoint does not say, such as ``{tokenizer: FOLDER}``.
    :param crop: window of the view that the model sees: ``workspace``, ``full`` or ``[top, left, height, width]`` in
        fractions; None for the one that the checkpoint says.
    :param camera: whose view it sees; None for the one that the checkpoint says.
    :param device: ``cpu``, ``cuda`` or ``auto``.
    :param bf16: bfloat16 autocast of the policy.
    :param videos: folder for a video of each task's first trials.
    """

    checkpoint: str = "checkpoints/sft"
    output: str = "evaluation.json"
    suite: str = "MT10"
    split: str = "train"
    tasks: list[str] | None = None
    protocol: str = "rlinf-160"
    action_chunk: int | None = None
    trials_per_task: int = 20
    trial_seed: int = TRIAL_SEED
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    crop: Any = None
    camera: str | None = None
    device: str = "auto"
    bf16: bool = False
    videos: str | None = None
    renderer: str = "auto"


@dataclass
class CompareCommand:
    """Compare two results of ``eval`` on the same trials.

    :param before: JSON file.
    :param after: JSON file.
    :param output: Markdown file for the table.
    """

    before: str = "before.json"
    after: str = "after.json"
    output: str | None = None


@dataclass
class ReportCommand:
    """Write a page about a run: results, curves, videos, settings; ``sb3-vla report RUN`` for short.

    :param run: run directory.
    :param output: HTML file; None for ``report.html`` in the run directory.
    :param embed_mb: megabytes of videos that are put into the page; more are linked.
    """

    run: str = "runs/ppo"
    output: str | None = None
    embed_mb: float = 20.0


def run_collect(command: CollectCommand, console: Console) -> None:
    """``sb3-vla collect``."""
    from sb3_vla.data.collecting import collect

    options = {name: value for name, value in vars(command).items() if name not in ("output", "suite")}
    console.print(str(collect(command.output, command.suite, **options)), highlight=False)


def run_sft(command: SFTCommand, console: Console) -> None:
    """``sb3-vla sft``."""
    from sb3_vla.checkpoints.identity import checkpoint_identity, data_identity, deciding_options
    from sb3_vla.checkpoints.native import refuse_other_files
    from sb3_vla.checkpoints.training_state import check_training_state
    from sb3_vla.data.demonstrations import Demonstrations
    from sb3_vla.policies.views import given_view, view_of_data
    from sb3_vla.runs.directory import fingerprint_of
    from sb3_vla.runs.shared import SharedRun
    from sb3_vla.sft.imitation import sft

    view = given_view(command.crop, command.camera)
    output = finish_exchange(command.output)
    refuse_other_files(output)  # before the work
    load: dict[str, Any] = {
        "tasks": command.tasks,
        "image_size": command.image_size,
        "rename": command.rename or None,
        "instruction_bytes": command.instruction_bytes,
    }
    if command.hand_view is not None:
        load["hand_view"] = HandView(command.hand_view)
    inputs: dict[str, Any] = {
        "sft": deciding_settings(command.sft),
        "options": deciding_options(command.sft.model_kwargs),
        "checkpoint": checkpoint_identity(command.sft.checkpoint),
        "data": data_identity(command.data),
        "load": load,
        "view": view,
    }
    # Until the result is there, what a second start goes on from after an interrupt.
    unfinished = hidden_beside(output, "unfinished")
    fingerprint = fingerprint_of(inputs)

    def made() -> bool:
        made_already = (output / "config.json").exists()
        stored = read_json(output / "config.json") if made_already else {}
        found = stored.get("notes", {}).get("sft", {}).get("inputs")
        if made_already and found != fingerprint and not command.overwrite:
            raise InTheWayError(
                f"{output} holds a checkpoint that was made with other settings; choose another output, or give "
                "overwrite=true to replace it"
            )
        return found == fingerprint

    result = None
    if not made() or unfinished.exists():
        with SharedRun(unfinished, command) as run:
            if not made():  # asked again: another process may have had the folder until now
                data = Demonstrations.load(command.data, **load)
                data.camera = view_of_data(command.data, data.camera, view)
                with run.stage("sft", inputs) as stage:
                    result = sft(
                        data,
                        command.sft,
                        output=output,
                        save_state=lambda step: run.checkpoint("sft", step),
                        resume_from=run.latest_checkpoint("sft", check_training_state) if stage.resumed else None,
                        notes={"inputs": fingerprint},
                    )
            run.ranks.first_does(lambda: shutil.rmtree(run.path))
    if result is None:
        console.print(f"{output} is complete; to repeat it choose another output", highlight=False)
    else:
        console.print(f"{output}: {result.seconds:.0f} s, loss {result.history[-1]['train_loss']:.3f}", highlight=False)


def run_train(parsed: argparse.Namespace, settings: list[str], starts_ranks: bool) -> None:
    """``sb3-vla train RECIPE``, ``--list`` and ``--dry-run``.

    :param starts_ranks: whether it may start a rank for each core.
    """
    from sb3_vla.recipes.schema import given_keys, load_recipe, recipe_names, summary

    if parsed.list:
        for name in recipe_names():
            Console().print(f"{name:38}  {summary(name)}", highlight=False, soft_wrap=True)
        return
    name, overrides = settings[0] if settings else "", settings[1:]
    if name == "" or "=" in name:
        raise ConfigError(
            f"{name or 'nothing'} where a recipe is expected, such as sb3-vla train quickstart, or sb3-vla train ppo "
            "checkpoint=FOLDER; sb3-vla train --list names them all"
        )
    from sb3_vla.distributed.local_ranks import local_ranks
    from sb3_vla.distributed.ranks import is_first_rank, torchrun
    from sb3_vla.recipes.resolve import make_plan

    console = Console(quiet=not is_first_rank())
    recipe = load_recipe(name, overrides)
    plan = make_plan(recipe, given_keys(name, overrides))
    if parsed.dry_run:
        from sb3_vla.recipes.memory import footprint

        console.print(to_yaml(recipe), highlight=False, markup=False, soft_wrap=True)
        with torchrun():
            planned = footprint(plan)
        for stage, memory in planned.items():
            told = f"Memory that {stage} takes of each rank\n{memory}\n"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
        return
    from sb3_vla.recipes.launch import launch

    with local_ranks(plan.local_ranks if starts_ranks else 1):
        launch(recipe, plan, console)


def run_eval(command: EvalCommand, console: Console) -> None:
    """``sb3-vla eval``."""
    from sb3_vla.common.precision import autocast, get_device
    from sb3_vla.distributed.ranks import current_ranks
    from sb3_vla.evaluation.evaluation import VideoOptions, evaluate, find_protocol
    from sb3_vla.policies.loading import load_policy
    from sb3_vla.policies.views import given_view

    output = writable_file(command.output, "output")  # before the work
    if output.suffix == ".md":
        raise ConfigError(f"output={command.output}; expected the name of a JSON file, beside which a table is written")
    videos = VideoOptions(command.videos) if command.videos else None
    if videos is not None:
        current_ranks().first_does(videos.prepare)
    protocol = find_protocol(command.protocol)
    if command.action_chunk is not None and command.action_chunk != protocol.action_chunk:
        chunk = command.action_chunk
        protocol = replace(protocol, name=f"{protocol.name} with chunk {chunk}", action_chunk=chunk)
    policy = load_policy(
        command.checkpoint,
        protocol.action_chunk,
        get_device(command.device),
        model_kwargs=command.model_kwargs or None,
        view=given_view(command.crop, command.camera),
    )
    with autocast(command.bf16, policy.device.type):
        result = evaluate(
            policy,
            tasks=select_tasks(command.suite, command.split, command.tasks),
            trials_per_task=command.trials_per_task,
            trial_seed=command.trial_seed,
            protocol=protocol,
            env_kwargs={"renderer": command.renderer},
            videos=videos,
        )
    if current_ranks().leads:
        result.to_json(output)
        result.to_markdown(output.with_suffix(".md"))
    result.print_table(console)


def run_compare(command: CompareCommand, console: Console) -> None:
    """``sb3-vla compare``."""
    from sb3_vla.evaluation.evaluation import EvaluationResult, compare

    if command.output is not None:
        writable_file(command.output, "output")
    comparison = compare(EvaluationResult.from_json(command.before), EvaluationResult.from_json(command.after))
    if command.output is not None:
        comparison.to_markdown(command.output)
    comparison.print_table(console)


def run_report(command: ReportCommand, console: Console) -> None:
    """``sb3-vla report``."""
    from sb3_vla.runs.report.report import write_report

    path = write_report(command.run, command.output, embed_mb=command.embed_mb)
    console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", highlight=False, soft_wrap=True)


COMMANDS: dict[str, tuple[type[Any], Callable[[Any, Console], None]]] = {
    "collect": (CollectCommand, run_collect),
    "sft": (SFTCommand, run_sft),
    "eval": (EvalCommand, run_eval),
    "compare": (CompareCommand, run_compare),
    "report": (ReportCommand, run_report),
    "watch": (WatchCommand, run_watch),
}


# Those that the ranks of torchrun do together; others are done by the first of them.
_SHARED_COMMANDS = ("sft", "eval")

_TRAIN_HELP = """Run a recipe: one that --list names, or a YAML file.

    sb3-vla train quickstart                                  demonstrations, imitation, PPO on MT10, from nothing
    sb3-vla train ppo checkpoint=compact-mt50 "tasks=[pick-place-v3]" run=runs/mine
    sb3-vla train metaworld_50_ppo_openpi checkpoint=FOLDER --dry-run

Any key of a recipe can be given as key=value; --dry-run prints all of them. Short names: checkpoint, crop, camera,
tasks, suite, run, seed, iterations, learning_rate, num_envs, trials, renderer."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sb3-vla", description="Reinforcement learning of VLA policies in MetaWorld.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, description: str, settings: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        told = description.splitlines()[0]
        command = commands.add_parser(name, help=told, description=description, formatter_class=raw)
        command.add_argument("--traceback", action="store_true", help="print the traceback of an error")
        command.add_argument("settings", nargs="*", metavar=settings)
        return command

    for name, (kind, _) in COMMANDS.items():
        command = add(name, f"{kind.__doc__}\nSettings and their defaults:\n\n{to_yaml(kind())}", "key=value")
        command.add_argument("--config", type=Path, help="YAML file with settings")
    train = add("train", _TRAIN_HELP, "RECIPE | key=value")
    train.add_argument("--list", action="store_true", help="print the recipes")
    train.add_argument("--dry-run", action="store_true", help="print a recipe's settings, and what they need")
    commands.add_parser("doctor", help="Say what this machine can do, and what is missing.", add_help=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for an error told in one message, 130 for Ctrl-C, 143 for SIGTERM.

    After a signal ``train`` finishes the iteration that is under way, ``sft`` the step, and writes a checkpoint; a
    second signal ends them at once, and the same command then goes on from the checkpoint before. The traceback of an
    error that nobody expected is kept in the run directory, or in a temporary file.

    ``doctor`` returns 1 if the quickstart cannot run here.
    """
    parser, is_this_command = _parser(), arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["doctor"]:
        return doctor.main(arguments[1:])
    parsed, rest = parser.parse_known_args(arguments)
    if any(argument.startswith("-") for argument in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    settings = [*parsed.settings, *rest]  # argparse takes no settings after an option
    if parsed.command in ("report", "watch") and settings and "=" not in settings[0]:
        settings = [f"run={settings[0]}", *settings[1:]]

    def work() -> None:
        if parsed.command == "train":
            run_train(parsed, settings, starts_ranks=is_this_command)
            return
        from sb3_vla.distributed.ranks import torchrun

        kind, run = COMMANDS[parsed.command]
        with torchrun() as ranks:
            if ranks.leads or parsed.command in _SHARED_COMMANDS:
                run(load_config(kind, parsed.config, settings), Console(quiet=not ranks.leads))

    again = f"the same command {'goes on' if parsed.command in ('train', 'sft') else 'starts again'}"
    return run_command(work, again=again, show_traceback=parsed.traceback)


if __name__ == "__main__":
    sys.exit(main())
