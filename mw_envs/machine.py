"""Cores and memory that this process may use: of the machine, and of its control group, as in a container.

Imports nothing but the standard library, for the doctor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Files of a memory control group of version 2 and 1: the limit, what is used, and what of that are files in the page
# cache, which the kernel gives up before the limit is reached.
_MEMORY_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def usable_cores() -> int:
    """The CPU cores that this process may use, at least 1: its affinity, and the share of time of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups("cpu"):
        quota, period = (_read(f"{group}/cpu.max").split() or ["", ""])[:2]  # version 2
        if not quota:
            quota, period = _read(f"{group}/cpu.cfs_quota_us").strip(), _read(f"{group}/cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit():  # "max" or -1 where there is no limit
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def memory() -> tuple[int, int]:
    """Bytes of memory that this process may still take, and that there are in all."""
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    known = {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if len(words) > 1}
    total = known["MemTotal"] if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = known.get("MemAvailable", total)
    for group in _control_groups("memory"):
        for names in _MEMORY_FILES:
            limit, used = (_read(f"{group}/{name}").strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():  # "max" where there is no limit
                counts = dict(line.split() for line in _read(f"{group}/memory.stat").splitlines())
                reclaimable = sum(int(counts.get(name, 0)) for name in names[2])
                total, free = min(total, int(limit)), min(free, int(limit) - int(used) + reclaimable)
    return max(free, 0), total


def available_memory() -> int:
    """Bytes of memory that this process may still take."""
    return memory()[0]


def _control_groups(controller: str) -> Iterator[str]:
    """Folders of this process's control group and those above it, which limit it as well."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):  # none are named in version 2
            folder = "/sys/fs/cgroup" + (f"/{controller}" if controllers else "")
            for above in (PurePosixPath(path), *PurePosixPath(path).parents):
                yield f"{folder}{above}".rstrip("/")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
