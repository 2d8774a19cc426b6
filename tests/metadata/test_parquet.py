"""Parquet gives the records of the other formats, and what is wrong in it is said."""

import csv
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from vfun_cli.errors import EnvironmentFault
from vfun_cli.metadata import parquet as reading
from vfun_cli.metadata.records import read_metadata

ROWS = [
    {
        "file_path": "1.mp4",
        "text": "A dog, 狗.",
        "type": "video",
        "width": 640,
        "height": 480,
        "frames": 81,
        "fps": 25.5,
    },
    {"file_path": "2.mp4", "text": "", "type": "video", "width": 64, "height": 48, "frames": 9, "fps": 24.5},
]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["m.parquet", "m.json", "m"])
def test_parquet_has_the_records_of_json_json_lines_and_csv(name: str, tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text(json.dumps(ROWS))
    (tmp_path / "o.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    with (tmp_path / "o.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    found = read_metadata(written(tmp_path / name, ROWS))
    assert found.problems == () and found.format == "parquet"
    for other in ("o.json", "o.jsonl", "o.csv"):
        assert [dict(r.fields) for r in read_metadata(tmp_path / other).records] == [
            dict(r.fields) for r in found.records
        ]


def test_lists_and_structs_are_read_and_nulls_are_absent(tmp_path: Path) -> None:
    row = {"file_path": "1.mp4", "text": ["A dog.", "A cat."], "more": {"score": 1.5}, "day": date(2026, 1, 2)}
    first, second = read_metadata(written(tmp_path / "m.parquet", [row, {"file_path": "2.mp4"}])).records
    assert dict(first.fields) == {**row, "day": "2026-01-02"}
    assert dict(second.fields) == {"file_path": "2.mp4"}


def test_another_trainers_columns_are_told_and_bytes_are_no_row(tmp_path: Path) -> None:
    metadata = read_metadata(written(tmp_path / "m.parquet", [{"video": "1.mp4", "caption": "A dog."}]))
    assert {problem.code for problem in metadata.problems} == {"foreign-layout"}
    metadata = read_metadata(
        written(tmp_path / "b.parquet", [{"file_path": "1.mp4", "pixels": b"\0"}, {"file_path": "2"}])
    )
    (problem,) = metadata.problems
    assert (problem.row, problem.code) == (0, "malformed-row") and "pixels" in problem.message


@pytest.mark.parametrize("place", [6, 0.3, 0.6, 0.9])
def test_a_damaged_file_is_one_problem(place: float, tmp_path: Path) -> None:
    data = written(tmp_path / "m.parquet", ROWS).read_bytes()
    (tmp_path / "m.parquet").write_bytes(data[: int(len(data) * place) if place < 1 else int(place)])
    assert [problem.code for problem in read_metadata(tmp_path / "m.parquet").problems] == ["unparsable-metadata"]


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "m.parquet", ROWS)
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as raised:
        read_metadata(path)
    assert raised.value.hint == "pip install 'vfun[parquet]'"
