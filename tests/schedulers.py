"""Schedulers that take the files of ``--emit`` as they are, and start on machines of this host what these say.

They do to the commands of a job what the real ones do: the same variables, the same signals to the same processes, and
the same reaction to an exit code.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import yaml

from tests.job_files import directives
from tests.jobs import MARK, TIMEOUT, marked
from tests.machines import Host, bare_environment
from tests.started import Place, pytorchjob, skypilot, step

Job = subprocess.Popen[bytes]

# What a file starts ------------------------------------------------------------------------------------------------


def container_of(text: str, kind: str, variables: Mapping[str, str] | None = None) -> list[str]:
    """What a pod of a PyTorchJob runs, with the container's variables where ``$(NAME)`` stands."""
    pod = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"][kind]["template"]["spec"]
    (container,) = pod["containers"]
    return [_expanded(word, variables or {"RANK": "0"}) for word in [*container["command"], *container["args"]]]


def _expanded(word: str, variables: Mapping[str, str]) -> str:
    """As Kubernetes does: ``$$`` is ``$``, and ``$(NAME)`` the variable if there is one."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, word)


def without_image(script: str) -> str:
    """A script of sbatch that is filled in for machines on which vfun is installed."""
    return script.replace("IMAGE='<IMAGE>'", "IMAGE=''")


ONE_RANK = '#!/bin/sh\nwhile [ "$1" != --no-python ]; do shift; done\nshift\nLOCAL_RANK=0 exec "$@"\n'
"""What is started in place of torchrun by a machine with one process."""


def started_by(engine: str, text: str) -> list[str]:
    """The words of the command that a file starts on a machine."""
    with tempfile.TemporaryDirectory() as folder:
        _program(Path(folder, "vfun"), "#!/bin/sh\nprintf '%s\\0' vfun \"$@\"\n")
        _program(Path(folder, "srun"), '#!/bin/sh\nwhile [ "$1" != vfun ]; do shift; done\nexec "$@"\n')
        _program(Path(folder, "torchrun"), ONE_RANK)
        environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_CPUS_PER_TASK": "1", "NODE_RANK": "0", "MASTER_ADDR": "here",
        }  # fmt: skip
        said = subprocess.run(_starts(engine, text), env=environment, capture_output=True, check=True)
    return said.stdout.decode().split("\0")[:-1]


def _starts(engine: str, text: str) -> list[str]:
    match engine:
        case "slurm" | "torchrun":
            return ["bash", "-c", without_image(text)]
        case "kubernetes":
            return container_of(text, "Master")
        case "skypilot":
            run: str = yaml.safe_load(text)["run"]
            return ["bash", "-c", run]
    raise AssertionError(engine)


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


INSTALLED = {"vfun": "vfun_cli", "torchrun": "torch.distributed.run"}
"""The programs that a machine with vfun has, and the modules that they are."""

# Schedulers --------------------------------------------------------------------------------------------------------


class Scheduler(ABC):
    """One of them, with a job."""

    def __init__(self, text: str, machines: Sequence[Host], folder: Path, port: int) -> None:
        """The file as it is filled in; the folder in which it was submitted; the port at which the machines meet."""
        self.text = text
        self.machines = machines
        self.folder = folder
        self.port = port
        self.starts = 0
        """How often the job was started."""
        self.marks: list[str] = []
        """By which all processes of each command are known."""
        self.tools = folder / "tools"
        self.tools.mkdir()
        for name, module in INSTALLED.items():
            _program(self.tools / name, f'#!/bin/sh\nexec {sys.executable} -P -m {module} "$@"\n')

    @abstractmethod
    def start(self) -> Job:
        """Start the job; returns a process that lives as long as all is well."""

    @abstractmethod
    def warn(self) -> None:
        """Tell the job that it loses its machines, or one of them."""

    @abstractmethod
    def finish(self) -> int:
        """Until the job is over, however often it has to be started again; the code that it ended with."""

    def place(self, number: int) -> Place:
        """A machine among those of the job."""
        return Place(
            machines=len(self.machines), machine=number, each=1, address=self.machines[0].address, port=self.port
        )

    def end(self) -> None:
        """Leave nothing behind."""
        for mark in self.marks:
            send(signal.SIGKILL, mark)

    def launch(self, host: Host, command: Sequence[str], **variables: str) -> Job:
        """A command on a machine, with a mark of its own."""
        self.marks.append(str(uuid4()))
        path = f"{self.tools}:{os.environ['PATH']}"
        environment = {**bare_environment(), "PATH": path, MARK: self.marks[-1], **variables}
        output = (self.folder / f"machine-{host.number}.log").open("ab")
        return subprocess.Popen(
            [*host.by, *command], cwd=host.folder, env=environment, start_new_session=True, stdout=output, stderr=output
        )


def send(number: signal.Signals, mark: str) -> None:
    """A signal to all of them."""
    for process in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(process, number)


def wait_all(jobs: Sequence[Job]) -> list[int]:
    """The exit codes, as a shell has them."""
    return [code if (code := job.wait(TIMEOUT)) >= 0 else 128 - code for job in jobs]


class Slurm(Scheduler):
    """``sbatch``, ``srun`` and ``scontrol``."""

    NUMBER = "17"
    STEP = "step of slurm"

    def start(self) -> Job:
        asked = directives(self.text)
        assert int(asked["nodes"] or 0) == len(self.machines) and asked["open-mode"] == "append"
        for tool in ("srun", "scontrol"):
            _program(self.tools / tool, f"#!{sys.executable}\nfrom tests import schedulers\nschedulers.{tool}()\n")
        self.script = self.folder / "slurm_script"  # its copy, which is what runs
        self.script.write_text(self.text)
        self.log = self.folder / str(asked["output"]).replace("%j", self.NUMBER)
        self.asked = asked
        self._begin()
        return self.job

    def _begin(self) -> None:
        self.starts += 1
        self.step = f"{self.STEP} {uuid4()}"
        self.marks.append(self.step)
        hosts = [[host.address, str(host.folder)] for host in self.machines]
        environment = {
            **bare_environment(),
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "SLURM_JOB_ID": self.NUMBER,
            "SLURM_JOB_NUM_NODES": str(len(hosts)),
            "SLURM_NNODES": str(len(hosts)),
            "SLURM_CPUS_PER_TASK": str(self.asked["cpus-per-task"]),
            "SLURM_RESTART_COUNT": str(self.starts - 1),
            "FAKE_SLURM": json.dumps(
                {"hosts": hosts, "port": self.port, "mark": self.step, "folder": str(self.folder)}
            ),
        }
        with self.log.open("ab") as output:
            self.job = subprocess.Popen(
                ["bash", self.script], cwd=self.folder, env=environment, stdout=output, stderr=output
            )

    def warn(self) -> None:
        """``--signal`` without B: to every process of the step, and neither to the script nor to srun."""
        name, _, _ = str(self.asked["signal"]).partition("@")
        send(signal.Signals[f"SIG{name}"], self.step)

    def finish(self) -> int:
        while True:
            code = self.job.wait(TIMEOUT)
            requeued = self.folder / f"requeued-{self.NUMBER}"
            if not requeued.exists():
                return code
            requeued.unlink()
            assert "requeue" in self.asked
            self._begin()


def srun() -> NoReturn:
    """One task on each machine of the job that this process belongs to; ends with the largest of their codes."""
    words = sys.argv[1:]
    count = next(place for place, word in enumerate(words) if not word.startswith("-"))
    known = {"--ntasks-per-node": "1", "--kill-on-bad-exit": "0", "--wait": "0", "--label": "",
             "--cpus-per-task": os.environ["SLURM_CPUS_PER_TASK"]}  # fmt: skip
    for option, _, value in (word.partition("=") for word in words[:count]):
        assert known.get(option) == value, f"srun {option}={value}"
    told = json.loads(os.environ["FAKE_SLURM"])
    tasks = []
    for number, (_, folder) in enumerate(told["hosts"]):
        at = Place(machines=len(told["hosts"]), machine=number, each=1, address=told["hosts"][0][0], port=told["port"])
        variables = {**step(at), "SLURM_JOB_ID": os.environ["SLURM_JOB_ID"], MARK: told["mark"]}
        tasks.append(subprocess.Popen(words[count:], cwd=folder, env=os.environ | variables, start_new_session=True))
    sys.exit(max(wait_all(tasks)))


def scontrol() -> None:
    """``scontrol requeue JOB``."""
    what, number = sys.argv[1:]
    assert what == "requeue" and number == os.environ["SLURM_JOB_ID"]
    Path(json.loads(os.environ["FAKE_SLURM"])["folder"], f"requeued-{number}").touch()


class Operator(Scheduler):
    """Of PyTorchJobs: each pod for itself is made anew when it is gone, or has ended with 128 or more."""

    def start(self) -> Job:
        replicas = yaml.safe_load(self.text)["spec"]["pytorchReplicaSpecs"]
        assert {kind: each["replicas"] for kind, each in replicas.items()} == {
            "Master": 1, "Worker": len(self.machines) - 1
        }  # fmt: skip
        self.kinds = ["Master", *["Worker"] * (len(self.machines) - 1)]
        assert all(each["restartPolicy"] == "ExitCode" for each in replicas.values())
        self.ports = {
            port["name"]: port["containerPort"]
            for port in replicas["Master"]["template"]["spec"]["containers"][0]["ports"]
        }
        assert self.ports["pytorchjob-port"] == self.port
        self.drained: set[int] = set()
        self.pods = [self._pod(number) for number in range(len(self.machines))]
        return self.pods[0]

    def _pod(self, number: int) -> Job:
        self.starts += number == 0
        variables = {**pytorchjob(self.place(number)), "PYTHONUNBUFFERED": "1"}
        return self.launch(self.machines[number], container_of(self.text, self.kinds[number], variables), **variables)

    def warn(self) -> None:
        """The last machine is drained: SIGTERM to the first process of its pod, which is made anew elsewhere."""
        self.pods[-1].terminate()
        self.drained.add(len(self.pods) - 1)

    def finish(self) -> int:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            for number, pod in enumerate(self.pods):
                code = pod.poll()
                if code is None or code == 0:
                    continue
                if number not in self.drained and code < 128:
                    return code
                self.drained.discard(number)
                self.pods[number] = self._pod(number)
            if all(pod.poll() == 0 for pod in self.pods):
                return 0
            time.sleep(0.1)
        raise AssertionError("the pods do not end")


class SkyPilot(Scheduler):
    """Its managed jobs: the first command that fails ends the others at once, and some codes start all again."""

    def start(self) -> Job:
        self.task = yaml.safe_load(self.text)
        assert self.task["num_nodes"] == len(self.machines)
        self._begin()
        return self.commands[0]

    def _begin(self) -> None:
        self.starts += 1
        self.commands = [
            self.launch(host, ["bash", "-c", self.task["run"]], **skypilot(self.place(host.number)))
            for host in self.machines
        ]

    def warn(self) -> None:
        """The last machine is shut down: SIGTERM to all of its processes."""
        send(signal.SIGTERM, self.marks[-1])

    def finish(self) -> int:
        again = self.task["resources"]["job_recovery"]["recover_on_exit_codes"]
        while True:
            while not (ended := [command.poll() for command in self.commands if command.poll() is not None]):
                time.sleep(0.1)
            if any(ended):
                self.end()
            codes = wait_all(self.commands)
            if not set(codes) & set(again):
                return max(codes)
            self._begin()


class Person(Scheduler):
    """Starts a script on each machine, and starts it again where it says that the state is saved."""

    def start(self) -> Job:
        self._begin()
        return self.scripts[0]

    def _begin(self) -> None:
        self.starts += 1
        self.scripts = [
            self.launch(
                host, ["bash", "-c", self.text], NODE_RANK=str(host.number), MASTER_ADDR=self.machines[0].address
            )
            for host in self.machines
        ]

    def warn(self) -> None:
        """SIGTERM to the script of the last machine alone."""
        self.scripts[-1].terminate()

    def finish(self) -> int:
        while set(codes := wait_all(self.scripts)) == {75}:
            self._begin()
        return max(codes)


SCHEDULERS: Mapping[str, type[Scheduler]] = {
    "slurm": Slurm, "kubernetes": Operator, "skypilot": SkyPilot, "torchrun": Person
}  # fmt: skip
"""By the word that --emit takes."""
