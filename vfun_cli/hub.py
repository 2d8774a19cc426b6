"""Files of released models, from the Hugging Face hub: for ``vfun fetch``, and nothing else ever downloads.

By huggingface_hub, whose settings hold here too: ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, proxies. Its own
download of a repository begins a file anew that was left in the middle, and that of Wan2.1-Fun 14B has 33 GB; and where
the connection is lost it takes what lies there for the file. So files are brought one by one, and held against the
hub's hashes here.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest, sha1, sha256
from pathlib import Path
from typing import Any

from vfun_cli import console
from vfun_cli.checkpoints.released import check_weights
from vfun_cli.disks.abilities import HINTS, fault
from vfun_cli.errors import ConfigError, EnvironmentFault, VfunError, first_line
from vfun_cli.families import detect, releases
from vfun_cli.families.spec import FamilySpec, Release
from vfun_cli.files import existing
from vfun_cli.typed_json import stays_inside

GOES_ON = "The same command goes on from there; HF_ENDPOINT names a mirror of the hub."


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a release."""

    name: str
    """Its path from the folder, with slashes."""
    size: int
    """Bytes."""

    def is_in(self, folder: Path) -> bool:
        """Whether a file of this name and size is there."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """What of a release goes where."""

    spec: FamilySpec
    release: Release
    folder: Path
    revision: str
    """The commit that was listed: its files are fetched, whatever is pushed meanwhile."""
    files: tuple[File, ...]

    @property
    def left(self) -> list[File]:
        """Those that are not there yet, or not whole."""
        return [file for file in self.files if not file.is_in(self.folder)]


def plan(spec: FamilySpec, release: Release, folder: Path) -> Fetch:
    """Ask the hub which files a release has, and take those that the family reads.

    Raises:
        ConfigError: the folder holds another model.
        EnvironmentFault: the hub cannot be asked, or has no such files.
    """
    _require_place(spec, release, folder)
    with _told(spec, release, folder):
        info: Any = _hub().HfApi().model_info(release.hugging_face, files_metadata=True)
        files = [File(name=each.rfilename, size=each.size or 0) for each in info.siblings]
    read = [file for file in files if releases.is_read(spec, file.name)]
    if outside := [file.name for file in read if not stays_inside(file.name)]:
        raise EnvironmentFault(
            f"{release.hugging_face} lists {outside[0]!r}, which is no path inside a folder: nothing was fetched.",
            hint="Look at where HF_ENDPOINT leads: the hub itself has no such names.",
        )
    if lacking := releases.parts_without(spec, [file.name for file in read]):
        raise EnvironmentFault(
            f"{release.hugging_face} has no file that {spec.name} reads as {', '.join(lacking)}: nothing was fetched.",
            hint="Look at where HF_ENDPOINT leads, and at what the repository's page says of its files.",
        )
    return Fetch(spec=spec, release=release, folder=folder, revision=info.sha, files=tuple(read))


def fetch(job: Fetch) -> None:
    """Bring the files into the folder, in order, and see that they are a whole model of the family.

    What is there already and the same is not brought again, a file that was left in the middle goes on from there, and
    one that differs from the hub's is replaced.

    Raises:
        EnvironmentFault: the disk is too small, or the connection failed; the same command goes on.
        CheckpointError: what came is not a model of the family.
    """
    _require_room(job)
    hub = _hub()
    on_terminal = console.err.is_terminal
    if not on_terminal:
        hub.utils.disable_progress_bars()
    for number, file in enumerate(job.files, start=1):
        if not on_terminal and not file.is_in(job.folder):
            console.hint(f"{number} of {len(job.files)}: {file.name}, {size_text(file.size)}")
        with _told(job.spec, job.release, job.folder):
            _bring(job, file)
    with releases.downloads_named(job.spec, job.folder):
        detect.read_dims(job.spec, job.folder)
        releases.require_parts(job.spec, job.folder)
        check_weights(job.folder)


def _bring(job: Fetch, file: File) -> None:
    """Put a file into its place, from where an earlier attempt was left; one that is there and the same stays.

    Raises:
        EnvironmentFault: what came is not what the hub says it is.
    """
    from huggingface_hub.file_download import http_get

    hub, target = _hub(), job.folder / file.name
    url = hub.hf_hub_url(job.release.hugging_face, file.name, revision=job.revision)
    told = hub.get_hf_file_metadata(url)
    if file.is_in(job.folder) and _is(target, told.etag):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{sha256(str(told.etag).encode()).hexdigest()[:16]}.part")
    with partial.open("ab") as stream:
        begun = stream.tell()
        if not begun or begun != told.size:
            http_get(
                url,
                stream,
                resume_size=begun,
                headers=hub.utils.build_hf_headers(),
                expected_size=told.size,
                displayed_filename=file.name,
            )
    if not _is(partial, told.etag):
        partial.unlink()
        raise EnvironmentFault(
            f"{file.name} of {job.release.hugging_face} came damaged: it has not the hub's hash.", hint=GOES_ON
        )
    partial.replace(target)


def _is(path: Path, etag: str | None) -> bool:
    """Whether a file has the content that the hub's tag is of: a SHA-256 or, of small files, git's hash of a blob.

    Of a tag of another kind, which a mirror may have, nothing follows.
    """
    if etag is None or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag):
        return True
    with path.open("rb") as file:
        if len(etag) == 64:
            return file_digest(file, "sha256").hexdigest() == etag
        return sha1(b"blob %d\0" % path.stat().st_size + file.read(), usedforsecurity=False).hexdigest() == etag


def size_text(size: int) -> str:
    """Bytes as the hub's pages show them."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size = size / 1000  # type: ignore[assignment]
    return f"{size:.1f} GB"


def _hub() -> Any:
    """The library, which takes a third of a second to import."""
    import huggingface_hub

    return huggingface_hub


def _require_place(spec: FamilySpec, release: Release, folder: Path) -> None:
    other = releases.of_directory(spec, folder)
    if other is not release and other.folder.lower() == folder.absolute().name.lower():
        raise ConfigError(
            f"{folder} is named after the {other.size} model, and {release.size} was asked for.",
            hint=f"Add --size {other.size}, or name another folder with --to.",
            option="--to",
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file.", hint="Name a folder with --to.", option="--to")
    others = detect.fitting(folder)
    if others and spec.name not in others:
        raise ConfigError(
            f"{folder} holds a {' or '.join(others)} model.", hint="Name another folder with --to.", option="--to"
        )


def _require_room(job: Fetch) -> None:
    needed = sum(file.size for file in job.left)
    free = shutil.disk_usage(existing(job.folder)).free
    if needed > free:
        raise EnvironmentFault(
            f"{job.release.hugging_face} takes {size_text(needed)} more in {job.folder}, {size_text(free)} are free.",
            hint="Make room there, or name another place with --to.",
        )


@contextmanager
def _told(spec: FamilySpec, release: Release, folder: Path) -> Iterator[None]:
    """Whatever the library raises, as an error with what can be done.

    Raises:
        EnvironmentFault: no connection, no permission, no such repository, a full disk.
    """
    try:
        yield
    except VfunError:
        raise
    except Exception as error:  # of httpx, of its own, of its Rust part, of the system
        if isinstance(error, OSError) and error.errno in HINTS:
            raise fault(error, where=folder) from error
        raise EnvironmentFault(_what(error, release), hint=_by_hand(spec, release, folder)) from error


def _what(error: Exception, release: Release) -> str:
    from huggingface_hub import errors

    repository = release.hugging_face
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repository} cannot be fetched: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network."
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} asks everyone to accept its terms on its page first; then HF_TOKEN says who you are."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no {repository}, or shows it to others only: HF_TOKEN says who you are."
    return f"{repository} cannot be fetched: {first_line(error)}."


def _by_hand(spec: FamilySpec, release: Release, folder: Path) -> str:
    lines = releases.commands(spec, folder, release=release)[1:]
    return "\n".join([f"{GOES_ON} By hand:", *(f"  {line}" for line in lines)])
