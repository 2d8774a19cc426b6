"""What a disk lacks costs that and nothing else; what fails is an error; files are as the umask has them."""

import ast
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.disks import ABILITIES, file_system, without
from tests.sources import PACKAGE, parsed
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.writer import Entry, plan_shards, write_shards
from vfun_cli.disks.abilities import copy_folder, fault, missing
from vfun_cli.errors import EnvironmentFault
from vfun_cli.modeling.tensor_files import save_tensors
from vfun_cli.run.rundir import ensure_writable, write_atomically

LACKING = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EPERM, errno.EACCES)
FAILING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE)
NAMES = {"locks": "locks", "modes": "changes of permissions", "folders": "flushing of directories"}


def write_all(folder: Path) -> None:
    """Everything that checkpoints and exports do to a disk."""
    save_tensors({"a": torch.ones(3)}, folder / "a.safetensors")
    entries = [Entry(name="b", dtype="F32", shape=(3,))]
    shards = plan_shards(entries, "b", 1000)
    write_shards(folder, "b", shards, lambda entry: iter([np.ones(3, np.float32)]), workers=1, done=lambda size: None)
    write_atomically(folder / "inside" / "text.json", "{}")
    manifest.write_manifest(folder)
    copy_folder(folder, folder.with_name("copy"))


@pytest.mark.parametrize("code", LACKING)
def test_what_a_disk_lacks_is_said_once_and_nothing_fails(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    ensure_writable(folder)
    assert capfd.readouterr().err == ""
    without(monkeypatch, *ABILITIES, code=code)
    ensure_writable(folder)
    said = capfd.readouterr().err
    assert said.count("warning:") == 1 and all(f"no {name}" in said for name in NAMES.values()), said
    assert [*folder.iterdir()] == []
    write_all(folder)
    manifest.verify(folder)
    manifest.verify(folder.with_name("copy"))


@pytest.mark.parametrize("ability", NAMES)
def test_each_ability_is_missed_by_itself(ability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, ability)
    assert [each.name for each in missing(tmp_path)] == [NAMES[ability]]


@pytest.mark.parametrize("ability", NAMES)
@pytest.mark.parametrize("code", FAILING)
def test_a_disk_that_fails_lacks_nothing(
    ability: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, ability, code=code)
    with pytest.raises(EnvironmentFault, match=f"cannot write to {tmp_path}: {os.strerror(code)}"):
        ensure_writable(tmp_path)
    assert [*tmp_path.iterdir()] == []
    if ability != "locks":  # nobody takes one here
        with pytest.raises(OSError, match=os.strerror(code)):
            write_all(tmp_path)


def test_a_full_disk_is_noticed_at_the_start_and_named_by_what_is_written(tmp_path: Path) -> None:
    with file_system(tmp_path / "disk", "size=64k") as disk:
        (disk / "fill").write_bytes(b"0" * 64 * 1024)
        with pytest.raises(EnvironmentFault, match=rf"cannot write to {disk}: No space left on device.*") as caught:
            ensure_writable(disk)
        assert "Make room" in (caught.value.hint or "")
        for write in (
            lambda path: save_tensors({"a": torch.ones(3)}, path),
            lambda path: write_atomically(path, "text"),
            lambda path: manifest.write_json(path, {}),
        ):
            with pytest.raises(OSError, match="No space left on device") as full:
                write(disk / "wanted")
            assert full.value.filename == str(disk / "wanted")
        (tmp_path / "source").write_bytes(b"0" * 4096)
        with pytest.raises(OSError, match="No space left on device") as full:
            shutil.copyfile(tmp_path / "source", disk / "wanted")
        assert f"about {disk / 'wanted'}." in fault(full.value).message, "not of what is copied there"


@pytest.mark.parametrize("code", [*FAILING, *LACKING, errno.ENAMETOOLONG])
def test_an_error_of_the_system_says_what_where_and_what_next(code: int, tmp_path: Path) -> None:
    for error, where in ((OSError(code, os.strerror(code), str(tmp_path)), None), (OSError(code, "odd"), tmp_path)):
        found = fault(error, where=where)
        assert found.exit_code == 6 and str(tmp_path) in found.message and error.strerror in found.message
        assert found.hint and ("room" in found.hint) == (code in (errno.ENOSPC, errno.EDQUOT))


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("value", [0o022, 0o002, 0o077, 0o027])
def test_files_are_as_the_umask_has_them(value: int, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with umask(value):
        write_all(folder)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 8
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~value, path


ASKED_OF_DISKS = {
    "chmod", "fchmod", "copy", "copy2", "copymode", "copystat", "copytree", "utime", "link", "hardlink_to", "flock",
    "lockf", "fsync", "posix_fallocate", "fallocate",
}  # fmt: skip
"""Calls that not every disk knows, or that copy what not every disk can take."""
MODULES = {"os", "shutil", "fcntl"}


def test_what_not_every_disk_knows_is_asked_in_one_place() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if module in MODULES and node.func.attr in ASKED_OF_DISKS:
                found.add(path.relative_to(PACKAGE).parts[0])
            if module == "os" and node.func.attr == "open" and "O_CREAT" in ast.unparse(node):
                assert [ast.literal_eval(mode) for mode in node.args[2:]] == [0o666], f"{path}:{node.lineno}"
    assert found == {"disks"}
