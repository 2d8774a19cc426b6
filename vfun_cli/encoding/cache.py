"""Encoder outputs on disk, under names that say what they were made from.

Whatever changes what an encoder would give changes the name, so nothing is ever stale and several runs may fill one
directory at once: an entry is written beside its place and renamed, and two that write the same one write the same.
"""

import hashlib
import json
import secrets
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vfun_cli import families
from vfun_cli.errors import EnvironmentFault
from vfun_cli.metadata import mp4, opening, sounds, timeline, upright, wav
from vfun_cli.metadata import pictures as picture_files
from vfun_cli.modeling import encoders, foreign, inputs, pickled, pixels, randomness, weights
from vfun_cli.modeling.adapter import Input
from vfun_cli.modeling.encoders.frozen import Encoders, Output
from vfun_cli.modeling.inputs import describe, nested_inputs
from vfun_cli.modeling.media import frames, pictures, sizes, sound
from vfun_cli.modeling.tensor_files import save_tensors
from vfun_cli.run.cachedir import DIGEST, NAME, Content, DamagedEntry, content_digest, entry, require_entry, unreadable
from vfun_cli.run.rundir import write_atomically

CHUNK = 1 << 22
FAMILIES = Path(str(families.__file__)).parent
SHARED_CODE = (
    frames, timeline, mp4, opening, pictures, picture_files, upright, sound, sounds, wav, sizes, pixels,
    inputs, randomness, weights, pickled, foreign,
)  # fmt: skip
"""Modules that decode media and load encoders, beside the encoders' own."""
LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "av", "pillow")
"""What runs, prepares and decodes. Another release may give other numbers: transformers 5 moved a state of wav2vec."""


@dataclass(frozen=True)
class Cache:
    """The cache of one run; handed to the decoding processes, which look entries up."""

    root: Path
    encoders: Mapping[str, str]
    """What tells each encoder apart: settings, libraries, the digests of its files and of the code that loads it."""

    @classmethod
    def for_encoders(cls, root: Path, loaded_from: Encoders) -> "Cache":
        """Reads the encoders' files once (about a second a gigabyte); later runs remember their digests."""
        libraries = " ".join(f"{name} {release(version(name))}" for name in LIBRARIES)
        identities = {
            name: "\n".join(
                (
                    f"{name} {source.settings} {' '.join(_digest_of(root, path) for path in source.files)}",
                    file_digest(source.load.__module__),
                    libraries,
                )
            )
            for name, source in loaded_from.sources.items()
        }
        return cls(root.absolute(), identities)

    def key(self, wanted: Input) -> str:
        """The name of what this input gives."""
        assert wanted.encoder is not None
        text = "\n".join(
            (
                code_digest(frozenset(type(leaf).__module__ for leaf in nested_inputs(wanted.lazy))),
                self.encoders[wanted.encoder],
                describe(wanted.lazy, self.digest),
            )
        )
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def path(self, key: str) -> Path:
        """Where an entry lies."""
        return entry(self.root, key)

    def has(self, key: str) -> bool:
        """Whether there is such an entry."""
        return self.path(key).exists()

    def read(self, key: str) -> Output | None:
        """An entry, or None; a damaged one is reported, deleted and None.

        Raises:
            EnvironmentFault: it cannot be read.
        """
        path = self.path(key)
        try:
            return read_entry(path)
        except FileNotFoundError:
            return None
        except DamagedEntry as error:
            print(f"warning: {error}; it is encoded again", file=sys.stderr, flush=True)
            with suppress(OSError):  # then the new one replaces it
                path.unlink()
            return None
        except OSError as error:  # not damaged: another user's, or its disk is ill
            raise unreadable(path, error) from None

    def write(self, key: str, output: Output) -> None:
        """Add an entry.

        Raises:
            EnvironmentFault: the disk cannot take it.
        """
        path = self.path(key)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in output.items()}
        partial = path.with_name(f".{key}.{secrets.token_hex(8)}")  # hosts that share a disk share process ids
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, partial, {DIGEST: _digest_of_tensors(tensors), NAME: key})
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise EnvironmentFault(
                f"cannot write {path}: {error.strerror or error}.",
                hint="Make room, put --cache on another disk, or train without it; what is there already stays good.",
            ) from error

    def digest(self, path: Path) -> str:
        """What is in a media file."""
        return _digest_of(self.root, path)


def read_entry(path: Path) -> Output:
    """The tensors of one entry.

    Raises:
        FileNotFoundError: there is none.
        DamagedEntry: it holds other bytes than were written.
        OSError: it cannot be read.
    """
    path.open("rb").close()  # the library calls every file missing that it may not read
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            stated = file.metadata() or {}
    except SafetensorError as error:
        raise DamagedEntry(f"{path} is damaged ({error})") from None
    require_entry(path, stated, _digest_of_tensors(tensors))
    return tensors


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    return content_digest(
        {
            name: Content(
                dtype=str(tensor.dtype),
                shape=tensor.shape,
                data=[tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data],
            )
            for name, tensor in tensors.items()
        }
    )


@cache
def code_digest(modules: frozenset[str]) -> str:
    """Of the source files that decide what an encoder sees and how it is run.

    ``modules`` define the input; one that is a family's own is taken with all of its family's folder.
    """
    own = {_source(name) for name in modules}
    files = {_source(module.__name__) for module in SHARED_CODE} | own
    for folder in {Path(str(encoders.__file__)).parent} | {file.parent for file in own if FAMILIES in file.parents}:
        files |= set(folder.glob("*.py"))
    return _digest_of_code(files)


@cache
def file_digest(module: str) -> str:
    """Of one module's source file."""
    return _digest_of_code({_source(module)})


def release(version: str) -> str:
    """The part of a library's version that an entry depends on: 2.13 of 2.13.1+cu130, whose numbers are 2.13.0's."""
    return ".".join(version.split(".")[:2])


def _source(module: str) -> Path:
    return Path(str(sys.modules[module].__file__))


def _digest_of_code(files: Collection[Path]) -> str:
    return hashlib.blake2b(b"".join(file.read_bytes() for file in sorted(files)), digest_size=16).hexdigest()


def _digest_of(root: Path, path: Path) -> str:
    """Of a file's bytes, or of a folder's files; remembered as long as size, times and inode stay."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path)} {_digest_of(root, file)}" for file in inside]
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
    path = path.absolute()
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    note = root / "files" / f"{hashlib.blake2b(str(path).encode(), digest_size=16).hexdigest()}.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["digest"])
    except (OSError, ValueError, KeyError):
        pass  # not read yet, or the note is half written by an older crash: read the file itself
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    with suppress(OSError):  # a cache that is full or another user's has what it has
        write_atomically(note, json.dumps({"path": str(path), "stamp": stamp, "digest": found.hexdigest()}))
    return found.hexdigest()
