"""JSON, JSON lines and CSV are read alike, and what is wrong in them is said with its place."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_media import ROW

from vfun_cli.metadata.checks import exact_rate, table_without_files
from vfun_cli.metadata.records import read_metadata

SIZES = {"width": 640, "height": 480, "frames": 81, "fps": 25}


def as_json(rows: list[dict]) -> str:
    return json.dumps(rows)


def as_lines(rows: list[dict]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n\n"


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("m.json", as_json),
        ("m.jsonl", as_lines),
        ("m.json", as_lines),
        ("m.txt", as_lines),
        ("m.csv", as_csv),
        ("m", as_csv),
    ],
)
def test_formats_give_the_same_records(name: str, write, encoding: str, tmp_path: Path) -> None:
    rows = [{**ROW, "text": 'A "dog", ein Hündchen,\nrunning 狗', **SIZES}, {**ROW, "text": "", **SIZES}]
    path = tmp_path / name
    path.write_text(write(rows), encoding=encoding)
    metadata = read_metadata(path)
    assert metadata.problems == ()
    assert [dict(record.fields) for record in metadata.records] == rows
    assert [record.row for record in metadata.records] == [0, 1]


def test_the_documents_example_is_valid_as_printed_without_its_dots(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    path.write_text(
        """[
    {
      "file_path": "train/00000001.mp4",
      "audio_path": "wav/00000001.wav",
      "control_file_path": "control/00000001.mp4",
      "text": "A group of young men in suits and sunglasses are walking down a city street.",
      "type": "video"
    }
]
"""
    )
    metadata = read_metadata(path)
    assert metadata.problems == () and metadata.records[0].fields["audio_path"] == "wav/00000001.wav"


def test_an_error_in_json_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('[\n  {"file_path": "a.mp4"}\n  {"file_path": "b.mp4"}\n]')
    (problem,) = read_metadata(path).problems
    assert "line 3, column 3" in problem.message and "b.mp4" in problem.message


def test_a_bad_line_keeps_its_row_number_and_the_others_their_own(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n{"a": 3}\n')
    metadata = read_metadata(path)
    assert [record.row for record in metadata.records] == [0, 2]
    assert [(problem.row, problem.code) for problem in metadata.problems] == [(1, "malformed-row")]
    assert "line 3" in metadata.problems[0].message
    assert metadata.rows == 3


def test_a_csv_row_with_an_unquoted_comma_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("file_path,text,type\na.mp4,A dog, running,video\nb.mp4,A cat,video\n")
    metadata = read_metadata(path)
    assert [record.row for record in metadata.records] == [1]
    assert "line 2" in metadata.problems[0].message and "4 cells under 3 columns" in metadata.problems[0].message


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe[\x00]\x00",
        b"[" * 100000,
        b'[{"a": ' + b"9" * 5000 + b"}]",
        b"name\nA dog\n",
        b"a,a,text\n1,2,3\n",
        b"7",
        b'"x"',
    ],
    ids=["utf-16", "deep", "huge-number", "no-header", "column-twice", "number", "text"],
)
def test_unparsable_files_are_one_problem(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    assert [problem.code for problem in read_metadata(path).problems] == ["unparsable-metadata"]


def test_a_file_that_cannot_be_opened_is_one_problem(tmp_path: Path) -> None:
    assert [problem.code for problem in read_metadata(tmp_path / "nothing.json").problems] == ["unreadable-metadata"]


def test_rows_that_state_everything_make_a_table_without_files(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        as_lines([{**ROW, **SIZES, "fps": 29.97}, {"type": "image", "width": 64, "height": 32, "file_path": "x"}])
    )
    table = table_without_files(read_metadata(path))
    assert table.is_image.tolist() == [False, True]
    assert (table.fps_num[0], table.fps_den[0]) == (30000, 1001)
    assert table.width.tolist() == [640, 64]


RATES = (
    [(25, "25"), (25.0, "25"), (12.5, "25/2"), (30.02, "1501/50")]
    + [(23.976, "24000/1001"), (29.97, "30000/1001"), ("30000/1001", "30000/1001"), (59.94, "60000/1001")]
    + [(value, None) for value in ("x", 0, float("inf"), "1/0", -5, True)]
)


@pytest.mark.parametrize(("value", "rate"), RATES)
def test_frame_rates_become_exact(value: object, rate: str | None) -> None:
    found = exact_rate(value)
    assert (None if found is None else str(found)) == rate


UNREADABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a pipe": ("unreadable-metadata", os.mkfifo),
    "a device": ("unreadable-metadata", lambda path: path.symlink_to("/dev/zero")),
    "an empty folder": ("empty-metadata", Path.mkdir),
    "a file of the kernel that never ends": ("empty-metadata", lambda path: path.symlink_to("/proc/kmsg")),
    "gigabytes of nothing": ("unparsable-metadata", lambda path: sparse(path, 2**33)),
    "terabytes of nothing": ("unreadable-metadata", lambda path: sparse(path, 2**40)),
    "UTF-16": ("unparsable-metadata", lambda path: path.write_text("[]", encoding="utf-16")),
    "UTF-16 without its mark": ("unparsable-metadata", lambda path: path.write_text("[]", encoding="utf-16-be")),
    "a film": ("unparsable-metadata", lambda path: path.write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))),
    "lists in lists": ("unparsable-metadata", lambda path: path.write_text("[" * 10**6)),
    "rows in objects": ("unparsable-metadata", lambda path: path.write_text('{"a":' * 200 + "[{}]" + "}" * 200)),
    "a number of 5000 digits": ("unparsable-metadata", lambda path: path.write_text('[{"width": %s}]' % ("9" * 5000))),
}


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", ["m.json", "m.txt"])
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_no_metadata_is_one_problem_at_once(what: str, name: str, tmp_path: Path) -> None:
    code, make = UNREADABLE[what]
    make(tmp_path / name)
    (problem,) = read_metadata(tmp_path / name).problems
    assert (problem.row, problem.code) == (None, code)


def test_a_value_that_is_nested_too_deeply_is_a_malformed_row(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('[{"file_path": ' + "[" * 800 + "]" * 800 + '}, {"file_path": "1.mp4"}]')
    found = read_metadata(tmp_path / "m.json")
    assert [(problem.row, problem.code) for problem in found.problems] == [(0, "malformed-row")]
    assert [record.row for record in found.records] == [1]


def test_a_rate_of_a_billion_digits_is_none() -> None:
    assert exact_rate("1e999999999") is None
    assert exact_rate("9" * 4000 + "/1") is None
