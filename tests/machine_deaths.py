"""What may go wrong on one of several machines, and what all of them say and do then.

Each case is a job of machines on this host; one of them, the last, is harmed or is started otherwise than the others.
Afterwards the same command runs again on all, in good health, to its end.
"""

import json
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.disks import file_system, fill
from tests.jobs import Job, Said, command_line, finish, kill_all, last_step, losses, processes_of, wait_for
from tests.machines import ROOT, Host, finish_all, free_port, hosts, start_on
from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.compare import moments
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.run.rundir import RunDir

FAMILY = "cogvideox-fun"
STEPS, SAVED_EVERY = 16, 4
HARMED_AFTER = 6
"""Steps: there is a checkpoint then, and something to lose since."""
NOTICED = 30
"""Seconds within which all others have ended."""
OLD_PACKAGE, OLD_VERSION = "peft", "0.17.0"
ROWS, OTHER_ROWS = "one-clip.json", "held-out.json"
"""Metadata that tests make beside those of the demo, of one row and of two."""


Own = tuple[Sequence[object], Mapping[str, str]]
"""Arguments and variables of a machine alone."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a case happens."""

    run: RunDir
    machines: Sequence[Host]

    @property
    def harmed(self) -> Host:
        """The machine that it happens to."""
        return self.machines[-1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that goes wrong."""

    name: str
    says: str
    """A pattern in what every other command says."""
    code: int
    """What they end with."""
    machines: int = 2
    otherwise: Sequence[Callable[[Host], Own]] = ()
    """What the last machines have of their own, one each."""
    harm: Callable[[Place, Job], None] | None = None
    """What happens to it; without it, the machines refuse to begin."""
    after: Callable[[Place], bool] = lambda place: last_step(place.run) >= HARMED_AFTER
    """When."""
    disk: Callable[[Place], Path] | None = None
    """What lies on a disk of its own, of ``DISK``."""
    arguments: Sequence[object] = ()
    """Of all commands."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run came to."""

    losses: list[float]
    digest: str
    """Of every weight and moment of its last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a case ended."""

    said: list[Said]
    """What each command printed; the last is the harmed machine's."""
    seconds: list[float]
    """From the harm, or from the start, until each command had ended."""
    steps: list[int]
    """Of the checkpoints that count as complete then, each of which was read to its last byte."""
    became: Trained | None
    """What the run became, of itself or when the same command was given again; None where it was not."""


DISK = "size=32m"


def loading(place: Place) -> bool:
    """Its rank has been started."""
    return place.run.rank_error_space(place.harmed.number).exists()


def gone(place: Place, job: Job) -> None:
    kill_all(job)


def frozen(place: Place, job: Job) -> None:
    """As a machine that no network and no disk reaches any more: its connections stay open."""
    for process in processes_of(job):
        os.kill(process, signal.SIGSTOP)


def without_a_rank(place: Place, job: Job) -> None:
    described = str(place.run.description(place.harmed.number)).encode()
    words = {process: {*command_line(process).split(b"\0")} for process in processes_of(job)}
    (rank,) = (
        process
        for process, argv in words.items()
        if {described, b"vfun_cli.training"} <= argv and b"vfun_cli.training.launcher" not in argv
    )
    os.kill(rank, signal.SIGKILL)


def told_to_stop(place: Place, job: Job) -> None:
    job.send_signal(signal.SIGTERM)


def shared_disk(place: Place) -> Path:
    return place.run.root


def own_disk(place: Place) -> Path:
    return place.harmed.folder / "cache"


def disk_filled(place: Place, job: Job) -> None:
    """While the machine stands still, and the others wait for it inside of a step: it is full before a checkpoint."""
    frozen(place, job)
    fill(place.run.root)
    for process in processes_of(job):
        os.kill(process, signal.SIGCONT)


def cache_on_a_full_disk(host: Host) -> Own:
    fill(host.folder / "cache")
    return [], {}


def another_folder(host: Host) -> Own:
    return [f"--output-dir={host.folder / 'run'}"], {}


def without_a_model(host: Host) -> Own:
    return ["--pretrained-model-name-or-path=nowhere"], {}


def another_option(host: Host) -> Own:
    return ["--learning-rate=0.5"], {}


def other_rows(host: Host) -> Own:
    return [f"--train-data-meta=vfun-demo/{FAMILY}/data/{OTHER_ROWS}"], {}


def older_package(host: Host) -> Own:
    """Its metadata, which come first where it is looked for."""
    metadata = host.folder / "packages" / f"{OLD_PACKAGE}-{OLD_VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {OLD_PACKAGE}\nVersion: {OLD_VERSION}\n")
    return [], {"PYTHONPATH": os.pathsep.join([str(metadata.parents[1]), str(ROOT)])}


def other_header(host: Host) -> Own:
    """The VAE's header says the same in other bytes."""
    (file,) = (host.folder / "vfun-demo" / FAMILY / "model" / "vae").glob("*.safetensors")
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    text = json.dumps({"__metadata__": {"format": "pt", "by": "another program"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return [], {}


CASES = [
    Case(name="machine gone", harm=gone, code=1, says="error: machine 1 has gone without a word"),
    Case(name="machine frozen", harm=frozen, code=1, says="error: machine 1 has gone without a word"),
    Case(
        name="machine frozen while it loads", harm=frozen, after=loading, code=1,
        says="error: machine 1 has gone without a word",
    ),
    Case(name="machine gone of four", machines=4, harm=gone, code=1, says="error: machine 3 has gone without a word"),
    Case(name="rank killed", harm=without_a_rank, code=1, says="error: rank 1 on machine 1 was ended by SIGKILL"),
    Case(
        name="rank killed and restarted", harm=without_a_rank, code=0, arguments=["--max-restarts=1"],
        says=f"rank 1 on machine 1 was ended by SIGKILL.*restart 1 of 1, from checkpoint-{SAVED_EVERY}",
    ),
    Case(name="SIGTERM", harm=told_to_stop, code=75, says="saved"),
    Case(
        name="shared disk full", harm=disk_filled, disk=shared_disk, code=1,
        says=r"no checkpoint can be written to .*: [\d,]+ bytes are missing",
    ),
    Case(
        name="own disk full", disk=own_disk, otherwise=[cache_on_a_full_disk], code=6,
        says="error: rank 1 on machine 1: .*No space left on device",
    ),
    Case(
        name="no model there", otherwise=[without_a_model], code=5,
        says="error: machine 1: .*nowhere",
    ),
    Case(
        name="another directory", otherwise=[another_folder], code=2,
        says="error: rank 1 on machine 1: its run directory .* is not the one that rank 0 writes to",
    ),
    Case(
        name="another option", otherwise=[another_option], code=2,
        says="the machines do not run the same: --learning-rate is 0.5 on machine 1 and 0.004 on machine 0",
    ),
    Case(
        name="another plan", otherwise=[other_rows], code=2,
        says="the machines do not run the same: what --train-data-meta holds has another row 1, row 2, .*on machine 1",
    ),
    Case(
        name="an older package", otherwise=[older_package], code=2,
        says=f"the machines do not run the same: {OLD_PACKAGE} is {OLD_VERSION} on machine 1 and ",
    ),
    Case(
        name="another model file", otherwise=[other_header], code=2,
        says="the machines do not run the same: what --pretrained-model-name-or-path holds has another "
        r"vae/\S*\.safetensors on machine 1 than on machine 0",
    ),
    Case(
        name="all otherwise", machines=4, otherwise=[another_option, older_package, other_header], code=2,
        says="the machines do not run the same: --learning-rate is 0.5 on machine 1 and 0.004 on machine 0; "
        rf"{OLD_PACKAGE} is {OLD_VERSION} on machine 2 and .* holds has another vae/\S*\.safetensors on machine 3 than",
    ),
]  # fmt: skip


def rows_of_one_clip(demo: Path) -> None:
    """Metadata of one clip, and of another two, beside those of the demo."""
    data = demo / FAMILY / "data"
    rows = json.loads((data / "metadata.json").read_text(encoding="utf-8"))
    video = next(row for row in rows if row["type"] == "video")
    (data / ROWS).write_text(json.dumps([video]), encoding="utf-8")
    (data / OTHER_ROWS).write_text(json.dumps([video | {"text": str(number)} for number in (0, 1)]), encoding="utf-8")


def begin(place: Place, case: Case | None = None) -> list[Job]:
    """The command of each machine, as the case has it."""
    port = free_port()
    count, functions = len(place.machines), () if case is None else case.otherwise
    harmed = place.machines[count - len(functions) :]
    own = {host.number: function(host) for host, function in zip(harmed, functions, strict=True)}

    def said(host: Host) -> list[object]:
        return [
            "train", FAMILY, "--demo", "--ddp", f"--output-dir={place.run.root}",
            f"--train-data-meta=vfun-demo/{FAMILY}/data/{ROWS}", "--video-sample-size=64", "--image-sample-size=64",
            "--token-sample-size=64", "--video-sample-n-frames=9", "--dataloader-num-workers=0",
            f"--max-train-steps={STEPS}", f"--checkpointing-steps={SAVED_EVERY}", "--lr-scheduler=constant",
            "--learning-rate=0.004", "--mixed-precision=no", "--report-to=none", "--cache=cache",
            "--resume-from-checkpoint=latest",
            f"--num-machines={count}", f"--num-processes={count}", f"--machine-rank={host.number}",
            f"--main-process-ip={place.machines[0].address}", f"--main-process-port={port}",
            *(() if case is None else case.arguments), *own.get(host.number, ((), {}))[0],
        ]  # fmt: skip

    return start_on(place.machines, said, lambda host: own.get(host.number, ((), {}))[1])


def prepared(folder: Path, demo: Path, machines: int = 2) -> Place:
    """Machines with copies of the demo, and a run directory that they share."""
    run = RunDir((folder / "shared" / "run").absolute())
    run.root.mkdir(parents=True)
    return Place(run=run, machines=hosts(machines, folder, demo=demo))


def undisturbed(folder: Path, demo: Path, *, machines: int = 2) -> Trained:
    """What the run comes to where nothing happens."""
    place = prepared(folder, demo, machines)
    finish_all(begin(place))
    return trained(place.run)


def trained(run: RunDir) -> Trained:
    """What a run came to that has ended."""
    found = open_checkpoint(run.checkpoint(STEPS))
    digest = sha256()
    for name, tensor in sorted({**found.weights, **moments(found)}.items()):
        digest.update(name.encode() + tensor.read().tobytes())
    return Trained(losses=losses(run), digest=digest.hexdigest())


def performed(case: Case, folder: Path, demo: Path, *, again: bool = True) -> Ending:
    """The case, then the same command on all machines in good health.

    Args:
        again: whether to give that.
    """
    place = prepared(folder, demo, case.machines)
    with ExitStack() as disks:
        if case.disk is not None:
            disks.enter_context(file_system(case.disk(place), DISK))
        said, seconds = ended(case, place)
        complete = manifest.checkpoints(place.run.root)
        for checkpoint in complete:
            manifest.verify(checkpoint)
        if again and said[0].code:
            if case.disk is not None:
                (case.disk(place) / "the rest").unlink()
            for host in place.machines:
                shutil.rmtree(host.folder / demo.name)
                shutil.copytree(demo, host.folder / demo.name)
            finish_all(begin(place))
        became = trained(place.run) if place.run.checkpoint(STEPS).exists() else None
    return Ending(
        said=said, seconds=seconds, steps=[manifest.step_of(each) or 0 for each in complete], became=became
    )  # fmt: skip


def ended(case: Case, place: Place) -> tuple[list[Said], list[float]]:
    """What each command said, and after how many seconds; one that is frozen goes on when the others have ended."""
    jobs = begin(place, case)
    if case.harm is not None:
        wait_for(lambda: case.after(place), jobs[0])
        case.harm(place, jobs[-1])
    began = time.monotonic()
    found = [finished(job, began) for job in jobs[:-1]]
    for process in processes_of(jobs[-1]):
        os.kill(process, signal.SIGCONT)
    found.append(finished(jobs[-1], began))
    said, seconds = zip(*found, strict=True)
    return list(said), list(seconds)


def finished(job: Job, began: float) -> tuple[Said, float]:
    """What a command said, and how long after the beginning it had ended."""
    return finish(job, None), round(time.monotonic() - began, 1)
