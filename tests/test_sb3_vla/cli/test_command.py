"""What a command tells of errors: of those that its user can mend the message, of others where the traceback is."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

import mw_envs
import sb3_vla
from sb3_vla.cli.command import run_command
from sb3_vla.common import errors
from sb3_vla.common.errors import ExpectedError, StorageError, file_errors

#: what a caller in Python catches, of which the errors that are raised here on purpose have classes of their own
BUILT_IN = ("ValueError", "OSError", "FileNotFoundError", "FileExistsError", "ImportError")


@pytest.mark.parametrize("package", [mw_envs, sb3_vla])
def test_what_is_raised_on_purpose_has_a_class_of_its_own(package: object) -> None:
    """So that a command tells it from a fault: the rule for whoever writes ``raise``."""
    found = []
    for path in Path(str(package.__file__)).parent.rglob("*.py"):  # type: ignore[attr-defined]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            raised = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
            if isinstance(raised, ast.Call) and isinstance(raised.func, ast.Name) and raised.func.id in BUILT_IN:
                found.append(f"{path.name}:{node.lineno} raises {raised.func.id}; take one of mw_envs.errors")  # type: ignore[attr-defined]
    assert found == []


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_an_error_is_told_in_one_message(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And goes from one process to another."""
    error = pickle.loads(pickle.dumps(getattr(errors, name)("a [value]; give another")))
    assert isinstance(error, ExpectedError) and str(error) == "a [value]; give another"

    def work() -> None:
        raise error

    assert run_command(work, again="") == 2
    assert capsys.readouterr().err == "error: a [value]; give another\n"


def test_what_the_system_says_of_a_file() -> None:
    with pytest.raises(StorageError, match=r"^cannot read nowhere: No such file or directory$") as caught:
        with file_errors("read", Path("nowhere")):
            Path("nowhere").read_text()
    assert isinstance(caught.value, OSError) and isinstance(caught.value.__cause__, FileNotFoundError)
