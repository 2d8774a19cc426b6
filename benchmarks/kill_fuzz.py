"""Kill -9 at random moments, over the strategies: no kill may cost more than the steps since a save.

One job after the other is started, and all its ranks are killed again and again: half of the kills at a random
moment (loading, a step, a save), half inside a save, which is found by the directory that a save writes into. After
each kill every checkpoint that counts as complete is verified byte by byte, and the job is resumed from the newest.
When it ends, its weights and moments must equal those of an undisturbed run bit for bit.

The ranks get the environment of ``accelerate launch``, recorded once a strategy, but are forked from a process that
has imported torch and DeepSpeed already, which makes a kill cost four seconds instead of fifteen.

Then the windows that a random moment hardly ever hits, one process each: killed at every touch of the file system in
turn, while a checkpoint takes the place of the one of its step or of the older ones, while --overwrite deletes a run,
while metrics.jsonl is shortened, while an export takes the place of an older one. After each kill the next command must
find a whole checkpoint or export with the right numbers, and set right what is left.

    python benchmarks/kill_fuzz.py --kills 200
"""

import importlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import record

from tests.deaths import each_death
from tests.run.small_run import DESCRIBED, STATE
from vfun_cli import families
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.compare import compare_tensors, moments
from vfun_cli.checkpoints.export import export, replacing
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import ConfigError
from vfun_cli.launch.job import Job, decide
from vfun_cli.launch.start import write_launch_files, write_plan
from vfun_cli.run import locate, ownership
from vfun_cli.run.metrics_file import MetricsFile
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


class Windows:
    """A run of two checkpoints of a small model, and what is done to it."""

    def __init__(self, root: Path) -> None:
        import torch
        from accelerate import Accelerator

        from vfun_cli.training.state.live import TrainedState

        self.run, self.before, self.output, self.base = (root / name for name in ("run", "before", "out/model", "base"))
        self.rundir, self.root = RunDir(self.run), root
        self.base.mkdir(parents=True)
        (self.base / "config.json").write_text("{}")
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=False))
        self.state = TrainedState(accelerator=accelerator, model=model, optimizer=optimizer)
        self.run.mkdir()
        self.rundir.run_json.write_text(json.dumps({**DESCRIBED, "id": "ours"}))
        for step in (1, 2):
            self.save(step)
        shutil.copyfile(self.run / "checkpoint-2/model/model.safetensors", self.base / "model.safetensors")
        self.metrics = b"".join(json.dumps({"step": step, "loss": 1 / step}).encode() + b"\n" for step in range(1, 9))
        self.rundir.metrics.write_bytes(self.metrics)
        (self.run / "notes.txt").write_text("not vfun's")
        self.run.rename(self.before)
        self.expected = open_checkpoint(self.before / "checkpoint-2")
        self.exported = self.export().sha256

    def save(self, step: int, *, keep: int | None = None, background: bool = False) -> None:
        from vfun_cli.training.state.checkpointer import Checkpointer

        config = {"config.json": self.base / "config.json"}
        saver = Checkpointer(self.rundir, "single", keep=keep, config_files=config, staging=self.root / "memory")
        saver.save(self.state, {**STATE, "run_id": "ours", "step": step}, background=background)
        saver.wait()

    def export(self) -> Any:
        return export(
            self.before / "checkpoint-2", self.output, base_dir=self.base, dtype="fp32", overwrite=True, workers=1
        )

    def prepare(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.before, self.run)

    def require_whole_checkpoint(self) -> None:
        found = locate.newest(self.rundir)
        assert found is not None and found.step >= 2, found
        ownership.remove_leftovers(self.rundir, 0)
        whole = manifest.checkpoints(self.run)
        assert [path for _, path in manifest.numbered(self.run)] == whole, "there is half a checkpoint"
        assert not any(path.name.startswith(".") for path in self.run.iterdir())
        manifest.verify(whole[-1])
        saved = open_checkpoint(whole[-1])
        assert compare_tensors(self.expected.weights, saved.weights).same

    def require_deleted(self) -> None:
        if not self.rundir.run_json.exists():
            assert locate.to_resume("latest", output_dir=self.run) is None
        assert not ownership.in_the_way(self.rundir, 0)
        ownership.remove_leftovers(self.rundir, 0)
        ownership.clear(self.rundir, 1)
        assert [path.name for path in self.run.iterdir()] == ["notes.txt"]

    def require_metrics(self) -> None:
        MetricsFile(self.rundir.metrics, last_step=4).close()
        assert self.rundir.metrics.read_bytes() == b"".join(self.metrics.splitlines(keepends=True)[:4])

    def require_export(self) -> None:
        if not self.output.exists():
            with suppress(ConfigError), replacing(self.output, needed=0, overwrite=False):
                raise AssertionError("the older export was not put back")
        assert (self.output / "model.safetensors").exists()
        assert self.export().sha256 == self.exported
        assert list(self.output.parent.iterdir()) == [self.output]

    def cut_metrics(self) -> int:
        """Cut at every byte, with and without zeros after it, as power cuts leave it."""
        for cut in range(len(self.metrics)):
            for zeros in (0, 100):
                self.rundir.metrics.write_bytes(self.metrics[:cut] + bytes(zeros))
                MetricsFile(self.rundir.metrics, last_step=8).close()
                kept = self.rundir.metrics.read_bytes()
                whole = self.metrics[:cut].count(b"\n")
                lines = self.metrics.splitlines(keepends=True)
                # the last line may be whole but for its end, unless zeros stand there
                assert kept in (b"".join(lines[:whole]), b"".join(lines[: whole + 1])), (cut, zeros)
        return 2 * len(self.metrics)


def fuzz_windows(root: Path) -> dict[str, int]:
    """In how many moments each was killed; none may cost a checkpoint, a line or an export."""
    at = Windows(root)
    each: dict[str, tuple[Callable[[], object], Callable[[], None]]] = {
        "save over the checkpoint of its step": (lambda: at.save(2), at.require_whole_checkpoint),
        "save over the only checkpoint": (lambda: at.save(2, keep=1), at.require_whole_checkpoint),
        "save that deletes the older ones": (lambda: at.save(3, keep=1), at.require_whole_checkpoint),
        "save in the background": (lambda: at.save(3, keep=1, background=True), at.require_whole_checkpoint),
        "--overwrite": (lambda: ownership.clear(at.rundir, 1), at.require_deleted),
        "shortening of metrics.jsonl": (lambda: MetricsFile(at.rundir.metrics, last_step=4), at.require_metrics),
        "export over an older one": (at.export, at.require_export),
    }
    found = {}
    for name, (work, after) in each.items():
        where = at.output.parent if after == at.require_export else at.run
        found[name] = each_death(at.prepare, work, after, where)
        print(f"{name}: killed at {found[name]} touches of the file system", flush=True)
    with redirect_stderr(io.StringIO()):  # it says each time that it drops a line
        found["metrics.jsonl cut at a byte"] = at.cut_metrics()
    return found


def import_all() -> None:
    """What the ranks would import one by one; nothing here may start a thread."""
    for name in ("deepspeed", "vfun_cli.families.wan_s2v.adapter", "vfun_cli.training.session"):
        importlib.import_module(name)


def main() -> None:
    parser = record.parser("kill_fuzz", __doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    strategies: tuple[str, ...] = STRATEGIES
    steps = STEPS
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
        for number, strategy in enumerate(strategies if given.kills else ()):
            fuzz(Path(folder).absolute(), strategy, share + (number < more), steps, rng, seen)
            # After each strategy, so that an interrupted benchmark leaves what it found.
            done = strategies[: number + 1]
            result |= {"strategies": list(done), "kills": seen.total(), "killed inside a": dict(seen)}
            result |= {"lost or damaged": 0, "seconds": round(time.monotonic() - began)}
            record.write_result(given, result)
        # Last: the ranks above are forks of this process, in which nothing of torch may have begun.
        result |= {"kills in windows": fuzz_windows(Path(folder).absolute() / "windows")}
        result |= {"lost or damaged": 0, "seconds": round(time.monotonic() - began)}
        record.write_result(given, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
