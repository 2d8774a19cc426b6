"""Whatever metadata and media hold, validation ends with a report."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from small_media import ROW, SPEECH_FIELDS

from vfun_cli.errors import VfunError
from vfun_cli.metadata.checks import Settings, validate
from vfun_cli.metadata.clip_needs import ClipNeeds
from vfun_cli.metadata.facts import Failure
from vfun_cli.metadata.fix import write_fixed
from vfun_cli.metadata.probe import probe_many
from vfun_cli.metadata.records import read_metadata
from vfun_cli.metadata.report import render, to_json

KEYS = st.sampled_from([*ROW, "width", "height", "frames", "fps"]) | st.text(max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(list(ROW.values()))
    | st.sampled_from(["train/2.jpg", "../x", "/", "30000/1001", "[/red]", "\ud800", "a" * 5000, "image"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
ROWS = st.lists(st.dictionaries(KEYS, VALUES, max_size=8).map(lambda change: {**ROW, **change}) | VALUES, max_size=4)
FUZZ = settings(max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def report_on(path: Path, root: Path, cache: Path) -> dict[str, Any]:
    """Everything the command does with a file: validate, render, JSON, table, fix."""
    report = validate(
        read_metadata(path), SPEECH_FIELDS, ("video",), root,
        needs=ClipNeeds(min_frames=5, stride=2, max_fps=30), settings=Settings(threads=1, cache=cache),
    )  # fmt: skip
    with (path.parent / "out.txt").open("w", encoding="utf-8") as out:
        render(report, Console(file=out, width=100, markup=False))
    printed = json.loads(json.dumps(to_json(report), ensure_ascii=False).encode("utf-8"))
    assert (
        printed["ok"] + len({p["row"] for p in printed["problems"] if p["severity"] == "error"} - {None}) == report.rows
    )
    assert len(report.table()) == report.ok
    output = path.parent / "fixed"
    output.unlink(missing_ok=True)
    try:
        write_fixed(report, output)
    except VfunError:
        return printed
    assert read_metadata(output).problems == ()
    return printed


@pytest.mark.slow
@FUZZ
@given(rows=ROWS)
def test_mutated_rows_never_end_in_a_traceback(rows: list[Any], clean_files: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(rows))
    assert report_on(path, clean_files, tmp_path / "cache")["rows"] == len(rows)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_mutated_bytes_never_end_in_a_traceback(data: st.DataObject, clean_files: Path, tmp_path: Path) -> None:
    kind = data.draw(st.sampled_from(["json", "jsonl", "csv", "txt"]))
    plain = {
        "json": json.dumps([ROW, ROW], indent=1),
        "jsonl": json.dumps(ROW) + "\n" + json.dumps(ROW),
        "csv": ",".join(ROW) + "\n" + ",".join(ROW.values()),
        "txt": json.dumps([ROW]),
    }
    content = bytearray(plain[kind].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"\n", b",", b"{"])
        )
        content = content or bytearray(b"[")
    path = tmp_path / f"m.{kind}"
    path.write_bytes(bytes(content))
    report_on(path, clean_files, tmp_path / "cache")


@pytest.mark.parametrize("seed", range(60))
def test_damaged_media_end_in_facts_or_a_failure(seed: int, data: Path) -> None:
    rng = random.Random(seed)
    name = ("train/1.mp4", "wav/1.wav", "train/2.jpg")[seed % 3]
    content = bytearray((data / name).read_bytes())
    if seed % 4 == 3:
        content = content[: rng.randrange(len(content))]
    else:
        for _ in range(rng.choice([1, 4, 40])):
            # Headers are short: half of the hits go where they hurt.
            start = content.find(b"moov") if rng.random() < 0.5 and b"moov" in content else 0
            content[rng.randrange(start, len(content))] = rng.randrange(256)
    path = data / f"broken{Path(name).suffix}"
    path.write_bytes(bytes(content))
    found = probe_many([(str(path), "visual"), (str(path), "audio")], threads=1)
    assert len(found) == 2
    assert all(not isinstance(facts, Failure) or (facts.code and facts.message) for facts in found.values())


def test_damaged_media_end_in_an_answer_when_everything_is_decoded(data: Path) -> None:
    rng = random.Random(5)
    rows = []
    for number in range(20):
        content = bytearray((data / "train/1.mp4").read_bytes())
        for _ in range(30):
            content[rng.randrange(48, len(content))] = rng.randrange(256)
        (data / f"train/x{number}.mp4").write_bytes(bytes(content))
        rows.append({**ROW, "file_path": f"train/x{number}.mp4"})
    path = data / "m.json"
    path.write_text(json.dumps(rows))
    report = validate(
        read_metadata(path), SPEECH_FIELDS, ("video",), data, settings=Settings(threads=1, deep=True, deep_timeout=20)
    )
    assert report.rows == 20 and report.ok < 20
    assert {problem.code for problem in report.problems} & {"decode-error", "unreadable-media"}
