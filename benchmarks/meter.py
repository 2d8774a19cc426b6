"""What the meter costs: every call that it adds to a step, timed inside the steps that it measures.

Run from the repository root: ``python benchmarks/meter.py``. The aim: under 0.5 % of a step. The steps are those of
benchmarks/bare_loop.py, trained by the product's trainer. Counted are the marks of the clock, the rank's own numbers,
the download, and the record with metrics.jsonl and TensorBoard (whose file is written by a thread beside); the
collective is not, because the ranks have to agree on stopping anyway. The numbers of 64 ranks are those of the one
there is, repeated before they are downloaded.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bare_loop import MODEL, SHAPE, Encoded, make_config, make_model, make_trainer
from record import parser, write_result
from torch import Tensor

from vfun_cli.families.cogvideox_fun import SPEC
from vfun_cli.modeling.transfer import Download
from vfun_cli.training import trainer as trainer_module
from vfun_cli.training.data.loader import LoadedBatch

STEPS, WARM_UP = 100, 3
RANKS = (1, 64)
AIM = 0.005


class Stopwatch:
    """Seconds spent inside the functions it was wrapped around, since it was last read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure(ranks: int, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train, with a stopwatch around the meter's calls; a step lies between two requests for its clip."""
    encoded, config, watch = Encoded(), make_config(), Stopwatch()
    in_meter: list[float] = []
    whole: list[float] = []

    def batches() -> Iterator[LoadedBatch]:
        for number in range(WARM_UP + steps):
            loaded, began = encoded.batch(number), time.perf_counter()
            watch.read()
            yield loaded
            whole.append(time.perf_counter() - began)
            in_meter.append(watch.read())
        yield loaded  # tells that the one before is over

    with TemporaryDirectory() as folder:
        total = WARM_UP + steps + 1
        trainer = make_trainer(
            Path(folder), encoded, make_model(settings), config, SPEC, SPEC.model.read_dims(settings), total
        )
        metrics, gather = trainer.metrics, trainer.gather
        metrics.measure = watch.around(metrics.measure)  # type: ignore[method-assign]
        metrics.step = watch.around(metrics.step)  # type: ignore[method-assign]
        metrics.clock.mark = watch.around(metrics.clock.mark)  # type: ignore[method-assign]

        def gather_from_all(*args: Any) -> Tensor:
            return gather(*args).expand(ranks, -1)

        def download(values: Tensor) -> Any:
            made = Download(values)
            made.numbers = watch.around(made.numbers)  # type: ignore[method-assign]
            return made

        # The trainer's own functions, timed: what is measured must be what vfun runs.
        trainer.gather = gather_from_all  # type: ignore[assignment,method-assign]
        trainer_module.Download = watch.around(download)  # type: ignore[assignment,attr-defined]
        try:
            source = batches()
            trainer.train(source, 0)
            next(source, None)
        finally:
            trainer_module.Download = Download  # type: ignore[attr-defined]
            metrics.close()
    meter, step = np.array(in_meter[WARM_UP:]), np.array(whole[WARM_UP:])
    assert len(meter) == steps and meter.min() > 0
    return {
        "ranks": ranks,
        "median_microseconds": round(1e6 * float(np.median(meter)), 1),
        "mean_microseconds": round(1e6 * float(meter.mean()), 1),
        "99_percent_microseconds": round(1e6 * float(np.quantile(meter, 0.99)), 1),
        "step_seconds": round(float(np.median(step)), 4),
        "share_of_step": round(float(meter.sum() / step.sum()), 6),
        "shortest_step_within_half_a_percent_seconds": round(float(meter.mean()) / AIM, 4),
    }


def main() -> None:
    """Measure, print and write."""
    given = parser("meter", __doc__).parse_args()
    steps = 2 if given.smoke else STEPS
    settings = MODEL | {"num_layers": 1} if given.smoke else MODEL
    torch.set_num_threads(1)
    rows = []
    for ranks in RANKS:
        rows.append(measure(ranks, steps, settings))
        print(rows[-1], flush=True)
    write_result(given, {"shape": SHAPE, "model": settings, "threads": 1, "steps": steps, "aim": AIM, "rows": rows})


if __name__ == "__main__":
    main()
