"""Finding runs and checkpoints from what people type."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from vfun_cli import console
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.state import STATE_FILE
from vfun_cli.errors import CheckpointError, as_flag
from vfun_cli.run import ownership
from vfun_cli.run.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class Found:
    """A complete checkpoint and the run it belongs to."""

    run: RunDir
    checkpoint: Path
    step: int
    seen: str | None = None
    """What ``run.json`` was when this was found: what was decided from it holds as long as it is the same."""

    def is_in(self, run: RunDir) -> bool:
        """Whether the checkpoint lies in the directory of this run."""
        return self.run.root.resolve() == run.root.resolve()


def run_directory(name: str | None, *, output_dir: Path) -> RunDir:
    """The directory of a run from its path, a checkpoint's path or bare name, or nothing (the output directory).

    Raises:
        CheckpointError: nothing of that name.
    """
    path = output_dir if name is None else existing(name, output_dir)
    if path is None:
        raise CheckpointError(
            f"there is no {name}, neither here nor in {output_dir}.",
            hint="Name the output directory of a run, or one of its checkpoints.",
        )
    return RunDir(path if manifest.step_of(path.absolute()) is None else path.absolute().parent)


def checkpoint(name: str | None, *, output_dir: Path) -> Found:
    """A checkpoint from a run directory, a checkpoint's path, a bare ``checkpoint-500``, or nothing (the newest).

    Raises:
        CheckpointError: nothing of that name, or no complete checkpoint.
    """
    if name is None or name == "latest":
        return _newest(RunDir(output_dir))
    path = existing(name, output_dir)
    if path is None:
        near = ", ".join(found.name for found in ownership.checkpoints(RunDir(output_dir))[-5:]) or "none"
        raise CheckpointError(
            f"there is no {name}, neither here nor in {output_dir}.",
            hint=f"Complete checkpoints in {output_dir}: {near}.",
        )
    if manifest.step_of(path.absolute()) is None:
        return _newest(RunDir(path))
    run = RunDir(path.absolute().parent)
    seen = run.fingerprint()
    manifest.verify(path, deep=False)
    return _found(run, path, seen)


def to_resume(name: str, *, output_dir: Path) -> Found | None:
    """What ``--resume-from-checkpoint`` means; None for ``latest`` in a directory where no checkpoint was ever saved.

    A job script that is queued again always says ``latest``, also the first time. A checkpoint by its name must be
    there, and where all that are there are damaged nobody begins anew without asking.

    Raises:
        CheckpointError: as of :func:`checkpoint`.
    """
    if name == "latest" and not may_hold_checkpoints(RunDir(output_dir)):
        return None
    return checkpoint(name, output_dir=output_dir)


def may_hold_checkpoints(run: RunDir) -> bool:
    """Whether there is anything that a run there may have saved, damaged or not."""
    return not run.is_half_deleted() and bool(manifest.numbered(run.root))


def holds_results(run: RunDir) -> bool:
    """Whether a run there came as far as its first step, or made anything: a checkpoint, a record, a sample.

    One that did not, as after a launch that failed while it loaded, is in nobody's way.
    """
    recorded = run.metrics.is_file() and run.metrics.stat().st_size > 0
    return recorded or run.bad_step.exists() or bool(run.sampled()) or may_hold_checkpoints(run)


def newest(run: RunDir) -> Found | None:
    """The newest complete checkpoint of a run, if there is one."""
    seen, complete = run.fingerprint(), ownership.checkpoints(run)
    return _found(run, complete[-1], seen) if complete else None


def require_own(found: Found) -> None:
    """Refuse a checkpoint that lies in the directory of another run.

    Raises:
        CheckpointError: it says that another run saved it.
    """
    described = ownership.recorded(found.run.run_json)
    if described is not None and ownership.is_anothers(found.checkpoint, described.get("id")):
        raise CheckpointError(
            f"{found.checkpoint} was saved by another run than the one that {found.run.run_json} describes.",
            hint=f"vfun resume {shlex.quote(str(found.run.root))}",
        )


def way_on(run: RunDir, **changed: object) -> str:
    """The hint after a failure of training: the command that goes on from what is saved there.

    Args:
        changed: options that should change, although they change what is trained.
    """
    options = [word for name, value in changed.items() for word in (as_flag(name), str(value))]
    if newest(run) is None:
        needed = [*options, *(["--overwrite"] if holds_results(run) else [])]
        return (
            f"No checkpoint was saved: the same command {' '.join(['with', *needed, '']) if needed else ''}begins anew."
        )
    allowed = [word for name in changed for word in ("--allow", as_flag(name).removeprefix("--"))]
    return "To go on: " + shlex.join(["vfun", "resume", str(run.root), *options, *allowed])


def original_checkpoint(name: str, *, output_dir: Path) -> Path | None:
    """A checkpoint that accelerate's save_state left for the original scripts, or None.

    Only an incomplete checkpoint of ours may lack the manifest, and what theirs have no checkpoint of ours has.
    """
    path = existing(name, output_dir)
    if path is None or any((path / ours).exists() for ours in (STATE_FILE, manifest.MANIFEST)):
        return None
    theirs = (path / "pytorch_model", path / "pytorch_model_fsdp_0" / ".metadata")
    return path if any(each.exists() for each in theirs) else None


def existing(name: str, output_dir: Path) -> Path | None:
    """What people mean by a path or a bare name."""
    return next((path for path in (Path(name), output_dir / name) if exists(path)), None)


def exists(path: Path) -> bool:
    """Whether something is there; nothing is under a name that no file can have."""
    try:
        return path.exists()
    except OSError:
        return False


def _found(run: RunDir, path: Path, seen: str | None) -> Found:
    return Found(run=run, checkpoint=path, step=manifest.step_of(path.absolute()) or 0, seen=seen)


def _newest(run: RunDir) -> Found:
    seen, own = run.fingerprint(), ownership.checkpoints(run)
    others = [path for path in manifest.checkpoints(run.root) if path not in own]
    if not own and others:
        raise CheckpointError(
            f"{run.root} holds no complete checkpoint of its run: {', '.join(path.name for path in others)} "
            f"{'is' if len(others) == 1 else 'are'} of another.",
            hint="Put back what belongs there, or name the directory of the other run.",
        )
    path = own[-1] if own else manifest.newest_checkpoint(run.root)
    found = _found(run, path, seen)
    for step, other in manifest.numbered(run.root):
        if step > found.step and other in others:
            console.warn(f"passed over {other}, which is newer and of another run.")
        elif step > found.step:
            how = shlex.join(["vfun", "checkpoints", "verify", str(other)])
            console.warn(f"passed over {other}, which is newer and damaged. What is wrong with it: {how}")
    return found
