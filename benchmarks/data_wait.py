"""How long a step waits for its clips when the cache is full: entries of real size, read from the disk.

Run from the repository root: ``python benchmarks/data_wait.py``. The aim: under 2 % of the time of a step. The plan,
the decoding processes, the cache, the putting together of a sample and the trainer are those of a run; the share is
the trainer's own ``data_wait_share``. The entries are as large as Wan-S2V's at 512 x 512 x 48 (32 MB a clip, sizes
below) and hold noise. In place of the transformer stands a small one that computes, forward and backward in one
thread, until a step takes about as long as stated. Before each row the entries leave the page cache, so that the first
epoch is read from the disk. The memory is the most that each decoding process ever had resident (VmHWM, shared pages
included), after a quarter of the steps and at the end.
"""

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Generator
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from record import parser, write_result
from step_breakdown import run_json_of
from torch import Tensor, nn

STEP_SECONDS = (4.0, 1.0, 0.5, 0.25, 0.2, 0.15, 0.1)
STEPS, WARM_UP = 24, 4
ROW_SECONDS = 20.0
"""Short steps are repeated for as long."""
WORKERS = (1, 2)
AIM = 0.02
LATENT = (16, 64, 64)
CONTEXT, FRAMES = 19, 12
"""Latent frames of the history and of the clip."""
TEXT_LEN, WIDTH, ROWS = 512, 1024, 128


class Work(nn.Module):
    """Takes what the transformer takes, and so many matrix products, forward and backward, to answer."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"text_len": TEXT_LEN}
        self.repeats = repeats
        self.layer, self.mix = nn.Linear(WIDTH, WIDTH), nn.Linear(LATENT[0], LATENT[0])
        self.start: Tensor
        self.register_buffer("start", torch.randn(ROWS, WIDTH))

    def forward(self, hidden_states: Tensor, **conditions: Any) -> Tensor:
        rows = self.start
        for _ in range(self.repeats):
            rows = torch.tanh(self.layer(rows))
        answer: Tensor = self.mix(hidden_states.movedim(1, -1)).movedim(-1, 1)
        return answer + rows.mean()


def entry(name: str, inputs: Any) -> dict[str, Tensor]:
    """What the encoder gives of one input of a clip, by the family's names of its inputs."""
    if name == "text":
        return {"states": torch.randn(TEXT_LEN, 4096).bfloat16()}
    if name == "audio":
        return {"features": torch.randn(4 * FRAMES, 25, 1024)}
    context = 1 if "history" in inputs else CONTEXT  # without its history, a clip stands behind its reference frame
    frames = {"clip": context + FRAMES, "history": CONTEXT, "control": 1 + FRAMES, "reference": 1}[name]
    shape = (LATENT[0], frames, *LATENT[1:])
    return {"mean": torch.randn(shape), "std": torch.rand(shape)}


class Bench:
    """A plan over the demo's clips, a cache that has all of it in real size, and the trainer to run it."""

    def __init__(self, folder: Path, steps: int) -> None:
        from vfun_cli import families
        from vfun_cli.config.options import RunConfig
        from vfun_cli.encoding.cache import Cache
        from vfun_cli.families import adapter_of
        from vfun_cli.plan.run_plan import load_plan
        from vfun_cli.run.cachedir import entries
        from vfun_cli.training.data.stream import micro_batches, row_reader
        from vfun_cli.training.model import adapter_options

        self.folder, self.spec = folder, families.find("wan-s2v")
        run_json, _ = run_json_of("wan-s2v", "single", folder / "run", folder / "cache", steps, "no")
        described = json.loads(run_json.read_text())
        self.config = RunConfig.from_json(described["config"])
        self.plan, self.adapter = load_plan(self.config, self.spec, described), adapter_of(self.spec)
        self.options = adapter_options(self.config, self.spec, torch.device("cpu"))
        self.cache = Cache.for_encoders(folder / "cache", self.adapter.encoders_of(self.options))
        self.read_row = row_reader(self.config, self.spec)
        for batch in micro_batches(self.plan, self.read_row, rank=0, first_step=0):
            for request in batch.requests:
                inputs = self.adapter.inputs(request, self.options)
                for name, wanted in inputs.items():
                    if wanted.encoder is not None and not self.cache.has(self.cache.key(wanted)):
                        self.cache.write(self.cache.key(wanted), entry(name, inputs))
        self.files = list(entries(self.cache.root))
        self.runs = 0

    def leave_page_cache(self) -> None:
        os.sync()
        for path in self.files:
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    def train(self, workers: int, steps: int, repeats: int) -> dict[str, Any]:
        """One run of the trainer from the cache; what its metrics and its decoding processes say."""
        from bare_loop import make_trainer

        from vfun_cli.modeling.encoders.frozen import Encoders
        from vfun_cli.training.data.loader import LoadedBatch, load_ahead
        from vfun_cli.training.data.stream import micro_batches

        self.leave_page_cache()
        self.runs += 1
        folder = self.folder / f"run-{self.runs}"
        folder.mkdir()
        model = Work(repeats)
        adapter: Any = self.adapter
        adapter = adapter(transformer=model, encoders=Encoders({}, torch.device("cpu")), options=self.options)
        trainer = make_trainer(folder, adapter, model, self.config, self.spec, self.plan.dims, steps)
        peaks: list[list[int]] = []
        sizes: list[int] = []
        batches = micro_batches(self.plan, self.read_row, rank=0, first_step=0)
        loaded = load_ahead(self.adapter, self.options, batches, workers, "stop", self.cache)

        def watched() -> Generator[LoadedBatch, None, None]:
            for number, each in enumerate(each for each in loaded if each is not None):
                if number in (steps // 4, steps - 1):
                    peaks.append(peak_bytes())
                assert not any(sample.values for sample in each.samples), "the cache is not full"
                found = [output for sample in each.samples for output in sample.found.values()]
                sizes.append(sum(tensor.nbytes for output in found for tensor in output.values()))
                yield each

        source = watched()
        trainer.train(source, 0)
        source.close()
        loaded.close()
        trainer.metrics.close()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steady = [line for line in lines if "loss" in line][min(WARM_UP, steps // 2) :]
        return {
            "steps": steps,
            "measured_step_seconds": round(median(line["seconds"] for line in steady), 4),
            "bytes_a_step": round(mean(sizes)),
            "wait_share": round(mean(line["data_wait_share"] for line in steady), 4),
            "longest_wait_seconds": max(line["data_wait"] for line in steady),
            "peak_bytes_of_workers_after_a_quarter": peaks[0],
            "peak_bytes_of_workers_at_the_end": peaks[-1],
        }


def peak_bytes() -> list[int]:
    """Of every decoding process."""
    found = []
    for process in multiprocessing.active_children():
        said = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        assert said
        found.append(1024 * int(said[1]))
    return sorted(found)


def seconds_of_work() -> float:
    """One matrix product of the stand-in, forward and backward."""
    model, taken = Work(8), []
    for _ in range(5):
        began = time.perf_counter()
        model(torch.zeros(1, *LATENT[:1], 1, 1, 1)).sum().backward()
        taken.append((time.perf_counter() - began) / model.repeats)
    return min(taken)


def shortest(rows: list[dict[str, Any]], workers: int) -> float | None:
    """The shortest step, as measured, from which on no longer one waits for more than the aim."""
    found = None
    for row in sorted((row for row in rows if row["workers"] == workers), key=lambda r: -r["measured_step_seconds"]):
        if row["wait_share"] >= AIM:
            break
        found = row["measured_step_seconds"]
    return found


def main() -> None:
    """Fill, measure, print and write."""
    given = parser("data_wait", __doc__).parse_args()
    lengths: tuple[float, ...] = STEP_SECONDS
    workers_tried: tuple[int, ...] = WORKERS
    least_steps, row_seconds = STEPS, ROW_SECONDS
    if given.smoke:
        lengths, workers_tried, least_steps, row_seconds = STEP_SECONDS[-1:], WORKERS[:1], 4, 0.0
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        os.chdir(scratch)
        wanted = {seconds: max(least_steps, int(row_seconds / seconds)) for seconds in lengths}
        bench = Bench(Path(scratch).absolute(), max(wanted.values()))
        unit = seconds_of_work()
        beside = bench.train(1, least_steps, 1)["measured_step_seconds"] - unit
        rows: list[dict[str, Any]] = []
        for workers in workers_tried:
            for seconds, steps in wanted.items():
                row = bench.train(workers, steps, max(1, round((seconds - beside) / unit)))
                rows.append({"workers": workers, "step_seconds": seconds, **row})
                print(rows[-1], flush=True)
        numbers = {
            "entries": len(bench.files),
            "bytes": sum(path.stat().st_size for path in bench.files),
            "aim": AIM,
            "shortest_step_within_the_aim_seconds": {
                f"{workers} decoding processes": shortest(rows, workers) for workers in workers_tried
            },
            "rows": rows,
        }
    write_result(given, numbers)


if __name__ == "__main__":
    main()
