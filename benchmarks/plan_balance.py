"""Mean over max FLOPs across ranks: the plan beside independent draws, for each family with the published settings.

Run from the repository root: ``python benchmarks/plan_balance.py``. The aim: at least 0.98 over an epoch.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from plan_sets import mixed_set, uniform_set
from record import parser, write_result

from vfun_cli.families import FAMILIES
from vfun_cli.plan.balance import independent_balance, mean_over_max
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.schedule import plan_epoch

RANKS = (8, 64, 512)
ROWS, SMALL_ROWS = 200_000, 10_000

BATCHES: dict[str, dict[str, Any]] = {
    "batch 1": {},
    "batch 4": {"train_batch_size": 4},
    "50,000 tokens": {"tokens_per_batch": 50_000},
    "batch 1, accumulation 4": {"gradient_accumulation_steps": 4},
}


def main() -> None:
    """Measure every combination; print and write them, the smallest last."""
    given = parser("plan_balance", __doc__).parse_args()
    rows, small_rows, ranks = (2000, 1000, RANKS[:1]) if given.smoke else (ROWS, SMALL_ROWS, RANKS)
    numbers = []
    for name, spec in FAMILIES.items():
        images = 0.3 if "image" in spec.media_types else 0.0
        sets = {
            f"720p, {rows} rows": uniform_set(rows),
            f"mixed, {rows} rows": mixed_set(rows, images=images),
            f"mixed, {small_rows} rows": mixed_set(small_rows, images=images),
        }
        for data, table in sets.items():
            for batch, options in BATCHES.items():
                for world_size in ranks:
                    chosen = PlanOptions.pick(spec.defaults.train, **{**options, "world_size": world_size})
                    plan = plan_epoch(spec, spec.model.dims, table, chosen, 0)
                    balance, independent = mean_over_max(plan), independent_balance(plan)
                    assert balance is not None and independent is not None  # there are rows
                    line: dict[str, Any] = {
                        "family": name,
                        "data": data,
                        "batch": batch,
                        "world_size": world_size,
                        "steps": plan.num_steps,
                        "mean_over_max_flops": round(balance, 4),
                        "independent_draws": round(independent, 4),
                    }
                    numbers.append(line)
                    print(*line.values(), sep="  ")
    large = [line["mean_over_max_flops"] for line in numbers if line["data"] != f"mixed, {small_rows} rows"]
    print(f"smallest with {rows} rows: {min(large)}")
    write_result(given, {"smallest_with_all_rows": min(large), "results": numbers})


if __name__ == "__main__":
    main()
