"""``-m vfun_cli.acceptance.scarce DEVICE MODULE ARGUMENT...``: a process that finds next to no memory on its device.

On a GPU this process holds the rest of it, by plain allocations; on a CPU it lowers the limit of its address space,
which the other process inherits.
"""

import resource
import signal
import subprocess
import sys
from typing import Any

from vfun_cli import children

LEFT_ON_GPU = 1 << 30
"""Bytes: enough for CUDA itself, too little for the pixels of a large clip beside it."""
LEFT_ON_CPU = 4 << 30
"""Bytes of address space: enough for torch and its threads, too little for that clip."""
PIECE = 8 << 30
"""Bytes of one allocation at most."""


def main(argv: list[str]) -> int:
    """Run the module; returns its exit code."""
    held = _hold_gpu() if argv[0] == "cuda" else _limit_memory()
    signal.signal(signal.SIGINT, lambda number, frame: None)  # the module gets it too, and ends its ranks
    code = subprocess.Popen(children.command(*argv[1:])).wait()
    del held
    return code


def _hold_gpu() -> list[Any]:
    """Tensors that take all but LEFT_ON_GPU bytes of the first GPU."""
    import torch

    held: list[Any] = []
    while (more := min(PIECE, torch.cuda.mem_get_info()[0] - LEFT_ON_GPU)) > 0:
        held.append(torch.empty(more, dtype=torch.uint8, device="cuda"))
    return held


def _limit_memory() -> list[Any]:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (LEFT_ON_CPU, most))
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
