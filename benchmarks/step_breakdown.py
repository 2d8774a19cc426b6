"""Where the time of a step goes, with the encoders working at every step (as the originals do) and from a full cache.

Trains the embedded default through the product's own loop, every family on one process and two of them on two, and
times its parts from outside: waiting for decoded clips, encoding, forward, backward, clipping and optimizer. How long
collectives are on their way is read from a profile of a few more steps; under DDP most of that time lies inside the
backward pass, under FSDP inside forward and backward, so it is no part of its own. The same steps run twice: losses
must agree to 1e-5.

    python benchmarks/step_breakdown.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import record

ALONE = (
    "wan-s2v", "wan-fun-control", "hunyuanvideo-t2v", "hunyuanvideo-i2v", "easyanimate-v5-control",
    "easyanimate-v5.1-control", "cogvideox-fun",
)  # fmt: skip
TOGETHER = ("wan-s2v", "cogvideox-fun")
RUNS = [
    *((family, "single") for family in ALONE),
    *((family, strategy) for family in TOGETHER for strategy in ("ddp", "fsdp")),
]
"""Family and strategy."""
STEPS, WARM_UP, PROFILED = 10, 2, 3


def run_json_of(
    family: str, strategy: str, folder: Path, cache: Path | None, steps: int, precision: str
) -> tuple[Path, list[str]]:
    """Everything ``vfun train`` writes before it launches, and its launch command."""
    from vfun_cli import families
    from vfun_cli.config.resolve import resolve
    from vfun_cli.demo import default
    from vfun_cli.launch.job import decide
    from vfun_cli.launch.start import write_launch_files, write_plan

    spec = families.find(family)
    given = {
        "strategy": strategy, "max_train_steps": steps + PROFILED, "checkpointing_steps": 10**6, "cache": cache,
        "cache_variants": 1, "video_repeat": 4, "output_dir": folder, "dataloader_num_workers": 1,
        "report_to": "none", "lr_scheduler": "constant", "mixed_precision": precision,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    resolved = resolve("train", spec, given, demo=default.make(spec), environ={})
    job = decide("train", spec, resolved)
    write_plan(job)
    write_launch_files(job)
    argv = job.launch.argv[: job.launch.argv.index("vfun_cli.training") - 1]
    argv.remove("PYTHONSAFEPATH=1")  # the ranks are this script, which imports its neighbours
    return job.run_json, [*argv, str(Path(__file__).absolute()), "--rank", str(job.run_json.absolute())]


def fill(family: str, strategy: str, folder: Path, cache: Path, steps: int, precision: str) -> None:
    """The cache of that very run, by the product's command."""
    run_json, _ = run_json_of(family, strategy, folder, cache, steps, precision)
    described = json.loads(run_json.read_text())
    options = [
        f"--{name.replace('_', '-')}={described['config'][name]}"
        for name in (
            "strategy",
            "max_train_steps",
            "cache_variants",
            "video_repeat",
            "num_processes",
            "mixed_precision",
        )
    ]
    argv = [sys.executable, "-m", "vfun_cli", "cache", family, "--demo", "--cache", str(cache), *options]
    subprocess.run(argv, check=True, capture_output=True)


def timed_rank(run_json: Path) -> int:
    """One rank of the job with stopwatches around the parts of a step."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.profiler import ProfilerActivity, profile

    from vfun_cli import families
    from vfun_cli.families import adapter_of
    from vfun_cli.training import trainer
    from vfun_cli.training.__main__ import run_rank

    spent: dict[str, list[float]] = defaultdict(list)
    current: dict[str, float] = defaultdict(float)

    def watch(owner: Any, name: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                current[part] += time.perf_counter() - began

        setattr(owner, name, timed)

    described = json.loads(run_json.read_text())
    steps = described["config"]["max_train_steps"] - PROFILED
    adapter = adapter_of(families.find(described["family"]))
    watch(trainer, "encode", "encode")
    watch(adapter, "predict", "forward")
    watch(Accelerator, "backward", "backward")
    watch(Accelerator, "clip_grad_norm_", "clip and optimizer")
    watch(AcceleratedOptimizer, "step", "clip and optimizer")
    step = trainer.Trainer.enqueue

    profiler = profile(activities=[ProfilerActivity.CPU])

    def timed_step(self: Any, *args: Any) -> Any:
        if len(spent["whole"]) == steps:
            profiler.start()
            spent["profiled"] = [0.0]
        if "profiled" in spent:
            return step(self, *args)
        current.clear()
        began = time.perf_counter()
        result = step(self, *args)
        current["whole"] = time.perf_counter() - began
        for part, seconds in current.items():
            spent[part].append(seconds)
        return result

    # The trainer's own step, timed: what is measured must be what vfun runs.
    trainer.Trainer.enqueue = timed_step  # type: ignore[assignment,method-assign]
    code = run_rank(run_json)
    profiler.stop()
    collectives = sum(event.time_range.elapsed_us() for event in profiler.events() if event.name.startswith("gloo:"))
    spent["profiled"] = [collectives / PROFILED / 1e6]
    if os.environ.get("RANK", "0") == "0":
        run_json.with_name("spent.json").write_text(json.dumps(spent))
    return code


def measure(family: str, strategy: str, folder: Path, cache: Path | None, steps: int, precision: str) -> dict[str, Any]:
    """Seconds of each part of a step (mean after warm-up), and the losses."""
    run_json, argv = run_json_of(family, strategy, folder, cache, steps, precision)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    spent = json.loads(run_json.with_name("spent.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    losses = [line["loss"] for line in lines]
    collectives = spent.pop("profiled")[0]
    parts = {part: mean(seconds[WARM_UP:]) for part, seconds in spent.items()}
    parts["wait for data"] = mean(line["data_wait"] for line in lines[WARM_UP:steps])
    parts["rest of the step"] = parts["whole"] - sum(
        parts.get(part, 0) for part in ("encode", "forward", "backward", "clip and optimizer")
    )
    return {"seconds": {**parts, "collectives, inside the others": collectives}, "losses": losses}


def main() -> None:
    parser = record.parser("step_breakdown", __doc__)
    parser.add_argument(
        "--mixed-precision", choices=("bf16", "no"), default="bf16", help="no: for a CPU that multiplies bf16 slowly"
    )
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        sys.exit(timed_rank(given.rank))
    runs, steps, precision = RUNS, STEPS, given.mixed_precision
    if given.smoke:
        runs, steps, precision = RUNS[:1], WARM_UP + 1, "no"
    result: dict[str, Any] = {"mixed precision": precision, "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for family, strategy in runs:
            name = f"{family} {strategy}"
            cache = Path("cache").absolute()
            fill(family, strategy, Path("filling"), cache, steps, precision)
            encoded = measure(family, strategy, Path(f"{family}-{strategy}-encoded"), None, steps, precision)
            cached = measure(family, strategy, Path(f"{family}-{strategy}-cached"), cache, steps, precision)
            apart = max(abs(a - b) for a, b in zip(encoded["losses"], cached["losses"], strict=True))
            assert apart <= 1e-5, f"{name}: losses differ by {apart}"
            whole = {
                kind: each["seconds"]["whole"] + each["seconds"]["wait for data"]
                for kind, each in (("encoded", encoded), ("cached", cached))
            }
            result["runs"][name] = {
                "encoding at every step": shares(encoded["seconds"], whole["encoded"]),
                "from the cache": shares(cached["seconds"], whole["cached"]),
                "step time cached / encoded": round(whole["cached"] / whole["encoded"], 3),
                "largest difference of losses": apart,
            }
            print(name, json.dumps(result["runs"][name], indent=1), flush=True)
    record.write_result(given, result)


def shares(seconds: dict[str, float], whole: float) -> dict[str, Any]:
    """Seconds of a step, and the share of each part."""
    parts = {part: value for part, value in seconds.items() if part != "whole"}
    return {"seconds a step": round(whole, 4), **{part: round(value / whole, 4) for part, value in parts.items()}}


if __name__ == "__main__":
    main()
