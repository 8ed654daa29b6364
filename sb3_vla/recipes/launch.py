"""A recipe from beginning to end: demonstrations and imitation where it starts from nothing, training, evaluation.

Under ``torchrun`` ranks share imitation, training and evaluation, and rank 0 does the rest.
Each stage is done once: the same command, started again, goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from sb3_vla.checkpoints import load_checkpoint
from sb3_vla.checkpoints.identity import (
    checkpoint_identity,
    data_identity,
    dataset_folder,
    deciding_options,
    without,
)
from sb3_vla.checkpoints.training_state import check_training_state
from sb3_vla.common.config import ConfigError, deciding_settings
from sb3_vla.common.errors import InputError
from sb3_vla.common.precision import acting_precision
from sb3_vla.data.collecting import collect
from sb3_vla.data.demonstrations import Demonstrations
from sb3_vla.evaluation.callback import PeriodicEvaluation
from sb3_vla.evaluation.evaluation import EvaluationResult, VideoOptions, compare, evaluate
from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.views import FULL_VIEW
from sb3_vla.ray.launch import train_on_cluster
from sb3_vla.recipes.resolve import Plan
from sb3_vla.recipes.schema import Recipe
from sb3_vla.recording.episodes import TrainingFilms
from sb3_vla.runs.report.charts import before_after_bars, learning_curve
from sb3_vla.runs.report.report import write_report
from sb3_vla.runs.shared import SharedRun
from sb3_vla.runs.training import train
from sb3_vla.sft.imitation import sft

Places = dict[str, str | None]
Films = TypeVar("Films", VideoOptions | None, TrainingFilms | None)


def launch(recipe: Recipe, plan: Plan, console: Console) -> Path:
    """Run the stages that are not done yet.

    :param recipe: kept as the run's configuration.
    :param plan: what it means, by :func:`sb3_vla.recipes.resolve.make_plan`.
    :return: the run's directory.
    """
    _check_start(plan)
    with SharedRun(plan.run, recipe) as run:
        started = time.monotonic()
        _run_stages(run, plan, console)
        if run.ranks.leads:
            _tell(run, plan, console)
        console.print(f"{(time.monotonic() - started) / 60:.1f} minutes for this start", highlight=False)
    return run.path


def _run_stages(run: SharedRun, plan: Plan, console: Console) -> None:
    places = run.ranks.first_does(lambda: _places(plan))  # all files are read for it, so once, and by one rank
    stages: list[str] = []
    if plan.collect is not None:
        stages.append(_demonstrate(run, plan, console))
    if plan.sft is not None:
        stages.append(_imitate(run, plan, places, stages, console))
    start = str(run.path / "sft") if plan.sft is not None else str(plan.checkpoint)
    options = {} if plan.sft is not None else plan.model_kwargs
    trained = plan.training is not None
    if plan.evaluate is not None:
        _measure(run, plan, places, "before" if trained else "after", start, options, stages, console)
    if plan.training is not None:
        after = [_practise(run, plan, places, start, options, stages, console)]
        if plan.evaluate is not None:
            _measure(run, plan, places, "after", str(run.path / after[0]), {}, after, console)


def _check_start(plan: Plan) -> None:
    """Before a run begins, and hours are spent on a checkpoint or dataset that is not there, or of another model."""
    if plan.load is not None and plan.load["root"] is not None:
        dataset_folder(plan.load["root"])
    if plan.checkpoint is None:
        if not plan.begins:
            raise ConfigError(
                f"actor.model.model_path is not set: {plan.model} starts from a checkpoint. Give "
                "actor.model.model_path=FOLDER or =hf://owner/name on the Hugging Face hub, or the sizes of a small "
                "new model as actor.model.model_kwargs; the recipes with compact or laptop in their names need neither"
            )
        return
    start = load_checkpoint(plan.checkpoint, plan.model_kwargs, weights=False)
    found, predicted = start.model_name, start.model.action_horizon - start.model.first_action
    if plan.action_chunk > predicted and plan.sft is None:
        raise InputError(
            f"actor.model.num_action_chunks={plan.action_chunk}, but the model of {plan.checkpoint} predicts "
            f"{predicted} actions; give as many or fewer"
        )
    if found != plan.model:
        raise InputError(
            f"actor.model.model_path={plan.checkpoint} is a checkpoint of {found}, but actor.model.model_type="
            f"{plan.model}; give another checkpoint, or a recipe of {found}"
        )


def _demonstrate(run: SharedRun, plan: Plan, console: Console) -> str:
    inputs = {"collect": without(plan.collect, "num_workers", "renderer")}
    with run.stage("collect", inputs, outputs=["demonstrations"]) as stage:
        if not stage.done:
            console.rule("demonstrations by scripted experts")
            assert plan.collect is not None
            settings = {**plan.collect, "overwrite": True}
            report = run.ranks.first_does(lambda: collect(run.path / "demonstrations", **settings))
            console.print(str(report), highlight=False)
    return "collect"


def _demonstrations(run: SharedRun, plan: Plan) -> Demonstrations:
    assert plan.load is not None
    root = plan.load["root"] or run.path / "demonstrations"
    return Demonstrations.load(**{**plan.load, "root": root})


def _to_rehearse(run: SharedRun, plan: Plan, start: str, options: dict[str, Any]) -> Demonstrations:
    """As the model at the start reads them."""
    assert plan.load is not None
    found = load_checkpoint(start, options, weights=False)
    sentence = found.notes.get("view", {}).get("instruction_bytes", plan.load["instruction_bytes"])
    read = {"image_size": found.model.image_size[0], "hand_view": found.model.hand_view, "instruction_bytes": sentence}
    return _demonstrations(run, dataclasses.replace(plan, load={**plan.load, **read}))


def _imitate(run: SharedRun, plan: Plan, places: Places, after: list[str], console: Console) -> str:
    assert plan.sft is not None
    inputs = {
        "sft": deciding_settings(plan.sft),
        "load": without(plan.load, "root"),
        "options": deciding_options(plan.sft.model_kwargs),
        **places,
    }
    with run.stage("sft", inputs, after=after, outputs=["sft"]) as stage:
        if not stage.done:
            console.rule("imitation")
            result = sft(
                _demonstrations(run, plan),
                plan.sft,
                output=run.path / "sft",
                save_state=lambda step: run.checkpoint("sft", step),
                resume_from=run.latest_checkpoint("sft", check_training_state) if stage.resumed else None,
            )
            run.write_json("sft_history.json", result.history)
    return "sft"


def _practise(
    run: SharedRun,
    plan: Plan,
    places: Places,
    start: str,
    options: dict[str, Any],
    after: list[str],
    console: Console,
) -> str:
    assert plan.training is not None
    name = plan.training.name
    rehearses = plan.training.arguments["rehearsal_coef"] > 0
    inputs = {
        "training": plan.training.deciding(),
        "where": without(plan.where, "renderer"),
        "load": without(plan.load, "root") if rehearses else None,
        "options": deciding_options(options),
        **places,
    }
    length = plan.training.total_decisions
    with run.stage(name, inputs, length=length, after=after, outputs=[name]) as stage:
        if not stage.done:
            console.rule(name.upper())
            begin = train if plan.cluster is None else functools.partial(train_on_cluster, plan.cluster)
            begin(
                run,
                name,
                plan.training,
                checkpoint=start,
                output=run.path / name,
                demonstrations=_to_rehearse(run, plan, start, options) if rehearses else None,
                resume=stage.resumed,
                model_kwargs=options,
                loggers=plan.loggers,
                evaluation=_with_films(plan.periodic, _into(plan.videos, run, "during")),
                films=_into(plan.films, run, "train"),
                **plan.where,
            )
            gc.collect()  # callbacks and algorithm hold each other, and the next stage needs the memory of both
    return name


def _measure(
    run: SharedRun,
    plan: Plan,
    places: Places,
    name: str,
    checkpoint: str,
    options: dict[str, Any],
    after: list[str],
    console: Console,
) -> None:
    assert plan.evaluate is not None
    output, videos = f"evaluation_{name}.json", _into(plan.videos, run, name)
    view = {key: value for key, value in (plan.training.env if plan.training else {}).items() if key in FULL_VIEW}
    inputs = {
        "evaluate": without(plan.evaluate, "num_envs", "num_workers", "renderer"),
        "acting": plan.acting,
        "options": deciding_options(options),
        "checkpoint": places["checkpoint"],
        **view,
    }
    films = [] if plan.videos is None else [str(Path(plan.videos.directory) / name)]
    with run.stage(f"evaluate_{name}", inputs, after=after, outputs=[output, *films]) as stage:
        if not stage.done:
            console.rule(f"measurement {name}")
            if videos is not None:
                run.ranks.first_does(videos.prepare)
            how = {key: value for key, value in plan.evaluate.items() if key != "renderer"}
            device = "cuda" if torch.cuda.is_available() else "cpu"
            frozen_bf16 = bool(plan.acting["frozen_bf16"])
            policy = load_policy(
                checkpoint, plan.action_chunk, device, options or None, view=view, frozen_bf16=frozen_bf16
            )
            with acting_precision(plan.acting["bf16"], device):
                result = evaluate(policy, env_kwargs={"renderer": plan.evaluate["renderer"]}, videos=videos, **how)
            if run.ranks.leads:
                result.to_json(run.path / output)
            if name == "before" and not result.mean_over_tasks().value:
                console.print("No trial was solved, so there may be no success to learn from; sft.steps could be more")


def _into(options: Films, run: SharedRun, name: str) -> Films:
    """Films in a folder of their own."""
    if options is None:
        return options
    return dataclasses.replace(options, directory=run.path / options.directory / name)


def _with_films(evaluation: PeriodicEvaluation | None, videos: VideoOptions | None) -> PeriodicEvaluation | None:
    return None if evaluation is None else dataclasses.replace(evaluation, videos=videos)


def _places(plan: Plan) -> Places:
    """What lies where a recipe's paths point to; of demonstrations that the run collects itself that stage tells."""
    return {
        "checkpoint": checkpoint_identity(plan.checkpoint),
        "data": None if plan.load is None else data_identity(plan.load["root"]),
    }


def _tell(run: SharedRun, plan: Plan, console: Console) -> None:
    """The table, the page, and where everything lies."""
    if plan.evaluate is not None:
        after = EvaluationResult.from_json(run.path / "evaluation_after.json")
        after.to_markdown(run.path / "evaluation_after.md")
        if plan.training is None:
            after.print_table(console)
        else:
            before = EvaluationResult.from_json(run.path / "evaluation_before.json")
            comparison = compare(before, after, names=("before", plan.training.name.upper()))
            comparison.to_json(run.path / "comparison.json")
            comparison.to_markdown(run.path / "comparison.md")
            comparison.print_table(console)
            gain = comparison.mean_over_tasks().difference
            console.print(
                f"mean over tasks, same trials, paired: {100 * gain.value:+.1f} points, "
                f"95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}",
                highlight=False,
            )
            before_after_bars(comparison, run.path / "before_after.png")
    if plan.training is not None:
        rows = [row for row in run.metrics() if row.get("stage") == plan.training.name]
        if any("env/success_once" in row for row in rows):
            learning_curve(
                rows, run.path / "learning_curve.png", title=f"{plan.training.name.upper()} while practicing"
            )
    page = write_report(run.path)
    checkpoint = run.path / ("sft" if plan.training is None else plan.training.name)
    for what, where in {
        "report": page,
        "tables": run.path / "comparison.md",
        "learning curve": run.path / "learning_curve.png",
        "before and after": run.path / "before_after.png",
        "videos": run.path / "videos",
        "TensorBoard": run.path / "tensorboard",
        "checkpoint": checkpoint,
    }.items():
        if where.exists():
            console.print(f"{what:>16}  {where}", highlight=False, soft_wrap=True)
