"""The doctor: its verdict, and that nothing on a machine keeps it from giving one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mw_envs import machine
from sb3_vla.cli import doctor
from sb3_vla.cli.doctor import GIB, Finding, examine
from sb3_vla.cli.main import main

ANSWERS: dict[str, dict[str, Any]] = {
    "package": {
        "compact": {"parameters": 2_000_000, "bytes": 8_000_000},
        "huge": {"parameters": 10**12, "bytes": 4 * 10**12},
    },
    "recipes": {
        "small": {"device": 1e9, "buffer": 1e6, "headroom": 0.1, "begins": True},
        "tight": {"device": 7.5e9, "buffer": 1e6, "headroom": 0.1, "begins": False},
        "large": {"device": 1e10, "buffer": 1e6, "headroom": 0.1, "begins": False},
        "long": {"device": 1e9, "buffer": 1e15, "headroom": 0.1, "begins": False},
        "strange": {"error": "ValueError: no such layer"},
    },
    "environment": {"first_seconds": 2.5, "compiled_now": False, "folder": "/opt/kept", "steps_per_second": 900.0},
    "egl": {"error": "no library"},
    "osmesa": {},
    "videos": {"version": "18"},
    "torch": {"version": "2", "reason": "", "devices": [{"name": "X100", "free": 8e9, "total": 9e9, "bf16": True}]},
}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the probes answer, in the place of processes; a test may change it."""
    chosen = dict(ANSWERS)
    monkeypatch.setattr(doctor, "_probe", chosen.__getitem__)
    return chosen


def diagnosis(capsys: pytest.CaptureFixture[str]) -> tuple[bool, dict[str, dict[str, str]]]:
    told = json.loads(capsys.readouterr().out)
    return told["quickstart"], {finding["name"]: finding for finding in told["findings"]}


def test_a_machine_that_can_run_the_quickstart(answers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    ready, findings = diagnosis(capsys)
    assert ready and "missing" not in {finding["state"] for finding in findings.values()}
    assert "3.1" in findings["Python"]["value"] and "<3.14" in findings["Python"]["value"]
    assert findings["OpenGL by egl"]["state"] == "note" and findings["OpenGL by osmesa"]["state"] == "ok"
    assert findings["X100"]["value"] == "7.5 GiB free of 8.4, bfloat16"
    assert findings["compact"]["value"] == "2.0 M parameters, 0.0 GiB; 7.5 free of the GPU"
    assert findings["huge"]["state"] == "note" and "3725.3 GiB (does not fit)" in findings["huge"]["value"]
    # The learner must fit on the GPU of 8e9 bytes, of which a tenth is left to others, the rollout into the memory.
    names = ("small", "tight", "large", "long", "strange")
    assert [findings[name]["state"] for name in names] == ["ok", *["note"] * 4]
    assert "no such layer" in findings["strange"]["value"]
    assert findings["small"]["value"] == "fits: learner 0.9 GiB, rollout 0.0 GiB"
    assert findings["large"]["value"].endswith("from a checkpoint") and "compact" in findings["large"]["remedy"]
    assert main(["doctor"]) == 0
    assert "The quickstart can run here" in capsys.readouterr().out


@pytest.mark.parametrize(("probe", "name"), [("package", "import sb3_vla"), ("environment", "software renderer")])
def test_what_the_quickstart_cannot_do_without(
    probe: str, name: str, answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers[probe] = {"error": "ImportError: libx.so.1"}
    assert main(["doctor", "--json"]) == 1
    ready, findings = diagnosis(capsys)
    assert not ready and [key for key, finding in findings.items() if finding["state"] == "missing"] == [name]
    assert findings[name]["value"] == "ImportError: libx.so.1" and findings[name]["remedy"]
    assert main(["doctor"]) == 1
    assert f"The quickstart cannot run here. It needs: {name}." in capsys.readouterr().out


@pytest.mark.parametrize("folder", [None, str(Path(tempfile.gettempdir()) / "mw_envs-compiled-0")])
def test_where_the_compiled_renderer_is_kept(
    folder: str | None, answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json"]) == 0
    found = diagnosis(capsys)[1]["compiled renderer"]
    assert (found["state"], found["value"]) == ("ok", "kept in /opt/kept")
    answers["environment"] = {**answers["environment"], "folder": folder}
    assert main(["doctor", "--json"]) == 0
    found = diagnosis(capsys)[1]["compiled renderer"]
    assert found["state"] == "note" and "NUMBA_CACHE_DIR" in found["remedy"]
    assert found["value"].startswith(f"kept in {folder}" if folder else "kept nowhere")


def test_only_what_an_installation_mends_is_installed_again(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers["environment"] = {"error": "RuntimeError: cannot cache function"}
    main(["doctor", "--json"])
    remedy = diagnosis(capsys)[1]["software renderer"]["remedy"]
    assert "install" not in remedy and "MetaWorldMT1-v0" in remedy


def test_without_a_home(answers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user is not known
    assert main(["doctor", "--json"]) == 0
    found = diagnosis(capsys)[1]
    assert found["compiled scenes"]["state"] == found["published models"]["state"] == "note"
    assert "XDG_CACHE_HOME" in found["compiled scenes"]["remedy"]


def test_scarce_memory_and_disk(
    answers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": f"{3 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{GIB}\n",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.memory() == (2 * GIB, 3 * GIB)
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.memory() == (8 * GIB, 16 * GIB)
    files["/proc/meminfo"] = "MemTotal: 2097152 kB\nMemAvailable: 1048576 kB\n"
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)  # type: ignore[attr-defined]
    assert main(["doctor", "--json"]) == 1
    _, findings = diagnosis(capsys)
    scarce = [name for name, finding in findings.items() if finding["state"] == "missing"]
    assert scarce == ["memory", "disk", "shared memory"]
    assert findings["memory"]["value"].startswith("1.0 GiB free of 2.0")
    # Enough for one worker process, 2.7 GiB, and not for one on each of 64 cores.
    files["/proc/meminfo"] = "MemTotal: 4194304 kB\nMemAvailable: 3145728 kB\n"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    main(["doctor", "--json"])
    _, findings = diagnosis(capsys)
    assert findings["memory"]["state"] == "note" and "taskset" in findings["memory"]["remedy"]


def test_a_check_that_fails_does_not_stop_the_others() -> None:
    def check_bad() -> Iterator[Finding]:
        yield Finding("A", "first", "ok", "")
        raise LookupError("no such file")

    def check_good() -> Iterator[Finding]:
        yield Finding("B", "second", "ok", "")

    found = list(examine([check_bad, check_good]))
    assert [finding.name for finding in found] == ["first", "bad", "second"]
    assert found[1].state == "note" and found[1].value == "LookupError: no such file"


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("return {'version': 1}", {"version": 1}),
        ("print('noise'); raise OSError('libcuda.so')", {"error": "OSError: libcuda.so"}),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", {"error": "it crashed with SIGSEGV"}),
        ("import os; os._exit(7)", {"error": "it ended with status 7: "}),
        ("time.sleep(60)", {"error": "no answer within 1 s"}),
    ],
)
def test_a_probe_may_fail_crash_or_hang(
    body: str, answer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(doctor.__file__).read_text()
    (tmp_path / "doctor.py").write_text(f"{source}\n\ndef probe():\n    {body}\n\nPROBES['x'] = probe\n")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    probe: Callable[..., dict[str, Any]] = doctor._probe.__wrapped__
    assert probe("x", timeout=1 if "sleep" in body else 120) == answer


@pytest.mark.parametrize("options", [[], ["-W", "ignore"]])
def test_it_answers_where_nothing_can_be_imported(options: list[str], tmp_path: Path) -> None:
    """torch, MuJoCo, NumPy and PyAV are broken; the package cannot be imported, with whatever options of Python."""
    for name in ("torch", "mujoco", "numpy", "av"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('lib{name}.so is missing')\n")
    root = str(Path(doctor.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    command = [sys.executable, *options, "-m", "sb3_vla"]
    done = subprocess.run([*command, "doctor", "--json"], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 1 and done.stderr == ""
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert "is missing" in findings["import sb3_vla"]["value"] and "libav.so is missing" in findings["videos"]["value"]
    assert {name for name, finding in findings.items() if finding["state"] == "missing"} == {
        "import sb3_vla",
        "software renderer",
        "videos",
    }


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--jsno"])
    assert "--jsno" in capsys.readouterr().err
