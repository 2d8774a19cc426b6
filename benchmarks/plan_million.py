"""How long it takes to plan an epoch of a million rows with known sizes, and how much memory.

Run from the repository root: ``python benchmarks/plan_million.py``. The aim: at most 10 s and 1 GB on two cores.
"""

import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from plan_sets import mixed_set
from record import parser, write_result

from vfun_cli.families import FAMILIES
from vfun_cli.plan.balance import mean_over_max
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.schedule import plan_epoch

ROWS = 1_000_000


def main() -> None:
    """Plan one epoch for each family and several numbers of ranks; print and write what it took."""
    given = parser("plan_million", __doc__).parse_args()
    rows = 1000 if given.smoke else ROWS
    numbers = []
    for name, spec in FAMILIES.items():
        table = mixed_set(rows, images=0.3 if "image" in spec.media_types else 0.0)
        for world_size in (1, 8, 512):
            started, worked = time.perf_counter(), time.process_time()
            plan = plan_epoch(
                spec, spec.model.dims, table, PlanOptions.pick(spec.defaults.train, world_size=world_size), 0
            )
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
            started = time.perf_counter()
            digest = plan.digest()
            balance = mean_over_max(plan)
            assert balance is not None  # there are rows
            line = {
                "family": name,
                "world_size": world_size,
                "seconds": round(seconds, 4),
                "cpu_seconds": round(cpu_seconds, 4),
                "digest_seconds": round(time.perf_counter() - started, 4),
                "peak_mb_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "steps": plan.num_steps,
                "buckets": len(plan.buckets),
                "used": plan.ledger.used,
                "mean_over_max_flops": round(balance, 5),
                "digest": digest,
            }
            numbers.append(line)
            print(line)
    write_result(given, {"rows": rows, "images": 0.3, "results": numbers})


if __name__ == "__main__":
    main()
