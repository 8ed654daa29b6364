"""Files and folders that appear complete or not at all, JSON, and the paths that settings name."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sb3_vla.common import files
from sb3_vla.common.errors import DamagedError, ExpectedError, InputError, InTheWayError, NotThereError, StorageError
from sb3_vla.common.files import finish_exchange, hidden_beside, read_json, whole_file, whole_folder, write_json
from sb3_vla.common.paths import local_path, writable_file


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder that is another one of the same file system, mounted, as a container's volume is."""
    source, folder = tmp_path / "volume", tmp_path / "mounted folder"
    source.mkdir()
    folder.mkdir()
    if subprocess.run(["mount", "--bind", str(source), str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs the right to")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def anything(_: Path) -> None:
    """A check that lets everything be replaced."""


def write(folder: Path | str, text: str) -> None:
    with whole_folder(folder, anything) as partial:
        (partial / "config.json").write_text(text)
        (partial / f"only {text}").mkdir()
        (partial / f"only {text}" / "file").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def expected(text: str) -> dict[str, str]:
    return {"config.json": text, f"only {text}/file": text}


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/runs") == tmp_path / "runs" and local_path("~") == tmp_path
    assert local_path(Path("~/runs")) == tmp_path / "runs" and local_path("a~b") == Path("a~b")
    with pytest.raises(InputError, match="~nobody-of-this-name/x: no home directory is known"):
        local_path("~nobody-of-this-name/x")
    write("~/whole", "one")
    assert content(tmp_path / "whole") == expected("one")


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    """Also one to a folder that is yet to be made, and a link to a link."""
    (tmp_path / "big disk").mkdir()
    (tmp_path / "link").symlink_to("big disk/result")
    (tmp_path / "second").symlink_to(tmp_path / "link")
    for number, name in enumerate(("link", "link", "second", "link")):
        write(tmp_path / name, f"{number}")
        assert content(tmp_path / "big disk" / "result") == expected(f"{number}")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    assert os.listdir(tmp_path / "big disk") == ["result"]


@pytest.mark.parametrize("where", ["a mount", "the working directory"])
def test_a_folder_that_stays_where_it_is_gets_other_entries(
    where: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue("mounted") if where == "a mount" else tmp_path / "here"
    folder.mkdir(exist_ok=True)
    if where == "the working directory":
        monkeypatch.chdir(folder)
    before = folder.stat().st_ino
    for text in ("one", "two", "three"):
        write("." if where == "the working directory" else folder, text)
        assert content(folder) == expected(text) and folder.stat().st_ino == before
        assert sorted(os.listdir(folder)) == ["config.json", f"only {text}"]
    assert hidden_beside(folder, "x").parent == folder and hidden_beside(tmp_path / "x", "y").parent == tmp_path


def test_a_writer_that_was_killed_in_an_exchange_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill before each of the steps; what is read after it is whole."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "." / "x"
    folder.mkdir()
    monkeypatch.setattr(files, "_stays", lambda _: True)
    write(folder, "old")
    replace, found = os.replace, []
    for step in range(100):
        calls = 0

        def killing(*names: object, survives: int = step) -> None:
            nonlocal calls
            calls += 1
            if calls > survives:  # and nothing is done after a kill
                raise KeyboardInterrupt
            replace(*names)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killing)
            patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
            try:
                write(folder, "new")
                killed = False
            except KeyboardInterrupt:
                killed = True
        finish_exchange(folder)
        whole = {name: text for name, text in content(folder).items() if not name.startswith(".sb3-vla-")}
        found.append("new" if whole == expected("new") else "old")
        assert whole == expected(found[-1])
        if not killed:
            break
        write(folder, "old")
    assert found == ["old"] + ["new"] * step and step >= 5


def test_the_check_is_asked_before_the_work_and_after_it(tmp_path: Path) -> None:
    asked: list[Path] = []

    def check(folder: Path) -> None:
        asked.append(folder)
        if (folder / "thesis").exists():
            raise InTheWayError(f"{folder} holds a thesis")

    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(InTheWayError, match="holds a thesis; what was to be there is complete in") as caught:
        with whole_folder(tmp_path / "link", check) as partial:
            (partial / "result").write_text("of hours")
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "thesis").write_text("meanwhile")
    assert asked == [tmp_path / "folder"] * 2
    assert (tmp_path / "folder" / "thesis").read_text() == "meanwhile"
    kept = Path(str(caught.value).rpartition(" in ")[2])
    assert content(kept) == {"result": "of hours"}
    with pytest.raises(InTheWayError, match=r"holds a thesis$"), whole_folder(tmp_path / "link", check):
        pytest.fail("it began")


def test_what_cannot_take_its_place_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "folder", "old")

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    with pytest.raises(ExpectedError, match=r"cannot write .*folder: Device or resource busy; what was") as caught:
        with whole_folder(tmp_path / "folder", anything) as partial:
            (partial / "result").write_text("of hours")
            monkeypatch.setattr(os, "replace", busy)
    assert content(Path(str(caught.value).rpartition(" in ")[2])) == {"result": "of hours"}
    assert content(tmp_path / "folder") == expected("old")


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*folder: No space left on device; free some space"):
        with whole_folder(tmp_path / "folder", anything) as partial:
            (partial / "half").write_text("x")
            raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "folder", anything):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    assert writable_file(tmp_path / "new" / "result.json", "output") == tmp_path / "new" / "result.json"
    assert (tmp_path / "new").is_dir()
    with pytest.raises(InputError, match=r"output=.* is a folder; expected the name of a file"):
        writable_file(tmp_path, "output")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        writable_file(tmp_path / "file" / "result.json", "output")


def test_a_file_is_replaced_only_when_complete(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "file.txt") as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert (tmp_path / "file.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    with whole_file(tmp_path / "file.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "file.txt").read_text() == "old"
    assert (tmp_path / "file.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    write_json(path, {"path": Path("x"), "number": 0.1}, default=str)
    assert read_json(path) == {"path": "x", "number": 0.1} and path.read_text().endswith("\n}\n")
    write_json(path, [1])
    assert read_json(path, list) == [1]
    with pytest.raises(DamagedError, match=r"value\.json is damaged: expected an object, found list"):
        read_json(path)
    for text, told in ((b"{", "not JSON"), (b"\xff", "not JSON"), (b"", "not JSON")):
        path.write_bytes(text)
        with pytest.raises(DamagedError, match=rf"value\.json is damaged: {told}"):
            read_json(path)
    with pytest.raises(NotThereError, match=r"There is no .*other\.json"):
        read_json(tmp_path / "other.json")
    with pytest.raises(StorageError, match=r"cannot read .*new: Is a directory"):
        read_json(tmp_path / "new")
