"""The ranks that a command starts for the cores of its machine: as torchrun's, and gone when the command is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from conftest import descendants

from sb3_vla.distributed import local_ranks
from sb3_vla.recipes.resolve import make_plan
from sb3_vla.recipes.schema import load_recipe

SCRIPT = Path(__file__).parents[2] / "toy_ranks.py"
# Of recipes on four cores. GRPO's 16 environments play two groups of eight at a time, each on one rank; pi0 fits once.
COUNTS = {"ppo_compact": 4, "sft_compact": 4, "grpo_compact": 2, "ppo_openpi": 1}


def start(
    count: int, folder: Path, what: str = "", start_new_session: bool = False, **variables: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(count), str(folder), what],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )


def wait_for(file: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def gone(process: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(process)


def test_the_first_starts_the_others_and_waits_for_them(tmp_path: Path) -> None:
    process = start(2, tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    threads = max(1, local_ranks.usable_cores() // 2)
    assert output.strip() == str([(rank, 2, threads) for rank in range(2)])  # said by the first alone
    assert not any(is_alive(int((tmp_path / f"rank-{rank}").read_text())) for rank in range(2))


def test_one_rank_is_the_process_alone() -> None:
    before = set(descendants())
    with local_ranks.local_ranks(1) as ranks:
        assert ranks.gather((ranks.rank, ranks.count)) == [(0, 1)]
        assert set(descendants()) == before


def test_the_error_of_another_rank_is_told_once(tmp_path: Path) -> None:
    process = start(3, tmp_path, "fails")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.split("\n") == ["error: Rank 1 of this machine: rank 1 is out of luck, in two lines:", "this one", ""]
    assert output == ""


@pytest.mark.parametrize(
    ("how", "told"),
    [("dies", "status 9"), pytest.param("is killed", "status -9; -9 mostly means that memory", marks=pytest.mark.slow)],
)
def test_a_rank_that_ends_before_it_joins_is_told(how: str, told: str, tmp_path: Path) -> None:
    process = start(2, tmp_path, how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"Rank 1 of this machine ended with {told}" in errors and "SB3_VLA_RANKS=1 starts none" in errors


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_in_the_first_seconds_ends_all(sent: signal.Signals, status: int, tmp_path: Path) -> None:
    process = start(2, tmp_path, "comes late", start_new_session=True)
    wait_for(tmp_path / "begun-1")
    os.killpg(process.pid, sent)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == status, errors
    assert "interrupted" in output and "Traceback" not in errors
    assert gone(int((tmp_path / "begun-1").read_text()))


def test_a_reason_that_cannot_be_left_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(local_ranks._FOLDER, "/proc/1/no such folder")
    monkeypatch.setenv("RANK", "1")
    local_ranks.leave_reason("the disk is full")  # raises nothing


def test_a_rank_that_is_lost_while_the_first_works_alone_is_told(tmp_path: Path) -> None:
    process = start(2, tmp_path, "works alone", SECONDS="1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "error: Rank 1 of this machine ended with status 9" in errors


def test_the_others_end_with_the_first_however_it_ends(tmp_path: Path) -> None:
    process = start(2, tmp_path, "waits")
    wait_for(tmp_path / "rank-1")
    other = int((tmp_path / "rank-1").read_text())
    assert is_alive(other)
    process.kill()
    process.communicate(timeout=20)
    assert gone(other)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight cores, much memory, no GPU, and a command that can be started again."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv(local_ranks.VARIABLE, raising=False)
    monkeypatch.setattr(local_ranks, "usable_cores", lambda: 8)
    monkeypatch.setattr(local_ranks, "available_memory", lambda: 1e12)
    monkeypatch.setattr(local_ranks, "_command", lambda: ["python"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return monkeypatch


@pytest.mark.parametrize(
    ("cores", "shared", "at_most", "most", "expected"),
    [
        (2, [16], [], None, 2),
        (8, [16], [], None, 8),
        (64, [64], [], None, 8),
        (6, [16], [], None, 4),
        (6, [16, 6], [], None, 2),
        (3, [], [], None, 3),
        (8, [16], [], "1", 1),
        (64, [64], [], "16", 16),
        (8, [16], [128, 3], None, 2),
    ],
)
def test_as_many_as_cores_and_shares_allow(
    cores: int, shared: list[int], at_most: list[int], most: str | None, expected: int, machine: pytest.MonkeyPatch
) -> None:
    machine.setattr(local_ranks, "usable_cores", lambda: cores)
    if most is not None:
        machine.setenv(local_ranks.VARIABLE, most)
    assert local_ranks.local_rank_count(shared, at_most) == expected


def test_memory_bounds_them(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(local_ranks, "available_memory", lambda: 4e9)
    assert local_ranks.local_rank_count([16]) == 2
    machine.setattr(local_ranks, "available_memory", lambda: 1e8)
    assert local_ranks.local_rank_count([16]) == 1


@pytest.mark.parametrize("given", ["0", "-1", "", "two", "1.5"])
def test_a_number_of_ranks_that_is_none_is_told(given: str, machine: pytest.MonkeyPatch) -> None:
    machine.setenv(local_ranks.VARIABLE, given)
    with pytest.raises(ValueError, match=f"SB3_VLA_RANKS='{given}'; expected the number of processes"):
        local_ranks.local_rank_count([16])


def test_torchrun_has_the_say_and_so_has_a_gpu(machine: pytest.MonkeyPatch) -> None:
    assert local_ranks.local_rank_count([16]) == 8
    machine.setattr(local_ranks, "_command", lambda: None)  # as in a notebook
    assert local_ranks.local_rank_count([16]) == 1
    machine.setattr(local_ranks, "_command", lambda: ["python"])
    machine.setattr("torch.cuda.is_available", lambda: True)
    assert local_ranks.local_rank_count([16]) == 1
    machine.setattr("torch.cuda.is_available", lambda: False)
    machine.setenv("WORLD_SIZE", "2")
    assert local_ranks.local_rank_count([16]) == 1


@pytest.mark.parametrize(
    ("before", "file", "spec", "known"),
    [
        (["tell.py"], "tell.py", None, True),
        (["-X", "utf8", "tell.py"], "tell.py", None, True),
        (["-m", "tell"], "tell.py", "tell", True),
        (["-m", "tell"], "tell/__main__.py", "tell.__main__", True),
        (["-m", "pdb", "-c", "continue", "tell.py"], "tell.py", None, False),
        (["-c", "import tell; tell.main()"], None, None, False),
        (["-"], None, None, False),
        (["-m", "ipykernel_launcher", "-f", "connection.json"], "tell.py", None, False),
    ],
)
def test_what_starts_a_command_again_is_known_or_left_alone(
    before: list[str], file: str | None, spec: str | None, known: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tell.py").touch()
    main = ModuleType("__main__")
    if file is not None:
        main.__file__ = file
    main.__spec__ = None if spec is None else ModuleSpec(spec, None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "orig_argv", ["python", *before, "a=1"])
    monkeypatch.setattr(sys, "argv", [file or "-c", "a=1"])
    assert local_ranks._command() == ([sys.executable, *before, "a=1"] if known else None)


def test_recipes_of_the_small_model_take_all_cores(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(local_ranks, "usable_cores", lambda: 4)
    counts = {name: make_plan(load_recipe(f"metaworld_50_{name}")).local_ranks for name in COUNTS}
    assert counts == COUNTS
    few = load_recipe("metaworld_50_grpo_compact", ["env.train.total_num_envs=4"])
    assert make_plan(few).local_ranks == 1  # which play one group together
