"""A folder of media as metadata: which files are rows, twins and captions, and what is told of the others."""

import json
import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_media import SPEECH_FIELDS, encode_video, write_sound

from vfun_cli.metadata import folder as folders
from vfun_cli.metadata.checks import validate
from vfun_cli.metadata.records import Metadata, metadata_digest, read_metadata


def tree(root: Path, *names: str, **texts: str) -> Path:
    """Files of these names, empty where no text is given."""
    for name in [*names, *texts]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts.get(name, ""), encoding="utf-8")
    return root


def rows(metadata: Metadata) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in metadata.records]


def codes(metadata: Metadata) -> list[str]:
    return [problem.code for problem in metadata.problems]


@pytest.mark.parametrize(
    ("clip", "twin", "field"),
    [
        ("1.mp4", "1_control.mp4", "control_file_path"),
        ("1.mp4", "1_control.mov", "control_file_path"),
        ("1.png", "1_control.png", "control_file_path"),
        ("1.mp4", "control/1.mp4", "control_file_path"),
        ("a/1.mp4", "a/control/1.mp4", "control_file_path"),
        ("a/1.mp4", "control/a/1.mp4", "control_file_path"),
        ("train/1.mp4", "control/1.mp4", "control_file_path"),
        ("x/train/b/1.mp4", "x/control/b/1.mp4", "control_file_path"),
        ("1.mp4", "1.wav", "audio_path"),
        ("1.mp4", "1.M4A", "audio_path"),
        ("1.mp4", "audio/1.flac", "audio_path"),
        ("1.mp4", "audio/1.mp4", "audio_path"),
        ("train/1.mp4", "wav/1.wav", "audio_path"),
        ("cafe\u0301.mp4", "caf\u00e9.wav", "audio_path"),
    ],
)
def test_twins_are_found_beside_a_clip_and_by_folder(clip: str, twin: str, field: str, tmp_path: Path) -> None:
    metadata = read_metadata(tree(tmp_path, clip, twin))
    kind = "image" if clip.endswith("png") else "video"
    assert rows(metadata) == [{"file_path": clip, field: twin, "type": kind}]
    assert codes(metadata) == []


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("A dog.\n", "A dog."),
        ("\ufeff  A dog. \r\n", "A dog."),
        ("", ""),
        (" \n\n", ""),
        ("A dog.\n\n A cat.\r\n", ["A dog.", "A cat."]),
    ],
)
def test_each_line_of_a_caption_file_is_a_caption(said: str, text: Any, tmp_path: Path) -> None:
    tree(tmp_path, "1.mp4")
    (tmp_path / "1.txt").write_bytes(said.encode())
    assert rows(read_metadata(tmp_path))[0]["text"] == text


def test_a_sidecar_wins_with_the_keys_of_other_trainers_too(tmp_path: Path) -> None:
    sidecar = {"caption": "A cat.", "video": "elsewhere/9.mp4", "fps": 25, "audio_path": "voice.mp3"}
    tree(tmp_path, "1.mp4", "1.wav", **{"1.txt": "A dog.", "1.json": json.dumps(sidecar)})
    (row,) = rows(read_metadata(tmp_path))
    assert (row["file_path"], row["text"], row["fps"], row["audio_path"]) == ("1.mp4", "A cat.", 25, "voice.mp3")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.json", b"{"),
        ("1.json", b"[1]"),
        ("1.json", b"[" * 100_000),
        ("1.json", b"\xff"),
        ("1.txt", b"caf\xe9"),
        ("1.txt", b"version https://git-lfs.github.com/spec/v1\n"),
    ],
)
def test_a_damaged_file_beside_a_clip_is_a_problem_of_its_row(name: str, content: bytes, tmp_path: Path) -> None:
    tree(tmp_path, "0.mp4", "1.mp4")
    (tmp_path / name).write_bytes(content)
    metadata = read_metadata(tmp_path)
    (problem,) = metadata.problems
    assert (problem.row, problem.code, problem.path) == (1, "malformed-row", str(tmp_path / name))
    assert metadata.rows == 2 and len(metadata.records) == 1


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["1.mp4", "2.txt"], "orphan-file"),
        (["1.mp4", "2_control.mp4"], "orphan-file"),
        (["1.mp4", "2.wav"], "orphan-file"),
        (["1.mp4", "metadata.json"], "orphan-file"),
        (["1.mp4", "control/2.mp4"], "orphan-file"),
        (["1.mp4", "1.wav", "audio/1.wav"], "orphan-file"),
        (["1.mp4", "control/1.png"], "orphan-file"),
        (["1.mp4", "control/1.wav"], "orphan-file"),
        (["1.png", "1.wav"], "orphan-file"),
        (["train/1.mp4", "test/1.mp4", "control/1.mp4"], "orphan-file"),
        (["1.mp4", "1.png", "1.txt"], "shared-name"),
    ],
)
def test_what_belongs_to_no_clip_or_to_two_is_told(names: list[str], code: str, tmp_path: Path) -> None:
    assert codes(read_metadata(tree(tmp_path, *names))) == [code]


@pytest.mark.parametrize("names", [[], ["notes.md", "weights.safetensors"], ["control/1.mp4"], ["1.wav", "1.txt"]])
def test_a_folder_without_clips_is_refused_with_what_was_looked_for(names: list[str], tmp_path: Path) -> None:
    (problem,) = read_metadata(tree(tmp_path, *names)).problems
    assert problem.code == "empty-metadata" and ".mp4" in problem.message and "1.txt" in problem.message


def test_hidden_files_are_left_out_and_links_in_circles_end(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.mp4", ".2.mp4", ".cache/3.mp4", "a/._1.mp4")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert [row["file_path"] for row in rows(read_metadata(tmp_path))] == ["a/1.mp4", "b/1.mp4"]


NAMES = st.lists(
    st.builds(
        "".join,
        st.tuples(
            st.sampled_from(["", "a/", "b/", "control/", "audio/", "a/control/", "wav/b/", "control/audio/"]),
            st.sampled_from(["1", "2", "_control"]),
            st.sampled_from(["", "_control"]),
            st.sampled_from([".mp4", ".png", ".wav", ".txt", ".md", ".mov"]),
        ),
    ),
    unique=True,
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=150)
@given(NAMES, st.randoms())
def test_every_media_file_is_a_row_or_a_twin_or_told_in_any_order_of_writing(
    names: list[str], chance: random.Random
) -> None:
    found = []
    for _ in range(2):
        chance.shuffle(names)
        with TemporaryDirectory() as place:
            found.append(read_metadata(tree(Path(place), *names)))
    first, second = found
    assert rows(first) == rows(second)
    clips = [row["file_path"] for row in rows(first)]
    assert clips == sorted(set(clips))
    twins = {row[name] for row in rows(first) for name in ("audio_path", "control_file_path") if name in row}
    assert not twins & set(clips)
    if not clips:
        return
    told = {problem.message.partition(": ")[0] for problem in first.problems if problem.code == "orphan-file"}
    assert not told & (twins | set(clips))
    media = {name for name in names if folders.KINDS.get(Path(name).suffix) in ("video", "image", "sound")}
    assert media <= twins | set(clips) | told


def test_a_changed_caption_changes_the_digest_and_nothing_is_written(tmp_path: Path) -> None:
    tree(tmp_path, "1.mp4", **{"1.txt": "A dog."})
    before, listed = metadata_digest(tmp_path), sorted(os.walk(tmp_path))
    assert metadata_digest(tmp_path) == before
    (tmp_path / "1.txt").write_text("A cat.")
    assert metadata_digest(tmp_path) != before and sorted(os.walk(tmp_path)) == listed


def test_problems_of_a_folder_name_the_file_where_nobody_counts_rows(tmp_path: Path) -> None:
    encode_video(tmp_path / "1.mp4")
    write_sound(tmp_path / "1.wav")
    tree(tmp_path, **{"1.txt": ""})
    report = validate(read_metadata(tmp_path), SPEECH_FIELDS, ("video",), tmp_path)
    assert [(each.code, each.path) for each in report.problems if each.code == "empty-caption"] == [
        ("empty-caption", str(tmp_path / "1.mp4"))
    ]
    assert not report.errors
