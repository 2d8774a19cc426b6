"""Pages of mapped files that were read: they count as this process's memory until it gives them back."""

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

SMALLEST = 1 << 20
"""Bytes of a tensor that is worth the question; half of a model's tensors are smaller, a thousandth of its bytes."""


def give_back(tensor: Tensor) -> None:
    """Let the pages under a tensor that was read leave this process; the page cache keeps them, for other ranks too.

    A file stays mapped as long as any of its tensors is wanted, and the last ones of a model are read last: without
    this each rank would hold all files, 28 GB for 14 billion weights, by the time that it has read them. Reading the
    tensor again reads the file again. A tensor that lies in no mapped file is left alone.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < SMALLEST:
        return
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    last = first + (steps + 1) * tensor.element_size() - 1
    if _is_mapped_file(first, last):
        begin = first // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(last + 1 - begin), mmap.MADV_DONTNEED)


def _is_mapped_file(first: int, last: int) -> bool:
    """Whether both addresses lie in one mapping of a file: of any other memory the advice would lose the content."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if begin <= first < end:
            return last < end and inode != "0"
    return False


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
