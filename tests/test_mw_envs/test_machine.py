"""What of the machine a process may use, as the kernel's files tell it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mw_envs import machine
from sb3_vla.data import collecting
from sb3_vla.envs import shared_memory as vec_env
from sb3_vla.evaluation import trial_envs

GIB = 2**30
MEMINFO = {"/proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB\n"}
V2 = {"/proc/self/cgroup": "0::/job/step\n"}
V1 = {"/proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n"}


def stat(active: int, inactive: int, prefix: str = "") -> str:
    # Files in memory that are shared count as anonymous: nothing gives them up.
    return f"anon 5\nfile {99 * GIB}\n{prefix}active_file {active}\n{prefix}inactive_file {inactive}\n"


@pytest.mark.parametrize(
    ("files", "free", "total"),
    [
        ({}, 32 * GIB, 64 * GIB),
        (V2 | {"/sys/fs/cgroup/job/step/memory.max": "max\n"}, 32 * GIB, 64 * GIB),
        (
            V2 | {"/sys/fs/cgroup/memory.max": f"{8 * GIB}", "/sys/fs/cgroup/memory.current": f"{6 * GIB}"},
            2 * GIB,
            8 * GIB,
        ),
        (
            V2
            | {"/sys/fs/cgroup/job/memory.max": f"{8 * GIB}", "/sys/fs/cgroup/job/memory.current": f"{7 * GIB}"}
            | {"/sys/fs/cgroup/job/memory.stat": stat(2 * GIB, 3 * GIB)},
            6 * GIB,
            8 * GIB,
        ),
        (
            V2
            | {"/sys/fs/cgroup/job/memory.max": f"{8 * GIB}", "/sys/fs/cgroup/job/memory.current": f"{7 * GIB}"}
            | {"/sys/fs/cgroup/job/step/memory.max": f"{9 * GIB}", "/sys/fs/cgroup/job/step/memory.current": "0"},
            1 * GIB,
            8 * GIB,
        ),
        (
            V1
            | {"/sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{4 * GIB}\n"}
            | {"/sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{3 * GIB}\n"}
            | {"/sys/fs/cgroup/memory/job/memory.stat": stat(GIB, GIB, "total_")},
            3 * GIB,
            4 * GIB,
        ),
        (
            V1
            | {"/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}
            | {"/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n"},
            32 * GIB,
            64 * GIB,
        ),
    ],
    ids=["no group", "no limit", "the root's limit", "page cache", "the least of all", "version 1", "version 1, none"],
)
def test_memory(files: dict[str, str], free: int, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: (MEMINFO | files).get(path, ""))
    assert machine.memory() == (free, total)
    assert machine.available_memory() == free


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        (V2 | {"/sys/fs/cgroup/job/step/cpu.max": "max 100000\n"}, 6),
        (V2 | {"/sys/fs/cgroup/job/cpu.max": "250000 100000\n"}, 3),
        (V2 | {"/sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (V2 | {"/sys/fs/cgroup/cpu.max": "900000 100000\n"}, 6),
        (
            V1
            | {"/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000\n"}
            | {"/sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        (
            V1
            | {"/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1\n"}
            | {"/sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n"},
            6,
        ),
    ],
    ids=["affinity", "no quota", "two and a half", "a half", "more than there are", "version 1", "version 1, none"],
)
def test_cores(files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2, 8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.usable_cores() == cores
    assert vec_env.available_cores() == cores
    monkeypatch.setattr(vec_env, "ranks_on_this_machine", lambda: 2)
    assert vec_env.available_cores() == max(1, cores // 2)


def test_this_machine() -> None:
    free, total = machine.memory()
    assert 2**20 < free <= total < 2**50
    assert 1 <= machine.usable_cores() <= len(os.sched_getaffinity(0))


def test_collecting_takes_the_cores_that_it_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start(count: int, *_: Any) -> Any:
        raise Started(count)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "_read", lambda _: "")
    monkeypatch.setattr(collecting, "_Workers", start)
    with pytest.raises(Started, match=r"^3$"):
        collecting.collect(tmp_path / "set", tasks=["reach-v3"], episodes_per_task=100)
    assert trial_envs.env_count(None, None) == 8 * 3
