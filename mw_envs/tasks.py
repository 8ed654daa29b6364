"""The 50 MetaWorld tasks, the suites built from them, and the trials that fix an episode.

Three orders of the tasks are in circulation and must not be mixed up: ``task_id`` (alphabetical but for a few pairs;
the ``task_id`` column of the published demonstrations), the order of the MT50 suite (:func:`suite_tasks`), and the
``task_index`` of a dataset, which numbers *sentences*: ``push-v3`` and ``push-back-v3`` share one, so there are 49.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mw_envs.errors import InputError

DIFFICULTIES = ("easy", "medium", "hard", "very_hard")
GOALS_PER_TASK = 50
INSTRUCTION_BYTES = 64  # of an observation, where nothing else is said


@dataclass(frozen=True)
class Task:
    """One MetaWorld task.

    :param name: MetaWorld's name, e.g. ``"drawer-open-v3"``.
    :param task_id: 0..49, the number used by the published demonstrations' ``task_id`` column.
    :param instruction: the sentence given to the policy; not unique, see the module's text.
    :param difficulty: one of ``easy``, ``medium``, ``hard``, ``very_hard``.
    :param expert: class name of MetaWorld's scripted policy.
    """

    name: str
    task_id: int
    instruction: str
    difficulty: str
    expert: str


class Trial(NamedTuple):
    """What fixes an episode's initial state: the same trial gives bit-identical states everywhere.

    :param task: a name in :data:`TASKS`.
    :param seed: seed of the table of goals, 0 <= seed < 2**32.
    :param goal: row 0..49 of that table (MetaWorld's ``MT1(task, seed).train_tasks[goal]``).
    """

    task: str
    seed: int
    goal: int


def _read_tables() -> tuple[dict[str, Task], dict[str, dict[str, tuple[str, ...]]]]:
    tables = json.loads(files("mw_envs").joinpath("data/tasks.json").read_text(encoding="utf-8"))
    tasks = {row["name"]: Task(**row) for row in tables["tasks"]}
    suites = {
        suite: {split: tuple(names) for split, names in splits.items()} for suite, splits in tables["suites"].items()
    }
    return tasks, suites


TASKS, SUITES = _read_tables()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known one, or the list of all."""
    known = list(known)
    near = get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def get_task(name: str) -> Task:
    """Look a task up by name.

    :raises ValueError: for an unknown name; the message offers the nearest known one.
    """
    if name not in TASKS:
        raise InputError(f"Unknown MetaWorld task {name!r}; {did_you_mean(name, TASKS)}")
    return TASKS[name]


def suite_tasks(suite: str, split: str = "train") -> tuple[str, ...]:
    """Task names of a suite, in the suite's order.

    :param suite: ``MT10``, ``MT50``, ``ML10`` or ``ML45``.
    :param split: ``train``, or ``test`` for the held-out tasks of ML10 and ML45.
    :raises ValueError: for an unknown suite or a split that the suite does not have.
    """
    if suite not in SUITES:
        raise InputError(f"Unknown MetaWorld suite {suite!r}; {did_you_mean(suite, SUITES)} (a single task is MT1)")
    splits = SUITES[suite]
    if split not in splits:
        raise InputError(f"Suite {suite} has no split {split!r}; expected one of {', '.join(splits)}")
    return splits[split]


def select_tasks(suite: str, split: str = "train", tasks: Sequence[str] | None = None) -> tuple[str, ...]:
    """The suite's tasks, or the given subset of them; ``MT1`` is the one task that is given.

    :raises ValueError: if the subset is empty, repeats a task or names one that is not in the suite's split.
    """
    if suite == "MT1":
        if split != "train":
            raise InputError(f"Suite MT1 has no split {split!r}; expected train")
        if tasks is None or isinstance(tasks, str) or len(tasks) != 1:
            raise InputError(f"MT1 is a single task: pass tasks=['reach-v3'] or another one, got tasks={tasks!r}")
        return (get_task(tasks[0]).name,)
    available = suite_tasks(suite, split)
    if tasks is None:
        return available
    if isinstance(tasks, str):
        raise InputError(f"tasks must be a list of task names, got the string {tasks!r}; write tasks=[{tasks!r}]")
    if len(tasks) == 0:
        raise InputError("tasks is empty; name at least one task, or pass None for the whole suite")
    for name in tasks:
        get_task(name)
        if name not in available:
            raise InputError(f"Task {name!r} is not in the {split} split of {suite}; {did_you_mean(name, available)}")
    if len(set(tasks)) != len(tasks):
        raise InputError(f"tasks names a task twice: {list(tasks)}; use task_weights to draw one more often")
    return tuple(tasks)


def encode_instruction(
    instruction: str, length: int = INSTRUCTION_BYTES, owner: str = "an observation"
) -> npt.NDArray[np.uint8]:
    """UTF-8 bytes of an instruction, zero padded: uint8, shape (length,).

    :param length: what the environment's ``instruction_bytes`` says.
    :param owner: whose instruction it is, for the message.
    :raises ValueError: if the sentence is longer than that, is empty or holds a zero byte.
    """
    encoded = instruction.encode("utf-8")
    if not 0 < len(encoded) <= length or 0 in encoded:
        advice = (
            f"; make the environment with instruction_bytes={len(encoded)} or more" if len(encoded) > length else ""
        )
        raise InputError(
            f"The instruction of {owner} must be 1 to {length} bytes of UTF-8 without zeros; "
            f"got {len(encoded)} bytes: {instruction!r}{advice}"
        )
    padded = np.zeros(length, dtype=np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
    return padded


def decode_instruction(encoded: npt.NDArray[np.uint8]) -> str:
    """Inverse of :func:`encode_instruction`."""
    return bytes(np.asarray(encoded, dtype=np.uint8)).rstrip(b"\0").decode("utf-8")


def fit_instruction(encoded: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.uint8]:
    """Encoded instructions, (..., L), with as many zeros at their end as makes them (..., length).

    :raises ValueError: if one has more bytes than that; the message shows it.
    """
    missing = length - encoded.shape[-1]
    if missing < 0 and encoded[..., length:].any():
        longest = next(row for row in encoded.reshape(-1, encoded.shape[-1]) if row[length:].any())
        raise InputError(
            f"The instruction {decode_instruction(longest)!r} is longer than the {length} bytes that are read"
        )
    if missing <= 0:
        return encoded[..., :length]
    return np.concatenate([encoded, np.zeros((*encoded.shape[:-1], missing), encoded.dtype)], axis=-1)
