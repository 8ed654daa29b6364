"""The tables of tasks and suites against MetaWorld's own, and the traps among the orders and sentences."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from metaworld import env_dict, policies

from mw_envs import (
    DIFFICULTIES,
    SUITES,
    TASKS,
    decode_instruction,
    encode_instruction,
    fit_instruction,
    get_task,
    suite_tasks,
)
from mw_envs.tasks import INSTRUCTION_BYTES, did_you_mean, select_tasks


def test_fifty_tasks_with_unique_ids() -> None:
    assert len(TASKS) == 50
    assert sorted(task.task_id for task in TASKS.values()) == list(range(50))
    assert all(name == task.name for name, task in TASKS.items())
    assert set(TASKS) == set(env_dict.ALL_V3_ENVIRONMENTS)


def test_two_tasks_share_a_sentence() -> None:
    sentences = Counter(task.instruction for task in TASKS.values())
    assert len(sentences) == 49
    shared = {name for name, task in TASKS.items() if sentences[task.instruction] > 1}
    assert shared == {"push-v3", "push-back-v3"}
    assert TASKS["push-v3"].instruction == "Push the puck to a goal"


def test_the_suite_order_is_not_the_id_order() -> None:
    suite = suite_tasks("MT50")
    by_id = sorted(TASKS, key=lambda name: TASKS[name].task_id)
    assert set(suite) == set(by_id)
    assert sum(a != b for a, b in zip(suite, by_id, strict=True)) == 21


def test_difficulty_groups() -> None:
    counts = Counter(task.difficulty for task in TASKS.values())
    assert [counts[difficulty] for difficulty in DIFFICULTIES] == [28, 11, 6, 5]
    assert sum(counts.values()) == 50
    assert TASKS["reach-v3"].difficulty == "easy"
    assert TASKS["peg-insert-side-v3"].difficulty == "medium"
    assert TASKS["pick-place-v3"].difficulty == "hard"
    assert TASKS["disassemble-v3"].difficulty == "very_hard"


def test_every_expert_is_a_policy_of_metaworld() -> None:
    for task in TASKS.values():
        assert issubclass(getattr(policies, task.expert), policies.policy.Policy)
    assert len({task.expert for task in TASKS.values()}) == 50


@pytest.mark.parametrize(
    ("suite", "split", "reference"),
    [
        ("MT10", "train", env_dict.MT10_V3),
        ("MT50", "train", env_dict.MT50_V3),
        ("ML10", "train", env_dict.ML10_V3["train"]),
        ("ML10", "test", env_dict.ML10_V3["test"]),
        ("ML45", "train", env_dict.ML45_V3["train"]),
        ("ML45", "test", env_dict.ML45_V3["test"]),
    ],
)
def test_suites_hold_metaworlds_tasks(suite: str, split: str, reference: dict[str, object]) -> None:
    names = suite_tasks(suite, split)
    assert len(names) == len(reference)
    assert set(names) == set(reference)


def test_orders_of_the_small_suites() -> None:
    assert suite_tasks("MT10") == (
        "reach-v3",
        "push-v3",
        "pick-place-v3",
        "door-open-v3",
        "drawer-open-v3",
        "drawer-close-v3",
        "button-press-topdown-v3",
        "peg-insert-side-v3",
        "window-open-v3",
        "window-close-v3",
    )
    assert suite_tasks("ML45", "test") == (
        "bin-picking-v3",
        "box-close-v3",
        "hand-insert-v3",
        "door-lock-v3",
        "door-unlock-v3",
    )


@pytest.mark.parametrize(("suite", "sizes"), [("ML10", (10, 5)), ("ML45", (45, 5))])
def test_held_out_tasks_are_never_trained_on(suite: str, sizes: tuple[int, int]) -> None:
    train, test = set(suite_tasks(suite)), set(suite_tasks(suite, "test"))
    assert (len(train), len(test)) == sizes
    assert not train & test


def test_suites_name_known_tasks_once() -> None:
    for splits in SUITES.values():
        for names in splits.values():
            assert len(set(names)) == len(names)
            assert set(names) <= set(TASKS)


@pytest.mark.parametrize(
    "instruction", [*sorted({task.instruction for task in TASKS.values()}), "Öffne die Tür", "x" * 64]
)
def test_instructions_come_back_from_their_bytes(instruction: str) -> None:
    encoded = encode_instruction(instruction)
    assert encoded.dtype == np.uint8
    assert encoded.shape == (INSTRUCTION_BYTES,) == (64,)
    raw = instruction.encode()
    assert bytes(encoded[: len(raw)]) == raw
    assert not encoded[len(raw) :].any()
    assert decode_instruction(encoded) == instruction


@pytest.mark.parametrize(("instruction", "size"), [("", 0), ("x" * 65, 65), ("ü" * 33, 66), ("open\0door", 9)])
def test_instructions_that_do_not_fit_are_refused(instruction: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"1 to 64 bytes .* got {size} bytes"):
        encode_instruction(instruction)


def test_instructions_of_another_length() -> None:
    sentence = "引き出しを開けてから、青いブロックを中に入れてください"  # 27 letters, 81 bytes
    with pytest.raises(ValueError, match=r"1 to 64 bytes .* got 81 bytes: '引き出し.* instruction_bytes=81"):
        encode_instruction(sentence)
    with pytest.raises(ValueError, match="The instruction of task 7 of my-data must be 1 to 80 bytes"):
        encode_instruction(sentence, 80, "task 7 of my-data")
    for length in (81, 128):
        encoded = encode_instruction(sentence, length)
        assert (encoded.shape, encoded.dtype) == ((length,), np.uint8)
        assert decode_instruction(encoded) == sentence
    np.testing.assert_array_equal(
        fit_instruction(encode_instruction(sentence, 128), 81), encode_instruction(sentence, 81)
    )
    both = np.stack([encode_instruction("Push"), encode_instruction("Open")])
    np.testing.assert_array_equal(fit_instruction(both, 70)[1], encode_instruction("Open", 70))
    assert fit_instruction(both, 64).shape == (2, 64) and fit_instruction(both, 4).tobytes() == b"PushOpen"
    with pytest.raises(ValueError, match="The instruction 'Push' is longer than the 3 bytes"):
        fit_instruction(both, 3)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'drawer-opne-v3'; did you mean 'drawer-open-v3'\?"):
        get_task("drawer-opne-v3")
    with pytest.raises(ValueError, match=r"suite 'MT5'; did you mean 'MT50'\?"):
        suite_tasks("MT5")
    with pytest.raises(ValueError, match="MT10 has no split 'test'; expected one of train"):
        suite_tasks("MT10", "test")
    assert did_you_mean("zzz", ("egl", "osmesa")) == "known: egl, osmesa"


def test_selecting_tasks_of_a_suite() -> None:
    assert select_tasks("MT10") == suite_tasks("MT10")
    # The caller's order, not the suite's: it decides which task an index means.
    assert select_tasks("MT10", tasks=["push-v3", "reach-v3"]) == ("push-v3", "reach-v3")
    assert select_tasks("MT1", tasks=["push-v3"]) == ("push-v3",)
    for suite in ("MT1", "MT10"):
        with pytest.raises(ValueError, match=f"Suite {suite} has no split 'test'"):
            select_tasks(suite, "test", ["push-v3"])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("reach-v3", r"got the string 'reach-v3'; write tasks=\['reach-v3'\]"),
        ([], "tasks is empty"),
        (["reach-v2"], "did you mean 'reach-v3'"),
        (["hammer-v3"], "'hammer-v3' is not in the train split of MT10"),
        (["reach-v3", "reach-v3"], "names a task twice"),
    ],
)
def test_selections_that_make_no_sense_are_refused(tasks: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_tasks("MT10", tasks=tasks)
