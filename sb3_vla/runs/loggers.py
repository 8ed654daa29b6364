"""Where metrics go, beside the run's own ``metrics.jsonl``: TensorBoard, CSV, JSON, Weights & Biases, SwanLab.

The trackers' own Stable-Baselines3 callbacks tell them the settings, and all of them get what the algorithm's logger
gets, with the decision as the step.
"""

from __future__ import annotations

import importlib
import secrets
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat, JSONOutputFormat, KVWriter, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from mw_envs.tasks import did_you_mean
from sb3_vla.common.config import ConfigError
from sb3_vla.runs.directory import RunDirectory

BACKENDS = ("tensorboard", "csv", "json", "wandb", "swanlab")
_TRACKERS = ("wandb", "swanlab")


@dataclass
class LoggerOptions:
    """Which loggers, and how trackers name a run.

    :param backends: of :data:`BACKENDS`.
    :param project: of trackers.
    :param experiment: a run's name at trackers; None for that of its directory.
    :param mode: ``online``, or ``offline`` to keep what trackers would send in the run directory.
    """

    backends: list[str] = field(default_factory=lambda: ["tensorboard"])
    project: str = "sb3-vla"
    experiment: str | None = None
    mode: Literal["online", "offline"] = "online"

    def __post_init__(self) -> None:
        for name in self.backends:
            if name not in BACKENDS:
                raise ConfigError(f"Unknown logger {name!r}; {did_you_mean(name, BACKENDS)}")
            if name in _TRACKERS:
                try:
                    importlib.import_module(name)
                except ImportError as error:
                    raise ConfigError(
                        f"The logger {name!r} needs its package: pip install 'sb3-vla[{name}]' ({error})"
                    ) from error


class Loggers(ExitStack):
    """The loggers of one stage of a run; leaving the context ends what trackers hold open.

    :ivar writers: for ``stable_baselines3.common.logger.Logger``.
    :ivar callbacks: for ``learn``.

    :param first_step: of what is written from now on; what TensorBoard has of later steps, from before an interrupt, it
        hides.
    """

    def __init__(self, options: LoggerOptions, run: RunDirectory, stage: str, first_step: int) -> None:
        super().__init__()
        self.writers: list[KVWriter] = []
        self.callbacks: list[BaseCallback] = []
        for name in options.backends:
            getattr(self, f"_{name}")(options, run, stage, first_step)

    def _tensorboard(self, options: LoggerOptions, run: RunDirectory, stage: str, first_step: int) -> None:
        self.writers.append(_TensorBoard(str(run.path / "tensorboard" / stage), first_step))

    def _csv(self, options: LoggerOptions, run: RunDirectory, stage: str, first_step: int) -> None:
        path = _numbered(run, f"metrics_{stage}", "csv")
        self.writers.append(CSVOutputFormat(path))

    def _json(self, options: LoggerOptions, run: RunDirectory, stage: str, first_step: int) -> None:
        path = _numbered(run, f"metrics_{stage}", "json")
        self.writers.append(JSONOutputFormat(path))

    def _wandb(self, options: LoggerOptions, run: RunDirectory, stage: str, first_step: int) -> None:
        import wandb
        from wandb.integration.sb3 import WandbCallback

        tracked = wandb.init(
            project=options.project,
            name=options.experiment or run.path.name,
            job_type=stage,
            dir=run.path,
            mode=options.mode,
            id=_identifier(run, "wandb"),
            resume="allow",
        )
        self.callback(tracked.finish)
        self.callbacks.append(WandbCallback())
        self.writers.append(_Wandb(tracked))

    def _swanlab(self, options: LoggerOptions, run: RunDirectory, stage: str, first_step: int) -> None:
        import swanlab

        swanlab.init(
            project=options.project,
            experiment_name=options.experiment or run.path.name,
            log_dir=str(run.path / "swanlab"),
            mode=options.mode,
        )
        self.callback(swanlab.finish)
        self.callbacks.append(_swanlab_callback())


class _TensorBoard(TensorBoardOutputFormat):
    """Values for TensorBoard, which hides what was written from ``first_step`` on before an interrupt."""

    def __init__(self, folder: str, first_step: int) -> None:
        super().__init__(folder)
        self.writer.close()
        self.writer = SummaryWriter(folder, purge_step=first_step)


class _Wandb(KVWriter):
    """Numbers for Weights & Biases."""

    def __init__(self, tracked: Any) -> None:
        self.tracked = tracked

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.tracked.log({key: value for key, value in key_values.items() if isinstance(value, (int, float))}, step)

    def close(self) -> None: ...


def _swanlab_callback() -> BaseCallback:
    from swanlab.integration.sb3 import SwanLabCallback

    class KeepsValues(SwanLabCallback):
        """SwanLab's callback puts a new logger into the algorithm, which would not have what waits to be written."""

        def _on_training_start(self) -> None:
            before = self.model.logger
            super()._on_training_start()
            for name, value in before.name_to_value.items():
                self.model.logger.record(name, value, exclude=before.name_to_excluded[name])

    return KeepsValues()


def _numbered(run: RunDirectory, stem: str, suffix: str) -> str:
    """A new file for each start: these formats begin with an empty one."""
    number = 0
    while (path := run.path / f"{stem}{f'_{number}' if number else ''}.{suffix}").exists():
        number += 1
    run.path.mkdir(parents=True, exist_ok=True)
    return str(path)


def _identifier(run: RunDirectory, tracker: str) -> str:
    """The same for each start of a run, so that a tracker takes them for one."""
    name = f"{tracker}_id.json"
    if not (run.path / name).is_file():
        run.write_json(name, secrets.token_hex(4))
    return run.read_json(name)
