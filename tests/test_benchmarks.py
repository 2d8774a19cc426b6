"""Every benchmark runs at its smallest and leaves a whole record, so that none rots between two measurements."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NOT_SCRIPTS = {"plan_sets", "record"}
"""Modules that the benchmarks share."""
MARKS = {
    "bare_loop": pytest.mark.long,
    "bf16_on_cpu": pytest.mark.slow,
    "data_wait": pytest.mark.long,
    "decode": pytest.mark.long,
    "decoding_start": pytest.mark.long,
    "export": pytest.mark.long,
    "forecast": pytest.mark.long,
    "forecast_on_gpu": pytest.mark.long,
    "frame_matrix": pytest.mark.long,
    "loading_memory": pytest.mark.long,
    "fuzz_files": pytest.mark.long,
    "fuzz_metadata": pytest.mark.slow,
    "gpu_step": pytest.mark.long,
    "help_startup": pytest.mark.long,
    "import_originals": (),
    "kill_fuzz": pytest.mark.long,
    "kill_matrix": pytest.mark.long,
    "large_set": pytest.mark.slow,
    "lora_merge": pytest.mark.slow,
    "meter": pytest.mark.long,
    "openmp_waiting": pytest.mark.long,
    "overfit": pytest.mark.long,
    "plan_balance": (),
    "plan_million": (),
    "scaling": pytest.mark.long,
    "sigterm": pytest.mark.long,
    "sound_matrix": (),
    "startup": pytest.mark.long,
    "step_breakdown": pytest.mark.long,
    "validate_throughput": pytest.mark.long,
    "validation": pytest.mark.long,
}
"""By how long the smallest run takes: under 3 s, up to 5 s, longer."""
NUMBERS = {
    "bare_loop": ["cpu/ratio_of_medians", "wall/ratio_of_medians"],
    "bf16_on_cpu": ["AVX2 alone/linear layer/bfloat16 over float32", "as it is/3D convolution/float32"],
    "data_wait": ["rows/0/wait_share", "rows/0/peak_bytes_of_workers_at_the_end/0"],
    "decode": ["rows/0/seconds/vfun", "rows/1/times_of_vfun/decord", "peak_bytes_of_77_frames_at_1080p/vfun"],
    "decoding_start": ["cogvideox-fun/processor_seconds", "cogvideox-fun/an interpreter of its own/bytes"],
    "export": ["cases/0/tools/vfun/wall_s", "cases/2/tools/accelerate merge-weights/wall_s"],
    "forecast": ["full/fsdp/gib", "lora/bf16/gib"],
    "forecast_on_gpu": ["rows/0/peak_bytes", "rows/3/forecast_bytes", "rows/5/seen/backward", "most_off"],
    "frame_matrix": ["clips", "videos"],
    "loading_memory": ["rows/0/kept_copies", "rows/1/kept_copies"],
    "fuzz_files": ["mutations"],
    "fuzz_metadata": ["metadata/files", "media/files", "playlists/files"],
    "gpu_step": ["wan-s2v/rows/1/tokens_per_second", "wan-s2v/rows/1/tflops", "cogvideox-fun/rows/2/tokens_per_second"],
    "help_startup": ["vfun_over_accelerate"],
    "import_originals": ["launches", "translated", "families"],
    "kill_fuzz": ["kills", "kills in windows/--overwrite"],
    "kill_matrix": ["good", "slowest_end_seconds", "rows/0/seconds/0"],
    "large_set": ["plan/wan-s2v/peak_mb", "store/bytes_a_row", "read_own/peak_mb", "read_all/kept_bytes_a_row"],
    "lora_merge": ["peak_bytes"],
    "meter": ["rows/0/share_of_step", "rows/1/shortest_step_within_half_a_percent_seconds"],
    "openmp_waiting": ["alone/wall ~1 as launched/asleep at once", "beside a spinning process for each core/rounds"],
    "overfit": ["psnr_db/wan-s2v/ceiling", "psnr_db/wan-s2v/last_loss"],
    "plan_balance": ["smallest_with_all_rows"],
    "plan_million": ["results/0/seconds"],
    "scaling": ["results/0/our_schedule"],
    "sigterm": ["good"],
    "sound_matrix": ["kinds", "clicks"],
    "startup": [
        "single/seconds to the first step",
        "single/checkpoint in the background/seconds held up",
        "single/checkpoint of the larger transformer/in the background/seconds of writing beside the steps",
        "single/checkpoint of the larger transformer/plain write and fsync/seconds",
    ],
    "step_breakdown": ["runs/wan-s2v single/step time cached ~1 encoded"],
    "validation": ["rows/0/held-out/over_floor", "rows/0/samples/over_floor"],
    "validate_throughput": ["files_per_second/both/ratio"],
}
"""What must be in the record, as JSON pointers (a slash of a key is ~1), each of them a number above zero."""


def at(record: Any, pointer: str) -> Any:
    for key in pointer.split("/"):
        key = key.replace("~1", "/")
        record = record[int(key)] if isinstance(record, list) else record[key]
    return record


def smoke(script: str, folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    argv = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--smoke", *more]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=folder, check=False)


def kept(script: str) -> str | None:
    """The committed record, which a smoke run must leave alone."""
    path = BENCHMARKS / "results" / f"{script}.json"
    return path.read_text() if path.exists() else None


def test_every_benchmark_has_a_smoke_test() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - NOT_SCRIPTS
    assert scripts == set(MARKS) == set(NUMBERS)


@pytest.mark.slow
@pytest.mark.parametrize("script", [pytest.param(script, marks=marks) for script, marks in MARKS.items()])
def test_a_benchmark_at_its_smallest_writes_its_record(script: str, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    before = kept(script)
    done = smoke(script, tmp_path, "--output", str(output))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    record = json.loads(output.read_text())
    assert record["command"] == f"python benchmarks/{script}.py --smoke --output {output}"
    assert record["hardware"]["cpu"] and record["hardware"]["cores"] == os.cpu_count()
    assert {"python", "platform", "torch", "numpy", "accelerate"} <= set(record["versions"])
    found = {pointer: at(record, pointer) for pointer in NUMBERS[script]}
    assert all(isinstance(number, int | float) and number > 0 for number in found.values()), found
    assert kept(script) == before


@pytest.mark.slow
def test_a_smoke_run_without_an_output_prints_the_record_and_writes_nothing(tmp_path: Path) -> None:
    before = kept("plan_million")
    done = smoke("plan_million", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{\n") :])["rows"] == 1000
    assert kept("plan_million") == before
