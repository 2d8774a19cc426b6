"""Which errors mean that memory ran out, on a device or on the host, whoever says it and however: FitError, with what
helps.

Few libraries raise an error of their own for it. torch names only the failures of its own allocator; what cuBLAS,
cuDNN, NCCL, the driver and the system say comes as text.
"""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from vfun_cli.errors import FitError, first_line
from vfun_cli.run.ownership import MEMORY

SHARED_MEMORY_HINT = (
    f"Enlarge {MEMORY} (docker run --shm-size=16g or --ipc=host; in Kubernetes an emptyDir with medium: Memory; "
    f"else mount -o remount,size=16g {MEMORY}), or use fewer --dataloader-num-workers: 0 needs none of it."
)
HOST_HINT = (
    "Try fewer --dataloader-num-workers, --no-async-checkpoint, or a strategy that offloads nothing; in a container or "
    "a Slurm job, ask for more memory."
)
DEVICE_HINT = (
    "Try --gradient-checkpointing, --low-vram, a smaller --token-sample-size, or a strategy that shards more (--fsdp, "
    "--zero3, --zero3-offload)."
)


@dataclass(frozen=True, kw_only=True)
class _Memory:
    """One that runs out."""

    name: str
    hint: str
    said: re.Pattern[str]
    """Found in a line that says so."""


def _one_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_HOST = _Memory(
    name="the host's memory",
    hint=HOST_HINT,
    said=_one_of(
        r"DefaultCPUAllocator: (can't allocate|not enough) memory",
        r"alloc_cpu\.cpp",
        re.escape(os.strerror(errno.ENOMEM)),
        "std::bad_alloc",
        r"Unable to allocate .* for an array",
    ),
)
_MEMORIES = (
    _Memory(
        name="shared memory",
        hint=SHARED_MEMORY_HINT,
        said=_one_of(
            rf"{MEMORY} is full",
            rf"failed to extend {MEMORY}/nccl-",
            rf"creating shared memory segment {MEMORY}/nccl-.*{re.escape(os.strerror(errno.ENOSPC))}",
        ),
    ),
    _HOST,
    _Memory(
        name="memory",
        hint=DEVICE_HINT,
        said=_one_of(
            r"\bout of memory\b",  # CUDA's own words, which torch, NCCL and DeepSpeed repeat
            r"\bCU[A-Z]+_(STATUS_)?(INTERNAL_ERROR_\w+_)?ALLOC(ATION)?_FAILED\b",  # cuBLAS, cuDNN, cuFFT, cuSPARSE
            r"\bCU(BLAS|DNN)_STATUS_NOT_INITIALIZED\b",  # a full GPU has no room for their handles
            r"\bcudaErrorMemoryAllocation\b",
            r"\bCUDA_ERROR_OUT_OF_MEMORY\b",
            r"\bFailed to CUDA (host )?[cm]?alloc",  # NCCL
        ),
    ),
)


def memory_error(error: BaseException, where: str = "") -> FitError | None:
    """An error, or one that it came from, as one that a user can act on; None where memory did not run out."""
    line = next((line for each in _chain(error) if (line := _said(each)) is not None), None)
    return None if line is None else does_not_fit(line, where)


def memory_line(text: str) -> str | None:
    """The first line of a text, such as a log, that says so."""
    return next((line.strip() for line in text.splitlines() if _memory_of(line) is not None), None)


def does_not_fit(line: str, where: str = "") -> FitError:
    """The error of a line that says so, such as one of :func:`memory_line`."""
    memory = _memory_of(line) or _HOST
    return FitError(f"{where}out of {memory.name}: {line.rstrip('.')}.", hint=memory.hint)


def _memory_of(line: str) -> _Memory | None:
    return next((memory for memory in _MEMORIES if memory.said.search(line)), None)


def _said(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return first_line(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of which the control plane does not import the class
        return first_line(error)
    return memory_line(text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
