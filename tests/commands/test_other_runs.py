"""A directory that holds another run, or that another command uses meanwhile: nothing that was saved is lost."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import TRAIN, Vfun
from tests.run.small_run import write_checkpoint
from vfun_cli.launch import supervise
from vfun_cli.launch.machines import Machine
from vfun_cli.run import lock, ownership
from vfun_cli.run.messages import Outcome
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.usefixtures("never_trains")

A, B = RunDir(Path("A")), RunDir(Path("B"))


def runs_in(*runs: RunDir) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for run in runs for path in run.root.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }  # fmt: skip


def trained(vfun: Vfun, run: RunDir, *more: str) -> None:
    said = vfun(*TRAIN, "--output-dir", str(run.root), *more)
    assert said.code == 0, said.err


@pytest.mark.slow
def test_an_output_directory_that_holds_another_run_is_refused_however_a_run_continues(vfun: Vfun) -> None:
    trained(vfun, A)
    trained(vfun, B)
    assert A.read_run()["id"] != B.read_run()["id"]
    before = runs_in(A, B)
    for command in (
        ("resume", "A", "--max-train-steps", "6", "--output-dir", "B"),
        (*TRAIN, "--max-train-steps", "6", "--resume-from-checkpoint", "A/checkpoint-4", "--output-dir", "B"),
    ):
        said = vfun(*command)
        assert said.code == 2 and "B already holds a run" in said.err, said.err
    assert runs_in(A, B) == before
    trained(vfun, B, "--max-train-steps", "6", "--resume-from-checkpoint", "A/checkpoint-4", "--overwrite")
    assert B.read_run()["id"] not in (A.read_run()["id"], None) and B.read_run()["resume"].endswith("A/checkpoint-4")
    continued = vfun("resume", "B", "--max-train-steps", "8")
    assert continued.code == 0, continued.err
    assert runs_in(A) == {name: content for name, content in before.items() if name.startswith("A/")}


def test_a_run_does_not_begin_where_a_checkpoint_of_another_lies(vfun: Vfun) -> None:
    trained(vfun, A)
    write_checkpoint(A.checkpoint(6), "another run's")
    before = runs_in(A)
    for command in (("resume", "A", "--max-train-steps", "8"), (*TRAIN, "--output-dir", "A", "--overwrite")):
        said = vfun(*command)
        assert said.code == 2 and "A holds checkpoint-6, which this run did not save" in said.err, said.err
    said = vfun("resume", "A/checkpoint-6", "--max-train-steps", "8")
    assert said.code == 5 and "checkpoint-6 was saved by another run" in " ".join(said.err.split()), said.err
    assert runs_in(A) == before
    listed = vfun("checkpoints", "ls", "A")
    assert "saved by another run" in listed.out and "complete" in listed.out, listed.out
    A.checkpoint(6).rename("elsewhere")
    assert vfun(*shlex.split(said.err.partition("next: vfun ")[2]), "--max-train-steps", "8").code == 0


Slip = Callable[[], None]


@pytest.fixture
def slips_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Slip], None]:
    """Lets another command run to its end between a command's look and its lock."""
    held = lock.held

    def when_locked(act: Slip) -> None:
        acts = [act]

        @contextmanager
        def late(*arguments: Any) -> Iterator[Any]:
            if acts:
                acts.pop()()
            with held(*arguments) as inside:
                yield inside

        monkeypatch.setattr(lock, "held", late)

    return when_locked


@pytest.mark.parametrize("more", [(), ("--resume-from-checkpoint", "latest")], ids=["train", "latest"])
def test_a_run_that_another_command_finished_before_the_lock_is_not_deleted(
    more: tuple[str, ...], vfun: Vfun, slips_in: Callable[[Slip], None]
) -> None:
    slips_in(lambda: trained(vfun, A))
    said = vfun(*TRAIN, "--output-dir", "A", *more)
    assert said.code == 2 and "A already holds a run" in said.err, said.err
    assert (A.checkpoint(4) / "state.json").exists()


def test_a_run_that_changed_before_the_lock_is_not_continued_from_what_it_was(
    vfun: Vfun, slips_in: Callable[[Slip], None]
) -> None:
    trained(vfun, A)
    slips_in(lambda: trained(vfun, A, "--overwrite"))
    said = vfun("resume", "A", "--max-train-steps", "6")
    assert said.code == 2 and "another vfun command was at work in A" in said.err, said.err
    assert vfun("resume", "A", "--max-train-steps", "6").code == 0


def test_an_overwrite_that_was_stopped_half_way_says_so_and_goes_on(
    vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(vfun, A)
    first = A.read_run()["id"]
    with monkeypatch.context() as patch:
        patch.setattr(ownership, "delete", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        assert vfun(*TRAIN, "--output-dir", "A", "--overwrite").code == 130
    resumed = vfun("resume", "A")
    assert resumed.code == 5 and "--overwrite was stopped while it deleted" in " ".join(resumed.err.split()), (
        resumed.err
    )
    again = vfun(*TRAIN, "--output-dir", "A")
    assert again.code == 0 and "stopped half-way; it goes on" in " ".join(again.err.split()), again.err
    assert A.read_run()["id"] != first and not A.deleted_json.exists()


def test_the_folder_in_memory_is_made_for_one_launch_and_this_user(
    vfun: Vfun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(ownership, "MEMORY", memory)
    seen = []

    def launch(argv: list[str], machine: Machine, *args: Any, **named: Any) -> Outcome:
        staging = Path(machine.run.read_run()["staging"])
        seen.append((staging, staging.stat().st_mode & 0o777))
        return Outcome(ending="completed", step=4)

    monkeypatch.setattr(supervise, "launch", launch)
    trained(vfun, A, "--async-checkpoint")
    trained(vfun, A, "--async-checkpoint", "--overwrite")
    (first, mode), (second, _) = seen
    assert first != second and mode == 0o700 and not any(memory.iterdir())
    memory.rmdir()
    said = vfun(*TRAIN, "--output-dir", "A", "--async-checkpoint", "--overwrite")
    assert said.code == 6 and "--async-checkpoint keeps a checkpoint in" in said.err, said.err
