"""Whole runs through the command line: killed and resumed, on two machines, interrupted.

They share the matrix's cache, since encoders round differently on one thread and on two: the launch that fills it goes
before all runs on two processes. What a run is compared with is waited for when the run has ended.
"""

import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest

from tests.integration.matrix import STEPS, memorised, straight, together
from tests.jobs import (
    Said,
    children_of,
    command_line,
    finish,
    kill_all,
    last_step,
    losses,
    start,
    training_processes,
    vfun_process,
    wait_for,
    wait_for_step,
)
from tests.machines import finish_all, free_port, hosts, start_on
from vfun_cli.checkpoints.lora_files import ADAPTER_FILE
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

Trained = Callable[[str], None]
FAMILY = "wan-s2v"


def options(output_dir: Path, **changes: object) -> list[str]:
    """Of a run that trains as those of the matrix do."""
    values = {**memorised(FAMILY), "cache": "cache", "output_dir": output_dir, **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def losses_of_the_matrix(trained: Trained, strategy: str, command: str = "train") -> list[float]:
    """Of the straight run of the family under this strategy."""
    trained(strategy)
    return losses(RunDir(straight(FAMILY, strategy, command).folder))


def killed_and_resumed(strategy: str) -> tuple[RunDir, int]:
    """The run, and the step at which it ended."""
    run, half = RunDir(Path("killed") / strategy), STEPS["train"] // 2
    arguments = options(run.root, dataloader_num_workers=1, **together(strategy))
    job = start("train", FAMILY, "--demo", f"--strategy={strategy}", *arguments)
    wait_for(lambda: run.checkpoint(half).exists() and last_step(run) > half, job)
    for rank in training_processes(run)[1]:  # what decodes is a copy of it
        assert command_line(rank) in map(command_line, children_of([rank]))
    kill_all(job)
    return run, json.loads(vfun_process("resume", run.root, "--json", code=0).out)["step"]


# The engine that gathers and shards most, and one process.
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("zero3", marks=pytest.mark.ahead.with_args(killed_and_resumed, "zero3")),
        pytest.param("single", marks=[pytest.mark.long, pytest.mark.ahead.with_args(killed_and_resumed, "single")]),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(
    strategy: str, result: tuple[RunDir, int], workplace: Path, trained: Trained
) -> None:
    run, step = result
    assert step == STEPS["train"]
    assert losses(run) == losses_of_the_matrix(trained, strategy)
    hashes = []
    for root in (run.root, straight(FAMILY, strategy).folder):
        last = root / f"checkpoint-{STEPS['train']}"
        said = vfun_process("export-bf16", last, "--output", root / "cli-export", "--json", code=0)
        hashes.append(json.loads(said.out)["sha256"])
    assert hashes[0] == hashes[1]


def trained_on_two_machines() -> RunDir:
    """By a command on each, one process each, which share the run directory and the cache."""
    run = RunDir(Path("two-machines"))
    machines, port = hosts(2, Path("machines") / run.root, demo=Path("vfun-demo")), free_port()
    together = options(run.root.absolute(), cache=Path("cache").absolute(), max_train_steps=4)
    jobs = start_on(
        machines,
        lambda host: [
            "train", FAMILY, "--demo", "--ddp", *together, "--num-machines=2", "--num-processes=2",
            f"--machine-rank={host.number}", f"--main-process-ip={machines[0].address}",
            f"--main-process-port={port}",
        ],
    )  # fmt: skip
    finish_all(jobs)
    return run


@pytest.mark.ahead.with_args(trained_on_two_machines)
def test_two_machines_join_one_job(result: RunDir, workplace: Path, trained: Trained) -> None:
    """The same losses as two processes under one launcher."""
    assert losses(result) == losses_of_the_matrix(trained, "ddp")[:4]


def lora_resumed_with_offload(elsewhere: str) -> tuple[RunDir, list[float], bytes]:
    """The run, and the losses and the adapter that it had before its end was cut off and trained again."""
    run = RunDir(Path("lora-offload"))
    network = straight(FAMILY, "zero3", "lora").last_checkpoint()
    arguments = options(run.root, max_train_steps=4, checkpointing_steps=2, lora_dropout=0.1, network_path=network)
    vfun_process("lora", FAMILY, "--demo", "--zero3-offload", *arguments, code=0)
    first, adapter = losses(run), (run.checkpoint(4) / "model" / ADAPTER_FILE).read_bytes()
    shutil.rmtree(run.checkpoint(4))
    Path(elsewhere).mkdir()
    change = ("--ema-decay=0.5", "--allow=ema-decay")  # of what this run does not have
    finish(start("resume", run.root.absolute(), *change, cwd=Path(elsewhere)))
    return run, first, adapter


@pytest.mark.ahead.with_args(lora_resumed_with_offload, "elsewhere", needs=["zero3"])
def test_lora_with_offload_trains_on_from_a_file_and_resumes_its_dropout(
    result: tuple[RunDir, list[float], bytes], workplace: Path, trained: Trained
) -> None:
    run, first, adapter = result
    # The same clips as at the first steps of the run that the file came from, which knew nothing then.
    assert mean(first) < 0.95 * mean(losses_of_the_matrix(trained, "zero3", "lora")[:4])
    state = json.loads((run.checkpoint(4) / "state.json").read_text(encoding="utf-8"))
    assert state["allowed"] == [{"step": 2, "option": "ema_decay", "before": 0.9999, "after": 0.5}]
    assert losses(run) == first
    assert (run.checkpoint(4) / "model" / ADAPTER_FILE).read_bytes() == adapter


def interrupted_and_begun_again() -> tuple[RunDir, Said, int]:
    """The run, what the interrupted command said, and the step that it had saved."""
    run = RunDir(Path("interrupted"))
    arguments = ("train", FAMILY, "--demo", *options(run.root, **together("single")))
    job = start(*arguments)
    wait_for_step(run, 3, job)
    job.send_signal(signal.SIGINT)
    said = finish(job, 130)
    saved = json.loads(run.outcome().read_text(encoding="utf-8"))["step"]
    vfun_process("resume", run.root, "--dry-run", code=0)  # what follows goes on as the original scripts do
    vfun_process(*arguments, "--resume-from-checkpoint=latest", code=0)
    return run, said, saved


@pytest.mark.ahead.with_args(interrupted_and_begun_again)
def test_ctrl_c_saves_and_resume_goes_on(result: tuple[RunDir, Said, int], workplace: Path, trained: Trained) -> None:
    run, said, saved = result
    assert "saved" in said.err and "Traceback" not in said.err, said.err
    assert re.search(
        r"\ncheckpoints: [\d.]+ MB each, at most \d+ at a time: [\d.]+ MB; [\d.]+ [GT]B are free\n", said.err
    )
    assert shlex.split(said.err.rpartition("next: vfun ")[2]) == ["resume", str(run.root)]
    assert saved >= 3 and run.checkpoint(saved).is_dir()
    assert losses(run) == losses_of_the_matrix(trained, "single")
    assert list((run.logs / "tensorboard").glob("events*"))
    assert {path.suffix for path in run.sanity_check.iterdir()} >= {".mp4", ".png", ".wav", ".txt"}
