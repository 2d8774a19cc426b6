"""Where the models of a family come from: the one place that knows their repositories, their files and the commands.

Nothing is downloaded here. ``vfun_cli.hub`` does, and only for ``vfun fetch``.
"""

import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from vfun_cli.errors import CheckpointError, ConfigError, did_you_mean
from vfun_cli.families.spec import FamilySpec, Release

ONE_OF = "Any one of these gets it:"


def of_size(spec: FamilySpec, size: str | None) -> Release:
    """The release that ``--size`` names, in letters of any case; None: that of the published command line.

    Raises:
        ConfigError: the family has no such model.
    """
    if size is None:
        return spec.releases[0]
    by_size = {release.size.lower(): release for release in spec.releases}
    if (found := by_size.get(size.lower())) is None:
        known = [release.size for release in spec.releases]
        raise ConfigError(
            f"{spec.name} has no model of size {size!r}.{did_you_mean(size, known)}",
            hint=f"Its models: {', '.join(known)}.",
            option="--size",
        )
    return found


def of_directory(spec: FamilySpec, model_dir: Path) -> Release:
    """The release that a model directory is named after, else that of the published command line."""
    named = model_dir.absolute().name.lower()
    return next((release for release in spec.releases if release.folder.lower() == named), spec.releases[0])


def usual_directory(spec: FamilySpec, release: Release) -> Path:
    """Where a model lies in the published command lines."""
    return Path(str(spec.defaults.train["pretrained_model_name_or_path"])).parent / release.folder


def patterns(spec: FamilySpec, parts: Sequence[str] = ()) -> list[str]:
    """Patterns of the files of these parts, or of all."""
    return [pattern for part in parts or spec.files for pattern in spec.files[part]]


def is_read(spec: FamilySpec, name: str) -> bool:
    """Whether the family reads the file of this path inside a release."""
    return any(fnmatchcase(name, pattern) for pattern in patterns(spec))


def parts_of(spec: FamilySpec, model_dir: Path, path: Path) -> list[str]:
    """The parts that a file or folder of a model directory belongs to or holds; none of what lies elsewhere."""
    try:
        name = PurePosixPath(path.absolute().relative_to(model_dir.absolute()))
    except ValueError:
        return []
    return [
        part
        for part, files in spec.files.items()
        if any(fnmatchcase(str(name), pattern) or name in PurePosixPath(pattern).parents for pattern in files)
    ]


def parts_without(spec: FamilySpec, names: Collection[str]) -> list[str]:
    """The parts of which none of these files is one."""
    return [
        part
        for part, files in spec.files.items()
        if not any(fnmatchcase(name, pattern) for pattern in files for name in names)
    ]


def missing_parts(spec: FamilySpec, model_dir: Path) -> list[str]:
    """The parts of which a model directory holds no file."""
    found = [path for pattern in patterns(spec) for path in model_dir.glob(pattern) if path.is_file()]
    return parts_without(spec, [path.relative_to(model_dir).as_posix() for path in found])


def require_parts(spec: FamilySpec, model_dir: Path) -> None:
    """Refuse a model directory that lacks a whole part of what the family reads.

    Raises:
        CheckpointError: with the lines that get it.
    """
    if missing := missing_parts(spec, model_dir):
        named = "; ".join(f"{part} ({', '.join(spec.files[part])})" for part in missing)
        raise CheckpointError(
            f"{model_dir} is not a whole {spec.name} model. It lacks: {named}.",
            hint=how_to_get(spec, model_dir, missing),
        )


def how_to_get(spec: FamilySpec, model_dir: Path, parts: Sequence[str] = ()) -> str:
    """The commands that put these parts of a model, or all that is read of it, into a directory.

    Args:
        parts: of ``FamilySpec.files``. ``vfun fetch`` always takes all of them: what is there already costs nothing.
    """
    return "\n".join([ONE_OF, *(f"  {line}" for line in commands(spec, model_dir, parts))])


def commands(
    spec: FamilySpec, model_dir: Path, parts: Sequence[str] = (), *, release: Release | None = None
) -> list[str]:
    """One line each for vfun, the Hugging Face tool and, where the model is there, the ModelScope tool.

    Args:
        release: None: the one that the directory is named after.
    """
    release = release or of_directory(spec, model_dir)
    files, folder = patterns(spec, parts), str(model_dir)
    size = [] if release is spec.releases[0] else ["--size", release.size]
    place = [] if model_dir == usual_directory(spec, release) else ["--to", folder]
    included = [word for pattern in files for word in ("--include", pattern)]
    lines = [
        ["vfun", "fetch", spec.name, *size, *place],
        ["hf", "download", release.hugging_face, *included, "--local-dir", folder],
    ]
    if release.model_scope is not None:
        lines.append(
            ["modelscope", "download", "--model", release.model_scope, "--include", *files, "--local_dir", folder]
        )
    return [shlex.join(line) for line in lines]


@contextmanager
def downloads_named(spec: FamilySpec, model_dir: Path | None) -> Iterator[None]:
    """Inside, a model directory is read: an error about a part of it says how to get that part.

    Raises:
        CheckpointError: the same, with the commands in its hint.
    """
    try:
        yield
    except CheckpointError as error:
        if model_dir is not None:
            name_downloads(error, spec, model_dir)
        raise


def name_downloads(error: CheckpointError, spec: FamilySpec, model_dir: Path) -> None:
    """Let the hint of an error about a part of a model directory say how to get that part; others stay as they are."""
    parts = [] if error.at is None else parts_of(spec, model_dir, error.at)
    if parts and ONE_OF not in (error.hint or ""):
        whole = [] if len(parts) == len(spec.files) else parts
        error.hint = "\n".join(filter(None, [error.hint, how_to_get(spec, model_dir, whole)]))
