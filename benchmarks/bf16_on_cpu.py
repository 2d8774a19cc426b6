"""How long a CPU takes to multiply in bf16, compared with float32: as it is, and without its units for bf16.

Run from the repository root: ``python benchmarks/bf16_on_cpu.py``. One thread computes a linear layer and a 3D
convolution in both types in turn; of each the shortest of several counts, which other processes disturb least.
Without units means that torch's libraries are told to use AVX2 alone, as on a processor that has no more.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from record import parser, write_result

UNITS: Mapping[str, Mapping[str, str]] = {
    "as it is": {},
    "AVX2 alone": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
MEASURE = "--measure"


def measured(width: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each operation in each type, in this process.

    Args:
        width: features of the linear layer, and a sixteenth of it channels of the convolution.
    """
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(1)
    channels = width // 16
    x, weight = torch.randn(width, width), torch.randn(width, width)
    clip, kernel = torch.randn(1, channels, 5, 32, 32), torch.randn(channels, channels, 3, 3, 3)
    operations = {
        "linear layer": lambda dtype: F.linear(x.to(dtype), weight.to(dtype)),
        "3D convolution": lambda dtype: F.conv3d(clip.to(dtype), kernel.to(dtype), padding=1),
    }
    found: dict[str, dict[str, float]] = {}
    for name, run in operations.items():
        times: dict[str, list[float]] = {"float32": [], "bfloat16": []}
        for _ in range(repeats + 1):
            for dtype, taken in times.items():
                began = time.perf_counter()
                run(getattr(torch, dtype))
                taken.append(time.perf_counter() - began)
        best = {dtype: min(taken[1:]) for dtype, taken in times.items()}
        found[name] = {**best, "bfloat16 over float32": best["bfloat16"] / best["float32"]}
    return found


def under(variables: Mapping[str, str], *arguments: object) -> Any:
    """The same of a process that finds these variables."""
    command = [sys.executable, __file__, MEASURE, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        print(json.dumps(measured(*map(int, sys.argv[2:]))))
        sys.exit()
    options = parser("bf16_on_cpu", __doc__).parse_args()
    shape = (128, 1) if options.smoke else (1024, 7)
    write_result(options, {name: under(variables, *shape) for name, variables in UNITS.items()})
