"""What a step takes of the GPU beside what vfun forecasts of it: weights, gradients and moments, and the passes.

    python benchmarks/forecast_on_gpu.py                  # all families, at the released width
    python benchmarks/forecast_on_gpu.py --device cpu     # the demos, by the results of all operations

Every family, full and LoRA, under each way of recomputation; the model has a few layers, and the clip is the largest
that is forecast to fit. A forecast that is more than 10 % off is an error. See ``vfun_cli/acceptance/step_memory.py``.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from record import parser, write_result

from vfun_cli import families
from vfun_cli.acceptance.rows import FORECAST
from vfun_cli.acceptance.step_memory import cases

ALONE = 0.9
"""The share of the free memory that a step may take."""


def main() -> int:
    """Print and write each step as it comes; returns 1 where one is too far off."""
    options = parser("forecast_on_gpu", __doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--families", nargs="+", choices=list(families.FAMILIES), default=list(families.FAMILIES))
    given = options.parse_args()
    if given.smoke:
        given.device, given.families = "cpu", ["cogvideox-fun"]
    found: dict[str, Any] = {"device": given.device, "rows": [], "left_out": []}
    with TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for name in given.families:
            for case in cases(families.find(name), given.device, ALONE):
                print(case, flush=True)
                if isinstance(case, str):
                    found["left_out"].append(case)
                else:
                    found["rows"].append(case.to_json())
                    found["most_off"] = max(abs(row["off"]) for row in found["rows"])
                write_result(given, found)
    if found.get("most_off", 1) > FORECAST:
        print(f"error: a forecast is more than {FORECAST:.0%} off, or nothing was measured", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
