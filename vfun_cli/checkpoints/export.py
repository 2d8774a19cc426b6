"""Turns a checkpoint into the files that other tools load: safetensors in the released names, with the configuration.

The result has every tensor of the base model directory, the trained ones taken from the checkpoint. It is made in a
hidden directory beside the output, read back, and renamed when it is right.
"""

import hashlib
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vfun_cli.checkpoints import manifest, safetensors
from vfun_cli.checkpoints.given import TRANSFORMER, VAE, Given
from vfun_cli.checkpoints.joint import Locate, joined
from vfun_cli.checkpoints.manifest import write_json
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.checkpoints.tensors import CHUNK, Array, TensorSource, convert, converted_dtype
from vfun_cli.checkpoints.writer import Entry, content_hash, parse_size, plan_shards, write_shards
from vfun_cli.devices import cpu_cores
from vfun_cli.disks.abilities import fsync, fsync_directory
from vfun_cli.disks.claims import Taken, claimed
from vfun_cli.errors import CheckpointError, ConfigError, RunError, did_you_mean
from vfun_cli.typed_json import Check, file_inside, file_path, items, optional, read_object, text

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

RECORD = ".vfun-export.json"
"""Lists the files that an export wrote, so that a later one deletes nothing else, and says what they were made of."""
RECORDED: Mapping[str, Check] = {
    "files": items(file_inside),
    "family": optional(text()),
    "model": optional(file_path),
    "train_mode": optional(text()),
    TRANSFORMER: optional(file_path),
    VAE: optional(file_path),
}

Weights = Literal["trained", "ema"]
"""Of a checkpoint, its weights or their moving average."""

NAME_MODEL = "Name the model directory of the run with --pretrained-model-name-or-path."

OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); may come from any thread, one call at a time."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written; the fields of ``vfun export-bf16 --json``."""

    output: Path
    tensors: int
    bytes: int
    """Size of all tensors' elements."""
    sha256: str
    """Content hash over names, types, shapes and bytes, independent of the sharding."""
    verified: bool


def export(
    checkpoint: Path,
    output: Path,
    *,
    base_dir: Path,
    given: Mapping[str, TensorSource] | None = None,
    names: Callable[[str], str] = lambda name: name,
    output_names: Callable[[str], str] = lambda name: name,
    locate: Locate | None = None,
    max_shard_size: str = "10GB",
    dtype: str = "bf16",
    weights: Weights = "trained",
    overwrite: bool = False,
    progress: OnProgress | None = None,
    workers: int | None = None,
) -> ExportResult:
    """Write the whole transformer with the checkpoint's weights in it.

    ``base_dir`` is the directory with the released transformer's safetensors and ``config.json``; ``given`` has tensors
    that the run started from instead of those, by the same names; ``names`` turns a parameter name into the released
    one, ``output_names`` a released name into the one to write, ``locate`` a released layer into its place in a release
    that joins layers.

    Raises:
        ConfigError: a wrong option, or an output that exists.
        CheckpointError: something is wrong with the checkpoint or the base.
        RunError: the disk is too full.
    """
    check_output(output, dtype, overwrite=overwrite, sources=(checkpoint, base_dir))
    stem, sources = read_base(base_dir)
    sources |= given or {}
    trained = trained_weights(checkpoint, weights)
    verify_source(checkpoint, trained.values())
    replace_tensors(sources, trained, names, checkpoint, base_dir)
    named = {output_names(name): source for name, source in sources.items()}
    if locate is not None:
        named = joined(sources, locate, base_dir)
    return write_model(
        stem, named, output, base_dir=base_dir, max_shard_size=max_shard_size, dtype=dtype, overwrite=overwrite,
        progress=progress, workers=workers,
    )  # fmt: skip


def check_output(output: Path, dtype: str, *, overwrite: bool, sources: Collection[Path]) -> None:
    """Refuse what ``export`` could not write, or should not.

    Args:
        sources: what must stay whatever happens: files and folders that are read, or are of a run.

    Raises:
        ConfigError: an unknown dtype, or an output that is taken.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}. Choose one of: {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    place = output.resolve()
    for source in sources:
        other = source.resolve()
        if place == other or place in other.parents or other in place.parents:
            what = "is" if place == other else "contains" if place in other.parents else "lies in"
            raise ConfigError(f"--output {output} {what} {source}, which an export leaves alone.", hint=ANOTHER)
    refuse_taken(output, overwrite=overwrite)


ANOTHER = "Name another --output."


def refuse_taken(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists; ``overwrite`` lets what an export wrote be replaced, and an empty folder.

    Raises:
        ConfigError: what is in the way.
    """
    try:
        there = output.resolve().exists()
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}.", hint=ANOTHER) from None
    if not there:
        return
    if not overwrite:
        raise ConfigError(f"{output} exists already.", hint="Name another --output, or add --overwrite.")
    hint = f"{ANOTHER[:-1]}, or move what is there away yourself."
    if not output.is_dir():
        raise ConfigError(f"--output {output} is no folder.", hint=hint)
    try:
        own = {RECORD, *(read_record(output) or {"files": ()})["files"]}
    except CheckpointError as error:
        what = f"--output {output} is an export that no longer says what it wrote"
        raise ConfigError(f"{what}: {error.message}", hint=hint) from None
    foreign = sorted(path.name for path in output.iterdir() if path.name not in own or path.is_dir())
    if foreign:
        raise ConfigError(
            f"--output {output} holds {len(foreign)} files or folders that no export of vfun wrote, e.g. {foreign[0]}; "
            "--overwrite would delete them.",
            hint=hint,
        )


def record_files(folder: Path) -> None:
    """Write down what an export consists of."""
    write_json(folder / RECORD, {"schema": 1, "files": sorted(path.name for path in folder.iterdir())})


def record_origin(output: Path, *, family: str, model: Path, given: Given, train_mode: str | None) -> None:
    """Write down beside an export's files what they belong to, for ``vfun generate`` to find the rest of the model.

    Args:
        given: what of that rest is not the model directory's own.
    """
    places = {option: str(place.absolute()) for option, place in given.named()}
    origin = {"family": family, "model": str(model.absolute()), "train_mode": train_mode, **places}
    write_json(output / RECORD, {**read_object(output / RECORD, RECORDED), **origin})


def read_record(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself; None of a folder that is none.

    Raises:
        CheckpointError: it is damaged.
    """
    return read_object(folder / RECORD, RECORDED) if (folder / RECORD).is_file() else None


def verify_source(checkpoint: Path, tensors: Iterable[TensorSource]) -> None:
    """Compare the files of a checkpoint that tensors are read from, and those that say where, with its manifest.

    Raises:
        CheckpointError: one has other contents than when it was saved.
    """
    if not (checkpoint / manifest.MANIFEST).is_file():
        return  # of the original scripts, which keep no hashes
    read = {segment.path for tensor in tensors for segment in tensor.segments}
    manifest.verify(checkpoint, passing_over=lambda path: path.suffix == ".safetensors" and path not in read)


def write_model(
    stem: str,
    sources: Mapping[str, TensorSource],
    output: Path,
    *,
    base_dir: Path,
    max_shard_size: str = "10GB",
    dtype: str = "bf16",
    overwrite: bool = False,
    progress: OnProgress | None = None,
    workers: int | None = None,
) -> ExportResult:
    """Stream tensors into ``<stem>*.safetensors`` of ``output``, with the configuration of ``base_dir``; verified.

    Raises:
        ConfigError, CheckpointError, RunError: as ``export``.
    """
    shard_bytes = parse_size(max_shard_size)
    entries = [
        Entry(name=name, dtype=converted_dtype(source.dtype, DTYPES[dtype]), shape=source.shape)
        for name, source in sources.items()
    ]
    total = sum(entry.nbytes for entry in entries)
    workers = workers or min(8, cpu_cores())
    with replacing(output, needed=total, overwrite=overwrite) as partial:
        counter = _Counter(2 * total, progress)  # every byte is written once and read back once
        digests = write_shards(
            partial,
            stem,
            plan_shards(entries, stem, shard_bytes),
            _Producer(sources, DTYPES[dtype]),
            workers=workers,
            done=counter.add,
        )
        _copy_configuration(base_dir, partial)
        _verify(partial, entries, digests, workers, counter.add)
    return ExportResult(
        output=output.resolve(), tensors=len(entries), bytes=total, sha256=content_hash(entries, digests), verified=True
    )


def read_base(directory: Path) -> tuple[str, dict[str, TensorSource]]:
    """File name stem and tensors of the released transformer, in the order of its files."""
    stems = {_stem(path): None for path in sorted(directory.glob("*.safetensors"))}
    # a root directory may also hold encoders: the transformer's name wins, any other must be the only one
    chosen = "diffusion_pytorch_model" if "diffusion_pytorch_model" in stems else next(iter(stems), None)
    if chosen is None or (len(stems) > 1 and chosen != "diffusion_pytorch_model"):
        found = f"it has {', '.join(stems)}" if stems else "it has no .safetensors file"
        raise CheckpointError(
            f"{directory} is not a transformer directory: {found}.",
            hint=NAME_MODEL,
        )
    files = [path for path in sorted(directory.glob("*.safetensors")) if _stem(path) == chosen]
    return chosen, safetensors.read_files(files)


def _stem(path: Path) -> str:
    name, _, rest = path.name.removesuffix(".safetensors").rpartition("-of-")
    return name.rpartition("-")[0] if name and rest.isdigit() else path.name.removesuffix(".safetensors")


def trained_weights(checkpoint: Path, weights: Weights) -> Mapping[str, TensorSource]:
    """The weights that a checkpoint holds, or their moving average, by parameter name.

    Raises:
        CheckpointError: it holds none.
    """
    reader = open_checkpoint(checkpoint)
    found = reader.ema if weights == "ema" else reader.weights
    if not found:
        if weights == "ema":
            raise CheckpointError(f"{checkpoint} holds no moving average of the weights.", hint="Leave out --ema.")
        raise CheckpointError(f"{checkpoint} holds no trained weights.")
    return found


def replace_tensors(
    sources: dict[str, TensorSource],
    trained: Mapping[str, TensorSource],
    names: Callable[[str], str],
    checkpoint: Path,
    base_dir: Path,
) -> None:
    """Put trained weights in the places of the base's. In place.

    Args:
        sources: of the base, by the name that ``names`` gives a trained weight.

    Raises:
        CheckpointError: weights without a place, or of another shape; it names them.
    """
    renamed = {names(name): source for name, source in trained.items()}
    if len(renamed) != len(trained):
        raise CheckpointError(f"{checkpoint}: two trained weights have the same name in {base_dir}.")
    unknown = sorted(renamed.keys() - sources.keys())
    if unknown:
        raise CheckpointError(
            f"{checkpoint}: {len(unknown)} trained weights have no place in {base_dir}: {', '.join(unknown[:5])}.",
            hint=NAME_MODEL,
        )
    misfits = [name for name, source in renamed.items() if source.shape != sources[name].shape]
    if misfits:
        name = misfits[0]
        raise CheckpointError(
            f"{checkpoint}: {len(misfits)} trained weights have another shape than in {base_dir}, "
            f"e.g. {name}: {list(renamed[name].shape)} instead of {list(sources[name].shape)}.",
            hint=NAME_MODEL,
        )
    sources.update(renamed)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"{directory} has {free / 1e9:.1f} GB free, the export needs {needed / 1e9:.1f} GB.",
            hint="Free some space, or name another --output.",
        )


class _Producer:
    """Reads a tensor in pieces and converts them; every worker thread keeps its own two buffers."""

    def __init__(self, sources: Mapping[str, TensorSource], dtype: str) -> None:
        self._sources = sources
        self._dtype = dtype
        self._local = threading.local()

    def __call__(self, entry: Entry) -> Iterator[Array]:
        """The elements of one tensor as they are written."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = (np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32))
        read, converted = self._local.buffers
        source = self._sources[entry.name]
        for chunk in source.chunks(read):
            yield convert(chunk, source.dtype, self._dtype, converted)


class _Counter:
    """Adds up progress that comes from several threads."""

    def __init__(self, total: int, report: OnProgress | None) -> None:
        self._total, self._report, self._done, self._lock = total, report, 0, threading.Lock()

    def add(self, count: int) -> None:
        """More bytes are finished."""
        with self._lock:
            self._done += count
            if self._report:
                self._report(self._done, self._total)


def _copy_configuration(base_dir: Path, target: Path) -> None:
    if not (base_dir / "config.json").is_file():
        raise CheckpointError(
            f"{base_dir} has no config.json.",
            hint=NAME_MODEL,
        )
    for path in sorted(base_dir.glob("*.json")):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def _verify(
    directory: Path, entries: list[Entry], digests: Mapping[str, str], workers: int, done: Callable[[int], None]
) -> None:
    """Read the files back: names, types, shapes, and every tensor's hash against what was streamed."""
    found = safetensors.read_files(sorted(directory.glob("*.safetensors")))
    if {(name, source.dtype, source.shape) for name, source in found.items()} != {
        (entry.name, entry.dtype, entry.shape) for entry in entries
    }:
        raise CheckpointError(f"{directory}: the written files do not have the tensors that were to be written.")

    def damaged(entry: Entry) -> bool:
        digest = hashlib.sha256()
        for chunk in found[entry.name].chunks():
            digest.update(chunk.data.cast("B"))
        done(entry.nbytes)
        return digest.hexdigest() != digests[entry.name]

    with ThreadPoolExecutor(workers) as pool:
        bad = [entry.name for entry, wrong in zip(entries, pool.map(damaged, entries), strict=True) if wrong]
    if bad:
        raise CheckpointError(
            f"{directory}: {len(bad)} tensors read back otherwise than written, e.g. {bad[0]}.",
            hint="Check the disk, then export again.",
        )


@contextmanager
def replacing(output: Path, *, needed: int, overwrite: bool) -> Iterator[Path]:
    """A folder to export into, which becomes ``output`` at the end of the block; after an error nothing has changed.

    An older export stays whole until then, and one that was being replaced when a process was killed is put back. One
    export at a time writes to an output.

    Args:
        needed: bytes.

    Raises:
        ConfigError: the output is taken, or another export is at work on it.
        RunError: the disk is too full.
    """
    output = output.resolve()
    partial, replaced = (output.with_name(f".{output.name}.{what}") for what in ("partial", "replaced"))
    output.parent.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        _settle(output, replaced)
        refuse_taken(output, overwrite=overwrite)
        _check_space(output.parent, needed)
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
        partial.mkdir()
        try:
            yield partial
            record_files(partial)
            for file in partial.iterdir():
                _flush(file)
            fsync_directory(partial)
            if output.exists():
                output.rename(replaced)
            partial.rename(output)
            fsync_directory(output.parent)  # before the older one goes
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _settle(output, replaced)


def _settle(output: Path, replaced: Path) -> None:
    """Of an older export that is aside: put it back if nothing has come in its place, else delete it."""
    if replaced.is_dir() and not output.exists():
        replaced.rename(output)
        fsync_directory(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other exports off this output.

    Raises:
        ConfigError: one is at work on it.
    """
    path = output.with_name(f".{output.name}.lock")
    try:
        with claimed(path):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Taken as taken:
        raise ConfigError(
            f"another export to {output} is at work ({taken}).",
            hint="Wait until it has ended, or name another --output.",
        ) from None


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        fsync(opened.fileno())
