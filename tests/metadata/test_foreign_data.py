"""Data sets from elsewhere: git-lfs pointers, names in another Unicode form, keys and layouts of other trainers."""

import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from small_media import ROW

from vfun_cli import lfs
from vfun_cli.metadata.checks import Report
from vfun_cli.metadata.records import read_metadata

POINTER = lfs.START + b"\noid sha256:" + b"4d" * 32 + b"\nsize 12345678\n"


def found(report: Report) -> list[tuple[int | None, str, str | None]]:
    return [(problem.row, problem.code, problem.field) for problem in report.problems]


@pytest.mark.parametrize("name", ["file_path", "audio_path", "control_file_path"])
def test_a_git_lfs_pointer_is_called_that(name: str, data: Path, check: Callable[..., Report]) -> None:
    (data / ROW[name]).write_bytes(POINTER)
    report = check([ROW])
    assert found(report) == [(0, "lfs-pointer", name)]
    assert "git lfs pull" in report.problems[0].message


def test_a_picture_that_is_a_pointer_is_called_that(data: Path, check: Callable[..., Report]) -> None:
    (data / "train/2.jpg").write_bytes(POINTER)
    assert found(check([{**ROW, "file_path": "train/2.jpg"}]))[0] == (0, "lfs-pointer", "file_path")


def test_metadata_that_is_a_pointer_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(POINTER)
    (problem,) = read_metadata(path).problems
    assert (problem.row, problem.code) == (None, "lfs-pointer") and "git lfs pull" in problem.message


def test_only_a_small_file_is_looked_into_for_a_pointer(tmp_path: Path) -> None:
    path = tmp_path / "1.mp4"
    path.write_bytes(POINTER.ljust(lfs.LONGEST))
    assert lfs.is_lfs_pointer(path)
    path.write_bytes(POINTER.ljust(lfs.LONGEST + 1))
    assert not lfs.is_lfs_pointer(path)
    assert not lfs.is_lfs_pointer(tmp_path / "none")


@pytest.mark.parametrize(("on_disk", "in_row"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_in_the_other_unicode_form_is_named(
    on_disk: str, in_row: str, data: Path, check: Callable[..., Report]
) -> None:
    name = "é/Übung 1.mp4"
    there, stated = (data / unicodedata.normalize(form, name) for form in (on_disk, in_row))
    there.parent.mkdir()
    shutil.copy(data / "train/1.mp4", there)
    report = check([{**ROW, "file_path": str(stated.relative_to(data))}])
    assert found(report) == [(0, "missing-file", "file_path")]
    message = report.problems[0].message
    assert str(there) in message and f"in Unicode form {on_disk}" in message


def test_a_path_with_backslashes_is_answered_with_the_one_with_slashes(
    data: Path, check: Callable[..., Report]
) -> None:
    report = check([{**ROW, "file_path": "train\\1.mp4"}])
    assert found(report) == [(0, "missing-file", "file_path")]
    assert f"there is {data}/train/1.mp4 (with / instead of \\)" in report.problems[0].message


@pytest.mark.parametrize("path", ["train\\9.mp4", "train/é.mp4", "train/9.mp4"])
def test_a_file_that_is_there_in_no_form_is_only_missing(path: str, check: Callable[..., Report]) -> None:
    assert check([{**ROW, "file_path": path}]).problems[0].message == "no such file"
