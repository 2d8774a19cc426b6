"""A directory is a checkpoint when its manifest says so, and only then."""

import json
from pathlib import Path

import pytest

from vfun_cli.checkpoints.manifest import checkpoints, is_complete, newest_checkpoint, verify, write_manifest
from vfun_cli.errors import CheckpointError


def _checkpoint(directory: Path, *, manifest: bool = True) -> Path:
    (directory / "model").mkdir(parents=True)
    (directory / "state.json").write_text("{}")
    (directory / "model" / "é weights").write_bytes(b"abc" * 1000)
    if manifest:
        write_manifest(directory)
    return directory


def test_a_manifest_lists_every_file_with_size_and_hash(tmp_path: Path) -> None:
    directory = _checkpoint(tmp_path / "checkpoint-1")
    files = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert files.keys() == {"state.json", "model/é weights"}
    assert files["model/é weights"]["bytes"] == 3000
    verify(directory)


def test_what_others_have_described_is_taken_as_they_say_and_must_be_there(tmp_path: Path) -> None:
    directory = _checkpoint(tmp_path / "checkpoint-1", manifest=False)
    weights = directory / "model" / "é weights"
    theirs = {"model/é weights": {"bytes": 3000, "sha256": "what the writer found"}}
    write_manifest(directory, theirs)
    files = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert list(files) == ["model/é weights", "state.json"] and files["model/é weights"] == theirs["model/é weights"]
    (directory / "manifest.json").unlink()
    for spoil in (lambda: weights.write_bytes(b"cut"), weights.unlink):
        spoil()
        with pytest.raises(CheckpointError, match=r"é weights was written by another process.* share one --output-dir"):
            write_manifest(directory, theirs)
        assert not is_complete(directory)


def test_damage_is_named(tmp_path: Path) -> None:
    directory = _checkpoint(tmp_path / "checkpoint-1")
    file = directory / "model" / "é weights"
    file.write_bytes(b"abd" * 1000)
    verify(directory, deep=False)  # the size still fits
    with pytest.raises(CheckpointError, match="é weights has other contents"):
        verify(directory, deep=True)
    file.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="3 bytes instead of 3000"):
        verify(directory, deep=False)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        verify(directory, deep=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 2}',
        '{"schema": 1, "files": {}}',
        '{"schema": 1, "files": {"a": 1}}',
        '{"schema": 1, "files": {"../a": {"bytes": 1, "sha256": ""}}}',
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, text: str) -> None:
    directory = _checkpoint(tmp_path / "checkpoint-1")
    (directory / "manifest.json").write_text(text)
    assert not is_complete(directory)
    with pytest.raises(CheckpointError):
        verify(directory)


def test_the_newest_complete_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    for step in (50, 100, 9):
        _checkpoint(tmp_path / f"checkpoint-{step}")
    _checkpoint(tmp_path / "checkpoint-150", manifest=False)
    _checkpoint(tmp_path / ".checkpoint-200.tmp")
    _checkpoint(tmp_path / "checkpoint-100-outputs")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-50", "checkpoint-100"]
    assert newest_checkpoint(tmp_path).name == "checkpoint-100"


def test_without_a_complete_checkpoint_the_incomplete_ones_are_named(tmp_path: Path) -> None:
    _checkpoint(tmp_path / "checkpoint-3", manifest=False)
    with pytest.raises(CheckpointError, match="checkpoint-3"):
        newest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        newest_checkpoint(tmp_path / "absent")
