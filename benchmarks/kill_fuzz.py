"""Kill -9 at random moments, over the strategies: no kill may cost more than the steps since a save.

One job after the other is started, and all its ranks are killed again and again: half of the kills at a random
moment (loading, a step, a save), half inside a save, which is found by the directory that a save writes into. After
each kill every checkpoint that counts as complete is verified byte by byte, and the job is resumed from the newest.
When it ends, its weights and moments must equal those of an undisturbed run bit for bit.

The ranks get the environment of ``accelerate launch``, recorded once a strategy, but are forked from a process that
has imported torch and DeepSpeed already, which makes a kill cost four seconds instead of fifteen.

    python benchmarks/kill_fuzz.py --kills 200
"""

import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import record

from vfun_cli import families
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.compare import compare_tensors, moments
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.launch.job import Job, decide
from vfun_cli.launch.start import write_launch_files, write_plan
from vfun_cli.run import locate, ownership
from vfun_cli.run.rundir import RunDir

STRATEGIES = ("single", "ddp", "fsdp", "zero2", "zero3")
STEPS = 24
SAVES_SPARED = 3
"""A kill inside a save falls into one of the first so many after a start, so that jobs get on."""
DUMP = """import json, os, sys
with open(f"{sys.argv[1]}.{os.environ.get('RANK', 0)}", "w") as file:
    json.dump(dict(os.environ), file)
"""


def write_job(run: RunDir, strategy: str, *, steps: int, cache: Path) -> Job:
    """What ``vfun train`` and ``vfun resume`` write before they start the ranks."""
    spec = families.find("wan-s2v")
    given = {
        "strategy": strategy, "output_dir": run.root, "max_train_steps": steps, "checkpointing_steps": 1,
        "checkpoints_total_limit": 3, "report_to": "none", "dataloader_num_workers": 1, "cache": cache,
    }  # fmt: skip
    resolved = resolve("train", spec, given, demo=demo_default.make(spec), environ={})
    ownership.remove_leftovers(run, 0)
    job = decide("train", spec, resolved, found=locate.newest(run))
    write_plan(job)
    write_launch_files(job)
    return job


def environments(job: Job, folder: Path) -> list[dict[str, str]]:
    """What ``accelerate launch`` gives each rank of this strategy."""
    script = folder / "dump.py"
    script.write_text(DUMP)
    argv = job.launch.argv[: job.launch.argv.index("vfun_cli.training") - 1]
    target = folder / f"environment-{job.config.strategy}"
    subprocess.run([*argv, str(script), str(target)], check=True, capture_output=True)
    found = sorted(folder.glob(f"{target.name}.*"))
    return [json.loads(path.read_text()) for path in found]


def start(job: Job, ranks: list[dict[str, str]]) -> list[int]:
    """Fork the ranks; each leads a session of its own, with its decoding processes in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_fork(job, environment | {"MASTER_PORT": str(port)}) for environment in ranks]


def _fork(job: Job, environment: dict[str, str]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # there is no agent: rank 0 keeps the store
        log = os.open(job.run.launcher_log(), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        from vfun_cli.training.__main__ import main

        code = main([str(job.run_json)])
    except BaseException:
        code = 70
    os._exit(code)


def kill(ranks: list[int]) -> None:
    """All ranks and what they started."""
    for rank in ranks:
        os.killpg(rank, signal.SIGKILL)
    for rank in ranks:
        os.waitpid(rank, 0)


def ended(ranks: list[int]) -> list[int] | None:
    """Exit codes once all ranks have ended by themselves."""
    if all(os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT) for rank in ranks):
        return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    return None


def wait_for_kill(run: RunDir, ranks: list[int], inside_save: bool, longest: float, rng: random.Random) -> str | None:
    """Until the moment has come; what the job was doing, or None if it ended before."""
    began, delay, spared = time.monotonic(), rng.uniform(0, longest), rng.randrange(SAVES_SPARED)
    seen: set[str] = set()
    while True:
        if all(os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT) for rank in ranks):
            return None
        seen |= {path.name for path in run.root.glob(".checkpoint-*")}
        saving = any(run.root.glob(".checkpoint-*"))
        if inside_save and saving and len(seen) > spared:
            time.sleep(rng.uniform(0, 0.1))
            return "save" if any(run.root.glob(".checkpoint-*")) else "step after a save"
        if not inside_save and time.monotonic() - began > delay:
            return "save" if saving else "loading or a step"
        time.sleep(0.002)


def verify_all(run: RunDir) -> int:
    """Every complete checkpoint, byte by byte; the newest step."""
    complete = manifest.checkpoints(run.root)
    for path in complete:
        manifest.verify(path)
        open_checkpoint(path)
    return manifest.step_of(complete[-1]) or 0 if complete else 0


def finish(run: RunDir, ranks: list[int]) -> None:
    """Wait for the ranks' own end."""
    while (codes := ended(ranks)) is None:
        time.sleep(0.05)
    assert not any(codes), f"{codes}\n{run.launcher_log().read_text()[-3000:]}"


def fuzz(root: Path, strategy: str, kills: int, steps: int, rng: random.Random, seen: Counter[str]) -> None:
    straight = RunDir(root / f"{strategy}-undisturbed")
    job = write_job(straight, strategy, steps=steps, cache=root / "cache")
    ranks_of = environments(job, root)
    straight.logs.mkdir(exist_ok=True)
    finish(straight, start(job, ranks_of))  # fills the cache and the page cache
    shutil.rmtree(straight.root)
    straight.logs.mkdir(parents=True)
    began = time.monotonic()
    ranks = start(write_job(straight, strategy, steps=steps, cache=root / "cache"), ranks_of)
    while not straight.checkpoint(1).exists():
        time.sleep(0.01)
    longest = 2 * (time.monotonic() - began)  # a kill at a random moment: while loading, or as long after it
    finish(straight, ranks)
    expected = straight.checkpoint(steps)
    done, rounds = 0, 0
    while done < kills:
        rounds += 1
        run, newest = RunDir(root / f"{strategy}-{rounds}"), 0
        run.logs.mkdir(parents=True)
        while True:
            ranks = start(write_job(run, strategy, steps=steps, cache=root / "cache"), ranks_of)
            doing = wait_for_kill(run, ranks, rng.random() < 0.5, longest, rng) if done < kills else None
            if doing is None:
                finish(run, ranks)
                break
            kill(ranks)
            done += 1
            seen[doing] += 1
            step = verify_all(run)
            assert step >= newest, f"{run.root}: step {newest} was whole, now {step} is the newest"
            newest = step
            print(f"{strategy} kill {done}/{kills} inside a {doing}, newest whole checkpoint {step}", flush=True)
        first, last = open_checkpoint(expected), open_checkpoint(run.checkpoint(steps))
        assert compare_tensors(first.weights, last.weights).same, f"{run.root}: other weights"
        assert compare_tensors(moments(first), moments(last)).same, f"{run.root}: other moments"
        shutil.rmtree(run.root)


def import_all() -> None:
    """What the ranks would import one by one; nothing here may start a thread."""
    for name in ("deepspeed", "vfun_cli.families.wan_s2v.adapter", "vfun_cli.training.session"):
        importlib.import_module(name)


def main() -> None:
    parser = record.parser("kill_fuzz", __doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    strategies, steps = STRATEGIES, STEPS
    if given.smoke:
        given.kills, strategies, steps = 1, STRATEGIES[:1], 6
    rng, seen, began = random.Random(given.seed), Counter[str](), time.monotonic()
    result: dict[str, Any] = {}
    # Before torch is there: as vfun sets it for its ranks. Threads that spin would take the processors from each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    import_all()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        share, more = divmod(given.kills, len(strategies))
        for number, strategy in enumerate(strategies):
            fuzz(Path(folder).absolute(), strategy, share + (number < more), steps, rng, seen)
            # After each strategy, so that an interrupted benchmark leaves what it found.
            done = strategies[: number + 1]
            result |= {"strategies": list(done), "kills": seen.total(), "killed inside a": dict(seen)}
            result |= {"lost or damaged": 0, "seconds": round(time.monotonic() - began)}
            record.write_result(given, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
