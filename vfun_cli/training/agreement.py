"""Ranks that agree: on what they run, on where they write, and on what failed.

A rank that raises alone leaves the others waiting in their next collective. One rule holds: what may fail on a single
rank between collectives is done in :func:`all_or_none`, so that all raise its error, and what a rank meets while it
waits for its clips is told in ``begin_step``. Where that is not possible, since the work holds collectives of its own
(loading shards, a strategy's own files) or none follow it (filling a cache), the rank's end is the end of all, by the
launcher on its machine and by ``launch/machines.py`` on the others.
"""

import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate import PartialState

from vfun_cli import __version__, devices
from vfun_cli.checkpoints import manifest
from vfun_cli.config import optimizers
from vfun_cli.errors import ConfigError, VfunError, as_flag
from vfun_cli.run.contents import differing_pieces, file_digests
from vfun_cli.run.known import known
from vfun_cli.run.messages import named_machines
from vfun_cli.run.ownership import new_id
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.waiting import gather_all

OF_A_MACHINE = frozenset(
    {
        "cache",
        "dataloader_num_workers",
        "machine_rank",
        "main_process_ip",
        "network_path",
        "output_dir",
        "peak_tflops",
        "pretrained_model_name_or_path",
        "train_data_dir",
        "train_data_meta",
        "transformer_path",
        "vae_path",
        "validation_meta",
    }
)
"""Options whose values may differ: what is known by its contents, or is where this machine keeps or reaches a thing."""

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "peft", "deepspeed", "numpy")

SHOWN = 3
"""Differences that a message names."""

SEEN_WITHIN = 15.0
"""Seconds in which a new file must be seen by all machines. NFS remembers for a minute that a name does not exist, but
this one nobody asked for before.
"""


@contextmanager
def all_or_none() -> Iterator[None]:
    """Let all ranks raise what the first of them met in the block, which holds no collective.

    Raises:
        VfunError: another rank failed; ``rank`` says which.
    """
    met: Exception | None = None
    try:
        yield
    except Exception as error:
        met = error
    rank = PartialState().process_index
    everyone: list[VfunError | None] = gather_all(None if met is None else _told(met, rank))
    first = next((error for error in everyone if error is not None), None)
    if first is not None and first.rank == rank and met is not None:
        raise met
    if first is not None:
        raise first from met


def _told(error: Exception, rank: int) -> VfunError:
    """An error as other ranks can raise it, without those that it came from, which need not know how to travel."""
    told = known(error)
    return _of_rank(rank, type(told)(told.message, hint=told.hint))


def _of_rank(rank: int, error: VfunError) -> VfunError:
    error.rank = rank
    return error


def require_one_directory(run: RunDir) -> None:
    """Make sure that all machines write to the same run directory.

    Raises:
        ConfigError: a machine does not see what rank 0 wrote there; on all ranks.
    """
    state = PartialState()
    mark = run.common_mark(gather_all(new_id())[0])
    with all_or_none():
        if state.is_main_process:
            mark.touch()
    seen = gather_all((str(run.root), _appears(mark)))
    if state.is_main_process:
        mark.unlink(missing_ok=True)
    blind = next(((rank, root) for rank, (root, sees) in enumerate(seen) if not sees), None)
    if blind is not None:
        raise _of_rank(
            blind[0],
            ConfigError(
                f"its run directory {blind[1]} is not the one that rank 0 writes to, {seen[0][0]}: every machine would "
                "keep a part of each checkpoint.",
                hint="Give all machines an --output-dir on a disk that all of them share.",
                option="output_dir",
            ),
        )


def _appears(mark: Path) -> bool:
    until = time.monotonic() + SEEN_WITHIN
    while not (found := mark.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def require_one_job(described: Mapping[str, Any]) -> None:
    """Make sure that all ranks are about to run the same.

    Args:
        described: what ``run.json`` of this rank's machine says.

    Raises:
        ConfigError: they differ: in an option, a plan, a checkpoint, contents, a version; the same on all ranks.
        CheckpointError: the checkpoint to go on from cannot be read; on all ranks.
    """
    with all_or_none():
        mine = statement(described)
    digests = gather_all(sha256(json.dumps(mine).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone = gather_all((described["config"]["machine_rank"], mine))
    first = everyone[0][1]
    pieces = gather_all(
        _differing_pieces(described, [name for name, value in mine.items() if first.get(name) != value])
    )
    found: dict[tuple[str, str], set[int]] = {}  # of one difference, all machines that have it
    for (machine, theirs), differing in zip(everyone, pieces, strict=True):
        for name in {**first, **theirs}:
            if theirs.get(name) != first.get(name):
                words = _difference(name, theirs.get(name), first.get(name), differing.get(name))
                found.setdefault(words, set()).add(machine)
    said = [f"{there} on {named_machines(sorted(who))} {here} on machine 0" for (there, here), who in found.items()]
    rest = {machine for machines in list(found.values())[SHOWN:] for machine in machines}
    more = f"; and {len(said) - SHOWN} more of {named_machines(sorted(rest))}" if rest else ""
    raise _of_rank(
        next(rank for rank, digest in enumerate(digests) if digest != digests[0]),
        ConfigError(
            f"the machines do not run the same: {'; '.join(said[:SHOWN])}{more}.",
            hint="Start the same command on every machine, with the same versions, data and model there.",
        ),
    )


def _differing_pieces(described: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """In which files or rows contents differ from machine 0's, by what a statement calls them, as far as can be read.

    Args:
        names: what differs of the statement.
    """
    if not any(name in names for name in map(_holds, described.get("contents") or {})):
        return {}
    run = RunDir(Path(described["run_dir"]))
    pieces = differing_pieces(run.contents(described["config"]["machine_rank"]), run.contents(0))
    return {
        _holds(name): ", ".join(piece.replace(",", "") for piece in found[:SHOWN])
        + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        for name, found in pieces.items()
    }


def _difference(name: str, theirs: Any, first: Any, pieces: str | None) -> tuple[str, str]:
    """What is said of the machines that differ and of machine 0."""
    if pieces is not None:
        return f"{name} has another {pieces}", "than"
    return f"{name} is {_shown(theirs)}", f"and {_shown(first)}"


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def statement(described: Mapping[str, Any]) -> dict[str, Any]:
    """What all ranks of a job must have alike, by the words for it."""
    options = {
        as_flag(name): value is not None if name in OF_A_MACHINE else value
        for name, value in described["config"].items()
    }
    resume = Path(described["resume"]) if described.get("resume") else None
    return {
        "the command": described["command"],
        "the family": described["family"],
        **options,
        "the checkpoint": None if resume is None else f"{resume.name} ({manifest.fingerprint(resume)})",
        **{_holds(name): digest for name, digest in (described.get("contents") or {}).items()},
        "what --network-path holds": _digest_of(described["config"].get("network_path")) if resume is None else None,
        "the rows to validate on": described.get("validation_sha256"),
        "the plan": described.get("plan_digest"),
        "vfun": __version__,
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **devices.installed_versions((*PACKAGES, *optimizers.packages(described["config"].get("optimizer")))),
    }


def _digest_of(place: str | None) -> str | None:
    """Of a file, or of all in a folder."""
    if place is None:
        return None
    files = [Path(place)] if Path(place).is_file() else manifest.files_of(Path(place))
    return sha256(json.dumps(list(file_digests(files).values())).encode()).hexdigest()[:16]


def _holds(name: str) -> str:
    """What a statement calls the contents of what an option names."""
    return f"what {as_flag(name)} holds"
