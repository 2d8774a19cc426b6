"""Corrected copies, the memory of headers, summaries, and rows that are believed."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console
from small_media import ROW, SPEECH_FIELDS, encode_video

from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.metadata import probe
from vfun_cli.metadata.checks import Report, Settings, table_without_files, validate
from vfun_cli.metadata.codes import CODES
from vfun_cli.metadata.fix import write_fixed
from vfun_cli.metadata.records import read_metadata
from vfun_cli.metadata.report import codes_json, render, render_code, render_fixed, to_json, write_problems


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
    row = {**ROW, "text": 'says "hi", 狗'}
    quoted = ",".join('"' + value.replace('"', '""') + '"' for value in row.values())
    path.write_text(json.dumps(row) + "\n" if name.endswith("l") else ",".join(row) + "\n" + quoted + "\n")
    output = data / ("fixed" + path.suffix)
    write_fixed(validate(read_metadata(path), SPEECH_FIELDS, ("video",), data), output)
    fixed = read_metadata(output)
    assert fixed.format == read_metadata(path).format
    assert dict(fixed.records[0].fields) == {**row, "width": 64, "height": 48, "frames": 24, "fps": 24}


def test_fix_never_overwrites(data: Path, check: Callable[..., Report]) -> None:
    report = check([ROW])
    with pytest.raises(ConfigError, match="exists already"):
        write_fixed(report, data / "metadata.json")


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


def test_a_cache_in_use_is_left_alone(data: Path, check: Callable[..., Report]) -> None:
    cache = data / "cache 100%?#.sqlite"
    check([ROW], cache=cache)
    encode_video(data / "train/1.mp4", frames=22)
    with closing(sqlite3.connect(cache)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert check([ROW], cache=cache).clips[0].frames == 22
        other.rollback()
        assert other.execute("SELECT count(*) FROM facts").fetchone() == (3,)


def test_trusted_rows_are_not_opened(data: Path, check: Callable[..., Report]) -> None:
    stated = {**ROW, "file_path": "train/elsewhere.mp4", "width": 640, "height": 480, "frames": 81, "fps": 25}
    report = check([stated, ROW], trust_metadata=True)
    assert report.ok == 2
    assert report.table().frames.tolist() == [81, 24]
    assert check([stated, ROW]).ok == 1


def test_training_refuses_bad_rows_by_name(check: Callable[..., Report]) -> None:
    report = check([ROW, {**ROW, "text": "b", "audio_path": "wav/9.wav"}])
    with pytest.raises(MetadataError, match=r"1 of 2 rows cannot be trained on:\n  row 1, audio_path: missing-file"):
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
    for part in ("missing-file", "1 of 2 rows cannot be trained on", "64x48", "24 (1)", "left out row 1", "-60 dB"):
        assert part in text
    assert [code["name"] for code in codes_json("all")["codes"]] == list(CODES)


def test_an_unknown_code_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'silent-audio'"):
        render_code("silent-adio", Console())


def test_settings_default_to_no_cache_and_headers_only() -> None:
    assert Settings().cache is None and not Settings().deep
