"""``vfun checkpoints``: what there is, whether it is whole, what changed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_checkpointer import checkpointer, progress, step, trained
from vfun_cli.main import main
from vfun_cli.run.rundir import RunDir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Steps 1 and 2 of a run, and the remains of a third."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "config.json").write_text("{}")
    found = RunDir(folder / "run")
    found.root.mkdir()
    state, saver = trained(), checkpointer(found)
    saver.save(state, progress(1))
    step(state)
    saver.save(state, progress(2))
    found.checkpoint(3).mkdir()
    (found.checkpoint(3) / "state.json").write_text("{}")
    return found


def vfun(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out)


def test_ls_tells_the_complete_from_the_rest(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = vfun(capsys, "checkpoints", "ls", str(run.root))
    rows = said["checkpoints"]
    assert code == 0
    assert [(row["step"], row["complete"], row["strategy"]) for row in rows] == [
        (1, True, "single"),
        (2, True, "single"),
        (3, False, None),
    ]
    assert "manifest.json" in rows[2]["problem"]


def test_ls_for_people_names_every_checkpoint(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoints", "ls", str(run.root)])
    said = capsys.readouterr().out
    assert "checkpoint-1" in said and "single on 1" in said and "complete" in said


def test_verify_reads_every_byte(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = vfun(capsys, "checkpoints", "verify", str(run.checkpoint(2)))
    assert (code, said["verified"], said["files"], said["tensors"]) == (0, True, 4, 12)


def test_verify_names_the_damaged_file(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = trained()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    path = checkpointer(RunDir(tmp_path / "run")).save(state, progress(1))
    file = path / "model" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, said = vfun(capsys, "checkpoints", "verify", str(path))
    assert code == 5
    assert "optimizer.safetensors" in said["error"]["message"]


def test_diff_compares_options_weights_and_moments(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    code, same = vfun(capsys, "checkpoints", "diff", str(run.checkpoint(1)), str(run.checkpoint(1)))
    assert (code, same["same"], same["changed"]) == (0, True, {})
    code, other = vfun(capsys, "checkpoints", "diff", str(run.checkpoint(1)), str(run.checkpoint(2)))
    assert (code, other["same"], other["changed"]) == (0, False, {"step": [1, 2]})
    assert other["weights"]["different"] and other["moments"]["different"]
    assert all(distance > 0 for distance in other["weights"]["different"].values())


def test_a_directory_that_is_not_there_is_exit_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vfun(capsys, "checkpoints", "ls", str(tmp_path / "none"))[0] == 5
