"""Rows that a launch has stored for its processes: what they read is what the metadata say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_media import encode_video

from vfun_cli.config.datasets import parse_data_sets
from vfun_cli.config.options import RunConfig
from vfun_cli.families import FAMILIES
from vfun_cli.metadata.records import Metadata, Record
from vfun_cli.metadata.stored import store_rows, stored_rows
from vfun_cli.plan.sets import read_rows, rows_digest
from vfun_cli.training.data.stream import row_reader

SPEC = FAMILIES["wan-s2v"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(categories=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@given(st.dictionaries(st.text(st.characters(categories=None), max_size=8), VALUES, max_size=5))
def test_a_row_is_read_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("stored") / "rows.sqlite"
    record = Record(row=7, fields=fields, raw=fields)
    store_rows(path, Metadata(path=path, format="json", rows=8, records=(record,), problems=()), "a")
    found = stored_rows(path, "a")
    assert found is not None and found[1](7) == fields and found[0].rows == 8


def rows(kind: str) -> str:
    """Two rows, of which the texts tell the numbers."""
    said = [{"file_path": f"{kind}-{number}.mp4", "text": f"{kind} {number}", "type": "video"} for number in range(2)]
    if kind == "json":
        return json.dumps(said)
    if kind == "jsonl":
        return "\n".join(map(json.dumps, said))
    return "file_path,text,type\n" + "\n".join(",".join(row.values()) for row in said)


def a_folder(folder: Path) -> None:
    folder.mkdir()
    for number in range(2):
        encode_video(folder / f"folder-{number}.mp4")
        (folder / f"folder-{number}.txt").write_text(f"folder {number}")


@pytest.mark.parametrize("sets", [["json"], ["jsonl"], ["csv"], ["folder"], ["json:2"], ["csv", "folder:0.5", "json"]])
def test_processes_read_the_same_rows_from_what_the_launch_stored(sets: list[str], tmp_path: Path) -> None:
    a_folder(tmp_path / "folder")
    for kind in ("json", "jsonl", "csv"):
        (tmp_path / f"rows.{kind}").write_text(rows(kind))
    named = [str(tmp_path / (each if each.startswith("folder") else f"rows.{each}")) for each in sets]
    config = RunConfig(train_data_meta=parse_data_sets(named, "meta"), train_data_dir=tmp_path)
    path, digest = tmp_path / "rows.sqlite", rows_digest(config.train_data_meta)
    store_rows(path, read_rows(config), digest)
    read = row_reader(config, SPEC)
    for each in (tmp_path / "folder", *tmp_path.glob("rows.*sv"), *tmp_path.glob("rows.json*")):
        each.rename(each.with_name(f"moved-{each.name}"))  # so that only what is stored is there
    again = row_reader(config, SPEC, stored=str(path), digest=digest)
    for number in range(2 * len(sets)):
        assert again(number) == read(number) and str(number % 2) in str(read(number).record["text"])


@pytest.mark.parametrize(
    "harm", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"?" * 5000)]
)
def test_without_stored_rows_the_metadata_are_read(harm: Callable[[Path], object], tmp_path: Path) -> None:
    meta, path = tmp_path / "rows.json", tmp_path / "rows.sqlite"
    meta.write_text(rows("json"))
    config = RunConfig(train_data_meta=parse_data_sets([str(meta)], "meta"), train_data_dir=tmp_path)
    digest = rows_digest(config.train_data_meta)
    store_rows(path, read_rows(config), digest)
    meta.write_text(rows("json").replace("json 0", "changed"))
    for stored, known, text in ((path, digest, "json 0"), (path, "of other rows", "changed")):
        assert row_reader(config, SPEC, stored=str(stored), digest=known)(0).record["text"] == text
    harm(path)
    assert row_reader(config, SPEC, stored=str(path), digest=digest)(0).record["text"] == "changed"


def test_what_cannot_be_stored_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "rows.sqlite"
    with pytest.raises(OSError, match=r"rows\.sqlite"):
        store_rows(path, Metadata(path=path, format="json", rows=0, records=(), problems=()), "a")
