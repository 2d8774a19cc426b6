"""What in a directory is a run's own, and how that is deleted: leftovers of a crash, old checkpoints, a whole run.

A checkpoint is the run's whose id its state names, a file is the run's if it has a name that this run gives. Nothing
else is deleted, and no link is followed. What is to go is first renamed to a name that says so, so that a deletion
that is cut off is known as one and finished by the next command.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.state import read_state
from vfun_cli.disks.abilities import fsync_directory
from vfun_cli.errors import CheckpointError
from vfun_cli.run.rundir import RunDir, read_description, write_atomically
from vfun_cli.typed_json import Check, file_inside, items, read_object

MEMORY = Path("/dev/shm")
"""Where files are kept in this machine's memory; other users and other containers may see it."""

_LEFTOVER = re.compile(r"\.{1,2}checkpoint-(\d+)\.(partial|partial-from-\d+(\.tmp)?|replaced|deleted)")
NOTED: Mapping[str, Check] = {"files": items(file_inside)}
_MOST_RANKS = 4096
"""Of which files are looked for: run.json can be edited."""


def new_id() -> str:
    """For a run or a launch: nobody else has it, and nobody can guess it."""
    return token_hex(16)


def recorded(run_json: Path) -> dict[str, Any] | None:
    """What a launch wrote of its run; None if there is nothing or it cannot be read."""
    try:
        return read_description(run_json) if run_json.is_file() else None
    except (CheckpointError, OSError):
        return None


def is_anothers(checkpoint: Path, run_id: str | None) -> bool:
    """Whether a checkpoint says that another run saved it; runs of the first version and theirs have no id.

    One that cannot say it is damaged, and whoever reads it names what is wrong.
    """
    try:
        return bool(read_state(checkpoint).get("run_id") != run_id)
    except CheckpointError:
        return False


def may_go(checkpoint: Path, run_id: str | None) -> bool:
    """Whether a checkpoint says that it is the run's, which may then delete it."""
    try:
        return not checkpoint.is_symlink() and bool(read_state(checkpoint).get("run_id") == run_id)
    except CheckpointError:
        return False


def checkpoints(run: RunDir) -> list[Path]:
    """The run's complete checkpoints, oldest step first. Where nothing says which run it is, all that are complete."""
    described, complete = recorded(run.run_json), manifest.checkpoints(run.root)
    return complete if described is None else [path for path in complete if not is_anothers(path, described.get("id"))]


def most(config: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> dict[str, int]:
    """The largest numbers of processes and machines of a launch with these options and of those before it.

    Args:
        earlier: what the launch before wrote of the run; the first version wrote its options alone.
    """
    parts: list[Any] = [config, *((earlier.get("config"), earlier.get("most")) if earlier else ())]
    return {
        name: max([1, *(part[name] for part in parts if isinstance(part, dict) and isinstance(part.get(name), int))])
        for name in ("num_processes", "num_machines")
    }


def in_the_way(run: RunDir, first_step: int) -> list[Path]:
    """What has the name of a checkpoint after ``first_step`` and is not the run's, nor of the one that gives way."""
    described = recorded(run.run_json) or recorded(run.deleted_json)
    return [
        path
        for step, path in manifest.numbered(run.root)
        if step > first_step and not (described and may_go(path, described.get("id")))
    ]


def delete(path: Path) -> None:
    """Delete a checkpoint: it has its name no more before the first of its files goes."""
    going = path.with_name(f".checkpoint-{manifest.step_of(path)}.deleted")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    fsync_directory(path.parent)
    shutil.rmtree(going, ignore_errors=True)  # what stays is deleted at the next start


def remove_leftovers(run: RunDir, machine_rank: int) -> None:
    """Tidy up what a crash left of checkpoints that were being written or removed; no process may be at work."""
    described = recorded(run.description(machine_rank))
    if described is not None:
        _remove_staging(run, described)
    if machine_rank != 0 or not run.root.is_dir():
        return  # the first machine looks after the directory that all share; whoever moved it may want to move it back
    for leftover in list(run.root.iterdir()):
        found = _LEFTOVER.fullmatch(leftover.name)
        if found is None:
            continue
        if (int(found[1]), leftover) in manifest.numbered(run.root):
            leftover.rename(run.checkpoint(int(found[1])))  # the one that should have replaced it never came
            fsync_directory(run.root)
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def clear(run: RunDir, machines: int) -> None:
    """Delete a run, or what an earlier call that was stopped left of it.

    Until the end, ``deleted_json`` says that the directory holds no run any more, and what of it is still to go.

    Args:
        machines: of the new run; they look after their launch folders, and may have written there already.
    """
    if run.run_json.exists():
        run.run_json.replace(run.deleted_json)
        fsync_directory(run.root)
    described = recorded(run.deleted_json)
    if described is not None:
        for _, path in manifest.numbered(run.root):
            if may_go(path, described.get("id")):
                delete(path)
        events = run.tensorboard(str(described["config"].get("logging_dir", "logs")))
        folders = [run.sanity_check, run.samples_folder, run.sampled_clips]
        folders += [events] if events.is_relative_to(run.root) else []
        folders += [folder for _, folder in run.sampled()]
        _delete(run, _written(run, described, machines), folders)
    run.deleted_json.unlink(missing_ok=True)


def delete_samples(run: RunDir, *, after: int) -> None:
    """Delete the samples of later steps, which the run takes again."""
    _delete(run, run.sample_files(after=after), [folder for step, folder in run.sampled() if step > after])


def _delete(run: RunDir, files: Collection[Path], folders: Collection[Path]) -> None:
    """Delete files of a run and, where nothing is left in them, their folders and other ones."""
    for file in files:
        if file.is_file() and not _leads_away(run, file):
            file.unlink()
    for folder in sorted(({file.parent for file in files} | {*folders}) - {run.root}, reverse=True):
        if folder.is_dir() and not _leads_away(run, folder) and not any(folder.iterdir()):
            folder.rmdir()


def make_private(folder: Path) -> None:
    """Make a folder that only this user can look into; it may be there already, made by this user.

    Raises:
        OSError: it cannot be made, or is another's.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not _is_private(folder):
            raise


def identity(folder: Path) -> list[int] | None:
    """What stays the same when a folder is moved, and differs in its copy; None if there is none."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return [found.st_dev, found.st_ino]


def _written(run: RunDir, described: dict[str, Any], machines: int) -> list[Path]:
    """Every file that a run may have written beside its checkpoints."""
    counts = {name: min(number, _MOST_RANKS) for name, number in most(described["config"], described).items()}
    others = range(max(1, machines), counts["num_machines"])
    files = [run.plan_json, run.metrics, run.bad_step, run.report_html, *run.sample_files()]
    files += [file for machine in (0, *others) for file in run.files_of_machine(machine)]
    files += [file for rank in range(counts["num_processes"]) for file in run.files_of_rank(rank)]
    # the note is the last to go: a deletion that was stopped goes on by it
    return [*files, *(run.root / name for name in sorted(_noted(run))), run.noted_json]


@contextmanager
def noting(run: RunDir, folder: Path) -> Iterator[None]:
    """Note the files that come into a folder during the block as the run's own, for when it is deleted.

    Those in a folder outside of the run are not: it deletes nothing there.
    """
    if not folder.is_relative_to(run.root):
        yield
        return
    before = set(folder.rglob("*"))
    try:
        yield
    finally:
        new = {str(path.relative_to(run.root)) for path in set(folder.rglob("*")) - before if path.is_file()}
        if not new <= (noted := _noted(run)):
            write_atomically(run.noted_json, json.dumps({"files": sorted(noted | new)}))


def _noted(run: RunDir) -> set[str]:
    """What :func:`noting` noted, as far as it can be read."""
    try:
        return set(read_object(run.noted_json, NOTED)["files"])
    except CheckpointError:
        return set()


def _leads_away(run: RunDir, path: Path) -> bool:
    """Whether a path inside the directory is a link or goes over one."""
    inside = [path, *path.parents]
    return any(each.is_symlink() for each in inside[: inside.index(run.root)])


def _remove_staging(run: RunDir, described: dict[str, Any]) -> None:
    """Of a launch in this very directory: a copy of the directory names the same folder, which may be in use."""
    staging = Path(str(described.get("staging")))
    ours = staging.parent == MEMORY and staging.name.startswith("vfun-")
    if ours and described.get("directory") == identity(run.root) and _is_private(staging):
        shutil.rmtree(staging, ignore_errors=True)


def _is_private(folder: Path) -> bool:
    try:
        found = os.lstat(folder)
    except (OSError, ValueError):  # the latter for a name that none can have
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
