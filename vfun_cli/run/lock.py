"""One command at a time in a run directory, and none beside training processes that outlived theirs.

Each machine of a job has a claim of its own. The launcher gets it with its first breath, and hands it to the ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfun_cli.disks import claims
from vfun_cli.errors import ConfigError
from vfun_cli.run.rundir import RunDir


@contextmanager
def held(run: RunDir, machine_rank: int) -> Iterator[int]:
    """Keep the run directory to this command until the end of the block.

    What it yields is the stdin of the launcher: it keeps the directory for the launcher and for all processes that
    this one starts, until the last of them has ended.

    Raises:
        ConfigError: another command, or training processes that lost theirs, are at work there.
    """
    try:
        with claims.claimed(_path(run, machine_rank)) as claim:
            yield claim
    except claims.Taken as taken:
        raise _in_use(run, taken.holder) from None


def take_part(run: RunDir, machine_rank: int) -> None:
    """For a training process: be known to be at work until it ends."""
    claims.share(_path(run, machine_rank))


def _path(run: RunDir, machine_rank: int) -> Path:
    return run.root / f".lock-{machine_rank}"


def _in_use(run: RunDir, holder: claims.Holder | None) -> ConfigError:
    if holder is not None and holder.is_here and not holder.lives:
        who = f"training processes whose vfun command has been killed ({holder})"
        what_to_do = "Wait until they have ended or kill them (pgrep -f vfun_cli.training)"
    else:
        who, what_to_do = f"another vfun command ({holder or 'unknown'})", "Wait until it has ended or stop it"
    return ConfigError(
        f"{run.root} is in use by {who}.", hint=f"{what_to_do}, or choose another directory with --output-dir."
    )
