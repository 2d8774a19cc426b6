"""What is a run's own is known, and nothing else is ever deleted, whenever a deletion is cut off."""

import json
import shutil
from pathlib import Path

import pytest

from tests.deaths import each_death
from tests.run.small_run import CONFIG, write, write_checkpoint, write_run
from vfun_cli.checkpoints import manifest
from vfun_cli.errors import CheckpointError
from vfun_cli.run import locate, ownership
from vfun_cli.run.rundir import RunDir

FOREIGN = (
    "launch_scripts/start.sh",
    "launch-machine-7/accelerate.yaml",
    "launch/notes.txt",
    "checkpoint-best/model.safetensors",
    "checkpoint-4-outputs/model.safetensors",
    ".checkpoint-best.partial/model.safetensors",
    "checkpoint-9/model.safetensors",
    "logs/notes.txt",
    "logs/rank-2.log",
    "logs/launcher.log.1",
    "logs/tensorboard/events.out.tfevents.1700000001.host.2.0",
    "sanity_check/sample-1-video.mp4",
    "samples/step-2/notes.txt",
    "samples/best/row-3.mp4",
    "metrics.jsonl.bak",
)
"""What people keep beside a run; the run had two ranks."""
FIRST_VERSION = {"id": None, "config": CONFIG}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


@pytest.mark.parametrize("stated", [{}, FIRST_VERSION], ids=["a run", "a run of the first version"])
def test_a_run_is_deleted_and_nothing_else(stated: dict[str, object], tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_run(run, **stated)
    for name in FOREIGN:
        write(tmp_path / name, "kept")
    write_checkpoint(run.checkpoint(6), "another run's")
    others = names(run.checkpoint(6))
    ownership.clear(run, 1)
    assert names(tmp_path) == {*FOREIGN, *(f"checkpoint-6/{name}" for name in others)}


def test_the_samples_of_later_steps_are_deleted_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_run(run)
    kept = names(tmp_path) - {str(path.relative_to(tmp_path)) for path in run.sample_files(after=2)}
    write(run.samples(8) / "notes.txt")
    ownership.delete_samples(run, after=2)
    assert names(tmp_path) == {*kept, "samples/step-8/notes.txt"}
    assert [step for step, _ in run.sampled()] == [2, 8] and "samples/step-2/row-3.mp4" in kept


def test_no_link_is_followed(tmp_path: Path) -> None:
    run, elsewhere = RunDir(tmp_path / "run"), tmp_path / "elsewhere"
    run_id = write_run(run, steps=(2,))
    write_checkpoint(elsewhere / "checkpoint-4", run_id)
    run.checkpoint(4).symlink_to(elsewhere / "checkpoint-4")
    (run.root / ".checkpoint-8.partial").symlink_to(elsewhere)
    run.logs.rename(elsewhere / "logs")
    run.logs.symlink_to(elsewhere / "logs")
    run.plan_json.unlink()
    run.plan_json.symlink_to(write(elsewhere / "plan.json"))
    before = names(elsewhere)
    ownership.remove_leftovers(run, 0)
    ownership.clear(run, 1)
    assert names(elsewhere) == before
    assert names(run.root) == {"checkpoint-4", "logs", "plan.json"}


def test_another_machine_of_the_new_run_keeps_what_it_has_written_already(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_run(run, config={**CONFIG, "num_machines": 3, "num_processes": 3})
    mine, gone = run.files_of_machine(1), run.files_of_machine(2)
    for path in [*mine, *gone]:
        write(path)
    ownership.clear(run, 2)
    assert all(path.exists() for path in mine) and not any(path.exists() for path in gone)


@pytest.mark.slow
def test_a_deletion_that_dies_at_any_moment_is_known_and_goes_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")

    def prepare() -> None:
        shutil.rmtree(run.root, ignore_errors=True)
        write_run(run, steps=(2,))
        write(run.root / "notes.txt")

    def after() -> None:
        if not run.holds_run() and names(run.root) != {"notes.txt"}:
            with pytest.raises(CheckpointError, match="--overwrite was stopped while it deleted"):
                run.read_run()
            assert locate.to_resume("latest", output_dir=run.root) is None
        assert not ownership.in_the_way(run, 0)
        ownership.remove_leftovers(run, 0)
        ownership.clear(run, 1)
        assert set(run.root.rglob("*")) == {run.root / "notes.txt"}

    assert each_death(prepare, lambda: ownership.clear(run, 1), after, run.root) > 20


def test_a_checkpoint_of_another_run_is_not_the_newest_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    write_run(run)
    write_checkpoint(run.checkpoint(8), "another run's")
    found = locate.checkpoint(str(tmp_path), output_dir=tmp_path)
    assert found.step == 4 and "checkpoint-8, which is newer and of another run" in " ".join(
        capsys.readouterr().err.split()
    )
    locate.require_own(found)
    with pytest.raises(CheckpointError, match="checkpoint-8 was saved by another run"):
        locate.require_own(locate.checkpoint("checkpoint-8", output_dir=tmp_path))
    assert ownership.in_the_way(run, 4) == [run.checkpoint(8)] and not ownership.in_the_way(run, 8)
    shutil.rmtree(run.checkpoint(2))
    shutil.rmtree(run.checkpoint(4))
    assert locate.newest(run) is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint of its run: checkpoint-8 is of another"):
        locate.checkpoint("latest", output_dir=tmp_path)


def test_a_checkpoint_that_should_have_been_replaced_stands_for_it_until_it_is_put_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_run(run, steps=(4,))
    run.checkpoint(4).rename(run.replaced_checkpoint(4))
    write(run.partial_checkpoint(4) / "state.json")
    found = locate.checkpoint("latest", output_dir=tmp_path)
    assert found.step == 4 and found.checkpoint == run.replaced_checkpoint(4)
    ownership.remove_leftovers(run, 0)
    manifest.verify(run.checkpoint(4))
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(ownership, "MEMORY", folder)
    return folder


def test_what_a_killed_launch_left_in_memory_goes_with_the_next_launch_of_this_directory(
    memory: Path, tmp_path: Path
) -> None:
    run, copy = RunDir(tmp_path / "run"), RunDir(tmp_path / "copy")
    staging = memory / "vfun-of-the-launch"
    ownership.make_private(staging)
    assert staging.stat().st_mode & 0o777 == 0o700
    run.root.mkdir()
    write_run(run, steps=(), staging=str(staging), directory=ownership.identity(run.root))
    shutil.copytree(run.root, copy.root)
    ownership.remove_leftovers(copy, 0)
    assert staging.is_dir(), "the run that was copied may be at work"
    link = tmp_path / "link"
    link.symlink_to(run.root.rename(tmp_path / "moved"))
    ownership.remove_leftovers(RunDir(link), 0)
    assert not staging.exists()


@pytest.mark.parametrize("named", ["../elsewhere", "vfun-link", "vfun-open", "others"])
def test_a_folder_in_memory_that_is_not_this_users_alone_is_left_alone(
    named: str, memory: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir(0o700)
    (memory / "others").mkdir(0o700)
    (memory / "vfun-link").symlink_to(tmp_path / "elsewhere")
    (memory / "vfun-open").mkdir()
    (memory / "vfun-open").chmod(0o755)
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    write_run(run, steps=(), staging=str(memory / named), directory=ownership.identity(run.root))
    ownership.remove_leftovers(run, 0)
    write_run(run, steps=(), staging=f"{memory}/vfun-\0", directory=ownership.identity(run.root))
    ownership.remove_leftovers(run, 0)
    assert (memory / named).exists()
    if named.startswith("vfun-"):
        with pytest.raises(FileExistsError):
            ownership.make_private(memory / named)


def test_files_of_ranks_that_an_earlier_launch_had_are_known(tmp_path: Path) -> None:
    first = ownership.most({"num_processes": 8, "num_machines": 2})
    assert first == {"num_processes": 8, "num_machines": 2}
    later = {**CONFIG, "num_processes": 1}
    assert ownership.most(later, {"config": later, "most": first}) == first
    alone = {"num_processes": 1, "num_machines": 1}
    assert ownership.most(later, {"config": {"num_processes": "many"}, "most": [1]}) == alone
    run = RunDir(tmp_path)
    write_run(run, steps=(), config=CONFIG | later, most=first)
    write(run.rank_log(7))
    for path in run.files_of_machine(1):
        write(path)
    ownership.clear(run, 1)
    assert not any(tmp_path.iterdir())
    described = json.dumps({"most": {"num_processes": 10**30}, "config": later})
    assert ownership.most(later, json.loads(described))["num_processes"] == 10**30
