"""The vfun command as a function, and a folder with a demo to break."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Said, vfun_process
from tests.run.small_run import write_checkpoint
from vfun_cli import families
from vfun_cli.demo import default as demo_default
from vfun_cli.launch import supervise
from vfun_cli.launch.machines import Machine
from vfun_cli.main import main
from vfun_cli.run.messages import Outcome

DEMO_FAMILIES = ("wan-s2v", "cogvideox-fun")
TRAIN = ("train", "wan-s2v", "--demo")
QUICK = (
    "--no-enable-bucket", "--video-sample-size", "64", "--token-sample-size", "64", "--dataloader-num-workers", "0",
)  # fmt: skip
"""Options of a run whose clips do not matter: as small as they can be, decoded by the process that trains."""
TRAINED = (*QUICK, "--max-train-steps", "4", "--checkpointing-steps", "2", "--gradient-accumulation-steps", "2")
"""Options of the run that tests share."""
ENDLESS = (*TRAIN, *QUICK, "--max-train-steps", "10000", "--checkpointing-steps", "2")
"""A run that is ended from outside."""


Vfun = Callable[..., Said]


@pytest.fixture
def vfun(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Vfun:
    """Runs vfun in this process, on a terminal of 80 columns that is none."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Said:
        capfd.readouterr()
        code = 0
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capfd.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demos of two families, made once; never run in."""
    folder = tmp_path_factory.mktemp("pristine")
    before = Path.cwd()
    os.chdir(folder)
    for name in DEMO_FAMILIES:
        demo_default.make(families.find(name))
    os.chdir(before)
    return folder


@pytest.fixture
def place(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with copies of the demos, free to break."""
    folder = tmp_path / "place"
    shutil.copytree(pristine, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def trained(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished demo run of four steps, of two micro-batches on one process; never changed."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        vfun_process(*TRAIN, *TRAINED, code=0)
    return folder


def digest(folder: Path) -> dict[str, str]:
    """Every file under a folder with the hash of its content, run directories left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "output_dir" not in path.relative_to(folder).parts
    }


@pytest.fixture
def never_trains(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch writes what a run has after four steps: for tests of what commands do before and after a training."""

    def launch(argv: list[str], machine: Machine, *args: Any, **named: Any) -> Outcome:
        run, described = machine.run, machine.run.read_run()
        write_checkpoint(run.checkpoint(4), described["id"], run_config=described["config"])
        return Outcome(ending="completed", step=4)

    monkeypatch.setattr(supervise, "launch", launch)
