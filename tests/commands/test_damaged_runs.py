"""What resume says to a run that is finished, changed or damaged: the right exit code, what and where, nothing lost."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.commands.conftest import ENDLESS, TRAIN, Vfun, digest
from tests.disks import file_system, make_read_only
from tests.jobs import finish, start, wait_for_step
from vfun_cli.checkpoints import manifest
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

OUTPUT = Path("vfun-demo/output_dir")
FURTHER = ("resume", "--demo", "--max-train-steps", "6")


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A copy of a run with checkpoints 2 and 4, in the working directory."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return RunDir(OUTPUT)


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def test_resume_with_another_learning_rate_is_refused_and_allowed_by_name(
    trained: Path, monkeypatch: pytest.MonkeyPatch, vfun: Vfun
) -> None:
    monkeypatch.chdir(trained)
    before = digest(trained)
    said = vfun("resume", "--demo", "--learning-rate", "0.5", "--max-train-steps", "6")
    assert said.code == 5
    assert re.search(r"learning_rate \S+ -> 0.5", said.err) and "--allow learning-rate" in said.err
    assert "max_train_steps" not in said.err, "a longer run is the same run"
    assert digest(trained) == before
    allowed = vfun("resume", "--demo", "--learning-rate", "0.5", "--allow", "learning-rate", "--dry-run", "--json")
    assert allowed.code == 0, allowed.err
    assert json.loads(allowed.out)["config"]["learning_rate"] == 0.5


def test_resuming_a_finished_run_says_so_and_starts_nothing(
    trained: Path, monkeypatch: pytest.MonkeyPatch, vfun: Vfun
) -> None:
    monkeypatch.chdir(trained)
    log = RunDir(trained / OUTPUT).launcher_log().read_bytes()
    said = vfun("resume", "--demo")
    assert said.code == 0 and "done: 4 steps" in said.out and "--max-train-steps" in said.err
    assert RunDir(trained / OUTPUT).launcher_log().read_bytes() == log


def test_a_changed_byte_in_any_file_of_the_newest_checkpoint_is_named_and_nothing_started(
    run: RunDir, vfun: Vfun
) -> None:
    before = content(run.checkpoint(2))
    log = run.launcher_log().read_bytes()
    files = [path for path in run.checkpoint(4).rglob("*") if path.is_file() and path.name != manifest.MANIFEST]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        path.write_bytes(damaged)
        said = vfun(*FURTHER)
        assert said.code == 5, said.err
        assert path.name in said.err and "next:" in said.err and "Traceback" not in said.err, said.err
        path.write_bytes(whole)
    assert content(run.checkpoint(2)) == before
    assert run.launcher_log().read_bytes() == log


EDITS: dict[str, Callable[[str], str]] = {
    "size": lambda text: text.replace('"bytes": ', '"bytes": 1', 1),
    "hash": lambda text: text.replace('"sha256": "', '"sha256": "0', 1),
    "name": lambda text: text.replace("model/", "../model/", 1),
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused_by_name_and_passed_over_with_a_warning(
    edit: str, run: RunDir, vfun: Vfun
) -> None:
    before = content(run.checkpoint(2))
    path = run.checkpoint(4) / manifest.MANIFEST
    path.write_text(EDITS[edit](path.read_text()))
    said = vfun("resume", str(run.checkpoint(4)), "--max-train-steps", "6")
    assert said.code == 5 and "checkpoint-4" in said.err and "Traceback" not in said.err, said.err
    if edit == "hash":  # found when every byte is read, before anything is started
        return
    planned = vfun(*FURTHER, "--dry-run", "--json")
    assert planned.code == 0 and "passed over" in planned.err and "checkpoint-4" in planned.err, planned.err
    (described,) = [text for path, text in json.loads(planned.out)["files"].items() if path.endswith("run.json")]
    assert json.loads(described)["resume"].endswith("checkpoint-2")
    assert content(run.checkpoint(2)) == before


def test_a_checkpoint_of_another_model_is_refused(run: RunDir, vfun: Vfun) -> None:
    before = content(run.root)
    checkpoint = str(run.checkpoint(4))
    other = Path("vfun-demo/cogvideox-fun")
    resumed = vfun("resume", checkpoint, "--pretrained-model-name-or-path", str(other / "model"))
    assert resumed.code == 5 and "cogvideox-fun/model" in " ".join(resumed.err.split()), resumed.err
    taken = vfun("train", "cogvideox-fun", "--demo", "--output-dir", "other", "--resume-from-checkpoint", checkpoint)
    assert taken.code == 5, taken.err
    assert content(run.root) == before


@pytest.fixture
def read_only(run: RunDir) -> Iterator[RunDir]:
    """The same run on a file system that cannot be written."""
    with file_system(Path("read-only").absolute()) as place:
        shutil.copytree(run.root, place / "run")
        make_read_only(place)
        yield RunDir(place / "run")


def test_a_read_only_directory_is_refused_before_anything_is_started(read_only: RunDir, vfun: Vfun) -> None:
    before = content(read_only.root)
    for command in (
        ("resume", str(read_only.root), "--max-train-steps", "6"),
        (*TRAIN, "--output-dir", str(read_only.root.with_name("new"))),
        (*TRAIN, "--output-dir", str(read_only.root), "--overwrite"),
    ):
        said = vfun(*command)
        assert said.code == 6 and "Read-only file system" in said.err and "Traceback" not in said.err, said.err
    assert content(read_only.root) == before


def test_a_directory_that_vanishes_while_it_is_trained_in_is_named_and_not_made_anew(place: Path) -> None:
    job = start(*ENDLESS)
    run, moved = RunDir(place / OUTPUT), place / "moved"
    wait_for_step(run, 3, job)
    run.root.rename(moved)
    said = finish(job, 1)
    assert "vanished" in said.err and "fault of vfun" not in said.err, said.err
    assert not run.root.exists()
    manifest.verify(moved / "checkpoint-2")
