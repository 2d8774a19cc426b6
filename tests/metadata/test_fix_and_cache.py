"""Corrected copies, the memory of headers, summaries, and rows that are believed."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console
from small_media import ROW, SPEECH_FIELDS, encode_video

from tests.disks import without_in_children
from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.metadata import probe
from vfun_cli.metadata.checks import Report, Settings, table_without_files, validate
from vfun_cli.metadata.codes import CODES
from vfun_cli.metadata.fix import write_fixed
from vfun_cli.metadata.records import read_metadata
from vfun_cli.metadata.remembered import remembered
from vfun_cli.metadata.report import codes_json, render, render_code, render_fixed, to_json, write_problems
from vfun_cli.plan.rows import check_rows_of_any_family


def test_fix_fills_in_what_the_files_say_and_leaves_bad_rows_out(data: Path, check: Callable[..., Report]) -> None:
    rows = [
        {**ROW, "width": 1, "fps": "24/1", "frames": "24"},
        {**ROW, "audio_path": "wav/9.wav"},
        {key: value for key, value in ROW.items() if key != "type"} | {"text": "Another.", "note": "kept"},
        {**ROW, "file_path": "train/2.jpg"},
    ]
    report = check(rows)
    before = (data / "metadata.json").read_bytes()
    fixed = write_fixed(report, data / "fixed.json")
    assert (fixed.kept, fixed.changed) == (2, 2)
    assert fixed.left_out == {1: ("missing-file",), 3: ("image-as-video", "control-type")}
    assert fixed.put_right == {"wrong-type": 1, "wrong-size": 1, "missing-type": 1}
    assert fixed.corrected == {"width": 1, "fps": 1, "frames": 1}
    assert fixed.filled_in == {"height": 2, "type": 1, "width": 1, "frames": 1, "fps": 1}
    assert (fixed.removed, fixed.renamed) == ({}, {})
    written = json.loads((data / "fixed.json").read_text())
    sizes = {"type": "video", "width": 64, "height": 48, "frames": 24, "fps": 24}
    assert written[0] == {**ROW, **sizes}
    assert written[1] == {**ROW, **sizes, "text": "Another.", "note": "kept"}
    assert (data / "metadata.json").read_bytes() == before
    again = validate(read_metadata(data / "fixed.json"), SPEECH_FIELDS, ("video",), data)
    assert again.ok == again.rows == 2
    assert table_without_files(read_metadata(data / "fixed.json")).frames.tolist() == [24, 24]


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
def test_fix_keeps_the_format(name: str, data: Path) -> None:
    path = data / name
    row = {**ROW, "text": 'says "hi",\r狗'}
    quoted = ",".join('"' + value.replace('"', '""') + '"' for value in row.values())
    path.write_text(json.dumps(row) + "\n" if name.endswith("l") else ",".join(row) + "\n" + quoted + "\n")
    output = data / ("fixed" + path.suffix)
    write_fixed(validate(read_metadata(path), SPEECH_FIELDS, ("video",), data), output)
    fixed = read_metadata(output)
    assert fixed.format == read_metadata(path).format
    assert dict(fixed.records[0].fields) == {**row, "width": 64, "height": 48, "frames": 24, "fps": 24}


def test_fix_never_overwrites(data: Path, check: Callable[..., Report]) -> None:
    report = check([ROW])
    with pytest.raises(ConfigError, match="is what this command reads"):
        write_fixed(report, data / "metadata.json")
    with pytest.raises(ConfigError, match="exists already"):
        write_fixed(report, data / "train/1.mp4")


def test_fix_with_no_good_row_writes_nothing(data: Path, check: Callable[..., Report]) -> None:
    with pytest.raises(MetadataError, match="no row is left"):
        write_fixed(check([{**ROW, "audio_path": "x"}]), data / "fixed.json")
    assert not (data / "fixed.json").exists()


def test_unchanged_files_are_not_read_again_and_changed_ones_are(
    data: Path, check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = data / "deeper" / "cache.sqlite"
    first = check([ROW], cache=cache, deep=True)
    opened: list[str] = []
    original = probe.probe_visual
    monkeypatch.setattr(probe, "probe_visual", lambda path: opened.append(Path(path).name) or original(path))
    second = check([ROW], cache=cache, deep=True)
    assert (opened, second.problems, second.clips) == ([], first.problems, first.clips)
    encode_video(data / "train/1.mp4", frames=22)
    assert check([ROW], cache=cache).clips[0].frames == 22
    assert opened == ["1.mp4"]


def test_a_damaged_cache_is_made_again(data: Path, check: Callable[..., Report]) -> None:
    cache = data / "cache.sqlite"
    cache.write_bytes(b"no database" * 100)
    assert check([ROW], cache=cache).ok == 1
    assert check([ROW], cache=cache).ok == 1
    assert cache.read_bytes().startswith(b"SQLite")


def test_what_is_remembered_of_other_files_is_not_read(data: Path, check: Callable[..., Report]) -> None:
    cache = data / "cache.sqlite"
    check([ROW], cache=cache)
    with closing(sqlite3.connect(cache)) as other, other:
        other.execute("INSERT INTO facts VALUES (?, 'visual', 1, 1, 1, 5)", [b"/elsewhere.mp4"])  # facts are no number
    assert check([ROW], cache=cache).ok == 1


@pytest.mark.slow
def test_a_cache_in_use_is_left_alone(data: Path, check: Callable[..., Report]) -> None:
    cache = data / "cache 100%?#.sqlite"
    check([ROW], cache=cache)
    encode_video(data / "train/1.mp4", frames=22)
    with closing(sqlite3.connect(cache)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert check([ROW], cache=cache).clips[0].frames == 22
        other.rollback()
        assert other.execute("SELECT count(*) FROM facts").fetchone() == (3,)


REMEMBER = """
import sys
from pathlib import Path
from vfun_cli.metadata.remembered import remembered
asked = []
for names in ("ab", "abc"):
    remembered(
        [(sys.argv[2], name) for name in names], lambda key: asked.append(key[1]) or "answer",
        to_text=str, from_text=str, cache=Path(sys.argv[1]), threads=1, progress=None,
    )
print("".join(asked))
"""


def test_a_cache_on_a_disk_without_locks_remembers(data: Path, tmp_path: Path) -> None:
    cache = data / "deeper" / "cache.sqlite"
    environment = os.environ | without_in_children(tmp_path, "locks")
    command = [sys.executable, "-c", REMEMBER, str(cache), str(data / "train/1.mp4")]
    for asked in (b"abc", b""):
        assert subprocess.run(command, env=environment, capture_output=True, check=True).stdout.strip() == asked
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_cache_that_fails_stops_nothing(
    code: int, data: Path, check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(code, os.strerror(code))

    for name in ("touch", "open"):
        with monkeypatch.context() as refusing:
            refusing.setattr(Path, name, refuse)
            assert remembered(
                [("a", "b")], str, to_text=str, from_text=str, cache=data / "none", threads=1, progress=None
            )
    check([ROW], cache=data / "file")
    assert check([ROW], cache=data / "file" / "inside").ok == 1, "its folder is a file"


def test_without_a_home_nothing_is_remembered_and_nothing_fails(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "metadata.json").write_text(json.dumps([ROW]))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert check_rows_of_any_family(data / "metadata.json", data).ok == 1


def test_trusted_rows_are_not_opened(data: Path, check: Callable[..., Report]) -> None:
    stated = {**ROW, "file_path": "train/elsewhere.mp4", "width": 640, "height": 480, "frames": 81, "fps": 25}
    report = check([stated, ROW], trust_metadata=True)
    assert report.ok == 2
    assert report.table().frames.tolist() == [81, 24]
    assert check([stated, ROW]).ok == 1


def test_training_refuses_bad_rows_by_name(check: Callable[..., Report]) -> None:
    report = check([ROW, {**ROW, "text": "b", "audio_path": "wav/9.wav"}])
    with pytest.raises(
        MetadataError, match=r"1 of 2 rows cannot be trained on \(counted from 0\):\n  row 1, audio_path: missing-file"
    ):
        report.require_ok()
    check([ROW]).require_ok()


def test_progress_counts_up_to_all_files(check: Callable[..., Report]) -> None:
    seen: list[tuple[str, int, int]] = []
    check([ROW], progress=lambda stage: lambda done, total: seen.append((stage, done, total)))
    assert seen[0] == ("reading headers", 0, 3) and seen[-1] == ("reading headers", 3, 3)


def test_the_json_has_the_promised_keys(check: Callable[..., Report], tmp_path: Path) -> None:
    report = check([ROW, {**ROW, "text": "b", "audio_path": "wav/9.wav"}])
    found = to_json(report)
    assert (found["rows"], found["ok"]) == (2, 1)
    (problem,) = [problem for problem in found["problems"] if problem["severity"] == "error"]
    assert problem["path"].endswith("wav/9.wav")
    said = {
        "path": problem["path"],
        "row": 1,
        "field": "audio_path",
        "code": "missing-file",
        "severity": "error",
        "message": "no such file",
    }
    assert problem == said
    write_problems(report, tmp_path / "problems.jsonl")
    assert [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()] == found["problems"]


def test_the_summary_shows_counts_rows_and_totals(check: Callable[..., Report], data: Path) -> None:
    report = check([ROW, {**ROW, "text": "b [/] c", "audio_path": "wav/9.wav"}])
    console = Console(record=True, width=110, file=(data / "out").open("w"))
    render(report, console)
    render_fixed(write_fixed(report, data / "fixed.json"), console)
    render_code("silent-audio", console)
    render_code("all", console)
    text = console.export_text()
    for part in (
        "missing-file",
        "1 of 2 rows cannot be trained on",
        "64x48",
        "24 (1)",
        "left out: 1 row (counted from 0)",
        "-60 dB",
    ):
        assert part in text
    assert [code["name"] for code in codes_json("all")["codes"]] == list(CODES)


def test_an_unknown_code_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'silent-audio'"):
        render_code("silent-adio", Console())


def test_settings_default_to_no_cache_and_headers_only() -> None:
    assert Settings().cache is None and not Settings().deep


@pytest.mark.parametrize("name", ["m.json", "m.csv"])
def test_fix_says_what_it_renamed_and_changes_nothing_that_is_right(name: str, data: Path) -> None:
    row = {"video": "train/1.mp4", "caption": "A ball.", "type": "video", "width": 64, "height": 48, "frames": 24}
    text = json.dumps([{**row, "fps": 24}]) if name == "m.json" else ",".join([*row, "fps"]) + "\n"
    if name == "m.csv":
        text += ",".join(map(str, [*row.values(), 24])) + "\n"
    (data / name).write_text(text)
    fields = tuple(field for field in SPEECH_FIELDS if field.media != "audio")
    fixed = write_fixed(validate(read_metadata(data / name), fields, ("video",), data), data / ("fixed" + name))
    assert fixed.renamed == {("video", "file_path"): 1, ("caption", "text"): 1}
    assert (fixed.filled_in, fixed.corrected, fixed.removed, fixed.changed) == ({}, {}, {}, 1)
    again = write_fixed(validate(read_metadata(fixed.output), fields, ("video",), data), data / ("again" + name))
    assert (again.changed, again.renamed) == (0, {})


@pytest.mark.slow
def test_a_clip_that_was_cut_off_has_one_problem(data: Path, check: Callable[..., Report]) -> None:
    for name in ("wav/1.wav", "control/1.mp4", "train/1.mp4"):
        if name.endswith("mp4"):
            encode_video(data / name, options={"movflags": "faststart"})
        whole = (data / name).read_bytes()
        (data / name).write_bytes(whole[: len(whole) * 2 // 3])
        found = [problem.code for problem in check([ROW], deep=True).problems]
        assert found == ["truncated-media"], name
        (data / name).write_bytes(whole)
