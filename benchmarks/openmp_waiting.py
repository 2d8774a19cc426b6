"""How the OpenMP threads of a rank should wait for each other: a step of Wan-S2V, alone and on a busy machine.

One process for each way to wait, all with the same model, clip and number of threads, takes a step in turn: encoders,
forward, backward, AdamW, in float32 on the CPU. The same again beside one spinning process for each core. What
counts are the ratios to the variables that a launch sets; a round in which something else took more than a tenth of
the machine is left out of the quiet ones and told.

    python benchmarks/openmp_waiting.py
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import record

ROOT = Path(__file__).absolute().parents[1]
sys.path.insert(0, str(ROOT))

from vfun_cli.launch.templates import WAITING  # noqa: E402

WAYS: Mapping[str, Mapping[str, str]] = {
    "as launched": WAITING,
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OpenMP's default": {},
}
ROUNDS, BUSY_ROUNDS, WARM_UP = 15, 5, 1
FOREIGN = 0.1
"""Share of the machine's time that others may take in a quiet round."""
FAMILY = "wan-s2v"
SHAPE: dict[str, Any] = {"frames": 8, "height": 64, "width": 64}


def make_step(folder: Path) -> Callable[[], None]:
    """One training step of the demo on one clip, decoded before."""
    import torch

    from vfun_cli import families
    from vfun_cli.config.resolve import resolve
    from vfun_cli.demo import default as demo_default
    from vfun_cli.encoding.encode import encode, prepared
    from vfun_cli.families import adapter_of
    from vfun_cli.modeling.adapter import SampleRequest
    from vfun_cli.modeling.randomness import SampleKey
    from vfun_cli.training.model import adapter_options
    from vfun_cli.training.objectives import make_objective

    spec = families.find(FAMILY)
    demo = demo_default.make(spec, folder)
    config = resolve("train", spec, {"mixed_precision": "no"}, demo=demo, environ={}).config
    options = adapter_options(config, spec, torch.device("cpu"))
    adapter = adapter_of(spec).from_pretrained(options)
    optimizer = torch.optim.AdamW(adapter.transformer.parameters(), lr=1e-4)
    objective = make_objective(spec.model.objective, spec.model.objective_options, options.model_dir)
    root = Path(str(config.train_data_dir))
    request = SampleRequest(
        key=SampleKey(seed=1, epoch=0, row=0), kind="video", stride=1, total_frames=40, fps=(16, 1),
        record={
            "file_path": str(root / "train/00000001.mp4"), "audio_path": str(root / "wav/00000001.wav"),
            "control_file_path": str(root / "control/00000001.mp4"), "text": "a red circle moves", "type": "video",
        },
        **SHAPE,
    )  # fmt: skip
    sample = prepared(adapter_of(spec).inputs(request, options))

    def step() -> None:
        latents, conditions = encode(adapter, [sample], [request.key])
        corrupted = objective.corrupt(latents, [request.key])
        mask = conditions.pop("loss_mask", None)
        prediction = adapter.predict(adapter.transformer, corrupted.noisy, corrupted.timesteps, conditions)
        objective.loss(prediction, corrupted.target, mask).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(folder: Path) -> None:
    """One of the processes: a step for every line that it reads, its seconds in answer."""
    step = make_step(folder)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


@contextmanager
def worker(variables: Mapping[str, str], threads: int, folder: Path) -> Iterator[Callable[[], list[float]]]:
    """A process with these variables, and how to have it take a step: its seconds of the clock and of the processor."""
    own = {name: value for name, value in os.environ.items() if name not in {*WAITING, "OMP_WAIT_POLICY"}}
    with subprocess.Popen(
        [sys.executable, __file__, "--work", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**own, "OMP_NUM_THREADS": str(threads), **variables},
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def step() -> list[float]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            answer: list[float] = json.loads(process.stdout.readline())
            return answer

        yield step
        process.stdin.close()


@contextmanager
def busy_machine(processes: int) -> Iterator[None]:
    """Others that take what they get."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def machine_seconds() -> float:
    """Processor time of all processes of the machine."""
    user, nice, system, _, _, interrupts, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def rounds(
    steps: Mapping[str, Callable[[], list[float]]], number: int
) -> Iterator[tuple[dict[str, list[float]], float]]:
    """A step of each in turn; and the share of the machine that others took meanwhile."""
    for _ in range(number):
        began, before = time.perf_counter(), machine_seconds()
        times = {name: step() for name, step in steps.items()}
        elapsed = (time.perf_counter() - began) * (os.cpu_count() or 1)
        yield times, (machine_seconds() - before - sum(cpu for _, cpu in times.values())) / elapsed


def summary(found: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Medians over the rounds, of ratios within a round."""

    def ratio(name: str, index: int) -> float:
        return round(median(times[name][index] / times["as launched"][index] for times in found), 3)

    seconds = {name: round(median(times[name][0] for times in found), 4) for name in WAYS}
    others = [name for name in WAYS if name != "as launched"]
    return {
        "rounds": len(found),
        "seconds a step": seconds,
        "wall / as launched": {name: ratio(name, 0) for name in others},
        "processor time / as launched": {name: ratio(name, 1) for name in others},
    }


def main() -> None:
    """Measure, print and write."""
    parser = record.parser("openmp_waiting", __doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the quiet machine")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        work(given.work)
        return
    number, beside, warm_up = (1, 1, 0) if given.smoke else (given.rounds, BUSY_ROUNDS, WARM_UP)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        make_step(Path(folder))  # the demo, before there are several that would make it
        steps = {
            name: stack.enter_context(worker(variables, given.threads, Path(folder)))
            for name, variables in WAYS.items()
        }
        list(rounds(steps, warm_up))
        alone = list(rounds(steps, number))
        with busy_machine(1 if given.smoke else os.cpu_count() or 1):
            busy = [times for times, _ in rounds(steps, beside)]
    quiet = [times for times, foreign in alone if foreign <= FOREIGN or given.smoke]
    record.write_result(given, {
        "family": FAMILY,
        "threads": given.threads,
        "ways": {name: dict(variables) for name, variables in WAYS.items()},
        "alone": {**summary(quiet), "rounds disturbed by others": len(alone) - len(quiet)} if quiet else None,
        "beside a spinning process for each core": summary(busy),
    })  # fmt: skip


if __name__ == "__main__":
    main()
