"""The run directory: files appear whole or not at all, stages go on after an interrupt, errors say what to do."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sb3_vla.common.errors import DamagedError
from sb3_vla.runs import directory as run_module
from sb3_vla.runs.directory import RunDirectory, RunError, versions


@dataclass
class Config:
    seed: int = 0
    folder: Path = Path("data")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run", Config())


def names(folder: Path) -> list[str]:
    """What is in a folder, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (".lock", ".lock.json"))


def test_a_new_run_holds_configuration_and_versions(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(run.path) == ["config.yaml", "versions.json"]
    assert (run.path / "config.yaml").read_text() == "seed: 0\nfolder: data\n"
    recorded = run.read_json("versions.json")
    assert recorded["packages"]["numpy"] == np.__version__
    assert recorded["python"] == ".".join(map(str, sys.version_info[:3]))
    assert recorded["command"] == sys.argv
    monkeypatch.setenv("SOME_TOKEN", "do-not-record-me")
    assert "do-not-record-me" not in json.dumps(versions())


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "run.py"
    module.write_text("x = 1\n")
    monkeypatch.setattr(run_module, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert versions()["git"] is None  # no repository
    git("init", "-q")
    assert versions()["git"] is None  # a repository that does not track the module: an installed package
    git("add", "run.py")
    git("commit", "-q", "-m", "first")
    assert versions()["git"] == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    module.write_text("x = 2\n")
    assert versions()["git"]["dirty"] is True


def test_opening_without_configuration_writes_nothing(run: RunDirectory) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.path.iterdir()}
    RunDirectory(run.path)
    assert {path: path.stat().st_mtime_ns for path in run.path.iterdir()} == before
    with pytest.raises(RunError, match="there is no run directory"):
        RunDirectory(run.path / "nowhere")


def test_json_round_trip(run: RunDirectory) -> None:
    value = {"a": np.float32(0.5), "b": np.arange(3), "c": Path("x"), "d": Config(seed=2)}
    path = run.write_json("eval/sft.json", value)
    assert path == run.path / "eval" / "sft.json"
    assert run.read_json("eval/sft.json") == {"a": 0.5, "b": [0, 1, 2], "c": "x", "d": {"seed": 2, "folder": "data"}}
    with pytest.raises(RunError, match=r"There is no .*missing\.json"):
        run.read_json("missing.json")
    path.write_text('{"a": 0.')
    with pytest.raises(RunError, match=r"eval/sft\.json is damaged"):
        run.read_json("eval/sft.json")


def test_a_failed_write_keeps_the_old_file(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_json("report.json", {"success": 1})
    with pytest.raises(TypeError, match="does not go into JSON"):
        run.write_json("report.json", {"success": object()})

    def disk_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(RunError, match=r"cannot write .*report\.json: No space left on device; free some space"):
        run.write_json("report.json", {"success": 2})
    with pytest.raises(RunError, match="No space left"), run.checkpoint("sft", 1) as folder:
        (folder / "model").write_text("x")
    assert run.read_json("report.json") == {"success": 1}
    assert run.latest_checkpoint("sft") is None
    assert names(run.path) == ["checkpoints", "config.yaml", "report.json", "versions.json"]
    assert names(run.path / "checkpoints" / "sft") == []


def test_a_write_cut_short_by_the_system_keeps_the_old_file(run: RunDirectory) -> None:
    """The real thing: the kernel refuses to let the file grow, as it does on a full disk."""
    run.write_json("report.json", {"success": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*report\.json: File too large"):
            run.write_json("report.json", {"success": list(range(100_000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.read_json("report.json") == {"success": 1}
    assert names(run.path) == ["config.yaml", "report.json", "versions.json"]


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    writer = """if True:
        import itertools, sys
        from sb3_vla.runs.directory import RunDirectory
        run = RunDirectory(sys.argv[1], {})
        for step in itertools.count(1):
            run.write_json("state.json", {"step": step, "filling": [step] * 2000})
            run.append_metrics({"step": step, "filling": "x" * 2000})
            with run.checkpoint("sft", step) as folder:
                for name in "ab":
                    (folder / name).write_text(f"{step}" * 2000)
        """
    run_path = tmp_path / "run"
    root = Path(run_module.__file__).parents[2]
    for delay in (0.05, 0.093):  # two more or less random moments in the loop; the second continues the first's run
        process = subprocess.Popen([sys.executable, "-c", writer, str(run_path)], cwd=root)
        try:
            shutil.rmtree(run_path / "checkpoints", ignore_errors=True)
            deadline = time.monotonic() + 60
            while not list(run_path.glob("checkpoints/sft/step-*")):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        run = RunDirectory(run_path)
        state = run.read_json("state.json")
        assert state["filling"] == [state["step"]] * 2000
        assert all(len(row["filling"]) == 2000 for row in run.metrics())
        latest = run.latest_checkpoint("sft")
        assert latest is not None
        step = int(latest.name.removeprefix("step-"))
        assert step in (state["step"], state["step"] - 1)
        assert names(latest) == ["a", "b"]
        assert all((latest / name).read_text() == f"{step}" * 2000 for name in "ab")


def test_unusable_directories(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="is a file; choose another name"):
        RunDirectory(file, {})
    with pytest.raises(RunError, match=r"cannot write .*Not a directory"):
        RunDirectory(file / "run", {})


def test_a_directory_one_may_not_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:  # a mode of 0o500 would not stop root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match="Permission denied; choose a directory that you may write to"):
        RunDirectory(tmp_path / "run", {})


def test_metrics_survive_half_a_row(run: RunDirectory) -> None:
    assert run.metrics() == []
    run.append_metrics({"step": 1, "loss": np.float32(0.5)})
    run.append_metrics({"step": 2})
    path = run.path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert run.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2}]
    run.append_metrics({"step": 4})
    assert run.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2}, {"step": 4}]
    run.rewind_metrics(lambda row: row["step"] <= 2)
    assert [row["step"] for row in run.metrics()] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is damaged"):
        run.metrics()
    path.write_text('{"step"')  # not a single newline
    run.append_metrics({"step": 5})
    assert run.metrics() == [{"step": 5}]


def test_a_stage_is_done_once_per_inputs(run: RunDirectory) -> None:
    done: list[int] = []

    def sft(steps: int) -> None:
        with RunDirectory(run.path).stage("sft", {"steps": steps, "config": Config()}) as stage:
            if not stage.done:
                assert not stage.resumed
                done.append(steps)

    assert not run.done("sft")
    sft(10)
    sft(10)
    assert done == [10] and run.done("sft")
    sft(20)
    sft(20)
    sft(10)
    assert done == [10, 20, 10]


def test_an_interrupted_stage_is_resumed_and_a_changed_one_is_not(run: RunDirectory) -> None:
    with pytest.raises(KeyboardInterrupt), run.stage("ppo", {"seed": 0}) as stage:
        assert not stage.resumed
        with run.checkpoint("ppo", 400) as folder:
            (folder / "model").write_text("seed 0")
        raise KeyboardInterrupt
    assert not run.done("ppo")

    with run.stage("ppo", {"seed": 0}) as stage:
        assert stage.resumed and not stage.done
        assert run.latest_checkpoint("ppo") == run.path / "checkpoints" / "ppo" / "step-00000400"

    for number in (1, 2):
        told = pytest.warns(UserWarning, match=rf"its earlier checkpoints are in .*ppo\.replaced-{number}; stages/ppo")
        with told, run.stage("ppo", {"seed": number}) as stage:
            assert not stage.resumed and not stage.done
            assert run.latest_checkpoint("ppo") is None  # never goes on from another seed's weights
            aside = run.path / "checkpoints" / f"ppo.replaced-{number}" / "step-00000400" / "model"
            assert aside.read_text() == f"seed {number - 1}"
            with run.checkpoint("ppo", 400) as folder:
                (folder / "model").write_text(f"seed {number}")


def test_stages_depend_on_stages_and_outputs(run: RunDirectory) -> None:
    done: list[str] = []

    def pipeline(demonstrations: int) -> None:
        with run.stage("collect", {"demonstrations": demonstrations}, outputs=["data"]) as stage:
            if not stage.done:
                (run.path / "data").mkdir(exist_ok=True)
                done.append("collect")
        with run.stage("sft", {"steps": 5}, after=["collect"]) as stage:
            if not stage.done:
                done.append("sft")

    with (
        pytest.raises(RunError, match=r"stage 'sft' needs 'collect', which is not complete"),
        run.stage("sft", {}, after=["collect"]),
    ):
        pass
    pipeline(10)
    pipeline(10)
    assert done == ["collect", "sft"]
    pipeline(20)
    assert done == ["collect", "sft", "collect", "sft"]
    (run.path / "data").rmdir()
    pipeline(20)  # the same data come back, so what followed from them still holds
    assert done == ["collect", "sft", "collect", "sft", "collect"]
    with pytest.raises(RunError, match=r"ended without table\.md"), run.stage("report", {}, outputs=["table.md"]):
        pass
    assert not run.done("report")


def write_checkpoint(run: RunDirectory, stage: str, step: int, text: str = "whole") -> None:
    with run.checkpoint(stage, step, keep=None) as folder:
        (folder / "model").write_text(text)


def test_what_another_start_would_overwrite_is_moved_aside(run: RunDirectory) -> None:
    """Result, metrics, curves and checkpoints of a finished stage whose settings are others now."""

    def train(rate: float) -> None:
        with run.stage("ppo", {"config": {"rate": rate, "steps": 3}}, outputs=["ppo", "tables/ppo.md"]) as stage:
            assert not stage.done and not stage.resumed
            write_checkpoint(run, "ppo", 3)
            for path in ("ppo", "tables", "tensorboard/ppo"):
                (run.path / path).mkdir(parents=True, exist_ok=path == "tables")
            (run.path / "ppo" / "model").write_text(f"{rate}")
            (run.path / "tables" / "ppo.md").write_text(f"{rate}")
            (run.path / "tensorboard" / "ppo" / "events").write_text(f"{rate}")
            run.append_metrics({"stage": "ppo", "rate": rate})

    run.append_metrics({"stage": "sft"})
    train(0.1)
    told = (
        r"ppo has other settings than before in .* \(config\.rate=0\.2, not 0\.1\): it starts afresh, and its earlier "
    )
    with pytest.warns(UserWarning, match=told + r"results are in .*replaced/ppo-1, and its earlier checkpoints are in"):
        train(0.2)
    aside = run.path / "replaced" / "ppo-1"
    assert names(aside) == ["metrics.jsonl", "ppo", "ppo.json", "tables", "tensorboard"]
    assert (aside / "ppo" / "model").read_text() == (aside / "tensorboard" / "ppo" / "events").read_text() == "0.1"
    assert json.loads((aside / "metrics.jsonl").read_text()) == {"stage": "ppo", "rate": 0.1}
    assert json.loads((aside / "ppo.json").read_text())["inputs"] == {"config": {"rate": 0.1, "steps": 3}}
    assert run.metrics() == [{"stage": "sft"}, {"stage": "ppo", "rate": 0.2}]
    assert (run.path / "ppo" / "model").read_text() == "0.2"


@pytest.mark.parametrize("changed", ["setting", "length"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_stage_that_fails_at_once_costs_nothing(complete: bool, changed: str, run: RunDirectory) -> None:
    """As with a setting that nobody knows: with the right one again, it is done, or goes on."""

    def train(rate: float = 0.1, length: int = 3, fails: bool = False, makes: bool = False) -> tuple[bool, bool]:
        with run.stage("ppo", {"rate": rate}, length=length, outputs=["ppo"]) as stage:
            if not stage.done and not fails:
                write_checkpoint(run, "ppo", length)
                run.append_metrics({"stage": "ppo", "rate": rate})
                assert complete or makes
                (run.path / "ppo").mkdir()
            if fails:
                raise RunError("nobody knows it")
        return stage.done, stage.resumed

    with nullcontext() if complete else pytest.raises(AssertionError):
        train()
    rows = run.metrics()
    other = {"rate": 0.2} if changed == "setting" else {"length": 4}
    warned = pytest.warns(UserWarning, match="what was there before is back") if changed == "setting" else nullcontext()
    with pytest.raises(RunError, match="nobody knows it"), warned:
        train(**other, fails=True)  # type: ignore[arg-type]
    assert run.metrics() == rows and not (run.path / "replaced" / "ppo-1").exists()
    assert names(run.path / "checkpoints") == ["ppo"]
    assert train(makes=True) == ((True, False) if complete else (False, True))


def test_a_longer_stage_goes_on_and_a_shorter_one_begins_anew(run: RunDirectory) -> None:
    def train(length: int, seed: int = 0) -> str:
        with run.stage("ppo", {"seed": seed}, length=length, outputs=["ppo"]) as stage:
            if not stage.done:
                write_checkpoint(run, "ppo", length)
                (run.path / "ppo").write_text(f"{length}")
        with run.stage("measure", {}, after=["ppo"]) as measure:
            pass
        return f"{'done' if stage.done else 'goes on' if stage.resumed else 'anew'} {measure.done}"

    assert [train(3), train(3), train(5), train(5)] == ["anew False", "done True", "goes on False", "done True"]
    with pytest.warns(UserWarning, match=r"\(length=4, not 5\)"):
        assert train(4) == "anew False"
    assert (run.path / "replaced" / "ppo-1" / "ppo").read_text() == "5"
    with pytest.raises(KeyboardInterrupt), run.stage("ppo", {"seed": 0}, length=7, outputs=["ppo"]):
        raise KeyboardInterrupt
    assert train(8) == "goes on False"
    shutil.rmtree(run.path / "checkpoints" / "ppo")  # from which a finished one would go on
    with pytest.warns(UserWarning, match="its earlier results are in"):
        assert train(9) == "anew False"
    assert (run.path / "replaced" / "ppo-2" / "ppo").read_text() == "8"


HOLDS = """if True:
    import sys, time
    from sb3_vla.runs.directory import RunDirectory
    run = RunDirectory(sys.argv[1], {})
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_has_the_directory(tmp_path: Path) -> None:
    """And not by one that was killed."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
        (tmp_path / "link").symlink_to(tmp_path / "run")
        before = (tmp_path / "run" / "config.yaml").stat().st_mtime_ns
        for path in (tmp_path / "run", tmp_path / "link", tmp_path / "nothing" / ".." / "run"):
            told = rf"in use by process {holder.pid} on .* since 20.* \(-c .*/run\); wait until it has ended"
            with pytest.raises(RunError, match=told):
                RunDirectory(path, {"other": 1})
        with pytest.raises(RunError, match="in use by process"), RunDirectory(tmp_path / "run").stage("ppo", {}):
            pytest.fail("it began")
        assert (tmp_path / "run" / "config.yaml").stat().st_mtime_ns == before
        assert RunDirectory(tmp_path / "run").metrics() == []  # who only reads is not kept out
    finally:
        holder.kill()
        holder.wait()
    with RunDirectory(tmp_path / "run", {}), RunDirectory(tmp_path / "run", {}).stage("ppo", {}):
        pass  # a process is not in its own way
    after = [sys.executable, "-c", HOLDS.replace("60", "0"), str(tmp_path / "run")]
    assert subprocess.run(after, capture_output=True).returncode == 0  # nor in that of others when it has left it


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(run: RunDirectory) -> None:
    def check(folder: Path) -> None:
        if (folder / "model").read_text() != "whole":
            raise DamagedError(f"{folder / 'model'} is damaged")

    for step in (1, 2, 3, 4):
        write_checkpoint(run, "ppo", step, "whole" if step < 3 else "cut")
    folder = run.path / "checkpoints" / "ppo"
    with pytest.warns(UserWarning, match="ppo goes on from step-00000002 before it") as told:
        assert run.latest_checkpoint("ppo", check) == folder / "step-00000002"
    assert [str(each.message).split(" is damaged")[0] for each in told] == [
        f"{folder}/step-0000000{step}/model" for step in (4, 3)
    ]
    assert names(folder) == ["step-00000001", "step-00000002", "step-00000003.damaged", "step-00000004.damaged"]
    assert run.latest_checkpoint("ppo", check) == run.latest_checkpoint("ppo") == folder / "step-00000002"
    for step in (1, 2):
        (folder / f"step-0000000{step}" / "model").write_text("")
    with pytest.raises(
        RunError, match=r"step-00000002/model is damaged; no checkpoint of ppo .* delete .*ppo to begin"
    ):
        run.latest_checkpoint("ppo", check)


def test_a_configuration_of_something_else_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    (tmp_path / "notes").write_text("")
    monkeypatch.chdir(tmp_path)
    for path in (".", tmp_path):
        with pytest.raises(RunError, match=r"holds a config\.yaml that is not of a run"):
            RunDirectory(path, {})
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n" and len(os.listdir()) == 2
    (tmp_path / "config.yaml").unlink()
    for _ in range(2):
        RunDirectory(".", {})
    assert "notes" in os.listdir()


def test_a_link_to_a_directory_that_is_yet_to_be_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "big disk" / "run")
    for _ in range(2):
        with RunDirectory(tmp_path / "link", {}) as run:
            write_checkpoint(run, "ppo", 1)
    assert names(tmp_path / "big disk" / "run") == ["checkpoints", "config.yaml", "versions.json"]
    assert (tmp_path / "link").is_symlink()


def test_the_traceback_of_an_error_that_nobody_expected_is_kept(run: RunDirectory) -> None:
    def fail(error: BaseException) -> None:
        with RunDirectory(run.path, {}):
            raise error

    with pytest.raises(RunError):
        fail(RunError("expected"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert not (run.path / "traceback.txt").exists()
    stopped = KeyboardInterrupt()
    stopped.__cause__ = RuntimeError("after a signal")
    for error in (ValueError("of ours"), stopped):
        with pytest.raises(type(error)) as caught:
            fail(error)
    assert caught.value.__cause__.kept_in == run.path / "traceback.txt"  # type: ignore[union-attr]
    kept = (run.path / "traceback.txt").read_text()
    assert "ValueError: of ours" in kept and "RuntimeError: after a signal" in kept and "in fail" in kept


def test_checkpoints(run: RunDirectory) -> None:
    assert run.latest_checkpoint("sft") is None
    for step in (5, 100_000_000, 99_999_999):  # as text, the last would be the highest
        with run.checkpoint("sft", step, keep=None) as folder:
            (folder / "nested").mkdir()
            (folder / "nested" / "model").write_text(f"{step}")
    with pytest.raises(ZeroDivisionError), run.checkpoint("sft", 200_000_000) as folder:
        (folder / "model").write_text("half")
        raise ZeroDivisionError
    left_by_a_kill = run.path / "checkpoints" / "sft" / ".step-300000000.x.partial"
    left_by_a_kill.mkdir()
    latest = run.latest_checkpoint("sft")
    assert latest is not None and (latest / "nested" / "model").read_text() == "100000000"

    with run.checkpoint("sft", 5, keep=None) as folder:
        (folder / "model").write_text("again")
    # A kill between taking a checkpoint away and putting the new one in its place.
    last = run.path / "checkpoints" / "sft" / "step-100000000"
    last.rename(last.with_name(".step-100000000.old"))
    assert run.latest_checkpoint("sft") == last and (last / "nested" / "model").read_text() == "100000000"
    assert names(run.path / "checkpoints" / "sft") == ["step-00000005", "step-100000000", "step-99999999"]
    assert names(run.path / "checkpoints" / "sft" / "step-00000005") == ["model"]


def test_old_checkpoints_are_deleted(run: RunDirectory) -> None:
    folder = run.path / "checkpoints" / "ppo"

    def write(step: int, keep: int | None) -> list[str]:
        with run.checkpoint("ppo", step, keep) as written:
            assert not folder.exists() or all((path / "model").exists() for path in folder.glob("step-*"))
            (written / "model").write_text("x" * 100)
        return names(folder)

    assert write(1, None) == ["step-00000001"]
    assert write(2, None) == ["step-00000001", "step-00000002"]
    assert write(10, 2) == ["step-00000002", "step-00000010"]
    assert write(10, 2) == ["step-00000002", "step-00000010"]  # the same again
    assert write(3, 2) == ["step-00000003", "step-00000010"]  # never the new one, whatever its step
    assert write(11, 1) == ["step-00000011"]
    with pytest.raises(ZeroDivisionError), run.checkpoint("ppo", 12, keep=1) as half:
        (half / "model").write_text("half")
        raise ZeroDivisionError
    assert names(folder) == ["step-00000011"]  # not before the new one is complete


def test_a_kill_while_an_old_checkpoint_is_deleted(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(step: int) -> None:
        with run.checkpoint("ppo", step, keep=1) as folder:
            (folder / "model").write_text(f"{step}")

    write(1)
    removed: list[Path] = []
    with monkeypatch.context() as patch:  # nothing is removed, as by a kill right before
        patch.setattr(shutil, "rmtree", lambda path, **_: removed.append(path))
        write(2)
    assert [path.name for path in removed if path.exists()] == [".step-00000001.partial"]
    assert run.latest_checkpoint("ppo") == run.path / "checkpoints" / "ppo" / "step-00000002"
    write(3)
    assert sorted(os.listdir(run.path / "checkpoints" / "ppo")) == ["step-00000003"]
