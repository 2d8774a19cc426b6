"""What the meter costs: every call it adds to a step, timed on its own.

Run from the repository root: ``python benchmarks/meter.py``. The aim: under 0.5 % of a step. Counted are the marks of
the clock, the rank's own numbers, the download, and the record with metrics.jsonl and TensorBoard; the collective is
not, because the ranks have to agree on stopping anyway.
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bare_loop import CPU, SHAPE, batch
from plan_sets import write_result

from vfun_cli.config import RunConfig
from vfun_cli.families.cogvideox_fun import SPEC
from vfun_cli.rundir import RunDir
from vfun_cli.training.meter import Costs, TrainedShare
from vfun_cli.training.metrics import Measured, Metrics
from vfun_cli.training.transfer import Download

STEPS, RANKS = 2000, 64
STEP_SECONDS = 0.6
"""A step of benchmarks/bare_loop.py: tiny; steps of real models take tens of seconds."""


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    costs = Costs(spec=SPEC, dims=SPEC.dims, share=TrainedShare(base=10, added=0, trained=10))
    seconds = []
    with TemporaryDirectory() as folder:
        metrics = Metrics(
            RunDir(Path(folder)), RunConfig(), costs=costs, peak_flops=1e12, device=CPU, writes=True, first_step=0,
            total_steps=STEPS,
        )  # fmt: skip
        for step in range(STEPS):
            micro_batches = [batch(step)]
            started = time.process_time()
            began = metrics.clock.mark()
            measured = metrics.measure(micro_batches)
            ended = metrics.clock.mark()
            gathered = torch.tensor([[0.5, 1.0, 0.0, 1.0, 0.0, *measured]], dtype=torch.float64).expand(RANKS, -1)
            ranks = [Measured(*row[5:]) for row in Download(gathered).numbers()]
            metrics.step(
                step + 1, micro_batches, loss=0.5, rate=1e-5, grad_norm=1.0, masked_tokens=0.0, ranks=ranks,
                began=began, ended=ended,
            )  # fmt: skip
            seconds.append(time.process_time() - started)
        metrics.close()
    middle, worst = float(np.median(seconds)), float(np.quantile(seconds, 0.99))
    found = {
        "ranks": RANKS,
        "shape": SHAPE,
        "median_microseconds": round(1e6 * middle, 1),
        "99_percent_microseconds": round(1e6 * worst, 1),
        "step_seconds": STEP_SECONDS,
        "share_of_step": round(middle / STEP_SECONDS, 6),
        "shortest_step_within_half_a_percent_seconds": round(middle / 0.005, 4),
    }
    print(found)
    write_result("meter", found)


if __name__ == "__main__":
    main()
