"""Finding runs and checkpoints from what people type."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from vfun_cli import console
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.state import STATE_FILE
from vfun_cli.errors import CheckpointError
from vfun_cli.run.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class Found:
    """A complete checkpoint and the run it belongs to."""

    run: RunDir
    checkpoint: Path
    step: int


def checkpoint(name: str | None, *, output_dir: Path) -> Found:
    """A checkpoint from a run directory, a checkpoint's path, a bare ``checkpoint-500``, or nothing (the newest).

    Raises:
        CheckpointError: nothing of that name, or no complete checkpoint.
    """
    if name is None or name == "latest":
        return _newest(RunDir(output_dir))
    path = _existing(name, output_dir)
    if path is None:
        near = ", ".join(found.name for found in manifest.checkpoints(output_dir)[-5:]) or "none"
        raise CheckpointError(
            f"there is no {name}, neither here nor in {output_dir}.",
            hint=f"Complete checkpoints in {output_dir}: {near}.",
        )
    if manifest.step_of(path.absolute()) is None:
        return _newest(RunDir(path))
    manifest.verify(path, deep=False)
    return Found(run=RunDir(path.absolute().parent), checkpoint=path, step=manifest.step_of(path.absolute()) or 0)


def to_resume(name: str, *, output_dir: Path) -> Found | None:
    """What ``--resume-from-checkpoint`` means; None for ``latest`` in a directory where no checkpoint was ever saved.

    A job script that is queued again always says ``latest``, also the first time. A checkpoint by its name must be
    there, and where all that are there are damaged nobody begins anew without asking.

    Raises:
        CheckpointError: as of :func:`checkpoint`.
    """
    if name == "latest" and not any(output_dir.glob("checkpoint-*")):
        return None
    return checkpoint(name, output_dir=output_dir)


def newest(run: RunDir) -> Found | None:
    """The newest complete checkpoint of a run, if there is one."""
    complete = manifest.checkpoints(run.root)
    return Found(run=run, checkpoint=complete[-1], step=manifest.step_of(complete[-1]) or 0) if complete else None


def way_on(run: RunDir, **changed: object) -> str:
    """The hint after a failure of training: the command that goes on from what is saved there.

    Args:
        changed: options that should change, although they change what is trained.
    """
    options = [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    if newest(run) is None:
        return f"No checkpoint was saved: the same command with {' '.join([*options, '--overwrite'])} begins anew."
    allowed = [word for name in changed for word in ("--allow", name.replace("_", "-"))]
    return "To go on: " + shlex.join(["vfun", "resume", str(run.root), *options, *allowed])


def original_checkpoint(name: str, *, output_dir: Path) -> Path | None:
    """A checkpoint that accelerate's save_state left for the original scripts, or None.

    Only an incomplete checkpoint of ours may lack the manifest, and what theirs have no checkpoint of ours has.
    """
    path = _existing(name, output_dir)
    if path is None or any((path / ours).exists() for ours in (STATE_FILE, manifest.MANIFEST)):
        return None
    theirs = (path / "pytorch_model", path / "pytorch_model_fsdp_0" / ".metadata")
    return path if any(each.exists() for each in theirs) else None


def _existing(name: str, output_dir: Path) -> Path | None:
    """What people mean by a path or a bare name."""
    return next((path for path in (Path(name), output_dir / name) if exists(path)), None)


def exists(path: Path) -> bool:
    """Whether something is there; nothing is under a name that no file can have."""
    try:
        return path.exists()
    except OSError:
        return False


def _newest(run: RunDir) -> Found:
    path = manifest.newest_checkpoint(run.root)
    step = manifest.step_of(path) or 0
    for other in sorted(run.root.glob("checkpoint-*")):
        if (manifest.step_of(other) or 0) > step:
            how = shlex.join(["vfun", "checkpoints", "verify", str(other)])
            console.warn(f"passed over {other}, which is newer and damaged. What is wrong with it: {how}")
    return Found(run=run, checkpoint=path, step=step)
