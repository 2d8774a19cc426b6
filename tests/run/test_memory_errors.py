"""Whoever says that memory ran out, and however deep inside: the error says what helps."""

import errno
import os

import numpy as np
import pytest
import torch

from vfun_cli.errors import FitError, Unforeseen
from vfun_cli.run.known import known
from vfun_cli.run.memory_errors import memory_error, memory_line

NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Failed to CUDA calloc async 2621440 bytes"""
ON_DEVICE = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError(NCCL),
    RuntimeError("NCCL WARN Cuda failure 2 'out of memory'"),
    RuntimeError("cudaErrorMemoryAllocation"),
)
ON_HOST = (
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("float32")),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("unable to mmap 4096 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
)
IN_SHARED_MEMORY = (
    RuntimeError(
        NCCL.rpartition("\n")[0] + "\nError while creating shared memory segment /dev/shm/nccl-Eo2R8d (size 9637888), "
        "error: No space left on device (28)"
    ),
    RuntimeError("NCCL WARN Error: failed to extend /dev/shm/nccl-Eo2R8d to 9637892 bytes"),
)
OTHERS = (
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    ValueError("memory format channels_last is not supported"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError("Error while creating shared memory segment /dev/shm/nccl-Eo2R8d, error: Permission denied (13)"),
)


def chained(error: Exception) -> Exception:
    """As libraries wrap what they met."""
    try:
        try:
            raise error
        except Exception as cause:
            raise KeyError("blocks.3") from cause
    except KeyError as first:
        try:
            raise RuntimeError("the state could not be restored")
        except RuntimeError as second:
            second.__context__ = first
            return second


HELP = {
    "the host's memory": (ON_HOST, "--no-async-checkpoint"),
    "shared memory": (IN_SHARED_MEMORY, "--shm-size"),
    "memory": (ON_DEVICE, "--gradient-checkpointing"),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("memory", "error", "hint"),
    [(memory, error, hint) for memory, (errors, hint) in HELP.items() for error in errors],
    ids=lambda value: f"{type(value).__name__} {value}"[:60] if isinstance(value, Exception) else "",
)
def test_a_memory_error_says_what_helps_and_is_no_crash(
    memory: str, error: Exception, hint: str, wrapped: bool
) -> None:
    found = known(chained(error) if wrapped else error)
    assert isinstance(found, FitError)
    assert found.message.startswith(f"out of {memory}: ") and hint in str(found.hint)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_what_they_were(error: Exception) -> None:
    assert memory_error(error) is None
    assert not isinstance(known(error), FitError)
    assert isinstance(known(OTHERS[0]), Unforeseen)


def test_a_log_is_searched_line_by_line() -> None:
    assert memory_line(f"Traceback\n{NCCL}\nmore") == "Failed to CUDA calloc async 2621440 bytes"
    assert memory_line("step 1\nstep 2") is None
