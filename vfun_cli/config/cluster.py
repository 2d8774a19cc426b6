"""Where a launch finds the machines of its job: in the variables that what started it has left in its environment.

Each way of starting is a row of ``SOURCES``. All rows whose variables are set are read; what two of them say of one
option has to agree, and so has what was typed.
"""

import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from vfun_cli.errors import ConfigError

OPTIONS = ("num_machines", "machine_rank", "main_process_ip", "main_process_port", "num_processes")
"""What the environment can say of a job."""

DEFAULT_PORT = 29_500
"""torchrun's, where nobody states one."""

PORTS_OF_SLURM = range(20_000, 40_000)
"""A job meets at the port of its number among these, so that jobs on one machine do not meet each other."""

NO_STEP = 0xFFFF_FFF0
"""SLURM's numbers of what is no step that ``srun`` has started begin here: a batch script, a shell of ``salloc``."""

Environ = Mapping[str, str]
"""Variables that are set to something."""


@dataclass(frozen=True)
class Found:
    """A value, and by which variables."""

    value: int | str
    variables: str
    """``$NAME``, or how several make the value."""


Reader = Callable[[Environ], Found | None]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One way in which the commands of a job are started."""

    name: str
    marks: tuple[str, ...]
    """Where one of them is set the row is read. A command without them is not started that way."""
    needs: tuple[str, ...] = ()
    """What is set wherever one of the marks is."""
    states: Mapping[str, tuple[Reader, ...]]
    """By option; what several readers find agrees, too."""
    suggests: Mapping[str, Reader] = field(default_factory=dict)
    """By option, what holds where nothing states another value: a port made of a number, the GPUs that there are."""
    local: tuple[Reader, Reader] | None = None
    """Where it starts more than one process of a machine: which of them this is, and how many there are."""
    replaces: tuple[str, ...] = ()
    """Rows that are not read beside this one: their variables mean another thing then."""
    inner: bool = False
    """Whether what other rows tell was for the launcher that started this process. Only machines are counted alike."""

    def is_there(self, environ: Environ) -> bool:
        """Whether a command was started that way."""
        return any(name in environ for name in self.marks)

    def left_out(self, environ: Environ) -> str:
        """The beginning of a command that is started as if the row's variables were not set."""
        return "env " + " ".join(f"-u {name}" for name in self.marks if name in environ)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the environment says."""

    stated: Mapping[str, tuple[Found, Source]]
    suggested: Mapping[str, tuple[Found, Source]]
    local_rank: int | None = None
    """Which of its machine's processes this is, where a launcher has started all of them."""
    local_ranks: int = 1
    """How many there are."""


# Readers -------------------------------------------------------------------------------------------------------------


def _number(name: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ConfigError(
            f"${name} is {text!r}; a whole number from {least} is needed.",
            hint=f"Export the right one, or leave it out: env -u {name} before the command.",
        )
    return int(text)


def _whole(*names: str, least: int = 0) -> Reader:
    """The number in the first of these variables that is set."""

    def read(environ: Environ) -> Found | None:
        name = next((name for name in names if name in environ), None)
        return None if name is None else Found(_number(name, environ[name], least), f"${name}")

    return read


def _text(name: str) -> Reader:
    return lambda environ: Found(environ[name], f"${name}") if name in environ else None


def _first_address(environ: Environ) -> Found | None:
    name = "SKYPILOT_NODE_IPS"
    return Found(environ[name].split()[0], f"${name}") if name in environ else None


def _int(found: Found) -> int:
    assert isinstance(found.value, int)
    return found.value


def _divided(total: Reader, each: Reader) -> Reader:
    """Machines: all ranks by those of each.

    Raises:
        ConfigError: no whole number of machines.
    """

    def read(environ: Environ) -> Found | None:
        ranks, local_ranks = total(environ), each(environ)
        if ranks is None or local_ranks is None:
            return None
        machines, rest = divmod(_int(ranks), _int(local_ranks))
        if rest:
            raise ConfigError(
                f"{ranks.variables} is {ranks.value} and {local_ranks.variables} is {local_ranks.value}: the machines "
                "of a job have to have the same number of processes each.",
                hint="Start as many on each machine, or one command a machine, which starts its own.",
            )
        return Found(machines, f"{ranks.variables} / {local_ranks.variables}")

    return read


def _machine_of(rank: Reader, local_rank: Reader, each: Reader) -> Reader:
    """The machine of a rank.

    Raises:
        ConfigError: the ranks of a machine do not follow each other.
    """

    def read(environ: Environ) -> Found | None:
        one, local, local_ranks = rank(environ), local_rank(environ), each(environ)
        if one is None or local is None or local_ranks is None:
            return None
        machine, place = divmod(_int(one), _int(local_ranks))
        if place != local.value:
            raise ConfigError(
                f"{one.variables} is {one.value}, {local.variables} is {local.value} and {local_ranks.variables} is "
                f"{local_ranks.value}: the ranks are not numbered machine by machine.",
                hint="Number them so (mpirun --map-by slot), or start one command a machine.",
            )
        return Found(machine, f"{one.variables} / {local_ranks.variables}")

    return read


def _multiplied(each: Reader, machines: Reader) -> Reader:
    """Processes: those of a machine, times the machines."""

    def read(environ: Environ) -> Found | None:
        own, count = each(environ), machines(environ)
        if own is None or count is None:
            return None
        return Found(_int(own) * _int(count), f"{own.variables} x {count.variables}")

    return read


def _where_several(each: Reader, reader: Reader) -> Reader:
    """Only where a machine has several processes; a single one is the machine's command, which starts all others."""

    def read(environ: Environ) -> Found | None:
        found = each(environ)
        return reader(environ) if found is not None and _int(found) > 1 else None

    return read


def _nodes_of_torchrun(environ: Environ) -> Found | None:
    """``2``, or a range as torchrun takes it."""
    text = environ.get("PET_NNODES")
    if text is None:
        return None
    least, _, most = text.partition(":")
    if most and most != least:
        raise ConfigError(
            f"$PET_NNODES is {text!r}: the number of machines of a run does not change while it trains.",
            hint="Ask for as many at least as at most; vfun resume goes on with more or fewer.",
        )
    return Found(_number("PET_NNODES", least, 1), "$PET_NNODES")


def _each_of_torchrun(environ: Environ) -> Found | None:
    """A number; its words (auto, gpu, cpu) mean what vfun chooses by itself."""
    text = environ.get("PET_NPROC_PER_NODE", "")
    return None if text in ("", "auto", "gpu", "cpu") else _whole("PET_NPROC_PER_NODE", least=1)(environ)


def _address_of_torchrun(environ: Environ) -> Found | None:
    return _text("PET_MASTER_ADDR")(environ) or _endpoint(environ, 0)


def _port_of_torchrun(environ: Environ) -> Found | None:
    return _whole("PET_MASTER_PORT", least=1)(environ) or _endpoint(environ, 2)


def _endpoint(environ: Environ, part: int) -> Found | None:
    """Its address (0) or port (2), where the meeting place is one of the machines and no other service."""
    name = "PET_RDZV_ENDPOINT"
    text = environ.get(name, "")
    if environ.get("PET_RDZV_BACKEND", "c10d") not in ("c10d", "static"):
        return None
    host, _, port = (text if ":" in text else f"{text}:").rpartition(":")
    if not host or (part == 2 and not port):
        return None
    return Found(_number(name, port, 1) if part == 2 else host, f"${name}")


def _exported_machines(environ: Environ) -> Found | None:
    """WORLD_SIZE. A PyTorchJob counts the processes of all its pods in it, and the pods in PET_NNODES."""
    found = _whole("WORLD_SIZE", least=1)(environ)
    if found is None:
        return None
    pods, all_processes = _nodes_of_torchrun(environ), _multiplied(_each_of_torchrun, _nodes_of_torchrun)(environ)
    if pods is not None and all_processes is not None and all_processes.value == found.value:
        return Found(pods.value, "$WORLD_SIZE / $PET_NPROC_PER_NODE")
    return found


_SLURM_NODES = _whole("SLURM_STEP_NUM_NODES", "SLURM_NNODES", least=1)
_SLURM_NODE = _whole("SLURM_NODEID")


def _tasks_of_slurm(environ: Environ) -> Found | None:
    """Tasks of each node, such as ``2(x4)``; as an older srun says it, all tasks over all nodes.

    Raises:
        ConfigError: not the same number on each.
    """
    name = next((name for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if name in environ), None)
    if name is None:
        return _divided(_whole("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", least=1), _SLURM_NODES)(environ)
    counts = {part.partition("(")[0] for part in environ[name].split(",")}
    if len(counts) > 1:
        raise ConfigError(
            f"${name} is {environ[name]!r}: the machines of a job have to have the same number of processes each.",
            hint="Start one task a machine, which starts its own: srun --ntasks-per-node=1.",
        )
    return Found(_number(name, counts.pop(), 1), f"${name}")


def _address_of_slurm(environ: Environ) -> Found | None:
    name = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if name in environ), None)
    return None if name is None else Found(first_host(environ[name]), f"${name}")


def _port_of_slurm(environ: Environ) -> Found | None:
    if "SLURM_JOB_ID" not in environ:
        return None
    number = _number("SLURM_JOB_ID", environ["SLURM_JOB_ID"], 0)
    return Found(PORTS_OF_SLURM[number % len(PORTS_OF_SLURM)], "$SLURM_JOB_ID")


def first_host(hosts: str) -> str:
    """The first of a list of hosts as SLURM writes it: ``gpu001`` of ``gpu[001-003,7],login2``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


# The table -----------------------------------------------------------------------------------------------------------


_RANK, _LOCAL_RANK, _RANKS = _whole("RANK"), _whole("LOCAL_RANK"), _whole("WORLD_SIZE", least=1)


def _local_ranks(environ: Environ) -> Found | None:
    """As torchrun and DeepSpeed's launcher say it; where a script made ranks of tasks, as srun and mpirun do."""
    found = _whole("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", least=1)(environ)
    return found or (_tasks_of_slurm(environ) if _in_step(environ) else None)


_MPI_RANK, _MPI_RANKS = _whole("OMPI_COMM_WORLD_RANK"), _whole("OMPI_COMM_WORLD_SIZE", least=1)
_MPI_LOCAL_RANK, _MPI_LOCAL_RANKS = (
    _whole("OMPI_COMM_WORLD_LOCAL_RANK"),
    _whole("OMPI_COMM_WORLD_LOCAL_SIZE", least=1),
)
_SKY_NODES = _whole("SKYPILOT_NUM_NODES", least=1)

SOURCES = (
    Source(
        name="a launcher of ranks",  # torchrun, accelerate launch, deepspeed
        marks=("LOCAL_RANK", "RANK", "WORLD_SIZE"),
        needs=("LOCAL_RANK", "RANK", "WORLD_SIZE"),
        states={
            "num_machines": (_divided(_RANKS, _local_ranks), _whole("GROUP_WORLD_SIZE", least=1)),
            "machine_rank": (_machine_of(_RANK, _LOCAL_RANK, _local_ranks), _whole("GROUP_RANK")),
            "num_processes": (_RANKS,),
        },
        local=(_LOCAL_RANK, _local_ranks),
        replaces=("exports",),
        inner=True,
    ),
    Source(
        name="mpirun",
        marks=("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        needs=tuple(f"OMPI_COMM_WORLD_{each}" for each in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")),
        states={
            "num_machines": (_divided(_MPI_RANKS, _MPI_LOCAL_RANKS),),
            "machine_rank": (_machine_of(_MPI_RANK, _MPI_LOCAL_RANK, _MPI_LOCAL_RANKS),),
            "num_processes": (_where_several(_MPI_LOCAL_RANKS, _MPI_RANKS),),
        },
        local=(_where_several(_MPI_LOCAL_RANKS, _MPI_LOCAL_RANK), _MPI_LOCAL_RANKS),
        replaces=("srun",),  # a step of mpirun's own, without the machine that it was typed on
    ),
    Source(
        name="srun",
        marks=("SLURM_STEP_ID",),
        states={
            "num_machines": (_SLURM_NODES,),
            "machine_rank": (_SLURM_NODE,),
            "num_processes": (_where_several(_tasks_of_slurm, _multiplied(_tasks_of_slurm, _SLURM_NODES)),),
        },
        suggests={
            "main_process_ip": _address_of_slurm,
            "main_process_port": _port_of_slurm,
            "num_processes": _multiplied(_whole("SLURM_GPUS_ON_NODE", least=1), _SLURM_NODES),
        },
        local=(_where_several(_tasks_of_slurm, _whole("SLURM_LOCALID")), _tasks_of_slurm),
    ),
    Source(
        name="SkyPilot",
        marks=("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"),
        states={"num_machines": (_SKY_NODES,), "machine_rank": (_whole("SKYPILOT_NODE_RANK"),)},
        suggests={
            "main_process_ip": _first_address,
            "num_processes": _multiplied(_whole("SKYPILOT_NUM_GPUS_PER_NODE"), _SKY_NODES),
        },
    ),
    Source(
        name="torchrun's settings",  # of Kubernetes' operators
        marks=("PET_NNODES", "PET_NODE_RANK"),
        states={
            "num_machines": (_nodes_of_torchrun,),
            "machine_rank": (_whole("PET_NODE_RANK"),),
            "main_process_ip": (_address_of_torchrun,),
            "main_process_port": (_port_of_torchrun,),
            "num_processes": (_multiplied(_each_of_torchrun, _nodes_of_torchrun),),
        },
    ),
    Source(
        name="exports",  # of the documents of the original scripts, PAI-DLC, a PyTorchJob
        marks=("WORLD_SIZE", "RANK", "NUM_PROCESS"),
        states={
            "num_machines": (_exported_machines,),
            "machine_rank": (_RANK,),
            "num_processes": (_whole("NUM_PROCESS", least=1),),
        },
    ),
    Source(
        name="a meeting place",
        marks=("MASTER_ADDR", "MASTER_PORT"),
        states={"main_process_ip": (_text("MASTER_ADDR"),), "main_process_port": (_whole("MASTER_PORT", least=1),)},
    ),
)
"""From the innermost to the outermost."""


def _in_step(environ: Environ) -> bool:
    return "SLURM_STEP_ID" in environ and _number("SLURM_STEP_ID", environ["SLURM_STEP_ID"], 0) < NO_STEP


def _present(environ: Environ) -> Iterator[tuple[Source, bool]]:
    """The rows to read, and whether of their options the machines alone count."""
    found = [source for source in SOURCES if source.is_there(environ)]
    found = [source for source in found if source.name != "srun" or _in_step(environ)]
    found = [source for source in found if not source.inner or "LOCAL_RANK" in environ]
    replaced = {name for source in found for name in source.replaces}
    inner = next((source for source in found if source.inner), None)
    for source in found:
        if source.name not in replaced:
            yield source, inner not in (None, source) and source.name != "a meeting place"


def read(variables: Mapping[str, str]) -> Job:
    """What the environment says of a job; nothing where no variable of it is set.

    Raises:
        ConfigError: a value that is none, a set of variables that is not whole, two values that differ.
    """
    environ = {name: value.strip() for name, value in variables.items() if value.strip()}
    stated: dict[str, tuple[Found, Source]] = {}
    suggested: dict[str, tuple[Found, Source]] = {}
    local: tuple[int, int] | None = None
    for source, machines_alone in _present(environ):
        if missing := [f"${name}" for name in source.needs if name not in environ]:
            there = [f"${name}" for name in source.needs if name in environ]
            raise ConfigError(
                f"{' and '.join(there)} {_are(there)} set, and {' and '.join(missing)} {_are(missing)} not.",
                hint=f"Leave out what belongs to another job: {source.left_out(environ)} before the command.",
            )
        for option, readers in source.states.items():
            if machines_alone and option != "num_machines":
                continue
            for found in filter(None, (reader(environ) for reader in readers)):
                earlier, other = stated.setdefault(option, (found, source))
                if not same(option, earlier.value, found.value):
                    raise _differ(option, (earlier, other), (found, source), environ)
        if machines_alone:
            continue
        for option, reader in source.suggests.items():
            suggestion = reader(environ)
            if suggestion is not None and suggestion.value:
                suggested.setdefault(option, (suggestion, source))
        if source.local is not None and local is None:
            local = _local(source, environ)
    return Job(
        stated=stated,
        suggested={option: each for option, each in suggested.items() if option not in stated},
        local_rank=None if local is None else local[0],
        local_ranks=1 if local is None else local[1],
    )


def _local(source: Source, environ: Environ) -> tuple[int, int] | None:
    """Of the processes that were started on this machine: which this is, how many there are.

    Raises:
        ConfigError: one is not said, or they do not go together.
    """
    assert source.local is not None
    rank, ranks = (reader(environ) for reader in source.local)
    if rank is None:
        return None
    if ranks is None:
        raise _incomplete(f"{rank.variables} is set", "how many ranks this machine has", "Export LOCAL_WORLD_SIZE too")
    if int(rank.value) >= int(ranks.value):
        raise ConfigError(f"{rank.variables} is {rank.value} of {ranks.value} ({ranks.variables}): ranks count from 0.")
    return int(rank.value), int(ranks.value)


def settle(
    job: Job, typed: Mapping[str, tuple[object, str]], environ: Mapping[str, str], *, counts_gpus: bool
) -> dict[str, Found]:
    """What the environment adds to what was typed.

    Args:
        typed: of the same options, the value, and where it was typed.
        counts_gpus: whether as many processes start as a scheduler counts GPUs.

    Raises:
        ConfigError: it differs from what was typed, or does not say all that several machines need.
    """
    stated = {option: found for option, (found, _) in job.stated.items()}
    machines = typed["num_machines"][0] if "num_machines" in typed else None
    if machines is None and "num_machines" in stated:
        machines = stated["num_machines"].value
    suggested = {option: found for option, (found, _) in job.suggested.items()}
    if machines in (None, 1):  # it meets nobody, and has the GPUs that it sees
        suggested = {}
        stated = {option: found for option, found in stated.items() if not option.startswith("main_process")}
    if not counts_gpus:
        suggested.pop("num_processes", None)
    for option, (value, where) in typed.items():
        if option in stated and not same(option, value, stated[option].value):
            left_out = job.stated[option][1].left_out(environ)
            raise ConfigError(
                f"{where} is {value}, and {stated[option].variables} makes it {stated[option].value}.",
                hint=f"Drop {where}, or leave out what does not belong to this job: {left_out} before the command.",
            )
    known = {*typed, *suggested, *stated}
    if "machine_rank" in stated and machines is None:
        raise _incomplete(
            f"{stated['machine_rank'].variables} is set", "how many machines there are", "Export WORLD_SIZE too"
        )
    if "num_machines" in stated and machines != 1:
        why = f"{stated['num_machines'].variables} makes num_machines {machines}"
        if "machine_rank" not in known:
            raise _incomplete(why, "which of them this is", "Export RANK too, add --machine-rank")
        if "main_process_ip" not in known:
            raise _incomplete(why, "the address of machine 0", "Export MASTER_ADDR too, add --main-process-ip")
    return {option: found for option, found in {**suggested, **stated}.items() if option not in typed}


def is_told(option: str, source: str) -> bool:
    """Whether the environment of a launch told an option, so that it says nothing of the next launch."""
    return option in OPTIONS and source.startswith("$") and not source.startswith("$VFUN_")


def launcher_listens(environ: Mapping[str, str]) -> bool:
    """Whether a launcher of ranks has a store of its own where they are told to meet: nobody else can listen there."""
    return bool(environ.get("LOCAL_RANK")) and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def outside_of_step(variables: Mapping[str, str]) -> str | None:
    """What to say to a command that a batch script of several machines starts on one of them; None elsewhere."""
    environ = {name: value.strip() for name, value in variables.items() if value.strip()}
    machines = environ.get("SLURM_JOB_NUM_NODES", environ.get("SLURM_NNODES", "1"))
    if "SLURM_JOB_ID" not in environ or _in_step(environ) or machines == "1":
        return None
    return f"This job of SLURM has {machines} machines, and the command runs on one of them: srun starts it on all."


def same(option: str, first: object, second: object) -> bool:
    """Whether two values of an option are one: of an address also where two names lead to the same machine."""
    if option != "main_process_ip" or first == second:
        return first == second
    return bool(_addresses(str(first)) & _addresses(str(second)))


@cache
def _addresses(host: str) -> frozenset[object]:
    try:
        return frozenset(entry[4][0] for entry in socket.getaddrinfo(host, None))
    except OSError:
        return frozenset()


def _differ(option: str, first: tuple[Found, Source], second: tuple[Found, Source], environ: Environ) -> ConfigError:
    one, other = first[0], second[0]
    ways = dict.fromkeys(source.left_out(environ) for _, source in (second, first))
    return ConfigError(
        f"{one.variables} makes {option} {one.value}, and {other.variables} makes it {other.value}.",
        hint=f"Leave out what does not belong to this job: {', or '.join(ways)} before the command.",
    )


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _incomplete(why: str, what: str, way: str) -> ConfigError:
    return ConfigError(f"{why}, and nothing says {what}.", hint=f"{way}, or unset what belongs to another job.")
