"""Kill -9 at random moments of whole jobs, over the strategies: no kill may cost more than the steps since a save.

Every round of a strategy starts one job and kills all its processes again and again: half of the kills at a random
moment, half inside a save, which is found by the directory that a save writes into. After each kill every checkpoint
that counts as complete is verified byte by byte, and the job is resumed. When it ends, its weights must equal those of
an undisturbed run bit for bit.

    python benchmarks/kill_fuzz.py --kills 200
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.compare import compare_tensors, moments
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.rundir import RunDir

STRATEGIES = ("single", "ddp", "fsdp", "zero2", "zero3")
STEPS = 24
RESULTS = Path(__file__).parent / "results" / "kill_fuzz.json"


def start(*arguments: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"KILL_FUZZ": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "vfun_cli", *arguments]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def kill_all() -> None:
    """Every process of the job, wherever it moved to: they inherit a mark."""
    mark = f"KILL_FUZZ={os.getpid()}".encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), 9)
        except OSError:
            continue


def train(run: RunDir, strategy: str) -> "subprocess.Popen[bytes]":
    return start(
        "train", "wan-s2v", "--demo", "--strategy", strategy, "--output-dir", str(run.root), "--max-train-steps",
        str(STEPS), "--checkpointing-steps", "1", "--checkpoints-total-limit", "3", "--report-to", "none",
    )  # fmt: skip


def wait_for_kill(run: RunDir, job: "subprocess.Popen[bytes]", inside_save: bool, rng: random.Random) -> str | None:
    """Until the moment has come; what the job was doing, or None if it ended before."""
    delay, began = rng.uniform(0, 3), None
    while job.poll() is None:
        saving = any(run.root.glob(".checkpoint-*"))
        training = saving or (run.metrics.exists() and run.metrics.stat().st_size > 0)
        if inside_save and saving:
            time.sleep(rng.uniform(0, 0.3))
            return "save" if any(run.root.glob(".checkpoint-*")) else "step after a save"
        if training and began is None:
            began = time.monotonic()
        if not inside_save and began is not None and time.monotonic() - began > delay:
            return "save" if saving else "step"
        time.sleep(0.002)
    return None


def undisturbed(root: Path, strategy: str) -> Path:
    run = RunDir(root / f"{strategy}-undisturbed")
    job = train(run, strategy)
    _, said = job.communicate()
    assert job.returncode == 0, said.decode()
    return run.checkpoint(STEPS)


def verify_all(run: RunDir) -> int:
    """Every complete checkpoint, byte by byte; the newest step."""
    complete = manifest.checkpoints(run.root)
    for path in complete:
        manifest.verify(path)
        open_checkpoint(path)
    return manifest.step_of(complete[-1]) or 0 if complete else 0


def fuzz(root: Path, strategy: str, kills: int, rng: random.Random, seen: Counter[str]) -> None:
    expected = undisturbed(root, strategy)
    done, rounds = 0, 0
    while done < kills:
        rounds += 1
        run = RunDir(root / f"{strategy}-{rounds}")
        job, newest = train(run, strategy), 0
        while True:
            doing = wait_for_kill(run, job, rng.random() < 0.5, rng) if done < kills else None
            if doing is None:
                _, said = job.communicate()
                assert job.returncode == 0, said.decode()
                break
            kill_all()
            job.communicate()
            done += 1
            seen[doing] += 1
            step = verify_all(run)
            assert step >= newest, f"{run.root}: step {newest} was whole, now {step} is the newest"
            newest = step
            print(f"{strategy} kill {done}/{kills} inside a {doing}, newest whole checkpoint {step}", flush=True)
            job = start("resume", str(run.root)) if newest else restart(run, strategy)
        first, last = open_checkpoint(expected), open_checkpoint(run.checkpoint(STEPS))
        assert compare_tensors(first.weights, last.weights).same, f"{run.root}: other weights"
        assert compare_tensors(moments(first), moments(last)).same, f"{run.root}: other moments"
        shutil.rmtree(run.root)


def restart(run: RunDir, strategy: str) -> "subprocess.Popen[bytes]":
    """Nothing was saved yet: from the start."""
    shutil.rmtree(run.root, ignore_errors=True)
    return train(run, strategy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, seen, began = random.Random(given.seed), Counter[str](), time.monotonic()
    result = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    result |= {"command": " ".join(["python", *sys.argv]), "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        share, more = divmod(given.kills, len(STRATEGIES))
        for number, strategy in enumerate(STRATEGIES):
            fuzz(Path(folder).absolute(), strategy, share + (number < more), rng, seen)
            # After each strategy, so that an interrupted benchmark leaves what it found.
            done = STRATEGIES[: number + 1]
            result |= {"strategies": list(done), "kills": seen.total(), "killed inside a": dict(seen)}
            result |= {"lost or damaged": 0, "seconds": round(time.monotonic() - began)}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
