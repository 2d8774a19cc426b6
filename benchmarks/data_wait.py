"""How long a step waits for its clips when the cache is full: entries of real size, read from the disk.

Run from the repository root: ``python benchmarks/data_wait.py``. The aim: under 2 % of the time of a step. The plan,
the decoding processes and the cache are those of a run; the entries are as large as Wan-S2V's at 512 x 512 x 49
(32 MB a clip, sizes below) and hold noise. The step itself is a pause of the stated length, which is how the host sees
a device at work. Before each row the entries leave the page cache, so that the first epoch is read from the disk.
"""

import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from plan_sets import write_result
from step_breakdown import run_json_of

STEP_SECONDS = (4.0, 1.0, 0.5, 0.25)
STEPS, WARM_UP = 24, 4
WORKERS = (1, 2)
LATENT_FRAME = (2, 16, 64, 64)
"""Mean and deviation of one latent frame, float32: 512 kB."""
ENTRIES: dict[str, Any] = {
    "clip": lambda: torch.randn(31, *LATENT_FRAME),
    "history": lambda: torch.randn(19, *LATENT_FRAME),
    "control": lambda: torch.randn(13, *LATENT_FRAME),
    "reference": lambda: torch.randn(1, *LATENT_FRAME),
    "text": lambda: torch.randn(512, 4096).bfloat16(),
    "audio": lambda: torch.randn(49, 25, 1024),
}
"""What the encoders give of one clip, by the family's names of its inputs."""


def main() -> None:
    """Fill, measure, print and write."""
    from vfun_cli import families
    from vfun_cli.config import RunConfig
    from vfun_cli.runplan import load_plan
    from vfun_cli.training.cache import Cache, entries
    from vfun_cli.training.data import load_ahead
    from vfun_cli.training.session import adapter_of, adapter_options, load_options
    from vfun_cli.training.stream import micro_batches

    with TemporaryDirectory() as folder:
        os.chdir(folder)
        run_json, _ = run_json_of("wan-s2v", "single", Path("run"), Path("cache").absolute())
        described = json.loads(run_json.read_text())
        described["config"] |= {"max_train_steps": STEPS}
        config, spec = RunConfig.from_json(described["config"]), families.find("wan-s2v")
        plan, adapter = load_plan(config, spec, described), adapter_of(spec)
        options = load_options(config, spec)
        cache = Cache.for_encoders(Path("cache"), adapter.encoders_of(adapter_options(config, torch.device("cpu"))))

        for batch in micro_batches(plan, rank=0, first_step=0):
            for request in batch.requests:
                for name, wanted in adapter.inputs(request, options).items():
                    if wanted.encoder is not None and not cache.has(cache.key(wanted)):
                        cache.write(cache.key(wanted), {"values": ENTRIES[name]()})
        files = list(entries(cache.root))

        def leave_page_cache() -> None:
            os.sync()
            for path in files:
                handle = os.open(path, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)

        rows = []
        for workers in WORKERS:
            for seconds in STEP_SECONDS:
                leave_page_cache()
                batches = load_ahead(
                    adapter, options, micro_batches(plan, rank=0, first_step=0), workers, "stop", cache
                )
                waits, read = [], 0
                for _ in range(STEPS):
                    began = time.perf_counter()
                    loaded = next(batches)
                    waits.append(time.perf_counter() - began)
                    found = [value for sample in loaded.samples for value in sample.found.values()]
                    read = sum(tensor.nbytes for output in found for tensor in output.values())
                    time.sleep(seconds)
                batches.close()  # type: ignore[attr-defined]
                steady = waits[WARM_UP:]
                share = sum(steady) / (sum(steady) + seconds * len(steady))
                rows.append(
                    {
                        "workers": workers, "step_seconds": seconds, "bytes_a_step": read,
                        "wait_share": round(share, 4), "longest_wait_seconds": round(max(steady), 4),
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
        size = sum(path.stat().st_size for path in files)
    write_result("data_wait", {"entries": len(files), "bytes": size, "aim": 0.02, "rows": rows})


if __name__ == "__main__":
    main()
