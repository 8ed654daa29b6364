"""The ranks that a command starts for the cores of its machine: as torchrun's, and gone when the command is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sb3_vla import local_ranks
from sb3_vla.plan import make_plan
from sb3_vla.recipes import load_recipe

SCRIPT = Path(__file__).with_name("toy_ranks.py")
# Of recipes on four cores. GRPO's 16 environments play two groups of eight at a time, each on one rank; pi0 fits once.
COUNTS = {"ppo_compact": 4, "sft_compact": 4, "grpo_compact": 2, "ppo_openpi": 1}


def start(count: int, folder: Path, what: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(count), str(folder), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    process = start(3, tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    threads = max(1, local_ranks.usable_cores() // 3)
    assert output.strip() == str([(rank, 3, threads) for rank in range(3)])  # said by the first alone
    assert not any(is_alive(int((tmp_path / f"rank-{rank}").read_text())) for rank in range(3))


def test_one_rank_is_the_process_alone(tmp_path: Path) -> None:
    output, _ = start(1, tmp_path).communicate(timeout=60)
    assert output.startswith("[(0, 1, ")


def test_the_error_of_another_rank_is_told(tmp_path: Path) -> None:
    process = start(2, tmp_path, "fails")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    told = " ".join(errors.split())
    assert "Rank 1 ended with status 2: error: rank 1 is out of luck" in told
    assert "Traceback" not in told


def test_the_others_end_with_the_first_however_it_ends(tmp_path: Path) -> None:
    process = start(2, tmp_path, "waits")
    deadline = time.monotonic() + 60
    while not (tmp_path / "rank-1").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    other = int((tmp_path / "rank-1").read_text())
    assert is_alive(other)
    process.kill()
    process.communicate(timeout=20)
    assert gone(other)


@pytest.mark.parametrize(
    ("cores", "shared", "most", "expected"),
    [
        (2, (16,), None, 2),
        (8, (16,), None, 8),
        (6, (16,), None, 4),
        (6, (16, 6), None, 2),
        (3, (), None, 3),
        (8, (16,), 1, 1),
    ],
)
def test_as_many_as_cores_and_shares_allow(
    cores: int, shared: tuple[int, ...], most: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "usable_cores", lambda: cores)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv(local_ranks.VARIABLE, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if most is not None:
        monkeypatch.setenv(local_ranks.VARIABLE, str(most))
    assert local_ranks.local_rank_count(*shared) == expected


def test_torchrun_has_the_say_and_so_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ranks, "usable_cores", lambda: 8)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert local_ranks.local_rank_count(16) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert local_ranks.local_rank_count(16) == 1


def test_recipes_of_the_small_model_take_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ranks, "usable_cores", lambda: 4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    counts = {name: make_plan(load_recipe(f"metaworld_50_{name}")).local_ranks for name in COUNTS}
    assert counts == COUNTS
