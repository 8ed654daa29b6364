"""What a user installs: the wheel holds every module and data file, and importing the environments stays light."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("mw_envs", "sb3_vla")
# tomllib is new in Python 3.11.
VERSION = re.search(r'(?m)^version = "(.+?)"', (ROOT / "pyproject.toml").read_text()).group(1)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: setuptools leaves a ``build`` folder that a later build would pick up."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building the wheel without a network needs setuptools: pip install -e .[dev]")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "out", "."]
    build = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = (source / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {f"{path.relative_to(ROOT)}" for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    tables = {f"{path.relative_to(ROOT)}" for path in (ROOT / "mw_envs" / "data").glob("*.json")}
    recipes = {f"{path.relative_to(ROOT)}" for path in (ROOT / "sb3_vla" / "recipes" / "yaml").glob("*.yaml")}
    pages = {f"{path.relative_to(ROOT)}" for path in (ROOT / "sb3_vla" / "runs" / "report").glob("*.jinja")}
    boxed = {f"{path.relative_to(ROOT)}" for path in (ROOT / "sb3_vla" / "box").glob("*/*")}
    assert tables and recipes and boxed and pages
    assert shipped == modules | tables | recipes | boxed | pages | {"mw_envs/py.typed", "sb3_vla/py.typed"}


def test_the_wheel_names_version_license_and_command(wheel: zipfile.ZipFile) -> None:
    info = f"sb3_vla-{VERSION}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == ("sb3-vla", VERSION, "MIT")
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert (
        wheel.read(f"{info}/entry_points.txt").decode().split()
        == "[console_scripts] sb3-vla = sb3_vla.__main__:main".split()
    )


def test_the_wheel_works_apart_from_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    program = "import mw_envs; print(mw_envs.__file__, len(mw_envs.TASKS), mw_envs.__version__)"
    # PYTHONPATH comes before the editable installation.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert output.split() == [str(tmp_path / "mw_envs" / "__init__.py"), "50", VERSION]


def test_one_version_everywhere() -> None:
    import mw_envs
    import sb3_vla

    assert importlib.metadata.version("sb3-vla") == mw_envs.__version__ == sb3_vla.__version__ == VERSION


def test_importing_the_environments_is_light() -> None:
    heavy = ("torch", "stable_baselines3", "mujoco")
    program = f"import sys, mw_envs; print([name for name in {heavy} if name in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("package", "works", "breaks"),
    [
        # With MetaWorld 3.0.0, which takes any, for 3.1.1 pins one: tried from end to end.
        ("mujoco", ["3.2.1", "3.3.0", "3.16.0"], ["3.0.0", "3.2.0", "3.17.0", "4.0.0"]),
        ("gymnasium", ["1.1.1", "1.4.0"], ["1.1.0"]),
        ("metaworld", ["3.0.0", "3.1.1"], ["2.0.0"]),
        ("numba", ["0.60.0", "0.68.1"], []),
        ("packaging", ["24.0"], []),
    ],
)
def test_dependencies_are_those_that_work(package: str, works: list[str], breaks: list[str]) -> None:
    listed = re.search(r"(?ms)^dependencies = \[\n(.+?)^\]", (ROOT / "pyproject.toml").read_text())
    requirements = [Requirement(text) for text in re.findall(r'(?m)^ +"(.+?)"', listed.group(1))]  # type: ignore[union-attr]
    (wanted,) = [requirement.specifier for requirement in requirements if requirement.name == package]
    assert list(wanted.filter(works + breaks)) == works


@pytest.mark.parametrize(
    ("user", "container", "installs"),
    [(1000, False, False), (1000, True, False), (0, False, False), (0, True, True)],
    ids=["a user", "a user in a container", "root", "root in a container"],
)
def test_system_packages_are_installed_by_root_in_a_container_only(
    user: int, container: bool, installs: bool, tmp_path: Path
) -> None:
    """Elsewhere the command is told, also where sudo asks for no password."""
    programs = {
        "id": f"echo {user}",
        "python-bare": 'case "$2" in *ensurepip*) exit 1;; *version_info*print*|*print*) echo 3.11;; esac',
        "apt-get": 'echo "$@" >>"$CALLS"; exit 7',
        "sudo": 'echo "sudo $@" >>"$CALLS"',
        "systemd-detect-virt": "exit 1",
    }
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = (ROOT / "examples" / "setup.sh").read_text()
    for mark in ("/.dockerenv", "/run/.containerenv"):  # this machine may have them
        script = script.replace(mark, str(tmp_path / "mark"))
    if container:
        (tmp_path / "mark").touch()
    (tmp_path / "setup.sh").write_text(script)
    calls = tmp_path / "calls"
    calls.touch()
    kept = {key: value for key, value in os.environ.items() if key != "container"}
    environment = {
        **kept,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": "python-bare",
        "SB3_VLA_VENV": str(tmp_path / "venv"),
        "CALLS": str(calls),
    }
    command = ["bash", str(tmp_path / "setup.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert bool(calls.read_text()) == installs and "sudo" not in calls.read_text()
    told = "apt-get install -y --no-install-recommends python3.11-venv"
    assert f"{'sudo ' if user else ''}{told}" in done.stdout + done.stderr
    assert ("Run this, then start again" in done.stderr) and ("Running:" in done.stdout) == installs


OTHER_PROGRAM = """
import sys
import sb3_vla
import stable_baselines3
print(sys.argv[1:], [name for name in ("pyarrow", "av", "transformers", "matplotlib") if name in sys.modules])
print(stable_baselines3.PPO.policy_aliases["VLAPolicy"] is sb3_vla.VLAPolicy, "GRPO" in dir(sb3_vla))
from sb3_vla import *
print(PPO.__name__, GRPO.__name__, SharedMemoryVecEnv.__name__, HoldAtEnd.__name__, __version__)
"""


def test_importing_the_package_is_the_same_in_every_program(tmp_path: Path) -> None:
    """Whatever its arguments are; and it costs neither datasets nor videos."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text(OTHER_PROGRAM)
    (tmp_path / "other" / "__main__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "other", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    expected = ["['doctor'] []", "True True", f"PPO GRPO SharedMemoryVecEnv HoldAtEnd {VERSION}"]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--list"]])
def test_what_a_command_offers_is_told_at_once(arguments: list[str]) -> None:
    """In half a second, a sixth of what the imports of a training take."""
    command = [sys.executable, "-X", "importtime", "-m", "sb3_vla", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sb3_vla.cli.main" in imported
    assert not imported & {"torch", "stable_baselines3", "scipy", "matplotlib", "pyarrow", "av", "mujoco", "metaworld"}


def test_waiting_threads_of_a_command_soon_give_their_cores_up() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-m", "sb3_vla", "train", "nowhere"]
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("this build of torch has another OpenMP")
    assert "GOMP_SPINCOUNT = '20000'" in told


@pytest.mark.skipif(
    not list(Path(sys.prefix).glob("setup*.stamp")), reason="an environment that examples/setup.sh did not make"
)
def test_the_set_up_environment_holds_byte_code() -> None:
    """Without it a process takes twice as long to start, and nothing else tells."""
    for package in ("numba", "numpy", "scipy", "metaworld", "mujoco", "gymnasium", "stable_baselines3", "torch"):
        source = importlib.util.find_spec(package).origin  # type: ignore[union-attr]
        assert Path(importlib.util.cache_from_source(source)).exists(), package  # type: ignore[arg-type]


def entries_of_the_architecture() -> dict[str, list[str]]:
    """What docs/architecture.md lists of each package, in its order."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return {
        package: re.findall(r"(?m)^[├└]── ([\w.]+)/? ", re.search(rf"(?ms)^{package}/.*?(?=^\n|^```)", text)[0])  # type: ignore[index]
        for package in PACKAGES
    }


def test_the_architecture_lists_what_there_is() -> None:
    for package, listed in entries_of_the_architecture().items():
        tracked = [path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        there = {path.relative_to(ROOT / package).parts[0] for path in tracked}
        assert set(listed) == there - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}


def test_a_folder_imports_from_those_above_it() -> None:
    floors = entries_of_the_architecture()["sb3_vla"]
    wrong = []
    for path in (ROOT / "sb3_vla").glob("*/**/*.py"):
        floor = path.relative_to(ROOT / "sb3_vla").parts[0]
        for name in re.findall(r"(?m)^ *(?:from|import) sb3_vla\.(\w+)", path.read_text()):
            if floors.index(name) > floors.index(floor):
                wrong.append(f"{path.relative_to(ROOT)} imports sb3_vla.{name}")
    assert not wrong
