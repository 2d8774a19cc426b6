"""A job on several machines, started in each way that people have, trains what one command trains by itself."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fake_srun import __file__ as SRUN
from tests.jobs import Job, Said, finish, losses, start, training_processes, vfun_here, wait_for_step
from tests.machines import Host, bare_environment, finish_all, free_port, hosts, networked, start_on
from tests.started import Place, exports, mpirun, operator, pytorchjob, skypilot
from vfun_cli.checkpoints.compare import compare_tensors
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

STEPS = 2
TRAIN = ("train", "cogvideox-fun", "--demo", f"--max-train-steps={STEPS}", "--report-to=none")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all runs."""
    return tmp_path_factory.mktemp("ways")


@pytest.fixture(scope="module")
def two(place: Path) -> RunDir:
    """A run of two processes that one command has started; it makes the demo."""
    finish(start(*TRAIN, "--ddp", "--num-processes=2", "--output-dir=two", cwd=place, environment=bare_environment()))
    return RunDir(place / "two")


@pytest.fixture(scope="module")
def four(place: Path, two: RunDir) -> Iterator[RunDir]:
    """The same of four processes, sharded, for which the processors of this host do not count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("vfun_cli.devices.cpu_cores", lambda: 4)
        patch.setenv("OMP_NUM_THREADS", "1")
        said = vfun_here(*TRAIN, "--fsdp", "--num-processes=4", "--output-dir=four")
    assert said.code == 0, said.err
    yield RunDir(place / "four")


def machines(place: Path, number: int, name: str) -> list[Host]:
    return hosts(number, place / name, demo=place / "vfun-demo")


def require_same(run: RunDir, other: RunDir) -> None:
    assert losses(run) == losses(other) and len(losses(run)) == STEPS
    first, second = (open_checkpoint(each.checkpoint(STEPS)).weights for each in (run, other))
    assert compare_tensors(first, second).same


def train(hosts: list[Host], run: RunDir, environment: Callable[[Place], dict[str, str]], strategy: str) -> list[Said]:
    port = free_port()

    def found(host: Host) -> dict[str, str]:
        at = Place(machines=len(hosts), machine=host.number, each=1, address=hosts[0].address, port=port)
        return environment(at)

    return finish_all(start_on(hosts, lambda host: [*TRAIN, strategy, f"--output-dir={run.root}"], found))


def test_machines_in_networks_of_their_own_by_the_documents_exports(place: Path, two: RunDir) -> None:
    run = RunDir(place / "exported")
    with networked(machines(place, 2, "of-exports")) as reached:
        said = train(reached, run, exports, "--ddp")
    require_same(run, two)
    told = "num_machines 2 ($WORLD_SIZE), machine_rank 1 ($RANK), main_process_ip 10.77.0.1 ($MASTER_ADDR)"
    assert told in said[1].err


@pytest.mark.long
@pytest.mark.parametrize("way", [pytorchjob, operator, mpirun, skypilot])
def test_two_machines_by_what_else_tells_them(way: Callable[[Place], dict[str, str]], place: Path, two: RunDir) -> None:
    run = RunDir(place / way.__name__)

    def environment(at: Place) -> dict[str, str]:
        unsaid = {"SKYPILOT_NUM_GPUS_PER_NODE": "0", "VFUN_MAIN_PROCESS_PORT": str(at.port)} if way is skypilot else {}
        return {**way(at), **unsaid, "VFUN_NUM_PROCESSES": "2"}

    train(machines(place, 2, f"of-{way.__name__}"), run, environment, "--ddp")
    require_same(run, two)


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_tasks_of_a_step_of_slurm(tasks: int, place: Path, two: RunDir) -> None:
    """One for each machine, and one for each process of a machine."""
    run, number = RunDir(place / f"step-{tasks}"), 2 // tasks
    folders = [host.folder for host in machines(place, number, f"of-step-{tasks}")]
    by = [sys.executable, SRUN, str(tasks), str(free_port() % 20_000 + 20_000), *map(str, folders), "--"]
    processes = ["--num-processes=2"] if tasks == 1 else []
    environment = bare_environment()
    finish(start(*TRAIN, "--ddp", *processes, f"--output-dir={run.root}", by=by, environment=environment))
    require_same(run, two)


def torchrun(hosts: list[Host], each: int, *arguments: object) -> list[Job]:
    """Its agent on each machine starts a command for each rank."""
    port = free_port()
    return start_on(
        hosts,
        lambda host: [*TRAIN, *arguments],
        by_of=lambda host: [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", f"--node_rank={host.number}",
            f"--nproc_per_node={each}", f"--master_addr={hosts[0].address}", f"--master_port={port}", "--no-python",
        ],
    )  # fmt: skip


def test_the_ranks_of_torchrun_on_two_machines_join_one_job(place: Path, four: RunDir) -> None:
    run = RunDir(place / "torchrun")
    finish_all(torchrun(machines(place, 2, "of-torchrun"), 2, "--fsdp", f"--output-dir={run.root}"))
    require_same(run, four)
    assert {path.name for path in run.root.glob("launch*")} == {"launch", "launch-machine-1"}


@pytest.mark.long
def test_four_machines(place: Path, four: RunDir) -> None:
    run = RunDir(place / "four-machines")
    train(machines(place, 4, "of-four"), run, exports, "--fsdp")
    require_same(run, four)


@pytest.mark.long
@pytest.mark.parametrize("whom", ["torchrun", "all"])
def test_a_job_of_torchrun_that_is_told_to_stop_saves(whom: str, place: Path, two: RunDir) -> None:
    """Also where the scheduler tells every process itself, and torchrun tells them again."""
    run = RunDir(place / f"told-{whom}")
    (job,) = torchrun(
        machines(place, 1, f"of-told-{whom}"), 2, "--ddp", f"--output-dir={run.root}", "--max-train-steps=100000",
        "--checkpointing-steps=100000",
    )  # fmt: skip
    wait_for_step(run, 2, job)
    told = [job.pid] if whom == "torchrun" else [*parents_of(training_processes(run)[0]), job.pid]
    for pid in told:
        os.kill(pid, signal.SIGTERM)
    finish(job, None)
    assert list(run.root.glob("checkpoint-*"))
    assert run.outcome().read_text(encoding="utf-8").startswith('{"ending": "preempted"')


def parents_of(processes: list[int]) -> list[int]:
    return [int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) for pid in processes]
