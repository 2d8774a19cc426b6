"""metrics.jsonl after kills, full disks and power cuts: readers pass over what is no record, and a run goes on."""

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deaths import each_death
from vfun_cli.launch.progress import NewSteps, shown
from vfun_cli.run import metrics_file
from vfun_cli.run.metrics_file import MetricsFile, only_reports


def step(number: int) -> bytes:
    return json.dumps({"step": number, "loss": 0.5}).encode() + b"\n"


WHOLE = step(1) + step(2) + step(3)
DAMAGE: dict[str, bytes] = {
    "half a line": WHOLE + step(4)[:9],
    "no end of the last line": WHOLE.rstrip(b"\n"),
    "zeros at the end": WHOLE + bytes(4096),
    "zeros in a line": step(1) + bytes(9) + b"\n" + step(2) + step(3),
    "half a line in the middle": step(1) + step(2)[:9] + b"\n" + step(2) + step(3),
    "two lines in one": step(1) + step(2)[:9] + step(2) + step(2) + step(3),
    "no text": step(1) + b"\xff\xfe\x80\n" + step(2) + step(3),
    "a surrogate": step(1) + b'{"step": "\\ud800"}\n' + step(2) + step(3),
    "no object": b"[1]\n7\nnull\n" + WHOLE,
    "no step": b"{}\n" + WHOLE,
    "a step that is none": b'{"step": "one"}\n{"step": null}\n' + WHOLE,
    "a number of many digits": b'{"step": ' + b"9" * 5000 + b"}\n" + WHOLE,
    "deep": b"[" * 100_000 + b"\n" + WHOLE,
    "ends of other systems": WHOLE.replace(b"\n", b"\r\n"),
    "empty lines": b"\n\n" + WHOLE + b"\n\n",
}


def steps(path: Path) -> list[int]:
    """Of strict JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return [json.loads(line, parse_constant=refuse)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_repaired_by_the_run_that_goes_on(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(DAMAGE[damage])
    assert [record["step"] for record in NewSteps(path, 0).read()][:2] == [1, 2]
    file = MetricsFile(path, last_step=2)
    file.write({"step": 3, "loss": math.nan, "more": [math.inf, {"norm": -math.inf}]})
    file.close()
    assert steps(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3, "loss": None, "more": [None, {"norm": None}]}
    assert list(tmp_path.iterdir()) == [path]


def test_no_line_ends_what_shows_the_progress(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with shown(path, 0) as show_new:
        for content in (*DAMAGE.values(), b'{"step": 1, "loss": null}\n'):
            path.write_bytes(content)
            show_new()
        path.unlink()
        path.mkdir()
        show_new()


@pytest.mark.slow
def test_death_at_any_moment_of_repairing_loses_no_step_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def after() -> None:
        MetricsFile(path, last_step=2).close()
        assert steps(path) == [1, 2]

    deaths = each_death(
        lambda: path.write_bytes(WHOLE + step(4)[:9]), lambda: MetricsFile(path, last_step=2), after, tmp_path
    )
    assert deaths >= 3


def test_a_full_disk_costs_lines_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, write = tmp_path / "metrics.jsonl", os.write
    room = [100, 10, 0, 0, 100, 100]

    def short(file: int, content: bytes) -> int:
        free = room.pop(0)
        if not free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content[:free])

    monkeypatch.setattr(metrics_file.os, "write", short)
    file = MetricsFile(path)
    for number in range(1, 7):
        file.write({"step": number})
    assert [record["step"] for record in NewSteps(path, 0).read()] == [1, 5, 6]
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and "goes on" in said


@pytest.mark.parametrize("in_the_way", [Path.mkdir, lambda path: path.parent.rmdir()], ids=["a folder", "no folder"])
def test_a_file_that_cannot_be_opened_costs_the_report_alone(
    in_the_way: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    in_the_way(path)
    file = MetricsFile(path)
    file.write({"step": 1})
    file.close()
    assert "goes on" in capsys.readouterr().err


def test_ctrl_c_is_no_failed_report() -> None:
    with pytest.raises(KeyboardInterrupt), only_reports("this cannot be reported"):
        raise KeyboardInterrupt
