"""Data sets from elsewhere: git-lfs pointers, names in another Unicode form, keys and layouts of other trainers."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from small_media import ROW, SPEECH_FIELDS

from vfun_cli import lfs
from vfun_cli.errors import MetadataError
from vfun_cli.metadata.checks import Report, validate
from vfun_cli.metadata.fix import write_fixed
from vfun_cli.metadata.records import read_metadata
from vfun_cli.metadata.report import summary_of_warnings

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


FOREIGN = {"video" if key == "file_path" else "caption" if key == "text" else key: ROW[key] for key in ROW}
RENAMED = [
    "3 of 3 rows have 'video' where vfun reads 'file_path': --fix OUT writes a copy with it renamed",
    "3 of 3 rows have 'caption' where vfun reads 'text': --fix OUT writes a copy with it renamed",
]


def three(row: dict[str, str]) -> list[dict[str, str]]:
    key = "caption" if "caption" in row else "text"
    return [{**row, key: f"{row[key]} {number}"} for number in range(3)]


def as_csv(rows: list[dict[str, str]]) -> str:
    return "\n".join(",".join(row) for row in [list(rows[0]), *(row.values() for row in rows)]) + "\n"


def as_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def validated(path: Path) -> Report:
    return validate(read_metadata(path), SPEECH_FIELDS, ("video",), path.parent)


@pytest.mark.parametrize(("name", "write"), [("m.json", json.dumps), ("m.jsonl", as_lines), ("m.csv", as_csv)])
def test_keys_of_another_trainer_are_told_once_and_fix_renames_them(
    name: str, write: Callable[..., str], data: Path
) -> None:
    path = data / name
    path.write_text(write(three(FOREIGN)))
    report = validated(path)
    assert [(problem.row, problem.code, problem.message) for problem in report.errors] == [
        (None, "foreign-layout", message) for message in RENAMED
    ]
    with pytest.raises(MetadataError, match="the file cannot be trained on"):
        report.require_ok()
    fixed = write_fixed(report, data / f"fixed-{name}")
    assert (fixed.kept, fixed.changed) == (3, 3)
    again = validated(data / f"fixed-{name}")
    assert again.errors == [] and again.rows == 3
    assert again.metadata.records[2].fields["text"] == "A ball rolls. 2"
    assert not {"video", "caption"} & again.metadata.records[0].raw.keys()


@pytest.mark.parametrize(
    ("theirs", "own"),
    [(key, "file_path") for key in ("path", "video_path", "media_path", "image", "file", "file_name", "File_Path")]
    + [(key, "text") for key in ("prompt", "cap", "captions", "text_prompt", "Text")],
)
def test_each_known_key_is_answered_with_the_right_one(theirs: str, own: str, check: Callable[..., Report]) -> None:
    report = check([{theirs if key == own else key: value for key, value in ROW.items()}])
    assert found(report) == [(None, "foreign-layout", own)]
    assert f"1 of 1 rows have {theirs!r} where vfun reads {own!r}" in report.problems[0].message


def test_keys_beside_the_right_ones_are_left_alone(check: Callable[..., Report]) -> None:
    assert check([{**ROW, "video": "other.mp4", "prompt": "Another.", "image": 7}]).problems == ()


def test_rows_under_other_keys_are_checked_like_all_others(check: Callable[..., Report]) -> None:
    report = check([FOREIGN, {**FOREIGN, "video": "train/9.mp4"}])
    assert (1, "missing-file", "file_path") in found(report)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", ["data", "annotations"])
def test_a_list_in_an_object_is_read_and_fix_takes_it_out(
    key: str, indent: int | None, data: Path, check: Callable[..., Report]
) -> None:
    report = check(json.dumps({"version": 1, key: three(ROW), "tags": ["a"]}, indent=indent))
    (problem,) = report.errors
    assert (problem.row, problem.code) == (None, "foreign-layout") and report.ok == 3
    assert f"in an object, under {key!r}" in problem.message
    write_fixed(report, data / "fixed.json")
    assert validated(data / "fixed.json").errors == []
    assert isinstance(json.loads((data / "fixed.json").read_text()), list)


def test_two_lists_in_an_object_are_not_guessed_between(check: Callable[..., Report]) -> None:
    codes = {code for _, code, _ in found(check(json.dumps({"a": [ROW], "b": [ROW]}, indent=1)))}
    assert "foreign-layout" not in codes and codes & {"unparsable-metadata", "malformed-row"}


def test_rows_without_a_text_are_one_warning_for_the_set(check: Callable[..., Report]) -> None:
    bare = {key: value for key, value in ROW.items() if key != "text"}
    report = check([bare, {**bare, "audio_path": "train/1.mp4"}, ROW])
    told = [problem for problem in report.problems if problem.code == "missing-caption"]
    assert [(problem.row, problem.severity) for problem in told] == [(None, "warning")]
    assert told[0].message == "2 of 3 rows have no text: they train with an empty caption"
    assert summary_of_warnings(report)[-1] == f"missing-caption: {told[0].message}"
    assert report.ok == 2


def test_a_misspelt_text_is_an_error_and_no_empty_caption(check: Callable[..., Report]) -> None:
    misspelt = {"txet" if key == "text" else key: value for key, value in ROW.items()}
    assert found(check([misspelt])) == [(0, "missing-field", "text")]
