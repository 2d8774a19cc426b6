"""From the command to the first step, and how long a checkpoint holds training up.

Start-up is measured from outside on the embedded default, until the first step is told, against its floor:
``accelerate launch`` of a script that imports what a training process imports and does nothing.

The stall of a checkpoint is the time between the end of a step and the next one that is not that step's own, with the
writing in the foreground and in the background: on the embedded default, whose checkpoint has 8 to 10 MB, and on the
same with a transformer of 103 million weights in float32, whose checkpoint has over a gigabyte. There, the floor is a
plain write of as many bytes to the same disk with an fsync at the end. A checkpoint in the background is copied to
memory, then written while steps go on: they are told apart from those beside which nothing is written. Clips come from
a full cache and steps compute in float32, so that a step is short; a checkpoint is the same in any precision.

    python benchmarks/startup.py --repeats 3
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import record

STRATEGIES = ("single", "fsdp")
SMALL = {"steps": 8, "every": 2}
LARGE = {"steps": 18, "every": 6}
"""Steps of a run, and how many lie between two checkpoints."""
WIDE = {"dim": 1024, "ffn_dim": 4096, "num_heads": 8}
"""What the larger transformer has other than the demo's: 103 million weights."""
GIGABYTE = 10**9
FLOORS = 3
WARM_UP = 2
IMPORTS = "import torch, accelerate, vfun_cli.training.session, vfun_cli.families.wan_s2v.adapter\n"
DEMO = Path("vfun-demo/wan-s2v/model")
CACHED = ("--cache", "cache", "--cache-variants", "1", "--mixed-precision", "no")


def vfun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vfun_cli", *arguments]


def options(strategy: str, folder: Path, steps: int, *more: str) -> list[str]:
    return [
        "train", "wan-s2v", "--demo", "--strategy", strategy, "--output-dir", str(folder), "--max-train-steps",
        str(steps), "--report-to", "none", "--dataloader-num-workers", "1", "--overwrite", *more,
    ]  # fmt: skip


def seconds(argv: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True)
    return time.perf_counter() - began


def to_first_step(strategy: str, folder: Path) -> float:
    """Seconds until the line of the first step is there, of a run of one step: it is told when the next has begun."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    began = time.perf_counter()
    argv = vfun(*options(strategy, folder, 1))
    job = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not metrics.exists() or '"loss"' not in metrics.read_text():
        assert job.poll() is None, "the run ended without a step"
        time.sleep(0.01)
    found = time.perf_counter() - began
    assert job.wait() == 0
    return found


def floor(strategy: str, folder: Path) -> float:
    """The launcher and the imports alone."""
    script = folder.with_suffix(".py")
    script.write_text(IMPORTS)
    config = str(folder / "launch" / "accelerate.yaml")
    return seconds([sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, str(script)])


def widen(model: Path) -> None:
    """The demo's model with a wider transformer, in ``model``."""
    from vfun_cli.demo.wan_s2v import write_shards
    from vfun_cli.families.wan_s2v.transformer import WanS2VTransformer3DModel

    shutil.copytree(DEMO, model)
    config = json.loads((model / "config.json").read_text()) | WIDE
    transformer = WanS2VTransformer3DModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    write_shards(model, {name: value.bfloat16() for name, value in transformer.state_dict().items()})
    (model / "config.json").write_text(json.dumps(config))


def watched(argv: list[str], folder: Path) -> tuple[list[tuple[float, dict[str, Any]]], dict[str, float]]:
    """Run a job; the lines of its metrics and its checkpoints, each with the moment when it was there."""
    lines: list[tuple[float, dict[str, Any]]] = []
    whole: dict[str, float] = {}
    with tempfile.TemporaryFile() as said:
        job = subprocess.Popen(argv, stdout=said, stderr=said)
        ended = False
        while not ended:
            time.sleep(0.01)
            ended = job.poll() is not None
            now, metrics = time.perf_counter(), folder / "metrics.jsonl"
            told = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            lines += [(now, json.loads(line)) for line in told[len(lines) :] if line.endswith("\n")]
            for path in folder.glob("checkpoint-*"):
                whole.setdefault(path.name, now)
        said.seek(0)
        assert job.returncode == 0, said.read().decode()[-3000:]
    return lines, whole


def stall(strategy: str, lengths: dict[str, int], *more: str, background: bool) -> dict[str, Any]:
    """What checkpoints cost: seconds of holding up, of a step, and of one beside which a checkpoint is written."""
    folder, steps = Path(f"{strategy}-stall"), lengths["steps"]
    how = "--async-checkpoint" if background else "--no-async-checkpoint"
    argv = options(strategy, folder, steps, *CACHED, "--checkpointing-steps", str(lengths["every"]), how, *more)
    lines, whole = watched(vfun(*argv), folder)
    size = sum(path.stat().st_size for path in (folder / f"checkpoint-{steps}").rglob("*") if path.is_file())
    shutil.rmtree(folder)
    # The last checkpoint is in the foreground always.
    saves = {line["step"]: (moment, line["seconds"]) for moment, line in lines if line.get("event") == "checkpoint"}
    del saves[steps]
    writing = {step: max(0.0, whole[f"checkpoint-{step}"] - moment) for step, (moment, _) in saves.items()}
    alone, beside, left = list[float](), list[float](), 0.0
    for line in (line for _, line in lines if "loss" in line):
        left = writing.get(line["step"] - 1, left)
        if line["step"] > WARM_UP:
            (beside if background and left > 0 else alone).append(line["seconds"])
        left -= line["seconds"] + line["data_wait"]
    assert saves and alone, "no checkpoint, or no step without one"
    found: dict[str, Any] = {
        "seconds held up": round(median(held for _, held in saves.values()), 3),
        "seconds of a step": round(median(alone), 3),
    }
    if background:
        found["seconds of writing beside the steps"] = round(median(writing.values()), 3)
        found["seconds of a step beside the writing"] = round(median(beside), 3) if beside else None
    return {**found, "bytes": size}


def plain_write(size: int) -> float:
    """Seconds of writing as many bytes and an fsync."""
    block, path, taken = os.urandom(1 << 22), Path("plain"), []
    for _ in range(FLOORS):
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
            os.fsync(file.fileno())
        taken.append(time.perf_counter() - began)
        path.unlink()
    return median(taken)


def large_stalls(strategy: str, model: Path, lengths: dict[str, int]) -> dict[str, Any]:
    """Both ways on the wider transformer, beside the plain write."""
    found: dict[str, Any] = {
        where: stall(
            strategy, lengths, "--pretrained-model-name-or-path", str(model), background=where == "in the background"
        )
        for where in ("in the foreground", "in the background")
    }
    size = found["in the foreground"]["bytes"]
    plain = plain_write(size)
    for row in found.values():
        row["bytes a second held up"] = round(row["bytes"] / row["seconds held up"])
        row["held up over a plain write"] = round(row["seconds held up"] / plain, 2)
    writing = found["in the background"]["seconds of writing beside the steps"]
    found["in the background"]["writing over a plain write"] = round(writing / plain, 2)
    found["plain write and fsync"] = {"seconds": round(plain, 3), "bytes a second": round(size / plain)}
    return found


def main() -> None:
    parser = record.parser("startup", __doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("startup", "stall"), help="measure one of the two; default: both")
    given = parser.parse_args()
    strategies: tuple[str, ...] = STRATEGIES
    small, large = SMALL, LARGE
    if given.smoke:
        given.repeats, strategies = 1, STRATEGIES[:1]
        small = large = {"steps": 4, "every": 2}
        WIDE.update(dim=128, ffn_dim=256)
    result: dict[str, Any] = {"width of the larger transformer": WIDE}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        subprocess.run(vfun("plan-buckets", "wan-s2v", "--demo"), check=True, capture_output=True)  # makes the demo
        model = Path("wide")
        widen(model)
        for strategy in strategies:
            found = result[strategy] = {}
            if given.only != "stall":
                found |= start(strategy, given.repeats)
                record.write_result(given, result)
            if given.only != "startup":
                steps = str(max(small["steps"], large["steps"]))
                seconds(vfun("cache", "wan-s2v", "--demo", "--strategy", strategy, "--max-train-steps", steps, *CACHED))
                found["checkpoint in the foreground"] = stall(strategy, small, background=False)
                found["checkpoint in the background"] = stall(strategy, small, background=True)
                found["checkpoint of the larger transformer"] = large_stalls(strategy, model, large)
                size = found["checkpoint of the larger transformer"]["in the foreground"]["bytes"]
                assert given.smoke or size >= GIGABYTE, size
            print(strategy, json.dumps(found, indent=1), flush=True)
            record.write_result(given, result)


def start(strategy: str, repeats: int) -> dict[str, float]:
    """Seconds to the first step, and of what it cannot do without."""
    folder = Path(strategy)
    first, floors, plans = [], [], []
    for _ in range(repeats):  # side by side, so that a noisy minute touches all
        plans.append(seconds(vfun("plan-buckets", "wan-s2v", "--demo")))
        first.append(to_first_step(strategy, folder))
        floors.append(floor(strategy, folder))
    shutil.rmtree(folder)
    return {
        "seconds to the first step": round(median(first), 2),
        "of these, checks and plan": round(median(plans), 2),
        "floor: launcher and imports": round(median(floors), 2),
        "over the floor": round(median(first) / median(floors), 2),
    }


if __name__ == "__main__":
    main()
