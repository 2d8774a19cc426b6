"""A decided job as the file that a scheduler starts it from, or a person on each machine: rendered, started by nobody.

The command in it is the user's own, with absolute paths and without what is of one machine alone, and it always goes on
from the newest checkpoint: whoever starts it again after it was preempted starts the same.
"""

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Template
from typing import TYPE_CHECKING, Any

from vfun_cli import __version__
from vfun_cli.config.cluster import DEFAULT_PORT
from vfun_cli.config.options import LISTS_OF_PATHS, RunConfig, names_paths, options
from vfun_cli.config.resolve import Resolved, is_default, is_said, root_of_set
from vfun_cli.errors import EXIT_PREEMPTED, ConfigError, as_flag
from vfun_cli.run.messages import PREEMPTION_SIGNALS
from vfun_cli.scripts.rows import Setting
from vfun_cli.scripts.write import double_quoted, words_of
from vfun_cli.shipped import shipped

if TYPE_CHECKING:
    from vfun_cli.launch.job import Job

USUAL_GPUS = 8
"""Of each machine, where nobody says how many and there is none here."""
USUAL_HOURS = 24.0
"""Of a job of a scheduler that wants a time limit."""
USUAL_GRACE = 300
"""Seconds. A checkpoint of the largest family, of a dozen bytes for each of 14 billion weights, takes two minutes to a
disk that writes 1.5 GB/s."""
SIGNAL = PREEMPTION_SIGNALS[0].name.removeprefix("SIG")
"""What a scheduler sends before the time is over. It reaches all processes of the job, also Python's own helpers, which
ignore this one of those that vfun takes."""

DECIDED_THERE = ("machine_rank", "main_process_ip")
"""Options of one machine, which the engines tell each."""
DECIDED_HERE = ("num_machines", "num_processes", "main_process_port", "max_hours", "resume_from_checkpoint")
"""Options that the file says itself."""

_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
"""What YAML has no plain way to write, and no shell script should hold."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was typed of --emit."""

    engine: str
    """One of ``ENGINES``."""
    gpus_per_node: int | None = None
    time_limit: float | None = None
    """Hours."""
    grace: int | None = None
    """Seconds."""

    @property
    def seconds(self) -> int:
        """Of grace."""
        return USUAL_GRACE if self.grace is None else self.grace


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Who starts the file, and what it is made of."""

    template: str
    submit: str
    """The command, of whoever has the file under the name in it."""
    fill_in: Mapping[str, str]
    """Placeholders in the file, and what belongs there."""
    values: Callable[["Emitted"], Mapping[str, object]] = lambda made: {}
    """What its template takes beside what all do."""
    tells_port: bool = False
    """Whether the file says by itself at which port the machines meet, and the command hears of it there."""
    limits_time: bool = False
    """Whether it ends a job after some hours in any case."""
    warns: bool = False
    """Whether it leaves a job time to save when it takes the machines away."""


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """A job as a file needs it."""

    job: "Job"
    engine: Engine
    hours: float | None
    """After which the scheduler ends it."""
    grace: int
    """Seconds between its warning and its end."""
    words: Sequence[Sequence[str]]
    """The command, an option with its value each."""
    notices: Sequence[str]
    """What was taken to be so, since nobody said."""

    @property
    def config(self) -> RunConfig:
        """The job's options."""
        return self.job.config

    @property
    def processes_each(self) -> int:
        """On each machine."""
        assert self.config.num_processes is not None
        return self.config.num_processes // self.config.num_machines

    @property
    def gpus(self) -> int:
        """Of each machine."""
        return self.processes_each if self.config.device == "cuda" else 0

    @property
    def cpus(self) -> int:
        """Of each machine: one for each process, and for each that decodes for it."""
        return self.processes_each * (1 + self.config.dataloader_num_workers)

    @property
    def port(self) -> int:
        """Of machine 0."""
        return self.config.main_process_port or DEFAULT_PORT

    @property
    def name(self) -> str:
        """Of the job, as a label of DNS, which Kubernetes makes names of machines from."""
        return f"vfun-{self.job.command}-{self.job.spec.name}".replace(".", "-")


def check(resolved: Resolved, wishes: Wishes) -> None:
    """Refuse what cannot be started from a file, before anything is read.

    Raises:
        ConfigError: options of one machine or of one start, data sets that cannot be typed, no time that is left.
    """
    engine, config = ENGINES[wishes.engine], resolved.config
    _require_elsewhere(resolved)
    _require_gpus(config, wishes)
    _require_typed_sets(config)
    if wishes.grace is not None and wishes.time_limit is None and not (engine.limits_time or engine.warns):
        raise ConfigError(
            f"--grace says how long before its end a job is asked to stop, which --emit {wishes.engine} never does.",
            hint="Drop it, or add --time-limit.",
            option="--grace",
        )
    _hours(config, wishes)


def emitted(job: "Job", wishes: Wishes) -> Emitted:
    """A job, of checked options, as the file of an engine needs it.

    Raises:
        ConfigError: an option holds what no file can say.
    """
    config, (hours, max_hours) = job.config, _hours(job.config, wishes)
    own = {
        "num_machines": config.num_machines,
        "num_processes": config.num_processes,
        "max_hours": max_hours,
        "resume_from_checkpoint": "latest",
    }
    engine = ENGINES[wishes.engine]
    if not engine.tells_port and is_said(job.resolved.sources["main_process_port"]):
        own["main_process_port"] = config.main_process_port
    words = _command(job, own)
    made = Emitted(job=job, engine=engine, hours=hours, grace=wishes.seconds, words=words, notices=[])
    return replace(made, notices=[*_assumed(made, wishes)])


def _assumed(made: Emitted, wishes: Wishes) -> Iterator[str]:
    if made.gpus and wishes.gpus_per_node is None and not is_said(made.job.resolved.sources["num_processes"]):
        yield f"Each machine is taken to have {made.gpus} GPUs; --gpus-per-node says another number."
    if made.hours is not None and wishes.time_limit is None:
        yield f"The job is given {made.hours:g} hours; --time-limit says another number."


def file_of(made: Emitted) -> str:
    """The file of an engine."""
    values = {
        "title": _title(made),
        "facts": "\n".join(_facts(made)),
        "name": made.name,
        "machines": made.config.num_machines,
        "processes_each": made.processes_each,
        "gpus": made.gpus,
        "cpus": made.cpus,
        "grace": made.grace,
        "port": made.port,
        "preempted": EXIT_PREEMPTED,
        "command": _shell_lines(made),
        **made.engine.values(made),
    }
    return _rendered(made.engine.template, values)


def _rendered(template: str, values: Mapping[str, object]) -> str:
    return Template((shipped("templates") / template).read_text(encoding="utf-8")).substitute(values)


def _require_elsewhere(resolved: Resolved) -> None:
    """Nothing that holds on one machine or for one start alone."""
    for name in DECIDED_THERE:
        if is_said(resolved.sources[name]):
            raise ConfigError(
                f"{name} is of one machine, and the file that --emit prints is started on all; each hears there "
                f"which one it is. It comes from: {resolved.sources[name]}.",
                hint="Leave it out.",
                option=as_flag(name),
            )
    given = resolved.config.resume_from_checkpoint
    if given not in (None, "latest"):
        raise ConfigError(
            f"--emit with resume_from_checkpoint {given}: the job would go back there each time it is started again.",
            hint="Leave it out; the file says 'latest', with which it goes on from the newest checkpoint of "
            "--output-dir.",
            option="--resume-from-checkpoint",
        )


def _require_gpus(config: RunConfig, wishes: Wishes) -> None:
    """The GPUs that were typed are those of the processes."""
    assert config.num_processes is not None
    each, typed = config.num_processes // config.num_machines, wishes.gpus_per_node
    if typed is not None and config.device != "cuda":
        raise ConfigError(f"--gpus-per-node {typed} with device {config.device}.", hint="Drop one of them.")
    if typed is not None and each != typed:
        raise ConfigError(
            f"--gpus-per-node {typed}, and num_processes {config.num_processes} on {config.num_machines} machines are "
            f"{each} on each: one process takes one GPU.",
            hint="Drop --gpus-per-node or --num-processes.",
        )


def _hours(config: RunConfig, wishes: Wishes) -> tuple[float | None, float | None]:
    """The time limit of the job, and --max-hours of the run: it stops a grace before the scheduler asks it to, which is
    a grace before the end.

    Raises:
        ConfigError: there is no time left.
    """
    limit, typed, grace = wishes.time_limit, config.max_hours, wishes.seconds
    margin = 2 * grace / 3600
    if limit is None and ENGINES[wishes.engine].limits_time:
        limit = USUAL_HOURS if typed is None else typed + margin
    if limit is None or (typed is not None and typed + margin <= limit):
        return limit, typed
    left = math.floor(100 * (limit - margin)) / 100
    if typed is not None:
        raise ConfigError(
            f"--time-limit {limit:g} leaves {left:g} hours before {grace} seconds to stop in and {grace} to be told "
            f"to; max_hours is {typed:g}.",
            hint="Leave out one of them; it follows from the other.",
            option="--time-limit",
        )
    if left <= 0:
        raise ConfigError(
            f"--time-limit {limit:g} (hours) leaves nothing beside twice --grace {grace} (seconds).",
            hint="Use a longer --time-limit, or a shorter --grace.",
            option="--time-limit",
        )
    return limit, left


def _command(job: "Job", own: Mapping[str, Any]) -> list[list[str]]:
    """The words of the command, by what belongs together.

    Raises:
        ConfigError: an option holds what no file can say.
    """
    config = job.config.absolute()
    said = {name: getattr(config, name) for name in options(job.command) if _belongs(name, job.resolved)}
    settings = {name: value for name, value in {**said, **own}.items() if value is not None}
    found = [["vfun", job.command, job.spec.name]]
    for name, value in settings.items():
        option = as_flag(name)
        words = words_of(name, option, Setting(name=name, value=value))
        if odd := next((odd for word in words if (odd := _UNWRITABLE.search(word))), None):
            raise ConfigError(
                f"{name} holds {odd[0]!a}, which a file of --emit cannot say.",
                hint="Rename what it names, or write it without.",
                option=option,
            )
        found.append(words)
    return found


def _belongs(name: str, resolved: Resolved) -> bool:
    """Whether an option is the user's word, or a path, which depends on where the command is started."""
    source = resolved.sources[name]
    if name in (*DECIDED_HERE, *DECIDED_THERE):
        return False
    path = names_paths(name) or name in LISTS_OF_PATHS
    return is_said(source) or source == DEMO or (path and is_default(source) and bool(getattr(resolved.config, name)))


DEMO = "demo"
"""Source of what --demo says; its files are where the command was typed."""


def _require_typed_sets(config: RunConfig) -> None:
    """Data sets of which a command line can say everything."""
    for each in config.train_data_meta:
        own_root = each.root is not None and each.root != root_of_set(each, config.train_data_dir, typed=False)
        if own_root or each.caption_prefix is not None or each.caption_suffix is not None:
            raise ConfigError(
                f"{each.meta} has a root or captions of its own, which only a [[data]] table of vfun.toml can say; "
                "the command in the file of --emit has no such table.",
                hint="Write them into its metadata, or give all sets one --train-data-dir and one --caption-prefix.",
            )


# What stands in the files ------------------------------------------------------------------------------------------


def _title(made: Emitted) -> str:
    config = made.config
    machines = "1 machine" if config.num_machines == 1 else f"{config.num_machines} machines"
    what = "GPU" if made.gpus else "process"
    each = f"{made.processes_each} {what}{'' if made.processes_each == 1 else 's' if made.gpus else 'es'}"
    return f"vfun {made.job.command} {made.job.spec.name} on {machines} with {each} each, by vfun {__version__}"


def _facts(made: Emitted) -> Iterator[str]:
    """Comments: what is to be done, and what the command needs."""
    yield "#"
    yield f"# Fill in, then: {made.engine.submit}"
    yield from (f"#   {placeholder:<12} {meaning}" for placeholder, meaning in made.engine.fill_in.items())
    yield "# The command names these, which all machines must see there:"
    yield from (f"#   {double_quoted(path)}" for path in _places(made.config))


def _places(config: RunConfig) -> list[str]:
    """Files and folders that the command names."""
    absolute = config.absolute()
    found: list[str] = []
    for name in options():
        value = getattr(absolute, name)
        if name == "train_data_meta":
            found += [str(each.meta) for each in value]
        elif name in LISTS_OF_PATHS:
            found += value
        elif names_paths(name) and value:
            found.append(str(value))
    return list(dict.fromkeys(found))


def _shell_lines(made: Emitted, *, end: str = "") -> str:
    """The command for a shell, an option a line."""
    return f"{end}\n  ".join(shlex.join(words) for words in made.words)


def _slurm(made: Emitted) -> Mapping[str, object]:
    assert made.hours is not None
    minutes = math.ceil(60 * made.hours)
    return {
        "time": f"{minutes // 60}:{minutes % 60:02}:00",
        "signal": SIGNAL,
    }


def _kubernetes(made: Emitted) -> Mapping[str, object]:
    words = [word for words in made.words for word in words]
    escaped = (word.replace("$", "$$") for word in words)  # $(NAME) would become a variable of the container
    workers = made.config.num_machines - 1
    return {
        "arguments": "\n".join(f"{16 * ' '}- {double_quoted(word)}" for word in escaped),
        "workers": _rendered("kubernetes/workers.yaml", {"workers": workers}) if workers else "",
    }


def _skypilot(made: Emitted) -> Mapping[str, object]:
    lines = _shell_lines(made, end=" \\").split("\n")  # the end of a quoted line is one too
    accelerators = f'accelerators: "<GPU>:{made.gpus}"' if made.gpus else f'cpus: "{made.cpus}+"'
    return {"accelerators": accelerators, "command": "\n  ".join(lines)}


ENGINES: Mapping[str, Engine] = {
    "slurm": Engine(
        template="slurm/job.sbatch",
        submit="sbatch job.sbatch",
        fill_in={
            "<IMAGE>": "container image of vfun (Dockerfile); nothing where vfun is installed on the machines",
            "<MOUNTS>": "what the container sees of the disks: /data:/data,/runs:/runs",
        },
        values=_slurm,
        limits_time=True,
        warns=True,
    ),
    "kubernetes": Engine(
        template="kubernetes/pytorchjob.yaml",
        tells_port=True,
        submit="kubectl create -f job.yaml",
        fill_in={
            "<IMAGE>": "container image of vfun (Dockerfile)",
            "<CLAIM>": "persistent volume claim of a disk that all machines share",
            "<MOUNT>": "where the command's paths have it",
        },
        values=_kubernetes,
        warns=True,
    ),
    "skypilot": Engine(
        template="skypilot/task.yaml",
        submit="sky jobs launch job.yaml",
        fill_in={
            "<GPU>": "kind of the GPUs, such as H100",
            "<IMAGE>": "container image of vfun (Dockerfile)",
            "<VOLUME>": "volume that all machines share",
            "<MOUNT>": "where the command's paths have it",
        },
        values=_skypilot,
    ),
    "torchrun": Engine(
        template="torchrun/job.sh",
        tells_port=True,
        submit="NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash job.sh",
        fill_in={
            "NODE_RANK": "number of each machine, from 0",
            "MASTER_ADDR": "address of machine 0, the same on each",
        },
    ),
}
"""By the word that --emit takes."""
